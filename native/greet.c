/* Greeting owners that connect: what their threads touch first is put into place from the host
 * cache, by one thread for all owners, while the rest of their transfers is prepared.
 *
 * The handshake is peeked at, and stays in the socket for whoever attaches the owner. Only the
 * plain case is dealt with: one userfaultfd, small pages. Whatever else comes (memory that changes,
 * faults outside of it, a handshake that is not as simple) ends the greeting, and is left to the
 * owner's lane. Whoever begins that lane has all waiting threads fault again.
 *
 * Two locks: the greeter's, for what others change too, and each greeting's, which is held while
 * the thread acts on it. */
#define _GNU_SOURCE
#include "cache.h"
#include "thread.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    DOORS = 256,
    SPANS = 64,
    PAGE = 4096,
    MESSAGE = 16 << 10,
    READY = 64,
};

/* What epoll tells of: these; a door, by its number; or a greeting's socket or userfaultfd. */
enum { STOP, CAME, CHANNEL, DOOR, FIRST_ID = DOOR + DOORS };

struct span {
    uint64_t address, size, offset;
};

/* A fault on a page that is not in the cache yet. */
struct late {
    uint64_t address, offset, since;
};

struct pn_greeting {
    struct pn_greeter *greeter;
    struct pn_cache *cache;
    uint64_t size; /* bytes of the region */
    int file;      /* the cache's, for the owner if it asks for it */
    char offer[PN_OFFER];
    bool shares; /* it has got it, and maps it */
    int number;  /* of its note */
    uint64_t id;
    pthread_mutex_t acting;
    int sock, uffd; /* -1: not watched (any more) */
    struct span spans[SPANS];
    int span_count;
    struct late late[PN_EVENTS];
    int late_count;
    struct pn_greeted placed[PN_GREETED];
    int placed_count;
};

/* Where the owners of a snapshot connect. */
struct door {
    char key[PN_NAME];      /* what the names of its owners end in; empty: there is no such door */
    int listener;           /* -1: connections come over the channel */
    struct pn_cache *cache; /* NULL: there is none now */
    uint64_t size;
    int file;             /* the cache's, for owners that ask for it */
    char offer[PN_OFFER]; /* what they are told with it */
};

struct arrival {
    struct pn_arrival told;
    struct arrival *next;
};

struct pn_greeter {
    pthread_t thread;
    int epoll, stop_fd, came_fd, arrived_fd, channel;
    struct pn_note *notes;
    pthread_mutex_t lock;
    struct door doors[DOORS];
    uint64_t places; /* connections that may be accepted at the doors */
    uint64_t last;   /* number of the last that was */
    int refused;     /* errno of one that could not be accepted */
    uint64_t serial;
    struct pn_greeting *greetings[PN_GREETINGS];
    int next_note; /* where to look for one first */
    struct arrival *arrived, **arrived_end;
};

/* ---- one greeting ---- */

