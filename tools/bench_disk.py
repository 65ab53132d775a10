#!/usr/bin/env python3
"""How long a checkpoint waits for the disk: bare files that grow and are overwritten, the store without and with space
ahead.

    bench_disk [--directory DIR] [--rounds N] [--interval-ms MS] [--json]

For each size, the four take turns, one checkpoint each, so that they meet the same disk and the same load. Counted are
the writes and the sync, not what the store does with the bytes besides. The first seconds, in which the store learns
the rate, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from remus_ckpt.disk import write_all
from remus_ckpt.pages import PAGE_SIZE, Buffer, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import HistoryWriter
from remus_ckpt.store.ahead import AHEAD_BYTES
from remus_ckpt.store.chain import Chain

SIZES = {"24 KiB": 24 << 10, "220 KiB": 220 << 10, "3.2 MiB": 3_277 << 10}
_PIECE_BYTES = 256 << 10
_FULL_BYTES = 64 << 20
_WARM_UP_S = 2.0


class Stored:
    """A store that takes checkpoints of about so many bytes. In use, it takes over `Chain.append`."""

    def __init__(self, directory: Path, size: int, ahead_bytes: int) -> None:
        pages = max(size // PAGE_SIZE, 1)
        self._memory = np.random.default_rng(1).integers(1, 255, (pages, PAGE_SIZE), dtype=np.uint8)
        self.writer = HistoryWriter(directory, "bench", compact_bytes=None, ahead_bytes=ahead_bytes)
        self._sender = Sender(pages, codec="rle")
        self.writer.begin(full=True)
        self.commit()

    def commit(self) -> float:
        """One more; the seconds that its writes and its sync took."""
        self._memory += 1  # every byte of every page
        groups = self._sender.checkpoint(batches(np.arange(len(self._memory)), self._memory))
        data = b"".join(bytes(buffer) for group in groups for buffer in group)
        spent, append = 0.0, Chain.append

        def timed(chain: Chain, piece: Buffer) -> None:
            nonlocal spent
            began = time.perf_counter()
            append(chain, piece)
            spent += time.perf_counter() - began

        Chain.append = timed  # type: ignore[method-assign]
        try:
            for at in range(0, len(data), _PIECE_BYTES):
                self.writer.feed(data[at : at + _PIECE_BYTES])
        finally:
            Chain.append = append  # type: ignore[method-assign]
        assert self._sender.position is not None
        self.writer.check(self._sender.position)
        began = time.perf_counter()
        self.writer.store()
        spent += time.perf_counter() - began
        self.writer.apply()
        return spent


def bare(path: Path, size: int, full_bytes: int = 0) -> Callable[[], float]:
    """A bare file that grows. full_bytes: it has so many already, from the beginning of which it is overwritten"""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    data = os.urandom(size)
    write_all(fd, [bytes(full_bytes)])
    os.fsync(fd)
    os.lseek(fd, 0, os.SEEK_SET)

    def commit() -> float:
        if full_bytes and os.lseek(fd, 0, os.SEEK_CUR) + size > full_bytes:
            os.lseek(fd, 0, os.SEEK_SET)
        began = time.perf_counter()
        write_all(fd, [data])
        os.fdatasync(fd)
        return time.perf_counter() - began

    return commit


def measure(directory: Path, size: int, rounds: int, interval_s: float) -> dict[str, list[float]]:
    """The milliseconds of each."""
    stores = [Stored(directory / name, size, most) for name, most in (("without", 0), ("with", AHEAD_BYTES))]
    commits = {"append": bare(directory / "bare", size), "overwrite": bare(directory / "full", size, _FULL_BYTES)}
    commits |= {"store": stores[0].commit, "store, ahead": stores[1].commit}
    found: dict[str, list[float]] = {kind: [] for kind in commits}
    counts_from = time.monotonic() + _WARM_UP_S
    while len(found["append"]) < rounds:
        for kind, commit in commits.items():
            time.sleep(interval_s)
            spent = commit() * 1e3
            if time.monotonic() > counts_from:
                found[kind].append(spent)
    for store in stores:
        store.writer.close()
    return found


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="bench_disk", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--interval-ms", type=float, default=5.0, help="before each checkpoint")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    for name, size in SIZES.items():
        directory = Path(tempfile.mkdtemp(prefix="bench-disk-", dir=options.directory))
        try:
            results[name] = measure(directory, size, options.rounds, options.interval_ms / 1e3)
        finally:
            shutil.rmtree(directory)
    if options.json:
        print(json.dumps(results))
        return 0
    print(f"{'':10}{'':14} {'p50 ms':>8} {'p99 ms':>8} {'÷ append':>9}   load {os.getloadavg()[0]:.1f}")
    for name, found in results.items():
        bare = statistics.median(found["append"])
        for kind, spent in found.items():
            middle, late = statistics.median(spent), sorted(spent)[len(spent) * 99 // 100]
            print(f"{name:10}{kind:14} {middle:8.2f} {late:8.2f} {middle / bare:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
