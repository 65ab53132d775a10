"""Where memory comes from: three seams, and a source made of one of each.

`Memory` provides pages, a `Tracker` says which of them were written, a `Stopper` stops the writers. None of them knows
the loop that uses it; `SharedFile` and `OwnMemory` combine them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.reference import Reference
from remus_ckpt.pages import Pages, Places
from remus_ckpt.wire.parts import Parts

if TYPE_CHECKING:
    from remus_ckpt.source.mappings import FileIdentity
    from remus_ckpt.source.process import Process


_SAMPLED_FOR = 1024
"""A tracker's estimate takes a group of pages to stand for so many, and pages with data lie side by side."""
_DOUBTS = 2
"""Standard deviations."""


class Memory(Protocol):
    """The pages that writers write to.

    pages: how many
    size: in bytes; the rest of the last page is zeros
    """

    pages: int
    size: int

    def check(self) -> None:
        """Called at the beginning of each pause, before anything is read.

        Raises SourceError if this is no longer the memory in use, or if its size has changed.
        """

    def data_pages(self) -> int | None:
        """An upper bound for the pages that are not zeros, if known without reading them; otherwise None."""

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn. May be called at any time. Raises
        SourceError."""

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy the given pages (pfns ascending) to the first rows of `out`, and return these rows. In a pause, after
        `check`."""

    def places(self, pfns: NDArray[np.int64]) -> Places:
        """Where the given pages (pfns ascending) are. In a pause, after `check`; valid as long as the pause lasts.

        Pages that are not whole in this process, or that reading would fill, are copied here.
        """

    def close(self) -> None:
        """Release the memory."""


class Tracker(Protocol):
    """Which pages were written. A tracker may name extra pages, but never omits one that was written.

    A new tracker is in the state that `restart` leaves.

    way: how the last pages were found
    why: why they were found by comparison although the kernel might have reported them
    missed_pages: how many pages a comparison has found that the kernel had not reported
    """

    way: Literal["kernel", "compare"]
    why: str
    missed_pages: int

    @property
    def reference(self) -> Reference | None:
        """The copy of memory that the tracker compares with; None if it has none, and the sender keeps its own.

        If there is one, the sender must use it as its reference, and updates it as it takes pages: one copy, not two.
        """

    def restart(self) -> Reference | None:
        """Start over, for a receiver whose memory is zeros: all pages that are not zeros count as written.

        Returns the new `reference`. A checkpoint in progress must not continue.
        """

    def copy_live(self) -> Iterator[tuple[NDArray[np.int64], Pages]]:
        """Go over memory once while writers run, and copy what was written since the last pass, perhaps torn.

        Yields PFNs, ascending, int64[n] with n ≤ 1,024, and their pages, uint8[n, 4096]. The `reference`, if there is
        one, has them already. A page that is written meanwhile counts as written.
        """

    def estimate(self) -> int:
        """About how many pages a pause would find now. May be called at any time. Raises SourceError."""

    def written(self) -> NDArray[np.int64]:
        """The pages written since a checkpoint last took them, int64[n], ascending. In a pause, after `Memory.check`.

        Until `taken` is called, the next call names them again, since the checkpoint may be interrupted. Raises
        SourceError if the tracker can no longer tell, for instance because the memory has been remapped.
        """

    def peek(self) -> NDArray[np.int64]:
        """The pages that `written` would name now, without any effect on what it names. In a pause. Raises
        SourceError."""

    def taken(self) -> None:
        """The checkpoint has taken the pages that `written` named, and the writers run again."""

    def close(self) -> None:
        """Release the means of tracking. Called before the memory is released."""


class Stopper(Protocol):
    """All writers of some memory, stopped and resumed together."""

    def stop(self) -> None:
        """Stop all writers; return once they have stopped. Raises SourceError; the writers then run on."""

    def check_stopped(self) -> None:
        """Raise SourceError if a writer has run since `stop`: the copied pages are then not of one instant.

        Raises PauseBroken if another pause may succeed.
        """

    def resume(self) -> None:
        """Resume the writers if they are stopped. Raises SourceError if that fails."""

    def alive(self) -> bool:
        """Whether any writer is left."""

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when a writer dies; valid until the next call."""

    def close(self) -> None:
        """Release the writers, which run on."""


class FileStopper(Stopper, Protocol):
    """Stops other processes that write to a file. If this process dies in between, a guard process resumes them."""

    def check_memory(self, memory: FileIdentity) -> None:
        """Raise SourceError if the processes evidently do not write to that file, so others must. Called once; `stop`
        checks that they still do.
        """

    def processes(self) -> Sequence[Process] | None:
        """The processes that write to the file now, as the last stop found them; None if they are not known
        individually."""


class Source:
    """Live memory, its writers, the way to find written pages, and what goes with the memory.

    device_state: called in each pause; returns bytes that come back with the checkpoint
    manifest: names what memory holds (specs/manifest.md §2)
    """

    def __init__(
        self,
        memory: Memory,
        tracker: Tracker,
        stopper: Stopper,
        *,
        device_state: Callable[[], bytes] = bytes,
        manifest: bytes | None = None,
    ) -> None:
        self.memory = memory
        self.tracker = tracker
        self.stopper = stopper
        self._device_state = device_state
        self._manifest = manifest

    def processes(self) -> Sequence[Process]:
        """The processes that write to the memory now, as far as they are known individually."""
        known = getattr(self.stopper, "processes", None)
        return (known() if known else None) or ()

    def status(self) -> dict[str, Any]:
        """What users may want to know about it, besides what all sources have. Any thread may call this."""
        return {}

    def before_pause(self) -> None:
        """Called right before each pause, while the writers run. Raises SourceError."""

    def drain(self, epoch: int) -> None:
        """Called in each pause, right after the stop: output of the writers up to now belongs to this checkpoint, and
        may leave once that is committed."""

    def parts(self) -> Parts:
        """What goes with memory. Called in a pause; raises what `device_state` raises."""
        # `join` copies what may change after the pause, and raises TypeError if it is not bytes.
        return Parts(b"".join((self._device_state(),)), self._manifest)

    def data_pages(self) -> int:
        """About how many pages are not zeros; an estimate errs on the low side. Call right after the tracker's
        `restart`. Raises SourceError."""
        if (known := self.memory.data_pages()) is not None:
            return known
        pages, found = self.memory.pages, self.tracker.estimate()
        share = min(found / pages, 1.0)
        doubt = _DOUBTS * math.sqrt(pages * _SAMPLED_FOR * share * (1 - share))
        return max(found - math.ceil(doubt), 0)

    def close(self) -> None:
        """Release the memory and its writers, which run on."""
        try:
            self.tracker.close()
            self.memory.close()
        finally:
            self.stopper.close()
