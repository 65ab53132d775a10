"""Memory in a mapped file, on disk or in a tmpfs, which has room for every page before it is written (specs/store.md
§6.2)."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import stat
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import Written, appearing, guarding, write_pages
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import MIB
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.store.room import SHARED_MEMORY, free_memory

_GAP_PAGES = 8
"""Pages at most this far apart are allocated with one call, together with those between them."""


class WarmCopyDamaged(StoreError):
    """The file is not what was mapped; reopening the history rebuilds it from the segments."""


class MappedFile:
    """A restorer's home: a sparse file of mode 0600.

    On a full disk, a store into a mapping would kill the process with SIGBUS; so `write` and `reserve` allocate room
    for pages first, and can fail. `reserve` also notices if the file has been truncated.

    path: created, or emptied
    written: what the file is
    """

    def __init__(self, path: str | Path, written: Written = "warm copy") -> None:
        self._written: Written = written
        self.path: Path | None = Path(path)
        """None if the file has no name, or has been handed out."""
        self.is_handed_out = False
        self.fd = -1
        self._create()
        self.has_room: NDArray[np.bool_] = np.empty(0, dtype=bool)
        """bool[pages]: which pages have room on the disk; the others are holes, and zeros."""

    def _create(self) -> None:
        assert self.path is not None
        with guarding(self.path, self._written):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def open(self, pages: int) -> Pages:
        """The file as memory of zeros. Raises StoreError."""
        with guarding(self.path, self._written):
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, pages * PAGE_SIZE)
            area = mmap.mmap(self.fd, pages * PAGE_SIZE)
        self.has_room = np.zeros(pages, dtype=bool)
        return np.frombuffer(area, dtype=np.uint8).reshape(pages, PAGE_SIZE)

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages through the descriptor, which faults no page into the mapping. Raises StoreError."""
        self.write_some(pfns, data, np.arange(len(pfns)))

    def write_some(self, pfns: NDArray[np.int64], data: Pages, index: NDArray[np.int64]) -> None:
        """As `write`, of pages that lie at `index` in data."""
        with guarding(self.path, self._written):
            write_pages(self.fd, data, index, pfns)
        self.has_room[pfns] = True

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Allocate room on the disk for these pages. Raises StoreError, also like `check`."""
        self.check()
        has_room = self.has_room[pfns]
        if has_room.all():
            return
        missing = np.unique(pfns[~has_room])
        borders = [0, *(np.flatnonzero(np.diff(missing) > _GAP_PAGES) + 1).tolist(), len(missing)]
        with guarding(self.path, self._written):
            for first, stop in itertools.pairwise(borders):
                start, end = int(missing[first]), int(missing[stop - 1]) + 1
                os.posix_fallocate(self.fd, start * PAGE_SIZE, (end - start) * PAGE_SIZE)
                self.has_room[start:end] = True

    def check(self) -> None:
        """Raise WarmCopyDamaged if the file has lost pages: touching a missing page kills the process."""
        size, whole = os.fstat(self.fd).st_size, len(self.has_room)
        if pages_for(size) < whole:
            raise WarmCopyDamaged(
                f"{self.path}: the warm copy has {size} bytes of {whole * PAGE_SIZE}: something has truncated it; "
                "it is rebuilt from the segments"
            )

    def sync(self) -> None:
        """Make the file durable. Raises StoreError."""
        with guarding(self.path, self._written):
            os.fsync(self.fd)

    def cut(self, size: int) -> None:
        """Truncate the file within its last page; the rest of that page in memory becomes zeros. Raises StoreError."""
        with guarding(self.path, self._written):
            os.ftruncate(self.fd, size)

    def hand_out(self, path: Path, size: int) -> Path:
        """Hand the file over under another name, which is returned; it is no longer removed with this object.

        size: of the file in bytes, which ends in its last page
        Raises StoreError, also like `check`.
        """
        assert not self.is_handed_out, "it has been handed out before"
        self.check()
        self.cut(size)
        self.is_handed_out = True  # first: once it is handed over, its contents may change
        try:
            with guarding(path, self._written):
                return self._hand_out(path, size)
        except StoreError:
            self.is_handed_out = False
            raise

    def _hand_out(self, path: Path, size: int) -> Path:
        """Raises OSError."""
        assert self.path is not None
        os.rename(self.path, path)
        self.path = None
        return path

    def close(self) -> None:
        """Close the descriptor; memory stays mapped while anything refers to it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):  # whatever must be durable is synced
                os.close(fd)

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        if self.path is None or self.is_handed_out:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error


