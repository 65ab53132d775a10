"""What finding written pages costs, by the kernel and by comparison.

    bench_tracking.py [--only steps,pauses,worker] [--quick] [--rounds N] [--json FILE]

The memory is this process's own (anonymous, 4 KiB pages and transparent huge ones) or another process's (a file in
/dev/shm that it has mapped); 0.1, 1 and 10 % of its pages are written at random places before each round. The order of
the two ways changes with the rounds. Medians and 99th percentiles, in milliseconds.

steps: the scan (which also protects again), the copy of the pages that it found, a comparison of all memory with a
    copy of it, and one memcpy of as much memory: 128 MiB and 1 GiB.
pauses: the whole pause of a checkpoint loop, from the order to stop to the order to run on: 128 MiB, 1 GiB, and 8 GiB
    of which a tenth is in use.
worker: how fast a process writes to 1 % of 1 GiB while checkpoints are taken every 25 and 100 ms, beside how fast it
    does without.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.errors import Untracked
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages
from remus_ckpt.pause import STEPS as PAUSE_STEPS
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.source import Source
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.source.track.kernel import Tracking
from remus_ckpt.source.track.mapped import FileWatch
from remus_ckpt.source.track.spans import Span, Spans
from remus_ckpt.source.track.written import why_not

SIZES_MIB = (128, 1024)
PAUSE_SIZES_MIB = (128, 1024, 8192)
DIRTY = (0.001, 0.01, 0.1)
STEPS = ("scan", "copy", "compare", "memcpy")
WAYS: tuple[Tracking, ...] = ("kernel", "compare")
IN_USE = 0.1
"""The part of the largest memory that is in use."""
CLUSTER_PAGES = {"single pages": 1, "runs of 2 MiB": 512}
"""How what is in use lies there. A scan takes time by the page tables: each maps 2 MiB, and is there if one page is."""

Written = Callable[[], NDArray[np.int64]]
Write = Callable[[NDArray[np.int64]], None]

WRITER = """
import mmap, os, sys
import numpy as np
file = os.open(sys.argv[1], os.O_RDWR)
memory = np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8).reshape(-1, 4096)
if len(sys.argv) < 3:
    memory[:, 0] = 1
print("ready", flush=True)
while size := sys.stdin.buffer.read(8):
    pfns = np.frombuffer(sys.stdin.buffer.read(int.from_bytes(size, "little")), dtype=np.int64)
    memory[pfns, 8] += 1
    print("done", flush=True)
