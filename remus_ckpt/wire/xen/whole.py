"""One of our own checkpoints, walked by the extension: in one call if it is complete, or else as it arrives.

The parsers accept any bytes in any pieces, and they decide. This module only recognises the plain form that a sender
gives its checkpoints after the first: batches of normal pages, COMPRESSED_DATA with exactly these pages, the end of the
body, and a tail with a record (specs/stream.md §5, §6, §9); in a session, also the DATA around them and the COMMIT
after them (specs/session.md §2, §3.5). Anything else, and anything that breaks a rule, is left to the parsers. Without
the extension, everything is. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from remus_ckpt import extensions
from remus_ckpt.wire.digest import DIGEST_BYTES, DigestName, new_digest
from remus_ckpt.wire.record import CheckpointRecord, Position

_native: Any
try:
    _native = extensions.load("wire._path")
except ImportError:  # it was not built: the parsers do it
    _native = None

HAS_NATIVE = _native is not None
_MOST_CHUNKS = 4096
"""With encoded pages, in one checkpoint: each has a whole page buffer of them, except for the last."""
_FIRST_BYTES = 1 << 20
_GROWTH = 4


class Whole:
    """The contents of a whole checkpoint.

    data: its bytes in the stream, valid until the next walk; word, p2m_size: by which they were read
    pfns: int64[n], of its pages; batches: their number
    chunks: where in data the encoded pages of a chunk begin, their bytes, and how many they are
    tail, record_at: offsets of the tail and the record in data
    epoch, before, after, device_state: of the record, of which only the form was checked; before: a digest
    digest: of all bytes before the last 32, if it was computed as they arrived
    """

    __slots__ = ("_found", "_pfns", "_record", "after", "chunks", "data", "digest", "epoch", "p2m_size", "word")

    def __init__(
        self, data: memoryview, word: int, p2m_size: int, found: tuple[Any, ...], digest: bytes | None
    ) -> None:
        """found: what the extension tells of the walk over data. What can wait is looked at when it is asked for."""
        self.data: memoryview = data[found[0] : found[0] + found[1]]
        self.word, self.p2m_size = word, p2m_size
        self.epoch: int = found[3]
        self.after = Position(found[3], found[5])
        self.chunks: list[tuple[int, int, int]] = found[15]
        self.digest = digest
        self._found = found
        self._pfns: NDArray[np.int64] | None = None
        self._record: CheckpointRecord | None = None

    @property
    def before(self) -> bytes:
        return cast(bytes, self._found[4])

    @property
    def device_state(self) -> bytes:
        return cast(bytes, self._found[9])

    @property
    def batches(self) -> int:
        return cast(int, self._found[11])

    @property
    def tail(self) -> int:
        return cast(int, self._found[12])

    @property
    def record_at(self) -> int:
        return cast(int, self._found[13])

    @property
    def pfns(self) -> NDArray[np.int64]:
        if self._pfns is None:
            self._pfns = np.frombuffer(self._found[14], dtype=np.int64)
        return self._pfns

    @property
    def record(self) -> CheckpointRecord:
        """The record, made on first use: a checkpoint is written without it."""
        if self._record is None:
            _, _, _, epoch, before, _, time_ns, is_delta, is_blake3, device_state, memory_bytes = self._found[:11]
            self._record = CheckpointRecord(
                epoch=epoch,
                time_ns=time_ns,
                codec="delta" if is_delta else "rle",
                before=Position(epoch - 1, before),
                after=self.after,
                device_state=device_state,
                memory_bytes=memory_bytes or None,
                digest="blake3" if is_blake3 else "sha256",
            )
        return self._record

    def follows(self, position: Position | None) -> bool:
        """Whether it says that it follows this position."""
        return position is not None and position.epoch == self.epoch - 1 and position.digest == self._found[4]

    @property
    def payload_bytes(self) -> int:
        """Of all encoded pages."""
        return sum(size for _, size, _ in self.chunks)

    def is_intact(self) -> bool:
        """Whether it carries the digest of its bytes."""
        if self.digest is None:
            running = new_digest("blake3" if self._found[8] else "sha256")
            running.update(self.data[:-DIGEST_BYTES])
            self.digest = running.digest()
        return self.digest == self.data[-DIGEST_BYTES:]

    def payloads(self) -> Iterator[tuple[memoryview, NDArray[np.int64]]]:
        """The encoded pages of each chunk, and their numbers."""
        first = 0
        for at, size, pages in self.chunks:
            yield self.data[at : at + size], self.pfns[first : first + pages]
            first += pages


class _Walks:
    """What both walks share: expectations, and room for results. most_bytes: of the stream of a checkpoint"""

    def __init__(self, word: int, p2m_size: int, most_bytes: int) -> None:
        self.word, self.p2m_size, self.most_bytes = word, p2m_size, most_bytes
        self._pfns = np.empty(0, dtype=np.int64)
        self._chunks = np.empty((_MOST_CHUNKS, 3), dtype=np.int64)
        self._make_room(min(_FIRST_BYTES, most_bytes))

    def _make_room(self, size: int) -> None:
        """For a checkpoint of so many bytes."""
        before, self._pfns = self._pfns, np.empty(size // self.word, dtype=np.int64)
        self._pfns[: len(before)] = before

    def _whole(self, data: memoryview, found: tuple[Any, ...], digest: bytes | None = None) -> Whole:
        return Whole(data, self.word, self.p2m_size, found, digest)


class Walker(_Walks):
    """Walks the checkpoints of one session."""

    def __init__(self, word: int, p2m_size: int, most_bytes: int, *, has_checksums: bool) -> None:
        super().__init__(word, p2m_size, most_bytes)
        self._has_checksums = has_checksums

    def wanted(self, data: memoryview) -> int:
        """How many bytes are needed to tell whether a whole checkpoint begins here; 0 if none does."""
        size: int = _native.wanted(data, self.most_bytes)
        return size

    def walk(self, data: memoryview) -> tuple[Whole, int] | None:
        """The checkpoint that these bytes of a session begin with, and where its COMMIT frame ends."""
        found = _native.walk(
            data, self.word, self.p2m_size, self.most_bytes, self._pfns, self._chunks, self._has_checksums
        )
        return None if found is None else (self._whole(data, found), found[2])


class Landing(_Walks):
    """One contiguous block of memory for the stream's bytes of one checkpoint after another, walked and hashed as they
    arrive.

    most_bytes: of a checkpoint; memory grows up to that as bytes arrive, and is kept for the next one
    digest: the stream's digest
    Only with the extension.
    """

    def __init__(self, word: int, p2m_size: int, most_bytes: int, digest: DigestName) -> None:
        super().__init__(word, p2m_size, most_bytes)
        self._digest: DigestName = digest
        self._memory = np.empty(min(_FIRST_BYTES, most_bytes), dtype=np.uint8)
        self.clear()

    def clear(self) -> None:
        """The next bytes begin a checkpoint."""
        self.size = 0
        self.whole: Whole | None = None
        """The checkpoint, once it is complete."""
        self._state = bytearray(_native.STATE_BYTES)
        self._hash, self._hashed = new_digest(self._digest), 0

    @property
    def data(self) -> memoryview:
        """The bytes of the checkpoint that have arrived; valid until `clear`."""
        return memoryview(self._memory)[: self.size]

    def get_buffer(self) -> memoryview:
        """Room for bytes; empty if there are `most_bytes`."""
        if self.size == len(self._memory) < self.most_bytes:
            before = self._memory
            self._memory = np.empty(min(_GROWTH * len(before), self.most_bytes), dtype=np.uint8)
            self._memory[: self.size] = before
            self._make_room(len(self._memory))
        return memoryview(self._memory)[self.size :]

    def took(self, size: int) -> bool:
        """Walk bytes that have arrived in the room. False if they are not the plain form of a checkpoint; once it is
        complete, `whole` is the checkpoint."""
        self.size += size
        found = _native.stream(
            self.data, self.word, self.p2m_size, self.most_bytes, self._pfns, self._chunks, self._state
        )
        if found:
            self.hash()
            self.whole = self._whole(self.data, found, self._hash.digest())
        return found is not None

    def hash(self) -> None:
        """Hash what has arrived so far."""
        if (stop := self.size - DIGEST_BYTES) > self._hashed:
            self._hash.update(self.data[self._hashed : stop])
            self._hashed = stop


def durable_ack(data: memoryview) -> tuple[Position, int] | None:
    """If these bytes of a session begin with the Ack for a durable checkpoint: its position, and where its frame ends;
    otherwise None. Only with the extension."""
    found = _native.ack(data)
    return None if found is None else (Position(found[0], found[1]), found[2])


def end_frames(size: int, crc: int, after: Position, before: Position, stream_bytes: int, pages: int) -> bytes:
    """The 16 bytes of the header of a DATA frame with a payload of that size and checksum, and after them the COMMIT
    frame of the checkpoint that it ends. after: one epoch behind before. Only with the extension."""
    made: bytes = _native.end_frames(after.digest, before.digest, after.epoch, size, crc, stream_bytes, pages)
    return made


def ack_frame(position: Position) -> bytes:
    """The frame of an Ack for a durable checkpoint. Only with the extension."""
    made: bytes = _native.ack_frame(position.digest, position.epoch)
    return made


def write_early(fd: int, data: memoryview, at: int) -> None:
    """Write bytes at a file's own offset, which is `at`, and have the kernel begin to write them to the disk: in one
    call. Raises OSError; some of them may have been written then. Only with the extension."""
    _native.write_early(fd, data, at)


def receive(fd: int, room: memoryview, timeout_s: float | None) -> int | None:
    """Receive from a socket that does not block, in one call; None if nothing came in that time, 0 at the end.

    Raises OSError. Only with the extension.
    """
    size: int = _native.receive(fd, room, -1 if timeout_s is None else max(int(timeout_s * 1000 + 0.999), 0))
    return None if size < 0 else size
