/* The guard: a small program that outlives a daemon which is killed. It holds descriptors for the
 * daemon, accepts the connection of an owner for it, and starts it again.
 *
 * Where systemd has started the daemon and keeps descriptors for it (store.h), systemd starts it
 * again. The guard then puts into the store whatever it holds, and ends if the daemon dies. It
 * still accepts: if the daemon did, it could be killed before the connection is in the store.
 *
 * It talks with the daemon over a SOCK_SEQPACKET socket, descriptor 3. The first byte of a message
 * says what it is; pagenet/guard/ is the other side. Every request is answered, in order.
 *
 *   H NAME \0        hold the descriptors that come along under NAME, instead of those before
 *   F NAME \0        let them go
 *   G NAME \0        send them (D), if there are any
 *   A                accept one connection on what is held as "listener", hold it as "owner", and
 *                    answer when it has come; another request ends the wait
 *   C [ARG \0]...    from now on, start this command if the daemon dies; none: end then
 *   Q                the daemon ends in good order: end
 *
 * The first answer comes unasked, and says who starts the daemon again: K, the guard; S, systemd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "store.h"

enum {
    DAEMON = 3, /* the descriptor of the socket, here and in a daemon that is started again */
    SLOTS = 8,
    FDS = 4, /* of one slot */
    NAME = 32,
    MESSAGE = 64 << 10,
    ARGS = 1024,
};

struct slot {
    char name[NAME]; /* empty: free */
    int fds[FDS];
    int count;
};

static struct slot slots[SLOTS];
static char command[MESSAGE];
static size_t command_size;
static bool accepting;
static bool storing; /* what is held is in systemd's store too */

/* ---- what is held ---- */

static struct slot *find(const char *name) {
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].name[0] && !strncmp(slots[i].name, name, NAME))
            return &slots[i];
    return NULL;
}

static void let_go(const char *name) {
    struct slot *slot = find(name);
    for (int i = 0; slot && i < slot->count; i++)
        close(slot->fds[i]);
    if (slot && storing)
        store_remove(slot->name);
    if (slot)
        memset(slot, 0, sizeof *slot);
}

static bool hold(const char *name, const int *fds, int count) {
    let_go(name);
    struct slot *slot = NULL;
    for (int i = 0; i < SLOTS && !slot; i++)
        if (!slots[i].name[0])
            slot = &slots[i];
    if (!slot || !name[0] || count > FDS)
        return false;
    memcpy(slot->name, name, strnlen(name, NAME - 1));
    memcpy(slot->fds, fds, (size_t)count * sizeof *fds);
    slot->count = count;
    if (storing)
        store_put(slot->name, fds, count);
    return true;
}

static void let_all_go(void) {
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].name[0])
            let_go(slots[i].name);
}

/* ---- messages ---- */

static void answer(char what, const int *fds, int count) {
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(FDS * sizeof(int))];
    } control = {0};
    struct iovec part = {&what, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(rights), fds, (size_t)count * sizeof(int));
    }
    /* If the daemon has died, that is noticed where the next message is received. */
    (void)!sendmsg(DAEMON, &message, MSG_NOSIGNAL);
}

