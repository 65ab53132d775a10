"""A checkpoint restored into existing arrays: all of them, or nothing."""

from __future__ import annotations

import array
import mmap
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_support import fill

from remus_ckpt import Backup, arrays_of, open_store, protect
from remus_ckpt.errors import NoCheckpoint
from remus_ckpt.store import History, Store

RECORD = np.dtype([("id", "<u4"), ("at", "<M8[ns]"), ("corner", "<f4", (2, 3)), ("name", "U5")], align=True)


def state() -> dict[str, Any]:
    return {
        "number": np.array(7, dtype="<i8"),
        "grid": np.arange(6000, dtype=">u4").reshape(60, 100),
        "columns": np.asfortranarray(np.arange(35, dtype="f8").reshape(5, 7)),
        "records": np.ones(300, dtype=RECORD),
        "empty": np.empty((0, 5)),
        "book": bytearray(b"x" * 5000),
        "area": mmap.mmap(-1, 4097),
        "doubles": array.array("d", [1.5, 2.5]),
    }


def values(buffers: dict[str, Any]) -> dict[str, bytes]:
    return {name: one.tobytes() if isinstance(one, np.ndarray) else bytes(one) for name, one in buffers.items()}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    folder = tmp_path_factory.mktemp("into")
    buffers = state()
    with (
        Backup(folder / "store", [f"unix:{folder}/socket"]) as backup,
        protect(buffers, to=backup.addresses[0], name="desk") as protection,
    ):
        protection.checkpoint(wait=True)
        buffers["number"][...] = 8
        buffers["book"][4999] = 0
        protection.checkpoint(wait=True)
    yield open_store(folder / "store")["desk"]


def other() -> dict[str, Any]:
    """The same buffers with other values."""
    buffers = state()
    for name in ("number", "grid", "columns"):
        buffers[name][...] = 99
    buffers["records"]["name"] = "other"
    buffers["book"][:] = bytes(5000)
    buffers["area"][:] = b"a" * 4097
    buffers["doubles"][0] = 0.0
    return buffers


def test_every_kind_of_buffer(history: History) -> None:
    before = state()
    for restore, number, book in (
        (history[-1].restore, 8, b"\0"),
        (history[0].restore, 7, b"x"),
        (history.restore, 8, b"\0"),
    ):
        target = other()
        held = dict(target)
        checkpoint = restore(into=target)
        assert all(target[name] is held[name] for name in held)
        before["number"][...] = number
        before["book"][4999:] = book
        assert values(target) == values(before)
        assert values(arrays_of(checkpoint)[0]) == values(before)


def test_views_and_bytes_of_other_kinds_take_the_values(history: History) -> None:
    whole = np.zeros((60, 200), dtype=">u4")
    target = other() | {
        "grid": whole[:, ::2],
        "book": np.zeros(5000, dtype=np.uint8),
        "area": memoryview(bytearray(4097)),
    }
    target["columns"] = np.zeros((5, 7))  # in the other order
    shared = SharedMemory(create=True, size=16)
    try:
        target["doubles"] = shared
        history[0].restore(into=target)
        assert bytes(shared.buf or b"") == array.array("d", [1.5, 2.5]).tobytes()
    finally:
        shared.close()
        shared.unlink()
    want = state()
    assert (whole[:, ::2] == want["grid"]).all()
    assert (whole[:, 1::2] == 0).all()
    assert (target["columns"] == want["columns"]).all()
    assert bytes(target["book"]) == bytes(want["book"])


def locked(one: Any) -> Any:
    one.flags.writeable = False
    return one


SAME = np.zeros((60, 100), dtype=">u4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": None}, "missing: 'grid'"),
        ({"grid": None, "book": None, "new": np.zeros(3)}, "missing: 'book', 'grid'; not in the checkpoint: 'new'"),
        ({"grid": None, 5: np.zeros(3), "new": 1}, "not in the checkpoint: 'new', 5"),
        ({"grid": np.zeros((60, 100), dtype="<u4")}, "'grid' is uint32.*>u4"),
        ({"grid": np.zeros((100, 60), dtype=">u4")}, r"'grid'.*\(100, 60\).*\(60, 100\)"),
        ({"grid": np.zeros(6000, dtype=">u4")}, "'grid'"),
        ({"grid": bytearray(24000)}, "'grid' is bytearray"),
        ({"grid": np.ma.zeros((60, 100), dtype=">u4")}, "'grid' is a masked array"),
        ({"grid": locked(np.zeros((60, 100), dtype=">u4"))}, "'grid' is read-only"),
        ({"book": bytes(5000)}, "'book' is read-only"),
        ({"book": bytearray(4999)}, "'book'"),
        ({"book": [0] * 5000}, "'book' is list"),
        ({"book": np.zeros(625)}, "'book'"),
        ({"records": np.zeros(300, dtype=RECORD.descr)}, "'records'"),
        ({"grid": SAME, "book": SAME.reshape(-1).view(np.uint8)[:5000]}, "'book' and 'grid' share memory"),
        ({"grid": np.zeros(5), "number": np.zeros(5), "new": 1}, "new.*'grid'.*'number'"),
    ],
)
def test_what_does_not_fit_leaves_everything_as_it_was(history: History, changes: dict[Any, Any], words: str) -> None:
    target = {name: one for name, one in (other() | changes).items() if one is not None}
    before = values({name: one for name, one in target.items() if name not in changes})
    with pytest.raises(ValueError, match=words):
        history[-1].restore(into=target)
    assert values({name: one for name, one in target.items() if name not in changes}) == before


def test_memory_without_names_has_nothing_to_restore(tmp_path: Path) -> None:
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 1)
    with pytest.raises(NoCheckpoint):
        open_store(tmp_path)["orders"][-1].restore(into={})


def test_going_back_is_protected_like_any_other_write(tmp_path: Path) -> None:
    buffers: dict[str, Any] = {"a": np.zeros(2000), "b": bytearray(5000)}
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect(buffers, to=backup.addresses[0], name="desk") as protection,
    ):
        buffers["a"][1500] = 1
        protection.checkpoint(wait=True)
        good = values(buffers)
        buffers["a"][:] = 5
        buffers["b"][7] = 5
        protection.checkpoint(wait=True)
        history = open_store(tmp_path / "store")["desk"]
        history[0].restore(into=buffers)
        assert values(buffers) == good
        protection.checkpoint(wait=True)
    assert values(history[-1].arrays()) == good
