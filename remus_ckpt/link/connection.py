"""Connections between primary and backup: mutual TLS 1.3, Unix sockets, and plain TCP on loopback.

This module owns sockets, deadlines and certificates. It carries bytes and knows nothing about frames; the frames tell a
complete stream from a truncated one. Every wait has a deadline, and `close()` from any thread can end it.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Self, cast

from remus_ckpt.errors import LinkError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.link.address import Address
from remus_ckpt.link.rights import EVERYTHING, Rights
from remus_ckpt.link.sockets import Late, deadline_of, say, wait
from remus_ckpt.link.tls import Judgement, TlsFiles
from remus_ckpt.pages import Buffer
from remus_ckpt.wire.xen.whole import HAS_NATIVE, receive

_MAX_VECTORS = 1024
_RECORD_BYTES = 16 << 10
"""One TLS record, and one SSL_write (RFC 8446, section 5.1)."""
_JOIN_BYTES = 64 << 10
"""Buffers smaller than a record are joined up to this before they are encrypted."""
_CIPHER_BYTES = 128 << 10
"""Encrypted bytes that go to, or come from, the kernel in one call."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""Seconds, seconds, count: a peer whose machine is gone is noticed in half a minute, without any heartbeat."""
_USER_TIMEOUT_MS = 120_000
"""A peer that accepts nothing for that long is gone too; a disk that hangs for a while must not look like that."""


class _Use:
    """Keeps a descriptor from being closed and reused while a thread waits on it."""

    def __init__(self, connection: Connection) -> None:
        # A reference cycle would keep TLS state until garbage collection, long after the connection is gone.
        self._connection = weakref.proxy(connection)

    def __enter__(self) -> None:
        connection = self._connection
        connection._users.add(threading.get_ident())
        # Check after registering: `close` sets its flag before it looks for users, so one of the two sees the other.
        if connection._is_closed:
            connection._leave()
            raise LinkError(f"{connection.peer}: the connection is closed")

    def __exit__(self, *_: object) -> None:
        self._connection._leave()