"""


RUNNER = """
import mmap, os, sys, time
import numpy as np
file = os.open(sys.argv[1], os.O_RDWR)
memory = np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8).reshape(-1, 4096)
memory[:, 0] = 1
random = np.random.default_rng(1)
hot = random.choice(len(memory), len(memory) // 100, replace=False)
parts = [random.choice(hot, 64) for _ in range(1000)]
print("ready", flush=True)
while line := sys.stdin.readline():
    end, count = time.monotonic() + float(line), 0
    while time.monotonic() < end:
        memory[parts[count % 1000], 8] += 1
        count += 1
    print(count, flush=True)
"""


class OtherProcess:
    """A process with the file mapped, as a FileWatch follows it."""

    def __init__(self, path: Path, program: str = WRITER, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        self.fd = os.pidfd_open(self.pid)
        self._wait()

    def open(self, name: str) -> int:
        return os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def write(self, pfns: NDArray[np.int64]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(pfns.nbytes.to_bytes(8, "little") + pfns.tobytes())
        self.process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("the other process has ended")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@contextmanager
def own(pages: int, *, huge: bool) -> Iterator[tuple[Pages, Written, Write]]:
    """Anonymous memory of this process."""
    area = mmap.mmap(-1, pages * PAGE_SIZE + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(area, dtype=np.uint8)
    start = -whole.ctypes.data % (2 << 20)
    memory = whole[start : start + pages * PAGE_SIZE].reshape(pages, PAGE_SIZE)
    memory[:, 0] = 1
    spans = Spans([Span("memory", memory.ctypes.data, memory.nbytes, 0)])

    def write(pfns: NDArray[np.int64]) -> None:
        memory[pfns, 8] += 1

    try:
        yield memory, spans.written, write
    finally:
        spans.close()


@contextmanager
def shared_file(pages: int) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="remus-bench-tracking-", dir="/dev/shm")
    path = Path(name)
    try:
        os.truncate(descriptor, pages * PAGE_SIZE)
        os.close(descriptor)
        yield path
    finally:
        path.unlink()


@contextmanager
def other(pages: int) -> Iterator[tuple[Pages, Written, Write]]:
    """A file in /dev/shm that another process has mapped; we read it through a mapping of our own."""
    with shared_file(pages) as path:
        process = OtherProcess(path)
        fd = os.open(path, os.O_RDONLY)
    memory = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    status = os.fstat(fd)
    watch = FileWatch(fd, (os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino, pages)
    try:
        watch.attach([process])
        yield memory, lambda: watch.written([process]), process.write
    finally:
        watch.close()
        process.close()
        os.close(fd)


def measure(memory: Pages, written: Written, write: Write, dirty: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    random = np.random.default_rng(1)
    count = max(int(len(memory) * dirty), 1)
    shadow, target, room = zeros(len(memory)), zeros(len(memory)), zeros(max(2 * count, 1))
    shadow[:] = memory
    target[:] = 1
    room[:] = 1
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    def timed(step: str, work: Callable[[], NDArray[np.int64] | Pages | None]) -> NDArray[np.int64] | Pages | None:
        begin = time.perf_counter()
        result = work()
        seconds[step].append(time.perf_counter() - begin)
        return result

    for round_ in range(rounds + 1):
        pfns = np.sort(random.choice(len(memory), count, replace=False))
        write(pfns)
        finders = {"scan": written, "compare": lambda: dirty_pages(memory, shadow)}
        for step in sorted(finders, reverse=bool(round_ % 2)):
            if not np.array_equal(timed(step, finders[step]), pfns):  # type: ignore[arg-type]
                raise AssertionError(f"the {step} has not found the {len(pfns)} pages that were written")
        timed("copy", partial(gather, memory, pfns, room))
        shadow[pfns] = memory[pfns]
        timed("memcpy", partial(np.copyto, target, memory))
    return {step: values[1:] for step, values in seconds.items()}


class Nowhere:
    """Where the checkpoints go whose pauses are measured."""

    def write(self, buffers: list[Buffer]) -> None: ...
    def commit(self, sent: Sent) -> None: ...
    def fds(self) -> Sequence[int]:
        return ()

    def check(self) -> None: ...


def loop_of(source: Source) -> CheckpointLoop:
    return CheckpointLoop(
        source, Sender(source.memory.pages, reference=source.tracker.restart()), Nowhere(), interval_s=0.025
    )


@contextmanager
def own_sources(pages: int, *, in_use: float) -> Iterator[tuple[dict[Tracking, Source], Write]]:
    """The same memory of this process twice as a source, one for each way."""
    area = mmap.mmap(-1, pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(area, dtype=np.uint8).reshape(pages, PAGE_SIZE)
    if in_use == 1:
        memory[:, 0] = 1
    lock = threading.Lock()

    def write(pfns: NDArray[np.int64]) -> None:
        with lock:
            memory[pfns, 8] += 1

    sources: dict[Tracking, Source] = {way: OwnMemory({"m": memory}, lock=lock, tracking=way, audit=0) for way in WAYS}
    try:
        yield sources, write
    finally:
        for source in sources.values():
            source.close()


@contextmanager
def process_sources(pages: int, *, in_use: float) -> Iterator[tuple[dict[Tracking, Source], Write]]:
    """A process for each way, since none is stopped by two; both write the same."""
    with ExitStack() as stack:
        processes = []
        sources: dict[Tracking, Source] = {}
        for way in WAYS:
            path = stack.enter_context(shared_file(pages))
            one = stack.enter_context(closing(OtherProcess(path, WRITER, *(["sparse"] if in_use < 1 else []))))
            sources[way] = SharedFile(path, Processes([one.pid]), tracking=way, audit=0)
            stack.callback(sources[way].close)
            processes.append(one)

        def write(pfns: NDArray[np.int64]) -> None:
            for one in processes:
                one.write(pfns)

        yield sources, write


def measure_pauses(
    sources: dict[Tracking, Source],
    write: Write,
    dirty: float,
    rounds: dict[Tracking, int],
    in_use: float,
    cluster_pages: int = 1,
) -> dict[Tracking, dict[str, list[float]]]:
    """Seconds of each pause and of its steps, by way."""
    random = np.random.default_rng(1)
    pages = next(iter(sources.values())).memory.pages
    clusters = pages // cluster_pages
    chosen = np.sort(random.choice(clusters, int(clusters * in_use), replace=False))
    used = (chosen[:, None] * cluster_pages + np.arange(cluster_pages)).reshape(-1)
    count = min(max(int(pages * dirty), 1), len(used))
    write(used)
    loops = {way: loop_of(source) for way, source in sources.items()}
    for loop in loops.values():
        loop.take()  # copies all of it first
    seconds: dict[Tracking, dict[str, list[float]]] = {
        way: {step: [] for step in ("pause", *PAUSE_STEPS)} for way in WAYS
    }
    for round_ in range(-1, max(rounds.values())):
        write(np.sort(random.choice(used, count, replace=False)))
        for way in sorted(WAYS, reverse=bool(round_ % 2)):
            if round_ >= rounds[way]:
                continue
            taken = loops[way].take()
            if sources[way].tracker.way != way or not taken.dirty_pages >= count:
                raise AssertionError(f"{taken.dirty_pages} of {count} pages by {sources[way].tracker.way}")
            if round_ >= 0:
                seconds[way]["pause"].append(taken.pause_s)
                for step in PAUSE_STEPS:
                    seconds[way][step].append(taken.steps_s[step])
    return seconds


def measure_worker(path: Path, worker: OtherProcess, way: Tracking | None, interval_s: float, for_s: float) -> float:
    """Writes a second of a process whose memory is checkpointed, or not."""
    assert worker.process.stdin is not None and worker.process.stdout is not None
    if way is None:
        worker.process.stdin.write(f"{for_s}\n".encode())
        worker.process.stdin.flush()
        return int(worker.process.stdout.readline()) * 64 / for_s
    with closing(SharedFile(path, Processes([worker.pid]), tracking=way)) as source:
        loop = CheckpointLoop(
            source, Sender(source.memory.pages, reference=source.tracker.restart()), Nowhere(), interval_s=interval_s
        )
        taken = iter(loop.run())
        next(taken)
        worker.process.stdin.write(f"{for_s}\n".encode())
        worker.process.stdin.flush()
        end = time.monotonic() + for_s
        while time.monotonic() < end:
            next(taken)
        return int(worker.process.stdout.readline()) * 64 / for_s


def cells_of(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Median and 99th percentile in milliseconds."""
    return {
        step: [float(np.percentile(values, percent)) * 1e3 for percent in (50, 99)] for step, values in seconds.items()
    }


def row_of(cells: dict[str, list[float]]) -> str:
    return " | ".join(f"{median:.2f} / {high:.2f}" for median, high in cells.values())


def tabulate_steps(quick: bool, rounds: int | None) -> list[dict[str, object]]:
    print("| memory | written | scan | copy | compare | memcpy of all | scan + copy |\n|---|---|---|---|---|---|---|")
    figures: list[dict[str, object]] = []
    for mib in SIZES_MIB[:1] if quick else SIZES_MIB:
        pages = mib * (1 << 20) // PAGE_SIZE
        count = rounds or (200 if mib < 512 else 100) // (10 if quick else 1)
        kinds = {
            "own, 4 KiB pages": partial(own, pages, huge=False),
            "own, huge pages": partial(own, pages, huge=True),
            "another process": partial(other, pages),
        }
        for kind, make in kinds.items():
            for dirty in DIRTY:
                with make() as (memory, written, write):
                    with suppress(Untracked):  # the first question takes the mappings in
                        written()
                    seconds = measure(memory, written, write, dirty, count)
                both = [a + b for a, b in zip(seconds["scan"], seconds["copy"], strict=True)]
                cells = cells_of({**seconds, "both": both})
                figures.append({"mib": mib, "memory": kind, "written": dirty, "rounds": count, "ms": cells})
                print(f"| {mib} MiB, {kind} | {dirty:.1%} | {row_of(cells)} |", flush=True)
    return figures


def tabulate_pauses(quick: bool, rounds: int | None) -> list[dict[str, object]]:
    print(f"| memory | written | way | pause | {' | '.join(PAUSE_STEPS)} |\n|---|---|---|---|---|---|---|---|")
    figures: list[dict[str, object]] = []
    for mib in PAUSE_SIZES_MIB[:1] if quick else PAUSE_SIZES_MIB:
        is_sparse = mib > 4096
        in_use = IN_USE if is_sparse else 1
        count = rounds or 200 // (10 if quick else 1)
        counts: dict[Tracking, int] = {
            "kernel": count,
            "compare": count if mib < 512 else count // (5 if mib < 4096 else 25),
        }
        for kind, make in {"own": own_sources, "another process": process_sources}.items():
            for (lie, cluster_pages), dirty in product(CLUSTER_PAGES.items() if is_sparse else [("", 1)], DIRTY):
                with make(mib * (1 << 20) // PAGE_SIZE, in_use=in_use) as (sources, write):
                    seconds = measure_pauses(sources, write, dirty, counts, in_use, cluster_pages)
                memory = f"{kind}, a tenth in use, {lie}" if lie else kind
                for way in WAYS:
                    cells = cells_of(seconds[way])
                    figures.append(
                        {"mib": mib, "memory": memory, "written": dirty, "way": way, "rounds": counts[way], "ms": cells}
                    )
                    print(f"| {mib} MiB, {memory} | {dirty:.1%} | {way} | {row_of(cells)} |", flush=True)
    return figures


def tabulate_worker(quick: bool, rounds: int | None) -> list[dict[str, object]]:
    print("| checkpoints | writes a second beside none |\n|---|---|")
    figures: list[dict[str, object]] = []
    for_s = 0.5 if quick else 2.0
    with (
        shared_file((128 if quick else 1024) * (1 << 20) // PAGE_SIZE) as path,
        closing(OtherProcess(path, RUNNER)) as worker,
    ):
        for interval_s in (0.025, 0.1):
            for way in WAYS:
                parts = []
                for _ in range(rounds or (2 if quick else 10)):
                    before = measure_worker(path, worker, None, 0, for_s)
                    during = measure_worker(path, worker, way, interval_s, for_s)
                    after = measure_worker(path, worker, None, 0, for_s)
                    parts.append(2 * during / (before + after))
                low, middle, high = (float(np.percentile(parts, percent)) for percent in (25, 50, 75))
                figures.append({"interval_s": interval_s, "way": way, "part": [low, middle, high]})
                print(f"| {way}, every {interval_s * 1e3:.0f} ms | {middle:.1%} ({low:.1%} … {high:.1%}) |", flush=True)
    return figures


TABLES = {"steps": tabulate_steps, "pauses": tabulate_pauses, "worker": tabulate_worker}


def cpu() -> str:
    """The name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU implementer")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(TABLES), metavar="TABLE,…", help="what to measure [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, 128 MiB only")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"there is nothing to measure: {reason}")
    print(
        f"{cpu()}, {os.cpu_count()} CPUs, Linux {platform.release()}; median / p99, ms; load {os.getloadavg()[0]:.1f}"
    )
    figures = {}
    for name in arguments.only.split(","):
        print(f"\n{name}\n")
        figures[name] = TABLES[name](arguments.quick, arguments.rounds)
    if arguments.json:
        report = {"cpu": cpu(), "kernel": platform.release(), "python": platform.python_version(), **figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