/* The next message, and its descriptors. Its size, or 0: the daemon has died. */
static size_t receive(char *data, int *fds, int *count) {
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(FDS * sizeof(int))];
    } control;
    struct iovec part = {data, MESSAGE};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t got;
    while ((got = recvmsg(DAEMON, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
        ;
    *count = 0;
    for (struct cmsghdr *found = got > 0 ? CMSG_FIRSTHDR(&message) : NULL; found;
         found = CMSG_NXTHDR(&message, found)) {
        if (found->cmsg_level != SOL_SOCKET || found->cmsg_type != SCM_RIGHTS)
            continue;
        *count = (int)((found->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(found), (size_t)*count * sizeof(int));
    }
    return got > 0 ? (size_t)got : 0;
}

static void accept_owner(void) {
    struct slot *listener = find("listener");
    int fd = listener ? accept4(listener->fds[0], NULL, NULL, SOCK_CLOEXEC) : -1;
    if (fd < 0)
        return;
    accepting = false;
    if (hold("owner", &fd, 1))
        answer('D', &fd, 1);
    else
        close(fd);
}

/* False: the daemon ends in good order. */
static bool act(const char *data, size_t size, const int *fds, int count) {
    const char *name = data + 1;
    struct slot *slot;
    accepting = false;
    switch (data[0]) {
    case 'H':
        answer(hold(name, fds, count) ? 'K' : 'N', NULL, 0);
        return true;
    case 'F':
        let_go(name);
        answer('K', NULL, 0);
        return true;
    case 'G':
        slot = find(name);
        answer(slot ? 'D' : 'N', slot ? slot->fds : NULL, slot ? slot->count : 0);
        return true;
    case 'A':
        accepting = true;
        return true;
    case 'C':
        memcpy(command, name, size - 1);
        command_size = size - 1;
        answer('K', NULL, 0);
        return true;
    }
    return data[0] != 'Q';
}

/* ---- the daemon ---- */

/* A descriptor that is readable: of the daemon, or of the listener while an owner is waited for. */
static int wait_readable(void) {
    struct slot *listener = accepting ? find("listener") : NULL;
    struct pollfd watched[] = {{.fd = DAEMON, .events = POLLIN},
                               {.fd = listener ? listener->fds[0] : -1, .events = POLLIN}};
    while (poll(watched, 2, -1) < 0)
        ;
    return watched[0].revents ? DAEMON : watched[1].fd;
}

/* Serves one daemon. False: it has ended in good order; true: it has died. */
static bool serve(void) {
    static char data[MESSAGE + 1];
    for (;;) {
        int fds[FDS], count;
        if (wait_readable() != DAEMON) {
            accept_owner();
            continue;
        }
        size_t size = receive(data, fds, &count);
        if (!size)
            return true;
        data[size] = 0;
        if (!act(data, size, fds, count))
            return false;
    }
}

static void run_command(int sock) {
    char *args[ARGS + 1], number[16];
    int count = 0;
    for (char *at = command; at < command + command_size && count < ARGS; at += strlen(at) + 1)
        args[count++] = at;
    args[count] = NULL;
    snprintf(number, sizeof number, "%d", DAEMON);
    setenv("PAGENET_GUARD", number, 1);
    for (int i = 1; i < NSIG; i++)
        signal(i, SIG_DFL);
    dup2(sock, DAEMON); /* without close-on-exec */
    execvp(args[0], args);
    fprintf(stderr, "pagenet-guard: cannot start %s: %s\n", args[0], strerror(errno));
    _exit(127);
}

/* Starts the daemon again. False: that is not possible. */
static bool start(void) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return false;
    accepting = false; /* the daemon that wanted that is dead */
    pid_t child = fork();
    if (!child)
        run_command(pair[1]);
    close(pair[1]);
    dup3(pair[0], DAEMON, O_CLOEXEC);
    close(pair[0]);
    return child > 0;
}

static int64_t now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* argv[1]: the descriptor of the socket. */
int main(int argc, char **argv) {
    int64_t began = now_ms(), pause_ms = 0;
    int sock = argc > 1 ? atoi(argv[1]) : DAEMON;
    if (sock != DAEMON) {
        dup2(sock, DAEMON);
        close(sock);
    }
    int ignored[] = {SIGHUP, SIGINT, SIGTERM, SIGQUIT, SIGPIPE};
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
    fcntl(DAEMON, F_SETFD, FD_CLOEXEC);
    storing = store_open();
    answer(storing ? 'S' : 'K', NULL, 0);
    bool died;
    while ((died = serve()) && command_size) {
        /* One that dies again and again is started ever more seldom. */
        int64_t lived = now_ms() - began;
        pause_ms = lived > 2000 ? 0 : pause_ms ? 2 * pause_ms : 100;
        pause_ms = pause_ms < 5000 ? pause_ms : 5000;
        if (lived <= 2000 && pause_ms > 100)
            poll(NULL, 0, (int)pause_ms);
        began = now_ms();
        if (!start())
            return 1;
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    }
    if (!died)
        let_all_go();
    return 0;
}
