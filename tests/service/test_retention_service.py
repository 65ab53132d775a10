"""A backup that keeps tiers thins its store while checkpoints come."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from services import LONG_S, until
from store_support import fill, sha

from remus_ckpt.memory import memory_sha256
from remus_ckpt.service import backup as backup_module
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import protect
from remus_ckpt.store import Retention, Store
from remus_ckpt.store.segments import list_segments, sequence_of


def test_a_running_backup_thins(tmp_path: Path) -> None:
    """By small segments: 64 MiB of deltas would be most of what a tier keeps of a memory of 1 MiB."""
    noise = np.random.default_rng(1)
    array = np.zeros(1 << 20, dtype=np.uint8)
    policy = Policy(retention=Retention(yearly=1))
    with (
        Backup(tmp_path / "store", ["unix:" + str(tmp_path / "socket")], policy=policy) as backup,
        protect({"array": array}, to=backup.addresses[0], name="orders") as protection,
    ):
        directory = tmp_path / "store" / "orders"
        for _ in range(60):
            array[:] = noise.integers(0, 256, len(array), dtype=np.uint8)
            protection.checkpoint(wait=True, timeout_s=LONG_S)
        until(lambda: sequence_of(list_segments(directory)[-1]) >= 2)
        history = Store(tmp_path / "store").history("orders")
        # The first of the year, and the newest; of the second of three segments nothing was wanted.
        until(lambda: history.state.pruned)
        assert history[0].epoch == 0 and len(list_segments(directory)) <= 3 and history.lost() == []
        assert (history[-1].arrays()["array"] == array).all()


def test_idle_names_give_way_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps its newest segment, and whoever comes later finds the rest of the disk."""
    monkeypatch.setattr(backup_module, "_ROOM_S", 0.01)
    store = Store(tmp_path / "store")
    for name in ("desk", "orders"):
        with store.writer(name) as writer:
            for _ in range(20):
                fill(writer, 2)
    policy = Policy(retention=Retention(free=1 << 60))
    with Backup(store, ["unix:" + str(tmp_path / "socket")], policy=policy) as backup:
        until(lambda: all(len(list_segments(store.directory / name)) == 1 for name in ("desk", "orders")))
        assert all(status["warnings"] == [] for status in backup.status()["names"].values())
    for name in ("desk", "orders"):
        assert memory_sha256(store.history(name).restore().memory) == sha(39)
    until(lambda: "room" not in {thread.name for thread in threading.enumerate()})
