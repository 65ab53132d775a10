"""The session: the one table in both directions, any split, any flipped bit, what is refused, and the examples."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import lz4.block
import msgpack
import numpy as np
import pytest
import zstandard
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_ckpt import Position, Restorer, Sender, batches
from remus_ckpt.errors import LimitExceeded, LinkError, Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.session import frames
from remus_ckpt.session.frames import (
    COMPRESSIONS,
    CONTROL_BYTES,
    DATA_BYTES,
    FLAGS,
    HEADER_BYTES,
    MESSAGES,
    PREFACE,
    REQUEST_BYTES,
    TYPES,
    FrameType,
    negotiate,
)
from remus_ckpt.session.machine import TRANSITIONS, DataReceived, Direction, Session, SessionState
from remus_ckpt.session.messages import (
    FIELDS,
    Ack,
    Begin,
    Commit,
    Error,
    ErrorCode,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Reply,
    Request,
    StreamShape,
    Welcome,
    check_name,
)
from remus_ckpt.wire.xen.reader import Reader

SPEC = (Path(__file__).resolve().parents[2] / "specs" / "session.md").read_text()
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


# The table

GRID = """
                   HELLO WELCOME BEGIN DATA COMMIT ACK HEARTBEAT ERROR GOODBYE REQUEST REPLY
    START          c     .       .     .    .      .   .         cs    cs      .       .
    PRIMARY_HELLO  .     s       .     .    .      .   .         cs    cs      .       .
    CONTROL_HELLO  .     s       .     .    .      .   .         cs    cs      .       .
    WELCOMED       .     .       c     .    .      .   cs        cs    cs      .       .
    BETWEEN        .     .       .     c    .      s   cs        cs    cs      .       .
    WITHIN         .     .       .     c    c      s   cs        cs    cs      .       .
    CONTROL        .     .       .     .    .      .   cs        cs    cs      c       s
