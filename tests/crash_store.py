"""A child that writes a store until it is killed, and says on standard output what it has reached.

    python crash_store.py DIRECTORY SEED [PHASE COUNT]

A line "PHASE EPOCH" is written as the store reaches each phase; "stored" means durable. With PHASE and COUNT it ends
itself, by SIGKILL too, when it has reached that phase so many times.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from store_support import Source, commit

from remus_ckpt.store import Retention, Store
from remus_ckpt.wire.record import Position


def main() -> None:
    """Write, compact, prune, drop halves, begin anew: in an order that the seed decides."""
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    phase_to_die_in, count = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("", 0)
    dice = random.Random(seed)
    reached = 0

    def on_phase(phase: str, epoch: int) -> None:
        nonlocal reached
        os.write(1, f"{phase} {epoch}\n".encode())
        reached += phase == phase_to_die_in
        if phase_to_die_in and reached == count:
            os.kill(os.getpid(), signal.SIGKILL)

    writer = Store(directory).writer("orders", on_phase=on_phase)
    os.write(1, f"opened {-1 if writer.position is None else writer.position.epoch}\n".encode())
    source: Source | None = None
    while True:
        if source is None or dice.random() < 0.03:
            before = writer.position
            source = Source(position=before if before is None else Position(writer.highest_epoch, before.digest))
            writer.begin(full=True)
        data = source.checkpoint()
        if dice.random() < 0.1 and source.position.epoch > 0 and writer.stream is not None:
            # Half of it, as from a link that breaks; then the same again.
            writer.feed(data[: dice.randrange(len(data))])
            is_base = len(data) > 20_000
            writer.begin(full=is_base)
        step = dice.choice([1000, 10_000, len(data)])
        commit(writer, data, source.position, step=step)
        if dice.random() < 0.1:
            writer.compact()
        if dice.random() < 0.1:
            writer.prune(Retention(count=dice.randrange(1, 60)))


if __name__ == "__main__":
    main()
