"""Our end of a guard process (guard.py)."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from remus_ckpt.errors import SourceError
from remus_ckpt.source.guard import IGNORED

_GUARD = Path(__file__).with_name("guard.py")
_CLAIM_S = 2.0
_CLAIM_POLL_S = 0.01
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_MAX_FDS = 253
"""Descriptors that one message can carry (SCM_MAX_FD)."""


_ours: weakref.WeakSet[socket.socket | io.FileIO] = weakref.WeakSet()


def _disown() -> None:
    """In a forked child: release guards and claims, which must end with the parent, not with the child."""
    for held in list(_ours):
        held.close()


os.register_at_fork(after_in_child=_disown)


def claim(fd: int) -> io.FileIO | None:
    """Lock an open file that represents something to be stopped, and that only those who may stop it can open for
    writing.

    Returns the file, which then owns the descriptor and holds the lock until it is closed; None, with the descriptor
    closed, if another process has the lock. If it is given to a guard, it stays locked until the guard has resumed what
    we had stopped. The guard of a dead process may need a moment for that, so this call waits a little.
    """
    file = io.FileIO(fd, "r+")
    deadline = time.monotonic() + _CLAIM_S
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
            _ours.add(file)
            return file
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(_CLAIM_POLL_S)


class Guard:
    """A process that resumes what we have stopped if we die first.

    arguments: what to guard, as guard.py expects it
    fds: descriptors among the arguments, and claims
    timeout_s: how long it may take to accept a word, or to answer one
    """

    def __init__(self, *arguments: str, fds: Sequence[int] = (), timeout_s: float = 10.0) -> None:
        self._words, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._words.settimeout(timeout_s)
        _ours.add(self._words)
        # Block these signals until the guard ignores them itself: a service manager may send them to all processes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_GUARD), str(theirs.fileno()), *arguments],
                    pass_fds=[theirs.fileno(), *fds],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except BaseException:
            self._words.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the guard; it resumes what is still stopped."""
        self._words.close()
        self.process.wait()

    def stopping(self, pidfds: Sequence[int] = ()) -> None:
        """Announce a stop. Raises SourceError if the guard is gone: then nothing may be stopped.

        pidfds: of the processes, if it guards processes
        """
        try:
            for start in range(0, max(len(pidfds), 1), _MAX_FDS):
                socket.send_fds(self._words, [b"+" if start else b"S"], pidfds[start : start + _MAX_FDS])
        except OSError:
            raise SourceError("the guard process is gone: nothing was stopped") from None

    def running(self) -> None:
        """Report that everything runs again."""
        with contextlib.suppress(OSError):
            self._words.send(b"C")

    def answer(self, word: bytes) -> str:
        """What was wrong with the command of a word, or an empty string. Raises SourceError if the guard is gone."""
        # The answer to an earlier word may have come after its caller had given up.
        answer = b""
        while answer[:1] != word:
            try:
                answer = self._words.recv(65536)
            except OSError:
                answer = b""
            if not answer:
                raise SourceError("the guard process, which runs the commands, is gone")
        return answer[1:].decode(errors="replace")
