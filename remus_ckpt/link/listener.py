"""Listening for the other side."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from remus_ckpt.errors import LinkError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.link.address import INSECURE_OPTION, Address, check_plain, resolve
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import dial
from remus_ckpt.link.sockets import Late, say
from remus_ckpt.link.tls import TlsFiles

_BACKLOG = 1024
"""When the queue is full, the kernel drops new peers, who try again a second later at the earliest."""
_LOCK_WAIT_S = 2.0
_RESOLVE_S = 30.0


class Listener:
    """Waits for peers at an address; `fileno()` is readable when one is there.

    tls: needed for tls://, unused otherwise
    insecure: allow plain tcp:// on an address that other machines can reach
    address: where it actually listens, with the port that was chosen for port 0
    A Unix socket has mode 0600; an existing one is replaced if nothing listens on it.
    Raises LinkError.
    """

    def __init__(self, address: Address, *, tls: TlsFiles | None = None, insecure: bool = False) -> None:
        if address.scheme == "tls" and tls is None:
            raise LinkError(f"{address}: TLS needs a certificate: give --tls-dir, a folder made by `keys issue`")
        self._tls = tls if address.scheme == "tls" else None
        self._inode: tuple[int, int] | None = None
        self._lock = threading.Lock()
        try:
            if address.scheme == "unix":
                self._socket = self._bind_path(address.path)
                self.address = address
            else:
                family, where = resolve(address, time.monotonic() + _RESOLVE_S, passive=True)[0]
                check_plain(address, where, insecure, INSECURE_OPTION)
                is_both = family == socket.AF_INET6 and address.host == "::"
                self._socket = socket.create_server(where, family=family, backlog=_BACKLOG, dualstack_ipv6=is_both)
                self.address = Address(address.scheme, host=address.host, port=self._socket.getsockname()[1])
        except Late:
            raise LinkError(f"{address}: no address for {address.host} within {_RESOLVE_S:g} s") from None
        except OSError as error:
            raise LinkError(f"{address}: {say(error, to_listen=True)}") from error
        disown_in_forks(self)
        self._socket.setblocking(False)
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind_path(self, path: str) -> socket.socket:
        with _locked_folder(path):
            _remove_stale(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.bind(path)
                # Nobody can connect before listen(), so there is no instant at which others could.
                os.chmod(path, 0o600)
                sock.listen(_BACKLOG)
                status = os.stat(path)
            except BaseException:
                sock.close()
                raise
        self._inode = status.st_dev, status.st_ino
        return sock

    def fileno(self) -> int:
        """The descriptor, for a poll; -1 when closed."""
        return self._socket.fileno()

    def accept(self) -> Connection | None:
        """Accept the waiting peer, without a handshake yet; None if there is none, or none could be accepted.

        Never waits. Raises LinkError when the listener is closed.
        """
        try:
            sock, where = self._socket.accept()
        except OSError as error:
            if self._socket.fileno() < 0:
                raise LinkError(f"{self.address}: the listener is closed") from None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            elif error.errno == errno.EINVAL:
                raise LinkError(f"{self.address}: the listener is closed") from None
            return None
        if self.address.scheme == "unix":
            address = self.address
        else:
            address = Address(self.address.scheme, host=where[0].removeprefix("::ffff:"), port=where[1])
        try:
            return Connection(sock, address, self._tls, None)
        except BaseException:
            sock.close()
            raise

    def _turn_away(self) -> None:
        """Hang up on the waiting peer although no descriptor is left: otherwise it would keep a poll awake for ever."""
        with self._lock:
            if self._spare < 0:
                return
            os.close(self._spare)
            with suppress(OSError):
                self._socket.accept()[0].close()
            try:
                self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._spare = -1

    def disown(self) -> None:
        """In a forked child: the parent keeps listening, and the child must not take its peers or its path."""
        self._inode = None
        self._socket.close()

    def close(self) -> None:
        """Stop listening; connections remain. Wakes a poll. May be called twice, and from any thread."""
        with self._lock:
            if self._socket.fileno() < 0:
                return
            if self._inode is not None:
                with suppress(OSError):
                    status = os.stat(self.address.path)
                    if (status.st_dev, status.st_ino) == self._inode:
                        os.unlink(self.address.path)
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            if self._spare >= 0:
                os.close(self._spare)
                self._spare = -1


@contextmanager
def _locked_folder(path: str) -> Iterator[None]:
    """Let only one listener at a time examine the folder: two that start at once must not both replace the socket."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise LinkError(f"{path}: another process holds a lock on its folder") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise LinkError(f"{path} exists and is not a socket: remove it, or name another path")
    try:
        dial(socket.AF_UNIX, path, time.monotonic()).close()
    except ConnectionRefusedError:
        os.unlink(path)
    except Late:  # a listener whose queue is full
        raise LinkError(f"{path}: another process listens there already: stop it, or name another path") from None
    except OSError as error:
        raise LinkError(f"{path}: {say(error)}") from error
    else:
        raise LinkError(f"{path}: another process listens there already: stop it, or name another path")
