"""The loop with any tracker: one that compares, and one that keeps no copy of memory and forgets what it has said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remus_ckpt.errors import PauseBroken
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.source import Memory, Source, Tracker
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.lock import LockStopper
from remus_ckpt.source.own_memory import Buffers

PAGES = 2 * MAX_BATCH_ENTRIES + 5


class Noted:
    """As a kernel tracks: who asks what was written resets it."""

    reference = None

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._named: set[int] = set()
        self.noted: set[int] = set()

    def restart(self) -> None:
        self._named = set()
        self.noted = set(range(self._memory.pages))

    def copy_live(self) -> Iterator[tuple[NDArray[np.int64], Pages]]:
        pfns, self.noted = sorted(self.noted), set()
        for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
            part = pfns[start : start + MAX_BATCH_ENTRIES]
            yield np.array(part), np.concatenate([self._memory.sample(pfn, pfn + 1) for pfn in part])

    def estimate(self) -> int:
        return len(self.noted)

    def written(self) -> NDArray[np.int64]:
        self._named |= self.noted
        self.noted = set()
        return np.array(sorted(self._named), dtype=np.int64)

    def taken(self) -> None:
        self._named = set()

    def close(self) -> None:
        self.noted = set()


class Shaky(LockStopper):
    """Some of its pauses do not hold."""

    def __init__(self) -> None:
        super().__init__(None)
        self.to_break = 0

    def check_stopped(self) -> None:
        if self.to_break:
            self.to_break -= 1
            raise PauseBroken("somebody has run")


class Desk:
    """Memory that a test writes to, a loop over it, and a receiver."""

    def __init__(self, make: Callable[[Any], Tracker]) -> None:
        self.array = np.zeros((PAGES, PAGE_SIZE), dtype=np.uint8)
        self.array[::3] = 7
        memory = Buffers({"array": self.array})
        self.tracker = make(memory)
        self.stopper = Shaky()
        self.sender = Sender(PAGES, reference=self.tracker.restart())
        self.loop = CheckpointLoop(Source(memory, self.tracker, self.stopper), self.sender, self)
        self.restorer = Restorer(strict=True)
        self.fails = False

    def poke(self, *pfns: int) -> None:
        for pfn in pfns:
            self.array[pfn, pfn % 1000] += 1
            if isinstance(self.tracker, Noted):
                self.tracker.noted.add(pfn)

    def take(self) -> int:
        """A checkpoint that must hold what memory does; returns how many pages the pause found."""
        taken = self.loop.take()
        assert (self.restorer.memory == self.array).all()
        return taken.dirty_pages

    # The loop's output

    def write(self, buffers: list[Any]) -> None:
        if self.fails:
            raise OSError("the disk is full")
        for buffer in buffers:
            self.restorer.feed(bytes(buffer))

    def commit(self, sent: Any) -> None:
        assert [checkpoint.epoch for checkpoint in self.restorer.checkpoints()] == [sent.epoch]

    def fds(self) -> tuple[int, ...]:
        return ()

    def check(self) -> None:
        pass


@pytest.fixture(params=[Compare, Noted])
def desk(request: pytest.FixtureRequest) -> Desk:
    return Desk(request.param)


def test_each_pause_finds_what_was_written_since_the_last(desk: Desk) -> None:
    assert desk.take() == 0, "the first copy has them all"
    desk.poke(3, 5, PAGES - 1)
    assert desk.take() == 3
    assert desk.take() == 0
    desk.poke(5)
    assert desk.take() == 1


def test_a_pause_that_is_taken_again_finds_all_that_the_broken_one_did(desk: Desk) -> None:
    desk.take()
    desk.poke(3, 5)
    desk.stopper.to_break = 2
    assert desk.take() == 2


def test_a_checkpoint_that_breaks_off_costs_no_page(desk: Desk) -> None:
    desk.take()
    desk.poke(1, 2)
    desk.fails = True
    with pytest.raises(OSError):
        desk.loop.take()
    desk.fails = False
    desk.restorer.rewind()
    position = desk.sender.position
    assert position is not None
    desk.sender.rewind(position, np.concatenate([np.empty(0, dtype=np.int64), *desk.sender.carried]))
    desk.poke(2, 9)
    assert desk.take() == 3
    assert desk.take() == 0


def test_a_source_that_begins_anew_sends_all_of_memory(desk: Desk) -> None:
    desk.take()
    desk.poke(3)
    desk.take()
    again = Sender(PAGES, reference=desk.tracker.restart())
    desk.loop = CheckpointLoop(Source(Buffers({"array": desk.array}), desk.tracker, desk.stopper), again, desk)
    desk.restorer = Restorer(strict=True)
    assert desk.take() == 0
    desk.poke(4)
    assert desk.take() == 1


def test_a_source_closes_its_tracker_before_its_memory() -> None:
    closed = []

    class Closing(Buffers):
        def close(self) -> None:
            closed.append("memory")

    class Tracking(Noted):
        def close(self) -> None:
            closed.append("tracker")

    memory = Closing({"array": bytearray(5)})
    source = Source(memory, Tracking(memory), LockStopper(None))
    source.close()
    assert closed == ["tracker", "memory"]
    assert not source.stopper.alive()


def test_the_sender_must_have_what_the_tracker_compares_with() -> None:
    memory = Buffers({"array": bytearray(5)})
    tracker = Compare(memory)
    source = Source(memory, tracker, LockStopper(None))
    desk = Desk(Noted)
    for reference in (None, tracker.reference):
        sender = Sender(1, reference=reference)
        if reference is None:
            with pytest.raises(ValueError):
                CheckpointLoop(source, sender, desk)
        else:
            CheckpointLoop(source, sender, desk)
            tracker.restart()
            with pytest.raises(ValueError):
                CheckpointLoop(source, sender, desk)
