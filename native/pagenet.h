/* The C core of pagenet. One header for C and for the cffi build, which reads it with its
 * preprocessor lines cut out.
 *
 * Conventions: a function returns a value >= 0, or -errno. Nothing is global, nothing allocates
 * unless its name says so. Byte counts and addresses are uint64_t, page numbers too.
 */
#ifndef PAGENET_H
#define PAGENET_H
#include <stddef.h>
#include <stdint.h>

/* ---- uffd.c: the ioctls of userfaultfd(2), one function each
 * -------------------------------------------------- */

/* Opens O_CLOEXEC|O_NONBLOCK (a blocking uffd polls POLLERR for ever): the system call first, then
 * the device node. user_mode_only leaves out faults taken inside the kernel (enough for an
 * unprivileged process's own touches). */
int pn_uffd_open(const char *device, int user_mode_only);
/* One UFFDIO_API per descriptor. wanted 0 asks for nothing; *features then holds all that the
 * kernel has. */
int pn_uffd_api(int uffd, uint64_t wanted, uint64_t *features);
int pn_uffd_register(int uffd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls);
/* Stop watching, and let everybody go who waits there. */
int pn_uffd_unregister(int uffd, uint64_t start, uint64_t length);
int pn_uffd_wake(int uffd, uint64_t start, uint64_t length);
/* The state of the memory behind the uffd: 0, -EAGAIN while it is changing and events are queued,
 * -ESRCH if it is gone. Changes nothing at `address`, a page of it. */
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
/* Up to 64 events without waiting: how many, or -EAGAIN if there are none. */
int pn_uffd_read(int uffd, struct pn_event *events, int room);

/* ---- attach.c: a userfaultfd, and a memfd for the map of pages, made inside another process
 * ------------------------ */

/* Their numbers in that process; or why the kernel refuses it one of them, as -errno. */
struct pn_planted {
    int uffd;
    int map;
    int refused;
};
/* Stops the main thread of process pid for a moment, which is the one behind pidfd: a number may
 * become another's. -EPERM: it may not be traced; -EBUSY: it is stopped; -ENOEXEC: it is not 64-bit
 * code; -ESRCH: it has ended; -ETIMEDOUT: it does not stop; -ENOSYS: not on this machine. It is
 * left as it was. */
int pn_plant(int pid, int pidfd, const char *device, struct pn_planted *planted);
/* Closes both there. */
int pn_uproot(int pid, int pidfd, const struct pn_planted *planted);

/* ---- place.c: the one place that knows what EEXIST, EAGAIN, ENOENT and partial results mean
 * ------------------- */

enum pn_how { PN_COPY, PN_ZERO, PN_CONTINUE, PN_MOVE, PN_POISON };

/* placed, existed, absent: bytes. error -EAGAIN: events are queued; drain all of them and call
 * again for the rest. -ESRCH: the owner is gone. placed + existed + absent bytes are dealt with, in
 * order, whatever the error. */
struct pn_placed {
    uint64_t placed;
    uint64_t existed;
    uint64_t absent;
    int error;
};
/* Put length bytes at address `to` of the uffd's owner and wake whoever waits there. from: the
 * bytes (COPY, MOVE), one page of zeros (ZERO), unused (CONTINUE, POISON). */
struct pn_placed pn_place(int uffd, enum pn_how how, uint64_t to, const void *from, uint64_t length,
                          uint64_t page_size);
/* Answer a fault on a page that was placed, or given up, before: with what the page cache has (a
 * minor fault), else zeros. */
struct pn_placed pn_settle(int uffd, uint64_t to, int minor, const void *zeros, uint64_t page_size);
/* Answer a fault at an address that the owner announced nothing about: poison its page, or (zero)
 * make it one of zeros. flags: the event's. 0, -EAGAIN and -ESRCH as above; what cannot be answered
 * is left waiting, and is 0 too. */
int pn_answer_outside(int uffd, uint64_t address, uint64_t flags, int zero);

/* ---- residency.c: the destination's map of pages, in memory that threads and processes share
 * ------------------- */

