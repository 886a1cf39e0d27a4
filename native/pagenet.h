/* The C core of pagenet. One header serves C and the cffi build, which cuts out the preprocessor
 * lines before it reads the rest.
 *
 * Conventions: a function that can fail returns a value >= 0 or -errno; a constructor returns NULL.
 * There are no globals. Byte counts, addresses and page numbers are uint64_t.
 */
#ifndef PAGENET_H
#define PAGENET_H
#include <stddef.h>
#include <stdint.h>

/* ---- uffd.c: the ioctls of userfaultfd(2), one function each ---- */

/* Opens a userfaultfd with O_CLOEXEC|O_NONBLOCK (poll() of a blocking one returns POLLERR for
 * ever): by the system call first, then by the device node. user_mode_only leaves out faults taken
 * inside the kernel, which is enough for an unprivileged process's own touches. */
int pn_uffd_open(const char *device, int user_mode_only);
/* UFFDIO_API, once per descriptor. wanted 0 asks for no feature; *features then gets all that the
 * kernel has. */
int pn_uffd_api(int uffd, uint64_t wanted, uint64_t *features);
int pn_uffd_register(int uffd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls);
/* Stops watching the range, and wakes all threads that wait there. */
int pn_uffd_unregister(int uffd, uint64_t start, uint64_t length);
int pn_uffd_wake(int uffd, uint64_t start, uint64_t length);
/* The state of the memory behind the uffd: 0; -EAGAIN: it is changing, and events are queued;
 * -ESRCH: it is gone. Changes nothing at `address`, the address of one of its pages. */
int pn_uffd_probe(int uffd, uint64_t address);
/* Whether descriptor `theirs` of process pid is the same open file as `ours` of this process: 1, 0,
 * or -errno. */
int pn_same_file(int ours, int pid, int theirs);
/* A duplicate, O_CLOEXEC, of descriptor `theirs` of the process behind pidfd. */
int pn_take_descriptor(int pidfd, int theirs);

/* done: bytes of progress, whole pages. error: 0, or why it stopped, as -errno. Both may be set. */
struct pn_progress {
    uint64_t done;
    int error;
};
struct pn_progress pn_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t length);
struct pn_progress pn_uffd_zeropage(int uffd, uint64_t start, uint64_t length);
struct pn_progress pn_uffd_continue(int uffd, uint64_t start, uint64_t length);
/* Source pages must be private, anonymous, present and of the process that owns the uffd. */
struct pn_progress pn_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t length);
struct pn_progress pn_uffd_poison(int uffd, uint64_t start, uint64_t length);

enum pn_event_kind {
    PN_EVENT_PAGEFAULT = 0x12,
    PN_EVENT_FORK = 0x13,
    PN_EVENT_REMAP = 0x14,
    PN_EVENT_REMOVE = 0x15,
    PN_EVENT_UNMAP = 0x16,
};

/* PAGEFAULT: start, flags, thread. REMAP: start (from), end (to), length. REMOVE, UNMAP: start,
 * end. FORK: fd. */
struct pn_event {
    uint64_t start;
    uint64_t end;
    uint64_t length;
    uint64_t flags;
    uint32_t thread;
    int32_t fd;
    int kind;
};
/* Reads up to `room` events, at most PN_EVENTS, without waiting. Returns how many, or -EAGAIN:
 * there are none. The kernel writes them to `map->events` (NULL: nowhere else): they stay there if
 * this process is killed before it has acted on them. */
struct pn_map;
int pn_uffd_read(int uffd, struct pn_map *map, struct pn_event *events, int room);

/* ---- attach.c: a userfaultfd, and a memfd for the map of pages, made in another process ---- */

/* The numbers of both descriptors in that process. refused: 0, or why the kernel refuses it one of
 * them, as -errno. */
struct pn_planted {
    int uffd;
    int map;
    int refused;
};
/* Makes both descriptors inside process pid, whose main thread stops for a moment. pidfd must stand
 * for the same process, because a pid can become another process's. The process is left as it was.
 * -EPERM: it may not be traced; -EBUSY: it is stopped; -ENOEXEC: its code is not 64-bit; -ESRCH: it
 * has ended; -ETIMEDOUT: it does not stop; -ENOSYS: not on this machine. */
int pn_plant(int pid, int pidfd, const char *device, struct pn_planted *planted);
/* Closes both descriptors in that process. */
int pn_uproot(int pid, int pidfd, const struct pn_planted *planted);
/* A userfaultfd for the memory of process pid that only this process holds: made there, taken, and
 * closed there again, in one stop. It is for faults taken in user mode, which every process may
 * have, and that is enough for write protection that the kernel takes off by itself. A child does
 * it: if this process is killed meanwhile, the other one is still let go as it was. refused, and
 * errors: as of pn_plant. Returns the descriptor; it may be anything, if another thread of that
 * process wants so. */
int pn_borrow(int pid, int pidfd, int *refused);

/* ---- track.c: which pages were written since last asked ---- */

/* Memory of a process. uffd: one of that process, with the features WP_ASYNC, WP_UNPOPULATED and
 * WP_HUGETLBFS_SHMEM. pagemap: /proc/PID/pagemap. page_size: what pages are counted in, and at
 * least that of the memory where it is of huge pages. first: the number of the page at address.
 * names_empty: page_size is the system's, and the pass for written pages names each page whose
 * entry in a page table is empty; only page tables that are gone are left for the other pass. */
struct pn_track {
    int uffd;
    int pagemap;
    uint64_t address;
    uint64_t size;
    uint64_t page_size;
    uint64_t first;
    int names_empty;
};
struct pn_run {
    uint64_t first;
    uint64_t count;
};
/* Two passes: pages that were written, and pages that were discarded or reclaimed after that. */
enum pn_track_what { PN_TRACK_WRITTEN, PN_TRACK_GONE };
/* 0, or why this kernel cannot say what was written: -ENOTTY before 6.7. */
int pn_track_probe(int pagemap);
/* Registers the memory, and protects it. -EBUSY: another userfaultfd watches it. */
int pn_track_arm(const struct pn_track *track);
int pn_track_disarm(const struct pn_track *track);
/* Whether all that is mapped there is still protected: 0, or -EPERM. Holes are not noticed. */
int pn_track_check(const struct pn_track *track);
/* Names pages, and protects them again: from byte *at of the memory on, at most `room` runs,
 * ascending and apart. Returns how many; *at is then where to go on, and `size` at the end. Does
 * not notice that the process has ended (pn_uffd_probe does). -EPERM: something else is mapped
 * there. */
