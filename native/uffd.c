/* userfaultfd(2), one function for each ioctl. The headers of Debian 12 lack POISON and MOVE: those
 * two are declared here. */
#define _GNU_SOURCE
#include "pagenet.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

struct pn_uffdio_move {
    uint64_t dst, src, len, mode;
    int64_t move;
};
struct pn_uffdio_poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define PN_UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct pn_uffdio_move)
#define PN_UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct pn_uffdio_poison)

static int failed(int result) { return result < 0 ? -errno : 0; }

static int open_device(const char *device, int flags) {
    int device_fd = open(device, O_RDWR | O_CLOEXEC);
    if (device_fd < 0)
        return -errno;
    int uffd = ioctl(device_fd, USERFAULTFD_IOC_NEW, flags);
    int error = failed(uffd);
    close(device_fd);
    return error ? error : uffd;
}

int pn_uffd_open(const char *device, int user_mode_only) {
    int flags = O_CLOEXEC | O_NONBLOCK;
    int uffd = (int)syscall(SYS_userfaultfd, flags | (user_mode_only ? UFFD_USER_MODE_ONLY : 0));
    if (uffd >= 0)
        return uffd;
    int refused = -errno; /* EPERM: not privileged. The device node has permissions of its own. */
    uffd = open_device(device, flags);
    return uffd >= 0 ? uffd : refused;
}

int pn_uffd_api(int uffd, uint64_t wanted, uint64_t *features) {
    struct uffdio_api api = {.api = UFFD_API, .features = wanted};
    int error = failed(ioctl(uffd, UFFDIO_API, &api));
    *features = api.features;
    return error;
}

int pn_uffd_register(int uffd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls) {
    struct uffdio_register request = {.range = {.start = start, .len = length}, .mode = mode};
    int error = failed(ioctl(uffd, UFFDIO_REGISTER, &request));
    *ioctls = request.ioctls;
    return error;
}

int pn_uffd_wake(int uffd, uint64_t start, uint64_t length) {
    struct uffdio_range range = {.start = start, .len = length};
    return failed(ioctl(uffd, UFFDIO_WAKE, &range));
}

/* The kernel wakes the waiting threads, and then stops watching. A thread that faults between the
 * two, under the lock of its mapping alone (Linux 6.8), is not woken, and waits as long as the uffd
 * is open anywhere: wake once more. */
int pn_uffd_unregister(int uffd, uint64_t start, uint64_t length) {
    struct uffdio_range range = {.start = start, .len = length};
    int error = failed(ioctl(uffd, UFFDIO_UNREGISTER, &range));
    pn_uffd_wake(uffd, start, length);
    return error;
}

/* To take write protection off a page that has none is the one request that first asks for the
 * owner's memory, and then does nothing: EAGAIN while the memory is changing, ESRCH where it is
 * gone, ENOENT where the range is not write-protectable. */
int pn_uffd_probe(int uffd, uint64_t address) {
    struct uffdio_writeprotect request = {
        .range = {.start = address, .len = (uint64_t)sysconf(_SC_PAGESIZE)}};
    int error = failed(ioctl(uffd, UFFDIO_WRITEPROTECT, &request));
    return error == -ESRCH || error == -EAGAIN ? error : 0;
}

int pn_same_file(int ours, int pid, int theirs) {
    long order = syscall(SYS_kcmp, getpid(), pid, KCMP_FILE, ours, theirs);
    return order < 0 ? -errno : order == 0;
}

int pn_take_descriptor(int pidfd, int theirs) {
    int ours = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
    return ours < 0 ? -errno : ours;
}

/* The kernel reports progress in a signed field of the request: bytes, or -errno. Before 6.15, it
 * reports nothing at all if it stopped at once, so the field starts as 0. The ioctl's own errno is
 * set whenever it did not do everything. */
static struct pn_progress progress(int result, int64_t field) {
    struct pn_progress answer = {.done = field > 0 ? (uint64_t)field : 0, .error = failed(result)};
    return answer;
}

struct pn_progress pn_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t length) {
    struct uffdio_copy request = {.dst = to, .src = (uintptr_t)from, .len = length};
    int result = ioctl(uffd, UFFDIO_COPY, &request);
    return progress(result, request.copy);
}

