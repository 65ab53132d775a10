"""Control requests to a backup, for the command line."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from remus_ckpt.errors import LinkError, Refused, RemusError
from remus_ckpt.link.connection import Connection
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import Error, Goodbye, Hello, Reply, Request, Welcome
from remus_ckpt.version import __version__


def ask(connection: Connection, method: str, arguments: dict[str, Any], *, timeout_s: float = 90.0) -> dict[str, Any]:
    """Send one request and return its answer; the connection is then closed.

    method: "status" or "failover" (specs/session.md §3.12)
    Raises LinkError if no answer comes, RemusError if the backup refuses.
    """
    deadline = time.monotonic() + timeout_s
    session = Session("client")
    with connection, closing(session):
        connection.send(session.send(Hello(program=f"remus_ckpt {__version__}", role="control")), timeout_s)
        while True:
            match session.next_event():
                case Welcome():
                    request = Request(number=1, method=method, arguments=arguments)
                    connection.send(session.send(request), timeout_s)
                case Reply() as reply:
                    connection.send(session.send(Goodbye(reason="answered")), timeout_s)
                    if "error" in reply.result:
                        raise RemusError(f"{connection.peer}: {reply.result['error']}")
                    return reply.result
                case Error() as error:
                    raise Refused(f"{connection.peer}: {error.message}", code=error.code)
                case None:
                    left = deadline - time.monotonic()
                    try:
                        size = connection.recv_into(session.get_buffer(), max(left, 0.0))
                    except TimeoutError:
                        raise LinkError(f"{connection.peer} has not answered in {timeout_s:g} s") from None
                    if not size:
                        raise LinkError(
                            f"{connection.peer} has hung up without an answer: is it a backup, and is TLS used on both "
                            "sides or on none?"
                        )
                    session.buffer_updated(size)
