"""The primary: protects one source. It sends checkpoints, hears which are committed, and connects anew when it must.

What is sent and not yet acknowledged is bounded by the window. Nothing of it is kept but the numbers of its pages: if
the link breaks, their present content goes full in the next checkpoint (specs/session.md §5).

A signal handler may raise between any two instructions of the main thread. One rule keeps commits right all the same:
a page is noted before the reference takes its new content, by the sender and then by a flight, and a flight goes only
when the backup has acknowledged it or its pages are owed. Until a checkpoint's commit has been sent, its flight is
`_coming`; a call that finds one there, or an unfinished sender, takes the link down, and the next session settles what
the backup holds. Whatever takes several steps can be done again. There are no locks: none can be left held. Calls of
`checkpoint` take turns, and a turn that was cut short ends with the exception that did it.
"""

from __future__ import annotations

import logging
import math
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Fenced, LinkError, Malformed, Refused, RemusError, StreamError, UnknownFormat
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.loop import CheckpointLoop, StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, flatten
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import LEVELS, Ack, Begin, Commit, Hello, Level, StreamShape
from remus_ckpt.source import Source
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

LASTING = frozenset({"version", "name", "limit", "fenced"})
"""Refusals that another try would not change."""
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_LOOK_S = 0.1
"""How often whoever waits looks for what nobody tells it."""
_SAY_S = 10.0
"""Checkpoints that wait for longer are worth a line in the log."""
_LAST_LINK_S = 2.0
"""How long a primary that ends tries for a new link, so that what it has sent is committed."""
_LAST_COMMIT_S = 10.0
"""How long it waits for commits over one that is well, at least."""
_MAX_UNRELEASED = 1000
"""Commits that may wait for on_commit; then checkpoints wait too."""


def deadline_in(timeout_s: float) -> float:
    """When a time that begins now is over. Raises ValueError for what is no time."""
    if math.isnan(timeout_s):
        raise ValueError("timeout_s is no number; math.inf waits as long as it takes")
    return time.monotonic() + timeout_s


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that the backup holds as the primary asked: what was held back for it may go out.

    latency_s: from its first byte on the way to the acknowledgement
    """

    epoch: int
    position: Position
    latency_s: float


@dataclass(slots=True)
class _Flight:
    """A checkpoint on its way: being written, or sent and not yet acknowledged.

    carried: its pages, as the sender adds to them
    began: when its first byte was sent
    sent: what it came to, once it has been written
    """

    carried: list[NDArray[np.int64]]
    began: float
    sent: Sent | None = None

    @property
    def position(self) -> Position | None:
        return None if self.sent is None else self.sent.position


class _Bell:
    """Wakes all who wait. Unlike a Condition it has no lock of its own, which an interrupt could leave held."""

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


@dataclass(slots=True)
class _Call:
    """One call of `checkpoint`, in its place in the queue.

    thread: its thread's number
    frame: where it runs. Whether it does is asked of the frame itself: a call that an interrupt cut short, wherever
        that was, is over although it still stands in the queue, and although a traceback still knows its frame
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


