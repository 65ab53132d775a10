"""`backup --archive` as users start it, and the commands around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import make_keys, service, until

from remus_ckpt import open_store
from remus_ckpt.service.protect import protect

pytest.importorskip("obstore", reason="needs the extra [archive]")


def run(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "remus_ckpt", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_backup_that_lost_its_disk_is_rebuilt(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/archive"
    folder = make_keys(tmp_path / "keys")
    orders = np.zeros(4096 * 8)
    with service(tmp_path, folder, "--archive", url) as served:
        with protect({"orders": orders}, to=served.address, name="orders", tls_dir=folder / "ca" / "primary") as one:
            for number in range(5):
                orders[number] = number
                one.checkpoint(wait=True)
        served.ask("status")
    run("compact", f"store:{tmp_path}/store/orders")
    with service(tmp_path, folder, "--archive", url) as served:
        with protect({"orders": orders}, to=served.address, name="orders", tls_dir=folder / "ca" / "primary") as one:
            one.checkpoint(wait=True)

        def lag() -> Any:
            return served.ask("status")["names"]["orders"]["archive"]

        until(lambda: lag() and lag()["newest"] == 4)
        assert lag() == {"newest": 4, "waiting": 0, "waiting_bytes": 0, "error": None}
    (tmp_path / "store").rename(tmp_path / "lost")  # its indexer may write there for a moment yet
    assert "orders: up to 4" in run("archive", "list", url)
    assert "0 are bad" in run("archive", "verify", url, "orders")
    found = json.loads(run("archive", "fetch", url, "orders", "--store", tmp_path / "new", "--json"))
    assert found["epochs"] == [0, 4]
    assert open_store(tmp_path / "new")["orders"][-1].arrays()["orders"][:5].tolist() == [0, 1, 2, 3, 4]
    assert "exists already" in run("archive", "fetch", url, "orders", "--store", tmp_path / "new", code=1)
    run("archive", "fetch", url, "others", "--store", tmp_path / "new", code=20)


def test_old_segments_go_by_the_rules_of_retention(tmp_path: Path) -> None:
    from store_support import fill

    from remus_ckpt.store import Store

    with Store(tmp_path / "store").writer("orders") as writer:
        source = None
        for _ in range(5):
            source = fill(writer, 4, source)
            writer.compact(wait=True)
    url = f"file://{tmp_path}/archive"
    put = json.loads(run("archive", "push", f"store:{tmp_path}/store/orders", url, "--json"))["put"]
    assert len(put) == 5
    assert json.loads(run("archive", "push", f"store:{tmp_path}/store/orders", url, "--json"))["put"] == []
    removed = json.loads(run("archive", "prune", url, "orders", "--keep-count", "6", "--json"))["removed"]
    assert [one["key"] for one in removed] == [one["key"] for one in put[:-2]]
    left = json.loads(run("archive", "list", url, "orders", "--json"))["names"]["orders"]
    assert [one["key"] for one in left] == [one["key"] for one in put[-2:]]
