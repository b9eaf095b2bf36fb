#define _GNU_SOURCE
#include "coroutine.h"

#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { STACK_BYTES = 256 * 1024, GUARD_BYTES = 4096 };

struct coroutine {
	jmp_buf where;
	ucontext_t start;
	int started;
	void (*body)(void *);
	void *argument;
	char *stack;
	struct coroutine *next_free;
};

static int64_t countdown = 1;
extern void simulation_step_reached(void);

// Called by the engine (Sources/Kernel/Simulation.swift) between the steps of its shared memory.
void memdevd_simulation_step(void)
{
	if (--countdown <= 0)
		simulation_step_reached();
}

void simulation_count(int64_t steps)
{
	countdown = steps;
}

// The engine's is simulated.
void *__real_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);

static jmp_buf outside;
static struct coroutine *running;
static struct coroutine *free_list;

static void trampoline(void)
{
	running->body(running->argument);
	abort();
}

struct coroutine *coroutine_make(void (*body)(void *), void *argument)
{
	struct coroutine *coroutine = free_list;
	if (coroutine) {
		free_list = coroutine->next_free;
	} else {
		coroutine = calloc(1, sizeof(*coroutine));
		char *memory = __real_mmap(NULL, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (!coroutine || memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0)
			abort();
		coroutine->stack = memory + GUARD_BYTES;
	}
	getcontext(&coroutine->start);
	coroutine->start.uc_stack.ss_sp = coroutine->stack;
	coroutine->start.uc_stack.ss_size = STACK_BYTES;
	coroutine->start.uc_link = NULL;
	makecontext(&coroutine->start, trampoline, 0);
	coroutine->started = 0;
	coroutine->body = body;
	coroutine->argument = argument;
	return coroutine;
}

// A context of ucontext.h to begin with, then the jumps of setjmp.h, which make no system call.
void coroutine_enter(struct coroutine *coroutine)
{
	running = coroutine;
	if (_setjmp(outside) == 0) {
		if (coroutine->started)
			_longjmp(coroutine->where, 1);
		coroutine->started = 1;
		setcontext(&coroutine->start);
	}
	running = NULL;
}

void coroutine_leave(void)
{
	struct coroutine *self = running;
	if (_setjmp(self->where) == 0)
		_longjmp(outside, 1);
}

void coroutine_drop(struct coroutine *coroutine)
{
	coroutine->next_free = free_list;
	free_list = coroutine;
}
