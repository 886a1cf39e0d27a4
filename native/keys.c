/* The source over RDMA: it registers its memory chunk by chunk as keys are asked for, and keeps it
 * registered as long as a destination has them.
 *
 * Each reader has a queue pair, a socket, and a loop that answers there, in a thread of its own.
 * All readers share what is registered, under one lock: they would wait for the same memory anyway.
 */
#define _GNU_SOURCE
#include "keys.h"
#include "sock.h"
#include "thread.h"
#include "verbs.h"
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

enum { LAST_WORDS_NS = 1000000000 };

/* Registered while a reader has its key. */
struct chunk {
    struct ibv_mr *mr;
    void *copy; /* what is registered, where the memory itself cannot be */
    uint64_t size;
    uint32_t holders;
    struct key key;
};

struct pn_keys {
    struct pn_keys_config config;
    struct pn_verbs verbs;
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct chunk *chunks;
    pthread_mutex_t lock; /* chunks, pinned, granted */
    uint64_t pinned, granted;
};

struct pn_reader {
    struct pn_keys *keys;
    struct ibv_cq *queue;
    struct ibv_qp *pair;
    bool *has; /* whether it has the key, of each chunk */
    uint32_t held;
    struct pn_end *end;
    struct sock sock;
    int stop_fd;
    bool ended;
    uint8_t inbox[4096], outbox[4096];
    size_t in_count, out_count;
};

/* One chunk, and where it lies. */
struct place {
    const struct pn_source_block *block;
    uint64_t number, first, count;
};

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static void end_reader(struct pn_reader *reader, enum pn_end_kind kind, int error,
                       const char *format, ...) {
    if (reader->ended)
        return;
    reader->ended = true;
    reader->end->kind = kind;
    reader->end->error = error;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reader->end->text, sizeof reader->end->text, format, arguments);
    va_end(arguments);
}

static void end_socket(struct pn_reader *reader) {
    struct pn_end end;
    if (pn_sock_end(&reader->sock, &end))
        end_reader(reader, end.kind, end.error, "%s", end.text);
}

/* ---- chunks ---- */

static uint64_t pages_per_chunk(const struct pn_keys *keys, const struct pn_source_block *block) {
    return block->page_size < keys->config.chunk_size ? keys->config.chunk_size / block->page_size
                                                      : 1;
}

/* Finds the chunk of `count` pages from page `first` on. False: there is none. */
static bool find(const struct pn_keys *keys, uint64_t first, uint64_t count, struct place *place) {
    uint64_t number = 0;
    for (uint64_t i = 0; i < keys->config.block_count; i++) {
        const struct pn_source_block *block = &keys->config.blocks[i];
        uint64_t pages = pages_per_chunk(keys, block), at = first - block->first;
        if (first >= block->first && at < block->pages) {
            *place = (struct place){
                .block = block, .number = number + at / pages, .first = first, .count = count};
            return at % pages == 0 && count == min(pages, block->pages - at);
        }
        number += (block->pages + pages - 1) / pages;
    }
    return false;
}

static void forget(struct pn_keys *keys, struct chunk *chunk) {
    if (chunk->mr)
        keys->verbs.dereg_mr(chunk->mr);
    if (chunk->copy)
        munmap(chunk->copy, chunk->size);
    *chunk = (struct chunk){0};
}

static bool cannot_read(struct pn_reader *reader, const struct place *place, int error) {
    const struct pn_source_block *block = place->block;
    if (error == -ENODATA)
        end_reader(
            reader, PN_END_FAILED, 0, "source %s cannot be read any more: it ends before byte %llu",
            block->name,
            (unsigned long long)((place->first - block->first + place->count) * block->page_size));
    else if (block->pid > 0)
        end_reader(reader, PN_END_FAILED, 0, "cannot read process %d: %s", block->pid,
                   strerror(-error));
    else
        end_reader(reader, PN_END_FAILED, 0, "source %s cannot be read any more: %s", block->name,
                   strerror(-error));
    return false;
}

