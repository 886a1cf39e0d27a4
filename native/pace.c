/* All pacing of a destination. What is in flight delays the next page that a thread waits for; with
 * too little in flight the link is idle. Both flows of every loop, over TCP and over RDMA, are kept
 * between the two here. */
#include "pace.h"
#include "pagenet.h"

/* "Measured": by pagenet-bench workload (zipf, sequential, random) over links of 1 Gbit/s and 100
 * Mbit/s, beside other values. "Simulated": by tests/unit/test_pace.py. */
const struct pn_pace_tunables pn_tunables = {
    /* The background's window. At least two requests, so that one is always being answered. */
    .window_least = 16 << 10,
    /* Before the first fault, and where a rate limits. 0.8 ms at 1 Gbit/s. Not measured by itself.
     */
    .window_min = 96 << 10,
    /* What 10 Gbit/s hold at 13 ms. Not measured by itself. */
    .window_max = 16 << 20,
    /* The same over RDMA. A fault on a page of shared memory that the background READs in place
     * cannot overtake that READ, so this is what such a fault may wait for. Not measured. */
    .rdma_window_least = 64 << 10,
    .rdma_window_min = 256 << 10,
    .rdma_window_max = 2 << 20,
    /* The window of prefetched pages: at least, however slow the path, 0.07 ms at 1 Gbit/s; */
    .prefetch_least = 8 << 10,
    /* at most, because more (of huge pages) would only delay the next fault. Not measured. */
    .prefetch_most = 1 << 20,
    /* Pages per page on the wire. Where pages turn out not to be zeros after all, that many times
     * the window is in flight, once. Not measured. */
    .most_dense = 16,
    /* No fault for this long: the background may widen its window. Not measured. */
    .quiet_ns = 20000000,
    /* The period over which the owner's share of waiting time is taken: some faults of a short
     * path. Not measured. */
    .look_ns = 4000000,
    /* What a background with a limited rate has in flight beside an owner that waits: this much of
     * its rate. Measured. */
    .limited_ns = 150000,
    /* What an adaptive prefetch window may have in flight then, if the owner did nothing but wait:
     * this much of the link. Measured. */
    .widen_ns = 750000,
    /* A page that the background has requested may take this long before it is requested again:
     * several times its latency on a fast link, little of it on a slow one. Not measured. */
    .moment_ns = 300000,
    /* Shares of time from which on an owner counts as waiting, and from which on fewer but longer
     * waits are better for it. Measured. */
    .waits = 0.06,
    .waits_much = 0.2,
    /* The search for the window. The shortest sample: tens of faults on a short path. Simulated: 4
     * to 16 ms are alike. */
    .sample_ns = 6000000,
    /* A sample contains at least so many windows, or the waits at its ends would count too much. */
    .sample_windows = 8,
    /* The pause after a trial that failed. It doubles with each. */
    .pause_ns = 20000000,
    .most_pause_ns = 320000000,
    /* The cost of a second in which no thread waits while pages are missing, in seconds of waiting:
     * beside an owner that hardly waits, the background is as fast as it can be. Simulated: 0.15
     * completes later, and stalls as long. */
    .other_time = 0.3,
    /* A trial of a larger window succeeds if it costs less than this share of what it is compared
     * with; a trial of a smaller one if it costs less than as_good of it. Of windows that are alike
     * the smaller one has pages wait for less time. Simulated: 0.92 is worse where the processors
     * are busy. */
    .better = 0.95,
    .as_good = 1.0,
    /* A request whose latency is at most this many times the lowest one has found no queue: the
     * link has room for more. Not measured. */
    .idle_link = 1.25,
    /* More in flight than that many times what comes in a round trip: there may be a queue, which
     * the first trial is to do without. A link that is shaped lets hundreds of KiB pass before its
     * rate shows: at 1 Gbit/s windows had grown to 53 KiB where 16 KiB are enough. The factor is
     * not measured. */
    .queues = 2.0,
    /* A path that takes longer is long: there the window grows by this many times what comes while
     * the link is idle, and begins with what a link of 100 Mbit/s holds. Measured over 20 ms: where
     * it doubled from its least, a tenth of a second of the link was lost. slow_link: bytes a ns.
     */
    .long_ns = 4000000,
    .grows = 3,
    .slow_link = 0.0125,
    /* A trial makes no longer queue than twice this. Measured over loopback, where processors are
     * the limit: random touches waited 0.36 s in all with this, 0.53 s with 100 us. */
    .queue_ns = 500000,
    /* Granted at a time. On a link no faster than the limit, a page that a thread waits for waits
     * no longer than this for the background before it. */
    .grant_ns = 300000,
    /* What a loop missed while it waited for a processor, or for the link, is made up for: of the
     * last 50 ms, so the rate is kept; at a quarter more than the rate, so no 10 ms see twice of
     * it. */
    .catch_up_ns = 500000,
    .make_up_ns = 50000000,
    .peak = 1.25,
    /* The end of a READ that a thread waits for comes within this time from a near device. With
     * fewer processors than these, the owner's threads need the one that would be spent. Not
     * measured on hardware. */
    .spin_ns = 30000,
    .spin_processors = 4,
};

