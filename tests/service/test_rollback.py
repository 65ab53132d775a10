"""`Protection.rollback`: arrays go back, in place, to a committed checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracking import needs_tracking

from remus_ckpt import Backup, Protection, open_store, protect
from remus_ckpt.errors import LinkError, NoCheckpoint, RemusError
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.track.kernel import Tracking

EACH_WAY = pytest.mark.parametrize("tracking", ["compare", pytest.param("kernel", marks=needs_tracking)])


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Backup]:
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
        yield backup


def arrays() -> dict[str, Any]:
    return {
        "prices": np.arange(30_000, dtype=np.float64),  # ends within a page
        "small": np.arange(5, dtype=np.int32),
        "matrix": np.zeros((100, 77), dtype=np.uint16, order="F"),
        "bytes": bytearray(10_000),
        "none": np.empty(0),
    }


def change(found: dict[str, Any], number: int) -> None:
    found["prices"][number * 1000 :: 7000] = -number
    found["small"][number % 5] = 100 + number
    found["matrix"][number] = number
    found["bytes"][number * 50] = number


def committed(protection: Protection) -> None:
    deadline = time.monotonic() + 30
    while protection.committed is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def copy(found: dict[str, Any]) -> dict[str, bytes]:
    return {name: bytes(value) if isinstance(value, bytearray) else value.tobytes() for name, value in found.items()}


@EACH_WAY
def test_the_newest(backup: Backup, tracking: Tracking) -> None:
    found = arrays()
    with protect(found, to=backup.addresses[0], name="desk", tracking=tracking) as protection:
        for number in range(1, 6):
            change(found, number)
            epoch = protection.checkpoint()
            want = copy(found)
            for _ in range(2):
                change(found, number + 7)
                assert copy(found) != want
                assert protection.rollback(*([epoch] if number % 2 else [])) == epoch
                assert copy(found) == want
        assert protection.status()["tracking"] == tracking
        # It goes on from there.
        change(found, 9)
        epoch = protection.checkpoint(wait=True)
        assert epoch == 5
    assert copy(found) != want


@EACH_WAY
def test_any_epoch(backup: Backup, tmp_path: Path, tracking: Tracking) -> None:
    found = arrays()
    at = {}
    with protect(found, to=backup.addresses[0], name="desk", tracking=tracking) as protection:
        for number in range(8):
            change(found, number)
            at[protection.checkpoint(wait=True)] = copy(found)
        history = open_store(tmp_path / "store")["desk"]
        for epoch, source in ((3, None), (7, None), (0, history), (6, history)):
            assert protection.rollback(epoch, history=source) == epoch
            assert copy(found) == at[epoch]
            change(found, 12)
        protection.rollback(2)
        new = protection.checkpoint(wait=True)
        assert new == 8
        assert {name: value.tobytes() for name, value in history.at(new).arrays().items()} == at[2]
        change(found, 13)
        assert protection.rollback() == new and copy(found) == at[2]


@EACH_WAY
def test_only_what_differs_is_written(backup: Backup, tracking: Tracking) -> None:
    array = zeros(200).reshape(-1)  # its pages are pages of the machine, and nobody else's
    array[:] = 1
    with protect({"array": array}, to=backup.addresses[0], name="desk", tracking=tracking) as protection:
        protection.checkpoint(wait=True)
        tracker = protection.source.tracker
        for epoch in (None, 0):
            array[5 * PAGE_SIZE] = array[77 * PAGE_SIZE] = 2
            for _ in range(2):
                assert tracker.peek().tolist() == [5, 77]
            protection.rollback(epoch)
            assert (array == 1).all()
            protection.rollback()
            assert not len(tracker.peek())
            protection.checkpoint(wait=True)
        array[5 * PAGE_SIZE] = 3
        protection.checkpoint(wait=True)
        protection.rollback(0)
        assert (array == 1).all()
        assert tracker.peek().tolist() == [5]  # the next checkpoint has to carry it


def test_an_interrupt_loses_nothing(backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.ones(64 * PAGE_SIZE, dtype=np.uint8)
    with protect({"array": array}, to=backup.addresses[0], name="desk") as protection:
        protection.checkpoint(wait=True)
        array[::PAGE_SIZE] = 2
        memory = protection.source.memory
        whole = memory.write

        def half(pfns: np.ndarray, other: np.ndarray) -> None:
            whole(pfns[: len(pfns) // 2], other)
            raise KeyboardInterrupt

        monkeypatch.setattr(memory, "write", half)
        with pytest.raises(KeyboardInterrupt):
            protection.rollback()
        monkeypatch.undo()
        torn = array.copy()
        assert 0 < (torn == 2).sum() < 64
        epoch = protection.checkpoint(wait=True)
        assert np.array_equal(open_store(tmp_path / "store")["desk"].at(epoch).arrays()["array"], torn)
        assert protection.rollback(0) == 0 and (array == 1).all()


def test_while_a_thread_takes_checkpoints(backup: Backup) -> None:
    array = np.zeros(50 * 512)
    lock = threading.Lock()
    with protect({"array": array}, to=backup.addresses[0], name="desk", interval_s=0.01, lock=lock) as protection:
        committed(protection)
        for number in range(1, 30):
            with lock:
                array[:] = number  # all or nothing: each checkpoint has one number in all places
            epoch = protection.rollback()
            with lock:
                assert (array == array[0]).all(), epoch
                assert array[0] in (number, number - 1, array[0])
            assert protection.committed is not None and protection.committed.epoch >= epoch
        kept = protection.rollback()
        with lock:
            value = array[0]
        deadline = time.monotonic() + 30
        while protection.committed.epoch < kept + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with lock:
            assert (array == value).all()
            array[:] = -1
        assert protection.rollback(kept) == kept
        with lock:
            assert (array == value).all()


def test_writers_never_see_half_of_it(backup: Backup) -> None:
    array = np.zeros(300 * 512)
    lock = threading.Lock()
    torn = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            with lock:
                if not (array == array[0]).all():
                    torn.append(array.copy())
                    return
                array[:] += 1

    with protect({"array": array}, to=backup.addresses[0], name="desk", lock=lock) as protection:
        protection.checkpoint(wait=True)
        thread = threading.Thread(target=watch)
        thread.start()
        for number in range(40):
            protection.rollback(None if number % 3 else 0)
        is_over.set()
        thread.join()
        assert not torn
        assert protection.rollback() == 0 and (array == 0).all()


def test_shared_memory_and_frames(backup: Backup) -> None:
    pandas = pytest.importorskip("pandas", reason="no pandas")
    frame = pandas.DataFrame({"price": np.linspace(0, 1, 5000), "size": np.arange(5000)})
    shared = SharedMemory(create=True, size=3 * PAGE_SIZE)
    try:
        with protect({"frame": frame, "shared": shared}, to=backup.addresses[0], name="desk") as protection:
            first = protection.checkpoint(wait=True)
            want = frame.copy()
            frame.loc[17, "price"] = -1
            shared.buf[5000] = 5
            protection.rollback()
            assert frame.equals(want) and shared.buf[5000] == 0
            frame.loc[17, "price"] = -1
            protection.checkpoint(wait=True)
            protection.rollback(first)
            assert frame.equals(want)
    finally:
        shared.close()
        shared.unlink()


def test_refusals(backup: Backup, tmp_path: Path) -> None:
    found = arrays()
    with protect(found, to=backup.addresses[0], name="desk") as protection:
        with pytest.raises(NoCheckpoint, match="no checkpoint has been taken"):
            protection.rollback()
        change(found, 1)
        assert protection.checkpoint(wait=True) == 0
        change(found, 2)
        want = copy(found)
        with pytest.raises(NoCheckpoint, match="has not been taken yet"):
            protection.rollback(1)
        with protect({"other": np.zeros(9)}, to=backup.addresses[0], name="other") as other:
            other.checkpoint(wait=True)
            with pytest.raises(NoCheckpoint, match="holds other arrays"):
                protection.checkpoint(wait=True)
                protection.rollback(0, history=open_store(tmp_path / "store")["other"])
        assert copy(found) == want
    with pytest.raises(ValueError, match="closed"):
        protection.rollback()
    assert copy(found) == want


def test_what_is_not_committed_is_not_gone_back_to(backup: Backup) -> None:
    array = np.zeros(5000)
    with protect({"array": array}, to=backup.addresses[0], name="desk") as protection:
        protection.checkpoint(wait=True)
        backup.close()
        array[:] = 1
        with pytest.raises(LinkError):
            protection.checkpoint(timeout_s=0.5)
        array[:] = 2
        for epoch in (None, 0):
            with pytest.raises(RemusError):
                protection.rollback(epoch, timeout_s=0.5)
        assert (array == 2).all()
        with pytest.raises(LinkError):
            protection.close(timeout_s=0.5)


def test_the_lock_is_not_waited_for_without_end(backup: Backup) -> None:
    array = np.zeros(5000)
    lock = threading.Lock()
    with protect({"array": array}, to=backup.addresses[0], name="desk", interval_s=5.0, lock=lock) as protection:
        committed(protection)
        with pytest.raises(RemusError, match="nothing was put back"):
            protection.rollback(timeout_s=0.1)  # the thread is asleep for 5 s
