"""The layout of every chunk, of PV streams, and of what stands in front of a stream."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
import streams as s
from reading import (
    BEGIN,
    EC,
    EXTV,
    FULL,
    HVM8,
    NO_MORE,
    VCPU32,
    VCPU64,
    XCNT,
    both_words,
    context,
    kinds_of,
    rewritten,
    tmem,
    tmem_page,
    tmem_pool,
)
from streams import END, XTAB, entry, page, plain, restore, run

from remus_ckpt.errors import Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import CHUNKS, ChunkId
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import NEED_DATA, Reader
from remus_ckpt.wire.xen.writer import EventWriter

# Every layout


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
