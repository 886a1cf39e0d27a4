"""The numbers of this backend. None is visible on the wire: change them freely, on one side only if
you like."""

from __future__ import annotations

import os

# The kernel refuses a sendmsg() of more buffers than this with EMSGSIZE. 1024 on every Linux, but
# it is the kernel's to say.
IOV_MAX = os.sysconf("SC_IOV_MAX")

# A dial that takes longer is of no use: the owner's threads stand still meanwhile. SYNs go out at
# 0, 1, 3 and 7 s, so that 10 s forgives three lost ones. The resolver gets as much again. Not
# measured.
CONNECT_TIMEOUT = 10.0

# A dead peer must be noticed within PEER_TIMEOUT seconds, since until then every fault waits and
# nothing reconnects. Left alone, Linux takes about 15 minutes while bytes are unacknowledged
# (tcp_retries2), and for ever on an idle connection. Two options are needed, because each covers
# what the other does not:
# - TCP_USER_TIMEOUT: bytes are under way and nobody acknowledges them.
# - keepalive: nothing is under way. KEEPALIVE_IDLE + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL comes to
#   the same 10 s. 10 s is above the pauses that healthy networks have (a bond failing over) and low
#   enough for a person to wait.
#
# It is also how long a peer may be stopped: with its receive window shut for as long,
# TCP_USER_TIMEOUT ends the connection although the peer's kernel still answers (measured on Linux
# 6.18: after 10.4 s). Reconnecting heals that.
PEER_TIMEOUT = 10
KEEPALIVE_IDLE = 4
KEEPALIVE_INTERVAL = 2
KEEPALIVE_PROBES = 3

# What the kernel takes from us before it can send it (TCP_NOTSENT_LOWAT): pages are read as late as
# possible, and a source of hundreds of connections holds no megabytes for each. Over loopback the
# rate is the same with 64 KiB, 512 KiB or no limit. SO_SNDBUF and SO_RCVBUF stay the kernel's: set
# to 256 KiB they cost a fifth of the rate, to 1 or 4 MiB they gain nothing, and once set they are
# no longer fitted to the path.
UNSENT_BYTES = 256 << 10

# BBR sends at a pace that it works out and a timer keeps: that is for long paths with little
# buffer. Where the round trip is tens of microseconds the timer is what limits it. Over loopback,
# 512 MiB by sendfile into one buffer, Linux 6.18: bbr 1.4 GB/s, cubic 6.2, reno 6.2. So on a path
# within a data center (NEAR_US) pages go by the first of these that may be used, and elsewhere by
# what the host has.
PACING_CONGESTION_CONTROL = b"bbr"
NEAR_CONGESTION_CONTROL = (b"cubic", b"reno")
NEAR_US = 1000

# Connections that wait for accept(): as many as the kernel allows (net.core.somaxconn, 4096), since
# whoever finds no room comes again after 1, 3 and 7 s. Behind 2,000 peers that connected at once,
# with room for 128, that was 6 to 9 s.
BACKLOG = 4096

# When file descriptors or memory run out, accept() fails at once and the connection keeps waiting
# in the backlog: without a pause the loop would spin. Long enough to cost nothing, short enough
# that nobody notices.
ACCEPT_PAUSE = 0.1

# A connect() to a unix listener with a full backlog does not wait but fails with EAGAIN, and
# nothing says when to come back.
UNIX_BACKLOG_PAUSE = 0.01
