"""Stopping writers with the user's own commands: for writers that have their own way to pause, such as a virtual
machine."""

from __future__ import annotations

from collections.abc import Sequence

from remus_ckpt.errors import SourceError
from remus_ckpt.source.guarded import Guard
from remus_ckpt.source.mappings import FileIdentity

_SLACK_S = 10.0
"""Extra time for a killed command and the guard, on top of the timeout."""


class PauseCommands:
    """Two shell commands: one stops all writers, the other resumes them.

    pause, resume: run by `/bin/sh -c`, in the environment of this process, with no input; their standard output is
        discarded, their error output comes with the error. `resume` also runs if `pause` failed, and again if it failed
        itself or if this process died during a pause: it must tolerate that.
    timeout_s: how long either may take before it is killed, with all that it has started
    Raises SourceError if either is empty.
    """

    def __init__(self, pause: str, resume: str, *, timeout_s: float = 10.0) -> None:
        for name, command in (("pause", pause), ("resume", resume)):
            if not command.strip() or "\0" in command:
                raise SourceError(f"the {name} command {command!r} is empty: both must be given")
        self._commands = {"pause": pause, "resume": resume}
        self._guard: Guard | None = Guard("run", pause, resume, str(timeout_s), timeout_s=timeout_s + _SLACK_S)

    def close(self) -> None:
        """Release the writers, which run on."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def check_memory(self, memory: FileIdentity) -> None:
        """Does nothing: the writers are not known here."""

    def processes(self) -> None:
        """The writers are not known individually."""

    def death_fds(self) -> Sequence[int]:
        """No descriptors, for the same reason."""
        return ()

    def alive(self) -> bool:
        """Whether this object has not been closed."""
        return self._guard is not None

    def stop(self) -> None:
        """Run the pause command. If that fails, run the resume command and raise SourceError."""
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
        """Does nothing: only the commands know."""

    def resume(self) -> None:
        """Run the resume command. Raises SourceError if that fails; closing tries once more."""
        assert self._guard is not None
        self._guard.running()
        self._check("resume", self._guard.answer(b"C"))

    def _check(self, name: str, trouble: str) -> None:
        if trouble:
            raise SourceError(f"the {name} command `{self._commands[name]}` {trouble}")
