/* heap_test.c: what heap.c promises, one check after the other; contrib/bench/test-heap runs it on a device at half of its size. */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "content.h"

enum { SIZE = 48 << 20, PAGES = SIZE / PAGE_BYTES };

static unsigned failed, passed;

static void expect(bool good, const char *what) {
    printf("%s %s\n", good ? "ok" : "FAILED", what);
    if (good)
        passed++;
    else
        failed++;
}

static char *take(size_t bytes) { return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

static bool is_zero(const char *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (from[i])
            return false;
    return true;
}

int main(int count, char **arguments) {
    (void)count;
    double seconds = atof(arguments[1]);
    char *heap = take(SIZE);
    expect(heap != MAP_FAILED, "a large mapping is given");
    for (uint32_t page = 0; page < PAGES; page++)
        content_fill((uint64_t *)(void *)(heap + (uint64_t)page * PAGE_BYTES), 1, page);
    uint64_t end = now_nanoseconds() + (uint64_t)(seconds * 1e9);
    do
        for (uint32_t page = 0; page < PAGES; page++)
            content_check((uint64_t *)(void *)(heap + (uint64_t)page * PAGE_BYTES), 1, page, 0, PAGE_WORDS, 0);
    while (now_nanoseconds() < end);
    expect(true, "content stays while pages go out, come in and are sampled");
    expect(fork() == -1 && errno == ENOSYS, "fork is refused");
    expect(take(SIZE) == MAP_FAILED && errno == ENOMEM, "a full device is no memory");
    expect(mremap(heap, SIZE, SIZE / 2, 0) == MAP_FAILED, "mremap is refused");
    expect(madvise(heap, 1 << 20, MADV_DONTNEED) == 0 && is_zero(heap, 1 << 20), "MADV_DONTNEED makes zeros");
    expect(madvise(heap + (1 << 20), 1 << 20, MADV_FREE) == 0, "MADV_FREE is accepted");
    expect(munmap(heap, SIZE) == 0, "munmap");
    char *again = take(SIZE);
    expect(again == heap && is_zero(again, SIZE), "what was given back is given again, and is zeros");
    printf("%u passed, %u failed\n", passed, failed);
    return failed > 0;
}
