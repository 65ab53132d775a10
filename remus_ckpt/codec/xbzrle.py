"""QEMU's XBZRLE codec, in numpy (specs/xbzrle.md).

A page is (zrun nzrun)*: the number of unchanged bytes, the number of changed bytes, and those bytes. Pages do not mark
their own end, so a batch frames each with a kind of one byte and a big-endian uint16 length.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import arrays, oracle
from remus_ckpt.codec.coding import Coding
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, Pages

SAME, ENCODED, RAW = 0, 1, 2
FRAME_BYTES = 3
MAX_PAGE_BYTES = FRAME_BYTES + PAGE_SIZE

_SPAN_PAGES = 1024


class Outcome(Enum):
    """The encoder's answer for a page that it does not encode."""

    UNCHANGED = "unchanged"
    OVERFLOW = "overflow"


def encode_page(new: Pages, old: Pages, *, fold: bool = False) -> bytes | Outcome:
    """Encode one page without a frame, as QEMU's stream carries it.

    new, old: uint8[4096]
    fold: take gaps of one unchanged byte into the changed bytes around them (specs/xbzrle.md §3.3)
    Returns at most 4,096 bytes, or UNCHANGED, or OVERFLOW if they do not suffice: that page travels raw.
    Source: QEMU, xbzrle_encode_buffer.
    """
    out = np.empty(MAX_PAGE_BYTES, dtype=np.uint8)
    size = _emit(new.reshape(1, PAGE_SIZE), old.reshape(1, PAGE_SIZE), np.zeros(1, dtype=bool), out, fold)
    if out[0] == ENCODED:
        return out[FRAME_BYTES:size].tobytes()
    return Outcome.UNCHANGED if out[0] == SAME else Outcome.OVERFLOW


def apply_page(encoded: bytes | memoryview, page: Pages) -> None:
    """Apply one page without a frame, in place.

    encoded: what `encode_page` returned, 3 bytes to the size of the page
    page: uint8[4096], writable; or of another size, as some of QEMU's targets have
    Raises Malformed; the page is untouched then.
    """
    runs = _parse_page(memoryview(encoded), 0, len(encoded), len(page))
    data = np.frombuffer(encoded, dtype=np.uint8)
    for source, target, length in runs:
        page[target : target + length] = data[source : source + length]


def encode(
    pages: Pages,
    index: arrays.Index | None,
    reference: Pages,
    reference_index: arrays.Index | None,
    full: arrays.Flags | None,
    update: bool,
    out: arrays.Bytes,
    *,
    fold: bool = False,
) -> int:
    """Encode a batch; see `kernels` for the arguments."""

    def emit(new: Pages, old: Pages, whole: arrays.Flags, room: arrays.Bytes) -> int:
        return _emit(new, old, whole, room, fold)

    return arrays.encode_spans(pages, index, reference, reference_index, full, update, out, emit)


