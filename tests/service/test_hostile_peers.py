"""Peers that lie, stall, flood and repeat: the service stays small, serves the others, and says one line of each.

The backup is mostly the real command in a process of its own, with TLS, looked at from outside.
"""

from __future__ import annotations

import os
import resource
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from liars import frame
from services import LONG_S, Figures, Service, make_keys, service, until

from remus_ckpt.limits import GIB
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.service.standby import Policy
from remus_ckpt.session import frames, machine, messages
from remus_ckpt.store import Store

pytestmark = pytest.mark.hostile

PAGES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: good ones, one of another CA, one that has expired."""
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def served(tmp_path: Path, folder: Path) -> Iterator[Service]:
    with service(tmp_path, folder) as served:
        yield served


# What bad peers say


def hello(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "versions": [1], "program": "test", "role": "primary", "name": "bad", "run": os.urandom(16), "term": None,
        "memory_pages": PAGES, "page_size": 4096, "codec": "delta", "word": 8, "compressions": ["lz4", "zstd"],
    }  # fmt: skip
    return fields | changes


def hello_frame(**changes: Any) -> bytes:
    return frames.PREFACE + frame(frames.FrameType.HELLO, msgpack.packb(hello(**changes)))


def data_frame(payload: bytes, **changes: Any) -> bytes:
    return frame(frames.FrameType.DATA, payload, **changes)


def begin_frame(**changes: Any) -> bytes:
    return frame(
        frames.FrameType.BEGIN,
        msgpack.packb({"mode": "full", "term": 0, "position": None, "wait": "durable"} | changes),
    )


def header(pages: int = PAGES) -> bytes:
    return struct.pack("<Q", pages)


def checkpoint(sender: Sender, fill: int = 1, device_state: bytes = b"") -> bytes:
    """The stream's bytes of a checkpoint that changes every page."""
    pages = np.full((PAGES, PAGE_SIZE), fill, dtype=np.uint8)
    groups = sender.checkpoint(batches(np.arange(PAGES), pages), device_state=lambda: device_state)
    return b"".join(bytes(memoryview(buffer).cast("B")) for group in groups for buffer in group)


def commit_frame(sender: Sender, size: int, **changes: Any) -> bytes:
    sent = sender.sent
    assert sent is not None and sent.position is not None
    pack = lambda position: None if position is None else [position.epoch, position.digest]  # noqa: E731
    fields = {
        "position": pack(sent.position), "before": pack(sent.before), "stream_bytes": size, "pages": sent.pages,
    }  # fmt: skip
    return frame(frames.FrameType.COMMIT, msgpack.packb(fields | changes))


def drain(peer: socket.socket) -> bytes:
    """All that the service says until it hangs up."""
    found = b""
    peer.settimeout(LONG_S)
    with suppress(ConnectionError, ssl.SSLError):
        while data := peer.recv(1 << 16):
            found += data
    return found


def raw(data: bytes) -> Callable[[Service], int]:
    """Bytes in place of a TLS handshake."""

    def attack(served: Service) -> int:
        with served.dial() as peer:
            port: int = peer.getsockname()[1]
            peer.sendall(data)
            if not data:
                peer.shutdown(socket.SHUT_WR)
            drain(peer)
        return port

    return attack


def shaken(*parts: bytes, who: str | None = "ca/primary", pause_s: float = 0.0) -> Callable[[Service], int]:
    """Bytes behind a TLS handshake, all at once or with pauses; then it listens until it is hung up on."""

    def attack(served: Service) -> int:
        with served.dial() as plain:
            port: int = plain.getsockname()[1]
            context = ssl.create_default_context(cafile=served.folder / "ca" / "ca.pem")
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if who is not None:
                context.load_cert_chain(served.folder / who / "cert.pem", served.folder / who / "key.pem")
            with (
                suppress(ssl.SSLError, ConnectionError),
                context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
            ):
                for part in parts:
                    peer.sendall(part)
                    time.sleep(pause_s)
                drain(peer)
        return port

    return attack


def dripping(data: bytes, *, tls: bool) -> Callable[[Service], int]:
    """A byte now and then, more often than any pause that would be missed."""

    def attack(served: Service) -> int:
        with served.dial_tls() if tls else served.dial() as peer:
            port: int = peer.getsockname()[1]
            with suppress(ConnectionError, ssl.SSLError):
                for byte in data * 1000:
                    peer.sendall(bytes([byte]))
                    peer.settimeout(0.2)
                    with suppress(TimeoutError):
                        while peer.recv(100):
                            pass
                        break
        return port

    return attack


