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
#include <sys/socket.h>
#include <sys/uio.h>

static struct slot *slot_of(struct lane *lane, uint32_t id) {
    struct slot *slot = &lane->slots[id % SLOTS];
    return slot->open && slot->id == id ? slot : NULL;
}

static void close_slot(struct lane *lane, struct slot *slot) {
    slot->open = 0;
    lane->free_slots[lane->free_count++] = (uint32_t)(slot - lane->slots);
}

static bool is_wrong(struct lane *lane, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pn_lane_end(lane, PN_END_PROTOCOL, 0, "%s", text);
    return false;
}

static bool check_pages(struct lane *lane, const struct pn_reply *reply, const struct slot *slot) {
    unsigned shift = (unsigned)slot->piece->shift;
    if (reply->first != slot->next || !reply->count || reply->count > slot->end - slot->next || reply->count & ((1u << shift) - 1))
        return is_wrong(lane, "the peer answers out of turn: with %u pages from page %llu on", reply->count,
                        (unsigned long long)reply->first);
    uint64_t size = (reply->count >> shift) * slot->piece->page_size;
    bool fits = reply->encoding == PN_LZ4 ? reply->length && reply->length < size : reply->length == (reply->encoding ? 0 : size);
    if (!fits)
        return is_wrong(lane, "the peer announces %u bytes for %u pages of %llu bytes in all", reply->length, reply->count,
                        (unsigned long long)(reply->encoding == PN_ZEROS ? 0 : size));
    if (reply->encoding == PN_LZ4 && size > PN_MAX_LZ4_BYTES)
        return is_wrong(lane, "the peer compresses %llu bytes at once (limit %d)", (unsigned long long)size, PN_MAX_LZ4_BYTES);
    return true;
}

/* The same rules, and words, as pagenet/protocol.py's OutstandingRequests. */
static bool check_reply(struct lane *lane, const struct pn_reply *reply, const struct slot *slot) {
    if (!slot)
        return is_wrong(lane, "the peer answers request %u, which is not open", reply->id);
    if (reply->class_ != slot->class_ || reply->reserved)
        return is_wrong(lane, "the peer's reply is of another class than its request");
    if (reply->encoding == PN_LZ4 && !(lane->dest->config.encodings & 1 << PN_LZ4))
        return is_wrong(lane, "the peer compresses with lz4, which was not asked for");
    if (reply->encoding > PN_LZ4 && reply->encoding != PN_FAILED)
        return is_wrong(lane, "the peer names encoding %u, which is unknown", reply->encoding);
    if (reply->encoding != PN_FAILED)
        return check_pages(lane, reply, slot);
    if (reply->length > PN_MAX_REASON_BYTES)
        return is_wrong(lane, "the peer announces a reason of %u bytes (limit %d)", reply->length, PN_MAX_REASON_BYTES);
    return true;
}

static void arrived(struct lane *lane, uint64_t pages) {
    struct current *current = &lane->current;
    current->first += pages;
    current->count -= pages;
    pn_pace_came(&lane->pace, current->class_, pages * current->slot->piece->page_size, pn_now());
}

/* Places pages that were taken, whatever their owner does meanwhile. */
static void put_all(struct lane *lane, uint64_t first, uint64_t pages, const uint8_t *bytes, bool zero) {
    const struct pn_piece *piece = lane->current.slot->piece;
    while (pages && !lane->ended) {
        uint64_t done;
        int error = pn_put(lane->dest, lane->current.class_, first, pages, bytes, zero, &done);
        first += done;
        pages -= done;
        bytes = bytes ? bytes + done * piece->page_size : NULL;
        if (error == -EAGAIN) {
            if (!pn_lane_is_demand(lane) || !pn_lane_take_faults(lane))
                sched_yield();
            struct pollfd stop = {.fd = lane->config->stop_fd, .events = POLLIN};
            if (poll(&stop, 1, 0) > 0)
                pn_lane_end(lane, PN_END_STOPPED, 0, "");
        } else if (error) {
            pn_lane_end_placing(lane, error);
        }
    }
    pn_check_done(lane->dest);
}

