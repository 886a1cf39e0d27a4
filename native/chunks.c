/* Keys to chunks of the source's memory, which a destination over RDMA may READ: asked for chunk by
 * chunk, and given back. */
#define _GNU_SOURCE
#include "chunks.h"
#include "keys.h"
#include "thread.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { REFUSED_NS = 10000000 }; /* the source may pin no more: it is asked again after this time */

static const struct pn_rdma_block *block_of(const struct chunks *chunks, uint64_t page) {
    const struct pn_rdma_block *blocks = chunks->blocks;
    uint64_t low = 0, high = chunks->block_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(blocks[middle].first <= page ? &low : &high) = middle;
    }
    return &blocks[low];
}

static uint64_t pages_per_chunk(const struct chunks *chunks, const struct pn_rdma_block *block) {
    return block->page_size < chunks->chunk_size ? chunks->chunk_size / block->page_size : 1;
}

struct place pn_chunks_place(const struct chunks *chunks, uint64_t page) {
    const struct pn_rdma_block *block = block_of(chunks, page);
    uint64_t pages = pages_per_chunk(chunks, block), number = (page - block->first) / pages;
    struct place place = {
        .chunk = &chunks->items[block->chunk + number],
        .first = block->first + number * pages,
        .page_size = block->page_size,
    };
    place.count = pn_at_most(pages, block->first + block->pages - place.first);
    return place;
}

/* The chunks that are here are linked in the order of their last use. */
static void unlink_chunk(struct chunks *chunks, struct chunk *chunk) {
    *(chunk->older ? &chunks->items[chunk->older - 1].newer : &chunks->oldest) = chunk->newer;
    *(chunk->newer ? &chunks->items[chunk->newer - 1].older : &chunks->newest) = chunk->older;
}

static void link_newest(struct chunks *chunks, struct chunk *chunk) {
    uint32_t number = (uint32_t)(chunk - chunks->items) + 1;
    chunk->older = chunks->newest;
    chunk->newer = 0;
    *(chunks->newest ? &chunks->items[chunks->newest - 1].newer : &chunks->oldest) = number;
    chunks->newest = number;
}

void pn_chunks_use(struct chunks *chunks, struct chunk *chunk) {
    if (chunk->state == CHUNK_HERE && chunks->newest != (uint32_t)(chunk - chunks->items) + 1) {
        unlink_chunk(chunks, chunk);
        link_newest(chunks, chunk);
    }
}

static bool say_key(struct chunks *chunks, int kind, const struct place *place) {
    struct lane *lane = chunks->lane;
    struct key_header header = {
        .kind = (uint8_t)kind, .first = place->first, .count = (uint32_t)place->count};
    if (!pn_lane_has_room(lane, sizeof header))
        return false;
    memcpy(lane->outbox + lane->out_end, &header, sizeof header);
    lane->out_end += sizeof header;
    return true;
}

static struct place place_of_chunk(struct chunks *chunks, struct chunk *chunk) {
    uint64_t number = (uint64_t)(chunk - chunks->items), low = 0, high = chunks->block_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        *(chunks->blocks[middle].chunk <= number ? &low : &high) = middle;
    }
    const struct pn_rdma_block *block = &chunks->blocks[low];
    uint64_t pages = (number - block->chunk) * pages_per_chunk(chunks, block);
    return pn_chunks_place(chunks, block->first + pages);
}

void pn_chunks_give_back(struct chunks *chunks, struct chunk *chunk) {
    struct place place = place_of_chunk(chunks, chunk);
    if (!say_key(chunks, KEY_RETURN, &place))
        return; /* no room in the outbox: later */
    unlink_chunk(chunks, chunk);
    chunks->here--;
    chunk->state = CHUNK_FAR;
    if (chunk->local)
        chunks->verbs->dereg_mr(chunk->local);
    chunk->local = NULL;
}

/* False: all are being read, or the outbox is full. */
static bool give_back_oldest(struct chunks *chunks) {
    uint32_t number = chunks->oldest, before = chunks->here;
    while (number && chunks->items[number - 1].reads)
        number = chunks->items[number - 1].newer;
    if (number)
        pn_chunks_give_back(chunks, &chunks->items[number - 1]);
    return chunks->here < before;
}

static void forget_zeros(struct chunks *chunks) {
    for (uint64_t i = 0; chunks->zero && i < chunks->count; i++)
        if (chunks->items[i].state == CHUNK_ZERO) {
            chunks->items[i].state = CHUNK_FAR;
            chunks->zero--;
        }
}

bool pn_chunks_give_back_all(struct chunks *chunks) {
    while (chunks->here && give_back_oldest(chunks))
        ;
    forget_zeros(chunks);
    return !chunks->here && !chunks->asked;
}

void pn_chunks_ask(struct chunks *chunks, const struct place *place, bool waited_for) {
    struct chunk *chunk = place->chunk;
    if (chunk->state != CHUNK_FAR)
        return;
    bool made_room = chunk->refused && waited_for && give_back_oldest(chunks);
    if (!made_room && chunks->refused_until && pn_now() < chunks->refused_until)
        return;
    if (say_key(chunks, KEY_ASK, place)) {
        chunk->state = CHUNK_ASKED;
        chunk->refused = false;
        chunks->asked++;
    }
}

