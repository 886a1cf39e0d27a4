/* An owner: a process that moves onto pagenet as a VMM does, works on its memory while the pages
 * come, and knows what every byte of it must be. The file is in the order in which it runs:
 * options, memory, userfaultfd, handshake, touching (threads), removing (the main thread,
 * meanwhile), verifying, report.
 *
 * A page must hold its pattern, or zeros once the owner has removed it. Its first word is higher by
 * the number of writes that the page has seen. So a page that is missing, stale, in the wrong
 * place, or placed late over the owner's own write is found, by the touch that meets it or by the
 * verification at the end.
 *
 * "Page" is a page of the pattern, numbered through all mappings in the order of their offsets. A
 * "unit" is what can be removed: a page of the pattern or of the memory, whichever is larger.
 */
#define _GNU_SOURCE
#include "testing.h"
#include "clock.h"
#include "handshake.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

enum { MAX_MAPPINGS = 64, MAX_THREADS = 4096, BUCKETS = 320 };
enum { HUGE_PAGE = 2 << 20, GAP = HUGE_PAGE }; /* a gap keeps the alignment that huge pages need */
enum { MS = 1000 * 1000, SLOW_NS = 5000, RECORDED_NS = 2000, STALL_NS = 20 * MS };
enum { CONNECT_MS = 5000, CLOSE_MS = 5000, TICK_MS = 1, PROGRESS_MS = 1000 };
enum { ZIPF_NEIGHBOURS = 64, LONG_MESSAGE_ENTRIES = 10000 };

enum status {
    CLEAN = 0,
    BAD_PAGES = 1,
    USAGE = 2,
    NOT_CLOSED = 3,
    NO_HANDLER = 4,
    REFUSED = 7,
    GONE = 9
};

/* ---- options: one table for parsing, defaults and --help ---- */

enum memory { ANONYMOUS, MEMFD, TMPFS, HUGETLB, SHARED, SHARED_HUGETLB };
enum registration { REGISTER_MISSING, REGISTER_MINOR, REGISTER_BOTH, REGISTER_DEFAULT };
enum order { ZIPF, RANDOM, SEQUENTIAL, STRIDED, NONE };
enum verify { VERIFY_ALL, VERIFY_NONE, VERIFY_TOUCHED };
enum bad_handshake {
    GOOD,
    BAD_JSON,
    BAD_NO_FD,
    BAD_OVERLAP,
    BAD_PAST_END,
    BAD_EMPTY,
    BAD_HUGE,
    BAD_LONG,
    BAD_UNSHARED
};

/* Numbers of every kind are uint64_t, so the table can tell where each goes. */
struct options {
    const char *socket, *dir, *latency_out, *stalls_out;
    uint64_t sizes[MAX_MAPPINGS], mappings;
    uint64_t memory, registration, remove_events;
    uint64_t threads, order, stride, touches, think_us, write_share, remove_share;
    uint64_t seed, zero_every, pattern_page_size;
    uint64_t verify, wait_complete, keep_map, close_uffd, latency, gone_after, bad_handshake,
        no_pdeathsig;
};

enum kind { TEXT, NUMBER, SIZE, SIZES, PERCENT, CHOICE, FLAG, HELP };

struct spec {
    const char *name;
    enum kind kind;
    size_t at;         /* offset in struct options */
    const char *value; /* as --help names it; of a CHOICE, all of them */
    const char *help;
};

#define AT(field) offsetof(struct options, field)

static const struct spec specs[] = {
    {"socket", TEXT, AT(socket), "PATH",
     "the handler's unix socket; waits up to 5 s for it to appear"},
    {"size", SIZES, AT(sizes), "BYTES[,BYTES...]",
     "one mapping each, apart in the address space; suffixes K M G"},
    {"memory", CHOICE, AT(memory), "anonymous|memfd|tmpfs|hugetlb|shared|shared-hugetlb",
     "hugetlb: a memfd of 2 MiB pages; shared: a private mapping of the handler's cache, of pages "
     "of 4 KiB\n        or 2 MiB (anonymous)"},
    {"dir", TEXT, AT(dir), "DIR", "where tmpfs memory has its file, unlinked at once (/dev/shm)"},
    {"register", CHOICE, AT(registration), "missing|minor|both|default",
     "default: missing if anonymous, else both, or missing if the kernel refuses"},
    {"remove-events", FLAG, AT(remove_events), "", "ask for REMOVE events"},
    {"threads", NUMBER, AT(threads), "N", "how many touch at once (2)"},
    {"order", CHOICE, AT(order), "zipf|random|sequential|strided|none",
     "zipf: three of four touches in a tenth of the pages; random: a new permutation each round "
     "(zipf)"},
    {"stride", NUMBER, AT(stride), "PAGES", "of --order strided (16)"},
    {"touches", NUMBER, AT(touches), "N",
     "of all threads together (0: as many as there are pages)"},
    {"think-us", NUMBER, AT(think_us), "N", "busy time between two touches (0)"},
    {"write-share", PERCENT, AT(write_share), "PERCENT",
     "of the touches add one to the page's first word (0)"},
    {"remove-share", PERCENT, AT(remove_share), "PERCENT",
     "of the memory is given back (MADV_DONTNEED, MADV_REMOVE) while the threads touch it,\n"
     "        and must be zero from then on; implies --remove-events (0)"},
    {"seed", NUMBER, AT(seed), "S", "of the pattern and of the order (0)"},
    {"zero-every", NUMBER, AT(zero_every), "N", "one page in N of the pattern is zero (0: none)"},
    {"pattern-page-size", SIZE, AT(pattern_page_size), "BYTES",
     "page size of the pattern's numbering (4096)"},
    {"verify", CHOICE, AT(verify), "all|none|touched",
     "which pages are checked byte by byte at the end (all)"},
    {"wait-complete", FLAG, AT(wait_complete), "",
     "verify only once the handler has closed the socket"},
    {"keep-map", FLAG, AT(keep_map), "",
     "have the handler keep its map of pages here, so that another can take over"},
    {"close-uffd", FLAG, AT(close_uffd), "",
     "keep no userfaultfd here: if the handler's is closed, missing pages read as zeros"},
    {"latency-out", TEXT, AT(latency_out), "FILE",
     "native uint64 ns of each touch that took more than 2 us"},
    {"stalls-out", TEXT, AT(stalls_out), "FILE",
     "write of each touch that took over 20 ms its end (CLOCK_MONOTONIC) and how long it took, two "
     "64-bit numbers of ns"},
    {"gone-after", NUMBER, AT(gone_after), "MS",
     "_exit(9) that long after the handshake (0: never)"},
    {"bad-handshake", CHOICE, AT(bad_handshake),
     "no|json|nofd|overlap|past-end|empty|huge|long|unshared",
     "send that instead: half of the JSON; no descriptor; one region twice; an offset that wraps; "
     "no\n"
     "        region; a region of 2^60 bytes; a message of 1 MB; after a request for the handler's "
     "cache,\n        other memory (no)"},
    {"no-pdeathsig", FLAG, AT(no_pdeathsig), "",
     "live on when the process that started this one dies"},
    {"help", HELP, 0, "", "print this"},
};
enum { SPECS = sizeof specs / sizeof specs[0] };

