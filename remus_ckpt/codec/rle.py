"""The run-length codec of Xen 4.2 to 4.5, in numpy (specs/rle.md).

A page is the byte 00 (unchanged), the byte 80 and its 4,096 bytes (full), or runs that cover its 1,024 words: a marker
with the number of words, then the words themselves if they changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import arrays, oracle
from remus_ckpt.codec.coding import Coding
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, PAGE_WORDS, Pages

UNCHANGED = 0x00
FULL_PAGE = 0x80
SKIP = 0x80
MAX_RUN_WORDS = 127
MAX_PAGE_BYTES = PAGE_SIZE + -(-PAGE_WORDS // MAX_RUN_WORDS)
"""4,105, when all words changed. A skipped word saves four bytes and adds at most two markers."""

_SPAN_PAGES = 8192
# For each marker: the bytes from it to the next one, and the words that it covers. The two forms of a whole page cover
# 1,024, so that one sum finds every border (specs/rle.md §4.1).
_STEP = [1 + 4 * marker if marker < SKIP else 1 for marker in range(256)]
_COVERS = [marker & MAX_RUN_WORDS for marker in range(256)]
_STEP[UNCHANGED], _COVERS[UNCHANGED] = 1, PAGE_WORDS
_STEP[FULL_PAGE], _COVERS[FULL_PAGE] = 1 + PAGE_SIZE, PAGE_WORDS
_STEPS, _COVERED = np.array(_STEP), np.array(_COVERS)


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
    # Treat a full page as unchanged at first: both are one marker.
    changed[whole] = False
    is_edge = np.ones_like(changed)
    np.not_equal(changed[:, 1:], changed[:, :-1], out=is_edge[:, 1:])
    runs = np.flatnonzero(is_edge)
    lengths = np.diff(runs, append=changed.size)
    kinds = changed.reshape(-1)[runs]
    page = runs // PAGE_WORDS
    same = (lengths == PAGE_WORDS) & ~kinds
    # Cut the runs at 127 words; a page that is one skip, unchanged or full, is one piece.
    pieces_each = np.where(same, 1, -(-lengths // MAX_RUN_WORDS))
    run_of = np.repeat(np.arange(len(runs)), pieces_each)
    place = arrays.within(pieces_each)
    size = np.minimum(lengths[run_of] - place * MAX_RUN_WORDS, MAX_RUN_WORDS)
    copies = kinds[run_of]
    is_full = whole[page[run_of]]
    encoded_sizes = 1 + np.where(copies, size * 4, 0) + np.where(is_full, PAGE_SIZE, 0)
    ends = np.cumsum(encoded_sizes)
    starts = ends - encoded_sizes
    total = int(ends[-1])

    markers = np.where(copies, size, size | SKIP)
    markers[same[run_of]] = UNCHANGED
    markers[is_full] = FULL_PAGE
    out[starts] = markers
    copied = np.flatnonzero(copies)
    targets = np.repeat(starts[copied] + 1, size[copied]) + arrays.within(size[copied]) * 4
    arrays.unaligned(out[:total], "<u4")[targets] = words.reshape(-1)[changed.reshape(-1)]
    if is_full.any():
        arrays.windows(out[:total], PAGE_SIZE)[starts[is_full] + 1] = new[whole]
    return total


def check(encoded: arrays.Bytes, n: int) -> int:
    """Refuse n pages that are malformed; see `kernels`."""
    return arrays.check_spans(_parse, encoded, n)


def apply(encoded: arrays.Bytes, pages: Pages, index: arrays.Index | None, checked: int | None = None) -> int:
    """Apply one encoded page to each page of the batch; see `kernels`."""
    return arrays.apply_spans(_parse, _scatter, encoded, pages, index, checked)


class _Span(NamedTuple):
    """The markers of some whole pages, parsed and checked."""

    first_page: int
    pages: int
    places: NDArray[np.int64]  # the offset of each marker in the encoded bytes
    markers: NDArray[np.uint8]
    page_of: NDArray[np.int64]  # the page of each marker, counted from first_page …
    word: NDArray[np.int64]  # … and the word of that page at which it begins
    end: int


def _scatter(span: _Span, part: slice, numbers: arrays.Index, encoded: arrays.Bytes, pages: Pages) -> None:
    here = slice(*np.searchsorted(span.page_of, [part.start, part.stop]))
    marker, page, places = span.markers[here], numbers[span.page_of[here]], span.places[here]
    copies = (marker > 0) & (marker < SKIP)
    lengths = marker[copies].astype(np.int64)
    inside = arrays.within(lengths)
    to = np.repeat(page[copies] * PAGE_WORDS + span.word[here][copies], lengths) + inside
    source = arrays.unaligned(encoded, "<u4")
    pages.reshape(-1).view("<u4")[to] = source[np.repeat(places[copies] + 1, lengths) + inside * 4]
    full = marker == FULL_PAGE
    if full.any():
        pages[page[full]] = arrays.windows(encoded, PAGE_SIZE)[places[full] + 1]


def _parse(encoded: arrays.Bytes, n: int) -> Iterator[_Span]:
    """Walk n pages in spans of whole pages. Raises Malformed with the offset of the first bad marker."""
    data = memoryview(encoded)
    at = page = 0
    while page < n:
        take = min(n - page, _SPAN_PAGES)
        span = _parse_span(encoded, data, at, page, take)
        yield span
        at = span.end
        page += take


def _parse_span(encoded: arrays.Bytes, data: memoryview, at: int, first_page: int, n: int) -> _Span:
    # Each marker says where the next one is, so they are followed one by one; the rest is done on arrays.
    size, words, target = len(data), 0, n * PAGE_WORDS
    found: list[int] = []
    while words < target and at < size:
        found.append(at)
        marker = data[at]
        words += _COVERS[marker]
        at += _STEP[marker]
    places = np.array(found, dtype=np.int64)
    markers = encoded[places]
    covered = _COVERED[markers]
    ends = np.cumsum(covered)
    begins = ends - covered
    page_of = begins // PAGE_WORDS
    word = begins % PAGE_WORDS
    bad = word + covered > PAGE_WORDS
    if bad.any():
        first = int(bad.argmax())
        value, reached = int(markers[first]), int(word[first])
        if value in (UNCHANGED, FULL_PAGE):
            problem, section = f"the run {value:#04x} covers no words, after {reached} words of a page", "§2.2"
        else:
            problem = f"a run of {int(covered[first])} words goes past the page, after {reached} of {PAGE_WORDS}"
            section = "§4.2"
        raise Malformed(problem, offset=int(places[first]), section=f"rle.md {section}")
    if at > size:
        raise Malformed(
            f"a run needs {at - found[-1]} bytes and {size - found[-1]} are left",
            offset=found[-1],
            section="rle.md §4.3",
        )
    if words < target:
        done, rest = divmod(words, PAGE_WORDS)
        raise Malformed(
            f"the data end after {first_page + done} pages and {rest} words of {first_page + n} pages",
            offset=at,
            section="rle.md §4.3",
        )
    return _Span(first_page, n, places, markers, page_of, word, at)


# As Xen shipped it.
CODING = Coding("rle", MAX_PAGE_BYTES, encode, check, apply, oracle.Rle(), page_buffer_pages=8_192)
