"""How long a commit takes with a commit log, beside one without: brokers, backup and primary on this machine.

    python tools/bench_log.py [--checkpoints 500] [--rounds 3] [--json FILE]

Each checkpoint changes one page, and waits until it is committed; the two ways take turns, round by round. The primary
runs in this process, the backup in one of its own, the three brokers in theirs. "append" is the log's part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from fleet_kills import Backup

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.service.protect import protect

MEMORY_BYTES = 1 << 20


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    took: dict[str, list[float]] = {"without": [], "with": [], "append": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-bench-log-")))
        (folder / "brokers").mkdir()
        brokers = stack.enter_context(Brokers(folder / "brokers"))
        brokers.make_log()
        for number in range(options.rounds):
            for way, url in (("without", None), ("with", brokers.url)):
                backup = Backup(folder, f"{number}-{way}", url)
                try:
                    array = np.zeros(MEMORY_BYTES, dtype=np.uint8)
                    with protect({"array": array}, to=backup.address, name=f"n{number}", log_url=url) as protection:
                        protection.checkpoint(wait=True)
                        for place in range(options.checkpoints):
                            array[place * 4096 % MEMORY_BYTES] += 1
                            begin = time.perf_counter()
                            protection.checkpoint(wait=True)
                            took[way].append(time.perf_counter() - begin)
                            if url is not None:
                                took["append"].append(protection.status()["log_append_s"])
                finally:
                    backup.kill()
    found = {
        way: {"p50_ms": at(times, 50), "p99_ms": at(times, 99), "count": len(times)} for way, times in took.items()
    }
    for way, row in found.items():
        print(f"{way:8} p50 {row['p50_ms']:6.2f} ms   p99 {row['p99_ms']:6.2f} ms   {row['count']} checkpoints")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    if options.json:
        options.json.write_text(json.dumps(found | {"load": os.getloadavg()[0]}, indent=1))


def at(times: list[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return 1e3 * statistics.quantiles(times, n=100)[percent - 1]


if __name__ == "__main__":
    main()
