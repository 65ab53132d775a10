"""One history on one disk: protected, killed, promoted, begun anew; then the disk as it was at many instants."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from powerloss.backup import PHASES, WISH
from powerloss.check import digest
from powerloss.disk import SURVIVORS, Disk, after_losses, make_image
from remus_ckpt import protect
from remus_ckpt.errors import RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect

IMAGE_MIB = 40
GENERATIONS = 2
"""The second goes on from what a loss of power at the end of the first has left."""
ACTIONS = 7
_START_S = 60.0
"""For a backup to start and answer, on a machine that has other work."""
MOUNT_OPTIONS = (
    "commit=300",
    "commit=300,noauto_da_alloc",
    "commit=1",
    "commit=300,data=writeback",
    "commit=300,nodelalloc",
)
KILLS = tuple(phase for phase in PHASES if phase != "listening")
SPANS = ("new name", "promotion", "goodbye", "restart")
TARGETS = (*PHASES, *SPANS)
_libc = ctypes.CDLL(None)


class Client:
    """A protected memory, and what it was at each version."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.term: int | None = None
        self.version = 0
        self.arrays: dict[str, NDArray[Any]] = {"a": np.zeros(60_000, np.uint32), "b": np.zeros(9_000, np.float64)}
        self.truth: dict[int, str] = run.truth[name]
        self.change()
        self.protect()

    def protect(self) -> None:
        """Begin; the first checkpoint says that it has come."""
        draw = self.run.draw
        self.protection = protect(
            self.arrays,
            to=self.run.address,
            name=self.name,
            term=self.term,
            wait=draw.choice(["durable", "applied"]),
            device_state=lambda: self.version.to_bytes(8, "little"),
            connect_timeout_s=_START_S,
            on_commit=lambda committed: self.run.tell("committed", self.name, epoch=committed.epoch),
        )

    def change(self) -> None:
        """Another version: a few values or, now and then, most."""
        draw = self.run.draw
        self.version += 1
        a, b = self.arrays["a"], self.arrays["b"]
        if draw.random() < 0.1:
            a[: draw.randrange(len(a))] = draw.randrange(1 << 32)
        for _ in range(draw.randrange(1, 30)):
            a[draw.randrange(len(a))] += 1
        b[draw.randrange(len(b))] = self.version
        self.truth[self.version] = digest(self.arrays)

    def checkpoint(self, *, wait: bool) -> None:
        """Change, and send that."""
        self.change()
        epoch = self.protection.checkpoint(wait=wait, timeout_s=_START_S)
        if wait:
            self.run.tell("committed", self.name, epoch=epoch, version=self.version, term=self.term or 0)

    def begin_anew(self) -> None:
        """Say goodbye and come back, with a full copy."""
        with self.run.span("goodbye"):
            self.run.tell("asked", self.name)
            with suppress(RemusError):
                self.protection.close()
            self.protect()
            self.checkpoint(wait=True)

    def fail_over(self) -> None:
        """Have it promoted, and protect under the next term what went on."""
        with self.run.span("promotion"):
            self.run.tell("asked", self.name)
            until = time.monotonic() + _START_S
            while True:
                try:
                    given = ask(connect(Address.parse(self.run.address)), "failover", {"name": self.name})
                    break
                except RemusError as error:
                    if time.monotonic() > until:
                        raise RuntimeError(f"{self.name} cannot be promoted: {error}") from error
                    time.sleep(0.2)
            self.run.tell("promoted", self.name, term=given["term"], position=given["position"])
        if self.run.draw.random() < 0.5:
            time.sleep(0.1)  # the takeover command runs meanwhile
        self.run.tell("asked", self.name)
        with suppress(RemusError):
            self.protection.close(0.1)
        self.term = given["term"] + 1
        self.protect()
        self.checkpoint(wait=True)


