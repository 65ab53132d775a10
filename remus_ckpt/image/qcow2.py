"""Internal snapshots of a qcow2 disk image, and the machine state in each of them (specs/formats.md §4).

Only what leads to that state is read: the snapshot table, and the tables of the snapshot that is asked for.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from remus_ckpt.disk import open_to_read
from remus_ckpt.errors import LimitExceeded, Malformed, NoCheckpoint, RemusError, UnknownFormat
from remus_ckpt.limits import Limits

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to the offset of the snapshots
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">2Q")  # size of the state, size of the disk
_MOST_EXTRA = 1024
_CLUSTER_BITS = range(9, 22)
_OFFSET = 0x00FFFFFFFFFFFE00
_IS_COMPRESSED = 1 << 62
_IS_ZERO = 1
_DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 4, 8, 16
"""Incompatible features that change where clusters are, or how they are compressed …"""
_COMPRESSION_AT = 104
"""… and where the number of that compression is: 0 for zlib, 1 for zstd."""
_WINDOW_BITS, _WINDOW_BYTES = -12, 1 << 22
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot.

    state_bytes: of the machine's state; 0 if only the disk was kept
    time_s, clock_ns: when it was taken, since 1970, and how long the guest had run by then
    """

    id: str
    name: str
    time_s: float
    clock_ns: int
    state_bytes: int
    disk_bytes: int
    l1_at: int
    l1_entries: int


