"""Real processes that write, compact and prune a store are killed: whatever they called durable is there.

The truth is held here, outside the killed process: the memory at an epoch follows from its number.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_support import sha

from remus_ckpt import read_checkpoints
from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import Store

pytestmark = pytest.mark.kill

CHILD = Path(__file__).parents[1] / "crash_store.py"


def run_child(
    directory: Path, seed: int, *more: object, kill_after: tuple[int, float] | None = None
) -> tuple[int, str]:
    """Returns the last epoch that the child called durable, −1 for none, and the last line that it wrote.

    kill_after: phases that it reaches, and seconds from then on
    """
    command = [sys.executable, str(CHILD), str(directory), str(seed), *map(str, more)]
    # Unbuffered: `communicate` reads from the descriptor, and would lose the lines that came along with the first.
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        first = child.stdout.readline()
        if kill_after is not None:
            first += b"".join(child.stdout.readline() for _ in range(kill_after[0]))
            time.sleep(kill_after[1])
            child.kill()
        out, err = child.communicate(timeout=60)
    assert child.returncode == -9, err.decode()
    lines = (first + out).decode().splitlines()
    stored = [int(line.split()[1]) for line in lines if line.split()[0] in ("stored", "opened")]
    return stored[-1], lines[-1].split()[0]


def check(store: Store, durable: int) -> None:
    """What is there after a death: all that was called durable, and everything that is there is right."""
    history = store.history("orders")
    before = history.newest()
    assert (-1 if before is None else before.epoch) >= durable
    assert history.verify().is_good
    with store.writer("orders") as writer:
        assert writer.warnings == []
        assert (-1 if writer.position is None else writer.position.epoch) >= durable
        assert (writer.position is None) == (before is None)
        if before is not None:
            assert writer.position == before.position and writer.memory is not None
            assert memory_sha256(writer.memory) == sha(before.epoch)
            assert writer.stream is not None
        entries = writer.history.entries()
        held: dict[int, str] = {}
        for path in (writer.directory / "segments").iterdir():
            for one in read_checkpoints(path, strict=True):
                held[one.epoch] = memory_sha256(one.memory)
                assert one.device_state == b"dev%d" % one.epoch
        assert held == {epoch: sha(epoch) for epoch in held}
        assert sorted(held) == [entry.epoch for entry in entries]
        # Whole segments are pruned from the old end, and nothing else is missing.
        assert sorted(held) == list(range(min(held, default=0), max(held, default=-1) + 1))
        if before is not None:
            assert memory_sha256(writer.history.restore().memory) == sha(before.epoch)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_instants(tmp_path: Path, seed: int) -> None:
    store = Store(tmp_path / "store")
    dice = random.Random(seed)
    newest = -1
    for number in range(8):
        durable, _ = run_child(
            store.directory, 100 * seed + number, kill_after=(dice.randrange(60), dice.uniform(0.0, 0.02))
        )
        assert durable >= newest
        check(store, durable)
        newest = durable
        if dice.random() < 0.3:
            # The index is lost with the power.
            for path in (store.directory / "orders").glob("index.sqlite*"):
                os.unlink(path)
            check(store, durable)
    assert newest > 20


@pytest.mark.parametrize("phase", ["staged", "stored", "applying", "applied", "compacting", "compacted", "pruning"])
def test_killed_in_every_phase(tmp_path: Path, phase: str) -> None:
    store = Store(tmp_path / "store")
    for number, count in enumerate((1, 2, 5) if phase in ("compacting", "compacted", "pruning") else (1, 7, 30)):
        durable, last = run_child(store.directory, 1000 + number, phase, count)
        assert last == phase
        check(store, durable)
