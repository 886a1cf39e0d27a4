"""A task in a process of its own: its arguments and its figures are one JSON object each."""

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
    """The figures of a task that :func:`work_once` runs in a process of ``module``, which inherits
    ``fd``. ``inside``: a prefix of its command. :exc:`PagenetError` if the task fails."""
    async with running([*inside, *module_command(module, json.dumps(task))], [fd]) as child:
        told: dict[str, Any] = json.loads(await child.first_line())
    if "error" in told:
        raise PagenetError(told["error"])
    return told


def work_once(work: Callable[..., Awaitable[dict[str, object]]]) -> None:
    """All that such a process does. It reports a :exc:`PagenetError` as well."""
    try:
        print(json.dumps(trio.run(lambda: work(**json.loads(sys.argv[1])))), flush=True)
    except PagenetError as error:
        print(json.dumps({"error": str(error)}), flush=True)
