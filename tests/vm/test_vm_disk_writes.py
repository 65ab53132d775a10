"""Disks under the commands that users type, written by QEMU itself at chosen instants, so that every byte is known."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import disk_guests
import guests
import pytest
from guests import Backup, Console, Primary, end_descendants, wait_committed
from services import command, until

from remus_ckpt.vm.qmp import Qmp

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
SIZE = 1 << 20


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.build(tmp_path_factory.mktemp("guest"))


@contextmanager
def running(folder: Path, to: str, kernel: Path, *drives: str) -> Iterator[tuple[Primary, Qmp]]:
    """The guest that counts, with drives, and a monitor of ours."""
    serial, monitor = folder / "primary.serial", folder / "monitor"
    words = guests.words(kernel, f"unix:{serial},server=on,wait=off", "-qmp", f"unix:{monitor},server=on,wait=off")
    for drive in drives:
        words += ["-drive", drive]
    arguments = ["run", "--name", "web", "--to", to, "--log-format", "json", "--"]
    with command(*arguments, *words, log=folder / "primary.log") as process:
        console = Console(serial)
        try:
            console.counts_on()
            with closing(Qmp(monitor)) as qmp:
                yield Primary(process, folder / "primary.log", console), qmp
        finally:
            console.close()
            end_descendants(process)


def io(qmp: Qmp, what: str, disk: str = "remus-disk0") -> None:
    """Read or write a disk through QEMU, as a device of the guest would. It must succeed."""
    said = qmp.execute("human-monitor-command", {"command-line": f'qemu-io {disk} "{what}"'})
    assert "failed" not in said and "rror" not in said, said


def image(folder: Path, disk: str = "remus-disk0") -> Path:
    """That of the newest copy."""
    return max((folder / "disks" / "web").glob(f"{disk}.*.raw"), key=lambda path: path.stat().st_mtime_ns)


@contextmanager
def backup(folder: Path, *, keeps: bool = False) -> Iterator[Backup]:
    with guests.backup(folder, "--vm-disks", folder / "disks", keeps=keeps) as served:
        yield served


def commit(served: Backup) -> None:
    """Wait until everything of now is committed."""
    epoch = served.status()["epoch"]
    until(lambda: served.status()["epoch"] > epoch + 2)


def go_on(served: Backup) -> Qmp:
    """The guest goes on there; returns its monitor."""
    until(lambda: not served.status()["connected"])
    served.failover()
    until(lambda: served.status()["vm"] == "running")
    return Qmp(served.sockets("*.guest")[0])


def test_images_stand_at_the_commit_whatever_the_form_of_the_disk(tmp_path: Path, kernel: Path) -> None:
    raw, qcow2, fixed = tmp_path / "a,b.raw", tmp_path / "web.qcow2", tmp_path / "fixed"
    raw.write_bytes(data := os.urandom(SIZE))
    fixed.write_bytes(os.urandom(SIZE))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), str(SIZE)], check=True)
    drives = [
        f"file={str(raw).replace(',', ',,')},if=virtio,format=raw,cache.no-flush=on",
        f"file={qcow2},if=virtio,format=qcow2,id=data",
        f"file={fixed},if=virtio,format=raw,readonly=on",
    ]
    with backup(tmp_path) as served, running(tmp_path, served.address, kernel, *drives) as (primary, qmp):
        wait_committed(served)
        assert image(tmp_path).read_bytes() == data
        assert image(tmp_path, "data").read_bytes() == bytes(SIZE)
        io(qmp, "write -P 0xab 4k 64k")
        io(qmp, "write -z 64k 8k")
        io(qmp, "write -P 0xcd 512k 512", "data")
        commit(served)
        expected = data[:4096] + b"\xab" * 61440 + bytes(8192) + data[73728:]
        assert image(tmp_path).read_bytes() == expected
        assert image(tmp_path, "data").read_bytes() == bytes(SIZE // 2) + b"\xcd" * 512 + bytes(SIZE // 2 - 512)
        told = served.status()["primary"]
        assert (told["disk_trouble"], told["disk_copies"]) == (None, 2)
        os.kill(primary.qemu, signal.SIGKILL)
        with closing(go_on(served)) as survivor:
            io(survivor, "read -P 0xab 4k 60k")
            io(survivor, "read -P 0xcd 512k 512", "data")
            io(survivor, "write -P 0x11 0 512", "data")
        with served.console() as console:
            console.counts_on(5)
    assert image(tmp_path, "data").read_bytes()[:512] == b"\x11" * 512


def stands_still_between_pauses(primary: Primary, qmp: Qmp) -> bool:
    """Freeze `run`; returns whether that has not happened in a pause. Then it runs on."""
    primary.process.send_signal(signal.SIGSTOP)
    if qmp.execute("query-status")["running"]:
        return True
    primary.process.send_signal(signal.SIGCONT)
    return False


def test_what_is_not_committed_is_dropped_and_only_the_own_disk_has_it(tmp_path: Path, kernel: Path) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))
    drive = f"file={own},if=virtio,format=raw,cache=writethrough"
    with backup(tmp_path) as served, running(tmp_path, served.address, kernel, drive) as (primary, qmp):
        wait_committed(served)
        io(qmp, "write -P 1 0 64k")
        commit(served)
        until(lambda: stands_still_between_pauses(primary, qmp))  # from here on, nothing is committed
        io(qmp, "write -P 2 4k 4k")
        assert own.read_bytes()[:12288] == b"\1" * 4096 + b"\2" * 4096 + b"\1" * 4096
        os.kill(primary.qemu, signal.SIGKILL)
        primary.process.kill()
        with closing(go_on(served)) as survivor:
            io(survivor, "read -P 1 0 64k")
        assert Path(f"{own}.remus-ckpt").exists()


def test_a_backup_that_comes_back_needs_no_new_copy(tmp_path: Path, kernel: Path) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))
    drive = f"file={own},if=virtio,format=raw"
    expected = b"\1" * 4096 + b"\2" * 4096 + b"\1" * 57344 + bytes(SIZE - 65536)
    with backup(tmp_path, keeps=True) as first, running(tmp_path, first.address, kernel, drive) as (_, qmp):
        wait_committed(first)
        io(qmp, "write -P 1 0 64k")
        os.kill(first.process.pid, signal.SIGKILL)
        io(qmp, "write -P 2 4k 4k")
        with backup(tmp_path, keeps=True) as second:
            until(lambda: second.status().get("connected") and second.status()["primary"])
            commit(second)
            assert image(tmp_path).read_bytes() == expected
            assert second.status()["primary"]["disk_copies"] == 1
            image(tmp_path).unlink()  # one that is gone is copied anew, and all of it is there again
            os.kill(second.process.pid, signal.SIGKILL)
            second.process.wait()
            with backup(tmp_path) as third:
                until(lambda: third.status().get("primary", {}).get("disk_copies") == 2)
                commit(third)
                assert image(tmp_path).read_bytes() == expected


def test_a_disk_server_that_dies_is_replaced(tmp_path: Path, kernel: Path) -> None:
    """What was written meanwhile is there too, and the old image stands until the new one does."""
    own = tmp_path / "web.raw"
    own.write_bytes(os.urandom(SIZE))
    drive = f"file={own},if=virtio,format=raw"
    with backup(tmp_path) as served, running(tmp_path, served.address, kernel, drive) as (primary, qmp):
        wait_committed(served)
        before = image(tmp_path)
        server = disk_guests.server_of(primary)
        os.kill(server, signal.SIGKILL)
        io(qmp, "write -P 3 0 64k")
        until(lambda: served.status()["primary"].get("disk_copies") == 2)
        io(qmp, "write -P 4 64k 64k")
        commit(served)
        assert image(tmp_path) != before and not before.exists()
        assert image(tmp_path).read_bytes()[:131072] == b"\3" * 65536 + b"\4" * 65536
        assert served.status()["primary"]["disk_sent_bytes"] < SIZE + 262144, "only what differs is sent again"
        assert "no checkpoint is taken until" in primary.log()


def test_a_copy_needs_the_images_of_its_disks_at_hand(tmp_path: Path, kernel: Path) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))

    def refused(where: str) -> str:
        with command("vm", "start", where, log=tmp_path / "said") as process:
            assert process.wait(60) == 1
        return (tmp_path / "said").read_text()

    with backup(tmp_path) as served:
        with running(tmp_path, served.address, kernel, f"file={own},if=virtio,format=raw"):
            wait_committed(served)
        assert "on its backup's host" in refused(f"{served.address}/web")
    assert "remus-disk0" in refused(f"store:{tmp_path}/store/web")  # the backup has them in another folder


def test_a_survivor_is_protected_again_with_its_disk(tmp_path: Path, kernel: Path) -> None:
    """To another backup, and then to the first again: there, only what differs from the image it left is sent."""
    sides = [tmp_path / "a", tmp_path / "b"]
    own = tmp_path / "web.raw"
    own.write_bytes(data := os.urandom(SIZE))
    for side in sides:
        side.mkdir()
    with backup(sides[0]) as first, backup(sides[1]) as second:
        with running(tmp_path, first.address, kernel, f"file={own},if=virtio,format=raw") as (primary, _):
            wait_committed(first)
            os.kill(primary.qemu, signal.SIGKILL)
        here, there = first, second
        for number in (2, 3):
            until(lambda here=here: not here.status()["connected"])
            here.failover()
            until(lambda here=here: here.status()["vm"] == "running")
            term = here.status()["term"]
            (socket,) = here.sockets(f"*.{term}.guest")
            with closing(Qmp(socket)) as qmp:
                io(qmp, f"write -P {number} {number * 64}k 64k")
            arguments = ["protect", f"qemu:{socket}", "--name", "web", "--to", there.address, "--term", term + 1]
            with command(*arguments, "--log-format", "json", log=tmp_path / f"protect-{number}.log") as process:
                until(lambda there=there, term=term: there.status().get("term") == term + 1)
                wait_committed(there)
                commit(there)
                told = there.status()["primary"]["disk_sent_bytes"]
                os.kill(here.status()["vm_pid"], signal.SIGKILL)
                process.kill()
            here, there = there, here
        assert told < SIZE // 2, "the first backup has most of it already"
        until(lambda: not here.status()["connected"])
        here.failover()
        until(lambda: here.status()["vm"] == "running")
        with closing(Qmp(here.sockets(f"*.{here.status()['term']}.guest")[0])) as survivor:
            io(survivor, "read -P 2 128k 64k")
            io(survivor, "read -P 3 192k 64k")
        assert own.read_bytes() == data
