/* A crew: a few threads that drive the lanes of many guests. Each lane has an epoll of its own,
 * and a thread waits by an epoll of theirs: it lets a lane act when that has something to do, or
 * when the time is over for which it would have waited. */
#define _GNU_SOURCE
#include "cached.h"
#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { READY = 64 };

/* A lane that a worker drives. */
struct member {
    struct pn_lane_config config;
    struct cached cached;
    int ended_fd;
    uint64_t due;         /* ns: when it is to act, whatever happens; UINT64_MAX: never */
    struct member *next;  /* in the inbox */
    struct member **slot; /* where the list of those with a due time has it; NULL: not there */
};

struct worker {
    struct pn_crew *crew;
    pthread_t thread;
    int epoll, wake_fd;
    pthread_mutex_t lock;
    struct member *inbox; /* under the lock */
    bool stopping;        /* under the lock */
    _Atomic uint32_t members;
    /* Those with a due time, in no order: lanes seldom have one. */
    struct member **timed;
    size_t timed_count, timed_room;
};

struct pn_crew {
    int count;
    struct worker workers[];
};

/* ---- one worker ---- */

static void untime(struct worker *worker, struct member *member) {
    if (!member->slot)
        return;
    struct member *last = worker->timed[--worker->timed_count];
    *member->slot = last;
    last->slot = member->slot;
    member->slot = NULL;
}

static bool time_it(struct worker *worker, struct member *member, uint64_t due) {
    member->due = due;
    if (due == UINT64_MAX) {
        untime(worker, member);
        return true;
    }
    if (member->slot)
        return true;
    if (worker->timed_count == worker->timed_room) {
        size_t room = worker->timed_room ? 2 * worker->timed_room : 16;
        struct member **more = realloc(worker->timed, room * sizeof *more);
        if (!more)
            return false;
        worker->timed = more;
        worker->timed_room = room;
        for (size_t i = 0; i < worker->timed_count; i++)
            more[i]->slot = &more[i];
    }
    member->slot = &worker->timed[worker->timed_count++];
    *member->slot = member;
    return true;
}

static void leave(struct worker *worker, struct member *member) {
    untime(worker, member);
    if (member->cached.lane.epoll >= 0)
        epoll_ctl(worker->epoll, EPOLL_CTL_DEL, member->cached.lane.epoll, NULL);
    pn_cached_clean_up(&member->cached);
    int ended_fd = member->ended_fd;
    free(member);
    atomic_fetch_sub(&worker->members, 1);
    /* Last: whoever reads it may take everything away. By write, as it is read by read: a sanitizer
     * then sees that one comes after the other. */
    uint64_t one = 1;
    (void)!write(ended_fd, &one, sizeof one);
}

static void act(struct worker *worker, struct member *member) {
    struct cached *cached = &member->cached;
    if (!cached->lane.ended)
        pn_cached_step(cached);
    if (!cached->lane.ended) {
        uint64_t wait = pn_cached_time_to_wait(cached);
        if (time_it(worker, member, wait == UINT64_MAX ? UINT64_MAX : pn_now() + wait))
            return;
        pn_lane_end(&cached->lane, PN_END_NO_MEMORY, ENOMEM, "");
    }
    leave(worker, member);
}

static void join(struct worker *worker, struct member *member) {
    struct lane *lane = &member->cached.lane;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = member};
    if (!pn_cached_prepare(&member->cached) ||
        epoll_ctl(worker->epoll, EPOLL_CTL_ADD, lane->epoll, &event))
        pn_lane_end(lane, PN_END_NO_MEMORY, ENOMEM, "");
    act(worker, member);
}

/* False: the crew is dismissed. */
static bool take_in(struct worker *worker) {
    pthread_mutex_lock(&worker->lock);
    struct member *member = worker->inbox;
    worker->inbox = NULL;
    bool stopping = worker->stopping;
    pthread_mutex_unlock(&worker->lock);
    while (member) {
        struct member *next = member->next;
        join(worker, member);
        member = next;
    }
    return !stopping;
}

