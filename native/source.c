/* The source's half of the native lanes: requests in, pages out, any number of connections in one
 * loop.
 *
 * A connection costs its struct and its socket's buffers. Page bytes go through a buffer of the
 * loop, or by sendfile straight from the file. At most a chunk of a reply is made at a time. A
 * buffer of the connection keeps only what a full socket refuses of the chunk; the rest is read
 * once the socket takes more.
 */
#define _GNU_SOURCE
#include "pagenet.h"
#include "sock.h"
#include "thread.h"
#include "wire.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    REQUESTS = 128, /* taken from a socket at a time, at most */
    /* Read, or looked through for zeros, at a time: larger pieces leave the cache before they are
     * sent. At most as much, with its headers, is kept of a connection. */
    CHUNK = 256 << 10,
    SENDFILE_MIN = 64 << 10, /* below, a read and a send are cheaper than a send and a sendfile */
    /* Work for one connection, in bytes, before the others have their turn: where threads wait for
     * them; and where no thread does, or there are no others. */
    TURN = CHUNK,
    LONG_TURN = 4 * CHUNK,
    PACK_WORK = 3,        /* the work of compressing a byte; reading and sending it is 1 */
    REQUEST_WORK = 512,   /* the work of a request, whatever it asks for, in bytes */
    FRAME_WORK = 4 << 20, /* the work of unpacking frames of a snapshot */
    MAX_RUNS = CHUNK / 4096,
    LZ4_BLOCK = 128 << 10, /* compressed at a time: both sides have it in the cache then */
    PAGE = 4096,
    BUFFER_OFFSET = 2048, /* of the buffer in its page: see new_buffer */
    /* Bytes kept of all connections. Beyond that, larger units go uncompressed: of those nothing is
     * kept. */
    KEPT_UNITS = 16 << 20,
    FIRST_LOOK = 4 << 10, /* of a larger unit: most that are not zero show it at their beginning */
    SAMPLE = 32 << 10,    /* compressed to measure what compressing would bring */
};

struct notice {
    struct notice *next;
    uint64_t id;
    struct pn_end end;
};

/* A request for pages that are not all there yet. */
struct lack {
    struct lack *next;
    struct pn_lack lack;
};

struct conn {
    struct conn *next;
    uint64_t id;
    struct sock sock;
    uint32_t events; /* what epoll watches it for */
    uint8_t in[REQUESTS * sizeof(struct pn_request)];
    size_t in_start, in_end;
    struct pn_request request;  /* being answered: pages from `first`, `count` of them are left */
    struct pn_request *put_off; /* whose pages are not all there; room for REQUESTS */
    size_t put_off_count;
    bool looks;    /* some of those may be there by now */
    uint8_t *kept; /* bytes that the socket refused */
    size_t kept_start, kept_size;
    /* Behind them, of the reply that was begun, `left` bytes of the block from byte `at` on. */
    const struct pn_source_block *block;
    uint64_t at, left;
    bool by_sendfile;
    uint64_t scanned; /* bytes of the unit at hand that were looked through, and are zero */
    bool full;        /* the socket refused something, and epoll has not reported room since */
    struct conn *next_waiting; /* for its turn */
    bool waits;
    bool is_local; /* the peer is on this host, as far as its address tells */
    uint8_t link;
    bool idle; /* all that was asked for is answered */
    struct pn_choice choice;
    /* Of the chunk being answered: bytes of pages that are not zero, and bytes sent. */
    uint64_t bytes, wire;
    /* Of its end. Allocated with the connection: an end that could not be reported for want of
     * memory would be waited for without end. */
    struct notice *notice;
    bool ended;
};

struct command {
    struct command *next;
    struct conn *add; /* NULL: remove */
    uint64_t id;
};

struct pn_source {
    const struct pn_source_block *blocks;
    uint64_t block_count;
    int epoll, wake_fd, ended_fd;
    bool background;
    bool stopped;
    pthread_mutex_t lock; /* commands, ended, stopped */
    struct command *commands, **last_command;
    struct notice *ended, **last_ended;
    int lacks_fd;
    struct lack *lacks, **last_lack; /* under the lock as well */
    atomic_bool look;                /* pieces have come */
    _Atomic uint64_t put_off;        /* requests, of all connections */
    struct conn *conns;
    /* Connections that could go on at once, in the order of their turns. */
    struct conn *waiting, **last_waiting;
    struct pn_end *end; /* gets the reason why the loop ends */
    bool lost;
    uint8_t *buffer;       /* a chunk, or a unit to be compressed */
    uint8_t *packed;       /* the buffer's content, compressed */
    uint64_t work;         /* done in this turn, in bytes */
    _Atomic uint64_t kept; /* bytes, of all connections */
    void *pack_state;
    struct pn_links *links;
    _Atomic uint64_t asked[PN_BACKGROUND + 1]; /* pages, by class */
    _Atomic uint64_t zeros;                    /* pages, of those */
};

static size_t at_most(uint64_t size, size_t limit) { return size < limit ? (size_t)size : limit; }

/* One stretch of a chunk: zero or not. */
struct stretch {
    uint64_t pages;
    int zero;
};

/* ---- life ---- */

/* The buffer does not begin at the beginning of a page. The kernel copies with `rep movsb`, which
 * some processors (AMD's Zen) do at a third of their speed where the target is a few bytes behind
 * the origin, counted within pages: pread into a buffer of malloc's, 16 bytes into its page, takes
 * 0.78 ns a byte instead of 0.26. What is read begins with a page, and what is sent lands a few
 * headers behind the beginning of one, so half a page is far from both. */
