"""Where memory comes from: what a checkpoint loop asks of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Pages


class Source(Protocol):
    """Memory that somebody else writes.

    pages: its size in pages
    shadow: uint8[pages, 4096], what the last checkpoint held. The sender takes its deltas against the same copy and
        brings it up to date.
    """

    pages: int
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
        """Raise SourceError if the pause has been broken from outside: what was copied is not of one instant then."""

    def resume(self) -> None:
        """Let them run on."""

    def alive(self) -> bool:
        """Whether anybody is left who writes."""

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when one who writes dies."""
