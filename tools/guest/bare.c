/* A guest without a kernel, for machines on which no kernel boots, or on which booting takes too
 * long: it is up in milliseconds, under TCG and KVM. Its work and its output are those of init.c.
 * Its options come from the boot loader's command line:
 * - wl_mb: MiB of pages to work on. They begin at 16 MiB; a word for each page stands behind them.
 * - wl_wss: MiB of them that are hot: verified and written again, at random.
 * - wl_hb: milliseconds between two heartbeats.
 * - wl_words: about how many of the 1020 words of a page are written and verified, spread over all
 *   of it. One is enough to tell a page from another, and where every instruction is emulated, all
 *   are too many.
 *
 * Multiboot starts it in 32-bit mode without paging, and interrupts stay off: it uses only the
 * processor, its memory, a serial port and a timer. Its clock wraps after 71 minutes. */
#include <stdbool.h>
#include <stdint.h>

enum { PAGE = 4096, PAGES_PER_MIB = 256, WORDS = PAGE / 4 - 4, FIRST_MIB = 16, LOW_MIB = 1 };
enum { BATCH = 16, WRITES_PER_SWEPT = 4, BAD_LINES = 20 };
enum {
    SERIAL = 0x3f8,
    SERIAL_ENABLE = SERIAL + 1,
    SERIAL_FORMAT = SERIAL + 3,
    SERIAL_STATUS = SERIAL + 5
};
enum { EIGHT_BITS = 3, CAN_SEND = 0x20 };
enum { PCI_ADDRESS = 0xcf8, PCI_DATA = 0xcfc, TIMER_PORT = 8 };

#define MAGIC 0x7061676eu
#define STEP 0x9e3779b9u
/* PCI address of the register, in function 3 of the PC's south bridge, that has the base of the
 * ports that the firmware chose. */
#define POWER_MANAGEMENT 0x80000b40u
#define LOADER 0x2badb002u
#define US_PER_TICK 4686970u /* in units of 2^-24 */

struct page {
    uint32_t magic, index, counter, sum, words[WORDS];
};

/* What the boot loader tells, as far as it is used here. */
struct boot {
    uint32_t flags, lower_kib, upper_kib, device;
    const char *command_line;
};

__asm__(".section .text\n"
        ".align 4\n"
        ".long 0x1badb002, 0, -0x1badb002\n" /* by this the boot loader recognises the program */
        ".globl _start\n"
        "_start: mov $stack_end, %esp\n"
        "push %ebx\n"
        "push %eax\n"
        "call run\n"
        ".section .bss\n"
        ".align 16\n"
        ".skip 16384\n"
        "stack_end:\n"
        ".text\n");

static struct page *const pages = (struct page *)(FIRST_MIB << 20);
static uint32_t *expected; /* the counter that each page must hold */
static uint32_t count, hot, stride, period_us, random_state = STEP;
static uint32_t writes, bad, sweeps, swept;
static uint32_t timer, last_ticks;
static uint64_t ticks;