static uint8_t *new_buffer(void) {
    uint8_t *pages = aligned_alloc(PAGE, PN_MAX_LZ4_BYTES + PAGE);
    return pages ? pages + BUFFER_OFFSET : NULL;
}

static void free_buffer(uint8_t *buffer) {
    if (buffer)
        free(buffer - BUFFER_OFFSET);
}

struct pn_source *pn_source_new(const struct pn_source_block *blocks, uint64_t count,
                                struct pn_links *links, int ended_fd) {
    struct pn_source *source = calloc(1, sizeof *source);
    if (!source)
        return NULL;
    *source = (struct pn_source){
        .blocks = blocks,
        .block_count = count,
        .ended_fd = ended_fd,
        .epoll = epoll_create1(EPOLL_CLOEXEC),
        .wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .lacks_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .buffer = new_buffer(),
        .packed = malloc(PN_MAX_LZ4_BYTES),
        .pack_state = malloc(pn_pack_state()),
        .links = links,
    };
    source->last_command = &source->commands;
    source->last_ended = &source->ended;
    source->last_lack = &source->lacks;
    source->last_waiting = &source->waiting;
    pthread_mutex_init(&source->lock, NULL);
    struct epoll_event wake = {.events = EPOLLIN, .data.ptr = NULL};
    if (source->epoll < 0 || source->wake_fd < 0 || source->lacks_fd < 0 || !source->buffer ||
        !source->packed || !source->pack_state ||
        epoll_ctl(source->epoll, EPOLL_CTL_ADD, source->wake_fd, &wake)) {
        pn_source_free(source);
        return NULL;
    }
    return source;
}

static void free_conn(struct conn *conn) {
    if (conn->sock.tls)
        pn_tls_free(conn->sock.tls, 1);
    close(conn->sock.fd);
    free(conn->kept);
    free(conn->put_off);
    free(conn->notice);
    free(conn);
}

void pn_source_free(struct pn_source *source) {
    for (struct conn *conn = source->conns, *next; conn; conn = next) {
        next = conn->next;
        free_conn(conn);
    }
    for (struct command *command = source->commands, *next; command; command = next) {
        next = command->next;
        if (command->add)
            free_conn(command->add);
        free(command);
    }
    for (struct notice *notice = source->ended, *next; notice; notice = next) {
        next = notice->next;
        free(notice);
    }
    for (struct lack *lack = source->lacks, *next; lack; lack = next) {
        next = lack->next;
        free(lack);
    }
    if (source->lacks_fd >= 0)
        close(source->lacks_fd);
    if (source->epoll >= 0)
        close(source->epoll);
    if (source->wake_fd >= 0)
        close(source->wake_fd);
    pthread_mutex_destroy(&source->lock);
    free_buffer(source->buffer);
    free(source->packed);
    free(source->pack_state);
    free(source);
}

/* ---- commands from other threads ---- */

static int command(struct pn_source *source, struct conn *add, uint64_t id) {
    struct command *command = malloc(sizeof *command);
    if (!command)
        return -ENOMEM;
    *command = (struct command){.add = add, .id = id};
    pthread_mutex_lock(&source->lock);
    *source->last_command = command;
    source->last_command = &command->next;
    pthread_mutex_unlock(&source->lock);
    eventfd_write(source->wake_fd, 1);
    return 0;
}

/* Whether the peer is reached over the loopback device, or not over the network at all. */
static bool is_local(int sock) {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } here = {0}, there = {0};
    socklen_t here_size = sizeof here, there_size = sizeof there;
    if (getsockname(sock, &here.any, &here_size) || getpeername(sock, &there.any, &there_size))
        return false;
    if (here.any.sa_family == AF_INET)
        return here.v4.sin_addr.s_addr == there.v4.sin_addr.s_addr;
    if (here.any.sa_family == AF_INET6)
        return !memcmp(&here.v6.sin6_addr, &there.v6.sin6_addr, sizeof here.v6.sin6_addr);
    return here.any.sa_family == AF_UNIX;
}

int pn_source_add(struct pn_source *source, int sock, struct pn_tls *tls, uint64_t id,
                  uint32_t link, const void *unread, uint64_t length) {
    struct conn *conn;
    if (length > sizeof conn->in)
        return -EMSGSIZE;
    if (!(conn = calloc(1, sizeof *conn)) || !(conn->notice = calloc(1, sizeof *conn->notice))) {
        free(conn);
        return -ENOMEM;
    }
    conn->id = id;
    conn->sock = (struct sock){.fd = sock, .tls = tls, .pending = tls};
    conn->is_local = is_local(sock);
    conn->link = (uint8_t)link;
    conn->idle = true;
    pn_choice_init(&conn->choice);
    memcpy(conn->in, unread, length);
    conn->in_end = length;
    int error = command(source, conn, id);
    if (error) {
        free(conn->notice);
        free(conn);
    }
    return error;
}

int pn_source_remove(struct pn_source *source, uint64_t id) { return command(source, NULL, id); }

void pn_source_stop(struct pn_source *source) {
    pthread_mutex_lock(&source->lock);
    source->stopped = true;
    pthread_mutex_unlock(&source->lock);
    eventfd_write(source->wake_fd, 1);
}

int pn_source_ended(struct pn_source *source, uint64_t *id, struct pn_end *end) {
    pthread_mutex_lock(&source->lock);
    struct notice *notice = source->ended;
    if (notice && !(source->ended = notice->next))
        source->last_ended = &source->ended;
    pthread_mutex_unlock(&source->lock);
    if (!notice)
        return 0;
    *id = notice->id;
    *end = notice->end;
    free(notice);
    return 1;
}

