/* The loop that drives one connection of the destination. */
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

/* Watched by epoll rather than poll: a fault is two waits, and poll pays for each descriptor at each of them. */
static bool watch(struct lane *lane, int fd, uint32_t events, uint32_t *watched) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    bool ok = *watched == events || !epoll_ctl(lane->epoll, *watched == UNWATCHED ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
    *watched = events;
    return ok;
}

static int work_fd(const struct lane *lane) { return pn_lane_is_demand(lane) ? lane->dest->config.uffd : lane->config->work_fd; }

static bool watch_all(struct lane *lane) {
    /* As many requests are open as there may be: faults wait where they are. */
    bool full = pn_lane_is_demand(lane) && !pn_lane_can_ask(lane, 3 * EVENTS);
    return watch(lane, lane->config->sock, EPOLLIN | (lane->out_start < lane->out_end ? EPOLLOUT : 0), &lane->sock_events) &&
           watch(lane, work_fd(lane), full ? 0 : EPOLLIN, &lane->work_events) &&
           watch(lane, lane->config->stop_fd, EPOLLIN, &lane->stop_events);
}

static void act(struct lane *lane, const struct epoll_event *event) {
    if (event->data.fd == lane->config->stop_fd)
        pn_lane_end(lane, PN_END_STOPPED, 0, "");
    else if (event->data.fd != lane->config->sock && pn_lane_is_demand(lane))
        pn_lane_take_faults(lane);
    else if (event->data.fd != lane->config->sock)
        pn_drain_eventfd(lane->config->work_fd);
    else if (event->events & ~(uint32_t)EPOLLOUT)
        (pn_lane_is_demand(lane) ? pn_lane_receive_staged : pn_lane_receive_direct)(lane);
}

/* ns; UINT64_MAX: until something happens. */
static uint64_t time_to_wait(const struct lane *lane) {
    if (lane->deferred_count)
        return 0;
    uint64_t now = lane->late_count ? pn_now() : 0, due = lane->late[0].due;
    uint64_t moment = !lane->late_count ? UINT64_MAX : due > now ? due - now : 0;
    return pn_at_most(lane->pause, moment);
}

int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room) {
    uint64_t wait = time_to_wait(lane);
    if (wait == UINT64_MAX || !wait)
        return epoll_wait(lane->epoll, ready, room, wait ? -1 : 0);
    /* Milliseconds are too coarse to pace by: what is asked for at once stands in the way of what somebody waits for. */
    struct timespec time = {.tv_sec = (time_t)(wait / 1000000000), .tv_nsec = (long)(wait % 1000000000)};
    long count = syscall(SYS_epoll_pwait2, lane->epoll, ready, room, &time, NULL, 0);
    if (count < 0 && errno == ENOSYS) /* before Linux 5.11 */
        return epoll_wait(lane->epoll, ready, room, (int)(wait / 1000000) + 1);
    return (int)count;
}

static void wait_and_act(struct lane *lane) {
    struct epoll_event ready[3];
    if (!watch_all(lane)) {
        pn_lane_end(lane, PN_END_BROKEN, errno, "");
        return;
    }
    int count = pn_lane_wait(lane, ready, 3);
    for (int i = 0; i < count && !lane->ended; i++)
        act(lane, &ready[i]);
    if (lane->out_start < lane->out_end && !lane->ended)
        pn_lane_flush(lane);
    pn_lane_look_again(lane);
    if (!pn_lane_is_demand(lane) && !lane->ended)
        pn_lane_feed(lane);
}

void pn_lane_init_pace(struct lane *lane) {
    const struct pn_lane_config *config = lane->config;
    lane->pace.window_least = config->window_least;
    lane->pace.window_min = config->window_min;
    lane->pace.window_max = config->window_max;
    lane->pace.chunk = config->chunk;
    pn_pace_init(&lane->pace, &lane->dest->pace);
}

static bool prepare(struct lane *lane) {
    uint64_t page_size = lane->dest->config.max_page_size;
    lane->epoll = epoll_create1(EPOLL_CLOEXEC);
    lane->sock_events = lane->work_events = lane->stop_events = UNWATCHED;
    lane->stage_size = STAGE_BYTES > page_size ? STAGE_BYTES : page_size;
    /* The demand lane's holds headers too. Page-aligned, private and anonymous: MOVE takes pages out of it. */
    lane->stage_size += pn_lane_is_demand(lane) ? 64 << 10 : 0;
    lane->stage_room = lane->stage_size > PN_MAX_LZ4_BYTES ? lane->stage_size : PN_MAX_LZ4_BYTES;
    lane->stage = mmap(NULL, lane->stage_room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    lane->unpacked = mmap(NULL, PN_MAX_LZ4_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    lane->slots = calloc(SLOTS, sizeof *lane->slots);
    lane->free_slots = calloc(SLOTS, sizeof *lane->free_slots);
    lane->outbox = malloc(OUTBOX);
    if (lane->epoll < 0 || lane->stage == MAP_FAILED || lane->unpacked == MAP_FAILED || !lane->slots || !lane->free_slots ||
        !lane->outbox)
        return false;
    for (uint32_t i = 0; i < SLOTS; i++) {
        lane->slots[i].id = i;
        lane->free_slots[lane->free_count++] = SLOTS - 1 - i;
    }
    pn_lane_init_pace(lane);
    pn_prompt_init(&lane->prompt);
    lane->pause = UINT64_MAX;
    return true;
}

static void clean_up(struct lane *lane) {
    if (lane->epoll >= 0)
        close(lane->epoll);
    if (lane->stage != MAP_FAILED)
        munmap(lane->stage, lane->stage_room);
    if (lane->unpacked != MAP_FAILED)
        munmap(lane->unpacked, PN_MAX_LZ4_BYTES);
    free(lane->slots);
    free(lane->free_slots);
    free(lane->outbox);
}

static void loop(void *argument) {
    struct lane *lane = argument;
    while (!lane->ended)
        wait_and_act(lane);
}

void pn_lane_run(const struct pn_lane_config *config, struct pn_end *end) {
    struct lane lane = {.config = config, .dest = config->dest, .end = end, .stage = MAP_FAILED, .unpacked = MAP_FAILED};
    if (!prepare(&lane) || pn_run_loop(!pn_lane_is_demand(&lane), loop, &lane))
        pn_lane_end(&lane, PN_END_NO_MEMORY, ENOMEM, "");
    clean_up(&lane);
}
