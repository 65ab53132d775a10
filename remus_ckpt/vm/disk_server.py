"""The disk server: an NBD server in a separate process that keeps what a guest writes (specs/disk.md §1).

    python -m remus_ckpt.vm.disk_server SETTINGS

QEMU mirrors the guest's disk to it (`blockdev-mirror`, write-blocking). For each checkpoint:

    stop the guest · mark() says where its writes end · resume it · read(…) · the checkpoint is committed · forget(…)

A mirror is worthless once it has missed a single write. So from the moment when its client is gone or a write has
failed, `mark` fails for good: another server, another mirror and a new copy of the disk are needed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.errors import Malformed, VmError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import MIB
from remus_ckpt.memory import keep_freed
from remus_ckpt.pages import Buffer
from remus_ckpt.vm.disk_log import ENTRY, WriteLog
from remus_ckpt.vm.nbd import Command, Request, Server
from remus_ckpt.vm.requests import MAX_MESSAGE_BYTES, ask

EXPORT = "disk"
HELD_BYTES = 192 * MIB
"""A checkpoint takes 256 MiB besides memory, and all that waits must fit into one."""
_SLOW_BYTES_S, _SLOWEST_BYTES_S = 512 * MIB, 4 * MIB
"""How fast a guest writes that has filled half of that, and all of it."""
_QUICK_S = 2.0
_SLOW_S = 30.0
_START_S = 60.0
_MOMENT_S = 0.1
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """The state of a disk server.

    trouble: why it misses writes; empty if it does not
    is_connected: whether QEMU is
    end: the position after the newest write; held_bytes: of writes that are not forgotten
    """

    trouble: str
    is_connected: bool
    end: int
    held_bytes: int


class DiskServer:
    """Owns the process, which ends with this object, or with this process.

    size: of the disk, in bytes
    path: of the Unix socket where QEMU connects
    held_bytes: how much may wait for commits; a write beyond that fails, and with it the mirror, but not the guest
    Any thread may call any method; `read` and `forget` do not delay the others. All raise VmError if the server
    refuses, or is gone; one that does not answer is killed, since QEMU waits for it.
    """

    def __init__(self, size: int, path: Path, *, held_bytes: int = HELD_BYTES) -> None:
        self.size, self.path = size, path
        listener = listen(path)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        self._quick, self._slow, self._data = (ours for ours, _ in pairs)
        self._locks = {self._quick: threading.Lock(), self._slow: threading.Lock()}
        disown_in_forks(self)
        fds = [listener.fileno(), *(there.fileno() for _, there in pairs)]
        settings = {"size": size, "held_bytes": held_bytes, "listener": fds[0], "owner": fds[1:]}
        try:
            with listener, pairs[0][1], pairs[1][1], pairs[2][1]:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, json.dumps(settings)],
                    pass_fds=fds,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except OSError as error:
            self.disown()
            raise VmError(f"the disk server cannot be started: {error}") from error
        try:
            self._ask(self._quick, _START_S, do="status")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def mark(self) -> int:
        """Where the guest's writes end, while it is stopped. If it raises VmError, there must be no checkpoint."""
        end: int = self._ask(self._quick, _QUICK_S, do="mark")["end"]
        return end

    def status(self) -> DiskStatus:
        """How the server is."""
        return DiskStatus(**self._ask(self._quick, _QUICK_S, do="status"))

    def read(self, start: int, stop: int) -> memoryview:
        """The log between two positions."""
        data = memoryview(np.empty(stop - start, np.uint8))
        with self._locks[self._slow]:
            self._ask_locked(self._slow, _SLOW_S, do="read", start=start, stop=stop)
            view = data
            try:
                self._data.settimeout(_SLOW_S)
                while view:
                    size = self._data.recv_into(view)
                    if not size:
                        raise ConnectionResetError("it has ended")
                    view = view[size:]
            except OSError as error:
                raise self._silent(error) from error
        return data

    def forget(self, before: int) -> None:
        """What was written before this position is committed."""
        self._ask(self._slow, _SLOW_S, do="forget", before=before)

    def close(self) -> None:
        """End the server. A guest that waits for it continues without the mirror."""
        self.disown()
        self._process.kill()
        self._process.wait()
        self.path.unlink(missing_ok=True)

    def disown(self) -> None:
        """In a forked child: close our copies of the sockets, with which the server ends."""
        for one in (self._quick, self._slow, self._data):
            one.close()

    def _ask(self, process: socket.socket, timeout_s: float, **request: Any) -> dict[str, Any]:
        with self._locks[process]:
            return self._ask_locked(process, timeout_s, **request)

    def _ask_locked(self, process: socket.socket, timeout_s: float, **request: Any) -> dict[str, Any]:
        try:
            process.settimeout(timeout_s)
            return ask(process, request, refusal=VmError)[0]
        except OSError as error:
            raise self._silent(error) from error

    def _silent(self, error: OSError) -> VmError:
        self._process.kill()
        return VmError(
            f"the disk server does not answer ({error.strerror or error}): no checkpoint is taken until another has a "
            "copy of the disk"
        )


