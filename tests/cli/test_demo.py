"""The demo, and that it would notice if it were wrong."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remus_ckpt import demo
from remus_ckpt.demo import fleet, ledger
from remus_ckpt.demo.fleet import run_fleet_demo
from remus_ckpt.demo.ledger import Ledger
from remus_ckpt.errors import RemusError
from remus_ckpt.store import Store


@pytest.mark.kill
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    made: list[str] = []  # others may run the demo too
    real = tempfile.mkdtemp

    def mkdtemp(*arguments: Any) -> str:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    for seconds in (1.0, 5.0, 25.0):  # a busy machine needs longer for as many checkpoints
        folder = tmp_path / f"{seconds:g}s"
        lines.clear()
        report = demo.run_demo(seconds=seconds, interval_s=0.01, directory=folder, seed=7, say=lines.append)
        if report["proved"] > 10:
            break
    assert report["proved"] > 10
    assert report["checkpoints"] >= report["proved"] > report["committed"]
    assert report["continued_to"] > report["restored_transfers"] > 100
    assert len(lines) >= 8
    assert len(made) >= 2 and not any(map(os.path.exists, made))
    assert not Path(f"/proc/{report['survivor']}/cwd").exists()
    store = folder / "store"
    assert Store(store).history("ledger").state.role == "promoted"
    # It would notice: a checkpoint that is not what was there, and one that was acknowledged and is not there.
    witness = {
        entry.epoch: hashlib.sha256(Store(store).history("ledger").restore(entry.epoch).memory.data).hexdigest()
        for entry in Store(store).history("ledger").entries()[:1]
    }
    with pytest.raises(RemusError):
        demo.prove(store, {0: "00" * 32}, 0, lambda _: None)
    with pytest.raises(RemusError):
        demo.prove(store, witness, 10**6, lambda _: None)


def made(transfers: int) -> tuple[bytearray, Ledger]:
    data = bytearray(ledger.BYTES)
    book = Ledger(data)
    book.create(5)
    for _ in range(transfers):
        book.transfer()
    return data, book


def test_a_ledger_is_right_after_any_number_of_transfers() -> None:
    _, book = made(0)
    assert book.faults() == []
    for _ in range(100):
        book.transfer()
        assert book.transfers % 20 or book.faults() == []


def test_a_wrong_ledger_is_found() -> None:
    data, book = made(50)
    assert book.faults() == []
    words = memoryview(data).cast("q")
    words[ledger.ACCOUNTS_AT + 4 * 17] += 1
    assert book.faults()
    words[ledger.ACCOUNTS_AT + 4 * 17] -= 1
    words[ledger.JOURNAL_AT + 4 * 20 + 3] += 1
    assert book.faults()


def test_an_intent_finishes_a_transfer_from_any_store_on() -> None:
    data, book = made(30)
    before = bytes(data)
    book.transfer()
    after = bytes(data)
    words = memoryview(bytearray(after)).cast("q")
    stores = [
        (words[ledger.STORES_AT + 2 * i], words[ledger.STORES_AT + 2 * i + 1]) for i in range(words[ledger.COUNT_AT])
    ]
    for done in range(len(stores) + 1):
        torn = bytearray(before)
        torn_words = memoryview(torn).cast("q")
        intent = slice(ledger.INTENT_AT, ledger.STORES_AT + 2 * len(stores))
        torn_words[intent] = words[intent]
        torn_words[ledger.ACTIVE_AT] = 31
        for at, value in stores[:done]:
            torn_words[at] = value
        found = Ledger(torn)
        assert found.in_transfer
        assert bool(found.faults()) == (done < len(stores)) or done == 0
        assert found.recover()
        assert found.faults() == []
        assert found.transfers == 31


@pytest.mark.brokers
def test_the_demo_of_a_fleet() -> None:
    lines: list[str] = []
    report = run_fleet_demo(seconds=1.0, interval="100ms", names=3, seed=7, say=lines.append)
    assert report["moved_s"] and report["all_protected_s"] == max(report["moved_s"].values())
    assert report["all_protected_s"] < 60
    assert report["commits"] > 30
    assert len(lines) >= 8


def test_the_demo_of_a_fleet_would_notice() -> None:
    cells = np.zeros(fleet.CELLS, dtype=np.int64)
    assert fleet.fault_of(cells) is None
    for rounds in (1, 5, fleet.CELLS, 3):
        fleet.count_on(cells, rounds)
        assert fleet.fault_of(cells) is None
    cells[7] -= 1
    assert fleet.fault_of(cells) is not None
    cells[:] = 0
    cells[1], cells[9] = 1, 3
    assert fleet.fault_of(cells) is not None
