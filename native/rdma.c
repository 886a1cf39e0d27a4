/* The destination's lanes over RDMA: ask for the key to a chunk of the source's memory, READ pages
 * out of it, place, wake.
 *
 * One loop drives both queue pairs: its work for a page of the background takes tens of
 * microseconds, and demand is looked at before each. Faults become wants. A want is begun when the
 * keys to all its chunks are here.
 */
#define _GNU_SOURCE
#include "chunks.h"
#include "lane.h"
#include "thread.h"
#include "verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    WANTS = 4096,     /* runs that are wanted and not begun, of each kind */
    READS = 256,      /* in flight at once */
    SEND_QUEUE = 512, /* work requests posted at once, on a queue pair */
    /* The stage: memory for pages that cannot be received where they belong. */
    ARENA_BYTES = 16 << 20,
    SLOT_BYTES = 256 << 10, /* of it for one READ */
    MIN_SLOTS = 2,
    MAX_PART = 1 << 30, /* of one work request */
    READY = 8,
};

/* Runs to be read, which this lane has claimed. */
struct wants {
    struct run items[WANTS];
    uint32_t count;
};

/* Pages in flight. */
struct under_way {
    struct run pages;
    int slot;       /* of the stage; -1: they are received where they belong */
    uint8_t parts;  /* work requests */
    uint64_t since; /* ns */
    uint8_t queue_pair;
};

/* Work requests that are posted together. */
struct read_batch {
    struct ibv_send_wr requests[SEND_QUEUE];
    struct ibv_sge parts[SEND_QUEUE];
    uint32_t count;
    uint32_t posted; /* and not yet completed */
};

struct pn_rdma {
    struct lane lane; /* first: asking.ask gets a pointer to it */
    struct pn_rdma_config config;
    struct pn_verbs verbs;
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *queues[2];
    bool armed[2]; /* the channel will report the next completion there */
    struct ibv_qp *pairs[2];
    struct ibv_mr *stage_mr;
    char *stage;
    uint64_t slot_size;
    struct chunks chunks;
    struct wants demanded, prefetched;
    struct under_way reads[READS];
    uint16_t free_reads[READS];
    uint16_t free_slots[ARENA_BYTES / SLOT_BYTES];
    uint32_t free_read_count, free_slot_count, slot_count;
    uint32_t demand_reads;
    struct read_batch batches[2];
    _Atomic int gives_back; /* every key, and asks for none */
    _Atomic int keyless;    /* it has done so */
    uint64_t spin_ns;       /* 0: not at all */
    uint64_t spun;          /* times */
};

static struct pn_rdma *of_lane(struct lane *lane) { return (struct pn_rdma *)lane; }

/* ---- reading ---- */

static uint64_t on_wire(const struct pn_piece *piece, uint64_t page) {
    return piece->wire_first + ((page - piece->first) << piece->shift);
}

/* A page here is zero if all the pages that it consists of at the source are zero. place: the chunk
 * that was looked at last. */
static bool is_zero(struct pn_rdma *rdma, struct place *place, const struct pn_piece *piece,
                    uint64_t page) {
    uint64_t at = on_wire(piece, page), end = at + (1ull << piece->shift);
    for (; at < end; at++) {
        if (at - place->first >= place->count)
            *place = pn_chunks_place(&rdma->chunks, at);
        uint64_t bit = at - place->first;
        if (place->chunk->state != CHUNK_ZERO &&
            !(place->chunk->zero[bit / 64 % 4] >> bit % 64 & 1))
            return false;
    }
    return true;
}

static uint64_t alike(struct pn_rdma *rdma, const struct pn_piece *piece, uint64_t first,
                      uint64_t count, bool *zero) {
    struct place place = {0};
    uint64_t same = 1;
    *zero = is_zero(rdma, &place, piece, first);
    while (same < count && is_zero(rdma, &place, piece, first + same) == *zero)
        same++;
    return same;
}

/* Registers this process's memory for the pages of a chunk, as far as the piece goes, so that they
 * can be received where they belong. NULL: no more may be pinned. */
