"""Where the other side is: addresses as users type them, and what the resolver makes of them."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from remus_ckpt.errors import LinkError
from remus_ckpt.link.sockets import Late
from remus_ckpt.link.tls import TlsFiles

Scheme = Literal["tls", "tcp", "unix"]

MAX_UNIX_PATH_BYTES = 107
"""sockaddr_un holds 108, and a zero ends the path."""
INSECURE_OPTION = "--insecure-plain-tcp"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the other side is, or where to listen: tls://HOST:PORT, tcp://HOST:PORT or unix:PATH.

    host and port are those of tls and tcp (port 0: any, for a listener); path is that of unix.
    """

    scheme: Scheme
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str, default_scheme: Scheme | None = None) -> Self:
        """Read an address as a user types it.

        default_scheme: what HOST:PORT without a scheme means; None refuses it
        Raises LinkError.
        """
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            path = path.removeprefix("//") if path.startswith("///") else path
            if not path or "\0" in path:
                raise LinkError(f"{text!r} names no socket: write unix:/run/remus.sock")
            if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
                raise LinkError(f"{path}: a socket's path has at most {MAX_UNIX_PATH_BYTES} bytes")
            return cls("unix", path=path)
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = default_scheme or "", text
        if scheme not in ("tls", "tcp"):
            raise LinkError(f"{text!r} is not an address: write tls://HOST:PORT, tcp://HOST:PORT or unix:PATH")
        host, separator, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise LinkError(f"{text!r}: put an IPv6 address in brackets, such as [::1]:7411")
        if not separator or not host or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 0xFFFF:
            raise LinkError(f"{text!r} names no host and port: write {scheme}://HOST:PORT")
        return cls(cast(Scheme, scheme), host=host, port=int(port))

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.path}"
        return f"{self.scheme}://[{self.host}]:{self.port}" if ":" in self.host else self._plain()

    def _plain(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


def split_name(text: str) -> tuple[str, str | None]:
    """Split ADDRESS/NAME into the address and the name, None if there is none.

    A socket is no directory: in unix:PATH/NAME the name is what follows something that is no directory.
    """
    if text.startswith("unix:"):
        path, _, name = text.removeprefix("unix:").rpartition("/")
        return (f"unix:{path}", name or None) if path and not os.path.isdir(path) else (text, None)
    scheme, separator, rest = text.rpartition("://")
    host, _, name = rest.partition("/")
    return f"{scheme}{separator}{host}", name or None


def resolve(address: Address, deadline: float, *, passive: bool = False) -> list[tuple[int, Any]]:
    """(family, socket address) of each address of the host. Raises LinkError, Late."""
    found: list[Any] = []

    def look() -> None:
        flags = socket.AI_PASSIVE if passive else 0
        try:
            found.extend(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags))
        except (OSError, UnicodeError) as error:
            found.append(error)

    # A resolver waits as long as it likes, and cannot be interrupted.
    thread = threading.Thread(target=look, name="resolve", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads are allowed
        raise LinkError(f"{address}: {error}") from error
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise Late
    if isinstance(found[0], Exception):
        raise LinkError(f"{address}: no address for {address.host}: {getattr(found[0], 'strerror', None) or found[0]}")
    return [(family, where) for family, _, _, _, where in found]


def check_plain(address: Address, where: Any, insecure: bool, option: str) -> None:
    if address.scheme == "tcp" and not insecure and not ipaddress.ip_address(where[0].partition("%")[0]).is_loopback:
        raise LinkError(
            f"{address}: plain tcp is for this machine only, since anyone on the way could read and change the "
            f"data: use tls://, or give {option}"
        )


def check_options(address: Address, tls: TlsFiles | None, insecure: bool) -> None:
    """Check, before the first try, for faults that no number of tries would change. Raises LinkError."""
    if address.scheme == "tls" and tls is None:
        raise LinkError(f"{address}: TLS needs a certificate: give --tls-dir, a folder made by `keys issue`")
    with suppress(ValueError):  # a name may mean another address the next time
        ipaddress.ip_address(address.host.partition("%")[0])
        check_plain(address, (address.host,), insecure, INSECURE_OPTION)
