"""What tests of code around pagenet need: a transport without a network, and the conformance suite
for new ones."""

from __future__ import annotations

from ._check_transport import check_transport
from ._memory import MemoryConnection, MemoryListener, MemoryTransport, memory_pair

__all__ = [
    "MemoryConnection",
    "MemoryListener",
    "MemoryTransport",
    "check_transport",
    "memory_pair",
]
