"""How fast primary and backup are here, and beside what: tools/bench_service.py [--quick] [--json FILE]

Real processes: a worker that writes to a file in /dev/shm, a primary that protects it, a backup that stores on the disk
that `--directory` is on. Beside each stands, in the same run and with the same worker at work, what no backup gets
past: a peer that receives the same number of bytes in one piece, writes them to a file, calls fdatasync, and answers.
Latencies go by the clock, from a checkpoint's first byte on its way to the word that it is durable.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, progress, table

from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service import keys
from remus_ckpt.service.protect import primary_of
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.release import Committed
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.store import Store

MIB = 1 << 20
NAME = "bench"
WORDS = 4
"""Words that the worker changes in a page, at random places: as deltas of real processes have a few."""
SETTLE = 4
"""Checkpoints before anything is counted: the first is a full copy."""
_TICKS = 8
_LOOK_PAGES = 64


# The worker


def work(path: str, pages: int, dirty: int, interval_s: float) -> None:
    """Read all of the memory over and over, and change `dirty` other pages in each interval, in eight portions.

    How many steps of 256 KiB were read is counted in the 8 bytes behind the memory's file name plus ".steps".
    """
    random = np.random.default_rng(5)
    with open(path, "r+b") as file:
        memory = np.frombuffer(mmap.mmap(file.fileno(), pages * PAGE_SIZE), dtype=np.uint64).reshape(pages, -1)
    with open(f"{path}.steps", "r+b") as file:
        steps = np.frombuffer(mmap.mmap(file.fileno(), 8), dtype=np.uint64)
    order = random.permutation(pages)
    columns = random.integers(0, memory.shape[1], (pages, WORDS))
    tick_s = interval_s / _TICKS
    due = time.monotonic()
    at = owed = look = 0
    print("ready", flush=True)
    while True:
        memory[look : look + _LOOK_PAGES].max()
        look = (look + _LOOK_PAGES) % pages
        steps[0] += np.uint64(1)
        now = time.monotonic()
        if now < due:
            continue
        # What a pause held up is made up for, but not more than one interval of it.
        due = max(due + tick_s, now - interval_s)
        owed += dirty
        count, owed = divmod(owed, _TICKS)
        chosen = order[at : at + count]
        memory[chosen[:, None], columns[at : at + count]] += np.uint64(1)
        at = at + count if at + count < pages else 0


class Worker:
    """A worker in a process of its own, and what it has done."""

    def __init__(self, folder: Path, pages: int, dirty: int, interval_s: float) -> None:
        self.path = folder / "memory"
        random = np.random.default_rng(6)
        block = random.integers(0, 256, MIB, dtype=np.uint8)
        with open(self.path, "wb") as file:
            for _ in range(pages * PAGE_SIZE // MIB):
                file.write(block)
        Path(f"{self.path}.steps").write_bytes(bytes(8))
        with open(f"{self.path}.steps", "r+b") as file:
            self._steps = np.frombuffer(mmap.mmap(file.fileno(), 8), dtype=np.uint64)
        self.process = _start("work", self.path, pages, dirty, interval_s)
        self.process.stdout.readline()

    def steps(self) -> int:
        return int(self._steps[0])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _start(*arguments: Any) -> Any:
    command = [sys.executable, __file__, "--as", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# The primary


def cpu_s(pid: int) -> float:
    """User and system time of a process, all of its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def protect(
    path: str,
    worker: int,
    backup: int,
    address: str,
    tls_dir: str,
    interval_s: float,
    seconds: float,
    realtime: int,
) -> None:
    """Protect until enough has been seen, and print what was."""
    configure_logs(level="error")
    commits: list[Committed] = []
    begun = 0.0
    sent_s: list[float] = []

    def phase(name: str, _: int) -> None:
        nonlocal begun
        if name == "send":
            begun = time.monotonic()
        elif name == "sent":
            sent_s.append(time.monotonic() - begun)

    with open(f"{path}.steps", "r+b") as file:
        steps = np.frombuffer(mmap.mmap(file.fileno(), 8), dtype=np.uint64)
    tls = TlsFiles(tls_dir) if tls_dir else None
    source = SharedFile(path, Processes([worker]))
    primary = primary_of(
        source,
        NAME,
        address,
        tls=tls,
        interval_s=interval_s,
        on_commit=commits.append,
        on_phase=phase,
        realtime=Realtime() if realtime else None,
    )

    def now() -> dict[str, float]:
        status = primary.status()
        return {
            "at": time.monotonic(),
            "primary_cpu_s": cpu_s(os.getpid()),
            "backup_cpu_s": cpu_s(backup),
            "steps": float(steps[0]),
            "wire_bytes": status["wire_bytes"],
            "stream_bytes": status["encoded_bytes"],
            "dirty_pages": status["dirty_pages_total"],
            "checkpoints": status["checkpoints"],
        }

    begin = time.monotonic()
    pauses: list[float] = []
    before: dict[str, float] = {}
    first_s = 0.0
    try:
        for taken in primary.run():
            if commits and not first_s:
                first_s = time.monotonic() - begin
            if before:
                pauses.append(taken.pause_s)
                if time.monotonic() - before["at"] >= seconds:
                    break
            elif len(commits) >= SETTLE:
                before = now()
                skip = len(commits)
        after = now()
    finally:
        primary.close()
        source.close()
    report = {key: after[key] - before[key] for key in after}
    report["latencies"] = [one.latency_s for one in commits[skip:]]
    report["sent"] = sent_s[skip:]
    report["pauses"] = pauses
    report["first_commit_s"] = first_s
    print(json.dumps(report), flush=True)


