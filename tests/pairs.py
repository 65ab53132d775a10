"""Page pairs that sit on the edges of the codecs, and page pairs at random."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from remus_ckpt.pages import PAGE_SIZE, PAGE_WORDS, Pages

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""(old, new)"""


def noise(seed: int, pages: int = 1) -> Pages:
    """Pages of random bytes, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (pages, PAGE_SIZE), dtype=np.uint8)


def changed_bytes(old: NDArray[np.uint8], *ranges: tuple[int, int]) -> NDArray[np.uint8]:
    """The page with the bytes first…stop inverted, so that each of them differs."""
    new = old.copy()
    for first, stop in ranges:
        new[first:stop] ^= 0xFF
    return new


def changed_words(old: NDArray[np.uint8], *ranges: tuple[int, int]) -> NDArray[np.uint8]:
    """The page with one byte of each of the words first…stop inverted."""
    new = old.copy()
    for first, stop in ranges:
        new[4 * first : 4 * stop : 4] ^= 0xFF
    return new


def scattered_words(old: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.uint8]:
    """The page with `count` words changed, wherever they are."""
    words = np.random.default_rng(seed).choice(PAGE_WORDS, count, replace=False)
    new = old.copy()
    new.reshape(PAGE_WORDS, 4)[words, np.random.default_rng(seed).integers(0, 4, count)] ^= 0xFF
    return new


def edges() -> dict[str, Pair]:
    """Every edge that a word or a byte codec has, by name."""
    base = noise(1)[0]
    blank = np.zeros(PAGE_SIZE, dtype=np.uint8)
    pairs: dict[str, Pair] = {
        "nothing changed": (base, base.copy()),
        "zeros, unchanged": (blank, blank.copy()),
        "everything changed": (base, changed_bytes(base, (0, PAGE_SIZE))),
        "every word changed": (base, changed_words(base, (0, PAGE_WORDS))),
        "zeros to noise": (blank, base),
        "noise to zeros": (base, blank),
        "every other word": (base, changed_words(base, *((i, i + 1) for i in range(0, PAGE_WORDS, 2)))),
        "every other word, the odd": (base, changed_words(base, *((i, i + 1) for i in range(1, PAGE_WORDS, 2)))),
        "every other byte": (base, changed_bytes(base, *((i, i + 1) for i in range(0, PAGE_SIZE, 2)))),
        "every third byte": (base, changed_bytes(base, *((i, i + 1) for i in range(0, PAGE_SIZE, 3)))),
        "two bytes of three": (base, changed_bytes(base, *((i, i + 2) for i in range(0, PAGE_SIZE - 1, 3)))),
        "127 words and one gap": (base, changed_words(base, *((i, i + 127) for i in range(0, PAGE_WORDS, 128)))),
        "one word and 127 of gap": (base, changed_words(base, *((i, i + 1) for i in range(0, PAGE_WORDS, 128)))),
    }
    for place, offset in (("first", 0), ("second", 1), ("third", 2), ("last but one", 4094), ("last", 4095)):
        pairs[f"{place} byte"] = (base, changed_bytes(base, (offset, offset + 1)))
        pairs[f"all but the {place} byte"] = (base, changed_bytes(base, (0, offset), (offset + 1, PAGE_SIZE)))
    for count in (1, 2, 126, 127, 128, 129, 253, 254, 255, 256, 508, 1016, 1017, 1023):
        for place, first in (("start", 0), ("middle", (PAGE_WORDS - count) // 2), ("end", PAGE_WORDS - count)):
            run = (first, first + count)
            pairs[f"{count} words at the {place}"] = (base, changed_words(base, run))
            pairs[f"all but {count} words at the {place}"] = (
                base,
                changed_words(base, (0, run[0]), (run[1], PAGE_WORDS)),
            )
    for count in (680, 681, 682, 683, 684):
        pairs[f"{count} words in a row"] = (base, changed_words(base, (100, 100 + count)))
        pairs[f"{count} words scattered"] = (base, scattered_words(base, count, count))
    # One run of bytes: 1 or 2 bytes for the gap, 1 or 2 for its length, and room for two more behind it.
    for length in (1, 2, 127, 128, 129, 255, 256):
        for first in (0, 1, 127, 128, 129, PAGE_SIZE - length):
            pairs[f"{length} bytes at {first}"] = (base, changed_bytes(base, (first, first + length)))
    for first in range(6):
        for stop in range(4088, 4097):
            pairs[f"bytes {first} to {stop}"] = (base, changed_bytes(base, (first, stop)))
    # Runs and gaps that fill the 4,096 bytes exactly: a gap of two saves nothing, one of three saves one byte.
    for gaps in range(8):
        for stop in range(4090, 4097):
            spans = [(32 * i, 32 * i + 29) for i in range(gaps)]
            pairs[f"{gaps} gaps of 3, to {stop}"] = (base, changed_bytes(base, *spans, (32 * gaps, stop)))
    for length in (62, 63, 64, 126, 127, 128):
        pairs[f"{length} bytes, a gap of one, {length} bytes"] = (
            base,
            changed_bytes(base, (10, 10 + length), (11 + length, 11 + 2 * length)),
        )
    return pairs


def stacked(pairs: list[Pair]) -> tuple[Pages, Pages]:
    """(old pages, new pages)"""
    return np.stack([old for old, _ in pairs]), np.stack([new for _, new in pairs])


@st.composite
def page_pairs(draw: st.DrawFn) -> Pair:
    """A pair that differs in runs of words, runs of bytes and scattered words, or in nothing or everything."""
    old = draw(st.sampled_from([np.zeros(PAGE_SIZE, dtype=np.uint8), noise(2)[0], noise(3)[0] & 1]))
    kind = draw(st.sampled_from(["runs", "runs", "runs", "scattered", "bytes", "same", "all"]))
    if kind == "same":
        return old, old.copy()
    if kind == "all":
        return old, changed_bytes(old, (0, PAGE_SIZE))
    if kind == "scattered":
        return old, scattered_words(old, draw(st.integers(1, PAGE_WORDS)), draw(st.integers(0, 99)))
    border, change = (PAGE_WORDS, changed_words) if kind == "runs" else (PAGE_SIZE, changed_bytes)
    # Ranges that overlap take each other back, which makes more borders.
    runs = draw(
        st.lists(
            st.tuples(
                st.integers(0, border) | st.sampled_from([0, border - 1]),
                st.sampled_from([1, 2, 3, 126, 127, 128, 129, 600]) | st.integers(1, border),
            ),
            min_size=1,
            max_size=8,
        )
    )
    return old, change(old, *((first, min(first + length, border)) for first, length in runs))
