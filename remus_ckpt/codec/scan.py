"""The passes over memory around the codecs: find the dirty or the filled pages, gather them, scatter them back.

Like the codecs, they run in the kernel that `kernels` chooses; the code here is numpy's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import kernels
from remus_ckpt.pages import PAGE_SIZE, Pages

_CHUNK_PAGES = 64
"""Pages compared at a time: the result of a chunk fits the first-level cache."""


def dirty_pages(memory: Pages, shadow: Pages, *, kernel: str | None = None) -> NDArray[np.int64]:
    """The numbers of the pages that differ, ascending.

    memory, shadow: uint8[n, 4096], C-contiguous; `memory` may be read-only, and may be written meanwhile
    kernel: require one of `kernels.KERNELS`, as for a codec
    """
    if memory.shape != shadow.shape or memory.shape[1:] != (PAGE_SIZE,):
        raise ValueError(f"memory {memory.shape} and shadow {shadow.shape} must both be [n, {PAGE_SIZE}]")
    native = kernels.choose_scan(kernel)
    if native:
        pages = np.empty(len(memory), dtype=np.int64)
        return pages[: native.dirty(memory, shadow, pages)].copy()
    words, shadow_words = memory.view(np.uint64), shadow.view(np.uint64)
    differ = np.empty((_CHUNK_PAGES, PAGE_SIZE // 8), dtype=bool)
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(memory), _CHUNK_PAGES):
        chunk = words[start : start + _CHUNK_PAGES]
        flags = np.not_equal(chunk, shadow_words[start : start + _CHUNK_PAGES], out=differ[: len(chunk)])
        # Test eight flags at a time.
        pages = np.flatnonzero(flags.view(np.uint64).any(axis=1))
        if len(pages):
            found.append(pages + start)
    return np.concatenate(found)


def filled_pages(pages: Pages, *, kernel: str | None = None) -> NDArray[np.int64]:
    """The numbers of the pages that are not zeros, ascending.

    pages: uint8[n, 4096], C-contiguous
    kernel: require one of `kernels.KERNELS`, as for a codec
    """
    native = kernels.choose_scan(kernel)
    if native:
        found = np.empty(len(pages), dtype=np.int64)
        return found[: native.filled(pages, found)].copy()
    return np.flatnonzero(pages.view(np.uint64).any(axis=1))


def gather(memory: Pages, index: NDArray[np.int64], out: Pages | None = None, *, kernel: str | None = None) -> Pages:
    """Copy scattered pages into one buffer.

    memory: uint8[n, 4096]
    index: int64[m], numbers of pages
    out: uint8[≥ m, 4096] to copy into
    Returns uint8[m, 4096].
    """
    target = np.empty((len(index), PAGE_SIZE), dtype=np.uint8) if out is None else out[: len(index)]
    native = kernels.choose_scan(kernel)
    if native and memory.flags.c_contiguous and target.flags.c_contiguous:
        native.gather(memory, np.ascontiguousarray(index, dtype=np.int64), target)
        return target
    # In its default mode, take() buffers its output; so the numbers are checked here instead.
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(memory):
        raise ValueError(f"index must lie in 0…{len(memory) - 1}")
    return memory.take(index, axis=0, out=target, mode="clip")


def scatter(pages: Pages, memory: Pages, index: NDArray[np.int64], *, kernel: str | None = None) -> None:
    """Copy a buffer of pages to their places; if a place is listed twice, the later page counts.

    pages: uint8[m, 4096]
    memory: uint8[n, 4096], writable
    index: int64[m], numbers of pages
    """
    native = kernels.choose_scan(kernel)
    if native and memory.flags.c_contiguous and pages.flags.c_contiguous:
        native.scatter(memory, np.ascontiguousarray(index, dtype=np.int64), pages)
    else:
        memory[index] = pages
