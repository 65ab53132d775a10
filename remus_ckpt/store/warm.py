"""Memory in a mapped file, which has room for every page before it is written (specs/store.md §6)."""

from __future__ import annotations

import itertools
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import guarding
from remus_ckpt.errors import StoreError
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for

_GAP_PAGES = 8
"""Pages at most this far apart are allocated with one call, together with those between them."""


class WarmCopyDamaged(StoreError):
    """The file is not what was mapped; reopening the history rebuilds it from the segments."""


class MappedFile:
    """A restorer's home: a sparse file of mode 0600.

    On a full disk, a store into a mapping would kill the process with SIGBUS; so `write` and `reserve` allocate room
    for pages first, and can fail. `reserve` also notices if the file has been truncated.

    path: created, or emptied
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path | None = Path(path)
        """None once the file has been handed out."""
        with guarding(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.has_room: NDArray[np.bool_] = np.empty(0, dtype=bool)
        """bool[pages]: which pages have room on the disk; the others are holes, and zeros."""

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
        """Allocate room on the disk for these pages. Raises StoreError, also like `check`."""
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
        """Raise WarmCopyDamaged if the file has lost pages: touching a missing page kills the process."""
        size, whole = os.fstat(self.fd).st_size, len(self.has_room)
        if pages_for(size) < whole:
            raise WarmCopyDamaged(
                f"{self.path}: the warm copy has {size} bytes of {whole * PAGE_SIZE}: somebody has cut it; it is made "
                "anew from the segments"
            )

    def sync(self) -> None:
        """Make the file durable. Raises StoreError."""
        with guarding(self.path):
            os.fsync(self.fd)

    def cut(self, size: int) -> None:
        """Truncate the file within its last page; the rest of that page in memory becomes zeros. Raises StoreError."""
        with guarding(self.path):
            os.ftruncate(self.fd, size)

    def hand_out(self, path: Path, size: int) -> None:
        """Hand the file over under another name; it is no longer removed with this object.

        size: of the file in bytes, which ends in its last page
        Raises StoreError, also like `check`.
        """
        assert self.path is not None, "it has been handed out before"
        self.check()
        self.cut(size)
        own, self.path = self.path, None  # first: once it is handed over, its contents may change
        try:
            with guarding(own):
                os.rename(own, path)
        except StoreError:
            self.path = own
            raise

    def close(self) -> None:
        """Close the descriptor; memory stays mapped while anything refers to it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):  # whatever must be durable is synced
                os.close(fd)

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        if self.path is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
