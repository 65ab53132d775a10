"""A backup whose disk fails, fills up or hangs, and what it has promised all the same."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limited import limit
from store_support import fill
from test_service import ANY, LONG_S, Memory, backup_in, until
from test_service_races import Guest

from remus_ckpt.errors import Fenced, LinkError, Refused, RemusError, StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.service.standby import Policy, Refusal, Standby
from remus_ckpt.store import HistoryWriter, Store, state


class Disk:
    """store.json's: `full` takes nothing, `failing` takes it and does not say that it is durable, `hanging` waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = self.failing = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.waiting = self.failures = 0
        real, real_fsync = state.replace_file, os.fsync

        def replace_file(*arguments: Any) -> None:
            if not self.may_go_on.is_set():
                self.waiting += 1
                assert self.may_go_on.wait(LONG_S)
            if self.full:
                self.failures += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        def fsync(fd: int) -> None:
            if self.failing and stat.S_ISDIR(os.fstat(fd).st_mode):
                self.failures += 1
                raise OSError(errno.EIO, "Input/output error")
            real_fsync(fd)

        monkeypatch.setattr(state, "replace_file", replace_file)
        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.may_go_on.set()


def of(backup: Backup, name: str = "orders") -> dict[str, Any]:
    found: dict[str, Any] = backup.status()["names"][name]
    return found


def standing_by(folder: Path, wake: Callable[[], None] | None = None, **policy: Any) -> Standby:
    """One that holds a checkpoint, and whose clock is turned by the test."""
    with Store(folder).writer("orders") as filled:
        fill(filled, 1)
    policy.setdefault("lease_s", LONG_S)
    return Standby("orders", Store(folder).writer("orders"), Policy(**policy), Metrics(), wake or (lambda: None))


def settled(standby: Standby) -> None:
    """Wait until none of its threads is promoting, or writing what is owed."""
    names = {f"promote of {standby.name}", f"pay of {standby.name}"}
    until(lambda: names.isdisjoint(thread.name for thread in threading.enumerate()))


def turn(standby: Standby, at: float | None = None) -> None:
    standby.turn(time.monotonic() if at is None else at)
    settled(standby)


# Disks that fail


@pytest.mark.parametrize("fault", ["full", "failing"])
def test_a_promotion_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, fault: str
) -> None:
    """Whatever becomes of it, nobody commits under a state that a restart would contradict."""
    limit(monkeypatch, promotion_s=0.3)
    mark = tmp_path / "taken-over"
    with backup_in(tmp_path / "store", on_failover=f"touch {mark}") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            setattr(disk, fault, True)

            def is_uncertain() -> bool:
                with pytest.raises(RemusError) as caught:
                    backup.failover("orders")
                found = "certain" in str(caught.value)
                assert found or not disk.failures, "it does not say that nothing was promoted"
                return found

            until(is_uncertain)  # on a busy machine, a request may end before anything is written for it

            def refused() -> str:
                with pytest.raises(LinkError) as refused:
                    memory.protection.checkpoint(wait=True, timeout_s=0.5)
                return refused.value.code if isinstance(refused.value, Refused) else ""

            until(lambda: refused() == "store")  # "busy", as long as its own session ends
            setattr(disk, fault, False)
            with suppress(Fenced):
                memory.step(2)
            role = of(backup)["role"]
            committed = memory.protection.committed
            assert committed is not None
            assert committed.epoch == (1 if role == "standby" else 0)
        backup.close()
        with backup_in(tmp_path / "store", on_failover=f"touch {mark}") as again:
            assert of(again)["role"] == role
            time.sleep(0.3)
            assert role == "promoted" or not mark.exists()


def test_a_promotion_goes_on_when_there_is_room(tmp_path: Path, disk: Disk) -> None:
    with backup_in(tmp_path / "store", on_failover="true") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        disk.full = True
        given: list[Any] = []
        asking = threading.Thread(target=lambda: given.append(backup.failover("orders")), daemon=True)
        asking.start()
        until(lambda: of(backup)["trouble"])
        disk.full = False
        asking.join(LONG_S)
        assert given[0]["term"] == 1
        until(lambda: of(backup)["takeover"] == "succeeded")
        assert of(backup)["trouble"] is None


