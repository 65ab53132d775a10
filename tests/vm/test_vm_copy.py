"""A copy of any checkpoint runs beside the guest, and changes nothing of it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import disk_guests
import guests
import pytest
from services import LONG_S, command, until

from remus_ckpt import open_store
from remus_ckpt.errors import VmError
from remus_ckpt.vm.qmp import Qmp

pytestmark = [pytest.mark.qemu, pytest.mark.slow]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with checkpoints of a guest."""
    folder = tmp_path_factory.mktemp("kept")
    image = guests.build(folder)
    with guests.backup(folder) as served, guests.running(folder, served.address, image) as primary:
        guests.wait_committed(served, 10)
        primary.process.terminate()
        primary.process.wait(LONG_S)
    return folder


def counts(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(next(line for line in process.stdout if len(line) == 9), 16)


def test_any_checkpoint_runs_again(kept: Path, tmp_path: Path) -> None:
    where = f"store:{kept}/store/web"
    first, newest = open_store(kept / "store")["web"][0], open_store(kept / "store")["web"][-1]
    with command("vm", "start", where, "--at", first.epoch, log=tmp_path / "old") as old:
        begun = counts(old)
        assert counts(old) > begun
        with command("vm", "start", where, log=tmp_path / "new") as new:
            assert counts(new) > begun
            assert counts(new) < counts(new)
        old.terminate()
        assert old.wait(LONG_S) == 0
    with command("vm", "start", where, "--at", first.epoch, log=tmp_path / "again") as again:
        # As far as it had come then, to a few numbers: half of one is lost before it is seen.
        assert abs(counts(again) - begun) < 64 * 5 * 4
    assert open_store(kept / "store")["web"][-1].epoch == newest.epoch


def test_a_copy_can_wait_to_be_looked_at(kept: Path, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    with command("vm", "start", f"store:{kept}/store/web", "--paused", "--qmp", qmp, log=tmp_path / "log") as copy:
        until(lambda: "paused" in (tmp_path / "log").read_text())
        with closing(Qmp(qmp)) as monitor:
            assert monitor.execute("query-status")["status"] == "paused"
            monitor.execute("cont")
            assert counts(copy) < counts(copy)
            monitor.execute("quit")
        assert copy.wait(LONG_S) == 0


def test_a_copy_has_the_disk_of_its_moment(tmp_path: Path) -> None:
    """The guest compares what it reads from its disk with what it remembers of its writing."""
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(disk_guests.DISK_BYTES))
    where = f"store:{tmp_path}/store/web"
    with guests.backup(tmp_path) as served, disk_guests.writing(tmp_path, served.address, own) as primary:
        until(lambda: disk_guests.newest_write(own) > 200 and served.status().get("vm") == "waiting")
        seen = served.status()["epoch"]
        until(lambda: served.status()["epoch"] > seen + 5)
        image = disk_guests.image_of(served)
        begun = disk_guests.newest_write(image)
        # An earlier moment and the newest, while the backup writes on.
        for at in (["--at", str(seen)], []):
            qmp = tmp_path / f"qmp{len(at)}"
            said = copied_guest_says(
                [sys.executable, "-m", "remus_ckpt", "vm", "start", where, *at, "--qmp", str(qmp)], qmp
            )
            assert not said, said
        assert disk_guests.newest_write(image) > begun
        assert not primary.console.has_ended
    refused = subprocess.run(
        [sys.executable, "-m", "remus_ckpt", "vm", "start", where, "--vm-disks", str(tmp_path / "elsewhere")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "remus-disk0" in refused.stderr


def copied_guest_says(words: list[str], qmp: Path) -> str:
    """What a copy says of faults, once it has looked at most of its blocks."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(qmp.exists)
            with closing(Qmp(qmp, wait_s=LONG_S)) as monitor:
                try:
                    until(lambda: writes_of(monitor) > disk_guests.CHECKED)
                except VmError as error:
                    raise AssertionError(process.communicate(timeout=LONG_S)) from error
                monitor.execute("quit")
            out, err = process.communicate(timeout=LONG_S)
            return "".join(line for line in (out + err).splitlines() if "fault" in line or "cannot" in line)
        finally:
            process.kill()


def writes_of(monitor: Qmp) -> int:
    """How many times a copy has written to its disk."""
    return sum(one["stats"]["wr_operations"] for one in monitor.execute("query-blockstats"))


def test_what_is_no_guest_is_refused(tmp_path: Path) -> None:
    import numpy as np

    from remus_ckpt import Backup, protect

    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/sock"]),
        protect({"a": np.zeros(9)}, to=f"unix:{tmp_path}/sock", name="array") as protection,
    ):
        protection.checkpoint(wait=True)
    words = [sys.executable, "-m", "remus_ckpt", "vm", "start", f"store:{tmp_path}/store/array"]
    ran = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    _, said = ran.communicate()
    assert ran.returncode == 1
    assert "not a guest's" in said
    assert not list(Path("/dev/shm").glob(f"remus-ckpt-copy-{ran.pid}-*"))
