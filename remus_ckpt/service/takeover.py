"""The steps of a takeover: the fence, the promotion, the handing out of memory, and the takeover command.

`failover` decides when to take them. Each step checks once more, at the last moment, that it is still due: between the
decision and the action, the primary may give a sign of life.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from remus_ckpt.errors import RemusError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service import failover
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.service.durable import Durable, Refusal
from remus_ckpt.service.failover import Command, Situation
from remus_ckpt.service.policy import Policy


class _NotRun(RemusError):
    """One of the user's commands cannot be started."""


class Takeover:
    """The steps of one name's takeover, and how far its two commands have got.

    lock: the lock of the name; guards all fields
    situation: what a decision rests on now; called with the lock held
    dismiss: ends the open session, if there is one, with this code and message. Raises Refusal if its thread does not
        return from the disk

    `run_fence`, `promote` and `run_takeover` each run in a thread of their own, without the lock. They return False if
    the disk stopped them: then nothing is tried for a while. The other methods need the lock where they say so.
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
    ) -> None:
        self.name = durable.name
        self._durable = durable
        self._policy = policy
        self._metrics = metrics
        self._lock = lock
        self._situation = situation
        self._dismiss = dismiss
        self.fence = Command() if policy.fence else None
        self.command = Command() if policy.on_failover else None
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
        """How far the commands have got, and what was handed out; see `Standby.status`."""
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
        }

    def _needs_fence(self, now: float) -> bool:
        return not self._is_stopped and not self._durable.is_uncertain and failover.needs_fence(self._situation(), now)

    def _is_due(self, term: int) -> bool:
        self._durable.known_state()
        return not self._is_stopped and failover.Promote(term) in failover.decide(self._situation(), time.monotonic())

    # The fence

    def run_fence(self, before: Command, begun: Command) -> bool:
        """Run the fence, unless its reason has gone. before: what `fence` is reset to in that case"""
        after, is_done = before, True
        try:
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
            is_due = self._is_due(term)
        if is_due:
            # Not yet "fenced": that is final, and the promotion is not durable yet. The next hello gets it.
            self._dismiss("busy", f"{self.name!r} is being taken over")
        with self._lock:
            # The primary may have given a sign of life since the decision.
            if not self._is_due(term):
                return False
            self.is_promoting = True
            self.begin_term()  # an earlier takeover may have left something when the disk failed
        try:
            self._durable.write(term=term, role="promoted", takeover_done=False, expects_primary=False)
        finally:
            with self._lock:
                self.is_promoting = False
        return True

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
            shell = self._start_takeover(begun)
            if shell is None:
                return True
            status = shell.wait(self._policy.takeover_timeout_s)
            if status is None:
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

    def _start_takeover(self, begun: Command) -> ShellCommand | None:
        assert self._policy.on_failover is not None
        with self._durable.settling():
            with self._lock:
                if self._is_stopped or self.command is not begun:
                    return None
            given = self._hand_out()
            log("taking over", level=logging.WARNING, name=self.name, epoch=given["epoch"])
            shell = self._shell(
                self._policy.on_failover,
                {
                    "REMUS_IMAGE": given["image"],
                    "REMUS_DEVICE_STATE": given["device_state"],
                    "REMUS_POSITION": given["position"],
                    "REMUS_EPOCH": str(given["epoch"]),
                },
            )
            with self._lock:
                self._taking_over = shell
                if self._is_stopped:
                    shell.kill()
            return shell

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
