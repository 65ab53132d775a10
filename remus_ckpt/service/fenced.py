"""What a primary does once another side has taken over: the user's callback or command stops the work here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from remus_ckpt.errors import Fenced, RemusError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.service.turns import Turns

COMMAND_S = 120.0
"""systemd gives a unit 90 s to stop before it kills it."""
_KILL_S = 10.0
_BEAT_S = 1.0


class OnFenced:
    """Calls back when another side has taken over, before anybody is told of it.

    call: None for no callback. It is called once, in the thread that learns of the takeover; if an interrupt ends it,
        the next thread that learns of it calls again. Exceptions from it are logged
    Any thread may call any method. Within the callback, `tell` and `watch` raise ValueError.
    """

    def __init__(self, name: str, call: Callable[[Fenced], None] | None, metrics: Metrics) -> None:
        self._name = name
        self._call = call or (lambda error: None)
        self._metrics = metrics
        self._turns = Turns("on_fenced")
        self._is_said = False
        self._error: Fenced | None = None  # set once the callback has returned

    def check(self) -> None:
        """Raise Fenced if another side is known to have taken over, and the callback has returned."""
        if self._error is not None:
            raise self._error

    def watch(self, check: Callable[[], None]) -> None:
        """Raise what `check` raises. If that is Fenced, call back first; say nothing while another thread does."""
        try:
            check()
        except Fenced as error:
            try:
                self.tell(error, 0.0)
            except RemusError:
                return
            raise

    def tell(self, error: Fenced, timeout_s: float) -> None:
        """Call back, or wait until another thread has. Raises RemusError if that takes longer than the timeout."""
        self._turns.take(lambda: self._call_back(error), timeout_s)

    def _call_back(self, error: Fenced) -> None:
        if self._error is not None:
            return
        if not self._is_said:
            self._is_said = True
            self._metrics.fence(self._name)
            log("fenced", level=logging.ERROR, name=self._name, term=error.term)
        try:
            self._call(error)
        except Exception as fault:  # the user's code: the takeover is a fact all the same
            log("on_fenced failed", level=logging.ERROR, name=self._name, error=fault)
        self._error = error


class FencedCommand:
    """A shell command that stops the work here; an `on_fenced` for `Primary`.

    If it takes longer than `timeout_s`, it is killed with all that it has started. If this process dies meanwhile, the
    command gets that time again before it is killed.

    epoch: gives the last committed epoch, None if there is none
    pids: gives the processes that write to the memory, as far as they are known
    on_turn: called at least every second while the command runs
    """

    def __init__(
        self,
        name: str,
        command: str,
        *,
        epoch: Callable[[], int | None],
        pids: Callable[[], list[int]],
        on_turn: Callable[[], None] | None = None,
        timeout_s: float = COMMAND_S,
    ) -> None:
        self._name = name
        self._command = command
        self._epoch = epoch
        self._pids = pids
        self._turn = on_turn or (lambda: None)
        self._timeout_s = timeout_s

    def __call__(self, error: Fenced) -> None:
        """Run the command to its end; a failure is logged."""
        epoch = self._epoch()
        environment = {
            "REMUS_NAME": self._name,
            "REMUS_TERM": str(error.term),
            "REMUS_EPOCH": "" if epoch is None else str(epoch),
            "REMUS_PIDS": " ".join(map(str, self._pids())),
        }
        try:
            fault = self._run(ShellCommand(self._command, environment, grace_s=self._timeout_s))
        except RemusError as failure:
            fault = str(failure)
        if fault is None:
            log("stopped", name=self._name, command="on-fenced")
        else:
            fault += ": the work may still go on here"
            log("command failed", level=logging.ERROR, name=self._name, command="on-fenced", reason=fault)

    def _run(self, shell: ShellCommand) -> str | None:
        """What went wrong; None if the command has succeeded."""
        deadline = time.monotonic() + self._timeout_s
        while (status := shell.wait(min(max(deadline - time.monotonic(), 0.0), _BEAT_S))) is None:
            self._turn()
            if time.monotonic() >= deadline:
                shell.kill()
                end = "is killed" if shell.wait(_KILL_S) is not None else "cannot be killed"
                return f"it took more than {self._timeout_s:g} s and {end}"
        return f"status {status}" if status else None
