/* Firecracker's UFFD handshake, from the owner's side. */
#ifndef PAGENET_TESTING_HANDSHAKE_H
#define PAGENET_TESTING_HANDSHAKE_H
#include <stddef.h>

/* A stream connected to the unix socket `path`, or -errno. */
int connect_to(const char *path);
/* One message, with these descriptors (3 at most): they travel with bytes, and the handler expects
 * them with the first. 0 or -errno; -EPIPE: not all of it was taken. */
int send_with(int sock, const char *text, const int *fds, size_t count);
/* Asks the handler for the file of its cache. A descriptor or -errno. */
int want_file(int sock);

#endif
