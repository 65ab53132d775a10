"""Requests to the processes beside a virtual machine, and their replies: one JSON object in one message each."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from remus_ckpt.errors import BridgeError, RemusError

MAX_MESSAGE_BYTES = 64 * 1024
_MAX_FDS = 253


def ask(
    process: socket.socket,
    request: dict[str, Any],
    fds: Sequence[int] = (),
    *,
    refusal: type[RemusError] = BridgeError,
) -> tuple[dict[str, Any], list[int]]:
    """The reply to a request, and the descriptors that came with it.

    process: a SOCK_SEQPACKET socket, with a timeout
    refusal: raised if the request is refused
    Raises OSError if no reply comes: a late one would then be taken for that to the next request, so close the socket.
    """
    socket.send_fds(process, [json.dumps(request).encode()], fds)
    data, given, flags, _ = socket.recv_fds(process, MAX_MESSAGE_BYTES, _MAX_FDS)
    if not data:
        raise ConnectionResetError("it has ended")
    if flags & socket.MSG_TRUNC:
        raise OSError(errno.EMSGSIZE, f"its reply is longer than {MAX_MESSAGE_BYTES:,} bytes")
    for fd in given:
        os.set_inheritable(fd, False)
    reply = json.loads(data)
    if "error" in reply:
        raise refusal(reply["error"])
    return reply, given
