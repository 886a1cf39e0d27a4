/* Pages as one LZ4 block, behind a checksum of the pages uncompressed. */
#define _GNU_SOURCE
#include "pagenet.h"
#include "wire.h"

#if !__has_include(<lz4.h>)
#error "lz4.h is missing: install liblz4-dev (Debian) or lz4-devel (Fedora)"
#endif
#include <lz4.h>

#include <errno.h>
#include <string.h>

/* ---- the checksum: XXH64 with seed 0, of whole stripes, which all pages consist of ---- */

static const uint64_t PRIME_1 = 0x9e3779b185ebca87, PRIME_2 = 0xc2b2ae3d27d4eb4f,
                      PRIME_3 = 0x165667b19e3779f9, PRIME_4 = 0x85ebca77c2b2ae63;

static uint64_t rotate(uint64_t value, int by) { return value << by | value >> (64 - by); }

static uint64_t mix(uint64_t sum, uint64_t word) {
    return rotate(sum + word * PRIME_2, 31) * PRIME_1;
}

uint64_t pn_checksum(const void *from, uint64_t size) {
    const uint8_t *bytes = from;
    uint64_t sums[4] = {PRIME_1 + PRIME_2, PRIME_2, 0, -PRIME_1}, words[4];
    for (const uint8_t *end = bytes + size; bytes < end; bytes += sizeof words) {
        memcpy(words, bytes, sizeof words);
        for (int i = 0; i < 4; i++)
            sums[i] = mix(sums[i], words[i]);
    }
    uint64_t sum =
        rotate(sums[0], 1) + rotate(sums[1], 7) + rotate(sums[2], 12) + rotate(sums[3], 18);
    for (int i = 0; i < 4; i++)
        sum = (sum ^ mix(0, sums[i])) * PRIME_1 + PRIME_4;
    sum += size;
    sum = (sum ^ sum >> 33) * PRIME_2;
    sum = (sum ^ sum >> 29) * PRIME_3;
    return sum ^ sum >> 32;
}

/* ---- packing ---- */

uint64_t pn_pack_state(void) { return (uint64_t)LZ4_sizeofState(); }

uint64_t pn_pack(void *state, const void *pages, uint64_t size, void *to) {
    uint64_t sum, most = size - size / PN_LZ4_GAIN - sizeof sum;
    int length =
        LZ4_compress_fast_extState(state, pages, (char *)to + sizeof sum, (int)size, (int)most, 1);
    if (length <= 0)
        return 0;
    sum = pn_checksum(pages, size);
    memcpy(to, &sum, sizeof sum);
    return (uint64_t)length + sizeof sum;
}

int pn_unpack(const void *from, uint64_t length, void *pages, uint64_t size) {
    uint64_t sum;
    if (length <= sizeof sum || length > PN_MAX_LZ4_BYTES || size > PN_MAX_LZ4_BYTES)
        return -EBADMSG;
    memcpy(&sum, from, sizeof sum);
    int got = LZ4_decompress_safe((const char *)from + sizeof sum, pages,
                                  (int)(length - sizeof sum), (int)size);
    return got >= 0 && (uint64_t)got == size && pn_checksum(pages, size) == sum ? 0 : -EBADMSG;
}
