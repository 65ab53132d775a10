"""The store: what is durable when, and what comes back."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from store_support import PAGES, Source, commit, epochs, files, fill, memory_at, sha

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import NoCheckpoint, StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import Shape, Store
from remus_ckpt.wire.record import Position


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_stored_comes_back(store: Store) -> None:
    with store.writer("orders") as writer:
        assert writer.position is None and writer.stream is None and writer.memory is None and writer.image is None
        source = fill(writer, 12)
        assert writer.position == source.position
        assert writer.stream == Shape("delta", 8, PAGES)
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(11)
        assert writer.image is not None and writer.image.read_bytes() == memory_at(11).tobytes()
        assert writer.in_force is not None and writer.in_force.device_state == b"dev11"
        assert writer.warnings == []
    history = store.history("orders")
    assert store.names() == ["orders"] and history.name == "orders"
    assert epochs(history) == list(range(12))
    assert [entry.is_base for entry in history.entries()] == [True] + [False] * 11
    for epoch in (0, 5, 11):
        restored = history.restore(epoch)
        assert memory_sha256(restored.memory) == sha(epoch) and restored.device_state == b"dev%d" % epoch
    assert memory_sha256(history.restore().memory) == sha(11)


def test_modes(store: Store) -> None:
    with store.writer("orders") as writer:
        fill(writer, 2)
        for path in writer.directory.rglob("*"):
            if path.is_dir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
            else:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
                path.chmod(0o644)
        assert len(list(writer.directory.glob("index.sqlite*"))) == 3
        assert stat.S_IMODE(writer.directory.stat().st_mode) == 0o700
        assert writer.image is not None
    # Those of an index that an earlier program made are put right.
    with store.writer("orders") as writer:
        for path in writer.directory.glob("index.sqlite*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "-a", "a" * 65, "a\n", "ä", "a b"])
def test_names(store: Store, name: str) -> None:
    for use in (store.writer, store.history):
        with pytest.raises(StoreError):
            use(name)
    assert not store.directory.exists()


def test_one_writer(store: Store) -> None:
    with store.writer("orders") as writer:
        fill(writer, 1)
        with pytest.raises(StoreError):
            store.writer("orders")
        assert epochs(store.history("orders")) == [0]
        with store.writer("others"):
            pass
    with store.writer("orders") as writer:
        assert writer.position is not None and writer.position.epoch == 0


def test_a_warm_directory_serves_one(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    with one.writer("orders", warm_directory=tmp_path / "warm") as writer:
        fill(writer, 1)
        assert writer.image is not None and writer.image.parent == tmp_path / "warm" / "orders"
        with pytest.raises(StoreError):
            other.writer("orders", warm_directory=tmp_path / "warm")
        assert writer.image.read_bytes() == memory_at(0).tobytes()
        with one.writer("others", warm_directory=tmp_path / "warm"):
            pass
    with other.writer("orders", warm_directory=tmp_path / "warm"):
        pass


def test_a_history_that_is_removed(store: Store, tmp_path: Path) -> None:
    warm = tmp_path / "warm" / "orders"
    writer = store.writer("orders", warm_directory=warm.parent)
    fill(writer, 1)
    writer.remove()
    assert store.names() == [] and not writer.directory.exists() and not warm.exists()
    with pytest.raises(StoreError):
        writer.remove()
    with store.writer("orders", warm_directory=warm.parent) as writer:
        assert writer.position is None
        (warm / "of another").touch()
        writer.remove()
    assert not writer.directory.exists() and [path.name for path in warm.iterdir()] == ["of another"]


@pytest.mark.parametrize("step", [1, 7, 100, 4096, None])
@pytest.mark.parametrize("in_place", [False, True])
def test_bytes_may_come_as_they_like(store: Store, step: int | None, in_place: bool) -> None:
    source = Source(pages=4)
    with store.writer("orders") as writer:
        writer.begin(full=True)
        for _ in range(3):
            data, at = source.checkpoint(), 0
            while at < len(data):
                size = min(step or len(data), len(data) - at)
                if in_place:
                    room = writer.get_buffer()
                    size = min(size, len(room))
                    room[:size] = data[at : at + size]
                    writer.buffer_updated(size)
                else:
                    writer.feed(data[at : at + size])
                at += size
            assert writer.check(source.position).epoch == source.position.epoch
            assert writer.store().position == source.position
            writer.apply()
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(2, 4)
    assert memory_sha256(store.history("orders").restore().memory) == sha(2, 4)


def test_the_segment_is_the_stream_that_came(store: Store) -> None:
    source, data = Source(), b""
    with store.writer("orders") as writer:
        writer.begin(full=True)
        for _ in range(4):
            data += (one := source.checkpoint())
            commit(writer, one, source.position)
        (name,) = files(writer.history)
        assert name == "00000000000000000000-000000.remus"
        assert (writer.directory / "segments" / name).read_bytes() == data


def test_durable_is_what_store_has_returned(store: Store) -> None:
    """Each step, and what a second pair of eyes sees at it."""
    seen: list[tuple[str, int]] = []
    with store.writer("orders", on_phase=lambda phase, epoch: seen.append((phase, epoch))) as writer:
        source = Source()
        writer.begin(full=True)
        writer.feed(source.checkpoint())
        history = store.history("orders")
        assert epochs(history) == [] and writer.position is None
        writer.check(source.position)
        assert epochs(history) == [] and [name[-8:] for name in files(history)] == [".partial"]
        entry = writer.store()
        assert history.newest() == entry and writer.position == source.position and writer.memory is None
        writer.apply()
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(0)
        held = writer.memory.tobytes()
        writer.feed(source.checkpoint())
        writer.check(source.position)
        assert writer.position.epoch == 0
        writer.store()
        assert writer.position.epoch == 1 and writer.memory.tobytes() == held
        assert memory_sha256(history.restore().memory) == sha(1)
        writer.apply()
        assert memory_sha256(writer.memory) == sha(1)
    assert seen == [(phase, epoch) for epoch in (0, 1) for phase in ("staged", "stored", "applying", "applied")]


def test_steps_out_of_order(store: Store) -> None:
    with store.writer("orders") as writer:
        for step in (lambda: writer.feed(b"x"), writer.get_buffer, writer.store, writer.apply, writer.compact):
            with pytest.raises(StoreError):
                step()
        with pytest.raises(StoreError):
            writer.begin(full=False)
        source = Source()
        with pytest.raises(StoreError):
            writer.check(Position(0, bytes(32)))
        writer.begin(full=True)
        writer.feed(source.checkpoint())
        with pytest.raises(StoreError):
            writer.apply()
        writer.check(source.position)
        writer.store()
        for step in (lambda: writer.feed(b"x"), writer.get_buffer, writer.store):
            with pytest.raises(StoreError):
                step()
        writer.apply()
        fill(writer, 1, source)
        assert epochs(writer.history) == [0, 1]


# What is dropped


def test_abandon_at_every_step(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        data = source.checkpoint()
        size = os.path.getsize(writer.directory / "segments" / files(writer.history)[0])
        for cut in (1, 100, len(data) // 2, len(data) - 1, len(data)):
            writer.begin(full=False)
            writer.feed(data[:cut])
            writer.abandon()
            assert writer.position is not None and writer.position.epoch == 2
            assert os.path.getsize(writer.directory / "segments" / files(writer.history)[0]) == size
            assert writer.memory is not None and memory_sha256(writer.memory) == sha(2)
        writer.begin(full=False)
        writer.feed(data)
        writer.check(source.position)
        writer.abandon()
        assert epochs(writer.history) == [0, 1, 2]
        writer.begin(full=False)
        writer.feed(data)
        writer.check(source.position)
        writer.store()
        writer.abandon()  # it is durable: it stays, and is applied
        assert epochs(writer.history) == [0, 1, 2, 3] and memory_sha256(writer.memory) == sha(3)
        writer.begin(full=False)
        fill(writer, 2, source)
    assert memory_sha256(store.history("orders").restore().memory) == sha(5)


def test_begin_drops_what_was_begun(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        writer.feed(source.checkpoint()[:500])
        other = Source(position=writer.position)
        writer.begin(full=True)
        writer.feed(other.checkpoint()[:70000])
        assert len(files(writer.history)) == 2
        other = Source(position=writer.position)
        writer.begin(full=True)
        commit(writer, other.checkpoint(), other.position)
        assert epochs(writer.history) == [0, 1, 2]
        assert len(files(writer.history)) == 2 and len(list((writer.directory / "warm").glob("memory-*"))) == 1
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(2)
        fill(writer, 1, other)


def test_an_incomplete_base_leaves_what_was_there(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        data = source.checkpoint()
        writer.begin(full=True)
        other = Source(position=writer.position)
        writer.feed(other.checkpoint()[:-1])
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(1)
        writer.abandon()
        writer.begin(full=False)
        commit(writer, data, source.position)
        assert memory_sha256(writer.memory) == sha(2)


# Looking for one


def test_find(store: Store) -> None:
    with store.writer("orders") as writer:
        with pytest.raises(NoCheckpoint):
            writer.history.find()
        fill(writer, 5)
        history = writer.history
        assert history.find().epoch == 4 and history.find(2).epoch == 2
        assert history.find(datetime.fromtimestamp(3.5, UTC)).epoch == 3
        assert history.find(datetime.fromtimestamp(3, UTC)).epoch == 3
        for at in (5, -1, datetime.fromtimestamp(-1, UTC)):
            with pytest.raises(NoCheckpoint):
                history.find(at)
            with pytest.raises(NoCheckpoint):
                history.restore(at)


def test_export_is_a_stream_of_its_own(store: Store, tmp_path: Path) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        writer.compact(wait=True)
        fill(writer, 3, source)
        for at, expected in ((1, [0, 1]), (2, [2]), (4, [2, 3, 4]), (None, [2, 3, 4, 5])):
            entry = writer.history.export(tmp_path / "stream", at)
            assert entry.epoch == expected[-1]
            found = [(one.epoch, memory_sha256(one.memory)) for one in read_checkpoints(tmp_path / "stream")]
            assert found == [(epoch, sha(epoch)) for epoch in expected]
    assert stat.S_IMODE((tmp_path / "stream").stat().st_mode) == 0o600


def test_images(store: Store, tmp_path: Path) -> None:
    with store.writer("orders") as writer:
        fill(writer, 4)
        for at in (None, 0, 2):
            got = writer.history.restore_image(tmp_path / "image", at)
            assert (tmp_path / "image").read_bytes() == memory_at(got.epoch).tobytes()
            assert got.device_state == b"dev%d" % got.epoch
        assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o600
        with pytest.raises(StoreError):
            writer.history.restore_image(tmp_path / "no" / "image")
    assert sorted(os.listdir(tmp_path)) == ["image", "store"]


def test_memory_keeps_its_size_everywhere(store: Store, tmp_path: Path) -> None:
    size = 2 * PAGE_SIZE + 3808
    memory = np.zeros((3, PAGE_SIZE), dtype=np.uint8)
    memory.reshape(-1)[:size] = np.random.default_rng(1).integers(1, 256, size)
    image, sender = memory.tobytes()[:size], Sender(3)
    with store.writer("orders") as writer:
        writer.begin(full=True)
        for pfns in (np.arange(3), np.array([2])):
            groups = sender.checkpoint(batches(pfns, memory[pfns]), memory_bytes=size)
            stream = b"".join(bytes(buffer) for group in groups for buffer in group)
            assert sender.position is not None
            commit(writer, stream, sender.position)
        for _ in range(2):  # of the stream, and of what compaction has made of it
            writer.history.restore_image(tmp_path / "image")
            writer.history.export(tmp_path / "stream")
            assert [one.image.tobytes() for one in read_checkpoints(tmp_path / "stream")][-1] == image
            assert (tmp_path / "image").read_bytes() == image
            assert writer.history.restore().image.tobytes() == image
            writer.compact(wait=True)
        writer.set_state(term=1)
        for _ in range(2):  # the warm copy, and when it is gone one that is made anew
            given, _ = writer.hand_out()
            assert given.read_bytes() == image
            given.unlink()


def test_zero_pages_are_holes_everywhere(store: Store, tmp_path: Path) -> None:
    pages = 1 << 16
    sender = Sender(pages)
    pfns = np.array([5, 40_000])
    data = np.full((2, PAGE_SIZE), 7, dtype=np.uint8)
    with store.writer("orders") as writer:
        writer.begin(full=True)
        stream = b"".join(bytes(b) for g in sender.checkpoint(batches(pfns, data)) for b in g)
        assert sender.position is not None
        commit(writer, stream, sender.position)
        writer.compact(wait=True)
        image = tmp_path / "image"
        writer.history.restore_image(image)
        assert writer.image is not None
        for path in (image, writer.image):
            assert path.stat().st_size == pages * PAGE_SIZE and path.stat().st_blocks * 512 <= 64 * PAGE_SIZE
        assert all(path.stat().st_size < 5 * PAGE_SIZE for path in (writer.directory / "segments").iterdir())


def test_history_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Store(tmp_path / "none").names()
    assert Store(tmp_path).names() == []
    with pytest.raises(StoreError):
        Store(tmp_path).history("orders")


def test_reading_goes_on_while_it_is_written(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        history = store.history("orders")
        for epoch in range(2, 10):
            data = source.checkpoint()
            writer.feed(data[: len(data) // 2])
            assert epochs(history) == list(range(epoch))
            assert memory_sha256(history.restore().memory) == sha(epoch - 1)
            assert history.verify().is_good
            writer.feed(data[len(data) // 2 :])
            writer.check(source.position)
            writer.store()
            writer.apply()
            if epoch == 5:
                writer.compact(wait=True)


# The state


def test_state(store: Store) -> None:
    with store.writer("orders") as writer:
        assert (writer.state.term, writer.state.role, writer.state.format) == (0, "standby", 1)
        writer.set_state(term=3)
        writer.set_state(role="promoted", primary="left", since=5)
        assert (writer.state.term, writer.state.role) == (3, "promoted")
    state = store.history("orders").state
    assert (state.name, state.term, state.role, state.more) == (
        "orders",
        3,
        "promoted",
        {"primary": "left", "since": 5},
    )
    with store.writer("orders") as writer:
        assert writer.state == state
        writer.set_state(since=6)
    assert store.history("orders").state.more == {"primary": "left", "since": 6}
