"""A fork copies its parent's descriptors, and would keep the locks, listeners and commands of a dead parent alive.

Holders of such descriptors release them in a fork; that does not affect the parent.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Disowning(Protocol):
    """Something that a fork must not keep."""

    def disown(self) -> None:
        """In a fork: close our copies of the descriptors.

        Takes no lock: a thread that does not exist here may hold it. Ends nothing that the parent still uses. Raises
        nothing.
        """


_live: weakref.WeakSet[Disowning] = weakref.WeakSet()


def disown_in_forks(holder: Disowning) -> None:
    """Call `disown` in each fork, for as long as the holder lives."""
    _live.add(holder)


def _disown_all() -> None:
    for holder in list(_live):
        holder.disown()


os.register_at_fork(after_in_child=_disown_all)
