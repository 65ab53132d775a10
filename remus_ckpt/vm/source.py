"""A running QEMU as a source: its RAM is a shared file, the kernel finds what it writes there, QMP stops it.

    in the pause                       QEMU
    stop, xen-save-devices-state  -->  the vCPUs stop, I/O in flight ends  ┐
    drain                              what the guest has sent until now   │ writes the device state to a memfd
    find, copy                         in its page table, from the file    ┘
    cont                          -->  the guest runs on, unless a user had paused it

What is found here is what xen-save-devices-state and the RAM file hold; whatever other memory QEMU has would be lost,
so that a guest with any is refused.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from remus_ckpt.errors import PauseBroken, SourceError, VmError
from remus_ckpt.pages import Buffer
from remus_ckpt.source.guarded import Guard
from remus_ckpt.source.mappings import FAULTS, WRITES, FileIdentity
from remus_ckpt.source.process import Process
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, Tracking
from remus_ckpt.vm import part
from remus_ckpt.vm.part import DiskPart, Machine
from remus_ckpt.vm.qmp import Message, Pending, Qmp
from remus_ckpt.wire.parts import Parts

STATE_TIMEOUT_S = 30.0
"""QEMU first ends all I/O in flight: a disk that hangs holds it up for so long."""
SLOW_STOP_S = 1.0
"""Then it is asked whether one of our own servers is what holds it up."""
_FDSET = 7411
_RAN = frozenset({"running", "suspended"})
_OTHERS = {
    "inmigrate": "it waits for an incoming migration",
    "finish-migrate": "it is being migrated",
    "postmigrate": "it has been migrated away",
    "restore-vm": "it is loading a snapshot",
    "save-vm": "it is saving a snapshot",
    "colo": "it is one half of a COLO pair",
}
"""States in which something else is busy with the machine."""
_REPORTED = frozenset({"RESET", "SHUTDOWN", "POWERDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR", "WATCHDOG"})
_OTHER_MEMORY = re.compile(r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x", re.MULTILINE)
_KNOWN_MEMORY = re.compile(r"/rom@etc/\S+|pc\.bios|pc\.rom|bios\.bin|\S+\.rom|isa-bios")
"""Blocks of `info ramblock` that each QEMU fills by itself, alike: firmware and its tables."""


class QmpStopper:
    """Stops a guest with QMP, and saves its device state in the same stroke.

    qmp: closed with this object
    is_guarded: QEMU may outlive this process, and must not stay stopped then
    timeout_s: how long a stop may take; QEMU first ends all I/O in flight
    on_slow: called when QEMU takes longer than `SLOW_STOP_S` to answer: may end what holds it up
    """

    def __init__(
        self,
        qmp: Qmp,
        *,
        is_guarded: bool = True,
        timeout_s: float = STATE_TIMEOUT_S,
        on_slow: Callable[[], None] = lambda: None,
    ) -> None:
        self._qmp = qmp
        self._on_slow = on_slow
        self.timeout_s = timeout_s
        self._must_run = False
        self._state = ""  # that `look` has found; empty once it is used
        self._saving: Pending | None = None
        self._stopped_at = 0.0
        self._is_closed = False
        self._guard: Guard | None = None
        self._memfd = self._written = -1
        self.is_running = True
        """Whether the guest ran when it was last stopped: False if a user has paused it."""
        self.events: list[str] = []
        """What has happened to the guest since the last `take_events`."""
        self._ended_by: str | None = None
        self.process = Process(qmp.pid)
        try:
            self._memfd = os.memfd_create("device state", os.MFD_CLOEXEC)
            self._written = os.open(f"/proc/self/fd/{self._memfd}", os.O_WRONLY | os.O_CLOEXEC)
            qmp.add_fd(self._written, fdset=_FDSET)
            if is_guarded:
                self._guard = Guard("qmp", qmp.path)
        except BaseException:
            self.close()
            raise

    @property
    def ended_by(self) -> str | None:
        """Why QEMU has ended or is about to: "guest-shutdown", "host-qmp-quit" and so on, as it said; None if it did
        not say."""
        with suppress(VmError):
            self._listen()
        return self._ended_by

    def close(self) -> None:
        """Release the guest, which runs on."""
        self._is_closed = True
        with suppress(SourceError):
            self.resume()
        if self._written >= 0 and self._qmp.is_open:
            with suppress(VmError):
                self._qmp.execute("remove-fd", {"fdset-id": _FDSET}, timeout_s=1.0)
        self._qmp.close()
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self.process.close()
        for fd in (self._written, self._memfd):
            if fd >= 0:
                os.close(fd)
        self._written = self._memfd = -1

    def check_memory(self, memory: FileIdentity) -> None:
        """Raise SourceError if QEMU does not write to this file."""
        found = self.process.look(memory)
        if found is None or found.how != WRITES:
            how = "none" if found is None else found.how
            raise VmError(f"QEMU (process {self.process.pid}) {FAULTS[how].format(path=memory.path)}")

    def processes(self) -> Sequence[Process]:
        """QEMU."""
        return [self.process] if self.alive() else []

    def alive(self) -> bool:
        """Whether QEMU lives."""
        return not self._is_closed and self.process.is_alive()

    def death_fds(self) -> Sequence[int]:
        """A descriptor that becomes readable when QEMU dies."""
        return [] if self._is_closed else [self.process.fd]

    def look(self) -> None:
        """Ask QEMU for its state. Call this right before `stop`, so that the pause does not contain the question.

        Raises VmError if something else is busy with the machine.
        """
        state = str(self._answer(self._qmp.begin([("query-status", {})])[0])["status"])
        self._listen(look=False)
        if state in _OTHERS:
            raise VmError(f"QEMU (process {self.process.pid}): {_OTHERS[state]}; protection needs exclusive use of it")
        self._state = state

    def stop(self) -> None:
        """Stop the guest, and begin to save its device state. After an error, it runs on."""
        if not self._state:
            self.look()
        state, self._state = self._state, ""
        os.ftruncate(self._memfd, 0)
        os.lseek(self._written, 0, os.SEEK_SET)  # QEMU's descriptor is a duplicate, with the same position
        if self._guard is not None:
            self._guard.stopping()
        self._must_run = True
        saving = {"filename": f"/dev/fdset/{_FDSET}", "live": False}
        try:
            for event in self._listen():  # what a user has done since `look`
                state = {"STOP": "paused", "RESUME": "running"}.get(str(event["event"]), state)
            # Events of anything that others do from here on are younger than this.
            self._stopped_at = time.time()
            stopping, self._saving = self._qmp.begin([("stop", {}), ("xen-save-devices-state", saving)])
            self._answer(stopping)
        except BaseException:
            # It may be stopped later, when whatever holds QEMU up has ended; this command comes behind that one.
            self._must_run = False
            self._qmp.give("cont")
            self._over()
            raise
        self.is_running = self._must_run = state in _RAN
        if not self.is_running:
            self._over()

    def _answer(self, pending: Pending) -> Any:
        try:
            return self._qmp.finish([pending], timeout_s=min(SLOW_STOP_S, self.timeout_s))[0]
        except VmError:
            if pending.answer is not None or not self.process.is_alive():
                raise
        self._on_slow()
        return self._qmp.finish([pending], timeout_s=self.timeout_s)[0]

    def device_state(self) -> bytes:
        """What QEMU has saved since the last `stop`. Raises VmError if that failed."""
        assert self._saving is not None, "it is saved in a pause"
        self._qmp.finish([self._saving], timeout_s=self.timeout_s)
        size = os.lseek(self._written, 0, os.SEEK_CUR)
        state = os.pread(self._memfd, size, 0) if size else b""
        if not state or len(state) != size:
            raise VmError(f"QEMU has saved {len(state)} of {size} bytes of device state")
        return state

    def check_stopped(self) -> None:
        """Raise PauseBroken if something else has resumed the guest since `stop`, as far as QEMU has reported it.

        `resume` looks again, when QEMU has reported everything.
        """
        self._check_events(self._listen(look=False), before=math.inf)

    def resume(self) -> None:
        """Let the guest run on, if it ran before. Raises VmError if QEMU refuses, and PauseBroken like
        `check_stopped`."""
        if not self._must_run:
            return
        now = time.time()
        try:
            if self.process.is_alive():
                self._qmp.execute("cont")
        finally:
            self._must_run = False
        self._over()
        self._check_events(self._listen(look=False), before=now)

    def _check_events(self, events: list[Message], before: float) -> None:
        """Raise PauseBroken if the guest was let run after the stop and before that time."""
        for event in events:
            if event["event"] == "RESUME" and self._stopped_at < (at := _time_of(event)) < before:
                raise PauseBroken(f"another monitor of QEMU resumed the guest during a pause, at {at:.6f}")

    def _over(self) -> None:
        if self._guard is not None:
            self._guard.running()

    def _listen(self, *, look: bool = True) -> list[Message]:
        """Take in what QEMU has reported, and return it. Raises VmError."""
        events = self._qmp.events(look=look)
        for event in events:
            name, data = str(event["event"]), event.get("data")
            if name == "SHUTDOWN":
                self._ended_by = str(data.get("reason", "shutdown")) if isinstance(data, dict) else "shutdown"
            if name in _REPORTED:
                self.events.append(name if name != "SHUTDOWN" else f"SHUTDOWN ({self._ended_by})")
        return events

    def kill(self) -> None:
        """End QEMU at once, and the guest with it."""
        self.process.send(signal.SIGKILL)

    def take_events(self) -> list[str]:
        """What has happened to the guest since the last call, oldest first."""
        events, self.events = self.events, []
        return events


class Disks(Protocol):
    """The disks that the guest writes to (specs/disk.md)."""

    def mark(self, epoch: int) -> None:
        """The guest is stopped: what it has written until now belongs to this checkpoint. Raises VmError."""

    def parts(self) -> list[DiskPart]:
        """What the checkpoint that was marked last says of them."""

    def logs(self) -> list[Buffer]:
        """What was written to each; called when the guest runs again. Raises VmError."""

    def status(self) -> dict[str, Any]:
        """For users."""


class QemuSource(SharedFile):
    """A guest of a QEMU that was started with what `command_line.additions` adds.

    stopper: closed with this object, also if this raises
    ram: the file that is its RAM
    machine: travels with each checkpoint
    before_pause: called right before each pause
    drain: called in each pause with the epoch, right after the stop: what the guest has sent until then belongs to that
        checkpoint, and waits for its commit
    status: what users may want to know of its network
    disks: None if it writes to none
    tracking, audit: as for `SharedFile`
    """

    def __init__(
        self,
        stopper: QmpStopper,
        ram: str | Path,
        machine: Machine,
        *,
        before_pause: Callable[[], None] | None = None,
        drain: Callable[[int], None] | None = None,
        status: Callable[[], dict[str, Any]] = lambda: {},
        disks: Disks | None = None,
        tracking: Tracking = "auto",
        audit: int = AUDIT_PAUSES,
    ) -> None:
        self._status = status
        self._qemu = stopper
        self._machine = part.pack_machine(machine)
        self._before_pause = before_pause
        self._drain = drain
        self._disks = disks
        super().__init__(ram, stopper, tracking=tracking, audit=audit)

    def status(self) -> dict[str, Any]:
        """Of the guest's network and disks."""
        return self._status() | ({} if self._disks is None else self._disks.status())

    def before_pause(self) -> None:
        """The guest is about to be stopped."""
        if self._before_pause is not None:
            self._before_pause()
        self._qemu.look()

    def drain(self, epoch: int) -> None:
        """What the guest has sent and written until now belongs to this checkpoint."""
        if self._disks is not None:
            self._disks.mark(epoch)
        if self._drain is not None:
            self._drain(epoch)

    def parts(self) -> Parts:
        """QEMU's device state, the machine, and what the guest has written to disks."""
        qemu, disks = self._qemu, self._disks
        if disks is None:
            return Parts(part.pack(self._machine, qemu.device_state(), qemu.is_running))
        packed = part.pack(self._machine, qemu.device_state(), qemu.is_running, disks.parts())
        return Parts(packed, late=lambda: part.pack_logs(disks.logs()))