int pn_source_lacks(struct pn_source *source, struct pn_lack *lack) {
    pthread_mutex_lock(&source->lock);
    struct lack *first = source->lacks;
    if (first && !(source->lacks = first->next))
        source->last_lack = &source->lacks;
    pthread_mutex_unlock(&source->lock);
    if (!first)
        return 0;
    *lack = first->lack;
    free(first);
    return 1;
}

int pn_source_lacks_fd(const struct pn_source *source) { return source->lacks_fd; }

/* A request that is put off just now is not missed: it is reported, and what it lacks is looked for
 * then. */
void pn_source_look(struct pn_source *source) {
    if (!atomic_load(&source->put_off))
        return;
    atomic_store(&source->look, true);
    eventfd_write(source->wake_fd, 1);
}

void pn_pieces_came(uint8_t *here, uint64_t first, uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        atomic_store_explicit((_Atomic uint8_t *)&here[first + i], 1, memory_order_release);
}

/* ---- the end of a connection, or of the memory ---- */

static void end_conn(struct pn_source *source, struct conn *conn, enum pn_end_kind kind, int error,
                     const char *text) {
    if (conn->ended)
        return;
    conn->ended = true;
    struct notice *notice = conn->notice;
    conn->notice = NULL;
    notice->id = conn->id;
    notice->end.kind = kind;
    notice->end.error = error;
    snprintf(notice->end.text, sizeof notice->end.text, "%s", text);
    pthread_mutex_lock(&source->lock);
    *source->last_ended = notice;
    source->last_ended = &notice->next;
    pthread_mutex_unlock(&source->lock);
    eventfd_write(source->ended_fd, 1);
}

static void lose(struct pn_source *source, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    source->lost = true;
    source->end->kind = PN_END_FAILED;
    vsnprintf(source->end->text, sizeof source->end->text, format, arguments);
    va_end(arguments);
}

/* ---- reading the memory ---- */

static const struct pn_source_block *block_of(const struct pn_source *source, uint64_t page) {
    uint64_t low = 0, high = source->block_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(source->blocks[middle].first <= page ? &low : &high) = middle;
    }
    return page - source->blocks[low].first < source->blocks[low].pages ? &source->blocks[low]
                                                                        : NULL;
}

static bool process_ended(const struct pn_source_block *block) {
    struct pollfd gone = {.fd = block->pidfd, .events = POLLIN};
    return poll(&gone, 1, 0) > 0;
}

static void lose_end(struct pn_source *source, const struct pn_source_block *block, uint64_t at) {
    lose(source, "source %s cannot be read any more: it ends at byte %llu of %llu", block->name,
         (unsigned long long)at, (unsigned long long)(block->pages * block->page_size));
}

/* Has these bytes in the file, if it is one that frames are unpacked into. */
static bool unpack_frames(struct pn_source *source, const struct pn_source_block *block,
                          uint64_t at, size_t size) {
    char text[sizeof source->end->text];
    if (!block->frames || pn_frames_are_there(block->frames, at, size))
        return true;
    source->work += FRAME_WORK;
    if (!pn_frames_need(block->frames, at, size, text, sizeof text))
        return true;
    lose(source, "%s", text);
    return false;
}

