"""What may happen between two steps of the service: each test puts one thing exactly there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from proxy import Proxy
from test_service import Memory, backup_in, entries, restored, until


def test_the_last_bytes_of_a_checkpoint_cannot_be_sent(tmp_path: Path) -> None:
    """They alone meet the broken link, and the pages of that checkpoint come again."""
    breaking: list[Proxy] = []

    def device_state() -> bytes:
        if breaking:
            breaking.pop().cut()
            link = memory.protection._primary._link
            until(lambda: link is not None and link._error is not None)
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
