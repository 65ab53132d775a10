"""Where memory comes from: what a checkpoint loop asks of a source, and a source of those who write to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Pages

if TYPE_CHECKING:
    from remus_ckpt.source.mappings import Memory


class Source(Protocol):
    """Memory that somebody else writes.

    pages: its size in pages
    size: in bytes; the last page may be padded with zeros
    shadow: uint8[pages, 4096], what the last checkpoint held. The sender takes its deltas against the same copy and
        brings it up to date.
    """

    pages: int
    size: int
    shadow: Pages

    def pause(self) -> None:
        """Stop all who write; return when they have stopped. Raises SourceError; they run on then."""

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn. At any time."""

    def dirty(self) -> NDArray[np.int64]:
        """The pages that differ from the shadow, ascending. While paused."""

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages into `out`. While paused."""

    def check_paused(self) -> None:
        """Raise PauseBroken if somebody has run in the pause: what was copied is not of one instant then."""

    def resume(self) -> None:
        """Let them run on."""

    def alive(self) -> bool:
        """Whether anybody is left who writes."""

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when one who writes dies."""


class Writers(Protocol):
    """All who write to some memory that is not this process's own: stopped and resumed together.

    If this process dies in between, a guard process lets them run on.
    """

    def check_memory(self, memory: Memory) -> None:
        """Raise SourceError if they are seen not to write to that memory: somebody else does then.

        Called once; `stop` looks whether they still do.
        """

    def stop(self) -> None:
        """Stop them all; return when they have stopped. Raises SourceError; they run on then."""

    def check_stopped(self) -> None:
        """Raise PauseBroken if one of them has run since `stop`."""

    def resume(self) -> None:
        """Let them run on. Raises SourceError where that fails."""

    def alive(self) -> bool:
        """Whether any of them is left."""

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when one of them dies; good until the next call."""

    def close(self) -> None:
        """Let go of them, which run on."""