int pn_track_scan(const struct pn_track *track, int what, uint64_t *at, struct pn_run *runs,
                  int room);
/* Sets the bit of each page; the lowest bit of the first byte is page 0. */
void pn_track_mark(uint8_t *bits, const struct pn_run *runs, int count);

/* ---- place.c: the only code that knows EEXIST, EAGAIN, ENOENT and partial results ---- */

enum pn_how { PN_COPY, PN_ZERO, PN_CONTINUE, PN_MOVE, PN_POISON };

/* placed, existed, absent: bytes. error: 0; -EAGAIN: events are queued: drain all of them, and call
 * again for the rest; -ESRCH: the owner is gone. Whatever the error, the first placed + existed +
 * absent bytes are dealt with. */
struct pn_placed {
    uint64_t placed;
    uint64_t existed;
    uint64_t absent;
    int error;
};
/* Puts length bytes at address `to` of the uffd's owner, and wakes the threads that wait there.
 * from: the bytes (COPY, MOVE), one page of zeros (ZERO), unused (CONTINUE, POISON). */
struct pn_placed pn_place(int uffd, enum pn_how how, uint64_t to, const void *from, uint64_t length,
                          uint64_t page_size);
/* Answers a fault on a page that was placed, or given up, before. A minor fault gets what the page
 * cache has, any other fault zeros. */
struct pn_placed pn_settle(int uffd, uint64_t to, int minor, const void *zeros, uint64_t page_size);
/* Answers a fault at an address outside all that the owner announced: poisons its page, or (zero)
 * fills it with zeros. flags: the event's. Returns 0, or -EAGAIN or -ESRCH as above. A fault that
 * cannot be answered is left waiting, and returns 0 too. */
int pn_answer_outside(int uffd, uint64_t address, uint64_t flags, int zero);

/* ---- residency.c: the destination's map of pages, in memory that is shared ---- */

enum pn_state {
    PN_MISSING = 0,   /* not here, not asked for */
    PN_REQUESTED = 1, /* asked for */
    /* Bytes are being stored into the page: only the lane that set this state may write to the
     * page. */
    PN_PLACING = 2,
    PN_RESIDENT = 3, /* placed */
    /* The owner gave it up (balloon, MADV_DONTNEED): it reads as zero, never as what the source
     * had. */
    PN_REMOVED = 4,
    PN_OUTSIDE = 5,  /* the owner does not map it */
    PN_POISONED = 6, /* can never come: touching it is a SIGBUS */
    /* Asked for by the background: worth asking for again, on the demand lane, if a thread waits
     * for it. */
    PN_COMING = 7,
    /* Given up by the owner while PLACING: the lane that places it must leave it REMOVED. */
    PN_REMOVING = 8,
    /* All its bytes are in the shared memory behind it, and it is being made visible, or just
     * was. */
    PN_READY = 9,
    /* All its bytes are in the shared memory behind it, and nobody sees them: the source's owner
     * may still change the page (pn_dest_withhold). */
    PN_COPIED = 10,
};

enum pn_class { PN_DEMAND = 0, PN_PREFETCH = 1, PN_BACKGROUND = 2 };

enum pn_counter {
    PN_PAGES,          /* pages that came and were placed */
    PN_RUNS,           /* replies */
    PN_ZERO_PAGES,     /* of PAGES, those that came as a flag */
    PN_WIRE_BYTES,     /* received, headers included */
    PN_EXISTED,        /* pages found already there when placed */
    PN_DROPPED,        /* pages that came and were no longer wanted */
    PN_REQUESTS,       /* requests sent */
    PN_FAULTS,         /* fault events of this class answered */
    PN_DEFERRED,       /* times that placing had to wait for the owner's events to be read */
    PN_LZ4_RUNS,       /* of RUNS, those that came compressed */
    PN_LZ4_BYTES,      /* of their pages */
    PN_LZ4_WIRE_BYTES, /* of WIRE_BYTES, what was received for them */
    /* Of PAGES, those that were left invisible so that their first touch raises a fault: see
     * dest.c. */
    PN_SAMPLED,
    PN_SAMPLED_USED,   /* of SAMPLED, those that were touched */
    PN_OUTSIDE_FAULTS, /* of FAULTS, those at addresses that the owner announced nothing about */
    PN_COUNTERS,
};

/* latency: counts of latencies in ns. Buckets are log2 with 8 linear steps an octave: the bucket of
 * v is v below 16, else 8 * (log2(v) - 2) + the 3 bits after the first. */
struct pn_class_stats {
    uint64_t counters[15];
    uint64_t latency[320];
};

enum { PN_EVENTS = 64 };
struct pn_map {
    char magic[8];
    uint64_t pages;
    uint64_t scope;    /* pages that are to become resident: all but those OUTSIDE */
    uint64_t done;     /* of those, RESIDENT, REMOVED or POISONED */
    uint64_t finished; /* not 0: the source was told that everything is in place */
    /* What was read last from the uffd, each a struct uffd_msg. An owner goes on when its REMOVE
     * event is read, and the event is nowhere else then. */
    uint64_t events[PN_EVENTS][4];
    struct pn_class_stats classes[3];
};

/* The name of the memfd in which an owner keeps the map (docs/protocol.md). */
#define PN_MAP_NAME "pagenet-residency"
uint64_t pn_map_bytes(uint64_t pages);
void pn_map_init(struct pn_map *map, uint64_t pages);
/* The map is whole: from now on a process that finds it may go on with it. */
void pn_map_publish(struct pn_map *map);
int pn_map_state(const struct pn_map *map, uint64_t page);
/* Takes over a map whose users have died, at whatever point: REQUESTED, COMING, PLACING and COPIED
 * pages become MISSING, and scope and done are counted anew. READY and REMOVING pages are left to
 * the caller. -EINVAL: this is no map of `pages` pages. */
