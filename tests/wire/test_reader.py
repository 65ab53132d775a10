"""The reader and the writer: the one table, every layout, any split, what is tolerated, what is refused."""

from __future__ import annotations

import itertools
import struct
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import streams as s
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import END, LAST_CHECKPOINT, XALLOC, XTAB, entry, page, plain, restore, run

from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import CHUNKS, ChunkId, Signature
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import NEED_DATA, Reader
from remus_ckpt.wire.xen.states import EventKind, StreamState
from remus_ckpt.wire.xen.writer import EventWriter

both_words = pytest.mark.parametrize("word", [8, 4])
EC = s.ENABLE_COMPRESSION
HVM8 = Dialect(word=8, guest="hvm")


def kinds_of(found: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in found]


# The table of places

GRID = """
                     file  header batch data  info  last  enable end     tail   last tail
    FRONT            HEADR FIRST  .     .     .     .     .      .       .      .
    HEADR            .     FIRST  .     .     .     .     .      .       .      .
    FIRST            .     .      FIRST .     FIRST FIRST ARMED  FIRST_T .      .
    ARMED            .     .      ARMED .     ARMED ARMED ARMED  ARMED_T .      .
    PLAIN            .     .      PLAIN .     PLAIN PLAIN PLAIN  PLAIN_T .      .
    COMPR            .     .      COMPR COMPR COMPR COMPR COMPR  COMPR_T .      .
    FIRST_T          .     .      .     .     .     .     .      .       PLAIN  DONE
    ARMED_T          .     .      .     .     .     .     .      .       COMPR  DONE
    PLAIN_T          .     .      .     .     .     .     .      .       PLAIN  DONE
    COMPR_T          .     .      .     .     .     .     .      .       COMPR  DONE
    DONE             .     .      .     .     .     .     .      .       .      .
"""
"""What may stand where, and where one is then: written from the format, in the order of `EventKind`."""
STATES = {
    "FRONT": StreamState.FRONT,
    "HEADR": StreamState.HEADER,
    "FIRST": StreamState.FIRST_BODY,
    "ARMED": StreamState.ARMED_BODY,
    "PLAIN": StreamState.PLAIN_BODY,
    "COMPR": StreamState.COMPRESSED_BODY,
    "FIRST_T": StreamState.FIRST_TAIL,
    "ARMED_T": StreamState.ARMED_TAIL,
    "PLAIN_T": StreamState.PLAIN_TAIL,
    "COMPR_T": StreamState.COMPRESSED_TAIL,
    "DONE": StreamState.DONE,
}
ROWS = {row.split()[0]: row.split()[1:] for row in GRID.strip().splitlines()[1:]}
CELLS = [
    (STATES[name], kind, STATES.get(cell))
    for name, row in ROWS.items()
    for kind, cell in zip(EventKind, row, strict=True)
]

HEADER_EVENT = events.Header(word=8, guest="hvm", p2m_size=16)
TAIL_EVENT = events.TailHvm(magic_pfns=(1, 2, 3), context=b"", signature=Signature.XL, device_state=b"QEVM")
NO_PFNS, NO_TYPES = np.zeros(1, dtype=np.uint64), np.full(1, XTAB, dtype=np.uint8)


def event_of(kind: EventKind, *, compressing: bool) -> events.Event:
    data = None if compressing else np.empty((0, PAGE_SIZE), dtype=np.uint8)
    return {
        EventKind.FILE_HEADER: events.FileHeader(kind="xl", data=b""),
        EventKind.HEADER: HEADER_EVENT,
        EventKind.BATCH: events.Batch(pfns=NO_PFNS, types=NO_TYPES, data=data),
        EventKind.COMPRESSED_DATA: events.CompressedData(data=np.zeros(1, dtype=np.uint8)),
        EventKind.INFO: events.HvmParam(id=ChunkId.HVM_IDENT_PT, value=1),
        EventKind.LAST_CHECKPOINT: events.LastCheckpoint(),
        EventKind.ENABLE_COMPRESSION: events.EnableCompression(),
        EventKind.END_OF_BODY: events.EndOfBody(),
        EventKind.TAIL: TAIL_EVENT,
        EventKind.LAST_TAIL: TAIL_EVENT,
    }[kind]


WAYS: dict[StreamState, list[EventKind]] = {
    StreamState.FRONT: [],
    StreamState.HEADER: [EventKind.FILE_HEADER],
    StreamState.FIRST_BODY: [EventKind.HEADER],
    StreamState.ARMED_BODY: [EventKind.HEADER, EventKind.ENABLE_COMPRESSION],
    StreamState.PLAIN_BODY: [EventKind.HEADER, EventKind.END_OF_BODY, EventKind.TAIL],
    StreamState.COMPRESSED_BODY: [
        EventKind.HEADER,
        EventKind.ENABLE_COMPRESSION,
        EventKind.END_OF_BODY,
        EventKind.TAIL,
    ],
}
WAYS |= {
    tail: [*WAYS[body], EventKind.END_OF_BODY]
    for body, tail in (
        (StreamState.FIRST_BODY, StreamState.FIRST_TAIL),
        (StreamState.ARMED_BODY, StreamState.ARMED_TAIL),
        (StreamState.PLAIN_BODY, StreamState.PLAIN_TAIL),
        (StreamState.COMPRESSED_BODY, StreamState.COMPRESSED_TAIL),
    )
}
WAYS[StreamState.DONE] = [EventKind.HEADER, EventKind.LAST_CHECKPOINT, EventKind.END_OF_BODY, EventKind.TAIL]


def way_to(state: StreamState, kind: EventKind) -> list[EventKind]:
    """The events that lead to a place; before the tail of a last checkpoint, LAST_CHECKPOINT is one of them."""
    way = list(WAYS[state])
    if kind is EventKind.LAST_TAIL and state is not StreamState.DONE and EventKind.HEADER in way:
        way.insert(len(way) - (way[-1] is EventKind.END_OF_BODY), EventKind.LAST_CHECKPOINT)
    return way


def test_the_grid_names_every_state_and_every_kind() -> None:
    assert {state for state, _, _ in CELLS} == set(StreamState)
    assert len(CELLS) == len(StreamState) * len(EventKind)


@pytest.mark.parametrize(("state", "kind", "following"), CELLS, ids=lambda value: getattr(value, "name", "error"))
def test_the_writer_keeps_to_the_grid(state: StreamState, kind: EventKind, following: StreamState | None) -> None:
    writer = EventWriter(8)
    for step in way_to(state, kind):
        writer.write(event_of(step, compressing=writer.compressing))
    event = event_of(kind, compressing=writer.compressing)
    if following is None:
        before = writer.offset
        with pytest.raises(ValueError):
            writer.write(event)
        assert writer.offset == before
        return
    writer.write(event)
    # Where one is now shows in what may come next.
    allowed = {column for name, column, cell in CELLS if name is following and cell is not None}
    last = kind is EventKind.LAST_CHECKPOINT or (
        kind is EventKind.END_OF_BODY and EventKind.LAST_CHECKPOINT in way_to(state, kind)
    )
    for column in EventKind:
        again = EventWriter(8)
        for step in [*way_to(state, kind), kind, column]:
            try:
                again.write(event_of(step, compressing=again.compressing))
            except ValueError:
                assert step is column and (column not in allowed), (step, following)
                break
        else:
            assert column in allowed or (last and column is EventKind.TAIL)


def test_the_writer_refuses_a_batch_in_the_other_format() -> None:
    writer = EventWriter(8)
    writer.write(HEADER_EVENT)
    with pytest.raises(ValueError):
        writer.write(event_of(EventKind.BATCH, compressing=True))


