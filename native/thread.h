/* A loop in a thread of its own, as urgent as what it brings. */
#ifndef PAGENET_THREAD_H
#define PAGENET_THREAD_H
#include <stdint.h>

/* Runs loop(argument) and returns when it has: 0, or -errno if there is no thread to be had. A
 * thread of its own, because a niceness once raised cannot be taken back. background: it gives way
 * to whoever else wants to run; else it comes first. */
int pn_run_loop(int background, void (*loop)(void *), void *argument);

uint64_t pn_now(void); /* monotonic, ns */

#endif
