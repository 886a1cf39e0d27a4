/* The loop that drives one connection of the destination, and what the other loops wait by, too. */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void pn_drain_eventfd(int fd) {
    eventfd_t value;
    (void)!eventfd_read(fd, &value);
}

/* ---- what every lane has ---- */

/* By epoll, not poll: a fault takes two waits, and each call of poll pays for each descriptor. */
bool pn_lane_watch(struct lane *lane, int fd, uint32_t events, uint32_t *watched) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    bool is_new = *watched == UNWATCHED;
    if (*watched == events)
        return true;
    *watched = events;
    return !epoll_ctl(lane->epoll, is_new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
}

uint64_t pn_lane_time_to_wait(const struct lane *lane) {
    if (lane->faults.deferred_count || lane->sock.pending)
        return 0;
    uint64_t now = lane->faults.late_count ? pn_now() : 0, due = lane->faults.late[0].due;
    uint64_t moment = !lane->faults.late_count ? UINT64_MAX : due > now ? due - now : 0;
    return pn_at_most(lane->pause, moment);
}

int pn_epoll_wait(int epoll, struct epoll_event *ready, int room, uint64_t wait) {
    if (wait == UINT64_MAX || !wait)
        return epoll_wait(epoll, ready, room, wait ? -1 : 0);
    /* Milliseconds are too coarse to pace by: what is asked for at once delays what a thread waits
     * for. */
    struct timespec time = {.tv_sec = (time_t)(wait / 1000000000),
                            .tv_nsec = (long)(wait % 1000000000)};
    long count = syscall(SYS_epoll_pwait2, epoll, ready, room, &time, NULL, 0);
    if (count < 0 && errno == ENOSYS) /* before Linux 5.11 */
        return epoll_wait(epoll, ready, room, (int)(wait / 1000000) + 1);
    return (int)count;
}

int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room) {
    return pn_epoll_wait(lane->epoll, ready, room, pn_lane_time_to_wait(lane));
}

static void init_pace(struct lane *lane) {
    const struct pn_lane_config *config = lane->config;
    lane->pace.window_least = config->window_least;
    lane->pace.window_min = config->window_min;
    lane->pace.window_max = config->window_max;
    lane->pace.chunk = config->chunk;
    pn_pace_init(&lane->pace, &lane->dest->pace);
}

bool pn_lane_prepare(struct lane *lane) {
    lane->epoll = epoll_create1(EPOLL_CLOEXEC);
    lane->outbox = lane->config->cache ? NULL : malloc(OUTBOX);
    lane->sock_events = lane->work_events = lane->wanted_events = UNWATCHED;
    lane->pause = UINT64_MAX;
    init_pace(lane);
    return lane->epoll >= 0 && (lane->outbox || lane->config->cache);
}

void pn_lane_clean_up(struct lane *lane) {
    if (lane->pace.shared)
        pn_pace_end(&lane->pace);
    if (lane->epoll >= 0)
        close(lane->epoll);
    free(lane->outbox);
}

/* ---- a lane over a socket ---- */

static int work_fd(const struct stream *stream) {
    return pn_stream_is_demand(stream) ? stream->lane.dest->config.uffd
                                       : stream->lane.config->work_fd;
}

/* There is no source to ask, now. */
static bool is_away(const struct lane *lane) { return lane->config->sock < 0; }

static bool watch_all(struct stream *stream) {
    struct lane *lane = &stream->lane;
    uint32_t out = lane->out_start < lane->out_end ? EPOLLOUT : 0;
    /* No more requests can be opened: the faults stay in the uffd until then. */
    bool full = pn_stream_is_demand(stream) && !pn_lane_has_faults_room(lane);
    return (is_away(lane) ||
            pn_lane_watch(lane, lane->config->sock, EPOLLIN | out, &lane->sock_events)) &&
           pn_lane_watch(lane, work_fd(stream), full ? 0 : EPOLLIN, &lane->work_events) &&
           (!pn_stream_is_demand(stream) || pn_lane_watch_wanted(lane, full)) &&
           pn_lane_watch(lane, lane->config->stop_fd, EPOLLIN, &stream->stop_events);
}

static void receive(struct stream *stream) {
    (pn_stream_is_demand(stream) ? pn_stream_receive_staged : pn_stream_receive_direct)(stream);
}

static void act(struct stream *stream, const struct epoll_event *event) {
    struct lane *lane = &stream->lane;
    if (event->data.fd == lane->config->stop_fd)
        pn_lane_end(lane, PN_END_STOPPED, 0, "");
    else if (event->data.fd == lane->dest->config.uffd)
        pn_lane_act_on_uffd(lane, event->events);
    else if (pn_lane_is_wanted_fd(lane, event->data.fd))
        pn_lane_take_wanted(lane);
    else if (event->data.fd != lane->config->sock)
        pn_drain_eventfd(lane->config->work_fd);
    else if (event->events & ~(uint32_t)EPOLLOUT && !lane->sock.pending)
        receive(stream);
}