int pn_map_recover(struct pn_map *map, uint64_t pages);
/* The removals among the events that were read last, acted on or not: writes PN_EVENTS at most, and
 * returns how many. A page that was removed stays REMOVED, so they may be acted on again. */
int pn_map_removals(const struct pn_map *map, struct pn_event *events);
/* Moves up to `count` pages from state `from` to state `to`, each atomically, and stops at the
 * first page in another state. Returns how many it moved. */
uint64_t pn_map_claim(struct pn_map *map, uint64_t first, uint64_t count, int from, int to);
/* Moves all `count` pages to state `to`, whatever state they were in. */
void pn_map_set(struct pn_map *map, uint64_t first, uint64_t count, int to);
/* Moves those of the `count` pages that are in state `from` to state `to`. Returns how many. */
uint64_t pn_map_replace(struct pn_map *map, uint64_t first, uint64_t count, int from, int to);
/* First page of [first, end) that is in state `state`, or end. */
uint64_t pn_map_find(const struct pn_map *map, uint64_t first, uint64_t end, int state);
/* First page of [first, end) that is neither RESIDENT nor REMOVED nor POISONED, or end. */
uint64_t pn_map_unsettled(const struct pn_map *map, uint64_t first, uint64_t end);
/* How many pages from first on, below end, are in state `state` without a gap. */
uint64_t pn_map_span(const struct pn_map *map, uint64_t first, uint64_t end, int state);
/* COPIED pages that have changed since become MISSING. Returns how many. Bit `from + i` of `bits`
 * (the lowest of a byte first) tells whether page `skip + i` of a block on the wire, of `count`
 * from there, has changed; `first` is the block's first page here, and 1 << shift pages on the wire
 * make one. */
uint64_t pn_map_stale(struct pn_map *map, uint64_t first, uint64_t skip, uint64_t shift,
                      const uint8_t *bits, uint64_t from, uint64_t count);
uint64_t pn_map_done(const struct pn_map *map);
void pn_stats_add(struct pn_map *map, int class_, int counter, uint64_t amount);
void pn_stats_latency(struct pn_map *map, int class_, uint64_t nanoseconds);

/* ---- window.c: what to ask for around a page that a thread waits for ---- */

/* A line that faults follow. step: 0 after its first fault; steps: how many steps are asked for
 * ahead of the last fault. */
struct pn_line {
    uint64_t last;
    int64_t step;
    int64_t steps;
    uint64_t used;
    uint32_t faults;
};
/* An area that faults were in. number: the area's, plus 1; 0: none. level: 2^level pages around its
 * last fault were asked for. */
struct pn_area {
    uint64_t number;
    int32_t level;
    uint32_t faults;
};
/* Pages [first, end) that the window wants. */
struct pn_want {
    uint64_t first;
    uint64_t end;
    uint64_t page_size;
};
struct pn_stack {
    struct pn_want wants[128];
    uint64_t oldest, newest;
};
struct pn_window {
    uint64_t fixed; /* 0: it adapts */
    uint64_t clock;
    int32_t level; /* at an area's first fault, in sixteenths */
    struct pn_line lines[8];
    struct pn_area areas[4096];
    struct pn_stack wanted[8]; /* by the faults seen there: 1 to 7, and 8 or more */
};
/* Makes a window that adapts. */
void pn_window_init(struct pn_window *window);
/* Fixes the window at `forward` pages after the fault's and `backward` before it, or (fixed 0) has
 * it adapt. From any thread, at any time. */
void pn_window_fix(struct pn_window *window, int fixed, uint32_t forward, uint32_t backward);
int pn_window_fixed(const struct pn_window *window, uint32_t *forward, uint32_t *backward);
/* A thread waits for `page`, which was MISSING: notes which of the pages [first, end) around it
 * will probably be touched next. */
void pn_window_fault(struct pn_window *window, const struct pn_map *map, uint64_t page,
                     uint64_t first, uint64_t end, uint64_t page_size);
/* Takes up to `bytes` bytes, but at least a page, of the wanted pages that are MISSING, and makes
 * them REQUESTED. Returns how many pages, from *first on; 0: nothing more is wanted. */
uint64_t pn_window_next(struct pn_window *window, struct pn_map *map, uint64_t bytes,
                        uint64_t *first);

/* ---- dest.c: the destination's half of the native lanes: what they share ---- */

/* Pages that threads waited for, in that order, from the demand lane to a reader that learns from
 * them. One writer, one reader, and neither ever waits for the other: a page that finds no room is
 * dropped, and counted. */
struct pn_fault_log {
    uint64_t head; /* next to be read */
    uint64_t tail; /* next to be written */
    uint64_t dropped;
    uint64_t sleeping; /* the reader waits for its eventfd */
    uint64_t pages[4096];
};
/* Reads up to `room` pages, oldest first, and returns how many. If there are none, the next write
 * also writes the reader's eventfd. */
uint64_t pn_fault_log_read(struct pn_fault_log *log, uint64_t *pages, uint64_t room);
void pn_fault_log_write(struct pn_fault_log *log, uint64_t page, int reader_fd);

/* Pages of one block, at consecutive addresses. second: the address of this process's own mapping
 * of the same memory, or 0; file_offset: where in the file behind both mappings the pages begin.
 * wire_first: the first page's number on the wire, where 1 << shift pages make one page here. */
struct pn_piece {
    uint64_t first;
    uint64_t count;
    uint64_t page_size;
    uint64_t address;
    uint64_t second;
    uint64_t file_offset;
    uint64_t wire_first;
    uint64_t shift;
};

