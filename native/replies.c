/* Replies: headers, payload, and placing what came. */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>

static struct slot *slot_of(struct stream *stream, uint32_t id) {
    struct slot *slot = &stream->slots[id % SLOTS];
    return slot->open && slot->id == id ? slot : NULL;
}

static void close_slot(struct stream *stream, struct slot *slot) {
    slot->open = 0;
    stream->free_slots[stream->free_count++] = (uint32_t)(slot - stream->slots);
}

static bool is_wrong(struct stream *stream, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pn_lane_end(&stream->lane, PN_END_PROTOCOL, 0, "%s", text);
    return false;
}

static bool check_pages(struct stream *stream, const struct pn_reply *reply,
                        const struct slot *slot) {
    unsigned shift = (unsigned)slot->piece->shift;
    if (reply->first != slot->next || !reply->count || reply->count > slot->end - slot->next ||
        reply->count & ((1u << shift) - 1))
        return is_wrong(stream, "the peer answers out of turn: with %u pages from page %llu on",
                        reply->count, (unsigned long long)reply->first);
    uint64_t size = (reply->count >> shift) * slot->piece->page_size;
    bool fits = reply->encoding == PN_LZ4 ? reply->length && reply->length < size
                                          : reply->length == (reply->encoding ? 0 : size);
    if (!fits)
        return is_wrong(stream, "the peer announces %u bytes for %u pages of %llu bytes in all",
                        reply->length, reply->count,
                        (unsigned long long)(reply->encoding == PN_ZEROS ? 0 : size));
    if (reply->encoding == PN_LZ4 && size > PN_MAX_LZ4_BYTES)
        return is_wrong(stream, "the peer compresses %llu bytes at once (limit %d)",
                        (unsigned long long)size, PN_MAX_LZ4_BYTES);
    return true;
}

/* The rules and messages are those of OutstandingRequests in pagenet/protocol.py. */
static bool check_reply(struct stream *stream, const struct pn_reply *reply,
                        const struct slot *slot) {
    if (!slot)
        return is_wrong(stream, "the peer answers request %u, which is not open", reply->id);
    if (reply->class_ != slot->class_ || reply->reserved)
        return is_wrong(stream, "the peer's reply is of another class than its request");
    if (reply->encoding == PN_LZ4 && !(stream->lane.dest->config.encodings & 1 << PN_LZ4))
        return is_wrong(stream, "the peer compresses with lz4, which was not asked for");
    if (reply->encoding > PN_LZ4 && reply->encoding != PN_FAILED)
        return is_wrong(stream, "the peer names encoding %u, which is unknown", reply->encoding);
    if (reply->encoding != PN_FAILED)
        return check_pages(stream, reply, slot);
    if (reply->length > PN_MAX_REASON_BYTES)
        return is_wrong(stream, "the peer announces a reason of %u bytes (limit %d)", reply->length,
                        PN_MAX_REASON_BYTES);
    return true;
}

/* ---- placing ---- */

/* The owner's memory is changing, and the owner waits for its events to be read: reads them, or
 * lets the loop that reads them run. */
static void let_change(struct lane *lane) {
    if (!lane->faults.asking || !pn_lane_take_faults(lane))
        sched_yield();
    struct pollfd stop = {.fd = lane->config->stop_fd, .events = POLLIN};
    if (poll(&stop, 1, 0) > 0)
        pn_lane_end(lane, PN_END_STOPPED, 0, "");
}

/* Places pages that were taken, whatever their owner does meanwhile. */
static void put_all(struct lane *lane, struct run run, const uint8_t *bytes, bool zero) {
    while (run.count && !lane->ended) {
        uint64_t done;
        int error = pn_put(lane->dest, run.class_, run.first, run.count, bytes, zero, &done);
        run.first += done;
        run.count -= done;
        bytes = bytes ? bytes + done * run.piece->page_size : NULL;
        if (error == -EAGAIN)
            let_change(lane);
        else if (error)
            pn_lane_end_placing(lane, error);
    }
    pn_check_done(lane->dest);
}

