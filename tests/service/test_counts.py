"""What a primary counts, and how many checkpoints it lets fly."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from liars import Liar, Peer
from services import until
from store_support import Source
from support import Command
from test_service import Memory, backup_in, greet, hear

from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.protect import protect
from remus_ckpt.service.release import Committed, ReleaseCommand
from remus_ckpt.session import messages
from remus_ckpt.store import Store
from remus_ckpt.wire.record import Position


def test_checkpoints_by_hand_are_counted_and_the_first_link_is_no_reconnection(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        for row in range(3):
            memory.step(row)
        status = memory.protection.status()
        assert (status["checkpoints"], status["reconnects"]) == (3, 0)
        memory.primary.hang_up()
        memory.step(4)
        status = memory.protection.status()
        assert (status["checkpoints"], status["reconnects"]) == (4, 1)


@pytest.mark.parametrize(("max_pause_s", "way"), [(0.0, "copy"), (10.0, "encode")])
def test_what_is_done_in_the_pause_is_shown_to_both_sides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    max_pause_s: float,
    way: str,
) -> None:
    remus = Command(monkeypatch, capfdbinary)
    array = np.zeros((8, 4096), dtype=np.uint8)
    with (
        backup_in(tmp_path / "store") as backup,
        protect({"a": array}, to=backup.addresses[0], name="orders", max_pause_s=max_pause_s) as protection,
    ):
        assert protection.status()["capture"] is None
        protection.checkpoint(wait=True)
        assert protection.status()["capture"] == "copy", "a first checkpoint carries its pages in full"
        array[3] = 7
        protection.checkpoint(wait=True)
        status = protection.status()
        assert (status["capture"], bool(status["capture_why"])) == (way, way == "copy")
        assert (status["encode_ms"]["max"] > 0) == (way == "encode")
        said = {"copy": "pages copied: encoding", "encode": "pages encoded in the pause"}[way]
        until(lambda: said in remus("status", "--from", backup.addresses[0]).out)
    assert np.array_equal(Store(tmp_path / "store").history("orders").restore().memory.reshape(array.shape), array)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_no_more_checkpoints_fly_than_the_window_has(window: int) -> None:
    """In the thread of `interval_s`, too, which can be stopped."""
    commits: list[messages.Commit] = []
    is_over = threading.Event()

    def serve(peer: Peer) -> None:
        peer.welcome(lease_s=30.0)
        while (message := peer.hear()) is not None:
            if isinstance(message, messages.Commit):
                commits.append(message)
        is_over.set()

    array = np.zeros(9)
    with Liar(serve) as liar:
        protection = protect(
            {"a": array}, to=liar.address, name="orders", window=window, lock=threading.Lock(), interval_s=0.001
        )
        until(lambda: len(commits) >= window)
        assert not is_over.wait(0.2)  # many intervals
        assert len(commits) == window
        with pytest.raises(Exception, match=r"."):
            protection.close(0.2)


@pytest.mark.parametrize(("does", "has_failed"), [("cat > /dev/null", False), ("cat > /dev/null; exit 3", True)])
def test_an_on_commit_command_that_fails_at_its_end_has_failed(does: str, has_failed: bool) -> None:
    stop = StopSignal()
    complaints: list[str] = []
    command = ReleaseCommand("orders", does, stop, complaints.append)
    command(Committed(epoch=0, position=Position(0, bytes(32)), latency_s=0.0))
    command.close()
    stop.close()
    assert command.has_failed == has_failed
    assert bool(complaints) == has_failed


def test_a_commit_that_denies_what_its_record_follows(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        source = Source(position=Position(4, bytes(32)))
        data = source.checkpoint()
        assert source.sender.sent is not None
        peer, session = greet(backup)
        with peer:
            begin = messages.Begin(mode="full", term=hear(peer, session).term)
            commit = messages.Commit(
                position=source.position, before=None, stream_bytes=len(data), pages=source.sender.sent.pages
            )
            out = session.send(begin) + session.send_data([data]) + session.send(commit)
            peer.sendall(b"".join(map(bytes, out)))
            event = hear(peer, session)
            assert (type(event), event.code) == (messages.Error, "malformed")
        until(lambda: "orders" not in backup.status()["names"])  # nothing was stored


def test_metrics_say_who_has_taken_over(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        assert 'remus_promoted{name="orders"} 0.0' in exposed(backup.metrics)
        backup.failover("orders")
        until(lambda: 'remus_promoted{name="orders"} 1.0' in exposed(backup.metrics))
        assert 'remus_term{name="orders"} 1.0' in exposed(backup.metrics)


def exposed(metrics: Metrics) -> str:
    from prometheus_client import generate_latest

    return generate_latest(metrics.registry).decode()