static bool read_file(struct pn_source *source, const struct pn_source_block *block, uint64_t at,
                      uint8_t *into, size_t size) {
    if (!unpack_frames(source, block, at, size))
        return false;
    while (size) {
        ssize_t got = pread(block->fd, into, size, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            lose(source, "source %s cannot be read any more: %s", block->name, strerror(errno));
        if (got == 0)
            lose_end(source, block, at);
        if (got <= 0)
            return false;
        into += got;
        at += (uint64_t)got;
        size -= (size_t)got;
    }
    return true;
}

static uint64_t offset_of(const struct pn_source_block *block, uint64_t page) {
    return (page - block->first) * block->page_size;
}

static bool read_bytes(struct pn_source *source, const struct pn_source_block *block,
                       uint64_t offset, uint8_t *into, size_t size) {
    source->work += size;
    if (block->pid <= 0)
        return read_file(source, block, offset, into, size);
    int error = pn_read_process(block->pid, block->address + offset, into, size);
    /* The pid may belong to another process by now, but not if our process still runs after the
     * read. */
    bool ended = process_ended(block);
    if (ended)
        lose(source, "process %d has ended", block->pid);
    else if (error)
        lose(source, "cannot read process %d at %#llx: %s", block->pid,
             (unsigned long long)(block->address + offset), strerror(-error));
    return !ended && !error;
}

/* Whether `pages` pages from this one on are nothing but a hole. */
static bool is_hole(const struct pn_source_block *block, uint64_t page, uint64_t pages) {
    if (block->frames) /* what is a hole in its file may only not be there yet */
        return pn_frames_are_zero(block->frames, offset_of(block, page), pages * block->page_size);
    return block->pid <= 0 &&
           pn_is_hole(block->fd, offset_of(block, page), pages * block->page_size);
}

/* Whether the unit of a file is zero, without reading more of it than that takes. -1: it cannot be
 * read. */
static int unit_is_zero(struct pn_source *source, const struct pn_source_block *block,
                        uint64_t page, size_t size) {
    uint64_t word, offset = offset_of(block, page);
    if (!read_file(source, block, offset, (uint8_t *)&word, sizeof word))
        return -1;
    if (word)
        return 0;
    if (!read_bytes(source, block, offset, source->buffer, size))
        return -1;
    int zero;
    pn_zero_run(source->buffer, 1, size, &zero);
    return zero;
}

static void append(struct stretch *stretches, int *count, uint64_t pages, int zero) {
    if (*count && stretches[*count - 1].zero == zero)
        stretches[*count - 1].pages += pages;
    else
        stretches[(*count)++] = (struct stretch){.pages = pages, .zero = zero};
}

/* ---- sending ---- */

/* Ends the connection, unless its socket was only not ready. */
static void end_socket(struct pn_source *source, struct conn *conn) {
    struct pn_end end;
    if (pn_sock_end(&conn->sock, &end))
        end_conn(source, conn, end.kind, end.error, end.text);
}

static ssize_t try_send(struct pn_source *source, struct conn *conn, struct iovec *parts, int count,
                        bool more) {
    ssize_t sent = pn_sock_send(&conn->sock, parts, count, more);
    if (sent >= 0)
        return sent;
    end_socket(source, conn);
    return conn->ended ? -1 : 0;
}

static void forget_kept(struct pn_source *source, struct conn *conn) {
    atomic_fetch_sub_explicit(&source->kept, conn->kept_size, memory_order_relaxed);
    free(conn->kept);
    conn->kept = NULL;
    conn->kept_start = conn->kept_size = 0;
}

static size_t size_of(const struct iovec *parts, int count) {
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    return size;
}

/* Keeps bytes that the socket refused. They are sent before anything else. */
static void keep(struct pn_source *source, struct conn *conn, const struct iovec *parts, int count,
                 size_t sent) {
    size_t size = size_of(parts, count), rest = size - at_most(sent, size);
    conn->kept = malloc(rest);
    if (!conn->kept) {
        end_conn(source, conn, PN_END_NO_MEMORY, ENOMEM, "");
        return;
    }
    for (int i = 0; i < count; i++) {
        size_t skip = at_most(sent, parts[i].iov_len), left = parts[i].iov_len - skip;
        memcpy(conn->kept + conn->kept_size, (uint8_t *)parts[i].iov_base + skip, left);
        conn->kept_size += left;
        sent -= skip;
    }
    atomic_fetch_add_explicit(&source->kept, rest, memory_order_relaxed);
}

/* Whether the socket took all of it, and would take more. */
static bool send_or_keep(struct pn_source *source, struct conn *conn, struct iovec *parts,
                         int count, bool more) {
    ssize_t sent = try_send(source, conn, parts, count, more);
    if (sent < 0)
        return false;
    conn->full = (size_t)sent < size_of(parts, count);
    if (conn->full)
        keep(source, conn, parts, count, (size_t)sent);
    return !conn->full;
}

static bool send_kept(struct pn_source *source, struct conn *conn) {
    struct iovec part = {conn->kept + conn->kept_start, conn->kept_size - conn->kept_start};
    ssize_t sent = try_send(source, conn, &part, 1, conn->left > 0);
    if (sent < 0)
        return false;
    conn->kept_start += (size_t)sent;
    conn->full = conn->kept_start < conn->kept_size;
    if (!conn->full)
        forget_kept(source, conn);
    return !conn->full;
}

static void send_from_file(struct pn_source *source, struct conn *conn, size_t size) {
    off_t at = (off_t)conn->at;
    if (!unpack_frames(source, conn->block, conn->at, size))
        return;
    ssize_t sent = pn_sock_send_file(&conn->sock, conn->block->fd, &at, size);
    if (sent < 0)
        end_socket(source, conn);
    else if (sent == 0) /* the header promised more than there is: the connection must be cut */
        lose_end(source, conn->block, conn->at);
    conn->full = sent < (ssize_t)size;
    source->work += size;
    if (sent <= 0)
        return;
    conn->at += (uint64_t)sent;
    conn->left -= (uint64_t)sent;
}

static void send_by_copy(struct pn_source *source, struct conn *conn, size_t size) {
    struct iovec part = {source->buffer, size};
    if (!read_bytes(source, conn->block, conn->at, source->buffer, size))
        return;
    conn->at += size;
    conn->left -= size;
    send_or_keep(source, conn, &part, 1, false);
}

/* Sends some more pages of the reply that was begun. */
static void send_pages(struct pn_source *source, struct conn *conn) {
    size_t size = at_most(conn->left, CHUNK);
    if (conn->by_sendfile)
        send_from_file(source, conn, size);
    else
        send_by_copy(source, conn, size);
}

static struct pn_reply reply_to(const struct pn_request *request, uint8_t encoding, uint64_t pages,
                                uint64_t length) {
    return (struct pn_reply){.id = request->id,
                             .class_ = request->class_,
                             .encoding = encoding,
                             .first = request->first,
                             .count = (uint32_t)pages,
                             .length = (uint32_t)length};
}

static void advance(struct pn_request *request, uint64_t pages) {
    request->first += pages;
    request->count -= (uint32_t)pages;
}

static void tell_lost(struct pn_source *source, struct conn *conn) {
    size_t length = strnlen(source->end->text, PN_MAX_REASON_BYTES);
    struct pn_reply reply = reply_to(&conn->request, PN_FAILED, conn->request.count, length);
    struct iovec parts[] = {{&reply, sizeof reply}, {source->end->text, length}};
    if (!conn->kept && !conn->left)
        try_send(source, conn, parts, 2, false);
}

/* ---- answering ---- */

static void count_zeros(struct pn_source *source, uint64_t pages) {
    atomic_fetch_add_explicit(&source->zeros, pages, memory_order_relaxed);
}

static void answer_zero(struct pn_source *source, struct conn *conn, uint64_t pages) {
    struct pn_reply reply = reply_to(&conn->request, PN_ZEROS, pages, 0);
    struct iovec part = {&reply, sizeof reply};
    conn->wire += sizeof reply;
    advance(&conn->request, pages);
    count_zeros(source, pages);
    send_or_keep(source, conn, &part, 1, false);
}

/* Whether the request's next pages are to be compressed. */
static bool packs(const struct pn_source *source, const struct conn *conn) {
    const struct pn_request *request = &conn->request;
    if (!(request->encodings & 1 << PN_LZ4))
        return false;
    if (!(request->encodings & 1 << PN_RAW)) /* it wants pages compressed, whatever that costs */
        return true;
    if (request->class_ == PN_BACKGROUND)
        return pn_choice_packs(&conn->choice);
    return atomic_load_explicit((_Atomic uint8_t *)&source->links->demand[conn->link],
                                memory_order_relaxed);
}

/* Compresses pages, if that makes them smaller. Returns the bytes that they take, or 0. */
static size_t pack(struct pn_source *source, struct conn *conn, const uint8_t *pages, size_t size,
                   uint8_t *to) {
    uint64_t began = pn_now(), length = pn_pack(source->pack_state, pages, size, to);
    source->work += PACK_WORK * size;
    pn_choice_tried(&conn->choice, size, length, pn_now() - began);
    return length;
}

static bool is_choosing(const struct conn *conn) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return conn->request.class_ == PN_BACKGROUND && (conn->request.encodings & both) == both;
}

