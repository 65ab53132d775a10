"""Page batches to a stream: the page buffer, the reference and the codec (specs/stream.md §6, §9).

No I/O, no clock: `Sender.checkpoint` yields buffers, and the caller writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.kernels import CODINGS
from remus_ckpt.codec.reference import Reference, Shadow
from remus_ckpt.codec.scan import filled_pages, gather
from remus_ckpt.limits import MAX_BATCH_ENTRIES, MAX_BUFFER_PAGES
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import HAS_DATA, IS_PAGE_TABLE, KNOWN_TYPE, PAGE_SIZE, Buffer, PageBatch, Pages, Places, pages_for
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DigestName
from remus_ckpt.wire.parts import Parts
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE
from remus_ckpt.wire.xen.dialect import StreamCodec, Word
from remus_ckpt.wire.xen.writer import EventWriter

PAGE_BUFFER_PAGES = {coding.name: coding.page_buffer_pages for coding in CODINGS if coding.page_buffer_pages}
"""How many pages are compressed at a time."""


@dataclass(slots=True)
class Sent:
    """Summary of a checkpoint on the wire."""

    epoch: int
    batches: int = 0
    entries: int = 0
    pages: int = 0
    compressed_chunks: int = 0
    compressed_bytes: int = 0
    """Payloads of COMPRESSED_DATA."""
    stream_bytes: int = 0
    before: Position | None = None
    position: Position | None = None
    """The positions that the checkpoint follows and makes."""


@dataclass(slots=True)
class _PageBuffer:
    """Pages waiting to be compressed."""

    capacity: int
    count: int = 0
    pieces: list[tuple[NDArray[np.int64], NDArray[np.bool_], Pages]] = field(default_factory=list)
    """(PFNs, which of them are page tables, pages)"""


@dataclass(frozen=True, slots=True)
class InReference:
    """Normal pages of a first checkpoint that the reference holds already, which is a full `Shadow`.

    pfns: int64[n], ascending, n ≤ 1,024. The reference does not change until the checkpoint is committed
    """

    pfns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Normal pages that `Sender.encode` has encoded, and that are not written yet: at most a page buffer of them.

    pfns: int64[n]
    data: their batches and their COMPRESSED_DATA, as in the stream, uint8[…]
    payload_bytes: the last ones of data, the encoded pages
    """

    pfns: NDArray[np.int64]
    data: NDArray[np.uint8]
    payload_bytes: int


Scanned = PageBatch | InReference | Encoded
"""What the scan of a checkpoint yields."""


class Shape(Protocol):
    """What surrounds the pages in a stream that is not our own.

    leaves_zeros_out: whether the first checkpoint may leave out zero pages
    added_pages: how many pages memory has in the stream beyond those of the scans
    """

    leaves_zeros_out: bool
    added_pages: int

    def header(self, word: Word, p2m_size: int) -> list[events.Event]:
        """What precedes the first chunk."""

    def missing(self, seen: NDArray[np.bool_]) -> Iterator[PageBatch]:
        """Pages that the first checkpoint carries besides the scan's. seen: bool[p2m_size], those that came."""

    def closing(self, is_first: bool) -> list[events.Event]:
        """The chunks at the end of a body, without its id 0."""

    def tail(self, record: CheckpointRecord) -> events.Tail:
        """The tail; `record` is what a tail of our own would hold."""


class Ours:
    """Our own streams (specs/stream.md §9): HVM, with an empty context and a record, which `EventWriter.end` writes."""

    leaves_zeros_out = True
    added_pages = 0

    def header(self, word: Word, p2m_size: int) -> list[events.Event]:
        """The header alone."""
        return [events.Header(word=word, guest="hvm", p2m_size=p2m_size)]

    def missing(self, seen: NDArray[np.bool_]) -> Iterator[PageBatch]:
        """None: memory starts as zeros."""
        return iter(())

    def closing(self, is_first: bool) -> list[events.Event]:
        """ENABLE_COMPRESSION in the first checkpoint."""
        return [events.EnableCompression()] if is_first else []


