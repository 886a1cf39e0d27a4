/* What the destination's lanes share: which page lies where, which faults wait for which page, and
 * the one way into place. */
#define _GNU_SOURCE
#include "cache.h"
#include "dest.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    MOVE_WORTHWHILE = 8,
    ZEROS = 64,            /* pages of zeros written at once */
    LEAVE_WORTHWHILE = 16, /* zero pages: to stop watching them costs as much as placing a few */
    /* Stretches of zeros that are left alone: a process may have 65530 mappings, and each stretch
     * takes two. */
    LEAVE_MOST = 16384,
};

/* ---- life ---- */

static int init_locks(struct pn_dest *dest) {
    pthread_rwlockattr_t kind;
    pthread_rwlockattr_init(&kind);
    /* The writer is the thread that answers faults: it must not wait for one background piece after
     * the other. */
    pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&dest->removal, &kind);
    pthread_rwlockattr_destroy(&kind);
    return pthread_mutex_init(&dest->limiting, NULL);
}

struct pn_dest *pn_dest_new(const struct pn_dest_config *config) {
    struct pn_dest *dest = calloc(1, sizeof *dest);
    if (!dest)
        return NULL;
    void *zeros = mmap(NULL, config->max_page_size, PROT_READ,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED || init_locks(dest)) {
        free(dest);
        return NULL;
    }
    dest->config = *config;
    dest->zeros = zeros;
    return dest;
}

void pn_dest_free(struct pn_dest *dest) {
    munmap(dest->zeros, dest->config.max_page_size);
    pthread_rwlock_destroy(&dest->removal);
    pthread_mutex_destroy(&dest->limiting);
    free(dest);
}

/* ---- where pages are ---- */

const struct pn_piece *pn_piece_of_page(const struct pn_dest *dest, uint64_t page) {
    const struct pn_piece *pieces = dest->config.pieces;
    uint64_t low = 0, high = dest->config.piece_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(pieces[middle].first <= page ? &low : &high) = middle;
    }
    return page - pieces[low].first < pieces[low].count ? &pieces[low] : NULL;
}

const struct pn_piece *pn_piece_at(const struct pn_dest *dest, uint64_t address) {
    const struct pn_piece *pieces = dest->config.pieces;
    const uint32_t *order = dest->config.by_address;
    uint64_t low = 0, high = dest->config.piece_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(pieces[order[middle]].address <= address ? &low : &high) = middle;
    }
    const struct pn_piece *piece = &pieces[order[low]];
    return address - piece->address < piece->count * piece->page_size ? piece : NULL;
}

/* ---- faults that wait ---- */

/* Where to put a waiter for the page. NULL: the page has one, or there is no room. */
static struct pn_waiter *free_waiter(struct pn_dest *dest, uint64_t page, unsigned *end) {
    struct pn_waiter *found = NULL;
    for (unsigned i = *end; i-- > 0;) {
        uint64_t there = atomic_load(&dest->waiters[i].page);
        if (there == page + 1)
            return NULL; /* the first fault on a page counts: its thread has waited longest */
        if (!there)
            found = &dest->waiters[i];
    }
    return found || *end == PN_WAITERS ? found : &dest->waiters[(*end)++];
}

void pn_wait(struct pn_dest *dest, uint64_t page, uint64_t since) {
    unsigned end = atomic_load(&dest->waiter_end);
    while (end && !atomic_load(&dest->waiters[end - 1].page))
        end--;
    struct pn_waiter *waiter = free_waiter(dest, page, &end);
    atomic_store(&dest->waiter_end, end);
    if (!waiter)
        return;
    atomic_store(&waiter->since, since);
    atomic_fetch_add(&dest->waiter_count, 1); /* first: a lane that sees the page takes 1 off */
    atomic_store(&waiter->page, page + 1);
}

