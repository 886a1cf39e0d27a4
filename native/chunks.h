/* Chunks of the source's memory that may be READ: their keys are asked for, kept, and given
 * back. */
#ifndef PAGENET_CHUNKS_H
#define PAGENET_CHUNKS_H
#include "lane.h"
#include "verbs.h"

/* Chunks whose keys are asked for before the background gets there. */
enum { PN_AHEAD = 8 };

enum chunk_state { CHUNK_FAR, CHUNK_ASKED, CHUNK_HERE, CHUNK_ZERO };

/* A stretch of the source's memory for which there is one key. */
struct chunk {
    uint64_t address;
    uint64_t zero[4];
    struct ibv_mr *local; /* this process's memory for the same pages, if it is registered */
    uint32_t rkey;
    uint32_t reads;        /* in flight */
    uint32_t older, newer; /* among those that are here: chunk + 1; 0: none */
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
    uint32_t asked, zero;          /* chunks in that state */
    /* Keys that the source grants at a time, as far as is known. */
    uint32_t granted;
    uint64_t refused_until;
    uint8_t inbox[24 + 1024];
    size_t have;
};

/* The caller has set the blocks, their count, the size and number of chunks, lane and verbs. 0 or
 * -errno. */
int pn_chunks_init(struct chunks *chunks);
void pn_chunks_free(struct chunks *chunks);
struct place pn_chunks_place(const struct chunks *chunks, uint64_t page);
/* Makes this chunk the most recently used of all that are here. */
void pn_chunks_use(struct chunks *chunks, struct chunk *chunk);
/* Gives back the key to a chunk of which nothing is being read. The source may then pin other
 * memory instead. */
void pn_chunks_give_back(struct chunks *chunks, struct chunk *chunk);
/* Gives back every key, and forgets which chunks are zero. To be called while nothing is being
 * read. Returns whether that is done; if not, it waits for an answer of the source, or for room in
 * the outbox. */
bool pn_chunks_give_back_all(struct chunks *chunks);
/* Asks for the key to a chunk. waited_for: if this one was refused before, another one is given
 * back, so that it is not refused again. */
void pn_chunks_ask(struct chunks *chunks, const struct place *place, bool waited_for);
/* Whether the keys to all pages of a run (as numbered on the wire) are here. Those that are not are
 * asked for. */
bool pn_chunks_have(struct chunks *chunks, uint64_t first, uint64_t end, bool waited_for);
/* Takes the source's answers from the socket. */
void pn_chunks_receive(struct chunks *chunks);
/* How many ns until a source that may pin no more is asked again; 0: it has not refused a key
 * lately. */
uint64_t pn_chunks_pause(const struct chunks *chunks);

#endif