struct pn_progress pn_uffd_zeropage(int uffd, uint64_t start, uint64_t length) {
    struct uffdio_zeropage request = {.range = {.start = start, .len = length}};
    int result = ioctl(uffd, UFFDIO_ZEROPAGE, &request);
    return progress(result, request.zeropage);
}

struct pn_progress pn_uffd_continue(int uffd, uint64_t start, uint64_t length) {
    struct uffdio_continue request = {.range = {.start = start, .len = length}};
    int result = ioctl(uffd, UFFDIO_CONTINUE, &request);
    return progress(result, request.mapped);
}

struct pn_progress pn_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t length) {
    struct pn_uffdio_move request = {.dst = to, .src = from, .len = length};
    int result = ioctl(uffd, PN_UFFDIO_MOVE, &request);
    return progress(result, request.move);
}

struct pn_progress pn_uffd_poison(int uffd, uint64_t start, uint64_t length) {
    struct pn_uffdio_poison request = {.range = {.start = start, .len = length}};
    int result = ioctl(uffd, PN_UFFDIO_POISON, &request);
    return progress(result, request.updated);
}

static struct pn_event event_of(const struct uffd_msg *message) {
    struct pn_event event = {.kind = message->event, .fd = -1};
    switch (message->event) {
    case UFFD_EVENT_PAGEFAULT:
        event.start = message->arg.pagefault.address;
        event.flags = message->arg.pagefault.flags;
        event.thread = message->arg.pagefault.feat.ptid;
        break;
    case UFFD_EVENT_FORK:
        event.fd = (int32_t)message->arg.fork.ufd;
        break;
    case UFFD_EVENT_REMAP:
        event.start = message->arg.remap.from;
        event.end = message->arg.remap.to;
        event.length = message->arg.remap.len;
        break;
    default: /* REMOVE and UNMAP share a layout */
        event.start = message->arg.remove.start;
        event.end = message->arg.remove.end;
    }
    return event;
}

/* The owner has the open file too, and can make it blocking after it was found readable, and take
 * the event itself. Kernels before 6.10 cannot be told not to wait. */
static ssize_t read_now(int uffd, void *to, size_t size) {
    static atomic_bool waits;
    struct iovec part = {.iov_base = to, .iov_len = size};
    if (!atomic_load_explicit(&waits, memory_order_relaxed)) {
        ssize_t got = preadv2(uffd, &part, 1, -1, RWF_NOWAIT);
        if (got >= 0 || (errno != EOPNOTSUPP && errno != ESPIPE))
            return got;
        atomic_store_explicit(&waits, true, memory_order_relaxed);
    }
    int flags = fcntl(uffd, F_GETFL);
    if (flags < 0 || flags & O_NONBLOCK)
        return readv(uffd, &part, 1);
    errno = EAGAIN;
    return -1;
}

int pn_uffd_read(int uffd, struct pn_map *map, struct pn_event *events, int room) {
    struct uffd_msg messages[PN_EVENTS];
    if (room > PN_EVENTS)
        room = PN_EVENTS;
    ssize_t got;
    do
        got =
            read_now(uffd, map ? (void *)map->events : messages, (size_t)room * sizeof messages[0]);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -errno;
    if (map) /* the owner may write to the map meanwhile */
        memcpy(messages, map->events, (size_t)got);
    int count = (int)((size_t)got / sizeof messages[0]);
    for (int i = 0; i < count; i++)
        events[i] = event_of(&messages[i]);
    return count;
}

int pn_map_removals(const struct pn_map *map, struct pn_event *events) {
    struct uffd_msg messages[PN_EVENTS];
    _Static_assert(sizeof messages == sizeof map->events, "the layout of the map");
    memcpy(messages, map->events, sizeof messages);
    int count = 0;
    for (int i = 0; i < PN_EVENTS; i++)
        if (messages[i].event == UFFD_EVENT_REMOVE || messages[i].event == UFFD_EVENT_UNMAP)
            events[count++] = event_of(&messages[i]);
    return count;
}