void pn_lane_put(struct lane *lane, const struct run *run) { put_all(lane, *run, NULL, false); }

/* Places pages that this lane has taken. */
static void place_taken(struct lane *lane, const struct run *run, const uint8_t *bytes) {
    const struct pn_piece *piece = run->piece;
    if (!bytes && pn_leave_zeros(lane->dest, run->class_, piece, run->first, run->count)) {
        pn_check_done(lane->dest);
        return;
    }
    int error =
        piece->second ? pn_write_shared(lane->dest, piece, run->first, run->count, bytes) : 0;
    if (error)
        pn_lane_end_placing(lane, error);
    else
        put_all(lane, *run, piece->second ? NULL : bytes, !bytes);
}

void pn_lane_place(struct lane *lane, const struct run *run, const void *bytes) {
    uint64_t page_size = run->piece->page_size;
    for (uint64_t done = 0; done < run->count && !lane->ended;) {
        struct run part = *run;
        part.first += done;
        part.count = pn_take(lane->dest, part.first, run->count - done);
        if (part.count)
            place_taken(lane, &part, bytes ? (const uint8_t *)bytes + done * page_size : NULL);
        else
            pn_lane_count(lane, run->class_, PN_DROPPED, 1);
        done += part.count ? part.count : 1;
    }
}

/* ---- the reply that is coming ---- */

static void arrived(struct stream *stream, uint64_t pages) {
    struct current *current = &stream->current;
    current->first += pages;
    current->count -= pages;
    pn_pace_came(&stream->lane.pace, current->class_, pages * current->slot->piece->page_size,
                 pn_now());
}

static void waited(struct stream *stream, uint64_t since) {
    uint64_t now = pn_now();
    pn_pace_waited(&stream->lane.pace, now - since, now);
}

/* The first reply to a request of the background. */
static void responded(struct stream *stream, struct slot *slot) {
    uint64_t pages = (slot->end - slot->next) >> slot->piece->shift;
    pn_pace_response(&stream->lane.pace, pn_now() - slot->since, pages * slot->piece->page_size);
    slot->since = 0;
}

/* The next pages of the reply. */
static struct run next_run(const struct stream *stream, uint64_t pages) {
    const struct current *current = &stream->current;
    return (struct run){.piece = current->slot->piece,
                        .first = current->first,
                        .count = pages,
                        .class_ = current->class_};
}

static void come_staged(struct stream *stream, uint64_t pages, const uint8_t *bytes) {
    struct run run = next_run(stream, pages);
    pn_lane_place(&stream->lane, &run, bytes);
    arrived(stream, pages);
}

/* A header is whole: checks it, and prepares for its payload. */
static void begin_reply(struct stream *stream) {
    const struct pn_reply *reply = &stream->header;
    struct slot *slot = slot_of(stream, reply->id);
    if (!check_reply(stream, reply, slot))
        return;
    const struct pn_piece *piece = slot->piece;
    stream->current = (struct current){
        .slot = slot,
        .class_ = slot->class_,
        .failed = reply->encoding == PN_FAILED,
        .packed = reply->encoding == PN_LZ4 ? reply->length : 0,
        .first = piece->first + ((reply->first - piece->wire_first) >> piece->shift),
        .count = reply->count >> piece->shift,
    };
    if (slot->class_ == PN_DEMAND)
        waited(stream, slot->since);
    else if (slot->since)
        responded(stream, slot);
    pn_lane_count(&stream->lane, slot->class_, PN_RUNS, 1);
    pn_lane_count(&stream->lane, slot->class_, PN_WIRE_BYTES, sizeof *reply + reply->length);
    if (reply->encoding == PN_FAILED)
        return;
    uint64_t wire = sizeof *reply + reply->length;
    uint64_t size = stream->current.count * piece->page_size;
    uint64_t spared = pn_pace_wire(&stream->lane.pace, slot->class_, size, wire);
    if (spared)
        pn_refund(stream->lane.dest, spared);
    slot->next += reply->count;
    if (reply->encoding == PN_ZEROS)
        come_staged(stream, stream->current.count, NULL);
}