def test_a_goodbye_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    fenced = tmp_path / "fenced"
    with backup_in(tmp_path / "store", lease_s=0.3, automatic=True, fence=f"touch {fenced}") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            disk.full = True
        assert "space" in of(backup)["trouble"]
        time.sleep(0.4)  # more than a lease
        disk.full = False
        until(lambda: of(backup)["trouble"] is None)
    assert Store(tmp_path / "store").history("orders").state.more["expects_primary"] is False
    assert not fenced.exists()


def test_a_takeover_that_was_done_on_a_full_disk_is_not_done_again(tmp_path: Path, disk: Disk) -> None:
    runs, may_end = tmp_path / "runs", tmp_path / "may-end"
    takeover = f"echo >> {runs}; while ! test -e {may_end}; do sleep 0.02; done"
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until(runs.exists)
        disk.full = True
        may_end.touch()
        until(lambda: of(backup)["takeover"] == "succeeded")
        time.sleep(0.3)
        disk.full = False
        until(lambda: of(backup)["trouble"] is None)
    assert runs.read_text().count("\n") == 1
    assert Store(tmp_path / "store").history("orders").state.more["takeover_done"] is True


def test_fenced_is_not_said_before_the_new_term_is_durable(tmp_path: Path, disk: Disk) -> None:
    standby = standing_by(tmp_path)
    leave = ExitStack()
    old, new = Guest(1, leave.close), Guest(2)
    with leave:
        leave.enter_context(standby.hosting(old, old.hello()))
        disk.full = True
        with pytest.raises(StoreError), standby.hosting(new, new.hello(5)):
            pass
        assert not old.ends
        disk.full = False
        with standby.hosting(new, new.hello(5)):
            assert old.ends == ["fenced"]
            assert standby.status()["term"] == 5
    standby.close()


def test_one_that_is_dismissed_and_says_goodbye_does_not_speak_for_the_next(tmp_path: Path) -> None:
    standby = standing_by(tmp_path)
    leave = ExitStack()

    def on_end() -> None:
        standby.said_goodbye("in the very moment")
        leave.close()

    old, new = Guest(1, on_end), Guest(2)
    with leave:
        leave.enter_context(standby.hosting(old, old.hello()))
        with standby.hosting(new, new.hello(5)):
            turn(standby)
            assert Store(tmp_path).history("orders").state.more["expects_primary"] is True
    standby.close()


@contextmanager
def being_let_in(disk: Disk, standby: Standby, guest: Guest, term: int | None = None) -> Iterator[list[Any]]:
    """In the block, the disk is just writing down that this primary is let in; gives its "in", or what it is told."""
    ends: list[Any] = []
    leave = threading.Event()

    def come() -> None:
        try:
            with standby.hosting(guest, guest.hello(term)):
                ends.append("in")
                assert leave.wait(LONG_S)
        except Refusal as error:
            ends.append(error.code)

    coming = threading.Thread(target=come, daemon=True)
    disk.may_go_on.clear()
    coming.start()
    until(lambda: disk.waiting)
    try:
        yield ends
    finally:
        disk.may_go_on.set()
        leave.set()
        coming.join(LONG_S)


def asking_for(standby: Standby, woken: threading.Event, *, fence: bool = False) -> tuple[threading.Thread, list[Any]]:
    """A takeover by hand that has been asked for; its answer, or its error, comes into the list.

    woken: set by the standby, which wakes its backup as soon as it has been asked
    """
    answers: list[Any] = []
    woken.clear()

    def ask_for() -> None:
        try:
            answers.append(standby.take_over(fence=fence))
        except RemusError as error:
            answers.append(error)

    asking = threading.Thread(target=ask_for, daemon=True)
    asking.start()
    assert woken.wait(LONG_S)
    return asking, answers


