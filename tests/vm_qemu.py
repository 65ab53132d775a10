"""What tests share that run the guest of demo/guest in a real QEMU."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from vm_guest import build

from remus_ckpt.demo import vm
from remus_ckpt.errors import VmError

QEMU = "qemu-system-x86_64"
MIB = 1 << 20
_numbers = count()


def guest_files() -> Path:
    """The folder of the guest's kernel and initramfs."""
    return build.build()


class Qmp:
    """One connection to a QEMU's monitor."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 30
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert process.poll() is None, "QEMU has ended"
                assert time.monotonic() < deadline, "QEMU offers no monitor"
                time.sleep(0.005)
        self._socket.settimeout(30)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def execute(self, command: str, arguments: Mapping[str, object] = {}) -> Any:
        """As `remus_ckpt.vm.qmp.Qmp` does it."""
        try:
            return self.ask(command, **arguments)
        except AssertionError as error:
            raise VmError(str(error)) from error

    def ask(self, command: str, fds: Sequence[int] = (), **arguments: object) -> Any:
        """What QEMU answers. Raises OSError if it dies."""
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [request], list(fds))
        while True:
            line = self._lines.readline()
            if not line:
                raise ConnectionResetError("QEMU has ended")
            reply = json.loads(line)
            assert "error" not in reply, (command, reply)
            if "return" in reply:
                return reply["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Qemu:
    """A QEMU with the guest, its memory in a file. It ends with `close`.

    nics: the guests' ends of `guest_pair`s; they are closed here
    disk: a raw image
    is_standby: wait for a device state
    """

    def __init__(
        self,
        folder: Path,
        nics: Sequence[socket.socket] = (),
        *,
        mib: int = 96,
        vcpus: int = 1,
        append: str = "",
        disk: Path | None = None,
        is_standby: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        files, name = guest_files(), f"qemu-{next(_numbers)}"
        self.memory = folder / f"{name}.ram"
        with open(self.memory, "wb") as memory:
            memory.truncate(mib * MIB)
        self.console = folder / f"{name}.console"
        words = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            "-m", f"{mib}M", "-smp", str(vcpus),
            "-object", f"memory-backend-file,id=ram,size={mib}M,mem-path={self.memory},share=on",
            "-M", "pc,suppress-vmdesc=on,accel=tcg,memory-backend=ram",
            "-global", "migration.send-configuration=off",
            "-qmp", f"unix:{folder / name}.qmp,server=on,wait=off",
            "-serial", f"file:{self.console}",
            "-kernel", str(files / "kernel"), "-initrd", str(files / "initramfs"),
            "-append", f"console=ttyS0 quiet panic=-1 no_timer_check mitigations=off {append}",
        ]  # fmt: skip
        for number, nic in enumerate(nics):
            mac = f"52:54:00:83:14:{number + 1:02x}"
            words += ["-netdev", f"dgram,id=n{number},local.type=fd,local.str={nic.fileno()}"]
            words += ["-device", f"virtio-net-pci,romfile=,netdev=n{number},mac={mac}"]
        if disk is not None:
            words += ["-drive", f"id=disk,file={disk},format=raw,if=none,cache.direct=off"]
            words += ["-device", "virtio-blk-pci,drive=disk"]
        if is_standby:
            words += ["-S", "-incoming", "defer"]
        self.process = subprocess.Popen([*words, *extra], pass_fds=[nic.fileno() for nic in nics])
        for nic in nics:
            nic.close()
        self.qmp = Qmp(folder / f"{name}.qmp", self.process)

    def until_said(self, words: str, timeout_s: float = 120.0) -> None:
        """Wait for words on the guest's console."""
        deadline = time.monotonic() + timeout_s
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def save_devices(self, path: Path) -> bytes:
        """The device state of the stopped guest."""
        self.qmp.ask("xen-save-devices-state", filename=str(path), live=False)
        return path.read_bytes()

    def load_devices(self, path: Path) -> None:
        """Load a device state into this standby, whose memory is in its place already; it is then ready for `cont`."""
        with open(path, "rb") as state:
            self.qmp.ask("getfd", [state.fileno()], fdname="state")
            self.qmp.ask("migrate-incoming", uri="fd:state")
        while (found := self.qmp.ask("query-migrate").get("status")) != "completed":
            assert found not in {"failed", "cancelled"}, found
            time.sleep(0.0005)

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.qmp.close()
        self.memory.unlink(missing_ok=True)


class Client(vm.Client):
    """The client of the demo, in a network namespace."""

    def __init__(self, namespace: str, host: str, seed: int = 1) -> None:
        super().__init__(("ip", "netns", "exec", namespace), host, seed)
