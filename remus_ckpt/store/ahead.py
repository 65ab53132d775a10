"""Space written ahead of a segment's data, so that checkpoints overwrite it instead of growing the file
(specs/store.md §4.4).

Syncing a file that has grown costs its file system a journal entry; an existing block costs none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from remus_ckpt.disk import free_bytes, overwrites_in_place, write_back
from remus_ckpt.limits import MIB
from remus_ckpt.store.chain import Chain
from remus_ckpt.store.unwritten import SECTOR, marks

AHEAD_BYTES = 32 * MIB
"""The maximum space written ahead of one history."""
PIECE_BYTES = 64 << 10
"""Bytes written at a time: few enough that a checkpoint which needs more space does not wait for long."""
LEAST_BYTES = 256 << 10
_FREE_SHARE = 16
"""At most one free byte in this many is taken."""
_AHEAD_S = 4.0
REFILL = 4
"""Space for this long, at the rate of the checkpoints; more is written when a quarter of it is left."""
WINDOW_S = 1.0
"""The time over which the rate is measured."""
IDLE_S = 30.0
_PAUSE_S = 30.0
"""Seconds to wait after a failure."""


def start(run: Callable[[], None]) -> None:
    """Run it in a thread. Raises RuntimeError if that is impossible."""
    threading.Thread(target=run, name="ahead", daemon=True).start()


class Ahead:
    """Writes space ahead of the segment that grows, in the background, and gives it back. The caller holds the lock.

    lock: the writer's; the thread takes it when it ends
    directory: of the segments
    most: bytes ahead at any time; 0: none
    least_free: bytes of the file system that must stay free
    """

    def __init__(self, lock: threading.RLock, directory: Path, most: int, least_free: int) -> None:
        self._lock = lock
        self._directory = directory
        self._most, self._least_free = most, least_free
        self._rate = 0.0
        self._bytes = 0
        self._since = self._stored_at = time.monotonic()
        self._not_before = 0.0
        self._job: _Job | None = None

    def stored(self, chain: Chain, size: int) -> None:
        """A checkpoint of this many bytes is durable in the chain: write more space if little is left."""
        now = self._stored_at = time.monotonic()
        self._bytes += size
        if (passed := now - self._since) >= WINDOW_S:
            self._rate = self._bytes / max(passed, 1e-3)
            self._bytes, self._since = 0, now
        if not self._most or not self._rate or self._job is not None or chain.is_sealed or now < self._not_before:
            return
        target = min(max(int(self._rate * _AHEAD_S), LEAST_BYTES), self._most)
        if chain.ahead >= target // REFILL:
            return
        with suppress(OSError):
            spare = free_bytes(self._directory)
            wanted = min(target - chain.ahead, spare // _FREE_SHARE, spare - self._least_free)
            if wanted < min(LEAST_BYTES, target) // 2 or not overwrites_in_place(chain.fd):
                self._not_before = now + _PAUSE_S
                return
            job = self._job = _Job(self._lock, chain, chain.room + wanted, self._over)
            try:
                start(job.run)
            except RuntimeError:  # no more threads are allowed
                self._job = None
                self._not_before = now + _PAUSE_S

    def _over(self, failed: bool) -> None:
        """A job has ended; called with the lock held."""
        job, self._job = self._job, None
        if failed and job is not None:
            self._not_before = time.monotonic() + _PAUSE_S
            with suppress(OSError):
                job.chain.give_back()

    def give_back(self, chain: Chain | None) -> int:
        """Cut off the space; returns its bytes. The file then ends where its data ends."""
        if self._job is not None:
            self._job.cancel()
            self._job = None
        if chain is None:
            return 0
        with suppress(OSError):
            return chain.give_back()
        return 0

    def give_back_if_idle(self, chain: Chain | None) -> None:
        """Give back what no checkpoint has needed for some time."""
        if chain is not None and chain.ahead and time.monotonic() - self._stored_at > IDLE_S:
            self._rate = 0.0
            self.give_back(chain)


class _Job:
    """A thread that writes space up to a byte of a chain's segment, and syncs it.

    on_over: called with the lock held at the end, with whether it failed; not after `cancel`
    """

    def __init__(self, lock: threading.RLock, chain: Chain, until: int, on_over: Callable[[bool], Any]) -> None:
        self.chain = chain
        self._lock = lock
        self._path = chain.path
        self._until = until + -until % SECTOR
        self._on_over = on_over
        self._is_over = False

    def cancel(self) -> None:
        """End the thread soon, before another piece. The caller holds the lock."""
        self._is_over = True

    def run(self) -> None:
        """What the thread does."""
        failed = False
        try:
            self._write()
        except OSError:
            failed = True
        finally:
            with self._lock:
                if not self._is_over:
                    self._on_over(failed)

    def _write(self) -> None:
        # A descriptor of its own: the chain's is closed when its segment ends.
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while True:
                began = time.monotonic()
                chain = self.chain
                with chain.growing:
                    if self._is_over or chain.is_sealed or chain.fd < 0 or chain.path != self._path:
                        return
                    start = chain.room
                    if start >= self._until:
                        break
                    first = start - start % SECTOR
                    stop = min(first + PIECE_BYTES, self._until)
                    size = os.pwrite(fd, marks(first, stop - first)[start - first :], start)
                    chain.room = start + size
                # Nothing of it may be left for the sync that a checkpoint waits for.
                write_back(fd, start, size)
                time.sleep(time.monotonic() - began)
            # If this fails, what a checkpoint has just written may be lost with it. Linux tells each descriptor of that
            # once, so the checkpoint's own sync fails too.
            os.fdatasync(fd)
        finally:
            os.close(fd)
