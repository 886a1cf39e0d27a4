"""Show a transfer, and change it, while it runs: over a unix socket. ``docs/control.md`` is the
specification.

A program that pulls or serves offers the socket with :func:`serve_control`; ``pagenet-ctl`` and
:func:`connect_control` use it.
"""

from __future__ import annotations

from ._client import ControlClient, connect_control
from ._directory import FoundSocket, control_directory, default_socket, found_sockets
from ._protocol import COMMANDS
from ._server import Control, serve_control
from ._status import Rates, server_status, transfer_status

__all__ = [
    "COMMANDS",
    "Control",
    "ControlClient",
    "FoundSocket",
    "Rates",
    "connect_control",
    "control_directory",
    "default_socket",
    "found_sockets",
    "serve_control",
    "server_status",
    "transfer_status",
]
