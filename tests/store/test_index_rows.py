"""Rows of the index that contradict each other: what is given comes from the segments, and is right."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from store_support import Source, commit, fill, sha

from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import Store

CONTRADICTIONS = {
    "an epoch twice": "UPDATE checkpoints SET epoch = 3 WHERE epoch = 4",
    "an epoch passed over": "UPDATE checkpoints SET epoch = 6 WHERE epoch = 4",
    "a hole in the bytes": "UPDATE checkpoints SET start = start + 8 WHERE epoch = 4",
    "a segment of less than nothing": "UPDATE segments SET size = -1",
    "memory of no pages": "UPDATE segments SET p2m_size = 0",
    "memory of too many pages": "UPDATE segments SET p2m_size = 1 << 60",
    "another coding": "UPDATE segments SET codec = 'none'",
    "another word": "UPDATE segments SET word = 5",
}


@pytest.mark.parametrize("statement", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_is_not_believed(tmp_path: Path, statement: str) -> None:
    store, source = Store(tmp_path / "store"), Source()
    with store.writer("orders") as writer:
        writer.begin(full=True)
        for _ in range(8):
            commit(writer, source.checkpoint(), source.position)
    path = store.directory / "orders" / "index.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)
    history = store.history("orders")
    assert [entry.epoch for entry in history.checkpoints()] == list(range(8))
    assert [entry.epoch for entry in history.checkpoints(newest_first=True)] == list(reversed(range(8)))
    assert history.find(4).epoch == 4
    for epoch in (3, 4, 5, 7):
        assert memory_sha256(history.restore(epoch).memory) == sha(epoch)
    with store.writer("orders") as writer:
        assert writer.position == source.position
        writer.begin(full=False)
        commit(writer, source.checkpoint(), source.position)
    assert [entry.epoch for entry in store.history("orders").checkpoints()] == list(range(9))


ALTERED = ("epoch = epoch - 1", "epoch = epoch + 1", "epoch = epoch + 8", "epoch = 2", "start = start + 8")


@pytest.mark.parametrize("altered", ALTERED)
def test_no_question_is_answered_from_an_altered_row(tmp_path: Path, altered: str) -> None:
    """Of two segments, epochs 0 to 4 and 4 to 9, any row: the first and the last ones too."""
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 5)
        writer.compact(wait=True)
        fill(writer, 5, source)
    expected = [entry.position for entry in store.history("orders").entries()]
    path = store.directory / "orders" / "index.sqlite"
    index = path.read_bytes()
    for number in range(10):
        path.write_bytes(index)
        with closing(sqlite3.connect(path)) as database, database:
            rows = database.execute("SELECT segment, start FROM checkpoints ORDER BY segment, start").fetchall()
            database.execute(f"UPDATE checkpoints SET {altered} WHERE segment = ? AND start = ?", rows[number])
        history = store.history("orders")
        assert [history.find(epoch).position for epoch in range(10)] == expected
        assert [history.find(datetime.fromtimestamp(epoch, UTC)).position for epoch in range(10)] == expected
        assert (history.find().position, history.lost()) == (expected[-1], [])
        assert [entry.position for entry in history.checkpoints()] == expected


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_list_reads_the_index_and_no_segment(tmp_path: Path, newest_first: bool) -> None:
    """It would take time by the size of the history."""
    store, source = Store(tmp_path / "store"), Source()
    with store.writer("orders") as writer:
        writer.begin(full=True)
        for _ in range(8):
            commit(writer, source.checkpoint(), source.position)
    (segment,) = (store.directory / "orders" / "segments").iterdir()
    segment.write_bytes(bytes(segment.stat().st_size))
    found = [entry.epoch for entry in store.history("orders").checkpoints(newest_first=newest_first)]
    assert found == sorted(range(8), reverse=newest_first)
    assert store.history("orders").verify().newest is None
