/* One connection of the destination, and the loop that drives it: ask, receive, place, wake.
 *
 * The demand lane takes its work from the uffd, a background lane from a ring that the schedule fills. Requests carry an id;
 * many are open at a time, and each is answered in order of its pages. */
#define _GNU_SOURCE
#include "lane.h"
#include "thread.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void end_lane(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...) {
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

/* The map may be in a file that the owner has, too. */
#define WROTE "the owner has written to the map of its pages: page %llu is in no state that it can be in"

static bool is_demand(const struct lane *lane) { return !lane->config->ring; }

static void count(struct lane *lane, int class_, int counter, uint64_t amount) {
    pn_stats_add(lane->dest->config.map, class_, counter, amount);
}

/* ---- asking ---- */

/* Whether it is for us to say. */
static bool may_choose(const struct lane *lane) {
    int both = 1 << PN_RAW | 1 << PN_LZ4;
    return is_demand(lane) && (lane->dest->config.encodings & both) == both;
}

/* Pages of one piece, claimed by the caller. There is a free slot. */
static void ask(struct lane *lane, int class_, const struct pn_piece *piece, uint64_t first, uint64_t pages) {
    if (lane->ask) {
        lane->ask(lane, class_, piece, first, pages);
        return;
    }
    uint32_t index = lane->free_slots[--lane->free_count];
    struct slot *slot = &lane->slots[index];
    uint64_t wire = piece->wire_first + ((first - piece->first) << piece->shift);
    *slot = (struct slot){.id = slot->id + SLOTS, .class_ = (uint8_t)class_, .open = 1, .piece = piece, .next = wire};
    slot->end = wire + (pages << piece->shift);
    slot->since = class_ == PN_DEMAND ? pn_now() : 0;
    slot->packs = may_choose(lane) && pn_prompt_packs(&lane->prompt);
    struct pn_request request = {
        .id = slot->id,
        .class_ = (uint8_t)class_,
        .encodings = (uint8_t)(lane->dest->config.encodings & ~(slot->packs ? 1 << PN_RAW : 0)),
        .unit_shift = (uint8_t)piece->shift,
        .first = wire,
        .count = (uint32_t)(pages << piece->shift),
    };
    memcpy(lane->outbox + lane->out_end, &request, sizeof request);
    lane->out_end += sizeof request;
    pn_pace_sent(&lane->pace, class_, pages * piece->page_size);
    count(lane, class_, PN_REQUESTS, 1);
}

static void flush(struct lane *lane) {
    while (lane->out_start < lane->out_end) {
        ssize_t sent = send(lane->config->sock, lane->outbox + lane->out_start, lane->out_end - lane->out_start,
                            MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0) {
            if (errno != EAGAIN)
                end_lane(lane, PN_END_BROKEN, errno, "");
            return;
        }
        lane->out_start += (size_t)sent;
    }
    lane->out_start = lane->out_end = 0;
}

/* Every open request fits the outbox, if what was sent is moved out of the way. */
static void make_room(struct lane *lane) {
    memmove(lane->outbox, lane->outbox + lane->out_start, lane->out_end - lane->out_start);
    lane->out_end -= lane->out_start;
    lane->out_start = 0;
}

static bool can_ask(struct lane *lane, uint32_t requests) {
    if (lane->can_ask)
        return lane->can_ask(lane, requests);
    if (lane->out_end + requests * 24 > OUTBOX)
        make_room(lane);
    return lane->free_count >= requests && lane->out_end + requests * 24 <= OUTBOX;
}

/* ---- faults ---- */

static void drain_eventfd(int fd) {
    eventfd_t value;
    (void)!eventfd_read(fd, &value);
}

static uint64_t at_most(uint64_t value, uint64_t limit) { return value < limit ? value : limit; }