static const char synopsis[] =
    "usage: python -m pagenet.testing.workload --socket PATH --size BYTES [options]\n\n"
    "An owner for tests: maps memory, hands its userfaultfd over the unix socket with "
    "Firecracker's handshake, touches\n"
    "pages from threads, and checks every byte against the pattern. Prints JSON lines; the last "
    "one is \"verified\".\n\n";
static const char statuses[] =
    "\nA poisoned page is counted, not bad. With --remove-share the handler has to read events "
    "until the owner ends, or to\n"
    "unregister the memory before it leaves. Of a bad handshake the handler must close the socket "
    "within 5 s.\n\n"
    "exit status: 0 all bytes right (bad handshake: refused), 1 bad pages, 2 usage, 3 a bad "
    "handshake was not refused,\n"
    "4 no handler or no handshake, 7 userfaultfd or the memory is not to be had, 9 --gone-after\n";

static void print_help(void) {
    fputs(synopsis, stdout);
    for (const struct spec *spec = specs; spec < specs + SPECS; spec++)
        printf("  --%s %s\n        %s\n", spec->name, spec->value, spec->help);
    fputs(statuses, stdout);
    fflush(stdout);
}

/* A number, with one of K, M, G after it if suffixes are allowed. *end: the first character behind
 * it. */
static int parse_number(const char *text, bool suffixes, uint64_t *number, const char **end) {
    errno = 0;
    char *after;
    uint64_t value = strtoull(text, &after, 0);
    if (*text < '0' || *text > '9' || errno)
        return -EINVAL;
    static const char units[] = "KMG";
    const char *unit = suffixes && *after ? strchr(units, *after) : NULL;
    int shift = unit ? 10 * (int)(unit - units + 1) : 0;
    if (value << shift >> shift != value)
        return -ERANGE;
    *number = value << shift;
    *end = after + (unit != NULL);
    return 0;
}

static int parse_whole(const char *text, bool suffixes, uint64_t most, uint64_t *number) {
    const char *end;
    int error = parse_number(text, suffixes, number, &end);
    return error || *end || *number > most ? -EINVAL : 0;
}

static int parse_sizes(const char *text, struct options *options) {
    for (options->mappings = 0; options->mappings < MAX_MAPPINGS; text++) {
        if (parse_number(text, true, &options->sizes[options->mappings++], &text))
            return -EINVAL;
        if (*text != ',')
            return *text ? -EINVAL : 0;
    }
    return -E2BIG;
}

static int parse_choice(const char *text, const char *choices, uint64_t *choice) {
    size_t length = strlen(text);
    for (*choice = 0; choices; ++*choice) { /* "a|b|c" */
        if (length && !strncmp(choices, text, length) &&
            (choices[length] == '|' || !choices[length]))
            return 0;
        choices = strchr(choices, '|');
        choices += choices != NULL;
    }
    return -EINVAL;
}

static int parse_option(const struct spec *spec, const char *text, struct options *options) {
    void *field = (char *)options + spec->at;
    switch (spec->kind) {
    case TEXT:
        *(const char **)field = text;
        return 0;
    case SIZES:
        return parse_sizes(text, options);
    case CHOICE:
        return parse_choice(text, spec->value, field);
    case FLAG:
        *(uint64_t *)field = 1;
        return 0;
    default:
        return parse_whole(text, spec->kind == SIZE, spec->kind == PERCENT ? 100 : UINT64_MAX,
                           field);
    }
}