/* Pages that are ours to write. */
static void place_taken(struct lane *lane, const struct pn_piece *piece, uint64_t first, uint64_t pages, const uint8_t *bytes) {
    if (!bytes && pn_leave_zeros(lane->dest, lane->current.class_, piece, first, pages)) {
        pn_check_done(lane->dest);
        return;
    }
    int error = piece->second ? pn_write_shared(lane->dest, piece, first, pages, bytes) : 0;
    if (error)
        pn_lane_end_placing(lane, error);
    else
        put_all(lane, first, pages, piece->second ? NULL : bytes, !bytes);
}

/* Pages that came as bytes somewhere else than where they belong, or as zeros (NULL): those that are wanted are placed. */
static void place_staged(struct lane *lane, uint64_t pages, const uint8_t *bytes) {
    const struct pn_piece *piece = lane->current.slot->piece;
    uint64_t first = lane->current.first;
    for (uint64_t done = 0; done < pages && !lane->ended;) {
        uint64_t taken = pn_take(lane->dest, first + done, pages - done);
        const uint8_t *from = bytes ? bytes + done * piece->page_size : NULL;
        if (taken)
            place_taken(lane, piece, first + done, taken, from);
        else
            pn_lane_count(lane, lane->current.class_, PN_DROPPED, 1);
        done += taken ? taken : 1;
    }
}

static void waited(struct lane *lane, uint64_t since) {
    uint64_t now = pn_now();
    pn_pace_waited(&lane->pace, now - since, now);
}

static void come_staged(struct lane *lane, uint64_t pages, const uint8_t *bytes) {
    place_staged(lane, pages, bytes);
    arrived(lane, pages);
}

/* A header is whole: check it, and get ready for its payload. */
static void begin_reply(struct lane *lane) {
    const struct pn_reply *reply = &lane->header;
    struct slot *slot = slot_of(lane, reply->id);
    if (!check_reply(lane, reply, slot))
        return;
    const struct pn_piece *piece = slot->piece;
    lane->current = (struct current){
        .slot = slot,
        .class_ = slot->class_,
        .failed = reply->encoding == PN_FAILED,
        .packed = reply->encoding == PN_LZ4 ? reply->length : 0,
        .first = piece->first + ((reply->first - piece->wire_first) >> piece->shift),
        .count = reply->count >> piece->shift,
    };
    if (slot->class_ == PN_DEMAND)
        waited(lane, slot->since);
    pn_lane_count(lane, slot->class_, PN_RUNS, 1);
    pn_lane_count(lane, slot->class_, PN_WIRE_BYTES, sizeof *reply + reply->length);
    if (reply->encoding == PN_FAILED)
        return;
    uint64_t wire = sizeof *reply + reply->length;
    uint64_t spared = pn_pace_wire(&lane->pace, slot->class_, lane->current.count * piece->page_size, wire);
    if (spared)
        pn_refund(lane->dest, spared);
    slot->next += reply->count;
    if (reply->encoding == PN_ZEROS)
        come_staged(lane, lane->current.count, NULL);
}

static void finish_reply(struct lane *lane) {
    struct slot *slot = lane->current.slot;
    if (slot->next == slot->end) {
        if (slot->class_ == PN_DEMAND && lane->header.encoding != PN_ZEROS && pn_lane_may_choose(lane))
            pn_prompt_came(&lane->prompt, slot->packs, (pn_now() - slot->since) * 4096 / slot->piece->page_size);
        close_slot(lane, slot);
    }
    lane->current = (struct current){0};
}

