/* The lane of a guest that is filled from a host cache: without a socket, and one step at a time,
 * for a crew. What a thread of the guest waits for is put into place at once if the cache has it,
 * and else when it has come. */
#define _GNU_SOURCE
#include "cached.h"
#include "cache.h"
#include "thread.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    STEP_BYTES = 1 << 20,    /* placed in one step: other guests wait meanwhile */
    PUT_BYTES = 256 << 10,   /* placed while the cache is held */
    AHEAD_BYTES = 256 << 10, /* wanted at a time for the background */
    WANTS_AHEAD = 16,
    AHEAD_NS = 1000 * 1000 * 1000, /* until the background wants what nobody has brought */
    AGAIN_NS = 200 * 1000 * 1000,  /* until what is awaited is wanted again */
};

static uint64_t offset_of(const struct run *run) {
    return run->piece->file_offset + (run->first - run->piece->first) * run->piece->page_size;
}

static uint64_t size_of(const struct run *run) { return run->count * run->piece->page_size; }

/* ---- what the cache has ---- */

/* How many pages, from the run's first on, the cache has. To be called while it is held. */
static uint64_t find(const struct cached *cached, const struct run *run, const char **bytes) {
    uint64_t page_size = run->piece->page_size;
    uint64_t most = page_size > PUT_BYTES ? page_size : PUT_BYTES;
    return pn_cache_find(cached->lane.config->cache, offset_of(run), pn_at_most(size_of(run), most),
                         page_size, bytes) /
           page_size;
}

/* Puts the run's first pages into place, which the caller has claimed, and the cache has. Returns
 * how many are dealt with. */
static uint64_t put(struct cached *cached, const struct run *run, const char *bytes) {
    struct pn_dest *dest = cached->lane.dest;
    uint64_t done = 0, taken = pn_take(dest, run->first, run->count);
    if (!taken) { /* the owner gave it up */
        pn_lane_count(&cached->lane, run->class_, PN_DROPPED, 1);
        return 1;
    }
    int error = 0;
    if (!bytes && pn_leave_zeros(dest, run->class_, run->piece, run->first, taken))
        done = taken;
    else if (run->piece->second)
        error = pn_write_shared(dest, run->piece, run->first, taken, bytes);
    if (!error && !done)
        error = pn_put(dest, run->class_, run->first, taken, run->piece->second ? NULL : bytes,
                       !bytes, &done);
    /* Nobody but this lane reads the owner's events: they are PLACING still. */
    pn_map_replace(dest->config.map, run->first + done, taken - done, PN_PLACING, PN_REQUESTED);
    if (error == -EAGAIN)
        cached->changing = true;
    else if (error)
        pn_lane_end_placing(&cached->lane, error);
    pn_lane_count(&cached->lane, run->class_, PN_RUNS, 1);
    return done;
}

/* Puts into place what the cache has of the run's first pages. Returns how many are dealt with. */
static uint64_t place(struct cached *cached, const struct run *run) {
    struct pn_cache *cache = cached->lane.config->cache;
    struct run part = *run;
    uint64_t done = 0;
    const char *bytes;
    pn_cache_hold(cache);
    part.count = find(cached, run, &bytes);
    if (part.count)
        done = put(cached, &part, bytes);
    pn_cache_unhold(cache);
    cached->placed += done * run->piece->page_size;
    if (done)
        pn_check_done(cached->lane.dest);
    return done;
}

/* ---- what it does not have ---- */

static void await(struct cached *cached, struct asked *asked) {
    pn_cache_wait(cached->lane.config->cache, offset_of(&asked->run), size_of(&asked->run),
                  cached->wake_fd);
    asked->is_awaited = true;
    cached->again = pn_at_most(cached->again, pn_now() + AGAIN_NS);
}

static void forget(struct cached *cached, struct asked *asked) {
    if (asked->is_awaited)
        pn_cache_unwait(cached->lane.config->cache, offset_of(&asked->run), size_of(&asked->run),
                        cached->wake_fd);
    *asked = (struct asked){.is_awaited = false};
}

