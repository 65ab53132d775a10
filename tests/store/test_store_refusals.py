"""What a peer cannot do to a store: nothing bad is committed, and what was there stays."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streams as s
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import PAGES, Source, commit, epochs, files, fill, sha

from remus_ckpt.errors import LimitExceeded, Malformed, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import Store
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.writer import EventWriter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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
    writer, position = EventWriter(), Position(0, bytes(32))
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
        fill(writer, 3, source)
        writer.compact(wait=True)
        fill(writer, 1, source)
    with store.writer("orders") as writer:
        writer.begin(full=False)
        good = source.checkpoint()
        writer.feed(good)
        staged = writer.check(source.position)
        assert staged.end - staged.start == len(good)
        for fault, at in ((b"\xff\xff\xff\x7f" + good[4:], 0), (good[:-32] + bytes(32), None)):
            writer.begin(full=False)
            with pytest.raises(Malformed) as caught:
                writer.feed(fault)
            assert caught.value.offset is not None
            byte = caught.value.offset - staged.start
            assert byte == at if at is not None else 0 < byte < len(good)