static uint64_t at_most(uint64_t value, uint64_t limit) { return value < limit ? value : limit; }
static uint64_t later(uint64_t one, uint64_t other) { return one > other ? one : other; }

static uint64_t load(const uint64_t *field) { return __atomic_load_n(field, __ATOMIC_SEQ_CST); }
static void store(uint64_t *field, uint64_t value) {
    __atomic_store_n(field, value, __ATOMIC_SEQ_CST);
}

/* ---- how much the owner waits ---- */

void pn_pace_faulted(struct pn_pace_shared *shared, uint64_t now) {
    store(&shared->last_fault, now);
}

void pn_pace_in_place(struct pn_pace_shared *shared, uint64_t waited) {
    __atomic_fetch_add(&shared->waited, waited, __ATOMIC_SEQ_CST);
}

/* No thread has faulted for longer than it may still be waiting behind what is in flight. */
static bool is_quiet(const struct pn_pace *pace, uint64_t now) {
    double queue = pace->rate > 0 ? (double)pace->background.in_flight / pace->rate : 0;
    uint64_t quiet = pn_tunables.quiet_ns + load(&pace->shared->best) + (uint64_t)queue;
    return now - load(&pace->shared->last_fault) > quiet;
}

/* Takes the owner's share of waiting time, and the rate at which pages come. */
static void look(struct pn_pace *pace, uint64_t now) {
    uint64_t past = now - pace->looked;
    /* Sooner, much of what was requested since the last time would still be on its way. */
    if (past <= pn_tunables.look_ns || past <= 2 * load(&pace->shared->best))
        return;
    /* The sum over all threads. Where several wait at once, the share may be more than 1. */
    uint64_t waited = load(&pace->shared->waited);
    double share = (double)(waited - pace->waited) / (double)past;
    pace->starved = share > 0.5;
    pace->waiting += ((share < 1 ? share : 1) - pace->waiting) / 4;
    pace->waited = waited;
    double rate = (double)pace->arrived / (double)past, before = pace->rate * 7 / 8;
    pace->rate = rate > before ? rate : before;
    pace->arrived = 0;
    pace->looked = now;
}

/* ---- what is prefetched ---- */

/* The least window of prefetched pages, however long pages take. A background with a limited rate
 * leaves some of the link free. Then the window is larger, the more the owner waits: each wait is
 * longer, and there are fewer. A background without a limit takes all that the link carries.
 * Prefetching more would only slow it down, and a guest loses by that. */
static uint64_t least_prefetch(const struct pn_pace *pace) {
    double much = pace->waiting - pn_tunables.waits_much;
    bool room = load(&pace->shared->rate) && much > 0;
    return pn_tunables.prefetch_least +
           (room ? (uint64_t)(pace->rate * (double)pn_tunables.widen_ns * much) : 0);
}

