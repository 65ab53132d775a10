"""The guest of vm_guest with a disk, under `remus-ckpt run`, and what its disk and its console say.

It numbers the blocks that it writes, remembers them, and compares each that it reads with that: a disk that is of
another instant than memory makes it say `fault`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from guests import Backup, Console, Primary, descendants, end_descendants, line_of
from services import command
from vm_qemu import guest_files

BLOCK = 4096
BLOCKS = 256
DISK_BYTES = 2 << 20
CHECKED = 3 * BLOCKS
"""Writes, each with a read, after which each block has most likely been looked at."""


class Said(Console):
    """The guest's serial port, which is a socket: what it says is kept."""

    text = ""

    def _read(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(65536):
                self.text += data.decode(errors="replace")
        self.has_ended = True


def newest_write(path: Path) -> int:
    """The number of the newest block on a disk of the guest; it counts its writes."""
    data = np.fromfile(path, np.uint8, BLOCKS * BLOCK).reshape(-1, BLOCK)
    return int(data[:, 8:16].copy().view("<u8").max(initial=0))


def words(disk: str, *more: str) -> list[str]:
    """The command line, as a user would write it. disk: what stands behind -drive"""
    files = guest_files()
    append = "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off guest.blocks=256 guest.pause_us=200"
    line = f"qemu-system-x86_64 -nodefaults -m 96M -accel tcg -kernel {files}/kernel -initrd {files}/initramfs".split()
    return [*line, "-append", f"{append} guest.pages=200", "-drive", disk, *more]


@contextmanager
def writing(folder: Path, to: str, own: Path, *options: str, form: str = "raw") -> Iterator[Primary]:
    """The guest under protection, once it writes to its disk."""
    serial = folder / "primary.serial"
    arguments = ["run", "--name", "web", "--to", to, "--log-format", "json", *options, "--"]
    line = words(f"file={own},if=virtio,format={form}", "-serial", f"unix:{serial},server=on,wait=off")
    with command(*arguments, *line, log=folder / "primary.log") as process:
        console = Said(serial)
        try:
            yield Primary(process, folder / "primary.log", console)
        finally:
            console.close()
            end_descendants(process)


def image_of(served: Backup) -> Path:
    """The image of its disk on the backup, on which no guest has run."""
    images = (served.folder / "store" / ".disks" / "web").glob("*.raw")
    (image,) = [path for path in images if not Path(f"{path}.ran").exists()]
    return image


def server_of(primary: Primary) -> int:
    """The pid of its disk server."""
    found = {child for child in descendants(primary.process.pid) if b"remus_ckpt.vm.disk_server" in line_of(child)}
    assert len(found) == 1, {child: line_of(child) for child in found}
    return found.pop()
