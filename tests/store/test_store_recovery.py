"""What is there after a loss of power, of the index, of a segment: the newest whole checkpoint, and never less."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import streams as s
from store_support import Source, commit, cuts, fill, memory_at, sha

from remus_ckpt.errors import BadCheckpoint, Malformed, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import batches
from remus_ckpt.store import History, HistoryWriter, Retention, Store
from remus_ckpt.store.index import Index
from remus_ckpt.store.recovery import Recovery
from remus_ckpt.store.segments import Contents, Entry
from remus_ckpt.store.state import load_state
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.record import Position


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def epochs(history: History) -> list[int]:
    return [entry.epoch for entry in history.entries()]


def two_segments(store: Store, first: int = 3, second: int = 4) -> tuple[Path, Path, Source]:
    """A history of two segments, epochs counted through; the second was made by a compaction."""
    with store.writer("orders") as writer:
        source = fill(writer, first)
        writer.compact(wait=True)
        fill(writer, second, source)
        old, new = sorted((writer.directory / "segments").iterdir())
    return old, new, source


def forget_index(directory: Path) -> None:
    for path in directory.glob("index.sqlite*"):
        path.unlink()


# Power


@pytest.mark.slow
@pytest.mark.parametrize("with_index", [True, False])
def test_the_last_segment_cut_anywhere(store: Store, tmp_path: Path, with_index: bool) -> None:
    """At every 512 bytes and around each border of a checkpoint.

    With an index that knows of more, the cut is loss of what was durable: said loudly, and nothing is deleted. Without,
    it is a checkpoint that never was acknowledged.
    """
    _, new, _ = two_segments(store)
    entries = [entry for entry in store.history("orders").entries() if entry.segment == new.name]
    ends = [0, *(entry.end for entry in entries)]
    size = new.stat().st_size
    assert ends[-1] == size
    kept = tmp_path / "kept"
    for cut in cuts(size, ends):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(store.directory, kept)
        directory = kept / "orders"
        os.truncate(directory / "segments" / new.name, cut)
        if not with_index:
            forget_index(directory)
        # The base of the second segment is the last checkpoint of the first.
        newest = max([2, *(entry.epoch for entry in entries if entry.end <= cut)])
        is_damage = cut < (size if with_index else ends[1])
        assert Store(kept).history("orders").newest().epoch == newest  # type: ignore[union-attr]
        with Store(kept).writer("orders") as writer:
            assert writer.position is not None and writer.position.epoch == newest
            assert writer.memory is not None and writer.memory.tobytes() == memory_at(newest).tobytes()
            assert bool(writer.warnings) == is_damage, cut
            assert (writer.stream is None) == is_damage
            left = os.path.getsize(directory / "segments" / new.name)
            assert left == (cut if is_damage else max(end for end in ends if end <= cut))
            assert epochs(writer.history) == list(range(newest + 1))
            highest = newest
            if is_damage:
                highest = 6 if with_index else 2
            assert writer.highest_epoch == highest
            source = Source(position=_at(highest))
            writer.begin(full=True)
            commit(writer, source.checkpoint(), source.position)
            commit(writer, source.checkpoint(), source.position)
        with Store(kept).writer("orders") as writer:
            assert writer.position == source.position and writer.memory is not None
            assert writer.memory.tobytes() == memory_at(source.position.epoch).tobytes()


@pytest.mark.parametrize("with_index", [True, False])
def test_an_unfinished_checkpoint_is_cut_off(store: Store, with_index: bool) -> None:
    """What a primary's or our own death leaves: some bytes of a checkpoint behind the last one."""
    _, new, source = two_segments(store)
    data = source.checkpoint()
    size = new.stat().st_size
    for cut in [*range(1, len(data), 97), len(data) - 1]:
        with open(new, "ab") as file:
            file.write(data[:cut])
        if not with_index:
            forget_index(new.parents[1])
        assert store.history("orders").verify().unfinished_bytes == cut
        assert store.history("orders").verify().is_good
        with store.writer("orders") as writer:
            assert writer.warnings == [] and new.stat().st_size == size
            assert writer.position is not None and writer.position.epoch == 6 and writer.stream is not None
    with store.writer("orders") as writer:
        writer.begin(full=False)
        commit(writer, data, source.position)
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(7)


