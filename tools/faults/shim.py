"""The driver's end of `shim.c`: building it, and the memory that it shares with this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPS = (
    *("open", "read", "write", "pwrite", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "fallocate", "mkdir"),
    *("mmap", "close", "lseek", "copy_file_range"),
)
ERROR, SHORT, LOST_ZEROS, LOST_CUT = range(4)
_FILES, _NAME, _LOGGED = 4096, 240, 1 << 14


class _Synced(ctypes.Structure):
    _fields_ = [("inode", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class _Call(ctypes.Structure):
    _fields_ = [("op", ctypes.c_uint8), ("name", ctypes.c_char * (_NAME - 1))]


class _Control(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("armed", "count", "first", "times", "ops")),
        *((name, ctypes.c_int32) for name in ("how", "error")),
        *((name, ctypes.c_uint64) for name in ("hits", "files")),
        ("synced", _Synced * _FILES),
        ("logged", ctypes.c_uint64),
        ("log", _Call * _LOGGED),
    ]


def build(where: Path) -> Path:
    """Compile it. Raises subprocess.CalledProcessError."""
    library = where / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [
        "gcc",
        "-O2",
        "-Wall",
        "-Wno-format-truncation",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(source),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


def make_control(path: Path) -> None:
    """A file for the two to share."""
    path.write_bytes(b"")
    os.truncate(path, ctypes.sizeof(_Control))


class Shim:
    """What is to fail, and what was called."""

    def __init__(self, control: Path) -> None:
        with open(control, "r+b") as file:
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))

    def arm(
        self, *, first: int = 0, times: int = 0, ops: tuple[str, ...] = (), how: int = ERROR, error: int = 0
    ) -> None:
        """Count from now on; from the call `first` on let `times` calls fail, those of `ops`."""
        control = self._control
        control.armed = 0
        control.count = control.hits = control.files = control.logged = 0
        control.first, control.times, control.how, control.error = first, times, how, error
        control.ops = sum(1 << OPS.index(op) for op in ops)
        control.armed = 1

    def relent(self) -> None:
        """Nothing fails any more; what is synced is still noted."""
        self._control.first = 0

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Calls in this block are none of the history's. Nothing may be written."""
        was_armed, self._control.armed = self._control.armed, 0
        try:
            yield
        finally:
            self._control.armed = was_armed

    def disarm(self) -> None:
        """The end of it."""
        self._control.armed = 0

    @property
    def hits(self) -> int:
        """How many calls have failed."""
        return int(self._control.hits)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """(op, path below the directory) of each call, in order."""
        found = []
        for at in range(min(self._control.logged, _LOGGED)):
            call = self._control.log[at]
            found.append((OPS[call.op], call.name.decode(errors="replace")))
        return found

    def lose_unsynced(self, directory: Path) -> None:
        """A loss of power: of each file what was not synced is gone."""
        sizes = {one.inode: one.size for one in self._control.synced[: self._control.files]}
        for path in directory.rglob("*"):
            status = path.stat()
            if path.is_file() and sizes.get(status.st_ino, status.st_size) < status.st_size:
                os.truncate(path, sizes[status.st_ino])
