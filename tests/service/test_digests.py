"""Programs of two versions: which digest a stream gets, and that a history goes on from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_service import LONG_S, backup_in

from remus_ckpt.restorer import Restorer
from remus_ckpt.service import standby
from remus_ckpt.service.protect import protect
from remus_ckpt.store import Store


def written(store: Path) -> list[tuple[int, str, str]]:
    """Of each checkpoint, segment by segment: its epoch, its digest, and what it follows."""
    found = []
    for segment in sorted((store / "orders" / "segments").glob("*.remus"), key=lambda path: path.name.split("-")[1]):
        restorer = Restorer()
        restorer.feed(segment.read_bytes())
        restorer.feed_eof()
        for one in restorer.checkpoints():
            assert one.record is not None
            found.append((one.epoch, one.record.digest, str(one.record.before)))
    return found


def checkpoints(address: Any, count: int, value: int, **how: Any) -> None:
    array = np.full((16, 512), value, dtype=np.int64)
    protection = protect({"a": array}, to=address, name="orders", **how)
    for number in range(count):
        array[number] += 1
        protection.checkpoint(wait=True, timeout_s=LONG_S)
    protection.close()


def test_a_history_goes_on_from_an_older_backup_to_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(standby, "choose_digest", lambda hello: None)  # its welcome names none
        with backup_in(tmp_path / "store") as backup:
            checkpoints(backup.addresses[0], 3, 1)
    assert [digest for _, digest, _ in written(tmp_path / "store")] == ["sha256"] * 3
    with backup_in(tmp_path / "store") as backup:
        checkpoints(backup.addresses[0], 3, 2)
    found = written(tmp_path / "store")
    assert [(epoch, digest) for epoch, digest, _ in found] == [(n, "sha256" if n < 3 else "blake3") for n in range(6)]
    history = Store(tmp_path / "store").history("orders")
    entries = history.entries()
    assert [one.epoch for one in entries] == list(range(6))
    assert [before for _, _, before in found[1:]] == [str(one.position) for one in entries[:-1]]
    assert history.verify().bad == ()
    for epoch, value in ((2, 1), (5, 2)):
        memory = history.restore(epoch).image.view(np.int64)
        assert memory[: 3 * 512 : 512].tolist() == [value + 1] * 3


def test_a_primary_may_be_told_to_stay_with_sha256(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        checkpoints(backup.addresses[0], 2, 1, digest="sha256")
    assert [digest for _, digest, _ in written(tmp_path / "store")] == ["sha256"] * 2