def bytes_of(kind: EventKind, word: int) -> bytes:
    return {
        EventKind.FILE_HEADER: s.xl_header(b""),
        EventKind.HEADER: s.hvm_header(word, 16),
        EventKind.BATCH: s.batch(word, [entry(0, XTAB)]),
        EventKind.COMPRESSED_DATA: s.compressed(word, b"\x00"),
        EventKind.INFO: s.param(-3, 1),
        EventKind.LAST_CHECKPOINT: LAST_CHECKPOINT,
        EventKind.ENABLE_COMPRESSION: EC,
        EventKind.END_OF_BODY: END,
        EventKind.TAIL: s.hvm_tail(),
        EventKind.LAST_TAIL: s.hvm_tail(),
    }[kind]


BODIES = (StreamState.FIRST_BODY, StreamState.ARMED_BODY, StreamState.PLAIN_BODY, StreamState.COMPRESSED_BODY)
CHUNK_KINDS = (
    EventKind.BATCH,
    EventKind.COMPRESSED_DATA,
    EventKind.INFO,
    EventKind.LAST_CHECKPOINT,
    EventKind.ENABLE_COMPRESSION,
    EventKind.END_OF_BODY,
)


@both_words
@pytest.mark.parametrize(
    ("state", "kind", "following"),
    [cell for cell in CELLS if cell[0] in BODIES and cell[1] in CHUNK_KINDS],
    ids=lambda value: getattr(value, "name", "error"),
)
def test_the_reader_keeps_to_the_grid(
    state: StreamState, kind: EventKind, following: StreamState | None, word: Any
) -> None:
    dialect = Dialect(word=word, guest="hvm")
    front = b"".join(bytes_of(step, word) for step in way_to(state, kind))
    data = front + bytes_of(kind, word)
    found, error, _ = run(data, dialect=dialect)
    if following is None:
        assert isinstance(error, Malformed)
        assert (error.offset, error.section) == (len(front), "stream.md §6.2")
        assert len(found) == len(way_to(state, kind))
        return
    assert error is None
    assert len(found) == len(way_to(state, kind)) + 2  # and the end of the stream
    assert found[-2].offset == len(front)
    # Where one is now shows in how a page is read: with its bytes, or without, or as the tail.
    if following not in BODIES:
        data += s.hvm_tail()
        following = next(cell for name, column, cell in CELLS if name is following and column is EventKind.TAIL)
    after, error, _ = run(data + s.batch(word, [entry(1)]) + s.compressed(word, b"\x00"), dialect=dialect)
    if following is StreamState.COMPRESSED_BODY:
        assert error is None and kinds_of(after)[-3:] == ["Batch", "CompressedData", "EndOfStream"]
    else:
        # Those twelve bytes are taken for the beginning of a page that never ends.
        assert error is None and after[-1].complete is (
            following is not StreamState.DONE and not after[-1].trailing_bytes
        )
        assert kinds_of(after).count("Batch") == (kind is EventKind.BATCH)


@both_words
def test_last_checkpoint_ends_the_stream_with_its_tail(word: Any) -> None:
    data = s.hvm_header(word, 2) + s.batch(word, [entry(0)], page(1)) + LAST_CHECKPOINT + END + s.hvm_tail()
    for behind in (b"", b"\x07", s.batch(word, [entry(1)], page(2)) + END + s.hvm_tail()):
        found, error, _ = run(data + behind)
        assert error is None
        assert kinds_of(found) == ["Header", "Batch", "LastCheckpoint", "EndOfBody", "TailHvm", "EndOfStream"]
        assert found[-1] == events.EndOfStream(
            complete=not behind, trailing_bytes=len(behind), offset=len(data) + len(behind)
        )


# Every layout


def tmem(*pools: bytes, flags: int = 0x50) -> bytes:
    return struct.pack("<i7I", -5, 1, 8, 0xFFFFFFFF, flags, 6, 7, 0xFFFFFFFF) + b"".join(pools) + b"\xff" * 4


def tmem_pool(number: int, announced: int, *pages: bytes, flags: int = 0, uuid: tuple[int, int] = (11, 12)) -> bytes:
    return struct.pack("<3I2Q", number, flags, announced, *uuid) + b"".join(pages)


def tmem_page(oid: tuple[int, int, int], index: int, data: bytes) -> bytes:
    return struct.pack("<3QI", *oid, index) + data


NO_MORE = b"\xff" * 24
PARAMS = (-3, -4, -8, -10, -11, -14, -15, -16, -17, -19, -20, -21)
LAYOUTS: list[tuple[str, bytes, int, events.Event]] = [
    ("-1", struct.pack("<i", -1), 4, events.EnableVerifyMode()),
    ("-2", struct.pack("<iiQ", -2, 3, 0b1011), 16, events.VcpuInfo(highest_id=3, online=(0b1011,))),
    ("-2, 63", struct.pack("<iiQ", -2, 63, 1 << 63 | 1), 16, events.VcpuInfo(highest_id=63, online=(1 << 63 | 1,))),
    ("-2, 64", struct.pack("<iiQQ", -2, 64, 1, 1), 24, events.VcpuInfo(highest_id=64, online=(1, 1))),
    ("-2, 4095", struct.pack("<ii64Q", -2, 4095, *[1] * 64), 520, events.VcpuInfo(highest_id=4095, online=(1,) * 64)),
    *(
        (
            f"{number}",
            struct.pack("<iIQ", number, 0, 0x0102030405060708),
            16,
            events.HvmParam(id=ChunkId(number), value=0x0102030405060708),
        )
        for number in PARAMS
    ),
    ("-5, no pools", tmem(), 36, events.Tmem(version=1, max_pools=8, flags=0x50, weight=6, cap=7, pools=())),
    (
        "-5, pools",
        tmem(
            tmem_pool(0, 0),
            tmem_pool(1, 2, tmem_page((1, 2, 3), 4, page(1)), tmem_page((5, 6, 7), 8, page(2))),
            tmem_pool(2, 9, tmem_page((1, 2, 3), 4, page(3) * 2), NO_MORE, flags=1 << 4),
        ),
        36 + 3 * 28 + 2 * (28 + 4096) + (28 + 8192) + 24,
        events.Tmem(
            version=1,
            max_pools=8,
            flags=0x50,
            weight=6,
            cap=7,
            pools=(
                events.TmemPool(id=0, flags=0, announced_pages=0, uuid=(11, 12), pages=()),
                events.TmemPool(
                    id=1,
                    flags=0,
                    announced_pages=2,
                    uuid=(11, 12),
                    pages=(
                        events.TmemPage(object_id=(1, 2, 3), index=4, data=page(1)),
                        events.TmemPage(object_id=(5, 6, 7), index=8, data=page(2)),
                    ),
                ),
                events.TmemPool(
                    id=2,
                    flags=1 << 4,
                    announced_pages=9,
                    uuid=(11, 12),
                    pages=(events.TmemPage(object_id=(1, 2, 3), index=4, data=page(3) * 2),),
                ),
            ),
        ),
    ),
    ("-6, no keys", struct.pack("<iI", -6, 0xFFFFFFFF), 8, events.TmemExtra(keys=())),
    (
        "-6",
        struct.pack("<i", -6) + struct.pack("<I3QI", 4, 1, 2, 3, 5) * 2 + b"\xff" * 4,
        8 + 2 * 32,
        events.TmemExtra(keys=((4, (1, 2, 3), 5), (4, (1, 2, 3), 5))),
    ),
    ("-7", struct.pack("<iIQII", -7, 1, 1 << 40, 3, 4), 24, events.TscInfo(mode=1, nsec=1 << 40, khz=3, incarnation=4)),
    ("-9", struct.pack("<i", -9), 4, events.LastCheckpoint()),
    ("-13", struct.pack("<i", -13), 4, events.EnableCompression()),
    ("-18, empty", struct.pack("<iI", -18, 0), 8, events.Toolstack(data=b"")),
    ("-18", struct.pack("<iI", -18, 5) + b"hello", 13, events.Toolstack(data=b"hello")),
]


