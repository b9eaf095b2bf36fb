// Memory for keys.
#ifndef CVHOST_SECRET_H
#define CVHOST_SECRET_H

#include <stdint.h>

// memfd_secret(2), close-on-exec. ENOSYS: the kernel has it not, or not switched on (Linux 5.14; on by default since 6.5).
int cvhost_memfd_secret(void);

// getrandom(2); all of it or an error.
int cvhost_random(void *to, uint64_t bytes);

// Zeros that no compiler leaves out. explicit_bzero(3).
void cvhost_wipe(void *memory, uint64_t bytes);

#endif