/* All of a compressed reply is here. Nothing is claimed, and nothing written where anybody sees it, before it is known to be right. */
static void use_packed(struct lane *lane, const uint8_t *bytes) {
    struct current *current = &lane->current;
    uint64_t pages = current->count, size = pages * current->slot->piece->page_size;
    if (pn_unpack(bytes, current->packed, lane->unpacked, size)) {
        is_wrong(lane, "the peer's %u compressed bytes are not %llu pages", current->packed, (unsigned long long)pages);
        return;
    }
    pn_lane_count(lane, current->class_, PN_LZ4_RUNS, 1);
    pn_lane_count(lane, current->class_, PN_LZ4_BYTES, size);
    pn_lane_count(lane, current->class_, PN_LZ4_WIRE_BYTES, sizeof lane->header + current->packed);
    come_staged(lane, pages, lane->unpacked);
    finish_reply(lane);
}

static void fail(struct lane *lane, const uint8_t *reason) {
    pn_lane_end(lane, PN_END_FAILED, 0, "%.*s", (int)lane->header.length, (const char *)reason);
}

/* ---- receiving, demand: small replies, several to a read ---- */

/* As much of the stage as makes sense; returns how much was used. */
static size_t use(struct lane *lane, const uint8_t *bytes, size_t length) {
    if (!lane->current.slot) {
        if (length < sizeof lane->header)
            return 0;
        memcpy(&lane->header, bytes, sizeof lane->header);
        begin_reply(lane);
        if (!lane->ended && lane->header.encoding == PN_ZEROS)
            finish_reply(lane);
        return sizeof lane->header;
    }
    if (lane->current.failed) {
        if (length >= lane->header.length)
            fail(lane, bytes);
        return 0;
    }
    if (lane->current.packed) {
        size_t packed = lane->current.packed;
        if (length < packed)
            return 0;
        use_packed(lane, bytes);
        return packed;
    }
    uint64_t page_size = lane->current.slot->piece->page_size;
    uint64_t pages = pn_at_most(length / page_size, lane->current.count);
    if (pages)
        come_staged(lane, pages, bytes);
    if (!lane->current.count)
        finish_reply(lane);
    return pages * page_size;
}

static void use_all(struct lane *lane) {
    size_t used = 0, step = 1;
    while (step && !lane->ended) {
        step = use(lane, lane->stage + used, lane->have - used);
        used += step;
    }
    lane->have -= used;
    memmove(lane->stage, lane->stage + used, lane->have);
}

