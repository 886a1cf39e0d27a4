/* How much may be in flight, and at which rate: for pages that somebody waits for, for what is
 * prefetched around them, and for the background. Pure: no clock, no descriptor and no lock in
 * here; whoever calls says what time it is (ns, on one clock). */
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
    uint64_t grant_ns, catch_up_ns, make_up_ns;
    double peak;
    uint64_t spin_ns, spin_processors;
};
extern const struct pn_pace_tunables pn_tunables;

/* What all loops of one destination know. Any of them may read it, and call the functions, but for
 * the last two fields: those are for one thread at a time (a lock of the caller's). */
struct pn_pace_shared {
    uint64_t last_fault; /* ns */
    uint64_t waited; /* ns that faults have waited for pages which are in place now, all in all */
    uint64_t best;   /* ns that a page takes which is waited for, at best; 0: none has come. One
                        loop's to write */
    uint64_t rate;   /* bytes of background a second; 0: no limit, UINT64_MAX: none may come */
    uint64_t paid_until; /* ns: the moment up to which what was asked for has used up the rate */
    uint64_t next_grant; /* ns: not before, so that what was missed is made up for smoothly */
};
/* Somebody faulted. */
void pn_pace_faulted(struct pn_pace_shared *shared, uint64_t now);
/* A page is in place for which somebody has waited so long. */
void pn_pace_in_place(struct pn_pace_shared *shared, uint64_t waited);

/* The rate of the background, on all loops together, from now on. */
void pn_pace_limit(struct pn_pace_shared *shared, uint64_t bytes_per_second, uint64_t now);
/* How much of `wanted` bytes of background, in whole pages, may be asked for now: 0 if none yet,
 * and then *wait is how many ns from now on to look again (UINT64_MAX: when told to). What is
 * granted counts as asked for. */
uint64_t pn_pace_grant(struct pn_pace_shared *shared, uint64_t now, uint64_t wanted,
                       uint64_t page_size, uint64_t *wait);
/* So many bytes that were granted took nothing on the wire. */
void pn_pace_refund(struct pn_pace_shared *shared, uint64_t bytes);

/* Bytes of pages. window: that may be in flight. */
struct pn_flow {
    uint64_t in_flight;
    uint64_t window;
};
/* One loop's. A loop that brings one kind alone leaves the other flow as it is. */
struct pn_pace {
    struct pn_pace_shared *shared;
    uint64_t window_least; /* bytes of background that may be in flight while the owner does little
                              but wait, ... */
    uint64_t window_min;   /* ... while there are faults, ... */
    uint64_t window_max;   /* ... and when there have been none for a while */
    uint64_t chunk;        /* bytes of background asked for at a time, at most */
    struct pn_flow demand; /* what is waited for, and what is prefetched: its window is for how much
                              of the latter may join in */
    struct pn_flow background;
    uint64_t
        dense; /* bytes of background that come as one byte on the wire, of late; 1 to most_dense */
    uint64_t looked, waited; /* when the share of time that the owner waits was looked at, and how
                                long it had waited by then */
    double waiting;          /* that share, of late */
    bool starved;            /* more than half, just now */
    uint64_t arrived;        /* bytes on the wire since then */
    double rate;             /* bytes a ns: the most of late */
};
/* The windows and the chunk are set by the caller before or after; all else begins here. */
void pn_pace_init(struct pn_pace *pace, struct pn_pace_shared *shared);
/* Pages of a class were asked for. */
void pn_pace_sent(struct pn_pace *pace, int class_, uint64_t bytes);
/* They have come and are dealt with, or will not come. */
void pn_pace_came(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t now);
/* Pages came as so many bytes on the wire: how many bytes are to be refunded. */
uint64_t pn_pace_wire(struct pn_pace *pace, int class_, uint64_t bytes, uint64_t wire);
/* A page that somebody waited for came after so long. */
void pn_pace_waited(struct pn_pace *pace, uint64_t latency, uint64_t now);
/* Before the background asks: its window closes beside faults, and stays as it is while there have
 * been none of late. prefetches: something is asked for around pages that are waited for. */
void pn_pace_look(struct pn_pace *pace, uint64_t now, bool prefetches);
/* Bytes of a class that may be asked for now. What somebody waits for may be asked for always. */
uint64_t pn_pace_room(const struct pn_pace *pace, int class_);
/* Pages of that size that the background asks for in one request. */
uint64_t pn_pace_request_pages(const struct pn_pace *pace, uint64_t page_size);
/* When a page that the background has asked for is asked for again, if it is waited for from now
 * on. */
uint64_t pn_pace_due(uint64_t now);
/* For how long (ns) the end of a READ is looked for before sleeping, on a machine with so many
 * processors. */
uint64_t pn_pace_spin(int64_t processors);

#endif
