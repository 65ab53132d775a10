"""A backup whose disk fails, fills up or hangs, and what it has promised all the same."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proxy import Proxy
from store_support import fill
from test_service import ANY, LONG_S, Memory, backup_in, entries, restored, until
from test_service_races import Guest

from remus_ckpt.errors import Fenced, NoCheckpoint, Refused, RemusError, StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service import standby as standby_module
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
        self.waiting = 0
        real, real_fsync = state.replace_file, os.fsync

        def replace_file(*arguments: Any) -> None:
            if not self.may_go_on.is_set():
                self.waiting += 1
                assert self.may_go_on.wait(LONG_S)
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        def fsync(fd: int) -> None:
            if self.failing and stat.S_ISDIR(os.fstat(fd).st_mode):
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


def standing_by(folder: Path, **policy: Any) -> Standby:
    """One that holds a checkpoint, and whose clock is turned by the test."""
    with Store(folder).writer("orders") as filled:
        fill(filled, 1)
    policy.setdefault("lease_s", LONG_S)
    return Standby("orders", Store(folder).writer("orders"), Policy(**policy), Metrics(), lambda: None)


def settled(standby: Standby) -> None:
    until(lambda: not standby._is_settling)


def turn(standby: Standby, at: float | None = None) -> None:
    standby.turn(time.monotonic() if at is None else at)
    settled(standby)


# Disks that fail


@pytest.mark.parametrize("fault", ["full", "failing"])
def test_a_promotion_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, fault: str
) -> None:
    """Whatever becomes of it, nobody commits under a state that a restart would contradict."""
    monkeypatch.setattr(standby_module, "_PROMOTION_S", 1.0)
    mark = tmp_path / "taken-over"
    with backup_in(tmp_path / "store", on_failover=f"touch {mark}") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            setattr(disk, fault, True)
            with pytest.raises(RemusError) as caught:
                backup.failover("orders")
            assert "certain" in str(caught.value), "it does not say that nothing was promoted"
            with pytest.raises(Refused) as refused:
                memory.protection.checkpoint(wait=True, timeout_s=0.5)
            assert refused.value.code == "store"
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
        time.sleep(0.8)
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


def asking_for(standby: Standby) -> tuple[threading.Thread, list[Any]]:
    """A takeover by hand that has been asked for; its answer, or its error, comes into the list."""
    answers: list[Any] = []

    def ask_for() -> None:
        try:
            answers.append(standby.take_over(fence=False))
        except RemusError as error:
            answers.append(error)

    asking = threading.Thread(target=ask_for, daemon=True)
    asking.start()
    until(lambda: standby._by_hand is not None)
    return asking, answers


def test_a_takeover_is_asked_for_while_a_primary_is_being_let_in(tmp_path: Path, disk: Disk) -> None:
    """While a takeover is being done, nobody is let in."""
    standby = standing_by(tmp_path)
    with being_let_in(disk, standby, Guest(1)) as ends:
        asking, answers = asking_for(standby)
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
    standby = Standby("orders", Store(tmp_path).writer("orders"), Policy(lease_s=LONG_S), Metrics(), lambda: None)
    survivor = Guest(1)
    with being_let_in(disk, standby, survivor, 2) as ends:
        asking, answers = asking_for(standby)
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
    runs = tmp_path / "runs"
    standby = standing_by(tmp_path / "store", on_failover=f"echo $REMUS_TERM >> {runs}")

    def take_over() -> dict[str, Any]:
        _, answers = asking_for(standby)
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
    monkeypatch.setattr(standby_module, "_PROMOTION_S", 1.0)
    monkeypatch.setattr(standby_module, "_LEAVE_S", 0.5)
    monkeypatch.setattr("remus_ckpt.service.backup._CLOSE_S", 1.0)
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
                time.sleep(2.0)  # two leases
                assert protection.status()["reconnects"] == 0, "it has heard our heartbeats"
                with pytest.raises(RemusError):
                    backup.failover("orders")
                assert time.monotonic() - begin < 10
        begin = time.monotonic()
        backup.close()
        assert time.monotonic() - begin < 10
        disk.may_go_on.set()


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

    monkeypatch.setattr("remus_ckpt.service.backup._OPEN_S", 1.0)
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
            with protect({"a": np.zeros(9)}, to=backup.addresses[0], name="bad") as protection:
                with pytest.raises(RemusError):
                    protection.checkpoint(timeout_s=2.0)
                may_go_on.set()
                until(lambda: of(backup, "bad")["role"] == "standby")
                assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 1
                assert protection.checkpoint(timeout_s=LONG_S) == 2
    finally:
        may_go_on.set()


def test_a_backup_that_ends_while_a_store_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for a disk that hangs, and what is then opened is let go of."""
    Store(tmp_path).writer("orders").close()
    may_go_on, real = threading.Event(), Store.writer
    with monkeypatch.context() as patched:
        patched.setattr("remus_ckpt.service.backup._OPEN_S", 0.1)
        patched.setattr(Store, "writer", lambda *given, **options: may_go_on.wait(LONG_S) and real(*given, **options))
        begin = time.monotonic()
        Backup(tmp_path, [ANY]).close()
        assert time.monotonic() - begin < LONG_S / 2
        may_go_on.set()
        until(lambda: not any(thread.name.startswith("opening") for thread in threading.enumerate()))
    Store(tmp_path).writer("orders").close()


