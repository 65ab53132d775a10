"""One protected memory on its backup: its sessions, its takeovers, and its status.

`admission` lets primaries in. `failover` decides what to do and `takeover` does it; this module gathers what a decision
rests on, starts what is due, and answers users.

Two locks. `_changed` guards the fields in memory; no thread waits for a disk, a peer or a command while holding it. The
lock of `Durable.settling` is held by the one thread that changes store.json; it is taken first, and always with a
timeout. So a disk that hangs stops what needs that disk, and nothing else: not the clock, `status` or other names.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import LinkError, NoCheckpoint, RemusError, StoreError, StreamError
from remus_ckpt.fleet.claims import Claims
from remus_ckpt.limits import Limits
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics, unflatten
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service import failover
from remus_ckpt.service.admission import Admission, Visitor
from remus_ckpt.service.attempts import Attempts, Base
from remus_ckpt.service.durable import Durable, Refusal, fault_of
from remus_ckpt.service.failover import ByHand, Command, Role, Situation
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.takeover import Consent, Takeover
from remus_ckpt.service.vms import GuestStandby
from remus_ckpt.session.frames import COMPRESSIONS, choose_digest
from remus_ckpt.session.messages import Begin, Hello, StreamShape, Welcome
from remus_ckpt.store import Arriving, HistoryWriter
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position

__all__ = ["Policy", "Refusal", "Standby", "close_all"]

_RETRY_S = 1.0
_PROMOTION_S = 60.0
_CLOSE_S = 10.0
"""Maximum wait for a session or a command that must end before the store is closed."""


class Standby:
    """Keeps the history of one name, and takes over.

    writer: writes that history; closed with this object
    guest: the QEMU that goes on with it, if it is a guest; closed with this object. None where guests are not run
    consent: of others, before a takeover; None if nobody is asked
    wake: called when a decision may have changed

    The thread of a session calls `hosting`, `welcome`, `stored` and `said_goodbye`; one thread calls `turn`; any thread
    may call the rest.
    """

    def __init__(
        self,
        name: str,
        writer: HistoryWriter,
        policy: Policy,
        metrics: Metrics,
        wake: Callable[[], None],
        guest: GuestStandby | None = None,
        consent: Consent | None = None,
    ) -> None:
        self.name = name
        self._claims: Claims | None = None
        if policy.commit_log is not None:
            self._claims = Claims(policy.commit_log, name, f"{platform.node()}:{writer.directory}")
        self._guest = guest
        self.guests = 0
        """Primaries that are connected or waiting to be let in; `Names` counts them, under its own lock."""
        self._writer = writer
        self._policy = policy
        self._metrics = metrics
        self._wake = wake
        self._changed = threading.Condition()  # guards all that follows, and the fields of the next two
        self._durable = Durable(name, writer, metrics, self._changed, wake)
        self._takeover = Takeover(
            self._durable,
            policy,
            metrics,
            self._changed,
            situation=self._situation,
            dismiss=self._dismiss,
            guest=guest,
            claims=self._claims,
            consent=consent,
        )
        self.attempts = Attempts(policy.lease_s)
        """Primaries that were refused; `Names` shares it, since it outlives this object."""
        self._admission = Admission(
            self._durable,
            self._takeover,
            metrics,
            self._changed,
            lease_s=policy.lease_s,
            claims=self._claims,
            is_wanted=lambda: self._is_wanted,
            on_seated=self._forget_wish,
            wake=wake,
        )
        self._last_end: dict[str, Any] | None = None  # of the last session, for `status`
        self._listening_since = self._looked_at = time.monotonic()
        self._by_hand: ByHand | None = None  # a takeover that a waiting user has asked for
        self._is_settling = False  # a thread is promoting, or writing what is owed
        self._not_before = 0.0  # when to retry an action that failed because of the disk
        with suppress(RemusError):  # told when a primary comes
            self._follow()
        if guest is not None:
            guest.find_survivor(self._durable.state)

    @property
    def broken(self) -> str | None:
        """Why the backup has to close and reopen the store; None if it need not."""
        return self._durable.broken

    @property
    def epoch(self) -> int | None:
        """The epoch of the newest committed checkpoint."""
        return self._durable.epoch

    @property
    def log_level(self) -> int:
        """The level at which the log hears that a primary is let in: while the store fails, it is at each try."""
        return logging.INFO if self._durable.checkpoint_fault is None else logging.DEBUG

    # Primaries

    @contextmanager
    def hosting(self, visitor: Visitor, hello: Hello) -> Iterator[HistoryWriter]:
        """Let a primary write for as long as it stays. Raises Refusal if it may not write, and StoreError."""
        term = self._admission.let_in(visitor, hello, self.attempts)
        try:
            self._metrics.set_term(self.name, term)
            self._metrics.set_connected(self.name, True)
            log("primary connected", level=self.log_level, name=self.name, peer=visitor.identity.text, term=term)
            if not self._writer.is_handed_out:
                self._follow()
            yield self._writer
        except (StreamError, LinkError, TimeoutError, Refusal) as error:
            self._end_with(str(error))
            raise
        except Exception as error:
            self._end_with(str(error))
            self._durable.trouble = str(error)
            self._durable.checkpoint_fault = fault = fault_of(error)
            self.attempts.base_failed(time.monotonic(), is_full=fault == "full")
            self._metrics.store_failed(self.name)
            self._durable.note_broken(error)
            raise
        finally:
            try:
                self._writer.abandon()
                if not self._writer.is_handed_out:
                    self._follow()
            except Exception as error:
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
                self._durable.note_broken(error)
            with self._changed:
                self._takeover.is_in_doubt = self._claims is not None  # the log may have ended that session
                self._admission.left(visitor)
            self._metrics.set_connected(self.name, False)
            self._wake()

    def begin(self, hello: Hello, begin: Begin) -> None:
        """Begin what the primary has announced. Raises Refusal if there is no room for its full copy, StoreError."""
        if begin.mode == "full":
            memory_bytes = hello.memory_pages * hello.page_size
            data_bytes = None if begin.data_pages is None else min(begin.data_pages * hello.page_size, memory_bytes)
            base = Base(hello.run, self._writer.position, memory_bytes, data_bytes, time.monotonic())
            self.attempts.begin(base)
            self._durable.check_room(self.attempts, base)
        self._writer.begin(full=begin.mode == "full", digest=choose_digest(hello))

    def welcome(self, hello: Hello, limits: Limits) -> Welcome:
        """The welcome for a primary that has just been let in."""
        shape = self._writer.stream
        return Welcome(
            program=f"remus_ckpt {__version__}",
            term=self._durable.known_state().term,
            position=self._writer.position,
            highest_epoch=self._writer.highest_epoch if self._writer.highest_epoch >= 0 else None,
            stream=None if shape is None else StreamShape(shape.codec, shape.word, shape.p2m_size),
            compressions=tuple(name for name in COMPRESSIONS if name in hello.compressions),
            limits={"memory_bytes": limits.memory_bytes, "checkpoint_bytes": limits.checkpoint_bytes},
            lease_s=self._policy.lease_s,
            digest=choose_digest(hello),
            log=None if self._claims is None else hello.log,
        )

    def said_goodbye(self, reason: str) -> None:
        """The primary has ended in an orderly way: from now on there is nothing to take over, even if the disk cannot
        record that yet."""
        log("goodbye", name=self.name, reason=reason)
        self._end_with(reason, goodbye=True)
        self._durable.owe(expects_primary=False)
        self._note(self._durable.pay(_RETRY_S))

    def _end_with(self, reason: str, *, goodbye: bool = False) -> None:
        self._last_end = {"goodbye": goodbye, "reason": reason, "at": time.time()}

    def stored(
        self, position: Position, seconds: float, *, raw_bytes: int, encoded_bytes: int, wire_bytes: int
    ) -> None:
        """Count a checkpoint that has been acknowledged, and the time that took after its commit arrived.

        raw_bytes: of its pages; encoded_bytes: of its stream; wire_bytes: received for it
        """
        self._durable.note_stored()
        self.attempts.stored()
        self._metrics.committed(self.name, position.epoch, seconds, time.time(), position.digest)
        self._metrics.add_bytes(self.name, raw=raw_bytes, encoded=encoded_bytes, wire=wire_bytes)

    def admit(self, device_state: bytes) -> None:
        """Raise RemusError if a checkpoint must not be stored. device_state: its own, from outside"""
        if self._guest is not None:
            self._guest.admit(device_state)

    def applied(self) -> None:
        """The checkpoint that was stored last is applied. Raises StoreError if the guest's disks do not follow."""
        self._follow()

    def _follow(self) -> None:
        if self._guest is not None and self._durable.state.role != "promoted":
            self._guest.committed(self._writer)

    def note_changed(self, pfns: NDArray[np.int64]) -> None:
        """Count the pages of a checkpoint that has been applied, by where they lie."""
        if (memory := self._writer.memory) is not None:
            self._metrics.changed(self.name, pfns, len(memory))

    # Decisions

    def could_claim(self) -> bool:
        """Whether the commit log has its last commit here. Raises LogError, Malformed, StoreError."""
        return self._takeover.could_claim()

    def make_room(self) -> None:
        """Remove old checkpoints if too little of the disk is free. May wait for the disk."""
        with suppress(StoreError):  # closed meanwhile; the writer notes whatever else is wrong
            self._writer.make_room()

    def turn(self, now: float) -> float:
        """Start what is due now; returns when to call again. Never waits."""
        try:
            with self._changed:
                return self._act(now)
        except Exception as error:  # the caller serves other names too
            if self._durable.trouble != str(error):
                log("decision failed", level=logging.ERROR, name=self.name, error=error)
            self._durable.trouble = str(error)
            return now + _RETRY_S

    def _act(self, now: float) -> float:
        lease_s = self._policy.lease_s
        self._listening_since = failover.listening_since(self._listening_since, self._looked_at, now, lease_s)
        self._looked_at = now
        self._takeover.end_vain_fence(now)
        if self._is_settling or self._admission.is_closed:
            return now + lease_s
        if now < self._not_before:
            return self._not_before
        due = now + lease_s
        if self._durable.is_uncertain:
            self._settle(self._durable.pay)
            return due
        if self._takeover.is_in_doubt and self._durable.state.role != "promoted":
            self._settle(self._takeover.look)
            return due
        situation = self._situation()
        for action in failover.decide(situation, now):
            match action:
                case failover.WaitUntil(at):
                    due = at
                case failover.RunFence(attempt):
                    # `now` may be from before the request; a fence from before it would not count, and be run again.
                    begun = Command.begun(attempt, now if self._by_hand is None else max(now, self._by_hand.at))
                    self._start(self._takeover.run_fence, self._takeover.fence, begun)
                    self._takeover.fence = begun  # the new thread first waits for our lock
                case failover.Claim(term):
                    self._settle(self._takeover.claim, term)
                    return due
                case failover.Promote(term):
                    self._settle(self._takeover.promote, term)
                    return due
                case failover.RunTakeover(_, attempt):
                    begun = Command.begun(attempt, now)
                    self._start(self._takeover.run_takeover, begun)
                    self._takeover.command = begun
        if situation.role is Role.PROMOTED and self._is_wanted:
            self._settle(self._takeover.promote, None)
        elif self._durable.is_owing:
            self._settle(self._durable.pay)
        return due

    def _situation(self) -> Situation:
        """The situation now. Needs the lock."""
        state = self._durable.state
        return Situation(
            term=state.term,
            role=Role(state.role),
            has_checkpoint=self._writer.position is not None,
            # A worker started from what was handed out has since done work that a takeover from here would lose.
            expects_primary=bool(state.more.get("expects_primary")) and not self._writer.is_handed_out,
            takeover_done=bool(state.more.get("takeover_done")),
            listening_since=self._listening_since,
            last_heard=self._admission.last_heard,
            lease_s=self._policy.lease_s,
            fence=self._takeover.fence,
            takeover=self._takeover.command,
            by_hand=self._by_hand,
            claimed=self._takeover.claimed,
            claimed_at=self._takeover.claimed_at,
            automatic=self._policy.automatic,
            has_log=self._claims is not None,
            is_logged=self._claims is not None and state.more.get("log") == self._claims.known_identity is not None,
        )

    def _start(self, work: Callable[..., bool], *arguments: Any, settles: bool = False) -> None:
        """Do work that may wait for a disk or a command, in a thread of its own.

        work: returns whether the disk was available
        """

        def act() -> None:
            try:
                self._note(work(*arguments))
            finally:
                if settles:
                    with self._changed:
                        self._is_settling = False
                        self._changed.notify_all()
                self._wake()

        threading.Thread(target=act, name=f"{work.__name__} of {self.name}", daemon=True).start()

    def _settle(self, work: Callable[..., bool], *arguments: Any) -> None:
        """Like `_start`, for work that changes store.json: one at a time."""
        self._start(work, *arguments, settles=True)
        self._is_settling = True

    def _note(self, is_done: bool) -> None:
        if not is_done:
            with self._changed:
                self._not_before = time.monotonic() + _RETRY_S

    # Users

    @property
    def _is_wanted(self) -> bool:
        """Whether a user waits for a takeover that has not happened yet. Needs the lock."""
        return self._by_hand is not None and self._takeover.given is None

    def _forget_wish(self) -> None:
        self._by_hand = None

    def _dismiss(self, code: str, message: str) -> None:
        self._admission.dismiss(code, message)

    def take_over(self, *, fence: bool) -> dict[str, Any]:
        """Promote by hand, now; returns what the survivor continues from.

        Raises NoCheckpoint if nothing is committed, RemusError if the fencing fails or the promotion takes too long.
        The message describes that moment: a promotion that is already being written may still complete later.
        """
        if self._takeover.given is None and self._durable.state.role != "promoted":
            self._takeover.ask_others()
        with self._changed:
            if (given := self._takeover.given) is not None:
                return given
            if self._durable.state.role != "promoted":
                if self._writer.position is None:
                    raise NoCheckpoint(f"nothing is committed under the name {self.name!r}")
                if fence and self._takeover.fence is None:
                    raise RemusError("there is no fencing command: start the backup with --fence, or do it yourself")
            wish = ByHand(time.monotonic(), fence)
            if self._by_hand is None or self._by_hand.fence:  # a user who vouches for the old side waits for no fence
                self._by_hand = wish
            self._wake()
            is_over = self._changed.wait_for(
                lambda: not self._is_wanted or self._has_failed(wish) or self._admission.is_closed, _PROMOTION_S
            )
            given = self._takeover.given
            if given is not None or self._by_hand is wish:
                self._by_hand = None
            if given is not None:
                return given
            self._takeover.end_vain_fence(time.monotonic())
            if self._has_failed(wish):
                raise RemusError(self._durable.trouble or "the fencing command failed: nothing was promoted")
            if self._admission.is_closed:
                raise RemusError(f"the store of {self.name!r} is being closed: ask again")
            raise RemusError(self._why_not_taken_over(is_over))

    def _why_not_taken_over(self, is_over: bool) -> str:
        """Why a requested takeover has not happened. is_over: the request ended before its timeout"""
        why = self._durable.write_trouble or self._durable.trouble
        why = f": {why}" if why else ""
        state = self._durable.state
        if self._takeover.is_promoting or self._durable.is_uncertain:
            return (
                f"whether {self.name!r} is promoted is not certain{why}. It is settled as soon as the store can be "
                "written, and no primary is let in before: look at its status"
            )
        if state.role == "promoted":
            return f"promoted under term {state.term}, and the memory is not handed out{why}; ask again"
        if is_over:
            return (
                f"not promoted: a primary of term {state.term} has been let in, or another who asked has given up; ask "
                "again"
            )
        return f"not promoted within {_PROMOTION_S:g} s{why or ': see the log of the backup'}"

    def _has_failed(self, wish: ByHand) -> bool:
        """Whether the fence that was run for this request has failed, or the log has denied it; what was before does
        not count."""
        if self._takeover.denied_at >= wish.at:
            return True
        fence = self._takeover.fence if wish.fence else None
        return fence is not None and fence.phase is failover.Phase.FAILED and fence.began_at >= wish.at

    def status(self) -> dict[str, Any]:
        """The status of this name.

        role: "standby" or "promoted"
        fence, takeover: how far that command has got, None without one
        fence_retry_s, takeover_retry_s: seconds until a failed command runs again, None if it does not
        first_copy: the full copy that the open session has begun and that is not durable yet, None without one
        arriving_s: seconds since the first byte of the checkpoint being received, None between two
        last_end: how and when the last session ended: with a goodbye or not; None if there was none
        lease_left_s: seconds until the silence of the primary has lasted a lease, None if it has said goodbye
        refused, room: see `Attempts.status`
        trouble, trouble_since, store_fault: see `Durable.status`
        """
        now = time.monotonic()
        with self._changed:
            state = self._durable.state
            visitor, heard = self._admission.visitor, self._admission.last_heard
            peer = self._durable.peer
            arriving = self._writer.arriving
            since = max(self._listening_since, heard or 0.0)
            left_s = round(max(since + self._policy.lease_s - now, 0.0), 3)
            return (
                self._metrics.backup_status(self.name)
                | {
                    "role": str(state.role),
                    "term": state.term,
                    "epoch": self._durable.epoch,
                    "position": self._durable.whole_position,
                    "memory_bytes": None if self._writer.memory is None else len(self._writer.memory) * PAGE_SIZE,
                    "connected": visitor is not None,
                    "peer": peer and peer.text,
                    "silent_s": None if heard is None else round(now - heard, 3),
                    "first_copy": None if visitor is None else self._base_status(arriving, now),
                    "arriving_s": None if arriving is None else round(now - arriving.since, 3),
                    "last_end": self._last_end,
                    "lease_left_s": left_s if state.more.get("expects_primary") else None,
                }
                | self.attempts.status(now)
                | self._durable.status()
                | self._takeover.status(now)
                | {
                    "warnings": list(self._writer.warnings),
                    "primary": {} if visitor is None else unflatten(visitor.status),
                }
            )

    def _base_status(self, arriving: Arriving | None, now: float) -> dict[str, Any] | None:
        base = self.attempts.base
        if base is None or self._writer.position != base.held:
            return None
        return base.status(arriving.bytes if arriving is not None and arriving.is_base else 0, now)

    # The end

    def looks_empty(self) -> bool:
        """Whether nothing was ever committed here, and nobody uses it or tries to.

        A store that was told a term is kept: the term says who must not come back.
        """
        with self._changed:
            return (
                not self._admission.is_closed
                and self._admission.visitor is None
                and not self._is_settling
                and not self.attempts.waits_for_store(time.monotonic())
                and not self._durable.state.term
                and self._writer.position is None
                and self._writer.highest_epoch < 0
            )

    def close_if_empty(self) -> bool:
        """Close and remove the store if nothing was ever committed to it; returns whether it is closed."""
        with suppress(OSError, RemusError), self._durable.settling():
            if not self.looks_empty() or any((self._writer.directory / "segments").iterdir()):
                return False
            self._admission.is_closed = True
            self._writer.remove()
        return self._admission.is_closed

    def stop(self) -> None:
        """Start nothing more, and kill running commands: a takeover runs again when a backup restarts."""
        with self._changed:
            self._admission.is_closed = True
            self._takeover.stop()
            self._changed.notify_all()
        if self._guest is not None:
            self._guest.close()

    def close(self, deadline: float | None = None) -> None:
        """Stop, and close the store, by this time; if it still hangs then, it is abandoned."""
        close_all([self], time.monotonic() + _CLOSE_S if deadline is None else deadline)

    def _begin_closing(self, deadline: float) -> threading.Thread:
        """Begin to close, after `stop`. Waits until the deadline for what must end first, but not for the disk."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._admission.visitor is None and not self._is_settling and not self._takeover.is_running,
                max(deadline - time.monotonic(), 0.0),
            )
        closing = threading.Thread(target=self._durable.close, name=f"closing {self.name}", daemon=True)
        closing.start()
        return closing


def close_all(standbys: Sequence[Standby], deadline: float) -> None:
    """Stop all, and close their stores, by this time or a second later; one that still hangs then is abandoned."""
    for standby in standbys:
        standby.stop()
    closing = [(standby, standby._begin_closing(deadline)) for standby in standbys]
    deadline = max(deadline, time.monotonic() + _RETRY_S)
    for standby, thread in closing:
        thread.join(max(deadline - time.monotonic(), 0.0))
        if thread.is_alive():
            log("store does not close", level=logging.ERROR, name=standby.name, reason="its disk hangs")