class Sender:
    """Writes checkpoints of one memory as one save stream.

    p2m_size: pages of memory
    codec: "delta" or "rle"
    word: bytes of the toolstack's unsigned long in the stream, 8 or 4
    buffer_pages: pages in the page buffer; by default 8,196, and 8,192 for `rle`
    reference: what deltas are taken against; by default the sender's own full `Shadow`
    position: the position that the first checkpoint follows, None if it is the very first
    first_epoch: the number of the first checkpoint if it follows none
    digest: the digest in the stream's records; "sha256" makes version 1 records, which older programs read too
    shape: what surrounds the pages; by default the shape of our own streams
    """

    def __init__(
        self,
        p2m_size: int,
        *,
        codec: StreamCodec = "delta",
        word: Word = 8,
        buffer_pages: int | None = None,
        reference: Reference | None = None,
        position: Position | None = None,
        first_epoch: int = 0,
        digest: DigestName = DEFAULT_DIGEST,
        shape: Shape | None = None,
    ) -> None:
        if not 0 < p2m_size <= MAX_P2M_SIZE:
            raise ValueError(f"memory of {p2m_size} pages; a stream holds 1…{MAX_P2M_SIZE}")
        if codec not in PAGE_BUFFER_PAGES:
            raise ValueError(f"a stream holds {' or '.join(PAGE_BUFFER_PAGES)} pages, not {codec!r}")
        if buffer_pages is not None and not 1 <= buffer_pages <= MAX_BUFFER_PAGES:
            raise ValueError(f"a page buffer of {buffer_pages} pages; it has 1…{MAX_BUFFER_PAGES}")
        self._shape: Shape | Ours = shape or Ours()
        self.p2m_size = p2m_size + self._shape.added_pages
        """Pages of memory in the stream."""
        self.position = position
        """The position of the last checkpoint, None before the first."""
        self.sent: Sent | None = None
        """The summary of the last checkpoint."""
        self.owed: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Pages whose copies at the receiver differ from the reference: they must be in the next checkpoint."""
        self._first_epoch = first_epoch
        self._codec_name = codec
        self._codec = get_codec(codec)
        self._buffer_pages = buffer_pages or PAGE_BUFFER_PAGES[codec]
        self.reference: Reference = reference or Shadow(zeros(p2m_size))
        self.digest: DigestName = digest
        """The name of the stream's digest."""
        self._stream = EventWriter(word, digest)
        self._started = False
        self.unfinished = False
        """Whether a checkpoint was begun and not finished."""
        self.carried: list[NDArray[np.int64]] = []
        """Arrays int64[n]: the pages with data of the last, perhaps interrupted, checkpoint, in the order they came. A
        page is added before the reference changes. Each checkpoint has its own list."""

    @property
    def next_epoch(self) -> int:
        """The number of the next checkpoint."""
        return self._first_epoch if self.position is None else self.position.epoch + 1

    @property
    def buffer_pages(self) -> int:
        """The maximum number of pages for one call of `encode`."""
        return self._buffer_pages

    def most_bytes(self, pages: int) -> int:
        """The maximum number of bytes that this many pages take in one call of `encode`."""
        return self._stream.laid_out_bytes(pages) + pages * self._codec.max_page_bytes

    @property
    def pfns(self) -> NDArray[np.int64]:
        """int64[n]: the arrays of `carried`, joined."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.carried])

    def rewind(self, position: Position, pfns: NDArray[np.int64]) -> None:
        """Continue from a checkpoint of this stream that the receiver holds, although later ones were sent.

        position: of that checkpoint
        pfns: the pages of all later checkpoints, including one that was interrupted. The receiver's copies of them
            differ from the reference, so they are owed: the next checkpoint carries them in full.
        May be called again after an interrupt.
        """
        if self.sent is None:
            raise ValueError("no checkpoint was sent: start a new stream with a new sender")
        self.unfinished = True
        self._stream.abandon()
        self.position = position
        self.owed = np.union1d(self.owed, pfns)
        self.reference.invalidate(self.owed)
        self.unfinished = False

    def encode(self, pfns: NDArray[np.int64], places: Places, out: NDArray[np.uint8] | None = None) -> Encoded:
        """Encode normal pages of the current checkpoint in place, and update the reference.

        Called by the scan of a checkpoint that is not the first; the scan then yields the result, or withdraws it.

        pfns: int64[n], ascending, n ≤ `buffer_pages`
        places: where the pages are, in this order; writers may be active there, and what is encoded is what the
            reference then holds
        out: room for `most_bytes(n)`, which must not change until the checkpoint is committed; by default new
        Raises ValueError for pages that do not fit; nothing is changed then.
        """
        if not self._stream.compressing:
            raise ValueError("a first checkpoint carries its pages in full: give them as batches")
        if len(pfns) > self._buffer_pages or len(pfns) != sum(len(index) for _, index in places):
            raise ValueError(f"{len(pfns)} pfns for a page buffer of {self._buffer_pages} pages")
        if len(pfns) and int(pfns[-1]) >= self.p2m_size:
            raise ValueError(f"PFN {pfns[-1]:#x} in a memory of {self.p2m_size:#x} pages")
        room = np.empty(self.most_bytes(len(pfns)), dtype=np.uint8) if out is None else out
        self.carried.append(pfns)  # before the reference changes
        slots, full = self.reference.choose(pfns, np.zeros(len(pfns), dtype=bool))
        front = size = self._stream.laid_out_bytes(len(pfns))
        at = 0
        for pages, index in places:
            part = slice(at, at + len(index))
            size += len(
                self._codec.encode(
                    pages,
                    self.reference.pages,
                    index=index,
                    reference_index=slots[part],
                    full=full[part],
                    out=room[size:],
                )
            )
            at = part.stop
        self._stream.lay_out(pfns, size - front, room[:front])
        return Encoded(pfns, room[:size], size - front)

    def withdraw(self) -> None:
        """Discard what `encode` returned in this checkpoint, for instance because the pause was broken. The reference
        has those pages and the receiver does not, so they are owed.

        Called by the scan, before it yields anything.
        """
        self.owed = np.union1d(self.owed, self.pfns)
        self.reference.invalidate(self.owed)
        # In place, and last: who notes what an interrupted checkpoint carried has this very list.
        self.carried.clear()

    def checkpoint(
        self,
        scan: Iterable[Scanned],
        *,
        device_state: bytes | Callable[[], bytes] = b"",
        parts: Callable[[], Parts] | None = None,
        time_ns: int | None = None,
        position: Position | None = None,
        memory_bytes: int | None = None,
    ) -> Iterator[list[Buffer]]:
        """Yield the buffers of one checkpoint, in groups for vectored sends; the caller must take them all.

        scan: the dirty pages, in batches or already encoded, in the order in which to send them. It is consumed as
            buffers are taken: a list holds the whole capture; a generator that captures as it goes needs memory for
            only one page buffer, but waits while that is encoded and written
        device_state: the user's bytes, which come back with the checkpoint; or a callable that returns them, called
            once the scan has ended
        parts: returns everything that goes with memory, called once the scan has ended; replaces `device_state`
        time_ns: when it was taken, in nanoseconds since 1970
        position: the position that this state already has, if it is being re-encoded; by default a new one is made
        memory_bytes: the size of memory, if it ends within its last page

        Raises ValueError for pages that do not fit. If the caller stops before the end, the receiver has half a
        checkpoint: the sender then refuses to continue, and a new stream needs a new sender.
        """
        if self.unfinished:
            raise ValueError("the previous checkpoint was not finished; start a new stream with a new sender")
        own_pages = self.p2m_size - self._shape.added_pages
        if memory_bytes is not None and pages_for(memory_bytes) != own_pages:
            raise ValueError(f"memory of {memory_bytes} bytes does not end in the last of {own_pages} pages")
        epoch = self.next_epoch
        if position is not None:
            if self.position is not None and position.epoch != epoch:
                raise ValueError(f"position {position} behind {self.position}")
            epoch = position.epoch
        self.unfinished = True
        self.carried = []
        sent = Sent(epoch, before=self.position)
        begin = self._stream.offset
        is_first = not self._started
        stated = None if memory_bytes == self.p2m_size * PAGE_SIZE else memory_bytes
        # Now, because after the scan somebody waits for it.
        ending = self._stream.prepare_end(
            epoch=epoch, time_ns=time_ns, codec=self._codec_name, before=self.position, memory_bytes=stated
        )
        if is_first:
            self._started = True
            for opening in self._shape.header(self._stream.word, self.p2m_size):
                yield self._stream.write(opening)
        if self._stream.compressing:
            yield from self._compressed_body(scan, sent)
        else:
            yield from self._raw_body(scan, sent, is_first)
        closing: list[Buffer] = []
        for event in self._shape.closing(is_first):
            closing += self._stream.write(event)
        if len(self.owed) and len(left_out := np.setdiff1d(self.owed, self.pfns)):
            raise ValueError(f"the scan leaves out {len(left_out)} pages that are owed, PFN {left_out[0]:#x} first")
        if parts is not None:
            state = parts().pack()
        else:
            state = device_state() if callable(device_state) else device_state
        if isinstance(self._shape, Ours):
            end, after = self._stream.end(ending, state, position)
            closing += end
        else:
            closing += self._stream.write(events.EndOfBody())
            after = position or Position.after(
                self.position, self._stream.digest(), state, first_epoch=self._first_epoch, digest=self.digest
            )
            record = CheckpointRecord(
                epoch=epoch,
                time_ns=time_ns,
                codec=self._codec_name,
                before=self.position,
                after=after,
                device_state=state,
                memory_bytes=stated,
                digest=self.digest,
            )
            closing += self._stream.write(self._shape.tail(record))
        sent.stream_bytes = self._stream.offset - begin
        sent.position = after
        yield closing
        # Only now: if the last bytes cannot be sent, the checkpoint that they close must still be undone.
        self.position = after
        self.sent = sent
        self.owed = np.empty(0, dtype=np.int64)
        self.unfinished = False

    def _raw_body(self, scan: Iterable[Scanned], sent: Sent, is_first: bool) -> Iterator[list[Buffer]]:
        seen = np.zeros(self.p2m_size, dtype=bool)
        for full_batch in scan:
            if isinstance(full_batch, InReference):
                yield self._write_held(full_batch.pfns, seen, sent)
                continue
            assert isinstance(full_batch, PageBatch)  # `encode` refuses to make the other
            self._validate(full_batch)
            batch = _without_blank(full_batch, seen) if is_first and self._shape.leaves_zeros_out else full_batch
            if not len(batch.pfns):
                continue
            pfns = batch.pfns[HAS_DATA[batch.types]].astype(np.int64)
            seen[pfns] = True
            self.carried.append(pfns)
            if len(self.reference.pages) == self.p2m_size:
                expect(self.reference.pages, pfns)
            self.reference.sent_raw(pfns, batch.data)
            self._count(sent, len(batch.pfns), len(batch.data))
            yield self._stream.write(events.Batch(pfns=batch.pfns, types=batch.types, data=batch.data))
        for batch in self._shape.missing(seen) if is_first else ():
            # They are zeros, as what the reference starts with, so it need not hear of them.
            self._count(sent, len(batch.pfns), len(batch.data))
            yield self._stream.write(events.Batch(pfns=batch.pfns, types=batch.types, data=batch.data))

    def _compressed_body(self, scan: Iterable[Scanned], sent: Sent) -> Iterator[list[Buffer]]:
        waiting = _PageBuffer(self._buffer_pages)
        for batch in scan:
            if isinstance(batch, Encoded):
                if waiting.count:
                    yield self._compress(waiting, sent)
                yield self._write_encoded(batch, sent)
                continue
            assert isinstance(batch, PageBatch)  # the others belong to a first checkpoint
            self._validate(batch)
            with_data = HAS_DATA[batch.types]
            places = np.flatnonzero(with_data)
            first = page = 0
            while first < len(batch.pfns):
                # A batch that would overfill the buffer is split before the first page that does not fit (§6.3).
                room = waiting.capacity - waiting.count
                stop = int(places[page + room]) if len(places) - page > room else len(batch.pfns)
                part = with_data[first:stop]
                data = batch.data[page : page + int(np.count_nonzero(part))]
                pfns, types = batch.pfns[first:stop], batch.types[first:stop]
                self._wait(waiting, pfns[part].astype(np.int64), IS_PAGE_TABLE[types[part]], data)
                self._count(sent, stop - first, len(data))
                yield self._stream.write(events.Batch(pfns=pfns, types=types, data=None))
                first, page = stop, page + len(data)
                if waiting.count == waiting.capacity:
                    yield self._compress(waiting, sent)
        if waiting.count:
            yield self._compress(waiting, sent)

    def _write_held(self, pfns: NDArray[np.int64], seen: NDArray[np.bool_], sent: Sent) -> list[Buffer]:
        if not len(pfns):
            return []
        first, stop = int(pfns[0]), int(pfns[-1]) + 1
        is_whole = stop - first == len(pfns)
        data = self.reference.pages[first:stop] if is_whole else gather(self.reference.pages, pfns)
        # Memory starts as zeros (specs/stream.md §9.1).
        kept = filled_pages(data)
        if len(kept) < len(pfns):
            pfns, data = pfns[kept], gather(data, kept)
            if not len(pfns):
                return []
        self.carried.append(pfns)
        seen[pfns] = True
        self._count(sent, len(pfns), len(data))
        types = np.zeros(len(pfns), dtype=np.uint8)
        return self._stream.write(events.Batch(pfns=pfns.astype(np.uint64), types=types, data=data))

    def _write_encoded(self, encoded: Encoded, sent: Sent) -> list[Buffer]:
        if not (count := len(encoded.pfns)):
            return []
        sent.batches += -(-count // MAX_BATCH_ENTRIES)
        sent.entries += count
        sent.pages += count
        sent.compressed_chunks += 1
        sent.compressed_bytes += encoded.payload_bytes
        return self._stream.write_laid_out(encoded.data)

    def _write_compressed(self, data: NDArray[np.uint8], sent: Sent) -> list[Buffer]:
        sent.compressed_chunks += 1
        sent.compressed_bytes += len(data)
        return self._stream.write(events.CompressedData(data=data))

    def _wait(self, waiting: _PageBuffer, pfns: NDArray[np.int64], tables: NDArray[np.bool_], data: Pages) -> None:
        # Page tables leave the reference when they are added, before any page of this buffer is looked up: as in Xen.
        self.reference.invalidate(pfns[tables])
        self.carried.append(pfns)
        waiting.pieces.append((pfns, tables, data))
        waiting.count += len(data)

    def _compress(self, waiting: _PageBuffer, sent: Sent) -> list[Buffer]:
        out = np.empty(waiting.count * self._codec.max_page_bytes, dtype=np.uint8)
        size = 0
        for numbers, tables, data in waiting.pieces:
            slots, full = self.reference.choose(numbers, tables)
            size += len(
                self._codec.encode(data, self.reference.pages, reference_index=slots, full=full, out=out[size:])
            )
        waiting.count = 0
        waiting.pieces.clear()
        return self._write_compressed(out[:size], sent)

    def _validate(self, batch: PageBatch) -> None:
        if (batch.types > 0xF).any() or not KNOWN_TYPE[batch.types].all():
            raise ValueError(f"page types {sorted(set(batch.types.tolist()))}: 5 to 7 and those above 15 mean nothing")
        pfns = batch.pfns[HAS_DATA[batch.types]]
        if len(pfns) and int(pfns.max()) >= self.p2m_size:
            raise ValueError(f"PFN {pfns.max():#x} in a memory of {self.p2m_size:#x} pages")

    @staticmethod
    def _count(sent: Sent, entries: int, pages: int) -> None:
        sent.batches += 1
        sent.entries += entries
        sent.pages += pages


def _without_blank(batch: PageBatch, seen: NDArray[np.bool_]) -> PageBatch:
    """A batch of the first checkpoint without its zero pages: memory starts as zeros (specs/stream.md §9.1).

    seen: bool[p2m_size], the pages sent before in this checkpoint, which must be sent again if they are zeros now
    """
    with_data = HAS_DATA[batch.types]
    pfns = batch.pfns[with_data].astype(np.int64)
    keep = seen[pfns]
    keep[filled_pages(np.ascontiguousarray(batch.data))] = True
    # If a page occurs twice in this batch, the later copy may blank the earlier one.
    keep |= np.isin(pfns, pfns[keep])
    if keep.all():
        return batch
    entries = ~with_data
    entries[with_data] = keep
    return PageBatch(batch.pfns[entries], batch.types[entries], gather(batch.data, np.flatnonzero(keep)))
