"""The primary: protects one source. The user's calls are here; what they set in motion is in

    stream.py    what is sent, where each session takes it up, and what of it is committed
    linking.py   the link, and how it is replaced
    sending.py   checkpoints on their way from the loop to the link
    alone.py     the primary outside a fleet, and without a commit log

An interrupt may end a call anywhere. The next one that finds a half-sent checkpoint takes the link down, and the next
session settles what the backup holds (window.py). Nothing here holds a lock that an interrupt could leave held
(turns.py).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, Refused
from remus_ckpt.fleet.engine import Log
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.loop import NOT_COPYING, Copying, StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.pause import MAX_PAUSE_S
from remus_ckpt.sender import Sender
from remus_ckpt.service.alone import OneBackup
from remus_ckpt.service.fenced import OnFenced
from remus_ckpt.service.linking import Linking
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.release import Committed
from remus_ckpt.service.sending import Sending
from remus_ckpt.service.stream import LAST_COMMIT_S, Stream
from remus_ckpt.service.turns import Bell, Deadline, Turns, deadline_in
from remus_ckpt.session.messages import Level
from remus_ckpt.source import Source
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

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
        self._placed = placed or OneBackup(connect)
        self._duration_s = duration_s
        self.metrics = metrics or Metrics()
        self._fenced = OnFenced(name, on_fenced, self.metrics)
        self._turns = Turns("checkpoint()")
        self._bell = Bell()  # rung when the link or the contents of the window change
        self._deadline = Deadline()  # of the call that is under way; other threads move it too
        on_turn = on_turn or (lambda: None)
        self._stream = Stream(
            name,
            source,
            self._placed,
            codec=codec,
            word=word,
            digest=digest,
            window=window,
            wait=wait,
            term=term,
            commit_log=commit_log,
            on_commit=on_commit,
            most_unreleased=_MAX_UNRELEASED,
            on_ended=self.hang_up,
            left_s=self.left_s,
            realtime=realtime,
            bell=self._bell,
            metrics=self.metrics,
        )
        self._window, self._commits = self._stream.window, self._stream.commits
        self._linking = Linking(
            name,
            self._stream,
            self._placed,
            self._fenced,
            stopper=source.stopper,
            stop=stop,
            deadline=self._deadline,
            compression=compression,
            status=self.status,
            on_turn=on_turn,
            realtime=realtime,
            bell=self._bell,
            metrics=self.metrics,
        )
        self._sending = Sending(
            name,
            source,
            self._stream,
            self._linking,
            deadline=self._deadline,
            interval_s=interval_s,
            max_pause_s=max_pause_s,
            on_paused=on_paused,
            on_phase=on_phase,
            on_turn=on_turn,
            realtime=realtime,
            stop=stop,
            metrics=self.metrics,
        )
        # Set in one step by the thread that takes checkpoints, and read by others.
        self.ended = ""
        """Why `run` has ended."""
        self._has_run = False
        self._placed.announce(self._facts)

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
        return self._linking.count

    @property
    def is_running(self) -> bool:
        """Whether `run` is active and replaces a lost link."""
        return self._linking.is_running

    @property
    def term(self) -> int | None:
        """The term in force, None if it is not known yet."""
        return self._stream.term

    @property
    def address(self) -> str | None:
        """Of the backup that the fleet has chosen; None outside a fleet. Raises LinkError if none was yet."""
        return self._placed.address

    def dial(self) -> Connection:
        """Another connection to the backup, with its handshake done. Raises LinkError."""
        return self._connect()

    @property
    def copying(self) -> Copying | None:
        """How far a first copy has got, None while there is none."""
        return self._sending.copying

    @property
    def sender(self) -> Sender | None:
        """What the last checkpoints were sent with. To be looked at between two of them."""
        return self._stream.sender

    @property
    def _link(self) -> Link | None:
        return self._linking.link

    # The user's calls

    def between(self, work: Callable[[], None], timeout_s: float) -> None:
        """Do something while no call takes a checkpoint. Raises like `checkpoint` if its turn does not come."""
        self._check_process()
        self._linking.check_open()
        self._turns.take(work, timeout_s)

    def connect(self, timeout_s: float) -> None:
        """Connect now. Raises LinkError, with the reason, if the time runs out or another try would not help."""
        self._check_process()
        deadline = deadline_in(timeout_s)

        def connect() -> None:
            self._deadline.at = deadline
            try:
                self._have_link(deadline)
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
        self._deadline.at = math.inf
        self._linking.is_running = self._has_run = True
        return self._run_on()

    def _run_on(self) -> Iterator[Taken]:
        try:
            yield from self._sessions()
        finally:
            self._linking.is_running = False
            self._bell.ring()

    def _sessions(self) -> Iterator[Taken]:
        end = None if self._duration_s is None else time.monotonic() + self._duration_s
        while not self.ended:
            try:
                self._have_link(None, end)
                if self.ended:
                    return
                loop = self._sending.loop(None if end is None else max(end - time.monotonic(), 0.0))
                for taken in loop.run():
                    self._leave_if_due()
                    self._sending.count(taken)
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
        self._deadline.at = deadline
        epoch = None
        lost: LinkError | None = None
        try:
            while True:
                try:
                    self._have_link(deadline)
                    if epoch is None or not self._window.has_committed(epoch):
                        self._sending.await_room(stoppable=False)  # an earlier call may have given up on it
                        taken = self._sending.take()
                        self._leave_if_due()
                        self._sending.count(taken)
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
                    if time.monotonic() + self._linking.wait_s > deadline:
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
            self.drain(self.left_s(max(2 * link.welcome.lease_s, LAST_COMMIT_S)))
        except LinkError as error:
            if isinstance(error, Refused):
                raise
            link.check()
            log("ended before all was committed", level=logging.WARNING, name=self.name, lag=self._window.lag)

    def hurry(self, timeout_s: float) -> None:
        """From another thread: give the current call no more than that much time."""
        self._deadline.at = time.monotonic() + timeout_s

    def hang_up(self) -> None:
        """From another thread: break the link, so that nothing waits for the backup."""
        self._linking.hang_up()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the session in an orderly way; what is not committed stays uncommitted. No effect in a forked child.

        timeout_s: for the goodbye, and for on_commit to take the last commits
        Raises RemusError if on_commit has not returned by then.
        """
        if self._pid != os.getpid():
            return
        deadline = deadline_in(timeout_s)
        self.hurry(timeout_s / 2)  # a backup that never hangs up must leave half to on_commit
        try:
            self._linking.close(self.ended or "closed")
        finally:
            self._commits.close()
            self._placed.close()
            self._window.close(deadline - time.monotonic())

    def left_s(self, seconds: float) -> float:
        """How many of these seconds the current call may still use."""
        return self._deadline.left_s(seconds)

    def check(self) -> None:
        """Raise the error that ended the link, if one did."""
        self._linking.check()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(
                f"{self.name!r} is protected by process {self._pid}, not by its fork {os.getpid()}: "
                "to protect the fork's memory, protect it anew under another name"
            )

    def status(self) -> dict[str, Any]:
        """The status of this side, for the backup and for users."""
        sender, link = self.sender, self._link
        newest, committed = sender.position if sender else None, self.committed
        return (
            self.metrics.status(self.name)
            | {
                "term": self.term,
                "epoch": newest.epoch if newest else None,
                "committed_epoch": committed.epoch if committed else None,
                "committed_position": f"{committed.epoch}:{committed.digest.hex()}" if committed else None,
                "lag_checkpoints": self._window.lag,
                "memory_bytes": self._source.memory.pages * PAGE_SIZE,
                "compression": link.compression if link else None,
                "compression_why": link.compression_why if link else "",
                "log_trouble": self._commits.trouble,
                "log_append_s": self._commits.append_s,
            }
            | self._source.status()
            | (NOT_COPYING if (copying := self.copying) is None else copying.status(time.monotonic()))
        )

    def _facts(self) -> dict[str, Any]:
        """What a fleet is told of this primary."""
        found = self.metrics.status(self.name)
        committed = self.committed
        return {
            "term": self.term or 0,
            "epoch": -1 if committed is None else committed.epoch,
            "lag": self._window.lag,
            "committed_at": float(found.get("last_commit_at") or 0.0),
            "is_linked": self.is_linked,
        }

    # The link

    def _have_link(self, deadline: float | None, end: float | None = None) -> None:
        """Have a link over which a checkpoint can be sent, unless there is a reason to end.

        deadline, end: as for `Linking.connect`
        """
        self._fenced.check()
        self._commits.check()
        if self._link is not None and self._stream.is_torn:
            self._lost(LinkError("a checkpoint broke off"))
        if not self.ended:
            self.ended = self._linking.connect(deadline, end)

    def _lost(self, error: LinkError) -> None:
        if isinstance(error, Fenced):
            self._fenced.tell(error, self.left_s(math.inf))
            self.ended = "fenced"
        self._linking.lost(error)

    def _leave_if_due(self) -> None:
        """Between two checkpoints: leave this backup for another, once it has all that was sent."""
        if not self._linking.look_where():
            return
        try:
            self.drain(self.left_s(LAST_COMMIT_S))
        except LinkError:
            self.check()
            return  # it is slow: after a later checkpoint, then
        self._linking.leave()
        raise LinkError("this backup is being left for another")
