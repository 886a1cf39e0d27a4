import glob
import os
import shlex

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The libraries for LD_PRELOAD, and the source of each.
PRELOADED = {
    "pagenet.qemu.preload": "native/preload.c",
    "pagenet.bench.workload.trace": "native/testing/trace.c",
}


# The program of the guard, which is linked by itself, and has nothing of Python in it.
GUARD = "pagenet.guard.pagenet-guard"


class BuildExt(build_ext):
    def build_extension(self, ext):
        if ext.name != GUARD:
            super().build_extension(ext)
            return
        objects = self.compiler.compile(
            ext.sources, output_dir=self.build_temp, extra_postargs=ext.extra_compile_args
        )
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_executable(
            objects,
            os.path.basename(target),
            output_dir=os.path.dirname(target),
            extra_postargs=ext.extra_link_args,
        )

    def get_ext_filename(self, fullname):
        """Of a library for LD_PRELOAD, a name that nobody takes for a Python module's: one with a
        dot."""
        name = fullname.rpartition(".")[2]
        if name == GUARD.rpartition(".")[2]:
            return os.path.join(*fullname.split("."))
        if name in {library.rpartition(".")[2] for library in PRELOADED}:
            return os.path.join(*fullname.split(".")[:-1], f"pagenet.{name}.so")
        return super().get_ext_filename(fullname)


def preloaded(name, source):
    return Extension(
        name,
        sources=[source, "native/uffd.c"],
        include_dirs=["native"],
        depends=sorted(glob.glob("native/**/*.h", recursive=True)),
        extra_compile_args=[
            "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden",
            *shlex.split(os.environ.get("PAGENET_CFLAGS", "")),
        ],
        extra_link_args=["-pthread", *shlex.split(os.environ.get("PAGENET_LDFLAGS", ""))],
        py_limited_api=True,
    )  # fmt: skip


guard = Extension(
    GUARD,
    sources=["native/guard.c", "native/store.c"],
    depends=["native/store.h"],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra"],
    extra_link_args=["-static"],
    py_limited_api=True,
)

# For people and for systemd. All but the units are made by tools/generate, from the parsers of the
# commands.
FILES = {
    "lib/systemd/system": "systemd/*",
    "share/man/man1": "docs/man/*.1",
    "share/bash-completion/completions": "docs/completion/bash/*",
    "share/zsh/site-functions": "docs/completion/zsh/*",
}

setup(
    data_files=[(directory, sorted(glob.glob(names))) for directory, names in FILES.items()],
    cffi_modules=["native/build_ffi.py:core", "native/build_ffi.py:testing"],
    ext_modules=[*(preloaded(*library) for library in PRELOADED.items()), guard],
    cmdclass={"build_ext": BuildExt},
)
