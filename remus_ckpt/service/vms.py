"""The QEMUs of a backup: one that waits for each guest, and those that went on with theirs.

    first checkpoint of a guest     a QEMU is started, paused, whose RAM is the warm copy's file
    each checkpoint                 the store applies it to that file; the waiting QEMU has written nothing to it
    takeover                        the device state is loaded, the file loses its name, the guest goes on

A file that a guest has run on is never used again: it has no name by then, so that another try of the takeover is
handed a new one, made from the history.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from remus_ckpt.errors import RemusError, StreamError, VmError
from remus_ckpt.memory import keep_freed
from remus_ckpt.observe.log import log
from remus_ckpt.service.guest import bridge_of, start_standby
from remus_ckpt.service.reprotect import Elsewhere, Reprotection
from remus_ckpt.session.messages import check_name
from remus_ckpt.store import HistoryWriter, State
from remus_ckpt.vm.command_line import Nic
from remus_ckpt.vm.disk_image import DiskImages
from remus_ckpt.vm.network import GuestNetwork
from remus_ckpt.vm.part import VmPart, is_vm
from remus_ckpt.vm.qmp import Qmp, listener_of
from remus_ckpt.vm.standby import StandbyQemu

_AGAIN_S = 10.0
"""How soon a QEMU that could not be started, or was refused, is tried again."""
_NAME_CHARS = 24
_ANSWER_S = 2.0
_DYING_S = 0.1
"""By then a QEMU is dead whose keeper kills it."""

NO_GUEST: dict[str, Any] = {"vm": None, "vm_pid": None, "vm_why": "", "vm_protection": None}
"""The status of a name where no guests are run."""


def run_directory(store: Path) -> Path:
    """The folder for the sockets of a store's QEMUs; another run of the backup finds them there."""
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else f"/tmp/remus-ckpt-{os.geteuid()}")
    return Path(base) / "remus-ckpt" / hashlib.sha256(os.fsencode(store.absolute())).hexdigest()[:8]


class Vms:
    """The guests of a backup.

    directory: for their sockets; only its owner may enter it
    taps: this host's TAP device for each name of one on the primary's; others have the same name here
    disks: the folder for the images of their disks
    elsewhere: where guests that went on here are protected again; None for nowhere
    """

    def __init__(
        self, directory: Path, taps: Mapping[str, str], disks: Path, elsewhere: Elsewhere | None = None
    ) -> None:
        self._directory = directory
        self._taps = taps
        self._disks = disks
        self._elsewhere = elsewhere
        self._lock = threading.Lock()  # guards the next
        self._images: dict[str, DiskImages] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        keep_freed()  # what guests write to disks goes through this process

    def of(self, name: str, wake: Callable[[], None]) -> GuestStandby:
        """What this backup does for the guest of that name."""
        short = f"{name[:_NAME_CHARS]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        return GuestStandby(name, self._directory / short, self._taps, self.images(name), wake, self._elsewhere)

    def images(self, name: str) -> DiskImages:
        """The images of that guest's disks. Raises RemusError for what is no name."""
        try:
            check_name(name)
        except ValueError as error:
            raise RemusError(str(error)) from error
        with self._lock:
            return self._images.setdefault(name, DiskImages(self._disks / name))


