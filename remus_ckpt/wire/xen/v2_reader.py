"""Bytes to events for Xen's v2 stream (specs/xen-v2.md). No I/O, no clock."""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

import numpy as np

from remus_ckpt.limits import Limits
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE
from remus_ckpt.wire.inbox import Inbox
from remus_ckpt.wire.stream_reader import NEED_DATA, StreamReader
from remus_ckpt.wire.xen import chunks, events, v2
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.dialect import FRONTS, V2_MAGIC, Dialect, Guest
from remus_ckpt.wire.xen.v2 import RECORD, RECORDS, Kind, Layer, Layout, RecordKind

_BUFFER_BYTES = 1 << 18
_FIRST_BYTES = 8 << 20
_Parser = Generator[events.Event | None, None, Any]
_BORDERS = (Kind.END, Kind.CHECKPOINT)


class V2Reader(StreamReader[events.Event]):
    """One v2 stream, from its first byte to its last: with or without xl's or libvirt's header and libxl's layer.

    limits: what the stream may claim

    After `next_event` has raised Malformed or UnknownFormat, it raises the same error again.
    """

    def __init__(self, *, limits: Limits | None = None) -> None:
        super().__init__(Inbox(_BUFFER_BYTES, first_bytes=_FIRST_BYTES), limits or Limits())
        self.deviations: dict[str, events.Deviation] = {}
        """Always empty: what breaks a rule is refused."""
        self.epoch = 0
        """The number of the checkpoint being read."""
        self.checkpoint_end = 0
        """The first byte after the last complete checkpoint."""
        self.guest: Guest | None = None
        self.version = 0
        """Of libxc's image header."""
        self.has_libxl = False
        self.saw_last_checkpoint = False
        self._seen: set[Kind] = set()
        self._pages = self.limits.memory_bytes // PAGE_SIZE  # PV: p2m_size, once it is known
        self._since_border = 0  # records of libxc's layer since the last checkpoint
        self._parser = self._stream()

    @property
    def dialect(self) -> Dialect:
        """What a legacy stream would call its dialect: v2 is always written with words of 8 bytes."""
        return Dialect(word=None if self.guest is None else 8, guest=self.guest)

    @property
    def _offset(self) -> int:
        return self.inbox.offset

    # The grammar, in the order of the specification

    def _stream(self) -> _Parser:
        """§1"""
        front = yield from self.inbox.peek(v2.LOOK_BYTES)
        for kind in ("xl", "libvirt"):
            if front.startswith(FRONTS[kind].magic):
                yield from self._file_header(kind)
                front = yield from self.inbox.peek(len(V2_MAGIC))
        if front.startswith(v2.SUSPEND_MAGIC):
            yield from self._suspend_image()
        elif front.startswith(v2.LIBXL_MAGIC):
            yield from self._libxl()
        else:
            yield from self._libxc()

    def _file_header(self, kind: str) -> _Parser:
        """§2"""
        self.inbox.skip(len(FRONTS[kind].magic))
        mandatory = optional = 0
        if kind == "xl":
            order, mandatory, optional, length = yield from self.inbox.unpack(struct.Struct("<4I"))
            if order != 0x01020304:
                self.unknown(
                    f"the byte order mark is {order:#010x}: only little-endian streams are read", 32, "xen-v2.md §2"
                )
            if mandatory & ~3:
                self.unknown(f"xl's header has the unknown mandatory flags {mandatory:#x}", 36, "xen-v2.md §2")
        else:
            version, length = yield from self.inbox.unpack(chunks.LIBVIRT_HEADER)
            if version != 2:
                self.unknown(
                    f"libvirt's header has the version {version:#x}; 2 announces a v2 stream", 16, "xen-v2.md §2"
                )
        self.limit(length, "file_header_bytes", 0, "the configuration's length", "xen-v2.md §2")
        data = yield from self.inbox.array(length)
        yield events.FileHeader(
            kind="xl" if kind == "xl" else "libvirt",
            mandatory_flags=mandatory,
            optional_flags=optional,
            data=data.tobytes(),
        )

    def _suspend_image(self) -> _Parser:
        """§2.1"""
        section = "xen-v2.md §2.1"
        self.inbox.skip(len(v2.SUSPEND_MAGIC))
        while True:
            start = self._offset
            number, size = yield from self.inbox.unpack(v2.SUSPEND_RECORD)
            try:
                kind = v2.Suspend(number)
            except ValueError:
                self.refuse(f"there is no record {number:#x} in a suspend image", start, section)
            match kind:
                case v2.Suspend.LIBXL | v2.Suspend.LIBXC_LEGACY:
                    self.unknown(f"a suspend image with a {kind.name} record, which is not read", start, section)
                case v2.Suspend.LIBXC:
                    if self.guest is not None:
                        self.refuse("a second libxc stream", start, section, kind.name)
                    yield from self._headers()
                    while (yield from self._run()) is Kind.CHECKPOINT:
                        yield from self._border(is_last=False)
                case v2.Suspend.END_OF_IMAGE:
                    if self.guest is None:
                        self.refuse("the suspend image has no libxc stream", start, section, kind.name)
                    yield from self._border(is_last=True)
                    return
                case v2.Suspend.XENOPS:
                    self.limit(size, "file_header_bytes", start, "its length", section, kind.name)
                    data = yield from self.inbox.array(size)
                    yield events.FileHeader(kind="xenserver", data=data.tobytes())
                case _:
                    self.limit(size, "device_state_bytes", start, "its length", section, kind.name)
                    data = yield from self.inbox.array(size)
                    if kind in (v2.Suspend.QEMU_TRAD, v2.Suspend.QEMU_XEN):
                        yield v2.DeviceModel(data=data.tobytes(), offset=start)
                    else:
                        yield v2.SuspendRecord(type=kind, size=size, offset=start)

    def _libxl(self) -> _Parser:
        """§2, §6"""
        start = self._offset
        _, version, options = yield from self.inbox.unpack(v2.LIBXL_HEADER)
        if version != v2.LIBXL_VERSION:
            self.unknown(
                f"libxl's stream has the version {version}; {v2.LIBXL_VERSION} is read here", start + 8, "xen-v2.md §2"
            )
        if options & v2.BIG_ENDIAN:
            self.unknown("a big-endian libxl stream; little-endian ones are read", start + 12, "xen-v2.md §2")
        if options & ~(v2.BIG_ENDIAN | v2.LIBXL_CONVERTED):
            self.refuse(f"libxl's options {options:#x} have unknown bits", start + 12, "xen-v2.md §2", "libxl header")
        self.has_libxl = True
        yield v2.LibxlHeader(options=options, offset=start)
        stopped: Kind | None = None  # how libxc's part ended last; None: it has not begun
        while True:
            event = yield from self._record(Layer.LIBXL)
            kind = event.kind if isinstance(event, v2.Record | v2.Emulator) else None
            is_next = kind is {None: Kind.LIBXC_CONTEXT, Kind.CHECKPOINT: Kind.CHECKPOINT_END}.get(stopped)
            if kind is Kind.LIBXL_END and stopped is Kind.END:
                yield event
                yield from self._border(is_last=True)
                return
            if kind in (Kind.LIBXC_CONTEXT, Kind.CHECKPOINT_END, Kind.LIBXL_END) and not (kind and is_next):
                where = {None: "before LIBXC_CONTEXT", Kind.END: "behind libxc's END"}.get(stopped, "at a CHECKPOINT")
                assert kind is not None
                self.refuse(f"it may not stand {where}", event.offset, RECORDS[kind.value].section, kind.name)
            if stopped is None and isinstance(event, v2.Emulator):
                self.refuse("it may not stand before LIBXC_CONTEXT", event.offset, "xen-v2.md §6", event.kind.name)
            yield event
            if kind is Kind.CHECKPOINT_END:
                yield from self._border(is_last=False)
            if kind in (Kind.LIBXC_CONTEXT, Kind.CHECKPOINT_END):
                if stopped is None:
                    yield from self._headers()
                stopped = yield from self._run()

    def _libxc(self) -> _Parser:
        """§3, §5, without libxl's layer."""
        yield from self._headers()
        while (yield from self._run()) is Kind.CHECKPOINT:
            yield from self._border(is_last=False)
        # Xen's converter puts the device model after the last record.
        front = yield from self.inbox.peek(chunks.SIGNATURE_BYTES)
        if self.guest == "hvm" and front == Signature.XL.value:
            start = self._offset
            self.inbox.skip(len(front))
            (size,) = yield from self.inbox.unpack(chunks.U32)
            self.limit(size, "device_state_bytes", start, "its length", "xen-v2.md §5.14", "device model")
            data = yield from self.inbox.array(size)
            yield v2.DeviceModel(data=data.tobytes(), offset=start)
        yield from self._border(is_last=True)

    def _border(self, *, is_last: bool) -> _Parser:
        self.saw_last_checkpoint = is_last
        if self._since_border or not is_last or not self.epoch:
            self._since_border = 0
            self.epoch += 1
            self.checkpoint_end = self._offset
            yield v2.Border(end=self._offset, is_last=is_last, offset=self._offset)
        elif is_last:
            self.checkpoint_end = self._offset  # the END of a series belongs to it

    def _headers(self) -> _Parser:
        """§3"""
        start = self._offset
        marker, number, version, options, *reserved = yield from self.inbox.unpack(v2.IMAGE_HEADER)
        if (marker, number) != (v2.IMAGE_MARKER, v2.IMAGE_ID):
            self.unknown("this is no v2 stream: the image header has another marker", start, "xen-v2.md §3.1")
        if options & v2.BIG_ENDIAN:
            self.unknown("a big-endian stream; little-endian ones are read", start + 16, "xen-v2.md §3.1")
        if version not in v2.IMAGE_VERSIONS:
            self.unknown(
                f"a stream of version {version}; {v2.IMAGE_VERSIONS[0]} to {v2.IMAGE_VERSIONS[-1]} are read",
                start + 12,
                "xen-v2.md §3.1",
            )
        if options or any(reserved):
            self.refuse("reserved bits are set", start + 16, "xen-v2.md §3.1", "image header")
        here = self._offset
        kind, shift, zero, major, minor = yield from self.inbox.unpack(v2.DOMAIN_HEADER)
        if kind not in v2.GUESTS:
            self.unknown(f"a guest of type {kind:#x}; x86 PV (1) and x86 HVM (2) are read", here, "xen-v2.md §3.2")
        if shift != v2.PAGE_SHIFT:
            self.unknown(f"pages of 2^{shift} bytes; they have 2^{v2.PAGE_SHIFT}", here + 4, "xen-v2.md §3.2")
        if zero:
            self.refuse("reserved bits are set", here + 6, "xen-v2.md §3.2", "domain header")
        self.guest, self.version = v2.GUESTS[kind], version
        yield v2.ImageHeader(version=version, guest=self.guest, xen=(major, minor), offset=start)

    def _run(self) -> Generator[events.Event | None, None, Kind]:
        """§5: libxc's records up to the next CHECKPOINT or END, which is returned."""
        while True:
            event = yield from self._record(Layer.LIBXC)
            kind = event.kind if isinstance(event, v2.Record) else None
            if kind is Kind.END and self.epoch and self._since_border:
                self.refuse(
                    f"{self._since_border} records stand between the last CHECKPOINT and it: Xen would drop them",
                    event.offset,
                    "xen-v2.md §5.12",
                    "END",
                )
            yield event
            if kind is not None and kind in _BORDERS:
                return kind
            self._since_border += 1

    def _record(self, layer: Layer) -> Generator[events.Event | None, None, events.Event]:
        """§4"""
        start = self._offset
        number, size = yield from self.inbox.unpack(RECORD)
        row = RECORDS.get((layer, number))
        if row is None:
            name = f"{layer.value} record {number:#x}"
            if not number & v2.OPTIONAL:
                self.refuse("there is no such record, and it is not optional", start, "xen-v2.md §4.1", name)
            self.limit(size, "record_bytes", start, "its length", "xen-v2.md §4.1", name)
            yield from self._body(size, start, "xen-v2.md §4.1", name)
            return v2.PassedOver(layer=layer, type=number, size=size, offset=start)
        name = row.kind.name
        if row.layout is Layout.REFUSED:
            self.unknown(f"{name} belongs to COLO, between two running hosts, and is not read", start, row.section)
        if row.least_version > self.version and layer is Layer.LIBXC:
            self.refuse(f"it may not stand in a stream of version {self.version}", start, row.section, name)
        if row.guest not in (None, self.guest):
            self.refuse(f"it may not stand in the stream of a guest of kind {self.guest}", start, row.section, name)
        if row.layout is Layout.PAGES:
            return (yield from self._page_data(size, start, row))
        self.limit(size, row.limit, start, "its length", row.section, name)
        if row.layout is Layout.EMPTY and size:
            self.refuse(f"it has {size} bytes; it has none", start, row.section, name)
        if size % row.unit or row.size not in (None, size) or (row.unit > 1 and not size):
            self.refuse(f"it has {size} bytes, not {row.size or f'a multiple of {row.unit}'}", start, row.section, name)
        body = yield from self._body(size, start, row.section, name)
        self._seen.add(row.kind)
        return self._typed(row, body, start)

    def _body(self, size: int, start: int, section: str, name: str) -> Generator[None, None, bytes]:
        data = (yield from self.inbox.array(size)).tobytes()
        yield from self._padding(size, start, section, name)
        return data

    def _padding(self, size: int, start: int, section: str, name: str) -> Generator[None, None, None]:
        rest = v2.padding(size)
        yield from self.inbox.have(rest)
        if any(self.inbox.front(rest)):
            self.refuse("the padding behind it is not zero", start, "xen-v2.md §4", name)
        self.inbox.skip(rest)

    def _typed(self, row: RecordKind, body: bytes, start: int) -> events.Event:
        """The event of a record whose body has arrived."""
        kind, size = row.kind, len(body)
        match row.layout:
            case Layout.PV_INFO:
                self._exactly(row, body, v2.PV_INFO.size, start)
                width, levels, *reserved = v2.PV_INFO.unpack(body)
                if (width, levels) not in ((4, 3), (8, 4)) or any(reserved):
                    self.refuse(f"a guest of width {width} and {levels} levels", start, row.section, kind.name)
                return v2.PvInfo(width=width, levels=levels, offset=start)
            case Layout.P2M_FRAMES:
                return self._p2m_frames(row, body, start)
            case Layout.VCPU:
                vcpu, zero = self._head(row, body, v2.VCPU_HEAD, start)
                if zero:
                    self.refuse("reserved bits are set", start, row.section, kind.name)
                self.limit(vcpu + 1, "vcpus", start, "the number of virtual CPUs", row.section, kind.name)
                return v2.VcpuState(kind=kind, vcpu=vcpu, data=body[v2.VCPU_HEAD.size :], offset=start)
            case Layout.TSC_INFO:
                self._exactly(row, body, v2.TSC_INFO.size, start)
                mode, khz, nsec, incarnation, zero = v2.TSC_INFO.unpack(body)
                if zero:
                    self.refuse("reserved bits are set", start, row.section, kind.name)
                return events.TscInfo(mode=mode, nsec=nsec, khz=khz, incarnation=incarnation, offset=start)
            case Layout.PARAMS:
                count, zero = self._head(row, body, v2.HVM_PARAMS_HEAD, start)
                if zero or size != v2.HVM_PARAMS_HEAD.size + count * v2.HVM_PARAM.size:
                    self.refuse(f"{count} parameters in {size} bytes", start, row.section, kind.name)
                values = tuple(v2.HVM_PARAM.iter_unpack(body[v2.HVM_PARAMS_HEAD.size :]))
                return v2.HvmParams(values=values, offset=start)
            case Layout.EMULATOR:
                emulator, index = self._head(row, body, v2.EMULATOR_HEAD, start)
                if emulator not in v2.EMULATORS:
                    self.refuse(f"there is no emulator {emulator}", start, row.section, kind.name)
                data = body[v2.EMULATOR_HEAD.size :]
                return v2.Emulator(kind=kind, emulator=emulator, index=index, data=data, offset=start)
        if kind is Kind.HVM_CONTEXT and not body:
            self.refuse("it is empty", start, row.section, kind.name)
        return v2.Record(kind=kind, data=body, offset=start)

    def _exactly(self, row: RecordKind, body: bytes, size: int, start: int) -> None:
        if len(body) != size:
            self.refuse(f"it has {len(body)} bytes, not {size}", start, row.section, row.kind.name)

    def _head(self, row: RecordKind, body: bytes, layout: struct.Struct, start: int) -> tuple[Any, ...]:
        if len(body) < layout.size:
            self.refuse(f"it has {len(body)} bytes; its head takes {layout.size}", start, row.section, row.kind.name)
        return layout.unpack_from(body)

    def _p2m_frames(self, row: RecordKind, body: bytes, start: int) -> events.Event:
        """§5.3"""
        first, last = self._head(row, body, v2.P2M_FRAMES_HEAD, start)
        if Kind.X86_PV_INFO not in self._seen:
            self.refuse("it stands before X86_PV_INFO", start, row.section, row.kind.name)
        if len(body) % 8 or first > last:
            self.refuse(f"PFNs {first:#x} to {last:#x} in {len(body)} bytes", start, row.section, row.kind.name)
        self.limit((last + 1) * PAGE_SIZE, "memory_bytes", start, "memory's size", row.section, row.kind.name)
        self._pages = last + 1
        pfns = np.frombuffer(body, dtype="<u8", offset=v2.P2M_FRAMES_HEAD.size).astype(np.uint64)
        return v2.P2mFrames(first=first, last=last, pfns=pfns, offset=start)

    def _page_data(self, size: int, start: int, row: RecordKind) -> Generator[events.Event | None, None, events.Event]:
        """§5.1: pages are received in place, so its body is taken in pieces."""
        name, section = row.kind.name, row.section
        self.limit(size, row.limit, start, "its length", section, name)
        head = v2.PAGE_DATA_HEAD.size
        if size <= head:
            self.refuse(f"it has {size} bytes; its head takes {head}, and an entry follows", start, section, name)
        if self.guest == "pv" and Kind.X86_PV_P2M_FRAMES not in self._seen:
            self.refuse("it stands before X86_PV_P2M_FRAMES", start, section, name)
        count, zero = yield from self.inbox.unpack(v2.PAGE_DATA_HEAD)
        if zero or not 0 < count <= (size - head) // 8:
            self.refuse(f"{count} entries in {size} bytes", start, section, name)
        entries = (yield from self.inbox.array(count * 8)).view("<u8").astype(np.uint64, copy=False)
        if int(entries.max()) < self._pages:
            # All are normal pages, as in nearly every record: there are no types to split off.
            pfns, types, pages = entries, np.zeros(count, dtype=np.uint8), count
        else:
            pfns, types = entries & np.uint64(v2.PFN_MASK), (entries >> np.uint64(v2.TYPE_SHIFT)).astype(np.uint8)
            pages = self._check_entries(entries, pfns, types, start, section)
        if size != head + count * 8 + pages * PAGE_SIZE:
            self.refuse(f"{count} entries and {pages} pages in {size} bytes", start, section, name)
        data = (yield from self.inbox.array(pages * PAGE_SIZE)).reshape(-1, PAGE_SIZE)
        return events.Batch(pfns=pfns, types=types, data=data, offset=start)

    def _check_entries(self, entries: Any, pfns: Any, types: Any, start: int, section: str) -> int:
        """Returns how many of them have a page."""
        if (entries & np.uint64(v2.RESERVED_MASK)).any():
            self.refuse("reserved bits are set in an entry", start, section, "PAGE_DATA")
        if not v2.KNOWN_TYPE[types].all():
            at = int((~v2.KNOWN_TYPE[types]).argmax())
            self.refuse(f"entry {at} has the unknown page type {types[at]:#x}", start, section, "PAGE_DATA")
        beyond = pfns >= self._pages
        if beyond.any():
            at = int(beyond.argmax())
            if self.guest == "pv":
                self.refuse(
                    f"entry {at} is PFN {pfns[at]:#x}, memory has {self._pages:#x} pages", start, section, "PAGE_DATA"
                )
            size = (int(pfns[at]) + 1) * PAGE_SIZE
            self.limit(size, "memory_bytes", start, "memory's size", section, "PAGE_DATA")
        return int(np.count_nonzero(HAS_DATA[types]))

    def _drain(self) -> _Parser:
        """After the last record, or after a cut: count the rest without reading it."""
        for _ in self.inbox.drain():
            if not self.inbox.is_over:
                yield NEED_DATA
                continue
            trailing = self._offset - self.checkpoint_end
            complete = self.checkpoint_end > 0 and trailing == 0
            yield events.EndOfStream(complete=complete, trailing_bytes=trailing, offset=self._offset)
