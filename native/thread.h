/* A loop in a thread of its own, with the urgency of what it brings. */
#ifndef PAGENET_THREAD_H
#define PAGENET_THREAD_H
#include <pthread.h>
#include <stdint.h>

/* Runs loop(argument) in a thread of its own, because a niceness once raised cannot be taken back.
 * Returns when the loop has returned: 0, or -errno if no thread could be started. background: the
 * thread gives way to others that want to run; else it comes first. */
int pn_run_loop(int background, void (*loop)(void *), void *argument);
/* The same, but does not wait for it: join the thread. */
int pn_start_loop(pthread_t *thread, int background, void (*loop)(void *), void *argument);

uint64_t pn_now(void); /* monotonic, ns */

#endif