enum pn_state {
    PN_MISSING = 0,   /* not here, not asked for */
    PN_REQUESTED = 1, /* asked for */
    PN_PLACING = 2,  /* bytes are being stored into the page: whoever set this, and nobody else, may
                        write it */
    PN_RESIDENT = 3, /* placed */
    PN_REMOVED = 4,  /* the owner gave it up (balloon, MADV_DONTNEED): reads as zero, never as what
                        the source had */
    PN_OUTSIDE = 5,  /* the owner does not map it */
    PN_POISONED = 6, /* can never come: touching it is a SIGBUS */
    PN_COMING = 7,   /* asked for in the background: worth asking again, on the demand lane, if
                        somebody waits for it */
    PN_REMOVING =
        8, /* given up by the owner while PLACING: whoever places it is to leave it REMOVED */
    PN_READY = 9, /* its bytes are whole in the shared memory behind it, and it is being made
                     visible, or was just now */
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
    PN_SAMPLED, /* of PAGES, those that were held, so that their first touch is seen: see dest.c */
    PN_SAMPLED_USED,   /* of them, those that were touched */
    PN_OUTSIDE_FAULTS, /* of FAULTS, those at addresses that the owner announced nothing about */
    PN_COUNTERS,
};

/* Latency in ns, log2 with 8 linear steps an octave: bucket of v is v below 16, else 8*(log2(v)-2)
 * + the next 3 bits. */
struct pn_class_stats {
    uint64_t counters[15];
    uint64_t latency[320];
};

struct pn_map {
    char magic[8];
    uint64_t pages;
    uint64_t scope;    /* pages that are to become resident: all but those OUTSIDE */
    uint64_t done;     /* of those, RESIDENT, REMOVED or POISONED */
    uint64_t finished; /* not 0: the source was told that everything is in place */
    struct pn_class_stats classes[3];
};

/* The name of the memfd in which an owner keeps it (docs/protocol.md). */
#define PN_MAP_NAME "pagenet-residency"
uint64_t pn_map_bytes(uint64_t pages);
void pn_map_init(struct pn_map *map, uint64_t pages);
int pn_map_state(const struct pn_map *map, uint64_t page);
/* Takes over a map whose users have died, wherever they stood: what was asked for, or was coming
 * in, is MISSING again, and scope and done are counted anew. READY and REMOVING pages are left to
 * the caller. -EINVAL: it is no map of so many pages. */
int pn_map_recover(struct pn_map *map, uint64_t pages);
/* Moves pages from state `from` to state `to`, each atomically, and stops at the first that is in
 * another: how many. */
uint64_t pn_map_claim(struct pn_map *map, uint64_t first, uint64_t count, int from, int to);
/* Moves all count pages to state `to`, whatever they were in. */
void pn_map_set(struct pn_map *map, uint64_t first, uint64_t count, int to);
/* The same for those in state `from` alone: how many. */
uint64_t pn_map_replace(struct pn_map *map, uint64_t first, uint64_t count, int from, int to);
/* First page of [first, end) that is in that state, or end. */
uint64_t pn_map_find(const struct pn_map *map, uint64_t first, uint64_t end, int state);
/* First page of [first, end) that is neither RESIDENT nor REMOVED nor POISONED, or end. */
uint64_t pn_map_unsettled(const struct pn_map *map, uint64_t first, uint64_t end);
/* How many pages from first on, below end, are in that state without a gap. */
uint64_t pn_map_span(const struct pn_map *map, uint64_t first, uint64_t end, int state);
uint64_t pn_map_done(const struct pn_map *map);
void pn_stats_add(struct pn_map *map, int class_, int counter, uint64_t amount);
void pn_stats_latency(struct pn_map *map, int class_, uint64_t nanoseconds);

/* ---- window.c: what to ask for around a page that somebody waits for
 * ------------------------------------------- */

struct pn_line { /* that faults follow: step 0 while there was but one; steps: how many of them are
                    asked for ahead */
    uint64_t last;
    int64_t step;
    int64_t steps;
    uint64_t used;
    uint32_t faults;
};
struct pn_area { /* number + 1, 0: none; level: 2^level pages around its last fault were asked for
                  */
    uint64_t number;
    int32_t level;
    uint32_t faults;
};
struct pn_want { /* [first, end) */
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
    int32_t level; /* of an area's first fault, in sixteenths */
    struct pn_line lines[8];
    struct pn_area areas[4096];
    struct pn_stack wanted[8]; /* by how many faults were there: 1 to 8 and more */
};
void pn_window_init(struct pn_window *window); /* which adapts */
/* So many pages on either side, or (fixed 0) as many as seem right. From any thread, at any time.
 */
