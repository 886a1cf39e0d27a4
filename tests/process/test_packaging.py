"""What users get: the sdist builds a wheel, and the wheel works in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: left out of the copy that is built: made by tools, or by earlier builds whose files this build
#: could pick up
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".*_cache", ".hypothesis", ".venv", "*.egg-info", "*.so", "__pycache__", "build", "dist"
)

IMPORT_ALL = """
import importlib, pkgutil, pagenet
for module in pkgutil.walk_packages(pagenet.__path__, "pagenet."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from pagenet._pagenet import ffi, lib
zero = ffi.new("int *")
print(lib.pn_zero_run(bytes(8192), 2, 4096, zero), zero[0], pagenet.__file__)
"""

#: where the wheel has the files for share/ and lib/, and which these are
SHARED = f"pagenet-{PROJECT['version']}.data/data"
PAGES = {
    place.format(command)
    for place in (
        "share/man/man1/{}.1",
        "share/bash-completion/completions/{}",
        "share/zsh/site-functions/_{}",
    )
    for command in PROJECT["scripts"]
}
UNITS = {f"lib/systemd/system/{unit.name}" for unit in (ROOT / "systemd").iterdir()}

PRELOAD_LIBRARY = "from pagenet.qemu._preload import preload_library; print(preload_library())"

SCRIPTS = """
from importlib.metadata import distribution
for script in distribution("pagenet").entry_points.select(group="console_scripts"):
    print(script.name, "=", script.value)
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


GUARD = "pagenet-guard"  # a program, built beside its module


def sources(directory: str) -> set[str]:
    """Paths below the checkout of all project files in ``directory``."""
    files = (ROOT / directory).rglob("*")
    return {
        str(file.relative_to(ROOT))
        for file in files
        if file.is_file()
        and "__pycache__" not in file.parts
        and file.suffix not in {".so", ".o"}
        and file.name != GUARD
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the sdist of the checkout, and the wheel made from that sdist, in isolated
    environments."""
    directory = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, directory / "checkout", ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--outdir", directory / "dist", cwd=directory / "checkout")
    return directory / "dist"


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[str]:
    """The sdist's files, as the checkout names them."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.partition("/")[2] for name in names}


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new virtual environment that has the wheel and its declared dependencies."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    # This environment's pip installs there, and what is imported there is compiled then: a pip of
    # its own, and all of the modules compiled, take longer.
    install = ("install", "--no-compile", "--quiet", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=directory)
    return python


@pytest.mark.parametrize(
    "directory", [".ci", "docs", "native", "pagenet", "systemd", "tests", "tools"]
)
def test_sdist_has_all_of(sdist: set[str], directory: str) -> None:
    assert sources(directory) - sdist == set()


def test_sdist_can_be_worked_on(sdist: set[str]) -> None:
    assert {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "setup.py",
    } <= sdist
    assert {"CONTRIBUTING.md", "SECURITY.md", ".pre-commit-config.yaml"} <= sdist


def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {
        name for name in names if not name.startswith(f"pagenet-{PROJECT['version']}.dist-info/")
    }
    assert code == sources("pagenet") | {
        "pagenet/_pagenet.abi3.so",
        "pagenet/_pagenet_testing.abi3.so",
        "pagenet/bench/workload/pagenet.trace.so",
        f"pagenet/guard/{GUARD}",
        "pagenet/qemu/pagenet.preload.so",
    } | {f"{SHARED}/{path}" for path in PAGES | UNITS}
    assert f"pagenet-{PROJECT['version']}.dist-info/licenses/LICENSE" in names


def test_wheel_says_that_it_serves_every_later_python(wheel: Path) -> None:
    assert wheel.name.startswith(f"pagenet-{PROJECT['version']}-cp311-abi3-linux_")


def test_every_module_imports_with_the_declared_dependencies_alone(installed: Path) -> None:
    answer = run(installed, "-I", "-c", IMPORT_ALL, cwd=installed.parent)
    run_length, zero, path = answer.split()
    assert (run_length, zero) == ("2", "1")
    assert Path(path).is_relative_to(installed.parent.parent)


def test_library_for_vmms_is_where_it_is_looked_for(installed: Path) -> None:
    path = Path(run(installed, "-I", "-c", PRELOAD_LIBRARY, cwd=installed.parent).strip())
    assert path.is_relative_to(installed.parent.parent.resolve())


def test_guard_is_a_program(installed: Path) -> None:
    [guard] = installed.parents[1].glob(f"lib/python*/site-packages/pagenet/guard/{GUARD}")
    assert os.access(guard, os.X_OK)


def test_pages_completion_and_units_are_where_they_are_looked_for(installed: Path) -> None:
    assert all((installed.parents[1] / path).is_file() for path in PAGES | UNITS)


def test_console_scripts(installed: Path) -> None:
    declared = run(installed, "-I", "-c", SCRIPTS, cwd=installed.parent).splitlines()
    assert dict(line.split(" = ") for line in declared) == PROJECT["scripts"]
    assert all((installed.parent / name).exists() for name in PROJECT["scripts"])


def test_imports_what_is_needed_alone() -> None:
    """A daemon that is started again has threads that wait for it."""
    late = ("pagenet.rdma", "obstore", "rich", "matplotlib", "asyncio")
    program = "import sys, pagenet.cli.pull, pagenet.cli.serve; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not [name for name in done.stdout.split() if name in late]