"""
"""Who may say what where: written from the purpose of each, in the order of `FrameType`."""


def cells() -> list[tuple[SessionState, str, FrameType, bool]]:
    names, *rows = (line.split() for line in GRID.strip().splitlines())
    assert names == [number.name for number in FrameType]
    assert [row[0] for row in rows] == [state.name for state in SessionState]
    return [
        (SessionState[row[0]], side, FrameType[name], side[0] in cell)
        for row in rows
        for name, cell in zip(names, row[1:], strict=True)
        for side in ("client", "server")
    ]


@pytest.mark.parametrize(("state", "side", "number", "allowed"), cells())
def test_every_frame_from_either_side_in_every_state(state: SessionState, side: str, number: FrameType, allowed: bool):
    message = SAMPLES[number]
    if state is SessionState.CONTROL_HELLO and number is FrameType.WELCOME:
        message = PATHS[SessionState.CONTROL][1]
    both = reach(state)
    sender, receiver = both[side], both["server" if side == "client" else "client"]
    if not allowed:
        with pytest.raises(ValueError, match=number.name):
            sender.send(message) if message else sender.send_data([b"bytes"])
        assert sender.state is state
        error = refused(receiver, packed(message))
        assert (error.section, error.chunk) == ("session.md §4", number.name)
        assert error.offset == receiver.received_bytes
        assert receiver.state is state
        return
    data = joined(sender.send(message) if message else sender.send_data([b"bytes"]))
    assert data == packed(message)
    assert push(receiver, data) == [message or DataReceived(5)]
    assert receiver.state is sender.state
    after = TRANSITIONS[state, side, number]  # type: ignore[index]
    assert sender.state is after
    assert sender.ended == receiver.ended == (number in (FrameType.ERROR, FrameType.GOODBYE))


def test_a_control_hello_leads_elsewhere():
    assert reach(SessionState.CONTROL_HELLO)["server"].common.hello == CONTROL


def test_what_leaves_the_state_alone_can_cross_what_does_not():
    """An ack on its way while the client goes on: each is fine by whoever receives it."""
    both = reach(SessionState.BETWEEN)
    ack = joined(both["server"].send(Ack(level="applied", position=FIRST)))
    data = joined(both["client"].send_data([b"abcde"]))
    assert len(push(both["client"], ack)) == 1
    push(both["server"], data)
    commit = joined(both["client"].send(COMMIT))
    assert push(both["server"], commit) == [COMMIT]
    assert both["client"].state is both["server"].state is SessionState.BETWEEN


def test_frames_that_cross_mean_the_same_to_both():
    """Only one side can leave a state, and what the other may still say there it may say in the next one too."""
    for (state, side, _), after in TRANSITIONS.items():
        if after is state:
            continue
        other = "server" if side == "client" else "client"
        still = {number for there, who, number in TRANSITIONS if (there, who) == (state, other)}
        for number in still:
            assert TRANSITIONS[state, other, number] is state  # type: ignore[index]
            assert TRANSITIONS[after, other, number] is after  # type: ignore[index]


def test_one_thread_receives_while_another_sends():
    client = reach(SessionState.BETWEEN)["client"]

    class Meanwhile(dict):  # type: ignore[type-arg]
        def __contains__(self, position: object) -> bool:
            client.send_data([b"abcde"])
            return super().__contains__(position)

    client.common.made = Meanwhile(client.common.made)
    assert len(push(client, packed(Ack(level="durable", position=FIRST)))) == 1
    assert client.state is SessionState.WITHIN


def test_in_the_stream_no_direction_changes_the_other():
    """So that each may have a thread of its own."""

    def fields(direction: Direction) -> dict[str, object]:
        own = {name: id(value) for name, value in vars(direction).items()}
        return own | {"state": direction.state, "end": direction.ended_with}

    ack, goodbye = Ack(level="applied", position=FIRST), Goodbye(reason="")
    for side, said, heard in (
        ("client", [None, COMMIT, SAMPLES[FrameType.HEARTBEAT], goodbye], [ack]),
        ("server", [ack, SAMPLES[FrameType.HEARTBEAT], goodbye], [None, COMMIT]),
    ):
        session = reach(SessionState.BETWEEN)[side]
        before = fields(session.incoming)
        for message in said[:-1]:
            session.send(message) if message else session.send_data([b"abcde"])
        assert fields(session.incoming) == before
        before = fields(session.outgoing)
        for message in heard:
            push(session, packed(message))
        assert fields(session.outgoing) == before
        session.send(said[-1])
        assert session.incoming.ended_with is None
        assert session.outgoing.ended_with == session.incoming.answered_with == said[-1]


# The end


def test_nothing_is_sent_behind_the_end_and_nothing_taken():
    for ending in (SAMPLES[FrameType.ERROR], SAMPLES[FrameType.GOODBYE]):
        both = reach(SessionState.WITHIN)
        data = joined(both["server"].send(ending))
        with pytest.raises(ValueError, match="ended"):
            both["server"].send(SAMPLES[FrameType.HEARTBEAT])
        with pytest.raises(ValueError, match="ended"):
            both["server"].send(SAMPLES[FrameType.ERROR])
        assert push(both["client"], data) == [ending]
        error = refused(both["client"], packed(SAMPLES[FrameType.HEARTBEAT]))
        assert (error.section, both["client"].last_received) == ("session.md §4", ending)


def test_a_goodbye_may_be_answered_and_an_error_not():
    both = reach(SessionState.WITHIN)
    push(both["server"], joined(both["client"].send(Goodbye(reason="done"))))
    assert push(both["client"], joined(both["server"].send(Ack(level="durable", position=FIRST))))
    assert push(both["client"], joined(both["server"].send(Goodbye(reason="and so am I"))))
    both = reach(SessionState.WITHIN)
    push(both["server"], joined(both["client"].send(Error(code="internal", message=""))))
    with pytest.raises(ValueError, match="ended"):
        both["server"].send(Goodbye(reason=""))
    with pytest.raises(ValueError, match="ended"):
        both["server"].send_data([b"x"])


def test_who_has_sent_an_error_reads_no_further():
    both = reach(SessionState.WITHIN)
    data = joined(both["client"].send_data([bytes(300_000)]))
    push(both["server"], data[:100_000])
    got = len(both["server"].lender.got)
    both["server"].send(Error(code="store", message="no space"))
    assert push(both["server"], data[100_000:] + b"anything" * 100_000) == []
    assert len(both["server"].lender.got) == got


@pytest.mark.parametrize("state", SessionState)
def test_bytes_that_end_without_a_goodbye(state: SessionState):
    for cut in (0, 1, HEADER_BYTES, HEADER_BYTES + 3):
        session = reach(state)["client"]
        push(session, packed(SAMPLES[FrameType.ERROR])[:cut])
        session.feed_eof()
        for _ in range(2):
            with pytest.raises(LinkError):
                session.next_event()


def test_bytes_that_end_behind_a_goodbye():
    session = reach(SessionState.WITHIN)["client"]
    push(session, packed(SAMPLES[FrameType.GOODBYE]))
    session.feed_eof()
    assert session.next_event() is session.next_event() is None


def test_an_error_can_be_sent_when_something_was_refused():
    both = reach(SessionState.PRIMARY_HELLO)
    error = refused(both["server"], bytes(HEADER_BYTES))
    answer = Error(code="malformed", message=str(error), offset=error.offset)
    assert push(both["client"], joined(both["server"].send(answer))) == [answer]


# Preface and versions


@pytest.mark.parametrize("at", range(len(PREFACE)))
def test_the_first_wrong_byte_of_a_preface_is_refused(at: int):
    data = bytearray(PREFACE[: at + 1])
    data[at] ^= 0x20
    error = refused(Session("server"), bytes(data), UnknownFormat)
    assert (error.offset, error.section) == (at, "session.md §1.1")


def test_a_server_may_refuse_before_it_has_read():
    client, server = Session("client"), Session("server")
    client.send(HELLO)
    busy = Error(code="busy", message="a thousand are here")
    assert push(client, joined(server.send(busy))) == [busy]


@pytest.mark.parametrize(
    "fields",
    [
        {"versions": [2, 3], "program": "of tomorrow"},
        {"versions": [0], "program": "of yesterday", "role": 7, "name": None},
    ],
)
def test_a_hello_of_another_version_is_understood_so_far(fields: dict[str, Any]):
    server, client = Session("server"), Session("client")
    error = refused(server, PREFACE + frame(FrameType.HELLO, msgpack.packb(fields)), UnknownFormat)
    assert error.section == "session.md §1.3"
    assert fields["program"] in error.message
    client.send(HELLO)
    answer = Error(code="version", message=error.message)
    assert push(client, joined(server.send(answer))) == [answer]


def test_negotiation():
    assert negotiate(Hello(versions=(1, 2), program="p", role="control")) == 1
    with pytest.raises(UnknownFormat):
        negotiate(Hello(versions=(2,), program="p", role="control"))


def test_a_welcome_keeps_to_the_hello():
    for changed in ({"version": 2}, {"compressions": ("snappy",)}):
        fields = {key: getattr(WELCOME, key) for key in FIELDS[Welcome]} | changed
        both = reach(SessionState.PRIMARY_HELLO)
        with pytest.raises(ValueError, match="WELCOME"):
            both["server"].send(Welcome(**fields))
        assert refused(both["client"], packed(Welcome(**fields))).section == "session.md §3.2"


# Rules of §3, §5 and §6


@pytest.mark.parametrize(
    ("begin", "section"),
    [
        (Begin(mode="full", term=4), "§6"),
        (Begin(mode="continue", term=3, position=SECOND), "§5"),
        (Begin(mode="continue", term=3, position=Position(0, bytes(32))), "§5"),
    ],
)
def test_a_begin_that_does_not_fit_the_welcome(begin: Begin, section: str):
    both = reach(SessionState.WELCOMED)
    with pytest.raises(ValueError, match="BEGIN"):
        both["client"].send(begin)
    assert refused(both["server"], packed(begin)).section == f"session.md {section}"


def test_nothing_is_continued_where_only_a_full_copy_will_do():
    client, server = Session("client"), Session("server")
    push(server, joined(client.send(HELLO)))
    push(client, joined(server.send(Welcome(program="b", term=3, position=FIRST, limits={}, lease_s=1))))
    begin = Begin(mode="continue", term=3, position=FIRST)
    with pytest.raises(ValueError, match="BEGIN"):
        client.send(begin)
    assert refused(server, packed(begin)).section == "session.md §5"


@pytest.mark.parametrize(
    ("changed", "section"),
    [
        ({"stream_bytes": 4}, "§3.5"),
        ({"stream_bytes": 6}, "§3.5"),
        ({"before": None}, "§5"),
        ({"before": Position(0, bytes(32))}, "§5"),
    ],
)
def test_a_commit_that_does_not_fit_what_came(changed: dict[str, Any], section: str):
    commit = Commit(**({key: getattr(COMMIT, key) for key in FIELDS[Commit]} | changed))
    both = reach(SessionState.WITHIN)
    with pytest.raises(ValueError, match="COMMIT"):
        both["client"].send(commit)
    assert refused(both["server"], packed(commit)).section == f"session.md {section}"


def test_only_the_first_commit_of_a_full_copy_is_free():
    both = reach(SessionState.WELCOMED)
    push(both["server"], joined(both["client"].send(BEGIN)))
    for before, position in ((Position(8, bytes(32)), Position(9, bytes(32))), (None, SECOND)):
        push(both["server"], joined(both["client"].send_data([b"x"])))
        commit = Commit(position=position, before=before, stream_bytes=1, pages=0)
        if before is None:
            assert refused(both["server"], packed(commit)).section == "session.md §5"
        else:
            assert push(both["server"], joined(both["client"].send(commit))) == [commit]


def test_an_ack_of_what_was_never_committed():
    """Not even its digest may differ: what is released hangs on it."""
    for position in (SECOND, Position(0, b"\x12" * 32)):
        both = reach(SessionState.WITHIN)
        ack = Ack(level="durable", position=position)
        with pytest.raises(ValueError, match="ACK"):
            both["server"].send(ack)
        assert refused(both["client"], packed(ack)).section == "session.md §3.6"


# Fields

WRONG: list[tuple[FrameType, str, Any]] = [
    (FrameType.HELLO, "versions", []),
    (FrameType.HELLO, "versions", [1, True]),
    (FrameType.HELLO, "versions", [1] * 300),
    (FrameType.HELLO, "program", 1),
    (FrameType.HELLO, "program", "x" * 257),
    (FrameType.HELLO, "role", "backup"),
    (FrameType.HELLO, "name", "../etc"),
    (FrameType.HELLO, "name", ""),
    (FrameType.HELLO, "name", "x" * 65),
    (FrameType.HELLO, "run", bytes(15)),
    (FrameType.HELLO, "term", -1),
    (FrameType.HELLO, "term", 1 << 63),
    (FrameType.HELLO, "term", True),
    (FrameType.HELLO, "memory_pages", 0),
    (FrameType.HELLO, "page_size", 4096.0),
    (FrameType.HELLO, "codec", ""),
    (FrameType.HELLO, "word", 0),
    (FrameType.HELLO, "compressions", "lz4"),
    (FrameType.WELCOME, "version", None),
    (FrameType.WELCOME, "term", None),
    (FrameType.WELCOME, "position", [0, bytes(31)]),
    (FrameType.WELCOME, "position", [0, bytes(32), 0]),
    (FrameType.WELCOME, "position", [True, bytes(32)]),
    (FrameType.WELCOME, "position", None),
    (FrameType.WELCOME, "stream", {"codec": "delta", "word": 8}),
    (FrameType.WELCOME, "stream", [1]),
    (FrameType.WELCOME, "limits", {"x": "1"}),
    (FrameType.WELCOME, "limits", {1: 1}),
    (FrameType.WELCOME, "lease_s", float("nan")),
    (FrameType.WELCOME, "lease_s", -1),
    (FrameType.BEGIN, "mode", "resume"),
    (FrameType.BEGIN, "term", None),
    (FrameType.COMMIT, "position", None),
    (FrameType.COMMIT, "before", [1, bytes(32)]),
    (FrameType.COMMIT, "stream_bytes", 0),
    (FrameType.COMMIT, "pages", 1.0),
    (FrameType.ACK, "level", "stored"),
    (FrameType.HEARTBEAT, "number", None),
    (FrameType.HEARTBEAT, "number", True),
    (FrameType.BEGIN, "wait", "never"),
    (FrameType.WELCOME, "highest_epoch", -1),
    (FrameType.HEARTBEAT, "status", {"x": []}),
    (FrameType.HEARTBEAT, "status", {"x": "y" * 4097}),
    (FrameType.HEARTBEAT, "status", {str(i): i for i in range(257)}),
    (FrameType.ERROR, "code", ""),
    (FrameType.ERROR, "message", None),
    (FrameType.ERROR, "offset", -1),
    (FrameType.GOODBYE, "reason", 0),
    (FrameType.REQUEST, "method", "m" * 65),
    (FrameType.REQUEST, "arguments", []),
    (FrameType.REQUEST, "arguments", {"x": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}),
    (FrameType.REQUEST, "arguments", {"x": {b"y": 1}}),
    (FrameType.REPLY, "result", {"x": (1 << 64) - 1}),
    (FrameType.REPLY, "result", {"x": [0] * 4097}),
]


def place(number: FrameType) -> tuple[SessionState, str]:
    """Where a frame of this type may come, and from whom."""
    return next((state, side) for state, side, there in TRANSITIONS if there is number)


def receiver_of(number: FrameType) -> Session:
    state, side = place(number)
    state = SessionState.WITHIN if number is FrameType.ACK else state
    return reach(state)["server" if side == "client" else "client"]


def fields_of(number: FrameType) -> dict[str, Any]:
    return msgpack.unpackb(packed(SAMPLES[number])[HEADER_BYTES:], strict_map_key=False)


@pytest.mark.parametrize(("number", "key", "value"), WRONG)
def test_a_field_of_the_wrong_kind(number: FrameType, key: str, value: Any):
    payload = msgpack.packb(fields_of(number) | {key: value})
    error = refused(receiver_of(number), frame(number, payload))
    assert error.section == f"session.md §3.{int(number)}"
    if not (isinstance(value, list) and key in ("position", "before")):  # as an object it cannot be made wrong
        given = {name: getattr(SAMPLES[number], name) for name in FIELDS[MESSAGES[number]]} | {key: value}
        with pytest.raises(ValueError, match=r"."):
            MESSAGES[number](**given)


@pytest.mark.parametrize("number", MESSAGES)
def test_keys_unknown_absent_and_twice(number: FrameType):
    fields = fields_of(number)
    assert push(receiver_of(number), frame(number, msgpack.packb({"of tomorrow": [1], **fields}))) == [SAMPLES[number]]
    for key, kind in FIELDS[MESSAGES[number]].items():
        try:
            kind(None)
        except ValueError:
            payload = msgpack.packb({name: value for name, value in fields.items() if name != key})
            assert refused(receiver_of(number), frame(number, payload)).section == f"session.md §3.{int(number)}"
    key, value = next(iter(fields.items()))
    twice = bytes([0x80 | len(fields) + 1]) + msgpack.packb(key) + msgpack.packb(value) + msgpack.packb(fields)[1:]
    refused(receiver_of(number), frame(number, twice))


NO_MAPS = {
    "nil": b"\xc0",
    "list": b"\x90",
    "behind the map": b"\x80\xc0",
    "cut": b"\x81\xa1x",
    "reserved": b"\xc1",
    "extension": b"\x81\xa1x\xc7\x00\x05",
    "timestamp": b"\x81\xa1x\xd6\xff\x00\x00\x00\x00",
    "no text": b"\x81\xa1x\xa1\xff",
    "deep": b"\x91" * 60_000 + b"\xc0",
    "wide": b"\x81\xa1x" + b"\xdd\x00\x00\x01\x00" * 10_000,
}


@pytest.mark.parametrize("payload", NO_MAPS.values(), ids=NO_MAPS.keys())
@pytest.mark.parametrize("number", [FrameType.HEARTBEAT, FrameType.ERROR])
def test_a_payload_that_is_no_such_map(number: FrameType, payload: bytes):
    refused(receiver_of(number), frame(number, payload))


@pytest.mark.parametrize("extension", [b"\xc7\x00\x05", b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x00"])
def test_no_extension_even_under_a_key_that_nobody_reads(extension: bytes):
    payload = b"\x82\xa7unknown" + extension + b"\xa6reason\xa0"
    assert refused(receiver_of(FrameType.GOODBYE), frame(FrameType.GOODBYE, payload)).section == "session.md §3.9"


def test_a_long_message_is_cut_not_refused():
    error = Error(code="internal", message="\udcff" + "é" * 10_000)
    assert len(error.message) == 4096
    assert push(reach(SessionState.WITHIN)["client"], joined(reach(SessionState.WITHIN)["server"].send(error))) == [
        error
    ]


def test_a_request_too_large_to_send():
    both = reach(SessionState.CONTROL)
    with pytest.raises(ValueError, match="request_bytes"):
        both["client"].send(Request(number=1, method="m", arguments={"x": bytes(REQUEST_BYTES)}))
    large = Request(number=1, method="m", arguments={"x": bytes(REQUEST_BYTES - 100)})
    assert push(both["server"], joined(both["client"].send(large))) == [large]


@pytest.mark.parametrize("name", ["a", "A9._-", "0" * 64])
def test_names(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "_x", "a/b", "a\n", "ä", "0" * 65, "a b", "a\0"])
def test_no_names(name: str):
    with pytest.raises(ValueError, match="name"):
        check_name(name)


# Headers and lengths


@pytest.mark.parametrize(
    "data",
    [
        frame(FrameType.HEARTBEAT, b"\x80", reserved=1),
        frame(FrameType.HEARTBEAT, b"\x80", reserved=0x8000),
        frame(FrameType.HEARTBEAT, b"\x80", flags=1),
        frame(FrameType.DATA, b"x", flags=3),
        frame(FrameType.DATA, b"x", flags=0x80),
        frame(FrameType.DATA, b""),
        frame(0, b"x"),
        frame(12, b"x"),
        frame(255, b"x"),
    ],
)
def test_a_header_that_breaks_a_rule(data: bytes):
    session = reach(SessionState.BETWEEN)["server"]
    begin = session.received_bytes
    error = refused(session, data)
    assert (error.section, error.offset) == ("session.md §2.1", begin)


@pytest.mark.parametrize("number", FrameType)
def test_a_length_alone_takes_no_memory(number: FrameType):
    limit = {FrameType.DATA: DATA_BYTES, FrameType.REQUEST: REQUEST_BYTES, FrameType.REPLY: REQUEST_BYTES}
    most = limit.get(number, CONTROL_BYTES)
    for length in (most, most + 1, 0xFFFFFFFF):
        session = receiver_of(number)
        data = frame(number, b"", length=length)
        tracemalloc.start()
        try:
            if length > most:
                assert refused(session, data, LimitExceeded).section == "session.md §2.4"
            else:
                assert push(session, data + bytes(100)) in ([], [DataReceived(100)])
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("claim", [b"\xdd\x00\x00\x10\x00", b"\xdd\x00\x0f\x00\x00", b"\xdf\x00\x0f\x00\x00\xa1x"])
def test_a_nest_of_lengths_takes_little_memory(claim: bytes):
    """The library takes memory for each array as its length says, before a single entry is there."""
    session = reach(SessionState.CONTROL)["server"]
    data = frame(FrameType.REQUEST, b"\x81\xa1x" + (claim * 200_000)[:1_000_000])
    tracemalloc.start()
    try:
        refused(session, data)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


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


# The specification


def rows(heading: str) -> list[list[str]]:
    part = re.split(rf"^#+ {re.escape(heading)}\b[^\n]*$", SPEC, maxsplit=1, flags=re.M)[1]
    part = re.split(r"^#+ ", part, maxsplit=1, flags=re.M)[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return found[2:]


def example(name: str) -> bytes:
    (body,) = re.findall(rf"^```frame name={name}\n(.*?)^```$", SPEC, re.M | re.S)
    data = b""
    for line in body.splitlines():
        offset, _, text = line.partition("#")[0].partition(":")
        assert int(offset, 16) == len(data), line
        data += bytes.fromhex(text)
    return data


def test_the_examples():
    hello = Hello(
        program="remus_ckpt 0.1.0",
        role="primary",
        name="orders",
        run=bytes(range(16)),
        memory_pages=32768,
        page_size=4096,
        codec="delta",
        word=8,
        compressions=("lz4",),
    )
    client, server = Session("client"), Session("server")
    server.lender = Heap()
    assert joined(client.send(hello)) == example("hello")
    assert push(server, example("hello")) == [hello]
    before, after = Position(6, b"\x11" * 32), Position(7, b"\x22" * 32)
    welcome = Welcome(program="b", term=1, position=before, stream=StreamShape("delta", 8, 32768), limits={}, lease_s=1)
    push(client, joined(server.send(welcome)))
    push(server, joined(client.send(Begin(mode="continue", term=1, position=before))))
    push(server, joined(client.send_data([bytes(70_000)])))
    commit = Commit(position=after, before=before, stream_bytes=70_000, pages=25)
    assert joined(client.send(commit)) == example("commit")
    assert push(server, example("commit")) == [commit]
    ack = Ack(level="durable", position=after)
    assert joined(server.send(ack)) == example("ack")
    assert push(client, example("ack")) == [ack]


def test_the_table_of_states():
    stated = {(row[0].strip("`"), row[1], row[2]): row[3].strip("`") for row in rows("4 States")}
    always = (FrameType.ERROR, FrameType.GOODBYE)
    assert stated == {
        (state.name, side, number.name): after.name
        for (state, side, number), after in TRANSITIONS.items()
        if number not in always
    }


@pytest.mark.parametrize("number", FrameType)
def test_the_tables_of_messages(number: FrameType):
    stated = [row[0].strip("`") for row in rows(f"3.{int(number)} {number.name}")]
    assert stated == ([] if number is FrameType.DATA else list(FIELDS[MESSAGES[number]]))


def test_the_tables_of_limits_flags_and_codes():
    stated = {row[0].strip("`"): int(row[1].replace(",", "")) for row in rows("2.4 Limits")}
    assert stated == {"control_bytes": CONTROL_BYTES, "request_bytes": REQUEST_BYTES, "data_bytes": DATA_BYTES}
    assert {row[1].strip("`"): int(row[0]) for row in rows("2.3 DATA frames")} == FLAGS
    assert [row[0].strip("`") for row in rows("7 Error codes")] == list(ErrorCode)
    assert sum(int(row[1]) for row in rows("2.1 Header")[:-1]) == HEADER_BYTES


def test_the_checksum_is_the_one_that_the_text_names():
    assert "e3069283" in SPEC
    assert frames.extend(frames.extend(0, b"1234"), memoryview(bytearray(b"56789"))) == 0xE3069283
