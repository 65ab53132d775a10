"""An exception from elsewhere between any two lines of the writer, as by Ctrl-C: never a wrong durable state."""

from __future__ import annotations

import itertools
import linecache
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import many
from store_support import Source, sha

import remus_ckpt
from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import HistoryWriter, Retention, Store, ahead
from remus_ckpt.store.state import load_state
from remus_ckpt.wire.record import Position

PACKAGE = Path(remus_ckpt.__file__).parent
ROOMS = (
    *("ahead", "chain", "compaction", "directory", "hand_over", "pruning", "recovery", "state", "unwritten", "warm"),
    "writer",
)
FOLLOWED = {str(PACKAGE / "store" / f"{name}.py") for name in ROOMS} | {
    str(PACKAGE / f"{name}.py") for name in ("disk", "restorer")
}
assert all(map(os.path.exists, FOLLOWED))
PAGES = 8
STREAM = Source(PAGES)
CHECKPOINTS = [(STREAM.checkpoint(), STREAM.position) for _ in range(10)]


class Interrupt(BaseException):
    """As KeyboardInterrupt."""


class Lines:
    """Runs something, and raises at its n-th line; None: only counts."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.seen: list[tuple[str, int]] = []
        self._lines: dict[FrameType, int] = {}
        self._tracer = self._trace  # kept alive: CPython 3.11 may call it after a raise in a `__del__` has let it go

    def __call__(self, work: Callable[[], object]) -> bool:
        """Whether it was interrupted, or ended in an error of ours because it was."""
        before = sys.gettrace()
        sys.settrace(self._tracer)
        try:
            work()
        except (Interrupt, RemusError):
            return True
        finally:
            sys.settrace(before)
            self._lines.clear()
        return False

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in FOLLOWED:
            return None
        if event == "line" and not self._is_nowhere(frame):
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.at:
                raise Interrupt
        return self._trace

    def _is_nowhere(self, frame: FrameType) -> bool:
        """A line that no signal comes at: `try:`, and a `with` again, between its last line and `__exit__`.

        An exception there would leave a lock held, and does not happen.
        """
        before, now = self._lines.get(frame, 0), frame.f_lineno
        self._lines[frame] = now
        text = linecache.getline(frame.f_code.co_filename, now).strip()
        return text == "try:" or (now < before and text.startswith("with "))


def receive(writer: HistoryWriter, data: bytes) -> None:
    """Half of it by each way."""
    writer.feed(data[:100])
    left = memoryview(data)[100:]
    while left:
        room = writer.get_buffer()
        size = min(len(room), len(left))
        room[:size] = left[:size]
        writer.buffer_updated(size)
        left = left[size:]


def begin(writer: HistoryWriter, *, full: bool = False) -> tuple[bytes, Position]:
    """The checkpoint that comes next, in the stream that goes on where it can, or as a new base."""
    for (_, position), after in itertools.pairwise(CHECKPOINTS):
        if not full and writer.stream is not None and writer.position == position:
            writer.begin(full=False)
            return after
    source = STREAM if writer.highest_epoch < 0 else Source(PAGES, position=Position(writer.highest_epoch, bytes(32)))
    writer.begin(full=True)
    return CHECKPOINTS[0] if source is STREAM else (source.checkpoint(), source.position)


def take(writer: HistoryWriter, told: list[int], *, full: bool = False) -> None:
    """One checkpoint, with all steps."""
    data, position = begin(writer, full=full)
    receive(writer, data)
    finish(writer, position, told)


def finish(writer: HistoryWriter, position: Position, told: list[int]) -> None:
    writer.check(position)
    told.append(writer.store().epoch)
    writer.apply()


Act = Callable[[HistoryWriter, list[int]], object]


def close_a_compaction(writer: HistoryWriter, told: list[int]) -> Act:
    """It is ready in the middle of a checkpoint, and so it is closed behind it."""
    data, position = begin(writer)
    writer.feed(data[:100])
    writer.compact(wait=True)
    writer.feed(data[100:])
    return lambda writer, told: finish(writer, position, told)


def abandon(writer: HistoryWriter, told: list[int], *, full: bool = False, steps: int = 0) -> Act:
    data, position = begin(writer, full=full)
    receive(writer, data[:-10] if not steps else data)
    if steps:
        writer.check(position)
    if steps > 1:
        told.append(writer.store().epoch)
    return lambda writer, told: writer.abandon()


def hand_out(writer: HistoryWriter, told: list[int]) -> None:
    writer.hand_out()


WORK: dict[str, Callable[[HistoryWriter, list[int]], Act]] = {
    "delta": lambda writer, told: take,
    "base": lambda writer, told: partial(take, full=True),
    "compact": lambda writer, told: lambda writer, told: writer.compact(wait=True),
    "close a compaction": close_a_compaction,
    "abandon a delta": abandon,
    "abandon a base": partial(abandon, full=True),
    "abandon what is checked": partial(abandon, steps=1),
    "abandon what is stored": partial(abandon, steps=2),
    "set_state": lambda writer, told: lambda writer, told: writer.set_state(term=1, role="promoted"),
    "prune": lambda writer, told: lambda writer, told: writer.prune(Retention(count=1)),
    "hand_out": lambda writer, told: hand_out,
    "close": lambda writer, told: lambda writer, told: writer.close(),
    "close in the middle": lambda writer, told: (abandon(writer, told), lambda writer, told: writer.close())[1],
}


@pytest.fixture(autouse=True)
def ahead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is written ahead from the first checkpoint on, in the thread that is interrupted."""
    monkeypatch.setattr(ahead, "WINDOW_S", 0.0)
    monkeypatch.setattr(ahead, "overwrites_in_place", lambda fd: True)
    monkeypatch.setattr(ahead, "start", lambda run: run())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Syncs cost nothing there."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def attempts(run: Callable[[Lines], None]) -> None:
    """Run it with an interrupt at its lines, the first time and the last that it comes there; with --all, at each."""
    lines = Lines(None)
    run(lines)
    assert len(lines.seen) > 20
    first = {line: number for number, line in reversed([*enumerate(lines.seen)])}
    last = {line: number for number, line in enumerate(lines.seen)}
    for at in sorted({*first.values(), *last.values()})[:: many(19, 1)]:
        run(Lines(at))


