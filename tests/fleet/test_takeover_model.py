"""All that can happen to one primary, two backups and the commit log, in every order: a small model checker.

The decisions are those that run in production (`failover.decide`, `failover.admit`, `decisions.commit`,
`decisions.take_over`); the model has what lies between them: who is linked to whom, what each side has read, appends
that are answered, lost, or arrive late, reads that are old, and crashes at any instant. No clock decides: a lease may
end at any moment.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from remus_ckpt.fleet import decisions
from remus_ckpt.fleet.decisions import Ended, Follow, Last, Mine, No
from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.service import failover
from remus_ckpt.service.failover import Accepted, Claim, Promote, Role, Situation
from remus_ckpt.wire.record import Position

RUN = bytes(16)


@dataclass(frozen=True)
class Bounds:
    """How far the model goes.

    epochs: how many checkpoints the primary takes
    moves: how often it says hello, to either backup
    crashes: how often each backup is killed and started again
    appends: how many each side tries
    """

    epochs: int = 2
    moves: int = 2
    crashes: int = 0
    appends: int = 2


NEVER = -1


@functools.cache
def position(epoch: int, chain: tuple[int, ...]) -> Position:
    """A checkpoint's position: the digest says what it was built on."""
    return Position(epoch, hashlib.sha256(repr((epoch, chain)).encode()).digest())


@dataclass(frozen=True)
class Standby:
    """A backup: the first four are on its disk."""

    history: tuple[Position, ...] = ()
    chain: tuple[int, ...] = ()
    term: int = 0
    role: Role = Role.STANDBY
    is_logged: bool = False
    expects: bool = False
    claimed: int | None = None
    doubt: bool = False
    waits: bool = False
    crashes: int = 0
    appends: int = 0


@dataclass(frozen=True)
class Flight:
    """An append on its way; it may arrive after its writer has given it up.

    writer: 0 and 1 are the backups, 2 is the primary
    """

    writer: int
    expected: int
    record: Record


@dataclass(frozen=True)
class World:
    log: tuple[Record, ...] = ()
    flights: frozenset[Flight] = frozenset()
    backups: tuple[Standby, Standby] = (Standby(), Standby())
    # The primary:
    is_up: bool = True
    link: int = NEVER
    epoch: int = -1
    chain: tuple[int, ...] = ()
    acked: Position | None = None
    known: int = 0
    waits: bool = False
    released: Position | None = None
    moves: int = 0
    appends: int = 0

    def with_backup(self, number: int, **changes: object) -> World:
        pair = list(self.backups)
        pair[number] = replace(pair[number], **changes)  # type: ignore[arg-type]
        return replace(self, backups=(pair[0], pair[1]))


@dataclass
class Rules:
    """The decisions, and whether the log is used: the controls change one."""

    commit: Callable[..., Follow | Ended] = decisions.commit
    take_over: Callable[..., Follow | Mine | No] = decisions.take_over
    has_log: bool = True
    bounds: Bounds = field(default_factory=Bounds)


def last(world: World, sequence: int) -> Last:
    return Last(sequence, world.log[sequence - 1]) if sequence else Last()


def reads(world: World) -> set[int]:
    """What a read of the last record may find: a server that lags behind finds an older one."""
    return {len(world.log), max(len(world.log) - 1, 0)}


def steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Everything that can happen next."""
    if world.is_up:
        yield from primary_steps(world, rules)
    for number in (0, 1):
        yield from backup_steps(world, number, rules)
    for flight in world.flights:
        yield from flight_steps(world, flight)


def primary_steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    for number in (0, 1):
        if world.moves < rules.bounds.moves:
            yield from hello(world, number, rules)
    if world.link == NEVER:
        return
    if world.epoch + 1 < rules.bounds.epochs:
        # A checkpoint is stored; its acknowledgement arrives, or the link breaks before.
        at = position(world.epoch + 1, world.chain)
        backup = world.backups[world.link]
        stored = world.with_backup(world.link, history=(*backup.history, at), chain=world.chain)
        taken = replace(stored, epoch=at.epoch)
        yield f"stored {at.epoch}", replace(taken, acked=at)
        yield f"stored {at.epoch}, answer lost", replace(taken, link=NEVER)
    if world.acked is not None and (world.released is None or world.released.epoch < world.acked.epoch):
        if not rules.has_log:
            yield "released", replace(world, released=world.acked)
        elif not world.waits and world.appends < rules.bounds.appends:
            match rules.commit(last(world, world.known), term=0, run=RUN, since=0):
                case Ended():
                    yield "fenced by the log", replace(world, is_up=False, link=NEVER)
                case Follow():
                    record = Record(Kind.COMMIT, 0, RUN, world.acked)
                    flights = world.flights | {Flight(2, world.known, record)}
                    yield "append", replace(world, flights=flights, waits=True, appends=world.appends + 1)


def hello(world: World, number: int, rules: Rules) -> Iterator[tuple[str, World]]:
    """The primary's link breaks, and it says hello to a backup: with a full copy where it cannot go on."""
    backup = world.backups[number]
    moved = replace(world, moves=world.moves + 1, link=NEVER)
    if world.link != NEVER and rules.has_log:  # the end of a session: the log may have been why
        moved = moved.with_backup(world.link, doubt=True)
        backup = moved.backups[number]
    if backup.claimed is not None or backup.waits or backup.doubt:
        return
    match failover.admit(backup.term, backup.role, 0, False):
        case Accepted(term):
            chain = (*world.chain, number) if backup.chain != world.chain or not backup.history else world.chain
            seated = moved.with_backup(number, term=term, is_logged=rules.has_log, expects=True)
            yield f"hello to {number}", replace(seated, link=number, chain=chain)
        case _:
            yield f"fenced by {number}", replace(moved, is_up=False)


