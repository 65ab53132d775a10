"""Streams that Xen or we wrote, as pieces (specs/formats.md §9)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.files import AnyRestorer
from remus_ckpt.pages import HAS_DATA, IS_PAGE_TABLE, PageBatch, PageType
from remus_ckpt.plural import counted
from remus_ckpt.record_restorer import V2Restorer
from remus_ckpt.relay.guest import Before, Head, Moment, Piece, Pv, page_batches, stored_pages
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.wire.xen import events, physmap, v2
from remus_ckpt.wire.xen.chunks import VCPU_CONTEXT_BYTES

EARLIER_PAGES = 16_384
"""Of how many pages that a checkpoint changes the contents before it are kept, for deltas: 64 MiB."""


class EventWalk(Protocol):
    """A walk over the events of a stream, as the command line's."""

    restorer: AnyRestorer

    def events(self) -> Iterator[events.Event]:
        """Every event, up to the end or to a fault; whoever draws them puts the staged checkpoints in force."""


class _Course:
    """What was seen of a stream between two moments."""

    def __init__(self, restorer: AnyRestorer) -> None:
        self.restorer = restorer
        self.file_header: events.FileHeader | None = None
        self.header: events.Header | None = None
        self.types: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self.retyped: list[tuple[NDArray[np.int64], NDArray[np.uint8]]] = []
        self.is_verifying = False
        self.notes: dict[str, str] = {}
        self.parameters: dict[str, int] = {}
        self.vcpu_info: events.VcpuInfo | None = None
        self.tsc: events.TscInfo | None = None
        self.toolstack: bytes | None = None

    def head(self) -> Head:
        """What is known in front of the first page."""
        restorer = self.restorer
        if isinstance(restorer, V2Restorer):
            assert restorer.image is not None
            pv = None
            if restorer.pv_info is not None and restorer.p2m_frames is not None:
                pv = Pv(width=restorer.pv_info.width, levels=restorer.pv_info.levels, frames=restorer.p2m_frames.pfns)
            return Head(
                format="xen-v2",
                pages=None if pv is None or restorer.p2m_frames is None else restorer.p2m_frames.last + 1,
                guest=restorer.image.guest,
                pv=pv,
                file_header=self.file_header,
                image=restorer.image,
                policies=dict(restorer.policies),
            )
        header = self.header
        assert header is not None
        pv = None
        if header.p2m_frames is not None:
            sizes = [len(block.data) for block in header.extended_info or () if block.id == b"vcpu"]
            width = VCPU_CONTEXT_BYTES[sizes[0]] if sizes else header.word
            pv = Pv(
                width=width,
                levels=4 if width == 8 else 3,
                frames=header.p2m_frames,
                extended=header.extended_info or (),
            )
        return Head(
            format="xen",
            pages=header.p2m_size,
            guest=header.guest,
            word=header.word,
            pv=pv,
            file_header=self.file_header,
        )

    def take(self, event: events.Event) -> None:
        """Note what the restorer does not keep."""
        match event:
            case events.FileHeader():
                self.file_header = event
            case events.Header():
                self.header = event
                self.types = np.full(event.p2m_size, PageType.XTAB, dtype=np.uint8)
            case events.EnableVerifyMode():
                self.is_verifying = True
            case v2.Record() if event.kind is v2.Kind.VERIFY:
                self.is_verifying = True
            case events.Tmem():
                self.notes["transcendent memory"] = counted(sum(len(pool.pages) for pool in event.pools), "page")
            case v2.SuspendRecord():
                self.notes[f"{event.type.name} record"] = f"{event.size:,} bytes"
            case v2.PassedOver():
                self.notes[f"optional {event.layer.value} record {event.type:#x}"] = f"{event.size:,} bytes"

    def grow(self, pages: int) -> None:
        """Memory has at least this many pages."""
        if pages > len(self.types):
            larger = np.full(max(pages, len(self.types) * 5 // 4), PageType.XTAB, dtype=np.uint8)
            larger[: len(self.types)] = self.types
            self.types = larger

    def retype(self, pfns: NDArray[np.int64], types: NDArray[np.uint8]) -> None:
        """Pages have come with these types; they count from the coming moment on, and memory holds the one before."""
        if self.restorer.in_force is None:
            self.types[pfns] = types
        else:
            self.retyped.append((pfns, types))

    def settle(self, pages: int) -> NDArray[np.uint8]:
        """The types of all pages at the checkpoint that was put in force: a copy."""
        self.grow(pages)
        for pfns, types in self.retyped:
            self.types[pfns] = types
        self.retyped.clear()
        return self.types[:pages].copy()

    def before(self) -> Before:
        """The pages that the staged checkpoint changes as they are in front of it: as many as are worth memory.

        No page tables: a receiver holds them in another form.
        """
        staged = self.restorer.staged
        assert staged is not None
        pfns = staged.pfns[:EARLIER_PAGES]
        self.grow(len(staged.memory))
        pfns = pfns[~IS_PAGE_TABLE[self.types[pfns]]]
        return Before(pfns, staged.memory[pfns])

    def moment(self, checkpoint: Checkpoint) -> Moment:
        """The checkpoint that was just put in force. What it does not say anew is as the one before has it."""
        self.parameters.update(checkpoint.parameters)
        self.vcpu_info = checkpoint.vcpus or self.vcpu_info
        self.tsc = checkpoint.tsc or self.tsc
        self.toolstack = self.toolstack if checkpoint.toolstack is None else checkpoint.toolstack
        moment = Moment(
            epoch=checkpoint.epoch,
            memory=checkpoint.memory,
            memory_bytes=checkpoint.memory_bytes,
            types=self.settle(len(checkpoint.memory)),
            parameters=dict(self.parameters),
            vcpu_info=self.vcpu_info,
            tsc=self.tsc,
            toolstack=self.toolstack,
            device_state=checkpoint.device_state,
            record=checkpoint.record,
            notes=tuple(self.notes.items()),
        )
        if checkpoint.record is not None:
            # In our streams memory starts as zeros, and pages of zeros need not come.
            moment.types[moment.types == PageType.XTAB] = PageType.NOTAB
        tail = checkpoint.tail
        if isinstance(tail, events.TailHvm):
            moment.magic_pfns, moment.context = tail.magic_pfns, tail.context
        elif isinstance(tail, events.TailPv):
            moment.vcpus, moment.shared_info, moment.unmapped = tail.vcpus, tail.shared_info, tail.unmapped
        if isinstance(self.restorer, V2Restorer):
            moment.xenstore = self.restorer.xenstore or None
            moment.vcpu_msrs = self.restorer.vcpu_msrs()
        elif self.toolstack is not None and self.header is not None:
            moment.xenstore = physmap.to_xenstore(self.toolstack, self.header.word)
        return moment


def xen_pieces(walk: EventWalk) -> Iterator[Piece]:
    """A legacy stream, a v2 stream or one of ours as pieces.

    If the stream is cut or damaged, its last good moment is the last piece; the walk knows how it ended.
    """
    course: _Course | None = None
    has_head = False
    pending: Moment | None = None
    for event in walk.events():
        if course is None:
            course = _Course(walk.restorer)
        course.take(event)
        restorer = course.restorer
        is_border = restorer.staged is not None
        if not has_head and (is_border or isinstance(event, events.Batch)):
            has_head = True
            yield course.head()
        if isinstance(event, events.Batch):
            yield from _told(event, course)
        if not is_border:
            continue
        if pending is not None:
            yield pending
            yield course.before()
        checkpoint = restorer.commit()
        is_first = pending is None
        pending = course.moment(checkpoint)
        if not is_first:
            pending.pfns = checkpoint.pfns
            yield from stored_pages(pending)
    if pending is not None:
        pending.is_last = True
        yield pending


def _told(event: events.Batch, course: _Course) -> Iterator[PageBatch]:
    """The pages of a batch of the first checkpoint, to be passed on; a later one is only noted."""
    pfns, types, data = event.pfns.astype(np.int64), event.types, event.data
    if types.any():
        # Xen leaves the PFN of an absent page 0 in many entries, and that of a broken one may be anything.
        keep = (types != PageType.XTAB) | (pfns > 0)
        if course.header is not None:
            keep &= pfns < course.header.p2m_size
        if not keep.all():
            data = None if data is None else data[keep[HAS_DATA[types]]]
            pfns, types = pfns[keep], types[keep]
    if not len(pfns):
        return
    course.grow(int(pfns.max()) + 1)
    course.retype(pfns, types)
    if course.restorer.in_force is None and not course.is_verifying and data is not None:
        yield from page_batches(pfns.astype(np.uint64), types, data)