def _emit(new: Pages, old: Pages, whole: arrays.Flags, out: arrays.Bytes, fold: bool) -> int:
    n = len(new)
    changed = new != old
    changed[whole] = False
    if fold:
        changed[:, 1:-1] |= changed[:, :-2] & changed[:, 2:]
    # The first byte of each run of changed bytes, and the first after it, with an unchanged byte before every page.
    padded = np.zeros((n, PAGE_SIZE + 2), dtype=np.int8)
    padded[:, 1:-1] = changed
    edges = np.diff(padded, axis=1)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    page = starts // (PAGE_SIZE + 1)
    begin, end = starts % (PAGE_SIZE + 1), stops % (PAGE_SIZE + 1)
    lengths = end - begin
    runs_each = np.bincount(page, minlength=n)
    is_first = np.ones(len(page), dtype=bool)
    is_first[1:] = page[1:] != page[:-1]
    gaps = begin - np.where(is_first, 0, np.concatenate([[0], end[:-1]]))

    def length_bytes(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(values < 0x80, 1, 2)

    gap_bytes, length_sizes = length_bytes(gaps), length_bytes(lengths)
    sizes = gap_bytes + length_sizes + lengths
    run_ends = np.cumsum(sizes)
    first_run = np.cumsum(runs_each) - runs_each
    before_page = np.concatenate([[0], run_ends])[first_run]
    at = run_ends - sizes - before_page[page]  # of the run, in the page's own bytes

    # QEMU gives up as soon as a length that may follow lacks two bytes of room, or the bytes do not fit.
    last = np.ones(len(page), dtype=bool)
    last[:-1] = page[1:] != page[:-1]
    overflows = (at + 2 > PAGE_SIZE) | (at + gap_bytes + 2 > PAGE_SIZE) | (at + sizes > PAGE_SIZE)
    overflows |= last & (end < PAGE_SIZE) & (at + sizes + 2 > PAGE_SIZE)
    kinds = np.where(runs_each == 0, SAME, ENCODED)
    kinds[page[overflows]] = RAW
    kinds[whole] = RAW
    encoded_sizes = np.zeros(n, dtype=np.int64)
    np.add.at(encoded_sizes, page, sizes)
    body_sizes = np.where(kinds == ENCODED, encoded_sizes, np.where(kinds == RAW, PAGE_SIZE, 0))
    frame_ends = np.cumsum(body_sizes + FRAME_BYTES)
    frames = frame_ends - body_sizes - FRAME_BYTES
    total = int(frame_ends[-1])

    out[frames] = kinds
    out[frames + 1] = body_sizes >> 8
    out[frames + 2] = body_sizes & 0xFF
    kept = kinds[page] == ENCODED
    at = at[kept] + frames[page[kept]] + FRAME_BYTES
    _put_lengths(out, at, gaps[kept])
    at = at + gap_bytes[kept]
    _put_lengths(out, at, lengths[kept])
    at = at + length_sizes[kept]
    inside = arrays.within(lengths[kept])
    from_ = np.repeat(page[kept] * PAGE_SIZE + begin[kept], lengths[kept]) + inside
    out[np.repeat(at, lengths[kept]) + inside] = new.reshape(-1)[from_]
    raw = np.flatnonzero(kinds == RAW)
    if len(raw):
        arrays.windows(out[:total], PAGE_SIZE)[frames[raw] + FRAME_BYTES] = new[raw]
    return total


def _put_lengths(out: arrays.Bytes, at: NDArray[np.int64], values: NDArray[np.int64]) -> None:
    """ULEB128 of one or two bytes."""
    long = values >= 0x80
    out[at] = np.where(long, (values & 0x7F) | 0x80, values)
    out[at[long] + 1] = values[long] >> 7


def check(encoded: arrays.Bytes, n: int) -> int:
    """Refuse n pages that are malformed; see `kernels`."""
    return arrays.check_spans(_parse, encoded, n)


def apply(encoded: arrays.Bytes, pages: Pages, index: arrays.Index | None, checked: int | None = None) -> int:
    """Apply one encoded page to each page of the batch; see `kernels`."""
    return arrays.apply_spans(_parse, _scatter, encoded, pages, index, checked)


class _Span(NamedTuple):
    """Some whole pages, parsed and checked: the runs of the encoded ones, and the raw ones."""

    first_page: int
    pages: int
    page_of: NDArray[np.int64]  # for each run, its page counted from first_page …
    sources: NDArray[np.int64]  # … where its bytes are in the encoded bytes …
    targets: NDArray[np.int64]  # … and in the page …
    lengths: NDArray[np.int64]  # … and how many they are
    raw_pages: NDArray[np.int64]
    bodies: NDArray[np.int64]  # where their 4,096 bytes are
    end: int


def _scatter(span: _Span, part: slice, numbers: arrays.Index, encoded: arrays.Bytes, pages: Pages) -> None:
    here = slice(*np.searchsorted(span.page_of, [part.start, part.stop]))
    lengths = span.lengths[here]
    inside = arrays.within(lengths)
    to = np.repeat(numbers[span.page_of[here]] * PAGE_SIZE + span.targets[here], lengths) + inside
    pages.reshape(-1)[to] = encoded[np.repeat(span.sources[here], lengths) + inside]
    raw = (span.raw_pages >= part.start) & (span.raw_pages < part.stop)
    if raw.any():
        pages[numbers[span.raw_pages[raw]]] = arrays.windows(encoded, PAGE_SIZE)[span.bodies[raw]]


def _parse(encoded: arrays.Bytes, n: int) -> Iterator[_Span]:
    """Walk n framed pages in spans. Raises Malformed with the offset of the frame or length at fault."""
    data = memoryview(encoded)
    at = page = 0
    while page < n:
        take = min(n - page, _SPAN_PAGES)
        span = _parse_span(data, at, page, take, page + n)
        yield span
        at = span.end
        page += take


def _parse_span(data: memoryview, at: int, first_page: int, n: int, wanted: int) -> _Span:
    runs: list[tuple[int, int, int]] = []
    pages: list[int] = []
    raw: list[tuple[int, int]] = []
    for page in range(n):
        if len(data) - at < FRAME_BYTES:
            raise Malformed(
                f"the data end after {first_page + page} pages of {wanted}", offset=at, section="xbzrle.md §5.1"
            )
        kind, size = data[at], data[at + 1] << 8 | data[at + 2]
        body = at + FRAME_BYTES
        sizes = {SAME: (0, 0), ENCODED: (3, PAGE_SIZE), RAW: (PAGE_SIZE, PAGE_SIZE)}.get(kind)
        if sizes is None:
            raise Malformed(f"a frame of kind {kind}", offset=at, section="xbzrle.md §5.1")
        if not sizes[0] <= size <= sizes[1]:
            raise Malformed(
                f"a frame of kind {kind} with {size} bytes; it has {sizes[0]}…{sizes[1]}",
                offset=at,
                section="xbzrle.md §5.1",
            )
        if size > len(data) - body:
            raise Malformed(
                f"a frame of {size} bytes where {len(data) - body} are left", offset=at, section="xbzrle.md §5.1"
            )
        if kind == ENCODED:
            found = _parse_page(data, body, body + size)
            runs += found
            pages += [page] * len(found)
        elif kind == RAW:
            raw.append((page, body))
        at = body + size
    columns = np.array(runs, dtype=np.int64).reshape(-1, 3)
    raws = np.array(raw, dtype=np.int64).reshape(-1, 2)
    return _Span(
        first_page,
        n,
        np.array(pages, dtype=np.int64),
        columns[:, 0],
        columns[:, 1],
        columns[:, 2],
        raws[:, 0],
        raws[:, 1],
        at,
    )


def _parse_page(data: memoryview, at: int, end: int, page_bytes: int = PAGE_SIZE) -> list[tuple[int, int, int]]:
    """The runs of one page: (offset of their bytes, offset in the page, number of bytes)."""
    runs: list[tuple[int, int, int]] = []
    target = 0
    start = at
    while at < end:
        here = at
        gap, at = _length(data, at, end)
        if gap == 0 and here != start:
            raise Malformed("a zero run of no bytes that is not the first", offset=here, section="xbzrle.md §4.2")
        target += gap
        here = at
        length, at = _length(data, at, end)
        if length == 0:
            raise Malformed("a run of no changed bytes", offset=here, section="xbzrle.md §4.2")
        if target + length > page_bytes:
            raise Malformed(f"{length} bytes at {target} of the page", offset=here, section="xbzrle.md §4.3")
        if length > end - at:
            raise Malformed(f"a run of {length} bytes where {end - at} are left", offset=here, section="xbzrle.md §4.3")
        runs.append((at, target, length))
        target += length
        at += length
    if not runs:
        raise Malformed("a page of no bytes", offset=at, section="xbzrle.md §4.2")
    return runs


def _length(data: memoryview, at: int, end: int) -> tuple[int, int]:
    if at >= end:
        raise Malformed("the page ends where a length must stand", offset=at, section="xbzrle.md §4.1")
    low = data[at]
    if low < 0x80:
        return low, at + 1
    if at + 1 >= end:
        raise Malformed("the page ends within a length", offset=at, section="xbzrle.md §4.1")
    high = data[at + 1]
    if high >= 0x80:
        raise Malformed("a length of more than two bytes", offset=at, section="xbzrle.md §4.1")
    return low & 0x7F | high << 7, at + 2


CODING = Coding("xbzrle", MAX_PAGE_BYTES, encode, check, apply, oracle.Xbzrle(fold=False))
FOLDING = Coding("xbzrle-fold", MAX_PAGE_BYTES, partial(encode, fold=True), check, apply, oracle.Xbzrle(fold=True))
