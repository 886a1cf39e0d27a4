"""Kernel features, and whether this user may use them."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from .. import _native
from ..errors import Unsupported
from ..uffd import Feature, probe
from ._check import Check, fine, lacking, useless

__all__ = ["kernel_checks"]

_KVM_GET_API_VERSION = 0xAE00
#: features of userfaultfd: since which Linux, and what does not work without
_FEATURES = {
    Feature.MISSING_SHMEM: ("4.11", "memory that is shared (memfd, tmpfs) cannot be filled"),
    Feature.MISSING_HUGETLBFS: ("4.11", "memory of huge pages cannot be filled"),
    Feature.MINOR_SHMEM: ("5.14", "pages of shared memory are copied, and guests share none"),
    Feature.EVENT_REMOVE: ("4.11", "what an owner gives up gets the source's bytes all the same"),
    Feature.WP_ASYNC: ("6.7", "no hybrid migration, and no snapshots of what runs"),
    Feature.POISON: ("6.6", "--on-loss poison is refused; faults outside of a guest's memory kill"),
}


def kernel_checks() -> Iterator[Check]:
    yield fine("kernel", f"Linux {platform.release()}, {platform.machine()}")
    yield from _userfaultfd()
    yield _written_pages()
    yield _descriptors_of_others()
    yield _memory_of_others()
    yield _kvm()


def _userfaultfd() -> Iterator[Check]:
    try:
        features = probe()
    except Unsupported as error:
        yield useless("userfaultfd", "not to be had", str(error))
        return
    yield fine("userfaultfd", "for faults of user space and of the kernel")
    for feature, (since, without) in _FEATURES.items():
        name = f"userfaultfd {feature.name}"
        if feature in features:
            yield fine(name, "there")
        else:
            yield lacking(name, "not there", f"{without}; take Linux {since} or newer")


def _written_pages() -> Check:
    name = "which pages were written"
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _native.track_probe(pagemap)
        finally:
            os.close(pagemap)
    except OSError as error:
        without = "no hybrid migration, no pagenet-dirty, and no snapshots of what runs"
        return lacking(name, str(error.strerror), f"{without}; take Linux 6.7 or newer")
    return fine(name, "PAGEMAP_SCAN")


def _descriptors_of_others() -> Check:
    name, without = "descriptors of other processes", "no running QEMU can be attached"
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(_native.take_descriptor(pidfd, pidfd))
    except OSError as error:
        advice = f"{without}; take Linux 5.6 or newer, or let this container use pidfd_getfd"
        return lacking(name, str(error.strerror), advice)
    finally:
        os.close(pidfd)
    return fine(name, "pidfd_getfd")


def _memory_of_others() -> Check:
    """Yama's rule. A process that is traced by its user needs no more than that."""
    name = "memory of other processes"
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        scope = 0
    if scope == 0 or (scope < 3 and _has_capability(19)):
        return fine(name, f"may be traced (ptrace_scope {scope})")
    advice = (
        "memory of running processes cannot be served, nor QEMU attached: run as root, or"
        " sysctl kernel.yama.ptrace_scope=0"
    )
    return lacking(name, f"ptrace_scope {scope}", advice)


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _kvm() -> Check:
    advice = "guests of QEMU are emulated, and slow; load kvm, or join the group kvm"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return lacking("KVM", str(error.strerror), advice)
    try:
        return fine("KVM", f"API version {fcntl.ioctl(fd, _KVM_GET_API_VERSION)}")
    except OSError as error:
        return lacking("KVM", str(error.strerror), advice)
    finally:
        os.close(fd)
