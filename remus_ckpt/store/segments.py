"""Segment files: their names, and how one is read (specs/store.md §4)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import guarding, open_to_read
from remus_ckpt.errors import Malformed, StoreError, StreamError, UnknownFormat
from remus_ckpt.hashing import hashing
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.store.unwritten import data_end
from remus_ckpt.wire.digest import DIGEST_BYTES, DigestName
from remus_ckpt.wire.record import RECORD_MAGIC, CheckpointRecord, Position
from remus_ckpt.wire.xen.boundary import Boundary
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

Read = Callable[[memoryview, int], int]
"""Reads bytes of a segment into a view, from an offset on; returns how many, 0 at its end."""

DIRECTORY = "segments"
PARTIAL = ".partial"
_NAME = re.compile(r"(\d{20})-(\d{6,12})\.remus")
_EPOCHS = 1 << 63
_MAX_SEQUENCE = 10**12
_TRIES = 3
_SEARCH_BYTES = 1 << 20
_RECORD_BYTES = 1 << 16
"""Where a record with few bytes of device state begins, before the end of its checkpoint."""
_TIMES_NS = range(-(1 << 63), 1 << 63)
"""The times that the index can hold."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole checkpoint.

    position, time_ns: from its record; time_ns is None if the record's time cannot be kept
    segment, start, end: its bytes in that file; to restore it, read the file from its beginning to `end`
    pages: how many it carries
    is_base: whether it carries all pages of memory that are not zeros
    """

    position: Position
    time_ns: int | None
    segment: str
    start: int
    end: int
    pages: int
    is_base: bool

    @property
    def epoch(self) -> int:
        """The checkpoint's number."""
        return self.position.epoch


class Shape(NamedTuple):
    """What a stream must match to continue another: page codec, toolstack word in bytes, and pages of memory."""

    codec: StreamCodec
    word: Word
    p2m_size: int


@dataclass(slots=True)
class Contents:
    """What a segment holds, summed up: its epochs are consecutive, and each checkpoint begins where the last one ends.

    first, last: of its checkpoints; None if it has none
    size: of the file, if it will not grow any more
    fault: what ended the reading, if that was not the end of the file
    """

    name: str
    first: Entry | None = None
    last: Entry | None = None
    shape: Shape | None = None
    size: int | None = None
    fault: StreamError | None = None

    def add(self, entry: Entry) -> None:
        """Add the checkpoint that follows the last one."""
        self.first = self.first or entry
        self.last = entry

    @property
    def end(self) -> int:
        """The first byte after the last whole checkpoint."""
        return self.last.end if self.last else 0

    @property
    def epochs(self) -> range:
        """The epochs of its checkpoints."""
        return range(self.first.epoch, self.last.epoch + 1) if self.first and self.last else range(0)


def segment_name(first_epoch: int, sequence: int) -> str:
    """The name of a segment with a base of that epoch; the sequence number says which segment is newer.

    Raises StoreError if the numbers are used up.
    """
    if sequence >= _MAX_SEQUENCE:
        raise StoreError(f"no segment can follow number {sequence - 1}: continue in a new store")
    return f"{first_epoch:020}-{sequence:06}.remus"


def first_epoch_of(name: str) -> int:
    """The epoch in a segment's name, which is that of its base."""
    return int(name.partition("-")[0])


def sequence_of(name: str) -> int:
    """The sequence number in a segment's name."""
    return int(name.partition("-")[2].partition(".")[0])


def is_segment(name: str) -> bool:
    """Whether a file of that name is a segment."""
    return _NAME.fullmatch(name) is not None and int(name[:20]) < _EPOCHS


def list_segments(directory: Path) -> list[str]:
    """The names of a history's segments, oldest first. Raises StoreError."""
    path = directory / DIRECTORY
    with guarding(path):
        return sorted(filter(is_segment, os.listdir(path)), key=sequence_of)


def reader_of(fd: int) -> Read:
    """Reads an open file."""
    return lambda view, at: os.preadv(fd, [view], at)


