#define _GNU_SOURCE
#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A thread that waits for a page, and the loop that answers it, need a CPU at once and for
 * microseconds; the background uses all that it gets. Time slices (Linux 6.12) determine how soon
 * each gives way, and niceness how much it gets where all CPUs are busy: a tenth. Measured on two
 * CPUs with the background at full speed: p99 of touch to resume, as a multiple of that with an
 * idle background, medians, with 1 thread touching and with 8:
 *
 *   the system's defaults           5.9x  4.3x
 *   slices, and a niceness of 5     4.5x  5.7x
 *   slices, and a niceness of 10    3.3x  2.3x
 *   slices, and a niceness of 19    2.9x  1.7x
 *
 * With 19, the background would stand still beside busy vCPUs.
 */
enum {
    URGENT_SLICE_NS = 100000,
    BACKGROUND_SLICE_NS = 300000,
    BACKGROUND_NICE = 10,
    MAX_NICE = 19
};

/* struct sched_attr, which old headers do not have. */
struct attributes {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime; /* of SCHED_OTHER: the slice */
    uint64_t deadline;
    uint64_t period;
};

/* A process that was given another policy (real time, idle) keeps it: there is a reason for it. */
static void set_urgency(int background) {
    struct attributes now = {.size = sizeof now};
    if (syscall(SYS_sched_getattr, 0, &now, sizeof now, 0) || now.policy != SCHED_OTHER)
        return;
    now.size = sizeof now;
    now.runtime = background ? BACKGROUND_SLICE_NS : URGENT_SLICE_NS;
    if (background)
        now.nice = now.nice + BACKGROUND_NICE < MAX_NICE ? now.nice + BACKGROUND_NICE : MAX_NICE;
    syscall(SYS_sched_setattr, 0, &now, 0); /* better with it, right without */
}

struct task {
    int background;
    void (*loop)(void *);
    void *argument;
};

static void *run(void *argument) {
    struct task task = *(struct task *)argument;
    free(argument);
    set_urgency(task.background);
    task.loop(task.argument);
    return NULL;
}

int pn_start_loop(pthread_t *thread, int background, void (*loop)(void *), void *argument) {
    struct task *task = malloc(sizeof *task);
    if (!task)
        return -ENOMEM;
    *task = (struct task){.background = background, .loop = loop, .argument = argument};
    int error = pthread_create(thread, NULL, run, task);
    if (error)
        free(task);
    return -error;
}

int pn_run_loop(int background, void (*loop)(void *), void *argument) {
    pthread_t thread;
    int error = pn_start_loop(&thread, background, loop, argument);
    if (!error)
        pthread_join(thread, NULL);
    return error;
}

uint64_t pn_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
