"""The C extensions, and a source archive of the same bytes each time; everything else stands in pyproject.toml.

They are optional: where no compiler is found the install goes on, numpy runs the codecs, and Python reads checkpoints
and pages.
"""

import gzip
import os
import runpy
import tarfile
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

EXTENSIONS = runpy.run_path(str(Path(__file__).with_name("remus_ckpt") / "extensions.py"))
KERNELS = "remus_ckpt/codec/_kernels"


def files(folder: str, pattern: str, without: str = "") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern) if path.name != without)


def extension(name: str, sources: list[str], headers: list[str]) -> Extension:
    """An extension for any Python from 3.11 on, which knows its sources."""
    return Extension(
        f"remus_ckpt.{name}",
        define_macros=[("REMUS_SOURCES", f'"{EXTENSIONS["fingerprint"](name)}"')],
        sources=sources,
        depends=headers,
        # -g0: what is built does not tell in which folder, so that it is the same everywhere.
        # No -march: each file says for itself what it needs, and is only called where the CPU has it.
        extra_compile_args=["-std=c11", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"],
        py_limited_api=True,
        optional=True,
    )


class SameArchive(sdist):
    """From the same files the same bytes: no owner, no umask, and the time of SOURCE_DATE_EPOCH."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        made = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def same(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid, info.gid, info.uname, info.gname, info.mtime = 0, 0, "", "", made
            info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
            return info

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=made) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            tar.add(base_dir, filter=same)
        return path


setup(
    cmdclass={"sdist": SameArchive},
    ext_modules=[
        extension("codec._native", files(KERNELS, "*.c"), files(KERNELS, "*.h")),
        extension(
            "store._pages",
            ["remus_ckpt/store/_pages.c", *files(KERNELS, "*.c", without="glue.c")],
            files(KERNELS, "*.h"),
        ),
        extension(
            "wire._path",
            files("remus_ckpt/wire/_walk", "*.c"),
            [*files("remus_ckpt/wire/_walk", "*.h"), f"{KERNELS}/crc32c.h", f"{KERNELS}/cpu.h"],
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