static struct ibv_mr *register_local(struct pn_rdma *rdma, const struct pn_piece *piece,
                                     const struct place *place) {
    if (place->chunk->local)
        return place->chunk->local;
    uint64_t from = place->first > piece->wire_first ? place->first - piece->wire_first : 0;
    uint64_t to =
        pn_at_most(place->first + place->count - piece->wire_first, piece->count << piece->shift);
    char *start = (char *)piece->second + from * place->page_size;
    uint64_t size = (to - from) * place->page_size;
    if (!pn_in_place(rdma->lane.dest, piece)) /* else its pages are there */
        /* Makes its pages present, if that can be done: registering does that one by one, which
         * takes longer. */
        pn_populate((uintptr_t)start, size);
    place->chunk->local = rdma->verbs.reg_mr(rdma->pd, start, size, IBV_ACCESS_LOCAL_WRITE);
    return place->chunk->local;
}

static bool within(const struct ibv_mr *mr, uint64_t address, uint64_t size) {
    uint64_t offset = address - (uintptr_t)mr->addr;
    return offset <= mr->length && size <= mr->length - offset;
}

/* The registered memory where pages of one chunk belong, or NULL if they cannot be received
 * there. */
static struct ibv_mr *in_place(struct pn_rdma *rdma, const struct run *pages,
                               const struct place *place) {
    const struct pn_piece *piece = pages->piece;
    uint64_t wire = on_wire(piece, pages->first), count = pages->count << piece->shift;
    if (!piece->second || wire + count > place->first + place->count)
        return NULL;
    /* Registering takes longer than copying: it is for many pages, none of which a thread waits
     * for. */
    struct ibv_mr *mr =
        pages->class_ == PN_BACKGROUND ? register_local(rdma, piece, place) : place->chunk->local;
    uint64_t to = piece->second + (pages->first - piece->first) * piece->page_size;
    return mr && within(mr, to, pages->count * piece->page_size) ? mr : NULL;
}

static void add_part(struct read_batch *batch, uint64_t to, uint32_t lkey, uint64_t from,
                     uint32_t rkey, uint64_t size) {
    struct ibv_sge *part = &batch->parts[batch->count];
    struct ibv_send_wr *request = &batch->requests[batch->count];
    *part = (struct ibv_sge){.addr = to, .length = (uint32_t)size, .lkey = lkey};
    *request = (struct ibv_send_wr){.opcode = IBV_WR_RDMA_READ, .sg_list = part, .num_sge = 1};
    request->rdma.remote_addr = from;
    request->rdma.rkey = rkey;
    if (batch->count)
        request[-1].next = request;
    batch->count++;
}

/* Adds a work request for each chunk that the pages lie in. The last one reports their
 * completion. */
static void add_parts(struct pn_rdma *rdma, struct under_way *read, uint64_t to, uint32_t lkey) {
    struct read_batch *batch = &rdma->batches[read->queue_pair];
    uint64_t at = on_wire(read->pages.piece, read->pages.first);
    uint64_t end = at + (read->pages.count << read->pages.piece->shift);
    while (at < end) {
        struct place place = pn_chunks_place(&rdma->chunks, at);
        uint64_t count = pn_at_most(end, place.first + place.count) - at;
        place.chunk->reads++;
        pn_chunks_use(&rdma->chunks, place.chunk);
        /* A chunk of zeros has no key: the memory for its pages is cleared. */
        if (place.chunk->state == CHUNK_ZERO) {
            int error = pn_clear(rdma->lane.dest, to, count * place.page_size);
            if (error)
                pn_lane_end_placing(&rdma->lane, error);
        } else {
            uint64_t from = place.chunk->address + (at - place.first) * place.page_size;
            add_part(batch, to, lkey, from, place.chunk->rkey, count * place.page_size);
            read->parts++;
        }
        to += count * place.page_size;
        at += count;
    }
    batch->requests[batch->count - 1].send_flags = IBV_SEND_SIGNALED;
    batch->requests[batch->count - 1].wr_id = (uint64_t)(read - rdma->reads);
}

static uint64_t parts_of(const struct pn_rdma *rdma, const struct run *pages) {
    return pages->count * pages->piece->page_size / rdma->config.chunk_size + 2;
}

