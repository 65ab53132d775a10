"""What a segment holds where no data has been written yet: marks, one for each sector (specs/store.md §4.4).

A mark holds the offset of its sector, so it is neither data nor a part of another file. A sector with its mark was
never written. That shows where the data ends, even after a loss of power that kept only some of the last bytes.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
"""The smallest unit that a disk writes as a whole."""
MARK = b"remus_ckpt: no data yet\n"
_WORDS = len(MARK) // 8 + 1
"""Words of 8 bytes in a mark with the offset of its sector."""
_LEAST_REST = 16
"""The rest of a sector must have this many bytes to say that it was never written: fewer may be data by chance."""
_FIRST_BLOCK_BYTES = 4 << 10
_BLOCK_BYTES = 256 << 10


def marks(start: int, size: int) -> NDArray[np.uint8]:
    """The bytes from `start` on of a file in which nothing has been written; both are multiples of SECTOR."""
    found = np.empty((size // SECTOR, SECTOR // (8 * _WORDS), _WORDS), dtype="<u8")
    found[:, :, :-1] = np.frombuffer(MARK, dtype="<u8")
    found[:, :, -1] = np.arange(start, start + size, SECTOR, dtype="<u8")[:, None]
    return found.reshape(-1).view(np.uint8)


def data_end(fd: int, start: int, size: int) -> int:
    """The first byte, from `start` on, that was never written; if there is none, the end. Raises OSError.

    start: the end of the last whole checkpoint; size: of the file
    A file system may also record that a file has grown, with zeros there: if nothing else precedes the first mark, or
    the end, nothing was written either.
    """
    at = start - start % SECTOR
    block_bytes, is_all_zeros = _FIRST_BLOCK_BYTES, True
    while at < size:
        block = np.frombuffer(os.pread(fd, min(block_bytes, size - at), at), dtype=np.uint8)
        if not len(block):
            break
        whole = len(block) - len(block) % SECTOR
        equal = (block[:whole] == marks(at, whole)).reshape(-1, SECTOR)
        unwritten = equal.all(axis=1)
        skip = max(start - at, 0)
        if skip and whole:
            unwritten[0] = SECTOR - skip >= _LEAST_REST and equal[0, skip:].all()
        if unwritten.any():
            first = at + int(unwritten.argmax()) * SECTOR
            if first <= start or (is_all_zeros and not block[skip : first - at].any()):
                return start
            return _in_sector_before(fd, start, first)
        is_all_zeros = is_all_zeros and not block[skip:].any()
        at += len(block)
        block_bytes = _BLOCK_BYTES
    return start if is_all_zeros else at  # it may have been cut since


def _in_sector_before(fd: int, start: int, first: int) -> int:
    """The same, where `first` is the first sector that was never written as a whole."""
    begin = first - SECTOR
    sector = np.frombuffer(os.pread(fd, SECTOR, begin), dtype=np.uint8)
    written = np.flatnonzero(sector != marks(begin, SECTOR)[: len(sector)])  # it may have been cut since
    return max(start, begin + int(written[-1]) + 1 if len(written) else begin)