/* The window around a page that was just asked for: missing pages behind it, then before it, as far as they are unbroken. */
static void prefetch_fixed(struct lane *lane, const struct pn_piece *piece, uint64_t page, uint32_t forward_, uint32_t backward_) {
    struct pn_map *map = lane->dest->config.map;
    uint64_t limit = pn_tunables.prefetch_most / piece->page_size;
    uint64_t forward = at_most(forward_, piece->first + piece->count - page - 1);
    uint64_t backward = at_most(at_most(backward_, page - piece->first), limit);
    uint64_t taken = pn_map_claim(map, page + 1, at_most(forward, limit), PN_MISSING, PN_REQUESTED);
    if (taken)
        ask(lane, PN_PREFETCH, piece, page + 1, taken);
    uint64_t from = page;
    while (page - from < backward && pn_map_claim(map, from - 1, 1, PN_MISSING, PN_REQUESTED))
        from--;
    if (from < page)
        ask(lane, PN_PREFETCH, piece, from, page - from);
}

static void prefetch(struct lane *lane, const struct pn_piece *piece, uint64_t page) {
    struct pn_window *window = lane->dest->config.window;
    uint32_t forward, backward;
    if (pn_window_fixed(window, &forward, &backward))
        prefetch_fixed(lane, piece, page, forward, backward);
    else
        pn_window_fault(window, lane->dest->config.map, page, piece->first, piece->first + piece->count, piece->page_size);
}

/* What the window wants, a little at a time: all that is on its way stands before the next page that somebody waits for. */
static void prefetch_more(struct lane *lane) {
    uint64_t first, taken, room;
    while ((room = pn_pace_room(&lane->pace, PN_PREFETCH)) && can_ask(lane, 1)) {
        taken = pn_window_next(lane->dest->config.window, lane->dest->config.map, room, &first);
        if (!taken)
            break;
        ask(lane, PN_PREFETCH, pn_piece_of_page(lane->dest, first), first, taken);
    }
    flush(lane);
}

static void put_off(struct lane *lane, const struct pn_event *fault) {
    if (lane->deferred_count < EVENTS)
        lane->deferred[lane->deferred_count++] = *fault;
    else /* it will fault again */
        pn_uffd_wake(lane->dest->config.uffd, fault->start & ~4095ull, 4096);
}

/* A fault on a page that was placed, or given up, before. */
static void settle(struct lane *lane, const struct pn_event *fault, const struct pn_piece *piece, uint64_t page) {
    enum { FAULT_MINOR = 4 };
    const struct pn_dest *dest = lane->dest;
    uint64_t to = piece->address + (page - piece->first) * piece->page_size;
    struct pn_placed placed = pn_settle(dest->config.uffd, to, fault->flags & FAULT_MINOR, dest->zeros, piece->page_size);
    if (placed.error == -EAGAIN)
        put_off(lane, fault);
    else if (placed.error == -ESRCH)
        end_lane(lane, PN_END_OWNER_GONE, 0, "");
    else if (placed.error)
        end_lane(lane, PN_END_PLACING, -placed.error, "");
}

/* What the owner announced nothing about is not the source's. Whoever touches it is told, or gets zeros if the owner wants that; all
 * other pages go on coming. */
static void answer_outside(struct lane *lane, const struct pn_event *fault) {
    const struct pn_dest_config *config = &lane->dest->config;
    int error = pn_answer_outside(config->uffd, fault->start, fault->flags, config->outside_is_zero);
    if (error == -EAGAIN)
        put_off(lane, fault);
    else if (error)
        end_lane(lane, PN_END_OWNER_GONE, 0, "");
}

/* A page that is on its way, and waited for. If it arrived just now, its thread was woken by that. */
static void wait_for(struct lane *lane, uint64_t page, uint64_t now) {
    pn_wait(lane->dest, page, now);
    int state = pn_map_state(lane->dest->config.map, page);
    if (state == PN_RESIDENT || state == PN_REMOVED)
        pn_wake_waiter(lane->dest, page);
}

/* Ask for it, if it is in that state. */
static bool demand(struct lane *lane, const struct pn_piece *piece, uint64_t page, int state) {
    if (!pn_map_claim(lane->dest->config.map, page, 1, state, PN_REQUESTED))
        return false;
    ask(lane, PN_DEMAND, piece, page, 1);
    return true;
}

