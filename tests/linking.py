"""What tests of links share."""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys

LONG_S = 20.0
"""A wait that is only reached when something is broken."""


def certificates_in(folder: Path) -> Path:
    """Certificates in a folder: of two CAs, and such as nobody should accept."""
    now = datetime.now(UTC)
    keys.init(folder / "ca")
    hosts = ["127.0.0.1", "::1", "localhost"]
    keys.issue(folder / "ca", "backup", hosts=hosts)
    keys.issue(folder / "ca", "primary")
    keys.issue(folder / "ca", "elsewhere", hosts=["elsewhere.example.net", "10.1.2.3"])
    keys.init(folder / "other")
    keys.issue(folder / "other", "stranger", hosts=hosts)
    keys.init(folder / "old", now=now - timedelta(days=100))
    keys.issue(folder / "old", "expired", hosts=hosts, days=1, now=now - timedelta(days=50))
    keys.issue(folder / "old", "fresh", hosts=hosts)
    return folder


def take(listener: Listener, *, handshake_s: float = LONG_S) -> Connection:
    """The next peer, hands shaken."""
    assert select.select([listener.fileno()], [], [], LONG_S)[0]
    connection = listener.accept()
    assert connection is not None
    connection.handshake(handshake_s)
    return connection


def listen(kind: str, folder: Path, tmp_path: Path, name: str = "ca/backup") -> Listener:
    text = f"unix:{tmp_path}/socket" if kind == "unix" else f"{kind}://127.0.0.1:0"
    return Listener(Address.parse(text), tls=TlsFiles(folder / name) if kind == "tls" else None)


def receive(connection: Connection, size: int) -> bytes:
    data = memoryview(bytearray(size))
    at = 0
    while at < size:
        got = connection.recv_into(data[at:], LONG_S)
        assert got, f"the stream ended at {at} of {size}"
        at += got
    return bytes(data)


def shake(listener: Listener, pool: ThreadPoolExecutor, client: Callable[[], Connection]) -> list[LinkError]:
    """Errors that the two ends meet until the client has received a byte: [] if they get on."""
    faults: list[LinkError] = []

    def serve() -> None:
        try:
            with take(listener) as server:
                server.send([b"x"], LONG_S)
                server.finish(LONG_S)
        except LinkError as error:
            faults.append(error)

    serving = pool.submit(serve)
    try:
        with client() as connection:
            assert connection.recv_into(memoryview(bytearray(1)), LONG_S) == 1
    except LinkError as error:
        faults.append(error)
    serving.result(LONG_S)
    return faults


def bare_client(folder: Path, name: str | None, ca: str) -> ssl.SSLContext:
    """A client that does not look at its own certificate first, as TlsFiles does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_verify_locations(folder / ca / "ca.pem")
    if name:
        context.load_cert_chain(folder / name / "cert.pem", folder / name / "key.pem")
    return context