void pn_window_fix(struct pn_window *window, int fixed, uint32_t forward, uint32_t backward);
int pn_window_fixed(const struct pn_window *window, uint32_t *forward, uint32_t *backward);
/* A page was MISSING and somebody waits for it: of the pages [first, end) around it, what will be
 * touched next? */
void pn_window_fault(struct pn_window *window, const struct pn_map *map, uint64_t page,
                     uint64_t first, uint64_t end, uint64_t page_size);
/* Up to so many bytes of that, at least a page, which are MISSING and become REQUESTED: how many
 * pages, from *first on. 0: nothing more is wanted. */
uint64_t pn_window_next(struct pn_window *window, struct pn_map *map, uint64_t bytes,
                        uint64_t *first);

/* ---- dest.c: the destination's half of the native lanes: what they share
 * ------------------------------------------ */

/* Pages that threads waited for, in that order, passed from the demand lane to whoever learns from
 * them. One writer, one reader, and neither ever waits for the other: what finds no room is lost,
 * and counted. */
struct pn_fault_log {
    uint64_t head; /* next to be read */
    uint64_t tail; /* next to be written */
    uint64_t dropped;
    uint64_t sleeping; /* the reader waits for its eventfd */
    uint64_t pages[4096];
};
/* Up to `room` pages, oldest first: how many. If there are none, the next one writes the reader's
 * eventfd. */
uint64_t pn_fault_log_read(struct pn_fault_log *log, uint64_t *pages, uint64_t room);
void pn_fault_log_write(struct pn_fault_log *log, uint64_t page, int reader_fd);

/* Pages that lie in one block and at consecutive addresses. second: this process's own mapping of
 * the same memory, or 0; file_offset: where in the file behind both they begin. wire_first: the
 * first page's number on the wire, where 1 << shift pages make one of these. */
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
    uint64_t scope; /* pages that are to become resident, whatever the map says by now */
    const struct pn_piece *pieces; /* ascending by first */
    const uint32_t *by_address;    /* their indices, ascending by address */
    uint64_t piece_count;
    uint64_t max_page_size;
    int uffd;
    int how;    /* enum pn_how of pages that are not zero: COPY, MOVE or CONTINUE */
    int file;   /* behind the second mapping: pages are written to it; -1: through the mapping */
    int sealed; /* storing through the second mapping is never a SIGBUS: the file cannot become
                   shorter */
    int outside_is_zero; /* what the owner announced nothing about reads as zero; else it is
                            poisoned */
    int removes;         /* the uffd reports REMOVE or UNMAP events */
    int done_fd; /* eventfd, written once every page of the scope is in place, if the map is right
                  */
    struct pn_window *window;    /* prefetch: the demand lane's */
    struct pn_fault_log *faults; /* NULL: nobody wants to know */
    int faults_fd;               /* eventfd of its reader */
    int encodings;               /* that are asked for, a bit each */
};

struct pn_dest;
struct pn_dest *pn_dest_new(
    const struct pn_dest_config *config); /* NULL: no memory. Borrows all that config points to. */
void pn_dest_free(struct pn_dest *dest);
/* How many of `count` pages from `first` on come before the first that the sample of prefetched
 * pages takes. */
uint64_t pn_before_sampled(uint64_t first, uint64_t count);
/* No lane runs any more: let the owner see the pages of the sample that it has not touched. */
void pn_dest_release(struct pn_dest *dest);
/* How many bytes of background may come over the wire in a second, on all lanes together: 0 for no
 * limit; UINT64_MAX to ask for none. A lane that waits looks again when its work_fd is written.
 * From any thread. */
void pn_dest_limit(struct pn_dest *dest, uint64_t bytes_per_second);

/* Runs from the schedule to a background lane: one writer, one reader. */
struct pn_ring {
    uint64_t head;    /* next to be taken */
    uint64_t tail;    /* next to be written */
    uint64_t wake_at; /* the writer's eventfd is written when no more runs than this are left; 0: at
                         each run taken */
    uint64_t first[512];
    uint64_t count[512];
};
int pn_ring_push(struct pn_ring *ring, uint64_t first, uint64_t count); /* 0, or -EAGAIN: full */
uint64_t pn_ring_used(const struct pn_ring *ring);

/* ---- lane.c, loop.c: one connection of the destination, and the loop that drives it
 * ----------------------------------- */

