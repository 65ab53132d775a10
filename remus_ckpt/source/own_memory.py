"""Memory that is this process's own: numpy arrays, mmaps, bytearrays, by name. Dirty pages by comparison.

The buffers lie one behind the other as specs/manifest.md §3 says. Who writes to them is stopped by a lock that the
writers take too; without one, the caller sees to it that nobody writes between `pause` and `resume`.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice, pairwise, starmap
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.errors import SourceError
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.source.manifest import ARRAY, BYTES, Entry, Manifest


class Lock(Protocol):
    """What writers hold while they write: a `Lock` or `RLock` of threading or multiprocessing, or what acts as one."""

    def acquire(self, *, timeout: float) -> bool:
        """Take it; False if that was not possible in `timeout` seconds."""

    def release(self) -> None:
        """Give it back."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One buffer in place.

    first, stop: its pages
    whole: uint8[n, 4096], its bytes as far as they fill pages
    tail: uint8[0…4095], the rest
    """

    first: int
    stop: int
    whole: Pages
    tail: NDArray[np.uint8]

    def copy(self, first: int, stop: int, out: Pages) -> None:
        """Copy its pages first…stop, counted from its own first."""
        whole = self.whole[first:stop]
        out[: len(whole)] = whole
        if stop > len(self.whole):
            self.copy_tail(out[stop - first - 1])

    def copy_tail(self, page: NDArray[np.uint8]) -> None:
        page[: len(self.tail)] = self.tail
        page[len(self.tail) :] = 0


class OwnMemory:
    """Named buffers of this process, and a shadow of them.

    buffers: numpy arrays (contiguous in C or Fortran order, of any dtype without objects, of any shape, also () and
        with a 0 in it), and all else that is one piece of bytes: mmap, bytearray, memoryview, array.array; at any
        address. They are held: an mmap cannot be closed nor a bytearray resized until `close`. Read-only ones may be
        written by others. No two may overlap: restored, they would be two. A file behind an mmap must not shrink
    lock: taken in each pause; every writer must hold it while it writes. None: nobody writes in a pause
    lock_timeout_s: how long a pause waits for it
    Raises TypeError or ValueError for what cannot be taken.
    """

    def __init__(self, buffers: Mapping[str, Any], *, lock: Lock | None = None, lock_timeout_s: float = 10.0) -> None:
        if not buffers:
            raise ValueError("no buffers: there is no memory to protect")
        self._lock = lock
        self._lock_timeout_s = lock_timeout_s
        self._is_open = True
        self._held: list[tuple[()]] = []  # one item while we hold the lock
        self._pid = os.getpid()
        self._parts: list[_Part] = []
        self._files: list[tuple[str, mmap.mmap, int]] = []
        entries = []
        spans = []
        page = 0
        for name, buffer in buffers.items():
            entry, data = _look(name, buffer, page)
            entries.append(entry)
            stop = page + pages_for(len(data))
            whole = len(data) // PAGE_SIZE
            edge = whole * PAGE_SIZE
            self._parts.append(_Part(page, stop, data[:edge].reshape(whole, PAGE_SIZE), data[edge:]))
            if len(data):
                start = data.__array_interface__["data"][0]
                spans.append((start, start + len(data), name))
            if (file := _mapped_file(buffer)) is not None:
                self._files.append((name, *file))
            page = stop
        spans.sort()
        for (_, end, one), (start, _, other) in pairwise(spans):
            if start < end:
                raise ValueError(f"{one!r} and {other!r} overlap: name the memory once")
        self.manifest = Manifest(tuple(entries))
        """What lies where; it belongs in front of the device state of every checkpoint."""
        self.manifest.pack()  # a dtype that cannot be written down is found here, not at the first checkpoint
        self.pages = self.manifest.pages
        ends = [entry.page * PAGE_SIZE + entry.nbytes for entry in entries if entry.nbytes]
        self.size = max(ends, default=PAGE_SIZE)
        self.shadow: Pages = zeros(self.pages)
        self._starts = np.array([part.first for part in self._parts], dtype=np.int64)

    def close(self) -> None:
        """Let go of the buffers, and of the lock if it is held."""
        self._is_open = False
        self._parts.clear()
        self._files.clear()
        self._starts = np.empty(0, dtype=np.int64)
        self.resume()

    def pause(self) -> None:
        """Take the lock. Raises SourceError if nobody gives it back in time."""
        if self._lock is None:
            return
        # A signal's handler may raise wherever Python code runs, also between taking the lock and noting it: the lock
        # would stay taken for ever. These iterators are C, so that `_held` changes with the lock; `resume` alike.
        acquire = iter(partial(self._lock.acquire, timeout=self._lock_timeout_s), None)
        self._held.extend(compress([()], acquire))
        if not self._held:
            raise SourceError(
                f"the lock was not given back in {self._lock_timeout_s:g} s: "
                "does a writer hold it too long, or does this thread hold it itself?"
            )

    def resume(self) -> None:
        """Give the lock back if we hold it. Raises SourceError if it is not ours to give."""
        # In a fork it is the parent that holds it.
        if self._lock is None or not self._held or self._pid != os.getpid():
            return
        try:
            deque(starmap(self._lock.release, islice(iter(self._held.pop, None), 1)), maxlen=0)
        except (RuntimeError, ValueError, AssertionError) as error:  # threading's, and multiprocessing's two
            raise SourceError(f"the lock cannot be given back: {error}") from None

    def check_paused(self) -> None:
        """Raise SourceError if somebody else has given our lock back, as far as such a lock can tell."""
        locked = getattr(self._lock, "locked", None)
        if locked is not None and not locked():
            raise SourceError("the lock was given back by somebody else in a pause")

    def alive(self) -> bool:
        """Whether it has not been closed: the one who writes is this process."""
        return self._is_open

    def death_fds(self) -> Sequence[int]:
        """None: whoever could look at one would be dead as well."""
        return ()

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn."""
        self._check_files()
        out = np.zeros((stop - first, PAGE_SIZE), dtype=np.uint8)
        number = max(int(np.searchsorted(self._starts, first, side="right")) - 1, 0)
        for part in self._parts[number:]:
            if part.first >= stop:
                break
            begin, end = max(first, part.first), min(stop, part.stop)
            if begin < end:
                part.copy(begin - part.first, end - part.first, out[begin - first : end - first])
        return out

    def dirty(self) -> NDArray[np.int64]:
        """The pages that differ from the shadow. Raises SourceError if the file behind an mmap has shrunk."""
        self._check_files()
        found = [np.empty(0, dtype=np.int64)]
        for part in self._parts:
            edge = part.first + len(part.whole)
            if len(part.whole):
                numbers = dirty_pages(part.whole, self.shadow[part.first : edge])
                if len(numbers):
                    found.append(numbers + part.first)
            if len(part.tail) and (part.tail != self.shadow[edge, : len(part.tail)]).any():
                found.append(np.array([edge], dtype=np.int64))
        return np.concatenate(found)

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages, given in ascending order, into `out`; returns that part of it."""
        target = out[: len(pfns)]
        at = 0
        while at < len(pfns):
            # An empty buffer shares its number with the one behind it, which comes later.
            number = int(np.searchsorted(self._starts, pfns[at], side="right")) - 1
            part = self._parts[number]
            if pfns[at] >= part.stop:  # the page that a memory of empty buffers has
                target[at:] = 0
                break
            edge = part.first + len(part.whole)
            tail, stop = np.searchsorted(pfns, [edge, part.stop]).tolist()
            if at < tail:
                gather(part.whole, pfns[at:tail] - part.first, target[at:tail])
            if tail < stop:
                part.copy_tail(target[tail])
            at = stop
        return target

    def _check_files(self) -> None:
        """Memory behind the end of its file must not be touched: that would end us."""
        for name, area, size in self._files:
            if area.size() < size:
                raise SourceError(f"the file behind {name!r} had {size} bytes and has {area.size()}")


def _look(name: str, buffer: Any, page: int) -> tuple[Entry, NDArray[np.uint8]]:
    """What a buffer is, and its bytes in memory order, without a copy."""
    if not isinstance(name, str):
        raise TypeError(f"a buffer is named by a text, not by {name!r}")
    if not isinstance(buffer, np.ndarray):
        try:
            view = memoryview(buffer)
        except TypeError:
            raise TypeError(f"{name!r} is {type(buffer).__name__}, no array and no piece of bytes") from None
        if not view.c_contiguous:
            raise ValueError(f"{name!r} is not one piece")
        data = np.frombuffer(view.cast("B"), dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
        return Entry(name, BYTES, data.dtype, data.shape, "C", page, data.nbytes), data
    if isinstance(buffer, np.ma.MaskedArray):
        raise TypeError(f"{name!r} is a masked array: name its data and its mask")
    if buffer.dtype.hasobject:
        raise TypeError(f"{name!r} holds Python objects ({buffer.dtype}), which are not bytes")
    if not buffer.flags.forc:
        raise ValueError(f"{name!r} is no contiguous array: name the array that it is a view of")
    order = "C" if buffer.flags.c_contiguous else "F"
    array = buffer.view(np.ndarray)
    # numpy cannot look at items of no size as bytes.
    flat = (array if order == "C" else array.T).reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    return Entry(name, ARRAY, array.dtype, array.shape, order, page, array.nbytes), flat


def _mapped_file(buffer: object) -> tuple[mmap.mmap, int] | None:
    """The mmap at the bottom of a buffer, and the size of its file."""
    while not isinstance(buffer, mmap.mmap):
        buffer = (
            buffer.base if isinstance(buffer, np.ndarray) else buffer.obj if isinstance(buffer, memoryview) else None
        )
        if buffer is None:
            return None
    try:
        return buffer, buffer.size()
    except (ValueError, OSError):  # it keeps no descriptor
        return None
