/* The host cache: what is in it, who waits for what, and what leaves it.
 *
 * The transfer that fills it keeps its map of pages: RESIDENT pages have their bytes in the file,
 * REMOVED ones are zeros, and holes in the file. Whoever fills a guest looks at that map, and puts
 * the guest's pages into place while it holds the cache, so that none of them leaves meanwhile. A
 * page that leaves becomes a hole, and the kernel takes it away from all guests that map the file.
 * They fault again when they touch it. */
#define _GNU_SOURCE
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    WANTED = 4096,          /* pages; one for which there is no room is wanted again later */
    AREA_BYTES = 256 << 10, /* leave the cache together */
};

/* Pages, and the eventfd that is written when one of them has come. */
struct waiter {
    uint64_t first, end;
    int wake_fd;
};

struct pn_cache {
    struct pn_cache_config config;
    pthread_rwlock_t holding; /* for writing: while pages leave */
    pthread_mutex_t lock;     /* guards what is wanted, and who waits */
    uint64_t wanted[WANTED];
    int wanted_count;
    int wanted_fd;
    struct waiter *waiters;
    size_t waiter_room;
    _Atomic size_t waiter_count; /* changed under the lock */
    _Atomic uint64_t resident;   /* pages that take memory */
    pthread_mutex_t leaving;     /* one thread at a time has areas leave */
    uint64_t area_pages, area_count, hand;
    _Atomic uint8_t *used; /* areas: of which pages were taken since the hand passed them */
};

/* ---- life ---- */

static uint64_t count_resident(const struct pn_map *map, uint64_t pages) {
    uint64_t count = 0;
    for (uint64_t at = 0; (at = pn_map_find(map, at, pages, PN_RESIDENT)) < pages;) {
        uint64_t here = pn_map_span(map, at, pages, PN_RESIDENT);
        count += here;
        at += here ? here : 1;
    }
    return count;
}

static bool prepare(struct pn_cache *cache) {
    const struct pn_cache_config *config = &cache->config;
    cache->area_pages = config->page_size < AREA_BYTES ? AREA_BYTES / config->page_size : 1;
    cache->area_count = (config->pages + cache->area_pages - 1) / cache->area_pages;
    cache->used = calloc(cache->area_count, sizeof *cache->used);
    cache->wanted_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!cache->used || cache->wanted_fd < 0)
        return false;
    pthread_rwlockattr_t kind;
    pthread_rwlockattr_init(&kind);
    pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&cache->holding, &kind);
    pthread_rwlockattr_destroy(&kind);
    pthread_mutex_init(&cache->lock, NULL);
    pthread_mutex_init(&cache->leaving, NULL);
    cache->resident = count_resident(config->map, config->pages);
    return true;
}

struct pn_cache *pn_cache_new(const struct pn_cache_config *config) {
    struct pn_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return NULL;
    cache->config = *config;
    if (prepare(cache))
        return cache;
    int error = errno;
    if (cache->wanted_fd >= 0)
        close(cache->wanted_fd);
    free((void *)cache->used);
    free(cache);
    errno = error;
    return NULL;
}

void pn_cache_free(struct pn_cache *cache) {
    close(cache->wanted_fd);
    pthread_rwlock_destroy(&cache->holding);
    pthread_mutex_destroy(&cache->lock);
    pthread_mutex_destroy(&cache->leaving);
    free((void *)cache->used);
    free(cache->waiters);
    free(cache);
}

uint64_t pn_cache_resident(const struct pn_cache *cache) { return atomic_load(&cache->resident); }

/* ---- what is here ---- */

void pn_cache_hold(struct pn_cache *cache) { pthread_rwlock_rdlock(&cache->holding); }

void pn_cache_unhold(struct pn_cache *cache) { pthread_rwlock_unlock(&cache->holding); }

static bool is_here(int state) { return state == PN_RESIDENT || state == PN_REMOVED; }

/* Whether all bytes from `offset` on, which may be in several pages, are here. *zero: they are
 * zeros. */
static bool has(const struct pn_cache *cache, uint64_t offset, uint64_t size, bool *zero) {
    uint64_t page_size = cache->config.page_size;
    *zero = true;
    for (uint64_t page = offset / page_size; page * page_size < offset + size; page++) {
        int state = page < cache->config.pages ? pn_map_state(cache->config.map, page) : -1;
        if (!is_here(state))
            return false;
        *zero = *zero && state == PN_REMOVED;
    }
    return true;
}

uint64_t pn_cache_find(struct pn_cache *cache, uint64_t offset, uint64_t size, uint64_t unit,
                       const char **bytes) {
    uint64_t found = 0;
    bool zeros, zero;
    if (!has(cache, offset, unit, &zeros))
        return 0;
    do
        found += unit;
    while (found + unit <= size && has(cache, offset + found, unit, &zero) && zero == zeros);
    *bytes = zeros ? NULL : (const char *)(uintptr_t)(cache->config.memory + offset);
    uint64_t area = cache->area_pages * cache->config.page_size;
    for (uint64_t at = offset / area; at <= (offset + found - 1) / area; at++)
        if (!atomic_load_explicit(&cache->used[at], memory_order_relaxed))
            atomic_store_explicit(&cache->used[at], 1, memory_order_relaxed);
    return found;
}

/* ---- what is wanted ---- */

void pn_cache_want(struct pn_cache *cache, uint64_t offset, uint64_t size) {
    uint64_t page_size = cache->config.page_size;
    int before, after;
    pthread_mutex_lock(&cache->lock);
    before = cache->wanted_count;
    for (uint64_t page = offset / page_size; page * page_size < offset + size; page++) {
        int state = page < cache->config.pages ? pn_map_state(cache->config.map, page) : -1;
        if ((state == PN_MISSING || state == PN_COMING) && cache->wanted_count < WANTED)
            cache->wanted[cache->wanted_count++] = page;
    }
    after = cache->wanted_count;
    pthread_mutex_unlock(&cache->lock);
    if (after > before)
        eventfd_write(cache->wanted_fd, 1);
}

