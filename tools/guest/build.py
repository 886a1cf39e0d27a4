"""Makes what QEMU boots in the tests: Debian's kernel, unpatched, with an initrd that has nothing but init.c in it; and bare.c,
which needs no kernel.

Prints the paths as one JSON line. They are kept in a cache, so that only the first run needs the network. Nothing is
installed; apt-get, dpkg-deb and gcc with a static libc must be there.
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
BARE = Path(__file__).with_name("bare.c")
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


def named_after(name: str, source: Path) -> str:
    """What a file is made from is in its name: an edited source is another file."""
    made_from = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return f"{name}-{made_from[:16]}"


def initrd(cache: Path) -> Path:
    target = cache / named_after("initrd", INIT)
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


# ---- the guest without a kernel ----

# 32-bit code that takes nothing from a C library, and nothing of the processor that a boot loader does not set up. Linked to
# where a PC has memory, without a segment for the headers, which would lie where it has none.
BARE_OPTIONS = [
    *("-m32", "-O2", "-Wall", "-Wextra", "-s", "-static", "-no-pie", "-nostdlib", "-ffreestanding", "-fno-pic"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-mgeneral-regs-only"),
    "-Wl,-n,-Ttext=0x100000,--build-id=none",
]


def bare(cache: Path) -> Path:
    target = cache / named_after("bare", BARE)
    if not target.exists():
        with made_whole(target) as unfinished:
            run("gcc", *BARE_OPTIONS, "-o", unfinished, BARE, cwd=unfinished.parent)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="make what the tests boot in QEMU: kernel and initrd, and a guest without")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="where they are kept [%(default)s]")
    cache: Path = parser.parse_args().cache.absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = {"kernel": str(kernel(cache)), "initrd": str(initrd(cache)), "bare": str(bare(cache))}
    except (Failure, OSError) as error:
        print(f"guest/build.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
