"""The reading side of a history: no lock, nothing is written, a writer may go on meanwhile (specs/store.md §8)."""

from __future__ import annotations

import bisect
import heapq
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from remus_ckpt.disk import appearing, guarding, open_to_read, sync_directory, write_all
from remus_ckpt.errors import BadCheckpoint, Malformed, NoCheckpoint, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.restorer import Anonymous, Checkpoint, Home, Restorer
from remus_ckpt.store import index, segments
from remus_ckpt.store.hashing import HashThread
from remus_ckpt.store.segments import (
    Contents,
    Entry,
    Nowhere,
    first_epoch_of,
    holds_a_record,
    is_segment,
    list_segments,
    replay,
    scan,
    sequence_of,
    walk,
)
from remus_ckpt.store.state import State, load_state
from remus_ckpt.store.stored import Stored
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.xen.reader import Digest

Progress = Callable[[int], None]
"""Called with the bytes read so far."""

_COPY_BYTES = 1 << 22
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_GONE = "it is not there any more"

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Bad:
    """A fault in a segment.

    byte: where in it; section: the rule that is broken there, None where only bytes are missing
    epoch: of the bad checkpoint, None where nothing says which it was
    good: the newest epoch up to it that can be restored, None where there is none
    unreachable: epochs that are known to have been there and stand nowhere else
    """

    segment: str
    byte: int
    reason: str
    section: str | None
    epoch: int | None
    good: int | None
    unreachable: range