static bool has_space(const struct pn_rdma *rdma, int queue_pair, uint64_t parts) {
    const struct read_batch *batch = &rdma->batches[queue_pair];
    /* The background leaves half of the stage to pages that threads wait for. */
    uint32_t reserved = queue_pair ? rdma->slot_count / 2 : 0;
    return rdma->free_read_count && rdma->free_slot_count > reserved &&
           batch->count + batch->posted + parts <= SEND_QUEUE;
}

/* Begins to read pages, none of which is known to be zero, as many as fit. Returns how many it
 * dealt with; 0: there is no room now. */
static uint64_t begin_read(struct pn_rdma *rdma, struct run pages) {
    int queue_pair = pages.class_ == PN_BACKGROUND;
    const struct pn_piece *piece = pages.piece;
    pages.count = pn_at_most(pages.count, rdma->slot_size / piece->page_size);
    struct place place = pn_chunks_place(&rdma->chunks, on_wire(piece, pages.first));
    if (!piece->shift) /* stay in one chunk, unless a chunk is a part of a page */
        pages.count =
            pn_at_most(pages.count, place.first + place.count - on_wire(piece, pages.first));
    if (!has_space(rdma, queue_pair, parts_of(rdma, &pages)))
        return 0;
    uint64_t skipped = 0;
    struct ibv_mr *mr = in_place(rdma, &pages, &place);
    if (mr) {
        pages.count = pn_take(rdma->lane.dest, pages.first, pages.count);
        if (!pages.count) { /* its owner has given it up */
            pn_stats_add(rdma->lane.dest->config.map, pages.class_, PN_DROPPED, 1);
            if (!queue_pair)
                pn_pace_came(&rdma->lane.pace, pages.class_, piece->page_size, pn_now());
            skipped = 1;
        }
    }
    if (skipped)
        return skipped;
    struct under_way *read = &rdma->reads[rdma->free_reads[--rdma->free_read_count]];
    *read = (struct under_way){.pages = pages, .slot = -1, .queue_pair = (uint8_t)queue_pair};
    if (mr) {
        add_parts(rdma, read, piece->second + (pages.first - piece->first) * piece->page_size,
                  mr->lkey);
    } else {
        read->slot = rdma->free_slots[--rdma->free_slot_count];
        add_parts(rdma, read, (uintptr_t)rdma->stage + (uint64_t)read->slot * rdma->slot_size,
                  rdma->stage_mr->lkey);
    }
    rdma->demand_reads += pages.class_ == PN_DEMAND;
    read->since = pn_now();
    if (queue_pair)
        pn_pace_sent(&rdma->lane.pace, pages.class_, pages.count * piece->page_size);
    pn_stats_add(rdma->lane.dest->config.map, pages.class_, PN_REQUESTS, 1);
    return pages.count;
}

/* Begins what can be begun of a run whose keys are here. Returns how many of its pages are dealt
 * with. */
static uint64_t begin(struct pn_rdma *rdma, const struct run *want) {
    uint64_t done = 0;
    while (done < want->count && !rdma->lane.ended) {
        bool zero;
        struct run part = *want;
        part.first += done;
        part.count = alike(rdma, part.piece, part.first, want->count - done, &zero);
        uint64_t begun = part.count;
        if (zero) {
            uint64_t size = part.count * part.piece->page_size;
            pn_lane_place(&rdma->lane, &part, NULL);
            /* Only READs count as in flight, and zeros take nothing of a limited link. */
            if (part.class_ == PN_BACKGROUND)
                pn_refund(rdma->lane.dest, size);
            else
                pn_pace_came(&rdma->lane.pace, part.class_, size, pn_now());
            pn_stats_add(rdma->lane.dest->config.map, part.class_, PN_RUNS, 1);
        } else {
            begun = begin_read(rdma, part);
        }
        if (!begun)
            break;
        done += begun;
    }
    return done;
}

/* ---- wants ---- */

static bool can_want(struct lane *lane, uint32_t requests) {
    const struct pn_rdma *rdma = of_lane(lane);
    return rdma->demanded.count + requests <= WANTS && rdma->prefetched.count + requests <= WANTS;
}

