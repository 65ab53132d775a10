"""Names that are moved about at random, by drains, restarts and dying brokers: nothing acknowledged is ever missing."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, until

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import LogError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.member import id_of
from remus_ckpt.fleet.opening import OpenedLog
from remus_ckpt.fleet.placing import Place
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import Protection, protect
from remus_ckpt.service.release import Committed
from remus_ckpt.store import Store

pytestmark = pytest.mark.brokers

NAMES = [f"moved-{number}" for number in range(3)]


class Scene:
    """Three backups, which may be started again, and three names."""

    def __init__(self, brokers: Brokers, folder: Path, stack: ExitStack, log_url: str | None) -> None:
        self.brokers = brokers
        self.log_url = log_url
        self.fleet = Fleet(brokers.url)
        stack.callback(self.fleet.close)
        self.stores = [folder / f"store-{number}" for number in range(3)]
        self.backups = [self._backup(store) for store in self.stores]
        stack.callback(lambda: [backup.close() for backup in self.backups])
        self.ids = [id_of(store) for store in self.stores]
        until(lambda: set(self.ids) <= set(self.patiently(self.fleet.backups)))
        self.told: dict[str, list[Committed]] = {name: [] for name in NAMES}
        self.arrays: dict[str, tuple[Any, threading.Lock, Protection]] = {}
        for name in NAMES:
            array, lock = np.zeros(4096, dtype=np.int64), threading.Lock()
            protection = protect(
                {"array": array}, to=brokers.url, name=name, interval_s=0.02, lock=lock,
                on_commit=self.told[name].append, connect_timeout_s=LONG_S, log_url=log_url,
            )  # fmt: skip
            stack.callback(protection.close)
            self.arrays[name] = array, lock, protection

    def _backup(self, store: Path) -> Backup:
        log = None if self.log_url is None else OpenedLog(self.log_url)
        policy = Policy(commit_log=log)
        backup = Backup(store, ["tcp://127.0.0.1:0"], fleet=self.brokers.url, policy=policy, warm="disk")
        backup.__enter__()
        return backup

    def restart(self, number: int) -> None:
        """Close a backup, and start it again at another address."""
        self.backups[number].close()
        self.backups[number] = self._backup(self.stores[number])

    def leave(self, number: int | None) -> None:
        """Have that one left, and no other."""
        for other, id in enumerate(self.ids):
            self.patiently(lambda id=id, other=other: self.fleet.set_leaving(id, other == number))

    def patiently(self, work: Any) -> Any:
        """What the brokers are asked, until they answer."""
        deadline = time.monotonic() + LONG_S
        while True:
            try:
                return work()
            except LogError:
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def write(self) -> None:
        for array, lock, _ in self.arrays.values():
            with lock:
                array[np.random.randint(0, len(array), 20)] += 1

    def check(self) -> None:
        """Each name is committed on, and what was acknowledged last is with the backup that has it."""
        self.write()
        before = {name: len(told) for name, told in self.told.items()}
        until(lambda: all(len(told) > before[name] + 2 for name, told in self.told.items()))
        for name, told in self.told.items():
            epochs = [one.epoch for one in told]
            assert epochs == sorted(set(epochs))
            newest = told[-1]
            place: Place = self.patiently(lambda name=name: self.fleet.place(name)[0])
            store = self.stores[self.ids.index(place.backup)]
            assert Store(store).history(name).find(newest.epoch).position == newest.position


@pytest.mark.parametrize("has_log", [False, True])
def test_nothing_acknowledged_is_missing(brokers: Brokers, tmp_path: Path, has_log: bool) -> None:
    chance = random.Random(4)
    with ExitStack() as stack:
        scene = Scene(brokers, tmp_path, stack, brokers.url if has_log else None)
        scene.check()
        for _ in range(6):
            scene.write()
            match chance.randrange(4):
                case 0 | 1:
                    scene.leave(chance.randrange(3))
                case 2:
                    scene.restart(chance.randrange(3))
                case 3:
                    broker = chance.randrange(3)
                    brokers.kill(broker)
                    time.sleep(1.0)
                    brokers.start(broker)
            time.sleep(chance.uniform(0.0, 3.0))
            scene.check()
        scene.leave(None)
        for name, (array, _, protection) in scene.arrays.items():
            protection.close()
            place = scene.patiently(lambda name=name: scene.fleet.place(name)[0])
            store = scene.stores[scene.ids.index(place.backup)]
            assert (Store(store).history(name)[-1].arrays()["array"] == array).all()
            scene.patiently(lambda name=name: scene.fleet.forget(name))