def situation(backup: Standby, rules: Rules) -> Situation:
    return Situation(
        term=backup.term,
        role=backup.role,
        has_checkpoint=bool(backup.history),
        expects_primary=backup.expects,
        takeover_done=False,
        listening_since=0.0,
        lease_s=1.0,
        automatic=True,
        # Without a log, a fence has "succeeded" that stops nobody: what an operator's wrong word would be.
        fence=None if rules.has_log else failover.Command.begun(1, 2.0).ended(True, 3.0),
        claimed=backup.claimed,
        has_log=rules.has_log,
        is_logged=backup.is_logged,
    )


def backup_steps(world: World, number: int, rules: Rules) -> Iterator[tuple[str, World]]:
    backup = world.backups[number]
    if backup.crashes < rules.bounds.crashes:
        down = replace(world, link=NEVER if world.link == number else world.link)
        yield (
            f"{number} crashes",
            down.with_backup(number, claimed=None, waits=False, doubt=rules.has_log, crashes=backup.crashes + 1),
        )
    if backup.waits or backup.role is Role.PROMOTED:
        return
    if backup.doubt:
        for sequence in reads(world):
            record = last(world, sequence).record
            is_mine = record is not None and record.kind is Kind.TAKEOVER and record.writer == store_of(number)
            claimed = record.term if is_mine and record is not None and record.term > backup.term else None
            yield f"{number} looks at {sequence}", world.with_backup(number, doubt=False, claimed=claimed)
        return
    for action in failover.decide(situation(backup, rules), 4.0):  # the lease is over, whoever is alive
        ended = replace(world, link=NEVER if world.link == number else world.link)
        match action:
            case Promote(term):
                changes = {"role": Role.PROMOTED, "term": term, "claimed": None}
                yield f"{number} is promoted", ended.with_backup(number, **changes)
            case Claim(term) if backup.appends < rules.bounds.appends:
                for sequence in reads(world):
                    yield from claim(ended, number, term, sequence, rules)


def store_of(number: int) -> bytes:
    return bytes([number + 1]) * 16


def claim(world: World, number: int, term: int, sequence: int, rules: Rules) -> Iterator[tuple[str, World]]:
    backup = world.backups[number]
    newest = backup.history[-1]
    found = rules.take_over(
        last(world, sequence),
        term=term - 1,
        store=store_of(number),
        newest=newest,
        holds=lambda at: at in built_on(backup, newest),
    )
    match found:
        case Mine(mine):
            yield f"{number} finds its claim", world.with_backup(number, claimed=mine)
        case Follow(new):
            record = Record(Kind.TAKEOVER, new, store_of(number), newest)
            flight = Flight(number, sequence, record)
            tried = world.with_backup(number, waits=True, appends=backup.appends + 1)
            yield f"{number} claims", replace(tried, flights=world.flights | {flight})


def built_on(backup: Standby, newest: Position) -> tuple[Position, ...]:
    """The checkpoints that one is, and was built on: a store keeps them in order."""
    return backup.history[: backup.history.index(newest) + 1]