static int watch(const struct pn_greeter *greeter, int fd, uint32_t events, uint64_t what) {
    struct epoll_event event = {.events = events, .data.u64 = what};
    return epoll_ctl(greeter->epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

/* The owner has it too, so closing it does not end that it is watched. */
static void forget(const struct pn_greeter *greeter, int *fd) {
    if (*fd < 0)
        return;
    epoll_ctl(greeter->epoll, EPOLL_CTL_DEL, *fd, NULL);
    close(*fd);
    *fd = -1;
}

static void forget_late(struct pn_greeting *greeting, int index) {
    pn_cache_unwait(greeting->cache, greeting->late[index].offset, PAGE,
                    greeting->greeter->came_fd);
    greeting->late[index] = greeting->late[--greeting->late_count];
}

/* The rest is for the owner's lane. */
static void leave(struct pn_greeting *greeting) {
    forget(greeting->greeter, &greeting->sock);
    forget(greeting->greeter, &greeting->uffd);
    while (greeting->late_count)
        forget_late(greeting, greeting->late_count - 1);
}

/* ---- faults ---- */

/* A page that the owner shares is in the page cache. */
static enum pn_how how_to(const struct pn_greeting *greeting, const char *bytes) {
    return !bytes ? PN_ZERO : greeting->shares ? PN_CONTINUE : PN_COPY;
}

/* False: the page is not in the cache. */
static bool place(struct pn_greeting *greeting, const struct late *fault) {
    struct pn_placed placed = {.error = 0};
    const char *bytes;
    pn_cache_hold(greeting->cache);
    bool found = pn_cache_find(greeting->cache, fault->offset, PAGE, PAGE, &bytes);
    if (found)
        placed =
            pn_place(greeting->uffd, how_to(greeting, bytes), fault->address, bytes, PAGE, PAGE);
    pn_cache_unhold(greeting->cache);
    if (placed.error || placed.absent)
        leave(greeting);
    else if (placed.placed)
        greeting->placed[greeting->placed_count++] =
            (struct pn_greeted){.offset = fault->offset, .waited = pn_now() - fault->since};
    return found;
}

static void place_late(struct pn_greeting *greeting) {
    for (int i = greeting->late_count; i-- > 0;)
        if (i < greeting->late_count && place(greeting, &greeting->late[i]) &&
            i < greeting->late_count)
            forget_late(greeting, i);
}

static void await(struct pn_greeting *greeting, const struct late *fault) {
    if (greeting->late_count == PN_EVENTS)
        return;
    greeting->late[greeting->late_count++] = *fault;
    pn_cache_wait(greeting->cache, fault->offset, PAGE, greeting->greeter->came_fd);
    pn_cache_want(greeting->cache, fault->offset, PAGE);
    place_late(greeting); /* it may have come before that */
}

static bool find_offset(const struct pn_greeting *greeting, uint64_t address, uint64_t *offset) {
    for (int i = 0; i < greeting->span_count; i++) {
        const struct span *span = &greeting->spans[i];
        if (address - span->address < span->size) {
            *offset = span->offset + (address - span->address);
            return true;
        }
    }
    return false;
}

static void answer(struct pn_greeting *greeting, const struct pn_event *event, uint64_t now) {
    struct late fault = {.address = event->start & ~(uint64_t)(PAGE - 1), .since = now};
    uint64_t others = UFFD_PAGEFAULT_FLAG_WP | (greeting->shares ? 0 : UFFD_PAGEFAULT_FLAG_MINOR);
    if (!(event->flags & others) && find_offset(greeting, fault.address, &fault.offset) &&
        !place(greeting, &fault))
        await(greeting, &fault);
}

/* The kernel keeps what was read in the notes, for a process that comes after this one. Faults are
 * not missed there; a removal ends the greeting, so that nothing is read over it. */
static void take_faults(struct pn_greeting *greeting, uint32_t ready) {
    struct pn_event events[PN_EVENTS];
    bool has_room = greeting->placed_count + greeting->late_count + PN_EVENTS <= PN_GREETED;
    int count = has_room && !(ready & EPOLLERR)
                    ? pn_uffd_read(greeting->uffd, &greeting->greeter->notes[greeting->number].map,
                                   events, PN_EVENTS)
                    : -ENOBUFS;
    for (int i = 0; i < count; i++)
        if (events[i].kind != UFFD_EVENT_PAGEFAULT)
            count = -EBUSY;
    if (count < 0 && count != -EAGAIN)
        leave(greeting);
    uint64_t now = pn_now();
    for (int i = 0; i < count && greeting->uffd >= 0; i++)
        answer(greeting, &events[i], now);
}

/* ---- the handshake ---- */

/* What is left of the text. NULL in `at`: it is not of the simple form. */
struct reader {
    const char *at;
};

static bool take(struct reader *reader, char wanted) {
    while (reader->at && isspace((unsigned char)*reader->at))
        reader->at++;
    if (!reader->at || *reader->at != wanted)
        return false;
    reader->at++;
    return true;
}

static void expect(struct reader *reader, char wanted) {
    if (!take(reader, wanted))
        reader->at = NULL;
}

/* A string without escapes, in place: *length bytes. */
static const char *take_string(struct reader *reader, size_t *length) {
    expect(reader, '"');
    const char *start = reader->at;
    *length = start ? strcspn(start, "\"\\") : 0;
    reader->at = start && start[*length] == '"' ? start + *length + 1 : NULL;
    return start;
}

/* Digits alone. */
static uint64_t take_number(struct reader *reader) {
    uint64_t value = 0;
    const char *at = reader->at;
    if (!at)
        return 0;
    at += strspn(at, " \t\r\n");
    size_t digits = strspn(at, "0123456789");
    bool fits = digits && !strchr(".eE", at[digits]);
    for (size_t i = 0; i < digits && fits; i++)
        fits = !__builtin_mul_overflow(value, (uint64_t)10, &value) &&
               !__builtin_add_overflow(value, (uint64_t)(at[i] - '0'), &value);
    reader->at = fits ? at + digits : NULL;
    return value;
}

static bool is(const char *key, size_t length, const char *name) {
    return length == strlen(name) && !memcmp(key, name, length);
}

/* Numbers are what matters; of other values strings alone are passed over. */
static void take_member(struct reader *reader, struct span *span, uint64_t *page_size,
                        uint64_t *other_page_size) {
    size_t length, ignored;
    const char *key = take_string(reader, &length);
    expect(reader, ':');
    if (!reader->at)
        return;
    const char *value = reader->at + strspn(reader->at, " \t\r\n");
    if (*value == '"') {
        take_string(reader, &ignored);
        return;
    }
    uint64_t number = take_number(reader);
    if (is(key, length, "base_host_virt_addr"))
        span->address = number;
    else if (is(key, length, "size"))
        span->size = number;
    else if (is(key, length, "offset"))
        span->offset = number;
    else if (is(key, length, "page_size"))
        *page_size = number;
    else if (is(key, length, "page_size_kib"))
        *other_page_size = number;
}

static bool fits(const struct span *span, uint64_t page_size, uint64_t size) {
    uint64_t end, unaligned = span->address | span->size | span->offset;
    return page_size == PAGE && unaligned % PAGE == 0 && span->size && span->offset <= size &&
           span->size <= size - span->offset &&
           !__builtin_add_overflow(span->address, span->size, &end);
}

static void take_span(struct reader *reader, struct pn_greeting *greeting) {
    struct span span = {UINT64_MAX, UINT64_MAX, UINT64_MAX};
    uint64_t page_size = 0, other_page_size = PAGE;
    expect(reader, '{');
    do
        take_member(reader, &span, &page_size, &other_page_size);
    while (take(reader, ','));
    expect(reader, '}');
    if (!reader->at || greeting->span_count == SPANS ||
        !fits(&span, page_size ? page_size : other_page_size, greeting->size))
        reader->at = NULL;
    else
        greeting->spans[greeting->span_count++] = span;
}

/* What an owner begins with that wants to share the cache's file: where it ends. NULL: it does not
 * begin so. */
static const char *after_request(const char *text) {
    struct reader reader = {text};
    size_t key_length, value_length;
    if (!take(&reader, '{'))
        return NULL;
    const char *key = take_string(&reader, &key_length);
    expect(&reader, ':');
    const char *value = take_string(&reader, &value_length);
    expect(&reader, '}');
    bool is_request = reader.at && is(key, key_length, "want") && is(value, value_length, "file");
    return is_request ? reader.at : NULL;
}

/* The mappings of a handshake. False: it is no simple one. */
static bool parse(struct pn_greeting *greeting, const char *text) {
    struct reader reader = {text};
    expect(&reader, '[');
    do
        take_span(&reader, greeting);
    while (take(&reader, ','));
    expect(&reader, ']');
    return reader.at && !reader.at[strspn(reader.at, " \t\r\n")];
}

static bool is_uffd(int fd) {
    char link[32], name[64] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, name, sizeof name - 1) > 0 && !strcmp(name, "anon_inode:[userfaultfd]");
}

/* Whether it reports nothing that pagenet does not follow. */
static bool is_plain(int uffd) {
    char path[32], text[512] = {0};
    unsigned long long features;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", uffd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    const char *api = got > 0 ? strstr(text, "API:") : NULL;
    return api && sscanf(api, "API: %*x:%llx:", &features) == 1 &&
           !(features & (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP));
}

/* The one descriptor of a message. -1: it has none, or more. */
static int only_descriptor(struct msghdr *message) {
    int found = -1, count = 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t at = 0; at + sizeof(int) <= part->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + at, sizeof fd);
            if (found >= 0)
                close(found);
            found = fd;
            count++;
        }
    }
    if (count > 1) {
        close(found);
        found = -1;
    }
    return message->msg_flags & MSG_CTRUNC && found >= 0 ? (close(found), -1) : found;
}

