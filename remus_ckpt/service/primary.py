"""The primary: protects one source. It sends checkpoints, learns which are committed, and reconnects when it must.

The window (window.py) bounds what is sent but not yet acknowledged, and keeps commits right after an interrupt: a call
that finds a half-sent checkpoint takes the link down, and the next session settles what the backup holds. Output that
waits for commits is in release.py. Nothing here holds a lock that an interrupt could leave held (turns.py).
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, Refused, StreamError, UnknownFormat
from remus_ckpt.fleet.commits import Commits
from remus_ckpt.fleet.engine import Log
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.loop import NOT_COPYING, CheckpointLoop, Copying, StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, flatten
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.pause import MAX_PAUSE_S
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.service.backoff import STRANGER, Backoff
from remus_ckpt.service.fenced import OnFenced
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.release import Committed
from remus_ckpt.service.turns import Bell, Turns, deadline_in
from remus_ckpt.service.window import Window
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import LEVELS, Ack, Begin, Hello, Level, StreamShape
from remus_ckpt.source import Source
from remus_ckpt.version import __version__
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DIGESTS, DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

_SAY_S = 10.0
"""A checkpoint that waits longer than this is worth a line in the log."""
_LAST_LINK_S = 2.0
"""How long an ending primary tries to get a new link, so that what it has sent is committed."""
_LAST_COMMIT_S = 10.0
"""Minimum time that an ending primary waits for commits over a working link."""
_CONNECT_S = 10.0
"""How long a try to connect may take."""
_MAX_UNRELEASED = 1000
"""Commits that may wait for on_commit; then checkpoints wait too."""


class Primary:
    """Keeps one source protected by one backup, from the process that made it: a forked child has no part in it.

    name: the name under which the backup keeps it
    connect: returns a connection whose handshake is done; called again whenever a link is lost
    placed: who chooses the backup, in a fleet; then `connect` is not used. Closed with the primary
    max_pause_s: as for `CheckpointLoop`
    window: checkpoints that may be under way at once; with 1, each waits until the one before is committed
    wait: what counts as committed: "received", "durable" or "applied"
    digest: the one of the streams, if the backup knows it too; an older backup gets SHA-256
    term: the term under which this side was promoted; None: the backup's term, unless the backup itself was promoted
    commit_log: where each commit is recorded before it counts as one; None: the backup's word is enough
    on_commit: called for each commit, in order, in a thread of its own. Exceptions from it are logged, and later
        commits are still delivered. While 1,000 commits wait for it, checkpoints wait too
    on_paused: called with the epoch while the source is paused
    on_phase: called with "capture", "send" or "sent" and the epoch, as each begins; the first
        checkpoint's "send" begins before its "capture"
    on_turn: called often while all is well, also while waiting for a link or the backup
    realtime: for the threads that take checkpoints and listen, from the first commit on
    on_fenced: called with the error that tells of another side's takeover, before anybody else is told and never in a
        pause. Exceptions from it are logged
    Exceptions from the other callbacks go to the caller; the next checkpoint continues correctly.

    One thread at a time takes checkpoints: the thread of `run`, or in turns those that call `checkpoint`. Any thread
    may call the rest.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        connect: Callable[[], Connection],
        *,
        placed: Placed | None = None,
        codec: StreamCodec = "delta",
        word: Word = 8,
        interval_s: float = 0.025,
        duration_s: float | None = None,
        max_pause_s: float = MAX_PAUSE_S,
        window: int = 2,
        wait: Level = "durable",
        compression: str = "auto",
        digest: DigestName = DEFAULT_DIGEST,
        term: int | None = None,
        commit_log: Log | None = None,
        on_commit: Callable[[Committed], None] | None = None,
        on_paused: Callable[[int], None] | None = None,
        on_phase: Callable[[str, int], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        on_fenced: Callable[[Fenced], None] | None = None,
        metrics: Metrics | None = None,
        realtime: Realtime | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self.name = name
        self._pid = os.getpid()
        self._source = source
        self._connect = connect
        self._placed = placed
        self._codec: StreamCodec = codec
        self._word: Word = word
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._max_pause_s = max_pause_s
        self._wait: Level = wait
        self._compression = compression
        self._digests: tuple[DigestName, ...] = (digest, *(name for name in reversed(DIGESTS) if name != digest))
        self._on_paused = on_paused
        self._phase = on_phase or (lambda name, epoch: None)
        self._turn = on_turn or (lambda: None)
        self.metrics = metrics or Metrics()
        self._fenced = OnFenced(name, on_fenced, self.metrics)
        self._realtime = realtime
        self._stop = stop
        self._run = os.urandom(16) if placed is None else bytes.fromhex(placed.run)
        self._turns = Turns("checkpoint()")
        self._bell = Bell()  # rung when the link or the contents of the window change
        self._commits: Commits | None = None
        if commit_log is not None:
            self._commits = Commits(commit_log, name, self._run, on_logged=self._logged, on_ended=self.hang_up)
        self._window = Window(
            name,
            size=window,
            wait=wait,
            on_commit=on_commit,
            most_unreleased=_MAX_UNRELEASED,
            bell=self._bell,
            metrics=self.metrics,
            append=None if self._commits is None else self._commits.put,
        )
        # Owned by the thread that takes checkpoints:
        self._sender: Sender | None = None
        self._one_by_one: CheckpointLoop | None = None  # used by `checkpoint`; kept for its capture buffer
        self._loop: CheckpointLoop | None = None  # the last one made; others may read it
        self._connections = 0
        self._backoff = Backoff()
        # Owned by that thread too, but others may read them; each is set in one step.
        self.term = term
        self.ended = ""
        self.is_running = False
        """Whether `run` is active and replaces a lost link."""
        self._has_run = False
        # Other threads set these too. `close` sets its flag before it looks for a link; connecting checks the flag once
        # the link is made.
        self._until = math.inf  # when the current call must be over
        self._is_closed = False
        self._link: Link | None = None
        self._left: Link | None = None  # to a backup that is being left: it has the name until another has all of it
        if placed is not None:
            placed.announce(self._facts)

    @property
    def committed(self) -> Position | None:
        """The newest committed position: the backup holds it, and so does the commit log, if there is one."""
        return self._window.committed

    @property
    def is_linked(self) -> bool:
        """Whether there is a link, over which a goodbye can be said."""
        return self._link is not None

    @property
    def links(self) -> int:
        """How many links there have been; a new one may be to a backup that holds something else."""
        return self._connections

    @property
    def address(self) -> str | None:
        """Of the backup that the fleet has chosen; None outside a fleet. Raises LinkError if none was yet."""
        return None if self._placed is None else self._placed.address

    def dial(self) -> Connection:
        """Another connection to the backup, with its handshake done. Raises LinkError."""
        return self._connect()

    @property
    def copying(self) -> Copying | None:
        """How far a first copy has got, None while there is none."""
        return None if self._loop is None else self._loop.copying

    @property
    def sender(self) -> Sender | None:
        """What the last checkpoints were sent with. To be looked at between two of them."""
        return self._sender

    # The user's calls

    def between(self, work: Callable[[], None], timeout_s: float) -> None:
        """Do something while no call takes a checkpoint. Raises like `checkpoint` if its turn does not come."""
        self._check_process()
        self._check_open()
        self._turns.take(work, timeout_s)

    def connect(self, timeout_s: float) -> None:
        """Connect now. Raises LinkError, with the reason, if the time runs out or another try would not help."""
        self._check_process()
        deadline = deadline_in(timeout_s)

        def connect() -> None:
            self._until = deadline
            try:
                self._connect_patiently(deadline)
            except Fenced as error:
                self._lost(error)  # which raises it

        self._turns.take(connect, timeout_s)

    def run(self) -> Iterator[Taken]:
        """Take checkpoints at the interval, and yield each once it has been sent, until the stop is set, the duration
        is over or the source ends.

        After a lost link it reconnects; meanwhile the source runs on, and nothing is committed.
        Raises Fenced when another side has taken over, Refused if another try would not help, SourceError.
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
        end = None if self._duration_s is None else time.monotonic() + self._duration_s
        while not self.ended:
            try:
                self._connect_patiently(None, end)
                if self.ended:
                    return
                loop = self._make_loop(None if end is None else max(end - time.monotonic(), 0.0))
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

        timeout_s: for the whole call, including a first copy and the turns of others; math.inf for no limit
        wait: return once it is committed, and take another checkpoint if the link breaks before
        Raises LinkError if the time runs out, or RemusError if it ran out because on_commit or another call did not
        return; the next call continues correctly. Raises ValueError within another call, as in a callback or a signal
        handler.
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
                    if time.monotonic() >= deadline and not isinstance(error, Fenced):
                        self.check()  # nothing raised: the link is fine, and only the backup slow
                        # The reason why a link broke is more useful than the timeout.
                        raise (lost or error) from None
                    lost = error
                    self._lost(error)
                    if time.monotonic() + self._backoff.seconds > deadline:
                        raise  # the fault is more useful than the timeout
        finally:
            lost = None  # its traceback refers to this frame, and to the link's: a cycle

    def wait_for(self, epoch: int, timeout_s: float | None = None) -> Position:
        """Wait until that epoch, or a later one, is committed.

        Raises LinkError if the time runs out, or if the link breaks and no `run` is there to reconnect: whether the
        epoch is committed is then unknown. Raises Fenced when another side has taken over: it will not be committed.
        """
        self._check_process()
        return self._await(epoch, timeout_s, is_patient=True)

    def _await(self, epoch: int, timeout_s: float | None, *, is_patient: bool) -> Position:
        def is_over() -> bool:
            is_on_its_way = bool(self._window.lag)  # read first: a commit in between would hide it
            if self._window.has_committed(epoch):
                return True
            self._fenced.check()
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
        """Wait until everything sent is committed. Raises LinkError if that does not happen."""
        if (newest := self._window.newest) is not None:
            self._await(newest.epoch, timeout_s, is_patient=False)

    def _drain_patiently(self) -> None:
        """Wait for two leases, or 10 s if that is longer: a dead link is noticed after one lease, and then replaced.

        A live backup that is slower than that gets its goodbye all the same.
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
        """From another thread: give the current call no more than that much time."""
        self._until = time.monotonic() + timeout_s

    def hang_up(self) -> None:
        """From another thread: break the link, so that nothing waits for the backup."""
        if (link := self._link) is not None:
            link.hang_up()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the session in an orderly way; what is not committed stays uncommitted. No effect in a forked child.

        timeout_s: for the goodbye, and for on_commit to take the last commits
        Raises RemusError if on_commit has not returned by then.
        """
        if self._pid != os.getpid():
            return
        deadline = deadline_in(timeout_s)
        self._is_closed = True  # a call in another thread must not reconnect
        self.hurry(timeout_s / 2)  # a backup that never hangs up must leave half to on_commit
        try:
            if self._link is not None:
                self._link.close(self.ended or "closed")
                self._link = None
            self._let_left_go(self.ended or "closed")
        finally:
            if self._commits is not None:
                self._commits.close()
            if self._placed is not None:
                self._placed.close()
            self._window.close(deadline - time.monotonic())

    def left_s(self, seconds: float) -> float:
        """How many of these seconds the current call may still use."""
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
        """The status of this side, for the backup and for users."""
        newest = self._sender.position if self._sender else None
        link = self._link
        return (
            self.metrics.status(self.name)
            | {
                "term": self.term,
                "epoch": newest.epoch if newest else None,
                "committed_epoch": self.committed.epoch if self.committed else None,
                "committed_position": f"{self.committed.epoch}:{self.committed.digest.hex()}"
                if self.committed
                else None,
                "lag_checkpoints": self._window.lag,
                "memory_bytes": self._source.memory.pages * PAGE_SIZE,
                "compression": link.compression if link else None,
                "compression_why": link.compression_why if link else "",
                "log_trouble": None if self._commits is None else self._commits.trouble,
                "log_append_s": None if self._commits is None else self._commits.append_s,
            }
            | self._source.status()
            | (NOT_COPYING if (copying := self.copying) is None else copying.status(time.monotonic()))
        )

    # The link

    def _connect_patiently(self, deadline: float | None, end: float | None = None) -> None:
        """Connect, retrying with longer and longer pauses, until it succeeds or there is no more reason to.

        deadline: when to give up and raise the last error; end: when to stop in any case, connected or not
        """
        self._check_fenced()
        if self._link is not None and self._is_torn:
            # Half a checkpoint has been sent: only a new session can undo that.
            self._lost(LinkError("a checkpoint broke off"))
        has_failed = False
        while self._link is None and not self.ended:
            self._check_open()
            until = min((at for at in (deadline, end) if at is not None), default=math.inf)
            if (reason := self._reason_to_end) and self._gives_up():
                self.ended = reason
                return
            left_s = min(self._backoff.seconds, until - time.monotonic())
            if left_s > 0 and self._sleep(left_s):
                continue
            if end is not None and (has_failed or self._backoff.seconds) and time.monotonic() >= end:
                self.ended = "duration"
                return
            try:
                self._open()
                return
            except (LinkError, StreamError) as error:
                code = self._code_of(error)
                if isinstance(error, UnknownFormat) and not self._connections:
                    code = STRANGER  # it has never been a backup
                self._backoff.failed(code)
                if self._backoff.is_final(code):
                    raise
                has_failed = True
                if self._backoff.news.is_new(str(error)):
                    log("no link; trying again", level=logging.WARNING, name=self.name, reason=str(error))
                if deadline is not None and time.monotonic() + self._backoff.seconds > deadline:
                    if isinstance(error, LinkError):
                        raise
                    raise LinkError(str(error)) from error

    @property
    def _reason_to_end(self) -> str:
        if not self.is_running:
            return ""  # a single checkpoint has its own deadline
        if self._stop is not None and self._stop.is_set:
            return "stopped"
        return "" if self._source.stopper.alive() else "source gone"

    @property
    def _is_torn(self) -> bool:
        """Whether half a checkpoint has been sent."""
        return self._window.is_torn or (self._sender is not None and self._sender.unfinished)

    def _gives_up(self) -> bool:
        """Whether to stop waiting for a link. At the end, only checkpoints already sent are worth a wait, and a short
        one."""
        if self._reason_to_end:
            if not self._window.lag and not self._is_torn:
                return True
            self._until = min(self._until, time.monotonic() + _LAST_LINK_S)
        return time.monotonic() >= self._until

    def _sleep(self, seconds: float) -> bool:
        """Sleep; return True as soon as there is a reason to end, but only the first time."""
        self._turn()
        poll = select.poll()
        if self.is_running and not self._reason_to_end:
            for fd in self._source.stopper.death_fds():
                poll.register(fd, select.POLLIN)
            if self._stop is not None:
                poll.register(self._stop, select.POLLIN)
        return bool(poll.poll(int(self.left_s(seconds) * 1000)))

    def _open(self) -> None:
        if self._commits is not None:
            self._commits.begin_run()
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
            digests=self._digests,
            log=None if self._commits is None else self._commits.identity,
        )
        connection: Connection | None = None
        link: Link | None = None
        try:
            connection = self._dial()
            hello = replace(hello, term=self.term)
            link = Link(
                connection,
                hello,
                on_ack=partial(self.acknowledge, at=None if self._placed is None else self._placed.target),
                status=lambda: flatten(self.status()),
                give_up=self._gives_up,
                left_s=self.left_s,
                compression=self._compression,
                on_listening=self._realtime.enter if self._realtime else lambda: None,
            )
            begin = self._agree(link)
            link.begin(begin)
            self._connections += 1
            self._backoff.linked(link.welcome.lease_s, self._window.commits)
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
        self.metrics.set_connected(self.name, True)
        self.metrics.set_term(self.name, begin.term)
        if self._connections > 1:
            self.metrics.reconnected(self.name)
        log("linked", level=self._backoff.log_level, name=self.name, peer=link.peer, mode=begin.mode, term=self.term)

    def _dial(self) -> Connection:
        try:
            return self._connect() if self._placed is None else self._find(self._placed)
        except LinkError:
            # A backup that has taken over may be gone since, and nobody else tells us.
            if self._commits is not None and self._connections:
                self._commits.look()
            raise

    def _agree(self, link: Link) -> Begin:
        """Continue with deltas if our reference can be brought back to what the backup holds; else start over."""
        welcome = link.welcome
        self.term = welcome.term
        if self._commits is not None:
            if welcome.log != self._commits.identity:
                raise LinkError(f"{link.peer} does not use our commit log: start it with the same --log")
            self._commits.begin(welcome.term, link.peer)
        shape = StreamShape(codec=self._codec, word=self._word, p2m_size=self._source.memory.pages)
        held = welcome.position
        sender = self._sender
        digest: DigestName = next((name for name in self._digests if name == welcome.digest), "sha256")
        is_known = sender is not None and (sender.digest == "sha256" or welcome.digest is not None)
        if is_known and sender and held and welcome.stream == shape and self._rewind(sender, held):
            return Begin(mode="continue", term=welcome.term, position=held, wait=self._wait)
        committed = self.committed
        known = [position for position in (committed, held) if position is not None]
        newest = max(known, key=lambda position: position.epoch, default=None)
        if held is not None and committed is not None and held.epoch < committed.epoch:
            text = "the backup has lost committed checkpoints"
            log(text, level=logging.ERROR, name=self.name, committed=str(committed), held=str(held))
        floor = -1 if welcome.highest_epoch is None else welcome.highest_epoch
        if newest is not None and newest.epoch < floor:
            newest = None  # later ones are lost; their numbers cannot be reused
        # Drop the sender before the tracker restarts: if this is interrupted, the next call gets here again.
        self._sender = self._one_by_one = None
        if self._commits is not None:
            self._commits.forget()
        self._window.restart()
        if self._realtime:
            self._realtime.leave()  # a copy of all memory comes next
        self._sender = Sender(
            self._source.memory.pages,
            codec=self._codec,
            word=self._word,
            reference=self._source.tracker.restart(),
            position=newest,
            first_epoch=floor + 1,
            digest=digest,
        )
        data_pages = self._source.data_pages()
        return Begin(mode="full", term=welcome.term, position=newest, wait=self._wait, data_pages=data_pages)

    def _lost(self, error: LinkError) -> None:
        if isinstance(error, Fenced):
            self._fenced.tell(error, self.left_s(math.inf))
            self.ended = "fenced"
        link = self._link
        code = self._code_of(error)
        if link is not None:
            link.close()
            self._link = None
            self._backoff.lost(self._window.commits, code)
        self.metrics.set_connected(self.name, False)
        self._bell.ring()
        if self._backoff.is_final(code):
            raise error
        if link is not None and self._backoff.news.is_new(str(error)):
            log("link lost", level=logging.WARNING, name=self.name, reason=str(error))

    def _make_loop(self, duration_s: float | None) -> CheckpointLoop:
        assert self._sender is not None
        self._loop = CheckpointLoop(
            self._source,
            self._sender,
            self,
            interval_s=self._interval_s,
            duration_s=duration_s,
            max_pause_s=self._max_pause_s,
            on_capture=lambda epoch: self._phase("capture", epoch),
            on_copying=self._copying,
            on_paused=self._on_paused,
            stop=self._stop,
        )
        return self._loop

    def _count(self, taken: Taken) -> None:
        self.metrics.checkpoint(
            self.name,
            pause_s=taken.pause_s,
            steps_s=taken.steps_s,
            dirty_pages=taken.dirty_pages,
            raw_bytes=taken.sent.pages * PAGE_SIZE,
            encoded_bytes=taken.sent.stream_bytes,
            wire_bytes=self._link.take_wire_bytes() if self._link else 0,
        )
        self.metrics.changed(self.name, taken.dirty, self._source.memory.pages)
        self.metrics.captured(self.name, taken.capture, taken.capture_why)
        self.metrics.set_lag(self.name, self._window.lag)
        tracker = self._source.tracker
        if self.metrics.found(self.name, tracker.way, tracker.why, tracker.missed_pages):
            log("tracking had missed pages", level=logging.ERROR, name=self.name, reason=tracker.why)

    # Called by the checkpoint loop

    def write(self, buffers: list[Buffer]) -> None:
        """Send bytes of a checkpoint."""
        self._turn()
        link = self._link  # another thread may take it away
        if link is None or self._sender is None:
            raise LinkError("there is no link")
        if self._window.begin(self._sender.carried):
            self._phase("send", self._sender.next_epoch)
        self._check_time()
        link.write(buffers)

    def _copying(self) -> None:
        self._turn()
        self._check_time()
        self.check()
        if (copying := self.copying) is not None:
            self.metrics.set_copy_share(self.name, copying.share)

    def _check_time(self) -> None:
        if time.monotonic() >= self._until:
            size = self._source.memory.pages * PAGE_SIZE
            raise LinkError(f"the time was over in a checkpoint: memory of {size:,} bytes may need a longer timeout_s")

    def commit(self, sent: Sent) -> None:
        """Send the end of a checkpoint, and wait while the window is full: the interval stretches, memory use does not
        grow."""
        link = self._link
        if link is None or sent.position is None:
            raise LinkError("there is no link")
        self._window.written(sent)
        link.commit(sent.position, sent.before, sent.stream_bytes, sent.pages)
        self._window.commit_sent()
        if self._realtime:
            self._realtime.enter()
        self._phase("sent", sent.epoch)
        self._await_room()
        if self._placed is not None:
            self._look_where(self._placed)

    def _await_room(self, *, stoppable: bool = True) -> None:
        def is_over() -> bool:
            self.check()
            self._turn()
            return stoppable and self._stop is not None and self._stop.is_set

        self._window.await_room(is_over, lambda: self._until)

    # In a fleet

    def _facts(self) -> dict[str, Any]:
        """What a fleet is told of this primary."""
        found = self.metrics.status(self.name)
        committed = self.committed
        return {
            "term": self.term or 0,
            "epoch": -1 if committed is None else committed.epoch,
            "lag": self._window.lag,
            "committed_at": float(found.get("last_commit_at") or 0.0),
            "is_linked": self._link is not None,
        }

    def _code_of(self, error: Exception) -> str | None:
        """The code of a backup's refusal; None if it was none, or if another backup may not refuse."""
        if not isinstance(error, Refused):
            return None
        return None if self._placed is not None and self._placed.failed(error.code) else error.code

    def _find(self, placed: Placed) -> Connection:
        connection = placed.connect(self.left_s(_CONNECT_S), self.term)
        if placed.is_at_holder:
            self._let_left_go(None)  # a backup has one link of a primary
        if self.term is None:
            self.term = placed.term
        return connection

    def acknowledge(self, ack: Ack, *, at: str | None) -> None:
        """Take in an acknowledgement. at: the backup that sends it, in a fleet

        What the fleet does not know to be there would be lost in a takeover elsewhere.
        """
        if self._placed is not None and at != self._placed.target:
            return  # of the backup that is being left, where all was committed before; it says nothing of the other
        if LEVELS.index(ack.level) >= LEVELS.index(self._wait) and self._window.knows(ack.position):
            self._confirm()
        self._window.acknowledge(ack)

    def _confirm(self) -> None:
        if self._placed is not None:
            assert self.term is not None
            self._placed.confirm(self.term)

    def _rewind(self, sender: Sender, held: Position) -> bool:
        """Bring the sender back to what the backup holds; False if that is nothing the sender has sent."""
        if self._window.knows(held):
            self._confirm()
            if self._commits is not None:
                self._commits.settle(held, time.monotonic() + self.left_s(_LAST_COMMIT_S))
        return self._window.rewind(sender, held)

    def _look_where(self, placed: Placed) -> None:
        """Between two checkpoints: leave a backup that is to be left, and let go of one that has been."""
        if self._left is not None and placed.is_certain:
            self._let_left_go("moved")
        elif self._left is None and placed.wants_to_leave:
            try:
                self.drain(self.left_s(_LAST_COMMIT_S))
            except LinkError:
                self.check()
                return  # it is slow: after a later checkpoint, then
            # The link stays, and its heartbeats: this backup waits, and can still take over, until another has it all.
            self._left, self._link = self._link, None
            raise LinkError("this backup is being left for another")

    def _let_left_go(self, goodbye: str | None) -> None:
        left, self._left = self._left, None
        if left is not None:
            left.close(goodbye)

    # Called by the checkpoint loop, too

    def fds(self) -> Sequence[int]:
        """Descriptors that become readable when the link is lost."""
        link = self._link
        return () if link is None or (fd := link.failed.fileno()) < 0 else (fd,)

    def check(self) -> None:
        """Raise the error that ended the link, if one did."""
        if (link := self._link) is not None:
            self._fenced.watch(link.check if self._commits is None else lambda: self._check_both(link))

    def _logged(self, position: Position) -> None:
        self._window.logged(position)

    def _check_both(self, link: Link) -> None:
        self._check_log()
        link.check()

    def _check_fenced(self) -> None:
        self._fenced.check()
        self._check_log()

    def _check_log(self) -> None:
        """Raise Fenced if the commit log says that another side acts."""
        if self._commits is not None:
            self._commits.check()