static bool copy_file(struct pn_reader *reader, const struct place *place, char *to,
                      uint64_t offset, uint64_t size) {
    for (uint64_t done = 0; done < size;) {
        ssize_t got = pread(place->block->fd, to + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return cannot_read(reader, place, got ? -errno : -ENODATA);
        done += (uint64_t)got;
    }
    return true;
}

/* The pid may belong to another process by now, but not if our process still runs after the
 * read. */
static bool copy_process(struct pn_reader *reader, const struct place *place, char *to,
                         uint64_t offset, uint64_t size) {
    const struct pn_source_block *block = place->block;
    int error = pn_read_process(block->pid, block->address + offset, to, size);
    struct pollfd gone = {.fd = block->pidfd, .events = POLLIN};
    if (poll(&gone, 1, 0) > 0)
        end_reader(reader, PN_END_FAILED, 0, "process %d has ended", block->pid);
    else if (error)
        cannot_read(reader, place, error);
    return !reader->ended;
}

static bool make_copy(struct pn_reader *reader, const struct place *place, struct chunk *chunk,
                      uint64_t offset) {
    void *copy =
        mmap(NULL, chunk->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED) {
        end_reader(reader, PN_END_BROKEN, errno, "cannot copy memory for RDMA: %s",
                   strerror(errno));
        return false;
    }
    chunk->copy = copy;
    bool of_file = place->block->fd >= 0;
    return (of_file ? copy_file : copy_process)(reader, place, copy, offset, chunk->size);
}

/* Sets the bit of each page that is zero. Returns whether all are. */
static bool map_zeros(const struct place *place, const char *pages, uint64_t *bits) {
    uint64_t zeros = 0, count = 0;
    for (uint64_t at = 0; at < place->count; at += count) {
        int zero;
        count = pn_zero_run(pages + at * place->block->page_size, place->count - at,
                            place->block->page_size, &zero);
        zeros += zero ? count : 0;
        for (uint64_t i = at; zero && i < at + count; i++)
            bits[i / 64] |= 1ull << i % 64;
    }
    return zeros == place->count;
}

static void register_at(struct pn_keys *keys, struct chunk *chunk, void *address) {
    chunk->mr = keys->verbs.reg_mr(keys->pd, address, chunk->size, IBV_ACCESS_REMOTE_READ);
    if (chunk->mr)
        chunk->key = (struct key){.address = (uintptr_t)address, .rkey = chunk->mr->rkey};
}

/* Registers a chunk. A file is registered where it is mapped, but its zeros are looked for by
 * reading it, because pread() reports that a file has become shorter. Memory that is no file, or
 * whose mapping this kernel does not register, is copied. */
static enum key_answer make_chunk(struct pn_reader *reader, const struct place *place,
                                  struct chunk *chunk) {
    struct pn_keys *keys = reader->keys;
    const struct pn_source_block *block = place->block;
    uint64_t zeros[4] = {0}, offset = (place->first - block->first) * block->page_size;
    if (block->fd >= 0) {
        if (pn_is_hole(block->fd, offset, chunk->size))
            return KEY_ZERO;
        int64_t count =
            pn_zero_map(block->fd, offset, place->count, block->page_size, (uint8_t *)zeros);
        if (count < 0) {
            cannot_read(reader, place, (int)count);
            return KEY_FAILED;
        }
        if ((uint64_t)count == place->count)
            return KEY_ZERO;
        pn_map_ahead(block->address + offset, chunk->size);
        register_at(keys, chunk, (void *)(block->address + offset));
    }
    if (block->fd < 0 || (!chunk->mr && errno == EFAULT)) {
        if (!make_copy(reader, place, chunk, offset))
            return KEY_FAILED;
        if (block->fd < 0 && map_zeros(place, chunk->copy, zeros))
            return KEY_ZERO;
        register_at(keys, chunk, chunk->copy);
    }
    if (!chunk->mr)
        return (errno == ENOMEM || errno == EPERM) && reader->held >= keys->config.in_any_case
                   ? KEY_REFUSED
                   : KEY_FAILED;
    memcpy(chunk->key.zero, zeros, sizeof zeros);
    return KEY_HERE;
}

/* Ends the reader because memory cannot be registered, with the reason in words. The limit of
 * locked memory shows as EPERM where nothing at all may be locked. */
static void cannot_register(struct pn_reader *reader, int error) {
    struct rlimit limit = {0};
    char may[32] = "any of it";
    if (error != ENOMEM && error != EPERM) {
        end_reader(reader, PN_END_BROKEN, error, "cannot register memory for RDMA: %s",
                   strerror(error));
        return;
    }
    if (!getrlimit(RLIMIT_MEMLOCK, &limit) && limit.rlim_cur != RLIM_INFINITY)
        snprintf(may, sizeof may, "%llu KiB", (unsigned long long)limit.rlim_cur >> 10);
    end_reader(reader, PN_END_BROKEN, error,
               "cannot register memory for RDMA: %s (RDMA locks memory, and this process may lock "
               "%s: say `ulimit -l unlimited` "
               "before, or give it CAP_IPC_LOCK)",
               strerror(error), may);
}

/* ---- keys ---- */

static enum key_answer take_locked(struct pn_reader *reader, const struct place *place,
                                   struct chunk *chunk) {
    struct pn_keys *keys = reader->keys;
    uint64_t size = place->count * place->block->page_size, more = chunk->holders ? 0 : size;
    /* A chunk that another connection has counts too: once that one gives it back, it is pinned for
     * this one alone. */
    if (reader->held >= keys->config.in_any_case && keys->pinned + more > keys->config.pin_limit)
        return KEY_REFUSED;
    if (!chunk->holders) {
        chunk->size = size;
        errno = 0;
        enum key_answer answer = make_chunk(reader, place, chunk);
        int error = errno;
        if (answer != KEY_HERE)
            forget(keys, chunk);
        if (answer == KEY_FAILED)
            cannot_register(reader, error); /* unless there is another reason already */
        if (answer != KEY_HERE)
            return answer;
        keys->pinned += chunk->size;
    }
    chunk->holders++;
    keys->granted += place->count;
    reader->has[place->number] = true;
    reader->held++;
    return KEY_HERE;
}

static void give_back(struct pn_reader *reader, uint64_t number) {
    struct pn_keys *keys = reader->keys;
    struct chunk *chunk = &keys->chunks[number];
    reader->has[number] = false;
    reader->held--;
    pthread_mutex_lock(&keys->lock);
    if (!--chunk->holders) {
        keys->pinned -= chunk->size;
        forget(keys, chunk);
    }
    pthread_mutex_unlock(&keys->lock);
}

/* ---- answers ---- */

static void say(struct pn_reader *reader, enum key_answer kind, const struct place *place,
                const void *body, size_t length) {
    struct key_header header = {
        .kind = (uint8_t)kind, .first = place->first, .count = (uint32_t)place->count};
    header.length = (uint32_t)length;
    memcpy(reader->outbox + reader->out_count, &header, sizeof header);
    memcpy(reader->outbox + reader->out_count + sizeof header, body, length);
    reader->out_count += sizeof header + length;
}

static void flush(struct pn_reader *reader) {
    struct iovec part = {reader->outbox, reader->out_count};
    ssize_t sent = reader->out_count ? pn_sock_send(&reader->sock, &part, 1, false) : 0;
    if (sent > 0) {
        reader->out_count -= (size_t)sent;
        memmove(reader->outbox, reader->outbox + sent, reader->out_count);
    } else if (sent < 0) {
        end_socket(reader);
    }
}

/* Tells the peer the reason, if it takes the message within LAST_WORDS_NS. The reader ends in any
 * case. */
static void say_last_words(struct pn_reader *reader, const struct place *place) {
    say(reader, KEY_FAILED, place, reader->end->text,
        strnlen(reader->end->text, PN_MAX_REASON_BYTES));
    for (uint64_t now = pn_now(), until = now + LAST_WORDS_NS; reader->out_count && now < until;
         now = pn_now()) {
        struct pollfd ready[] = {{.fd = reader->sock.fd, .events = POLLOUT},
                                 {.fd = reader->stop_fd, .events = POLLIN}};
        if (poll(ready, 2, (int)((until - now) / 1000000)) <= 0 || ready[0].revents != POLLOUT ||
            ready[1].revents)
            return;
        flush(reader);
    }
}

static void answer(struct pn_reader *reader, const struct place *place) {
    struct pn_keys *keys = reader->keys;
    struct chunk *chunk = &keys->chunks[place->number];
    if (reader->has[place->number]) {
        end_reader(reader, PN_END_PROTOCOL, 0, "the peer asks for a key that it has");
        return;
    }
    pthread_mutex_lock(&keys->lock);
    enum key_answer kind = take_locked(reader, place, chunk);
    struct key key = chunk->key;
    pthread_mutex_unlock(&keys->lock);
    if (kind == KEY_FAILED) {
        say_last_words(reader, place);
    } else {
        say(reader, kind, place, &key, kind == KEY_HERE ? sizeof key : 0);
        flush(reader); /* at once: a thread may wait for it, and the next takes a while */
    }
}

static void obey(struct pn_reader *reader, const struct key_header *asking) {
    struct place place;
    if ((asking->kind != KEY_ASK && asking->kind != KEY_RETURN) || asking->length)
        end_reader(reader, PN_END_PROTOCOL, 0, "the peer asks for no key, nor gives one back");
    else if (!find(reader->keys, asking->first, asking->count, &place))
        end_reader(reader, PN_END_PROTOCOL, 0,
                   "the peer asks for the key to %u pages from page %llu on: that is no chunk",
                   asking->count, (unsigned long long)asking->first);
    else if (asking->kind == KEY_ASK)
        answer(reader, &place);
    else if (reader->has[place.number])
        give_back(reader, place.number);
    else
        end_reader(reader, PN_END_PROTOCOL, 0, "the peer gives back a key that it does not have");
}

/* ---- the loop ---- */

static bool has_room(const struct pn_reader *reader) {
    return reader->out_count + sizeof(struct key_header) + PN_MAX_REASON_BYTES <=
           sizeof reader->outbox;
}

static void obey_all(struct pn_reader *reader) {
    size_t used = 0;
    for (struct key_header asking;
         reader->in_count - used >= sizeof asking && has_room(reader) && !reader->ended;) {
        memcpy(&asking, reader->inbox + used, sizeof asking);
        used += sizeof asking;
        obey(reader, &asking);
    }
    reader->in_count -= used;
    memmove(reader->inbox, reader->inbox + used, reader->in_count);
}

static void receive(struct pn_reader *reader) {
    ssize_t got = pn_sock_receive_some(&reader->sock, reader->inbox + reader->in_count,
                                       sizeof reader->inbox - reader->in_count);
    if (got > 0)
        reader->in_count += (size_t)got;
    else if (got == 0)
        end_reader(reader, PN_END_CLOSED, 0, "");
    else
        end_socket(reader);
}

static void loop(void *argument) {
    struct pn_reader *reader = argument;
    for (obey_all(reader); !reader->ended; obey_all(reader)) {
        bool full = !has_room(reader) || reader->in_count == sizeof reader->inbox;
        bool more = reader->sock.pending && !full;
        short events = (short)((full ? 0 : POLLIN) | (reader->out_count ? POLLOUT : 0));
        struct pollfd ready[] = {{.fd = reader->sock.fd, .events = events},
                                 {.fd = reader->stop_fd, .events = POLLIN}};
        if (poll(ready, 2, more ? 0 : -1) < 0)
            continue;
        if (ready[1].revents)
            end_reader(reader, PN_END_STOPPED, 0, "");
        if (ready[0].revents & POLLOUT)
            flush(reader);
        if (more || ready[0].revents & ~POLLOUT)
            receive(reader);
    }
}

void pn_reader_run(struct pn_reader *reader, int sock, struct pn_tls *tls, int stop_fd,
                   const void *unread, uint64_t length, struct pn_end *end) {
    *end = (struct pn_end){.kind = PN_END_STOPPED};
    reader->end = end;
    reader->sock = (struct sock){.fd = sock, .tls = tls};
    reader->stop_fd = stop_fd;
    reader->in_count = min(length, sizeof reader->inbox);
    memcpy(reader->inbox, unread, reader->in_count);
    if (pn_run_loop(0, loop, reader))
        end_reader(reader, PN_END_BROKEN, ENOMEM, "%s", strerror(ENOMEM));
}

/* ---- life ---- */

struct pn_reader *pn_reader_new(struct pn_keys *keys, int *error) {
    struct pn_reader *reader = calloc(1, sizeof *reader);
    *error = -ENOMEM;
    if (!reader)
        return NULL;
    errno = 0;
    reader->keys = keys;
    reader->has = calloc(keys->config.chunk_count, sizeof *reader->has);
    if (reader->has && (reader->queue = keys->verbs.create_cq(keys->context, 1, NULL, NULL, 0)))
        reader->pair = pn_verbs_make_pair(&keys->verbs, keys->pd, reader->queue, 1,
                                          keys->config.port, IBV_ACCESS_REMOTE_READ);
    if (reader->pair) {
        *error = 0;
        return reader;
    }
    *error = errno ? -errno : -ENOMEM;
    pn_reader_free(reader);
    return NULL;
}

uint32_t pn_reader_number(const struct pn_reader *reader) { return reader->pair->qp_num; }

int pn_reader_connect(struct pn_reader *reader, uint32_t psn, const struct pn_rdma_peer *peer) {
    const struct pn_keys_config *config = &reader->keys->config;
    struct pn_verbs_join join = {.port = config->port, .gid_index = config->gid_index, .psn = psn};
    join.reads = peer->reads;
    join.access = IBV_ACCESS_REMOTE_READ;
    return pn_verbs_join_pair(&reader->keys->verbs, reader->pair, &join, peer);
}

/* The queue pair goes first: nothing is read through it after that. */
void pn_reader_free(struct pn_reader *reader) {
    struct pn_keys *keys = reader->keys;
    if (reader->pair)
        keys->verbs.destroy_qp(reader->pair);
    if (reader->queue)
        keys->verbs.destroy_cq(reader->queue);
    for (uint64_t i = 0; reader->held && i < keys->config.chunk_count; i++)
        if (reader->has[i])
            give_back(reader, i);
    free(reader->has);
    free(reader);
}

struct pn_keys *pn_keys_new(const struct pn_keys_config *config, int *error) {
    struct pn_keys *keys = calloc(1, sizeof *keys);
    *error = -ENOMEM;
    if (!keys)
        return NULL;
    keys->config = *config;
    pthread_mutex_init(&keys->lock, NULL);
    errno = 0;
    keys->chunks = calloc(config->chunk_count, sizeof *keys->chunks);
    *error = keys->chunks ? pn_verbs_load(&keys->verbs) : -ENOMEM;
    if (!*error && (!(keys->context = pn_verbs_open(&keys->verbs, config->device)) ||
                    !(keys->pd = keys->verbs.alloc_pd(keys->context))))
        *error = errno ? -errno : -ENODEV;
    if (!*error)
        return keys;
    pn_keys_free(keys);
    return NULL;
}

static uint64_t locked(struct pn_keys *keys, const uint64_t *number) {
    pthread_mutex_lock(&keys->lock);
    uint64_t value = *number;
    pthread_mutex_unlock(&keys->lock);
    return value;
}

uint64_t pn_keys_pinned(struct pn_keys *keys) { return locked(keys, &keys->pinned); }

uint64_t pn_keys_granted(struct pn_keys *keys) { return locked(keys, &keys->granted); }

void pn_keys_free(struct pn_keys *keys) {
    if (keys->pd)
        keys->verbs.dealloc_pd(keys->pd);
    if (keys->context)
        keys->verbs.close_device(keys->context);
    pn_verbs_unload(&keys->verbs);
    pthread_mutex_destroy(&keys->lock);
    free(keys->chunks);
    free(keys);
}
