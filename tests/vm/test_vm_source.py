"""A guest as a source: what a checkpoint holds, and what may happen to the guest meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import guests
import numpy as np
import pytest
from services import LONG_S, command, until

from remus_ckpt import open_store
from remus_ckpt.errors import VmError
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.guest import Guest
from remus_ckpt.service.protect import primary_of
from remus_ckpt.vm.command_line import RAM_ID, CommandLine
from remus_ckpt.vm.disk_server import DiskServer
from remus_ckpt.vm.mirror import DiskMirror
from remus_ckpt.vm.part import VmPart
from remus_ckpt.vm.qmp import Qmp, listener_of
from remus_ckpt.vm.source import SLOW_STOP_S, QmpStopper, check_protectable, ram_of

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.build(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def guest(tmp_path: Path, image: Path) -> Iterator[Guest]:
    line = CommandLine.parse(guests.words(image, f"file:{tmp_path}/serial", "-qmp", second(tmp_path)))
    guest = Guest.start(line, "web")
    yield guest
    guest.close()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_disk_server_that_hangs_in_a_stop_is_ended(tmp_path: Path, image: Path, hangs: bool) -> None:
    """A slow stop alone is no reason to end one."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drive = f"file={tmp_path}/disk,if=virtio,format=raw"
    line = CommandLine.parse(guests.words(image, "null", "-drive", drive, "-qmp", second(tmp_path)))
    with ExitStack() as stack:
        guest = stack.enter_context(closing(Guest.start(line, "web")))
        server = stack.enter_context(closing(DiskServer(1 << 20, tmp_path / "nbd")))
        DiskMirror(guest.qmp, "remus-disk0", server)
        asked: list[bool] = []

        def ask() -> None:
            asked.append(not hangs or is_stopped(server.pid))
            if not hangs:
                os.kill(server.pid, signal.SIGCONT)
            with suppress(VmError):
                server.status()

        stopper = stack.enter_context(closing(QmpStopper(guest.qmp, is_guarded=False, on_slow=ask)))
        os.kill(server.pid, signal.SIGSTOP)
        writing = {"command-line": 'qemu-io remus-disk0 "write 0 512"'}
        with closing(user(tmp_path)) as other:
            pending = other.begin([("human-monitor-command", writing)])
            begun = time.monotonic()
            stopper.stop()
            assert asked == [True] and SLOW_STOP_S < time.monotonic() - begun < SLOW_STOP_S + 10
            other.finish(pending)
        assert stopper.device_state()
        stopper.resume()
        if hangs:
            with pytest.raises(VmError):
                server.mark()
        else:
            assert server.mark() > 512


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_guest_runs_on_though_many_wait_for_its_monitor(tmp_path: Path, image: Path) -> None:
    """Its protector is killed in a pause. Two have asked for QEMU's monitor meanwhile, and have given up."""
    path = tmp_path / "second.qmp"
    line = CommandLine.parse(guests.words(image, "null", "-qmp", second(tmp_path)))
    stops = (
        "import sys, time; from remus_ckpt.vm.qmp import Qmp; from remus_ckpt.vm.source import QmpStopper\n"
        "one = QmpStopper(Qmp(sys.argv[1])); one.stop(); print('stopped', flush=True); time.sleep(600)"
    )
    with closing(Guest.start(line, "web")) as guest:
        with subprocess.Popen([sys.executable, "-c", stops, path], stdout=subprocess.PIPE, text=True) as protector:
            try:
                assert protector.stdout is not None and protector.stdout.readline() == "stopped\n"
                assert guest.qmp.execute("query-status")["status"] == "paused"
                while listener_of(path) is not None:  # until the kernel takes no more
                    pass
                os.kill(guest.qmp.pid, signal.SIGSTOP)  # the machine is busy
            finally:
                protector.kill()
        time.sleep(0.5)
        os.kill(guest.qmp.pid, signal.SIGCONT)
        until(lambda: guest.qmp.execute("query-status")["status"] == "running")


def second(folder: Path) -> str:
    """A monitor for a user."""
    return f"unix:{folder}/second.qmp,server=on,wait=off"


def user(folder: Path) -> Qmp:
    return Qmp(folder / "second.qmp", wait_s=LONG_S)


