"""Xen's v2 stream to memory, as `restorer` does it for the legacy one (specs/xen-v2.md §7). No I/O, no clock.

What a checkpoint holds besides memory is given in the legacy stream's terms, so that whoever reads checkpoints need not
ask which stream they came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import LimitExceeded, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, Buffer, Pages
from remus_ckpt.restorer import STAGED_COST_BYTES, Anonymous, Checkpoint, Home
from remus_ckpt.wire.stream_reader import NEED_DATA
from remus_ckpt.wire.xen import events, v2
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE, Signature
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.v2 import Kind
from remus_ckpt.wire.xen.v2_reader import V2Reader

_LEAST_PAGES = 1 << 10


@dataclass(slots=True)
class _State:
    """What the records besides PAGE_DATA have said so far; each replaces what came before it."""

    parameters: dict[int, int] = field(default_factory=dict)
    tsc: events.TscInfo | None = None
    toolstack: bytes | None = None
    context: bytes = b""
    device_state: bytes = b""
    shared_info: bytes = b""
    vcpus: dict[int, dict[Kind, bytes]] = field(default_factory=dict)


class V2Restorer:
    """One v2 stream into one memory. It is used like `Restorer`.

    limits: what the stream may claim
    home: where memory lives; by default in this process

    A v2 stream of an HVM guest does not say how large memory is: it ends with the highest page that the stream has
    named. Until a checkpoint is complete, `memory` has as many pages as the limit allows.
    """

    def __init__(self, *, limits: Limits | None = None, home: Home | None = None) -> None:
        self.reader = V2Reader(limits=limits)
        self.get_buffer = self.reader.get_buffer
        self.buffer_updated = self.reader.buffer_updated
        self.feed_eof = self.reader.feed_eof
        self.memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        """uint8[n, 4096]. It holds a checkpoint when `in_force` names one."""
        self.in_force: Checkpoint | None = None
        """The checkpoint that memory holds."""
        self.staged: Checkpoint | None = None
        """A complete, checked checkpoint that waits for `commit`."""
        self.end: events.EndOfStream | None = None
        self.image: v2.ImageHeader | None = None
        self.pv_info: v2.PvInfo | None = None
        self.p2m_frames: v2.P2mFrames | None = None
        self.policies: dict[Kind, bytes] = {}
        """The processor's features that the guest was promised, as they stand in the stream."""
        self.xenstore: bytes = b""
        """EMULATOR_XENSTORE_DATA, without its head."""
        self._home: Home = home or Anonymous()
        self._room: Pages = self.memory
        self._size = 0  # pages of memory, as far as the stream has named them
        self._coming: Checkpoint | None = None
        self._state = _State()
        self._raw: list[tuple[NDArray[np.int64], Pages]] = []
        self._staged_bytes = 0
        self._verify_only = False

    @property
    def dialect(self) -> Dialect:
        """The dialect that a legacy stream of this guest would have."""
        return self.reader.dialect

    def feed(self, data: Buffer) -> None:
        """Take in bytes of the stream; they are kept, not copied."""
        self.reader.feed(data)

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Put the checkpoints received so far in force, and yield each one.

        Raises Malformed or UnknownFormat after the last good one, at which memory then stays.
        """
        while (event := self.next_event()) is not NEED_DATA and not isinstance(event, events.EndOfStream):
            if self.staged is not None:
                yield self.commit()

    def next_event(self) -> events.Event | None:
        """Process and return the next event of the stream; after a `Border`, `staged` is the checkpoint it closed.

        Raises Malformed or UnknownFormat; the checkpoint in force stays.
        """
        if self.staged is not None:
            raise ValueError("a checkpoint is staged: commit it first")
        event = self.reader.next_event()
        state = self._state
        match event:
            case v2.ImageHeader():
                self.image = event
                self._open()
            case events.Batch():
                self._take_pages(event)
            case v2.PvInfo():
                self.pv_info = event
            case v2.P2mFrames():
                self.p2m_frames = event
                self._named(event.last + 1, event)
            case v2.HvmParams():
                state.parameters.update(event.values)
            case events.TscInfo():
                state.tsc = event
            case v2.VcpuState():
                state.vcpus.setdefault(event.vcpu, {})[event.kind] = event.data
                self._charge(len(event.data), event)
            case v2.Emulator() if event.kind is Kind.EMULATOR_CONTEXT:
                state.device_state = event.data
            case v2.Emulator():
                self.xenstore = event.data
            case v2.DeviceModel():
                state.device_state = event.data
            case v2.Record():
                self._take_record(event)
            case v2.Border():
                self._stage(event)
            case events.EndOfStream():
                self.end = event
        return event

    def commit(self) -> Checkpoint:
        """Put the staged checkpoint in force. It has been checked, so this does not fail."""
        if self.staged is None:
            raise ValueError("no checkpoint is staged")
        for pfns, data in self._raw:
            self._room[pfns] = data
        return self.skip()

    def skip(self) -> Checkpoint:
        """Pass over the staged checkpoint: it counts as in force, but memory is not written."""
        if self.staged is None:
            raise ValueError("no checkpoint is staged")
        checkpoint = self.in_force = self.staged
        self.memory = checkpoint.memory
        self.staged = None
        self._raw.clear()
        self._staged_bytes = 0
        self._coming = Checkpoint(epoch=checkpoint.epoch + 1, start=checkpoint.end, memory=self.memory)
        return checkpoint

    @property
    def _now(self) -> Checkpoint:
        assert self._coming is not None  # the reader returns nothing before a header
        return self._coming

    def _open(self) -> None:
        """Take address space for the largest memory that the limit allows, or as much as this process may have."""
        pages = min(self.reader.limits.memory_bytes // PAGE_SIZE, MAX_P2M_SIZE)
        while True:
            try:
                self._room = self._home.open(pages)
                break
            except (OSError, StoreError, ValueError):
                if pages <= _LEAST_PAGES:
                    raise
                pages //= 2
        self._coming = Checkpoint(epoch=0, start=0, memory=self._room)

    def _named(self, pages: int, event: events.Event) -> None:
        """The stream has named this many pages of memory."""
        if pages > len(self._room):
            raise self._over(pages * PAGE_SIZE, "memory_bytes", len(self._room) * PAGE_SIZE, event)
        self._size = max(self._size, pages)

    def _take_pages(self, event: events.Batch) -> None:
        assert event.data is not None
        coming = self._now
        self._named(int(event.pfns.max()) + 1, event)
        if len(event.data) == len(event.pfns):
            pfns = event.pfns.astype(np.int64)
        else:
            pfns = event.pfns[HAS_DATA[event.types]].astype(np.int64)
        coming.batches += 1
        coming.entries += len(event.pfns)
        coming.page_count += len(pfns)
        ceiling = self.reader.limits.checkpoint_entries
        if coming.page_count > ceiling:
            raise self._over(coming.page_count, "checkpoint_entries", ceiling, event)
        if len(pfns):
            coming.pfn_lists.append(pfns)
        if self._verify_only or not len(pfns):
            return
        if self.in_force is None:
            # No earlier checkpoint has to be preserved, so the first one's pages are written at once.
            self._home.write(self._room, pfns, event.data)
        else:
            self._charge(event.data.nbytes, event)
            self._raw.append((pfns, event.data))

    def _take_record(self, event: v2.Record) -> None:
        match event.kind:
            case Kind.HVM_CONTEXT:
                self._state.context = event.data
            case Kind.SHARED_INFO:
                self._state.shared_info = event.data
            case Kind.TOOLSTACK:
                self._state.toolstack = event.data
            case Kind.X86_CPUID_POLICY | Kind.X86_MSR_POLICY:
                self.policies[event.kind] = event.data
            case Kind.VERIFY:
                self._verify_only = True

    def _charge(self, size: int, event: events.Event) -> None:
        self._staged_bytes += size + STAGED_COST_BYTES
        ceiling = self.reader.limits.checkpoint_bytes
        if self._staged_bytes > ceiling:
            raise self._over(self._staged_bytes, "checkpoint_bytes", ceiling, event)

    def _over(self, value: int, limit: str, ceiling: int, event: events.Event) -> LimitExceeded:
        error = LimitExceeded(
            f"this checkpoint comes to {value}, over the limit {limit} of {ceiling}",
            limit=limit,
            offset=event.offset,
            section="xen-v2.md §7",
        )
        self.reader.fail(error)
        return error

    def _stage(self, border: v2.Border) -> None:
        coming, state = self._now, self._state
        coming.memory = self._room[: self._size]
        coming.end = border.end
        coming.tsc, coming.toolstack = state.tsc, state.toolstack
        coming.parameters = {
            v2.parameter_name(number): value
            for number, value in state.parameters.items()
            if number not in v2.MAGIC_PARAMETERS
        }
        coming.tail = self._tail_pv(border) if self.dialect.guest == "pv" else self._tail_hvm(border)
        if self._raw:
            self._home.reserve(np.concatenate([pfns for pfns, _ in self._raw]))
        self.staged = coming

    def vcpu_msrs(self) -> dict[int, bytes]:
        """X86_PV_VCPU_MSRS of the virtual CPUs that have one, which no legacy stream has."""
        found = {number: parts.get(Kind.X86_PV_VCPU_MSRS) for number, parts in self._state.vcpus.items()}
        return {number: data for number, data in found.items() if data is not None}

    def _tail_hvm(self, border: v2.Border) -> events.TailHvm:
        first, second, third = (self._state.parameters.get(number, 0) for number in v2.MAGIC_PARAMETERS)
        return events.TailHvm(
            magic_pfns=(first, second, third),
            context=self._state.context,
            signature=Signature.XL,
            device_state=self._state.device_state,
            offset=border.offset,
            end=border.end,
        )

    def _tail_pv(self, border: v2.Border) -> events.TailPv:
        vcpus = []
        for number, parts in sorted(self._state.vcpus.items()):
            xsave = parts.get(Kind.X86_PV_VCPU_XSAVE)
            vcpus.append(
                events.VcpuContext(
                    id=number,
                    context=parts.get(Kind.X86_PV_VCPU_BASIC, b""),
                    extended=parts.get(Kind.X86_PV_VCPU_EXTENDED),
                    # The record has no mask; the state names the features that it uses itself, in its second word.
                    xsave_mask=None if xsave is None else int.from_bytes(xsave[8:16], "little"),
                    xsave_size=None if xsave is None else len(xsave),
                    xsave=xsave or b"",
                )
            )
        return events.TailPv(
            unmapped=np.empty(0, dtype=np.uint64),
            vcpus=tuple(vcpus),
            shared_info=self._state.shared_info,
            offset=border.offset,
            end=border.end,
        )
