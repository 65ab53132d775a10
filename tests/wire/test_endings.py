"""The end of a checkpoint of our own that is written in one step: byte for byte what its events give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.wire.digest import DIGESTS, digest_of
from remus_ckpt.wire.record import CheckpointRecord, Position, device_state_head
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.wire.xen.writer import EventWriter

EPOCHS = st.sampled_from([0, 1, 127, 128, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, (1 << 62) - 1])
STATES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"\xacdevice_state\xc4\x00", bytes(255), bytes(256), bytes(65_536), bytes(200_000), b"\xc4\x20" * 40]
    ),
)
DIGEST_BYTES = st.binary(min_size=32, max_size=32)


def begun(digest: Any, word: Any) -> EventWriter:
    """A writer in the body of its first checkpoint."""
    writer = EventWriter(word, digest)
    writer.write(events.Header(word=word, guest="hvm", p2m_size=8))
    writer.write(events.EnableCompression())
    return writer


@given(
    digest=st.sampled_from(DIGESTS),
    word=st.sampled_from([4, 8]),
    first=EPOCHS,
    states=st.lists(STATES, min_size=1, max_size=4),
    times=st.lists(st.one_of(st.none(), st.integers(0, (1 << 63) - 1)), min_size=4, max_size=4),
    memory_bytes=st.one_of(st.none(), st.integers(1, 8 * 4096 - 1)),
    codec=st.sampled_from(["delta", "rle"]),
    given_after=st.one_of(st.none(), DIGEST_BYTES),
    follows=st.booleans(),
)
def test_an_end_is_what_its_events_give(
    digest: Any,
    word: Any,
    first: int,
    states: list[bytes],
    times: list[int | None],
    memory_bytes: int | None,
    codec: str,
    given_after: bytes | None,
    follows: bool,
) -> None:
    quick, plain = begun(digest, word), begun(digest, word)
    before = Position(first, b"\xac" * 32) if follows else None
    for number, (state, time_ns) in enumerate(zip(states, times, strict=False)):
        epoch = first if before is None else before.epoch + 1
        if number:
            data = np.arange(200, dtype=np.uint8)
            out = np.empty(quick.laid_out_bytes(1) + len(data), dtype=np.uint8)
            quick.lay_out(np.array([3]), len(data), out[: -len(data)])
            out[-len(data) :] = data
            assert quick.write_laid_out(out) == plain.write_laid_out(out)
        ending = quick.prepare_end(epoch=epoch, time_ns=time_ns, codec=codec, before=before, memory_bytes=memory_bytes)
        stated = None if given_after is None else Position(epoch, given_after)
        got, after = quick.end(ending, state, stated)
        expected = plain.write(events.EndOfBody())
        position = stated or Position.after(before, plain.digest(), state, first_epoch=first, digest=digest)
        record = CheckpointRecord(
            epoch=epoch,
            time_ns=time_ns,
            codec=codec,
            before=before,
            after=position,
            device_state=state,
            memory_bytes=memory_bytes,
            digest=digest,
        )
        tail = events.TailHvm(magic_pfns=(0, 0, 0), context=b"", signature=Signature.REMUS, record=record)
        expected += plain.write(tail)
        assert b"".join(got) == b"".join(expected)
        assert after == position and quick.offset == plain.offset
        assert quick.compressing == plain.compressing
        before = after


def test_an_end_stands_at_the_end_of_a_body() -> None:
    writer = EventWriter()
    ending = writer.prepare_end(epoch=0, time_ns=None, codec="delta", before=None, memory_bytes=None)
    with pytest.raises(ValueError):
        writer.end(ending, b"")  # there is no header yet
    writer = begun("blake3", 8)
    writer.write(events.LastCheckpoint())
    writer.end(ending, b"")
    with pytest.raises(ValueError):
        writer.end(ending, b"")  # the stream is over


def test_an_end_that_was_given_up_leaves_nothing() -> None:
    """Also none of the device state, which is kept from one end to the next."""
    writers = [begun("blake3", 8) for _ in range(2)]
    made = []
    for writer, states in zip(writers, ([b"one", b"lost", b"two"], [b"one", b"two"]), strict=True):
        before = None
        for state in states:
            epoch = 0 if before is None else 1
            ending = writer.prepare_end(epoch=epoch, time_ns=5, codec="rle", before=before, memory_bytes=None)
            data, after = writer.end(ending, state)
            if state == b"lost":
                writer.abandon()
                continue
            before = before or after
        made.append(b"".join(data))
    assert made[0] == made[1]


@given(state=STATES)
def test_what_stands_around_a_device_state(state: bytes) -> None:
    fields: Any = {"epoch": 7, "time_ns": 9, "codec": "delta", "before": Position(6, b"\xa5" * 32), "memory_bytes": 5}
    after = Position(7, digest_of("blake3", state))
    empty = CheckpointRecord(after=Position(7, bytes(32)), **fields)
    front, back = empty.split()
    whole = CheckpointRecord(after=after, device_state=state, **fields).pack()
    assert front + after.digest + device_state_head(len(state)) + state + back == whole
