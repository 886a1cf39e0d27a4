/* What the two sides tell each other about keys: docs/protocol.md, "Lanes over RDMA". */
#ifndef PAGENET_KEYS_H
#define PAGENET_KEYS_H
#include "pagenet.h"

#include <assert.h>

enum key_asking { KEY_ASK = 1, KEY_RETURN = 2 };
enum key_answer { KEY_HERE = 1, KEY_ZERO = 2, KEY_REFUSED = 3, KEY_FAILED = 255 };
struct key_header {
    uint32_t number;
    uint8_t kind;
    uint8_t reserved[3];
    uint64_t first; /* page */
    uint32_t count;
    uint32_t length; /* of what follows */
};
struct key {
    uint64_t address;
    uint32_t rkey;
    uint32_t reserved;
    uint64_t zero[4]; /* a bit for each page: whether it is zero; absent if not known */
};
static_assert(sizeof(struct key_header) == 24 && sizeof(struct key) == 48, "sizes on the wire");
enum { KEY_WITHOUT_ZEROS = 16 };

#endif