def streaming(name: str, *payload: bytes, **changes: Any) -> Callable[[Service], int]:
    """A good hello and begin, and then these frames."""
    return shaken(hello_frame(name=name, **changes) + begin_frame() + b"".join(payload))


def control(*frames: bytes) -> bytes:
    return hello_frame(role="control", name="", codec="", word=0, memory_pages=0, page_size=0) + b"".join(frames)


def asking(payload: bytes) -> bytes:
    return frame(frames.FrameType.REQUEST, payload)


FULL = Sender(PAGES)
FULL_BYTES = checkpoint(FULL)
HUGE = 0xFFFFFFFF
random = np.random.default_rng(7)

BAD: dict[str, Callable[[Service], int]] = {
    # Before TLS
    "plain": raw(b"hello, is there anybody?\n"),
    "http": raw(b"GET / HTTP/1.1\r\nHost: backup\r\n\r\n"),
    "session without TLS": raw(hello_frame()),
    "random": raw(random.bytes(5000)),
    "random behind a TLS record's header": raw(b"\x16\x03\x01\x40\x00" + random.bytes(20000)),
    "a TLS record of the greatest length": raw(b"\x16\x03\x01\xff\xff" + bytes(70000)),
    "only a look": raw(b""),
    "a byte now and then before TLS": dripping(b"\x16\x03\x01\x02\x00" + bytes(500), tls=False),
    # Whom nobody knows
    "no certificate": shaken(hello_frame(), who=None),
    "another CA": shaken(hello_frame(), who="other/stranger"),
    "expired": shaken(hello_frame(), who="ca/expired"),
    # Frames
    "garbage": shaken(random.bytes(100_000)),
    "silence": shaken(),
    "half a preface": shaken(frames.PREFACE[:5]),
    "a header of ones": shaken(frames.PREFACE + b"\xff" * 64),
    "the greatest length": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"", length=HUGE)),
    "one more than a control frame": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"", length=65537)),
    "a hello that never ends": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"x" * 1000, length=65536)),
    "a byte now and then in the hello": dripping(frames.PREFACE + frame(frames.FrameType.HELLO, bytes(1000)), tls=True),
    "data before a hello": shaken(frames.PREFACE + data_frame(b"x")),
    **{
        f"msgpack {code:02x} of the greatest length": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, start))
        for code, start in {
            code: bytes([code]) + b"\xff" * (4 if code not in (0xC7, 0xD9) else 1) + b"\x01" * 100
            for code in (0xC6, 0xC7, 0xC9, 0xD9, 0xDB, 0xDD, 0xDF)
        }.items()
    },
    "msgpack 60,000 deep": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"\x91" * 60_000 + b"\x01")),
    "a list in each list": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"\xdd\x00\x00\xff\xff" * 12_000)),
    "a hello of nothing": shaken(frames.PREFACE + frame(frames.FrameType.HELLO, b"\x80")),
    "another version": shaken(hello_frame(versions=[9])),
    "a name that climbs": shaken(hello_frame(name="../../etc")),
    "memory without end": shaken(hello_frame(memory_pages=(1 << 63) - 1)),
    "small pages": shaken(hello_frame(page_size=512)),
    # Streams
    "data before begin": shaken(hello_frame(name="early") + data_frame(FULL_BYTES)),
    "commit before begin": shaken(hello_frame(name="eager") + commit_frame(FULL, len(FULL_BYTES))),
    "begin twice": streaming("twice", begin_frame()),
    "begin of another term": shaken(hello_frame(name="term") + begin_frame(term=5)),
    "continues what is not there": shaken(
        hello_frame(name="nothing") + begin_frame(mode="continue", position=[3, bytes(32)])
    ),
    "commit before data": streaming("first", commit_frame(FULL, len(FULL_BYTES))),
    "data of the greatest length": streaming("long", data_frame(b"", length=HUGE)),
    "data of no length": streaming("none", data_frame(b"")),
    "lz4 to the greatest length": streaming("lz4", data_frame(struct.pack("<I", HUGE) + bytes(50), flags=1)),
    "zstd to the greatest length": streaming("zstd", data_frame(struct.pack("<I", HUGE) + bytes(50), flags=2)),
    "lz4 that is none": streaming("lz4-none", data_frame(struct.pack("<I", 4 << 20) + b"\xff" * 5000, flags=1)),
    "compression that was not agreed on": streaming(
        "zstd-none", data_frame(struct.pack("<I", 90) + bytes(50), flags=2), compressions=["lz4"]
    ),
    "memory of the greatest length": streaming("p2m-64", data_frame(b"\xff" * 64)),
    "more memory than the limit": streaming("p2m-over", data_frame(header((GIB >> 12) * 64 + 1) + bytes(64))),
    "a batch of the greatest count": streaming(
        "batch", data_frame(header() + struct.pack("<i", 0x7FFFFFFF) + bytes(64))
    ),
    "an entry past the end of memory": streaming(
        "pfn", data_frame(header() + struct.pack("<iQ", 1, PAGES) + bytes(4096))
    ),
    **{
        f"chunk {number} of the greatest length": streaming(
            f"chunk{-number}", data_frame(header() + struct.pack("<i", number) + b"\xff" * 256)
        )
        for number in (-2, -5, -6, -12, -18, -99)
    },
    "device state of the greatest length": streaming(
        "state",
        data_frame(
            header() + struct.pack("<i", 0) + struct.pack("<3QI", 0, 0, 0, 0) + b"RemusDeviceModelState\xff\xff\xff\xff"
        ),
    ),
    "context of the greatest length": streaming(
        "context", data_frame(header() + struct.pack("<i", 0) + struct.pack("<3QI", 0, 0, 0, HUGE))
    ),
    # Commits of what came
    "commit of fewer bytes": streaming("fewer", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES) - 1)),
    "commit of half": streaming("half", data_frame(FULL_BYTES[:-5000]), commit_frame(FULL, len(FULL_BYTES) - 5000)),
    "commit of too much": streaming(
        "much", data_frame(FULL_BYTES + FULL_BYTES), commit_frame(FULL, 2 * len(FULL_BYTES))
    ),
    "commit of fewer pages": streaming(
        "fewer-pages", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES), pages=PAGES - 1)
    ),
    "commit of more pages": streaming(
        "more-pages", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES), pages=PAGES + 1)
    ),
    "commit of another position": streaming(
        "position", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES), position=[0, b"x" * 32])
    ),
    "commit of another epoch": streaming(
        "epoch", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES), position=[7, b"x" * 32])
    ),
    "commit of another number of pages": streaming(
        "pages", data_frame(FULL_BYTES), commit_frame(FULL, len(FULL_BYTES), pages=PAGES + 1)
    ),
    "a checkpoint that is changed": streaming(
        "changed", data_frame(FULL_BYTES[:9000] + b"x" + FULL_BYTES[9001:]), commit_frame(FULL, len(FULL_BYTES))
    ),
    "an acknowledgement of its own": streaming(
        "ack", frame(frames.FrameType.ACK, msgpack.packb({"level": "durable", "position": [0, bytes(32)]}))
    ),
    "checkpoints and no commit": streaming("no-commit", data_frame(FULL_BYTES), data_frame(FULL_BYTES)),
    # Orders
    "a request of the greatest length": shaken(control(frame(frames.FrameType.REQUEST, b"", length=HUGE))),
    "a request of lists in lists": shaken(control(asking(b"\xdd\x00\x0f\xff\xff" * 200_000))),
    "an order in the wrong role": shaken(hello_frame(name="orders") + asking(b"\x80")),
    "a stream in the wrong role": shaken(control(begin_frame())),
}


