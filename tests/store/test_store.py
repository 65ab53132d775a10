"""The store: what is durable when, what comes back, and what a peer cannot do to it."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streams as s
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import PAGES, Source, commit, fill, memory_at, sha

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import LimitExceeded, Malformed, NoCheckpoint, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, PageBatch, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, HistoryWriter, Retention, Shape, Store, compaction
from remus_ckpt.store.index import read_index
from remus_ckpt.store.segments import Contents
from remus_ckpt.store.survey import Surveyor
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.writer import Writer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def epochs(history: History) -> list[int]:
    return [entry.epoch for entry in history.entries()]


def files(history: History) -> list[str]:
    return sorted(os.listdir(history.directory / "segments"))


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


# What a peer cannot do

BAD_CHECKS = {
    "another position": lambda data, position: (data, Position(position.epoch, bytes(32))),
    "another epoch": lambda data, position: (data, Position(position.epoch + 1, position.digest)),
    "not whole": lambda data, position: (data[:-1], position),
    "nothing": lambda data, position: (b"", position),
    "more": lambda data, position: (data + b"\1", position),
}


@pytest.mark.parametrize("change", BAD_CHECKS.values(), ids=BAD_CHECKS)
@pytest.mark.parametrize("first", [True, False])
def test_what_was_committed_is_what_was_said(store: Store, change: Any, first: bool) -> None:
    source = Source()
    with store.writer("orders") as writer:
        writer.begin(full=True)
        if not first:
            commit(writer, source.checkpoint(), source.position)
        data = source.checkpoint()
        fed, position = change(data, source.position)
        writer.feed(fed)
        with pytest.raises(Malformed) as caught:
            writer.check(position)
        assert caught.value.section == "store.md §4.2"
        with pytest.raises(StoreError):
            writer.store()
        writer.abandon()
        assert epochs(writer.history) == ([] if first else [0])
        writer.begin(full=first)
        commit(writer, data, source.position)
        assert epochs(writer.history) == ([0] if first else [0, 1])


def test_bytes_behind_a_checkpoint_that_is_not_committed(store: Store) -> None:
    """They are refused, not kept: a peer could send them without end."""
    for use_buffer in (True, False):
        with store.writer("orders") as writer:
            source = Source(position=writer.position)
            writer.begin(full=True)
            writer.feed(source.checkpoint())
            with pytest.raises(Malformed):
                if use_buffer:
                    writer.get_buffer()
                else:
                    writer.feed(b"\0")
            with pytest.raises(StoreError):
                writer.check(source.position)


def foreign(kind: str) -> bytes:
    first = s.hvm_header(8, 4)
    if kind == "no record":
        return first + s.ENABLE_COMPRESSION + s.END + s.hvm_tail()
    if kind == "xl":
        return s.xl_header(b"") + first
    chunk = {
        "param": s.param(-3, 1),
        "vcpus": s.vcpu_info(0, 1),
        "toolstack": s.toolstack(b""),
        "last": s.LAST_CHECKPOINT,
        "verify": struct.pack("<i", -1),
        "tsc": struct.pack("<iIQII", -7, 1, 2, 3, 4),
    }[kind]
    return first + chunk


@pytest.mark.parametrize("kind", ["xl", "param", "vcpus", "toolstack", "last", "verify", "tsc"])
def test_streams_that_are_not_ours_are_refused_where_they_say_so(store: Store, kind: str) -> None:
    with store.writer("orders") as writer:
        writer.begin(full=True)
        with pytest.raises(Malformed) as caught:
            writer.feed(foreign(kind) + b"\0" * 16)
        assert caught.value.section == "store.md §4.1"


def test_a_checkpoint_without_a_record(store: Store) -> None:
    with store.writer("orders") as writer:
        writer.begin(full=True)
        writer.feed(foreign("no record"))
        with pytest.raises(Malformed) as caught:
            writer.check(Position(0, bytes(32)))
        assert caught.value.section == "store.md §4.1"


def own_base(*, compression: bool = True, context: bytes = b"", magic: int = 0) -> tuple[bytes, Position]:
    """A checkpoint with a record of ours in a stream that is otherwise not quite ours."""
    writer, position = Writer(), Position(0, bytes(32))
    record = CheckpointRecord(epoch=0, time_ns=None, codec="delta", before=None, after=position)
    tail = events.TailHvm(magic_pfns=(magic, 0, 0), context=context, signature=Signature.REMUS, record=record)
    parts = [writer.write(events.Header(word=8, guest="hvm", p2m_size=4))]
    if compression:
        parts.append(writer.write(events.EnableCompression()))
    parts += [writer.write(events.EndOfBody()), writer.write(tail)]
    return b"".join(bytes(buffer) for group in parts for buffer in group), position


@pytest.mark.parametrize("options", [{}, {"compression": False}, {"context": b"cpu"}, {"magic": 1}])
def test_a_base_that_deltas_or_a_compaction_could_not_follow(store: Store, options: Any) -> None:
    data, position = own_base(**options)
    with store.writer("orders") as writer:
        writer.begin(full=True)
        writer.feed(data)
        if not options:
            writer.check(position)
            return
        with pytest.raises(Malformed) as caught:
            writer.check(position)
        assert caught.value.section == "store.md §4.1"


def test_the_codec_does_not_change(store: Store) -> None:
    """Two senders agree on a position, but not on how they write pages."""
    pfns, data = np.array([1]), np.ones((1, PAGE_SIZE), dtype=np.uint8)
    one, other = Sender(4, codec="delta"), Sender(4, codec="rle")
    with store.writer("orders") as writer:
        writer.begin(full=True)
        base, _ = (b"".join(bytes(b) for g in x.checkpoint(batches(pfns, data)) for b in g) for x in (one, other))
        assert one.position is not None
        commit(writer, base, one.position)
        # Without pages, nothing in it but the record says which codec it is in.
        other.position = one.position
        empty = b"".join(bytes(b) for g in other.checkpoint([]) for b in g)
        assert other.position is not None
        writer.feed(empty)
        with pytest.raises(Malformed) as caught:
            writer.check(other.position)
        assert caught.value.section == "store.md §4.1"


def test_a_base_must_be_newer_than_all_there_was(store: Store) -> None:
    with store.writer("orders") as writer:
        fill(writer, 4)
        assert writer.highest_epoch == 3
        for position, accepted in ((None, False), (Position(2, bytes(32)), False), (Position(3, bytes(32)), True)):
            source = Source(position=position)
            writer.begin(full=True)
            writer.feed(source.checkpoint())
            if accepted:
                writer.check(source.position)
                writer.store()
                writer.apply()
            else:
                with pytest.raises(Malformed):
                    writer.check(source.position)
                writer.abandon()
        assert epochs(writer.history) == [0, 1, 2, 3, 4]


def test_limits_hold(store: Store) -> None:
    with store.writer("orders", limits=Limits(memory_bytes=PAGES * PAGE_SIZE - 1)) as writer:
        writer.begin(full=True)
        with pytest.raises(LimitExceeded) as caught:
            writer.feed(Source().checkpoint())
        assert caught.value.limit == "memory_bytes"


def test_a_base_without_end(store: Store) -> None:
    """One page, again and again: the disk is not filled with it."""
    with store.writer("orders") as writer:
        writer.begin(full=True)
        writer.feed(s.hvm_header(8, 1))
        pages = s.batch(8, [s.entry(0)] * 1024, *[s.page(1)] * 1024)
        sent = 0
        with pytest.raises(Malformed) as caught:
            while sent < 100 << 20:
                writer.feed(pages)
                sent += len(pages)
        assert caught.value.section == "store.md §4.2" and sent > 60 << 20
        writer.abandon()
        assert files(writer.history) == []


def test_flipped_bits_are_found_and_dropped(store: Store) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        data = source.checkpoint()
        rng = np.random.default_rng(5)
        for at in rng.integers(0, len(data), 60):
            bad = bytearray(data)
            bad[at] ^= 1 << int(rng.integers(8))
            writer.begin(full=False)
            with pytest.raises(StreamError):
                writer.feed(bad)
                writer.check(source.position)
            writer.abandon()
            assert epochs(writer.history) == [0, 1]
            assert writer.memory is not None and memory_sha256(writer.memory) == sha(1)
        writer.begin(full=False)
        commit(writer, data, source.position)
        assert memory_sha256(writer.memory) == sha(2)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_breaks_a_rule_is_never_written(store: Store, in_place: bool) -> None:
    """The bytes are read first: where they are wrong, the segment does not get them."""
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        segment = writer.directory / "segments" / files(writer.history)[-1]
        size = segment.stat().st_size
        data = source.checkpoint()
        good, bad = data[:100], (2000).to_bytes(4, "little") + data[4:100]
        for sent, expected in ((good, size + 100), (bad, size)):
            writer.begin(full=False)
            with nullcontext() if sent is good else pytest.raises(Malformed):
                if in_place:
                    writer.get_buffer()[: len(sent)] = sent
                    writer.buffer_updated(len(sent))
                else:
                    writer.feed(sent)
            assert segment.stat().st_size == expected
            writer.abandon()
            assert segment.stat().st_size == size


@settings(max_examples=many(12, 60))
@given(st.binary(max_size=200), st.integers(0, 2), st.data())
def test_garbage(tmp_path_factory: pytest.TempPathFactory, garbage: bytes, good: int, data: st.DataObject) -> None:
    """Nothing but our own errors, and what was there stays."""
    store = Store(tmp_path_factory.mktemp("garbage"))
    with store.writer("orders") as writer:
        source = Source(pages=4)
        writer.begin(full=True)
        fill(writer, good, source)
        whole = source.checkpoint()
        at = data.draw(st.integers(0, len(whole)))
        try:
            writer.feed(whole[:at] + garbage)
            writer.check(source.position)
        except StreamError:
            writer.abandon()
            assert epochs(writer.history) == list(range(good))
            writer.begin(full=not good)
            writer.feed(whole)
            writer.check(source.position)
        writer.store()
        writer.apply()
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(good, 4)


def test_where_in_a_checkpoint_a_fault_is(store: Store) -> None:
    """Whatever lies before it: a compaction, another process."""
    source = Source()
    with store.writer("orders") as writer:
        writer.begin(full=True)
        assert writer.coming_start == 0
        fill(writer, 3, source)
        writer.compact(wait=True)
        fill(writer, 1, source)
    with store.writer("orders") as writer:
        writer.begin(full=False)
        good = source.checkpoint()
        for fault, at in ((b"\xff\xff\xff\x7f" + good[4:], 0), (good[:-32] + bytes(32), None)):
            writer.begin(full=False)
            with pytest.raises(Malformed) as caught:
                writer.feed(fault)
            assert caught.value.offset is not None
            byte = caught.value.offset - writer.coming_start
            assert byte == at if at is not None else 0 < byte < len(good)
        writer.begin(full=False)
        writer.feed(good)
        staged = writer.check(source.position)
        assert writer.coming_start == staged.start and staged.end - staged.start == len(good)


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


def test_the_warm_copy_copied(store: Store, tmp_path: Path) -> None:
    with store.writer("orders") as writer:
        with pytest.raises(NoCheckpoint):
            writer.copy_image(tmp_path / "image")
        source = fill(writer, 3)
        writer.feed(source.checkpoint()[:-1])
        assert writer.copy_image(tmp_path / "image").epoch == 2
        assert (tmp_path / "image").read_bytes() == memory_at(2).tobytes()
        with pytest.raises(StoreError):
            writer.copy_image(tmp_path / "no" / "image")


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
            writer.copy_image(tmp_path / "copy")
            writer.history.export(tmp_path / "stream")
            assert [one.image.tobytes() for one in read_checkpoints(tmp_path / "stream")][-1] == image
            assert (tmp_path / "image").read_bytes() == (tmp_path / "copy").read_bytes() == image
            assert writer.history.restore().image.tobytes() == image
            writer.compact(wait=True)
        writer.set_state(term=1)
        for _ in range(2):  # the warm copy, and when it is gone one that is made anew
            given, _ = writer.hand_out()
            assert given.read_bytes() == image
            given.unlink()
        writer.copy_image(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == image


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
        writer.copy_image(tmp_path / "copy")
        for path in (image, writer.image, tmp_path / "copy"):
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
        for path in (writer.directory / "segments").iterdir():
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
        assert removed == names[: 5 - left] and files(writer.history) == names[5 - left :]
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
        assert writer.prune(Retention(count=1)) == [entry.segment]
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
                assert writer.prune(Retention(count=1)) == names[:2]
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