/* A page that the background has asked for is behind other background pages, and a thread that waits does not wait for those.
 * But on a fast link it may be here at once, and whatever comes twice is in the way of something else: it gets a moment. */
static void expect(struct lane *lane, const struct pn_piece *piece, uint64_t page, uint64_t now) {
    if (lane->late_count < LATE)
        lane->late[lane->late_count++] = (struct late){.page = page, .due = pn_pace_due(now)};
    else if (can_ask(lane, 1))
        demand(lane, piece, page, PN_COMING);
}

/* Pages that did not come within their moment are asked for. Who comes second is dropped. */
static void demand_late(struct lane *lane) {
    uint64_t now = lane->late_count ? pn_now() : 0;
    int past = 0;
    for (; past < lane->late_count && lane->late[past].due <= now && can_ask(lane, 1); past++) {
        uint64_t page = lane->late[past].page;
        demand(lane, pn_piece_of_page(lane->dest, page), page, PN_COMING);
    }
    lane->late_count -= past;
    memmove(lane->late, lane->late + past, (size_t)lane->late_count * sizeof lane->late[0]);
    if (past)
        flush(lane);
}

/* Whether to prefetch around the page. */
static bool on_fault(struct lane *lane, const struct pn_event *fault, uint64_t now) {
    const struct pn_piece *piece = pn_piece_at(lane->dest, fault->start);
    if (!piece) {
        count(lane, PN_DEMAND, PN_OUTSIDE_FAULTS, 1);
        answer_outside(lane, fault);
        return false;
    }
    uint64_t page = piece->first + (fault->start - piece->address) / piece->page_size;
    int state = pn_map_state(lane->dest->config.map, page);
    if (lane->dest->config.faults && state != PN_RESIDENT && state != PN_REMOVED)
        pn_fault_log_write(lane->dest->config.faults, page, lane->dest->config.faults_fd);
    switch (state) {
    case PN_MISSING:
        if (!can_ask(lane, 1)) { /* events had to be read, faults or not: let it fault again */
            pn_uffd_wake(lane->dest->config.uffd, fault->start & ~4095ull, 4096);
            return false;
        }
        pn_wait(lane->dest, page, now);
        if (demand(lane, piece, page, PN_MISSING))
            return true;
        __attribute__((fallthrough)); /* somebody was faster */
    case PN_COMING:
        wait_for(lane, page, now);
        expect(lane, piece, page, now);
        return false;
    case PN_REQUESTED:
    case PN_PLACING:
    case PN_READY:
    case PN_REMOVING:
        wait_for(lane, page, now);
        return false;
    case PN_RESIDENT:
    case PN_REMOVED:
    case PN_POISONED:
        settle(lane, fault, piece, page);
        return false;
    default:
        end_lane(lane, PN_END_OWNER_WRONG, 0, WROTE, (unsigned long long)page);
        return false;
    }
}

/* In one step each, so that a lane which takes the page meanwhile has either taken it before or does not get it: PLACING becomes
 * REMOVING and is left to whoever places it, however often it is given up until then; all else becomes REMOVED. */
static bool remove_page(struct pn_map *map, uint64_t page) {
    for (;;) {
        int state = pn_map_state(map, page);
        if (state == PN_REMOVING)
            return false;
        if (pn_map_claim(map, page, 1, state, state == PN_PLACING ? PN_REMOVING : PN_REMOVED))
            return state != PN_PLACING;
    }
}

/* The owner gave up [start, end). */
static void on_removed(struct lane *lane, uint64_t start, uint64_t end) {
    struct pn_dest *dest = lane->dest;
    for (uint64_t i = 0; i < dest->config.piece_count; i++) {
        const struct pn_piece *piece = &dest->config.pieces[i];
        uint64_t from = start > piece->address ? start - piece->address : 0;
        uint64_t to = end > piece->address ? at_most(end - piece->address, piece->count * piece->page_size) : 0;
        for (uint64_t at = from / piece->page_size; at * piece->page_size < to; at++) {
            uint64_t page = piece->first + at;
            pn_let_go(dest, page);
            if (remove_page(dest->config.map, page))
                pn_wake_waiter(dest, page);
        }
    }
}

