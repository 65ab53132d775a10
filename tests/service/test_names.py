"""A backup with many names, one of whose stores is bad, or lies on a disk that hangs."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limited import limit
from store_support import fill
from test_service import ANY, LONG_S, Memory, backup_in, entries, restored, until
from test_standby import of

from remus_ckpt.errors import LinkError, NoCheckpoint, Refused, RemusError, StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.store import Store


@pytest.mark.parametrize("where", ["looking", "opening"])
def test_a_disk_that_hangs_as_a_backup_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The other names are served, and it is said what is missing; once the disk goes on, so is that one."""
    for name in ("bad", "orders"):
        with Store(tmp_path / "store").writer(name) as writer:
            fill(writer, 2)
    (tmp_path / "store" / "nothing").mkdir()
    may_go_on = threading.Event()

    def hanging(real: Callable[..., Any]) -> Callable[..., Any]:
        def hang(self: Store, name: str, **options: Any) -> Any:
            assert name != "bad" or may_go_on.wait(LONG_S)
            return real(self, name, **options)

        return hang

    limit(monkeypatch, open_s=0.5)
    method = {"looking": "may_hold", "opening": "writer"}[where]
    monkeypatch.setattr(Store, method, hanging(getattr(Store, method)))
    try:
        with backup_in(tmp_path / "store") as backup:
            with Memory(backup.addresses[0]) as memory:
                memory.step(1)
                assert of(backup)["epoch"] == 2
            assert backup.status()["names"].keys() == {"bad", "orders"}
            assert (of(backup, "bad")["role"], of(backup, "bad")["epoch"]) == ("opening", None)
            assert "hangs" in of(backup, "bad")["trouble"]
            assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 0
            with pytest.raises(StoreError):
                backup.failover("bad")
            with protect({"a": np.zeros(9)}, to=backup.addresses[0], name="bad", connect_timeout_s=0) as protection:
                with pytest.raises(RemusError):
                    protection.checkpoint(timeout_s=0.7)
                may_go_on.set()
                until(lambda: of(backup, "bad")["role"] == "standby")
                assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 1
                assert protection.checkpoint(timeout_s=LONG_S) == 2
    finally:
        may_go_on.set()


def test_stores_that_are_slow_together_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is opened in time, and all of them in more."""
    for number in range(9):
        Store(tmp_path).writer(f"name-{number}").close()
    writer = Store.writer
    limit(monkeypatch, open_s=1.0, most_opened=4)
    monkeypatch.setattr(Store, "writer", lambda *given, **options: time.sleep(0.4) or writer(*given, **options))
    with Backup(tmp_path, [ANY]) as backup:
        assert {found["role"] for found in backup.status()["names"].values()} == {"standby"}


def test_a_backup_that_ends_while_a_store_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for a disk that hangs, and what is then opened is let go of."""
    Store(tmp_path).writer("orders").close()
    may_go_on, real = threading.Event(), Store.writer
    with monkeypatch.context() as patched:
        limit(patched, open_s=0.1)
        patched.setattr(Store, "writer", lambda *given, **options: may_go_on.wait(LONG_S) and real(*given, **options))
        begin = time.monotonic()
        Backup(tmp_path, [ANY]).close()
        assert time.monotonic() - begin < LONG_S / 2
        may_go_on.set()
        until(lambda: not any(thread.name.startswith("opening") for thread in threading.enumerate()))
    Store(tmp_path).writer("orders").close()


def spoil_json(folder: Path) -> None:
    (folder / "store.json").write_text("{")


def spoil_kind(folder: Path) -> None:
    (folder / "segments").rename(folder / "elsewhere")
    (folder / "segments").write_text("a file")


def spoil_number(folder: Path) -> None:
    text = (folder / "store.json").read_text()
    (folder / "store.json").write_text(text.replace('"term": 0', '"term": -1'))


def spoil_with_a_pipe(folder: Path) -> None:
    (folder / "store.json").unlink()
    os.mkfifo(folder / "store.json", 0o600)


def raise_overflow(folder: Path) -> None:
    (folder / "overflow").touch()


@pytest.mark.parametrize("spoil", [spoil_json, spoil_kind, spoil_number, spoil_with_a_pipe, raise_overflow])
def test_a_store_that_cannot_be_opened_is_no_fault_of_the_others(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    for name in ("bad", "orders"):
        with Store(store).writer(name) as writer:
            fill(writer, 2)
    keep = tmp_path / "keep"
    shutil.copytree(store / "bad", keep)
    spoil(store / "bad")
    real = Store.writer

    def writer_of(self: Store, name: str, **options: Any) -> Any:
        if (store / name / "overflow").exists():
            raise OverflowError("int too big to convert")
        return real(self, name, **options)

    monkeypatch.setattr(Store, "writer", writer_of)
    with backup_in(store) as backup:
        assert of(backup)["epoch"] == 1
        found = ask(connect(Address.parse(backup.addresses[0])), "status", {})["names"]["bad"]
        assert "cannot be opened" in found["trouble"]
        assert (found["role"], found["epoch"]) == ("unknown", None)
        with pytest.raises(RemusError) as caught:
            backup.failover("bad")
        assert not isinstance(caught.value, NoCheckpoint)
        with pytest.raises(RemusError):
            ask(connect(Address.parse(backup.addresses[0])), "failover", {"name": "bad"})
        assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 0
        assert backup.metrics.registry.get_sample_value("remus_store_errors_total", {"name": "bad"}) >= 1
        assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "orders"}) == 1
        guest = np.zeros(4096, dtype=np.uint8)
        protection = protect({"a": guest}, to=backup.addresses[0], name="bad", connect_timeout_s=0)

        def is_refused() -> bool:
            try:
                protection.checkpoint(wait=True, timeout_s=0.3)
            except LinkError as error:  # it may not have come so far in that time
                return isinstance(error, Refused) and error.code == "store"
            return False

        until(is_refused)
        shutil.rmtree(store / "bad")
        keep.rename(store / "bad")
        until(lambda: of(backup, "bad")["epoch"] == 1)  # nobody has to start the backup anew
        assert of(backup, "bad")["trouble"] is None
        assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 1
        assert protection.checkpoint(wait=True, timeout_s=LONG_S) == 2
        protection.close()


def warm_copy(store: Path) -> Path:
    (image,) = (store / "orders" / "warm").glob("memory-*.image")
    return image


def test_a_warm_copy_that_somebody_has_cut(tmp_path: Path) -> None:
    """To apply a checkpoint to what is not there would end the backup for all."""
    with backup_in(tmp_path / "store", warm="disk") as backup, Memory(backup.addresses[0], wait="applied") as memory:
        memory.step(1)
        memory.step(2)
        os.truncate(warm_copy(tmp_path / "store"), 0)
        memory.step(1)
        memory.step(3)
        assert of(backup)["warnings"] == []
        backup.close()
    assert np.array_equal(restored(tmp_path / "store"), memory.array)
    assert [entry.epoch for entry in entries(tmp_path / "store")] == [0, 1, 2, 3]


def test_a_warm_copy_that_was_cut_is_not_handed_out(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store", warm="disk") as backup:
        with Memory(backup.addresses[0], wait="applied") as memory:
            memory.step(1)
        os.truncate(warm_copy(tmp_path / "store"), 4096)
        with suppress(RemusError):  # the store is being opened anew
            backup.failover("orders")

        def image() -> bytes:
            with suppress(RemusError):
                return Path(backup.failover("orders")["image"]).read_bytes()
            return b""

        until(lambda: image()[: memory.array.nbytes] == memory.array.tobytes())
