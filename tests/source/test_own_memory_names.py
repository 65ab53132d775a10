"""Buffers that cannot change, shared memory, and names that come to mean other objects."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pytest

from remus_ckpt.errors import SourceError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.own_memory import Buffers, OwnMemory


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"abc",
        lambda: memoryview(b"abc"),
        lambda: memoryview(bytearray(3)).toreadonly(),
        lambda: mmap.mmap(-1, PAGE_SIZE, access=mmap.ACCESS_READ),
        lambda: read_only(np.zeros(3)),
        lambda: np.frombuffer(b"abc", dtype=np.uint8),
        lambda: np.broadcast_to(np.zeros(3), 3),
    ],
    ids=["bytes", "of bytes", "view", "mmap", "array", "array of bytes", "broadcast"],
)
def test_what_cannot_change_is_refused_by_its_name(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"'constants'.*read-only"):
        OwnMemory({"good": bytearray(3), "constants": make()})


# Shared memory


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=PAGE_SIZE + 5)
    try:
        yield memory
    finally:
        memory.close()
        memory.unlink()


def test_shared_memory_is_bytes(shared: SharedMemory) -> None:
    source = OwnMemory({"shared": shared})
    assert shared.buf is not None
    shared.buf[PAGE_SIZE + 4] = 7
    assert source.memory.sample(0, 2).reshape(-1)[PAGE_SIZE + 4] == 7
    assert source.tracker.written().tolist() == [1]
    with pytest.raises(BufferError):
        shared.close()
    source.close()


def test_shared_memory_that_shrinks_is_an_error_and_not_a_crash(shared: SharedMemory) -> None:
    source = OwnMemory({"shared": shared})
    with open(f"/dev/shm/{shared.name}", "r+b") as file:
        file.truncate(10)
    with pytest.raises(SourceError):
        source.memory.check()
    source.close()


def test_shared_memory_that_is_closed_is_refused() -> None:
    memory = SharedMemory(create=True, size=10)
    memory.close()
    memory.unlink()
    with pytest.raises(ValueError, match=r"'shared'.*closed"):
        OwnMemory({"shared": memory})


# Names that come to mean something else


def test_another_object_under_a_name_is_found_in_the_next_pause() -> None:
    state = {"kept": np.zeros(5), "moved": np.zeros(5)}
    first = state["moved"]
    source = OwnMemory(state)
    state["kept"] += 1
    state["new"] = np.zeros(5)
    source.memory.check()
    state["moved"] = state["moved"] * 2
    with pytest.raises(SourceError, match="'moved'"):
        source.memory.check()
    state["moved"] = first
    source.memory.check()
    del state["moved"]  # nothing is written elsewhere
    source.memory.check()


def test_a_mapping_that_makes_its_objects_anew_is_no_error() -> None:
    class Anew(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return np.zeros(5)

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    OwnMemory(Anew()).memory.check()


@pytest.mark.parametrize("size", [0, 5, PAGE_SIZE, PAGE_SIZE + 5])
@pytest.mark.parametrize("in_dict", [True, False])
def test_an_array_that_nobody_else_has_is_abandoned(size: int, in_dict: bool) -> None:
    array: Any = np.zeros(size, dtype=np.uint8)
    held = bytearray(5)
    state = {"array": array, "held": held}
    memory = Buffers(state)
    if not in_dict:
        del state["array"]
    assert memory.abandoned() == []
    array = array * 2
    assert memory.abandoned() == ([] if in_dict else ["array"]), "whoever has the dict has the array"
    del state
    assert memory.abandoned() == ["array"]


def test_an_array_that_a_view_shows_is_not_abandoned() -> None:
    array = np.zeros(5)
    memory = Buffers({"array": array})
    view = array[2:]
    del array
    assert memory.abandoned() == []
    assert view.shape == (3,)
    del view
    assert memory.abandoned() == ["array"]