class Primary:
    """Keeps one source protected by one backup, from the process that made it: a fork has no part in it.

    name: under which the backup keeps it
    connect: gives a connection, shaken hands; called again whenever one is lost
    window: checkpoints that may be on their way at once; with 1, each waits until the one before is committed
    wait: what counts as committed: "received", "durable" or "applied"
    term: under which this side was promoted; None: whatever the backup's is, if it has not been promoted itself
    on_commit: called for each commit, in order, in a thread of its own. Whatever it raises is logged, and the commits
        behind it are delivered all the same. While 1,000 wait for it, so do checkpoints
    on_paused: called with the epoch while the source is paused
    on_phase: called with "capture", "send" or "sent" and the epoch, as each begins; the first copy is sent before its
        capture
    on_turn: called often while all is well, also while a link or the backup is waited for
    What the other callbacks raise goes to the caller; the next checkpoint goes on right behind it.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        connect: Callable[[], Connection],
        *,
        codec: StreamCodec = "delta",
        word: Word = 8,
        interval_s: float = 0.025,
        duration_s: float | None = None,
        window: int = 2,
        wait: Level = "durable",
        compression: str = "auto",
        term: int | None = None,
        on_commit: Callable[[Committed], None] | None = None,
        on_paused: Callable[[int], None] | None = None,
        on_phase: Callable[[str, int], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        metrics: Metrics | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        if not 1 <= window <= MAX_WINDOW:
            raise ValueError(f"a window of {window} checkpoints; it has 1…{MAX_WINDOW}")
        self.name = name
        self.term = term
        self.committed: Position | None = None
        """The newest position that the backup has acknowledged."""
        self.ended = ""
        self.is_running = False
        """Whether `run` is there to make a lost link anew."""
        self._has_run = False
        self._is_closed = False
        self._source = source
        self._connect = connect
        self._codec: StreamCodec = codec
        self._word: Word = word
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._window = window
        self._wait: Level = wait
        self._compression = compression
        self._on_paused = on_paused
        self._phase = on_phase or (lambda name, epoch: None)
        self._turn = on_turn or (lambda: None)
        self._metrics = metrics or Metrics()
        self._stop = stop
        self._run = os.urandom(16)
        self._sender: Sender | None = None
        self._anchor: Position | None = None  # the newest committed one that this sender has made
        self._one_by_one: CheckpointLoop | None = None  # that `checkpoint` goes through, kept for its capture buffer
        self._link: Link | None = None
        self._coming: _Flight | None = None  # the checkpoint that is being written, until its commit has been sent
        # Sent and not acknowledged, the oldest first; at most the window. We append, the link's thread takes away.
        self._flights: deque[_Flight] = deque()
        self._bell = _Bell()  # rung when they, the link or `committed` have changed
        self._until = math.inf  # when the call that is under way must be over
        # Calls of `checkpoint`, the one that is under way first, by what they call themselves: a call that knew its own
        # frame would be garbage that only the collector finds.
        self._calls: dict[object, _Call] = {}
        self._pid = os.getpid()
        self._connections = 0
        self._lease_s = math.inf  # of the last welcome
        self._commits = 0
        self._commits_before = 0  # when the link was made
        self._backoff_s = 0.0
        self._release = _Release(on_commit) if on_commit else None
        self._fenced: Fenced | None = None

    # The user's calls

    def run(self) -> Iterator[Taken]:
        """Checkpoints at the interval, each when it has been sent, until the stop, the duration or the source's end.

        A lost link is made anew; meanwhile the source runs on, and nothing is committed.
        Raises Fenced when another has taken over, Refused where another try would not help, SourceError.
        """
        self._check_process()
        self._until = math.inf
        self.is_running = self._has_run = True
        return self._run_on()

    def _run_on(self) -> Iterator[Taken]:
        try:
            yield from self._sessions()
        finally:
            self.is_running = False
            self._bell.ring()

    def _sessions(self) -> Iterator[Taken]:
        begin = time.monotonic()
        end = None if self._duration_s is None else begin + self._duration_s
        while not self.ended:
            try:
                self._connect_patiently(None, end)
                if self.ended:
                    return
                left = None if self._duration_s is None else max(self._duration_s - (time.monotonic() - begin), 0.0)
                loop = self._make_loop(left)
                for taken in loop.run():
                    self._count(taken)
                    yield taken
                self._drain_patiently()
                self.ended = loop.ended
            except LinkError as error:
                self._lost(error)

    def checkpoint(self, timeout_s: float = 30.0, *, wait: bool = False) -> int:
        """Take one checkpoint now, in the calling thread; returns its epoch when it has been sent.

        Threads that call at once take turns.

        timeout_s: for all of it, a first copy and the turns of others included; math.inf for as long as it takes
        wait: return when it is committed, and take another if the link breaks before
        Raises LinkError when that was not done in that time, and RemusError when it was on_commit or another call that
        did not return; the next call goes on from there. ValueError within another call, as in a callback or a
        signal's handler.
        """
        self._check_process()
        deadline = deadline_in(timeout_s)
        key = object()
        try:
            self._calls[key] = _Call(threading.get_ident(), sys._getframe())
            if not self._bell.wait(lambda: self._is_first(key), deadline):
                raise RemusError(f"the checkpoint that another thread takes was not done in {timeout_s:g} s")
            return self._take(deadline, wait)
        finally:
            self._leave(key)

    def _is_first(self, key: object) -> bool:
        """Whether it is a call's turn."""
        for other, call in tuple(self._calls.items()):
            if other is key:
                return True
            if call.is_over:
                self._leave(other)
            elif call.thread != threading.get_ident():
                return False
            else:
                raise ValueError("checkpoint() was called within checkpoint(): by a callback, or a signal's handler?")
        raise AssertionError("a call that waits for its turn stands in the queue")

    def _leave(self, key: object) -> None:
        self._calls.pop(key, None)  # another thread may have seen that it was over
        self._bell.ring()

    def _take(self, deadline: float, wait: bool) -> int:
        self._until = deadline
        epoch = None
        lost: LinkError | None = None
        try:
            while True:
                try:
                    self._connect_patiently(deadline)
                    if epoch is None or self.committed is None or self.committed.epoch < epoch:
                        self._await_room(stoppable=False)  # an earlier call may have given up on it
                        if self._one_by_one is None:
                            self._one_by_one = self._make_loop(None)
                        taken = self._one_by_one.take()
                        self._count(taken)
                        epoch = taken.sent.epoch
                    if wait:
                        self.wait_for(epoch, max(deadline - time.monotonic(), 0.0))
                    return epoch
                except LinkError as error:
                    if time.monotonic() >= deadline:
                        self.check()  # the link may be well, and the backup slow
                        # Why a link broke says more than that the time is over.
                        raise (lost or error) from None
                    lost = error
                    self._lost(error)
                    if time.monotonic() + self._backoff_s > deadline:
                        raise  # what was wrong says more than that the time is over
        finally:
            lost = None  # its traceback refers to this frame, and to the link's: a cycle

    def wait_for(self, epoch: int, timeout_s: float | None = None) -> Position:
        """Wait until that epoch, or a later one, is committed.

        Raises LinkError if the time is over, or if the link breaks and `run` is not there to make it anew: then it is
        not known to be. Fenced when another has taken over: then it will not be.
        """
        self._check_process()
        return self._await(epoch, timeout_s, is_patient=True)

    def _await(self, epoch: int, timeout_s: float | None, *, is_patient: bool) -> Position:
        def is_over() -> bool:
            if self.committed is not None and self.committed.epoch >= epoch:
                return True
            if self._fenced is not None:
                raise self._fenced
            if not (is_patient and self.is_running) or self.ended:
                self.check()
                if self._link is None:
                    raise LinkError("the link to the backup is lost; take another checkpoint")
                if self._has_run and not self.is_running and not self._flights:
                    raise LinkError(f"epoch {epoch} was not taken, and no more checkpoints are")
            return False

        if not self._bell.wait(is_over, deadline_in(math.inf if timeout_s is None else timeout_s)):
            raise LinkError(f"epoch {epoch} was not acknowledged in {timeout_s:g} s")
        assert self.committed is not None
        return self.committed

    def drain(self, timeout_s: float) -> None:
        """Wait until all that was sent is committed. Raises LinkError if that does not come to pass."""
        flights = tuple(self._flights)
        if flights and (newest := flights[-1].position) is not None:
            self._await(newest.epoch, timeout_s, is_patient=False)

    def _drain_patiently(self) -> None:
        """For two leases, or 10 s where that is longer: a link that is dead is found so after one, and made anew.

        A backup that is there and slower than that is told goodbye all the same.
        """
        link = self._link
        if link is None:
            return
        try:
            self.drain(self.left_s(max(2 * link.welcome.lease_s, _LAST_COMMIT_S)))
        except LinkError as error:
            if isinstance(error, Refused):
                raise
            link.check()
            log("ended before all was committed", level=logging.WARNING, name=self.name, lag=len(self._flights))

    def hurry(self, timeout_s: float) -> None:
        """From another thread: give the call that is under way no more time than that."""
        self._until = time.monotonic() + timeout_s

    def hang_up(self) -> None:
        """From another thread: break the link, so that nothing waits for the backup."""
        if (link := self._link) is not None:
            link.hang_up()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the session in an orderly way; what is not committed stays so. In a fork it does nothing.

        timeout_s: for that, and for on_commit to take what is committed
        Raises RemusError if on_commit has not returned by then.
        """
        if self._pid != os.getpid():
            return
        deadline = deadline_in(timeout_s)
        self._is_closed = True  # a call in another thread must not make the link anew
        self.hurry(timeout_s / 2)  # a backup that does not hang up leaves on_commit its half
        try:
            if self._link is not None:
                self._link.close(self.ended or "closed")
                self._link = None
        finally:
            if self._release is not None:
                self._release.close(deadline - time.monotonic())

    def left_s(self, seconds: float) -> float:
        """How many of so many seconds the call that is under way may still take."""
        return max(min(seconds, self._until - time.monotonic()), 0.0)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(
                f"{self.name!r} is protected by process {self._pid}, not by its fork {os.getpid()}: "
                "to protect the fork's memory, protect it anew under another name"
            )

    def status(self) -> dict[str, Any]:
        """What there is to say of this side, for the other and for users."""
        newest = self._sender.position if self._sender else None
        return self._metrics.status(self.name) | {
            "term": self.term,
            "epoch": newest.epoch if newest else None,
            "committed_epoch": self.committed.epoch if self.committed else None,
            "committed_position": f"{self.committed.epoch}:{self.committed.digest.hex()}" if self.committed else None,
            "lag_checkpoints": len(self._flights),
            "memory_bytes": self._source.memory.pages * PAGE_SIZE,
        }

    # The link

    def _connect_patiently(self, deadline: float | None, end: float | None = None) -> None:
        """Connect, again and again with longer pauses, until it is done or there is no more reason to.

        deadline: when to raise what was in the way; end: when all is to end, link or no link
        """
        if self._fenced is not None:
            raise self._fenced
        if self._link is not None and (self._coming is not None or (self._sender and self._sender.unfinished)):
            # Half a checkpoint has been sent: only another session takes that back.
            self._lost(LinkError("a checkpoint broke off"))
        said = ""
        while self._link is None and not self.ended:
            if self._is_closed:
                raise ValueError(f"the protection of {self.name!r} has been closed")
            until = min((at for at in (deadline, end) if at is not None), default=math.inf)
            if (reason := self._reason_to_end) and self._gives_up():
                self.ended = reason
                return
            left_s = min(self._backoff_s, until - time.monotonic())
            if left_s > 0 and self._sleep(left_s):
                continue
            if end is not None and said and time.monotonic() >= end:
                self.ended = "duration"
                return
            try:
                self._open()
                return
            except (LinkError, StreamError) as error:
                if isinstance(error, Refused) and error.code in LASTING:
                    raise
                if isinstance(error, UnknownFormat) and not self._connections:
                    raise  # it has never been a backup
                self._back_off()
                if str(error) != said:
                    log("no link", level=logging.WARNING, name=self.name, reason=str(error))
                    said = str(error)
                if deadline is not None and time.monotonic() + self._backoff_s > deadline:
                    if isinstance(error, LinkError):
                        raise
                    raise LinkError(str(error)) from error

    def _back_off(self) -> None:
        """Before the next link, which is made at once only where the last one carried a commit.

        A backup that turned us away, because it was full or busy, must hear of us before its lease is over.
        """
        self._backoff_s = min(max(2 * self._backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S, self._lease_s / 4)

    @property
    def _reason_to_end(self) -> str:
        if not self.is_running:
            return ""  # a single checkpoint has its deadline
        if self._stop is not None and self._stop.is_set:
            return "stopped"
        return "" if self._source.stopper.alive() else "source gone"

    def _gives_up(self) -> bool:
        """Whether to wait for a link no longer. Who ends does so only for what has been sent, and not for long."""
        if self._reason_to_end:
            if not self._flights and self._coming is None and not (self._sender and self._sender.unfinished):
                return True
            self._until = min(self._until, time.monotonic() + _LAST_LINK_S)
        return time.monotonic() >= self._until

    def _sleep(self, seconds: float) -> bool:
        """Sleep; True as soon as there is a reason to end, but only the first time."""
        self._turn()
        poll = select.poll()
        if self.is_running and not self._reason_to_end:
            for fd in self._source.stopper.death_fds():
                poll.register(fd, select.POLLIN)
            if self._stop is not None:
                poll.register(self._stop.fd, select.POLLIN)
        return bool(poll.poll(int(self.left_s(seconds) * 1000)))

    def _open(self) -> None:
        hello = Hello(
            program=f"remus_ckpt {__version__}",
            role="primary",
            name=self.name,
            run=self._run,
            term=self.term,
            memory_pages=self._source.memory.pages,
            page_size=PAGE_SIZE,
            codec=self._codec,
            word=self._word,
            compressions=COMPRESSIONS,
        )
        connection: Connection | None = None
        link: Link | None = None
        try:
            connection = self._connect()
            link = Link(
                connection,
                hello,
                on_ack=self._acknowledged,
                status=lambda: flatten(self.status()),
                give_up=self._gives_up,
                left_s=self.left_s,
                compression=self._compression,
            )
            begin = self._agree(link)
            link.begin(begin)
            self._lease_s = link.welcome.lease_s
            self._connections += 1
            self._commits_before = self._commits
            self._link = link
        except BaseException:
            self._link = None
            if link is not None:
                link.close()
            elif connection is not None:
                connection.close()
            raise
        if self._compression not in ("auto", "none", *link.welcome.compressions):
            log("not compressed: one side has no such codec", level=logging.WARNING, codec=self._compression)
        self._metrics.set_connected(self.name, True)
        self._metrics.set_term(self.name, begin.term)
        if self._connections > 1:
            self._metrics.reconnected(self.name)
        log("linked", name=self.name, peer=link.peer, mode=begin.mode, term=self.term)

    def _agree(self, link: Link) -> Begin:
        """Go on with deltas if the backup holds what our reference can be brought back to, else begin anew."""
        welcome = link.welcome
        self.term = welcome.term
        shape = StreamShape(codec=self._codec, word=self._word, p2m_size=self._source.memory.pages)
        held = welcome.position
        if self._sender is not None and held is not None and welcome.stream == shape and self._rewind(held):
            return Begin(mode="continue", term=welcome.term, position=held, wait=self._wait)
        newest = max(
            (position for position in (self.committed, held) if position is not None),
            key=lambda position: position.epoch,
            default=None,
        )
        if held is not None and self.committed is not None and held.epoch < self.committed.epoch:
            log(
                "the backup has lost committed checkpoints",
                level=logging.ERROR,
                name=self.name,
                committed=str(self.committed),
                held=str(held),
            )
        floor = -1 if welcome.highest_epoch is None else welcome.highest_epoch
        if newest is not None and newest.epoch < floor:
            newest = None  # what came behind it is lost, and nothing can follow it under a number that was used
        # No sender while the tracker begins anew: interrupted here, the next call comes here again.
        self._sender = self._one_by_one = self._anchor = None
        self._forget_flights()
        self._sender = Sender(
            self._source.memory.pages,
            codec=self._codec,
            word=self._word,
            reference=self._source.tracker.restart(),
            position=newest,
            first_epoch=floor + 1,
        )
        return Begin(mode="full", term=welcome.term, position=newest, wait=self._wait)

    def _rewind(self, held: Position) -> bool:
        """Bring the sender back to a position; False where it cannot be."""
        sender = self._sender
        assert sender is not None
        if sender.sent is None:
            return False
        if not self._commit_up_to(held) and held != self._anchor:
            return False
        lost = [*sender.carried] if sender.unfinished else []
        for flight in (*self._flights, *([self._coming] if self._coming else [])):
            lost += flight.carried
        sender.rewind(held, np.concatenate([np.empty(0, dtype=np.int64), *lost]))
        self._forget_flights()
        return True

    def _forget_flights(self) -> None:
        self._flights.clear()
        self._coming = None

    def _lost(self, error: LinkError) -> None:
        if isinstance(error, Fenced):
            self._fenced = error
        link = self._link
        if link is not None:
            link.close()
            self._link = None
            if self._commits == self._commits_before:
                self._back_off()
        self._metrics.set_connected(self.name, False)
        self._bell.ring()
        if isinstance(error, Fenced):
            self._metrics.fence(self.name)
            self.ended = "fenced"
            log("fenced", level=logging.ERROR, name=self.name, term=error.term)
            raise error
        if isinstance(error, Refused) and error.code in LASTING:
            raise error
        if link is not None:
            log("link lost", level=logging.WARNING, name=self.name, reason=str(error))

    def _make_loop(self, duration_s: float | None) -> CheckpointLoop:
        assert self._sender is not None
        return CheckpointLoop(
            self._source,
            self._sender,
            self,
            interval_s=self._interval_s,
            duration_s=duration_s,
            on_capture=lambda epoch: self._phase("capture", epoch),
            on_paused=self._on_paused,
            stop=self._stop,
        )

    def _count(self, taken: Taken) -> None:
        self._metrics.checkpoint(
            self.name,
            pause_s=taken.pause_s,
            steps_s=taken.steps_s,
            dirty_pages=taken.dirty_pages,
            raw_bytes=taken.sent.pages * PAGE_SIZE,
            encoded_bytes=taken.sent.stream_bytes,
            wire_bytes=self._link.take_wire_bytes() if self._link else 0,
        )
        self._metrics.set_lag(self.name, len(self._flights))
        tracker = self._source.tracker
        if self._metrics.found(self.name, tracker.way, tracker.why, tracker.missed_pages):
            log("tracking had missed pages", level=logging.ERROR, name=self.name, reason=tracker.why)

    # What the loop sends

    def write(self, buffers: list[Buffer]) -> None:
        """Send bytes of a checkpoint."""
        self._turn()
        if self._link is None or self._sender is None:
            raise LinkError("there is no link")
        if self._coming is None:
            self._coming = _Flight(self._sender.carried, time.monotonic())
            self._phase("send", self._sender.next_epoch)
        if time.monotonic() >= self._until:
            raise LinkError(
                f"{self._link.peer}: the time was over in the middle of a checkpoint: memory of "
                f"{self._source.memory.pages * PAGE_SIZE:,} bytes may need a longer timeout_s"
            )
        self._link.write(buffers)

    def commit(self, sent: Sent) -> None:
        """Send the end of a checkpoint, and wait while the window is full: the interval stretches, memory does not."""
        flight = self._coming
        if self._link is None or flight is None or sent.position is None:
            raise LinkError("there is no link")
        flight.sent = sent
        self._flights.append(flight)
        self._link.commit(
            Commit(position=sent.position, before=sent.before, stream_bytes=sent.stream_bytes, pages=sent.pages)
        )
        self._coming = None
        self._phase("sent", sent.epoch)
        self._await_room()

    def _await_room(self, *, stoppable: bool = True) -> None:
        """Wait while the window is full, or too much of what is committed waits for on_commit."""

        def is_over() -> bool:
            if len(self._flights) < self._window and not self._is_held_up:
                return True
            self.check()
            self._turn()
            return stoppable and self._stop is not None and self._stop.is_set

        if self._bell.wait(is_over, min(self._until, time.monotonic() + _SAY_S)):
            return
        if time.monotonic() < self._until:
            log("checkpoints wait", level=logging.WARNING, name=self.name, reason=self._in_the_way())
            if self._bell.wait(is_over, self._until):
                return
        if self._is_held_up:
            raise RemusError(self._in_the_way())
        raise LinkError(self._in_the_way())

    @property
    def _is_held_up(self) -> bool:
        return self._release is not None and self._release.waiting > _MAX_UNRELEASED

    def _in_the_way(self) -> str:
        if self._release is not None and self._is_held_up:
            return (
                f"on_commit does not return: {self._release.waiting:,} commits wait for it, and checkpoints with them"
            )
        return f"the backup does not commit ({len(self._flights)} checkpoints wait): its disk may be slow, or hang"

    def fds(self) -> Sequence[int]:
        """Becomes readable when the link is lost."""
        failed = -1 if self._link is None else self._link.failed.fileno()
        return () if failed < 0 else (failed,)

    def check(self) -> None:
        """Raise what has ended the link."""
        link = self._link  # another thread may wait here while ours takes it away
        if link is not None:
            link.check()

    # What comes back, in the link's thread

    def _acknowledged(self, ack: Ack) -> None:
        if LEVELS.index(ack.level) < LEVELS.index(self._wait) or self._commit_up_to(ack.position):
            return
        if ack.level == self._wait and ack.position != self._anchor:
            raise Malformed(f"the backup acknowledges {ack.position}, which was not sent", section="session.md §3")

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
        self._backoff_s = 0.0
        if self._release is not None:
            self._release.put(done)
        # Last, and the one that was asked for last of all: whoever is interrupted before finds it still there.
        for flight in flights[: place + 1]:
            if self._flights and self._flights[0] is flight:
                self._flights.popleft()
        self._commits += len(done)
        self._bell.ring()
        for committed in done:
            self._metrics.committed(
                self.name, committed.epoch, committed.latency_s, time.time(), committed.position.digest
            )
        return True


class _Release:
    """Calls back for each commit, in a thread of its own: what is released may be slow, heartbeats may not."""

    def __init__(self, call: Callable[[Committed], None]) -> None:
        self._call = call
        self._queue: SimpleQueue[Committed | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name="commits", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def put(self, commits: Sequence[Committed]) -> None:
        """Deliver them, in order. Those that come again are delivered once."""
        for committed in commits:
            self._queue.put(committed)

    def close(self, timeout_s: float) -> None:
        """Deliver what is committed, and end. Raises RemusError where that takes longer; a moment it always has."""
        self._queue.put(None)
        if self._thread is threading.current_thread():
            return
        self._thread.join(min(max(timeout_s, _LOOK_S), threading.TIMEOUT_MAX))
        if self._thread.is_alive():
            raise RemusError(f"on_commit does not return: it has not been told of {self.waiting - 1:,} commits")

    def _deliver(self) -> None:
        newest = -1
        while (committed := self._queue.get()) is not None:
            if committed.epoch <= newest:
                continue
            newest = committed.epoch
            try:
                self._call(committed)
            except BaseException as error:
                # What is released is the user's; that it fails, or wants to exit, must not stop the commits behind it.
                with suppress(BaseException):
                    log("on_commit failed", level=logging.ERROR, error=error, epoch=committed.epoch)