/* Whether to measure what compressing the pages at hand would bring. */
static bool wants_sample(const struct conn *conn) {
    return is_choosing(conn) && pn_choice_wants_sample(&conn->choice, conn->choice.mark);
}

/* Headers and payloads that are sent at once. */
struct reply_batch {
    struct pn_reply replies[MAX_RUNS];
    struct iovec parts[2 * MAX_RUNS];
    int runs, count;
};

static void add_reply(struct reply_batch *batch, struct conn *conn, uint8_t encoding,
                      uint64_t pages, uint8_t *payload, size_t length) {
    batch->replies[batch->runs] = reply_to(&conn->request, encoding, pages, length);
    batch->parts[batch->count++] =
        (struct iovec){&batch->replies[batch->runs++], sizeof batch->replies[0]};
    if (length)
        batch->parts[batch->count++] = (struct iovec){payload, length};
    conn->wire += sizeof batch->replies[0] + length;
    advance(&conn->request, pages);
}

/* Adds pages that are not zero, in blocks of whole units. Each block is compressed if that makes it
 * smaller. */
static void add_packed(struct pn_source *source, struct reply_batch *batch, struct conn *conn,
                       uint8_t *at, uint64_t pages, uint64_t page_size, uint64_t unit,
                       uint8_t **to) {
    uint64_t most = LZ4_BLOCK / page_size / unit * unit;
    for (uint64_t here; pages; pages -= here, at += here * page_size) {
        here = !most ? unit : pages < most ? pages : most;
        size_t size = here * page_size, length = pack(source, conn, at, size, *to);
        if (length)
            add_reply(batch, conn, PN_LZ4, here, *to, length);
        else
            add_reply(batch, conn, PN_RAW, here, at, size);
        *to += length;
    }
}

/* Reads the pages, and sends the headers and payloads of all stretches at once. */
static void answer_by_copy(struct pn_source *source, struct conn *conn,
                           const struct pn_source_block *block, uint64_t pages, uint64_t unit,
                           bool packing) {
    if (!read_bytes(source, block, offset_of(block, conn->request.first), source->buffer,
                    pages * block->page_size))
        return;
    struct reply_batch batch;
    batch.runs = batch.count = 0;
    uint8_t *at = source->buffer, *to = source->packed;
    for (uint64_t left = pages; left;) {
        int zero;
        uint64_t run = pn_zero_run(at, left / unit, unit * block->page_size, &zero) * unit;
        size_t size = run * block->page_size;
        if (!zero)
            conn->bytes += size;
        if (zero) {
            count_zeros(source, run);
            add_reply(&batch, conn, PN_ZEROS, run, NULL, 0);
        } else if (packing) {
            add_packed(source, &batch, conn, at, run, block->page_size, unit, &to);
        } else {
            if (wants_sample(conn))
                pack(source, conn, at, at_most(size, SAMPLE), source->packed);
            add_reply(&batch, conn, PN_RAW, run, at, size);
        }
        at += size;
        left -= run;
    }
    send_or_keep(source, conn, batch.parts, batch.count, false);
}

/* Over loopback sendfile would leave the copying, from cold memory, to the destination's busier
 * loop. */
static bool may_send_file(const struct conn *conn) {
    return !conn->is_local && pn_sock_sends_files(&conn->sock);
}

/* Sends pages that are not zero, without keeping any of them. */
static void stream_pages(struct pn_source *source, struct conn *conn,
                         const struct pn_source_block *block, uint64_t pages) {
    uint64_t size = pages * block->page_size, at = offset_of(block, conn->request.first);
    struct pn_reply reply = reply_to(&conn->request, PN_RAW, pages, size);
    struct iovec part = {&reply, sizeof reply};
    if (wants_sample(conn)) {
        if (!read_bytes(source, block, at, source->buffer, at_most(size, SAMPLE)))
            return;
        pack(source, conn, source->buffer, at_most(size, SAMPLE), source->packed);
    }
    conn->bytes += size;
    conn->wire += sizeof reply + size;
    conn->block = block;
    conn->at = at;
    conn->left = size;
    conn->by_sendfile = block->pid <= 0 && may_send_file(conn);
    advance(&conn->request, pages);
    if (send_or_keep(source, conn, &part, 1, true))
        send_pages(source, conn);
}

/* Answers one stretch of the chunk: looks where it ends, then has the kernel send it from the
 * file. */
