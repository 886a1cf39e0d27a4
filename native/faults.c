/* What the uffd reports (removals, faults), the window around faults, pages that are late, and
 * faults that are answered later. */
#define _GNU_SOURCE
#include "cache.h"
#include "lane.h"
#include "thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

static bool can_ask(struct lane *lane, uint32_t runs) {
    return lane->faults.asking->can_ask(lane, runs);
}

static void ask(struct lane *lane, uint8_t class_, const struct pn_piece *piece, uint64_t first,
                uint64_t count) {
    struct run run = {.piece = piece, .first = first, .count = count, .class_ = class_};
    lane->faults.asking->ask(lane, &run);
}

/* Asks for the fixed window around a page that was just asked for: missing pages behind it, then
 * before it, in each direction up to the first that is not missing. */
static void prefetch_fixed(struct lane *lane, const struct pn_piece *piece, uint64_t page,
                           uint32_t forward_, uint32_t backward_) {
    struct pn_map *map = lane->dest->config.map;
    uint64_t limit = pn_tunables.prefetch_most / piece->page_size;
    uint64_t forward = pn_at_most(forward_, piece->first + piece->count - page - 1);
    uint64_t backward = pn_at_most(pn_at_most(backward_, page - piece->first), limit);
    uint64_t taken =
        pn_map_claim(map, page + 1, pn_at_most(forward, limit), PN_MISSING, PN_REQUESTED);
    if (taken)
        ask(lane, PN_PREFETCH, piece, page + 1, taken);
    uint64_t from = page;
    while (page - from < backward && pn_map_claim(map, from - 1, 1, PN_MISSING, PN_REQUESTED))
        from--;
    if (from < page)
        ask(lane, PN_PREFETCH, piece, from, page - from);
}

static void prefetch(struct lane *lane, const struct pn_piece *piece, uint64_t page) {
    struct pn_window *window = lane->dest->config.window;
    uint32_t forward, backward;
    if (pn_window_fixed(window, &forward, &backward))
        prefetch_fixed(lane, piece, page, forward, backward);
    else
        pn_window_fault(window, lane->dest->config.map, page, piece->first,
                        piece->first + piece->count, piece->page_size);
}

/* What the window wants is asked for a little at a time: all that is in flight comes before the
 * next page that a thread waits for. */
void pn_lane_prefetch_more(struct lane *lane) {
    uint64_t first, taken, room;
    while ((room = pn_pace_room(&lane->pace, PN_PREFETCH)) && can_ask(lane, 1)) {
        taken = pn_window_next(lane->dest->config.window, lane->dest->config.map, room, &first);
        if (!taken)
            break;
        ask(lane, PN_PREFETCH, pn_piece_of_page(lane->dest, first), first, taken);
    }
    pn_lane_flush(lane);
}

static void put_off(struct lane *lane, const struct pn_event *fault) {
    if (lane->faults.deferred_count < EVENTS)
        lane->faults.deferred[lane->faults.deferred_count++] = *fault;
    else /* it will fault again */
        pn_uffd_wake(lane->dest->config.uffd, fault->start & ~4095ull, 4096);
}

/* Answers a fault on a page that was placed, or given up, before. */
static void settle(struct lane *lane, const struct pn_event *fault, const struct pn_piece *piece,
                   uint64_t page) {
    enum { FAULT_MINOR = 4 };
    const struct pn_dest *dest = lane->dest;
    uint64_t to = piece->address + (page - piece->first) * piece->page_size;
    /* What the page cache has of shared memory is the cache's, and not what the owner gave up. */
    int minor = !dest->config.shares && fault->flags & FAULT_MINOR;
    struct pn_placed placed =
        pn_settle(dest->config.uffd, to, minor, dest->zeros, piece->page_size);
    if (placed.error == -EAGAIN)
        put_off(lane, fault);
    else if (placed.error == -ESRCH)
        pn_lane_end(lane, PN_END_OWNER_GONE, 0, "");
    else if (placed.error)
        pn_lane_end(lane, PN_END_PLACING, -placed.error, "");
}

/* Memory that the owner announced nothing about is not the source's. A thread that touches it gets
 * a SIGBUS, or zeros if the owner wants that; all other pages go on coming. */
