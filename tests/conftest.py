"""What applies to every test: nothing may be left behind, and soak tests run only with
``--soak``."""

from __future__ import annotations

import functools
import importlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator

import pytest
from fuzzing import SOAK_SECONDS, Fuzz
from leaks import GRACE, left_behind, orphans, own_mounts, snapshot

# In a guest with an RDMA device, no test needs it, and importing it takes seconds.
if "PAGENET_RDMA_GUEST" not in os.environ:
    import hypothesis

    # On a loaded machine or under a sanitizer, a slow example is not a wrong one.
    hypothesis.settings.register_profile(
        "pagenet", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("pagenet")

_call_failed = pytest.StashKey[bool]()
_fuzz_tests = pytest.StashKey[int]()
_fuzz = pytest.StashKey[Fuzz]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", action="store_true", help="run the tests marked soak too, and fuzz for an hour"
    )
    parser.addoption(
        "--fuzz-seed",
        type=int,
        metavar="N",
        help="of the first round of each fuzzer; a failure names its own",
    )
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        default=SOAK_SECONDS,
        metavar="S",
        help="with --soak: for all fuzzers together",
    )


def pytest_configure(config: pytest.Config) -> None:
    own_mounts()
    keep_bytecode()
    os.environ["PAGENET_CONTROL_DIR"] = ""  # a daemon that is killed leaves its socket
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = random.SystemRandom().randrange(1 << 40)


def keep_bytecode() -> None:
    """Where the environment forbids it, as in many containers, each of the thousand commands that
    tests start would compile pagenet anew: a third of the time that it takes to start."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Names the build of the C core under test (installed, in place, or a sanitizer's), and the
    fuzzers' first seed."""
    try:
        core = f"C core: {importlib.import_module('pagenet._pagenet').__file__}"
    except ImportError as error:
        core = f"C core: none ({error})"
    return [core, f"fuzzers: --fuzz-seed {config.option.fuzz_seed}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    fuzzers = [item for item in items if "fuzz" in getattr(item, "fixturenames", ())]
    config.stash[_fuzz_tests] = len(fuzzers)
    if config.getoption("--soak"):
        for item in fuzzers:
            item.add_marker(
                pytest.mark.timeout(2 * config.option.fuzz_seconds / len(fuzzers) + 120)
            )
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often each "outcome" that tests have recorded came."""
    reports = terminalreporter.getreports("passed")
    outcomes = Counter(
        value for report in reports for name, value in report.user_properties if name == "outcome"
    )
    for outcome, count in sorted(outcomes.items()):
        terminalreporter.write_line(f"{count:6}  {outcome}")
    for report in reports:
        for name, value in report.user_properties:
            if name == "rounds" and terminalreporter.config.getoption("--soak"):
                terminalreporter.write_line(f"{value:9} rounds of {report.nodeid}")


@functools.cache
def uffd_refusal() -> str:
    """Why this user may not use userfaultfd here; empty if it may."""
    import pagenet.uffd

    try:
        pagenet.uffd.probe()
    except pagenet.Unsupported as error:
        return str(error)
    return ""


def skip_if_refused(report: pytest.TestReport, item: pytest.Item) -> None:
    """A test that failed because this user may not use userfaultfd, as its failure tells, is
    reported as skipped."""
    said = report.longreprtext + "".join(text for _, text in report.sections)
    if (reason := uffd_refusal()) and reason.partition(":")[0] in said:
        path, line, _ = item.location
        report.outcome = "skipped"
        report.longrepr = (path, (line or 0) + 1, f"Skipped: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_call_failed] = report.failed
        if (fuzz := item.stash.get(_fuzz, None)) is not None:
            report.user_properties.append(("rounds", fuzz.done))
            report.sections.append(("the last round of this fuzzer", fuzz.said))
    if report.failed:
        skip_if_refused(report, item)
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up before and torn down after the test's own fixtures; what wider fixtures keep open is
    not the test's.

    A failed test is not examined: its traceback keeps its variables, and so its files, alive.
    """
    before = snapshot()
    yield
    if not request.node.stash.get(_call_failed, False) and (leaks := left_behind(before)):
        pytest.fail("\n  ".join(["the test left behind:", *leaks]), pytrace=False)


@pytest.fixture
def uffd_permitted() -> None:
    """For tests that need userfaultfd, and whose failure would not tell that it is missing."""
    if reason := uffd_refusal():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real S3 server with an empty bucket ``bucket``, and the environment of its users."""
    pytest.importorskip("obstore")
    from stores import s3_server  # few tests need it

    from pagenet.objects import open_store

    with (
        s3_server(tmp_path_factory.mktemp("weed")) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        with open_store("s3://bucket", 60) as store:  # the runtime that stays is no test's
            store.write("first", b"1")
        yield


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Rounds of a fuzzer. With ``--soak`` all fuzzers share the time."""
    config = request.config
    seconds = (
        config.option.fuzz_seconds / config.stash[_fuzz_tests]
        if config.getoption("--soak")
        else None
    )
    fuzz = Fuzz(config.option.fuzz_seed, seconds)
    request.node.stash[_fuzz] = fuzz
    return fuzz


@pytest.fixture(params=["trio", "native"])
def lane(request: pytest.FixtureRequest) -> str:
    """Each of the two kinds of lanes in turn."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def no_orphans() -> Iterator[None]:
    """No orphan may be left behind. A grandchild whose parent has died is no child of this process;
    the environment that it inherited gives it away."""
    token = f"PAGENET_TEST_SESSION={os.getpid()}.{time.monotonic_ns()}"
    name, _, value = token.partition("=")
    os.environ[name] = value
    yield
    deadline = time.monotonic() + GRACE
    while (left := list(orphans(token))) and time.monotonic() < deadline:
        time.sleep(0.005)
    del os.environ[name]
    if left:
        pytest.fail("\n  ".join(["processes have outlived the tests:", *left]), pytrace=False)
