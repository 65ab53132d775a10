"""The delta codec of June 2011, in numpy (specs/delta.md).

A page is a record BEGIN_PAGE and one record for each word that changed, or a record FULL_PAGE and its 4,096 bytes.
A record is a little-endian int16 offset and uint32 value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import arrays, oracle
from remus_ckpt.codec.coding import Coding
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, PAGE_WORDS, Pages

BEGIN_PAGE = -100
FULL_PAGE = -101
RECORD_BYTES = 6
FULL_PAGE_BYTES = RECORD_BYTES + PAGE_SIZE
MAX_PAGE_BYTES = FULL_PAGE_BYTES
MAX_DELTA_WORDS = PAGE_SIZE // RECORD_BYTES
"""682: with one more word, the records would be longer than the full form (specs/delta.md §3.2)."""

_RECORD = np.dtype([("offset", "<i2"), ("value", "<u4")])
_WINDOW_BYTES = 1 << 20
"""Encoded bytes parsed at a time; at least one page fits, so that each step makes progress."""


def encode(
    pages: Pages,
    index: arrays.Index | None,
    reference: Pages,
    reference_index: arrays.Index | None,
    full: arrays.Flags | None,
    update: bool,
    out: arrays.Bytes,
) -> int:
    """Encode a batch; see `kernels` for the arguments."""
    return arrays.encode_spans(pages, index, reference, reference_index, full, update, out, _emit)


def _emit(new: Pages, old: Pages, whole: arrays.Flags, out: arrays.Bytes) -> int:
    words = new.view("<u4")
    changed = words != old.view("<u4")
    changed[whole] = False
    counts = np.count_nonzero(changed, axis=1)
    too_many = counts > MAX_DELTA_WORDS
    changed[too_many] = False
    counts[too_many] = 0
    full = whole | too_many

    where = np.flatnonzero(changed)
    heads = np.arange(len(new)) + np.cumsum(counts) - counts
    total = (len(new) + len(where)) * RECORD_BYTES
    full_pages = np.flatnonzero(full)
    if len(full_pages):
        records = np.empty(len(new) + len(where), dtype=_RECORD)
    else:
        records = out[:total].view(_RECORD)
    is_delta = np.ones(len(records), dtype=bool)
    is_delta[heads] = False
    records["offset"][heads] = np.where(full, FULL_PAGE, BEGIN_PAGE)
    records["value"][heads] = 0
    records["offset"][is_delta] = (where % PAGE_WORDS) * 4
    records["value"][is_delta] = words.reshape(-1)[where]
    if not len(full_pages):
        return total

    # Weave the full pages in. All sizes are even, so a mask over 16-bit units places the records between them.
    total += len(full_pages) * PAGE_SIZE
    bodies = heads[full_pages] * RECORD_BYTES + RECORD_BYTES + np.arange(len(full_pages)) * PAGE_SIZE
    arrays.windows(out[:total], PAGE_SIZE)[bodies] = new[full_pages]
    is_record = np.ones(total // 2, dtype=bool)
    arrays.windows(is_record, PAGE_SIZE // 2)[bodies // 2] = False
    out[:total].view("<u2")[is_record] = records.view("<u2")
    return total


def check(encoded: arrays.Bytes, n: int) -> int:
    """Refuse n pages that are malformed; see `kernels`."""
    return arrays.check_spans(_parse, encoded, n)


def apply(encoded: arrays.Bytes, pages: Pages, index: arrays.Index | None, checked: int | None = None) -> int:
    """Apply one encoded page to each page of the batch; see `kernels`."""
    return arrays.apply_spans(_parse, _scatter, encoded, pages, index, checked)


class _Span(NamedTuple):
    """Some whole pages, parsed and checked."""

    first_page: int
    pages: int
    heads: NDArray[np.int64]  # for each page, its first record
    offsets: NDArray[np.int16]  # for each record
    values: NDArray[np.uint32]
    full_pages: NDArray[np.int64]  # those of the pages that are full …
    bodies: NDArray[np.int64]  # … and the offset of their 4,096 in the encoded bytes
    end: int  # the first byte after them


def _scatter(span: _Span, part: slice, numbers: arrays.Index, encoded: arrays.Bytes, pages: Pages) -> None:
    first = span.heads[part.start]
    last = span.heads[part.stop] if part.stop < len(span.heads) else len(span.offsets)
    offsets = span.offsets[first:last]
    heads = span.heads[part] - first
    lengths = np.diff(heads, append=len(offsets))
    where = np.repeat(numbers[part] * PAGE_WORDS, lengths) + offsets // 4
    is_delta = offsets >= 0
    pages.reshape(-1).view("<u4")[where[is_delta]] = span.values[first:last][is_delta]
    here = (span.full_pages >= part.start) & (span.full_pages < part.stop)
    if here.any():
        rows = arrays.windows(encoded, PAGE_SIZE)
        pages[numbers[span.full_pages[here]]] = rows[span.bodies[here]]


def _parse(encoded: arrays.Bytes, n: int) -> Iterator[_Span]:
    """Walk n pages in spans of whole pages. Raises Malformed with the offset of the first bad record."""
    at = page = 0
    while page < n:
        window = encoded[at : at + _WINDOW_BYTES]
        span = _parse_window(window, at, page, n - page, at + len(window) == len(encoded))
        yield span
        at = span.end
        page += span.pages


def _parse_window(data: arrays.Bytes, base: int, first_page: int, n: int, is_end: bool) -> _Span:
    """Parse at most n whole pages at the front of `data`; `is_end` if nothing follows it."""
    markers = _full_markers(data)
    is_cut = len(markers) > 0 and bool(markers[-1] + FULL_PAGE_BYTES > len(data))
    # Take out the bodies of the full pages; what is left is records of six bytes. Of a cut page, only the record stays.
    usable = int(markers[-1]) + RECORD_BYTES if is_cut else len(data)
    units = data[: usable // 2 * 2].view("<u2")
    bodies = (markers[:-1] if is_cut else markers) + RECORD_BYTES
    if len(bodies):
        is_record = np.ones(len(units), dtype=bool)
        arrays.windows(is_record, PAGE_SIZE // 2)[bodies // 2] = False
        units = units[is_record]
    count = len(units) // 3
    records = units[: count * 3].reshape(count, 3)
    offsets = records[:, 0].view("<i2")
    values = np.ascontiguousarray(records[:, 1:]).view("<u4").reshape(-1)
    heads = np.flatnonzero((offsets == BEGIN_PAGE) | (offsets == FULL_PAGE))
    is_full = offsets[heads] == FULL_PAGE

    def place(record: int) -> int:
        return base + record * RECORD_BYTES + int(np.searchsorted(heads[is_full], record)) * PAGE_SIZE

    # A full page ends with its bytes, any other page where the next one opens or the data end.
    last_is_whole = not is_cut and (is_end or bool(is_full[-1:].any()))
    taken = max(min(len(heads) if last_is_whole else len(heads) - 1, n), 0)
    if taken < n and (is_end or not taken):
        _check_records(offsets, values, place)
        _refuse_end(base + len(data), place(count - 1 if is_cut else count), is_cut, first_page + taken, first_page + n)
    if is_full[taken - 1]:
        stop = int(heads[taken - 1]) + 1
    else:
        stop = int(heads[taken]) if taken < len(heads) else count
        if stop == count and is_end and place(count) < base + len(data):
            _check_records(offsets, values, place)
            _refuse_end(base + len(data), place(count), is_cut, first_page + taken, first_page + n)
    _check_records(offsets[:stop], values[:stop], place)
    return _Span(
        first_page,
        taken,
        heads[:taken],
        offsets[:stop],
        values[:stop],
        np.flatnonzero(is_full[:taken]),
        base + bodies[: np.count_nonzero(is_full[:taken])],
        place(stop),
    )


def _refuse_end(end: int, at: int, is_cut: bool, pages: int, wanted: int) -> NoReturn:
    """The data end at `end`; the incomplete part begins at `at`."""
    if is_cut:
        problem = f"a full page has {end - at - RECORD_BYTES} of its {PAGE_SIZE} bytes"
    elif at < end:
        problem = f"{end - at} bytes are left where a record takes {RECORD_BYTES}"
    else:
        raise Malformed(f"the data end after {pages} pages of {wanted}", offset=at, section="delta.md §4.2")
    raise Malformed(problem, offset=at, section="delta.md §4.1")


def _check_records(offsets: NDArray[np.int16], values: NDArray[np.uint32], place: Callable[[int], int]) -> None:
    if not len(offsets):
        return
    before = np.empty_like(offsets)
    before[0] = FULL_PAGE  # the first record must open a page, as after a full page
    before[1:] = offsets[:-1]
    is_marker = (offsets == BEGIN_PAGE) | (offsets == FULL_PAGE)
    bad = np.where(
        is_marker,
        values != 0,
        (offsets < 0) | (offsets > PAGE_SIZE - 4) | (offsets & 3 != 0) | (offsets <= before) | (before == FULL_PAGE),
    )
    if not bad.any():
        return
    at = int(bad.argmax())
    offset, previous = int(offsets[at]), int(before[at])
    if is_marker[at]:
        name = "BEGIN_PAGE" if offset == BEGIN_PAGE else "FULL_PAGE"
        problem, section = f"{name} with value {int(values[at]):#x} in place of 0", "§2.2"
    elif previous == FULL_PAGE:
        problem, section = f"a record with offset {offset} where a page must open", "§4.2"
    elif not 0 <= offset <= PAGE_SIZE - 4 or offset % 4:
        problem, section = f"offset {offset} is not a multiple of 4 in 0…{PAGE_SIZE - 4}", "§2.1"
    else:
        problem, section = f"offset {offset} does not lie behind the {previous} before it", "§2.1"
    raise Malformed(problem, offset=place(at), section=f"delta.md {section}")


def _full_markers(data: arrays.Bytes) -> NDArray[np.int64]:
    """Where the FULL_PAGE records begin, the last one perhaps cut off.

    Between full pages, records are six bytes apart, and a full page moves them by 4,102 bytes: so a marker is in one of
    three phases, and the marker after it is the first one of its phase at least 4,102 bytes on. This chain is followed
    by doubling, not page by page.
    """
    halves = arrays.unaligned(data[: max(len(data) - RECORD_BYTES + 2, 0)], "<i2")
    first_phase = np.flatnonzero(halves[0::RECORD_BYTES] == FULL_PAGE) * RECORD_BYTES
    if not len(first_phase):
        return first_phase
    phases = [first_phase]
    phases += [np.flatnonzero(halves[phase::RECORD_BYTES] == FULL_PAGE) * RECORD_BYTES + phase for phase in (2, 4)]
    starts = np.cumsum([0] + [len(phase) for phase in phases])
    candidates = np.concatenate(phases)
    end = len(candidates)
    following = np.full(end + 1, end, dtype=np.int64)
    for number, phase in enumerate(phases):
        target = (number * 2 + FULL_PAGE_BYTES) % RECORD_BYTES // 2
        found = np.searchsorted(phases[target], phase + FULL_PAGE_BYTES)
        inside = found < len(phases[target])
        following[starts[number] : starts[number + 1]] = np.where(inside, starts[target] + found, end)
    chain = np.zeros(1, dtype=np.int64)
    hop = following
    while True:
        more = hop[chain]
        more = more[more < end]
        if not len(more):
            return candidates[chain]
        chain = np.concatenate([chain, more])
        hop = hop[hop]


# The thread of June 2011 says 8,196.
CODING = Coding("delta", MAX_PAGE_BYTES, encode, check, apply, oracle.Delta(), page_buffer_pages=8_196)
