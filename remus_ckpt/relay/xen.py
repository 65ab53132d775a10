"""Pieces to Xen's streams: v2, the legacy one, and our own (specs/formats.md §9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, Buffer, PageBatch, Pages, PageType
from remus_ckpt.plural import counted
from remus_ckpt.relay.guest import (
    END_WITHIN_A_PAGE,
    Before,
    Head,
    Losses,
    Moment,
    Piece,
    extended_info,
    name_losses,
    stored_pages,
)
from remus_ckpt.relay.home import LateHome
from remus_ckpt.sender import Sender
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen import events, physmap, v2
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.dialect import StreamCodec, Word
from remus_ckpt.wire.xen.v2 import Kind
from remus_ckpt.wire.xen.v2_writer import V2Writer
from remus_ckpt.xen_start import (
    EMPTY_CONTEXT,
    MAGIC_PAGES,
    NO_CONTEXT,
    NO_DEVICE_STATE,
    blank_pages,
    device_record,
    magic_pfns,
)

_IN_V2 = frozenset(
    {"HVM context", "HVM parameters", "virtual CPUs", "shared info", "page types", "time stamp counter's mode"}
)
_IN_OURS = frozenset({"device state", "position in a history", END_WITHIN_A_PAGE})
_IN_LEGACY = _IN_V2 | {"device state", "HVM parameters", "toolstack's data"}

Write = Callable[[list[Buffer]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class XenOptions:
    """How a stream of Xen's is to be written.

    libxl: v2: with libxl's layer, so that it holds the device state
    for_xen: so that a real Xen starts it (specs/formats.md §10)
    hvm_context: replaces the source's, None: as in the source
    codec: of later checkpoints; None: uncompressed
    """

    libxl: bool = False
    for_xen: bool = False
    hvm_context: bytes | None = None
    codec: StreamCodec | None = None


class V2Target:
    """A v2 stream. write: takes the buffers; `run` draws the pieces."""

    def __init__(self, write: Write, losses: Losses, options: XenOptions) -> None:
        self._write = write
        self._losses = losses
        self._options = options
        self._writer = V2Writer()
        self._head = Head(format="")
        self._seen: NDArray[np.bool_] = np.empty(0, dtype=bool)
        self._series = False  # a CHECKPOINT has been written
        self._said_no_context = False
        self._magic: tuple[int, int, int] | None = None  # of its own

    def run(self, pieces: Iterator[Piece]) -> Iterator[Moment]:
        """Write the stream; yields each moment once it is written."""
        for piece in pieces:
            match piece:
                case Head():
                    self._begin(piece)
                case PageBatch():
                    self._pages(piece)
                case Moment():
                    self._close(piece)
                    yield piece

    def _put(self, event: events.Event) -> None:
        self._write(self._writer.write(event))

    def _record(self, kind: Kind, data: bytes = b"") -> None:
        self._put(v2.Record(kind=kind, data=data))

    def _begin(self, head: Head) -> None:
        if head.guest is None:
            head = replace(head, guest="hvm")
        self._head = head
        image = head.image or v2.ImageHeader(guest=head.guest or "hvm")
        if head.file_header is not None:
            if self._options.libxl and head.file_header.kind in ("xl", "libvirt"):
                self._put(head.file_header)
            else:
                self._losses.name("configuration", f"{head.file_header.kind}, {len(head.file_header.data):,} bytes")
        if self._options.libxl:
            is_converted = head.image is None
            self._put(v2.LibxlHeader(options=v2.LIBXL_CONVERTED if is_converted else 0))
            self._record(Kind.LIBXC_CONTEXT)
        self._put(image)
        if head.pv is not None:
            self._put(v2.PvInfo(width=head.pv.width, levels=head.pv.levels))
        if image.version > 2:
            for kind, data in head.policies.items():
                self._record(kind, data)
            self._record(Kind.STATIC_DATA_END)
        if head.pv is not None:
            assert head.pages is not None  # every source of a PV guest knows it
            self._put(v2.P2mFrames(first=0, last=head.pages - 1, pfns=head.pv.frames))

    def _pages(self, batch: PageBatch) -> None:
        pfns, types, data = batch.pfns, batch.types, batch.data
        if not len(pfns):
            return
        top = int(pfns.max()) + 1
        if top > len(self._seen):
            larger = np.zeros(max(top, len(self._seen) * 5 // 4), dtype=bool)
            larger[: len(self._seen)] = self._seen
            self._seen = larger
        self._seen[pfns.astype(np.int64)] = True
        pinned = types == PageType.NOTAB_PINNED
        if pinned.any():
            self._losses.name("pins of normal pages", f"{counted(int(np.count_nonzero(pinned)), 'page')} or more")
            types = np.where(pinned, np.uint8(PageType.NOTAB), types)
        if len(np.unique(pfns)) != len(pfns):
            pfns, types, data = _once_each(pfns, types, data)
        self._put(events.Batch(pfns=pfns, types=types, data=data))

    def _close(self, moment: Moment) -> None:
        libxl = self._options.libxl
        holds = set(_IN_V2)
        if libxl or moment.is_last:
            holds.add("device state")
        if libxl and moment.xenstore is not None:
            holds.add("toolstack's data")
        if "device state" not in holds and moment.device_state:
            self._losses.name("device state of earlier checkpoints", f"{len(moment.device_state):,} bytes")
        name_losses(self._losses, moment, frozenset(holds | {"device state"}))
        is_hvm = self._head.guest == "hvm"
        if is_hvm and not self._series:
            self._first_pages(moment)
        if moment.tsc is not None:
            self._put(moment.tsc)
        if is_hvm:
            self._hvm(moment)
        else:
            self._pv(moment)
        if not moment.is_last or self._series:
            if libxl:
                raise ValueError("with libxl's layer, a file holds only one checkpoint")
            self._record(Kind.CHECKPOINT)
            self._series = True
        if not moment.is_last:
            return
        self._record(Kind.END)
        state = moment.device_state
        if is_hvm and self._options.for_xen and device_record(state) != state:
            if state:
                self._losses.name("device state, which is not QEMU's", f"{len(state):,} bytes")
            self._losses.say(NO_DEVICE_STATE)
            state = device_record(state)
        if libxl:
            if moment.xenstore:
                self._put(v2.Emulator(kind=Kind.EMULATOR_XENSTORE_DATA, data=moment.xenstore))
            if is_hvm:
                self._put(v2.Emulator(kind=Kind.EMULATOR_CONTEXT, data=state))
            self._record(Kind.LIBXL_END)
        elif is_hvm and state:
            self._put(v2.DeviceModel(data=state))

    def _first_pages(self, moment: Moment) -> None:
        """Pages that never came and are there all the same, and the end of memory."""
        pages = moment.pages
        seen = np.zeros(pages, dtype=bool)
        seen[: len(self._seen)] = self._seen[:pages]
        missing = np.flatnonzero(moment.present & ~seen)
        if self._options.for_xen and not any(moment.magic_pfns):
            missing = np.append(missing, np.arange(pages, pages + MAGIC_PAGES))
            self._magic = magic_pfns(pages + MAGIC_PAGES)
        for batch in blank_pages(missing, with_data=self._options.for_xen):
            self._pages(batch)
        if pages and not self._seen[pages - 1 :].any():
            # The highest page that a v2 stream names is where memory ends.
            last, absent = np.array([pages - 1], dtype=np.uint64), np.array([PageType.XTAB], dtype=np.uint8)
            self._pages(PageBatch(last, absent, np.empty((0, PAGE_SIZE), dtype=np.uint8)))

    def _hvm(self, moment: Moment) -> None:
        magic = self._magic or moment.magic_pfns
        values = [(v2.parameter_number(name), value) for name, value in moment.parameters.items()]
        values += [(number, pfn) for number, pfn in zip(v2.MAGIC_PARAMETERS, magic, strict=True) if pfn]
        if values:
            self._put(v2.HvmParams(values=tuple(values)))
        context = self._options.hvm_context or moment.context
        if not context and not self._said_no_context:
            self._said_no_context = True
            self._losses.say(NO_CONTEXT)
        self._record(Kind.HVM_CONTEXT, context or EMPTY_CONTEXT)

    def _pv(self, moment: Moment) -> None:
        for vcpu in moment.vcpus:
            parts = {
                Kind.X86_PV_VCPU_BASIC: vcpu.context,
                Kind.X86_PV_VCPU_EXTENDED: vcpu.extended,
                Kind.X86_PV_VCPU_XSAVE: None if vcpu.xsave_size is None else vcpu.xsave,
                Kind.X86_PV_VCPU_MSRS: moment.vcpu_msrs.get(vcpu.id),
            }
            for kind, data in parts.items():
                if data is not None:
                    self._put(v2.VcpuState(kind=kind, vcpu=vcpu.id, data=data))
        if moment.shared_info:
            self._record(Kind.SHARED_INFO, moment.shared_info)


def _once_each(
    pfns: NDArray[np.uint64], types: NDArray[np.uint8], data: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint8]]:
    """Entries without those that a later one of the same page replaces."""
    _, backward = np.unique(pfns[::-1], return_index=True)
    keep = np.zeros(len(pfns), dtype=bool)
    keep[len(pfns) - 1 - backward] = True
    return pfns[keep], types[keep], data[keep[HAS_DATA[types]]]


class _Relayed:
    """The shape of a legacy stream that says what its source says."""

    leaves_zeros_out = False

    def __init__(self, head: Head, losses: Losses, options: XenOptions, added_pages: int) -> None:
        self.added_pages = added_pages
        self.moment: Moment | None = None
        """The moment that closes the checkpoint being written."""
        self._head = head
        self._losses = losses
        self._options = options
        self._magic: tuple[int, int, int] | None = None
        self._said: set[str] = set()

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._losses.say(text)

    @property
    def _now(self) -> Moment:
        assert self.moment is not None
        return self.moment

    def header(self, word: Word, p2m_size: int) -> list[events.Event]:
        """The source's file header, if the legacy stream has such a one, and the header."""
        head = self._head
        found: list[events.Event] = []
        if head.file_header is not None:
            flags = head.file_header.mandatory_flags & ~v2.XL_STREAM_V2
            found.append(replace(head.file_header, mandatory_flags=flags))
        guest = head.guest or "hvm"
        extended = None if head.pv is None else head.pv.extended or None
        frames = None if head.pv is None else head.pv.frames
        found.append(
            events.Header(word=word, guest=guest, p2m_size=p2m_size, extended_info=extended, p2m_frames=frames)
        )
        return found

    def missing(self, seen: NDArray[np.bool_]) -> Iterator[PageBatch]:
        """Pages that never came and are there all the same."""
        moment = self._now
        present = np.zeros(len(seen), dtype=bool)
        present[: moment.pages] = moment.present
        present[moment.pages :] = True
        if len(seen) > moment.pages:
            self._magic = magic_pfns(len(seen))
        return blank_pages(np.flatnonzero(present & ~seen), with_data=self._options.for_xen)

    def closing(self, is_first: bool) -> list[events.Event]:
        """Virtual CPUs, parameters and the rest, in Xen's order."""
        moment, found = self._now, list[events.Event]()
        if moment.tsc is not None and is_first:
            found.append(moment.tsc)
        if (vcpus := _vcpu_info(moment)) is not None:
            found.append(vcpus)
        for name, value in moment.parameters.items():
            chunk = v2.PARAMETER_CHUNKS.get(v2.parameter_number(name))
            if chunk is None:
                self._losses.name(f"HVM parameter {name}", f"{value:#x}")
            elif value:
                found.append(events.HvmParam(id=chunk, value=value))
        if (toolstack := self._toolstack(moment)) is not None:
            found.append(events.Toolstack(data=toolstack))
        if is_first and moment.is_last:
            found.append(events.LastCheckpoint())
        elif is_first and self._options.codec is not None:
            found.append(events.EnableCompression())
        return found

    def _toolstack(self, moment: Moment) -> bytes | None:
        if moment.toolstack is not None or moment.xenstore is None:
            return moment.toolstack
        made = physmap.to_toolstack(moment.xenstore, self._head.word)
        if made is None:
            self._losses.name("toolstack's data", f"{len(moment.xenstore):,} bytes")
        return made

    def tail(self, record: CheckpointRecord) -> events.Tail:
        """The source's tail."""
        moment = self._now
        if self._head.guest == "pv":
            return events.TailPv(unmapped=moment.unmapped, vcpus=self._vcpus(moment), shared_info=moment.shared_info)
        context = self._options.hvm_context or moment.context
        state = moment.device_state
        if self._options.for_xen:
            if not context:
                self._say_once(NO_CONTEXT)
                context = EMPTY_CONTEXT
            if device_record(state) != state:
                if state:
                    self._losses.name("device state, which is not QEMU's", f"{len(state):,} bytes")
                self._say_once(NO_DEVICE_STATE)
                state = device_record(state)
        return events.TailHvm(
            magic_pfns=self._magic or moment.magic_pfns, context=context, signature=Signature.XL, device_state=state
        )

    def _vcpus(self, moment: Moment) -> tuple[events.VcpuContext, ...]:
        """The virtual CPUs in the form that the header announces, which is the same for all."""
        pv = self._head.pv
        assert pv is not None
        blocks = {block.id: block.data for block in pv.extended or ()}
        has_extended = b"extv" in blocks
        size = int.from_bytes(blocks[b"xcnt"], "little") - 16 if b"xcnt" in blocks else None
        found = []
        for vcpu in moment.vcpus:
            mask = vcpu.xsave_mask or 0
            found.append(
                replace(
                    vcpu,
                    extended=(vcpu.extended or bytes(128)) if has_extended else None,
                    xsave_mask=None if size is None else mask,
                    xsave_size=size,
                    xsave=b"" if size is None else vcpu.xsave.ljust(size, b"\0"),
                )
            )
        return tuple(found)


