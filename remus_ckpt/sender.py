"""Page batches to a stream: the page buffer, the reference and the codec (specs/stream.md §6, §9).

No I/O, no clock: `Sender.checkpoint` yields buffers, and the caller writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.kernels import CODINGS
from remus_ckpt.codec.reference import Reference, Shadow
from remus_ckpt.limits import MAX_BUFFER_PAGES
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import HAS_DATA, IS_PAGE_TABLE, KNOWN_TYPE, PAGE_SIZE, Buffer, PageBatch, Pages, pages_for
from remus_ckpt.wire.parts import Parts
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE, Signature
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


class Sender:
    """Writes checkpoints of one memory as one of our save streams: HVM, with an empty context.

    p2m_size: pages of memory
    codec: "delta" or "rle"
    word: bytes of the toolstack's unsigned long in the stream, 8 or 4
    buffer_pages: pages in the page buffer; by default 8,196, and 8,192 for `rle`
    reference: what deltas are taken against; by default the sender's own full `Shadow`
    position: the position that the first checkpoint follows, None if it is the very first
    first_epoch: the number of the first checkpoint if it follows nothing
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
    ) -> None:
        if not 0 < p2m_size <= MAX_P2M_SIZE:
            raise ValueError(f"memory of {p2m_size} pages; a stream holds 1…{MAX_P2M_SIZE}")
        if codec not in PAGE_BUFFER_PAGES:
            raise ValueError(f"a stream holds {' or '.join(PAGE_BUFFER_PAGES)} pages, not {codec!r}")
        if buffer_pages is not None and not 1 <= buffer_pages <= MAX_BUFFER_PAGES:
            raise ValueError(f"a page buffer of {buffer_pages} pages; it has 1…{MAX_BUFFER_PAGES}")
        self.p2m_size = p2m_size
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
        self._stream = EventWriter(word)
        self._started = False
        self.unfinished = False
        """Whether a checkpoint was begun and not taken to its end."""
        self.carried: list[NDArray[np.int64]] = []
        """Arrays int64[n]: the pages with data of the last, perhaps interrupted, checkpoint, in the order they came. A
        page is added before the reference changes. Each checkpoint has its own list."""

    @property
    def next_epoch(self) -> int:
        """The number of the next checkpoint."""
        return self._first_epoch if self.position is None else self.position.epoch + 1

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
            raise ValueError("no checkpoint was sent: begin a new stream with a new sender")
        self.unfinished = True
        self._stream.abandon()
        self.position = position
        self.owed = np.union1d(self.owed, pfns)
        self.reference.invalidate(self.owed)
        self.unfinished = False

    def checkpoint(
        self,
        scan: Iterable[PageBatch],
        *,
        device_state: bytes | Callable[[], bytes] = b"",
        parts: Callable[[], Parts] | None = None,
        time_ns: int | None = None,
        position: Position | None = None,
        memory_bytes: int | None = None,
    ) -> Iterator[list[Buffer]]:
        """The buffers of one checkpoint, in groups for vectored sends; the caller must take them all.

        scan: the dirty pages in batches, in the order in which to send them. Batches are drawn as buffers are taken: a
            list holds the whole capture; a generator that captures as it goes needs memory for one page buffer only,
            but waits while that is encoded and written.
        device_state: the user's bytes, which come back with the checkpoint; or a callable that returns them, called
            once the scan has ended
        parts: returns everything that goes with memory, called once the scan has ended; replaces `device_state`
        time_ns: when it was taken, in nanoseconds since 1970
        position: the position that this state already has, if it is being re-encoded; by default a new one is made
        memory_bytes: how many bytes memory has, if it ends within its last page

        Raises ValueError for pages that do not fit. If the caller stops before the end, the receiver has half a
        checkpoint: the sender then refuses to continue, and a new stream needs a new sender.
        """
        if self.unfinished:
            raise ValueError("the checkpoint before was not taken to its end; begin a new stream with a new sender")
        if memory_bytes is not None and pages_for(memory_bytes) != self.p2m_size:
            raise ValueError(f"memory of {memory_bytes} bytes does not end in the last of {self.p2m_size} pages")
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
        if is_first:
            self._started = True
            yield self._stream.write(events.Header(word=self._stream.word, guest="hvm", p2m_size=self.p2m_size))
        if self._stream.compressing:
            yield from self._compressed_body(scan, sent)
        else:
            yield from self._raw_body(scan, sent)
        closing: list[Buffer] = []
        if is_first:
            closing += self._stream.write(events.EnableCompression())
        closing += self._stream.write(events.EndOfBody())
        if len(self.owed) and len(left_out := np.setdiff1d(self.owed, self.pfns)):
            raise ValueError(f"the scan leaves out {len(left_out)} pages that are owed, PFN {left_out[0]:#x} first")
        if parts is not None:
            state = parts().pack()
        else:
            state = device_state() if callable(device_state) else device_state
        after = position or Position.after(self.position, self._stream.digest(), state, first_epoch=self._first_epoch)
        record = CheckpointRecord(
            epoch=epoch,
            time_ns=time_ns,
            codec=self._codec_name,
            before=self.position,
            after=after,
            device_state=state,
            memory_bytes=None if memory_bytes == self.p2m_size * PAGE_SIZE else memory_bytes,
        )
        closing += self._stream.write(
            events.TailHvm(magic_pfns=(0, 0, 0), context=b"", signature=Signature.REMUS, record=record)
        )
        sent.stream_bytes = self._stream.offset - begin
        sent.position = after
        yield closing
        # Only now: if the last bytes cannot be sent, the checkpoint that they close must still be undone.
        self.position = after
        self.sent = sent
        self.owed = np.empty(0, dtype=np.int64)
        self.unfinished = False

    def _raw_body(self, scan: Iterable[PageBatch], sent: Sent) -> Iterator[list[Buffer]]:
        seen = np.zeros(self.p2m_size, dtype=bool)
        for full_batch in scan:
            self._validate(full_batch)
            batch = _without_blank(full_batch, seen)
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

    def _compressed_body(self, scan: Iterable[PageBatch], sent: Sent) -> Iterator[list[Buffer]]:
        waiting = _PageBuffer(self._buffer_pages)
        for batch in scan:
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
        sent.compressed_chunks += 1
        sent.compressed_bytes += size
        return self._stream.write(events.CompressedData(data=out[:size]))

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
    keep = batch.data.view(np.uint64).any(axis=1) | seen[pfns]
    # If a page occurs twice in this batch, the later copy may blank the earlier one.
    keep |= np.isin(pfns, pfns[keep])
    if keep.all():
        return batch
    entries = ~with_data
    entries[with_data] = keep
    return PageBatch(batch.pfns[entries], batch.types[entries], batch.data[keep])
