"""What a run has left, and its disk as it was at many instants."""

from __future__ import annotations

import gc
import json
import logging
import random
import shutil
import subprocess
import traceback
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powerloss.check import Check, Told
from powerloss.disk import SURVIVORS, after_losses, die_with_parent
from powerloss.run import GENERATIONS, Run


class Record:
    """What a run has left in its directory."""

    def __init__(self, where: Path) -> None:
        self.where = where
        found = json.loads((where / "record").read_text())
        self.told: list[dict[str, Any]] = found["told"]
        self.truth = {name: {int(version): sha for version, sha in of.items()} for name, of in found["truth"].items()}
        self._marks: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for line in (where / "events").read_text().splitlines():
            generation, at, phase = json.loads(line)
            self._marks[generation].append((at, phase))
        self._spans = found["spans"]
        self.options: str = found["options"]
        self.lengths = [
            int.from_bytes((where / f"disk-{generation}" / "counter").read_bytes()[:8], "little")
            for generation in range(GENERATIONS)
        ]

    def phases_at(self, generation: int, position: int) -> set[str]:
        """What was going on there; of phases that came and went without a write, all."""
        marks = self._marks[generation]
        last = bisect_right(marks, (position, "~")) - 1
        found = {marks[last][1]} if last >= 0 else {"opening"}
        found |= {phase for at, phase in marks if at == position}
        for what, of, begin, end in self._spans:
            if what == "restart":
                end = min((at for at, phase in marks if phase == "listening" and at >= begin), default=begin)
            if of == generation and begin <= position <= end:
                found.add(what)
        return found

    def instants(self, count: int, draw: random.Random, aim: str | None) -> list[tuple[int, int, str, int]]:
        """(generation, position, survivors, seed): half anywhere, half in a phase that is drawn first."""
        where: dict[str, list[tuple[int, int]]] = defaultdict(list)
        anywhere = [(g, at) for g in range(GENERATIONS) for at in range(self.lengths[g] + 1)]
        for instant in anywhere:
            for phase in self.phases_at(*instant):
                where[phase].append(instant)
        if aim is not None and not where[aim]:
            return []
        found = []
        for number in range(count):
            phase = aim or (draw.choice(sorted(where)) if number % 2 else "")
            at = draw.choice(where[phase] if phase else anywhere)
            found.append((*at, draw.choice(SURVIVORS), draw.getrandbits(32)))
        return sorted(found)

    def look(self, cuts: list[tuple[int, int, str, int]]) -> Iterator[dict[str, Any]]:
        """Lose the power at each of these, and say what was wrong then."""
        image, mounted = self.where / "after", self.where / "after-mnt"
        mounted.mkdir(exist_ok=True)
        for generation in range(GENERATIONS):
            here = [(at, survivors, seed) for of, at, survivors, seed in cuts if of == generation]
            base, log = self.where / f"base-{generation}", self.where / f"disk-{generation}" / "log"
            for at, survivors, seed in after_losses(base, log, here, image):
                done = subprocess.run(
                    ["mount", "-o", "loop", image, mounted], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    faults = [f"the file system does not mount: {done.stderr.strip()}"]
                else:
                    try:
                        told = self.told_at(generation, at)
                        faults = Check(mounted, told, self.truth).faults
                    finally:
                        gc.collect()
                        subprocess.run(["umount", "-l", mounted], check=True)
                cut = [generation, at, survivors, seed]
                yield {"cut": cut, "phases": sorted(self.phases_at(generation, at)), "faults": faults}

    def told_at(self, generation: int, position: int) -> dict[str, Told]:
        """What everybody knew at that instant."""
        found: dict[str, Told] = defaultdict(Told)
        for event in self.told:
            if tuple(event["at"]) <= (generation, position):
                found[event["name"]].take(event)
        return found


def prepare() -> None:
    """In each job."""
    die_with_parent()
    logging.disable(logging.CRITICAL)


def one_run(seed: int, number: int, losses: int, aim: str | None, where: Path) -> dict[str, Any]:
    """A history and its losses. Its directory goes if all is well."""
    result: dict[str, Any] = {"number": number, "where": str(where), "losses": [], "error": None}
    try:
        where.mkdir()
        run = Run(seed, number, where)
        run.play()
        record = Record(where)
        cuts = record.instants(losses, random.Random(f"{seed} {number} cuts"), aim)
        result["losses"] = list(record.look(cuts))
        (where / "failed").write_text(json.dumps([loss["cut"] for loss in result["losses"] if loss["faults"]]))
        if not any(loss["faults"] for loss in result["losses"]):
            shutil.rmtree(where)
    except Exception:
        result["error"] = traceback.format_exc()
    return result
