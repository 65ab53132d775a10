"""A guest to protect: its QEMU is started here, or runs already."""

from __future__ import annotations

import logging
import os
import secrets
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from remus_ckpt.errors import Fenced, SourceError, VmError
from remus_ckpt.loop import StopSignal, Taken
from remus_ckpt.observe.log import News, log
from remus_ckpt.service.commands import ShellCommand
from remus_ckpt.service.guest_disks import GuestDisks, unmark_own
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.release import Committed
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, Tracking
from remus_ckpt.store import History
from remus_ckpt.vm.command_line import RAM_ID, CommandLine, Nic, without_additions
from remus_ckpt.vm.disk_copy import copies_of
from remus_ckpt.vm.host import machine_of
from remus_ckpt.vm.network import GuestNetwork
from remus_ckpt.vm.part import Machine, VmPart, is_vm
from remus_ckpt.vm.qmp import Qmp
from remus_ckpt.vm.source import (
    QemuSource,
    QmpStopper,
    check_protectable,
    command_of,
    ram_of,
    version_of,
)
from remus_ckpt.vm.standby import StandbyQemu

START_S = 60.0
_RETRY_S = 1.0
_SHM = Path("/dev/shm")
_ORDERLY = frozenset({"guest-shutdown", "guest-panic", "host-qmp-quit", "host-signal", "host-ui"})
"""Reasons of QEMU's for its end that somebody has wished for. A crash gives none."""


def start_qemu(
    words: Sequence[str], sockets: Sequence[int] = (), *, stdin: int = subprocess.DEVNULL, stdout: int | None = 2
) -> ShellCommand:
    """Start a QEMU, which is killed when this process ends. Raises RemusError."""
    return ShellCommand("exec " + shlex.join(words), stdin=stdin, stdout=stdout, pass_fds=sockets)


