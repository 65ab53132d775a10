"""Where a backup keeps its warm copies, and what a takeover gives then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_service import Memory, backup_in, restored, until
from test_standby import of

from remus_ckpt.store import warm
from remus_ckpt.store.room import SHARED_MEMORY


@pytest.mark.parametrize("where", ["memory", "disk", "folder"])
def test_a_takeover_from_each(tmp_path: Path, where: str) -> None:
    store = tmp_path / "store"
    chosen = str(tmp_path / "warm") if where == "folder" else where
    note = tmp_path / "note"
    with backup_in(
        store, warm=chosen, on_failover=f'echo "$REMUS_IMAGE" > {note}.new && mv {note}.new {note}'
    ) as backup:
        with Memory(backup.addresses[0], wait="applied") as memory:
            memory.step(1)
            memory.step(2)
        given = backup.failover("orders")
        image = Path(given["image"])
        folders = {"memory": SHARED_MEMORY, "disk": store / "orders" / "warm", "folder": tmp_path / "warm" / "orders"}
        assert folders[where] in image.parents
        assert image.read_bytes()[: memory.array.nbytes] == memory.array.tobytes()
        until(note.exists)
        assert note.read_text().strip() == str(image)
        assert of(backup)["warm_on_disk"] is None
    assert image.exists(), "the survivor has it"
    with backup_in(store, warm=chosen) as backup:
        assert backup.failover("orders")["image"] == str(image)
    assert np.array_equal(restored(store), memory.array)


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "free_memory", lambda: 0)
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], wait="applied") as memory:
        memory.step(1)
        reason = of(backup)["warm_on_disk"]
        assert "of memory" in reason
        until(lambda: of(backup)["health"]["state"] == "protected")
        assert len(list((tmp_path / "store" / "orders" / "warm").glob("memory-*.image"))) == 1
        command = [sys.executable, "-m", "remus_ckpt", "status", "--from", backup.addresses[0]]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        assert reason in " ".join(ran.stdout.split())
