"""Stopping processes and letting them run on, with a guard for the case that we die in between."""

from __future__ import annotations

import os
import select
import signal
import socket
import time

from remus_ckpt.errors import SourceError
from remus_ckpt.source.guarded import Guard, claim

_POLL_S = 50e-6
_STOPPED = frozenset("TtZXx")
"""States of a thread that does not run: stopped, traced, dead."""


class Processes:
    """Some processes that are stopped and continued together.

    pids: of processes that we may send signals to
    stop_timeout_s: how long a thread may take to stop (one in an uninterruptible wait does not)
    Raises SourceError if one of them does not exist or is not ours.
    """

    def __init__(self, pids: list[int], *, stop_timeout_s: float = 10.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._pidfds: dict[int, int] = {}
        self._guard: Guard | None = None
        self._claims: list[socket.socket] = []
        try:
            for pid in dict.fromkeys(pids):
                self._open(pid)
            pidfds = list(self._pidfds.values())
            claims = [claimed.fileno() for claimed in self._claims]
            self._guard = Guard("continue", *map(str, pidfds), fds=[*pidfds, *claims])
        except BaseException:
            self.close()
            raise

    def _open(self, pid: int) -> None:
        if pid == os.getpid():
            raise SourceError(f"process {pid} is this one: it cannot stop itself")
        try:
            pidfd = os.pidfd_open(pid)
            self._pidfds[pid] = pidfd
            signal.pidfd_send_signal(pidfd, 0)
        except (ProcessLookupError, OverflowError):
            raise SourceError(f"there is no process {pid}") from None
        except PermissionError:
            raise SourceError(f"process {pid} may not be stopped: run as its user or as root") from None
        except OSError as error:
            raise SourceError(f"process {pid}: {error.strerror} (a thread's number is not a process's)") from None

        # Two who stop the same process would each end the other's pauses.
        claimed = claim(f"pauses {pid}")
        if claimed is None:
            raise SourceError(f"process {pid} is being recorded by somebody else")
        self._claims.append(claimed)
        states = _states(pid)
        if states and _STOPPED.issuperset(states.values()) and "T" in states.values():
            # Whoever stopped it wants it so; our pauses would end with it running.
            raise SourceError(f"process {pid} is stopped already: let it run first (kill -CONT {pid})")

    def close(self) -> None:
        """Let go of the processes, which run on."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()
        for claimed in self._claims:
            claimed.close()
        self._claims.clear()

    def check_maps(self, path: str, file: os.stat_result) -> None:
        """Raise SourceError if one that lives and lets us look has the file neither mapped nor open."""
        for pid in self._living():
            if has_file(pid, path, file) is False:
                raise SourceError(f"process {pid} has {path} neither mapped nor open: name those that write to it")

    def death_fds(self) -> list[int]:
        """A descriptor for each process that lives; it becomes readable when that one dies."""
        return list(self._living().values())

    def alive(self) -> bool:
        """Whether any of them lives."""
        return bool(self._living())

    def _living(self) -> dict[int, int]:
        poll = select.poll()
        for pidfd in self._pidfds.values():
            poll.register(pidfd, select.POLLIN)
        dead = {fd for fd, _ in poll.poll(0)}
        return {pid: pidfd for pid, pidfd in self._pidfds.items() if pidfd not in dead}

    def stop(self) -> None:
        """Stop them all; return when every thread of each has really stopped. On an error they run on."""
        assert self._guard is not None
        self._guard.stopping()
        try:
            self._signal(signal.SIGSTOP)
            deadline = time.monotonic() + self._stop_timeout_s
            for pid in self._pidfds:
                self._wait_stopped(pid, deadline)
        except BaseException:
            self.resume()
            raise

    def check_stopped(self) -> None:
        """Raise SourceError if somebody else has let one of them run on since `stop`."""
        for pid in self._living():
            if not _STOPPED.issuperset(_states(pid).values()):
                raise SourceError(f"process {pid} was let run on by somebody else in a pause (SIGCONT)")

    def resume(self) -> None:
        """Let them run on."""
        self._signal(signal.SIGCONT)
        if self._guard is not None:
            self._guard.running()

    def _signal(self, number: signal.Signals) -> None:
        for pidfd in self._pidfds.values():
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                continue  # dead: it writes no more

    def _wait_stopped(self, pid: int, deadline: float) -> None:
        while True:
            before = _states(pid)
            # A thread that stopped may have started another before; the second look finds it.
            if before.keys() == _states(pid).keys() and _STOPPED.issuperset(before.values()):
                return
            if time.monotonic() > deadline:
                running = sorted(thread for thread, state in before.items() if state not in _STOPPED)
                raise SourceError(
                    f"threads {running} of process {pid} did not stop in {self._stop_timeout_s:g} s "
                    f"(state {before[running[0]]})"
                    if running
                    else f"process {pid} keeps starting threads"
                )
            # Somebody else's SIGCONT takes ours back.
            if before:
                self._signal(signal.SIGSTOP)
            time.sleep(_POLL_S)


def has_file(pid: int, path: str, file: os.stat_result) -> bool | None:
    """Whether a process has a file mapped or open; None if it is gone or does not let us look.

    By its inode or by its name: not every file system shows the same device in both places.
    """
    name = os.path.realpath(path)
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            rows = [line.rstrip("\n").split(maxsplit=5) for line in maps]
        if any(row[4] == str(file.st_ino) or row[5:] == [name] for row in rows):
            return True
        return any(
            os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), file) for number in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:
        return None


def _states(pid: int) -> dict[str, str]:
    """Thread → its state letter, as /proc says it; none for a process that is gone."""
    states = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                # The name, in parentheses, may hold anything.
                states[thread] = chr(file.read().rpartition(b")")[2].split()[0][0])
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return states