def first(path: str, worker: int, backup: int, address: str) -> None:
    """Take a first checkpoint, and print what it took until it was durable."""
    configure_logs(level="error")
    source = SharedFile(path, Processes([worker]))
    primary = primary_of(source, NAME, address)
    primary_cpu_s, backup_cpu_s, begin = cpu_s(os.getpid()), cpu_s(backup), time.monotonic()
    try:
        epoch = primary.checkpoint(math.inf, wait=True)
        seconds = time.monotonic() - begin
        status = primary.status()
    finally:
        primary.close()
        source.close()
    report = {
        "epoch": epoch,
        "seconds": seconds,
        "primary_cpu_s": cpu_s(os.getpid()) - primary_cpu_s,
        "backup_cpu_s": cpu_s(backup) - backup_cpu_s,
        "pause_ms": status["pause_ms"]["max"],
        "dirty_pages": status["dirty_pages"],
        "stream_mib": status["encoded_bytes"] / MIB,
    }
    print(json.dumps(report), flush=True)


@contextmanager
def backup_service(store: Path, tls_dir: Path | None, realtime: bool) -> Iterator[tuple[int, str]]:
    """`remus-ckpt backup`, as a user starts it: its process number and its address."""
    command = [sys.executable, "-m", "remus_ckpt", "backup", "--store", str(store)]
    command += ["--listen", "tls://127.0.0.1:0" if tls_dir else "tcp://127.0.0.1:0"]
    if tls_dir:
        command += ["--tls-dir", str(tls_dir)]
    if realtime:
        command.append("--realtime")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, process.stdout.readline().removeprefix("listening on ").strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


# What there is to compare it with


def bare(path: str, realtime: int) -> None:
    """Receive a length and so many bytes, write them, sync, answer; until the peer hangs up."""
    if realtime:
        Realtime().enter()
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    room = memoryview(bytearray(64 * MIB))
    while True:
        head = peer.recv(8, socket.MSG_WAITALL)
        if not head:
            return
        size = int.from_bytes(head, "little")
        at = 0
        while at < size:
            at += peer.recv_into(room[at:size])
        os.write(fd, room[:size])
        os.fdatasync(fd)
        peer.send(b"\0" * 8)


def bare_latencies(file: Path, size: int, interval_s: float, seconds: float, realtime: Realtime | None) -> list[float]:
    """Seconds from sending so many bytes to the word that they are durable, at that interval."""
    process = _start("bare", file, int(realtime is not None))
    data = os.urandom(size)
    latencies = []
    with socket.create_connection(("127.0.0.1", int(process.stdout.readline()))) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if realtime is not None:
            realtime.enter()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            peer.sendmsg([size.to_bytes(8, "little")])
            peer.sendall(data)
            peer.recv(8, socket.MSG_WAITALL)
            latencies.append(time.monotonic() - begin)
            time.sleep(interval_s)
        if realtime is not None:
            realtime.leave()
    process.wait()
    file.unlink()
    return latencies


def file_latencies(file: Path, size: int, interval_s: float, seconds: float) -> list[float]:
    """Seconds that so many bytes take to be written to a file and synced, at that interval."""
    data = os.urandom(size)
    latencies = []
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        os.write(fd, data)
        os.fdatasync(fd)
        latencies.append(time.monotonic() - begin)
        time.sleep(interval_s)
    os.close(fd)
    file.unlink()
    return latencies


# The runs


