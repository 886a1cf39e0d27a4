"""This kernel has TLS: it encrypts what OpenSSL would, and sends pages from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from processes import PAGE, write_pattern
from tap import Tap

from pagenet import OwnMemory, Tls, pull, serve
from pagenet.certificates import make_certificates
from pagenet.transport import LaneKind

SIZE = 512 * PAGE
PATIENCE = 60.0


@pytest.mark.parametrize("lane", ["native", "trio"])
@pytest.mark.parametrize("is_far", [True, False])
async def test_kernel_encrypts(is_far: bool, lane: LaneKind, tmp_path: Path) -> None:
    """Where the peer's address is another one, pages are sent by sendfile."""
    make_certificates(tmp_path / "pki", ["127.0.0.1"])
    tls = Tls(tmp_path / "pki" / "127.0.0.1")
    source, memory = write_pattern(tmp_path / "source", SIZE), OwnMemory("memfd")
    content = source.read_bytes()
    pages = {content[at : at + PAGE] for at in range(0, SIZE, PAGE)}
    try:
        async with (
            serve(str(source), listen="tcp://127.0.0.1:0", tls=tls, lane=lane) as server,
            trio.open_nursery() as nursery,
        ):
            tap = Tap(server.uri, local_address="127.0.0.3" if is_far else None)
            uri = await nursery.start(tap.run)
            async with pull(uri, memory, compress="none", lane=lane, tls=tls) as transfer:
                with trio.fail_after(PATIENCE):
                    await transfer.wait_complete()
            assert "by the kernel" in transfer.lane
            nursery.cancel_scope.cancel()
        assert await memory.read(0, SIZE) == content
    finally:
        memory.close()
    seen = b"".join(tap.seen)
    assert not any(page in seen for page in pages)
