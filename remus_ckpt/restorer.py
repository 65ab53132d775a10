"""A stream to memory: checkpoints are staged, checked, and put in force once they are complete (specs/stream.md §8).

No I/O, no clock. Whatever the bytes are, memory stays at the last checkpoint that was put in force.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import Codec, get_codec
from remus_ckpt.errors import LimitExceeded, Malformed
from remus_ckpt.limits import Limits
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, Buffer, Pages
from remus_ckpt.wire.digest import DigestName, NewDigest, new_digest
from remus_ckpt.wire.parts import Parts
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.stream_reader import NEED_DATA
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.boundary import Boundary
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Landing, Whole

STAGED_COST_BYTES = 256
"""Overhead of a staged batch or chunk; if it were not counted, tiny ones would take far more memory than the limit."""


@dataclass(slots=True, eq=False)
class Checkpoint:
    """One checkpoint of a stream.

    epoch: its number, from its record, or else counted from 0
    start, end: its range of bytes in the stream
    batches, entries, pages: batches, PFN entries, and entries with data
    compressed_chunks, compressed_bytes: COMPRESSED_DATA chunks, and the sum of their payloads
    memory: uint8[p2m_size, 4096], the restored memory; valid until the next checkpoint is put in force
    """

    epoch: int
    start: int
    memory: Pages
    end: int = 0
    batches: int = 0
    entries: int = 0
    page_count: int = 0
    compressed_chunks: int = 0
    compressed_bytes: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    """HVM parameters, by the name of their chunk."""
    vcpus: events.VcpuInfo | None = None
    tsc: events.TscInfo | None = None
    toolstack: bytes | None = None
    tail: events.Tail | None = None
    record: CheckpointRecord | None = None
    """The checkpoint's record, in one of our own streams."""
    pfn_lists: list[NDArray[np.int64]] = field(default_factory=list, repr=False)

    @property
    def pfns(self) -> NDArray[np.int64]:
        """int64[n]: the pages that the checkpoint carried, ascending, each once."""
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.pfn_lists]))

    @property
    def pages(self) -> Pages:
        """uint8[n, 4096]: a copy of those pages."""
        return self.memory[self.pfns]

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory; the rest of its last page is padding."""
        stated = None if self.record is None else self.record.memory_bytes
        return len(self.memory) * PAGE_SIZE if stated is None else stated

    @property
    def image(self) -> NDArray[np.uint8]:
        """uint8[memory_bytes]: memory without the padding; a view, valid for as long as `memory` is."""
        return self.memory.reshape(-1)[: self.memory_bytes]

    @property
    def device_state(self) -> bytes:
        """The device model's state: in our own streams the user's bytes, otherwise QEMU's."""
        if self.record is not None:
            return self.record.device_state
        return self.tail.device_state if isinstance(self.tail, events.TailHvm) else b""

    @property
    def parts(self) -> Parts:
        """What it holds besides memory. Raises Malformed or UnknownFormat if the manifest cannot be read."""
        return Parts.unpack(self.device_state)


class Home(Protocol):
    """Where a restorer's memory lives. Its exceptions pass through the restorer, which must then be rewound."""

    def open(self, pages: int) -> Pages:
        """Fresh memory, uint8[pages, 4096], all zeros."""

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write pages uint8[n, 4096] of the first checkpoint; if a PFN occurs twice, the later page counts."""

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Make sure that these pages can be written to memory: afterwards, that must not fail."""


