"""Guests whose commits are in the log, and that find their backup by name: `run --log`, `run --to nats://…/NAME`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import guests
import pytest
from services import LONG_S, until

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import LogError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.member import id_of
from remus_ckpt.fleet.opening import OpenedLog
from remus_ckpt.fleet.placing import Place
from remus_ckpt.fleet.records import Kind, Record

pytestmark = [pytest.mark.qemu, pytest.mark.brokers]
NAME = "web"
LEASE = ("--lease", "1s", "--auto-failover")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.build(tmp_path_factory.mktemp("guest"))


class Site:
    """What the brokers know of the guest."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._log = OpenedLog(url)
        self.fleet = Fleet(url)

    def records(self) -> list[Record]:
        return [Record.unpack(entry.data) for entry in self._log.read(NAME)]

    def place(self) -> Place | None:
        """None too while the brokers are slow."""
        try:
            return self.fleet.place(NAME)[0]
        except LogError:
            return None

    def is_at(self, served: guests.Backup) -> bool:
        place = self.place()
        return place is not None and place.backup == id_of(served.folder / "store")

    def is_member(self, served: guests.Backup) -> bool:
        try:
            return id_of(served.folder / "store") in self.fleet.backups()
        except LogError:
            return False

    def close(self) -> None:
        self.fleet.close()
        self._log.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """Brokers of its own: all guests have the same name."""
    with Brokers() as brokers:
        brokers.make_log()
        made = Site(brokers.url)
        yield made
        made.close()


def goes_on(served: guests.Backup) -> None:
    until(lambda: served.status().get("vm") == "running")
    with served.console() as console:
        console.counts_on(10)


def test_a_guest_is_taken_over_by_its_record_in_the_log(tmp_path: Path, image: Path, site: Site) -> None:
    log = ("--log", site.url)
    with (
        guests.backup(tmp_path, *LEASE, *log) as served,
        guests.running(tmp_path, served.address, image, *log) as primary,
    ):
        guests.wait_committed(served)
        assert {record.kind for record in site.records()} == {Kind.COMMIT}
        os.kill(primary.process.pid, signal.SIGKILL)
        goes_on(served)
        last = site.records()[-1]
        assert (last.kind, last.term) == (Kind.TAKEOVER, served.status()["term"])


def test_a_guest_that_was_frozen_is_ended_by_the_log(tmp_path: Path, image: Path, site: Site) -> None:
    """Its survivor goes on meanwhile; its backup is gone by the time it wakes up."""
    log = ("--log", site.url)
    with ExitStack() as stack:
        served = stack.enter_context(guests.backup(tmp_path, *LEASE, *log, keeps=True))
        primary = stack.enter_context(guests.running(tmp_path, served.address, image, *log))
        guests.wait_committed(served)
        qemu = primary.qemu
        for pid in (primary.process.pid, qemu):
            os.kill(pid, signal.SIGSTOP)
        goes_on(served)
        served.process.kill()
        served.process.wait()
        stack.callback(guests.end_guests, tmp_path)
        for pid in (qemu, primary.process.pid):
            os.kill(pid, signal.SIGCONT)
        primary.console.ends()
        assert primary.process.wait(LONG_S) == 22


def test_a_guest_finds_a_backup_by_its_name_and_another_when_that_dies(tmp_path: Path, image: Path, site: Site) -> None:
    log = ("--log", site.url)
    folders = [tmp_path / letter for letter in "ab"]
    with ExitStack() as stack:
        both = []
        for folder in folders:
            folder.mkdir()
            member = ("--fleet", site.url, *LEASE, *log)
            both.append(stack.enter_context(guests.backup(folder, *member)))
        until(lambda: all(map(site.is_member, both)))
        primary = stack.enter_context(guests.running(tmp_path, f"{site.url}/{NAME}", image, *log))
        until(lambda: any(map(site.is_at, both)))
        first, second = both if site.is_at(both[0]) else both[::-1]
        guests.wait_committed(first)
        first.process.kill()
        until(lambda: not site.is_member(first))
        guests.wait_committed(second)
        until(lambda: site.is_at(second))
        os.kill(primary.process.pid, signal.SIGKILL)
        goes_on(second)
        term = site.records()[-1].term
        until(lambda: (place := site.place()) is not None and (place.is_taken_over, place.term) == (True, term))