/* The first touch of a page that was held to see whether it is touched: nobody waited for the source. */
static bool on_held(struct lane *lane, const struct pn_event *fault) {
    if (!atomic_load(&lane->dest->held_count)) /* nearly always: no need to know which page it is */
        return false;
    const struct pn_piece *piece = pn_piece_at(lane->dest, fault->start);
    uint64_t page = piece ? piece->first + (fault->start - piece->address) / piece->page_size : 0;
    if (!piece || !pn_let_go(lane->dest, page))
        return false;
    count(lane, PN_PREFETCH, PN_SAMPLED_USED, 1);
    settle(lane, fault, piece, page);
    return true;
}

static int read_events(struct lane *lane, struct pn_event *events) {
    struct pn_dest *dest = lane->dest;
    bool removed = false;
    if (dest->config.removes)
        pthread_rwlock_wrlock(&dest->removal);
    int got = pn_uffd_read(dest->config.uffd, events, EVENTS);
    for (int i = 0; i < got; i++)
        if (events[i].kind == PN_EVENT_REMOVE || events[i].kind == PN_EVENT_UNMAP) {
            on_removed(lane, events[i].start, events[i].end);
            removed = true;
        }
    if (dest->config.removes)
        pthread_rwlock_unlock(&dest->removal);
    if (removed)
        pn_check_done(dest); /* they may have been the last that were missing */
    return got;
}

static void answer_faults(struct lane *lane, const struct pn_event *events, int got) {
    uint64_t missing[EVENTS], now = pn_now();
    int missing_count = 0, faults = 0;
    for (int i = 0; i < got; i++)
        if (events[i].kind == PN_EVENT_PAGEFAULT) {
            if (on_held(lane, &events[i]))
                continue;
            faults++;
            if (on_fault(lane, &events[i], now))
                missing[missing_count++] = events[i].start;
        } else if (events[i].kind == PN_EVENT_FORK || events[i].kind == PN_EVENT_REMAP) {
            end_lane(lane, PN_END_OWNER_WRONG, 0, "the owner forked, or moved memory, while it was being filled");
        }
    if (faults) {
        pn_pace_faulted(&lane->dest->pace, now);
        count(lane, PN_DEMAND, PN_FAULTS, (uint64_t)faults);
    }
    flush(lane); /* pages that are waited for go first: the window around them is asked for while they travel */
    for (int i = 0; i < missing_count && can_ask(lane, 2); i++) {
        const struct pn_piece *piece = pn_piece_at(lane->dest, missing[i]);
        prefetch(lane, piece, piece->first + (missing[i] - piece->address) / piece->page_size);
    }
    prefetch_more(lane);
}

static bool take_faults(struct lane *lane) {
    struct pn_event events[EVENTS];
    int got = read_events(lane, events);
    if (got > 0)
        answer_faults(lane, events, got);
    return got > 0;
}

static void settle_deferred(struct lane *lane) {
    struct pn_event faults[EVENTS];
    int faults_count = lane->deferred_count;
    memcpy(faults, lane->deferred, (size_t)faults_count * sizeof faults[0]);
    lane->deferred_count = 0;
    for (int i = 0; i < faults_count; i++) {
        const struct pn_piece *piece = pn_piece_at(lane->dest, faults[i].start);
        if (!piece) {
            answer_outside(lane, &faults[i]);
            continue;
        }
        settle(lane, &faults[i], piece, piece->first + (faults[i].start - piece->address) / piece->page_size);
    }
}

/* At faults that could not be answered at once. */
static void look_again(struct lane *lane) {
    if (lane->deferred_count && !lane->ended)
        settle_deferred(lane);
    if (lane->late_count && !lane->ended)
        demand_late(lane);
}

/* ---- runs from the schedule ---- */