class Anonymous:
    """Memory of this process."""

    def open(self, pages: int) -> Pages:
        """Fresh memory; a page takes memory when it is first written."""
        return zeros(pages)

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Write the pages to memory."""
        expect(memory, pfns)
        memory[pfns] = data

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        """Does nothing: writing to memory cannot fail."""


class Restorer:
    """One stream into one memory.

    dialect: what is known about the stream; the rest is detected
    limits: what the stream may claim
    strict: refuse deviations that are otherwise accepted and named in specs/permissive.md
    home: where memory lives; by default in this process
    digest: the digest that the stream's records use, if known
    new_digest: makes the digest of a checkpoint
    start: where in the stream to begin; memory then has no pages, and checkpoints can only be skipped

    Pass bytes in with `get_buffer` and `buffer_updated`, or with `feed`; `feed_eof` ends them. `next_checkpoint`
    returns a complete, checked checkpoint; `commit` puts it in force, `skip` passes over it.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        *,
        limits: Limits | None = None,
        strict: bool = False,
        home: Home | None = None,
        digest: DigestName | None = None,
        new_digest: NewDigest = new_digest,
        start: Boundary | None = None,
    ) -> None:
        self.reader = Reader(dialect, limits=limits, strict=strict, digest=digest, new_digest=new_digest)
        self.get_buffer = self.reader.get_buffer
        self.buffer_updated = self.reader.buffer_updated
        self.feed_eof = self.reader.feed_eof
        self.memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        """uint8[p2m_size, 4096] once the header has arrived. It holds a checkpoint when `in_force` names one."""
        self.in_force: Checkpoint | None = None
        """The checkpoint that memory holds."""
        self.staged: Checkpoint | None = None
        """A complete, checked checkpoint that waits for `commit`."""
        self.end: events.EndOfStream | None = None
        self._coming: Checkpoint | None = None
        self._raw: list[tuple[NDArray[np.int64], Pages]] = []
        self._compressed: list[events.CompressedData] = []
        self._payload: memoryview = memoryview(b"")
        self._index: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._checked = 0  # bytes of the payload that the check consumed
        self._announced: list[int] = []  # pages announced before each compressed chunk
        self._whole: Whole | None = None  # the staged checkpoint, if it was walked
        self._staged_bytes = 0
        self._page_codec: Codec | None = None  # that of the last whole checkpoint
        self._format_b = False  # the incoming checkpoint has its pages in COMPRESSED_DATA
        self._verify_only = False  # ENABLE_VERIFY_MODE has come
        self._written = (0, 0)  # raw batches and pages of the coming checkpoint in front of it
        self._home: Home = home or Anonymous()
        if start is not None:
            self.reader.rewind(start)
            self._coming = Checkpoint(epoch=start.epoch, start=start.offset, memory=self.memory)
        self._behind = self.reader.boundary(), False  # the last checkpoint, and whether verify mode was on there

    @property
    def dialect(self) -> Dialect:
        """The stream's dialect: as given, plus what has been detected so far."""
        return self.reader.dialect

    @property
    def boundary(self) -> Boundary:
        """The boundary after the checkpoint in force."""
        return self._behind[0]

    def feed(self, data: Buffer) -> None:
        """Add bytes of the stream; they are kept, not copied."""
        self.reader.feed(data)

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Put the checkpoints received so far in force, and yield each one.

        Raises Malformed or UnknownFormat after the last good one, at which memory then stays.
        """
        while (checkpoint := self.next_checkpoint()) is not None:
            self.commit()
            yield checkpoint

    def next_checkpoint(self) -> Checkpoint | None:
        """The next checkpoint, complete and checked but not in force; None if the bytes so far hold none."""
        while self.staged is None:
            event = self.next_event()
            if event is NEED_DATA or isinstance(event, events.EndOfStream):
                return None
        return self.staged

    def next_event(self) -> events.Event | None:
        """Process and return the next event of the stream; after a tail, `staged` is the checkpoint it closed.

        Raises Malformed or UnknownFormat; the checkpoint in force stays.
        """
        if self.staged is not None:
            raise ValueError("a checkpoint is staged: commit it first")
        event = self.reader.next_event()
        match event:
            case events.Header():
                self.memory = self._home.open(event.p2m_size)
                self._coming = Checkpoint(epoch=0, start=0, memory=self.memory)
            case events.Batch():
                self._take_batch(event)
            case events.CompressedData():
                self._take_compressed(event)
            case events.HvmParam():
                self._now.parameters[event.id.name] = event.value
            case events.VcpuInfo():
                self._now.vcpus = event
            case events.TscInfo():
                self._now.tsc = event
            case events.Toolstack():
                self._now.toolstack = event.data
            case events.EnableVerifyMode():
                if not self._verify_only:
                    self._verify_only = True
                    self._written = len(self._raw), self._now.page_count
            case events.Tail():
                self._stage(event)
            case events.EndOfStream():
                self.end = event
        return event

    def fits(self, whole: Whole) -> bool:
        """Whether a checkpoint that has been walked may be staged in one go.

        If not, feed its bytes: that finds out what they are, or what is wrong with them.
        """
        limits, pages, size = self.reader.limits, len(whole.pfns), whole.payload_bytes
        cost = size + (whole.batches + len(whole.chunks)) * STAGED_COST_BYTES
        if self.staged is not None or self._verify_only or self.in_force is None:
            return False
        if pages > limits.checkpoint_entries or cost > limits.checkpoint_bytes or not self.reader.fits(whole):
            return False
        try:
            if self._page_codec is None or self._page_codec.name != self._codec:
                self._page_codec = get_codec(self._codec)
            check = self._page_codec.check
            return all(check(data, len(pfns)) == len(data) for data, pfns in whole.payloads())
        except Malformed:
            return False

    def landing(self, most_bytes: int) -> Landing | None:
        """Where the next checkpoint may land, to be walked as it arrives; None if it has to be fed."""
        dialect, digest = self.dialect, self.reader.digest
        if not HAS_NATIVE or self.in_force is None or digest is None or dialect.word is None or self.reader.strict:
            return None
        return Landing(dialect.word, len(self.memory), most_bytes, digest)

    def reserve(self, whole: Whole) -> None:
        """Make sure that the pages of a checkpoint that `fits` can be written. Raises what the home raises."""
        self._home.reserve(whole.pfns)

    def stage_whole(self, whole: Whole) -> Checkpoint:
        """Stage a checkpoint that `fits`, and whose pages have been reserved."""
        pages, tail, coming = len(whole.pfns), self.reader.take_whole(whole), self._now
        coming.batches, coming.entries, coming.page_count, coming.pfn_lists = whole.batches, pages, pages, [whole.pfns]
        coming.compressed_chunks, coming.compressed_bytes = len(whole.chunks), whole.payload_bytes
        coming.tail, coming.end, coming.record, coming.epoch = tail, tail.end, whole.record, whole.epoch
        self._whole = whole
        self.staged = coming
        return coming

    def commit(self) -> Checkpoint:
        """Put the staged checkpoint in force. It has been checked, so this does not fail."""
        if self.staged is None:
            raise ValueError("no checkpoint is staged")
        if self._whole is not None:
            for encoded, index in self._whole.payloads():
                get_codec(self._codec).apply(encoded, self.memory, index=index, checked=len(encoded))
        raw, index = self._raw, self._index
        if self._verify_only:
            # "from there on the stream changes no memory" (stream.md §8.5): only earlier pages are applied
            raw, index = raw[: self._written[0]], index[: self._written[1]]
        for pfns, data in raw:
            self.memory[pfns] = data
        if len(index):
            # All pages of the checkpoint have been checked; if verify mode began in it, only earlier ones are applied.
            checked = self._checked if len(index) == len(self._index) else None
            get_codec(self._codec).apply(self._payload, self.memory, index=index, checked=checked)
        return self.skip()

    def skip(self) -> Checkpoint:
        """Pass over the staged checkpoint: it counts as in force, but memory is not written."""
        if self.staged is None:
            raise ValueError("no checkpoint is staged")
        checkpoint = self.in_force = self.staged
        self._forget()
        self.staged = None
        self._written = 0, 0
        self._coming = Checkpoint(epoch=checkpoint.epoch + 1, start=checkpoint.end, memory=self.memory)
        self._behind = self.reader.boundary(), self._verify_only
        return checkpoint

    def rewind(self) -> None:
        """Drop everything after the checkpoint in force, including a fault, and continue from there.

        The next bytes must be the next checkpoint's, from its first byte on. If nothing is in force yet, that is the
        beginning of the stream, with fresh memory.
        """
        boundary, self._verify_only = self._behind
        self.reader.rewind(boundary)
        self._forget()
        self.staged = None
        self.end = None
        self._written = 0, 0
        if self.in_force is not None:
            epoch = self.in_force.epoch + 1
            self._coming = Checkpoint(epoch=epoch, start=boundary.offset, memory=self.memory)
        elif boundary.offset == 0:
            self.memory = np.empty((0, PAGE_SIZE), dtype=np.uint8)
            self._coming = None
        else:
            self._coming = Checkpoint(epoch=boundary.epoch, start=boundary.offset, memory=self.memory)

    @property
    def _now(self) -> Checkpoint:
        assert self._coming is not None  # the reader returns nothing before a header
        return self._coming

    @property
    def _codec(self) -> str:
        return self.dialect.codec or "rle"

    def _forget(self) -> None:
        self._raw.clear()
        self._compressed.clear()
        self._announced.clear()
        self._payload = memoryview(b"")
        self._index = np.empty(0, dtype=np.int64)
        self._whole = None
        self._staged_bytes = 0
        self._format_b = False

    def _take_batch(self, event: events.Batch) -> None:
        coming = self._now
        with_data = HAS_DATA[event.types]
        pfns = event.pfns[with_data].astype(np.int64)
        coming.batches += 1
        coming.entries += len(event.pfns)
        coming.page_count += len(pfns)
        self._limit(coming.page_count, "checkpoint_entries", event)
        if len(pfns):
            coming.pfn_lists.append(pfns)
        if event.data is None:
            self._charge(0, event)
            self._format_b = True
        elif self.in_force is not None:
            self._charge(event.data.nbytes, event)
            self._raw.append((pfns, event.data))
        elif not self._verify_only:
            # No earlier checkpoint has to be preserved, so the first one's pages are written at once.
            self._home.write(self.memory, pfns, event.data)

    def _take_compressed(self, event: events.CompressedData) -> None:
        coming = self._now
        self._format_b = True
        coming.compressed_chunks += 1
        coming.compressed_bytes += len(event.data)
        self._charge(len(event.data), event)
        if len(event.data):
            self._compressed.append(event)
            self._announced.append(coming.page_count)

    def _charge(self, size: int, event: events.Event) -> None:
        self._staged_bytes += size + STAGED_COST_BYTES
        self._limit(self._staged_bytes, "checkpoint_bytes", event)

    def _limit(self, value: int, limit: str, event: events.Event) -> None:
        ceiling = getattr(self.reader.limits, limit)
        if value > ceiling:
            raise self._fail(
                LimitExceeded(
                    f"this checkpoint comes to {value}, over the limit {limit} of {ceiling}",
                    limit=limit,
                    offset=event.offset,
                    section="stream.md §1.4",
                )
            )

    def _stage(self, tail: events.Tail) -> None:
        coming = self._now
        coming.tail, coming.end = tail, tail.end
        if isinstance(tail, events.TailHvm) and tail.record is not None:
            coming.record = tail.record
            coming.epoch = tail.record.epoch
        if self._format_b:
            self._check_compressed(tail)
        if self._raw:
            self._home.reserve(np.concatenate([pfns for pfns, _ in self._raw]))
        if len(self._index):
            self._home.reserve(self._index)
        self.staged = coming

    def _check_compressed(self, tail: events.Tail) -> None:
        """Check every encoded page of the checkpoint, so that applying them cannot fail."""
        codec = get_codec(self._codec)
        parts = [event.data for event in self._compressed]
        joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.uint8), *parts])
        self._payload = memoryview(joined)
        self._index = np.concatenate([np.empty(0, dtype=np.int64), *self._now.pfn_lists])
        try:
            consumed = self._checked = codec.check(joined, len(self._index))
        except Malformed as error:
            raise self._fail(
                Malformed(
                    error.message,
                    offset=self._place(error.offset or 0, tail),
                    section=error.section,
                    chunk="COMPRESSED_DATA",
                )
            ) from None
        try:
            if consumed < len(joined):
                where = self._place(consumed, tail)
                self.reader.deviate("surplus-compressed-bytes", where, "stream.md §6.2", "COMPRESSED_DATA")
            if self.reader.strict:
                self._check_borders(joined, tail)
        except Malformed as error:
            raise self._fail(error) from None

    def _check_borders(self, joined: NDArray[np.uint8], tail: events.Tail) -> None:
        """Check rules that the reader does not need: a chunk holds whole pages, and they were announced before it."""
        codec = get_codec(self._codec)
        at = pages = 0
        for event, announced in zip(self._compressed, self._announced, strict=True):
            border = at + len(event.data)
            # The chunk holds as many pages as end within it: find the number by bisection.
            low, high = 0, min(len(self._index) - pages, len(event.data))
            while low < high:
                middle = (low + high + 1) // 2
                if codec.check(joined[at:], middle) <= len(event.data):
                    low = middle
                else:
                    high = middle - 1
            if codec.check(joined[at:], low) < len(event.data):
                self.reader.deviate("split-page", event.offset, "stream.md §6.2", "COMPRESSED_DATA")
            pages += low
            if pages > announced:
                self.reader.deviate("compressed-before-batch", event.offset, "stream.md §6.4", "COMPRESSED_DATA")
            at = border

    def _place(self, offset: int, tail: events.Tail) -> int:
        """The offset in the stream of a byte of the joined payloads."""
        head = 4 + (self.dialect.word or 8)
        for event in self._compressed:
            if offset < len(event.data):
                return event.offset + head + offset
            offset -= len(event.data)
        last = self._compressed[-1] if self._compressed else None
        return last.offset + head + len(last.data) if last else tail.offset

    def _fail(self, error: Malformed) -> Malformed:
        """Note that the stream cannot continue: the reader will raise the same error again."""
        self._forget()
        return self.reader.fail(error)