static void answer_outside(struct lane *lane, const struct pn_event *fault) {
    const struct pn_dest_config *config = &lane->dest->config;
    int error =
        pn_answer_outside(config->uffd, fault->start, fault->flags, config->outside_is_zero);
    if (error == -EAGAIN)
        put_off(lane, fault);
    else if (error)
        pn_lane_end(lane, PN_END_OWNER_GONE, 0, "");
}

/* A fault waits for a page that is in flight. If the page came just now, the thread was woken by
 * that, or is woken here; the waiter is taken off again. */
static void wait_for(struct lane *lane, uint64_t page, uint64_t now) {
    pn_wait(lane->dest, page, now);
    int state = pn_map_state(lane->dest->config.map, page);
    if (state == PN_RESIDENT || state == PN_REMOVED)
        pn_wake_waiter(lane->dest, page);
}

/* Asks for the page, if it is in state `state`. */
static bool demand(struct lane *lane, const struct pn_piece *piece, uint64_t page, int state) {
    if (!pn_map_claim(lane->dest->config.map, page, 1, state, PN_REQUESTED))
        return false;
    ask(lane, PN_DEMAND, piece, page, 1);
    return true;
}

/* A page that the background has asked for is behind other background pages, for which a waiting
 * thread should not wait. But on a fast link the page may be here at once, and a page that comes
 * twice delays another. So the page gets a moment to come. */
static void expect(struct lane *lane, const struct pn_piece *piece, uint64_t page, uint64_t now) {
    if (lane->faults.late_count < LATE)
        lane->faults.late[lane->faults.late_count++] =
            (struct late){.page = page, .due = pn_pace_due(now)};
    else if (can_ask(lane, 1))
        demand(lane, piece, page, PN_COMING);
}

/* Asks for pages that did not come within their moment. The copy that comes second is dropped. */
static void demand_late(struct lane *lane) {
    uint64_t now = lane->faults.late_count ? pn_now() : 0;
    int past = 0;
    for (; past < lane->faults.late_count && lane->faults.late[past].due <= now && can_ask(lane, 1);
         past++) {
        uint64_t page = lane->faults.late[past].page;
        demand(lane, pn_piece_of_page(lane->dest, page), page, PN_COMING);
    }
    lane->faults.late_count -= past;
    memmove(lane->faults.late, lane->faults.late + past,
            (size_t)lane->faults.late_count * sizeof lane->faults.late[0]);
    if (past)
        pn_lane_flush(lane);
}

enum found { ASKED_FOR, NO_ROOM, AWAITED, SETTLED };

/* Sees to it that a page comes which somebody waits for since `now`. */
static enum found await(struct lane *lane, const struct pn_piece *piece, uint64_t page,
                        uint64_t now) {
    int state = pn_map_state(lane->dest->config.map, page);
    if (lane->dest->config.faults && state != PN_RESIDENT && state != PN_REMOVED)
        pn_fault_log_write(lane->dest->config.faults, page, lane->dest->config.faults_fd);
    switch (state) {
    case PN_MISSING:
        if (!can_ask(lane, 1))
            return NO_ROOM;
        pn_wait(lane->dest, page, now);
        if (demand(lane, piece, page, PN_MISSING))
            return ASKED_FOR;
        __attribute__((fallthrough)); /* another lane was faster */
    case PN_COMING:
        wait_for(lane, page, now);
        expect(lane, piece, page, now);
        return AWAITED;
    case PN_REQUESTED:
    case PN_PLACING:
    case PN_READY:
    case PN_REMOVING:
        wait_for(lane, page, now);
        return AWAITED;
    case PN_RESIDENT:
    case PN_REMOVED:
    case PN_POISONED:
        return SETTLED;
    default:
        pn_lane_end(lane, PN_END_OWNER_WRONG, 0, PN_WROTE, (unsigned long long)page);
        return AWAITED;
    }
}

/* Deals with one fault. True: prefetch around the page. */
static bool on_fault(struct lane *lane, const struct pn_event *fault, uint64_t now) {
    const struct pn_piece *piece = pn_piece_at(lane->dest, fault->start);
    if (!piece) {
        pn_lane_count(lane, PN_DEMAND, PN_OUTSIDE_FAULTS, 1);
        answer_outside(lane, fault);
        return false;
    }
    uint64_t page = piece->first + (fault->start - piece->address) / piece->page_size;
    if (lane->dest->config.shares) /* it has left the cache since */
        pn_map_claim(lane->dest->config.map, page, 1, PN_RESIDENT, PN_MISSING);
    enum found found = await(lane, piece, page, now);
    if (found == NO_ROOM) /* events had to be read, even without room: let it fault again */
        pn_uffd_wake(lane->dest->config.uffd, fault->start & ~4095ull, 4096);
    else if (found == SETTLED)
        settle(lane, fault, piece, page);
    return found == ASKED_FOR;
}

