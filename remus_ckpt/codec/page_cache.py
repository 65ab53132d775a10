"""The cache for pages on their way into a QEMU stream: what the receiver holds (specs/qemu-ram.md §10).

A page has one slot, by its number. A slot is taken from its page only if that page was not sent for two rounds. So if
there are more hot pages than slots, as many as there are slots stay, instead of each evicting the next.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec, kernels
from remus_ckpt.codec.xbzrle import ENCODED, FRAME_BYTES, MAX_PAGE_BYTES, SAME
from remus_ckpt.pages import PAGE_SIZE, Pages

LIFETIME = 2
"""Rounds for which a page stays in the cache unused, as in QEMU."""
_ZERO, _PAGE, _CONTINUE, _XBZRLE = 0x02, 0x08, 0x20, 0x40
_WORD_BYTES = 8
_SLACK = 128


class Count(IntEnum):
    """The index of each number in `PageCache.counts`, in the order of `remus_sending`."""

    ZERO = 0
    PLAIN = 1
    """Whole, since nothing is encoded."""
    MISS = 2
    """Whole, since the cache had not got it."""
    SAME = 3
    """Not sent, since the receiver has it."""
    XBZRLE = 4
    OVERFLOW = 5
    """Whole, since encoded it would take more."""
    BYTES = 6
    """Of the encoded pages, with the three bytes in front of each."""


def room_for(pages: int) -> int:
    """Bytes that `PageCache.records` needs for this many pages."""
    return pages * (_WORD_BYTES + MAX_PAGE_BYTES) + _SLACK


class PageCache:
    """A bounded copy of pages that were sent.

    slots: a power of two; or 0: no cache
    kernel: require one of `kernels.KERNELS`, as for a codec
    """

    def __init__(self, slots: int, *, kernel: str | None = None) -> None:
        if slots < 0 or slots & (slots - 1):
            raise ValueError(f"a cache of {slots} pages; their number is a power of two, or 0")
        self.slots = slots
        self.pages: Pages = np.zeros((slots, PAGE_SIZE), dtype=np.uint8)
        self.held: NDArray[np.int64] = np.full(slots, -1, dtype=np.int64)
        """int64[slots]: the page in each slot, -1 for none."""
        self.ages: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        """int64[slots]: the round in which it was last sent."""
        self.age = 0
        """The number of this round."""
        self.counts: NDArray[np.int64] = np.zeros(len(Count), dtype=np.int64)
        """int64[7]: what has become of the pages since the start, by `Count`."""
        self._native = kernels.choose_sending(kernel)
        self._codec = get_codec("xbzrle", kernel=kernel)

    def records(
        self,
        pages: Pages,
        index: NDArray[np.int64] | None,
        numbers: NDArray[np.int64],
        first: int,
        out: NDArray[np.uint8],
        *,
        encodes: bool,
    ) -> memoryview:
        """Pages of one block as records, each with the flag CONTINUE (specs/qemu-ram.md §4.2).

        pages: uint8[…, 4096], C-contiguous; they may be written meanwhile
        index: int64[n], which of them; None: all
        numbers: int64[n], of these pages in their block, none negative
        first: the number of the block's first page, counted through all blocks
        out: uint8[≥ room_for(n)]
        encodes: whether pages may be encoded; otherwise the cache is only filled

        Returns a part of `out`. Pages that the receiver has are left out.
        Raises ValueError or TypeError for arrays that do not fit; nothing is changed then.
        """
        if self._native is not None:
            size: int = self._native(
                pages, index, numbers, first, self.pages, self.held, self.ages, self.age, encodes, out, self.counts
            )
        else:
            size = self._plainly(pages, index, numbers, first, out, encodes)
        return memoryview(out)[:size]

    def resized(self, slots: int) -> PageCache:
        """A cache of another size with what fits of this one; if two pages want the same slot, the one sent last gets
        it."""
        other = PageCache(slots)
        other.age, other.counts = self.age, self.counts
        other._native, other._codec = self._native, self._codec
        if slots:
            kept = np.flatnonzero(self.held >= 0)
            kept = kept[np.argsort(self.ages[kept], kind="stable")]
            # The last of those that go to one slot, in the order of their ages.
            places, backward = np.unique(self.held[kept][::-1] & (slots - 1), return_index=True)
            chosen = kept[::-1][backward]
            other.held[places], other.ages[places] = self.held[chosen], self.ages[chosen]
            other.pages[places] = self.pages[chosen]
        return other

    def _plainly(
        self,
        pages: Pages,
        index: NDArray[np.int64] | None,
        numbers: NDArray[np.int64],
        first: int,
        out: NDArray[np.uint8],
        encodes: bool,
    ) -> int:
        """The same as the native function, a page at a time."""
        places = range(len(pages)) if index is None else index.tolist()
        if len(places) != len(numbers) or len(out) < room_for(len(numbers)):
            raise ValueError(f"{len(numbers)} pages, {len(places)} places and {len(out)} bytes for them")
        if len(places) and (min(places) < 0 or max(places) >= len(pages) or int(numbers.min()) < 0):
            raise ValueError(f"pages {min(places)} to {max(places)} of {len(pages)}")
        at = 0
        for place, number in zip(places, numbers.tolist(), strict=True):
            now = pages[place : place + 1].copy()
            flag, body, slot = self._one(now, first + number, encodes)
            if body is not None:
                word = np.array([number * PAGE_SIZE | flag | _CONTINUE], dtype=">u8").view(np.uint8)
                out[at : at + _WORD_BYTES] = word
                at += _WORD_BYTES
                out[at : at + len(body)] = body
                at += len(body)
            if slot is not None:
                self.pages[slot] = now[0]
        return at

    def _one(self, now: Pages, key: int, encodes: bool) -> tuple[int, NDArray[np.uint8] | None, int | None]:
        """The flag of a page's record, its body (None: it is left out), and the slot that it goes to (None: none)."""
        slot, hits = None, False
        if self.slots:
            place = key & (self.slots - 1)
            held = int(self.held[place])
            hits = held == key
            if hits or held < 0 or self.ages[place] + LIFETIME <= self.age:
                slot = place
                self.held[slot], self.ages[slot] = key, self.age
        if not now.any():
            self.counts[Count.ZERO] += 1
            return _ZERO, np.zeros(1, dtype=np.uint8), slot
        if not encodes or not hits:
            self.counts[Count.MISS if encodes else Count.PLAIN] += 1
            return _PAGE, now[0], slot
        assert slot is not None
        frame = np.frombuffer(self._codec.encode(now, self.pages[slot : slot + 1], update=False), dtype=np.uint8)
        if frame[0] == SAME:
            self.counts[Count.SAME] += 1
            return 0, None, slot
        if frame[0] == ENCODED:
            self.counts[Count.XBZRLE] += 1
            self.counts[Count.BYTES] += len(frame)
            return _XBZRLE, frame, slot
        self.counts[Count.OVERFLOW] += 1
        return _PAGE, frame[FRAME_BYTES:], slot