enum pn_end_kind {
    PN_END_STOPPED,  /* stop_fd became readable */
    PN_END_CLOSED,   /* the peer closed */
    PN_END_BROKEN,   /* error: the socket's */
    PN_END_PROTOCOL, /* text: what the peer did wrong */
    PN_END_FAILED,   /* text: why the source cannot go on, in its own words */
    PN_END_OWNER_GONE,
    PN_END_OWNER_WRONG, /* text: the owner did what it may not */
    PN_END_PLACING,     /* error: of placing pages, other than those with a meaning */
    PN_END_NO_MEMORY,
};
struct pn_end {
    int kind;
    int error;
    char text[1100];
};

struct pn_lane_config {
    struct pn_dest *dest;
    struct pn_ring *ring;  /* background: where runs come from; NULL makes it the demand lane, which
                              reads the uffd */
    int sock;              /* non-blocking */
    int stop_fd;           /* eventfd */
    int work_fd;           /* eventfd: the ring has runs; -1 for demand */
    int room_fd;           /* eventfd: the ring has room; -1 for demand */
    uint64_t window_least; /* bytes of background that may be in flight while the owner does little
                              but wait, ... */
    uint64_t window_min;   /* ... while there are faults, ... */
    uint64_t window_max;   /* ... and when there have been none for a while */
    uint64_t chunk;        /* bytes of background asked for at a time */
};
/* Runs the lane until it ends, and says why. */
void pn_lane_run(const struct pn_lane_config *config, struct pn_end *end);

/* ---- pack.c: pages as one LZ4 block behind a checksum
 * -------------------------------------------------------------------- */

enum { PN_LZ4_GAIN = 16 /* compressed is worth it if one byte in so many is saved */ };
uint64_t pn_pack_state(void); /* bytes of memory, 8-byte aligned, that pn_pack works in */
/* The pages (2 MiB of them at most), packed, into `to`, which has room for as many bytes: how many
 * it took, or 0 if not enough would be saved. */
uint64_t pn_pack(void *state, const void *pages, uint64_t size, void *to);
/* -EBADMSG: these bytes are not what `size` bytes of pages become. `pages` then holds anything. */
int pn_unpack(const void *from, uint64_t length, void *pages, uint64_t size);

/* ---- choice.c: whether to compress
 * ------------------------------------------------------------------------------------- */

/* Times in ns; rates in ns a byte. All zero is not a beginning: pn_choice_init. */
struct pn_choice {
    int mode;
    int sampled;      /* in this period */
    int is_probing;   /* not compressing just to see what that is like */
    double raw_ns;    /* a byte of a page, as it is */
    double recent[4]; /* of the last periods, of which raw_ns is the least */
    uint64_t periods; /* since it does not compress */
    double send_ns;   /* the processor's time to read and send it */
    double packed_ns; /* a byte compressed */
    double pack_ns;   /* the processor's time to compress it */
    double left;      /* of a byte when compressed; below 0: not known */
    uint64_t settle;  /* bytes to let pass before what is seen counts */
    uint64_t bytes, wire, busy,
        work; /* in this period: of pages, on the wire; time busy, and of that with work of ours */
    uint64_t mark;  /* busy time is counted up to here */
    uint64_t until; /* no trial before, no probe before */
    uint64_t pause, probe;
};
void pn_choice_init(struct pn_choice *choice);
int pn_choice_packs(const struct pn_choice *choice);
/* Whether it pays even for a page that somebody waits for, where compressing, sending and
 * decompressing come one after the other. */
int pn_choice_for_demand(const struct pn_choice *choice);
/* It would be good to have a sample compressed. */
int pn_choice_wants_sample(const struct pn_choice *choice, uint64_t now);
/* Compressing `size` bytes took so long and left `length`, or (0) too many. */
void pn_choice_tried(struct pn_choice *choice, uint64_t size, uint64_t length, uint64_t ns);
/* There was nothing to do until now. */
void pn_choice_resume(struct pn_choice *choice, uint64_t now);
/* From `began` to `now` so many bytes of pages were given to the socket, as so many on the wire. */
void pn_choice_answered(struct pn_choice *choice, uint64_t bytes, uint64_t wire, uint64_t began,
                        uint64_t now);

/* ---- demand_choice.c: whether pages that somebody waits for come compressed
 * ---------------------------------------------------- */

