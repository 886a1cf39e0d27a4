/* The inside of a destination's lanes: what all of them share (faults, what the background asks for
 * next, placing), and a lane over a socket. The lanes over RDMA are in rdma.c. */
#ifndef PAGENET_LANE_H
#define PAGENET_LANE_H
#include "dest.h"
#include "sock.h"
#include "wire.h"

struct epoll_event;

/* The map may be in a file that the owner has too, and can write to. */
#define PN_WROTE                                                                                   \
    "the owner has written to the map of its pages: page %llu is in no state that it can be in"

#define UNWATCHED 0xffffffffu /* not an event mask of epoll */

enum {
    SLOTS = 4096,        /* requests open at once: three a fault, 64 faults a read */
    OUTBOX = SLOTS * 24, /* room for a request in each slot */
    /* Received before it is placed: small enough to be in the cache still. */
    STAGE_BYTES = 128 << 10,
    EVENTS = 64,
    RING = sizeof((struct pn_ring *)0)->first / sizeof(uint64_t),
    LATE = 256,
};

struct slot {
    uint32_t id;
    uint8_t class_;
    uint8_t open;
    uint8_t packs;      /* asked for compressed */
    uint64_t next, end; /* pages still to come, as numbered on the wire */
    uint64_t since;     /* ns */
    const struct pn_piece *piece;
};

/* The reply whose payload is coming in. */
struct current {
    struct slot *slot;
    uint8_t class_;
    bool failed;           /* the payload is the reason why there are no pages */
    uint32_t packed;       /* bytes of the payload if compressed; 0: it is not */
    uint64_t first, count; /* pages still to come, as numbered here */
};

/* A page that a thread waits for, and that the background has asked for. */
struct late {
    uint64_t page, due; /* ns: the moment to ask for it again */
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
    /* The caller has claimed the pages, and can_ask has returned true. */
    void (*ask)(struct lane *lane, const struct run *run);
    /* Whether `runs` runs can be asked for now. */
    bool (*can_ask)(struct lane *lane, uint32_t runs);
};

/* Faults that are not answered yet. */
struct faults {
    const struct asking *asking; /* NULL: another loop reads the uffd */
    /* Faults on pages that are in place, or outside all pieces. They wait because the owner's
     * memory is changing. */
    struct pn_event deferred[EVENTS];
    int deferred_count;
    struct late late[LATE]; /* in the order in which they are due */
    int late_count;
};

/* What every loop of a destination has, over a socket or over RDMA. */
struct lane {
    const struct pn_lane_config *config;
    struct pn_dest *dest;
    struct pn_end *end;
    bool ended;
    struct sock sock;
    uint8_t *outbox;
    size_t out_start, out_end;
    int epoll;
    uint32_t sock_events, work_events, wanted_events; /* what epoll watches for */
    struct pn_pace pace;
    uint64_t pause; /* ns until the background may ask again; UINT64_MAX: until something happens */
    struct faults faults;
};

/* A lane whose pages come by request and reply, over one socket. */
struct stream {
    struct lane lane; /* first: asking.ask gets a pointer to it */
    struct slot *slots;
    uint32_t *free_slots, free_count;
    uint32_t stop_events;
    struct pn_demand_choice choice; /* demand */
    /* Receiving: `have` bytes of the header, or of the piece of payload at hand, have come. */
    struct pn_reply header;
    struct current current;
    uint8_t *stage, *unpacked;
    size_t stage_size, stage_room, have;
    uint64_t piece_count; /* pages in the piece being received; 0: none */
    bool piece_taken;     /* they are PLACING, and are received into the second mapping */
};

static inline void pn_lane_count(struct lane *lane, int class_, int counter, uint64_t amount) {
    pn_stats_add(lane->dest->config.map, class_, counter, amount);
}

static inline uint64_t pn_at_most(uint64_t value, uint64_t limit) {
    return value < limit ? value : limit;
}

/* ---- lane.c: how a lane ends, and what it sends ---- */

/* Ends the lane for this reason, unless it has a reason already. */
void pn_lane_end(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...);
/* Ends the lane because pages could not be put into place. error: why, as -errno. */
void pn_lane_end_placing(struct lane *lane, int error);
/* Ends the lane because receiving or sending has failed, with errno; does nothing where the socket
 * was only not ready. */
void pn_lane_end_socket(struct lane *lane);
/* Sends what is in the outbox, as far as the socket takes it. */
void pn_lane_flush(struct lane *lane);
/* Makes room in the outbox for `size` bytes. False: there is none now. */
bool pn_lane_has_room(struct lane *lane, size_t size);
/* Puts the request for the run's pages into the outbox. The caller has claimed them, and there are
 * a free slot and room. */
