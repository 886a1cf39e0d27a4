/* What pagenet-bench measures with, and the bare loops that it measures against: the minimum that
 * any page mover must do. */
#define _GNU_SOURCE
#include "testing.h"
#include "clock.h"
#include "wire.h"
#include "pagemap.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- touching ---- */

struct toucher {
    uint64_t address, page_size, until;
    const uint64_t *pages;
    uint64_t first, count;
    uint64_t *latencies;
    const struct pn_map *map;
    int error;
};

/* Touching a page that can never come is a SIGBUS, at whatever moment its transfer fails. It ends
 * the thread that touches the page, and no more. */
static _Thread_local volatile bool touching;
static _Thread_local sigjmp_buf untouched;
static struct sigaction otherwise;

static void bus_error(int number) {
    if (touching)
        siglongjmp(untouched, 1);
    /* Not from a touch: it happens again at once, for the handler that was there before. */
    sigaction(number, &otherwise, NULL);
}

static bool is_there(const struct pn_map *map, uint64_t page) {
    return map && pn_map_state(map, page) == PN_RESIDENT;
}

static void *touch(void *argument) {
    struct toucher *toucher = argument;
    const struct pn_map *map = toucher->map;
    uint64_t start = now();
    if (sigsetjmp(untouched, 1)) {
        touching = false;
        toucher->error = -EFAULT;
        return NULL;
    }
    touching = true;
    for (uint64_t i = toucher->first; i < toucher->first + toucher->count; i++) {
        const volatile char *at =
            (const volatile char *)(uintptr_t)(toucher->address +
                                               toucher->pages[i] * toucher->page_size);
        if (is_there(map, toucher->pages[i]))
            continue;
        start = now();
        if (start >= toucher->until || (map && pn_map_done(map) == map->scope))
            break;
        (void)*at;
        toucher->latencies[i] = now() - start;
    }
    touching = false;
    return NULL;
}

/* Only one caller at a time in a process: it sets the handler of SIGBUS. */
int pn_bench_touch(uint64_t address, uint64_t page_size, const uint64_t *pages, uint64_t count,
                   uint64_t *latencies, int threads, uint64_t limit_ns, const struct pn_map *map) {
    struct toucher touchers[256];
    pthread_t ids[256];
    if (threads < 1 || threads > 256)
        return -EINVAL;
    struct sigaction action = {.sa_handler = bus_error};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &otherwise))
        return -errno;
    memset(latencies, 0xff, count * sizeof *latencies);
    uint64_t until = limit_ns ? now() + limit_ns : UINT64_MAX;
    int started = 0, error = 0;
    for (uint64_t first = 0; started < threads && !error; started += !error) {
        uint64_t share = (count - first) / (uint64_t)(threads - started);
        touchers[started] =
            (struct toucher){address, page_size, until, pages, first, share, latencies, map, 0};
        error = -pthread_create(&ids[started], NULL, touch, &touchers[started]);
        first += share;
    }
    for (int i = 0; i < started; i++) {
        pthread_join(ids[i], NULL);
        error = error ? error : touchers[i].error;
    }
    sigaction(SIGBUS, &otherwise, NULL);
    return error;
}

/* ---- playing a trace ---- */

struct player {
    struct pn_play *play;
    const struct pn_map *map;
    uint64_t first;
    int error;
};

static void work(uint64_t duration) {
    uint64_t until = now() + duration;
    while (now() < until)
        ;
}

static void play_touch(struct pn_play *play, const struct pn_map *map, uint64_t i) {
    const volatile char *at =
        (const volatile char *)(uintptr_t)(play->address + play->pages[i] * play->page_size);
    work(play->works_ns ? play->works_ns[i] : play->work_ns);
    bool blocked = !is_there(map, play->pages[i]);
    uint64_t start = now();
    (void)*at;
    uint64_t latency = now() - start;
    if (play->latencies)
        play->latencies[i] = latency;
    if (blocked) {
        __atomic_fetch_add(&play->stall_ns, latency, __ATOMIC_RELAXED);
        __atomic_fetch_add(&play->blocked, 1, __ATOMIC_RELAXED);
    }
    __atomic_fetch_add(&play->done, 1, __ATOMIC_RELAXED);
}

