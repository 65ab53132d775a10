"""What is refused or tolerated in a stream, where the fault is said to be, and which limits hold."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest
import streams as s
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import BEGIN, EC, EXTV, HVM8, VCPU64, WHOLE, XCNT, context, tmem, tmem_page, tmem_pool
from streams import END, XTAB, entry, page, restore, run

from remus_ckpt.errors import LimitExceeded, Malformed
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import Reader

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


QEMU_LIMITS = {
    "ram_blocks",
    "machine_name_bytes",
    "description_bytes",
    "multifd_packet_bytes",
    "snapshots",
    "snapshot_table_bytes",
    "elf_table_bytes",
}
"""tests/wire/test_qemu_refusals.py and tests/session/test_qcow2.py try them."""
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
    # manifest_bytes bounds what stands within the device state; tests/source/test_own_memory.py tries it. Only a v2
    # stream has records; tests/wire/test_v2.py tries theirs.
    elsewhere = {"manifest_bytes", "record_bytes", "vcpu_record_bytes"}
    assert {row[0] for row in LIMITED} == {*Limits.__slots__} - elsewhere - QEMU_LIMITS


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
