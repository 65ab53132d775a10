"""What tests of the session share."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import google_crc32c
import msgpack
import pytest

from remus_ckpt import Position
from remus_ckpt.errors import Malformed, StreamError
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.session.frames import (
    HEADER_BYTES,
    PREFACE,
    TYPES,
    FrameType,
)
from remus_ckpt.session.incoming import DataReceived
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import (
    FIELDS,
    Ack,
    Begin,
    Commit,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Reply,
    Request,
    StreamShape,
    Welcome,
)
from remus_ckpt.session.rules import TRANSITIONS, SessionState

FIRST = Position(0, b"\x11" * 32)
SECOND = Position(1, b"\x22" * 32)
SHAPE = StreamShape("delta", 8, 16)

HELLO = Hello(
    program="remus_ckpt 0.1.0",
    role="primary",
    name="orders",
    run=bytes(range(16)),
    memory_pages=16,
    page_size=PAGE_SIZE,
    codec="delta",
    word=8,
    compressions=("lz4", "zstd", "of tomorrow"),
)
CONTROL = Hello(program="remus-ckpt status", role="control")
WELCOME = Welcome(
    program="b", term=3, position=FIRST, stream=SHAPE, compressions=("lz4", "zstd"), limits={"x": 1}, lease_s=3
)
BEGIN = Begin(mode="full", term=3)
COMMIT = Commit(position=SECOND, before=FIRST, stream_bytes=5, pages=1)
SAMPLES: dict[FrameType, Message | None] = {
    FrameType.HELLO: HELLO,
    FrameType.WELCOME: WELCOME,
    FrameType.BEGIN: BEGIN,
    FrameType.DATA: None,
    FrameType.COMMIT: COMMIT,
    FrameType.ACK: Ack(level="durable", position=FIRST),
    FrameType.HEARTBEAT: Heartbeat(
        number=7, status={"lag": 2, "ratio": 0.5, "position": "0:11", "ok": True, "no": None}
    ),
    FrameType.ERROR: Error(code="store", message="no space", offset=12),
    FrameType.GOODBYE: Goodbye(reason="done"),
    FrameType.REQUEST: Request(number=1, method="status", arguments={"deep": [1, {"a": b"x"}, None, True, 0.5]}),
    FrameType.REPLY: Reply(number=1, result={"epoch": 4, "names": ["orders"]}),
}


class Heap:
    """Lends a buffer, and keeps what it gets. room: of that buffer."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.buffer = bytearray(room)
        self.got = bytearray()

    def get_buffer(self) -> memoryview:
        return memoryview(self.buffer)

    def buffer_updated(self, size: int) -> None:
        self.got += self.buffer[:size]

    def feed(self, data: Buffer) -> None:
        self.got += data


def take_in(session: Session, event: Any) -> None:
    """What the owner of a session does with the bytes that have come."""
    if isinstance(event, DataReceived):
        if event.data is None:
            session.lender.buffer_updated(event.size)  # type: ignore[union-attr]
        else:
            session.lender.feed(event.data)  # type: ignore[union-attr]


def joined(buffers: Iterable[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def push(session: Session, data: bytes, steps: Iterable[int] = ()) -> list[Any]:
    """Receive, in steps of these sizes and then in the largest possible; all events."""
    view, sizes, found = memoryview(data), iter(steps), []
    while view:
        room = session.get_buffer()
        size = min(len(room), len(view), next(sizes, len(view)))
        room[:size] = view[:size]
        session.buffer_updated(size)
        view = view[size:]
        while (event := session.next_event()) is not None:
            take_in(session, event)
            found.append(event)
    return found


def said(events: Iterable[Any]) -> list[Message]:
    return [event for event in events if not isinstance(event, DataReceived)]


def frame(number: int, payload: bytes, *, flags: int = 0, reserved: int = 0, length: int | None = None) -> bytes:
    """A frame by specs/session.md §2.1, without the code under test; its checksums are right."""
    size = len(payload) if length is None else length
    head = struct.pack("<BBHII", number, flags, reserved, size, google_crc32c.value(payload))
    return head + struct.pack("<I", google_crc32c.value(head)) + payload


def packed(message: Message | None) -> bytes:
    """The frame of a sample; None is DATA."""
    if message is None:
        return frame(FrameType.DATA, b"bytes")
    fields = {key: getattr(message, key) for key in FIELDS[type(message)]}

    def plain(value: Any) -> Any:
        if isinstance(value, Position):
            return [value.epoch, value.digest]
        return {"codec": value.codec, "word": value.word, "p2m_size": value.p2m_size}

    return frame(TYPES[type(message)], msgpack.packb(fields, default=plain))


PATHS: dict[SessionState, list[Message | None]] = {
    SessionState.START: [],
    SessionState.PRIMARY_HELLO: [HELLO],
    SessionState.CONTROL_HELLO: [CONTROL],
    SessionState.WELCOMED: [HELLO, WELCOME],
    SessionState.BETWEEN: [HELLO, WELCOME, Begin(mode="continue", term=3, position=FIRST)],
    SessionState.WITHIN: [HELLO, WELCOME, Begin(mode="continue", term=3, position=FIRST), None],
    SessionState.CONTROL: [CONTROL, Welcome(program="b", term=0, limits={}, lease_s=1)],
}
"""How each state is come to."""


def reach(state: SessionState) -> dict[str, Session]:
    """Both sides, in the state, their prefaces said."""
    client, server = Session("client"), Session("server")
    server.lender = Heap()
    assert push(server, PREFACE) == push(client, PREFACE) == []
    for message in PATHS[state]:
        if message is None:
            push(server, joined(client.send_data([b"bytes"])).removeprefix(PREFACE))
        else:
            here, there = (server, client) if isinstance(message, Welcome) else (client, server)
            assert push(there, joined(here.send(message)).removeprefix(PREFACE)) == [message]
    for session in (client, server):
        if not session.outgoing.sent_bytes:
            session.outgoing._prefaced = True  # in these states it says nothing, and the preface is not what is tried
        assert session.state is state
    return {"client": client, "server": server}


def refused(session: Session, data: bytes, kind: type[StreamError] = Malformed) -> StreamError:
    """What it raises, and that it raises the same again."""
    with pytest.raises(kind) as caught:
        push(session, data)
    with pytest.raises(kind) as again:
        session.next_event()
    assert again.value is caught.value
    return caught.value


def place(number: FrameType) -> tuple[SessionState, str]:
    """Where a frame of this type may come, and from whom."""
    return next((state, side) for state, side, there in TRANSITIONS if there is number)


def receiver_of(number: FrameType) -> Session:
    state, side = place(number)
    state = SessionState.WITHIN if number is FrameType.ACK else state
    return reach(state)["server" if side == "client" else "client"]


def fields_of(number: FrameType) -> dict[str, Any]:
    return msgpack.unpackb(packed(SAMPLES[number])[HEADER_BYTES:], strict_map_key=False)


def answer(session: Session, event: Any) -> None:
    if isinstance(event, Hello):
        session.send(WELCOME)
    elif isinstance(event, Welcome):
        session.send(Begin(mode="continue", term=3, position=FIRST))
        before = FIRST
        for size in (20, 5):
            after = Position(before.epoch + 1, bytes([before.epoch] * 32))
            session.send_data([bytes(size)])
            session.send(Commit(position=after, before=before, stream_bytes=size, pages=1))
            before = after
