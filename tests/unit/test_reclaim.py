"""What a guest takes with it when it goes back: its half of the memory, over a stream, and the
state of its devices, in a qcow2 image."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from pagenet import ConnectionBroken, PagenetError, RemoteProtocolError
from pagenet.qemu import _half, _qcow2
from pagenet.qemu._half import Memory, present, receive_half, send_half
from pagenet.qemu._qcow2 import CLUSTER, TAG, snapshot_image
from pagenet.region import Block, Region, Run

PAGE = 4096


# ---- the half of the memory ----


class Wire:
    """A connection whose bytes are all here: what was sent, and what is to be received, in pieces
    of ``step`` bytes."""

    peer = "wire"

    def __init__(self, data: bytes = b"", step: int = 1 << 30) -> None:
        self.data, self.step = bytearray(data), step

    async def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        for buffer in buffers:
            self.data += buffer
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        count = min(len(buffer), len(self.data), self.step)
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count

    def close(self) -> None:
        pass


@contextmanager
def files_of(contents: Sequence[bytes]) -> Iterator[list[int]]:
    files = []
    try:
        for content in contents:
            files.append(os.memfd_create("half"))
            os.ftruncate(files[-1], len(content))
            os.pwrite(files[-1], content, 0)
        yield files
    finally:
        for file in files:
            os.close(file)


def content_of(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


REGION = Region([Block("a", 70 * PAGE), Block("b", 1 << 22, 1 << 21)])
THERE = [
    b"".join(bytes([number % 5]) * PAGE for number in range(70)),
    os.urandom(1 << 21) + bytes(1 << 21),
]
MISSING = [Run(0, 3), Run(10, 1), Run(69, 1), Run(71, 1)]


def merged(here: Sequence[bytes], missing: Sequence[Run]) -> list[bytes]:
    expected = [bytearray(content) for content in THERE]
    for run in missing:
        index = REGION.block_index(run.first)
        start = REGION.offset_of_page(run.first) - REGION.offsets[index]
        end = start + REGION.size_of(run)
        expected[index][start:end] = here[index][start:end]
    return [bytes(content) for content in expected]


async def received(wire: Wire, files: Sequence[int]) -> tuple[int, int]:
    with closing(Memory(files, REGION)) as memory:
        return await receive_half(wire, REGION, memory.write)


async def sent(missing: Sequence[Run] = MISSING) -> bytes:
    wire = Wire()
    with files_of(THERE) as files:
        await send_half(wire, files, REGION, missing)
    return bytes(wire.data)


@pytest.mark.parametrize("step", [1 << 30, 7])
async def test_both_halves_make_a_whole(step: int) -> None:
    here = [os.urandom(70 * PAGE), os.urandom(1 << 22)]
    with files_of(here) as files:
        _, came = await received(Wire(await sent(), step), files)
        assert [content_of(file) for file in files] == merged(here, MISSING)
    assert 0 < came < REGION.size


@given(st.sets(st.integers(0, 71)))
def test_present_is_what_is_not_missing(pages: set[int]) -> None:
    missing = [Run(page, 1) for page in sorted(pages)]
    found = set()
    for index, offset, size in present(REGION, missing):
        page_size = REGION.blocks[index].page_size
        first = REGION.first_pages[index] + offset // page_size
        found |= set(range(first, first + size // page_size))
    assert found == set(range(REGION.pages)) - pages


async def test_zeros_stay_holes() -> None:
    with files_of([bytes(70 * PAGE), b""]) as files:
        os.ftruncate(files[1], 1 << 22)
        await received(Wire(await sent([Run(0, 70), Run(70, 1)])), files)
        assert os.fstat(files[1]).st_blocks == 0


async def test_truncated() -> None:
    whole = await sent()
    for end in (0, 1, 15, 16, 17, 5000, len(whole) - 1):
        with (
            files_of([bytes(70 * PAGE), bytes(1 << 22)]) as files,
            pytest.raises(ConnectionBroken),
        ):
            await received(Wire(whole[:end]), files)


HEAD = struct.Struct("<IIQ")
END = HEAD.pack((1 << 32) - 1, 0, 0)
ZERO = 1 << 31


@pytest.mark.parametrize(
    "pieces",
    [
        [(2, PAGE, 0)],  # no such block
        [(0, PAGE, 70 * PAGE)],  # behind the end of it
        [(0, 2 * PAGE, 69 * PAGE)],
        [(0, PAGE, (1 << 64) - PAGE)],
        [(0, PAGE, 1)],  # no page begins there
        [(0, 100, 0)],
        [(0, 0, 0)],
        [(1, (256 << 10) + PAGE, 0)],  # longer than a piece may be
        [(0, PAGE, PAGE), (0, PAGE, 0)],  # backwards
        [(0, PAGE, 0), (0, PAGE, 0)],
        [(1, PAGE, 0), (0, PAGE, 0)],
    ],
)
async def test_pieces_that_do_not_fit(pieces: list[tuple[int, int, int]]) -> None:
    said = b"".join(HEAD.pack(block, size | ZERO, offset) for block, size, offset in pieces)
    with (
        files_of([bytes(70 * PAGE), bytes(1 << 22)]) as files,
        pytest.raises(RemoteProtocolError, match="which do not fit"),
    ):
        await received(Wire(said + END), files)


@given(st.binary(max_size=100))
def test_garbage(data: bytes) -> None:
    async def receive() -> None:
        with (
            files_of([bytes(70 * PAGE), bytes(1 << 22)]) as files,
            suppress(RemoteProtocolError, ConnectionBroken),
        ):
            await received(Wire(data), files)

    trio.run(receive)


async def test_memory_that_is_too_short() -> None:
    with (
        files_of([THERE[0][:-PAGE], THERE[1]]) as files,
        pytest.raises(PagenetError, match="has become shorter"),
    ):
        await send_half(Wire(), files, REGION, [])
    with (
        files_of([b"", bytes(1 << 22)]) as files,
        pytest.raises(PagenetError, match="cannot write to the guest's memory"),
    ):
        await received(Wire(await sent()), files)


async def test_peer_that_does_not_go_on(autojump_clock: trio.testing.MockClock) -> None:
    class Silent(Wire):
        async def receive_into(self, buffer: memoryview) -> int:
            await trio.sleep_forever()
            return 0

    with (
        files_of([bytes(70 * PAGE), bytes(1 << 22)]) as files,
        pytest.raises(ConnectionBroken, match="did not go on"),
    ):
        await received(Silent(), files)
    assert trio.current_time() >= _half._PATIENCE


# ---- the devices' state ----


def read_image(pieces: Iterator[tuple[int, bytes]]) -> tuple[bytes, int]:
    """The state in an image, by way of its tables, and the clusters that are in use."""
    image = bytearray()
    for offset, piece in pieces:
        image += bytes(max(0, offset + len(piece) - len(image)))
        image[offset : offset + len(piece)] = piece

    def offsets(at: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{count}Q", image, at)

    magic, version, bits, disk = struct.unpack_from(">4sI12xIQ", image)
    assert (magic, version, 1 << bits, disk) == (b"QFI\xfb", 3, CLUSTER, CLUSTER)
    counts_at, table_clusters, snapshots, list_at = struct.unpack_from(">QIIQ", image, 48)
    assert (table_clusters, snapshots) == (1, 1)
    level1, length, id_size, name_size = struct.unpack_from(">QIHH", image, list_at)
    extra = struct.unpack_from(">I", image, list_at + 36)[0]
    size = struct.unpack_from(">Q", image, list_at + 40)[0]
    name = image[list_at + 40 + extra + id_size :][:name_size]
    assert name.decode() == TAG
    state = b""
    for level2 in offsets(level1, length)[1:]:
        for cluster in offsets(level2, CLUSTER // 8):
            state += bytes(image[cluster : cluster + CLUSTER]) if cluster else b""
    used = 0
    for block in offsets(counts_at, CLUSTER // 8):
        if block:
            used += sum(struct.unpack_from(f">{CLUSTER // 2}H", image, block))
    assert used == -(-len(image) // CLUSTER)
    return state[:size], used


@pytest.mark.parametrize("size", [1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 50 * CLUSTER + 7])
@pytest.mark.parametrize("entries", [8192, 4])  # of a table: small ones make many of them
def test_image(size: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qcow2, "_ENTRIES", entries)
    state = os.urandom(size)
    assert read_image(snapshot_image(state))[0] == state
