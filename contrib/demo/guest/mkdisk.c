/* mkdisk FILE MIB SEED: makes a disk image of which every 4 KiB block tells its place (pattern.h), for diskcheck --read. Runs on the host. */
#include "pattern.h"

#include <stdlib.h>

int main(int argument_count, char **arguments)
{
	if (argument_count != 4) {
		fprintf(stderr, "usage: mkdisk FILE MIB SEED\n");
		return 2;
	}
	uint32_t blocks = strtoul(arguments[2], NULL, 0) * (1024 * 1024 / PATTERN_PAGE_BYTES);
	uint64_t key = pattern_key(strtoull(arguments[3], NULL, 0)), page[PATTERN_WORDS];
	FILE *file = fopen(arguments[1], "w");
	for (uint32_t block = 0; file != NULL && block < blocks; block++) {
		pattern_fill(key, page, block, 0, PATTERN_WORDS);
		if (fwrite(page, sizeof page, 1, file) != 1)
			break;
	}
	if (file == NULL || ferror(file) || fclose(file) != 0) {
		perror(arguments[1]);
		return 1;
	}
	return 0;
}
