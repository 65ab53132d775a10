#!/usr/bin/env python3
"""Runs a worker, `protect` and `backup` for long, breaks their link, restarts the backup, and looks for what grows.

    soak.py [--minutes N] [--pace N] [--tls] [--mib N] [--seed N] [--keep DIR]
    sudo soak.py --vm [--minutes N] …              # a virtual machine with a disk, and all that protects it

The processes are started as users start them. The link is cut now and then all the time; the backup is stopped or
killed and started again in the first third only, so that what it leaks later adds up. It compacts and prunes unasked,
and a reader verifies the store beside it. Figures are taken six times a minute; each minute prints a line of them. At
the end a straight line is fitted to those of the last two thirds, over commits and over cuts: its slope is the growth,
and the verdict. What is restored is compared with the worker's memory.

With --vm the guest of the demo runs under `run` on a host of its own, with a pause every 50 ms, and a client checks
every byte of its answers; nothing is cut or restarted. It writes and reads back pages and blocks all the time.

Exit codes: 0 nothing grows and nothing is lost, 1 otherwise (the directory is kept then).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, fmean, linear_regression
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from remus_ckpt.demo import guest, vm
from remus_ckpt.demo.lan import Host
from remus_ckpt.errors import RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys

NAME = vm.NAME
PATIENCE_S = 60.0
WORKER = """
import mmap, random, signal, sys, time
file = open(sys.argv[1], "r+b")
memory, draw = mmap.mmap(file.fileno(), 0), random.Random(int(sys.argv[2]))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(time.sleep(1e6)))
print("ready", flush=True)
while True:
    for _ in range(50):
        at = draw.randrange(len(memory) // 4096) * 4096
        memory[at : at + 64] = draw.randbytes(64)
    if draw.random() < 0.01:
        at = draw.randrange(len(memory) // 2)
        memory[at : at + (1 << 20)] = draw.randbytes(len(memory[at : at + (1 << 20)]))
    time.sleep(0.01)
"""


Figures = dict[str, float]
"""Of one instant: WHO_fds, WHO_threads, WHO_rss of each process, disk, commits, cuts. rss and disk: MiB; cuts: of the
link, so far"""

LOOKS = 6
"""Per minute."""
SHOWN = "commits", "cuts", "fds", "threads", "rss", "disk"
"""Each minute, as totals."""
GROWTH = {"fds": 4.0, "threads": 4.0, "rss": 8.0, "disk": 64.0}
"""How much a line through the last two thirds may rise, beyond what chance can make it rise."""
SURE = 3.0
"""Standard errors of a slope that are left to chance."""


class Relay:
    """Forwards to the backup, and hangs up when it is told to."""

    def __init__(self) -> None:
        self.target: Address | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Hang up on all."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            inner, _ = self._listener.accept()
            try:
                assert self.target is not None
                outer = socket.create_connection((self.target.host, self.target.port), 5.0)
            except OSError:
                inner.close()
                continue
            outer.settimeout(None)
            threading.Thread(target=self._serve, args=(inner, outer), daemon=True).start()

    def _serve(self, inner: socket.socket, outer: socket.socket) -> None:
        pair = [inner, outer]
        with self._lock:
            self._open += pair
        back = threading.Thread(target=self._copy, args=(outer, inner), daemon=True)
        back.start()
        self._copy(inner, outer)
        back.join()
        with self._lock:
            self._open = [sock for sock in self._open if sock not in pair]
        for sock in pair:
            sock.close()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Worker:
    """A process with its memory, protected through a link that breaks."""

    def __init__(self, options: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
        self.draw = random.Random(options.seed)
        self.directory = directory
        self.store = directory / "store"
        self.cuts = 0
        self.pace = options.pace
        self.relay = Relay()
        self.scheme = "tls" if options.tls else "tcp"
        self.tls_dir: dict[str, list[object]] = {"primary": [], "backup": []}
        self.tls: TlsFiles | None = None
        if options.tls:
            keys.init(directory / "keys")
            for name in self.tls_dir:
                keys.issue(directory / "keys", name, hosts=["127.0.0.1"])
                self.tls_dir[name] = ["--tls-dir", directory / "keys" / name]
            self.tls = TlsFiles(directory / "keys" / "primary")
        self._stack = stack
        self.memory = Path(f"/dev/shm/remus-soak-{os.getpid()}")
        stack.callback(self.memory.unlink, missing_ok=True)
        with self.memory.open("wb") as file:
            file.truncate(options.mib << 20)
        self.worker = self._start([sys.executable, "-c", WORKER, self.memory, options.seed], "worker")
        self._read_line(self.worker)
        self.backup = self._start_backup()
        self.protect = self._start(
            [
                *self._command("protect"), self.memory, "--pid", self.worker.pid, "--name", NAME, "--interval", "25ms",
                "--to", f"{self.scheme}://127.0.0.1:{self.relay.port}", *self.tls_dir["primary"],
            ],
            "protect",
        )  # fmt: skip

    def _command(self, name: str) -> list[object]:
        return [sys.executable, "-m", "remus_ckpt", name]

    def _start(self, command: list[object], log: str) -> subprocess.Popen[bytes]:
        errors: IO[bytes] = self._stack.enter_context((self.directory / f"{log}.log").open("ab"))
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=errors)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def _read_line(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line:
            raise RuntimeError(f"a process did not start: see {self.directory}")
        return line.strip()

    def _start_backup(self) -> subprocess.Popen[bytes]:
        backup = self._start(
            [
                *self._command("backup"), "--listen", f"{self.scheme}://127.0.0.1:0", "--store", self.store,
                "--keep-count", 200, *self.tls_dir["backup"],
            ],
            "backup",
        )  # fmt: skip
        self.relay.target = Address.parse(self._read_line(backup).removeprefix("listening on "))
        return backup

    def processes(self) -> dict[str, int]:
        """The pids of what must not grow."""
        return {"protect": self.protect.pid, "backup": self.backup.pid}

    def has_ended(self) -> bool:
        """Whether one of them has ended by itself."""
        return self.protect.poll() is not None or self.backup.poll() is not None

    def disturb(self, *, may_restart: bool) -> float:
        """Cut the link, or restart the backup. Returns in how many seconds it wants to be called again."""
        if may_restart and self.draw.random() < 0.3:
            self.restart_backup()
        else:
            self.relay.cut()
            self.cuts += 1
        return self.draw.uniform(2.0, 20.0) / self.pace

    def restart_backup(self) -> None:
        """Stop or kill it, and start it again on another port."""
        self.backup.send_signal(self.draw.choice([signal.SIGTERM, signal.SIGKILL]))
        self.backup.wait(PATIENCE_S)
        time.sleep(self.draw.uniform(0.0, 2.0))
        self.backup = self._start_backup()

    def committed(self) -> int:
        """The newest epoch that the backup has; −1 for none."""
        assert self.relay.target is not None
        status = ask(connect(self.relay.target, tls=self.tls), "status", {}, timeout_s=PATIENCE_S)
        found = status["names"].get(NAME)
        return -1 if found is None or found["epoch"] is None else int(found["epoch"])

    def finish(self) -> str:
        """Let the worker rest, end all, and hold what is restored against its memory: "" where they are the same."""
        self.worker.send_signal(signal.SIGUSR1)
        newest, deadline = self.committed(), time.monotonic() + PATIENCE_S
        while self.committed() < newest + 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        truth = hashlib.sha256(self.memory.read_bytes()).hexdigest()
        for process in (self.protect, self.backup):
            process.terminate()
            if code := process.wait(PATIENCE_S):
                return f"{process.args} ended with {code}"
        restored = self.directory / "restored.img"
        command = [*map(str, [*self._command("restore"), f"store:{self.store}/{NAME}", "-o", restored])]
        subprocess.run(command, check=True, capture_output=True)
        if hashlib.sha256(restored.read_bytes()).hexdigest() != truth:
            return "what is restored is not the worker's memory"
        restored.unlink()
        return verify(f"{self.store}/{NAME}")


class KeptShort(vm.Scene):
    """Hosts whose backups keep few checkpoints, so that what is kept reaches its full size at once."""

    def backup_words(self, host: Host) -> list[str]:
        return [*super().backup_words(host), "--keep-count", "200"]


class Guest:
    """A virtual machine with a disk, and a client that checks what it answers."""

    cuts = 0

    def __init__(self, options: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
        if lacks := vm.missing():
            raise SystemExit("a virtual machine needs " + "; ".join(lacks))
        disk = directory / "disk.raw"
        with disk.open("wb") as file:
            file.truncate(4 << 20)
        append = f"guest.pages=1000 guest.mib=16 guest.blocks={BLOCKS} guest.pause_us=10000"
        image = guest.build(guest.cache())
        # The backup does not take over by itself unless the machine stands still for long.
        self.scene = KeptShort(directory, image, interval="50ms", append=append, memory="96M", lease="60s")
        stack.callback(self.scene.close)
        self.here, self.there = self.scene.lan.a, self.scene.lan.b
        self.store = directory / "store-b"
        self._backup = self.scene.backup(self.there)
        words = [*self.scene.run_words(self.here), "-drive", f"file={disk},if=virtio,format=raw"]
        self._run = self.scene.start(self.here, "run", words)
        self._client = stack.enter_context(closing(vm.Client(self.scene.lan.client.inside(), seed=options.seed)))
        self.scene.until("the guest answers", lambda: self._client.is_ready(0.1) or self.has_ended(), 300.0)
        self.scene.until("the guest is protected", lambda: self.scene.is_protected(self.there))
        self._pids = {role: found[0] for role in ROLES if (found := self.scene.find(self.here, role))}
        self._pids |= {f"other_{role}": found[0] for role in ROLES if (found := self.scene.find(self.there, role))}
        print(f"processes: {self._pids}", flush=True)

    def processes(self) -> dict[str, int]:
        """The pids of what must not grow."""
        return self._pids

    def has_ended(self) -> bool:
        """Whether one of them has ended by itself."""
        return self._run.poll() is not None or self._backup.poll() is not None

    def disturb(self, *, may_restart: bool) -> float:
        """Nothing is. Looks at what the client has seen; returns in how many seconds it wants to be called again.

        Raises RemusError if an answer was wrong.
        """
        told = self._client.status()
        if told["wrong"] or told["faults"]:
            raise RemusError(f"the guest is not as it was: {told['wrong'] or told['faults']}")
        return 10.0

    def committed(self) -> int:
        """The newest epoch that the backup has. Raises RemusError if it does not answer."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self.scene.status(self.there)):
            if time.monotonic() > deadline:
                raise RemusError("the backup does not answer")
            time.sleep(1.0)
        return int(found["epoch"])

    def finish(self) -> str:
        """Kill the guest's host, have it go on elsewhere, and ask its client: "" where all is well."""
        before = self._client.status()["answers"]
        self.here.kill()
        command = self.scene.command(
            self.there, "failover", "--from", f"unix:{self.scene.folder / 'b.sock'}", "--name", NAME
        )
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            return f"failover ends with {ran.returncode}: {ran.stderr[-300:]}"
        told = self._client.until_answers(100, PATIENCE_S)
        if told["wrong"] or told["faults"] or told["answers"] < before + 100:
            return f"the client has heard something wrong, or too little: {told}"
        return verify(f"{self.store}/{NAME}")


ROLES = ("primary", "backup", "qemu", "bridge", "disk server")
BLOCKS = 128


def verify(name: str) -> str:
    """What a reader beside the backup says: "" where all is well. name: its directory in the store"""
    command = [sys.executable, "-m", "remus_ckpt", "verify", f"store:{name}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if ran.returncode == 0 else f"verify ends with {ran.returncode}: {(ran.stdout + ran.stderr)[-300:]}"


def look(soak: Worker | Guest) -> Figures:
    """The figures of now."""
    sizes = []
    for path in soak.store.rglob("*"):
        with suppress(OSError):
            sizes.append(path.stat().st_blocks * 512)
    found: Figures = {}
    for who, pid in soak.processes().items():
        found |= {f"{who.replace(' ', '_')}_{what}": value for what, value in figures(pid).items()}
    return found | {"disk": sum(sizes) / (1 << 20), "commits": soak.committed(), "cuts": soak.cuts}


def figures(pid: int) -> Figures:
    """Descriptors, threads, and resident MiB of a process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    rss = int(status["VmRSS"].split()[0]) / 1024
    return {"fds": len(os.listdir(proc / "fd")), "threads": int(status["Threads"]), "rss": rss}


@dataclass
class Line:
    """Fitted by least squares. slope: per unit of x; error: its standard error"""

    slope: float
    error: float

    @staticmethod
    def through(x: list[float], y: list[float]) -> Line:
        """Needs three points or more. Raises StatisticsError where all x are the same."""
        slope, start = linear_regression(x, y)
        middle = fmean(x)
        rest = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        return Line(slope, math.sqrt(rest / (len(x) - 2) / sum((a - middle) ** 2 for a in x)))


def judge(seen: list[Figures]) -> list[str]:
    """What grows in the last two thirds, and whether commits stand still."""
    tail = seen[len(seen) // 3 :]
    faults = []
    print(f"{'the last two thirds:':24}{'first':>10}{'last':>10}{'per 1,000 commits':>24}{'per cut':>24}")
    for name in seen[-1] if seen else ():
        most = GROWTH.get(name.rpartition("_")[2])
        if most is None or len(tail) < 3:
            continue
        y = [one[name] for one in tail]
        row, grows = f"  {name:22}{y[0]:10.1f}{y[-1]:10.1f}", 0.0
        for x in ([one["commits"] / 1000 for one in tail], [one["cuts"] for one in tail]):
            try:
                line = Line.through(x, y)
            except StatisticsError:
                row += f"{'—':>24}"
                continue
            row += f"{line.slope:+14.3f} ± {line.error:7.3f}"
            grows = max(grows, (line.slope - SURE * line.error) * (x[-1] - x[0]))
        print(row + ("  GROWS" if grows > most else ""))
        if grows > most:
            faults.append(f"{name} grows by {grows:.1f} or more; {most:g} is allowed")
    minutes = seen[::LOOKS]
    still = [
        number for number in range(1, len(minutes)) if minutes[number]["commits"] <= minutes[number - 1]["commits"]
    ]
    return faults + [f"no commit in minute {number + 1}" for number in still]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pace", type=float, default=1.0, help="so many times as many cuts and restarts")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--mib", type=int, default=16, help="of the worker's memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vm", action="store_true", help="of a virtual machine")
    parser.add_argument("--keep", type=Path, help="where its directory lies")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take apart what was set up
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="remus-soak-", dir=options.keep))
    faults: list[str] = []
    with ExitStack() as stack:
        soak = (Guest if options.vm else Worker)(options, directory, stack)
        seen: list[Figures] = []
        begin = time.monotonic()
        end, next_look, next_fault = begin + 60 * options.minutes, begin + 60 / LOOKS, begin + 2
        looks = 0
        while time.monotonic() < end:
            time.sleep(max(0.0, min(next_look, next_fault) - time.monotonic()))
            if soak.has_ended():
                faults.append(f"a process ended by itself: see {directory}")
                break
            try:
                if time.monotonic() < next_look:
                    may_restart = time.monotonic() < begin + 20 * options.minutes
                    next_fault = time.monotonic() + soak.disturb(may_restart=may_restart)
                    continue
                next_look += 60 / LOOKS
                looks += 1
                seen.append(look(soak))
            except (RemusError, OSError) as error:
                faults.append(f"minute {looks / LOOKS:.1f}: {error}")
                continue
            if looks % LOOKS == 0:
                row = {what: sum(value for name, value in seen[-1].items() if name.endswith(what)) for what in SHOWN}
                print(f"minute {looks // LOOKS}: " + ", ".join(f"{row[what]:.0f} {what}" for what in SHOWN), flush=True)
            if looks % (5 * LOOKS) == 0 and (said := verify(f"{soak.store}/{NAME}")):
                faults.append(said)
        else:
            if said := soak.finish():
                faults.append(said)
        faults += judge(seen)
    print(*faults or ["all is well: nothing grows, and what goes on is what was protected"], sep="\n")
    if faults:
        print(f"kept: {directory}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
