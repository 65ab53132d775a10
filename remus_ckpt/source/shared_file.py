"""Memory that is a shared file: in /dev/shm, or any file that others write to. Dirty pages by comparison."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.errors import SourceError
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.source import Writers
from remus_ckpt.source.mappings import Memory


class SharedFile:
    """A file, those who write to it, and a shadow of it.

    path: the file; its size must stay, and its name must not be given to another file. It may be unlinked.
    writers: all who write to it; closed with this
    Raises OSError where the file cannot be read, SourceError for one that is empty.
    """

    def __init__(self, path: str | Path, writers: Writers) -> None:
        self.path = str(path)
        self._writers = writers
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._status = os.fstat(self._fd)
            self.size = self._status.st_size
            if not stat.S_ISREG(self._status.st_mode):
                raise SourceError(f"{self.path} is no file that could be mapped")
            if not self.size:
                raise SourceError(f"{self.path} is empty: there is no memory in it")
            # A descriptor of another process that leads to it may be closed, and its number mean another file then.
            self._has_name = not os.path.realpath(os.path.dirname(self.path) or ".").startswith("/proc/")
            writers.check_memory(Memory.of(self.path, self._fd))
            self.pages = pages_for(self.size)
            """The last one is padded with zeros where the size is no multiple of 4,096."""
            self.shadow: Pages = zeros(self.pages)
            whole = self.size // PAGE_SIZE
            self._memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
            if whole:
                area = mmap.mmap(self._fd, whole * PAGE_SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
                self._memory = np.frombuffer(area, dtype=np.uint8).reshape(-1, PAGE_SIZE)
            self._has_data = np.ones(whole, dtype=bool)  # as `dirty` found it last; the others are holes
            self._in_shadow = np.zeros(whole, dtype=bool)  # what the shadow may hold something of
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file and of the writers."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._writers.close()

    def pause(self) -> None:
        """Stop the writers; return when none of them writes."""
        self._writers.stop()

    def resume(self) -> None:
        """Let them run on."""
        self._writers.resume()

    def check_paused(self) -> None:
        """Raise SourceError if somebody else has let one of them run on."""
        self._writers.check_stopped()

    def alive(self) -> bool:
        """Whether any of the writers lives."""
        return self._writers.alive()

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when a writer dies."""
        return self._writers.death_fds()

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn.

        It is read, not looked at through the mapping: a file that shrinks meanwhile would end us.
        """
        pages = np.zeros((stop - first, PAGE_SIZE), dtype=np.uint8)
        room = memoryview(pages.reshape(-1))
        at = first * PAGE_SIZE
        while room and (size := os.preadv(self._fd, [room], at)):
            room = room[size:]
            at += size
        self._in_shadow[first:stop] |= pages[: len(self._in_shadow[first:stop])].view(np.uint64).any(axis=1)
        return pages

    def dirty(self) -> NDArray[np.int64]:
        """The pages that differ from the shadow.

        Raises SourceError if the file's size has changed, or if its name leads to another file.
        """
        self._check_name()
        size = os.fstat(self._fd).st_size
        if size != self.size:
            # Pages behind a shrunken file's end cannot be touched, and a stream has one size.
            raise SourceError(f"{self.path} had {self.size} bytes and has {size}: record it anew")
        # The holes of a sparse file in /dev/shm are passed by: to look at them would fill them.
        has_data = np.zeros_like(self._has_data)
        found = []
        for first, stop in self._extents():
            has_data[first:stop] = True
            found.append(dirty_pages(self._memory[first:stop], self.shadow[first:stop]) + first)
        gone = np.flatnonzero(self._in_shadow & ~has_data)
        gone = gone[self.shadow[gone].any(axis=1)]
        in_shadow = has_data.copy()
        # Until it was taken: a checkpoint may break off before it comes to them.
        in_shadow[gone] = True
        self._has_data, self._in_shadow = has_data, in_shadow
        if self.size % PAGE_SIZE and (self._tail() != self.shadow[-1]).any():
            found.append(np.array([self.pages - 1]))
        numbers = np.concatenate([np.empty(0, dtype=np.int64), *found])
        return np.union1d(numbers, gone) if len(gone) else numbers

    def _check_name(self) -> None:
        """A file that has lost its name is the memory of those who have it mapped; another under the name is not it."""
        if not self._has_name:
            return
        try:
            status = os.stat(self.path)
        except OSError:
            return
        if not os.path.samestat(status, self._status):
            raise SourceError(f"{self.path} has been replaced by another file under this name: record that one anew")

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages, ascending, as `dirty` has just found them."""
        target = out[: len(pfns)]
        mapped = int(np.searchsorted(pfns, len(self._memory)))
        if (holes := ~self._has_data[pfns[:mapped]]).any():
            holes = np.append(holes, np.zeros(len(pfns) - mapped, dtype=bool))
            target[holes] = 0
            target[~holes] = self.read(pfns[~holes], np.empty_like(target))
            return target
        gather(self._memory, pfns[:mapped], target)
        if mapped < len(pfns):
            target[mapped] = self._tail()
        return target

    def _tail(self) -> Pages:
        """The last page, padded."""
        page = np.zeros(PAGE_SIZE, dtype=np.uint8)
        rest = os.pread(self._fd, self.size % PAGE_SIZE, self.size - self.size % PAGE_SIZE)
        page[: len(rest)] = np.frombuffer(rest, dtype=np.uint8)
        return page

    def _extents(self) -> list[tuple[int, int]]:
        """The pages that the file really has, as (first, stop)."""
        whole = len(self._memory)
        if os.fstat(self._fd).st_blocks * 512 >= self.size:
            return [(0, whole)]
        extents = []
        at = 0
        while at < whole * PAGE_SIZE:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:  # no data behind it
                break
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            first, stop = start // PAGE_SIZE, min(pages_for(at), whole)
            if first < stop:
                extents.append((first, stop))
        return extents
