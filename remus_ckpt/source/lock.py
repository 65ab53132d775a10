"""Stopping the threads of this process, or of others, by a lock that they hold while they write."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import compress, islice, starmap
from typing import Protocol

from remus_ckpt.errors import SourceError


class Lock(Protocol):
    """What writers hold while they write: a `Lock` or `RLock` of threading or multiprocessing, or what acts as one."""

    def acquire(self, *, timeout: float) -> bool:
        """Take it; False if that was not possible in `timeout` seconds."""

    def release(self) -> None:
        """Give it back."""


class LockStopper:
    """Stops writers by taking the lock that they hold while they write.

    lock: None where nobody writes in a pause anyway, as the caller sees to
    timeout_s: how long a pause waits for it
    """

    def __init__(self, lock: Lock | None, *, timeout_s: float = 10.0) -> None:
        self._lock = lock
        self._timeout_s = timeout_s
        self._held: list[tuple[()]] = []  # one item while we hold the lock
        self._is_open = True
        self._pid = os.getpid()

    def stop(self) -> None:
        """Take the lock. Raises SourceError if nobody gives it back in time."""
        if self._lock is None:
            return
        # A signal's handler may raise wherever Python code runs, also between taking the lock and noting it: the lock
        # would stay taken for ever. These iterators are C, so that `_held` changes with the lock; `resume` alike.
        acquire = iter(partial(self._lock.acquire, timeout=self._timeout_s), None)
        self._held.extend(compress([()], acquire))
        if not self._held:
            raise SourceError(
                f"the lock was not given back in {self._timeout_s:g} s: "
                "does a writer hold it too long, or does this thread hold it itself?"
            )

    def resume(self) -> None:
        """Give the lock back if we hold it. Raises SourceError if it is not ours to give."""
        # In a fork it is the parent that holds it.
        if self._lock is None or not self._held or self._pid != os.getpid():
            return
        try:
            deque(starmap(self._lock.release, islice(iter(self._held.pop, None), 1)), maxlen=0)
        except (RuntimeError, ValueError, AssertionError) as error:  # threading's, and multiprocessing's two
            raise SourceError(f"the lock cannot be given back: {error}") from None

    def check_stopped(self) -> None:
        """Raise SourceError if somebody else has given our lock back, as far as such a lock can tell."""
        locked = getattr(self._lock, "locked", None)
        if locked is not None and not locked():
            raise SourceError("the lock was given back by somebody else in a pause")

    def alive(self) -> bool:
        """Whether it has not been closed: who writes is not known here."""
        return self._is_open

    def death_fds(self) -> Sequence[int]:
        """None, for the same reason."""
        return ()

    def close(self) -> None:
        """Give the lock back if it is held."""
        self._is_open = False
        self.resume()
