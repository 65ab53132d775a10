"""Checkpoints on disk: segments that are save streams, an index of them, and a warm copy of memory (specs/store.md).

Store           a directory of histories, one for each protected name
History         reads a history: lists, restores, verifies, exports; takes no lock
HistoryWriter   the only writer of a history: receives, checks, stores, applies, compacts, prunes
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding, make_directory
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.store.chain import Arriving
from remus_ckpt.store.history import Bad, History, Report
from remus_ckpt.store.retention import Removal, Retention
from remus_ckpt.store.room import Room
from remus_ckpt.store.segments import Entry, Shape
from remus_ckpt.store.state import PeerIdentity, Role, State, is_history
from remus_ckpt.store.stored import Stored
from remus_ckpt.store.survey import Lost, Survey
from remus_ckpt.store.warm import WarmCopyDamaged
from remus_ckpt.store.writer import HistoryWriter, Torn

__all__ = [
    "Arriving",
    "Bad",
    "Entry",
    "History",
    "HistoryWriter",
    "Lost",
    "PeerIdentity",
    "Removal",
    "Report",
    "Retention",
    "Role",
    "Room",
    "Shape",
    "State",
    "Store",
    "Stored",
    "Survey",
    "Torn",
    "WarmCopyDamaged",
    "open_store",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def open_store(directory: str | Path) -> Store:
    """Open an existing store for reading: `open_store("/var/lib/remus")["orders"][-1].arrays()`.

    Raises StoreError if there is no such directory.
    """
    store = Store(directory)
    store.names()
    return store


class Store:
    """A directory of histories by name: `store["orders"]` is a history; iteration yields the names."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def create(self) -> None:
        """Create the directory durably, with mode 0700, if it does not exist. Raises StoreError."""
        with guarding(self.directory):
            make_directory(self.directory)

    def names(self) -> list[str]:
        """The names of all histories, including those that have lost their store.json. Raises StoreError."""
        return [name for name in self.candidates() if self.may_hold(name)]

    def candidates(self) -> list[str]:
        """Entries that may be histories. None is opened, so this never waits for a disk that holds only one of them.

        Raises StoreError.
        """
        try:
            found = os.listdir(self.directory)
        except FileNotFoundError:
            raise StoreError(f"{self.directory}: there is no such directory") from None
        except OSError as error:
            raise StoreError(f"{self.directory}: {error.strerror}") from error
        return sorted(name for name in found if _NAME.fullmatch(name))

    def may_hold(self, name: str) -> bool:
        """Whether a history of this name exists, or an entry that we may not read: opening it reports why."""
        try:
            return is_history(self._path(name))
        except (OSError, StoreError):
            return True

    def __iter__(self) -> Iterator[str]:
        """The names, as `names` gives them."""
        return iter(self.names())

    def __getitem__(self, name: str) -> History:
        """Open one history for reading. Raises StoreError if there is none of that name."""
        return self.history(name)

    def history(self, name: str, *, limits: Limits | None = None) -> History:
        """Open one history for reading. Raises StoreError."""
        return History(self._path(name), limits=limits)

    def writer(self, name: str, **options: Any) -> HistoryWriter:
        """Open one history for writing; it is created if it does not exist. Options: as for `HistoryWriter`.

        Raises StoreError.
        """
        return HistoryWriter(self._path(name), name, **options)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(
                f"{name!r:.80} is not a name for a history: use 1 to 64 letters, digits, dots, dashes and "
                "underscores, beginning with a letter or a digit"
            )
        return self.directory / name