class Desk:
    """A guest protected step by step."""

    def __init__(self, folder: Path, guest: Guest, stack: ExitStack, **options: Any) -> None:
        self.backup = stack.enter_context(Backup(folder / "store", [f"unix:{folder}/desk.sock"]))
        self.store = folder / "store"
        self.file = os.open(ram_of(guest.qmp)[1], os.O_RDONLY)
        stack.callback(os.close, self.file)
        self.source = guest.source(**options)
        stack.callback(self.source.close)
        self.paused: list[np.ndarray[Any, Any]] = []
        self.primary = primary_of(
            self.source, "web", self.backup.addresses[0], on_paused=lambda epoch: self.paused.append(self.ram())
        )
        stack.callback(self.primary.close)

    def ram(self) -> np.ndarray[Any, Any]:
        """All of the guest's RAM, read from its file."""
        return np.frombuffer(os.pread(self.file, guests.MEMORY, 0), dtype=np.uint8)

    def checkpoint(self) -> None:
        self.primary.checkpoint(wait=True)

    def held(self) -> tuple[np.ndarray[Any, Any], VmPart]:
        """What the backup holds."""
        checkpoint = open_store(self.store)["web"][-1].restore()
        assert checkpoint.epoch == self.primary.committed.epoch  # type: ignore[union-attr]
        return np.asarray(checkpoint.memory).reshape(-1), VmPart.unpack(checkpoint.device_state)


@pytest.mark.parametrize("tracking", ["kernel", "compare"])
def test_every_checkpoint_is_the_memory_of_its_pause(tmp_path: Path, guest: Guest, tracking: Any) -> None:
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack, tracking=tracking)
        for _ in range(40):
            desk.checkpoint()
            memory, part = desk.held()
            assert np.array_equal(memory, desk.paused[-1])
            assert part.is_running
            assert part.machine == guest.machine
        assert desk.source.tracker.way == tracking
        assert len({bytes(one) for one in desk.paused}) == 40, "the guest does not run between the pauses"


def test_the_steps_of_the_pause_are_told_apart(tmp_path: Path, guest: Guest) -> None:
    drained: list[int] = []
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack, drain=drained.append)
        for _ in range(3):
            desk.checkpoint()
        status = desk.primary.status()
        for step in ("stop", "drain", "find", "copy", "state", "resume"):
            assert status[f"{step}_ms"]["p50"] >= 0
        assert status["stop_ms"]["p50"] > status["drain_ms"]["p50"]
        assert drained == [0, 1, 2]


def test_a_pause_of_the_user_lasts(tmp_path: Path, guest: Guest) -> None:
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack)
        desk.checkpoint()
        monitor = user(tmp_path)
        stack.callback(monitor.close)
        monitor.execute("stop")
        still = desk.ram()
        for _ in range(3):
            desk.checkpoint()
            assert monitor.execute("query-status")["status"] == "paused"
        memory, part = desk.held()
        assert not part.is_running
        assert np.array_equal(memory, still)
        monitor.execute("cont")
        until(lambda: not np.array_equal(desk.ram(), still))
        desk.checkpoint()
        assert desk.held()[1].is_running


def test_what_a_user_does_between_the_question_and_the_stop_lasts(tmp_path: Path, guest: Guest) -> None:
    with (
        closing(user(tmp_path)) as monitor,
        closing(QmpStopper(guest.qmp, is_guarded=False)) as stopper,
    ):
        for command, runs in (("cont", True), ("stop", False), ("cont", True)):
            stopper.look()
            monitor.execute(command)
            stopper.stop()
            assert stopper.is_running is runs
            stopper.device_state()
            stopper.resume()
            assert monitor.execute("query-status")["running"] is runs


def test_a_guest_that_is_let_run_in_the_pause_breaks_it(tmp_path: Path, guest: Guest) -> None:
    """The pause is repeated, and the checkpoint is of one instant."""
    with ExitStack() as stack:
        monitor = user(tmp_path)
        stack.callback(monitor.close)
        pauses = []

        def drain(epoch: int) -> None:
            pauses.append(epoch)
            if pauses == [0, 1]:
                monitor.execute("cont")

        desk = Desk(tmp_path, guest, stack, drain=drain)
        desk.checkpoint()
        desk.checkpoint()
        assert pauses == [0, 1, 1]
        assert np.array_equal(desk.held()[0], desk.paused[-1])


def test_a_reset_is_a_change_like_any_other(tmp_path: Path, guest: Guest) -> None:
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack)
        desk.checkpoint()
        monitor = user(tmp_path)
        stack.callback(monitor.close)
        monitor.execute("system_reset")
        time.sleep(0.2)
        desk.checkpoint()
        assert guest.stopper is not None and "RESET" in guest.stopper.take_events()
        assert np.array_equal(desk.held()[0], desk.paused[-1])


