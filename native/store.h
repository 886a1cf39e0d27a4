/* The descriptor store of systemd (sd_notify(3), "FDSTORE"): the manager of a service keeps
 * descriptors for it, and gives them to the process that it starts in the place of one that was
 * killed. */
#ifndef PN_STORE_H
#define PN_STORE_H

#include <stdbool.h>

/* Whether there is a manager, and it keeps what this process sends. Call it first. */
bool store_open(void);

/* When this returns, these descriptors are kept under that name, beside those that were there. */
void store_put(const char *name, const int *fds, int count);

void store_remove(const char *name);

#endif
