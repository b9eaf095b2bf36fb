// Tells ThreadSanitizer what the slow paths of Swift's Mutex do.
//
// The fast paths of Synchronization.Mutex are inlined into the caller: ThreadSanitizer sees an acquiring and a releasing compare-and-swap of the lock
// word. A contended lock or unlock goes on in libswiftSynchronization, which is not instrumented, and changes the word there or in the kernel
// (FUTEX_LOCK_PI): without what stands here every contended Mutex looks like a race. The definitions below come before the library's, pass each call on
// to it and add the missing edge on the lock word, the address that the fast paths use too. They add nothing else: a race that the lock does not
// prevent is reported as ever, in code that runs under `withLock` too.
//
// Linked into the tests' executables by Tests/sanitize. Should a later Swift rename the functions, the false reports come back; none gets lost.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

#define SWIFT __attribute__((swiftcall))
#define SELF __attribute__((swift_context))
#define LOCK_SLOW "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF"
#define TRY_LOCK_SLOW "$s15Synchronization12_MutexHandleV12_tryLockSlowSbyF"
#define UNLOCK_SLOW "$s15Synchronization12_MutexHandleV11_unlockSlowyyF"

typedef SWIFT void lock_function(uint32_t thread, SELF void *word);
typedef SWIFT bool try_function(SELF void *word);
typedef SWIFT void unlock_function(SELF void *word);

static lock_function *next_lock;
static try_function *next_try;
static unlock_function *next_unlock;

__attribute__((constructor)) static void find(void) {
	next_lock = (lock_function *)dlsym(RTLD_NEXT, LOCK_SLOW);
	next_try = (try_function *)dlsym(RTLD_NEXT, TRY_LOCK_SLOW);
	next_unlock = (unlock_function *)dlsym(RTLD_NEXT, UNLOCK_SLOW);
}

SWIFT void lock_slow(uint32_t thread, SELF void *word) __asm__(LOCK_SLOW);
SWIFT void lock_slow(uint32_t thread, SELF void *word) {
	next_lock(thread, word);
	__tsan_acquire(word);
}

SWIFT bool try_lock_slow(SELF void *word) __asm__(TRY_LOCK_SLOW);
SWIFT bool try_lock_slow(SELF void *word) {
	bool locked = next_try(word);
	if (locked) __tsan_acquire(word);
	return locked;
}

SWIFT void unlock_slow(SELF void *word) __asm__(UNLOCK_SLOW);
SWIFT void unlock_slow(SELF void *word) {
	__tsan_release(word);
	next_unlock(word);
}
