"""A backup indexes the pages of what it stores, in a process that ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_support import fill, memory_at

from remus_ckpt import Backup, open_store, protect
from remus_ckpt.service import beside
from remus_ckpt.store import Store
from remus_ckpt.store.moment import Moment
from remus_ckpt.store.page_index import DIRECTORY


def until(true: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def indexers(store: Path) -> list[int]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"remus_ckpt.store.indexer" in words and os.fsencode(store) in words:
            found.append(int(pid))
    return found


def test_a_backup_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PAUSE_S", 0.05)
    prices = np.zeros(5000)
    store = tmp_path / "store"
    with Backup(store, [f"unix:{tmp_path}/socket"]) as backup:
        time.sleep(0.3)
        assert not indexers(store)  # there is nothing to index
        with protect({"prices": prices}, to=backup.addresses[0], name="orders") as protection:
            for number in range(20):
                prices[number] = number
                epoch = protection.checkpoint(wait=True)
            history = open_store(store)["orders"]
            entry = history.find(epoch)

            def is_indexed() -> bool:
                moment = Moment.open_indexed(history, entry)
                if moment is not None:
                    moment.close()
                return moment is not None

            until(is_indexed)
            (process,) = indexers(store)
            assert os.getpriority(os.PRIO_PROCESS, process) == 19
            entry = history.find(protection.checkpoint(wait=True))
            until(is_indexed)
    until(lambda: not indexers(store))
    assert np.frombuffer(history.memory(epoch)[: prices.nbytes], dtype=float)[19] == 19


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 5)
    (tmp_path / "orders" / DIRECTORY).mkdir()
    command = [sys.executable, "-m", "remus_ckpt.store.indexer", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        history = Store(tmp_path)["orders"]
        until(lambda: Moment.open_indexed(history, history.find(4)))
        process.stdin.close()
        assert process.wait(120) == 0  # whatever else runs comes first
    assert np.array_equal(history.memory(3), memory_at(3).reshape(-1))
