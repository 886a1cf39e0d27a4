"""Owners that connect are greeted: what they touch first is answered before anybody attaches them,
and nothing that they do meanwhile is lost."""

from __future__ import annotations

import array
import json
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from processes import PAGE, check_verified, run_server, run_workload, write_pattern

from pagenet import _native
from pagenet.destination.caching import HostCache, caching
from pagenet.destination.greeting import Greeter, Greeting
from pagenet.guard import guarding
from pagenet.uffd import CacheMemory, ConnectedOwner, Keeper, UffdListener

pytestmark = [pytest.mark.usefixtures("uffd_permitted"), pytest.mark.native]

SIZE = 4 << 20
MEMORY = ("--size", SIZE, "--zero-every", 8, "--order", "random")
KEY = ".test"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("greeting") / "source", SIZE, zero_every=8))


class Door:
    """A socket on which owners are greeted from a cache."""

    def __init__(self, cache: HostCache, greeter: Greeter, path: Path) -> None:
        self.cache, self.greeter, self.path = cache, greeter, path
        self._listener = UffdListener(path)
        greeter.open(KEY, self._listener.fileno())
        greeter.serve(KEY, cache.native, cache.file)
        greeter.allow(1, 1000)

    async def arrival(self) -> tuple[str, socket.socket, Greeting | None]:
        while True:
            for found in self.greeter.take():
                return found
            await self.greeter.wait()

    async def greeted(self) -> tuple[socket.socket, Greeting]:
        _, sock, greeting = await self.arrival()
        assert greeting is not None
        greeting.use(self.cache.in_use())
        return sock, greeting

    async def fill(self, sock: socket.socket, greeting: Greeting) -> None:
        """Fill the owner's memory until it is complete."""
        sock.setblocking(False)
        owner = ConnectedOwner(trio.socket.from_stdlib_socket(sock), allocate=False)
        async with self.cache.fill(owner, greeting) as transfer:
            await transfer.wait_complete()

    def close(self) -> None:
        self.greeter.shut(KEY)
        self._listener.close()
        self.greeter.close()


@asynccontextmanager
async def cached(source: str, background: str = "hot") -> AsyncIterator[HostCache]:
    crew = _native.Crew(1)
    try:
        async with (
            run_server(source) as (_, uri),
            caching(uri, CacheMemory(), crew, background=background) as cache,
        ):
            yield cache
    finally:
        crew.close()


@asynccontextmanager
async def greeting_door(
    source: str, directory: Path, background: str = "hot", keeper: Keeper | None = None
) -> AsyncIterator[Door]:
    async with cached(source, background) as cache:
        with closing(Door(cache, Greeter(keeper, 0), directory / "owners")) as door:
            yield door


@pytest.mark.parametrize("memory", ["anonymous", "shared"])
@pytest.mark.parametrize("background", ["hot", "off"])
async def test_touches_are_answered_before_anybody_attaches_the_owner(
    background: str, memory: str, source: str, tmp_path: Path
) -> None:
    """Those of pages that the cache does not have yet, too."""
    async with greeting_door(source, tmp_path, background) as door:
        words = (*MEMORY, "--memory", memory, "--touches", 100, "--verify", "touched")
        async with run_workload(door.path, *words) as owner:
            sock, greeting = await door.greeted()
            with closing(greeting), sock:
                await check_verified(owner)
                placed, removals = greeting.end()
    assert len(placed) == 100
    assert len({page.offset for page in placed}) == 100
    assert all(page.offset % PAGE == 0 and 0 <= page.offset < SIZE for page in placed)
    assert all(page.waited > 0 for page in placed)
    assert removals == []


async def test_what_was_answered_is_counted(source: str, tmp_path: Path) -> None:
    async with greeting_door(source, tmp_path, "off") as door:
        words = (*MEMORY, "--touches", 50, "--wait-complete", "--verify", "touched")
        async with run_workload(door.path, *words) as owner:
            sock, greeting = await door.greeted()
            await trio.sleep(0.3)  # for the greeting to answer most of them
            sock.setblocking(False)
            connected = ConnectedOwner(trio.socket.from_stdlib_socket(sock), allocate=False)
            filling = door.cache.fill(connected, greeting, fill="touched", prefetch=(0, 0))
            async with filling as transfer:
                with trio.fail_after(20):
                    while transfer.statistics().demand.faults < 50:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                demand = transfer.statistics().demand
                assert (demand.pages, demand.faults, demand.latency.count) == (50, 50, 50)
            await owner.kill()


@pytest.mark.parametrize("delay", [0, 0.02, 0.2])
async def test_memory_that_is_given_up_while_it_is_greeted(
    delay: float, source: str, tmp_path: Path
) -> None:
    """It reads as zeros, also where nobody but the greeting has read that it was given up."""
    async with greeting_door(source, tmp_path) as door:
        words = (*MEMORY, "--remove-share", 30, "--think-us", 200, "--wait-complete")
        async with run_workload(door.path, *words) as owner:
            sock, greeting = await door.greeted()
            await trio.sleep(delay)
            await door.fill(sock, greeting)
            await check_verified(owner)


