"""Streams put together by hand, from the format and not by the code under test."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from remus_ckpt.errors import StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.restorer import Restorer
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import Reader

XL = b"DeviceModelRecord0002"
QEMU = b"QemuDeviceModelRecord"
REMUS = b"RemusDeviceModelState"
XTAB, XALLOC, BROKEN = 0xF, 0xE, 0xD

LAST_CHECKPOINT = struct.pack("<i", -9)
ENABLE_COMPRESSION = struct.pack("<i", -13)
END = struct.pack("<i", 0)


def word(size: int, value: int) -> bytes:
    return value.to_bytes(size, "little")


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE_SIZE


def entry(pfn: int, kind: int = 0) -> int:
    return pfn | kind << 28


def hvm_header(size: int, p2m_size: int) -> bytes:
    return word(size, p2m_size)


def batch(size: int, entries: list[int], *pages: bytes) -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(word(size, value) for value in entries) + b"".join(pages)


def compressed(size: int, data: bytes) -> bytes:
    return struct.pack("<i", -12) + word(size, len(data)) + data


def param(number: int, value: int, pad: int = 0) -> bytes:
    return struct.pack("<iIQ", number, pad, value)


def vcpu_info(highest: int, *maps: int) -> bytes:
    return struct.pack(f"<ii{len(maps)}Q", -2, highest, *maps)


def toolstack(data: bytes) -> bytes:
    return struct.pack("<iI", -18, len(data)) + data


def hvm_tail(context: bytes = b"", signature: bytes = XL, state: bytes = b"QEVMstate") -> bytes:
    length = b"" if signature == QEMU else struct.pack("<I", len(state))
    return struct.pack("<3QI", 0xFEFC, 0xFEFD, 0xFEFE, len(context)) + context + signature + length + state


def block(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data


def pv_header(size: int, p2m_size: int, frames: list[int], *blocks: bytes) -> bytes:
    """With blocks, b"" among them counting as none, the header has extended info."""
    info = b""
    if blocks:
        joined = b"".join(blocks)
        info = b"\xff" * size + struct.pack("<I", len(joined)) + joined
    return word(size, p2m_size) + info + b"".join(word(size, frame) for frame in frames)


def pv_tail(size: int, unmapped: list[int], *vcpus: bytes, shared_info: bytes = page(0x5A)) -> bytes:
    return (
        struct.pack("<I", len(unmapped)) + b"".join(word(size, pfn) for pfn in unmapped) + b"".join(vcpus) + shared_info
    )


def xl_header(data: bytes, mandatory: int = 0, optional: int = 0, order: int = 0x01020304) -> bytes:
    magic = b"Xen saved domain, xl format\n \0 \r"
    return magic + struct.pack("<4I", order, mandatory, optional, len(data)) + data


def xend_header(config: bytes) -> bytes:
    return b"LinuxGuestRecord" + struct.pack(">i", len(config)) + config


def small_hvm(size: int) -> bytes:
    """Three checkpoints of a guest of four pages, the last two compressed (rle); every kind of thing in a few bytes."""
    first = hvm_header(size, 4)
    first += struct.pack("<iIQII", -7, 1, 2, 3, 4)
    first += batch(size, [entry(0), entry(1), entry(0, XTAB), entry(3)], page(1), page(2), page(3))
    first += vcpu_info(0, 1) + param(-3, 0xFEFF) + toolstack(b"tools") + ENABLE_COMPRESSION + END + hvm_tail(b"ctx")
    second = batch(size, [entry(1), entry(2)]) + compressed(size, b"\x01abcd" + b"\xff" * 8 + b"\x87" + b"\x00")
    second += vcpu_info(0, 1) + END + hvm_tail(b"context", state=b"QEVM2")
    third = batch(size, [entry(3)]) + compressed(size, b"\x80" + page(9)) + END + hvm_tail()
    return first + second + third


def run(
    data: bytes, *, dialect: Dialect | None = None, limits: Limits | None = None, strict: bool = False
) -> tuple[list[events.Event], StreamError | None, Reader]:
    """All events of a stream that ends with these bytes, and the error that ended them."""
    reader = Reader(dialect, limits=limits, strict=strict)
    reader.feed(data)
    reader.feed_eof()
    found: list[events.Event] = []
    try:
        found.extend(events_of(reader))
    except StreamError as error:
        return found, error, reader
    return found, None, reader


def events_of(reader: Reader) -> Iterator[events.Event]:
    """What the bytes so far hold, EndOfStream the last if it comes."""
    while (event := reader.next_event()) is not None:
        yield event
        if isinstance(event, events.EndOfStream):
            return


def restore(
    data: bytes, *, dialect: Dialect | None = None, limits: Limits | None = None, strict: bool = False
) -> tuple[list[bytes], StreamError | None, Restorer]:
    """Memory after every checkpoint, the error that ended them, and the restorer."""
    restorer = Restorer(dialect, limits=limits, strict=strict)
    restorer.feed(data)
    restorer.feed_eof()
    memories: list[bytes] = []
    try:
        memories.extend(restorer.memory.tobytes() for _ in restorer.checkpoints())
    except StreamError as error:
        return memories, error, restorer
    return memories, None, restorer


def plain(value: Any) -> Any:
    """An event, or something in one, as something that == compares: arrays as lists, with their type."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, events.Event):
        fields = {
            name: plain(getattr(value, name)) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())
        }
        return (type(value).__name__, fields)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
