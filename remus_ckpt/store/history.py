"""The reading side of a history: takes no lock, writes nothing, and may run beside a writer (specs/store.md §8)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import Written, appearing, guarding, naming_file, open_to_read, write_all
from remus_ckpt.errors import BadCheckpoint, Malformed, NoCheckpoint, NothingToRestore, StoreError, StreamError
from remus_ckpt.hashing import hashing
from remus_ckpt.limits import Limits
from remus_ckpt.restorer import Anonymous, Checkpoint, Home, Restorer
from remus_ckpt.source.manifest import arrays_of
from remus_ckpt.store import segments
from remus_ckpt.store.listing import Listing
from remus_ckpt.store.moment import Moment
from remus_ckpt.store.pruning import find_over
from remus_ckpt.store.retention import Removal, Retention
from remus_ckpt.store.segments import (
    Contents,
    Entry,
    Nowhere,
    Read,
    digest_of_stream,
    first_epoch_of,
    holds_a_record,
    list_segments,
    reader_of,
    replay,
    scan,
    sequence_of,
)
from remus_ckpt.store.state import State, load_state
from remus_ckpt.store.stored import Stored
from remus_ckpt.store.survey import Lost, Survey, Surveyor, joined, last, newest_before
from remus_ckpt.store.unwritten import data_end
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.digest import DigestName

Progress = Callable[[int], None]
"""Called with the bytes read so far."""

_COPY_BYTES = 1 << 22
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Bad:
    """A fault in a segment.

    byte: its offset in the segment; section: the rule it breaks, None if bytes are merely missing
    epoch: of the bad checkpoint, None if unknown
    good: the newest epoch up to the bad one that can be restored, None if there is none
    unreachable: epochs known to have been there and in no other segment
    """

    segment: str
    byte: int
    reason: str
    section: str | None
    epoch: int | None
    good: int | None
    unreachable: range


@dataclass(frozen=True, slots=True)
class Report:
    """What `History.verify` found.

    checkpoints, segments, bytes: how many were read and are good; a checkpoint that is in two segments counts twice
    newest: the newest good checkpoint
    unfinished_bytes: bytes after the last whole checkpoint of the newest segment: an interrupted checkpoint, or one
        that is arriving now
    """

    checkpoints: int
    segments: int
    bytes: int
    bad: tuple[Bad, ...]
    newest: Entry | None
    unfinished_bytes: int

    @property
    def is_good(self) -> bool:
        """Whether nothing bad was found."""
        return not self.bad


class History:
    """The checkpoints of one name.

    directory: of that name; raises StoreError if it is not a history, or one of a later format
    limits: what its streams may claim
    """

    def __init__(self, directory: str | Path, *, limits: Limits | None = None) -> None:
        self.directory = Path(directory)
        self.where = str(directory)
        """Where it is, for people."""
        self.limits = limits
        self._surveyor = Surveyor(self.directory, limits)
        self._listing = Listing(self.directory, limits)
        load_state(self.directory)

    @property
    def state(self) -> State:
        """The present contents of store.json."""
        return load_state(self.directory)

    @property
    def name(self) -> str:
        """The name of this history."""
        return self.state.name

    def reading(self) -> AbstractContextManager[object]:
        """A block for several calls: within it, a history on another machine keeps its connection."""
        return nullcontext()

    # Contents

    def survey(self) -> Survey:
        """What the segments hold now, and what they once held. Raises StoreError."""
        return self._surveyor.survey()

    def contents(self) -> list[Contents]:
        """What the segments hold, oldest first, taken from the index or, if it has no answer, from the segments."""
        return list(self.survey().contents)

    def checkpoints(self, *, newest_first: bool = False) -> Iterator[Entry]:
        """The durable checkpoints by epoch, each once, from the newest segment that holds it; streamed, not collected.

        Raises StoreError. While a writer is active, the last one may be about to be acknowledged or refused, and
        checkpoints pruned meanwhile may be left out.
        """
        yield from self._listing.by_epoch(self.survey().contents, newest_first=newest_first)

    def entries(self) -> list[Entry]:
        """All `checkpoints` in a list: for a long history this takes much memory."""
        return list(self.checkpoints())

    def lost(self) -> list[Lost]:
        """Checkpoints that were durable and are gone, as far as there is any trace of them; oldest first."""
        return list(self.survey().lost)

    def __len__(self) -> int:
        """How many durable checkpoints there are. Raises StoreError."""
        return self.survey().count

    def __getitem__(self, number: int) -> Stored:
        """A checkpoint by index: 0 is the oldest, -1 the newest. To find one by epoch or time, use `at`.

        Raises IndexError if there are not that many, StoreError.
        """
        ranges = joined(one.epochs for one in self.survey().contents)
        left = number if number >= 0 else number + sum(map(len, ranges))
        for epochs in ranges if left >= 0 else ():
            if left < len(epochs):
                return Stored(self, self.find(epochs[left]))
            left -= len(epochs)
        raise IndexError(f"{self.where} has no checkpoint number {number}: it holds {sum(map(len, ranges))}")

    def __iter__(self) -> Iterator[Stored]:
        """The durable checkpoints, oldest first. Raises StoreError."""
        for entry in self.checkpoints():
            yield Stored(self, entry)

    def at(self, at: int | datetime) -> Stored:
        """A checkpoint by its epoch, or the last one not after a time. Raises like `find`."""
        return Stored(self, self.find(at))

    def newest(self) -> Entry | None:
        """The newest durable checkpoint that exists."""
        return self.survey().newest

    def find(self, at: int | datetime | None = None) -> Entry:
        """A checkpoint by its epoch; the last one not after a time; or the newest.

        If clocks were wrong, the search for a time goes from the newest segment backwards, and skips segments that
        begin and end after that time.
        Raises NoCheckpoint, BadCheckpoint if it was durable and is lost.
        """
        survey = self.survey()
        newest, oldest = survey.newest, survey.oldest
        highest = -1 if newest is None else newest.epoch
        lost = survey.lost_behind(highest)
        if at is None and lost is not None:
            raise _is_lost(lost, survey, highest + 1)
        if isinstance(at, int):
            for one in reversed(survey.contents):
                if at in one.epochs and (entry := self._listing.find(one, at)) is not None:
                    return entry
            for gone in survey.lost:
                if at in gone.epochs:
                    raise _is_lost(gone, survey, at)
        if newest is None or oldest is None:
            raise nothing_in(self.where)
        if at is None:
            return newest
        held = f"it holds {survey.count} from {oldest.epoch} to {highest}"
        if lost is not None:
            held += f", and has held them up to {lost.epochs[-1]}"
        if isinstance(at, int):
            pruned = ", which was pruned" if any(at in span for span in self.state.pruned) else ""
            raise NoCheckpoint(f"{self.where}: no checkpoint {at}{pruned}; {held}")
        until = (at.astimezone(UTC) - _1970) // timedelta(microseconds=1) * 1_000
        found = self._find_until(survey, min(max(until, -(1 << 63)), (1 << 63) - 1))
        reached = -1 if found is None else found.epoch
        if (then := survey.lost_behind(reached)) is not None:
            # If a checkpoint's time is unknown, we only know whether it came right after the one that was found.
            may_be = then.epochs[0] <= reached + 1 and (found is None or found.time_ns != until)
            if may_be if then.time_ns is None else then.time_ns <= until:
                raise _is_lost(then, survey, reached + 1)
        if found is None:
            raise NoCheckpoint(f"{self.where}: no checkpoint was taken at {at} or before; {held}")
        return found

    def _find_until(self, survey: Survey, time_ns: int) -> Entry | None:
        by_age = sorted(survey.contents, key=lambda one: (last(one.epochs), sequence_of(one.name)), reverse=True)
        for one in by_age:
            edges = [edge.time_ns for edge in (one.first, one.last) if edge is not None and edge.time_ns is not None]
            if edges and min(edges) <= time_ns and (found := self._listing.newest_until(one, time_ns)) is not None:
                return found
        return None

    def prunable(self, retention: Retention, *, now_ns: int | None = None) -> list[Removal]:
        """The segments that `HistoryWriter.prune` would remove now, oldest first. Raises StoreError."""
        survey = self.survey()
        if survey.newest is None:
            return []
        at_ns = time.time_ns() if now_ns is None else now_ns
        directory = self.directory / segments.DIRECTORY
        found = find_over(directory, survey.contents, survey.newest.segment, self.state, retention, at_ns)
        return [] if found is None else list(found.over.values())

    # Reading back

    def restore(
        self,
        at: int | datetime | None = None,
        progress: Progress | None = None,
        *,
        into: Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> Checkpoint:
        """Restore a checkpoint into the memory of this process.

        into: arrays, buffers and DataFrames that the values are copied into as well, as for `arrays_of`
        verify: read and check all bytes of its segment up to it; otherwise, if a page index has it, each page is read
            once, and what is read is checked
        Raises NoCheckpoint, BadCheckpoint if it has changed on disk, StoreError; with `into` like `arrays_of` too.
        Nothing is copied into `into` before everything has been read and is known to fit.
        """
        checkpoint, _ = self._read(at, Anonymous(), progress, verify=verify)
        if into is not None:
            arrays_of(checkpoint, into)
        return checkpoint

    def moment(self, at: int | datetime | None = None) -> Moment:
        """A checkpoint whose pages are read as they are needed, each of them checked. Close it after use.

        The page index says where they are; if there is none, it is built first. Raises like `restore`.
        """
        for _ in range(_TRIES):
            entry = self.find(at)
            faults: list[BadCheckpoint | NoCheckpoint] = []
            for copy in itertools.chain([entry], self._copies(entry)):
                try:
                    return Moment.open(self, copy)
                except (BadCheckpoint, NoCheckpoint) as error:
                    faults.append(error.with_traceback(None))  # which would keep what was read
            if at is not None or isinstance(faults[0], BadCheckpoint):
                break  # otherwise the newest has been compacted and pruned meanwhile
        raise faults.pop(0)

    def memory(self, at: int | datetime | None = None) -> NDArray[np.uint8]:
        """uint8[memory_bytes]: the memory of a checkpoint, ready in milliseconds: pages are read as they are touched.

        It is memory of this process, may be written to, and stays valid while the history grows. Touching a page that
        has changed on disk kills the process with SIGBUS: see `Moment.memory`. Raises like `restore`.
        """
        with self.moment(at) as moment:
            return moment.memory().reshape(-1)[: moment.memory_bytes]

    def restore_image(
        self,
        path: str | Path,
        at: int | datetime | None = None,
        progress: Progress | None = None,
        *,
        sync: bool = True,
        verify: bool = False,
        written: Written = "output",
    ) -> Checkpoint:
        """Restore a checkpoint's memory to a file of mode 0600, with zero pages as holes. The file appears once it is
        complete.

        sync: make the file durable before returning; verify: as for `restore`
        written: what the file is, for the message if there is no room for it
        The memory of the returned checkpoint is that file, mapped. Raises like `restore`.
        """
        target = Path(path)
        self.find(at)
        with self.reading(), guarding(target, written), appearing(target, sync=sync) as descriptor:
            home = MappedFile(f"/proc/self/fd/{descriptor}", written)  # only `appearing` knows its name
            home.path = target
            try:
                checkpoint, _ = self._read(at, home, progress, verify=verify)
                home.cut(checkpoint.memory_bytes)
            finally:
                home.close()
        return checkpoint

    def export(self, path: str | Path, at: int | datetime | None = None, progress: Progress | None = None) -> Entry:
        """Check a segment up to a checkpoint, and write it as a save stream: to a file of mode 0600 or, for "-", to
        standard output.

        Raises like `restore`, and OSError if standard output cannot be written.
        """
        if str(path) == "-":
            return self._print(at, progress)
        with guarding(path, "output"), appearing(Path(path)) as descriptor:
            return self._read(at, Nowhere(), progress, descriptor)[1]

    def _print(self, at: int | datetime | None, progress: Progress | None) -> Entry:
        """Export to standard output. Raises like `export`."""
        _, entry = self._read(at, Nowhere(), progress)
        with self._open(entry) as read:
            copy_out(read, entry.end)
        return entry

    def _read(
        self,
        at: int | datetime | None,
        home: Home,
        progress: Progress | None,
        save_to: int | None = None,
        *,
        verify: bool = True,
    ) -> tuple[Checkpoint, Entry]:
        """Read a checkpoint into a home. If the newest is compacted and pruned meanwhile, a newer one is read.

        save_to: a descriptor of a file that gets the bytes that were read
        verify: read all bytes, even if a page index says where the pages are
        """
        with self.reading():
            for _ in range(_TRIES):
                try:
                    return self._read_entry(self.find(at), home, progress, save_to, verify)
                except NoCheckpoint:
                    if at is not None:
                        raise
            return self._read_entry(self.find(at), home, progress, save_to, verify)

    def _read_entry(
        self, entry: Entry, home: Home, progress: Progress | None, save_to: int | None, verify: bool
    ) -> tuple[Checkpoint, Entry]:
        """Read a checkpoint; if its segment is bad, from another segment that also holds it."""
        if not verify:
            # What fails here is read once more from the beginning, which says what is wrong, and where.
            with suppress(BadCheckpoint, NoCheckpoint), self._indexed(entry) as moment:
                if moment is not None:
                    return moment.restore(home, progress), entry
        faults: list[BadCheckpoint | NoCheckpoint] = []
        # Look for copies only when they are needed: a compaction may have made one, and removed the original since.
        for copy in itertools.chain([entry], self._copies(entry)):
            try:
                return self._replay(copy, home, progress, save_to), copy
            except (BadCheckpoint, NoCheckpoint) as error:
                faults.append(error.with_traceback(None))  # which would keep what was read
        raise faults.pop(0)

    def _indexed(self, entry: Entry) -> AbstractContextManager[Moment | None]:
        """A checkpoint by its page index; None if there is none on disk."""
        return Moment.open_indexed(self, entry) or nullcontext()

    def _copies(self, entry: Entry) -> Iterator[Entry]:
        """The same checkpoint in other segments: the base of a compaction is also in the segment before it."""
        for one in self.contents():
            if one.name != entry.segment and entry.epoch in one.epochs:
                copy = self._listing.find(one, entry.epoch)
                if copy is not None and copy.position == entry.position:
                    yield copy
            elif one.name == entry.segment:
                # The index may have a wrong row for this checkpoint.
                yield from (found for found in self._listing.walk(one) if found.epoch == entry.epoch and found != entry)

    def _replay(self, entry: Entry, home: Home, progress: Progress | None, save_to: int | None = None) -> Checkpoint:
        with self._open(entry) as read, hashing() as threaded:
            digest = self._digest_of(read, entry)
            restorer = Restorer(limits=self.limits, home=home, digest=digest, new_digest=threaded)
            fault: StreamError | None = None
            try:
                source = read if save_to is None else _saving(read, save_to)
                for _ in replay(source, restorer, end=entry.end, advance=progress):
                    if isinstance(home, Nowhere):
                        restorer.skip()
                    else:
                        restorer.commit()
            except StreamError as error:
                fault = error.with_traceback(None)
        held = restorer.in_force
        if fault is None and held is not None and held.record is not None and held.record.after == entry.position:
            return held
        raise self._bad(entry, restorer, fault)

    def check(self, entry: Entry) -> None:
        """Read all bytes of a checkpoint's segment up to its end.

        Raises BadCheckpoint, which says what is wrong, where, and what is left; NoCheckpoint if they are gone.
        """
        self._replay(entry, Nowhere(), None)

    def _bad(self, entry: Entry, restorer: Restorer, fault: StreamError | None) -> BadCheckpoint:
        held = restorer.in_force
        end = restorer.boundary.offset
        epoch = first_epoch_of(entry.segment) if held is None else held.epoch + 1
        others = [one.epochs for one in self.contents() if one.name != entry.segment]
        good = newest_before(others if held is None else [*others, range(held.epoch, held.epoch + 1)], entry.epoch)
        reason = "its bytes are cut off" if fault is None else fault.message
        offered = "no checkpoint before it is there" if good is None else f"the newest before it is {good}"
        return BadCheckpoint(
            f"{reason}; checkpoint {epoch} and those after it in this segment cannot be read, {offered}",
            segment=entry.segment,
            epoch=epoch,
            good=good,
            offset=end if fault is None or fault.offset is None else fault.offset,
            section="store.md §4.3" if fault is None else fault.section,
        )

    def size(self) -> int:
        """Bytes of all segments on the disk. Raises StoreError."""
        size = 0
        for name in list_segments(self.directory):
            path = self.path_of(name)
            with guarding(path), suppress(FileNotFoundError):  # pruned since
                size += path.stat().st_size
        return size

    def verify(self, progress: Progress | None = None) -> Report:
        """Read back every checkpoint, and check every byte. Raises StoreError if a file cannot be read."""
        indexed, names = self._surveyor.index_and_names()
        read: list[Contents] = []
        done = unfinished = 0
        for name in names:
            path = self.path_of(name)
            try:
                size = path.stat().st_size
                base = done
                advance = (lambda at, base=base: progress(base + at)) if progress else None
                one = scan(path, end=size, limits=self.limits, advance=advance)
                done += size
                if one.fault is None and size > one.end:
                    known = indexed.get(name)
                    unwritten_from, is_more = self._behind(one, size)
                    while is_more:  # a writer may have continued within its space meanwhile
                        end, one = one.end, scan(path, known=one, end=size, limits=self.limits)
                        if one.end == end or one.fault is not None:
                            break
                        unwritten_from, is_more = self._behind(one, size)
                    is_cut_short = known is not None and known.end > one.end
                    if not is_cut_short and not is_more and (name == names[-1] or unwritten_from == one.end):
                        unfinished = unwritten_from - one.end
                    elif one.fault is None:
                        one.fault = Malformed("its bytes are cut off", offset=one.end)
                read.append(one)
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{path}: {error.strerror}") from error
        survey = Survey(tuple(read), tuple(self._surveyor.lost(self.state, indexed, names, read, whole=True)))
        by_name = {one.name: one for one in read}
        return Report(
            checkpoints=sum(len(one.epochs) for one in read),
            segments=len(read),
            bytes=survey.bytes,
            bad=tuple(bad_of(lost, by_name.get(lost.segment), survey) for lost in survey.lost),
            newest=survey.newest,
            unfinished_bytes=unfinished,
        )

    def _behind(self, one: Contents, size: int) -> tuple[int, bool]:
        """Where the data of a segment ends, and whether it is more than a checkpoint that was cut off."""
        if one.last is None:
            return size, True  # a segment gets its name only once its base is durable
        path = self.path_of(one.name)
        with guarding(path):
            fd = open_to_read(path)
            try:
                written = data_end(fd, one.end, size)
                return written, holds_a_record(fd, one.last.position, one.end, written, size)
            finally:
                os.close(fd)

    def path_of(self, segment: str) -> Path:
        """The file of a segment."""
        return self.directory / segments.DIRECTORY / segment

    def _open(self, entry: Entry) -> AbstractContextManager[Read]:
        """The bytes of the segment that holds a checkpoint. Raises NoCheckpoint, StoreError."""
        return self._open_file(entry)

    def _digest_of(self, read: Read, entry: Entry) -> DigestName | None:
        """The digest of the stream that holds a checkpoint, None if it is not known before it is read."""
        return digest_of_stream(read, entry)

    @contextmanager
    def _open_file(self, entry: Entry) -> Iterator[Read]:
        path = self.path_of(entry.segment)
        try:
            fd = open_to_read(path)
        except FileNotFoundError:
            raise NoCheckpoint(f"{path} is gone: checkpoint {entry.epoch} has been pruned") from None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        read = reader_of(fd)

        def guarded(view: memoryview, at: int) -> int:
            with guarding(path):
                return read(view, at)

        try:
            yield guarded
        finally:
            os.close(fd)


def nothing_in(where: str | Path, found: str = "no checkpoint is complete") -> NothingToRestore:
    """The error for a store or history without a checkpoint."""
    return NothingToRestore(
        f"{where}: there is nothing to restore: {found}; check the path, and whether `protect` reaches the backup"
    )


def _is_lost(lost: Lost, survey: Survey, at: int) -> BadCheckpoint:
    """The error for the first of the lost checkpoints whose epoch is at least `at`."""
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


def bad_of(lost: Lost, one: Contents | None, survey: Survey) -> Bad:
    """The `Bad` for a loss. one: what its segment holds, None if the segment is gone"""
    fault = None if one is None or one.fault is None or not (lost.byte or one.last is None) else one.fault
    if one is not None and (lost.byte or one.last is None):
        epoch = one.last.epoch + 1 if one.last else first_epoch_of(one.name)
    else:
        epoch = lost.epochs[0] if lost.epochs else first_epoch_of(lost.segment)
    section = None if fault is None else fault.section
    return Bad(lost.segment, lost.byte, lost.reason, section, epoch, survey.newest_before(epoch + 1), lost.epochs)


def _saving(read: Read, fd: int) -> Read:
    """`read`, which also writes what it reads to the beginning of a file. Raises OSError."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)

    def both(view: memoryview, at: int) -> int:
        size = read(view, at)
        write_all(fd, [view[:size]])
        return size

    return both


def copy_out(read: Read, size: int) -> None:
    """Copy the first bytes to standard output. Raises OSError."""
    block = memoryview(np.empty(min(size, _COPY_BYTES), dtype=np.uint8))
    at = 0
    while at < size:
        count = read(block[: size - at], at)
        if not count:
            raise OSError(0, "the segment has become shorter")
        with naming_file("standard output"):
            write_all(1, [block[:count]])
        at += count