class MemoryPlace:
    """The place of a history's warm copies in memory: they have no name, and vanish with the process. What is handed
    out gets a name in its own directory.

    history: the directory of the history; name: its name
    """

    def __init__(self, history: Path, name: str) -> None:
        key = hashlib.sha256(os.fsencode(history.resolve())).hexdigest()[:16]
        self._all = SHARED_MEMORY / f"remus_ckpt-{os.getuid()}"
        self.directory = self._all / f"{name}-{key}"
        """Holds what was handed out; made when that happens."""
        self.on_disk_for: str | None = None
        """Why the newest warm copy is on disk, None if it is not."""

    def why_not(self, size: int) -> str | None:
        """Why this many more bytes have no room in memory, None if they do."""
        if (free := free_memory() - _promised()) >= size:
            return None
        return f"it may take {_mib(size)} of memory, and {_mib(max(free, 0))} are available"

    def open(self) -> int:
        """A new file without a name. Raises OSError."""
        return os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def make(self) -> None:
        """Make the directory. Raises OSError, also if someone else made it."""
        for path in (self._all, self.directory):
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(f"{path} is not a directory of ours alone")

    def remove(self) -> None:
        """Remove the directory if nothing is in it."""
        with suppress(OSError):
            self.directory.rmdir()
            self._all.rmdir()


class WarmCopy(MappedFile):
    """A file in memory, if that has room when the size is known; else on disk.

    path: on disk; place: in memory
    """

    def __init__(self, path: Path, place: MemoryPlace) -> None:
        self._place = place
        self.is_in_memory = False
        super().__init__(path)

    def _create(self) -> None:
        """Not before the size is known."""

    def open(self, pages: int) -> Pages:
        """The file as memory of zeros. Raises StoreError."""
        with _opening:
            if self.fd < 0:
                self._place.on_disk_for = self._place.why_not(pages * PAGE_SIZE)
                if self._place.on_disk_for is None:
                    try:
                        self.fd, self.path, self.is_in_memory = self._place.open(), None, True
                    except OSError as error:
                        self._place.on_disk_for = f"{SHARED_MEMORY}: {error.strerror}"
                if not self.is_in_memory:
                    super()._create()
            memory = super().open(pages)
            if self.is_in_memory:
                _in_memory.add(self)
            return memory

    @property
    def promised(self) -> int:
        """Bytes of memory that it may still take."""
        return 0 if self.fd < 0 else int(np.count_nonzero(~self.has_room)) * PAGE_SIZE

    def _hand_out(self, path: Path, size: int) -> Path:
        if not self.is_in_memory:
            return super()._hand_out(path, size)
        target = self._place.directory / path.name
        try:
            self._place.make()
            own = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link(str(self.fd), target, src_dir_fd=own, follow_symlinks=True)
            finally:
                os.close(own)
        except OSError:
            self._copy_out(path, size)  # whatever it is: there is another place
            return path
        return target

    def _copy_out(self, path: Path, size: int) -> None:
        """Write a copy to the disk, with holes where nothing was written. Raises OSError."""
        borders = np.flatnonzero(np.diff(np.concatenate([[False], self.has_room, [False]]).astype(np.int8)))
        with appearing(path, sync=False) as descriptor:
            for first, stop in borders.reshape(-1, 2).tolist():
                at, end = first * PAGE_SIZE, stop * PAGE_SIZE
                while at < end:
                    block = os.pread(self.fd, min(end - at, _COPY_BYTES), at)
                    if not block:
                        break  # the padding of the last page was cut off
                    at += os.pwrite(descriptor, block, at)
            os.ftruncate(descriptor, size)


_COPY_BYTES = 4 * MIB
_opening = threading.Lock()
_in_memory: weakref.WeakSet[WarmCopy] = weakref.WeakSet()


def _promised() -> int:
    """Memory that the warm copies of this process may still take."""
    return sum(one.promised for one in _in_memory)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
