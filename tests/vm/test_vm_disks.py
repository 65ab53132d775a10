"""A guest with a disk, under the commands that users type: its host dies, and disk and memory go on together."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import disk_guests
import guests
import pytest
from conftest import many
from disk_guests import DISK_BYTES, Said, image_of, newest_write, writing
from services import command

pytestmark = [pytest.mark.qemu, pytest.mark.kill]
WAIT_S = 120.0
DROPPED = 64
"""Writes that the memory does not know of. The guest sees each with one chance in two, or writes over it first."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: on a disk each epoch would wait for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="remus-disks-") as made:
        yield Path(made)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def own_disk(folder: Path, size: int = DISK_BYTES) -> Path:
    path = folder / "web.raw"
    path.write_bytes(bytes(size))
    return path


def wait_writing(served: guests.Backup, own: Path) -> None:
    """Until the guest writes, and that is committed there, and a QEMU waits."""
    until(lambda: newest_write(own) > 50, "the guest does not write")
    until(lambda: served.status().get("vm") == "waiting", "no QEMU waits")
    seen = served.status()["epoch"]
    until(lambda: served.status()["epoch"] > seen + 3, "nothing is committed")


def goes_on(served: guests.Backup, image: Path) -> str:
    """What the guest says of faults once it has looked at most of its blocks."""
    begun = newest_write(image)
    (path,) = served.sockets("*.serial0")
    said = Said(path)
    try:
        until(lambda: newest_write(image) > begun + disk_guests.CHECKED or "fault" in said.text, "it does not write")
        return "\n".join(line for line in said.text.splitlines() if "fault" in line)
    finally:
        said.close()


def fail_over(served: guests.Backup) -> Path:
    """Let the guest go on there; returns its image."""
    until(lambda: not served.status()["connected"], "the backup does not see that the primary is gone")
    image = image_of(served)
    served.failover()
    until(lambda: served.status()["vm"] == "running", "the guest does not go on")
    return image


@contextmanager
def protecting(folder: Path, served: guests.Backup, to: guests.Backup, term: int) -> Iterator[subprocess.Popen[str]]:
    """A survivor is protected again."""
    (socket,) = served.sockets(f"*.{term - 1}.guest")
    arguments = ["protect", f"qemu:{socket}", "--name", "web", "--to", to.address, "--term", term]
    with command(*arguments, "--log-format", "json", log=folder / "protect.log") as process:
        yield process


def test_disk_and_memory_go_on_together(folder: Path) -> None:
    """The guest compares each block that it reads with what it remembers of its writing. Two backups take turns."""
    dice, losses, kills = random.Random(14), list[int](), many(3, 10)
    sides = [folder / "a", folder / "b"]
    for side in sides:
        side.mkdir()
    own = own_disk(folder)
    with guests.backup(sides[0]) as first, guests.backup(sides[1]) as second:
        with writing(folder, first.address, own) as primary:
            wait_writing(first, own)
            time.sleep(dice.uniform(0.2, 1.0))
            os.kill(primary.qemu, signal.SIGKILL)
            primary.process.wait(WAIT_S)
        here, there = first, second
        image = fail_over(here)
        losses.append(newest_write(own) - newest_write(image))
        assert not goes_on(here, image)
        while len(losses) < kills or not any(losses):  # kills that take no write back show nothing
            assert len(losses) < kills + 5, "no kill takes a write back"
            term = here.status()["term"] + 1
            with protecting(folder, here, there, term) as process:  # what this one leaves in QEMU is in nobody's way
                until(lambda there=there: (there.status().get("epoch") or 0) > 0, "nothing is committed")
                process.kill()
            with protecting(folder, here, there, term) as process:
                wait_writing(there, image)
                time.sleep(dice.uniform(0.0, 0.5))
                victims = [here.status()["vm_pid"], process.pid]
                dice.shuffle(victims)
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
            own, image = image, fail_over(there)
            losses.append(newest_write(own) - newest_write(image))
            assert not goes_on(there, image)
            here, there = there, here
    print(f"writes that were dropped at each kill: {losses}")


def test_a_backup_protects_the_disk_again_by_itself(folder: Path) -> None:
    """--reprotect: memory and disks, as before; and the guest goes on again where that is."""
    sides = [folder / "a", folder / "b"]
    for side in sides:
        side.mkdir()
    own = own_disk(folder)
    again = ("--reprotect", f"unix:{sides[1]}/backup.sock", "--reprotect-interval", "20ms")
    with guests.backup(sides[0], *again) as first, guests.backup(sides[1]) as second:
        with writing(folder, first.address, own) as primary:
            wait_writing(first, own)
            os.kill(primary.qemu, signal.SIGKILL)
            primary.process.wait(WAIT_S)
        image = fail_over(first)
        (path,) = first.sockets("*.serial0")
        said = Said(path)  # somebody reads its console throughout
        try:
            until(lambda: (first.status()["vm_protection"] or {})["state"] == "protected", "it is not protected again")
            wait_writing(second, image)
            assert second.status()["primary"]["disk_copies"] == 1
            assert second.status()["primary"]["disk_trouble"] is None
            os.kill(first.status()["vm_pid"], signal.SIGKILL)
        finally:
            said.close()
        assert not goes_on(second, fail_over(second))
        assert "fault" not in said.text


