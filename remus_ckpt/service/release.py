"""What waits for commits: the user's callback, or a command that reads a line for each commit."""

from __future__ import annotations

import logging
import math
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from remus_ckpt.errors import RemusError
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import log
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.wire.record import Position

_MOMENT_S = 0.1
_KILLED_S = 10.0
"""What was killed is gone by then, also on a busy machine."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that the backup holds in the way the primary asked for: output held back for it may go out.

    latency_s: from the sending of its first byte to its acknowledgement
    """

    epoch: int
    position: Position
    latency_s: float


class Release:
    """Calls back for each commit, in a thread of its own: the callback may be slow, heartbeats may not.

    Any thread may call any method.
    """

    def __init__(self, call: Callable[[Committed], None]) -> None:
        self._call = call
        self._queue: SimpleQueue[Committed | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name="commits", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many commits the callback has not taken yet."""
        return self._queue.qsize()

    def put(self, commits: Sequence[Committed]) -> None:
        """Deliver commits in order. A commit that is put again is delivered only once."""
        for committed in commits:
            self._queue.put(committed)

    def close(self, timeout_s: float) -> None:
        """Deliver what is committed, and end; there is always at least a moment for that. Raises RemusError if it takes
        longer than the timeout."""
        self._queue.put(None)
        if self._thread is threading.current_thread():
            return
        self._thread.join(min(max(timeout_s, _MOMENT_S), threading.TIMEOUT_MAX))
        if self._thread.is_alive():
            raise RemusError(f"on_commit does not return: it has not been told of {self.waiting - 1:,} commits")

    def _deliver(self) -> None:
        newest = -1
        while (committed := self._queue.get()) is not None:
            if committed.epoch <= newest:
                continue
            newest = committed.epoch
            try:
                self._call(committed)
            except BaseException as error:
                # The callback is the user's code: if it fails, or wants to exit, later commits must still be delivered.
                with suppress(BaseException):
                    log("on_commit failed", level=logging.ERROR, error=error, epoch=committed.epoch)


class ReleaseCommand:
    """A shell command that reads a line for each commit; an `on_commit` for `Primary`.

    If the command is slow, checkpoints wait for it, and after a while a line in the log says so. At the end it gets ten
    seconds to read what is left; then it is killed, with everything it started.

    stop: set when the command stops reading, since nothing else can release the output that waits for commits
    complain: called with what the user must know about the command's end
    last_words_s: those ten seconds
    One thread calls the object, another watches the command; `hurry` and `close` are for its creator.
    """

    def __init__(
        self, name: str, command: str, stop: StopSignal, complain: Callable[[str], None], *, last_words_s: float = 10.0
    ) -> None:
        self._last_words_s = last_words_s
        self._name = name
        self._stop = stop
        self._complain = complain
        self._shell = ShellCommand(command, stdin=subprocess.PIPE, stdout=None, grace_s=last_words_s)
        assert self._shell.stdin is not None
        self._pipe = self._shell.stdin
        os.set_blocking(self._pipe.fileno(), False)
        self._deadline = math.inf
        self._lost: int | None = None
        self._is_over = StopSignal()
        self.is_gone = False
        """Whether the command stopped reading before the end."""
        self.has_failed = False
        self._watcher = threading.Thread(target=self._watch, name="on-commit", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._pipe.fileno(), 0)  # POLLERR (always reported): nobody has the other end
        poll.register(self._shell.fileno(), 0)  # POLLHUP: it has ended, even if a child still has the pipe
        poll.register(self._is_over, select.POLLIN)
        poll.poll()
        if not self._is_over.is_set:
            self.is_gone = True
            log("the --on-commit command has stopped reading", level=logging.ERROR, name=self._name)
            self._stop.set()

    def __call__(self, committed: Committed) -> None:
        if self._lost is None and not self._write(f"{committed.epoch} {committed.position.digest.hex()}\n".encode()):
            self._lost = committed.epoch

    def _write(self, line: bytes) -> bool:
        poll = select.poll()
        poll.register(self._pipe.fileno(), select.POLLOUT)
        say_at = time.monotonic() + self._last_words_s
        while not self.is_gone and (now := time.monotonic()) < self._deadline:
            try:
                os.write(self._pipe.fileno(), line)  # shorter than PIPE_BUF: written whole or not at all
                return True
            except BlockingIOError:
                if now >= say_at:
                    say_at = math.inf
                    text = "the --on-commit command does not read; checkpoints wait for it"
                    log(text, level=logging.ERROR, name=self._name)
                if self._stop.is_set:
                    self.hurry()
                poll.poll(100)
            except BrokenPipeError:
                return False
        return False

    def hurry(self) -> None:
        """The protection is ending: start the command's last seconds."""
        self._deadline = min(self._deadline, time.monotonic() + self._last_words_s)

    def close(self) -> None:
        """Send no more lines; wait for the command to end."""
        self.hurry()
        self._is_over.set()
        self._watcher.join()
        self._is_over.close()
        self._pipe.close()
        status = self._shell.wait(max(self._deadline - time.monotonic(), 1.0))
        if status is None:
            self._complain("the --on-commit command does not exit: it is killed")
            self._shell.kill()
            status = self._shell.wait(_KILLED_S)
        self.has_failed = status != 0 or self.is_gone or self._lost is not None
        if self.has_failed:
            lost = f"; it did not get the commits from epoch {self._lost} on" if self._lost is not None else ""
            held = "; it will not release what it holds back" if self.is_gone else ""
            early = " before the end" if self.is_gone else ""
            ended = "cannot be killed" if status is None else f"ended{early} with status {status}"
            self._complain(f"the --on-commit command {ended}{lost}{held}")