static uint64_t memory_page_size(const struct options *options) {
    return options->memory == HUGETLB || options->memory == SHARED_HUGETLB
               ? HUGE_PAGE
               : (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t unit_size(const struct options *options) {
    uint64_t page = memory_page_size(options), pattern = options->pattern_page_size;
    return page > pattern ? page : pattern;
}

static const char *size_complaint(const struct options *options) {
    uint64_t total = 0, pattern = options->pattern_page_size;
    if (pattern < 16 || pattern > 1 << 30 || pattern & (pattern - 1))
        return "--pattern-page-size: not a power of two from 16 to 1G";
    for (uint64_t i = 0; i < options->mappings; i++) {
        total += options->sizes[i];
        if (!options->sizes[i] || options->sizes[i] % unit_size(options))
            return "--size: not in whole pages";
        if (options->sizes[i] >> 46 || total >> 46)
            return "--size: more than an address space";
    }
    return NULL;
}

static const char *complaint(const struct options *options) {
    if (!options->socket || !options->mappings)
        return "--socket and --size are needed";
    if (options->memory == ANONYMOUS &&
        (options->registration == REGISTER_MINOR || options->registration == REGISTER_BOTH))
        return "--register: anonymous memory has no minor faults";
    if (!options->threads || options->threads > MAX_THREADS)
        return "--threads: from 1 to 4096";
    if (!options->stride)
        return "--stride: at least 1";
    return size_complaint(options);
}

static int usage(const char *what, const char *why) {
    fprintf(stderr, "workload: %s%s (--help explains)\n", what, why);
    return USAGE;
}

/* -1: go on. Otherwise the exit status. */
static int parse_options(int argc, char **argv, struct options *options) {
    struct option table[SPECS + 1] = {{0}};
    for (int i = 0; i < SPECS; i++)
        table[i] = (struct option){
            specs[i].name, specs[i].kind == FLAG || specs[i].kind == HELP ? 0 : 1, NULL, 'o'};
    optind = 0; /* glibc: start again, for a process that runs this twice */
    int index = 0, found;
    while ((found = getopt_long(argc, argv, "", table, &index)) == 'o') {
        if (specs[index].kind == HELP)
            return print_help(), CLEAN;
        if (parse_option(&specs[index], optarg, options))
            return usage("cannot make sense of the value of --", specs[index].name);
    }
    if (found != -1)
        return usage("no such option, or it lacks its value", ""); /* getopt has named it */
    if (optind < argc)
        return usage("cannot make sense of ", argv[optind]);
    const char *why = complaint(options);
    options->remove_events |= options->remove_share != 0;
    return why ? usage(why, "") : -1;
}

/* ---- the owner ---- */

struct mapping {
    char *base;
    uint64_t size;
    uint64_t offset;
};

enum mark { TOUCHED = 1, BAD = 2, POISONED = 4 }; /* of a page */
enum hole { INTACT, REMOVING, REMOVED };          /* of a unit */

struct owner {
    struct options options;
    struct mapping mappings[MAX_MAPPINGS];
    void *reserved;
    uint64_t reserved_bytes, total, pages, units, touches;
    int uffd, memory_fd, map_fd, socket, parent_fd;
    bool watched;
    pthread_t watcher;
    FILE *latencies, *stalls;
    _Atomic uint32_t *writes; /* of a page: announced before they are made */
    _Atomic uint8_t *marks;   /* of a page */
    _Atomic uint8_t *holes;   /* of a unit: written by the main thread alone */
    _Atomic uint64_t ticket;  /* the next touch */
    pthread_mutex_t gate;     /* held until all threads are there */
    sem_t finished;           /* posted by each thread */
    uint64_t started, next_progress;
    uint64_t next_unit, removed_units; /* the main thread's way through the units */
    double touch_seconds, verify_seconds;
};

struct toucher {
    struct owner *owner;
    pthread_t thread;
    _Atomic uint64_t touches;
    uint64_t slow;
    uint64_t latency[BUCKETS];
};

static int complain(int status, const char *what, int error) {
    fprintf(stderr, "workload: %s: %s\n", what, strerror(-error));
    return status;
}

/* One JSON line. Flushed, because the process that started this one acts on it. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    putchar('\n');
    fflush(stdout);
}

/* ---- connecting ---- */

static int connect_patiently(const char *path) {
    uint64_t until = now() + (uint64_t)CONNECT_MS * MS;
    int fd = connect_to(path);
    while ((fd == -ENOENT || fd == -ECONNREFUSED) && now() < until) {
        poll(NULL, 0, 10);
        fd = connect_to(path);
    }
    return fd;
}

/* The file of the handler's cache, or -errno. */
static int ask_for_file(struct owner *owner) {
    int fd = connect_patiently(owner->options.socket);
    if (fd < 0)
        return fd;
    owner->socket = fd;
    return want_file(fd);
}

/* ---- memory ---- */

static int open_tmpfs(const char *dir) {
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/pagenet-workload-XXXXXX", dir) >= sizeof path)
        return -ENAMETOOLONG;
    int fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    unlink(path);
    return fd;
}

static bool is_shared(const struct options *options) {
    return options->memory == SHARED || options->memory == SHARED_HUGETLB;
}

static int open_memory(const struct options *options) {
    if (options->memory == TMPFS)
        return open_tmpfs(options->dir);
    unsigned huge = options->memory == HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
    int fd = memfd_create("pagenet-workload", MFD_CLOEXEC | huge);
    return fd < 0 ? -errno : fd;
}

static int back_memory(struct owner *owner) {
    if (owner->options.keep_map &&
        (owner->map_fd = memfd_create(PN_MAP_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING)) < 0)
        return -errno;
    if (owner->options.bad_handshake == BAD_UNSHARED) {
        int unused = ask_for_file(owner);
        return unused < 0 ? unused : close(unused);
    }
    if (owner->options.memory == ANONYMOUS)
        return 0;
    int fd = is_shared(&owner->options) ? ask_for_file(owner) : open_memory(&owner->options);
    if (fd < 0)
        return fd;
    owner->memory_fd = fd;
    if (is_shared(&owner->options))
        return 0;
    return ftruncate(fd, (off_t)owner->total) ? -errno : 0;
}

static int map_one(struct owner *owner, struct mapping *mapping) {
    int kind = is_shared(&owner->options) ? MAP_PRIVATE | MAP_NORESERVE
               : owner->memory_fd < 0     ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
                                          : MAP_SHARED;
    void *at = mmap(mapping->base, mapping->size, PROT_READ | PROT_WRITE, kind | MAP_FIXED,
                    owner->memory_fd, owner->memory_fd < 0 ? 0 : (off_t)mapping->offset);
    return at == MAP_FAILED ? -errno : 0;
}

/* Reserves inaccessible address space for all mappings and for a gap around each: a touch or a
 * placement past an end hits nothing. */
static int reserve(struct owner *owner) {
    owner->reserved_bytes = owner->total + (2 * owner->options.mappings + 2) * GAP;
    void *at = mmap(NULL, owner->reserved_bytes, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return -errno;
    owner->reserved = at;
    return 0;
}

/* From the top of the address space down, so that addresses and offsets are not in the same
 * order. */
static int map_all(struct owner *owner) {
    uintptr_t top = (uintptr_t)owner->reserved + owner->reserved_bytes;
    for (uint64_t i = 0; i < owner->options.mappings; i++) {
        struct mapping *mapping = &owner->mappings[i];
        top = (top - GAP - mapping->size) & ~(uintptr_t)(HUGE_PAGE - 1);
        mapping->base = (char *)top;
        int error = map_one(owner, mapping);
        if (error)
            return error;
    }
    return 0;
}

static void lay_out(struct owner *owner) {
    const struct options *options = &owner->options;
    for (uint64_t i = 0; i < options->mappings; i++) {
        owner->mappings[i] = (struct mapping){.size = options->sizes[i], .offset = owner->total};
        owner->total += options->sizes[i];
    }
    owner->pages = owner->total / options->pattern_page_size;
    owner->units = owner->total / unit_size(options);
    owner->touches = options->order == NONE ? 0
                     : options->touches     ? options->touches
                                            : owner->pages;
}

static int keep_books(struct owner *owner) {
    owner->writes = calloc(owner->pages, sizeof *owner->writes);
    owner->marks = calloc(owner->pages, sizeof *owner->marks);
    owner->holes = calloc(owner->units, sizeof *owner->holes);
    return owner->writes && owner->marks && owner->holes ? 0 : -ENOMEM;
}

static int map_memory(struct owner *owner) {
    lay_out(owner);
    int error = keep_books(owner);
    if (!error)
        error = back_memory(owner);
    if (!error)
        error = reserve(owner);
    return error ? error : map_all(owner);
}

/* The mapping that an offset falls into, by binary search. */
static const struct mapping *mapping_of(const struct owner *owner, uint64_t offset) {
    uint64_t low = 0, high = owner->options.mappings;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        if (owner->mappings[middle].offset <= offset)
            low = middle;
        else
            high = middle;
    }
    return &owner->mappings[low];
}

static char *address_of(const struct owner *owner, uint64_t offset) {
    const struct mapping *mapping = mapping_of(owner, offset);
    return mapping->base + (offset - mapping->offset);
}

static uint64_t *page_address(const struct owner *owner, uint64_t page) {
    return (uint64_t *)(void *)address_of(owner, page * owner->options.pattern_page_size);
}

/* ---- userfaultfd ---- */

/* An ordinary user gets a uffd only for faults taken in user mode, which is enough for the touches
 * below. */
static int open_uffd(struct owner *owner) {
    int uffd = pn_uffd_open("/dev/userfaultfd", 0);
    if (uffd == -EPERM)
        uffd = pn_uffd_open("/dev/userfaultfd", 1);
    if (uffd < 0)
        return uffd;
    owner->uffd = uffd;
    uint64_t features;
    return pn_uffd_api(uffd, owner->options.remove_events ? UFFD_FEATURE_EVENT_REMOVE : 0,
                       &features);
}

static int register_all(struct owner *owner, uint64_t mode) {
    uint64_t ioctls;
    int error = 0;
    for (uint64_t i = 0; i < owner->options.mappings && !error; i++)
        error = pn_uffd_register(owner->uffd, (uintptr_t)owner->mappings[i].base,
                                 owner->mappings[i].size, mode, &ioctls);
    return error;
}

/* Registering a range again with another mode replaces the first mode, so half-done attempts need
 * not be undone. */
static int register_memory(struct owner *owner) {
    static const uint64_t modes[] = {
        [REGISTER_MISSING] = UFFDIO_REGISTER_MODE_MISSING,
        [REGISTER_MINOR] = UFFDIO_REGISTER_MODE_MINOR,
        [REGISTER_BOTH] = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    };
    uint64_t *wanted = &owner->options.registration, asked = *wanted;
    if (asked == REGISTER_DEFAULT)
        *wanted = owner->options.memory == ANONYMOUS ? REGISTER_MISSING : REGISTER_BOTH;
    int error = register_all(owner, modes[*wanted]);
    if (error == -EINVAL && asked == REGISTER_DEFAULT && *wanted == REGISTER_BOTH) {
        *wanted = REGISTER_MISSING;
        error = register_all(owner, modes[REGISTER_MISSING]);
    }
    return error;
}

/* ---- the handshake ---- */

struct entry {
    uint64_t base, size, offset;
};

static uint64_t list_regions(const struct owner *owner, struct entry *entries) {
    for (uint64_t i = 0; i < owner->options.mappings; i++) {
        const struct mapping *mapping = &owner->mappings[i];
        entries[i] = (struct entry){(uintptr_t)mapping->base, mapping->size, mapping->offset};
    }
    return owner->options.mappings;
}

/* Room for one entry more than there are mappings. */
static uint64_t spoil(struct entry *entries, uint64_t count, uint64_t how, uint64_t page_size) {
    if (how == BAD_OVERLAP)
        entries[count++] = entries[0];
    if (how == BAD_PAST_END)
        /* offset + size wraps around to less than any source has */
        entries[count - 1].offset = -page_size;
    if (how == BAD_HUGE)
        entries[0].size = (uint64_t)1 << 60;
    return how == BAD_EMPTY ? 0 : count;
}

static void print_regions(FILE *out, const struct entry *entries, uint64_t count, uint64_t repeat,
                          uint64_t page_size) {
    fputc('[', out);
    for (uint64_t i = 0; i < count * repeat; i++)
        fprintf(out,
                "%s{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64
                ",\"page_size\":%" PRIu64 ",\"page_size_kib\":%" PRIu64 "}",
                i ? "," : "", entries[i % count].base, entries[i % count].size,
                entries[i % count].offset, page_size,
                page_size); /* despite its name, Firecracker has always put bytes there */
    fputc(']', out);
}

/* The JSON of the handshake, allocated. */
static char *write_regions(const struct owner *owner) {
    struct entry entries[MAX_MAPPINGS + 1];
    uint64_t page_size = memory_page_size(&owner->options), how = owner->options.bad_handshake;
    uint64_t count = spoil(entries, list_regions(owner, entries), how, page_size);
    char *text = NULL;
    size_t length;
    FILE *out = open_memstream(&text, &length);
    if (!out)
        return NULL;
    print_regions(out, entries, count, how == BAD_LONG ? LONG_MESSAGE_ENTRIES : 1, page_size);
    fclose(out);
    if (text && how == BAD_JSON)
        text[length / 2] = '\0';
    return text;
}

static int send_handshake(const struct owner *owner, const char *text) {
    int fds[3] = {owner->uffd};
    size_t count = 1;
    if (owner->memory_fd >= 0 && !is_shared(&owner->options))
        fds[count++] = owner->memory_fd;
    if (owner->map_fd >= 0)
        fds[count++] = owner->map_fd;
    return send_with(owner->socket, text, fds,
                     owner->options.bad_handshake == BAD_NO_FD ? 0 : count);
}

static void close_if_open(int fd) {
    if (fd >= 0)
        close(fd);
}

/* The descriptors sent are duplicates: unless told otherwise, this process keeps its uffd until the
 * end. So if the handler is lost, the threads below stall; if its copy were the last, the kernel
 * would unregister the memory and feed them zeros. */
static int shake_hands(struct owner *owner) {
    int fd = owner->socket < 0 ? connect_patiently(owner->options.socket) : owner->socket;
    if (fd < 0)
        return fd;
    owner->socket = fd;
    struct timeval patience = {.tv_sec = CLOSE_MS /
                                         1000}; /* with a handler that neither reads nor closes */
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    char *text = write_regions(owner);
    int error = text ? send_handshake(owner, text) : -ENOMEM;
    free(text);
    if (owner->options.close_uffd) {
        close_if_open(owner->uffd);
        owner->uffd = -1;
    }
    return error;
}

/* 0 once the handler has closed the socket, -ETIMEDOUT if it has not by then. What the handler
 * sends before is discarded. */
static int wait_closed(int socket, int timeout_ms) {
    uint64_t until = now() + (uint64_t)timeout_ms * MS;
    for (;;) {
        char unheeded[256];
        int left = timeout_ms < 0 ? -1 : now() >= until ? 0 : (int)((until - now()) / MS) + 1;
        struct pollfd wanted = {.fd = socket, .events = POLLIN};
        if (poll(&wanted, 1, left) == 0)
            return -ETIMEDOUT;
        ssize_t got = recv(socket, unheeded, sizeof unheeded, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
            return 0;
    }
}

static int expect_refusal(struct owner *owner, int sent) {
    if (sent == -EPIPE || sent == -ECONNRESET)
        return CLEAN; /* refused before it had read all */
    return wait_closed(owner->socket, CLOSE_MS) ? NOT_CLOSED : CLEAN;
}

/* ---- ending early: the parent's death, --gone-after ---- */

/* Not PR_SET_PDEATHSIG, if it can be avoided: the "parent" it watches is the thread that started
 * us, and launchers (Trio among them) start processes from worker threads that end long before the
 * launchers do. A pidfd stands for the whole process. */
static int watch_parent(struct owner *owner) {
    pid_t parent = getppid();
    owner->parent_fd = (int)syscall(SYS_pidfd_open, parent, 0);
    if (owner->parent_fd < 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    return getppid() == parent ? 0 : -ESRCH; /* it died before it was watched */
}

static void *watch(void *argument) {
    const struct owner *owner = argument;
    struct pollfd parent = {.fd = owner->parent_fd,
                            .events = POLLIN}; /* poll() passes over a negative fd */
    uint64_t gone_after = owner->options.gone_after;
    int timeout = !gone_after ? -1 : gone_after < INT_MAX ? (int)gone_after : INT_MAX;
    int ready;
    while ((ready = poll(&parent, 1, timeout)) < 0)
        ;
    if (!ready)
        _exit(GONE);
    kill(getpid(), SIGKILL);
    return NULL;
}

static int start_watching(struct owner *owner) {
    int error = owner->options.no_pdeathsig ? 0 : watch_parent(owner);
    if (error || (owner->parent_fd < 0 && !owner->options.gone_after))
        return error;
    error = -pthread_create(&owner->watcher, NULL, watch, owner);
    owner->watched = !error;
    return error;
}

static void stop_watching(struct owner *owner) {
    if (!owner->watched)
        return;
    pthread_cancel(owner->watcher);
    pthread_join(owner->watcher, NULL);
}

/* ---- surviving poisoned pages ---- */

/* The one global, because a signal handler has no argument: where the thread that is about to touch
 * a page continues if the touch is answered by SIGBUS. Thread-local, because the signal comes to
 * the very thread that touched. */
static _Thread_local sigjmp_buf *volatile landing;

static void on_sigbus(int signal_number) {
    if (landing)
        siglongjmp(*landing, 1);
    signal(signal_number, SIG_DFL); /* not from a touch: the access is tried again, and kills */
}

/* sigsetjmp() does not save the signal mask, which would cost a system call for each touch: so the
 * mask is set right after a jump. */
static void land(void) {
    sigset_t bus;
    landing = NULL;
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
}

/* False if the page is poisoned. The fences keep the compiler from moving the access out of the
 * guarded stretch. */
static bool survives(void (*access)(void *), void *argument) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        land();
        return false;
    }
    landing = &here;
    atomic_signal_fence(memory_order_seq_cst);
    access(argument);
    atomic_signal_fence(memory_order_seq_cst);
    landing = NULL;
    return true;
}

struct dispositions {
    struct sigaction bus, interrupt;
};

/* SIGINT ends the process at once, as SIGTERM does: Python's handler would only note it until the
 * last page is there. */
static void set_signals(struct dispositions *before) {
    struct sigaction bus = {.sa_handler = on_sigbus}, interrupt = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, &bus, &before->bus);
    sigaction(SIGINT, &interrupt, &before->interrupt);
}

static void restore_signals(const struct dispositions *before) {
    sigaction(SIGBUS, &before->bus, NULL);
    sigaction(SIGINT, &before->interrupt, NULL);
}

/* ---- the order of touches ---- */

enum stream { ORDER, PICKS, HOLES }; /* independent random numbers from one seed */

/* Uses the pattern's own hash. */
static uint64_t hash(const struct owner *owner, enum stream stream, uint64_t value) {
    return pn_pattern_word(value, 0, ~owner->options.seed - stream, 0);
}

static uint64_t feistel(uint64_t value, unsigned half, uint64_t key) {
    uint64_t mask = ((uint64_t)1 << half) - 1, left = value >> half, right = value & mask;
    for (uint64_t round = 0; round < 4; round++) {
        uint64_t next = left ^ (pn_pattern_word(right, 0, key + round, 0) & mask);
        left = right;
        right = next;
    }
    return left << half | right;
}

/* A permutation of [0, count): a Feistel network permutes the next power of four, walked until it
 * comes back inside. */
static uint64_t permute(uint64_t value, uint64_t count, uint64_t key) {
    unsigned half = 1;
    while (count > (uint64_t)1 << (2 * half))
        half++;
    do
        value = feistel(value, half, key);
    while (value >= count);
    return value;
}

/* Column after column: the first pages % stride of them are one page longer. */
static uint64_t strided(uint64_t touch, uint64_t pages, uint64_t stride) {
    uint64_t rows = pages / stride, longer = pages % stride, in_longer = longer * (rows + 1);
    if (touch < in_longer)
        return touch % (rows + 1) * stride + touch / (rows + 1);
    touch -= in_longer;
    return touch % rows * stride + longer + touch / rows;
}

/* Like Zipf's law and much cheaper: rank = pages * u^8 puts the share x^(1/8) of the touches into
 * the share x of the pages (a tenth gets 75 %, a hundredth 56 %). Ranks keep company with their 63
 * neighbours, as hot memory does, and the neighbourhoods are scattered. */
static uint64_t zipf(const struct owner *owner, uint64_t touch) {
    double u = (double)(hash(owner, ORDER, touch) >> 11) * 0x1p-53;
    u *= u, u *= u, u *= u;
    uint64_t rank = (uint64_t)(u * (double)owner->pages),
             neighbourhoods = owner->pages / ZIPF_NEIGHBOURS;
    if (rank / ZIPF_NEIGHBOURS >= neighbourhoods)
        return rank;
    return permute(rank / ZIPF_NEIGHBOURS, neighbourhoods, owner->options.seed) * ZIPF_NEIGHBOURS +
           rank % ZIPF_NEIGHBOURS;
}

static uint64_t page_of(const struct owner *owner, uint64_t touch) {
    uint64_t place = touch % owner->pages, round = touch / owner->pages;
    switch (owner->options.order) {
    case ZIPF:
        return zipf(owner, touch);
    case RANDOM:
        return permute(place, owner->pages, hash(owner, ORDER, round));
    case STRIDED:
        return strided(place, owner->pages, owner->options.stride);
    default:
        return place;
    }
}

/* ---- touching ---- */

static uint64_t unit_of(const struct owner *owner, uint64_t page) {
    return page * owner->options.pattern_page_size / unit_size(&owner->options);
}

static bool is_removable(const struct owner *owner, uint64_t unit) {
    return hash(owner, HOLES, unit) % 100 < owner->options.remove_share;
}

static int hole_state(const struct owner *owner, uint64_t page) {
    return atomic_load(&owner->holes[unit_of(owner, page)]);
}

struct word {
    _Atomic uint64_t *at;
    uint64_t value;
};

/* Not through ThreadSanitizer's atomics: they keep a lock meanwhile, and a jump away from a
 * poisoned page would never release it. */
#define PN_BARE __attribute__((no_sanitize("thread")))

PN_BARE static void read_word(void *argument) {
    struct word *word = argument;
    word->value = atomic_load_explicit(word->at, memory_order_relaxed);
}

PN_BARE static void increment_word(void *argument) {
    struct word *word = argument;
    word->value = atomic_fetch_add(word->at, 1);
}

struct touch {
    uint64_t page;
    uint64_t pick; /* random */
    int mark;      /* what was found */
    uint64_t took;
};

static bool timed(struct touch *touch, void (*access)(void *), struct word *word) {
    uint64_t began = now();
    bool survived = survives(access, word);
    touch->took = now() - began;
    return survived;
}

/* A page that is yet to be removed is only read: what was written before would be lost at an
 * unknown moment. */
static bool is_write(const struct owner *owner, const struct touch *touch, int hole) {
    return touch->pick % 100 < owner->options.write_share &&
           (hole == REMOVED || !is_removable(owner, unit_of(owner, touch->page)));
}

/* Reads any word but the first, which changes. The word is right if it is the pattern, unless the
 * page was removed before, or if it is zero and the page's removal had begun by the time it was
 * read. */
static void touch_reading(const struct owner *owner, struct touch *touch, int before) {
    const struct options *options = &owner->options;
    uint64_t place = 1 + (touch->pick >> 32) % (options->pattern_page_size / 8 - 1);
    struct word word = {.at = (_Atomic uint64_t *)page_address(owner, touch->page) + place};
    if (!timed(touch, read_word, &word)) {
        touch->mark = POISONED;
        return;
    }
    uint64_t pattern = pn_pattern_word_at(touch->page, place, options->seed, options->zero_every);
    bool right = (word.value == pattern && before != REMOVED) ||
                 (word.value == 0 && hole_state(owner, touch->page) != INTACT);
    touch->mark = right ? 0 : BAD;
}

static uint64_t first_word(const struct owner *owner, uint64_t page, int hole) {
    const struct options *options = &owner->options;
    return hole == REMOVED ? 0
                           : pn_pattern_word(page, options->pattern_page_size, options->seed,
                                             options->zero_every);
}

/* The increment is the first access: a write fault. Writes are announced before they are made, and
 * each other thread may be about to make one. So the page has seen at most all announced writes but
 * this one, and at least as many less the number of threads. */
static void touch_writing(struct owner *owner, struct touch *touch, int hole) {
    struct word word = {.at = (_Atomic uint64_t *)page_address(owner, touch->page)};
    uint64_t before = atomic_fetch_add(&owner->writes[touch->page], 1);
    if (!timed(touch, increment_word, &word)) {
        atomic_fetch_sub(&owner->writes[touch->page], 1);
        touch->mark = POISONED;
        return;
    }
    uint64_t seen = word.value - first_word(owner, touch->page, hole);
    bool right =
        seen < atomic_load(&owner->writes[touch->page]) && seen + owner->options.threads > before;
    touch->mark = right ? 0 : BAD;
}

/* Bucket of v: v below 16, else 8 * (log2(v) - 2) + the 3 bits after the first. */
static unsigned bucket_of(uint64_t value) {
    if (value < 16)
        return (unsigned)value;
    unsigned octave = 63 - (unsigned)__builtin_clzll(value);
    unsigned bucket = 8 * (octave - 2) + ((value >> (octave - 3)) & 7);
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

static void record(struct toucher *toucher, uint64_t took) {
    toucher->slow += took > SLOW_NS;
    toucher->latency[bucket_of(took)]++;
    atomic_fetch_add_explicit(&toucher->touches, 1, memory_order_relaxed);
    if (took > RECORDED_NS && toucher->owner->latencies)
        fwrite(&took, sizeof took, 1, toucher->owner->latencies);
    if (took > STALL_NS && toucher->owner->stalls)
        fwrite((uint64_t[]){now(), took}, 2 * sizeof took, 1, toucher->owner->stalls);
}

static void think(uint64_t microseconds) {
    uint64_t until = now() + 1000 * microseconds;
    while (now() < until)
        ;
}

static void touch_page(struct toucher *toucher, struct touch touch) {
    struct owner *owner = toucher->owner;
    int hole = hole_state(owner, touch.page);
    if (is_write(owner, &touch, hole))
        touch_writing(owner, &touch, hole);
    else
        touch_reading(owner, &touch, hole);
    record(toucher, touch.took);
    atomic_fetch_or(&owner->marks[touch.page], (uint8_t)(TOUCHED | touch.mark));
}

static void *touch_pages(void *argument) {
    struct toucher *toucher = argument;
    struct owner *owner = toucher->owner;
    pthread_mutex_lock(&owner->gate);
    pthread_mutex_unlock(&owner->gate);
    uint64_t next;
    while ((next = atomic_fetch_add(&owner->ticket, 1)) < owner->touches) {
        touch_page(toucher,
                   (struct touch){.page = page_of(owner, next), .pick = hash(owner, PICKS, next)});
        if (owner->options.think_us)
            think(owner->options.think_us);
    }
    sem_post(&owner->finished);
    return NULL;
}

/* ---- removing: what a balloon does ---- */

/* Neighbours that are to be removed are removed together, up to the limit and within their
 * mapping. */
static uint64_t hole_end(const struct owner *owner, uint64_t first, uint64_t limit) {
    uint64_t unit = unit_size(&owner->options);
    const struct mapping *mapping = mapping_of(owner, first * unit);
    uint64_t last = (mapping->offset + mapping->size) / unit, end = first;
    while (end < limit && end < last && is_removable(owner, end))
        end++;
    return end;
}

static void set_holes(struct owner *owner, uint64_t first, uint64_t end, int state) {
    for (uint64_t unit = first; unit < end; unit++)
        atomic_store(&owner->holes[unit], (uint8_t)state);
}

/* madvise() returns when the handler has read the event, and from then on the pages must read as
 * zero. */
static int remove_units(struct owner *owner, uint64_t first, uint64_t end) {
    uint64_t unit = unit_size(&owner->options);
    bool is_private = owner->options.memory == ANONYMOUS || is_shared(&owner->options);
    int advice = is_private ? MADV_DONTNEED : MADV_REMOVE;
    set_holes(owner, first, end, REMOVING);
    if (madvise(address_of(owner, first * unit), (end - first) * unit, advice))
        return -errno;
    set_holes(owner, first, end, REMOVED);
    owner->removed_units += end - first;
    return 0;
}

static int remove_up_to(struct owner *owner, uint64_t limit) {
    while (owner->next_unit < limit) {
        uint64_t first = owner->next_unit, end = hole_end(owner, first, limit);
        int error = end > first ? remove_units(owner, first, end) : 0;
        if (error)
            return error;
        owner->next_unit = end > first ? end : first + 1;
    }
    return 0;
}

/* ---- the main thread while the others touch ---- */

static uint64_t count_touches(const struct owner *owner, const struct toucher *touchers) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < owner->options.threads; i++)
        sum += atomic_load_explicit(&touchers[i].touches, memory_order_relaxed);
    return sum;
}

