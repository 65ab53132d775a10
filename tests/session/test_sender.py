"""Batches to a stream: where chunks end, what goes full, and that memory comes back."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import noise
from streams import run

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.reference import Lru, Shadow
from remus_ckpt.pages import HAS_DATA, IS_PAGE_TABLE, PAGE_SIZE, PageBatch, Pages, PageType, batches
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen import events

both_codecs = pytest.mark.parametrize("codec", ["delta", "rle"])
BEGIN, FULL = struct.pack("<hI", -100, 0), struct.pack("<hI", -101, 0)


def taken(buffers: Any) -> bytes:
    """A checkpoint taken to its end."""
    return b"".join(bytes(buffer) for group in buffers for buffer in group)


def typed(pfns: list[int], types: list[int], data: Pages) -> PageBatch:
    return PageBatch(np.array(pfns, dtype=np.uint64), np.array(types, dtype=np.uint8), data)


def chunks_of(data: bytes) -> list[list[tuple[str, int]]]:
    """Per checkpoint: ("batch", entries) and ("compressed", bytes), as they stand."""
    found, error, _ = run(data, strict=True)
    assert error is None and found[-1].complete
    checkpoints: list[list[tuple[str, int]]] = [[]]
    for event in found:
        if isinstance(event, events.Batch):
            checkpoints[-1].append(("batch", len(event.pfns)))
        elif isinstance(event, events.CompressedData):
            checkpoints[-1].append(("compressed", len(event.data)))
        elif isinstance(event, events.Tail):
            checkpoints.append([])
    assert not checkpoints.pop()
    return checkpoints


def payloads_of(data: bytes) -> list[list[bytes]]:
    """Per checkpoint, the payloads of its COMPRESSED_DATA."""
    found, _, _ = run(data)
    checkpoints: list[list[bytes]] = [[]]
    for event in found:
        if isinstance(event, events.CompressedData):
            checkpoints[-1].append(event.data.tobytes())
        elif isinstance(event, events.Tail):
            checkpoints.append([])
    return checkpoints[:-1]


# Where chunks end


def test_9000_dirty_pages_as_the_thread_has_them() -> None:
    memory = np.zeros((9000, PAGE_SIZE), dtype=np.uint8)
    sender = Sender(9000, codec="delta")
    data = taken(sender.checkpoint([]))
    memory[:, 8] = 1
    data += taken(sender.checkpoint(batches(np.arange(9000), memory)))
    first, second = chunks_of(data)
    assert first == []
    # One word a page: BEGIN_PAGE and one record, 12 bytes.
    assert second == [
        *[("batch", 1024)] * 8,
        ("batch", 4),
        ("compressed", 8196 * 12),
        ("batch", 804),
        ("compressed", 804 * 12),
    ]
    sent = sender.sent
    assert sent is not None
    assert sent == Sent(1, 10, 9000, 9000, 2, 9000 * 12, sent.stream_bytes, sent.before, sent.position)


def test_9000_dirty_pages_with_the_page_buffer_of_xen() -> None:
    memory = np.zeros((9000, PAGE_SIZE), dtype=np.uint8)
    sender = Sender(9000, codec="rle")
    data = taken(sender.checkpoint([])) + taken(sender.checkpoint(batches(np.arange(9000), memory)))
    # The eighth batch fills the buffer exactly, so none is cut. Nothing changed: a byte a page.
    expected = [*[("batch", 1024)] * 8, ("compressed", 8192), ("batch", 808), ("compressed", 808)]
    assert chunks_of(data) == [[], expected]


@pytest.mark.parametrize(
    ("buffer_pages", "sizes", "expected"),
    [
        (4, [4], [4, "c4"]),
        (4, [5], [4, "c4", 1, "c1"]),
        (4, [3, 3], [3, 1, "c4", 2, "c2"]),
        (4, [3, 1, 4], [3, 1, "c4", 4, "c4"]),
        (4, [9], [4, "c4", 4, "c4", 1, "c1"]),
        (1, [3], [1, "c1", 1, "c1", 1, "c1"]),
        (100, [3, 3], [3, 3, "c6"]),
        (6, [3, 3], [3, 3, "c6"]),
        (6, [3, 0, 3], [3, 3, "c6"]),
    ],
)
def test_a_batch_that_would_overfill_the_buffer_is_cut(buffer_pages: int, sizes: list[int], expected: Any) -> None:
    sender = Sender(16, codec="rle", buffer_pages=buffer_pages)
    data = taken(sender.checkpoint([]))
    blank = np.zeros((16, PAGE_SIZE), dtype=np.uint8)
    data += taken(sender.checkpoint([typed([*range(n)], [0] * n, blank[:n]) for n in sizes if n]))
    written = [size if kind == "batch" else f"c{size}" for kind, size in chunks_of(data)[1]]
    assert written == expected


def test_entries_without_data_need_no_room() -> None:
    """A batch is cut before the first page without room, so what stands between goes with those before."""
    sender = Sender(16, codec="rle", buffer_pages=2)
    data = taken(sender.checkpoint([]))
    types = [PageType.XTAB, 0, PageType.XALLOC, 0, PageType.XTAB, PageType.BROKEN, 0, PageType.XTAB]
    data += taken(sender.checkpoint([typed([*range(8)], [*map(int, types)], np.zeros((3, PAGE_SIZE), np.uint8))]))
    assert chunks_of(data)[1] == [("batch", 6), ("compressed", 2), ("batch", 2), ("compressed", 1)]


@both_codecs
def test_checkpoints_of_nothing(codec: Any) -> None:
    sender = Sender(4, codec=codec)
    data = b"".join(taken(sender.checkpoint([])) for _ in range(4))
    only_entries = typed([0, 0], [15, 15], np.empty((0, PAGE_SIZE), np.uint8))
    data += taken(sender.checkpoint([only_entries]))
    assert chunks_of(data) == [[], [], [], [], [("batch", 2)]]
    restorer = Restorer(strict=True)
    restorer.feed(data)
    restorer.feed_eof()
    assert [checkpoint.epoch for checkpoint in restorer.checkpoints()] == [0, 1, 2, 3, 4]
    assert not restorer.memory.any()


def test_zero_pages_are_left_out_of_the_first_checkpoint() -> None:
    """Memory starts as zeros; but a page that has been sent is sent again to become zeros."""
    full, blank = noise(1, 1), np.zeros((1, PAGE_SIZE), dtype=np.uint8)

    def entries(scan: list[PageBatch]) -> tuple[list[list[int]], bytes]:
        data = taken(Sender(4).checkpoint(scan))
        found = [event.pfns.tolist() for event in run(data)[0] if isinstance(event, events.Batch)]
        return found, memories(data)[0][1]

    none, one = bytes(4 * PAGE_SIZE), bytes(PAGE_SIZE) + full.tobytes() + bytes(2 * PAGE_SIZE)
    assert entries([typed([1], [0], blank)]) == ([], none)
    assert entries([typed([0, 1, 2], [0, 0, 0], np.concatenate([blank, full, blank]))]) == ([[1]], one)
    assert entries([typed([1], [0], full), typed([1, 2], [0, 0], np.concatenate([blank, blank]))]) == ([[1], [1]], none)
    assert entries([typed([1, 1], [0, 0], np.concatenate([full, blank]))])[1] == none
    assert entries([typed([1, 1], [0, 0], np.concatenate([blank, full]))])[1] == one
    assert entries([typed([1, 2, 3], [0, 15, 14], blank)])[1] == none


def test_a_scan_is_drawn_as_it_is_sent() -> None:
    """A scan that captures as it goes has never more than a page buffer and the batch in hand outstanding."""
    drawn = 0

    def scan() -> Iterator[PageBatch]:
        nonlocal drawn
        for start in range(0, 600, 20):
            drawn += 20
            yield typed([*range(start, start + 20)], [0] * 20, np.full((20, PAGE_SIZE), start % 251, np.uint8))

    sender = Sender(600, codec="rle", buffer_pages=64)
    data = taken(sender.checkpoint([]))
    written = 0
    groups = sender.checkpoint(scan())
    assert drawn == 0
    for group in groups:
        piece = b"".join(bytes(buffer) for buffer in group)
        data += piece
        if piece.startswith(struct.pack("<i", -12)):
            written += get_codec("rle").check(piece[12:], 0) or min(64, 600 - written)
        assert drawn - written <= 64 + 20
    assert drawn == written == 600
    assert sum(size for kind, size in chunks_of(data)[1] if kind == "batch") == 600


# What goes full


def kinds(payload: bytes, n: int) -> str:
    """F for a full page of `rle`, d for any other, page by page."""
    found, at = "", 0
    codec = get_codec("rle")
    for _ in range(n):
        found += "F" if payload[at] == 0x80 else "d"
        at += codec.check(payload[at:], 1)
    return found


def sent_kinds(reference: Any, rounds: list[list[tuple[int, int]]], buffer_pages: int = 100) -> list[str]:
    """For rounds of (PFN, type), which pages go full; each time a page comes, one word of it has changed."""
    sender = Sender(16, codec="rle", reference=reference, buffer_pages=buffer_pages)
    data = taken(sender.checkpoint([]))
    memory = noise(1, 16)
    memory[:] = 0
    found = []
    for number, entries in enumerate(rounds):
        pages = []
        for i, (pfn, _) in enumerate(entries):
            memory[pfn, 4 * number] += i + 1
            pages.append(memory[pfn].copy())
        data += taken(sender.checkpoint([typed([p for p, _ in entries], [t for _, t in entries], np.stack(pages))]))
        found.append("".join(kinds(payload, len(entries)) for payload in [b"".join(payloads_of(data)[-1])]))
    restorer = Restorer(strict=True)
    restorer.feed(data)
    restorer.feed_eof()
    for _ in restorer.checkpoints():
        pass
    assert np.array_equal(restorer.memory, memory)
    return found


N, T, P = 0, int(PageType.L1TAB), int(PageType.L2TAB_PINNED)


def test_a_shadow_holds_every_page_from_the_start() -> None:
    assert sent_kinds(None, [[(1, N), (2, N)], [(2, N), (3, N)]]) == ["dd", "dd"]


def test_a_cache_holds_what_was_sent_since_compression_began() -> None:
    assert sent_kinds(Lru(4), [[(1, N), (2, N)], [(2, N), (3, N)], [(1, N)]]) == ["FF", "dF", "d"]


def test_a_cache_evicts_what_was_used_longest_ago() -> None:
    rounds = [[(1, N), (2, N)], [(1, N)], [(3, N)], [(1, N), (2, N)], [(3, N)]]
    # 3 takes the place of 2, then 2 that of 3.
    assert sent_kinds(Lru(2), rounds) == ["FF", "d", "F", "dF", "F"]


def test_more_pages_than_the_cache_in_ascending_order_never_hit() -> None:
    pages = [(pfn, N) for pfn in range(5)]
    assert sent_kinds(Lru(4), [pages] * 3) == ["FFFFF"] * 3


@pytest.mark.parametrize("table", [T, P])
@pytest.mark.parametrize("reference", [lambda: None, lambda: Lru(8)], ids=["shadow", "cache"])
def test_page_tables_go_full_and_leave_the_reference(reference: Any, table: int) -> None:
    rounds = [[(1, N)], [(1, table)], [(1, table)], [(1, N)], [(1, N)]]
    first = "d" if reference() is None else "F"
    assert sent_kinds(reference(), rounds) == [first, "F", "F", "F", "d"]


@pytest.mark.parametrize("reference", [lambda: None, lambda: Lru(8)], ids=["shadow", "cache"])
def test_page_tables_leave_before_the_buffer_is_encoded(reference: Any) -> None:
    """Of a page that comes as a normal one and as a table in one buffer, both go full: the table left when it was
    added. In a buffer of its own, the normal one may still be a delta."""
    assert sent_kinds(reference(), [[(1, N)], [(1, N), (1, T)], [(1, N)]])[1:] == ["FF", "F"]
    assert sent_kinds(reference(), [[(1, N)], [(1, N), (1, T)], [(1, N)]], buffer_pages=1)[1:] == ["dF", "F"]
    assert sent_kinds(reference(), [[(1, N)], [(1, T), (1, N)], [(1, N)]])[1] == "FF"


@both_codecs
@pytest.mark.parametrize("reference", [lambda: None, lambda: Lru(8)], ids=["shadow", "cache"])
def test_a_page_that_becomes_a_table_within_a_buffer_and_then_what_it_was(reference: Any, codec: Any) -> None:
    """Were the first of them left in the reference, the last would look unchanged."""
    sender = Sender(4, codec=codec, reference=reference())
    one, two = np.full((1, PAGE_SIZE), 1, np.uint8), np.full((1, PAGE_SIZE), 2, np.uint8)
    data = taken(sender.checkpoint([]))
    data += taken(sender.checkpoint([typed([1], [N], one), typed([1], [T], two)]))
    data += taken(sender.checkpoint([typed([1], [N], one)]))
    assert memories(data)[-1][1] == bytes(PAGE_SIZE) + one.tobytes() + bytes(2 * PAGE_SIZE)


class XenCache:
    """The cache as the description of Xen's has it: a list of slots, the head first; the tail is taken next."""

    def __init__(self, capacity: int) -> None:
        self.slots: OrderedDict[int, int | None] = OrderedDict((slot, None) for slot in range(capacity))

    def find(self, pfn: int) -> int | None:
        return next((slot for slot, held in self.slots.items() if held == pfn), None)

    def invalidate(self, pfn: int) -> None:
        if (slot := self.find(pfn)) is not None:
            self.slots[slot] = None
            self.slots.move_to_end(slot)

    def hit(self, pfn: int) -> bool:
        slot = self.find(pfn)
        if found := slot is not None:
            self.slots.move_to_end(slot, last=False)
            return found
        slot = next(reversed(self.slots))
        self.slots[slot] = pfn
        self.slots.move_to_end(slot, last=False)
        return False


