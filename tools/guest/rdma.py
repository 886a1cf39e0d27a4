"""Runs a command in a throw-away QEMU guest with software RDMA (rdma_rxe) and this host's files.

The guest boots Debian's kernel. It sees the host's file system read-only, under a layer in memory:
what the command writes is gone when it ends, except what it writes to /mnt/exchange if --exchange
names a directory. The command runs as root in the current directory, with the environment's
PYTHONPATH and PAGENET_ variables. The guest has loopback, and one RDMA device, rxe0, with address
10.77.0.1. The first run makes kernel and initrd, which takes the network; they are kept in a cache.
The processor is emulated: the host needs nothing but QEMU, and everything is ten times slower.

exit codes:
  the command's own, and these:
  124  the time was over
  125  the guest could not be prepared or started, or ended without a status
  126  the guest's kernel panicked
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import build
from build import Failure, default_cache, run

TIMED_OUT, NOT_RUN, PANICKED = 124, 125, 126
KERNEL_PACKAGE = "linux-image-amd64"  # not the cloud one, which has neither RDMA nor 9p
FREE = ["-accel", "tcg,thread=multi"]
COUNTING = ["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"]
HERE = Path(__file__).parent
INIT, START = HERE / "rdma-init.sh", HERE / "rdma-start.sh"
DIRECTORIES = ["bin", "dev", "host", "layer", "modules", "proc", "root", "sys"]
MODULES = [
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng",
    "crc32_generic",  # rdma_rxe asks for it by algorithm, which modprobe does not see
    "rdma_rxe", "rdma_ucm", "dummy", "veth", "virtio_net", "sch_netem",
    "tls", "gcm", "ctr", "ghash_generic",  # which the kernel asks for by algorithm
]  # fmt: skip
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "modprobe": "kmod",
    "rdma": "iproute2",
}


# ---- kernel and initrd ----


def guest_files(cache: Path) -> tuple[Path, Path]:
    """Kernel and initrd of the guest. The name of their directory has a hash of what they are made
    from."""
    made_from = hashlib.sha256(
        b"".join(path.read_bytes() for path in (Path(__file__), INIT))
    ).hexdigest()
    kept = sorted(cache.glob(f"rdma-{made_from[:16]}-*"))
    if not kept:
        kept = [make_guest(cache, f"rdma-{made_from[:16]}")]
    return kept[-1] / "vmlinux", kept[-1] / "initrd"


def make_guest(cache: Path, name: str) -> Path:
    package = kernel_package(cache)
    target = cache / f"{name}-{package}"
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as directory:
        work = Path(directory)
        run("apt-get", "--quiet", "download", package, cwd=work)
        unpacked = work / "unpacked"
        run("dpkg-deb", "--extract", next(work.glob("*.deb")), unpacked, cwd=work)
        made = work / "made"
        made.mkdir()
        (made / "vmlinux").write_bytes(
            uncompressed(next((unpacked / "boot").glob("vmlinuz-*")), work)
        )
        (made / "initrd").write_bytes(initrd(unpacked, work))
        with contextlib.suppress(OSError):  # another run was faster
            made.rename(target)
    return target


def kernel_package(cwd: Path) -> str:
    depends = run("apt-cache", "depends", KERNEL_PACKAGE, cwd=cwd)
    names = [
        line.split()[-1]
        for line in depends.splitlines()
        if line.strip().startswith("Depends: linux-image-")
    ]
    if not names:
        raise Failure(f"apt knows no kernel for {KERNEL_PACKAGE}; apt-get update may help")
    return names[0]


def uncompressed(bzimage: Path, cwd: Path) -> bytes:
    """The ELF kernel within: an emulated processor would take eight seconds to unpack it, each
    time."""
    data = bzimage.read_bytes()
    start = ((data[0x1F1] or 4) + 1) * 512 + int.from_bytes(data[0x248:0x24C], "little")
    size = int.from_bytes(data[0x24C:0x250], "little") - 4  # its last word is the unpacked size
    payload = cwd / "payload"
    payload.write_bytes(data[start : start + size])
    unpack = {
        b"\xfd7zXZ\0": ["xz", "-dc"],
        b"\x28\xb5\x2f\xfd": ["zstd", "-dc"],
        b"\x1f\x8b": ["gzip", "-dc"],
    }
    for magic, command in unpack.items():
        if data[start : start + len(magic)] == magic:
            return output([*command, str(payload)], cwd)
    raise Failure(f"{bzimage.name} is compressed in an unknown way")


def initrd(unpacked: Path, work: Path) -> bytes:
    # depmod looks in lib/modules. Since Debian 13 the package has usr/lib/modules; on a whole
    # system lib is a link to usr/lib.
    if not (unpacked / "lib").exists():
        (unpacked / "lib").symlink_to("usr/lib")
    [version] = os.listdir(unpacked / "lib/modules")
    run("depmod", "-b", unpacked, version, cwd=work)
    entries = [build.entry(1 + i, name, build.DIRECTORY) for i, name in enumerate(DIRECTORIES)]
    entries.append(build.entry(50, "dev/console", build.CHARACTER_DEVICE, device=build.CONSOLE))
    busybox = Path(tool("busybox")).read_bytes()
    if b"/ld-linux" in busybox[:4096]:
        raise Failure("busybox is not a static one; Debian has that in busybox-static")
    entries.append(build.entry(51, "bin/busybox", build.PROGRAM, busybox))
    entries.append(build.entry(52, "init", build.PROGRAM, INIT.read_bytes()))
    for number, path in enumerate(module_files(unpacked, version, work)):
        data = path.read_bytes() if path.suffix == ".ko" else output(["xz", "-dc", str(path)], work)
        entries.append(
            build.entry(
                100 + number,
                f"modules/{number:03}-{path.name.removesuffix('.xz')}",
                build.PROGRAM,
                data,
            )
        )
    entries.append(build.entry(0, "TRAILER!!!", 0))
    return b"".join(entries)


def module_files(unpacked: Path, version: str, cwd: Path) -> list[Path]:
    """The modules and those that they need, each once, in an order in which they can be loaded."""
    shown = [
        run("modprobe", "-d", unpacked, "-S", version, "--show-depends", module, cwd=cwd)
        for module in MODULES
    ]
    lines = [line.split() for text in shown for line in text.splitlines()]
    return list(dict.fromkeys(Path(line[1]) for line in lines if line[0] == "insmod"))


def output(command: Sequence[str], cwd: Path) -> bytes:
    try:
        return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise Failure(str(error)) from None


def tool(name: str) -> str:
    for directory in [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]:
        path = Path(directory) / name
        if directory and os.access(path, os.X_OK):
            return str(path)
    raise Failure(f"{name} is not installed; Debian has it in {TOOLS[name]}")


# ---- a run ----


def write_command(exchange: Path, command: Sequence[str]) -> None:
    """Write what the guest runs, and where."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "PYTHONPATH" or name.startswith("PAGENET_")
    }
    lines = [
        "#!/bin/sh",
        "export HOME=/root LANG=C.UTF-8 PAGENET_RDMA_GUEST=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in kept.items()),
        f"cd {shlex.quote(os.getcwd())} || exit 125",
        f"exec {shlex.join(command)}",
    ]
    (exchange / "command").write_text("\n".join(lines) + "\n")
    (exchange / "command").chmod(0o755)
    (exchange / "start").write_bytes(START.read_bytes())
    (exchange / "status").unlink(missing_ok=True)