static void tell_progress(struct owner *owner, uint64_t touches) {
    if (now() < owner->next_progress)
        return;
    owner->next_progress += (uint64_t)PROGRESS_MS * MS;
    say("{\"event\":\"progress\",\"touched\":%" PRIu64 "}", touches);
}

/* Removes units at the rate at which the threads go through their touches. */
static int attend(struct owner *owner, const struct toucher *touchers) {
    uint64_t touches = count_touches(owner, touchers);
    tell_progress(owner, touches);
    if (!owner->options.remove_share || !owner->touches)
        return 0;
    return remove_up_to(
        owner, (uint64_t)((double)owner->units * ((double)touches / (double)owner->touches)));
}

static struct timespec tick_from_now(void) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at); /* the clock of sem_timedwait() */
    at.tv_nsec += TICK_MS * MS;
    at.tv_sec += at.tv_nsec / 1000000000;
    at.tv_nsec %= 1000000000;
    return at;
}

/* Returns when `running` threads have finished, with the first error of attending. */
static int attend_all(struct owner *owner, const struct toucher *touchers, uint64_t running) {
    int error = 0;
    while (running) {
        struct timespec until = tick_from_now();
        if (!sem_timedwait(&owner->finished, &until))
            running--;
        else if (!error)
            error = attend(owner, touchers);
    }
    return error;
}