@given(
    st.integers(1, 5),
    st.lists(
        st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=8, unique_by=lambda row: row[0]),
        max_size=12,
    ),
)
@settings(max_examples=many(20, 100))
def test_hits_and_misses_are_those_of_xens_cache(capacity: int, rounds: list[list[tuple[int, bool]]]) -> None:
    ours, xens = Lru(capacity), XenCache(capacity)
    for entries in rounds:
        pfns = np.array([pfn for pfn, _ in entries], dtype=np.int64)
        tables = np.array([table for _, table in entries])
        ours.invalidate(pfns[tables])
        slots, full = ours.choose(pfns, tables)
        for pfn, table in entries:
            if table:
                xens.invalidate(pfn)
        for i, (pfn, table) in enumerate(entries):
            assert bool(full[i]) == (table or not xens.hit(pfn))
            assert (slots[i] == -1) == table


def test_a_reference_of_nothing() -> None:
    with pytest.raises(ValueError):
        Lru(0)


# Memory comes back

TYPES_WITH_DATA = [0, 0, 0, 0, 1, 2, 3, 4, 8, 9, 10, 11, 12]


@st.composite
def captures(draw: st.DrawFn) -> list[list[tuple[int, int, int, int]]]:
    """Rounds of (PFN, type, where it changes, to what); a page may come twice."""
    entry = st.tuples(
        st.integers(0, 9),
        st.sampled_from(TYPES_WITH_DATA) | st.sampled_from([13, 14, 15]),
        st.integers(0, 4095),
        st.integers(0, 255),
    )
    return draw(st.lists(st.lists(entry, max_size=14), min_size=1, max_size=5))