def listen(path: Path) -> socket.socket:
    """A Unix socket that only its owner may connect to. Raises VmError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)  # nobody can connect before listen()
        listener.listen()
    except OSError as error:
        listener.close()
        raise VmError(f"{path}: no disk server can listen here: {error.strerror or error}") from error
    return listener


def serve(client: socket.socket, size: int, fulfil: Callable[[Server, Request], bytes]) -> None:
    """Serve one client until it is gone. fulfil: returns the reply to a request

    Raises Malformed, OSError.
    """
    server = Server(size, EXPORT)
    while not server.is_over:
        request = server.next_event()
        if out := server.to_send():
            client.sendall(out)
        if request is not None:
            client.sendall(fulfil(server, request))
        elif not server.is_over:
            server.buffer_updated(client.recv_into(server.get_buffer()))


# The process


def delay_s(size: int, held: int, most: int) -> float:
    """How long a write of `size` bytes is delayed while `held` bytes of at most `most` wait for commits.

    The less room is left, the longer: it lasts for seconds while nothing is committed, and a guest that is only a
    little faster than its checkpoints is hardly slowed. A write never waits for a commit, since QEMU waits for writes
    in its `stop`.
    """
    left = 2 * (most - held) / most
    return 0.0 if left > 1 else size / (_SLOWEST_BYTES_S * (_SLOW_BYTES_S / _SLOWEST_BYTES_S) ** left)


class Mirror:
    """Who writes to the log, and whether anything may be missing from it. QEMU connects once."""

    def __init__(self, size: int, held_bytes: int) -> None:
        self._size, self._held_bytes = size, held_bytes
        self._log = WriteLog()
        self._lock = threading.Lock()  # guards the next, together with what `mark` says
        self._trouble = ""
        self._is_connected = False

    def accept(self, listener: socket.socket) -> None:
        """Serve the only client."""
        client = listener.accept()[0]
        listener.close()
        end = "has gone"
        self._is_connected = True
        try:
            serve(client, self._size, self._fulfil)
        except Malformed as error:
            end = f"has broken the protocol: {error}"
        except OSError as error:
            end = f"is lost: {error.strerror}"
        finally:
            self._fail(f"QEMU {end}")
            client.close()

    def _fail(self, trouble: str) -> None:
        with self._lock:
            self._trouble = self._trouble or trouble

    def _fulfil(self, server: Server, request: Request) -> bytes:
        if request.command == Command.READ:
            return server.reply(request, errno.EIO)  # a mirror never reads, and there is nothing to read here
        if request.command == Command.FLUSH:
            return server.reply(request)  # what the guest does on its strength waits for a commit that contains it
        held, size = self._log.held_bytes, ENTRY.size + (0 if request.data is None else request.length)
        if held + size > self._held_bytes:
            self._fail(f"{held:,} bytes of writes wait for commits, and that is the most")
            return server.reply(request, errno.ENOSPC)
        if wait_s := delay_s(size, held, self._held_bytes):
            time.sleep(wait_s)
        self._log.append(request.offset, request.length, request.data)
        return server.reply(request)

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[Buffer]]:
        """Fulfil a request of the owner's: the reply, and what follows it. Raises VmError or ValueError."""
        match request.get("do"):
            case "status":
                end, held_bytes = self._log.end, self._log.held_bytes
                with self._lock:
                    found = DiskStatus(self._trouble, self._is_connected, end, held_bytes)
                return {name: getattr(found, name) for name in DiskStatus.__slots__}, []
            case "mark":
                with self._lock:
                    if self._trouble or not self._is_connected:
                        raise VmError(f"the disk's mirror misses writes: {self._trouble or 'it has not begun'}")
                    return {"end": self._log.end}, []
            case "read":
                return {}, self._log.read(request["start"], request["stop"])
            case "forget":
                self._log.forget(request["before"])
                return {}, []
        raise ValueError(f"no request is called {request.get('do')!r:.100}")


def _obey(owner: socket.socket, data: socket.socket, answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answer the owner's requests until it is gone."""
    with contextlib.suppress(OSError):
        while asked := owner.recv(MAX_MESSAGE_BYTES):
            rest: list[Buffer] = []
            try:
                reply, rest = answer(json.loads(asked))
            except (VmError, ValueError, KeyError, TypeError) as error:
                reply = {"error": str(error)}
            owner.send(json.dumps(reply).encode())
            for piece in rest:
                data.sendall(piece)


def main() -> None:
    """Serve what the command line names, until the owner is gone."""
    keep_freed()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)  # the guest needs its disk until the owner has ended
    settings = json.loads(sys.argv[1])
    quick, slow, data = (socket.socket(fileno=fd) for fd in settings["owner"])
    mirror = Mirror(settings["size"], settings["held_bytes"])
    listener = socket.socket(fileno=settings["listener"])
    threading.Thread(target=mirror.accept, args=(listener,), daemon=True).start()
    threading.Thread(target=_obey, args=(slow, data, mirror.answer), daemon=True).start()
    _obey(quick, data, mirror.answer)
    os._exit(0)  # the client may still be served


if __name__ == "__main__":
    main()