static void want(struct lane *lane, const struct run *run) {
    struct wants *wants =
        run->class_ == PN_DEMAND ? &of_lane(lane)->demanded : &of_lane(lane)->prefetched;
    pn_pace_sent(&lane->pace, run->class_, run->count * run->piece->page_size);
    wants->items[wants->count++] = *run;
}

static const struct asking wanting = {want, can_want};

/* Begins what can be begun of the wants. Only the first that waits for keys may have others given
 * back for it: several wants would take keys from each other for ever. */
static void begin_wants(struct pn_rdma *rdma, struct wants *wants, bool *first) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < wants->count; i++) {
        struct run *item = &wants->items[i];
        uint64_t page = on_wire(item->piece, item->first);
        if (pn_chunks_have(&rdma->chunks, page, page + (item->count << item->piece->shift),
                           *first)) {
            uint64_t done = begin(rdma, item);
            item->first += done;
            item->count -= done;
        } else {
            *first = false;
        }
        if (item->count)
            wants->items[kept++] = *item;
    }
    /* Placing zeros may have read faults, whose wants came behind: those were looked at too. */
    wants->count = kept;
}

/* ---- background ---- */

/* Whether every page that the piece has of the chunk is in place, or given up: its key is then of
 * no more use. */
static bool is_done(struct pn_rdma *rdma, const struct pn_piece *piece, const struct place *place) {
    uint64_t from = place->first > piece->wire_first ? place->first - piece->wire_first : 0;
    uint64_t to =
        pn_at_most(place->first + place->count - piece->wire_first, piece->count << piece->shift);
    for (uint64_t page = piece->first + (from >> piece->shift);
         page < piece->first + (to >> piece->shift); page++) {
        int state = pn_map_state(rdma->lane.dest->config.map, page);
        if (state != PN_RESIDENT && state != PN_REMOVED && state != PN_COPIED)
            return false;
    }
    return true;
}

/* Asks for keys ahead of the background, which mostly continues where it is, and should find them
 * here. Several are asked for at a time, so the source is not woken for each. */
static void ask_ahead(struct pn_rdma *rdma, const struct pn_piece *piece, uint64_t page) {
    uint64_t at = on_wire(piece, page), past = on_wire(piece, piece->first + piece->count);
    uint32_t most = (uint32_t)pn_at_most(rdma->chunks.granted, PN_AHEAD);
    bool asking = false;
    for (uint32_t i = 0; i < most && at < past; i++) {
        struct place place = pn_chunks_place(&rdma->chunks, at);
        if (place.chunk->state == CHUNK_FAR && !is_done(rdma, piece, &place)) {
            if (!asking && i > most / 2)
                return;
            asking = true;
            pn_chunks_ask(&rdma->chunks, &place, false);
        }
        at = place.first + place.count;
    }
}

static bool is_readable(struct pn_rdma *rdma, const struct run *run, bool may_give_back) {
    uint64_t wire = on_wire(run->piece, run->first), end = wire + (run->count << run->piece->shift);
    return pn_chunks_have(&rdma->chunks, wire, end, may_give_back) &&
           has_space(rdma, 1, parts_of(rdma, run));
}

/* Begins the next pages of the run at the ring's head. False: nothing can be begun now. */
static bool begin_next(struct pn_rdma *rdma, bool may_give_back) {
    struct lane *lane = &rdma->lane;
    struct run next;
    if (!pn_lane_find_next(lane, &next) || !is_readable(rdma, &next, may_give_back) ||
        !pn_lane_claim_next(lane, &next))
        return false;
    uint64_t begun = next.count ? begin(rdma, &next) : 0, left = next.count - begun;
    /* There is no room for the rest: its claim is undone, except for pages that a thread waits for
     * by now. */
    if (left)
        pn_map_replace(lane->dest->config.map, next.first + begun, left, PN_COMING, PN_MISSING);
    pn_lane_go_past(lane, next.count ? begun : 1);
    ask_ahead(rdma, next.piece, next.first);
    return !left;
}