struct pn_dest_config {
    struct pn_map *map;
    uint64_t scope; /* pages that are to become resident, whatever the map's count now is */
    const struct pn_piece *pieces; /* ascending by first */
    const uint32_t *by_address;    /* their indices, ascending by address */
    uint64_t piece_count;
    uint64_t max_page_size;
    int uffd;
    int how; /* enum pn_how of pages that are not zero: COPY, MOVE or CONTINUE */
    /* The file behind the second mapping, to which pages are written; -1: they are written through
     * the mapping. */
    int file;
    /* The file cannot become shorter: a store through the second mapping is never a SIGBUS. */
    int sealed;
    /* Memory that the owner announced nothing about reads as zero; else it is poisoned. */
    int outside_is_zero;
    int removes; /* the uffd reports REMOVE or UNMAP events */
    /* An eventfd, written once every page of the scope is in place, if the map is right. */
    int done_fd;
    struct pn_window *window;    /* of what the demand lane prefetches */
    struct pn_fault_log *faults; /* NULL: there is no reader */
    int faults_fd;               /* eventfd of its reader */
    int encodings;               /* encodings that are asked for, a bit each */
    struct pn_cache *fills; /* the host cache whose pages these are; NULL: they are a guest's */
    /* The memory is a private mapping of a host cache's file: pages that the guest has not written
     * to may leave it. */
    int shares;
};

/* ---- cache.c: the host cache, of which guests are filled ---- */

struct pn_cache_config {
    struct pn_map *map; /* which pages of the file are here; REMOVED ones are zeros */
    uint64_t pages;
    uint64_t page_size;
    uint64_t memory; /* address of a mapping of the file: page after page, without gaps */
    int file;
    uint64_t most; /* pages that may take memory, about; 0: all. Of others some leave. */
};
struct pn_cache;
/* NULL: errno says why not. Borrows all that config points to. */
struct pn_cache *pn_cache_new(const struct pn_cache_config *config);
void pn_cache_free(struct pn_cache *cache);               /* no lane may run */
uint64_t pn_cache_resident(const struct pn_cache *cache); /* pages that take memory */

struct pn_dest;
/* NULL: no memory. Borrows all that config points to. */
struct pn_dest *pn_dest_new(const struct pn_dest_config *config);
void pn_dest_free(struct pn_dest *dest);
/* How many of `count` pages from `first` on come before the first that the sample of prefetched
 * pages takes. */
uint64_t pn_before_sampled(uint64_t first, uint64_t count);
/* To be called when no lane runs any more: makes visible to the owner the pages of the sample that
 * it has not touched. */
void pn_dest_release(struct pn_dest *dest);
/* Withholds pages, or no longer does: those that come to shared memory become COPIED instead of
 * visible, and faults are not answered. A fault that was not answered comes again once its page is
 * woken. To be called while no page is in flight, from any thread. */
void pn_dest_withhold(struct pn_dest *dest, int withhold);
/* Limits the background, on all lanes together, to `bytes_per_second` on the wire. 0: no limit;
 * UINT64_MAX: it may ask for nothing. A lane that waits looks again when its work_fd is written.
 * From any thread. */
void pn_dest_limit(struct pn_dest *dest, uint64_t bytes_per_second);

/* Runs from the schedule to a background lane: one writer, one reader. */
struct pn_ring {
    uint64_t head; /* next to be taken */
    uint64_t tail; /* next to be written */
    /* The writer's eventfd is written when no more runs than this are left; 0: at each run
     * taken. */
    uint64_t wake_at;
    uint64_t first[512];
    uint64_t count[512];
};
int pn_ring_push(struct pn_ring *ring, uint64_t first, uint64_t count); /* 0, or -EAGAIN: full */
uint64_t pn_ring_used(const struct pn_ring *ring);
/* Has the lane write room_fd once so many runs are left (0: at each). The writer looks at
 * pn_ring_used() afterwards: it may have come to that already. */
void pn_ring_wake_at(struct pn_ring *ring, uint64_t runs);

/* ---- lane.c, loop.c: one connection of the destination, and the loop that drives it ---- */

enum pn_end_kind {
    PN_END_STOPPED,  /* stop_fd became readable */
    PN_END_CLOSED,   /* the peer closed */
    PN_END_BROKEN,   /* error: the socket's */
    PN_END_PROTOCOL, /* text: what the peer did wrong */
    PN_END_FAILED,   /* text: why the source cannot go on, in its own words */
    PN_END_OWNER_GONE,
    PN_END_OWNER_WRONG, /* text: what the owner did and may not do */
    PN_END_PLACING,     /* error: why pages could not be placed, if no other kind fits */
    PN_END_NO_MEMORY,
};
struct pn_end {
    int kind;
    int error;
    char text[1100];
};

struct pn_tls;
struct pn_lane_config {
    struct pn_dest *dest;
    /* Background: where its runs come from. NULL makes it the demand lane, which reads the uffd. */
    struct pn_ring *ring;
    int sock; /* non-blocking; -1: the source is away, so a demand lane asks for nothing */
    /* For a lane of a crew: where its pages come from, instead of over a socket. It may have a
     * ring, and reads the uffd nevertheless. */
    struct pn_cache *cache;
    /* NULL: what goes over the socket is not encrypted. */
    struct pn_tls *tls;
    int stop_fd; /* eventfd */
    int work_fd; /* eventfd: the ring has runs; -1 for demand */
    int room_fd; /* eventfd: the ring has room; -1 for demand */
    /* Bytes of background that may be in flight: at least, at the beginning, and at most. */
    uint64_t window_least;
    uint64_t window_min;
    uint64_t window_max;
    uint64_t chunk; /* bytes of background asked for at a time */
};
/* Runs the lane until it ends. *end gets the reason. */
void pn_lane_run(const struct pn_lane_config *config, struct pn_end *end);

/* ---- crew.c: threads that drive the lanes of many guests, which have a cache ---- */

struct pn_crew;
/* Starts `count` threads. NULL: errno says why not. */
struct pn_crew *pn_crew_new(int count);
/* Ends the threads. No lane may run. */
void pn_crew_free(struct pn_crew *crew);
/* Has one of the threads run the lane until it ends. *end gets the reason then, and ended_fd, an
 * eventfd, is written: both must last until then, and so must what config points to. 0 or
 * -ENOMEM. */
int pn_crew_run(struct pn_crew *crew, const struct pn_lane_config *config, struct pn_end *end,
                int ended_fd);

/* ---- greet.c: owners that connect, and their first faults ---- */

