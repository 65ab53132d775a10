"""A TCP proxy between a primary and a backup that can do to their bytes what networks do."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable


def in_last_byte(data: bytes) -> int:
    """The bit to change, for `Proxy.flips`."""
    return 8 * len(data) - 4


class Proxy:
    """Forwards connections to `target`, until it is told otherwise.

    target: "tcp://host:port"; may be changed, for connections to come
    rate: bytes a second towards the target, None for as many as there are
    cut: end all connections, at once; those to come are served
    silent: take bytes and forward none, as a black hole does
    refusing: end connections as they come
    flips: the bit to change of a piece that comes from there, "near" (who connects) or "far"; None: of none, ask again
        at the next piece. Taken from here once it is done
    """

    def __init__(self, target: str, *, rate: float | None = None) -> None:
        self.target = target
        self.rate = rate
        self.silent = threading.Event()
        self.refusing = threading.Event()
        self.flips: dict[str, Callable[[bytes], int | None]] = {}
        self.connections = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        with self._lock:
            for pair in self._pairs:
                for one in pair:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing.is_set():
                near.close()
                continue
            host, port = self.target.removeprefix("tcp://").rsplit(":", 1)
            try:
                far = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                near.close()
                continue
            self.connections += 1
            with self._lock:
                self._pairs.append((near, far))
            thread = threading.Thread(target=self._pump, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    try:
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        side = "near" if source is near else "far"
                        if side in self.flips and (bit := self.flips[side](data)) is not None:
                            del self.flips[side]
                            at = bit // 8
                            data = data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]
                        if self.rate is not None and source is near:
                            time.sleep(len(data) / self.rate)
                        if not self.silent.is_set():
                            key.data.sendall(data)
                    except OSError:
                        return