/* ---- completions ---- */

static void post(struct pn_rdma *rdma, int queue_pair) {
    struct read_batch *batch = &rdma->batches[queue_pair];
    struct ibv_send_wr *bad;
    if (!batch->count || rdma->lane.ended)
        return;
    int error = rdma->context->post_send(rdma->pairs[queue_pair], batch->requests, &bad);
    if (error)
        pn_lane_end(&rdma->lane, PN_END_BROKEN, error < 0 ? -error : error, "");
    batch->posted += batch->count;
    batch->count = 0;
}

static void let_go_of_chunks(struct pn_rdma *rdma, const struct run *pages) {
    uint64_t at = on_wire(pages->piece, pages->first),
             end = at + (pages->count << pages->piece->shift);
    while (at < end) {
        struct place place = pn_chunks_place(&rdma->chunks, at);
        place.chunk->reads--;
        if (!place.chunk->reads && place.chunk->state == CHUNK_HERE &&
            is_done(rdma, pages->piece, &place))
            pn_chunks_give_back(&rdma->chunks, place.chunk);
        at = place.first + place.count;
    }
}

static void came(struct pn_rdma *rdma, struct under_way *read) {
    struct run *pages = &read->pages;
    struct pn_map *map = rdma->lane.dest->config.map;
    rdma->batches[read->queue_pair].posted -= read->parts;
    rdma->demand_reads -= pages->class_ == PN_DEMAND;
    uint64_t now = pn_now(), size = pages->count * pages->piece->page_size;
    if (pages->class_ == PN_DEMAND)
        pn_pace_waited(&rdma->lane.pace, now - read->since, now);
    else if (pages->class_ == PN_BACKGROUND)
        pn_pace_response(&rdma->lane.pace, now - read->since, size);
    pn_pace_wire(&rdma->lane.pace, pages->class_, size, size);
    pn_stats_add(map, pages->class_, PN_RUNS, 1);
    pn_stats_add(map, pages->class_, PN_WIRE_BYTES, size);
    if (read->slot < 0) {
        pn_lane_put(&rdma->lane, pages);
    } else {
        const char *bytes = rdma->stage + (uint64_t)read->slot * rdma->slot_size;
        pn_lane_place(&rdma->lane, pages, bytes);
        rdma->free_slots[rdma->free_slot_count++] = (uint16_t)read->slot;
    }
    pn_pace_came(&rdma->lane.pace, pages->class_, size, now);
    let_go_of_chunks(rdma, pages);
    rdma->free_reads[rdma->free_read_count++] = (uint16_t)(read - rdma->reads);
}

static void failed(struct pn_rdma *rdma, const struct ibv_wc *completion) {
    if (completion->status == IBV_WC_RETRY_EXC_ERR)
        pn_lane_end(&rdma->lane, PN_END_BROKEN, ETIMEDOUT, "");
    else /* a source that is killed loses its keys before its queue pairs */
        pn_lane_end(&rdma->lane, PN_END_BROKEN, 0, "a READ of its memory failed: %s",
                    rdma->verbs.wc_status_str(completion->status));
}

/* Takes up to 16 completions of demand, but only one of the background, after which demand is
 * looked at again. False: there was none. */
static bool take_completions(struct pn_rdma *rdma, int queue_pair) {
    struct ibv_wc completions[16];
    int room = queue_pair ? 1 : 16;
    int got = rdma->context->poll_cq(rdma->queues[queue_pair], room, completions);
    for (int i = 0; i < got && !rdma->lane.ended; i++)
        if (completions[i].status == IBV_WC_SUCCESS)
            came(rdma, &rdma->reads[completions[i].wr_id]);
        else
            failed(rdma, &completions[i]);
    return got > 0;
}

/* Takes one event: if there is another, epoll reports it again. */
static void take_channel_event(struct pn_rdma *rdma) {
    struct ibv_cq *queue;
    void *data;
    if (!rdma->verbs.get_cq_event(rdma->channel, &queue, &data)) {
        rdma->verbs.ack_cq_events(queue, 1);
        rdma->armed[queue == rdma->queues[1]] = false;
    }
}

