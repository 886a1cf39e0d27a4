"""Recordings and traces with arbitrary content: each is read as one that makes sense, or is an
error in one line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgpack
import pytest
from fuzzing import Fuzz, as_msgpack, is_one_line, mutated, odd

from pagenet import Block, Region, UsageError
from pagenet.background.recording import Recording, load_recording
from pagenet.bench.workload._touches import Touches, load_touches
from pagenet.bench.workload._traces import make_trace
from pagenet.dirty import DirtyRecorder, Second, dirty_file, load_dirty, write_dirty

BLOCKS = (("ram", 64 << 12), ("rom", 8 << 12))
REGION = Region([Block("rom", 8 << 12), Block("ram", 32 << 12)])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("files") / "file"
    recording = Recording(BLOCKS, (5, 6, 7, 70, 0, 63), (1, 1, 2, 2, 1, 1), 2)
    recording.save(path)
    bodies = [path.read_bytes()]
    Touches(64, ((3, 10), (4, 0), (0, 10**9))).save(path)
    bodies.append(path.read_bytes())
    recorder = DirtyRecorder(REGION)
    recorder.add(Second(1.0, 0b1011, 4096, 0.1))
    recorder.add(Second(1.5, 1 << 39, 0, 0.2))
    with dirty_file(path) as file:
        write_dirty(recorder.recording(), file)
    return [*bodies, path.read_bytes()]


def use_recording(path: Path) -> None:
    recording = load_recording(path)
    pages = sum(size for _, size in recording.blocks) // 4096
    assert len(set(recording.order)) == len(recording.order) == len(recording.seen)
    assert all(0 <= page < pages for page in recording.order)
    assert all(0 < seen <= recording.runs for seen in recording.seen)
    assert all(0 <= page < REGION.pages for page in recording.pages_in(REGION))
    recording.merge(Recording(BLOCKS, (1, 2), (1, 1)))
    recording.save(path)
    assert load_recording(path) == recording


def use_touches(path: Path) -> None:
    touches = load_touches(path)
    assert all(0 <= page < touches.pages and work >= 0 for page, work in touches.touches)
    touches.save(path)
    assert load_touches(path) == touches


def use_trace(path: Path) -> None:
    trace = make_trace(f"recorded={path}", 1 << 20)
    assert all(page < 256 for page in trace.pages)
    assert trace.work_ns is None or len(trace.work_ns) == len(trace.pages)


def use_dirty(path: Path) -> None:
    loaded = load_dirty(path)
    for second in loaded.history().seconds:
        assert second.bits >> loaded.region.pages == 0
        assert 0 < second.early_seconds <= second.seconds
        assert second.early <= loaded.region.size


def some_body(pick: random.Random, original: bytes) -> bytes:
    if pick.random() < 0.4:
        return mutated(pick, original)
    fields: Any = odd(pick, msgpack.unpackb(original))
    return as_msgpack(pick, fields)


def test_files(fuzz: Fuzz, originals: list[bytes], tmp_path: Path) -> None:
    for pick in fuzz.rounds(1500):
        path = tmp_path / "file"
        path.write_bytes(some_body(pick, pick.choice(originals)))
        reason = "none"
        try:
            pick.choice([use_recording, use_touches, use_trace, use_dirty])(path)
        except UsageError as error:
            reason = str(error).replace(str(path), "FILE")
        assert is_one_line(reason), reason
