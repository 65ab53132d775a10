"""A store that cannot take a full copy, and the first copy as others see it."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proxy import Proxy
from test_service import LONG_S, backup_in, greet, hear, until

from remus_ckpt.service.attempts import Attempts, Base
from remus_ckpt.service.backoff import LONGEST_S, STRANGER, Backoff
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import Protection, protect
from remus_ckpt.session.messages import Begin, Error, Welcome
from remus_ckpt.source.shared_file import MappedFile
from remus_ckpt.store import Room
from remus_ckpt.store.room import room_for_base

MIB = 1 << 20


class Disk:
    """What the file system of a store says is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        monkeypatch.setattr("remus_ckpt.store.room.free_bytes", lambda path: self.free)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def of(backup: Backup) -> dict[str, Any]:
    return backup.status()["names"]["orders"]


def tries(backup: Backup) -> int:
    """How often a primary has been refused."""
    found = backup.status()["names"].get("orders")
    return found["refused"]["tries"] if found and found["refused"] else 0


@contextmanager
def protecting(array: np.ndarray, to: str) -> Iterator[Protection]:
    """In a thread, every few milliseconds."""
    protection = protect({"array": array}, to=to, name="orders", interval_s=0.01, lock=threading.Lock())
    try:
        yield protection
    finally:
        protection.close()


# Before anything is sent


def begins(backup: Backup, run: int, pages: int | None) -> Any:
    """What a primary hears that wants to send a full copy of so many pages."""
    peer, session = greet(backup, run=bytes([run] * 16), memory_pages=1000)
    with peer:
        event = hear(peer, session)
        if not isinstance(event, Welcome):
            return event
        peer.sendall(b"".join(map(bytes, session.send(Begin(mode="full", term=event.term, data_pages=pages)))))
        until(lambda: of(backup)["first_copy"] is not None or of(backup)["refused"] is not None)
        return hear(peer, session) if of(backup)["first_copy"] is None else event


def test_a_full_copy_without_room_is_refused_upon_its_begin(tmp_path: Path, disk: Disk) -> None:
    disk.free = MIB
    with backup_in(tmp_path / "store") as backup:
        first, second = begins(backup, 1, 500), begins(backup, 1, 500)
        assert [type(event) for event in (first, second)] == [Error, Error]
        assert first.code == second.code == "store"
        found = of(backup)
        assert found["room"]["needed_bytes"] >= 2 * 500 * 4096
        assert found["room"]["free_bytes"] == MIB
        assert found["refused"]["tries"] == 2
        disk.free = 64 * MIB
        peer, session = greet(backup, run=bytes([1] * 16), memory_pages=1000)
        with peer:
            term = hear(peer, session).term
            peer.sendall(b"".join(map(bytes, session.send(Begin(mode="full", term=term, data_pages=500)))))
            until(lambda: of(backup)["first_copy"] is not None)
            assert of(backup)["health"]["state"] == "copying", "the fault is over"


@pytest.mark.parametrize("pages", [None, 10])
def test_a_large_memory_with_little_data_or_an_unknown_amount_is_let_in(
    tmp_path: Path, disk: Disk, pages: int | None
) -> None:
    disk.free = MIB
    with backup_in(tmp_path / "store") as backup:
        assert isinstance(begins(backup, 1, pages), Welcome)


def test_zeros_need_no_room(tmp_path: Path, disk: Disk) -> None:
    disk.free = 8 * MIB
    array = np.zeros(64 * MIB, dtype=np.uint8)
    array[8 * MIB : 10 * MIB] = 1
    with backup_in(tmp_path / "store") as backup, protecting(array, backup.addresses[0]):
        until(lambda: "orders" in backup.status()["names"] and of(backup)["health"]["state"] == "protected")


def test_holes_are_not_data(tmp_path: Path) -> None:
    with open(tmp_path / "memory", "wb") as file:
        file.truncate(1 << 30)
        file.write(bytes([1]) * MIB)
    memory = MappedFile(tmp_path / "memory")
    found = memory.data_pages()
    memory.close()
    assert found is not None and MIB // 4096 <= found < 10 * MIB // 4096


def test_protection_waits_quietly_and_goes_on_by_itself(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "remus_ckpt")
    disk.free = MIB
    array = np.arange(MIB, dtype=np.int64)
    with (
        backup_in(tmp_path / "store", lease_s=4.0) as backup,
        Proxy(backup.addresses[0]) as proxy,
        protecting(array, proxy.address),
    ):
        until(lambda: tries(backup) >= 3)
        assert proxy.connections <= 4, "it asks again, and not as fast as it can"
        found = of(backup)
        assert (found["health"]["state"], found["role"], found["connected"]) == ("store full", "standby", False)
        assert 0 <= found["refused"]["next_s"] <= LONGEST_S
        said = [record.message for record in caplog.records]
        assert said.count("refused") == said.count("primary connected") == said.count("linked") == 1
        assert said.count("no link") + said.count("link lost") == 1
        disk.free, begun = 64 * MIB, time.monotonic()
        until(lambda: of(backup)["health"]["state"] == "protected")
        assert time.monotonic() - begun < LONGEST_S
        until(lambda: of(backup)["refused"] is of(backup)["room"] is of(backup)["trouble"] is None)


