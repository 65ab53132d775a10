"""The link of a primary: made, replaced when it is lost, and kept aside while one backup is left for another."""

from __future__ import annotations

import logging
import math
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from remus_ckpt.errors import LinkError, Refused, StreamError, UnknownFormat
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, flatten
from remus_ckpt.service.alone import OneBackup
from remus_ckpt.service.backoff import STRANGER, Backoff
from remus_ckpt.service.fenced import OnFenced
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.stream import Stream
from remus_ckpt.service.turns import Bell, Deadline
from remus_ckpt.source import Stopper

_LAST_LINK_S = 2.0
"""How long an ending primary tries to get a new link, so that what it has sent is committed."""
_CONNECT_S = 10.0
"""How long a try to connect may take."""


class Linking:
    """Makes the links of a primary, one at a time.

    stream: what goes over them; it begins each session
    placed: connects to the backup, and knows when to leave it for another
    fenced: called back before anybody is told of a takeover
    deadline: of the call that is under way
    status: what goes with each heartbeat
    bell: rung when the link has changed
    The rest is as for `Primary`.

    The thread that takes checkpoints makes and loses links. Any thread may call `check`, `hang_up` and `close`, which
    takes the link away, and read the attributes: each is set in one step.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        placed: Placed | OneBackup,
        fenced: OnFenced,
        *,
        stopper: Stopper,
        stop: StopSignal | None,
        deadline: Deadline,
        compression: str,
        status: Callable[[], dict[str, Any]],
        on_turn: Callable[[], None],
        realtime: Realtime | None,
        bell: Bell,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._stream = stream
        self._window = stream.window
        self._placed = placed
        self._commits = stream.commits
        self._fenced = fenced
        self._stopper = stopper
        self._stop = stop
        self._deadline = deadline
        self._compression = compression
        self._status = status
        self._turn = on_turn
        self._realtime = realtime
        self._bell = bell
        self._metrics = metrics
        self._backoff = Backoff()
        self.link: Link | None = None
        self.count = 0
        """How many links there have been."""
        self.is_running = False
        """Whether `Primary.run` is active, and a lost link is replaced until there is a reason to end."""
        self._left: Link | None = None  # to a backup that is being left: it has the name until another has all of it
        self._is_closed = False

    @property
    def wait_s(self) -> float:
        """How long to wait before the next try."""
        return self._backoff.seconds

    def check_open(self) -> None:
        """Raise ValueError after `close`."""
        if self._is_closed:
            raise ValueError(f"the protection of {self._name!r} has been closed")

    def check(self) -> None:
        """Raise the error that ended the link, if one did; Fenced if the commit log says that another side acts."""
        self._fenced.watch(self._check)

    def _check(self) -> None:
        if (link := self.link) is not None:
            self._commits.check()
            link.check()

    def hang_up(self) -> None:
        """Break the link, so that nothing waits for the backup."""
        if (link := self.link) is not None:
            link.hang_up()

    def close(self, goodbye: str) -> None:
        """Make no more links, and end the sessions in an orderly way."""
        # The flag is set before we look for a link, and connecting checks it after a link is made: whatever happens
        # meanwhile, one of the two sides closes that link.
        self._is_closed = True
        if self.link is not None:
            self.link.close(goodbye)
            self.link = None
        self._let_left_go(goodbye)

    # One link after another

    def connect(self, deadline: float | None, end: float | None = None) -> str:
        """Make a link if there is none, retrying with longer and longer pauses. Returns "" once there is one, or the
        reason to end.

        deadline: when to give up and raise the last error
        end: when to stop in any case, connected or not
        """
        has_failed = False
        while self.link is None:
            self.check_open()
            until = min((at for at in (deadline, end) if at is not None), default=math.inf)
            if (reason := self._reason_to_end) and self._gives_up():
                return reason
            left_s = min(self.wait_s, until - time.monotonic())
            if left_s > 0 and self._sleep(left_s):
                continue
            if end is not None and (has_failed or self.wait_s) and time.monotonic() >= end:
                return "duration"
            try:
                self._open()
                break
            except (LinkError, StreamError) as error:
                code = self._code_of(error)
                if isinstance(error, UnknownFormat) and not self.count:
                    code = STRANGER  # it has never been a backup
                self._backoff.failed(code)
                if self._backoff.is_final(code):
                    raise
                has_failed = True
                if self._backoff.news.is_new(str(error)):
                    log("no link; trying again", level=logging.WARNING, name=self._name, reason=str(error))
                if deadline is not None and time.monotonic() + self.wait_s > deadline:
                    if isinstance(error, LinkError):
                        raise
                    raise LinkError(str(error)) from error
        return ""

    def lost(self, error: LinkError) -> None:
        """The link has ended with this error, or is of no use any more. Raises it if another try would not help."""
        link = self.link
        code = self._code_of(error)
        if link is not None:
            link.close()
            self.link = None
            self._backoff.lost(self._window.commits, code)
        self._metrics.set_connected(self._name, False)
        self._bell.ring()
        if self._backoff.is_final(code):
            raise error
        if link is not None and self._backoff.news.is_new(str(error)):
            log("link lost", level=logging.WARNING, name=self._name, reason=str(error))

    def _code_of(self, error: Exception) -> str | None:
        """The code of a backup's refusal; None if it was none, or if another backup may not refuse."""
        return error.code if isinstance(error, Refused) and not self._placed.failed(error.code) else None

    @property
    def _reason_to_end(self) -> str:
        if not self.is_running:
            return ""  # a single checkpoint has its own deadline
        if self._stop is not None and self._stop.is_set:
            return "stopped"
        return "" if self._stopper.alive() else "source gone"

    def _gives_up(self) -> bool:
        """Whether to stop waiting for a link. At the end, only checkpoints already sent are worth a wait, and a short
        one."""
        if self._reason_to_end:
            if not self._window.lag and not self._stream.is_torn:
                return True
            self._deadline.at = min(self._deadline.at, time.monotonic() + _LAST_LINK_S)
        return self._deadline.is_over

    def _sleep(self, seconds: float) -> bool:
        """Sleep; return True as soon as there is a reason to end, but only the first time."""
        self._turn()
        poll = select.poll()
        if self.is_running and not self._reason_to_end:
            for fd in self._stopper.death_fds():
                poll.register(fd, select.POLLIN)
            if self._stop is not None:
                poll.register(self._stop, select.POLLIN)
        return bool(poll.poll(int(self._deadline.left_s(seconds) * 1000)))

    # One link

    def _open(self) -> None:
        self._commits.begin_run()
        log_used = self._commits.identity  # without it, nobody need be dialled
        connection: Connection | None = None
        link: Link | None = None
        try:
            connection = self._dial()
            if self._placed.is_at_holder:
                self._let_left_go(None)  # a backup has one link of a primary
            if self._stream.term is None:
                self._stream.term = self._placed.term
            link = Link(
                connection,
                self._stream.hello(log_used),
                on_ack=partial(self._stream.acknowledge, at=self._placed.target),
                status=lambda: flatten(self._status()),
                give_up=self._gives_up,
                left_s=self._deadline.left_s,
                compression=self._compression,
                on_listening=self._realtime.enter if self._realtime else lambda: None,
            )
            begin = self._stream.agree(link.welcome, link.peer)
            link.begin(begin)
            self.count += 1
            self._backoff.linked(link.welcome.lease_s, self._window.commits)
            self.link = link
            self.check_open()
        except BaseException:
            self.link = None
            if link is not None:
                link.close()
            elif connection is not None:
                connection.close()
            raise
        if self._compression not in ("auto", "none", *link.welcome.compressions):
            log("not compressed: one side has no such codec", level=logging.WARNING, codec=self._compression)
        self._metrics.set_connected(self._name, True)
        self._metrics.set_term(self._name, begin.term)
        if self.count > 1:
            self._metrics.reconnected(self._name)
        level = self._backoff.log_level
        log("linked", level=level, name=self._name, peer=link.peer, mode=begin.mode, term=begin.term)

    def _dial(self) -> Connection:
        try:
            return self._placed.connect(self._deadline.left_s(_CONNECT_S), self._stream.term)
        except LinkError:
            # A backup that has taken over may be gone since, and nobody else tells us.
            if self.count:
                self._commits.look()
            raise

    # From one backup to another

    def look_where(self) -> bool:
        """Between two checkpoints: let go of a backup that has been left; returns whether this one is to be left."""
        if self._left is None:
            return self._placed.wants_to_leave
        if self._placed.is_certain:
            self._let_left_go("moved")
        return False

    def leave(self) -> None:
        """Leave this backup, which has all that was sent. Its link stays, with its heartbeats: it waits, and can still
        take over, until another has it all."""
        self._left, self.link = self.link, None

    def _let_left_go(self, goodbye: str | None) -> None:
        left, self._left = self._left, None
        if left is not None:
            left.close(goodbye)
