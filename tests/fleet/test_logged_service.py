"""Primaries and backups that use a commit log, as Python users start them, on real brokers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, until

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import Fenced, LinkError, Refused, RemusError
from remus_ckpt.fleet.claims import Claims
from remus_ckpt.fleet.opening import OpenedLog
from remus_ckpt.fleet.records import Kind, Record
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import primary_of, protect
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.store import Store

pytestmark = pytest.mark.brokers

LEASE_S = 1.0
_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    return f"s{next(_numbers)}"


@pytest.fixture
def log(brokers: Brokers) -> Iterator[OpenedLog]:
    opened = OpenedLog(brokers.url)
    yield opened
    opened.close()


def asked(backup: Backup, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return ask(connect(Address.parse(backup.addresses[0])), method, arguments)


class Site:
    """Backups that end with the test, and primaries of one array."""

    def __init__(self, folder: Path, brokers: Brokers, log: OpenedLog, name: str) -> None:
        self.folder, self.url, self.log, self.name = folder, brokers.url, log, name
        self.released: list[int] = []
        self.fenced: list[int] = []

    @contextmanager
    def backup(self, store: str = "store", *, has_log: bool = True, **policy: Any) -> Iterator[Backup]:
        log = self.log if has_log else None
        settings = Policy(**({"lease_s": LEASE_S, "commit_log": log} | policy))
        with Backup(self.folder / store, ["tcp://127.0.0.1:0"], policy=settings) as backup:
            yield backup

    def protect(
        self, backup: Backup, *, has_log: bool = True, connect_timeout_s: float = 10.0, term: int | None = None
    ) -> tuple[Primary, np.ndarray]:
        array = np.zeros(1 << 14, dtype=np.uint8)
        primary = primary_of(
            OwnMemory({"array": array}),
            self.name,
            backup.addresses[0],
            term=term,
            commit_log=self.log if has_log else None,
            on_commit=lambda committed: self.released.append(committed.epoch),
            on_fenced=lambda error: self.fenced.append(error.term),
        )
        try:
            primary.connect(connect_timeout_s)
        except BaseException:
            primary.close(0.0)
            raise
        return primary, array

    def records(self) -> list[Record]:
        return [Record.unpack(entry.data) for entry in self.log.read(self.name)]

    def status(self, backup: Backup) -> dict[str, Any]:
        found: dict[str, Any] = asked(backup, "status", {})["names"][self.name]
        return found

    def fail_over(self, backup: Backup) -> dict[str, Any]:
        return asked(backup, "failover", {"name": self.name})


@pytest.fixture
def site(tmp_path: Path, brokers: Brokers, log: OpenedLog, name: str) -> Site:
    return Site(tmp_path, brokers, log, name)


def test_what_is_released_is_in_the_log(site: Site) -> None:
    with site.backup() as backup:
        protection, array = site.protect(backup)
        for number in range(5):
            array[number] = 1
            epoch = protection.checkpoint(wait=True)
            record = site.records()[-1]
            assert (record.kind, record.term, record.position.epoch) == (Kind.COMMIT, 0, epoch)
            assert record.position == protection.committed
            assert backup.addresses[0] in record.where
        until(lambda: len(site.released) == 5)
        protection.close()


def test_without_a_majority_nothing_is_committed_and_all_goes_on_after(site: Site, brokers: Brokers) -> None:
    with site.backup() as backup:
        protection, array = site.protect(backup)
        first = protection.checkpoint(wait=True)
        brokers.kill(0)
        brokers.kill(1)
        try:
            array[0] = 1
            with pytest.raises(LinkError):
                protection.checkpoint(wait=True, timeout_s=2.0)
            until(lambda: site.status(backup)["epoch"] > first)  # the backup has it
            assert site.released == [first]
        finally:
            brokers.start(0)
            brokers.start(1)
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        until(lambda: len(site.released) >= 2)
        assert site.released == sorted(set(site.released))
        protection.close()


def test_arrays_are_protected_with_a_log(site: Site) -> None:
    array = np.zeros(1 << 14, dtype=np.uint8)
    with site.backup() as backup:
        address = backup.addresses[0]
        with protect({"array": array}, to=address, name=site.name, log_url=site.url) as protection:
            epoch = protection.checkpoint(wait=True)
            assert site.records()[-1].position.epoch == epoch
            assert protection.status()["log_append_s"] > 0
            assert protection.status()["log_trouble"] is None


def test_a_takeover_by_hand_is_in_the_log_and_ends_the_primary(site: Site) -> None:
    with site.backup() as backup:
        protection, _ = site.protect(backup)
        protection.checkpoint(wait=True)
        given = site.fail_over(backup)
        record = site.records()[-1]
        assert (record.kind, record.term) == (Kind.TAKEOVER, given["term"])
        with pytest.raises(Fenced):
            protection.checkpoint(wait=True)
        assert site.fenced == [given["term"]]


def test_a_silent_primary_is_taken_over_without_a_fence(site: Site) -> None:
    with site.backup(automatic=True) as backup:
        protection, _ = site.protect(backup)
        protection.checkpoint(wait=True)
        protection.hang_up()  # its host is gone: no goodbye, and no link any more
        until(lambda: site.status(backup)["role"] == "promoted")
        assert site.records()[-1].kind is Kind.TAKEOVER


def test_the_survivor_is_protected_under_a_higher_term(site: Site) -> None:
    with site.backup(automatic=True) as backup:
        protection, _ = site.protect(backup)
        protection.checkpoint(wait=True)
        protection.hang_up()  # its host is gone: no goodbye, and no link any more
        until(lambda: site.status(backup)["role"] == "promoted")
        term = site.status(backup)["term"]
        survivor, _ = site.protect(backup, term=term + 1)
        survivor.checkpoint(wait=True)
        assert (site.records()[-1].kind, site.records()[-1].term) == (Kind.COMMIT, term + 1)
        survivor.close()


def test_the_survivor_is_protected_elsewhere_under_the_term_of_the_takeover(site: Site) -> None:
    with site.backup("one", automatic=True) as one, site.backup("two") as two:
        protection, _ = site.protect(one)
        protection.checkpoint(wait=True)
        protection.hang_up()  # its host is gone: no goodbye, and no link any more
        until(lambda: site.status(one)["role"] == "promoted")
        term = site.status(one)["term"]
        survivor, _ = site.protect(two, term=term)
        survivor.checkpoint(wait=True)
        assert (site.records()[-1].kind, site.records()[-1].term) == (Kind.COMMIT, term)
        with pytest.raises(Fenced):
            protection.checkpoint(wait=True)
        survivor.close()


def test_a_backup_that_lacks_the_last_commit_does_not_take_over(site: Site) -> None:
    with site.backup("one", automatic=True) as one, site.backup("two", automatic=True) as two:
        protection, _ = site.protect(one)
        protection.checkpoint(wait=True)
        protection.hang_up()  # its host is gone: no goodbye, and no link any more
        # Its memory is protected elsewhere before the first backup's lease is over.
        other, array = site.protect(two)
        array[0] = 7
        epoch = other.checkpoint(wait=True)
        until(lambda: "the last commit is epoch" in (site.status(one)["trouble"] or ""))
        assert site.status(one)["role"] == "standby"
        with pytest.raises(RemusError, match="the last commit is epoch"):
            site.fail_over(one)
        assert other.checkpoint(wait=True) > epoch
        other.close()


def test_the_one_that_the_log_denies_is_fenced_while_its_backup_still_answers(site: Site) -> None:
    """Two primaries of one term at two backups: the second to commit goes on, the first stops by the log alone."""
    with site.backup("one") as one, site.backup("two") as two:
        first, array = site.protect(one)
        first.checkpoint(wait=True)
        second, _ = site.protect(two)
        second.checkpoint(wait=True)
        until(lambda: len(site.released) == 2)
        array[0] = 1
        before = list(site.released)
        with pytest.raises(Fenced):
            first.checkpoint(wait=True)
        assert site.released == before
        assert site.status(one)["role"] == "standby"
        second.close()


def test_a_backup_that_dies_behind_its_record_ends_what_it_began(site: Site) -> None:
    """Killed between the log and the store: the next start finds the takeover, and promotes."""
    with site.backup() as backup:
        protection, _ = site.protect(backup)
        protection.checkpoint(wait=True)
        protection.hang_up()
    with Store(site.folder / "store").writer(site.name) as writer:
        store = Claims.new_store()
        writer.set_state(log_store=store)
        newest = writer.position
        assert newest is not None
        claims = Claims(site.log, site.name, "here")
        claimed = claims.take_over(term=0, store=store, newest=newest, holds=lambda at: at == newest)
    with site.backup() as backup:
        until(lambda: site.status(backup)["role"] == "promoted")
        assert site.status(backup)["term"] == claimed
        assert [record.kind for record in site.records()].count(Kind.TAKEOVER) == 1
        with pytest.raises(Fenced):
            site.protect(backup, term=0)


def test_a_primary_that_does_not_use_the_log_is_refused(site: Site) -> None:
    with site.backup() as backup:
        with pytest.raises(Refused) as caught:
            site.protect(backup, has_log=False, connect_timeout_s=5.0)
        assert caught.value.code == "log"
    with site.backup("other", has_log=False) as backup, pytest.raises(LinkError, match="does not use our commit log"):
        site.protect(backup, connect_timeout_s=5.0)


def test_a_name_that_was_protected_without_the_log_is_not_taken_over_by_itself(site: Site) -> None:
    with site.backup(has_log=False) as backup:
        protection, _ = site.protect(backup, has_log=False)
        protection.checkpoint(wait=True)
        protection.hang_up()  # its host is gone: no goodbye, and no link any more
    with site.backup(automatic=True) as backup:
        time.sleep(3 * LEASE_S)
        assert site.status(backup)["role"] == "standby"
        given = site.fail_over(backup)
        assert site.records()[-1].term == given["term"]


def test_services_start_before_their_brokers(tmp_path: Path, name: str) -> None:
    with Brokers(count=1) as brokers:
        brokers.make_log()
        brokers.kill(0)
        log = OpenedLog(brokers.url)
        site = Site(tmp_path, brokers, log, name)
        with site.backup() as backup:
            with pytest.raises(LinkError):
                site.protect(backup, connect_timeout_s=5.0)
            brokers.start(0)
            protection, _ = site.protect(backup, connect_timeout_s=LONG_S)
            protection.checkpoint(wait=True, timeout_s=LONG_S)
            protection.close()
        log.close()