class Run:
    """Its files lie in `where`. The same seed and number draw the same plan; instants depend on the machine."""

    def __init__(self, seed: int, number: int, where: Path) -> None:
        self.draw = random.Random(f"{seed} {number}")
        self.where = where
        self.address = f"unix:{where}/socket"
        self.truth: dict[str, dict[int, str]] = defaultdict(dict)
        self.told: list[dict[str, Any]] = []
        self.spans: list[tuple[str, int, int, int]] = []
        self._telling = threading.Lock()
        self._events = where / "events"
        self._events.touch()
        (where / "takeovers").touch()
        self._settings = {
            "address": self.address,
            "events": str(self._events),
            "compact_checkpoints": self.draw.randrange(3, 16),
            "retain": self.draw.randrange(3, 30),
        }
        self.options = self.draw.choice(MOUNT_OPTIONS)
        self._clients: list[Client] = []
        self._generation = 0
        self._disk: Disk
        self._backup: subprocess.Popen[bytes]
        self._over = threading.Event()

    # Live

    def play(self) -> None:
        """The history; each generation has a disk of its own, that begins with what the last loss left."""
        base = self.where / "base-0"
        make_image(base, IMAGE_MIB)
        for generation in range(GENERATIONS):
            self._generation = generation
            self._disk = Disk(base, self.where / f"disk-{generation}", self.options)
            try:
                with self._powered():
                    for client in self._clients:
                        client.checkpoint(wait=True)
                    for _ in range(ACTIONS):
                        self._act()
                cut = (self._disk.position, self.draw.choice(SURVIVORS), self.draw.getrandbits(32))
            finally:
                self._disk.close()
            base = self.where / f"base-{generation + 1}"
            next(after_losses(self._disk.base, self._disk.log, [cut], base))
        for client in self._clients:
            with suppress(RemusError):
                client.protection.close(0.0)
        self._keep()

    def _act(self) -> None:
        draw = self.draw
        if not self._clients or (len(self._clients) < 3 and draw.random() < 0.15):
            with self.span("new name"):
                client = Client(self, f"name-{len(self._clients)}")
                self._clients.append(client)
                client.checkpoint(wait=True)
            return
        client = draw.choice(self._clients)
        match draw.choices(["steps", "phase", "kill", "stop", "anew", "failover"], [4, 4, 1, 1, 2, 2])[0]:
            case "steps":
                self._step(client, draw.randrange(1, 25))
            case "phase":
                phase = draw.choice(KILLS)
                self._disk.words[WISH] = PHASES.index(phase) + 1
                if phase == "opening":
                    self._backup.kill()
                for _ in range(30):
                    if not self._disk.words[WISH]:
                        break
                    self._step(client, 1)
                self._disk.words[WISH] = 0
            case "kill":
                threading.Timer(draw.uniform(0, 0.02), self._backup.kill).start()
                self._step(client, 4)
            case "stop":
                self._backup.send_signal(signal.SIGTERM)
                self._step(client, 2)
            case "anew":
                client.begin_anew()
            case "failover":
                client.fail_over()

    def _step(self, client: Client, count: int) -> None:
        for number in range(count):
            client.checkpoint(wait=number == count - 1 or self.draw.random() < 0.3)

    @contextmanager
    def _powered(self) -> Iterator[None]:
        """A backup runs, and is started again whenever it ends; somebody else writes the disk's cache back at times."""
        self._over.clear()
        given = self._settings | {
            "generation": self._generation,
            "counter": str(self._disk.counter),
            "store": str(self._disk.mounted / "store"),
            "on_failover": f"echo {self._generation} $(od -An -tu8 -N8 {self._disk.counter}) $REMUS_NAME $REMUS_TERM "
            f">> {self.where}/takeovers",
        }
        command = [sys.executable, str(Path(__file__).with_name("backup.py")), json.dumps(given)]
        log = os.open(self.where / "backup.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._backup = subprocess.Popen(command, stderr=log)

        def keep_up() -> None:
            while True:
                self._backup.wait()
                if self._over.is_set():
                    return
                with self.span("restart"):
                    self._backup = subprocess.Popen(command, stderr=log)

        write_back = self.draw.random() < 0.5
        dice = random.Random(self.draw.getrandbits(32))

        def disturb() -> None:
            while write_back and not self._over.wait(dice.uniform(0.001, 0.05)):
                _write_back(self._disk.mounted, dice)

        threads = [threading.Thread(target=keep_up), threading.Thread(target=disturb)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._backup.kill()
            for thread in threads:
                thread.join()
            self._backup.wait()
            os.close(log)

    @contextmanager
    def span(self, what: str) -> Iterator[None]:
        """What this side was at."""
        begin = self._disk.position
        yield
        self.spans.append((what, self._generation, begin, self._disk.position))

    def tell(self, kind: str, name: str, **more: Any) -> None:
        """Somebody was told something, and the disk was that far when it was heard."""
        with self._telling:
            at = [self._generation, self._disk.position]
            self.told.append({"at": at, "kind": kind, "name": name, **more})

    def _keep(self) -> None:
        """What a later look needs."""
        for line in (self.where / "takeovers").read_text().splitlines():
            generation, at, name, term = line.split()
            self.told.append({"at": [int(generation), int(at)], "kind": "takeover", "name": name, "term": int(term)})
        self.told.sort(key=lambda event: event["at"])
        record = {"options": self.options, "told": self.told, "truth": self.truth, "spans": self.spans}
        (self.where / "record").write_text(json.dumps(record))


def _write_back(mounted: Path, dice: random.Random) -> None:
    """Some file's pages go to the disk, with no flush behind them; or all, with one."""
    with suppress(OSError):
        if dice.random() < 0.2:
            fd = os.open(mounted, os.O_RDONLY)
            _libc.syncfs(fd)
        else:
            files = [path for path in mounted.rglob("*") if path.is_file()]
            fd = os.open(dice.choice(files or [mounted]), os.O_RDONLY)
            _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)
        os.close(fd)
