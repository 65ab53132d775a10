"""What the three numpy kernels share: walking a batch in spans, and reaching unaligned bytes as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Pages

SPAN_PAGES = 256
"""Pages taken at a time: a span of new and old pages fits the second-level cache."""

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]
Flags = NDArray[np.bool_]
Encode = Callable[[Pages, Index | None, Pages, Index | None, Flags | None, bool, Bytes], int]
Check = Callable[[Bytes, int], int]
Apply = Callable[[Bytes, Pages, Index | None, int | None], int]
Emit = Callable[[Pages, Pages, Flags, Bytes], int]


def encode_spans(
    pages: Pages,
    index: Index | None,
    reference: Pages,
    slots: Index | None,
    full: Flags | None,
    update: bool,
    out: Bytes,
    emit: Emit,
) -> int:
    """Call `emit(new, old, whole, out)` span by span, and bring the references up to date.

    Each span of pages is copied once, and everything is taken from that copy, so that wire and reference agree even
    if the source is written meanwhile.
    """
    n = len(pages) if index is None else len(index)
    written = 0
    for start, stop in _spans(n, slots):
        new = pages[start:stop].copy() if index is None else pages[index[start:stop]]
        whole = np.zeros(stop - start, dtype=bool) if full is None else full[start:stop]
        if slots is None:
            old = reference[start:stop]
        else:
            slot = slots[start:stop]
            whole = whole | (slot < 0)
            # A slot of -1 wraps to the last one, which can be read; `whole` keeps it from being used.
            old = reference[slot] if len(reference) else np.zeros_like(new)
        written += emit(new, old, whole, out[written:])
        if update:
            differ = (new.view("<u8") != old.view("<u8")).any(axis=1)
            if slots is None:
                old[differ] = new[differ]
            else:
                differ &= slot >= 0
                reference[slot[differ]] = new[differ]
    return written


def _spans(n: int, slots: Index | None) -> Iterator[tuple[int, int]]:
    start = 0
    while start < n:
        stop = min(start + SPAN_PAGES, n)
        if slots is not None:
            stop = start + distinct_prefix(slots[start:stop])
        yield start, stop
        start = stop


def distinct_prefix(numbers: Index) -> int:
    """How many numbers come before the first one that repeats an earlier one; −1 may repeat."""
    if len(numbers) < 2 or bool((numbers[1:] > numbers[:-1]).all()):
        return len(numbers)
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    repeats = order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)]
    return int(repeats.min()) if len(repeats) else len(numbers)


def windows(data: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """A writable view [len − size + 1, size] whose row i is data[i : i + size]."""
    rows = max(len(data) - size + 1, 0)
    step = data.strides[0]
    return np.lib.stride_tricks.as_strided(data, (rows, size), (step, step))


def unaligned(data: Bytes, dtype: str) -> NDArray[np.generic]:
    """A view whose element i is the value of that type at byte i."""
    return np.ndarray(max(len(data) - np.dtype(dtype).itemsize + 1, 0), dtype, data, strides=(1,))


def within(lengths: NDArray[np.integer]) -> Index:
    """0…l−1 for each length l, joined: the index of each item in its own group."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    starts: Index = np.repeat(ends - lengths, lengths)
    return np.arange(total, dtype=np.int64) - starts


class Span(Protocol):
    """Some whole encoded pages, parsed and checked."""

    @property
    def first_page(self) -> int:
        """Its first page in the batch."""

    @property
    def pages(self) -> int:
        """The number of its pages."""

    @property
    def end(self) -> int:
        """The first encoded byte after it."""


S = TypeVar("S", bound=Span)
Parse = Callable[[Bytes, int], Iterator[S]]
Scatter = Callable[[S, slice, Index, Bytes, Pages], None]


def check_spans(parse: Parse[S], encoded: Bytes, n: int) -> int:
    """Walk n encoded pages; `parse` raises Malformed. Returns the bytes that they take."""
    consumed = 0
    for span in parse(encoded, n):
        consumed = span.end
    return consumed


def apply_spans(
    parse: Parse[S], scatter: Scatter[S], encoded: Bytes, pages: Pages, index: Index | None, checked: int | None
) -> int:
    """Check all encoded pages, then apply them to `pages`. Returns the bytes consumed.

    checked: what the check returned, if it has already run

    scatter(span, part, numbers, encoded, pages): apply that part of a span to the pages with those numbers, none of
        which repeats
    """
    n = len(pages) if index is None else len(index)
    consumed = check_spans(parse, encoded, n) if checked is None else checked
    for span in parse(encoded, n):
        stop = span.first_page + span.pages
        if index is None:
            numbers = np.arange(span.first_page, stop, dtype=np.int64)
        else:
            numbers = index[span.first_page : stop]
        start = 0
        while start < len(numbers):
            part = slice(start, start + distinct_prefix(numbers[start:]))
            scatter(span, part, numbers, encoded, pages)
            start = part.stop
    return consumed
