/* What tests and benches need, and the programs that move memory do not: an extension module of its
 * own, which shares nothing with the core. The core's C that it uses is compiled into it, too. The
 * compiler and cffi read this header as they do pagenet.h. */
#ifndef PAGENET_TESTING_H
#define PAGENET_TESTING_H
#include "pagenet.h"

struct pn_map; /* of pagenet.h, as the address at which it is mapped */

/* ---- pattern.c: memory whose content is known in advance ---- */

/* Fills `pages` pages of pattern `seed`, from page number `first_page` on: every 8-byte word
 * depends on seed, page and place. One page in zero_every is all zeros (0: none). */
void pn_pattern_fill(void *buffer, uint64_t first_page, uint64_t pages, uint64_t page_size,
                     uint64_t seed, uint64_t zero_every);
/* How many of the pages differ. *bad gets the number of the first that does. */
uint64_t pn_pattern_check(const void *buffer, uint64_t first_page, uint64_t pages,
                          uint64_t page_size, uint64_t seed, uint64_t zero_every, uint64_t *bad);
/* The first 8-byte word of a page. The workload adds one to it at each write. */
uint64_t pn_pattern_word(uint64_t page, uint64_t page_size, uint64_t seed, uint64_t zero_every);
/* The 8-byte word at that place (0, 1, 2...) of a page. */
uint64_t pn_pattern_word_at(uint64_t page, uint64_t place, uint64_t seed, uint64_t zero_every);

/* ---- workload.c: an owner that touches its memory from C threads and checks every byte ---- */

/* The whole program, with argv as documented by `python -m pagenet.testing.workload --help`.
 * Returns its exit status. */
int pn_workload(int argc, char **argv);

/* ---- bench.c: what pagenet-bench measures with, and the bare loops it measures against ---- */

/* Touches pages[i] of memory at `address` from that many threads, each its share of the list in
 * order, and records how long each touch took (ns). UINT64_MAX: the page was not touched, because
 * limit_ns (0: no limit) was over, or, with a map, because this page or all pages were already in
 * place. 0, -EFAULT when a page could never come, or -errno. */
int pn_bench_touch(uint64_t address, uint64_t page_size, const uint64_t *pages, uint64_t count,
                   uint64_t *latencies, int threads, uint64_t limit_ns, const struct pn_map *map);
/* A trace of touches. `threads` (1 to 64) share it: each touches every threads-th page, after
 * work_ns of work, or works_ns[i] before touch i. blocked: touches of pages that were missing;
 * stall_ns: the sum of their latencies; done: touches so far, for other threads to read;
 * latencies (NULL: not wanted): ns of each touch. */
struct pn_play {
    uint64_t address, page_size, work_ns, count, threads;
    const uint64_t *pages, *works_ns;
    uint64_t *latencies;
    uint64_t done, blocked, stall_ns;
    uint64_t until_complete; /* no more touches once every page of the map is there */
};
/* Touches them all: 0, -EFAULT when a page could never come, or -errno. */
int pn_bench_play(struct pn_play *play, const struct pn_map *map);
/* How many of these pages (NULL: of the first `count`) are in that state. */
uint64_t pn_bench_count(const struct pn_map *map, const uint64_t *pages, uint64_t count, int state);
/* Answers each 24-byte request on a blocking socket with a header and a page, until the peer
 * closes. */
int pn_bench_page_server(int sock, uint64_t page_size);
/* Answers each fault with a COPY of a page that it asks for over a blocking socket, or (sock -1) of
 * one at hand, until stop_fd is readable. */
int pn_bench_fault_floor(int uffd, int sock, int stop_fd, uint64_t page_size);
int pn_bench_send(int sock, const void *bytes, uint64_t length, uint64_t chunk);
/* Receives. With a uffd it puts each chunk in place from `address` on: by COPY; or (second) it
 * receives through a second mapping of that memory, and continues it; or (file, else -1) it writes
 * the chunk to the file behind that memory, and continues it. */
int pn_bench_receive(int sock, uint64_t length, uint64_t chunk, int uffd, uint64_t address,
                     uint64_t second, int file);
void pn_bench_memcpy(uint64_t to, uint64_t from, uint64_t length);
/* Writes a byte to every second page of the first `pages`. */
void pn_bench_write(uint64_t address, uint64_t page_size, uint64_t pages);
/* How many bytes of this process's memory are not protected against writing, by PAGEMAP_SCAN alone;
 * or -errno. */
int64_t pn_bench_scan(int pagemap, uint64_t address, uint64_t length);
/* Takes each page of the map from MISSING to RESIDENT. Returns how many claims that took. */
uint64_t pn_bench_claims(struct pn_map *map);

/* ---- tls.c: bare loops of OpenSSL, or (directory NULL) the same without TLS ---- */

/* The directory is as --tls-dir takes it, and the socket blocks. Answers each 24 bytes with `size`
 * bytes, until the peer closes. 0 or -errno (-EPROTO: the handshake has failed). */
int pn_bench_answer_pings(int sock, const char *directory, uint64_t size);
/* Asks `count` times, and notes how long each answer took, in ns. */
int pn_bench_ping(int sock, const char *directory, uint64_t size, uint64_t count,
                  uint64_t *latencies);
/* Sends `length` bytes, a chunk at a time, once it is asked to. */
int pn_bench_tls_send(int sock, const char *directory, uint64_t length, uint64_t chunk);
/* Asks for them. Returns how long they took, in ns, or -errno. */
int64_t pn_bench_tls_receive(int sock, const char *directory, uint64_t length, uint64_t chunk);

/* ---- relay.c: a longer path than this machine has ---- */

/* Joins each connection that `listener` takes to one to host (IPv4) and port, with delay_ns on the
 * way in each direction, and `rate` bytes a second in each direction of each (0: as fast as can
 * be), until stop_fd is readable. *answered: bytes that came from there. 0 or -errno. */
int pn_bench_relay(int listener, const char *host, int port, uint64_t delay_ns, uint64_t rate,
                   int stop_fd, uint64_t *answered);

/* ---- restore.c: guests that are restored, and the least that can restore them ---- */

/* A guest: `size` bytes of memory in which everything is missing: anonymous, or (shared) a private
 * mapping of the handler's cache. It touches `pages` in their order. Times are in ns of
 * CLOCK_MONOTONIC. */
struct pn_guest {
    const char *socket;
    int shared;
    uint64_t size, seed, touches;
    const uint64_t *pages;
    uint64_t *ended;    /* of each touch: when it was over */
    uint64_t *took;     /* and how long it was */
    uint64_t connected; /* when the guest began to connect */
    uint64_t wrong;     /* touched pages without the pattern's first word */
    uint64_t address;
    int uffd, sock;
};
/* Makes the memory, unless it is shared, and its userfaultfd. The process ends with the thread that
 * has started it. 0 or -errno. */
int pn_bench_guest_prepare(struct pn_guest *guest);
/* Connects to the handler, hands the memory over, and touches it. 0 or -errno. */
int pn_bench_guest_arrive(struct pn_guest *guest);
/* The least: takes guests at `listener`, and answers each of their faults with one COPY from
 * `memory`, which has `size` bytes, in one thread, until stop_fd is readable. 0 or -errno. */
int pn_bench_handler(int listener, const void *memory, uint64_t size, int stop_fd);

#endif