/* All zero is not a beginning: pn_demand_choice_init. */
struct pn_demand_choice {
    int packs; /* pages are asked for compressed, whatever that costs; if not, as the source thinks
                  best */
    int is_trial;
    uint32_t settled, count;
    uint64_t samples[32]; /* ns that 4 KiB took, of this block */
    double before;        /* ns that they took the other way */
    uint64_t pause, left; /* pages between two trials, and until the next one */
};
void pn_demand_choice_init(struct pn_demand_choice *choice);
int pn_demand_choice_packs(const struct pn_demand_choice *choice);
/* A page that was asked for like that took so long for each of its 4 KiB, from there into its
 * place. Not one of zeros. */
void pn_demand_choice_came(struct pn_demand_choice *choice, int packs, uint64_t ns);

/* ---- rdma.c: the destination's lanes over RDMA: pages are READ out of the source's memory
 * ------------------------------ */

/* Pages of the region as they are numbered on the wire, and the number of the first of its chunks.
 */
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
    uint64_t chunk_size; /* bytes that one key is for, a power of two; a larger page is a chunk of
                            its own */
    int port;
    int gid_index;
};
/* A queue pair of the other side's, and where it is. */
struct pn_rdma_peer {
    uint8_t gid[16];
    uint32_t number;
    uint32_t psn;
    uint16_t lid;
    uint8_t mtu;   /* of the path: the verbs' number for it */
    uint8_t reads; /* of one queue pair, that may be under way at once */
};
struct pn_rdma;
/* NULL and *error -ENOENT: no libibverbs; -ENODEV, -EACCES...: the device; else what it refused.
 * Borrows what config points to. */
struct pn_rdma *pn_rdma_new(const struct pn_rdma_config *config, int *error);
void pn_rdma_free(struct pn_rdma *rdma);
/* The number of queue pair 0 (demand) or 1 (background), whose packets are counted from psn on;
 * then join it to the peer's. */
uint32_t pn_rdma_number(const struct pn_rdma *rdma, int queue_pair);
int pn_rdma_connect(struct pn_rdma *rdma, int queue_pair, uint32_t psn,
                    const struct pn_rdma_peer *peer);
/* Runs both until they end, and says why. Keys come over the non-blocking socket. */
void pn_rdma_run(struct pn_rdma *rdma, int sock, struct pn_end *end);
/* How often it has looked for the end of a READ before sleeping: only where there are processors to
 * spare. After its end. */
uint64_t pn_rdma_spun(const struct pn_rdma *rdma);

/* ---- keys.c: the source over RDMA: its memory is registered as destinations ask for keys
 * ------------------------------- */

/* Pages that are served: a stretch of a file, or of a process's memory. */
struct pn_source_block {
    uint64_t first; /* page number */
    uint64_t pages;
    uint64_t page_size;
    uint64_t address; /* of the memory in process pid, or of this process's mapping of fd */
    const char *name; /* for people */
    int fd;           /* file or memfd, or -1 */
    int pid;
    int pidfd;
};
struct pn_keys_config {
    const char *device;
    const struct pn_source_block *blocks;
    uint64_t block_count;
    uint64_t chunk_count;
    uint64_t chunk_size;
    uint64_t pin_limit;   /* bytes that are registered at a time */
    uint32_t in_any_case; /* keys that each reader may have all the same */
    int port;
    int gid_index;
};
struct pn_keys;
/* NULL and *error as pn_rdma_new(). Borrows what config points to. */
struct pn_keys *pn_keys_new(const struct pn_keys_config *config, int *error);
/* After its readers. */
void pn_keys_free(struct pn_keys *keys);
/* Bytes that are registered now. From any thread. */
uint64_t pn_keys_pinned(struct pn_keys *keys);

/* One connection that is given keys, and the queue pair that it reads through. */
struct pn_reader;
struct pn_reader *pn_reader_new(struct pn_keys *keys, int *error);
/* Gives its keys back. */
void pn_reader_free(struct pn_reader *reader);
uint32_t pn_reader_number(const struct pn_reader *reader);
int pn_reader_connect(struct pn_reader *reader, uint32_t psn, const struct pn_rdma_peer *peer);
/* Until the peer closes its end of the non-blocking socket, or stop_fd becomes readable, or
 * something is wrong: PN_END_FAILED if the memory is lost, PN_END_BROKEN with a text if it cannot
 * be registered, of which the peer has been told. unread: what was received already, up to 4096
 * bytes. */