/* The window of prefetched pages shrinks while pages take more than twice their shortest time, and
 * grows while they do not. */
void pn_pace_waited(struct pn_pace *pace, uint64_t latency, uint64_t now) {
    look(pace, now);
    uint64_t best = load(&pace->shared->best), *window = &pace->demand.window;
    /* The path may become longer, so the shortest time grows: slowly, or a queue would soon count
     * as a part of the path. */
    best += best / 8192;
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

/* The window of a background with a limited rate, while a thread waits or has faulted recently: 1.5
 * times what the path holds, so that the link is hardly ever idle. That is the rate at which pages
 * come times the shortest time of a page. Where it is little, requests would be too small, and the
 * window is `least`. */
static uint64_t limited_window(const struct pn_pace *pace, uint64_t least) {
    uint64_t path = (uint64_t)(pace->rate * (double)load(&pace->shared->best) * 1.5);
    return at_most(path > least ? path : least, pace->window_max);
}

/* The least window of such a background. Beside an owner that waits, it is what keeps the rate up:
 * any more would only delay the pages that threads wait for. It is not so small where nothing is
 * prefetched: there only the background brings pages before they are touched. */
static uint64_t least_limited(const struct pn_pace *pace, uint64_t rate, bool prefetches) {
    uint64_t usual = pace->starved ? pace->window_least : pace->window_min;
    double path = 1.5 * (double)load(&pace->shared->best), least = (double)pn_tunables.limited_ns;
    double limited = (double)rate / 1e9 * (path > least ? path : least);
    return pace->waiting > pn_tunables.waits && limited < (double)usual && prefetches
               ? (uint64_t)limited
               : usual;
}

/* ---- the search for the window ---- */

/* A window that is too small leaves the link idle: pages come later, and more touches wait. In one
 * that is too large each of them waits longer. Where the best one is depends on the path, on the
 * processors and on the owner, so it is measured: the time that the owner waits for each byte that
 * comes. All bytes have to come, so the lowest cost of a byte is the shortest time in all. */

enum { BEFORE, TRIAL, AFTER };

static struct pn_pace_mark mark(const struct pn_pace *pace, uint64_t now) {
    const struct pn_pace_shared *shared = pace->shared;
    uint64_t bytes = load(&shared->demand_bytes) + load(&shared->background_bytes);
    return (struct pn_pace_mark){now, load(&shared->waited), bytes};
}

static double cost(const struct pn_pace_mark *from, const struct pn_pace_mark *to) {
    double waited = (double)(to->waited - from->waited), time = (double)(to->time - from->time);
    return (waited + pn_tunables.other_time * time) / (double)(to->bytes - from->bytes);
}

/* What is in flight now was asked for under another window, and so was what the pages that are
 * waited for stand behind: no sample begins before that has come. */
static void use(struct pn_pace *pace, uint64_t window, uint64_t stage,
                const struct pn_pace_mark *here) {
    pace->search.stage = stage;
    pace->search.settled = here->bytes + pace->background.in_flight + window;
    pace->search.sampling = false;
    store(&pace->shared->window, window);
}

/* What the link holds: with less in flight it would be idle. */
static uint64_t least_window(const struct pn_pace *pace) {
    uint64_t path = (uint64_t)(pace->rate * (double)pace->search.base);
    return at_most(later(path, pace->window_least), pace->window_max);
}

/* More would only queue: twice what the link carries in its round trip and a moment. Its rate is
 * known from the first sample on. */
static uint64_t most_window(const struct pn_pace *pace) {
    double moment = (double)(pace->search.base + pn_tunables.queue_ns);
    uint64_t link = later((uint64_t)(2 * pace->rate * moment), pace->window_least);
    return pace->search.before > 0 ? at_most(link, pace->window_max) : pace->window_max;
}

static uint64_t neighbour(const struct pn_pace *pace) {
    const struct pn_search *search = &pace->search;
    uint64_t window = search->down ? search->window / 2 : 2 * search->window;
    return at_most(later(window, least_window(pace)), later(most_window(pace), search->window));
}

/* What came in a round trip during the sample, and a little more. */
static uint64_t path_window(const struct pn_pace *pace, const struct pn_pace_mark *here) {
    const struct pn_pace_mark *from = &pace->search.mark;
    double rate = (double)(here->bytes - from->bytes) / (double)(here->time - from->time);
    double path = pn_tunables.idle_link * rate * (double)pace->search.base;
    return later((uint64_t)path, pace->window_least);
}

static void turn_round(struct pn_search *search, uint64_t now) {
    search->down = !search->down;
    search->opening = search->again = false;
    search->next = now + search->pause;
    search->pause = at_most(2 * search->pause, pn_tunables.most_pause_ns);
}

/* While the search opens: at once the largest window that may be worth a trial, and if that fails,
 * one twice as large as before. */
static uint64_t open_further(struct pn_pace *pace, bool succeeded, uint64_t now) {
    struct pn_search *search = &pace->search;
    if (!succeeded && search->again)
        turn_round(search, now);
    search->again = !succeeded && search->opening;
    return search->opening && succeeded ? later(most_window(pace), search->window)
                                        : neighbour(pace);
}

static uint64_t first_trial(struct pn_pace *pace, const struct pn_pace_mark *here) {
    struct pn_search *search = &pace->search;
    if (!search->opening)
        return neighbour(pace);
    uint64_t path = path_window(pace, here);
    search->down = (double)search->window > pn_tunables.queues * (double)path;
    return search->down ? path : open_further(pace, true, here->time);
}

/* The trial of a window without a queue, while the search opens. */
static void decide_queue(struct pn_pace *pace, bool succeeded, uint64_t now) {
    struct pn_search *search = &pace->search;
    if (succeeded) {
        turn_round(search, now);
        search->trial = neighbour(pace);
    } else {
        search->down = false;
        search->trial = open_further(pace, true, now);
    }
}

static void decide(struct pn_pace *pace, double before, double tried,
                   const struct pn_pace_mark *here) {
    struct pn_search *search = &pace->search;
    bool succeeded = tried < (search->down ? pn_tunables.as_good : pn_tunables.better) * before;
    if (succeeded) {
        search->window = search->trial;
        search->before = tried;
        search->pause = pn_tunables.pause_ns;
    }
    if (search->opening && search->down) {
        decide_queue(pace, succeeded, here->time);
    } else if (search->opening) {
        search->trial = open_further(pace, succeeded, here->time);
    } else {
        if (!succeeded)
            turn_round(search, here->time);
        search->trial = neighbour(pace);
    }
    bool opens = search->opening && search->trial != search->window;
    use(pace, opens ? search->trial : search->window, opens ? TRIAL : BEFORE, here);
}

static void end_sample(struct pn_pace *pace, const struct pn_pace_mark *here) {
    struct pn_search *search = &pace->search;
    double found = cost(&search->mark, here);
    if (search->stage == BEFORE) {
        search->before = found;
        search->trial = first_trial(pace, here);
        use(pace, search->trial, TRIAL, here);
    } else if (search->stage == TRIAL && !search->opening) {
        search->tried = found;
        use(pace, search->window, AFTER, here);
    } else if (search->stage == TRIAL) {
        decide(pace, search->before, found, here);
    } else {
        decide(pace, (search->before + found) / 2, search->tried, here);
    }
}

static bool is_sampled(const struct pn_pace *pace, const struct pn_pace_mark *here) {
    const struct pn_search *search = &pace->search;
    uint64_t least = later(pn_tunables.sample_ns, 2 * load(&pace->shared->best));
    uint64_t samples = search->stage == TRIAL && !search->opening ? 2 : 1;
    return here->time - search->mark.time >= samples * least &&
           here->bytes - search->mark.bytes >=
               pn_tunables.sample_windows * load(&pace->shared->window);
}

static void begin(struct pn_pace *pace, uint64_t window) {
    struct pn_search *search = &pace->search;
    search->window = window;
    search->before = 0;
    search->opening = true;
    search->down = search->again = search->queued = false;
    search->pause = pn_tunables.pause_ns;
    search->trial = neighbour(pace);
}

static void search_on(struct pn_pace *pace, uint64_t now) {
    struct pn_search *search = &pace->search;
    struct pn_pace_mark here = mark(pace, now);
    if (!search->opening && search->window > 2 * most_window(pace)) { /* the path became slow */
        begin(pace, most_window(pace));
        use(pace, search->window, BEFORE, &here);
    }
    if (search->trial == search->window && now >= search->next) { /* at an end of the range */
        turn_round(search, now);
        search->trial = neighbour(pace);
        use(pace, search->window, BEFORE, &here);
    }
    if (search->stage == BEFORE && now < search->next)
        return;
    if (!search->sampling && here.bytes >= search->settled) {
        search->mark = here;
        search->sampling = true;
    } else if (search->sampling && is_sampled(pace, &here)) {
        end_sample(pace, &here);
    }
}

/* The owner does not wait, or the background is limited: a sample would not tell about the window.
 */
static void interrupt(struct pn_pace *pace, uint64_t now) {
    struct pn_pace_mark here = mark(pace, now);
    pace->search.next = now + pace->search.pause;
    use(pace, pace->search.window, BEFORE, &here);
}

/* One loop leads the search: the first that comes. */
static void lead(struct pn_pace *pace) {
    uint64_t *led = &pace->shared->led, no = 0;
    if (!__atomic_compare_exchange_n(led, &no, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return;
    pace->leads = true;
    begin(pace, least_window(pace));
    store(&pace->shared->window, pace->search.window);
}

static bool is_long(const struct pn_pace *pace) { return pace->search.base > pn_tunables.long_ns; }

static uint64_t grown(const struct pn_pace *pace, uint64_t window, uint64_t bytes) {
    uint64_t slow = (uint64_t)(pn_tunables.slow_link * (double)pace->search.base);
    uint64_t more = at_most(bytes, window);
    return is_long(pace) ? later(window + pn_tunables.grows * more, slow) : window + more;
}

/* While the link is idle some of the time, a larger window has a page wait no longer: it needs no
 * trial. The requests in flight are answered in a round trip, so the window doubles in one. */
static void grow(struct pn_pace *pace, uint64_t bytes) {
    struct pn_search *search = &pace->search;
    search->window = at_most(grown(pace, search->window, bytes), pace->window_max);
    search->trial = neighbour(pace);
    search->sampling = false;
    store(&pace->shared->window, search->window);
}

/* Over a long path a window that is several times too large takes half a second to be sampled. What
 * is in flight comes in its latency, and so the part of it comes in a round trip that the link
 * holds. */
static void shrink(struct pn_pace *pace, uint64_t latency) {
    struct pn_pace_mark here = mark(pace, 0);
    if (pace->search.queued && here.bytes < pace->search.settled)
        return;
    double part = pn_tunables.idle_link * (double)pace->search.base / (double)latency;
    uint64_t window = (uint64_t)(part * (double)pace->search.window);
    pace->search.window = later(window, pace->window_least);
    pace->search.queued = true;
    use(pace, pace->search.window, BEFORE, &here);
    pace->search.trial = neighbour(pace);
}

void pn_pace_response(struct pn_pace *pace, uint64_t latency, uint64_t bytes) {
    struct pn_search *search = &pace->search;
    search->base += search->base / 8192; /* the path may change */
    if (!search->base || latency < search->base)
        search->base = latency;
    if (!pace->leads || !search->beside || !search->opening || search->stage != BEFORE)
        return;
    double trips = (double)latency / (double)search->base;
    if (trips <= pn_tunables.idle_link && !search->queued)
        grow(pace, bytes);
    else if (is_long(pace) && trips > pn_tunables.queues)
        shrink(pace, latency);
}

static void find_window(struct pn_pace *pace, uint64_t now, bool beside) {
    if (!load(&pace->shared->led))
        lead(pace);
    if (!pace->leads)
        return;
    pace->search.beside = beside && !load(&pace->shared->rate);
    if (pace->search.beside)
        search_on(pace, now);
    else if (pace->search.sampling || pace->search.stage != BEFORE)
        interrupt(pace, now);
}

void pn_pace_look(struct pn_pace *pace, uint64_t now, bool prefetches) {
    look(pace, now);
    bool beside = pace->starved || !is_quiet(pace, now);
    find_window(pace, now, beside);
    uint64_t rate = load(&pace->shared->rate);
    if (beside && rate)
        pace->background.window = limited_window(pace, least_limited(pace, rate, prefetches));
    else if (beside)
        pace->background.window = at_most(load(&pace->shared->window), pace->window_max);
}

/* ---- the wire ---- */

/* What takes no time on the wire takes no room in the window, or a guest's free memory would come a
 * round trip at a time. Slowly up and at once down: what comes next may be of another kind. */
static void note_density(struct pn_pace *pace, uint64_t bytes, uint64_t wire) {
    uint64_t dense = bytes / wire ? bytes / wire : 1;
    pace->dense = dense < pace->dense
                      ? dense
                      : at_most(at_most(dense, 2 * pace->dense), pn_tunables.most_dense);
}

uint64_t pn_pace_wire(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t wire) {
    struct pn_pace_shared *shared = pace->shared;
    pace->arrived += wire;
    if (class_ != PN_BACKGROUND) {
        store(&shared->demand_bytes, shared->demand_bytes + wire);
        return 0;
    }
    __atomic_fetch_add(&shared->background_bytes, wire, __ATOMIC_SEQ_CST);
    note_density(pace, bytes, wire);
    return wire < bytes ? bytes - wire : 0;
}

uint64_t pn_pace_request_pages(const struct pn_pace *pace, uint64_t page_size) {
    /* One request is answered while the next one travels. */
    uint64_t bytes = at_most(pace->chunk, pace->background.window / 2);
    return page_size < bytes ? bytes / page_size : 1;
}

/* ---- in flight ---- */

void pn_pace_init(struct pn_pace *pace, struct pn_pace_shared *shared) {
    pace->shared = shared;
    pace->dense = 1;
    pace->demand.window = pn_tunables.prefetch_least;
    pace->background.window = pace->window_min;
}

void pn_pace_end(struct pn_pace *pace) {
    if (pace->leads)
        store(&pace->shared->led, 0);
    pace->leads = false;
}

void pn_pace_sent(struct pn_pace *pace, int class_, uint64_t bytes) {
    (class_ == PN_BACKGROUND ? &pace->background : &pace->demand)->in_flight += bytes;
}

/* While no thread faults: twice what the link carries in a round trip and a moment, so that the
 * first fault after that finds little before its page. */
static uint64_t quiet_window(const struct pn_pace *pace) {
    uint64_t best = load(&pace->shared->best);
    double link = 2 * pace->rate * (double)(best + pn_tunables.look_ns);
    uint64_t window = later((uint64_t)link, pace->window_min);
    return best ? at_most(window, pace->window_max) : pace->window_max;
}

void pn_pace_came(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t now) {
    if (class_ != PN_BACKGROUND) {
        pace->demand.in_flight -= bytes;
        return;
    }
    struct pn_flow *flow = &pace->background;
    flow->in_flight -= bytes;
    uint64_t most = quiet_window(pace);
    if (is_quiet(pace, now) && flow->window < most) /* and the peer keeps up */
        flow->window = at_most(grown(pace, flow->window, bytes), most);
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
