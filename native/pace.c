/* All pacing of a destination. What is in flight stands before the next page that somebody waits
 * for; what is not in flight leaves the link idle. Both flows of every loop, over TCP and over
 * RDMA, are held between the two here. */
#include "pace.h"
#include "pagenet.h"

/* "Measured": by pagenet-bench workload (zipf, sequential, random) over links of 1 Gbit/s and 100
 * Mbit/s, side by side with other values. */
const struct pn_pace_tunables pn_tunables = {
    /* The background's window. Two requests, so that one is always being answered: the owner does
       little but wait. */
    .window_least = 16 << 10,
    .window_min = 96 << 10, /* there are faults: 0.8 ms at 1 Gbit/s. Not measured by itself */
    .window_max = 4 << 20,  /* nobody has faulted for a while: what 10 Gbit/s hold at 3 ms. Not
                               measured by itself */
    /* The same over RDMA. A page of shared memory that the background READs in place cannot be
     * overtaken by a fault on it, so this is what such a fault may wait for. Not measured. */
    .rdma_window_least = 64 << 10,
    .rdma_window_min = 256 << 10,
    .rdma_window_max = 2 << 20,
    /* The window of what is prefetched. Least, however slow the path: 0.07 ms at 1 Gbit/s. */
    .prefetch_least = 8 << 10,
    .prefetch_most =
        1 << 20, /* more, of huge pages, would only be in the next fault's way. Not measured */
    /* So much more than meant is in flight, once, where pages turn out to be bytes after all. Not
       measured. */
    .most_dense = 16,
    .quiet_ns =
        20000000, /* no fault for so long: the background may widen its window. Not measured */
    /* Over which it is found out whether the owner does little but wait: some faults of a near
       path. Not measured. */
    .look_ns = 4000000,
    /* Of its rate: what a background that is held to one has in flight, beside an owner that waits.
       Measured. */
    .limited_ns = 150000,
    /* Of the link: what a window that adapts may have in flight then, if the owner did nothing but
       wait. Measured. */
    .widen_ns = 750000,
    /* In which a page that the background has asked for may come before it is asked for again:
     * several times what one takes on a fast link, little of what one takes on a slow one. Not
     * measured. */
    .moment_ns = 300000,
    /* Shares of time. From where on an owner waits; and from where on waiting for fewer pages is
     * worth waiting longer for each. Measured. */
    .waits = 0.06,
    .waits_much = 0.2,
    /* So much at a time: on a link no faster than the limit, a page that somebody waits for waits
     * no longer than that for the background before it. */
    .grant_ns = 300000,
    /* What a loop that had to wait for a processor, or for the link, missed meanwhile is made up
     * for: of the last 50 ms, so the rate is kept; at a quarter more than the rate, so no 10 ms see
     * twice of it. */
    .catch_up_ns = 500000,
    .make_up_ns = 50000000,
    .peak = 1.25,
    /* The end of a READ that somebody waits for comes within so long from a near device; with fewer
     * processors than these, the owner's threads want the one that would be spent. Not measured on
     * hardware. */
    .spin_ns = 30000,
    .spin_processors = 4,
};

static uint64_t at_most(uint64_t value, uint64_t limit) { return value < limit ? value : limit; }
static uint64_t later(uint64_t one, uint64_t other) { return one > other ? one : other; }

static uint64_t load(const uint64_t *field) { return __atomic_load_n(field, __ATOMIC_SEQ_CST); }
static void store(uint64_t *field, uint64_t value) {
    __atomic_store_n(field, value, __ATOMIC_SEQ_CST);
}

/* ---- who waits ---- */

void pn_pace_faulted(struct pn_pace_shared *shared, uint64_t now) {
    store(&shared->last_fault, now);
}

void pn_pace_in_place(struct pn_pace_shared *shared, uint64_t waited) {
    __atomic_fetch_add(&shared->waited, waited, __ATOMIC_SEQ_CST);
}

static bool is_quiet(const struct pn_pace *pace, uint64_t now) {
    return now - load(&pace->shared->last_fault) > pn_tunables.quiet_ns;
}

/* Whether the owner spends most of its time waiting for pages: what it waits for next, nobody knows
 * yet, and it should find the link free. And how fast pages come. */
