"""Who may write the next record of a name (specs/fleet.md §4): pure decisions. No clock, no I/O, no memory.

The caller reads the last record, decides, and appends its own record after it. If another record came first, it reads
and decides again. So a decision takes effect only if nothing has happened since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.wire.record import Position


@dataclass(frozen=True, slots=True)
class Last:
    """The last record of a name, and its sequence; sequence 0 without a record if the name has none."""

    sequence: int = 0
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Follow:
    """Append after the record that was read. term: of the record to append"""

    term: int


@dataclass(frozen=True, slots=True)
class Mine:
    """The takeover is already in the log, under this term."""

    term: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Another side acts, under this term: a primary must stop, and release nothing."""

    term: int


@dataclass(frozen=True, slots=True)
class No:
    """A takeover from here would lose committed checkpoints, or would be the second one."""

    reason: str


def commit(last: Last, *, term: int, run: bytes, since: int) -> Follow | Ended:
    """Whether a primary may append a commit.

    term, run: its own
    since: the last sequence when this run began. A takeover under its own term that was already there is the one that
        it came from; if another primary of its term has committed since then, that one continues instead
    """
    record = last.record
    if record is None or record.writer == run or record.term < term:
        return Follow(term)
    if record.term > term or last.sequence > since:
        return Ended(record.term)
    return Follow(term)


def take_over(
    last: Last, *, term: int, store: bytes, newest: Position, holds: Callable[[Position], bool]
) -> Follow | Mine | No:
    """Whether a backup may take a name over.

    term, store: of its store
    newest: what it would continue from
    holds: whether a position is `newest`, or one that `newest` was built on
    """
    record = last.record
    if record is None:
        return Follow(term + 1)
    if record.kind is Kind.TAKEOVER:
        if record.writer != store:
            return No(f"it was taken over under term {record.term} by {record.where or 'another backup'}")
        if record.term > term:
            return Mine(record.term)
    if record.term > term:
        return No(f"it is protected under term {record.term} by {record.where or 'another backup'}, and here {term}")
    if not holds(record.position):
        held = record.where or "another backup"
        return No(
            f"the last commit is epoch {record.position.epoch}, at {held}, and the state here was not built on it"
        )
    return Follow(max(term, record.term) + 1)