def _vcpu_info(moment: Moment) -> events.VcpuInfo | None:
    """VCPU_INFO: the source's own, or as the virtual CPUs of the tail say."""
    if moment.vcpu_info is not None or not moment.vcpus:
        return moment.vcpu_info
    numbers = [vcpu.id for vcpu in moment.vcpus]
    words = [0] * (max(numbers) // 64 + 1)
    for number in numbers:
        words[number // 64] |= 1 << number % 64
    return events.VcpuInfo(highest_id=max(numbers), online=tuple(words))


class _Earlier:
    """A sender's reference that holds the pages of a moment as they were before it; the receiver has them all."""

    def __init__(self) -> None:
        self.pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        self._pfns = np.empty(0, dtype=np.int64)

    def load(self, before: Before) -> None:
        """The pages that the coming checkpoint is taken against."""
        self._pfns, self.pages = before.pfns, before.pages

    def sent_raw(self, pfns: NDArray[np.int64], data: Pages) -> None:
        """Does nothing: the source has them."""

    def invalidate(self, pfns: NDArray[np.int64]) -> None:
        """Does nothing: no page table is among the pages."""

    def choose(self, pfns: NDArray[np.int64], tables: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The places of the pages; those without one, and page tables, go full."""
        slots = np.searchsorted(self._pfns, pfns)
        full = tables | (slots == len(self._pfns))
        full[~full] = self._pfns[slots[~full]] != pfns[~full]
        return np.where(full, -1, slots), full


class LegacyTarget:
    """A legacy stream, or one of ours. write: takes the buffers; `run` draws the pieces.

    home: where the source restores its memory
    is_ours: our own stream, which holds memory, its user's device state and the position
    """

    def __init__(self, write: Write, home: LateHome, losses: Losses, options: XenOptions, *, is_ours: bool) -> None:
        self._write = write
        self._home = home
        self._losses = losses
        self._options = options
        self._is_ours = is_ours
        self._earlier = _Earlier()

    def run(self, pieces: Iterator[Piece]) -> Iterator[Moment]:
        """Write the stream; yields each moment once it is written."""
        head = next(pieces, None)
        if not isinstance(head, Head):
            return
        if self._is_ours and head.file_header is not None:
            self._losses.name("configuration", f"{head.file_header.kind}, {len(head.file_header.data):,} bytes")
        for kind, data in head.policies.items():
            self._losses.name(kind.name, f"{len(data):,} bytes")
        is_open = head.pages is None or (head.pv is not None and head.pv.extended is None)
        # A position, and whether the source has magic PFNs, is only known behind the pages too.
        if is_open or self._is_ours or (self._options.for_xen and head.magic_pfns is None):
            self._home.need()
            yield from self._from_memory(head, pieces)
        else:
            yield from self._as_they_come(head, pieces)

    def _from_memory(self, head: Head, pieces: Iterator[Piece]) -> Iterator[Moment]:
        """The pages of each checkpoint when all is known about it."""
        sender: Sender | None = None
        for moment in pieces:
            if isinstance(moment, Before):
                self._earlier.load(moment)
            if not isinstance(moment, Moment):
                continue
            if sender is None:
                pv = head.pv
                if pv is not None and pv.extended is None:
                    pv = replace(pv, extended=extended_info(moment, pv))
                head = replace(head, pages=moment.pages, magic_pfns=moment.magic_pfns, pv=pv)
                sender, shape = self._sender(head, moment)
            if shape is not None:
                shape.moment = moment
                name_losses(self._losses, moment, _IN_LEGACY)
                self._send(sender, stored_pages(moment), moment)
            else:
                name_losses(self._losses, moment, _IN_OURS)
                # Memory starts as zeros, and to read a hole in a tmpfs takes a page of it.
                filled = self._home.has_room if moment.pfns is None else None
                self._send(sender, map(_plain, stored_pages(moment, filled)), moment)
            yield moment

    def _as_they_come(self, head: Head, pieces: Iterator[Piece]) -> Iterator[Moment]:
        sender, shape = self._sender(head, None)
        assert shape is not None
        moment: Moment | None = None

        def scan() -> Iterator[PageBatch]:
            nonlocal moment
            for piece in pieces:
                if isinstance(piece, PageBatch):
                    yield piece
                elif isinstance(piece, Before):
                    self._earlier.load(piece)
                elif isinstance(piece, Moment):
                    moment = shape.moment = piece
                    name_losses(self._losses, piece, _IN_LEGACY)
                    return
            raise _NoMoment

        while moment is None or not moment.is_last:
            try:
                self._send(sender, scan(), None)
            except _NoMoment:
                return
            assert moment is not None
            yield moment

    def _sender(self, head: Head, moment: Moment | None) -> tuple[Sender, _Relayed | None]:
        """moment: the first one, where it is known already."""
        assert head.pages is not None
        options = self._options
        reference = self._earlier
        if self._is_ours:
            before = None if moment is None or moment.record is None else moment.record.before
            codec = options.codec or "delta"
            return Sender(head.pages, codec=codec, word=head.word, reference=reference, position=before), None
        needs_magic = options.for_xen and head.guest != "pv" and not any(head.magic_pfns or ())
        shape = _Relayed(head, self._losses, options, MAGIC_PAGES if needs_magic else 0)
        return Sender(head.pages, codec=options.codec or "rle", word=head.word, reference=reference, shape=shape), shape

    def _send(self, sender: Sender, scan: Iterator[PageBatch], moment: Moment | None) -> None:
        record = None if moment is None or not self._is_ours else moment.record
        for group in sender.checkpoint(
            scan,
            device_state=b"" if moment is None else moment.device_state,
            time_ns=None if record is None else record.time_ns,
            position=None if record is None else record.after,
            memory_bytes=None if record is None else record.memory_bytes,
        ):
            sender.carried.clear()  # nothing is sent again, and the list would grow with memory
            self._write(group)


class _NoMoment(Exception):
    """The pieces end in the middle of a checkpoint."""


def _plain(batch: PageBatch) -> PageBatch:
    """The pages with data of a batch, as normal pages."""
    if not batch.types.any():
        return batch
    pfns = batch.pfns[HAS_DATA[batch.types]]
    return PageBatch(pfns, np.zeros(len(pfns), dtype=np.uint8), batch.data)
