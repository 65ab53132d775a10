"""Connecting to the other side."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import Any

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import INSECURE_OPTION, Address, check_plain, resolve
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.sockets import Late, say, wait
from remus_ckpt.link.tls import TlsFiles


def connect(
    address: Address, *, tls: TlsFiles | None = None, timeout_s: float = 10.0, insecure: bool = False
) -> Connection:
    """Connect, and shake hands.

    tls: needed for tls://, unused otherwise
    timeout_s: for all of it
    insecure: allow plain tcp:// to another machine
    Raises LinkError. In TLS 1.3 the server judges our certificate after we are done, so that its refusal is an error
    of the first `recv_into`.
    """
    deadline = time.monotonic() + timeout_s
    server_name = address.host
    if address.scheme != "tls":
        tls = None
    elif tls is None:
        raise LinkError(f"{address}: TLS needs a certificate: give --tls-dir, a folder made by `keys issue`")
    else:
        server_name = tls.certificate_name or address.host.partition("%")[0]
    try:
        if address.scheme == "unix":
            sock = dial(socket.AF_UNIX, address.path, deadline)
        else:
            choices = resolve(address, deadline)
            for _, where in choices:
                check_plain(address, where, insecure, INSECURE_OPTION)
            sock = _dial_one_of(choices, deadline)
    except Late:
        raise LinkError(
            f"{address}: no answer within {timeout_s:g} s: check that the host is up and that no "
            "firewall blocks the port"
        ) from None
    except OSError as error:
        raise LinkError(f"{address}: {say(error)}") from error
    try:
        connection = Connection(sock, address, tls, server_name)
    except ValueError as error:
        sock.close()
        raise LinkError(f"{address}: {server_name!r} is not a name that a certificate can hold: {error}") from error
    except BaseException:
        sock.close()
        raise
    connection.handshake(max(0.0, deadline - time.monotonic()))
    return connection


def _dial_one_of(choices: list[tuple[int, Any]], deadline: float) -> socket.socket:
    for number, (family, where) in enumerate(choices):
        left = (deadline - time.monotonic()) / (len(choices) - number)
        try:
            return dial(family, where, time.monotonic() + left)
        except (OSError, Late):
            if number == len(choices) - 1:
                raise
    raise OSError(errno.EADDRNOTAVAIL, "the host has no address")


def dial(family: int, where: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(where)
        while code == errno.EAGAIN and time.monotonic() < deadline:
            time.sleep(0.01)  # a Unix listener whose queue is full; there is nothing to poll for
            code = sock.connect_ex(where)
        if code == errno.EAGAIN:
            raise Late
        if code == errno.EINPROGRESS:
            wait(sock.fileno(), select.POLLOUT, deadline)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock
