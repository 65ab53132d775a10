"""A tracker that asks the kernel, and compares memory where the kernel cannot know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.reference import Shadow
from remus_ckpt.errors import Untracked
from remus_ckpt.pages import Pages
from remus_ckpt.plural import counted
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.track.mapped import FileWatch, Writer
from remus_ckpt.source.track.spans import Spans

Tracking = Literal["auto", "kernel", "compare"]
"""How written pages are found: by the kernel if possible, only by the kernel, or by comparison."""

AUDIT_PAUSES = 1000


class Watch(Protocol):
    """What the kernel watches."""

    def begin(self) -> None:
        """Start watching, while writers run; earlier writes are forgotten. Raises SourceError."""

    def written(self) -> NDArray[np.int64]:
        """The pages written since the last time, int64[n], ascending. In a pause.

        Raises Untracked if some may be missing; later writes are still found, if possible.
        """

    def peek(self) -> NDArray[np.int64]:
        """Like `written`, but the next time names them again."""

    def renew(self) -> None:
        """Add new writers, while all run."""

    def close(self) -> None:
        """Stop watching."""


class KernelTracker:
    """Written pages as the kernel reports them, with a comparison for what it does not know.

    compare: has the copy of memory that a comparison needs, which is also the sender's reference
    audit: everything is also compared once every this many pauses; 0 for never. A missed page is sent, counted in
        `missed_pages`, and ends the tracking: from then on, comparison finds the pages

    way: "kernel" or "compare": how the last pages were found
    why: why they were compared; empty if they were not
    """

    def __init__(self, compare: Compare, watch: Watch, *, audit: int = 0) -> None:
        self._compare = compare
        self._watch: Watch | None = watch
        self._audit = audit
        self._pauses = 0
        # Whether all that was written and is not in `_pending` is with the kernel. It is false while that changes, so
        # that an exception between any two instructions leads to a comparison.
        self._is_known = False
        self._pending: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.way: Literal["kernel", "compare"] = "compare"
        self.why = "all memory is copied first"
        self.missed_pages = 0

    @property
    def reference(self) -> Shadow:
        """The copy that a comparison needs."""
        return self._compare.reference

    def restart(self) -> Shadow:
        """Start over."""
        self._is_known = False
        self._pending = np.empty(0, dtype=np.int64)
        return self._compare.restart()

    def copy_live(self) -> Iterator[tuple[NDArray[np.int64], Pages]]:
        """Copy the pages that differ; from the start, the kernel knows what is written meanwhile."""
        self._is_known = False
        if self._watch is not None:
            self._watch.begin()
        yield from self._compare.copy_live()
        self._is_known = self._watch is not None

    def estimate(self) -> int:
        """Estimate by comparing a sixteenth of memory."""
        return self._compare.estimate()

    def written(self) -> NDArray[np.int64]:
        """The pages that the kernel names, and earlier ones that no checkpoint has taken."""
        was_known, self._is_known = self._is_known, False
        found = None
        why = "" if was_known else self.why or "earlier writes were not recorded"
        if self._watch is not None:
            try:
                found = self._watch.written()
            except Untracked as error:
                why = str(error)
        if found is None or not was_known:
            found = self._compare.written()
            self.way, self.why = "compare", why
        else:
            self._compare.note(found)
            self.way, self.why = "kernel", ""
            self._pauses += 1
            if self._audit and self._pauses % self._audit == 0:
                found = self._check(found)
        self._pending = np.union1d(self._pending, found) if len(self._pending) else found
        self._is_known = self._watch is not None
        return self._pending

    def peek(self) -> NDArray[np.int64]:
        """The pages that `written` would name, without asking it."""
        found = None
        if self._watch is not None and self._is_known:
            with suppress(Untracked):
                found = self._watch.peek()
        if found is None:
            found = self._compare.written()
        return np.union1d(self._pending, found) if len(self._pending) else found

    def _check(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """Also compare everything. Returns the pages found either way."""
        differing = self._compare.written()
        missed = np.setdiff1d(np.setdiff1d(differing, found), self._pending)
        if not len(missed):
            return found
        self.missed_pages += len(missed)
        self._give_up(f"the kernel had missed {counted(len(missed), 'page')}, PFN {int(missed[0]):#x} first")
        return np.union1d(found, missed)

    def _give_up(self, why: str) -> None:
        watch, self._watch = self._watch, None
        self.way, self.why = "compare", why
        if watch is not None:
            watch.close()

    def taken(self) -> None:
        """The checkpoint has taken them."""
        self._pending = np.empty(0, dtype=np.int64)
        if self._watch is not None:
            self._watch.renew()

    def close(self) -> None:
        """Release what is watched."""
        self._is_known = False
        if self._watch is not None:
            self._watch.close()


class OwnWatch:
    """Buffers of this process."""

    def __init__(self, spans: Spans) -> None:
        self.begin = spans.arm
        self.written = spans.written
        self.peek = spans.peek
        self.close = spans.close

    def renew(self) -> None:
        """Does nothing: there are no other writers."""


class ProcessesWatch:
    """A file, and the processes that have it mapped.

    processes: returns the processes that write now
    must: whether tracking must work for each of them
    """

    def __init__(self, watch: FileWatch, processes: Callable[[], Sequence[Writer]], *, must: bool) -> None:
        self._watch = watch
        self._processes = processes
        self._must = must
        self.close = watch.close

    def begin(self) -> None:
        """Add all processes."""
        self.renew()
        if self._must and (refused := self._watch.refused):
            raise Untracked("; ".join(refused))
        # The mappings are taken in by the first question.
        with suppress(Untracked):
            self._watch.written(self._processes())

    def written(self) -> NDArray[np.int64]:
        """The pages written by all processes together."""
        processes = self._processes()
        if not processes:
            raise Untracked("no writing process is named")
        return self._watch.written(processes)

    def peek(self) -> NDArray[np.int64]:
        """Not offered for the memory of other processes."""
        raise Untracked("what other processes wrote is reported only once")

    def renew(self) -> None:
        """Add children, and any other new processes."""
        self._watch.attach(self._processes())