def replay(
    read: Read,
    restorer: Restorer,
    *,
    start: int = 0,
    end: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Checkpoint]:
    """Feed a segment to a restorer, and yield each staged checkpoint for the caller to commit or skip.

    start, end: the range of bytes to read; end None: to the end of the segment
    advance: called with the offset that has been reached in the segment
    Stops at the end of the range. Raises StreamError, and what `read` raises.
    """
    at = start
    while True:
        if (checkpoint := restorer.next_checkpoint()) is not None:
            yield checkpoint
            continue
        room = restorer.get_buffer()
        if end is not None:
            room = room[: end - at]
        size = read(room, at) if len(room) else 0
        if not size:
            return
        restorer.buffer_updated(size)
        at += size
        if advance is not None:
            advance(at)


def entry_of(checkpoint: Checkpoint, segment: str, shift: int = 0) -> Entry:
    """The entry of one of our checkpoints. shift: its offset in the segment minus its offset in its stream

    Raises Malformed for a checkpoint without a record.
    """
    record = record_of(checkpoint)
    return Entry(
        position=record.after,
        time_ns=record.time_ns if can_keep(record.time_ns) else None,
        segment=segment,
        start=checkpoint.start + shift,
        end=checkpoint.end + shift,
        pages=checkpoint.page_count,
        is_base=checkpoint.start + shift == 0,
    )


def can_keep(time_ns: int | None) -> bool:
    """Whether a store can keep a checkpoint's time: none, or a signed integer of 64 bits."""
    return time_ns is None or time_ns in _TIMES_NS


def record_of(checkpoint: Checkpoint) -> CheckpointRecord:
    """The record of a checkpoint. Raises Malformed if it has none of ours."""
    if checkpoint.record is None:
        raise Malformed(
            "a store holds streams of our own: this checkpoint has no record",
            offset=checkpoint.tail.offset if checkpoint.tail else checkpoint.end,
            section="store.md §4.1",
            chunk="tail",
        )
    return checkpoint.record


class Nowhere:
    """A home for a restorer that only reads and skips every checkpoint."""

    def open(self, pages: int) -> Pages:
        """No memory."""
        return np.empty((0, PAGE_SIZE), dtype=np.uint8)

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Nothing is kept."""

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Nothing will be written."""


def walk(
    path: Path,
    contents: Contents,
    *,
    end: int | None = None,
    limits: Limits | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Entry]:
    """Read a segment after its known part, check everything there, and yield its checkpoints one by one.

    contents: the known part; each checkpoint is added to it before it is yielded, and at the end the fault
    end: where to stop; None: at the end of the file
    advance: as for `replay`
    Raises OSError if the segment cannot be read.
    """
    fd = open_to_read(path)
    try:
        yield from walk_bytes(reader_of(fd), contents, end=end, limits=limits, advance=advance)
    finally:
        os.close(fd)


def walk_bytes(
    read: Read,
    contents: Contents,
    *,
    end: int | None = None,
    limits: Limits | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Entry]:
    """`walk`, wherever the segment's bytes are. Raises what `read` raises."""
    start = boundary_behind(contents) if contents.last is not None and contents.shape is not None else None
    try:
        with hashing() as threaded:
            restorer = Restorer(limits=limits, home=Nowhere(), new_digest=threaded, start=start)
            for checkpoint in replay(read, restorer, start=contents.end if start else 0, end=end, advance=advance):
                entry = entry_of(checkpoint, contents.name)
                restorer.skip()
                contents.shape = shape_of(restorer)
                contents.add(entry)
                yield entry
    except StreamError as error:
        contents.fault = error.with_traceback(None)  # which would keep what was read


def scan(
    path: Path,
    *,
    known: Contents | None = None,
    end: int | None = None,
    limits: Limits | None = None,
    advance: Callable[[int], None] | None = None,
) -> Contents:
    """`walk` to the end of the data, from the beginning or after the `known` part. Raises OSError if it cannot be
    read."""
    found = Contents(path.name) if known is None else replace(known, fault=None)
    fd = open_to_read(path)
    try:
        for _ in walk_bytes(reader_of(fd), found, end=end, limits=limits, advance=advance):
            pass
        walk_again(fd, found, os.fstat(fd).st_size if end is None else end, limits)
    finally:
        os.close(fd)
    return found


