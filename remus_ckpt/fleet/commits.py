"""A primary's side of the commit log: which checkpoints on its backup are also in the log."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable

from remus_ckpt.errors import Fenced, LinkError, LogError, Overtaken, RemusError
from remus_ckpt.fleet.decisions import Ended, Last, commit
from remus_ckpt.fleet.engine import APPEND_S, Log
from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.observe.log import News, log
from remus_ckpt.service.turns import Bell
from remus_ckpt.wire.record import Position

_TRY_S = 5.0
_PAUSE_S = 0.2


def last_of(commit_log: Log, name: str) -> Last:
    """The last record of a name. Raises LogError, and Malformed if it is not one of ours."""
    entry = commit_log.last(name)
    return Last() if entry is None else Last(entry.sequence, Record.unpack(entry.data))


class Commits:
    """Appends a record for the newest checkpoint that the backup holds; one record covers all before it.

    run: of the primary, 16 bytes
    on_logged: called with a position once the log has it, in the thread that appends
    on_ended: called once, in that thread, when the log says that another side acts; `check` then raises Fenced

    The thread that takes checkpoints calls `begin_run`, `begin`, `look`, `settle` and `forget`; the listening thread
    calls `put`; any thread may call the rest. No lock is held that an interrupt could leave held (turns.py).
    """

    def __init__(
        self,
        commit_log: Log,
        name: str,
        run: bytes,
        *,
        on_logged: Callable[[Position], None],
        on_ended: Callable[[], None],
    ) -> None:
        self._log = commit_log
        self._name = name
        self._writer = run
        self._on_logged = on_logged
        self._on_ended = on_ended
        self._bell = Bell()
        self._news = News()
        self._thread: threading.Thread | None = None
        # Set by the thread that takes checkpoints, before the other thread is started.
        self._term = 0
        self._since: int | None = None
        # Each is set in one step by one side, and read by the other.
        self._where = ""
        self._wanted: Position | None = None
        self._is_closed = False
        # Owned by the thread that appends.
        self._last = Last()
        self._logged: Position | None = None
        self._ended: Fenced | None = None
        self.trouble: str | None = None
        """Why the log accepts nothing now; None while it does."""
        self.append_s: float | None = None
        """How long the last append took."""

    @property
    def identity(self) -> str:
        """Which log this is. Raises LinkError while that is unknown."""
        try:
            return self._log.identity
        except LogError as error:
            raise LinkError(str(error)) from error

    def begin_run(self) -> None:
        """Before the first hello: note what the log holds now. Raises LinkError if it does not answer."""
        if self._since is None:
            self._since = self._read().sequence

    def _read(self) -> Last:
        try:
            return last_of(self._log, self._name)
        except RemusError as error:
            raise LinkError(str(error)) from error

    def begin(self, term: int, where: str) -> None:
        """A session begins, after `begin_run`. where: the backup, for people

        Raises Fenced if another side acts, LinkError if the log does not answer.
        """
        self._where = where
        self.check()
        if self._thread is not None:
            return
        self._term = term
        self._last = self._read()
        if isinstance(found := self._decide(self._last), Ended):
            raise self._fenced(found.term)
        thread = threading.Thread(target=self._run, name="commit log", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads are allowed
            raise LinkError(f"cannot start a thread for the commit log: {error}") from error
        self._thread = thread

    def look(self) -> None:
        """Between two sessions: raise Fenced if the log says that another side acts."""
        try:
            last = last_of(self._log, self._name)
        except RemusError:
            return  # it is asked again, before the next session at the latest
        if isinstance(found := self._decide(last), Ended):
            raise self._fenced(found.term)

    def put(self, position: Position) -> None:
        """The backup holds this position: append it."""
        self._wanted = position
        self._bell.ring()

    def settle(self, position: Position, deadline: float) -> None:
        """Append this position, and wait until it is in the log. Raises Fenced, and LinkError if the time runs out."""
        self.put(position)
        if not self._bell.wait(lambda: self._logged == position or self._ended is not None, deadline):
            raise LinkError(self.trouble or "the commit log does not answer")
        self.check()

    def forget(self) -> None:
        """Do not append what was put, unless that has already happened."""
        self._wanted = None

    def check(self) -> None:
        """Raise Fenced if the log says that another side acts."""
        if self._ended is not None:
            raise self._fenced(self._ended.term)

    def close(self) -> None:
        """Append nothing more."""
        self._is_closed = True
        self._bell.ring()

    def _fenced(self, term: int) -> Fenced:
        return Fenced(
            f"according to the commit log, {self._name!r} belongs to another side under term {term}: stop, and "
            "release nothing that was held back",
            term=term,
        )

    def _decide(self, last: Last) -> object:
        assert self._since is not None
        return commit(last, term=self._term, run=self._writer, since=self._since)

    # The thread

    @property
    def _is_due(self) -> bool:
        wanted = self._wanted
        return wanted is not None and wanted != self._logged

    def _run(self) -> None:
        while not self._is_closed:
            if not self._bell.wait(lambda: self._is_due or self._is_closed, math.inf) or self._is_closed:
                return
            if (wanted := self._wanted) is None:
                continue
            try:
                self._append(wanted)
            except Fenced as error:
                self._ended = error
                self._bell.ring()
                self._on_ended()
                return
            except Exception as error:  # whatever it is, nothing is committed while it lasts
                self.trouble = str(error)
                if self._news.is_new(self.trouble):
                    log("commit log", level=logging.WARNING, name=self._name, reason=self.trouble)
                time.sleep(_PAUSE_S)

    def _append(self, position: Position) -> None:
        """Append a position. Raises Fenced, LogError, Malformed."""
        begin = time.monotonic()
        if isinstance(found := self._decide(self._last), Ended):
            raise self._fenced(found.term)
        record = Record(Kind.COMMIT, self._term, self._writer, position, self._where, time.time())
        key = secrets.token_hex(16)
        try:
            sequence = self._log.append(
                self._name, record.pack(), expected=self._last.sequence, key=key, timeout_s=min(_TRY_S, APPEND_S)
            )
            self._last = Last(sequence, record)
        except Overtaken:
            # By another side, or by a record of ours whose answer was lost.
            self._last = last_of(self._log, self._name)
            if isinstance(found := self._decide(self._last), Ended):
                raise self._fenced(found.term) from None
            if self._last.record is None or self._last.record.writer != self._writer:
                return
            position = self._last.record.position
        self.append_s = time.monotonic() - begin
        if self.trouble is not None:
            log("commit log takes records again", name=self._name)
            self.trouble = None
            self._news.clear()
        self._logged = position
        self._on_logged(position)
        self._bell.ring()
