"""RDMA: runs the tests of tests/rdma/inside in a guest that has a device; the other tests here need
none."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import write_pattern
from rdma_guest import ROOT, guest_python, run_in_guest
from vm import guest_files

from pagenet import (
    Block,
    RdmaTransport,
    Region,
    RemoteProtocolError,
    Run,
    SourceUnreachable,
    Unsupported,
    UsageError,
    system_packages,
)
from pagenet.rdma._path import Wanted, check_device
from pagenet.rdma._transport import _wanted
from pagenet.rdma._wire import (
    ENDPOINT,
    KEY_HEADER,
    Answer,
    Asking,
    Endpoint,
    Key,
    Kind,
    check_key,
    chunk_run,
    decode_answer,
    decode_askings,
    encode_key,
    encode_word,
    read_key,
)
from pagenet.tcp import TcpTransport

#: what runs in the guest
INSIDE = ROOT / "tests" / "rdma" / "inside"
#: seconds; few guests run all tests, because a guest takes longer to start than most tests take
PATIENCE = 480
#: half of the tests, by the time they take
FIRST = [INSIDE / name for name in ("test_moving.py", "test_failing.py")]
REGION = Region([Block("a", (1 << 20) + 8192, 4096), Block("b", 4 << 20, 2 << 20)])


#: pytest-trio imports hypothesis if it is there: seconds, and no test in the guest needs it
PYTEST = """
import sys
class WithoutHypothesis:
    @staticmethod
    def find_spec(name, *_):
        if name == "hypothesis":
            raise ImportError(name)
sys.meta_path.insert(0, WithoutHypothesis)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


def compile_all() -> None:
    """What is imported in the guest: an emulated processor takes long for that, and keeps nothing.
    Tests are compiled by pytest alone, which has its own way to do that."""
    subprocess.run(
        [guest_python(), "-m", "compileall", "-q", "pagenet", "tests"], cwd=ROOT, check=True
    )
    collect = [guest_python(), "-c", PYTEST, *OPTIONS, "--collect-only", str(INSIDE)]
    here = {"PYTHONPATH": str(ROOT), "PAGENET_RDMA_GUEST": "1"}
    subprocess.run(collect, cwd=ROOT, env=os.environ | here, check=True, capture_output=True)


#: QEMU 7.2 itself dies now and then where it emulates several processors: not what runs in it
EMULATOR_CRASHED = "(QEMU: exit code -11)"


def run_tests(cpus: int, *which: str | Path) -> subprocess.CompletedProcess[str]:
    """In a guest; in another one if the emulator has crashed."""
    command = [guest_python(), "-c", PYTEST, *OPTIONS, "-x", "--durations=5", *which]
    for _ in range(2):
        done = run_in_guest(*command, options=("--cpus", str(cpus)), timeout=PATIENCE)
        if EMULATOR_CRASHED not in done.stderr:
            break
    return done


@pytest.mark.timeout(2 * PATIENCE + 120)
def test_in_guests_with_a_device() -> None:
    """All tests run with one processor, with which an emulator is fastest, in two guests at a time.
    Some run with four too, which are enough for the destination to look for the end of a READ
    before it sleeps."""
    compile_all()
    guest_files()  # made here: there is no network in the guest
    others = [path for path in sorted(INSIDE.glob("test_*.py")) if path not in FIRST]
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(run_tests, 1, *FIRST),
            threads.submit(run_tests, 1, *others),
            threads.submit(run_tests, 4, FIRST[0], "-k", "late_and_lost or touching and native"),
        ]
    for done, least in zip([run.result() for run in runs], (10, 10, 3), strict=True):
        print(done.stdout)
        assert (done.returncode, done.stderr) == (0, "")
        passed = re.search(r"(\d+) passed", done.stdout)
        assert passed is not None
        assert int(passed[1]) >= least
        assert "skipped" not in done.stdout


