"""A paused QEMU that continues a guest: others fill its RAM file, and its device state comes last.

    QEMU … -S -incoming defer      started ahead; with -incoming it writes nothing to its RAM
    RAM file                       the checkpoint's memory, at any time before the load
    getfd, migrate-incoming  -->   the device state, through a pipe
    cont                     -->   the guest continues

It can be used once. After `cont`, the RAM file is the guest's, and nobody else's again: QEMU keeps translated code, so
that pages changed under it would not be seen, and what the guest has written is no checkpoint's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from remus_ckpt.errors import VmError
from remus_ckpt.vm.network import GuestNetwork
from remus_ckpt.vm.qmp import Qmp

START_S = 60.0
LOAD_S = 60.0
_POLL_S = 0.0005
_FD_NAME = "remus-state"


class Running(Protocol):
    """The process of a QEMU, with whatever it has started."""

    def fileno(self) -> int:
        """A descriptor that polls POLLHUP once it has ended."""

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status, None while it runs."""

    def kill(self) -> None:
        """Kill it."""

    def let_be(self) -> None:
        """Leave it running when we end."""


class StandbyQemu:
    """A QEMU that was started with `CommandLine.as_standby`, and what becomes of it.

    process: killed by `close`, unless the guest has continued
    network: closed with this object; None if the guest has none, or none here
    qmp_path: its control socket; longer paths than the kernel takes are the caller's fault
    One thread at a time.
    Raises VmError if it does not start; the process is killed then.
    """

    def __init__(self, process: Running, qmp_path: Path, network: GuestNetwork | None = None) -> None:
        self.process = process
        self._network = network
        self._is_on = False
        self._readers: list[socket.socket] = []
        try:
            self.qmp = Qmp(qmp_path, wait_s=START_S, is_starting=lambda: process.wait(0) is None)
        except BaseException:
            self._end()
            raise
        try:
            if network is not None:
                network.plug_in()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of QEMU."""
        return self.qmp.pid

    def alive(self) -> bool:
        """Whether its process lives."""
        return self.process.wait(0) is None

    def load(self, state: bytes, consoles: Sequence[Path] = ()) -> None:
        """Load the device state; the guest stays paused. Its memory must be in the RAM file by now.

        consoles: the sockets of its serial ports. Each is read for the moment: a port that was in the middle of a byte
            waits for its reader, and if QEMU finds none here, it waits for good
        Raises VmError; this QEMU cannot be used any more then.
        """
        for path in consoles:
            with suppress(OSError):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._readers.append(connection)
                connection.connect(str(path))
        reader, writer = os.pipe()
        feeder = threading.Thread(target=_feed, args=(writer, state), name="device state", daemon=True)
        feeder.start()
        try:
            self.qmp.get_fd(reader, name=_FD_NAME)
        finally:
            os.close(reader)
        self.qmp.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"}, timeout_s=LOAD_S)
        deadline = time.monotonic() + LOAD_S
        while (found := self.qmp.execute("query-migrate").get("status")) != "completed":
            if found in ("failed", "cancelled") or not self.alive():
                raise VmError("QEMU refuses the device state: check that it has the same version and the same devices")
            if time.monotonic() > deadline:
                raise VmError(f"QEMU has not loaded the device state within {LOAD_S:g} s")
            time.sleep(_POLL_S)

    def go_on(self, *, is_running: bool = True, and_outlive: bool = True) -> None:
        """Let the guest run, and give it its network.

        is_running: False leaves it paused, as it was
        and_outlive: leave it running when this object is closed, and when we end
        Raises VmError if QEMU refuses.
        """
        if is_running:
            self.qmp.execute("cont")
        self._hang_up()
        if self._network is not None:
            self._network.go_on()
        if and_outlive:
            self._is_on = True
            self.process.let_be()

    def close(self) -> None:
        """Hang up. A guest that has not continued is killed."""
        self.qmp.close()
        self._hang_up()
        self._end()

    def _end(self) -> None:
        if not self._is_on:
            self.process.kill()
            self.process.wait()
        if self._network is not None:
            self._network.close()
            self._network = None

    def _hang_up(self) -> None:
        while self._readers:
            self._readers.pop().close()


def _feed(writer: int, state: bytes) -> None:
    view = memoryview(state)
    with suppress(OSError):  # QEMU has gone, or has had enough
        while view:
            view = view[os.write(writer, view) :]
    os.close(writer)
