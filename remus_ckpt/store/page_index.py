"""The page index of a segment: which pages each checkpoint carries, and where their bytes are (specs/store.md §5.2).

It is a cache: absent, damaged or of another version, it is built from the segment, which is checked on the way.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec
from remus_ckpt.disk import write_all
from remus_ckpt.errors import Malformed, StoreError
from remus_ckpt.hashing import hashing
from remus_ckpt.limits import Limits
from remus_ckpt.memory import zeros
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, Buffer, Pages
from remus_ckpt.store.page_records import (
    BESIDE,
    DEPTH_BITS,
    MAX_CHAIN_BYTES,
    MAX_DELTAS,
    OFFSET_BITS,
    RECORD,
    Heads,
    Records,
    Source,
    Unreadable,
    borders,
    checksum,
    full_head,
    make_records,
    read_pages,
    seal,
)
from remus_ckpt.store.segments import Entry, Shape, digest_of_stream, reader_of
from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.stream_reader import NEED_DATA
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.boundary import Boundary
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE
from remus_ckpt.wire.xen.dialect import STREAM_CODECS
from remus_ckpt.wire.xen.reader import Reader

DIRECTORY = "pages"
_LOCK = "lock"
_VERSION = 1
_META, _RECORDS, _FULL, _HEADS, _ROWS = "meta.json", "records", "full", "heads", "checkpoints"
_MAX_RECORDS = (1 << 32) - 1
_MAX_META_BYTES = 4096
_LEAST_SNAPSHOT = 1 << 14
"""Heads are written down after so many records, or an eighth of the pages; at most so many are followed on opening."""
_ROW = np.dtype(
    [
        ("epoch", "<u8"),
        ("digest", "u1", DIGEST_BYTES),
        ("start", "<u8"),
        ("tail", "<u8"),
        ("end", "<u8"),
        ("records", "<u4"),
        ("full", "<u4"),
        ("snapshots", "<u4"),
        ("heads_records", "<u4"),
        ("heads_crc", "<u4"),
        ("records_crc", "<u4"),
        ("tail_crc", "<u4"),
        ("crc", "<u4"),
    ]
)
"""One checkpoint. epoch, digest: its position; start, tail, end: its bytes, and where its tail begins
records, full, snapshots: how many there are up to it; heads_records, heads_crc: how many records the last snapshot of
    the heads covers, and its CRC-32C
