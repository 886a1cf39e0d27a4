/* What the files of the destination's half share, and nobody else sees. */
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
    /* Held for reading from "is this page still to be placed?" to the end of the ioctl that places
     * it, and for writing from reading the uffd to the end of marking what it says was removed: the
     * read is what lets the owner go on, and a page placed after that would bring back what the
     * owner gave up. Unused where the uffd does not report removals. */
    pthread_rwlock_t removal;
    /* Without a lock: the loop that answers faults would wait for a background loop that has the
     * lock and no processor. (A mutex that inherits priority is of no help: the kernel does not
     * lend niceness.) The loop that answers faults alone adds to it. */
    struct pn_waiter waiters[PN_WAITERS];
    atomic_uint waiter_end; /* those from here on are free; the same loop's to write */
    atomic_uint waiter_count;
    struct pn_pace_shared pace;
    pthread_mutex_t limiting; /* of pace: paid_until, next_grant. Background lanes alone, and
                                 whoever sets the limit */
    char *zeros;              /* one page of the largest size */
    _Atomic uint64_t
        held[PN_HELD]; /* pages of the sample that nobody has touched yet, plus one; 0: none */
    atomic_uint held_count;
    atomic_uint left;            /* stretches of zeros that are no longer watched */
    _Atomic uint64_t left_until; /* address at which the last one ends */
};

const struct pn_piece *pn_piece_of_page(const struct pn_dest *dest, uint64_t page);
const struct pn_piece *pn_piece_at(const struct pn_dest *dest, uint64_t address);

/* Whether pages are received straight to where they belong: the second mapping's page tables are
 * there, or no file can be written to instead. A fault for each page costs more than a copy from
 * the cache. */
static inline bool pn_in_place(const struct pn_dest *dest, const struct pn_piece *piece) {
    return piece->second && dest->config.file < 0;
}
/* Bytes (NULL: zeros) into the memory behind a piece that has a second mapping. 0 or -errno. */
int pn_write_shared(struct pn_dest *dest, const struct pn_piece *piece, uint64_t first,
                    uint64_t count, const void *bytes);
/* Zeros through the second mapping. 0 or -errno (-EFAULT: the owner has made its file shorter). */
int pn_clear(const struct pn_dest *dest, uint64_t to, uint64_t size);
/* The pages of [first, first + count) that are wanted and follow first without a gap become the
 * caller's to write: how many. */
uint64_t pn_take(struct pn_dest *dest, uint64_t first, uint64_t count);
/* Put `count` pages from `first` on, which the caller has taken and which lie in one piece, into
 * place: bytes (COPY, MOVE), NULL for zeros; where there is a second mapping, they are in it
 * already. Wakes and times whoever waits. 0; or -EAGAIN: the owner's memory is changing, *done
 * pages are dealt with; let its events be read and call again for the rest; or -errno. zero: they
 * came as a flag, which is counted. */
int pn_put(struct pn_dest *dest, int class_, uint64_t first, uint64_t count, const void *bytes,
           bool zero, uint64_t *done);
/* Zero pages of one piece, which the caller has taken: if they are many, and in shared memory, they
 * become a hole in the file that is no longer watched. The kernel makes zeros of what is touched of
 * it: nothing has to be placed, and what nobody touches takes no memory. False: none was dealt
 * with. */
bool pn_leave_zeros(struct pn_dest *dest, int class_, const struct pn_piece *piece, uint64_t first,
                    uint64_t count);
/* A fault waits for `page`, which is in flight. Called by the loop that answers faults alone. The
 * fault is kept to be timed; if the table is full, it is not. */
void pn_wait(struct pn_dest *dest, uint64_t page, uint64_t since);
/* Faults on these pages wait no more; if they were placed, their latency counts. */
void pn_take_waiters(struct pn_dest *dest, uint64_t first, uint64_t count, bool placed);
void pn_wake_waiter(struct pn_dest *dest, uint64_t page);
/* Whether the page was held, which it is no more: it is being touched, or was given up. */
bool pn_let_go(struct pn_dest *dest, uint64_t page);
/* How much of `wanted` bytes of background, in whole pages, may be asked for now: 0 if none yet,
 * and then *wait is how many ns from now on to look again (UINT64_MAX: when told to). What is
 * granted counts as asked for. */
uint64_t pn_grant(struct pn_dest *dest, uint64_t wanted, uint64_t page_size, uint64_t *wait);
/* Pages that were asked for took so many bytes less on the wire than in memory. */
void pn_refund(struct pn_dest *dest, uint64_t bytes);
/* Tell whoever waits for it that everything is in place, if it is. */
void pn_check_done(struct pn_dest *dest);

#endif
