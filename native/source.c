/* The source's half of the native lanes: requests in, pages out, any number of connections in one loop.
 *
 * A connection costs its struct and its sockets' buffers; page bytes go through a buffer of the loop's, or by sendfile
 * straight from the file. Only what a full socket refuses is kept, in a buffer of its connection's own. */
#define _GNU_SOURCE
#include "pagenet.h"
#include "thread.h"
#include "wire.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
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
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    REQUESTS = 128,          /* taken from a socket at a time */
    CHUNK = 256 << 10,       /* read, or looked through for zeros, at a time: larger ones leave the cache before they are sent */
    SENDFILE_MIN = 64 << 10, /* below, one read and one send are cheaper than a send and a sendfile */
    TURNS = 4,               /* chunks for one connection before the next has its turn */
    MAX_RUNS = CHUNK / 4096,
    LZ4_BLOCK = 128 << 10,   /* compressed at a time: both sides have it in the cache then */
    SAMPLE = 32 << 10,       /* compressed to see what that would be like */
};

struct conn {
    struct conn *next;
    uint64_t id;
    int sock;
    uint32_t events; /* what epoll watches for */
    uint8_t in[REQUESTS * sizeof(struct pn_request)];
    size_t in_start, in_end;
    struct pn_request request; /* being answered: pages from `first`, `count` of them are left */
    uint8_t *kept;             /* bytes the socket had no room for */
    size_t kept_start, kept_end;
    const struct pn_source_block *file; /* then so much of this one's file */
    off_t file_at;
    size_t file_left;
    bool is_local; /* the peer is on this host, as far as its address says */
    uint8_t link;
    bool idle; /* has answered all that was asked */
    struct pn_choice choice;
    uint64_t bytes, wire; /* of the chunk being answered: of pages that are not zero, and what is sent */
    bool ended;
};

struct notice {
    struct notice *next;
    uint64_t id;
    struct pn_end end;
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
    bool stopped;
    pthread_mutex_t lock; /* commands, ended, stopped */
    struct command *commands, **last_command;
    struct notice *ended, **last_ended;
    struct conn *conns;
    struct pn_end *end; /* why the loop ends, once it does */
    bool lost;
    uint8_t *buffer; /* CHUNK bytes, or one unit if that is larger */
    size_t buffer_size;
    uint8_t *packed; /* what the buffer becomes when compressed */
    void *pack_state;
    struct pn_links *links;
    _Atomic uint64_t asked[PN_BACKGROUND + 1]; /* pages, by class */
};

/* One stretch of a chunk: zero or not. */
struct stretch {
    uint64_t pages;
    int zero;
};

/* ---- life ---- */

struct pn_source *pn_source_new(const struct pn_source_block *blocks, uint64_t count, struct pn_links *links, int ended_fd) {
    struct pn_source *source = calloc(1, sizeof *source);
    if (!source)
        return NULL;
    *source = (struct pn_source){
        .blocks = blocks, .block_count = count, .ended_fd = ended_fd, .buffer_size = CHUNK,
        .epoll = epoll_create1(EPOLL_CLOEXEC), .wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .buffer = malloc(CHUNK),
        .packed = malloc(PN_MAX_LZ4_BYTES), .pack_state = malloc(pn_pack_state()), .links = links,
    };
    source->last_command = &source->commands;
    source->last_ended = &source->ended;
    pthread_mutex_init(&source->lock, NULL);
    struct epoll_event wake = {.events = EPOLLIN, .data.ptr = NULL};
    if (source->epoll < 0 || source->wake_fd < 0 || !source->buffer || !source->packed || !source->pack_state ||
        epoll_ctl(source->epoll, EPOLL_CTL_ADD, source->wake_fd, &wake)) {
        pn_source_free(source);
        return NULL;
    }
    return source;
}

static void free_conn(struct conn *conn) {
    close(conn->sock);
    free(conn->kept);
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
    if (source->epoll >= 0)
        close(source->epoll);
    if (source->wake_fd >= 0)
        close(source->wake_fd);
    pthread_mutex_destroy(&source->lock);
    free(source->buffer);
    free(source->packed);
    free(source->pack_state);
    free(source);
}

/* ---- words from other threads ---- */

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

