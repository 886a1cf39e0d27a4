"""The numbers of this backend."""

from __future__ import annotations

# Keys that each connection may have in any case: who has fewer can give none back to make room, and would wait for others.
KEYS_IN_ANY_CASE = 4

# READs on their way on a queue pair. Devices do 16 and more; rdma_rxe 128.
MAX_READS = 16

# As in native/verbs.c, which says why.
TIMEOUT = 16
RETRIES = 6

# What may be on its way while the owner does little but wait, while there are faults, and when there have been none for a
# while. A page of shared memory that the background reads in place cannot be overtaken by a fault on it, so this is what such
# a fault may wait for.
WINDOW_BYTES = (64 << 10, 256 << 10, 2 << 20)
