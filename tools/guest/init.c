/* The /init of the guest that tests move: it works on its memory for ever, and knows what every
 * page of it must contain.
 *
 * Its options come from the kernel's command line; the kernel hands them on as environment
 * variables:
 * - wl_mb: MiB of pages to work on.
 * - wl_wss: MiB of them that are hot: verified and written again, at random.
 * - wl_hb: milliseconds between two heartbeats.
 * - wl_threads: how many threads share the pages; each has a part of its own.
 * - those of devices.c, which has work for the machine's devices.
 *
 * Meanwhile it sweeps through all pages, hot or not, and verifies them. It prints lines of these
 * kinds:
 * - READY pages=.. fill_ms=..
 * - HB seq=.. t=<us> w=<writes> dw=<since the last> bad=.. sweeps=.. sw=<next page to sweep>
 *   gap_us=<longest batch>
 * - BAD page=.. counter=.. expected=..
 * - FAILED ..
 *
 * With devices, a heartbeat has net=.. disk=.. screen=.. churn=.. too, and bad includes what was
 * wrong with them. The thread that prints heartbeats works as the others do: if it has to wait for
 * a page, its next heartbeat is late. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGES_PER_MIB = 256, MAX_THREADS = 64 };
enum { BATCH = 16, WRITES_PER_SWEPT = 4, BAD_LINES = 20 };

#define MAGIC UINT64_C(0x706167656e657421)
#define STEP UINT64_C(0x9e3779b97f4a7c15)

/* Works on pages first <= index < end, of which those below hot_end are hot. Other threads read
 * only writes, bad and sweeps. */
struct worker {
    uint64_t first, hot_end, end, swept, random;
    _Atomic uint64_t writes, bad, sweeps;
};

static struct page *pages;
static uint64_t *expected; /* the counter that each page must hold */
static struct worker workers[MAX_THREADS];
static unsigned threads;

void say(const char *format, ...) {
    char line[320];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    /* In one write, so that two threads do not mix their lines. */
    if (write(STDOUT_FILENO, line, length) != length)
        _exit(1); /* the end of init is a panic, and so the end of the machine */
}

void fail(const char *what) {
    say("FAILED %s: %s\n", what, strerror(errno));
    _exit(1);
}

uint64_t option(const char *name, uint64_t otherwise) {
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 10) : otherwise;
}

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000) + now.tv_nsec / 1000;
}

static uint64_t rotate(uint64_t value) { return value << 1 | value >> 63; }

uint64_t seed(uint64_t index, uint64_t counter) {
    uint64_t value = (index * STEP + counter) * UINT64_C(0xbf58476d1ce4e5b9);
    return value ^ value >> 31;
}

/* Starts from the page's number and counter: a page that is half old and half new does not add up.
 */
static uint64_t checksum(const struct page *page) {
    uint64_t sum = seed(page->index, page->counter);
    for (unsigned i = 0; i < WORDS; i++)
        sum = rotate(sum) ^ page->words[i];
    return sum;
}

void write_page(struct page *page, uint64_t index, uint64_t counter) {
    uint64_t word = seed(index, counter);
    page->magic = MAGIC;
    page->index = index;
    page->counter = counter;
    for (unsigned i = 0; i < WORDS; i++, word += STEP)
        page->words[i] = word ^ word >> 29;
    page->sum = checksum(page);
}

bool is_right(const struct page *page, uint64_t index, uint64_t counter) {
    return page->magic == MAGIC && page->index == index && page->counter == counter &&
           page->sum == checksum(page);
}

static void verify_page(struct worker *worker, uint64_t index) {
    const struct page *page = &pages[index];
    if (is_right(page, index, expected[index]))
        return;
    if (worker->bad++ < BAD_LINES)
        say("BAD page=%" PRIu64 " counter=%" PRIu64 " expected=%" PRIu64 "\n", index, page->counter,
            expected[index]);
}

