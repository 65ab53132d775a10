"""The steps of a takeover: its record in the commit log, the fence, the promotion, the handing out of memory, and the
takeover command.

`failover` decides when to take them. Each step checks once more, at the last moment, that it is still due: between the
decision and the action, the primary may give a sign of life.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from remus_ckpt.errors import Malformed, NoCheckpoint, RemusError, StoreError
from remus_ckpt.fleet.claims import Claims, Denied
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service import failover
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.service.durable import Durable, Refusal
from remus_ckpt.service.failover import Command, Situation
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.vms import NO_GUEST, GuestStandby
from remus_ckpt.store.history import History
from remus_ckpt.vm.part import is_vm
from remus_ckpt.wire.record import Position


class _NotRun(RemusError):
    """One of the user's commands cannot be started."""


class Consent(Protocol):
    """Others who must agree before a name is taken over here: a fleet, in which another backup may have the name."""

    def check(self, name: str, term: int) -> None:
        """Raise RemusError if a takeover could not follow: then nobody is fenced for it. term: of the store"""

    def claim(self, name: str, term: int, *, is_certain: bool = False) -> None:
        """Have the others know that the name is taken over here, under this term. Raises RemusError: then nothing is
        promoted, unless is_certain: it has happened, and the others have no say."""


class Takeover:
    """The steps of one name's takeover, and how far its two commands have got.

    lock: the lock of the name; guards all fields
    situation: what a decision rests on now; called with the lock held
    guest: the QEMU that goes on with a guest; None where guests are not run
    claims: the commit log, as far as it concerns this name; None without one
    dismiss: ends the open session, if there is one, with this code and message. Raises Refusal if its thread does not
        return from the disk
    consent: of others; None if nobody is asked

    `look`, `claim`, `run_fence`, `promote` and `run_takeover` each run in a thread of their own, without the lock. They
    return False if the disk or the log stopped them: then nothing is tried for a while. The other methods need the lock
    where they say so.
    """

    def __init__(
        self,
        durable: Durable,
        policy: Policy,
        metrics: Metrics,
        lock: threading.Condition,
        *,
        situation: Callable[[], Situation],
        dismiss: Callable[[str, str], None],
        guest: GuestStandby | None = None,
        claims: Claims | None = None,
        consent: Consent | None = None,
    ) -> None:
        self.name = durable.name
        self._durable = durable
        self._policy = policy
        self._metrics = metrics
        self._lock = lock
        self._situation = situation
        self._dismiss = dismiss
        self._guest = guest
        self._claims = claims
        self.claimed: int | None = None
        """The term of our takeover that is in the commit log, while the store is no further."""
        self.claimed_at = 0.0
        self.is_in_doubt = claims is not None
        """Whether the log may have a takeover of ours that is not known here: after a start, after an append without an
        answer, and after each session, which such a takeover may have ended."""
        self._look_trouble: str | None = None
        self.denied_at = -math.inf
        """When the log last said that this backup must not take over."""
        self._consent = consent
        self.fence = Command() if policy.fence else None
        self.command = Command() if policy.on_failover or policy.run_vms else None
        """The takeover command. Whoever starts `run_takeover` stores the run that has begun here (`run_fence`: in
        `fence`)."""
        self._fencing: ShellCommand | None = None
        self._taking_over: ShellCommand | None = None
        self._handed_out: dict[str, Any] | None = None
        self.is_promoting = False
        """The promotion is being written, and can no longer be cancelled."""
        self._is_stopped = False

    # These need the lock

    @property
    def is_fencing(self) -> bool:
        """Whether a fence is running, or dying."""
        return self._fencing is not None

    @property
    def is_running(self) -> bool:
        """Whether one of the commands is running."""
        return self._fencing is not None or self._taking_over is not None

    @property
    def given(self) -> dict[str, Any] | None:
        """What the survivor continues from, while the term in which it was handed out is in force."""
        given, state = self._handed_out, self._durable.state
        is_in_force = given is not None and (state.role, state.term) == ("promoted", given["term"])
        return given if is_in_force else None

    def end_vain_fence(self, now: float) -> None:
        """Kill a fence whose reason is gone, so that it does not stop a primary that is back."""
        if self._fencing is not None and not self._needs_fence(now):
            self._fencing.kill()

    def begin_term(self) -> None:
        """Another term begins: forget the earlier takeover.

        A takeover command that still runs is left alone: the work it has started is what is protected now.
        """
        self.command = self.command and Command()
        if self._taking_over is not None:
            self._taking_over.let_be()
            self._taking_over = None

    def stop(self) -> None:
        """Start nothing more, and kill running commands: a takeover runs again when a backup restarts."""
        self._is_stopped = True
        for shell in (self._fencing, self._taking_over):
            if shell is not None:
                shell.kill()

    def status(self, now: float) -> dict[str, Any]:
        """How far the commands have got, and what was handed out; see `Standby.status` and `GuestStandby.status`."""
        state = self._durable.state
        actions = failover.decide(self._situation(), now)

        def phase(command: Command | None) -> str | None:
            return None if command is None else command.phase.value

        def retry_s(command: Command | None) -> float | None:
            if command is None or command.phase is not failover.Phase.FAILED:
                return None
            at = command.retry_at()
            return round(at - now, 3) if failover.WaitUntil(at) in actions else None

        is_done = state.role == "promoted" and state.more.get("takeover_done")
        return {
            "fence": phase(self.fence),
            "fence_retry_s": retry_s(self.fence),
            "takeover": "succeeded" if is_done else phase(self.command),
            "takeover_retry_s": retry_s(self.command),
            "image": None if self.given is None else self.given["image"],
        } | (NO_GUEST if self._guest is None else self._guest.status())

    def _needs_fence(self, now: float) -> bool:
        return not self._is_stopped and not self._durable.is_uncertain and failover.needs_fence(self._situation(), now)

    def _is_due(self, action: failover.Action) -> bool:
        self._durable.known_state()
        return not self._is_stopped and action in failover.decide(self._situation(), time.monotonic())

    # The commit log

    def look(self) -> bool:
        """Find out whether the log has a takeover of ours that the store does not know."""
        try:
            self.resolve()
        except RemusError as error:
            self._look_trouble = self._durable.trouble = str(error)
            return False
        if self._look_trouble is not None and self._durable.trouble == self._look_trouble:
            self._durable.trouble = self._look_trouble = None
        return True

    def resolve(self) -> None:
        """As `look`, for a caller that wants to know. Raises LogError, Malformed, StoreError."""
        state = self._durable.known_state()
        store = state.more.get("log_store")
        found = None
        if self._claims is not None:
            _ = self._claims.identity  # so that it is known
            if isinstance(store, str) and state.role != "promoted":
                found = self._claims.find(term=state.term, store=store)
        with self._lock:
            self.is_in_doubt = False
            self._note_claimed(found)

    def _note_claimed(self, term: int | None) -> None:
        if term is not None and self.claimed is None and self._durable.state.role != "promoted":
            self.claimed, self.claimed_at = term, time.monotonic()
            log("takeover logged", level=logging.WARNING, name=self.name, term=term)
        self._lock.notify_all()

    def claim(self, term: int) -> bool:
        """Append the takeover to the commit log, unless its reason has gone."""
        try:
            self.ask_others()
            with self._durable.settling():
                with self._lock:
                    is_due = self._is_due(failover.Claim(term))
                if is_due:
                    self._dismiss("busy", f"{self.name!r} is being taken over")
                with self._lock:
                    # The primary may have given a sign of life since the decision.
                    if not self._is_due(failover.Claim(term)):
                        return True
                found = self._append_claim(term)
            with self._lock:
                self.is_in_doubt = False
                self._note_claimed(found)
        except Denied as error:
            with self._lock:
                self._durable.trouble = str(error)
                self.denied_at = time.monotonic()
                self._lock.notify_all()
            log("takeover denied", level=logging.ERROR, name=self.name, reason=str(error))
            return False
        except Exception as error:  # it may be in the log, or come into it
            with self._lock:
                self.is_in_doubt = True
                self._durable.trouble = str(error)
            log("takeover not logged", level=logging.ERROR, name=self.name, reason=str(error))
            return False
        return True

    def ask_others(self) -> None:
        """Raise RemusError if others do not agree to a takeover from here.

        Nobody is asked where the log decides. The others may believe that a name has moved already, while the log has
        its last commit here: then nobody else may go on.
        """
        if self._consent is not None and not self._is_logged():
            self._consent.check(self.name, self._durable.state.term)

    def _is_logged(self) -> bool:
        with self._lock:
            return self._situation().is_logged

    def could_claim(self) -> bool:
        """Whether the log would take a takeover from here. Raises LogError, Malformed, StoreError."""
        newest = self._durable.writer.position
        if self._claims is None or newest is None:
            return False
        _ = self._claims.identity  # so that it is known
        if not self._is_logged():
            return False
        state = self._durable.known_state()
        store = str(state.more.get("log_store") or self._claims.new_store())
        return self._claims.could_take_over(
            term=state.term, store=store, newest=newest, holds=lambda position: self._holds(newest, position)
        )

    def _append_claim(self, term: int) -> int:
        """Returns the term that is in the log. Raises Denied, LogError, StoreError."""
        assert self._claims is not None
        store = self._durable.known_state().more.get("log_store")
        if not isinstance(store, str):
            store = self._claims.new_store()
            self._durable.write(log_store=store)  # a restart must know its own takeover
        newest = self._durable.writer.position
        assert newest is not None  # only a name with a checkpoint is taken over
        return self._claims.take_over(
            term=term - 1, store=store, newest=newest, holds=lambda position: self._holds(newest, position)
        )

    def _holds(self, newest: Position, position: Position) -> bool:
        """Whether the newest checkpoint is, or was built on, that position."""
        if position == newest or position.epoch > newest.epoch:
            return position == newest
        try:
            return History(self._durable.writer.directory).find(position.epoch).position == position
        except (NoCheckpoint, Malformed, StoreError, OSError):
            return False

    # The fence

    def run_fence(self, before: Command, begun: Command) -> bool:
        """Run the fence, unless its reason has gone. before: what `fence` is reset to in that case"""
        after, is_done = before, True
        try:
            if self._consent is not None and self.claimed is None:
                self._consent.check(self.name, self._durable.state.term)
            shell = self._start_fence(begun)
            if shell is not None:
                after = self._await_fence(shell, begun)
        except _NotRun as error:
            after = self._fence_ended(begun, str(error))
        except Exception as error:  # no promotion could follow, so no fence was run
            self._durable.trouble = str(error)
            is_done = False
        with self._lock:
            self._fencing = None
            self.fence = after
            self._lock.notify_all()
        return is_done

    def _start_fence(self, begun: Command) -> ShellCommand | None:
        """Start the fence; None if its reason is gone. Raises RemusError if no promotion could follow: then nobody is
        fenced."""
        assert self._policy.fence is not None
        with self._durable.settling():
            self._durable.write(always=True, fencing=begun.attempt)
            with self._lock:
                is_silent = self._needs_fence(time.monotonic()) and self._situation().by_hand is None
            if is_silent:
                # A primary that is alive sends a new hello, and is let in once this fence is dead.
                self._dismiss("timeout", f"nothing came for {self._policy.lease_s:g} s")
            with self._lock:
                if not self._needs_fence(time.monotonic()):
                    return None
            peer = self._durable.peer
            log("fencing", level=logging.WARNING, name=self.name, peer=peer and peer.text)
            shell = self._shell(
                self._policy.fence,
                {
                    "REMUS_PEER": peer.text if peer else "",
                    "REMUS_PEER_HOST": peer.host if peer else "",
                    "REMUS_PEER_PORT": str(peer.port) if peer and peer.port else "",
                    "REMUS_PEER_CERT": peer.certificate if peer else "",
                },
            )
            with self._lock:
                self._fencing = shell
                self.end_vain_fence(time.monotonic())
            return shell

    def _await_fence(self, shell: ShellCommand, begun: Command) -> Command:
        timeout_s = self._policy.fence_timeout_s
        status = shell.wait(timeout_s)
        is_late = status is None
        if is_late:
            shell.kill()
            status = shell.wait()  # a command that cannot be killed may still act: wait for it
        with self._lock:
            if not self._needs_fence(time.monotonic()):
                log("fence called off", level=logging.WARNING, name=self.name)
                return Command()
        if is_late:
            return self._fence_ended(begun, f"it took more than {timeout_s:g} s")
        return self._fence_ended(begun, f"status {status}" if status else None)

    def _fence_ended(self, begun: Command, fault: str | None) -> Command:
        self._durable.trouble = None if fault is None else f"the fencing command failed ({fault}): nothing was promoted"
        if fault is not None:
            self._metrics.command_failed(self.name, "fence")
            log("command failed", level=logging.ERROR, name=self.name, command="fence", reason=fault)
        return begun.ended(fault is None, time.monotonic())

    # The promotion

    def promote(self, term: int | None) -> bool:
        """Promote under this term (None: already promoted), and hand out what the survivor continues from."""
        try:
            with self._durable.settling():
                if term is None or self._make_promoted(term):
                    self._hand_out()
        except Exception as error:
            self._durable.trouble = str(error)
            log("promotion failed", level=logging.ERROR, name=self.name, reason=str(error))
            return False
        return True

    def _make_promoted(self, term: int) -> bool:
        """Promote the store; returns whether it is promoted. Raises RemusError."""
        with self._lock:
            is_due = self._is_due(failover.Promote(term))
        if is_due:
            # Not yet "fenced": that is final, and the promotion is not durable yet. The next hello gets it.
            self._dismiss("busy", f"{self.name!r} is being taken over")
        with self._lock:
            # The primary may have given a sign of life since the decision.
            if not self._is_due(failover.Promote(term)):
                return False
            self.is_promoting = True
            self.begin_term()  # an earlier takeover may have left something when the disk failed
        try:
            self._tell_others(term)
            self._durable.write(term=term, role="promoted", takeover_done=False, expects_primary=False)
        finally:
            with self._lock:
                self.is_promoting = False
        with self._lock:
            self.claimed = None
        return True

    def _tell_others(self, term: int) -> None:
        """Raises RemusError if the others do not agree, and nothing else says that they must."""
        if self._consent is None:
            return
        # With the takeover in the log that the primary commits to, nobody else can go on, whatever the others know.
        is_certain = self.claimed is not None and self._is_logged()
        try:
            self._consent.claim(self.name, term, is_certain=is_certain)
        except RemusError as error:
            if not is_certain:
                raise
            log("fleet not told", level=logging.WARNING, name=self.name, reason=str(error))

    def _hand_out(self) -> dict[str, Any]:
        """Hand out the image and the device state as separate files, which the survivor may write to.

        Raises StoreError, and Refusal if a primary has been let in meanwhile: the memory is that primary's again.
        """
        if (given := self.given) is not None:
            return given
        state = self._durable.known_state()
        if state.role != "promoted":
            raise Refusal("busy", f"{self.name!r} is protected again, under term {state.term}")
        with self._durable.writing():
            writer = self._durable.writer
            image, device_state = writer.hand_out()
            position = writer.handed_out or writer.position
        assert position is not None  # only a name with a checkpoint is promoted
        handed_out = {
            "name": self.name,
            "term": state.term,
            "epoch": position.epoch,
            "position": f"{position.epoch}:{position.digest.hex()}",
            "image": str(image),
            "device_state": str(device_state),
        }
        with self._lock:
            self._handed_out = handed_out
            self._lock.notify_all()
        return handed_out

    # The takeover command

    def run_takeover(self, begun: Command) -> bool:
        """Hand out the memory, and run the command; if a primary of a later term comes, the command is left running."""
        succeeded = False
        reason = "the takeover command failed; it is tried again"
        try:
            is_due, shell = self._start_takeover(begun)
            if not is_due:
                return True
            status = 0 if shell is None else shell.wait(self._policy.takeover_timeout_s)
            if shell is not None and status is None:
                reason = f"the takeover command took more than {self._policy.takeover_timeout_s:g} s: it is killed"
                self._kill_takeover(shell, reason)
                status = shell.wait()  # a command that cannot be killed may still act: do not rerun it
                reason += ", and is tried again"
            succeeded = status == 0
            if not succeeded:
                log("command failed", level=logging.ERROR, name=self.name, command="takeover", status=status)
        except Exception as error:
            reason = f"{error}; the takeover is tried again"
            log("takeover failed", level=logging.ERROR, name=self.name, reason=str(error))
        with self._lock:
            is_ours = self.command is begun  # else a primary of a later term has come
            if is_ours:
                self._taking_over = None
                self.command = begun.ended(succeeded, time.monotonic())
                self._durable.trouble = None if succeeded else reason
                if succeeded:
                    self._durable.owe(takeover_done=True)
            self._lock.notify_all()
        if is_ours and not succeeded:
            self._metrics.command_failed(self.name, "takeover")
        return self._durable.pay() if is_ours and succeeded else True

    def _kill_takeover(self, shell: ShellCommand, reason: str) -> None:
        with self._lock:
            if self._taking_over is not shell:
                return  # the work it started is protected by now
            shell.kill()
            self._durable.trouble = reason
        log("command does not end", level=logging.ERROR, name=self.name, command="takeover", reason=reason)

    def _start_takeover(self, begun: Command) -> tuple[bool, ShellCommand | None]:
        """Let a guest go on, and start the command, if there is one. Returns whether that was still due, and the
        command."""
        with self._durable.settling():
            with self._lock:
                if self._is_stopped or self.command is not begun:
                    return False, None
            given = self._hand_out()
            log("taking over", level=logging.WARNING, name=self.name, epoch=given["epoch"])
            qmp = "" if self._guest is None else self._go_on(self._guest, given)
            if self._policy.on_failover is None:
                return True, None
            shell = self._shell(
                self._policy.on_failover,
                {
                    "REMUS_IMAGE": given["image"],
                    "REMUS_DEVICE_STATE": given["device_state"],
                    "REMUS_POSITION": given["position"],
                    "REMUS_EPOCH": str(given["epoch"]),
                    "REMUS_QMP": qmp,
                },
            )
            with self._lock:
                self._taking_over = shell
                if self._is_stopped:
                    shell.kill()
            return True, shell

    def _go_on(self, guest: GuestStandby, given: dict[str, Any]) -> str:
        """Let the guest go on, unless it has already, and return its QMP socket; "" if it is no guest.

        Raises RemusError, OSError.
        """
        if guest.has_gone_on(given["term"]):
            return str(guest.socket(given["term"]))
        if not os.path.exists(given["image"]):  # an earlier try came so far that the guest may have run on it
            with self._lock:
                self._handed_out = None
            given = self._hand_out()
        device_state = Path(given["device_state"]).read_bytes()
        if not is_vm(device_state):
            return ""
        guest.take_over(given["term"], Path(given["image"]), device_state)
        return str(guest.socket(given["term"]))

    def _shell(self, command: str, environment: dict[str, str]) -> ShellCommand:
        """Start one of the user's commands. Raises _NotRun."""
        own = {
            "REMUS_NAME": self.name,
            "REMUS_TERM": str(self._durable.known_state().term),
            "REMUS_EPOCH": str(self._durable.epoch),
        }
        try:
            return ShellCommand(command, own | environment)
        except RemusError as error:
            raise _NotRun(str(error)) from error