def test_the_guest_sees_it_when_the_disk_is_ahead(folder: Path) -> None:
    """The control: memory as it was committed, and the disk as it was when the host died."""
    for number in range(3):
        side = folder / str(number)
        side.mkdir()
        own = own_disk(side)
        with guests.backup(side) as served, writing(side, served.address, own) as primary:
            wait_writing(served, own)
            os.kill(served.process.pid, signal.SIGSTOP)  # nothing is committed, and the guest goes on
            stands_at = newest_write(own)
            until(lambda own=own, at=stands_at: newest_write(own) > at + DROPPED, "the guest does not write")
            os.kill(primary.qemu, signal.SIGKILL)
            primary.process.wait(WAIT_S)
            os.kill(served.process.pid, signal.SIGCONT)
            until(lambda served=served: not served.status()["connected"], "it is gone")
            ahead = newest_write(own) - newest_write(image_of(served))
            shutil.copyfile(own, image_of(served))
            fault = goes_on(served, fail_over(served))
        if ahead >= DROPPED // 4:  # what was on its way when the backup stood still is committed after all
            assert fault
            return
    pytest.fail("no kill takes a write back")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_guest_outlives_its_disk_server_and_nothing_is_committed_meanwhile(
    folder: Path, number: signal.Signals
) -> None:
    """Only what differs is copied again."""
    own = folder / "web.raw"
    own.write_bytes(bytes(DISK_BYTES) + os.urandom(14 << 20))
    with guests.backup(folder) as served, writing(folder, served.address, own) as primary:
        wait_writing(served, own)
        first = served.status()["primary"]["disk_sent_bytes"]
        assert first >= 14 << 20
        copies = many(1, 6)
        for count in range(2, 2 + copies):
            server = disk_guests.server_of(primary)
            os.kill(server, number)
            until(
                lambda count=count: served.status()["primary"].get("disk_copies") == count,
                "the disk is not copied again",
            )
            epoch = served.status()["epoch"]
            until(lambda epoch=epoch: served.status()["epoch"] > epoch + 2, "nothing is committed after the copy")
        until(lambda: "disk_sent_bytes" in served.status()["primary"], "the primary does not say how it is")
        again = served.status()["primary"]["disk_sent_bytes"] - first
        assert again < copies * 12 << 20, "what does not differ is sent"  # the guest writes meanwhile
        assert "no checkpoint; trying again" in primary.log()
        os.kill(primary.process.pid, signal.SIGKILL)
        own_at = newest_write(own)
        image = fail_over(served)
        print(f"{own_at - newest_write(image)} writes were dropped; the copies sent {first:,} and {again:,} bytes")
        assert not goes_on(served, image)


def test_a_backup_that_dies_at_any_instant_recovers_the_disk_with_the_memory(folder: Path) -> None:
    """It is killed and started again, also in the middle of commits; the link comes back without a new copy."""
    dice, own = random.Random(15), own_disk(folder)
    with ExitStack() as stack:
        served = stack.enter_context(guests.backup(folder, keeps=True))
        primary = stack.enter_context(writing(folder, served.address, own, "--interval", "5ms"))
        wait_writing(served, own)
        for _ in range(many(4, 20)):
            time.sleep(dice.uniform(0.1, 0.6))
            os.kill(served.process.pid, signal.SIGKILL)
            served.process.wait(WAIT_S)
            before = stack.enter_context(guests.backup(folder, keeps=True))
            served = before
            until(lambda served=served: served.status().get("connected"), "the primary does not come back")
            epoch = served.status()["epoch"]
            until(lambda served=served, epoch=epoch: served.status()["epoch"] > epoch, "nothing is committed")
        copies = served.status()["primary"]["disk_copies"]
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(WAIT_S)
        os.kill(primary.process.pid, signal.SIGKILL)
        primary.process.wait(WAIT_S)
        served = stack.enter_context(guests.backup(folder))
        image = fail_over(served)
        print(f"{newest_write(own) - newest_write(image)} writes were dropped")
        assert not goes_on(served, image)
        assert copies == 1


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_disk_that_is_ahead_is_refused_until_it_is_brought_back(folder: Path, form: str) -> None:
    own = folder / f"web.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(own), str(DISK_BYTES)], check=True)
    with guests.backup(folder) as served:
        with writing(folder, served.address, own, form=form) as primary:
            until(lambda: served.status().get("vm") == "waiting", "no QEMU waits")
            until(lambda: newest_write(image_of(served)) > 50, "the guest does not write")
            os.kill(primary.qemu, signal.SIGKILL)
            primary.process.wait(WAIT_S)
        image = fail_over(served)
        assert not goes_on(served, image)
        line = disk_guests.words(f"file={own},if=virtio,format={form}")
        again = ["run", "--name", "web", "--to", served.address, "--", *line]
        back = ["vm", "disk-back", own, "--from", served.address]

        def fails(*arguments: object) -> str:
            with command(*arguments, log=folder / "said") as process:
                assert process.wait(WAIT_S) == 1
            return (folder / "said").read_text()

        assert "is ahead" in fails(*again)
        assert "switch it off" in fails(*back)
        os.kill(served.status()["vm_pid"], signal.SIGKILL)
        until(lambda: served.status()["vm"] == "ended", "it does not end")
        if form == "qcow2":
            assert "no raw disk" in fails(*back)
            return
        with command(*back, log=folder / "said") as process:
            assert process.wait(WAIT_S) == 0
        assert own.read_bytes() == image.read_bytes()
        with writing(folder, served.address, own, "--term", "2"):
            until(lambda: served.status()["term"] == 2 and served.status()["connected"], "it is not protected again")


def test_a_guest_that_ends_in_order_leaves_its_disk_unmarked(folder: Path) -> None:
    own = own_disk(folder)
    with guests.backup(folder) as served, writing(folder, served.address, own) as primary:
        wait_writing(served, own)
        assert Path(f"{own}.remus-ckpt").exists()
        primary.process.send_signal(signal.SIGTERM)
        assert primary.process.wait(WAIT_S) == 0
        assert not Path(f"{own}.remus-ckpt").exists()
        until(lambda: served.status()["lease_left_s"] is None, "there is still something to take over")
