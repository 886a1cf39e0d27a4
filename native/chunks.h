/* Chunks of the source's memory that may be READ: keys are asked for, kept, and given back. */
#ifndef PAGENET_CHUNKS_H
#define PAGENET_CHUNKS_H
#include "lane.h"
#include "verbs.h"

enum { PN_AHEAD = 8 }; /* chunks whose keys are asked for before the background comes to them */

enum chunk_state { CHUNK_FAR, CHUNK_ASKED, CHUNK_HERE, CHUNK_ZERO };

/* So many bytes of the source's memory, for which there is one key. */
struct chunk {
    uint64_t address;
    uint64_t zero[4];
    struct ibv_mr *local; /* our own memory for the same pages, where it is registered */
    uint32_t rkey;
    uint32_t reads;        /* under way */
    uint32_t older, newer; /* of those that are here: chunk + 1, 0: none */
    uint8_t state;
    bool refused;
};

/* A chunk, and the pages in it, as numbered on the wire. */
struct place {
    struct chunk *chunk;
    uint64_t first, count;
    uint64_t page_size;
};

struct chunks {
    struct lane *lane; /* asks for keys by its outbox */
    const struct pn_verbs *verbs;
    const struct pn_rdma_block *blocks;
    uint64_t block_count, chunk_size, count;
    struct chunk *items;
    uint32_t oldest, newest, here; /* chunks + 1 */
    uint32_t granted; /* chunks that the source lets us have at once, as far as we know */
    uint64_t refused_until;
    uint8_t inbox[24 + 1024];
    size_t have;
};

/* Blocks, their count, the size and number of chunks, lane and verbs are set by the caller. 0 or
 * -errno. */
int pn_chunks_init(struct chunks *chunks);
void pn_chunks_free(struct chunks *chunks);
struct place pn_chunks_place(const struct chunks *chunks, uint64_t page);
/* Of all that are here, this one is used last. */
void pn_chunks_use(struct chunks *chunks, struct chunk *chunk);
/* Nothing is read there now. The source may use what it pins for other pages. */
void pn_chunks_give_back(struct chunks *chunks, struct chunk *chunk);
/* waited_for: rather than be refused again, give back another one. */
void pn_chunks_ask(struct chunks *chunks, const struct place *place, bool waited_for);
/* Whether the keys to all pages of a run (as numbered on the wire) are here; those that are not are
 * asked for. */
bool pn_chunks_have(struct chunks *chunks, uint64_t first, uint64_t end, bool waited_for);
/* Take the source's answers from the socket. */
void pn_chunks_receive(struct chunks *chunks);
/* ns until a source that may pin no more is asked again; 0: it has not said so of late. */
uint64_t pn_chunks_pause(const struct chunks *chunks);

#endif
