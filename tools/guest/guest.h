/* What the parts of the Linux guest share: output, options, and pages that can be verified. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { PAGE = 4096, WORDS = PAGE / 8 - 4 };

struct page {
    uint64_t magic, index, counter, sum, words[WORDS];
};

/* init.c */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);
__attribute__((noreturn)) void
fail(const char *what); /* prints the reason in errno, and ends the machine */
uint64_t option(const char *name, uint64_t otherwise);
void *memory(uint64_t size);
uint64_t seed(uint64_t index, uint64_t counter);
void write_page(struct page *page, uint64_t index, uint64_t counter);
bool is_right(const struct page *page, uint64_t index, uint64_t counter);

/* devices.c: how many frames came over the network, blocks were verified on the disk, rows were
 * verified on the screen, and rounds of allocations were made so far; and how much was wrong */
struct device_work {
    _Atomic uint64_t frames, blocks, rows, rounds, bad;
};
extern struct device_work device_work;
bool start_devices(void); /* false if no option asks for any */
