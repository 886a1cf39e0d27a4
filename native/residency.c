/* The residency map: one byte a page, changed by compare-and-swap alone, so lanes in threads and in
 * other processes agree which of them may ask for a page, and which may write to it. Counters of
 * statistics are relaxed atomics: they order nothing.
 *
 * The owner of the memory may have the map, too, and write to it at any time. So nothing in it is
 * used as a size or an offset: callers pass the number of pages, every loop is bounded by that, and
 * a state is only compared.
 */
#define _GNU_SOURCE
#include "pagenet.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

static const char MAGIC[] = "pagenet4"; /* the last is the layout's version */

static _Atomic uint8_t *states(const struct pn_map *map) {
    return (_Atomic uint8_t *)((uintptr_t)map + sizeof *map);
}

static void add(uint64_t *counter, uint64_t amount) {
    atomic_fetch_add_explicit((_Atomic uint64_t *)counter, amount, memory_order_relaxed);
}

/* A thread that sees the count sees the states that were counted. */
static void add_in_order(uint64_t *counter, uint64_t amount) {
    atomic_fetch_add_explicit((_Atomic uint64_t *)counter, amount, memory_order_release);
}

static bool is_done(int state) {
    return state == PN_RESIDENT || state == PN_REMOVED || state == PN_POISONED;
}

/* Keeps `scope` and `done` exact: each transition of a page is one atomic step, and the thread that
 * made it counts it. */
static void account(struct pn_map *map, int from, int to, uint64_t pages) {
    if (pages && is_done(to) != is_done(from))
        add_in_order(&map->done, is_done(to) ? pages : -pages);
    if (pages && (to == PN_OUTSIDE) != (from == PN_OUTSIDE))
        add_in_order(&map->scope, to == PN_OUTSIDE ? -pages : pages);
}

/* The states of eight pages are one aligned word. Runs are longer than that, and a step for each
 * page costs a tenth of what placing it does. */
static _Atomic uint64_t *eight(const struct pn_map *map, uint64_t page) {
    return (_Atomic uint64_t *)(states(map) + page);
}

static uint64_t eight_times(int state) { return (uint64_t)state * 0x0101010101010101u; }

static bool is_whole(uint64_t page, uint64_t end) { return page % 8 == 0 && page + 8 <= end; }

uint64_t pn_map_bytes(uint64_t pages) { return sizeof(struct pn_map) + pages; }

void pn_map_init(struct pn_map *map, uint64_t pages) { map->pages = map->scope = pages; }

void pn_map_publish(struct pn_map *map) {
    atomic_thread_fence(memory_order_seq_cst);
    memcpy(map->magic, MAGIC, sizeof map->magic);
}

int pn_map_state(const struct pn_map *map, uint64_t page) {
    return atomic_load_explicit(&states(map)[page], memory_order_acquire);
}

/* Counts anew, because a page's step and counting it are two: a process that died between them has
 * left the counts wrong. */
int pn_map_recover(struct pn_map *map, uint64_t pages) {
    if (memcmp(map->magic, MAGIC, sizeof map->magic) || map->pages != pages)
        return -EINVAL;
    uint64_t done = 0, outside = 0;
    for (uint64_t page = 0; page < pages; page++) {
        int state = pn_map_state(map, page);
        if (state > PN_COPIED)
            return -EINVAL;
        if (state == PN_COMING || state == PN_REQUESTED || state == PN_PLACING ||
            state == PN_COPIED)
            atomic_store(&states(map)[page], PN_MISSING);
        done += is_done(state);
        outside += state == PN_OUTSIDE;
    }
    map->scope = pages - outside;
    map->done = done;
    return 0;
}

uint64_t pn_map_claim(struct pn_map *map, uint64_t first, uint64_t count, int from, int to) {
    uint64_t page = first, end = first + count;
    while (page < end) {
        uint64_t all = eight_times(from);
        uint8_t one = (uint8_t)from;
        if (is_whole(page, end) &&
            atomic_compare_exchange_strong(eight(map, page), &all, eight_times(to)))
            page += 8;
        else if (atomic_compare_exchange_strong(&states(map)[page], &one, (uint8_t)to))
            page++;
        else
            break;
    }
    account(map, from, to, page - first);
    return page - first;
}

