"""The cache in front of a QEMU stream: every kernel does what the plain one does, byte for byte and slot for slot."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import many
from kernel_support import guarded, guarded_pages
from numpy.typing import NDArray

from remus_ckpt.codec import kernels
from remus_ckpt.codec.page_cache import Count, PageCache, room_for
from remus_ckpt.codec.reference import Lru
from remus_ckpt.pages import PAGE_SIZE, Pages

FAST = [name for name in kernels.KERNELS if name != "oracle"]
SLOTS = (0, 1, 8, 64)


def written(memory: Pages, random: np.random.Generator, numbers: NDArray[np.int64]) -> None:
    """Every way in which a page can change, and the one in which it does not."""
    for number in numbers:
        match random.integers(0, 6):
            case 0:
                memory[number] = 0
            case 1:
                memory[number] = random.integers(0, 256, PAGE_SIZE)
            case 2:
                memory[number, ::2] ^= 1  # so many runs that they overflow
            case 3:
                memory[number, -1] ^= 1
            case 4:
                start = int(random.integers(0, PAGE_SIZE - 300))
                memory[number, start : start + 300] = random.integers(0, 256, 300)


def rounds(kernel: str, slots: int, seed: int) -> list[object]:
    """What a sequence of rounds gives, and the cache after each."""
    random = np.random.default_rng(seed)
    memory = guarded_pages(random.integers(0, 256, (24, PAGE_SIZE), dtype=np.uint8))
    memory[5:9] = 0
    cache = PageCache(slots, kernel=kernel)
    cache.pages = guarded_pages(cache.pages) if slots else cache.pages
    found: list[object] = []
    for number in range(7):
        numbers = np.sort(random.choice(24, 24 if number == 0 else 15, replace=False)).astype(np.int64)
        out = guarded(bytes(room_for(len(numbers))))
        is_compact = number % 2 == 1
        pages, index = (guarded_pages(memory[numbers]), None) if is_compact else (memory, numbers)
        records = cache.records(pages, index, numbers, 3, out, encodes=number > 0)
        found += [
            bytes(records),
            cache.held.tolist(),
            cache.ages.tolist(),
            cache.pages.tobytes(),
            cache.counts.tolist(),
        ]
        cache.age += 1
        written(memory, random, numbers[::2])
    return found


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("slots", SLOTS)
def test_every_kernel_does_what_the_plain_one_does(kernel: str, slots: int) -> None:
    for seed in range(many(2, 100)):
        assert rounds(kernel, slots, seed) == rounds("oracle", slots, seed), seed


def test_the_rounds_see_everything() -> None:
    """They would be worth little if they did not come to every outcome."""
    counts = np.sum([rounds("oracle", 8, seed)[-1] for seed in range(4)], axis=0)  # type: ignore[arg-type]
    assert (counts > 0).all()


def misses(slots: int, pages: int, count: int) -> float:
    """The share of misses in rounds that write all of so many pages in turn."""
    memory = np.ones((pages, PAGE_SIZE), dtype=np.uint8)
    cache, numbers, out = PageCache(slots), np.arange(pages), np.empty(room_for(pages), dtype=np.uint8)
    for number in range(count):
        cache.records(memory, None, numbers, 0, out, encodes=number > 0)
        cache.age += 1
        memory[:, 7] += 1
    return float(cache.counts[Count.MISS] / (pages * (count - 1)))


def test_hot_pages_stay_where_more_are_hot_than_there_is_room() -> None:
    """QEMU's measure: a cyclic load over twice the cache. A cache that gives its oldest page away never hits."""
    assert misses(64, 128, 12) == 0.5
    lru = Lru(64)
    full = [lru.choose(np.arange(128), np.zeros(128, dtype=bool))[1].mean() for _ in range(12)]
    assert full == [1.0] * 12
    assert misses(128, 128, 12) == 0


def test_a_page_that_is_no_longer_sent_gives_way() -> None:
    memory = np.ones((16, PAGE_SIZE), dtype=np.uint8)
    cache, out = PageCache(8), np.empty(room_for(8), dtype=np.uint8)
    held = []
    for number in range(5):
        numbers = np.arange(8) + (0 if number == 0 else 8)
        cache.records(memory, numbers, numbers, 0, out, encodes=True)
        held.append(cache.held[0])
        cache.age += 1
    assert held == [0, 0, 8, 8, 8]


def test_another_size_keeps_what_was_sent_last() -> None:
    memory = np.arange(32, dtype=np.uint8)[:, None].repeat(PAGE_SIZE, axis=1) + np.uint8(1)
    cache, out = PageCache(16), np.empty(room_for(32), dtype=np.uint8)
    cache.records(memory, np.arange(16), np.arange(16), 0, out, encodes=False)
    cache.age = 1
    cache.records(memory, np.arange(4), np.arange(4), 0, out, encodes=False)
    small = cache.resized(8)
    assert small.held.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert (small.pages[:, 0] == small.held + 1).all()
    large = small.resized(32)
    assert sorted(large.held[large.held >= 0].tolist()) == sorted(small.held.tolist())
    assert all(large.pages[slot, 0] == page + 1 for slot, page in enumerate(large.held.tolist()) if page >= 0)
    assert cache.resized(0).slots == 0


@pytest.mark.parametrize("kernel", FAST)
def test_arrays_that_do_not_fit_change_nothing(kernel: str) -> None:
    memory = np.ones((4, PAGE_SIZE), dtype=np.uint8)
    cache, numbers = PageCache(4, kernel=kernel), np.arange(4)
    room = np.empty(room_for(4), dtype=np.uint8)
    for pages, index, which, out in (
        (memory, np.array([0, 1, 2, 4]), numbers, room),
        (memory, np.array([0, 1, 2, -1]), numbers, room),
        (memory, None, np.arange(3), room),
        (memory, None, numbers, room[:-1]),
        (memory, None, -numbers, room),
    ):
        with pytest.raises(ValueError):
            cache.records(pages, index, which, 0, out, encodes=True)
        assert (cache.held == -1).all() and not cache.counts.any()
    with pytest.raises(ValueError):
        PageCache(3)
