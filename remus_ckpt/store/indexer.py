"""Keeps the page indexes of a store up to date: `python -m remus_ckpt.store.indexer DIRECTORY`, until stdin ends.

A separate process with the lowest priority: no checkpoint must ever wait for it.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path

from remus_ckpt.errors import RemusError
from remus_ckpt.store import Store
from remus_ckpt.store.history import History
from remus_ckpt.store.moment import index_pages
from remus_ckpt.store.segments import list_segments

PAUSE_S = 5.0
"""Seconds between two looks."""


def keep_indexing(store: Store, end: int) -> None:
    """Index every name, again and again, until the descriptor `end` can be read."""
    seen: dict[str, tuple[object, ...]] = {}

    def is_over(wait_s: float = 0.0) -> bool:
        return bool(select.select([end], [], [], wait_s)[0])

    while not is_over(PAUSE_S if seen else 0.0):
        seen.setdefault("", ())
        with suppress(RemusError):
            for name in store.names():
                # One that cannot be read is looked at again; its backup says what is wrong.
                with suppress(RemusError, OSError):
                    history = store[name]
                    if (now := _version(history)) != seen.get(name):
                        index_pages(history, is_over)
                        seen[name] = now


def _version(history: History) -> tuple[object, ...]:
    """Changes if there is more to be indexed."""
    names = list_segments(history.directory)
    if not names:
        return ()
    status = history.path_of(names[-1]).stat()
    return (*names, status.st_size, status.st_mtime_ns)  # within space written ahead, the file does not grow


def main() -> None:
    """Run the process."""
    os.nice(19)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    keep_indexing(Store(Path(sys.argv[1])), sys.stdin.fileno())
    os._exit(0)  # Python's own end takes long where others want the processor


if __name__ == "__main__":
    main()
