"""The sender's reference pages: what the receiver is known to hold (specs/stream.md §6.5)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import PAGE_SIZE, Pages


class Reference(Protocol):
    """What a sender asks of its reference.

    pages: uint8[slots, 4096]; `Codec.encode` reads them and brings them up to date
    """

    pages: Pages

    def sent_raw(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """These pages were sent in round 0: uint8[n, 4096] at int64[n]."""

    def invalidate(self, pfns: NDArray[np.int64]) -> None:
        """These pages are page tables in this buffer: no delta may be taken against them."""

    def choose(self, pfns: NDArray[np.int64], tables: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """For pages about to be encoded, in this order: their slots (−1: none), and which of them must go full."""


class Shadow:
    """A copy of all memory, which starts as zeros on both sides: every page has a reference from the start.

    pages: the copy, uint8[n, 4096], writable; a tracker that compares shares it with the sender
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._known = np.ones(len(pages), dtype=bool)

    def sent_raw(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """These pages were sent in round 0."""
        self.pages[pfns] = data

    def invalidate(self, pfns: NDArray[np.int64]) -> None:
        """These pages are page tables in this buffer."""
        self._known[pfns] = False

    def choose(self, pfns: NDArray[np.int64], tables: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The slot of a page is its number; a page that was a page table goes full once."""
        full = ~self._known[pfns]
        if tables.any() or full.any():
            if not tables.any() and bool((pfns[1:] > pfns[:-1]).all()):
                self._known[pfns] = True
                return pfns, full
            # A PFN may occur more than once, so each depends on those before it.
            for i, (pfn, table) in enumerate(zip(pfns.tolist(), tables.tolist(), strict=True)):
                full[i] = table or not self._known[pfn]
                self._known[pfn] = not table
        return pfns, full


class Lru:
    """A bounded reference: the most recently used pages. It starts empty at the first compressed checkpoint, as in Xen.

    capacity: number of pages; Xen has 8,192
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a reference of {capacity} pages")
        self.pages: Pages = np.zeros((capacity, PAGE_SIZE), dtype=np.uint8)
        self._slots: OrderedDict[int, int] = OrderedDict()  # PFN → slot, the most recently used last
        self._free = list(range(capacity))

    def sent_raw(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """Round 0 does not enter the cache."""

    def invalidate(self, pfns: NDArray[np.int64]) -> None:
        """Page tables leave the cache; their slots are used next."""
        for pfn in pfns.tolist():
            self._release(pfn)

    def choose(self, pfns: NDArray[np.int64], tables: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A hit becomes the most recently used; a miss takes a free or the least recently used slot, and goes full."""
        slots = np.empty(len(pfns), dtype=np.int64)
        full = np.ones(len(pfns), dtype=bool)
        for i, (pfn, table) in enumerate(zip(pfns.tolist(), tables.tolist(), strict=True)):
            if table:
                # It may have entered the cache as a normal page, earlier in this buffer.
                self._release(pfn)
                slots[i] = -1
                continue
            slot = self._slots.get(pfn)
            if slot is not None:
                self._slots.move_to_end(pfn)
                full[i] = False
            else:
                slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
                self._slots[pfn] = slot
            slots[i] = slot
        return slots, full

    def _release(self, pfn: int) -> None:
        slot = self._slots.pop(pfn, None)
        if slot is not None:
            self._free.append(slot)
