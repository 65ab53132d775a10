"""Removes what retention no longer keeps, a few segments at a time (specs/store.md §7.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from remus_ckpt.disk import free_bytes, guarding, sync_directory
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.store.index import Index
from remus_ckpt.store.retention import Removal, Retention, find_removals, times_taken
from remus_ckpt.store.segments import Contents, first_epoch_of, is_segment, sequence_of
from remus_ckpt.store.state import State, StateFile
from remus_ckpt.store.survey import joined, without

_BATCH = 16
"""Few enough that a checkpoint which waits for their removal is not late."""
_FREE_PAUSE_S = 30.0
"""Some file systems (btrfs) take this long to free what was removed: until then, no more is removed for it. Nor is it
while something reads what was removed."""


class Pruner:
    """Removes segments, a few at a time. The caller holds the writer's lock.

    directory: of the segments; index, state: of the history
    retention: what `go_on` and `make_room` keep; None: all
    on_phase: called with "pruning" and an epoch before each removal; note: called with what went wrong
    give_back: frees space that was only written ahead, before anything is removed to make room; whether it had some
    """

    def __init__(
        self,
        directory: Path,
        index: Index,
        state: StateFile,
        retention: Retention | None,
        on_phase: Callable[[str, int], None],
        note: Callable[[str], None],
        give_back: Callable[[], bool] = lambda: False,
    ) -> None:
        self._give_back = give_back
        self._directory, self._index, self._state = directory, index, state
        self._retention = retention
        self._on_phase, self._note = on_phase, note
        self._pruning: Pruning | None = None
        self._no_room_before = 0.0

    @property
    def is_under_way(self) -> bool:
        """Whether segments are still to be removed."""
        return self._pruning is not None

    def make_room(self, newest: str) -> None:
        """`go_on` if too little of the file system is free, if segments are still to be removed, or if those before the
        newest need no longer be spared."""
        if self.is_under_way or self._is_short_of_room() or self._spares_no_more(newest):
            self.go_on(newest)

    def _spares_no_more(self, newest: str) -> bool:
        spared = _spared(self._state.state)
        return spared > 0 and len(self._index.known[newest].epochs) == spared

    def _is_short_of_room(self) -> bool:
        """Whether too little of the file system is free; never while what was removed may still be freed."""
        least = None if self._retention is None else self._retention.free
        if least is None or time.monotonic() < self._no_room_before:
            return False
        with suppress(OSError):
            is_short = free_bytes(self._directory) < least
            return free_bytes(self._directory) < least if is_short and self._give_back() else is_short
        return False

    def go_on(self, newest: str) -> None:
        """Remove the next few segments; if none are waiting, find which. After an error they are found again.

        newest: the segment with the newest checkpoint
        """
        if self._retention is None:
            return
        try:
            if not self.is_under_way:
                is_short = self._is_short_of_room()
                retention = self._retention if is_short else replace(self._retention, free=None)
                self.begin(newest, retention, time.time_ns())
            self.remove_some()
        except StoreError as error:
            self._pruning = None
            self._note(f"prune: {error}")

    def begin(self, newest: str, retention: Retention, now_ns: int) -> list[Removal]:
        """Find the segments to remove now, and return them. Raises StoreError.

        newest: the segment with the newest checkpoint; now_ns: the time on this machine's clock
        """
        state = self._state.state
        self._pruning = None
        if retention == Retention():
            return []
        found = find_over(self._directory, self._index.known.values(), newest, state, retention, now_ns)
        if found is None:
            return []
        # First store.json: a gap that it does not explain is a loss.
        if (before := found.state_before(state)) != state:
            self._state.save(before)
        self._pruning = found
        return list(found.over.values())

    def remove_some(self) -> None:
        """Remove the next few segments. Raises StoreError."""
        if (pruning := self._pruning) is None:
            return
        if not pruning.remove_some(self._directory, self._index, self._on_phase):
            self._no_room_before = time.monotonic() + _FREE_PAUSE_S
        if not pruning.over:
            self._pruning = None
            if (state := pruning.state_behind(self._state.state)) != self._state.state:
                self._state.save(state)


@dataclass(slots=True)
class Pruning:
    """Segments to remove.

    over: by name, oldest first; without those already removed
    names: of all of them
    gaps: epochs pruned earlier or now that will be missing between two segments
    oldest, oldest_left: the first segment now, and the first that stays
    taken_ns: when the newest checkpoint of the segment before `oldest_left` was taken; None if unknown, or if no such
        segment goes
    """

    over: dict[str, Removal]
    names: frozenset[str]
    gaps: list[range]
    oldest: str
    oldest_left: str
    taken_ns: int | None

    def remove_some(self, directory: Path, index: Index, on_phase: Callable[[str, int], None]) -> bool:
        """Remove the next few segments from the directory; returns whether that made room at once. Raises
        StoreError."""
        batch = list(islice(self.over.items(), _BATCH))
        with guarding(directory):
            free_before = free_bytes(directory)
            # The index first: if we die here, a segment that the index does not name is found again.
            index.drop([name for name, _ in batch])
            for name, removal in batch:
                last = removal.contents.last
                on_phase("pruning", last.epoch if last else first_epoch_of(name))
                (directory / name).unlink(missing_ok=True)
                del self.over[name]
            sync_directory(directory)
            return free_bytes(directory) > free_before  # by less than was removed, if others write meanwhile

    def state_before(self, state: State) -> State:
        """What store.json must say before anything is removed: the gaps that come, and those that are there."""
        return _with_gaps(state, self.gaps, self.oldest)

    def state_behind(self, state: State) -> State:
        """What store.json says afterwards: without the pruned segments, but with the time of the last of them."""
        damaged = {
            name: why
            for name, why in state.damaged.items()
            if is_segment(name) and sequence_of(name) >= sequence_of(self.oldest_left) and name not in self.names
        }
        more = state.more if self.taken_ns is None else {**state.more, "pruned_ns": self.taken_ns}
        return _with_gaps(replace(state, damaged=damaged, more=more), state.pruned, self.oldest_left)


def _with_gaps(state: State, gaps: Iterable[range], oldest: str) -> State:
    """The state with the gaps that come after the beginning of the oldest segment."""
    gaps = [gap for gap in gaps if gap.start > first_epoch_of(oldest)]
    return state if gaps == state.pruned else state.with_pruned(gaps)


def _spared(state: State) -> int:
    """How many of the newest checkpoints stay in any case: a takeover has to find the last one that is in the commit
    log, behind which a primary has at most its window."""
    return MAX_WINDOW + 1 if state.more.get("log") else 0


def find_over(
    directory: Path, contents: Iterable[Contents], newest: str, state: State, retention: Retention, now_ns: int
) -> Pruning | None:
    """Which segments retention removes; None if all of them stay. Raises StoreError.

    directory: of the segments; contents: what they hold, oldest first
    newest: the segment with the newest checkpoint; now_ns: the time on this machine's clock
    """
    known = list(contents)
    older = [one for one in known if sequence_of(one.name) <= sequence_of(newest)]
    newer = known[len(older) :]

    def written_ns(name: str) -> int | None:
        with suppress(OSError):
            return (directory / name).stat().st_mtime_ns
        return None

    times_ns: list[int | None] = [None] * len(older)
    if retention.needs_times:
        floor_ns = state.more.get("pruned_ns")
        times_ns = times_taken(older, written_ns, now_ns, floor_ns if type(floor_ns) is int else None)
    with guarding(directory):
        sizes = [(directory / one.name).stat().st_size if one.size is None else one.size for one in known]
        free = 0 if retention.free is None else free_bytes(directory)
    own_sizes = sizes[: len(older)]
    # Segments newer than that one exist only if they are damaged: they count towards the size.
    sizes[len(older) - 1 :] = [sum(sizes[len(older) - 1 :])]
    rules = find_removals(older, sizes, retention, times_ns, free, _spared(state))
    if not rules:
        return None
    over = {older[number].name: Removal(older[number], own_sizes[number], rule) for number, rule in rules.items()}
    oldest_left = next(number for number in range(len(older)) if number not in rules)
    staying = joined(one.epochs for one in [*older, *newer] if one.name not in over)
    between = [older[number].epochs for number in rules if number > oldest_left]
    return Pruning(
        over=over,
        names=frozenset(over),
        gaps=[part for span in joined([*state.pruned, *between]) for part in without(span, staying)],
        oldest=older[0].name,
        oldest_left=older[oldest_left].name,
        taken_ns=times_ns[oldest_left - 1] if oldest_left else None,
    )
