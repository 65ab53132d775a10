"""The window: checkpoints on their way to the backup, and what the backup has acknowledged.

Of a checkpoint, only the numbers of its pages are kept: if the link breaks, the next checkpoint sends their present
content in full (specs/session.md §5).

An interrupt may fall between any two instructions of the sending thread. One rule keeps commits right all the same: a
page is noted, first by the sender and then by a flight, before the reference takes its new content; and a flight is
dropped only once the backup has acknowledged it or its pages are owed. Until a checkpoint's commit has been sent, the
window is torn; a call that finds it torn begins a new session, which settles what the backup holds. Every operation of
several steps can be repeated.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import LinkError, Malformed, RemusError
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.plural import counted
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.service.release import Committed, Release
from remus_ckpt.service.turns import Bell, Turns
from remus_ckpt.session.messages import LEVELS, Ack, Level
from remus_ckpt.wire.record import Position

_SAY_S = 10.0
"""A checkpoint that waits longer than this is worth a line in the log."""


@dataclass(slots=True)
class _Flight:
    """A checkpoint on its way: being written, or sent and not yet acknowledged.

    carried: arrays int64[n] of its page numbers; the sender appends to the list
    began: when its first byte was sent
    sent: its summary, once it has been written
    """

    carried: list[NDArray[np.int64]]
    began: float
    sent: Sent | None = None

    @property
    def position(self) -> Position | None:
        return None if self.sent is None else self.sent.position


class Window:
    """The checkpoints that are sent and not yet committed.

    size: checkpoints that may be in the window
    wait: what counts as committed
    on_commit: called for each commit, by a `Release`
    most_unreleased: commits that may wait for on_commit; with more, the window counts as full
    bell: rung when something here has changed
    append: called with each position that the backup holds, where a checkpoint is committed only once `logged` has been
        called with it too; None where the backup's word is enough
    The sending thread changes the window, and so does the link's thread by `acknowledge`. The fields that both change
    stand below `_changes`, and each change takes a turn of it. Any thread may read the properties at any time.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int,
        wait: Level,
        on_commit: Callable[[Committed], None] | None,
        most_unreleased: int,
        bell: Bell,
        metrics: Metrics,
        append: Callable[[Position], None] | None = None,
    ) -> None:
        if not 1 <= size <= MAX_WINDOW:
            raise ValueError(f"a window of {size} checkpoints; it has 1…{MAX_WINDOW}")
        self._name = name
        self._size = size
        self._wait = wait
        self._release = Release(on_commit) if on_commit else None
        self._most_unreleased = most_unreleased
        self._bell = bell
        self._metrics = metrics
        self._append = append
        # Owned by the sending thread: the checkpoint being written, until its commit has been sent.
        self._coming: _Flight | None = None
        self._changes = Turns("a change of the window")
        self._flights: deque[_Flight] = deque()  # not acknowledged, the oldest first
        self._anchor: Position | None = None  # this sender's newest committed position
        self.committed: Position | None = None
        """The newest committed position."""
        self.commits = 0
        """How many checkpoints have been committed."""

    @property
    def lag(self) -> int:
        """Checkpoints that are not acknowledged."""
        return len(self._flights)

    @property
    def is_held_up(self) -> bool:
        """Whether too many commits wait for on_commit."""
        return self._release is not None and self._release.waiting > self._most_unreleased

    @property
    def has_room(self) -> bool:
        """Whether another checkpoint may go on its way."""
        return self.lag < self._size and not self.is_held_up

    @property
    def in_the_way(self) -> str:
        """What a full window waits for, for users."""
        if self._release is not None and self.is_held_up:
            waiting = self._release.waiting
            return f"on_commit does not return: {waiting:,} commits wait for it, and checkpoints with them"
        return f"the backup does not commit ({counted(self.lag, 'checkpoint', 'wait')}): its disk may be slow, or hang"

    @property
    def newest(self) -> Position | None:
        """The position of the newest checkpoint that is not acknowledged."""
        flights = tuple(self._flights)
        return flights[-1].position if flights else None

    @property
    def is_torn(self) -> bool:
        """Whether a checkpoint was begun and its commit is not known to have been sent."""
        return self._coming is not None

    def has_committed(self, epoch: int) -> bool:
        """Whether that epoch, or a later one, is committed."""
        return self.committed is not None and self.committed.epoch >= epoch

    def await_room(self, is_over: Callable[[], bool], until: Callable[[], float]) -> None:
        """Wait until there is room, or until `is_over()`, which may raise.

        until: the deadline, which may move meanwhile
        Raises LinkError if the time runs out, RemusError if that is due to on_commit.
        """

        def look() -> bool:
            return self.has_room or is_over()

        if self._bell.wait(look, min(until(), time.monotonic() + _SAY_S)):
            return
        if time.monotonic() < until():
            log("checkpoints wait", level=logging.WARNING, name=self._name, reason=self.in_the_way)
            if self._bell.wait(look, until()):
                return
        raise RemusError(self.in_the_way) if self.is_held_up else LinkError(self.in_the_way)

    def close(self, timeout_s: float) -> None:
        """Deliver the last commits to on_commit, and end. Raises RemusError if on_commit does not return in time."""
        if self._release is not None:
            self._release.close(timeout_s)

    # What the sending thread does

    def begin(self, carried: list[NDArray[np.int64]]) -> bool:
        """The next bytes belong to a checkpoint with these pages; returns True if they are its first."""
        if self._coming is not None:
            return False
        self._coming = _Flight(carried, time.monotonic())
        return True

    def written(self, sent: Sent) -> None:
        """All of the checkpoint but its commit has been sent; an acknowledgement may come from now on."""
        flight = self._coming
        assert flight is not None
        flight.sent = sent
        self._flights.append(flight)  # in one step, and behind all that a turn of another thread looks at

    def commit_sent(self) -> None:
        """The checkpoint's commit has been sent."""
        self._coming = None

    def knows(self, held: Position) -> bool:
        """Whether a backup that holds this holds a checkpoint of this sender's that is not acknowledged."""
        return any(flight.position == held for flight in tuple(self._flights))

    def rewind(self, sender: Sender, held: Position) -> bool:
        """Bring a sender back to what the backup holds; False if that is nothing the sender has sent."""
        if not self._settle(held):
            return False
        lost = [*sender.carried] if sender.unfinished else []
        for flight in (*self._flights, *([self._coming] if self._coming else [])):
            lost += flight.carried
        sender.rewind(held, np.concatenate([np.empty(0, dtype=np.int64), *lost]))
        self._forget()
        return True

    def restart(self) -> None:
        """A new sender begins: nothing sent before can be continued from."""
        self._anchor = None
        self._forget()

    def _forget(self) -> None:
        self._changes.take(self._flights.clear)
        self._coming = None

    # What the link's thread does

    def acknowledge(self, ack: Ack) -> None:
        """Take in an acknowledgement. Raises Malformed if it names a position that was not sent."""
        if LEVELS.index(ack.level) < LEVELS.index(self._wait):
            return
        if self._append is None:
            if self._settle(ack.position):
                return
        elif self.knows(ack.position):
            self._append(ack.position)
            return
        elif ack.position == self._anchor:
            return
        if ack.level == self._wait:
            raise Malformed(f"the backup acknowledges {ack.position}, which was not sent", section="session.md §3")

    # What the log's thread does

    def logged(self, position: Position) -> None:
        """The backup holds a position, and so does the commit log."""
        self._settle(position)

    def _settle(self, position: Position) -> bool:
        """Record that the backup holds a position; False if it is not a checkpoint of this sender."""
        return self._changes.take(lambda: self._commit_up_to(position)) or position == self._anchor

    def _commit_up_to(self, position: Position) -> bool:
        """Drop the flights that the backup holds; False if the position belongs to none of them."""
        now = time.monotonic()
        flights = tuple(self._flights)
        place = next((place for place, flight in enumerate(flights) if flight.position == position), None)
        if place is None:
            return False
        done: list[Committed] = []
        for flight in flights[: place + 1]:
            assert flight.sent is not None and flight.sent.position is not None
            done.append(Committed(flight.sent.epoch, flight.sent.position, now - flight.began))
        self.committed = self._anchor = position
        if self._release is not None:
            self._release.put(done)
        # Remove flights last, and the requested one last of all: after an interrupt, a repeat still finds it.
        for _ in done:
            self._flights.popleft()
        self.commits += len(done)
        self._bell.ring()
        for committed in done:
            self._metrics.committed(
                self._name, committed.epoch, committed.latency_s, time.time(), committed.position.digest
            )
        return True
