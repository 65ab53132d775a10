"""Memory images in files, read and compared piece by piece: however large they are, little of them is in memory.

Nothing is mapped, and holes are skipped if the file system reports them.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.disk import open_to_read
from remus_ckpt.errors import RemusError
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, PageBatch, Pages, batches, pages_for

_WINDOW_PAGES = 1024
"""Pages compared at a time."""
_LEAST_PAGES = 16
"""At least this many pages at a time: a few zeros are read faster than their holes are found."""


class Image:
    """A memory image in a file; memory after the end of the file is zeros.

    size: of the file in bytes
    Raises OSError, also for a pipe: an image is read at any place, and more than once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._fd = open_to_read(Path(path))
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode):
            self.close()
            if stat.S_ISDIR(mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)
            raise OSError(errno.ESPIPE, "this is a pipe or a device: save it as a file, and name that", self.path)
        self._version = self._look()
        self.size = self._version[0]
        self.knows_holes = True
        """False once the file system has said that it does not report holes."""
        self._data = range(0)  # the bytes of the last range found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, first: int, out: Pages) -> None:
        """Fill `out`, uint8[n, 4096], with the pages from number `first` on. Raises OSError."""
        self.read_at(first * PAGE_SIZE, out.reshape(-1))

    def read_at(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, uint8[n], with the bytes from `offset` on. Raises OSError."""
        left = memoryview(out)[: max(self.size - offset, 0)]
        at = 0
        try:
            while at < len(left) and (count := os.preadv(self._fd, [left[at:]], offset + at)):
                at += count
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        out[at:] = 0

    def data(self, page: int) -> tuple[int, int] | None:
        """The next range (first, stop) of pages, from `page` on, that may hold data; None if there is none."""
        start = page * PAGE_SIZE
        if start >= self.size:
            return None
        if not self._data.start <= start < self._data.stop:
            # Looking for a hole may go through the whole file: so each range is looked for once.
            stop = self.size
            if self.knows_holes:
                try:
                    start = os.lseek(self._fd, start, os.SEEK_DATA)
                    stop = os.lseek(self._fd, start, os.SEEK_HOLE)
                except OSError as error:
                    if error.errno == errno.ENXIO:  # only a hole is left
                        return None
                    self.knows_holes = False
            self._data = range(start, stop)
        return start // PAGE_SIZE, pages_for(min(self._data.stop, self.size))

    def check(self, size: int | None = None) -> None:
        """Raise RemusError if the file has changed since it was opened, or since it had that size.

        Not every change shows: writes through a mapping need not update the file's time.
        """
        if self._look() != self._version or size not in (None, self.size):
            raise RemusError(f"{self.path} changed while it was being read: make a copy and use that")

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


def windows(images: Sequence[Image], pages: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, stop) in which any of the images may hold data, ascending, at most 1,024 pages each."""
    at = 0
    while at < pages and (found := [span for image in images if (span := image.data(at)) is not None]):
        first = min(start for start, _ in found)
        stop = max(stop for start, stop in found if start == first)
        stop = min(max(stop, first + _LEAST_PAGES), first + _WINDOW_PAGES, pages)
        if first < pages:
            yield first, stop
        at = stop


def differences(
    image: Image, before: Image | None, pages: int, advance: Callable[[int], None] | None = None
) -> Iterator[tuple[int, NDArray[np.int64], Pages, Pages]]:
    """Where two images differ, window by window, ascending.

    before: None means all zeros
    advance: called with the number of pages done
    Yields (first, differ, then, now): the window's first page; int64[n], the pages of the window that differ, at least
    one; and the window in `before` and in `image`, uint8[m, 4096] each, valid until the next one.
    """
    room_now = np.empty((_WINDOW_PAGES, PAGE_SIZE), dtype=np.uint8)
    room_then = np.zeros((_WINDOW_PAGES, PAGE_SIZE), dtype=np.uint8)
    for first, stop in windows([image] if before is None else [image, before], pages):
        now, then = room_now[: stop - first], room_then[: stop - first]
        image.read(first, now)
        if before is not None:
            before.read(first, then)
        differ = dirty_pages(now, then)
        if len(differ):
            yield first, differ, then, now
        if advance is not None:
            advance(stop)


def written(
    image: Image, pages: int, advance: Callable[[int], None] | None = None
) -> Iterator[tuple[int, NDArray[np.int64], Pages, Pages]]:
    """The pages that a sparse file has data for, zeros too, in the form of `differences`: both windows are the image.

    Raises RemusError if the file system does not report holes.
    """
    room = np.empty((_WINDOW_PAGES, PAGE_SIZE), dtype=np.uint8)
    at = 0
    while at < pages and (found := image.data(at)) is not None:
        if not image.knows_holes:
            raise RemusError(f"{image.path}: its file system does not report holes, which say what has not changed")
        first, stop = found[0], min(found[1], found[0] + _WINDOW_PAGES, pages)
        now = room[: stop - first]
        image.read(first, now)
        yield first, np.arange(stop - first), now, now
        at = stop
        if advance is not None:
            advance(at)


class Layers:
    """An image with sparse diffs over it: what a diff has a hole for is as below it.

    base: the image; closed with this object, like the diffs
    """

    def __init__(self, base: Image) -> None:
        self._images = [base]
        self._top = np.zeros(pages_for(base.size), dtype=np.int32)
        """int32[pages]: which of the images has the page."""

    def lay(self, diff: Image) -> None:
        """Put a diff of the same size on top."""
        at = 0
        while (found := diff.data(at)) is not None:
            self._top[found[0] : found[1]] = len(self._images)
            at = found[1]
        self._images.append(diff)

    def read(self, first: int, out: Pages) -> None:
        """As `Image.read`."""
        top = self._top[first : first + len(out)]
        for start, stop in itertools.pairwise([0, *(np.flatnonzero(np.diff(top)) + 1).tolist(), len(top)]):
            self._images[top[start]].read(first + start, out[start:stop])

    def check(self) -> None:
        """As `Image.check`, for all of them."""
        for image in self._images:
            image.check()

    def close(self) -> None:
        """Close all files. May be called again."""
        for image in self._images:
            image.close()


def read_pages(image: Image | Layers, pfns: NDArray[np.int64], out: Pages) -> None:
    """Fill `out`, uint8[≥ n, 4096], with these pages, int64[n]. Raises OSError."""
    borders = np.flatnonzero(np.diff(pfns) != 1) + 1
    for first, stop in itertools.pairwise([0, *borders.tolist(), len(pfns)]):
        image.read(int(pfns[first]), out[first:stop])


def full_batches(found: Iterator[tuple[int, NDArray[np.int64], Pages, Pages]]) -> Iterator[PageBatch]:
    """What `differences` finds, in batches of 1,024 entries; only the last may have fewer."""
    numbers, data, count = _room()
    for first, differ, _, now in found:
        done = 0
        while done < len(differ):
            part = differ[done : done + MAX_BATCH_ENTRIES - count]
            numbers[count : count + len(part)] = part + first
            gather(now, part, data[count:])
            done, count = done + len(part), count + len(part)
            if count == MAX_BATCH_ENTRIES:
                yield from batches(numbers, data)
                numbers, data, count = _room()  # a sender keeps batches until its page buffer is full
    yield from batches(numbers[:count], data[:count])


def _room() -> tuple[NDArray[np.int64], Pages, int]:
    entries = MAX_BATCH_ENTRIES
    return np.empty(entries, dtype=np.int64), np.empty((entries, PAGE_SIZE), dtype=np.uint8), 0


class ImageReference:
    """A sender's reference without a copy of memory: the receiver holds the previous image, so pages are read from it.

    before: the previous image, None before the first
    For senders whose scans list no page twice, and no page tables.
    """

    def __init__(self) -> None:
        self.before: Image | Layers | None = None
        self.pages = zeros(MAX_BATCH_ENTRIES)
        """The references of the batch being encoded."""

    def sent_raw(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """Does nothing: the pages are in the image."""

    def invalidate(self, pfns: NDArray[np.int64]) -> None:
        """Does nothing: there are no page tables."""

    def choose(self, pfns: NDArray[np.int64], tables: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read these pages from the image; returns their slots, and that none of them goes full."""
        assert self.before is not None, "the first checkpoint is not compressed"
        read_pages(self.before, pfns, self.pages)
        return np.arange(len(pfns)), np.zeros(len(pfns), dtype=bool)