@pytest.mark.parametrize("is_torn", [True, False])
@pytest.mark.parametrize("with_index", [True, False])
def test_what_is_to_be_done_is_said_and_not_done(store: Store, tmp_path: Path, with_index: bool, is_torn: bool) -> None:
    """Recovery reads: what is to be cut off, written again and saved, it returns."""
    old, new, source = two_segments(store)
    data = source.checkpoint()
    with open(new, "ab") as file:
        file.write(data[:-10] if is_torn else data)
    directory = store.directory / "orders"
    indexed = Index(directory / "index.sqlite", new.parent).load() if with_index else {}
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    asked: list[tuple[str, int]] = []

    def fill_index(contents: Contents, *, end: int) -> None:
        asked.append((contents.name, end))
        contents.first = contents.last = Entry(Position(0, bytes(32)), None, contents.name, 0, end, 1, is_base=True)

    found = Recovery(
        directory,
        load_state(directory),
        indexed,
        limits=None,
        new_home=lambda: MappedFile(tmp_path / "image"),
        fill=fill_index,
    ).found()
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert asked == ([] if with_index else [(old.name, old.stat().st_size)])
    newest = found.newest
    assert newest is not None and newest.name == new.name
    assert (newest.is_cut, newest.is_sealed) == (is_torn, False)
    epoch = 6 if is_torn else 7
    assert newest.contents.epochs[-1] == found.highest_epoch == epoch
    assert newest.synced == (new.stat().st_size - len(data[:-10] if is_torn else data) if with_index else 0)
    assert memory_sha256(newest.restorer.memory) == sha(epoch)
    assert found.state == load_state(directory)
    newest.home.remove()


def test_a_checkpoint_that_is_durable_and_not_in_the_index(store: Store) -> None:
    """Death between the sync and the index: it was durable, so it is there."""
    _, new, source = two_segments(store)
    with open(new, "ab") as file:
        file.write(source.checkpoint())
    history = store.history("orders")
    assert epochs(history) == list(range(8)) and memory_sha256(history.restore().memory) == sha(7)
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.stream is not None and writer.warnings == []
        writer.begin(full=False)
        fill(writer, 1, source)
        assert epochs(writer.history) == list(range(9))


def test_what_a_death_leaves_lying_about_is_removed(store: Store) -> None:
    two_segments(store)
    directory = store.directory / "orders"
    for name in ("incoming-000007.partial", "compacted-000008.partial"):
        (directory / "segments" / name).write_bytes(b"half")
    (directory / "warm" / "memory-9.image").write_bytes(b"half")
    (directory / ".store.json.new").write_bytes(b"{")
    (directory / "warm" / ".taken-over-1.image.new").write_bytes(b"half")
    with store.writer("orders") as writer:
        assert writer.warnings == [] and writer.image is not None
        assert len(os.listdir(directory / "segments")) == 2
        assert {path.name for path in (directory / "warm").iterdir()} == {writer.image.name, "hand-over.spare"}
        assert not (directory / ".store.json.new").exists()
        assert writer.image.read_bytes() == memory_at(6).tobytes()


def test_a_new_name_whose_creator_died(tmp_path: Path) -> None:
    for step in ("mkdir", "segments", "lock"):
        directory = tmp_path / step
        directory.mkdir()
        if step != "mkdir":
            (directory / "segments").mkdir()
        if step == "lock":
            (directory / "lock").write_bytes(b"")
        with Store(tmp_path).writer(step) as writer:
            fill(writer, 1)
        assert epochs(Store(tmp_path).history(step)) == [0]


# The index

