"""What all our sockets share: deadlines, waiting, and what a system error means to a user."""

from __future__ import annotations

import errno
import select
import ssl
import time

from remus_ckpt.link.tls import say_tls

_ADVICE = {
    errno.ECONNREFUSED: "nobody listens there: check that the other side is running, and the address",
    errno.ENOENT: "no socket is there: check that the other side is running, and the path",
    errno.EACCES: "not permitted: run as the same user, or as root",
    errno.EHOSTUNREACH: "no route there",
    errno.ENETUNREACH: "no route there",
    errno.ETIMEDOUT: "it no longer answers",
    errno.ECONNRESET: "it hung up",
    errno.EPIPE: "it hung up",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
}
_TO_LISTEN = _ADVICE | {
    errno.EADDRINUSE: "the address is in use: choose another, or stop what listens there",
    errno.ENOENT: "the socket's folder does not exist: make it first",
    errno.EACCES: "not permitted: choose a folder that this user may write to, or a port above 1023",
}


def say(error: OSError, *, to_listen: bool = False) -> str:
    """What went wrong with a connection or with listening, and what to do."""
    if isinstance(error, ssl.SSLError):
        return say_tls(error)
    return (_TO_LISTEN if to_listen else _ADVICE).get(error.errno or 0, error.strerror or str(error))


def deadline_of(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


class Late(Exception):
    """A deadline of ours has passed: not the kernel's ETIMEDOUT, which Python calls TimeoutError too."""


def wait(fd: int, event: int, deadline: float | None) -> None:
    """Wait until the descriptor is ready. Raises Late."""
    poll = select.poll()
    poll.register(fd, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if not poll.poll(None if left is None else left * 1000):
        raise Late
