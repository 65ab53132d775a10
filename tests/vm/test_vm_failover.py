"""A guest whose host dies goes on elsewhere, from its last committed checkpoint, and counts on."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import guests
import pytest
from conftest import many
from services import LONG_S, until

from remus_ckpt.vm.qmp import Qmp

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
AUTOMATIC = ("--lease", "500ms", "--auto-failover", "--fence", "true")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.build(tmp_path_factory.mktemp("guest"))


@pytest.mark.parametrize("victim", ["qemu", "primary"])
def test_a_killed_guest_goes_on_by_itself(tmp_path: Path, image: Path, victim: str) -> None:
    with guests.backup(tmp_path, *AUTOMATIC) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served)
        time.sleep(random.random() * 0.2)
        os.kill(primary.qemu if victim == "qemu" else primary.process.pid, signal.SIGKILL)
        primary.console.ends()
        before = primary.console.last
        until(lambda: served.status()["vm"] == "running")
        with served.console() as console:
            begun = console.counts_on(1)
            assert console.counts_on(20) > begun
        # It lost what was not committed, and nothing more: at 5 steps a millisecond.
        assert before - 5 * 1000 < begun < before + 5 * 1000 * 30
        until(lambda: served.status()["takeover"] == "succeeded")
        assert not os.path.exists(served.status()["image"]), "the guest's RAM can be taken for a checkpoint's"


@pytest.mark.parametrize("series", range(many(1, 4)))
def test_kills_at_random_instants(tmp_path: Path, image: Path, series: int) -> None:
    """Whatever is interrupted: stop, save, copy, send, commit, apply. In several series, which run side by side."""
    for number in range(many(3, 10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (
            guests.backup(folder) as served,
            guests.running(folder, served.address, image, "--interval", "5ms") as primary,
        ):
            guests.wait_committed(served, epoch=1)
            time.sleep(random.random() * 0.5)
            os.kill(primary.qemu if number % 2 else primary.process.pid, signal.SIGKILL)
            primary.console.ends()
            served.failover()
            until(lambda: served.status()["vm"] == "running")
            with served.console() as console:
                console.counts_on(10)


def stands_still(served: guests.Backup) -> bool:
    """Whether the guest writes nothing while checkpoints are taken."""
    before = served.status()["primary"]
    time.sleep(3.0)
    after = served.status()["primary"]
    return after["checkpoints"] > before["checkpoints"] and after["dirty_pages_total"] == before["dirty_pages_total"]


def test_a_guest_that_waits_for_its_console_goes_on(tmp_path: Path, image: Path) -> None:
    """Nobody reads it, so that its serial port is in the middle of a byte for good. Here the port takes it at once."""
    with (
        guests.backup(tmp_path) as served,
        guests.running(tmp_path, served.address, image, reads=False) as primary,
    ):
        guests.wait_committed(served)
        until(lambda: stands_still(served))
        os.kill(primary.process.pid, signal.SIGKILL)
        served.failover()
        until(lambda: served.status()["vm"] == "running")
        with served.console() as console:
            console.counts_on(10)


def test_a_standby_that_dies_is_replaced(tmp_path: Path, image: Path) -> None:
    with guests.backup(tmp_path) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served)
        before = served.status()["vm_pid"]
        os.kill(before, signal.SIGKILL)
        until(lambda: served.status()["vm"] == "waiting" and served.status()["vm_pid"] != before)
        os.kill(primary.process.pid, signal.SIGKILL)
        served.failover()
        until(lambda: served.status()["vm"] == "running")
        with served.console() as console:
            console.counts_on(10)


def test_a_standby_that_dies_last_is_replaced_by_a_cold_one(tmp_path: Path, image: Path) -> None:
    with guests.backup(tmp_path) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served)
        os.kill(primary.process.pid, signal.SIGKILL)
        until(lambda: not served.status()["connected"])
        os.kill(served.status()["vm_pid"], signal.SIGKILL)
        served.failover()
        until(lambda: served.status()["vm"] == "running")
        (gone_on,) = [line for line in served.log() if line["event"].startswith("the guest goes")]
        assert not gone_on["waited"]
        with served.console() as console:
            console.counts_on(10)


@pytest.mark.parametrize("is_taken", [False, True])
def test_the_guest_is_not_started_twice(tmp_path: Path, image: Path, is_taken: bool) -> None:
    """The command after it fails at first, and the backup is killed and started again: the guest counts on."""
    flag = tmp_path / "may succeed"
    command = ("--on-failover", f"test -e '{flag}'")
    with guests.backup(tmp_path, *command, keeps=True) as served:
        with guests.running(tmp_path, served.address, image) as primary:
            guests.wait_committed(served)
            os.kill(primary.process.pid, signal.SIGKILL)
        served.failover()
        until(lambda: served.status()["takeover"] == "failed" and served.status()["vm"] == "running")
        pid = served.status()["vm_pid"]
        with served.console() as console:
            first = console.counts_on(5)
        os.kill(served.process.pid, signal.SIGKILL)
        (qmp,) = served.sockets("*.guest")
    # Somebody has QEMU's only connection, as one does who protects the guest again.
    with guests.backup(tmp_path, *command) as served, closing(Qmp(qmp)) if is_taken else nullcontext():
        flag.touch()
        until(lambda: served.status()["takeover"] == "succeeded")
        assert served.status()["vm_pid"] == pid
        with served.console() as console:
            assert console.counts_on(5) > first


def test_a_host_that_differs_refuses_and_says_how(tmp_path: Path) -> None:
    """The memory is kept all the same, and what is missing may be put right."""
    image = guests.build(tmp_path)
    with guests.backup(tmp_path) as served, guests.running(tmp_path, served.address, image):
        guests.wait_committed(served)
        os.kill(served.status()["vm_pid"], signal.SIGKILL)
        data = image.read_bytes()
        image.write_bytes(b"another kernel")
        until(lambda: served.status()["vm"] == "refused")
        status = served.status()
        assert str(image) in status["vm_why"] and "bytes" in status["vm_why"]
        assert status["health"]["state"] == "not ready" and status["connected"]
        image.write_bytes(data)
        until(lambda: served.status()["vm"] == "waiting")


def test_a_primary_that_was_frozen_ends_its_guest(tmp_path: Path, image: Path) -> None:
    """Another side has taken over meanwhile."""
    with guests.backup(tmp_path) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served)
        primary.process.send_signal(signal.SIGSTOP)
        served.failover()
        until(lambda: served.status()["vm"] == "running")
        primary.console.counts_on(3)  # its output is not held: there is no network
        primary.process.send_signal(signal.SIGCONT)
        primary.console.ends()
        assert primary.process.wait(LONG_S) == 22


def test_a_survivor_is_protected_again_by_the_takeover_command(tmp_path: Path, image: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    again = (
        f"{sys.executable} -m remus_ckpt protect qemu:$REMUS_QMP --name web --to unix:{second}/backup.sock "
        f"--term $REMUS_TERM > {tmp_path}/protect.log 2>&1 &"
    )
    with guests.backup(first, "--on-failover", again) as here, guests.backup(second) as there:
        with guests.running(first, here.address, image) as primary:
            guests.wait_committed(here)
            os.kill(primary.process.pid, signal.SIGKILL)
        here.failover()
        guests.wait_committed(there)
        with here.console() as console:
            console.counts_on(5)
            os.kill(here.status()["vm_pid"], signal.SIGKILL)
            console.ends()
            before = console.last
        there.failover()
        until(lambda: there.status()["vm"] == "running")
        with there.console() as console:
            assert console.counts_on(20) > before - 5 * 1000
