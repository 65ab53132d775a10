"""What it costs to encode pages in the pause, where they lie, beside copying them there and encoding them after it.

    bench_pause.py [--quick] [--rounds N] [--json FILE]

0.1, 1 and 10 % of the pages of 128 MiB and 1 GiB are written at random places before each round, and a checkpoint is
taken in each of the two ways, whose order changes with the rounds. The kernel finds the pages. The memory is this
process's own, in which 1, 64 or 1,024 words of a page are changed, or another process's (a file in /dev/shm), with one.

pause: from the order to stop to the order to run on. total: from the order to stop until all buffers of the checkpoint
are there. Medians and 99th percentiles, in milliseconds; the output goes nowhere.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
from bench_tracking import Nowhere, OtherProcess, Write, cpu, shared_file

from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.sender import Sender
from remus_ckpt.source import Source
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.source.track.written import why_not

WAYS = {"copy": 0.0, "encode": math.inf}
"""What is done in the pause, and the `max_pause_s` that has it done."""
SIZES_MIB = (128, 1024)
DIRTY = (0.001, 0.01, 0.1)
WORDS = (1, 64, 1024)


@contextmanager
def own(pages: int, words: int) -> Iterator[tuple[dict[str, Source], Write]]:
    """Two memories of this process that hold the same, since the kernel tracks each for one."""
    lock, random = threading.Lock(), np.random.default_rng(2)
    sources: dict[str, Source] = {}
    memories = []
    with ExitStack() as stack:
        for way in WAYS:
            area = mmap.mmap(-1, pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = np.frombuffer(area, dtype=np.uint32).reshape(pages, -1)
            memory[:, ::64] = np.arange(pages)[:, None]
            sources[way] = OwnMemory({"m": memory}, lock=lock, tracking="kernel", audit=0)
            stack.callback(sources[way].close)
            memories.append(memory)

        def write(pfns: np.ndarray) -> None:
            columns = random.integers(0, 1024, (len(pfns), words)) if words < 1024 else np.arange(1024)[None, :]
            for memory in memories:
                memory[pfns[:, None], columns] += 1

        yield sources, write


@contextmanager
def other(pages: int) -> Iterator[tuple[dict[str, Source], Write]]:
    """A process for each way."""
    with ExitStack() as stack:
        sources: dict[str, Source] = {}
        processes = []
        for way in WAYS:
            path = stack.enter_context(shared_file(pages))
            processes.append(stack.enter_context(closing(OtherProcess(path))))
            sources[way] = SharedFile(path, Processes([processes[-1].pid]), tracking="kernel", audit=0)
            stack.callback(sources[way].close)

        def write(pfns: np.ndarray) -> None:
            for process in processes:
                process.write(pfns)

        yield sources, write


def measure(sources: dict[str, Source], write: Write, dirty: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by way: the pause, what was done to the pages in it, and all of the checkpoint."""
    random = np.random.default_rng(1)
    pages = next(iter(sources.values())).memory.pages
    loops = {}
    for way, source in sources.items():
        sender = Sender(pages, reference=source.tracker.restart())
        loops[way] = CheckpointLoop(source, sender, Nowhere(), max_pause_s=WAYS[way])
        loops[way].take()
    found: dict[str, dict[str, list[float]]] = {way: {"pause": [], "taken": [], "total": []} for way in WAYS}
    for round_ in range(-2, rounds):
        write(np.sort(random.choice(pages, max(int(pages * dirty), 1), replace=False)))
        for way in sorted(WAYS, reverse=bool(round_ % 2)):
            begin = time.monotonic()
            taken = loops[way].take()
            total = time.monotonic() - begin
            if taken.capture != way:
                raise AssertionError(f"{taken.capture} where it was to be {way}")
            if round_ >= 0:
                for key, seconds in (("pause", taken.pause_s), ("taken", taken.steps_s[way]), ("total", total)):
                    found[way][key].append(seconds * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 MiB only, and few rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"there is nothing to measure: {reason}")
    rounds = arguments.rounds or (5 if arguments.quick else 100)
    print(f"{cpu()}, {os.cpu_count()} CPUs, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}; {rounds} rounds")
    print("\n| p50 / p99 in ms | written | in the pause | pause | of it, that | total |\n|---|---|---|---|---|---|")
    figures = []
    for mib in SIZES_MIB[:1] if arguments.quick else SIZES_MIB:
        pages = mib * (1 << 20) // PAGE_SIZE
        kinds = {f"own, {words:,} words": own(pages, words) for words in WORDS} | {"another process": other(pages)}
        for kind, made in kinds.items():
            with made as (sources, write):
                for dirty in DIRTY:
                    found = measure(sources, write, dirty, rounds)
                    for way, ms in found.items():
                        cells = {key: [float(np.percentile(ms[key], part)) for part in (50, 99)] for key in ms}
                        row = " | ".join(f"{median:.2f} / {high:.2f}" for median, high in cells.values())
                        print(f"| {mib} MiB, {kind} | {dirty:.1%} | {way} | {row} |", flush=True)
                        figures.append({"mib": mib, "memory": kind, "written": dirty, "way": way, "ms": cells})
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu": cpu(), "rounds": rounds, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