static void act_on_all(struct stream *stream, const struct epoll_event *ready, int count) {
    struct lane *lane = &stream->lane;
    for (int i = 0; i < count && !lane->ended; i++)
        act(stream, &ready[i]);
    if (lane->sock.pending && !lane->ended)
        receive(stream);
    if (lane->out_start < lane->out_end && !lane->ended)
        pn_lane_flush(lane);
    pn_lane_look_again(lane);
    if (!pn_stream_is_demand(stream) && !lane->ended)
        pn_stream_feed(stream);
}

static void watch(struct stream *stream) {
    if (!watch_all(stream))
        pn_lane_end(&stream->lane, PN_END_BROKEN, errno, "");
}

static void step(struct stream *stream) {
    struct lane *lane = &stream->lane;
    struct epoll_event ready[4];
    watch(stream);
    if (!lane->ended)
        act_on_all(stream, ready, pn_lane_wait(lane, ready, 4));
}

static const struct asking requests = {pn_stream_ask, pn_stream_can_ask};

/* While the source is away, pages that threads touch are claimed all the same, so that nothing else
 * has to know. Whoever meets the source again makes them MISSING before lanes run again. */
static void ask_nobody(struct lane *lane, const struct run *run) { (void)lane, (void)run; }

static bool can_ask_nobody(struct lane *lane, uint32_t runs) {
    (void)lane, (void)runs;
    return true;
}

static const struct asking nobody = {ask_nobody, can_ask_nobody};

static bool prepare_stage(struct stream *stream) {
    uint64_t page_size = stream->lane.dest->config.max_page_size;
    uint64_t size = STAGE_BYTES > page_size ? STAGE_BYTES : page_size;
    /* The demand lane's stage has room for headers too. It is page-aligned, private and anonymous:
     * MOVE takes pages out of it. */
    stream->stage_size = size + (pn_stream_is_demand(stream) ? 64 << 10 : 0);
    stream->stage_room =
        stream->stage_size > PN_MAX_LZ4_BYTES ? stream->stage_size : PN_MAX_LZ4_BYTES;
    stream->stage =
        mmap(NULL, stream->stage_room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stream->unpacked =
        mmap(NULL, PN_MAX_LZ4_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return stream->stage != MAP_FAILED && stream->unpacked != MAP_FAILED;
}

static bool prepare_slots(struct stream *stream) {
    stream->slots = calloc(SLOTS, sizeof *stream->slots);
    stream->free_slots = calloc(SLOTS, sizeof *stream->free_slots);
    if (!stream->slots || !stream->free_slots)
        return false;
    for (uint32_t i = 0; i < SLOTS; i++) {
        stream->slots[i].id = i;
        stream->free_slots[stream->free_count++] = SLOTS - 1 - i;
    }
    return true;
}

static bool prepare(struct stream *stream) {
    stream->stop_events = UNWATCHED;
    pn_demand_choice_init(&stream->choice);
    return pn_lane_prepare(&stream->lane) && prepare_stage(stream) && prepare_slots(stream);
}

static void begin(struct stream *stream) {
    struct lane *lane = &stream->lane;
    if (is_away(lane)) {
        lane->faults.asking = &nobody;
        lane->pace.demand.in_flight = UINT64_MAX; /* so nothing is prefetched */
    } else if (pn_stream_is_demand(stream)) {
        lane->faults.asking = &requests;
        pn_lane_ask_waiting(lane);
    }
}

static void clean_up(struct stream *stream) {
    pn_lane_clean_up(&stream->lane);
    if (stream->stage != MAP_FAILED)
        munmap(stream->stage, stream->stage_room);
    if (stream->unpacked != MAP_FAILED)
        munmap(stream->unpacked, PN_MAX_LZ4_BYTES);
    free(stream->slots);
    free(stream->free_slots);
}

static void loop(void *argument) {
    struct stream *stream = argument;
    begin(stream);
    while (!stream->lane.ended)
        step(stream);
}

void pn_lane_run(const struct pn_lane_config *config, struct pn_end *end) {
    struct stream stream = {
        .lane = {.config = config,
                 .dest = config->dest,
                 .end = end,
                 .sock = {.fd = config->sock, .tls = config->tls, .pending = config->tls},
                 .epoll = -1},
        .stage = MAP_FAILED,
        .unpacked = MAP_FAILED,
    };
    if (!prepare(&stream) || pn_run_loop(!pn_stream_is_demand(&stream), loop, &stream))
        pn_lane_end(&stream.lane, PN_END_NO_MEMORY, ENOMEM, "");
    clean_up(&stream);
}