void pn_take_waiters(struct pn_dest *dest, uint64_t first, uint64_t count, bool placed) {
    if (!atomic_load(&dest->waiter_count))
        return;
    uint64_t now = pn_now();
    for (unsigned i = 0, end = atomic_load(&dest->waiter_end); i < end; i++) {
        struct pn_waiter *waiter = &dest->waiters[i];
        uint64_t page = atomic_load(&waiter->page), since = atomic_load(&waiter->since);
        if (!page || page - 1 - first >= count ||
            !atomic_compare_exchange_strong(&waiter->page, &page, 0))
            continue;
        atomic_fetch_sub(&dest->waiter_count, 1);
        if (placed) {
            /* The fault may have come since the clock was read. */
            uint64_t waited = now > since ? now - since : 0;
            pn_stats_latency(dest->config.map, PN_DEMAND, waited);
            pn_pace_in_place(&dest->pace, waited);
        }
    }
}

void pn_wake_waiter(struct pn_dest *dest, uint64_t page) {
    const struct pn_piece *piece = pn_piece_of_page(dest, page);
    pn_take_waiters(dest, page, 1, false);
    pn_uffd_wake(dest->config.uffd, piece->address + (page - piece->first) * piece->page_size,
                 piece->page_size);
}

/* ---- into place ---- */

uint64_t pn_take(struct pn_dest *dest, uint64_t first, uint64_t count) {
    struct pn_map *map = dest->config.map;
    uint64_t taken = 0;
    for (;;) {
        uint64_t here = pn_map_claim(map, first + taken, count - taken, PN_COMING, PN_PLACING);
        here +=
            pn_map_claim(map, first + taken + here, count - taken - here, PN_REQUESTED, PN_PLACING);
        taken += here;
        if (!here)
            return taken;
    }
}

static void lock_removal(struct pn_dest *dest) {
    if (dest->config.removes)
        pthread_rwlock_rdlock(&dest->removal);
}

static void unlock_removal(struct pn_dest *dest) {
    if (dest->config.removes)
        pthread_rwlock_unlock(&dest->removal);
}

