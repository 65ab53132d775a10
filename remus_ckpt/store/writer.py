"""The writing side of a history: received, checked, durable, applied, in that order (specs/store.md §6)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.disk import (
    guarding,
    keep_room,
    make_directory,
    replace_file,
    sync_directory,
    sync_file,
    sync_files,
    sync_names_above,
    write_again,
    write_all,
)
from remus_ckpt.errors import Malformed, NoCheckpoint, RemusError, StoreError, StreamError, UnknownFormat
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.store import index, segments
from remus_ckpt.store.compaction import Compaction
from remus_ckpt.store.history import History, hashing
from remus_ckpt.store.retention import Retention, count_over, times_taken
from remus_ckpt.store.segments import (
    PARTIAL,
    Contents,
    Entry,
    Shape,
    can_keep,
    entry_of,
    first_epoch_of,
    holds_a_record,
    is_segment,
    list_segments,
    record_of,
    replay,
    segment_name,
    sequence_of,
    shape_of,
)
from remus_ckpt.store.state import FILE, Role, State, load_state, reserve, save_state
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.record import RECORD_SECTION, Position
from remus_ckpt.wire.xen import events

LOCK = "lock"
WARM = "warm"
SPARE = "hand-over.spare"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
COMPACT_BYTES = 64 * MIB
COMPACT_CHECKPOINTS = 20_000
_SPARE_BYTES = 64 << 10
_CANCEL_S = 10.0
_BASE_COPIES, _BASE_EXTRA_BYTES = 4, 64 * MIB
"""What a base may have: a first copy goes over memory more than once, but never so often."""
_NOT_OURS = (
    events.FileHeader,
    events.VcpuInfo,
    events.HvmParam,
    events.TscInfo,
    events.Toolstack,
    events.Tmem,
    events.TmemExtra,
    events.EnableVerifyMode,
    events.LastCheckpoint,
    events.TailPv,
)
"""What no stream of our own has, and a compaction would lose."""


_MAX_WARNINGS = _MAX_DAMAGED = 1_000
_MAX_REASON = 300
_PRUNE_BATCH = 16
_PRUNE_PAUSE_S = 0.001


@dataclass(slots=True)
class _Chain:
    """A segment, and the restorer that its stream is for.

    end: the first byte behind its last durable checkpoint; written: behind all that came
    shift: how much further on a byte stands in the segment than in the restorer's stream
    is_sealed: nothing may be appended
    compact_over, compact_behind: bytes of deltas, and checkpoints, that the next compaction waits for
    """

    restorer: Restorer
    home: MappedFile
    path: Path
    fd: int
    shape: Shape | None = None
    end: int = 0
    written: int = 0
    shift: int = 0
    base_bytes: int = 0
    checkpoints: int = 0
    is_sealed: bool = False
    compact_over: int = 0
    compact_behind: int = 0

    def close(self) -> None:
        """Close the segment. May be called again. What counts has been synced: an error says nothing new."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def count_base(self, end: int) -> None:
        """The base goes up to there. A first copy may hold pages more than once: what one copy needs not is overhead,
        and counts as deltas do."""
        self.base_bytes = min(end, int(np.count_nonzero(self.home.has_room)) * PAGE_SIZE)


@dataclass(slots=True)
class _Pruning:
    """Segments that retention no longer keeps, and that are removed batch by batch.

    over: segment → the epoch of its last checkpoint, oldest first
    oldest_left: the sequence number of the first that stays
    taken_ns: when the newest checkpoint of the last that goes was taken, None where nothing says so
    """

    over: dict[str, int]
    oldest_left: int
    taken_ns: int | None


class Torn(StoreError):
    """The writer is closed, or a change to it was interrupted: to open the history anew finds what is durable."""


