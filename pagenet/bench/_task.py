"""A task for a process of its own: its arguments go to it, and its figures come back, as one JSON
object each."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from ..children import module_command
from ..errors import PagenetError
from ._peers import running

__all__ = ["work_once", "worked"]


async def worked(
    module: str, task: dict[str, Any], fd: int, *, inside: Sequence[str]
) -> dict[str, Any]:
    """What a process of that module, which inherits ``fd`` and is :func:`work_once`, says of its
    task. ``inside``: what comes before its command. :exc:`PagenetError` if it fails."""
    async with running([*inside, *module_command(module, json.dumps(task))], [fd]) as child:
        told: dict[str, Any] = json.loads(await child.first_line())
    if "error" in told:
        raise PagenetError(told["error"])
    return told


def work_once(work: Callable[..., Awaitable[dict[str, object]]]) -> None:
    """The whole of such a process. An error of pagenet's own is an answer too."""
    try:
        print(json.dumps(trio.run(lambda: work(**json.loads(sys.argv[1])))), flush=True)
    except PagenetError as error:
        print(json.dumps({"error": str(error)}), flush=True)
