"""What we require of a commit log: the seam in front of its engine (specs/fleet.md §2).

The log has a sequence of records for each name. A record is appended with the number of the record that it follows: of
two that follow the same one, at most one can succeed. Safety rests on that alone; no clock decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MAX_RECORD_BYTES = 1 << 16
"""A record only says where bytes are."""
APPEND_S = 10.0
"""How long an append may take by default: longer than the brokers need to replace a leader that died."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in the log.

    sequence: its number, from 1; numbers of one name grow, and are not consecutive
    key: chosen by its writer, which looks for it if it gets no answer
    """

    sequence: int
    key: str
    data: bytes


class Log(Protocol):
    """A replicated log with a sequence of records for each name. Any thread may call any method."""

    @property
    def identity(self) -> str:
        """Which log this is: the same string on two sides means the same log."""

    def append(self, name: str, data: bytes, *, expected: int, key: str, timeout_s: float = APPEND_S) -> int:
        """Append a record to those of a name, durably; returns its sequence.

        expected: the sequence of the name's last record, 0 if there is none
        key: unique to this record; the same call may be repeated with it, and appends once
        Raises Overtaken if the record was not appended and never will be, since another follows `expected`.
        Raises LogError if it is unknown whether it was or will be appended.
        """

    def last(self, name: str) -> Entry | None:
        """The last record of a name, None without one. Raises LogError."""

    def read(self, name: str, after: int = 0) -> Iterator[Entry]:
        """The records of a name after that sequence, as far as they are kept. Raises LogError."""

    def names(self) -> list[str]:
        """The names that have records. Raises LogError."""

    def close(self) -> None:
        """End the connection."""