class HistoryWriter:
    """The one who may write a history. Opening recovers what is there (specs/store.md §9).

    directory: of the name; it is created where it is not there
    name: written into a new store
    limits: what a stream may claim
    warm_directory: in it, under the name, lies the warm copy; by default it lies in the history itself
    retention: pruned by it after each compaction and each new base
    compact_bytes, compact_checkpoints: compact when the deltas behind a base have more bytes than it and than this,
        or are more than so many; None: only by `compact`
    on_phase: called with "staged", "stored", "applying", "applied", "compacting", "compacted" or "pruning" and an epoch

    Per checkpoint: bytes by `feed`, or `get_buffer` and `buffer_updated`; then `check`, `store`, `apply`. After any
    error but one of `begin`, `abandon` comes before anything else. Methods may be called by one thread at a time.
    An exception from elsewhere, such as KeyboardInterrupt, may end any of them anywhere: either nothing has changed, or
    the writer refuses everything but `close`, and what is durable is found by opening the history again.
    Raises StoreError where the store cannot be opened or written, or another writer has it.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        *,
        limits: Limits | None = None,
        warm_directory: str | Path | None = None,
        retention: Retention | None = None,
        compact_bytes: int | None = COMPACT_BYTES,
        compact_checkpoints: int = COMPACT_CHECKPOINTS,
        on_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.warnings: list[str] = []
        """What was found wrong when the store was opened, and what could not be done since."""
        self.position: Position | None = None
        """Of the newest durable checkpoint."""
        self._limits = limits
        self._retention = retention
        self._compact_bytes = compact_bytes
        self._compact_checkpoints = compact_checkpoints
        self._on_phase = on_phase or (lambda phase, epoch: None)
        self._lock = threading.RLock()
        self._chain: _Chain | None = None
        self._coming: _Chain | None = None
        self._stored: Entry | None = None
        self._failed = False  # what comes is not taken in any more, until `abandon`
        self._is_torn = False  # a change has not come to its end: memory may say other than the disk
        self._room = memoryview(b"")
        self._compaction: Compaction | None = None
        self._pruning: _Pruning | None = None
        self._highest = -1
        self._warm_number = 0
        self._spare_bytes = 0  # room that is kept for the device state of a takeover
        self._held: list[int] = []  # descriptors that hold our locks
        disown_in_forks(self)
        self._segments = self.directory / segments.DIRECTORY
        self._warm = self.directory / WARM if warm_directory is None else Path(warm_directory) / name
        with guarding(self.directory):
            make_directory(self.directory)
            make_directory(self._segments)
        try:
            self._take_lock(self.directory / LOCK, os.O_RDWR | os.O_CREAT, self.directory)
            with guarding(self._warm):
                make_directory(self._warm)
            # It may be shared with the histories of another store.
            self._take_lock(self._warm, os.O_RDONLY | os.O_DIRECTORY, self._warm)
            self.state = self._load_or_create_state(name)
            """What store.json says: after an exception too, this is what whoever opens the history would read."""
            self._is_settled = True  # a loss of power would not change that
            self.history = History(self.directory, limits=limits)
            """The reading side."""
            self._index = index.Index(self.directory / index.FILE, self._segments, limits)
            with guarding(self.directory):
                self._recover()
        except BaseException:
            self._release()
            raise

    # Opening

    def _take_lock(self, path: Path, flags: int, what: Path) -> None:
        with guarding(path):
            self._held.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
            try:
                fcntl.flock(self._held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"{what} is being written by another: a backup that runs has it, and compacts and prunes by itself"
                ) from None

    def _load_or_create_state(self, name: str) -> State:
        path = self.directory / FILE
        if not path.exists() and not list_segments(self.directory):
            save_state(self.directory, State(name))
        state = load_state(self.directory)
        with guarding(path):
            # Whoever put it there may have died before this. Only then is the spare no longer what a loss of power
            # would bring back, and may be written to.
            sync_file(path)
            sync_directory(self.directory)
        reserve(self.directory)
        return state

    def _recover(self) -> None:
        half_written = [*self.directory.glob(".store.json.*"), *self._warm.glob(".taken-over-*")]
        for path in [*half_written, *self._segments.glob(f"*{PARTIAL}"), *self._warm.glob("memory-*.image")]:
            with guarding(path):
                path.unlink(missing_ok=True)
        # Whoever wrote, renamed or removed what is there may have died before this; or it is a copy of another store.
        sync_directory(self._segments)
        sync_names_above(self._segments)
        names = list_segments(self.directory)
        sync_files(self._segments, names[:-1])  # the newest is written again, as far as nobody says that it was synced
        there = set(names)
        indexed = self._index.load()
        self._highest = -1 if self.state.highest_epoch is None else self.state.highest_epoch
        # One that is gone stays named until those beside it have been pruned.
        oldest = sequence_of(names[0]) if names else -1
        damaged = {
            name: why
            for name, why in self.state.damaged.items()
            if name in there or (is_segment(name) and sequence_of(name) > oldest)
        }
        known: dict[str, Contents] = {}
        for name in reversed(names):
            expected = indexed.get(name, Contents(name)).epochs
            self._highest = max([self._highest, first_epoch_of(name), *expected[-1:]])
            is_newest = self._chain is None
            with guarding(self._segments / name):
                contents, reason = (self._open_segment if is_newest else self._glance)(name, indexed.get(name))
            if is_newest:
                damaged.pop(name, None)  # it is looked at anew
            else:
                if name not in indexed:
                    damaged.pop(name, None)  # read anew
                if name not in indexed or contents.end != indexed[name].end:
                    indexed[name] = replace(contents)  # it has been put in
            known[name] = contents
            self._highest = max([self._highest, *contents.epochs[-1:]])
            if reason is not None:
                damaged[name] = reason
        gone = sorted(indexed.keys() - there, key=sequence_of)
        if names:
            # The oldest are gone because they were pruned.
            gone = [name for name in gone if sequence_of(name) > sequence_of(names[0])]
        for name in gone:
            self._note(f"{name}: the index names it, and it is not there")
            lost = indexed[name].epochs
            self._highest = max([self._highest, *lost[-1:]])
            damaged[name] = "it is gone" + (f", and with it checkpoints {lost[0]} to {lost[-1]}" if lost else "")
        damaged = _bounded(damaged)
        self._note_gaps([known[name] for name in names], damaged)
        for name in names:
            if name in damaged:
                self._note(f"{name}: {damaged[name]}")
        if damaged != self.state.damaged or gone:
            self._save(replace(self.state, damaged=damaged, highest_epoch=self._highest if damaged or gone else None))
        if gone and self._chain is not None and sequence_of(gone[-1]) > sequence_of(self._chain.path.name):
            self._chain.is_sealed = True
        if self._chain is not None:
            held = self._chain.restorer.in_force
            assert held is not None
            self.position = record_of(held).after
            self._keep_room(held)
        self._index.begin([known[name] for name in names], indexed)
        self._note(self._index.warning)

    def _note_gaps(self, contents: list[Contents], damaged: dict[str, str]) -> None:
        """Epochs that are missing between two segments, where nothing else says why."""
        explained = sorted(sequence_of(name) for name in damaged if is_segment(name))
        reached = -1
        for before, one in pairwise(contents):
            reached = max([reached, *before.epochs[-1:]])
            numbers = sequence_of(before.name), sequence_of(one.name)
            first, stop = (bisect_left(explained, number) for number in numbers)
            gap = range(reached + 1, one.first.epoch) if one.first is not None and reached >= 0 else range(0)
            if gap and first == stop:
                self._note(f"{one.name}: checkpoints {gap[0]} to {gap[-1]} before it are missing")

    def _open_segment(self, name: str, known: Contents | None) -> tuple[Contents, str | None]:
        """Replay what may be the newest segment; returns what it holds and, where it is damaged, how."""
        limits = self._limits or Limits()
        if known is not None and known.shape is not None and known.shape.p2m_size * PAGE_SIZE > limits.memory_bytes:
            raise StoreError(
                f"{self.directory}: memory of {known.shape.p2m_size * PAGE_SIZE} bytes is over the limit memory_bytes "
                f"of {limits.memory_bytes}"
            )
        expected = Contents(name) if known is None else known
        path = self._segments / name
        contents = Contents(name)
        home = self._new_home()
        fd = -1
        reason = None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            with hashing() as new_digest:
                restorer = Restorer(limits=self._limits, home=home, new_digest=new_digest)
                try:
                    for staged in replay(fd, restorer):
                        contents.add(entry_of(staged, name))
                        restorer.commit()
                except StreamError as error:
                    if isinstance(error, UnknownFormat) and error.section == RECORD_SECTION:
                        # Its digest is right: a later program wrote it.
                        raise StoreError(f"{path}: {error}") from error
                    contents.fault = error
                    reason = str(error)
            size = os.fstat(fd).st_size
            end = contents.end
            lost = expected.epochs[len(contents.epochs) :] if expected.end > end else range(0)
            if reason is None and lost:
                reason = f"whole checkpoints end at byte {end} of {size}"
            elif reason is None and contents.last is None:
                reason = "it holds no whole checkpoint"
            elif (
                reason is None
                and contents.last is not None
                and size > end
                and holds_a_record(fd, contents.last.position, end, size)
            ):
                reason = f"behind byte {end} a checkpoint does not follow, and one stands further on"
            if reason is not None and lost:
                reason += f"; checkpoints {lost[0]} to {lost[-1]} are lost"
            if reason is None and size > end:
                os.ftruncate(fd, end)
                size = end
            if contents.first is not None:
                # The index names what was synced. What is whole behind that, nobody may have synced, or it has failed.
                write_again(fd, 0 if known is None else min(known.end, end), end)
                restorer.reader.new_digest = hashlib.sha256
                restorer.rewind()
                contents.shape = shape_of(restorer)
                chain = _Chain(restorer, home, path, fd, contents.shape, end, end)
                chain.checkpoints = len(contents.epochs)
                chain.count_base(contents.first.end)
                chain.is_sealed = reason is not None or self._chain_is_old(name) or not restorer.reader.compressing
                self._chain = chain
                os.lseek(fd, end, os.SEEK_SET)
        except BaseException:
            if self._chain is None:
                if fd >= 0:
                    os.close(fd)
                home.remove()
            raise
        if self._chain is None:
            os.close(fd)
            home.remove()
        if self._chain is None or self._chain.is_sealed:
            contents.size = size
        return contents, reason

    def _chain_is_old(self, name: str) -> bool:
        """Whether a newer segment stands behind the one that gives the newest checkpoint: it was damaged."""
        return list_segments(self.directory)[-1] != name

    def _glance(self, name: str, known: Contents | None) -> tuple[Contents, str | None]:
        """An older segment: the index is believed where the size is right, and what is missing there is put in."""
        size = (self._segments / name).stat().st_size
        if known is not None and known.last is not None:
            is_explained = known.end == size or (known.size == size and name in self.state.damaged)
            if is_explained and known.size in (size, None):
                return replace(known, size=size), None
        contents = Contents(name, size=size)
        self._index.fill(contents, end=size)
        if contents.fault is not None:
            return contents, str(contents.fault)
        if contents.last is None:
            return contents, "it holds no whole checkpoint"
        if contents.end < size or (known is not None and known.end > contents.end):
            return contents, f"its whole checkpoints end at byte {contents.end} of {size}"
        return contents, None

    def _new_home(self) -> MappedFile:
        self._warm_number += 1
        return MappedFile(self._warm / f"memory-{self._warm_number}.image")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change, with the lock held. Our own errors leave memory as the disk is; after any other, nobody knows."""
        with self._lock:
            if self._is_torn:
                raise self._torn()
            self._is_torn = True
            try:
                yield
            except RemusError:
                self._is_torn = False
                raise
            self._is_torn = False

    def _torn(self) -> Torn:
        return Torn(f"{self.directory}: it is closed, or a change to it was interrupted: open it again")

    # What there is

    def set_state(self, *, term: int | None = None, role: Role | None = None, **more: Any) -> None:
        """Change store.json: whole or not at all, and durable when this returns.

        Raises StoreError. `state` is then what whoever opens the history would read: what it was before, or, where the
        disk did not even take that back, the new one. If it is not known what a loss of power would leave, nothing is
        received, stored, handed out or changed until `state` could be written again.
        """
        with self._changing():
            self._settle()
            self._save(
                replace(
                    self.state,
                    term=self.state.term if term is None else term,
                    role=self.state.role if role is None else role,
                    more={**self.state.more, **more},
                )
            )

    def _save(self, state: State) -> None:
        self._is_settled = False
        try:
            save_state(self.directory, state)
            self.state, self._is_settled = state, True
        except BaseException:
            self._take_back_state()
            raise

    def _take_back_state(self) -> None:
        """A new state could not be written: put the old one back if need be, and learn which one is there."""
        try:
            if load_state(self.directory) != self.state:
                save_state(self.directory, self.state)
            self._is_settled = True
        except StoreError:
            with suppress(StoreError):
                self.state = load_state(self.directory)

    def _settle(self) -> None:
        """Make sure that a loss of power does not change who may act. Raises StoreError."""
        if not self._is_settled:
            save_state(self.directory, self.state)
            self._is_settled = True

    @property
    def stream(self) -> Shape | None:
        """What a stream must be, to continue from `position`; None: only a full one can follow."""
        chain = self._chain
        if chain is None or chain.is_sealed or self._epoch < self._highest:
            return None
        return None if self.is_handed_out else chain.shape

    @property
    def is_handed_out(self) -> bool:
        """Whether somebody has gone on from this stream: `position` is not the newest state of that memory any more.

        Nothing is acknowledged in a segment behind what was handed out. But a checkpoint that was refused, since the
        disk failed, may stand there and be found when the history is opened anew.
        """
        epoch = _epoch_in(self._given_position)
        return self._chain is not None and epoch is not None and first_epoch_of(self._chain.path.name) <= epoch

    @property
    def handed_out(self) -> Position | None:
        """Of what `hand_out` has given: `position`, or one before it. None where nothing was, or it is not known."""
        text = self._given_position
        if self.position is not None and text == str(self.position):
            return self.position
        with suppress(RemusError):
            if (epoch := _epoch_in(text)) is not None:
                found = self.history.find(epoch).position
                return found if str(found) == text else None
        return None

    @property
    def _given_position(self) -> str:
        """As store.json says it; empty where nothing was handed out."""
        given: str = (self.state.more.get("handed_out") or {}).get("position", "")
        return given

    @property
    def highest_epoch(self) -> int:
        """Of any checkpoint that was ever seen here, −1 before the first: a new base must have a higher one."""
        return self._highest

    @property
    def in_force(self) -> Checkpoint | None:
        """The checkpoint that the warm copy holds."""
        return None if self._chain is None else self._chain.restorer.in_force

    @property
    def memory(self) -> Pages | None:
        """uint8[p2m_size, 4096], the warm copy; it changes in `apply` alone.

        Where it lies on a tmpfs, looking at a page that was never written takes room there, and where there is none it
        ends the process: read `image` instead, or copy it with `copy_image`.
        """
        return None if self._chain is None else self._chain.restorer.memory

    @property
    def image(self) -> Path | None:
        """The warm copy's file; of use to others only while nothing is applied."""
        return None if self._chain is None else self._chain.home.path

    def copy_image(self, path: str | Path) -> Checkpoint:
        """Copy the warm copy to a file of mode 0600 that appears when it is whole and durable; holes stay holes.

        Nothing is applied meanwhile. Returns the checkpoint that it holds. Raises NoCheckpoint, StoreError.
        """
        with self._lock:
            chain, held = self._chain, self.in_force
            if chain is None or held is None:
                raise NoCheckpoint(f"{self.directory}: no checkpoint is complete")
            if self._is_torn or chain.home.path is None:  # half applied, or in the hands of another who writes to it
                return self.history.restore_image(path, held.epoch)
            chain.home.copy(Path(path), held.memory_bytes)
            return held

    # Receiving

    def begin(self, *, full: bool) -> None:
        """What comes next begins a new stream (full), or goes on with the one whose last checkpoint is `position`.

        What is incomplete is dropped. Raises StoreError where the stream cannot go on or a file cannot be created.
        """
        with self._changing():
            self._abandon()
            self._settle()
            if not full:
                if self.stream is None:
                    raise StoreError(f"{self.directory}: no stream that could be continued; a full copy is needed")
                self._coming = self._chain
                return
            self._cancel_compaction()
            home = self._new_home()
            path = self._segments / f"incoming-{self._next_sequence():06}{PARTIAL}"
            try:
                with guarding(path):
                    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            except BaseException:
                home.remove()
                raise
            self._coming = _Chain(Restorer(limits=self._limits, home=home), home, path, fd)

    def _next_sequence(self) -> int:
        names = list_segments(self.directory)
        return sequence_of(names[-1]) + 1 if names else 0

    @contextmanager
    def _receiving(self) -> Iterator[_Chain]:
        """What comes goes there, with the lock held. Whatever is raised, `abandon` has to follow."""
        with self._lock:
            if self._is_torn:
                raise self._torn()
            if self._coming is None or self._failed or self._stored is not None:
                raise StoreError(f"{self.directory}: nothing can be received now")
            self._failed = True
            if self._coming.restorer.staged is not None:
                raise Malformed(
                    "bytes behind the end of a checkpoint that has not been committed",
                    offset=self._coming.restorer.staged.end,
                    section="store.md §4.2",
                )
            yield self._coming
            self._failed = False

    @property
    def coming_start(self) -> int:
        """Where the checkpoint that is coming begins, counted as the offset of a StreamError is."""
        if self._coming is None:
            return 0
        staged = self._coming.restorer.staged
        return self._coming.restorer.reader.checkpoint_end if staged is None else staged.start

    def get_buffer(self) -> memoryview:
        """Where to receive the next bytes; `buffer_updated` says how many came."""
        with self._receiving() as chain:
            self._room = chain.restorer.get_buffer()
            return self._room

    def buffer_updated(self, size: int) -> None:
        """Take in what was received into `get_buffer`. Raises StreamError, and StoreError where there is no room."""
        with self._receiving() as chain:
            chain.restorer.buffer_updated(size)
            self._read(chain)
            self._write(chain, self._room[:size])
            self._room = memoryview(b"")

    def feed(self, data: Buffer) -> None:
        """Take in bytes that are there already. Raises as `buffer_updated`."""
        if not len(data):
            return
        with self._receiving() as chain:
            chain.restorer.feed(data)
            self._read(chain)
            self._write(chain, data)

    def _write(self, chain: _Chain, data: Buffer) -> None:
        """What was read without a fault. A buffer that was lent still holds it: reading moves no byte."""
        if chain is not self._chain:
            most = _BASE_COPIES * chain.restorer.memory.nbytes + _BASE_EXTRA_BYTES
            if chain.written + len(data) > most:
                raise Malformed(
                    f"a base of more than {most} bytes", offset=chain.written, section="store.md §4.2", chunk="base"
                )
        with guarding(chain.path):
            chain.written += write_all(chain.fd, [data])

    def _read(self, chain: _Chain) -> None:
        restorer = chain.restorer
        while restorer.staged is None and (event := restorer.next_event()) is not None:
            if isinstance(event, _NOT_OURS):
                raise Malformed(
                    f"{type(event).__name__} stands in no stream of our own",
                    offset=event.offset,
                    section="store.md §4.1",
                )

    def check(self, position: Position) -> Checkpoint:
        """After the last byte of a checkpoint: it is whole and right, and leads to this position.

        Raises Malformed.
        """
        with self._lock:
            if self._is_torn:
                raise self._torn()
            if self._coming is None or self._failed or self._stored is not None:
                raise StoreError(f"{self.directory}: there is nothing to check")
            restorer = self._coming.restorer
            try:
                staged = restorer.staged
                if staged is None:
                    at = self._coming.written - self._coming.shift
                    raise Malformed("the checkpoint is not whole", offset=at, section="store.md §4.2")
                self._check(self._coming, staged, position)
            except Malformed:
                self._failed = True
                raise
            self._on_phase("staged", staged.epoch)
            return staged

    def _check(self, chain: _Chain, staged: Checkpoint, position: Position) -> None:
        reader = chain.restorer.reader
        record = record_of(staged)
        at = staged.tail.offset if staged.tail is not None else staged.end
        if reader.buffered:
            raise Malformed(f"{reader.buffered} bytes behind its end", offset=staged.end, section="store.md §4.2")
        if record.after != position:
            raise Malformed(
                f"the checkpoint leads to the position {record.after}, not to {position}",
                offset=at,
                section="store.md §4.2",
            )
        if not reader.compressing:
            raise Malformed("its first body does not enable compression", offset=at, section="store.md §4.1")
        if isinstance(staged.tail, events.TailHvm) and (staged.tail.context or any(staged.tail.magic_pfns)):
            raise Malformed("its tail holds the state of a hypervisor", offset=at, section="store.md §4.1")
        if chain.shape is not None and chain.shape.codec != record.codec:
            raise Malformed(
                f"the codec changes from {chain.shape.codec} to {record.codec}", offset=at, section="store.md §4.1"
            )
        if not can_keep(record.time_ns):
            raise Malformed(f"its time is {record.time_ns} ns", offset=at, section="store.md §4.2")
        if record.epoch <= self._highest:
            raise Malformed(
                f"epoch {record.epoch} behind epoch {self._highest}, which the store has seen",
                offset=at,
                section="store.md §4.2",
            )

    def store(self) -> Entry:
        """Make the checked checkpoint durable: it is when this returns, and may be acknowledged. Raises StoreError."""
        with self._changing():
            chain = self._coming
            if chain is None or self._failed or self._stored is not None or chain.restorer.staged is None:
                raise StoreError(f"{self.directory}: no checkpoint has been checked")
            staged = chain.restorer.staged
            self._failed = True
            self._settle()
            # Should the sync fail, nobody knows what the disk holds: nothing is put behind it any more.
            was_sealed, chain.is_sealed = chain.is_sealed, True
            with guarding(chain.path):
                os.fdatasync(chain.fd)
            if chain is not self._chain:
                final = chain.path.with_name(segment_name(staged.epoch, self._next_sequence()))
                self._publish(chain.path, final)
                chain.path = final
            self._failed, chain.is_sealed = False, was_sealed
            entry = entry_of(staged, chain.path.name, chain.shift)
            chain.end = chain.written
            self.position = entry.position
            self._highest = entry.epoch
            self._stored = entry
            self._on_phase("stored", entry.epoch)
            return entry

    def _publish(self, path: Path, final: Path) -> None:
        """Give a segment that is synced its name, durably. Raises StoreError, and takes it back then."""
        try:
            with guarding(final):
                os.rename(path, final)
                sync_directory(self._segments)
        except StoreError:
            try:
                final.unlink(missing_ok=True)
                sync_directory(self._segments)
            except OSError:
                # After a loss of power it may be there again, and count as newer than what the segment in force would
                # get from now on.
                if self._chain is not None:
                    self._chain.is_sealed = True
            raise

    def apply(self) -> None:
        """Put the stored checkpoint into the index and the warm copy, which cannot fail. May close a compaction.

        But raises WarmCopyDamaged where somebody has cut the warm copy: the history has to be opened anew.
        """
        with self._changing():
            self._apply()

    def _apply(self) -> None:
        chain, entry = self._coming, self._stored
        if chain is None or entry is None:
            raise StoreError(f"{self.directory}: no checkpoint has been stored")
        self._on_phase("applying", entry.epoch)
        chain.home.check()
        self._stored = None
        is_new = chain is not self._chain
        checkpoint = chain.restorer.commit()
        chain.checkpoints += 1
        if is_new:
            chain.shape = shape_of(chain.restorer)
            chain.count_base(chain.end)
            self._switch(chain)
            self._index.add(entry, Contents(entry.segment, shape=chain.shape))
        else:
            self._index.add(entry)
        self._note(self._index.warning)
        self._keep_room(checkpoint)
        if self._compaction is not None:
            for pfns in checkpoint.pfn_lists:
                self._compaction.touch(pfns)
        self._on_phase("applied", entry.epoch)
        if self._compaction is not None and self._compaction.is_ready:
            self._close_compaction()
        elif self._is_long(chain):
            try:
                self._compact()
            except StoreError as error:
                self._on_failed(error)
        if self._retention is not None and (is_new or self._pruning is not None):
            self._prune_quietly(self._retention)

    def _keep_room(self, checkpoint: Checkpoint) -> None:
        """So that a full disk does not keep anybody from going on from it."""
        if (size := max(len(checkpoint.device_state), _SPARE_BYTES)) > self._spare_bytes:
            with suppress(OSError):
                keep_room(self._warm / SPARE, size)
                self._spare_bytes = size

    def _switch(self, chain: _Chain) -> None:
        """Another stream is in force."""
        self._cancel_compaction()  # it reads the memory of the old one
        old = self._chain
        self._chain = chain
        if old is not None:
            self._close_segment(old)
            try:
                old.home.remove()
            except StoreError as error:
                self._note(str(error))

    def _close_segment(self, chain: _Chain) -> None:
        """It will not grow any more."""
        with suppress(OSError):
            self._index.seal(chain.path.name, os.fstat(chain.fd).st_size)
        chain.close()

    def abandon(self) -> None:
        """Cut off what is incomplete, back to the newest durable checkpoint; after an error in any step too.

        A checkpoint that is stored and not applied yet is durable, and applied. Nothing comes before the next `begin`.
        """
        if self._held:  # closing it has done that
            with self._changing():
                self._abandon()

    def _abandon(self) -> None:
        chain = self._coming
        if self._stored is not None:
            self._apply()
        self._coming = None
        was_failed, self._failed = self._failed, False
        if chain is None:
            return
        if chain is not self._chain:
            chain.close()
            chain.home.close()
            with guarding(chain.path):
                chain.path.unlink(missing_ok=True)
            chain.home.remove()
            return
        if chain.written != chain.end or was_failed or chain.restorer.staged is not None:
            chain.restorer.rewind()
            was_sealed, chain.is_sealed = chain.is_sealed, True
            with guarding(chain.path):
                os.ftruncate(chain.fd, chain.end)
                os.lseek(chain.fd, chain.end, os.SEEK_SET)
                os.fdatasync(chain.fd)
            chain.written, chain.is_sealed = chain.end, was_sealed

    # Compaction and retention

    def _is_long(self, chain: _Chain) -> bool:
        if self._compact_bytes is None:
            return False
        deltas = chain.end - chain.base_bytes
        most = max(chain.base_bytes, self._compact_bytes, chain.compact_over)
        return deltas > most or chain.checkpoints > max(self._compact_checkpoints, chain.compact_behind)

    @property
    def compacting(self) -> bool:
        """Whether a compaction is under way."""
        return self._compaction is not None

    def compact(self, *, wait: bool = False) -> None:
        """Start a new segment, with a full base that is written in the background from the warm copy.

        wait: return when it is closed; not while checkpoints come, since it is closed between two of them
        A compaction that fails leaves things as they were; `warnings` says why. Raises StoreError.
        """
        with self._changing():
            compaction = self._compact()
        if wait:
            compaction.join()

    def _compact(self) -> Compaction:
        chain = self._chain
        if chain is None or chain.shape is None:
            raise StoreError(f"{self.directory}: there is no checkpoint to compact")
        if chain.home.path is None:
            raise StoreError(f"{self.directory}: the warm copy has been handed out, and may have changed")
        if self.is_handed_out and self._given_position != str(self.position):
            # In a new segment it would pass for something that came after the takeover.
            raise StoreError(
                f"{self.directory}: somebody has gone on from checkpoint {_epoch_in(self._given_position)}"
            )
        if self._compaction is None:
            path = self._segments / f"compacted-{self._next_sequence():06}{PARTIAL}"
            compaction = Compaction(
                self._lock,
                chain.restorer.memory,
                chain.home,
                chain.shape,
                path,
                on_ready=self._on_ready,
                on_failed=self._on_failed,
            )
            self._on_phase("compacting", self._epoch)
            compaction.start()  # it waits for our lock
            self._compaction = compaction
        return self._compaction

    @property
    def _epoch(self) -> int:
        return -1 if self.position is None else self.position.epoch

    def _on_ready(self) -> None:
        chain = self._chain
        is_between = chain is not None and chain.written == chain.end and self._stored is None and not self._failed
        if is_between and (self._coming is None or self._coming is chain):
            with self._changing():
                self._close_compaction()

    def _on_failed(self, error: StoreError) -> None:
        self._compaction = None
        if (chain := self._chain) is not None:
            # It is not tried again at each checkpoint: it may have written all of memory before it failed.
            chain.compact_over = chain.end - chain.base_bytes + COMPACT_BYTES
            chain.compact_behind = chain.checkpoints + self._compact_checkpoints
        self._note(f"compaction: {error}")

    def _cancel_compaction(self) -> None:
        if self._compaction is not None:
            self._compaction.cancel()
            self._compaction = None

    def _close_compaction(self) -> None:
        """Between two checkpoints: the new segment is the one that later ones go to."""
        compaction, chain = self._compaction, self._chain
        assert compaction is not None and chain is not None
        checkpoint = chain.restorer.in_force
        assert checkpoint is not None
        record = record_of(checkpoint)
        final = compaction.path.with_name(segment_name(record.epoch, self._next_sequence()))
        try:
            fd = compaction.close(record)
            self._publish(compaction.path, final)
        except StoreError as error:
            compaction.is_over = False
            compaction.cancel()
            self._on_failed(error)
            return
        self._compaction = None
        self._close_segment(chain)
        chain.fd, chain.path = fd, final
        chain.end = chain.written = chain.base_bytes = compaction.written
        chain.shift = compaction.written - chain.restorer.boundary.offset
        chain.checkpoints, chain.is_sealed = 1, False
        chain.compact_over = chain.compact_behind = 0
        entry = Entry(
            position=record.after,
            time_ns=record.time_ns,
            segment=final.name,
            start=0,
            end=compaction.written,
            pages=compaction.pages,
            is_base=True,
        )
        self._index.add(entry, Contents(final.name, shape=chain.shape))
        self._note(self._index.warning)
        self._on_phase("compacted", record.epoch)
        if self._retention is not None:
            self._prune_quietly(self._retention)

    def _prune_quietly(self, retention: Retention) -> None:
        """Find what is to go, unless that is under way; it goes in batches, one behind each checkpoint."""
        try:
            self._pruning = self._pruning or self._find_over(retention, time.time_ns())
            self._prune_a_batch()
        except StoreError as error:
            self._pruning = None
            self._note(f"prune: {error}")

    def prune(self, retention: Retention, *, now_ns: int | None = None) -> list[str]:
        """Remove the oldest segments as far as `retention` says; returns their names. Raises StoreError.

        Other threads may go on writing between two batches of them.
        """
        self._prune_the_rest()
        with self._changing():
            pruning = self._pruning = self._find_over(retention, time.time_ns() if now_ns is None else now_ns)
            names = [] if pruning is None else list(pruning.over)
        self._prune_the_rest()
        return names

    def _prune_the_rest(self) -> None:
        while self._pruning is not None:
            with self._changing():
                self._prune_a_batch()
            time.sleep(_PRUNE_PAUSE_S)  # else whoever waits for the lock might not get it

    def _find_over(self, retention: Retention, now_ns: int) -> _Pruning | None:
        if self._chain is None or retention == Retention():
            return None
        current = sequence_of(self._chain.path.name)
        older = [one for one in self._index.known.values() if sequence_of(one.name) <= current]
        newer = [one for one in self._index.known.values() if sequence_of(one.name) > current]
        times_ns: list[int | None] = [None] * len(older)
        if retention.age_s is not None:
            floor_ns = self.state.more.get("pruned_ns")
            times_ns = times_taken(older, self._written_ns, now_ns, floor_ns if type(floor_ns) is int else None)
        with guarding(self._segments):
            sizes = [self._size_of(one) for one in [*older, *newer]]
        # Newer ones are there where they are damaged: they count for the size.
        sizes[len(older) - 1 :] = [sum(sizes[len(older) - 1 :])]
        count = count_over(older, sizes, retention, times_ns)
        if not count:
            return None
        over = {one.name: one.last.epoch if one.last else self._epoch for one in older[:count]}
        return _Pruning(over, sequence_of(older[count].name), times_ns[count - 1])

    def _prune_a_batch(self) -> None:
        """So few that a checkpoint which waits for them is not late."""
        pruning = self._pruning
        if pruning is None:
            return
        batch = dict(islice(pruning.over.items(), _PRUNE_BATCH))
        with guarding(self._segments):
            # First out of the index: a segment that it does not name is found again if we die here.
            self._index.drop(batch)
            for name, epoch in batch.items():
                self._on_phase("pruning", epoch)
                (self._segments / name).unlink(missing_ok=True)
                del pruning.over[name]
            sync_directory(self._segments)
        if not pruning.over:
            self._pruning = None
            self._forget_pruned(pruning.oldest_left, pruning.taken_ns)

    def _forget_pruned(self, oldest_left: int, taken_ns: int | None) -> None:
        """Nothing in store.json names what was pruned, but the time that it was from."""
        damaged = {
            name: why
            for name, why in self.state.damaged.items()
            if is_segment(name) and sequence_of(name) >= oldest_left
        }
        more = self.state.more if taken_ns is None else {**self.state.more, "pruned_ns": taken_ns}
        if damaged != self.state.damaged or more != self.state.more:
            self._save(replace(self.state, damaged=damaged, more=more))

    def _written_ns(self, name: str) -> int | None:
        with suppress(OSError):
            return (self._segments / name).stat().st_mtime_ns
        return None

    def _size_of(self, one: Contents) -> int:
        """Raises OSError."""
        return (self._segments / one.name).stat().st_size if one.size is None else one.size

    def _note(self, warning: str | None) -> None:
        if warning is not None and len(self.warnings) < _MAX_WARNINGS and warning not in self.warnings:
            self.warnings.append(warning)

    # Takeover

    def hand_out(self) -> tuple[Path, Path]:
        """The newest checkpoint's memory and device state, as files for one who goes on from them and writes to them.

        They lie where the warm copy does, and are made once for each term: asked again, even after a crash of this
        process, they are the same files, whatever has been written to them, and `handed_out` says which checkpoint
        they held. Only after a crash of the machine, which may have torn them, they are made anew. The stream that led
        here cannot be continued any more.
        Raises StoreError, NoCheckpoint.
        """
        with self._changing():
            if self._stored is not None:
                self._apply()
            self._settle()
            self._cancel_compaction()
            chain, checkpoint = self._chain, self.in_force
            if chain is None or checkpoint is None or self.position is None:
                raise NoCheckpoint(f"{self.directory}: there is no checkpoint to go on from")
            image = self._warm / f"taken-over-{self.state.term}.image"
            device_state = self._warm / f"taken-over-{self.state.term}.state"
            with guarding(_BOOT_ID):
                made = {"position": str(self.position), "boot": _boot_id()}
            # Whatever checkpoint is the newest now: these are in use.
            given = self.state.more.get("handed_out") or {}
            if given.get("boot") == made["boot"] and image.exists() and device_state.exists():
                return image, device_state
            with guarding(self._warm):
                for path in self._warm.glob("taken-over-*"):
                    path.unlink()
                self._spare_bytes = 0  # also where this fails: it may have cost the spare
                replace_file(device_state, checkpoint.device_state, self._warm / SPARE)
            chain.is_sealed = True
            self._save(replace(self.state, more={**self.state.more, "handed_out": made}))
            if chain.home.path is None:  # it was handed out before, and the file has been taken away
                self.history.restore_image(image, self.position.epoch)
            else:
                chain.home.hand_out(image, checkpoint.memory_bytes)
            self._keep_room(checkpoint)
            return image, device_state

    # The end

    def close(self) -> None:
        """Drop what is incomplete, end a compaction, and let another write. May be called again."""
        if self._held:
            self._end()

    def remove(self) -> None:
        """Close it, and remove the history with all that it holds. Raises StoreError."""
        if not self._held:
            raise self._torn()
        self._end(remove=True)

    def _end(self, *, remove: bool = False) -> None:
        with self._lock:
            compaction = self._compaction
            try:
                self.abandon()
            except Exception as error:
                self._note(str(error) or type(error).__name__)
            self._is_torn = True
            self._cancel_compaction()
        if compaction is not None:
            compaction.join(_CANCEL_S)
        self._release(remove=remove)

    def disown(self) -> None:
        """In a fork: the history is the parent's. Here it can only be closed, which does nothing.

        The index is left open: what SQLite must not do in a fork is to close it.
        """
        self._is_torn, self._lock = True, threading.RLock()
        for chain in (self._coming, self._chain):
            if chain is not None:
                chain.close()
                chain.home.close()
        while self._held:
            with suppress(OSError):
                os.close(self._held.pop())

    def _release(self, *, remove: bool = False) -> None:
        try:
            for chain in (self._coming, self._chain):
                if chain is not None:
                    chain.close()
                    chain.home.close()
            self._coming = self._chain = None
            if hasattr(self, "_index"):
                self._index.close()
            if remove:
                self._remove_files()
        finally:  # whatever happened: nobody else could open the history
            while self._held:
                with suppress(OSError):
                    os.close(self._held.pop())

    def _remove_files(self) -> None:
        with guarding(self._warm):
            for path in [*self._warm.glob("memory-*.image"), self._warm / SPARE]:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # another store may have left something there
                self._warm.rmdir()
        with guarding(self.directory):
            shutil.rmtree(self.directory)

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _boot_id() -> str:
    """Changes when the machine starts anew: what was not synced before may be torn then."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def _epoch_in(position: str) -> int | None:
    """The epoch in a position as store.json has it; None where there is none."""
    epoch = position.partition(":")[0]
    return int(epoch) if epoch.isascii() and epoch.isdigit() and len(epoch) < 20 else None


def _bounded(damaged: dict[str, str]) -> dict[str, str]:
    """As much of it as store.json has room for: what is not named there is found when the store is verified."""
    newest_first = sorted(damaged, key=lambda name: sequence_of(name) if is_segment(name) else -1, reverse=True)
    return {name: str(damaged[name])[:_MAX_REASON] for name in reversed(newest_first[:_MAX_DAMAGED])}
