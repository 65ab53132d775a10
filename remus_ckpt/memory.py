"""Memory as an array: fresh, reused, written to an image file, hashed, compared."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import appearing, naming_file, write_all
from remus_ckpt.limits import MIB
from remus_ckpt.pages import PAGE_SIZE, Pages

_CHUNK_PAGES = 4096
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)
_HUGE_BYTES = 2 << 20
_libc = ctypes.CDLL(None)
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 32 * MIB), "M_TRIM_THRESHOLD": (-1, 192 * MIB), "M_ARENA_MAX": (-8, 1)}
"""Source: mallopt(3). 32 MiB is the most that the first may be."""


def zeros(pages: int) -> Pages:
    """Fresh memory, uint8[pages, 4096]: a page takes memory when it is first written.

    Raises OSError if this process may not have that much address space.
    """
    size = pages * PAGE_SIZE
    slack = _HUGE_BYTES if size >= _HUGE_BYTES else 0
    try:
        area = mmap.mmap(-1, size + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"memory of {size:,} bytes") from error
    whole = np.frombuffer(area, dtype=np.uint8)
    start = -whole.ctypes.data % slack if slack else 0
    return whole[start : start + size].reshape(pages, PAGE_SIZE)


def keep_freed() -> None:
    """Make this process reuse freed memory, in pieces of up to 32 MiB, instead of fresh memory, where the kernel clears
    each page on first use and a copy takes four times as long. For a process that moves many megabytes a second; up to
    192 MiB stay with it."""
    if (mallopt := getattr(_libc, "mallopt", None)) is not None:  # musl has none
        for option, value in _MALLOPT.values():
            mallopt(option, value)


def expect(memory: Pages, pfns: NDArray[np.int64]) -> None:
    """Prepare for writes to these pages of fresh memory: if they are contiguous, ask for huge pages.

    Fresh memory costs a fault per page, which takes longer than filling it. Scattered pages are left alone: a written
    page must not take the memory of 512.
    """
    if len(pfns) * PAGE_SIZE < _HUGE_BYTES:
        return
    first, pages = int(pfns[0]), int(pfns[-1]) - int(pfns[0]) + 1
    if len(pfns) <= pages <= len(pfns) * 5 // 4:
        _madvise(memory.ctypes.data + first * PAGE_SIZE, pages * PAGE_SIZE, _MADV_HUGEPAGE)


def save_image(memory: Pages, path: str | Path, size: int | None = None) -> None:
    """Write pages to a file of mode 0600, zero pages as holes. The file appears once it is complete and durable.

    size: bytes to write, if memory ends within its last page
    """
    size = memory.nbytes if size is None else size
    target = Path(path)
    if target.exists() and not target.is_file():
        # Write to a device or a pipe; do not replace it.
        with naming_file(target), open(target, "wb") as device:
            for start, chunk in _chunks(memory):
                device.write(chunk.reshape(-1)[: size - start * PAGE_SIZE].data)
        return
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(target.parent))
    with appearing(target) as descriptor, open(descriptor, "wb", buffering=0, closefd=False) as file:
        file.truncate(size)
        for start, chunk in _chunks(memory):
            used = chunk.view(np.uint64).any(axis=1)
            edges = np.flatnonzero(np.diff(used, prepend=False, append=False))
            for first, stop in edges.reshape(-1, 2).tolist():
                file.seek((start + first) * PAGE_SIZE)
                write_all(descriptor, [chunk[first:stop].reshape(-1)[: size - (start + first) * PAGE_SIZE]])


def memory_sha256(memory: NDArray[np.uint8]) -> str:
    """SHA-256 of memory, as pages or as an image, in hex."""
    digest = hashlib.sha256()
    flat = memory.reshape(-1)
    for start in range(0, len(flat), _CHUNK_PAGES * PAGE_SIZE):
        digest.update(flat[start : start + _CHUNK_PAGES * PAGE_SIZE].data)
    return digest.hexdigest()


def differing_ranges(numbers: NDArray[np.int64], before: Pages, after: Pages) -> Iterator[tuple[int, int]]:
    """The byte ranges (first, stop) in which pages differ, ascending.

    numbers: int64[n], ascending: the numbers of these pages in memory
    before, after: uint8[n, 4096]
    A difference across a page's border comes as two ranges that meet: see `joined`.
    """
    for start in range(0, len(numbers), _CHUNK_PAGES):
        differ = before[start : start + _CHUNK_PAGES] != after[start : start + _CHUNK_PAGES]
        for number, flags in zip(numbers[start : start + _CHUNK_PAGES].tolist(), differ, strict=True):
            edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)) + number * PAGE_SIZE
            yield from map(tuple, edges.reshape(-1, 2).tolist())


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending ranges (first, stop), with those that meet joined into one."""
    last: tuple[int, int] | None = None
    for first, stop in ranges:
        if last is not None and last[1] == first:
            last = (last[0], stop)
            continue
        if last is not None:
            yield last
        last = (first, stop)
    if last is not None:
        yield last


def _chunks(memory: Pages) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for start in range(0, len(memory), _CHUNK_PAGES):
        yield start, memory[start : start + _CHUNK_PAGES]
