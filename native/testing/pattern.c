/* Memory whose content is known in advance, so a page that is lost, late, stale or in the wrong
 * place is found.
 *
 * A page has a key, hashed from the seed and its number; a word is hashed from the key and its
 * place. Both hashes are bijections (each step can be undone), and both inputs are distinct within
 * their range, so two words of one page never agree: at most one of them is zero, and a page that
 * is not meant to be zero never is. One multiplication a word, and no word waits for the one before
 * it.
 */
#define _GNU_SOURCE
#include "testing.h"

#include <stdbool.h>
#include <string.h>

#define PN_STEP 0x9e3779b97f4a7c15u /* 2^64 / golden ratio, odd: multiples of it do not repeat */

/* The finaliser of MurmurHash3 with the constants of splitmix64. */
static uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static uint64_t page_key(uint64_t page, uint64_t seed) { return mix(mix(seed + PN_STEP) ^ page); }

static inline uint64_t word_of(uint64_t key, uint64_t place) {
    uint64_t value = key + place * PN_STEP;
    value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93u;
    return value ^ (value >> 32);
}

/* Zero pages are chosen by a hash of their own, not by a stride: strided access must not see zero
 * pages alone, or none. */
static bool is_zero_page(uint64_t key, uint64_t zero_every) {
    return zero_every && mix(~key) % zero_every == 0;
}

/* memcpy, because the buffer may have any alignment; it compiles to one store. */
static void fill_words(char *bytes, uint64_t words, uint64_t key) {
    for (uint64_t place = 0; place < words; place++) {
        uint64_t word = word_of(key, place);
        memcpy(bytes + 8 * place, &word, sizeof word);
    }
}

void pn_pattern_fill(void *buffer, uint64_t first_page, uint64_t pages, uint64_t page_size,
                     uint64_t seed, uint64_t zero_every) {
    for (uint64_t i = 0; i < pages; i++) {
        char *bytes = (char *)buffer + i * page_size;
        uint64_t key = page_key(first_page + i, seed);
        if (is_zero_page(key, zero_every))
            memset(bytes, 0, page_size);
        else
            fill_words(bytes, page_size / 8, key);
    }
}

/* Differences are or-ed together: without an exit from the loop, good pages, which nearly all are,
 * go at full speed. */
static bool words_differ(const char *bytes, uint64_t words, uint64_t key) {
    uint64_t difference = 0;
    for (uint64_t place = 0; place < words; place++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * place, sizeof word);
        difference |= word ^ word_of(key, place);
    }
    return difference != 0;
}

static bool page_differs(const char *bytes, uint64_t page_size, uint64_t key, uint64_t zero_every) {
    int zero;
    if (!is_zero_page(key, zero_every))
        return words_differ(bytes, page_size / 8, key);
    pn_zero_run(bytes, 1, page_size, &zero);
    return !zero;
}

uint64_t pn_pattern_check(const void *buffer, uint64_t first_page, uint64_t pages,
                          uint64_t page_size, uint64_t seed, uint64_t zero_every, uint64_t *bad) {
    uint64_t differ = 0;
    for (uint64_t i = 0; i < pages; i++) {
        uint64_t page = first_page + i;
        if (page_differs((const char *)buffer + i * page_size, page_size, page_key(page, seed),
                         zero_every) &&
            !differ++)
            *bad = page;
    }
    return differ;
}

uint64_t pn_pattern_word_at(uint64_t page, uint64_t place, uint64_t seed, uint64_t zero_every) {
    uint64_t key = page_key(page, seed);
    return is_zero_page(key, zero_every) ? 0 : word_of(key, place);
}

uint64_t pn_pattern_word(uint64_t page, uint64_t page_size, uint64_t seed, uint64_t zero_every) {
    (void)page_size; /* pages of any size begin alike */
    return pn_pattern_word_at(page, 0, seed, zero_every);
}