static uint64_t start_touchers(struct owner *owner, struct toucher *touchers, int *error) {
    uint64_t started = 0;
    for (; started < owner->options.threads && !*error; started += !*error) {
        touchers[started].owner = owner;
        *error = -pthread_create(&touchers[started].thread, NULL, touch_pages, &touchers[started]);
    }
    return started;
}

static int touch_all(struct owner *owner, struct toucher *touchers) {
    int error = 0;
    pthread_mutex_lock(&owner->gate);
    uint64_t running = start_touchers(owner, touchers, &error);
    if (error)
        /* nothing left to touch for those that did start */
        atomic_store(&owner->ticket, owner->touches);
    say("{\"event\":\"touching\"}");
    owner->started = now();
    owner->next_progress = owner->started + (uint64_t)PROGRESS_MS * MS;
    pthread_mutex_unlock(&owner->gate);
    int attended = attend_all(owner, touchers, running);
    owner->touch_seconds = (double)(now() - owner->started) / 1e9;
    for (uint64_t i = 0; i < running; i++)
        pthread_join(touchers[i].thread, NULL);
    error = error ? error : attended;
    return error || !owner->options.remove_share ? error : remove_up_to(owner, owner->units);
}

/* ---- verifying ---- */

struct copy {
    void *to;
    const void *from;
    uint64_t size;
};