def qemu_command(
    kernel: Path, initrd: Path, exchange: Path, options: argparse.Namespace
) -> list[str]:
    words = [
        "console=ttyS0",
        "quiet",
        "loglevel=3",
        "panic=-1",
        "mitigations=off",
        "cryptomgr.notests",
    ]
    words.append(f"ADDRESS={options.address}")
    wire: list[str] = []
    if options.wire is not None:
        words.append("WIRE=1")
        side, _, path = options.wire.partition(":")
        mac = "52:54:00:77:00:01" if side == "listen" else "52:54:00:77:00:02"
        wire = [
            "-netdev", f"stream,id=wire,server={'on' if side == 'listen' else 'off'},"
                f"addr.type=unix,addr.path={path}",
            "-device", f"virtio-net-pci,netdev=wire,mac={mac},host_mtu=4500",
        ]  # fmt: skip
    return [
        tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none",
        "-no-reboot",
        "-machine", "q35", *(COUNTING if options.icount else FREE), "-cpu", "max",
        "-smp", str(options.cpus), "-m", str(options.memory),
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", " ".join(words),
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=exchange,path={exchange},security_model=none",
        "-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange",
        "-device", "virtio-rng-pci", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
        "-serial", "stdio", *wire,
    ]  # fmt: skip


