"""Checkpoints are staged, checked and put in force whole; whatever the bytes do, memory stays at the last of them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import streams as s
from streams import BROKEN, ENABLE_COMPRESSION, END, XALLOC, XTAB, entry, page, restore

from remus_ckpt.errors import Malformed, StreamError
from remus_ckpt.pages import PAGE_SIZE, Pages, batches
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.boundary import Boundary
from remus_ckpt.wire.xen.dialect import Dialect

both_words = pytest.mark.parametrize("word", [8, 4])
BEGIN = struct.pack("<hI", -100, 0)


def memory_of(*fills: int) -> bytes:
    return b"".join(page(fill) for fill in fills)


@both_words
def test_what_a_checkpoint_says_of_itself(word: Any) -> None:
    data = s.small_hvm(word)
    restorer = Restorer(strict=True)
    restorer.feed(data)
    restorer.feed_eof()
    first = restorer.next_checkpoint()
    assert first is not None and first.tail is not None
    assert (first.epoch, first.start, first.batches, first.entries, first.page_count) == (0, 0, 1, 4, 3)
    assert (first.compressed_chunks, first.compressed_bytes) == (0, 0)
    assert first.parameters == {"HVM_IDENT_PT": 0xFEFF}
    assert first.vcpus is not None and first.vcpus.ids() == [0]
    assert first.tsc is not None and (first.tsc.mode, first.tsc.nsec, first.tsc.khz, first.tsc.incarnation) == (
        1,
        2,
        3,
        4,
    )
    assert first.toolstack == b"tools"
    assert first.device_state == b"QEVMstate" and first.record is None
    assert first.pfns.tolist() == [0, 1, 3]
    assert restorer.in_force is None
    assert restorer.commit() is first and restorer.in_force is first
    assert first.pages.tobytes() == memory_of(1, 2, 3)
    assert restorer.memory.tobytes() == memory_of(1, 2, 0, 3)

    second = restorer.next_checkpoint()
    assert second is not None
    assert (second.epoch, second.start, second.batches, second.entries, second.page_count) == (1, first.end, 1, 2, 2)
    assert (second.compressed_chunks, second.compressed_bytes) == (1, 15)
    assert second.device_state == b"QEVM2" and second.parameters == {} and second.toolstack is None
    # Staged is not in force: memory is as it was.
    assert restorer.memory.tobytes() == memory_of(1, 2, 0, 3)
    restorer.commit()
    assert restorer.memory.tobytes() == page(1) + b"abcd" + page(2)[4:] + memory_of(0, 3)
    third = restorer.next_checkpoint()
    assert third is not None and third.pfns.tolist() == [3]
    restorer.commit()
    assert third.end == len(data)
    assert restorer.next_checkpoint() is None
    assert restorer.end is not None and restorer.end.complete


def test_a_staged_checkpoint_waits_to_be_put_in_force() -> None:
    restorer = Restorer()
    with pytest.raises(ValueError):
        restorer.commit()
    restorer.feed(s.small_hvm(8))
    staged = restorer.next_checkpoint()
    assert staged is not None and restorer.next_checkpoint() is staged
    with pytest.raises(ValueError):
        restorer.next_event()
    restorer.commit()
    with pytest.raises(ValueError):
        restorer.commit()


def head(word: int = 8) -> bytes:
    """A first checkpoint of four pages 1, 2, 3, 4."""
    first = s.hvm_header(word, 4) + s.batch(word, [entry(i) for i in range(4)], *(page(i + 1) for i in range(4)))
    return first + ENABLE_COMPRESSION + END + s.hvm_tail()


ONE_TO_FOUR = memory_of(1, 2, 3, 4)
FULL = struct.pack("<hI", -101, 0)
BAD_ROUNDS: list[tuple[str, bytes]] = [
    ("rle, the last page is bad", b"\x80" + page(9) + b"\x80" + page(8) + b"\x81\x80"),
    ("rle, one page is missing", b"\x80" + page(9) + b"\x80" + page(8)),
    ("rle, a byte is missing", b"\x80" + page(9) + b"\x80" + page(8) + b"\xff" * 8),
    ("delta, the last page is bad", FULL + page(9) + FULL + page(8) + BEGIN + struct.pack("<hI", 1, 1)),
    ("delta, one page is missing", FULL + page(9) + FULL + page(8)),
    ("delta, a byte is missing", FULL + page(9) + FULL + page(8) + BEGIN[:5]),
    ("nothing", b""),
]


@both_words
@pytest.mark.parametrize("payload", [row[1] for row in BAD_ROUNDS], ids=[row[0] for row in BAD_ROUNDS])
def test_a_round_that_does_not_decode_leaves_the_one_before(payload: bytes, word: Any) -> None:
    """Real Xen has overwritten half of memory by then, and destroys the guest."""
    unchanged = {b"": b"", b"\x80": b"\x00", FULL[:1]: BEGIN}[payload[:1]]
    good = s.batch(word, [entry(0)]) + s.compressed(word, unchanged) if unchanged else s.batch(word, [entry(0, XTAB)])
    good += END + s.hvm_tail()
    chunks = s.compressed(word, payload) if payload else b""
    bad = s.batch(word, [entry(0), entry(1), entry(2)]) + chunks + END + s.hvm_tail()
    for data, whole in ((head(word) + bad, 1), (head(word) + good + bad, 2), (head(word) + bad + good, 1)):
        memories, error, restorer = restore(data)
        assert type(error) is Malformed
        assert memories == [ONE_TO_FOUR] * whole
        assert restorer.memory.tobytes() == ONE_TO_FOUR
        assert restorer.in_force is not None and restorer.in_force.epoch == whole - 1
        assert restorer.staged is None


def test_pages_before_a_bad_chunk_are_not_applied() -> None:
    """Uncompressed rounds are staged too."""
    first = s.hvm_header(8, 4) + s.batch(8, [entry(0), entry(1)], page(1), page(2)) + END + s.hvm_tail()
    second = s.batch(8, [entry(0), entry(2)], page(8), page(9))
    third = s.batch(8, [entry(1)], page(7)) + END + s.hvm_tail()
    memories, error, restorer = restore(first + second + struct.pack("<i", -99))
    assert type(error) is Malformed and restorer.memory.tobytes() == memory_of(1, 2, 0, 0) == memories[-1]
    memories, error, restorer = restore(first + second + END + s.hvm_tail()[:-1])
    assert error is None and restorer.memory.tobytes() == memory_of(1, 2, 0, 0) and len(memories) == 1
    memories, error, restorer = restore(first + second + END + s.hvm_tail() + third)
    assert error is None
    assert memories == [memory_of(1, 2, 0, 0), memory_of(8, 2, 9, 0), memory_of(8, 7, 9, 0)]


@both_words
def test_a_page_that_comes_twice_is_applied_in_order(word: Any) -> None:
    raw = s.hvm_header(word, 4) + s.batch(word, [entry(1), entry(2), entry(1)], page(5), page(6), page(7))
    raw += s.batch(word, [entry(2)], page(8)) + END + s.hvm_tail()
    raw += (
        s.batch(word, [entry(3), entry(3)], page(1), page(2)) + s.batch(word, [entry(3)], page(3)) + END + s.hvm_tail()
    )
    assert restore(raw)[0] == [memory_of(0, 7, 8, 0), memory_of(0, 7, 8, 3)]
    record = [struct.pack("<hI", 4 * i, 0x01010101 * (i + 1)) for i in range(3)]
    data = head(word) + s.batch(word, [entry(1), entry(1)]) + s.batch(word, [entry(0), entry(1)])
    data += s.compressed(word, BEGIN + record[0] + BEGIN + record[0] + record[1] + BEGIN + BEGIN + record[2])
    memories, error, _ = restore(data + END + s.hvm_tail())
    assert error is None
    assert memories[1] == page(1) + b"\1\1\1\1\2\2\2\2\3\3\3\3" + page(2)[12:] + memory_of(3, 4)


@both_words
def test_chunk_borders_mean_nothing(word: Any) -> None:
    """Split anywhere, several in a row, before the batches they belong to, empty: the reader joins them."""
    payload = b"\x01abcd" + b"\xff" * 8 + b"\x87" + b"\x80" + page(9) + b"\x00"
    lists = s.batch(word, [entry(0), entry(1)]), s.batch(word, [entry(2)])
    expected = b"abcd" + page(1)[4:] + memory_of(9, 3, 4)
    for cut in (0, 1, 3, 14, 15, 700, len(payload) - 1, len(payload)):
        first, second = s.compressed(word, payload[:cut]), s.compressed(word, payload[cut:])
        for order in (
            (*lists, first, second),
            (first, *lists, second),
            (first, second, *lists),
            (lists[0], first, lists[1], second),
        ):
            memories, error, _ = restore(head(word) + b"".join(order) + END + s.hvm_tail())
            assert error is None
            assert memories == [ONE_TO_FOUR, expected]


def test_entries_without_data_touch_nothing() -> None:
    entries = [entry(0, XTAB), entry(1, XALLOC), entry(2, BROKEN), entry(0x0FFFFFFF, XTAB), entry(9, XALLOC)]
    data = (
        head() + s.batch(8, entries) + s.batch(8, [entry(3)]) + s.compressed(8, b"\x80" + page(9)) + END + s.hvm_tail()
    )
    memories, error, restorer = restore(data, strict=True)
    assert error is None and memories[1] == memory_of(1, 2, 3, 9)
    assert restorer.in_force is not None
    assert (restorer.in_force.entries, restorer.in_force.page_count) == (6, 1)


def test_a_round_without_pages_changes_nothing() -> None:
    for chunk in (b"", s.batch(8, [entry(0, XTAB)])):
        memories, error, restorer = restore(head() + (chunk + END + s.hvm_tail()) * 3, strict=True)
        assert error is None and memories == [ONE_TO_FOUR] * 4
        assert restorer.in_force is not None and restorer.in_force.epoch == 3


def test_from_verify_mode_on_memory_is_not_written() -> None:
    verify = struct.pack("<i", -1)
    first = (
        s.hvm_header(8, 4)
        + s.batch(8, [entry(0)], page(1))
        + verify
        + s.batch(8, [entry(0), entry(1)], page(2), page(3))
    )
    later = s.batch(8, [entry(2)]) + s.compressed(8, b"\x80" + page(7)) + END + s.hvm_tail()
    memories, error, _ = restore(first + ENABLE_COMPRESSION + END + s.hvm_tail() + later)
    assert error is None and memories == [memory_of(1, 0, 0, 0)] * 2
    # What is not written is checked all the same.
    later = s.batch(8, [entry(2)]) + s.compressed(8, b"\x81\x00") + END + s.hvm_tail()
    memories, error, _ = restore(first + ENABLE_COMPRESSION + END + s.hvm_tail() + later)
    assert type(error) is Malformed and len(memories) == 1


def test_nothing_is_in_force_before_the_first_is_whole() -> None:
    memories, error, restorer = restore(head()[:-1])
    assert memories == [] and error is None and restorer.in_force is None
    assert restorer.end == events.EndOfStream(complete=False, trailing_bytes=len(head()) - 1, offset=len(head()) - 1)
    memories, error, restorer = restore(b"")
    assert memories == [] and restorer.in_force is None and restorer.memory.shape == (0, PAGE_SIZE)
    assert restorer.end is not None and not restorer.end.complete


def test_bytes_may_come_as_they_like() -> None:
    data = s.small_hvm(8)
    expected = restore(data)[0]
    for step in (1, 13, 4096, 5000):
        restorer = Restorer()
        found = []
        for at in range(0, len(data), step):
            restorer.feed(bytearray(data[at : at + step]))
            found += [restorer.memory.tobytes() for _ in restorer.checkpoints()]
        assert found == expected
        assert restorer.end is None
        restorer.feed_eof()
        assert restorer.next_checkpoint() is None
        assert restorer.end is not None and restorer.end.complete


@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_a_given_codec_is_believed(codec: Any) -> None:
    """9C FF 00 00 00 00 opens a page of `delta`; as `rle` it is a skip of 28 words, one of 127, and a bad one."""
    data = head() + s.batch(8, [entry(0)]) + s.compressed(8, BEGIN) + END + s.hvm_tail()
    memories, error, _ = restore(data, dialect=Dialect(codec=codec))
    if codec == "delta":
        assert error is None and memories == [ONE_TO_FOUR] * 2
    else:
        assert type(error) is Malformed and error.section == "rle.md §2.2"
        assert error.offset == len(head()) + 12 + 12 + 2


def test_pages_of_a_checkpoint_are_copies() -> None:
    restorer = Restorer()
    restorer.feed(s.small_hvm(8))
    for checkpoint in restorer.checkpoints():
        pages = checkpoint.pages
        assert np.array_equal(pages, restorer.memory[checkpoint.pfns])
        assert not np.shares_memory(pages, restorer.memory)


def own_stream() -> tuple[bytes, list[bytes]]:
    """Three checkpoints of ours, and memory after each; a few thousand bytes, so that every cut can be tried."""
    sender, memory = Sender(4), np.zeros((4, PAGE_SIZE), dtype=np.uint8)
    data, memories = b"", []
    for epoch in range(3):
        memory[1, 16 * epoch : 16 * epoch + 9] = epoch + 1
        scan = batches(np.array([1]), memory[1:2].copy())
        data += b"".join(bytes(b) for g in sender.checkpoint(scan, device_state=b"%d" % epoch) for b in g)
        memories.append(memory.tobytes())
    return data, memories


def all_of(restorer: Restorer) -> list[tuple[int, int, int, bytes]]:
    """What comes from here to the end of what it was fed."""
    return [(c.epoch, c.start, c.end, c.memory.tobytes()) for c in restorer.checkpoints()]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_rewind_from_every_byte(in_place: bool) -> None:
    data, memories = own_stream()
    whole = Restorer()
    whole.feed(data)
    expected = all_of(whole)
    assert [row[3] for row in expected] == memories
    for cut in range(len(data) + 1):
        restorer = Restorer()
        before = []
        if in_place:
            at = 0
            while at < cut:
                room = restorer.get_buffer()
                size = min(len(room), cut - at)
                room[:size] = data[at : at + size]
                restorer.buffer_updated(size)
                at += size
                before += all_of(restorer)
        else:
            restorer.feed(data[:cut])
            before = all_of(restorer)
        restorer.rewind()
        at = restorer.boundary.offset
        assert at == (before[-1][2] if before else 0)
        if before:
            assert restorer.memory.tobytes() == before[-1][3]
        restorer.feed(data[at:])
        restorer.feed_eof()
        assert before + all_of(restorer) == expected
        assert restorer.end is not None and restorer.end.complete


def test_rewind_forgets_a_fault_and_a_staged_checkpoint() -> None:
    data, memories = own_stream()
    restorer = Restorer()
    ends = [row[2] for row in all_of(_fed(data))]
    restorer.feed(data[: ends[0]])
    assert restorer.next_checkpoint() is not None
    restorer.rewind()  # staged: it is not in force, so it goes
    assert restorer.staged is None and restorer.memory.shape == (0, PAGE_SIZE)
    restorer.feed(data[: ends[0]])
    assert len(all_of(restorer)) == 1
    for at in range(ends[0], ends[1], 7):
        bad = bytearray(data[ends[0] : ends[1]])
        bad[at - ends[0]] ^= 0x40
        restorer.feed(bytes(bad))
        restorer.feed_eof()
        try:
            assert restorer.next_checkpoint() is None
        except StreamError:
            with pytest.raises(StreamError):
                restorer.next_event()
        restorer.rewind()
        assert restorer.memory.tobytes() == memories[0]
    restorer.feed(data[ends[0] :])
    assert [row[3] for row in all_of(restorer)] == memories[1:]


def two_vcpus(word: int) -> bytes:
    """Two checkpoints of a PV guest: the first says how long the tail of both is."""
    blocks = s.block(b"vcpu", bytes(5168)), s.block(b"extv", b""), s.block(b"xcnt", struct.pack("<I", 16 + 8))
    vcpu = bytes(5168) + bytes(128) + struct.pack("<2Q", 1, 8) + bytes(8)
    first = s.pv_header(word, 4, [1], *blocks) + s.vcpu_info(1, 3) + s.batch(word, [entry(0)], page(1)) + END
    second = s.batch(word, [entry(1)], page(2)) + END
    return first + s.pv_tail(word, [2], vcpu, vcpu) + second + s.pv_tail(word, [], vcpu, vcpu)


@pytest.mark.parametrize("build", [s.small_hvm, two_vcpus], ids=["hvm", "pv"])
def test_rewind_keeps_what_the_checkpoints_before_have_said(build: Any) -> None:
    """State that a tail's layout hangs on, and deviations: a foreign stream, cut at many places."""
    data = build(8)
    whole = Restorer()
    whole.feed(data)
    expected = all_of(whole)
    assert len(expected) > 1
    for cut in range(0, len(data), 61):
        restorer = Restorer()
        restorer.feed(data[:cut])
        before = all_of(restorer)
        restorer.rewind()
        restorer.feed(data[restorer.boundary.offset :])
        assert before + all_of(restorer) == expected
        assert restorer.reader.deviations == whole.reader.deviations
        assert restorer.dialect == whole.dialect