static void copy_page(void *argument) {
    const struct copy *copy = argument;
    memcpy(copy->to, copy->from, copy->size);
}

/* Subtracts the writes from a copy of the page, and compares all of it. A removed page must be a
 * page of a pattern that has only zero pages. */
static int verify_page(const struct owner *owner, uint64_t page, uint64_t *scratch) {
    const struct options *options = &owner->options;
    struct copy copy = {scratch, page_address(owner, page), options->pattern_page_size};
    if (!survives(copy_page, &copy))
        return POISONED;
    scratch[0] -= owner->writes[page];
    uint64_t bad, zero_every = hole_state(owner, page) == REMOVED ? 1 : options->zero_every;
    return pn_pattern_check(scratch, page, 1, copy.size, options->seed, zero_every, &bad) ? BAD : 0;
}

static bool is_wanted(const struct owner *owner, uint64_t page) {
    return owner->options.verify == VERIFY_ALL ||
           (owner->options.verify == VERIFY_TOUCHED && owner->marks[page] & TOUCHED);
}

/* How many pages it looked at. */
static uint64_t verify_wanted(struct owner *owner, uint64_t *scratch) {
    uint64_t verified = 0;
    for (uint64_t page = 0; page < owner->pages; page++) {
        if (!is_wanted(owner, page))
            continue;
        atomic_fetch_or(&owner->marks[page], (uint8_t)verify_page(owner, page, scratch));
        verified++;
    }
    return verified;
}