static void look(struct pn_pace *pace, uint64_t now) {
    uint64_t past = now - pace->looked;
    if (past <= pn_tunables.look_ns ||
        past <= 2 * load(&pace->shared->best)) /* what was asked for meanwhile is yet to come */
        return;
    uint64_t waited = load(&pace->shared->waited);
    double share = (double)(waited - pace->waited) /
                   (double)past; /* of several threads at once: more than all */
    pace->starved = share > 0.5;
    pace->waiting += ((share < 1 ? share : 1) - pace->waiting) / 4;
    pace->waited = waited;
    double rate = (double)pace->arrived / (double)past, before = pace->rate * 7 / 8;
    pace->rate = rate > before ? rate : before;
    pace->arrived = 0;
    pace->looked = now;
}

/* ---- what is prefetched ---- */

/* Bytes that may be in flight of a window that adapts, however long that makes pages take. Where
 * the background is held to a rate, and so leaves some of the link, an owner waits for each page
 * the longer, and for the fewer pages, the more it waits. Where the background takes all that the
 * link carries, more of this is less of that, and a guest loses by it. */
static uint64_t least_prefetch(const struct pn_pace *pace) {
    double much = pace->waiting - pn_tunables.waits_much;
    bool room = load(&pace->shared->rate) && much > 0;
    return pn_tunables.prefetch_least +
           (room ? (uint64_t)(pace->rate * (double)pn_tunables.widen_ns * much) : 0);
}

/* It may take twice as long as it takes at best, no more. */
void pn_pace_waited(struct pn_pace *pace, uint64_t latency, uint64_t now) {
    look(pace, now);
    uint64_t best = load(&pace->shared->best), *window = &pace->demand.window;
    best += best / 8192; /* the path may change; much sooner, and the queue that this is about would
                            be the path */
    if (!best || latency < best)
        best = latency;
    store(&pace->shared->best, best);
    if (latency > 2 * best)
        *window -= *window / 4;
    else
        *window += *window / 8;
    uint64_t least = least_prefetch(pace);
    *window = *window < least ? least : at_most(*window, pn_tunables.prefetch_most);
}

uint64_t pn_pace_due(uint64_t now) { return now + pn_tunables.moment_ns; }

uint64_t pn_pace_spin(int64_t processors) {
    return processors >= (int64_t)pn_tunables.spin_processors ? pn_tunables.spin_ns : 0;
}

/* ---- the background ---- */

/* With faults about, so much of the background is in flight that the link is never idle, and hardly
 * more: what the path holds, by the best time that a page has taken, and the rate at which pages
 * come, and half of that. Where that is nearly nothing, requests are too small to be worth their
 * while. */
static uint64_t window_beside(const struct pn_pace *pace, uint64_t least) {
    uint64_t path = (uint64_t)(pace->rate * (double)load(&pace->shared->best) * 1.5);
    return at_most(path > least ? path : least, pace->window_max);
}

/* Beside an owner that waits, a background that is held to a rate has in flight what keeps that up,
 * and nothing more that a page which somebody waits for stands behind. Where nothing is prefetched,
 * all that comes before it is touched is the background's. */
static uint64_t least_beside(const struct pn_pace *pace, bool prefetches) {
    uint64_t rate = load(&pace->shared->rate),
             usual = pace->starved ? pace->window_least : pace->window_min;
    double path = 1.5 * (double)load(&pace->shared->best), least = (double)pn_tunables.limited_ns;
    double limited = (double)rate / 1e9 * (path > least ? path : least);
    return rate && pace->waiting > pn_tunables.waits && limited < (double)usual && prefetches
               ? (uint64_t)limited
               : usual;
}

void pn_pace_look(struct pn_pace *pace, uint64_t now, bool prefetches) {
    look(pace, now);
    if (pace->starved || !is_quiet(pace, now))
        pace->background.window = window_beside(pace, least_beside(pace, prefetches));
}

/* What takes no time on the wire takes no room in the window, or a guest's free memory would come a
 * round trip at a time. Slowly up and at once down: what comes next may be of another kind. */
static void note_density(struct pn_pace *pace, uint64_t bytes, uint64_t wire) {
    uint64_t dense = bytes / wire ? bytes / wire : 1;
    pace->dense = dense < pace->dense
                      ? dense
                      : at_most(at_most(dense, 2 * pace->dense), pn_tunables.most_dense);
}