/* Asks for notice of the next completions: just before sleeping, and only while something is in
 * flight. On a near device most READs that threads wait for have completed by then, and both asking
 * for notice and getting it cost time. A completion that came before it was asked for gives no
 * notice, so the queue is looked at once more. True: there was one. */
static bool arm(struct pn_rdma *rdma) {
    bool came = false;
    for (int i = 0; i < 2 && !rdma->lane.ended; i++) {
        if (rdma->armed[i] || !rdma->batches[i].posted)
            continue;
        rdma->context->req_notify_cq(rdma->queues[i], 0);
        rdma->armed[i] = true;
        came = take_completions(rdma, i) || came;
    }
    return came;
}

static void take_device_event(struct pn_rdma *rdma) {
    struct ibv_async_event event;
    if (rdma->verbs.get_async_event(rdma->context, &event))
        return;
    rdma->verbs.ack_async_event(&event);
    if (event.type == IBV_EVENT_DEVICE_FATAL)
        pn_lane_end(&rdma->lane, PN_END_BROKEN, ENODEV, "");
}

/* ---- the loop ---- */

static void act(struct pn_rdma *rdma, const struct epoll_event *event) {
    const struct pn_lane_config *config = &rdma->config.lane;
    int fd = event->data.fd;
    if (fd == config->stop_fd)
        pn_lane_end(&rdma->lane, PN_END_STOPPED, 0, "");
    else if (fd == rdma->lane.dest->config.uffd)
        pn_lane_act_on_uffd(&rdma->lane, event->events);
    else if (pn_lane_is_wanted_fd(&rdma->lane, fd))
        pn_lane_take_wanted(&rdma->lane);
    else if (fd == config->sock)
        pn_chunks_receive(&rdma->chunks);
    else if (fd == rdma->channel->fd)
        take_channel_event(rdma);
    else if (fd == rdma->context->async_fd)
        take_device_event(rdma);
    else
        pn_drain_eventfd(fd);
}

static void take_demanded(struct pn_rdma *rdma) {
    while (!rdma->lane.ended && take_completions(rdma, 0))
        ;
}

/* If the source may pin no more, the lane pauses until it is to be asked again. */
static void pause_until_asking(struct pn_rdma *rdma) {
    uint64_t left = pn_chunks_pause(&rdma->chunks);
    if (left)
        rdma->lane.pause = pn_at_most(rdma->lane.pause, left);
}

static void give_back_keys(struct pn_rdma *rdma) {
    struct lane *lane = &rdma->lane;
    bool all = pn_chunks_give_back_all(&rdma->chunks);
    pn_lane_flush(lane);
    lane->pause = UINT64_MAX;
    atomic_store(&rdma->keyless, all && lane->out_start == lane->out_end);
}

static void begin_all(struct pn_rdma *rdma) {
    struct lane *lane = &rdma->lane;
    bool first = true;
    begin_wants(rdma, &rdma->demanded, &first);
    post(rdma, 0);
    take_demanded(rdma); /* a near peer, or a device in software, is done by now */
    begin_wants(rdma, &rdma->prefetched, &first);
    post(rdma, 0);
    pn_lane_look(lane);
    lane->pause = UINT64_MAX;
    while (!lane->ended && begin_next(rdma, first))
        ;
    pause_until_asking(rdma);
    post(rdma, 1);
    pn_lane_flush(lane);
}

/* With processors to spare, polls before sleeping for the end of a READ that a thread waits for.
 * True: it came. */
static bool spin(struct pn_rdma *rdma) {
    if (!rdma->spin_ns || !rdma->demand_reads || rdma->lane.ended)
        return false;
    rdma->spun++;
    uint64_t until = pn_now() + rdma->spin_ns;
    while (pn_now() < until)
        if (take_completions(rdma, 0))
            return true;
    return false;
}

