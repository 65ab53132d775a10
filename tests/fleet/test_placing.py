"""Which backup a name belongs on: the choice, the records, and what people see. No brokers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import Malformed
from remus_ckpt.fleet.placing import (
    GOOD,
    Backup,
    Go,
    Held,
    Nowhere,
    Place,
    Protected,
    TakenOver,
    aim,
    find,
    has,
    may_leave,
    pack,
    rows,
    unpack,
)

HELD = Held("standby", 3, 17, "protected", "protected: epoch 17", True, 1000.0)
PROMOTED = replace(HELD, role="promoted", state="taken over", is_used=False)


def backup(id: str, *, names: int = 0, most: int = 10, is_leaving: bool = False, **held: Held) -> Backup:
    kept = {f"other-{number}": HELD for number in range(names)} | held
    return Backup(id, f"host-{id}", (f"tls://{id}:7411",), "remus_ckpt 1", most, 1 << 30, is_leaving, kept)


def place(id: str, term: int = 3, *, taken: bool = False) -> Place:
    return Place("orders", id, f"tls://{id}:7411", term, is_taken_over=taken)


def primary(id: str, *, epoch: int = 17, why: str = "") -> Protected:
    return Protected("orders", "worker", id, 3, epoch, 1, 1000.0, why)


def aimed(where: Place | None, *backups: Backup, term: int | None = None, shunned: tuple[str, ...] = ()) -> Any:
    alive = {one.id: one for one in backups}
    return aim(where, alive, term=term, shunned=shunned, chance=random.Random(1))


# The choice

A, B, C = backup("a"), backup("b"), backup("c")


@pytest.mark.parametrize(
    ("where", "backups", "more", "expected"),
    [
        # nobody has it yet
        (None, [A], {}, Go("a")),
        (None, [], {}, Nowhere),
        (None, [backup("a", names=10)], {}, Nowhere),
        (None, [backup("a", is_leaving=True)], {}, Nowhere),
        (None, [A, B], {"shunned": ("a",)}, Go("b")),
        (None, [A], {"shunned": ("a",)}, Nowhere),
        # it stays where it is, however full that is
        (place("a"), [A, B], {}, Go("a")),
        (place("a"), [backup("a", names=10), B], {}, Go("a")),
        # until that is gone, is left, or does not keep it
        (place("a"), [B], {}, Go("b")),
        (place("a"), [backup("a", is_leaving=True), B], {}, Go("b")),
        (place("a"), [A, B], {"shunned": ("a",)}, Go("b")),
        # where no other takes it, the one that has it is still the best to try
        (place("a"), [], {}, Go("a")),
        (place("a"), [backup("b", names=10)], {}, Go("a")),
        (place("a"), [backup("a", is_leaving=True)], {}, Go("a")),
        (place("a"), [A, B], {"shunned": ("a", "b")}, Go("a")),
        # a takeover fences off whoever is of a lower term
        (place("a", 4, taken=True), [A, B], {}, TakenOver(4)),
        (place("a", 4, taken=True), [A, B], {"term": 3}, TakenOver(4)),
        (place("a", 4, taken=True), [], {"term": 3}, TakenOver(4)),
        # its survivor is protected elsewhere, or by the same store under a higher term
        (place("a", 4, taken=True), [A, B], {"term": 4}, Go("b")),
        (place("a", 4, taken=True), [A], {"term": 4}, Nowhere),
        (place("a", 4, taken=True), [A, B], {"term": 5}, Go("a")),
        (place("a", 4, taken=True), [B], {"term": 5}, Go("b")),
    ],
)
def test_where_a_primary_connects(
    where: Place | None, backups: list[Backup], more: dict[str, Any], expected: Any
) -> None:
    found = aimed(where, *backups, **more)
    assert isinstance(found, expected) if isinstance(expected, type) else found == expected


@given(st.integers(0, 1 << 32))
def test_primaries_that_choose_at_once_spread_over_the_room(seed: int) -> None:
    chance = random.Random(seed)
    backups = {"a": backup("a", most=100), "b": backup("b", most=100), "full": backup("full", names=100, most=100)}
    found = Counter(str(aim(None, backups, term=None, chance=chance)) for _ in range(400))
    assert set(found) == {str(Go("a")), str(Go("b"))}
    assert min(found.values()) > 100


@pytest.mark.parametrize(
    ("names", "copying", "least", "most"), [(1, 0, 1, 1), (8, 0, 8, 8), (100, 0, 2, 20), (100, 8, 0, 0)]
)
def test_a_few_leave_at_a_time(names: int, copying: int, least: int, most: int) -> None:
    left = backup("a", names=names, is_leaving=True)
    chance = random.Random(2)
    busy = {f"new-{number}": replace(HELD, state="copying") for number in range(copying)}
    for _ in range(20):
        leave = sum(may_leave("a", {"a": left, "b": backup("b", most=500, **busy)}, chance) for _ in range(names))
        assert least <= leave <= most
    assert not any(may_leave("a", {"a": left, "b": backup("b", names=10)}, chance) for _ in range(names))


@pytest.mark.parametrize(
    ("where", "id", "term", "expected"),
    [
        (place("a", 3), "a", 3, True),
        (place("a", 3), "b", 3, False),
        (place("a", 3), "b", 9, False),
        (place("a", 4, taken=True), "a", 3, True),  # the one that took over, before it has promoted
        (place("a", 4, taken=True), "b", 3, False),  # a copy from before the takeover
        (place("a", 4, taken=True), "b", 4, True),  # the survivor's
        (place("a", 4, taken=True), "b", 5, True),
    ],
)
def test_who_has_a_name(where: Place, id: str, term: int, expected: bool) -> None:
    assert has(where, id, term) is expected


# Records


@pytest.mark.parametrize(
    "record",
    [place("a", taken=True), primary("b"), backup("a", names=3, orders=HELD), HELD],
    ids=lambda one: type(one).__name__,
)
def test_records_are_read_back(record: Any) -> None:
    assert unpack(type(record), pack(record)) == record


def test_a_newer_member_may_say_more() -> None:
    more = msgpack.packb(msgpack.unpackb(pack(place("a"))) | {"since": 3})
    assert unpack(Place, more) == place("a")


@given(st.binary(max_size=64) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode))
def test_garbage_is_refused(data: bytes) -> None:
    for kind in (Place, Protected, Backup, Held):
        with pytest.raises(Malformed):
            unpack(kind, data)


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (place("a"), {"term": -2}),
        (place("a"), {"term": True}),
        (place("a"), {"term": 1 << 63}),
        (place("a"), {"name": "../etc"}),
        (place("a"), {"address": 7}),
        (place("a"), {"address": "x" * 5000}),
        (place("a"), {"is_taken_over": 1}),
        (A, {"addresses": []}),
        (A, {"addresses": ["x"] * 17}),
        (A, {"addresses": [7]}),
        (A, {"names": {"orders": 7}}),
        (A, {"names": {"a/b": msgpack.unpackb(pack(HELD))}}),
        (A, {"names": []}),
        (HELD, {"committed_at": float("nan")}),
        (HELD, {"committed_at": 1e13}),
    ],
)
def test_a_field_that_cannot_be_meant_is_refused(record: Any, change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        unpack(type(record), msgpack.packb(msgpack.unpackb(pack(record)) | change))


def test_a_record_that_is_too_long_is_not_read() -> None:
    with pytest.raises(Malformed, match="at most"):
        unpack(Place, pack(replace(place("a"), run="x" * (1 << 20))))


# What people see


def row(where: Place | None, *backups: Backup, lease: Protected | None = None) -> Any:
    found = rows(
        {} if where is None else {"orders": where},
        {one.id: one for one in backups},
        {} if lease is None else {"orders": lease},
        now=1002.5,
    )
    (one,) = [one for one in found if one.name == "orders"]
    return one


def test_a_row_says_what_counts() -> None:
    found = row(place("a"), backup("a", orders=HELD), lease=primary("a"))
    assert (found.state, found.backup, found.epoch, found.lag, found.term, found.age_s) == (
        "protected", "host-a (a)", 17, 1, 3, 2.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "backups", "lease", "state"),
    [
        (place("a"), [backup("a", orders=HELD)], primary("a"), "protected"),
        (place("a"), [backup("a", orders=HELD)], None, "protected"),  # its lease may be late
        (None, [backup("a", orders=HELD)], None, "protected"),  # protected by address
        (place("a"), [backup("a", orders=HELD), B], primary("b"), "moving"),
        (place("a"), [B], primary("b"), "copying"),
        (None, [B], primary("b"), "copying"),
        (place("a"), [B], primary("", why="no backup"), "unprotected"),
        (place("a"), [A], primary("a"), "unprotected"),  # the store was lost
        (place("a"), [], None, "unprotected"),
        (None, [A], primary("", why="no room"), "unprotected"),
        (place("a", taken=True), [backup("a", orders=PROMOTED)], None, "taken over"),
        (place("a", taken=True), [backup("a", orders=PROMOTED), B], primary("b"), "copying"),
        # its survivor, protected by address
        (place("a", taken=True), [backup("a", orders=PROMOTED), backup("b", orders=HELD)], None, "protected"),
        (place("a", 4, taken=True), [backup("a", orders=PROMOTED), backup("b", orders=HELD)], None, "taken over"),
        (place("a", 2, taken=True), [backup("a", orders=HELD)], None, "protected"),
        (place("a"), [backup("a", orders=replace(HELD, state="ended"))], None, "ended"),
        (place("a"), [backup("a", orders=replace(HELD, state="copying"))], primary("a"), "copying"),
        (place("a"), [backup("a", orders=replace(HELD, state="disconnected"))], None, "lost"),
        (place("a"), [backup("a", orders=replace(HELD, state="disconnected"))], primary(""), "unprotected"),
        (place("a"), [backup("a", orders=replace(HELD, state="unprotected"))], None, "lost"),
        (place("a"), [backup("a", orders=replace(HELD, state="store full"))], primary("a"), "unprotected"),
    ],
)
def test_the_state_of_a_name(where: Place | None, backups: list[Backup], lease: Protected | None, state: str) -> None:
    found = row(where, *backups, lease=lease)
    assert found.state == state
    assert found.words
    assert (state in GOOD) == (state in ("protected", "moving", "ended"))


def test_backups_are_found_by_what_they_are_called() -> None:
    alive = {"a": A, "b": replace(B, host="host-a"), "c": C}
    assert find("a", alive) == ["a"]
    assert find("host-a", alive) == ["a", "b"]
    assert find("host-a/b", alive) == ["b"]
    assert find("tls://c:7411", alive) == ["c"]
    assert find("host-c/a", alive) == find("x", alive) == []
