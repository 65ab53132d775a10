"""A fork copies its parent's descriptors, and would keep locks, listeners and commands of a parent that has died.

Whoever holds such descriptors lets go of them in a fork: what the parent does with them is not changed by that.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Disowning(Protocol):
    """What a fork has no part in."""

    def disown(self) -> None:
        """In a fork: close our copies of the descriptors.

        Takes no lock: a thread that is not here may hold it. Ends nothing that the parent goes on with. Raises nothing.
        """


_live: weakref.WeakSet[Disowning] = weakref.WeakSet()


def disown_in_forks(holder: Disowning) -> None:
    """Have `disown` called in each fork, for as long as the holder lives."""
    _live.add(holder)


def _disown_all() -> None:
    for holder in list(_live):
        holder.disown()


os.register_at_fork(after_in_child=_disown_all)
