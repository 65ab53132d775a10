"""A running guest's disk, by QMP: each write goes to a disk server too, and the disk can be read (specs/disk.md §1)."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from remus_ckpt.errors import VmError
from remus_ckpt.vm.disk_server import EXPORT, DiskServer

_POLL_S = 0.005
_END_S = 10.0
_ORDERLY_S = 2.0
_READY_S = 30.0
_READ_S = 60.0
_MAX_REPLY = 64 * 1024


class Monitor(Protocol):
    """What is needed of a connection to QEMU, such as `Qmp`."""

    def execute(self, command: str, arguments: Mapping[str, Any] = ..., /) -> Any:
        """What a command returns. Raises VmError."""


def disk_of(monitor: Monitor, device: str) -> tuple[str, int]:
    """The node of a drive, and the guest's disk in bytes. Raises VmError if QEMU has no such drive."""
    for found in monitor.execute("query-block", {}):
        inserted = found.get("inserted")
        if found["device"] == device and inserted:
            return str(inserted["node-name"]), int(inserted["image"]["virtual-size"])
    raise VmError(f"QEMU has no drive {device!r}, or nothing is in it")


class DiskMirror:
    """A job of QEMU: from the end of this call on, each write of the guest completes only when a server has it too.

    What was written before is not copied. The guest runs on if the mirror fails; then the server refuses every `mark`.

    A job that ends by an error, or by force, while a write of the guest is under way makes QEMU (7.2 and 10.0) write to
    memory that it has freed: `mirror_run` frees `in_flight_bitmap` before it waits for such writes. So an error only
    halts the job, and it is ended in order, which waits for them first, or by force while the guest is stopped.

    device: the drive's id
    Raises VmError if QEMU refuses. One thread at a time.
    """

    def __init__(self, monitor: Monitor, device: str, server: DiskServer) -> None:
        self._monitor, self._name = monitor, f"remus-{device}"
        self.end()  # what a protector has left that was killed
        where = {"type": "unix", "path": str(server.path)}
        node = {"driver": "nbd", "node-name": self._name, "server": where, "export": EXPORT, "discard": "unmap"}
        monitor.execute("blockdev-add", node)
        job = {"job-id": self._name, "device": device, "target": self._name, "sync": "none"}
        job |= {"copy-mode": "write-blocking", "on-target-error": "stop"}
        try:
            monitor.execute("blockdev-mirror", job)
            deadline = time.monotonic() + _READY_S
            while not self._running_job()["ready"]:
                if time.monotonic() > deadline:
                    raise VmError(f"the mirror of the disk {device} did not begin within {_READY_S:g} s")
                time.sleep(_POLL_S)
        except VmError:
            with suppress(VmError):  # QEMU has ended
                self.end()
            raise

    def check(self) -> None:
        """Raise VmError if the mirror has failed."""
        self._running_job()

    def end(self) -> None:
        """End the job, and let go of the server. Raises VmError."""
        if not self._cancel(_ORDERLY_S, force=False):
            with _stopped(self._monitor):
                if not self._cancel(_END_S, force=True):
                    raise VmError(f"the mirror of the guest's disk did not end within {_END_S:g} s")
        with suppress(VmError):  # it may be gone with its job
            self._monitor.execute("blockdev-del", {"node-name": self._name})

    def _cancel(self, patience_s: float, *, force: bool) -> bool:
        """Returns whether the job is gone. One that has failed ends by force only."""
        deadline = time.monotonic() + patience_s
        while (job := self._job()) is not None:
            if time.monotonic() > deadline or not (force or _is_well(job)):
                return False
            with suppress(VmError):  # it is ending already
                self._monitor.execute("block-job-cancel", {"device": self._name, "force": force})
            time.sleep(_POLL_S)
        return True

    def _running_job(self) -> dict[str, Any]:
        if (job := self._job()) is None or not _is_well(job):
            raise VmError("the mirror of the guest's disk has failed: the guest runs on, but its disk is not protected")
        return job

    def _job(self) -> dict[str, Any] | None:
        jobs = self._monitor.execute("query-block-jobs", {})
        return next((job for job in jobs if job["device"] == self._name), None)


def _is_well(job: dict[str, Any]) -> bool:
    return bool(job.get("io-status", "ok") == "ok")


@contextmanager
def _stopped(monitor: Monitor) -> Iterator[None]:
    """Stop the guest for some milliseconds; resume it if it ran."""
    is_running = monitor.execute("query-status", {})["running"]
    try:
        if is_running:
            monitor.execute("stop", {})  # one that is late happens all the same, and `cont` behind it
        yield
    finally:
        if is_running:
            monitor.execute("cont", {})


@contextmanager
def reading(monitor: Monitor, node: str, path: Path) -> Iterator[DiskReader]:
    """Read a disk of a running guest, whatever its format, through QEMU.

    path: for a Unix socket
    Raises VmError.
    """
    name = "remus-copy"
    if any(one["id"] == name for one in monitor.execute("query-block-exports", {})):
        monitor.execute("nbd-server-stop", {})  # a protector was killed while it read
    monitor.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    try:
        monitor.execute(
            "block-export-add", {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": False}
        )
        reader = DiskReader(path, name)
        try:
            yield reader
        finally:
            reader.close()
    finally:
        with suppress(VmError):  # QEMU may be gone
            monitor.execute("nbd-server-stop", {})  # with its exports
        path.unlink(missing_ok=True)


class DiskReader:
    """A client that reads an NBD export. Raises VmError; so do the methods.

    Source: the protocol description of the Network Block Device project, doc/proto.md: fixed newstyle handshake,
    NBD_OPT_GO, simple replies.
    """

    def __init__(self, path: Path, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_READ_S)
        try:
            self._socket.connect(str(path))
            magic, option, _ = struct.unpack(">8s8sH", self._receive(18))
            if (magic, option) != (b"NBDMAGIC", b"IHAVEOPT"):
                raise VmError(f"{path}: no NBD server answers there")
            name = export.encode()
            choice = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
            self._socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(choice)) + choice)
            while (kind := self._option_reply()) != 1:
                if kind >= 1 << 31:
                    raise VmError(f"{path}: the export {export!r} was refused (NBD reply {kind:#x})")
        except OSError as error:
            self.close()
            raise VmError(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _option_reply(self) -> int:
        _, _, kind, length = struct.unpack(">QIII", self._receive(20))
        if length > _MAX_REPLY:
            raise VmError(f"a reply of {length} bytes to an NBD option")
        self._receive(length)
        return int(kind)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes of the disk."""
        try:
            self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, offset, offset, length))
            _, error, _ = struct.unpack(">IIQ", self._receive(16))
            if error:
                raise VmError(f"the guest's disk cannot be read at {offset}: NBD error {error}")
            return self._receive(length)
        except OSError as error:
            raise VmError(f"the guest's disk cannot be read at {offset}: {error.strerror or error}") from error

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            some = self._socket.recv_into(view)
            if not some:
                raise ConnectionResetError("QEMU has hung up")
            view = view[some:]
        return bytes(data)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