static void finish_reply(struct stream *stream) {
    struct slot *slot = stream->current.slot;
    if (slot->next == slot->end) {
        if (slot->class_ == PN_DEMAND && stream->header.encoding != PN_ZEROS &&
            pn_stream_may_choose(stream))
            pn_demand_choice_came(&stream->choice, slot->packs,
                                  (pn_now() - slot->since) * 4096 / slot->piece->page_size);
        close_slot(stream, slot);
    }
    stream->current = (struct current){0};
}

/* Places a compressed reply, all of which is here. Nothing is claimed, and nothing is written where
 * it can be seen, before the bytes are known to be right. */
static void use_packed(struct stream *stream, const uint8_t *bytes) {
    struct current *current = &stream->current;
    uint64_t pages = current->count, size = pages * current->slot->piece->page_size;
    if (pn_unpack(bytes, current->packed, stream->unpacked, size)) {
        is_wrong(stream, "the peer's %u compressed bytes are not %llu pages", current->packed,
                 (unsigned long long)pages);
        return;
    }
    pn_lane_count(&stream->lane, current->class_, PN_LZ4_RUNS, 1);
    pn_lane_count(&stream->lane, current->class_, PN_LZ4_BYTES, size);
    pn_lane_count(&stream->lane, current->class_, PN_LZ4_WIRE_BYTES,
                  sizeof stream->header + current->packed);
    come_staged(stream, pages, stream->unpacked);
    finish_reply(stream);
}

static void fail(struct stream *stream, const uint8_t *reason) {
    pn_lane_end(&stream->lane, PN_END_FAILED, 0, "%.*s", (int)stream->header.length,
                (const char *)reason);
}

/* ---- receiving, demand: small replies, several to a read ---- */

/* Uses the next whole thing in the stage (a header, a payload, or pages of one). Returns how many
 * bytes that took; 0: more bytes have to come. */
static size_t use(struct stream *stream, const uint8_t *bytes, size_t length) {
    if (!stream->current.slot) {
        if (length < sizeof stream->header)
            return 0;
        memcpy(&stream->header, bytes, sizeof stream->header);
        begin_reply(stream);
        if (!stream->lane.ended && stream->header.encoding == PN_ZEROS)
            finish_reply(stream);
        return sizeof stream->header;
    }
    if (stream->current.failed) {
        if (length >= stream->header.length)
            fail(stream, bytes);
        return 0;
    }
    if (stream->current.packed) {
        size_t packed = stream->current.packed;
        if (length < packed)
            return 0;
        use_packed(stream, bytes);
        return packed;
    }
    uint64_t page_size = stream->current.slot->piece->page_size;
    uint64_t pages = pn_at_most(length / page_size, stream->current.count);
    if (pages)
        come_staged(stream, pages, bytes);
    if (!stream->current.count)
        finish_reply(stream);
    return pages * page_size;
}

static void use_all(struct stream *stream) {
    size_t used = 0, step = 1;
    while (step && !stream->lane.ended) {
        step = use(stream, stream->stage + used, stream->have - used);
        used += step;
    }
    stream->have -= used;
    memmove(stream->stage, stream->stage + used, stream->have);
}

void pn_stream_receive_staged(struct stream *stream) {
    size_t most =
        stream->current.packed > stream->stage_size ? stream->current.packed : stream->stage_size;
    ssize_t got =
        pn_sock_receive_some(&stream->lane.sock, stream->stage + stream->have, most - stream->have);
    if (got > 0) {
        stream->have += (size_t)got;
        use_all(stream);
        if (!stream->lane.ended)
            pn_lane_prefetch_more(&stream->lane);
    } else if (got == 0) {
        pn_lane_end(&stream->lane, PN_END_CLOSED, 0, "");
    } else {
        pn_lane_end_socket(&stream->lane);
    }
}

/* ---- receiving, background: to where the pages belong, or to a stage to place them from ---- */