@both_words
@pytest.mark.parametrize(("data", "size", "expected"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_the_layout_of_every_chunk(data: bytes, size: int, expected: events.Event, word: Any) -> None:
    """The same bytes for both words: nothing here is of the toolstack's size, nothing is aligned."""
    assert len(data) == size
    front = s.hvm_header(word, 4) + s.batch(word, [entry(0)], page(1))
    found, error, _ = run(front + data + END + s.hvm_tail())
    assert error is None and found[-1].complete
    assert plain(found[2]) == plain(type(expected)(**{**fields(expected), "offset": len(front)}))
    for cut in {1, 4, 5, size // 2, size - 1} - {size}:
        if cut < size:
            short, error, _ = run(front + data[:cut])
            assert error is None and len(short) == 3 and not short[-1].complete
    writer = EventWriter(word)
    writer.write(events.Header(word=word, guest="hvm", p2m_size=4))
    assert b"".join(writer.write(expected)) == data


def fields(event: events.Event) -> dict[str, Any]:
    names = itertools.chain.from_iterable(getattr(kind, "__slots__", ()) for kind in type(event).__mro__)
    return {name: getattr(event, name) for name in names}


def test_the_layouts_cover_every_chunk() -> None:
    assert {struct.unpack_from("<i", row[1])[0] for row in LAYOUTS} | {-12} == set(CHUNKS) == set(range(-21, 0))
    assert set(ChunkId) == set(CHUNKS)


@both_words
def test_the_layout_of_compressed_data(word: Any) -> None:
    front = s.hvm_header(word, 4) + EC + END + s.hvm_tail()
    data = s.compressed(word, b"\x00" * 7)
    assert len(data) == 4 + word + 7
    found, error, reader = run(front + data + END + s.hvm_tail(), dialect=Dialect(word=word, guest="hvm"))
    assert error is None and not reader.deviations
    event = found[4]
    assert isinstance(event, events.CompressedData) and event.offset == len(front)
    assert bytes(event.data) == bytes(7)


def test_which_virtual_cpus_are_online() -> None:
    assert events.VcpuInfo(highest_id=3, online=(0b1011,)).ids() == [0, 1, 3]
    assert events.VcpuInfo(highest_id=65, online=(1, 0b111)).ids() == [0, 64, 65]  # bit 66 is beyond the highest


@both_words
def test_every_page_type_in_both_formats(word: Any) -> None:
    """Which entries are followed by a page (format A) and which are not; types 5 to 7 do not exist."""
    types = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15]
    entries = [entry(i, kind) for i, kind in enumerate(types)]
    pages = [page(kind) for kind in types if kind < 13]
    data = s.hvm_header(word, 16) + s.batch(word, entries, *pages) + EC + END + s.hvm_tail()
    data += s.batch(word, entries) + END + s.hvm_tail()
    found, error, _ = run(data)
    assert error is None and found[-1].complete
    first, second = (event for event in found if isinstance(event, events.Batch))
    assert first.types.tolist() == second.types.tolist() == types
    assert first.pfns.tolist() == second.pfns.tolist() == list(range(13))
    assert first.data is not None and first.data[:, 0].tolist() == [kind for kind in types if kind < 13]
    assert second.data is None


@both_words
def test_batches_of_one_and_of_1024_and_of_no_data(word: Any) -> None:
    data = s.hvm_header(word, 2000) + s.batch(word, [entry(7)], page(1))
    data += s.batch(word, [entry(i) for i in range(1024)], *[page(i % 251) for i in range(1024)])
    data += s.batch(word, [entry(0, XTAB)] * 1024) + END + s.hvm_tail()
    memories, error, restorer = restore(data)
    assert error is None and restorer.end is not None and restorer.end.complete
    assert memories[0] == b"".join(page(i % 251) for i in range(1024)) + page(0) * 976
    assert restorer.in_force is not None
    assert (restorer.in_force.batches, restorer.in_force.entries, restorer.in_force.page_count) == (3, 2049, 1025)


# PV


def context(fill: int, size: int = 5168) -> bytes:
    return bytes([fill]) * size


VCPU64, VCPU32 = s.block(b"vcpu", context(1)), s.block(b"vcpu", context(1, 2800))
EXTV, XCNT = s.block(b"extv", b""), s.block(b"xcnt", struct.pack("<I", 16 + 24))
PV_HEADERS: list[tuple[str, int, tuple[bytes, ...], int, int, bool, int]] = [
    # name, word, blocks, frames that the list has for 1,024 pages, context, extended, xsave bytes
    ("none", 8, (), 2, 5168, False, -1),
    ("none", 4, (), 1, 2800, False, -1),
    ("empty", 8, (b"",), 2, 5168, False, -1),
    ("vcpu of 64 bits", 8, (VCPU64,), 2, 5168, False, -1),
    ("vcpu of 64 bits", 4, (VCPU64,), 2, 5168, False, -1),
    ("vcpu of 32 bits", 8, (VCPU32,), 1, 2800, False, -1),
    ("vcpu of 32 bits", 4, (VCPU32,), 1, 2800, False, -1),
    ("extv", 8, (VCPU64, EXTV), 2, 5168, True, -1),
    ("xcnt", 8, (XCNT, VCPU64), 2, 5168, False, 24),
    ("xcnt of no bytes", 8, (VCPU64, s.block(b"xcnt", struct.pack("<I", 16))), 2, 5168, False, 0),
    ("all", 8, (VCPU64, EXTV, XCNT), 2, 5168, True, 24),
    ("all", 4, (EXTV, XCNT, VCPU32), 1, 2800, True, 24),
    ("unknown", 8, (s.block(b"what", b"ever"), VCPU64, s.block(b"none", b"")), 2, 5168, False, -1),
]


@pytest.mark.parametrize(
    ("word", "blocks", "frames", "size", "extended", "xsave"),
    [row[1:] for row in PV_HEADERS],
    ids=[f"{row[0]}, {row[1]}" for row in PV_HEADERS],
)
def test_pv_headers_and_tails(
    word: Any, blocks: tuple[bytes, ...], frames: int, size: int, extended: bool, xsave: int
) -> None:
    """Two virtual CPUs of four: the header decides how long their part of the tail is."""
    vcpus = []
    for fill in (1, 3):
        vcpus.append(context(fill, size))
        if extended:
            vcpus.append(bytes([0x10 | fill]) * 128)
        if xsave >= 0:
            vcpus.append(struct.pack("<QQ", 7, xsave) + bytes([0x20 | fill]) * xsave)
    data = s.pv_header(word, 1024, [*range(50, 50 + frames)], *blocks)
    data += s.batch(word, [entry(9), entry(10, 2), entry(0, XTAB)], page(1), page(2))
    data += s.vcpu_info(3, 0b1010) + EC + END + s.pv_tail(word, [5, 6, 7], *vcpus)
    data += s.batch(word, [entry(9)]) + s.compressed(word, b"\x00") + END + s.pv_tail(word, [], *vcpus)
    # Without extended info, the second word of a PV header is a PFN: nothing tells it from a chunk's id.
    dialect = None if blocks else Dialect(word=word, guest="pv")
    found, error, reader = run(data, dialect=dialect)
    assert error is None and found[-1].complete
    assert (reader.dialect.word, reader.dialect.guest) == (word, "pv")
    header = found[0]
    assert isinstance(header, events.Header)
    assert header.p2m_frames is not None and header.p2m_frames.tolist() == [*range(50, 50 + frames)]
    if blocks:
        assert header.extended_info is not None
        assert b"".join(s.block(each.id, each.data) for each in header.extended_info) == b"".join(blocks)
    else:
        assert header.extended_info is None
    first, second = (event for event in found if isinstance(event, events.TailPv))
    assert first.unmapped.tolist() == [5, 6, 7] and second.unmapped.tolist() == []
    assert first.shared_info == second.shared_info == page(0x5A)
    for tail in (first, second):
        for vcpu, number in zip(tail.vcpus, (1, 3), strict=True):
            assert vcpu.id == number and vcpu.context == context(number, size)
            assert vcpu.extended == (bytes([0x10 | number]) * 128 if extended else None)
            assert vcpu.xsave_mask == (7 if xsave >= 0 else None)
            assert vcpu.xsave == (bytes([0x20 | number]) * xsave if xsave > 0 else b"")
    assert second.end == len(data)
    assert set(reader.deviations) == ({"unknown-extended-info"} if any(b"what" in each for each in blocks) else set())
    assert rewritten(found, word) == data
    assert restore(data, dialect=dialect)[0][0] == restore(data, dialect=dialect)[0][1]


def test_a_pv_tail_without_vcpu_info_is_of_one_virtual_cpu() -> None:
    data = s.pv_header(8, 4, [1], VCPU64) + END + s.pv_tail(8, [], context(4))
    found, error, _ = run(data)
    assert error is None and found[-1].complete
    assert [vcpu.id for vcpu in found[2].vcpus] == [0]


def rewritten(found: list[events.Event], word: Any) -> bytes:
    writer = EventWriter(word)
    data = [bytes(each) for event in found if not isinstance(event, events.EndOfStream) for each in writer.write(event)]
    assert writer.offset == sum(map(len, data))
    return b"".join(data)


# What stands in front


@both_words
@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (s.xl_header(b""), events.FileHeader(kind="xl", data=b"")),
        (s.xl_header(b"\x04\0\0\0name" * 9), events.FileHeader(kind="xl", data=b"\x04\0\0\0name" * 9)),
        (
            s.xl_header(b"{}", mandatory=1, optional=0x80000000),
            events.FileHeader(kind="xl", mandatory_flags=1, optional_flags=0x80000000, data=b"{}"),
        ),
        (s.xend_header(b""), events.FileHeader(kind="xend", data=b"")),
        (s.xend_header(b"(vm (name x))" * 300), events.FileHeader(kind="xend", data=b"(vm (name x))" * 300)),
    ],
    ids=["xl, no data", "xl", "xl, flags", "xend, no data", "xend"],
)
def test_file_headers(front: bytes, expected: events.FileHeader, word: Any) -> None:
    stream = s.small_hvm(word)
    found, error, reader = run(front + stream)
    assert error is None and found[0] == expected
    assert found[1] == events.Header(word=word, guest="hvm", p2m_size=4, offset=len(front))
    assert found[-1] == events.EndOfStream(complete=True, trailing_bytes=0, offset=len(front) + len(stream))
    assert reader.checkpoint_end == len(front) + len(stream)
    assert rewritten(found, word) == front + stream
    assert restore(front + stream)[0] == restore(stream)[0]


