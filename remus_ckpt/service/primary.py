"""The primary: protects one source. It sends checkpoints, hears which are committed, and connects anew when it must.

What is sent and not yet acknowledged is bounded by the window (window.py), which says what an interrupt cannot break: a
call that finds half a checkpoint sent takes the link down, and the next session settles what the backup holds. What
waits for commits is in release.py. Nothing here holds a lock that an interrupt could leave held (turns.py).
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, Refused, RemusError, StreamError, UnknownFormat
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.loop import CheckpointLoop, StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, flatten
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.service.release import Committed
from remus_ckpt.service.turns import Bell, Turns, deadline_in
from remus_ckpt.service.window import Window
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import Begin, Commit, Hello, Level, StreamShape
from remus_ckpt.source import Source
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

LASTING = frozenset({"version", "name", "limit", "fenced"})
"""Refusals that another try would not change."""
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_SAY_S = 10.0
"""Checkpoints that wait for longer are worth a line in the log."""
_LAST_LINK_S = 2.0
"""How long a primary that ends tries for a new link, so that what it has sent is committed."""
_LAST_COMMIT_S = 10.0
"""How long it waits for commits over one that is well, at least."""
_MAX_UNRELEASED = 1000
"""Commits that may wait for on_commit; then checkpoints wait too."""


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

    One thread at a time takes checkpoints: that of `run`, or by turns those that call `checkpoint`. All else may be
    called from any thread.
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
        self.name = name
        self._pid = os.getpid()
        self._source = source
        self._connect = connect
        self._codec: StreamCodec = codec
        self._word: Word = word
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._wait: Level = wait
        self._compression = compression
        self._on_paused = on_paused
        self._phase = on_phase or (lambda name, epoch: None)
        self._turn = on_turn or (lambda: None)
        self._metrics = metrics or Metrics()
        self._stop = stop
        self._run = os.urandom(16)
        self._turns = Turns("checkpoint()")
        self._bell = Bell()  # rung when the link, or what is in the window, has changed
        self._window = Window(
            name,
            size=window,
            wait=wait,
            on_commit=on_commit,
            most_unreleased=_MAX_UNRELEASED,
            bell=self._bell,
            metrics=self._metrics,
        )
        # Of the thread that takes checkpoints:
        self._sender: Sender | None = None
        self._one_by_one: CheckpointLoop | None = None  # that `checkpoint` goes through, kept for its capture buffer
        self._connections = 0
        self._lease_s = math.inf  # of the last welcome
        self._commits_before = 0  # when the link was made
        self._backoff_s = 0.0
        # Of that thread too, for others to look at; each is set in one step.
        self.term = term
        self.ended = ""
        self.is_running = False
        """Whether `run` is there to make a lost link anew."""
        self._has_run = False
        self._fenced: Fenced | None = None
        # That others set as well. Who closes says so before it looks for a link, who makes one looks after it has.
        self._until = math.inf  # when the call that is under way must be over
        self._is_closed = False
        self._link: Link | None = None

    @property
    def committed(self) -> Position | None:
        """The newest position that the backup has acknowledged."""
        return self._window.committed

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
        return self._turns.take(lambda: self._take(deadline, wait), timeout_s)

    def _take(self, deadline: float, wait: bool) -> int:
        self._until = deadline
        epoch = None
        lost: LinkError | None = None
        try:
            while True:
                try:
                    self._connect_patiently(deadline)
                    if epoch is None or not self._window.has_committed(epoch):
                        self._await_room(stoppable=False)  # an earlier call may have given up on it
                        self._one_by_one = self._one_by_one or self._make_loop(None)
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
            is_on_its_way = bool(self._window.lag)  # asked first: what is committed next no longer is
            if self._window.has_committed(epoch):
                return True
            if self._fenced is not None:
                raise self._fenced
            if not (is_patient and self.is_running) or self.ended:
                self.check()
                if self._link is None:
                    raise LinkError("the link to the backup is lost; take another checkpoint")
                if self._has_run and not self.is_running and not is_on_its_way:
                    raise LinkError(f"epoch {epoch} was not taken, and no more checkpoints are")
            return False

        if not self._bell.wait(is_over, deadline_in(math.inf if timeout_s is None else timeout_s)):
            raise LinkError(f"epoch {epoch} was not acknowledged in {timeout_s:g} s")
        assert self.committed is not None
        return self.committed

    def drain(self, timeout_s: float) -> None:
        """Wait until all that was sent is committed. Raises LinkError if that does not come to pass."""
        if (newest := self._window.newest) is not None:
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
            log("ended before all was committed", level=logging.WARNING, name=self.name, lag=self._window.lag)

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
            self._window.close(deadline - time.monotonic())

    def left_s(self, seconds: float) -> float:
        """How many of so many seconds the call that is under way may still take."""
        return max(min(seconds, self._until - time.monotonic()), 0.0)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"the protection of {self.name!r} has been closed")

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
            "lag_checkpoints": self._window.lag,
            "memory_bytes": self._source.memory.pages * PAGE_SIZE,
        }

    # The link

    def _connect_patiently(self, deadline: float | None, end: float | None = None) -> None:
        """Connect, again and again with longer pauses, until it is done or there is no more reason to.

        deadline: when to raise what was in the way; end: when all is to end, link or no link
        """
        if self._fenced is not None:
            raise self._fenced
        if self._link is not None and self._is_torn:
            # Half a checkpoint has been sent: only another session takes that back.
            self._lost(LinkError("a checkpoint broke off"))
        said = ""
        while self._link is None and not self.ended:
            self._check_open()
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

    @property
    def _is_torn(self) -> bool:
        """Whether half a checkpoint has been sent."""
        return self._window.is_torn or (self._sender is not None and self._sender.unfinished)

    def _gives_up(self) -> bool:
        """Whether to wait for a link no longer. Who ends does so only for what has been sent, and not for long."""
        if self._reason_to_end:
            if not self._window.lag and not self._is_torn:
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
                on_ack=self._window.acknowledge,
                status=lambda: flatten(self.status()),
                give_up=self._gives_up,
                left_s=self.left_s,
                compression=self._compression,
            )
            begin = self._agree(link)
            link.begin(begin)
            self._lease_s = link.welcome.lease_s
            self._connections += 1
            if self._window.commits != self._commits_before:  # it has turned out that the last link carried some
                self._commits_before, self._backoff_s = self._window.commits, 0.0
            self._link = link
            self._check_open()
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
        sender = self._sender
        if sender is not None and held is not None and welcome.stream == shape and self._window.rewind(sender, held):
            return Begin(mode="continue", term=welcome.term, position=held, wait=self._wait)
        committed = self.committed
        known = [position for position in (committed, held) if position is not None]
        newest = max(known, key=lambda position: position.epoch, default=None)
        if held is not None and committed is not None and held.epoch < committed.epoch:
            text = "the backup has lost committed checkpoints"
            log(text, level=logging.ERROR, name=self.name, committed=str(committed), held=str(held))
        floor = -1 if welcome.highest_epoch is None else welcome.highest_epoch
        if newest is not None and newest.epoch < floor:
            newest = None  # what came behind it is lost, and nothing can follow it under a number that was used
        # No sender while the tracker begins anew: interrupted here, the next call comes here again.
        self._sender = self._one_by_one = None
        self._window.restart()
        self._sender = Sender(
            self._source.memory.pages,
            codec=self._codec,
            word=self._word,
            reference=self._source.tracker.restart(),
            position=newest,
            first_epoch=floor + 1,
        )
        return Begin(mode="full", term=welcome.term, position=newest, wait=self._wait)

    def _lost(self, error: LinkError) -> None:
        if isinstance(error, Fenced):
            self._fenced, self.ended = error, "fenced"
        link = self._link
        if link is not None:
            link.close()
            self._link = None
            if self._window.commits == self._commits_before:
                self._back_off()
            else:
                self._backoff_s = 0.0
        self._metrics.set_connected(self.name, False)
        self._bell.ring()
        if isinstance(error, Fenced):
            self._metrics.fence(self.name)
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
        self._metrics.set_lag(self.name, self._window.lag)
        tracker = self._source.tracker
        if self._metrics.found(self.name, tracker.way, tracker.why, tracker.missed_pages):
            log("tracking had missed pages", level=logging.ERROR, name=self.name, reason=tracker.why)

    # What the loop sends

    def write(self, buffers: list[Buffer]) -> None:
        """Send bytes of a checkpoint."""
        self._turn()
        link = self._link  # another thread may take it away
        if link is None or self._sender is None:
            raise LinkError("there is no link")
        if self._window.begin(self._sender.carried):
            self._phase("send", self._sender.next_epoch)
        if time.monotonic() >= self._until:
            raise LinkError(
                f"{link.peer}: the time was over in the middle of a checkpoint: memory of "
                f"{self._source.memory.pages * PAGE_SIZE:,} bytes may need a longer timeout_s"
            )
        link.write(buffers)

    def commit(self, sent: Sent) -> None:
        """Send the end of a checkpoint, and wait while the window is full: the interval stretches, memory does not."""
        link = self._link
        if link is None or sent.position is None:
            raise LinkError("there is no link")
        self._window.written(sent)
        end = Commit(position=sent.position, before=sent.before, stream_bytes=sent.stream_bytes, pages=sent.pages)
        link.commit(end)
        self._window.commit_sent()
        self._phase("sent", sent.epoch)
        self._await_room()

    def _await_room(self, *, stoppable: bool = True) -> None:
        """Wait while the window is full, or too much of what is committed waits for on_commit."""

        def is_over() -> bool:
            if self._window.has_room:
                return True
            self.check()
            self._turn()
            return stoppable and self._stop is not None and self._stop.is_set

        if self._bell.wait(is_over, min(self._until, time.monotonic() + _SAY_S)):
            return
        if time.monotonic() < self._until:
            log("checkpoints wait", level=logging.WARNING, name=self.name, reason=self._window.in_the_way)
            if self._bell.wait(is_over, self._until):
                return
        if self._window.is_held_up:
            raise RemusError(self._window.in_the_way)
        raise LinkError(self._window.in_the_way)

    def fds(self) -> Sequence[int]:
        """Becomes readable when the link is lost."""
        link = self._link
        return () if link is None or (fd := link.failed.fileno()) < 0 else (fd,)

    def check(self) -> None:
        """Raise what has ended the link."""
        if (link := self._link) is not None:
            link.check()
