/* The host cache: pages of a source in a file in memory, of which guests are filled. */
#ifndef PAGENET_CACHE_H
#define PAGENET_CACHE_H
#include "pagenet.h"

#include <stdbool.h>

/* Between these two no page leaves the cache. */
void pn_cache_hold(struct pn_cache *cache);
void pn_cache_unhold(struct pn_cache *cache);

/* The bytes from byte `offset` of the region on that are here, at most `size`, in units of `unit`
 * bytes, the guest's pages. Returns how many bytes,
 * and in *bytes where they are; NULL: they are zeros. To be called while the cache is held. */
uint64_t pn_cache_find(struct pn_cache *cache, uint64_t offset, uint64_t size, uint64_t unit,
                       const char **bytes);
/* Has what of these bytes is not here fetched. */
void pn_cache_want(struct pn_cache *cache, uint64_t offset, uint64_t size);
/* Has wake_fd written when some of these bytes come, until it is told otherwise; without memory it
 * is not. */
void pn_cache_wait(struct pn_cache *cache, uint64_t offset, uint64_t size, int wake_fd);
/* No longer does so for those bytes, or (size 0) for any. */
void pn_cache_unwait(struct pn_cache *cache, uint64_t offset, uint64_t size, int wake_fd);

/* For the lanes that fill it: the pages of the cache that are wanted, at most `room`. Returns how
 * many. pn_cache_wanted_fd is readable while there may be more. */
int pn_cache_take_wanted(struct pn_cache *cache, uint64_t *pages, int room);
int pn_cache_wanted_fd(const struct pn_cache *cache);
/* Pages of the cache have come: with bytes, or (zero) as zeros. */
void pn_cache_came(struct pn_cache *cache, uint64_t first, uint64_t count, bool zero);
/* Makes these pages of the file a hole, before they are noted as zeros. 0 or -errno. */
int pn_cache_punch(const struct pn_cache *cache, uint64_t first, uint64_t count);

#endif
