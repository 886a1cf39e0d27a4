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
 *   A NAME \0 COUNT \0
 *                    accept COUNT connections on what is held as "listener", or under a longer name
 *                    that begins so. Hold the first under NAME, and what comes behind "listener" in
 *                    the listener's name, and each other under NAME with the next number at its
 *                    end. Answer when one has come, with its name, over what is held as "arrivals"
 *                    if anything is; otherwise another request ends the wait
 *   L                send the names of all that is held, each with a \0
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
    NAME = 32,
    LISTENERS = 256, /* that are watched at a time */
    RETRY_MS = 100,  /* until another owner is accepted, without descriptors */
    MESSAGE = 64 << 10,
    ARGS = 1024,
};

#define LISTENER "listener"
#define ARRIVALS "arrivals"

struct slot {
    char name[NAME]; /* empty: free */
    int fds[FDS];
    int count;
};

static struct slot *slots;
static int slot_count;
static char command[MESSAGE];
static size_t command_size;
static unsigned long accepting; /* connections */
static char accept_as[NAME];
static bool storing; /* what is held is in systemd's store too */

/* ---- what is held ---- */

static struct slot *find(const char *name) {
    for (int i = 0; i < slot_count; i++)
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

static struct slot *free_slot(void) {
    for (int i = 0; i < slot_count; i++)
        if (!slots[i].name[0])
            return &slots[i];
    int more = slot_count ? 2 * slot_count : 8;
    struct slot *grown = realloc(slots, (size_t)more * sizeof *slots);
    if (!grown)
        return NULL;
    memset(grown + slot_count, 0, (size_t)(more - slot_count) * sizeof *slots);
    slots = grown;
    struct slot *found = &slots[slot_count];
    slot_count = more;
    return found;
}

static bool hold(const char *name, const int *fds, int count) {
    let_go(name);
    struct slot *slot = free_slot();
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
    for (int i = 0; i < slot_count; i++)
        if (slots[i].name[0])
            let_go(slots[i].name);
}

/* ---- messages ---- */

/* If the daemon has died, that is noticed where the next message is received. */
static void send_to(int sock, const char *data, size_t size, const int *fds, int count) {
    struct iovec part = {(void *)data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    send_with(sock, &message, fds, count);
}

static void answer_with(const char *data, size_t size, const int *fds, int count) {
    send_to(DAEMON, data, size, fds, count);
}

static void answer(char what, const int *fds, int count) { answer_with(&what, 1, fds, count); }

static void list_names(void) {
    static char data[MESSAGE] = "L";
    size_t size = 1;
    for (int i = 0; i < slot_count; i++) {
        size_t length = strnlen(slots[i].name, NAME) + 1;
        if (length > 1 && size + length <= sizeof data) {
            memcpy(data + size, slots[i].name, length);
            size += length;
        }
    }
    answer_with(data, size, NULL, 0);
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

static bool is_listener(const struct slot *slot) {
    return !strncmp(slot->name, LISTENER, sizeof LISTENER - 1);
}

static void count_on(char *name) {
    char *number = name + strlen(name);
    while (number > name && number[-1] >= '0' && number[-1] <= '9')
        number--;
    if (*number)
        snprintf(number, (size_t)(name + NAME - number), "%llu", strtoull(number, NULL, 10) + 1);
}

static void accept_owner(const struct slot *listener) {
    char said[1 + NAME];
    int length =
        snprintf(said, sizeof said, "D%s%s", accept_as, listener->name + sizeof LISTENER - 1);
    const struct slot *arrivals = find(ARRIVALS);
    int channel = arrivals ? arrivals->fds[0] : DAEMON;
    int fd = accept4(listener->fds[0], NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE))
        poll(NULL, 0, RETRY_MS);
    if (fd < 0)
        return;
    accepting--;
    count_on(accept_as);
    if (length < (int)sizeof said && hold(said + 1, &fd, 1))
        send_to(channel, said, (size_t)length, &fd, 1);
    else
        close(fd);
}

/* False: the daemon ends in good order. */
static bool act(const char *data, size_t size, const int *fds, int count) {
    const char *name = data + 1;
    struct slot *slot;
    if (!find(ARRIVALS))
        accepting = 0;
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
        accepting = 2 + strlen(name) < size ? strtoul(name + strlen(name) + 1, NULL, 10) : 1;
        snprintf(accept_as, sizeof accept_as, "%.*s", NAME - 1, name);
        return true;
    case 'L':
        list_names();
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

/* A listener that is readable, while an owner is waited for; NULL: the daemon has said something,
 * or there is nothing yet. */
static const struct slot *wait_readable(void) {
    struct pollfd watched[1 + LISTENERS] = {{.fd = DAEMON, .events = POLLIN}};
    const struct slot *listeners[LISTENERS];
    int count = 0;
    for (int i = 0; accepting && i < slot_count && count < LISTENERS; i++)
        if (is_listener(&slots[i])) {
            listeners[count++] = &slots[i];
            watched[count] = (struct pollfd){.fd = slots[i].fds[0], .events = POLLIN};
        }
    while (poll(watched, (nfds_t)(1 + count), -1) < 0)
        ;
    for (int i = 0; i < count && !watched[0].revents; i++)
        if (watched[1 + i].revents)
            return listeners[i];
    return NULL;
}

/* Serves one daemon. False: it has ended in good order; true: it has died. */
static bool serve(void) {
    static char data[MESSAGE + 1];
    for (;;) {
        int fds[FDS], count;
        const struct slot *listener = wait_readable();
        if (listener) {
            accept_owner(listener);
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
    accepting = 0; /* the daemon that wanted that is dead */
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