static void *play_share(void *argument) {
    struct player *player = argument;
    if (sigsetjmp(untouched, 1)) {
        touching = false;
        player->error = -EFAULT;
        return NULL;
    }
    touching = true;
    struct pn_play *play = player->play;
    for (uint64_t i = player->first; i < play->count; i += play->threads) {
        if (play->until_complete && pn_map_done(player->map) == player->map->scope)
            break;
        play_touch(play, player->map, i);
    }
    touching = false;
    return NULL;
}

int pn_bench_play(struct pn_play *play, const struct pn_map *map) {
    struct player players[64];
    pthread_t ids[64];
    struct sigaction action = {.sa_handler = bus_error};
    if (play->threads < 1 || play->threads > 64)
        return -EINVAL;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &otherwise))
        return -errno;
    uint64_t started = 0;
    int error = 0;
    for (; started < play->threads && !error; started += !error) {
        players[started] = (struct player){play, map, started, 0};
        error = -pthread_create(&ids[started], NULL, play_share, &players[started]);
    }
    for (uint64_t i = 0; i < started; i++) {
        pthread_join(ids[i], NULL);
        error = error ? error : players[i].error;
    }
    sigaction(SIGBUS, &otherwise, NULL);
    return error;
}

uint64_t pn_bench_count(const struct pn_map *map, const uint64_t *pages, uint64_t count,
                        int state) {
    uint64_t found = 0;
    for (uint64_t i = 0; i < count; i++)
        found += pn_map_state(map, pages ? pages[i] : i) == state;
    return found;
}

/* ---- blocking, whole ---- */