uint64_t pn_pace_wire(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t wire) {
    pace->arrived += wire;
    if (class_ != PN_BACKGROUND)
        return 0;
    note_density(pace, bytes, wire);
    return wire < bytes ? bytes - wire : 0;
}

uint64_t pn_pace_request_pages(const struct pn_pace *pace, uint64_t page_size) {
    uint64_t bytes =
        at_most(pace->chunk, pace->background.window /
                                 2); /* one request is answered while the next one travels */
    return page_size < bytes ? bytes / page_size : 1;
}

/* ---- in flight ---- */

void pn_pace_init(struct pn_pace *pace, struct pn_pace_shared *shared) {
    pace->shared = shared;
    pace->dense = 1;
    pace->demand.window = pn_tunables.prefetch_least;
    pace->background.window = pace->window_min;
}

void pn_pace_sent(struct pn_pace *pace, int class_, uint64_t bytes) {
    (class_ == PN_BACKGROUND ? &pace->background : &pace->demand)->in_flight += bytes;
}

void pn_pace_came(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t now) {
    if (class_ != PN_BACKGROUND) {
        pace->demand.in_flight -= bytes;
        return;
    }
    struct pn_flow *flow = &pace->background;
    flow->in_flight -= bytes;
    if (is_quiet(pace, now)) /* and the peer keeps up: let more be in flight */
        flow->window = at_most(flow->window + bytes, pace->window_max);
}

/* A window that opened once, by faults' path or by its first setting, is a limit of its own. */
static uint64_t background_most(const struct pn_pace *pace) {
    uint64_t window = pace->background.window;
    return at_most(window * pace->dense, later(window, pace->window_max));
}

uint64_t pn_pace_room(const struct pn_pace *pace, int class_) {
    if (class_ == PN_DEMAND)
        return UINT64_MAX;
    const struct pn_flow *flow = class_ == PN_BACKGROUND ? &pace->background : &pace->demand;
    uint64_t most = class_ == PN_BACKGROUND ? background_most(pace) : flow->window;
    return flow->in_flight < most ? most - flow->in_flight : 0;
}

/* ---- how fast the background may be ---- */

void pn_pace_limit(struct pn_pace_shared *shared, uint64_t bytes_per_second, uint64_t now) {
    store(&shared->rate, bytes_per_second);
    shared->paid_until = shared->next_grant = now; /* at the former rate that may be hours away */
}

static double duration(uint64_t bytes, uint64_t rate) { return (double)bytes * 1e9 / (double)rate; }

static uint64_t at_a_time(uint64_t wanted, uint64_t rate, uint64_t page_size) {
    uint64_t pages = (uint64_t)((double)rate * (double)pn_tunables.grant_ns / 1e9) / page_size;
    return at_most(wanted, (pages ? pages : 1) * page_size);
}

static uint64_t grant(struct pn_pace_shared *shared, uint64_t now, uint64_t wanted,
                      uint64_t page_size, uint64_t *wait) {
    uint64_t ready = later(shared->paid_until, shared->next_grant);
    if (ready > now) {
        *wait = ready - now;
        return 0;
    }
    uint64_t granted = at_a_time(wanted, shared->rate, page_size);
    double took = duration(granted, shared->rate);
    shared->paid_until = later(shared->paid_until, now - pn_tunables.make_up_ns) + (uint64_t)took;
    shared->next_grant = later(shared->next_grant, now - pn_tunables.catch_up_ns) +
                         (uint64_t)(took / pn_tunables.peak);
    return granted;
}

uint64_t pn_pace_grant(struct pn_pace_shared *shared, uint64_t now, uint64_t wanted,
                       uint64_t page_size, uint64_t *wait) {
    *wait = UINT64_MAX;
    if (!shared->rate)
        return wanted;
    return shared->rate == UINT64_MAX ? 0 : grant(shared, now, wanted, page_size, wait);
}

void pn_pace_refund(struct pn_pace_shared *shared, uint64_t bytes) {
    if (!shared->rate || shared->rate == UINT64_MAX)
        return;
    double ns = duration(bytes, shared->rate), sooner = ns / pn_tunables.peak;
    shared->paid_until -= ns < (double)shared->paid_until ? (uint64_t)ns : shared->paid_until;
    shared->next_grant -=
        sooner < (double)shared->next_grant ? (uint64_t)sooner : shared->next_grant;
}