def make(folder: Path) -> tuple[Store, list[int]]:
    """Two segments, and checkpoints behind the second base."""
    store = Store(folder / "template")
    told: list[int] = []
    with store.writer("orders") as writer:
        for number in range(5):
            take(writer, told)
            if number == 2:
                writer.compact(wait=True)
    return store, told


def again(folder: Path, template: Store) -> Store:
    shutil.rmtree(folder / "store", ignore_errors=True)
    shutil.copytree(template.directory, folder / "store")
    return Store(folder / "store")


def examine(store: Store, told: list[int], is_pruned: bool = False) -> None:
    """All that was reported is there and right, and work goes on."""
    with store.writer("orders") as writer:
        assert writer.warnings == []
        history = writer.history
        assert writer.position is not None and writer.memory is not None
        assert writer.position.epoch >= told[-1]
        assert memory_sha256(writer.memory) == sha(writer.position.epoch, PAGES)
        there = [entry.epoch for entry in history.entries()]
        assert is_pruned or set(told) <= set(there)
        assert history.verify().is_good
        for epoch in {there[0], told[-1], there[-1]} & set(there):
            checkpoint = history.restore(epoch)
            assert memory_sha256(checkpoint.memory) == sha(epoch, PAGES)
            assert checkpoint.device_state == b"dev%d" % epoch
        take(writer, told)
        assert memory_sha256(writer.memory) == sha(told[-1], PAGES)


@pytest.mark.parametrize("work", WORK)
def test_interrupted_at_every_line(folder: Path, work: str) -> None:
    template, before = make(folder)

    def run(lines: Lines) -> None:
        store, told = again(folder, template), list(before)
        writer = store.writer("orders")
        act = WORK[work](writer, told)
        lines(lambda: act(writer, told))
        for image in (writer.directory / "warm").glob("taken-over-*.image"):
            image.write_bytes(b"survivor" * 512 * PAGES)  # whoever goes on from it writes to it
        try:
            if work != "close":
                assert writer.state == load_state(writer.directory)
            take(writer, told)
            writer.compact(wait=True)
            assert writer.memory is not None and memory_sha256(writer.memory) == sha(told[-1], PAGES)
        except StoreError:
            for refused in (writer.compact, writer.hand_out, lambda: writer.set_state(term=9)):
                with pytest.raises(StoreError):
                    refused()
        writer.close()
        examine(store, told, is_pruned=work == "prune")
        state = store.history("orders").state
        assert (state.term, state.role) in [(0, "standby"), *([(1, "promoted")] if work == "set_state" else ())]

    attempts(run)


def test_opening_interrupted_at_every_line(folder: Path) -> None:
    template, before = make(folder)

    def run(lines: Lines) -> None:
        store, told = again(folder, template), list(before)
        with open(sorted((store.directory / "orders" / "segments").iterdir())[-1], "ab") as file:
            file.write(CHECKPOINTS[5][0][:-10])
        opened: list[HistoryWriter] = []
        lines(lambda: opened.append(store.writer("orders")))
        for writer in opened:
            writer.close()
        examine(store, told)

    attempts(run)


def test_the_first_of_all_interrupted_at_every_line(folder: Path) -> None:
    def run(lines: Lines) -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        store, told = Store(folder / "store"), list[int]()
        opened: list[HistoryWriter] = []

        def work() -> None:
            opened.append(store.writer("orders"))
            take(opened[0], told)

        lines(work)
        for writer in opened:
            writer.close()
        with store.writer("orders") as writer:
            assert writer.warnings == []
            while len(told) < 2:
                take(writer, told)
        examine(store, told)

    attempts(run)
