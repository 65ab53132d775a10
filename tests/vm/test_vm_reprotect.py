"""A guest that went on is protected again by the backup that it went on at, and the next failover is as good."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import guests
import pytest
from bridging import frame, network, send_all
from services import until
from support import Command

from remus_ckpt.vm.bridge import Bridge, guest_pair
from remus_ckpt.vm.network import GuestNetwork


def protection(served: guests.Backup) -> str:
    """What the backup says of the guest that went on there."""
    return str((served.status().get("vm_protection") or {}).get("state"))


def protectors(qmp: Path) -> list[int]:
    """The processes that protect the guest of this socket."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        words = guests.line_of(int(entry)).split(b"\0")
        if b"protect" in words and f"qemu:{qmp}".encode() in words:
            found.append(int(entry))
    return found


@pytest.mark.slow
@pytest.mark.qemu
def test_a_survivor_is_protected_again_once_a_backup_is_there(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    image = guests.build(tmp_path)
    options = ("--reprotect", f"unix:{second}/backup.sock", "--reprotect-interval", "20ms")
    with guests.backup(first, *options, keeps=True) as here:
        with guests.running(first, here.address, image) as primary:
            guests.wait_committed(here)
            os.kill(primary.process.pid, signal.SIGKILL)
        here.failover()
        until(lambda: here.status()["vm"] == "running" and here.status()["takeover"] == "succeeded")
        until(lambda: protection(here) == "waiting" and here.status()["vm_protection"]["why"])
        health: dict[str, Any] = here.status()["health"]
        assert health["state"] == "taken over" and f"unix:{second}/backup.sock" in health["words"]
        (qmp,) = here.sockets("*.guest")
        assert not protectors(qmp), "it would hold the guest's output, and there is no backup"
        # Somebody reads its console throughout: a serial port without a reader may stand still.
        with here.console() as console, guests.backup(second) as there:
            until(lambda: protection(here) == "protected")
            assert here.status()["health"]["state"] == "protected"
            guests.wait_committed(there)
            until(lambda: (there.status()["primary"].get("drain_ms") or {}).get("p50") is not None)
            # A backup that is started again finds it protected, and leaves it so.
            before = protectors(qmp)
            assert len(before) == 1
            os.kill(here.process.pid, signal.SIGKILL)
            here.process.wait()
            with guests.backup(first, *options) as again:
                until(lambda: protection(again) == "protected")
                assert protectors(qmp) == before
                console.counts_on(5)
                # Its protector dies: another takes its place.
                os.kill(before[0], signal.SIGKILL)
                until(lambda: protectors(qmp) not in ([], before) and protection(again) == "protected")
                console.counts_on(5)
                os.kill(again.status()["vm_pid"], signal.SIGKILL)
                console.ends()
                last = console.last
                until(lambda: not there.status()["connected"])
                there.failover()
                until(lambda: there.status()["vm"] == "running")
                with there.console() as survivor:
                    assert survivor.counts_on(20) > last - 5 * 1000
                assert again.status()["vm"] == "ended" and again.status()["health"]["state"] == "taken over"
                until(lambda: not protectors(qmp))


@pytest.mark.root
def test_output_is_held_from_the_first_pause_on(tmp_path: Path) -> None:
    """A survivor keeps its network until the pause of the first checkpoint that could be taken over."""
    with network() as net:
        ours, theirs = guest_pair()
        path = tmp_path / "bridge"
        with closing(Bridge.start([net.tap("tap1")], listen=path)) as bridge:
            bridge.attach(0, ours)
            bridge.let_pass()
            ear = net.ear("tap1")
            taken = GuestNetwork.of_survivor(path)
            try:
                send_all(theirs, [frame(1)])
                assert ear.numbers(1) == [1]
                taken.before_pause()
                send_all(theirs, [frame(2)])
                taken.drain(0)
                send_all(theirs, [frame(3)])
                assert ear.silence()
                taken.committed(0)
                assert ear.numbers(2, 0.3) == [2]
                output = taken.output()
                assert output is not None and (output.held_frames, output.released_frames) == (1, 2)
            finally:
                taken.close()
                theirs.close()
                ear.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--reprotect", "unix:other"], "needs --run-vms"),
        (["--run-vms", "--reprotect", "unix:s"], "that is this backup"),
        (["--run-vms", "--reprotect", "what?"], "what?"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    options: list[str],
    why: str,
) -> None:
    remus = Command(monkeypatch, capfdbinary)
    done = remus("backup", "--listen", "unix:s", "--store", tmp_path / "store", *options)
    assert done.code == 2 and why in done.err
    assert not (tmp_path / "store").exists()