def start_standby(
    machine: Machine,
    image: int,
    qmp: Path,
    console: Callable[[str], str],
    plug: Callable[[Sequence[Nic]], GuestNetwork] | None = None,
    *,
    disks: Mapping[str, Path | str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = 2,
) -> StandbyQemu:
    """Start a paused QEMU that can go on with a guest.

    machine: from a checkpoint, perhaps a peer's
    image: a descriptor of the file that holds the guest's memory, or will; QEMU gets it, whatever its name
    qmp: where its control socket is to be
    console: as for `CommandLine.as_standby`
    plug: gives the guest's NICs a network; None for none
    disks: as for `CommandLine.as_standby`
    Raises VmError if this host is not what the guest needs, with the difference; RemusError.
    """
    line = CommandLine.from_peer(machine.qemu, machine.arguments)
    if line.memory_bytes != machine.memory_bytes:
        raise VmError(f"the guest has {machine.memory_bytes} bytes of RAM, its command line {line.memory_bytes}")
    # Twice, since a file that is missing would be QEMU's own complaint.
    _check(machine, machine_of(line, machine.version, may_miss=True))
    qmp.unlink(missing_ok=True)
    network = plug(line.nics) if plug is not None and line.nics else None
    try:
        sockets = [] if network is None else network.sockets
        words = line.as_standby(f"/proc/self/fd/{image}", qmp, console, sockets, disks)
        process = start_qemu(words, [image, *sockets], stdin=stdin, stdout=stdout)
    except BaseException:
        if network is not None:
            network.close()
        raise
    standby = StandbyQemu(process, qmp, network)
    try:
        _check(machine, machine_of(line, version_of(standby.qmp)))
    except BaseException:
        standby.close()
        raise
    return standby


def _check(there: Machine, here: Machine) -> None:
    if differences := there.differences(here):
        raise VmError("the guest cannot go on here: " + "; ".join(differences))


def bridge_of(qmp: Path) -> Path:
    """The socket of the bridge of a guest that went on, beside its QMP socket."""
    return qmp.with_name(qmp.name + ".bridge")


class Guest:
    """A guest, and the QEMU that it runs in. It is given over to a source by `source`.

    qmp: closed with this object
    process: None if somebody else has started it; else it is killed with this object
    network: None if it has none; closed with this object
    disks: that it writes to; None if there are none; closed with this object
    """

    def __init__(
        self,
        qmp: Qmp,
        line: CommandLine,
        ram_id: str,
        ram: str,
        process: ShellCommand | None,
        network: GuestNetwork | None = None,
        disks: GuestDisks | None = None,
    ) -> None:
        self._ram = ram
        self.disks = disks
        self._line = line
        self.network = network
        self._process = process
        self.qmp = qmp
        self.stopper: QmpStopper | None = None
        check_protectable(qmp, ram_id)
        self.machine = machine_of(line, version_of(qmp))

    @classmethod
    def start(cls, line: CommandLine, name: str) -> Guest:
        """Start a QEMU whose RAM can be protected. Raises VmError, RemusError.

        Its RAM is a file in /dev/shm that has no name once QEMU runs: it is gone when QEMU and we are.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-ckpt-")))
            ram = _SHM / f"remus-ckpt-{name}-{secrets.token_hex(4)}"
            stack.callback(lambda: ram.unlink(missing_ok=True))
            network = GuestNetwork([nic.tap for nic in line.nics]) if line.nics else None
            sockets = []
            if network is not None:
                stack.callback(network.close)
                sockets = network.sockets
            process = start_qemu(line.with_memory(ram, folder / "qmp", sockets), sockets, stdin=0, stdout=None)
            stack.callback(process.wait, 10.0)
            stack.callback(process.kill)
            qmp = Qmp(folder / "qmp", wait_s=START_S, is_starting=lambda: process.wait(0) is None)
            stack.callback(qmp.close)
            if network is not None:
                network.plug_in()
            _, file = ram_of(qmp)
            guest = cls(qmp, line, RAM_ID, file, process, network, _disks_of(qmp, line, folder, stack))
            guest._cleanup = stack.pop_all()
            ram.unlink()
        return guest

    @classmethod
    def attach(cls, path: str) -> Guest:
        """Take a QEMU that runs, by its QMP socket, and its bridge with it if it is a guest that went on.

        Raises VmError if it was not started for protection, BridgeError.
        """
        with ExitStack() as stack:
            qmp = Qmp(path)
            stack.callback(qmp.close)
            ram_id, file = ram_of(qmp)
            network, bridge = None, bridge_of(Path(path))
            if bridge.exists():
                network = GuestNetwork.of_survivor(bridge)
                stack.callback(network.close)
            words = without_additions(command_of(qmp.pid), [] if network is None else network.taps)
            line = CommandLine.parse(words)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-ckpt-")))
            guest = cls(qmp, line, ram_id, file, None, network, _disks_of(qmp, line, folder, stack))
            guest._cleanup = stack.pop_all()
        return guest

    def source(
        self,
        *,
        drain: Callable[[int], None] | None = None,
        tracking: Tracking = "auto",
        audit: int = AUDIT_PAUSES,
    ) -> QemuSource:
        """The guest as a source; closing that releases the guest, and hangs up. Raises like `QemuSource`.

        drain: as for `QemuSource`, for a guest without a network
        """
        network, disks = self.network, self.disks

        def before_pause() -> None:
            if disks is not None:
                disks.check()
            if network is not None:
                network.before_pause()

        # A QEMU that we have started dies with us, in a pause too.
        on_slow = (lambda: None) if disks is None else disks.end_what_hangs
        self.stopper = QmpStopper(self.qmp, is_guarded=self._process is None, on_slow=on_slow)
        return QemuSource(
            self.stopper,
            self._ram,
            self.machine,
            before_pause=before_pause,
            drain=drain if network is None else network.drain,
            status=(lambda: {}) if network is None else network.status,
            disks=disks,
            tracking=tracking,
            audit=audit,
        )

    def released_before(self, call: Callable[[Committed], None] | None) -> Callable[[Committed], None] | None:
        """What to do at each commit: let the guest's output leave, then call this."""
        network, disks = self.network, self.disks
        if network is None and disks is None:
            return call

        def on_commit(committed: Committed) -> None:
            if network is not None:
                network.committed(committed.epoch)
            if disks is not None:
                disks.committed(committed.epoch)
            if call is not None:
                call(committed)

        return on_commit

    @property
    def has_crashed(self) -> bool:
        """Whether QEMU has ended, and nobody wished it. A takeover is due then."""
        stopper = self.stopper
        return stopper is not None and not stopper.alive() and stopper.ended_by not in _ORDERLY

    def protected_by(
        self, primary: Primary, stop: StopSignal, on_turn: Callable[[], None] = lambda: None
    ) -> Iterator[Taken]:
        """The checkpoints of `Primary.run`. While QEMU lives, whatever QMP complains of is reported and tried again.

        A guest that has been switched off needs no backup any more; if QEMU has crashed, the primary falls silent
        instead, so that the backup takes over. Raises VmError then, and what `run` raises.

        on_turn: called often while disks are copied
        """
        news = News()
        while True:
            try:
                if self.disks is not None:
                    self.disks.copy(primary, stop, on_turn)
                for taken in primary.run():
                    self._report(primary.name)
                    yield taken
                break
            except SourceError as error:
                if not self._is_alive or stop.is_set:
                    primary.ended = primary.ended or ("stopped" if self._is_alive else "")
                    break
                if news.is_new(str(error)):
                    log("no checkpoint; trying again", level=logging.ERROR, name=primary.name, reason=str(error))
                poll = select.poll()
                poll.register(stop, select.POLLIN)
                poll.poll(_RETRY_S * 1000)
        if self._is_alive and self._process is None and self.network is not None:
            self.network.let_pass()  # it is not protected any more, as the user wishes
        if not self._is_alive:
            self._report(primary.name)
            if self.has_crashed:
                primary.hang_up()
                raise VmError(
                    "QEMU has ended, and not because the guest or a user wished it: the backup takes over when its "
                    "lease is over, or with `remus-ckpt failover`"
                )
            primary.ended = primary.ended or "source gone"
        if self._process is not None and primary.is_linked:  # it ends with us, which the backup is told
            unmark_own(self._line.disks)

    @property
    def _is_alive(self) -> bool:
        return self.stopper is not None and self.stopper.alive()

    def _report(self, name: str) -> None:
        if self.stopper is not None:
            for event in self.stopper.take_events():
                log("guest", name=name, event=event)

    def killed_before(self, call: Callable[[Fenced], None] | None) -> Callable[[Fenced], None]:
        """What to do when another side has taken over: end QEMU at once, then call this."""

        def on_fenced(error: Fenced) -> None:
            self.kill()
            if call is not None:
                call(error)

        return on_fenced

    def kill(self) -> None:
        """End QEMU at once, also if somebody else has started it: another side has taken over its guest."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10.0)
        elif self.stopper is not None:
            self.stopper.kill()

    def close(self) -> None:
        """Hang up. A QEMU that was started here ends."""
        self._cleanup.close()

    _cleanup: ExitStack


def _disks_of(qmp: Qmp, line: CommandLine, folder: Path, stack: ExitStack) -> GuestDisks | None:
    if not line.disks:
        return None
    disks = GuestDisks(qmp, line.disks, folder)
    stack.callback(disks.close)
    return disks


class Copy:
    """A guest as it was at a checkpoint, with memory of its own. It ends with this object.

    history: of the guest
    at: which checkpoint: an epoch or a time; None for the newest
    qmp: where its control socket is to be once the guest goes on; None for nowhere
    disks: the folder with the images of its disks; None if they are on another host
    Raises NoCheckpoint, VmError if the checkpoint is not a guest's, it cannot go on here, or what its disks were is not
    kept, and what a restore raises.
    """

    def __init__(self, history: History, at: int | datetime | None, qmp: Path | None, disks: Path | None) -> None:
        begun = time.monotonic()
        self._qmp = qmp
        self.is_paused = True
        self.started_s = 0.0
        """From the request until the guest ran."""
        self._begun = begun
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-ckpt-")))
            image = _SHM / f"remus-ckpt-copy-{os.getpid()}-{secrets.token_hex(4)}"
            stack.callback(lambda: image.unlink(missing_ok=True))
            checkpoint = history.restore_image(image, at, sync=False)
            self.epoch = checkpoint.epoch
            if not is_vm(checkpoint.device_state):
                raise VmError(f"checkpoint {self.epoch} is not a guest's: `remus-ckpt restore` gives its memory")
            self._part = VmPart.unpack(checkpoint.device_state)
            if self._part.disks and disks is None:
                raise VmError(
                    f"checkpoint {self.epoch} is of a guest that writes to disks, and their images are on its backup's "
                    "host: start the copy there, from store:DIR/NAME"
                )
            copies = copies_of(disks or folder, self._part.disks, folder, stack)
            del checkpoint  # its mapping of the image
            # Whoever waits for the socket would be its one client before we are: it gets its name when we are done.
            path = self._path = folder / "qmp" if qmp is None else qmp.absolute().with_name(f"{qmp.name}~")
            memory = os.open(image, os.O_RDWR | os.O_CLOEXEC)
            try:
                images = {ident: copy.file for ident, copy in copies.items()}
                self._standby = start_standby(
                    self._part.machine, memory, path, _terminal, disks=images, stdin=0, stdout=None
                )
            finally:
                os.close(memory)
            stack.callback(self._standby.close)
            self._standby.load(self._part.state)
            image.unlink()
            self._cleanup = stack.pop_all()
        self.pid = self._standby.pid

    def go_on(self, *, paused: bool = False) -> None:
        """Let it run, unless it was paused then. Raises VmError."""
        self.is_paused = paused or not self._part.is_running
        self._standby.go_on(is_running=not self.is_paused, and_outlive=False)
        self.started_s = time.monotonic() - self._begun
        if self._qmp is not None:
            self._standby.qmp.close()  # it serves one client at a time
            self._cleanup.callback(self._qmp.unlink, missing_ok=True)
            self._path.replace(self._qmp)

    def wait(self, stop: StopSignal) -> None:
        """Wait until it ends, or until the stop is set."""
        poll = select.poll()
        poll.register(self._standby.process.fileno(), 0)  # POLLHUP is always reported
        poll.register(stop, select.POLLIN)
        poll.poll()

    def close(self) -> None:
        """End it."""
        self._cleanup.close()


def _terminal(device: str) -> str:
    # A port that was in the middle of a byte waits until it can write; the device `null` never tells it.
    return "stdio" if device == "serial0" else "file:/dev/null"
