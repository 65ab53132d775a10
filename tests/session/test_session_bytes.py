"""A session's bytes: any split gives the same, any bit that flips is found, data travel uncopied."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import lz4.block
import msgpack
import numpy as np
import pytest
import zstandard
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import (
    BEGIN,
    FIRST,
    HELLO,
    SAMPLES,
    WELCOME,
    Heap,
    answer,
    fields_of,
    frame,
    joined,
    packed,
    push,
    reach,
    receiver_of,
    refused,
    said,
    take_in,
)

from remus_ckpt import Position, Restorer, Sender, batches
from remus_ckpt.errors import LimitExceeded, StreamError
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.session.frames import (
    COMPRESSIONS,
    DATA_BYTES,
    FLAGS,
    HEADER_BYTES,
    MESSAGES,
    FrameType,
)
from remus_ckpt.session.incoming import DataReceived
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import (
    Ack,
    Begin,
    Commit,
    Goodbye,
    Welcome,
)
from remus_ckpt.session.rules import SessionState
from remus_ckpt.wire.xen.reader import Reader

# Any split, any bit


def pages(seed: int, count: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = np.zeros((count, PAGE_SIZE), dtype=np.uint8)
    found[:, : 1 + seed * 100] = random.integers(0, 256, size=(count, 1 + seed * 100), dtype=np.uint8)
    return found


def conversation(compression: Any, stream: list[bytes]) -> tuple[bytes, bytes]:
    """All bytes of a session from both sides; each of `stream` is a checkpoint."""
    client, server = Session("client"), Session("server")
    server.lender = Heap()
    up, down = bytearray(), bytearray()

    def tell(sender: Session, buffers: list[Buffer]) -> None:
        data = joined(buffers)
        receiver = server if sender is client else client
        (up if sender is client else down).extend(data)
        push(receiver, data)

    tell(client, client.send(HELLO))
    tell(server, server.send(WELCOME))
    tell(client, client.send(Begin(mode="continue", term=3, position=FIRST)))
    before = FIRST
    for checkpoint in stream:
        tell(client, client.send_data([checkpoint], compression))
        tell(client, client.send(SAMPLES[FrameType.HEARTBEAT]))
        after = Position(before.epoch + 1, bytes([before.epoch] * 32))
        commit = Commit(position=after, before=before, stream_bytes=len(checkpoint), pages=1)
        tell(client, client.send(commit))
        tell(server, server.send(Ack(level="durable", position=after)))
        before = after
    tell(client, client.send(Goodbye(reason="done")))
    tell(server, server.send(Goodbye(reason="done")))
    return bytes(up), bytes(down)


LONG = conversation("none", [bytes(range(256)) * 1500, b"short", bytes(70_000)])[0]
MIXED = conversation("lz4", [b"ab" * 5000, b"short", bytes(90_000)])[0]


def receive(side: Any, data: bytes, steps: Iterable[int] = (), room: int = 1 << 20) -> tuple[list[Any], bytes]:
    """What one side makes of the other's bytes, its own answers taken as given."""
    session, lender = Session(side), Heap(room)
    session.lender = lender
    if side == "client":
        session.send(HELLO)
    found: list[Any] = []
    view, sizes = memoryview(data), iter(steps)
    while view:
        into = session.get_buffer()
        size = min(len(into), len(view), next(sizes, len(view)))
        into[:size] = view[:size]
        session.buffer_updated(size)
        view = view[size:]
        while (event := session.next_event()) is not None:
            take_in(session, event)
            answer(session, event)
            found.append(event)
    return found, bytes(lender.got)