void pn_reader_run(struct pn_reader *reader, int sock, int stop_fd, const void *unread,
                   uint64_t length, struct pn_end *end);

/* ---- source.c: the source's half: many connections, one loop
 * ---------------------------------------------------------- */

struct pn_source;
/* What the loops of a source tell each other of a destination's link: whether compressing pays even
 * for a page that somebody waits for. Destinations of the same number (modulo 256) share: a wrong
 * guess costs microseconds. */
struct pn_links {
    uint8_t demand[256];
};
/* NULL: no memory, or no descriptors. ended_fd: eventfd, written when pn_source_ended has something
 * to say. */
struct pn_source *pn_source_new(const struct pn_source_block *blocks, uint64_t count,
                                struct pn_links *links, int ended_fd);
void pn_source_free(struct pn_source *source);
/* Serve the peer at non-blocking socket `sock` from now on, which the source then owns; link: its
 * destination's number; unread: what was received from it already. From any thread. */
int pn_source_add(struct pn_source *source, int sock, uint64_t id, uint32_t link,
                  const void *unread, uint64_t length);
int pn_source_remove(struct pn_source *source, uint64_t id);
/* The loop: until pn_source_stop, or until the memory cannot be read (PN_END_FAILED). background:
 * nobody waits for what these connections bring. */
void pn_source_run(struct pn_source *source, int background, struct pn_end *end);
void pn_source_stop(struct pn_source *source);
/* A connection that has ended: 1 and its id and why, or 0 if there is none. */
int pn_source_ended(struct pn_source *source, uint64_t *id, struct pn_end *end);
/* Pages that were asked for in that class, so far. From any thread. */
uint64_t pn_source_asked(const struct pn_source *source, int class_);
/* Bytes that are kept now because sockets were full, of all connections: of each a header, or a
 * chunk that was compressed (256 KiB), or a larger unit that was, as long as all keep less than 16
 * MiB. From any thread. */
uint64_t pn_source_kept(const struct pn_source *source);

/* ---- memory.c: looking at page bytes where Python must not
 * ------------------------------------------------------ */

/* How many pages from buffer on are alike in being zero throughout (*zero 1) or not (*zero 0). */
uint64_t pn_zero_run(const void *buffer, uint64_t pages, uint64_t page_size, int *zero);
/* Set a bit (clear before) for each page of a file from offset on that is zero: how many, or -errno
 * (-ENODATA: the file ends). */
int64_t pn_zero_map(int fd, uint64_t offset, uint64_t pages, uint64_t page_size, uint8_t *bits);
/* process_vm_readv, all of it: 0, or -errno (-EFAULT where part of the range is not mapped). */
int pn_read_process(int pid, uint64_t address, void *buffer, uint64_t length);
/* memcpy to memory of this process that may be gone, for which the kernel says -EFAULT, and no
 * signal comes. 0 or -errno. */
int pn_store(uint64_t to, const void *from, uint64_t length);
/* memcpy, for callers that must not touch memory themselves because it may fault while they hold a
 * lock. */
void pn_copy(void *to, const void *from, uint64_t length);
/* mmap of read-write memory: private anonymous (fd -1) or shared with the file. The address, or
 * -errno cast to unsigned. Allocates address space; pn_unmap_memory gives it back. */
uint64_t pn_map_memory(uint64_t length, int fd, uint64_t offset, uint64_t alignment);
void pn_unmap_memory(uint64_t address, uint64_t length);
/* mmap of a file that is there already, as above: to read, or as if it were to be written. */
uint64_t pn_map_file(uint64_t length, int fd, int writable);
/* Get every page of a mapping now, to write to, rather than at its first touch. -EINVAL: the kernel
 * is older than 5.14. */
int pn_populate(uint64_t address, uint64_t length);
/* Map what is mapped of a file and in memory, many pages at a time; where that cannot be (before
 * Linux 5.14), nothing happens. */
void pn_map_ahead(uint64_t address, uint64_t length);
/* Nothing but a hole. A file that has become shorter says so too: see its size. */
int pn_is_hole(int fd, uint64_t offset, uint64_t size);
/* Takes everything out of a file, which keeps its size; whoever has mapped it finds holes. */
int pn_punch(int fd, uint64_t length);

#endif
