"""Whether a guest's memory can be copied while the guest runs: what writes to it must be seen."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ..errors import UsageError
from ..region import Region
from ..uffd import Mapping, WriteTracker
from .qmp import Qmp

__all__ = ["tracking"]


async def tracking(qmp: Qmp, mappings: Sequence[Mapping], region: Region) -> WriteTracker:
    """A tracker of the guest's RAM, which ``mappings`` are.

    :exc:`~pagenet.errors.UsageError` if something writes to that RAM unseen, or it is in several
    backends; and what :class:`~pagenet.WriteTracker` raises.
    """
    if len(mappings) > 1:
        raise UsageError("RAM in several memory backends is copied once, after the switch")
    await _check_writers(qmp)
    return await trio.to_thread.run_sync(WriteTracker, qmp.pid, mappings, region)


async def _check_writers(qmp: Qmp) -> None:
    for node in await qmp.command("query-named-block-nodes"):
        if node.get("cache", {}).get("direct"):
            name = node.get("node-name", "?")
            raise UsageError(
                f"the disk {name} is read with O_DIRECT (cache=none): such reads write to the"
                " guest's RAM unseen"
            )
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        for device in await qmp.command("qom-list", path=path):
            kind = str(device["type"]).removeprefix("child<").removesuffix(">")
            if kind.startswith(("vfio-", "vhost-user-")):
                raise UsageError(f"the device {kind} writes to the guest's RAM unseen")
    if "vhost-user" in await qmp.monitor("info network"):
        raise UsageError("a vhost-user process writes to the guest's RAM unseen")
