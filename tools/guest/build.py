"""Makes what QEMU boots in the tests: Debian's kernel, unpatched, and an initrd with nothing but init.c in it.

Prints the paths of both as one JSON line. They are kept in a cache, so that only the first run needs the network. Nothing
is installed; apt-get, dpkg-deb and gcc with a static libc must be there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INIT = Path(__file__).with_name("init.c")
#: depends on the package of the newest kernel, whose name has its version in it
NEWEST_KERNEL = "linux-image-cloud-amd64"

DIRECTORY = 0o40755
PROGRAM = 0o100755
CHARACTER_DEVICE = 0o20600
CONSOLE = (5, 1)


class Failure(Exception):
    """Says in one line what could not be done."""


def default_cache() -> Path:
    if own := os.environ.get("PAGENET_GUEST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagenet-guest"


def run(*command: str | Path, cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        raise Failure(f"{command[0]} is not installed") from None
    if done.returncode:
        raise Failure(f"{command[0]} failed: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Where to build ``target``, which appears at once and complete: another build may be after the same."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as directory:
        unfinished = Path(directory) / target.name
        yield unfinished
        unfinished.replace(target)


# ---- the kernel ----


def kernel(cache: Path) -> Path:
    """Any that is in the cache, else Debian's newest."""
    if cached := sorted(cache.glob("vmlinuz-*")):
        return cached[-1]
    package = kernel_package(cache)
    target = cache / package.replace("linux-image", "vmlinuz")
    with made_whole(target) as unfinished:
        run("apt-get", "--quiet", "download", package, cwd=unfinished.parent)
        unpacked = unfinished.with_name("unpacked")
        run("dpkg-deb", "--extract", next(unfinished.parent.glob("*.deb")), unpacked, cwd=unfinished.parent)
        (unpacked / "boot" / target.name).replace(unfinished)
    return target


def kernel_package(cwd: Path) -> str:
    depends = run("apt-cache", "depends", NEWEST_KERNEL, cwd=cwd)
    names = [line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends: linux-image-")]
    if not names:
        raise Failure(f"apt knows no kernel for {NEWEST_KERNEL}; apt-get update may help")
    return names[0]


# ---- the initrd ----


def initrd(cache: Path) -> Path:
    """What it is made from is in its name: an edited init.c is another file."""
    made_from = hashlib.sha256(INIT.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    target = cache / f"initrd-{made_from[:16]}"
    if target.exists():
        return target
    with made_whole(target) as unfinished:
        program = unfinished.with_name("init")
        run("gcc", "-static", "-pthread", "-O2", "-Wall", "-Wextra", "-s", "-o", program, INIT, cwd=unfinished.parent)
        unfinished.write_bytes(archive(program.read_bytes()))
    return target


def archive(init: bytes) -> bytes:
    """A cpio archive of the kind that the kernel unpacks; not compressed, for an emulated machine is slow at that."""
    entries = [
        entry(1, "dev", DIRECTORY),
        entry(2, "dev/console", CHARACTER_DEVICE, device=CONSOLE),
        entry(3, "init", PROGRAM, init),
        entry(0, "TRAILER!!!", 0),
    ]
    return b"".join(entries)


def entry(inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file in the "newc" format: a header in hexadecimal, the name and the data, both padded to four bytes."""
    owner = group = modified = checksum = 0
    links, own_device = 1, (0, 0)
    path = name.encode() + b"\0"
    numbers = (inode, mode, owner, group, links, modified, len(data), *own_device, *device, len(path), checksum)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return padded(header + path) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def main() -> int:
    parser = argparse.ArgumentParser(description="make the kernel and the initrd that the tests boot in QEMU")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="where they are kept [%(default)s]")
    cache: Path = parser.parse_args().cache.absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = {"kernel": str(kernel(cache)), "initrd": str(initrd(cache))}
    except (Failure, OSError) as error:
        print(f"guest/build.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