/* The next piece of the run at the ring's head that is missing, as far as the window allows. False: nothing to ask for now. */
static bool ask_next(struct lane *lane) {
    struct pn_ring *ring = lane->config->ring;
    struct pn_map *map = lane->dest->config.map;
    uint64_t head = ring->head;
    if (!pn_pace_room(&lane->pace, PN_BACKGROUND) || pn_ring_used(ring) == 0 || !can_ask(lane, 1))
        return false;
    uint64_t *first = &ring->first[head % RING], *left = &ring->count[head % RING];
    uint64_t missing = pn_map_find(map, *first, *first + *left, PN_MISSING);
    *left -= missing - *first;
    *first = missing;
    if (*left) {
        const struct pn_piece *piece = pn_piece_of_page(lane->dest, missing);
        if (!piece) {
            end_lane(lane, PN_END_OWNER_WRONG, 0, WROTE, (unsigned long long)missing);
            return false;
        }
        uint64_t most = at_most(*left, pn_pace_request_pages(&lane->pace, piece->page_size));
        most = at_most(most, piece->first + piece->count - missing);
        most = pn_map_span(map, missing, missing + most, PN_MISSING);
        uint64_t granted = pn_grant(lane->dest, most * piece->page_size, piece->page_size, &lane->pause) / piece->page_size;
        if (most && !granted)
            return false;
        uint64_t taken = pn_map_claim(map, missing, granted, PN_MISSING, PN_COMING);
        if (taken)
            ask(lane, PN_BACKGROUND, piece, missing, taken);
        *first += taken;
        *left -= taken;
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

static void feed(struct lane *lane) {
    lane->pause = UINT64_MAX;
    pn_lane_look(lane);
    while (ask_next(lane))
        ;
    flush(lane);
}

/* ---- replies ---- */

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
    end_lane(lane, PN_END_PROTOCOL, 0, "%s", text);
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

/* EFAULT: pages of the file behind the memory, which were there, are not. */
static void end_placing(struct lane *lane, int error) {
    if (error == -ESRCH)
        end_lane(lane, PN_END_OWNER_GONE, 0, "");
    else if (error == -EFAULT)
        end_lane(lane, PN_END_OWNER_WRONG, 0, "the owner made its memory file shorter, or it is not the one that it has mapped");
    else
        end_lane(lane, PN_END_PLACING, -error, "");
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
            if (!is_demand(lane) || !take_faults(lane))
                sched_yield();
            struct pollfd stop = {.fd = lane->config->stop_fd, .events = POLLIN};
            if (poll(&stop, 1, 0) > 0)
                end_lane(lane, PN_END_STOPPED, 0, "");
        } else if (error) {
            end_placing(lane, error);
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
        end_placing(lane, error);
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
            count(lane, lane->current.class_, PN_DROPPED, 1);
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
    count(lane, slot->class_, PN_RUNS, 1);
    count(lane, slot->class_, PN_WIRE_BYTES, sizeof *reply + reply->length);
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
        if (slot->class_ == PN_DEMAND && lane->header.encoding != PN_ZEROS && may_choose(lane))
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
    count(lane, current->class_, PN_LZ4_RUNS, 1);
    count(lane, current->class_, PN_LZ4_BYTES, size);
    count(lane, current->class_, PN_LZ4_WIRE_BYTES, sizeof lane->header + current->packed);
    come_staged(lane, pages, lane->unpacked);
    finish_reply(lane);
}

static void fail(struct lane *lane, const uint8_t *reason) {
    end_lane(lane, PN_END_FAILED, 0, "%.*s", (int)lane->header.length, (const char *)reason);
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
    uint64_t pages = at_most(length / page_size, lane->current.count);
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

static void receive_staged(struct lane *lane) {
    size_t most = lane->current.packed > lane->stage_size ? lane->current.packed : lane->stage_size;
    ssize_t got;
    do {
        got = recv(lane->config->sock, lane->stage + lane->have, most - lane->have, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got > 0) {
        lane->have += (size_t)got;
        use_all(lane);
        if (!lane->ended)
            prefetch_more(lane);
    } else if (got == 0) {
        end_lane(lane, PN_END_CLOSED, 0, "");
    } else if (errno != EAGAIN) {
        end_lane(lane, PN_END_BROKEN, errno, "");
    }
}

/* ---- receiving, background: straight to where the pages belong, or to an aligned stage that is placed from at once ---- */

static void begin_piece(struct lane *lane) {
    const struct pn_piece *piece = lane->current.slot->piece;
    uint64_t most = lane->stage_size / piece->page_size;
    lane->piece_count = at_most(lane->current.count, most);
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

static void receive_direct(struct lane *lane) {
    struct iovec buffers[2];
    struct msghdr message = {.msg_iov = buffers};
    message.msg_iovlen = (size_t)next_buffers(lane, buffers);
    size_t wanted = buffers[0].iov_len;
    ssize_t got = wanted ? recvmsg(lane->config->sock, &message, MSG_DONTWAIT) : 0;
    if (got > 0 || !wanted)
        came(lane, (size_t)got, wanted);
    else if (got == 0)
        end_lane(lane, PN_END_CLOSED, 0, "");
    else if (errno == EFAULT)
        end_placing(lane, -errno);
    else if (errno != EAGAIN && errno != EINTR)
        end_lane(lane, PN_END_BROKEN, errno, "");
}

/* ---- the loop ---- */

/* Watched by epoll rather than poll: a fault is two waits, and poll pays for each descriptor at each of them. */
static bool watch(struct lane *lane, int fd, uint32_t events, uint32_t *watched) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    bool ok = *watched == events || !epoll_ctl(lane->epoll, *watched == UNWATCHED ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
    *watched = events;
    return ok;
}

static int work_fd(const struct lane *lane) { return is_demand(lane) ? lane->dest->config.uffd : lane->config->work_fd; }

static bool watch_all(struct lane *lane) {
    /* As many requests are open as there may be: faults wait where they are. */
    bool full = is_demand(lane) && !can_ask(lane, 3 * EVENTS);
    return watch(lane, lane->config->sock, EPOLLIN | (lane->out_start < lane->out_end ? EPOLLOUT : 0), &lane->sock_events) &&
           watch(lane, work_fd(lane), full ? 0 : EPOLLIN, &lane->work_events) &&
           watch(lane, lane->config->stop_fd, EPOLLIN, &lane->stop_events);
}

static void act(struct lane *lane, const struct epoll_event *event) {
    if (event->data.fd == lane->config->stop_fd)
        end_lane(lane, PN_END_STOPPED, 0, "");
    else if (event->data.fd != lane->config->sock && is_demand(lane))
        take_faults(lane);
    else if (event->data.fd != lane->config->sock)
        drain_eventfd(lane->config->work_fd);
    else if (event->events & ~(uint32_t)EPOLLOUT)
        (is_demand(lane) ? receive_staged : receive_direct)(lane);
}

/* ns; UINT64_MAX: until something happens. */
static uint64_t time_to_wait(const struct lane *lane) {
    if (lane->deferred_count)
        return 0;
    uint64_t now = lane->late_count ? pn_now() : 0, due = lane->late[0].due;
    uint64_t moment = !lane->late_count ? UINT64_MAX : due > now ? due - now : 0;
    return at_most(lane->pause, moment);
}

static int wait_for_events(struct lane *lane, struct epoll_event *ready, int room) {
    uint64_t wait = time_to_wait(lane);
    if (wait == UINT64_MAX || !wait)
        return epoll_wait(lane->epoll, ready, room, wait ? -1 : 0);
    /* Milliseconds are too coarse to pace by: what is asked for at once stands in the way of what somebody waits for. */
    struct timespec time = {.tv_sec = (time_t)(wait / 1000000000), .tv_nsec = (long)(wait % 1000000000)};
    long count = syscall(SYS_epoll_pwait2, lane->epoll, ready, room, &time, NULL, 0);
    if (count < 0 && errno == ENOSYS) /* before Linux 5.11 */
        return epoll_wait(lane->epoll, ready, room, (int)(wait / 1000000) + 1);
    return (int)count;
}

static void wait_and_act(struct lane *lane) {
    struct epoll_event ready[3];
    if (!watch_all(lane)) {
        end_lane(lane, PN_END_BROKEN, errno, "");
        return;
    }
    int count = wait_for_events(lane, ready, 3);
    for (int i = 0; i < count && !lane->ended; i++)
        act(lane, &ready[i]);
    if (lane->out_start < lane->out_end && !lane->ended)
        flush(lane);
    look_again(lane);
    if (!is_demand(lane) && !lane->ended)
        feed(lane);
}

void pn_lane_init_pace(struct lane *lane) {
    const struct pn_lane_config *config = lane->config;
    lane->pace.window_least = config->window_least;
    lane->pace.window_min = config->window_min;
    lane->pace.window_max = config->window_max;
    lane->pace.chunk = config->chunk;
    pn_pace_init(&lane->pace, &lane->dest->pace);
}

static bool prepare(struct lane *lane) {
    uint64_t page_size = lane->dest->config.max_page_size;
    lane->epoll = epoll_create1(EPOLL_CLOEXEC);
    lane->sock_events = lane->work_events = lane->stop_events = UNWATCHED;
    lane->stage_size = STAGE_BYTES > page_size ? STAGE_BYTES : page_size;
    /* The demand lane's holds headers too. Page-aligned, private and anonymous: MOVE takes pages out of it. */
    lane->stage_size += is_demand(lane) ? 64 << 10 : 0;
    lane->stage_room = lane->stage_size > PN_MAX_LZ4_BYTES ? lane->stage_size : PN_MAX_LZ4_BYTES;
    lane->stage = mmap(NULL, lane->stage_room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    lane->unpacked = mmap(NULL, PN_MAX_LZ4_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    lane->slots = calloc(SLOTS, sizeof *lane->slots);
    lane->free_slots = calloc(SLOTS, sizeof *lane->free_slots);
    lane->outbox = malloc(OUTBOX);
    if (lane->epoll < 0 || lane->stage == MAP_FAILED || lane->unpacked == MAP_FAILED || !lane->slots || !lane->free_slots ||
        !lane->outbox)
        return false;
    for (uint32_t i = 0; i < SLOTS; i++) {
        lane->slots[i].id = i;
        lane->free_slots[lane->free_count++] = SLOTS - 1 - i;
    }
    pn_lane_init_pace(lane);
    pn_prompt_init(&lane->prompt);
    lane->pause = UINT64_MAX;
    return true;
}

static void clean_up(struct lane *lane) {
    if (lane->epoll >= 0)
        close(lane->epoll);
    if (lane->stage != MAP_FAILED)
        munmap(lane->stage, lane->stage_room);
    if (lane->unpacked != MAP_FAILED)
        munmap(lane->unpacked, PN_MAX_LZ4_BYTES);
    free(lane->slots);
    free(lane->free_slots);
    free(lane->outbox);
}

static void loop(void *argument) {
    struct lane *lane = argument;
    while (!lane->ended)
        wait_and_act(lane);
}

void pn_lane_run(const struct pn_lane_config *config, struct pn_end *end) {
    struct lane lane = {.config = config, .dest = config->dest, .end = end, .stage = MAP_FAILED, .unpacked = MAP_FAILED};
    if (!prepare(&lane) || pn_run_loop(!is_demand(&lane), loop, &lane))
        end_lane(&lane, PN_END_NO_MEMORY, ENOMEM, "");
    clean_up(&lane);
}

/* ---- for lanes that bring their pages in another way ---- */

void pn_lane_end(struct lane *lane, enum pn_end_kind kind, int error, const char *format, ...) {
    char text[sizeof lane->end->text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    end_lane(lane, kind, error, "%s", text);
}

void pn_lane_end_placing(struct lane *lane, int error) { end_placing(lane, error); }

void pn_lane_flush(struct lane *lane) { flush(lane); }

bool pn_lane_has_room(struct lane *lane, size_t size) {
    if (lane->out_end + size > OUTBOX)
        make_room(lane);
    return lane->out_end + size <= OUTBOX;
}

bool pn_lane_take_faults(struct lane *lane) { return take_faults(lane); }

void pn_lane_look_again(struct lane *lane) { look_again(lane); }

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

int pn_lane_wait(struct lane *lane, struct epoll_event *ready, int room) { return wait_for_events(lane, ready, room); }

void pn_drain_eventfd(int fd) { drain_eventfd(fd); }
