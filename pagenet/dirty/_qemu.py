"""QEMU's own estimate of how fast its guest writes, beside ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from ..qemu import Qmp

__all__ = ["ask_forever"]

_POLL_SECONDS = 0.05
_MIB = 1 << 20


async def ask_forever(qmp: Qmp, on_rate: Callable[[int], None]) -> None:
    """Have QEMU measure one second after the other (``calc-dirty-rate``), and call ``on_rate`` with
    each figure, in bytes a second. :exc:`~pagenet.qemu.QmpError` if this QEMU cannot.

    QEMU compares a sample of its pages (``page-sampling``, its default). Its other modes are left
    alone: QEMU 7.2 without KVM ends at once in ``dirty-bitmap``.
    """
    while True:
        await qmp.command("calc-dirty-rate", calc_time=1)
        # QEMU sends no event when it is done.
        while (found := await qmp.command("query-dirty-rate"))["status"] != "measured":  # noqa: ASYNC110
            await trio.sleep(_POLL_SECONDS)
        with suppress(KeyError, TypeError):  # none: nothing was to be sampled
            on_rate(int(found["dirty-rate"]) * _MIB)
