#include "include/cvhost_page.h"

#include <string.h>

#define LANES 4
#define LANE_WORDS (CVHOST_PAGE_SIZE / LANES / 8)

// CRC-32C (Castagnoli, reflected 0x82F63B78) of one 64-bit word, bit by bit: the portable definition that the fast one must equal.
static uint32_t crc32c_word_portable(uint32_t crc, uint64_t word)
{
	for (int byte = 0; byte < 8; byte++, word >>= 8) {
		crc ^= (uint32_t)(word & 0xff);
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (0x82F63B78u & (0u - (crc & 1)));
	}
	return crc;
}

static uint32_t checksum_portable(const uint64_t *words, uint64_t index)
{
	uint32_t folded = 0;
	for (int lane = 0; lane < LANES; lane++) {
		uint32_t crc = crc32c_word_portable(~0u, index * LANES + (uint64_t)lane);
		for (int i = 0; i < LANE_WORDS; i++)
			crc = crc32c_word_portable(crc, words[lane * LANE_WORDS + i]);
		folded = crc32c_word_portable(folded, crc);
	}
	return folded;
}

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t checksum_sse42(const uint64_t *words, uint64_t index)
{
	uint64_t a = _mm_crc32_u64(~0u, index * LANES), b = _mm_crc32_u64(~0u, index * LANES + 1);
	uint64_t c = _mm_crc32_u64(~0u, index * LANES + 2), d = _mm_crc32_u64(~0u, index * LANES + 3);
	for (int i = 0; i < LANE_WORDS; i++) {
		a = _mm_crc32_u64(a, words[i]);
		b = _mm_crc32_u64(b, words[LANE_WORDS + i]);
		c = _mm_crc32_u64(c, words[2 * LANE_WORDS + i]);
		d = _mm_crc32_u64(d, words[3 * LANE_WORDS + i]);
	}
	return (uint32_t)_mm_crc32_u64(_mm_crc32_u64(_mm_crc32_u64(_mm_crc32_u64(0, a), b), c), d);
}

uint32_t cvhost_page_checksum(const void *page, uint64_t index)
{
	return __builtin_cpu_supports("sse4.2") ? checksum_sse42(page, index) : checksum_portable(page, index);
}
#else
uint32_t cvhost_page_checksum(const void *page, uint64_t index)
{
	return checksum_portable(page, index);
}
#endif

uint32_t cvhost_page_checksum_portable(const void *page, uint64_t index)
{
	return checksum_portable(page, index);
}

#define PRIME1 0x9E3779B185EBCA87ULL
#define PRIME2 0xC2B2AE3D27D4EB4FULL
#define PRIME3 0x165667B19E3779F9ULL
#define PRIME4 0x85EBCA77C2B2AE63ULL

static inline uint64_t rotated(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }
static inline uint64_t mixed(uint64_t lane, uint64_t word) { return rotated(lane + word * PRIME2, 31) * PRIME1; }

uint64_t cvhost_page_digest(const void *page)
{
	const uint64_t *words = page;
	uint64_t lanes[4] = { PRIME1 + PRIME2, PRIME2, 0, 0 - PRIME1 };
	for (int i = 0; i < CVHOST_PAGE_SIZE / 8; i += 4)
		for (int lane = 0; lane < 4; lane++)
			lanes[lane] = mixed(lanes[lane], words[i + lane]);
	uint64_t hash = rotated(lanes[0], 1) + rotated(lanes[1], 7) + rotated(lanes[2], 12) + rotated(lanes[3], 18);
	for (int lane = 0; lane < 4; lane++)
		hash = (hash ^ mixed(0, lanes[lane])) * PRIME1 + PRIME4;
	hash += CVHOST_PAGE_SIZE;
	hash = (hash ^ hash >> 33) * PRIME2;
	hash = (hash ^ hash >> 29) * PRIME3;
	return hash ^ hash >> 32;
}

int cvhost_page_is_zero(const void *page)
{
	const unsigned char *bytes = page;
	// The first bytes decide for nearly every page that is not zero; then the page compared with itself, shifted.
	return bytes[0] == 0 && memcmp(bytes, bytes + 8, 8) == 0 && memcmp(bytes, bytes + 1, CVHOST_PAGE_SIZE - 1) == 0;
}