static void answer_by_sendfile(struct pn_source *source, struct conn *conn,
                               const struct pn_source_block *block, uint64_t pages, uint64_t unit) {
    struct stretch stretches[2];
    int count = 0;
    uint64_t done = 0;
    for (; done < pages && count < 2; done += unit) {
        int zero = unit_is_zero(source, block, conn->request.first + done, unit * block->page_size);
        if (zero < 0)
            return;
        append(stretches, &count, unit, zero);
    }
    if (stretches[0].zero)
        answer_zero(source, conn, stretches[0].pages);
    else if (stretches[0].pages * block->page_size < SENDFILE_MIN)
        /* Splintered by zero pages: not worth a sendfile each. */
        answer_by_copy(source, conn, block, pages, unit, false);
    else
        stream_pages(source, conn, block, stretches[0].pages);
}

/* Answers a unit that is too large to be looked through at once: a piece of it in each turn, until
 * it is known whether the unit is zero. */
static void answer_unit(struct pn_source *source, struct conn *conn,
                        const struct pn_source_block *block, uint64_t unit) {
    uint64_t size = unit * block->page_size,
             at = offset_of(block, conn->request.first) + conn->scanned;
    size_t piece = at_most(size - conn->scanned, conn->scanned ? CHUNK : FIRST_LOOK);
    int zero;
    if (!read_bytes(source, block, at, source->buffer, piece))
        return;
    pn_zero_run(source->buffer, 1, piece, &zero);
    conn->scanned += piece;
    if (zero && conn->scanned < size)
        return;
    conn->scanned = 0;
    if (zero)
        answer_zero(source, conn, unit);
    else
        stream_pages(source, conn, block, unit);
}

/* Whether this unit, which is larger than what is compressed at a time, may be compressed. It takes
 * milliseconds, for which other destinations would wait, and what a full socket refuses of it is
 * kept. */
static bool may_pack(const struct pn_source *source, const struct conn *conn, uint64_t size) {
    if (size > PN_MAX_LZ4_BYTES ||
        atomic_load_explicit(&source->kept, memory_order_relaxed) + size > KEPT_UNITS)
        return false;
    for (const struct conn *other = source->conns; other && !source->background;
         other = other->next)
        if (other->link != conn->link)
            return false;
    return true;
}

static void answer_pages(struct pn_source *source, struct conn *conn) {
    const struct pn_request *request = &conn->request;
    const struct pn_source_block *block = block_of(source, request->first);
    bool packing = packs(source, conn);
    uint64_t unit = 1ull << request->unit_shift, most = CHUNK / block->page_size / unit * unit;
    uint64_t pages = request->count < most ? request->count
                     : most                ? most
                                           : unit,
             size = pages * block->page_size;
    bool is_large = conn->scanned || (!most && !(packing && may_pack(source, conn, size)));
    if (!is_large && (block->pid > 0 || size < SENDFILE_MIN))
        /* A hole reads as zeros: no need to ask for it. */
        answer_by_copy(source, conn, block, pages, unit, packing);
    else if (!conn->scanned && is_hole(block, request->first, request->count))
        answer_zero(source, conn, request->count);
    else if (is_large) /* a unit once begun is continued, whatever the choice to compress is now */
        answer_unit(source, conn, block, unit);
    else if (packing || !may_send_file(conn))
        answer_by_copy(source, conn, block, pages, unit, packing);
    else
        answer_by_sendfile(source, conn, block, pages, unit);
    if (source->lost)
        tell_lost(source, conn);
}

/* Nothing was asked for, and everything had arrived: the time until now tells nothing about the
 * link. */
static bool was_drained(struct conn *conn) {
    int waiting = 0;
    bool idle = conn->idle;
    conn->idle = false;
    return idle && !ioctl(conn->sock.fd, SIOCOUTQ, &waiting) && !waiting;
}

static void answer_chunk(struct pn_source *source, struct conn *conn) {
    if (!is_choosing(conn)) {
        answer_pages(source, conn);
        return;
    }
    uint64_t began = pn_now();
    if (was_drained(conn))
        pn_choice_resume(&conn->choice, began);
    conn->bytes = conn->wire = 0;
    answer_pages(source, conn);
    pn_choice_answered(&conn->choice, conn->bytes, conn->wire, began, pn_now());
    atomic_store_explicit((_Atomic uint8_t *)&source->links->demand[conn->link],
                          (uint8_t)pn_choice_for_demand(&conn->choice), memory_order_relaxed);
}

static bool is_wrong(struct pn_source *source, struct conn *conn, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    end_conn(source, conn, PN_END_PROTOCOL, 0, text);
    return false;
}

/* The rules and messages are those of RequestDecoder in pagenet/protocol.py. */
static bool check_request(struct pn_source *source, struct conn *conn,
                          const struct pn_request *request) {
    const struct pn_source_block *last = &source->blocks[source->block_count - 1],
                                 *block = block_of(source, request->first);
    if (request->reserved || request->reserved2)
        return is_wrong(source, conn, "the peer's request has reserved bits set");
    if (!block || !request->count ||
        request->count > block->pages - (request->first - block->first))
        return is_wrong(
            source, conn,
            "the peer asks for %u pages from page %llu on: not within one block of the %llu pages",
            request->count, (unsigned long long)request->first,
            (unsigned long long)(last->first + last->pages));
    uint64_t unit = 1ull << (request->unit_shift & 63), size = request->count * block->page_size;
    if (request->unit_shift > PN_MAX_UNIT_SHIFT || unit * block->page_size > PN_MAX_UNIT_BYTES ||
        (request->first - block->first) % unit || request->count % unit)
        return is_wrong(source, conn,
                        "the peer's request is not made of whole units of 2**%u pages",
                        request->unit_shift);
    if (size > PN_MAX_REQUEST_BYTES && request->count > unit)
        return is_wrong(source, conn, "the peer asks for %llu bytes at once (limit %d)",
                        (unsigned long long)size, PN_MAX_REQUEST_BYTES);
    if (request->class_ > PN_BACKGROUND)
        return is_wrong(source, conn, "the peer names transfer class %u, which is unknown",
                        request->class_);
    return true;
}