enum {
    PN_NAME = 64,        /* bytes of a name, with the 0 at its end */
    PN_GREETINGS = 1024, /* at a time; other owners wait for their lanes */
    PN_OFFER = 128,      /* of what is said to owners that ask for the cache's file, with the 0 */
    PN_GREETED = 256,    /* pages of 4 KiB that a greeting puts into place at most */
};
/* What was read last from an owner while it was greeted. Kept for a process that comes after this
 * one: what the owner gave up must never get the source's bytes. */
struct pn_note {
    char name[PN_NAME]; /* of the owner; empty: nothing is noted here */
    struct pn_map map;  /* its events alone */
};
struct pn_greeting;
/* An owner that has connected. */
struct pn_arrival {
    char name[PN_NAME];
    int sock;                     /* for the caller to close */
    struct pn_greeting *greeting; /* NULL: there was no room for one, or no cache */
};
/* A page that a greeting has put into place: its byte of the region, and how long a thread waited
 * for it, in ns. */
struct pn_greeted {
    uint64_t offset;
    uint64_t waited;
};
struct pn_greeter;
/* Starts the thread that greets. notes: PN_GREETINGS of them, which must last. channel: over which
 * another process sends the connections that it accepts, each behind a byte and the owner's name;
 * or -1. last: the number of the last owner that there was. NULL: errno says why not. */
struct pn_greeter *pn_greeter_new(struct pn_note *notes, int channel, uint64_t last);
/* Ends it. No greeting may be left, and no arrival. */
void pn_greeter_free(struct pn_greeter *greeter);
/* Owners whose names end in `key` are those of one snapshot. listener: accept them there, under the
 * name "owner." and the next number; or -1. It must stay open until pn_greeter_shut. 0 or
 * -errno. */
int pn_greeter_open(struct pn_greeter *greeter, const char *key, int listener);
void pn_greeter_shut(struct pn_greeter *greeter, const char *key);
/* They are greeted from this cache of the region's `size` bytes, from now on, or (NULL) not
 * greeted. file: the cache's, which those get that ask for it; offer: what they are told with it.
 * Cache and file must last as long as their greetings. */
void pn_greeter_serve(struct pn_greeter *greeter, const char *key, struct pn_cache *cache,
                      uint64_t size, int file, const char *offer);
/* How many connections are accepted from now on. */
void pn_greeter_allow(struct pn_greeter *greeter, uint64_t places);
/* Takes the next arrival. 1; 0: there is none, and the eventfd pn_greeter_arrived_fd is written
 * when there is; -errno: no more are accepted until they are allowed again, because of that. */
int pn_greeter_take(struct pn_greeter *greeter, struct pn_arrival *into);
int pn_greeter_arrived_fd(const struct pn_greeter *greeter);
/* Others read the owner's socket from now on. */
void pn_greeting_stop_listening(struct pn_greeting *greeting);
/* Nobody reads the owner's events from now on; there may be faults that were read and not answered.
 * Writes what was put into place, PN_GREETED at most, and returns how many; what the owner gave up
 * is in the notes (pn_map_removals). */
int pn_greeting_end(struct pn_greeting *greeting, struct pn_greeted *placed);
const struct pn_map *pn_greeting_notes(const struct pn_greeting *greeting);
/* Forgets it, and what was noted. */
void pn_greeting_free(struct pn_greeting *greeting);

/* ---- pack.c: pages as one LZ4 block behind a checksum ---- */

/* Compressing is worth it if it saves at least one byte in this many. */
enum { PN_LZ4_GAIN = 16 };
/* The checksum: XXH64, with seed 0. size: a multiple of 32. */
uint64_t pn_checksum(const void *bytes, uint64_t size);
uint64_t pn_pack_state(void); /* bytes of memory, 8-byte aligned, that pn_pack works in */
/* Compresses `size` bytes of pages (at most 2 MiB) into `to`, which has room for as many bytes.
 * Returns how many bytes they took, or 0 if too little would be saved. */
uint64_t pn_pack(void *state, const void *pages, uint64_t size, void *to);
/* 0, or -EBADMSG: these bytes are not what `size` bytes of pages are compressed to. The content of
 * `pages` is then undefined. */
int pn_unpack(const void *from, uint64_t length, void *pages, uint64_t size);

/* ---- choice.c: whether to compress ---- */

/* Times in ns, rates in ns a byte. Begins with pn_choice_init: all zero is not a valid state. */
struct pn_choice {
    int mode;
    int sampled;      /* in this period */
    int is_probing;   /* it sends raw only to measure the link again */
    double raw_ns;    /* a byte of a page, uncompressed */
    double recent[4]; /* the same in each of the last periods: raw_ns is the lowest */
    uint64_t periods; /* uncompressed ones since the last change of mode */
    double send_ns;   /* the processor's time to read and send an uncompressed byte */
    double packed_ns; /* a byte of a page, compressed */
    double pack_ns;   /* the processor's time to compress a byte */
    double left;      /* the share of a byte that is left when compressed; below 0: not known */
    uint64_t settle;  /* bytes that pass before measurements count */
    /* In this period: bytes of pages, bytes on the wire, the time that the connection was busy, and
     * the part of that time in which this side worked. */
    uint64_t bytes, wire, busy, work;
    uint64_t mark;  /* busy time is counted up to here */
    uint64_t until; /* no trial before this moment, and no probe */
    uint64_t pause, probe;
};
void pn_choice_init(struct pn_choice *choice);
int pn_choice_packs(const struct pn_choice *choice);
/* Whether compressing pays even for a page that a thread waits for, where compressing, sending and
 * decompressing come one after the other. */
int pn_choice_for_demand(const struct pn_choice *choice);
/* Whether a sample should be compressed now. */
int pn_choice_wants_sample(const struct pn_choice *choice, uint64_t now);
/* Compressing `size` bytes took `ns`, and left `length` bytes, or (0) too many. */
void pn_choice_tried(struct pn_choice *choice, uint64_t size, uint64_t length, uint64_t ns);
/* There was nothing to do until `now`. */
void pn_choice_resume(struct pn_choice *choice, uint64_t now);
/* From `began` to `now`, `bytes` bytes of pages were given to the socket, as `wire` bytes. */
void pn_choice_answered(struct pn_choice *choice, uint64_t bytes, uint64_t wire, uint64_t began,
                        uint64_t now);

