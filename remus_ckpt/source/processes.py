"""Stopping and resuming processes, with a guard in case we die in between."""

from __future__ import annotations

import io
import os
import select
import signal
import time
from collections.abc import Sequence

from remus_ckpt.errors import PauseBroken, SourceError
from remus_ckpt.source.guarded import Guard, claim
from remus_ckpt.source.mappings import FAULTS, WRITES, FileIdentity
from remus_ckpt.source.process import Process, closed_to_us, counts_runs, some

_POLL_S = 50e-6


class Processes:
    """Some processes and their forked children, stopped and resumed together.

    A child that inherits the memory is stopped with its parent from the next pause on, for as long as it has the
    memory.

    pids: of processes that we may send signals to
    stop_timeout_s: how long a thread may take to stop (one in an uninterruptible wait does not)
    patience_s: how long to wait for a tracer or a freezer, which may be gone in a moment
    leaving_s: how long a process may live on without the memory: an ending process unmaps it first
    Raises SourceError if one of them does not exist, is not ours, or is stopped, frozen or traced by someone else.
    """

    def __init__(
        self, pids: list[int], *, stop_timeout_s: float = 10.0, patience_s: float = 2.0, leaving_s: float = 1.0
    ) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._patience_s = patience_s
        self._leaving_s = leaving_s
        self._memory: FileIdentity | None = None
        self._named: list[Process] = []
        self._heirs: list[Process] = []
        self._others: dict[int, int] = {}  # children without the memory: number → pidfd
        self._stopped: list[Process] = []  # by us
        self._lost: dict[Process, float] = {}  # named processes that no longer have the memory, and since when
        self._guard: Guard | None = None
        self._claims: list[io.FileIO] = []
        self._deaths = select.epoll()
        try:
            if not counts_runs():
                raise SourceError("this kernel does not count runs (CONFIG_SCHED_INFO), by which a pause is proven")
            for pid in dict.fromkeys(pids):
                self._open(pid)
            self._guard = Guard("continue", fds=[claimed.fileno() for claimed in self._claims])
        except BaseException:
            self.close()
            raise

    def _open(self, pid: int) -> None:
        if pid == os.getpid():
            raise SourceError(f"process {pid} is this one: it cannot stop itself")
        if pid == 1:
            raise SourceError("process 1 cannot be stopped from here: name its children, or a cgroup")
        process = Process(pid)
        self._named.append(process)
        self._deaths.register(process.fd, select.EPOLLIN)
        # Two recorders that stop the same process would each end the other's pauses. Only users who may write to the
        # process can claim it.
        try:
            fd = process.open("oom_score_adj", os.O_RDWR)
        except OSError:
            raise SourceError(closed_to_us(pid)) from None
        if (claimed := claim(fd)) is None:
            raise SourceError(f"process {pid} is protected or recorded already: stop that `remus-ckpt` first")
        self._claims.append(claimed)
        # Whoever stopped it wants it stopped; our pauses would leave it running.
        if process.is_stopped_by_job_control():
            raise SourceError(f"process {pid} is stopped already: resume it first (kill -CONT {pid})")
        if trouble := process.tracer() or process.freezer():
            raise SourceError(trouble)

    def close(self) -> None:
        """Release the processes, which run on."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._deaths.close()
        for process in (*self._named, *self._heirs):
            process.close()
        for fd in self._others.values():
            os.close(fd)
        for claimed in self._claims:
            claimed.close()
        for held in (self._named, self._heirs, self._others, self._claims, self._stopped, self._lost):
            held.clear()

    def check_memory(self, memory: FileIdentity) -> None:
        """Raise SourceError if a living process cannot write to the memory, or cannot be inspected."""
        self._memory = memory
        self._forget_dead()
        for process in self._named:
            try:
                found = process.look(memory)
            except PermissionError:
                raise SourceError(closed_to_us(process.pid)) from None
            if found is None and process.is_alive():
                raise SourceError(
                    f"process {process.pid} has no memory: it is ending, or belongs to the kernel; "
                    f"name one that writes to {memory.path}"
                )
            if found is not None and found.how != WRITES:
                raise SourceError(f"process {process.pid} {FAULTS[found.how].format(path=memory.path)}")

    def processes(self) -> Sequence[Process]:
        """The living processes: those named, and children that have inherited the memory."""
        self._forget_dead()
        return [*self._named, *self._heirs]

    def death_fds(self) -> Sequence[int]:
        """A descriptor for each living process (of the named ones, if any live), readable when it dies."""
        self._forget_dead()
        return [process.fd for process in self._named or self._heirs]

    def alive(self) -> bool:
        """Whether any of them lives."""
        self._forget_dead()
        return bool(self._named or self._heirs)

    def _forget_dead(self) -> None:
        if self._deaths.closed:
            return
        for fd, _ in self._deaths.poll(0):
            self._deaths.unregister(fd)
            for number in [number for number, other in self._others.items() if other == fd]:
                os.close(self._others.pop(number))
            for held in (self._named, self._heirs):
                for process in [process for process in held if process.fd == fd]:
                    held.remove(process)
                    self._lost.pop(process, None)
                    if process in self._stopped:
                        self._stopped.remove(process)
                    process.close()

    def stop(self) -> None:
        """Stop all processes; return once every thread has really stopped. After an error, they run on.

        A process that someone else has stopped meanwhile stays stopped when the others are resumed.
        """
        assert self._guard is not None
        self._forget_dead()
        running = [process for process in (*self._named, *self._heirs) if not process.is_stopped_by_job_control()]
        try:
            self._halt(running)
            deadline = time.monotonic() + self._stop_timeout_s
            for process in (*self._named, *self._heirs):
                self._wait_stopped(process, deadline)
            if self._memory is not None:
                self._follow(self._memory, deadline)
                self._check_held(self._memory)
        except BaseException:
            self.resume()
            raise

    def _halt(self, processes: Sequence[Process]) -> None:
        """Tell some processes to stop. From here on we must resume them."""
        assert self._guard is not None
        stopped = [*self._stopped, *(process for process in processes if process not in self._stopped)]
        self._guard.stopping([process.fd for process in stopped])
        self._stopped = stopped
        for process in processes:
            process.send(signal.SIGSTOP)

    def _wait_stopped(self, process: Process, deadline: float) -> None:
        patience = min(time.monotonic() + self._patience_s, deadline)
        while not process.is_stopped():
            if not process.is_alive():
                return
            now = time.monotonic()
            if now > deadline:
                raise SourceError(process.trouble() or f"process {process.pid} keeps starting threads")
            if now > patience:
                patience = deadline
                if trouble := process.tracer() or process.freezer():
                    raise SourceError(trouble)
            # A SIGCONT from elsewhere cancels our SIGSTOP.
            if process in self._stopped:
                process.send(signal.SIGSTOP)
            else:
                self._halt([process])
            time.sleep(_POLL_S)

    def _follow(self, memory: FileIdentity, deadline: float) -> None:
        """Stop children that have inherited the memory, and their children. Release those that no longer have it."""
        for heir in [heir for heir in self._heirs if not heir.has(memory)]:
            heir.send(signal.SIGCONT)
            self._heirs.remove(heir)
            if heir in self._stopped:
                self._stopped.remove(heir)
            self._deaths.unregister(heir.fd)
            heir.close()
        parents = [*self._named, *self._heirs]
        while parents:
            known = {os.getpid(), *self._others, *(process.pid for process in (*self._named, *self._heirs))}
            found = set().union(*(parent.children() for parent in parents)) - known
            parents = list(filter(None, (self._heir(number, memory) for number in found)))
            if parents:
                self._heirs += parents
                self._halt(parents)
            for parent in parents:
                self._wait_stopped(parent, deadline)

    def _heir(self, pid: int, memory: FileIdentity) -> Process | None:
        """A child that has the memory; None if it does not, which is checked only once."""
        try:
            process = Process(pid)
        except SourceError:
            return None  # dead, or another user's: it has executed another program
        try:
            found = process.look(memory)
        except PermissionError:
            found = None
        self._deaths.register(process.fd, select.EPOLLIN)
        if found is not None and found.how == WRITES:
            return process
        self._others[pid] = os.dup(process.fd)
        self._deaths.unregister(process.fd)
        self._deaths.register(self._others[pid], select.EPOLLIN)
        process.close()
        return None

    def _check_held(self, memory: FileIdentity) -> None:
        """Raise SourceError if a named process lives on without the memory, or without a part of it."""
        now = time.monotonic()
        for process in self._named:
            if process.has_kept(memory):
                self._lost.pop(process, None)
            elif now - self._lost.setdefault(process, now) > self._leaving_s:
                raise SourceError(
                    f"process {process.pid} no longer has all of {memory.path} mapped: it now works on other "
                    "memory; start again with its new file"
                )

    def check_stopped(self) -> None:
        """Raise PauseBroken if a thread of theirs has run since `stop`."""
        for process in (*self._named, *self._heirs):
            if threads := process.ran():
                raise PauseBroken(
                    f"process {process.pid} was resumed during a pause (threads {some(threads)}), by a SIGCONT or "
                    "a tracer from elsewhere"
                )

    def resume(self) -> None:
        """Resume the processes: all that can be, even if one cannot."""
        trouble: SourceError | None = None
        for process in self._stopped:
            try:
                process.send(signal.SIGCONT)
            except SourceError as error:
                trouble = error
        if trouble is not None:
            raise trouble
        self._stopped.clear()
        if self._guard is not None:
            self._guard.running()