REFERENCES = {
    "default": lambda: None,
    "shadow": lambda: Shadow(np.zeros((10, PAGE_SIZE), dtype=np.uint8)),
    **{f"cache of {n}": (lambda n=n: Lru(n)) for n in (1, 2, 3, 5, 10)},
}


@given(
    rounds=captures(),
    codec=st.sampled_from(["delta", "rle"]),
    word=st.sampled_from([8, 4]),
    buffer_pages=st.none() | st.integers(1, 9),
    reference=st.sampled_from(sorted(REFERENCES)),
    batch_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
@settings(max_examples=many(24, 120))
def test_what_is_sent_is_what_is_restored(
    rounds: list[list[tuple[int, int, int, int]]],
    codec: Any,
    word: Any,
    buffer_pages: int | None,
    reference: str,
    batch_sizes: list[int],
) -> None:
    sender = Sender(10, codec=codec, word=word, buffer_pages=buffer_pages, reference=REFERENCES[reference]())
    memory = np.zeros((10, PAGE_SIZE), dtype=np.uint8)
    restorer = Restorer(strict=True)
    data = b""
    for epoch, entries in enumerate(rounds):
        scan = []
        left = list(entries)
        for size in batch_sizes * 14:
            part, left = left[:size], left[size:]
            pages = []
            for pfn, kind, where, value in part:
                if HAS_DATA[kind]:
                    memory[pfn, where:] = value
                    pages.append(memory[pfn].copy())
            stacked = np.stack(pages) if pages else np.empty((0, PAGE_SIZE), dtype=np.uint8)
            if part:
                scan.append(typed([row[0] for row in part], [row[1] for row in part], stacked))
        piece = taken(sender.checkpoint(scan))
        data += piece
        restorer.feed(piece)
        checkpoint = restorer.next_checkpoint()
        assert checkpoint is not None
        restorer.commit()
        assert np.array_equal(restorer.memory, memory)
        with_data = sum(bool(HAS_DATA[row[1]]) for row in entries)
        if epoch:
            assert (checkpoint.epoch, checkpoint.entries, checkpoint.page_count) == (epoch, len(entries), with_data)
        assert checkpoint.record is not None
        assert sender.sent == Sent(
            epoch,
            checkpoint.batches,
            checkpoint.entries,
            checkpoint.page_count,
            checkpoint.compressed_chunks,
            checkpoint.compressed_bytes,
            len(piece),
            checkpoint.record.before,
            checkpoint.record.after,
        )
    assert not restorer.reader.deviations
    check_order(data, codec, buffer_pages or 8192, rounds)


def check_order(data: bytes, codec: str, buffer_pages: int, rounds: list[list[tuple[int, int, int, int]]]) -> None:
    """Entries come as they were scanned, a chunk as soon as the buffer is full, with whole pages, all announced."""
    for epoch, (chunks, payloads) in enumerate(zip(chunks_of(data), payloads_of(data), strict=True)):
        if not epoch:
            assert not payloads
            continue
        types = [row[1] for row in rounds[epoch]]
        announced = entries = pages = used = 0
        for kind, size in chunks:
            if kind == "batch":
                announced += int(np.count_nonzero(HAS_DATA[types[entries : entries + size]]))
                entries += size
                assert announced - pages <= buffer_pages
                continue
            count = min(buffer_pages, announced - pages)
            assert get_codec(codec).check(payloads[used], count) == size
            used += 1
            pages += count
            assert entries >= announced >= pages
            assert count == buffer_pages or entries == len(types)
        assert pages == announced


# What a sender refuses, and what it goes on with


@pytest.mark.parametrize(
    ("p2m_size", "arguments"),
    [
        (0, {}),
        (-1, {}),
        (1 << 28, {}),
        (4, {"codec": "xbzrle"}),
        (4, {"codec": "zip"}),
        (4, {"buffer_pages": 0}),
        (4, {"buffer_pages": -5}),
        (4, {"buffer_pages": 1 << 20}),
    ],
)
def test_a_sender_that_cannot_be(p2m_size: int, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Sender(p2m_size, **arguments)


ONE = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
BAD_SCANS = {
    "type 5": lambda: [typed([0], [5], ONE[:0])],
    "type 16": lambda: [typed([0], [16], ONE)],
    "PFN beyond": lambda: [typed([1, 4], [0, 0], np.concatenate([ONE, ONE]))],
    "a scan that fails": lambda: (1 // 0 for _ in range(1)),
}


@pytest.mark.parametrize("compressing", [False, True])
@pytest.mark.parametrize("what", BAD_SCANS)
def test_after_a_scan_that_fails_nothing_more_is_sent(what: str, compressing: bool) -> None:
    sender = Sender(4)
    if compressing:
        taken(sender.checkpoint([]))
    with pytest.raises((ValueError, ZeroDivisionError)):
        taken(sender.checkpoint(BAD_SCANS[what]()))
    with pytest.raises(ValueError):
        taken(sender.checkpoint([]))


def test_a_checkpoint_not_taken_to_its_end_is_the_last() -> None:
    sender = Sender(4)
    data = taken(sender.checkpoint([]))
    groups = sender.checkpoint(batches(np.arange(4), noise(1, 4)))
    data += b"".join(bytes(buffer) for buffer in next(groups))
    del groups
    with pytest.raises(ValueError):
        taken(sender.checkpoint([]))
    restorer = Restorer()
    restorer.feed(data)
    restorer.feed_eof()
    assert len(list(restorer.checkpoints())) == 1
    assert not restorer.memory.any()
    assert restorer.end is not None and not restorer.end.complete


@pytest.mark.parametrize(
    ("pfns", "types", "pages"),
    [([0, 1], [0], 1), ([0], [0], 2), ([0], [15], 1), ([0, 1], [0, 15], 2), ([*range(1025)], [15] * 1025, 0)],
)
def test_a_batch_that_cannot_be(pfns: list[int], types: list[int], pages: int) -> None:
    with pytest.raises(ValueError):
        typed(pfns, types, np.zeros((pages, PAGE_SIZE), dtype=np.uint8))


def test_batches_are_cut_at_1024_and_are_views() -> None:
    data = noise(1, 2100)
    pieces = list(batches(np.arange(2100), data))
    assert [len(piece.pfns) for piece in pieces] == [1024, 1024, 52]
    assert all(np.shares_memory(piece.data, data) for piece in pieces)
    assert np.concatenate([piece.pfns for piece in pieces]).tolist() == [*range(2100)]
    with pytest.raises(ValueError):
        next(batches(np.arange(3), data))
    assert list(batches(np.arange(0), data[:0])) == []


def memories(data: bytes) -> list[tuple[Position, bytes, bytes]]:
    restorer = Restorer(strict=True)
    restorer.feed(data)
    restorer.feed_eof()
    found = []
    for checkpoint in restorer.checkpoints():
        assert checkpoint.record is not None
        found.append((checkpoint.record.after, restorer.memory.tobytes(), checkpoint.device_state))
    assert restorer.end is not None and restorer.end.complete
    return found


def original() -> bytes:
    sender = Sender(8)
    data = b""
    for epoch in range(4):
        pages = noise(epoch, 8)
        state = f"state {epoch}".encode()
        data += taken(sender.checkpoint(batches(np.arange(8), pages), device_state=state, time_ns=epoch))
    return data


def test_a_position_survives_encoding_anew() -> None:
    data = original()
    again = Sender(8, codec="rle", word=4, buffer_pages=3, reference=Lru(2))
    restorer = Restorer()
    restorer.feed(data)
    other = b""
    for checkpoint in restorer.checkpoints():
        assert checkpoint.record is not None
        other += taken(
            again.checkpoint(
                batches(checkpoint.pfns, checkpoint.pages),
                device_state=checkpoint.device_state,
                position=checkpoint.record.after,
            )
        )
    assert other != data
    assert memories(other) == memories(data)


def test_a_stream_may_begin_at_a_later_checkpoint() -> None:
    """Compaction: the second checkpoint of another stream is the first of this one."""
    restorer = Restorer()
    restorer.feed(original())
    sender = None
    data = b""
    for checkpoint in restorer.checkpoints():
        assert checkpoint.record is not None
        if checkpoint.epoch < 1:
            continue
        sender = sender or Sender(8, position=checkpoint.record.before)
        pfns = np.arange(8) if checkpoint.epoch == 1 else checkpoint.pfns
        data += taken(
            sender.checkpoint(
                batches(pfns, restorer.memory[pfns]),
                device_state=checkpoint.device_state,
                position=checkpoint.record.after,
            )
        )
    assert memories(data) == memories(original())[1:]
    restorer = Restorer()
    restorer.feed(data)
    assert [checkpoint.epoch for checkpoint in restorer.checkpoints()] == [1, 2, 3]


def test_a_new_sender_goes_on_behind_a_position() -> None:
    first = Sender(4)
    taken(first.checkpoint([]))
    taken(first.checkpoint([]))
    assert first.position is not None and first.position.epoch == 1
    second = Sender(4, position=first.position)
    found = memories(taken(second.checkpoint(batches(np.arange(4), noise(1, 4)))))
    assert found[0][0].epoch == 2 and found[0][0] == second.position
    assert found[0][1] == noise(1, 4).tobytes()


def test_a_position_that_does_not_follow_is_refused() -> None:
    sender = Sender(4)
    taken(sender.checkpoint([]))
    for epoch in (0, 2):
        again = Sender(4, position=sender.position)
        with pytest.raises(ValueError):
            taken(again.checkpoint([], position=Position(epoch, bytes(32))))
    taken(Sender(4, position=sender.position).checkpoint([], position=Position(1, bytes(32))))


def test_the_shadow_may_be_shared_with_who_compares() -> None:
    """One copy of memory: what the source compares with is what the sender has brought up to date."""
    memory = noise(5, 6)
    shadow = np.zeros((6, PAGE_SIZE), dtype=np.uint8)
    sender = Sender(6, reference=Shadow(shadow))
    taken(sender.checkpoint(batches(np.arange(6), memory)))
    assert np.array_equal(shadow, memory)
    memory[3, 7] ^= 1
    memory[5, 4000] ^= 1
    taken(sender.checkpoint(batches(np.array([3, 5]), memory[[3, 5]])))
    assert np.array_equal(shadow, memory)


def test_page_tables_are_told_apart() -> None:
    assert [kind for kind in range(16) if IS_PAGE_TABLE[kind]] == [1, 2, 3, 4, 9, 10, 11, 12]
    assert [kind for kind in range(16) if not HAS_DATA[kind]] == [5, 6, 7, 13, 14, 15]


# Back to what the receiver holds


@given(
    seed=st.integers(0, 2**32 - 1),
    lost=st.lists(st.sampled_from(["none", "last", "two", "half"]), min_size=1, max_size=8),
    codec=st.sampled_from(["delta", "rle"]),
    bounded=st.booleans(),
)
def test_rewind_whatever_was_lost(seed: int, lost: list[str], codec: Any, bounded: bool) -> None:
    """Checkpoints that the receiver never got, or got half: the next one brings all that they would have brought."""
    rng = np.random.default_rng(seed)
    memory = np.zeros((24, PAGE_SIZE), dtype=np.uint8)
    sender = Sender(24, codec=codec, buffer_pages=3, reference=Lru(5) if bounded else None)
    receiver = Restorer()
    last = memory.copy()

    def checkpoint() -> tuple[bytes, bytes]:
        """All of it, and half of it."""
        pages = rng.integers(0, 24, 4)
        memory[pages, rng.integers(0, PAGE_SIZE, 4)] ^= rng.integers(0, 2, 4, dtype=np.uint8)
        dirty = np.union1d(np.flatnonzero((memory != last).any(axis=1)), sender.owed)
        last[:] = memory
        data = taken(sender.checkpoint(batches(dirty, memory[dirty])))
        return data, data[: len(data) // 2]

    data, _ = checkpoint()
    receiver.feed(data)
    for what in lost:
        for _ in receiver.checkpoints():
            pass
        assert receiver.in_force is not None and receiver.in_force.record is not None
        held = receiver.in_force.record.after
        gone = [checkpoint() for _ in range({"none": 0, "last": 1, "two": 2, "half": 1}[what])]
        carried = [sender.pfns] * bool(gone)
        if what == "two":
            carried = [np.arange(24)]
        if what == "half":
            dirty = np.arange(24)
            memory[7, 7] += 1
            half = iter(sender.checkpoint(batches(dirty, memory)))
            next(half)
            half.close()
            carried.append(sender.pfns)
        if carried:
            sender.rewind(held, np.concatenate(carried))
        last[sender.owed] = memory[sender.owed]
        receiver.feed(checkpoint()[0])
        assert len(list(receiver.checkpoints())) == 1
        assert np.array_equal(receiver.memory, memory)
        assert sender.position == receiver.in_force.record.after
        assert not len(sender.owed)


def test_owed_pages_cannot_be_left_out() -> None:
    sender = Sender(4)
    with pytest.raises(ValueError):
        sender.rewind(Position(0, bytes(32)), np.array([1]))
    memory = np.ones((4, PAGE_SIZE), dtype=np.uint8)
    taken(sender.checkpoint(batches(np.arange(4), memory)))
    base = sender.position
    assert base is not None
    taken(sender.checkpoint(batches(np.array([1, 2]), memory[1:3])))
    sender.rewind(base, sender.pfns)
    assert sender.owed.tolist() == [1, 2]
    with pytest.raises(ValueError):
        taken(sender.checkpoint(batches(np.array([1]), memory[1:2])))
    sender.rewind(base, sender.pfns)
    assert sender.owed.tolist() == [1, 2]