def run_guest(command: list[str], exchange: Path, timeout: float) -> int:
    """Start QEMU, pass on the guest's output, and find out how it ended."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        try:
            panicked, timed_out = pass_on(qemu, time.monotonic() + timeout)
        finally:
            qemu.kill()
    if timed_out:
        return say(f"no end after {timeout:g} s", TIMED_OUT)
    status = exchange / "status"
    if status.exists() and (text := status.read_text().strip()).isdecimal():
        return int(text)
    if panicked:
        return say("the guest's kernel panicked", PANICKED)
    return say(f"the guest ended without a word (QEMU: exit code {qemu.returncode})", NOT_RUN)


def pass_on(qemu: subprocess.Popen[bytes], deadline: float) -> tuple[bool, bool]:
    """Copy the guest's output to stdout until it ends. Returns whether there was a panic in it, and
    whether the time was over."""
    assert qemu.stdout is not None
    panicked, tail = False, b""
    with selectors.DefaultSelector() as selector:
        selector.register(qemu.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            data = os.read(qemu.stdout.fileno(), 65536)
            if not data:
                qemu.wait()
                return panicked, False
            tail = (tail + data)[-65536:]
            panicked = panicked or b"Kernel panic - not syncing" in tail
            sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
            sys.stdout.buffer.flush()
    return panicked, True


def say(text: str, status: int) -> int:
    print(f"rdma-guest: {text}", file=sys.stderr)
    return status


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    usage, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="rdma-guest",
        description=usage,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="of kernel and initrd [%(default)s]",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="for the whole run, in seconds [%(default)s]",
    )
    parser.add_argument(
        "--memory", type=int, default=1536, metavar="MIB", help="of the guest [%(default)s]"
    )
    # With two processors, and the host's busy, everything is slower: each waits for the other's
    # emulation.
    parser.add_argument(
        "--cpus", type=int, default=1, metavar="N", help="of the guest [%(default)s]"
    )
    parser.add_argument(
        "--icount",
        action="store_true",
        help="its clock counts instructions, of 2 ns, and does not go by ours",
    )
    parser.add_argument(
        "--exchange",
        type=Path,
        metavar="DIR",
        help="what the guest sees as /mnt/exchange, writable",
    )
    parser.add_argument(
        "--address",
        default="10.77.0.1",
        metavar="IP",
        help="of the guest's RDMA device, /24 [%(default)s]",
    )
    parser.add_argument(
        "--wire", metavar="listen:PATH|dial:PATH", help="join two guests by the unix socket PATH"
    )
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="absolute, or in the guest's PATH",
    )
    options = parser.parse_args(argv)
    if options.icount and options.cpus != 1:
        parser.error("--icount is for one processor")
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.command:
        parser.error("there is no command to run")
    if options.wire is not None and options.wire.partition(":")[0] not in ("listen", "dial"):
        parser.error(
            f"--wire {options.wire}: say listen:PATH in one guest and dial:PATH in the other"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(sys.argv[1:] if argv is None else argv)
    try:
        for name in TOOLS:
            tool(name)
        cache: Path = options.cache.absolute()
        cache.mkdir(parents=True, exist_ok=True)
        kernel, initial = guest_files(cache)
        with contextlib.ExitStack() as stack:
            exchange = options.exchange or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="rdma-guest-"))
            )
            exchange = exchange.absolute()
            write_command(exchange, options.command)
            return run_guest(
                qemu_command(kernel, initial, exchange, options), exchange, options.timeout
            )
    except (Failure, OSError) as error:
        return say(str(error), NOT_RUN)


if __name__ == "__main__":
    sys.exit(main())