def test_an_empty_name_is_let_go_of_when_its_primary_has_gone(tmp_path: Path, disk: Disk) -> None:
    disk.free = MIB
    with backup_in(tmp_path / "store", lease_s=0.4) as backup:
        with protecting(np.arange(MIB, dtype=np.int64), backup.addresses[0]):
            until(
                lambda: "orders" in backup.status()["names"] and (of(backup)["refused"] or {"tries": 0})["tries"] >= 2
            )
        until(lambda: "orders" not in backup.status()["names"])
        until(lambda: not (tmp_path / "store" / "orders").exists())


# A copy that fails on its way


def test_a_copy_that_could_not_be_stored_is_not_sent_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[float] = []

    def count(phase: str, epoch: int) -> None:
        if phase == "staged":
            copies.append(time.monotonic())

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    caplog.set_level(logging.INFO, "remus_ckpt")
    policy = Policy(lease_s=2.0)
    with (
        Backup(tmp_path / "store", ["tcp://127.0.0.1:0"], policy=policy, on_phase=count) as backup,
        monkeypatch.context() as patched,
    ):
        patched.setattr(os, "fdatasync", fail)
        with protecting(np.arange(MIB, dtype=np.int64), backup.addresses[0]) as protection:
            until(lambda: len(copies) == 3)
            patched.undo()
            until(lambda: protection.committed is not None)
    gaps = np.diff(copies)
    assert gaps[0] >= 1.0 and gaps[1] >= 2.0
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == len(set(said)) and "store failed" in said, "each once"


def base(began_at: float = 0.0, data_bytes: int | None = 16 * MIB) -> Base:
    return Base(bytes(16), None, 16 * MIB, data_bytes, began_at)


def test_each_vain_copy_doubles_the_pause() -> None:
    attempts = Attempts(lease_s=5.0)
    room = Room("/", 32 * MIB, 64 * MIB)
    now = 0.0
    pauses = []
    for _ in range(9):
        attempts.begin(base(now))
        assert attempts.why_not(room, now) is None
        attempts.base_failed(now, is_full=False)
        begun = now
        while attempts.why_not(room, now) is not None:
            now += 0.5
        pauses.append(now - begun)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    attempts.stored()
    attempts.begin(base(now))
    assert attempts.why_not(room, now) is None


@pytest.mark.parametrize(("took_s", "pause_s"), [(10.0, 40.0), (1000.0, 600.0)])
def test_a_long_copy_is_followed_by_a_longer_pause(took_s: float, pause_s: float) -> None:
    attempts = Attempts(lease_s=5.0)
    room = Room("/", 32 * MIB, 64 * MIB)
    attempts.begin(base())
    assert attempts.why_not(room, 0.0) is None
    attempts.base_failed(took_s, is_full=True)
    assert attempts.why_not(room, took_s + pause_s - 0.1) is not None
    assert attempts.why_not(room, took_s + pause_s) is None


def test_more_room_ends_the_pause() -> None:
    attempts = Attempts(lease_s=5.0)
    attempts.begin(base())
    more = Room("/", 32 * MIB, 67 * MIB)
    assert attempts.why_not(Room("/", 32 * MIB, 64 * MIB), 0.0) is None
    attempts.base_failed(100.0, is_full=True)
    assert attempts.why_not(Room("/", 32 * MIB, 65 * MIB), 101.0) is not None, "others write there too"
    assert attempts.why_not(more, 101.0) is None, "upon a hello"
    assert attempts.why_not(more, 101.0) is None, "and upon the begin that follows"
    attempts.base_failed(102.0, is_full=False)
    assert attempts.why_not(Room("/", 32 * MIB, 99 * MIB), 103.0) is not None, "room was not what it lacked"


