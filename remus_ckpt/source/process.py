"""One process, held by descriptors rather than by its pid, which may be reused after its death.

Source: Linux, Documentation/filesystems/proc.rst; pidfd_open(2).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from remus_ckpt.errors import SourceError
from remus_ckpt.source.mappings import WRITES, FileIdentity, Holding, holding, maps_at

_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_STOPPED = frozenset("TZXx")
"""States of a thread that does not run: stopped by a signal, dead. A traced one (t) runs when its tracer says so."""
_UNKNOWN = "?"
_LOOK_S = 1.0
"""How often all mappings are read where one cannot be asked for by its address."""


class Process:
    """A process, its threads, and what /proc says of them. After its death nothing is read and no signal is sent.

    pid: in our PID namespace
    Raises SourceError if there is no such process, or if it is not ours to stop.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = self._task = self._maps = -1
        self._files: dict[str, int] = {}  # below the directory of threads
        self._runs: dict[str, bytes] = {}  # thread → how often it was given a CPU until `is_stopped`
        self._states: dict[str, str] = {}
        self._holding: Holding | None = None
        self._had_all = False
        self._looked_at = 0.0
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self.fd = os.pidfd_open(self.pid)
            signal.pidfd_send_signal(self.fd, 0)
            # /proc may be that of another PID namespace, where the number is another's.
            with open(f"/proc/self/fdinfo/{self.fd}", encoding="ascii") as file:
                number = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
            if number not in (self.pid, -1):
                raise SourceError(f"/proc does not show process {self.pid}: mount the one of this PID namespace")
            self._task = self._open_task()
        except (ProcessLookupError, FileNotFoundError, OverflowError):
            raise SourceError(f"there is no process {self.pid}") from None
        except PermissionError:
            raise SourceError(f"process {self.pid} may not be stopped: run as its user or as root") from None
        except OSError as error:
            raise SourceError(f"process {self.pid}: {error.strerror} (a thread's number is not a process's)") from None
        # The pid and the directory are certain to be this process's only while it lives.
        if not self.is_alive():
            raise SourceError(f"there is no process {self.pid}")

    def _open_task(self) -> int:
        try:
            return os.open(f"/proc/{self.pid}/task", _FLAGS | os.O_DIRECTORY)
        except (FileNotFoundError, PermissionError):
            if not self.is_alive():
                raise
            raise SourceError(
                f"/proc hides process {self.pid} (mount option hidepid): run as root or as a member of the group in "
                "its gid option, or mount it with hidepid=0"
            ) from None

    def close(self) -> None:
        """Close all descriptors of the process."""
        for fd in (self.fd, self._task, self._maps, *self._files.values()):
            if fd >= 0:
                os.close(fd)
        self.fd = self._task = self._maps = -1
        self._files.clear()

    def is_alive(self) -> bool:
        """Whether any of its threads lives."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return not poll.poll(0)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; if the process is dead, nothing happens. Raises SourceError if it belongs to another user by
        now."""
        try:
            signal.pidfd_send_signal(self.fd, number)
        except ProcessLookupError:
            return
        except PermissionError:
            raise SourceError(f"process {self.pid} may not be stopped any longer: run as its user or as root") from None

    def open(self, name: str, flags: int = _FLAGS) -> int:
        """Open a file of /proc/PID. Raises OSError."""
        return os.open(f"../{name}", flags | os.O_CLOEXEC, dir_fd=self._task)

    # Its threads

    def is_stopped(self) -> bool:
        """Whether every thread is stopped by a signal, or dead; `ran` then counts from here.

        A stopped thread starts no other: if there are only as many threads as are listed, and all are stopped, there
        are no others. The states are read before and after the run counts, so that the counts are those of the stop.
        """
        self._list()
        if not self._look():
            return False
        self._runs = {thread: self._times_run(thread) for thread in self._states}
        for thread in self._states:
            self._states[thread] = _UNKNOWN
        return self._look() and self._count() == len(self._states) == len(self._runs)

    def ran(self) -> list[str]:
        """Threads that were given a CPU since `is_stopped`, or will be at once: none if the stop has held.

        A new thread needs one that starts it, and a single thread dies only by its own doing. SIGCONT wakes all.
        """
        moved = [thread for thread, runs in self._runs.items() if self._times_run(thread) != runs]
        moved = moved or [thread for thread in self._first_living() if self._state(thread) not in _STOPPED]
        return moved if not moved or self.is_alive() else []

    def is_stopped_by_job_control(self) -> bool:
        """Whether the process is already stopped before we stop it, judged by one living thread."""
        for thread in self._list():
            self._states[thread] = _UNKNOWN
        return any(self._state(thread) == "T" for thread in self._first_living())

    def trouble(self) -> str:
        """Why the process is not stopped as it should be, and what to do; or an empty text."""
        if known := self.tracer() or self.freezer():
            return known
        running = {thread: state for thread in self._states if (state := self._state(thread)) not in _STOPPED}
        if running:
            thread, state = next(iter(running.items()))
            return f"threads {some(running)} of process {self.pid} do not stop (thread {thread}: state {state})"
        return ""

    def tracer(self) -> str | None:
        """The tracer of one of its threads, and what to do; None if there is none."""
        for thread in list(self._list()):
            status = self._read(thread, "status", 65536, keep=False).decode(errors="replace")
            number = next((line.split()[1] for line in status.splitlines() if line.startswith("TracerPid:")), "0")
            if number != "0":
                name = "of another PID namespace"
                with suppress(OSError):
                    name = Path(f"/proc/{number}/comm").read_text(errors="replace").strip()
                return (
                    f"thread {thread} of process {self.pid} is traced by process {number} ({name}), which can "
                    "resume it during a pause: detach the tracer first"
                )
        return None

    def freezer(self) -> str | None:
        """Which freezer holds the process, and what to do; None if none does."""
        try:
            with open(self.open("cgroup"), encoding="utf-8", errors="replace") as file:
                rows = [line.rstrip("\n").split(":", 2) for line in file]
        except OSError:  # dead
            return None
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines()]
        for _, controllers, path in rows:
            for _, mount, kind, options, *_ in mounts:
                directory = f"{mount}{path}"
                with suppress(OSError):
                    is_frozen = False
                    if kind == "cgroup2" and not controllers:
                        is_frozen = "frozen 1" in Path(directory, "cgroup.events").read_text()
                    elif kind == "cgroup" and controllers == "freezer" and "freezer" in options.split(","):
                        is_frozen = Path(directory, "freezer.state").read_text() != "THAWED\n"
                    if is_frozen:
                        return f"process {self.pid} is frozen: thaw its cgroup {directory} first"
        return None

    def children(self) -> set[int]:
        """The pids of its children.

        Call this while the process is stopped, so that it starts no more. The kernel may skip one child while another
        dies, so the list is read until two reads agree.
        """
        found: set[int] = set()
        for thread in self._states:
            numbers = self._read(thread, "children", 1 << 20)
            while numbers and numbers != (numbers := self._read(thread, "children", 1 << 20)):
                pass
            found.update(map(int, numbers.split()))
        return found

    def _first_living(self) -> list[str]:
        """One thread that is not dead, if there is any."""
        return next(([thread] for thread in self._states if self._state(thread) not in "ZXx"), [])

    def _count(self) -> int:
        """How many threads there are: the kernel counts them as links of the directory."""
        try:
            return os.fstat(self._task).st_nlink - 2
        except OSError:
            return 0

    def _list(self) -> dict[str, str]:
        """Bring the list of threads up to date."""
        if self._count() != len(self._states):
            try:
                threads = set(os.listdir(self._task))
            except OSError:  # dead
                threads = set()
            for thread in self._states.keys() - threads:
                self._forget(thread)
            for thread in sorted(threads - self._states.keys(), key=int):
                self._states[thread] = _UNKNOWN
        return self._states

    def _look(self) -> bool:
        """Check the threads not yet seen stopped, up to the first that is not; returns whether all are stopped."""
        for thread, before in list(self._states.items()):
            if before in _STOPPED:
                continue
            state = self._states[thread] = self._state(thread)
            if not state:
                self._forget(thread)
            elif state not in _STOPPED:
                return False
        return True

    def _state(self, thread: str) -> str:
        """The letter of a thread's state; none for one that is gone."""
        # The name, in parentheses, may hold anything.
        words = self._read(thread, "stat").rpartition(b")")[2].split(maxsplit=1)
        return chr(words[0][0]) if words else ""

    def _times_run(self, thread: str) -> bytes:
        """How often a thread was given a CPU: the third number, which is counted before it runs."""
        return self._read(thread, "schedstat").rpartition(b" ")[2]

    def _forget(self, thread: str) -> None:
        self._states.pop(thread)
        self._runs.pop(thread, None)
        for path in [path for path in self._files if path.startswith(f"{thread}/")]:
            os.close(self._files.pop(path))

    def _read(self, thread: str, name: str, size: int = 512, *, keep: bool = True) -> bytes:
        """A small file of a thread; nothing for one that is gone. Kept open if there are descriptors to spare."""
        path = f"{thread}/{name}"
        try:
            if (fd := self._files.get(path)) is not None:
                return os.pread(fd, size, 0)
            fd = os.open(path, _FLAGS, dir_fd=self._task)
            if keep and fd < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
                self._files[path] = fd
                return os.pread(fd, size, 0)
            try:
                return os.pread(fd, size, 0)
            finally:
                os.close(fd)
        except (FileNotFoundError, ProcessLookupError):
            return b""

    # Its memory

    def look(self, memory: FileIdentity) -> Holding | None:
        """How the process holds some memory; None if it has no memory at all, because it is about to end.

        Raises PermissionError.
        """
        if self._maps >= 0:
            os.close(self._maps)
            self._maps = -1
        self._holding = None
        self._looked_at = time.monotonic()
        # The first thread may be dead while others live.
        for thread in list(self._list()):
            try:
                directory = os.open(thread, os.O_PATH | os.O_CLOEXEC, dir_fd=self._task)
            except OSError:
                continue
            try:
                self._holding = holding(directory, memory)
                if self._holding is not None:
                    self._had_all |= self._holding.has_all
                    self._maps = os.open("maps", _FLAGS, dir_fd=directory)
                    break
            except (FileNotFoundError, ProcessLookupError):
                continue
            finally:
                os.close(directory)
        return self._holding

    def has(self, memory: FileIdentity) -> bool:
        """Whether the process can still write to memory that it could write to when `look` was called.

        Each call checks the mapping, and if that has changed, everything that the process has mapped and open. If there
        is no mapping, or the kernel cannot be asked about one, everything is checked once a second.
        """
        if self._holding is not None and self._holding.how == WRITES:
            mapping = self._holding.mapping
            is_there = None if mapping is None else maps_at(self._maps, mapping)
            if is_there or (is_there is None and time.monotonic() - self._looked_at < _LOOK_S):
                return True
        try:
            found = self.look(memory)
        except PermissionError:  # it has executed another user's program
            return False
        return found is not None and found.how == WRITES

    def has_kept(self, memory: FileIdentity) -> bool:
        """Whether the process still has the memory, and all of it mapped if it once had.

        If it was mapped whole, a descriptor that is still open proves little: other memory is at that address now.
        """
        return self.has(memory) and (not self._had_all or (self._holding is not None and self._holding.has_all))


def closed_to_us(pid: int) -> str:
    """Why a process that we may send signals to is refused all the same, and what to do."""
    return (
        f"what process {pid} has mapped cannot be read: run as its user or as root (only as root if it has changed its "
        "user or is not dumpable; in a container also with CAP_SYS_PTRACE)"
    )


def some(threads: Collection[str]) -> str:
    """Thread numbers for a message."""
    return ", ".join([*threads][:8]) + (f" and {len(threads) - 8} more" if len(threads) > 8 else "")


def counts_runs() -> bool:
    """Whether this kernel counts how often a thread was given a CPU (CONFIG_SCHED_INFO)."""
    try:
        return Path("/proc/thread-self/schedstat").read_text().split()[2] != "0"
    except OSError:
        return False
