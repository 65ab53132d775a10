"""Copies the closed segments of a store into an archive until stdin ends.

`python -m remus_ckpt.store.archiver DIRECTORY URL [RECIPIENTS]`, a separate process: no checkpoint must ever wait for
it. It prints a line of JSON when something changes: {"name": …, "newest": the last archived epoch or null, "waiting":
segments, "waiting_bytes": …, "error": null or words}
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from remus_ckpt.errors import NoCheckpoint, RemusError
from remus_ckpt.store import Store
from remus_ckpt.store.archive import Archive, Archived
from remus_ckpt.store.history import History
from remus_ckpt.store.segments import Contents, list_segments
from remus_ckpt.store.state import load_state

PAUSE_S = 5.0
"""Between two looks."""
_ANEW_S = 60.0
"""After a failure."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far an archive is behind a history.

    newest: the last archived epoch, None for none
    waiting: closed segments that are not archived; waiting_bytes: of their files
    error: why the last one could not be archived, None if it was
    """

    name: str
    newest: int | None
    waiting: int
    waiting_bytes: int
    error: str | None = None


def push(archive: Archive, history: History, name: str, known: list[Archived]) -> Iterator[Archived | None]:
    """Archive closed segments that are missing, oldest first; yields each once it is archived, and None in between to
    give way.

    known: what the archive has, which grows. Raises StoreError.
    """
    for one in waiting(history, known):
        yield None
        with suppress(NoCheckpoint):  # retention was faster
            archived = archive.put(name, history.path_of(one.name))
            known.append(archived)
            yield archived


def waiting(history: History, known: list[Archived]) -> list[Contents]:
    """The closed segments that are not archived, oldest first. Raises StoreError."""
    names = list_segments(history.directory)
    state = load_state(history.directory)
    closed = set(names if state.role == "promoted" else names[:-1]) - state.damaged.keys()
    there = {one.identity for one in known}
    found = [one for one in history.survey().contents if one.name in closed and one.last is not None]
    return [one for one in found if Archived.of(one).identity not in there]


def keep_archiving(store: Store, archive: Archive, end: int, tell: Callable[[Lag], None]) -> None:
    """Archive every name, again and again, until the descriptor `end` can be read."""
    known: dict[str, list[Archived]] = {}
    told: dict[str, Lag] = {}
    pause = 0.0
    while not select.select([end], [], [], pause)[0]:
        pause = PAUSE_S
        names: list[str] = []
        with suppress(RemusError):
            names = store.names()
        for name in names:
            history = error = None
            try:
                history = store[name]
                if name not in known:
                    known[name] = archive.segments(name)
                for _ in push(archive, history, name, known[name]):
                    if select.select([end], [], [], 0)[0]:
                        return
            except RemusError as failure:
                error, pause = str(failure), _ANEW_S
            lag = _lag(history, name, known.get(name, []), error)
            if told.get(name) != lag:
                told[name] = lag
                tell(lag)


def _lag(history: History | None, name: str, known: list[Archived], error: str | None) -> Lag:
    """history: None if it cannot be opened, which `error` says"""
    left: list[Contents] = []
    try:
        left = [] if history is None else waiting(history, known)
    except (RemusError, OSError) as failure:
        error = error or str(failure)
    newest = max((one.epochs[-1] for one in known), default=None)
    return Lag(name, newest, len(left), sum(one.end for one in left), error)


def main() -> None:
    """Run the process."""
    os.nice(10)
    directory, url, *recipients = sys.argv[1:]

    def tell(lag: Lag) -> None:
        print(json.dumps(asdict(lag)), flush=True)

    archive = Archive(url, recipients=Path(recipients[0]) if recipients else None, create=True)
    keep_archiving(Store(Path(directory)), archive, sys.stdin.fileno(), tell)
    os._exit(0)  # Python's own end takes long where others want the processor


if __name__ == "__main__":
    main()
