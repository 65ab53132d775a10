"""The demo of a fleet: a few processes are protected by name, one backup dies, and all are protected again.

    python fleet.py FILE

is one of the processes: it counts in shared memory.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import LogError, RemusError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.placing import LEASE_S, Place, called
from remus_ckpt.store import Store

CELLS = 1 << 17
_STEP_S = 0.002
_PATIENCE_S = 60.0
_POLL_S = 0.1


def run_fleet_demo(
    *, seconds: float, interval: str, names: int = 4, seed: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run it.

    seconds: about how long the processes run before a backup is killed
    interval: between two pauses of a process
    say: called with each line of the account
    Returns the account's figures: `moved_s` says for each name when it was protected elsewhere, in seconds since the
    kill. Raises RemusError if a claim does not hold, or if there is no nats-server.
    """
    rng = random.Random(seed)
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-demo-")))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-demo-", dir=shared)))
        brokers = stack.enter_context(Brokers())
        brokers.make_log()
        fleet = Fleet(brokers.url)
        stack.callback(fleet.close)
        say(f"three brokers, which sync each record: {brokers.url}")
        backups = {}
        for number in range(2):
            store = folder / f"backup-{number}"
            started = stack.enter_context(_backup(store, brokers.url, memory / f"warm-{number}"))
            backups[_id_of(store)] = (started, store)
        _await(lambda: set(backups) <= set(fleet.backups()), "the backups did not announce themselves")
        say(f"two backups: remus-ckpt backup --fleet {brokers.url}: {', '.join(backups)}")
        primaries = {}
        for number in range(names):
            name = f"work-{number}"
            primaries[name] = stack.enter_context(_protected(name, memory / name, brokers.url, interval, folder))
        say(f"{names} processes, each protected by: remus-ckpt protect … --to {brokers.url}/NAME --interval {interval}")
        _await(lambda: set(primaries) <= set(fleet.places()), "not all names were placed")
        time.sleep(seconds * rng.uniform(0.8, 1.2))
        return _kill_and_watch(fleet, backups, primaries, folder, say)


def _kill_and_watch(
    fleet: Fleet,
    backups: dict[str, tuple[subprocess.Popen[str], Path]],
    primaries: dict[str, subprocess.Popen[bytes]],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    places, known = fleet.places(), fleet.backups()
    on = {id: sorted(name for name, place in places.items() if place.backup == id) for id in backups}
    for id, held in on.items():
        say(f"backup {called(id, known)} has {', '.join(held) or 'nothing'}")
    victim = max(on, key=lambda id: len(on[id]))
    (survivor,) = set(backups) - {victim}
    backups[victim][0].send_signal(signal.SIGKILL)
    began = time.monotonic()
    say(f"killed backup {victim} with SIGKILL: {len(on[victim])} names are unprotected, and their output waits")
    moved: dict[str, float] = {}

    def look() -> bool:
        for name, place in _places(fleet).items():
            if name in on[victim] and place.backup == survivor and name not in moved:
                moved[name] = round(time.monotonic() - began, 2)
                say(f"{moved[name]:6.2f} s: {name} is protected by {survivor}, with all its memory")
        return len(moved) == len(on[victim])

    _await(look, "not all names were protected again")
    taken = max(moved.values())
    say(f"all protected {taken:.2f} s after the death of their backup, of which up to {LEASE_S:g} s are its lease")
    time.sleep(1.0)  # commits continue there
    for name, primary in primaries.items():
        if primary.poll() is not None:
            raise RemusError(f"the primary of {name} has ended: see {folder}")
    proved = _prove(backups[survivor][1], sorted(primaries), folder)
    say(
        f"the processes run on, and {survivor} holds everything that was acknowledged: {proved:,} commits, none missing"
    )
    return {"names": len(primaries), "moved_s": moved, "all_protected_s": taken, "commits": proved}


def _prove(store: Path, names: list[str], folder: Path) -> int:
    """Check that the last acknowledged checkpoint is in the store, under its digest, with a consistent memory; returns
    how many commits there were."""
    commits = 0
    for name in names:
        acknowledged = [line.split() for line in (folder / f"{name}.commits").read_text().splitlines()]
        epochs = [int(epoch) for epoch, _ in acknowledged]
        if epochs != list(range(epochs[0], epochs[0] + len(epochs))):
            raise RemusError(f"{name}: a commit is missing, or was reported twice")
        epoch, digest = epochs[-1], acknowledged[-1][1]
        history = Store(store).history(name)
        checkpoint = history.restore(epoch)
        if history.find(epoch).position.digest.hex() != digest:
            raise RemusError(f"{name}: checkpoint {epoch} in the store is not the one that was acknowledged")
        if fault := fault_of(checkpoint.memory.reshape(-1).view(np.int64)[:CELLS]):
            raise RemusError(f"{name}: checkpoint {epoch}: {fault}")
        commits += len(epochs)
    return commits


def _places(fleet: Fleet) -> dict[str, Place]:
    try:
        return fleet.places()
    except LogError:
        return {}


def _await(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise RemusError(f"{otherwise} after {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def _id_of(store: Path) -> str:
    from remus_ckpt.fleet.member import id_of

    return id_of(store)


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def _backup(store: Path, url: str, warm: Path) -> Iterator[subprocess.Popen[str]]:
    log = store.with_suffix(".log")
    command = [sys.executable, "-m", "remus_ckpt", "backup", "--listen", "tcp://127.0.0.1:0", "--store", str(store)]
    with _started([*command, "--warm", str(warm), "--fleet", url], log) as process:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("listening on "):
            raise RemusError(f"the backup did not start: {log.read_text()[-500:]}")
        yield process


@contextmanager
def _protected(name: str, memory: Path, url: str, interval: str, folder: Path) -> Iterator[subprocess.Popen[Any]]:
    """A process that counts in its memory, and its primary, which is yielded."""
    memory.write_bytes(bytes(CELLS * 8))
    with _started([sys.executable, __file__, str(memory)], folder / f"{name}.work.log") as work:
        assert work.stdout is not None
        if work.stdout.readline() != "ready\n":
            raise RemusError("the demo's process did not start")
        command = [sys.executable, "-m", "remus_ckpt", "protect", str(memory), "--pid", str(work.pid)]
        command += ["--to", f"{url}/{name}", "--interval", interval]
        command += ["--on-commit", f"exec cat > '{folder / name}.commits'"]
        with _started(command, folder / f"{name}.log") as primary:
            yield primary


# The process


def count_on(cells: NDArray[np.int64], rounds: int | None = None) -> None:
    """Number the cells one after another, and again from the first; the numbers never stop."""
    number = int(cells.max())
    while rounds is None or rounds:
        number += 1
        cells[number % len(cells)] = number
        rounds = rounds and rounds - 1
        if rounds is None:
            time.sleep(_STEP_S)


def fault_of(cells: NDArray[np.int64]) -> str | None:
    """What is wrong with cells that a process numbers, None if nothing is."""
    newest = int(cells.max())
    numbers = np.arange(max(newest - len(cells) + 1, 1), newest + 1)
    wrong = int((cells[numbers % len(cells)] != numbers).sum()) + int((cells != 0).sum()) - len(numbers)
    return f"{wrong} of {len(numbers)} cells are not what counting to {newest} makes of them" if wrong else None


def main() -> None:
    """Count until killed."""
    with open(sys.argv[1], "r+b") as file:
        cells = np.frombuffer(mmap.mmap(file.fileno(), CELLS * 8), dtype=np.int64)
    print("ready", flush=True)
    count_on(cells)


if __name__ == "__main__":
    main()
