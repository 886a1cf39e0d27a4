/* Preloaded (LD_PRELOAD) by pagenet-bench trace into a program, to record which pages of a file it
 * touches first, and when. The file is a memfd that has all of its bytes. Where the program maps
 * it, the mapping is put under a userfaultfd that reports pages which are in the file and in no
 * page table yet (minor faults). A thread started here records each of them, with the processor
 * time that the program has taken since the one before, and lets the program go on. Of the C
 * library, only mmap is replaced.
 *
 *   PAGENET_TRACE   the file to write to, a struct trace, which the program's launcher has, too
 *
 * No byte depends on this: what cannot be watched is counted, and works as ever. Everything also
 * works as ever if the tracing program dies.
 */
/* It would give mmap and mmap64 the same name; offsets have 64 bits anyway: see below. */
#undef _FILE_OFFSET_BITS
#define _GNU_SOURCE
#include "pagenet.h"
#include "clock.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8 && sizeof(void *) == 8,
               "mmap's system call is another one on 32-bit machines");

#define DEVICE "/dev/userfaultfd"
#define EXPORTED __attribute__((visibility("default"))) /* the rest is hidden from the program */

enum { MAPPINGS = 1024, EVENTS = 16, AWAKE_NS = 5000000 };

/* `page` is one more than the number: 0 until the entry is written. */
struct touch {
    _Atomic uint64_t page;
    uint64_t work_ns;
};

/* Behind the touches, of which there are as many as pages, is a byte for each page: whether it was
 * touched. pagenet/bench/workload/_tracing.py makes and reads the file. */
struct trace {
    uint64_t device, inode, pages;
    _Atomic uint64_t count, unwatched; /* touches; mappings that are not watched */
    _Atomic int64_t reason;            /* of the last of those: an errno */
    struct touch touches[];
};

struct mapping {
    uint64_t address, length, page;
};

static struct trace *trace;

/* The lock guards everything from here to `worked`. A process has one userfaultfd, and one thread
 * that reads it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct mapping mappings[MAPPINGS];
static size_t mapped;
static int uffd = -1;
static pthread_t reader;
static uint64_t page_size;
/* Processor time that the program had taken at its last first touch. Only the reader uses it. */
static uint64_t worked;

/* Not the next mmap, found by dlsym: dlsym may map memory itself, and may not work yet at the first
 * call. */
static void *map(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, address, length, (long)protection, (long)flags, (long)fd,
                           offset);
}

/* ---- touches ---- */

/* Processor time of all of the program's threads but the reader. A thread that waits for its page
 * takes none. */
static uint64_t program_ns(clockid_t readers) {
    uint64_t ours = clock_ns(readers);
    return clock_ns(CLOCK_PROCESS_CPUTIME_ID) - ours;
}

static void note(uint64_t page) {
    _Atomic char *seen = (_Atomic char *)&trace->touches[trace->pages];
    if (page >= trace->pages || atomic_exchange(&seen[page], 1))
        return;
    uint64_t spent = program_ns(CLOCK_THREAD_CPUTIME_ID);
    struct touch *touch = &trace->touches[atomic_fetch_add(&trace->count, 1)];
    touch->work_ns = spent > worked ? spent - worked : 0; /* the two clocks are not read at once */
    atomic_store(&touch->page, page + 1);
    worked += touch->work_ns;
}

