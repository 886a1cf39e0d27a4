/* The inside of a lane that fills a guest from a host cache. */
#ifndef PAGENET_CACHED_H
#define PAGENET_CACHED_H
#include "lane.h"

enum { ASKED = 1024 };

/* Pages that the guest's faults want, and that the lane has claimed. */
struct asked {
    struct run run;
    bool is_awaited; /* they are not here: they are wanted, and the lane is woken when they come */
};

struct cached {
    struct lane lane; /* first: asking.ask gets a pointer to it */
    int wake_fd;      /* an eventfd: something has come that was awaited */
    uint32_t uffd_events, wake_events, stop_events;
    struct asked asked[ASKED];
    unsigned asked_count;
    struct asked ahead;   /* the page that the background waits for, if it does */
    uint64_t ahead_bytes; /* of the ring's run, from that page on */
    uint64_t ahead_since; /* ns: when it began to wait for it */
    unsigned wants_ahead; /* how often more that is wanted at once: nobody else seems to bring it */
    uint64_t again;       /* ns: when to want again what is awaited; UINT64_MAX: never */
    uint64_t placed;      /* bytes, in this step */
    bool changing;        /* the owner's memory is: its events are to be read first */
};

/* init, prepare (false: no memory, or no descriptor), then a step whenever the lane's epoll tells
 * that there is something to do, or the time to wait is over, until it has ended; clean_up. */
void pn_cached_init(struct cached *cached, const struct pn_lane_config *config, struct pn_end *end);
bool pn_cached_prepare(struct cached *cached);
void pn_cached_step(struct cached *cached);
/* ns; UINT64_MAX: until something happens. */
uint64_t pn_cached_time_to_wait(const struct cached *cached);
void pn_cached_clean_up(struct cached *cached);

#endif
