"""Any moment of a history, beside reading its bytes: `python tools/bench_restore.py --help`.

One run makes a store (or takes one that is there), and measures in turn, several times each: `cp` of the base, reading
it into huge pages by two threads, a restore of the base and of the newest checkpoint, the same with every byte
verified, the first byte of a moment, and pages of it after that.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, HistoryWriter, open_store

NAME = "bench"
MIB = 1 << 20
_SLICE_BYTES = 2 << 20


def make(directory: Path, memory_mib: int, epochs: int, pages: int, words: int) -> None:
    """A history: a base of random bytes, and checkpoints that change a few words in a few pages."""
    chance = np.random.default_rng(13)
    count = memory_mib * MIB // PAGE_SIZE
    memory = chance.integers(0, 256, (count, PAGE_SIZE), dtype=np.uint8)
    sender = Sender(count)
    with HistoryWriter(directory / NAME, NAME, compact_bytes=None) as writer:
        writer.begin(full=True)
        changed = np.arange(count)
        for epoch in range(epochs + 1):
            for group in sender.checkpoint(batches(changed, memory[changed]), time_ns=time.time_ns()):
                for buffer in group:
                    writer.feed(bytes(buffer))
            assert sender.position is not None
            writer.check(sender.position)
            writer.store()
            writer.apply()
            changed = np.sort(chance.choice(count, pages, replace=False))
            at = chance.integers(0, PAGE_SIZE // 4, (pages, words))
            memory.view("<u4")[changed[:, None], at] = chance.integers(0, 1 << 32, (pages, words), dtype=np.uint32)
            if epoch % 500 == 0:
                print(f"  made {epoch} of {epochs}", flush=True)


def read_by_two(path: Path, size: int) -> None:
    """Read a file's first bytes into huge pages, by two threads: what a restore cannot do without."""
    memory = zeros(-(-size // PAGE_SIZE))
    expect(memory, np.arange(len(memory)))
    flat = memory.reshape(-1)
    fd = os.open(path, os.O_RDONLY)

    def part(start: int, stop: int) -> None:
        for at in range(start, stop, _SLICE_BYTES):
            os.preadv(fd, [flat[at : min(at + _SLICE_BYTES, stop)]], at)

    half = size // 2 // PAGE_SIZE * PAGE_SIZE
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(part, [0, half], [half, size]))
    os.close(fd)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def touches(memory: np.ndarray[tuple[int], np.dtype[np.uint8]], count: int) -> list[float]:
    """Seconds for each of some pages that have not been touched yet, anywhere in memory."""
    chance = np.random.default_rng(7)
    found = []
    for page in chance.choice(len(memory) // PAGE_SIZE, count, replace=False).tolist():
        start = time.perf_counter()
        memory[page * PAGE_SIZE]
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", type=Path, help="a directory made by an earlier run, or to be made and kept")
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3000)
    parser.add_argument("--pages", type=int, default=164, help="pages that change from one epoch to the next")
    parser.add_argument("--words", type=int, default=4, help="words that change in each")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    directory = arguments.store or Path(tempfile.mkdtemp(prefix="bench-restore-"))
    try:
        if not (directory / NAME).exists():
            make(directory, arguments.memory_mib, arguments.epochs, arguments.pages, arguments.words)
        measure(open_store(directory)[NAME], arguments.rounds, directory)
    finally:
        if arguments.store is None:
            shutil.rmtree(directory)


def measure(history: History, rounds: int, directory: Path) -> None:
    """Measure, and print a table."""
    contents = history.contents()[-1]
    assert contents.first is not None and contents.last is not None
    first, last = contents.first.epoch, contents.last.epoch
    path = history.path_of(contents.name)
    size = contents.first.end
    copy = directory / "copy"
    print(f"page index, built once: {timed(lambda: history.moment(last).close()):.2f} s")
    image = directory / "image"

    def copied() -> None:
        subprocess.run(["head", "-c", str(size), str(path)], stdout=copy.open("wb"), check=True)

    files: dict[str, Callable[[], object]] = {
        "copy of the base to a file": copied,
        f"restore {last} to a file, not synced": lambda: history.restore_image(image, last, sync=False),
    }
    work: dict[str, Callable[[], object]] = {
        "pread of the base, huge pages, two threads": lambda: read_by_two(path, size),
        f"restore {first} (the base)": lambda: history.restore(first),
        f"restore {last}": lambda: history.restore(last),
        f"restore {last}, every byte verified": lambda: history.restore(last, verify=True),
    }
    found: dict[str, list[float]] = {name: [] for name in (*files, *work)}
    opened: list[float] = []
    pages: list[float] = []
    shuffle = random.Random(1).shuffle
    for group in (files, work):  # dirty pages of files would be in the way of huge pages
        order = list(group)
        for name in order:
            group[name]()  # for the first time, memory and files are fetched from elsewhere
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                found[name].append(timed(group[name]))
        for one in (copy, image):
            one.unlink(missing_ok=True)
    for _ in range(rounds):
        start = time.perf_counter()
        memory = history.memory((first + last) // 2)
        memory[len(memory) // 2]
        opened.append(time.perf_counter() - start)
        pages += touches(memory, 1000)
        del memory
    print(f"{cpu()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}")
    print(f"base {size / MIB:,.0f} MiB, {last - first} checkpoints after it, {contents.end - size:,} bytes")
    least = statistics.median(found["pread of the base, huge pages, two threads"])
    best = min(found["pread of the base, huge pages, two threads"])
    print(f"{'':48} {'median ms':>10} {'÷ pread':>8} {'best ms':>8} {'÷ pread':>8}")
    for name, values in found.items():
        middle, quickest = statistics.median(values), min(values)
        print(f"{name:48} {middle * 1e3:10.1f} {middle / least:8.2f} {quickest * 1e3:8.1f} {quickest / best:8.2f}")
    print(f"memory(at=…): {said(opened, pages)}")
    measure_mount(history, first, last, rounds)


def measure_mount(history: History, first: int, last: int, rounds: int) -> None:
    """The same through FUSE: the first byte of a moment, and pages of it."""
    opened: list[float] = []
    pages: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "mnt"
        command = [sys.executable, "-m", "remus_ckpt", "mount", f"store:{history.directory}", str(where)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not os.path.ismount(where):
                if process.poll() is not None:
                    print("mount: not measured (needs root or fusermount3, mfusepy and libfuse)")
                    return
                time.sleep(0.05)
            for number in range(rounds):
                path = where / "by-epoch" / str((first + last) // 2 + number + 1) / "memory"
                start = time.perf_counter()
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                size = os.fstat(fd).st_size
                os.pread(fd, 1, size // 2)
                opened.append(time.perf_counter() - start)
                for page in np.random.default_rng(number).choice(size // PAGE_SIZE, 1000, replace=False).tolist():
                    start = time.perf_counter()
                    os.pread(fd, 1, page * PAGE_SIZE)
                    pages.append(time.perf_counter() - start)
                os.close(fd)
            process.terminate()
    print(f"mounted: {said(opened, pages)}")


def said(opened: list[float], pages: list[float]) -> str:
    """Both figures of a moment, in words."""
    ordered = sorted(pages)
    return (
        f"first byte of a moment: median {statistics.median(opened) * 1e3:.1f} ms, worst {max(opened) * 1e3:.1f} ms; "
        f"a page of it after that: median {statistics.median(pages) * 1e6:.0f} µs, "
        f"p99 {ordered[len(ordered) * 99 // 100] * 1e6:.0f} µs, worst {ordered[-1] * 1e6:.0f} µs ({len(pages)} pages)"
    )


def cpu() -> str:
    """The name of the CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