@pytest.mark.soak
@pytest.mark.timeout(2 * PATIENCE)
def test_two_guests_joined_by_a_wire(tmp_path: Path) -> None:
    python, wire = guest_python(), tmp_path / "wire"
    source = write_pattern(tmp_path / "source", 16 << 20, zero_every=7)
    serve = (
        f"{python} -m pagenet.cli.serve {source} --listen rdma://10.77.0.1:7000 --plaintext --once"
    )
    pull = f"{python} -m pagenet.cli.pull rdma://10.77.0.1:7000 --into /tmp/copy"
    # A pull that begins before there is a server ends with exit code 3.
    pulling = f"while {pull}; test $? = 3; do sleep 1; done; cp /tmp/copy /mnt/exchange"
    with ThreadPoolExecutor() as threads:
        server = threads.submit(
            run_in_guest,
            *serve.split(),
            options=("--wire", f"listen:{wire}", "--address", "10.77.0.1"),
            timeout=PATIENCE,
        )
        while not wire.exists() and not server.done():
            time.sleep(0.1)
        options = ("--wire", f"dial:{wire}", "--address", "10.77.0.2", "--exchange", tmp_path)
        pulled = run_in_guest("sh", "-c", pulling, options=options, timeout=PATIENCE)
        served = server.result()
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert (served.returncode, served.stderr) == (0, "")
    assert "10.77.0.1" in served.stdout
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


# ---- without a device ----


def test_no_pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    with pytest.raises(
        Unsupported, match=r"RDMA takes pyverbs .* apt install python3-pyverbs"
    ) as raised:
        check_device(Wanted())
    assert "\n" not in str(raised.value)


def test_pyverbs_of_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_packages, "SYSTEM_PACKAGES", "/nowhere")
    for name in [name for name in sys.modules if name.split(".")[0] == "pyverbs"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Unsupported, match=r"No module named 'pyverbs'"):
        check_device(Wanted())


class NoDevices:
    """What pyverbs returns on a host without devices."""

    @staticmethod
    def get_device_list() -> list[object]:
        return []


async def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    modules = {"device": NoDevices, "pyverbs_error": type("Errors", (), {"PyverbsError": Error})}
    monkeypatch.setattr("pagenet.rdma._path.load", modules.__getitem__)
    monkeypatch.setattr("pagenet.rdma._pyverbs.load", modules.__getitem__)
    transport = RdmaTransport(TcpTransport())
    for use in (transport.dial, transport.listen):
        with pytest.raises(
            Unsupported, match=r"no RDMA device on this host: .*rdma link add"
        ) as raised:
            await use(urlsplit("rdma://127.0.0.1:7000"))
        assert "\n" not in str(raised.value)


# ---- URIs ----


@pytest.mark.parametrize(
    ("query", "device", "gid"),
    [("", None, None), ("?device=mlx5_0", "mlx5_0", None), ("?gid=3&device=rxe0", "rxe0", 3)],
)
def test_uris(query: str, device: str | None, gid: int | None) -> None:
    assert _wanted(urlsplit(f"rdma://10.0.0.1:7000{query}")) == Wanted(device, gid)


@pytest.mark.parametrize(
    "query",
    ["?port=1", "?device=", "?gid=x", "?gid=256", "?gid=-1", "?device=a&device=b", "?mlx5_0"],
)
async def test_senseless_uris(query: str) -> None:
    transport = RdmaTransport(TcpTransport())
    uri = urlsplit(f"rdma://10.0.0.1:7000{query}")
    for use in (transport.dial, transport.listen):
        with pytest.raises(UsageError, match="rdma://"):
            await use(uri)


async def test_what_the_carrier_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagenet.rdma._transport.check_device", lambda wanted: None)
    transport = RdmaTransport(TcpTransport())
    with pytest.raises(
        UsageError, match=r"^rdma://127.0.0.1: the port is missing: say rdma://HOST:PORT"
    ):
        await transport.listen(urlsplit("rdma://127.0.0.1"))
    with pytest.raises(SourceUnreachable, match=r"^rdma://127.0.0.1:1: nothing answers"):
        await transport.dial(urlsplit("rdma://127.0.0.1:1"))
    assert transport.is_private(urlsplit("rdma://127.0.0.1:7000?gid=1"))
    assert not transport.is_private(urlsplit("rdma://10.0.0.1:7000"))


# ---- on the wire ----

OURS = Endpoint(gid=bytes(range(16)), lid=7, number=0x123456, psn=0xABCDEF, mtu=5, reads=16)


