"""pagenet-snapshot, and pagenet-serve snapshot:DIR/NAME, in directories and in a real S3 server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from fuzzing import is_one_line
from processes import (
    PAGE,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)
from stores import http_store

from pagenet import Run, open_source

pytest.importorskip("obstore")

from pagenet.objects import open_store

SIZE = 24 << 20


def snapshot(*words: str | Path, code: int = 0, **options: Any) -> list[dict[str, Any]]:
    """The events, but those of progress."""
    done = subprocess.run(
        [sys.executable, "-m", "pagenet.cli.snapshot", "--json", *map(str, words)],
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == code, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if code:
        line = done.stderr.removesuffix("\n")
        assert is_one_line(line)
        assert line.startswith("pagenet-snapshot: ")
        assert events[-1:] == [] or events[-1]["exit_code"] == code
    return [event for event in events if event["event"] != "progress"]


def refused(*words: str | Path, code: int, **options: Any) -> str:
    return str(snapshot(*words, code=code, **options)[-1]["message"])


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return write_pattern(tmp_path / "memory", SIZE, zero_every=64)


@pytest.fixture
def layers(memory: Path, tmp_path: Path) -> list[str]:
    return make_layers(memory, str(tmp_path))


@pytest.fixture
def stored(s3: None, memory: Path) -> list[str]:
    """Such layers in a store."""
    return make_layers(memory, f"s3://bucket/of-{memory.parent.name}/snapshots")


def make_layers(memory: Path, where: str) -> list[str]:
    """Two, of memory and of memory as it is then."""
    names = [f"{where}/first", f"{where}/second"]
    snapshot("create", memory, names[0])
    draw = random.Random(1)
    with memory.open("r+b") as file:
        for page in (1, 2, 3, 4000):
            file.seek(page * PAGE)
            file.write(draw.randbytes(PAGE))
    snapshot("create", memory, names[1], "--base", names[0])
    return names


def objects(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.frames"), key=lambda path: path.stat().st_size)


def check_all_commands(layers: list[str], memory: Path, names: set[str], out: Path) -> None:
    first, second = layers
    [facts] = snapshot("info", second)
    assert (facts["layers"], facts["pages"], facts["bytes"]) == (2, SIZE // PAGE, SIZE)
    data = memory.read_bytes()
    assert facts["zero"] == sum(data[at : at + PAGE] == bytes(PAGE) for at in range(0, SIZE, PAGE))
    assert {found["name"] for found in facts["objects"]} == names
    [base] = snapshot("info", first)
    assert (base["base"], facts["base"]) == (None, base["id"])
    [verified] = snapshot("verify", second)
    assert verified["frames"] == facts["frames"]
    assert out.exists() is False
    snapshot("export", second, out)
    assert out.read_bytes() == memory.read_bytes()
    *differing, compared = snapshot("diff", first, second)
    assert [(event["first"] // PAGE, event["length"] // PAGE) for event in differing] == [
        (1, 3), (4000, 1),
    ]  # fmt: skip
    assert (compared["pages"], compared["differ"]) == (SIZE // PAGE, 4)


def test_from_create_to_diff(layers: list[str], memory: Path, tmp_path: Path) -> None:
    names = {path.name for path in objects(tmp_path)}
    check_all_commands(layers, memory, names, tmp_path / "out")


def test_from_create_to_diff_in_a_store(stored: list[str], memory: Path, tmp_path: Path) -> None:
    with open_store(stored[0].rpartition("/")[0], 60) as store:
        names = {name for name, _, _ in store.list()}
    assert {name for name in names if name.endswith(".snapshot")} == {
        "first.snapshot", "second.snapshot",
    }  # fmt: skip
    frames = {name for name in names if name.endswith(".frames")}
    assert len(frames) == 2
    check_all_commands(stored, memory, frames, tmp_path / "out")
    # a layer that has only what was written; the base is read from the store otherwise
    changes, whole = tmp_path / "changes", bytearray(memory.read_bytes())
    whole[77 * PAGE : 78 * PAGE] = b"\1" * PAGE
    with changes.open("wb") as file:
        file.truncate(SIZE)
        file.seek(77 * PAGE)
        file.write(b"\1" * PAGE)
    third = stored[0].replace("first", "third")
    [created] = snapshot("create", changes, third, "--base", stored[1], "--sparse")
    assert created["new"] == 1
    with open_source(f"snapshot:{third}") as source:
        into = memoryview(bytearray(SIZE))
        trio.run(source.read_into, Run(0, SIZE // PAGE), into)
        assert into == whole


def test_words_for_people(layers: list[str], tmp_path: Path) -> None:
    def words(*args: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "pagenet.cli.snapshot", *args], capture_output=True, text=True
        ).stdout

    assert "of them zero" in words("info", layers[1])
    assert words("verify", layers[1]).startswith("whole: ")
    assert words("diff", *layers).splitlines() == [
        "0x1000+0x3000", "0xfa0000+0x1000", f"4 of {SIZE // PAGE} pages differ",
    ]  # fmt: skip
    created = words("create", str(tmp_path / "memory"), str(tmp_path / "3"), "--base", layers[1])
    assert "layer 3: 0 of 6144 pages new" in created


def test_sparse_file_as_firecracker_writes_it(layers: list[str], tmp_path: Path) -> None:
    changes, whole = tmp_path / "changes", bytearray((tmp_path / "memory").read_bytes())
    with changes.open("wb") as file:
        file.truncate(SIZE)
        file.seek(77 * PAGE)
        file.write(b"\1" * PAGE + bytes(PAGE))
    whole[77 * PAGE : 79 * PAGE] = b"\1" * PAGE + bytes(PAGE)
    third = tmp_path / "third"
    [created] = snapshot("create", changes, third, "--base", layers[1], "--sparse")
    assert (created["new"], created["zero"]) == (1, 1)
    snapshot("export", third, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole


def test_refusals(layers: list[str], memory: Path, tmp_path: Path) -> None:
    new, path = tmp_path / "new", Path(f"{layers[0]}.snapshot")
    assert "cannot open snapshot" in refused("info", tmp_path / "none", code=2)
    assert "cannot open /none" in refused("verify", "/none/none", code=2)
    assert "cannot open source" in refused("create", tmp_path / "none", new, code=2)
    assert "name that too" in refused("create", memory, new, "--sparse", code=2)
    assert "a name has" in refused("create", memory, tmp_path / "..", code=2)
    memory.with_name("short").write_bytes(bytes(PAGE))
    assert "and the memory 4096" in refused(
        "create", tmp_path / "short", new, "--base", layers[0], code=2
    )
    path.write_bytes(path.read_bytes() + b"x")
    for words in (["info"], ["verify"], ["diff", layers[1]]):
        assert "does not end at byte" in refused(*words, layers[0], code=2)
    assert not new.with_name("new.snapshot").exists()
    assert len(objects(tmp_path)) == 2


def test_missing_and_broken_objects(layers: list[str], memory: Path, tmp_path: Path) -> None:
    small, large = objects(tmp_path)
    with large.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    small.unlink()
    said = refused("verify", layers[1], code=4)
    assert said.startswith("2 of ")
    assert "are missing or broken" in said
    out = tmp_path / "out"
    assert "cannot be read" in refused("export", layers[1], out, code=4)
    assert not out.exists()
    assert "cannot be read" in refused("diff", *layers, code=4)
    assert snapshot("info", layers[1])  # reads the index alone


def test_no_room(memory: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 4, SIZE // 4))

    said = refused("create", memory, tmp_path / "new", code=1, preexec_fn=limit)
    assert "cannot write the snapshot" in said
    assert os.listdir(tmp_path) == ["memory"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_ended_at_any_moment(number: int, memory: Path, tmp_path: Path) -> None:
    """It is there and whole, or it is not there. Only where it is killed may an object be left."""
    command = [sys.executable, "-m", "pagenet.cli.snapshot", "create", str(memory)]
    for delay in (0.2, 0.3, 0.4):
        async with run([*command, str(tmp_path / "new")]) as process:
            await trio.sleep(delay)
            process.send_signal(number)
            await process.wait_end()
        is_there = (tmp_path / "new.snapshot").exists()
        if is_there:
            snapshot("verify", tmp_path / "new")
        assert number == signal.SIGKILL or is_there or os.listdir(tmp_path) == ["memory"]
        for path in tmp_path.glob("new*"):
            path.unlink()
        for path in objects(tmp_path):
            path.unlink()
    assert os.listdir(tmp_path) == ["memory"]


# ---- what no snapshot names ----


def prune(where: str | Path, *words: str, code: int = 0) -> tuple[set[str], dict[str, Any]]:
    *unused, pruned = snapshot("prune", where, *words, code=code)
    return {event["name"] for event in unused}, pruned


def test_objects_that_no_snapshot_names(layers: list[str], memory: Path, tmp_path: Path) -> None:
    small, large = (path.name for path in objects(tmp_path))
    (tmp_path / "other.frames").write_bytes(b"not ours")
    unused, pruned = prune(tmp_path, "--older-than", "0")
    assert (unused, pruned["objects"], pruned["snapshots"]) == (set(), 0, 2)
    (tmp_path / "second.snapshot").unlink()
    unused, pruned = prune(tmp_path)
    assert (unused, pruned["young"], pruned["snapshots"]) == (set(), 1, 1)
    os.utime(tmp_path / small, (1, 1))
    assert prune(tmp_path)[0] == {small}
    assert (tmp_path / small).exists()
    unused, pruned = prune(tmp_path, "--delete")
    assert (unused, pruned["removed"], pruned["objects"]) == ({small}, True, 1)
    assert not (tmp_path / small).exists()
    snapshot("verify", layers[0])
    # a base whose index is deleted while a layer is made of it
    os.utime(tmp_path / large, (1, 1))
    snapshot("create", memory, tmp_path / "third", "--base", layers[0])
    (tmp_path / "first.snapshot").unlink()
    (tmp_path / "third.snapshot").unlink()
    assert prune(tmp_path, "--delete")[1]["young"] == 2
    unused, _ = prune(tmp_path, "--delete", "--older-than", "0")
    assert large in unused
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "other.frames"}


def test_nothing_is_removed_beside_an_index_that_cannot_be_read(
    layers: list[str], tmp_path: Path
) -> None:
    for path in objects(tmp_path):
        os.utime(path, (1, 1))
    (tmp_path / "first.snapshot").unlink()
    index = tmp_path / "second.snapshot"
    index.write_bytes(index.read_bytes()[:-1])
    assert "is broken" in refused("prune", tmp_path, "--delete", code=2)
    assert "cannot open /none" in refused("prune", "/none", code=2)
    assert len(objects(tmp_path)) == 2


def test_objects_in_a_store_that_no_snapshot_names(stored: list[str]) -> None:
    where = stored[0].rpartition("/")[0]
    with open_store(where, 60) as store:
        store.remove("second.snapshot")
        before = {name for name, _, _ in store.list()}
        assert prune(where)[1]["young"] == 1
        assert {name for name, _, _ in store.list()} == before
        unused, _ = prune(where, "--delete", "--older-than", "0")
        assert {name for name, _, _ in store.list()} == before - unused
    assert len(unused) == 1
    snapshot("verify", stored[0])


# ---- as a source ----


async def test_served_to_a_file(layers: list[str], memory: Path, tmp_path: Path) -> None:
    async with run_server(f"snapshot:{layers[1]}") as (_, uri):
        for name in ("one", "two"):
            async with run(pull_command(uri, "--into", str(tmp_path / name), lane="native")) as it:
                assert await it.wait() == 0
            assert (tmp_path / name).read_bytes() == memory.read_bytes()


async def test_served_to_an_owner(
    memory: Path, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    snapshot("create", memory, tmp_path / "one")
    path = tmp_path / "uffd.sock"
    async with (
        run_server(f"snapshot:{tmp_path}/one") as (_, uri),
        run(pull_command(uri, "--uffd-socket", str(path), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        workload = ("--size", SIZE, "--zero-every", 64, "--wait-complete")
        async with run_workload(path, *workload) as owner:
            verified = await owner.event("verified")
            assert (verified["bad"], verified["poisoned"]) == (0, 0)
            assert await owner.wait() == 0
        assert await puller.wait() == 0


async def test_object_that_goes_away_while_it_is_served(layers: list[str], tmp_path: Path) -> None:
    async with run_server(f"snapshot:{layers[1]}") as (server, uri):
        objects(tmp_path)[0].unlink()
        async with run(pull_command(uri, "--into", str(tmp_path / "out"), lane="native")) as puller:
            assert await puller.wait() == 4
            assert "is missing" in puller.stderr
        assert await server.wait() == 4
        assert "is missing" in server.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [
    ["--listen", "rdma://127.0.0.1:0"],
    ["--connect", "rdma://127.0.0.1:1"],
])  # fmt: skip
async def test_what_cannot_serve_it(options: list[str], layers: list[str]) -> None:
    async with run(serve_command(f"snapshot:{layers[0]}", *options)) as server:
        assert await server.wait() == 2
        assert "is not served over rdma://" in server.stderr


async def test_it_is_no_process_to_be_tracked(layers: list[str]) -> None:
    options = ["--tracked", "--listen", "tcp://127.0.0.1:0"]
    async with run(serve_command(f"snapshot:{layers[0]}", *options)) as server:
        assert await server.wait() == 2
        assert is_one_line(server.stderr.rstrip())


# ---- out of a store ----


async def test_store_to_an_owner(
    stored: list[str], memory: Path, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    """What is fetched is kept, and serves the next time without a request for a frame."""
    cache, path = tmp_path / "cache", tmp_path / "uffd.sock"
    options = ("--lane", lane, "--cache", str(cache))
    async with (
        run_server(f"snapshot:{stored[0]}", *options) as (_, uri),
        run(pull_command(uri, "--uffd-socket", str(path), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        workload = ("--size", SIZE, "--zero-every", 64, "--wait-complete")
        async with run_workload(path, *workload) as owner:
            verified = await owner.event("verified")
            assert (verified["bad"], verified["poisoned"]) == (0, 0)
            assert await owner.wait() == 0
        assert await puller.wait() == 0
    with open_store(stored[0].rpartition("/")[0], 60) as store:
        for name, _, _ in store.list():
            if name.endswith(".frames"):
                store.remove(name)
    async with run_server(f"snapshot:{stored[0]}", *options) as (_, uri):
        out = tmp_path / "out"
        async with run(pull_command(uri, "--into", str(out), lane="native")) as puller:
            assert await puller.wait() == 0
    assert out.stat().st_size == SIZE


@pytest.mark.parametrize(("how", "lane"), [
    ("missing", "native"), ("changed", "native"), ("shorter", "trio"),
])  # fmt: skip
async def test_store_whose_objects_change(
    how: str, lane: str, stored: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    async with run_server(f"snapshot:{stored[1]}", "--lane", lane) as (server, uri):
        with open_store(stored[0].rpartition("/")[0], 60) as store:
            for name, size, _ in store.list():
                if name.endswith(".frames") and how == "missing":
                    store.remove(name)
                elif name.endswith(".frames"):
                    store.write(name, bytes(size - (how == "shorter")))
        async with run(pull_command(uri, "--into", str(out), lane="native")) as puller:
            assert await puller.wait() == 4
        assert await server.wait() == 4
        assert is_one_line(server.stderr.rstrip())
        words = {"missing": "no such object", "changed": "are not what was written"}
        assert words.get(how, "is another object than before") in server.stderr
    if how == "changed":
        assert "are missing or broken" in refused("verify", stored[1], code=4)
        assert "cannot be read" in refused("export", stored[1], out, code=4)
        new = stored[0].replace("first", "new")
        refused("create", tmp_path / "memory", new, "--base", stored[1], code=4)
    assert not out.exists()


def test_refusals_of_a_store(stored: list[str], memory: Path, tmp_path: Path) -> None:
    where = stored[0].rpartition("/")[0]
    assert "there is no such object" in refused("info", f"{where}/none", code=2)
    assert "is not in" in refused("create", memory, tmp_path / "new", "--base", stored[0], code=2)
    assert "s3://none" in refused("create", memory, "s3://none/new", code=2)
    assert "there is no such" in refused(
        "create", memory, f"{where}/n", "--base", f"{where}/o", code=2
    )
    with open_store(where, 60) as store:
        before = store.list()
        store.write("broken.snapshot", b"no index")
        assert "is not a snapshot" in refused("verify", f"{where}/broken", code=2)
        store.remove("broken.snapshot")
        assert sorted(store.list()) == sorted(before)


@pytest.mark.parametrize("words", [["info"], ["create", "memory"]])
async def test_ctrl_c_while_a_store_is_waited_for(words: list[str], memory: Path) -> None:
    with http_store(bytes(PAGE)) as store:
        store.lie = lambda _, answer: setattr(answer, "status", 503)
        words = [str(memory) if word == "memory" else word for word in words]
        command = [sys.executable, "-m", "pagenet.cli.snapshot", *words, store.url]
        if words[0] == "create":
            command += ["--base", store.url]
        async with run(command) as process:
            while not store.asked:  # noqa: ASYNC110
                await trio.sleep(0.001)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(10):
                assert await process.wait() == 130
