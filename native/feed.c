/* What a background lane asks for: runs from the ring that the schedule fills. */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

/* The next piece of the run at the ring's head that is missing, as far as the window allows. False: nothing to ask for now. */
static bool ask_next(struct lane *lane) {
    struct pn_ring *ring = lane->config->ring;
    struct pn_map *map = lane->dest->config.map;
    uint64_t head = ring->head;
    if (!pn_pace_room(&lane->pace, PN_BACKGROUND) || pn_ring_used(ring) == 0 || !pn_lane_can_ask(lane, 1))
        return false;
    uint64_t *first = &ring->first[head % RING], *left = &ring->count[head % RING];
    uint64_t missing = pn_map_find(map, *first, *first + *left, PN_MISSING);
    *left -= missing - *first;
    *first = missing;
    if (*left) {
        const struct pn_piece *piece = pn_piece_of_page(lane->dest, missing);
        if (!piece) {
            pn_lane_end(lane, PN_END_OWNER_WRONG, 0, PN_WROTE, (unsigned long long)missing);
            return false;
        }
        uint64_t most = pn_at_most(*left, pn_pace_request_pages(&lane->pace, piece->page_size));
        most = pn_at_most(most, piece->first + piece->count - missing);
        most = pn_map_span(map, missing, missing + most, PN_MISSING);
        uint64_t granted = pn_grant(lane->dest, most * piece->page_size, piece->page_size, &lane->pause) / piece->page_size;
        if (most && !granted)
            return false;
        uint64_t taken = pn_map_claim(map, missing, granted, PN_MISSING, PN_COMING);
        if (taken)
            pn_lane_ask(lane, PN_BACKGROUND, piece, missing, taken);
        uint64_t past = taken ? taken : 1; /* none: somebody else has taken that page since it was found */
        *first += past;
        *left -= past;
    }
    if (!*left)
        pn_ring_took(ring, lane->config->room_fd);
    return true;
}

static bool prefetches(const struct lane *lane) {
    uint32_t forward, backward;
    return !pn_window_fixed(lane->dest->config.window, &forward, &backward) || forward || backward;
}

void pn_lane_look(struct lane *lane) { pn_pace_look(&lane->pace, pn_now(), prefetches(lane)); }

void pn_lane_feed(struct lane *lane) {
    lane->pause = UINT64_MAX;
    pn_lane_look(lane);
    while (ask_next(lane))
        ;
    pn_lane_flush(lane);
}
