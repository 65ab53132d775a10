"""Memory as an array, from image files and to them."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import noise

from remus_ckpt.image import Image
from remus_ckpt.memory import differing_ranges, joined, memory_sha256, save_image, zeros
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for


def test_fresh_memory_is_zeros_and_takes_none_until_it_is_written() -> None:
    memory = zeros(1 << 24)  # 64 GiB
    assert memory.shape == (1 << 24, PAGE_SIZE)
    memory[12345, 7] = 1
    assert memory[12345].sum() == 1 and not memory[12344].any()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096, 3 * 4096 + 5])
@pytest.mark.parametrize("more", [0, 2])
def test_an_image_of_any_size_is_padded_to_pages(tmp_path: Path, size: int, more: int) -> None:
    content = noise(1, 4).tobytes()[:size]
    (tmp_path / "image").write_bytes(content)
    pages = pages_for(size) + more
    memory = noise(2, pages)
    with Image(tmp_path / "image") as image:
        image.read(0, memory)
    assert memory.tobytes() == content + bytes(pages * PAGE_SIZE - size)
    assert pages_for(size) * PAGE_SIZE - PAGE_SIZE < size <= pages_for(size) * PAGE_SIZE


def holes() -> Pages:
    """Zero pages at the front, in the middle and at the end; over the border of what is written at a time."""
    memory = np.zeros((5000, PAGE_SIZE), dtype=np.uint8)
    memory[[3, 4, 7, 4095, 4096, 4500]] = noise(2, 6)
    memory[4998, 4095] = 1
    return memory


def test_an_image_is_written_whole_private_and_with_holes(tmp_path: Path) -> None:
    memory = holes()
    path = tmp_path / "image"
    path.write_bytes(b"before")
    path.chmod(0o644)
    save_image(memory, path)
    assert path.read_bytes() == memory.tobytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 < 40 * PAGE_SIZE
    assert [each.name for each in tmp_path.iterdir()] == ["image"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"before")
    with pytest.raises(ValueError):
        save_image(np.ones((2, PAGE_SIZE - 1), dtype=np.uint8), path)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["image"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    memory = noise(3, 3)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        save_image(memory, path)
        assert os.read(reader, 1 << 20) == memory.tobytes()
        assert stat.S_ISFIFO(path.stat().st_mode)
    finally:
        os.close(reader)


def test_the_hash_is_of_all_pages_in_order() -> None:
    memory = holes()
    assert memory_sha256(memory) == hashlib.sha256(memory.tobytes()).hexdigest()
    assert memory_sha256(memory[:0]) == hashlib.sha256(b"").hexdigest()


def ranges(numbers: list[int], before: Pages, after: Pages) -> list[tuple[int, int]]:
    """Byte by byte: where pages of these numbers differ."""
    found: list[tuple[int, int]] = []
    for number, one, other in zip(numbers, before.tolist(), after.tolist(), strict=True):
        for at, (this, that) in enumerate(zip(one, other, strict=True), number * PAGE_SIZE):
            if this == that:
                continue
            if found and found[-1][1] == at:
                found[-1] = (found[-1][0], at + 1)
            else:
                found.append((at, at + 1))
    return found


@given(
    st.lists(st.tuples(st.integers(0, 4 * PAGE_SIZE), st.integers(1, 6000)), max_size=5),
    st.sets(st.integers(0, 3)),
)
@settings(max_examples=many(12, 60))
def test_where_pages_differ(changes: list[tuple[int, int]], picked: set[int]) -> None:
    before = noise(4, 4)
    after = before.copy()
    for first, length in changes:
        after.reshape(-1)[first : first + length] ^= 1
    numbers = sorted(picked)
    found = differing_ranges(np.array(numbers, dtype=np.int64), before[numbers], after[numbers])
    assert list(joined(found)) == ranges(numbers, before[numbers], after[numbers])
