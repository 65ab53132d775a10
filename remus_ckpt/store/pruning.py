"""Removes what retention no longer keeps, a few segments at a time (specs/store.md §7.2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from remus_ckpt.disk import guarding, sync_directory
from remus_ckpt.store.index import Index
from remus_ckpt.store.retention import Retention, count_over, times_taken
from remus_ckpt.store.segments import first_epoch_of, is_segment, sequence_of
from remus_ckpt.store.state import State, StateFile

_BATCH = 16
"""Few enough that a checkpoint which waits for their removal is not late."""


class Pruner:
    """Removes the oldest segments, a few at a time. The caller holds the writer's lock.

    directory: of the segments; index, state: of the history
    on_phase: called with "pruning" and an epoch before each removal
    """

    def __init__(self, directory: Path, index: Index, state: StateFile, on_phase: Callable[[str, int], None]) -> None:
        self._directory, self._index, self._state = directory, index, state
        self._on_phase = on_phase
        self._pruning: Pruning | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether segments are still to be removed."""
        return self._pruning is not None

    def begin(self, newest: str, retention: Retention, now_ns: int) -> list[str]:
        """Find the segments to remove now, and return their names. Raises StoreError.

        newest: the segment with the newest checkpoint; now_ns: the time on this machine's clock
        """
        state = self._state.state
        self._pruning = None
        if retention != Retention():
            self._pruning = find_over(self._directory, self._index, newest, state, retention, now_ns)
        return [] if self._pruning is None else list(self._pruning.over)

    def remove_some(self) -> None:
        """Remove the next few segments. Raises StoreError."""
        if (pruning := self._pruning) is None:
            return
        pruning.remove_some(self._directory, self._index, self._on_phase)
        if not pruning.over:
            self._pruning = None
            if (state := pruning.state_behind(self._state.state)) != self._state.state:
                self._state.save(state)

    def give_up(self) -> None:
        """Stop pruning; the remaining segments are found the next time."""
        self._pruning = None


@dataclass(slots=True)
class Pruning:
    """Segments to remove.

    over: segment → the epoch of its last checkpoint, oldest first; without those already removed
    oldest_left: the sequence number of the first segment that stays
    taken_ns: when the newest checkpoint of the last removed segment was taken, None if unknown
    """

    over: dict[str, int]
    oldest_left: int
    taken_ns: int | None

    def remove_some(self, directory: Path, index: Index, on_phase: Callable[[str, int], None]) -> None:
        """Remove the next few segments from the directory. Raises StoreError."""
        batch = dict(islice(self.over.items(), _BATCH))
        with guarding(directory):
            # The index first: if we die here, a segment that the index does not name is found again.
            index.drop(batch)
            for name, epoch in batch.items():
                on_phase("pruning", epoch)
                (directory / name).unlink(missing_ok=True)
                del self.over[name]
            sync_directory(directory)

    def state_behind(self, state: State) -> State:
        """The new contents of store.json: without the pruned segments, but with the time of the last of them."""
        damaged = {
            name: why
            for name, why in state.damaged.items()
            if is_segment(name) and sequence_of(name) >= self.oldest_left
        }
        more = state.more if self.taken_ns is None else {**state.more, "pruned_ns": self.taken_ns}
        return replace(state, damaged=damaged, more=more)


def find_over(
    directory: Path, index: Index, newest: str, state: State, retention: Retention, now_ns: int
) -> Pruning | None:
    """Which of the segments in the index retention removes; None if all of them stay. Raises StoreError.

    newest: the segment with the newest checkpoint; now_ns: the time on this machine's clock
    """
    older = [one for one in index.known.values() if sequence_of(one.name) <= sequence_of(newest)]
    newer = [one for one in index.known.values() if sequence_of(one.name) > sequence_of(newest)]

    def written_ns(name: str) -> int | None:
        with suppress(OSError):
            return (directory / name).stat().st_mtime_ns
        return None

    times_ns: list[int | None] = [None] * len(older)
    if retention.age_s is not None:
        floor_ns = state.more.get("pruned_ns")
        times_ns = times_taken(older, written_ns, now_ns, floor_ns if type(floor_ns) is int else None)
    with guarding(directory):
        sizes = [(directory / one.name).stat().st_size if one.size is None else one.size for one in [*older, *newer]]
    # Segments newer than that one exist only if they are damaged: they count towards the size.
    sizes[len(older) - 1 :] = [sum(sizes[len(older) - 1 :])]
    count = count_over(older, sizes, retention, times_ns)
    if not count:
        return None
    over = {one.name: one.last.epoch if one.last else first_epoch_of(one.name) for one in older[:count]}
    return Pruning(over, sequence_of(older[count].name), times_ns[count - 1])
