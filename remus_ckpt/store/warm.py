"""Memory in a mapped file, which has room for every page before it is written (specs/store.md §6)."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import appearing, guarding
from remus_ckpt.errors import StoreError
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for

_COPY_BYTES = 1 << 22
_GAP_PAGES = 8
"""Pages that lie so near to each other are given room with one call, and those between them too."""


class WarmCopyDamaged(StoreError):
    """The file is not what was mapped: to open the history anew makes another from the segments."""


class MappedFile:
    """A restorer's home: a sparse file of mode 0600. A store into a mapping that finds no room on the disk would end
    the process with SIGBUS; so pages get their room by `write` and `reserve`, which can say no. `reserve` also finds
    that somebody has cut the file.

    path: created, or emptied
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path | None = Path(path)
        """None once it has been handed out."""
        with guarding(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.has_room: NDArray[np.bool_] = np.empty(0, dtype=bool)
        """bool[pages]: the others are holes, and zeros."""

    def open(self, pages: int) -> Pages:
        """The file as memory of zeros."""
        with guarding(self.path):
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, pages * PAGE_SIZE)
            area = mmap.mmap(self.fd, pages * PAGE_SIZE)
        self.has_room = np.zeros(pages, dtype=bool)
        return np.frombuffer(area, dtype=np.uint8).reshape(pages, PAGE_SIZE)

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages through the descriptor, which faults no page into the mapping. Raises StoreError."""
        if not len(pfns):
            return
        borders = [0, *(np.flatnonzero(np.diff(pfns) != 1) + 1).tolist(), len(pfns)]
        with guarding(self.path):
            for first, stop in itertools.pairwise(borders):
                left = memoryview(data[first:stop].reshape(-1))
                at = int(pfns[first]) * PAGE_SIZE
                while left:
                    size = os.pwrite(self.fd, left, at)
                    left, at = left[size:], at + size
        self.has_room[pfns] = True

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Room on the disk for these pages. Raises StoreError, as `check` too."""
        self.check()
        has_room = self.has_room[pfns]
        if has_room.all():
            return
        missing = np.unique(pfns[~has_room])
        borders = [0, *(np.flatnonzero(np.diff(missing) > _GAP_PAGES) + 1).tolist(), len(missing)]
        with guarding(self.path):
            for first, stop in itertools.pairwise(borders):
                start, end = int(missing[first]), int(missing[stop - 1]) + 1
                os.posix_fallocate(self.fd, start * PAGE_SIZE, (end - start) * PAGE_SIZE)
                self.has_room[start:end] = True

    def check(self) -> None:
        """Raise WarmCopyDamaged if the file has lost pages: to touch what is missing ends the process."""
        size, whole = os.fstat(self.fd).st_size, len(self.has_room)
        if pages_for(size) < whole:
            raise WarmCopyDamaged(
                f"{self.path}: the warm copy has {size} bytes of {whole * PAGE_SIZE}: somebody has cut it; it is made "
                "anew from the segments"
            )

    def copy(self, path: Path, size: int) -> None:
        """Copy its first bytes to a file that appears when it is whole and durable. Raises StoreError."""
        edges = np.flatnonzero(np.diff(self.has_room, prepend=False, append=False)).reshape(-1, 2) * PAGE_SIZE
        with guarding(path), appearing(path) as descriptor:
            os.ftruncate(descriptor, size)
            for start, stop in np.minimum(edges, size).tolist():
                at = start
                while at < stop:
                    at += _copy_range(self.fd, descriptor, at, stop - at)

    def sync(self) -> None:
        """Durable when it returns. Raises StoreError."""
        with guarding(self.path):
            os.fsync(self.fd)

    def cut(self, size: int) -> None:
        """Let the file end within its last page, whose rest in memory is zeros then. Raises StoreError."""
        with guarding(self.path):
            os.ftruncate(self.fd, size)

    def hand_out(self, path: Path, size: int) -> None:
        """Give the file to somebody else, under another name: it is not removed with this.

        size: its bytes, which end in its last page
        Raises StoreError, as `check` too.
        """
        assert self.path is not None, "it has been handed out before"
        self.check()
        self.cut(size)
        own, self.path = self.path, None  # before the other has it: from then on nobody here may believe what it holds
        try:
            with guarding(own):
                os.rename(own, path)
        except StoreError:
            self.path = own
            raise

    def close(self) -> None:
        """Close the descriptor; memory stays mapped as long as somebody has it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):  # what must be durable has been synced
                os.close(fd)

    def remove(self) -> None:
        """Close it and take the file away."""
        self.close()
        if self.path is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error


def _copy_range(source: int, target: int, at: int, size: int) -> int:
    """Copy bytes to the same place in another file; returns how many. Raises OSError."""
    try:
        copied = os.copy_file_range(source, target, size, at, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        copied = os.pwrite(target, os.pread(source, min(size, _COPY_BYTES), at), at)
    if not copied:
        raise OSError(errno.EIO, "the warm copy has become shorter")
    return copied
