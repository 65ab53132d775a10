"""The window of a primary, and the turns that its threads take: no socket, no backup."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from interrupter import Interrupter

from remus_ckpt.errors import Malformed, RemusError
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.service import turns as turns_module
from remus_ckpt.service.release import Committed
from remus_ckpt.service.turns import Bell, Turns
from remus_ckpt.service.window import Window
from remus_ckpt.session.messages import Ack, Level
from remus_ckpt.wire.record import Position

LONG_S = 20.0


class Sending:
    """A sender and its window, as a primary uses them. Who waits looks again when told, and hardly ever else."""

    def __init__(self, *, size: int = 4, wait: Level = "durable", on_commit: Callable[[Committed], None] | None = None):
        self.sender = Sender(8)
        self.bell = Bell(look_s=2 * LONG_S)
        self.window = Window(
            "orders", size=size, wait=wait, on_commit=on_commit, most_unreleased=3, bell=self.bell, metrics=Metrics()
        )

    def send(self, *pfns: int, is_written: bool = True, has_commit: bool = True) -> Position:
        """One checkpoint with these pages, not acknowledged yet; or as much of it as goes before an interrupt."""
        numbers = np.array(sorted({*pfns, *self.sender.owed.tolist()}), dtype=np.int64)
        pages = np.full((len(numbers), PAGE_SIZE), 1 + self.sender.next_epoch, dtype=np.uint8)
        for _ in self.sender.checkpoint(batches(numbers, pages)):
            self.window.begin(self.sender.carried)
        assert self.sender.sent is not None
        assert self.sender.position is not None
        if is_written:
            self.window.written(self.sender.sent)
        if is_written and has_commit:
            self.window.commit_sent()
        return self.sender.position

    def acknowledge(self, position: Position, level: Level = "durable") -> None:
        self.window.acknowledge(Ack(level=level, position=position))


STRANGE = Position(1, bytes(range(32)))


def test_an_acknowledgement_stands_for_all_before_it() -> None:
    told: list[Committed] = []
    sending = Sending(on_commit=told.append)
    positions = [sending.send(number) for number in range(4)]
    assert not sending.window.has_room
    sending.acknowledge(positions[2])
    assert sending.window.committed == positions[2]
    assert (sending.window.lag, sending.window.commits) == (1, 3)
    assert [sending.window.has_committed(epoch) for epoch in range(4)] == [True, True, True, False]
    assert sending.window.newest == positions[3]
    sending.acknowledge(positions[2])  # again: it says nothing new
    sending.acknowledge(positions[3])
    assert sending.window.newest is None
    sending.window.close(LONG_S)
    assert [(commit.epoch, commit.position) for commit in told] == list(enumerate(positions))
    assert all(0.0 <= commit.latency_s < LONG_S for commit in told)


def test_what_was_not_sent_is_not_acknowledged() -> None:
    sending = Sending()
    sending.send(1)
    with pytest.raises(Malformed):
        sending.acknowledge(STRANGE)
    assert (sending.window.lag, sending.window.committed) == (1, None)


@pytest.mark.parametrize(("wait", "committing"), [("received", 0), ("durable", 1), ("applied", 2)])
def test_only_the_level_that_was_asked_for_commits(wait: Level, committing: int) -> None:
    sending = Sending(wait=wait)
    position = sending.send(1)
    levels: tuple[Level, ...] = ("received", "durable", "applied")
    for number, level in enumerate(levels):
        sending.acknowledge(position, level)
        assert sending.window.has_committed(0) == (number >= committing)


def test_what_the_backup_does_not_hold_is_owed() -> None:
    """The checkpoints behind the one that it holds, the one without a commit and the one that broke off included."""
    sending = Sending()
    held = sending.send(0, 1)
    sending.send(2)
    sending.send(3, has_commit=False)
    assert sending.window.is_torn
    numbers = np.array([4], dtype=np.int64)
    for _ in sending.sender.checkpoint(batches(numbers, np.ones((1, PAGE_SIZE), dtype=np.uint8))):
        break
    assert sending.sender.unfinished
    sending.sender.carried.append(numbers)  # as far as it got
    assert not sending.window.rewind(sending.sender, STRANGE)
    assert sending.window.rewind(sending.sender, held)
    assert sending.sender.owed.tolist() == [2, 3, 4]
    assert sending.sender.position == sending.window.committed == held
    assert (sending.window.lag, sending.window.is_torn) == (0, False)
    assert sending.window.rewind(sending.sender, held), "interrupted behind it, the next session comes here again"


def test_interrupted_between_the_senders_end_and_the_windows() -> None:
    sending = Sending()
    held = sending.send(0)
    sending.send(1, is_written=False)
    assert not sending.sender.unfinished
    assert sending.window.is_torn
    assert sending.window.rewind(sending.sender, held)
    assert sending.sender.owed.tolist() == [1]


def test_no_sender_goes_on_from_what_another_has_made() -> None:
    sending = Sending()
    held = sending.send(0)
    sending.acknowledge(held)
    sending.send(1)
    sending.window.restart()
    assert sending.window.lag == 0
    assert not sending.window.rewind(sending.sender, held)
    assert sending.window.committed == held


def test_an_acknowledgement_wakes_who_waits_for_it() -> None:
    sending = Sending()
    position = sending.send(0)
    looked = threading.Event()

    def is_committed() -> bool:
        looked.set()
        return sending.window.has_committed(0)

    deadline = time.monotonic() + LONG_S
    waiting = threading.Thread(target=lambda: done.append(sending.bell.wait(is_committed, deadline)))
    done: list[bool] = []
    waiting.start()
    looked.wait(LONG_S)
    sending.acknowledge(position)
    waiting.join(LONG_S / 2)
    assert done == [True]


def test_commits_that_wait_for_on_commit_fill_the_window() -> None:
    called, go_on = threading.Event(), threading.Event()

    def on_commit(committed: Committed) -> None:
        called.set()
        go_on.wait(LONG_S)

    sending = Sending(on_commit=on_commit)
    for number in range(5):  # one that it has, and four that wait
        assert sending.window.has_room, number
        sending.acknowledge(sending.send(number))
        called.wait(LONG_S)
    assert sending.window.is_held_up
    assert not sending.window.has_room
    assert "on_commit" in sending.window.in_the_way
    with pytest.raises(RemusError):
        sending.window.close(0.0)
    go_on.set()
    wait_until(lambda: sending.window.has_room)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


@pytest.mark.parametrize("size", [0, MAX_WINDOW + 1])
def test_a_window_of_another_size(size: int) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="window"):
        Sending(size=size, on_commit=print)
    assert threading.active_count() == before


# Turns


def test_calls_exclude_each_other_in_the_order_in_which_they_come() -> None:
    turns, order = Turns("work", bell=Bell(look_s=2 * LONG_S)), list[int]()
    go_on = threading.Event()

    def work(number: int) -> None:
        order.append(number)
        go_on.wait(LONG_S)
        order.append(number)

    threads = []
    for number in range(4):
        thread = threading.Thread(target=turns.take, args=[lambda number=number: work(number)])
        thread.start()
        threads.append(thread)
        wait_until(lambda number=number: turns.calls == number + 1)
    with pytest.raises(RemusError):
        turns.take(lambda: order.append(-1), 0.0)
    go_on.set()
    for thread in threads:
        thread.join(LONG_S / 2)
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]
    assert turns.take(lambda: 7) == 7


def test_a_call_within_its_own_turn_is_refused() -> None:
    turns = Turns("work")
    with pytest.raises(ValueError, match="work"):
        turns.take(lambda: turns.take(int))
    assert turns.take(int) == 0


def test_a_thread_that_died_in_its_turn_holds_up_nobody() -> None:
    """Whatever cut it short, and however little it could put in order: at each line."""
    left_behind = 0

    def die(at: int) -> None:
        try:
            with Interrupter(at, files=(turns_module.__file__,)) as striking:
                turns.take(int)
        except KeyboardInterrupt:
            struck.append(striking.seen)

    for at in count():
        turns, struck = Turns("work"), list[int]()
        thread = threading.Thread(target=die, args=[at])
        thread.start()
        thread.join(LONG_S)
        if not struck:
            break
        left_behind += turns.calls
        assert turns.take(lambda: 1, 0.0) == 1
        assert not turns.calls
    assert left_behind, "no call was struck while it gave back its turn"