class Bench:
    """One run of all.

    disk: a folder where stores and files lie; shared: one in memory
    seconds: how long each case is looked at, in each of the rounds
    realtime: both sides and the bare peer run under SCHED_FIFO; the worker does not
    """

    def __init__(self, disk: Path, shared: Path, seconds: float, rounds: int, realtime: bool) -> None:
        self._disk = disk
        self._shared = shared
        self._seconds = seconds
        self._rounds = rounds
        self._realtime = Realtime() if realtime else None

    def commits(self, mib: int, interval_s: float, share: float, tls_dir: Path | None = None) -> dict[str, Any]:
        """One case: everything that is measured of it."""
        pages = mib * MIB // PAGE_SIZE
        found: list[dict[str, Any]] = []
        bare_s: list[float] = []
        file_s: list[float] = []
        alone: list[float] = []
        store = self._disk / "store"
        worker = Worker(self._shared, pages, max(int(pages * share), 1), interval_s)
        try:
            for _ in range(self._rounds):
                shutil.rmtree(store, ignore_errors=True)
                begin, steps = time.monotonic(), worker.steps()
                time.sleep(self._seconds / 3)
                alone.append((worker.steps() - steps) / (time.monotonic() - begin))
                is_realtime = self._realtime is not None
                with backup_service(store, tls_dir, is_realtime) as (pid, address):
                    given = (worker.path, worker.process.pid, pid, address, tls_dir or "", interval_s, self._seconds)
                    given += (int(is_realtime),)
                    with _start("protect", *given) as process:
                        found.append(json.loads(process.communicate()[0]))
                size = int(found[-1]["stream_bytes"] / found[-1]["checkpoints"])
                bare_s += bare_latencies(self._disk / "bare", size, interval_s, self._seconds / 2, self._realtime)
                file_s += file_latencies(self._disk / "file", size, interval_s, self._seconds / 4)
        finally:
            worker.close()
        total = {key: sum(one[key] for one in found) for key in found[0] if not isinstance(found[0][key], list)}
        pauses = [pause for one in found for pause in one["pauses"]]
        latencies = [latency for one in found for latency in one["latencies"]]
        sent = [seconds for one in found for seconds in one["sent"]]
        dirty_gb = total["dirty_pages"] * PAGE_SIZE / 1e9
        stream_gb = total["stream_bytes"] / 1e9
        return {
            "mib": mib,
            "interval_ms": interval_s * 1e3,
            "share": share,
            "tls": tls_dir is not None,
            "checkpoints": total["checkpoints"],
            "stream_kib": total["stream_bytes"] / total["checkpoints"] / 1024,
            "wire_kib": total["wire_bytes"] / total["checkpoints"] / 1024,
            "commit_ms": _percentiles(latencies),
            "sent_ms": _percentiles(sent),
            "bare_ms": _percentiles(bare_s),
            "file_ms": _percentiles(file_s),
            "pause_ms": _percentiles(pauses),
            "period_ms": total["at"] / total["checkpoints"] * 1e3,
            "duty": sum(pauses) / total["at"],
            "pages_per_s": total["dirty_pages"] / total["at"],
            "worker": total["steps"] / total["at"] / float(np.mean(alone)),
            "first_commit_s": total["first_commit_s"] / len(found),
            "primary_cpu": [total["primary_cpu_s"] / gb for gb in (dirty_gb, stream_gb)],
            "backup_cpu": [total["backup_cpu_s"] / gb for gb in (dirty_gb, stream_gb)],
            "primary_cpu_ms": total["primary_cpu_s"] / total["checkpoints"] * 1e3,
            "backup_cpu_ms": total["backup_cpu_s"] / total["checkpoints"] * 1e3,
        }

    def first(self, mib: int, interval_s: float, share: float) -> list[dict[str, Any]]:
        """A first durable copy in each round, beside as many bytes written to a file and synced."""
        pages = mib * MIB // PAGE_SIZE
        found = []
        store = self._disk / "store"
        worker = Worker(self._shared, pages, max(int(pages * share), 1), interval_s)
        try:
            for _ in range(self._rounds):
                shutil.rmtree(store, ignore_errors=True)
                with (
                    backup_service(store, None) as (pid, address),
                    _start("first", worker.path, worker.process.pid, pid, address) as process,
                ):
                    one = json.loads(process.communicate()[0])
                data, begin = memoryview(bytes(MIB)), time.monotonic()
                with open(self._disk / "file", "wb", buffering=0) as file:
                    for _ in range(mib):
                        file.write(data)
                    os.fdatasync(file.fileno())
                found.append(one | {"mib": mib, "share": share, "file_s": time.monotonic() - begin})
                (self._disk / "file").unlink()
        finally:
            worker.close()
            shutil.rmtree(store, ignore_errors=True)
        return found

    def restores(self) -> dict[str, Any]:
        """GB/s of image, of what the last case left in the store; from the page cache, as all the others."""
        store = Store(self._disk / "store")
        history = store.history(NAME)
        image, copy = self._disk / "image", self._disk / "copy"
        newest, old = history.entries()[-1], next(one for one in history.entries() if not one.is_base)
        size = history.restore_image(image).memory.nbytes
        first: dict[str, Callable[[], object]] = {
            "newest, to memory": history.restore,
            "newest, to a file": lambda: history.restore_image(copy, sync=False),
            "newest, to a durable file": lambda: history.restore_image(copy),
            "old, to memory": lambda: history.restore(old.epoch),
            "old, to a file": lambda: history.restore_image(copy, old.epoch, sync=False),
            "old, to a durable file": lambda: history.restore_image(copy, old.epoch),
        }
        second: dict[str, Callable[[], object]] = {
            "compacted, to memory": history.restore,
            "compacted, to a file": lambda: history.restore_image(copy, sync=False),
            "compacted, to a durable file": lambda: history.restore_image(copy),
            "cp of the image": lambda: subprocess.run(["cp", image, copy], check=True),
            "cp of the image, and fsync": lambda: _copy_and_sync(image, copy),
        }
        seconds = self._restore_s(first, copy)
        with store.writer(NAME) as writer:
            writer.compact(wait=True)
        seconds |= self._restore_s(second, copy)
        return {
            "mib": size // MIB,
            "newest": {"epoch": newest.epoch, "stream_mib": newest.end / MIB},
            "old": {"epoch": old.epoch, "stream_mib": old.end / MIB},
            "compacted": {"epoch": newest.epoch, "stream_mib": history.entries()[-1].end / MIB},
            "gb_per_s": {name: size / 1e9 / one for name, one in seconds.items()},
        }

    @staticmethod
    def _restore_s(jobs: dict[str, Callable[[], object]], copy: Path) -> dict[str, float]:
        """The median of three, one after the other."""
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(3):
            for name, run in jobs.items():
                copy.unlink(missing_ok=True)
                begin = time.monotonic()
                run()
                times[name].append(time.monotonic() - begin)
        return {name: float(np.median(values)) for name, values in times.items()}


