#!/usr/bin/env python3
"""Lets every call of the system that a store makes fail, one by one, and looks what is lost, wrong or left.

    faults [--sample N] [--seed N] [--jobs N] [--op OP] [--json]
    faults --replay CASE        as a failure prints it

A scripted history of one store (`history.py`) is played once to count its calls, SQLite's too; then once for each call
and fault: an error, a disk that is full for a while, a write that is cut short, a sync that fails and takes what it was
for with it. Then nothing fails any more: the process goes on, or ends, or the power goes with all that was not synced,
and everything that was acknowledged must be there. Needs gcc.

Exit codes: 0 all is well, 1 something was wrong (how to replay it is printed), 2 the test itself failed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.shim import LOST_CUT, LOST_ZEROS, OPS, SHORT, build, make_control

_SPACE = (
    "open",
    "write",
    "pwrite",
    "fsync",
    "fdatasync",
    "rename",
    "ftruncate",
    "fallocate",
    "mkdir",
    "mmap",
    "copy_file_range",
)
_LIKELY = tuple(op for op in OPS if op not in ("close", "lseek"))
"""A close that fails is for file systems in the network, and once is enough to see who minds."""
_SYNCS = ("fsync", "fdatasync")
FAULTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "EIO": (OPS, {"times": 1, "error": errno.EIO}),
    "EIO, 3 calls": (_LIKELY, {"times": 3, "error": errno.EIO}),
    "EIO, 40 calls": (_LIKELY, {"times": 40, "error": errno.EIO}),
    "full": (_SPACE, {"times": 1, "error": errno.ENOSPC}),
    "full, 12 calls": (_SPACE, {"times": 12, "error": errno.ENOSPC}),
    "full, 150 calls": (_SPACE, {"times": 150, "error": errno.ENOSPC}),
    "short": (("read", "write", "pwrite", "copy_file_range"), {"times": 1, "how": SHORT}),
    "lost, zeros": (_SYNCS, {"times": 1, "error": errno.EIO, "how": LOST_ZEROS}),
    "lost, cut": (_SYNCS, {"times": 1, "error": errno.EIO, "how": LOST_CUT}),
}
"""Name → the calls that it is for, and keywords of `Shim.arm`."""
MODES, ENDS = ("insists", "yields"), ("close", "exit", "power")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many of all cases, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="histories at a time")
    parser.add_argument("--op", choices=OPS, help="only these calls")
    parser.add_argument("--replay", metavar="CASE", help="one case alone, such as '17/EIO/insists/close'")
    parser.add_argument("--json", action="store_true", help="the results, for machines")
    options = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        workers = [Worker(where, number, build(where)) for number in range(1 if options.replay else options.jobs)]
        try:
            plain = {
                mode: workers[0].ask(task_of(f"0/none/{mode}/close") | {"log": True}) for mode in ("insists", "yields")
            }
            for mode, result in plain.items():
                if result["wrong"]:
                    print(f"without a fault ({mode}):", *result["wrong"], sep="\n  ", file=sys.stderr)
                    return 2
            calls = {mode: result["calls"] for mode, result in plain.items()}
            cases = [options.replay] if options.replay else all_cases(calls, options.op)
            if options.sample is not None and options.sample < len(cases):
                cases = random.Random(options.seed).sample(cases, options.sample)
            results = run(workers, cases, calls)
        finally:
            for worker in workers:
                worker.close()
    finally:
        shutil.rmtree(where, ignore_errors=True)
    failed = [one for one in results if one["wrong"]]
    if options.json:
        print(json.dumps({"cases": len(results), "hits": sum(one["hits"] > 0 for one in results), "failed": failed}))
    else:
        print(table(results, time.monotonic() - begin))
    return 1 if failed else 0


def all_cases(calls: dict[str, list[tuple[str, str]]], only: str | None) -> list[str]:
    """Each call with each fault that there is for it; how it ends goes round."""
    cases: list[str] = []
    for number, (op, _) in enumerate(calls["insists"], 1):
        for fault, (ops, _) in FAULTS.items():
            if op in ops and only in (None, op):
                mode = "insists" if (number + len(cases)) % 2 else "yields"
                cases.append(f"{number}/{fault}/{mode}/{ENDS[len(cases) % 3]}")
    return cases


def task_of(case: str) -> dict[str, Any]:
    """What a worker is told."""
    number, fault, mode, end = case.split("/")
    keywords: dict[str, Any] = {}
    if fault != "none":
        ops, keywords = FAULTS[fault]
        keywords = {"first": int(number), "ops": ops, **keywords}
    return {"fault": keywords, "insists": mode == "insists", "end": end}


class Worker:
    """A process with the shim, and a directory of its own."""

    def __init__(self, where: Path, number: int, library: Path) -> None:
        below, control = where / f"disk-{number}", where / f"control-{number}"
        make_control(control)
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "FAULTS_BELOW": str(below),
            "FAULTS_CONTROL": str(control),
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(below), str(control)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Have one history played."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def run(workers: list[Worker], cases: list[str], calls: dict[str, list[tuple[str, str]]]) -> list[dict[str, Any]]:
    """All cases; a failure is told at once."""
    left, results = list(reversed(cases)), []
    lock = threading.Lock()

    def work(worker: Worker) -> None:
        while True:
            with lock:
                if not left:
                    return
                case = left.pop()
            result = worker.ask(task_of(case))
            number, fault, mode, _ = case.split("/")
            op, path = calls[mode][min(int(number), len(calls[mode])) - 1]
            result |= {"case": case, "op": op, "fault": fault, "path": path}
            with lock:
                results.append(result)
                if result["wrong"]:
                    print(f"{op} of {path}: python tools/faults --replay '{case}'", file=sys.stderr)
                    for text in result["wrong"]:
                        print(*(f"  {line}" for line in text.splitlines()), sep="\n", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def outcome(result: dict[str, Any]) -> str:
    """In a word."""
    if result["wrong"]:
        return "WRONG"
    if not result["hits"]:
        return "not hit"
    if result["reopened"]:
        return "reopened"
    if result["full_copies"] > FULL_COPIES:
        return "full copy"
    return "refused" if result["errors"] else "unnoticed"


FULL_COPIES = 4
"""Of a history without faults."""
OUTCOMES = ("unnoticed", "refused", "full copy", "reopened", "not hit", "WRONG")


def table(results: list[dict[str, Any]], seconds: float) -> str:
    """For people."""
    found = Counter((one["op"], one["fault"], outcome(one)) for one in results)
    rows = sorted({(op, fault) for op, fault, _ in found}, key=lambda row: (OPS.index(row[0]), row[1]))
    lines = [f"{len(results)} histories, {sum(bool(one['wrong']) for one in results)} wrong, {seconds:.0f} s"]
    lines.append(f"{'call':16} {'fault':16}" + "".join(f"{what:>10}" for what in OUTCOMES))
    for op, fault in rows:
        lines.append(f"{op:16} {fault:16}" + "".join(f"{found[op, fault, what] or '·':>10}" for what in OUTCOMES))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
