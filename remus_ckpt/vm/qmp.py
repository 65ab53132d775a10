"""QMP, QEMU's control protocol, for blocking callers: one JSON object a line, both ways.

A library for it exists, `qemu.qmp`; its event loop took most of a pause (specs/decisions/0055-qmp-without-a-loop.md).

Source: QEMU, docs/interop/qmp-spec.rst and the QAPI reference.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_ckpt.errors import VmError

_UCRED = struct.Struct("=3i")
_POLL_S = 0.005
LINE_BYTES = 16 << 20
"""The longest answer that is read."""
_ONCE_BYTES = 1 << 16


def _pid_of(connection: socket.socket) -> int:
    pid: int = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    return pid


def listener_of(path: Path) -> int | None:
    """The process that listens at a socket, also if it is busy with another client; None if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except OSError:
            return None
        return _pid_of(connection)


Command = tuple[str, Mapping[str, Any]]
"""A command's name and arguments."""
Message = dict[str, Any]
"""An event, as QEMU reports it: its name is under "event"."""


@dataclass(slots=True, eq=False)
class Pending:
    """A command that was given, and its answer once it has arrived."""

    command: str
    answer: Message | None = None


class Qmp:
    """A connection to the control socket of a QEMU.

    path: of the socket; QEMU serves one client at a time there, and others wait
    timeout_s: for the connection, and for each command that is given no other
    wait_s: how long to wait for the socket to appear, while QEMU starts and `is_starting`
    pid: of QEMU, as the kernel says

    One thread at a time; a second one waits. Nothing is read between two calls: QEMU keeps what it has to say.
    Raises VmError if nothing answers there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        timeout_s: float = 10.0,
        wait_s: float = 0.0,
        is_starting: Callable[[], bool] = lambda: True,
    ) -> None:
        self.path = str(path)
        self._timeout_s = timeout_s
        self._lock = threading.RLock()  # guards all that follows
        self._came = bytearray()
        self._events: list[Message] = []
        self._pending: dict[int, Pending] = {}
        self._count = 0
        self._socket: socket.socket | None = self._dial(wait_s, is_starting)
        try:
            self.pid = _pid_of(self._socket)
            deadline = time.monotonic() + timeout_s
            while not self._events:  # the greeting, which is not an event, but arrives here too
                self._read(deadline, "connect", timeout_s)
            self._events.clear()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the connection has not been closed."""
        return self._socket is not None

    @property
    def connection(self) -> int:
        """The socket's descriptor, -1 once it is closed. It polls readable when QEMU has something to say, or is
        gone."""
        return -1 if self._socket is None else self._socket.fileno()

    def _dial(self, wait_s: float, is_starting: Callable[[], bool]) -> socket.socket:
        begun = time.monotonic()
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(self.path)
                return connection
            except OSError as error:
                connection.close()
                # EAGAIN: the queue is full. Clients that have given up count until QEMU gets to them.
                is_full = isinstance(error, BlockingIOError)
                deadline = begun + (max(wait_s, self._timeout_s) if is_full else wait_s)
                if not is_starting():
                    raise VmError("QEMU ended before it could be reached: see its output above") from None
                if time.monotonic() >= deadline:
                    raise VmError(
                        f"{self.path}: no QEMU answers there ({error.strerror or error}): give it "
                        f"-qmp unix:{self.path},server=on,wait=off"
                    ) from None
            time.sleep(_POLL_S)

    # The caller has the lock in the next four.

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise VmError(f"{self.path}: the connection to QEMU is closed")
        return self._socket

    def _send(self, commands: Sequence[Command], fds: Sequence[int] = ()) -> list[Pending]:
        connection = self._open()
        found, lines = [], []
        for command, arguments in commands:
            self._count += 1
            request: Message = {"execute": command, "id": self._count}
            if arguments:
                request["arguments"] = dict(arguments)
            lines.append(json.dumps(request).encode() + b"\n")
            found.append(Pending(command))
            self._pending[self._count] = found[-1]
        data = b"".join(lines)
        connection.settimeout(self._timeout_s)
        try:
            if fds:
                data = data[socket.send_fds(connection, [data], fds) :]
            connection.sendall(data)
        except OSError as error:
            raise VmError(f"{self.path}: QEMU does not take `{commands[-1][0]}`: {error.strerror or error}") from error
        return found

    def _read(self, deadline: float, what: str, wait_s: float) -> None:
        """Wait for more from QEMU, and take it in. Raises VmError."""
        connection = self._open()
        try:
            connection.settimeout(max(deadline - time.monotonic(), 1e-6))
            data = connection.recv(_ONCE_BYTES)
        except TimeoutError:
            raise VmError(
                f"{self.path}: QEMU has not answered `{what}` within {wait_s:g} s: check whether it is frozen, "
                "whether another client uses this socket, and whether a disk hangs"
            ) from None
        except OSError as error:
            raise VmError(f"{self.path}: QEMU does not do `{what}`: {error.strerror or error}") from error
        if not data:
            raise VmError(f"{self.path}: QEMU does not do `{what}`: it has ended, or hung up")
        self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        self._came += data
        *lines, rest = self._came.split(b"\n")
        if len(rest) > LINE_BYTES:
            raise VmError(f"{self.path}: QEMU's answer has more than {LINE_BYTES:,} bytes")
        self._came = rest
        for line in lines:
            try:
                message = json.loads(line)
                pending = self._pending.pop(message.get("id"), None)
            except (ValueError, AttributeError, TypeError, RecursionError):
                raise VmError(f"{self.path}: what answers there does not speak QMP: {bytes(line[:80])!r}") from None
            if "event" in message or "QMP" in message:
                self._events.append(message)
            elif pending is not None:
                pending.answer = message

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Do one command; returns its answer. Raises VmError if QEMU refuses, is gone, or takes too long."""
        return self.execute_all([(command, arguments or {})], timeout_s=timeout_s)[0]

    def execute_all(self, commands: Sequence[Command], *, timeout_s: float | None = None) -> list[Any]:
        """Give QEMU several commands at once, which it does in order; returns their answers. Raises like `finish`."""
        with self._lock:
            return self.finish(self.begin(commands), timeout_s=timeout_s)

    def begin(self, commands: Sequence[Command]) -> list[Pending]:
        """Give QEMU several commands at once, which it does in order. Returns what `finish` waits for.

        Raises VmError if the connection is closed, or QEMU is gone.
        """
        with self._lock:
            return self._send(commands)

    def finish(self, pending: Sequence[Pending], *, timeout_s: float | None = None) -> list[Any]:
        """Wait for answers, and return them.

        Raises VmError, for the first that failed, once all have been answered; those after it were done all the same.
        """
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + wait_s
        with self._lock:
            while any(one.answer is None for one in pending):
                self._read(deadline, pending[-1].command, wait_s)
        answers = []
        for one in pending:
            assert one.answer is not None
            if "return" not in one.answer:
                error = one.answer.get("error")
                reason = error.get("desc") if isinstance(error, dict) else error
                raise VmError(f"QEMU refuses `{one.command}`: {reason}")
            answers.append(one.answer["return"])
        return answers

    def give(self, command: str) -> None:
        """Give QEMU a command, and do not wait for the answer, nor tell whether it failed."""
        with suppress(VmError):
            self.begin([(command, {})])

    def events(self, *, look: bool = True) -> list[Message]:
        """What QEMU has reported since the last call, oldest first. Raises VmError if QEMU is gone and all that it has
        reported was returned.

        look: also at what has arrived since the last answer
        """
        with self._lock:
            if look and self._socket is not None:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                try:
                    while poll.poll(0):
                        self._read(time.monotonic() + self._timeout_s, "events", self._timeout_s)
                except VmError:
                    if not self._events:
                        raise
            events, self._events = self._events, []
        return events

    def add_fd(self, fd: int, *, fdset: int) -> None:
        """Give QEMU a descriptor, which it can open as /dev/fdset/NUMBER. Raises VmError."""
        self._send_fd(fd, "add-fd", {"fdset-id": fdset})

    def get_fd(self, fd: int, *, name: str) -> None:
        """Give QEMU a descriptor, which it knows by this name from then on. Raises VmError."""
        self._send_fd(fd, "getfd", {"fdname": name})

    def _send_fd(self, fd: int, command: str, arguments: Mapping[str, Any]) -> None:
        with self._lock:
            self.finish(self._send([(command, arguments)], [fd]))

    def close(self) -> None:
        """Hang up; QEMU runs on. May be called again."""
        with self._lock:
            connection, self._socket = self._socket, None
            if connection is not None:
                connection.close()
