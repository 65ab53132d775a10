"""Stopping all processes of a cgroup (version 2) with its freezer.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze" and "cgroup.events".
"""

from __future__ import annotations

import ctypes
import io
import os
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from remus_ckpt.errors import PauseBroken, SourceError
from remus_ckpt.source.guarded import Guard, claim
from remus_ckpt.source.mappings import FAULTS, WRITES, FileIdentity
from remus_ckpt.source.process import Process

_POLL_S = 50e-6
_IN_MODIFY = 2


class CgroupFreezer:
    """A cgroup whose processes are frozen and thawed together, including those in cgroups below it and future ones.

    No process may be moved out of it during a pause: that process would run.

    path: its directory, such as /sys/fs/cgroup/system.slice/orders.service
    freeze_timeout_s: how long it may take to freeze (a thread in an uninterruptible wait does not)
    leaving_s: how long its processes may live on without the memory
    Raises SourceError if it cannot be frozen by us, is frozen already, or holds this process.
    """

    def __init__(self, path: str | Path, *, freeze_timeout_s: float = 10.0, leaving_s: float = 1.0) -> None:
        self.path = Path(os.path.realpath(path))
        self._freeze_timeout_s = freeze_timeout_s
        self._leaving_s = leaving_s
        self._events = self._freeze = self._witness = self._watch = -1
        self._guard: Guard | None = None
        self._claim: io.FileIO | None = None
        self._memory: FileIdentity | None = None
        self._writer: Process | None = None  # a process that was seen to have the memory
        self._held_at = self._looked_at = 0.0
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._check_kind()
        try:
            self._events = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
            self._freeze = os.open(self.path / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
            lockable = os.open(self.path / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise SourceError(f"{self.path} may not be frozen: run as its owner or as root") from None
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror}") from None
        # Two recorders that freeze the same cgroup would each end the other's pauses.
        if (claimed := claim(lockable)) is None:
            raise SourceError(f"{self.path} is protected or recorded already: stop that `remus-ckpt` first")
        self._claim = claimed
        # If we were in it, neither we nor the guard would ever run again.
        if os.getpid() in self._pids():
            raise SourceError(f"this process is in {self.path} itself: run it in another cgroup")
        if self._event("frozen") or self._asked():
            # Whoever froze it wants it frozen; our pauses would leave it running.
            raise SourceError(f"{self.path} is frozen already: thaw it first (echo 0 > {self.path}/cgroup.freeze)")
        self._watch = _watch(self.path / "cgroup.freeze")
        self._guard = Guard("thaw", str(self._freeze), fds=[self._freeze, claimed.fileno()])

    def _check_kind(self) -> None:
        if not self.path.is_dir():
            raise SourceError(f"{self.path} is not a directory: name a cgroup of version 2, {_examples()}")
        if (self.path / "cgroup.freeze").is_file():
            kind = (self.path / "cgroup.type").read_text().strip()
            if kind in {"threaded", "domain invalid"}:
                raise SourceError(f"{self.path} holds single threads: name the cgroup that has their whole processes")
            return
        if (self.path / "cgroup.controllers").is_file():
            raise SourceError(f"{self.path} is the root of all cgroups, which cannot be frozen: name one below it")
        if (self.path / "cgroup.procs").is_file() or (self.path / "freezer.state").is_file():
            raise SourceError(f"{self.path} is a cgroup of version 1: name one of version 2, {_examples()}")
        raise SourceError(f"{self.path} is not a cgroup: name one of version 2, {_examples()}")

    def close(self) -> None:
        """Release the cgroup, which is thawed if we had frozen it."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        if self._claim is not None:
            self._claim.close()
        self._forget_writer()
        for fd in (self._events, self._freeze, self._witness, self._watch):
            if fd >= 0:
                os.close(fd)
        self._events = self._freeze = self._witness = self._watch = -1

    def check_memory(self, memory: FileIdentity) -> None:
        """Raise SourceError if there are processes, but none that evidently can write to the memory."""
        self._memory = memory
        faults = self._find_writer(memory)
        if self._writer is None and faults:
            raise SourceError(f"no process in {self.path} writes to {memory.path}; {'; '.join(sorted(faults)[:3])}")

    def _find_writer(self, memory: FileIdentity) -> set[str]:
        """Search all processes for one that can write to the memory. Returns what was wrong with the others."""
        self._forget_writer()
        self._looked_at = time.monotonic()
        faults = set()
        for pid in self._pids():
            process = None
            try:
                process = Process(pid)
                found = process.look(memory)
                # The pid may have belonged to another process when the cgroup listed it.
                if found is not None and found.how == WRITES and pid in self._pids() and process.is_alive():
                    self._writer, process = process, None
                    break
                if found is not None and found.how != WRITES:
                    faults.add(f"one {FAULTS[found.how].format(path=memory.path)}")
            except PermissionError:
                faults.add("what one has mapped cannot be read: run as its user or as root")
            except SourceError as error:  # dead, or another user's
                faults.add(str(error))
            finally:
                if process is not None:
                    process.close()
        return faults

    def _forget_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _check_held(self, memory: FileIdentity) -> None:
        """Raise SourceError if there are processes, and for a while none of them has had the memory."""
        now = time.monotonic()
        if self._writer is not None and self._writer.is_alive() and self._writer.has(memory):
            self._held_at = now
        elif now - self._looked_at > self._leaving_s and self.alive():
            self._find_writer(memory)
            if self._writer is not None:
                self._held_at = now
            elif now - self._held_at > self._leaving_s:
                raise SourceError(
                    f"no process in {self.path} has {memory.path} mapped any longer: they now work on other "
                    "memory; start again with their new file"
                )

    def processes(self) -> None:
        """The writers are not known individually."""

    def death_fds(self) -> Sequence[int]:
        """A descriptor that becomes readable when one particular process dies, which need not be the last one.

        The cgroup has members at least until then; after that, ask again. cgroup.events would also wake us for each
        thaw, and up to 10 ms late.
        """
        if self._witness >= 0 and not _is_readable(self._witness):
            return (self._witness,)
        if self._witness >= 0:
            os.close(self._witness)
            self._witness = -1
        for pid in self._pids():
            try:
                self._witness = os.pidfd_open(pid)
            except OSError:
                continue
            if not _is_readable(self._witness):
                return (self._witness,)
            os.close(self._witness)
            self._witness = -1
        return ()

    def alive(self) -> bool:
        """Whether any process is in the cgroup or below it."""
        return self._event("populated")

    def stop(self) -> None:
        """Freeze the cgroup; return once every process has really stopped. After an error, they run on."""
        assert self._guard is not None
        self._guard.stopping()
        try:
            self._write(b"1")
            self._was_written()  # by us
            deadline = time.monotonic() + self._freeze_timeout_s
            while self.alive() and not self._event("frozen"):
                if time.monotonic() > deadline:
                    raise SourceError(f"{self.path} did not freeze within {self._freeze_timeout_s:g} s")
                # The kernel also reports changes, but at most every 10 ms.
                time.sleep(_POLL_S)
            if self._memory is not None:
                self._check_held(self._memory)
        except BaseException:
            self.resume()
            raise

    def check_stopped(self) -> None:
        """Raise PauseBroken if anyone else has thawed the cgroup since `stop`, even if it is frozen again."""
        if self.alive() and (self._was_written() or not (self._asked() and self._event("frozen"))):
            raise PauseBroken(f"{self.path} was thawed from elsewhere during a pause")

    def resume(self) -> None:
        """Thaw the cgroup."""
        assert self._guard is not None
        self._write(b"0")
        self._guard.running()

    def _write(self, state: bytes) -> None:
        try:
            os.pwrite(self._freeze, state, 0)
        except OSError as error:
            if self.alive():
                raise SourceError(f"{self.path}/cgroup.freeze: {error.strerror}") from None

    def _was_written(self) -> bool:
        """Whether anybody has written to cgroup.freeze since the last call."""
        try:
            return bool(os.read(self._watch, 65536))
        except BlockingIOError:
            return False

    def _asked(self) -> bool:
        """Whether the cgroup has been told to freeze."""
        try:
            return os.pread(self._freeze, 16, 0).strip() == b"1"
        except OSError:  # removed
            return False

    def _event(self, name: str) -> bool:
        try:
            words = os.pread(self._events, 256, 0).decode().split()
        except OSError:  # removed: it is empty, and nothing in it is frozen
            return False
        return dict(zip(words[::2], words[1::2], strict=True)).get(name) == "1"

    def _pids(self) -> Iterator[int]:
        """The processes in the cgroup and below it that have pids in our namespace."""
        for directory, _, files in os.walk(self.path):
            if "cgroup.procs" not in files:
                continue
            try:
                with open(Path(directory, "cgroup.procs"), encoding="ascii") as file:
                    numbers = [int(line) for line in file]
            except OSError:
                continue  # removed, or of single threads, whose processes the cgroup above names
            # A process of another PID namespace has the number 0.
            yield from (number for number in numbers if number)


def _watch(path: Path) -> int:
    """A descriptor that becomes readable when a file has been written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) < 0:
        if fd >= 0:
            os.close(fd)
        raise SourceError(f"{path} cannot be watched: {os.strerror(ctypes.get_errno())} (fs.inotify in sysctl)")
    return fd


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _examples() -> str:
    """Where version 2 cgroups are, for an error message."""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        mounts = [row[1] for row in map(str.split, file) if row[2] == "cgroup2"]
    return f"a directory below {' or '.join(mounts)}" if mounts else "for which a cgroup2 must be mounted"
