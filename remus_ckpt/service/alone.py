"""A primary alone: what `Placed` and `Commits` do for one in a fleet or with a commit log, without either.

The rest of the primary is the same in all cases, and asks nowhere which one it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from remus_ckpt.link.connection import Connection
from remus_ckpt.wire.record import Position


class OneBackup:
    """Stands in for `Placed` where the user has named the backup. Any thread may call any method.

    connect: returns a connection whose handshake is done
    """

    address: str | None = None
    term: int | None = None
    target = ""
    is_certain = is_at_holder = True
    wants_to_leave = False

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self.run = secrets.token_hex(16)
        """Which primary this is: 16 bytes, in hex."""

    def announce(self, facts: Callable[[], dict[str, Any]]) -> None:
        """There is nobody to tell."""

    def connect(self, timeout_s: float, term: int | None) -> Connection:
        """Connect to the backup. Raises LinkError."""
        return self._connect()

    def failed(self, code: str | None) -> bool:
        """Whether another backup may not refuse us: there is none."""
        return False

    def confirm(self, term: int) -> None:
        """The backup has the name, whatever it holds."""

    def close(self) -> None:
        """There is no lease to end."""


class NoCommitLog:
    """Stands in for `Commits` where the backup's word is enough. Any thread may call any method."""

    identity: str | None = None
    trouble: str | None = None
    append_s: float | None = None

    def begin_run(self) -> None:
        """There are no records from before."""

    def begin(self, term: int, where: str) -> None:
        """No other side can be found here."""

    def look(self) -> None:
        """Nor between two sessions."""

    def settle(self, position: Position, deadline: float) -> None:
        """What the backup holds is settled."""

    def forget(self) -> None:
        """Nothing was put."""

    def check(self) -> None:
        """Nobody says that another side acts."""

    def close(self) -> None:
        """Nothing is being appended."""
