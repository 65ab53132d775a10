"""What finding written pages costs, by kernel and by comparison: bench_tracking.py [--quick] [--rounds N] [--json FILE]

Memory of 128 MiB and 1 GiB, of this process (anonymous, 4 KiB pages and transparent huge ones) and of another one (a
file in /dev/shm that it has mapped), with 0.1, 1 and 10 % of its pages written at random places. In each round, by the
clock: the scan (which also protects again), the copy of the pages that it found, and a comparison of all memory with a
copy of it; and one memcpy of as much memory. The order of scan and comparison changes with the rounds. Medians and
99th percentiles, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import dirty_pages, gather
from remus_ckpt.errors import Untracked
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.source.track.mapped import FileWatch
from remus_ckpt.source.track.spans import Span, Spans
from remus_ckpt.source.track.written import why_not

SIZES_MIB = (128, 1024)
DIRTY = (0.001, 0.01, 0.1)
STEPS = ("scan", "copy", "compare", "memcpy")

Written = Callable[[], NDArray[np.int64]]
Write = Callable[[NDArray[np.int64]], None]

WRITER = """
import mmap, os, sys
import numpy as np
file = os.open(sys.argv[1], os.O_RDWR)
memory = np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8).reshape(-1, 4096)
memory[:, 0] = 1
print("ready", flush=True)
while size := sys.stdin.buffer.read(8):
    pfns = np.frombuffer(sys.stdin.buffer.read(int.from_bytes(size, "little")), dtype=np.int64)
    memory[pfns, 8] += 1
    print("done", flush=True)
"""


class OtherProcess:
    """A process with the file mapped, as a FileWatch follows it."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
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
def other(pages: int) -> Iterator[tuple[Pages, Written, Write]]:
    """A file in /dev/shm that another process has mapped; we read it through a mapping of our own."""
    path = Path(f"/dev/shm/remus-bench-tracking-{os.getpid()}")
    with open(path, "xb") as file:
        file.truncate(pages * PAGE_SIZE)
    try:
        process = OtherProcess(path)
        fd = os.open(path, os.O_RDONLY)
    finally:
        path.unlink()
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


def cpu() -> str:
    """The name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU implementer")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, 128 MiB only")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds [200 for 128 MiB, 100 for 1 GiB]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"there is nothing to measure: {reason}")
    print(f"{cpu()}, {os.cpu_count()} CPUs, Linux {platform.release()}; median / p99, ms\n")
    print("| memory | written | scan | copy | scan + copy | compare | memcpy of all |\n|---|---|---|---|---|---|---|")
    figures = []
    for mib in SIZES_MIB[:1] if arguments.quick else SIZES_MIB:
        pages = mib * (1 << 20) // PAGE_SIZE
        rounds = arguments.rounds or (200 if mib < 512 else 100) // (10 if arguments.quick else 1)
        kinds = {
            "own, 4 KiB pages": lambda pages=pages: own(pages, huge=False),
            "own, huge pages": lambda pages=pages: own(pages, huge=True),
            "another process": lambda pages=pages: other(pages),
        }
        for kind, make in kinds.items():
            for dirty in DIRTY:
                with make() as (memory, written, write):
                    with suppress(Untracked):  # the first question takes the mappings in
                        written()
                    seconds = measure(memory, written, write, dirty, rounds)
                both = [a + b for a, b in zip(seconds["scan"], seconds["copy"], strict=True)]
                row = {**seconds, "both": both}
                cells = {
                    step: [float(np.percentile(values, percent)) * 1e3 for percent in (50, 99)]
                    for step, values in row.items()
                }
                figures.append({"mib": mib, "memory": kind, "written": dirty, "rounds": rounds, "ms": cells})
                text = [
                    f"{cells[step][0]:.2f} / {cells[step][1]:.2f}"
                    for step in ("scan", "copy", "both", "compare", "memcpy")
                ]
                print(f"| {mib} MiB, {kind} | {dirty:.1%} | {' | '.join(text)} |", flush=True)
    if arguments.json:
        report = {"cpu": cpu(), "kernel": platform.release(), "python": platform.python_version(), "figures": figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
