#!/usr/bin/env python3
"""Kills, freezes and cuts off primary and backup, and looks whether anything that was committed is lost or wrong.

    killtest [--runs N] [--seed N] [--jobs N] [--only PHASE] [--run NUMBER] [--tls] [--first] [--keep DIR]
             [--json]

Each run has a worker, a primary and a backup, which are real processes, and this one between them: it forwards what
they say, hashes memory in each pause, and remembers what was reported as committed. Then it ends them at random
instants or, in every other run, in a phase that the processes show in shared memory; starts them again, and at last
reads the store.

With --tls the harness hears nothing: a flipped bit ends the connection before it reaches the session, and whether
something is reported as committed before the backup said so is not checked. All else is checked as without.

Exit codes: 0 all is well, 1 a run failed (how to replay it is printed, and its directory is kept), 2 a phase was never
hit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from killtest import run
from killtest.children import BACKUP_PHASES, PRIMARY_PHASES

TRIES = 5
"""More runs for each phase that was missed."""


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="killtest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, help="by default a random one; it is printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument(
        "--only", choices=run.TARGETS, metavar="PHASE", help=f"aim all at one of {', '.join(run.TARGETS)}"
    )
    parser.add_argument("--run", type=int, help="this one alone")
    parser.add_argument("--tls", action="store_true", help="over mutual TLS instead of plain TCP")
    parser.add_argument("--first", action="store_true", help="end with the first run that fails")
    parser.add_argument("--keep", type=Path, help="where the directories of runs lie; those that failed stay")
    parser.add_argument("--json", action="store_true", help="all results, for machines")
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    numbers = range(options.runs) if options.run is None else [options.run]
    plan = [(number, options.only or aim_of(number)) for number in numbers]
    with ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=run.prepare
    ) as pool:
        results = play(pool, seed, plan, options)
        if (
            not (options.first and any(one["failures"] for one in results))
            and options.run is None
            and options.only is None
            and options.runs >= 2 * len(run.TARGETS)
        ):
            number = options.runs
            for aim in run.TARGETS:
                for _ in range(TRIES):
                    if hits(results)[aim]:
                        break
                    results += play(pool, seed, [(number, aim)], options)
                    number += 1
    seconds = time.monotonic() - begin
    failed = [one for one in results if one["failures"]]
    table = summarize(results, seed, seconds)
    if options.json:
        print(json.dumps(table | {"failed": failed}, indent=1))
    else:
        print(text(table))
    missed = [aim for aim in table["kills"] if not table["kills"][aim] and aim in run.TARGETS]
    if failed:
        return 1
    return 2 if missed and options.run is None and options.only is None else 0


def aim_of(number: int) -> str:
    """Every other run is aimed, at each phase in turn."""
    return run.TARGETS[number // 2 % len(run.TARGETS)] if number % 2 else ""


def play(
    pool: ProcessPoolExecutor, seed: int, plan: list[tuple[int, str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run them; a failure is told at once, and with --first no more begin."""
    directory = str(options.keep) if options.keep is not None else None
    futures: list[Future[dict[str, Any]]] = [
        pool.submit(run.run_one, seed, number, aim, directory, options.tls) for number, aim in plan
    ]
    results = []
    for done, future in enumerate(as_completed(futures), 1):
        if future.cancelled():
            continue
        result = future.result()
        results.append(result)
        if result["failures"]:
            only = f" --only {result['aim']}" if result["aim"] else ""
            only += " --tls" if options.tls else ""
            print(
                f"run {result['number']} failed: python tools/killtest --seed {seed} --run {result['number']}{only}; "
                f"kept: {result['directory']}\n  {', '.join(result['faults'])}; {result['ending']}",
                *(f"  {line}" for failure in result["failures"][:10] for line in failure.splitlines()),
                sep="\n",
                file=sys.stderr,
                flush=True,
            )
            if options.first:
                for other in futures:
                    other.cancel()
        elif sys.stderr.isatty():
            print(f"\r{done} of {len(futures)}", end="", file=sys.stderr, flush=True)
    return sorted(results, key=lambda one: one["number"])


def hits(results: list[dict[str, Any]]) -> Counter[str]:
    """Kills by phase. One in a compaction or a first copy counts there too, besides its phase."""
    found: Counter[str] = Counter()
    for one in results:
        for kill in one["kills"]:
            found[kill["phase"]] += 1
            found["compaction"] += kill["in_compaction"]
            found["first copy"] += kill["in_first_copy"]
    return found


def summarize(results: list[dict[str, Any]], seed: int, seconds: float) -> dict[str, Any]:
    """The table."""
    found = hits(results)
    phases = [*PRIMARY_PHASES, *BACKUP_PHASES, "compaction", "first copy"]
    return {
        "seed": seed,
        "runs": len(results),
        "failed_runs": sum(bool(one["failures"]) for one in results),
        "seconds": round(seconds, 1),
        "faults": dict(sorted(Counter(fault for one in results for fault in one["faults"]).items())),
        "endings": dict(sorted(Counter(one["ending"] for one in results).items())),
        "kills": {phase: found[phase] for phase in phases},
        "kills_aimed": sum(kill["is_aimed"] for one in results for kill in one["kills"]),
        "kills_total": sum(len(one["kills"]) for one in results),
        **{
            name: sum(one[name] for one in results)
            for name in ("checkpoints", "commits", "checked", "continued", "full", "flips_found", "flips_apart")
        },
    }


def text(table: dict[str, Any]) -> str:
    """For people."""
    kills = table["kills"]
    lines = [
        f"{table['runs']} runs, {table['failed_runs']} failed, {table['seconds']} s, seed {table['seed']}",
        f"{table['checkpoints']:,} checkpoints, {table['commits']:,} reported as committed, "
        f"{table['checked']:,} restored and hashed",
        *(
            [f"connected again: {table['continued']} with deltas, {table['full']} with a full copy"]
            if table["continued"] or table["full"]
            else []
        ),
        f"bits flipped: {table['flips_found']} found, {table['flips_apart']} on connections that ended before",
        "",
        f"{'fault':20} times    {'at the end':20} runs",
    ]
    faults, endings = list(table["faults"].items()), list(table["endings"].items())
    for row in range(max(len(faults), len(endings))):
        left = f"{faults[row][0]:20} {faults[row][1]:5}" if row < len(faults) else " " * 26
        right = f"{endings[row][0]:20} {endings[row][1]:4}" if row < len(endings) else ""
        lines.append(f"{left}    {right}".rstrip())
    lines += ["", f"{table['kills_total']} kills, {table['kills_aimed']} of them aimed"]
    lines += [f"{'primary in':20} kills    {'backup in':20} kills"]
    backup = [*BACKUP_PHASES, "compaction", "first copy"]
    for row in range(max(len(PRIMARY_PHASES), len(backup))):
        left = f"{PRIMARY_PHASES[row]:20} {kills[PRIMARY_PHASES[row]]:5}" if row < len(PRIMARY_PHASES) else " " * 26
        right = f"{backup[row]:20} {kills[backup[row]]:5}" if row < len(backup) else ""
        lines.append(f"{left}    {right}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