/* Over the loopback device, or not over the network at all. */
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

int pn_source_add(struct pn_source *source, int sock, uint64_t id, uint32_t link, const void *unread, uint64_t length) {
    struct conn *conn = calloc(1, sizeof *conn);
    if (!conn)
        return -ENOMEM;
    if (length > sizeof conn->in) {
        free(conn);
        return -EMSGSIZE;
    }
    conn->id = id;
    conn->sock = sock;
    conn->is_local = is_local(sock);
    conn->link = (uint8_t)link;
    conn->idle = true;
    pn_choice_init(&conn->choice);
    memcpy(conn->in, unread, length);
    conn->in_end = length;
    int error = command(source, conn, id);
    if (error)
        free(conn);
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

/* ---- the end of a connection, or of the memory ---- */

static void end_conn(struct pn_source *source, struct conn *conn, enum pn_end_kind kind, int error, const char *text) {
    if (conn->ended)
        return;
    conn->ended = true;
    struct notice *notice = calloc(1, sizeof *notice);
    if (!notice)
        return;
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
    return page - source->blocks[low].first < source->blocks[low].pages ? &source->blocks[low] : NULL;
}

static bool process_ended(const struct pn_source_block *block) {
    struct pollfd gone = {.fd = block->pidfd, .events = POLLIN};
    return poll(&gone, 1, 0) > 0;
}

static void lose_end(struct pn_source *source, const struct pn_source_block *block, uint64_t at) {
    lose(source, "source %s cannot be read any more: it ends at byte %llu of %llu", block->name, (unsigned long long)at,
         (unsigned long long)(block->pages * block->page_size));
}

static bool read_file(struct pn_source *source, const struct pn_source_block *block, uint64_t at, uint8_t *into, size_t size) {
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

static bool read_pages(struct pn_source *source, const struct pn_source_block *block, uint64_t page, uint8_t *into, size_t size) {
    uint64_t offset = (page - block->first) * block->page_size;
    if (block->pid <= 0)
        return read_file(source, block, offset, into, size);
    int error = pn_read_process(block->pid, block->address + offset, into, size);
    /* The number may have gone to another process meanwhile; not while ours was still there after the read. */
    bool ended = process_ended(block);
    if (ended)
        lose(source, "process %d has ended", block->pid);
    else if (error)
        lose(source, "cannot read process %d at %#llx: %s", block->pid, (unsigned long long)(block->address + offset),
             strerror(-error));
    return !ended && !error;
}

/* Nothing but a hole from this page on, for so many pages. */
static bool is_hole(const struct pn_source_block *block, uint64_t page, uint64_t pages) {
    return block->pid <= 0 && pn_is_hole(block->fd, (page - block->first) * block->page_size, pages * block->page_size);
}

/* Whether the unit of a file is zero, without reading more of it than that takes. */
static int unit_is_zero(struct pn_source *source, const struct pn_source_block *block, uint64_t page, size_t size) {
    uint64_t word, offset = (page - block->first) * block->page_size;
    if (!read_file(source, block, offset, (uint8_t *)&word, sizeof word))
        return -1;
    if (word)
        return 0;
    if (!read_file(source, block, offset, source->buffer, size))
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

/* Bytes that the socket refused, to be sent before anything else. */
static bool keep(struct pn_source *source, struct conn *conn, const struct iovec *parts, int count, size_t sent) {
    size_t rest = 0;
    for (int i = 0; i < count; i++)
        rest += parts[i].iov_len;
    conn->kept = malloc(rest); /* which is more than there is to keep, and simple */
    if (!conn->kept) {
        end_conn(source, conn, PN_END_NO_MEMORY, ENOMEM, "");
        return false;
    }
    conn->kept_start = conn->kept_end = 0;
    for (int i = 0; i < count; i++) {
        size_t skip = sent < parts[i].iov_len ? sent : parts[i].iov_len;
        memcpy(conn->kept + conn->kept_end, (uint8_t *)parts[i].iov_base + skip, parts[i].iov_len - skip);
        conn->kept_end += parts[i].iov_len - skip;
        sent -= skip;
    }
    return true;
}

static ssize_t try_send(struct pn_source *source, struct conn *conn, struct msghdr *message, int flags) {
    ssize_t sent;
    do {
        sent = sendmsg(conn->sock, message, MSG_DONTWAIT | MSG_NOSIGNAL | flags);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno != EAGAIN) {
        end_conn(source, conn, PN_END_BROKEN, errno, "");
        return -1;
    }
    return sent < 0 ? 0 : sent;
}

static bool send_parts(struct pn_source *source, struct conn *conn, struct iovec *parts, int count, int flags) {
    size_t total = 0;
    for (int i = 0; i < count; i++)
        total += parts[i].iov_len;
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    ssize_t sent = try_send(source, conn, &message, flags);
    if (sent < 0)
        return false;
    return (size_t)sent == total || keep(source, conn, parts, count, (size_t)sent);
}

static bool send_kept(struct pn_source *source, struct conn *conn) {
    struct iovec part = {conn->kept + conn->kept_start, conn->kept_end - conn->kept_start};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t sent = try_send(source, conn, &message, conn->file_left ? MSG_MORE : 0);
    if (sent < 0)
        return false;
    conn->kept_start += (size_t)sent;
    if (conn->kept_start == conn->kept_end) {
        free(conn->kept);
        conn->kept = NULL;
    }
    return !conn->kept;
}

static bool send_file(struct pn_source *source, struct conn *conn) {
    while (conn->file_left) {
        ssize_t sent = sendfile(conn->sock, conn->file->fd, &conn->file_at, conn->file_left);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN)
            return false;
        if (sent < 0)
            end_conn(source, conn, PN_END_BROKEN, errno, "");
        else if (sent == 0) /* the header promised more than there is: this connection can only be cut */
            lose_end(source, conn->file, (uint64_t)conn->file_at);
        if (sent <= 0)
            return false;
        conn->file_left -= (size_t)sent;
    }
    return true;
}

/* Whether nothing waits for the socket any more. */
static bool flush(struct pn_source *source, struct conn *conn) {
    if (conn->kept && !send_kept(source, conn))
        return false;
    return send_file(source, conn);
}

static struct pn_reply reply_to(const struct pn_request *request, uint8_t encoding, uint64_t pages, uint64_t length) {
    return (struct pn_reply){.id = request->id, .class_ = request->class_, .encoding = encoding, .first = request->first,
                             .count = (uint32_t)pages, .length = (uint32_t)length};
}

static size_t at_most(size_t size, size_t limit) { return size < limit ? size : limit; }

static void advance(struct pn_request *request, uint64_t pages) {
    request->first += pages;
    request->count -= (uint32_t)pages;
}

static void tell_lost(struct pn_source *source, struct conn *conn) {
    size_t length = strnlen(source->end->text, PN_MAX_REASON_BYTES);
    struct pn_reply reply = reply_to(&conn->request, PN_FAILED, conn->request.count, length);
    struct iovec parts[] = {{&reply, sizeof reply}, {source->end->text, length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (!conn->kept && !conn->file_left)
        try_send(source, conn, &message, 0);
}

/* ---- answering ---- */

static void answer_zero(struct pn_source *source, struct conn *conn, uint64_t pages) {
    struct pn_reply reply = reply_to(&conn->request, PN_ZEROS, pages, 0);
    struct iovec part = {&reply, sizeof reply};
    conn->wire += sizeof reply;
    advance(&conn->request, pages);
    send_parts(source, conn, &part, 1, 0);
}

/* Whether the request's next pages are to be compressed. */
static bool packs(const struct pn_source *source, const struct conn *conn) {
    const struct pn_request *request = &conn->request;
    if (!(request->encodings & 1 << PN_LZ4))
        return false;
    if (!(request->encodings & 1 << PN_RAW)) /* it wants what can be had, whatever that costs */
        return true;
    if (request->class_ == PN_BACKGROUND)
        return pn_choice_packs(&conn->choice);
    return atomic_load_explicit((_Atomic uint8_t *)&source->links->prompt[conn->link], memory_order_relaxed);
}

/* Compress pages, if that makes them smaller: into how many bytes, or 0. */
static size_t pack(struct pn_source *source, struct conn *conn, const uint8_t *pages, size_t size, uint8_t *to) {
    uint64_t began = pn_now(), length = pn_pack(source->pack_state, pages, size, to);
    pn_choice_tried(&conn->choice, size, length, pn_now() - began);
    return length;
}

static bool is_choosing(const struct conn *conn) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return conn->request.class_ == PN_BACKGROUND && (conn->request.encodings & both) == both;
}

/* Whether to see what compressing the pages at hand would be like. */
static bool wants_sample(const struct conn *conn) {
    return is_choosing(conn) && pn_choice_wants_sample(&conn->choice, conn->choice.mark);
}

/* Headers and payloads of what is sent at once. */
struct batch {
    struct pn_reply replies[MAX_RUNS];
    struct iovec parts[2 * MAX_RUNS];
    int runs, count;
};

static void add_reply(struct batch *batch, struct conn *conn, uint8_t encoding, uint64_t pages, uint8_t *payload, size_t length) {
    batch->replies[batch->runs] = reply_to(&conn->request, encoding, pages, length);
    batch->parts[batch->count++] = (struct iovec){&batch->replies[batch->runs++], sizeof batch->replies[0]};
    if (length)
        batch->parts[batch->count++] = (struct iovec){payload, length};
    conn->wire += sizeof batch->replies[0] + length;
    advance(&conn->request, pages);
}

/* Pages that are not zero, in blocks of whole units, each compressed if that makes it smaller. */
static void add_packed(struct pn_source *source, struct batch *batch, struct conn *conn, uint8_t *at, uint64_t pages,
                       uint64_t page_size, uint64_t unit, uint8_t **to) {
    uint64_t most = LZ4_BLOCK / page_size / unit * unit;
    for (uint64_t here; pages; pages -= here, at += here * page_size) {
        here = !most ? unit : pages < most ? pages : most;
        size_t size = here * page_size, length = size <= PN_MAX_LZ4_BYTES ? pack(source, conn, at, size, *to) : 0;
        if (length)
            add_reply(batch, conn, PN_LZ4, here, *to, length);
        else
            add_reply(batch, conn, PN_RAW, here, at, size);
        *to += length;
    }
}

/* Read the pages, and send headers and payload of all stretches at once. */
static void answer_by_copy(struct pn_source *source, struct conn *conn, const struct pn_source_block *block, uint64_t pages,
                           uint64_t unit, bool packing) {
    if (!read_pages(source, block, conn->request.first, source->buffer, pages * block->page_size))
        return;
    struct batch batch;
    batch.runs = batch.count = 0;
    uint8_t *at = source->buffer, *to = source->packed;
    for (uint64_t left = pages; left;) {
        int zero;
        uint64_t run = pn_zero_run(at, left / unit, unit * block->page_size, &zero) * unit;
        size_t size = run * block->page_size;
        if (!zero)
            conn->bytes += size;
        if (zero) {
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
    send_parts(source, conn, batch.parts, batch.count, 0);
}

/* One stretch of the chunk: look where it ends, then let the kernel send it from the file. */
static void answer_by_sendfile(struct pn_source *source, struct conn *conn, const struct pn_source_block *block, uint64_t pages,
                               uint64_t unit) {
    struct stretch stretches[2];
    int count = 0;
    uint64_t done = 0;
    for (; done < pages && count < 2; done += unit) {
        int zero = unit_is_zero(source, block, conn->request.first + done, unit * block->page_size);
        if (zero < 0)
            return;
        append(stretches, &count, unit, zero);
    }
    if (stretches[0].zero) {
        answer_zero(source, conn, stretches[0].pages);
        return;
    }
    size_t size = stretches[0].pages * block->page_size;
    if (size < SENDFILE_MIN) { /* splintered by zero pages: not worth a sendfile each */
        answer_by_copy(source, conn, block, pages, unit, false);
        return;
    }
    struct pn_reply reply = reply_to(&conn->request, PN_RAW, stretches[0].pages, size);
    struct iovec part = {&reply, sizeof reply};
    if (wants_sample(conn)) {
        if (!read_pages(source, block, conn->request.first, source->buffer, at_most(size, SAMPLE)))
            return;
        pack(source, conn, source->buffer, at_most(size, SAMPLE), source->packed);
    }
    conn->bytes += size;
    conn->wire += sizeof reply + size;
    conn->file = block;
    conn->file_at = (off_t)((conn->request.first - block->first) * block->page_size);
    conn->file_left = size;
    advance(&conn->request, stretches[0].pages);
    if (send_parts(source, conn, &part, 1, MSG_MORE) && !conn->kept)
        send_file(source, conn);
}

static bool make_room(struct pn_source *source, size_t size) {
    if (size <= source->buffer_size)
        return true;
    uint8_t *larger = realloc(source->buffer, size);
    if (!larger)
        return false;
    source->buffer = larger;
    source->buffer_size = size;
    return true;
}

static void answer_pages(struct pn_source *source, struct conn *conn) {
    const struct pn_request *request = &conn->request;
    const struct pn_source_block *block = block_of(source, request->first);
    uint64_t unit = 1ull << request->unit_shift, most = CHUNK / block->page_size / unit * unit;
    uint64_t pages = request->count < most ? request->count : most ? most : unit;
    bool packing = packs(source, conn);
    if (!make_room(source, unit * block->page_size))
        end_conn(source, conn, PN_END_NO_MEMORY, ENOMEM, "");
    else if (block->pid > 0 || pages * block->page_size < SENDFILE_MIN) /* a hole reads as zeros: no need to ask for it */
        answer_by_copy(source, conn, block, pages, unit, packing);
    else if (is_hole(block, request->first, request->count))
        answer_zero(source, conn, request->count);
    else if (packing || conn->is_local) /* sendfile would leave the copying, from cold memory, to the destination's busier loop */
        answer_by_copy(source, conn, block, pages, unit, packing);
    else
        answer_by_sendfile(source, conn, block, pages, unit);
    if (source->lost)
        tell_lost(source, conn);
}

/* Nothing was asked for and everything had arrived: the time until now says nothing about the link. */
static bool was_drained(struct conn *conn) {
    int waiting = 0;
    bool idle = conn->idle;
    conn->idle = false;
    return idle && !ioctl(conn->sock, SIOCOUTQ, &waiting) && !waiting;
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
    atomic_store_explicit((_Atomic uint8_t *)&source->links->prompt[conn->link], (uint8_t)pn_choice_prompt(&conn->choice),
                          memory_order_relaxed);
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

/* The same rules, and words, as pagenet/protocol.py's RequestDecoder. */
static bool check_request(struct pn_source *source, struct conn *conn, const struct pn_request *request) {
    const struct pn_source_block *last = &source->blocks[source->block_count - 1], *block = block_of(source, request->first);
    if (request->reserved || request->reserved2)
        return is_wrong(source, conn, "the peer's request has reserved bits set");
    if (!block || !request->count || request->count > block->pages - (request->first - block->first))
        return is_wrong(source, conn, "the peer asks for %u pages from page %llu on: not within one block of the %llu pages",
                        request->count, (unsigned long long)request->first, (unsigned long long)(last->first + last->pages));
    uint64_t unit = 1ull << (request->unit_shift & 63), size = request->count * block->page_size;
    if (request->unit_shift > PN_MAX_UNIT_SHIFT || unit * block->page_size > PN_MAX_UNIT_BYTES ||
        (request->first - block->first) % unit || request->count % unit)
        return is_wrong(source, conn, "the peer's request is not made of whole units of 2**%u pages", request->unit_shift);
    if (size > PN_MAX_REQUEST_BYTES && request->count > unit)
        return is_wrong(source, conn, "the peer asks for %llu bytes at once (limit %d)", (unsigned long long)size,
                        PN_MAX_REQUEST_BYTES);
    if (request->class_ > PN_BACKGROUND)
        return is_wrong(source, conn, "the peer names transfer class %u, which is unknown", request->class_);
    return true;
}

/* Whether there is a request to answer. */
static bool next_request(struct pn_source *source, struct conn *conn) {
    if (conn->request.count)
        return true;
    if (conn->in_end - conn->in_start < sizeof conn->request)
        return false;
    memcpy(&conn->request, conn->in + conn->in_start, sizeof conn->request);
    conn->in_start += sizeof conn->request;
    if (!check_request(source, conn, &conn->request))
        return false;
    atomic_fetch_add_explicit(&source->asked[conn->request.class_], conn->request.count, memory_order_relaxed);
    return true;
}

uint64_t pn_source_asked(const struct pn_source *source, int class_) {
    return atomic_load_explicit(&source->asked[class_], memory_order_relaxed);
}

/* True: it could go on at once, but others have their turn. */
static bool answer(struct pn_source *source, struct conn *conn) {
    for (int turn = 0; turn < TURNS && !conn->ended && !source->lost; turn++) {
        if (!flush(source, conn))
            return false;
        if (!next_request(source, conn)) {
            conn->idle = true;
            return false;
        }
        answer_chunk(source, conn);
    }
    return true;
}

/* ---- the loop ---- */

static void receive(struct pn_source *source, struct conn *conn) {
    memmove(conn->in, conn->in + conn->in_start, conn->in_end - conn->in_start);
    conn->in_end -= conn->in_start;
    conn->in_start = 0;
    if (conn->in_end == sizeof conn->in)
        return;
    ssize_t got = recv(conn->sock, conn->in + conn->in_end, sizeof conn->in - conn->in_end, MSG_DONTWAIT);
    if (got > 0)
        conn->in_end += (size_t)got;
    else if (got < 0 && errno != EAGAIN && errno != EINTR)
        end_conn(source, conn, PN_END_BROKEN, errno, "");
    else if (got == 0 && conn->in_end % sizeof(struct pn_request))
        end_conn(source, conn, PN_END_PROTOCOL, 0, "the peer closed in the middle of a request");
    else if (got == 0)
        end_conn(source, conn, PN_END_CLOSED, 0, "");
}

static void forget(struct pn_source *source, struct conn *conn) {
    struct conn **at = &source->conns;
    while (*at != conn)
        at = &(*at)->next;
    *at = conn->next;
    /* Closing would do, but not while a child that was forked just now, and has not yet become another program, holds a copy. */
    epoll_ctl(source->epoll, EPOLL_CTL_DEL, conn->sock, NULL);
    free_conn(conn);
}

static void watch(struct pn_source *source, struct conn *conn, bool more) {
    bool busy = more || conn->kept || conn->file_left;
    bool full = conn->in_end - conn->in_start == sizeof conn->in;
    uint32_t events = (full ? 0 : EPOLLIN) | (busy ? EPOLLOUT : 0);
    struct epoll_event event = {.events = events, .data.ptr = conn};
    if (events != conn->events)
        epoll_ctl(source->epoll, EPOLL_CTL_MOD, conn->sock, &event);
    conn->events = events;
}

static void serve(struct pn_source *source, struct conn *conn, bool readable) {
    if (readable)
        receive(source, conn);
    bool more = answer(source, conn);
    if (conn->ended)
        forget(source, conn);
    else
        watch(source, conn, more);
}

static void add(struct pn_source *source, struct conn *conn) {
    conn->next = source->conns;
    source->conns = conn;
    conn->events = EPOLLIN;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (epoll_ctl(source->epoll, EPOLL_CTL_ADD, conn->sock, &event))
        end_conn(source, conn, PN_END_BROKEN, errno, "");
    serve(source, conn, false);
}

static void remove_by_id(struct pn_source *source, uint64_t id) {
    for (struct conn *conn = source->conns; conn; conn = conn->next)
        if (conn->id == id) {
            end_conn(source, conn, PN_END_STOPPED, 0, "");
            forget(source, conn);
            return;
        }
}

static bool obey(struct pn_source *source) {
    eventfd_t value;
    (void)!eventfd_read(source->wake_fd, &value);
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
        int count = epoll_wait(source->epoll, events, 64, -1);
        bool commands = false;
        for (int i = 0; i < count && !source->lost; i++)
            if (events[i].data.ptr)
                serve(source, events[i].data.ptr, events[i].events & ~(uint32_t)EPOLLOUT);
            else
                commands = true;
        if (commands) /* last: they may take away a connection that has an event here */
            go_on = obey(source);
    }
}

void pn_source_run(struct pn_source *source, int background, struct pn_end *end) {
    *end = (struct pn_end){.kind = PN_END_STOPPED};
    source->end = end;
    int error = pn_run_loop(background, loop, source);
    if (error)
        lose(source, "no thread to serve from: %s", strerror(-error));
}
