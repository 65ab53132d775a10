"""Compaction and pruning: what they keep, and what goes on beside them."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from store_support import PAGES, Source, commit, epochs, files, fill, memory_at, sha

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import NoCheckpoint, StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, PageBatch, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, HistoryWriter, Removal, Retention, Store, compaction
from remus_ckpt.store.index import read_index
from remus_ckpt.store.segments import Contents
from remus_ckpt.store.survey import Surveyor


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# Compaction


def test_compaction_while_checkpoints_come(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 5)
        for _ in range(4):
            writer.compact()
            while writer.compacting:
                fill(writer, 1, source)
        fill(writer, 3, source)
        last = source.position.epoch
        history = writer.history
        assert len(files(history)) == 5
        assert epochs(history) == list(range(last + 1))
        assert history.verify().is_good
        for entry in history.entries():
            assert memory_sha256(history.restore(entry.epoch).memory) == sha(entry.epoch)
    for path in (writer.directory / "segments").iterdir():  # closed: the newest has no space ahead any more
        for one in read_checkpoints(path, strict=True):
            assert memory_sha256(one.memory) == sha(one.epoch) and one.device_state == b"dev%d" % one.epoch
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.memory is not None
        writer.begin(full=False)
        fill(writer, 2, source)
        assert memory_sha256(writer.memory) == sha(last + 2)


def test_positions_survive_compaction(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        before = [entry.position for entry in writer.history.entries()]
        writer.compact(wait=True)
        assert [entry.position for entry in writer.history.entries()] == before
        assert writer.history.entries()[-1].is_base
        assert writer.position == source.position


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_first_copy_holds_twice_counts_towards_a_compaction(store: Store, times: int) -> None:
    seen: list[str] = []
    source = Source()
    pfns = np.tile(np.arange(PAGES), times)
    groups = source.sender.checkpoint(batches(pfns, memory_at(0)[pfns]), device_state=b"dev0", time_ns=0)
    base = b"".join(bytes(buffer) for group in groups for buffer in group)
    with store.writer("orders", compact_bytes=0, on_phase=lambda phase, epoch: seen.append(phase)) as writer:
        writer.begin(full=True)
        commit(writer, base, source.position)
        while writer.compacting:
            fill(writer, 1, source)
        assert ("compacting" in seen) == (times == 2)
        assert memory_sha256(writer.history.restore().memory) == sha(source.position.epoch)


def test_compaction_begins_by_itself(store: Store) -> None:
    seen: list[str] = []
    options: dict[str, Any] = {"on_phase": lambda phase, epoch: seen.append(phase), "retention": Retention(count=3)}
    with store.writer("orders", compact_bytes=None, compact_checkpoints=1, **options) as writer:
        fill(writer, 30)
        assert "compacting" not in seen
    with store.writer("others", compact_checkpoints=10, **options) as writer:
        source = fill(writer, 11)
        while seen.count("compacted") < 2 or writer.compacting:
            fill(writer, 1, source)
        # What is kept reaches back three checkpoints at least, and no further than a segment.
        last = source.position.epoch
        assert epochs(writer.history)[-3:] == [last - 2, last - 1, last]
        assert len(files(writer.history)) <= 2 and "pruning" in seen
        assert memory_sha256(writer.history.restore(last - 2).memory) == sha(last - 2)


def test_a_compaction_that_fails_is_not_tried_again_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may write all of memory before it fails."""
    begun: list[int] = []

    def note(phase: str, epoch: int) -> None:
        if phase == "compacting":
            begun.append(epoch)

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.writer("orders", compact_checkpoints=10, on_phase=note) as writer:
        source = fill(writer, 10)
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "write_all", fail)
            for _ in range(20):
                fill(writer, 1, source)
                while writer.compacting:
                    time.sleep(0.001)
        assert begun == [10, 21]
        # A new base has nothing to do with that.
        source = fill(writer, 11)
        assert begun[2:] == [source.position.epoch]