static void turn(struct pn_rdma *rdma) {
    struct lane *lane = &rdma->lane;
    struct epoll_event ready[READY];
    take_demanded(rdma);
    bool busy = !lane->ended && take_completions(rdma, 1);
    if (lane->ended)
        return;
    (atomic_load(&rdma->gives_back) ? give_back_keys : begin_all)(rdma);
    uint32_t out = lane->out_start < lane->out_end ? EPOLLOUT : 0;
    pn_lane_watch(lane, lane->config->sock, EPOLLIN | out, &lane->sock_events);
    bool full = !pn_lane_has_faults_room(lane);
    pn_lane_watch(lane, lane->dest->config.uffd, full ? 0 : EPOLLIN, &lane->work_events);
    pn_lane_watch_wanted(lane, full);
    busy = spin(rdma) || arm(rdma) || busy;
    if (lane->ended)
        return;
    if (busy)
        lane->pause = 0;
    int count = pn_lane_wait(lane, ready, READY);
    for (int i = 0; i < count && !lane->ended; i++)
        act(rdma, &ready[i]);
    if (lane->sock.pending && !lane->ended)
        pn_chunks_receive(&rdma->chunks);
    pn_lane_look_again(lane);
}

static void loop(void *argument) {
    struct pn_rdma *rdma = argument;
    pn_lane_ask_waiting(&rdma->lane);
    while (!rdma->lane.ended)
        turn(rdma);
}

void pn_rdma_run(struct pn_rdma *rdma, int sock, struct pn_tls *tls, struct pn_end *end) {
    rdma->config.lane.sock = sock;
    rdma->config.lane.tls = tls;
    rdma->lane.sock = (struct sock){.fd = sock, .tls = tls};
    rdma->lane.end = end;
    if (pn_run_loop(0, loop, rdma))
        pn_lane_end(&rdma->lane, PN_END_NO_MEMORY, ENOMEM, "");
}

void pn_rdma_give_back(struct pn_rdma *rdma, int give_back) {
    atomic_store(&rdma->keyless, 0);
    atomic_store(&rdma->gives_back, give_back);
}

int pn_rdma_is_keyless(const struct pn_rdma *rdma) { return atomic_load(&rdma->keyless); }

/* ---- life ---- */

uint32_t pn_rdma_number(const struct pn_rdma *rdma, int queue_pair) {
    return rdma->pairs[queue_pair]->qp_num;
}

uint64_t pn_rdma_spun(const struct pn_rdma *rdma) { return rdma->spun; }

static int make_queue_pair(struct pn_rdma *rdma, int i) {
    rdma->queues[i] = rdma->verbs.create_cq(rdma->context, SEND_QUEUE, NULL, rdma->channel, 0);
    if (!rdma->queues[i])
        return -errno;
    rdma->pairs[i] = pn_verbs_make_pair(&rdma->verbs, rdma->pd, rdma->queues[i], SEND_QUEUE,
                                        rdma->config.port, 0);
    return rdma->pairs[i] ? 0 : -errno;
}

int pn_rdma_connect(struct pn_rdma *rdma, int queue_pair, uint32_t psn,
                    const struct pn_rdma_peer *peer) {
    struct pn_verbs_join join = {
        .port = rdma->config.port, .gid_index = rdma->config.gid_index, .psn = psn};
    join.reads = 1; /* the peer does none */
    return pn_verbs_join_pair(&rdma->verbs, rdma->pairs[queue_pair], &join, peer);
}

static int prepare_device(struct pn_rdma *rdma) {
    int error = pn_verbs_load(&rdma->verbs);
    if (error)
        return error;
    rdma->context = pn_verbs_open(&rdma->verbs, rdma->config.device);
    if (!rdma->context || !(rdma->pd = rdma->verbs.alloc_pd(rdma->context)) ||
        !(rdma->channel = rdma->verbs.create_comp_channel(rdma->context)))
        return errno ? -errno : -ENODEV;
    if (fcntl(rdma->channel->fd, F_SETFL, O_NONBLOCK) ||
        fcntl(rdma->context->async_fd, F_SETFL, O_NONBLOCK))
        return -errno;
    for (int i = 0; i < 2 && !error; i++)
        error = make_queue_pair(rdma, i);
    return error;
}

