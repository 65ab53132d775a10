"""What one name has on disk, and how much of that is certain: store.json, term and role, the newest checkpoint.

Decisions rest on what a restart would read. An orderly change, such as a goodbye, is in force at once: if it cannot be
written yet, it is owed, and written as soon as the disk allows (specs/failover.md §4.1).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from remus_ckpt.disk import is_full
from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.attempts import Attempts, Base
from remus_ckpt.store import HistoryWriter, PeerIdentity, State, Torn, WarmCopyDamaged

SETTLE_S = 10.0
"""How long to wait, at most, for another thread that is changing store.json."""


Fault = Literal["failing", "full"]
"""What keeps a store from storing: it fails, or the disk or the quota is full."""


def fault_of(error: BaseException) -> Fault:
    """The fault that an error tells of."""
    return "full" if is_full(error) else "failing"


class Refusal(RemusError):
    """Why a primary is sent away; the primary is told. code: specs/session.md §7"""

    def __init__(self, code: str, message: str, term: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.term = term


class Durable:
    """The history of one name, and who may change its store.json.

    lock: the lock of the name; guards all fields except those of `writer`. No thread waits for a disk while holding it,
    so it is never held during a write.
    wake: called when the store has to be reopened

    Any thread may enter `settling`; only the thread inside it may call `write`, or change store.json in another way.
    Any thread may call the rest, with or without the lock.
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
        self._trouble: str | None = None
        self._trouble_since: float | None = None
        self.write_trouble: str | None = None
        """Why store.json cannot be written; None once a write succeeds."""
        self._write_since: float | None = None
        self._write_fault: Fault | None = None
        self.checkpoint_fault: Fault | None = None
        """Why checkpoints cannot be stored; None once one is."""
        self._is_short = False  # `trouble` is that there is no room for a full copy, before any of it has come
        self.is_uncertain = False
        """A loss of power may undo what store.json says: nothing is built on it until store.json is rewritten."""
        self.broken: str | None = None
        """Why the store has to be closed and reopened; None if it need not."""
        self._owed: dict[str, Any] = {}  # in force, but not yet written to store.json
        for warning in writer.warnings:
            log("store damaged", level=logging.ERROR, name=name, reason=warning)
        self._warm_told: str | None = None  # why the warm copy is on disk, as last reported in the log
        self._tell_warm()
        metrics.watch_store(name, writer.directory)
        self._told: tuple[int, str] = (self.state.term, str(self.state.role))  # as last reported in metrics and log
        metrics.set_promoted(name, self.state.role == "promoted")

    @property
    def trouble(self) -> str | None:
        """What last went wrong with the name on this side; None once all is well again."""
        return self._trouble

    @trouble.setter
    def trouble(self, text: str | None) -> None:
        if text is None:
            self._trouble_since = None
        elif self._trouble_since is None:
            self._trouble_since = time.time()
        self._trouble = text

    def status(self) -> dict[str, Any]:
        """trouble: what is wrong on this side, None if all is well; trouble_since: Unix time
        store_fault: why nothing can be stored, None if it can
        warm_on_disk: why the warm copy is not in memory, None if it is, or should not be
        """
        is_writing = self.write_trouble is not None
        return {
            "trouble": self.write_trouble if is_writing else self._trouble,
            "trouble_since": self._write_since if is_writing else self._trouble_since,
            "store_fault": self._write_fault or self.checkpoint_fault,
            "warm_on_disk": self.writer.warm_on_disk,
        }

    def note_stored(self) -> None:
        """A checkpoint has been stored: whatever was wrong is over."""
        if self.checkpoint_fault is not None:
            log("store takes checkpoints again", name=self.name, epoch=self.epoch)
        self.trouble, self.checkpoint_fault, self._is_short = None, None, False
        self._tell_warm()

    def _tell_warm(self) -> None:
        """Report where the warm copy is, if that has changed."""
        reason = self.writer.warm_on_disk
        if reason != self._warm_told:
            self._warm_told = reason
            if reason is None:
                log("warm copy in memory again", name=self.name)
            else:
                log("warm copy on disk", level=logging.WARNING, name=self.name, reason=reason)

    def check_room(self, attempts: Attempts, base: Base) -> None:
        """Raises Refusal if a full copy cannot fit, or if it was tried in vain a moment ago; StoreError."""
        if self.writer.position != base.held:
            return  # it has been stored since
        room = self.writer.room_for_base(base.memory_bytes if base.data_bytes is None else base.data_bytes)
        if (reason := attempts.why_not(room, time.monotonic())) is not None:
            if self.checkpoint_fault is None:
                self._is_short, self.checkpoint_fault = True, "full"
            if self._is_short:
                self.trouble = reason
            raise Refusal("store", reason)
        if self._is_short:
            self._is_short, self.checkpoint_fault, self.trouble = False, None, None

    # What is in force

    @property
    def state(self) -> State:
        """What a restart would read, with the owed changes applied."""
        state = self.writer.state
        return replace(state, more={**state.more, **self._owed}) if self._owed else state

    def known_state(self) -> State:
        """The state in force, which also survives a loss of power. Raises StoreError while that is uncertain."""
        if self.is_uncertain:
            raise StoreError(f"what the store of {self.name!r} says is not certain: {self.write_trouble}")
        return self.state

    @property
    def peer(self) -> PeerIdentity | None:
        """The primary that was let in last; None if there was none, or only an older program let it in."""
        peer = self.state.more.get("peer")
        return None if peer is None else PeerIdentity.from_json(peer)

    @property
    def epoch(self) -> int | None:
        """The epoch of the newest committed checkpoint."""
        return None if self.writer.position is None else self.writer.position.epoch

    @property
    def whole_position(self) -> str | None:
        """The newest committed checkpoint's epoch and full digest."""
        position = self.writer.position
        return None if position is None else f"{position.epoch}:{position.digest.hex()}"

    # Changing store.json

    @contextmanager
    def settling(self, timeout_s: float = SETTLE_S) -> Iterator[None]:
        """Hold the right to change store.json. Raises Refusal if another thread does not finish in time."""
        if not self._settle_lock.acquire(timeout=timeout_s):
            raise Refusal("busy", f"the store of {self.name!r} is busy, or its disk hangs: try again")
        try:
            yield
        finally:
            self._settle_lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever this block writes to store.json is durable when the block ends. After an error, a loss of power
        could leave the old or the new state: `is_uncertain` holds until a write succeeds."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self.is_uncertain = True
                is_new, self.write_trouble = self.write_trouble != str(error), str(error)
                self._write_since = self._write_since or time.time()
                self._write_fault = fault_of(error)
                self.note_broken(error)
                self._lock.notify_all()
            if is_new:
                self._metrics.store_failed(self.name)
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
            if isinstance(error, RemusError):
                raise
            raise StoreError(f"{self.writer.directory}: {type(error).__name__}: {error}") from error
        with self._lock:
            self.is_uncertain, self.write_trouble, self._write_since, self._write_fault = False, None, None, None

    def write(self, *, always: bool = False, **changes: Any) -> None:
        """Change store.json, and write what is owed. Durable when this returns; raises StoreError.

        always: write even if nothing changes, to see whether the disk accepts it
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
        """Put changes in force now; `pay` writes them."""
        with self._lock:
            self._owed |= changes

    @property
    def is_owing(self) -> bool:
        """Whether a change is in force that has not been written yet."""
        return bool(self._owed)

    def pay(self, timeout_s: float = SETTLE_S) -> bool:
        """Write what is owed, if that is possible now; returns whether it was."""
        try:
            with self.settling(timeout_s):
                if self._owed or self.is_uncertain:
                    self.write(always=True)
        except RemusError:
            return False
        return True

    # The end

    def note_broken(self, error: BaseException) -> None:
        """If this error means that the store has to be reopened, note that."""
        if self.broken is None and (isinstance(error, WarmCopyDamaged | Torn) or not isinstance(error, RemusError)):
            self.broken = str(error) if isinstance(error, RemusError) else f"{type(error).__name__}: {error}"
            self._wake()

    def close(self) -> None:
        """Write what is owed if that is possible, and release the history. May wait for its disk."""
        try:
            self.pay()
            self.writer.close()
        except Exception as error:
            log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
