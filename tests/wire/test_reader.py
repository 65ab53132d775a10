"""The reader and the writer keep to the table of places; any split and any cut of a stream gives what it must."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import streams as s
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import EC, HVM8, WHOLE, both_words, kinds_of, rewritten
from streams import END, LAST_CHECKPOINT, XALLOC, XTAB, entry, page, plain, restore, run

from remus_ckpt.errors import Malformed, StreamError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import ChunkId, Signature
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import NEED_DATA, Reader
from remus_ckpt.wire.xen.states import EventKind, StreamState
from remus_ckpt.wire.xen.writer import EventWriter

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


# Splits


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


# EventWriter


@pytest.mark.parametrize("name", [name for name in WHOLE if "cut" not in name and "behind" not in name])
def test_what_is_read_is_written_again_byte_by_byte(name: str) -> None:
    found, error, reader = run(WHOLE[name])
    data = rewritten(found, reader.dialect.word)
    assert data == WHOLE[name][: len(data)] and len(data) == (error.offset if error else len(WHOLE[name]))
