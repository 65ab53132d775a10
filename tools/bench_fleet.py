"""Many names on one machine: tools/bench_fleet.py [--names 100] [--seconds 60] [--kill | --drain] [--json FILE]

Three brokers, one backup (with --kill and --drain two), and that many names in a few processes, each with a memory of
its own of which some pages change all the time, and a checkpoint at an interval. It says what every name gets (commits,
their latency, the longest time without one), what the backup's memory does meanwhile, and who uses the processors. One
backup is then killed (--kill), or left (--drain): when is each of its names protected by the other?
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, progress
from bench_service import cpu_s

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import LogError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.member import id_of
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.protect import protect
from remus_ckpt.service.release import Committed

PATIENCE_S = 300.0


def protect_some(url: str, first: int, count: int, pages: int, dirty: int, interval_s: float) -> None:
    """The role of a process with some of the names; it ends when a line comes, and prints what they got."""
    commits: dict[str, list[tuple[float, float]]] = {}
    end = threading.Event()
    with ExitStack() as stack:
        arrays = []
        for number in range(first, first + count):
            name = f"name-{number:04}"
            told = commits[name] = []
            array = np.random.default_rng(number).integers(0, 256, (pages, PAGE_SIZE), dtype=np.uint8)
            lock = threading.Lock()

            def note(committed: Committed, told: list[tuple[float, float]] = told) -> None:
                told.append((time.monotonic(), committed.latency_s))

            options: dict[str, Any] = {"interval_s": interval_s, "lock": lock, "on_commit": note}
            stack.enter_context(protect({"array": array}, to=url, name=name, connect_timeout_s=PATIENCE_S, **options))
            arrays.append((array, lock))

        def write() -> None:
            random = np.random.default_rng(first)
            while not end.wait(interval_s / 2):
                for array, lock in arrays:
                    with lock:
                        array[random.integers(0, pages, dirty), random.integers(0, PAGE_SIZE)] += 1

        writer = threading.Thread(target=write)
        writer.start()
        print("ready", flush=True)
        for line in sys.stdin:
            if line == "begin\n":
                begun = {name: len(told) for name, told in commits.items()}
                began = time.monotonic()
            elif line == "end\n":
                ended = time.monotonic()
                found = {name: tuple(told[begun[name] :]) for name, told in commits.items()}
                print(json.dumps({"began": began, "ended": ended, "commits": found}), flush=True)
        end.set()
        writer.join()


@contextmanager
def started(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def rss_bytes(pid: int) -> int:
    """Of a process, without what others share with it: the warm copies are in shared memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if condition():
                return
        except LogError:
            pass  # the brokers are busy too
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        (folder / "brokers").mkdir()
        brokers = stack.enter_context(Brokers(folder / "brokers"))
        brokers.make_log()
        fleet = Fleet(brokers.url)
        stack.callback(fleet.close)
        backups: dict[str, subprocess.Popen[str]] = {}
        for number in range(2 if options.kill or options.drain else 1):
            store = folder / f"store-{number}"
            command = ["backup", "--listen", "tcp://127.0.0.1:0", "--store", store, "--fleet", brokers.url]
            log = stack.enter_context(open(folder / f"backup-{number}.log", "w"))
            backup = stack.enter_context(
                started("-m", "remus_ckpt", *command, "--max-names", options.names, stderr=log)
            )
            assert backup.stdout is not None
            backup.stdout.readline()
            backups[id_of(store)] = backup
        until(lambda: set(backups) <= set(fleet.backups()), "the backups do not announce themselves")
        share = -(-options.names // options.processes)
        began = time.monotonic()
        workers = []
        for first in range(0, options.names, share):
            count = min(share, options.names - first)
            what = [brokers.url, first, count, options.pages, options.dirty, options.interval]
            log = stack.enter_context(open(folder / f"worker-{first}.log", "w"))
            workers.append(stack.enter_context(started(__file__, "--worker", *what, stdin=subprocess.PIPE, stderr=log)))
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        until(lambda: len(fleet.places()) == options.names, "not all names are placed")
        report: dict[str, Any] = {"placed_s": time.monotonic() - began, "machine": machine()}
        progress(f"{options.names} names are placed after {report['placed_s']:.1f} s")
        time.sleep(options.warm_up)
        report |= measure(options, brokers, backups, workers)
        if options.kill or options.drain:
            report |= lose_one(fleet, backups, options.names, drain=options.drain)
        return report


def measure(
    options: argparse.Namespace,
    brokers: Brokers,
    backups: dict[str, subprocess.Popen[str]],
    workers: list[subprocess.Popen[str]],
) -> dict[str, Any]:
    """What each name gets, and what it costs."""
    who = {
        "backups": [backup.pid for backup in backups.values()],
        "primaries": [worker.pid for worker in workers],
        "brokers": brokers.pids,
    }
    before = {what: sum(map(cpu_s, pids)) for what, pids in who.items()}
    rss_before = sum(map(rss_bytes, who["backups"]))
    for worker in workers:
        tell(worker, "begin")
    time.sleep(options.seconds)
    commits: dict[str, list[tuple[float, float]]] = {}
    spans = []
    for worker in workers:
        tell(worker, "end")
    for worker in workers:
        assert worker.stdout is not None
        found = json.loads(worker.stdout.readline())
        commits |= found["commits"]
        spans.append((found["began"], found["ended"]))
    began, ended = min(spans)[0], max(end for _, end in spans)
    used = {what: (sum(map(cpu_s, pids)) - before[what]) / (ended - began) for what, pids in who.items()}
    counts = sorted(map(len, commits.values()))
    latencies = np.array(sorted(latency for told in commits.values() for _, latency in told) or [np.nan]) * 1e3
    gaps = [max(np.diff([began, *(at for at, _ in told), ended])) for told in commits.values()]
    threads = [len(os.listdir(f"/proc/{pid}/task")) for pid in who["backups"]]
    return {
        "names": len(commits),
        "seconds": ended - began,
        "commits": {"min": counts[0], "median": counts[len(counts) // 2], "max": counts[-1]},
        "latency_ms": {f"p{share}": float(np.percentile(latencies, share)) for share in (50, 99, 100)},
        "longest_gap_s": float(max(gaps)),
        "cores": used,
        "backup_rss_mib": {"before": rss_before >> 20, "after": sum(map(rss_bytes, who["backups"])) >> 20},
        "backup_threads": threads,
    }


def tell(worker: subprocess.Popen[str], word: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(f"{word}\n")
    worker.stdin.flush()


def lose_one(fleet: Fleet, backups: dict[str, subprocess.Popen[str]], names: int, *, drain: bool) -> dict[str, Any]:
    """Kill or drain the backup with more names; when is each of them at the other?"""
    held: dict[str, list[str]] = {id: [] for id in backups}
    for name, place in fleet.places().items():
        held[place.backup].append(name)
    victim = max(held, key=lambda id: len(held[id]))
    if drain:
        fleet.set_leaving(victim, True)
    else:
        backups[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    moved: dict[str, float] = {}

    def look() -> bool:
        for name, place in fleet.places().items():
            if place.backup != victim:
                moved.setdefault(name, time.monotonic() - began)
        return len(moved) == names

    until(look, "not all names are protected again")
    times = sorted(moved[name] for name in held[victim])
    found = {"first_s": times[0], "median_s": times[len(times) // 2], "all_s": times[-1]}
    return {"drained" if drain else "killed": {"names": len(times), **found}}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        url, first, count, pages, dirty, interval = sys.argv[2:]
        protect_some(url, int(first), int(count), int(pages), int(dirty), float(interval))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4, help="that have the names")
    parser.add_argument("--interval", type=float, default=1.0, help="between two checkpoints of a name, in seconds")
    parser.add_argument("--pages", type=int, default=1024, help="of each name's memory")
    parser.add_argument("--dirty", type=int, default=16, help="pages that change twice in an interval")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=10.0)
    parser.add_argument("--kill", action="store_true", help="kill one of two backups at the end")
    parser.add_argument("--drain", action="store_true", help="move the names of one of two backups at the end")
    parser.add_argument("--directory", type=Path, help="where the stores are")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    report = run(options)
    text = json.dumps(report, indent=1)
    if options.json is not None:
        options.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
