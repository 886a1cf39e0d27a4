"""pagenet/heartbeat.py and pagenet/redialling.py, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from pagenet import ConnectionBroken, SourceUnreachable, UsageError
from pagenet.heartbeat import PATIENCE, SHORT_SILENCE, Heartbeat
from pagenet.nurseries import open_failing_nursery, running_beside
from pagenet.protocol import Alive, Failure, encode_message
from pagenet.redialling import PAUSE, dial_again
from pagenet.session import MessageStream
from pagenet.testing import MemoryConnection, memory_pair


async def read_all(stream: MessageStream) -> None:
    while await stream.receive() is not None:
        pass


def heartbeat(expects: bool = True) -> tuple[Heartbeat, MessageStream, MemoryConnection]:
    ours, theirs = memory_pair()
    stream = MessageStream(ours)
    return Heartbeat(stream, expects), stream, theirs


async def test_two_sides(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = (MessageStream(connection) for connection in memory_pair())
    hearts = [Heartbeat(stream, True) for stream in (ours, theirs)]
    with trio.move_on_after(1000) as scope:
        async with open_failing_nursery() as nursery:
            for heart, stream in zip(hearts, (ours, theirs), strict=True):
                nursery.start_soon(heart.run)
                nursery.start_soon(read_all, stream)
    assert scope.cancelled_caught
    assert not any(heart.is_silent for heart in hearts)


async def test_what_is_sent(autojump_clock: trio.testing.MockClock) -> None:
    heart, stream, peer = heartbeat()
    with trio.move_on_after(1.8):
        await heart.run()
    stream.connection.close()
    theirs = MessageStream(peer)
    assert [await theirs.receive() for _ in range(4)] == [Alive(), Alive(), Alive(), None]


async def test_silence(autojump_clock: trio.testing.MockClock) -> None:
    """It is noticed after SHORT_SILENCE, and ends the session after PATIENCE."""
    heart, stream, peer = heartbeat()
    began = trio.current_time()

    async def peer_speaks_once() -> None:
        with trio.fail_after(4):
            await heart.wait_silent()
        await trio.sleep_until(began + 5)
        assert heart.is_silent
        await peer.send(encode_message(Failure("any", "bytes")))
        await trio.sleep(0.5)
        assert not heart.is_silent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heart.wait_silent)
            await trio.sleep(0.25)
            await peer.send(encode_message(Failure("more", "bytes")))
        assert trio.current_time() - began == pytest.approx(5.75 + SHORT_SILENCE, abs=0.5)

    async with running_beside(read_all, stream), running_beside(peer_speaks_once):
        with pytest.raises(ConnectionBroken, match=r"has sent nothing for 10 s"):
            await heart.run()
    assert trio.current_time() - began == pytest.approx(5.75 + PATIENCE, abs=0.5)


async def test_doubt(autojump_clock: trio.testing.MockClock) -> None:
    """A session that is heard again is sound once a page has come, too, or TCP has sent again on
    each connection."""
    heart, stream, peer = heartbeat()
    pages = 0
    heart.count_lanes(lambda: pages)

    async def speak() -> None:
        while True:
            await peer.send(encode_message(Alive()))
            await trio.sleep(0.5)

    async with running_beside(read_all, stream), running_beside(heart.run):
        for page in (False, True):
            await heart.wait_silent()
            async with running_beside(speak):
                await trio.sleep(0.3)
                assert not heart.is_silent
                assert heart.is_doubtful
                pages += page
                began = trio.current_time()
                await heart.wait_sound()
            assert trio.current_time() - began == pytest.approx(0 if page else 1.1, abs=0.3)


async def test_pages_are_no_silence(autojump_clock: trio.testing.MockClock) -> None:
    """On a path that loses much, control may stand still while lanes do not."""
    heart, _, _ = heartbeat()
    pages = 0

    def received() -> int:
        return pages

    heart.count_lanes(received)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heart.run)
        for _ in range(30):
            await trio.sleep(0.7)
            pages += 1
            assert not heart.is_silent
        with trio.fail_after(SHORT_SILENCE + 0.5):
            await heart.wait_silent()
        nursery.cancel_scope.cancel()


async def test_our_own_stop_is_not_the_peers_silence(mock_clock: trio.testing.MockClock) -> None:
    """As if this process had been stopped for an hour."""
    heart, _, _ = heartbeat()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heart.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3600)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < heart.silent < SHORT_SILENCE
        nursery.cancel_scope.cancel()


async def test_a_peer_without_beats(autojump_clock: trio.testing.MockClock) -> None:
    heart, _, _ = heartbeat(expects=False)
    await heart.run()
    await trio.sleep(100)
    assert not heart.is_silent


# ---- dialling again ----


class Answer:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


Attempt = Callable[[], Awaitable[Answer]]


def attempts(*each: float | Exception) -> tuple[Attempt, list[Answer]]:
    """A dial whose attempts take so many seconds each, or fail; the last one goes on for ever."""
    left, answers = list(each), list[Answer]()

    async def dial() -> Answer:
        now = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(now, Exception):
            raise now
        await trio.sleep(now)
        answers.append(Answer())
        return answers[-1]

    return dial, answers


async def test_attempts_overlap(autojump_clock: trio.testing.MockClock) -> None:
    """The path swallows the first attempts, and the next one does not wait for their end."""
    dial, _ = attempts(100, 100, 0.01)
    began = trio.current_time()
    await dial_again(dial, lambda reason: None)
    assert trio.current_time() - began == pytest.approx(2 * PAUSE + 0.01)


async def test_reasons(autojump_clock: trio.testing.MockClock) -> None:
    dial, _ = attempts(SourceUnreachable("refused"), 100, 100, SourceUnreachable("no route"), 3)
    reasons: list[str] = []
    await dial_again(dial, reasons.append)
    assert reasons == ["refused", "no route"]
    dial, _ = attempts(*[100] * 20, 1)
    await dial_again(dial, reasons.append)
    assert reasons[2:]
    assert set(reasons[2:]) == {"no answer within 5 s"}


async def test_two_answers_at_once(autojump_clock: trio.testing.MockClock) -> None:
    dial, answers = attempts(1, 0.5, 100)
    found = await dial_again(dial, lambda reason: None)
    assert [answer.closed for answer in answers] == [answer is not found for answer in answers]
    assert not found.closed


async def test_errors_that_stay(autojump_clock: trio.testing.MockClock) -> None:
    dial, _ = attempts(UsageError("no such transport"))
    with pytest.raises(UsageError):
        await dial_again(dial, lambda reason: None)


async def test_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    dial, answers = attempts(100)
    with trio.move_on_after(20) as scope:
        await dial_again(dial, lambda reason: None)
    assert scope.cancelled_caught
    assert not answers