static void begin_piece(struct stream *stream) {
    const struct pn_piece *piece = stream->current.slot->piece;
    uint64_t most = stream->stage_size / piece->page_size;
    stream->piece_count = pn_at_most(stream->current.count, most);
    stream->piece_taken = false;
    /* OpenSSL stores what it has decrypted: where the owner makes its file shorter, that would be a
     * signal. */
    if (!pn_in_place(stream->lane.dest, piece) || stream->lane.sock.tls)
        return;
    uint64_t taken = pn_take(stream->lane.dest, stream->current.first, stream->piece_count);
    stream->piece_taken = taken > 0;
    /* A page that is no longer wanted goes to the stage, and is dropped there. */
    stream->piece_count = taken ? taken : 1;
}

static void finish_piece(struct stream *stream) {
    uint64_t pages = stream->piece_count;
    stream->piece_count = 0;
    stream->have = 0;
    if (stream->piece_taken) {
        struct run run = next_run(stream, pages);
        pn_lane_put(&stream->lane, &run);
        arrived(stream, pages);
    } else {
        come_staged(stream, pages, stream->stage);
    }
    if (!stream->current.count)
        finish_reply(stream);
}

static uint8_t *piece_target(struct stream *stream) {
    const struct pn_piece *piece = stream->current.slot->piece;
    uint64_t at = (stream->current.first - piece->first) * piece->page_size;
    return stream->piece_taken ? (uint8_t *)(piece->second + at) : stream->stage;
}

/* Where to receive what comes next: the rest of a header, or of a piece and (if it is the reply's
 * last) the header behind it. Returns the number of buffers. */
static int next_buffers(struct stream *stream, struct iovec *buffers) {
    if (!stream->current.slot) {
        buffers[0] = (struct iovec){(uint8_t *)&stream->header + stream->have,
                                    sizeof stream->header - stream->have};
        return 1;
    }
    if (stream->current.failed) {
        buffers[0] =
            (struct iovec){stream->stage + stream->have, stream->header.length - stream->have};
        return 1;
    }
    if (stream->current.packed) {
        buffers[0] =
            (struct iovec){stream->stage + stream->have, stream->current.packed - stream->have};
        buffers[1] = (struct iovec){&stream->header, sizeof stream->header};
        return 2;
    }
    if (!stream->piece_count)
        begin_piece(stream);
    size_t size = stream->piece_count * stream->current.slot->piece->page_size;
    buffers[0] = (struct iovec){piece_target(stream) + stream->have, size - stream->have};
    buffers[1] = (struct iovec){&stream->header, sizeof stream->header};
    return stream->piece_count == stream->current.count ? 2 : 1;
}

static void header_came(struct stream *stream) {
    if (stream->have < sizeof stream->header)
        return;
    stream->have = 0;
    begin_reply(stream);
    if (stream->lane.ended)
        return;
    if (stream->header.encoding == PN_ZEROS)
        finish_reply(stream);
    else if (stream->header.encoding == PN_FAILED && !stream->header.length)
        fail(stream, stream->stage);
}

static void came(struct stream *stream, size_t got, size_t wanted) {
    if (!stream->current.slot) {
        stream->have += got;
        header_came(stream);
    } else if (stream->current.failed) {
        stream->have += got;
        if (got == wanted)
            fail(stream, stream->stage);
    } else if (got < wanted) {
        stream->have += got;
    } else {
        /* Neither of these needs the header any more: the next one may have come behind the
         * piece. */
        if (stream->current.packed)
            use_packed(stream, stream->stage);
        else
            finish_piece(stream);
        stream->have = got - wanted;
        if (!stream->current.slot && !stream->lane.ended)
            header_came(stream);
    }
}

void pn_stream_receive_direct(struct stream *stream) {
    struct iovec buffers[2];
    int count = next_buffers(stream, buffers);
    size_t wanted = buffers[0].iov_len;
    ssize_t got = wanted ? pn_sock_receive(&stream->lane.sock, buffers, count) : 0;
    if (got > 0 || !wanted)
        came(stream, (size_t)got, wanted);
    else if (got == 0)
        pn_lane_end(&stream->lane, PN_END_CLOSED, 0, "");
    else if (errno == EFAULT)
        pn_lane_end_placing(&stream->lane, -errno);
    else
        pn_lane_end_socket(&stream->lane);
}
