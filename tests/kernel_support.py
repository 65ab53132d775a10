"""Pages, page pairs and buffers for the tests of the kernels."""

from __future__ import annotations

import ctypes
import lzma
import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from remus_ckpt.pages import PAGE_SIZE, Pages

SHARED = Path(__file__).resolve().parents[2] / "shared"
CORPORA = ("numpy", "pyheap", "redis")

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A writable copy of `data` with a page behind it, and one before, that fault when they are touched.

    It ends exactly where the page behind begins; whole pages also begin where the one before ends.
    """
    source = np.frombuffer(data, dtype=np.uint8)
    size = -(-len(source) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + 2 * mmap.PAGESIZE), dtype=np.uint8)
    for at in (0, mmap.PAGESIZE + size):
        if _libc.mprotect(ctypes.c_void_p(memory.ctypes.data + at), mmap.PAGESIZE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    end = mmap.PAGESIZE + size
    copy = memory[end - len(source) : end]
    copy[:] = source
    return copy


def guarded_pages(pages: Pages) -> Pages:
    return guarded(pages.tobytes()).reshape(-1, PAGE_SIZE)


def shared(*parts: str) -> Path:
    """A file of the shared test data; the test is skipped without it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} in {SHARED}: the directory `shared` is expected beside the repository")
    return path


def vector_pages(name: str) -> bytes:
    """One file of the page vectors, such as "old" or "rle"."""
    return lzma.decompress(shared("vectors", "pages", f"pages.{name}.xz").read_bytes())


def corpus(name: str) -> tuple[Pages, Pages]:
    """The pages of a real process before and after: see the README beside the corpora."""
    zstandard = pytest.importorskip("zstandard")
    with shared("corpora", f"{name}.pgpair.zst").open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    (n,) = struct.unpack_from("<Q", data, 8)
    pages = np.frombuffer(data, dtype=np.uint8, offset=16 + 8 * n).reshape(2, n, PAGE_SIZE)
    return pages[0], pages[1]


def changed(*runs: tuple[int, int]) -> tuple[Pages, Pages]:
    """A page before and after, in which the bytes of each run (start, length) changed."""
    old = np.arange(PAGE_SIZE, dtype=np.uint32).view(np.uint8)[:PAGE_SIZE].copy()
    new = old.copy()
    for start, length in runs:
        new[start : start + length] ^= 0xA5
    return old, new


def _every(step: int, count: int, length: int = 4) -> tuple[tuple[int, int], ...]:
    return tuple((i * step, length) for i in range(count))


EDGES = {
    "all equal": (),
    "all different": ((0, 4096),),
    "first word": ((0, 4),),
    "last word": ((4092, 4),),
    "first byte": ((0, 1),),
    "last byte": ((4095, 1),),
    "first and last byte": ((0, 1), (4095, 1)),
    "all but the first byte": ((1, 4095),),
    "all but the last byte": ((0, 4095),),
    **{f"{words} words": ((400, 4 * words),) for words in (1, 63, 64, 65, 126, 127, 128, 129, 253, 254, 255)},
    **{f"{words} words at the end": ((4096 - 4 * words, 4 * words),) for words in (126, 127, 128, 129, 254, 1023)},
    **{f"a gap of {gap} words": ((0, 4), (4 + 4 * gap, 4)) for gap in (126, 127, 128, 129, 253, 254, 255, 381, 1016)},
    **{f"{n} bytes across 64": ((start, n),) for start in (0, 1, 62, 63, 64, 65) for n in (1, 2, 63, 64, 65, 127, 128)},
    **{f"a gap of {gap} bytes": ((60, 4), (64 + gap, 4)) for gap in (1, 2, 3, 63, 64, 65, 127, 128, 129, 3000)},
    "a gap of one byte on each side of 64": ((60, 3), (64, 1), (66, 1)),
    "every other byte": _every(2, 2048, 1),
    "every other byte but the first": tuple((i * 2 + 1, 1) for i in range(2048)),
    "two bytes of three": _every(3, 1365, 2),
    "every other word": _every(8, 512),
    "delta: the most words": _every(4, 682),
    "delta: one word too many": _every(4, 683),
    "delta: the most words, at the end": tuple((4096 - 4 - 4 * i, 4) for i in range(682)),
    "delta: one too many, at the end": tuple((4096 - 4 - 4 * i, 4) for i in range(683)),
    "rle: the longest page": ((0, 4096),),
    "rle: all but one word": ((0, 2000), (2004, 2092)),
    "xbzrle: 4,096 bytes": ((3, 4093),),
    "xbzrle: 4,097 bytes": ((2, 4094),),
    "xbzrle: 4,094 bytes and a gap": ((0, 4091),),
    "xbzrle: 4,095 bytes and a gap": ((0, 4092),),
    "xbzrle: 4,096 bytes and a gap": ((0, 4093),),
    "xbzrle: two bytes a run, to the end": tuple((1 + i * 3, 2) for i in range(1365)),
    "xbzrle: overflows in the last gap": (*((i * 4, 2) for i in range(1023)), (4092, 3)),
}
"""Name → the runs of bytes that changed."""

_STARTS = st.one_of(st.sampled_from([0, 1, 3, 4, 62, 63, 64, 65, 127, 128, 4031, 4032, 4092, 4095]),
                    st.integers(0, PAGE_SIZE - 1))  # fmt: skip
_LENGTHS = st.one_of(
    st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, *(4 * w for w in (126, 127, 128, 129)), 4096]),
    st.integers(1, 64),
)


@st.composite
def page_pairs(draw: st.DrawFn) -> tuple[Pages, Pages]:
    """uint8[n, 4096] before and after: no runs, few of them, or a pattern over much of the page."""
    count = draw(st.integers(1, 4))
    old = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 256, (count, PAGE_SIZE), dtype=np.uint8)
    new = old.copy()
    for page in new:
        if draw(st.booleans()):
            for start, length in draw(st.lists(st.tuples(_STARTS, _LENGTHS), max_size=12)):
                page[start : start + length] ^= draw(st.integers(1, 255))
        else:
            random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
            unit = draw(st.sampled_from([1, 4]))
            share = draw(st.sampled_from([0.002, 0.02, 0.1, 0.3, 0.5, 0.66, 0.67, 0.8, 0.99, 1.0]))
            flips = np.repeat(random.random(PAGE_SIZE // unit) < share, unit)
            page[flips] ^= random.integers(1, 256, int(flips.sum()), dtype=np.uint8)
    return old, new