static int write_file(int file, uint64_t offset, struct iovec *parts, int count) {
    while (count) {
        ssize_t written = pwritev(file, parts, count, (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written ? -errno : -EIO;
        offset += (uint64_t)written;
        while (count && (size_t)written >= parts->iov_len) {
            written -= (ssize_t)parts->iov_len;
            parts++;
            count--;
        }
        if (count) {
            parts->iov_base = (char *)parts->iov_base + written;
            parts->iov_len -= (size_t)written;
        }
    }
    return 0;
}

static int write_zeros(struct pn_dest *dest, uint64_t offset, uint64_t pages, uint64_t page_size) {
    int error = 0;
    for (uint64_t count; pages && !error; pages -= count, offset += count * page_size) {
        struct iovec parts[ZEROS];
        count = pages < ZEROS ? pages : ZEROS;
        for (uint64_t i = 0; i < count; i++)
            parts[i] = (struct iovec){.iov_base = dest->zeros, .iov_len = page_size};
        error = write_file(dest->config.file, offset, parts, (int)count);
    }
    return error;
}

int pn_clear(const struct pn_dest *dest, uint64_t to, uint64_t size) {
    uint64_t most = dest->config.max_page_size;
    int error = 0;
    if (dest->config.sealed)
        memset((void *)(uintptr_t)to, 0, size);
    for (uint64_t at = 0; at < size && !dest->config.sealed && !error; at += most)
        error = pn_store(to + at, dest->zeros, size - at < most ? size - at : most);
    return error;
}

/* A store to a page that the owner has cut off its file is a SIGBUS. The kernel's own store is an
 * error then, at the price of a system call: it is used where the file may become shorter. */
static int store(const struct pn_dest *dest, uint64_t to, const void *bytes, uint64_t size) {
    if (!dest->config.sealed)
        return pn_store(to, bytes, size);
    memcpy((void *)(uintptr_t)to, bytes, size);
    return 0;
}

int pn_write_shared(struct pn_dest *dest, const struct pn_piece *piece, uint64_t first,
                    uint64_t count, const void *bytes) {
    uint64_t at = (first - piece->first) * piece->page_size, size = count * piece->page_size;
    if (dest->config.file >= 0 && !bytes)
        return write_zeros(dest, piece->file_offset + at, count, piece->page_size);
    if (dest->config.file >= 0) {
        struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
        return write_file(dest->config.file, piece->file_offset + at, &part, 1);
    }
    return bytes ? store(dest, piece->second + at, bytes, size)
                 : pn_clear(dest, piece->second + at, size);
}

/* The owner gave the page up while its bytes were in flight. The owner's page table has not been
 * touched since, so the bytes are at most in the file behind it. Faults on the page were put off
 * until now. */
static int leave_removed(struct pn_dest *dest, const struct pn_piece *piece, uint64_t page) {
    int error = piece->second ? pn_write_shared(dest, piece, page, 1, NULL) : 0;
    pn_map_set(dest->config.map, page, 1, PN_REMOVED);
    pn_wake_waiter(dest, page);
    return error;
}

/* bytes NULL: zeros, unless there is a second mapping: then the bytes are in the memory behind it
 * already. */
static struct pn_placed place_bytes(struct pn_dest *dest, const struct pn_piece *piece,
                                    uint64_t first, uint64_t count, const void *bytes) {
    const struct pn_dest_config *config = &dest->config;
    uint64_t to = piece->address + (first - piece->first) * piece->page_size;
    if (config->fills) /* nobody sees it there */
        return (struct pn_placed){.placed = count * piece->page_size};
    if (piece->second)
        return pn_place(config->uffd, PN_CONTINUE, to, NULL, count * piece->page_size,
                        piece->page_size);
    enum pn_how how = bytes ? (enum pn_how)config->how : PN_ZERO;
    /* MOVE takes whole pages, and moving a few of them costs as much as copying them. */
    if (how == PN_MOVE && (count < MOVE_WORTHWHILE || (uintptr_t)bytes % piece->page_size))
        how = PN_COPY;
    return pn_place(config->uffd, how, to, bytes ? bytes : dest->zeros, count * piece->page_size,
                    piece->page_size);
}

/* Pages that are PLACING are in shared memory, and stay invisible. Returns how many. */
static uint64_t copied(struct pn_dest *dest, int class_, uint64_t first, uint64_t count,
                       bool zero) {
    pn_map_replace(dest->config.map, first, count, PN_PLACING, PN_COPIED);
    pn_stats_add(dest->config.map, class_, PN_PAGES, count);
    if (zero)
        pn_stats_add(dest->config.map, class_, PN_ZERO_PAGES, count);
    return count;
}

/* Puts one unbroken run of pages that are still PLACING into place. If this process is killed, the
 * next user of the map has to know what became of them. Bytes in shared memory may be half stored:
 * then they must not be seen. Or they may be visible, and written to by the owner since: then they
 * must not be replaced. READY, which the pages are from the last byte on, tells these two apart.
 * Bytes that are copied in are visible all at once or not at all, and then for good: copying them
 * again does no harm. */
static int put_some(struct pn_dest *dest, int class_, const struct pn_piece *piece, uint64_t first,
                    uint64_t count, const void *bytes, bool zero, uint64_t *done) {
    struct pn_map *map = dest->config.map;
    if (piece->second && atomic_load(&dest->withheld)) {
        *done = copied(dest, class_, first, count, zero);
        return 0;
    }
    int state = piece->second ? PN_READY : PN_PLACING;
    if (state == PN_READY)
        pn_map_replace(map, first, count, PN_PLACING, PN_READY);
    struct pn_placed placed = place_bytes(dest, piece, first, count, bytes);
    *done = (placed.placed + placed.existed + placed.absent) / piece->page_size;
    pn_map_replace(map, first, *done, state, PN_RESIDENT);
    if (state == PN_READY)
        pn_map_replace(map, first + *done, count - *done, PN_READY, PN_PLACING);
    pn_stats_add(map, class_, PN_PAGES, *done);
    if (zero)
        pn_stats_add(map, class_, PN_ZERO_PAGES, *done);
    if (placed.existed)
        pn_stats_add(map, class_, PN_EXISTED, placed.existed / piece->page_size);
    pn_take_waiters(dest, first, *done, true);
    if (dest->config.fills)
        pn_cache_came(dest->config.fills, first, *done, false);
    return placed.error;
}

/* ---- a sample of what is prefetched ---- */

/* A page that is in place raises no fault, so nothing shows whether a prefetched page was needed.
 * But bytes in shared memory can wait there: one page in sixteen is not made visible when it has
 * come, and its first touch is a minor fault, which is answered at once, and counted. Such a page
 * is RESIDENT nevertheless: a fault on it is settled from the page cache, whichever lane answers
 * it. A hash of its number decides whether a page belongs to the sample, so that no stride of a
 * program's hits all of the sample, or none of it. A page whose entry in the table is taken is not
 * part of the sample. */
enum { SAMPLED_SHIFT = 60 }; /* a sixteenth */

uint64_t pn_before_sampled(uint64_t first, uint64_t count) {
    uint64_t before = 0;
    while (before < count && (first + before) * 0x9e3779b97f4a7c15u >> SAMPLED_SHIFT)
        before++;
    return before;
}

static bool is_waited_for(struct pn_dest *dest, uint64_t page) {
    if (!atomic_load(&dest->waiter_count))
        return false;
    for (unsigned i = 0, end = atomic_load(&dest->waiter_end); i < end; i++)
        if (atomic_load(&dest->waiters[i].page) == page + 1)
            return true;
    return false;
}

/* Takes a page into the sample. It is PLACING, and its bytes are in shared memory. False: it must
 * be made visible. */
static bool hold(struct pn_dest *dest, uint64_t page, bool zero) {
    struct pn_map *map = dest->config.map;
    uint64_t none = 0;
    if (is_waited_for(dest, page) ||
        !atomic_compare_exchange_strong(&dest->held[page % PN_HELD], &none, page + 1))
        return false;
    atomic_fetch_add(&dest->held_count, 1);
    pn_map_replace(map, page, 1, PN_PLACING, PN_RESIDENT);
    pn_stats_add(map, PN_PREFETCH, PN_PAGES, 1);
    pn_stats_add(map, PN_PREFETCH, PN_SAMPLED, 1);
    if (zero)
        pn_stats_add(map, PN_PREFETCH, PN_ZERO_PAGES, 1);
    if (is_waited_for(dest, page)) /* a fault may have come since the first look */
        pn_wake_waiter(dest, page);
    return true;
}

bool pn_let_go(struct pn_dest *dest, uint64_t page) {
    uint64_t held = page + 1;
    if (!atomic_load(&dest->held_count) ||
        !atomic_compare_exchange_strong(&dest->held[page % PN_HELD], &held, 0))
        return false;
    atomic_fetch_sub(&dest->held_count, 1);
    return true;
}

void pn_dest_release(struct pn_dest *dest) {
    for (unsigned i = 0; i < PN_HELD; i++) {
        uint64_t page = atomic_load(&dest->held[i]) - 1;
        if (page == UINT64_MAX || !pn_let_go(dest, page) ||
            pn_map_state(dest->config.map, page) != PN_RESIDENT)
            continue;
        const struct pn_piece *piece = pn_piece_of_page(dest, page);
        uint64_t to = piece->address + (page - piece->first) * piece->page_size;
        /* If this fails, the owner is changing this very page, or is gone. */
        pn_place(dest->config.uffd, PN_CONTINUE, to, NULL, piece->page_size, piece->page_size);
    }
}

int pn_put(struct pn_dest *dest, int class_, uint64_t first, uint64_t count, const void *bytes,
           bool zero, uint64_t *done) {
    const struct pn_piece *piece = pn_piece_of_page(dest, first);
    int error = 0;
    *done = 0;
    lock_removal(dest);
    while (*done < count && !error) {
        uint64_t at = first + *done, here = 0;
        uint64_t placing = pn_map_span(dest->config.map, at, first + count, PN_PLACING);
        const char *from = bytes ? (const char *)bytes + *done * piece->page_size : NULL;
        uint64_t before = class_ == PN_PREFETCH && piece->second && !dest->config.fills
                              ? pn_before_sampled(at, placing)
                              : placing;
        if (before < placing)
            placing = before ? before : 1;
        if (placing && !before && hold(dest, at, zero))
            here = 1;
        else if (placing)
            error = put_some(dest, class_, piece, at, placing, from, zero, &here);
        else {
            error = leave_removed(dest, piece, at);
            pn_stats_add(dest->config.map, class_, PN_DROPPED, 1);
            here = 1;
        }
        *done += here;
    }
    unlock_removal(dest);
    if (error == -EAGAIN)
        pn_stats_add(dest->config.map, class_, PN_DEFERRED, 1);
    return error;
}

void pn_dest_withhold(struct pn_dest *dest, int withhold) {
    atomic_store(&dest->withheld, withhold != 0);
}

/* Whether one more stretch of zeros may stop being watched. One that continues the last stretch
 * adds no mapping. */
static bool may_leave(struct pn_dest *dest, uint64_t to, uint64_t size) {
    if (atomic_exchange(&dest->left_until, to + size) == to)
        return true;
    return atomic_fetch_add(&dest->left, 1) < LEAVE_MOST;
}

static bool leave_hole(struct pn_dest *dest, int class_, const struct pn_piece *piece,
                       uint64_t first, uint64_t count) {
    struct pn_map *map = dest->config.map;
    uint64_t at = (first - piece->first) * piece->page_size, size = count * piece->page_size;
    if (pn_map_span(map, first, first + count, PN_PLACING) != count ||
        fallocate(dest->config.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(piece->file_offset + at), (off_t)size))
        return false;
    if (atomic_load(&dest->withheld)) {
        copied(dest, class_, first, count, true);
        return true;
    }
    pn_map_replace(map, first, count, PN_PLACING, PN_READY);
    bool ok = !pn_uffd_unregister(dest->config.uffd, piece->address + at, size);
    pn_map_replace(map, first, count, PN_READY, ok ? PN_RESIDENT : PN_PLACING);
    if (!ok)
        return false;
    pn_stats_add(map, class_, PN_PAGES, count);
    pn_stats_add(map, class_, PN_ZERO_PAGES, count);
    pn_take_waiters(dest, first, count, true);
    return true;
}

/* Zeros of a host cache take no memory, and are told from other pages by their state. */
static bool note_zeros(struct pn_dest *dest, int class_, uint64_t first, uint64_t count) {
    struct pn_map *map = dest->config.map;
    if (pn_cache_punch(dest->config.fills, first, count))
        return false;
    pn_map_replace(map, first, count, PN_PLACING, PN_REMOVED);
    pn_stats_add(map, class_, PN_PAGES, count);
    pn_stats_add(map, class_, PN_ZERO_PAGES, count);
    pn_take_waiters(dest, first, count, true);
    pn_cache_came(dest->config.fills, first, count, true);
    return true;
}

bool pn_leave_zeros(struct pn_dest *dest, int class_, const struct pn_piece *piece, uint64_t first,
                    uint64_t count) {
    if (dest->config.fills)
        return note_zeros(dest, class_, first, count);
    uint64_t to = piece->address + (first - piece->first) * piece->page_size;
    if (!piece->second || dest->config.file < 0 ||
        (!atomic_load(&dest->withheld) &&
         (count < LEAVE_WORTHWHILE || !may_leave(dest, to, count * piece->page_size))))
        return false;
    lock_removal(dest);
    bool ok = leave_hole(dest, class_, piece, first, count);
    unlock_removal(dest);
    return ok;
}

/* ---- how fast the background may be ---- */

void pn_dest_limit(struct pn_dest *dest, uint64_t bytes_per_second) {
    pthread_mutex_lock(&dest->limiting);
    pn_pace_limit(&dest->pace, bytes_per_second, pn_now());
    pthread_mutex_unlock(&dest->limiting);
}

bool pn_claim_granted(struct pn_dest *dest, uint64_t first, uint64_t *count, uint64_t page_size,
                      uint64_t *wait) {
    pthread_mutex_lock(&dest->limiting);
    uint64_t granted =
        pn_pace_grant(&dest->pace, pn_now(), *count * page_size, page_size, wait) / page_size;
    *count = pn_map_claim(dest->config.map, first, granted, PN_MISSING, PN_COMING);
    pthread_mutex_unlock(&dest->limiting);
    return granted;
}

void pn_refund(struct pn_dest *dest, uint64_t bytes) {
    pthread_mutex_lock(&dest->limiting);
    pn_pace_refund(&dest->pace, bytes);
    pthread_mutex_unlock(&dest->limiting);
}

/* More than all: the owner has written to the map. */
void pn_check_done(struct pn_dest *dest) {
    if (pn_map_done(dest->config.map) >= dest->config.scope)
        eventfd_write(dest->config.done_fd, 1);
}
