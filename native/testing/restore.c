/* Guests that are restored, and the least that can restore them: a handler that does Firecracker's
 * handshake and one COPY for each fault. */
#define _GNU_SOURCE
#include "testing.h"
#include "clock.h"
#include "handshake.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PAGE = 4096, MESSAGE = 4096, EVENTS = 64 };

/* ---- a guest ---- */

static int open_uffd(struct pn_guest *guest) {
    uint64_t features;
    guest->uffd = pn_uffd_open("/dev/userfaultfd", 0);
    if (guest->uffd == -EPERM)
        guest->uffd = pn_uffd_open("/dev/userfaultfd", 1);
    return guest->uffd < 0 ? guest->uffd : pn_uffd_api(guest->uffd, 0, &features);
}

/* file -1: anonymous memory. */
static int map_memory(struct pn_guest *guest, int file) {
    int kind = MAP_PRIVATE | MAP_NORESERVE | (file < 0 ? MAP_ANONYMOUS : 0);
    void *at = mmap(NULL, guest->size, PROT_READ | PROT_WRITE, kind, file, 0);
    if (at == MAP_FAILED)
        return -errno;
    madvise(at, guest->size, MADV_NOHUGEPAGE);
    guest->address = (uintptr_t)at;
    uint64_t ioctls, minor = file < 0 ? 0 : UFFDIO_REGISTER_MODE_MINOR;
    return pn_uffd_register(guest->uffd, guest->address, guest->size,
                            UFFDIO_REGISTER_MODE_MISSING | minor, &ioctls);
}

int pn_bench_guest_prepare(struct pn_guest *guest) {
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a touch that is never answered keeps no process */
    int error = open_uffd(guest);
    return error || guest->shared ? error : map_memory(guest, -1);
}

static int map_cache(struct pn_guest *guest) {
    int file = want_file(guest->sock);
    if (file < 0)
        return file;
    int error = map_memory(guest, file);
    close(file);
    return error;
}

static int hand_over(const struct pn_guest *guest) {
    char text[256];
    snprintf(text, sizeof text,
             "[{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64
             ",\"offset\":0,\"page_size\":%d}]",
             guest->address, guest->size, PAGE);
    return send_with(guest->sock, text, &guest->uffd, 1);
}

static const volatile uint64_t *page_of(const struct pn_guest *guest, uint64_t page) {
    return (const volatile uint64_t *)(uintptr_t)(guest->address + page * PAGE);
}

static void touch_all(struct pn_guest *guest) {
    for (uint64_t i = 0; i < guest->touches; i++) {
        uint64_t began = now();
        (void)*page_of(guest, guest->pages[i]);
        guest->ended[i] = now();
        guest->took[i] = guest->ended[i] - began;
    }
}

int pn_bench_guest_arrive(struct pn_guest *guest) {
    guest->connected = now();
    guest->sock = connect_to(guest->socket);
    int error = guest->sock < 0 ? guest->sock : guest->shared ? map_cache(guest) : 0;
    error = error ? error : hand_over(guest);
    if (error)
        return error;
    touch_all(guest);
    for (uint64_t i = 0; i < guest->touches; i++)
        guest->wrong += *page_of(guest, guest->pages[i]) !=
                        pn_pattern_word(guest->pages[i], PAGE, guest->seed, 0);
    return 0;
}

/* ---- the least handler ---- */

/* A connection, and then its userfaultfd too. */
struct handled {
    int sock, uffd;
    uint64_t base, size, offset;
};

struct handler {
    const char *memory;
    uint64_t size;
    int epoll;
};

static int watch(const struct handler *handler, int fd, void *what) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    return epoll_ctl(handler->epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

/* The guest has its userfaultfd too: that it is closed here does not end what watches it. */
static void forget(const struct handler *handler, int fd) {
    if (fd < 0)
        return;
    epoll_ctl(handler->epoll, EPOLL_CTL_DEL, fd, NULL);
    close(fd);
}

static void leave(const struct handler *handler, struct handled *guest) {
    forget(handler, guest->sock);
    forget(handler, guest->uffd);
    free(guest);
}

static int accept_guest(const struct handler *handler, int listener) {
    struct handled *guest = calloc(1, sizeof *guest);
    if (!guest)
        return -ENOMEM;
    guest->uffd = -1;
    guest->sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    int error = guest->sock < 0 ? -errno : watch(handler, guest->sock, guest);
    if (error)
        leave(handler, guest);
    return error == -EAGAIN ? 0 : error;
}

/* The length of the message; 0: the guest has left. */
static ssize_t receive(struct handled *guest, char *text) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct iovec bytes = {.iov_base = text, .iov_len = MESSAGE - 1};
    struct msghdr message = {.msg_iov = &bytes,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(guest->sock, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(&guest->uffd, CMSG_DATA(header), sizeof guest->uffd);
    return got;
}

/* Its userfaultfd is watched under the same name, with the lowest bit set. */
static void meet(const struct handler *handler, struct handled *guest) {
    char text[MESSAGE] = {0};
    static const char form[] =
        "[{\"base_host_virt_addr\":%" SCNu64 ",\"size\":%" SCNu64 ",\"offset\":%" SCNu64;
    ssize_t got = receive(guest, text);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0 || guest->uffd < 0 ||
        sscanf(text, form, &guest->base, &guest->size, &guest->offset) != 3 ||
        guest->offset > handler->size || guest->size > handler->size - guest->offset ||
        watch(handler, guest->uffd, (char *)guest + 1))
        leave(handler, guest);
}

static void answer(const struct handler *handler, const struct handled *guest) {
    struct pn_event events[EVENTS];
    int count = pn_uffd_read(guest->uffd, NULL, events, EVENTS);
    for (int i = 0; i < count; i++) {
        uint64_t at = (events[i].start & ~(uint64_t)(PAGE - 1)) - guest->base;
        if (at < guest->size)
            pn_uffd_copy(guest->uffd, guest->base + at, handler->memory + guest->offset + at, PAGE);
    }
}

static void serve(const struct handler *handler, void *what) {
    bool faults = (uintptr_t)what & 1;
    struct handled *guest = (struct handled *)((char *)what - faults);
    if (faults)
        answer(handler, guest);
    else
        meet(handler, guest);
}

static int handle(const struct handler *handler, int listener, int stop_fd) {
    static char at_listener, at_stop;
    int error = watch(handler, listener, &at_listener);
    error = error ? error : watch(handler, stop_fd, &at_stop);
    while (!error) {
        struct epoll_event event;
        int ready = epoll_wait(handler->epoll, &event, 1, -1);
        if (ready < 0 && errno != EINTR)
            return -errno;
        if (ready == 1 && event.data.ptr == &at_stop)
            return 0;
        if (ready == 1 && event.data.ptr == &at_listener)
            error = accept_guest(handler, listener);
        else if (ready == 1)
            serve(handler, event.data.ptr);
    }
    return error;
}

/* Guests that are still there when it ends go with the process. */
int pn_bench_handler(int listener, const void *memory, uint64_t size, int stop_fd) {
    struct handler handler = {memory, size, epoll_create1(EPOLL_CLOEXEC)};
    if (handler.epoll < 0)
        return -errno;
    int error = handle(&handler, listener, stop_fd);
    close(handler.epoll);
    return error;
}
