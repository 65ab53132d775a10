"""The user's shell commands: started, awaited, and killed with everything they started (keeper.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from remus_ckpt.errors import RemusError
from remus_ckpt.forks import disown_in_forks

_KEEPER = Path(__file__).with_name("keeper.py")
_UNKNOWN = 255


class ShellCommand:
    """A command that runs in `/bin/sh -c`. If the command fails or is killed, everything it started is killed too; if
    it succeeds, what it left running lives on.

    environment: added to ours; a NUL in a value, which no environment can hold, becomes U+FFFD
    stdin: empty by default
    stdout: goes where our log goes by default
    pass_fds: descriptors that the command inherits
    grace_s: how long the command may outlive this process before it is killed
    Raises RemusError if it cannot be started. `kill` and `let_be` may be called from any thread.
    """

    def __init__(
        self,
        command: str,
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = 2,
        pass_fds: Sequence[int] = (),
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
                    pass_fds=[theirs.fileno(), *pass_fds],
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
        """The pipe to the command's standard input, with `stdin=PIPE`."""
        return self._keeper.stdin

    def fileno(self) -> int:
        """A descriptor that polls POLLHUP once the command has ended."""
        return self._words.fileno()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit status: 128 + the signal if one ended the command; None while the command runs.

        After a status other than 0, nothing that the command started is left. 255 means that nobody knows how the
        command ended. Only one thread may wait.
        """
        if self._status is None:
            try:
                status = self._keeper.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
            # If SIGCHLD is ignored, or other code reaps our children, Popen reports every end as success.
            said = b""
            with suppress(OSError):
                said = self._words.recv(16, socket.MSG_DONTWAIT)
            self._words.close()
            self._status = int(said) if said else 128 - status if status < 0 else status or _UNKNOWN
        return self._status

    def disown(self) -> None:
        """In a forked child: close the socket, since the keeper must notice when the parent dies."""
        self._words.close()

    def kill(self) -> None:
        """Kill the command and all that it started. `wait` returns once everything is dead."""
        self._say(b"K")

    def let_be(self) -> None:
        """From now on, leave the command and its children alive, whatever happens to this process."""
        self._say(b"L")

    def _say(self, word: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._words.send(word)