@settings(max_examples=many(12, 60))
@given(
    st.sampled_from([LONG, MIXED]),
    st.lists(st.integers(1, 3000), max_size=200),
    st.sampled_from([7, 5000, 64 * KIB, 100_000, 1 << 20]),
)
def test_any_split_gives_the_same(data: bytes, steps: list[int], room: int):
    whole, stream = receive("server", data)
    found, same = receive("server", data, steps, room)
    assert (said(found), same) == (said(whole), stream)
    assert sum(e.size for e in found if isinstance(e, DataReceived)) == len(stream)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_every_flipped_bit_is_found(side: str, compression: str):
    data = conversation(compression, [b"ab" * 10, b"short"])[side == "client"]
    truth = said(receive(side, data)[0])
    assert isinstance(truth[-1], Goodbye)
    for bit in range(0, 8 * len(data), many(5, 1)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        found: list[Any] = []
        session = Session(side)  # type: ignore[arg-type]
        session.lender = Heap(100)
        if side == "client":
            session.send(HELLO)
        with pytest.raises(StreamError):
            feed(session, bytes(changed), found)
        assert said(found) == truth[: len(said(found))] != truth, bit


def feed(session: Session, data: bytes, found: list[Any]) -> None:
    room = session.get_buffer()
    room[: len(data)] = data
    session.buffer_updated(len(data))
    while (event := session.next_event()) is not None:
        take_in(session, event)
        answer(session, event)
        found.append(event)


def test_a_flipped_bit_in_what_went_straight_to_the_lender():
    both = reach(SessionState.BETWEEN)
    data = bytearray(joined(both["client"].send_data([bytes(3 * MIB)])))
    data[2_000_000] ^= 4
    begin = both["server"].received_bytes
    error = refused(both["server"], bytes(data))
    assert (error.section, error.offset, error.chunk) == ("session.md §2.1", begin, "DATA")


@settings(max_examples=many(60, 300))
@given(st.sampled_from(SessionState), st.sampled_from(["client", "server"]), st.binary(max_size=200), st.data())
def test_garbage_is_refused_by_our_own_errors(state: SessionState, side: str, junk: bytes, data: st.DataObject):
    session = reach(state)[side]
    number = data.draw(st.integers(0, 13))
    flags = data.draw(st.sampled_from([0, 0, 1, 2, 3]))
    for piece in (frame(number, junk, flags=flags), junk):
        try:
            push(session, piece)
        except StreamError as error:
            assert (error.section or "").startswith("session.md §")
            assert error.offset is not None


TEXTS = st.text(max_size=5)
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(0, 9), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=many(80, 400))
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_any_value_in_any_field_is_taken_or_refused(number: FrameType, data: st.DataObject):
    fields = fields_of(number)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(VALUES)
    try:
        (message,) = push(receiver_of(number), frame(number, msgpack.packb(fields)))
    except StreamError:
        return
    # What was taken can be said.
    assert type(message) is MESSAGES[number]
    assert packed(message)


# Data


@pytest.mark.parametrize("compression", ["none", *COMPRESSIONS])
def test_streams_of_all_sizes_arrive(compression: Any):
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, size=DATA_BYTES + 100, dtype=np.uint8)
    parts: list[Buffer] = [b"", b"x", noise, bytearray(70_000), np.zeros((20, PAGE_SIZE), dtype=np.uint8), b"end"]
    both = reach(SessionState.BETWEEN)
    begin = both["server"].received_bytes
    buffers = both["client"].send_data(parts, compression)
    events = push(both["server"], joined(buffers))
    assert bytes(both["server"].lender.got) == joined(parts)
    assert sum(event.size for event in events) == len(joined(parts))
    assert both["server"].received_bytes - begin == sum(map(len, buffers))
    assert sum(map(len, buffers)) <= len(joined(parts)) + 2 * HEADER_BYTES


def test_nothing_to_send_is_no_frame():
    client = reach(SessionState.BETWEEN)["client"]
    assert client.send_data([b"", np.zeros((0, PAGE_SIZE), dtype=np.uint8)]) == []
    assert client.state is SessionState.BETWEEN


def test_buffers_travel_uncopied():
    memory = np.ones((2000, PAGE_SIZE), dtype=np.uint8)
    client = reach(SessionState.BETWEEN)["client"]
    parts = client.send_data([memory, b"tail"])
    mine = [part for part in parts if np.shares_memory(np.frombuffer(part, dtype=np.uint8), memory)]
    assert sum(map(len, mine)) == memory.nbytes
    assert sum(map(len, parts)) - memory.nbytes == 4 + 2 * HEADER_BYTES


def test_long_payloads_are_received_into_the_lender():
    both = reach(SessionState.BETWEEN)
    data = joined(both["client"].send_data([bytes(200_000)]))
    server, lender = both["server"], Heap()
    server.lender = lender
    push(server, data[:HEADER_BYTES])
    room = server.get_buffer()
    assert np.shares_memory(np.frombuffer(room, np.uint8), np.frombuffer(lender.buffer, np.uint8))
    assert len(room) == 200_000
    room[:150_000] = data[HEADER_BYTES : HEADER_BYTES + 150_000]
    server.buffer_updated(150_000)
    assert server.next_event() == DataReceived(150_000)
    assert server.next_event() is None
    # What is left is short: it comes through the session's own buffer, and what is behind it with it.
    assert len(server.get_buffer()) > 50_000
    assert not np.shares_memory(np.frombuffer(server.get_buffer(), np.uint8), np.frombuffer(lender.buffer, np.uint8))


def test_more_may_be_received_before_all_events_are_taken():
    both = reach(SessionState.BETWEEN)
    data = joined(both["client"].send_data([np.arange(200_000, dtype=np.uint8)]))
    server, lender = both["server"], Heap(10)
    server.lender = lender
    server.get_buffer()[:30_000] = data[:30_000]
    server.buffer_updated(30_000)
    assert server.next_event() == DataReceived(10)
    lender.buffer_updated(10)
    lender.buffer = bytearray(1 << 20)
    server.get_buffer()[:1000] = data[30_000:31_000]
    server.buffer_updated(1000)
    push(server, data[31_000:])
    assert bytes(lender.got) == data[HEADER_BYTES:]


def compressed(name: str, content: bytes, size: int | None = None) -> bytes:
    body = zstandard.compress(content) if name == "zstd" else lz4.block.compress(content, store_size=False)
    return frame(FrameType.DATA, struct.pack("<I", len(content) if size is None else size) + body, flags=FLAGS[name])