/* ---- demand_choice.c: whether pages that a thread waits for come compressed ---- */

/* Begins with pn_demand_choice_init: all zero is not a valid state. */
struct pn_demand_choice {
    /* Pages are asked for compressed, whatever that costs; if not, the source decides. */
    int packs;
    int is_trial;
    uint32_t settled, count;
    uint64_t samples[32]; /* ns that 4 KiB took, of this block of pages */
    double before;        /* ns that 4 KiB took the other way */
    uint64_t pause, left; /* pages between two trials, and until the next one */
};
void pn_demand_choice_init(struct pn_demand_choice *choice);
int pn_demand_choice_packs(const struct pn_demand_choice *choice);
/* A page that was asked for that way (packs) took `ns` for each of its 4 KiB, from the request
 * until it was in place. Pages of zeros do not count. */
void pn_demand_choice_came(struct pn_demand_choice *choice, int packs, uint64_t ns);

/* ---- snapshot.c: the index of a snapshot (docs/snapshot-format.md) ---- */

enum {
    PN_ZERO_FRAME = 0xffffffff, /* as the frame of a run: its pages are zero */
    PN_NO_RUN = 0xffffffff,
};
/* Columns with a value for each object, frame or run. A page has 4 KiB. */
struct pn_snapshot {
    uint64_t pages, objects, frames, runs; /* fewer than PN_NO_RUN pages, and runs */
    const uint64_t *object_sizes;
    const uint64_t *frame_offsets;
    const uint32_t *frame_objects;
    const uint32_t *frame_lengths; /* bytes in the object */
    const uint16_t *frame_pages;
    uint32_t *run_starts; /* before the check: the pages of each run; then its first page */
    const uint32_t *run_frames;
    const uint16_t *run_at; /* the run's first page within its frame */
    /* Set by the check: the last run of each frame, and behind those, the last run of zeros; of
     * each run, the last one before it of the same frame; or PN_NO_RUN. */
    uint32_t *frame_runs;
    uint32_t *next_runs;
};
enum pn_snapshot_flaws {
    PN_FLAW_NONE,
    PN_FLAW_FRAME,  /* of no pages or too many, or not within its object */
    PN_FLAW_RUN,    /* empty, past the last page, or not within its frame */
    PN_FLAW_END,    /* the runs end before the last page */
    PN_FLAW_UNUSED, /* no run is of this frame */
};
struct pn_snapshot_flaw {
    int what;    /* enum pn_snapshot_flaws: the first that was found */
    uint64_t at; /* the number of the frame or run */
};
struct pn_snapshot_flaw pn_snapshot_check(const struct pn_snapshot *snapshot);

/* ---- frames.c: a snapshot's frames, unpacked into a file that is laid out as the memory ---- */

struct pn_frames;
/* Borrows the columns, which must have been checked, the names of objects (64 bytes each, padded
 * with zeros), and both descriptors. objects: the directory that has the objects, or -1: frames are
 * there only once they were placed by pn_frames_place. file: as long as the memory, and nothing but
 * a hole. name, of the snapshot, and place, of the file: for messages. NULL: no memory. */
struct pn_frames *pn_frames_new(const struct pn_snapshot *snapshot, const uint8_t *names,
                                int objects, int file, const char *name, const char *place);
/* Not to be called while another thread uses it. */
void pn_frames_free(struct pn_frames *frames);
/* Has all of these bytes in the file: unpacks frames that are not there yet, or waits until another
 * thread has. 0, or -1: they cannot be had, and `text` (of `room` bytes) says why. From any
 * thread. */
int pn_frames_need(struct pn_frames *frames, uint64_t offset, uint64_t size, char *text, int room);
/* Unpacks one frame, whose stored bytes are in `fd` from `at` on, into the file. As above. */
int pn_frames_place(struct pn_frames *frames, uint64_t frame, int fd, uint64_t at, char *text,
                    int room);
/* Puts the pages of one frame into the file. As above. */
int pn_frames_put(struct pn_frames *frames, uint64_t frame, const uint8_t *pages, char *text,
                  int room);
/* Whether frames that are not there yet have to be brought by pn_frames_place. */
int pn_frames_are_brought(const struct pn_frames *frames);
/* Whether all of these bytes are in the file, or are zero. From any thread. */
int pn_frames_are_there(const struct pn_frames *frames, uint64_t offset, uint64_t size);
/* Whether these bytes are zero by the index. */
int pn_frames_are_zero(const struct pn_frames *frames, uint64_t offset, uint64_t size);
/* Frames of these bytes that are not in the file: up to `room` numbers of them, each once for each
 * of their runs in a row. *end is where to go on: offset + size, if that was all. */
int pn_frames_lacking(const struct pn_frames *frames, uint64_t offset, uint64_t size,
                      uint32_t *numbers, int room, uint64_t *end);

/* ---- rdma.c: the destination's lanes over RDMA: pages are READ out of the source's memory ---- */

/* Pages of the region, as numbered on the wire. chunk: the number of the first of their chunks. */
struct pn_rdma_block {
    uint64_t first;
    uint64_t pages;
    uint64_t page_size;
    uint64_t chunk;
};
struct pn_rdma_config {
    struct pn_lane_config lane; /* without a socket yet; the ring may stay empty */
    const char *device;
    const struct pn_rdma_block *blocks;
    uint64_t block_count;
    uint64_t chunk_count;
    /* Bytes that one key is for, a power of two. A larger page is a chunk of its own. */
    uint64_t chunk_size;
    int port;
    int gid_index;
};
/* A queue pair of the other side, and its address. */
struct pn_rdma_peer {
    uint8_t gid[16];
    uint32_t number;
    uint32_t psn;
    uint16_t lid;
    uint8_t mtu;   /* of the path: the verbs' number for it */
    uint8_t reads; /* READs of one queue pair that may be in flight at once */
};
struct pn_rdma;
/* NULL on failure. *error is then -ENOENT: there is no libibverbs; -ENODEV, -EACCES...: the device
 * is missing, or may not be used; else the error of what the device refused. Borrows what config
 * points to. */