void pn_map_set(struct pn_map *map, uint64_t first, uint64_t count, int to) {
    for (uint64_t page = first; page < first + count; page++)
        account(map, atomic_exchange(&states(map)[page], (uint8_t)to), to, 1);
}

/* The high bit of each byte that is `state`. */
static uint64_t which_of_eight(uint64_t word, int state) {
    uint64_t low = eight_times(0x7f), differs = word ^ eight_times(state);
    return ~(((differs & low) + low) | differs | low);
}

static uint64_t replace_in_eight(struct pn_map *map, uint64_t page, int from, int to) {
    _Atomic uint64_t *word = eight(map, page);
    uint64_t was = atomic_load_explicit(word, memory_order_relaxed), which, now;
    do {
        which = which_of_eight(was, from);
        uint64_t bytes = (which >> 7) * 0xff;
        now = (was & ~bytes) | (eight_times(to) & bytes);
    } while (which && !atomic_compare_exchange_weak(word, &was, now));
    return (uint64_t)__builtin_popcountll(which);
}

/* At the freeze, states all over the map are replaced while the owner stands still: eight in a
 * step, whatever the other ones are. */
uint64_t pn_map_replace(struct pn_map *map, uint64_t first, uint64_t count, int from, int to) {
    uint64_t single = 0, of_words = 0, page = first, end = first + count;
    while (page < end)
        if (is_whole(page, end)) {
            of_words += replace_in_eight(map, page, from, to);
            page += 8;
        } else {
            single += pn_map_claim(map, page++, 1, from, to);
        }
    account(map, from, to, of_words);
    return single + of_words;
}

/* The map of a large guest is searched for its last missing pages again and again. */
static bool any_of_eight(const struct pn_map *map, uint64_t page, int state) {
    bool any = false;
    for (int i = 0; i < 8; i++)
        any |= atomic_load_explicit(&states(map)[page + i], memory_order_relaxed) == state;
    return any;
}

uint64_t pn_map_find(const struct pn_map *map, uint64_t first, uint64_t end, int state) {
    while (first + 8 <= end && !any_of_eight(map, first, state))
        first += 8;
    while (first < end && pn_map_state(map, first) != state)
        first++;
    return first;
}

uint64_t pn_map_span(const struct pn_map *map, uint64_t first, uint64_t end, int state) {
    uint64_t page = first;
    for (;;) {
        if (is_whole(page, end) &&
            atomic_load_explicit(eight(map, page), memory_order_acquire) == eight_times(state))
            page += 8;
        else if (page < end && pn_map_state(map, page) == state)
            page++;
        else
            return page - first;
    }
}

uint64_t pn_map_unsettled(const struct pn_map *map, uint64_t first, uint64_t end) {
    while (first < end) {
        if (is_whole(first, end) && atomic_load_explicit(eight(map, first), memory_order_acquire) ==
                                        eight_times(PN_RESIDENT))
            first += 8;
        else if (is_done(pn_map_state(map, first)))
            first++;
        else
            break;
    }
    return first;
}

uint64_t pn_map_stale(struct pn_map *map, uint64_t first, uint64_t skip, uint64_t shift,
                      const uint8_t *bits, uint64_t from, uint64_t count) {
    uint64_t changed = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t bit = from + i;
        if (bit % 8 == 0 && !bits[bit / 8])
            i += 7;
        else if (bits[bit / 8] >> bit % 8 & 1)
            changed += pn_map_claim(map, first + ((skip + i) >> shift), 1, PN_COPIED, PN_MISSING);
    }
    return changed;
}

uint64_t pn_map_done(const struct pn_map *map) {
    return atomic_load_explicit((_Atomic uint64_t *)&map->done, memory_order_acquire);
}

void pn_stats_add(struct pn_map *map, int class_, int counter, uint64_t amount) {
    add(&map->classes[class_].counters[counter], amount);
}

static unsigned bucket_of(uint64_t value) {
    if (value < 16)
        return (unsigned)value;
    unsigned octave = 63 - (unsigned)__builtin_clzll(value);
    unsigned bucket = 8 * (octave - 2) + ((value >> (octave - 3)) & 7);
    return bucket < 320 ? bucket : 319;
}

void pn_stats_latency(struct pn_map *map, int class_, uint64_t nanoseconds) {
    add(&map->classes[class_].latency[bucket_of(nanoseconds)], 1);
}
