"""Events to bytes for Xen's v2 stream, by the same table as `V2Reader` (specs/xen-v2.md).

Each list of buffers is for one vectored send: pages are passed on uncopied, nothing is joined.
"""

from __future__ import annotations

import struct

import numpy as np

from remus_ckpt.pages import Buffer
from remus_ckpt.wire.xen import chunks, events, v2
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.dialect import FRONTS
from remus_ckpt.wire.xen.v2 import RECORD, RECORDS, Kind

_GUEST_TYPES = {guest: number for number, guest in v2.GUESTS.items()}


class V2Writer:
    """One stream, event by event. It lays out what it is given: the order is the caller's (specs/xen-v2.md §1)."""

    def __init__(self) -> None:
        self.offset = 0
        """Bytes written so far."""

    def write(self, event: events.Event) -> list[Buffer]:
        """The bytes of an event."""
        buffers = self._layout(event)
        self.offset += sum(len(buffer) for buffer in buffers)
        return buffers

    def _layout(self, event: events.Event) -> list[Buffer]:
        match event:
            case events.FileHeader():
                return [_file_header(event)]
            case v2.LibxlHeader():
                return [v2.LIBXL_HEADER.pack(v2.LIBXL_MAGIC, v2.LIBXL_VERSION, event.options)]
            case v2.ImageHeader():
                image = v2.IMAGE_HEADER.pack(v2.IMAGE_MARKER, v2.IMAGE_ID, event.version, 0, 0, 0)
                return [image + v2.DOMAIN_HEADER.pack(_GUEST_TYPES[event.guest], v2.PAGE_SHIFT, 0, *event.xen)]
            case events.Batch():
                return _page_data(event)
            case v2.PvInfo():
                return _record(Kind.X86_PV_INFO, v2.PV_INFO.pack(event.width, event.levels, 0, 0))
            case v2.P2mFrames():
                head = v2.P2M_FRAMES_HEAD.pack(event.first, event.last)
                return _record(Kind.X86_PV_P2M_FRAMES, head + event.pfns.astype("<u8").tobytes())
            case v2.VcpuState():
                return _record(event.kind, v2.VCPU_HEAD.pack(event.vcpu, 0) + event.data)
            case events.TscInfo():
                body = v2.TSC_INFO.pack(event.mode, event.khz, event.nsec, event.incarnation, 0)
                return _record(Kind.X86_TSC_INFO, body)
            case v2.HvmParams():
                values = b"".join(v2.HVM_PARAM.pack(*value) for value in event.values)
                return _record(Kind.HVM_PARAMS, v2.HVM_PARAMS_HEAD.pack(len(event.values), 0) + values)
            case v2.Emulator():
                return _record(event.kind, v2.EMULATOR_HEAD.pack(event.emulator, event.index) + event.data)
            case v2.Record():
                return _record(event.kind, event.data)
            case v2.DeviceModel():
                return [Signature.XL.value + chunks.U32.pack(len(event.data)) + event.data]
        raise TypeError(f"{type(event).__name__} does not belong in a v2 stream")


def _file_header(event: events.FileHeader) -> bytes:
    """§2"""
    length = len(event.data)
    if event.kind == "xl":
        flags = event.mandatory_flags | v2.XL_STREAM_V2
        head = struct.pack("<4I", 0x01020304, flags, event.optional_flags, length)
    elif event.kind == "libvirt":
        head = chunks.LIBVIRT_HEADER.pack(2, length)
    else:
        raise ValueError(f"no v2 stream has {event.kind}'s header")
    return FRONTS[event.kind].magic + head + event.data


def _record(kind: Kind, body: bytes) -> list[Buffer]:
    """§4"""
    layer, number = kind.value
    assert (layer, number) in RECORDS
    return [RECORD.pack(number, len(body)) + body + bytes(v2.padding(len(body)))]


def _page_data(event: events.Batch) -> list[Buffer]:
    """§5.1"""
    assert event.data is not None
    entries = event.pfns | event.types.astype(np.uint64) << np.uint64(v2.TYPE_SHIFT)
    head = v2.PAGE_DATA_HEAD.pack(len(entries), 0) + entries.astype("<u8").tobytes()
    _, number = Kind.PAGE_DATA.value
    buffers: list[Buffer] = [RECORD.pack(number, len(head) + event.data.nbytes) + head]
    if len(event.data):
        buffers.append(memoryview(np.ascontiguousarray(event.data).reshape(-1)))
    return buffers
