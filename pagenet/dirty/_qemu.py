"""QEMU's own estimate of how fast its guest writes, beside ours."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..errors import PagenetError
from ..qemu import Qmp

__all__ = ["ask_forever", "measured"]

_POLL_SECONDS = 0.05
_MIB = 1 << 20
# An exabyte a second.
_MOST_MIB = 1 << 40


async def ask_forever(qmp: Qmp, on_rate: Callable[[int], None]) -> None:
    """Have QEMU measure one second after the other (``calc-dirty-rate``), and call ``on_rate`` with
    each figure, in bytes a second. :exc:`~pagenet.qemu.QmpError` if this QEMU cannot.

    QEMU compares a sample of its pages (``page-sampling``, its default). Its other modes are left
    alone: QEMU 7.2 without KVM ends at once in ``dirty-bitmap``.
    """
    while True:
        await qmp.command("calc-dirty-rate", calc_time=1)
        # QEMU sends no event when it is done.
        while (rate := measured(await qmp.command("query-dirty-rate"))) is None:  # noqa: ASYNC110
            await trio.sleep(_POLL_SECONDS)
        on_rate(rate)


def measured(answer: object) -> int | None:
    """Bytes a second, from an answer to ``query-dirty-rate``; None while QEMU measures.
    :exc:`PagenetError` if the answer makes no sense."""
    if isinstance(answer, dict):
        status, rate = answer.get("status"), answer.get("dirty-rate")
        if status == "measuring" or status == "unstarted":
            return None
        if status == "measured" and type(rate) is int and 0 <= rate <= _MOST_MIB:
            return rate * _MIB
    raise PagenetError("QEMU's answer to query-dirty-rate makes no sense")
