"""A guest's disk as it was at a checkpoint, served to a QEMU by NBD from this process (specs/disk.md §4)."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from remus_ckpt.errors import Malformed, VmError
from remus_ckpt.limits import MIB
from remus_ckpt.observe.log import log
from remus_ckpt.pages import Buffer
from remus_ckpt.vm.disk_server import EXPORT, listen, serve
from remus_ckpt.vm.disk_undo import DiskMoment
from remus_ckpt.vm.nbd import Command, Request, Server
from remus_ckpt.vm.part import DiskPart

_LOOK_S = 0.5
_ZEROES = bytes(4 * MIB)


class DiskCopy:
    """Serves one QEMU until `close`. QEMU's writes stay in the copy.

    moment: closed with this object; path: for a Unix socket
    """

    def __init__(self, moment: DiskMoment, size: int, path: Path) -> None:
        self._moment, self._size, self._path = moment, size, path
        self._trouble = ""
        self._is_over = threading.Event()
        self._listener = listen(path)
        for work in (self._serve, self._look):
            threading.Thread(target=work, name=f"disk {path.name}", daemon=True).start()

    @property
    def file(self) -> str:
        """What QEMU opens."""
        return f"nbd:unix:{self._path}:exportname={EXPORT}"

    def _serve(self) -> None:
        with suppress(OSError, Malformed):  # QEMU has ended, or we have
            client = self._listener.accept()[0]
            with client:
                serve(client, self._size, self._fulfil)

    def _look(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            try:
                self._moment.refresh()
            except (VmError, OSError) as error:
                self._complain(error)
                return

    def _complain(self, error: Exception) -> None:
        if not self._trouble and not self._is_over.is_set():
            self._trouble = str(error)
            log("the copy cannot read its disk any more", level=logging.ERROR, reason=self._trouble)

    def _fulfil(self, server: Server, request: Request) -> bytes:
        try:
            match request.command:
                case Command.READ:
                    return server.reply(request) + self._moment.read(request.offset, request.length)
                case Command.WRITE:
                    assert request.data is not None
                    self._moment.write(request.offset, request.data)
                case Command.TRIM | Command.WRITE_ZEROES:
                    for done in range(0, request.length, len(_ZEROES)):
                        self._moment.write(request.offset + done, _ZEROES[: request.length - done])
        except (VmError, OSError) as error:
            self._complain(error)
            return server.reply(request, errno.EIO)
        return server.reply(request)

    def close(self) -> None:
        """End it."""
        self._is_over.set()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._moment.close()


def copies_of(
    images: Path, disks: Sequence[tuple[DiskPart, Buffer]], folder: Path, stack: ExitStack
) -> dict[str, DiskCopy]:
    """A copy of each disk, as it was at the checkpoint that says this of them, until the stack ends.

    images: the folder with those of this guest; folder: for sockets
    Raises VmError if one is not kept.
    """
    found = {}
    for disk, data in disks:
        image = images / f"{disk.ident}.{disk.seed.hex()}.raw"
        if not image.exists():
            raise VmError(
                f"{image} does not exist: the disk {disk.ident} has been copied again since this checkpoint, and "
                "its state at that time was not kept: start a later one, or take the memory alone with "
                "`remus-ckpt restore`"
            )
        copy = DiskCopy(DiskMoment(image, disk, data), disk.size, folder / f"{disk.ident}.nbd")
        stack.callback(copy.close)
        found[disk.ident] = copy
    return found
