"""A store as a mapping of names to sequences of checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from store_support import fill

from remus_ckpt import Backup, open_store, protect
from remus_ckpt.errors import NoCheckpoint, StoreError
from remus_ckpt.store import Store, segments


def test_arrays_of_the_newest(tmp_path: Path) -> None:
    prices = np.zeros((3, 4), dtype=np.float32)
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect({"prices": prices}, to=backup.addresses[0], name="orders") as protection,
    ):
        for number in range(3):
            prices[1] = number
            protection.checkpoint(wait=True)
    store = open_store(tmp_path / "store")
    assert list(store) == ["orders"]
    assert np.array_equal(store["orders"][-1].arrays()["prices"], prices)
    assert store["orders"][0].arrays()["prices"][1, 0] == 0


def test_the_size_is_known_while_segments_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 1, source)
    opened = open_store(tmp_path)["orders"]
    oldest, newest = segments.list_segments(opened.directory)
    size = opened.path_of(newest).stat().st_size
    assert opened.size() == size + opened.path_of(oldest).stat().st_size
    opened.path_of(oldest).unlink()
    monkeypatch.setattr("remus_ckpt.store.history.list_segments", lambda directory: [oldest, newest])
    assert opened.size() == size


def test_places_and_epochs(tmp_path: Path) -> None:
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 4)
        writer.compact(wait=True)
        source = fill(writer, 3)
    history = open_store(tmp_path)["orders"]
    epochs = [one.epoch for one in history]
    assert epochs == [entry.epoch for entry in history.entries()]
    assert len(history) == len(epochs) == 7
    assert [history[number].epoch for number in range(len(epochs))] == epochs
    assert [history[number - len(epochs)].epoch for number in range(len(epochs))] == epochs
    for beyond in (7, -8):
        with pytest.raises(IndexError, match="7"):
            history[beyond]
    assert history[-1].position == source.position
    assert history.at(epochs[2]).epoch == epochs[2]
    saved = history[-1].save(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == bytes(saved.image)
    with pytest.raises(NoCheckpoint):
        history[-1].arrays()


def test_when_it_was_taken(tmp_path: Path) -> None:
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 2)
    assert open_store(tmp_path)["orders"][-1].time == datetime.fromtimestamp(1, UTC)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError):
        open_store(tmp_path)["orders"]