records_crc: of all records up to it; tail_crc: of its tail; crc: of the row
"""


@dataclass(frozen=True, slots=True)
class View:
    """One checkpoint in a page index.

    source: what its pages are put together from; without the segment's descriptor
    tail, end: where its tail is in the segment; tail_crc: its CRC-32C
    carried: the records of the pages that it carries itself
    """

    records: Records
    heads: Heads
    full: int
    shape: Shape
    tail: int
    end: int
    tail_crc: int
    carried: Records
    base_end: int

    def source(self, segment: int) -> Source:
        """Where the pages come from. segment: its descriptor"""
        return Source((segment, self.full), self.records, self.heads, self.shape.codec)


class Damaged(Exception):
    """The contents of an index are impossible: it must be rebuilt."""


class PageIndex:
    """The index of one segment, in its own directory or in files without a name.

    Only one process may `extend` an index in a directory: see `owning`. Any may read it meanwhile.
    """

    def __init__(self, segment: str, files: dict[str, int]) -> None:
        self.segment = segment
        self._files = files
        self.shape: Shape | None = None
        self._rows: NDArray[np.void] = np.empty(0, dtype=_ROW)

    # Opening

    @classmethod
    def open(cls, directory: Path, segment: str, *, writable: bool = False) -> Self | None:
        """The index of a segment; None if there is none that can be used. Raises OSError only for lack of resources."""
        files: dict[str, int] = {}
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not hang it
        found = cls(segment, files)
        try:
            for name in (_META, _RECORDS, _FULL, _HEADS, _ROWS):
                files[name] = os.open(directory / segment / name, flags)
            found._load()
        except (OSError, ValueError, KeyError, TypeError, RecursionError, Damaged):
            found.close()
            return None
        return found

    @classmethod
    def create(cls, directory: Path, segment: str) -> Self:
        """A new index, replacing whatever is there. Raises OSError."""
        path = directory / segment
        if path.exists():
            aside = directory / f"{segment}.old"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)  # readers that have it open keep it
            shutil.rmtree(aside, ignore_errors=True)
        path.mkdir(mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        files: dict[str, int] = {}
        found = cls(segment, files)
        try:
            for name in (_META, _RECORDS, _FULL, _HEADS, _ROWS):
                files[name] = os.open(path / name, flags, 0o600)
        except OSError:
            found.close()
            raise
        return found

    @classmethod
    def unnamed(cls, segment: str, like: PageIndex | None = None) -> Self:
        """A new index in files without a name. like: begin with what this one holds. Raises OSError."""
        files: dict[str, int] = {}
        found = cls(segment, files)
        try:
            for name in (_META, _RECORDS, _FULL, _HEADS, _ROWS):
                with tempfile.TemporaryFile() as file:
                    files[name] = os.dup(file.fileno())
                if like is not None:
                    _copy(like._files[name], files[name], like._size_of(name))
            if like is not None:
                found._load()
        except OSError:
            found.close()
            raise
        return found

    def _load(self) -> None:
        meta = json.loads(os.pread(self._files[_META], _MAX_META_BYTES, 0))
        if meta["version"] != _VERSION or meta["segment"] != self.segment:
            raise Damaged
        self.shape = Shape(meta["codec"], meta["word"], meta["pages"])
        if self.shape.codec not in STREAM_CODECS or self.shape.word not in (4, 8):
            raise Damaged
        if type(self.shape.p2m_size) is not int or not 0 < self.shape.p2m_size <= MAX_P2M_SIZE:
            raise Damaged
        count = os.fstat(self._files[_ROWS]).st_size // _ROW.itemsize
        self._rows = np.frombuffer(_mapped(self._files[_ROWS], count * _ROW.itemsize), dtype=_ROW)
        while len(self._rows) and not self._is_good(self._rows[-1]):
            self._rows = self._rows[:-1]  # its writer has died
        if not len(self._rows):
            raise Damaged

    def _is_good(self, row: np.void) -> bool:
        return _row_crc(row) == int(row["crc"]) and all(
            os.fstat(self._files[name]).st_size >= _bytes_in(row, name, self.shape)
            for name in (_RECORDS, _FULL, _HEADS)
        )

    def _size_of(self, name: str) -> int:
        if name == _META or not len(self._rows):
            return os.fstat(self._files[name]).st_size
        return len(self._rows) * _ROW.itemsize if name == _ROWS else _bytes_in(self._rows[-1], name, self.shape)

    def close(self) -> None:
        """Close the files; views stay valid, but for full pages."""
        for fd in self._files.values():
            with suppress(OSError):
                os.close(fd)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    @property
    def end(self) -> int:
        """The first byte of the segment that it does not cover."""
        return int(self._rows[-1]["end"]) if len(self._rows) else 0

    @property
    def count(self) -> int:
        """How many checkpoints it covers."""
        return len(self._rows)

    def covers(self, entry: Entry) -> bool:
        """Whether it knows this checkpoint."""
        return self._row_of(entry) is not None

    def _row_of(self, entry: Entry) -> np.void | None:
        if not len(self._rows):
            return None
        number = entry.epoch - int(self._rows[0]["epoch"])
        if not 0 <= number < len(self._rows):
            return None
        row: np.void = self._rows[number]
        is_same = bytes(row["digest"]) == entry.position.digest and int(row["end"]) == entry.end
        return row if is_same and self._is_good(row) else None

    def at(self, entry: Entry) -> View:
        """One checkpoint. Raises Damaged if the index does not hold together."""
        row = self._row_of(entry)
        if row is None or self.shape is None:
            raise Damaged
        count = int(row["records"])
        records = self._records(count)
        if checksum(records.view(np.uint8)) != int(row["records_crc"]):
            raise Damaged
        heads = self._heads_at(row, records)
        before = self._rows[int(row["epoch"]) - int(self._rows[0]["epoch"]) - 1] if row["start"] else None
        carried = records[0 if before is None else int(before["records"]) :]
        full = os.dup(self._files[_FULL])
        tail, end = int(row["tail"]), int(row["end"])
        base_end = int(self._rows[0]["end"])
        return View(records, heads, full, self.shape, tail, end, int(row["tail_crc"]), carried, base_end)

    def _records(self, count: int) -> Records:
        return np.frombuffer(_mapped(self._files[_RECORDS], count * RECORD.itemsize), dtype=RECORD)

    def _heads_at(self, row: np.void, records: Records) -> Heads:
        """The heads as they are after these records, all up to a row. Raises Damaged."""
        heads = self._heads(row)
        later = records[int(row["heads_records"]) :]
        if len(later) and int(later["pfn"].max()) >= len(heads):
            raise Damaged
        heads[later["pfn"]] = np.arange(len(records) - len(later) + 1, len(records) + 1)
        return heads

    def _heads(self, row: np.void) -> Heads:
        assert self.shape is not None
        heads = zeros(-(-self.shape.p2m_size * 4 // PAGE_SIZE)).reshape(-1).view("<u4")
        at, fd, size = _heads_bytes(int(row["snapshots"]) - 1, self.shape), self._files[_HEADS], heads.nbytes
        left = memoryview(heads).cast("B")
        while len(left):
            got = os.preadv(fd, [left], at)
            if not got:
                raise Damaged
            left, at = left[got:], at + got
        if checksum(heads.view(np.uint8)) != int(row["heads_crc"]) or size < 4:
            raise Damaged
        return heads[: self.shape.p2m_size]

    # Building

    def extend(
        self, segment: int, last: Entry, limits: Limits | None = None, until: Callable[[], bool] | None = None
    ) -> None:
        """Read on in the segment, and add its checkpoints up to `last`. An index that is in a directory must be owned.

        segment: its descriptor
        until: asked after each checkpoint whether to stop there
        Raises StreamError if the segment is damaged, StoreError or OSError if it cannot be read or the index cannot be
        written; what has been added stays. Raises Damaged, with nothing added, if the index does not hold together.
        """
        if self.end < last.end:
            _Builder(self, segment, limits).run(last, until or (lambda: False))


class _Builder:
    """Adds checkpoints to an index."""

    def __init__(self, index: PageIndex, segment: int, limits: Limits | None) -> None:
        self._index = index
        self._segment = segment
        self._limits = limits
        self._files = index._files
        self._counts = {_RECORDS: 0, _FULL: 0, _HEADS: 0}
        self._crc = 0
        self._heads: Heads = np.empty(0, dtype=np.uint32)
        self._snapshot = (0, 0)  # the records that the last one covers, and its checksum
        self._start: Boundary | None = None
        if len(index._rows) and index.shape is not None:
            self._resume(index._rows[-1], index.shape)
        else:
            for fd in self._files.values():
                os.ftruncate(fd, 0)

    def _resume(self, row: np.void, shape: Shape) -> None:
        self._counts = {_RECORDS: int(row["records"]), _FULL: int(row["full"]), _HEADS: int(row["snapshots"])}
        self._crc = int(row["records_crc"])
        self._snapshot = int(row["heads_records"]), int(row["heads_crc"])
        for name in (_RECORDS, _FULL, _HEADS):  # what comes behind is from a writer that has died
            os.ftruncate(self._files[name], _bytes_in(row, name, shape))
        os.ftruncate(self._files[_ROWS], len(self._index._rows) * _ROW.itemsize)
        self._heads = self._index._heads_at(row, self._index._records(int(row["records"])))
        self._start = Boundary.of_ours(
            offset=int(row["end"]),
            epoch=len(self._index._rows),
            word=shape.word,
            codec=shape.codec,
            p2m_size=shape.p2m_size,
            position=Position(int(row["epoch"]), bytes(row["digest"])),
        )

    def run(self, last: Entry, until: Callable[[], bool]) -> None:
        """Read up to the end of a checkpoint."""
        end, digest = last.end, digest_of_stream(reader_of(self._segment), last)
        with hashing() as new_digest:
            reader = Reader(limits=self._limits, digest=digest, new_digest=new_digest)
            at = start = 0
            if self._start is not None:
                reader.rewind(self._start)
                at = start = self._start.offset
            pfns: list[NDArray[np.int64]] = []
            encoded: list[events.CompressedData] = []
            while True:
                event = reader.next_event()
                match event:
                    case events.Header():
                        self._heads = (
                            zeros(-(-event.p2m_size * 4 // PAGE_SIZE)).reshape(-1).view("<u4")[: event.p2m_size]
                        )
                    case events.Batch():
                        numbers = event.pfns[HAS_DATA[event.types]].astype(np.int64)
                        if event.data is None:
                            pfns.append(numbers)
                        else:
                            where = event.offset + 4 + len(event.pfns) * (reader.dialect.word or 8)
                            self._add_raw(numbers, event.data, where)
                    case events.CompressedData():
                        encoded.append(event)
                    case events.TailHvm():
                        if event.record is None:
                            raise Malformed("a checkpoint has no record", offset=event.offset, section="store.md §4.1")
                        if pfns:
                            shape = Shape(event.record.codec, reader.dialect.word or 8, len(self._heads))  # type: ignore[arg-type]
                            self._add_encoded(np.concatenate(pfns), encoded, shape)
                        self._close(event, start, reader)
                        start, pfns, encoded = event.end, [], []
                        if until():
                            return
                    case events.EndOfStream():
                        return
                if event is NEED_DATA:
                    room = reader.get_buffer()[: end - at]
                    size = os.preadv(self._segment, [room], at) if len(room) else 0
                    if size:
                        reader.buffer_updated(size)
                        at += size
                    else:
                        reader.feed_eof()

    def _add_raw(self, pfns: NDArray[np.int64], data: Pages, where: int) -> None:
        if not len(pfns):
            return
        at = np.arange(len(pfns)) * PAGE_SIZE
        records = make_records(pfns, (where + at).astype(np.uint64), PAGE_SIZE)
        seal(records, data.reshape(-1), at)
        self._append(records)

    def _append(self, records: Records) -> None:
        count = self._counts[_RECORDS]
        if count + len(records) > _MAX_RECORDS:
            raise StoreError(f"{self._index.segment}: it holds more pages than an index can list")
        self._heads[records["pfn"]] = np.arange(count + 1, count + len(records) + 1)
        self._write(_RECORDS, count * RECORD.itemsize, records.view(np.uint8))
        self._crc = google_crc32c.extend(self._crc, records.tobytes())
        self._counts[_RECORDS] = count + len(records)

    def _add_encoded(self, pfns: NDArray[np.int64], chunks: list[events.CompressedData], shape: Shape) -> None:
        """The pages of a compressed checkpoint, in the order in which they are applied."""
        parts = [chunk.data for chunk in chunks]
        joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.uint8), *parts])
        found = borders(shape.codec, joined, len(pfns))
        starts, lengths = found[:-1], np.diff(found)
        # Where each page is in the segment: a chunk's bytes are in one piece.
        chunk_starts = np.cumsum([0, *map(len, parts)])
        number = np.searchsorted(chunk_starts, starts, side="right") - 1
        is_whole = starts + lengths <= chunk_starts[number + 1]
        offsets = np.array([chunk.offset + 4 + shape.word for chunk in chunks], dtype=np.int64)
        where = offsets[number] + starts - chunk_starts[number]
        head = full_head(shape.codec, joined, starts, lengths)
        left = np.arange(len(pfns))
        while len(left):
            # A page that is listed twice is applied twice: each pass takes the first of each page that is left, and
            # whatever follows a page that is split over two chunks waits for it.
            _, first = np.unique(pfns[left], return_index=True)
            taken = left[np.sort(first)]
            split = np.flatnonzero(~is_whole[taken])
            if len(split) and split[0]:
                taken = taken[: split[0]]
            elif len(split):
                self._add_split(int(pfns[taken[0]]), joined[starts[taken[0]] :][: lengths[taken[0]]], shape)
                left = left[left != taken[0]]
                continue
            self._add_some(pfns[taken], where[taken], lengths[taken], head[taken], joined, starts[taken], shape)
            left = left[~np.isin(left, taken)]

    def _add_some(
        self,
        pfns: NDArray[np.int64],
        where: NDArray[np.int64],
        lengths: NDArray[np.int64],
        head: NDArray[np.int64],
        joined: NDArray[np.uint8],
        starts: NDArray[np.int64],
        shape: Shape,
    ) -> None:
        """Different pages, each of them in one piece."""
        before = self._heads[pfns]
        known = (
            self._index._records(self._counts[_RECORDS])[np.maximum(before, 1).astype(np.int64) - 1]
            if before.any()
            else None
        )
        is_full = head > 0
        depth = np.ones(len(pfns), dtype=np.uint64)
        chain = lengths.astype(np.int64)
        if known is not None:
            has = before > 0
            depth[has] += known["where"][has] >> np.uint64(OFFSET_BITS) & np.uint64((1 << DEPTH_BITS) - 1)
            chain[has] += known["chain"][has]
        depth[is_full] = chain[is_full] = 0
        records = make_records(pfns, (where + head).astype(np.uint64) | depth << np.uint64(OFFSET_BITS), lengths)
        records["length"][is_full] = PAGE_SIZE
        records["before"] = np.where(is_full, 0, before)
        records["chain"] = np.minimum(chain, 0xFFFF)
        seal(records, joined, starts + head)
        self._append(records)
        is_long = (depth > MAX_DELTAS) | (chain > MAX_CHAIN_BYTES)
        for page in pfns[is_long].tolist():
            self._add_full(page, self._read(page, shape))

    def _add_split(self, page: int, encoded: NDArray[np.uint8], shape: Shape) -> None:
        data = self._read(page, shape)
        get_codec(shape.codec).apply(encoded, data)
        self._add_full(page, data)

    def _read(self, page: int, shape: Shape) -> Pages:
        records = self._index._records(self._counts[_RECORDS])
        source = Source((self._segment, self._files[_FULL]), records, self._heads, shape.codec)
        data = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        try:
            read_pages(source, page, data)
        except Unreadable as error:
            raise Malformed(f"page {page}: {error.reason}", offset=self._index.end, section="store.md §5.2") from None
        return data

    def _add_full(self, page: int, data: Pages) -> None:
        at = self._counts[_FULL] * PAGE_SIZE
        self._write(_FULL, at, data.reshape(-1))
        self._counts[_FULL] += 1
        records = make_records(np.array([page]), np.array([at | BESIDE], dtype=np.uint64), PAGE_SIZE)
        seal(records, data.reshape(-1), np.zeros(1, dtype=np.int64))
        self._append(records)

    def _close(self, tail: events.TailHvm, start: int, reader: Reader) -> None:
        """Add the row of the checkpoint that has ended."""
        assert tail.record is not None
        index, pages = self._index, len(self._heads)
        shape = Shape(tail.record.codec, reader.dialect.word or 8, pages)  # type: ignore[arg-type]
        if index.shape is None:
            index.shape = shape
            meta = {
                "version": _VERSION,
                "segment": index.segment,
                "codec": shape.codec,
                "word": shape.word,
                "pages": pages,
            }
            self._write(_META, 0, json.dumps(meta).encode())
        since = self._counts[_RECORDS] - self._snapshot[0]
        if not self._counts[_HEADS] or since > max(pages // 8, _LEAST_SNAPSHOT):
            self._write_heads(shape)
        position = tail.record.after
        row = np.zeros(1, dtype=_ROW)
        row["epoch"], row["digest"] = position.epoch, np.frombuffer(position.digest, dtype=np.uint8)
        row["start"], row["tail"], row["end"] = start, tail.offset, tail.end
        row["records"], row["full"], row["snapshots"] = (
            self._counts[_RECORDS],
            self._counts[_FULL],
            self._counts[_HEADS],
        )
        row["heads_records"], row["heads_crc"] = self._snapshot
        row["records_crc"] = self._crc
        row["tail_crc"] = google_crc32c.value(os.pread(self._segment, tail.end - tail.offset, tail.offset))
        row["crc"] = _row_crc(row[0])
        self._write(_ROWS, len(index._rows) * _ROW.itemsize, row.view(np.uint8))
        size = (len(index._rows) + 1) * _ROW.itemsize
        index._rows = np.frombuffer(_mapped(self._files[_ROWS], size), dtype=_ROW)

    def _write_heads(self, shape: Shape) -> None:
        whole = np.zeros(_heads_bytes(1, shape), dtype=np.uint8)
        whole[: self._heads.nbytes] = self._heads.view(np.uint8)
        at = _heads_bytes(self._counts[_HEADS], shape)
        os.ftruncate(self._files[_HEADS], at + len(whole))
        blocks = whole.reshape(-1, PAGE_SIZE)
        used = np.flatnonzero(np.diff(blocks.any(axis=1), prepend=False, append=False)).reshape(-1, 2)
        for first, stop in used.tolist():  # the rest are holes
            self._write(_HEADS, at + first * PAGE_SIZE, whole[first * PAGE_SIZE : stop * PAGE_SIZE])
        self._counts[_HEADS] += 1
        self._snapshot = self._counts[_RECORDS], checksum(whole)

    def _write(self, name: str, at: int, data: Buffer) -> None:
        fd = self._files[name]
        os.lseek(fd, at, os.SEEK_SET)
        write_all(fd, [data])


def _heads_bytes(count: int, shape: Shape) -> int:
    return count * -(-shape.p2m_size * 4 // PAGE_SIZE) * PAGE_SIZE


def _bytes_in(row: np.void, name: str, shape: Shape | None) -> int:
    if name == _RECORDS:
        return int(row["records"]) * RECORD.itemsize
    if name == _FULL:
        return int(row["full"]) * PAGE_SIZE
    assert shape is not None
    return _heads_bytes(int(row["snapshots"]), shape)


def _row_crc(row: np.void) -> int:
    return int(google_crc32c.value(row.tobytes()[:-4]))


def _mapped(fd: int, size: int) -> Buffer:
    """The first bytes of a file, which never shrinks."""
    return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ)) if size else b""


def _copy(source: int, target: int, size: int) -> None:
    at = 0
    while at < size:
        data = os.pread(source, min(size - at, 1 << 22), at)
        if not data:
            return
        write_all(target, [data])
        at += len(data)


@contextmanager
def owning(history: Path) -> Iterator[Path | None]:
    """The directory of a history's page indexes, for a process that may write there; None while another does, or if it
    belongs to another user or cannot be written."""
    directory = history / DIRECTORY
    lock = -1
    try:
        if os.stat(history).st_uid == os.geteuid():
            directory.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if lock >= 0:
            os.close(lock)
        yield None
        return
    try:
        yield directory if lock >= 0 else None
    finally:
        if lock >= 0:
            os.close(lock)


def drop_others(directory: Path, segments: list[str]) -> None:
    """Remove the indexes of segments that are gone. The caller owns the directory."""
    for path in directory.iterdir():
        if path.is_dir() and path.name not in segments:
            shutil.rmtree(path, ignore_errors=True)
