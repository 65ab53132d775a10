"""Stopping threads of this or other processes with a lock that they hold while they write."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import compress, islice, starmap
from typing import Protocol

from remus_ckpt.errors import SourceError


class Lock(Protocol):
    """What writers hold while they write: a `Lock` or `RLock` of threading or multiprocessing, or the like."""

    def acquire(self, *, timeout: float) -> bool:
        """Acquire the lock; False if that was not possible in `timeout` seconds."""

    def release(self) -> None:
        """Release the lock."""


class LockStopper:
    """Stops writers by taking the lock that they hold while they write.

    lock: None if the caller ensures that nothing writes in a pause
    timeout_s: how long a pause waits for the lock
    """

    def __init__(self, lock: Lock | None, *, timeout_s: float = 10.0) -> None:
        self._lock = lock
        self._timeout_s = timeout_s
        self._held: list[tuple[()]] = []  # one item while we hold the lock
        self._is_open = True
        self._pid = os.getpid()

    def stop(self) -> None:
        """Acquire the lock. Raises SourceError if it is not released in time."""
        if self._lock is None:
            return
        # A signal handler may raise wherever Python code runs, also between acquiring the lock and noting that, which
        # would hold it for ever. These iterators run in C, so `_held` changes together with the lock; same in `resume`.
        acquire = iter(partial(self._lock.acquire, timeout=self._timeout_s), None)
        self._held.extend(compress([()], acquire))
        if not self._held:
            raise SourceError(
                f"the lock was not released within {self._timeout_s:g} s: a writer holds it too long, or this "
                "thread holds it itself"
            )

    def resume(self) -> None:
        """Release the lock if we hold it. Raises SourceError if it is not ours to release."""
        # In a forked child, it is the parent that holds the lock.
        if self._lock is None or not self._held or self._pid != os.getpid():
            return
        try:
            deque(starmap(self._lock.release, islice(iter(self._held.pop, None), 1)), maxlen=0)
        except (RuntimeError, ValueError, AssertionError) as error:  # threading's, and multiprocessing's two
            raise SourceError(f"the lock cannot be released: {error}") from None

    def check_stopped(self) -> None:
        """Raise SourceError if anyone else has released our lock, as far as the lock can tell."""
        locked = getattr(self._lock, "locked", None)
        if locked is not None and not locked():
            raise SourceError("another thread released the lock during a pause")

    def alive(self) -> bool:
        """Whether this object has not been closed: the writers are not known here."""
        return self._is_open

    def death_fds(self) -> Sequence[int]:
        """No descriptors, for the same reason."""
        return ()

    def close(self) -> None:
        """Release the lock if it is held."""
        self._is_open = False
        self.resume()