def _time_of(event: Message) -> float:
    """When QEMU reported it, in Unix time."""
    stamp = event.get("timestamp")
    return stamp["seconds"] + stamp["microseconds"] / 1e6 if isinstance(stamp, dict) else 0.0


def version_of(qmp: Qmp) -> tuple[int, int, int]:
    """The version of a QEMU. Raises VmError."""
    found = qmp.execute("query-version")["qemu"]
    return int(found["major"]), int(found["minor"]), int(found["micro"])


def check_protectable(qmp: Qmp, ram_id: str) -> None:
    """Raise VmError if QEMU has state that would not be saved, or says that it cannot be saved."""
    blocks = _OTHER_MEMORY.findall(qmp.execute("human-monitor-command", {"command-line": "info ramblock"}))
    if not blocks:
        raise VmError("QEMU does not say what memory it has (info ramblock)")
    others = [name for name in blocks if not _KNOWN_MEMORY.fullmatch(name)]
    strange = [name for name in others if name not in (ram_id, "pc.ram", f"/objects/{ram_id}")]
    if strange:
        raise VmError(
            f"QEMU has memory besides the RAM, which would not be saved: {', '.join(strange)}: leave out the device "
            "that it belongs to"
        )
    blocked = qmp.execute("query-migrate").get("blocked-reasons") or []
    if blocked:
        raise VmError(f"QEMU says that the guest's state cannot be saved: {'; '.join(map(str, blocked))}")