INDEX_FAULTS: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut to its head": lambda path: os.truncate(path, 100),
    "flipped": lambda path: path.write_bytes(_flip(path.read_bytes())),
    "another program's": lambda path: _sql(path, "PRAGMA user_version = 99"),
    "without tables": lambda path: _sql(path, "DROP TABLE checkpoints"),
    "without rows": lambda path: _sql(path, "DELETE FROM checkpoints"),
    "without the last rows": lambda path: _sql(path, "DELETE FROM checkpoints WHERE epoch > 4"),
    "without a row in the middle": lambda path: _sql(path, "DELETE FROM checkpoints WHERE epoch = 4"),
    "without a segment": lambda path: _sql(path, "DELETE FROM segments WHERE size IS NULL"),
    "wrong offsets": lambda path: _sql(path, 'UPDATE checkpoints SET "end" = "end" + 1, start = start + 1'),
    "names that are none": lambda path: _sql(path, "UPDATE segments SET name = name || 'x'"),
    "names of nothing": lambda path: _sql(path, "INSERT INTO segments VALUES ('../../x', 1, 'delta', 8, 4)"),
    "wrong types": lambda path: _sql(path, "UPDATE checkpoints SET digest = x'00'"),
    "an epoch beyond all others": lambda path: _sql(path, "UPDATE checkpoints SET epoch = epoch << 61 WHERE epoch = 6"),
    "epochs up to the last number": lambda path: _sql(
        path, f"UPDATE checkpoints SET epoch = {(1 << 63) - 1} WHERE start > 0 AND epoch IN (2, 6)"
    ),
    "other epochs": lambda path: _sql(path, "UPDATE checkpoints SET epoch = epoch + 100"),
    "wrong sizes": lambda path: _sql(path, "UPDATE segments SET size = 5"),
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
}


def _flip(data: bytes) -> bytes:
    return bytes(byte ^ 0x55 if number % 97 == 0 else byte for number, byte in enumerate(data))


