"""pagenet/snapshot/: what is read of a snapshot is what was in memory, however many layers it has;
or there is an error in one line."""

from __future__ import annotations

import os
import random
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fuzzing import Fuzz, is_one_line

from pagenet import PagenetError, SourceLost, UsageError
from pagenet.region import Run
from pagenet.snapshot import creating
from pagenet.snapshot.creating import Created, create_snapshot
from pagenet.snapshot.index import FRAME_PAGES, PAGE
from pagenet.snapshot.memory import SnapshotMemory
from pagenet.snapshot.objects import locate
from pagenet.snapshot.opened import open_snapshot
from pagenet.snapshot.reading import compare_snapshots, export_snapshot, verify_snapshot
from pagenet.source.memory import open_source

FRAME = FRAME_PAGES * PAGE


class Guest:
    """Memory that changes, and snapshots of it in a directory."""

    def __init__(self, directory: Path, pages: int, draw: random.Random | None = None) -> None:
        self.directory, self.pages = directory, pages
        self.draw = draw or random.Random(1)
        self.memory = bytearray(pages * PAGE)
        self.layers: list[bytes] = []

    def page(self) -> bytes:
        """Not zero; it can be compressed, or not."""
        few = self.draw.randbytes(32)
        return self.draw.choice([few * (PAGE // 32), self.draw.randbytes(PAGE)])

    def write(self, page: int, content: bytes | None = None) -> None:
        self.memory[page * PAGE : (page + 1) * PAGE] = content or self.page()

    def fill(self) -> None:
        for page in range(self.pages):
            self.write(page)

    def path(self, layer: int) -> str:
        return str(self.directory / f"layer{layer}")

    async def take(self, written: Sequence[int] | None = None, keep: bool = True) -> Created:
        """The next layer; ``written``: by a sparse file with these pages alone. ``keep``: what is
        in it is wanted later."""
        number = len(self.layers)
        file = self.directory / "memory"
        with file.open("wb") as out:
            out.truncate(self.pages * PAGE)
            for page in range(self.pages) if written is None else written:
                content = self.memory[page * PAGE : (page + 1) * PAGE]
                if any(content) or written is not None:
                    out.seek(page * PAGE)
                    out.write(content)
        base = self.path(number - 1) if number else None
        with open_source(file) as source:
            created = await create_snapshot(
                source, self.path(number), base, sparse=written is not None
            )
        self.layers.append(bytes(self.memory) if keep else b"")
        return created

    def objects(self) -> list[Path]:
        return sorted(self.directory.glob("*.frames"))


def read_all(spec: str, step: int = 16) -> bytes:
    memory = SnapshotMemory.open(spec)
    try:
        data = bytearray(memory.size)
        for at in range(0, len(data), step * PAGE):
            memory.read(at, memoryview(data)[at : at + step * PAGE])
        return bytes(data)
    finally:
        memory.close()


# ---- the same bytes ----


async def test_any_chain_of_layers_reads_as_the_memory_was(
    fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pick in fuzz.rounds(12):
        monkeypatch.setattr(creating, "_MOST_SMALL", pick.choice([0, 1, 64]))
        monkeypatch.setattr(creating, "_SMALL_PAGES", pick.choice([1, 64, 512]))
        monkeypatch.setattr(creating, "_MOST_MERGED", pick.choice([1, 2, 256]))
        directory = tmp_path / str(fuzz.done)
        directory.mkdir()
        guest = Guest(directory, pick.choice([1, 7, FRAME_PAGES, FRAME_PAGES * 2 + 100]), pick)
        for layer in range(pick.randint(1, 6)):
            written = set()
            for _ in range(pick.choice([0, 1, 3, 40])):
                first = pick.randrange(guest.pages)
                kind = pick.choice(["new", "zero", "same", "copy"])
                for page in range(first, min(first + pick.choice([1, 2, 300]), guest.pages)):
                    written.add(page)
                    if kind == "new":
                        guest.write(page)
                    elif kind == "zero":
                        guest.write(page, bytes(PAGE))
                    elif kind == "copy":
                        other = pick.randrange(guest.pages) * PAGE
                        guest.write(page, bytes(guest.memory[other : other + PAGE]))
            sparse = layer > 0 and pick.random() < 0.5
            created = await guest.take(sorted(written) if sparse else None)
            assert created.layers == layer + 1
            assert created.zero + created.same + created.new == guest.pages
        for number, expected in enumerate(guest.layers):
            assert read_all(guest.path(number), pick.choice([1, 3, 64])) == expected
            with open_snapshot(guest.path(number)) as snapshot:
                assert (await verify_snapshot(snapshot)).broken == 0
                await export_snapshot(snapshot, directory / "out")
            assert (directory / "out").read_bytes() == expected


async def test_pages_in_any_order_from_many_threads(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 3 * FRAME_PAGES)
    guest.fill()
    await guest.take()
    for page in range(0, guest.pages, 7):
        guest.write(page)
    await guest.take()
    memory, wrong = SnapshotMemory.open(guest.path(1)), []

    def read(seed: int) -> None:
        pages = list(range(guest.pages))
        random.Random(seed).shuffle(pages)
        for page in pages[:600]:
            into = memoryview(bytearray(PAGE))
            if not memory.read_nowait(page * PAGE, into):
                memory.read(page * PAGE, into)
            if into != guest.memory[page * PAGE : (page + 1) * PAGE]:
                wrong.append(page)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.close()
    assert not wrong


async def test_differences_are_those_of_the_bytes(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 2 * FRAME_PAGES + 9)
    guest.fill()
    await guest.take()
    for page in (0, 5, 6, 7, 700, guest.pages - 1):
        guest.write(page)
    guest.write(20, bytes(PAGE))
    await guest.take()
    with open_source(tmp_path / "memory") as source:  # the same memory without a base
        await create_snapshot(source, str(tmp_path / "alone"))

    async def differences(one: str, other: str) -> list[tuple[int, int]]:
        runs: list[Run] = []
        with open_snapshot(one) as left, open_snapshot(other) as right:
            count = await compare_snapshots(left, right, runs.append)
        assert count == sum(run.count for run in runs)
        return [(run.first, run.count) for run in runs]

    expected = [(0, 1), (5, 3), (20, 1), (700, 1), (guest.pages - 1, 1)]
    assert await differences(guest.path(0), guest.path(1)) == expected
    assert await differences(str(tmp_path / "alone"), guest.path(0)) == expected
    assert await differences(str(tmp_path / "alone"), guest.path(1)) == []


async def test_snapshot_of_a_snapshot(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 600)
    guest.fill()
    await guest.take()
    with open_source(f"ram=snapshot:{guest.path(0)}") as source:
        assert source.region.blocks[0].name == "ram"
        await create_snapshot(source, str(tmp_path / "again"))
    assert read_all(str(tmp_path / "again")) == guest.layers[0]


# ---- what it costs ----


async def test_changed_page_costs_a_page(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 4 * FRAME_PAGES)
    for page in range(guest.pages):
        guest.write(page, guest.draw.randbytes(PAGE))
    await guest.take()
    for page in (3, 900, 1700):  # in three frames of the base
        guest.write(page, guest.draw.randbytes(PAGE))
    created = await guest.take()
    assert (created.new, created.frames) == (3, 1)
    assert guest.objects()[0].stat().st_size != guest.objects()[1].stat().st_size
    assert min(path.stat().st_size for path in guest.objects()) == 3 * PAGE + 8
    assert created.bytes < 5 * PAGE + 100


async def test_nothing_changed_costs_an_index(tmp_path: Path) -> None:
    guest = Guest(tmp_path, FRAME_PAGES)
    guest.fill()
    await guest.take()
    created = await guest.take()
    assert (created.new, created.frames, len(guest.objects())) == (0, 0, 1)


async def test_zeros_cost_nothing(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 8 * FRAME_PAGES)
    guest.write(5)
    await guest.take()
    assert (tmp_path / "layer0.snapshot").stat().st_size < 4300
    assert guest.objects()[0].stat().st_size <= PAGE + 8


async def test_equal_frames_are_stored_once(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 4 * FRAME_PAGES)
    guest.fill()
    guest.memory[2 * FRAME : 3 * FRAME] = guest.memory[:FRAME]
    created = await guest.take()
    assert (created.frames, created.equal) == (4, 1)
    guest.memory[3 * FRAME : 4 * FRAME] = guest.memory[:FRAME]  # and as in the base
    created = await guest.take()
    assert (created.frames, created.equal, len(guest.objects())) == (1, 1, 1)
    assert read_all(guest.path(1)) == guest.memory


async def test_deep_layer_names_its_objects_itself(tmp_path: Path) -> None:
    """No other index is read, and every frame once, however many layers there are."""
    guest = Guest(tmp_path, 2 * FRAME_PAGES)
    guest.fill()
    await guest.take()
    for _ in range(20):
        written = sorted(guest.draw.sample(range(guest.pages), 3))
        for page in written:
            guest.write(page)
        await guest.take(written)
    for number in range(20):
        os.unlink(guest.path(number) + ".snapshot")
    snapshot = open_snapshot(guest.path(20))
    assert snapshot.index.frames <= 2 + 20
    memory = SnapshotMemory(snapshot, owns=True)
    for frame in range(snapshot.index.frames):  # a page of each brings all of its pages
        page = next(snapshot.index.runs_of(frame)).first
        memory.read(page * PAGE, memoryview(bytearray(PAGE)))
    for path in guest.objects():
        path.unlink()
    data = bytearray(memory.size)
    for at in range(0, len(data), 16 * PAGE):
        memory.read(at, memoryview(data)[at : at + 16 * PAGE])
    memory.close()
    assert data == guest.memory


async def test_many_layers_are_not_many_reads(tmp_path: Path) -> None:
    """Frames of few pages are merged, so that there are 64 of them and one more at most."""
    guest = Guest(tmp_path, 2 * FRAME_PAGES)
    guest.fill()
    await guest.take()
    stored = 0
    for _ in range(140):
        written = sorted(guest.draw.sample(range(guest.pages), 2))
        for page in written:
            guest.write(page, guest.draw.randbytes(PAGE))
        stored += (await guest.take(written)).frames
        with open_snapshot(guest.path(len(guest.layers) - 1)) as snapshot:
            assert snapshot.index.frames <= 2 + 140 // 64 + 65
            assert (await verify_snapshot(snapshot)).broken == 0
    assert stored == 140 + 2
    assert read_all(guest.path(140)) == guest.memory
    assert read_all(guest.path(70)) == guest.layers[70]


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_chain_of_a_thousand_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First touch and restore of the last layer beside those of the first, in turns: the median of
    their ratios."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    guest = Guest(tmp_path, 128 * FRAME_PAGES)
    guest.fill()
    await guest.take()
    for _ in range(999):
        written = sorted(guest.draw.sample(range(guest.pages), 8))
        for page in written:
            guest.write(page)
        await guest.take(written, keep=False)

    def touch(spec: str) -> None:
        into = memoryview(bytearray(PAGE))
        memory = SnapshotMemory.open(spec)
        memory.read(guest.draw.randrange(guest.pages) * PAGE, into)
        memory.close()

    into = memoryview(bytearray(4 << 20))  # the most that a destination asks for at a time

    def restore(spec: str) -> None:
        memory = SnapshotMemory.open(spec)
        for at in range(0, memory.size, len(into)):
            memory.read(at, into)
        memory.close()

    def seconds(work: Callable[[str], None], layer: int) -> float:
        began = time.perf_counter()
        work(guest.path(layer))
        return time.perf_counter() - began

    with open_snapshot(guest.path(999)) as snapshot, capsys.disabled():
        index = snapshot.index
        print(
            f"\n1,000 layers: {index.frames} frames in {len(index.objects)} objects,"
            f" {index.runs} runs"
        )
        for work, times in ((touch, 101), (restore, 11)):
            pairs = [(seconds(work, 999), seconds(work, 0)) for _ in range(times)]
            ratio = statistics.median(many / one for many, one in pairs)
            many, one = (statistics.median(each) * 1000 for each in zip(*pairs, strict=True))
            print(f"{work.__name__}: {many:.2f} ms, of one layer {one:.2f} ms, ratio {ratio:.3f}")
    assert read_all(guest.path(999)) == guest.memory


# ---- what is missing or broken ----


@pytest.fixture
async def guest(tmp_path: Path) -> Guest:
    made = Guest(tmp_path, 2 * FRAME_PAGES)
    made.fill()
    await made.take()
    return made


def check_lost(spec: str, page: int, words: str) -> None:
    memory = SnapshotMemory.open(spec)
    into = memoryview(bytearray(PAGE))
    for _ in range(2):  # and it stays so
        with pytest.raises(SourceLost) as lost:
            memory.read(page * PAGE, into)
        assert words in str(lost.value)
        assert is_one_line(str(lost.value))
        assert not memory.read_nowait(page * PAGE, into)
    memory.close()


async def check_unusable(spec: str, out: Path, words: str) -> None:
    """Neither verified nor exported."""
    with open_snapshot(spec) as snapshot:
        flaws = await verify_snapshot(snapshot)
        assert flaws.broken
        assert words in flaws.first
        with pytest.raises(SourceLost, match=words):
            await export_snapshot(snapshot, out)
    assert not out.exists()


async def test_missing_object(guest: Guest) -> None:
    guest.objects()[0].unlink()
    check_lost(guest.path(0), 0, "object")
    check_lost(guest.path(0), 0, "is missing")
    await check_unusable(guest.path(0), guest.directory / "out", "is missing")


async def test_truncated_object(guest: Guest) -> None:
    path = guest.objects()[0]
    os.truncate(path, path.stat().st_size - 1)
    check_lost(guest.path(0), guest.pages - 1, "ends at byte")
    await check_unusable(guest.path(0), guest.directory / "out", "ends at byte")


async def test_object_that_is_no_file(guest: Guest) -> None:
    path = guest.objects()[0]
    path.unlink()
    os.mkfifo(path)  # nobody waits for its writer
    check_lost(guest.path(0), 0, "it is not a regular file")
    path.unlink()
    path.mkdir()
    check_lost(guest.path(0), 0, "it is not a regular file")


@pytest.mark.parametrize("compressible", [True, False])
async def test_no_changed_byte_is_ever_read(compressible: bool, tmp_path: Path, fuzz: Fuzz) -> None:
    guest = Guest(tmp_path, 20)
    for page in range(guest.pages):
        content = guest.draw.randbytes(32) * (PAGE // 32)
        guest.write(page, content if compressible else guest.draw.randbytes(PAGE))
    await guest.take()
    path = guest.objects()[0]
    stored = path.read_bytes()
    for pick in fuzz.rounds(60):
        broken = bytearray(stored)
        broken[pick.randrange(len(stored))] ^= 1 << pick.randrange(8)
        path.write_bytes(broken)
        with open_snapshot(guest.path(0)) as snapshot:
            try:
                pages = snapshot.read_frame(0, bytes)
            except SourceLost:
                assert (await verify_snapshot(snapshot)).broken == 1
            else:  # an LZ4 block may say the same in other words
                assert pages == guest.memory


async def test_another_frame_of_the_same_length_is_found_by_its_digest(guest: Guest) -> None:
    """Its checksum is right, as that of another object under the name may be."""
    other = Guest(guest.directory / "other", 2 * FRAME_PAGES)
    other.directory.mkdir()
    for memory in (guest, other):  # incompressible: so the lengths are equal
        memory.memory[:] = os.urandom(len(memory.memory))
        memory.layers.clear()
        await memory.take()
    with open_snapshot(guest.path(0)) as snapshot:
        other.objects()[0].replace(guest.directory / snapshot.index.objects[0])
    with open_snapshot(guest.path(0)) as snapshot:
        flaws = await verify_snapshot(snapshot)
    assert flaws.broken == flaws.frames == 2
    assert "digest" in flaws.first


async def test_broken_index(guest: Guest) -> None:
    path = Path(guest.path(0) + ".snapshot")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="is broken: it ends at byte"):
        open_snapshot(guest.path(0))
    with pytest.raises(UsageError, match="is broken: it ends at byte"):
        open_source(f"snapshot:{guest.path(0)}")


async def test_no_room_for_unpacked_pages(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/null")
    with pytest.raises(SourceLost, match="no room for its pages in /dev/null"):
        open_source(f"snapshot:{guest.path(0)}")
    monkeypatch.setenv("TMPDIR", str(guest.directory))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        with pytest.raises(SourceLost, match=r"no room for its pages in .* File too large"):
            open_source(f"snapshot:{guest.path(0)}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- what cannot be made ----


@pytest.mark.parametrize(("spec", "words"), [
    ("", "a name has"),
    ("/", "a name has"),
    ("/tmp/..", "a name has"),
    ("/tmp/.hidden", "a name has"),
    ("/tmp/" + "x" * 60, "a name has"),
    ("/tmp/a b", "a name has"),
    ("file://host/tmp/name", "name it as DIR/NAME, file:///DIR/NAME or s3://BUCKET/PREFIX/NAME"),
    ("ftp://host/tmp/name", "name it as DIR/NAME, file:///DIR/NAME or s3://BUCKET/PREFIX/NAME"),
    ("s3://bucket/.x", "a name has"),
    ("s3://name", "name it as s3://BUCKET/PREFIX/NAME"),
])  # fmt: skip
def test_names_that_are_none(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        locate(spec)


@pytest.mark.parametrize(
    "spec", ["/a/b", "/a/b.snapshot", "file:///a/b", "file://localhost/a/b.snapshot", "file:/%2F"]
)
def test_names(spec: str) -> None:
    if spec == "file:/%2F":
        with pytest.raises(UsageError):
            locate(spec)
    else:
        assert locate(spec) == ("/a", "b.snapshot")


async def create(guest: Guest, target: str, base: str | None = None, sparse: bool = False) -> str:
    with open_source(guest.directory / "memory") as source, pytest.raises(PagenetError) as refused:
        await create_snapshot(source, target, base, sparse)
    assert is_one_line(str(refused.value))
    return str(refused.value)


async def test_refused_without_a_trace(guest: Guest) -> None:
    target = str(guest.directory / "new")
    (guest.directory / "elsewhere").mkdir()
    here = sorted(guest.directory.iterdir())
    assert "cannot write the snapshot" in await create(guest, str(guest.directory / "no/new"))
    assert "cannot open snapshot" in await create(guest, target, str(guest.directory / "none"))
    assert "name that too" in await create(guest, target, sparse=True)
    elsewhere = str(guest.directory / "elsewhere/new")
    assert "is not in" in await create(guest, elsewhere, guest.path(0))
    os.truncate(guest.directory / "memory", PAGE)
    assert "has 4194304 bytes, and the memory 4096" in await create(guest, target, guest.path(0))
    guest.objects()[0].rename(guest.directory / "elsewhere" / "away")
    os.truncate(guest.directory / "memory", guest.pages * PAGE)
    assert "is missing" in await create(guest, target, guest.path(0))
    assert {path.name for path in guest.directory.iterdir()} <= {path.name for path in here}


async def test_memory_that_changes_makes_no_snapshot(guest: Guest) -> None:
    def change(done: int) -> None:
        os.utime(guest.directory / "memory", ns=(1, 1))

    target = str(guest.directory / "new")
    with (
        open_source(guest.directory / "memory") as source,
        pytest.raises(SourceLost, match="was changed"),
    ):
        await create_snapshot(source, target, on_progress=change)
    assert not (guest.directory / "new.snapshot").exists()
    assert len(guest.objects()) == 1


async def test_several_blocks_are_no_snapshot(guest: Guest) -> None:
    path = guest.directory / "memory"
    with open_source(path, path) as source, pytest.raises(UsageError, match="one block"):
        await create_snapshot(source, str(guest.directory / "new"))


async def test_identity_is_that_of_the_content(guest: Guest, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in guest.directory.iterdir():
        if path.is_file():
            (copies / path.name).write_bytes(path.read_bytes())
    await guest.take()

    def identities() -> Iterator[bytes]:
        for spec in (guest.path(0), str(copies / "layer0"), guest.path(1)):
            with open_source(f"snapshot:{spec}") as source:
                yield source.identity

    here, copy, later = identities()
    assert here == copy != later
