"""Kills, freezes and cuts around a commit log, and looks whether anything that was released is lost, or done twice.

    python tools/fleet_kills.py --runs 100 [--seed 1] [--only FAULT] [--frozen 60] [--json FILE]
    python tools/fleet_kills.py --control         # without the log: the check must find what it looks for

Three brokers, two backups that take over by themselves, and in each run a primary, all real processes. The primary
counts, and releases each number once its checkpoint is committed; if its backup does not answer, it goes to the other
one. Then something is killed, frozen or cut off at a random instant, in every other run the primary is killed a little
later, and at last all is mended. Of each run must hold: no number was released twice; at most one backup went on; it
went on from a number no lower than any that was released, also by a primary that woke up later; and something goes on:
the primary commits again, or a backup has taken over.

With --control the backups have a fence that always succeeds and stops nobody, in place of the log.

Exit codes: 0 all is well (with --control: a fault was found), 1 not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEASE_S = 1.0
PATIENCE_S = 45.0
"""Something must go on within this time after all was mended."""
STOP_S = 15.0
"""A primary that was taken over, and that nothing is cut off from, hears of it within this time."""
MOVE_S = 2.5
"""A primary that could commit nothing for so long goes to the other backup."""
FAULTS = (
    "leader",
    "broker",
    "two brokers",
    "backup",
    "primary",
    "cut primary-backup",
    "cut primary-log",
    "cut backup-log",
    "frozen primary",
)


class Wire:
    """A TCP connection that can be cut as a cable is: what is sent stays away, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._whole = threading.Event()
        self._whole.set()
        self._is_over = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._is_over = True
        self._whole.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._whole.wait()
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to), 5.0) as far:
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._is_over:
                ready, _, _ = select.select([near, far], [], [], 0.5)
                self._whole.wait()
                for one in ready:
                    if not (data := one.recv(1 << 18)):
                        return
                    (far if one is near else near).sendall(data)


