"""Backups that lie: a primary believes nothing that cannot be."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from liars import Liar, Peer, frame
from services import LONG_S, command, until
from support import writer_process

from remus_ckpt.errors import Fenced, RemusError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.protect import protect
from remus_ckpt.service.release import Committed
from remus_ckpt.session import frames, messages
from remus_ckpt.wire.record import Position

pytestmark = pytest.mark.hostile


# Backups that lie


def acks_another_digest(peer: Peer) -> None:
    peer.welcome()
    while (event := peer.hear()) is not None:
        if isinstance(event, messages.Commit):
            ack(peer, Position(event.position.epoch, b"x" * 32))


def acks_another_epoch(peer: Peer) -> None:
    peer.welcome()
    while (event := peer.hear()) is not None:
        if isinstance(event, messages.Commit):
            ack(peer, Position(event.position.epoch + 1, event.position.digest))


def acks_before_anything_came(peer: Peer) -> None:
    peer.welcome()
    ack(peer, Position(0, bytes(32)))
    peer.wait()


def acks_what_it_had_itself(peer: Peer) -> None:
    """It names a position in the welcome, which the session then knows."""
    held = Position(7, b"h" * 32)
    peer.welcome(position=held, highest_epoch=7)
    peer.hear()
    for level in ("received", "durable", "applied"):
        ack(peer, held, level)
    peer.wait()


def acks_receipt_only(peer: Peer) -> None:
    peer.welcome()
    while (event := peer.hear()) is not None:
        if isinstance(event, messages.Commit):
            ack(peer, event.position, "received")


def ack(peer: Peer, position: Position, level: str = "durable") -> None:
    """Whether or not a session would."""
    payload = msgpack.packb({"level": level, "position": [position.epoch, position.digest]})
    peer.force(frame(frames.FrameType.ACK, payload))


def says_garbage(peer: Peer) -> None:
    peer.welcome()
    peer.hear()
    peer.force(np.random.default_rng(1).bytes(10_000))
    peer.wait()


def says_garbage_at_once(peer: Peer) -> None:
    peer.force(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    peer.socket.recv(1 << 16)


def is_silent(peer: Peer) -> None:
    while peer.socket.recv(1 << 16):
        pass


def takes_nothing(peer: Peer) -> None:
    peer.welcome(lease_s=0.5)
    threading.Event().wait(3.0)


def takes_nothing_for_long(peer: Peer) -> None:
    peer.welcome(lease_s=1.0)
    threading.Event().wait(4.0)


def hangs_up(peer: Peer) -> None:
    peer.welcome()


def hangs_up_at_the_commit(peer: Peer) -> None:
    peer.welcome()
    while (event := peer.hear()) is not None and not isinstance(event, messages.Commit):
        pass


def boasts(peer: Peer) -> None:
    peer.welcome()
    peer.hear()
    status = {f"{number:064}": "x" * 150 for number in range(250)}
    with suppress(TimeoutError):
        peer.socket.settimeout(3.0)
        for number in range(1000):
            peer.say(messages.Heartbeat(number=number, status=status))
    peer.wait()


def says_fenced_without_a_term(peer: Peer) -> None:
    peer.hear()
    peer.say(messages.Error(code="fenced", message="stop", term=None))
    peer.wait()


def says_fenced_by_a_lower_term(peer: Peer) -> None:
    peer.hear()
    peer.say(messages.Error(code="fenced", message="stop", term=3))
    peer.wait()


def says_fenced_by_a_lower_term_later(peer: Peer) -> None:
    peer.welcome()
    peer.hear()
    peer.say(messages.Error(code="fenced", message="stop", term=3))
    peer.wait()


def welcomes_under_a_lower_term(peer: Peer) -> None:
    peer.welcome(term=3)
    acknowledge_all(peer)


def acknowledge_all(peer: Peer) -> None:
    while (event := peer.hear()) is not None:
        if isinstance(event, messages.Commit):
            ack(peer, event.position)


def welcomes(**changes: Any) -> Callable[[Peer], None]:
    def serve(peer: Peer) -> None:
        peer.welcome(**changes)
        peer.wait()

    return serve


MOST = (1 << 63) - 1

LIARS: dict[str, Callable[[Peer], None]] = {
    **{
        serve.__name__: serve
        for serve in (
            acks_another_digest, acks_another_epoch, acks_before_anything_came, acks_what_it_had_itself,
            acks_receipt_only, says_garbage, says_garbage_at_once, is_silent, takes_nothing, hangs_up,
            hangs_up_at_the_commit, boasts, says_fenced_by_a_lower_term, says_fenced_by_a_lower_term_later,
            says_fenced_without_a_term, welcomes_under_a_lower_term,
        )
    },
    "the last epoch": welcomes(highest_epoch=MOST),
    "the last position": welcomes(position=Position(MOST, bytes(32)), highest_epoch=MOST),
    "the last but one": welcomes(position=Position(MOST - 1, bytes(32)), highest_epoch=MOST - 1),
    "no lease": welcomes(lease_s=0.0),
    "a lease of a nanosecond": welcomes(lease_s=1e-9),
    "a lease of thirty years": welcomes(lease_s=1e9),
    "a stream that is not ours": welcomes(
        position=Position(4, bytes(32)), highest_epoch=4, stream=messages.StreamShape("delta", 8, 1 << 40)
    ),
    "the last term": welcomes(term=MOST),
}  # fmt: skip


def believe(serve: Callable[[Peer], None]) -> str:
    """Be the primary of a liar for a while; what is wrong then, or nothing."""
    commits: list[Committed] = []
    array = np.zeros(100_000, dtype=np.uint8)
    caught: RemusError | None = None
    with Liar(serve) as liar:
        options: dict[str, Any] = {"term": 5, "on_commit": commits.append, "connect_timeout_s": 0}
        protection = protect({"array": array}, to=liar.address, name="orders", **options)
        try:
            for _ in range(3):
                array[:] = np.random.default_rng(2).integers(0, 256, len(array), dtype=np.uint8)
                protection.checkpoint(wait=True, timeout_s=1.5)
        except RemusError as error:
            caught = error
        visits = liar.visits
        with suppress(RemusError):
            protection.close(0.1)
    is_right = isinstance(caught, RemusError) and not isinstance(caught, Fenced)
    if is_right and protection.committed is None and not commits and visits <= 10:
        return ""
    return f"{visits} visits, {commits}, {protection.committed}, {caught!r}"


def test_backups_that_lie() -> None:
    """Nothing is committed, nothing but our own errors comes, and none is tried again in a hurry."""
    before = threading.active_count()
    with ThreadPoolExecutor(len(LIARS)) as pool:
        found = dict(zip(LIARS, pool.map(believe, LIARS.values()), strict=True))
    assert {name: fault for name, fault in found.items() if fault} == {}
    until(lambda: threading.active_count() == before)


@pytest.mark.parametrize("serve", [acks_receipt_only, takes_nothing_for_long, hangs_up_at_the_commit])
def test_a_worker_runs_on_whatever_the_backup_does(tmp_path: Path, serve: Callable[[Peer], None]) -> None:
    """The real command: its worker writes on, it stays small, and a signal ends it."""
    memory = Path(f"/dev/shm/remus-hostile-{os.getpid()}")
    memory.write_bytes(bytes(64 * PAGE_SIZE))
    try:
        with (
            Liar(serve) as liar,
            writer_process(memory, pages=64) as worker,
            command(
                "protect", memory, "--pid", worker.pid, "--to", liar.address, "--name", "orders", "--json",
                "--interval", "5ms", log=tmp_path / "log",
            ) as protecting,
        ):  # fmt: skip
            until(lambda: liar.visits)
            for _ in range(5):
                before = memory.read_bytes()
                until(lambda: memory.read_bytes() != before)  # noqa: B023
                time.sleep(0.2)
            status = Path(f"/proc/{protecting.pid}/status").read_text()
            assert int(status.partition("VmRSS:")[2].split()[0]) < 200 << 10
            protecting.send_signal(signal.SIGTERM)
            out, _ = protecting.communicate(timeout=LONG_S)
            assert (protecting.returncode, json.loads(out)["ended"]) == (0, "stopped")
            assert json.loads(out)["committed_epoch"] is None
            before = memory.read_bytes()
            until(lambda: memory.read_bytes() != before)
    finally:
        memory.unlink()