@pytest.mark.parametrize("name", ["lz4", "zstd"])
@pytest.mark.parametrize("size", [0, 1, 999, 1001, 4000, DATA_BYTES, DATA_BYTES + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_size_that_is_not_what_comes_out(name: str, size: int):
    both = reach(SessionState.BETWEEN)
    tracemalloc.start()
    try:
        error = refused(both["server"], compressed(name, bytes(1000), size))
        assert tracemalloc.get_traced_memory()[1] < 2 * DATA_BYTES
    finally:
        tracemalloc.stop()
    assert error.section == f"session.md §2.{4 if size > DATA_BYTES else 3}"
    assert isinstance(error, LimitExceeded) == (size > DATA_BYTES)
    assert not both["server"].lender.got


def _zstd_frames(*, content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=content_size).compress(bytes(1000))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("lz4", b""),
        ("lz4", b"\xff" * 20),
        ("lz4", lz4.block.compress(bytes(1000), store_size=False) + b"\0"),
        ("lz4", lz4.block.compress(bytes(1000))),
        ("zstd", b"\x28\xb5\x2f\xfd"),
        ("zstd", b"\xff" * 20),
        ("zstd", _zstd_frames(content_size=False)),
        ("zstd", _zstd_frames() + b"\0"),
        ("zstd", _zstd_frames() * 2),
        ("zstd", _zstd_frames()[:-1]),
        # Its header: a size of 2^62, of which nothing is there
        ("zstd", b"\x28\xb5\x2f\xfd\xe0" + (1 << 62).to_bytes(8, "little")),
    ],
)
def test_what_cannot_be_unpacked(name: str, body: bytes):
    server = reach(SessionState.BETWEEN)["server"]
    data = frame(FrameType.DATA, struct.pack("<I", 1000) + body, flags=FLAGS[name])
    assert refused(server, data).section == "session.md §2.3"


def test_what_grows_by_compression_goes_as_it_is():
    noise = np.random.default_rng(2).integers(0, 256, size=5000, dtype=np.uint8).tobytes()
    for name in COMPRESSIONS:
        client = reach(SessionState.BETWEEN)["client"]
        assert joined(client.send_data([noise], name)) == frame(FrameType.DATA, noise)
    larger = compressed("lz4", noise)
    assert refused(reach(SessionState.BETWEEN)["server"], larger).section == "session.md §2.3"


def test_a_compression_that_was_not_agreed_on():
    client, server = Session("client"), Session("server")
    server.lender = Heap()
    push(server, joined(client.send(HELLO)))
    push(client, joined(server.send(Welcome(program="b", term=3, compressions=("zstd",), limits={}, lease_s=1))))
    push(server, joined(client.send(BEGIN)))
    with pytest.raises(ValueError, match="lz4"):
        client.send_data([bytes(1000)], "lz4")
    assert refused(server, compressed("lz4", bytes(1000))).section == "session.md §2.3"


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_stream_travels_into_a_reader(compression: Any):
    """A sender's checkpoints through a session into a restorer: the memory is the same, and so are the positions."""
    count = 600
    client, server = Session("client"), Session("server")
    restorer = Restorer()
    assert isinstance(restorer.reader, Reader)
    server.lender = restorer.reader
    push(server, joined(client.send(HELLO)))
    push(client, joined(server.send(Welcome(program="b", term=1, compressions=COMPRESSIONS, limits={}, lease_s=1))))
    push(server, joined(client.send(Begin(mode="full", term=1))))
    sender, memory, before = Sender(count), np.zeros((count, PAGE_SIZE), dtype=np.uint8), None
    for epoch in range(4):
        chosen = np.arange(epoch, count, epoch + 1)
        memory[chosen] = pages(epoch, len(chosen))
        for buffers in sender.checkpoint(batches(chosen, memory[chosen])):
            deliver(joined(client.send_data(buffers, compression)), server, restorer)
        assert sender.position is not None
        assert sender.sent is not None
        commit = Commit(
            position=sender.position, before=before, stream_bytes=sender.sent.stream_bytes, pages=len(chosen)
        )
        assert deliver(joined(client.send(commit)), server, restorer) == [commit]
        checkpoint = restorer.commit()
        assert checkpoint.record.after == commit.position
        assert (np.asarray(restorer.memory) == memory).all()
        ack = Ack(level="applied", position=commit.position)
        assert push(client, joined(server.send(ack))) == [ack]
        before = sender.position


def deliver(data: bytes, server: Session, restorer: Restorer) -> list[Any]:
    view, found = memoryview(data), []
    while view:
        room = server.get_buffer()
        size = min(len(room), len(view), 100_000)
        room[:size] = view[:size]
        server.buffer_updated(size)
        view = view[size:]
        while (event := server.next_event()) is not None:
            take_in(server, event)
            if isinstance(event, DataReceived):
                while restorer.staged is None and restorer.next_event() is not None:
                    pass
            else:
                found.append(event)
    return found