def flight_steps(world: World, flight: Flight) -> Iterator[tuple[str, World]]:
    gone = replace(world, flights=world.flights - {flight})
    yield "append lost", gone
    is_in = flight.expected == len(world.log)
    landed = replace(gone, log=(*gone.log, flight.record)) if is_in else gone
    if is_in:
        yield "append lands, answer lost", landed
    if flight.writer == 2:
        if not (world.is_up and world.waits):
            return
        if is_in:
            at = flight.record.position
            answered = replace(landed, waits=False, known=len(landed.log))
            yield f"released {at.epoch}", replace(answered, released=newer(world.released, at))
        else:
            yield "overtaken", after_reading(replace(landed, waits=False))
    elif world.backups[flight.writer].waits:
        if is_in:
            changes = {"waits": False, "claimed": flight.record.term, "doubt": False}
            yield f"{flight.writer} has claimed", landed.with_backup(flight.writer, **changes)
        else:
            yield f"{flight.writer} is overtaken", landed.with_backup(flight.writer, waits=False)


def after_reading(world: World) -> World:
    """The primary reads again: a record of its own, whose answer was lost, counts as answered."""
    known = len(world.log)
    record = last(world, known).record
    if record is not None and record.writer == RUN:
        return replace(world, known=known, released=newer(world.released, record.position))
    return replace(world, known=known)


def timeouts(world: World) -> Iterator[tuple[str, World]]:
    """Whoever waits gives up, without knowing what became of the append."""
    if world.waits:
        yield "the primary gets no answer", after_giving_up(world)
    for number, backup in enumerate(world.backups):
        if backup.waits:
            yield f"{number} gets no answer", world.with_backup(number, waits=False, doubt=True)


def after_giving_up(world: World) -> World:
    return replace(world, waits=False)


def newer(one: Position | None, other: Position) -> Position:
    return other if one is None or other.epoch > one.epoch else one


def fault(world: World) -> str | None:
    """What must never be."""
    promoted = [backup for backup in world.backups if backup.role is Role.PROMOTED]
    if len(promoted) > 1:
        return "two backups go on"
    # An epoch has its number once, so a later one holds all that was done up to it, in whatever copy.
    if promoted and world.released is not None and world.released.epoch > promoted[0].history[-1].epoch:
        return f"epoch {world.released.epoch} was released, and the survivor does not have it"
    return None


@dataclass
class Walk:
    """What a walk through all worlds has found."""

    worlds: int = 0
    promotions: int = 0
    releases: int = 0
    late: int = 0
    fault: str | None = None
    way: list[str] = field(default_factory=list)


def walk(rules: Rules, most: int = 3_000_000) -> Walk:
    first = World()
    came: dict[World, tuple[World, str] | None] = {first: None}
    waiting = deque([first])
    found = Walk()
    while waiting:
        world = waiting.popleft()
        found.worlds += 1
        has_survivor = any(backup.role is Role.PROMOTED for backup in world.backups)
        found.promotions += has_survivor
        found.releases += world.released is not None
        found.late += has_survivor and world.is_up and world.waits
        if (text := fault(world)) is not None:
            found.fault = text
            at: World | None = world
            while at is not None and (step := came[at]) is not None:
                at = step[0]
                found.way.insert(0, step[1])
            return found
        assert found.worlds < most, "the model has grown too large to be checked whole"
        for name, other in (*steps(world, rules), *timeouts(world)):
            if other not in came:
                came[other] = (world, name)
                waiting.append(other)
    return found


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(crashes=1, appends=1),
        pytest.param(Bounds(appends=2), marks=pytest.mark.slow),
        pytest.param(Bounds(epochs=3, crashes=1, appends=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_order_of_events_breaks_the_promise(bounds: Bounds) -> None:
    found = walk(Rules(bounds=bounds))
    assert found.fault is None, found.way
    assert found.promotions and found.releases and found.late


def blind_take_over(last: Last, **rest: object) -> Follow | Mine | No:
    """A takeover that does not ask whether the last commit is held here."""
    return decisions.take_over(last, **{**rest, "holds": lambda _: True})  # type: ignore[arg-type]


def second_take_over(last: Last, **rest: object) -> Follow | Mine | No:
    """A takeover that does not mind one that has come before."""
    found = decisions.take_over(last, **rest)  # type: ignore[arg-type]
    is_second = isinstance(found, No) and last.record is not None and last.record.kind is Kind.TAKEOVER
    return Follow(last.record.term + 1) if is_second and last.record is not None else found


def deaf_commit(last: Last, **rest: object) -> Follow | Ended:
    """A primary that goes on after a takeover."""
    return Follow(0)


@pytest.mark.parametrize(
    "rules",
    [
        Rules(has_log=False),
        Rules(take_over=blind_take_over),
        Rules(take_over=second_take_over),
        Rules(commit=deaf_commit),
    ],
    ids=["without the log", "what is held is not asked", "a second takeover", "a primary that goes on"],
)
def test_each_rule_is_needed(rules: Rules) -> None:
    found = walk(rules)
    assert found.fault is not None
    assert found.way
