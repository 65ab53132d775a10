"""DataFrames and shared memory, protected on a real backup and restored from its store."""

from __future__ import annotations

import threading
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import until
from tracking import needs_tracking

from remus_ckpt import Backup, open_store, protect
from remus_ckpt.errors import SourceError
from remus_ckpt.source.track.kernel import Tracking

ROWS = 5000


def quotes() -> Any:
    pandas = pytest.importorskip("pandas", reason="no pandas")
    return pandas.DataFrame(
        {
            "price": np.linspace(0, 1, ROWS),
            "size": np.arange(ROWS),
            "at": pandas.date_range("2026-01-01", periods=ROWS, freq="s", tz="Europe/Berlin"),
        },
        index=[f"order {number}" for number in range(ROWS)],
    )


@pytest.mark.parametrize("tracking", ["compare", pytest.param("kernel", marks=needs_tracking)])
def test_every_checkpoint_of_a_frame_comes_back(tmp_path: Path, tracking: Tracking) -> None:
    frame = quotes()
    at = {}
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect({"quotes": frame}, to=backup.addresses[0], name="desk", tracking=tracking) as protection,
    ):
        for number in range(5):
            frame.iloc[number * 900, 0] = -1.0
            frame.loc[f"order {number}", "size"] = -number
            frame.loc[:, "price"] += number
            at[protection.checkpoint(wait=True)] = frame.copy()
        assert protection.status()["tracking"] == tracking
        history = open_store(tmp_path / "store")["desk"]
        for epoch, want in at.items():
            assert history.at(epoch).arrays()["quotes"].equals(want)
        history.at(1).restore(into={"quotes": frame})
        assert frame.equals(at[1])
        epoch = protection.checkpoint(wait=True)
    assert history.at(epoch).arrays()["quotes"].equals(at[1])


def test_a_column_that_is_replaced_ends_the_thread_with_an_error(tmp_path: Path) -> None:
    frame = quotes()
    lock = threading.Lock()
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
        protection = protect({"quotes": frame}, to=backup.addresses[0], name="desk", interval_s=0.002, lock=lock)
        until(lambda: protection.committed)
        with lock:
            frame["price"] = frame["price"] * 2
        thread = protection._thread
        assert thread is not None
        until(lambda: not thread.is_alive())
        with pytest.raises(SourceError, match="'price' of 'quotes'"):
            protection.close()
    found = open_store(tmp_path / "store")["desk"][-1].arrays()["quotes"]
    assert found.equals(quotes()), "what was committed is of before"


def test_shared_memory_comes_back_into_shared_memory(tmp_path: Path) -> None:
    memory = SharedMemory(create=True, size=10_000)
    try:
        array = np.ndarray(1000, dtype=np.int64, buffer=memory.buf)
        with (
            Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
            protect({"shared": memory}, to=backup.addresses[0], name="desk") as protection,
        ):
            array[:] = np.arange(1000)
            protection.checkpoint(wait=True)
            assert "shared" in protection.status()["tracking_why"]
        array[:] = 0
        open_store(tmp_path / "store")["desk"][-1].restore(into={"shared": memory})
        assert (array == np.arange(1000)).all()
        del array
    finally:
        memory.close()
        memory.unlink()