struct pn_rdma *pn_rdma_new(const struct pn_rdma_config *config, int *error);
void pn_rdma_free(struct pn_rdma *rdma);
/* The number of queue pair 0 (demand) or 1 (background). */
uint32_t pn_rdma_number(const struct pn_rdma *rdma, int queue_pair);
/* Joins a queue pair, whose packets are counted from psn on, to the peer's. 0 or -errno. */
int pn_rdma_connect(struct pn_rdma *rdma, int queue_pair, uint32_t psn,
                    const struct pn_rdma_peer *peer);
/* Runs both queue pairs until they end. *end gets the reason. Keys come over the non-blocking
 * socket. */
void pn_rdma_run(struct pn_rdma *rdma, int sock, struct pn_tls *tls, struct pn_end *end);
/* Has the lanes give every key back and ask for none, until they are told otherwise. To be called
 * while no page is in flight, from any thread; the ring's work_fd wakes them. */
void pn_rdma_give_back(struct pn_rdma *rdma, int give_back);
/* Whether they have done so: all that the source said about its memory is forgotten. */
int pn_rdma_is_keyless(const struct pn_rdma *rdma);
/* How often it polled for the end of a READ before sleeping, which it does only where there are
 * processors to spare. To be called after it has ended. */
uint64_t pn_rdma_spun(const struct pn_rdma *rdma);

/* ---- tls.c: TLS 1.3 on a socket that one thread at a time drives ---- */

enum { PN_TLS_NAME = 256, PN_TLS_NAMES = 16384 };
enum pn_tls_file {
    PN_TLS_MEMORY,
    PN_TLS_AUTHORITIES,
    PN_TLS_REVOKED,
    PN_TLS_CERTIFICATE,
    PN_TLS_KEY,
};
enum { PN_TLS_SENDS = 1, PN_TLS_RECEIVES = 2 };
/* A key that both sides have. */
struct pn_tls_psk {
    const char *name;
    const uint8_t *key;
    uint32_t length;
};
/* What a side shows, and whom it trusts: the content of files in PEM; or keys that both sides
 * have, and then nothing else. */
struct pn_tls_config {
    int serves;              /* it answers the handshake, and does not begin it */
    const char *authorities; /* whose certificates are trusted */
    const char *revoked;     /* NULL: no list */
    const char *certificate; /* and those between it and the authority's */
    const char *key;
    const struct pn_tls_psk *psks; /* those that are accepted; who begins uses the first */
    uint64_t psk_count;
};
struct pn_tls_context;
/* NULL: *which is what cannot be used, and text says why. Borrows psks. */
struct pn_tls_context *pn_tls_context_new(const struct pn_tls_config *config, int *which,
                                          char *text, uint64_t size);
/* To be called after the handshakes of its connections. */
void pn_tls_context_free(struct pn_tls_context *context);

/* Borrows the context, and the non-blocking socket. host: the name or address that the peer's
 * certificate has to have; NULL: any. NULL: no memory. */
struct pn_tls *pn_tls_new(struct pn_tls_context *context, int sock, const char *host);
/* farewell: says it, if the socket takes it, which must then still be open. */
void pn_tls_free(struct pn_tls *tls, int farewell);
/* 0: done; -EAGAIN: wait for the socket, and call again; -errno: failed. -EPROTO: pn_tls_text() has
 * the reason. */
int64_t pn_tls_handshake(struct pn_tls *tls);
/* After -EAGAIN: whether the socket is to be waited for until it takes more, and not until it has
 * more. */
int pn_tls_wants_to_send(const struct pn_tls *tls);
const char *pn_tls_text(const struct pn_tls *tls);
/* How many bytes went, at least one, or -errno. After -EAGAIN it must be called with the same bytes
 * again. */
int64_t pn_tls_send_bytes(struct pn_tls *tls, const void *bytes, uint64_t size);
/* How many bytes came; 0: the peer has closed; or -errno (-ECONNRESET: it ended without a
 * farewell). To be called until it returns -EAGAIN: there may be more that the socket does not
 * show. */
int64_t pn_tls_receive_bytes(struct pn_tls *tls, void *bytes, uint64_t size);
/* The peer's names, each with its kind in front ("CN:", "DNS:", "URI:", "PSK:") and a newline
 * behind. 0: it has none, or more than there is room for. */
int pn_tls_names(const struct pn_tls *tls, char *text, uint64_t size);
const char *pn_tls_cipher(const struct pn_tls *tls);
/* Which of PN_TLS_SENDS and PN_TLS_RECEIVES the kernel does. */
int pn_tls_kernel(const struct pn_tls *tls);

/* ---- keys.c: the source over RDMA: its memory is registered as destinations ask for keys ---- */

/* Pages that are served: a stretch of a file, or of a process's memory. */
struct pn_source_block {
    uint64_t first; /* page number */
    uint64_t pages;
    uint64_t page_size;
    uint64_t address; /* of the memory in process pid, or of this process's mapping of fd */
    const char *name; /* for messages */
    int fd;           /* file or memfd, or -1 */
    int pid;
    int pidfd;
    /* Of a file that is filled while it is served: a byte for each piece, not 0 once the piece is
     * there (see pn_pieces_came). NULL: all of it is there. */
    const uint8_t *here;
    struct pn_frames *frames; /* of a file that frames are unpacked into; or NULL */
};
struct pn_keys_config {
    const char *device;
    const struct pn_source_block *blocks;
    uint64_t block_count;
    uint64_t chunk_count;
    uint64_t chunk_size;
    uint64_t pin_limit;   /* bytes that may be registered at a time */
    uint32_t in_any_case; /* keys that each reader may have beyond pin_limit */
    int port;
    int gid_index;
};
struct pn_keys;
/* On failure NULL, and *error as of pn_rdma_new(). Borrows what config points to. */
struct pn_keys *pn_keys_new(const struct pn_keys_config *config, int *error);
/* To be called after its readers are freed. */
void pn_keys_free(struct pn_keys *keys);
/* Bytes that are registered now. From any thread. */
uint64_t pn_keys_pinned(struct pn_keys *keys);
/* Pages whose keys were granted until now, those of chunks that are granted again included. From
 * any thread. */
