"""One protected memory on its backup: who may write to it now, and the way to its promotion.

What is to be done is decided in `failover`; here it is done, noted, and asked for again.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from remus_ckpt.errors import NoCheckpoint, RemusError, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service import failover
from remus_ckpt.service.failover import Accepted, ByHand, Command, FencedOff, Role, Situation
from remus_ckpt.service.observe import Metrics, log, unflatten
from remus_ckpt.session.frames import COMPRESSIONS
from remus_ckpt.session.messages import Hello, StreamShape, Welcome
from remus_ckpt.store import HistoryWriter, Retention, State
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position

_RETRY_S = 1.0
_BUSY_S = 0.02
_PROMOTION_S = 60.0
_MAX_TERM = 1 << 62
"""So that there is always a higher one."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a backup does with what it protects.

    lease_s: a primary that is silent for so long is gone
    automatic: take over then without being asked; `fence` must be there
    fence: a shell command that makes sure that the primary writes and releases nothing more; exit status 0 says so
    fence_timeout_s: one that takes longer is killed and has failed
    on_failover: a shell command that starts the work here; it ends once the work goes on
    retention: what is kept of the past
    names: that may be protected; None for any
    max_names, max_connections: how many there may be
    """

    lease_s: float = 5.0
    automatic: bool = False
    fence: str | None = None
    fence_timeout_s: float = 60.0
    on_failover: str | None = None
    retention: Retention = field(default_factory=Retention)
    names: frozenset[str] | None = None
    max_names: int = 1000
    max_connections: int = 256

    def __post_init__(self) -> None:
        least, most = failover.MIN_LEASE_S, failover.MAX_LEASE_S
        if not least <= self.lease_s <= most:
            raise ValueError(f"a lease of {self.lease_s:g} s; it has {least:g} s to {most:g} s")
        if self.automatic and not self.fence:
            raise ValueError("automatic failover needs a fencing command: without one, two sides may go on at once")


class Refusal(RemusError):
    """Why a visitor is sent away; it is told. code: specs/session.md §7"""

    def __init__(self, code: str, message: str, term: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.term = term


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
        self._visitor: Visitor | None = None
        self._last_peer = ""
        self.trouble: str | None = None
        """What last went wrong on this side, None since it went well."""
        self._heard: float | None = None  # of the sessions that are over; of the one that is open, it says so itself
        self._listening_since = self._looked_at = time.monotonic()
        self._fence = Command() if policy.fence else None
        self._takeover = Command() if policy.on_failover else None
        self._by_hand: ByHand | None = None  # a takeover that somebody asked for and that is not done yet
        self._promoting = False  # a thread is at it
        self._not_before = 0.0  # an action that failed for want of a disk is tried again then
        self._handed_out: dict[str, Any] | None = None  # what the survivor goes on from, once promoted
        self._is_closed = False
        for warning in writer.warnings:
            log("store damaged", level=logging.ERROR, name=name, reason=warning)
        metrics.watch_store(name, writer.directory)
        metrics.set_promoted(name, writer.state.role == "promoted")

    # Primaries

    @contextmanager
    def hosting(self, visitor: Visitor, hello: Hello) -> Iterator[HistoryWriter]:
        """Let a primary write for as long as it stays. Raises Refusal for one that may not."""
        with self._changed:
            current = self._visitor
            if current is not None and (
                current.run_id == hello.run or time.monotonic() - current.heard > self._policy.lease_s
            ):
                # It is the same one, whose old connection we have not yet missed; or that one is gone.
                self._dismiss("busy", "another connection has taken the place of this one")
            if hello.term is not None and hello.term > _MAX_TERM:
                raise Refusal("limit", f"term {hello.term} is beyond all takeovers; a term is at most {_MAX_TERM}")
            state, answer = self._admit(hello)
            if isinstance(answer, Accepted) and self._visitor is not None:
                self._dismiss("fenced", f"a primary of term {answer.term} has come", answer.term)
                state, answer = self._admit(hello)  # it may have been promoted while we waited
            match answer:
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
                    if self._promoting or self._visitor is not None:
                        raise Refusal("busy", f"{self.name!r} is being taken over")
                    # It is there, whatever this side has to say to it next.
                    self._heard = time.monotonic()
                    if state.role == "promoted":
                        self._by_hand, self._handed_out = None, None
                        self._takeover = self._takeover and Command()
                    self._set_state(term=term, role="standby", expects_primary=True, takeover_done=False)
            self._visitor = visitor
            self._last_peer = visitor.peer
            self._heard = time.monotonic()
        self._metrics.set_term(self.name, term)
        self._metrics.set_connected(self.name, True)
        self._metrics.set_promoted(self.name, False)
        log("primary connected", name=self.name, peer=visitor.peer, term=term)
        try:
            yield self._writer
        except StoreError as error:
            self.trouble = str(error)
            self._metrics.store_failed(self.name)
            raise
        finally:
            with self._changed:
                self._heard = max(self._heard, visitor.heard)
                try:
                    self._writer.abandon()
                except StoreError as error:
                    log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
                self._visitor = None
                self._changed.notify_all()
            self._metrics.set_connected(self.name, False)
            self._wake()

    def _admit(self, hello: Hello) -> tuple[State, Accepted | FencedOff | failover.Busy]:
        state = self._writer.state
        return state, failover.admit(state.term, Role(state.role), hello.term, self._visitor is not None)

    def _dismiss(self, code: str, message: str, term: int | None = None) -> None:
        """End the session that is open; with the lock held, which its thread needs to leave."""
        assert self._visitor is not None
        visitor = self._visitor
        visitor.end(code, message, term)
        if not self._changed.wait_for(lambda: self._visitor is not visitor, self._policy.lease_s):
            raise Refusal("busy", f"the session of {visitor.peer} has not ended yet: try again")

    def _set_state(self, **changes: Any) -> None:
        state = self._writer.state
        known = {"term": state.term, "role": state.role, **state.more}
        if any(known.get(key) != value for key, value in changes.items()):
            self._writer.set_state(**changes)

    def welcome(self, hello: Hello, limits: Limits) -> Welcome:
        """What the primary that has just been let in is to know."""
        shape = self._writer.stream
        return Welcome(
            program=f"remus_ckpt {__version__}",
            term=self._writer.state.term,
            position=self._writer.position,
            highest_epoch=self._writer.highest_epoch if self._writer.highest_epoch >= 0 else None,
            stream=None if shape is None else StreamShape(shape.codec, shape.word, shape.p2m_size),
            compressions=tuple(name for name in COMPRESSIONS if name in hello.compressions),
            limits={"memory_bytes": limits.memory_bytes, "checkpoint_bytes": limits.checkpoint_bytes},
            lease_s=self._policy.lease_s,
        )

    def said_goodbye(self, reason: str) -> None:
        """The primary has ended in an orderly way: nothing is to be taken over from it."""
        log("goodbye", name=self.name, reason=reason)
        with self._changed:
            self._set_state(expects_primary=False)

    def stored(self, position: Position, seconds: float) -> None:
        """A checkpoint has been acknowledged, so long after its commit came."""
        self.trouble = None
        self._metrics.committed(self.name, position.epoch, seconds, time.time(), position.digest)

    # Decisions

    def turn(self, now: float) -> float:
        """Do what is due now; returns when to ask again."""
        # Whoever holds the lock may be waiting for the disk, and who asks here has others to serve.
        if not self._changed.acquire(blocking=False):
            return now + _BUSY_S
        try:
            return self._act(now)
        finally:
            self._changed.release()

    def _act(self, now: float) -> float:
        self._listening_since = failover.listening_since(
            self._listening_since, self._looked_at, now, self._policy.lease_s
        )
        self._looked_at = now
        if self._promoting or self._is_closed:
            return now + self._policy.lease_s
        if now < self._not_before:
            return self._not_before
        for action in failover.decide(self._situation(), now):
            match action:
                case failover.WaitUntil(at):
                    return at
                case failover.RunFence(attempt):
                    if not self._can_promote(attempt):
                        self._not_before = now + _RETRY_S
                        return self._not_before
                    self._fence = Command.begun(attempt, now)
                    self._start(self._run_fence)
                case failover.Promote(term):
                    self._promoting = True
                    self._start(self._promote, term)
                case failover.RunTakeover(term, attempt):
                    self._takeover = Command.begun(attempt, now)
                    self._start(self._run_takeover, self._takeover)
        return now + self._policy.lease_s

    def _can_promote(self, attempt: int) -> bool:
        """Whether a promotion could be written down: nobody is fenced for the sake of one that cannot be."""
        try:
            self._writer.set_state(fencing=attempt)
        except StoreError as error:
            if self.trouble != str(error):
                self._metrics.store_failed(self.name)
                log("store failed", level=logging.ERROR, name=self.name, reason=str(error))
            self.trouble = str(error)
            return False
        return True

    def _situation(self) -> Situation:
        state = self._writer.state
        heard = [time for time in (self._heard, self._visitor.heard if self._visitor else None) if time is not None]
        return Situation(
            term=state.term,
            role=Role(state.role),
            has_checkpoint=self._writer.position is not None,
            expects_primary=bool(state.more.get("expects_primary")),
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

    def _run_fence(self) -> None:
        assert self._policy.fence is not None
        log("fencing", level=logging.WARNING, name=self.name, peer=self._last_peer)
        succeeded = self._command(
            self._policy.fence, {"REMUS_PEER": self._last_peer}, timeout_s=self._policy.fence_timeout_s
        )
        with self._changed:
            assert self._fence is not None
            self._fence = self._fence.ended(succeeded, time.monotonic())
            self.trouble = None if succeeded else "the fencing command failed: nothing was promoted"
            if not succeeded:
                self._metrics.command_failed(self.name, "fence")
            self._changed.notify_all()
        self._wake()

    def _promote(self, term: int) -> None:
        try:
            with self._changed:
                # Between the decision and this lock there was time for a sign of life.
                if self._is_closed or failover.Promote(term) not in failover.decide(
                    self._situation(), time.monotonic()
                ):
                    return
                if self._visitor is not None:
                    # Not yet "fenced": that is for good, and it is not durable yet. Its next hello will hear it.
                    self._dismiss("busy", f"{self.name!r} is being taken over")
                self._writer.set_state(term=term, role="promoted", takeover_done=False, expects_primary=False)
                log("promoted", level=logging.WARNING, name=self.name, term=term, epoch=self._epoch())
                self._metrics.set_term(self.name, term)
                self._metrics.set_promoted(self.name, True)
                self._hand_out()
        except RemusError as error:
            log("promotion failed", level=logging.ERROR, name=self.name, reason=str(error))
            if isinstance(error, StoreError):
                self._metrics.store_failed(self.name)
            self.trouble = str(error)
            with self._changed:
                self._not_before = time.monotonic() + _RETRY_S
        finally:
            with self._changed:
                self._promoting = False
                self._changed.notify_all()
            self._wake()

    def _epoch(self) -> int | None:
        return None if self._writer.position is None else self._writer.position.epoch

    def _whole_position(self) -> str | None:
        position = self._writer.position
        return None if position is None else f"{position.epoch}:{position.digest.hex()}"

    def _hand_out(self) -> dict[str, Any]:
        """The image and the device state, as files of their own: whoever goes on from them may write to them."""
        if self._handed_out is None:
            state = self._writer.state
            image, device_state = self._writer.hand_out()
            self._handed_out = {
                "name": self.name,
                "term": state.term,
                "epoch": self._epoch(),
                "position": self._whole_position(),
                "image": str(image),
                "device_state": str(device_state),
            }
        return self._handed_out

    def _run_takeover(self, begun: Command) -> None:
        assert self._policy.on_failover is not None
        succeeded = False
        try:
            with self._changed:
                if self._is_closed or self._takeover is not begun:
                    return
                given = self._hand_out()
            log("taking over", level=logging.WARNING, name=self.name, epoch=given["epoch"])
            succeeded = self._command(
                self._policy.on_failover,
                {
                    "REMUS_IMAGE": given["image"],
                    "REMUS_DEVICE_STATE": given["device_state"],
                    "REMUS_POSITION": given["position"],
                },
            )
            with self._changed:
                if succeeded and self._takeover is begun and not self._is_closed:
                    self._writer.set_state(takeover_done=True)
        except RemusError as error:
            succeeded = False
            log("takeover failed", level=logging.ERROR, name=self.name, reason=str(error))
        with self._changed:
            if self._takeover is begun:  # or a primary of a later term has come, and this says nothing of that
                self._takeover = begun.ended(succeeded, time.monotonic())
                self.trouble = None if succeeded else "the takeover command failed; it is tried again"
                if not succeeded:
                    self._metrics.command_failed(self.name, "takeover")
            self._changed.notify_all()
        self._wake()

    def _command(self, command: str, environment: dict[str, str], timeout_s: float | None = None) -> bool:
        """Run a user's command; whether it succeeded. What it prints goes where our log goes."""
        state = self._writer.state
        own = {"REMUS_NAME": self.name, "REMUS_TERM": str(state.term), "REMUS_EPOCH": str(self._epoch())}
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        except OSError as error:
            log("command failed", level=logging.ERROR, name=self.name, command=command, reason=str(error))
            return False
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            log("command too slow", level=logging.ERROR, name=self.name, command=command, timeout_s=timeout_s)
            return False
        if status:
            log("command failed", level=logging.ERROR, name=self.name, command=command, status=status)
        return status == 0

    # Users

    def take_over(self, *, fence: bool) -> dict[str, Any]:
        """Promote by hand, now; returns what the survivor goes on from.

        Raises NoCheckpoint where nothing is committed, RemusError where the fencing fails or it takes too long.
        """
        with self._changed:
            if self._writer.state.role != "promoted":
                if self._writer.position is None:
                    raise NoCheckpoint(f"nothing is committed under the name {self.name!r}")
                if fence and self._fence is None:
                    raise RemusError("there is no fencing command: start the backup with --fence, or do it yourself")
                wish = self._by_hand = ByHand(time.monotonic(), fence)
                self._wake()
                self._changed.wait_for(lambda: self._handed_out is not None or self._has_failed(wish), _PROMOTION_S)
                if self._handed_out is None:
                    if self._by_hand is wish and not self._promoting:
                        self._by_hand = None
                    if self._has_failed(wish):
                        raise RemusError("the fencing command failed: nothing was promoted")
                    raise RemusError(f"not promoted within {_PROMOTION_S:g} s: see the backup's log")
            return self._hand_out()

    def _has_failed(self, wish: ByHand) -> bool:
        """Whether the fence has that was run for it; an earlier one says nothing."""
        fence = self._fence if wish.fence else None
        return fence is not None and fence.phase is failover.Phase.FAILED and fence.began_at >= wish.at

    def status(self) -> dict[str, Any]:
        """What there is to say of it.

        fence, takeover: how far that command is, None without one
        fence_retry_s, takeover_retry_s: when one that failed is run again, None where it is not
        """
        now = time.monotonic()
        with self._changed:
            state = self._writer.state
            visitor = self._visitor
            heard = self._heard if visitor is None else visitor.heard
            actions = failover.decide(self._situation(), now)

            def phase(command: Command | None) -> str | None:
                return None if command is None else command.phase.value

            def retry_s(command: Command | None) -> float | None:
                if command is None or command.phase is not failover.Phase.FAILED:
                    return None
                at = command.retry_at()
                return round(at - now, 3) if failover.WaitUntil(at) in actions else None

            is_done = state.role == "promoted" and state.more.get("takeover_done")
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
                "image": None if self._handed_out is None else self._handed_out["image"],
                "trouble": self.trouble,
                "warnings": list(self._writer.warnings),
                "primary": {} if visitor is None else unflatten(visitor.status),
            }

    def close_if_empty(self) -> bool:
        """Let go of the store and remove it, if nothing was ever committed to it; whether that was done.

        A term that it was told is kept: it says who must not come back.
        """
        with self._changed:
            writer = self._writer
            if self._is_closed or self._visitor is not None or self._promoting or writer.state.term:
                return False
            if (
                writer.position is not None
                or writer.highest_epoch >= 0
                or any((writer.directory / "segments").iterdir())
            ):
                return False
            self._is_closed = True
            writer.close()
            with suppress(OSError):
                shutil.rmtree(writer.directory)
            return True

    def close(self) -> None:
        """Let go of the store. A takeover command that still runs then is run again when a backup is started anew."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._visitor is None
                    and not self._promoting
                    and not (self._takeover and self._takeover.phase is failover.Phase.RUNNING)
                ),
                self._policy.lease_s,
            )
            self._is_closed = True
            self._writer.close()
