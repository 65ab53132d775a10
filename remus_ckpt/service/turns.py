"""Waiting for each other, with nothing that an interrupt could leave held.

A signal's handler may raise between any two instructions of the main thread. A lock of `threading` that is held there
may stay held for ever; what is here is free again when the call that had it is over, however it ended.
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
"""How often whoever waits looks for what nobody tells it."""

T = TypeVar("T")


def deadline_in(timeout_s: float) -> float:
    """When a time that begins now is over, by `time.monotonic`. Raises ValueError for what is no time."""
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is no number; math.inf waits as long as it takes")
    return time.monotonic() + timeout_s


class Bell:
    """Wakes all who wait. Any thread may call anything."""

    def __init__(self) -> None:
        self._waiters: set[Any] = set()

    def ring(self) -> None:
        """Let all who wait look again."""
        for waiter in tuple(self._waiters):
            with suppress(RuntimeError):  # it is awake already
                waiter.release()

    def wait(self, is_over: Callable[[], bool], deadline: float) -> bool:
        """Until it is over, which is looked at after each ring and now and then; False when the time is."""
        waiter = threading.Lock()
        waiter.acquire()
        try:
            self._waiters.add(waiter)
            while not is_over():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                waiter.acquire(timeout=min(left_s, _LOOK_S))
            return True
        finally:
            self._waiters.discard(waiter)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that has its turn or waits for it.

    thread: its thread's number
    frame: where it runs. Whether it does is asked of the frame itself: a call that was cut short is over wherever that
        was, although it still stands in the queue, and although a traceback still knows its frame
    """

    thread: int
    frame: FrameType

    @property
    def is_over(self) -> bool:
        try:
            self.frame.clear()  # refused while it runs
        except RuntimeError:
            return False
        return True


class Turns:
    """Calls that exclude each other, one after the other as they came. Any thread may call.

    what: how users know such a call
    """

    def __init__(self, what: str) -> None:
        self._what = what
        # The first has its turn. By keys of their own: a call that knew its own frame would be garbage that only the
        # collector finds.
        self._calls: dict[object, _Call] = {}
        self._bell = Bell()

    def take(self, work: Callable[[], T], timeout_s: float = math.inf) -> T:
        """Do the work when it is its turn; returns what it returns.

        timeout_s: how long to wait for the turn
        Raises RemusError if it does not come in that time, ValueError within the work of another turn.
        """
        deadline = deadline_in(timeout_s)
        key = object()
        try:
            self._calls[key] = _Call(threading.get_ident(), sys._getframe())
            if not self._bell.wait(lambda: self._is_first(key), deadline):
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
        self._calls.pop(key, None)  # another thread may have seen that it was over
        self._bell.ring()
