/*
 * Seeded contents of which every 8-byte word tells where it belongs.
 *
 * A word is a bijective scramble of (tag, generation, page, word index) under a seed. A checker therefore needs no second copy of the
 * data, and a wrong word can be decoded: it is zero, or an older generation of this page, or a word of another page, or garbage.
 * Shared by the checkers in the guest and the tool that makes disk images on the host; Tests/qemu/run has the same in Python.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum {
	PATTERN_PAGE_BYTES = 4096,
	PATTERN_WORDS = PATTERN_PAGE_BYTES / 8,
	PATTERN_WORD_BITS = 9,
	PATTERN_PAGE_BITS = 23,       /* 32 GiB of pages */
	PATTERN_GENERATION_BITS = 24,
	PATTERN_TAG = 0xA5,           /* top byte of every word before scrambling */
};

#define PATTERN_MULTIPLIER 0x9E3779B97F4A7C15ULL /* odd, so multiplication modulo 2^64 is invertible */
#define PATTERN_INVERSE    0xF1DE83E19937733DULL

struct pattern_place {
	uint32_t generation;
	uint32_t page;
	uint32_t word;
};

/* The key's top byte is 0, so that the tag survives it and no valid word is ever zero. */
static inline uint64_t pattern_key(uint64_t seed)
{
	seed = (seed + 1) * PATTERN_MULTIPLIER;
	return (seed ^ (seed >> 29)) & 0x00FFFFFFFFFFFFFFULL;
}

static inline uint64_t pattern_scramble(uint64_t packed)
{
	packed *= PATTERN_MULTIPLIER;
	return packed ^ (packed >> 32);
}

/* Word 0 of a page before scrambling; word w is this with w xored in. */
static inline uint64_t pattern_base(uint64_t key, uint32_t page, uint32_t generation)
{
	uint64_t packed = (uint64_t)PATTERN_TAG << 56;
	packed |= (uint64_t)(generation & ((1u << PATTERN_GENERATION_BITS) - 1)) << (PATTERN_PAGE_BITS + PATTERN_WORD_BITS);
	packed |= (uint64_t)(page & ((1u << PATTERN_PAGE_BITS) - 1)) << PATTERN_WORD_BITS;
	return packed ^ key;
}

static inline uint64_t pattern_word(uint64_t key, uint32_t page, uint32_t generation, uint32_t word)
{
	return pattern_scramble(pattern_base(key, page, generation) ^ word);
}

/* Where a word belongs; false when it is no word of this seed. */
static inline bool pattern_decode(uint64_t key, uint64_t value, struct pattern_place *place)
{
	uint64_t packed = ((value ^ (value >> 32)) * PATTERN_INVERSE) ^ key;
	place->word = packed & (PATTERN_WORDS - 1);
	place->page = (packed >> PATTERN_WORD_BITS) & ((1u << PATTERN_PAGE_BITS) - 1);
	place->generation = (packed >> (PATTERN_PAGE_BITS + PATTERN_WORD_BITS)) & ((1u << PATTERN_GENERATION_BITS) - 1);
	return packed >> 56 == PATTERN_TAG;
}

/* Writes words [0, words) of a page. */
static inline void pattern_fill(uint64_t key, volatile uint64_t *at, uint32_t page, uint32_t generation, uint32_t words)
{
	uint64_t base = pattern_base(key, page, generation);
	for (uint32_t word = 0; word < words; word++)
		at[word] = pattern_scramble(base ^ word);
}

/* True when words [0, words) are as pattern_fill wrote them. */
static inline bool pattern_matches(uint64_t key, const volatile uint64_t *at, uint32_t page, uint32_t generation, uint32_t words)
{
	uint64_t base = pattern_base(key, page, generation);
	uint64_t difference = 0;
	for (uint32_t word = 0; word < words; word++)
		difference |= at[word] ^ pattern_scramble(base ^ word);
	return difference == 0;
}

/* What is wrong with a page, in words that name the fault. */
struct pattern_report {
	char kind[48];
	uint32_t wrong, words, first;      /* wrong words, words looked at, index of the first wrong one */
	uint64_t expected, got;            /* at the first wrong word */
	struct pattern_place place;        /* of the first wrong word, where it decodes */
	bool decodes;
};

struct pattern_count {
	uint32_t right, zero, older, newer, foreign, moved, garbage;
};

static inline void pattern_count_word(struct pattern_count *count, uint64_t key, uint64_t got, uint32_t page, uint32_t generation, uint32_t word)
{
	struct pattern_place place;
	if (got == pattern_word(key, page, generation, word))
		count->right++;
	else if (got == 0)
		count->zero++;
	else if (!pattern_decode(key, got, &place))
		count->garbage++;
	else if (place.page != page)
		count->foreign++;
	else if (place.word != word)
		count->moved++;
	else if (place.generation < generation)
		count->older++;
	else
		count->newer++;
}

/* The fault that all wrong words share, or "corrupt". */
static inline const char *pattern_fault(const struct pattern_count *count, uint32_t wrong)
{
	return count->zero == wrong ? "zero" : count->older == wrong ? "stale" : count->newer == wrong ? "newer"
	     : count->foreign == wrong ? "swapped" : count->moved == wrong ? "moved" : "corrupt";
}

/* Describes a page that pattern_matches refused. The page may change under us: the copy is what is judged. */
static inline struct pattern_report pattern_describe(uint64_t key, const volatile uint64_t *at, uint32_t page, uint32_t generation, uint32_t words)
{
	struct pattern_report report = { .words = words };
	struct pattern_count count = { 0 };
	for (uint32_t word = 0; word < words; word++) {
		uint64_t got = at[word], expected = pattern_word(key, page, generation, word);
		pattern_count_word(&count, key, got, page, generation, word);
		if (got == expected || report.wrong++ > 0)
			continue;
		report.first = word;
		report.expected = expected;
		report.got = got;
		report.decodes = pattern_decode(key, got, &report.place);
	}
	const char *fault = pattern_fault(&count, report.wrong);
	/* A fault that takes a whole page carries its plain name; the same over a part of it is a torn page. */
	bool part = count.right > 0 && strcmp(fault, "corrupt") != 0;
	snprintf(report.kind, sizeof report.kind, "%s%s", part ? "half-" : "", report.wrong ? fault : "vanished");
	return report;
}

/* One line without its prefix: "kind=… page=… …". */
static inline int pattern_print(char *line, size_t size, const struct pattern_report *report, uint32_t page, uint32_t generation)
{
	char origin[96] = "";
	if (report->decodes && report->got != 0)
		snprintf(origin, sizeof origin, " got_page=%u got_generation=%u got_word=%u", report->place.page, report->place.generation, report->place.word);
	return snprintf(line, size, "kind=%s page=%u generation=%u wrong_words=%u/%u first_offset=%u expected=0x%016llx got=0x%016llx%s", report->kind, page,
		generation, report->wrong, report->words, report->first * 8, (unsigned long long)report->expected, (unsigned long long)report->got, origin);
}

#endif