def test_a_deviation_of_what_is_dropped_is_not_counted() -> None:
    later = struct.pack("<iIQ", -3, 5, 6)  # its padding is not zero
    data = head() + later + s.batch(8, [entry(0)]) + s.compressed(8, b"\x80" + page(7)) + END + s.hvm_tail()
    restorer = Restorer()
    restorer.feed(head())
    all_of(restorer)
    for _ in range(3):
        restorer.feed(later)
        assert restorer.next_checkpoint() is None and list(restorer.reader.deviations) == ["nonzero-pad"]
        restorer.rewind()
        assert restorer.reader.deviations == {}
    restorer.feed(data[len(head()) :])
    assert len(all_of(restorer)) == 1
    assert restorer.reader.deviations["nonzero-pad"].count == 1


def test_what_waits_behind_a_staged_checkpoint_is_dropped_too() -> None:
    data, memories = own_stream()
    end = all_of(_fed(data))[0][2]
    restorer = _fed(data[:end])
    restorer.feed(b"\xff" * 100)
    assert restorer.next_checkpoint() is not None
    restorer.rewind()
    restorer.feed(data)
    assert [row[3] for row in all_of(restorer)] == memories


def test_the_codec_is_not_detected_from_what_is_dropped() -> None:
    restorer = Restorer()
    restorer.feed(head())
    all_of(restorer)
    restorer.feed(s.batch(8, [entry(0)]) + s.compressed(8, BEGIN))
    assert restorer.next_checkpoint() is None
    restorer.rewind()
    restorer.feed(s.batch(8, [entry(0)]) + s.compressed(8, b"\x80" + page(7)) + END + s.hvm_tail())
    assert [row[3] for row in all_of(restorer)] == [memory_of(7, 2, 3, 4)]
    assert restorer.dialect.codec == "rle"