/* What is awaited may have been forgotten: the source was away, or too much was wanted. */
static void want_again(struct cached *cached) {
    struct pn_cache *cache = cached->lane.config->cache;
    bool awaits = false;
    for (unsigned i = 0; i < cached->asked_count; i++)
        if (cached->asked[i].is_awaited) {
            pn_cache_want(cache, offset_of(&cached->asked[i].run), size_of(&cached->asked[i].run));
            awaits = true;
        }
    if (cached->ahead.is_awaited && pn_now() - cached->ahead_since >= AHEAD_NS) {
        cached->wants_ahead = WANTS_AHEAD;
        pn_cache_want(cache, offset_of(&cached->ahead.run), cached->ahead_bytes);
    }
    awaits = awaits || cached->ahead.is_awaited;
    cached->again = awaits ? pn_now() + AGAIN_NS : UINT64_MAX;
}

/* ---- what faults ask for ---- */

static bool can_ask(struct lane *lane, uint32_t runs) {
    return ((struct cached *)lane)->asked_count + runs <= ASKED;
}

static void ask(struct lane *lane, const struct run *run) {
    struct cached *cached = (struct cached *)lane;
    cached->asked[cached->asked_count++] = (struct asked){.run = *run};
}

static const struct asking asking = {ask, can_ask};

/* Nobody waits for these pages, and the cache, which has a window and a background of its own, does
 * not have them. If a thread came to wait for one just now, it faults again. */
static void give_up(struct cached *cached, const struct run *run) {
    struct pn_dest *dest = cached->lane.dest;
    pn_map_replace(dest->config.map, run->first, run->count, PN_REQUESTED, PN_MISSING);
    if (!atomic_load(&dest->waiter_count))
        return;
    pn_take_waiters(dest, run->first, run->count, false);
    pn_uffd_wake(dest->config.uffd,
                 run->piece->address + (run->first - run->piece->first) * run->piece->page_size,
                 size_of(run));
}

/* True: nothing is left to be done for it. */
static bool serve(struct cached *cached, struct run run) {
    struct pn_map *map = cached->lane.dest->config.map;
    while (run.count) {
        uint64_t placed = pn_map_state(map, run.first) == PN_REQUESTED ? place(cached, &run) : 1;
        run.first += placed;
        run.count -= placed;
        if (cached->lane.ended || cached->changing)
            return !run.count;
        if (!placed)
            break;
    }
    if (run.count && run.class_ == PN_PREFETCH) {
        give_up(cached, &run);
        return true;
    }
    return !run.count;
}

static void serve_all(struct cached *cached) {
    for (unsigned i = 0; i < cached->asked_count && !cached->lane.ended;) {
        struct asked *asked = &cached->asked[i];
        if (serve(cached, asked->run)) {
            forget(cached, asked);
            *asked = cached->asked[--cached->asked_count];
        } else if (!asked->is_awaited && !cached->changing) {
            await(cached, asked); /* it may have come since: once more */
            pn_cache_want(cached->lane.config->cache, offset_of(&asked->run), size_of(&asked->run));
        } else {
            i++;
        }
    }
}

/* What faults ask for, and what the window wants around it, until there is nothing that the cache
 * has. */
static void serve_faults(struct cached *cached) {
    unsigned before;
    do {
        serve_all(cached);
        before = cached->asked_count;
        if (!cached->lane.ended && cached->placed < STEP_BYTES)
            pn_lane_prefetch_more(&cached->lane);
    } while (cached->asked_count > before);
}

/* ---- what the background brings ---- */

/* The background of the cache brings the same in the same order. Where it does not, which shows
 * when nothing has come for a while, the pages are wanted as if threads waited for them. */
static void await_ahead(struct cached *cached, const struct run *run) {
    struct asked *ahead = &cached->ahead;
    if (ahead->is_awaited && ahead->run.first == run->first)
        return;
    forget(cached, ahead);
    ahead->run = *run;
    ahead->run.count = 1;
    cached->ahead_bytes = pn_at_most(size_of(run), AHEAD_BYTES);
    cached->ahead_since = pn_now();
    await(cached, ahead);
    if (cached->wants_ahead && cached->wants_ahead--)
        pn_cache_want(cached->lane.config->cache, offset_of(run), cached->ahead_bytes);
}