def deleted_files(pid: int) -> list[str]:
    """Files that take room on the disk for as long as the process holds them."""
    found = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return [path for path in found if path.endswith("(deleted)")]


INDEXING = 1
"""The thread that looks after the page indexes, from the first checkpoint on."""


def test_each_bad_peer_leaves_one_line_and_nothing_else(served: Service) -> None:
    """All of them at once, and a good primary among them."""
    array, protection = served.protecting("good")
    with protection:
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        before = served.figures()
        with ThreadPoolExecutor(len(BAD)) as pool:
            attacks = {name: pool.submit(attack, served) for name, attack in BAD.items()}
            most = before
            while not all(attack.done() for attack in attacks.values()):
                array[3] += 1
                protection.checkpoint(wait=True, timeout_s=LONG_S)
                now = served.figures()
                most = Figures(max(most.rss, now.rss), max(most.fds, now.fds), max(most.threads, now.threads))
        ports = {name: attack.result() for name, attack in attacks.items()}
        until(lambda: served.figures().threads <= before.threads + INDEXING)
        until(lambda: [path for path in deleted_files(served.process.pid) if not path.startswith("/dev/shm/")] == [])
        # The good one's copy in memory is such a file; no other name has one.
        until(lambda: len(set(deleted_files(served.process.pid))) <= 1)
        wanted = Counter(ports.values())
        found = served.complaints()
        assert {name: found[port] for name, port in ports.items() if found[port] != 1} == {}
        assert found == wanted
        assert [line for line in served.lines() if "traceback" in line] == []
        print("one line each", before, most, served.figures())
        assert most.rss - before.rss < 200 << 20