def test_verify_mode_in_what_is_dropped_is_off_again() -> None:
    restorer = Restorer()
    restorer.feed(head())
    all_of(restorer)
    restorer.feed(struct.pack("<i", -1) + s.batch(8, [entry(0)]))
    assert restorer.next_checkpoint() is None
    restorer.rewind()
    restorer.feed(s.batch(8, [entry(0)]) + s.compressed(8, b"\x80" + page(7)) + END + s.hvm_tail())
    assert [row[3] for row in all_of(restorer)] == [memory_of(7, 2, 3, 4)]


def test_skipping_reads_and_checks_but_keeps_no_memory() -> None:
    data, _ = own_stream()
    restorer = _fed(data)
    first = restorer.next_checkpoint()
    assert first is not None
    restorer.commit()
    held = restorer.memory.tobytes()
    epochs = []
    while restorer.next_checkpoint() is not None:
        epochs.append(restorer.skip().epoch)
    assert epochs == [1, 2] and restorer.memory.tobytes() == held
    with pytest.raises(ValueError):
        restorer.skip()


def test_begin_in_the_middle_of_a_stream_of_ours() -> None:
    data, _ = own_stream()
    rows = all_of(_fed(data))
    records = [c.record for c in _fed(data).checkpoints()]
    for number in (1, 2):
        record = records[number - 1]
        assert record is not None
        start = Boundary.of_ours(
            offset=rows[number][1], epoch=number, word=8, codec="delta", p2m_size=4, position=record.after
        )
        restorer = Restorer(start=start)
        restorer.feed(data[start.offset :])
        found = []
        while restorer.next_checkpoint() is not None:
            one = restorer.skip()
            found.append((one.epoch, one.start, one.end))
        assert found == [row[:3] for row in rows[number:]]
        # The chain of positions is held to.
        wrong = Boundary.of_ours(
            offset=start.offset,
            epoch=number,
            word=8,
            codec="delta",
            p2m_size=4,
            position=Position(record.epoch, bytes(32)),
        )
        restorer = Restorer(start=wrong)
        restorer.feed(data[start.offset :])
        with pytest.raises(Malformed) as caught:
            restorer.next_checkpoint()
        assert caught.value.section == "stream.md §9.3"