V2 = b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 2, 0, 0, 0)
REFUSED: list[tuple[str, bytes, type[StreamError], int, str]] = [
    ("v2", V2, UnknownFormat, 0, "§2.3"),
    ("v2 behind xl without its flag", s.xl_header(b"abc") + V2, UnknownFormat, 51, "§2.3"),
    ("v2 behind xend", s.xend_header(b"abc") + V2, UnknownFormat, 23, "§2.3"),
    ("xl's flag for v2", s.xl_header(b"", mandatory=3) + V2, UnknownFormat, 36, "§2.3"),
    ("unknown mandatory flag", s.xl_header(b"", mandatory=4), UnknownFormat, 36, "§2.1"),
    ("the other byte order", s.xl_header(b"", order=0x04030201), UnknownFormat, 32, "§2.1"),
    ("half of xl's magic", b"Xen saved domain, xl format\n \0 \n" + bytes(16), Malformed, 0, "§2.1"),
    ("half of xend's magic", b"LinuxGuestRecorD" + bytes(16), Malformed, 0, "§2.2"),
    ("xend, negative length", b"LinuxGuestRecord" + struct.pack(">i", -1), Malformed, 16, "§2.2"),
    ("two file headers", s.xl_header(b"") + s.xl_header(b""), UnknownFormat, 48, "§1.2"),
    ("zeros", bytes(64), UnknownFormat, 0, "§1.2"),
    ("noise", bytes(range(128, 192)), UnknownFormat, 0, "§1.2"),
    ("ELF", b"\x7fELF\x02\x01\x01" + bytes(60), UnknownFormat, 0, "§1.2"),
    ("QEMU", b"QEVM\0\0\0\x03" + bytes(60), UnknownFormat, 0, "§1.2"),
    ("gzip", b"\x1f\x8b\x08\x08\x12\x34\x56\x78\x00\x03" + bytes(60), UnknownFormat, 0, "§1.2"),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(60), UnknownFormat, 0, "§1.2"),
    ("no chunk that could be the first", s.word(8, 4) + struct.pack("<i", -22) + bytes(16), UnknownFormat, 0, "§1.2"),
    ("no batch that could be the first", s.word(8, 4) + struct.pack("<i", 1025) + bytes(16), UnknownFormat, 0, "§1.2"),
    ("p2m_size too large", s.word(8, 1 << 28) + EC + END + bytes(16), UnknownFormat, 0, "§1.2"),
]


