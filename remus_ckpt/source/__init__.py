"""Where memory comes from: three seams, and a source that is made of one of each.

`Memory` gives pages, a `Tracker` says which of them were written, a `Stopper` stops those who write. None of them knows
the loop that uses them; `SharedFile` and `OwnMemory` put them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.reference import Reference
from remus_ckpt.pages import Pages
from remus_ckpt.wire.parts import Parts

if TYPE_CHECKING:
    from remus_ckpt.source.mappings import FileIdentity
    from remus_ckpt.source.process import Process


class Memory(Protocol):
    """Pages that somebody writes.

    pages: how many
    size: in bytes; what the last page has beyond that is zeros
    """

    pages: int
    size: int

    def check(self) -> None:
        """Look at it at the beginning of each pause, before anything is read.

        Raises SourceError if this is no longer the memory that is used, or if it has another size.
        """

    def sample(self, first: int, stop: int) -> Pages:
        """A copy of the pages first…stop as they are now, perhaps torn. At any time; raises SourceError."""

    def read(self, pfns: NDArray[np.int64], out: Pages) -> Pages:
        """Copy pages, ascending, to the first rows of `out`, and return these rows. In a pause, after `check`."""

    def close(self) -> None:
        """Let go of it."""


class Tracker(Protocol):
    """Which pages were written. It may name others too, but never leaves out one that was.

    A new one is as `restart` leaves it.

    way: how it has found the last pages
    why: why they were compared, where the kernel might have told them
    missed_pages: how many pages a comparison has found that the kernel had not told
    """

    way: Literal["kernel", "compare"]
    why: str
    missed_pages: int

    @property
    def reference(self) -> Reference | None:
        """The copy of memory that it compares with; None if it has none: the sender keeps a reference of its own then.

        Where there is one, the sender must have it as its reference: so there is one copy and not two, and the sender
        brings it up to date as it takes pages.
        """

    def restart(self) -> Reference | None:
        """Begin anew, for a receiver whose memory is zeros: all pages that are not count as written.

        Returns the new `reference`. A checkpoint under way must not go on.
        """

    def copy_live(self) -> Iterator[tuple[NDArray[np.int64], Pages]]:
        """Go over memory once while it is written, and copy what was written since the last time, perhaps torn.

        Gives PFNs, int64[n] with n ≤ 1,024, and their pages, uint8[n, 4096]. They are to be sent before the next ones
        are asked for. A page that is written meanwhile counts as written.
        """

    def estimate(self) -> int:
        """About how many pages a pause would find now. At any time; raises SourceError."""

    def written(self) -> NDArray[np.int64]:
        """The pages written since a checkpoint last took them, int64[n], ascending. In a pause, after `Memory.check`.

        Until `taken` is called they are named again: the checkpoint may break off. Raises SourceError where it cannot
        tell any longer, as when the memory has been mapped anew.
        """

    def taken(self) -> None:
        """The checkpoint has taken the pages that `written` named, and those who write run on."""

    def close(self) -> None:
        """Let go of what it tracks with. Called before the memory is let go of."""


class Stopper(Protocol):
    """All who write to some memory: stopped and resumed together."""

    def stop(self) -> None:
        """Stop them all; return when they have stopped. Raises SourceError; they run on then."""

    def check_stopped(self) -> None:
        """Raise SourceError if one of them has run since `stop`: what was copied is not of one instant then.

        PauseBroken if another pause may hold.
        """

    def resume(self) -> None:
        """Let them run on, if they are stopped. Raises SourceError where that fails."""

    def alive(self) -> bool:
        """Whether any of them is left."""

    def death_fds(self) -> Sequence[int]:
        """Descriptors that become readable when one of them dies; good until the next call."""

    def close(self) -> None:
        """Let go of them, which run on."""


class FileStopper(Stopper, Protocol):
    """Stops other processes that write to a file. If this process dies in between, a guard process resumes them."""

    def check_memory(self, memory: FileIdentity) -> None:
        """Raise SourceError if they are seen not to write to that file: somebody else does then.

        Called once; `stop` looks whether they still do.
        """

    def processes(self) -> Sequence[Process] | None:
        """All who write to it now, as far as the last stop has found them; None if they are not known one by one."""


class Source:
    """Live memory, who writes to it, how what they write is found, and what goes with it.

    device_state: called in each pause, for bytes that come back with the checkpoint
    manifest: names what lies in memory (specs/manifest.md §2)
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

    def parts(self) -> Parts:
        """What goes with memory. In a pause; raises what `device_state` does."""
        # A copy of what may change behind the pause, and a TypeError for what is no bytes.
        return Parts(b"".join((self._device_state(),)), self._manifest)

    def close(self) -> None:
        """Let go of the memory and of those who write to it, who run on."""
        try:
            self.tracker.close()
            self.memory.close()
        finally:
            self.stopper.close()
