"""A guest in QEMU with a standby, for tests: the primary and the backup are the test itself.

It copies what memory differs, keeps it with the device state, and commits by copying both to the standby.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bridging import Network, network
from vm_qemu import Client, Qemu

from remus_ckpt.errors import RemusError
from remus_ckpt.vm.bridge import Bridge, guest_pair

PAGE = 4096
GUEST = "10.83.9.2"
Pages = npt.NDArray[np.uint8]


class Pair:
    """A guest and its standby, and what is committed of it.

    is_held: whether its output waits for commits
    vcpus: of the guest
    append: to the kernel's command line
    """

    def __init__(
        self,
        net: Network,
        folder: Path,
        dice: random.Random,
        *,
        is_held: bool = True,
        vcpus: int = 1,
        append: str = "",
    ) -> None:
        self._folder, self._dice = folder, dice
        self._machine: dict[str, Any] = {"append": append, "vcpus": vcpus}
        self._tap = net.tap("tap0", "10.83.9.1/24")
        self.bridge = Bridge.start([self._tap])
        if not is_held:
            self.bridge.let_pass()
        ours, theirs = guest_pair()
        self.bridge.attach(0, ours)
        self.guest = Qemu(folder, [theirs], **self._machine)
        self.epoch = 0
        self.committed_epoch: int | None = None
        self.phase = "boot"
        self.phases: Counter[str] = Counter()
        self.cut_frames = 0
        self._committed: Pages = np.zeros(0, np.uint8)
        self._state = folder / "committed"
        self._ours: socket.socket | None = None
        self.standby: Qemu | None = None

    def prepare(self) -> None:
        """Start the next standby, on memory of its own."""
        ours, theirs = guest_pair()
        self._ours = ours
        self.standby = Qemu(self._folder, [theirs], **self._machine, is_standby=True)
        if self._committed.size:
            self._pages(self.standby)[:] = self._committed
        else:
            self._committed = np.zeros_like(self._pages(self.guest))

    @staticmethod
    def _pages(qemu: Qemu) -> Pages:
        return np.memmap(qemu.memory, np.uint8, "r+").reshape(-1, PAGE)

    def checkpoint(self) -> None:
        """One epoch. Raises OSError if the guest dies before it is committed."""
        assert self.standby is not None
        self.epoch += 1
        self.bridge.make_room()
        self.phase = "stop"
        self.guest.qmp.ask("stop")
        self.phase = "mark"
        try:
            self.bridge.mark(self.epoch)
        except RemusError:
            self.guest.qmp.ask("cont")
            raise
        self.phase = "copy"
        memory = self._pages(self.guest)
        dirty = np.flatnonzero((memory.view(np.uint64) != self._committed.view(np.uint64)).any(axis=1))
        pages = memory[dirty]
        self.phase = "save"
        state = self.guest.save_devices(self._folder / f"state-{self.epoch}")
        self.phase = "cont"
        with contextlib.suppress(OSError):
            self.guest.qmp.ask("cont")
        self.phase = "send"
        time.sleep(self._dice.uniform(0, 0.02))
        if self.guest.process.poll() is not None and self._dice.random() < 0.5:
            return  # lost on its way; what came of it is not committed
        self.phase = "commit"
        self._committed[dirty] = pages
        self._pages(self.standby)[dirty] = pages
        self._state.write_bytes(state)
        (self._folder / f"state-{self.epoch}").unlink()
        self.committed_epoch = self.epoch
        self.bridge.release(self.epoch)
        self.phase = "run"

    def run_until_dead(self, kill_after_s: float) -> None:
        """Checkpoints until the guest is killed, at an instant that no phase decides."""

        def kill() -> None:
            self.phases[self.phase] += 1
            self.guest.kill()

        timer = threading.Timer(kill_after_s, kill)
        timer.start()
        try:
            while self.guest.process.poll() is None:
                self.checkpoint()
                time.sleep(self._dice.uniform(0.01, 0.05))
        except OSError:
            pass
        timer.join()

    def fail_over(self) -> None:
        assert self.standby is not None
        self.cut_frames += self.bridge.drop()
        self.guest.close()
        self.guest, self.standby = self.standby, None
        self.guest.load_devices(self._state)
        assert self._ours is not None
        self.bridge.attach(0, self._ours)
        self._ours = None
        self.guest.qmp.ask("cont")
        self.bridge.announce()

    def close(self) -> None:
        for qemu in (self.guest, self.standby):
            if qemu is not None:
                qemu.close()
        if self._ours is not None:
            self._ours.close()
        self.bridge.close()


@contextlib.contextmanager
def pair(folder: Path, seed: int, **options: Any) -> Iterator[tuple[Pair, Client]]:
    """A guest whose first checkpoint is committed, and a client that has had an answer. options: of `Pair`"""
    with network() as net, contextlib.ExitStack() as stack:
        made = stack.enter_context(contextlib.closing(Pair(net, folder, random.Random(seed), **options)))
        made.guest.until_said("guest is ready")
        client = stack.enter_context(contextlib.closing(Client(net.name, GUEST, seed)))
        made.prepare()
        made.checkpoint()  # the whole memory; what the client hears comes with the commits
        while not client.is_ready():
            made.checkpoint()
        yield made, client


def fail_over(guest: Pair, client: Client, more: int = 50, timeout_s: float = 60.0) -> dict[str, Any]:
    """From the guest's death until its client has heard so much more of the standby, or something wrong, or too little
    in that time. Returns the client's status, with the silence that it met."""
    before = client.status()
    guest.fail_over()
    guest.prepare()
    deadline, silence_s = time.monotonic() + timeout_s, 0.0
    while True:
        guest.checkpoint()
        told = client.status()
        silence_s = max(silence_s, told["silence_s"])
        if told["wrong"] or told["answers"] >= before["answers"] + more or time.monotonic() > deadline:
            return {**told, "silence_s": silence_s, "is_stalled": told["answers"] < before["answers"] + more}
