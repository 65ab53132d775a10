"""What one name has on its disk, and what of that is certain: store.json, its term and role, the newest checkpoint.

Decisions rest on what a restart would read. What has been said in good order is in force at once: where it cannot be
written yet, it is owed, and written as soon as it can be (specs/failover.md §4.1).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.store import HistoryWriter, State, Torn, WarmCopyDamaged

SETTLE_S = 10.0
"""How long to wait, at most, for another thread that is changing store.json."""


class Refusal(RemusError):
    """Why a primary is sent away; it is told. code: specs/session.md §7"""

    def __init__(self, code: str, message: str, term: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.term = term


class Durable:
    """The history of one name, and who may change its store.json.

    lock: the lock of the name, which guards all fields that are not those of `writer`. Nobody waits for a disk with it
    held, so it is not held while anything here writes.
    wake: called when the store has to be opened anew

    `settling` may be entered by any thread; `write`, and what else changes store.json, by the one that is in it.
    The rest may be called by any thread, with the lock held or without.
    """

    def __init__(
        self, name: str, writer: HistoryWriter, metrics: Metrics, lock: threading.Condition, wake: Callable[[], None]
    ) -> None:
        self.name = name
        self.writer = writer
        self._metrics = metrics
        self._lock = lock
        self._wake = wake
        self._settle_lock = threading.Lock()
        self.trouble: str | None = None
        """What last went wrong with the name on this side, None since it went well."""
        self.write_trouble: str | None = None
        """Why store.json cannot be written, None since it could."""
        self.is_uncertain = False
        """What store.json says may be gone after a loss of power: nothing is built on it before it is written anew."""
        self.broken: str | None = None
        """Why the store has to be closed and opened anew, None where it has not."""
        self._owed: dict[str, Any] = {}  # what is in force and could not be written to store.json yet
        for warning in writer.warnings:
            log("store damaged", level=logging.ERROR, name=name, reason=warning)
        metrics.watch_store(name, writer.directory)
        self._told: tuple[int, str] = (self.state.term, str(self.state.role))  # what was last said in metrics and log
        metrics.set_promoted(name, self.state.role == "promoted")

    # What is in force

    @property
    def state(self) -> State:
        """What a restart would read, and what is owed to it."""
        state = self.writer.state
        return replace(state, more={**state.more, **self._owed}) if self._owed else state

    def known_state(self) -> State:
        """What is in force, and will be after a loss of power. Raises StoreError while nobody knows."""
        if self.is_uncertain:
            raise StoreError(f"what the store of {self.name!r} says is not certain: {self.write_trouble}")
        return self.state

    @property
    def epoch(self) -> int | None:
        """Of the newest committed checkpoint."""
        return None if self.writer.position is None else self.writer.position.epoch

    @property
    def whole_position(self) -> str | None:
        """Its epoch and the whole digest."""
        position = self.writer.position
        return None if position is None else f"{position.epoch}:{position.digest.hex()}"

    # Changing store.json

    @contextmanager
    def settling(self, timeout_s: float = SETTLE_S) -> Iterator[None]:
        """Nobody else changes store.json meanwhile. Raises Refusal if somebody else does not come to an end."""
        if not self._settle_lock.acquire(timeout=timeout_s):
            raise Refusal("busy", f"the store of {self.name!r} is busy, or its disk hangs: try again")
        try:
            yield
        finally:
            self._settle_lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written to store.json in this block is durable behind it. After an error nobody knows whether a
        loss of power would leave the old or the new: `is_uncertain` until it could be written."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self.is_uncertain = True
                is_new, self.write_trouble = self.write_trouble != str(error), str(error)
                self.note_broken(error)
                self._lock.notify_all()
            if is_new:
                self._metrics.store_failed(self.name)
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
            if isinstance(error, RemusError):
                raise
            raise StoreError(f"{self.writer.directory}: {type(error).__name__}: {error}") from error
        with self._lock:
            self.is_uncertain, self.write_trouble = False, None

    def write(self, *, always: bool = False, **changes: Any) -> None:
        """Change store.json, and pay what is owed to it. Durable when this returns; raises StoreError.

        always: even if that changes nothing, to see whether it can be written
        """
        with self._lock:
            owed = dict(self._owed)
            changes = owed | changes
            state = self.state
            known = {} if self.is_uncertain else {**state.more, "term": state.term, "role": state.role}
        if always or owed or any(key not in known or known[key] != value for key, value in changes.items()):
            with self.writing():
                self.writer.set_state(**changes)
        with self._lock:
            self._owed = {key: value for key, value in self._owed.items() if owed.get(key) != value}
        self._tell_role()

    def _tell_role(self) -> None:
        state = self.known_state()
        if (told := (state.term, str(state.role))) == self._told:
            return
        self._told = told
        self._metrics.set_term(self.name, state.term)
        self._metrics.set_promoted(self.name, state.role == "promoted")
        if state.role == "promoted":
            log("promoted", level=logging.WARNING, name=self.name, term=state.term, epoch=self.epoch)

    def owe(self, **changes: Any) -> None:
        """This is in force from now on; `pay` writes it."""
        with self._lock:
            self._owed |= changes

    @property
    def is_owing(self) -> bool:
        """Whether something is in force that could not be written yet."""
        return bool(self._owed)

    def pay(self, timeout_s: float = SETTLE_S) -> bool:
        """Write what is owed, if that is possible now; whether it was."""
        try:
            with self.settling(timeout_s):
                if self._owed or self.is_uncertain:
                    self.write(always=True)
        except RemusError:
            return False
        return True

    # The end

    def note_broken(self, error: BaseException) -> None:
        """Note that the store has to be opened anew, if this error is of that kind."""
        if self.broken is None and (isinstance(error, WarmCopyDamaged | Torn) or not isinstance(error, RemusError)):
            self.broken = str(error) if isinstance(error, RemusError) else f"{type(error).__name__}: {error}"
            self._wake()

    def close(self) -> None:
        """Pay what is owed if that is possible, and let go of the history. May wait for its disk."""
        try:
            self.pay()
            self.writer.close()
        except Exception as error:
            log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
