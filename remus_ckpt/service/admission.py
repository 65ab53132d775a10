"""Who may write to one name: one primary at a time, none from before a takeover, and none while a fence is running.

`failover.admit` compares the terms. This module sees to everything else that must hold before a primary is let in, and
has the answer on disk before the primary gets it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from remus_ckpt.errors import LogError, Malformed, RemusError, StoreError
from remus_ckpt.fleet.claims import Claims
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service import failover
from remus_ckpt.service.attempts import Attempts
from remus_ckpt.service.durable import Durable, Refusal
from remus_ckpt.service.failover import Accepted, FencedOff, Role
from remus_ckpt.service.takeover import Takeover
from remus_ckpt.session.messages import Hello
from remus_ckpt.store import PeerIdentity, State

_LEAVE_S = 10.0
"""Maximum wait for a session or a fence that must end first."""
_MAX_TERM = 1 << 62
"""So that there is always a higher one."""


class Visitor(Protocol):
    """A primary's session."""

    run_id: bytes
    status: dict[str, Any]

    @property
    def heard(self) -> float:
        """When the primary was last known to be alive."""

    @property
    def identity(self) -> PeerIdentity:
        """Who the primary is."""

    def end(self, code: str, message: str, term: int | None = None) -> None:
        """Tell the primary that the session is over, and why; the session's thread ends."""


