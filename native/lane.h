/* The inside of a destination's lanes: what all of them share (faults, what the background asks for
 * next, placing), and a lane over a socket. One over RDMA is in rdma.c. */
#ifndef PAGENET_LANE_H
#define PAGENET_LANE_H
#include "dest.h"
#include "wire.h"

struct epoll_event;

/* The map may be in a file that the owner has, too. */
#define PN_WROTE                                                                                   \
    "the owner has written to the map of its pages: page %llu is in no state that it can be in"

#define UNWATCHED 0xffffffffu /* no event mask of epoll's */

enum {
    SLOTS = 4096,        /* requests open at once; three a fault, 64 faults a read */
    OUTBOX = SLOTS * 24, /* room for each of them */
    STAGE_BYTES = 128
        << 10, /* received before it is placed: small enough to be in the cache still */
    EVENTS = 64,
    RING = sizeof((struct pn_ring *)0)->first / sizeof(uint64_t),
    LATE = 256,
};

struct slot {
    uint32_t id;
    uint8_t class_;
    uint8_t open;
    uint8_t packs;      /* asked for compressed */
    uint64_t next, end; /* pages on the wire, still to come */
    uint64_t since;     /* ns */
    const struct pn_piece *piece;
};

/* The reply whose payload is coming in. */
struct current {
    struct slot *slot;
    uint8_t class_;
    bool failed;           /* what comes is not pages, but the reason why there are none */
    uint32_t packed;       /* bytes in which they come compressed, 0: as they are */
    uint64_t first, count; /* pages of ours, still to come */
};

/* A page that somebody waits for, and that the background has asked for. */
struct late {
    uint64_t page, due; /* ns: then it is asked for again */
};

/* Pages of one piece that are asked for, or have come, in a class. */
struct run {
    const struct pn_piece *piece;
    uint64_t first, count;
    uint8_t class_;
};

struct lane;

/* How a loop that reads the uffd asks for what faults want. */
struct asking {
    /* Claimed by the caller; can_ask has said that there is room. */
    void (*ask)(struct lane *lane, const struct run *run);
    /* Whether so many runs can be asked for now. */
    bool (*can_ask)(struct lane *lane, uint32_t runs);
};

/* Faults that are not answered yet. */
struct faults {
    const struct asking *asking; /* NULL: another loop reads the uffd */
    /* On pages that are in place: the owner's memory is changing. */
    struct pn_event deferred[EVENTS];
    int deferred_count;
    struct late late[LATE]; /* in the order in which they are due */
    int late_count;
};

/* What every loop of a destination has, however its pages come. */
struct lane {
    const struct pn_lane_config *config;
    struct pn_dest *dest;
    struct pn_end *end;
    bool ended;
    uint8_t *outbox;
    size_t out_start, out_end;
    int epoll;
    uint32_t sock_events, work_events; /* what epoll watches for */
    struct pn_pace pace;
    uint64_t pause; /* ns until the background may ask again; UINT64_MAX: until something happens */
    struct faults faults;
};

/* A lane whose pages come by request and reply, over one socket. */
struct stream {
    struct lane lane; /* first: what asks gets this */
    struct slot *slots;
    uint32_t *free_slots, free_count;
    uint32_t stop_events;
    struct pn_demand_choice choice; /* demand */
    /* receiving: `have` bytes of the header, or of the piece of payload that goes to `target` */
    struct pn_reply header;
    struct current current;
    uint8_t *stage, *unpacked;
    size_t stage_size, stage_room, have;
    uint64_t piece_count; /* pages in the piece under way, 0: none */
    bool piece_taken;     /* they are PLACING, and go straight into the second mapping */
};

static inline void pn_lane_count(struct lane *lane, int class_, int counter, uint64_t amount) {
    pn_stats_add(lane->dest->config.map, class_, counter, amount);
}

static inline uint64_t pn_at_most(uint64_t value, uint64_t limit) {
    return value < limit ? value : limit;
}

/* ---- lane.c: how a lane ends, and what it sends ---- */

/* What this lane is about to end with, unless it has a reason to end already. */
void pn_lane_end(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...);
/* With why pages could not be put into place, as -errno. */
void pn_lane_end_placing(struct lane *lane, int error);
/* Send what is in the outbox, as far as the socket takes it. */
void pn_lane_flush(struct lane *lane);
/* Room in the outbox for `size` bytes. */
bool pn_lane_has_room(struct lane *lane, size_t size);
/* The request for pages of one piece, claimed by the caller. There is a free slot. */
void pn_stream_ask(struct lane *lane, const struct run *run);
/* Whether so many requests can be asked now. */
bool pn_stream_can_ask(struct lane *lane, uint32_t requests);
/* Whether it serves faults, and not the background. */
static inline bool pn_stream_is_demand(const struct stream *stream) {
    return !stream->lane.config->ring;
}
/* Whether it is for us to say what comes compressed. */
static inline bool pn_stream_may_choose(const struct stream *stream) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return pn_stream_is_demand(stream) && (stream->lane.dest->config.encodings & both) == both;
}

/* ---- faults.c ---- */

/* Read the uffd, and ask for what is missing: false, if it had nothing to say. */
bool pn_lane_take_faults(struct lane *lane);
/* Ask for what the window wants, as far as there is room for it in flight. */
void pn_lane_prefetch_more(struct lane *lane);
/* Answer faults again that had to wait for the owner's memory to stand still, and ask for pages
 * that should have come by now. */
void pn_lane_look_again(struct lane *lane);

/* ---- feed.c: what the background asks for ---- */

/* Before the background asks: see pn_pace_look. */
void pn_lane_look(struct lane *lane);
/* What of the ring is to be asked for next, as far as the window goes. False: nothing can be asked
 * for now. */
bool pn_lane_find_next(struct lane *lane, struct run *next);
/* As much of it as the rate allows is claimed, which may be nothing: somebody else has taken it
 * since it was found. False: the rate allows nothing now. */
bool pn_lane_claim_next(struct lane *lane, struct run *next);
/* So many pages of the ring's first run are done with. */
void pn_lane_go_past(struct lane *lane, uint64_t pages);
/* A background lane asks for what the ring has, as far as its window goes. */
void pn_stream_feed(struct stream *stream);

/* ---- replies.c: what came ---- */

/* Pages that came (NULL: as zeros): those that are wanted are placed, the rest is dropped. */
void pn_lane_place(struct lane *lane, const struct run *run, const void *bytes);
/* Pages that the caller took before they came, into the memory behind the second mapping. */
void pn_lane_put(struct lane *lane, const struct run *run);
/* Demand: read replies into the stage, several at a time, and place them. */
void pn_stream_receive_staged(struct stream *stream);
/* Background: read a reply to where its pages belong, or through the stage. */
void pn_stream_receive_direct(struct stream *stream);

/* ---- loop.c ---- */

/* config and dest are set; windows are as configured, and nothing is in flight. False: no memory,
 * or no descriptor. */
bool pn_lane_prepare(struct lane *lane);
void pn_lane_clean_up(struct lane *lane);
/* Watched by epoll for these events, of which *watched has kept what they were. */
bool pn_lane_watch(struct lane *lane, int fd, uint32_t events, uint32_t *watched);
/* epoll_wait, until something happens or the lane's pause is over. */
int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room);
void pn_drain_eventfd(int fd);

/* ---- ring.c ---- */

/* The run at the ring's head is done with. */
void pn_ring_took(struct pn_ring *ring, int room_fd);

#endif