class Connection:
    """Bytes to and from one peer, made by `connect` or by a listener's `accept`.

    One thread may send while another receives; several senders take turns. Any thread may close.

    peer: the address of the other side and, after the handshake, the name in its certificate or its process number
    certificate_name: that name alone, None without TLS
    rights: what the certificate of the other side allows it; everything without TLS
    bytes_sent, bytes_received: payload, without what TLS adds
    """

    # TLS runs on buffers in memory, not on the socket. OpenSSL allows one call at a time for one connection, so each
    # is made under a lock; kept off the socket, none of them waits for the peer, and the kernel is asked once for
    # eight records instead of twice for each.

    def __init__(self, sock: socket.socket, address: Address, tls: TlsFiles | None, server_name: str | None) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            # A peer that is gone already makes these fail; the first read says so.
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEPALIVE:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        self.address = address
        self.peer = str(address)
        self.certificate_name: str | None = None
        self.rights = EVERYTHING
        self.bytes_sent = 0
        self.bytes_received = 0
        self._socket = sock
        disown_in_forks(self)
        self._is_server = server_name is None
        self._users: set[int] = set()  # threads that use the descriptor
        self._use = _Use(self)
        self._is_closed = False
        self._send_lock = threading.Lock()
        self._send_fault: str | None = None
        self._receive_fault: str | None = None
        self._is_ready = False
        self._files = tls
        self._certificate: bytes | None = None  # the other side's, in DER
        self._judgement: Judgement | None = None  # of it
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            context = tls.server_context() if self._is_server else tls.client_context()
            self._tls_lock = threading.Lock()
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=self._is_server, server_hostname=server_name
            )
            # Small until the peer has shown who it is.
            self._cipher = memoryview(bytearray(_RECORD_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, for a poll; -1 when closed. Readiness says nothing about bytes that TLS already holds."""
        return self._socket.fileno()

    def is_writable(self) -> bool:
        """Whether a few kilobytes can be sent without waiting for the peer. Raises LinkError when closed."""
        with self._use:
            poll = select.poll()
            poll.register(self._socket.fileno(), select.POLLOUT)
            return bool(poll.poll(0))

    def disown(self) -> None:
        """In a forked child: release the connection, which stays intact in the parent."""
        self._is_closed = True
        self._socket.close()  # not shut down: that would end it for the parent too

    def _leave(self) -> None:
        self._users.discard(threading.get_ident())
        if self._is_closed:
            self._shut()

    def close(self) -> None:
        """Hang up. Threads that wait get a LinkError. May be called twice, and from any thread."""
        self._is_closed = True
        self._users.discard(threading.get_ident())  # it is still there where an interrupt cut a use short
        self._shut()

    def _shut(self) -> None:
        with suppress(OSError):  # it may be closed, or the peer gone
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._users:
            self._socket.close()

    def finish(self, timeout_s: float) -> None:
        """Hang up so that the last bytes arrive: announce the end, and wait for the other side to hang up.

        Otherwise, unread bytes from the peer would make the kernel drop what is still on its way to the peer.
        Raises nothing; what the peer still sends is dropped. No other thread may be receiving.
        """
        deadline = time.monotonic() + timeout_s
        try:
            with suppress(OSError, LinkError, Late), self._use:
                if not self._send_lock.acquire(timeout=timeout_s):
                    return
                try:
                    if self._tls is not None and self._is_ready and self._send_fault is None:
                        with self._tls_lock:
                            with suppress(ssl.SSLError):
                                self._tls.unwrap()
                            last = self._outgoing.read()
                        self._send_plain([memoryview(last)], deadline)
                    self._send_fault = "this side closed the connection"
                finally:
                    self._send_lock.release()
                self._socket.shutdown(socket.SHUT_WR)
                scrap = memoryview(bytearray(_JOIN_BYTES))
                while self._receive_plain(scrap, deadline) and time.monotonic() < deadline:
                    continue
        finally:
            self.close()

    def handshake(self, timeout_s: float) -> None:
        """Do the handshake: TLS if the connection uses it; on a Unix socket, a check of the peer's user.

        The timeout covers the whole handshake, so that a peer who sends a byte a second gains nothing. Call this once,
        in the connection's own thread, before anything else.
        Raises LinkError; the connection is then closed.
        """
        try:
            with self._use:
                if self._tls is not None:
                    self._shake(self._tls, deadline_of(timeout_s))
                elif self._socket.family == socket.AF_UNIX:
                    self._check_user()
            self._is_ready = True
        except Late:
            self.close()
            raise LinkError(f"{self.peer}: no TLS handshake in time: check that the other side uses TLS") from None
        except OSError as error:
            self.close()
            raise LinkError(f"{self.peer}: {say(error)}") from error
        except LinkError:
            self.close()
            raise

    def _shake(self, tls: ssl.SSLObject, deadline: float | None) -> None:
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_plain([memoryview(self._outgoing.read())], deadline)
                if not self._fetch(deadline):
                    raise LinkError(f"{self.peer}: it hung up in the middle of the handshake") from None
            except ssl.SSLError:
                # The alert tells the other side why.
                with suppress(OSError, LinkError, Late):
                    self._send_plain([memoryview(self._outgoing.read())], time.monotonic())
                raise
            else:
                break
        self._send_plain([memoryview(self._outgoing.read())], deadline)
        self._cipher = memoryview(bytearray(_CIPHER_BYTES))
        self._certificate = tls.getpeercert(binary_form=True)
        if self._files is not None and self._certificate is not None:
            self._judgement = self._files.judge(self._certificate)
        try:
            shown = cast("dict[str, Any]", tls.getpeercert() or {})
        except ValueError as error:
            raise LinkError(f"{self.peer}: its certificate cannot be read: {error}") from error
        self.rights = Rights.of(value for kind, value in shown.get("subjectAltName", ()) if kind == "URI")
        names = [value for row in shown.get("subject", ()) for key, value in row if key == "commonName"]
        self.certificate_name = names[0] if names else None
        if self.certificate_name:
            self.peer = f"{self.peer} ({self.certificate_name})"

    def distrust(self) -> str | None:
        """Why the other side's certificate is no longer trusted, as the end of a sentence: it has been revoked, or its
        CA is not among ours any more. None if it is. Called by one thread."""
        if self._files is None or self._certificate is None:
            return None
        self._judgement = self._files.judge(self._certificate, self._judgement)
        return self._judgement.fault

    def _check_user(self) -> None:
        packed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", packed)
        self.peer = f"{self.peer} (pid {pid})"
        ours = os.geteuid()
        # Root may send its memory to any user's backup; otherwise both sides must be the same user, or the peer root.
        if uid not in (0, ours) and (self._is_server or ours):
            raise LinkError(f"{self.peer}: the other side is user {uid}: run both as the same user, or as root")

    def send(self, buffers: Sequence[Buffer], timeout_s: float | None) -> None:
        """Send all of the buffers.

        buffers: C-contiguous, of any item size; they are not kept
        timeout_s: for all of it
        Raises LinkError; what was sent may then be cut anywhere, and nothing can be sent after it.
        """
        deadline = deadline_of(timeout_s)
        views = [_flat(buffer) for buffer in buffers]
        size = sum(map(len, views))
        if not self._send_lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            raise LinkError(f"{self.peer}: another thread was still sending after {timeout_s:g} s")
        try:
            self._enter()
            if self._send_fault is not None:
                raise LinkError(f"{self.peer}: {self._send_fault}")
            try:
                if self._tls is None:
                    self._send_plain(views, deadline)
                else:
                    self._send_tls(self._tls, views, deadline)
            except Late:
                self._send_fault = f"it did not accept the data within {timeout_s:g} s"
                raise LinkError(f"{self.peer}: {self._send_fault}") from None
            except OSError as error:
                self._send_fault = say(error)
                raise LinkError(f"{self.peer}: {self._send_fault}") from error
            except BaseException:  # such as Ctrl-C
                self._send_fault = "sending was interrupted"
                raise
            self.bytes_sent += size
        finally:
            self._leave()
            self._send_lock.release()

    def _enter(self) -> None:
        """As `_use`, for sending and receiving, which `_leave` ends: in fewer steps, since a commit waits for them."""
        self._users.add(threading.get_ident())
        if self._is_closed:
            raise LinkError(f"{self.peer}: the connection is closed")
        if not self._is_ready:
            raise ValueError("handshake() comes first")

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError(f"{self.peer}: the connection was closed here")

    def _send_plain(self, views: list[memoryview], deadline: float | None) -> None:
        """Send all of them; the list is used up."""
        at = 0
        while at < len(views):
            try:
                size = self._socket.sendmsg(views[at : at + _MAX_VECTORS], (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                wait(self._socket.fileno(), select.POLLOUT, deadline)
                self._check_open()
                continue
            except OSError:
                self._check_open()
                raise
            while at < len(views) and size >= len(views[at]):
                size -= len(views[at])
                at += 1
            if size:
                views[at] = views[at][size:]
            if at < len(views) and deadline is not None and time.monotonic() > deadline:
                raise Late

    def _send_tls(self, tls: ssl.SSLObject, views: list[memoryview], deadline: float | None) -> None:
        for view in _joined(views):
            for start in range(0, len(view), _CIPHER_BYTES):
                part = view[start : start + _CIPHER_BYTES]
                at = 0
                while at < len(part):
                    with self._tls_lock:
                        at += tls.write(part[at : at + _RECORD_BYTES])
                with self._tls_lock:
                    sealed = self._outgoing.read()
                self._send_plain([memoryview(sealed)], deadline)

    def recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """Receive what is there, at least a byte; 0 at the end of the stream.

        view: writable, not empty, format "B"
        timeout_s: for the first byte; 0 takes only what is there
        An unannounced end counts as an end too: the frames above know if it came too early.
        Raises TimeoutError, and LinkError when the link is broken.
        """
        if not len(view):
            raise ValueError("the view is empty")
        deadline = deadline_of(timeout_s)
        try:
            self._enter()
            if self._receive_fault is not None:
                raise LinkError(f"{self.peer}: {self._receive_fault}")
            if self._tls is None:
                size = self._receive_plain(view, deadline)
            else:
                size = self._receive_tls(self._tls, view, deadline)
        except Late:
            raise TimeoutError(f"{self.peer}: nothing came within {timeout_s:g} s") from None
        except OSError as error:
            raise LinkError(f"{self.peer}: {say(error)}") from error
        finally:
            self._leave()
        self.bytes_received += size
        return size

    def _receive_plain(self, view: memoryview, deadline: float | None) -> int:
        if HAS_NATIVE:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                received = receive(self._socket.fileno(), view, left_s)
            except OSError:
                self._check_open()
                raise
            if received is None:
                raise Late
            if not received:
                self._check_open()
            return received
        while True:
            try:
                size = self._socket.recv_into(view)
            except BlockingIOError:
                wait(self._socket.fileno(), select.POLLIN, deadline)
                self._check_open()
                continue
            except OSError:
                self._check_open()
                raise
            if not size:
                self._check_open()
            return size

    def _fetch(self, deadline: float | None) -> int:
        """Move encrypted bytes from the socket to where TLS reads them; 0 at the end."""
        size = self._receive_plain(self._cipher, deadline)
        if size:
            self._incoming.write(self._cipher[:size])
        else:
            self._incoming.write_eof()
        return size

    def _receive_tls(self, tls: ssl.SSLObject, view: memoryview, deadline: float | None) -> int:
        got = 0
        while True:
            try:
                while got < len(view):
                    with self._tls_lock:
                        size = cast(int, tls.read(len(view) - got, view[got:]))
                    if not size:
                        return got
                    got += size
                return got
            except ssl.SSLWantReadError:
                if got:
                    return got
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return got
            except ssl.SSLError as error:
                self._receive_fault = say(error)
                if got:
                    return got  # whole records, checked; the fault is after them
                raise LinkError(f"{self.peer}: {self._receive_fault}") from error
            size = self._receive_plain(self._cipher, deadline)
            with self._tls_lock:
                if size:
                    self._incoming.write(self._cipher[:size])
                else:
                    self._incoming.write_eof()


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.ndim == 1 and view.format == "B":
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def _joined(views: list[memoryview]) -> Iterator[memoryview]:
    """The same bytes in fewer pieces: neighbours smaller than a record are copied together."""
    small = bytearray()
    for view in views:
        if len(view) >= _RECORD_BYTES:
            if small:
                yield memoryview(small)
                small = bytearray()
            yield view
            continue
        small += view
        if len(small) >= _JOIN_BYTES - _RECORD_BYTES:
            yield memoryview(small)
            small = bytearray()
    if small:
        yield memoryview(small)