def test_endpoints() -> None:
    assert Endpoint.decode(OURS.encode()) == OURS


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, 0x58, "does not speak of RDMA"),
        (4, 2, "version 2"),
        (5, 0, "no sense"),
        (5, 6, "no sense"),
        (6, 0, "no sense"),
        (31, 1, "no sense"),
        (35, 1, "no sense"),
    ],
)
def test_senseless_endpoints(at: int, value: int, complaint: str) -> None:
    data = bytearray(OURS.encode())
    data[at] = value
    assert len(data) == ENDPOINT.size
    with pytest.raises(RemoteProtocolError, match=complaint):
        Endpoint.decode(bytes(data))


def test_chunks() -> None:
    assert chunk_run(REGION, 0) == chunk_run(REGION, 255) == Run(0, 256)
    assert chunk_run(REGION, 256) == chunk_run(REGION, 257) == Run(256, 2)  # the rest of its block
    # larger than a chunk
    assert [chunk_run(REGION, 258), chunk_run(REGION, 259)] == [Run(258, 1), Run(259, 1)]


def test_askings_come_in_pieces() -> None:
    askings = [Asking(Kind.ASK, Run(0, 256)), Asking(Kind.RETURN, Run(256, 2))]
    stream, unread = b"".join(asking.encode() for asking in askings), bytearray()
    got: list[Asking] = []
    for byte in stream:
        unread.append(byte)
        got += decode_askings(unread, REGION)
    assert got == askings
    assert not unread


@pytest.mark.parametrize(
    ("kind", "first", "count", "length"),
    [
        (3, 0, 256, 0), (0, 0, 256, 0), (1, 0, 256, 1), (1, 1, 256, 0), (1, 0, 255, 0),
        (1, 0, 512, 0), (1, 260, 1, 0), (1, 2**64 - 1, 1, 0), (2, 0, 0, 0),
    ],
)  # fmt: skip
def test_senseless_askings(kind: int, first: int, count: int, length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        list(decode_askings(bytearray(KEY_HEADER.pack(0, kind, first, count, length)), REGION))


def read_all(data: bytes) -> Key:
    answer, run, length = decode_answer(data[: KEY_HEADER.size])
    assert length == len(data) - KEY_HEADER.size
    return read_key(answer, run, data[KEY_HEADER.size :])


def test_keys() -> None:
    key = read_all(encode_key(Run(0, 256), 2**63, 77, bytes([0b101]) + bytes(31)))
    assert (key.answer, key.run, key.address, key.key) == (Answer.HERE, Run(0, 256), 2**63, 77)
    assert [page for page in range(256) if key.is_zero(page)] == [0, 2]
    assert not read_all(encode_key(Run(0, 256), 4096, 77, b"")).is_zero(0), "it is not known"
    assert read_all(encode_word(Answer.ZERO, Run(0, 256))).is_zero(255)
    assert read_all(encode_word(Answer.REFUSED, Run(0, 256))).answer is Answer.REFUSED
    assert read_all(encode_word(Answer.FAILED, Run(0, 256), "gone\n")).reason == "gone?"


@pytest.mark.parametrize(
    ("answer", "length"),
    [(0, 0), (4, 0), (Answer.HERE, 0), (Answer.HERE, 47), (Answer.ZERO, 1), (Answer.FAILED, 1025)],
)
def test_senseless_answers(answer: int, length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_answer(struct.pack("<IB3xQII", 0, answer, 0, 256, length))


@pytest.mark.parametrize(
    "answer",
    [
        encode_key(Run(256, 2), 4096, 1, b""),  # the key of another chunk
        encode_key(Run(0, 255), 4096, 1, bytes(32)),
        encode_word(Answer.ZERO, Run(258, 1)),
        encode_key(Run(0, 256), 2**64 - 1, 1, b""),  # no address in front of it would fit a READ
        encode_key(Run(0, 256), 2**64 - (1 << 20) + 1, 1, b""),
    ],
)
def test_answers_that_were_not_asked_for(answer: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        check_key(read_all(answer), Run(0, 256), REGION)


def test_answers_that_were_asked_for() -> None:
    last = read_all(encode_key(Run(0, 256), 2**64 - (1 << 20), 1, b""))
    assert check_key(last, Run(0, 256), REGION) == last
    failed = read_all(
        encode_word(Answer.FAILED, Run(7, 7), "gone")
    )  # whatever its run: it ends the connection
    assert check_key(failed, Run(0, 256), REGION) == failed
