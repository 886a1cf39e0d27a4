"""The sizes and times of reading from stores."""

from __future__ import annotations

#: Bytes asked for at a time, aligned. Below 2 MiB most of a request is its latency: 4 KiB from
#: SeaweedFS on loopback take 2.1 ms, and 2 MiB take 6.0 ms.
CHUNK = 2 << 20
#: Bytes of a response that are handed on at a time: what is waited for is in place before the
#: chunk is whole.
PART = 256 << 10
#: Bytes of a chunk before a page that a thread waits for, from which on the chunk is fetched with
#: two requests: first from that page on, then what is before it.
SPLIT = 512 << 10
#: Chunks in flight for an object, and how many of those only chunks may be that a thread waits for.
IN_FLIGHT = 16
RESERVED = 4
#: Chunks asked for behind one that the background reads: a destination's window is 1 MiB, and would
#: keep one request in flight.
AHEAD = 8
#: Bytes asked for where a thread waits for a page of a chunk for the first time, from that page on.
#: Threads that touch memory here and there need no more of it. The next wait brings all of the
#: chunk.
AROUND = 512 << 10
#: Streams of the background that are known at a time: several destinations may read.
STREAMS = 64

#: Seconds without a byte after which a request is made anew.
STALL = 10.0
#: Seconds until the first retry, and at most, each multiplied by a random number from 0.5 to 1.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
#: Seconds between two looks whether another process has fetched the chunk that it fetches.
LOOK = 0.005
