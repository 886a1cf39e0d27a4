"""The moment at which a guest goes from one side to the other: one side says "run", and the other
"taking". The guest runs on at most one side, whatever fails."""

from __future__ import annotations

import errno
from enum import Enum

import trio

from ..errors import ConnectionBroken, PagenetError
from ._guard import Guard
from ._talk import MigrationRefused, Talk

__all__ = ["Given", "Offer"]

# In seconds: for the other side's message that it takes the guest.
_TAKE_TIMEOUT = 30.0


class Given(Enum):
    """Whether the guest is the other side's."""

    NO = "no"
    PERHAPS = "perhaps"
    YES = "yes"


class Offer:
    """The guest, which stands still on this side, is the other side's if that takes it."""

    def __init__(self) -> None:
        self.given = Given.NO

    async def make(self, talk: Talk, guard: Guard) -> None:
        """Return when the other side has taken the guest. :exc:`~pagenet.errors.PagenetError` if it
        has not, or may not have: see :attr:`given`."""
        await guard.should_we_die("nothing")
        self.given = Given.PERHAPS
        with trio.move_on_after(_TAKE_TIMEOUT, shield=True):
            try:
                await talk.say("run")
                await talk.hear("taking")
                self.given = Given.YES
            except MigrationRefused:
                self.given = Given.NO
                raise
            except ConnectionBroken as error:
                # The other side has closed the connection, in good order or because it was killed.
                # Had it sent "taking", that would have arrived first. If instead the link broke,
                # it may have sent it.
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno in (
                    errno.ECONNRESET,
                    errno.EPIPE,
                ):
                    self.given = Given.NO
                raise
        if self.given is not Given.YES:
            raise PagenetError(
                f"the other side did not confirm for {_TAKE_TIMEOUT:g} s that it takes the guest"
            )
