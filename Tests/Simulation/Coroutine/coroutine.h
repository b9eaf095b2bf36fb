// Threads of the simulation: one runs at a time, and says itself when another may.
#ifndef SIMULATION_COROUTINE_H
#define SIMULATION_COROUTINE_H

#include <stdint.h>

struct coroutine;

// One that will run `body(argument)`; body must not return but leave for good.
struct coroutine *coroutine_make(void (*body)(void *), void *argument);

// Runs it, from outside of any, until it leaves.
void coroutine_enter(struct coroutine *coroutine);

// Back to where the running one was entered.
void coroutine_leave(void);

// It never runs again. What its stack refers to is not released.
void coroutine_drop(struct coroutine *coroutine);

// After so many small steps of the engine the simulation is asked.
void simulation_count(int64_t steps);

#endif
