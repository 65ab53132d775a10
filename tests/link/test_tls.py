"""TLS: who is let in, and what is said to those who are not."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from linking import LONG_S, bare_client, certificates_in, listen, receive, shake, take

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates_in(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


# TLS: who is let in


@pytest.mark.parametrize(
    ("server", "client", "count"),
    [
        ("ca/backup", "ca/primary", 0),
        ("ca/backup", "ca/backup", 0),
        ("old/fresh", "old/fresh", 0),
        ("ca/backup", "other/stranger", 2),
        ("other/stranger", "ca/primary", 2),
        ("ca/elsewhere", "ca/primary", 2),
    ],
)
def test_who_gets_on_with_whom(
    folder: Path, tmp_path: Path, pool: ThreadPoolExecutor, server: str, client: str, count: int
) -> None:
    with listen("tls", folder, tmp_path, server) as listener:
        tls = TlsFiles(folder / client)
        assert len(shake(listener, pool, lambda: connect(listener.address, tls=tls, timeout_s=LONG_S))) == count


def test_a_name_to_expect_instead_of_the_host(folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with listen("tls", folder, tmp_path, "ca/elsewhere") as listener:
        for name, count in (("elsewhere.example.net", 0), ("10.1.2.3", 0), ("nowhere.example.net", 2)):
            tls = TlsFiles(folder / "ca" / "primary", name)
            dial = partial(connect, listener.address, tls=tls, timeout_s=LONG_S)
            assert len(shake(listener, pool, dial)) == count


@pytest.mark.parametrize("case", ["no certificate", "expired", "TLS 1.2", "another CA"])
def test_a_client_that_is_refused(folder: Path, tmp_path: Path, pool: ThreadPoolExecutor, case: str) -> None:
    ca = "old" if case == "expired" else "ca"
    with listen("tls", folder, tmp_path, "old/fresh" if case == "expired" else "ca/backup") as listener:
        name = {"no certificate": None, "expired": "old/expired", "another CA": "other/stranger"}.get(
            case, "ca/primary"
        )
        context = bare_client(folder, name, ca)
        if case == "TLS 1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        serving = pool.submit(take, listener)
        sock = socket.create_connection((listener.address.host, listener.address.port), LONG_S)
        with sock, pytest.raises(ssl.SSLError), context.wrap_socket(sock) as client:
            client.recv(1)
        with pytest.raises(LinkError):
            serving.result(LONG_S)


def test_an_expired_server(folder: Path, pool: ThreadPoolExecutor) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "old" / "expired" / "cert.pem", folder / "old" / "expired" / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            sock, _ = server.accept()
            with sock, pytest.raises(ssl.SSLError):
                context.wrap_socket(sock, server_side=True).close()

        serving = pool.submit(serve)
        address = Address("tls", host="127.0.0.1", port=server.getsockname()[1])
        with pytest.raises(LinkError):
            connect(address, tls=TlsFiles(folder / "old" / "fresh"), timeout_s=LONG_S)
        serving.result(LONG_S)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x89REMUSs\n" + bytes(64),
        os.urandom(300),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16_380),
    ],
    ids=["http", "plain session", "random", "longest record", "longest message"],
)
def test_what_is_not_tls(folder: Path, tmp_path: Path, pool: ThreadPoolExecutor, data: bytes) -> None:
    with listen("tls", folder, tmp_path) as listener:
        serving = pool.submit(take, listener)
        with socket.create_connection((listener.address.host, listener.address.port), LONG_S) as sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # hung up on already
            with pytest.raises(LinkError):
                serving.result(LONG_S)


def test_a_server_that_does_not_speak_tls(folder: Path, pool: ThreadPoolExecutor) -> None:
    with Listener(Address.parse("tcp://127.0.0.1:0")) as listener:

        def serve() -> None:
            with take(listener) as server:
                server.send([b"\x89REMUSs\n" + bytes(100)], LONG_S)
                server.finish(LONG_S)

        serving = pool.submit(serve)
        address = Address("tls", host="127.0.0.1", port=listener.address.port)
        with pytest.raises(LinkError):
            connect(address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=LONG_S)
        serving.result(LONG_S)


@pytest.mark.parametrize("pause_s", [0.01, None])
def test_the_handshake_has_one_deadline_for_all_of_it(
    folder: Path, tmp_path: Path, pool: ThreadPoolExecutor, pause_s: float | None
) -> None:
    """A byte now and then renews nothing: a real hello, at a pace that would take many times the limit."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = bare_client(folder, None, "ca").wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    data = outgoing.read()
    with (
        listen("tls", folder, tmp_path) as listener,
        socket.create_connection((listener.address.host, listener.address.port), LONG_S) as sock,
    ):
        serving = pool.submit(take, listener, handshake_s=0.3)
        for byte in data if pause_s is not None else b"":
            if serving.done():
                break
            # It may have hung up just now.
            with suppress(OSError):
                sock.sendall(bytes([byte]))
            time.sleep(pause_s or 0)
        else:
            assert pause_s is None, "the whole hello was waited for"
        with pytest.raises(LinkError):
            serving.result(LONG_S)


def test_connecting_has_one_deadline_for_all_of_it(folder: Path, pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("tls", host="127.0.0.1", port=server.getsockname()[1])
        with pytest.raises(LinkError):
            connect(address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=0.1)


def test_a_record_that_was_altered_on_the_way(folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """What came before it is delivered; it, and all after it, never."""
    with listen("tls", folder, tmp_path) as listener, socket.create_server(("127.0.0.1", 0)) as proxy:
        flip = threading.Event()

        def copy(source: socket.socket, sink: socket.socket, alters: bool) -> None:
            while data := bytearray(source.recv(1 << 16)):
                if alters and flip.is_set():
                    data[-1] ^= 1
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

        def serve() -> None:
            inner, _ = proxy.accept()
            outer = socket.create_connection((listener.address.host, listener.address.port))
            with inner, outer:
                back = pool.submit(copy, outer, inner, False)
                copy(inner, outer, True)
                back.result()

        serving = pool.submit(serve)
        taken = pool.submit(take, listener)
        address = Address("tls", host="127.0.0.1", port=proxy.getsockname()[1])
        with connect(address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=LONG_S) as client:
            with taken.result() as server:
                client.send([b"good"], LONG_S)
                assert receive(server, 4) == b"good"
                flip.set()
                client.send([b"evil"], LONG_S)
                for _ in range(2):
                    with pytest.raises(LinkError):
                        server.recv_into(memoryview(bytearray(8)), LONG_S)
            client.close()
        serving.result(LONG_S)
