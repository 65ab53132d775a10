"""The session: the one table in both directions, how it begins and ends, what is refused, and the examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
from sessions import (
    BEGIN,
    COMMIT,
    CONTROL,
    FIRST,
    HELLO,
    PATHS,
    SAMPLES,
    SECOND,
    WELCOME,
    Heap,
    frame,
    joined,
    packed,
    push,
    reach,
    refused,
)

from remus_ckpt import Position
from remus_ckpt.errors import LinkError, UnknownFormat
from remus_ckpt.session import frames
from remus_ckpt.session.frames import (
    CONTROL_BYTES,
    DATA_BYTES,
    FLAGS,
    HEADER_BYTES,
    MESSAGES,
    PREFACE,
    REQUEST_BYTES,
    FrameType,
    negotiate,
)
from remus_ckpt.session.incoming import DataReceived
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import (
    FIELDS,
    Ack,
    Begin,
    Commit,
    Error,
    ErrorCode,
    Goodbye,
    Hello,
    StreamShape,
    Welcome,
)
from remus_ckpt.session.rules import TRANSITIONS, Direction, SessionState

SPEC = (Path(__file__).resolve().parents[2] / "specs" / "session.md").read_text()


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
        digests=("blake3", "sha256"),
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
    assert joined(server.send(ack)) == example("ack") == joined(server.outgoing.send_durable(after))
    with pytest.raises(ValueError):
        server.outgoing.send_durable(Position(8, b"\x22" * 32))
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
