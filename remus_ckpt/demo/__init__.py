"""The demo: a real worker is recorded, killed, restored and continued, and each claim is checked on the way."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.codec.reference import Shadow
from remus_ckpt.demo import ledger as worker
from remus_ckpt.demo.ledger import Ledger
from remus_ckpt.errors import RemusError
from remus_ckpt.files import StreamWriter, read_checkpoints
from remus_ckpt.loop import CheckpointLoop, Totals
from remus_ckpt.memory import save_image
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.sender import Sender
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

_CONTINUE_TRANSFERS = 1000
_PATIENCE_S = 30.0


def run_demo(
    *,
    seconds: float,
    interval_s: float,
    directory: Path | None,
    seed: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run it.

    seconds: about how long the worker runs before it is killed
    directory: where to keep stream and image; by default they are removed
    say: called with each line of the account
    Returns the account's figures. Raises RemusError where a claim does not hold.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="remus-demo-") as temporary:
        where = directory or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        with _shared_file() as memory, _shared_file() as standby:
            stream = where / "ledger.remus"
            report = _record(memory, stream, seconds, interval_s, rng, say)
            report |= _prove(stream, report.pop("witness"), say)
            report |= _continue(stream, where / "ledger.img", standby, say)
    if directory is not None:
        say(f"kept: {stream} and {where / 'ledger.img'}")
        report |= {"stream": str(stream), "image": str(where / "ledger.img")}
    return report


@contextmanager
def _shared_file() -> Iterator[Path]:
    """A new file in shared memory, of mode 0600."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    descriptor, name = tempfile.mkstemp(prefix="remus-demo-", dir=folder)
    try:
        os.close(descriptor)
        yield Path(name)
    finally:
        os.unlink(name)


@contextmanager
def _worker(memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process on that file, ready and at work; killed at the end."""
    process = subprocess.Popen([sys.executable, worker.__file__, str(memory)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RemusError("the demo's worker did not start")
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _record(
    memory: Path, stream: Path, seconds: float, interval_s: float, rng: random.Random, say: Callable[[str], None]
) -> dict[str, Any]:
    blank = bytearray(worker.BYTES)
    Ledger(blank).create(rng.getrandbits(32))
    memory.write_bytes(blank)
    witness: dict[int, str] = {}
    reader = os.open(memory, os.O_RDONLY)

    def look(epoch: int) -> None:
        # A reader of its own, straight from the file: not what the capture copied.
        digest = hashlib.sha256()
        for start in range(0, worker.BYTES, 1 << 20):
            digest.update(os.pread(reader, 1 << 20, start))
        witness[epoch] = digest.hexdigest()

    kill_after_s = seconds * rng.uniform(0.8, 1.2)
    totals = Totals()
    with _worker(memory) as process:
        say(f"worker {process.pid} makes transfers in {worker.BYTES // PAGE_SIZE:,} pages of shared memory")
        source = SharedFile(memory, Processes([process.pid]))
        output = StreamWriter(stream)
        killer = threading.Timer(kill_after_s, process.kill)
        try:
            loop = CheckpointLoop(
                source,
                Sender(source.pages, reference=Shadow(source.shadow)),
                output,
                interval_s=interval_s,
                on_paused=look,
            )
            killer.start()
            for taken in loop.run():
                totals.add(taken)
        finally:
            killer.cancel()
            output.close()
            source.close()
            os.close(reader)
    say(f"recorded: {totals.text()} (without the second reader's)")
    say(f"killed with SIGKILL after {kill_after_s:.3f} s; the stream has {stream.stat().st_size:,} bytes")
    return {"witness": witness} | totals.report()


def _prove(stream: Path, witness: dict[int, str], say: Callable[[str], None]) -> dict[str, Any]:
    """Every checkpoint of the stream against what the second reader saw, and the transfers that pauses fell into."""
    inside, last = [], -1
    example: Pages | None = None
    for checkpoint in read_checkpoints(stream):
        last = checkpoint.epoch
        if hashlib.sha256(checkpoint.memory.reshape(-1)[: worker.BYTES].data).hexdigest() != witness[last]:
            raise RemusError(f"checkpoint {last} is not what the second reader saw in that pause")
        if Ledger(checkpoint.memory).in_transfer:
            inside.append(last)
            example = checkpoint.memory.copy()
    if last != max(witness, default=-1):
        raise RemusError(f"the last checkpoint is {last}, the last pause was {max(witness, default=-1)}")
    say(f"restored: all {last + 1} checkpoints equal the hash that a second reader took of the file in their pause")
    if example is None:
        say("no pause fell into a transfer this time")
    else:
        ledger = Ledger(example)
        before = ledger.faults()
        ledger.recover()
        after = ledger.faults()
        if after:
            raise RemusError(f"checkpoint {inside[-1]} after its intent was replayed: {'; '.join(after)}")
        found = "; ".join(before) or "no store of it had been made, or all had"
        say(f"{len(inside)} pauses fell into a transfer, the last in checkpoint {inside[-1]}: {found}")
        say(f"after its intent is replayed, all {worker.ACCOUNTS:,} accounts are right")
    return {"proved": last + 1, "pauses_in_transfer": len(inside)}


def _continue(stream: Path, image: Path, standby: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Restore the last checkpoint, check it, and let a new worker go on from it."""
    memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
    for checkpoint in read_checkpoints(stream):
        memory = checkpoint.memory
    save_image(memory, image)
    data = bytearray(image.read_bytes())
    ledger = Ledger(data)
    replayed = ledger.recover()
    if faults := ledger.faults():
        raise RemusError(f"the restored ledger is wrong: {'; '.join(faults)}")
    restored = ledger.transfers
    say(
        f"the last checkpoint: {restored:,} transfers, {'one of them finished from its intent, ' if replayed else ''}"
        "all accounts right"
    )
    standby.write_bytes(image.read_bytes())
    deadline = time.monotonic() + _PATIENCE_S
    with _worker(standby) as process:
        while (reached := Ledger(bytearray(standby.read_bytes())).transfers) < restored + _CONTINUE_TRANSFERS:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RemusError(f"the worker did not go on: it is at transfer {reached} after {restored}")
            time.sleep(0.02)
    ledger = Ledger(data := bytearray(standby.read_bytes()))
    ledger.recover()
    if faults := ledger.faults():
        raise RemusError(f"the ledger is wrong after the worker went on: {'; '.join(faults)}")
    say(f"a new worker went on from it to transfer {ledger.transfers:,}: all accounts right")
    return {"restored_transfers": restored, "continued_to": ledger.transfers}