static void out8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void out32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in8(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static uint32_t in32(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* ---- output ---- */

static void say(const char *text) {
    for (; *text; text++) {
        while (!(in8(SERIAL_STATUS) & CAN_SEND))
            ;
        out8(SERIAL, *text);
    }
}

static void say_number(const char *name, uint32_t value) {
    char digits[11], *first = &digits[10];
    *first = '\0';
    do
        *--first = '0' + value % 10;
    while (value /= 10);
    say(name);
    say(first);
}

static _Noreturn void fail(const char *why) {
    say("FAILED ");
    say(why);
    say("\r\n");
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* ---- options ---- */

static bool begins_with(const char *text, const char *beginning) {
    while (*beginning)
        if (*text++ != *beginning++)
            return false;
    return true;
}

/* The value of `name`, which includes its equals sign. */
static uint32_t option(const char *line, const char *name, uint32_t otherwise) {
    for (; *line; line++) {
        if (!begins_with(line, name))
            continue;
        while (*line++ != '=')
            ;
        uint32_t value = 0;
        for (; *line >= '0' && *line <= '9'; line++)
            value = 10 * value + (*line - '0');
        return value;
    }
    return otherwise;
}

/* ---- time: the 24 bits of a counter at 3.579545 MHz, which wraps every 4.7 s ---- */

static void start_clock(void) {
    out32(PCI_ADDRESS, POWER_MANAGEMENT);
    timer = (in32(PCI_DATA) & 0xffc0) + TIMER_PORT;
    if (timer == TIMER_PORT)
        fail("no timer: this is not QEMU's machine type pc");
    last_ticks = in32(timer);
}

static uint32_t now_us(void) {
    uint32_t now = in32(timer);
    ticks += (now - last_ticks) & 0xffffff;
    last_ticks = now;
    return ticks * US_PER_TICK >> 24;
}

/* ---- pages ---- */

static uint32_t seed(uint32_t index, uint32_t counter) {
    uint32_t value = (index * STEP + counter) * 0x85ebca6bu;
    return value ^ value >> 13;
}

static uint32_t rotate(uint32_t value) { return value << 1 | value >> 31; }

static uint32_t checksum(const volatile struct page *page) {
    uint32_t sum = seed(page->index, page->counter);
    for (uint32_t i = 0; i < WORDS; i += stride)
        sum = rotate(sum) ^ page->words[i];
    return sum;
}

static void write_page(uint32_t index) {
    volatile struct page *page = &pages[index];
    uint32_t word = seed(index, expected[index]);
    page->magic = MAGIC;
    page->index = index;
    page->counter = expected[index];
    for (uint32_t i = 0; i < WORDS; i += stride, word += STEP)
        page->words[i] = word ^ word >> 15;
    page->sum = checksum(page);
}

static void verify_page(uint32_t index) {
    const volatile struct page *page = &pages[index];
    bool is_right =
        page->magic == MAGIC && page->index == index && page->counter == expected[index];
    if ((is_right && page->sum == checksum(page)) || bad++ >= BAD_LINES)
        return;
    say_number("BAD page=", index);
    say_number(" counter=", page->counter);
    say_number(" expected=", expected[index]);
    say("\r\n");
}

static uint32_t next_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

static void sweep_on(void) {
    verify_page(swept);
    if (++swept == count) {
        swept = 0;
        sweeps++;
    }
}

static void work(void) {
    for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t index = next_random() % hot;
        verify_page(index);
        expected[index]++;
        write_page(index);
        writes++;
        if (i % WRITES_PER_SWEPT == 0)
            sweep_on();
    }
}

static _Noreturn void beat(void) {
    uint32_t before = 0, longest = 0, last = now_us(), said = last;
    for (uint32_t seq = 0;;) {
        work();
        uint32_t now = now_us();
        longest = now - last > longest ? now - last : longest;
        last = now;
        if (now - said < period_us)
            continue;
        say_number("HB seq=", seq++);
        say_number(" t=", now);
        say_number(" w=", writes);
        say_number(" dw=", writes - before);
        say_number(" bad=", bad);
        say_number(" sweeps=", sweeps);
        say_number(" sw=", swept);
        say_number(" gap_us=", longest);
        say("\r\n");
        before = writes;
        longest = 0;
        last = said = now_us();
    }
}

static void read_options(const char *line, uint32_t mib) {
    uint32_t work_mib = option(line, "wl_mb=", 16), hot_mib = option(line, "wl_wss=", 4),
             words = option(line, "wl_words=", WORDS);
    if (FIRST_MIB + work_mib + work_mib / 1024 + 1 > mib)
        fail("not enough memory for wl_mb, and 16 MiB below it");
    if (!hot_mib || hot_mib > work_mib || !words || words > WORDS)
        fail("wl_wss must be 1 to wl_mb, and wl_words 1 to 1020");
    count = work_mib * PAGES_PER_MIB;
    hot = hot_mib * PAGES_PER_MIB;
    stride = WORDS / words;
    period_us = option(line, "wl_hb=", 20) * 1000;
    expected = (uint32_t *)&pages[count];
}

__attribute__((noreturn, used)) void run(uint32_t loader, const struct boot *boot) {
    out8(SERIAL_ENABLE, 0);
    out8(SERIAL_FORMAT, EIGHT_BITS);
    if (loader != LOADER)
        fail("no multiboot loader has started this");
    read_options(boot->command_line, LOW_MIB + boot->upper_kib / 1024);
    start_clock();
    uint32_t started = now_us();
    for (uint32_t index = 0; index < count; index++) {
        expected[index] = 0;
        write_page(index);
    }
    say_number("READY pages=", count);
    say_number(" fill_ms=", (now_us() - started) / 1000);
    say("\r\n");
    beat();
}