static int verify_pages(struct owner *owner, uint64_t *verified) {
    uint64_t *scratch = aligned_alloc(64, (owner->options.pattern_page_size + 63) / 64 * 64);
    if (!scratch)
        return -ENOMEM;
    uint64_t began = now();
    *verified = verify_wanted(owner, scratch);
    owner->verify_seconds = (double)(now() - began) / 1e9;
    free(scratch);
    return 0;
}

/* ---- the report ---- */

static uint64_t count_marks(const struct owner *owner, int mark, uint64_t *first) {
    uint64_t count = 0;
    for (uint64_t page = 0; page < owner->pages; page++)
        if (owner->marks[page] & mark && !count++)
            *first = page;
    return count;
}

/* The middle of a bucket, in microseconds. */
static double bucket_us(unsigned bucket) {
    if (bucket < 16)
        return bucket / 1e3;
    unsigned octave = bucket / 8 + 2;
    uint64_t width = (uint64_t)1 << (octave - 3);
    return (double)((8 + bucket % 8) * width + width / 2) / 1e3;
}

/* The latency within which `share` of the touches in buckets from `lowest` on stay; 0 if there are
 * none. */
static double percentile(const uint64_t *latency, unsigned lowest, double share) {
    uint64_t count = 0, below = 0;
    for (unsigned bucket = lowest; bucket < BUCKETS; bucket++)
        count += latency[bucket];
    for (unsigned bucket = lowest; bucket < BUCKETS; bucket++) {
        below += latency[bucket];
        if (count && (double)below >= share * (double)count)
            return bucket_us(bucket);
    }
    return 0;
}