def _sql(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute(statement)
    database.close()


@pytest.mark.parametrize("fault", INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_an_index_that_is_wrong_is_made_again(store: Store, fault: Callable[[Path], None]) -> None:
    _, _, source = two_segments(store)
    path = store.directory / "orders" / "index.sqlite"
    fault(path)
    history = store.history("orders")
    assert epochs(history) == list(range(7))
    assert history.survey().count == 7
    for epoch in range(7):
        assert memory_sha256(history.restore(epoch).memory) == sha(epoch)
    assert history.verify().newest is not None
    with store.writer("orders") as writer:
        if path.is_dir():
            assert len(writer.warnings) == 1
        else:
            assert writer.position == source.position
            assert writer.warnings == []
        writer.begin(full=False)
        fill(writer, 2, source)
        assert epochs(writer.history) == list(range(9))
    if not path.is_dir():
        database = sqlite3.connect(path)
        rows = database.execute("SELECT epoch FROM checkpoints ORDER BY segment, start").fetchall()
        database.close()
        assert [epoch for (epoch,) in rows] == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8]


def test_an_index_that_cannot_be_read_for_now_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost, only the index may know."""
    two_segments(store)
    path = store.directory / "orders" / "index.sqlite"
    index = Index(path, path.with_name("segments"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(StoreError, match=str(path)):
            index.load()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(index.load()) == 2

    def fail(*_: object, **options: object) -> sqlite3.Connection:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", fail)
        with pytest.raises(StoreError, match=str(path)):
            store.writer("orders")
    assert len(index.load()) == 2


def test_an_index_in_the_middle_of_a_change(store: Store, tmp_path: Path) -> None:
    """A loss of power has left the journal by which SQLite takes that back: who only reads may not do it."""
    _, _, source = two_segments(store)
    path = store.directory / "orders" / "index.sqlite"
    database = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = DELETE", "PRAGMA cache_size = 1", "BEGIN", "DELETE FROM checkpoints"):
        database.execute(statement)
    rows = ((f"{number:020}-900000.remus",) for number in range(5_000))
    database.executemany("INSERT INTO segments VALUES (?, NULL, 'delta', 8, 4)", rows)
    shutil.copytree(store.directory, tmp_path / "left")
    database.close()
    left = Store(tmp_path / "left")
    assert (left.directory / "orders" / "index.sqlite-journal").stat().st_size
    with left.writer("orders") as writer:
        assert writer.position == source.position and writer.warnings == []


def test_a_segment_that_is_not_looked_at_closely_and_says_nonsense(store: Store) -> None:
    """All rows of the newest few are counted; of the others the edges are believed, if they can be."""
    with store.writer("orders") as writer:
        for _ in range(6):
            source = fill(writer, 3)
    _sql(writer.directory / "index.sqlite", f"UPDATE checkpoints SET epoch = {(1 << 63) - 1} WHERE epoch = 2")
    assert writer.history.survey().count == 18
    with store.writer("orders") as writer:
        assert (writer.highest_epoch, writer.position) == (17, source.position)
        fill(writer, 1)


# Damage


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_bad_checkpoint_in_the_newest_segment(store: Store, with_index: bool) -> None:
    """It is named; the newest good one before it is in force; nothing is deleted; only a full copy can follow."""
    _, new, _ = two_segments(store)
    entries = {entry.epoch: entry for entry in store.history("orders").entries() if entry.segment == new.name}
    size = new.stat().st_size
    if not with_index:
        forget_index(new.parents[1])
    kept = store.directory.with_name("kept")
    store.directory.rename(kept)
    for epoch in (2, 4, 6):
        for at in range(entries[epoch].start, entries[epoch].end, 29 if epoch > 2 else 5003):
            shutil.rmtree(store.directory, ignore_errors=True)
            shutil.copytree(kept, store.directory)
            damage(new, at)
            report = store.history("orders").verify()
            good = epoch - 1 if epoch > 2 else 2
            assert report.newest is not None and report.newest.epoch == good
            # Without an index, a length in the last one that was flipped makes it look like one that never came whole.
            hidden = not with_index and epoch == 6 and report.is_good
            if not hidden:
                (bad,) = report.bad
                assert (bad.segment, bad.epoch, bad.good) == (new.name, epoch, good), at
                assert entries[epoch].start <= bad.byte <= size
                if with_index:
                    assert bad.unreachable == range(max(epoch, 3), 7)
            with store.writer("orders") as writer:
                assert writer.position is not None and writer.position.epoch == good
                assert writer.memory is not None and memory_sha256(writer.memory) == sha(good)
                if hidden:
                    assert new.stat().st_size == entries[5].end
                    continue
                assert writer.stream is None and len(writer.warnings) == 1 and new.name in writer.state.damaged
                assert new.stat().st_size == size
                assert not with_index or writer.highest_epoch == 6
                with pytest.raises(StoreError):
                    writer.begin(full=False)


def test_going_on_after_damage(store: Store) -> None:
    _, new, _ = two_segments(store)
    entries = store.history("orders").entries()
    damage(new, entries[4].start + 40)
    with store.writer("orders") as writer:
        assert writer.position is not None and writer.position.epoch == 3 and writer.highest_epoch == 6
        # What the primary takes for the position before: higher than all that was seen.
        source = Source(position=_at(6))
        writer.begin(full=True)
        for _ in range(3):
            commit(writer, source.checkpoint(), source.position)
        assert writer.stream is not None
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.stream is not None
        assert len(writer.warnings) == 1 and new.name in writer.state.damaged
        assert epochs(writer.history) == [0, 1, 2, 3, 7, 8, 9]
        for epoch in (0, 3, 7, 9):
            assert memory_sha256(writer.history.restore(epoch).memory) == sha(epoch)
        with pytest.raises(BadCheckpoint):
            writer.history.restore(5)
        (bad,) = writer.history.verify().bad
        assert (bad.epoch, bad.good) == (4, 3)


def _at(epoch: int) -> Position:
    return Position(epoch, bytes(32))


def test_restoring_what_has_changed_names_it_and_offers_another(store: Store, tmp_path: Path) -> None:
    """The index still names it: the bytes are found to be bad when they are read."""
    _, new, _ = two_segments(store)
    entries = store.history("orders").entries()
    damage(new, entries[5].start + 40)
    history = store.history("orders")
    for use in (
        history.restore,
        lambda at: history.restore_image(tmp_path / "image", at),
        lambda at: history.export(tmp_path / "stream", at),
    ):
        for at in (5, 6, None):
            with pytest.raises(BadCheckpoint) as caught:
                use(at)
            assert (caught.value.segment, caught.value.epoch, caught.value.good) == (new.name, 5, 4)
            assert caught.value.offset is not None and entries[5].start <= caught.value.offset <= entries[5].end
            assert caught.value.exit_code == 20
        assert use(4) is not None
    damage(new, 0)
    with pytest.raises(BadCheckpoint) as caught:
        history.restore(4)
    assert caught.value.good == 2
    # The base of the new segment is gone, but the checkpoint stands in the old one too.
    assert memory_sha256(history.restore(2).memory) == sha(2)
    assert sorted(os.listdir(tmp_path)) == ["image", "store", "stream"]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_bad_old_segment(store: Store, with_index: bool) -> None:
    old, _, source = two_segments(store)
    damage(old, store.history("orders").entries()[1].start + 20)
    if not with_index:
        forget_index(old.parents[1])
    with store.writer("orders") as writer:
        # Of an old segment the index is believed; who wants to know asks `verify`.
        assert bool(writer.warnings) == (not with_index)
        assert writer.position == source.position and writer.stream is not None
        writer.begin(full=False)
        fill(writer, 1, source)
        (bad,) = writer.history.verify().bad
        assert (bad.segment, bad.epoch, bad.good) == (old.name, 1, 0)
        assert bad.unreachable == range(1, 2)


@pytest.mark.parametrize("with_index", [True, False])
def test_an_old_segment_that_is_empty(store: Store, with_index: bool) -> None:
    """A segment has its name only since it held a checkpoint."""
    with store.writer("orders") as writer:
        for _ in range(3):
            fill(writer, 2)
    segments = sorted((writer.directory / "segments").iterdir())
    os.truncate(segments[0], 0)
    if not with_index:
        (writer.directory / "index.sqlite").unlink()
    with store.writer("orders") as writer:
        assert list(writer.state.damaged) == [segments[0].name] and len(writer.warnings) == 1


def test_a_pipe_in_the_place_of_a_segment(store: Store) -> None:
    """Nobody waits for somebody to write to it."""
    with store.writer("orders") as writer:
        for _ in range(3):
            fill(writer, 2)
    segment = min((writer.directory / "segments").iterdir())
    segment.unlink()
    os.mkfifo(segment, 0o600)
    assert [list(lost.epochs) for lost in writer.history.lost()] == [[0, 1]]
    assert not writer.history.verify().is_good
    with pytest.raises(StoreError, match=segment.name):
        store.writer("orders")


def test_the_newest_segment_gone(store: Store) -> None:
    _, new, _ = two_segments(store)
    new.unlink()
    assert epochs(store.history("orders")) == [0, 1, 2]
    with store.writer("orders") as writer:
        assert writer.position is not None and writer.position.epoch == 2
        assert len(writer.warnings) == 1 and writer.stream is None and writer.highest_epoch == 6
    with store.writer("orders") as writer:
        assert writer.highest_epoch == 6 and writer.stream is None


def test_one_in_the_middle_gone(store: Store) -> None:
    """It is named until those before it have been pruned, or it comes back."""
    _, new, source = two_segments(store)
    with store.writer("orders") as writer:
        writer.compact(wait=True)
        writer.begin(full=False)
        fill(writer, 1, source)
    data = new.read_bytes()
    new.unlink()
    for warnings in (1, 0):
        with store.writer("orders") as writer:
            assert len(writer.warnings) == warnings and writer.position == source.position
            assert writer.stream is not None and list(writer.state.damaged) == [new.name]
        assert [one.segment for one in store.history("orders").verify().bad] == [new.name]
    new.write_bytes(data)
    with store.writer("orders") as writer:
        assert writer.state.damaged == {} and epochs(writer.history) == list(range(8))
    assert store.history("orders").verify().is_good
    new.unlink()
    with store.writer("orders") as writer:
        assert new.name in writer.state.damaged
        assert len(writer.prune(Retention(count=1))) == 1
        assert writer.state.damaged == {} and store.history("orders").verify().is_good


def test_an_old_segment_gone_is_a_pruned_one(store: Store) -> None:
    old, _, source = two_segments(store)
    old.unlink()
    assert epochs(store.history("orders")) == [2, 3, 4, 5, 6]
    with store.writer("orders") as writer:
        assert writer.warnings == [] and writer.position == source.position and writer.stream is not None


# store.json

STATE_FAULTS: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(300)),
    "cut": lambda path: os.truncate(path, 20),
    "a list": lambda path: path.write_text("[1]"),
    "later format": lambda path: _change(path, format=2),
    "no format": lambda path: _change(path, format=None),
    "term of text": lambda path: _change(path, term="1"),
    "negative term": lambda path: _change(path, term=-1),
    "huge term": lambda path: _change(path, term=1 << 63),
    "term that is true": lambda path: _change(path, term=True),
    "term that is no integer": lambda path: _change(path, term=1.0),
    "number without end": lambda path: path.write_text('{"format": 1, "term": ' + "9" * 5000 + "}"),
    "huge epoch": lambda path: _change(path, highest_epoch=1 << 63),
    "negative epoch": lambda path: _change(path, highest_epoch=-1),
    "not a number": lambda path: _change(path, since=float("nan")),
    "infinity": lambda path: _change(path, since=float("inf")),
    "overflow": lambda path: path.write_text(path.read_text().replace('"term": 0', '"term": 0, "since": 1e999')),
    "role": lambda path: _change(path, role="boss"),
    "role of a list": lambda path: _change(path, role=["standby"]),
    "damaged list": lambda path: _change(path, damaged=["x"]),
    "damaged by numbers": lambda path: _change(path, damaged={"x": 1}),
    "expects_primary of text": lambda path: _change(path, expects_primary="false"),
    "expects_primary of a number": lambda path: _change(path, expects_primary=0),
    "takeover_done of text": lambda path: _change(path, takeover_done="no"),
    "fencing of text": lambda path: _change(path, fencing="1"),
    "handed_out of text": lambda path: _change(path, handed_out="here"),
    "handed_out without boot": lambda path: _change(path, handed_out={"position": "x"}),
    "nested": lambda path: _change(path, since=json.loads("[" * 100 + "]" * 100)),
    "a folder": lambda path: (path.rename(path.with_name("kept")), path.mkdir())[0],
    "deep": lambda path: path.write_text("[" * 100_000),
    "large": lambda path: path.write_text("{}" + " " * (2 << 20)),
}


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("fault", STATE_FAULTS.values(), ids=STATE_FAULTS)
def test_a_state_that_cannot_be_read(store: Store, fault: Callable[[Path], object]) -> None:
    old, new, _ = two_segments(store)
    sizes = old.stat().st_size, new.stat().st_size
    path = store.directory / "orders" / "store.json"
    good = path.read_bytes()
    fault(path)
    with pytest.raises(StoreError):
        store.history("orders")
    with pytest.raises(StoreError):
        store.writer("orders")
    assert (old.stat().st_size, new.stat().st_size) == sizes
    if path.is_dir():
        path.rmdir()
    path.write_bytes(good)
    assert epochs(store.history("orders")) == list(range(7))


def test_a_segment_of_another_shape_is_not_taken_for_ours(store: Store) -> None:
    """Somebody has put a foreign stream among the segments."""
    _, new, source = two_segments(store)
    (new.parent / "00000000000000000009-000009.remus").write_bytes(s.small_hvm(8))
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.stream is None and len(writer.warnings) == 1
    assert epochs(store.history("orders")) == list(range(7))


def test_a_limit_that_is_too_low_is_no_damage(store: Store) -> None:
    _, _, source = two_segments(store)
    with pytest.raises(StoreError):
        store.writer("orders", limits=Limits(memory_bytes=4096))
    with store.writer("orders") as writer:
        assert writer.warnings == [] and writer.position == source.position and writer.stream is not None


def test_a_segment_that_is_put_right_is_damaged_no_more(store: Store) -> None:
    _, new, source = two_segments(store)
    before = new.read_bytes()
    damage(new, store.history("orders").entries()[5].start + 40)
    with store.writer("orders") as writer:
        assert new.name in writer.state.damaged and writer.stream is None
    new.write_bytes(before)
    with store.writer("orders") as writer:
        assert writer.state.damaged == {} and writer.warnings == []
        assert writer.position == source.position and writer.stream is not None
        writer.begin(full=False)
        fill(writer, 1, source)


def test_writers_that_come_and_go(store: Store) -> None:
    source: Source | None = None
    for number in range(6):
        writer: HistoryWriter = store.writer("orders")
        if source is None:
            source = fill(writer, 1)
        else:
            writer.begin(full=False)
            fill(writer, 2, source)
            if number % 2:
                writer.compact(wait=True)
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(source.position.epoch)
        assert writer.warnings == []
        writer.close()
        writer.close()
    assert epochs(store.history("orders")) == list(range(11))


def test_malformed_is_no_store_error() -> None:
    """Callers tell the peer's fault from the disk's by the type."""
    assert issubclass(BadCheckpoint, Malformed) and not issubclass(BadCheckpoint, StoreError)


@pytest.mark.parametrize("whose", ["another's", "its own", "its own next"])
def test_memory_that_holds_a_save_stream(store: Store, whose: str) -> None:
    """A page that holds a record, in a checkpoint that never came to its end, does not make that one that was whole.

    Only the record of the very next one does: then it is that one's first bytes that are bad.
    """
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        held = source.checkpoint()
        commit(writer, held, source.position)
    (segment,) = (store.directory / "orders" / "segments").iterdir()
    size = segment.stat().st_size
    if whose == "another's":
        held = Source(position=Position(10, bytes(32))).checkpoint()
    elif whose == "its own next":
        held = Source(position=source.position).checkpoint()
    record = held[held.index(b"RemusDeviceModelState") :]
    page = np.random.default_rng(1).integers(1, 256, 4096, dtype=np.uint8)
    page[: len(record)] = np.frombuffer(record, dtype=np.uint8)
    groups = source.sender.checkpoint(batches(np.array([40]), page.reshape(1, -1)))
    data = b"".join(bytes(buffer) for group in groups for buffer in group)
    assert record in data
    with open(segment, "ab") as file:
        file.write(data[:-10])
    is_damage = whose == "its own next"
    assert store.history("orders").verify().is_good != is_damage
    with store.writer("orders") as writer:
        assert bool(writer.warnings) == is_damage and (writer.stream is None) == is_damage
        assert (segment.stat().st_size == size) != is_damage


def test_a_damaged_segment_keeps_no_memory(tmp_path: Path) -> None:
    """What is noted of its fault must not refer to the memory that was being read: a mapping keeps its descriptor."""
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 2)
    path = next((tmp_path / "orders" / "segments").iterdir())
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 200)
        file.write(bytes(200))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        with Store(tmp_path).writer("orders") as writer:
            assert writer.warnings
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
