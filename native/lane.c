/* One connection of the destination: how it asks for pages, and how it ends.
 *
 * The demand lane takes its work from the uffd, a background lane from a ring that the schedule
 * fills. Requests carry an id; many are open at a time, and the pages of each come in order.
 */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void pn_lane_end(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...) {
    if (lane->ended)
        return;
    lane->ended = true;
    lane->end->kind = kind;
    lane->end->error = error;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(lane->end->text, sizeof lane->end->text, format, arguments);
    va_end(arguments);
}

/* EFAULT: the file behind the memory no longer has pages that it had. */
void pn_lane_end_placing(struct lane *lane, int error) {
    if (error == -ESRCH)
        pn_lane_end(lane, PN_END_OWNER_GONE, 0, "");
    else if (error == -EFAULT)
        pn_lane_end(
            lane, PN_END_OWNER_WRONG, 0,
            "the owner made its memory file shorter, or it is not the one that it has mapped");
    else
        pn_lane_end(lane, PN_END_PLACING, -error, "");
}

void pn_lane_end_socket(struct lane *lane) {
    struct pn_end end;
    if (pn_sock_end(&lane->sock, &end))
        pn_lane_end(lane, end.kind, end.error, "%s", end.text);
}

void pn_stream_ask(struct lane *lane, const struct run *run) {
    struct stream *stream = (struct stream *)lane;
    const struct pn_piece *piece = run->piece;
    struct slot *slot = &stream->slots[stream->free_slots[--stream->free_count]];
    uint64_t wire = piece->wire_first + ((run->first - piece->first) << piece->shift);
    *slot = (struct slot){
        .id = slot->id + SLOTS, .class_ = run->class_, .open = 1, .piece = piece, .next = wire};
    slot->end = wire + (run->count << piece->shift);
    slot->since = run->class_ == PN_PREFETCH ? 0 : pn_now();
    slot->packs = pn_stream_may_choose(stream) && pn_demand_choice_packs(&stream->choice);
    struct pn_request request = {
        .id = slot->id,
        .class_ = run->class_,
        .encodings = (uint8_t)(lane->dest->config.encodings & ~(slot->packs ? 1 << PN_RAW : 0)),
        .unit_shift = (uint8_t)piece->shift,
        .first = wire,
        .count = (uint32_t)(run->count << piece->shift),
    };
    memcpy(lane->outbox + lane->out_end, &request, sizeof request);
    lane->out_end += sizeof request;
    pn_pace_sent(&lane->pace, run->class_, run->count * piece->page_size);
    pn_lane_count(lane, run->class_, PN_REQUESTS, 1);
}

void pn_lane_flush(struct lane *lane) {
    while (lane->out_start < lane->out_end) {
        struct iovec part = {lane->outbox + lane->out_start, lane->out_end - lane->out_start};
        ssize_t sent = pn_sock_send(&lane->sock, &part, 1, false);
        if (sent < 0) {
            pn_lane_end_socket(lane);
            return;
        }
        lane->out_start += (size_t)sent;
    }
    lane->out_start = lane->out_end = 0;
}

/* All open requests fit the outbox, once the bytes that were sent are moved out of the way. */
static void make_room(struct lane *lane) {
    memmove(lane->outbox, lane->outbox + lane->out_start, lane->out_end - lane->out_start);
    lane->out_end -= lane->out_start;
    lane->out_start = 0;
}

bool pn_lane_has_room(struct lane *lane, size_t size) {
    if (lane->out_end + size > OUTBOX)
        make_room(lane);
    return lane->out_end + size <= OUTBOX;
}

bool pn_stream_can_ask(struct lane *lane, uint32_t requests) {
    bool has_slots = ((struct stream *)lane)->free_count >= requests;
    return has_slots && pn_lane_has_room(lane, requests * sizeof(struct pn_request));
}
