"""An event loop that is held up in a pause."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from remus_ckpt.errors import SourceError
from remus_ckpt.source.event_loop import LoopLock
from remus_ckpt.source.lock import LockStopper

LONG_S = 30.0


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LONG_S)
        loop.close()
        assert not thread.is_alive()


def runs(loop: asyncio.AbstractEventLoop, timeout_s: float = LONG_S) -> bool:
    """Whether it makes another step."""
    step = threading.Event()
    loop.call_soon_threadsafe(step.set)
    return step.wait(timeout_s)


def test_it_makes_no_step_in_a_pause_and_runs_on_after_it() -> None:
    lock = LoopLock()
    stopper = LockStopper(lock)
    with running_loop() as loop:
        for _ in range(3):
            with lock.holding_up(loop):
                stopper.stop()
                assert not runs(loop, 0.05)
                stopper.check_stopped()
                stopper.resume()
            assert runs(loop)


def test_whoever_closes_the_source_lets_it_run_on() -> None:
    lock = LoopLock()
    stopper = LockStopper(lock)
    with running_loop() as loop, lock.holding_up(loop):
        stopper.stop()
        closing = threading.Thread(target=stopper.close)
        closing.start()
        closing.join(LONG_S)
        assert runs(loop)
        with pytest.raises(SourceError):
            stopper.check_stopped()


def test_a_thread_of_no_loop_has_nothing_to_hold_up() -> None:
    lock = LoopLock()
    stopper = LockStopper(lock)
    with running_loop() as loop:
        with lock.holding_up(loop):
            pass
        stopper.stop()
        assert runs(loop)
        stopper.check_stopped()
        stopper.resume()


def test_a_loop_whose_step_blocks_is_given_up() -> None:
    lock = LoopLock()
    go_on = threading.Event()
    with running_loop() as loop:
        loop.call_soon_threadsafe(go_on.wait)
        with lock.holding_up(loop), pytest.raises(SourceError):
            LockStopper(lock, timeout_s=0.05).stop()
        go_on.set()
        assert runs(loop), "it does not wait for a pause that is over"


def test_a_loop_that_is_closed_is_an_error() -> None:
    lock = LoopLock()
    loop = asyncio.new_event_loop()
    loop.close()
    with lock.holding_up(loop), pytest.raises(SourceError):
        LockStopper(lock).stop()


def test_a_loop_that_an_exception_takes_out_of_its_wait_has_broken_the_pause() -> None:
    lock = LoopLock()
    loop = asyncio.new_event_loop()
    ended = threading.Event()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(0.05)
            raise KeyboardInterrupt

    def run() -> None:
        try:
            with pytest.raises(KeyboardInterrupt):
                loop.run_forever()
        finally:
            ended.set()

    class Caught:
        """Has the wait of the loop interrupted."""

        def call_soon_threadsafe(self, stay: object) -> None:
            stay.may_go = Interrupted()  # type: ignore[attr-defined]
            loop.call_soon_threadsafe(stay)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    stopper = LockStopper(lock)
    with lock.holding_up(Caught()):  # type: ignore[arg-type]
        stopper.stop()
        ended.wait(LONG_S)
        with pytest.raises(SourceError):
            stopper.check_stopped()
        stopper.resume()
    thread.join(LONG_S)
    loop.close()
