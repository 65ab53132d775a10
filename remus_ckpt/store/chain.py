"""The segment that grows: it is appended to, checked, synced, named, and cut back (specs/store.md §4, §6.1)."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from remus_ckpt.disk import guarding, start_writing, sync_directory, told, write_again, write_all
from remus_ckpt.errors import Malformed, StoreError
from remus_ckpt.limits import MIB
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.store.segments import Contents, Shape, can_keep, record_of
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Landing, Whole, write_early

_BASE_COPIES, _BASE_EXTRA_BYTES = 4, 64 * MIB
"""The maximum size of a base: a first copy covers memory more than once, but never this often."""
_EARLY_BYTES = 256 << 10
"""This many bytes are written out while the rest of the checkpoint arrives, so that the sync has less to wait for."""
LANDING_BYTES = 64 * MIB
"""A larger checkpoint is parsed as it arrives, and takes no more memory than its pages."""
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
"""Chunks that our own streams never have, and that a compaction would lose."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """What has arrived of a checkpoint that is not durable yet.

    is_base: it begins a new stream
    since: when its first byte arrived, on the monotonic clock
    """

    is_base: bool
    bytes: int
    since: float


@dataclass(slots=True)
class Chain:
    """A segment, and the restorer of its stream. The caller holds the writer's lock.

    end: the first byte after its last durable checkpoint; written: the first byte after everything received
    room: the first byte after the space that was written ahead of the data; `written` if there is none
    growing: held while the file grows or is cut: another thread writes space after `room`
    early: the first byte whose write-out has not been started
    began_at: when the first byte of the checkpoint being received arrived, on the monotonic clock
    shift: a byte's offset in the segment minus its offset in the restorer's stream
    landing: where checkpoints land that are walked as they arrive, once there was one; is_landing: whether this one
    does
    is_sealed: nothing may be appended
    compact_over, compact_behind: bytes of deltas, and number of checkpoints, after which the next compaction is due
    """

    restorer: Restorer
    home: MappedFile
    path: Path
    fd: int
    shape: Shape | None = None
    end: int = 0
    written: int = 0
    room: int = 0
    early: int = 0
    began_at: float = 0.0
    shift: int = 0
    base_bytes: int = 0
    checkpoints: int = 0
    is_sealed: bool = False
    compact_over: int = 0
    compact_behind: int = 0
    landing: Landing | None = field(default=None, repr=False)
    is_landing: bool = False
    growing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def begin(cls, path: Path, restorer: Restorer, home: MappedFile) -> Chain:
        """Start a new segment, under a temporary name that readers ignore. Raises StoreError."""
        with guarding(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        return cls(restorer, home, path, fd)

    @classmethod
    def resume(
        cls,
        path: Path,
        restorer: Restorer,
        home: MappedFile,
        contents: Contents,
        *,
        synced: int,
        cut: bool,
        is_sealed: bool,
    ) -> Chain:
        """Continue an existing segment after its checkpoint in force; everything up to there is then durable.

        contents: what the segment holds; synced: how many of its first bytes are already synced
        cut: cut off what follows the checkpoint
        home: removed if this fails
        Raises StoreError.
        """
        end = contents.end
        fd = -1
        try:
            with guarding(path):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if cut:
                    os.ftruncate(fd, end)
                write_again(fd, synced, end)
                os.lseek(fd, end, os.SEEK_SET)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            home.remove()
            raise
        chain = cls(restorer, home, path, fd, contents.shape, end, end, end, end, is_sealed=is_sealed)
        chain.checkpoints = len(contents.epochs)
        if contents.first is not None:
            chain.count_base(contents.first.end)
        return chain

    def close(self) -> None:
        """Close the segment. May be called again. Everything that counts is synced, so an error here is ignored."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def discard(self) -> None:
        """Remove a segment whose base is not durable, and its warm copy. Raises StoreError."""
        self.close()
        self.home.close()
        with guarding(self.path):
            self.path.unlink(missing_ok=True)
        self.home.remove()

    # A checkpoint

    def check_open(self) -> None:
        """Raises StoreError if nothing may be appended."""
        if self.is_sealed:
            raise StoreError(f"{self.path}: this segment cannot be continued; a full copy is needed")

    def expect_more(self) -> None:
        """Raises Malformed if a complete checkpoint is waiting to be checked."""
        if self.restorer.staged is not None:
            raise Malformed(
                "bytes after the end of a checkpoint that has not been committed",
                offset=self.restorer.staged.end,
                section="store.md §4.2",
            )

    def _begin(self) -> None:
        """Before the first byte of a checkpoint: find out whether it may land."""
        self.landing = self.landing or self.restorer.landing(LANDING_BYTES)
        self.is_landing = self.landing is not None
        if self.landing is not None:
            self.landing.clear()

    def get_buffer(self) -> memoryview:
        """The buffer for the next bytes; tell `received` how many arrived."""
        if self.written == self.end:
            self._begin()
        if self.landing is not None and self.is_landing:
            return self.landing.get_buffer()
        return self.restorer.get_buffer()

    def received(self, data: memoryview) -> None:
        """Process the bytes that arrived in the buffer. Raises StreamError, StoreError."""
        landing = self.landing
        if landing is None or not self.is_landing:
            self.restorer.buffer_updated(len(data))
            self._read()
            # The lent buffer still holds what was parsed without a fault: parsing moves no bytes.
            self.append(data)
            return
        # What is complete and damaged never comes to the disk: a recovery would take it for a loss.
        if not landing.took(len(data)) or (landing.whole is not None and not landing.whole.is_intact()):
            self._leave_landing()
        self.append(data)
        if not self.is_landing:
            return
        landing.hash()  # while the disk writes
        if landing.whole is not None:
            self.start_writing()
            if self.restorer.fits(landing.whole):
                self.restorer.reserve(landing.whole)
                self.restorer.stage_whole(landing.whole)
            else:
                self._leave_landing()
        elif landing.size == landing.most_bytes:
            self._leave_landing()

    def _leave_landing(self) -> None:
        """Parse what has landed, and everything else of this checkpoint."""
        assert self.landing is not None
        self.is_landing = False
        self.restorer.feed(self.landing.data)
        self._read()

    def feed(self, data: Buffer) -> None:
        """Process bytes from elsewhere. Raises like `received`."""
        if self.written == self.end:
            self._begin()
        left = memoryview(data).cast("B")
        while len(left) and self.is_landing and self.restorer.staged is None:
            room = self.get_buffer()[: len(left)]
            room[:] = left[: len(room)]
            left = left[len(room) :]
            self.received(room)
        if len(left):
            self.restorer.feed(left)
            self._read()
            self.append(left)

    def _read(self) -> None:
        """Parse what the restorer has been fed, up to the end of a checkpoint."""
        restorer = self.restorer
        while restorer.staged is None and (event := restorer.next_event()) is not None:
            if isinstance(event, _NOT_OURS):
                raise Malformed(
                    f"{type(event).__name__} never occurs in our own streams",
                    offset=event.offset,
                    section="store.md §4.1",
                )

    def take_whole(self, whole: Whole) -> bool:
        """Take a checkpoint that has been walked: it may be synced, and staged after that. False if it was fed.

        Raises StreamError, StoreError.
        """
        if not whole.is_intact():
            self.feed(whole.data)
            return False
        # The disk writes while the rest is checked; nothing counts before it is synced.
        self._write_early(whole.data)
        if not self.restorer.fits(whole):
            self.restorer.feed(whole.data)
            self._read()
            return False
        self.restorer.reserve(whole)
        return True

    def _write_early(self, data: memoryview) -> None:
        """`append` a whole checkpoint after the base and `start_writing`, in one call, if there is space for it."""
        stop = self.written + len(data)
        if not HAS_NATIVE or stop > self.room or self.early != self.written:
            self.append(data)
            self.start_writing()
            return
        self.began_at = time.monotonic()
        try:
            write_early(self.fd, data, self.written)
        except OSError as error:
            raise told(error, self.path) from error
        self.written = self.early = stop

    def append(self, data: Buffer) -> None:
        """Write bytes to the segment. Raises Malformed, StoreError."""
        if not self.end:
            most = _BASE_COPIES * self.restorer.memory.nbytes + _BASE_EXTRA_BYTES
            if self.written + len(data) > most:
                raise Malformed(
                    f"a base of more than {most} bytes", offset=self.written, section="store.md §4.2", chunk="base"
                )
        if self.written == self.end:
            self.began_at = time.monotonic()
        # Nothing else writes within the space: a checkpoint there never waits for the thread that makes more of it.
        with guarding(self.path), self.growing if self.written + len(data) > self.room else nullcontext():
            self.written += write_all(self.fd, [data])
            self.room = max(self.room, self.written)
        if self.written - self.early >= _EARLY_BYTES:
            self.start_writing()

    def start_writing(self) -> None:
        """Start writing out what has not been started: a sync then has less to wait for."""
        if self.written > self.early:
            start_writing(self.fd, self.early, self.written - self.early)
            self.early = self.written

    def check(self, position: Position, highest: int) -> Checkpoint:
        """The staged checkpoint, after checking that it leads to this position and that its epoch is above `highest`.

        Raises Malformed.
        """
        staged, reader = self.restorer.staged, self.restorer.reader
        if staged is None:
            at = self.written - self.shift
            raise Malformed("the checkpoint is not whole", offset=at, section="store.md §4.2")
        record = record_of(staged)
        at = staged.tail.offset if staged.tail is not None else staged.end
        if reader.buffered:
            raise Malformed(f"{reader.buffered} bytes after its end", offset=staged.end, section="store.md §4.2")
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
        if self.shape is not None and self.shape.codec != record.codec:
            raise Malformed(
                f"the codec changes from {self.shape.codec} to {record.codec}", offset=at, section="store.md §4.1"
            )
        if not can_keep(record.time_ns):
            raise Malformed(f"its time is {record.time_ns} ns", offset=at, section="store.md §4.2")
        if record.epoch <= highest:
            raise Malformed(
                f"epoch {record.epoch} after epoch {highest}, which the store has already seen",
                offset=at,
                section="store.md §4.2",
            )
        return staged

    def sync(self) -> None:
        """Make everything received durable. If that fails, the contents of the disk are unknown, and nothing more is
        appended.

        Raises StoreError.
        """
        with guarding(self.path):
            try:
                os.fdatasync(self.fd)
            except OSError:
                self.is_sealed = True
                raise
        self.early = self.written

    def cut_back(self) -> None:
        """Cut off what follows the last durable checkpoint. Raises StoreError; the segment is then sealed."""
        self.restorer.rewind()
        was_sealed, self.is_sealed = self.is_sealed, True
        with guarding(self.path), self.growing:
            os.ftruncate(self.fd, self.end)
            self.room = self.early = self.end
            os.lseek(self.fd, self.end, os.SEEK_SET)
            os.fdatasync(self.fd)
            self.written, self.is_sealed = self.end, was_sealed

    # The length of a segment

    @property
    def ahead(self) -> int:
        """Bytes of space that was written ahead."""
        return self.room - self.written

    def give_back(self) -> int:
        """Cut off the space that was written ahead; returns its bytes. Raises OSError."""
        with self.growing:
            size = self.ahead
            if size <= 0 or self.fd < 0 or self.is_sealed:
                return 0
            os.ftruncate(self.fd, self.written)
            self.room = self.written
            return size

    def count_base(self, end: int) -> None:
        """Set the end of the base. A first copy may hold pages more than once: what exceeds a single copy is overhead,
        and counts as deltas."""
        self.base_bytes = min(end, int(np.count_nonzero(self.home.has_room)) * PAGE_SIZE)

    @property
    def delta_bytes(self) -> int:
        """Bytes after the base."""
        return self.end - self.base_bytes

    def is_long(self, compact_bytes: int, compact_checkpoints: int) -> bool:
        """Whether the deltas have more bytes than both the base and `compact_bytes`, or number more than
        `compact_checkpoints`."""
        most = max(self.base_bytes, compact_bytes, self.compact_over)
        return self.delta_bytes > most or self.checkpoints > max(compact_checkpoints, self.compact_behind)

    def go_on_in(self, fd: int, path: Path, size: int) -> None:
        """Continue in another segment, whose base is the checkpoint in force."""
        self.close()
        with self.growing:
            self.fd, self.path = fd, path
            self.end = self.written = self.room = self.early = self.base_bytes = size
        self.shift = size - self.restorer.boundary.offset
        self.checkpoints, self.is_sealed = 1, False
        self.compact_over = self.compact_behind = 0


def publish(path: Path, final: Path, in_force: Chain | None) -> None:
    """Durably give a synced segment its name. If that fails, undoes the renaming and raises StoreError.

    in_force: the chain that the segment would follow; sealed if the state of the disk is unknown
    """
    try:
        with guarding(final):
            os.rename(path, final)
            sync_directory(final.parent)
    except StoreError:
        try:
            final.unlink(missing_ok=True)
            sync_directory(final.parent)
        except OSError:
            # After a loss of power the new segment may reappear, and count as newer than whatever is appended to the
            # segment in force from now on.
            if in_force is not None:
                in_force.is_sealed = True
        raise
