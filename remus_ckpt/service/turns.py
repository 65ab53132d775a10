"""Synchronization that an interrupt cannot leave held.

A signal handler may raise between any two instructions of the main thread. A `threading` lock held at that moment may
stay held for ever; a turn taken here is free again once the call that had it is over, however that call ended.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from remus_ckpt.errors import RemusError

_LOOK_S = 0.1
"""How often a waiting thread checks for changes that ring no bell."""

T = TypeVar("T")


def deadline_in(timeout_s: float) -> float:
    """The deadline of a timeout that starts now, by `time.monotonic`. Raises ValueError if the timeout is invalid."""
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is no number; math.inf waits as long as it takes")
    return time.monotonic() + timeout_s


class Deadline:
    """When the call that is under way must be over. Any thread may move it, in one step.

    at: by `time.monotonic`
    """

    def __init__(self) -> None:
        self.at = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.at

    def left_s(self, seconds: float) -> float:
        """How many of these seconds the call may still use."""
        return max(min(seconds, self.at - time.monotonic()), 0.0)


class Bell:
    """Wakes all waiting threads. Any thread may call any method.

    look_s: how often a waiting thread looks without a ring
    """

    def __init__(self, *, look_s: float = _LOOK_S) -> None:
        self._look_s = look_s
        self._waiters: set[Any] = set()

    def ring(self) -> None:
        """Make all waiting threads look again."""
        for waiter in tuple(self._waiters):
            with suppress(RuntimeError):  # that thread is awake already
                waiter.release()

    def wait(self, is_over: Callable[[], bool], deadline: float) -> bool:
        """Wait until `is_over()`, which is checked after each ring and now and then; False if the deadline passes."""
        waiter = threading.Lock()
        waiter.acquire()
        try:
            self._waiters.add(waiter)
            while not is_over():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                waiter.acquire(timeout=min(left_s, self._look_s))
            return True
        finally:
            self._waiters.discard(waiter)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that has its turn or waits for it.

    thread: the identifier of its thread
    frame: its stack frame. The frame itself tells whether the call still runs: a call that was interrupted anywhere is
        over, even if it is still in the queue, and even if a traceback still holds its frame
    """

    thread: int
    frame: FrameType

    @property
    def is_over(self) -> bool:
        try:
            self.frame.clear()  # raises while the frame runs
        except RuntimeError:
            return False
        return True


class Turns:
    """Calls that exclude each other, in the order in which they came. Any thread may call.

    what: how users know such a call, for messages
    bell: wakes the calls that wait
    """

    def __init__(self, what: str, *, bell: Bell | None = None) -> None:
        self._what = what
        # The first one has its turn. The keys are separate objects: a frame that held its own call would form a cycle,
        # which only the garbage collector frees.
        self._calls: dict[object, _Call] = {}
        self._bell = bell or Bell()

    @property
    def calls(self) -> int:
        """How many calls have their turn or wait for it, including calls that were cut short and not noticed yet."""
        return len(self._calls)

    def take(self, work: Callable[[], T], timeout_s: float = math.inf) -> T:
        """Run `work` when its turn comes; returns its result.

        timeout_s: how long to wait for the turn
        Raises RemusError if the turn does not come in time, ValueError if called within the work of another turn.
        """
        deadline = deadline_in(timeout_s)
        key = object()
        try:
            self._calls[key] = _Call(threading.get_ident(), sys._getframe())
            if not self._is_first(key) and not self._bell.wait(lambda: self._is_first(key), deadline):
                raise RemusError(f"{self._what} in another thread was not done in {timeout_s:g} s")
            return work()
        finally:
            self._leave(key)

    def _is_first(self, key: object) -> bool:
        for other, call in tuple(self._calls.items()):
            if other is key:
                return True
            if call.is_over:
                self._leave(other)
            elif call.thread != threading.get_ident():
                return False
            else:
                raise ValueError(f"{self._what} was called within {self._what}: by a callback, or a signal's handler?")
        raise AssertionError("a call that waits for its turn stands in the queue")

    def _leave(self, key: object) -> None:
        self._calls.pop(key, None)  # another thread may have removed it as over
        self._bell.ring()
