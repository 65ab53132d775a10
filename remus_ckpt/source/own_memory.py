"""This process's own memory: numpy arrays, DataFrames, mmaps, bytearrays, by name.

The buffers follow one another as specs/manifest.md §3 says.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.errors import SourceError, Untracked
from remus_ckpt.pages import PAGE_SIZE, Pages, Places, pages_for
from remus_ckpt.source import Source, Tracker
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.frames import LiveFrame, is_frame
from remus_ckpt.source.lock import Lock, LockStopper
from remus_ckpt.source.manifest import ARRAY, BYTES, Manifest, ManifestEntry, bytes_of
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, KernelTracker, OwnWatch, Tracking
from remus_ckpt.source.track.spans import Span, Spans

_WRITE_PAGES = 64
"""Pages written at a time."""


class OwnMemory(Source):
    """Named buffers of this process as a source.

    buffers: what `Buffers` takes
    lock: taken in each pause; every writer must hold it while it writes. None: nothing writes in a pause
    lock_timeout_s: how long a pause waits for the lock
    device_state: called in each pause; returns bytes that come back with the checkpoint
    tracking: how written pages are found. "auto": by the kernel if it can and the memory is private. "kernel": only by
        the kernel, also in shared memory, to which no other process may then write; raises Untracked if it cannot
    audit: if the kernel finds the pages, everything is also compared once every this many pauses; 0 for never
    Raises TypeError or ValueError for buffers that cannot be protected.
    """

    memory: Buffers

    def __init__(
        self,
        buffers: Mapping[str, Any],
        *,
        lock: Lock | None = None,
        lock_timeout_s: float = 10.0,
        device_state: Callable[[], bytes] = bytes,
        tracking: Tracking = "auto",
        audit: int = AUDIT_PAUSES,
    ) -> None:
        memory = Buffers(buffers)
        super().__init__(
            memory,
            _tracker(memory, tracking, audit),
            LockStopper(lock, timeout_s=lock_timeout_s),
            device_state=device_state,
            # A dtype that cannot be written down is found here, not at the first checkpoint.
            manifest=memory.manifest.pack(),
        )


def _tracker(memory: Buffers, tracking: Tracking, audit: int) -> Tracker:
    if tracking == "compare":
        return Compare(memory)
    try:
        spans = Spans(memory.spans, shared=tracking == "kernel")
    except Untracked as error:
        if tracking == "kernel":
            raise
        return Compare(memory, why=str(error))
    return KernelTracker(Compare(memory), OwnWatch(spans), audit=audit)


class Buffers:
    """Named buffers of this process as memory.

    buffers: by name, all of them writable:
        - numpy arrays, contiguous in C or Fortran order, of any dtype without objects, of any shape, also () and with a
          0 in it
        - other contiguous buffers: mmap, bytearray, memoryview, array.array, SharedMemory
        - pandas DataFrames of numbers, times and bool (frames.py)
        They are held: until `close`, an mmap or shared memory cannot be closed nor a bytearray resized. No two may
        overlap, because they would be separate after a restore. A file behind an mmap must not shrink. A dict is held
        too, and must keep naming these same objects
    Raises TypeError or ValueError for buffers that cannot be protected.
    """

    def __init__(self, buffers: Mapping[str, Any]) -> None:
        if not buffers:
            raise ValueError("no buffers: there is no memory to protect")
        pieces: list[tuple[int, NDArray[np.uint8]]] = []
        self._files: list[tuple[str, mmap.mmap, int]] = []
        self._named = buffers if isinstance(buffers, dict) else {}
        self._held: list[_Held] = []
        self._views: dict[str, int] = {}  # of arrays that own their memory: how many views of each are in `_pieces`
        self._frames: list[LiveFrame] = []
        entries = []
        spans = []
        pfns: dict[str, int] = {}
        page = 0
        for name, buffer in self._all_of(buffers):
            entry, data = _look(name, buffer, page)
            entries.append(entry)
            whole = len(data) // PAGE_SIZE
            edge = whole * PAGE_SIZE
            if whole:
                pieces.append((page, data[:edge].reshape(whole, PAGE_SIZE)))
            if edge < len(data):
                pieces.append((page + whole, data[edge:]))
            pfns[name] = page
            if len(data):
                start = data.__array_interface__["data"][0]
                spans.append((start, start + len(data), name))
            if type(buffer) is np.ndarray and buffer.base is None:
                self._views[name] = (whole > 0) + (edge < len(data))
            if (file := _mapped_file(buffer)) is not None:
                self._files.append((name, *file))
            page += pages_for(len(data))
        self.spans = [Span(name, start, end - start, pfns[name]) for start, end, name in spans]
        """Where the buffers are, in the order of their pages."""
        spans.sort()
        for (_, end, one), (start, _, other) in pairwise(spans):
            if start < end:
                raise ValueError(f"{one!r} and {other!r} overlap: name the memory once")
        self.manifest = Manifest(tuple(entries), tuple(live.frame for live in self._frames))
        """The manifest of the buffers."""
        self.pages = self.manifest.pages
        ends = [entry.page * PAGE_SIZE + entry.nbytes for entry in entries if entry.nbytes]
        self.size = max(ends, default=PAGE_SIZE)
        # In place: uint8[n, 4096], whole pages side by side, or uint8[1…4095], the page that a buffer ends within.
        self._pieces = [data for _, data in pieces]
        self._firsts = np.array([first for first, _ in pieces], dtype=np.int64)
        self.partial = np.array([first for first, data in pieces if data.ndim == 1], dtype=np.int64)

    def _all_of(self, buffers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The buffers, with each DataFrame replaced by its own."""
        for name, buffer in buffers.items():
            if not isinstance(name, str):
                raise TypeError(f"a buffer's name is a string, not {name!r}")
            self._held.append(_Held(name, buffer))
            if is_frame(buffer):
                live = LiveFrame(name, buffer)
                self._frames.append(live)
                yield from live.arrays.items()
            else:
                yield name, buffer

    def close(self) -> None:
        """Release the buffers."""
        self._pieces.clear()
        self._files.clear()
        self._frames.clear()
        self._held.clear()
        self._named = {}

    def check(self) -> None:
        """Raise SourceError if a name of the dict now means another object, or if a DataFrame has other memory.

        Writes there would not be seen.
        """
        for held in self._held:
            if self._named.get(held.name, held.buffer) is not held.buffer:
                raise SourceError(
                    f"{held.name!r} is another object than when its protection began: write in place (array[...] "
                    "= values, array += 1) instead of assigning a new one, or protect it again"
                )
        for live in self._frames:
            live.check()
        self._check_files()

    def abandoned(self) -> list[str]:
        """Arrays that only this object refers to: their writers now have other arrays under those names.

        Judged by reference counts, which do not include bare pointers such as those of ctypes.
        """
        ours = 2  # a field, and the argument
        of_dict = 1 if sys.getrefcount(self._named) <= ours else 0
        return [
            held.name
            for held in self._held
            if held.name in self._views
            and sys.getrefcount(held.buffer) <= ours + self._views[held.name] + of_dict * (held.name in self._named)
        ]

    def _check_files(self) -> None:
        """Raise SourceError if the file behind an mmap has shrunk: touching memory beyond its end would kill us."""
        for name, area, size in self._files:
            if area.size() < size:
                raise SourceError(f"the file behind {name!r} had {size} bytes and has {area.size()}")

    def data_pages(self) -> int | None:
        """Unknown: arrays have no holes to query."""
        return None

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn."""
        self._check_files()
        out = np.empty((stop - first, PAGE_SIZE), dtype=np.uint8)
        if not self._pieces:
            out[:] = 0
        for begin, end, number, data in self._parts(np.arange(first, stop)):
            if data.ndim == 2:
                at = first + begin - number
                out[begin:end] = data[at : at + end - begin]
            else:
                self._pad(data, out[begin])
        return out

    def pieces(self) -> Iterator[tuple[int, Pages]]:
        """The whole pages in place."""
        for first, data in zip(self._firsts.tolist(), self._pieces, strict=True):
            if data.ndim == 2:
                yield first, data

    def differing(self, memory: Pages) -> NDArray[np.int64]:
        """The pages that differ from those of another memory of this layout, int64[n], ascending. In a pause."""
        found = [np.empty(0, dtype=np.int64)]
        for first, data in zip(self._firsts.tolist(), self._pieces, strict=True):
            if data.ndim == 2:
                found.append(dirty_pages(data, memory[first : first + len(data)]) + first)
            elif not np.array_equal(data, memory[first, : len(data)]):
                found.append(np.array([first]))
        return np.concatenate(found)

    def write(self, pfns: NDArray[np.int64], memory: Pages) -> None:
        """Make pages, ascending, equal to those of another memory of this layout. In a pause, after `check`.

        Only differences are written, since the first write to a page may cost a fault: an encoder finds and writes them
        in one pass. Its output is not needed.
        """
        codec = get_codec("delta")
        room = np.empty(_WRITE_PAGES * codec.max_page_bytes, dtype=np.uint8)
        for begin, end, first, data in self._parts(pfns):
            if data.ndim == 1:
                data[:] = memory[first, : len(data)]
                continue
            for start in range(begin, end, _WRITE_PAGES):
                part = pfns[start : min(start + _WRITE_PAGES, end)]
                codec.encode(memory, data, index=part, reference_index=part - first, update=True, out=room)

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages, ascending, to the first rows of `out`, and return these rows."""
        target = out[: len(pfns)]
        if not self._pieces:  # the page that a memory of empty buffers has
            target[:] = 0
        for begin, end, first, data in self._parts(pfns):
            if data.ndim == 2:
                gather(data, pfns[begin:end] - first, target[begin:end])
            else:
                self._pad(data, target[begin])
        return target

    @staticmethod
    def _pad(data: NDArray[np.uint8], page: NDArray[np.uint8]) -> None:
        page[: len(data)] = data
        page[len(data) :] = 0

    def places(self, pfns: NDArray[np.int64]) -> Places:
        """Where pages, ascending, are: in their buffers, except pages within which a buffer ends."""
        if not self._pieces:
            return [(np.zeros((1, PAGE_SIZE), dtype=np.uint8), np.zeros(len(pfns), dtype=np.int64))]
        found = []
        for begin, end, first, data in self._parts(pfns):
            if data.ndim == 2:
                found.append((data, pfns[begin:end] - first))
            else:
                page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
                self._pad(data, page[0])
                found.append((page, np.zeros(1, dtype=np.int64)))
        return found

    def _parts(self, pfns: NDArray[np.int64]) -> Iterator[tuple[int, int, int, NDArray[np.uint8]]]:
        """Pages, ascending, by the piece that holds them: pfns[begin:end], the number of its first page, the piece."""
        if not self._pieces:
            return
        numbers = np.searchsorted(self._firsts, pfns, side="right") - 1
        borders = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(pfns)]
        for begin, end in pairwise(borders):
            number = numbers[begin]
            yield begin, end, int(self._firsts[number]), self._pieces[number]


