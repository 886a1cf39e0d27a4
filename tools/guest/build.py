"""Makes what QEMU boots in the tests: Debian's kernel, unpatched, with an initrd that has only its
drivers, init.c and devices.c in it; and bare.c, which needs no kernel.

Prints the paths as one JSON line. The files are kept in a cache, so only the first run needs the
network. Nothing is installed; apt-get, dpkg-deb and gcc with a static libc must be there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INIT = [Path(__file__).with_name(name) for name in ("init.c", "devices.c")]
HEADER = Path(__file__).with_name("guest.h")
BARE = Path(__file__).with_name("bare.c")
#: a package that depends on that of the newest kernel, whose name has its version in it
NEWEST_KERNEL = "linux-image-cloud-amd64"

#: drivers that are modules of that kernel, in the order in which they must be loaded
MODULES = [
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("failover", "net_failover", "virtio_net", "virtio_blk", "virtio_balloon"),
]

DIRECTORY = 0o40755
FILE = 0o100644
PROGRAM = 0o100755
CHARACTER_DEVICE = 0o20600
CONSOLE = (5, 1)


class Failure(Exception):
    """What could not be done, in one line."""


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
        raise Failure(
            f"{command[0]} failed:"
            f" {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}"
        )
    return done.stdout


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Yields where to build ``target``, which then appears at once and complete: another build may
    make the same."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as directory:
        unfinished = Path(directory) / target.name
        yield unfinished
        unfinished.replace(target)


# ---- the kernel ----


def kernel(cache: Path) -> tuple[Path, Path]:
    """The kernel, and an archive of its drivers: any that is in the cache, else Debian's newest."""
    for cached in sorted(cache.glob("vmlinuz-*"), reverse=True):
        if modules_of(cached).exists():
            return cached, modules_of(cached)
    package = kernel_package(cache)
    target = cache / package.replace("linux-image", "vmlinuz")
    with made_whole(modules_of(target)) as modules, made_whole(target) as unfinished:
        run("apt-get", "--quiet", "download", package, cwd=unfinished.parent)
        unpacked = unfinished.with_name("unpacked")
        run(
            "dpkg-deb",
            "--extract",
            next(unfinished.parent.glob("*.deb")),
            unpacked,
            cwd=unfinished.parent,
        )
        modules.write_bytes(archive(module_entries(unpacked)))
        (unpacked / "boot" / target.name).replace(unfinished)
    return target, modules_of(target)


def modules_of(kernel: Path) -> Path:
    return kernel.with_name(kernel.name.replace("vmlinuz", "modules"))


def module_entries(unpacked: Path) -> list[bytes]:
    """Archive entries of the modules, named by their numbers. Drivers that are built into this
    kernel are left out."""
    found = [path for name in MODULES for path in unpacked.rglob(f"{name}.ko*")]
    contents = [
        lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for path in found
    ]
    files = [
        entry(100 + number, f"modules/{number}", FILE, data) for number, data in enumerate(contents)
    ]
    return [entry(99, "modules", DIRECTORY), *files]


def kernel_package(cwd: Path) -> str:
    depends = run("apt-cache", "depends", NEWEST_KERNEL, cwd=cwd)
    names = [
        line.split()[-1]
        for line in depends.splitlines()
        if line.strip().startswith("Depends: linux-image-")
    ]
    if not names:
        raise Failure(f"apt knows no kernel for {NEWEST_KERNEL}; apt-get update may help")
    return names[0]


# ---- the initrd ----


def named_after(name: str, *sources: Path) -> str:
    """A name with a hash of what the file is made from: an edited source makes another file."""
    made_from = hashlib.sha256(
        b"".join(source.read_bytes() for source in (*sources, Path(__file__)))
    ).hexdigest()
    return f"{name}-{made_from[:16]}"


def initrd(cache: Path, modules: Path) -> Path:
    """Two archives in one file: the kernel unpacks several in a row."""
    target = cache / named_after("initrd", *INIT, HEADER, modules)
    if target.exists():
        return target
    with made_whole(target) as unfinished:
        program = unfinished.with_name("init")
        run(
            "gcc",
            "-static",
            "-pthread",
            "-O2",
            "-Wall",
            "-Wextra",
            "-s",
            "-o",
            program,
            *INIT,
            cwd=unfinished.parent,
        )
        entries = [
            entry(1, "dev", DIRECTORY),
            entry(2, "dev/console", CHARACTER_DEVICE, device=CONSOLE),
            entry(3, "sys", DIRECTORY),
            entry(4, "init", PROGRAM, program.read_bytes()),
        ]
        unfinished.write_bytes(archive(entries) + modules.read_bytes())
    return target


def archive(entries: list[bytes]) -> bytes:
    """A cpio archive of the kind that the kernel unpacks. It is not compressed: an emulated machine
    is slow to unpack."""
    return b"".join([*entries, entry(0, "TRAILER!!!", 0)])


def entry(
    inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """One file in the "newc" format: a header in hexadecimal, the name and the data, both padded to
    four bytes."""
    owner = group = modified = checksum = 0
    links, own_device = 1, (0, 0)
    path = name.encode() + b"\0"
    numbers = (
        inode,
        mode,
        owner,
        group,
        links,
        modified,
        len(data),
        *own_device,
        *device,
        len(path),
        checksum,
    )
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return padded(header + path) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# ---- the guest without a kernel ----

# 32-bit code that uses nothing of a C library, and nothing of the processor that a boot loader does
# not set up. It is linked to where a PC has memory, without a segment for the headers, which would
# lie where a PC has none.
BARE_OPTIONS = [
    *(
        "-m32",
        "-O2",
        "-Wall",
        "-Wextra",
        "-s",
        "-static",
        "-no-pie",
        "-nostdlib",
        "-ffreestanding",
        "-fno-pic",
    ),
    *(
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-fcf-protection=none",
        "-mgeneral-regs-only",
    ),
    "-Wl,-n,-Ttext=0x100000,--build-id=none",
]


def bare(cache: Path) -> Path:
    target = cache / named_after("bare", BARE)
    if not target.exists():
        with made_whole(target) as unfinished:
            run("gcc", *BARE_OPTIONS, "-o", unfinished, BARE, cwd=unfinished.parent)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        description="make what the tests boot in QEMU: kernel and initrd, and a guest without"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="where they are kept [%(default)s]",
    )
    cache: Path = parser.parse_args().cache.absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        image, modules = kernel(cache)
        made = {
            "kernel": str(image),
            "initrd": str(initrd(cache, modules)),
            "bare": str(bare(cache)),
        }
    except (Failure, OSError) as error:
        print(f"guest/build.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