/* Looks in the newest mapping first: what an older one had at that address is no longer there. */
static bool find_page(uint64_t address, uint64_t *page) {
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = mapped; i-- > 0 && !found;) {
        uint64_t at = address - mappings[i].address;
        found = at < mappings[i].length;
        *page = mappings[i].page + at / page_size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void let_go(uint64_t address) {
    struct pn_progress done;
    do
        done = pn_uffd_continue(uffd, address, page_size);
    while (done.error == -EAGAIN);
    if (done.error == -EEXIST)
        pn_uffd_wake(uffd, address, page_size);
    else if (done.error)
        /* The file has become shorter, for example: the kernel is to answer what happens there. */
        pn_uffd_unregister(uffd, address, page_size);
}

/* A reader that sleeps is woken by the thread that touches a page, in that thread's time: up to 30
 * us of it where another processor has to leave its idle state. So the reader sleeps only when
 * there was no touch for AWAKE_NS, beside which the 30 us are nothing. */
static void wait_for_faults(uint64_t since) {
    struct pollfd ready = {.fd = uffd, .events = POLLIN};
    if (now() - since > AWAKE_NS)
        poll(&ready, 1, -1);
    else
        sched_yield();
}

static void *read_faults(void *unused) {
    (void)unused;
    struct pn_event events[EVENTS];
    uint64_t last = 0;
    int count;
    while ((count = pn_uffd_read(uffd, NULL, events, EVENTS)) > 0 || count == -EAGAIN) {
        for (int i = 0; i < count; i++) {
            uint64_t address = events[i].start & -page_size, page;
            if (find_page(address, &page))
                note(page);
            let_go(address);
        }
        if (count > 0)
            last = now();
        else
            wait_for_faults(last);
    }
    return NULL;
}

/* ---- what is watched ---- */

/* The reader blocks all signals: they are for the program's own threads. */
static int start_reader(void) {
    sigset_t all, before;
    clockid_t readers;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = -pthread_create(&reader, NULL, read_faults, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error && !pthread_getcpuclockid(reader, &readers))
        worked = program_ns(readers);
    return error;
}

/* Opens it not only for faults in user mode: the program's own system calls touch its memory,
 * too. */
static int open_uffd(void) {
    uint64_t features;
    uffd = pn_uffd_open(DEVICE, 0);
    if (uffd < 0)
        return uffd;
    int error = pn_uffd_api(uffd, UFFD_FEATURE_MINOR_SHMEM, &features);
    if (!error)
        error = start_reader();
    if (error) {
        close(uffd);
        uffd = -1;
    }
    return error;
}

static bool covers(const struct mapping *one, const struct mapping *other) {
    return one->address <= other->address &&
           other->address + other->length <= one->address + one->length;
}

static int add_mapping(struct mapping added) {
    size_t kept = 0;
    for (size_t i = 0; i < mapped; i++)
        if (!covers(&added, &mappings[i]))
            mappings[kept++] = mappings[i];
    mapped = kept;
    if (mapped == MAPPINGS)
        return -ENOMEM;
    mappings[mapped++] = added;
    return 0;
}

static void watch(const void *address, size_t length, off_t offset) {
    uint64_t ioctls, whole = (length + page_size - 1) & -page_size;
    pthread_mutex_lock(&lock);
    int error = uffd < 0 ? open_uffd() : 0;
    if (!error)
        error =
            add_mapping((struct mapping){(uintptr_t)address, whole, (uint64_t)offset / page_size});
    if (!error)
        error =
            pn_uffd_register(uffd, (uintptr_t)address, whole, UFFDIO_REGISTER_MODE_MINOR, &ioctls);
    pthread_mutex_unlock(&lock);
    if (error) {
        atomic_store(&trace->reason, -error);
        atomic_fetch_add(&trace->unwatched, 1);
    }
}

/* A child has neither the reader nor anything that is watched, only a copy of the descriptor, which
 * is for its parent's memory. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void begin_child(void) {
    if (uffd >= 0)
        close(uffd);
    uffd = -1;
    mapped = 0;
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("PAGENET_TRACE");
    struct stat status;
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    void *at = fstat(fd, &status)
                   ? MAP_FAILED
                   : map(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED && !pthread_atfork(before_fork, after_fork, begin_child))
        trace = at;
    close(fd);
}

/* ---- mmap ---- */

static bool is_traced(int fd, int flags) {
    struct stat status;
    return trace && fd >= 0 && !(flags & MAP_ANONYMOUS) && !fstat(fd, &status) &&
           status.st_dev == trace->device && status.st_ino == trace->inode;
}

/* A shared mapping of a file that was opened for reading cannot be watched: it is mapped from one
 * that was opened for both. */
static int open_for_both(int fd) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* Maps without MAP_POPULATE: that would be touches by the kernel. */
static void *map_traced(void *address, size_t length, int protection, int flags, int fd,
                        off_t offset) {
    int before = errno, both = -1;
    if ((flags & MAP_TYPE) != MAP_PRIVATE && !(protection & PROT_WRITE) &&
        (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
        both = open_for_both(fd);
    void *at =
        map(address, length, protection, flags & ~MAP_POPULATE, both < 0 ? fd : both, offset);
    int error = errno;
    if (at != MAP_FAILED)
        watch(at, length, offset);
    if (both >= 0)
        close(both);
    errno = at == MAP_FAILED ? error : before;
    return at;
}

static void *map_any(void *address, size_t length, int protection, int flags, int fd,
                     off_t offset) {
    return (is_traced(fd, flags) ? map_traced : map)(address, length, protection, flags, fd,
                                                     offset);
}

EXPORTED void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return map_any(address, length, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *address, size_t length, int protection, int flags, int fd,
                      off64_t offset) {
    return map_any(address, length, protection, flags, fd, offset);
}
