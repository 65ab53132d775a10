"""Kills, freezes and cuts around a commit log, and looks whether anything that was released is lost, or done twice.

    sudo python tools/fleet_kills.py --runs 300 [--seed 1] [--only FAULT] [--frozen 60 6] [--jobs 2] [--json FILE]
    sudo python tools/fleet_kills.py --control         # without the log: the check must find what it looks for

Three brokers, two backups that take over by themselves, and in each run a primary, all real processes, each on a host
of its own: a network namespace with its own address on one switch. The primary counts, and releases each number once
its checkpoint is committed; if its backup does not answer, it goes to the other one. Then something is killed, frozen
or cut off at a random instant. A cut lets nothing through between two hosts, either way, and nobody is told; each pair
of hosts has its turn, and each host is cut off from all others. In every other run the primary is killed a little
later, and at last all is mended.

Of each run must hold: no number was released twice; at most one backup went on; it went on from a number no lower than
any that was released, also by a primary that woke up later; nothing was released that could not reach a majority of
brokers; and something goes on: the primary commits again, or a backup has taken over. At the end of all runs the
first three must still hold of each.

A run is invalid if its primary committed nothing before anything was broken, or if no broker was the leader that was to
be broken. It is counted, with the reason.

With --control the backups have a fence that always succeeds and stops nobody, in place of the log.

Exit codes: 0 all is well (with --control: a fault was found), 1 not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.demo.lan import Host, Network
from remus_ckpt.errors import LogError
from remus_ckpt.fleet.jetstream import STREAM, Nats
from remus_ckpt.link.address import INSECURE_OPTION

LEASE_S = 1.0
PATIENCE_S = 45.0
"""Something must go on within this time after all was mended."""
STOP_S = 15.0
"""A primary that was taken over, and that nothing is cut off from, hears of it within this time."""
MOVE_S = 2.5
"""A primary that could commit nothing for so long goes to the other backup."""
DONE_S = 1.0
"""What was committed when the log was lost has been released after this time."""
PRIMARY, A, B = "primary", "backup-a", "backup-b"
BROKERS = ("broker-0", "broker-1", "broker-2")
HOSTS = (PRIMARY, A, B, *BROKERS)
Pair = tuple[str, str]
CUTS: dict[str, Sequence[Sequence[Pair]]] = {
    "cut primary-backup": [[(PRIMARY, A)], [(PRIMARY, B)]],
    "cut primary-broker": [[(PRIMARY, broker)] for broker in BROKERS],
    "cut backup-broker": [[(backup, broker)] for backup in (A, B) for broker in BROKERS],
    "cut backup-backup": [[(A, B)]],
    "cut broker-broker": [[pair] for pair in itertools.combinations(BROKERS, 2)],
    "cut primary-log": [[(PRIMARY, broker) for broker in BROKERS]],
    "cut backup-log": [[(A, broker) for broker in BROKERS]],
    "cut off primary": [[(PRIMARY, other) for other in HOSTS if other != PRIMARY]],
    "cut off backup": [[(A, other) for other in HOSTS if other != A]],
    "cut off broker": [[(broker, other) for other in HOSTS if other != broker] for broker in BROKERS],
}
"""Between which hosts each kind cuts, by turns."""
FAULTS = ("leader", "broker", "two brokers", "backup", "primary", *CUTS, "cut off leader", "frozen primary")
HAS_NO_LOG = ("two brokers", "cut primary-log", "cut off primary", "frozen primary")
"""Meanwhile the primary can commit nothing."""
LASTS_S = (0.2, 1.0, 2.5, 5.0)
BROKERS_NOTICE_S = (1.0, 4.0, 8.0, 12.0)
"""How long brokers are cut off from each other: they elect a leader after 4 to 9 s."""


@dataclass
class Outcome:
    """What became of a run.

    detail: between which hosts it was cut, which brokers died, or for how long the primary was frozen
    invalid: why it shows nothing, "" if it does
    wait_s: from the mending until something went on; gap_s: longest time without a release
    """

    number: int
    fault: str
    also_killed: bool
    detail: str = ""
    invalid: str = ""
    released: int = 0
    takeovers: int = 0
    denied: bool = False
    fenced: bool = False
    wait_s: float = 0.0
    gap_s: float = 0.0
    took_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Backup:
    """A backup that takes over by itself, in a process of its own.

    log: None: a fence for show takes its place
    host: where it runs; None: on this machine
    """

    def __init__(self, folder: Path, name: str, log: str | None, host: Host | None = None) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self._log = log
        self._host = host
        self._listens = ("127.0.0.1" if host is None else host.address, _free_port())
        self.address = "tcp://{}:{}".format(*self._listens)
        self._promotions = self.folder / "promotions"
        self._promotions.touch()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        note = f'echo "$REMUS_NAME $REMUS_TERM $(od -An -t d8 -N 8 "$REMUS_IMAGE")" >> {self._promotions}'
        how = ["--fence", "true"] if self._log is None else ["--log", self._log]
        words = [
            *(sys.executable, "-m", "remus_ckpt", "backup", "--listen", self.address, INSECURE_OPTION),
            *("--store", str(self.folder / "store"), "--lease", f"{LEASE_S:g}s", "--auto-failover"),
            *("--on-failover", note, *how),
        ]
        if self._host is not None:
            words = self._host.inside(*words)
        with open(self.folder / "output", "ab") as output:
            command = ["setpriv", "--pdeathsig", "KILL", *words]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        until(self._is_listening, 30.0)

    def _is_listening(self) -> bool:
        with suppress(OSError), socket.create_connection(self._listens, 1.0):
            return True
        return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def took_over(self, name: str) -> list[int]:
        """The numbers from which it went on with that name."""
        promotions = [line.split() for line in self._promotions.read_text().splitlines()]
        return [int(value) for who, _, value in promotions if who == name]

    def was_denied(self, name: str) -> bool:
        lines = (self.folder / "output").read_text().splitlines()
        return any("takeover denied" in line and f"name={name} " in f"{line} " for line in lines)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def until(look: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def be_the_primary(name: str, addresses: list[str], log: str | None, out: str) -> int:
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
        return connect(Address.parse(addresses[where]), insecure=True, timeout_s=2.0)

    source = OwnMemory({"array": array})
    commit_log = None if log is None else OpenedLog(log, insecure=True)
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
        time.sleep(0.01)


class Run:
    """One run, and what it left behind.

    turn: how many of its kind came before
    """

    def __init__(self, scene: Scene, number: int, fault: str, turn: int, rng: random.Random, frozen_s: float) -> None:
        self.scene, self.turn, self.rng, self.frozen_s = scene, turn, rng, frozen_s
        self.name = f"r{number}"
        self.out = scene.folder / f"{self.name}.out"
        also_killed = fault not in ("primary", "frozen primary") and rng.random() < 0.5
        self.outcome = Outcome(number, fault, also_killed)
        self.is_killed = False

    def go(self) -> Outcome:
        begin = time.monotonic()
        scene, outcome = self.scene, self.outcome
        command = [sys.executable, __file__, "--be-primary", self.name, *(one.address for one in scene.backups)]
        command = scene.hosts[PRIMARY].inside(*command, scene.log or "", self.out)
        error_file = scene.folder / f"{self.name}.err"
        with open(error_file, "wb") as errors:
            primary = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stderr=errors)
        try:
            if until(lambda: len(self.releases()) > 3, PATIENCE_S):
                self.act(primary)
            else:
                said = error_file.read_text().splitlines()[-1:]
                outcome.invalid = f"nothing committed in {PATIENCE_S:g} s: {''.join(said)[:200]}"
        except LogError as error:
            outcome.invalid = str(error)
        finally:
            with suppress(ProcessLookupError):
                primary.kill()
            primary.wait()
        self.judge()
        outcome.took_s = time.monotonic() - begin
        return outcome

    def act(self, primary: subprocess.Popen[bytes]) -> None:
        """Break something, mend it, and wait until something goes on."""
        outcome = self.outcome
        time.sleep(self.rng.uniform(0.0, 1.0))
        mend, lasts_s = self.break_it(primary)
        broken = time.monotonic()
        if outcome.also_killed:
            time.sleep(min(self.rng.uniform(0.0, 1.5), lasts_s))
            self.kill(primary)
        time.sleep(max(broken + lasts_s - time.monotonic(), 0.0))
        unbroken = time.monotonic()
        mend()
        if outcome.fault in HAS_NO_LOG and any(broken + DONE_S < at < unbroken for _, _, at in self.releases()):
            outcome.wrong.append("released without the log")
        mended, count = time.monotonic(), len(self.releases())
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

    def kill(self, primary: subprocess.Popen[bytes]) -> None:
        primary.kill()
        primary.wait()
        self.is_killed = True

    def break_it(self, primary: subprocess.Popen[bytes]) -> tuple[Callable[[], object], float]:
        """Break what is to be broken; returns what mends it, and after how many seconds that is to be done."""
        scene, brokers, outcome = self.scene, self.scene.brokers, self.outcome
        lasts_s = self.rng.choice(LASTS_S)
        match outcome.fault:
            case "leader" | "broker" | "two brokers":
                if outcome.fault == "leader":
                    which = [scene.leader()]
                else:
                    which = self.rng.sample(range(3), 1 + (outcome.fault == "two brokers"))
                outcome.detail = ", ".join(BROKERS[one] for one in which)
                for one in which:
                    brokers.kill(one)
                return lambda: [brokers.start(one) for one in which], lasts_s
            case "backup":
                scene.backups[0].kill()
                return scene.backups[0].start, lasts_s
            case "primary":
                self.kill(primary)
                return lambda: None, lasts_s
            case "frozen primary":
                outcome.detail = f"{self.frozen_s:g} s"
                primary.send_signal(signal.SIGSTOP)
                return lambda: primary.send_signal(signal.SIGCONT), self.frozen_s
            case "cut off leader":
                which_ways = CUTS["cut off broker"]
                pairs = which_ways[scene.leader()]
                outcome.detail = pairs[0][0]
            case cut:
                pairs = CUTS[cut][self.turn % len(CUTS[cut])]
                outcome.detail = "-".join(pairs[0]) if len(pairs) == 1 else pairs[0][0]
        if any(far in BROKERS and (near in BROKERS or len(pairs) > 1) for near, far in pairs):
            lasts_s = self.rng.choice(BROKERS_NOTICE_S)
        ends = [(scene.hosts[near], scene.hosts[far]) for near, far in pairs]
        for near, far in ends:
            near.cut_from(far)
        return lambda: [near.mend_to(far) for near, far in ends], lasts_s

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
        """Look for what must not be; once more at the end of all runs."""
        outcome, releases, survivors = self.outcome, self.releases(), self.survivors()
        outcome.takeovers = len(survivors)
        outcome.released = max((last for _, last, _ in releases), default=0)
        outcome.denied = any(backup.was_denied(self.name) for backup in self.scene.backups)
        outcome.gap_s = max((b[2] - a[2] for a, b in itertools.pairwise(releases)), default=0.0)
        found = []
        if any(b[0] <= a[1] for a, b in itertools.pairwise(releases)):
            found.append("a number was released twice")
        if len(survivors) > 1:
            found.append(f"two went on, from {survivors}")
        found += [
            f"{outcome.released} was released, and a survivor goes on from {value}"
            for value in survivors
            if outcome.released > value
        ]
        outcome.wrong += [one for one in found if one not in outcome.wrong]


class Scene:
    """Hosts, brokers and backups that stay for all runs. The calling thread is on their network until `stack` ends."""

    def __init__(self, stack: ExitStack, folder: Path, has_log: bool) -> None:
        self.folder = folder
        addresses = {name: (f"10.83.9.{11 + number}", "") for number, name in enumerate(HOSTS)}
        network = stack.enter_context(Network({"observer": ("10.83.9.1", ""), **addresses}))
        self.hosts = network.hosts
        stack.enter_context(self.hosts["observer"].visit())
        (folder / "brokers").mkdir()
        hosts = [self.hosts[name] for name in BROKERS]
        self.brokers = stack.enter_context(Brokers(folder / "brokers", hosts=hosts))
        self.brokers.make_log()
        self.log = self.brokers.url if has_log else None
        self.backups = [Backup(folder, name, self.log, self.hosts[name]) for name in (A, B)]
        for backup in self.backups:
            stack.callback(backup.kill)

    def leader(self) -> int:
        """The broker that leads the stream of the log. Raises LogError if nobody says so for a while."""
        deadline = time.monotonic() + PATIENCE_S
        nats = Nats(self.brokers.url, insecure=True)
        try:
            while True:
                try:
                    info: Any = nats.run(nats.jetstream().stream_info(STREAM))
                    return int(str(info.cluster.leader).rpartition("-")[2])
                except (*nats.failures, ValueError) as error:  # there is none now, or it does not answer
                    if time.monotonic() > deadline:
                        raise LogError(f"no broker leads the log: {error}") from None
                time.sleep(0.2)
        finally:
            nats.close()


def work(options: argparse.Namespace, following: Any, done: Any) -> None:
    """Runs of one scene, in a process of its own. following: the number of the next run; done: takes outcomes"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    faults = [options.only] if options.only else FAULTS
    runs = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-fleet-kills-")))
        scene = Scene(stack, folder, has_log=not options.control)
        while True:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= options.runs:
                break
            turn, which = divmod(number, len(faults))
            rng = random.Random(f"{options.seed} {number}")
            runs.append(Run(scene, number, faults[which], turn, rng, options.frozen[turn % len(options.frozen)]))
            done.put(runs[-1].go())
        for run in runs:
            before = list(run.outcome.wrong)
            run.judge()
            if run.outcome.wrong != before:
                done.put(run.outcome)
    done.put(None)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2 * len(FAULTS))
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", choices=FAULTS)
    parser.add_argument("--frozen", type=float, nargs="+", default=[6.0], help="seconds a primary is frozen, by turns")
    parser.add_argument("--jobs", type=int, default=1, help="scenes side by side")
    parser.add_argument("--control", action="store_true", help="without the log")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--be-primary", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_primary:
        name, a, b, log, out = options.be_primary
        return be_the_primary(name, [a, b], log or None, out)
    if os.geteuid() != 0:
        parser.error("needs root, for network namespaces: run it with sudo")
    print(f"seed {options.seed}", flush=True)
    following: Any = multiprocessing.Value("i", 0)
    done: multiprocessing.Queue[Outcome | None] = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=work, args=(options, following, done)) for _ in range(options.jobs)]
    outcomes: dict[int, Outcome] = {}
    begin = time.monotonic()
    try:
        for worker in workers:
            worker.start()
        going = len(workers)
        while going:
            try:
                outcome = done.get(timeout=1.0)
            except Empty:
                if any(worker.exitcode for worker in workers):
                    break
                continue
            if outcome is None:
                going -= 1
                continue
            outcomes[outcome.number] = outcome
            print(
                f"{outcome.number:4} {outcome.fault:20} {'+ kill' if outcome.also_killed else '      '} "
                f"released {outcome.released:5} takeovers {outcome.takeovers} wait {outcome.wait_s:5.1f} s of "
                f"{outcome.took_s:5.1f}  {'; '.join(outcome.wrong) or outcome.invalid or 'ok'}  {outcome.detail}",
                flush=True,
            )
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
        if options.json:
            options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes.values()], indent=1))
    print(f"\n{time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    return report(list(outcomes.values()), options)


def report(outcomes: Sequence[Outcome], options: argparse.Namespace) -> int:
    """Print a table; returns the exit code."""
    heads = f"{'valid':>5} {'+ kill':>6} {'takeovers':>9} {'denied':>6} {'fenced':>6} {'wait s, median/most':>20}"
    print(f"{'fault':20} {heads} {'invalid':>7} {'wrong':>6}")
    for fault in FAULTS:
        these = [outcome for outcome in outcomes if outcome.fault == fault]
        if not these:
            continue
        valid = [outcome for outcome in these if not outcome.invalid]
        waits = [outcome.wait_s for outcome in valid] or [0.0]
        counts = Counter[str]()
        for outcome in valid:
            counts["killed"] += outcome.also_killed
            counts["takeovers"] += outcome.takeovers
            counts["denied"] += outcome.denied
            counts["fenced"] += outcome.fenced
        wait = f"{statistics.median(waits):.1f} / {max(waits):.1f}"
        print(
            f"{fault:20} {len(valid):5} {counts['killed']:6} {counts['takeovers']:9} {counts['denied']:6} "
            f"{counts['fenced']:6} {wait:>20} {len(these) - len(valid):7} {sum(bool(one.wrong) for one in these):6}"
        )
    invalid = [outcome for outcome in outcomes if outcome.invalid]
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(outcomes) - len(invalid)} valid runs, {len(invalid)} invalid, {wrong} wrong")
    if len(outcomes) < options.runs:
        print(f"{options.runs - len(outcomes)} runs were not made")
        return 1
    return int(bool(wrong) != options.control or len(invalid) == len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
