"""pagenet/snapshot/index.py: an index is read as what was written, or refused in one line, whatever
is in it; native/snapshot.c under it."""

from __future__ import annotations

import gc
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fuzzing import Fuzz, is_one_line, mutated
from hypothesis import given
from hypothesis import strategies as st

from pagenet import UsageError
from pagenet._native import checksum
from pagenet.snapshot import index as module
from pagenet.snapshot.index import (
    FRAME_PAGES,
    PAGE,
    ZERO_FRAME,
    Frame,
    Index,
    Tables,
    decode_index,
    encode_index,
)

pytestmark = pytest.mark.native

MIB = 1 << 20
ID, BASE = bytes(range(16)), bytes(range(16, 32))
DIGEST = b"0123456789abcdef"


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def decode(data: bytes) -> Index:
    return decode_index(reader(data), "here")


def refusal(data: bytes) -> str:
    with pytest.raises(UsageError) as refused:
        decode(data)
    assert is_one_line(str(refused.value))
    return str(refused.value)


def tables(
    runs: list[tuple[int, int, int]],
    frames: list[tuple[int, int, int, int]] | None = None,
    objects: list[tuple[str, int]] | None = None,
) -> Tables:
    """Runs: pages, frame, page in it. Frames: object, offset, length, pages."""
    made = Tables()
    for name, size in [("a.frames", 1 << 30), ("b", 100)] if objects is None else objects:
        made.add_object(name, size)
    for object_, offset, length, pages in frames or []:
        made.add_frame(object_, offset, length, pages, DIGEST)
    for pages, frame, at in runs:
        made.pages += pages
        made.run_starts.append(pages)
        made.run_frames.append(frame)
        made.run_at.append(at)
    return made


def encoded(*args: Any) -> bytes:
    return encode_index(ID, BASE, 7, tables(*args))


FRAMES = [(0, 4096, 9000, 512), (1, 0, 100, 3)]
RUNS = [(100, 0, 0), (5, ZERO_FRAME, 0), (2, 1, 1), (412, 0, 100)]


def signed(data: bytes, offset: int, fields: bytes) -> bytes:
    """``data`` with other bytes in its header, and a header checksum to match."""
    header = bytearray(data[:PAGE])
    header[offset : offset + len(fields)] = fields
    header[8:16] = bytes(8)
    header[8:16] = checksum(header)
    return bytes(header) + data[PAGE:]


# ---- what was written ----


def test_what_was_written_is_read() -> None:
    index = decode(encoded(RUNS, FRAMES))
    assert (index.id, index.base, index.layers, index.pages) == (ID, BASE, 7, 519)
    assert (index.size, index.frames, index.runs) == (519 * PAGE, 2, 4)
    assert index.frame(1) == Frame("b", 0, 100, 3, DIGEST)
    assert [tuple(run) for run in index.stretches(0, 519)] == [
        (0, 100, 0, 0), (100, 5, ZERO_FRAME, 0), (105, 2, 1, 1), (107, 412, 0, 100),
    ]  # fmt: skip
    assert [tuple(run) for run in index.stretches(99, 10)] == [
        (99, 1, 0, 99), (100, 5, ZERO_FRAME, 0), (105, 2, 1, 1), (107, 2, 0, 100),
    ]  # fmt: skip
    assert sorted(tuple(run) for run in index.runs_of(0)) == [(0, 100, 0, 0), (107, 412, 0, 100)]


def test_memory_of_zeros_has_no_frames() -> None:
    index = decode(encoded([(1 << 22, ZERO_FRAME, 0)], [], []))
    assert [tuple(run) for run in index.stretches(5, 1)] == [(5, 1, ZERO_FRAME, 0)]


def test_runs_that_continue_each_other_are_one() -> None:
    made = Tables()
    for pages, frame, at in [
        (1, ZERO_FRAME, 0), (2, ZERO_FRAME, 0), (3, 0, 0), (4, 0, 3), (5, 0, 8),
    ]:  # fmt: skip
        made.add_run(pages, frame, at)
    assert list(made.run_starts) == [3, 7, 5]
    assert made.pages == 15


@st.composite
def made_tables(draw: st.DrawFn) -> Tables:
    """Most are such as a snapshot has; some are not."""
    small = st.integers(0, 5)
    frames = draw(st.lists(st.tuples(
        st.integers(0, 2), small | st.just(2**64 - 1), small.map(lambda n: n + 7),
        st.integers(0, 4) | st.integers(511, 513),
    ), max_size=4))  # fmt: skip
    runs = draw(
        st.lists(st.tuples(small, st.integers(0, 4) | st.just(ZERO_FRAME), small), max_size=8)
    )
    return tables(runs, frames)


