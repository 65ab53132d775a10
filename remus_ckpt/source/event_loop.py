"""Stopping an event loop: its coroutines are the writers, and none of their steps runs in a pause."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from remus_ckpt.errors import SourceError


class EventLoop(Protocol):
    """As far as it is needed: an asyncio loop, or one like it."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> Any:
        """Run this between two steps, from any thread. Raises RuntimeError once the loop is closed."""


class LoopLock:
    """A `Lock` that holds up an event loop, for a thread that takes checkpoints on behalf of its coroutines.

    In any other thread it does nothing: there the caller waits, and ensures that nothing else writes. One pause at a
    time; any thread may end it.
    """

    def __init__(self) -> None:
        self._mine = threading.local()
        self._stay: _Stay | None = None

    @contextmanager
    def holding_up(self, loop: EventLoop) -> Iterator[None]:
        """Within the block, this thread's pauses hold up that loop."""
        self._mine.loop = loop
        try:
            yield
        finally:
            del self._mine.loop

    def acquire(self, *, timeout: float) -> bool:
        """Make the loop wait between two steps. Raises SourceError if it does not get there in time, or is closed."""
        loop = getattr(self._mine, "loop", None)
        if loop is None:
            self._stay = None
            return True
        stay = self._stay = _Stay()
        try:
            loop.call_soon_threadsafe(stay)
        except RuntimeError as error:
            raise SourceError(f"the event loop cannot be paused: {error}") from error
        if stay.has_come.wait(timeout):
            return True
        stay.may_go.set()  # it does not wait if it gets there after all
        raise SourceError(
            f"the event loop did not reach the pause within {timeout:g} s: look for a step that blocks it"
        )

    def release(self) -> None:
        """Resume the loop."""
        if self._stay is not None:
            self._stay.may_go.set()

    def locked(self) -> bool:
        """Whether the loop waits. If an exception takes it out of its wait (Ctrl-C), it does not."""
        return self._stay is None or self._stay.is_there


class _Stay:
    """What the loop does in a pause: it waits."""

    def __init__(self) -> None:
        self.has_come = threading.Event()
        self.may_go = threading.Event()
        self.is_there = False

    def __call__(self) -> None:
        self.is_there = True
        try:
            self.has_come.set()
            self.may_go.wait()
        finally:
            self.is_there = False
