#!/usr/bin/env python3
"""Takes the power away from a backup, on a real ext4 over a disk that remembers its writes and flushes. Needs root.

    powerloss [--losses N] [--seed N] [--jobs N] [--only PHASE] [--run NUMBER] [--keep DIR] [--json]
    powerloss --replay DIR [--cut GENERATION,POSITION,SURVIVORS,SEED]

Each run is a history: real primaries, and a backup that is killed in its phases, stopped and started, promotes,
compacts and prunes. Its disk (`disk.py`) keeps all writes and flushes in order, and whatever anybody is told is noted
with how far the disk was then. Afterwards the power is lost at many instants, anywhere and in each phase. What had been
flushed is there, and none, all or some of what was written since. The file system is mounted, its journal replayed, the
store read, a backup started on it, promoted and protected anew. Everything that had been said must be true.

Exit codes: 0 all is well, 1 something that was said is not true (how to replay it is printed, and the run is kept),
2 the test itself failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from powerloss import disk
from powerloss.record import Record, one_run, prepare
from powerloss.run import TARGETS

LOSSES_PER_RUN = 20


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="powerloss", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--losses", type=int, default=200)
    parser.add_argument("--seed", type=int, help="by default a random one; it is printed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", choices=TARGETS, metavar="PHASE", help=f"aim all at one of {', '.join(TARGETS)}")
    parser.add_argument("--run", type=int, help="this one alone")
    parser.add_argument("--keep", type=Path, help="where the directories of runs lie; those that failed stay")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="look again at a run that was kept")
    parser.add_argument("--cut", help="one instant of it, as a failure prints it; by default all that failed")
    parser.add_argument("--json", action="store_true", help="the results, for machines")
    options = parser.parse_args()
    disk.own_mounts()
    if options.replay is not None:
        return replay(options.replay, options.cut)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    keep = options.keep or Path(
        tempfile.mkdtemp(prefix="powerloss-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    )
    keep.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    runs = range(-(-options.losses // LOSSES_PER_RUN)) if options.run is None else [options.run]
    losses: list[dict[str, Any]] = []
    broken = []
    count = min(options.losses, LOSSES_PER_RUN)
    pool = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=prepare)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        futures = [pool.submit(one_run, seed, number, count, options.only, keep / f"run-{number}") for number in runs]
        for future in as_completed(futures):
            result = future.result()
            losses += result["losses"]
            if result["error"]:
                broken.append(result)
                print(
                    f"run {result['number']} of seed {seed} broke, kept in {result['where']}:\n{result['error']}",
                    file=sys.stderr,
                )
            for loss in result["losses"]:
                if loss["faults"]:
                    tell(result["where"], loss)
    except KeyboardInterrupt:
        for job in multiprocessing.active_children():
            job.kill()  # and with it all that it started
            job.join()
        disk.unmount_below(keep)
        shutil.rmtree(keep, ignore_errors=True)
        return 130
    finally:
        pool.shutdown()
    seconds = time.monotonic() - begin
    failed = [loss for loss in losses if loss["faults"]]
    if not failed and not broken and options.keep is None:
        shutil.rmtree(keep)
    print(summary(losses, seed, seconds, options.json))
    return 1 if failed else 2 if broken else 0


def replay(where: Path, cut: str | None) -> int:
    """The same instants of the same disk."""
    prepare()
    cuts = json.loads((where / "failed").read_text())
    if cut is not None:
        generation, position, survivors, seed = cut.split(",")
        cuts = [[int(generation), int(position), survivors, int(seed)]]
    failed = False
    for loss in Record(where).look(sorted(tuple(one) for one in cuts)):
        print(
            f"cut {','.join(map(str, loss['cut']))} in {', '.join(loss['phases'])}:",
            *(loss["faults"] or ["all is well"]),
            sep="\n  ",
        )
        failed |= bool(loss["faults"])
    return int(failed)


def tell(where: str, loss: dict[str, Any]) -> None:
    """Of a failure: what, and how to see it again."""
    cut = ",".join(map(str, loss["cut"]))
    print(
        f"lost in {', '.join(loss['phases'])}: python tools/powerloss --replay {where} --cut {cut}",
        *(f"  {fault}" for fault in loss["faults"]),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )


def summary(losses: list[dict[str, Any]], seed: int, seconds: float, as_json: bool) -> str:
    """The table."""
    hits = Counter(phase for loss in losses for phase in loss["phases"])
    bad = Counter(phase for loss in losses if loss["faults"] for phase in loss["phases"])
    left = Counter(loss["cut"][2] for loss in losses)
    failed = sum(bool(loss["faults"]) for loss in losses)
    if as_json:
        return json.dumps(
            {
                "seed": seed,
                "losses": len(losses),
                "failed": failed,
                "seconds": round(seconds, 1),
                "phases": hits,
                "survivors": left,
            }
        )
    lines = [f"{len(losses)} losses of power, {failed} with a fault, {seconds:.0f} s, seed {seed}"]
    lines.append("unflushed blocks that survived: " + ", ".join(f"{name} {left[name]}" for name in disk.SURVIVORS))
    lines += [f"{'phase':14} losses faults"] + [f"{phase:14} {hits[phase]:6} {bad[phase]:6}" for phase in TARGETS]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