async def test_what_was_given_up_outlives_the_process(source: str, tmp_path: Path) -> None:
    """The guard keeps it. Whoever comes next finds it, until it is in the map of pages."""
    async with guarding() as guard, greeting_door(source, tmp_path, keeper=guard) as door:
        guard.hold("listener" + KEY, door._listener.fileno())
        door.greeter.allow(1, 1)
        # It touches nothing: while memory is given up, COPY fails, which ends a greeting.
        words = ("--size", SIZE, "--order", "none", "--remove-share", 30, "--wait-complete")
        async with run_workload(door.path, *words) as owner:
            name, sock, greeting = await door.arrival()
            assert greeting is not None
            with closing(greeting), sock:
                greeting.use(door.cache.in_use())
                note = _native.Note(door.greeter.notes)
                with trio.fail_after(20):
                    while not (removals := note.removals()):  # noqa: ASYNC110
                        await trio.sleep(0.01)
                with closing(Greeter(guard, 1)) as another:
                    left = another.left_of(name)
                    assert left is not None
                    assert left.end() == ([], removals)
                    left.close()
                    assert another.left_of(name) is None
                with closing(Greeter(guard, 1)) as another:
                    assert another.left_of(name) is None
            await owner.kill()


async def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def handshake(**more: object) -> bytes:
    mapping = {"base_host_virt_addr": 1 << 30, "size": SIZE, "offset": 0, "page_size": 4096}
    return json.dumps([{**mapping, **more}]).encode()


ODD = {
    "no JSON": b"nonsense]",
    "not whole": handshake()[:-9],
    "another page size": handshake(page_size=2 << 20),
    "past the end": handshake(offset=PAGE),
    "past all ends": handshake(offset=2**64 - PAGE, size=2 * PAGE),
    "a number that is too large": handshake(size=2**64),
    "a fraction": handshake(size=4096.5),
    "a negative number": handshake(size=-4096),
    "nothing": b"[]",
    "an object": b'{"want": "file"}',
    "an escape": b'[{"\\u0073ize": 4096}]',
    "more than it reads": b"[" + b" " * (20 << 10) + b"]",
    "a zero byte": b"[\0]",
}


@pytest.mark.parametrize("message", ODD.values(), ids=ODD)
@pytest.mark.parametrize("descriptors", [0, 1, 3])
async def test_odd_handshakes_are_left_to_others(
    descriptors: int, message: bytes, source: str, tmp_path: Path
) -> None:
    """They stay in the socket."""
    async with greeting_door(source, tmp_path) as door:
        uffds = [
            _native.uffd_open("/dev/userfaultfd", user_mode_only=True) for _ in range(descriptors)
        ]
        with await connect(door.path) as owner:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", uffds))]
            owner.sendmsg([message], control if uffds else [])
            sock, greeting = await door.greeted()
            with closing(greeting), sock:
                assert sock.recv(len(message), socket.MSG_PEEK) == message
                assert greeting.end() == ([], [])
        for fd in uffds:
            os.close(fd)


async def test_random_handshakes(source: str, tmp_path: Path) -> None:
    """With a descriptor that is no userfaultfd, or one over which nothing comes."""
    chance = random.Random(1)
    async with greeting_door(source, tmp_path) as door:
        for number in range(300):
            message = bytearray(handshake())
            for _ in range(chance.randint(0, 4)):
                message[chance.randrange(len(message))] = chance.randrange(1, 256)
            read, write = os.pipe()
            fds = array.array("i", [read])
            with await connect(door.path) as owner:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                for part in (message[: number % 50], message[number % 50 :]):
                    owner.sendmsg([part or b"["], control)
                sock, greeting = await door.greeted()
                with closing(greeting), sock:
                    assert greeting.end() == ([], [])
            os.close(read)
            os.close(write)


async def test_more_owners_than_are_greeted(source: str, tmp_path: Path) -> None:
    async with greeting_door(source, tmp_path) as door:
        door.greeter.allow(1, _native.GREETINGS + 11)
        owners = [await connect(door.path) for _ in range(_native.GREETINGS + 10)]
        came = [await door.arrival() for _ in owners]
        greetings = [greeting for _, _, greeting in came if greeting is not None]
        assert len(greetings) == _native.GREETINGS
        for _, sock, _ in came:
            sock.close()
        for greeting in greetings:
            greeting.close()
        for owner in owners:
            owner.close()
        with await connect(door.path):
            sock, greeting = await door.greeted()
            greeting.close()
            sock.close()


async def test_no_more_come_than_are_allowed(source: str, tmp_path: Path) -> None:
    async with greeting_door(source, tmp_path) as door:
        door.greeter.allow(1, 3)
        owners = [await connect(door.path) for _ in range(5)]
        came = [await door.arrival() for _ in range(3)]
        assert door.greeter.wants_places
        with trio.move_on_after(0.2):
            came.append(await door.arrival())
        assert len(came) == 3
        door.greeter.allow(4, 2)
        came += [await door.arrival() for _ in range(2)]
        assert [name for name, _, _ in came] == [f"owner.{n}{KEY}" for n in range(1, 6)]
        for _, sock, greeting in came:
            sock.close()
            if greeting is not None:
                greeting.close()
        for owner in owners:
            owner.close()
