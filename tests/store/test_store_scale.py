"""A history of years: opening, listing, pruning and finding take no more memory, and no more time than its segments."""

from __future__ import annotations

import itertools
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from store_support import Source, commit, fill, sha

from remus_ckpt.errors import BadCheckpoint, Malformed, NoCheckpoint, RemusError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import HistoryWriter, Retention, Store
from remus_ckpt.store.index import read_index

EACH, BYTES = 20_000, 450
BEGAN_NS = 1_700_000_000 * 10**9
STEP_NS = 25_000_000
MIB = 1 << 20


def make_long(store: Store, rows: int) -> None:
    """A history whose index knows of so many checkpoints, in sparse files of the right size, and a real one behind."""
    writer = store.writer("n")
    segments = writer.directory / "segments"
    (segments / f"{rows - EACH:020}-{rows // EACH - 1:06}.remus").touch()
    sender = Sender(8, first_epoch=rows)
    memory = np.ones((8, 4096), dtype=np.uint8)
    writer.begin(full=True)
    scan = batches(np.arange(8), memory)
    groups = sender.checkpoint(scan, time_ns=BEGAN_NS + rows * STEP_NS)
    data = b"".join(bytes(buffer) for group in groups for buffer in group)
    assert sender.position is not None
    commit(writer, data, sender.position)
    writer.close()
    digest = bytes(32)
    with closing(sqlite3.connect(writer.directory / "index.sqlite")) as database, database:
        for number in range(rows // EACH):
            first = number * EACH
            name = f"{first:020}-{number:06}.remus"
            with open(segments / name, "wb") as file:
                file.truncate(EACH * BYTES)
            database.execute("INSERT OR REPLACE INTO segments VALUES (?,?,?,?,?)", (name, EACH * BYTES, "delta", 8, 8))
            database.executemany(
                "INSERT INTO checkpoints VALUES (?,?,?,?,?,?,?)",
                (
                    (name, i * BYTES, (i + 1) * BYTES, first + i, digest, BEGAN_NS + (first + i) * STEP_NS, 1)
                    for i in range(EACH)
                ),
            )


def memory_peak(reset: bool = False) -> int:
    """The most bytes that this process has had resident since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def at(epoch: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=(BEGAN_NS + epoch * STEP_NS) // 1000 + 1)


def test_a_long_history(tmp_path: Path) -> None:
    rows = many(60_000, 1_000_000)
    make_long(Store(tmp_path), rows)
    before = memory_peak(reset=True)
    with Store(tmp_path).writer("n") as writer:
        assert writer.warnings == [] and writer.position is not None and writer.position.epoch == rows
        history = writer.history
        survey = history.survey()
        assert survey.count == rows + 1 and survey.lost == ()
        assert writer.prune(Retention(bytes=1 << 50, count=rows + 1, age_s=1e9)) == []
        for epoch in (0, 1, EACH - 1, EACH, rows // 2 + 7, rows - 1, rows):
            assert history.find(epoch).epoch == history.find(at(epoch)).epoch == epoch
        newest = [entry.epoch for entry in itertools.islice(history.checkpoints(newest_first=True), 5)]
        assert newest == list(range(rows, rows - 5, -1))
        assert sum(1 for _ in history.checkpoints()) == rows + 1
        assert history.restore().epoch == rows
        assert len(writer.prune(Retention(count=2 * EACH))) == rows // EACH - 2
        assert history.survey().count == 2 * EACH + 1
    assert memory_peak() - before < 32 * MIB


def test_listing_a_long_history_holds_none_of_it(tmp_path: Path) -> None:
    rows = many(40_000, 100_000)
    make_long(Store(tmp_path), rows)
    code = (
        "import resource, sys; from remus_ckpt.cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for which in (["--last", "1"], ["--checkpoints"]):
        words = [sys.executable, "-c", code, "list", f"store:{tmp_path}/n", "--json", *which]
        done = subprocess.run(words, capture_output=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) * 1024)
    listed = [row["epoch"] for row in json.loads(done.stdout)["entries"]]
    assert listed == list(range(rows + 1))
    assert peaks[1] - peaks[0] < 16 * MIB


# Many segments


def make_many(store: Store, segments: int) -> None:
    """A history whose index knows of so many segments of a checkpoint each, and a real one behind."""
    before = f"{0:020}-{segments - 1:06}.remus"
    with store.writer("n") as writer:
        folder = writer.directory / "segments"
        (folder / before).touch()
        sender = Sender(8, first_epoch=segments)
        writer.begin(full=True)
        groups = sender.checkpoint(batches(np.arange(8), np.ones((8, 4096), dtype=np.uint8)))
        data = b"".join(bytes(buffer) for group in groups for buffer in group)
        assert sender.position is not None
        commit(writer, data, sender.position)
    (folder / before).unlink()
    with closing(sqlite3.connect(writer.directory / "index.sqlite")) as database, database:
        database.execute("DELETE FROM segments WHERE name = ?", (before,))
        for number in range(segments):
            name = f"{number:020}-{number:06}.remus"
            (folder / name).write_bytes(b"x")
            database.execute("INSERT INTO segments VALUES (?, 1, 'delta', 8, 8)", (name,))
            row = (name, number, bytes(32), number)
            database.execute("INSERT INTO checkpoints VALUES (?, 0, 1, ?, ?, ?, 1)", row)


def test_many_segments_are_pruned_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those who wait for the lock, none waits for all of them; and a sync is shared."""
    make_many(Store(tmp_path), 200)
    syncs: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        syncs.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)

    def count(writer: HistoryWriter) -> int:
        return len(os.listdir(writer.directory / "segments"))

    with Store(tmp_path).writer("n", retention=Retention(count=1)) as writer:
        assert count(writer) == 201
        source = fill(writer, 1)
        left = [count(writer)]
        while left[-1] > 1:
            fill(writer, 1, source)
            left.append(count(writer))
            assert 0 < left[-2] - left[-1] <= 20
        assert writer.history.verify().is_good and writer.warnings == []
    make_many(Store(tmp_path / "other"), 200)
    with Store(tmp_path / "other").writer("n") as writer:
        syncs.clear()
        assert len(writer.prune(Retention(count=1))) == 200
        assert count(writer) == 1 and syncs.count("segments") <= 20