/* Marks a page as given up. Each change is one step, so a lane that takes the page meanwhile has
 * either taken it before or does not get it. PLACING becomes REMOVING, and the page is left to the
 * lane that places it, however often it is given up until then; any other state becomes REMOVED.
 * Lanes change a page's state only a few times. If it changes more often than that, the owner is
 * writing to the map, and has to live with the result. False: the page is left to the lane that
 * places it. */
static bool remove_page(struct pn_map *map, uint64_t page) {
    for (int tries = 0; tries < 64; tries++) {
        int state = pn_map_state(map, page);
        if (state == PN_REMOVING)
            return false;
        if (pn_map_claim(map, page, 1, state, state == PN_PLACING ? PN_REMOVING : PN_REMOVED))
            return state != PN_PLACING;
    }
    pn_map_set(map, page, 1, PN_REMOVED);
    return true;
}

/* The owner gave up [start, end). */
static void on_removed(struct lane *lane, uint64_t start, uint64_t end) {
    struct pn_dest *dest = lane->dest;
    for (uint64_t i = 0; i < dest->config.piece_count; i++) {
        const struct pn_piece *piece = &dest->config.pieces[i];
        uint64_t from = start > piece->address ? start - piece->address : 0;
        uint64_t to = end > piece->address
                          ? pn_at_most(end - piece->address, piece->count * piece->page_size)
                          : 0;
        for (uint64_t at = from / piece->page_size; at * piece->page_size < to; at++) {
            uint64_t page = piece->first + at;
            pn_let_go(dest, page);
            if (remove_page(dest->config.map, page))
                pn_wake_waiter(dest, page);
        }
    }
}

/* Answers the first touch of a page of the sample, which was left invisible to see whether it is
 * touched. Such a fault did not wait for the source. False: the fault is on no such page. */
static bool on_held(struct lane *lane, const struct pn_event *fault) {
    /* Nearly always none is: no need to find out which page this is. */
    if (!atomic_load(&lane->dest->held_count))
        return false;
    const struct pn_piece *piece = pn_piece_at(lane->dest, fault->start);
    uint64_t page = piece ? piece->first + (fault->start - piece->address) / piece->page_size : 0;
    if (!piece || !pn_let_go(lane->dest, page))
        return false;
    pn_lane_count(lane, PN_PREFETCH, PN_SAMPLED_USED, 1);
    settle(lane, fault, piece, page);
    return true;
}

static int read_events(struct lane *lane, struct pn_event *events) {
    struct pn_dest *dest = lane->dest;
    bool removed = false;
    if (dest->config.removes)
        pthread_rwlock_wrlock(&dest->removal);
    int got = pn_uffd_read(dest->config.uffd, dest->config.map, events, EVENTS);
    for (int i = 0; i < got; i++)
        if (events[i].kind == PN_EVENT_REMOVE || events[i].kind == PN_EVENT_UNMAP) {
            on_removed(lane, events[i].start, events[i].end);
            removed = true;
        }
    if (dest->config.removes)
        pthread_rwlock_unlock(&dest->removal);
    if (removed)
        pn_check_done(dest); /* they may have been the last that were missing */
    return got;
}

static uint64_t page_at(const struct pn_dest *dest, uint64_t address) {
    const struct pn_piece *piece = pn_piece_at(dest, address);
    return piece->first + (address - piece->address) / piece->page_size;
}

/* Prefetches around pages that have just been asked for. */
static void prefetch_around(struct lane *lane, const uint64_t *pages, int count) {
    /* Pages that threads wait for go first: the window around them is asked for while they
     * travel. */
    pn_lane_flush(lane);
    for (int i = 0; i < count && can_ask(lane, 2); i++)
        prefetch(lane, pn_piece_of_page(lane->dest, pages[i]), pages[i]);
    pn_lane_prefetch_more(lane);
}