bool pn_chunks_have(struct chunks *chunks, uint64_t first, uint64_t end, bool waited_for) {
    bool all = true;
    while (first < end) {
        struct place place = pn_chunks_place(chunks, first);
        if (place.chunk->state < CHUNK_HERE) {
            pn_chunks_ask(chunks, &place, waited_for);
            all = false;
        }
        first = place.first + place.count;
    }
    return all;
}

/* ---- answers of the source ---- */

static void wrong(struct chunks *chunks, const char *what) {
    pn_lane_end(chunks->lane, PN_END_PROTOCOL, 0, "the peer's answer about a key %s", what);
}

static void key_came(struct chunks *chunks, struct chunk *chunk, const struct key_header *header,
                     const uint8_t *body) {
    struct key key = {0};
    memcpy(&key, body, header->length);
    chunk->address = key.address;
    chunk->rkey = key.rkey;
    memcpy(chunk->zero, key.zero, sizeof key.zero);
    chunk->state = CHUNK_HERE;
    chunks->asked--;
    link_newest(chunks, chunk);
    if (++chunks->here > chunks->granted)
        chunks->granted = chunks->here;
}

static void zeros_came(struct chunks *chunks, struct chunk *chunk) {
    chunk->state = CHUNK_ZERO;
    chunks->asked--;
    chunks->zero++;
}

static void refused(struct chunks *chunks, struct chunk *chunk) {
    chunk->state = CHUNK_FAR;
    chunks->asked--;
    chunk->refused = true;
    chunks->refused_until = pn_now() + REFUSED_NS;
    chunks->granted = chunks->here;
}

static void answer_came(struct chunks *chunks, const struct key_header *header,
                        const uint8_t *body) {
    const struct pn_rdma_block *last = &chunks->blocks[chunks->block_count - 1];
    if (header->kind == KEY_FAILED) {
        pn_lane_end(chunks->lane, PN_END_FAILED, 0, "%.*s", (int)header->length,
                    (const char *)body);
        return;
    }
    if (header->first >= last->first + last->pages) {
        wrong(chunks, "is for a page that there is not");
        return;
    }
    struct place place = pn_chunks_place(chunks, header->first);
    if (place.chunk->state != CHUNK_ASKED || place.first != header->first ||
        place.count != header->count)
        wrong(chunks, "was not asked for");
    else if (header->kind == KEY_HERE &&
             (header->length == KEY_WITHOUT_ZEROS || header->length == sizeof(struct key)))
        key_came(chunks, place.chunk, header, body);
    else if (header->kind == KEY_ZERO && !header->length)
        zeros_came(chunks, place.chunk);
    else if (header->kind == KEY_REFUSED && !header->length)
        refused(chunks, place.chunk);
    else
        wrong(chunks, "makes no sense");
}

static void use_inbox(struct chunks *chunks) {
    size_t used = 0;
    while (chunks->have - used >= sizeof(struct key_header) && !chunks->lane->ended) {
        struct key_header header;
        memcpy(&header, chunks->inbox + used, sizeof header);
        if (header.length > sizeof chunks->inbox - sizeof header) {
            wrong(chunks, "is too long");
            return;
        }
        if (chunks->have - used < sizeof header + header.length)
            break;
        answer_came(chunks, &header, chunks->inbox + used + sizeof header);
        used += sizeof header + header.length;
    }
    chunks->have -= used;
    memmove(chunks->inbox, chunks->inbox + used, chunks->have);
}

void pn_chunks_receive(struct chunks *chunks) {
    size_t room = sizeof chunks->inbox - chunks->have;
    ssize_t got = pn_sock_receive_some(&chunks->lane->sock, chunks->inbox + chunks->have, room);
    if (got > 0) {
        chunks->have += (size_t)got;
        use_inbox(chunks);
    } else if (got == 0) {
        pn_lane_end(chunks->lane, PN_END_CLOSED, 0, "");
    } else {
        pn_lane_end_socket(chunks->lane);
    }
}

uint64_t pn_chunks_pause(const struct chunks *chunks) {
    uint64_t now = pn_now();
    return chunks->refused_until > now ? chunks->refused_until - now : 0;
}

/* ---- life ---- */

int pn_chunks_init(struct chunks *chunks) {
    uint64_t size = chunks->count * sizeof *chunks->items;
    chunks->granted = PN_AHEAD;
    chunks->items = mmap(NULL, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (chunks->items != MAP_FAILED)
        return 0;
    chunks->items = NULL;
    return -ENOMEM;
}

void pn_chunks_free(struct chunks *chunks) {
    if (!chunks->items)
        return;
    for (uint32_t number = chunks->oldest; number; number = chunks->items[number - 1].newer)
        if (chunks->items[number - 1].local)
            chunks->verbs->dereg_mr(chunks->items[number - 1].local);
    munmap(chunks->items, chunks->count * sizeof *chunks->items);
}