@dataclass
class Outcome:
    """What became of a run. wait_s: from the mending until something went on; gap_s: longest time without a release"""

    number: int
    fault: str
    also_killed: bool
    released: int = 0
    takeovers: int = 0
    denied: bool = False
    fenced: bool = False
    wait_s: float = 0.0
    gap_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Backup:
    """One of the two backups, in a process of its own, behind a wire to the brokers."""

    def __init__(self, folder: Path, letter: str, log: str | None) -> None:
        self.folder = folder / letter
        self.folder.mkdir()
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.promotions = self.folder / "promotions"
        self.promotions.touch()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        note = f'echo "$REMUS_NAME $REMUS_TERM $(od -An -t d8 -N 8 "$REMUS_IMAGE")" >> {self.promotions}'
        how = ["--fence", "true"] if self.log is None else ["--log", self.log]
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "remus_ckpt", "backup"),
                    *("--listen", f"tcp://127.0.0.1:{self.port}", "--store", str(self.folder / "store")),
                    *("--lease", f"{LEASE_S:g}s", "--auto-failover", "--on-failover", note, *how),
                ],
                stdout=output,
                stderr=output,
            )
        until(self.is_listening, 30.0)

    def is_listening(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def took_over(self, name: str) -> list[int]:
        """The numbers from which it went on with that name."""
        found = []
        for line in self.promotions.read_text().splitlines():
            who, _, value = line.split()
            if who == name:
                found.append(int(value))
        return found

    def was_denied(self, name: str) -> bool:
        return any(
            "takeover denied" in line and name in line for line in (self.folder / "output").read_text().splitlines()
        )


def until(look: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def be_the_primary(name: str, ports: list[int], log: str | None, out: str) -> int:
    """The primary's process: it counts, and writes what it releases into a file."""
    import numpy as np

    from remus_ckpt.errors import Fenced, RemusError
    from remus_ckpt.fleet.opening import OpenedLog
    from remus_ckpt.link.address import Address
    from remus_ckpt.link.connection import Connection
    from remus_ckpt.link.dial import connect
    from remus_ckpt.observe.log import configure_logs
    from remus_ckpt.service.primary import Primary
    from remus_ckpt.service.release import Committed
    from remus_ckpt.source.own_memory import OwnMemory

    configure_logs("text")
    array = np.zeros(1 << 12, dtype=np.int64)
    numbers: dict[int, int] = {}
    released, at = 0, time.monotonic()
    where = 0
    file = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def release(committed: Committed) -> None:
        nonlocal released, at
        number = numbers[committed.epoch]
        os.write(file, f"{released + 1} {number} {time.monotonic()}\n".encode())
        released, at = number, time.monotonic()

    def dial() -> Connection:
        nonlocal where, at
        if time.monotonic() - at > MOVE_S:
            where, at = 1 - where, time.monotonic()
        return connect(Address.parse(f"tcp://127.0.0.1:{ports[where]}"), timeout_s=2.0)

    source = OwnMemory({"array": array})
    commit_log = None if log is None else OpenedLog(log)
    primary = Primary(
        name,
        source,
        dial,
        commit_log=commit_log,
        on_commit=release,
        on_paused=lambda epoch: numbers.__setitem__(epoch, int(array[0])),
    )
    number = 0
    while True:
        number += 1
        array[0] = number
        try:
            primary.checkpoint(10.0)
        except Fenced as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except RemusError as error:
            print(error, file=sys.stderr)
        time.sleep(0.005)


class Run:
    """One run, and what it left behind."""

    def __init__(self, scene: Scene, number: int, fault: str, rng: random.Random, frozen_s: float) -> None:
        self.scene, self.rng, self.frozen_s = scene, rng, frozen_s
        self.name = f"r{number}"
        self.out = scene.folder / f"{self.name}.out"
        self.outcome = Outcome(number, fault, also_killed=fault != "primary" and rng.random() < 0.5)
        self.is_killed = False

    def go(self) -> Outcome:
        scene, outcome = self.scene, self.outcome
        command = [sys.executable, __file__, "--be-primary", self.name]
        command += [str(wire.port) for wire in scene.to_backups]
        with open(scene.folder / f"{self.name}.err", "wb") as errors:
            primary = subprocess.Popen([*command, scene.log_of("primary") or "", str(self.out)], stderr=errors)
        try:
            if not until(lambda: len(self.releases()) > 3, PATIENCE_S):
                outcome.wrong.append("it never began")
                return outcome
            time.sleep(self.rng.uniform(0.0, 1.0))
            mend = self.break_it(primary)
            if outcome.also_killed:
                time.sleep(self.rng.uniform(0.0, 1.5))
                self.kill(primary)
            time.sleep(self.rng.choice((0.2, 1.0, 2.5, 5.0)))
            mend()
            mended = time.monotonic()
            count = len(self.releases())
            if not until(lambda: bool(self.survivors()) or len(self.releases()) > count, PATIENCE_S):
                outcome.wrong.append("nothing goes on")
            outcome.wait_s = time.monotonic() - mended
            # Whoever still wants to act has the time to do so.
            time.sleep(2.5 * LEASE_S)
            if self.survivors() and not self.is_killed:
                until(lambda: primary.poll() is not None, STOP_S)
                outcome.fenced = primary.poll() == 22
                if primary.poll() is None:
                    outcome.wrong.append("the primary was taken over, and does not stop")
        finally:
            with suppress(ProcessLookupError):
                primary.kill()
            primary.wait()
        self.judge()
        return outcome

    def kill(self, primary: subprocess.Popen[bytes]) -> None:
        primary.kill()
        primary.wait()
        self.is_killed = True

    def break_it(self, primary: subprocess.Popen[bytes]) -> Callable[[], None]:
        """Break what is to be broken; returns what mends it."""
        scene, brokers = self.scene, self.scene.brokers
        match self.outcome.fault:
            case "leader" | "broker" | "two brokers":
                if self.outcome.fault == "leader":
                    which = [scene.leader()]
                else:
                    which = self.rng.sample(range(3), 1 + (self.outcome.fault == "two brokers"))
                for one in which:
                    brokers.kill(one)
                return lambda: [brokers.start(one) for one in which] and None
            case "backup":
                scene.backups[0].kill()
                return scene.backups[0].start
            case "primary":
                self.kill(primary)
                return lambda: None
            case "frozen primary":
                primary.send_signal(signal.SIGSTOP)
                time.sleep(self.frozen_s)
                return lambda: None if self.is_killed else primary.send_signal(signal.SIGCONT)
            case cut:
                wires = {
                    "cut primary-backup": scene.to_backups[:1],
                    "cut primary-log": scene.to_log["primary"],
                    "cut backup-log": scene.to_log["a"],
                }[cut]
                for wire in wires:
                    wire.cut()
                return lambda: [wire.mend() for wire in wires] and None

    def releases(self) -> list[tuple[int, int, float]]:
        """What was released: from and to which number, and when."""
        found = []
        if self.out.exists():
            for line in self.out.read_text().splitlines():
                first, last, at = line.split()
                found.append((int(first), int(last), float(at)))
        return found

    def survivors(self) -> list[int]:
        return [value for backup in self.scene.backups for value in backup.took_over(self.name)]

    def judge(self) -> None:
        outcome, releases, survivors = self.outcome, self.releases(), self.survivors()
        outcome.takeovers = len(survivors)
        outcome.released = max((last for _, last, _ in releases), default=0)
        outcome.denied = any(backup.was_denied(self.name) for backup in self.scene.backups)
        outcome.gap_s = max((b[2] - a[2] for a, b in itertools.pairwise(releases)), default=0.0)
        if any(b[0] <= a[1] for a, b in itertools.pairwise(releases)):
            outcome.wrong.append("a number was released twice")
        if len(survivors) > 1:
            outcome.wrong.append(f"two went on, from {survivors}")
        for value in survivors:
            if outcome.released > value:
                outcome.wrong.append(f"{outcome.released} was released, and a survivor goes on from {value}")


class Scene:
    """Brokers and backups, which stay for all runs, and the wires between."""

    def __init__(self, stack: ExitStack, folder: Path, has_log: bool) -> None:
        from remus_ckpt.demo.brokers import Brokers

        self.folder = folder
        self.brokers = stack.enter_context(Brokers(folder / "brokers"))
        self.brokers.make_log()
        self._has_log = has_log
        ports = [int(self.brokers.url_of(number).rpartition(":")[2]) for number in range(3)]
        self.to_log = {who: [Wire(port) for port in ports] for who in ("a", "b", "primary")}
        self.backups = [Backup(folder, who, self.log_of(who)) for who in ("a", "b")]
        for backup in self.backups:
            stack.callback(backup.kill)
        self.to_backups = [Wire(backup.port) for backup in self.backups]
        for wire in (*self.to_backups, *(wire for wires in self.to_log.values() for wire in wires)):
            stack.callback(wire.close)

    def log_of(self, who: str) -> str | None:
        if not self._has_log:
            return None
        return "nats://" + ",".join(f"127.0.0.1:{wire.port}" for wire in self.to_log[who])

    def leader(self) -> int:
        """The broker that leads the stream of the log."""
        from remus_ckpt.fleet.jetstream import STREAM, Nats

        nats = Nats(self.brokers.url)
        try:
            info: Any = nats.run(nats.jetstream().stream_info(STREAM))
        finally:
            nats.close()
        return int(str(info.cluster.leader).rpartition("-")[2])


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=27)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", choices=FAULTS)
    parser.add_argument("--frozen", type=float, default=6.0, help="how long a primary is frozen, in seconds")
    parser.add_argument("--control", action="store_true", help="without the log")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--be-primary", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_primary:
        name, a, b, log, out = options.be_primary
        return be_the_primary(name, [int(a), int(b)], log or None, out)
    print(f"seed {options.seed}", flush=True)
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-fleet-kills-")))
        (folder / "brokers").mkdir()
        scene = Scene(stack, folder, has_log=not options.control)
        for number in range(options.runs):
            fault = options.only or FAULTS[number % len(FAULTS)]
            outcome = Run(scene, number, fault, random.Random(f"{options.seed} {number}"), options.frozen).go()
            outcomes.append(outcome)
            print(
                f"{number:4} {fault:20} {'+ kill' if outcome.also_killed else '      '} released {outcome.released:5}"
                f" takeovers {outcome.takeovers} wait {outcome.wait_s:5.1f} s  {'; '.join(outcome.wrong) or 'ok'}",
                flush=True,
            )
        if options.json:
            options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return report(outcomes, options.control)


def report(outcomes: list[Outcome], is_control: bool) -> int:
    """Print a table; returns the exit code."""
    heads = f"{'runs':>5} {'takeovers':>9} {'denied':>6} {'fenced':>6} {'wait s, median/most':>20} {'wrong':>6}"
    print(f"\n{'fault':20} {heads}")
    for fault in FAULTS:
        these = [outcome for outcome in outcomes if outcome.fault == fault]
        if these:
            waits = [outcome.wait_s for outcome in these]
            counts = Counter[str]()
            for outcome in these:
                counts["takeovers"] += outcome.takeovers
                counts["denied"] += outcome.denied
                counts["fenced"] += outcome.fenced
                counts["wrong"] += bool(outcome.wrong)
            wait = f"{statistics.median(waits):.1f} / {max(waits):.1f}"
            print(
                f"{fault:20} {len(these):5} {counts['takeovers']:9} {counts['denied']:6} {counts['fenced']:6} "
                f"{wait:>20} {counts['wrong']:6}"
            )
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(outcomes)} runs, {wrong} wrong")
    return int(bool(wrong) != is_control)


if __name__ == "__main__":
    sys.exit(main())
