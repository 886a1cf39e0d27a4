/* A longer path than this machine has: a relay between two ends of TCP connections that passes
 * bytes on after a delay, for kernels without netem. Bytes of one connection stay in order, and as
 * many as the path holds are on it at once: no window of the relay's own limits them. */
#define _GNU_SOURCE
#include "testing.h"
#include "clock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 80, PIPES = 2 * MAX_CONNECTIONS, PIECE = 64 << 10 };
/* Of one direction of a connection: what 10 Gbit/s carry in 50 ms. */
enum { MOST_HELD = 64 << 20 };

struct piece {
    struct piece *next;
    uint64_t due;
    size_t start, end;
    char bytes[PIECE];
};

/* One direction of a connection. */
struct pipe {
    int from, to;
    struct piece *first, *last;
    size_t held;
    bool ended;         /* `from` sends no more */
    uint64_t free_at;   /* when what was taken before will have passed, at the rate */
    uint64_t *answered; /* of what comes from there; NULL: it goes there */
};

struct relay {
    struct pipe pipes[PIPES];
    int count;
    uint64_t delay_ns, rate;
    uint64_t *answered;
};

static void connect_through(struct relay *relay, int listener, const struct sockaddr_in *address) {
    int one = 1, near = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (near < 0)
        return;
    int far = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (relay->count + 2 > PIPES || far < 0 ||
        connect(far, (const struct sockaddr *)address, sizeof *address)) {
        close(near);
        if (far >= 0)
            close(far);
        return;
    }
    setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    relay->pipes[relay->count++] = (struct pipe){.from = near, .to = far};
    relay->pipes[relay->count++] =
        (struct pipe){.from = far, .to = near, .answered = relay->answered};
}

/* When `bytes` more that come now will be through. */
static uint64_t due_of(const struct relay *relay, struct pipe *pipe, uint64_t time,
                       uint64_t bytes) {
    if (pipe->free_at < time)
        pipe->free_at = time;
    if (relay->rate)
        pipe->free_at += bytes * 1000000000u / relay->rate;
    return pipe->free_at + relay->delay_ns;
}

static void take(const struct relay *relay, struct pipe *pipe, uint64_t time) {
    struct piece *piece = malloc(sizeof *piece);
    ssize_t got = piece ? recv(pipe->from, piece->bytes, PIECE, MSG_DONTWAIT) : -1;
    if (got <= 0) {
        free(piece);
        pipe->ended = got == 0 || (errno != EAGAIN && errno != EINTR);
        return;
    }
    piece->next = NULL;
    piece->due = due_of(relay, pipe, time, (uint64_t)got);
    piece->start = 0;
    piece->end = (size_t)got;
    if (pipe->last)
        pipe->last->next = piece;
    else
        pipe->first = piece;
    pipe->last = piece;
    pipe->held += (size_t)got;
    if (pipe->answered)
        *pipe->answered += (uint64_t)got;
}

static void drop_first(struct pipe *pipe) {
    struct piece *piece = pipe->first;
    pipe->first = piece->next;
    if (!pipe->first)
        pipe->last = NULL;
    free(piece);
}

/* False: `to` takes no more for now. */
static bool pass_on(struct pipe *pipe, uint64_t time) {
    while (pipe->first && pipe->first->due <= time) {
        struct piece *piece = pipe->first;
        ssize_t sent = send(pipe->to, piece->bytes + piece->start, piece->end - piece->start,
                            MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && (errno == EAGAIN || errno == EINTR))
            return false;
        size_t gone = sent < 0 ? piece->end - piece->start : (size_t)sent;
        piece->start += gone;
        pipe->held -= gone;
        if (piece->start == piece->end)
            drop_first(pipe);
    }
    if (pipe->ended && !pipe->first)
        shutdown(pipe->to, SHUT_WR);
    return true;
}

/* What the pipes wait for; the earliest moment at which one has something to pass on. */
static uint64_t fill_polls(struct relay *relay, struct pollfd *polls, uint64_t time) {
    uint64_t earliest = UINT64_MAX;
    for (int i = 0; i < relay->count; i++) {
        struct pipe *pipe = &relay->pipes[i];
        bool blocked = !pass_on(pipe, time);
        bool takes = !pipe->ended && pipe->held < MOST_HELD;
        polls[2 * i] = (struct pollfd){.fd = takes ? pipe->from : -1, .events = POLLIN};
        polls[2 * i + 1] = (struct pollfd){.fd = blocked ? pipe->to : -1, .events = POLLOUT};
        if (!blocked && pipe->first && pipe->first->due < earliest)
            earliest = pipe->first->due;
    }
    return earliest;
}

/* Of a connection, which is two pipes: each socket is the `from` of one. */
static void close_connection(struct relay *relay, int first) {
    for (struct pipe *pipe = &relay->pipes[first]; pipe < &relay->pipes[first + 2]; pipe++) {
        while (pipe->first)
            drop_first(pipe);
        close(pipe->from);
    }
    relay->count -= 2;
    memmove(&relay->pipes[first], &relay->pipes[relay->count], 2 * sizeof *relay->pipes);
}

static bool is_over(const struct pipe *pipe) { return pipe->ended && !pipe->first; }

static void close_ended(struct relay *relay) {
    for (int i = relay->count - 2; i >= 0; i -= 2)
        if (is_over(&relay->pipes[i]) && is_over(&relay->pipes[i + 1]))
            close_connection(relay, i);
}

static int pass(struct relay *relay, int listener, int stop_fd, const struct sockaddr_in *address) {
    struct pollfd polls[2 * PIPES + 2];
    for (;;) {
        uint64_t time = now(), due = fill_polls(relay, polls, time);
        int last = 2 * relay->count;
        polls[last] = (struct pollfd){.fd = listener, .events = POLLIN};
        polls[last + 1] = (struct pollfd){.fd = stop_fd, .events = POLLIN};
        uint64_t wait = due == UINT64_MAX ? 1000000000u : due > time ? due - time : 0;
        struct timespec timeout = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        if (ppoll(polls, (nfds_t)last + 2, &timeout, NULL) < 0 && errno != EINTR)
            return -errno;
        if (polls[last + 1].revents)
            return 0;
        time = now();
        for (int i = 0; i < relay->count; i++)
            if (polls[2 * i].revents)
                take(relay, &relay->pipes[i], time);
        close_ended(relay);
        if (polls[last].revents)
            connect_through(relay, listener, address);
    }
}

int pn_bench_relay(int listener, const char *host, int port, uint64_t delay_ns, uint64_t rate,
                   int stop_fd, uint64_t *answered) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct relay *relay = calloc(1, sizeof *relay);
    if (!relay)
        return -ENOMEM;
    relay->delay_ns = delay_ns;
    relay->rate = rate;
    relay->answered = answered;
    int error =
        inet_aton(host, &address.sin_addr) ? pass(relay, listener, stop_fd, &address) : -EINVAL;
    while (relay->count)
        close_connection(relay, relay->count - 2);
    free(relay);
    return error;
}