class GuestStandby:
    """The QEMU that waits for one guest, and the one that went on with it.

    path: begins the paths of its sockets
    taps, elsewhere: as for `Vms`
    images: of its disks
    wake: called when its state has changed

    The thread that stores checkpoints calls `committed`, that of the takeover calls `take_over`; any thread may call
    the rest. The lock guards the fields; it is not held while a QEMU starts.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        taps: Mapping[str, str],
        images: DiskImages,
        wake: Callable[[], None],
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.name = name
        self._elsewhere = elsewhere
        self._path = path
        self._taps = taps
        self._images = images
        self._wake = wake
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] = ()  # the file and the machine that the waiting QEMU was started for
        self._standby: StandbyQemu | None = None
        self._preparing: threading.Thread | None = None
        self._retry_at = 0.0
        self._count = 0
        self._consoles: list[Path] = []
        self._why = ""
        self._survivor: StandbyQemu | None = None
        self._survivor_pid: int | None = None
        self._again: Reprotection | None = None
        self._is_closed = False

    def find_survivor(self, state: State) -> None:
        """The store is open: look after the guest that went on from it, if one did. Does not wait."""
        # Unless the takeover is over, it is tried again, and finds it.
        if state.role == "promoted" and state.more.get("takeover_done"):
            name = f"survivor of {self.name}"
            threading.Thread(target=self.has_gone_on, args=(state.term,), name=name, daemon=True).start()

    # The QEMU that waits

    def admit(self, device_state: bytes) -> None:
        """Raise RemusError if this checkpoint must not be stored, because the guest's disks could not follow it."""
        if is_vm(device_state):
            self._images.admit(device_state)

    def committed(self, writer: HistoryWriter) -> None:
        """A checkpoint has been applied: bring the disks there, and have a QEMU ready for it, without waiting for that.

        Raises StoreError if a disk cannot be brought there; it must be tried again before the next checkpoint.
        """
        checkpoint, image = writer.in_force, writer.image_fd
        if checkpoint is None or image is None or not is_vm(checkpoint.device_state):
            return
        self._forget_survivor()
        with suppress(StreamError):  # what is told below
            if VmPart.disks_of(checkpoint.device_state):
                self._images.follow(VmPart.unpack(checkpoint.device_state))
        with self._lock:
            if self._is_closed or (self._preparing is not None and self._preparing.is_alive()):
                return
            try:
                key = self._key_of(image, checkpoint.device_state)
            except (OSError, RemusError) as error:
                self._why = str(error)
                return
            if key == self._key:
                if self._standby is not None and self._standby.alive():
                    return
                if time.monotonic() < self._retry_at:
                    return
            self._key = key
            own = os.dup(image)
            preparing = threading.Thread(
                target=self._prepare, args=(own, checkpoint.device_state), name=f"QEMU for {self.name}", daemon=True
            )
            try:
                preparing.start()
            except RuntimeError as error:  # no more threads are allowed: the checkpoints count all the same
                os.close(own)
                self._why, self._retry_at = str(error), time.monotonic() + _AGAIN_S
                return
            self._preparing = preparing

    @staticmethod
    def _key_of(image: Path | int, device_state: bytes) -> tuple[Any, ...]:
        """What a QEMU is started for. Raises OSError, RemusError."""
        copies = [(disk.ident, disk.seed) for disk in VmPart.disks_of(device_state)]
        return (*_identity(image), VmPart.machine_bytes(device_state), *copies)

    def _prepare(self, image: int, device_state: bytes) -> None:
        try:
            self._make_ready(image, device_state)
        finally:
            os.close(image)

    def _make_ready(self, image: int, device_state: bytes) -> None:
        with self._lock:
            before, self._standby = self._standby, None
            self._count += 1
            path = self._path.with_name(f"{self._path.name}.{self._count % 2}.qmp")
        if before is not None:
            before.close()
        try:
            vm = VmPart.unpack(device_state)
            images = self._images.newest([disk for disk, _ in vm.disks])
            standby = start_standby(vm.machine, image, path, self._console, self._plug, disks=images)
        except (RemusError, OSError) as error:
            if self._why != str(error):
                log("no QEMU waits", level=logging.ERROR, name=self.name, reason=str(error))
            self._why = str(error)
            self._retry_at = time.monotonic() + _AGAIN_S
            self._wake()
            return
        log("QEMU waits", name=self.name, pid=standby.pid)
        with self._lock:
            self._why = ""
            if not self._is_closed:
                self._standby = standby
                self._wake()
                return
        standby.close()

    def _console(self, device: str) -> str:
        """A character device of the guest is a socket here."""
        path = self._path.with_name(f"{self._path.name}.{device}")
        if path not in self._consoles:
            self._consoles.append(path)
        return f"unix:{path},server=on,wait=off"

    def _plug(self, nics: Sequence[Nic]) -> GuestNetwork:
        """The network of the QEMU that waits: its devices are taken now, so that a takeover finds them free."""
        listen = self._path.with_name(f"{self._path.name}.{self._count % 2}.bridge")
        return GuestNetwork([self._taps.get(nic.tap, nic.tap) for nic in nics], listen)

    # The takeover

    def take_over(self, term: int, image: Path, device_state: bytes) -> None:
        """Go on with the guest from this memory and device state.

        image: loses its name
        Raises RemusError, OSError; nothing runs then.
        """
        socket = self.socket(term)
        begun = time.monotonic()
        vm = VmPart.unpack(device_state)
        disks = [disk for disk, _ in vm.disks]
        self._images.follow(vm)
        images = self._images.paths(disks)
        standby = self._waiting_for(image, device_state)
        is_warm = standby is not None
        if standby is None:
            self._count += 1  # the sockets of what waited may still be in use
            path = self._path.with_name(f"{self._path.name}.{self._count % 2}.qmp")
            memory = os.open(image, os.O_RDWR | os.O_CLOEXEC)
            try:
                standby = start_standby(vm.machine, memory, path, self._console, self._plug, disks=images)
            finally:
                os.close(memory)
        try:
            standby.load(vm.state, self._consoles)
            os.rename(standby.qmp.path, socket)
            with suppress(FileNotFoundError):
                os.rename(self._path.with_name(f"{self._path.name}.{self._count % 2}.bridge"), bridge_of(socket))
            image.unlink()
            self._images.hand_over(disks)
            standby.go_on(is_running=vm.is_running)
            took = f"{(time.monotonic() - begun) * 1e3:.1f} ms"
        except BaseException:
            standby.close()
            raise
        with self._lock:
            self._survivor, self._survivor_pid = standby, standby.pid
        standby.close()
        self._protect_again(term, standby.pid)
        text = "the guest goes on here, unprotected"
        log(text, level=logging.WARNING, name=self.name, pid=standby.pid, took=took, waited=is_warm, qmp=str(socket))

    def _waiting_for(self, image: Path, device_state: bytes) -> StandbyQemu | None:
        """The QEMU that waits over this file with this machine, if there is one."""
        if (preparing := self._preparing) is not None:
            preparing.join()
        with self._lock:
            standby, self._standby = self._standby, None
            key, self._key = self._key, ()
        if standby is None:
            return None
        if standby.alive() and key == self._key_of(image, device_state):
            return standby
        standby.close()
        return None

    def socket(self, term: int) -> Path:
        """Where the guest's QEMU is controlled that goes on under this term."""
        return self._path.with_name(f"{self._path.name}.{term}.guest")

    def has_gone_on(self, term: int) -> bool:
        """Whether the guest has gone on under this term already: before a restart of the backup, say."""
        socket = self.socket(term)
        pid = listener_of(socket)
        if pid is None:
            return False
        # One that was about to go on when we died is being killed. If it does not answer, another has it: it protects
        # the guest again.
        with suppress(VmError), closing(Qmp(socket, timeout_s=_ANSWER_S)) as qmp:
            if qmp.execute("query-status")["status"] == "inmigrate":
                return False
        time.sleep(_DYING_S)
        if not _lives(pid):
            return False
        with self._lock:
            is_known, self._survivor_pid = self._survivor_pid == pid, pid
        if not is_known:
            log("the guest runs here already", level=logging.WARNING, name=self.name, pid=pid)
        self._protect_again(term, pid)
        return True

    def _protect_again(self, term: int, pid: int) -> None:
        if self._elsewhere is None:
            return
        with self._lock:
            if self._again is None and not self._is_closed:
                self._again = Reprotection(
                    self.name, self.socket(term), term, self._elsewhere, lambda: _lives(pid), self._wake
                )

    def _forget_survivor(self) -> None:
        """Another primary has committed something here: what went on before is no concern of ours any more."""
        with self._lock:
            again, self._again = self._again, None
        if again is not None:
            again.close()

    # Users

    def status(self) -> dict[str, Any]:
        """The state of the guest's QEMU here.

        vm: "waiting", "starting", "refused" (see vm_why), "running", "ended"; None if there is no guest
        vm_pid: of that QEMU
        vm_protection: of a guest that runs here, see `Reprotection.status`; None without `elsewhere`
        """
        with self._lock:
            state = pid = None
            if self._survivor_pid is not None:
                state, pid = "running" if _lives(self._survivor_pid) else "ended", self._survivor_pid
            if self._standby is not None:
                state, pid = "waiting", self._standby.pid
            elif self._preparing is not None and self._preparing.is_alive():
                state = "starting"
            elif self._why:
                state = "refused"
            again = self._again.status() if self._again is not None and state == "running" else None
            return {"vm": state, "vm_pid": pid, "vm_why": self._why, "vm_protection": again}

    def close(self) -> None:
        """End the QEMU that waits. A guest that has gone on runs on, and so does what protects it."""
        with self._lock:
            self._is_closed = True
            standby, self._standby = self._standby, None
        self._forget_survivor()
        if standby is not None:
            standby.close()


def _identity(image: Path | int) -> tuple[int, int]:
    status = os.stat(image)
    return status.st_dev, status.st_ino


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
