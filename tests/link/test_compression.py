"""The second stage is chosen by what is measured, and never slows a fast link."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from remus_ckpt.link.compression import Chooser
from remus_ckpt.pages import Buffer
from remus_ckpt.session.frames import Packing
from remus_ckpt.session.messages import Compression

MIB = 1 << 20
TEXT = np.frombuffer(b"orders of the day, once more; " * 40_000, dtype=np.uint8)
NOISE = np.random.default_rng(1).integers(0, 256, MIB, dtype=np.uint8)
FAST_S, SLOW_S = 0.0004, 0.5
"""For a MiB: 2.6 GB/s and 2 MB/s."""


Gains = dict[Compression, tuple[float, float]]
"""Bytes/s in, and bytes out per byte in."""


def chooser(wanted: str = "auto", offered: tuple[str, ...] = ("lz4", "zstd"), *, gains: Gains | None = None) -> Chooser:
    """gains: what samples give, whatever this machine can compress; by default they are measured"""
    return Chooser(wanted, offered, measure=None if gains is None else lambda sample, name: gains[name])


def sampled_anew(chosen: Chooser) -> None:
    chosen.look([np.zeros(33 * MIB, dtype=np.uint8)])


def test_a_slow_link_and_data_that_shrink() -> None:
    chosen = chooser()
    assert chosen.choose() == "none", "nothing is measured yet"
    chosen.look([TEXT])
    chosen.received(MIB, SLOW_S)
    assert chosen.choose() != "none"


def test_a_fast_link() -> None:
    chosen = chooser(gains={"lz4": (0.5e9, 0.1), "zstd": (0.2e9, 0.05)})  # what lz4 does to such data at most
    chosen.look([TEXT])
    chosen.received(MIB, FAST_S)
    assert chosen.choose() == "none"


def test_data_that_do_not_shrink() -> None:
    chosen = chooser()
    chosen.look([NOISE])
    chosen.received(MIB, SLOW_S)
    assert chosen.choose() == "none"


def test_the_better_of_two() -> None:
    chosen = chooser(gains={"lz4": (1e9, 0.5), "zstd": (0.1e9, 0.2)})
    chosen.look([TEXT])
    chosen.received(MIB, 1.0)
    assert chosen.choose() == "zstd", "a link of 1 MB/s: what is smallest"
    for _ in range(30):
        chosen.received(MIB, 0.01)
    assert chosen.choose() == "lz4", "a link of 100 MB/s: what is fast"
    for _ in range(30):
        chosen.received(MIB, FAST_S)
    assert chosen.choose() == "none"


def test_it_is_not_taken_up_for_a_small_gain() -> None:
    gains: Gains = {"lz4": (1e12, 0.9)}
    chosen = chooser(offered=("lz4",), gains=gains)
    chosen.look([TEXT])
    chosen.received(MIB, SLOW_S)
    assert chosen.choose() == "none"
    gains["lz4"] = (1e12, 0.5)
    sampled_anew(chosen)
    chosen.received(MIB, SLOW_S)
    assert chosen.choose() == "lz4"
    gains["lz4"] = (1e12, 0.9)
    sampled_anew(chosen)
    chosen.received(MIB, SLOW_S)
    assert chosen.choose() == "lz4", "nor dropped for a small loss"


def test_the_time_that_any_answer_takes_is_not_the_links() -> None:
    chosen = chooser(offered=("lz4",), gains={"lz4": (0.5e9, 0.1)})
    chosen.look([TEXT])
    chosen.received(100, 0.05)  # 50 ms for a hundred bytes: far away, or a slow disk
    chosen.received(MIB, 0.05 + FAST_S)
    assert chosen.choose() == "none"


def test_the_time_that_the_bytes_take_here_and_there_is_not_the_links() -> None:
    gains = {"lz4": (0.7e9, 0.3)}
    for size, seconds in ((2 * MIB, 0.01), (1024 * MIB, 50.0)):
        chosen = chooser(offered=("lz4",), gains=gains)
        chosen.look([TEXT])
        chosen.received(size, seconds)  # hashing, checking, storing; and fresh memory for a first copy
        assert chosen.choose() == "none"
    for size, seconds in ((2 * MIB, 0.02), (1024 * MIB, 90.0)):
        chosen = chooser(offered=("lz4",), gains=gains)
        chosen.look([TEXT])
        chosen.received(size, seconds)  # 1 Gbit/s, and 100 Mbit/s
        assert chosen.choose() == "lz4"


def test_what_was_asked_for() -> None:
    assert chooser("lz4").choose() == "lz4"
    assert chooser("zstd").choose() == "zstd"
    assert chooser("zstd", ("lz4",)).choose() == "none"
    assert chooser("none").choose() == "none"
    fixed = chooser("none")
    fixed.look([TEXT])
    fixed.received(MIB, SLOW_S)
    assert fixed.choose() == "none"


def test_who_hears_leaves_alone_what_the_sender_measures() -> None:
    """A sample may be taken at that moment, in the other thread."""

    class Owned(tuple[float, float]):
        def __iter__(self) -> Any:
            assert threading.current_thread() is threading.main_thread(), "it changes while it is read"
            return super().__iter__()

    chosen = chooser(offered=("lz4",), gains={"lz4": Owned((0.5e9, 0.1))})
    chosen.look([TEXT])
    with ThreadPoolExecutor() as hearing:
        for _ in range(2):
            hearing.submit(chosen.received, MIB, SLOW_S).result()
    assert chosen.choose() == "lz4"


def test_samples_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    compress = Packing.compress

    def counted(packing: Packing, data: Buffer, name: Compression) -> bytes:
        taken.append(len(data))
        return compress(packing, data, name)

    monkeypatch.setattr(Packing, "compress", counted)
    chosen = chooser()
    for _ in range(64):
        chosen.look([TEXT[:MIB]])
    assert 4 <= len(taken) <= 6, "two candidates, once for each 32 MiB"
    assert max(taken) == 1 << 18
