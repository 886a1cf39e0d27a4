"""The tests of the C core once more, on a build with AddressSanitizer and
UndefinedBehaviorSanitizer, and on one with ThreadSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from sanitizers import ADDRESS, THREAD, Build, Sanitizer, build, unavailable

# Each takes minutes, and several times as long on a busy machine. A hang is found by the limit of
# each test within.
pytestmark = pytest.mark.timeout(1800)

OVERFLOW = """
from pagenet._pagenet import ffi, lib
page = ffi.new("char[4096]")
lib.pn_zero_run(page, 2, 4096, ffi.new("int *"))
"""

OVERFLOW_IN_TESTING = """
from pagenet._pagenet_testing import ffi, lib
lib.pn_pattern_fill(ffi.new("char[4096]"), 0, 2, 4096, 1, 0)
"""

MISALIGNED = """
from pagenet._pagenet import ffi, lib
memory = ffi.new("char[]", lib.pn_map_bytes(1) + 1)
lib.pn_map_init(ffi.cast("struct pn_map *", memory + 1), 1)
"""

# A data race of two threads: pn_pattern_fill writes without atomics, since its caller has the
# memory to itself. It runs long enough to be interrupted in the middle even if both threads share
# one processor.
RACE = """
import threading
from pagenet._pagenet_testing import ffi, lib
memory = ffi.new("char[]", 256 * 4096)
start = threading.Barrier(2)
def fill():
    start.wait()
    for _ in range(10):
        lib.pn_pattern_fill(memory, 0, 256, 4096, 1, 0)
threads = [threading.Thread(target=fill) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

MISUSES = {
    ADDRESS.name: [
        (OVERFLOW, "heap-buffer-overflow"),
        (OVERFLOW_IN_TESTING, "heap-buffer-overflow"),
        (MISALIGNED, "misaligned address"),
    ],
    THREAD.name: [(RACE, "data race")],
}


@pytest.fixture(scope="module", params=[ADDRESS, THREAD], ids=lambda sanitizer: sanitizer.name)
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    sanitizer: Sanitizer = request.param
    if reason := unavailable(sanitizer, tmp_path_factory.mktemp("probe")):
        pytest.skip(reason)
    return build(sanitizer, tmp_path_factory.mktemp(sanitizer.name))


def test_sees_misuse(sanitized: Build) -> None:
    """Otherwise a build that is not instrumented would pass everything below."""
    for program, finding in MISUSES[sanitized.sanitizer.name]:
        result = sanitized.run("-c", program)
        assert result.returncode != 0, result.stdout
        assert finding in sanitized.reports() + result.stdout


def test_native_tests_pass(sanitized: Build) -> None:
    # capture=sys: a process that a sanitizer ends could not show what pytest had captured of its
    # stderr.
    result = sanitized.run(
        "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", "-m", "native", "tests"
    )
    reports = sanitized.reports()
    assert not reports, reports
    assert result.returncode == 0, result.stdout
    assert f"C core: {sanitized.core}" in result.stdout


def test_reports_are_taken_once(tmp_path: Path) -> None:
    (tmp_path / "report.1").write_text("a finding")
    nothing = Build(ADDRESS, tmp_path)
    assert nothing.reports() == "a finding"
    assert nothing.reports() == ""
