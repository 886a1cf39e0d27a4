/* Putting pages in place, and the rules that all these ioctls share:
 *
 *   partial   The kernel stops where it must, and reports how far it came: continue from there.
 *   EEXIST    Another thread placed that page first. The ioctl does not wake then: wake by hand,
 *             skip the page, continue. Pages that are poisoned are there to POISON and (in private
 *             memory) to ZEROPAGE; COPY and CONTINUE replace them.
 *   EAGAIN    The owner's memory map is changing, and events are queued. Nothing can be placed
 *             until they are read, which only the reader of events can do: return to it.
 *   ENOENT    The range is not one registered mapping. A mapping may have been split or partly
 *             unmapped since: continue page by page. A page that fails alone is absent.
 *   EFAULT    Of CONTINUE: the page cache does not have the page. See pn_settle().
 *   ESRCH     The owner's memory is gone.
 */
#define _GNU_SOURCE
#include "pagenet.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

static struct pn_progress zero(int uffd, uint64_t to, const void *zeros, uint64_t length,
                               uint64_t page_size) {
    if (page_size == (uint64_t)sysconf(_SC_PAGESIZE)) {
        struct pn_progress step = pn_uffd_zeropage(uffd, to, length);
        if (step.done || step.error != -EEXIST || !zeros)
            return step;
    }
    /* hugetlbfs has no ZEROPAGE; and to ZEROPAGE, private memory that is poisoned is there. COPY
     * replaces poison: copy page by page, from the one page of zeros. */
    return pn_uffd_copy(uffd, to, zeros, page_size);
}

/* A source page that cannot be moved (pinned, shared since a fork, not present, another process's)
 * can still be copied. */
static struct pn_progress move(int uffd, uint64_t to, const void *from, uint64_t length) {
    struct pn_progress step = pn_uffd_move(uffd, to, (uintptr_t)from, length);
    if (step.done || (step.error != -EBUSY && step.error != -EINVAL && step.error != -ENOENT &&
                      step.error != -ENOTTY))
        return step;
    return pn_uffd_copy(uffd, to, from, length);
}

static struct pn_progress place_some(int uffd, enum pn_how how, uint64_t to, const void *from,
                                     uint64_t length, uint64_t page_size) {
    switch (how) {
    case PN_COPY:
        return pn_uffd_copy(uffd, to, from, length);
    case PN_ZERO:
        return zero(uffd, to, from, length, page_size);
    case PN_CONTINUE:
        return pn_uffd_continue(uffd, to, length);
    case PN_MOVE:
        return move(uffd, to, from, length);
    default:
        return pn_uffd_poison(uffd, to, length);
    }
}

struct pn_placed pn_place(int uffd, enum pn_how how, uint64_t to, const void *from, uint64_t length,
                          uint64_t page_size) {
    struct pn_placed sum = {0};
    uint64_t at = 0, stride = length;
    while (at < length) {
        const char *bytes = how == PN_COPY || how == PN_MOVE ? (const char *)from + at : from;
        uint64_t want = length - at < stride ? length - at : stride;
        struct pn_progress step = place_some(uffd, how, to + at, bytes, want, page_size);
        sum.placed += step.done;
        at += step.done;
        if (step.done || !step.error)
            continue;
        if (step.error == -EEXIST) {
            pn_uffd_wake(uffd, to + at, page_size);
            sum.existed += page_size;
        } else if (step.error == -ENOENT && stride > page_size) {
            stride = page_size;
            continue;
        } else if (step.error == -ENOENT) {
            sum.absent += page_size;
        } else {
            sum.error = step.error;
            return sum;
        }
        at += page_size;
    }
    return sum;
}

/* Punching a hole takes the page out of the page table first, and out of the page cache last. A
 * thread that touches the page between the two has a minor fault on a page that is gone by the time
 * the fault is answered. Woken, the thread faults again, now on a missing page. */
struct pn_placed pn_settle(int uffd, uint64_t to, int minor, const void *zeros,
                           uint64_t page_size) {
    struct pn_placed placed =
        pn_place(uffd, minor ? PN_CONTINUE : PN_ZERO, to, zeros, page_size, page_size);
    if (minor && placed.error == -EFAULT)
        placed.error = pn_uffd_wake(uffd, to, page_size);
    return placed;
}

/* hugetlbfs has no ZEROPAGE, and the page size of this memory is not known beforehand. */
static struct pn_placed place_huge_zero(int uffd, uint64_t to, uint64_t page_size) {
    struct pn_placed placed = {.error = -ENOMEM};
    void *zeros =
        mmap(NULL, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED)
        return placed;
    placed = pn_place(uffd, PN_COPY, to, zeros, page_size, page_size);
    munmap(zeros, page_size);
    return placed;
}

static struct pn_placed place_outside(int uffd, uint64_t to, uint64_t page_size, int minor,
                                      int zero) {
    if (zero && !minor && page_size > (uint64_t)sysconf(_SC_PAGESIZE))
        return place_huge_zero(uffd, to, page_size);
    return pn_place(uffd,
                    minor  ? PN_CONTINUE
                    : zero ? PN_ZERO
                           : PN_POISON,
                    to, NULL, page_size, page_size);
}

/* EINVAL: pages are larger there, or (at all sizes) the kernel cannot poison. A write to a page
 * that the owner itself has write-protected is not answered here. */
int pn_answer_outside(int uffd, uint64_t address, uint64_t flags, int zero) {
    enum { WP = 2, MINOR = 4 };
    static const uint64_t sizes[] = {4096, 2 << 20, 1 << 30};
    int error = flags & WP ? 0 : -EINVAL;
    for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0] && error == -EINVAL; i++)
        error =
            place_outside(uffd, address & ~(sizes[i] - 1), sizes[i], flags & MINOR ? 1 : 0, zero)
                .error;
    return error == -EAGAIN || error == -ESRCH ? error : 0;
}