uint64_t pn_keys_granted(struct pn_keys *keys);

/* One connection that is given keys, and the queue pair that it reads through. */
struct pn_reader;
struct pn_reader *pn_reader_new(struct pn_keys *keys, int *error);
/* Gives its keys back. */
void pn_reader_free(struct pn_reader *reader);
uint32_t pn_reader_number(const struct pn_reader *reader);
int pn_reader_connect(struct pn_reader *reader, uint32_t psn, const struct pn_rdma_peer *peer);
/* Serves the peer until it closes its end of the non-blocking socket, stop_fd becomes readable, or
 * something fails: PN_END_FAILED if the memory is lost, PN_END_BROKEN with a text if it cannot be
 * registered. The peer gets the text of either. unread: what was received already, up to 4096
 * bytes. */
void pn_reader_run(struct pn_reader *reader, int sock, struct pn_tls *tls, int stop_fd,
                   const void *unread, uint64_t length, struct pn_end *end);

/* ---- source.c: the source's half: many connections, one loop ---- */

enum { PN_PIECE_BYTES = 64 << 10 }; /* of pn_source_block.here */

struct pn_lack {
    uint64_t first; /* page number */
    uint64_t count;
    int class_;
};

struct pn_source;
/* What the loops of a source tell each other about a destination's link: whether compressing pays
 * even for a page that a thread waits for. Destinations whose numbers are equal modulo 256 share an
 * entry: a wrong guess costs microseconds. */
struct pn_links {
    uint8_t demand[256];
};
/* NULL: no memory, or no descriptors. ended_fd: an eventfd, written when pn_source_ended has a
 * connection to report. */
struct pn_source *pn_source_new(const struct pn_source_block *blocks, uint64_t count,
                                struct pn_links *links, int ended_fd);
void pn_source_free(struct pn_source *source);
/* Serves the peer at the non-blocking socket `sock`, with TLS or without (NULL), both of which the
 * source owns from now on, unless this fails. link: the
 * number of the peer's destination; unread: what was already received from the peer. From any
 * thread. */
int pn_source_add(struct pn_source *source, int sock, struct pn_tls *tls, uint64_t id,
                  uint32_t link, const void *unread, uint64_t length);
int pn_source_remove(struct pn_source *source, uint64_t id);
/* Runs the loop until pn_source_stop, or until the memory cannot be read (PN_END_FAILED).
 * background: no thread waits for what these connections bring. */
void pn_source_run(struct pn_source *source, int background, struct pn_end *end);
void pn_source_stop(struct pn_source *source);
/* Reports a connection that has ended: 1, its id and the reason; or 0 if there is none. */
int pn_source_ended(struct pn_source *source, uint64_t *id, struct pn_end *end);
/* Pages that a destination waits for and that are not all there: 1, and `lack` is set; 0 if there
 * are no more. The eventfd pn_source_lacks_fd is written when there are. From one thread. */
int pn_source_lacks(struct pn_source *source, struct pn_lack *lack);
int pn_source_lacks_fd(const struct pn_source *source);
/* Has the loop look again for the pieces that it waits for. From any thread. */
void pn_source_look(struct pn_source *source);
/* Says that pieces are there, and may be read from now on. From any thread. */
void pn_pieces_came(uint8_t *here, uint64_t first, uint64_t count);
/* Pages of that class that were asked for until now. From any thread. */
uint64_t pn_source_asked(const struct pn_source *source, int class_);
/* Pages that were answered as zeros until now. From any thread. */
uint64_t pn_source_zeros(const struct pn_source *source);
/* Bytes that all connections keep now because their sockets were full. A connection keeps at most a
 * chunk (256 KiB) and its headers, or a larger unit that was compressed, as long as all connections
 * together keep less than 16 MiB. From any thread. */
uint64_t pn_source_kept(const struct pn_source *source);

/* ---- memory.c: looking at page bytes where Python must not ---- */

/* How many pages from buffer on are like the first: zero throughout (*zero 1), or not (*zero 0). */
uint64_t pn_zero_run(const void *buffer, uint64_t pages, uint64_t page_size, int *zero);
/* Sets a bit, which was clear, for each page that is zero of those of a file from offset on.
 * Returns how many, or -errno (-ENODATA: the file ends). */
int64_t pn_zero_map(int fd, uint64_t offset, uint64_t pages, uint64_t page_size, uint8_t *bits);
/* process_vm_readv, all of it: 0, or -errno (-EFAULT where part of the range is not mapped). */
int pn_read_process(int pid, uint64_t address, void *buffer, uint64_t length);
/* memcpy to memory of this process that may be gone: the kernel then returns -EFAULT, and raises no
 * signal. 0 or -errno. */
int pn_store(uint64_t to, const void *from, uint64_t length);
/* memcpy, for callers that must not touch memory themselves because it may fault while they hold a
 * lock. */
void pn_copy(void *to, const void *from, uint64_t length);
/* mmap of read-write memory: private anonymous (fd -1) or shared with the file. The address, or
 * -errno cast to unsigned. Allocates address space; pn_unmap_memory gives it back. */
uint64_t pn_map_memory(uint64_t length, int fd, uint64_t offset, uint64_t alignment);
void pn_unmap_memory(uint64_t address, uint64_t length);
/* mmap of an existing file; the address, or -errno as above. writable: with PROT_WRITE, whether or
 * not anything is to be written. */
uint64_t pn_map_file(uint64_t length, int fd, int writable);
/* Gets every page of a mapping now, to write to, rather than at its first touch. 0, or -errno
 * (-EINVAL: the kernel is older than 5.14). */
int pn_populate(uint64_t address, uint64_t length);
/* Enters pages of a mapped file that are in memory into the page table, many at a time. Where the
 * kernel cannot (before Linux 5.14), nothing happens. */
void pn_map_ahead(uint64_t address, uint64_t length);
/* Whether the range is nothing but a hole. A range past the end of a file that has become shorter
 * is none. */
int pn_is_hole(int fd, uint64_t offset, uint64_t size);
/* Takes the first `length` bytes out of a file, which keeps its size: mappings of it have a hole
 * there. */
int pn_punch(int fd, uint64_t length);

#endif