void pn_stream_ask(struct lane *lane, const struct run *run);
/* Whether there are slots and room for `requests` requests now. */
bool pn_stream_can_ask(struct lane *lane, uint32_t requests);
/* Whether the lane serves faults, and not the background. */
static inline bool pn_stream_is_demand(const struct stream *stream) {
    return !stream->lane.config->ring;
}
/* Whether the lane, and not the source, decides what comes compressed. */
static inline bool pn_stream_may_choose(const struct stream *stream) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return pn_stream_is_demand(stream) && (stream->lane.dest->config.encodings & both) == both;
}

/* ---- faults.c ---- */

/* Reads the uffd, and asks for what is missing. False: there was no event. */
bool pn_lane_take_faults(struct lane *lane);
/* The same, once epoll has said of the uffd that it is `ready`. Ends the lane if the owner has made
 * it blocking: poll reports an error of such a one, for ever. */
void pn_lane_act_on_uffd(struct lane *lane, uint32_t ready);
/* Asks for the pages that guests of the cache want which this transfer fills. */
void pn_lane_take_wanted(struct lane *lane);
/* Whether all that the events of one read may want can be asked for. */
bool pn_lane_has_faults_room(struct lane *lane);
/* Has epoll watch for what guests want of the cache that is filled, if one is, and (full) there is
 * room to ask for it. */
bool pn_lane_watch_wanted(struct lane *lane, bool full);
/* Whether the descriptor tells what guests want. */
bool pn_lane_is_wanted_fd(const struct lane *lane, int fd);
/* Asks for what the window wants, as far as there is room for it in flight. */
void pn_lane_prefetch_more(struct lane *lane);
/* Asks for the pages that threads have waited for since before this lane began, the longest wait
 * first. */
void pn_lane_ask_waiting(struct lane *lane);
/* Answers faults that had to wait until the owner's memory stopped changing, and asks again for
 * pages that should have come by now. */
void pn_lane_look_again(struct lane *lane);

/* ---- feed.c: what the background asks for ---- */

/* To be called before the background asks: see pn_pace_look. */
void pn_lane_look(struct lane *lane);
/* Finds what of the ring is to be asked for next, as far as the window goes. False: nothing can be
 * asked for now. */
bool pn_lane_find_next(struct lane *lane, struct run *next);
/* Claims as much of it as the rate allows, which may be nothing if another lane has taken it since
 * it was found. False: the rate allows nothing now. */
bool pn_lane_claim_next(struct lane *lane, struct run *next);
/* Goes past `pages` pages of the ring's first run, which are done with. */
void pn_lane_go_past(struct lane *lane, uint64_t pages);
/* Asks for what the ring has, as far as the window of this background lane goes. */
void pn_stream_feed(struct stream *stream);

/* ---- replies.c: what came ---- */

/* Places those of a run's pages that are wanted, and drops the rest. bytes: what came; NULL:
 * zeros. */
void pn_lane_place(struct lane *lane, const struct run *run, const void *bytes);
/* Puts pages into place that the caller took before they came into the memory behind the second
 * mapping. */
void pn_lane_put(struct lane *lane, const struct run *run);
/* Demand: reads replies into the stage, several at a time, and places them. */
void pn_stream_receive_staged(struct stream *stream);
/* Background: reads a reply to where its pages belong, or through the stage. */
void pn_stream_receive_direct(struct stream *stream);

/* ---- loop.c ---- */

/* Prepares a lane whose config and dest are set: with the windows of config, and nothing in flight.
 * False: no memory, or no descriptor. */
bool pn_lane_prepare(struct lane *lane);
void pn_lane_clean_up(struct lane *lane);
/* Has epoll watch the descriptor for these events. *watched is what it was watched for until now,
 * and is updated. */
bool pn_lane_watch(struct lane *lane, int fd, uint32_t events, uint32_t *watched);
/* How many ns the lane may wait; UINT64_MAX: until something happens. */
uint64_t pn_lane_time_to_wait(const struct lane *lane);
/* epoll_wait, for so many ns. */
int pn_epoll_wait(int epoll, struct epoll_event *ready, int room, uint64_t wait);
/* epoll_wait, until something happens, the lane's pause is over, or it has faults to look at
 * again. */
int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room);
void pn_drain_eventfd(int fd);

/* ---- ring.c ---- */

/* Takes off the run at the ring's head, which is done with. */
void pn_ring_took(struct pn_ring *ring, int room_fd);

#endif
