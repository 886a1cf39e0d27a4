"""The constants of this backend. None is visible on the wire: they may be changed on one side
only."""

from __future__ import annotations

import os

# The kernel refuses a sendmsg() of more buffers than this with EMSGSIZE. It is 1024 on every Linux,
# but the kernel decides.
IOV_MAX = os.sysconf("SC_IOV_MAX")

# Seconds. A dial that takes longer is of no use: the owner's threads stand still meanwhile. SYNs go
# out at 0, 1, 3 and 7 s, so three of them may be lost within 10 s. The resolver gets as much again.
# Not measured.
CONNECT_TIMEOUT = 10.0

# Seconds for a TLS handshake with a peer that was dialled: two round trips, and some ms of work.
HANDSHAKE_TIMEOUT = 10.0

# A dead peer is noticed by its missing beats on the control connection (pagenet/heartbeat.py). A
# single connection whose flow is dropped, while the others go on, is noticed by TCP, and by default
# Linux takes about 15 minutes for that while bytes are unacknowledged (tcp_retries2), and for ever
# on an idle connection. Two options are needed, because each covers what the other does not:
# - TCP_USER_TIMEOUT: bytes are in flight and are not acknowledged. A path that loses 30 % of its
#   packets does not take so long: with 10 s it ended connections again and again.
# - keepalive: nothing is in flight. KEEPALIVE_IDLE + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL comes to
#   10 s.
UNACKNOWLEDGED_TIMEOUT = 30
KEEPALIVE_IDLE = 4
KEEPALIVE_INTERVAL = 2
KEEPALIVE_PROBES = 3

# The longest time (ms) between two repetitions of a packet that is not acknowledged: the kernel's
# least. By default it doubles with each, and a path that has been down for 6 s is used again after
# up to 6 s more. Since Linux 6.15; before that, a session over another connection is tried.
TCP_RTO_MAX_MS = 44  # of <linux/tcp.h>; Python does not name it
RTO_MAX_MS = 1000

# A path whose round trip is shorter does not lose so many packets that nothing comes for a second,
# unless it is down.
SHORT_US = 10_000
MIN_RTT_AT = 148  # in struct tcp_info

# Bytes that the kernel takes from us before it can send them (TCP_NOTSENT_LOWAT). With this limit,
# pages are read as late as possible, and a source with hundreds of connections does not keep
# megabytes for each. Over loopback the rate is the same with 64 KiB, 512 KiB or no limit. SO_SNDBUF
# and SO_RCVBUF are left to the kernel: set to 256 KiB they cost a fifth of the rate, set to 1 or 4
# MiB they gain nothing, and once they are set the kernel no longer fits them to the path.
UNSENT_BYTES = 256 << 10

# BBR calculates a pace, and a timer keeps it: that is for long paths with little buffer. Where the
# round trip is tens of microseconds, the timer limits the rate. Over loopback, 512 MiB by sendfile
# into one buffer, Linux 6.18: bbr 1.4 GB/s, cubic 6.2, reno 6.2. So where the round trip is shorter
# than NEAR_US (within a data center), connections use the first of NEAR_CONGESTION_CONTROL that
# they may, and elsewhere the host's congestion control.
PACING_CONGESTION_CONTROL = b"bbr"
NEAR_CONGESTION_CONTROL = (b"cubic", b"reno")
NEAR_US = 1000

# Connections that may wait for accept(): as many as the kernel allows (net.core.somaxconn, 4096),
# because a peer that finds no room tries again only after 1, 3 and 7 s. Behind 2,000 peers that
# connected at once, with room for 128, that took 6 to 9 s.
BACKLOG = 4096

# Seconds. When file descriptors or memory run out, accept() fails at once and the connection keeps
# waiting in the backlog: without a pause the loop would spin. The pause is long enough to cost
# nothing, and short enough not to be noticed.
ACCEPT_PAUSE = 0.1

# Seconds between attempts. A connect() to a unix listener with a full backlog does not wait but
# fails with EAGAIN, and nothing tells when there is room.
UNIX_BACKLOG_PAUSE = 0.01