@dataclass(frozen=True, slots=True)
class Lost:
    """Checkpoints that were durable and are not there (specs/store.md §4.3).

    segment: that held them; where none is known that did, the one behind them
    byte: where its whole checkpoints end, 0 where it is gone
    epochs: theirs, as far as anything says so
    time_ns: when the first of them was taken, None where nothing says so
    """

    segment: str
    byte: int
    reason: str
    epochs: range = range(0)
    time_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is, and what there was.

    contents: of the segments, oldest first, each summed up
    lost: what was durable and is not there, oldest first
    """

    contents: tuple[Contents, ...]
    lost: tuple[Lost, ...]

    @property
    def newest(self) -> Entry | None:
        """The checkpoint with the highest epoch that is there, in the newest segment that holds it."""
        entries = [one.last for one in reversed(self.contents) if one.last is not None]
        return max(entries, key=lambda entry: entry.epoch, default=None)

    @property
    def oldest(self) -> Entry | None:
        """The one with the lowest."""
        entries = [one.first for one in self.contents if one.first is not None]
        return min(entries, key=lambda entry: entry.epoch, default=None)

    @property
    def count(self) -> int:
        """How many checkpoints there are, each counted once."""
        return sum(map(len, _joined(one.epochs for one in self.contents)))

    @property
    def bytes(self) -> int:
        """Of all segments, up to their last whole checkpoints."""
        return sum(one.end for one in self.contents)

    def lost_behind(self, epoch: int) -> Lost | None:
        """The first that has lost a checkpoint above that epoch."""
        behind = (one for one in self.lost if one.epochs and one.epochs[-1] > epoch)
        return min(behind, key=lambda one: one.epochs[0], default=None)

    def newest_before(self, epoch: int) -> int | None:
        """The highest epoch below that one that is there."""
        return _newest_before([one.epochs for one in self.contents], epoch)


@dataclass(frozen=True, slots=True)
class Report:
    """What `History.verify` found.

    checkpoints, segments, bytes: that were read and are good; a checkpoint that stands in two segments counts twice
    newest: the newest good checkpoint
    unfinished_bytes: behind the last whole checkpoint of the newest segment: one that was, or is, on its way
    """

    checkpoints: int
    segments: int
    bytes: int
    bad: tuple[Bad, ...]
    newest: Entry | None
    unfinished_bytes: int

    @property
    def is_good(self) -> bool:
        """Nothing bad was found."""
        return not self.bad


class History:
    """The checkpoints of one name.

    directory: of that name; raises StoreError where it is no store, or one of a later format
    limits: what its streams may claim
    """

    def __init__(self, directory: str | Path, *, limits: Limits | None = None) -> None:
        self.directory = Path(directory)
        self._limits = limits
        self._index = self.directory / index.FILE
        self._scanned: dict[str, tuple[tuple[int, int], Contents]] = {}
        load_state(self.directory)

    @property
    def state(self) -> State:
        """What store.json says now."""
        return load_state(self.directory)

    @property
    def name(self) -> str:
        """Its name."""
        return self.state.name

    # What there is

    def survey(self) -> Survey:
        """What the segments hold, and what they have held. Raises StoreError."""
        state = self.state
        indexed, names = self._index_and_names()
        contents = []
        for name in names:
            known = indexed.get(name)
            if known is not None and known.size is not None and known.end != known.size and name not in state.damaged:
                known = None  # nothing says why it should hold less than its bytes
            try:
                contents.append(self._contents(name, known))
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{self._path(name)}: {error.strerror}") from error
        self._scanned = {name: one for name, one in self._scanned.items() if name in set(names)}
        return Survey(tuple(contents), tuple(self._lost(state, indexed, names, contents)))

    def _index_and_names(self) -> tuple[dict[str, Contents], list[str]]:
        """The index first: then a segment that it names, and that is not listed, has been removed."""
        for _ in range(_TRIES):
            indexed = index.read_index(self._index) or {}
            names = list_segments(self.directory)
            if all(name in indexed for name in names):
                break
        return indexed, names

    def _lost(
        self,
        state: State,
        indexed: dict[str, Contents],
        names: list[str],
        contents: list[Contents],
        *,
        whole: bool = False,
    ) -> list[Lost]:
        """What was durable and is not in `contents`, oldest first.

        Three things say so: the index; the epochs, which go on from segment to segment without a gap; and store.json.
        whole: the newest segment has been looked at up to its end; else anything may stand behind its last checkpoint
        """
        there = _joined(one.epochs for one in contents)
        gone = self._gone(indexed, state, contents)
        lost: list[Lost] = []
        for name in gone:
            held = indexed.get(name, Contents(name))
            reason = _GONE if name in indexed else str(state.damaged[name])
            lost += self._each_lost(held, 0, reason, held.epochs, there)
        for one, behind in itertools.zip_longest(contents, contents[1:]):
            may_grow = behind is None and not whole
            until = behind.first.epoch if behind is not None and behind.first is not None else 0
            lost += self._missing(one, indexed.get(one.name), there, may_grow, until)
        accounted = _joined([*there, *(one.epochs for one in lost)])
        missing: list[Lost] = []
        numbers = [sequence_of(name) for name in gone]
        reached = -1
        for before, one in itertools.pairwise(contents):
            reached = max(reached, before.epochs[-1] if before.epochs else -1)
            # Where the one before is gone meanwhile, it was pruned, and others with it.
            if reached < 0 or one.first is None or not self._path(before.name).exists():
                continue
            for part in _without(range(reached + 1, one.first.epoch), accounted):
                number = bisect.bisect_right(numbers, sequence_of(before.name))
                if before.name in state.damaged:
                    missing.append(Lost(before.name, before.end, str(state.damaged[before.name]), part))
                elif number < len(gone) and numbers[number] < sequence_of(one.name):
                    name = gone[number]
                    missing.append(Lost(name, 0, str(state.damaged.get(name, _GONE)), part))
                else:
                    reason = f"it begins with checkpoint {one.first.epoch}, and what came before that is missing"
                    missing.append(Lost(one.name, 0, reason, part))
        explained = {one.segment for one in missing}
        lost = [one for one in lost if one.epochs or one.segment not in explained] + missing
        highest, seen = there[-1][-1] if there else -1, state.highest_epoch
        if names and seen is not None and seen > highest and not any(_last(one.epochs) > highest for one in lost):
            # The index was made again since; of what was lost, only this is left.
            newest = next((one for one in reversed(contents) if one.last is not None), None)
            segment, byte = (names[-1], 0) if newest is None else (newest.name, newest.end)
            lost.append(Lost(segment, byte, "what was durable behind this is lost", range(highest + 1, seen + 1)))
        return sorted(lost, key=lambda one: sequence_of(one.segment))

    def _gone(self, indexed: dict[str, Contents], state: State, contents: list[Contents]) -> list[str]:
        """Segments that the index or store.json names and that are not there, but for the oldest: they were pruned."""
        there = {one.name for one in contents}
        named = {*indexed, *filter(is_segment, state.damaged)} - there
        if contents:
            named = {name for name in named if sequence_of(name) > sequence_of(contents[0].name)}
        if named:
            # What is pruned has left them before: it may have been while the segments were looked at.
            still = {*(index.read_index(self._index) or {}), *self.state.damaged}
            now = list_segments(self.directory)
            oldest = sequence_of(now[0]) if now else 0
            named = {name for name in named & still if name not in now and sequence_of(name) > oldest}
        return sorted(named, key=sequence_of)

    def _missing(
        self, one: Contents, known: Contents | None, there: list[range], may_grow: bool, until: int
    ) -> list[Lost]:
        """What a segment that is there has lost.

        may_grow: behind its last checkpoint anything may stand
        until: the first epoch of the segment behind it
        """
        is_short = known is not None and known.end > one.end
        is_bad = one.fault is not None and (known is None or not may_grow)
        if not is_bad and not is_short and one.last is not None:
            return []
        byte, reason = one.end, "its bytes are cut off"
        if one.fault is not None:
            byte, reason = one.fault.offset or one.end, one.fault.message
        if known is not None and is_short:
            return self._each_lost(known, byte, reason, known.epochs[len(one.epochs) :], there)
        # No index says what stood there; that something did, the name says of the base, and the fault of the others.
        first = one.last.epoch + 1 if one.last else first_epoch_of(one.name)
        return self._each_lost(Contents(one.name), byte, reason, range(first, max(first + 1, until)), there)

    def _each_lost(self, held: Contents, byte: int, reason: str, epochs: range, there: list[range]) -> list[Lost]:
        """Those epochs that are not there; without one, that the segment is not what it was."""
        parts = _without(epochs, there)
        found = [Lost(held.name, byte, reason, part, self._time_of(held, part[0])) for part in parts]
        return found or [Lost(held.name, byte, reason)]

    def _time_of(self, contents: Contents, epoch: int) -> int | None:
        """When a checkpoint of a segment was taken, as far as the index says."""
        if contents.first is not None and contents.first.epoch == epoch:
            return contents.first.time_ns
        with index.reading(self._index) as rows, suppress(index.Unreadable):
            if rows is not None and contents.last is not None:
                return rows.find(contents, epoch).time_ns
        return None

    def contents(self) -> list[Contents]:
        """What the segments hold, oldest first: as the index says, and as they say themselves where it does not."""
        return list(self.survey().contents)

    def _contents(self, name: str, known: Contents | None) -> Contents:
        path = self._path(name)
        status = path.stat()
        if known is not None and known.last is not None:
            if known.size == status.st_size or (known.size is None and known.end == status.st_size):
                return known
            if known.size is None and known.end < status.st_size:
                found = scan(path, known=known, end=status.st_size, limits=self._limits)
                if found.fault is None:
                    return found
        version = status.st_size, status.st_mtime_ns
        if name not in self._scanned or self._scanned[name][0] != version:
            self._scanned[name] = version, scan(path, end=status.st_size, limits=self._limits)
        return self._scanned[name][1]

    def checkpoints(self, *, newest_first: bool = False) -> Iterator[Entry]:
        """The durable checkpoints by epoch, each once, in the newest segment that holds it; none of them is kept.

        Raises StoreError. While a writer is at work the last may be one that it is just about to acknowledge, or to
        refuse; what is pruned meanwhile may be left out.
        """
        sign, edge = (-1, -1) if newest_first else (1, 0)
        waiting = [one for one in self.survey().contents if one.epochs]
        waiting.sort(key=lambda one: (sign * one.epochs[edge], -sequence_of(one.name)), reverse=True)
        open_ones: list[tuple[int, int, Entry, Iterator[Entry]]] = []

        def put(one: Iterator[Entry]) -> None:
            if (entry := next(one, None)) is not None:
                heapq.heappush(open_ones, (sign * entry.epoch, -sequence_of(entry.segment), entry, one))

        given = None
        while waiting or open_ones:
            # A segment is opened when its first checkpoint is due: seldom are more than two open at a time.
            while waiting and (not open_ones or sign * waiting[-1].epochs[edge] <= open_ones[0][0]):
                put(self._entries(waiting.pop(), newest_first))
            if not open_ones:
                continue
            _, _, entry, rest = heapq.heappop(open_ones)
            if entry.epoch != given:
                given = entry.epoch
                yield entry
            put(rest)

    def _entries(self, contents: Contents, newest_first: bool = False) -> Iterator[Entry]:
        """The checkpoints of a segment: by the index, and where it does not say, by the segment itself."""
        given: int | None = None
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            for entry in rows.entries(contents, backward=newest_first) if rows else ():
                given = entry.epoch
                yield entry
        if given == contents.epochs[0 if newest_first else -1]:
            return
        found: Iterable[Entry] = self._walk(contents)
        for entry in reversed(list(found)) if newest_first else found:
            if given is None or (entry.epoch < given if newest_first else entry.epoch > given):
                yield entry

    def _walk(self, contents: Contents) -> Iterator[Entry]:
        """The checkpoints of a segment as its bytes say them. Raises StoreError."""
        path = self._path(contents.name)
        try:
            yield from walk(path, Contents(contents.name), end=contents.end, limits=self._limits)
        except FileNotFoundError:
            return  # pruned since
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def _entry(self, contents: Contents, epoch: int) -> Entry | None:
        for edge in (contents.first, contents.last):
            if edge is not None and edge.epoch == epoch:
                return edge
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            if rows is not None:
                return rows.find(contents, epoch)
        return next((entry for entry in self._walk(contents) if entry.epoch == epoch), None)

    def _entry_until(self, contents: Contents, time_ns: int) -> Entry | None:
        """The newest of a segment that was not taken later."""
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            if rows is not None and self._is_indexed(rows, contents):
                return rows.newest_until(contents, time_ns)
        found = None
        for entry in self._walk(contents):
            if entry.time_ns is not None and entry.time_ns <= time_ns:
                found = entry
        return found

    @staticmethod
    def _is_indexed(rows: index.Rows, contents: Contents) -> bool:
        assert contents.first is not None and contents.last is not None
        edges = contents.first, contents.last
        return all(rows.find(contents, edge.epoch) == edge for edge in edges)

    def entries(self) -> list[Entry]:
        """All `checkpoints` in a list: of a long history that is much memory."""
        return list(self.checkpoints())

    def lost(self) -> list[Lost]:
        """What was durable and is not there any more, as far as anything is left that says so; oldest first."""
        return list(self.survey().lost)

    def __len__(self) -> int:
        """How many durable checkpoints there are. Raises StoreError."""
        return self.survey().count

    def __getitem__(self, number: int) -> Stored:
        """A checkpoint by its place: 0 is the oldest, -1 the newest. By its epoch or time, `at` finds it.

        Raises IndexError where there are not so many, StoreError.
        """
        ranges = _joined(one.epochs for one in self.survey().contents)
        left = number if number >= 0 else number + sum(map(len, ranges))
        for epochs in ranges if left >= 0 else ():
            if left < len(epochs):
                return Stored(self, self.find(epochs[left]))
            left -= len(epochs)
        raise IndexError(f"{self.directory} has no checkpoint number {number}: it holds {sum(map(len, ranges))}")

    def __iter__(self) -> Iterator[Stored]:
        """The durable checkpoints, oldest first. Raises StoreError."""
        for entry in self.checkpoints():
            yield Stored(self, entry)

    def at(self, at: int | datetime) -> Stored:
        """A checkpoint by its epoch, or the last one not after a time. Raises as `find`."""
        return Stored(self, self.find(at))

    def newest(self) -> Entry | None:
        """The newest durable checkpoint that is there."""
        return self.survey().newest

    def find(self, at: int | datetime | None = None) -> Entry:
        """A checkpoint by its epoch; the last one not after a time; or the newest.

        Where clocks were wrong, the last one is looked for from the newest segment backwards, passing over segments
        that begin and end after that time.
        Raises NoCheckpoint, BadCheckpoint where it was durable and is lost.
        """
        survey = self.survey()
        newest, oldest = survey.newest, survey.oldest
        highest = -1 if newest is None else newest.epoch
        lost = survey.lost_behind(highest)
        if at is None and lost is not None:
            raise _is_lost(lost, survey, highest + 1)
        if isinstance(at, int):
            for one in reversed(survey.contents):
                if at in one.epochs and (entry := self._entry(one, at)) is not None:
                    return entry
            for gone in survey.lost:
                if at in gone.epochs:
                    raise _is_lost(gone, survey, at)
        if newest is None or oldest is None:
            raise NoCheckpoint(f"{self.directory}: no checkpoint is complete")
        if at is None:
            return newest
        held = f"it holds {survey.count} from {oldest.epoch} to {highest}"
        if lost is not None:
            held += f", and has held them up to {lost.epochs[-1]}"
        if isinstance(at, int):
            raise NoCheckpoint(f"{self.directory}: no checkpoint {at}; {held}")
        until = (at.astimezone(UTC) - _1970) // timedelta(microseconds=1) * 1_000
        found = self._find_until(survey, min(max(until, -(1 << 63)), (1 << 63) - 1))
        reached = -1 if found is None else found.epoch
        if (then := survey.lost_behind(reached)) is not None:
            # Of one whose time nothing says it is only known that it was taken right behind the one that was found.
            may_be = then.epochs[0] <= reached + 1 and (found is None or found.time_ns != until)
            if may_be if then.time_ns is None else then.time_ns <= until:
                raise _is_lost(then, survey, reached + 1)
        if found is None:
            raise NoCheckpoint(f"{self.directory}: no checkpoint that was taken at {at} or before; {held}")
        return found

    def _find_until(self, survey: Survey, time_ns: int) -> Entry | None:
        by_age = sorted(survey.contents, key=lambda one: (_last(one.epochs), sequence_of(one.name)), reverse=True)
        for one in by_age:
            edges = [edge.time_ns for edge in (one.first, one.last) if edge is not None and edge.time_ns is not None]
            if edges and min(edges) <= time_ns and (found := self._entry_until(one, time_ns)) is not None:
                return found
        return None

    # Reading back

    def restore(self, at: int | datetime | None = None, progress: Progress | None = None) -> Checkpoint:
        """A checkpoint with its memory, in this process.

        Raises NoCheckpoint, BadCheckpoint where it has changed on disk, StoreError.
        """
        return self._read(at, Anonymous(), progress)[0]

    def restore_image(
        self,
        path: str | Path,
        at: int | datetime | None = None,
        progress: Progress | None = None,
        *,
        sync: bool = True,
    ) -> Checkpoint:
        """A checkpoint's memory as a file of mode 0600, zero pages as holes. The file appears when it is whole.

        sync: it is durable when this returns
        The memory of what is returned is that file, mapped. Raises as `restore`.
        """
        target = Path(path)
        self.find(at)
        with guarding(target):
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
        home = MappedFile(temporary)
        try:
            checkpoint, _ = self._read(at, home, progress)
            home.cut(checkpoint.memory_bytes)
            if sync:
                home.sync()
            with guarding(target):
                os.replace(temporary, target)
                if sync:
                    sync_directory(target.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        finally:
            home.close()
        return checkpoint

    def export(self, path: str | Path, at: int | datetime | None = None, progress: Progress | None = None) -> Entry:
        """A segment up to a checkpoint, checked, as a file of mode 0600 or, for "-", to standard output: a save stream.

        Raises as `restore`, and OSError where standard output cannot be written.
        """
        _, entry = self._read(at, Nowhere(), progress)
        source = self._open(entry)
        try:
            if str(path) == "-":
                _copy(source, 1, entry.end)
                return entry
            with guarding(path), appearing(Path(path)) as descriptor:
                _copy(source, descriptor, entry.end)
        finally:
            os.close(source)
        return entry

    def _read(self, at: int | datetime | None, home: Home, progress: Progress | None) -> tuple[Checkpoint, Entry]:
        """Put a checkpoint into a home. The newest may be compacted and pruned meanwhile: then there is a newer one."""
        for _ in range(_TRIES):
            try:
                return self._read_entry(self.find(at), home, progress)
            except NoCheckpoint:
                if at is not None:
                    raise
        return self._read_entry(self.find(at), home, progress)

    def _read_entry(self, entry: Entry, home: Home, progress: Progress | None) -> tuple[Checkpoint, Entry]:
        """From another segment that holds it too where one is bad."""
        first: BadCheckpoint | NoCheckpoint | None = None
        # The copies are looked for when they are needed: a compaction may have made one, and what it was made of gone.
        for copy in itertools.chain([entry], self._copies(entry)):
            try:
                return self._replay(copy, home, progress), copy
            except (BadCheckpoint, NoCheckpoint) as error:
                first = first or error
        assert first is not None
        raise first

    def _copies(self, entry: Entry) -> Iterator[Entry]:
        """The same checkpoint elsewhere: the base of a compaction is also the end of the segment before it."""
        for one in self.contents():
            if one.name != entry.segment and entry.epoch in one.epochs:
                copy = self._entry(one, entry.epoch)
                if copy is not None and copy.position == entry.position:
                    yield copy
            elif one.name == entry.segment:
                # The index may have a wrong row for it.
                yield from (found for found in self._walk(one) if found.epoch == entry.epoch and found != entry)

    def _replay(self, entry: Entry, home: Home, progress: Progress | None) -> Checkpoint:
        fd = self._open(entry)
        try:
            with hashing() as new_digest:
                restorer = Restorer(limits=self._limits, home=home, new_digest=new_digest)
                fault: StreamError | None = None
                try:
                    for _ in replay(fd, restorer, end=entry.end, advance=progress):
                        if isinstance(home, Nowhere):
                            restorer.skip()
                        else:
                            restorer.commit()
                except StreamError as error:
                    fault = error
        except OSError as error:
            raise StoreError(f"{self._path(entry.segment)}: {error.strerror}") from error
        finally:
            os.close(fd)
        held = restorer.in_force
        if fault is None and held is not None and held.record is not None and held.record.after == entry.position:
            return held
        raise self._bad(entry, restorer, fault)

    def _bad(self, entry: Entry, restorer: Restorer, fault: StreamError | None) -> BadCheckpoint:
        held = restorer.in_force
        end = restorer.boundary.offset
        epoch = first_epoch_of(entry.segment) if held is None else held.epoch + 1
        others = [one.epochs for one in self.contents() if one.name != entry.segment]
        good = _newest_before(others if held is None else [*others, range(held.epoch, held.epoch + 1)], entry.epoch)
        reason = "its bytes are cut off" if fault is None else fault.message
        offered = "no checkpoint before it is there" if good is None else f"the newest before it is {good}"
        return BadCheckpoint(
            f"{reason}; checkpoint {epoch} and those behind it in this segment cannot be read, {offered}",
            segment=entry.segment,
            epoch=epoch,
            good=good,
            offset=end if fault is None or fault.offset is None else fault.offset,
            section="store.md §4.3" if fault is None else fault.section,
        )

    def verify(self, progress: Progress | None = None) -> Report:
        """Read back every checkpoint, and check every byte of it. Raises StoreError where a file cannot be read."""
        indexed, names = self._index_and_names()
        read: list[Contents] = []
        done = unfinished = 0
        for name in names:
            path = self._path(name)
            try:
                size = path.stat().st_size
                base = done
                advance = (lambda at, base=base: progress(base + at)) if progress else None
                one = scan(path, end=size, limits=self._limits, advance=advance)
                done += size
                if one.fault is None and size > one.end:
                    known = indexed.get(name)
                    is_cut_short = known is not None and known.end > one.end
                    if name == names[-1] and not is_cut_short and not self._is_more_than_cut(one, size):
                        unfinished = size - one.end
                    else:
                        one.fault = Malformed("its bytes are cut off", offset=one.end)
                read.append(one)
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{path}: {error.strerror}") from error
        survey = Survey(tuple(read), tuple(self._lost(self.state, indexed, names, read, whole=True)))
        by_name = {one.name: one for one in read}
        return Report(
            checkpoints=sum(len(one.epochs) for one in read),
            segments=len(read),
            bytes=survey.bytes,
            bad=tuple(_bad_of(lost, by_name.get(lost.segment), survey) for lost in survey.lost),
            newest=survey.newest,
            unfinished_bytes=unfinished,
        )

    def _is_more_than_cut(self, one: Contents, size: int) -> bool:
        if one.last is None:
            return True  # a segment has its name only since its base was durable
        path = self._path(one.name)
        with guarding(path):
            fd = open_to_read(path)
            try:
                return holds_a_record(fd, one.last.position, one.end, size)
            finally:
                os.close(fd)

    def _path(self, segment: str) -> Path:
        return self.directory / segments.DIRECTORY / segment

    def _open(self, entry: Entry) -> int:
        path = self._path(entry.segment)
        try:
            return open_to_read(path)
        except FileNotFoundError:
            raise NoCheckpoint(f"{path} is gone: checkpoint {entry.epoch} has been pruned") from None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error


def _joined(spans: Iterable[range]) -> list[range]:
    """Ranges of consecutive numbers as ranges that do not touch, ascending."""
    joined: list[range] = []
    for span in sorted((span for span in spans if span), key=lambda span: span[0]):
        if joined and span[0] <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def _without(span: range, there: list[range]) -> list[range]:
    """What is left of a range without those, which are `_joined`."""
    left = []
    start = span.start
    first = bisect.bisect_right(there, span.start, key=lambda one: one.start) - 1
    for one in there[max(first, 0) :]:
        if one.start >= span.stop:
            break
        if one.start > start:
            left.append(range(start, one.start))
        start = max(start, one.stop)
    if start < span.stop:
        left.append(range(start, span.stop))
    return left


def _last(span: range) -> int:
    return span[-1] if span else -1


def _newest_before(spans: Iterable[range], epoch: int) -> int | None:
    return max((min(span[-1], epoch - 1) for span in spans if span and span[0] < epoch), default=None)


def _is_lost(lost: Lost, survey: Survey, at: int) -> BadCheckpoint:
    """What is said of the first checkpoint of these that is not below `at`."""
    epoch = max(at, lost.epochs[0])
    good = survey.newest_before(epoch)
    offered = "no checkpoint before it is there" if good is None else f"the newest before it is {good}"
    last = "" if lost.epochs[-1] == epoch else f" (and more, up to {lost.epochs[-1]})"
    return BadCheckpoint(
        f"{lost.reason}; checkpoint {epoch}{last} was committed and is lost with it, {offered}",
        segment=lost.segment,
        epoch=epoch,
        good=good,
        offset=lost.byte,
        section="store.md §4.3",
    )


def _bad_of(lost: Lost, one: Contents | None, survey: Survey) -> Bad:
    """one: what that segment holds, None where it is gone"""
    fault = None if one is None or one.fault is None or not (lost.byte or one.last is None) else one.fault
    if one is not None and (lost.byte or one.last is None):
        epoch = one.last.epoch + 1 if one.last else first_epoch_of(one.name)
    else:
        epoch = lost.epochs[0] if lost.epochs else first_epoch_of(lost.segment)
    section = None if fault is None else fault.section
    return Bad(lost.segment, lost.byte, lost.reason, section, epoch, survey.newest_before(epoch + 1), lost.epochs)


@contextmanager
def hashing() -> Iterator[Callable[[], Digest]]:
    """Digests by a second thread, for the time of the block."""
    thread = HashThread()
    try:
        yield thread.new
    finally:
        thread.close()


def _copy(source: int, target: int, size: int) -> None:
    """The first bytes of a file. Raises OSError."""
    block = np.empty(min(size, _COPY_BYTES), dtype=np.uint8)
    at = 0
    while at < size:
        count = os.preadv(source, [memoryview(block)[: size - at]], at)
        if not count:
            raise OSError(0, "the segment has become shorter")
        write_all(target, [block[:count]])
        at += count