static bool send_all(int sock, const void *bytes, size_t length) {
    while (length) {
        ssize_t sent = send(sock, bytes, length, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        bytes = (const char *)bytes + sent;
        length -= (size_t)sent;
    }
    return true;
}

static bool recv_all(int sock, void *bytes, size_t length) {
    while (length) {
        ssize_t got = recv(sock, bytes, length, MSG_WAITALL);
        if (got <= 0)
            return false;
        bytes = (char *)bytes + got;
        length -= (size_t)got;
    }
    return true;
}

/* ---- floor: one fault, one request, one reply, one COPY ---- */

int pn_bench_page_server(int sock, uint64_t page_size) {
    char *reply = calloc(1, sizeof(struct pn_reply) + page_size);
    if (!reply)
        return -ENOMEM;
    memset(reply + sizeof(struct pn_reply), 1, page_size);
    struct pn_request request;
    while (recv_all(sock, &request, sizeof request) &&
           send_all(sock, reply, sizeof(struct pn_reply) + page_size))
        ;
    free(reply);
    return 0;
}

/* sock -1: the page is at hand. */
int pn_bench_fault_floor(int uffd, int sock, int stop_fd, uint64_t page_size) {
    char *page = calloc(1, sizeof(struct pn_reply) + page_size);
    if (!page)
        return -ENOMEM;
    struct pollfd ready[] = {{.fd = uffd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};
    int error = 0;
    while (!error && poll(ready, 2, -1) > 0 && !ready[1].revents) {
        struct pn_event events[64];
        int count = pn_uffd_read(uffd, NULL, events, 64);
        for (int i = 0; i < count && !error; i++) {
            struct pn_request request = {.first = events[i].start};
            if (sock >= 0 && (!send_all(sock, &request, sizeof request) ||
                              !recv_all(sock, page, sizeof(struct pn_reply) + page_size)))
                error = -EPIPE;
            else
                pn_uffd_copy(uffd, events[i].start & ~(page_size - 1),
                             page + sizeof(struct pn_reply), page_size);
        }
    }
    free(page);
    return error;
}

/* ---- floor: bytes through a socket, with or without being put in place ---- */

int pn_bench_send(int sock, const void *bytes, uint64_t length, uint64_t chunk) {
    for (uint64_t done = 0; done < length; done += chunk)
        if (!send_all(sock, (const char *)bytes + done,
                      length - done < chunk ? length - done : chunk))
            return -EPIPE;
    return 0;
}

static int receive_in_place(int sock, uint64_t length, uint64_t chunk, int uffd, uint64_t address,
                            uint64_t second) {
    int error = 0;
    for (uint64_t done = 0; done < length && !error; done += chunk) {
        uint64_t size = length - done < chunk ? length - done : chunk;
        error = recv_all(sock, (char *)(uintptr_t)(second + done), size)
                    ? pn_uffd_continue(uffd, address + done, size).error
                    : -EPIPE;
    }
    return error;
}

/* Into the page cache of a file, and from there into place. */
static int write_and_continue(int uffd, int file, uint64_t address, uint64_t at, const char *bytes,
                              uint64_t size) {
    for (uint64_t done = 0; done < size;) {
        ssize_t written = pwrite(file, bytes + done, size - done, (off_t)(at + done));
        if (written <= 0)
            return written ? -errno : -EIO;
        done += (uint64_t)written;
    }
    return pn_uffd_continue(uffd, address + at, size).error;
}

int pn_bench_receive(int sock, uint64_t length, uint64_t chunk, int uffd, uint64_t address,
                     uint64_t second, int file) {
    if (second)
        return receive_in_place(sock, length, chunk, uffd, address, second);
    char *buffer = mmap(NULL, chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return -errno;
    int error = 0;
    for (uint64_t done = 0; done < length && !error; done += chunk) {
        uint64_t size = length - done < chunk ? length - done : chunk;
        if (!recv_all(sock, buffer, size))
            error = -EPIPE;
        else if (file >= 0)
            error = write_and_continue(uffd, file, address, done, buffer, size);
        else if (uffd >= 0)
            error = pn_uffd_copy(uffd, address + done, buffer, size).error;
    }
    munmap(buffer, chunk);
    return error;
}

void pn_bench_memcpy(uint64_t to, uint64_t from, uint64_t length) {
    memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, length);
}

/* ---- floor: writing, and looking for what was written ---- */

void pn_bench_write(uint64_t address, uint64_t page_size, uint64_t pages) {
    for (uint64_t page = 0; page < pages; page += 2)
        *(volatile char *)(uintptr_t)(address + page * page_size) = 1;
}

int64_t pn_bench_scan(int pagemap, uint64_t address, uint64_t length) {
    struct found found[512];
    struct scan scan = {.size = sizeof scan,
                        .start = address,
                        .end = address + length,
                        .found = (uintptr_t)found,
                        .room = 512,
                        .all_of = WRITTEN,
                        .returned = WRITTEN};
    int64_t bytes = 0;
    while (scan.start < scan.end) {
        int count = ioctl(pagemap, PN_PAGEMAP_SCAN, &scan);
        if (count < 0)
            return -errno;
        for (int i = 0; i < count; i++)
            bytes += (int64_t)(found[i].end - found[i].start);
        scan.start = scan.walk_end;
    }
    return bytes;
}

/* ---- what the map costs ---- */

uint64_t pn_bench_claims(struct pn_map *map) {
    uint64_t claims = 0;
    for (uint64_t page = 0; page < map->pages; page++) {
        claims += pn_map_claim(map, page, 1, PN_MISSING, PN_REQUESTED);
        claims += pn_map_claim(map, page, 1, PN_REQUESTED, PN_PLACING);
        claims += pn_map_claim(map, page, 1, PN_PLACING, PN_RESIDENT);
    }
    return claims;
}
