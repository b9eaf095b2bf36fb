/* content.c: the check of a page's content. */
#include "content.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

static void check_word(const volatile uint64_t *words, uint64_t seed, uint64_t page, uint32_t generation, unsigned word) {
    uint64_t expected = content_expected(seed, page, generation, word), found = words[word];
    if (found == expected)
        return;
    printf("{\"error\":\"wrong content: page %" PRIu64 " generation %u word %u holds %016" PRIx64 ", expected %016" PRIx64 "\"}\n", page,
           generation, word, found, expected);
    fflush(stdout);
    _exit(3);
}

void content_check(const volatile uint64_t *words, uint64_t seed, uint64_t page, uint32_t generation, unsigned count, uint64_t salt) {
    if (count >= PAGE_WORDS) {
        for (unsigned word = 0; word < PAGE_WORDS; word++)
            check_word(words, seed, page, generation, word);
        return;
    }
    check_word(words, seed, page, generation, 0);
    check_word(words, seed, page, generation, PAGE_WORDS - 1);
    check_word(words, seed, page, generation, 1 + generation % PAGE_INNER_WORDS);
    for (unsigned i = 3; i < count; i++)
        check_word(words, seed, page, generation, (unsigned)(random_next(&salt) % PAGE_WORDS));
}
