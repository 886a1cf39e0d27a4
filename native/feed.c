/* What the background asks for: runs from the ring that the schedule fills. */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

void pn_lane_go_past(struct lane *lane, uint64_t pages) {
    struct pn_ring *ring = lane->config->ring;
    uint64_t head = ring->head % RING;
    ring->first[head] += pages;
    ring->count[head] -= pages;
    if (!ring->count[head])
        pn_ring_took(ring, lane->config->room_fd);
}

/* Finds the first page of the ring that is MISSING. *left: pages of its run from there on. False:
 * there is none. */
static bool find_missing(struct lane *lane, uint64_t *missing, uint64_t *left) {
    struct pn_ring *ring = lane->config->ring;
    while (pn_ring_used(ring)) {
        uint64_t head = ring->head % RING, first = ring->first[head];
        uint64_t end = first + ring->count[head];
        *missing = pn_map_find(lane->dest->config.map, first, end, PN_MISSING);
        *left = end - *missing;
        pn_lane_go_past(lane, *missing - first);
        if (*left)
            return true;
    }
    return false;
}

bool pn_lane_find_next(struct lane *lane, struct run *next) {
    uint64_t missing, left;
    if (!pn_pace_room(&lane->pace, PN_BACKGROUND) || !find_missing(lane, &missing, &left))
        return false;
    const struct pn_piece *piece = pn_piece_of_page(lane->dest, missing);
    if (!piece) {
        pn_lane_end(lane, PN_END_OWNER_WRONG, 0, PN_WROTE, (unsigned long long)missing);
        return false;
    }
    uint64_t most = pn_at_most(left, pn_pace_request_pages(&lane->pace, piece->page_size));
    most = pn_at_most(most, piece->first + piece->count - missing);
    *next = (struct run){.piece = piece, .first = missing, .count = most, .class_ = PN_BACKGROUND};
    return true;
}

bool pn_lane_claim_next(struct lane *lane, struct run *next) {
    struct pn_map *map = lane->dest->config.map;
    next->count = pn_map_span(map, next->first, next->first + next->count, PN_MISSING);
    return !next->count || pn_claim_granted(lane->dest, next->first, &next->count,
                                            next->piece->page_size, &lane->pause);
}

/* False: there is nothing to ask for now. */
static bool ask_next(struct stream *stream) {
    struct lane *lane = &stream->lane;
    struct run next;
    if (!pn_stream_can_ask(lane, 1) || !pn_lane_find_next(lane, &next) ||
        !pn_lane_claim_next(lane, &next))
        return false;
    if (next.count)
        pn_stream_ask(lane, &next);
    pn_lane_go_past(lane, next.count ? next.count : 1);
    return true;
}

static bool prefetches(const struct lane *lane) {
    uint32_t forward, backward;
    return !pn_window_fixed(lane->dest->config.window, &forward, &backward) || forward || backward;
}

void pn_lane_look(struct lane *lane) { pn_pace_look(&lane->pace, pn_now(), prefetches(lane)); }

void pn_stream_feed(struct stream *stream) {
    stream->lane.pause = UINT64_MAX;
    pn_lane_look(&stream->lane);
    while (ask_next(stream))
        ;
    pn_lane_flush(&stream->lane);
}
