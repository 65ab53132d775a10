"""Fuzzes everything that reads a memory file, from the vectors on.

    python tests/fuzz/readers.py [SECONDS] [SEED]   # some at random, changed in every way
    python tests/fuzz/readers.py --each [SEED]      # each of them: 200 cuts and 1,000 changed bits, which takes long

A file is cut, or bytes of it are changed, repeated, removed, or taken from another file. Reading it must end with a
result or an error of ours, in bounded time and memory. What does not is kept in /tmp/remus-fuzz-*, and the exit code
is 1. --each also reads the streams that QEMU itself wrote, where they are there (tests/shared.py).
"""

# ruff: noqa: E402
from __future__ import annotations

import itertools
import lzma
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import v2_streams
from qemu_support import GOOD, REAL, ROWS, contents, real_manifest

from remus_ckpt.errors import RemusError
from remus_ckpt.files import StreamFile, read_events, restorer_of
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.machines import Machine
from remus_ckpt.restorer import Anonymous

LIMITS = Limits(memory_bytes=128 * MIB)
MOST_S = 10.0
MEMORY_BYTES = 4 << 30
CUTS, FLIPS = 200, 1000
REAL_BYTES = 8 << 20
"""Larger streams of QEMU's have nothing in them that the smaller ones have not."""

Sample = tuple[list[bytes], dict[str, Any]]
"""Files, the main connection first, and the options that they need."""


def corpus(*, is_good: bool = False) -> list[Sample]:
    """is_good: one or a few of each kind, without those that are malformed as they are"""
    found: list[Sample] = []
    for row in GOOD if is_good else ROWS:
        pairs = dict(zip(row.get("arguments", [])[::2], row.get("arguments", [])[1::2], strict=True))
        known = {"snapshot": pairs.get("--snapshot")}
        if row in GOOD and "--page-size" in pairs:
            known["page_size"] = int(pairs["--page-size"])
        found.append((list(contents(row["id"])), known))
    found += [([data], {}) for data in (*v2_streams.ALL.values(), v2_streams.SUSPENDED)]
    for path in sorted((ROOT / "specs" / "vectors").glob("*.bin*")):
        if is_good and not path.name.startswith(("captured-", "front-", "own-")):
            continue
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        if len(data) < 1 << 18:
            found.append(([data], {}))
    return found


def change(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Some changes, most of them near the beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if not changed:
            break
        at = chance.randrange(min(len(changed), chance.choice((64, 512, len(changed)))))
        size = chance.choice((1, 2, 4, 8, 64, 4096))
        match chance.randrange(9):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                begin = chance.randrange(len(other) + 1)
                changed[at : at + size] = other[begin : begin + size]
            case 4:
                number = chance.choice(
                    (0, 1, 0x7F, 0xFF, 0x1000, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 63), (1 << 64) - 1)
                )
                width = chance.choice((2, 4, 8))
                order = chance.choice(("little", "big"))
                changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
            case 5:
                changed[at : at + size] = chance.randbytes(size)
            case _:
                changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def read(paths: list[str], known: dict[str, Any]) -> str:
    """Read a file to its end; returns how that was. Raises what must not be raised."""
    try:
        file = StreamFile(paths[0])
        if file.holds_machine:
            with Machine(file, paths[1:], home=lambda _: Anonymous(), limits=LIMITS, **known) as machine:
                machine.read()
            if machine.error is not None:
                return type(machine.error).__name__
            return "whole" if machine.is_good else "nothing"
        with file:
            restorer = restorer_of(file, limits=LIMITS)
            for _ in read_events(file, restorer):
                if restorer.staged is not None:
                    restorer.commit()
        return "whole" if restorer.in_force is not None else "nothing"
    except RemusError as error:
        return type(error).__name__


def real() -> list[Sample]:
    """What QEMU and libvirt wrote."""
    found: list[Sample] = []
    for row in real_manifest().values():
        files = [lzma.decompress((REAL / one["file"]).read_bytes()) for one in row["files"]]
        if sum(map(len, files)) <= REAL_BYTES:
            found.append((files, {"snapshot": next(iter(row.get("snapshots", [None])))}))
    return found


def at_random(chance: random.Random, seconds: float) -> Iterator[Sample]:
    files = corpus()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        parts, known = chance.choice(files)
        which = chance.randrange(len(parts))
        other, _ = chance.choice(files)
        changed = [*parts]
        changed[which] = change(chance, parts[which], other[0])
        yield changed, known


def each(chance: random.Random) -> Iterator[Sample]:
    """Half of the bits are near the beginning or the end, where the headers are and what stands behind memory."""
    files = [*corpus(is_good=True), *real()]
    for number, (parts, known) in enumerate(files):
        print(f"{number + 1} of {len(files)}: {sum(map(len, parts)):,} bytes", flush=True)
        for is_cut in itertools.chain(itertools.repeat(True, CUTS), itertools.repeat(False, FLIPS)):
            which = chance.randrange(len(parts))
            data = bytearray(parts[which])
            at = chance.randrange(len(data))
            if is_cut:
                del data[at:]
            else:
                near = chance.choice(
                    (at, at, chance.randrange(min(len(data), 512)), -1 - chance.randrange(min(len(data), 1 << 15)))
                )
                data[near] ^= 1 << chance.randrange(8)
            yield [*parts[:which], bytes(data), *parts[which + 1 :]], known


def main() -> int:
    arguments = sys.argv[1:]
    is_each = arguments[:1] == ["--each"]
    seed = int(arguments[1]) if len(arguments) > 1 else time.time_ns()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    chance = random.Random(seed)
    samples = each(chance) if is_each else at_random(chance, float(arguments[0]) if arguments else 60.0)
    ended: Counter[str] = Counter()
    slowest, faults = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for changed, known in samples:
            paths = []
            for number, data in enumerate(changed):
                path = Path(folder) / str(number)
                path.write_bytes(data)
                paths.append(str(path))
            began = time.process_time()
            try:
                ended[read(paths, known)] += 1
            except BaseException as error:  # whatever it is, it should not have been raised
                if isinstance(error, KeyboardInterrupt):
                    raise
                faults += 1
                kept = Path(tempfile.mkdtemp(prefix="remus-fuzz-"))
                for number, data in enumerate(changed):
                    (kept / str(number)).write_bytes(data)
                print(f"{kept}: {known}\n{traceback.format_exc()}", flush=True)
            took = time.process_time() - began
            if took > slowest:
                slowest = took
                if took > MOST_S:
                    faults += 1
                    print(f"{took:.1f} s: {known}", flush=True)
    print(f"seed {seed}: {sum(ended.values()):,} files, {faults} faults, slowest {slowest:.2f} s; {dict(ended)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
