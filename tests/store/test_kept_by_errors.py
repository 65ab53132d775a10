"""What fails keeps nothing: neither memory nor a descriptor waits for the garbage collector.

An error that is kept by a name in a frame that its traceback refers to is a cycle; a mapping in it has a descriptor.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from store_support import PAGES, fill, sha

from remus_ckpt.errors import BadCheckpoint
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.store import History, Store


@contextmanager
def nothing_left() -> Iterator[None]:
    """As many descriptors are open after the block as before, without a collection."""
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        yield
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["open", "fdatasync"])
def test_a_compaction_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def fail(what: object, *more: object) -> object:
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if path.endswith("compacted-000001.partial"):
            raise OSError(errno.EIO, "Input/output error")
        return real(what, *more)

    with nothing_left():
        with Store(tmp_path).writer("orders", warm_in_memory=True) as writer:
            fill(writer, 3)
            monkeypatch.setattr(os, call, fail)
            writer.compact(wait=True)
            monkeypatch.undo()
            assert any("compaction" in warning for warning in writer.warnings)
        del writer


READS: dict[str, Callable[[History, int, Path], str]] = {
    "restore_image": lambda history, at, path: memory_sha256(history.restore_image(path, at).memory),
    "restore": lambda history, at, path: memory_sha256(history.restore(at).memory),
    "moment": lambda history, at, path: _sha_of_moment(history, at),
}


def _sha_of_moment(history: History, at: int) -> str:
    memory = np.empty((PAGES, PAGE_SIZE), dtype=np.uint8)
    with history.moment(at) as moment:
        moment.read(0, memory)
    return memory_sha256(memory)


@pytest.mark.parametrize("read", READS)
def test_a_restore_that_failed(tmp_path: Path, read: str) -> None:
    """Of epochs 0 to 3 in one segment, and 3 to 6 in the next: 1 is damaged, and so is 3 in the second."""
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 3, source)
    history = store.history("orders")
    first, second = history.contents()
    assert history.find(3) == second.first
    spoil(history, second.name, 500)
    with nothing_left():
        assert READS[read](store.history("orders"), 3, tmp_path / "image") == sha(3), "from the first segment"
    spoil(history, first.name, history.find(1).end - 100)
    for at in (1, 3):
        with nothing_left():
            try:
                READS[read](store.history("orders"), at, tmp_path / "image")
            except BadCheckpoint:
                continue
        raise AssertionError(f"checkpoint {at} is damaged")


def spoil(history: History, segment: str, at: int) -> None:
    path = history.path_of(segment)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
