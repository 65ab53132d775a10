#!/usr/bin/env python3
"""Runs a worker, `protect` and `backup` for long, breaks their link, restarts the backup, and looks for what grows.

    soak.py [--minutes N] [--pace N] [--tls] [--mib N] [--seed N] [--keep DIR]

The processes are started as users start them. The link is cut now and then all the time; the backup is stopped or
killed and started again in the first third only, so that what it leaks later adds up. It compacts and prunes unasked,
and a reader verifies the store beside it. Figures are taken six times a minute; each minute prints a line of them. At
the end a straight line is fitted to those of the last two thirds, over commits and over cuts: its slope is the growth,
and the verdict. What is restored is compared with the worker's memory.

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import StatisticsError, fmean, linear_regression
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from remus_ckpt.errors import RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys

NAME = "soak"
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


@dataclass
class Figures:
    """Of one instant. rss and disk: MiB; cuts: of the link, so far"""

    protect_fds: float
    protect_threads: float
    protect_rss: float
    backup_fds: float
    backup_threads: float
    backup_rss: float
    disk: float
    commits: float
    cuts: float


LOOKS = 6
"""Per minute."""
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


class Soak:
    """All that runs."""

    def __init__(self, options: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
        self.draw = random.Random(options.seed)
        self.directory = directory
        self.store = directory / "store"
        self.cuts = 0
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

    def restart_backup(self) -> None:
        """Stop or kill it, and start it again on another port."""
        self.backup.send_signal(self.draw.choice([signal.SIGTERM, signal.SIGKILL]))
        self.backup.wait(PATIENCE_S)
        time.sleep(self.draw.uniform(0.0, 2.0))
        self.backup = self._start_backup()

    def verify(self) -> str:
        """What a reader beside the backup says: "" where all is well."""
        command = [*map(str, [*self._command("verify"), f"store:{self.store}/{NAME}"])]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return "" if ran.returncode == 0 else f"verify ends with {ran.returncode}: {(ran.stdout + ran.stderr)[-300:]}"

    def committed(self) -> int:
        """The newest epoch that the backup has; −1 for none."""
        assert self.relay.target is not None
        status = ask(connect(self.relay.target, tls=self.tls), "status", {}, timeout_s=PATIENCE_S)
        found = status["names"].get(NAME)
        return -1 if found is None or found["epoch"] is None else int(found["epoch"])

    def look(self) -> Figures:
        """The figures of now."""
        sizes = []
        for path in self.store.rglob("*"):
            with suppress(OSError):
                sizes.append(path.stat().st_blocks * 512)
        disk = sum(sizes) / (1 << 20)
        return Figures(*figures(self.protect.pid), *figures(self.backup.pid), disk, self.committed(), self.cuts)

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
        return self.verify()


def figures(pid: int) -> tuple[int, int, float]:
    """Descriptors, threads, and resident MiB of a process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return len(os.listdir(proc / "fd")), int(status["Threads"]), int(status["VmRSS"].split()[0]) / 1024


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
    for name in (field.name for field in fields(Figures)):
        most = GROWTH.get(name.rpartition("_")[2])
        if most is None or len(tail) < 3:
            continue
        y = [getattr(one, name) for one in tail]
        row, grows = f"  {name:22}{y[0]:10.1f}{y[-1]:10.1f}", 0.0
        for x in ([one.commits / 1000 for one in tail], [one.cuts for one in tail]):
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
    still = [number for number in range(1, len(minutes)) if minutes[number].commits <= minutes[number - 1].commits]
    return faults + [f"no commit in minute {number + 1}" for number in still]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pace", type=float, default=1.0, help="so many times as many cuts and restarts")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--mib", type=int, default=16, help="of the worker's memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where its directory lies")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="remus-soak-", dir=options.keep))
    faults: list[str] = []
    with ExitStack() as stack:
        soak = Soak(options, directory, stack)
        seen: list[Figures] = []
        begin = time.monotonic()
        end, next_look, next_fault = begin + 60 * options.minutes, begin + 60 / LOOKS, begin + 2
        restarts = looks = 0
        print("minute  " + "  ".join(field.name for field in fields(Figures)) + "  restarts", flush=True)
        while time.monotonic() < end:
            time.sleep(max(0.0, min(next_look, next_fault) - time.monotonic()))
            if soak.protect.poll() is not None or soak.backup.poll() is not None:
                faults.append(f"protect or backup ended by itself: see {directory}")
                break
            if time.monotonic() < next_look:
                if time.monotonic() < begin + 20 * options.minutes and soak.draw.random() < 0.3:
                    soak.restart_backup()
                    restarts += 1
                else:
                    soak.relay.cut()
                    soak.cuts += 1
                next_fault = time.monotonic() + soak.draw.uniform(2.0, 20.0) / options.pace
                continue
            next_look += 60 / LOOKS
            looks += 1
            try:
                seen.append(soak.look())
            except (RemusError, OSError) as error:
                faults.append(f"minute {looks / LOOKS:.1f}: {error}")
                continue
            if looks % LOOKS == 0:
                row = "  ".join(f"{getattr(seen[-1], field.name):{len(field.name)}.0f}" for field in fields(Figures))
                print(f"{looks // LOOKS:6}  {row}  {restarts:8}", flush=True)
            if looks % (5 * LOOKS) == 0 and (said := soak.verify()):
                faults.append(said)
        else:
            if said := soak.finish():
                faults.append(said)
        faults += judge(seen)
    print(*faults or ["all is well: nothing grows, and what is restored is the worker's memory"], sep="\n")
    if faults:
        print(f"kept: {directory}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
