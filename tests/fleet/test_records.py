"""Records of the commit log, from whoever wrote them, and who may write the next one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import Malformed
from remus_ckpt.fleet.decisions import Ended, Follow, Last, Mine, No, commit, take_over
from remus_ckpt.fleet.engine import MAX_RECORD_BYTES
from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.wire.record import Position

US, THEM = b"u" * 16, b"t" * 16
AT, LATER = Position(7, bytes(32)), Position(8, b"1" * 32)
COMMIT = Record(Kind.COMMIT, 3, US, AT, "tls://backup:7411", 1.5)
TAKEOVER = Record(Kind.TAKEOVER, 3, US, AT)


@pytest.mark.parametrize("record", [COMMIT, TAKEOVER, replace(COMMIT, where="ü" * 256, term=(1 << 63) - 1)])
def test_a_record_comes_back(record: Record) -> None:
    assert Record.unpack(record.pack()) == record


def test_a_long_place_is_cut() -> None:
    assert Record.unpack(replace(COMMIT, where="x" * 1000).pack()).where == "x" * 256


FIELDS: dict[str, Any] = msgpack.unpackb(COMMIT.pack())


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": None},
        {"kind": "lease"},
        {"kind": 1},
        {"term": -1},
        {"term": 1 << 63},
        {"term": True},
        {"epoch": 1.0},
        {"epoch": -1},
        {"digest": b"short"},
        {"digest": "x" * 32},
        {"writer": b""},
        {"where": "x" * 257},
        {"where": b"x"},
        {"time": "now"},
    ],
    ids=str,
)
def test_what_breaks_a_rule_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as caught:
        Record.unpack(msgpack.packb(FIELDS | changes))
    assert caught.value.section == "fleet.md §3"


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\xc0", COMMIT.pack()[:-1], bytes(MAX_RECORD_BYTES + 1)])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        Record.unpack(data)


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        Record.unpack(data)


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        (Last(), Follow(3)),
        (Last(5, COMMIT), Follow(3)),
        (Last(5, replace(COMMIT, writer=THEM, term=2)), Follow(3)),
        (Last(5, replace(TAKEOVER, writer=THEM, term=2)), Follow(3)),
        # the one that it survived, and another
        (Last(4, replace(TAKEOVER, writer=THEM)), Follow(3)),
        (Last(5, replace(TAKEOVER, writer=THEM)), Ended(3)),
        (Last(5, replace(TAKEOVER, writer=THEM, term=4)), Ended(4)),
        (Last(5, replace(COMMIT, writer=THEM, term=4)), Ended(4)),
        # another run of this term: the one that began later goes on
        (Last(4, replace(COMMIT, writer=THEM)), Follow(3)),
        (Last(5, replace(COMMIT, writer=THEM)), Ended(3)),
    ],
)
def test_who_may_commit(last: Last, answer: Follow | Ended) -> None:
    assert commit(last, term=3, run=US, since=4) == answer


@pytest.mark.parametrize(
    ("record", "held", "answer"),
    [
        (None, (), Follow(4)),
        (COMMIT, (AT, LATER), Follow(4)),
        (replace(COMMIT, term=2), (AT, LATER), Follow(4)),
        (COMMIT, (LATER,), No),
        (replace(COMMIT, term=2), (LATER,), No),
        (replace(COMMIT, term=4), (AT, LATER), No),
        (replace(TAKEOVER, term=4), (), Mine(4)),
        (TAKEOVER, (AT, LATER), Follow(4)),
        (TAKEOVER, (LATER,), No),
        (replace(TAKEOVER, writer=THEM), (AT, LATER), No),
        (replace(TAKEOVER, writer=THEM, term=2), (AT, LATER), No),
    ],
)
def test_who_may_take_over(record: Record | None, held: tuple[Position, ...], answer: object) -> None:
    last = Last() if record is None else Last(5, record)
    found = take_over(last, term=3, store=US, newest=LATER, holds=lambda at: at in held)
    assert found == answer if not isinstance(answer, type) else isinstance(found, answer)
