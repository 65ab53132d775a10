"""Which backup a name belongs on: what members say of themselves, what is written down of a name, and the choice.

Pure: no I/O, no clock (specs/fleet.md §6). What comes from the brokers is checked here as what comes from a peer.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

import msgpack

from remus_ckpt.errors import Malformed
from remus_ckpt.session.messages import check_name

LEASE_S = 15.0
"""How long what a member says of itself counts. Nothing is safe because of it: it only says whom to ask."""
RENEW_S = LEASE_S / 5
MOST_MOVING = 8
"""Names that go elsewhere at a time when their backup is to be left."""
_MOST_BYTES = 1 << 20
"""Of one record."""
_MOST_CHARS = 4_096
_MOST_NAMES = 5_000
_MOST = (1 << 63) - 1

_R = TypeVar("_R", "Held", "Backup", "Place", "Protected")


@dataclass(frozen=True, slots=True)
class Held:
    """What a backup says of one name that it keeps.

    state, words: its health there (`service/health.py`)
    is_used: a primary is connected
    committed_at: Unix time of the newest commit since the backup started; 0: none
    """

    role: str
    term: int
    epoch: int
    state: str
    words: str
    is_used: bool
    committed_at: float


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup, as it announces itself.

    id: of its store, and unique: it stays the same when the backup is started again, or listens elsewhere
    addresses: where primaries reach it, the first that answers counts
    max_names: how many names it takes, kept ones included
    free_bytes: on the disk of its store
    is_leaving: it is being drained: it keeps its names until others have them, and takes no new one
    """

    id: str
    host: str
    addresses: tuple[str, ...]
    program: str
    max_names: int
    free_bytes: int
    is_leaving: bool
    names: Mapping[str, Held] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many more names it takes."""
        return 0 if self.is_leaving else max(self.max_names - len(self.names), 0)


@dataclass(frozen=True, slots=True)
class Protected:
    """What a primary says of itself, for people.

    backup: the id of the one that it is linked to; empty: none
    epoch: the newest committed; −1: none
    lag: checkpoints on their way
    why: why nothing protects it, if so
    """

    name: str
    host: str
    backup: str
    term: int
    epoch: int
    lag: int
    committed_at: float
    why: str


@dataclass(frozen=True, slots=True)
class Place:
    """Who has a name: the record on which all decisions about it rest, replaced only by whoever read the one before.

    backup: the id of the one that holds the name's newest committed checkpoint
    address: where that was reached last
    term: in force
    is_taken_over: it has taken the name over under this term: primaries of lower terms are fenced off
    run: 16 bytes in hex, of the primary that wrote this; empty: the backup did
    """

    name: str
    backup: str
    address: str
    term: int
    is_taken_over: bool = False
    run: str = ""


def pack(record: Held | Backup | Place | Protected) -> bytes:
    """A record as bytes."""
    packed: bytes = msgpack.packb(asdict(record))
    return packed


def unpack(kind: type[_R], data: bytes) -> _R:
    """A record from bytes. Keys that are not known here are ignored. Raises Malformed."""
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"{len(data)} bytes, at most {_MOST_BYTES}")
        return _from(kind, msgpack.unpackb(data, strict_map_key=True, max_map_len=_MOST_NAMES))
    except Exception as error:  # msgpack's errors share no base but this
        text = f"no {kind.__name__.lower()}: {str(error)[:200] or type(error).__name__}"
        raise Malformed(text, section="fleet.md §6") from None


def _from(kind: type[_R], found: Any) -> _R:
    if not isinstance(found, dict):
        raise ValueError("no map")
    values: dict[str, Any] = {}
    for one in fields(kind):
        value = found.get(one.name)
        match str(one.type):
            case "str":
                good = isinstance(value, str) and len(value) <= _MOST_CHARS
            case "bool":
                good = isinstance(value, bool)
            case "int":
                good = type(value) is int and -1 <= value <= _MOST
            case "float":
                good = isinstance(value, float) and 0 <= value < 1e12
            case "tuple[str, ...]":
                good = isinstance(value, list) and 0 < len(value) <= 16 and all(isinstance(one, str) for one in value)
                value = tuple(value or ())
            case _:
                if good := isinstance(value, dict):
                    value = {check_name(name): _from(Held, held) for name, held in value.items()}
        if not good:
            raise ValueError(f"{one.name} is {value!r:.60}")
        values[one.name] = value
    if "name" in values:
        check_name(values["name"])
    return kind(**values)


def has(place: Place, backup: str, term: int) -> bool:
    """Whether a backup whose store is of this term has the name, and may take it over.

    It is the one in the place; or the name was taken over, and the backup has its survivor: only a primary that was
    given the term of a takeover lets a store have it. A survivor that was protected by address wrote no place.
    """
    return place.backup == backup or (place.is_taken_over and term >= place.term)


# The choice


@dataclass(frozen=True, slots=True)
class Go:
    """Connect to this backup. It has the name already, or gets it with the first checkpoint that it commits."""

    backup: str


@dataclass(frozen=True, slots=True)
class TakenOver:
    """The backup has taken the name over under this term: this side must stop."""

    term: int


@dataclass(frozen=True, slots=True)
class Nowhere:
    """There is no backup to connect to, and why."""

    why: str


def aim(
    place: Place | None,
    backups: Mapping[str, Backup],
    *,
    term: int | None,
    shunned: Collection[str] = (),
    chance: random.Random,
) -> Go | TakenOver | Nowhere:
    """Where a primary should connect to.

    backups: those that are alive, by id
    term: the primary's; None: it has never been told one
    shunned: ids of backups that have lately refused this name, or did not answer
    chance: so that many primaries that choose at once do not all choose the same one

    A name stays where it is as long as that backup is alive and keeps it: anywhere else, all of it is copied anew.
    """
    others = {key: one for key, one in backups.items() if one.room and key not in shunned}
    if place is None:
        return _choose(others, backups, shunned, chance)
    if place.is_taken_over:
        if term is None or term < place.term:
            return TakenOver(place.term)
        if term == place.term:  # the survivor's: the store that it came from would fence it off
            others.pop(place.backup, None)
            return _choose(others, backups, {*shunned, place.backup}, chance)
    holder = backups.get(place.backup)
    if holder is not None and not holder.is_leaving and place.backup not in shunned:
        return Go(place.backup)
    others.pop(place.backup, None)
    found = _choose(others, backups, shunned, chance)
    # Where nobody else takes it, the one that has it is still the best to try.
    return found if isinstance(found, Go) else Go(place.backup)


def _choose(
    others: Mapping[str, Backup], backups: Mapping[str, Backup], shunned: Collection[str], chance: random.Random
) -> Go | Nowhere:
    if not others:
        if not backups:
            return Nowhere("no backup of the fleet is alive")
        full = sum(not one.room for one in backups.values())
        return Nowhere(
            f"no backup of the fleet takes another name: of {len(backups)} alive, {full} are full or leaving, and "
            f"{len(set(shunned) & set(backups))} have refused it"
        )
    ids = sorted(others)
    return Go(chance.choices(ids, [others[key].room for key in ids])[0])


def may_leave(holder: str, backups: Mapping[str, Backup], chance: random.Random) -> bool:
    """Whether one of the names of a backup that is to be left should go now; asked once in each RENEW_S.

    Nothing of a name is committed while it is copied, and copies that run at once make each other longer. So about
    MOST_MOVING of them do: nobody hands out turns, but each name draws its lot.
    """
    if not any(one.room for id, one in backups.items() if id != holder):
        return False
    copying = sum(held.state == "copying" for one in backups.values() for held in one.names.values())
    names = len(backups[holder].names) if holder in backups else 1
    return chance.random() * max(names, 1) < MOST_MOVING - copying


# What people see

State = Literal["protected", "moving", "copying", "unprotected", "taken over", "ended", "lost"]
GOOD: frozenset[State] = frozenset({"protected", "moving", "ended"})
"""A name in another state has nothing that protects it, or nobody that runs it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One name of a fleet.

    backup: "HOST (id)" of the one that has it; None: none ever had
    is_alive: that backup is
    epoch: the newest committed, None if none is known
    lag: checkpoints on their way, None if no primary says
    age_s: seconds since the newest commit, None if unknown
    """

    name: str
    state: State
    words: str
    backup: str | None
    address: str | None
    is_alive: bool
    term: int | None
    epoch: int | None
    lag: int | None
    age_s: float | None


def rows(
    places: Mapping[str, Place], backups: Mapping[str, Backup], primaries: Mapping[str, Protected], now: float
) -> list[Row]:
    """Every name that was placed, that a primary runs, or that a backup keeps, by name. now: Unix time"""
    kept = {name for one in backups.values() for name in one.names}
    return [
        _row(name, places.get(name), backups, primaries.get(name), now) for name in sorted({*places, *primaries, *kept})
    ]


def _row(name: str, place: Place | None, backups: Mapping[str, Backup], primary: Protected | None, now: float) -> Row:
    if place is None:  # a primary that knows its backup by address needs no place
        keeper = next((one for one in backups.values() if name in one.names and one.names[name].epoch >= 0), None)
        holder, holder_id = keeper, None if keeper is None else keeper.id
    else:
        holder, holder_id = backups.get(place.backup), place.backup
        if place.is_taken_over and (survivor := _survivor_of(place, backups)) is not None:
            holder, holder_id, place = survivor, survivor.id, None
    held = None if holder is None else holder.names.get(name)
    state, words = _judge(place, holder, holder_id, held, primary, backups)
    epochs = [one.epoch for one in (held, primary) if one is not None and one.epoch >= 0]
    commits = [one.committed_at for one in (held, primary) if one is not None and one.committed_at]
    terms = [one.term for one in (place, held, primary) if one is not None]
    return Row(
        name=name,
        state=state,
        words=words,
        backup=None if holder_id is None else called(holder_id, backups),
        address=holder.addresses[0] if holder is not None else place.address if place is not None else None,
        is_alive=holder is not None,
        term=max(terms, default=None),
        epoch=max(epochs, default=None),
        lag=None if primary is None or primary.lag < 0 else primary.lag,
        age_s=round(max(now - max(commits), 0.0), 3) if commits else None,
    )


def _survivor_of(place: Place, backups: Mapping[str, Backup]) -> Backup | None:
    """The backup that has the survivor of a takeover, protected by address."""
    for one in backups.values():
        held = one.names.get(place.name)
        if held is not None and held.role == "standby" and held.epoch >= 0 and held.term >= place.term:
            return one
    return None


def _judge(
    place: Place | None,
    holder: Backup | None,
    holder_id: str | None,
    held: Held | None,
    primary: Protected | None,
    backups: Mapping[str, Backup],
) -> tuple[State, str]:
    where = None if holder_id is None else called(holder_id, backups)
    if primary is not None and primary.backup and primary.backup != holder_id:
        there = called(primary.backup, backups)
        if place is not None and place.is_taken_over:
            return "copying", f"the survivor from {where} is being copied to {there}"
        if holder is not None:
            return "moving", f"{where} has it until {there} has a full copy"
        return "copying", f"a full copy is on its way to {there}" + ("" if where is None else f"; {where} is gone")
    if place is not None and place.is_taken_over:
        return "taken over", f"by {where} under term {place.term}: protect the survivor with --term {place.term}"
    if holder is None:
        why = "no backup has it" if where is None else f"{where} is gone"
        return "unprotected", f"{why}; {primary.why}" if primary is not None and primary.why else why
    if held is None:
        return "unprotected", f"{where} does not have it" + (f"; {primary.why}" if primary and primary.why else "")
    match held.state:
        case "protected" | "lagging" | "tracking" | "damaged" | "not ready" | "certificate ends":
            return "protected", held.words
        case "copying" | "taken over" | "ended":
            return held.state, held.words
        case "disconnected" | "unprotected" if primary is None:
            return "lost", f"it has no primary; {held.words}"
    return "unprotected", held.words


def called(id: str, backups: Mapping[str, Backup]) -> str:
    """A backup as people call it."""
    return f"{backups[id].host} ({id})" if id in backups else id


def find(text: str, backups: Mapping[str, Backup]) -> list[str]:
    """The ids of the backups that somebody means: by id, HOST, HOST/ID, or address."""
    host, _, id = text.rpartition("/")
    return [
        key
        for key, one in backups.items()
        if text in (key, one.host, *one.addresses) or (host == one.host and id == key)
    ]
