"""Names of a fleet whose commits are in the log: the log decides who goes on, the fleet where a primary looks."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, command, until
from support import Command

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import Fenced, LogError, RemusError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.member import id_of
from remus_ckpt.fleet.opening import OpenedLog
from remus_ckpt.fleet.placing import RENEW_S, Place
from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import primary_of
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.store import Store

pytestmark = pytest.mark.brokers

_numbers = itertools.count()


class Site:
    """Backups that have the log and are in the fleet, and primaries of one name."""

    def __init__(self, folder: Path, brokers: Brokers) -> None:
        self.folder, self.brokers = folder, brokers
        self.name = f"logged.{next(_numbers)}"
        self.log = OpenedLog(brokers.url)
        self.fleet = Fleet(brokers.url)
        self.released: list[int] = []
        self._primaries: list[Primary] = []
        self.array = np.zeros(1 << 14, dtype=np.uint8)

    @contextmanager
    def backup(self, store: str, **policy: Any) -> Iterator[Backup]:
        settings = Policy(**({"lease_s": 1.0, "commit_log": self.log} | policy))
        path = self.folder / store
        with Backup(path, ["tcp://127.0.0.1:0"], fleet=self.brokers.url, policy=settings, warm="disk") as backup:
            until(lambda: self.is_known(store))
            try:
                yield backup
            finally:
                self.withdraw(store)

    def withdraw(self, store: str) -> None:
        """End the lease of a backup that has ended: other tests would find it alive."""

        def is_done() -> bool:
            try:
                found = self.fleet.backups().get(self.id_of(store))
                if found is not None:
                    self.fleet.withdraw(found)
            except LogError:
                return False
            return True

        until(is_done)

    def is_known(self, store: str) -> bool:
        try:
            return self.id_of(store) in self.fleet.backups()
        except LogError:
            return False

    def id_of(self, store: str) -> str:
        return id_of(self.folder / store)

    def protect(self, **options: Any) -> Primary:
        primary = primary_of(
            OwnMemory({"array": self.array}),
            self.name,
            self.brokers.url,
            commit_log=self.log,
            on_commit=lambda committed: self.released.append(committed.epoch),
            **options,
        )
        self._primaries.append(primary)
        primary.connect(LONG_S)
        return primary

    def role(self, backup: Backup) -> str | None:
        found = backup.status()["names"].get(self.name)
        return None if found is None else found["role"]

    def place(self) -> Place:
        found = self.fleet.place(self.name)[0]
        assert found is not None
        return found

    def last(self) -> Record:
        entry = self.log.last(self.name)
        assert entry is not None
        return Record.unpack(entry.data)

    def close(self) -> None:
        for primary in self._primaries:
            primary.close(0.0)  # it has a lease
        self.fleet.forget(self.name)
        self.fleet.close()
        self.log.close()


@pytest.fixture
def site(tmp_path: Path, brokers: Brokers) -> Iterator[Site]:
    made = Site(tmp_path, brokers)
    yield made
    made.close()


def test_a_silent_primary_is_taken_over_in_both(site: Site) -> None:
    with site.backup("a", automatic=True) as backup:
        primary = site.protect()
        primary.checkpoint(wait=True)
        assert site.place().backup == site.id_of("a")
        assert site.last().position == primary.committed
        primary.hang_up()  # its host is gone: no goodbye, and no link any more
        until(lambda: site.role(backup) == "promoted")
        record, place = site.last(), site.place()
        assert record.kind is Kind.TAKEOVER
        assert (place.backup, place.is_taken_over, place.term) == (site.id_of("a"), True, record.term)
        with pytest.raises(Fenced):
            primary.checkpoint(wait=True)
    # Its survivor goes to another backup, and its commits follow in the log.
    with site.backup("b") as other:
        survivor = site.protect(term=record.term)
        survivor.checkpoint(wait=True)
        assert (site.last().kind, site.last().term) == (Kind.COMMIT, record.term)
        assert site.place().backup == site.id_of("b")
        assert site.role(other) == "standby"


def test_a_name_that_moves_is_logged_on_and_taken_over_where_it_went(site: Site) -> None:
    with site.backup("a", automatic=True) as old, ExitStack() as stack:
        primary = site.protect()
        primary.checkpoint(wait=True)
        new = stack.enter_context(site.backup("b", automatic=True))
        site.fleet.set_leaving(site.id_of("a"), True)
        stack.callback(site.fleet.set_leaving, site.id_of("a"), False)

        def has_moved() -> bool:
            site.array[0] += 1
            primary.checkpoint(wait=True, timeout_s=LONG_S)
            return site.place().backup == site.id_of("b")

        until(has_moved)
        assert site.released == list(range(len(site.released)))
        assert site.last().position == primary.committed
        primary.checkpoint(wait=True)  # which ends the old link
        until(lambda: site.role(old) is None)  # it has let go
        primary.hang_up()
        until(lambda: site.role(new) == "promoted")
        assert site.last().kind is Kind.TAKEOVER
        assert [entry.epoch for entry in Store(site.folder / "b").history(site.name).checkpoints()][-1] == (
            site.last().position.epoch
        )


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_primary_that_dies_in_a_move_is_taken_over_where_its_last_commit_is(site: Site, by_hand: bool) -> None:
    """It has written where it goes, and died before the log had its first commit there: nobody else may go on."""
    with site.backup("a", automatic=not by_hand) as backup:
        primary = site.protect()
        epoch = primary.checkpoint(wait=True)
        primary.hang_up()
        elsewhere = Place(site.name, "elsewhere", "tcp://127.0.0.1:1", 0)
        site.fleet.put(elsewhere, site.fleet.place(site.name)[1])
        if by_hand:
            time.sleep(1.5 * RENEW_S)  # it does not let go of it
            assert backup.failover(site.name)["epoch"] == epoch
        until(lambda: site.role(backup) == "promoted")
        place = site.place()
        assert (place.backup, place.is_taken_over, place.term) == (site.id_of("a"), True, site.last().term)


def test_a_backup_that_was_left_lets_go_and_is_denied(site: Site) -> None:
    with site.backup("a", automatic=True) as old:
        primary = site.protect()
        primary.checkpoint(wait=True)
        primary.hang_up()
        # Its memory is protected elsewhere before the lease is over: a place, and a commit.
        site.fleet.put(Place(site.name, "b", "tcp://127.0.0.1:1", 0), site.fleet.place(site.name)[1])
        entry = site.log.last(site.name)
        assert entry is not None
        last = Record.unpack(entry.data)
        position = type(last.position)(last.position.epoch + 1, bytes(32))
        record = Record(Kind.COMMIT, 0, bytes(16), position, "b")
        site.log.append(site.name, record.pack(), expected=entry.sequence, key="elsewhere")
        until(lambda: site.role(old) is None)
        assert site.last() == record
        with pytest.raises(RemusError):
            old.failover(site.name)


def test_a_backup_of_a_fleet_with_a_log_as_users_start_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    remus = Command(monkeypatch, capfdbinary)
    url = site.brokers.url
    options = ["--listen", "tcp://127.0.0.1:0", "--store", site.folder / "a", "--fleet", url, "--log", url]
    log = site.folder / "backup.log"
    with command("backup", *options, "--lease", "1s", "--auto-failover", "--warm", "disk", log=log) as process:
        assert process.stdout is not None
        process.stdout.readline()
        until(lambda: site.is_known("a"))
        primary = site.protect()
        primary.checkpoint(wait=True)
        until(lambda: remus("fleet", "status", url).code == 0)
        primary.hang_up()

        def state() -> str:
            ran = remus("fleet", "status", url, "--json")
            names = json.loads(ran.out)["names"] if ran.out else []  # the brokers are slow
            return str(next((one["state"] for one in names if one["name"] == site.name), None))

        until(lambda: state() == "taken over")
        assert site.last().kind is Kind.TAKEOVER
    site.withdraw("a")