class Qcow2:
    """An image file. Raises Malformed or UnknownFormat, and OSError."""

    def __init__(self, path: str | Path, limits: Limits) -> None:
        self.path = str(path)
        self._limits = limits
        self._fd = open_to_read(Path(path))
        try:
            self._size = os.fstat(self._fd).st_size
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> None:
        fields = _HEADER.unpack(self.read(0, _HEADER.size))
        magic, version, _, _, self.cluster_bits, disk_bytes, crypt, _, _, _, _, count, snapshots_at = fields
        if magic != MAGIC or version not in (2, 3):
            _unknown(f"this is not a qcow2 image of version 2 or 3 ({magic!r}, {version})", 0)
        if self.cluster_bits not in _CLUSTER_BITS:
            self.refuse(f"clusters of 2^{self.cluster_bits} bytes", 20)
        if crypt:
            _unknown("the image is encrypted, and so are its snapshots", 32)
        features = 0
        if version == 3:
            (features,) = _FEATURES.unpack(self.read(_FEATURES_AT, _FEATURES.size))
        if features & (_DATA_FILE | _EXTENDED_L2):
            _unknown("images with an external data file or with extended L2 entries are not read", _FEATURES_AT)
        self.compression = self.read(_COMPRESSION_AT, 1)[0] if features & _COMPRESSION else 0
        if self.compression > 1:
            _unknown(f"clusters compressed by the method {self.compression}; zlib and zstd are read", _COMPRESSION_AT)
        self._limit(count, "snapshots", 60, "the number of snapshots")
        self.snapshots = tuple(self._list(count, snapshots_at, disk_bytes))
        """In the order of the table."""

    def _list(self, count: int, at: int, disk_bytes: int) -> Iterator[Snapshot]:
        for _ in range(count):
            at = -(-at // 8) * 8
            start = at
            fields = _ENTRY.unpack(self.read(at, _ENTRY.size))
            l1_at, l1_entries, id_bytes, name_bytes, seconds, nanoseconds, clock, state, extra_bytes = fields
            if extra_bytes > _MOST_EXTRA:
                self.refuse(f"a snapshot with {extra_bytes} extra bytes", start)
            at += _ENTRY.size
            extra = self.read(at, extra_bytes)
            if len(extra) >= _EXTRA.size:
                state, disk = _EXTRA.unpack_from(extra)
            else:
                disk = disk_bytes
            at += extra_bytes
            texts = self.read(at, id_bytes + name_bytes)
            at += id_bytes + name_bytes
            self._limit(l1_entries * 8, "snapshot_table_bytes", start, "the length of a snapshot's L1 table")
            yield Snapshot(
                id=texts[:id_bytes].decode("utf-8", "replace"),
                name=texts[id_bytes:].decode("utf-8", "replace"),
                time_s=seconds + nanoseconds / 1e9,
                clock_ns=clock,
                state_bytes=state,
                disk_bytes=disk,
                l1_at=l1_at,
                l1_entries=l1_entries,
            )

    def find(self, wanted: str | None) -> Snapshot:
        """The snapshot of that name or id; None: the only one with a machine's state. Raises NoCheckpoint."""
        with_state = [one for one in self.snapshots if one.state_bytes]
        names = ", ".join(one.name for one in with_state) or "none"
        if wanted is None:
            if len(with_state) == 1:
                return with_state[0]
            raise NoCheckpoint(
                f"{self.path}: it has {len(with_state)} snapshots with a machine's state ({names}); choose one with "
                "--snapshot"
                if with_state
                else f"{self.path}: this disk image has no snapshot with a machine's state"
            )
        for found in (*(one for one in self.snapshots if one.name == wanted), *self.snapshots):
            if wanted in (found.name, found.id):
                if not found.state_bytes:
                    raise NoCheckpoint(f"{self.path}: the snapshot {wanted!r} holds only the disk, no machine's state")
                return found
        raise NoCheckpoint(f"{self.path}: no snapshot {wanted!r}; those with a machine's state: {names}")

    def state(self, snapshot: Snapshot) -> State:
        """The machine's state of a snapshot."""
        return State(self, snapshot)

    def read(self, at: int, size: int) -> bytes:
        """Bytes of the file. Raises Malformed if it ends before."""
        if at + size > self._size:
            self.refuse(f"the file ends at byte {self._size}; {size} bytes are wanted", at)
        data = b""
        while len(data) < size and (more := os.pread(self._fd, size - len(data), at + len(data))):
            data += more
        if len(data) < size:
            self.refuse("the file has shrunk", at)
        return data

    def cluster(self, entry: int) -> bytes:
        """A compressed cluster. Raises Malformed."""
        size = 1 << self.cluster_bits
        bits = 62 - (self.cluster_bits - 8)  # the offset's; above them, how many sectors more its bytes touch
        at = entry & ((1 << bits) - 1)
        sectors = ((entry & ~_IS_COMPRESSED) >> bits & ((1 << (62 - bits)) - 1)) + 1
        stop = min(at - at % _SECTOR_BYTES + sectors * _SECTOR_BYTES, self._size)
        data = self.read(at, max(stop - at, 1))
        try:
            if self.compression:
                out = _zstd(data, size)
            else:
                out = zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
        except zlib.error as error:
            self.refuse(f"a compressed cluster that cannot be read ({error})", at)
        if len(out) != size:
            self.refuse(f"a compressed cluster of {len(out)} bytes; {size} are wanted", at)
        return out

    def refuse(self, message: str, offset: int) -> NoReturn:
        """Raise Malformed."""
        raise Malformed(message, offset=offset, section="formats.md §4")

    def _limit(self, value: int, limit: str, offset: int, what: str) -> None:
        ceiling = getattr(self._limits, limit)
        if value > ceiling:
            raise LimitExceeded(
                f"{what} {value} exceeds the limit {limit} of {ceiling}",
                limit=limit,
                offset=offset,
                section="formats.md §4",
            )


class State:
    """The bytes of a machine's state, in order. They lie behind the disk, as if it were longer."""

    def __init__(self, image: Qcow2, snapshot: Snapshot) -> None:
        self._image = image
        self.size = snapshot.state_bytes
        self.at = 0
        self._bits = image.cluster_bits
        self._entry_bits = self._bits - 3  # an L2 table has as many entries as a cluster has words
        first = -(-snapshot.disk_bytes // (1 << (self._bits + self._entry_bits)))
        clusters = -(-self.size // (1 << self._bits))
        tables = -(-clusters // (1 << self._entry_bits))
        if first + tables > snapshot.l1_entries:
            image.refuse(
                f"the state of {snapshot.name!r} takes {tables} tables from number {first}, of {snapshot.l1_entries}",
                snapshot.l1_at,
            )
        self._l1_at = snapshot.l1_at + 8 * first
        self._l1 = image.read(self._l1_at, 8 * tables)
        self._table = -1, b""
        self._cluster = 0, b""

    def readinto(self, buffer: memoryview) -> int:
        """Read at least a byte; returns the number, 0 at the end."""
        if self.at >= self.size:
            return 0
        data = self._read(self.at, min(len(buffer), self.size - self.at))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def skip(self, size: int) -> int:
        """Pass over bytes; returns how many there were."""
        there = min(size, self.size - self.at)
        self.at += there
        return there

    def last(self, size: int) -> bytes:
        """The last bytes."""
        parts = []
        at = max(self.size - size, 0)
        while at < self.size:
            data = self._read(at, self.size - at)
            parts.append(data)
            at += len(data)
        return b"".join(parts)

    def _read(self, at: int, size: int) -> bytes:
        """Some bytes of one cluster, at least one."""
        cluster, inside = at >> self._bits, at & ((1 << self._bits) - 1)
        size = min(size, (1 << self._bits) - inside)
        number, place = cluster >> self._entry_bits, cluster & ((1 << self._entry_bits) - 1)
        if self._table[0] != number:
            table_at = int.from_bytes(self._l1[8 * number : 8 * number + 8], "big") & _OFFSET
            self._table = number, self._image.read(table_at, 1 << self._bits) if table_at else b""
        table = self._table[1]
        entry = int.from_bytes(table[8 * place : 8 * place + 8], "big")
        if entry & _IS_COMPRESSED:
            if self._cluster[0] != entry:
                self._cluster = entry, self._image.cluster(entry)
            return self._cluster[1][inside : inside + size]
        if not entry & _OFFSET or entry & _IS_ZERO:
            return bytes(size)
        return self._image.read((entry & _OFFSET) + inside, size)


def _zstd(data: bytes, size: int) -> bytes:
    """At most `size` bytes of what was compressed; fewer if it is damaged."""
    try:
        import zstandard
    except ImportError:
        raise RemusError("the clusters are compressed by zstd: to read them, pip install 'remus_ckpt[zstd]'") from None
    out = b""
    with (
        suppress(zstandard.ZstdError),
        zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).stream_reader(data) as it,
    ):
        while len(out) < size and (more := it.read(size - len(out))):
            out += more
    return out


def _unknown(message: str, offset: int) -> NoReturn:
    raise UnknownFormat(message, offset=offset, section="formats.md §4")
