/* Two queues between a loop in C and Trio: runs for a background lane, and pages that faulted. Each
 * has one writer and one reader, and neither ever waits for the other. */
#define _GNU_SOURCE
#include "lane.h"

#include <errno.h>
#include <sys/eventfd.h>

/* ---- runs from the schedule ---- */

int pn_ring_push(struct pn_ring *ring, uint64_t first, uint64_t count_) {
    uint64_t tail = ring->tail;
    if (tail - atomic_load_explicit((_Atomic uint64_t *)&ring->head, memory_order_acquire) == RING)
        return -EAGAIN;
    ring->first[tail % RING] = first;
    ring->count[tail % RING] = count_;
    atomic_store_explicit((_Atomic uint64_t *)&ring->tail, tail + 1, memory_order_release);
    return 0;
}

uint64_t pn_ring_used(const struct pn_ring *ring) {
    return atomic_load_explicit((_Atomic uint64_t *)&ring->tail, memory_order_acquire) -
           atomic_load_explicit((_Atomic uint64_t *)&ring->head, memory_order_acquire);
}

/* Sequentially consistent, as the other side's accesses are: see pn_ring_took. */
void pn_ring_wake_at(struct pn_ring *ring, uint64_t runs) {
    __atomic_store_n(&ring->wake_at, runs, __ATOMIC_SEQ_CST);
}

void pn_ring_took(struct pn_ring *ring, int room_fd) {
    /* Before wake_at is read: either this loop sees the writer's wake_at, or the writer sees this
     * head. */
    atomic_store((_Atomic uint64_t *)&ring->head, ring->head + 1);
    uint64_t wake_at = __atomic_load_n(&ring->wake_at, __ATOMIC_SEQ_CST);
    if (!wake_at || pn_ring_used(ring) <= wake_at)
        eventfd_write(room_fd, 1);
}

/* ---- pages that faulted ---- */

void pn_fault_log_write(struct pn_fault_log *log, uint64_t page, int reader_fd) {
    uint64_t tail = log->tail;
    if (tail - __atomic_load_n(&log->head, __ATOMIC_ACQUIRE) == 4096) {
        __atomic_fetch_add(&log->dropped, 1, __ATOMIC_RELAXED);
        return;
    }
    log->pages[tail % 4096] = page;
    /* Sequentially consistent, as are the reader's accesses: either the reader sees this page, or
     * the writer sees that the reader sleeps. */
    __atomic_store_n(&log->tail, tail + 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&log->sleeping, __ATOMIC_SEQ_CST) &&
        __atomic_exchange_n(&log->sleeping, 0, __ATOMIC_SEQ_CST))
        eventfd_write(reader_fd, 1);
}

uint64_t pn_fault_log_read(struct pn_fault_log *log, uint64_t *pages, uint64_t room) {
    uint64_t head = log->head, tail = __atomic_load_n(&log->tail, __ATOMIC_ACQUIRE), count = 0;
    if (head == tail) {
        __atomic_store_n(&log->sleeping, 1, __ATOMIC_SEQ_CST);
        tail = __atomic_load_n(&log->tail, __ATOMIC_SEQ_CST);
    }
    while (head != tail && count < room)
        pages[count++] = log->pages[head++ % 4096];
    if (count)
        __atomic_store_n(&log->sleeping, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&log->head, head, __ATOMIC_RELEASE);
    return count;
}