def test_others_go_on_while_many_segments_are_pruned(tmp_path: Path) -> None:
    make_many(Store(tmp_path), 200)
    pruned, seen = [0], []

    def go_on() -> None:
        writer.set_state(term=1)
        seen.append(pruned[0])

    other = threading.Thread(target=go_on)

    def on_phase(phase: str, epoch: int) -> None:
        pruned[0] += phase == "pruning"
        if pruned[0] == 1:
            other.start()

    with Store(tmp_path).writer("n", on_phase=on_phase) as writer:
        assert len(writer.prune(Retention(count=1))) == 200
        other.join()
    assert seen[0] < 200


# An index that cannot be written


def rows_of(writer: HistoryWriter) -> list[int]:
    with closing(sqlite3.connect(writer.directory / "index.sqlite")) as database, suppress(sqlite3.Error):
        return [epoch for (epoch,) in database.execute("SELECT epoch FROM checkpoints ORDER BY segment, start")]
    return []


def test_an_index_that_cannot_be_written_for_long(tmp_path: Path) -> None:
    """What waits for it is bounded; when it can be written again, what is missing is read back from the segments."""
    with Store(tmp_path).writer("n", compact_bytes=None) as writer:
        source = fill(writer, 2)
        with closing(sqlite3.connect(writer.directory / "index.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            fill(writer, 1_200, source)
            assert len(writer._index._waiting) < 600  # what it holds is to be seen nowhere else
            assert len(writer.warnings) == 1
            assert [entry.epoch for entry in writer.history.entries()] == list(range(1_202))
        writer.compact(wait=True)  # another segment: now there is time for the one before
        fill(writer, 1, source)
        wait_until(lambda: rows_of(writer) == [*range(1_202), 1_201, 1_202])
        fill(writer, 1, source)
        names = [path.name for path in sorted((writer.directory / "segments").iterdir())]
        assert list(read_index(writer.directory / "index.sqlite") or {}) == names
    with Store(tmp_path).writer("n") as writer:
        assert writer.warnings == [] and writer.history.verify().is_good


def test_an_index_that_can_be_written_again_without_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[object] = []
    connect = sqlite3.connect

    def counted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        attempts.append(arguments)
        return connect(*arguments, **options)

    with Store(tmp_path).writer("n", compact_bytes=None) as writer:
        source = fill(writer, 2)
        with closing(sqlite3.connect(writer.directory / "index.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            fill(writer, 1_200, source)
            writer.compact(wait=True)
            monkeypatch.setattr(sqlite3, "connect", counted)  # each attempt to write makes its own
            wait_until(lambda: len(attempts) >= 2)
            monkeypatch.undo()
        wait_until(lambda: rows_of(writer)[:1_202] == [*range(1_202)])  # of the segment that has come to its end


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("fault", [overwrite, Path.unlink])
def test_an_index_that_is_damaged_meanwhile(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    with Store(tmp_path).writer("n", compact_bytes=None) as writer:
        source = fill(writer, 5)
        writer.compact(wait=True)
        fill(writer, 5, source)
        for path in writer.directory.glob("index.sqlite*"):
            fault(path)
        fill(writer, 5, source)
        assert [entry.epoch for entry in writer.history.entries()] == list(range(15))
        writer.compact(wait=True)
        fill(writer, 1, source)
        wait_until(lambda: rows_of(writer) == [*range(5), *range(4, 15), 14, 15])
    with Store(tmp_path).writer("n") as writer:
        assert writer.warnings == []


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


# What a peer says, and what stands in the files


@pytest.mark.parametrize("time_ns", [1 << 63, (1 << 64) - 1])
def test_a_time_that_no_store_can_keep(tmp_path: Path, time_ns: int) -> None:
    """It is refused before it is stored; one that an earlier program stored stops nothing."""
    source = Sender(8)
    memory = np.ones((8, 4096), dtype=np.uint8)
    groups = source.checkpoint(batches(np.arange(8), memory), time_ns=time_ns)
    data = b"".join(bytes(buffer) for group in groups for buffer in group)
    assert source.position is not None
    with Store(tmp_path).writer("n") as writer:
        writer.begin(full=True)
        writer.feed(data)
        with pytest.raises(Malformed):
            writer.check(source.position)
    (tmp_path / "n" / "segments" / f"{0:020}-000000.remus").write_bytes(data)
    for _ in range(2):
        with Store(tmp_path).writer("n") as writer:
            assert writer.position == source.position and writer.warnings == []
            (entry,) = writer.history.entries()
            assert entry.time_ns is None and writer.history.find().epoch == 0
            with pytest.raises(NoCheckpoint):
                writer.history.find(datetime.now(UTC))
            assert writer.prune(Retention(age_s=1)) == []


EDGES = [-(1 << 63), -1, 0, 1, 1 << 62, (1 << 63) - 1]


@pytest.mark.parametrize("time_ns", EDGES[:: many(5, 1)])
def test_the_times_that_can_be_kept(tmp_path: Path, time_ns: int) -> None:
    with Store(tmp_path).writer("n") as writer:
        sender = Sender(8)
        writer.begin(full=True)
        groups = sender.checkpoint(batches(np.arange(8), np.ones((8, 4096), np.uint8)), time_ns=time_ns)
        data = b"".join(bytes(buffer) for group in groups for buffer in group)
        assert sender.position is not None
        commit(writer, data, sender.position)
        assert writer.warnings == [] and [entry.time_ns for entry in writer.history.entries()] == [time_ns]
    words = [sys.executable, "-m", "remus_ckpt", "list", f"store:{tmp_path}/n", "--checkpoints"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("seed", range(many(12, 60)))
def test_any_bytes_in_the_index_and_in_segments(tmp_path: Path, seed: int) -> None:
    """Only our own errors come out of a store whose files hold anything, and what is whole is given back right."""
    with Store(tmp_path).writer("n") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 4, source)
    dice = random.Random(seed)
    directory = tmp_path / "n"
    files = [directory / "index.sqlite"] if seed % 3 else sorted((directory / "segments").iterdir())
    for path in files:
        data = bytearray(path.read_bytes())
        for _ in range(dice.choice((1, 5, 40))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data if dice.random() < 0.8 else data[: dice.randrange(len(data))])
    if seed % 3 == 1:
        with closing(sqlite3.connect(directory / "index.sqlite")) as database, suppress(sqlite3.Error), database:
            column = dice.choice(("start", '"end"', "epoch", "digest", "time_ns", "pages", "segment"))
            value = dice.choice((-1, 1 << 62, b"", 7))
            database.execute(f"UPDATE checkpoints SET {column} = ? WHERE epoch = ?", (value, dice.randrange(8)))
    history = Store(tmp_path).history("n")
    for use in (history.entries, history.survey, history.verify, history.newest, history.lost):
        with suppress(RemusError):
            use()
    for asked in (None, *range(9), datetime.now(UTC), datetime.fromtimestamp(3, UTC)):
        with suppress(RemusError):
            found = history.restore(asked)
            assert memory_sha256(found.memory) == sha(found.epoch)
    with suppress(RemusError), Store(tmp_path).writer("n") as writer:
        writer.prune(Retention(count=3, age_s=1, bytes=10_000))
        if seed % 3:  # the index alone was changed
            assert writer.position == source.position and writer.stream is not None
            assert writer.history.verify().newest is not None


# What is missing


def three_segments(store: Store) -> list[Path]:
    """Epochs 0 to 4, 5 to 9 and 10 to 14, each begun with a full copy."""
    with store.writer("n") as writer:
        for _ in range(3):
            fill(writer, 5)
        return sorted((writer.directory / "segments").iterdir())


@pytest.mark.parametrize("looked", [False, True])
def test_a_segment_that_is_missing_without_an_index(tmp_path: Path, looked: bool) -> None:
    """looked: a writer has made the index again."""
    names = three_segments(Store(tmp_path))
    names[1].unlink()
    for path in (tmp_path / "n").glob("index.sqlite*"):
        path.unlink()
    if looked:
        with Store(tmp_path).writer("n") as writer:
            assert any("5 to 9" in warning for warning in writer.warnings)
    history = Store(tmp_path).history("n")
    (lost,) = history.lost()
    assert (lost.segment, lost.epochs) == (names[2].name, range(5, 10))
    (bad,) = history.verify().bad
    assert (bad.segment, bad.epoch, bad.good, bad.unreachable) == (names[2].name, 5, 4, range(5, 10))
    for asked in (5, 9, datetime.fromtimestamp(7, UTC)):
        with pytest.raises(BadCheckpoint) as caught:
            history.find(asked)
        assert caught.value.good == 4
    assert history.find().epoch == 14 and history.find(datetime.fromtimestamp(4, UTC)).epoch == 4


@pytest.mark.parametrize("gone", [[0], [0, 1]])
def test_the_oldest_that_are_missing_were_pruned(tmp_path: Path, gone: list[int]) -> None:
    names = three_segments(Store(tmp_path))
    for number in gone:
        names[number].unlink()
    for path in (tmp_path / "n").glob("index.sqlite*"):
        path.unlink()
    history = Store(tmp_path).history("n")
    assert history.lost() == [] and history.verify().is_good


def test_a_full_copy_behind_what_was_lost_shows_the_gap(tmp_path: Path) -> None:
    """A base that follows no position, above all that was seen: what is between was durable."""
    names = three_segments(Store(tmp_path))
    os.truncate(names[2], Store(tmp_path).history("n").find(12).end)
    with Store(tmp_path).writer("n") as writer:
        assert writer.highest_epoch == 14
        source = Source(first_epoch=15)
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
    for path in (tmp_path / "n").glob("index.sqlite*"):
        path.unlink()
    assert [one.epochs for one in Store(tmp_path).history("n").lost()] == [range(13, 15)]
    assert [one.unreachable for one in Store(tmp_path).history("n").verify().bad] == [range(13, 15)]


def test_the_newest_that_was_lost_is_not_passed_over(tmp_path: Path) -> None:
    names = three_segments(Store(tmp_path))
    names[2].unlink()
    history = Store(tmp_path).history("n")
    with pytest.raises(BadCheckpoint) as caught:
        history.find()
    assert (caught.value.epoch, caught.value.good) == (10, 9)
    with Store(tmp_path).writer("n"):
        pass
    # The index does not name it any more; that there was more is still known.
    with pytest.raises(BadCheckpoint) as caught:
        history.find()
    assert caught.value.good == 9
