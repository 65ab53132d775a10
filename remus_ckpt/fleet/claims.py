"""A backup's side of the commit log: a takeover is recorded there before anything else happens."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from remus_ckpt.errors import Overtaken, RemusError
from remus_ckpt.fleet.commits import last_of
from remus_ckpt.fleet.decisions import Follow, Last, Mine, No, take_over
from remus_ckpt.fleet.engine import Log
from remus_ckpt.fleet.records import WRITER_BYTES, Kind, Record
from remus_ckpt.wire.record import Position


class Denied(RemusError):
    """The log forbids this backup to take over, and the message says why. It has not taken over."""


class Claims:
    """The takeovers of one name by one store. Any thread may call any method.

    where: the backup, for people
    """

    def __init__(self, commit_log: Log, name: str, where: str) -> None:
        self._log = commit_log
        self._name = name
        self._where = where
        self.known_identity: str | None = None
        """What `identity` returned last."""

    @property
    def identity(self) -> str:
        """Which log this is. Raises LogError."""
        self.known_identity = self._log.identity
        return self.known_identity

    @staticmethod
    def new_store() -> str:
        """A name for a store in the log."""
        return secrets.token_hex(WRITER_BYTES)

    def find(self, *, term: int, store: str) -> int | None:
        """The term of this store's takeover, if that is the last record and the store does not know it yet.

        Raises LogError, Malformed.
        """
        return _mine(last_of(self._log, self._name), term, bytes.fromhex(store))

    def could_take_over(self, *, term: int, store: str, newest: Position, holds: Callable[[Position], bool]) -> bool:
        """Whether a takeover would be appended now. As for `take_over`. Raises LogError, Malformed."""
        last = last_of(self._log, self._name)
        found = take_over(last, term=term, store=bytes.fromhex(store), newest=newest, holds=holds)
        return not isinstance(found, No)

    def take_over(self, *, term: int, store: str, newest: Position, holds: Callable[[Position], bool]) -> int:
        """Append a takeover; returns its term, which is above `term`.

        term, newest, holds: as for `decisions.take_over`
        Raises Denied if it is not in the log; LogError if that is unknown.
        """
        while True:
            last = last_of(self._log, self._name)
            match take_over(last, term=term, store=bytes.fromhex(store), newest=newest, holds=holds):
                case Mine(found):
                    return found
                case No(reason):
                    raise Denied(f"{self._name!r} cannot be taken over from here: {reason}")
                case Follow(new):
                    record = Record(Kind.TAKEOVER, new, bytes.fromhex(store), newest, self._where, time.time())
                    key = secrets.token_hex(16)
                    try:
                        self._log.append(self._name, record.pack(), expected=last.sequence, key=key)
                        return new
                    except Overtaken:
                        continue  # by a commit, or by another takeover: decide again


def _mine(last: Last, term: int, store: bytes) -> int | None:
    record = last.record
    is_mine = record is not None and record.kind is Kind.TAKEOVER and record.writer == store
    return record.term if record is not None and is_mine and record.term > term else None