def makes_sense(made: Tables) -> bool:
    """By the description of the format, slowly."""
    frames = list(
        zip(
            made.frame_objects, made.frame_offsets, made.frame_lengths, made.frame_pages,
            strict=True,
        )
    )  # fmt: skip
    for object_, offset, length, pages in frames:
        if not (object_ < len(made.object_names) and 1 <= pages <= FRAME_PAGES):
            return False
        if not (8 < length <= 8 + pages * PAGE and offset + length <= made.object_sizes[object_]):
            return False
    for pages, frame, at in zip(made.run_starts, made.run_frames, made.run_at, strict=True):
        if pages == 0 or (frame == ZERO_FRAME and at):
            return False
        if frame != ZERO_FRAME and (frame >= len(frames) or at + pages > frames[frame][3]):
            return False
    return made.pages > 0 and set(range(len(frames))) <= set(made.run_frames)


@given(made_tables())
def test_only_what_makes_sense_is_read(made: Tables) -> None:
    expected = list(zip(made.run_starts, made.run_frames, made.run_at, strict=True))
    data = encode_index(ID, BASE, 1, made)
    if not makes_sense(made):
        refusal(data)
        return
    index = decode(data)
    assert [(run.pages, run.frame, run.at) for run in index.stretches(0, index.pages)] == expected
    for frame in range(index.frames):
        assert sorted(index.runs_of(frame)) == [
            run for run in index.stretches(0, index.pages) if run.frame == frame
        ]


# ---- what was not ----


