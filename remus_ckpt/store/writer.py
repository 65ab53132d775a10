"""The writing side of a history: received, checked, durable, applied, in that order (specs/store.md §6)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding
from remus_ckpt.errors import Malformed, NoCheckpoint, RemusError, StoreError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Buffer, Pages
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.store import index
from remus_ckpt.store.ahead import AHEAD_BYTES, Ahead
from remus_ckpt.store.chain import Arriving, Chain, publish
from remus_ckpt.store.compaction import COMPACT_BYTES, COMPACT_CHECKPOINTS, Compaction, Compactor
from remus_ckpt.store.directory import HistoryDirectory
from remus_ckpt.store.hand_over import HandOver
from remus_ckpt.store.history import History
from remus_ckpt.store.pruning import Pruner
from remus_ckpt.store.recovery import MAX_WARNINGS, Recovery
from remus_ckpt.store.retention import Removal, Retention
from remus_ckpt.store.room import Room
from remus_ckpt.store.segments import Contents, Entry, Shape, entry_of, record_of, shape_of
from remus_ckpt.store.state import Role, State, StateFile
from remus_ckpt.wire.digest import DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.whole import Whole

_CANCEL_S = 10.0
_PRUNE_PAUSE_S = 0.001


class Torn(StoreError):
    """The writer is closed, or a change to it was interrupted: reopening the history finds what is durable."""


class HistoryWriter:
    """The only writer of a history. Opening it recovers what is there (specs/store.md §9).

    directory: of the name; created if it does not exist
    name: written into a new store
    limits: what a stream may claim
    warm_directory: holds the warm copy, under the name; by default the history itself holds it
    warm_in_memory: keep the warm copy in memory if that has room, else there
    retention: applied after each compaction and each new base; room that it keeps free is looked for at each checkpoint
    compact_bytes, compact_checkpoints: compact when the deltas after a base have more bytes than both the base and
        compact_bytes, or number more than compact_checkpoints; with compact_bytes None, only `compact` does
    ahead_bytes: the most space that is written ahead of the data of the newest segment; 0: none
    on_phase: called with "staged", "stored", "applying", "applied", "compacting", "compacted" or "pruning" and an epoch

    For each checkpoint, pass its bytes to `feed`, or use `get_buffer` and `buffer_updated`; then call `check`, `store`,
    `apply`. After any error, except from `begin`, call `abandon` before anything else. Only one thread at a time may
    call methods.
    An outside exception, such as KeyboardInterrupt, may end any method at any point: either nothing has changed, or the
    writer refuses everything but `close`, and reopening the history finds what is durable.
    Raises StoreError if the store cannot be opened or written, or if another writer has it.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        *,
        limits: Limits | None = None,
        warm_directory: str | Path | None = None,
        warm_in_memory: bool = False,
        retention: Retention | None = None,
        compact_bytes: int | None = COMPACT_BYTES,
        compact_checkpoints: int = COMPACT_CHECKPOINTS,
        ahead_bytes: int = AHEAD_BYTES,
        on_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.warnings: list[str] = []
        """What was found wrong when the store was opened, and what has failed since."""
        self.position: Position | None = None
        """The position of the newest durable checkpoint."""
        self._limits = limits
        self._on_phase = on_phase or (lambda phase, epoch: None)
        self._lock = threading.RLock()
        self.chain: Chain | None = None
        self._coming: Chain | None = None
        self._stored: Entry | None = None
        self._failed = False  # no more bytes are taken in until `abandon`
        self._is_torn = False  # a change was interrupted: memory and disk may differ
        self._room = memoryview(b"")
        self._highest = -1
        self._compactor = Compactor(
            self._lock,
            compact_bytes=compact_bytes,
            compact_checkpoints=compact_checkpoints,
            on_ready=self._on_ready,
            note=self._note,
        )
        warm = None if warm_directory is None else Path(warm_directory)
        self._own = HistoryDirectory(self.directory, name, warm, in_memory=warm_in_memory)
        disown_in_forks(self)
        try:
            self._own.take()
            with guarding(self.directory):
                self._state = StateFile(self.directory, name)
            self.history = History(self.directory, limits=limits)
            """The reading side."""
            self._index = index.Index(self.directory / index.FILE, self._own.segments, limits)
            self._hand_over = HandOver(self._own.warm, self._state, self.history, self._own.memory)
            least_free = (retention and retention.free) or 0
            self._ahead = Ahead(self._lock, self._own.segments, ahead_bytes, least_free)
            self._pruner = Pruner(
                self._own.segments,
                self._index,
                self._state,
                retention,
                self._on_phase,
                self._note,
                give_back=lambda: bool(self._ahead.give_back(self.chain)),
            )
            with guarding(self.directory):
                self._recover()
        except BaseException:
            self._release()
            raise

    # Opening

    def _recover(self) -> None:
        self._own.clean()
        self._own.sync()
        found = Recovery(
            self.directory, self.state, self._index.load(), self._limits, self._own.new_home, self._index.fill
        ).found()
        for warning in found.warnings:
            self._note(warning)
        self._own.cut(found.lengths)
        self._highest = found.highest_epoch
        if (newest := found.newest) is not None:
            held = newest.restorer.in_force
            self.chain = Chain.resume(
                self._own.segments / newest.name,
                newest.restorer,
                newest.home,
                newest.contents,
                synced=newest.synced,
                cut=newest.is_cut,
                is_sealed=newest.is_sealed,
            )
            assert held is not None
            self.position = record_of(held).after
            self._hand_over.keep_room(held.device_state)
        if found.state != self.state:
            self._state.save(found.state)
        self._index.begin(found.contents, found.indexed)
        self._note(self._index.warning)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change, with the lock held. After our own errors, memory still agrees with the disk; after any other
        error, it may not."""
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

    # Contents

    @property
    def state(self) -> State:
        """The contents of store.json, as anyone who opens the history would read them, also after an exception."""
        return self._state.state

    def set_state(self, *, term: int | None = None, role: Role | None = None, **more: Any) -> None:
        """Change store.json atomically and durably.

        Raises StoreError. `state` is then what anyone who opens the history would read: the old state or, if not even
        the old one could be put back, the new one. If it is unknown which of them a loss of power would leave, nothing
        is received, stored, handed out or changed until `state` has been written again.
        """
        with self._changing():
            self._state.settle()
            self._state.save(
                replace(
                    self.state,
                    term=self.state.term if term is None else term,
                    role=self.state.role if role is None else role,
                    more={**self.state.more, **more},
                )
            )

    @property
    def stream(self) -> Shape | None:
        """What a stream must match to continue from `position`; None: only a full stream can follow."""
        chain = self.chain
        if chain is None or chain.is_sealed or self._epoch < self._highest:
            return None
        return None if self.is_handed_out else chain.shape

    @property
    def is_handed_out(self) -> bool:
        """Whether work has continued from this stream: `position` is then no longer the newest state of that memory."""
        return self.chain is not None and self._hand_over.is_of(self.chain)

    @property
    def handed_out(self) -> Position | None:
        """The position that `hand_out` has given: `position` or an earlier one. None if there is none, or if it is
        unknown."""
        return self._hand_over.position(self.position)

    @property
    def highest_epoch(self) -> int:
        """The highest epoch ever seen here, −1 before the first: the epoch of a new base must be higher."""
        return self._highest

    @property
    def in_force(self) -> Checkpoint | None:
        """The checkpoint that the warm copy holds."""
        return None if self.chain is None else self.chain.restorer.in_force

    @property
    def memory(self) -> Pages | None:
        """uint8[p2m_size, 4096], the warm copy; only `apply` changes it.

        On a tmpfs, merely reading a page that was never written allocates room, and kills the process if there is none:
        read `image` instead.
        """
        return None if self.chain is None else self.chain.restorer.memory

    @property
    def image_fd(self) -> int | None:
        """A descriptor of the warm copy's file, which belongs to this object; the file may have no name."""
        return None if self.chain is None or self.chain.home.is_handed_out else self.chain.home.fd

    @property
    def image(self) -> Path | None:
        """The warm copy's file; only useful to others while nothing is being applied. None if it has none by name."""
        return None if self.chain is None else self.chain.home.path

    @property
    def warm_on_disk(self) -> str | None:
        """Why the warm copy is not in memory, where it should be; None if it is, or should not."""
        return None if self._own.memory is None else self._own.memory.on_disk_for

    # Receiving

    def begin(self, *, full: bool, digest: DigestName | None = None) -> None:
        """Begin a new stream (full), or continue the one whose last checkpoint is `position`.

        digest: what the records of a new stream must name; None: the first one says

        An incomplete checkpoint is dropped. Raises StoreError if the stream cannot continue or a file cannot be
        created.
        """
        with self._changing():
            self._abandon()
            self._state.settle()
            self._make_room()  # a full disk would admit no checkpoint to prune after
            if not full:
                if self.stream is None:
                    raise StoreError(f"{self.directory}: no stream that could be continued; a full copy is needed")
                self._coming = self.chain
                return
            self._compactor.cancel()
            self._ahead.give_back(self.chain)
            home = self._own.new_home()
            try:
                path = self._own.partial("incoming")
                self._coming = Chain.begin(path, Restorer(limits=self._limits, home=home, digest=digest), home)
            except BaseException:
                home.remove()
                raise

    @contextmanager
    def _receiving(self) -> Iterator[Chain]:
        """The chain that receives bytes, with the lock held. After any exception, `abandon` must follow."""
        with self._lock:
            if self._is_torn:
                raise self._torn()
            if self._coming is None or self._failed or self._stored is not None:
                raise StoreError(f"{self.directory}: nothing can be received now")
            self._coming.check_open()
            self._failed = True
            self._coming.expect_more()
            yield self._coming
            self._failed = False

    @property
    def arriving(self) -> Arriving | None:
        """What has arrived of the checkpoint being received; None between two."""
        chain = self._coming
        size = 0 if chain is None else chain.written - chain.end
        return None if chain is None or not size else Arriving(chain is not self.chain, size, chain.began_at)

    def room_for_base(self, data_bytes: int) -> Room:
        """The room for a full copy with so many bytes of pages. Raises StoreError. May wait for the disk."""
        return self._own.room_for_base(data_bytes, 0 if self.chain is None else self.chain.ahead)

    def get_buffer(self) -> memoryview:
        """The buffer for the next bytes; tell `buffer_updated` how many came."""
        with self._receiving() as chain:
            self._room = chain.get_buffer()
            return self._room

    def buffer_updated(self, size: int) -> None:
        """Take in what was received into `get_buffer`. Raises StreamError, and StoreError if there is no room."""
        with self._receiving() as chain:
            chain.received(self._room[:size])
            self._room = memoryview(b"")

    def feed(self, data: Buffer) -> None:
        """Take in bytes from the caller. Raises like `buffer_updated`."""
        if not len(data):
            return
        with self._receiving() as chain:
            chain.feed(data)

    def check(self, position: Position) -> Checkpoint:
        """After the last byte of a checkpoint: check that it is complete and valid, and leads to this position.

        Raises Malformed.
        """
        with self._lock:
            if self._is_torn:
                raise self._torn()
            if self._coming is None or self._failed or self._stored is not None:
                raise StoreError(f"{self.directory}: there is nothing to check")
            try:
                staged = self._coming.check(position, self._highest)
            except Malformed:
                self._failed = True
                raise
            self._on_phase("staged", staged.epoch)
            return staged

    def store(self) -> Entry:
        """Make the checked checkpoint durable; it may then be acknowledged. Raises StoreError."""
        with self._changing():
            chain = self._coming
            if chain is None or self._failed or self._stored is not None or chain.restorer.staged is None:
                raise StoreError(f"{self.directory}: no checkpoint has been checked")
            chain.check_open()
            staged = chain.restorer.staged
            self._failed = True
            self._state.settle()
            chain.sync()
            if chain is not self.chain:
                final = self._own.segment(staged.epoch)
                publish(chain.path, final, self.chain)
                chain.path = final
            self._failed = False
            return self._note_stored(chain, staged)

    def _note_stored(self, chain: Chain, staged: Checkpoint) -> Entry:
        entry = entry_of(staged, chain.path.name, chain.shift)
        chain.end = chain.written
        self.position = entry.position
        self._highest = entry.epoch
        self._stored = entry
        self._on_phase("stored", entry.epoch)
        return entry

    def store_whole(self, whole: Whole, on_staged: Callable[[], Callable[[], None]]) -> bool:
        """`feed`, `check` and `store` a checkpoint that has been walked, in one go; False if it has only been fed.

        on_staged: called while the disk writes; returns what is called once the checkpoint is durable and `position`
            says so, before anything else is done. Neither raises anything
        Raises like `feed`.
        """
        with self._lock:  # as in `_changing`, which would take more steps
            if self._is_torn:
                raise self._torn()
            self._is_torn = True
            try:
                has_stored = self._store_whole(whole, on_staged)
            except RemusError:
                self._is_torn = False
                raise
            self._is_torn = False
        if has_stored is None:
            self.feed(whole.data)
        return bool(has_stored)

    def _store_whole(self, whole: Whole, on_staged: Callable[[], Callable[[], None]]) -> bool | None:
        """None: it may not be stored, and has not been fed either."""
        chain, epoch = self._coming, whole.epoch
        if (
            chain is None
            or chain is not self.chain
            or self._stored is not None
            or self._failed
            or chain.restorer.staged is not None
            or chain.is_sealed
            or chain.written != chain.end
            or epoch <= self._highest
        ):
            return None
        self._failed = True
        if not chain.take_whole(whole):
            self._failed = False
            return False
        self._state.settle()
        self._on_phase("staged", epoch)
        on_durable = on_staged()
        chain.sync()
        self.position = whole.after  # first: whoever hears of the acknowledgement may ask for the checkpoint
        on_durable()
        self._failed = False
        self._note_stored(chain, chain.restorer.stage_whole(whole))
        return True

    def apply(self) -> None:
        """Put the stored checkpoint into the index and the warm copy. May close a compaction.

        This cannot fail, except that it raises WarmCopyDamaged if the warm copy has been truncated from outside: the
        history must then be reopened.
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
        is_new = chain is not self.chain
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
        self._ahead.stored(chain, entry.end - entry.start)
        self._hand_over.keep_room(checkpoint.device_state)
        self._compactor.touch(checkpoint)
        self._on_phase("applied", entry.epoch)
        if self._compactor.current is not None and self._compactor.current.is_ready:
            self._close_compaction()
        elif self._compactor.is_due(chain):
            try:
                self._compact()
            except StoreError as error:
                self._compactor.fail(chain, error)
        if is_new:
            self._pruner.go_on(chain.path.name)
        else:
            self._pruner.make_room(chain.path.name)

    def _switch(self, chain: Chain) -> None:
        """Put another stream in force."""
        self._compactor.cancel()  # it reads the memory of the old one
        old = self.chain
        self.chain = chain
        if old is not None:
            self._seal(old)
            try:
                old.home.remove()
            except StoreError as error:
                self._note(str(error))

    def _seal(self, chain: Chain) -> None:
        """Seal the chain's segment: it will not grow any more."""
        self._ahead.give_back(chain)
        with suppress(OSError):
            self._index.seal(chain.path.name, os.fstat(chain.fd).st_size)
        chain.close()

    def abandon(self) -> None:
        """Cut off what is incomplete, back to the newest durable checkpoint; also to be called after an error in any
        step.

        A checkpoint that is stored but not yet applied is durable, and is applied now. The next call must be `begin`.
        """
        if self._own.is_held:  # after `close`, which has already done this, do nothing
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
        if chain is not self.chain:
            chain.discard()
        elif chain.written != chain.end or was_failed or chain.restorer.staged is not None:
            chain.cut_back()

    # Compaction and retention

    @property
    def compacting(self) -> bool:
        """Whether a compaction is under way."""
        return self._compactor.current is not None

    def compact(self, *, wait: bool = False) -> None:
        """Start a new segment, whose full base is written in the background from the warm copy.

        wait: return once the compaction is closed; not for use while a checkpoint is arriving, since a compaction is
            closed between two checkpoints
        A compaction that fails changes nothing; `warnings` says why. Raises StoreError.
        """
        with self._changing():
            compaction = self._compact()
        if wait:
            compaction.join()

    def _compact(self) -> Compaction:
        chain = self.chain
        if chain is None or chain.shape is None:
            raise StoreError(f"{self.directory}: there is no checkpoint to compact")
        if chain.home.is_handed_out:
            raise StoreError(f"{self.directory}: the warm copy has been handed out, and may have changed")
        if self.is_handed_out and not self._hand_over.is_at(self.position):
            # In a new segment the checkpoint would look as if it came after the takeover.
            raise StoreError(f"{self.directory}: somebody has gone on from an earlier checkpoint of this stream")
        if self._compactor.current is None:
            self._on_phase("compacting", self._epoch)
            self._compactor.begin(chain, self._own.partial("compacted"))
        assert self._compactor.current is not None
        return self._compactor.current

    @property
    def _epoch(self) -> int:
        return -1 if self.position is None else self.position.epoch

    def _on_ready(self) -> None:
        chain = self.chain
        is_between = chain is not None and chain.written == chain.end and self._stored is None and not self._failed
        if is_between and (self._coming is None or self._coming is chain):
            with self._changing():
                self._close_compaction()

    def _close_compaction(self) -> None:
        """Between two checkpoints: switch to the new segment, which receives all later checkpoints."""
        chain = self.chain
        assert chain is not None
        if (closed := self._compactor.close(chain, self._own.segment)) is None:
            return
        fd, entry = closed
        self._seal(chain)
        chain.go_on_in(fd, self._own.segments / entry.segment, entry.end)
        self._index.add(entry, Contents(entry.segment, shape=chain.shape))
        self._note(self._index.warning)
        self._on_phase("compacted", entry.epoch)
        self._pruner.go_on(chain.path.name)

    def make_room(self) -> None:
        """Remove a few segments if too little is free. Any thread may call this. Raises StoreError after `close`."""
        with self._changing():
            self._ahead.give_back_if_idle(self.chain)
            self._make_room()

    def _make_room(self) -> None:
        if self.chain is not None:
            self._pruner.make_room(self.chain.path.name)

    def prune(self, retention: Retention, *, now_ns: int | None = None) -> list[Removal]:
        """Remove the segments that `retention` does not keep; returns them, oldest first. Other threads may continue to
        write between two batches. Raises StoreError."""
        self._prune_the_rest()
        with self._changing():
            if self.chain is None:
                return []
            now_ns = time.time_ns() if now_ns is None else now_ns
            removals = self._pruner.begin(self.chain.path.name, retention, now_ns)
        self._prune_the_rest()
        return removals

    def _prune_the_rest(self) -> None:
        while self._pruner.is_under_way:
            with self._changing():
                self._pruner.remove_some()
            time.sleep(_PRUNE_PAUSE_S)  # otherwise threads that wait for the lock might not get it

    def _note(self, warning: str | None) -> None:
        if warning is not None and len(self.warnings) < MAX_WARNINGS and warning not in self.warnings:
            self.warnings.append(warning)

    # Takeover

    def hand_out(self) -> tuple[Path, Path]:
        """The newest checkpoint's memory and device state, as files for a survivor that continues from them and writes
        to them.

        The files are beside the warm copy, and are made once per term: later calls, even from another process, return
        the same files, whatever has been written to them; `handed_out` says which checkpoint they held. After a crash
        of the machine, which may have torn them, they are made again. The stream that led here ends with this call.
        Raises StoreError, NoCheckpoint.
        """
        with self._changing():
            if self._stored is not None:
                self._apply()
            self._state.settle()
            self._compactor.cancel()
            self._ahead.give_back(self.chain)
            if self.chain is None or self.position is None:
                raise NoCheckpoint(f"{self.directory}: there is no checkpoint to go on from")
            return self._hand_over.give(self.chain, self.position)

    # The end

    def close(self) -> None:
        """Drop what is incomplete, end a compaction, and release the history to other writers. May be called again."""
        if self._own.is_held:
            self._end()

    def remove(self) -> None:
        """Close the writer, and remove the history with everything in it. Raises StoreError."""
        if not self._own.is_held:
            raise self._torn()
        self._end(remove=True)

    def _end(self, *, remove: bool = False) -> None:
        with self._lock:
            compaction = self._compactor.current
            try:
                self.abandon()
            except Exception as error:
                self._note(str(error) or type(error).__name__)
            if not self._is_torn:
                self._ahead.give_back(self.chain)
            self._is_torn = True
            self._compactor.cancel()
        if compaction is not None:
            compaction.join(_CANCEL_S)
        self._release(remove=remove)

    def disown(self) -> None:
        """In a forked child: the history belongs to the parent, and nothing is written. SQLite's files must not be
        closed there."""
        self._is_torn, self._lock = True, threading.RLock()
        self._close_chains()
        self._own.disown()

    def _release(self, *, remove: bool = False) -> None:
        try:
            self._close_chains()
            self._coming = self.chain = None
            if hasattr(self, "_index"):
                self._index.close()
            if remove:
                self._own.remove()
        finally:  # in any case, or nobody else could open the history
            self._own.release()

    def _close_chains(self) -> None:
        for chain in filter(None, (self._coming, self.chain)):
            chain.close()
            chain.home.close()

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
