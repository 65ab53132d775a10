"""A backup that does whatever it is told to, for tests of primaries."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import google_crc32c

from remus_ckpt.errors import RemusError
from remus_ckpt.session import frames, messages
from remus_ckpt.session.incoming import DataReceived
from remus_ckpt.session.machine import Session


class Ear:
    """Takes the stream and forgets it."""

    def __init__(self) -> None:
        self._room = memoryview(bytearray(1 << 16))

    def get_buffer(self) -> memoryview:
        return self._room


class Peer:
    """One primary that has come."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.session = Session("server")
        self.session.lender = Ear()

    def hear(self) -> Any:
        """What it says next; data and heartbeats are passed over. None when it has hung up."""
        while True:
            event = self.session.next_event()
            if event is None:
                size = self.socket.recv_into(self.session.get_buffer())
                if not size:
                    return None
                self.session.buffer_updated(size)
            elif not isinstance(event, DataReceived | messages.Heartbeat):
                return event

    def say(self, message: messages.Message) -> None:
        self.socket.sendall(b"".join(map(bytes, self.session.send(message))))

    def force(self, data: bytes) -> None:
        """Bytes that no session would send."""
        self.socket.sendall(data)

    def welcome(self, **changes: Any) -> messages.Hello:
        hello = self.hear()
        fields: dict[str, Any] = {"program": "liar", "term": hello.term or 0, "limits": {}, "lease_s": 1.0}
        self.say(messages.Welcome(**fields | changes))
        return hello

    def wait(self) -> None:
        """Until it hangs up."""
        while self.hear() is not None:
            pass


class Liar:
    """Listens; each primary that comes is handed to `serve`, in a thread of its own."""

    def __init__(self, serve: Callable[[Peer], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.visits = 0
        self._live: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._live):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.visits += 1
            self._live.append(sock)
            thread = threading.Thread(target=self._visit, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _visit(self, sock: socket.socket) -> None:
        with sock, suppress(OSError, RemusError):
            self._serve(Peer(sock))


def frame(kind: frames.FrameType, payload: bytes, *, length: int | None = None, flags: int = 0) -> bytes:
    """A frame whose checksums are right, whatever else is not."""
    length = len(payload) if length is None else length
    head = struct.pack("<BBHII", kind, flags, 0, length, google_crc32c.value(payload))
    return head + struct.pack("<I", google_crc32c.value(head)) + payload