def test_what_is_news_about_a_refusal() -> None:
    attempts = Attempts(lease_s=5.0)

    def refused(reason: str, at: float, code: str = "store") -> bool:
        return attempts.refused(code, reason, "x", now=at, unix_time=1000.0 + at)

    assert refused("3.1 MiB are free", 0.0)
    assert not refused("2.9 MiB are free", 1.0)
    assert refused("Input/output error", 2.0)
    assert refused("is being protected by another", 3.0, "busy")
    assert refused("is being protected by another", 4.0, "busy"), "it may be anybody"
    found = attempts.status(4.5)["refused"]
    assert (found["code"], found["since"], found["tries"], found["ago_s"], found["next_s"]) == (
        "busy",
        1003.0,
        5,
        0.5,
        0.5,
    )
    assert attempts.status(7.0)["refused"] is not None
    assert attempts.status(7.1)["refused"] is None, "it has not come back for three of its pauses"
    assert refused("Input/output error", 100.0), "it has been away"


def test_the_wait_of_a_primary() -> None:
    backoff = Backoff()
    waits = []
    for _ in range(8):
        backoff.failed(None)
        waits.append(backoff.seconds)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff = Backoff()
    backoff.failed("store")
    assert backoff.seconds == 1.0
    backoff.linked(2.0, 0)
    backoff.lost(0, "store")
    assert backoff.seconds == 0.5, "it must be heard of before its lease is over"
    backoff.linked(2.0, 1)
    assert backoff.seconds == 0.0
    backoff.lost(1, "store")
    assert backoff.seconds == 0.5
    backoff.lost(2, "store")
    assert backoff.seconds == 0.0


def test_what_a_changed_bit_can_look_like_ends_a_primary_when_it_comes_twice() -> None:
    for code in ("version", "name", "forbidden", "fenced"):
        assert Backoff().is_final(code)
    for code in ("limit", STRANGER):
        backoff = Backoff()
        backoff.failed(code)
        assert not backoff.is_final(code)
        backoff.failed(None)
        backoff.failed(code)
        assert not backoff.is_final(code), "something else came in between"
        backoff.failed(code)
        assert backoff.is_final(code)
        backoff.linked(2.0, 1)
        backoff.lost(2, code)
        assert not backoff.is_final(code), "that link has carried a commit"
        backoff.linked(2.0, 2)
        backoff.lost(2, code)
        assert backoff.is_final(code)
    backoff = Backoff()
    for code in ("malformed", "stream", "busy", "store", None):
        for _ in range(3):
            backoff.failed(code)
            assert not backoff.is_final(code)


def test_the_room_of_two_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shm = Path("/dev/shm")
    if os.stat(shm).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is only one file system")
    free = {str(shm): 10 * MIB, str(tmp_path): 100 * MIB}
    monkeypatch.setattr("remus_ckpt.store.room.free_bytes", lambda path: free[str(path)])
    found = room_for_base(16 * MIB, tmp_path / "not" / "there", shm)
    assert (found.where, found.needed_bytes, found.is_enough) == (str(shm), 16 * MIB, False)
    free[str(shm)] = 1000 * MIB
    found = room_for_base(16 * MIB, tmp_path / "not" / "there", shm)
    assert found.where == str(tmp_path) and found.is_enough
    assert 16 * MIB < found.needed_bytes < 17 * MIB
    both = room_for_base(16 * MIB, tmp_path / "segments", tmp_path / "warm")
    assert 32 * MIB < both.needed_bytes < 33 * MIB


# A first copy that goes well


def test_a_first_copy_over_a_slow_link(tmp_path: Path) -> None:
    """What the primary says of it comes although its own bytes fill the link."""
    array = np.random.default_rng(1).integers(0, 1 << 60, 8 * MIB)
    seen: list[dict[str, Any]] = []
    with (
        backup_in(tmp_path / "store", lease_s=1.0) as backup,
        Proxy(backup.addresses[0], rate=20.0 * MIB) as proxy,
        protecting(array, proxy.address) as protection,
    ):

        def look() -> bool:
            names = backup.status()["names"]
            if "orders" in names and names["orders"]["first_copy"] and names["orders"]["primary"].get("copy_share"):
                seen.append(names["orders"])
            return protection.committed is not None

        until(look)
        shares = [one["primary"]["copy_share"] for one in seen]
        assert len(set(shares)) >= 3 and shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1
        middle = seen[len(seen) // 2]
        assert middle["health"]["state"] == "copying"
        assert middle["primary"]["copy_pass"] == 1
        assert 1 * MIB < middle["primary"]["copy_bytes_s"] < 100 * MIB
        assert 0 < middle["primary"]["copy_left_s"] < LONG_S
        received = [one["first_copy"]["received_bytes"] for one in seen]
        assert received == sorted(received) and 0 < received[-1] <= 1.1 * array.nbytes
        assert f"{middle['first_copy']['done']:.0%} of 64.0 MiB" in middle["health"]["words"]
        until(lambda: of(backup)["primary"].get("copy_share", 0) is None)
        assert of(backup)["first_copy"] is None