int pn_cache_wanted_fd(const struct pn_cache *cache) { return cache->wanted_fd; }

int pn_cache_take_wanted(struct pn_cache *cache, uint64_t *pages, int room) {
    eventfd_t value;
    (void)!eventfd_read(cache->wanted_fd, &value);
    pthread_mutex_lock(&cache->lock);
    int count = cache->wanted_count < room ? cache->wanted_count : room;
    for (int i = 0; i < count; i++)
        pages[i] = cache->wanted[i];
    for (int i = count; i < cache->wanted_count; i++)
        cache->wanted[i - count] = cache->wanted[i];
    cache->wanted_count -= count;
    bool more = cache->wanted_count > 0;
    pthread_mutex_unlock(&cache->lock);
    if (more)
        eventfd_write(cache->wanted_fd, 1);
    return count;
}

/* ---- who waits ---- */

void pn_cache_wait(struct pn_cache *cache, uint64_t offset, uint64_t size, int wake_fd) {
    uint64_t page_size = cache->config.page_size;
    pthread_mutex_lock(&cache->lock);
    size_t count = cache->waiter_count;
    if (count == cache->waiter_room) {
        size_t room = count ? 2 * count : 64;
        struct waiter *more = realloc(cache->waiters, room * sizeof *more);
        if (more) {
            cache->waiters = more;
            cache->waiter_room = room;
        }
    }
    if (count < cache->waiter_room) {
        cache->waiters[count] = (struct waiter){.first = offset / page_size,
                                                .end = (offset + size + page_size - 1) / page_size,
                                                .wake_fd = wake_fd};
        atomic_store(&cache->waiter_count, count + 1);
    }
    pthread_mutex_unlock(&cache->lock);
}

void pn_cache_unwait(struct pn_cache *cache, uint64_t offset, uint64_t size, int wake_fd) {
    uint64_t page_size = cache->config.page_size, first = offset / page_size;
    pthread_mutex_lock(&cache->lock);
    size_t count = cache->waiter_count;
    for (size_t i = count; i-- > 0;) {
        const struct waiter *waiter = &cache->waiters[i];
        if (waiter->wake_fd != wake_fd || (size && waiter->first != first))
            continue;
        cache->waiters[i] = cache->waiters[--count];
        if (size)
            break;
    }
    atomic_store(&cache->waiter_count, count);
    pthread_mutex_unlock(&cache->lock);
}

static void wake(struct pn_cache *cache, uint64_t first, uint64_t end) {
    if (!atomic_load(&cache->waiter_count))
        return;
    pthread_mutex_lock(&cache->lock);
    for (size_t i = 0; i < cache->waiter_count; i++)
        if (cache->waiters[i].first < end && first < cache->waiters[i].end)
            eventfd_write(cache->waiters[i].wake_fd, 1);
    pthread_mutex_unlock(&cache->lock);
}

/* ---- what leaves ---- */

int pn_cache_punch(const struct pn_cache *cache, uint64_t first, uint64_t count) {
    uint64_t page_size = cache->config.page_size;
    return fallocate(cache->config.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)(first * page_size), (off_t)(count * page_size))
               ? -errno
               : 0;
}

/* Has the RESIDENT pages of an area leave. They are PLACING until the hole is there: nobody else
 * fetches them, or takes them, before. */
static void leave(struct pn_cache *cache, uint64_t area) {
    struct pn_map *map = cache->config.map;
    uint64_t first = area * cache->area_pages, end = first + cache->area_pages;
    end = end < cache->config.pages ? end : cache->config.pages;
    pthread_rwlock_wrlock(&cache->holding);
    for (uint64_t at = first; (at = pn_map_find(map, at, end, PN_RESIDENT)) < end;) {
        uint64_t count = pn_map_span(map, at, end, PN_RESIDENT);
        count = pn_map_claim(map, at, count, PN_RESIDENT, PN_PLACING);
        int error = pn_cache_punch(cache, at, count);
        pn_map_replace(map, at, count, PN_PLACING, error ? PN_RESIDENT : PN_MISSING);
        if (!error)
            atomic_fetch_sub(&cache->resident, count);
        at += count ? count : 1;
    }
    pthread_rwlock_unlock(&cache->holding);
}

/* The hand goes round the areas: one of which a page was taken since it came by last is passed over
 * once. [first, end): pages that have just come, and stay. */
static void make_room(struct pn_cache *cache, uint64_t first, uint64_t end) {
    if (pthread_mutex_trylock(&cache->leaving))
        return; /* somebody else does */
    for (uint64_t steps = 0;
         steps < 2 * cache->area_count && atomic_load(&cache->resident) > cache->config.most;
         steps++) {
        uint64_t area = cache->hand;
        cache->hand = (cache->hand + 1) % cache->area_count;
        bool is_new = area * cache->area_pages < end && first < (area + 1) * cache->area_pages;
        if (!atomic_exchange_explicit(&cache->used[area], 0, memory_order_relaxed) && !is_new)
            leave(cache, area);
    }
    pthread_mutex_unlock(&cache->leaving);
}

void pn_cache_came(struct pn_cache *cache, uint64_t first, uint64_t count, bool zero) {
    if (!zero)
        atomic_fetch_add(&cache->resident, count);
    wake(cache, first, first + count);
    if (cache->config.most && atomic_load(&cache->resident) > cache->config.most)
        make_room(cache, first, first + count);
}