def _fed(data: bytes) -> Restorer:
    restorer = Restorer()
    restorer.feed(data)
    return restorer


class Full(Exception):
    """No room."""


class SmallHome:
    """A home that has room for some pages, and says so before they are written."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.has: set[int] = set()
        self.memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)

    def open(self, pages: int) -> Pages:
        self.memory = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
        return self.memory

    def write(self, memory: Pages, pfns: Any, data: Pages) -> None:
        self.reserve(pfns)
        memory[pfns] = data

    def reserve(self, pfns: Any) -> None:
        wanted = self.has | set(pfns.tolist())
        if len(wanted) > self.room:
            raise Full
        self.has = wanted


@pytest.mark.parametrize("is_raw", [False, True])
def test_a_home_that_is_full_stops_a_checkpoint_before_it_is_staged(is_raw: bool) -> None:
    entries, pages = [entry(0), entry(2)], [page(7), page(8)]
    if is_raw:
        more = s.batch(8, entries, *pages) + END
    else:
        more = s.batch(8, entries) + s.compressed(8, b"".join(b"\x80" + data for data in pages)) + END
    switch = b"" if is_raw else ENABLE_COMPRESSION
    first = s.hvm_header(8, 4) + s.batch(8, [entry(0)], page(1)) + switch + END + s.hvm_tail()
    home = SmallHome(1)
    restorer = Restorer(home=home)
    restorer.feed(first)
    assert len(all_of(restorer)) == 1
    restorer.feed(more + s.hvm_tail())
    with pytest.raises(Full):
        restorer.next_checkpoint()
    assert restorer.staged is None and restorer.memory.tobytes() == memory_of(1, 0, 0, 0)
    home.room = 2
    restorer.rewind()
    restorer.feed(more + s.hvm_tail())
    assert [row[3] for row in all_of(restorer)] == [memory_of(7, 0, 8, 0)]
    assert home.has == {0, 2}
