"""What it costs to read checkpoints through a backup: tools/bench_remote.py [--quick] [--json FILE]

A store with a base and 200 checkpoints of 0.1 % is restored by the real command, in turn from the disk (`store:`) and
through a real backup (`tls://`, `unix:`): time, and the greatest memory of the command and of the backup. Its pages are
in the cache, and the image is written to the disk that `--directory` is on. Then a primary commits small checkpoints to
that backup over TLS, alone and beside one reader after another: latency of a durable commit. The readers run with the
lowest priority, since they belong on another machine.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, progress, table
from bench_service import cpu_s

from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.service import keys
from remus_ckpt.service.protect import protect
from remus_ckpt.store import Store

MIB = 1 << 20
NAME = "bench"
INTERVAL_S = 0.025


def fill(store: Path, pages: int, checkpoints: int) -> None:
    """A base of random pages, and checkpoints in each of which a word of 0.1 % of them changes."""
    random = np.random.default_rng(4)
    memory = random.integers(0, 256, (pages, PAGE_SIZE), dtype=np.uint8)
    words = memory.view(np.uint64)
    sender = Sender(pages)
    with Store(store).writer(NAME, compact_bytes=None) as writer:
        writer.begin(full=True)
        for epoch in range(checkpoints + 1):
            pfns = np.arange(pages)
            if epoch:
                pfns = np.sort(random.choice(pages, max(pages // 1000, 1), replace=False))
                words[pfns, epoch % words.shape[1]] += np.uint64(1)
            # Not fancy indexing of all pages: that would copy memory.
            groups = sender.checkpoint(batches(pfns, memory if not epoch else memory[pfns]))
            for group in groups:
                for buffer in group:
                    writer.feed(bytes(memoryview(buffer).cast("B")))
            assert sender.position is not None
            writer.check(sender.position)
            writer.store()
            writer.apply()


@contextmanager
def backup(store: Path, socket: Path, tls_dir: Path) -> Iterator[tuple[int, list[str]]]:
    """`remus-ckpt backup`, as a user starts it: its process number and its addresses."""
    command = [sys.executable, "-m", "remus_ckpt", "backup", "--store", str(store), "--tls-dir", str(tls_dir)]
    command += ["--listen", "tls://127.0.0.1:0", "--listen", f"unix:{socket}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, [process.stdout.readline().removeprefix("listening on ").strip() for _ in range(2)]
    finally:
        process.terminate()
        process.wait()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "remus_ckpt", *words]


def peak_mib(pid: int) -> float:
    """The greatest resident memory of a process since `reset_peak`, the files that it has mapped included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def anonymous_mib(pid: int) -> float:
    """Resident memory of a process that is no file's."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def restore(source: str, image: Path, tls_dir: Path, served_by: int) -> dict[str, float]:
    """One restore by the command, from its start to its end. peak_mib of it: see `peak_mib`"""
    words = ["restore", source, "-o", str(image), "--overwrite", "--tls-dir", str(tls_dir)]
    reset_peak(served_by)
    before_mib, before_s = peak_mib(served_by), cpu_s(served_by)
    begin = time.monotonic()
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
    anonymous = 0.0
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        with suppress(OSError, StopIteration):  # it is ending
            anonymous = max(anonymous, anonymous_mib(process.pid))
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"restore {source}: exit code {process.returncode}")
    return {
        "seconds": seconds,
        "peak_mib": used.ru_maxrss / 1024,
        "anonymous_mib": anonymous,
        "cpu_s": used.ru_utime + used.ru_stime,
        "backup_grew_mib": peak_mib(served_by) - before_mib,
        "backup_cpu_s": cpu_s(served_by) - before_s,
    }


def commits(address: str, tls_dir: Path, seconds: float) -> list[float]:
    """Milliseconds of durable commits of 16 pages of 16 MiB, one at a time."""
    array = np.zeros(16 * MIB // 8)
    found = []
    with protect({"array": array}, to=address, name="commits", tls_dir=tls_dir) as protection:
        protection.checkpoint(wait=True)
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            number += 1
            array[number % 512 :: len(array) // 16] += 1
            begin = time.monotonic()
            protection.checkpoint(wait=True)
            found.append((time.monotonic() - begin) * 1000)
            time.sleep(INTERVAL_S)
    return found


@contextmanager
def reading(source: str, tls_dir: Path) -> Iterator[None]:
    """One reader after another, until the end of the block."""
    loop = "while :; do nice -n 19 " + " ".join(command("verify", source, "--tls-dir", str(tls_dir))) + "; done"
    process = subprocess.Popen(["sh", "-c", loop], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        time.sleep(1.0)  # it has started to read
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{number}": float(np.percentile(values, number)) for number in (50, 99)} | {"count": len(values)}


def show(results: dict[str, Any]) -> str:
    head = ["from", "seconds", "MiB/s", "command MiB", "of it anonymous", "command CPU s", "backup grew MiB"]
    head += ["backup CPU s"]
    rows = []
    for name, one in results["restores"].items():
        rate = results["mib"] / one["seconds"]
        keys_ = ("peak_mib", "anonymous_mib", "cpu_s", "backup_grew_mib", "backup_cpu_s")
        rows.append([name, f"{one['seconds']:.2f}", f"{rate:.0f}", *(f"{one[key]:.1f}" for key in keys_)])
    parts = [f"### Restore of {results['mib']} MiB, {results['checkpoints']} checkpoints behind the base"]
    parts.append(table(head, rows))
    head = ["a durable commit", "p50 ms", "p99 ms", "count"]
    rows = [[name, f"{c['p50']:.2f}", f"{c['p99']:.2f}", str(c["count"])] for name, c in results["commits"].items()]
    return "\n\n".join([*parts, "### Commits beside a reader", table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs, not to quote")
    parser.add_argument("--mib", type=int, help="memory to restore")
    parser.add_argument("--rounds", type=int, help="how often each restore is run; the median counts")
    parser.add_argument("--seconds", type=float, help="how long commits are looked at")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to be measured; by default tmp's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    mib = options.mib or (32 if options.quick else 1024)
    rounds = options.rounds or (1 if options.quick else 5)
    seconds = options.seconds or (2.0 if options.quick else 15.0)
    checkpoints = 20 if options.quick else 200
    results: dict[str, Any] = {"machine": machine(), "mib": mib, "checkpoints": checkpoints}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-bench-", dir=options.directory)))
        keys.init(folder / "keys")
        keys.issue(folder / "keys", "both", hosts=["127.0.0.1"])
        tls_dir = folder / "keys" / "both"
        subprocess.run(
            [sys.executable, __file__, "--fill", str(folder / "store"), str(mib), str(checkpoints)], check=True
        )
        progress("the store is there")
        pid, (tls, unix) = stack.enter_context(backup(folder / "store", folder / "socket", tls_dir))
        sources = {"store:": f"store:{folder}/store/{NAME}", "tls://": f"{tls}/{NAME}", "unix:": f"{unix}/{NAME}"}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
        for number in range(rounds + 1):  # the first warms the cache
            for name, source in sources.items():
                image = folder / f"{name.rstrip(':/')}.image"
                one = restore(source, image, tls_dir, pid)
                progress(f"{name} {one['seconds']:.2f} s")
                if number:
                    runs[name].append(one)
                elif not filecmp.cmp(image, folder / "store.image", shallow=False):
                    raise SystemExit(f"{name}: another image")
        results["restores"] = {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in runs.items()
        }
        results["commits"] = {"alone": percentiles(commits(tls, tls_dir, seconds))}
        with reading(sources["tls://"], tls_dir):
            results["commits"]["beside a reader"] = percentiles(commits(tls, tls_dir, seconds))
    print(show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fill"]:
        fill(Path(sys.argv[2]), int(sys.argv[3]) * MIB // PAGE_SIZE, int(sys.argv[4]))
    else:
        main()
