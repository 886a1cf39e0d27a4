/* The descriptor store of systemd (sd_notify(3), "FDSTORE"): the manager of a service keeps
 * descriptors for it, and gives them to the process that it starts in the place of one that was
 * killed. */
#ifndef PN_STORE_H
#define PN_STORE_H

#include <stdbool.h>
#include <sys/socket.h>

enum { FDS = 4 }; /* under one name, and in one message */

/* Sends the message, and descriptors with it, FDS at most. An error is not told. */
void send_with(int sock, struct msghdr *message, const int *fds, int count);

/* Whether there is a manager, and it keeps what this process sends. Call it first. */
bool store_open(void);

/* When this returns, these descriptors are kept under that name, beside those that were there. */
void store_put(const char *name, const int *fds, int count);

void store_remove(const char *name);

#endif