/* Peeks at what has come, as text, and takes its one descriptor. 0, or -errno. */
static int peek(struct pn_greeting *greeting, char *text, int *fd) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))];
    struct iovec part = {.iov_base = text, .iov_len = MESSAGE - 1};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(greeting->sock, &message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    *fd = got < 0 ? -1 : only_descriptor(&message);
    text[got > 0 ? got : 0] = 0;
    return got < 0 ? -errno : 0;
}

/* Whoever attaches the owner answers once more: an owner reads one answer. */
static bool share(struct pn_greeting *greeting) {
    struct iovec part = {.iov_base = greeting->offer, .iov_len = strlen(greeting->offer)};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &greeting->file, sizeof greeting->file);
    ssize_t sent = sendmsg(greeting->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    greeting->shares = sent == (ssize_t)part.iov_len;
    return greeting->shares;
}

/* False: there is nothing (more) to listen to. A message that is not whole is looked at again when
 * there is more of it. */
static bool hear(struct pn_greeting *greeting) {
    char text[MESSAGE];
    int fd, error = peek(greeting, text, &fd);
    if (error == -EAGAIN || error == -EINTR)
        return true;
    const char *request = error ? NULL : after_request(text);
    if (request && !greeting->shares && !share(greeting))
        error = -EPIPE;
    greeting->span_count = 0;
    if (error || fd < 0 || !parse(greeting, request ? request : text) || !is_uffd(fd) ||
        !is_plain(fd)) {
        if (fd >= 0)
            close(fd);
        return !error && text[0] && !strchr(text, ']');
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    greeting->uffd = fd;
    if (watch(greeting->greeter, fd, EPOLLIN, 2 * greeting->id + 1))
        leave(greeting);
    return false;
}

static void listen_on(struct pn_greeting *greeting) {
    if (!hear(greeting))
        forget(greeting->greeter, &greeting->sock);
}

/* ---- arrivals ---- */

/* Locked, so that it does not end while the thread acts on it. NULL: it has ended. */
static struct pn_greeting *lock_greeting(struct pn_greeter *greeter, uint64_t id) {
    pthread_mutex_lock(&greeter->lock);
    struct pn_greeting *greeting = greeter->greetings[id % PN_GREETINGS];
    if (greeting && greeting->id == id)
        pthread_mutex_lock(&greeting->acting);
    else
        greeting = NULL;
    pthread_mutex_unlock(&greeter->lock);
    return greeting;
}

/* The number of a note that nothing is in. Of a process that was killed there may be some. */
static int find_note(struct pn_greeter *greeter) {
    for (int i = 0; i < PN_GREETINGS; i++) {
        int number = (greeter->next_note + i) % PN_GREETINGS;
        if (greeter->greetings[number] || greeter->notes[number].name[0])
            continue;
        greeter->next_note = (number + 1) % PN_GREETINGS;
        return number;
    }
    return -1;
}

/* NULL: there is no room for it, or no cache, or no memory: the owner waits for its lane. */
static struct pn_greeting *new_greeting(struct pn_greeter *greeter, const struct door *door,
                                        const char *name, int sock) {
    int number = door->cache ? find_note(greeter) : -1;
    struct pn_greeting *greeting = number < 0 ? NULL : calloc(1, sizeof *greeting);
    if (!greeting)
        return NULL;
    struct pn_note *note = &greeter->notes[number];
    memset(&note->map, 0, sizeof note->map);
    snprintf(note->name, sizeof note->name, "%s", name);
    greeting->greeter = greeter;
    greeting->cache = door->cache;
    greeting->size = door->size;
    greeting->file = door->file;
    memcpy(greeting->offer, door->offer, sizeof greeting->offer);
    greeting->number = number;
    greeting->id = greeter->serial++ * PN_GREETINGS + (uint64_t)number;
    greeting->uffd = -1;
    greeting->sock = fcntl(sock, F_DUPFD_CLOEXEC, 0);
    pthread_mutex_init(&greeting->acting, NULL);
    greeter->greetings[number] = greeting;
    return greeting;
}

static const struct door *door_of(const struct pn_greeter *greeter, const char *name) {
    size_t length = strlen(name);
    for (int i = 0; i < DOORS; i++) {
        size_t size = strlen(greeter->doors[i].key);
        if (size && size <= length && !strcmp(name + length - size, greeter->doors[i].key))
            return &greeter->doors[i];
    }
    return NULL;
}

static void begin(struct pn_greeter *greeter, uint64_t id) {
    struct pn_greeting *greeting = lock_greeting(greeter, id);
    if (!greeting)
        return;
    /* Edge-triggered: what was peeked at stays there. */
    if (greeting->sock >= 0 && hear(greeting) &&
        !watch(greeter, greeting->sock, EPOLLIN | EPOLLET, 2 * id)) {
        pthread_mutex_unlock(&greeting->acting);
        return;
    }
    forget(greeter, &greeting->sock);
    pthread_mutex_unlock(&greeting->acting);
}

/* Takes over the socket. */
static void arrive(struct pn_greeter *greeter, const char *name, int sock) {
    struct arrival *arrival = calloc(1, sizeof *arrival);
    uint64_t id = 0;
    if (!arrival) {
        close(sock);
        return;
    }
    snprintf(arrival->told.name, sizeof arrival->told.name, "%s", name);
    arrival->told.sock = sock;
    pthread_mutex_lock(&greeter->lock);
    const struct door *door = door_of(greeter, name);
    struct pn_greeting *greeting = door ? new_greeting(greeter, door, name, sock) : NULL;
    arrival->told.greeting = greeting;
    if (greeting)
        id = greeting->id;
    *greeter->arrived_end = arrival;
    greeter->arrived_end = &arrival->next;
    pthread_mutex_unlock(&greeter->lock);
    if (greeting)
        begin(greeter, id);
    eventfd_write(greeter->arrived_fd, 1);
}

/* Connections that another process has accepted. */
static void take_from_channel(struct pn_greeter *greeter) {
    char text[1 + PN_NAME] = {0};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {.iov_base = text, .iov_len = sizeof text - 1};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(greeter->channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    int sock = got > 0 ? only_descriptor(&message) : -1;
    if (sock >= 0)
        arrive(greeter, text + 1, sock);
}

static void watch_doors(struct pn_greeter *greeter) {
    for (int i = 0; i < DOORS; i++) {
        struct epoll_event event = {.events = greeter->places ? EPOLLIN : 0,
                                    .data.u64 = DOOR + (uint64_t)i};
        if (greeter->doors[i].key[0] && greeter->doors[i].listener >= 0)
            epoll_ctl(greeter->epoll, EPOLL_CTL_MOD, greeter->doors[i].listener, &event);
    }
}

/* A connection at the door, and its name. -1: there is none (now). */
static int accept_at(struct pn_greeter *greeter, int number, char *name) {
    const struct door *door = &greeter->doors[number];
    int sock = -1;
    pthread_mutex_lock(&greeter->lock);
    if (greeter->places && door->key[0])
        sock = accept4(door->listener, NULL, NULL, SOCK_CLOEXEC);
    if (sock >= 0) {
        snprintf(name, PN_NAME, "owner.%llu%s", (unsigned long long)++greeter->last, door->key);
        greeter->places--;
    } else if (greeter->places && errno != EAGAIN && errno != ECONNABORTED && errno != EINTR) {
        greeter->refused = errno; /* no descriptors, or no memory: others will end */
        greeter->places = 0;
        eventfd_write(greeter->arrived_fd, 1);
    }
    if (!greeter->places)
        watch_doors(greeter);
    pthread_mutex_unlock(&greeter->lock);
    return sock;
}

static void accept_all(struct pn_greeter *greeter, int number) {
    char name[PN_NAME];
    for (int sock; (sock = accept_at(greeter, number, name)) >= 0;)
        arrive(greeter, name, sock);
}

/* ---- the thread ---- */

static void act_on_greeting(struct pn_greeter *greeter, const struct epoll_event *event) {
    bool faults = event->data.u64 % 2;
    struct pn_greeting *greeting = lock_greeting(greeter, event->data.u64 / 2);
    if (!greeting)
        return;
    if (faults && greeting->uffd >= 0)
        take_faults(greeting, event->events);
    else if (!faults && greeting->sock >= 0)
        listen_on(greeting);
    pthread_mutex_unlock(&greeting->acting);
}

static void act_on_late(struct pn_greeter *greeter) {
    eventfd_t value;
    (void)!eventfd_read(greeter->came_fd, &value);
    for (int i = 0; i < PN_GREETINGS; i++) {
        pthread_mutex_lock(&greeter->lock);
        uint64_t id = greeter->greetings[i] ? greeter->greetings[i]->id : 0;
        pthread_mutex_unlock(&greeter->lock);
        struct pn_greeting *greeting = id ? lock_greeting(greeter, id) : NULL;
        if (!greeting)
            continue;
        place_late(greeting);
        pthread_mutex_unlock(&greeting->acting);
    }
}

static void act(struct pn_greeter *greeter, const struct epoll_event *event) {
    if (event->data.u64 == CAME)
        act_on_late(greeter);
    else if (event->data.u64 == CHANNEL)
        take_from_channel(greeter);
    else if (event->data.u64 < FIRST_ID)
        accept_all(greeter, (int)(event->data.u64 - DOOR));
    else
        act_on_greeting(greeter, event);
}

static void work(void *argument) {
    struct pn_greeter *greeter = argument;
    struct epoll_event ready[READY];
    for (;;) {
        int count = epoll_wait(greeter->epoll, ready, READY, -1);
        for (int i = 0; i < count; i++) {
            if (ready[i].data.u64 == STOP)
                return;
            act(greeter, &ready[i]);
        }
    }
}

/* ---- from outside: the greeter ---- */

static void close_all(const struct pn_greeter *greeter) {
    const int fds[] = {greeter->epoll, greeter->stop_fd, greeter->came_fd, greeter->arrived_fd,
                       greeter->channel};
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static int start(struct pn_greeter *greeter) {
    greeter->epoll = epoll_create1(EPOLL_CLOEXEC);
    greeter->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    greeter->came_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    greeter->arrived_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (greeter->epoll < 0 || greeter->stop_fd < 0 || greeter->came_fd < 0 ||
        greeter->arrived_fd < 0)
        return -errno;
    int error = watch(greeter, greeter->stop_fd, EPOLLIN, STOP);
    error = error ? error : watch(greeter, greeter->came_fd, EPOLLIN, CAME);
    if (!error && greeter->channel >= 0)
        error = watch(greeter, greeter->channel, EPOLLIN, CHANNEL);
    return error ? error : pn_start_loop(&greeter->thread, 0, work, greeter);
}

struct pn_greeter *pn_greeter_new(struct pn_note *notes, int channel, uint64_t last) {
    struct pn_greeter *greeter = calloc(1, sizeof *greeter);
    if (!greeter)
        return NULL;
    pthread_mutex_init(&greeter->lock, NULL);
    greeter->notes = notes;
    greeter->last = last;
    greeter->arrived_end = &greeter->arrived;
    greeter->serial = FIRST_ID; /* so that no id is one of those that mean something else */
    greeter->channel = channel < 0 ? -1 : fcntl(channel, F_DUPFD_CLOEXEC, 0);
    int error = start(greeter);
    if (!error)
        return greeter;
    close_all(greeter);
    free(greeter);
    errno = -error;
    return NULL;
}

void pn_greeter_free(struct pn_greeter *greeter) {
    eventfd_write(greeter->stop_fd, 1);
    pthread_join(greeter->thread, NULL);
    close_all(greeter);
    pthread_mutex_destroy(&greeter->lock);
    free(greeter);
}

static struct door *find_door(struct pn_greeter *greeter, const char *key) {
    for (int i = 0; i < DOORS; i++)
        if (!strcmp(greeter->doors[i].key, key))
            return &greeter->doors[i];
    return NULL;
}

int pn_greeter_open(struct pn_greeter *greeter, const char *key, int listener) {
    int error = 0;
    pthread_mutex_lock(&greeter->lock);
    struct door *door = find_door(greeter, "");
    if (!door)
        error = -ENOSPC;
    else
        *door = (struct door){.listener = listener};
    if (door && listener >= 0)
        error = watch(greeter, listener, greeter->places ? EPOLLIN : 0,
                      DOOR + (uint64_t)(door - greeter->doors));
    if (!error)
        snprintf(door->key, sizeof door->key, "%s", key);
    pthread_mutex_unlock(&greeter->lock);
    return error;
}

void pn_greeter_serve(struct pn_greeter *greeter, const char *key, struct pn_cache *cache,
                      uint64_t size, int file, const char *offer) {
    pthread_mutex_lock(&greeter->lock);
    struct door *door = find_door(greeter, key);
    if (door) {
        door->cache = cache;
        door->size = size;
        door->file = file;
        snprintf(door->offer, sizeof door->offer, "%s", offer);
    }
    pthread_mutex_unlock(&greeter->lock);
}

void pn_greeter_shut(struct pn_greeter *greeter, const char *key) {
    pthread_mutex_lock(&greeter->lock);
    struct door *door = find_door(greeter, key);
    if (door && door->listener >= 0)
        epoll_ctl(greeter->epoll, EPOLL_CTL_DEL, door->listener, NULL);
    if (door)
        *door = (struct door){.listener = -1};
    pthread_mutex_unlock(&greeter->lock);
}

void pn_greeter_allow(struct pn_greeter *greeter, uint64_t places) {
    pthread_mutex_lock(&greeter->lock);
    greeter->places = places;
    watch_doors(greeter);
    pthread_mutex_unlock(&greeter->lock);
}

int pn_greeter_arrived_fd(const struct pn_greeter *greeter) { return greeter->arrived_fd; }

int pn_greeter_take(struct pn_greeter *greeter, struct pn_arrival *into) {
    pthread_mutex_lock(&greeter->lock);
    struct arrival *arrival = greeter->arrived;
    int refused = arrival ? 0 : greeter->refused;
    if (arrival) {
        greeter->arrived = arrival->next;
        if (!greeter->arrived)
            greeter->arrived_end = &greeter->arrived;
    } else {
        greeter->refused = 0;
    }
    pthread_mutex_unlock(&greeter->lock);
    if (!arrival)
        return -refused;
    *into = arrival->told;
    free(arrival);
    return 1;
}

/* ---- from outside: a greeting ---- */

void pn_greeting_stop_listening(struct pn_greeting *greeting) {
    pthread_mutex_lock(&greeting->acting);
    forget(greeting->greeter, &greeting->sock);
    pthread_mutex_unlock(&greeting->acting);
}

int pn_greeting_end(struct pn_greeting *greeting, struct pn_greeted *placed) {
    pthread_mutex_lock(&greeting->acting);
    leave(greeting);
    int count = greeting->placed_count;
    memcpy(placed, greeting->placed, (size_t)count * sizeof *placed);
    pthread_mutex_unlock(&greeting->acting);
    return count;
}

const struct pn_map *pn_greeting_notes(const struct pn_greeting *greeting) {
    return &greeting->greeter->notes[greeting->number].map;
}

void pn_greeting_free(struct pn_greeting *greeting) {
    struct pn_greeter *greeter = greeting->greeter;
    pthread_mutex_lock(&greeter->lock);
    greeter->greetings[greeting->number] = NULL;
    greeter->notes[greeting->number].name[0] = 0;
    pthread_mutex_unlock(&greeter->lock);
    pthread_mutex_lock(&greeting->acting); /* the thread may act on it still */
    leave(greeting);
    pthread_mutex_unlock(&greeting->acting);
    pthread_mutex_destroy(&greeting->acting);
    free(greeting);
}
