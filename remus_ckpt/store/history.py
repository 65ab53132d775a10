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
from remus_ckpt.store.segments import Contents, Entry, Nowhere, holds_a_record, list_segments, replay, scan
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

    def contents(self) -> list[Contents]:
        """What the segments hold, oldest first: as the index says, and as they say themselves where it does not."""
        names = list_segments(self.directory)
        indexed = index.read_index(self.directory / index.FILE) or {}
        found = []
        for name in names:
            try:
                found.append(self._contents(name, indexed.get(name)))
            except FileNotFoundError:
                continue  # pruned since
            except OSError as error:
                raise StoreError(f"{self._path(name)}: {error.strerror}") from error
        return found

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
        found = {entry.epoch: entry for one in self.contents() for entry in one.entries}
        return [found[epoch] for epoch in sorted(found)]

    def newest(self) -> Entry | None:
        """The newest durable checkpoint."""
        entries = self.entries()
        return entries[-1] if entries else None

    def find(self, at: int | datetime | None = None) -> Entry:
        """A checkpoint by its epoch; the last one not after a time; or the newest. Raises NoCheckpoint."""
        entries = self.entries()
        if not entries:
            raise NoCheckpoint(f"{self.directory}: no checkpoint is complete")
        if at is None:
            return entries[-1]
        held = f"it holds {len(entries)} from {entries[0].epoch} to {entries[-1].epoch}"
        if isinstance(at, datetime):
            until = at.timestamp() * 1e9
            timed = [entry for entry in entries if entry.time_ns is not None and entry.time_ns <= until]
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
        indexed = index.read_index(self.directory / index.FILE) or {}
        names = list_segments(self.directory)
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
