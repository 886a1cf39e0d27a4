"""The guest that tests move, and how its output is read, without a migration."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from processes import run
from vm import (
    BUILDER,
    Serial,
    bare_command,
    check_unbroken,
    guest_files,
    needs_guest,
    qemu_command,
    ram_of,
    run_vm,
)

PAGES_PER_MIB = 256

# What init.c puts at the beginning of a page, and a page of 8 MiB that the guest only reads.
MAGIC = 0x706167656E657421
COLD_PAGE = 8 * PAGES_PER_MIB - 1


def beat(seq: int, bad: int = 0) -> str:
    return (
        f"HB seq={seq} t={seq * 20000} w={seq * 1000} dw=1000 bad={bad} sweeps={seq // 10} sw=7"
        " gap_us=150\r\n"
    )


def heard(text: str, name: str = "guest") -> Serial:
    serial = Serial(name)
    serial.feed(text.encode())
    return serial


# ---- how its output is read ----


def test_words_come_in_pieces() -> None:
    serial = Serial()
    for byte in (f"READY pages=24576 fill_ms=700\r\n{beat(0)}{beat(30)}HB seq=31").encode():
        serial.feed(bytes([byte]))
    assert serial.lines[0].text == "READY pages=24576 fill_ms=700"
    assert [(said.seq, said.writes, said.bad, said.sweeps) for said in serial.beats] == [
        (0, 0, 0, 0),
        (30, 30000, 0, 3),
    ]
    assert serial.beats[0].time <= serial.beats[1].time
    assert serial.rest == "HB seq=31"


def test_words_of_devices() -> None:
    serial = heard(beat(0).rstrip() + " net=5 disk=7\r\n" + beat(1))
    assert [said.devices for said in serial.beats] == [{"net": 5, "disk": 7}, {}]


def test_unbroken_wherever_the_line_is_cut() -> None:
    words = beat(0) + beat(1) + beat(2) + beat(3)
    for place in range(len(beat(0)), len(words) - len(beat(3)) + 1):
        check_unbroken(heard(words[:place]), heard(words[place:]))


def test_unbroken_over_three_machines() -> None:
    cut = beat(2)
    check_unbroken(
        heard(beat(0) + beat(1)[:9]), heard(beat(1)[9:] + cut[:20]), heard(cut[20:] + beat(3))
    )


@pytest.mark.parametrize("words", [beat(0) + beat(2), beat(1) + beat(1), beat(1) + beat(0)])
def test_break_within_a_machine(words: str) -> None:
    with pytest.raises(AssertionError, match="came after"):
        check_unbroken(heard(words))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_break_between_two_machines(first: int) -> None:
    with pytest.raises(AssertionError, match=f"heartbeat {first} came after 1"):
        check_unbroken(heard(beat(0) + beat(1)), heard(beat(first)))


def test_bytes_that_the_switch_has_lost() -> None:
    with pytest.raises(AssertionError, match="garbled: 'HB seq"):
        check_unbroken(heard(beat(0) + beat(1)[:10]), heard(beat(1)[20:] + beat(2)))
    with pytest.raises(AssertionError, match="heartbeat 2 came after 0"):
        check_unbroken(heard(beat(0)), heard(beat(1)[20:] + beat(2)))


def test_wrong_page() -> None:
    with pytest.raises(AssertionError, match=r"wrong pages: .* bad=1 "):
        check_unbroken(heard(beat(0)), heard(beat(1, bad=1) + beat(2)))
    with pytest.raises(AssertionError, match=r"wrong pages: .* bad=3 "):
        check_unbroken(heard(beat(0) + beat(1, bad=3)[:30]), heard(beat(1, bad=3)[30:] + beat(2)))


def test_silence() -> None:
    with pytest.raises(AssertionError, match="destination has said nothing"):
        check_unbroken(heard(beat(0), "source"), heard("", "destination"))


# ---- the builder ----


def test_builder_without_its_tools(tmp_path: Path) -> None:
    command = [sys.executable, str(BUILDER), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "guest/build.py: apt-cache is not installed\n",
    )


@needs_guest
def test_builder_keeps_what_it_has_made() -> None:
    before = [path.stat().st_mtime_ns for path in guest_files()]
    subprocess.run([sys.executable, str(BUILDER)], check=True, capture_output=True)
    assert [path.stat().st_mtime_ns for path in guest_files()] == before


# ---- a guest ----


@needs_guest
async def test_guest_runs(tmp_path: Path) -> None:
    command = qemu_command(tmp_path, "guest", work=32, hot=8, smp=2)
    async with run_vm(command, tmp_path, "guest") as vm:
        assert vm.ram.exists()
        assert vm.qmp.is_socket()
        assert f"pages={32 * PAGES_PER_MIB} " in (await vm.serial.wait_ready()).text
        await vm.serial.wait_beats(10)
        await vm.serial.wait_sweeps(2)
        check_unbroken(vm.serial)
        assert vm.serial.beats[0].seq == 0
        assert 0 < vm.serial.beats[0].writes < vm.serial.beats[-1].writes
    assert vm.process.returncode is not None
    assert not vm.ram.exists()


@needs_guest
@pytest.mark.parametrize("words", [1, 1020])
async def test_guest_without_kernel(words: int, tmp_path: Path) -> None:
    async with run_vm(
        bare_command(tmp_path, "guest", work=8, hot=2, words=words), tmp_path, "guest"
    ) as vm:
        assert f"pages={8 * PAGES_PER_MIB} " in (await vm.serial.wait_ready()).text
        await vm.serial.wait_beats(3)
        await vm.serial.wait_sweeps(2)
        check_unbroken(vm.serial)
        assert 0 < vm.serial.beats[0].writes < vm.serial.beats[-1].writes


@needs_guest
async def test_guest_without_kernel_notices_a_wrong_byte(tmp_path: Path) -> None:
    async with run_vm(
        bare_command(tmp_path, "guest", work=8, hot=2, words=1020), tmp_path, "guest"
    ) as vm:
        await vm.serial.wait_beats(1)
        with vm.ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[(16 << 20) + COLD_PAGE * 4096 + 4095] ^= 1
        await vm.serial.wait("a wrong page", lambda: vm.serial.beats[-1].bad > 0)
        assert any(line.text.startswith(f"BAD page={COLD_PAGE} ") for line in vm.serial.lines)


@needs_guest
async def test_guest_that_has_not_enough_memory(tmp_path: Path) -> None:
    async with run_vm(bare_command(tmp_path, "guest", work=60), tmp_path, "guest") as vm:
        await vm.serial.wait(
            "a refusal",
            lambda: any("FAILED not enough memory" in line.text for line in vm.serial.lines),
        )


def flip_last_byte(memory: mmap.mmap, page: int) -> None:
    """Flip the last byte of the guest's page of that number, wherever its kernel has put it."""
    header = struct.pack("<QQ", MAGIC, page)
    place = memory.find(header)
    while place % 4096:
        assert place >= 0
        place = memory.find(header, place + 1)
    memory[place + 4095] ^= 1