static int prepare_stage(struct pn_rdma *rdma) {
    uint64_t largest = rdma->lane.dest->config.max_page_size;
    rdma->slot_size = largest > SLOT_BYTES ? largest : SLOT_BYTES;
    rdma->slot_count = (uint32_t)(ARENA_BYTES / rdma->slot_size);
    if (rdma->slot_count < MIN_SLOTS)
        rdma->slot_count = MIN_SLOTS;
    uint64_t size = rdma->slot_count * rdma->slot_size;
    rdma->stage = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (rdma->stage == MAP_FAILED)
        return -errno;
    rdma->stage_mr = rdma->verbs.reg_mr(rdma->pd, rdma->stage, size, IBV_ACCESS_LOCAL_WRITE);
    return rdma->stage_mr ? 0 : -errno;
}

static int prepare_memory(struct pn_rdma *rdma) {
    if (pn_chunks_init(&rdma->chunks))
        return -ENOMEM;
    for (uint32_t i = 0; i < READS; i++)
        rdma->free_reads[rdma->free_read_count++] = (uint16_t)(READS - 1 - i);
    for (uint32_t i = 0; i < rdma->slot_count; i++)
        rdma->free_slots[rdma->free_slot_count++] = (uint16_t)i;
    rdma->spin_ns = pn_pace_spin(sysconf(_SC_NPROCESSORS_ONLN));
    return 0;
}

static int prepare_loop(struct pn_rdma *rdma) {
    struct lane *lane = &rdma->lane;
    int others[] = {lane->config->stop_fd, lane->config->work_fd, rdma->channel->fd,
                    rdma->context->async_fd};
    lane->faults.asking = &wanting;
    if (!pn_lane_prepare(lane))
        return errno ? -errno : -ENOMEM;
    lane->pace.chunk = pn_at_most(lane->pace.chunk, rdma->slot_size);
    for (int i = 0; i < 4; i++) {
        uint32_t watched = UNWATCHED;
        if (!pn_lane_watch(lane, others[i], EPOLLIN, &watched))
            return -errno;
    }
    return 0;
}

struct pn_rdma *pn_rdma_new(const struct pn_rdma_config *config, int *error) {
    struct pn_rdma *rdma = calloc(1, sizeof *rdma);
    if (!rdma) {
        *error = -ENOMEM;
        return NULL;
    }
    rdma->config = *config;
    rdma->lane =
        (struct lane){.config = &rdma->config.lane, .dest = config->lane.dest, .epoll = -1};
    rdma->stage = MAP_FAILED;
    rdma->chunks = (struct chunks){
        .lane = &rdma->lane,
        .verbs = &rdma->verbs,
        .blocks = config->blocks,
        .block_count = config->block_count,
        .chunk_size = config->chunk_size,
        .count = config->chunk_count,
    };
    errno = 0;
    *error = prepare_device(rdma);
    *error = *error ? *error : prepare_stage(rdma);
    *error = *error ? *error : prepare_memory(rdma);
    *error = *error ? *error : prepare_loop(rdma);
    if (!*error)
        return rdma;
    pn_rdma_free(rdma);
    return NULL;
}

static void free_memory(struct pn_rdma *rdma) {
    if (rdma->stage_mr)
        rdma->verbs.dereg_mr(rdma->stage_mr);
    if (rdma->stage != MAP_FAILED)
        munmap(rdma->stage, rdma->slot_count * rdma->slot_size);
    pn_chunks_free(&rdma->chunks);
    pn_lane_clean_up(&rdma->lane);
}

/* The queue pairs go first: nothing is written to our memory after that. */
void pn_rdma_free(struct pn_rdma *rdma) {
    for (int i = 0; i < 2; i++) {
        if (rdma->pairs[i])
            rdma->verbs.destroy_qp(rdma->pairs[i]);
        if (rdma->queues[i])
            rdma->verbs.destroy_cq(rdma->queues[i]);
    }
    free_memory(rdma);
    if (rdma->channel)
        rdma->verbs.destroy_comp_channel(rdma->channel);
    if (rdma->pd)
        rdma->verbs.dealloc_pd(rdma->pd);
    if (rdma->context)
        rdma->verbs.close_device(rdma->context);
    pn_verbs_unload(&rdma->verbs);
    free(rdma);
}