def _copy_and_sync(source: Path, target: Path) -> None:
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": float(p50) * 1e3, "p99": float(p99) * 1e3}


# Showing it


def show(results: dict[str, Any]) -> str:
    """The tables, as they stand in specs/performance.md."""
    m = results["machine"]
    parts = [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python {m['python']}, "
        f"numpy {m['numpy']}; load {m['load']:.1f} at the start. Both sides and the bare peer: "
        f"{'SCHED_FIFO' if results.get('realtime') else 'normal scheduling'}."
    ]
    cases = results["commits"]

    def label(one: dict[str, Any]) -> str:
        return f"{one['mib']} MiB, {one['interval_ms']:g} ms, {one['share']:.1%}{', TLS' if one['tls'] else ''}"

    def pair(value: dict[str, float]) -> str:
        return f"{value['p50']:.2f} / {value['p99']:.2f}"

    head = [
        "p50 / p99 in ms",
        "stream KiB",
        "commit",
        "until sent",
        "bare peer",
        "file alone",
        "÷ bare, p50 / p99",
        "behind it ÷ bare",
    ]
    rows = []
    for one in cases:
        commit, sent, base = (one[key]["p50"] for key in ("commit_ms", "sent_ms", "bare_ms"))
        cells = [pair(one[key]) for key in ("commit_ms", "sent_ms", "bare_ms", "file_ms")]
        late = one["commit_ms"]["p99"] / one["bare_ms"]["p99"]
        ratios = [f"{commit / base:.2f} / {late:.2f}", f"{(commit - sent) / base:.2f}"]
        rows.append([label(one), f"{one['stream_kib']:.0f}", *cells, *ratios])
    if rows:
        parts += ["### Durable commits, beside a bare round trip with fdatasync", table(head, rows)]
    head = ["", "dirty pages/s", "pause p50 / p99 ms", "period ms", "paused", "worker's rate", "first commit s"]
    rows = [
        [label(one), f"{one['pages_per_s']:,.0f}", pair(one["pause_ms"]), f"{one['period_ms']:.1f}",
         f"{one['duty']:.0%}", f"{one['worker']:.0%}", f"{one['first_commit_s']:.1f}"] for one in cases
    ]  # fmt: skip
    if rows:
        parts += ["### What is sustained, and what the worker feels of it", table(head, rows)]
    head = ["CPU", "primary ms/ckpt", "s/GB dirty", "s/GB stream", "backup ms/ckpt", "s/GB dirty", "s/GB stream"]
    rows = [
        [label(one), f"{one['primary_cpu_ms']:.2f}", *(f"{value:.2f}" for value in one["primary_cpu"]),
         f"{one['backup_cpu_ms']:.2f}", *(f"{value:.2f}" for value in one["backup_cpu"])] for one in cases
    ]  # fmt: skip
    if rows:
        text = "### CPU of each side: for a checkpoint, for a GB of dirty pages, for a GB of the stream"
        parts += [text, table(head, rows)]
    if restores := results["restores"]:
        head = ["GB/s of the image", *(f"{one['mib']} MiB" for one in restores)]
        names = list(restores[0]["gb_per_s"])
        rows = [[name, *(f"{one['gb_per_s'][name]:.2f}" for one in restores)] for name in names]
        behind = (
            f"{one['mib']} MiB: the newest is epoch {one['newest']['epoch']} behind {one['newest']['stream_mib']:.0f} "
            f"MiB of stream, the old one epoch {one['old']['epoch']} behind {one['old']['stream_mib']:.0f} MiB; "
            f"compacted, the newest stands behind {one['compacted']['stream_mib']:.0f} MiB"
            for one in restores
        )
        parts += ["### Restore", table(head, rows), "; ".join(behind) + "."]
    if found := results.get("first"):
        parts += ["### First durable copy, under a busy worker", show_first(found)]
    return "\n\n".join(parts)


