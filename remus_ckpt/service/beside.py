"""Processes that work beside a backup on its store: one keeps the page indexes up to date (specs/store.md §5.2), one
archives (specs/archive.md)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from remus_ckpt.observe.log import log

PAUSE_S = 5.0
_ANEW_S = 60.0
"""A process that has ended is not started again sooner."""


class Beside:
    """Starts a process once there is something to do, and ends it with the backup.

    command: what follows the name of Python
    is_needed: whether anything is in the store
    trouble: what the log says if the process cannot be started; the backup does without it
    on_line: called with each line that the process prints, by one thread
    """

    def __init__(
        self,
        command: list[str],
        is_needed: Callable[[], bool],
        trouble: str,
        on_line: Callable[[bytes], None] = lambda line: None,
    ) -> None:
        self._command = [sys.executable, *command]
        self._is_needed = is_needed
        self._trouble = trouble
        self._on_line = on_line
        self._is_started = False
        self._is_over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=command[1], daemon=True)

    def look(self) -> None:
        """Start the thread that looks after the process once that is needed. To be called now and then, by one thread;
        never waits."""
        if self._is_started or not self._is_needed():
            return
        self._is_started = True
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads are allowed
            log(self._trouble, level=logging.WARNING, reason=str(error))

    def close(self) -> None:
        """End the process. May be called again."""
        self._is_over.set()
        if self._process is not None:
            _kill(self._process)
        if self._thread.ident is not None:
            self._thread.join(PAUSE_S)

    def _run(self) -> None:
        pause = PAUSE_S
        while not self._is_over.wait(pause):
            try:
                self._one_process()
            except OSError as error:
                log(self._trouble, level=logging.WARNING, reason=str(error))
            pause = _ANEW_S

    def _one_process(self) -> None:
        """Run a process until it or the backup ends. Raises OSError."""
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            self._process = process
            try:
                assert process.stdout is not None
                while not self._is_over.is_set() and (line := process.stdout.readline()):
                    self._on_line(line)
            finally:
                _kill(process)  # it can be ended at any point


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process. One that runs only where nobody else does would take its time to end, too."""
    if process.poll() is not None:
        return
    with suppress(OSError):  # it has ended
        os.sched_setscheduler(process.pid, os.SCHED_OTHER, os.sched_param(0))
    process.kill()
