"""Stopping writers by commands of the user's: for what has its own way to be paused, such as a virtual machine."""

from __future__ import annotations

from collections.abc import Sequence

from remus_ckpt.errors import SourceError
from remus_ckpt.source.guarded import Guard
from remus_ckpt.source.mappings import FileIdentity

_SLACK_S = 10.0
"""What a command that was killed, and the guard, may take on top of the time-out."""


class PauseCommands:
    """Two shell commands: one after which nobody writes, and one after which all run on.

    pause, resume: run by `/bin/sh -c`, in the environment of this process, with no input; what they print is thrown
        away, what they complain of comes with the error. `resume` is run too where `pause` has failed, and once more
        where it has failed itself or this process has died in a pause: it must bear that.
    timeout_s: how long either may take; it is killed then, with all that it has started
    Raises SourceError if one is empty.
    """

    def __init__(self, pause: str, resume: str, *, timeout_s: float = 10.0) -> None:
        for name, command in (("pause", pause), ("resume", resume)):
            if not command.strip() or "\0" in command:
                raise SourceError(f"the {name} command {command!r} is none: both must be given")
        self._commands = {"pause": pause, "resume": resume}
        self._guard: Guard | None = Guard("run", pause, resume, str(timeout_s), timeout_s=timeout_s + _SLACK_S)

    def close(self) -> None:
        """Let go of the writers, which run on."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def check_memory(self, memory: FileIdentity) -> None:
        """Nothing: who writes is not known here."""

    def processes(self) -> None:
        """They are not known one by one."""

    def death_fds(self) -> Sequence[int]:
        """None, for the same reason."""
        return ()

    def alive(self) -> bool:
        """Whether it has not been closed."""
        return self._guard is not None

    def stop(self) -> None:
        """Run the pause command. If it fails, the resume command is run too; then it raises SourceError."""
        assert self._guard is not None
        self._guard.stopping()
        try:
            self._check("pause", self._guard.answer(b"S"))
        except BaseException as error:
            try:
                self.resume()
            except SourceError as another:
                if isinstance(error, SourceError):
                    raise SourceError(f"{error}; and {another}") from error
            raise

    def check_stopped(self) -> None:
        """Nothing: only the commands know."""

    def resume(self) -> None:
        """Run the resume command. Raises SourceError if it fails; closing tries it once more."""
        assert self._guard is not None
        self._guard.running()
        self._check("resume", self._guard.answer(b"C"))

    def _check(self, name: str, trouble: str) -> None:
        if trouble:
            raise SourceError(f"the {name} command `{self._commands[name]}` {trouble}")
