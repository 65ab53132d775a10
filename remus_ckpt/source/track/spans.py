"""Watches buffers of this process, at any address, even several on one page, for written pages."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import SourceError, Untracked
from remus_ckpt.pages import PAGE_SIZE, pages_for
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.written import Runs, Scanner, Unwatched, Userfault, open_pagemap


class Span(NamedTuple):
    """A piece of memory. name: for messages; address: of its first byte; pfn: number of its page 0 in the source"""

    name: str
    address: int
    nbytes: int
    pfn: int


class Spans:
    """Some pieces of this process's memory, watched.

    They are registered as whole pages: a write next to a span, on the same page, counts as a write to it. A page under
    two spans counts for both.

    shared: take shared mappings too; writes to them by other processes are not seen
    Raises Untracked, with the name, for what cannot be watched.
    Only the process that made it may query it; in a forked child it does nothing.
    """

    def __init__(self, spans: Sequence[Span], *, shared: bool = False) -> None:
        self._pagemap = -1
        self._userfault = Userfault.of_this_process()
        self._spans = [span for span in spans if span.nbytes]
        self._areas = _areas(self._spans)
        self._pid = os.getpid()
        self._scanner = Scanner()
        try:
            for area in self._areas:
                _check_mappings(area, shared=shared)
                if not self._userfault.register(area.start, area.stop):
                    raise Untracked(f"{_some(area.names)} is read-only here: its writers have it mapped elsewhere")
            self._pagemap = open_pagemap()
            self.arm()
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        if "_userfault" in self.__dict__:  # otherwise the kernel has none, and nothing was opened
            self.close()

    def close(self) -> None:
        """Stop watching the memory."""
        self._userfault.close()
        pagemap, self._pagemap = self._pagemap, -1
        if pagemap >= 0:
            os.close(pagemap)

    def arm(self) -> None:
        """Forget earlier writes."""
        for area in self._areas:
            try:
                self._scanner.arm(self._pagemap, area.start, area.stop)
            except Unwatched:
                raise _lost(area) from None
            self._check_mapped(area)

    def written(self) -> NDArray[np.int64]:
        """The PFNs written since `arm` or the last call, int64[n], ascending if the spans' are.

        Raises SourceError if some of the memory was freed, moved or remapped: it is not the memory that was given.
        """
        return self._find(self._scanner.written)

    def peek(self) -> NDArray[np.int64]:
        """Like `written`, but the next call names them again, and they can be written without a fault."""
        return self._find(self._scanner.peek)

    def _find(self, scan: Callable[[int, int, int], Runs]) -> NDArray[np.int64]:
        if os.getpid() != self._pid:
            raise SourceError("a forked child cannot track its parent's memory")
        found: list[Runs] = []
        for area in self._areas:
            try:
                found.append(scan(self._pagemap, area.start, area.stop))
            except Unwatched:
                raise _lost(area) from None
            # Check after the scan, which skips unmapped ranges; memory that is unmapped later is found the next time.
            self._check_mapped(area)
        runs = np.concatenate([np.empty((0, 2), dtype=np.int64), *found])
        if not len(runs):
            return np.empty(0, dtype=np.int64)
        return np.concatenate([_pfns_of(span, runs) for span in self._spans])

    def _check_mapped(self, area: _Area) -> None:
        if not linux.is_mapped(area.start, area.stop):
            raise _lost(area)


class _Area(NamedTuple):
    """Adjacent whole pages, and the names they belong to."""

    start: int
    stop: int
    names: tuple[str, ...]


def _lost(area: _Area) -> SourceError:
    return SourceError(
        f"the memory of {_some(area.names)} at {area.start:#x}-{area.stop:#x} was freed, moved or remapped "
        "while it was protected"
    )


def _areas(spans: Sequence[Span]) -> list[_Area]:
    areas: list[_Area] = []
    for span in sorted(spans, key=lambda span: span.address):
        start = span.address // PAGE_SIZE * PAGE_SIZE
        stop = pages_for(span.address + span.nbytes) * PAGE_SIZE
        if areas and start < areas[-1].stop:
            last = areas.pop()
            areas.append(_Area(last.start, max(last.stop, stop), (*last.names, span.name)))
        else:
            areas.append(_Area(start, stop, (span.name,)))
    return areas


def _pfns_of(span: Span, runs: Runs) -> NDArray[np.int64]:
    """The pages of a span that have at least one byte in some runs."""
    # A page of a span that does not begin at a page boundary covers two pages of memory.
    first_page = span.address // PAGE_SIZE
    last_page = (span.address + span.nbytes - 1) // PAGE_SIZE
    begin = int(np.searchsorted(runs[:, 0] + runs[:, 1], first_page, side="right"))
    end = int(np.searchsorted(runs[:, 0], last_page, side="right"))
    begins = runs[begin:end, 0] * PAGE_SIZE - span.address
    ends = begins + runs[begin:end, 1] * PAGE_SIZE
    first = np.maximum(begins // PAGE_SIZE, 0)
    stop = np.minimum(-(-ends // PAGE_SIZE), pages_for(span.nbytes))
    # Two runs that are apart by a page of addresses may meet in one of the span's.
    first[1:] = np.maximum(first[1:], stop[:-1])
    return expand(first + span.pfn, stop - first)


def expand(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of runs: first, first + 1 … for each. Vectorised."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    numbers: NDArray[np.int64] = np.arange(total, dtype=np.int64)
    numbers += np.repeat(first - (ends - count), count)
    return numbers


_QUERY = struct.Struct("=9Q4I2Q")
"""size, query flags, address; start, end, flags, page size, offset, inode, device of the mapping; names."""
_PROCMAP_QUERY = 0xC0686611


_SHARED = 8


def _check_mappings(area: _Area, *, shared: bool) -> None:
    """Raise Untracked if some of it is hugetlbfs, or shared where it must not be.

    On hugetlbfs the kernel records writes only for whole pages of 2 MiB or 1 GiB. Transparent huge pages are split by
    the first write to them, and are exact.
    """
    for page_size, is_shared in _mappings(area):
        if page_size != PAGE_SIZE:
            raise Untracked(
                f"{_some(area.names)} is in huge pages of {page_size:,} bytes (hugetlbfs), where the kernel does "
                "not record writes to 4,096 bytes"
            )
        if is_shared and not shared:
            raise Untracked(f"{_some(area.names)} is shared memory, to which other processes may write")


def _mappings(area: _Area) -> list[tuple[int, bool]]:
    """(page size, is it shared?) of all mappings that cover an area."""
    found = []
    with open("/proc/self/maps", "rb") as maps:
        at = area.start
        while at < area.stop:
            query = bytearray(_QUERY.pack(_QUERY.size, 0, at, *[0] * 12))
            try:
                fcntl.ioctl(maps, _PROCMAP_QUERY, query)
            except FileNotFoundError:
                raise _lost(area) from None
            except OSError:  # a kernel before 6.11
                return _mappings_by_smaps(area)
            _, _, _, _, at, flags, page_size, *_ = _QUERY.unpack(query)
            found.append((page_size, bool(flags & _SHARED)))
    return found


def _mappings_by_smaps(area: _Area) -> list[tuple[int, bool]]:
    """Like `_mappings`, from smaps. Slow: the kernel walks the page tables of all memory."""
    found = []
    overlaps = is_shared = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            word, value = line.split(maxsplit=2)[:2]
            if not word.endswith(":"):
                start, _, stop = word.partition("-")
                overlaps = int(start, 16) < area.stop and int(stop, 16) > area.start
                is_shared = value.endswith("s")
            elif overlaps and word == "KernelPageSize:":
                found.append((int(value) * 1024, is_shared))
    return found


def _some(names: Sequence[str]) -> str:
    text = ", ".join(map(repr, names[:4]))
    return f"{text} and {len(names) - 4} more" if len(names) > 4 else text