def ram_of(qmp: Qmp) -> tuple[str, str]:
    """The backend that is the RAM of a running QEMU, and a path at which its file can be opened.

    Raises VmError if the RAM is no shared file.
    """

    def get(path: str, name: str) -> Any:
        return qmp.execute("qom-get", {"path": path, "property": name})

    how = "start QEMU with what `remus-ckpt qemu-args` prints"
    try:
        backend = str(get("/machine", "memory-backend")).rpartition("/")[2]
        path = f"/objects/{backend}"
        if not backend or not get(path, "share"):
            raise VmError(f"the RAM of QEMU (process {qmp.pid}) is not shared: {how}")
        file = str(get(path, "mem-path"))
    except VmError as error:
        raise VmError(f"the RAM of QEMU (process {qmp.pid}) is not in a file of its own: {how} ({error})") from None
    if (number := file.removeprefix("/proc/self/fd/")) != file:
        return backend, f"/proc/{qmp.pid}/fd/{number}"
    # The file may have lost its name, and QEMU may see other directories than we do.
    folder = f"/proc/{qmp.pid}/fd"
    try:
        for number in os.listdir(folder):
            with suppress(OSError):
                if os.readlink(f"{folder}/{number}") in (file, f"{file} (deleted)"):
                    return backend, f"{folder}/{number}"
    except OSError as error:
        raise VmError(f"QEMU (process {qmp.pid}) may not be inspected: run as its user or as root") from error
    raise VmError(f"QEMU (process {qmp.pid}) does not have {file} open: {how}")


def command_of(pid: int) -> list[str]:
    """The command line of a process. Raises VmError."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError as error:
        raise VmError(f"process {pid}: {error.strerror}") from None
    return [os.fsdecode(word) for word in words[:-1]]
