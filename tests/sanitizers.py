"""A second build of pagenet with gcc's sanitizers in the C core, and the environment that a process
needs to run it.

The build is a copy of the whole package, compiled in place: an extension module lives inside its
package, so a directory with the extension alone could not take precedence over an installed
``pagenet``. PYTHONPATH puts the copy first, and PYTHONSAFEPATH keeps the working directory, where
another ``pagenet`` may be, from preceding it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["LICENSE", "README.md", "native", "pagenet", "pyproject.toml", "setup.py"]


@dataclass(frozen=True)
class Sanitizer:
    name: str
    flags: tuple[str, ...]
    #: the runtime library: it is not linked into Python, so it has to be loaded before anything
    #: else
    runtime: str
    #: by runtime; each also gets a log_path (which gcc 12's UndefinedBehaviorSanitizer ignores)
    options: Mapping[str, str]
    environment: Mapping[str, str]


ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "libasan.so",
    # Python frees little of its memory when it exits. A poisoned page is a SIGBUS, which tests
    # provoke.
    {
        # At the end of a thread libasan of gcc 12 sometimes reports its own signal stack.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:use_sigaltstack=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Python's own allocator would hide the ends of small blocks, as ffi.new() makes them.
    {"PYTHONMALLOC": "malloc"},
)
# Python itself is not instrumented. The GIL is a pthread mutex and condition, which the runtime
# sees: what one thread did before it gave up the GIL happened before what another does under it.
THREAD = Sanitizer(
    "thread",
    ("-fsanitize=thread",),
    "libtsan.so",
    {
        "TSAN_OPTIONS": (
            "halt_on_error=0:exitcode=66:handle_sigbus=0:"
            f"suppressions={ROOT / 'tests' / 'tsan.suppressions'}"
        )
    },
    {},
)


@dataclass(frozen=True)
class Build:
    sanitizer: Sanitizer
    path: Path

    @property
    def core(self) -> Path:
        (core,) = self.path.glob("pagenet/_pagenet.*.so")
        return core

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with ``arguments``, in the checkout, on this build. UndefinedBehaviorSanitizer
        reports to its stderr, which is part of stdout here; the others to files: see
        :meth:`reports`."""
        return subprocess.run(
            [*_without_aslr(), "env", *self._environment(), sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def reports(self) -> str:
        """What the sanitizer has found since the last call, in the process and in those that it
        started. The reports are removed."""
        files = sorted(self.path.glob("report.*"))
        text = "\n".join(file.read_text(errors="replace") for file in files)
        for file in files:
            file.unlink()
        return text

    def _environment(self) -> list[str]:
        variables = {
            name: f"{value}:log_path={self.path}/report"
            for name, value in self.sanitizer.options.items()
        }
        variables |= self.sanitizer.environment
        variables["LD_PRELOAD"] = _runtime(self.sanitizer)
        variables["PYTHONPATH"] = str(self.path)
        variables["PYTHONSAFEPATH"] = "1"
        return [f"{name}={value}" for name, value in variables.items()]


def build(sanitizer: Sanitizer, into: Path) -> Build:
    """Raises :exc:`subprocess.CalledProcessError`, after the compiler's output was printed, if it
    does not build."""
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, into / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, into)
    flags = " ".join(sanitizer.flags)
    variables = {
        "CC": "gcc",
        "PAGENET_CFLAGS": f"-O1 -fno-omit-frame-pointer {flags}",
        "PAGENET_LDFLAGS": flags,
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=into, env=os.environ | variables, check=True)
    return Build(sanitizer, into)


def unavailable(sanitizer: Sanitizer, scratch: Path) -> str | None:
    """Why this host cannot run that sanitizer, or None if it can."""
    if not shutil.which("gcc"):
        return "gcc is missing"
    command = ["gcc", *sanitizer.flags, "-x", "c", "-", "-o", str(scratch / "probe")]
    probe = subprocess.run(
        command, input="int main(void) { return 0; }", capture_output=True, text=True
    )
    if probe.returncode:
        return f"gcc has no runtime for {sanitizer.flags[0]} ({sanitizer.runtime})"
    nothing = Build(sanitizer, scratch)
    trial = nothing.run("-c", "")
    if trial.returncode:
        return (
            f"Python does not start under {sanitizer.runtime}:"
            f" {(trial.stdout + nothing.reports()).strip()}"
        )
    return None


def _runtime(sanitizer: Sanitizer) -> str:
    command = ["gcc", f"-print-file-name={sanitizer.runtime}"]
    return str(
        Path(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        ).resolve()
    )


def _without_aslr() -> list[str]:
    """The prefix of a command that begins with ``env``. gcc 12's ThreadSanitizer knows the places
    that addresses get with vm.mmap_rnd_bits up to 28 and gives up on others (newer kernels' default
    is 32 and more). Before ``env``, and not after it, since LD_PRELOAD would put the runtime, still
    with random addresses, into setarch as well. Containers may forbid it; then the prefix is empty.
    """
    command = ["setarch", "-R"]
    allowed = (
        shutil.which("setarch")
        and not subprocess.run([*command, "true"], capture_output=True).returncode
    )
    return command if allowed else []
