"""The reading side of a history: no lock, nothing is written, a writer may go on meanwhile (specs/store.md §8)."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from remus_ckpt.errors import BadCheckpoint, NoCheckpoint, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.restorer import Anonymous, Checkpoint, Home, Restorer
from remus_ckpt.store import index, segments
from remus_ckpt.store.disk import appearing, guarding, sync_directory, write_all
from remus_ckpt.store.hashing import HashThread
from remus_ckpt.store.segments import (
    Contents,
    Entry,
    Nowhere,
    holds_a_record,
    is_segment,
    list_segments,
    replay,
    scan,
    sequence_of,
)
from remus_ckpt.store.state import State, load_state
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.reader import Digest

Progress = Callable[[int], None]
"""Called with the bytes read so far."""

_COPY_BYTES = 1 << 22

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Bad:
    """A fault in a segment.

    byte: where in it; section: the rule that is broken there, None where only bytes are missing
    epoch: of the bad checkpoint, None where nothing says which it was
    good: the newest epoch up to it that can be restored, None where there is none
    unreachable: epochs that are known of and stand nowhere else, ascending
    """

    segment: str
    byte: int
    reason: str
    section: str | None
    epoch: int | None
    good: int | None
    unreachable: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A segment that does not hold what it held when it was durable (specs/store.md §4.3).

    byte: where its whole checkpoints end, 0 where it is gone
    epochs: of checkpoints that are known of and stand nowhere else, ascending; times_ns: when each was taken
    """

    segment: str
    byte: int
    reason: str
    epochs: tuple[int, ...] = ()
    times_ns: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is, and what there was.

    contents: of the segments, oldest first; entries: their checkpoints by epoch, each once
    lost: what was durable and is not there, oldest first
    """

    contents: tuple[Contents, ...]
    entries: tuple[Entry, ...]
    lost: tuple[Lost, ...]

    def lost_behind(self, epoch: int, until_ns: float | None = None) -> Lost | None:
        """The first that has lost a checkpoint above that epoch, and not taken later than that."""
        for one in self.lost:
            for number, time_ns in zip(one.epochs, one.times_ns, strict=True):
                if number > epoch and (until_ns is None or (time_ns is not None and time_ns <= until_ns)):
                    return one
        return None


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
        """What the segments hold, and what the index knows that they have held. Raises StoreError."""
        state = self.state
        indexed, names = self._index_and_names()
        contents = []
        for name in names:
            try:
                contents.append(self._contents(name, indexed.get(name)))
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{self._path(name)}: {error.strerror}") from error
        found = {entry.epoch: entry for one in contents for entry in one.entries}
        entries = tuple(found[epoch] for epoch in sorted(found))
        lost = self._gone(indexed, contents, found)
        for number, one in enumerate(contents):
            if (missing := self._missing(one, indexed.get(one.name), found, number == len(contents) - 1)) is not None:
                lost.append(missing)
        lost += self._gone_before(state, names, lost)
        lost.sort(key=lambda one: sequence_of(one.segment))
        newest = entries[-1] if entries else None
        highest = -1 if newest is None else newest.epoch
        seen = -1 if state.highest_epoch is None else state.highest_epoch
        if names and seen > highest and not any(epoch > highest for one in lost for epoch in one.epochs):
            # The index was made again since; of what was lost, only this is left.
            segment, byte = (names[-1], 0) if newest is None else (newest.segment, newest.end)
            lost.append(Lost(segment, byte, "what was durable behind this is lost", (seen,), (None,)))
        return Survey(tuple(contents), entries, tuple(lost))

    def _index_and_names(self) -> tuple[dict[str, Contents], list[str]]:
        """The index first: then a segment that it names, and that is not listed, has been removed."""
        for _ in range(_TRIES):
            indexed = index.read_index(self.directory / index.FILE) or {}
            names = list_segments(self.directory)
            if all(name in indexed for name in names):
                break
        return indexed, names

    def _gone(self, indexed: dict[str, Contents], contents: list[Contents], found: dict[int, Entry]) -> list[Lost]:
        """Segments that the index names and that are not there, but for the oldest: those were pruned."""
        there = {one.name for one in contents}
        gone = [name for name in indexed if name not in there]
        if contents:
            gone = [name for name in gone if sequence_of(name) > sequence_of(contents[0].name)]
        if gone:
            # What is pruned has left the index before: it may have been while the segments were looked at.
            still = index.read_index(self.directory / index.FILE) or {}
            gone = [name for name in gone if name in still and not self._path(name).exists()]
        return [_lost(name, 0, "it is not there any more", indexed[name].entries, found) for name in gone]

    def _gone_before(self, state: State, names: list[str], known: list[Lost]) -> list[Lost]:
        """Segments that a writer has found gone, and whose checkpoints no index names any more."""
        there = {*names, *(one.segment for one in known)}
        gone = [name for name in state.damaged if is_segment(name) and name not in there]
        if names:
            gone = [name for name in gone if sequence_of(name) > sequence_of(names[0])]
        return [Lost(name, 0, str(state.damaged[name])) for name in gone]

    def _missing(self, one: Contents, known: Contents | None, found: dict[int, Entry], is_last: bool) -> Lost | None:
        """What a segment that is there has lost. Behind the newest that is durable anything may stand."""
        missing = [] if known is None else [entry for entry in known.entries if entry.end > one.end]
        is_bad = one.fault is not None and (known is None or not is_last)
        if not is_bad and not missing and one.entries:
            return None
        byte, reason = one.end, "its bytes are cut off"
        if one.fault is not None:
            byte, reason = one.fault.offset or one.end, one.fault.message
        if missing:
            return _lost(one.name, byte, reason, missing, found)
        # No index says what stood there; that something did, the name says of the base, and the fault of the others.
        first = one.entries[-1].epoch + 1 if one.entries else int(one.name[:20])
        return Lost(one.name, byte, reason) if first in found else Lost(one.name, byte, reason, (first,), (None,))

    def contents(self) -> list[Contents]:
        """What the segments hold, oldest first: as the index says, and as they say themselves where it does not."""
        return list(self.survey().contents)

    def _contents(self, name: str, known: Contents | None) -> Contents:
        path = self._path(name)
        status = path.stat()
        if known is not None and known.entries:
            if known.size == status.st_size or (known.size is None and known.end == status.st_size):
                return known
            if known.size is None and known.end < status.st_size:
                return scan(path, known=known, end=status.st_size, limits=self._limits)
        version = status.st_size, status.st_mtime_ns
        if name not in self._scanned or self._scanned[name][0] != version:
            self._scanned[name] = version, scan(path, end=status.st_size, limits=self._limits)
        return self._scanned[name][1]

    def entries(self) -> list[Entry]:
        """The durable checkpoints by epoch, each once, in the newest segment that holds it.

        While a writer is at work the last may be one that it is just about to acknowledge, or to refuse.
        """
        return list(self.survey().entries)

    def lost(self) -> list[Lost]:
        """What was durable and is not there any more, as far as anything is left that says so; oldest first."""
        return list(self.survey().lost)

    def newest(self) -> Entry | None:
        """The newest durable checkpoint that is there."""
        entries = self.entries()
        return entries[-1] if entries else None

    def find(self, at: int | datetime | None = None) -> Entry:
        """A checkpoint by its epoch; the last one not after a time; or the newest.

        Raises NoCheckpoint, BadCheckpoint where it was durable and is lost.
        """
        survey = self.survey()
        entries = survey.entries
        highest = entries[-1].epoch if entries else -1
        if at is None and (lost := survey.lost_behind(highest)) is not None:
            raise _is_lost(lost, entries, highest + 1)
        if isinstance(at, int):
            for lost in survey.lost:
                if at in lost.epochs:
                    raise _is_lost(lost, entries, at)
        if not entries:
            raise NoCheckpoint(f"{self.directory}: no checkpoint is complete")
        if at is None:
            return entries[-1]
        held = f"it holds {len(entries)} from {entries[0].epoch} to {highest}"
        if lost_behind := survey.lost_behind(highest):
            held += f", and has held them up to {lost_behind.epochs[-1]}"
        if isinstance(at, datetime):
            until = at.timestamp() * 1e9
            timed = [entry for entry in entries if entry.time_ns is not None and entry.time_ns <= until]
            reached = timed[-1].epoch if timed else -1
            if (lost_then := survey.lost_behind(reached, until)) is not None:
                raise _is_lost(lost_then, entries, reached + 1)
            if not timed:
                raise NoCheckpoint(f"{self.directory}: no checkpoint that was taken at {at} or before; {held}")
            return timed[-1]
        for entry in entries:
            if entry.epoch == at:
                return entry
        raise NoCheckpoint(f"{self.directory}: no checkpoint {at}; {held}")

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
            with appearing(Path(path)) as descriptor:
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
            if one.name != entry.segment:
                yield from (copy for copy in one.entries if copy.position == entry.position)

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
        epoch = int(entry.segment[:20]) if held is None else held.epoch + 1
        others = [one.entries for one in self.contents() if one.name != entry.segment]
        before = [one.epoch for entries in others for one in entries if one.epoch < entry.epoch]
        good = max(before if held is None else [*before, held.epoch], default=None)
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
        read: list[tuple[Contents, int]] = []
        done = 0
        for name in names:
            path = self._path(name)
            try:
                size = path.stat().st_size
                base = done
                advance = (lambda at, base=base: progress(base + at)) if progress else None
                read.append((scan(path, end=size, limits=self._limits, advance=advance), size))
                done += size
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{path}: {error.strerror}") from error
        good = {entry.epoch: entry for one, _ in read for entry in one.entries}
        bad: list[Bad] = []
        unfinished = 0
        for number, (one, size) in enumerate(read):
            expected = indexed.get(one.name, Contents(one.name)).entries
            lost = [entry for entry in expected if entry.end > one.end]
            is_cut = one.fault is None and size > one.end
            if is_cut and not lost and number == len(read) - 1 and not self._is_more_than_cut(one, size):
                unfinished = size - one.end
            elif one.fault is not None or lost or is_cut:
                bad.append(self._fault(one, lost, good))
        gone = self._gone(indexed, [one for one, _ in read], good)
        gone += self._gone_before(self.state, names, gone)
        bad += [_bad_of(one, good) for one in gone]
        highest, seen = max(good, default=-1), self.state.highest_epoch
        if names and seen is not None and seen > highest and not any((one.epoch or 0) > highest for one in bad):
            bad += [_bad_of(one, good) for one in self.survey().lost if seen in one.epochs]
        bad.sort(key=lambda one: sequence_of(one.segment))
        return Report(
            checkpoints=sum(len(one.entries) for one, _ in read),
            segments=len(read),
            bytes=sum(one.end for one, _ in read),
            bad=tuple(bad),
            newest=good[max(good)] if good else None,
            unfinished_bytes=unfinished,
        )

    def _is_more_than_cut(self, one: Contents, size: int) -> bool:
        if not one.entries:
            return True  # a segment has its name only since its base was durable
        path = self._path(one.name)
        with guarding(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return holds_a_record(fd, one.end, size)
            finally:
                os.close(fd)

    @staticmethod
    def _fault(one: Contents, lost: list[Entry], good: dict[int, Entry]) -> Bad:
        first = one.entries[-1].epoch + 1 if one.entries else int(one.name[:20])
        before = [epoch for epoch in good if epoch <= first]
        return Bad(
            segment=one.name,
            byte=one.end if one.fault is None or one.fault.offset is None else one.fault.offset,
            reason="its bytes are cut off" if one.fault is None else one.fault.message,
            section=None if one.fault is None else one.fault.section,
            epoch=first,
            good=max(before, default=None),
            unreachable=tuple(entry.epoch for entry in lost if entry.epoch not in good),
        )

    def _path(self, segment: str) -> Path:
        return self.directory / segments.DIRECTORY / segment

    def _open(self, entry: Entry) -> int:
        path = self._path(entry.segment)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoCheckpoint(f"{path} is gone: checkpoint {entry.epoch} has been pruned") from None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error


def _lost(name: str, byte: int, reason: str, entries: list[Entry], found: dict[int, Entry]) -> Lost:
    nowhere = [entry for entry in entries if entry.epoch not in found]
    times_ns = tuple(entry.time_ns for entry in nowhere)
    return Lost(name, byte, reason, tuple(entry.epoch for entry in nowhere), times_ns)


def _is_lost(lost: Lost, entries: tuple[Entry, ...], at: int) -> BadCheckpoint:
    """What is said of the first checkpoint of these that is not below `at`."""
    epoch = next((epoch for epoch in lost.epochs if epoch >= at), lost.epochs[-1])
    good = max((entry.epoch for entry in entries if entry.epoch < epoch), default=None)
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


def _bad_of(lost: Lost, good: dict[int, Entry]) -> Bad:
    first = lost.epochs[0] if lost.epochs else int(lost.segment[:20])
    before = max((epoch for epoch in good if epoch <= first), default=None)
    return Bad(lost.segment, lost.byte, lost.reason, None, first, before, lost.epochs)


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
