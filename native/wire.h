/* Headers of a lane, as in docs/protocol.md: little-endian, 24 bytes. */
#ifndef PAGENET_WIRE_H
#define PAGENET_WIRE_H
#include <assert.h>
#include <endian.h>
#include <stdint.h>

static_assert(__BYTE_ORDER == __LITTLE_ENDIAN, "lane headers are read in place");

enum { PN_RAW = 0, PN_ZEROS = 1, PN_LZ4 = 2, PN_FAILED = 255 };
enum { PN_MAX_REQUEST_BYTES = 4 << 20, PN_MAX_REASON_BYTES = 1024, PN_MAX_UNIT_SHIFT = 18 };
enum { PN_MAX_UNIT_BYTES = 1 << 30, PN_MAX_LZ4_BYTES = 2 << 20 };

struct pn_request {
    uint32_t id;
    uint8_t class_;
    uint8_t encodings;
    uint8_t unit_shift;
    uint8_t reserved;
    uint64_t first;
    uint32_t count;
    uint32_t reserved2;
};

struct pn_reply {
    uint32_t id;
    uint8_t class_;
    uint8_t encoding;
    uint16_t reserved;
    uint64_t first;
    uint32_t count;
    uint32_t length;
};

static_assert(sizeof(struct pn_request) == 24 && sizeof(struct pn_reply) == 24, "header size");

#endif
