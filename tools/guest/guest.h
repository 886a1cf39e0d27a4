/* What the parts of the Linux guest share: its words, its options, and pages that tell whether they
 * are right. */
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
fail(const char *what); /* with the reason in errno: the end of the machine */
uint64_t option(const char *name, uint64_t otherwise);
void *memory(uint64_t size);
uint64_t seed(uint64_t index, uint64_t counter);
void write_page(struct page *page, uint64_t index, uint64_t counter);
bool is_right(const struct page *page, uint64_t index, uint64_t counter);

/* devices.c: what has come over the network, went to the disk, was drawn and was allocated so far;
 * and what of it was wrong */
struct device_work {
    _Atomic uint64_t frames, blocks, rows, rounds, bad;
};
extern struct device_work device_work;
bool start_devices(void); /* false if no option asks for any */
