"""Connections over real sockets on loopback, with real certificates; one contract for every kind of them."""

from __future__ import annotations

import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from linking import LONG_S, certificates_in, listen, receive, take

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles

KINDS = ["tls", "tcp", "unix"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates_in(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(params=KINDS)
def pair(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> Iterator[tuple[Connection, Connection]]:
    """(the one that connected, the one that listened)"""
    with listen(request.param, folder, tmp_path) as listener:
        taken = pool.submit(take, listener)
        client = connect(listener.address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=LONG_S)
        with client, taken.result() as server:
            yield client, server


def within(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    until = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


# Addresses


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        ("tls://host:7411", None, Address("tls", host="host", port=7411)),
        ("tcp://127.0.0.1:0", None, Address("tcp", host="127.0.0.1", port=0)),
        ("tls://[::1]:7411", None, Address("tls", host="::1", port=7411)),
        ("0.0.0.0:7411", "tls", Address("tls", host="0.0.0.0", port=7411)),
        ("[fe80::1%eth0]:65535", "tcp", Address("tcp", host="fe80::1%eth0", port=65535)),
        ("tcp://a:1", "tls", Address("tcp", host="a", port=1)),
        ("unix:/run/x.sock", None, Address("unix", path="/run/x.sock")),
        ("unix:///run/x.sock", "tls", Address("unix", path="/run/x.sock")),
        ("unix:x.sock", None, Address("unix", path="x.sock")),
    ],
)
def test_addresses(text: str, default: str | None, expected: Address) -> None:
    assert Address.parse(text, default) == expected  # type: ignore[arg-type]
    assert Address.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:7411",
        "tls://host",
        "tls://:7411",
        "tls://host:",
        "tls://host:x",
        "tls://host:65536",
        "tls://host:-1",
        "tls://host:٣",
        "tls://host:" + "9" * 5000,
        "tls://::1:7411",
        "http://host:80",
        "unix:",
        "unix:/a\0b",
        "unix:/" + "x" * 107,
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(LinkError):
        Address.parse(text)


# The contract


@pytest.mark.parametrize("count", [0, 1, 3, 5000])
def test_buffers_arrive_whole_and_in_order(pair: tuple[Connection, Connection], count: int) -> None:
    random = np.random.default_rng(count)
    sizes = random.choice(
        [0, 1, 7, 300, 4096, 16383, 16384, 70_000], count, p=[0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    )
    buffers: list[bytes | bytearray | memoryview | np.ndarray] = []
    for number, size in enumerate(sizes):
        data = random.integers(0, 256, size, dtype=np.uint8)
        buffers.append([data.tobytes(), bytearray(data), memoryview(data), data][number % 4])
    whole = b"".join(bytes(buffer) for buffer in buffers)
    with ThreadPoolExecutor() as pool:
        for sender, receiver in (pair, pair[::-1]):
            sending = pool.submit(sender.send, buffers, LONG_S)
            assert receive(receiver, len(whole)) == whole
            sending.result()
            assert sender.bytes_sent == receiver.bytes_received == len(whole)


def test_pages_are_sent_as_they_lie(pair: tuple[Connection, Connection], pool: ThreadPoolExecutor) -> None:
    pages = np.random.default_rng(3).integers(0, 256, (9, 4096), dtype=np.uint8)
    numbers = np.arange(50, dtype="<u8")
    sending = pool.submit(pair[0].send, [pages, numbers, pages[:0], b""], LONG_S)  # type: ignore[list-item]
    assert receive(pair[1], pages.nbytes + numbers.nbytes) == pages.tobytes() + numbers.tobytes()
    sending.result()


def test_both_ways_at_once(pair: tuple[Connection, Connection], pool: ThreadPoolExecutor) -> None:
    """One thread sends and another receives on each end: every byte arrives, and in its place."""
    blocks, size = 40, 1 << 20

    def send(connection: Connection, seed: int) -> int:
        crc = google_crc32c.Checksum()
        random = np.random.default_rng(seed)
        for _ in range(blocks):
            data = random.integers(0, 256, size, dtype=np.uint8)
            crc.update(data.tobytes())
            cuts = np.sort(random.integers(0, size, 6))
            connection.send(np.split(data, cuts), LONG_S)
        return int.from_bytes(crc.digest())

    def take_all(connection: Connection) -> int:
        crc = google_crc32c.Checksum()
        view = memoryview(bytearray(200_000))
        left = blocks * size
        while left:
            got = connection.recv_into(view[: min(left, len(view))], LONG_S)
            assert got
            crc.update(bytes(view[:got]))
            left -= got
        return int.from_bytes(crc.digest())

    sent: list[Future[int]] = [pool.submit(send, connection, seed) for seed, connection in enumerate(pair)]
    taken = [pool.submit(take_all, connection) for connection in pair]
    assert [task.result() for task in taken] == [task.result() for task in sent[::-1]]


def test_those_who_send_take_turns(pair: tuple[Connection, Connection], pool: ThreadPoolExecutor) -> None:
    size, count = 300_000, 20
    tasks = [
        pool.submit(
            lambda mark=mark: [pair[0].send([bytes([mark]) * 10, bytes([mark]) * size], LONG_S) for _ in range(count)]
        )
        for mark in (1, 2, 3)
    ]
    data = np.frombuffer(receive(pair[1], 3 * count * (size + 10)), dtype=np.uint8).reshape(-1, size + 10)
    assert (data == data[:, :1]).all()
    for task in tasks:
        task.result()


def test_what_came_with_the_last_record_is_there_without_a_wait(pair: tuple[Connection, Connection]) -> None:
    """TLS has read more than was asked for: a poll of the socket would sleep on it."""
    pair[0].send([b"abcdefgh" * 100], LONG_S)
    view = memoryview(bytearray(8))
    assert pair[1].recv_into(view, LONG_S) == 8
    for _ in range(99):
        assert pair[1].recv_into(view, 0) == 8
        assert bytes(view) == b"abcdefgh"
    with pytest.raises(TimeoutError):
        pair[1].recv_into(view, 0)


def test_silence_is_a_timeout_and_nothing_is_lost(pair: tuple[Connection, Connection]) -> None:
    view = memoryview(bytearray(8))
    with pytest.raises(TimeoutError):
        pair[1].recv_into(view, 0.02)
    pair[0].send([b"x"], LONG_S)
    assert pair[1].recv_into(view, LONG_S) == 1


def test_the_end(pair: tuple[Connection, Connection]) -> None:
    pair[0].send([b"last"], LONG_S)
    pair[0].close()
    assert receive(pair[1], 4) == b"last"
    view = memoryview(bytearray(8))
    assert pair[1].recv_into(view, LONG_S) == 0
    assert pair[1].recv_into(view, LONG_S) == 0


def test_finish_lets_the_last_words_arrive(pair: tuple[Connection, Connection], pool: ThreadPoolExecutor) -> None:
    """Bytes that nobody reads would make the kernel drop what is still on its way out."""
    client, server = pair
    client.send([bytes(100_000)], LONG_S)
    server.send([b"refused"], LONG_S)
    finishing = pool.submit(server.finish, LONG_S)
    assert receive(client, 7) == b"refused"
    assert client.recv_into(memoryview(bytearray(1)), LONG_S) == 0
    client.close()
    finishing.result()
    assert server.fileno() == -1


def test_finish_does_not_wait_for_ever(pair: tuple[Connection, Connection]) -> None:
    pair[0].finish(0.05)
    assert pair[0].fileno() == -1


@pytest.mark.parametrize("what", ["send", "receive"])
def test_close_wakes_who_waits(pair: tuple[Connection, Connection], pool: ThreadPoolExecutor, what: str) -> None:
    connection = pair[0]
    is_waiting = threading.Event()

    def wait() -> None:
        is_waiting.set()
        if what == "send":
            connection.send([bytes(64 << 20)], None)  # more than any socket holds, and nobody takes it
        else:
            connection.recv_into(memoryview(bytearray(8)), None)

    waiting = pool.submit(wait)
    assert is_waiting.wait(LONG_S)
    time.sleep(0.05)
    connection.close()
    with pytest.raises(LinkError):
        waiting.result(LONG_S)
    within(lambda: connection.fileno() == -1)
    for call in (lambda: connection.send([b"x"], 1), lambda: connection.recv_into(memoryview(bytearray(8)), 1)):
        with pytest.raises(LinkError):
            call()
    connection.close()


def test_a_peer_that_takes_nothing(pair: tuple[Connection, Connection]) -> None:
    with pytest.raises(LinkError):
        pair[0].send([bytes(64 << 20)], 0.1)
    with pytest.raises(LinkError):  # what was sent is cut somewhere: nothing may follow it
        pair[0].send([b"x"], LONG_S)


def test_a_peer_that_is_gone(pair: tuple[Connection, Connection]) -> None:
    pair[1].close()
    with pytest.raises(LinkError):
        for _ in range(100):
            pair[0].send([bytes(1 << 20)], LONG_S)


def test_an_empty_view_is_our_own_mistake(pair: tuple[Connection, Connection]) -> None:
    with pytest.raises(ValueError):
        pair[0].recv_into(memoryview(bytearray()), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_before_the_handshake(kind: str, folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with listen(kind, folder, tmp_path) as listener:
        connecting = pool.submit(connect, listener.address, tls=TlsFiles(folder / "ca/primary"), timeout_s=LONG_S)
        assert select.select([listener.fileno()], [], [], LONG_S)[0]
        with listener.accept() as server:  # type: ignore[union-attr]
            with pytest.raises(ValueError):
                server.send([b"secret"], 1)
            with pytest.raises(ValueError):
                server.recv_into(memoryview(bytearray(8)), 1)
            server.handshake(LONG_S)
            connecting.result().close()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_there(kind: str, folder: Path, tmp_path: Path) -> None:
    with listen(kind, folder, tmp_path) as listener:
        address = listener.address
    with pytest.raises(LinkError):
        connect(address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=LONG_S)


@pytest.mark.parametrize("kind", KINDS)
def test_a_listener(kind: str, folder: Path, tmp_path: Path) -> None:
    listener = listen(kind, folder, tmp_path)
    assert listener.accept() is None
    with pytest.raises(LinkError):
        listen_again = Listener(listener.address, tls=TlsFiles(folder / "ca" / "backup"))
        listen_again.close()
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(poll.poll, LONG_S * 1000)
        time.sleep(0.02)
        listener.close()
        assert waiting.result()
    listener.close()
    with pytest.raises(LinkError):
        listener.accept()


def test_a_host_name_and_ipv6(folder: Path, pool: ThreadPoolExecutor) -> None:
    for text in ("tls://localhost:0", "tls://[::1]:0"):
        try:
            listener = Listener(Address.parse(text), tls=TlsFiles(folder / "ca" / "backup"))
        except LinkError:
            assert "::1" in text  # a machine without IPv6
            continue
        with listener:
            taken = pool.submit(take, listener)
            with connect(listener.address, tls=TlsFiles(folder / "ca" / "primary"), timeout_s=LONG_S) as client:
                assert client.certificate_name == "backup"
                with taken.result() as server:
                    assert server.certificate_name == "primary"
                    assert "primary" in server.peer


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(LinkError):
        connect(Address.parse("tcp://no-such-host.invalid:1"), timeout_s=LONG_S)


def test_no_descriptor_left(tmp_path: Path) -> None:
    """Whoever waits is hung up on, instead of keeping the poll awake; later ones are served again."""
    program = f"""
import os, resource, select
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.listener import Listener
listener = Listener(Address.parse("unix:{tmp_path}/s"))
import socket
waiting = socket.socket(socket.AF_UNIX)
waiting.connect("{tmp_path}/s")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
assert listener.accept() is None
assert not select.select([listener.fileno()], [], [], 0)[0]
assert waiting.recv(1) == b""
for number in held[:4]:
    os.close(number)
client = connect(listener.address, timeout_s=10)
server = listener.accept()
server.handshake(10)
server.send([b"x"], 10)
assert client.recv_into(memoryview(bytearray(1)), 10) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Plain TCP, and Unix sockets


def other_address() -> str | None:
    """One of this machine's own that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        return str(sock.getsockname()[0])


def test_plain_tcp_stays_on_this_machine(pool: ThreadPoolExecutor) -> None:
    with pytest.raises(LinkError):
        Listener(Address.parse("tcp://0.0.0.0:0"))
    with pytest.raises(LinkError):
        connect(Address.parse("tcp://192.0.2.1:7411"), timeout_s=LONG_S)
    with Listener(Address.parse("tcp://0.0.0.0:0"), insecure=True) as listener:
        host = other_address()
        if host is None:
            return
        there = Address("tcp", host=host, port=listener.address.port)
        with pytest.raises(LinkError):
            connect(there, timeout_s=LONG_S)
        taken = pool.submit(take, listener)
        with connect(there, timeout_s=LONG_S, insecure=True) as client, taken.result() as server:
            client.send([b"x"], LONG_S)
            assert receive(server, 1) == b"x"


def test_a_unix_socket_is_private_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    mask = os.umask(0)
    try:
        listener = Listener(Address("unix", path=str(path)))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    Listener(Address("unix", path=str(path))).close()
    path.write_text("precious")
    with pytest.raises(LinkError):
        Listener(Address("unix", path=str(path)))
    assert path.read_text() == "precious"


def test_a_socket_that_another_has_put_there_is_left(tmp_path: Path) -> None:
    first = Listener(Address("unix", path=str(tmp_path / "a")))
    second = Listener(Address("unix", path=str(tmp_path / "b")))
    os.rename(tmp_path / "b", tmp_path / "a")
    first.close()
    assert (tmp_path / "a").exists()
    second.close()


@pytest.mark.root
def test_another_user_is_turned_away(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    path = tmp_path / "socket"
    program = f"""
import os, socket
sock = socket.socket(socket.AF_UNIX)
os.setuid(65534)
sock.connect("{path}")
assert sock.recv(1) == b""
"""
    with Listener(Address("unix", path=str(path))) as listener:
        path.chmod(0o666)
        for above in (tmp_path, *tmp_path.parents):
            if above.owner() == "root" and above != Path("/") and not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)
        peer = subprocess.Popen([sys.executable, "-c", program])
        with pytest.raises(LinkError):
            take(listener)
        assert peer.wait(LONG_S) == 0