class Admission:
    """Lets primaries in, and sends them away.

    lock: the lock of the name; guards all fields
    lease_s: a visitor that has been silent for longer is gone
    claims: the commit log, as far as it concerns this name; None without one
    is_wanted: whether a user waits for a takeover; called with the lock held
    on_seated: called as a primary is let in, with the lock held
    wake: called when a decision may have changed

    The thread of a session calls `let_in`; any thread may call `dismiss`. The rest needs the lock.
    """

    def __init__(
        self,
        durable: Durable,
        takeover: Takeover,
        metrics: Metrics,
        lock: threading.Condition,
        *,
        lease_s: float,
        claims: Claims | None,
        is_wanted: Callable[[], bool],
        on_seated: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self._name = durable.name
        self._durable = durable
        self._takeover = takeover
        self._metrics = metrics
        self._lock = lock
        self._lease_s = lease_s
        self._claims = claims
        self._is_wanted = is_wanted
        self._on_seated = on_seated
        self._wake = wake
        self.visitor: Visitor | None = None
        """The primary that is in."""
        self._heard: float | None = None  # in past sessions; an open session has its own
        self.is_closed = False
        """Nobody is let in any more."""

    @property
    def last_heard(self) -> float | None:
        """When a primary was last known to be alive, None if none ever was."""
        heard = [at for at in (self._heard, self.visitor.heard if self.visitor else None) if at is not None]
        return max(heard, default=None)

    def left(self, visitor: Visitor) -> None:
        """The session of the primary that was in is over."""
        self._heard = max(self._heard or 0.0, visitor.heard)
        self.visitor = None
        self._lock.notify_all()

    def let_in(self, visitor: Visitor, hello: Hello, attempts: Attempts) -> int:
        """Make a primary the visitor; returns the term under which it is let in. attempts: of those that were refused

        Raises Refusal if it may not write, StoreError.
        """
        if hello.term is not None and hello.term > _MAX_TERM:
            raise Refusal("limit", f"term {hello.term} is beyond all takeovers; a term is at most {_MAX_TERM}")
        with self._durable.settling():
            if self._durable.is_uncertain:
                self._durable.write(always=True)
            state = self._durable.known_state()
            with self._lock:
                self._check_open()
                current = self.visitor
                # Either the same primary has reconnected before we noticed the loss, or the old one is gone.
                is_over = current is not None and (
                    current.run_id == hello.run or time.monotonic() - current.heard > self._lease_s
                )
            is_busy = current is not None and not is_over
            match failover.admit(state.term, Role(state.role), hello.term, is_busy):
                case FencedOff(term):
                    self._metrics.fence(self._name)
                    raise Refusal("fenced", self._why_fenced(term, state), term)
                case failover.Busy():
                    assert current is not None
                    other = current.identity.text
                    raise Refusal("busy", f"{self._name!r} is being protected by another primary, {other}")
                case Accepted(term):
                    self._check_log(hello)
                    self._await_fence()
                    if (base := attempts.base) is not None and base.run == hello.run:
                        # A primary cannot continue from a full copy that it has not ended.
                        self._durable.check_room(attempts, base)
                    if current is not None and is_over:
                        self._end(current, "busy", "another connection has taken the place of this one")
                    elif current is not None:
                        # "fenced" is final: the term must be durable before a primary is told.
                        self._durable.write(term=term)
                        self._end(current, "fenced", f"a primary of term {term} has come", term)
                    self._seat(visitor, term, state, hello.log)
            return term

    def _why_fenced(self, term: int, state: State) -> str:
        if state.role == "promoted":
            return (
                f"{self._name!r} has been taken over under term {term}: stop, and release nothing that was held back. "
                f"To protect the side that took over, give it --term {term + 1} or higher"
            )
        return f"{self._name!r} is protected under term {term}, and this primary is of an older one: stop"

    def _check_log(self, hello: Hello) -> None:
        """Raises Refusal unless the primary commits to the log that is used here, and the log has no takeover of ours
        that is not known here."""
        if self._claims is None:
            return
        try:
            identity = self._claims.identity
            if self._takeover.is_in_doubt:
                self._takeover.resolve()
        except (LogError, Malformed) as error:
            raise Refusal("busy", f"whether {self._name!r} has been taken over is not known: {error}") from error
        if hello.log != identity:
            other = "no commit log" if hello.log is None else "another commit log"
            raise Refusal("log", f"commits of {self._name!r} go to {other}: start its primary with --log as here")
        with self._lock:
            is_taken = self._takeover.claimed is not None
        if is_taken:
            self._wake()
            raise Refusal("busy", f"{self._name!r} is being taken over")

    def _seat(self, visitor: Visitor, term: int, before: State, log_used: str | None) -> None:
        """Make a primary the visitor, durably. before: the state in force until now; log_used: its commit log

        Raises RemusError. If the term is still the same, the primary to fence is then the one before: that is written
        before a fence starts.
        """
        try:
            # The fence must know whom to stop, also after a restart: the identity is durable before the first commit.
            logged: dict[str, Any] = {"log": log_used} if self._claims is not None or "log" in before.more else {}
            self._durable.write(
                term=term,
                role="standby",
                expects_primary=True,
                takeover_done=False,
                peer=asdict(visitor.identity),
                **logged,
            )
            with self._lock:
                self._check_open()
                # A user may have asked for a takeover during the disk write. If the store was promoted already, the
                # request was for what this primary continues from, not for this primary's end.
                if before.role != "promoted":
                    self._check_unwanted()
                self._on_seated()
                self._takeover.begin_term()
                self.visitor = visitor
                self._heard = time.monotonic()
                self._lock.notify_all()
        except RemusError:
            if self._durable.state.term == before.term:
                self._durable.owe(peer=before.more.get("peer"))
            raise

    def _check_open(self) -> None:
        if self._durable.broken is not None:
            raise StoreError(f"the store of {self._name!r} has to be opened anew: {self._durable.broken}")
        if self.is_closed:
            raise Refusal("shutdown", "the backup is being stopped")

    def _check_unwanted(self) -> None:
        """Raises Refusal if a user waits for a takeover. Needs the lock."""
        if self._is_wanted():
            raise Refusal("busy", f"{self._name!r} is being taken over")

    def _await_fence(self) -> None:
        """Before a primary that has reappeared is let in: wait until a fence that was to stop it is dead.

        Raises Refusal if the fence does not die, or if a user has asked for the takeover.
        """
        with self._lock:
            self._heard = time.monotonic()  # it is alive, whatever we answer next
            self._check_unwanted()
            self._takeover.end_vain_fence(self._heard)
            if not self._lock.wait_for(lambda: not self._takeover.is_fencing, self._bound_s):
                raise Refusal("busy", f"a fencing command against {self._name!r} has not ended yet: try again")

    @property
    def _bound_s(self) -> float:
        return min(self._lease_s, _LEAVE_S)

    def _end(self, visitor: Visitor, code: str, message: str, term: int | None = None) -> None:
        """End the open session. Raises Refusal if its thread does not return from the disk."""
        visitor.end(code, message, term)
        with self._lock:
            if not self._lock.wait_for(lambda: self.visitor is not visitor, self._bound_s):
                raise Refusal("busy", f"the session of {visitor.identity.text} has not ended yet: try again")

    def dismiss(self, code: str, message: str) -> None:
        """End whichever session is open, for a caller that keeps others from being let in meanwhile."""
        if (visitor := self.visitor) is not None:
            self._end(visitor, code, message)
