/* error.c: the text of a thread's last failure. */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

static _Thread_local char text[640];

int memdev_fail(int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return -error;
}

const char *memdev_last_error(void) { return text; }
