"""The constants of this backend."""

from __future__ import annotations

# Keys that each connection may have whatever the pin limit is: a connection with fewer keys cannot
# give one back to make room, and would wait for other connections.
KEYS_IN_ANY_CASE = 4

# READs in flight on a queue pair. Devices allow 16 and more; rdma_rxe allows 128.
MAX_READS = 16

# As in native/verbs.c, where the reasons are.
TIMEOUT = 16
RETRIES = 6

# Seconds between two looks whether every key has been given back.
GIVING_BACK_SECONDS = 0.001
