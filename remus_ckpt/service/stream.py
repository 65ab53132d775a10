"""The stream that a primary sends: where each session takes it up, and what of it is committed (specs/session.md §5).

A checkpoint is committed once the backup says that it holds it, the fleet knows that this backup has the name, and the
commit log has a record of it. It makes no difference whether the backup says so in an acknowledgement or in the welcome
of the next session.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from remus_ckpt.errors import LinkError
from remus_ckpt.fleet.commits import Commits
from remus_ckpt.fleet.engine import Log
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.sender import Sender
from remus_ckpt.service.alone import NoCommitLog, OneBackup
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.release import Committed
from remus_ckpt.service.turns import Bell
from remus_ckpt.service.window import Window
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import LEVELS, Ack, Begin, Hello, Level, StreamShape, Welcome
from remus_ckpt.source import Source
from remus_ckpt.version import __version__
from remus_ckpt.wire.digest import DIGESTS, DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec, Word

LAST_COMMIT_S = 10.0
"""Minimum time that an ending primary waits for commits over a working link."""


class Stream:
    """The checkpoints of one source, in all sessions.

    placed: knows which backup has the name
    most_unreleased: commits that may wait for on_commit; then checkpoints wait too
    on_ended: called when the commit log says that another side acts
    left_s: how many of the given seconds the current call may still use
    bell: rung when something has been committed
    The rest is as for `Primary`.

    The thread that takes checkpoints calls `hello` and `agree`, the thread of the link `acknowledge`. Any thread may
    read the attributes: each is set in one step.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        placed: Placed | OneBackup,
        *,
        codec: StreamCodec,
        word: Word,
        digest: DigestName,
        window: int,
        wait: Level,
        term: int | None,
        commit_log: Log | None,
        on_commit: Callable[[Committed], None] | None,
        most_unreleased: int,
        on_ended: Callable[[], None],
        left_s: Callable[[float], float],
        realtime: Realtime | None,
        bell: Bell,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._source = source
        self._placed = placed
        self._run = bytes.fromhex(placed.run)
        self._codec: StreamCodec = codec
        self._word: Word = word
        self._digests: tuple[DigestName, ...] = (digest, *(other for other in reversed(DIGESTS) if other != digest))
        self._wait: Level = wait
        self._left_s = left_s
        self._realtime = realtime
        self.commits: Commits | NoCommitLog = NoCommitLog()
        append = None
        if commit_log is not None:
            commits = Commits(commit_log, name, self._run, on_logged=self._logged, on_ended=on_ended)
            self.commits, append = commits, commits.put
        self.window = Window(
            name,
            size=window,
            wait=wait,
            on_commit=on_commit,
            most_unreleased=most_unreleased,
            bell=bell,
            metrics=metrics,
            append=append,
        )
        self.term = term
        """The term in force; None: the backup's term, unless the backup itself was promoted."""
        self.sender: Sender | None = None
        """What makes the checkpoints; another one after each full copy."""

    @property
    def is_torn(self) -> bool:
        """Whether half a checkpoint has been sent: only a new session can undo that."""
        return self.window.is_torn or (self.sender is not None and self.sender.unfinished)

    # A session begins

    def hello(self, log_used: str | None) -> Hello:
        """Who this side is, and what it has. log_used: the identity of its commit log"""
        return Hello(
            program=f"remus_ckpt {__version__}",
            role="primary",
            name=self._name,
            run=self._run,
            term=self.term,
            memory_pages=self._source.memory.pages,
            page_size=PAGE_SIZE,
            codec=self._codec,
            word=self._word,
            compressions=COMPRESSIONS,
            digests=self._digests,
            log=log_used,
        )

    def agree(self, welcome: Welcome, peer: str) -> Begin:
        """Continue with deltas if the sender can be brought back to what the backup holds; else start over.

        Raises Fenced if the backup or the commit log tells of another side, LinkError.
        """
        self.term = welcome.term
        log_used = self.commits.identity
        if log_used is not None and welcome.log != log_used:
            raise LinkError(f"{peer} does not use our commit log: start it with the same --log")
        self.commits.begin(welcome.term, peer)
        held = welcome.position
        if held is not None and self._continues(welcome, held):
            return Begin(mode="continue", term=welcome.term, position=held, wait=self._wait)
        newest = self._start_over(welcome)
        data_pages = self._source.data_pages()
        return Begin(mode="full", term=welcome.term, position=newest, wait=self._wait, data_pages=data_pages)

    def _continues(self, welcome: Welcome, held: Position) -> bool:
        """Bring the sender back to what the backup holds; False if that is nothing this sender has sent."""
        sender = self.sender
        shape = StreamShape(codec=self._codec, word=self._word, p2m_size=self._source.memory.pages)
        if sender is None or welcome.stream != shape:
            return False
        if sender.digest != "sha256" and welcome.digest is None:
            return False  # an older backup does not know the stream's digest
        if self.window.knows(held):
            self._confirm()
            self.commits.settle(held, time.monotonic() + self._left_s(LAST_COMMIT_S))
        return self.window.rewind(sender, held)

    def _start_over(self, welcome: Welcome) -> Position | None:
        """A new sender, which begins with a full copy; returns the position that the copy follows."""
        held, committed = welcome.position, self.window.committed
        known = [position for position in (committed, held) if position is not None]
        newest = max(known, key=lambda position: position.epoch, default=None)
        if held is not None and committed is not None and held.epoch < committed.epoch:
            text = "the backup has lost committed checkpoints"
            log(text, level=logging.ERROR, name=self._name, committed=str(committed), held=str(held))
        floor = -1 if welcome.highest_epoch is None else welcome.highest_epoch
        if newest is not None and newest.epoch < floor:
            newest = None  # later ones are lost; their numbers cannot be reused
        # Drop the sender before the tracker restarts: if this is interrupted, the next call gets here again.
        self.sender = None
        self.commits.forget()
        self.window.restart()
        if self._realtime:
            self._realtime.leave()  # a copy of all memory comes next
        self.sender = Sender(
            self._source.memory.pages,
            codec=self._codec,
            word=self._word,
            reference=self._source.tracker.restart(),
            position=newest,
            first_epoch=floor + 1,
            digest=next((name for name in self._digests if name == welcome.digest), "sha256"),
        )
        return newest

    # A checkpoint is held

    def acknowledge(self, ack: Ack, *, at: str) -> None:
        """Take in an acknowledgement. at: the backup that sends it, as `Placed` names it

        What the fleet does not know to be there would be lost in a takeover elsewhere.
        """
        if at != self._placed.target:
            return  # of the backup that is being left, where all was committed before; it says nothing of the other
        if LEVELS.index(ack.level) >= LEVELS.index(self._wait) and self.window.knows(ack.position):
            self._confirm()
        self.window.acknowledge(ack)

    def _confirm(self) -> None:
        assert self.term is not None
        self._placed.confirm(self.term)

    def _logged(self, position: Position) -> None:
        self.window.logged(position)
