/* attach.c: how long a large device takes to attach, and (the driver looks) how much memory the daemon needs for it.
 *
 *     attach --socket S --vm ID --size 1T
 *
 * Attaches, maps, touches some pages all over it, prints one line of JSON and waits for a line before it leaves.
 */
#include <stdio.h>

#include "memdev.h"
#include "util.h"

enum { TOUCHES = 1000 };

int main(int count, char **arguments) {
    struct memdev_options options = {.vm_id = "large", .size = 1ull << 40, .flags = MEMDEV_NO_DMA};
    for (int i = 1; i + 1 < count; i += 2) {
        if (strcmp(arguments[i], "--socket") == 0)
            options.socket_path = arguments[i + 1];
        else if (strcmp(arguments[i], "--vm") == 0)
            options.vm_id = arguments[i + 1];
        else if (strcmp(arguments[i], "--size") == 0)
            options.size = parse_size(arguments[i + 1]);
        else
            errx(2, "no such option: %s", arguments[i]);
    }
    struct memdev *device;
    void *base;
    uint64_t begin = now_nanoseconds();
    if (memdev_attach(&options, &device) < 0)
        errx(1, "attach: %s", memdev_last_error());
    uint64_t attached = now_nanoseconds();
    if (memdev_map(device, &base) < 0)
        errx(1, "map: %s", memdev_last_error());
    uint64_t mapped = now_nanoseconds();
    for (uint64_t i = 0; i < TOUCHES; i++)
        if (*(volatile uint64_t *)(void *)((char *)base + options.size / TOUCHES / PAGE_BYTES * PAGE_BYTES * i) != 0)
            errx(3, "a page never written is not zero");
    uint64_t touched = now_nanoseconds();
    printf("{\"attach\":%.6f,\"map\":%.6f,\"touch\":%.6f,\"touches\":%d}\n", (double)(attached - begin) / 1e9, (double)(mapped - attached) / 1e9,
           (double)(touched - mapped) / 1e9, TOUCHES);
    fflush(stdout);
    char line[16];
    if (!fgets(line, sizeof line, stdin))
        return 1;
    begin = now_nanoseconds();
    memdev_detach(device, MEMDEV_RELEASE);
    printf("{\"detach\":%.6f}\n", (double)(now_nanoseconds() - begin) / 1e9);
    return 0;
}
