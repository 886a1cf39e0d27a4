import os
import shlex

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PRELOAD = "pagenet.qemu.preload"


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        """Of the library for LD_PRELOAD, a name that nobody takes for a Python module's: one with a dot."""
        if fullname.rpartition(".")[2] == PRELOAD.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")[:-1], "pagenet.preload.so")
        return super().get_ext_filename(fullname)


preload = Extension(
    PRELOAD,
    sources=["native/preload.c", "native/uffd.c"],
    depends=["native/pagenet.h"],
    extra_compile_args=[
        "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden",
        *shlex.split(os.environ.get("PAGENET_CFLAGS", "")),
    ],
    extra_link_args=["-pthread", *shlex.split(os.environ.get("PAGENET_LDFLAGS", ""))],
    py_limited_api=True,
)  # fmt: skip

setup(cffi_modules=["native/build_ffi.py:ffibuilder"], ext_modules=[preload], cmdclass={"build_ext": BuildExt})
