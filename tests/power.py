"""A disk that loses power: what was not synced is not there any more.

It follows the writes and syncs of this process, as POSIX promises them and no more: a file's bytes are there since its
own sync, its name since that of its directory. After a sync that failed, only what is written again counts (Linux calls
the pages clean).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from remus_ckpt import disk


class Power:
    """All below `root` is followed; what is there now is durable.

    eager: what is written is on the disk at once, half of it first; names are not
    on_step: called when something has reached the disk
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, *, eager: bool = False) -> None:
        self.root = root
        self.on_step: Callable[[], None] = lambda: None
        self._eager = eager
        self._files: dict[int, bytearray] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._failed: dict[int, list[tuple[int, int]]] = {}  # written since the last sync that failed
        self._pins: dict[int, int] = {}  # so that no number is used twice
        self._fails: Callable[[Path], bool] = lambda path: False
        self._late = 0
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._syncing(getattr(os, name)))
        patch.setattr(disk, "sync_file_system", self._sync_all)
        patch.setattr(disk, "native", None)  # what the extension writes would not be seen
        for name in ("write", "writev", "pwrite", "ftruncate"):
            patch.setattr(os, name, self._writing(getattr(os, name), name))
        self.write_back()

    def write_back(self) -> None:
        """The kernel writes all that it has."""
        for where, _, names in os.walk(self.root):
            for path in [Path(where), *(Path(where) / name for name in names)]:
                fd = os.open(path, os.O_RDONLY)
                self._reach(fd)
                os.close(fd)

    @contextmanager
    def failing(self, fails: Callable[[Path], bool], *, late: int = 0) -> Iterator[None]:
        """Syncs of these fail; late: of so many the disk has it all the same."""
        self._fails, self._late = fails, late
        try:
            yield
        finally:
            self._fails = lambda path: False

    def lose(self, target: Path) -> Path:
        """What is there after a loss of power, as a new directory; returns it."""
        target.mkdir(parents=True)
        for name, (number, is_folder) in self._names.get(os.stat(self.root).st_ino, {}).items():
            self._put(target / name, number, is_folder)
        return target

    def _put(self, path: Path, number: int, is_folder: bool) -> None:
        if not is_folder:
            path.write_bytes(self._files.get(number, b""))
            return
        path.mkdir()
        for name, (inner, is_inner_folder) in self._names.get(number, {}).items():
            self._put(path / name, inner, is_inner_folder)

    def _is_ours(self, fd: int) -> bool:
        path = os.readlink(f"/proc/self/fd/{fd}")
        return Path(path) == self.root or self.root in Path(path).parents

    def _reach(self, fd: int) -> None:
        status = os.fstat(fd)
        number = status.st_ino
        if number not in self._pins:
            self._pins[number] = os.dup(fd)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(fd) as found:
                self._names[number] = {
                    one.name: (one.stat(follow_symlinks=False).st_ino, one.is_dir()) for one in found
                }
            return
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            now = file.read()
        if number not in self._failed:
            self._files[number] = bytearray(now)
            return
        held = self._files.setdefault(number, bytearray())
        held[:] = held[: len(now)].ljust(len(now), b"\0")
        for start, end in self._failed[number]:
            held[start:end] = now[start:end]

    def _syncing(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            if self._is_ours(fd):
                fails = self._fails(Path(os.readlink(f"/proc/self/fd/{fd}")))
                if not fails or self._late > 0:
                    self._reach(fd)
                if fails:
                    self._late -= 1
                    if stat.S_ISREG(os.fstat(fd).st_mode):
                        self._failed[os.fstat(fd).st_ino] = []
                    raise OSError(errno.EIO, "Input/output error")
                self.on_step()

        return sync

    def _sync_all(self, path: Path) -> bool:
        """As syncfs of Linux 5.8: it says that one of the files has failed, and not which."""
        if any(self._fails(path) for path in self.root.rglob("*") if path.is_file()):
            return False
        self.write_back()
        return True

    def _writing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def write(fd: int, data: Any, *more: Any) -> Any:
            if not self._is_ours(fd):
                return real(fd, data, *more)
            number = os.fstat(fd).st_ino
            at = more[0] if name == "pwrite" else os.lseek(fd, 0, os.SEEK_CUR)
            before = bytes(self._files.get(number, b""))
            done = real(fd, data, *more)
            if name != "ftruncate" and number in self._failed:
                self._failed[number].append((at, at + done))
            if self._eager:
                self._reach(fd)
                whole = self._files[number]
                middle = at + (done or 0) // 2
                self._files[number] = whole[:middle] + before[middle:]
                self.on_step()
                self._files[number] = whole
                self.on_step()
            return done

        return write
