"""The backup that loses its power: a real one, which notes how far the disk was when it came to each phase.

python backup.py ARGUMENTS        JSON, as `run.py` makes them
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from powerloss.disk import die_with_parent
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.standby import Policy
from remus_ckpt.store import HistoryWriter, Retention, Store, ahead

PHASES = (
    *("opening", "listening", "receiving", "staged", "stored", "acknowledged", "applying", "applied"),
    *("compacting", "compacted", "pruning"),
)
WISH = 1
"""The word behind the disk's counter: one above the number of the phase in which to die; 0 for none."""


AHEAD_BYTES = 1 << 20
"""Enough for many checkpoints, and several times in a disk of ours."""


class EagerStore(Store):
    """Compacts after a few checkpoints already, and has space written ahead from the first on."""

    def __init__(self, directory: str | Path, checkpoints: int) -> None:
        super().__init__(directory)
        self._checkpoints = checkpoints

    def writer(self, name: str, **options: Any) -> HistoryWriter:
        """As of `Store`."""
        options |= {"compact_checkpoints": self._checkpoints, "ahead_bytes": AHEAD_BYTES}
        return super().writer(name, **options)


def main() -> None:
    """Serve until SIGTERM, or the phase in which to die."""
    die_with_parent()
    ahead.WINDOW_S = 0.0
    given = json.loads(sys.argv[1])
    configure_logs("text")
    with open(given["counter"], "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
    events = os.open(given["events"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    last = ""

    def on_phase(phase: str, epoch: int) -> None:
        nonlocal last
        if phase != last:
            os.write(events, json.dumps([given["generation"], words[0], phase]).encode() + b"\n")
        last = phase
        if words[WISH] == PHASES.index(phase) + 1:
            words[WISH] = 0
            os.kill(os.getpid(), signal.SIGKILL)

    stop = StopSignal()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    on_phase("opening", 0)
    backup = Backup(
        EagerStore(given["store"], given["compact_checkpoints"]),
        [given["address"]],
        policy=Policy(lease_s=1.0, retention=Retention(count=given["retain"]), on_failover=given["on_failover"]),
        warm="disk",  # which loses its power too
        on_phase=on_phase,
        stop=stop,
    )
    on_phase("listening", 0)
    try:
        backup.run()
    finally:
        backup.close()


if __name__ == "__main__":
    main()
