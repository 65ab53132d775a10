"""Of a primary that counts on another backup and a holder that takes over, one is first: in every interleaving."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remus_ckpt.errors import Fenced, LinkError, LogError, Malformed, Overtaken, RemusError
from remus_ckpt.fleet import member
from remus_ckpt.fleet.member import Member
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.fleet.placing import Backup, Place
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.stream import Stream
from remus_ckpt.service.turns import Bell
from remus_ckpt.session.messages import Ack
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.wire.record import Position

NAME = "orders"
TERM = 3


class Brokers:
    """The fleet in one process. Before each request it lets `between` act: so others come in between.

    answers: of the puts, in order; "lost": written, but not answered; "never": not written, and not answered
    """

    def __init__(self, place: Place | None, alive: list[Backup], answers: tuple[str, ...] = ()) -> None:
        self.now, self.revision = place, 0 if place is None else 5
        self.alive = {one.id: one for one in alive}
        self.between: Callable[[int], None] = lambda number: None
        self.answers = iter(answers)
        self.requests = 0

    def _ask(self) -> None:
        self.requests += 1
        self.between(self.requests)

    def place(self, name: str) -> tuple[Place | None, int]:
        self._ask()
        return self.now, self.revision

    def backup(self, id: str) -> Backup | None:
        self._ask()
        return self.alive.get(id)

    def backups(self) -> dict[str, Backup]:
        self._ask()
        return self.alive

    def put(self, place: Place, revision: int) -> int:
        self._ask()
        answer = next(self.answers, "answered")
        if answer == "never":
            raise LogError("nobody answers")
        if revision != self.revision:
            raise Overtaken("another has been first")
        self.now, self.revision = place, revision + 1
        if answer == "lost":
            raise LogError("nobody answers")
        return self.revision

    def announce(self, record: Any) -> None:
        raise LogError("leases are not of this test")

    withdraw = announce

    def close(self) -> None:
        pass


def backup(id: str, *, is_leaving: bool = False) -> Backup:
    return Backup(id, id, (f"tcp://{id}:1",), "remus_ckpt", 9, 1, is_leaving)


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Member]:
    monkeypatch.setattr(member, "PAUSE_S", 0.0)
    monkeypatch.setattr(member, "CLAIM_S", 0.05)

    def make(fleet: Any) -> Member:
        found = Member(fleet, tmp_path, 9, status=dict, let_go=lambda name: True, take_over=lambda name: None)
        found.addresses = ("tcp://old:1",)  # as `start` does, without its thread
        return found

    (tmp_path / ".member").write_text("old00000\n")
    return make


def primary(fleet: Any) -> Placed:
    return Placed(fleet, NAME, lambda address, timeout_s: object())  # type: ignore[arg-type,return-value]


OLD, NEW = "old00000", "new00000"
ANSWERS = ("answered", "lost", "never")


@pytest.mark.parametrize("answers", list(itertools.product(ANSWERS, repeat=3)), ids="-".join)
@pytest.mark.parametrize("at", range(1, 9))
def test_a_takeover_anywhere_in_a_move(holder: Callable[[Any], Member], at: int, answers: tuple[str, ...]) -> None:
    fleet = Brokers(Place(NAME, OLD, "tcp://old:1", TERM), [backup(OLD, is_leaving=True), backup(NEW)], answers)
    old, placed = holder(fleet), primary(fleet)
    is_promoted = False

    def take_over(number: int) -> None:
        nonlocal is_promoted
        if number == at:
            fleet.between = lambda number: None
            try:
                old.claim(NAME, TERM + 1)
                is_promoted = True
            except RemusError:
                pass

    fleet.between = take_over
    is_released = is_fenced = False
    for _ in range(3):  # the link is lost, and the primary connects again
        try:
            placed.connect(1.0, TERM)
            placed.confirm(TERM)
            is_released = True
            break
        except Fenced:
            is_fenced = True
            break
        except LinkError:
            continue
    if not is_promoted:
        take_over(at)  # later than everything
    assert not (is_promoted and is_released)
    found = fleet.now
    assert found is not None
    if is_released:
        assert (found.backup, found.is_taken_over) == (NEW, False)
    if is_promoted:
        assert (found.backup, found.is_taken_over, found.term) == (OLD, True, TERM + 1)
    if is_fenced:  # what a claim without an answer has written stands, and the holder carries it out
        assert found.is_taken_over


@pytest.mark.parametrize("answers", list(itertools.product(ANSWERS, repeat=2)), ids="-".join)
@pytest.mark.parametrize("at", range(1, 5))
def test_a_move_anywhere_in_a_takeover(holder: Callable[[Any], Member], at: int, answers: tuple[str, ...]) -> None:
    fleet = Brokers(Place(NAME, OLD, "tcp://old:1", TERM), [backup(OLD, is_leaving=True), backup(NEW)], answers)
    old, placed = holder(fleet), primary(fleet)
    placed.connect(1.0, TERM)
    is_released = False

    def move(number: int) -> None:
        nonlocal is_released
        if number == at:
            fleet.between = lambda number: None
            try:
                placed.confirm(TERM)
                is_released = True
            except RemusError:
                pass

    fleet.requests = 0
    fleet.between = move
    try:
        old.claim(NAME, TERM + 1)
        is_promoted = True
    except RemusError:
        is_promoted = False
    assert not (is_promoted and is_released)


def test_without_the_condition_both_would_act(holder: Callable[[Any], Member], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: these tests can fail."""

    def put(self: Brokers, place: Place, revision: int) -> int:
        self._ask()
        self.now, self.revision = place, self.revision + 1
        return self.revision

    monkeypatch.setattr(Brokers, "put", put)
    with pytest.raises(AssertionError):
        for at in range(1, 9):
            test_a_takeover_anywhere_in_a_move(holder, at, ())


def test_a_backup_that_is_left_does_not_speak_for_the_other() -> None:
    """Its word that a checkpoint is applied may come when the other link is there, and nothing is over it yet."""
    fleet = Brokers(Place(NAME, OLD, "tcp://old:1", TERM), [backup(OLD, is_leaving=True), backup(NEW)])
    placed = primary(fleet)
    placed.connect(1.0, TERM)
    assert placed.target == NEW
    source = OwnMemory({"array": np.zeros(8)})
    stream = Stream(
        NAME, source, placed, codec="delta", word=8, digest="sha256", window=2, wait="durable", term=TERM,
        commit_log=None, on_commit=None, most_unreleased=1, on_ended=lambda: None, realtime=None, bell=Bell(),
        left_s=lambda seconds: seconds, metrics=Metrics(),
    )  # fmt: skip
    try:
        stream.acknowledge(Ack(level="applied", position=Position(3, bytes(32))), at=OLD)
        assert fleet.now is not None and fleet.now.backup == OLD
        with pytest.raises(Malformed):  # nothing was sent
            stream.acknowledge(Ack(level="durable", position=Position(3, bytes(32))), at=NEW)
        assert fleet.now.backup == OLD
    finally:
        placed.close()
        source.close()


def test_two_primaries_cannot_both_be_placed() -> None:
    fleet = Brokers(None, [backup(OLD), backup(NEW)])
    one, other = primary(fleet), primary(fleet)
    one.connect(1.0, None)
    other.connect(1.0, None)
    one.confirm(0)
    with pytest.raises(LinkError):
        other.confirm(0)
    other.connect(1.0, None)
    assert other.is_certain  # it goes where the first one is, and is turned away there as anywhere
