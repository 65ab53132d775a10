"""What a history holds, as rows that a backup sends to a reader, and back (specs/session.md §3.13)."""

from __future__ import annotations

from typing import Any, NoReturn

from remus_ckpt.errors import Malformed
from remus_ckpt.session.messages import MAX_EPOCH
from remus_ckpt.store.segments import Contents, Entry, is_segment
from remus_ckpt.store.state import State
from remus_ckpt.store.survey import Lost
from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import Position

REASON_CHARS = 300
_MOST = (1 << 63) - 1
_SECTION = "session.md §3.13"

Row = list[Any]


def row_of_entry(entry: Entry) -> Row:
    """A checkpoint, without the name of its segment."""
    return [entry.epoch, entry.position.digest, entry.time_ns, entry.start, entry.end, entry.pages]


def entry_of(row: Any, segment: str) -> Entry:
    """Raises Malformed."""
    epoch, digest, time_ns, start, end, pages = _fields(row, 6)
    if not all(map(_is_whole, (epoch, start, end, pages))) or not start < end or epoch > MAX_EPOCH:
        _refuse(row)
    if type(digest) is not bytes or len(digest) != DIGEST_BYTES or not (time_ns is None or _is_time(time_ns)):
        _refuse(row)
    return Entry(Position(epoch, digest), time_ns, segment, start, end, pages, start == 0)


def row_of_contents(contents: Contents) -> Row:
    """A segment: its name, its first and its last checkpoint."""
    edges = contents.first, contents.last
    return [contents.name, *(None if edge is None else row_of_entry(edge) for edge in edges)]


def contents_of(row: Any) -> Contents:
    """Raises Malformed."""
    name, first, last = _fields(row, 3)
    if type(name) is not str or not is_segment(name):
        _refuse(row)
    first, last = (None if edge is None else entry_of(edge, name) for edge in (first, last))
    found = Contents(name, first, last)
    if not _is_possible(found.first, found.last):
        _refuse(row)
    return found


def row_of_lost(lost: Lost) -> Row:
    """A loss: its segment, byte, reason, the first epoch and the one after the last, and the time of the first."""
    return [lost.segment, lost.byte, lost.reason[:REASON_CHARS], lost.epochs.start, lost.epochs.stop, lost.time_ns]


def lost_of(row: Any) -> Lost:
    """Raises Malformed."""
    segment, byte, reason, start, stop, time_ns = _fields(row, 6)
    if type(segment) is not str or not is_segment(segment) or not _is_text(reason):
        _refuse(row)
    if not all(map(_is_whole, (byte, start, stop))) or stop > MAX_EPOCH + 1:
        _refuse(row)
    if not (time_ns is None or _is_time(time_ns)):
        _refuse(row)
    return Lost(segment, byte, reason, range(start, stop), time_ns)


def state_of(name: str, term: Any, role: Any, damaged: dict[str, str]) -> State:
    """Raises Malformed."""
    if not _is_whole(term) or role not in ("standby", "promoted"):
        _refuse([term, role])
    return State(name, term, role, damaged=damaged)


def damage_of(row: Any) -> tuple[str, str]:
    """A damaged segment, and what is wrong with it. Raises Malformed."""
    segment, reason = _fields(row, 2)
    if type(segment) is not str or not is_segment(segment) or not _is_text(reason):
        _refuse(row)
    return segment, reason


def _is_possible(first: Entry | None, last: Entry | None) -> bool:
    if first is None or last is None:
        return first is last
    gap = last.epoch - first.epoch
    return first.start == 0 and (last == first if gap == 0 else gap > 0 and last.start >= first.end + gap - 1)


def _fields(row: Any, count: int) -> Row:
    if type(row) is not list or len(row) != count:
        _refuse(row)
    return row


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_time(value: Any) -> bool:
    return type(value) is int and -_MOST - 1 <= value <= _MOST


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= REASON_CHARS


def _refuse(value: Any) -> NoReturn:
    raise Malformed(f"{value!r:.80} is not a row of a history", section=_SECTION, chunk="REPLY")
