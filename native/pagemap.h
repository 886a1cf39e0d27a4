/* PAGEMAP_SCAN of /proc/PID/pagemap (Linux 6.7), which the headers of Debian 12 lack. */
#ifndef PAGENET_PAGEMAP_H
#define PAGENET_PAGEMAP_H
#include <stdint.h>
#include <sys/ioctl.h>

/* What a page is, and what a scan may be told. */
enum { WP_ALLOWED = 1 << 0, WRITTEN = 1 << 1, PRESENT = 1 << 3, SWAPPED = 1 << 4 };
enum { PROTECT_FOUND = 1 << 0, ONLY_ASYNC = 1 << 1 };

struct found {
    uint64_t start, end, categories;
};
struct scan {
    uint64_t size, flags, start, end, walk_end, found, room, max_pages;
    uint64_t inverted, all_of, any_of, returned;
};
#define PN_PAGEMAP_SCAN _IOWR('f', 16, struct scan)

#endif
