"""Memory that is a shared file: in /dev/shm, or any file that other processes write to."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import gather
from remus_ckpt.disk import open_to_read
from remus_ckpt.errors import SourceError, Untracked
from remus_ckpt.pages import PAGE_SIZE, Pages, Places, pages_for
from remus_ckpt.source import FileStopper, Source, Tracker
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.mappings import FileIdentity
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, KernelTracker, ProcessesWatch, Tracking
from remus_ckpt.source.track.mapped import FileWatch
from remus_ckpt.source.track.written import why_not


class SharedFile(Source):
    """A file and its writers, as a source.

    path: as for `MappedFile`
    stopper: stops all writers; closed with this object, also if this raises
    device_state: called in each pause; returns bytes that come back with the checkpoint
    tracking: how written pages are found. "auto": by the kernel if it can. "kernel": only by the kernel; raises
        Untracked if it cannot, here or when checkpoints begin
    audit: if the kernel finds the pages, everything is also compared once every this many pauses; 0 for never
    Raises like `MappedFile`, and SourceError if the stopper's processes do not write to the file.
    """

    def __init__(
        self,
        path: str | Path,
        stopper: FileStopper,
        *,
        device_state: Callable[[], bytes] = bytes,
        tracking: Tracking = "auto",
        audit: int = AUDIT_PAUSES,
    ) -> None:
        with ExitStack() as stack:
            stack.callback(stopper.close)
            memory = MappedFile(path)
            stack.callback(memory.close)
            stopper.check_memory(memory.identity())
            tracker = _tracker(memory, stopper, tracking, audit)
            super().__init__(memory, tracker, stopper, device_state=device_state)
            stack.pop_all()


def _tracker(memory: MappedFile, stopper: FileStopper, tracking: Tracking, audit: int) -> Tracker:
    if tracking == "compare":
        return Compare(memory)
    try:
        if (reason := why_not()) is not None:
            raise Untracked(reason)
        if stopper.processes() is None:
            raise Untracked("the writing processes are not known one by one, as they are with --pid")
        watch = memory.watch()
    except Untracked as error:
        if tracking == "kernel":
            raise
        return Compare(memory, why=str(error))
    them = ProcessesWatch(watch, lambda: stopper.processes() or (), must=tracking == "kernel")
    return KernelTracker(Compare(memory), them, audit=audit)


_BLOCK_BYTES = 512
"""Of st_blocks."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: map pages as reading them would, but fail where that would kill."""


