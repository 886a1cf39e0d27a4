/* Which pages were written since last asked: write protection that the kernel itself takes off at
 * the first write to a page (UFFD_FEATURE_WP_ASYNC), and PAGEMAP_SCAN, which names the pages that
 * have lost it and puts it back (Linux 6.7). What matters:
 *
 *   A page is named first, and protected again before the call returns. A write before that is in
 *   the bytes that the caller reads afterwards; a write after it takes the protection off, and is
 *   named by the next scan. So no write is missed by a caller that reads a page after it was named.
 *
 *   A page that has been written may lose its entry in the page table before it is named (discarded
 *   by its owner, or reclaimed), and its protection with it. Since every page gets an entry when it
 *   is armed, an entry that is empty stands for such a page. PAGEMAP_SCAN names those only in some
 *   kinds of memory, and none whose page table is gone, so there is a pass for them alone. Where
 *   only page tables can be missed, it looks at one entry of each: a quarter of the time.
 *
 *   The kernel holds the lock of the process's mappings while it scans or protects: pieces keep a
 *   thread that maps memory from waiting for more than a few ms.
 */
#define _GNU_SOURCE
#include "pagenet.h"
#include "pagemap.h"

#include <errno.h>
#include <linux/userfaultfd.h>

enum { PIECE = 64 << 20, FOUND = 512 };
static int call(int pagemap, struct scan *scan) {
    scan->size = sizeof *scan;
    int count = ioctl(pagemap, PN_PAGEMAP_SCAN, scan);
    return count < 0 ? -errno : count;
}

/* A scan of nothing. */
int pn_track_probe(int pagemap) {
    struct scan scan = {.start = 0};
    return call(pagemap, &scan);
}

static int protect(int uffd, uint64_t start, uint64_t length) {
    struct uffdio_writeprotect request = {.range = {.start = start, .len = length},
                                          .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    return ioctl(uffd, UFFDIO_WRITEPROTECT, &request) ? -errno : 0;
}

/* Whole huge pages, of whatever size. */
static uint64_t piece_at(const struct pn_track *track, uint64_t at) {
    uint64_t piece = track->page_size > PIECE ? track->page_size : PIECE, rest = track->size - at;
    return rest < piece ? rest : piece;
}

int pn_track_arm(const struct pn_track *track) {
    uint64_t ioctls;
    int error = pn_uffd_register(track->uffd, track->address, track->size, UFFDIO_REGISTER_MODE_WP,
                                 &ioctls);
    for (uint64_t at = 0; at < track->size && !error; at += piece_at(track, at))
        error = protect(track->uffd, track->address + at, piece_at(track, at));
    return error;
}

/* In pieces: the kernel takes the protection off under a lock that every fault of the process waits
 * for, tens of ms for a GiB of pages that are there. (It does so all at once where the userfaultfd
 * is just closed.) */
int pn_track_disarm(const struct pn_track *track) {
    int error = 0;
    for (uint64_t at = 0; at < track->size && !error; at += piece_at(track, at))
        error = pn_uffd_unregister(track->uffd, track->address + at, piece_at(track, at));
    return error;
}

/* Protected mappings are of no interest here, and so the kernel looks at no page of theirs; it
 * refuses any other mapping. */
int pn_track_check(const struct pn_track *track) {
    struct scan scan = {.flags = ONLY_ASYNC,
                        .start = track->address,
                        .end = track->address + track->size,
                        .inverted = WP_ALLOWED,
                        .all_of = WP_ALLOWED,
                        .returned = WP_ALLOWED};
    struct found found;
    scan.found = (uintptr_t)&found;
    scan.room = 1;
    int count = call(track->pagemap, &scan);
    return count < 0 ? count : 0;
}

static struct scan scan_for(int what) {
    if (what == PN_TRACK_WRITTEN)
        /* Exactly this mask: with it, the kernel takes an empty entry for a written page. */
        return (struct scan){
            .flags = PROTECT_FOUND | ONLY_ASYNC, .all_of = WRITTEN, .returned = WRITTEN};
    return (struct scan){
        .flags = ONLY_ASYNC, .inverted = PRESENT | SWAPPED, .all_of = PRESENT | SWAPPED};
}

/* Whether the entry at `at` is empty. */
static int is_empty(const struct pn_track *track, uint64_t at) {
    struct found found;
    struct scan scan = scan_for(PN_TRACK_GONE);
    scan.start = track->address + at;
    scan.end = scan.start + track->page_size;
    scan.found = (uintptr_t)&found;
    scan.room = 1;
    return call(track->pagemap, &scan);
}

/* Where the entries end that are in one page table with that of `at`. */
static uint64_t table_end(const struct pn_track *track, uint64_t at) {
    uint64_t span = track->page_size / sizeof(uint64_t) * track->page_size;
    uint64_t end = ((track->address + at) / span + 1) * span - track->address;
    return end < track->size ? end : track->size;
}

/* The first page table from `at` on whose first entry is empty. */
static int find_gone_table(const struct pn_track *track, uint64_t *at, uint64_t *end) {
    int empty = 0;
    while (*at < track->size && !(empty = is_empty(track, *at)))
        *at = table_end(track, *at);
    *end = *at < track->size ? table_end(track, *at) : *at;
    return empty < 0 ? empty : 0;
}

static int protect_found(const struct pn_track *track, const struct found *found, int count) {
    int error = 0;
    for (int i = 0; i < count && !error; i++)
        error = protect(track->uffd, found[i].start, found[i].end - found[i].start);
    return error;
}

/* Several ranges may lie in one page, if the kernel's pages are smaller. */
static int runs_of(const struct pn_track *track, const struct found *found, int count,
                   struct pn_run *runs) {
    int used = 0;
    for (int i = 0; i < count; i++) {
        uint64_t first = (found[i].start - track->address) / track->page_size + track->first;
        uint64_t last = (found[i].end - 1 - track->address) / track->page_size + track->first;
        struct pn_run *before = used ? &runs[used - 1] : NULL;
        if (before && first <= before->first + before->count)
            before->count = last + 1 - before->first;
        else
            runs[used++] = (struct pn_run){.first = first, .count = last + 1 - first};
    }
    return used;
}

int pn_track_scan(const struct pn_track *track, int what, uint64_t *at, struct pn_run *runs,
                  int room) {
    struct found found[FOUND];
    struct scan scan = scan_for(what);
    uint64_t end = *at + piece_at(track, *at);
    int error = 0;
    if (what == PN_TRACK_GONE && track->names_empty)
        error = find_gone_table(track, at, &end);
    if (error || *at == end)
        return error;
    scan.start = track->address + *at;
    scan.end = track->address + end;
    scan.found = (uintptr_t)found;
    scan.room = (uint64_t)(room < FOUND ? room : FOUND);
    int count = call(track->pagemap, &scan);
    error = count < 0 ? count : what == PN_TRACK_WRITTEN ? 0 : protect_found(track, found, count);
    if (error)
        return error;
    *at = scan.walk_end - track->address;
    return runs_of(track, found, count, runs);
}

void pn_track_mark(uint8_t *bits, const struct pn_run *runs, int count) {
    for (int i = 0; i < count; i++)
        for (uint64_t page = runs[i].first; page < runs[i].first + runs[i].count; page++)
            bits[page / 8] |= (uint8_t)(1 << page % 8);
}