void pn_lane_receive_staged(struct lane *lane) {
    size_t most = lane->current.packed > lane->stage_size ? lane->current.packed : lane->stage_size;
    ssize_t got;
    do {
        got = recv(lane->config->sock, lane->stage + lane->have, most - lane->have, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got > 0) {
        lane->have += (size_t)got;
        use_all(lane);
        if (!lane->ended)
            pn_lane_prefetch_more(lane);
    } else if (got == 0) {
        pn_lane_end(lane, PN_END_CLOSED, 0, "");
    } else if (errno != EAGAIN) {
        pn_lane_end(lane, PN_END_BROKEN, errno, "");
    }
}

/* ---- receiving, background: straight to where the pages belong, or to an aligned stage that is placed from at once ---- */

static void begin_piece(struct lane *lane) {
    const struct pn_piece *piece = lane->current.slot->piece;
    uint64_t most = lane->stage_size / piece->page_size;
    lane->piece_count = pn_at_most(lane->current.count, most);
    lane->piece_taken = false;
    if (!pn_in_place(lane->dest, piece))
        return;
    uint64_t taken = pn_take(lane->dest, lane->current.first, lane->piece_count);
    lane->piece_taken = taken > 0;
    lane->piece_count = taken ? taken : 1; /* a page that is no longer wanted goes to the stage, and nowhere from there */
}

static void finish_piece(struct lane *lane) {
    uint64_t pages = lane->piece_count;
    lane->piece_count = 0;
    lane->have = 0;
    if (lane->piece_taken) {
        put_all(lane, lane->current.first, pages, NULL, false);
        arrived(lane, pages);
    } else {
        come_staged(lane, pages, lane->stage);
    }
    if (!lane->current.count)
        finish_reply(lane);
}

static uint8_t *piece_target(struct lane *lane) {
    const struct pn_piece *piece = lane->current.slot->piece;
    return lane->piece_taken ? (uint8_t *)(piece->second + (lane->current.first - piece->first) * piece->page_size) : lane->stage;
}

/* What comes next: the rest of a header, or of a piece and (if it is the reply's last) the header behind it. */
static int next_buffers(struct lane *lane, struct iovec *buffers) {
    if (!lane->current.slot) {
        buffers[0] = (struct iovec){(uint8_t *)&lane->header + lane->have, sizeof lane->header - lane->have};
        return 1;
    }
    if (lane->current.failed) {
        buffers[0] = (struct iovec){lane->stage + lane->have, lane->header.length - lane->have};
        return 1;
    }
    if (lane->current.packed) {
        buffers[0] = (struct iovec){lane->stage + lane->have, lane->current.packed - lane->have};
        buffers[1] = (struct iovec){&lane->header, sizeof lane->header};
        return 2;
    }
    if (!lane->piece_count)
        begin_piece(lane);
    size_t size = lane->piece_count * lane->current.slot->piece->page_size;
    buffers[0] = (struct iovec){piece_target(lane) + lane->have, size - lane->have};
    buffers[1] = (struct iovec){&lane->header, sizeof lane->header};
    return lane->piece_count == lane->current.count ? 2 : 1;
}

static void header_came(struct lane *lane) {
    if (lane->have < sizeof lane->header)
        return;
    lane->have = 0;
    begin_reply(lane);
    if (lane->ended)
        return;
    if (lane->header.encoding == PN_ZEROS)
        finish_reply(lane);
    else if (lane->header.encoding == PN_FAILED && !lane->header.length)
        fail(lane, lane->stage);
}

static void came(struct lane *lane, size_t got, size_t wanted) {
    if (!lane->current.slot) {
        lane->have += got;
        header_came(lane);
    } else if (lane->current.failed) {
        lane->have += got;
        if (got == wanted)
            fail(lane, lane->stage);
    } else if (got < wanted) {
        lane->have += got;
    } else {
        if (lane->current.packed) /* neither needs the header: the next one may have come behind the piece */
            use_packed(lane, lane->stage);
        else
            finish_piece(lane);
        lane->have = got - wanted;
        if (!lane->current.slot && !lane->ended)
            header_came(lane);
    }
}

void pn_lane_receive_direct(struct lane *lane) {
    struct iovec buffers[2];
    struct msghdr message = {.msg_iov = buffers};
    message.msg_iovlen = (size_t)next_buffers(lane, buffers);
    size_t wanted = buffers[0].iov_len;
    ssize_t got = wanted ? recvmsg(lane->config->sock, &message, MSG_DONTWAIT) : 0;
    if (got > 0 || !wanted)
        came(lane, (size_t)got, wanted);
    else if (got == 0)
        pn_lane_end(lane, PN_END_CLOSED, 0, "");
    else if (errno == EFAULT)
        pn_lane_end_placing(lane, -errno);
    else if (errno != EAGAIN && errno != EINTR)
        pn_lane_end(lane, PN_END_BROKEN, errno, "");
}

void pn_lane_place(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages, const void *bytes) {
    struct slot slot = {.piece = piece};
    lane->current = (struct current){.slot = &slot, .class_ = (uint8_t)class_, .first = first, .count = pages};
    place_staged(lane, pages, bytes);
    lane->current = (struct current){0};
}

void pn_lane_put(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages) {
    struct slot slot = {.piece = piece};
    lane->current = (struct current){.slot = &slot, .class_ = (uint8_t)class_, .first = first, .count = pages};
    put_all(lane, first, pages, NULL, false);
    lane->current = (struct current){0};
}
