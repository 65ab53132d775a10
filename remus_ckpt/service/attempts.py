"""Primaries that were refused under one name, and when another full copy is worth a try (specs/session.md §3.3.1).

No I/O, no clock: the caller passes the time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from remus_ckpt.observe.log import News
from remus_ckpt.service.backoff import LONGEST_S
from remus_ckpt.service.words import say_bytes
from remus_ckpt.store import Room
from remus_ckpt.wire.record import Position

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_COPIES, _LONGEST_COPIES_S = 4, 600.0
"""A pause after a vain full copy lasts at least so many times as long as the copy, up to ten minutes."""
_GAPS, _LEAST_PATIENCE_S = 3, 3.0
"""A primary that has not come back for so many of its pauses, and for so long, is no longer there."""
_GROWN_SHARE = 16
"""One byte in this many of a full copy: more must have become free before it is tried again early."""


@dataclass(frozen=True, slots=True)
class Base:
    """A full copy that a primary has begun and that is not durable yet.

    run: of the primary
    held: the newest position in the store when it began: it is over once the store holds another
    memory_bytes: of its memory; data_bytes: about how many of them are not zeros, None if it has not said
    began_at: on the monotonic clock
    """

    run: bytes
    held: Position | None
    memory_bytes: int
    data_bytes: int | None
    began_at: float

    def status(self, received_bytes: int, now: float) -> dict[str, Any]:
        """How far it has got, by the backup's own count. received_bytes: of its stream"""
        seconds = now - self.began_at
        bytes_s = received_bytes / seconds if seconds > 0 else 0.0
        expected = max(self.memory_bytes if self.data_bytes is None else self.data_bytes, 1)
        return {
            "done": min(received_bytes / expected, 1.0),
            "received_bytes": received_bytes,
            "memory_bytes": self.memory_bytes,
            "data_bytes": self.data_bytes,
            "seconds": round(seconds, 3),
            "bytes_s": bytes_s,
            "left_s": max(expected - received_bytes, 0) / bytes_s if bytes_s else None,
        }


@dataclass(frozen=True, slots=True)
class _Refused:
    """The last refusal. began: Unix time of the first one of the same kind; gap_s: since the one before, None if that
    is unknown; at: on the monotonic clock"""

    code: str
    reason: str
    peer: str
    is_full: bool
    began: float
    tries: int
    at: float
    gap_s: float | None


class Attempts:
    """What came of the primaries that were refused under one name. Any thread may call any method.

    A refusal is forgotten when its primary has not come back for a while, and one because of the store also when the
    primary is let in.

    lease_s: of the backup; a primary that knows it comes back within a quarter of it
    """

    def __init__(self, lease_s: float) -> None:
        self._longest_gap_s = min(LONGEST_S, lease_s / 4)
        self._patience_s = max(2 * LONGEST_S, lease_s)
        self._lock = threading.Lock()  # guards all that follows
        self._refused: _Refused | None = None
        self._news = News()
        self._base: Base | None = None
        self._room: Room | None = None
        self._failures = 0
        self._not_before = 0.0
        self._begun_bytes: int | None = None  # what was free when the last base began
        self._short_bytes: int | None = None  # the same of the one that failed last, if that was not enough

    @property
    def base(self) -> Base | None:
        """The full copy that the last primary has begun, until a checkpoint is stored."""
        return self._base

    def refused(
        self, code: str, reason: str, peer: str, *, now: float, unix_time: float, is_full: bool = False
    ) -> bool:
        """A primary was refused. Returns whether that is worth a line in the log: a store that keeps a primary out for
        the same reason again is not.

        is_full: because the disk or the quota is
        """
        with self._lock:
            before = self._refused if self._is_recent(now) else None
            if before is None and not self._failures:
                self._news.clear()
            self._refused = _Refused(
                code,
                reason,
                peer,
                is_full,
                began=unix_time if before is None or before.code != code else before.began,
                tries=1 if before is None else before.tries + 1,
                at=now,
                gap_s=None if before is None else now - before.at,
            )
            return code != "store" or self._news.is_new(reason)

    def stored(self) -> None:
        """A checkpoint has been stored: all is well."""
        with self._lock:
            self._refused = self._base = self._room = None
            self._failures, self._not_before = 0, 0.0
            self._news.clear()

    # Full copies

    def begin(self, base: Base) -> None:
        """A primary begins a full copy."""
        with self._lock:
            self._base = base

    def why_not(self, room: Room, now: float) -> str | None:
        """Why the `base` is not worth a try now, None if it is. room: for it, or for all memory if the primary has not
        said how much it holds; measured now"""
        with self._lock:
            before, self._room = self._short_bytes, room
            if self._base is not None and self._base.data_bytes is not None and not room.is_enough:
                return (
                    f"{room.where}: no room for a full copy, which needs {say_bytes(room.needed_bytes)}: "
                    f"{say_bytes(room.free_bytes)} are free"
                )
            has_grown = before is not None and room.free_bytes > before + room.needed_bytes // _GROWN_SHARE
            if now >= self._not_before or has_grown:
                self._begun_bytes = room.free_bytes
                if self._refused is not None and self._refused.code == "store":
                    self._refused = None
                return None
            sooner = "" if before is None else ", or when there is more room"
            return f"a full copy could not be stored, and is next tried in {self._not_before - now:.0f} s{sooner}"

    def base_failed(self, now: float, *, is_full: bool) -> None:
        """The `base` could not be stored. is_full: because the disk or the quota is full"""
        with self._lock:
            if self._base is None:
                return
            self._failures += 1
            self._short_bytes = self._begun_bytes if is_full else None
            pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 10), _LONGEST_PAUSE_S)
            copies_s = min(_COPIES * (now - self._base.began_at), _LONGEST_COPIES_S)
            self._not_before = now + max(pause_s, copies_s)

    # For people

    def _is_recent(self, now: float) -> bool:
        """Whether the primary that was refused is still expected. Needs the lock."""
        if (last := self._refused) is None:
            return False
        gap_s = self._patience_s if last.gap_s is None else max(_GAPS * last.gap_s, _LEAST_PATIENCE_S)
        return now - last.at <= min(gap_s, self._patience_s)

    def waits_for_store(self, now: float) -> bool:
        """Whether a primary is there that the store keeps out."""
        with self._lock:
            return self._refused is not None and self._refused.code == "store" and self._is_recent(now)

    def status(self, now: float) -> dict[str, Any]:
        """refused: the last primary that was refused, None unless it was here moments ago; `next_s` estimates from the
            time between its last tries when it will be back
        room: for the full copy that was begun, when last measured; None without one
        """
        with self._lock:
            last, room = self._refused, self._room
            refused = None
            if last is not None and self._is_recent(now):
                gap_s = min(last.gap_s or self._longest_gap_s, LONGEST_S)
                refused = {
                    "code": last.code,
                    "reason": last.reason,
                    "peer": last.peer,
                    "is_full": last.is_full,
                    "since": last.began,
                    "tries": last.tries,
                    "ago_s": round(now - last.at, 3),
                    "next_s": round(max(gap_s - (now - last.at), 0.0), 3),
                }
            return {
                "refused": refused,
                "room": None
                if room is None
                else {"where": room.where, "needed_bytes": room.needed_bytes, "free_bytes": room.free_bytes},
            }
