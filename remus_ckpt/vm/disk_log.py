"""What a guest writes to a disk, in order, as bytes (specs/disk.md §3). No I/O, no clock.

A position is the number of log bytes since the log began. It is always between two writes.
"""

from __future__ import annotations

import struct
import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from remus_ckpt.errors import Malformed
from remus_ckpt.limits import MIB
from remus_ckpt.pages import Buffer

ENTRY = struct.Struct("<QII")
_DATA, _ZEROES = 0, 1
MAX_WRITE_BYTES = 32 * MIB
SECTOR = 512
_SECTION = "disk.md §3"


class Write(NamedTuple):
    """One write. data: None for zeroes"""

    offset: int
    length: int
    data: memoryview | None


def pack_write(offset: int, length: int, data: Buffer | None) -> bytes:
    """The bytes of one write; of zeroes if there are no data."""
    return _head(offset, length, data) + (b"" if data is None else bytes(data))


def _head(offset: int, length: int, data: Buffer | None) -> bytes:
    return ENTRY.pack(offset, length, _ZEROES if data is None else _DATA)


def writes(log: Buffer, disk_bytes: int) -> Iterator[Write]:
    """The writes of a log that came from outside. Raises Malformed for one that is not whole, or not on the disk."""
    view, at = memoryview(log).cast("B"), 0
    while at < len(view):
        if len(view) - at < ENTRY.size:
            raise Malformed(f"{len(view) - at} bytes hold no write", offset=at, section=_SECTION)
        offset, length, kind = ENTRY.unpack_from(view, at)
        if kind not in (_DATA, _ZEROES) or not length or offset % SECTOR or length % SECTOR:
            raise Malformed(f"{length} bytes of kind {kind} at {offset} are no write", offset=at, section=_SECTION)
        if offset + length > disk_bytes:
            raise Malformed(f"{length} bytes at {offset} of a disk of {disk_bytes} bytes", offset=at, section=_SECTION)
        at += ENTRY.size
        data = None
        if kind == _DATA:
            if length > len(view) - at:
                raise Malformed(f"{len(view) - at} bytes are left of {length}", offset=at, section=_SECTION)
            data = view[at : at + length]
            at += length
        yield Write(offset, length, data)


class WriteLog:
    """The writes that may still be requested. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all
        self._writes: list[tuple[Buffer, ...]] = []
        self._starts: list[int] = []
        self._end = 0

    @property
    def end(self) -> int:
        """The position after the newest write."""
        return self._end

    @property
    def held_bytes(self) -> int:
        """Bytes of the writes that are not forgotten."""
        with self._lock:
            return self._end - self._starts[0] if self._starts else 0

    def append(self, offset: int, length: int, data: Buffer | None) -> None:
        """Add a write; of zeroes if there are no data. They are kept, not copied, and must not change any more."""
        head = _head(offset, length, data)
        with self._lock:
            self._writes.append((head,) if data is None else (head, data))
            self._starts.append(self._end)
            self._end += len(head) + (0 if data is None else len(data))

    def read(self, start: int, stop: int) -> list[Buffer]:
        """What was written between two positions. Raises ValueError if some of it is forgotten."""
        with self._lock:
            first, last = bisect_left(self._starts, start), bisect_left(self._starts, stop)
            found = [piece for write in self._writes[first:last] for piece in write]
        if sum(map(len, found)) != stop - start:
            raise ValueError(f"the log does not hold what was written between {start} and {stop}")
        return found

    def forget(self, before: int) -> None:
        """Forget writes before this position: they will not be requested."""
        with self._lock:
            count = bisect_left(self._starts, before)
            del self._writes[:count], self._starts[:count]