/* False: the ring has nothing that the cache has, or the rate allows nothing now. */
static bool feed(struct cached *cached) {
    struct lane *lane = &cached->lane;
    struct pn_cache *cache = lane->config->cache;
    struct run next;
    const char *bytes;
    if (!pn_lane_find_next(lane, &next))
        return false;
    pn_cache_hold(cache);
    uint64_t found = find(cached, &next, &bytes);
    pn_cache_unhold(cache);
    if (!found) {
        await_ahead(cached, &next);
        return false;
    }
    next.count = found;
    if (!pn_lane_claim_next(lane, &next))
        return false;
    uint64_t placed = next.count ? place(cached, &next) : 1;
    struct pn_map *map = lane->dest->config.map;
    if (next.count > placed)
        for (int state = PN_COMING; state != PN_MISSING;
             state = state == PN_COMING ? PN_REQUESTED : PN_MISSING)
            pn_map_replace(map, next.first + placed, next.count - placed, state, PN_MISSING);
    pn_lane_go_past(lane, placed);
    return placed;
}

static void feed_all(struct cached *cached) {
    struct lane *lane = &cached->lane;
    lane->pause = UINT64_MAX;
    if (!lane->config->ring)
        return;
    pn_lane_look(lane);
    while (!lane->ended && !cached->changing && cached->placed < STEP_BYTES && feed(cached))
        ;
    if (!pn_ring_used(lane->config->ring))
        forget(cached, &cached->ahead);
}

/* ---- the lane ---- */

static void act(struct cached *cached, const struct epoll_event *event) {
    struct lane *lane = &cached->lane;
    int fd = event->data.fd;
    if (fd == lane->config->stop_fd)
        pn_lane_end(lane, PN_END_STOPPED, 0, "");
    else if (fd == lane->dest->config.uffd)
        pn_lane_act_on_uffd(lane, event->events);
    else
        pn_drain_eventfd(fd);
}

/* While there is no room for what faults ask for, they stay in the uffd. */
static void watch(struct cached *cached) {
    struct lane *lane = &cached->lane;
    uint32_t faults = pn_lane_has_faults_room(lane) ? EPOLLIN : 0;
    if (!pn_lane_watch(lane, lane->dest->config.uffd, faults, &cached->uffd_events))
        pn_lane_end(lane, PN_END_BROKEN, errno, "");
}

void pn_cached_step(struct cached *cached) {
    struct lane *lane = &cached->lane;
    struct epoll_event ready[4];
    cached->placed = 0;
    cached->changing = false;
    int count = epoll_wait(lane->epoll, ready, 4, 0);
    for (int i = 0; i < count && !lane->ended; i++)
        act(cached, &ready[i]);
    if (cached->again <= pn_now())
        want_again(cached);
    serve_faults(cached);
    pn_lane_look_again(lane);
    if (!lane->ended)
        feed_all(cached);
    if (!lane->ended)
        watch(cached);
}

uint64_t pn_cached_time_to_wait(const struct cached *cached) {
    uint64_t now = cached->again == UINT64_MAX ? 0 : pn_now();
    if (cached->changing || cached->placed >= STEP_BYTES)
        return 0;
    uint64_t again = cached->again == UINT64_MAX ? UINT64_MAX
                     : cached->again > now       ? cached->again - now
                                                 : 0;
    return pn_at_most(again, pn_lane_time_to_wait(&cached->lane));
}

void pn_cached_init(struct cached *cached, const struct pn_lane_config *config,
                    struct pn_end *end) {
    *cached = (struct cached){
        .lane = {.config = config,
                 .dest = config->dest,
                 .end = end,
                 .sock = {.fd = -1},
                 .epoll = -1,
                 .faults = {.asking = &asking}},
        .uffd_events = UNWATCHED,
        .wake_events = UNWATCHED,
        .stop_events = UNWATCHED,
        .wake_fd = -1,
        .again = UINT64_MAX,
    };
}

bool pn_cached_prepare(struct cached *cached) {
    struct lane *lane = &cached->lane;
    cached->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (cached->wake_fd < 0 || !pn_lane_prepare(lane) ||
        !pn_lane_watch(lane, cached->wake_fd, EPOLLIN, &cached->wake_events) ||
        !pn_lane_watch(lane, lane->config->stop_fd, EPOLLIN, &cached->stop_events) ||
        (lane->config->ring &&
         !pn_lane_watch(lane, lane->config->work_fd, EPOLLIN, &lane->work_events)))
        return false;
    watch(cached);
    return !lane->ended;
}

void pn_cached_clean_up(struct cached *cached) {
    if (cached->wake_fd >= 0) {
        pn_cache_unwait(cached->lane.config->cache, 0, 0, cached->wake_fd);
        close(cached->wake_fd);
    }
    pn_lane_clean_up(&cached->lane);
}