@pytest.mark.parametrize(("runs", "frames", "words"), [
    ([(1, 0, 0)], [(2, 0, 100, 1)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(1, 1, 100, 1)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(1, 2**64 - 50, 100, 1)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(0, 0, 8, 1)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(0, 0, PAGE + 9, 1)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(0, 0, 100, 0)], "frame 0 is not within its object"),
    ([(1, 0, 0)], [(0, 0, 100, 513)], "frame 0 is not within its object"),
    ([(1, 1, 0)], [(0, 0, 100, 1)], "run 0 is not within its frame"),
    ([(1, 0, 1)], [(0, 0, 100, 1)], "run 0 is not within its frame"),
    ([(2, 0, 0)], [(0, 0, 100, 1)], "run 0 is not within its frame"),
    ([(1, 0, 0), (1, 0, 65535)], [(0, 0, 100, 1)], "run 1 is not within its frame"),
    ([(1, 0, 0), (0, 0, 0)], [(0, 0, 100, 1)], "run 1 is not within its frame"),
    ([(1, ZERO_FRAME, 1)], [], "run 0 is not within its frame"),
    ([(1, 0, 0)], [], "run 0 is not within its frame"),
    ([(1, ZERO_FRAME, 0)], [(0, 0, 100, 1)], "no run is of frame 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(
    runs: list[tuple[int, int, int]], frames: list[tuple[int, int, int, int]], words: str
) -> None:
    assert words in refusal(encoded(runs, frames))


@pytest.mark.parametrize(("said", "words"), [
    (518, "run 3 is not within its frame, or not within the memory"),
    (520, "its runs end before its memory does"),
    (0, "its header makes no sense"),
    (2**63, "it is larger than a snapshot may be"),
])  # fmt: skip
def test_runs_cover_the_memory_and_no_more(said: int, words: str) -> None:
    data = encoded(RUNS, FRAMES)
    assert words in refusal(signed(data, 56, struct.pack("<Q", said)))


@pytest.mark.parametrize("name", [
    "/etc/passwd", "..", ".", "../a", "a/b", ".hidden", "-rf", "", "a\0b", "a b", "a\n", "é",
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    assert "names that no object can have" in refusal(encoded(RUNS, FRAMES, [
        (name, 1 << 30), ("b", 100),
    ]))  # fmt: skip


def test_longest_name_is_read() -> None:
    index = decode(encoded(RUNS, FRAMES, [("x" * 64, 1 << 30), ("b", 100)]))
    assert index.objects == ("x" * 64, "b")


@pytest.mark.parametrize(("data", "words"), [
    (b"", "here is not a snapshot of pagenet's"),
    (bytes(10_000), "here is not a snapshot of pagenet's"),
    (b"pagesnap", "it ends at byte 8"),
    (signed(encoded(RUNS, FRAMES), 16, b"\2"), "of version 2: this pagenet reads version 1"),
    (signed(encoded(RUNS, FRAMES), 20, b"\0\x20"), "its header makes no sense"),
    (signed(encoded(RUNS, FRAMES), PAGE - 1, b"x"), "its header makes no sense"),
    (signed(encoded(RUNS, FRAMES), 76, struct.pack("<I", 2**32 - 1)), "larger than a snapshot"),
    (signed(encoded(RUNS, FRAMES), 80, struct.pack("<I", 900)), "its header makes no sense"),
    (signed(encoded(RUNS, FRAMES), 84, struct.pack("<I", 2**32 - 1)), "its header makes no sense"),
])  # fmt: skip
def test_foreign_and_later_files_are_refused(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_every_part_of_a_file_is_refused() -> None:
    data = encoded(RUNS, FRAMES)
    for length in range(len(data)):
        refusal(data[:length])
    for more in (b"\0", b"x", data):
        assert "it does not end at byte" in refusal(data + more)


def decoded(data: bytes) -> Index | None:
    """None: it is refused, in one line."""
    try:
        return decode(data)
    except UsageError as error:
        words = str(error)
    assert is_one_line(words)
    return None


def test_no_changed_byte_changes_what_is_read() -> None:
    data = encoded(RUNS, FRAMES)
    written = decode(data)
    for at in range(len(data)):
        index = decoded(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        # An LZ4 block may say the same in other words.
        assert index is None or (at >= PAGE and index == written)


def test_any_other_bytes_are_refused_or_make_sense(fuzz: Fuzz) -> None:
    """Behind checksums that match, as someone writes them who means it."""
    body = bytes(tables(RUNS, FRAMES).body())
    for pick in fuzz.rounds(500):
        found = mutated(pick, body)[: len(body)].ljust(len(body), b"\0")
        block = checksum(found) + found
        header = encoded(RUNS, FRAMES)[:PAGE]
        data = signed(header, 84, struct.pack("<I", len(block))) + block
        index = decoded(data)
        if index is None:
            continue
        assert sum(run.pages for run in index.stretches(0, index.pages)) == index.pages
        for frame in range(index.frames):
            assert index.frame(frame).pages <= FRAME_PAGES
            assert all(run.at + run.pages <= FRAME_PAGES for run in index.runs_of(frame))


# ---- what it costs ----


def large_tables(runs: int, pages: int, layers: int) -> Tables:
    """As many runs, in frames of a first layer that has it all, and of as many smaller ones."""
    draw, made = random.Random(1), Tables()
    for layer in range(layers):
        made.add_object(f"{layer:032x}.frames", 1 << 40)
    whole = pages // FRAME_PAGES
    for frame in range(whole + layers):
        object_ = max(frame - whole, 0)
        made.add_frame(object_, frame << 20, 1 << 20, FRAME_PAGES, draw.randbytes(16))
    ends = sorted(draw.sample(range(1, pages), runs - 1))
    before = 0
    for number, end in enumerate([*ends, pages]):
        count = end - before
        frame = number if number < whole + layers else draw.randrange(whole + layers)
        zero = draw.random() < 0.2 and number >= whole + layers
        made.run_starts.append(count)
        made.run_frames.append(ZERO_FRAME if zero else frame)
        made.run_at.append(0 if zero else draw.randrange(FRAME_PAGES - count))
        before = end
    made.pages = pages
    return made


def test_large_index_takes_14_bytes_a_run() -> None:
    runs = 100_000
    data = encode_index(ID, BASE, 50, large_tables(runs, 4 * runs, 50))
    gc.collect()
    tracemalloc.start()
    index = decode(data)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.runs == runs
    assert now < 15 * runs


def read_only(data: bytes) -> None:
    """The floor: the bytes read and unpacked."""
    head = module._decode_header(data[:PAGE], "here")
    body = memoryview(bytearray(module._body_size(head.counts)))
    module._read_body(reader(data), head.lengths, body)


@pytest.mark.soak
def test_index_of_16_gib_with_a_million_runs(capsys: pytest.CaptureFixture[str]) -> None:
    data = encode_index(ID, BASE, 1000, large_tables(1_000_000, 4 << 20, 1000))
    gc.collect()
    tracemalloc.start()
    index = decode(data)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.size == 16 << 30
    taken: dict[Callable[[bytes], object], float] = {}
    for _ in range(20):  # in turns, and the least of each: others use the machine too
        for work in (read_only, decode):
            began = time.perf_counter()
            work(data)
            taken[work] = min(taken.get(work, 1e9), time.perf_counter() - began)
    floor, ours = taken[read_only], taken[decode]
    with capsys.disabled():
        print(
            f"\nindex of {index.runs} runs, {len(data) / MIB:.1f} MiB stored: {now / MIB:.1f} MiB"
            f" in memory ({peak / MIB:.1f} at most), loaded in {ours * 1000:.1f} ms, read and"
            f" unpacked alone in {floor * 1000:.1f} ms ({ours / floor:.2f}x)"
        )
    assert peak < 16 * MIB
    assert ours < 2 * floor
