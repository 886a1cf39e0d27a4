/* What the files of the destination's half share with each other alone. */
#ifndef PAGENET_DEST_H
#define PAGENET_DEST_H
#include "pace.h"
#include "pagenet.h"
#include "thread.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { PN_WAITERS = 1024, PN_HELD = 4096 };

/* A fault that waits for a page which is in flight. */
struct pn_waiter {
    _Atomic uint64_t page;  /* plus one; 0: free */
    _Atomic uint64_t since; /* ns */
};

struct pn_dest {
    struct pn_dest_config config;
    /* Guards placing against removals. Locked for reading from "is this page still to be placed?"
     * to the end of the ioctl that places it, and for writing from reading the uffd to the end of
     * marking the pages that it reports as removed. Reading the uffd lets the owner go on, and a
     * page placed after that would bring back what the owner gave up. Not used where the uffd does
     * not report removals. */
    pthread_rwlock_t removal;
    /* Without a lock: the loop that answers faults would wait for a background loop that has the
     * lock and no processor. (A mutex that inherits priority does not help: the kernel does not
     * lend niceness.) Only the loop that answers faults adds waiters. */
    struct pn_waiter waiters[PN_WAITERS];
    atomic_uint waiter_end; /* those from here on are free; only the same loop writes it */
    atomic_uint waiter_count;
    struct pn_pace_shared pace;
    /* Guards paid_until and next_grant of pace, for background lanes and the thread that sets the
     * limit. */
    pthread_mutex_t limiting;
    char *zeros; /* one page of the largest size */
    /* Pages of the sample that have not been touched yet, plus one; 0: none. */
    _Atomic uint64_t held[PN_HELD];
    atomic_uint held_count;
    atomic_bool withheld;        /* pages that come are not made visible */
    atomic_uint left;            /* stretches of zeros that are no longer watched */
    _Atomic uint64_t left_until; /* address at which the last one ends */
};

const struct pn_piece *pn_piece_of_page(const struct pn_dest *dest, uint64_t page);
const struct pn_piece *pn_piece_at(const struct pn_dest *dest, uint64_t address);

/* Whether pages are received directly where they belong, through the second mapping. That is so if
 * its page tables exist, or if no file can be written to instead: a fault for each page costs more
 * than a copy from the cache. */
static inline bool pn_in_place(const struct pn_dest *dest, const struct pn_piece *piece) {
    return piece->second && dest->config.file < 0;
}
/* Stores bytes (NULL: zeros) into the memory behind a piece that has a second mapping. 0 or
 * -errno. */
int pn_write_shared(struct pn_dest *dest, const struct pn_piece *piece, uint64_t first,
                    uint64_t count, const void *bytes);
/* Stores zeros through the second mapping. 0 or -errno (-EFAULT: the owner has made its file
 * shorter). */
int pn_clear(const struct pn_dest *dest, uint64_t to, uint64_t size);
/* Makes PLACING, for the caller to write, the pages from first on that are wanted, up to the first
 * that is not, and at most `count`. Returns how many. */
uint64_t pn_take(struct pn_dest *dest, uint64_t first, uint64_t count);
/* Puts `count` pages from `first` on into place. The caller has taken them, and they lie in one
 * piece. bytes: their content (COPY, MOVE), or NULL for zeros; where there is a second mapping,
 * they are in it already. zero: they came as a flag, which is counted. Wakes the threads that wait
 * for them, and records how long those waited. *done gets how many pages are dealt with. Returns 0;
 * -EAGAIN: the owner's memory is changing: have its events read, and call again for the rest; or
 * -errno. */
int pn_put(struct pn_dest *dest, int class_, uint64_t first, uint64_t count, const void *bytes,
           bool zero, uint64_t *done);
/* Zero pages of one piece, which the caller has taken: if they are many, and in shared memory, they
 * become a hole in the file that is no longer watched. The kernel makes zeros of what is touched in
 * it, so nothing has to be placed, and what is never touched takes no memory. Pages that are
 * withheld, many or few, become a hole that is watched. False: no page was dealt with. */
bool pn_leave_zeros(struct pn_dest *dest, int class_, const struct pn_piece *piece, uint64_t first,
                    uint64_t count);
/* Notes that a fault has waited for `page`, which is in flight, since `since` (ns), so that its
 * latency is recorded. If the table is full, it is not. Called only by the loop that answers
 * faults. */
void pn_wait(struct pn_dest *dest, uint64_t page, uint64_t since);
/* Faults on these pages wait no more. If the pages were placed, the latencies are recorded. */
void pn_take_waiters(struct pn_dest *dest, uint64_t first, uint64_t count, bool placed);
void pn_wake_waiter(struct pn_dest *dest, uint64_t page);
/* Whether the page was an untouched one of the sample. It is no longer: it is being touched, or was
 * given up. */
bool pn_let_go(struct pn_dest *dest, uint64_t page);
/* Makes COMING those of the *count MISSING pages from `first` on that the background may ask for
 * now, and sets *count to their number. In one step with pn_dest_limit: once that forbids the
 * background to ask, no more pages become COMING. False: none may be asked for yet, and *wait is in
 * how many ns to look again (UINT64_MAX: when something happens). */
bool pn_claim_granted(struct pn_dest *dest, uint64_t first, uint64_t *count, uint64_t page_size,
                      uint64_t *wait);
/* Pages that were asked for took `bytes` bytes less on the wire than in memory. */
void pn_refund(struct pn_dest *dest, uint64_t bytes);
/* Writes done_fd if everything is in place. */
void pn_check_done(struct pn_dest *dest);

#endif
