/* Clocks, in ns. They are not in testing.h because cffi reads that, which may have no bodies of
 * functions. */
#ifndef PAGENET_TESTING_CLOCK_H
#define PAGENET_TESTING_CLOCK_H
#include <stdint.h>
#include <time.h>

static inline uint64_t clock_ns(clockid_t clock) {
    struct timespec time = {0};
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline uint64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

#endif
