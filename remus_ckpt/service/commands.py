"""Shell commands of the user's: started, awaited, and killed whole (keeper.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from remus_ckpt.errors import RemusError
from remus_ckpt.forks import disown_in_forks

_KEEPER = Path(__file__).with_name("keeper.py")
_UNKNOWN = 255


class ShellCommand:
    """A command that runs in `/bin/sh -c`. If it fails or is killed, so is all that it started; if it succeeds, what
    it leaves running lives on.

    environment: in addition to ours; a NUL in a value, which no environment can hold, becomes U+FFFD
    stdin: reads nothing by default
    stdout: goes where our log goes by default
    grace_s: how long it may go on if this process dies; then it is killed too
    Raises RemusError where it cannot be started. `kill` and `let_be` may be called from any thread.
    """

    def __init__(
        self,
        command: str,
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = 2,
        grace_s: float = 0.0,
    ) -> None:
        self._status: int | None = None
        values = {key: value.replace("\0", "\ufffd") for key, value in (environment or {}).items()}
        self._words, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        disown_in_forks(self)
        try:
            with theirs:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_KEEPER), str(theirs.fileno()), str(grace_s), command],
                    env={**os.environ, **values},
                    stdin=stdin,
                    stdout=stdout,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._words.close()
            raise RemusError(f"`{command}` cannot be started: {error}") from error
        except BaseException:
            self._words.close()
            raise

    @property
    def stdin(self) -> IO[bytes] | None:
        """Where to write what it is to read, with `stdin=PIPE`."""
        return self._keeper.stdin

    def fileno(self) -> int:
        """POLLHUP once it has ended."""
        return self._words.fileno()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit status: 128 and the signal where one ended it; None while it runs.

        With 0 the command has succeeded. With another, nothing that it started is left; 255 where nobody says how it
        ended. One thread waits.
        """
        if self._status is None:
            try:
                status = self._keeper.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
            # Where SIGCHLD is ignored, or somebody else buries our children, Popen takes every end for a good one.
            said = b""
            with suppress(OSError):
                said = self._words.recv(16, socket.MSG_DONTWAIT)
            self._words.close()
            self._status = int(said) if said else 128 - status if status < 0 else status or _UNKNOWN
        return self._status

    def disown(self) -> None:
        """In a fork: the keeper must see when the parent dies."""
        self._words.close()

    def kill(self) -> None:
        """Kill it whole. `wait` returns once all of it is dead."""
        self._say(b"K")

    def let_be(self) -> None:
        """From now on nothing of it is killed, whatever happens here."""
        self._say(b"L")

    def _say(self, word: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._words.send(word)