static uint64_t next_random(struct worker *worker) {
    worker->random ^= worker->random << 13;
    worker->random ^= worker->random >> 7;
    return worker->random ^= worker->random << 17;
}

static void sweep_on(struct worker *worker) {
    verify_page(worker, worker->swept);
    if (++worker->swept == worker->end) {
        worker->swept = worker->first;
        worker->sweeps++;
    }
}

static void work(struct worker *worker) {
    for (unsigned i = 0; i < BATCH; i++) {
        uint64_t index = worker->first + next_random(worker) % (worker->hot_end - worker->first);
        verify_page(worker, index);
        write_page(&pages[index], index, ++expected[index]);
        worker->writes++;
        if (i % WRITES_PER_SWEPT == 0)
            sweep_on(worker);
    }
}

static _Noreturn void *work_on(void *worker) {
    for (;;)
        work(worker);
}

static const char *device_words(void) {
    static char words[128];
    snprintf(words, sizeof words,
             " net=%" PRIu64 " disk=%" PRIu64 " screen=%" PRIu64 " churn=%" PRIu64,
             device_work.frames, device_work.blocks, device_work.rows, device_work.rounds);
    return words;
}

/* Works as the first worker, and prints the heartbeats of all. */
static _Noreturn void beat(uint64_t period_us, bool with_devices) {
    uint64_t before = 0, longest = 0, last = now_us(), due = last + period_us;
    for (uint64_t seq = 0;;) {
        work(&workers[0]);
        uint64_t now = now_us();
        longest = now - last > longest ? now - last : longest;
        last = now;
        if (now < due)
            continue;
        uint64_t writes = 0, bad = device_work.bad, sweeps = UINT64_MAX;
        for (unsigned i = 0; i < threads; i++) {
            writes += workers[i].writes;
            bad += workers[i].bad;
            sweeps = workers[i].sweeps < sweeps ? workers[i].sweeps : sweeps;
        }
        say("HB seq=%" PRIu64 " t=%" PRIu64 " w=%" PRIu64 " dw=%" PRIu64 " bad=%" PRIu64
            " sweeps=%" PRIu64 " sw=%" PRIu64 " gap_us=%" PRIu64 "%s\n",
            seq++, now, writes, writes - before, bad, sweeps, workers[0].swept, longest,
            with_devices ? device_words() : "");
        before = writes;
        longest = 0;
        last = now_us();
        due = last + period_us;
    }
}

void *memory(uint64_t size) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        fail("memory");
    madvise(start, size,
            MADV_NOHUGEPAGE); /* so that neighbouring pages need not be neighbours on the host */
    return start;
}

int main(void) {
    uint64_t count = option("wl_mb", 96) * PAGES_PER_MIB,
             hot = option("wl_wss", 24) * PAGES_PER_MIB;
    uint64_t period_us = option("wl_hb", 20) * 1000;
    threads = option("wl_threads", 1);
    if (hot > count)
        hot = count;
    if (threads < 1 || threads > MAX_THREADS || hot < threads) {
        say("FAILED wl_threads must be 1 to %d, and wl_mb and wl_wss enough for all\n",
            MAX_THREADS);
        return 1;
    }
    pages = memory(count * PAGE);
    expected = memory(count * sizeof *expected);
    uint64_t started = now_us();
    for (uint64_t index = 0; index < count; index++)
        write_page(&pages[index], index, 0);
    say("READY pages=%" PRIu64 " fill_ms=%" PRIu64 "\n", count, (now_us() - started) / 1000);
    for (unsigned i = 0; i < threads; i++) {
        uint64_t first = count * i / threads;
        workers[i].first = workers[i].swept = first;
        workers[i].hot_end = first + hot / threads;
        workers[i].end = count * (i + 1) / threads;
        workers[i].random = STEP * (i + 1);
    }
    for (unsigned i = 1; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work_on, &workers[i])) {
            say("FAILED no thread\n");
            return 1;
        }
    }
    beat(period_us, start_devices());
}
