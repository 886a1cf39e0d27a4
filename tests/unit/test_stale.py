"""What a tracked source may say of its rounds, and when: a destination that copies, in virtual
time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from pagenet import Block, Region, RemoteProtocolError, Run, UsageError, pull, transport
from pagenet.background.pacing import Background
from pagenet.background.schedule import make_schedule
from pagenet.destination.copying import Copying
from pagenet.destination.filling import Filling
from pagenet.protocol import TRACKED, Channel, Class, Hello, Message, Pause, Role, Stale
from pagenet.residency import Residency, State
from pagenet.session import MessageStream
from pagenet.target import Fault, Outcome, Target
from pagenet.testing import MemoryTransport
from pagenet.transport import Listener

PAGES = 20
PAGE = 4096


class Memory:
    """Shared memory that nobody touches: a :class:`~pagenet.target.Target`."""

    event_fd = None

    def __init__(self, placement: str = "continue") -> None:
        self.placement = placement
        self.region = Region([Block("ram", PAGES * PAGE)])
        self.woken: list[Run] = []

    def scope(self) -> list[Run]:
        return [Run(0, PAGES)]

    def open_residency(self, source: bytes) -> Residency:
        return Residency(PAGES)

    def write(self, run: Run, data: memoryview | None) -> bool:
        return True

    def publish(self, run: Run, *, again: bool = False) -> Outcome:
        return Outcome(run.count)

    place = publish

    def settle(self, page: int | None, fault: Fault) -> bool:
        return True

    def wake(self, run: Run) -> None:
        self.woken.append(run)

    def close(self, missing: object) -> None:
        """There is nothing to close."""


class Lanes:
    def __init__(self) -> None:
        self.withheld: list[bool] = []
        self.given_back = 0

    def withhold(self, withhold: bool) -> None:
        self.withheld.append(withhold)

    async def give_back(self) -> None:
        self.given_back += 1


class Session:
    """What the source was told: ``(round, missing)``."""

    def __init__(self) -> None:
        self.paused: list[tuple[int, int]] = []

    async def say_paused(self, round_: int, missing: int) -> None:
        await trio.lowlevel.checkpoint()
        self.paused.append((round_, missing))


class Copier:
    def __init__(self) -> None:
        self.memory, self.lanes, self.session = Memory(), Lanes(), Session()
        self.filling = Filling(self.memory)  # type: ignore[arg-type] # nobody touches it
        self.background = Background(None, begun=False)
        self.background.set_max_bandwidth(1000)
        self.copying = Copying(
            self.filling,
            self.memory.region,
            self.lanes,  # type: ignore[arg-type]
            self.background,
            self.session,  # type: ignore[arg-type]
            lambda: make_schedule("hot", self.filling.region, self.filling.residency),
        )

    def bring(self, first: int = 0, count: int = PAGES) -> None:
        for part in list(self.filling.claim(Run(first, count))):
            pages = memoryview(bytes(part.count * PAGE))
            self.filling.arrived(Class.BACKGROUND, part, pages, wire_bytes=0)

    def name(self, *pages: int, **fields: bool) -> None:
        bits = sum(1 << page for page in pages).to_bytes(3, "little")
        more, frozen = fields.get("more", False), fields.get("frozen", False)
        self.copying.hear(Stale(self.copying.round, 0, bits, more, frozen))

    @property
    def missing(self) -> set[int]:
        residency = self.filling.residency
        return {page for page in range(PAGES) if residency.state(page) is State.MISSING}


@pytest.fixture
async def copier() -> AsyncIterator[Copier]:
    copier = Copier()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copier.copying.run)
        yield copier
        nursery.cancel_scope.cancel()
    copier.filling.close()


async def test_it_asks_for_everything_in_line(autojump_clock: MockClock, copier: Copier) -> None:
    assert copier.background.runs, "whatever --start-background says"
    assert copier.background.next_run_nowait(1 << 20) == Run(0, PAGES)
    assert copier.lanes.withheld == [True]
    assert copier.background.max_bandwidth == 1000
    await wait_all_tasks_blocked()
    assert copier.session.paused == []


async def test_round_is_over_when_no_page_is_missing_or_in_flight(
    autojump_clock: MockClock, copier: Copier
) -> None:
    copier.bring(0, PAGES - 1)
    await trio.sleep(0.01)
    (last,) = copier.filling.claim(Run(PAGES - 1, 1))
    await trio.sleep(0.01)
    assert copier.session.paused == []
    pages = memoryview(bytes(PAGE))
    copier.filling.arrived(Class.BACKGROUND, last, pages, wire_bytes=0)
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, 0)]
    assert copier.copying.round == 1


async def test_rounds(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring()
    await trio.sleep(0.01)
    copier.name(1, 2)
    assert copier.missing == {1, 2}
    assert copier.copying.round == 2
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, 0)]
    copier.bring()
    await trio.sleep(0.01)
    copier.name(7, frozen=True)
    assert copier.session.paused == [(1, 0), (2, 0)]
    assert copier.lanes.given_back == 2
    assert copier.copying.frozen.is_set()
    assert copier.missing == {7}
    assert copier.lanes.withheld == [True, False]
    assert copier.memory.woken == [Run(0, PAGES)]
    assert copier.background.max_bandwidth is None, "the limit is that of the rounds"
    assert copier.background.schedule is not None
    assert copier.background.schedule.name == "hot"
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, 0), (2, 0)], "no round follows the last"


async def test_nothing_stale_at_the_freeze_completes(
    autojump_clock: MockClock, copier: Copier
) -> None:
    copier.bring()
    await trio.sleep(0.01)
    assert not copier.filling.completed.is_set()
    copier.name(frozen=True)
    assert copier.filling.completed.is_set()


async def test_pause(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring(0, 5)
    (flying,) = copier.filling.claim(Run(5, 2))
    copier.copying.hear(Pause())
    await trio.sleep(0.01)
    assert copier.background.next_run_nowait(1 << 20) is None
    assert copier.session.paused == [], "two pages are in flight"
    pages = memoryview(bytes(2 * PAGE))
    copier.filling.arrived(Class.BACKGROUND, flying, pages, wire_bytes=0)
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, PAGES - 7)]
    copier.name(0, frozen=True)
    assert not copier.background.paused
    assert copier.missing == {0, *range(7, PAGES)}


async def test_pause_after_the_round_is_over(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring()
    await trio.sleep(0.01)
    copier.copying.hear(Pause())
    copier.copying.hear(Pause())
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, 0)]
    copier.name(3)
    assert copier.background.runs


async def test_stale_pages_in_several_messages(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring()
    await trio.sleep(0.01)
    copier.name(1, more=True)
    copier.name(2, more=True, frozen=True)  # the last message decides
    assert copier.copying.round == 1
    assert not copier.copying.frozen.is_set()
    await trio.sleep(0.01)
    assert copier.session.paused == [(1, 0)]
    copier.name(3)
    assert copier.copying.round == 2
    assert copier.missing == {1, 2, 3}


def refused(copier: Copier, message: Pause | Stale, reason: str) -> None:
    before = copier.missing
    with pytest.raises(RemoteProtocolError, match=reason):
        copier.copying.hear(message)
    assert copier.missing == before


async def test_stale_before_the_round_is_over(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring(0, 5)
    await trio.sleep(0.01)
    refused(copier, Stale(1, 0, b"\xff", False, False), "round 1, and round 1 is not over")
    refused(copier, Stale(1, 0, b"\xff", False, True), "round 1 is not over")


@pytest.mark.parametrize(
    ("number", "first", "reason"),
    [
        (0, 0, "pages of round 0, and round 1"),
        (2, 0, "pages of round 2, and round 1"),
        (2**64 - 1, 0, "and round 1 is not over"),
        (1, PAGES, "from page 20 on, of 20"),
        (1, 2**64 - 1, "from page 18446744073709551615 on, of 20"),
    ],
)
async def test_stale_that_fits_no_round(
    number: int, first: int, reason: str, autojump_clock: MockClock, copier: Copier
) -> None:
    copier.bring()
    await trio.sleep(0.01)
    refused(copier, Stale(number, first, b"\xff", False, True), reason)
    assert not copier.copying.frozen.is_set()


async def test_stale_of_a_round_twice(autojump_clock: MockClock, copier: Copier) -> None:
    copier.bring()
    await trio.sleep(0.01)
    copier.name(4)
    refused(copier, Stale(1, 0, b"\xff", False, False), "pages of round 1, and round 2")
    refused(copier, Stale(2, 0, b"\xff", False, False), "round 2 is not over")


@pytest.mark.parametrize("message", [Pause(), Stale(2, 0, b"\xff", False, False)])
async def test_words_after_the_last_round(
    message: Pause | Stale, autojump_clock: MockClock, copier: Copier
) -> None:
    copier.bring()
    await trio.sleep(0.01)
    copier.name(4, frozen=True)
    refused(copier, message, "speaks of rounds after the last one")


def test_memory_that_cannot_take_a_page_twice() -> None:
    memory, background = Memory("copy"), Background(None)
    filling = Filling(memory)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot take a page twice"):
        Copying(
            filling,
            memory.region,
            Lanes(),  # type: ignore[arg-type]
            background,
            Session(),  # type: ignore[arg-type]
            lambda: None,
        )
    filling.close()


class Absent:
    """An owner that does not come."""

    async def attach(self, region: Region) -> Target:
        await trio.sleep_forever()
        raise AssertionError


async def test_stale_before_the_owner_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept until the owner comes."""
    memory = MemoryTransport()
    monkeypatch.setitem(transport._transports, "memory", memory)
    words: list[Message] = [Pause(), Pause(), Stale(1, 0, b"\x01", True, False)]

    async def speak(listener: Listener) -> None:
        stream = MessageStream(await listener.accept())
        await stream.receive_hello(Role.DESTINATION)
        region, features = Region([Block("ram", PAGES * PAGE)]), frozenset({TRACKED})
        for message in [
            Hello(Role.SOURCE, Channel.CONTROL, bytes(16), b"", region, features=features),
            *words,
        ]:
            await stream.send(message)

    with await memory.listen(urlsplit("memory://source")) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak, listener)
            with pytest.raises(RemoteProtocolError, match="stale pages before a round is over"):
                async with pull("memory://source", Absent()):
                    raise AssertionError("not reached")


@given(
    st.lists(
        st.builds(Pause)
        | st.builds(
            Stale,
            st.integers(0, 4),
            st.sampled_from([0, 1, 7, PAGES - 1, PAGES, 2**64 - 1]),
            st.binary(min_size=1, max_size=4),
            st.booleans(),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_any_words(messages: list[Pause | Stale]) -> None:
    """Each is heeded or refused, and no page is shown before the freeze."""

    async def main() -> None:
        copier = Copier()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copier.copying.run)
            for message in messages:
                if not copier.copying.frozen.is_set():
                    copier.bring()
                    assert copier.filling.residency.done == 0
                await trio.sleep(0.01)
                with suppress(RemoteProtocolError):
                    copier.copying.hear(message)
            nursery.cancel_scope.cancel()
        copier.filling.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))