def test_a_takeover_is_asked_for_while_a_primary_is_being_let_in(tmp_path: Path, disk: Disk) -> None:
    """While a takeover is being done, nobody is let in."""
    woken = threading.Event()
    standby = standing_by(tmp_path, woken.set)
    with being_let_in(disk, standby, Guest(1)) as ends:
        asking, answers = asking_for(standby, woken)
        disk.may_go_on.set()
        until(lambda: ends)
        assert ends == ["busy"]
        turn(standby)
        asking.join(LONG_S)
    assert answers[0]["term"] == 1
    standby.close()


def test_what_was_handed_out_is_asked_for_while_its_survivor_is_being_let_in(tmp_path: Path, disk: Disk) -> None:
    """The survivor is neither ended nor handed out for that."""
    with Store(tmp_path).writer("orders") as filled:
        fill(filled, 1)
        filled.set_state(term=1, role="promoted")
    woken = threading.Event()
    standby = Standby("orders", Store(tmp_path).writer("orders"), Policy(lease_s=LONG_S), Metrics(), woken.set)
    survivor = Guest(1)
    with being_let_in(disk, standby, survivor, 2) as ends:
        asking, answers = asking_for(standby, woken)
        standby.turn(time.monotonic())  # the memory is about to be handed out
        disk.may_go_on.set()
        until(lambda: ends)
        settled(standby)
        turn(standby)
        asking.join(LONG_S)
        assert ends == ["in"]
        assert not survivor.ends
        found = standby.status()
        assert (found["role"], found["term"], found["image"]) == ("standby", 2, None)
    assert isinstance(answers[0], RemusError)
    standby.close()


def test_a_survivor_could_not_be_let_in_and_the_next_takeover_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the earlier one is answered or taken for done, although the disk failed just behind its end."""
    runs, woken = tmp_path / "runs", threading.Event()
    standby = standing_by(tmp_path / "store", woken.set, on_failover=f"echo $REMUS_TERM >> {runs}")

    def take_over() -> dict[str, Any]:
        _, answers = asking_for(standby, woken)
        until(lambda: turn(standby) or answers)
        until(lambda: turn(standby) or standby.status()["takeover"] == "succeeded")
        given: dict[str, Any] = answers[0]
        return given

    def set_state(self: HistoryWriter, **changes: Any) -> None:
        real(self, **changes)
        raise StoreError("neither written for good nor taken back")

    assert take_over()["term"] == 1
    survivor, real = Guest(1), HistoryWriter.set_state
    with monkeypatch.context() as patched:
        patched.setattr(HistoryWriter, "set_state", set_state)
        with pytest.raises(StoreError), standby.hosting(survivor, survivor.hello(2)):
            pass
    until(lambda: turn(standby) or standby.status()["trouble"] is None)
    assert standby.status()["role"] == "standby"
    assert standby.status()["image"] is None
    assert take_over()["term"] == 3
    assert runs.read_text() == "1\n3\n"
    standby.close()


# Disks that hang


def test_a_disk_that_hangs_holds_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    """A promotion hangs: others are served, it is said how things are, and who waits for it is told in time."""
    limit(monkeypatch, promotion_s=0.3, leave_s=0.3, close_s=0.5)
    with backup_in(tmp_path / "store", lease_s=1.0) as backup:
        with Memory(backup.addresses[0]) as memory, Backup(tmp_path / "x", [ANY]):
            memory.step(1)
            other = np.zeros(4096, dtype=np.uint8)
            with protect({"a": other}, to=backup.addresses[0], name="other") as protection:
                protection.checkpoint(wait=True)
                disk.may_go_on.clear()
                begin = time.monotonic()
                with pytest.raises(RemusError) as caught:
                    backup.failover("orders")
                assert "certain" in str(caught.value)
                assert disk.waiting
                for _ in range(5):
                    protection.checkpoint(wait=True, timeout_s=LONG_S)
                    assert (
                        ask(connect(Address.parse(backup.addresses[0])), "status", {})["names"]["orders"]["term"] == 0
                    )
                time.sleep(1.2)  # more than a lease
                assert protection.status()["reconnects"] == 0, "it has heard our heartbeats"
                with pytest.raises(RemusError):
                    backup.failover("orders")
                assert time.monotonic() - begin < 10
        begin = time.monotonic()
        backup.close()
        assert time.monotonic() - begin < 10
        disk.may_go_on.set()


def test_a_session_that_hangs_in_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be ended, so nothing is promoted; once it can be, it is."""
    limit(monkeypatch, promotion_s=1.0, leave_s=0.2)
    hangs, may_go_on = threading.Event(), threading.Event()

    def on_phase(name: str, epoch: int) -> None:
        if name == "staged" and epoch == 1:
            hangs.set()
            may_go_on.wait(LONG_S)

    with Backup(tmp_path / "store", [ANY], on_phase=on_phase) as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        memory.step(2, wait=False)
        assert hangs.wait(LONG_S)
        with pytest.raises(RemusError) as caught:
            backup.failover("orders")
        assert "not promoted" in str(caught.value)
        assert of(backup)["role"] == "standby"
        may_go_on.set()
        assert backup.failover("orders")["term"] == 1


