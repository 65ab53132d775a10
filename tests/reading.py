"""What tests of the reader share."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import streams as s
from streams import END, LAST_CHECKPOINT, entry, page

from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.writer import EventWriter

both_words = pytest.mark.parametrize("word", [8, 4])
EC = s.ENABLE_COMPRESSION
HVM8 = Dialect(word=8, guest="hvm")


def kinds_of(found: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in found]


def tmem(*pools: bytes, flags: int = 0x50) -> bytes:
    return struct.pack("<i7I", -5, 1, 8, 0xFFFFFFFF, flags, 6, 7, 0xFFFFFFFF) + b"".join(pools) + b"\xff" * 4


def tmem_pool(number: int, announced: int, *pages: bytes, flags: int = 0, uuid: tuple[int, int] = (11, 12)) -> bytes:
    return struct.pack("<3I2Q", number, flags, announced, *uuid) + b"".join(pages)


def tmem_page(oid: tuple[int, int, int], index: int, data: bytes) -> bytes:
    return struct.pack("<3QI", *oid, index) + data


NO_MORE = b"\xff" * 24


def context(fill: int, size: int = 5168) -> bytes:
    return bytes([fill]) * size


VCPU64, VCPU32 = s.block(b"vcpu", context(1)), s.block(b"vcpu", context(1, 2800))
EXTV, XCNT = s.block(b"extv", b""), s.block(b"xcnt", struct.pack("<I", 16 + 24))


def rewritten(found: list[events.Event], word: Any) -> bytes:
    writer = EventWriter(word)
    data = [bytes(each) for event in found if not isinstance(event, events.EndOfStream) for each in writer.write(event)]
    assert writer.offset == sum(map(len, data))
    return b"".join(data)


BEGIN, FULL = struct.pack("<hI", -100, 0), struct.pack("<hI", -101, 0)


def pv_stream(word: Any) -> bytes:
    size = 5168 if word == 8 else 2800
    data = s.pv_header(word, 4, [9], s.block(b"vcpu", context(1, size)), EXTV, XCNT)
    data += s.batch(word, [entry(0), entry(1, 9)], page(1), page(2)) + s.vcpu_info(0, 1) + EC + END
    vcpu = context(2, size) + bytes(128) + struct.pack("<QQ", 7, 24) + bytes(24)
    data += s.pv_tail(word, [2, 3], vcpu)
    return (
        data + s.batch(word, [entry(1)]) + s.compressed(word, BEGIN) + LAST_CHECKPOINT + END + s.pv_tail(word, [], vcpu)
    )


def tmem_stream(word: Any) -> bytes:
    data = s.hvm_header(word, 4) + s.batch(word, [entry(1)], page(5))
    data += tmem(tmem_pool(1, 2, tmem_page((1, 2, 3), 4, page(1)), NO_MORE)) + struct.pack("<iI", -6, 0xFFFFFFFF)
    return data + END + s.hvm_tail(b"context", s.QEMU, b"QEVM" + bytes(5000))


WHOLE: dict[str, bytes] = {
    f"{name}, {word}": make(word)
    for word in (8, 4)
    for name, make in (
        ("hvm", s.small_hvm),
        ("pv", pv_stream),
        ("tmem and QEMU's record", tmem_stream),
        ("xl", lambda word: s.xl_header(b"config") + s.small_hvm(word)),
        ("xend", lambda word: s.xend_header(b"(config)") + pv_stream(word)),
        ("cut", lambda word: s.small_hvm(word)[:-20]),
        ("behind the end", lambda word: pv_stream(word) + b"more"),
        ("malformed", lambda word: s.small_hvm(word) + struct.pack("<i", -22) + bytes(40)),
    )
}