def test_a_frozen_qemu_is_waited_for(tmp_path: Path, guest: Guest) -> None:
    """The pause fails after its deadline; the guest runs on as soon as QEMU does, and so does the protection."""
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack)
        desk.checkpoint()
        assert guest.stopper is not None
        guest.stopper.timeout_s = 0.5
        os.kill(guest.qmp.pid, signal.SIGSTOP)
        with pytest.raises(VmError):
            desk.checkpoint()
        os.kill(guest.qmp.pid, signal.SIGCONT)
        guest.stopper.timeout_s = 30.0
        desk.checkpoint()
        assert np.array_equal(desk.held()[0], desk.paused[-1])
        before = desk.ram()
        until(lambda: not np.array_equal(desk.ram(), before))


@pytest.mark.parametrize("what", ["quit", "kill"])
def test_the_end_of_qemu(tmp_path: Path, guest: Guest, what: str) -> None:
    """Whether it was wished is known."""
    with ExitStack() as stack:
        desk = Desk(tmp_path, guest, stack)
        desk.checkpoint()
        assert not guest.has_crashed
        if what == "quit":
            monitor = user(tmp_path)
            stack.callback(monitor.close)
            monitor.execute("quit")
        else:
            os.kill(guest.qmp.pid, signal.SIGKILL)
        assert guest.stopper is not None
        until(lambda: not guest.stopper.alive())  # type: ignore[union-attr]
        assert guest.has_crashed == (what == "kill")


def test_a_guest_with_other_memory_is_refused(tmp_path: Path, image: Path) -> None:
    """Also where the command line does not show it."""
    ram, qmp = tmp_path / "ram", tmp_path / "qmp"
    line = CommandLine.parse(guests.words(image, "null")).with_memory(ram, qmp)
    process = subprocess.Popen([*line, "-device", "secondary-vga"])
    try:
        until(qmp.exists)
        with pytest.raises(VmError, match="secondary-vga"):
            Guest.attach(str(qmp))
        with closing(Qmp(qmp)) as monitor, pytest.raises(VmError, match=r"vga\.vram"):
            check_protectable(monitor, RAM_ID)
    finally:
        process.kill()
        process.wait()


def test_a_guest_of_others_is_protected_and_runs_on_when_its_protection_is_killed(tmp_path: Path, image: Path) -> None:
    """In a pause, too: a guard lets it run."""
    ram, qmp = tmp_path / "ram", tmp_path / "qmp"
    serial = tmp_path / "serial"
    arguments = ["qemu-args", "--ram", str(ram), "--qmp", str(qmp), "--"]
    line = guests.words(image, f"unix:{serial},server=on,wait=off")
    printed = subprocess.run(
        [sys.executable, "-m", "remus_ckpt", *arguments, *line], capture_output=True, text=True, check=True
    )
    process = subprocess.Popen(["/bin/sh", "-c", "exec " + printed.stdout])
    try:
        console = guests.Console(serial)
        console.counts_on()
        with guests.backup(tmp_path) as served:
            for round in range(4):
                how = ("protect", f"qemu:{qmp}", "--name", "web", "--to", served.address, "--interval", "1ms")
                with command(*how, log=tmp_path / f"protect-{round}.log") as protecting:
                    epoch = served.status().get("epoch") or -1
                    until(lambda epoch=epoch: (served.status().get("epoch") or -1) > epoch + 20)
                    # With these pauses, every second kill falls into one.
                    os.kill(protecting.pid, signal.SIGKILL)
                assert console.counts_on(10)
            served.failover()
            until(lambda: served.status()["vm"] == "running")
            with served.console() as survivor:
                survivor.counts_on(5)
        console.close()
    finally:
        process.kill()
        process.wait()


def test_a_guest_that_is_switched_off_needs_no_backup(tmp_path: Path, image: Path) -> None:
    automatic = ("--lease", "500ms", "--auto-failover", "--fence", "true")
    with guests.backup(tmp_path, *automatic) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served)
        primary.console.say("q")
        assert primary.process.wait(LONG_S) == 0
        until(lambda: not served.status()["connected"])
        assert served.status()["last_end"]["goodbye"]
        time.sleep(1.5)
        assert served.status()["role"] == "standby"
