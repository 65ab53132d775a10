"""A guest that counts (vm/counter.S), the QEMU that runs it, and what it says."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from services import LONG_S, command, until

from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.service.vms import run_directory

MEMORY = 32 << 20
SOURCE = Path(__file__).parent / "vm" / "counter.S"


def build(folder: Path, *, pages: int = 512, steps: int = 5) -> Path:
    """The guest as an image for -kernel.

    pages: that it writes to in turn; steps: how many at each tick of 1 kHz
    """
    image, program = folder / f"counter-{pages}-{steps}.img", folder / "counter.o"
    defined = [f"-DCOUNT={pages}", f"-DSTEPS={steps}"]
    assembler = ["gcc", "-m32", "-c", *defined, str(SOURCE), "-o", str(program)]
    linker = ["ld", "-m", "elf_i386", "-Ttext=0x200000", "-e", "_start", "--oformat", "binary"]
    subprocess.run(assembler, check=True)
    subprocess.run([*linker, str(program), "-o", str(image)], check=True)
    return image


def words(image: Path, serial: str, *more: str) -> list[str]:
    """The command line of the guest, as a user would write it."""
    return [*f"qemu-system-x86_64 -nodefaults -m 32M -accel tcg -kernel {image} -serial {serial}".split(), *more]


class Console:
    """The guest's serial port, which is a socket. reads: at once; otherwise the guest has to wait once it is full"""

    def __init__(self, path: Path, *, reads: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        until(lambda: self._try(path))
        self.last = -1
        """The last number that the guest has said."""
        self.has_ended = self.is_broken = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        if reads:
            self._reader.start()

    def _try(self, path: Path) -> bool:
        with suppress(OSError):
            self._socket.connect(str(path))
            return True
        return False

    def _read(self) -> None:
        rest = ""
        with suppress(OSError):
            while data := self._socket.recv(65536).decode():
                *lines, rest = (rest + data).split("\n")
                self.is_broken = self.is_broken or any("BROKEN" in line for line in lines)
                # The first may be half a line.
                self.last = max([int(line, 16) for line in lines if len(line) == 8], default=self.last)
        self.has_ended = True

    def counts_on(self, numbers: int = 3) -> int:
        """Wait until it has said some more numbers; returns the last."""
        for _ in range(numbers):
            before = self.last
            until(lambda before=before: self.last != before or self.has_ended)
            assert not self.is_broken, "memory and registers are not of one instant"
            assert not self.has_ended
        return self.last

    def ends(self) -> None:
        """Wait until QEMU has ended."""
        until(lambda: self.has_ended)

    def say(self, letter: str) -> None:
        self._socket.sendall(letter.encode())

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._reader.is_alive():
            self._reader.join()
        self._socket.close()


class Backup:
    """A backup that runs guests, as users start it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.address = f"unix:{folder}/backup.sock"

    def status(self, name: str = "web") -> dict[str, Any]:
        found: dict[str, Any] = ask(connect(Address.parse(self.address)), "status", {}, timeout_s=LONG_S)["names"]
        return found.get(name, {})

    def failover(self, name: str = "web") -> dict[str, Any]:
        return ask(connect(Address.parse(self.address)), "failover", {"name": name}, timeout_s=LONG_S)

    def sockets(self, pattern: str) -> list[Path]:
        return sorted(run_directory(self.folder / "store").glob(pattern))

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "backup.log").read_text().splitlines()]

    @contextmanager
    def console(self) -> Iterator[Console]:
        """That of the guest that went on here."""
        console = Console(run_directory(self.folder / "store") / self.sockets("*.serial0")[0].name)
        try:
            yield console
        finally:
            console.close()


@contextmanager
def backup(folder: Path, *options: object, inside: tuple[str, ...] = (), keeps: bool = False) -> Iterator[Backup]:
    """A backup with --run-vms; the guest that went on is ended with the block.

    inside: the command that starts it
    keeps: leave that guest alone, unless the block fails
    """
    where = f"unix:{folder}/backup.sock"
    arguments = ["backup", "--listen", where, "--store", folder / "store", "--run-vms", "--log-format", "json"]
    with command(*arguments, *options, log=folder / "backup.log", inside=inside) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening")
        served = Backup(process, folder)
        try:
            yield served
        except BaseException:
            keeps = False
            raise
        finally:
            process.terminate()
            process.wait(LONG_S)
            if not keeps:
                end_guests(folder)
                shutil.rmtree(run_directory(folder / "store"))


def end_guests(folder: Path) -> None:
    """Kill the QEMUs whose sockets belong to the store of this folder."""
    mine = os.fsencode(run_directory(folder / "store")) + b"/"
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            line = Path(f"/proc/{int(entry)}/cmdline").read_bytes()
            if line.startswith(b"qemu-system") and mine in line:
                os.kill(int(entry), signal.SIGKILL)


class Primary:
    """`remus-ckpt run` with the guest."""

    def __init__(self, process: subprocess.Popen[str], log: Path, console: Console) -> None:
        self.process = process
        self._log = log
        self.console = console

    def log(self) -> str:
        return self._log.read_text()

    @property
    def qemu(self) -> int:
        """The pid of its QEMU."""
        for child in descendants(self.process.pid):
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system"):
                    return child
        raise AssertionError("it has no QEMU")


def line_of(pid: int) -> bytes:
    """The command line of a process, b"" if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def descendants(pid: int) -> list[int]:
    """Those that have ended meanwhile are left out."""
    found = []
    for children in glob.glob(f"/proc/{pid}/task/*/children"):  # not that of pathlib, which fails at one that ends
        with suppress(OSError):
            for child in map(int, Path(children).read_text().split()):
                found += [child, *descendants(child)]
    return found


def end_descendants(process: subprocess.Popen[str]) -> None:
    """Some end by themselves meanwhile, since others did."""
    for child in descendants(process.pid) if process.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@contextmanager
def running(folder: Path, to: str, image: Path, *options: str, reads: bool = True) -> Iterator[Primary]:
    """The guest under protection, once it counts. reads: somebody looks at its console"""
    serial = folder / "primary.serial"
    arguments = ["run", "--name", "web", "--to", to, "--log-format", "json", *options, "--"]
    line = words(image, f"unix:{serial},server=on,wait=off")
    with command(*arguments, *line, log=folder / "primary.log") as process:
        console = Console(serial, reads=reads)
        try:
            if reads:
                console.counts_on()
            yield Primary(process, folder / "primary.log", console)
        finally:
            console.close()
            end_descendants(process)


def wait_committed(served: Backup, epoch: int = 3) -> None:
    """Until the guest has that many checkpoints there, and a QEMU waits for it."""
    until(lambda: (served.status().get("epoch") or -1) >= epoch and served.status()["vm"] == "waiting")
