"""A primary keeps its time whatever its backup does."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import Liar, Peer
from services import make_keys, within
from test_service import LONG_S, Memory, backup_in, entries, restored, until

from remus_ckpt.errors import LinkError, RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.session import frames, messages

COMMIT = bytes([frames.FrameType.COMMIT])
"""The first byte of such a frame."""


# Time-outs


@contextmanager
def hanging_disk(tmp_path: Path) -> Iterator[tuple[Backup, threading.Event]]:
    """A backup whose disk hangs from epoch 1 on until the event is set; its heartbeats go on."""
    go_on = threading.Event()

    def on_phase(name: str, epoch: int) -> None:
        if name == "staged" and epoch >= 1:
            go_on.wait(LONG_S)

    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"], on_phase=on_phase) as backup:
        try:
            yield backup, go_on
        finally:
            go_on.set()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("wait", [False, True])
def test_a_disk_that_hangs(tmp_path: Path, window: int, wait: bool) -> None:
    with hanging_disk(tmp_path) as (backup, go_on):
        memory = Memory(backup.addresses[0], window=window)
        memory.step(0)
        failed = 0
        for row in range(5):
            memory.array[row] += 1
            with within(0.1):
                try:
                    memory.protection.checkpoint(timeout_s=0.1, wait=wait)
                except LinkError:
                    failed += 1
        assert failed >= 5 - window
        assert memory.protection.status()["lag_checkpoints"] <= window
        go_on.set()
        memory.step(7)
        memory.protection.close()
        assert [commit.epoch for commit in memory.commits] == [entry.epoch for entry in entries(tmp_path / "store")]
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


@pytest.mark.parametrize("in_thread", [False, True])
def test_closing_while_the_disk_hangs(tmp_path: Path, in_thread: bool) -> None:
    options: dict[str, Any] = {"interval_s": 0.01, "lock": threading.Lock()} if in_thread else {}
    with hanging_disk(tmp_path) as (backup, _):
        memory = Memory(backup.addresses[0], **options)
        if in_thread:
            until(lambda: memory.protection.status()["lag_checkpoints"] > 0 and memory.protection.committed is not None)
        else:
            memory.step(0)
            memory.step(1, wait=False)
        with within(0.5), pytest.raises(LinkError):
            memory.protection.close(0.5)
        memory.protection.close()


def beat(peer: Peer) -> None:
    """Be there, and read nothing."""
    number = 0
    with suppress(OSError):
        while True:
            number += 1
            peer.say(messages.Heartbeat(number=number, status={}))
            time.sleep(0.05)


def stops_reading(peer: Peer) -> None:
    peer.welcome(lease_s=30.0)
    beat(peer)


def dribbles(peer: Peer) -> None:
    hello = peer.hear()
    welcome = messages.Welcome(program="liar", term=hello.term or 0, limits={}, lease_s=30.0)
    with suppress(OSError):
        for byte in b"".join(map(bytes, peer.session.send(welcome))):
            peer.socket.sendall(bytes([byte]))
            time.sleep(0.1)


def says_nothing(peer: Peer) -> None:
    while peer.socket.recv(1 << 16):
        pass


@pytest.mark.parametrize("serve", [stops_reading, dribbles, says_nothing])
def test_a_peer_that_keeps_us_waiting(serve: Callable[[Peer], None]) -> None:
    array = np.random.default_rng(1).integers(0, 256, 32 << 20, dtype=np.uint8)
    with Liar(serve) as liar:
        protection = protect({"array": array}, to=liar.address, name="orders", connect_timeout_s=0)
        for _ in range(3):
            with within(0.2), pytest.raises(LinkError):
                protection.checkpoint(timeout_s=0.2)
        with within(0.2), suppress(RemusError):
            protection.close(0.2)
        before = liar.visits
        options: dict[str, Any] = {"interval_s": 0.01, "lock": threading.Lock(), "connect_timeout_s": 0}
        threaded = protect({"array": array}, to=liar.address, name="t", **options)
        until(lambda: liar.visits > before)
        time.sleep(0.1)  # let it come to where it waits
        with within(0.2), suppress(RemusError):
            threaded.close(0.2)


def test_a_copy_that_was_not_done_in_time_is_done_by_a_longer_one(tmp_path: Path) -> None:
    """The first peer takes nothing; the next one finds a primary that goes on right."""
    array = np.random.default_rng(1).integers(0, 256, (32 << 20) // 8, dtype=np.int64)
    with Liar(stops_reading) as liar, backup_in(tmp_path / "store") as backup:
        to = liar.address
        memory = Memory(to, array=array.reshape(-1, 512), dial=lambda: connect(Address.parse(to)))
        with within(0.3), pytest.raises(LinkError):
            memory.protection.checkpoint(timeout_s=0.3)
        to = backup.addresses[0]
        memory.step(1)
        memory.protection.close()
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_heartbeat_that_cannot_go_out_is_in_nobodys_way() -> None:
    def serve(peer: Peer) -> None:
        peer.welcome(lease_s=2.0)
        beat(peer)

    asked = 0  # whether a heartbeat can go out

    def dial() -> Connection:
        connection = connect(Address.parse(liar.address))
        is_writable = connection.is_writable

        def counted() -> bool:
            nonlocal asked
            asked += 1
            return is_writable()

        connection.is_writable = counted  # type: ignore[method-assign]
        connections.append(connection)
        return connection

    connections: list[Connection] = []
    with Liar(serve) as liar:
        memory = Memory(liar.address, dial=dial)
        memory.protection.checkpoint()
        with socket.socket(fileno=os.dup(connections[0].fileno())) as sock:

            def is_due_while_full() -> bool:
                nonlocal asked
                with suppress(BlockingIOError):
                    while True:
                        sock.send(bytes(1 << 16))
                return asked > before

            before = asked
            until(is_due_while_full)
        with within(0.2), pytest.raises(LinkError):
            memory.protection.checkpoint(timeout_s=0.2)
        with within(0.2), suppress(RemusError):
            memory.protection.close(0.2)


def test_all_pages_of_a_checkpoint_whose_commit_was_not_sent_come_again(tmp_path: Path) -> None:
    """More than one batch of them."""
    interrupts: list[BaseException] = []

    def dial() -> Connection:
        connection = connect(Address.parse(backup.addresses[0]))
        send = connection.send

        def interrupted(buffers: Any, timeout_s: float | None) -> None:
            if interrupts and bytes(buffers[-1])[:1] == COMMIT:
                raise interrupts.pop()
            send(buffers, timeout_s)

        connection.send = interrupted  # type: ignore[method-assign]
        return connection

    with backup_in(tmp_path / "store") as backup:
        memory = Memory("", array=np.zeros((2500, 512), dtype=np.int64), dial=dial)
        memory.step(1)
        memory.array += 1
        interrupts.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            memory.step(2)
        assert not interrupts
        memory.step(3)
        memory.protection.close()
    assert [entry.is_base for entry in entries(tmp_path / "store")] == [True, False]
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_connecting_takes_no_longer_than_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver, a listener, a TLS handshake that hang."""
    folder = make_keys(tmp_path)
    wake = threading.Event()
    found = socket.getaddrinfo

    def slow(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "slow.invalid":
            wake.wait(LONG_S)
        return found(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with ExitStack() as stack:
        stack.callback(wake.set)
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(tmp_path / "full"))
        full.listen(0)
        for _ in range(3):
            dialing = stack.enter_context(socket.socket(socket.AF_UNIX))
            dialing.setblocking(False)
            dialing.connect_ex(str(tmp_path / "full"))
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for address in (f"unix:{tmp_path}/full", f"tls://127.0.0.1:{deaf.getsockname()[1]}", "tls://slow.invalid:1"):
            options: dict[str, Any] = {"to": address, "name": "orders", "tls_dir": folder / "ca" / "primary"}
            with within(0.3), pytest.raises(LinkError):
                protect({"a": np.zeros(9)}, **options, connect_timeout_s=0.3)
            protection = protect({"a": np.zeros(9)}, **options, connect_timeout_s=0)
            with within(0.3), pytest.raises(LinkError):
                protection.checkpoint(timeout_s=0.3)
            with within(0.3):
                protection.close(0.3)