class MappedFile:
    """A file as memory, mapped for reading.

    path: the file; its size must not change, and no other file may take its name. It may be unlinked.
    Raises OSError if the file cannot be read, SourceError if it is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._fd = -1
        # What is known to be no hole, while a watch would say that it may have become one.
        self._watch: FileWatch | None = None
        self._is_data: NDArray[np.bool_] = np.empty(0, dtype=bool)
        try:
            self._fd = open_to_read(Path(path))
            self._status = os.fstat(self._fd)
            self.size = self._status.st_size
            if not stat.S_ISREG(self._status.st_mode):
                raise SourceError(f"{self.path} is not a file that can be mapped")
            if not self.size:
                raise SourceError(f"{self.path} is empty: there is no memory in it")
            # The path may be another process's descriptor; once that is closed, its number may mean another file.
            self._has_name = not os.path.realpath(os.path.dirname(self.path) or ".").startswith("/proc/")
            self.pages = pages_for(self.size)
            """The last one is padded with zeros if the size is not a multiple of 4,096."""
            whole = self.size // PAGE_SIZE
            self.partial = np.arange(whole, self.pages)
            self._mapped: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
            if whole:
                self._area = mmap.mmap(self._fd, whole * PAGE_SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
                self._mapped = np.frombuffer(self._area, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def data_pages(self) -> int | None:
        """Pages that are allocated in the file system; the others are holes."""
        return min(os.fstat(self._fd).st_blocks * _BLOCK_BYTES // PAGE_SIZE + 1, self.pages)

    def identity(self) -> FileIdentity:
        """What identifies its mappings, in any process."""
        return FileIdentity.of(self.path, self._fd)

    def watch(self) -> FileWatch:
        """Watch it in the processes that have it mapped. Raises Untracked."""
        identity = self.identity()
        self._is_data = np.zeros(self.pages, dtype=bool)
        self._watch = FileWatch(
            self._fd, identity.device, identity.inode, self.pages, on_call=lambda: self._is_data.fill(False)
        )
        return self._watch

    def check(self) -> None:
        """Raise SourceError if the file's size has changed, or if its name leads to another file."""
        self._check_name()
        size = os.fstat(self._fd).st_size
        if size != self.size:
            # Pages beyond a shrunken file's end cannot be touched, and a stream has one size.
            raise SourceError(f"{self.path} had {self.size} bytes and now has {size}: start again")

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn.

        Reads the file rather than the mapping: if the file shrank meanwhile, touching the mapping would kill us.
        """
        self._populate(first, min(stop, len(self._mapped)))
        pages = np.empty((stop - first, PAGE_SIZE), dtype=np.uint8)
        room = memoryview(pages.reshape(-1))
        at = first * PAGE_SIZE
        while room and (size := os.preadv(self._fd, [room], at)):
            room = room[size:]
            at += size
        room[:] = bytes(len(room))
        return pages

    def pieces(self) -> Iterator[tuple[int, Pages]]:
        """All pages but the holes of a sparse file: in /dev/shm, reading a hole through the mapping would fill it."""
        for first, stop in self._runs(0, len(self._mapped)):
            yield first, self._mapped[first:stop]

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the pages begin…end are not holes, as (first, stop), ascending."""
        if not self._has_holes():
            if begin < end:
                yield begin, end
            return
        at = begin * PAGE_SIZE
        while at < end * PAGE_SIZE:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:  # no data behind it
                break
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            first, stop = start // PAGE_SIZE, min(pages_for(at), end)
            if first < stop:
                yield first, stop

    def _populate(self, first: int, stop: int) -> None:
        """Map pages while the writers run, so that the first pause that reads them does not: 2 µs a page."""
        with suppress(OSError):  # an older kernel, or the file has shrunk
            for begin, end in self._runs(first, stop):
                self._area.madvise(_POPULATE_READ, begin * PAGE_SIZE, (end - begin) * PAGE_SIZE)

    def _check_name(self) -> None:
        """Check the name: an unlinked file is still the writers' memory, but another file under the name is not."""
        if not self._has_name:
            return
        try:
            status = os.stat(self.path)
        except OSError:
            return
        if not os.path.samestat(status, self._status):
            raise SourceError(f"{self.path} was replaced by another file of the same name: start again with that one")

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages, ascending, to the first rows of `out`, and return these rows."""
        target = out[: len(pfns)]
        mapped = int(np.searchsorted(pfns, len(self._mapped)))
        at = 0
        for hole in self._holes(pfns[:mapped]):
            gather(self._mapped, pfns[at:hole], target[at:hole])
            target[hole] = 0
            at = hole + 1
        gather(self._mapped, pfns[at:mapped], target[at:mapped])
        if mapped < len(pfns):
            target[mapped] = self._tail()
        return target

    def places(self, pfns: NDArray[np.int64]) -> Places:
        """Where pages, ascending, are: in the mapping, except holes and a partly filled last page."""
        mapped = int(np.searchsorted(pfns, len(self._mapped)))
        found: list[tuple[Pages, NDArray[np.int64]]] = []
        if holes := self._holes(pfns[:mapped]):
            is_hole = np.zeros(mapped, dtype=bool)
            is_hole[holes] = True
            zero = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
            for begin, end in pairwise([0, *(np.flatnonzero(np.diff(is_hole)) + 1).tolist(), mapped]):
                part = pfns[begin:end]
                found.append((zero, np.zeros_like(part)) if is_hole[begin] else (self._mapped, part))
        elif mapped:
            found.append((self._mapped, pfns[:mapped]))
        if mapped < len(pfns):
            found.append((self._tail().reshape(1, PAGE_SIZE), np.zeros(1, dtype=np.int64)))
        return found

    def _has_holes(self) -> bool:
        return os.fstat(self._fd).st_blocks * _BLOCK_BYTES < self.size

    def _holes(self, pfns: NDArray[np.int64]) -> list[int]:
        """Which of some whole pages, ascending, are holes, by index: touching a hole would fill it.

        Only these pages are queried, each once: listing all extents would take time proportional to the file's size.
        """
        if not self._has_holes():
            return []
        is_watched = self._watch is not None and self._watch.is_open
        asked = np.flatnonzero(~self._is_data[pfns]) if is_watched else np.arange(len(pfns))
        holes = []
        data = 0  # where the next data after the last page asked about begin
        for index, at in zip(asked.tolist(), (pfns[asked] * PAGE_SIZE).tolist(), strict=True):
            if at >= data:
                try:
                    data = os.lseek(self._fd, at, os.SEEK_DATA)
                except OSError:  # no data behind it
                    data = self.size + PAGE_SIZE
            if at < data // PAGE_SIZE * PAGE_SIZE:
                holes.append(index)
            else:
                data = 0
        if is_watched:
            self._is_data[pfns] = True
            self._is_data[pfns[holes]] = False
        return holes

    def _tail(self) -> Pages:
        """The last page, padded."""
        page = np.zeros(PAGE_SIZE, dtype=np.uint8)
        rest = os.pread(self._fd, self.size % PAGE_SIZE, self.size - self.size % PAGE_SIZE)
        page[: len(rest)] = np.frombuffer(rest, dtype=np.uint8)
        return page
