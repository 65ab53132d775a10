"""A full base, written from the warm copy while checkpoints keep arriving (specs/store.md §7)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import guarding, write_all
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import MIB
from remus_ckpt.pages import Pages
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.store.chain import Chain, publish
from remus_ckpt.store.segments import Entry, Shape, record_of
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.digest import DigestName
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.writer import EventWriter

COMPACT_BYTES = 64 * MIB
COMPACT_BYTES_FOR_TIERS = 16 * MIB
"""A tier keeps a whole segment for one checkpoint: for a small memory, deltas must not be most of the segment."""
COMPACT_CHECKPOINTS = 20_000
_CHUNK_PAGES = 256
_FEW_PAGES = 1024
_SYNC_CHUNKS = 8
"""Sync after this many chunks, so that the disk never has much to write when a checkpoint waits for its own sync."""
_MAX_ROUNDS = 4


class Compaction:
    """One new segment being written, by its own thread.

    lock: held while memory is changed; the thread takes it to copy 1 MiB at a time
    memory, home: the warm copy, and its file
    shape, digest: of the stream, which continues in the new segment
    path: of the new file
    on_ready: called with the lock held when only a few pages are left; it may call `close`
    on_failed: called with the lock held if the file could not be written
    """

    def __init__(
        self,
        lock: threading.RLock,
        memory: Pages,
        home: MappedFile,
        shape: Shape,
        digest: DigestName,
        path: Path,
        *,
        on_ready: Callable[[], None],
        on_failed: Callable[[StoreError], None],
    ) -> None:
        self.path = path
        self.is_ready = False
        self.is_over = False
        self.written = 0
        self.pages = 0
        self.fd = -1
        self._lock = lock
        self._memory = memory
        self._home = home
        self._touched = np.zeros(len(memory), dtype=bool)
        self._sent = np.zeros(len(memory), dtype=bool)
        self._shape = shape
        self._stream = EventWriter(shape.word, digest)
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._thread = threading.Thread(target=self._run, name="compaction", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises StoreError if that is impossible."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StoreError(f"{self.path}: {error}") from error

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end; the caller must not hold the lock."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def touch(self, pfns: NDArray[np.int64]) -> None:
        """Note that these pages have been written; the caller holds the lock."""
        self._touched[pfns] = True

    def cancel(self) -> None:
        """Give up; the caller holds the lock. The thread ends soon, and removes the file if there is one."""
        if self.is_over:
            return
        self.is_over = True
        self._discard()

    def close(self, record: CheckpointRecord) -> int:
        """Write the remaining pages and the tail; returns the file's descriptor.

        The caller holds the lock, and memory is at `record`. Afterwards the contents are durable, but not the name.
        Raises StoreError.
        """
        with guarding(self.path):
            left = np.flatnonzero(self._touched)
            for start in range(0, len(left), _CHUNK_PAGES):
                self._write_pages(self._take(left[start : start + _CHUNK_PAGES]))
            self._write(events.EnableCompression())
            self._write(events.EndOfBody())
            signature = Signature.REMUS
            self._write(events.TailHvm(magic_pfns=(0, 0, 0), context=b"", signature=signature, record=record))
            os.fdatasync(self.fd)
        self.is_over = True
        return self.fd

    def _run(self) -> None:
        try:
            with guarding(self.path):
                self._copy()
        except Exception as error:
            # Catch everything: a compaction that seemed to be still running would block every later one.
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # Not in `_run`: its frame, to which the traceback refers, would keep itself and the warm copy in a cycle.
        reason = error if isinstance(error, StoreError) else StoreError(f"{self.path}: {type(error).__name__}: {error}")
        with self._lock:
            if not self.is_over:
                self.cancel()
                self._on_failed(reason)
            elif reason is not error:
                raise error

    def _copy(self) -> None:
        with self._lock:
            if self.is_over:
                return
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            pages = len(self._memory)
            self._write(events.Header(word=self._shape.word, guest="hvm", p2m_size=pages))
        rounds = chunks = 0
        numbers = np.arange(pages, dtype=np.int64)
        while True:
            for start in range(0, len(numbers), _CHUNK_PAGES):
                with self._lock:
                    if self.is_over:
                        return
                    batch = self._take(numbers[start : start + _CHUNK_PAGES])
                    if batch is None:
                        continue
                    # A separate descriptor: `cancel` closes the original.
                    fd = os.dup(self.fd)
                chunks += 1
                try:
                    self._write_pages(batch, fd)
                    if chunks % _SYNC_CHUNKS == 0:
                        os.fdatasync(fd)
                finally:
                    os.close(fd)
            with self._lock:
                if self.is_over:
                    return
                fd = os.dup(self.fd)
            try:
                # Little is left after this, so `close` has little to wait for.
                os.fdatasync(fd)
            finally:
                os.close(fd)
            rounds += 1
            with self._lock:
                if self.is_over:
                    return
                numbers = np.flatnonzero(self._touched)
                if len(numbers) <= _FEW_PAGES or rounds >= _MAX_ROUNDS:
                    self.is_ready = True
                    self._on_ready()
                    return

    def _take(self, numbers: NDArray[np.int64]) -> events.Batch | None:
        """A copy of these pages, without zero pages that were never written as anything else. The caller holds the
        lock."""
        self._home.check()
        self._touched[numbers] = False
        numbers = numbers[self._home.has_room[numbers]]
        data = self._memory[numbers]
        keep = data.view(np.uint64).any(axis=1) | self._sent[numbers]
        if not keep.all():
            numbers, data = numbers[keep], data[keep]
        if not len(numbers):
            return None
        self._sent[numbers] = True
        types = np.zeros(len(numbers), dtype=np.uint8)
        return events.Batch(pfns=numbers.astype(np.uint64), types=types, data=data)

    def _write_pages(self, batch: events.Batch | None, fd: int | None = None) -> None:
        if batch is not None:
            self.pages += len(batch.pfns)
            self._write(batch, fd)

    def _write(self, event: events.Event, fd: int | None = None) -> None:
        self.written += write_all(self.fd if fd is None else fd, self._stream.write(event))

    def _discard(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
            # If it cannot be removed now, it is removed when the store is next opened.
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


class Compactor:
    """Begins compactions, one at a time, and closes them. The caller holds the lock.

    compact_bytes, compact_checkpoints: how long the deltas of a chain may get before a compaction is due; with
        compact_bytes None, none ever is
    on_ready: called with the lock held when a compaction can be closed; note: called with what went wrong
    """

    def __init__(
        self,
        lock: threading.RLock,
        *,
        compact_bytes: int | None,
        compact_checkpoints: int,
        on_ready: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        self.current: Compaction | None = None
        """The current compaction."""
        self._lock = lock
        self._bytes, self._checkpoints = compact_bytes, compact_checkpoints
        self._on_ready, self._note = on_ready, note

    def is_due(self, chain: Chain) -> bool:
        """Whether a compaction of the chain's segment is due."""
        return self._bytes is not None and chain.is_long(self._bytes, self._checkpoints)

    def begin(self, chain: Chain, path: Path) -> None:
        """Start writing a base from the chain's warm copy. Raises StoreError."""
        assert chain.shape is not None and chain.restorer.in_force is not None
        compaction = Compaction(
            self._lock,
            chain.restorer.memory,
            chain.home,
            chain.shape,
            record_of(chain.restorer.in_force).digest,
            path,
            on_ready=self._on_ready,
            on_failed=lambda error: self.fail(chain, error),
        )
        compaction.start()  # the thread first waits for our lock
        self.current = compaction

    def touch(self, checkpoint: Checkpoint) -> None:
        """Note that a checkpoint has been applied."""
        if self.current is not None:
            for pfns in checkpoint.pfn_lists:
                self.current.touch(pfns)

    def fail(self, chain: Chain, error: StoreError) -> None:
        """Note a failure. The next try waits: a compaction may have written all of memory before it failed."""
        self.current = None
        chain.compact_over = chain.delta_bytes + COMPACT_BYTES
        chain.compact_behind = chain.checkpoints + self._checkpoints
        self._note(f"compaction: {error}")

    def cancel(self) -> None:
        """Give up the current compaction."""
        if self.current is not None:
            self.current.cancel()
            self.current = None

    def close(self, chain: Chain, name_for: Callable[[int], Path]) -> tuple[int, Entry] | None:
        """Finish the new segment durably, between two checkpoints; returns its descriptor and base, None on failure.

        name_for: returns the path of a segment that begins with a given epoch
        """
        compaction, checkpoint = self.current, chain.restorer.in_force
        assert compaction is not None and checkpoint is not None
        record = record_of(checkpoint)
        try:
            final = name_for(record.epoch)
            fd = compaction.close(record)
            publish(compaction.path, final, chain)
        except StoreError as error:
            compaction.is_over = False
            compaction.cancel()
            self.fail(chain, error)
            return None
        self.current = None
        return fd, Entry(
            position=record.after,
            time_ns=record.time_ns,
            segment=final.name,
            start=0,
            end=compaction.written,
            pages=compaction.pages,
            is_base=True,
        )
