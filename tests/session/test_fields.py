"""Fields, headers and lengths of messages: what is refused, and what that costs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from sessions import SAMPLES, fields_of, frame, joined, push, reach, receiver_of, refused

from remus_ckpt.errors import LimitExceeded
from remus_ckpt.limits import MIB
from remus_ckpt.session.frames import (
    CONTROL_BYTES,
    DATA_BYTES,
    MESSAGES,
    REQUEST_BYTES,
    FrameType,
)
from remus_ckpt.session.incoming import DataReceived
from remus_ckpt.session.messages import (
    FIELDS,
    Error,
    Request,
    check_name,
)
from remus_ckpt.session.rules import SessionState

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