@pytest.mark.parametrize(("data", "error", "offset", "section"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_refused_at_the_front(data: bytes, error: type[StreamError], offset: int, section: str) -> None:
    found, caught, reader = run(data)
    assert type(caught) is error
    assert (caught.offset, caught.section) == (offset, f"stream.md {section}")
    assert "Header" not in kinds_of(found)
    with pytest.raises(error) as again:
        reader.next_event()
    assert again.value is caught


@pytest.mark.parametrize("p2m_size", [0x8B1F, 0x45_8B1F, 0x08_8B1F])
@both_words
def test_a_stream_is_not_taken_for_gzip_by_its_size(p2m_size: int, word: Any) -> None:
    """The magic of gzip has two bytes, and some memories have just so many pages."""
    for dialect in (None, Dialect(word=word, guest="hvm")):
        found, error, _ = run(s.hvm_header(word, p2m_size) + EC + END + s.hvm_tail(), dialect=dialect)
        assert error is None and found[-1].complete


@pytest.mark.parametrize("size", range(16))
def test_bytes_too_few_for_a_header_are_an_incomplete_stream(size: int) -> None:
    for data in (s.small_hvm(8), s.small_hvm(4), s.xl_header(b""), s.xend_header(b"")):
        found, error, _ = run(data[:size])
        assert error is None
        assert found == [events.EndOfStream(complete=False, trailing_bytes=size, offset=size)]


# Detection


@both_words
@pytest.mark.parametrize("guest", ["hvm", "pv"])
@pytest.mark.parametrize("p2m_size", [1, 4, 511, 1 << 20, 0x0FFFFFFF])
def test_word_and_guest_are_detected(word: Any, guest: Any, p2m_size: int) -> None:
    limits = Limits(memory_bytes=1 << 50)
    if guest == "hvm":
        data = s.hvm_header(word, p2m_size) + s.batch(word, [entry(0, XTAB)]) + END
        if p2m_size == 0x0FFFFFFF:
            data = s.hvm_header(word, p2m_size) + EC + END
    else:
        data = s.pv_header(word, p2m_size, [1], b"")
        data += bytes(word) * (-(-p2m_size // (4096 // word)) - 1) if p2m_size < 1024 else b""
    reader = Reader(limits=limits)
    reader.feed(data + bytes(16))
    if guest == "hvm" or p2m_size < 1024:
        header = reader.next_event()
        assert header is not NEED_DATA and header.p2m_size == p2m_size
    else:
        assert reader.next_event() is NEED_DATA
    assert reader.dialect == Dialect(word=word, guest=guest, codec=None)


def test_what_is_given_is_believed_and_not_detected() -> None:
    # As a 64-bit toolstack's, this is an empty body; as a 32-bit one's, a p2m_size, an end of body and a tail.
    data = s.hvm_header(4, 5) + END + s.hvm_tail()
    found, error, _ = run(data, dialect=Dialect(word=4))
    assert error is None and kinds_of(found) == ["Header", "EndOfBody", "TailHvm", "EndOfStream"]
    assert found[-1].complete
    found, error, _ = run(s.pv_header(8, 4, [77]) + END + s.pv_tail(8, [], context(0)), dialect=Dialect(guest="pv"))
    assert error is None and found[-1].complete
    found, error, _ = run(s.hvm_header(8, 0) + bytes(16), dialect=HVM8)
    assert type(error) is Malformed and (error.offset, error.section) == (0, "stream.md §3.1")
    found, error, _ = run(s.hvm_header(8, 1 << 28) + bytes(16), dialect=HVM8)
    assert type(error) is Malformed and (error.offset, error.section) == (0, "stream.md §3.1")


@pytest.mark.parametrize("bad", [{"word": 2}, {"guest": "xen"}, {"codec": "xbzrle"}])
def test_a_dialect_that_does_not_exist(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Dialect(**bad)


BEGIN, FULL = struct.pack("<hI", -100, 0), struct.pack("<hI", -101, 0)
OPENINGS = [
    (BEGIN, "delta"),
    (FULL + page(1), "delta"),
    (b"\x00", "rle"),
    (b"\x80" + page(1), "rle"),
    (b"\x9c" + b"\xff" * 6 + b"\x88" + b"\xff\x65", "rle"),
]


@both_words
@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize(("opening", "codec"), OPENINGS)
def test_the_codec_is_detected_from_the_first_compressed_bytes(
    opening: bytes, codec: str, pieces: int, word: Any
) -> None:
    step = -(-len(opening) // pieces)
    data = s.hvm_header(word, 4) + EC + END + s.hvm_tail() + s.batch(word, [entry(0)])
    for at in range(0, len(opening), step):
        data += s.compressed(word, opening[at : at + step])
    found, error, reader = run(data)
    assert error is None and reader.dialect.codec is None
    found, error, reader = run(data + END + s.hvm_tail())
    assert error is None and found[-1].complete
    assert reader.dialect.codec == codec
    found, error, reader = run(data + END + s.hvm_tail(), dialect=Dialect(codec="delta"))
    assert reader.dialect.codec == "delta"


# Splits


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


def read_in_steps(data: bytes, steps: list[int], *, in_place: bool) -> tuple[list[Any], Any, Any]:
    """Events, error and deviations of a stream that comes in such steps, over and over."""
    reader = Reader()
    found: list[Any] = []
    at = 0
    sizes = itertools.cycle(steps)
    while True:
        try:
            event = reader.next_event()
        except StreamError as error:
            return found, (type(error), error.offset, error.section, error.chunk), reader.dialect
        if event is not NEED_DATA:
            found.append(plain(event))
            if isinstance(event, events.EndOfStream):
                return found, None, reader.dialect
            continue
        if at >= len(data):
            reader.feed_eof()
            continue
        size = max(next(sizes), 1)
        if in_place:
            room = reader.get_buffer()
            size = min(size, len(room), len(data) - at)
            room[:size] = data[at : at + size]
            reader.buffer_updated(size)
        else:
            reader.feed(data[at : at + size])
        at += size


@pytest.mark.parametrize("in_place", [False, True], ids=["feed", "get_buffer"])
@pytest.mark.parametrize("name", WHOLE)
def test_one_byte_at_a_time(name: str, in_place: bool) -> None:
    assert read_in_steps(WHOLE[name], [1], in_place=in_place) == read_in_steps(WHOLE[name], [1 << 30], in_place=False)


@pytest.mark.parametrize("in_place", [False, True], ids=["feed", "get_buffer"])
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.sampled_from([1, 3, 4, 8, 12]) | st.integers(1, 9000), min_size=1, max_size=12),
)
@settings(max_examples=many(16, 80))
def test_any_split_gives_the_same_events(in_place: bool, name: str, steps: list[int]) -> None:
    assert read_in_steps(WHOLE[name], steps, in_place=in_place) == read_in_steps(WHOLE[name], [1 << 30], in_place=False)


def test_a_payload_is_received_where_it_stays() -> None:
    """A page comes into the reader's hands once: what `get_buffer` gives is the page of the event."""
    reader = Reader(HVM8)
    head = s.hvm_header(8, 600) + s.batch(8, [entry(i) for i in range(200)])
    reader.get_buffer()[: len(head)] = head
    reader.buffer_updated(len(head))
    assert isinstance(reader.next_event(), events.Header)
    assert reader.next_event() is NEED_DATA
    room = reader.get_buffer()
    assert len(room) == 200 * PAGE_SIZE
    room[:] = b"\x17" * len(room)
    reader.buffer_updated(len(room))
    event = reader.next_event()
    assert isinstance(event, events.Batch) and event.data is not None
    assert np.shares_memory(event.data, np.frombuffer(room, dtype=np.uint8))


def test_a_full_buffer_says_so() -> None:
    reader = Reader(HVM8)
    for _ in range(100):
        try:
            room = reader.get_buffer()
        except BufferError:
            break
        room[:] = bytes(len(room))
        reader.buffer_updated(len(room))
    else:
        pytest.fail("the buffer never filled")
    with pytest.raises(Malformed):
        reader.next_event()


# Cuts


def test_a_cut_anywhere_is_complete_exactly_at_borders() -> None:
    head = s.hvm_header(8, 4) + s.batch(8, [entry(0, XTAB), entry(1, XALLOC)]) + s.vcpu_info(0, 1) + s.param(-3, 1)
    first = head + s.toolstack(b"tools") + EC + END + s.hvm_tail(b"context", state=b"")
    second = s.batch(8, [entry(1)]) + s.compressed(8, b"\x00") + END + s.hvm_tail(b"", s.REMUS, b"QEVM" + bytes(20))
    third = s.batch(8, [entry(2)]) + s.compressed(8, b"\x00") + LAST_CHECKPOINT + END + s.hvm_tail()
    data = first + second + third
    borders = {len(first), len(first + second), len(data)}
    for cut in range(len(data) + 1):
        found, error, _ = run(data[:cut])
        assert error is None
        whole = [border for border in borders if border <= cut]
        assert found[-1] == events.EndOfStream(
            complete=cut in borders, trailing_bytes=cut - max(whole, default=0), offset=cut
        )
        assert kinds_of(found).count("TailHvm") == len(whole)


@pytest.mark.parametrize("name", ["hvm, 8", "pv, 4", "xl, 4"])
def test_a_cut_anywhere_keeps_the_checkpoints_before(name: str) -> None:
    data = WHOLE[name]
    found, _, _ = run(data)
    ends = [event.end for event in found if isinstance(event, events.Tail)]
    memories = restore(data)[0]
    beside = {end + step for end in ends for step in (-1, 0, 1)}
    for cut in sorted(({*range(0, len(data), 97)} | beside) - {len(data) + 1}):
        got, error, restorer = restore(data[:cut])
        whole = sum(end <= cut for end in ends)
        assert error is None
        assert got == memories[:whole]
        assert (restorer.in_force is None) == (whole == 0)
        assert restorer.end is not None and restorer.end.complete == (cut in ends)


def test_a_qemu_record_without_length_ends_with_the_bytes() -> None:
    front = s.hvm_header(8, 4) + EC + END + s.hvm_tail(b"", s.QEMU, b"")
    for state in (b"QEVM", b"QEVM" + bytes(range(256)) * 2000):
        found, error, _ = run(front + state)
        assert error is None and found[-1].complete
        assert found[-2].device_state == state and found[-2].end == len(front + state)
    for state in (b"", b"Q", b"QEV"):
        found, error, _ = run(front + state)
        assert error is None and not found[-1].complete and kinds_of(found)[-2] == "EndOfBody"


# Writer


@pytest.mark.parametrize("name", [name for name in WHOLE if "cut" not in name and "behind" not in name])
def test_what_is_read_is_written_again_byte_by_byte(name: str) -> None:
    found, error, reader = run(WHOLE[name])
    data = rewritten(found, reader.dialect.word)
    assert data == WHOLE[name][: len(data)] and len(data) == (error.offset if error else len(WHOLE[name]))


# What is tolerated by name


def rle_round(word: int, *chunks: bytes) -> bytes:
    """A first checkpoint that arms compression, and a second one of these chunks."""
    first = s.hvm_header(word, 4) + EC + END + s.hvm_tail()
    return first + b"".join(chunks) + END + s.hvm_tail()


START = len(rle_round(8)) - len(END + s.hvm_tail())
TWO = s.batch(8, [entry(0), entry(1)])
PERMISSIVE: list[tuple[str, bytes, int, str]] = [
    ("nonzero-pad", s.hvm_header(8, 4) + s.param(-3, 5, pad=1) + END + s.hvm_tail(), 8, "§4.3"),
    ("entry-high-bits", s.hvm_header(8, 4) + s.batch(8, [1 << 40 | 2], page(1)) + END + s.hvm_tail(), 8, "§5.1"),
    (
        "enable-compression-out-of-place",
        s.hvm_header(8, 4) + EC + s.batch(8, [entry(0)], page(1)) + END + s.hvm_tail(),
        12,
        "§6.1",
    ),
    (
        "enable-compression-out-of-place",
        s.hvm_header(8, 4) + EC + s.param(-3, 1) + END + s.hvm_tail(),
        12,
        "§6.1",
    ),
    ("enable-compression-out-of-place", s.hvm_header(8, 4) + EC + EC + END + s.hvm_tail(), 12, "§6.1"),
    (
        "enable-compression-out-of-place",
        s.hvm_header(8, 4) + s.batch(8, [entry(0)], page(1)) + END + s.hvm_tail() + EC + END + s.hvm_tail(),
        len(s.hvm_header(8, 4) + s.batch(8, [entry(0)], page(1)) + END + s.hvm_tail()),
        "§6.1",
    ),
    ("enable-compression-out-of-place", rle_round(8, EC), START, "§6.1"),
    ("empty-compressed-data", rle_round(8, s.compressed(8, b"")), START, "§6.2"),
    ("empty-compressed-data", rle_round(8, TWO, s.compressed(8, b""), s.compressed(8, b"\0\0")), START + 20, "§6.2"),
    ("surplus-compressed-bytes", rle_round(8, TWO, s.compressed(8, b"\0\0\0")), START + 20 + 12 + 2, "§6.2"),
    ("surplus-compressed-bytes", rle_round(8, s.compressed(8, b"\0")), START + 12, "§6.2"),
    (
        "unknown-extended-info",
        s.pv_header(8, 4, [1], s.block(b"what", b"")) + END + s.pv_tail(8, [], context(1)),
        20,
        "§3.3",
    ),
    (
        "xsave-size",
        s.pv_header(8, 4, [1], XCNT) + END + s.pv_tail(8, [], context(1) + struct.pack("<QQ", 1, 25) + bytes(24)),
        20 + 12 + 8 + 4 + 4 + 5168,
        "§7.3",
    ),
]
SILENT: list[tuple[str, bytes, int, str]] = [
    (
        "split-page",
        rle_round(8, TWO, s.compressed(8, b"\0\xff\xff\xff"), s.compressed(8, b"\xff\xff\xff\xff\xff\x88")),
        START + 20,
        "§6.2",
    ),
    ("compressed-before-batch", rle_round(8, s.compressed(8, b"\0\0"), TWO), START, "§6.4"),
    (
        "compressed-before-batch",
        rle_round(8, TWO, s.compressed(8, b"\0\0\0"), s.batch(8, [entry(2)])),
        START + 20,
        "§6.4",
    ),
]
"""Looked for only under strict: the reader has no need of those borders, and finding them costs time."""


@pytest.mark.parametrize(
    ("name", "data", "offset", "section"), PERMISSIVE + SILENT, ids=[r[0] for r in PERMISSIVE + SILENT]
)
def test_what_no_sender_should_write_is_refused_under_strict(name: str, data: bytes, offset: int, section: str) -> None:
    memories, error, restorer = restore(data)
    assert error is None and restorer.end is not None and restorer.end.complete
    if (name, data, offset, section) in PERMISSIVE:
        assert list(restorer.reader.deviations) == [name]
        noted = restorer.reader.deviations[name]
        assert (noted.first_offset, noted.count) == (offset, 1)
    strict_memories, error, _ = restore(data, strict=True)
    assert type(error) is Malformed
    assert (error.offset, error.section) == (offset, f"stream.md {section}")
    assert strict_memories == memories[: len(strict_memories)]


def test_a_deviation_is_counted() -> None:
    data = s.hvm_header(8, 4) + s.param(-3, 5, pad=1) * 3 + s.param(-4, 1) + END + s.hvm_tail()
    _, error, reader = run(data)
    assert error is None
    assert reader.deviations == {"nonzero-pad": events.Deviation("nonzero-pad", 8, 3)}


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith(("cut", "behind", "malformed"))])
def test_what_is_right_passes_strict(name: str) -> None:
    memories, error, restorer = restore(WHOLE[name], strict=True)
    assert error is None and restorer.end is not None and restorer.end.complete and not restorer.reader.deviations
    assert memories == restore(WHOLE[name])[0]


# What is refused


HEAD = s.hvm_header(8, 4)
PLAIN_ROUND = HEAD + END + s.hvm_tail()
BAD: list[tuple[str, bytes, int, str, str | None]] = [
    ("a batch of 1,025", HEAD + EC + struct.pack("<i", 1025), 12, "§5", "batch"),
    ("a batch of 2**31-1", HEAD + EC + struct.pack("<i", 2**31 - 1), 12, "§5", "batch"),
    ("chunk -22", HEAD + EC + struct.pack("<i", -22), 12, "§4.1", "chunk -22"),
    ("chunk -2**31", HEAD + EC + struct.pack("<i", -(2**31)), 12, "§4.1", "chunk -2147483648"),
    *(
        (f"page type {kind}", HEAD + s.batch(8, [entry(0), entry(1, kind)]), 8, "§5.2", "batch")
        for kind in (5, 6, 7)
    ),
    ("PFN at the end of memory", HEAD + s.batch(8, [entry(3), entry(4)]), 8, "§5.1", "batch"),
    ("the highest PFN", HEAD + s.batch(8, [entry(0x0FFFFFFF)]), 8, "§5.1", "batch"),
    ("PFN beyond, compressed", rle_round(8, s.batch(8, [entry(4)])), START, "§5.1", "batch"),
    ("page type 5, compressed", rle_round(8, s.batch(8, [entry(0, 5)])), START, "§5.2", "batch"),
    ("COMPRESSED_DATA in round 0", HEAD + EC + s.compressed(8, b"\0"), 12, "§6.2", "chunk -12 COMPRESSED_DATA"),
    (
        "COMPRESSED_DATA in a plain round",
        PLAIN_ROUND + s.compressed(8, b"\0"),
        len(PLAIN_ROUND),
        "§6.2",
        "chunk -12 COMPRESSED_DATA",
    ),
    (
        "COMPRESSED_DATA of 2**32 in a plain round",
        PLAIN_ROUND + struct.pack("<iQ", -12, 1 << 32),
        len(PLAIN_ROUND),
        "§6.2",
        "chunk -12 COMPRESSED_DATA",
    ),
    ("virtual CPU -1", HEAD + struct.pack("<ii", -2, -1), 8, "§4.2", "chunk -2 VCPU_INFO"),
    ("TMEM without ones", HEAD + struct.pack("<i7I", -5, 1, 2, 3, 4, 5, 6, 7), 8, "§4.4", "chunk -5 TMEM"),
    ("unknown signature", HEAD + EC + END + s.hvm_tail(b"ctx", b"DeviceModelRecord0001"), 16 + 28 + 3, "§7.2", "tail"),
    ("QEMU's record without QEVM", HEAD + EC + END + s.hvm_tail(b"", s.QEMU, b"QEMU"), 16 + 28 + 21, "§7.2", "tail"),
    ("half a block", s.pv_header(8, 4, [1], b"vcpu\0\0\0"), 20, "§3.3", "header"),
    ("a block too long", s.pv_header(8, 4, [1], b"what" + struct.pack("<I", 1)), 20, "§3.3", "header"),
    ("a block of 2**32-1", s.pv_header(8, 4, [1], b"what" + struct.pack("<I", 0xFFFFFFFF)), 20, "§3.3", "header"),
    ("vcpu of 5,167 bytes", s.pv_header(8, 4, [1], s.block(b"vcpu", bytes(5167))), 20, "§3.3", "header"),
    ("vcpu of no bytes", s.pv_header(8, 4, [1], s.block(b"vcpu", b"")), 20, "§3.3", "header"),
    ("extv of one byte", s.pv_header(8, 4, [1], s.block(b"extv", b"x")), 20, "§3.3", "header"),
    ("xcnt of two bytes", s.pv_header(8, 4, [1], s.block(b"xcnt", b"\x20\0")), 20, "§3.3", "header"),
    ("xcnt of 15", s.pv_header(8, 4, [1], VCPU64, s.block(b"xcnt", b"\x0f\0\0\0")), 20 + 5176, "§3.3", "header"),
    (
        "more unmapped than there are",
        s.pv_header(8, 4, [1], VCPU64) + END + struct.pack("<I", 5),
        20 + 5176 + 8 + 4,
        "§7.3",
        "tail",
    ),
    ("rle, bad run", rle_round(8, TWO, s.compressed(8, b"\0\x81\0")), START + 34, "rle §2.2", "COMPRESSED_DATA"),
    ("rle, too little", rle_round(8, TWO, s.compressed(8, b"\0")), START + 33, "rle §4.3", "COMPRESSED_DATA"),
    ("rle, nothing", rle_round(8, TWO), START + 20 + 4, "rle §4.3", "COMPRESSED_DATA"),
    (
        "rle, the fault in the second chunk",
        rle_round(8, TWO, s.compressed(8, b"\0\x81"), s.compressed(8, b"\x82\0\0")),
        START + 20 + 14 + 12 + 1,
        "rle §2.2",
        "COMPRESSED_DATA",
    ),
    (
        "rle, the fault on the first byte of the second chunk",
        rle_round(8, TWO, s.compressed(8, b"\0"), s.compressed(8, b"\x02ab")),
        START + 20 + 13 + 12,
        "rle §4.3",
        "COMPRESSED_DATA",
    ),
    (
        "delta, offset",
        rle_round(8, TWO, s.compressed(8, BEGIN + BEGIN + struct.pack("<hI", 2, 1))),
        START + 20 + 12 + 12,
        "delta §2.1",
        "COMPRESSED_DATA",
    ),
]  # fmt: skip


def section_of(text: str) -> str:
    document, _, number = text.rpartition(" ")
    return f"{document or 'stream'}.md {number}"


@pytest.mark.parametrize(("data", "offset", "section", "chunk"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_malformed_streams_say_where_and_why(data: bytes, offset: int, section: str, chunk: str | None) -> None:
    memories, error, restorer = restore(data + bytes(40))
    assert type(error) is Malformed
    assert (error.offset, error.section, error.chunk) == (offset, section_of(section), chunk)
    # What was in force stays, and the error is there to stay.
    assert len(memories) == (data.startswith(rle_round(8)[:START]) or data.startswith(PLAIN_ROUND))
    if memories:
        assert restorer.memory.tobytes() == memories[-1]
        assert restorer.in_force is not None and restorer.in_force.epoch == 0
    for _ in range(2):
        with pytest.raises(Malformed) as again:
            restorer.next_event()
        assert again.value is error


# Limits


FIVE = s.compressed(8, bytes(5))
BARE = HEAD + EC + END
"""The tail comes next."""
LIMITED: list[tuple[str, Limits, bytes, int]] = [
    ("memory_bytes", Limits(memory_bytes=3 * PAGE_SIZE), HEAD + bytes(16), 0),
    ("memory_bytes", Limits(), s.hvm_header(8, 0x0FFFFFFF) + END + bytes(16), 0),
    ("compressed_chunk_bytes", Limits(compressed_chunk_bytes=4), rle_round(8, TWO, FIVE), START + 20),
    ("compressed_chunk_bytes", Limits(), rle_round(8, TWO, struct.pack("<iQ", -12, 1 << 63)), START + 20),
    ("compressed_chunk_bytes", Limits(), rle_round(8, TWO, struct.pack("<iQ", -12, 1 << 32)), START + 20),
    ("vcpus", Limits(), HEAD + s.vcpu_info(4096), 8),
    ("vcpus", Limits(vcpus=2), HEAD + s.vcpu_info(2, 7), 8),
    ("vcpus", Limits(), HEAD + s.vcpu_info(2**31 - 1), 8),
    ("extended_info_bytes", Limits(), s.hvm_header(8, 4) + b"\xff" * 12, 16),
    ("extended_info_bytes", Limits(extended_info_bytes=7), s.pv_header(8, 4, [1], EXTV), 16),
    ("xsave_bytes", Limits(), s.pv_header(8, 4, [1], s.block(b"xcnt", b"\xff" * 4)), 20),
    ("xsave_bytes", Limits(xsave_bytes=39), s.pv_header(8, 4, [1], XCNT), 20),
    ("toolstack_bytes", Limits(), HEAD + struct.pack("<iI", -18, 0xFFFFFFFF), 8),
    ("toolstack_bytes", Limits(toolstack_bytes=4), HEAD + s.toolstack(b"hello"), 8),
    ("hvm_context_bytes", Limits(), HEAD + EC + END + struct.pack("<3QI", 1, 2, 3, 0xFFFFFFFF), 16 + 24),
    ("hvm_context_bytes", Limits(hvm_context_bytes=2), BARE + s.hvm_tail(b"ctx"), 16 + 24),
    ("device_state_bytes", Limits(device_state_bytes=3), BARE + s.hvm_tail(b"", s.XL, b"QEVM"), 16 + 28 + 21),
    ("device_state_bytes", Limits(device_state_bytes=3), BARE + s.hvm_tail(b"", s.REMUS, b"QEVM"), 16 + 28 + 21),
    ("device_state_bytes", Limits(device_state_bytes=3), BARE + s.hvm_tail(b"", s.QEMU, b"QEVM"), 16 + 28 + 21),
    (
        "device_state_bytes",
        Limits(),
        BARE + s.hvm_tail(b"", s.XL, b"")[:-4] + struct.pack("<I", 0xFFFFFFFF),
        16 + 28 + 21,
    ),
    ("tmem_bytes", Limits(tmem_bytes=4000), HEAD + tmem(tmem_pool(1, 1, tmem_page((1, 2, 3), 4, page(1)))), 8),
    ("tmem_bytes", Limits(tmem_bytes=600), HEAD + tmem(*[tmem_pool(1, 0)] * 100), 8),
    ("tmem_bytes", Limits(tmem_bytes=600), HEAD + struct.pack("<i", -6) + bytes(32) * 100, 8),
    (
        "tmem_bytes",
        Limits(),
        HEAD + tmem(tmem_pool(1, 1, struct.pack("<3QI", 1, 2, 3, 4), flags=0xF0)),
        8,
    ),
    ("file_header_bytes", Limits(), s.xl_header(b"")[:-4] + b"\xff" * 4, 44),
    ("file_header_bytes", Limits(file_header_bytes=2), s.xl_header(b"abc"), 44),
    ("file_header_bytes", Limits(), b"LinuxGuestRecord\x7f\xff\xff\xff", 16),
    ("file_header_bytes", Limits(file_header_bytes=2), s.xend_header(b"abc"), 16),
    (
        "checkpoint_entries",
        Limits(checkpoint_entries=3),
        rle_round(8, TWO, TWO),
        START + 20,
    ),
    (
        "checkpoint_bytes",
        # Each of the three costs 256 bytes besides its contents.
        Limits(checkpoint_bytes=3 * 256 + 4),
        rle_round(8, TWO, s.compressed(8, bytes(3)), s.compressed(8, bytes(2))),
        START + 20 + 15,
    ),
    (
        "checkpoint_bytes",
        Limits(checkpoint_bytes=2 * 256 + 2 * PAGE_SIZE),
        PLAIN_ROUND + s.batch(8, [entry(0), entry(1)], page(1), page(2)) + s.batch(8, [entry(0)], page(1)),
        len(PLAIN_ROUND) + 20 + 2 * PAGE_SIZE,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "limits", "data", "offset"), LIMITED, ids=[f"{row[0]}-{i}" for i, row in enumerate(LIMITED)]
)
def test_every_claim_meets_its_limit_before_memory_is_taken(
    name: str, limits: Limits, data: bytes, offset: int
) -> None:
    tracemalloc.start()
    try:
        _, error, _ = restore(data, limits=limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(error) is LimitExceeded
    assert (error.limit, error.offset) == (name, offset)
    assert peak < 2 * MIB


def test_every_limit_has_a_hostile_stream() -> None:
    # manifest_bytes bounds what stands within the device state; tests/source/test_own_memory.py tries it.
    assert {row[0] for row in LIMITED} == {*Limits.__slots__} - {"manifest_bytes"}


@pytest.mark.parametrize(
    "data",
    [
        HEAD + struct.pack("<iI", -18, 16 << 20),
        HEAD + EC + END + struct.pack("<3QI", 1, 2, 3, 64 << 20),
        HEAD + EC + END + s.hvm_tail(b"", s.XL, b"")[:-4] + struct.pack("<I", 256 << 20),
        HEAD + EC + END + s.hvm_tail(b"", s.REMUS, b"")[:-4] + struct.pack("<I", 256 << 20),
        s.xl_header(b"")[:-4] + struct.pack("<I", 16 << 20),
        s.pv_header(8, 0x0FFFFFF, [1]),
        rle_round(8, TWO, struct.pack("<iQ", -12, 64 << 20))[: START + 32],
        HEAD + s.batch(8, [entry(0)] * 1024),
    ],
    ids=["toolstack", "context", "device state", "record", "file header", "p2m list", "compressed", "batch"],
)
def test_a_length_alone_costs_no_memory(data: bytes) -> None:
    """Lengths within their limit, and no bytes that would fill them."""
    tracemalloc.start()
    try:
        dialect = Dialect(word=8, guest="pv") if data.startswith(s.word(8, 0x0FFFFFF)) else None
        _, error, _ = restore(data, dialect=dialect, limits=Limits(memory_bytes=1 << 50))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error is None
    assert peak < 12 * MIB


def seconds_for(chunks: int) -> float:
    tiny = [s.vcpu_info(0, 1), s.param(-3, 1), s.toolstack(b""), struct.pack("<i", -1), s.batch(8, [entry(0, XTAB)])]
    data = HEAD + b"".join(tiny) * (chunks // len(tiny)) + END + s.hvm_tail()
    begin = time.process_time()
    reader = Reader()
    reader.feed(data)
    reader.feed_eof()
    assert sum(1 for _ in s.events_of(reader)) == chunks + 4
    return time.process_time() - begin


def test_very_many_tiny_chunks_are_read_without_recursion_in_linear_time() -> None:
    """Real Xen's reader recurses for each: about 100,000 of them overflow its stack."""
    count = many(40_000, 200_000)
    assert seconds_for(count) < 12 * max(seconds_for(count // 4), 0.05)


def test_many_tiny_compressed_chunks() -> None:
    """A byte a chunk, each page split over as many chunks as it has bytes."""
    n = many(4_000, 20_000)
    data = rle_round(8, s.batch(8, [entry(0)] * 1000) * (n // 1000), s.compressed(8, b"\x00") * n)
    memories, error, restorer = restore(data)
    assert error is None and len(memories) == 2
    assert restorer.in_force is not None and restorer.in_force.compressed_chunks == n


@given(
    st.binary(max_size=300), st.sampled_from([None, HVM8, Dialect(word=4, guest="hvm"), Dialect(word=8, guest="pv")])
)
@settings(max_examples=many(60, 300))
def test_garbage_gives_an_error_of_ours_or_a_result(data: bytes, dialect: Dialect | None) -> None:
    for front in (b"", HEAD, HEAD + EC + END + s.hvm_tail()):
        found, error, _ = run(front + data, dialect=dialect, limits=Limits(memory_bytes=1 << 30))
        assert error is not None or isinstance(found[-1], events.EndOfStream)
