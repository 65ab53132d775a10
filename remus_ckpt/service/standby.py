"""One protected memory on its backup: who may write to it now, and the way to its promotion.

What is to be done is decided in `failover`; here it is done, noted, and asked for again.

Two locks. `_changed` guards what is in memory; nobody waits for a disk, a peer or a command with it held. `_settling`
is held by the one thread that changes store.json; it comes first, and is never waited for without end. So a disk that
hangs stops what needs that disk, and nothing else: not the clock, not `status`, not other names.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from remus_ckpt.errors import LinkError, NoCheckpoint, RemusError, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, unflatten
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service import failover
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.service.failover import Accepted, ByHand, Command, FencedOff, Role, Situation
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import MAX_LEASE_S, MIN_LEASE_S, Hello, StreamShape, Welcome
from remus_ckpt.store import HistoryWriter, Retention, State, Torn, WarmCopyDamaged
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position

_RETRY_S = 1.0
_PROMOTION_S = 60.0
_LEAVE_S = 10.0
"""How long to wait, at most, for a session, a command or a write that must end first."""
TAKEOVER_S = 3600.0
"""A takeover command may have to read all of a large memory from a slow disk; what takes longer hangs."""
_MAX_TERM = 1 << 62
"""So that there is always a higher one."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a backup does with what it protects.

    lease_s: a primary that is silent for so long is gone
    automatic: take over then without being asked; `fence` must be there
    fence: a shell command that makes sure that the primary writes and releases nothing more; exit status 0 says so
    fence_timeout_s: one that takes longer is killed, with all that it started, and has failed
    on_failover: a shell command that starts the work here; it ends once the work goes on
    takeover_timeout_s: one that takes longer is killed, with all that it started, and is tried again
    retention: what is kept of the past
    names: that may be protected; None for any
    max_names, max_connections: how many there may be
    """

    lease_s: float = 5.0
    automatic: bool = False
    fence: str | None = None
    fence_timeout_s: float = 60.0
    on_failover: str | None = None
    takeover_timeout_s: float = TAKEOVER_S
    retention: Retention = field(default_factory=Retention)
    names: frozenset[str] | None = None
    max_names: int = 1000
    max_connections: int = 256

    def __post_init__(self) -> None:
        least, most = MIN_LEASE_S, MAX_LEASE_S
        if not least <= self.lease_s <= most:
            raise ValueError(f"a lease of {self.lease_s:g} s; it has {least:g} s to {most:g} s")
        if self.automatic and not self.fence:
            raise ValueError("automatic failover needs a fencing command: without one, two sides may go on at once")
        for what, timeout_s in (("fence", self.fence_timeout_s), ("takeover", self.takeover_timeout_s)):
            if not 0 < timeout_s <= threading.TIMEOUT_MAX:
                raise ValueError(f"a {what} command with {timeout_s:g} s to end in")


class Refusal(RemusError):
    """Why a visitor is sent away; it is told. code: specs/session.md §7"""

    def __init__(self, code: str, message: str, term: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.term = term


class _NotRun(RemusError):
    """A user's command that cannot be started."""


class Visitor(Protocol):
    """A primary's session."""

    run_id: bytes
    status: dict[str, Any]

    @property
    def heard(self) -> float:
        """When it was last known to be there."""

    @property
    def peer(self) -> str:
        """Its address and name."""

    def end(self, code: str, message: str, term: int | None = None) -> None:
        """Tell the primary that it is over, and why; its thread ends."""