def walk_again(fd: int, contents: Contents, size: int, limits: Limits | None = None) -> int:
    """If a fault has ended the reading of a segment: read it again after its last checkpoint, to the end of its data.
    Returns where that is, or `size`; a fault that was only that the data ended is taken back.

    size: of the segment, as far as it was read. Raises OSError.
    """
    if contents.last is None or contents.shape is None or contents.end >= size:
        return size
    written = data_end(fd, contents.end, size)
    for _ in range(_TRIES):
        if contents.fault is None:
            break
        # What was read may have been half overwritten, by a writer that continued meanwhile.
        contents.fault = None
        for _ in walk_bytes(reader_of(fd), contents, end=written, limits=limits):
            pass
        written = data_end(fd, contents.end, size)
    return max(written, contents.end)


def shape_of(restorer: Restorer) -> Shape:
    """The shape of the stream whose checkpoint is in force; it must be one of ours."""
    boundary, checkpoint = restorer.boundary, restorer.in_force
    assert checkpoint is not None and checkpoint.record is not None and boundary.dialect.word is not None
    return Shape(cast(StreamCodec, checkpoint.record.codec), boundary.dialect.word, boundary.p2m_size)


def digest_of_stream(read: Read, entry: Entry | None) -> DigestName | None:
    """The digest that the stream of a segment has, by the record of one of its checkpoints; None if that is not seen.

    A stream that begins with all of memory is read twice as fast by those who need not compute each digest for it.
    Raises what `read` raises.
    """
    if entry is None:
        return None
    block = bytearray(min(_RECORD_BYTES, entry.end - entry.start))
    view, at = memoryview(block), entry.end - len(block)
    while view and (size := read(view, at)):
        view, at = view[size:], at + size
    needle = Signature.REMUS.value
    found = block.find(needle)
    while found >= 0:
        begin = found + len(needle) + 4
        if begin + int.from_bytes(block[begin - 4 : begin], "little") == len(block):
            try:
                record = CheckpointRecord.unpack(bytes(block[begin:-DIGEST_BYTES]), 0)
            except StreamError:
                return None
            return record.digest if record.after == entry.position else None
        found = block.find(needle, found + 1)
    return None


def boundary_behind(contents: Contents) -> Boundary:
    """The boundary after the last entry, where reading continues."""
    last, shape = contents.last, contents.shape
    assert last is not None and shape is not None
    return Boundary.of_ours(
        offset=last.end,
        epoch=len(contents.epochs),
        word=shape.word,
        codec=shape.codec,
        p2m_size=shape.p2m_size,
        position=last.position,
    )


def holds_a_record(fd: int, position: Position, start: int, written: int, size: int) -> bool:
    """Whether the bytes from `start` to `size` contain a whole record of a checkpoint that follows `position`.

    written: the first byte that was never written, or `size`; after it, the record of the very next checkpoint proves
        nothing, since that one lacks bytes
    If so, they are not a checkpoint that was cut off, whatever their first bytes say. Any other record is part of
    memory that happens to hold a save stream. Raises OSError.
    """
    needle = Signature.REMUS.value
    head = len(needle) + 4
    at = start
    while at < size:
        block = os.pread(fd, _SEARCH_BYTES + head, at)
        found = block.find(needle)
        while 0 <= found < _SEARCH_BYTES and found + head <= len(block):
            length = int.from_bytes(block[found + len(needle) : found + head], "little")
            if _is_record(fd, position, at + found + head, length, written, size):
                return True
            found = block.find(needle, found + 1)
        at += _SEARCH_BYTES
    return False


def _is_record(fd: int, position: Position, at: int, length: int, written: int, size: int) -> bool:
    """Whether these bytes are the record of the next checkpoint or, if that one is damaged, of the one after it."""
    if at + length > size or os.pread(fd, len(RECORD_MAGIC), at) != RECORD_MAGIC:
        return False
    if length > Limits().device_state_bytes:
        return True  # to be certain would take too much memory
    try:
        before = CheckpointRecord.unpack(os.pread(fd, max(length - DIGEST_BYTES, 0), at), at).before
    except UnknownFormat:
        return True  # from a later version of the program
    except Malformed:
        return False
    if before is None:
        return False
    return (before == position and at + length <= written) or before.epoch == position.epoch + 1