def test_a_new_base_ends_a_compaction(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        for _ in range(5):
            writer.compact()
            source = Source(position=writer.position)
            writer.begin(full=True)
            commit(writer, source.checkpoint(), source.position)
            fill(writer, 1, source)
        assert memory_sha256(writer.history.restore().memory) == sha(source.position.epoch)
    with store.writer("orders") as writer:
        assert not any(".partial" in name for name in files(writer.history))


def test_a_compaction_that_waits_for_its_close(store: Store) -> None:
    """In the middle of a checkpoint it cannot be closed; the next boundary does that, or a new base ends it."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        data = source.checkpoint()
        writer.feed(data[:100])
        writer.compact(wait=True)
        assert writer.compacting and len(files(writer.history)) == 2
        writer.feed(data[100:])
        writer.check(source.position)
        writer.store()
        writer.apply()
        assert not writer.compacting and writer.history.entries()[-1].is_base
        writer.feed(source.checkpoint()[:100])
        writer.compact(wait=True)
        assert writer.compacting
        source = Source(position=writer.position)
        writer.begin(full=True)
        assert not writer.compacting
        commit(writer, source.checkpoint(), source.position)
        fill(writer, 1, source)
        assert memory_sha256(writer.history.restore().memory) == sha(source.position.epoch)
        assert [entry.is_base for entry in writer.history.entries()] == [True, False, False, True, True, False]
        writer.compact(wait=True)
        writer.feed(source.checkpoint()[:100])
        writer.compact(wait=True)
    with store.writer("orders") as writer:
        assert writer.position is not None and writer.memory is not None
        assert memory_sha256(writer.memory) == sha(writer.position.epoch)


def test_page_tables_and_blanked_pages_survive_compaction(store: Store) -> None:
    """Pages that become zeros while a compaction runs must be written as zeros."""
    sender = Sender(8)
    memory = np.full((8, PAGE_SIZE), 9, dtype=np.uint8)

    def send(writer: HistoryWriter, pfns: list[int], kind: int = 0) -> None:
        numbers = np.array(pfns, dtype=np.uint64)
        batch = PageBatch(numbers, np.full(len(pfns), kind, dtype=np.uint8), memory[pfns].copy())
        data = b"".join(bytes(b) for g in sender.checkpoint([batch]) for b in g)
        assert sender.position is not None
        commit(writer, data, sender.position)

    with store.writer("orders") as writer:
        writer.begin(full=True)
        send(writer, list(range(8)))
        for number in range(8):
            writer.compact()
            memory[number] = 0
            send(writer, [number], kind=1)
            while writer.compacting:
                send(writer, [(number + 1) % 8])
            assert writer.history.restore().memory.tobytes() == memory.tobytes()


# Retention


def names_of(removals: list[Removal]) -> list[str]:
    return [one.contents.name for one in removals]


def stamped(store: Store, name: str, bases: int) -> HistoryWriter:
    """A history of segments with two checkpoints each, taken at the second of their epoch."""
    writer = store.writer(name)
    for _ in range(bases):
        fill(writer, 2)
    return writer


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), 5),
        (Retention(count=1), 1),
        (Retention(count=2), 1),
        (Retention(count=3), 2),
        (Retention(count=100), 5),
        (Retention(age_s=5), 3),
        (Retention(age_s=0), 1),
        (Retention(bytes=0), 1),
        (Retention(bytes=1 << 40), 5),
        (Retention(count=7, age_s=3), 2),
    ],
)
def test_retention(store: Store, retention: Retention, left: int) -> None:
    with stamped(store, "orders", 5) as writer:
        names = files(writer.history)
        # The newest checkpoint, 9, was taken at 9 s; now it is 10 s.
        removed = writer.prune(retention, now_ns=10 * 10**9)
        assert names_of(removed) == names[: 5 - left] and files(writer.history) == names[5 - left :]
        indexed = read_index(writer.directory / "index.sqlite")
        assert indexed is not None and sorted(indexed) == names[5 - left :]
        assert epochs(writer.history) == list(range(10 - 2 * left, 10))
        assert memory_sha256(writer.history.restore().memory) == sha(9)
    with store.writer("orders") as writer:
        assert writer.warnings == [] and writer.position is not None and writer.position.epoch == 9


def test_retention_by_size_keeps_what_fits(store: Store) -> None:
    with stamped(store, "orders", 4) as writer:
        sizes = [path.stat().st_size for path in sorted((writer.directory / "segments").iterdir())]
        assert len(writer.prune(Retention(bytes=sizes[-1] + sizes[-2]))) == 2
        assert len(writer.prune(Retention(bytes=sizes[-1] + sizes[-2] - 1))) == 1


def test_a_segment_that_is_being_read_may_be_pruned(store: Store) -> None:
    with stamped(store, "orders", 2) as writer:
        history = writer.history
        entry = history.find(0)
        writer.prune(Retention(count=1))
        with pytest.raises(NoCheckpoint):
            history.restore(entry.epoch)


def test_order_of_what_reaches_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """specs/store.md §6.1: a kill cannot show that a sync is missing, so what is asked of the system is watched."""
    asked: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any) -> Any:
            subject = arguments[0]
            path = os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else str(subject)
            if "/segments" in path:
                kind = "directory" if path.endswith("/segments") else "partial" if ".partial" in path else "segment"
                asked.append(f"{name} {kind}")
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)

    with store.writer("orders", on_phase=lambda phase, epoch: asked.append(phase)) as writer:
        for name in ("writev", "fdatasync", "fsync", "rename", "ftruncate", "pwrite"):
            watch(name)
        source = Source()
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
        base = ["writev partial", "staged", "fdatasync partial", "rename partial", "fsync directory", "stored"]
        assert asked == [*base, "applying", "applied"]
        asked.clear()
        commit(writer, source.checkpoint(), source.position)
        assert asked == ["writev segment", "staged", "fdatasync segment", "stored", "applying", "applied"]
        asked.clear()
        writer.feed(b"\1\0\0")
        writer.abandon()
        assert asked == ["writev segment", "ftruncate segment", "fdatasync segment"]
        asked.clear()
        writer.compact(wait=True)
        assert asked[-4:] == ["fdatasync partial", "rename partial", "fsync directory", "compacted"]
        assert set(asked[:-4]) == {"compacting", "writev partial", "fdatasync partial"}
        assert asked[-5] == "writev partial"
        asked.clear()
        writer.prune(Retention(count=1))
        assert asked == ["pruning", "fsync directory"]


def test_a_checkpoint_whose_segment_is_pruned_before_it_is_opened(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction has put it into another one first: it is read from there."""
    with store.writer("m") as writer:
        source = fill(writer, 6)
        history = store.history("m")
        entry = history.find(5)
        writer.compact(wait=True)
        assert names_of(writer.prune(Retention(count=1))) == [entry.segment]
        with monkeypatch.context() as patch:
            patch.setattr(History, "find", lambda *_: entry)
            assert memory_sha256(history.restore(5).image) == sha(5)
        fill(writer, 1, source)
        before = history.find(6)
        fill(writer, 1, source)
        writer.compact(wait=True)
        writer.prune(Retention(count=1))
        monkeypatch.setattr(History, "find", lambda *_: before)
        with pytest.raises(NoCheckpoint):
            history.restore(6)


def test_what_is_pruned_while_it_is_looked_at_is_not_lost(store: Store) -> None:
    """The first segment has been looked at; it and the next are gone before the next is."""

    class Slow(Surveyor):
        def look_at(self, name: str, known: Contents | None) -> Contents:
            if name == names[1]:
                assert names_of(writer.prune(Retention(count=1))) == names[:2]
            return super().look_at(name, known)

    with store.writer("m") as writer:
        source = fill(writer, 3)
        for _ in range(2):
            writer.compact(wait=True)
            fill(writer, 3, source)
        names = files(writer.history)
        survey = Slow(writer.directory, None).survey()
        assert [one.name for one in survey.contents] == [names[0], names[2]] and survey.lost == ()
        assert files(writer.history) == names[2:]


def test_a_reader_beside_a_busy_writer_sees_no_loss(store: Store) -> None:
    """Checkpoints, compactions and pruning all the time; the readers begin and end where they like."""
    problems: list[object] = []
    newest: list[int] = []

    def write(writer: HistoryWriter) -> None:
        source = fill(writer, 1)
        for number in range(many(130, 400)):
            if number % 60 == 59:
                source = Source(position=writer.position)
                writer.begin(full=True)
            data = source.checkpoint()
            commit(writer, data, source.position, step=len(data) // 2)
            if number % 7 == 0:
                writer.compact()
            if number % 11 == 0:
                writer.prune(Retention(count=20))
        problems.extend(writer.warnings)

    with store.writer("m") as writer:
        thread = threading.Thread(target=write, args=(writer,))
        thread.start()
        while thread.is_alive():
            history = store.history("m")
            survey = history.survey()
            problems += survey.lost
            newest += [survey.newest.epoch] if survey.newest else []
            if len(newest) % 10 == 0:
                problems += history.verify().bad
        thread.join()
    assert problems == []
    assert newest == sorted(newest) and len(set(newest)) > 5


def test_where_nothing_is_to_go_nothing_is_looked_at(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of all checkpoints of a year is long, and no commit goes on meanwhile."""
    with store.writer("m", retention=Retention()) as writer:
        fill(writer, 3)
        monkeypatch.setattr(History, "contents", lambda self: pytest.fail("it was read"))
        writer.compact(wait=True)
        assert writer.prune(Retention()) == []
        assert not writer.compacting


def test_a_compacted_segment_that_may_come_back_after_a_loss_of_power(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was taken back, and nobody knows what the disk has of that: behind it, nothing older may grow."""
    with store.writer("m") as writer:
        source = fill(writer, 3)

        def fail(path: Path) -> None:
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr("remus_ckpt.store.chain.sync_directory", fail)
        writer.compact(wait=True)
        assert writer.stream is None
        assert not writer.compacting
        with pytest.raises(StoreError):
            writer.begin(full=False)
        monkeypatch.undo()
        assert fill(writer, 1).position.epoch == source.position.epoch + 1


def test_a_compaction_that_dies_of_what_nobody_thought_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has failed like any other, and the next is not kept from its place."""
    with store.writer("m") as writer:
        source = fill(writer, 3)

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(os, "open", fail)
        writer.compact(wait=True)
        assert not writer.compacting
        assert writer.warnings
        monkeypatch.undo()
        writer.compact(wait=True)
        fill(writer, 1, source)
        assert store.history("m").contents()[-1].epochs == range(2, 4)
