"""Histories that retention thins: what it promises can be restored, and what it removed is not called lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from power import Power
from store_support import Source, commit, fill, sha
from test_store_interrupts import Lines, attempts

from remus_ckpt.errors import BadCheckpoint, NoCheckpoint, StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, HistoryWriter, Retention, Store, pruning
from remus_ckpt.store.segments import list_segments
from remus_ckpt.store.state import load_state

HOUR = 3600
EACH = 4
"""Checkpoints in an hour."""


class Clock:
    """The primary's: it has reached the present after so many hours of checkpoints."""

    def __init__(self, hours: int) -> None:
        self.now_s = (int(time.time()) // HOUR - hours) * HOUR

    def tick(self) -> int:
        """Let a quarter of an hour pass; returns nanoseconds."""
        self.now_s += HOUR // EACH
        return self.now_s * 10**9


def run(writer: HistoryWriter, hours: int, *, until_full: int = 3, clock: Clock | None = None) -> Source:
    """Hours of checkpoints, with a compaction after every third."""
    clock = clock or Clock(hours)
    source = Source(position=writer.position)
    writer.begin(full=True)
    for number in range(hours * EACH):
        commit(writer, source.checkpoint(clock.tick()), source.position)
        if number % until_full == until_full - 1:
            writer.compact(wait=True)
    return source


def hour_of(time_ns: int | None) -> int:
    assert time_ns is not None
    return time_ns // (HOUR * 10**9)


def first_epochs(history: History) -> dict[int, int]:
    """Hour → its first checkpoint."""
    found: dict[int, int] = {}
    for entry in history.checkpoints():
        found.setdefault(hour_of(entry.time_ns), entry.epoch)
    return found


def can_be_restored(history: History, epochs: list[int]) -> None:
    for epoch in epochs:
        assert memory_sha256(history.restore(epoch).memory) == sha(epoch)


def is_sound(store: Store) -> None:
    """Nothing is missing for anyone who looks, with the index and without it."""
    for _ in range(2):
        history = store.history("orders")
        assert history.lost() == [] and history.verify().is_good
        with store.writer("orders") as writer:
            assert writer.warnings == [] and writer.state.damaged == {}
            assert writer.stream is not None
        for path in history.directory.glob("index.sqlite*"):
            path.unlink()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_the_promised_checkpoints_are_there(store: Store) -> None:
    retention = Retention(hourly=6, daily=2)
    with store.writer("orders", compact_bytes=None) as writer:
        source = run(writer, 40)
        firsts = first_epochs(writer.history)
        days: dict[int, int] = {}
        for hour, epoch in firsts.items():
            days.setdefault(hour // 24, epoch)
        before = list_segments(writer.directory)
        planned = writer.history.prunable(retention)
        assert list_segments(writer.directory) == before and "pruned" not in load_state(writer.directory).more
        removed = writer.prune(retention)
        assert removed == planned and len(removed) > 40
        left = list_segments(writer.directory)
        assert left == [name for name in before if name not in {one.contents.name for one in removed}]
        assert sum(one.bytes for one in removed) > 0 and {one.rule for one in removed} == {"tiers"}
        history = writer.history
        there = {entry.epoch for entry in history.checkpoints()}
        promised = [*sorted(firsts.values())[-6:], *sorted(days.values())[-2:]]
        assert set(promised) <= there
        can_be_restored(history, [*promised, source.position.epoch])
        gone = next(epoch for epoch in range(max(promised)) if epoch not in there and epoch > min(there))
        with pytest.raises(NoCheckpoint):
            history.restore(gone)
        # By its time, the last one that is left.
        at = datetime.fromtimestamp(Clock(40).now_s + (gone + 1) * HOUR // EACH, UTC)
        assert history.find(at).epoch == max(epoch for epoch in there if epoch < gone)
        assert writer.prune(retention) == []
        writer.begin(full=False)
        commit(writer, source.checkpoint(), source.position)
    is_sound(store)


def test_a_running_writer_keeps_them_by_itself(store: Store) -> None:
    """Whatever the hour, it has the last few, and few more segments than those."""
    clock = Clock(30)
    promised: dict[int, int] = {}
    with store.writer("orders", compact_bytes=None, retention=Retention(hourly=5)) as writer:
        source = Source()
        writer.begin(full=True)
        for number in range(30 * EACH):
            commit(writer, source.checkpoint(clock.tick()), source.position)
            promised.setdefault(clock.now_s // HOUR, source.position.epoch)
            if number % 3 == 2:
                writer.compact(wait=True)
                there = {entry.epoch for entry in writer.history.checkpoints()}
                assert set(list(promised.values())[-5:]) <= there
                assert len(list_segments(writer.directory)) <= 5 + 2
        can_be_restored(writer.history, list(promised.values())[-5:])
    assert len(load_state(writer.directory).pruned) <= 5 + 2
    is_sound(store)


def thinned(store: Store) -> list[str]:
    """A history with gaps; the names of its segments."""
    with store.writer("orders", compact_bytes=None) as writer:
        run(writer, 20, until_full=2)
        writer.prune(Retention(hourly=5))
        return list_segments(writer.directory)


def test_a_segment_lost_between_two_gaps(store: Store) -> None:
    """Only what it held is called lost."""
    names = thinned(store)
    history = store.history("orders")
    held = history.contents()[2]
    (history.directory / "segments" / names[2]).unlink()
    for with_index in (True, False):
        assert [(one.segment, one.epochs) for one in history.lost() if with_index] == [
            (names[2], range(held.epochs[0], held.epochs[-1] + 1))
        ][: int(with_index)]
        lost = {epoch for one in history.lost() for epoch in one.epochs}
        assert lost == set(held.epochs)
        with pytest.raises(BadCheckpoint):
            history.find(held.epochs[0])
        with pytest.raises(NoCheckpoint):
            history.find(held.epochs[0] - 1)
        for path in history.directory.glob("index.sqlite*"):
            path.unlink()
    with store.writer("orders") as writer:
        assert len(writer.warnings) == 1 and writer.stream is not None


def test_an_index_from_before(store: Store, tmp_path: Path) -> None:
    """It needs no sync: after a loss of power it may name all that has been removed."""
    with store.writer("orders", compact_bytes=None) as writer:
        run(writer, 20, until_full=2)
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in writer.directory.glob("index.sqlite*"):
        shutil.copy(path, kept)
    with store.writer("orders", compact_bytes=None) as writer:
        assert writer.prune(Retention(hourly=5))
    for path in writer.directory.glob("index.sqlite*"):
        path.unlink()
    for path in kept.iterdir():
        shutil.copy(path, writer.directory)
    is_sound(store)


def test_a_reader_beside_a_writer_that_thins(store: Store) -> None:
    """Whatever goes between two looks at the segments, nothing seems lost."""
    problems: list[object] = []
    looks = 0

    def write(writer: HistoryWriter) -> None:
        run(writer, many(40, 150), until_full=2)
        problems.extend(writer.warnings)

    with store.writer("orders", compact_bytes=None, retention=Retention(hourly=3, daily=3)) as writer:
        thread = threading.Thread(target=write, args=(writer,))
        thread.start()
        while thread.is_alive():
            problems += store.history("orders").lost()
            looks += 1
        thread.join()
    assert problems == [] and looks > 5
    is_sound(store)


def test_gaps_go_with_what_is_before_them(store: Store) -> None:
    thinned(store)
    with store.writer("orders") as writer:
        assert len(writer.state.pruned) >= 4
        writer.prune(Retention(count=1))
        assert "pruned" not in writer.state.more
    is_sound(store)


def test_a_damaged_segment_that_goes_is_no_longer_named(store: Store) -> None:
    with store.writer("orders", compact_bytes=None) as writer:
        run(writer, 10, until_full=2)
        going = writer.history.prunable(Retention(hourly=4))
    damaged = writer.directory / "segments" / going[-1].contents.name
    damaged.write_bytes(damaged.read_bytes()[:-5])
    for path in writer.directory.glob("index.sqlite*"):
        path.unlink()
    with store.writer("orders", compact_bytes=None) as writer:
        assert list(writer.state.damaged) == [damaged.name]
        assert damaged.name in {one.contents.name for one in writer.prune(Retention(hourly=4))}
        assert writer.state.damaged == {}
    # What was lost with its end stays lost: retention removed what there was of it, no more.
    assert {epoch for one in store.history("orders").lost() for epoch in one.epochs} <= set(going[-1].contents.epochs)


def test_power_lost_while_segments_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step the index is that of before, and whatever is promised is there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    store = Store(disk / "store")
    retention = Retention(hourly=4, daily=2)
    with store.writer("orders", compact_bytes=None) as writer:
        source = run(writer, 26, until_full=2)
        going = {one.contents.name for one in writer.history.prunable(retention)}
        promised = sorted(first_epochs(writer.history).values())[-4:]
    power, count = Power(monkeypatch, disk), itertools.count()
    left: list[int] = []

    def look() -> None:
        lost = Store(power.lose(tmp_path / f"lost-{next(count)}") / "store")
        with monkeypatch.context() as patch:
            for name in ("fsync", "fdatasync", "write", "writev", "pwrite", "ftruncate"):
                patch.setattr(os, name, REAL[name])
            left.append(len(list_segments(lost.directory / "orders")))
            history = lost.history("orders")
            assert history.lost() == [] and history.verify().is_good
            can_be_restored(history, [*promised, source.position.epoch])
            with lost.writer("orders", compact_bytes=None) as again:
                assert again.warnings == [] and again.position == source.position
                again.prune(retention)
            assert not going & set(list_segments(lost.directory / "orders"))
            is_sound(lost)

    writer = store.writer("orders", compact_bytes=None)
    power.write_back()
    power.on_step = look
    assert {one.contents.name for one in writer.prune(retention)} == going
    power.on_step = lambda: None
    writer.close()
    assert len(set(left)) >= 3, "there was more than one batch"


def test_thinning_interrupted_at_every_line(tmp_path: Path) -> None:
    """As by Ctrl-C: nothing seems lost, and the next one does the rest."""
    retention = Retention(hourly=2)
    template = Store(tmp_path / "template")
    with template.writer("orders", compact_bytes=None) as writer:
        source = run(writer, 5, until_full=4)
        promised = sorted(first_epochs(writer.history).values())[-2:]

    def interrupt(lines: Lines) -> None:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(template.directory, tmp_path / "store")
        store = Store(tmp_path / "store")
        writer = store.writer("orders", compact_bytes=None)
        lines(lambda: writer.prune(retention))
        writer.close()
        history = store.history("orders")
        assert history.lost() == [] and history.verify().is_good
        with store.writer("orders", compact_bytes=None) as writer:
            assert writer.warnings == [] and writer.position == source.position
            writer.prune(retention)
            assert len(list_segments(writer.directory)) <= 4 and writer.history.lost() == []
            can_be_restored(writer.history, promised)

    attempts(interrupt)


REAL = {name: getattr(os, name) for name in ("fsync", "fdatasync", "write", "writev", "pwrite", "ftruncate")}


# Room


class Disk:
    """A file system of which so many bytes are free, without what segments take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size = size
        self.asked = 0
        monkeypatch.setattr(pruning, "free_bytes", self._free)

    def _free(self, directory: Path) -> int:
        self.asked += 1
        return self.size - sum(path.stat().st_size for path in directory.iterdir())


def test_room_is_kept_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a checkpoint, without a compaction; and what others take counts."""
    disk = Disk(monkeypatch, 1 << 30)
    floor = 1 << 20
    with store.writer("orders", compact_bytes=None, retention=Retention(free=floor)) as writer:
        source = run(writer, 10, until_full=2)
        names = list_segments(writer.directory)
        sizes = [(writer.directory / "segments" / name).stat().st_size for name in names]
        assert len(names) == 21
        disk.size = floor + sum(sizes[3:]) + 1
        planned = writer.history.prunable(Retention(free=floor))
        assert [one.contents.name for one in planned] == names[:3] and {one.rule for one in planned} == {"free"}
        commit(writer, source.checkpoint(), source.position)
        assert list_segments(writer.directory) in (names[3:], names[4:])  # the checkpoint took room too
        disk.size = 0
        while len(list_segments(writer.directory)) > 1:
            before = len(list_segments(writer.directory))
            commit(writer, source.checkpoint(), source.position)
            assert len(list_segments(writer.directory)) < before
        commit(writer, source.checkpoint(), source.position)
        can_be_restored(writer.history, [source.position.epoch])
        assert list_segments(writer.directory) == names[-1:] and writer.warnings == []


def test_room_is_made_before_a_stream_begins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full admits no checkpoint, so there would never be one to prune after."""
    disk = Disk(monkeypatch, 1 << 30)
    with store.writer("orders", compact_bytes=None, retention=Retention(free=1 << 20)) as writer:
        run(writer, 3, until_full=2)
        disk.size = 0
        writer.begin(full=False)
        assert len(list_segments(writer.directory)) == 1


def test_a_file_system_that_frees_late(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was removed is not free yet: no more goes for that, or all would be gone within a second."""
    monkeypatch.setattr(pruning, "free_bytes", lambda directory: 0)
    with store.writer("orders", compact_bytes=None) as writer:
        run(writer, 5, until_full=2)
        names = list_segments(writer.directory)
        floor = sum((writer.directory / "segments" / name).stat().st_size for name in names[:2])
    with store.writer("orders", compact_bytes=None, retention=Retention(free=floor)) as writer:
        source = Source(position=writer.position)
        writer.begin(full=True)
        for _ in range(5):
            commit(writer, source.checkpoint(), source.position)
        writer.compact(wait=True)
        assert list_segments(writer.directory)[:-2] == names[2:]


@pytest.mark.root
def test_a_small_disk_is_never_full(tmp_path: Path) -> None:
    """Two names write three times what it has room for; then somebody else takes all that is left."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mounted], check=True)
    try:
        store = Store(mounted / "store")
        noise = np.random.default_rng(1)
        options: dict[str, Any] = {"retention": Retention(free=4 << 20), "compact_bytes": None}
        with store.writer("orders", **options) as orders, store.writer("desk", **options) as desk:
            writers = {writer: Sender(128) for writer in (orders, desk)}
            for writer in writers:
                writer.begin(full=True)
            for number in range(100):
                for writer, sender in writers.items():
                    pfns = np.arange(64) if number else np.arange(128)
                    data = noise.integers(0, 256, (len(pfns), 4096), dtype=np.uint8)
                    stream = b"".join(map(bytes, itertools.chain(*sender.checkpoint(batches(pfns, data)))))
                    assert sender.position is not None
                    commit(writer, stream, sender.position)
                    if number % 4 == 3:
                        writer.compact(wait=True)
            assert orders.warnings == desk.warnings == []
            assert len(list_segments(orders.directory)) + len(list_segments(desk.directory)) > 3
            status = os.statvfs(mounted)
            with open(mounted / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
            assert pruning.free_bytes(mounted) == 0
            for writer in writers:
                writer.begin(full=False)
            assert pruning.free_bytes(mounted) >= 4 << 20
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


# What store.json says


@pytest.mark.parametrize(
    "pruned", [1, {}, [1], [[1]], [[1, 2, 3]], [[2, 1]], [[-1, 1]], [[1, 2], [2, 3]], [[5, 6], [1, 2]], [["1", 2]],
               [[1, 1 << 63]], [[True, 2]], [[1.0, 2]], [None], None],
)  # fmt: skip
def test_gaps_that_cannot_be(store: Store, pruned: object) -> None:
    with store.writer("orders") as writer:
        run(writer, 1)
    path = writer.directory / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pruned": pruned}))
    opened: list[Callable[[], object]] = [lambda: store.history("orders"), lambda: store.writer("orders")]
    for one in opened:
        with pytest.raises(StoreError):
            one()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pruned": [[1, 1], [2, 9]]}))
    store.history("orders")


@pytest.mark.parametrize("retention", [Retention(count=1), Retention(bytes=1), Retention(free=1 << 60)])
def test_what_the_commit_log_may_still_name_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch, retention: Retention
) -> None:
    """A primary dies behind a compaction, and the last position in the log is one before that."""
    monkeypatch.setattr(pruning, "MAX_WINDOW", 4)
    with store.writer("orders", compact_bytes=None, retention=retention) as writer:
        writer.set_state(log="a commit log")
        source = fill(writer, 6)
        logged = writer.position
        fill(writer, 4, source)
        writer.compact(wait=True)
        assert logged is not None
        assert store.history("orders").find(logged.epoch).position == logged
        assert len(list_segments(writer.directory)) == 2
        fill(writer, 4, source)
        assert len(list_segments(writer.directory)) == 1


def test_without_a_commit_log_it_goes(store: Store) -> None:
    with store.writer("orders", compact_bytes=None, retention=Retention(count=1)) as writer:
        fill(writer, 6)
        writer.compact(wait=True)
        assert len(list_segments(writer.directory)) == 1
