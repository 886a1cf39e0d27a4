/* The inside of a destination's lane, for lanes that bring their pages in another way: what they share is how faults are read
 * and how pages are placed. */
#ifndef PAGENET_LANE_H
#define PAGENET_LANE_H
#include "dest.h"
#include "wire.h"

struct epoll_event;

/* The map may be in a file that the owner has, too. */
#define PN_WROTE "the owner has written to the map of its pages: page %llu is in no state that it can be in"

#define UNWATCHED 0xffffffffu /* no event mask of epoll's */

enum {
    SLOTS = 4096,           /* requests open at once; three a fault, 64 faults a read */
    OUTBOX = SLOTS * 24,    /* room for each of them */
    STAGE_BYTES = 128 << 10, /* received before it is placed: small enough to be in the cache still */
    EVENTS = 64,
    RING = sizeof((struct pn_ring *)0)->first / sizeof(uint64_t),
    LATE = 256,
};

struct slot {
    uint32_t id;
    uint8_t class_;
    uint8_t open;
    uint8_t packs; /* asked for compressed */
    uint64_t next, end; /* pages on the wire, still to come */
    uint64_t since;     /* ns */
    const struct pn_piece *piece;
};

/* The reply whose payload is coming in. */
struct current {
    struct slot *slot;
    uint8_t class_;
    bool failed; /* what comes is not pages, but the reason why there are none */
    uint32_t packed; /* bytes in which they come compressed, 0: as they are */
    uint64_t first, count; /* pages of ours, still to come */
};

/* A page that somebody waits for, and that the background has asked for. */
struct late {
    uint64_t page, due; /* ns: then it is asked for again */
};

struct lane {
    const struct pn_lane_config *config;
    struct pn_dest *dest;
    struct pn_end *end;
    struct slot *slots;
    uint32_t *free_slots, free_count;
    uint8_t *outbox;
    size_t out_start, out_end;
    int epoll;
    uint32_t sock_events, work_events, stop_events; /* what epoll watches for */
    struct pn_pace pace;
    struct pn_prompt prompt; /* demand */
    uint64_t pause; /* ns until the background may ask again; UINT64_MAX: until something happens */
    /* receiving: `have` bytes of the header, or of the piece of payload that goes to `target` */
    struct pn_reply header;
    struct current current;
    uint8_t *stage, *unpacked;
    size_t stage_size, stage_room, have;
    uint64_t piece_count; /* pages in the piece under way, 0: none */
    bool piece_taken;     /* they are PLACING, and go straight into the second mapping */
    struct pn_event deferred[EVENTS]; /* faults on pages that are in place, not answered yet: the owner's memory is changing */
    int deferred_count;
    struct late late[LATE]; /* in the order in which they are due */
    int late_count;
    bool ended;
    /* Lanes that do not ask by request and reply: instead of ask() and can_ask(). */
    void (*ask)(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages);
    bool (*can_ask)(struct lane *lane, uint32_t requests);
};

static inline bool pn_lane_is_demand(const struct lane *lane) { return !lane->config->ring; }

static inline void pn_lane_count(struct lane *lane, int class_, int counter, uint64_t amount) {
    pn_stats_add(lane->dest->config.map, class_, counter, amount);
}

static inline uint64_t pn_at_most(uint64_t value, uint64_t limit) { return value < limit ? value : limit; }

/* Whether it is for us to say. */
static inline bool pn_lane_may_choose(const struct lane *lane) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return pn_lane_is_demand(lane) && (lane->dest->config.encodings & both) == both;
}

/* Ask for pages of one piece, claimed by the caller. pn_lane_can_ask has said that there is room. */
void pn_lane_ask(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages);
/* Whether so many requests can be asked now. */
bool pn_lane_can_ask(struct lane *lane, uint32_t requests);
/* Ask for what the window wants, as far as there is room for it in flight. */
void pn_lane_prefetch_more(struct lane *lane);
/* A background lane asks for what the ring has, as far as its window goes. */
void pn_lane_feed(struct lane *lane);
/* Demand: read replies into the stage, several at a time, and place them. */
void pn_lane_receive_staged(struct lane *lane);
/* Background: read a reply to where its pages belong, or through the stage. */
void pn_lane_receive_direct(struct lane *lane);
/* What this lane is about to end with, unless it has a reason to end already. */
void pn_lane_end(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...);
/* With why pages could not be put into place, as -errno. */
void pn_lane_end_placing(struct lane *lane, int error);
/* Send what is in the outbox, as far as the socket takes it. */
void pn_lane_flush(struct lane *lane);
/* Room in the outbox for `size` bytes. */
bool pn_lane_has_room(struct lane *lane, size_t size);
/* Read the uffd, and ask for what is missing: false, if it had nothing to say. */
bool pn_lane_take_faults(struct lane *lane);
/* Answer faults again that had to wait for the owner's memory to stand still, and ask for pages that should have come by now. */
void pn_lane_look_again(struct lane *lane);
/* Pages of one piece that came (NULL: as zeros): those that are wanted are placed, the rest is dropped. */
void pn_lane_place(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages, const void *bytes);
/* The same of pages that the caller took before they came, into the memory behind the second mapping. */
void pn_lane_put(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages);
/* The lane's windows are as configured, and nothing is in flight. */
void pn_lane_init_pace(struct lane *lane);
/* Before the background asks: see pn_pace_look. */
void pn_lane_look(struct lane *lane);
/* epoll_wait, until something happens or the lane's pause is over. */
int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room);
void pn_drain_eventfd(int fd);
/* The run at the ring's head is done with. */
void pn_ring_took(struct pn_ring *ring, int room_fd);

#endif
