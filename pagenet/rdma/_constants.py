"""The numbers of this backend."""

from __future__ import annotations

# Keys that each connection may have in any case: who has fewer can give none back to make room, and
# would wait for others.
KEYS_IN_ANY_CASE = 4

# READs in flight on a queue pair. Devices do 16 and more; rdma_rxe 128.
MAX_READS = 16

# As in native/verbs.c, which says why.
TIMEOUT = 16
RETRIES = 6
