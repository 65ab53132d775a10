"""Backups by name, on real brokers: where names go, who may take over, and what is said of it."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, until
from support import Command
from watching import shown, watching

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import Fenced, LinkError, LogError, NoCheckpoint, Overtaken, RemusError
from remus_ckpt.fleet.group import Fleet, make_buckets
from remus_ckpt.fleet.jetstream import Nats
from remus_ckpt.fleet.placing import RENEW_S, Place
from remus_ckpt.fleet.placing import Backup as Standby
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import Protection, protect
from remus_ckpt.service.release import Committed
from remus_ckpt.store import Store

pytestmark = pytest.mark.brokers

_numbers = itertools.count()


@pytest.fixture
def remus(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def name() -> str:
    """One that no other test has, with a dot."""
    return f"orders.{next(_numbers)}"


@pytest.fixture
def fleet(brokers: Brokers) -> Iterator[Fleet]:
    """One without names, though tests of other files share its brokers."""
    found = Fleet(brokers.url)
    until(lambda: _works(found))  # a test before may have killed some
    _empty(found)
    yield found
    _empty(found)
    found.close()


def _empty(fleet: Fleet) -> None:
    for name in fleet.places():
        fleet.forget(name)
    for id in fleet.leaving():
        fleet.set_leaving(id, False)


def _is_alive(fleet: Fleet, id: str) -> bool:
    try:
        return id in fleet.backups()
    except LogError:
        return False


def _works(fleet: Fleet) -> bool:
    try:
        fleet.backups()
        fleet.put(Place("probe", "nowhere", "tcp://127.0.0.1:1", 0), fleet.place("probe")[1])
        fleet.forget("probe")
    except LogError:
        return False
    return True


class Member:
    """A backup of the fleet, in this process."""

    def __init__(self, backup: Backup, id: str, store: Path) -> None:
        self.backup = backup
        self.id = id
        self.store = store

    def keeps(self, name: str) -> bool:
        return name in self.backup.status()["names"]


@pytest.fixture
def start(brokers: Brokers, fleet: Fleet, tmp_path: Path) -> Iterator[Callable[..., Member]]:
    """Starts a backup, and waits until the fleet knows it. All of them end, and are forgotten, with the test."""
    with ExitStack() as stack:

        def start(folder: str = "a", **policy: Any) -> Member:
            backup = Backup(
                tmp_path / folder, ["tcp://127.0.0.1:0"], fleet=brokers.url, policy=Policy(**policy), warm="disk"
            )
            stack.enter_context(backup)
            id = (tmp_path / folder / ".member").read_text().strip()
            until(lambda: _is_alive(fleet, id))
            stack.callback(lambda: [fleet.withdraw(one) for key, one in fleet.backups().items() if key == id])
            stack.callback(backup.close)
            return Member(backup, id, tmp_path / folder)

        yield start


@contextmanager
def protected(brokers: Brokers, name: str, **options: Any) -> Iterator[tuple[Any, Protection]]:
    array = np.zeros(4096)
    with protect({"array": array}, to=brokers.url, name=name, **options) as protection:
        yield array, protection


def restored(store: Path, name: str) -> Any:
    return Store(store).history(name)[-1].arrays()["array"][0]


# Places


def test_of_two_who_have_read_the_same_place_one_may_replace_it(fleet: Fleet, brokers: Brokers, name: str) -> None:
    first = fleet.put(Place(name, "a", "tls://a:1", 0), 0)
    assert fleet.place(name) == (Place(name, "a", "tls://a:1", 0), first)
    second = fleet.put(Place(name, "b", "tls://b:1", 0), first)
    with pytest.raises(Overtaken):
        fleet.put(Place(name, "c", "tls://c:1", 0), first)
    with pytest.raises(Overtaken):
        fleet.put(Place(name, "c", "tls://c:1", 0), 0)
    assert fleet.place(name)[0] == Place(name, "b", "tls://b:1", 0)
    assert fleet.put(Place(name, "b", "tls://b:1", 0), first) == second  # a try whose answer was lost
    fleet.forget(name)
    assert fleet.place(name)[0] is None
    fleet.put(Place(name, "c", "tls://c:1", 0), fleet.place(name)[1])


def test_a_broker_that_is_alone_knows_its_fleet_after_a_restart(tmp_path: Path) -> None:
    with Brokers(tmp_path, count=1) as them:
        admin = Nats(them.url)
        make_buckets(admin, 1)
        admin.close()
        fleet = Fleet(them.url)
        standby = Standby("1" * 32, "host", ("tcp://127.0.0.1:1",), "remus_ckpt", 1, 1 << 30, is_leaving=False)
        fleet.announce(standby)
        them.kill(0)
        them.start(0)
        until(lambda: fleet.backups() == {standby.id: standby})
        fleet.withdraw(standby)
        assert fleet.backups() == {}
        fleet.close()


def test_brokers_that_know_no_fleet(tmp_path: Path) -> None:
    with Brokers(tmp_path, count=1) as bare:
        fleet = Fleet(bare.url)
        with pytest.raises(LogError, match="fleet init"):
            fleet.backups()
        fleet.close()


# Primaries


def test_a_name_is_protected_by_a_backup_that_has_room(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    member = start("a", max_names=1)
    with protected(brokers, name) as (array, protection):
        array[0] = 7
        protection.checkpoint(wait=True)
        assert fleet.place(name)[0] == Place(
            name,
            member.id,
            member.backup.addresses[0],
            0,
            run=fleet.place(name)[0].run,  # type: ignore[union-attr]
        )
    assert restored(member.store, name) == 7


def test_backups_take_names_up_to_their_limits(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    members = [start(folder, max_names=2) for folder in "ab"]
    with ExitStack() as stack:
        for number in range(4):
            _, protection = stack.enter_context(protected(brokers, f"{name}-{number}"))
            protection.checkpoint(wait=True)
        with pytest.raises(LinkError, match=r"takes another name|keeps 2 names already"):
            stack.enter_context(protected(brokers, f"{name}-4", connect_timeout_s=3.0))
        assert sorted(len(member.backup.status()["names"]) for member in members) == [2, 2]


def test_a_primary_that_is_started_again_finds_its_backup(
    brokers: Brokers, start: Callable[..., Member], name: str
) -> None:
    members = [start(folder) for folder in "abc"]
    for number in range(4):
        with protected(brokers, name) as (array, protection):
            array[0] = number
            protection.checkpoint(wait=True)
    assert sum(member.keeps(name) for member in members) == 1


def test_no_backup_is_alive(brokers: Brokers, fleet: Fleet, name: str) -> None:
    with pytest.raises(LinkError, match="alive"):
        protect({"array": np.zeros(8)}, to=brokers.url, name=name, connect_timeout_s=1.0)
    assert fleet.place(name) == (None, 0)


# Moving


def test_a_drained_backup_protects_until_another_has_all(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str, remus: Command
) -> None:
    old = start("a")
    told: list[int] = []

    def on_commit(committed: Committed) -> None:
        told.append(committed.epoch)

    lock = threading.Lock()
    with protected(brokers, name, interval_s=0.02, lock=lock, on_commit=on_commit) as (array, _):
        until(lambda: fleet.place(name)[0] is not None)
        new = start("b")
        began = time.monotonic()
        ran = remus("fleet", "drain", brokers.url, old.id)
        assert ran.code == 0, ran.err
        assert time.monotonic() - began < LONG_S
        found = fleet.place(name)[0]
        assert found is not None and found.backup == new.id
        with lock:
            array[0] = 9
        newest = told[-1]
        until(lambda: told[-1] > newest + 3)
        until(lambda: not old.keeps(name))  # it lets go of it
        with pytest.raises(NoCheckpoint):
            old.backup.failover(name)
    assert told == list(range(len(told)))
    assert restored(new.store, name) == 9
    assert Store(old.store).history(name).restore().epoch > 0  # its files are kept
    assert remus("fleet", "drain", brokers.url, old.id, "--undo").code == 0
    assert not fleet.leaving()


def test_a_backup_that_is_the_only_one_keeps_its_names(
    brokers: Brokers, start: Callable[..., Member], name: str, remus: Command
) -> None:
    member = start("a")
    with protected(brokers, name) as (_, protection):
        protection.checkpoint(wait=True)
        ran = remus("fleet", "drain", brokers.url, member.id)
        assert ran.code == 1
        assert "no other backup has room" in ran.err
        protection.checkpoint(wait=True)


def test_a_backup_whose_name_has_moved_may_not_take_over(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    member = start("a")
    with protected(brokers, name) as (_, protection):
        protection.checkpoint(wait=True)
        moved = Place(name, "elsewhere", "tcp://127.0.0.1:1", 0)
        fleet.put(moved, fleet.place(name)[1])  # as another backup's first commit would
        with pytest.raises(RemusError, match="elsewhere"):
            member.backup.failover(name)
        assert member.backup.status()["names"][name]["role"] == "standby"
        assert fleet.place(name)[0] == moved


def test_nothing_is_committed_before_the_fleet_knows_where(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    """Another backup has it, by the time that this one has stored the first checkpoint."""
    start("a")
    told: list[int] = []
    elsewhere = Standby("elsewhere", "host", ("tcp://127.0.0.1:1",), "remus_ckpt", 9, 1 << 30, False)
    with protected(brokers, name, on_commit=lambda committed: told.append(committed.epoch)) as (_, protection):
        fleet.announce(elsewhere)
        fleet.put(Place(name, "elsewhere", "tcp://127.0.0.1:1", 0), 0)
        with pytest.raises(LinkError):
            protection.checkpoint(wait=True, timeout_s=3.0)
        assert not told
        fleet.withdraw(elsewhere)  # it has died
        protection.checkpoint(wait=True, timeout_s=LONG_S)
    assert told


# Takeovers


def test_a_takeover_fences_the_primary_that_looks_elsewhere(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str, remus: Command
) -> None:
    old, new = start("a"), start("b")
    with pytest.raises(Fenced) as caught, protected(brokers, name) as (array, protection):
        array[0] = 5
        protection.checkpoint(wait=True)
        holder, other = (old, new) if old.keeps(name) else (new, old)
        given = json.loads(remus("failover", "--name", name, "--from", brokers.url, "--json").out)
        found = fleet.place(name)[0]
        assert found is not None
        assert (found.backup, found.is_taken_over, found.term) == (holder.id, True, given["term"])
        holder.backup.close()  # the primary cannot be told by it any more
        protection.checkpoint(wait=True, timeout_s=LONG_S)
    assert caught.value.term == given["term"]
    assert not other.keeps(name)
    with protected(brokers, name, term=given["term"]) as (array, protection):  # the survivor
        array[0] = 6
        protection.checkpoint(wait=True)
    assert restored(other.store, name) == 6
    found = fleet.place(name)[0]
    assert found is not None and (found.backup, found.is_taken_over) == (other.id, False)


def test_a_survivor_that_is_protected_by_address_may_be_taken_over_there(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    first = start("a")
    with protected(brokers, name) as (_, protection):
        protection.checkpoint(wait=True)
    second = start("b")
    given = first.backup.failover(name)
    array = np.zeros(4096)
    with protect({"array": array}, to=second.backup.addresses[0], name=name, term=given["term"]) as protection:
        array[0] = 3
        protection.checkpoint(wait=True)
    time.sleep(1.2 * RENEW_S)  # it does not let go of it
    assert second.backup.failover(name)["term"] == given["term"] + 1
    found = fleet.place(name)[0]
    assert found is not None
    assert (found.backup, found.is_taken_over, found.term) == (second.id, True, given["term"] + 1)


def test_without_brokers_what_is_placed_goes_on_and_nobody_takes_over(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    member = start("a")
    with protected(brokers, name) as (array, protection):
        protection.checkpoint(wait=True)
        for number in range(2):
            brokers.kill(number)
        try:
            array[0] = 1
            protection.checkpoint(wait=True)
            until(lambda: not _answers(fleet, name))  # the leader that is left finds out
            with pytest.raises(RemusError, match="not known"):
                member.backup.failover(name)
            assert member.backup.status()["names"][name]["role"] == "standby"
        finally:
            for number in range(2):
                brokers.start(number)
        array[0] = 2
        protection.checkpoint(wait=True)
        until(lambda: _answers(fleet, name))
        assert member.backup.failover(name)["epoch"] == 2


def _answers(fleet: Fleet, name: str) -> bool:
    try:
        return fleet.place(name)[0] is not None
    except LogError:
        return False


def test_a_takeover_that_only_the_fleet_knows_of_is_carried_out(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str
) -> None:
    """The backup died in between."""
    member = start("a")
    with protected(brokers, name) as (_, protection):
        protection.checkpoint(wait=True)
    member.backup.close()
    found, revision = fleet.place(name)
    assert found is not None
    fleet.put(replace(found, term=1, is_taken_over=True, run=""), revision)
    again = start("a")
    until(lambda: again.backup.status()["names"][name]["role"] == "promoted")
    assert again.backup.status()["names"][name]["term"] == 1


# Commands


def test_status_says_where_every_name_is(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str, remus: Command
) -> None:
    until(lambda: "no names yet" in remus("fleet", "status", brokers.url).out)  # once leases of a test before are over
    member = start("a", max_names=3)
    with protected(brokers, name) as (_, protection):
        protection.checkpoint(wait=True)

        def report() -> tuple[int, list[int], list[str]]:
            found = json.loads(remus("fleet", "status", brokers.url, "--json").out)
            max_names = [one["max_names"] for one in found["backups"]]
            return found["unprotected"], max_names, [one["state"] for one in found["names"] if one["name"] == name]

        def says(*words: str) -> bool:
            ran = remus("fleet", "status", brokers.url)
            return ran.code == 0 and all(word in ran.out for word in words)

        # On a busy machine a primary is late now and then, and a status says so.
        until(lambda: report() == (0, [3], ["protected"]))
        until(lambda: says(name, member.id, "1 name protected; 1 backup alive"))
        lost = Place("lost", "gone", "tcp://127.0.0.1:1", 0)
        fleet.put(lost, fleet.place("lost")[1])
        ran = remus("fleet", "status", brokers.url)
        assert ran.code == 1
        assert "1 of 2 names unprotected" in ran.out and "gone is gone" in ran.out
        assert remus("fleet", "forget", brokers.url, name).code == 1  # it is in use
        assert remus("fleet", "forget", brokers.url, "lost").code == 0
        assert remus("fleet", "forget", brokers.url, "lost").code == 1
        until(lambda: says(name))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_status_that_is_drawn_anew(
    brokers: Brokers, fleet: Fleet, start: Callable[..., Member], name: str, tmp_path: Path, terminal: bool
) -> None:
    member = start("a")
    with watching(tmp_path / "seen", "fleet", "status", brokers.url, terminal=terminal) as seen:
        printed = bytearray()
        until(lambda: shown(seen, printed, b"no names yet", member.id.encode()))
        with protected(brokers, name) as (_, protection):
            protection.checkpoint(wait=True)
            until(lambda: shown(seen, printed, name.encode(), b"1 name protected; 1 backup alive"))
            fleet.put(Place("lost", "gone", "tcp://127.0.0.1:1", 0), fleet.place("lost")[1])
            until(lambda: shown(seen, printed, b"1 of 2 names unprotected", b"gone is gone"))
            fleet.forget("lost")
    assert (b"\x1b[" in printed) == terminal


def test_a_status_goes_on_while_the_brokers_do_not_answer(brokers: Brokers, fleet: Fleet, tmp_path: Path) -> None:
    def last() -> dict[str, Any]:
        lines = (tmp_path / "seen").read_bytes().split(b"\n")
        return json.loads(lines[-2]) if len(lines) > 1 else {}

    with watching(tmp_path / "seen", "fleet", "status", brokers.url, "--json", terminal=False):
        until(lambda: "names" in last())
        for number in range(3):
            brokers.kill(number)
        try:
            until(lambda: "error" in last())
        finally:
            for number in range(3):
                brokers.start(number)
        until(lambda: "names" in last())


def test_a_backup_that_nobody_knows_cannot_be_drained(brokers: Brokers, fleet: Fleet, remus: Command) -> None:
    ran = remus("fleet", "drain", brokers.url, "nobody")
    assert ran.code == 1
    assert "nobody" in ran.err
    assert not fleet.leaving()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "nats://127.0.0.1:4222"), "--name is missing"),
        (("--to", "nats://127.0.0.1:4222/orders", "--name", "other"), "is not the name"),
        (("--to", "nats://127.0.0.1:x/orders"), "127.0.0.1:x"),
        (("--to", "nats://192.0.2.1/orders"), "plain"),
    ],
)
def test_what_protect_cannot_mean(remus: Command, arguments: tuple[str, ...], words: str) -> None:
    ran = remus("protect", "/dev/shm/x", "--pid", "1", *arguments)
    assert ran.code == 2
    assert words in ran.err.replace("\n", " ").replace("│", "")


def test_all_of_it_over_tls(tmp_path: Path, name: str, remus: Command) -> None:
    keys.init(tmp_path / "keys")
    for who in ("broker", "backup", "orders"):
        keys.issue(tmp_path / "keys", who, hosts=["localhost", "127.0.0.1"])
    with Brokers(count=1, tls_dir=tmp_path / "keys" / "broker") as brokers:
        brokers.make_log()
        mine = tmp_path / "keys" / "orders"
        with (
            Backup(
                tmp_path / "store",
                ["tls://127.0.0.1:0"],
                tls_dir=tmp_path / "keys" / "backup",
                fleet=brokers.url,
                warm="disk",
            ),
            protect(
                {"array": (array := np.zeros(8))}, to=f"nats+{brokers.url}", name=name, tls_dir=mine,
                connect_timeout_s=LONG_S,
            ) as protection,
        ):  # fmt: skip
            array[0] = 4
            protection.checkpoint(wait=True)
            assert protection.rollback(0) == 0  # a reader finds the backup, too
            until(lambda: remus("fleet", "status", brokers.url, "--tls-dir", mine).code == 0)
        with pytest.raises(LogError):
            Fleet(brokers.url, tls=None).backups()
    assert restored(tmp_path / "store", name) == 4


def test_a_primary_places_no_name_but_its_own(tmp_path: Path) -> None:
    """The permissions of docs/cluster.md, and what the members of a fleet need."""
    keys.init(tmp_path / "ca")
    for who in ("broker", "orders", "backup-1", "admin"):
        keys.issue(tmp_path / "ca", who, hosts=["localhost", "127.0.0.1"])
    tls = {who: TlsFiles(tmp_path / "ca" / who) for who in ("orders", "backup-1", "admin")}
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    begin = page.index("authorization {")
    with Brokers(count=1, tls_dir=tmp_path / "ca" / "broker", rights=page[begin : page.index("END", begin)]) as them:
        admin = Nats(them.url, tls=tls["admin"])
        make_buckets(admin, 1)
        admin.close()
        with (
            Backup(
                tmp_path / "store",
                ["tls://127.0.0.1:0"],
                tls_dir=tmp_path / "ca" / "backup-1",
                fleet=them.url,
                warm="disk",
            ) as backup,
            protect(
                {"array": np.zeros(8)},
                to=f"nats+{them.url}",
                name="orders",
                tls_dir=tmp_path / "ca" / "orders",
                connect_timeout_s=LONG_S,
            ) as protection,
        ):
            protection.checkpoint(wait=True)
            fleet = Fleet(them.url, tls=tls["orders"])
            found, _ = fleet.place("orders")
            assert found is not None
            until(lambda: "orders" in fleet.primaries())
            with pytest.raises(LogError):
                fleet.put(replace(found, name="others"), 0)
            assert fleet.place("others")[0] is None
            with pytest.raises(LogError):
                fleet.set_leaving(found.backup, True)
            fleet.close()
            assert backup.failover("orders")["term"] == 1