static void answer_faults(struct lane *lane, const struct pn_event *events, int got) {
    uint64_t missing[EVENTS], now = pn_now();
    int missing_count = 0, faults = 0;
    bool withheld = atomic_load(&lane->dest->withheld);
    for (int i = 0; i < got; i++)
        if (events[i].kind == PN_EVENT_PAGEFAULT) {
            if (withheld || on_held(lane, &events[i]))
                continue;
            faults++;
            if (on_fault(lane, &events[i], now))
                missing[missing_count++] = page_at(lane->dest, events[i].start);
        } else if (events[i].kind == PN_EVENT_FORK || events[i].kind == PN_EVENT_REMAP) {
            pn_lane_end(lane, PN_END_OWNER_WRONG, 0,
                        "the owner forked, or moved memory, while it was being filled");
        }
    if (faults) {
        pn_pace_faulted(&lane->dest->pace, now);
        pn_lane_count(lane, PN_DEMAND, PN_FAULTS, (uint64_t)faults);
    }
    prefetch_around(lane, missing, missing_count);
}

bool pn_lane_has_faults_room(struct lane *lane) { return can_ask(lane, 3 * EVENTS); }

bool pn_lane_is_wanted_fd(const struct lane *lane, int fd) {
    const struct pn_cache *cache = lane->dest->config.fills;
    return cache && pn_cache_wanted_fd(cache) == fd;
}

bool pn_lane_watch_wanted(struct lane *lane, bool full) {
    const struct pn_cache *cache = lane->dest->config.fills;
    return !cache ||
           pn_lane_watch(lane, pn_cache_wanted_fd(cache), full ? 0 : EPOLLIN, &lane->wanted_events);
}

void pn_lane_take_wanted(struct lane *lane) {
    uint64_t pages[EVENTS], now = pn_now();
    int asked = 0, count = pn_cache_take_wanted(lane->dest->config.fills, pages, EVENTS);
    for (int i = 0; i < count; i++)
        if (await(lane, pn_piece_of_page(lane->dest, pages[i]), pages[i], now) == ASKED_FOR)
            pages[asked++] = pages[i];
    if (count)
        pn_pace_faulted(&lane->dest->pace, now);
    pn_lane_count(lane, PN_DEMAND, PN_FAULTS, (uint64_t)count);
    prefetch_around(lane, pages, asked);
}

bool pn_lane_take_faults(struct lane *lane) {
    struct pn_event events[EVENTS];
    int got = read_events(lane, events);
    if (got > 0)
        answer_faults(lane, events, got);
    return got > 0;
}

void pn_lane_act_on_uffd(struct lane *lane, uint32_t ready) {
    if (ready & EPOLLERR)
        pn_lane_end(lane, PN_END_OWNER_WRONG, 0, "the owner has made its userfaultfd blocking");
    else
        pn_lane_take_faults(lane);
}

struct wait {
    uint64_t page, since;
};

static int compare_waits(const void *one, const void *other) {
    uint64_t first = ((const struct wait *)one)->since,
             second = ((const struct wait *)other)->since;
    return first < second ? -1 : first > second;
}

void pn_lane_ask_waiting(struct lane *lane) {
    struct pn_dest *dest = lane->dest;
    struct wait waits[PN_WAITERS];
    size_t count = 0;
    for (unsigned i = 0, end = atomic_load(&dest->waiter_end); i < end; i++) {
        uint64_t page = atomic_load(&dest->waiters[i].page);
        if (page)
            waits[count++] = (struct wait){page - 1, atomic_load(&dest->waiters[i].since)};
    }
    qsort(waits, count, sizeof waits[0], compare_waits);
    for (size_t i = 0; i < count && can_ask(lane, 1); i++)
        demand(lane, pn_piece_of_page(dest, waits[i].page), waits[i].page, PN_MISSING);
    pn_lane_flush(lane);
}

static void settle_deferred(struct lane *lane) {
    struct pn_event faults[EVENTS];
    int faults_count = lane->faults.deferred_count;
    memcpy(faults, lane->faults.deferred, (size_t)faults_count * sizeof faults[0]);
    lane->faults.deferred_count = 0;
    for (int i = 0; i < faults_count; i++) {
        const struct pn_piece *piece = pn_piece_at(lane->dest, faults[i].start);
        if (!piece) {
            answer_outside(lane, &faults[i]);
            continue;
        }
        settle(lane, &faults[i], piece,
               piece->first + (faults[i].start - piece->address) / piece->page_size);
    }
}

void pn_lane_look_again(struct lane *lane) {
    if (lane->faults.deferred_count && !lane->ended)
        settle_deferred(lane);
    if (lane->faults.late_count && !lane->ended)
        demand_late(lane);
}
