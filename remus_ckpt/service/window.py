"""The window: checkpoints on their way to the backup, and what it has acknowledged.

Nothing of a checkpoint is kept but the numbers of its pages: if the link breaks, their present content goes full in the
next one (specs/session.md §5).

An interrupt may fall between any two instructions of the thread that sends. One rule keeps commits right all the same:
a page is noted before the reference takes its new content, by the sender and then by a flight, and a flight goes only
when the backup has acknowledged it or its pages are owed. Until a checkpoint's commit has been sent the window is torn;
whoever finds it so begins another session, which settles what the backup holds. Whatever takes several steps can be
done again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Malformed
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.service.release import Committed, Release
from remus_ckpt.service.turns import Bell, Turns
from remus_ckpt.session.messages import LEVELS, Ack, Level
from remus_ckpt.wire.record import Position


@dataclass(slots=True)
class _Flight:
    """A checkpoint on its way: being written, or sent and not yet acknowledged.

    carried: int64[n] each, its pages, as the sender adds to them
    began: when its first byte was sent
    sent: what it came to, once it has been written
    """

    carried: list[NDArray[np.int64]]
    began: float
    sent: Sent | None = None

    @property
    def position(self) -> Position | None:
        return None if self.sent is None else self.sent.position


class Window:
    """What is sent and not yet committed.

    size: checkpoints that may be in it
    wait: what counts as committed
    on_commit: told of each commit, by a `Release`
    most_unreleased: commits that may wait for it; with more, the window is full too
    bell: rung when something here has changed
    The thread that sends changes it, and the link's thread by `acknowledge`. Fields of both stand below `_changes`, and
    each change of them is a turn of it. What is only read may be read by any thread at any time.
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
        # The sending thread's own: the checkpoint that is being written, until its commit has been sent.
        self._coming: _Flight | None = None
        self._changes = Turns("a change of the window")
        self._flights: deque[_Flight] = deque()  # not acknowledged, the oldest first
        self._anchor: Position | None = None  # the newest committed one that this sender has made
        self.committed: Position | None = None
        """The newest position that the backup has acknowledged."""
        self.commits = 0
        """How many checkpoints it has."""

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
        """What a window without room waits for, for users."""
        if self._release is not None and self.is_held_up:
            waiting = self._release.waiting
            return f"on_commit does not return: {waiting:,} commits wait for it, and checkpoints with them"
        return f"the backup does not commit ({self.lag} checkpoints wait): its disk may be slow, or hang"

    @property
    def newest(self) -> Position | None:
        """That of the newest checkpoint which is not acknowledged."""
        flights = tuple(self._flights)
        return flights[-1].position if flights else None

    @property
    def is_torn(self) -> bool:
        """Whether a checkpoint was begun whose commit is not known to be sent."""
        return self._coming is not None

    def has_committed(self, epoch: int) -> bool:
        """Whether that epoch, or a later one, is committed."""
        return self.committed is not None and self.committed.epoch >= epoch

    def close(self, timeout_s: float) -> None:
        """Tell on_commit what is committed, and end. Raises RemusError if it does not return in that time."""
        if self._release is not None:
            self._release.close(timeout_s)

    # What the sending thread does

    def begin(self, carried: list[NDArray[np.int64]]) -> bool:
        """The next bytes are of a checkpoint with these pages; True for the first of them."""
        if self._coming is not None:
            return False
        self._coming = _Flight(carried, time.monotonic())
        return True

    def written(self, sent: Sent) -> None:
        """The checkpoint has been sent but for its commit, which may be acknowledged from now on."""
        flight = self._coming
        assert flight is not None
        flight.sent = sent
        self._changes.take(lambda: self._flights.append(flight))

    def commit_sent(self) -> None:
        """Its commit has been sent."""
        self._coming = None

    def rewind(self, sender: Sender, held: Position) -> bool:
        """Bring a sender back to what the backup holds; False where it cannot be: that is nothing it has sent."""
        if sender.sent is None or not self._settle(held):
            return False
        lost = [*sender.carried] if sender.unfinished else []
        for flight in (*self._flights, *([self._coming] if self._coming else [])):
            lost += flight.carried
        sender.rewind(held, np.concatenate([np.empty(0, dtype=np.int64), *lost]))
        self._forget()
        return True

    def restart(self) -> None:
        """Another sender begins: nothing that was sent can be gone on from."""
        self._anchor = None
        self._forget()

    def _forget(self) -> None:
        self._changes.take(self._flights.clear)
        self._coming = None

    # What the link's thread does

    def acknowledge(self, ack: Ack) -> None:
        """Raises Malformed for what was not sent."""
        if LEVELS.index(ack.level) < LEVELS.index(self._wait) or self._settle(ack.position):
            return
        if ack.level == self._wait:
            raise Malformed(f"the backup acknowledges {ack.position}, which was not sent", section="session.md §3")

    def _settle(self, position: Position) -> bool:
        """Take in that the backup holds a position; False if that is no checkpoint of this sender's."""
        return self._changes.take(lambda: self._commit_up_to(position)) or position == self._anchor

    def _commit_up_to(self, position: Position) -> bool:
        """Take what the backup holds out of the flights; False if the position is none of theirs."""
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
        # Last, and the one that was asked for last of all: whoever is interrupted before finds it still there.
        for _ in done:
            self._flights.popleft()
        self.commits += len(done)
        self._bell.ring()
        for committed in done:
            self._metrics.committed(
                self._name, committed.epoch, committed.latency_s, time.time(), committed.position.digest
            )
        return True