class _Held(NamedTuple):
    name: str
    buffer: Any


def _look(name: str, buffer: Any, page: int) -> tuple[ManifestEntry, NDArray[np.uint8]]:
    """What a buffer is, and its bytes in memory order, without a copy."""
    if not isinstance(buffer, np.ndarray):
        data = bytes_of(name, buffer)
        if not data.flags.writeable and len(data):
            raise ValueError(_immutable(name, buffer, "a bytearray"))
        return ManifestEntry(name, BYTES, data.dtype, data.shape, "C", page, data.nbytes), data
    if isinstance(buffer, np.ma.MaskedArray):
        raise TypeError(f"{name!r} is a masked array: name its data and its mask")
    if buffer.dtype.hasobject:
        raise TypeError(f"{name!r} holds Python objects ({buffer.dtype}), which are not bytes")
    if not buffer.flags.writeable:
        raise ValueError(_immutable(name, buffer, "the array that it shows, or a copy"))
    if not buffer.flags.forc:
        raise ValueError(f"{name!r} is not a contiguous array: name the array that it is a view of")
    order = "C" if buffer.flags.c_contiguous else "F"
    array = buffer.view(np.ndarray)
    # numpy cannot look at items of no size as bytes.
    flat = (array if order == "C" else array.T).reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    return ManifestEntry(name, ARRAY, array.dtype, array.shape, order, page, array.nbytes), flat


def _immutable(name: str, buffer: Any, instead: str) -> str:
    return f"{name!r} ({type(buffer).__name__}) is read-only: nothing in it can change. Protect {instead}"


def _mapped_file(buffer: object) -> tuple[mmap.mmap, int] | None:
    """The mmap at the bottom of a buffer, and the size of its file."""
    buffer = getattr(buffer, "buf", buffer)  # of shared memory
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
