"""What a service tells systemd: sd_notify(3)."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

__all__ = ["Service"]


class Service:
    """This process as a service of the systemd that listens at ``address``."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def of_environment(cls) -> Service | None:
        """None: nothing is to be told."""
        address = os.environ.get("NOTIFY_SOCKET")
        return cls(address) if address else None

    def say(self, status: str) -> None:
        """What ``systemctl status`` shows."""
        self.tell("STATUS=" + " ".join(status.split("\n")))

    def tell(self, assignment: str) -> None:
        """Does nothing if nobody listens, or cannot follow."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(assignment.encode(), self._address)
