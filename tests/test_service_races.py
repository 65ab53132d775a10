"""What may happen between two steps of the service: each test puts one thing exactly there."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from proxy import Proxy
from test_service import Memory, backup_in, entries, restored, until

from remus_ckpt.errors import LinkError


def cut(proxy: Proxy, memory: Memory) -> None:
    """Break the link, and wait until the primary knows."""
    link = memory.protection._primary._link
    assert link is not None
    proxy.cut()
    until(lambda: link._error is not None)


def test_the_last_bytes_of_a_checkpoint_cannot_be_sent(tmp_path: Path) -> None:
    """They alone meet the broken link, and the pages of that checkpoint come again."""
    breaking: list[Proxy] = []

    def device_state() -> bytes:
        if breaking:
            cut(breaking.pop(), memory)
        return bytes(1 << 20)  # so much that it is sent at once, and the pages before it with it

    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address, device_state=device_state) as memory,
    ):
        memory.step(1)
        breaking.append(proxy)
        memory.step(2)
        memory.step(3)
    assert not breaking
    assert [entry.is_base for entry in entries(tmp_path / "store")] == [True, False, False]
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_base_that_was_lost_is_not_gone_on_from_at_what_another_stream_made(tmp_path: Path) -> None:
    """A page that became zeros since is in no base: deltas behind the old stream would leave it there as it was."""
    silencing: list[Proxy] = []

    def device_state() -> bytes:
        if silencing and proxy.connections == 2:
            silencing.pop().silent.set()
        return b""

    with (
        backup_in(tmp_path / "one") as one,
        backup_in(tmp_path / "other") as other,
        Proxy(one.addresses[0]) as proxy,
        Memory(proxy.address, window=3, device_state=device_state) as memory,
    ):
        memory.step(1)
        memory.array[1] = 0
        proxy.target = other.addresses[0]
        cut(proxy, memory)
        silencing.append(proxy)
        memory.step(2, wait=False)
        assert proxy.silent.is_set()
        assert not entries(tmp_path / "other")
        proxy.target = one.addresses[0]
        cut(proxy, memory)
        proxy.silent.clear()
        memory.step(3)
        assert proxy.connections == 3
    assert np.array_equal(restored(tmp_path / "one"), memory.array)


def test_a_callback_that_raises_costs_that_checkpoint_and_no_more(tmp_path: Path) -> None:
    failing: list[Exception] = []

    def device_state() -> bytes:
        if failing:
            raise failing.pop()
        return b"fine"

    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0], device_state=device_state) as memory:
            for row in range(3):
                failing.append(KeyError(row))
                with pytest.raises(KeyError):
                    memory.step(row)
                memory.step(row + 10)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
        assert [entry.epoch for entry in entries(tmp_path / "store")] == [0, 1, 2]


def test_a_checkpoint_that_broke_off_when_its_time_was_over(tmp_path: Path) -> None:
    """The next call tries again, as it says."""
    breaking: list[Proxy] = []

    def device_state() -> bytes:
        if breaking:
            cut(breaking.pop(), memory)
            time.sleep(0.1)
        return bytes(1 << 20)

    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address, device_state=device_state) as memory,
    ):
        memory.step(1)
        breaking.append(proxy)
        with pytest.raises(LinkError):
            memory.protection.checkpoint(timeout_s=0.05)
        memory.step(2)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
