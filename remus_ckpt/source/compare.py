"""Finding written pages by comparison with a copy of memory: this always works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.reference import Shadow
from remus_ckpt.codec.scan import dirty_pages, filled_pages, gather, scatter
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import Pages
from remus_ckpt.source import Memory

_LOOK_PAGES = 64
_LOOK_EVERY = 16


class Comparable(Memory, Protocol):
    """Memory that can be examined in place.

    partial: int64[n], ascending: pages that the memory fills only in part, padded with zeros; they must be `read`
    """

    partial: NDArray[np.int64]

    def pieces(self) -> Iterator[tuple[int, Pages]]:
        """All other pages, ascending, in pieces: the number of the piece's first page, and its pages, uint8[n, 4096].

        A page that is neither here nor in `partial` is zeros. In a pause, after `check`.
        """


class Compare:
    """Compares memory with what the last checkpoint held.

    reference: a copy of that, which begins as zeros. The sender that uses it keeps it up to date.
    why: why the kernel does not find the pages although it might
    """

    way: Literal["kernel", "compare"] = "compare"
    missed_pages = 0

    def __init__(self, memory: Comparable, *, why: str = "") -> None:
        self._memory = memory
        self.why = why
        self._rooms: tuple[Pages, Pages] = zeros(_LOOK_PAGES), zeros(_LOOK_PAGES)
        self.restart()

    def restart(self) -> Shadow:
        """Start over with a copy of zeros."""
        self.reference = Shadow(zeros(self._memory.pages))
        self._is_fresh = True  # it is zeros
        # Pages of the copy that may be non-zero. The others are skipped where memory has a hole.
        self._is_filled = np.zeros(self._memory.pages, dtype=bool)
        return self.reference

    def copy_live(self) -> Iterator[tuple[NDArray[np.int64], Pages]]:
        """Yield the pages that differ from the copy, once they are in it."""
        is_fresh, self._is_fresh = self._is_fresh, False
        for start in range(0, self._memory.pages, MAX_BATCH_ENTRIES):
            stop = min(start + MAX_BATCH_ENTRIES, self._memory.pages)
            sample, shadow = self._memory.sample(start, stop), self.reference.pages[start:stop]
            # Fresh memory that is read first and written then costs two faults a page.
            changed = filled_pages(sample) if is_fresh else dirty_pages(sample, shadow)
            self._is_filled[changed + start] = True
            if len(changed) == len(sample):
                expect(shadow, changed)
                shadow[:] = sample
            else:
                sample = gather(sample, changed)
                expect(shadow, changed)
                scatter(sample, shadow, changed)
            yield changed + start, sample

    def estimate(self) -> int:
        """Estimate from every sixteenth group of 64 pages."""
        looked = found = 0
        for start in range(0, self._memory.pages, _LOOK_EVERY * _LOOK_PAGES):
            sample, changed = self._look(start, start + _LOOK_PAGES)
            looked += len(sample)
            found += len(changed)
        return found * self._memory.pages // looked

    def _look(self, first: int, stop: int) -> tuple[Pages, NDArray[np.int64]]:
        """A sample, and which of its pages differ, counted from its first page."""
        sample = self._memory.sample(first, min(stop, self._memory.pages))
        return sample, dirty_pages(sample, self.reference.pages[first : first + len(sample)])

    def written(self) -> NDArray[np.int64]:
        """Exactly the pages that differ."""
        shadow = self.reference.pages
        found = [np.empty(0, dtype=np.int64)]
        is_held = np.zeros(len(shadow), dtype=bool)
        for first, pages in self._memory.pieces():
            stop = first + len(pages)
            is_held[first:stop] = True
            if len(numbers := dirty_pages(pages, shadow[first:stop])):
                found.append(numbers + first)
        ours, theirs = self._rooms
        for start in range(0, len(self._memory.partial), _LOOK_PAGES):
            pfns = self._memory.partial[start : start + _LOOK_PAGES]
            numbers = dirty_pages(self._memory.read(pfns, theirs), gather(shadow, pfns, ours))
            found.append(pfns[numbers])
        is_held[self._memory.partial] = True
        emptied = np.flatnonzero(self._is_filled & ~is_held)
        emptied = emptied[shadow[emptied].any(axis=1)]
        # Until a checkpoint has taken these pages, the copy holds data for them.
        is_held[emptied] = True
        self._is_filled = is_held
        found.append(emptied)
        return np.sort(np.concatenate(found), kind="stable")

    def peek(self) -> NDArray[np.int64]:
        """The same."""
        return self.written()

    def note(self, pfns: NDArray[np.int64]) -> None:
        """Note pages that will be in the copy too, although `written` has not named them."""
        self._is_filled[pfns] = True

    def taken(self) -> None:
        """Does nothing: the copy is already up to date."""

    def close(self) -> None:
        """Does nothing: the copy is freed with the sender."""
