/* How much may be in flight, and at which rate: for pages that a thread waits for, for what is
 * prefetched around them, and for the background. Pure: no clock, no descriptor and no lock. The
 * caller passes the time (ns, on one clock). */
#ifndef PAGENET_PACE_H
#define PAGENET_PACE_H
#include <stdbool.h>
#include <stdint.h>

/* All that can be tuned. The values, and the reason for each, are at the head of pace.c. */
struct pn_pace_tunables {
    uint64_t window_least, window_min, window_max;
    uint64_t rdma_window_least, rdma_window_min, rdma_window_max;
    uint64_t prefetch_least, prefetch_most;
    uint64_t most_dense;
    uint64_t quiet_ns, look_ns, limited_ns, widen_ns, moment_ns;
    double waits, waits_much;
    uint64_t sample_ns, sample_windows, pause_ns, most_pause_ns, queue_ns;
    double other_time, better, as_good, idle_link, queues;
    uint64_t long_ns, grows;
    double slow_link;
    uint64_t grant_ns, catch_up_ns, make_up_ns;
    double peak;
    uint64_t spin_ns, spin_processors;
};
extern const struct pn_pace_tunables pn_tunables;

/* What all loops of one destination share. Any of them may read it and call the functions, except
 * for paid_until and next_grant: those are for one thread at a time (under the caller's lock). */
struct pn_pace_shared {
    uint64_t last_fault; /* ns */
    uint64_t waited;     /* ns: the sum of the latencies of all faults that are answered */
    /* ns: the lowest latency of a page that a thread waited for; 0: none has come. Written by one
     * loop. */
    uint64_t best;
    uint64_t
        rate; /* of the background, in bytes a second; 0: no limit, UINT64_MAX: none may come */
    uint64_t paid_until; /* ns: what was asked for has used up the rate until then */
    uint64_t next_grant; /* ns: not before, so that missed time is made up for smoothly */
    /* Bytes on the wire that came for demand and prefetch (written by one loop), and for the
     * background. */
    uint64_t demand_bytes, background_bytes;
    uint64_t led;    /* whether a loop searches for the window of the background */
    uint64_t window; /* bytes: what it has found, for all loops */
};
/* A thread faulted. */
void pn_pace_faulted(struct pn_pace_shared *shared, uint64_t now);
/* A page is in place for which a thread waited `waited` ns. */
void pn_pace_in_place(struct pn_pace_shared *shared, uint64_t waited);

/* The rate of the background, on all loops together, from now on. */
void pn_pace_limit(struct pn_pace_shared *shared, uint64_t bytes_per_second, uint64_t now);
/* How many of `wanted` bytes of background, in whole pages, may be asked for now. 0: none yet, and
 * *wait is the time (ns) until the caller should ask again (UINT64_MAX: when it is told to). What
 * is granted counts as asked for. */
uint64_t pn_pace_grant(struct pn_pace_shared *shared, uint64_t now, uint64_t wanted,
                       uint64_t page_size, uint64_t *wait);
/* `bytes` that were granted took nothing on the wire. */
void pn_pace_refund(struct pn_pace_shared *shared, uint64_t bytes);

/* Bytes of pages. window: the limit of in_flight. */
struct pn_flow {
    uint64_t in_flight;
    uint64_t window;
};
/* The totals at one moment. */
struct pn_pace_mark {
    uint64_t time, waited, bytes;
};
/* The search for the window at which a byte costs the owner the least waiting: a trial of a window
 * twice or half as large is compared with the best so far. */
struct pn_search {
    uint64_t window, trial;   /* the best so far, and the one that it is compared with */
    uint64_t stage;           /* of the comparison */
    bool opening;             /* no trial has failed yet: windows double without a pause */
    bool queued;              /* while it opens: a queue was found, so there is no room to grow */
    bool again;               /* while it opens: the last trial failed */
    bool down;                /* the trial is of a smaller window */
    bool sampling;            /* mark is set */
    struct pn_pace_mark mark; /* where the sample began */
    uint64_t settled;         /* total bytes once what an earlier window asked for has come */
    double before, tried;     /* cost of `window`, sampled before the trial; cost of `trial` */
    uint64_t next, pause;     /* ns: time of the next trial; pause after it */
    uint64_t base;            /* ns: the lowest latency of a request; 0: none has been answered */
    bool beside;              /* a thread waits or has faulted recently, and no rate limits */
};
/* One loop's. A loop that brings one kind alone leaves the other flow as it is. */
struct pn_pace {
    struct pn_pace_shared *shared;
    /* Bytes of background that may be in flight: at least and at most, and at the beginning. */
    uint64_t window_least, window_max, window_min;
    uint64_t chunk; /* bytes that the background asks for at a time, at most */
    /* Pages that threads wait for, and prefetched ones. The window limits the latter. */
    struct pn_flow demand;
    struct pn_flow background;
    bool leads; /* this loop searches for the window of all loops */
    struct pn_search search;
    uint64_t dense; /* recent bytes of background pages per byte on the wire; 1 to most_dense */
    /* When the owner's share of waiting time was looked at last, and how long it had waited. */
    uint64_t looked, waited;
    double waiting;   /* that share, recently */
    bool starved;     /* the last time, it was more than half */
    uint64_t arrived; /* bytes on the wire since then */
    double rate;      /* bytes a ns: the highest recently */
};
/* The caller sets the windows and the chunk, before or after; all else begins here. */
void pn_pace_init(struct pn_pace *pace, struct pn_pace_shared *shared);
/* The loop ends: another one may lead the search. */
void pn_pace_end(struct pn_pace *pace);
/* Pages of a class were asked for. */
void pn_pace_sent(struct pn_pace *pace, int class_, uint64_t bytes);
/* They have come and are dealt with, or will not come. */
void pn_pace_came(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t now);
/* Pages of `bytes` came as `wire` bytes. Returns the bytes to be refunded. */
uint64_t pn_pace_wire(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t wire);
/* A page that a thread waited for came after `latency` ns. */
void pn_pace_waited(struct pn_pace *pace, uint64_t latency, uint64_t now);
/* The first byte of what the background asked for in one request of `bytes` came after `latency`
 * ns. */
void pn_pace_response(struct pn_pace *pace, uint64_t latency, uint64_t bytes);
/* To be called before the background asks: sets its window. prefetches: pages around those that
 * threads wait for are asked for, too. */
void pn_pace_look(struct pn_pace *pace, uint64_t now, bool prefetches);
/* Bytes of a class that may be asked for now. There is no limit for what a thread waits for. */
uint64_t pn_pace_room(const struct pn_pace *pace, int class_);
/* Pages of that size that the background asks for in one request. */
uint64_t pn_pace_request_pages(const struct pn_pace *pace, uint64_t page_size);
/* When to ask again for a page that the background has asked for and that a thread waits for from
 * now on. */
uint64_t pn_pace_due(uint64_t now);
/* How long (ns) to poll for the end of a READ before sleeping, on a machine with that many
 * processors. */
uint64_t pn_pace_spin(int64_t processors);

#endif
