#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "store.h"

enum {
    BARRIER_MS = 2000,
};

static struct sockaddr_un manager;
static socklen_t manager_size;

void send_with(int sock, struct msghdr *message, const int *fds, int count) {
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(FDS * sizeof(int))];
    } control = {0};
    if (count) {
        message->msg_control = &control;
        message->msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(rights), fds, (size_t)count * sizeof(int));
    }
    (void)!sendmsg(sock, message, MSG_NOSIGNAL);
}

static void tell(const char *words, const int *fds, int count) {
    struct iovec part = {(void *)words, strlen(words)};
    struct msghdr message = {
        .msg_name = &manager, .msg_namelen = manager_size, .msg_iov = &part, .msg_iovlen = 1};
    int sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return;
    send_with(sock, &message, fds, count);
    close(sock);
}

static bool is_hung_up(int fd, int patience_ms) {
    struct pollfd watched = {.fd = fd};
    return poll(&watched, 1, patience_ms) > 0;
}

/* Returns when the manager has acted on what was sent before: it closes the pipe then. */
static void wait_barrier(void) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return;
    tell("BARRIER=1", &ends[1], 1);
    close(ends[1]);
    is_hung_up(ends[0], BARRIER_MS);
    close(ends[0]);
}

/* The manager answers nothing. But what it does not keep, it closes, and the other end of a socket
 * tells. */
static bool is_kept(void) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        return false;
    tell("FDSTORE=1\nFDNAME=probe", &ends[1], 1);
    close(ends[1]);
    wait_barrier();
    bool kept = !is_hung_up(ends[0], 0);
    store_remove("probe");
    close(ends[0]);
    return kept;
}

bool store_open(void) {
    const char *path = getenv("NOTIFY_SOCKET");
    size_t size = path ? strlen(path) : 0;
    if (!size || size >= sizeof manager.sun_path || (path[0] != '/' && path[0] != '@'))
        return false;
    manager.sun_family = AF_UNIX;
    memcpy(manager.sun_path, path, size);
    if (path[0] == '@')
        manager.sun_path[0] = 0;
    manager_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size);
    return is_kept();
}

void store_put(const char *name, const int *fds, int count) {
    char words[128];
    /* FDPOLL=0: an owner may close its end of the connection; what it has sent is in there still */
    snprintf(words, sizeof words, "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", name);
    tell(words, fds, count);
    wait_barrier();
}

void store_remove(const char *name) {
    char words[128];
    snprintf(words, sizeof words, "FDSTOREREMOVE=1\nFDNAME=%s", name);
    tell(words, NULL, 0);
}