static void act_due(struct worker *worker) {
    uint64_t now = worker->timed_count ? pn_now() : 0;
    /* From the last on: one that leaves, or is not timed any more, is replaced by the last. */
    for (size_t i = worker->timed_count; i-- > 0;)
        if (i < worker->timed_count && worker->timed[i]->due <= now)
            act(worker, worker->timed[i]);
}

static uint64_t next_due(const struct worker *worker) {
    uint64_t due = UINT64_MAX;
    for (size_t i = 0; i < worker->timed_count; i++)
        if (worker->timed[i]->due < due)
            due = worker->timed[i]->due;
    uint64_t now = due == UINT64_MAX ? 0 : pn_now();
    return due == UINT64_MAX ? due : due > now ? due - now : 0;
}

static void work(void *argument) {
    struct worker *worker = argument;
    struct epoll_event ready[READY];
    for (;;) {
        int count = pn_epoll_wait(worker->epoll, ready, READY, next_due(worker));
        bool news = false;
        for (int i = 0; i < count; i++)
            if (ready[i].data.ptr)
                act(worker, ready[i].data.ptr);
            else
                news = true;
        act_due(worker);
        if (news) {
            pn_drain_eventfd(worker->wake_fd);
            if (!take_in(worker))
                return;
        }
    }
}

/* ---- the crew ---- */

static int hire(struct worker *worker, struct pn_crew *crew) {
    worker->crew = crew;
    pthread_mutex_init(&worker->lock, NULL);
    worker->epoll = epoll_create1(EPOLL_CLOEXEC);
    worker->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (worker->epoll < 0 || worker->wake_fd < 0 ||
        epoll_ctl(worker->epoll, EPOLL_CTL_ADD, worker->wake_fd, &event))
        return -errno;
    return pn_start_loop(&worker->thread, 0, work, worker);
}

static void dismiss(struct worker *worker, bool hired) {
    if (hired) {
        pthread_mutex_lock(&worker->lock);
        worker->stopping = true;
        pthread_mutex_unlock(&worker->lock);
        eventfd_write(worker->wake_fd, 1);
        pthread_join(worker->thread, NULL);
    }
    if (worker->epoll >= 0)
        close(worker->epoll);
    if (worker->wake_fd >= 0)
        close(worker->wake_fd);
    pthread_mutex_destroy(&worker->lock);
    free(worker->timed);
}

struct pn_crew *pn_crew_new(int count) {
    struct pn_crew *crew = calloc(1, sizeof *crew + (size_t)count * sizeof crew->workers[0]);
    for (int i = 0; crew && i < count; i++) {
        struct worker *worker = &crew->workers[i];
        worker->epoll = worker->wake_fd = -1;
        int error = hire(worker, crew);
        if (error) {
            dismiss(worker, false);
            pn_crew_free(crew);
            errno = -error;
            return NULL;
        }
        crew->count++;
    }
    return crew;
}

void pn_crew_free(struct pn_crew *crew) {
    for (int i = 0; i < crew->count; i++)
        dismiss(&crew->workers[i], true);
    free(crew);
}

static struct worker *least_busy(struct pn_crew *crew) {
    struct worker *found = &crew->workers[0];
    for (int i = 1; i < crew->count; i++)
        if (atomic_load(&crew->workers[i].members) < atomic_load(&found->members))
            found = &crew->workers[i];
    return found;
}

int pn_crew_run(struct pn_crew *crew, const struct pn_lane_config *config, struct pn_end *end,
                int ended_fd) {
    struct member *member = calloc(1, sizeof *member);
    if (!member)
        return -ENOMEM;
    member->config = *config;
    member->ended_fd = ended_fd;
    pn_cached_init(&member->cached, &member->config, end);
    struct worker *worker = least_busy(crew);
    atomic_fetch_add(&worker->members, 1);
    pthread_mutex_lock(&worker->lock);
    member->next = worker->inbox;
    worker->inbox = member;
    pthread_mutex_unlock(&worker->lock);
    eventfd_write(worker->wake_fd, 1);
    return 0;
}