class Standby:
    """Keeps the history of one name, and takes over.

    writer: of that history; closed with this
    wake: called when a decision may have changed
    """

    def __init__(
        self, name: str, writer: HistoryWriter, policy: Policy, metrics: Metrics, wake: Callable[[], None]
    ) -> None:
        self.name = name
        self.guests = 0
        """Primaries that are here, or wait to be let in; the backup counts them."""
        self._writer = writer
        self._policy = policy
        self._metrics = metrics
        self._wake = wake
        self._changed = threading.Condition()
        self._settle_lock = threading.Lock()
        self._visitor: Visitor | None = None
        self._last_peer = ""
        self.trouble: str | None = None
        """What last went wrong on this side, None since it went well."""
        self.broken: str | None = None
        """Why the store has to be closed and opened anew, None where it has not; the backup does it."""
        self._write_trouble: str | None = None
        """Why store.json cannot be written, None since it could."""
        self._owed: dict[str, Any] = {}
        """What is in force and could not be written to store.json yet."""
        self._is_uncertain = False
        """What store.json says may be gone after a loss of power: nothing is built on it before it is written anew."""
        self._heard: float | None = None  # of the sessions that are over; of the one that is open, it says so itself
        self._listening_since = self._looked_at = time.monotonic()
        self._fence = Command() if policy.fence else None
        self._takeover = Command() if policy.on_failover else None
        self._fencing: ShellCommand | None = None
        self._taking_over: ShellCommand | None = None
        self._by_hand: ByHand | None = None  # a takeover that somebody asked for and that is not done yet
        self._is_settling = False  # a thread is at a promotion, or writes what is owed
        self._is_promoting = False  # the promotion is being written: it cannot be called off any more
        self._not_before = 0.0  # an action that failed for want of a disk is tried again then
        self._handed_out: dict[str, Any] | None = None  # what the survivor goes on from, once promoted
        self._is_closed = False
        for warning in writer.warnings:
            log("store damaged", level=logging.ERROR, name=name, reason=warning)
        metrics.watch_store(name, writer.directory)
        state = self._state()
        self._told: tuple[int, str] = (state.term, str(state.role))  # what was last said in metrics and log
        metrics.set_promoted(name, state.role == "promoted")

    # What is in force

    def _state(self) -> State:
        """What a restart would read, and what is owed to it."""
        state = self._writer.state
        return replace(state, more={**state.more, **self._owed}) if self._owed else state

    def _known_state(self) -> State:
        """What is in force, and will be after a loss of power. Raises StoreError while nobody knows."""
        if self._is_uncertain:
            raise StoreError(f"what the store of {self.name!r} says is not certain: {self._write_trouble}")
        return self._state()

    @contextmanager
    def _settling(self, timeout_s: float = _LEAVE_S) -> Iterator[None]:
        """Nobody else changes store.json meanwhile. Raises Refusal if somebody else does not come to an end."""
        if not self._settle_lock.acquire(timeout=timeout_s):
            raise Refusal("busy", f"the store of {self.name!r} is busy, or its disk hangs: try again")
        try:
            yield
        finally:
            self._settle_lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is written to store.json in this block is durable behind it. After an error nobody knows whether a
        loss of power would leave the old or the new: `_is_uncertain` until it could be written."""
        try:
            yield
        except Exception as error:
            with self._changed:
                self._is_uncertain = True
                is_new, self._write_trouble = self._write_trouble != str(error), str(error)
                self._break(error)
                self._changed.notify_all()
            if is_new:
                self._metrics.store_failed(self.name)
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
            if isinstance(error, RemusError):
                raise
            raise StoreError(f"{self._writer.directory}: {type(error).__name__}: {error}") from error
        with self._changed:
            self._is_uncertain, self._write_trouble = False, None

    def _break(self, error: BaseException) -> None:
        """Note that the store has to be opened anew, if this error is of that kind."""
        if self.broken is None and (isinstance(error, WarmCopyDamaged | Torn) or not isinstance(error, RemusError)):
            self.broken = str(error) if isinstance(error, RemusError) else f"{type(error).__name__}: {error}"
            self._wake()

    def _write(self, *, always: bool = False, **changes: Any) -> None:
        """Change store.json, and pay what is owed to it. Durable when this returns; raises StoreError.

        always: even if that changes nothing, to see whether it can be written
        """
        with self._changed:
            owed = dict(self._owed)
            changes = owed | changes
            state = self._state()
            known = {} if self._is_uncertain else {**state.more, "term": state.term, "role": state.role}
        if always or owed or any(key not in known or known[key] != value for key, value in changes.items()):
            with self._writing():
                self._writer.set_state(**changes)
        with self._changed:
            self._owed = {key: value for key, value in self._owed.items() if owed.get(key) != value}
        self._tell_role()

    def _tell_role(self) -> None:
        state = self._known_state()
        if (told := (state.term, str(state.role))) == self._told:
            return
        self._told = told
        self._metrics.set_term(self.name, state.term)
        self._metrics.set_promoted(self.name, state.role == "promoted")
        if state.role == "promoted":
            log("promoted", level=logging.WARNING, name=self.name, term=state.term, epoch=self._epoch())

    def _pay(self, timeout_s: float = _LEAVE_S) -> None:
        """Write what is owed, if that is possible now."""
        try:
            with self._settling(timeout_s):
                if self._owed or self._is_uncertain:
                    self._write(always=True)
        except RemusError:
            with self._changed:
                self._not_before = time.monotonic() + _RETRY_S

    # Primaries

    @contextmanager
    def hosting(self, visitor: Visitor, hello: Hello) -> Iterator[HistoryWriter]:
        """Let a primary write for as long as it stays. Raises Refusal for one that may not, and StoreError."""
        term = self._let_in(visitor, hello)
        try:
            self._metrics.set_term(self.name, term)
            self._metrics.set_connected(self.name, True)
            log("primary connected", name=self.name, peer=visitor.peer, term=term)
            yield self._writer
        except (StreamError, LinkError, TimeoutError, Refusal):
            raise
        except Exception as error:
            self.trouble = str(error)
            self._metrics.store_failed(self.name)
            self._break(error)
            raise
        finally:
            try:
                self._writer.abandon()
            except Exception as error:
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
                self._break(error)
            with self._changed:
                self._heard = max(self._heard or 0.0, visitor.heard)
                self._visitor = None
                self._changed.notify_all()
            self._metrics.set_connected(self.name, False)
            self._wake()

    def _let_in(self, visitor: Visitor, hello: Hello) -> int:
        """The term under which it is let in; it is the visitor then."""
        if hello.term is not None and hello.term > _MAX_TERM:
            raise Refusal("limit", f"term {hello.term} is beyond all takeovers; a term is at most {_MAX_TERM}")
        with self._settling():
            if self._is_uncertain:
                self._write(always=True)
            state = self._known_state()
            with self._changed:
                self._check_open()
                current = self._visitor
                # The same one, whose old connection we have not yet missed; or that one is gone.
                is_over = current is not None and (
                    current.run_id == hello.run or time.monotonic() - current.heard > self._policy.lease_s
                )
            is_busy = current is not None and not is_over
            match failover.admit(state.term, Role(state.role), hello.term, is_busy):
                case FencedOff(term):
                    self._metrics.fence(self.name)
                    raise Refusal(
                        "fenced",
                        f"{self.name!r} has been taken over under term {term}: stop, and release nothing that was held "
                        f"back. To protect the side that took over, give it --term {term + 1} or higher"
                        if state.role == "promoted"
                        else f"{self.name!r} is protected under term {term}, and this primary is of an older one: stop",
                        term,
                    )
                case failover.Busy():
                    raise Refusal("busy", f"{self.name!r} is being protected by another primary, {self._last_peer}")
                case Accepted(term):
                    self._await_fence()
                    if current is not None and is_over:
                        self._dismiss(current, "busy", "another connection has taken the place of this one")
                    elif current is not None:
                        # "fenced" is for good: it is not said before it is durable.
                        self._write(term=term)
                        self._dismiss(current, "fenced", f"a primary of term {term} has come", term)
                    self._write(term=term, role="standby", expects_primary=True, takeover_done=False)
            with self._changed:
                self._check_open()
                # Somebody may have asked for a takeover while the disk was written to. Where that one had been done
                # before, it asked for what this primary goes on from, and not for this primary's end.
                if state.role != "promoted":
                    self._check_unwanted()
                self._by_hand = None
                self._forget_takeover()
                self._changed.notify_all()
                self._visitor = visitor
                self._last_peer = visitor.peer
                self._heard = time.monotonic()
                return term

    def _check_open(self) -> None:
        if self.broken is not None:
            raise StoreError(f"the store of {self.name!r} has to be opened anew: {self.broken}")
        if self._is_closed:
            raise Refusal("shutdown", "the backup is being stopped")

    def _forget_takeover(self) -> None:
        """With the lock held: another term begins. A command that runs is let be: what it started is protected now."""
        self._takeover = self._takeover and Command()
        if self._taking_over is not None:
            self._taking_over.let_be()
            self._taking_over = None

    def _check_unwanted(self) -> None:
        """With the lock held. Raises Refusal where somebody has asked for the takeover."""
        if self._by_hand is not None:
            raise Refusal("busy", f"{self.name!r} is being taken over")

    def _await_fence(self) -> None:
        """A primary has shown itself, and may be let in: first a fence that was to stop it is dead.

        Raises Refusal where it is not, or where somebody has asked for the takeover.
        """
        with self._changed:
            self._heard = time.monotonic()  # it is there, whatever this side has to say to it next
            self._check_unwanted()
            self._end_vain_fence(self._heard)
            if not self._changed.wait_for(lambda: self._fencing is None, self._bound_s):
                raise Refusal("busy", f"a fencing command against {self.name!r} has not ended yet: try again")

    @property
    def _bound_s(self) -> float:
        return min(self._policy.lease_s, _LEAVE_S)

    def _dismiss(self, visitor: Visitor, code: str, message: str, term: int | None = None) -> None:
        """End the session that is open. Raises Refusal where its thread does not come back from the disk."""
        visitor.end(code, message, term)
        with self._changed:
            if not self._changed.wait_for(lambda: self._visitor is not visitor, self._bound_s):
                raise Refusal("busy", f"the session of {visitor.peer} has not ended yet: try again")

    def welcome(self, hello: Hello, limits: Limits) -> Welcome:
        """What the primary that has just been let in is to know."""
        shape = self._writer.stream
        return Welcome(
            program=f"remus_ckpt {__version__}",
            term=self._known_state().term,
            position=self._writer.position,
            highest_epoch=self._writer.highest_epoch if self._writer.highest_epoch >= 0 else None,
            stream=None if shape is None else StreamShape(shape.codec, shape.word, shape.p2m_size),
            compressions=tuple(name for name in COMPRESSIONS if name in hello.compressions),
            limits={"memory_bytes": limits.memory_bytes, "checkpoint_bytes": limits.checkpoint_bytes},
            lease_s=self._policy.lease_s,
        )

    def said_goodbye(self, reason: str) -> None:
        """The primary has ended in an orderly way: nothing is to be taken over from it, whatever the disk says."""
        log("goodbye", name=self.name, reason=reason)
        with self._changed:
            self._owed["expects_primary"] = False
        self._pay(_RETRY_S)

    def stored(self, position: Position, seconds: float) -> None:
        """A checkpoint has been acknowledged, so long after its commit came."""
        self.trouble = None
        self._metrics.committed(self.name, position.epoch, seconds, time.time(), position.digest)

    # Decisions

    def turn(self, now: float) -> float:
        """Do what is due now; returns when to ask again. Never waits."""
        try:
            with self._changed:
                return self._act(now)
        except Exception as error:  # others are served by who asks here
            if self.trouble != str(error):
                log("decision failed", level=logging.ERROR, name=self.name, error=error)
            self.trouble = str(error)
            return now + _RETRY_S

    def _act(self, now: float) -> float:
        self._listening_since = failover.listening_since(
            self._listening_since, self._looked_at, now, self._policy.lease_s
        )
        self._looked_at = now
        self._end_vain_fence(now)
        if self._is_settling or self._is_closed:
            return now + self._policy.lease_s
        if now < self._not_before:
            return self._not_before
        state = self._state()
        if self._is_uncertain:
            self._settle(self._pay)
            return now + self._policy.lease_s
        due = now + self._policy.lease_s
        for action in failover.decide(self._situation(state), now):
            match action:
                case failover.WaitUntil(at):
                    due = at
                case failover.RunFence(attempt):
                    before, begun = self._fence, Command.begun(attempt, now)
                    self._start(self._run_fence, before, begun)
                    self._fence = begun
                case failover.Promote(term):
                    self._settle(self._promote, term)
                    return due
                case failover.RunTakeover(term, attempt):
                    begun = Command.begun(attempt, now)
                    self._start(self._run_takeover, begun)
                    self._takeover = begun
        if state.role == "promoted" and self._by_hand is not None:
            self._settle(self._promote, None)
        elif self._owed:
            self._settle(self._pay)
        return due

    def _situation(self, state: State) -> Situation:
        heard = [time for time in (self._heard, self._visitor.heard if self._visitor else None) if time is not None]
        return Situation(
            term=state.term,
            role=Role(state.role),
            has_checkpoint=self._writer.position is not None,
            # Who was started from what is held here has done work since, which no takeover from it would have.
            expects_primary=bool(state.more.get("expects_primary")) and not self._writer.is_handed_out,
            takeover_done=bool(state.more.get("takeover_done")),
            listening_since=self._listening_since,
            last_heard=max(heard, default=None),
            lease_s=self._policy.lease_s,
            fence=self._fence,
            takeover=self._takeover,
            by_hand=self._by_hand,
            automatic=self._policy.automatic,
        )

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name=f"{work.__name__} of {self.name}", daemon=True).start()

    def _settle(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do one thing at a time that changes store.json, in a thread of its own."""

        def settle() -> None:
            try:
                work(*arguments)
            finally:
                with self._changed:
                    self._is_settling = False
                    self._changed.notify_all()
                self._wake()

        self._start(settle)
        self._is_settling = True

    # The fence

    def _needs_fence(self, now: float) -> bool:
        return (
            not self._is_closed and not self._is_uncertain and failover.needs_fence(self._situation(self._state()), now)
        )

    def _end_vain_fence(self, now: float) -> None:
        """With the lock held: a fence whose reason is gone must not go on to shoot a primary that is back."""
        if self._fencing is not None and not self._needs_fence(now):
            self._fencing.kill()

    def _run_fence(self, before: Command, begun: Command) -> None:
        after = before
        try:
            shell = self._start_fence(begun)
            if shell is not None:
                after = self._await(shell, begun)
        except _NotRun as error:
            after = self._ended(begun, str(error))
        except Exception as error:  # nothing can follow it, so nothing was run
            self.trouble = str(error)
            with self._changed:
                self._not_before = time.monotonic() + _RETRY_S
        with self._changed:
            self._fencing = None
            self._fence = after
            self._changed.notify_all()
        self._wake()

    def _start_fence(self, begun: Command) -> ShellCommand | None:
        """None where its reason is gone. Raises RemusError where nothing could follow it: then nobody is fenced."""
        assert self._policy.fence is not None
        with self._settling():
            self._write(always=True, fencing=begun.attempt)
            with self._changed:
                is_needed = self._needs_fence(time.monotonic())
                silent = self._visitor if self._by_hand is None else None
            if is_needed and silent is not None:
                # It comes back by a new hello, and is let in when this fence is dead.
                self._dismiss(silent, "timeout", f"nothing came for {self._policy.lease_s:g} s")
            with self._changed:
                if not self._needs_fence(time.monotonic()):
                    return None
            log("fencing", level=logging.WARNING, name=self.name, peer=self._last_peer)
            shell = self._shell(self._policy.fence, {"REMUS_PEER": self._last_peer})
            with self._changed:
                self._fencing = shell
                self._end_vain_fence(time.monotonic())
            return shell

    def _await(self, shell: ShellCommand, begun: Command) -> Command:
        timeout_s = self._policy.fence_timeout_s
        status = shell.wait(timeout_s)
        is_late = status is None
        if is_late:
            shell.kill()
            status = shell.wait()  # what cannot be killed may still act: so long it runs
        with self._changed:
            if not self._needs_fence(time.monotonic()):
                log("fence called off", level=logging.WARNING, name=self.name)
                return Command()
        if is_late:
            return self._ended(begun, f"it took more than {timeout_s:g} s")
        return self._ended(begun, f"status {status}" if status else None)

    def _ended(self, begun: Command, fault: str | None) -> Command:
        self.trouble = None if fault is None else f"the fencing command failed ({fault}): nothing was promoted"
        if fault is not None:
            self._metrics.command_failed(self.name, "fence")
            log("command failed", level=logging.ERROR, name=self.name, command="fence", reason=fault)
        return begun.ended(fault is None, time.monotonic())

    # The promotion

    def _promote(self, term: int | None) -> None:
        """Promote under this term, None where that is done, and hand out what the survivor goes on from."""
        try:
            with self._settling():
                if term is None or self._make_promoted(term):
                    self._hand_out()
        except Exception as error:
            self.trouble = str(error)
            log("promotion failed", level=logging.ERROR, name=self.name, reason=str(error))
            with self._changed:
                self._not_before = time.monotonic() + _RETRY_S

    def _make_promoted(self, term: int) -> bool:
        """Whether the store is promoted. Raises RemusError."""
        with self._changed:
            visitor = self._visitor if self._is_due(term) else None
        if visitor is not None:
            # Not yet "fenced": that is for good, and it is not durable yet. Its next hello will hear it.
            self._dismiss(visitor, "busy", f"{self.name!r} is being taken over")
        with self._changed:
            # Since the decision there was time for a sign of life.
            if not self._is_due(term):
                return False
            self._is_promoting = True
            self._forget_takeover()  # one may be left from a term that ended when the disk failed
        try:
            self._write(term=term, role="promoted", takeover_done=False, expects_primary=False)
        finally:
            with self._changed:
                self._is_promoting = False
        return True

    def _is_due(self, term: int) -> bool:
        return not self._is_closed and failover.Promote(term) in failover.decide(
            self._situation(self._known_state()), time.monotonic()
        )

    def _epoch(self) -> int | None:
        return None if self._writer.position is None else self._writer.position.epoch

    def _whole_position(self) -> str | None:
        position = self._writer.position
        return None if position is None else f"{position.epoch}:{position.digest.hex()}"

    def _hand_out(self) -> dict[str, Any]:
        """The image and the device state, as files of their own: whoever goes on from them may write to them.

        Raises StoreError, and Refusal where a primary has been let in meanwhile: the memory is that one's again.
        """
        if (given := self._given()) is not None:
            return given
        state = self._known_state()
        if state.role != "promoted":
            raise Refusal("busy", f"{self.name!r} is protected again, under term {state.term}")
        with self._writing():
            image, device_state = self._writer.hand_out()
        handed_out = {
            "name": self.name,
            "term": state.term,
            "epoch": self._epoch(),
            "position": self._whole_position(),
            "image": str(image),
            "device_state": str(device_state),
        }
        with self._changed:
            self._handed_out, self._by_hand = handed_out, None
            self._changed.notify_all()
        return handed_out

    def _given(self) -> dict[str, Any] | None:
        """What was handed out, while that term is in force."""
        state = self._state()
        is_in_force = self._handed_out is not None and (state.role, state.term) == (
            "promoted",
            self._handed_out["term"],
        )
        return self._handed_out if is_in_force else None

    # The takeover

    def _run_takeover(self, begun: Command) -> None:
        succeeded = False
        reason: str | None = "the takeover command failed; it is tried again"
        try:
            shell = self._start_takeover(begun)
            if shell is None:
                return
            status = shell.wait(self._policy.takeover_timeout_s)
            if status is None:
                reason = f"the takeover command took more than {self._policy.takeover_timeout_s:g} s: it is killed"
                self._kill_takeover(shell, reason)
                status = shell.wait()  # what cannot be killed may still act: so long it runs, and is not run again
                reason += ", and is tried again"
            succeeded = status == 0
            if not succeeded:
                log("command failed", level=logging.ERROR, name=self.name, command="takeover", status=status)
        except Exception as error:
            reason = f"{error}; the takeover is tried again"
            log("takeover failed", level=logging.ERROR, name=self.name, reason=str(error))
        with self._changed:
            is_ours = self._takeover is begun  # or a primary of a later term has come, and this says nothing of that
            if is_ours:
                self._taking_over = None
                self._takeover = begun.ended(succeeded, time.monotonic())
                self.trouble = None if succeeded else reason
                if succeeded:
                    self._owed["takeover_done"] = True
            self._changed.notify_all()
        if is_ours and not succeeded:
            self._metrics.command_failed(self.name, "takeover")
        if is_ours and succeeded:
            self._pay()
        self._wake()

    def _kill_takeover(self, shell: ShellCommand, reason: str) -> None:
        with self._changed:
            if self._taking_over is not shell:
                return  # what it started is protected by now
            shell.kill()
            self.trouble = reason
        log("command does not end", level=logging.ERROR, name=self.name, command="takeover", reason=reason)

    def _start_takeover(self, begun: Command) -> ShellCommand | None:
        assert self._policy.on_failover is not None
        with self._settling():
            with self._changed:
                if self._is_closed or self._takeover is not begun:
                    return None
            given = self._hand_out()
            log("taking over", level=logging.WARNING, name=self.name, epoch=given["epoch"])
            shell = self._shell(
                self._policy.on_failover,
                {
                    "REMUS_IMAGE": given["image"],
                    "REMUS_DEVICE_STATE": given["device_state"],
                    "REMUS_POSITION": given["position"],
                },
            )
            with self._changed:
                self._taking_over = shell
                if self._is_closed:
                    shell.kill()
            return shell

    def _shell(self, command: str, environment: dict[str, str]) -> ShellCommand:
        """A user's command, begun. Raises _NotRun."""
        own = {
            "REMUS_NAME": self.name,
            "REMUS_TERM": str(self._known_state().term),
            "REMUS_EPOCH": str(self._epoch()),
        }
        try:
            return ShellCommand(command, own | environment)
        except RemusError as error:
            raise _NotRun(str(error)) from error

    # Users

    def take_over(self, *, fence: bool) -> dict[str, Any]:
        """Promote by hand, now; returns what the survivor goes on from.

        Raises NoCheckpoint where nothing is committed, RemusError where the fencing fails or it takes too long; what it
        says then is true then: a promotion that has begun to be written may still come.
        """
        with self._changed:
            if (given := self._given()) is not None:
                return given
            if self._state().role != "promoted":
                if self._writer.position is None:
                    raise NoCheckpoint(f"nothing is committed under the name {self.name!r}")
                if fence and self._fence is None:
                    raise RemusError("there is no fencing command: start the backup with --fence, or do it yourself")
            wish = ByHand(time.monotonic(), fence)
            if self._by_hand is None or self._by_hand.fence:  # who vouches for the old side waits for nobody's fence
                self._by_hand = wish
            self._wake()
            is_over = self._changed.wait_for(
                lambda: self._given() is not None or self._has_failed(wish) or self._by_hand is None or self._is_closed,
                _PROMOTION_S,
            )
            if (given := self._given()) is not None:
                return given
            if self._by_hand is wish:
                self._by_hand = None
                self._end_vain_fence(time.monotonic())
            if self._has_failed(wish):
                raise RemusError(self.trouble or "the fencing command failed: nothing was promoted")
            if self._is_closed:
                raise RemusError(f"the store of {self.name!r} is being closed: ask again")
            why = self._write_trouble or self.trouble
            why = f": {why}" if why else ""
            if self._is_promoting or self._is_uncertain:
                raise RemusError(
                    f"whether {self.name!r} is promoted is not certain{why}. It is settled as soon as the store can be "
                    "written, and no primary is let in before: look at its status"
                )
            if (state := self._state()).role == "promoted":
                raise RemusError(f"promoted under term {state.term}, and the memory is not handed out{why}; ask again")
            if is_over:
                raise RemusError(
                    f"not promoted: a primary of term {state.term} has been let in, or another who asked has given up; "
                    "ask again"
                )
            raise RemusError(f"not promoted within {_PROMOTION_S:g} s{why or ': see the log of the backup'}")

    def _has_failed(self, wish: ByHand) -> bool:
        """Whether the fence has that was run for it; an earlier one says nothing."""
        fence = self._fence if wish.fence else None
        return fence is not None and fence.phase is failover.Phase.FAILED and fence.began_at >= wish.at

    def status(self) -> dict[str, Any]:
        """What there is to say of it.

        role: "standby" or "promoted"
        fence, takeover: how far that command is, None without one
        fence_retry_s, takeover_retry_s: when one that failed is run again, None where it is not
        """
        now = time.monotonic()
        with self._changed:
            state = self._state()
            visitor = self._visitor
            heard = self._heard if visitor is None else visitor.heard
            actions = failover.decide(self._situation(state), now)

            def phase(command: Command | None) -> str | None:
                return None if command is None else command.phase.value

            def retry_s(command: Command | None) -> float | None:
                if command is None or command.phase is not failover.Phase.FAILED:
                    return None
                at = command.retry_at()
                return round(at - now, 3) if failover.WaitUntil(at) in actions else None

            is_done = state.role == "promoted" and state.more.get("takeover_done")
            given = self._given()
            return self._metrics.backup_status(self.name) | {
                "role": str(state.role),
                "term": state.term,
                "epoch": self._epoch(),
                "position": self._whole_position(),
                "memory_bytes": None if self._writer.memory is None else len(self._writer.memory) * PAGE_SIZE,
                "connected": visitor is not None,
                "peer": self._last_peer or None,
                "silent_s": None if heard is None else round(now - heard, 3),
                "fence": phase(self._fence),
                "fence_retry_s": retry_s(self._fence),
                "takeover": "succeeded" if is_done else phase(self._takeover),
                "takeover_retry_s": retry_s(self._takeover),
                "image": None if given is None else given["image"],
                "trouble": self._write_trouble or self.trouble,
                "warnings": list(self._writer.warnings),
                "primary": {} if visitor is None else unflatten(visitor.status),
            }

    # The end

    def looks_empty(self) -> bool:
        """Whether nothing was ever committed to it, and nobody uses it.

        A term that it was told is kept: it says who must not come back.
        """
        with self._changed:
            state = self._state()
            return (
                not self._is_closed
                and self._visitor is None
                and not self._is_settling
                and not state.term
                and self._writer.position is None
                and self._writer.highest_epoch < 0
            )

    def close_if_empty(self) -> bool:
        """Let go of the store and remove it, if nothing was ever committed to it; whether it is closed."""
        with suppress(OSError, RemusError), self._settling():
            if not self.looks_empty() or any((self._writer.directory / "segments").iterdir()):
                return False
            self._is_closed = True
            self._writer.close()
            shutil.rmtree(self._writer.directory)
        return self._is_closed

    def stop(self) -> None:
        """Begin nothing more, and kill the commands that run: a takeover is run again when a backup starts anew."""
        with self._changed:
            self._is_closed = True
            for shell in (self._fencing, self._taking_over):
                if shell is not None:
                    shell.kill()
            self._changed.notify_all()

    def close(self, deadline: float | None = None) -> None:
        """Stop, and let go of the store, by this time: what then still hangs is left to hang."""
        close_all([self], time.monotonic() + _LEAVE_S if deadline is None else deadline)

    def _begin_closing(self, deadline: float) -> threading.Thread:
        """Once it has been stopped. Waits for what must end first, by this time, and not for the disk."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._visitor is None
                    and not self._is_settling
                    and self._fencing is None
                    and self._taking_over is None
                ),
                max(deadline - time.monotonic(), 0.0),
            )
        closing = threading.Thread(target=self._let_go, name=f"closing {self.name}", daemon=True)
        closing.start()
        return closing

    def _let_go(self) -> None:
        try:
            self._pay()
            self._writer.close()
        except Exception as error:
            log("store failed", level=logging.ERROR, name=self.name, reason=str(error))


def close_all(standbys: Sequence[Standby], deadline: float) -> None:
    """Stop them, and let go of their stores, by this time or a second later: what then still hangs is left to hang."""
    for standby in standbys:
        standby.stop()
    closing = [(standby, standby._begin_closing(deadline)) for standby in standbys]
    deadline = max(deadline, time.monotonic() + _RETRY_S)
    for standby, thread in closing:
        thread.join(max(deadline - time.monotonic(), 0.0))
        if thread.is_alive():
            log("store does not close", level=logging.ERROR, name=standby.name, reason="its disk hangs")