def test_a_name_without_checkpoints_leaves_nothing(tmp_path: Path) -> None:
    writer = Store(tmp_path / "store").writer("orders", warm_directory=tmp_path / "warm")
    standby = Standby("orders", writer, Policy(), Metrics(), lambda: None)
    assert standby.close_if_empty()
    assert [*(tmp_path / "store").iterdir(), *(tmp_path / "warm").iterdir()] == []


# What was decided, and what has changed since


def test_a_takeover_that_was_done_says_nothing_of_the_next_term(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with Store(tmp_path / "store").writer("orders") as filled:
        fill(filled, 1)
        filled.set_state(takeover_done=True)  # from whatever it may be left
    with backup_in(tmp_path / "store", on_failover=f"echo $REMUS_TERM >> {runs}") as backup:
        backup.failover("orders")
        until(lambda: of(backup)["takeover"] == "succeeded")
        assert runs.read_text() == "1\n"
        history = Store(tmp_path / "store").history("orders")
        until(lambda: history.state.more["takeover_done"] is True)
        with Memory(backup.addresses[0], term=2) as survivor:
            survivor.step(1)
            assert history.state.more["takeover_done"] is False


def test_a_survivor_is_not_ended_for_the_memory_that_it_began_with(tmp_path: Path) -> None:
    """It is protected from its first commit on; before that, a takeover would undo what it has done."""
    shot = tmp_path / "shot"
    standby = standing_by(tmp_path, lease_s=0.2, automatic=True, fence=f"touch {shot}")
    asking = threading.Thread(target=lambda: standby.take_over(fence=False), daemon=True)
    asking.start()
    until(lambda: turn(standby) or standby.status()["role"] == "promoted")
    asking.join(LONG_S)
    survivor = Guest(1)
    with standby.hosting(survivor, survivor.hello(term=2)):
        pass
    now = time.monotonic()
    for number in range(100):  # of the five leases that follow
        turn(standby, now + 0.01 * number)
    assert standby.status()["role"] == "standby"
    assert not shot.exists()
    standby.close()


def test_two_who_ask_for_a_takeover(tmp_path: Path) -> None:
    """One vouches for the old side, and is not made to wait for the fence that the other asks for."""
    wakes: list[None] = []
    standby = standing_by(tmp_path, lambda: wakes.append(None), fence="sleep 60")
    answers: list[dict[str, Any]] = []
    asking = [
        threading.Thread(target=lambda fence=fence: answers.append(standby.take_over(fence=fence)), daemon=True)
        for fence in (False, True)
    ]
    try:
        for number, thread in enumerate(asking, 1):
            thread.start()
            until(lambda number=number: len(wakes) == number)  # type: ignore[misc]
        turn(standby)
        until(lambda: len(answers) == 2)
        assert [answer["term"] for answer in answers] == [1, 1]
    finally:
        standby.close()
