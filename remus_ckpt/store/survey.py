"""What the segments of a history hold, and which checkpoints are lost (specs/store.md §4.3, §8)."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from remus_ckpt.disk import open_to_read
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.store import index, segments
from remus_ckpt.store.segments import Contents, Entry, first_epoch_of, is_segment, list_segments, scan, sequence_of
from remus_ckpt.store.state import State, load_state
from remus_ckpt.store.unwritten import data_end

_GONE = "it is gone"
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Lost:
    """Checkpoints that were durable and are missing (specs/store.md §4.3).

    segment: the one that held them; if that is unknown, the one after them
    byte: the end of its whole checkpoints, 0 if it is gone
    epochs: of the missing checkpoints, as far as known
    time_ns: when the first of them was taken, None if unknown
    """

    segment: str
    byte: int
    reason: str
    epochs: range = range(0)
    time_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """The checkpoints that exist, and those that are lost.

    contents: of the segments, oldest first, each summed up
    lost: what was durable and is missing, oldest first
    """

    contents: tuple[Contents, ...]
    lost: tuple[Lost, ...]

    @property
    def newest(self) -> Entry | None:
        """The existing checkpoint with the highest epoch, from the newest segment that holds it."""
        entries = [one.last for one in reversed(self.contents) if one.last is not None]
        return max(entries, key=lambda entry: entry.epoch, default=None)

    @property
    def oldest(self) -> Entry | None:
        """The existing checkpoint with the lowest epoch."""
        entries = [one.first for one in self.contents if one.first is not None]
        return min(entries, key=lambda entry: entry.epoch, default=None)

    @property
    def count(self) -> int:
        """How many checkpoints there are, each counted once."""
        return sum(map(len, joined(one.epochs for one in self.contents)))

    @property
    def bytes(self) -> int:
        """The bytes of all segments, up to their last whole checkpoints."""
        return sum(one.end for one in self.contents)

    def lost_behind(self, epoch: int) -> Lost | None:
        """The first loss that includes a checkpoint above that epoch."""
        behind = (one for one in self.lost if one.epochs and one.epochs[-1] > epoch)
        return min(behind, key=lambda one: one.epochs[0], default=None)

    def newest_before(self, epoch: int) -> int | None:
        """The highest existing epoch below that one."""
        return newest_before([one.epochs for one in self.contents], epoch)


class Surveyor:
    """Examines the segments of a history; writes nothing, and may run beside a writer.

    directory: of the history; limits: what its streams may claim
    """

    def __init__(self, directory: Path, limits: Limits | None) -> None:
        self.directory = directory
        self._segments = directory / segments.DIRECTORY
        self._limits = limits
        self._index = directory / index.FILE
        self._scanned: dict[str, tuple[tuple[int, int], Contents]] = {}

    def survey(self) -> Survey:
        """What the segments hold now, and what they once held. Raises StoreError."""
        state = load_state(self.directory)
        indexed, names = self.index_and_names()
        contents = []
        for name in names:
            known = indexed.get(name)
            if known is not None and known.size is not None and known.end != known.size and name not in state.damaged:
                known = None  # nothing explains why it should hold less than its bytes
            try:
                contents.append(self.look_at(name, known))
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{self._segments / name}: {error.strerror}") from error
        there = set(names)
        self._scanned = {name: one for name, one in self._scanned.items() if name in there}
        return Survey(tuple(contents), tuple(self.lost(state, indexed, names, contents)))

    def index_and_names(self) -> tuple[dict[str, Contents], list[str]]:
        """Read the index, then list the segments: in that order, a segment named but not listed has been removed."""
        for _ in range(_TRIES):
            indexed = index.read_index(self._index) or {}
            names = list_segments(self.directory)
            if all(name in indexed for name in names):
                break
        return indexed, names

    def lost(
        self,
        state: State,
        indexed: dict[str, Contents],
        names: list[str],
        contents: list[Contents],
        *,
        whole: bool = False,
    ) -> list[Lost]:
        """What was durable and is not in `contents`, oldest first.

        Three things reveal losses: the index; a gap between the epochs of two segments, which should be consecutive;
        and store.json.
        whole: the newest segment has been read to its end; otherwise anything may follow its last checkpoint
        """
        there = joined(one.epochs for one in contents)
        # Read now: retention names what it removes from between others before it does so.
        kept_or_pruned = joined([*there, *load_state(self.directory).pruned])
        gone = self._gone(indexed, state, contents, kept_or_pruned)
        lost: list[Lost] = []
        for name in gone:
            held = indexed.get(name, Contents(name))
            reason = _GONE if name in indexed else str(state.damaged[name])
            lost += self._each_lost(held, 0, reason, held.epochs, kept_or_pruned)
        for one, behind in itertools.zip_longest(contents, contents[1:]):
            may_grow = behind is None and not whole
            until = behind.first.epoch if behind is not None and behind.first is not None else 0
            lost += self._missing(one, indexed.get(one.name), kept_or_pruned, may_grow, until)
        accounted = joined([*kept_or_pruned, *(one.epochs for one in lost)])
        missing: list[Lost] = []
        numbers = [sequence_of(name) for name in gone]
        reached = -1
        for before, one in itertools.pairwise(contents):
            reached = max(reached, before.epochs[-1] if before.epochs else -1)
            # If the previous segment has disappeared meanwhile, it was pruned, perhaps with others.
            if reached < 0 or one.first is None or not (self._segments / before.name).exists():
                continue
            for part in without(range(reached + 1, one.first.epoch), accounted):
                number = bisect.bisect_right(numbers, sequence_of(before.name))
                if before.name in state.damaged:
                    missing.append(Lost(before.name, before.end, str(state.damaged[before.name]), part))
                elif number < len(gone) and numbers[number] < sequence_of(one.name):
                    name = gone[number]
                    missing.append(Lost(name, 0, str(state.damaged.get(name, _GONE)), part))
                else:
                    reason = f"it begins with checkpoint {one.first.epoch}; the checkpoints before that are missing"
                    missing.append(Lost(one.name, 0, reason, part))
        explained = {one.segment for one in missing}
        lost = [one for one in lost if one.epochs or one.segment not in explained] + missing
        highest, seen = there[-1][-1] if there else -1, state.highest_epoch
        if names and seen is not None and seen > highest and not any(last(one.epochs) > highest for one in lost):
            # The index has been rebuilt since; this is the only trace left of what was lost.
            newest = next((one for one in reversed(contents) if one.last is not None), None)
            segment, byte = (names[-1], 0) if newest is None else (newest.name, newest.end)
            lost.append(Lost(segment, byte, "everything durable after this is lost", range(highest + 1, seen + 1)))
        return sorted(lost, key=lambda one: sequence_of(one.segment))

    def _gone(
        self, indexed: dict[str, Contents], state: State, contents: list[Contents], kept_or_pruned: list[range]
    ) -> list[str]:
        """Segments that the index or store.json names and that are missing, except those that were pruned: the oldest,
        and those between others that held only what is `kept_or_pruned`."""
        there = {one.name for one in contents}
        named = {*indexed, *filter(is_segment, state.damaged)} - there
        if contents:
            named = {name for name in named if sequence_of(name) > sequence_of(contents[0].name)}
        if named:
            # Pruning removes the names first, and may have done so while we examined the segments.
            still = {*(index.read_index(self._index) or {}), *load_state(self.directory).damaged}
            now = list_segments(self.directory)
            oldest = sequence_of(now[0]) if now else 0
            newest = sequence_of(now[-1]) if now else 0
            named = {
                name
                for name in (named & still).difference(now)
                if sequence_of(name) > newest
                or (sequence_of(name) > oldest and not was_pruned(indexed.get(name), kept_or_pruned))
            }
        return sorted(named, key=sequence_of)

    def _missing(
        self, one: Contents, known: Contents | None, kept_or_pruned: list[range], may_grow: bool, until: int
    ) -> list[Lost]:
        """What an existing segment has lost.

        may_grow: anything may follow its last checkpoint
        until: the first epoch of the next segment
        """
        is_short = known is not None and known.end > one.end
        is_bad = one.fault is not None and (known is None or not may_grow)
        if not is_bad and not is_short and one.last is not None:
            return []
        byte, reason = one.end, "its bytes are cut off"
        if one.fault is not None:
            byte, reason = one.fault.offset or one.end, one.fault.message
        if known is not None and is_short:
            return self._each_lost(known, byte, reason, known.epochs[len(one.epochs) :], kept_or_pruned)
        # No index says what was there. The name proves that there was a base, and the fault that there was more.
        first = one.last.epoch + 1 if one.last else first_epoch_of(one.name)
        epochs = range(first, max(first + 1, until))
        return self._each_lost(Contents(one.name), byte, reason, epochs, kept_or_pruned)

    def _each_lost(
        self, held: Contents, byte: int, reason: str, epochs: range, kept_or_pruned: list[range]
    ) -> list[Lost]:
        """The losses for those of `epochs` that are missing; if none is, a loss without epochs: the segment has
        changed."""
        parts = without(epochs, kept_or_pruned)
        found = [Lost(held.name, byte, reason, part, self._time_of(held, part[0])) for part in parts]
        return found or [Lost(held.name, byte, reason)]

    def _time_of(self, contents: Contents, epoch: int) -> int | None:
        """When a checkpoint of a segment was taken, if the index says so."""
        if contents.first is not None and contents.first.epoch == epoch:
            return contents.first.time_ns
        with index.reading(self._index) as rows, suppress(index.Unreadable):
            if rows is not None and contents.last is not None:
                return rows.find(contents, epoch).time_ns
        return None

    def look_at(self, name: str, known: Contents | None) -> Contents:
        """What one segment holds: from the index, if its answer is possible, else from the bytes. Raises OSError."""
        path = self._segments / name
        status = path.stat()
        if known is not None and known.last is not None:
            if known.size == status.st_size or (known.size is None and known.end == status.st_size):
                return known
            if known.size is None and known.end < status.st_size:
                if _ends_at(path, known.end, status.st_size):
                    return known
                found = scan(path, known=known, end=status.st_size, limits=self._limits)
                if found.fault is None:
                    return found
        version = status.st_size, status.st_mtime_ns
        held = self._scanned.get(name)
        # Within space that was written ahead, data grow without the file, and faster than the clock of its time.
        if held is None or held[0] != version or not _ends_at(path, held[1].end, status.st_size):
            held = self._scanned[name] = version, scan(path, end=status.st_size, limits=self._limits)
        return held[1]


def _ends_at(path: Path, end: int, size: int) -> bool:
    """Whether nothing was written after these bytes of a file. Raises OSError."""
    if end == size:
        return True
    fd = open_to_read(path)
    try:
        return data_end(fd, end, size) == end
    finally:
        os.close(fd)


def joined(spans: Iterable[range]) -> list[range]:
    """Join ranges that overlap or touch; the result is ascending."""
    found: list[range] = []
    for span in sorted((span for span in spans if span), key=lambda span: span[0]):
        if found and span[0] <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


def without(span: range, there: list[range]) -> list[range]:
    """What is left of a range without the ranges in `there`, which are `joined`."""
    left = []
    start = span.start
    number = max(bisect.bisect_right(there, span.start, key=lambda one: one.start) - 1, 0)
    while number < len(there) and there[number].start < span.stop:
        one = there[number]
        if one.start > start:
            left.append(range(start, one.start))
        start = max(start, one.stop)
        number += 1
    if start < span.stop:
        left.append(range(start, span.stop))
    return left


def was_pruned(known: Contents | None, kept_or_pruned: list[range]) -> bool:
    """Whether a segment that is missing between others was pruned, by what the index still says of it: the index may
    be older than the removal, after a loss of power."""
    return known is not None and bool(known.epochs) and not without(known.epochs, kept_or_pruned)


def last(span: range) -> int:
    """The last number of a range, −1 for none."""
    return span[-1] if span else -1


def newest_before(spans: Iterable[range], epoch: int) -> int | None:
    """The highest number below that one in any of the ranges, None for none."""
    return max((min(span[-1], epoch - 1) for span in spans if span and span[0] < epoch), default=None)