/* ---- pages that are not there yet ---- */

static bool is_here(const struct pn_source *source, const struct pn_request *request) {
    const struct pn_source_block *block = block_of(source, request->first);
    uint64_t at = offset_of(block, request->first);
    if (block->frames && pn_frames_are_brought(block->frames))
        return pn_frames_are_there(block->frames, at, request->count * block->page_size);
    if (!block->here)
        return true;
    uint64_t last = (at + request->count * block->page_size - 1) / PN_PIECE_BYTES;
    for (uint64_t piece = at / PN_PIECE_BYTES; piece <= last; piece++)
        if (!atomic_load_explicit((const _Atomic uint8_t *)&block->here[piece],
                                  memory_order_acquire))
            return false;
    return true;
}

static bool say_lack(struct pn_source *source, const struct pn_request *request) {
    struct lack *lack = malloc(sizeof *lack);
    if (!lack)
        return false;
    *lack = (struct lack){
        .lack = {.first = request->first, .count = request->count, .class_ = request->class_}};
    pthread_mutex_lock(&source->lock);
    *source->last_lack = lack;
    source->last_lack = &lack->next;
    pthread_mutex_unlock(&source->lock);
    eventfd_write(source->lacks_fd, 1);
    return true;
}

/* Requests behind this one need not wait for its pages: replies may come in any order. */
static void put_off(struct pn_source *source, struct conn *conn) {
    if (!conn->put_off)
        conn->put_off = malloc(REQUESTS * sizeof *conn->put_off);
    if (conn->put_off) {
        conn->put_off[conn->put_off_count++] = conn->request;
        atomic_fetch_add(&source->put_off, 1); /* before it is reported: see pn_source_look */
    }
    if (!conn->put_off || !say_lack(source, &conn->request))
        end_conn(source, conn, PN_END_NO_MEMORY, ENOMEM, "");
    conn->request.count = 0;
}

/* Takes up a request that was put off and whose pages have come. */
static bool take_up(struct pn_source *source, struct conn *conn) {
    for (size_t i = 0; conn->looks && i < conn->put_off_count; i++)
        if (is_here(source, &conn->put_off[i])) {
            conn->request = conn->put_off[i];
            conn->put_off_count--;
            atomic_fetch_sub(&source->put_off, 1);
            memmove(&conn->put_off[i], &conn->put_off[i + 1],
                    (conn->put_off_count - i) * sizeof *conn->put_off);
            return true;
        }
    conn->looks = false;
    return false;
}

/* ---- requests ---- */

static bool has_request(const struct conn *conn) {
    return conn->in_end - conn->in_start >= sizeof conn->request && conn->put_off_count < REQUESTS;
}

/* Whether there is a request to answer. */
static bool next_request(struct pn_source *source, struct conn *conn) {
    if (conn->request.count || take_up(source, conn))
        return true;
    if (!has_request(conn))
        return false;
    memcpy(&conn->request, conn->in + conn->in_start, sizeof conn->request);
    conn->in_start += sizeof conn->request;
    if (!check_request(source, conn, &conn->request))
        return false;
    atomic_fetch_add_explicit(&source->asked[conn->request.class_], conn->request.count,
                              memory_order_relaxed);
    source->work += REQUEST_WORK;
    if (is_here(source, &conn->request))
        return true;
    put_off(source, conn);
    return false;
}

uint64_t pn_source_zeros(const struct pn_source *source) {
    return atomic_load_explicit(&source->zeros, memory_order_relaxed);
}

uint64_t pn_source_asked(const struct pn_source *source, int class_) {
    return atomic_load_explicit(&source->asked[class_], memory_order_relaxed);
}

uint64_t pn_source_kept(const struct pn_source *source) {
    return atomic_load_explicit(&source->kept, memory_order_relaxed);
}

/* A sendfile() that was reset half way returns what it had sent, and takes the error with it: the
 * end that recv() then reports is a reset. */
static bool was_reset(const struct conn *conn) {
    struct tcp_info info;
    socklen_t size = sizeof info;
    return !getsockopt(conn->sock.fd, IPPROTO_TCP, TCP_INFO, &info, &size) &&
           info.tcpi_state == TCP_CLOSE;
}

static void receive(struct pn_source *source, struct conn *conn) {
    memmove(conn->in, conn->in + conn->in_start, conn->in_end - conn->in_start);
    conn->in_end -= conn->in_start;
    conn->in_start = 0;
    if (conn->in_end == sizeof conn->in)
        return;
    ssize_t got =
        pn_sock_receive_some(&conn->sock, conn->in + conn->in_end, sizeof conn->in - conn->in_end);
    if (got > 0)
        conn->in_end += (size_t)got;
    else if (got < 0)
        end_socket(source, conn);
    else if (!conn->sock.tls && was_reset(conn))
        end_conn(source, conn, PN_END_BROKEN, ECONNRESET, "");
    else if (conn->in_end % sizeof(struct pn_request))
        end_conn(source, conn, PN_END_PROTOCOL, 0, "the peer closed in the middle of a request");
    else
        end_conn(source, conn, PN_END_CLOSED, 0, "");
}

static bool has_work(const struct conn *conn) {
    return conn->kept || conn->left || conn->request.count || conn->sock.pending || conn->looks ||
           has_request(conn);
}

static bool can_go_on(const struct conn *conn) {
    return has_work(conn) && !conn->full && !conn->ended;
}

/* One step. What was begun comes first. */
static void answer(struct pn_source *source, struct conn *conn) {
    if (conn->kept)
        send_kept(source, conn);
    else if (conn->left)
        send_pages(source, conn);
    else if (next_request(source, conn))
        answer_chunk(source, conn);
    else if (conn->sock.pending)
        receive(source, conn);
}