def show_first(found: list[dict[str, Any]]) -> str:
    """The table of first copies: medians of the rounds."""
    keys = ["seconds", "file_s", "primary_cpu_s", "backup_cpu_s", "pause_ms", "dirty_pages", "stream_mib"]
    head = ["first durable copy", "s", "file alone s", "primary CPU s", "backup CPU s", "pause ms", "pages", "MiB"]
    cells = [f"{float(np.median([one[key] for one in found])):,.2f}" for key in keys]
    return table(head, [[f"{found[0]['mib']} MiB, {found[0]['share']:.1%}, {len(found)} rounds", *cells]])


ROLES: dict[str, tuple[Callable[..., None], tuple[Callable[[str], Any], ...]]] = {
    "work": (work, (str, int, int, float)),
    "protect": (protect, (str, int, int, str, str, float, float, int)),
    "first": (first, (str, int, int, str)),
    "bare": (bare, (str, int)),
}
"""What this file is when it is started by itself, and its arguments."""


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        run, kinds = ROLES[sys.argv[2]]
        run(*(kind(text) for kind, text in zip(kinds, sys.argv[3:], strict=True)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs, not to quote")
    parser.add_argument("--only", help="such as 128:0.01,tls,first: the cases to run (MiB:share)")
    parser.add_argument("--seconds", type=float, help="how long each case is looked at, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="how often each case is set up anew, with its bare peer")
    parser.add_argument("--realtime", action="store_true", help="both sides and the bare peer under SCHED_FIFO")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to be measured; by default tmp's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing; show these figures")
    options = parser.parse_args()
    if options.from_json:
        print(show(json.loads(options.from_json.read_text())))
        return
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing may stay behind
    sizes = ((16, 0.025), (64, 0.1)) if options.quick else ((128, 0.025), (1024, 0.1))
    results: dict[str, Any] = {"machine": machine(), "realtime": options.realtime, "commits": [], "restores": []}
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-bench-", dir=options.directory)))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-bench-", dir="/dev/shm")))
        keys.init(disk / "keys")
        keys.issue(disk / "keys", "both", hosts=["127.0.0.1"])
        run = Bench(disk, shared, seconds, options.rounds, options.realtime)
        cases = [(mib, interval_s, share, None) for mib, interval_s in sizes for share in (0.001, 0.01, 0.1)]
        cases.insert(3, (*sizes[0], 0.01, disk / "keys" / "both"))  # type: ignore[arg-type]
        if options.only is None or "first" in options.only.split(","):
            mib, interval_s = sizes[-1]
            results["first"] = run.first(mib, interval_s, 0.01)
            progress(f"first copies: {[round(one['seconds'], 2) for one in results['first']]} s")
        for mib, interval_s, share, tls_dir in cases:
            key = "tls" if tls_dir else f"{mib}:{share}"
            if options.only and key not in options.only.split(","):
                continue
            results["commits"].append(run.commits(mib, interval_s, share, tls_dir))
            progress(f"{key}: commit {results['commits'][-1]['commit_ms']}, bare {results['commits'][-1]['bare_ms']}")
            if share == 0.1:
                results["restores"].append(run.restores())
                progress(f"{mib} MiB: restores")
    print(show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
