"""Pages, page frame numbers, page types and batches of them (specs/stream.md §1, §5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.limits import MAX_BATCH_ENTRIES

PAGE_SIZE = 4096
PARTS = 128
"""Equal parts of memory, for which changed pages are counted separately."""
PAGE_WORDS = PAGE_SIZE // 4

Pages = NDArray[np.uint8]
"""uint8[n, 4096]"""
Places = Sequence[tuple[Pages, NDArray[np.int64]]]
"""Where pages are, in order: arrays of pages, and the indexes in each, int64[n]."""
Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]
"""Anything that can be read as bytes without a copy."""


class PageType(IntEnum):
    """The upper nibble of a PFN entry (specs/stream.md §5.2)."""

    NOTAB = 0x0
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    NOTAB_PINNED = 0x8
    L1TAB_PINNED = 0x9
    L2TAB_PINNED = 0xA
    L3TAB_PINNED = 0xB
    L4TAB_PINNED = 0xC
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF


def _nibbles(*types: int) -> NDArray[np.bool_]:
    table = np.zeros(16, dtype=bool)
    table[list(types)] = True
    table.flags.writeable = False
    return table


KNOWN_TYPE = _nibbles(*PageType)
"""bool[16]: the valid nibbles; 5, 6 and 7 are not."""
HAS_DATA = _nibbles(*(t for t in PageType if t < PageType.BROKEN))
"""bool[16]: the entry announces 4,096 bytes."""
IS_PAGE_TABLE = _nibbles(1, 2, 3, 4, 9, 10, 11, 12)
"""bool[16]: PV page tables, which always travel full (specs/stream.md §6.6)."""


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Up to 1,024 PFN entries, and the pages of those that carry data.

    pfns: uint64[n]
    types: uint8[n], values of `PageType`
    data: uint8[m, 4096], one page for each entry whose type carries data, in entry order
    """

    pfns: NDArray[np.uint64]
    types: NDArray[np.uint8]
    data: Pages

    def __post_init__(self) -> None:
        if self.pfns.shape != self.types.shape or self.pfns.ndim != 1:
            raise ValueError(f"pfns {self.pfns.shape} and types {self.types.shape} must be two lists of one length")
        if len(self.pfns) > MAX_BATCH_ENTRIES:
            raise ValueError(f"a batch has at most {MAX_BATCH_ENTRIES} entries, not {len(self.pfns)}")
        with_data = int(np.count_nonzero(HAS_DATA[self.types & 0xF]))
        if self.data.shape != (with_data, PAGE_SIZE):
            raise ValueError(f"{with_data} entries carry data, but data has shape {self.data.shape}")


def batches(pfns: NDArray[np.integer], data: Pages) -> Iterator[PageBatch]:
    """Cut a capture of normal pages into batches of at most 1,024 entries.

    pfns: integers[n], in the order in which to send them
    data: uint8[n, 4096]
    The batches are views of `data`.
    """
    if len(pfns) != len(data):
        raise ValueError(f"{len(pfns)} pfns but {len(data)} pages")
    numbers = pfns.astype(np.uint64, copy=False)
    for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
        part = numbers[start : start + MAX_BATCH_ENTRIES]
        yield PageBatch(part, np.zeros(len(part), dtype=np.uint8), data[start : start + MAX_BATCH_ENTRIES])


def by_part(pfns: NDArray[np.int64], pages: int) -> NDArray[np.int64]:
    """int64[PARTS]: how many of these pages are in each of PARTS equal parts of memory. pages: of all memory"""
    return np.bincount(pfns * PARTS // max(pages, 1), minlength=PARTS)[:PARTS].astype(np.int64, copy=False)


def ratio(stream_bytes: int, page_bytes: int) -> float | None:
    """The compression ratio, as defined everywhere: bytes of the save stream per byte of the pages that they carry.

    0.03 is 3 %. Compression on the link does not count. None without pages.
    """
    return stream_bytes / page_bytes if page_bytes else None


def pages_for(size: int) -> int:
    """The number of pages that hold `size` bytes, the last one padded with zeros."""
    return -(-size // PAGE_SIZE)