/* Answers until the socket is full, there is nothing to do, or it is the other connections'
 * turn. */
static void take_turn(struct pn_source *source, struct conn *conn) {
    uint64_t most = source->background || !source->conns->next ? LONG_TURN : TURN;
    for (source->work = 0; can_go_on(conn) && source->work < most && !source->lost;)
        answer(source, conn);
    if (!has_work(conn))
        conn->idle = true;
}

/* ---- the loop ---- */

static void wait_for_turn(struct pn_source *source, struct conn *conn) {
    if (conn->waits)
        return;
    conn->waits = true;
    conn->next_waiting = NULL;
    *source->last_waiting = conn;
    source->last_waiting = &conn->next_waiting;
}

static void stop_waiting(struct pn_source *source, struct conn *conn) {
    if (!conn->waits)
        return;
    struct conn **at = &source->waiting;
    while (*at != conn)
        at = &(*at)->next_waiting;
    if (!(*at = conn->next_waiting))
        source->last_waiting = at;
    conn->waits = false;
}

static void forget(struct pn_source *source, struct conn *conn) {
    struct conn **at = &source->conns;
    while (*at != conn)
        at = &(*at)->next;
    *at = conn->next;
    stop_waiting(source, conn);
    atomic_fetch_sub(&source->put_off, conn->put_off_count);
    forget_kept(source, conn);
    /* Closing would do, but not while a child that was just forked, and has not yet become another
     * program, has a copy. */
    epoll_ctl(source->epoll, EPOLL_CTL_DEL, conn->sock.fd, NULL);
    free_conn(conn);
}

static void watch(struct pn_source *source, struct conn *conn) {
    bool has_room = conn->in_end - conn->in_start < sizeof conn->in;
    uint32_t events = (has_room ? EPOLLIN : 0) | (conn->full ? EPOLLOUT : 0);
    struct epoll_event event = {.events = events, .data.ptr = conn};
    if (events != conn->events)
        epoll_ctl(source->epoll, EPOLL_CTL_MOD, conn->sock.fd, &event);
    conn->events = events;
}

static void serve(struct pn_source *source, struct conn *conn) {
    take_turn(source, conn);
    if (conn->ended) {
        forget(source, conn);
        return;
    }
    if (can_go_on(conn))
        wait_for_turn(source, conn);
    watch(source, conn);
}

/* A connection that had nothing to do is served at once: a page that was just asked for does not
 * wait until all of a large unit, or of many, was sent to others. One that had work is served in
 * its turn. */
static void heed(struct pn_source *source, struct conn *conn, uint32_t events) {
    bool had_work = has_work(conn);
    if (events & ~(uint32_t)EPOLLIN)
        conn->full = false;
    if (events & ~(uint32_t)EPOLLOUT)
        receive(source, conn);
    if (had_work && can_go_on(conn)) {
        wait_for_turn(source, conn);
        watch(source, conn);
    } else {
        serve(source, conn);
    }
}

static void add(struct pn_source *source, struct conn *conn) {
    conn->next = source->conns;
    source->conns = conn;
    conn->events = EPOLLIN;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (epoll_ctl(source->epoll, EPOLL_CTL_ADD, conn->sock.fd, &event))
        end_conn(source, conn, PN_END_BROKEN, errno, "");
    serve(source, conn);
}

static void remove_by_id(struct pn_source *source, uint64_t id) {
    for (struct conn *conn = source->conns; conn; conn = conn->next)
        if (conn->id == id) {
            end_conn(source, conn, PN_END_STOPPED, 0, "");
            forget(source, conn);
            return;
        }
}

/* Pieces have come: who has put requests off looks for their pages in its turn. */
static void look_again(struct pn_source *source) {
    for (struct conn *conn = source->conns; conn; conn = conn->next)
        if (conn->put_off_count && !conn->ended) {
            conn->looks = true;
            if (can_go_on(conn))
                wait_for_turn(source, conn);
        }
}

static bool obey(struct pn_source *source) {
    eventfd_t value;
    (void)!eventfd_read(source->wake_fd, &value);
    if (atomic_exchange(&source->look, false))
        look_again(source);
    pthread_mutex_lock(&source->lock);
    struct command *command = source->commands;
    source->commands = NULL;
    source->last_command = &source->commands;
    bool stopped = source->stopped;
    pthread_mutex_unlock(&source->lock);
    for (struct command *next; command; command = next) {
        next = command->next;
        if (command->add)
            add(source, command->add);
        else
            remove_by_id(source, command->id);
        free(command);
    }
    return !stopped;
}

static void loop(void *argument) {
    struct pn_source *source = argument;
    struct epoll_event events[64];
    bool go_on = true;
    while (go_on && !source->lost) {
        int count = epoll_wait(source->epoll, events, 64, source->waiting ? 0 : -1);
        bool commands = false;
        for (int i = 0; i < count && !source->lost; i++)
            if (events[i].data.ptr)
                heed(source, events[i].data.ptr, events[i].events);
            else
                commands = true;
        struct conn *next = source->waiting;
        if (next && !source->lost) {
            stop_waiting(source, next);
            serve(source, next);
        }
        if (commands) /* last: they may remove a connection that has an event here */
            go_on = obey(source);
    }
}

void pn_source_run(struct pn_source *source, int background, struct pn_end *end) {
    *end = (struct pn_end){.kind = PN_END_STOPPED};
    source->end = end;
    source->background = background;
    int error = pn_run_loop(background, loop, source);
    if (error)
        lose(source, "no thread to serve from: %s", strerror(-error));
}
