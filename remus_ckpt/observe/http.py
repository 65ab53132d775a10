"""A small HTTP server: for /metrics, and for the page of the dashboard."""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Self

from remus_ckpt.errors import LinkError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.link.address import Address
from remus_ckpt.link.sockets import say
from remus_ckpt.observe.log import log


def http_address(where: str, what: str) -> Address:
    """Parse HOST:PORT, or a port alone, which listens on this machine only. what: is served there. Raises LinkError."""
    port = where.removeprefix(":")
    place = f"127.0.0.1:{port}" if port.isascii() and port.isdigit() else where
    try:
        return Address.parse(f"tcp://{place}")
    except LinkError:
        raise LinkError(f"{what} at {where!r}: write HOST:PORT, or a port alone for this machine only") from None


class HttpServer:
    """Serves a WSGI application from its own threads.

    where: HOST:PORT, or a port alone, which listens on this machine only
    app: finds "remus_ckpt.go_on" in its environ, and may call it with the seconds that the request may take from then
    on
    what: is served, for messages
    address: HOST:PORT where it actually listens
    most: how many requests are served at a time; any further connection is closed at once
    request_s: time limit for a whole request; then its connection is closed
    """

    def __init__(
        self, where: str, app: Callable[..., Iterable[bytes]], what: str, *, most: int = 8, request_s: float = 5.0
    ) -> None:
        address = http_address(where, what)
        try:
            family, _, _, _, place = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, place, what, most, request_s)
        except OSError as error:
            raise LinkError(f"{what} at {where}: {say(error, to_listen=True)}") from error
        disown_in_forks(self)
        self._server.set_app(app)
        port = self._server.socket.getsockname()[1]
        self.address = f"[{address.host}]:{port}" if ":" in address.host else f"{address.host}:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.5,), name=what, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def disown(self) -> None:
        """In a forked child: release the server; the parent keeps serving."""
        self._server.socket.close()

    def close(self) -> None:
        """Stop, and close all connections. May be called twice; does nothing in a forked child."""
        if self._server.socket.fileno() < 0:
            return
        _shut([self._server.socket])  # its thread wakes at once, not at its next poll
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        assert isinstance(self.server, _Server)
        return environ | {"remus_ckpt.go_on": partial(self.server.limit, self.request)}


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 64

    def __init__(self, family: int, place: Any, what: str, most: int, request_s: float) -> None:
        self.address_family = family
        self._what = what
        self._request_s = request_s
        self._free = threading.BoundedSemaphore(most)
        self._live: dict[socket.socket, threading.Timer] = {}
        self._live_lock = threading.Lock()
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which looks up our own name and may block.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            # The handler's own limit is per read: a peer that sends a byte per second would never reach it.
            self.limit(request, self._request_s)
            super().process_request(request, client_address)
        except BaseException:
            self._finished(request)
            raise

    def limit(self, request: socket.socket, seconds: float) -> None:
        """Close a connection then, and no longer when that was last said."""
        timer = threading.Timer(seconds, self._cut, [request])
        timer.daemon = True
        with self._live_lock:
            before = self._live.get(request)
            self._live[request] = timer
        if before is not None:
            before.cancel()
        timer.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._finished(request)

    def _finished(self, request: socket.socket) -> None:
        with self._live_lock:
            timer = self._live.pop(request, None)
        if timer is not None:
            timer.cancel()
            if timer.is_alive():
                timer.join()
        self._free.release()

    def _cut(self, request: socket.socket) -> None:
        with self._live_lock:
            if request in self._live:
                _shut([request])

    def hang_up(self) -> None:
        """Close the connection of every peer being served."""
        with self._live_lock:
            _shut(self._live)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log(f"{self._what} request failed", level=logging.DEBUG, peer=str(client_address), error=sys.exc_info()[1])


def _shut(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