static void tell_percentiles(const char *name, const uint64_t *latency, unsigned lowest) {
    printf(",\"%s\":{\"p50\":%.3f,\"p99\":%.3f,\"p999\":%.3f}", name,
           percentile(latency, lowest, .5), percentile(latency, lowest, .99),
           percentile(latency, lowest, .999));
}

static uint64_t merge(const struct owner *owner, const struct toucher *touchers,
                      uint64_t *latency) {
    uint64_t slow = 0;
    for (uint64_t i = 0; i < owner->options.threads; i++) {
        slow += touchers[i].slow;
        for (unsigned bucket = 0; bucket < BUCKETS; bucket++)
            latency[bucket] += touchers[i].latency[bucket];
    }
    return slow;
}

static uint64_t report(const struct owner *owner, const struct toucher *touchers,
                       uint64_t verified) {
    uint64_t latency[BUCKETS] = {0}, first_bad = 0, unused;
    uint64_t bad = count_marks(owner, BAD, &first_bad),
             poisoned = count_marks(owner, POISONED, &unused);
    printf("{\"event\":\"verified\",\"pages\":%" PRIu64 ",\"bad\":%" PRIu64 ",\"first_bad\":",
           verified, bad);
    printf(bad ? "%" PRIu64 : "null", first_bad);
    printf(",\"touches\":%" PRIu64 ",\"slow\":%" PRIu64, count_touches(owner, touchers),
           merge(owner, touchers, latency));
    printf(",\"poisoned\":%" PRIu64 ",\"removed\":%" PRIu64, poisoned,
           owner->removed_units * (unit_size(&owner->options) / owner->options.pattern_page_size));
    printf(",\"seconds\":%.6f,\"verify_seconds\":%.6f", owner->touch_seconds,
           owner->verify_seconds);
    tell_percentiles("touch_us", latency, 0);
    tell_percentiles("slow_us", latency, bucket_of(SLOW_NS));
    say("}");
    return bad;
}

/* ---- the program ---- */

static int open_output(const char *path, FILE **file) {
    if (!path)
        return 0;
    *file = fopen(path, "wbe");
    return *file ? 0 : -errno;
}

static int prepare(struct owner *owner) {
    int error = open_output(owner->options.latency_out, &owner->latencies);
    if (error)
        return complain(USAGE, "--latency-out", error);
    if ((error = open_output(owner->options.stalls_out, &owner->stalls)))
        return complain(USAGE, "--stalls-out", error);
    if ((error = map_memory(owner)))
        return complain(REFUSED, "memory", error);
    if ((error = open_uffd(owner)))
        return complain(REFUSED, "userfaultfd", error);
    error = register_memory(owner);
    return error ? complain(REFUSED, "UFFDIO_REGISTER", error) : 0;
}

static void tell_connected(const struct owner *owner) {
    static const char *const names[] = {"missing", "minor", "both"};
    say("{\"event\":\"connected\",\"registered\":\"%s\"}", names[owner->options.registration]);
}

static int work(struct owner *owner, struct toucher *touchers) {
    uint64_t verified;
    int error = touch_all(owner, touchers);
    if (error)
        return complain(REFUSED, "touching", error);
    if (owner->options.wait_complete)
        wait_closed(owner->socket, -1);
    say("{\"event\":\"verifying\"}");
    if ((error = verify_pages(owner, &verified)))
        return complain(REFUSED, "verifying", error);
    return report(owner, touchers, verified) ? BAD_PAGES : CLEAN;
}

static int run(struct owner *owner) {
    int status = prepare(owner);
    if (status)
        return status;
    int error = shake_hands(owner);
    if (owner->options.bad_handshake && owner->socket >= 0)
        return expect_refusal(owner, error);
    if (error)
        return complain(NO_HANDLER, owner->options.socket, error);
    tell_connected(owner);
    if ((error = start_watching(owner)))
        return complain(REFUSED, "watching the parent", error);
    struct toucher *touchers = calloc(owner->options.threads, sizeof *touchers);
    status = touchers ? work(owner, touchers) : complain(REFUSED, "threads", -ENOMEM);
    free(touchers);
    return status;
}

static void close_all(struct owner *owner) {
    stop_watching(owner);
    if (owner->latencies)
        fclose(owner->latencies);
    if (owner->stalls)
        fclose(owner->stalls);
    if (owner->reserved)
        munmap(owner->reserved, owner->reserved_bytes);
    close_if_open(owner->socket);
    close_if_open(owner->uffd);
    close_if_open(owner->memory_fd);
    close_if_open(owner->map_fd);
    close_if_open(owner->parent_fd);
    free(owner->writes);
    free(owner->marks);
    free(owner->holes);
    pthread_mutex_destroy(&owner->gate);
    sem_destroy(&owner->finished);
}

int pn_workload(int argc, char **argv) {
    struct owner owner = {
        .options = {.dir = "/dev/shm",
                    .registration = REGISTER_DEFAULT,
                    .threads = 2,
                    .stride = 16,
                    .pattern_page_size = 4096},
        .uffd = -1,
        .memory_fd = -1,
        .map_fd = -1,
        .socket = -1,
        .parent_fd = -1,
    };
    struct dispositions before;
    int status = parse_options(argc, argv, &owner.options);
    if (status >= 0)
        return status;
    pthread_mutex_init(&owner.gate, NULL);
    sem_init(&owner.finished, 0, 0);
    set_signals(&before);
    status = run(&owner);
    restore_signals(&before);
    close_all(&owner);
    return status;
}