def test_a_session_that_hangs_in_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be ended, so nothing is promoted; once it can be, it is."""
    monkeypatch.setattr(standby_module, "_PROMOTION_S", 1.0)
    monkeypatch.setattr(standby_module, "_LEAVE_S", 0.3)
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


# Stores that are bad


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
        protection = protect({"a": guest}, to=backup.addresses[0], name="bad")
        with pytest.raises(Refused) as refused:
            protection.checkpoint(wait=True, timeout_s=0.3)
        assert refused.value.code == "store"
        shutil.rmtree(store / "bad")
        keep.rename(store / "bad")
        until(lambda: of(backup, "bad")["epoch"] == 1)  # nobody has to start the backup anew
        assert of(backup, "bad")["trouble"] is None
        assert backup.metrics.registry.get_sample_value("remus_store_open", {"name": "bad"}) == 1
        assert protection.checkpoint(wait=True, timeout_s=LONG_S) == 2
        protection.close()


def test_a_warm_copy_that_somebody_has_cut(tmp_path: Path) -> None:
    """To apply a checkpoint to what is not there would end the backup for all."""
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], wait="applied") as memory:
        memory.step(1)
        memory.step(2)
        os.truncate(backup._standbys["orders"]._writer.image or "", 0)
        memory.step(1)
        memory.step(3)
        assert of(backup)["warnings"] == []
        backup.close()
    assert np.array_equal(restored(tmp_path / "store"), memory.array)
    assert [entry.epoch for entry in entries(tmp_path / "store")] == [0, 1, 2, 3]


def test_a_warm_copy_that_was_cut_is_not_handed_out(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0], wait="applied") as memory:
            memory.step(1)
        os.truncate(backup._standbys["orders"]._writer.image or "", 4096)
        with suppress(RemusError):  # the store is being opened anew
            backup.failover("orders")

        def image() -> bytes:
            with suppress(RemusError):
                return Path(backup.failover("orders")["image"]).read_bytes()
            return b""

        until(lambda: image()[: memory.array.nbytes] == memory.array.tobytes())


# Fences


def test_a_fence_is_dead_before_the_primary_is_let_in(tmp_path: Path) -> None:
    """Its reason is gone: nothing of it may shoot what is back, and it was no failure."""
    shot, begun = tmp_path / "shot", tmp_path / "begun"
    fence = f"touch {begun}; (setsid sh -c 'sleep 2; touch {shot}' &); sleep 30 | cat"
    with (
        backup_in(tmp_path / "store", lease_s=0.4, automatic=True, fence=fence) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        memory.step(1)
        proxy.silent.set()
        until(begun.exists)
        proxy.silent.clear()
        memory.step(2)
        found = of(backup)
        assert (found["role"], found["fence"]) == ("standby", "not run")
        time.sleep(2.2)
        memory.step(3)
        assert not shot.exists()
        assert (
            backup.metrics.registry.get_sample_value(
                "remus_command_failures_total", {"name": "orders", "command": "fence"}
            )
            == 0
        )


def test_a_fence_that_takes_too_long_or_is_not_wanted_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shot, begun = tmp_path / "shot", tmp_path / "begun"
    fence = f"touch {begun}; (sleep 1.5; touch {shot}) 2>&1 | cat"
    for promotion_s, fence_s in ((60.0, 0.3), (0.3, 60.0)):
        monkeypatch.setattr(standby_module, "_PROMOTION_S", promotion_s)
        with (
            backup_in(tmp_path / "store", fence=fence, fence_timeout_s=fence_s) as backup,
            Memory(backup.addresses[0]) as memory,
        ):
            memory.step(1)
            with pytest.raises(RemusError):
                backup.failover("orders", fence=True)
            assert begun.exists()
            while of(backup)["fence"] == "running":
                time.sleep(0.01)
            time.sleep(1.6)
            assert not shot.exists()
            memory.step(2)


def test_the_end_of_the_backup_is_the_end_of_its_commands(tmp_path: Path) -> None:
    acted, begun = tmp_path / "acted", tmp_path / "begun"
    takeover = f"touch {begun}; (setsid sh -c 'sleep 1; touch {acted}' &); sleep 30"
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until(begun.exists)
    time.sleep(1.2)
    assert not acted.exists()


def test_a_takeover_that_does_not_end_is_killed_and_tried_again(tmp_path: Path) -> None:
    runs, acted = tmp_path / "runs", tmp_path / "acted"
    first = f"(setsid sh -c 'while test -e {tmp_path}; do sleep 0.5; touch {acted}; done' &); sleep 60 | cat"
    takeover = f"echo run >> {runs}; test $(wc -l < {runs}) -gt 1 || {{ {first}; }}"
    with backup_in(tmp_path / "store", on_failover=takeover, takeover_timeout_s=1.0) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until(lambda: of(backup)["takeover"] == "failed")
        assert "more than 1 s" in of(backup)["trouble"]
        acted.unlink(missing_ok=True)
        until(lambda: of(backup)["takeover"] == "succeeded")
        assert of(backup)["trouble"] is None
    assert runs.read_text() == "run\nrun\n"
    assert not acted.exists(), "nothing of the first one lives on"


def test_a_fence_that_cannot_be_started_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOO_LONG", "x")
    with backup_in(tmp_path / "store", fence="true " + "x" * (1 << 18)) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        with pytest.raises(RemusError) as caught:
            backup.failover("orders", fence=True)
        assert "cannot be started" in str(caught.value)
        found = of(backup)
        assert (found["role"], found["fence"]) == ("standby", "failed")


# What was decided, and what has changed since


def test_a_sign_of_life_behind_the_decision_to_promote(tmp_path: Path) -> None:
    standby = standing_by(tmp_path, lease_s=0.2, automatic=True, fence="true")
    guest = Guest(1)
    with standby.hosting(guest, guest.hello()):
        pass
    later = time.monotonic() + 0.4
    while standby.status()["fence"] != "succeeded":
        standby._looked_at = time.monotonic()
        standby.turn(max(time.monotonic(), later))
        time.sleep(0.02)
        assert time.monotonic() < later + LONG_S
    with standby._settling():
        standby._looked_at = time.monotonic()
        standby.turn(time.monotonic())
        assert standby._is_settling, "it is about to be promoted"
        standby._heard = time.monotonic() + 1.0
    settled(standby)
    assert standby.status()["role"] == "standby"
    standby.close()


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
    over = time.monotonic() + 5 * 0.2
    while time.monotonic() < over:
        standby._looked_at = time.monotonic()
        turn(standby)
        time.sleep(0.02)
    assert standby.status()["role"] == "standby"
    assert not shot.exists()
    standby.close()


def test_two_who_ask_for_a_takeover(tmp_path: Path) -> None:
    """One vouches for the old side, and is not made to wait for the fence that the other asks for."""
    standby = standing_by(tmp_path, fence="sleep 60")
    answers: list[dict[str, Any]] = []
    asking = [
        threading.Thread(target=lambda fence=fence: answers.append(standby.take_over(fence=fence)), daemon=True)
        for fence in (False, True)
    ]
    try:
        for number, thread in enumerate(asking, 1):
            thread.start()
            until(lambda number=number: len(standby._changed._waiters) == number)  # type: ignore[attr-defined]
        turn(standby)
        until(lambda: len(answers) == 2)
        assert [answer["term"] for answer in answers] == [1, 1]
    finally:
        standby.close()