def test_a_slow_store_is_no_reason_to_hang_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that are due before the welcome may not be sent, and are not."""
    writer = Store.writer
    monkeypatch.setattr(Store, "writer", lambda *given, **options: time.sleep(0.5) or writer(*given, **options))
    array = np.zeros(8192, dtype=np.uint8)
    with (
        Backup(tmp_path / "store", ["tcp://127.0.0.1:0"], policy=Policy(lease_s=0.4)) as backup,
        protect({"array": array}, to=backup.addresses[0], name="slow") as protection,
    ):
        assert protection.checkpoint(wait=True, timeout_s=LONG_S) == 0
        assert protection.status()["reconnects"] == 0


# A thousand of them


def hold(sockets: list[socket.socket], served: Service, count: int, say: bytes = b"") -> None:
    """Connections that stay, whether or not the service wants them."""
    for _ in range(count):
        peer = served.dial(bind="127.0.0.2")
        sockets.append(peer)
        with suppress(ConnectionError):
            peer.sendall(say)


HALF_A_CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)


def test_a_thousand_connections(tmp_path: Path, folder: Path) -> None:
    """Half of them silent, half in the middle of a handshake."""
    with service(tmp_path, folder, "--lease", f"{LONG_S:g}s") as served:  # a busy machine is no dead link
        crowd(served)


def crowd(served: Service) -> None:
    before = served.figures()
    sockets: list[socket.socket] = []
    try:
        hold(sockets, served, 500)
        holding = threading.Thread(target=hold, args=(sockets, served, 500, HALF_A_CLIENT_HELLO))
        holding.start()
        begin = time.monotonic()
        array, protection = served.protecting("good")
        with protection:
            protection.checkpoint(wait=True, timeout_s=LONG_S)
            first_s = time.monotonic() - begin
            holding.join()
            most = served.figures()
            array[0] += 1
            protection.checkpoint(wait=True, timeout_s=LONG_S)
            assert protection.status()["reconnects"] == 0
        print(f"{len(sockets)} connections: {before} {most}, first commit after {first_s:.2f} s")
        assert most.rss - before.rss < 80 << 20
        assert most.threads <= 270
        assert most.fds <= before.fds + 280
        until(lambda: served.figures().threads <= before.threads + INDEXING)
        ports = {peer.getsockname()[1] for peer in sockets}
        until(lambda: ports <= served.complaints().keys())
        # The good one may have lost its place too before it could say who it is; it came again.
        assert all(served.complaints()[port] == 1 for port in ports), "one line for each"
    finally:
        for peer in sockets:
            peer.close()


def test_a_flood_does_not_crowd_out_the_others(served: Service) -> None:
    """Connections come faster than anybody could shake hands: the place of one is taken by another of its own kind."""
    stop = threading.Event()

    def flood() -> None:
        mine: list[socket.socket] = []
        while not stop.is_set():
            mine.append(served.dial(bind="127.0.0.2"))
            if len(mine) > 300:
                mine.pop(0).close()
        for peer in mine:
            peer.close()

    with ThreadPoolExecutor() as pool:
        floods = [pool.submit(flood) for _ in range(2)]
        try:
            until(lambda: served.figures().threads > 200)
            for turn in range(3):
                _, protection = served.protecting(f"good-{turn}")
                with protection:
                    protection.checkpoint(wait=True, timeout_s=LONG_S)
                    assert protection.status()["reconnects"] == 0
        finally:
            stop.set()
        for one in floods:
            one.result()


# Who may come in, and takes too much


def tls_session(served: Service, **changes: Any) -> tuple[ssl.SSLSocket, machine.Session]:
    """A peer with a good certificate that has said hello."""
    peer = served.dial_tls()
    peer.sendall(hello_frame(**changes))
    session = machine.Session("client")
    fields = hello(**changes)
    session.send(messages.Hello(**fields | {"versions": tuple(fields["versions"])}))
    return peer, session


CONTROL = {"role": "control", "name": "", "codec": "", "word": 0, "memory_pages": 0, "page_size": 0, "run": bytes(16)}


def hear(peer: socket.socket, session: machine.Session) -> Any:
    """The next message that is no heartbeat."""
    while True:
        event = session.next_event()
        if event is None:
            size = peer.recv_into(session.get_buffer())
            session.buffer_updated(size)
            if not size:
                session.feed_eof()
        elif not isinstance(event, messages.Heartbeat):
            return event


def commit_full(peer: ssl.SSLSocket, session: machine.Session) -> None:
    sent = FULL.sent
    assert sent is not None and sent.position is not None
    out = session.send(messages.Begin(mode="full", term=0))
    out += session.send_data([FULL_BYTES])
    out += session.send(messages.Commit(position=sent.position, before=None, stream_bytes=len(FULL_BYTES), pages=PAGES))
    peer.sendall(b"".join(map(bytes, out)))


def test_names_without_end(tmp_path: Path, folder: Path) -> None:
    """A name under which nothing is committed is forgotten; those that hold something are as many as can be."""
    with service(tmp_path, folder) as served:
        assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (440, 440))[0] > 520
        before = served.figures()
        for number in range(20):
            peer, session = tls_session(served, name=f"empty-{number}")
            assert isinstance(hear(peer, session), messages.Welcome)
            peer.close()
        until(lambda: served.figures().is_within(before))
        assert served.ask()["names"] == {}
        assert os.listdir(tmp_path / "store") == [".lock"]
        kept = 0
        code = ""
        with ExitStack() as stack:
            while not code:
                peer, session = tls_session(served, name=f"full-{kept}")
                stack.enter_context(peer)
                answer = hear(peer, session)
                if isinstance(answer, messages.Error):
                    code = answer.code
                    break
                commit_full(peer, session)
                assert hear(peer, session).level == "received"
                kept += 1
            assert (code, 5 < kept < 40) == ("limit", True)
            assert served.figures().fds < 400
            # The others are served as before.
            assert len(served.ask()["names"]) == kept


def test_ten_thousand_questions_and_one_who_does_not_listen(tmp_path: Path, folder: Path) -> None:
    with service(tmp_path, folder, "--lease", "1s") as served:
        ask_without_end(served)


def ask_without_end(served: Service) -> None:
    before = served.figures()
    deaf, _ = tls_session(served, **CONTROL)
    question = asking(msgpack.packb({"number": 1, "method": "status", "arguments": {}}))

    def ask_on() -> None:
        with suppress(OSError):
            while True:
                deaf.sendall(question * 100)

    peer, session = tls_session(served, **CONTROL)
    array, protection = served.protecting("good")
    with ThreadPoolExecutor() as pool, protection, peer, deaf:
        asking_on = pool.submit(ask_on)
        assert isinstance(hear(peer, session), messages.Welcome)
        # So many at a time that neither side waits for the other.
        for _ in range(200):
            for number in range(50):
                session.send(messages.Request(number=number, method="status", arguments={}))
            peer.sendall(question * 50)
            for _ in range(50):
                assert isinstance(hear(peer, session), messages.Reply)
            array[1] += 1
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        assert served.figures().rss - before.rss < 50 << 20
        asking_on.result(LONG_S)
        until(lambda: served.complaints()[deaf.getsockname()[1]] == 1)
        assert protection.status()["reconnects"] == 0


def test_those_who_only_ask_make_room(served: Service) -> None:
    sockets = [tls_session(served, **CONTROL)[0] for _ in range(256)]
    try:
        _, protection = served.protecting("good")
        with protection:
            protection.checkpoint(wait=True, timeout_s=LONG_S)
        assert served.figures().threads <= 260
    finally:
        for peer in sockets:
            peer.close()


def test_a_second_primary_tries_again_and_again(served: Service) -> None:
    array, protection = served.protecting("orders")
    with protection:
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        ports = []
        for _ in range(30):
            peer, session = tls_session(served, name="orders")
            with peer:
                ports.append(peer.getsockname()[1])
                assert hear(peer, session).code == "busy"
        array[2] += 1
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        assert protection.status()["reconnects"] == 0
    until(lambda: served.complaints() == Counter(ports))


def test_what_a_primary_says_of_itself_does_not_crowd_out_the_others(served: Service) -> None:
    """A status may be long; all of them together must fit into one reply."""
    long = {f"{number:064}": "x" * 190 for number in range(250)}
    beat = frame(frames.FrameType.HEARTBEAT, msgpack.packb({"number": 1, "status": long}))
    with ExitStack() as stack:
        for number in range(20):
            peer, session = tls_session(served, name=f"talker-{number}")
            stack.enter_context(peer)
            assert isinstance(hear(peer, session), messages.Welcome)
            peer.sendall(beat)
        _, protection = served.protecting("good")
        with protection:
            protection.checkpoint(wait=True, timeout_s=LONG_S)
            until(lambda: served.ask()["names"]["good"]["primary"])
            assert len(served.ask()["names"]) == 21
