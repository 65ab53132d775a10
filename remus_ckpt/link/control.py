"""Requests to a backup, and its replies (specs/session.md §3.10 to §3.13)."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Self, TypeVar

from remus_ckpt.errors import LinkError, NoCheckpoint, Refused, RemusError, StoreError
from remus_ckpt.link.connection import Connection
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import Error, Goodbye, Hello, Message, Reply, Request, Role, Welcome
from remus_ckpt.version import __version__

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")
_GOODBYE_S = 1.0
_ERRORS: dict[str, type[RemusError]] = {"gone": NoCheckpoint, "store": StoreError}
"""What the `code` of a failed request means here (specs/session.md §3.13)."""


class Requests:
    """One session of requests, from its hello to its end, for one thread; the end of a `with` block ends it.

    connection: to the backup, with its handshake done; closed with this object
    timeout_s: for the welcome
    Raises Refused if the backup rejects us, LinkError if it is lost or late, StreamError if its bytes are invalid; so
    do the methods.
    """

    def __init__(self, connection: Connection, role: Role, *, timeout_s: float) -> None:
        self._connection = connection
        self._session = Session("client")
        self._posted = self._answered = 0
        try:
            self._send(Hello(program=f"remus_ckpt {__version__}", role=role), timeout_s)
            self._receive(Welcome, timeout_s)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def peer(self) -> str:
        """Address and name of the backup."""
        return self._connection.peer

    def post(self, method: str, arguments: dict[str, Any], timeout_s: float) -> None:
        """Send a request. Several may be sent before the first is answered, as long as all of them are short."""
        self._posted += 1
        self._send(Request(number=self._posted, method=method, arguments=arguments), timeout_s)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The result of the oldest request that has not been answered. Raises RemusError if it could not be
        fulfilled: NoCheckpoint or StoreError, if the backup says so."""
        reply = self._receive(Reply, timeout_s)
        self._answered += 1
        if reply.number != self._answered or reply.number > self._posted:
            raise LinkError(f"{self.peer} has answered request {reply.number} instead of {self._answered}")
        if "error" in reply.result:
            kind = _ERRORS.get(str(reply.result.get("code")), RemusError)
            raise kind(f"{self.peer}: {reply.result['error']!s:.4096}")
        return reply.result

    def field(self, result: object, key: str, kind: type[_T]) -> _T:
        """A field of a result, or of a row in one. Raises LinkError if it is missing, or of another type."""
        value = result.get(key) if isinstance(result, dict) else None
        if type(value) is not kind:
            raise LinkError(f"{self.peer} broke the protocol: {key} is {value!r:.40}")
        return value

    def _send(self, message: Message, timeout_s: float) -> None:
        self._connection.send(self._session.send(message), timeout_s)

    def _receive(self, kind: type[_M], timeout_s: float) -> _M:
        deadline = time.monotonic() + timeout_s
        while True:
            match self._session.next_event():
                case Message() as message if isinstance(message, kind):
                    return message
                case Error() as error:
                    raise Refused(f"{self.peer}: {error.message}", code=error.code)
                case Goodbye() as goodbye:
                    raise LinkError(f"{self.peer} has said goodbye: {goodbye.reason}")
                case None:
                    size = self._receive_some(deadline, f"has not answered within {timeout_s:.3g} s")
                    if not size:
                        raise LinkError(
                            f"{self.peer} hung up without an answer: check that it is a backup, and that both "
                            "sides or neither use TLS"
                        )
                    self._session.buffer_updated(size)

    def _receive_some(self, deadline: float, otherwise: str) -> int:
        # Checked here too: heartbeats may come without end.
        if (left := deadline - time.monotonic()) <= 0:
            raise LinkError(f"{self.peer} {otherwise}")
        try:
            return self._connection.recv_into(self._session.get_buffer(), left)
        except TimeoutError:
            raise LinkError(f"{self.peer} {otherwise}") from None

    def close(self) -> None:
        """Say goodbye, if that is still possible, and hang up."""
        with suppress(RemusError, ValueError):
            self._send(Goodbye(reason="answered"), _GOODBYE_S)
        self._close()

    def _close(self) -> None:
        self._connection.close()
        self._session.close()


def ask(connection: Connection, method: str, arguments: dict[str, Any], *, timeout_s: float = 90.0) -> dict[str, Any]:
    """Send one control request and return its answer; the connection is then closed.

    method: "status" or "failover" (specs/session.md §3.12)
    Raises LinkError if no answer comes, RemusError if the backup refuses.
    """
    deadline = time.monotonic() + timeout_s
    with Requests(connection, "control", timeout_s=timeout_s) as requests:
        requests.post(method, arguments, timeout_s)
        return requests.answer(max(deadline - time.monotonic(), 0.0))