@needs_guest
async def test_guest_notices_a_wrong_byte(tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "guest", work=8, hot=2), tmp_path, "guest") as vm:
        await vm.serial.wait_beats(1)
        with vm.ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            flip_last_byte(memory, COLD_PAGE)
        await vm.serial.wait("a wrong page", lambda: vm.serial.beats[-1].bad > 0)
        assert any(line.text.startswith(f"BAD page={COLD_PAGE} ") for line in vm.serial.lines)
        with pytest.raises(AssertionError, match="wrong pages"):
            check_unbroken(vm.serial)


@needs_guest
async def test_qemu_that_ends_early_says_why(tmp_path: Path) -> None:
    command = qemu_command(tmp_path, "guest", extra=["-no-such-option"])
    with pytest.raises(AssertionError, match=r"exit code 1; .*no-such-option: invalid option"):
        async with run_vm(command, tmp_path, "guest"):
            pass
    assert not ram_of(command).exists()


@needs_guest
async def test_guest_that_ends_early_is_not_waited_for(tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "guest"), tmp_path, "guest") as vm:
        vm.process.kill()
        with pytest.raises(AssertionError, match="guest ended before 10 heartbeats"):
            await vm.serial.wait_beats(10)


def is_running(pid: str) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


# A process that is killed cannot clean up.
ABANDONED = """
import sys, trio
from pathlib import Path
from vm import qemu_command, run_vm
async def main(directory):
    async with run_vm(qemu_command(directory, "guest"), directory, "guest") as vm:
        print(vm.pid, vm.ram, flush=True)
        await trio.sleep_forever()
trio.run(main, Path(sys.argv[1]))
"""


@needs_guest
async def test_nothing_outlives_a_killed_test(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    async with run(command, env={**os.environ, "PYTHONPATH": paths}) as test:
        said = await test.line()
        assert said is not None, test.stderr
        pid, _, ram = said.partition(" ")
        assert Path(ram).exists()
        await test.kill()
        with trio.fail_after(10):
            while Path(ram).exists() or is_running(pid):  # noqa: ASYNC110
                await trio.sleep(0.01)
