/* The residency map: one byte a page, changed by compare-and-swap alone, so that lanes in threads and in other processes
 * agree on who may ask for a page and who may write it. Counters are relaxed atomics: they order nothing. */
#define _GNU_SOURCE
#include "pagenet.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

static _Atomic uint8_t *states(const struct pn_map *map) { return (_Atomic uint8_t *)((uintptr_t)map + sizeof *map); }

static void add(uint64_t *counter, uint64_t amount) {
    atomic_fetch_add_explicit((_Atomic uint64_t *)counter, amount, memory_order_relaxed);
}

static bool is_done(int state) { return state == PN_RESIDENT || state == PN_REMOVED || state == PN_POISONED; }

/* Keeps `scope` and `done` exact: each page's transition is one atomic step, and is counted by whoever made it. */
static void account(struct pn_map *map, int from, int to) {
    if (is_done(to) != is_done(from))
        add(&map->done, is_done(to) ? 1 : (uint64_t)-1);
    if ((to == PN_OUTSIDE) != (from == PN_OUTSIDE))
        add(&map->scope, to == PN_OUTSIDE ? (uint64_t)-1 : 1);
}

uint64_t pn_map_bytes(uint64_t pages) { return sizeof(struct pn_map) + pages; }

void pn_map_init(struct pn_map *map, uint64_t pages) {
    memcpy(map->magic, "pagenet1", sizeof map->magic);
    map->pages = map->scope = pages;
}

int pn_map_state(const struct pn_map *map, uint64_t page) {
    return atomic_load_explicit(&states(map)[page], memory_order_acquire);
}

uint64_t pn_map_claim(struct pn_map *map, uint64_t first, uint64_t count, int from, int to) {
    uint64_t taken = 0;
    for (; taken < count; taken++) {
        uint8_t expected = (uint8_t)from;
        if (!atomic_compare_exchange_strong(&states(map)[first + taken], &expected, (uint8_t)to))
            break;
        account(map, from, to);
    }
    return taken;
}

void pn_map_set(struct pn_map *map, uint64_t first, uint64_t count, int to) {
    for (uint64_t page = first; page < first + count; page++)
        account(map, atomic_exchange(&states(map)[page], (uint8_t)to), to);
}

uint64_t pn_map_replace(struct pn_map *map, uint64_t first, uint64_t count, int from, int to) {
    uint64_t changed = 0;
    for (uint64_t page = first; page < first + count; page++)
        changed += pn_map_claim(map, page, 1, from, to);
    return changed;
}

/* Eight pages a step: the map of a large guest is searched for its last missing pages again and again. */
static bool any_of_eight(const struct pn_map *map, uint64_t page, int state) {
    uint64_t eight = 0;
    for (int i = 0; i < 8; i++)
        eight |= (uint64_t)(atomic_load_explicit(&states(map)[page + i], memory_order_relaxed) == state) << i;
    return eight != 0;
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
    while (page < end && pn_map_state(map, page) == state)
        page++;
    return page - first;
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
