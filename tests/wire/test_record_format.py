"""Streams of our own: any flipped bit is found, the chain holds, and nothing passes for a record that is none."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
import streams as s
from blake3 import blake3
from conftest import many
from pairs import noise
from streams import ENABLE_COMPRESSION, END, entry, page, restore

from remus_ckpt.errors import Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.pages import batches
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.wire.digest import new_digest
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen.dialect import Dialect

MAGIC = b"\x89REMUSck"
HASHES: dict[Any, Any] = {1: hashlib.sha256, 2: blake3}
"""What makes the digest, by the version of the record."""
both_versions = pytest.mark.parametrize("version", HASHES)
both_words = pytest.mark.parametrize("word", [8, 4])


def small_stream(word: Any, codec: Any = "delta", salt: int = 0, digest: Any = "blake3") -> tuple[bytes, list[int]]:
    """Three checkpoints of four pages, and where each ends; no full page, so that most bytes are structure."""
    sender = Sender(4, codec=codec, word=word, digest=digest)
    memory = np.zeros((4, 4096), dtype=np.uint8)
    data = b""
    ends = []
    for epoch, (pfns, offset) in enumerate((([], 0), ([1, 3], 8), ([0, 1], 4000))):
        memory[pfns, offset : offset + 6] = 17 + epoch + salt
        numbers = np.array(pfns, dtype=np.int64)
        scan = batches(numbers, memory[numbers])
        for buffers in sender.checkpoint(scan, device_state=b"mine", time_ns=1_700_000_000_000_000_000 + epoch):
            data += b"".join(bytes(buffer) for buffer in buffers)
        ends.append(len(data))
    return data, ends


@pytest.mark.parametrize(
    ("word", "detect", "digest"),
    [(8, True, "blake3"), (4, True, "sha256"), (8, False, "sha256"), (4, True, "blake3")],
    ids=["8, detected", "4, detected, sha256", "8, given, sha256", "4, detected"],
)
def test_any_flipped_bit_is_found(word: Any, detect: bool, digest: str) -> None:
    data, ends = small_stream(word, digest=digest)
    dialect = None if detect else Dialect(word=word, guest="hvm", codec="delta")
    good, error, restorer = restore(data, dialect=dialect)
    assert error is None and len(good) == 3 and restorer.end is not None and restorer.end.complete
    limits = Limits(memory_bytes=GIB)
    flipped = bytearray(data)
    for bit in range(0, 8 * len(data), many(7, 1)):
        flipped[bit // 8] ^= 1 << bit % 8
        memories, error, restorer = restore(flipped, dialect=dialect, limits=limits)
        assert error is not None or (restorer.end is not None and not restorer.end.complete), bit
        # What stands before the flip is there, and nothing else is.
        assert memories == good[: sum(end <= bit // 8 for end in ends)], bit
        flipped[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_flipped_bits_in_full_pages_are_found(codec: Any) -> None:
    sender = Sender(8, codec=codec)
    data = bytearray()
    for seed in range(3):
        for buffers in sender.checkpoint(batches(np.arange(8), noise(seed, 8))):
            data += b"".join(bytes(buffer) for buffer in buffers)
    good = restore(data)[0]
    rng = np.random.default_rng(3)
    for bit in rng.integers(0, 8 * len(data), 300).tolist():
        data[bit // 8] ^= 1 << bit % 8
        memories, error, restorer = restore(data, limits=Limits(memory_bytes=GIB))
        assert error is not None or (restorer.end is not None and not restorer.end.complete)
        assert memories == good[: len(memories)] and len(memories) < 3
        data[bit // 8] ^= 1 << bit % 8


# The chain


def parts(data: bytes, ends: list[int]) -> list[bytes]:
    return [data[first:stop] for first, stop in zip([0, *ends], ends, strict=False)]


@both_words
@pytest.mark.parametrize(
    ("order", "good"),
    [((0, 2), 1), ((0, 2, 1), 1), ((0, 1, 1), 2), ((0, 1, 2, 1), 3), ((0, 1, 2, 2), 3)],
    ids=["dropped", "swapped", "twice", "back", "last twice"],
)
def test_a_break_in_the_chain_is_found(order: tuple[int, ...], good: int, word: Any) -> None:
    data, ends = small_stream(word)
    pieces = parts(data, ends)
    memories, error, restorer = restore(b"".join(pieces[i] for i in order))
    assert type(error) is Malformed and error.section == "stream.md §9.3"
    assert memories == restore(data)[0][:good]
    assert restorer.memory.tobytes() == memories[-1]
    # The offset is where the record of the wrong one stands.
    front = sum(len(pieces[i]) for i in order[:good])
    assert error.offset is not None and front < error.offset < front + len(pieces[order[good]])
    at = error.offset
    assert b"".join(pieces[i] for i in order)[at : at + 8] == MAGIC


def test_checkpoints_of_two_streams_do_not_mix() -> None:
    """The same numbers, other bytes: the digest in the position tells them apart."""
    data, ends = small_stream(8)
    other, other_ends = small_stream(8, salt=1)
    assert ends == other_ends
    ours, theirs = parts(data, ends), parts(other, other_ends)
    assert ours[0] == theirs[0]
    memories, error, _ = restore(ours[0] + ours[1] + theirs[2])
    assert type(error) is Malformed and error.section == "stream.md §9.3" and len(memories) == 2
    memories, error, _ = restore(ours[0] + theirs[1] + theirs[2])
    assert error is None and len(memories) == 3


# Records by hand


def position(
    before: tuple[int, bytes] | None, body: bytes, device_state: bytes = b"", version: int = 1
) -> tuple[int, bytes]:
    """The position behind `before`, from the format: a digest of a name, the one before, the number and two digests."""
    epoch = 0 if before is None else before[0] + 1
    chain = b"remus position %d\0" % version + (bytes(32) if before is None else before[1])
    chain += epoch.to_bytes(8, "little") + HASHES[version](body).digest() + HASHES[version](device_state).digest()
    return epoch, HASHES[version](chain).digest()


def fields(before: tuple[int, bytes] | None, after: tuple[int, bytes], /, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "version": 1,
        "epoch": after[0],
        "time_ns": None,
        "codec": "delta",
        "before": None if before is None else list(before),
        "after": list(after),
        "device_state": b"",
    }
    if changes.get("version") == 2:
        made["digest"] = "blake3"
    made |= changes
    return {name: value for name, value in made.items() if value is not ...}


def closed(body: bytes, packed: bytes, *, magic: bytes = MAGIC, context: bytes = b"", version: int = 1) -> bytes:
    """A checkpoint of ours: its body, and a tail with this record and the right digest."""
    head = struct.pack("<3QI", 0, 0, 0, len(context)) + context + s.REMUS
    head += struct.pack("<I", len(magic) + len(packed) + 32) + magic + packed
    return body + head + bytes(HASHES[version](body + head).digest())


FIRST_BODY = s.hvm_header(8, 4) + s.batch(8, [entry(2)], page(7)) + ENABLE_COMPRESSION + END
FIRST = position(None, FIRST_BODY)
RECORD_AT = len(FIRST_BODY) + 28 + 21 + 4


def test_a_record_made_by_hand_is_read() -> None:
    state = bytes(range(256))
    first = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, time_ns=5, device_state=state)))
    body = s.batch(8, [entry(2)]) + s.compressed(8, struct.pack("<hIhI", -100, 0, 4, 9)) + END
    second = position(FIRST, body)
    data = first + closed(body, msgpack.packb(fields(FIRST, second)))
    memories, error, restorer = restore(data, strict=True)
    assert error is None and len(memories) == 2
    assert memories[1] == bytes(8192) + b"\7\7\7\7\t\0\0\0" + page(7)[8:] + bytes(4096)
    assert restorer.in_force is not None and restorer.in_force.record == CheckpointRecord(
        epoch=1, time_ns=None, codec="delta", before=Position(*FIRST), after=Position(*second), digest="sha256"
    )
    _, _, restorer = restore(first)
    assert restorer.in_force is not None
    assert restorer.in_force.device_state == state
    assert restorer.in_force.record is not None and restorer.in_force.record.time_ns == 5


@both_versions
def test_the_sender_writes_what_the_format_says(version: int) -> None:
    """The bytes of a whole small stream, put together here from the format."""
    sender = Sender(4, digest="sha256") if version == 1 else Sender(4)
    memory = np.zeros((4, 4096), dtype=np.uint8)
    memory[2] = 7
    data = b"".join(
        bytes(buffer)
        for buffers in sender.checkpoint(batches(np.array([2]), memory[[2]]), time_ns=5, device_state=b"own")
        for buffer in buffers
    )
    first = position(None, FIRST_BODY, b"own", version)
    packed = msgpack.packb(fields(None, first, version=version, time_ns=5, device_state=b"own"))
    expected = closed(FIRST_BODY, packed, version=version)
    assert data == expected
    memory[2, 4:8] = (9, 0, 0, 0)
    data = b"".join(
        bytes(buffer) for buffers in sender.checkpoint(batches(np.array([2]), memory[[2]])) for buffer in buffers
    )
    body = s.batch(8, [entry(2)]) + s.compressed(8, struct.pack("<hIhI", -100, 0, 4, 9)) + END
    second = position(first, body, version=version)
    assert data == closed(body, msgpack.packb(fields(first, second, version=version)), version=version)
    assert sender.position == Position(*second)


def test_a_later_version_is_named_and_refused() -> None:
    for version in (3, 0, "1", None, True, 2.0):
        data = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, version=version)))
        _, error, restorer = restore(data)
        assert type(error) is UnknownFormat
        assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.2")
        assert restorer.in_force is None


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "no version": {"version": ...},
    "no epoch": {"epoch": ...},
    "no time": {"time_ns": ...},
    "no codec": {"codec": ...},
    "no before": {"before": ...},
    "no after": {"after": ...},
    "no state": {"device_state": ...},
    "epoch of text": {"epoch": "0"},
    "epoch of another position": {"epoch": 1},
    "epoch negative": {"epoch": -1, "after": [-1, bytes(32)]},
    "time of a float": {"time_ns": 1.5},
    "codec of bytes": {"codec": b"delta"},
    "no codec of streams": {"codec": "xbzrle"},
    "state of text": {"device_state": "text"},
    "after nothing": {"after": None},
    "after of one": {"after": [0]},
    "after of three": {"after": [0, bytes(32), 0]},
    "digest of 31 bytes": {"after": [0, bytes(31)]},
    "digest of text": {"after": [0, "0" * 32]},
    "behind itself": {"before": [0, bytes(32)]},
    "behind a later one": {"before": [4, bytes(32)]},
    "before a number": {"before": 7},
    "memory of no bytes": {"memory_bytes": 0},
    "memory of fewer than none": {"memory_bytes": -1},
    "memory of a page less": {"memory_bytes": 3 * 4096},
    "memory of a byte more": {"memory_bytes": 4 * 4096 + 1},
    "memory of all there is": {"memory_bytes": (1 << 64) - 1},
    "memory of text": {"memory_bytes": "16384"},
    "memory of nil": {"memory_bytes": None},
    "memory of a half": {"memory_bytes": 16000.5},
    "memory of true": {"memory_bytes": True},
}


@pytest.mark.parametrize("what", BAD_FIELDS)
def test_a_record_with_wrong_fields_is_refused(what: str) -> None:
    data = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, **BAD_FIELDS[what])))
    _, error, restorer = restore(data)
    assert type(error) is Malformed
    assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.2")
    assert restorer.in_force is None


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb(7),
        msgpack.packb(fields(None, FIRST)) + b"\0",
        msgpack.packb(fields(None, FIRST))[:-1],
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgpack.packb({1: 2}),
        msgpack.packb({"version": 1, "epoch": msgpack.ExtType(5, b"x")}),
    ],
    ids=["empty", "unused", "list", "number", "more", "less", "deep", "map of 4 G", "bytes of 4 G", "numbers", "ext"],
)
def test_what_is_no_map_is_refused(packed: bytes) -> None:
    _, error, _ = restore(closed(FIRST_BODY, packed))
    assert type(error) is Malformed
    assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.2")


GARBAGE = [b"", b"QEV", b"Q", b"\x89REMUSc", bytes(39), bytes(40), b"R" * 500]
SHORT = [MAGIC, MAGIC + bytes(31)]


@pytest.mark.parametrize("state", [*GARBAGE, *SHORT])
def test_garbage_in_a_tail_of_our_shape_is_refused(state: bytes) -> None:
    tail = struct.pack("<3QI", 0, 0, 0, 0) + s.REMUS + struct.pack("<I", len(state)) + state
    _, error, _ = restore(FIRST_BODY + tail)
    assert type(error) is Malformed
    assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.2")


@pytest.mark.parametrize("state", SHORT)
def test_a_record_of_ours_that_is_cut_short_is_refused(state: bytes) -> None:
    _, error, _ = restore(FIRST_BODY + s.hvm_tail(b"ctx", s.REMUS, state))
    assert type(error) is Malformed and error.section == "stream.md §9.2"


def test_garbage_with_a_right_checksum_is_refused() -> None:
    data = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST)), magic=b"\x89REMUScK")
    _, error, _ = restore(data)
    assert type(error) is Malformed
    assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.2")


@pytest.mark.parametrize("state", [*GARBAGE, b"QEVM", b"QEVM" + bytes(27), b"QEVM" + bytes(28), b"QEVM" + bytes(5000)])
def test_a_record_of_xen_under_this_signature_passes(state: bytes) -> None:
    memories, error, restorer = restore(FIRST_BODY + s.hvm_tail(b"ctx", s.REMUS, state), strict=True)
    assert error is None and len(memories) == 1
    assert restorer.in_force is not None
    assert restorer.in_force.device_state == state and restorer.in_force.record is None


def test_a_wrong_checksum_is_said_before_the_record_is_read() -> None:
    data = bytearray(closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, version=2))))
    data[-1] ^= 1
    _, error, _ = restore(data)
    assert type(error) is Malformed
    assert (error.offset, error.section) == (RECORD_AT, "stream.md §9.4")


def test_records_come_in_all_tails_or_in_none() -> None:
    first = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST)))
    for signature in (s.XL, s.REMUS):
        memories, error, _ = restore(first + END + s.hvm_tail(b"", signature, b"QEVM"))
        assert type(error) is Malformed and len(memories) == 1
        assert error.section == "stream.md §9.2"
        assert error.offset == len(first) + 4 + 28 + 21
        memories, error, _ = restore(first + END + s.hvm_tail(b"ctx", s.REMUS, b""))
        assert type(error) is Malformed and len(memories) == 1
    plain = FIRST_BODY + s.hvm_tail(b"", s.REMUS, b"")
    second = closed(END, msgpack.packb(fields(FIRST, position(FIRST, END))))
    memories, error, _ = restore(plain + second)
    assert type(error) is Malformed and len(memories) == 1
    assert (error.offset, error.section) == (len(plain) + 4 + 28 + 21 + 4, "stream.md §9.2")


def test_the_record_names_the_codec_of_the_data() -> None:
    first = closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, codec="rle")))
    body = s.batch(8, [entry(2)]) + s.compressed(8, struct.pack("<hI", -100, 0)) + END
    second = closed(body, msgpack.packb(fields(FIRST, position(FIRST, body), codec="rle")))
    memories, error, _ = restore(first + second)
    assert type(error) is Malformed and len(memories) == 1
    assert (error.offset, error.section) == (len(first) + len(body) + 28 + 21 + 4, "stream.md §9.2")


@pytest.mark.parametrize("size", [3 * 4096 + 1, 16000, 4 * 4096])
def test_memory_may_end_within_its_last_page(size: int) -> None:
    _, error, restorer = restore(closed(FIRST_BODY, msgpack.packb(fields(None, FIRST, memory_bytes=size))), strict=True)
    assert error is None and restorer.in_force is not None
    assert restorer.in_force.memory_bytes == size == len(restorer.in_force.image)
    assert restorer.in_force.image.tobytes() == restorer.memory.tobytes()[:size]


# Positions


@pytest.mark.parametrize(("version", "digest"), [(1, "sha256"), (2, "blake3")])
def test_a_position_is_the_chain_that_the_format_describes(version: int, digest: Any) -> None:
    body = HASHES[version](b"body")
    first = Position.after(None, body.digest(), b"state", digest=digest)
    assert (first.epoch, first.digest) == position(None, b"body", b"state", version)
    second = Position.after(first, body.digest(), b"", digest=digest)
    assert (second.epoch, second.digest) == position((first.epoch, first.digest), b"body", version=version)
    assert len({first.digest, second.digest, Position.after(None, body.digest(), b"", digest=digest).digest}) == 3


# Which digest a stream has


class Counted:
    """Makes digests, and counts the bytes that each kind was given."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {"sha256": 0, "blake3": 0}

    def __call__(self, name: Any) -> Any:
        outer, inner = self, new_digest(name)

        class One:
            def update(self, data: Any) -> None:
                outer.bytes[name] += len(data)
                inner.update(data)

            def digest(self) -> bytes:
                return inner.digest()

        return One()


def read(data: bytes, **how: Any) -> tuple[int, Any]:
    """How many checkpoints come into force, and the error."""
    restorer, count = Restorer(**how), 0
    restorer.feed(data)
    restorer.feed_eof()
    try:
        for _ in restorer.checkpoints():
            count += 1
    except StreamError as error:
        return count, error
    return count, None


@pytest.mark.parametrize("digest", ["sha256", "blake3"])
def test_only_the_first_checkpoint_of_a_stream_is_hashed_twice(digest: Any) -> None:
    data, ends = small_stream(8, digest=digest)
    other = "sha256" if digest == "blake3" else "blake3"
    counted = Counted()
    assert read(data, new_digest=counted) == (3, None)
    assert counted.bytes == {digest: len(data), other: ends[0]}
    told = Counted()
    assert read(data, new_digest=told, digest=digest) == (3, None)
    assert told.bytes == {digest: len(data), other: 0}
    count, error = read(data, digest=other)
    assert count == 0 and type(error) is Malformed and error.section == "stream.md §9.4"


def test_a_stream_keeps_its_digest_over_a_rewind_and_a_boundary() -> None:
    data, ends = small_stream(8)
    restorer = Restorer(new_digest=(counted := Counted()))
    restorer.feed(data[: ends[0]])
    restorer.feed_eof()
    assert len(list(restorer.checkpoints())) == 1 and restorer.boundary.digest == "blake3"
    counted.bytes["sha256"] = 0
    restorer.rewind()
    restorer.feed(data[ends[0] : ends[1]])
    assert restorer.next_checkpoint() is not None
    assert counted.bytes["sha256"] == 0


def test_a_stream_may_follow_one_of_the_other_version() -> None:
    """The positions chain across: a new program goes on from what an old one left."""
    old = Sender(4, digest="sha256")
    pages = np.full((1, 4096), 7, dtype=np.uint8)
    first = b"".join(bytes(part) for group in old.checkpoint(batches(np.array([2]), pages)) for part in group)
    new = Sender(4, position=old.position)
    second = b"".join(bytes(part) for group in new.checkpoint(batches(np.array([2]), pages)) for part in group)
    assert read(first) == read(second) == (1, None)
    restorer = Restorer()
    restorer.feed(second)
    staged = restorer.next_checkpoint()
    assert staged is not None and staged.record is not None
    assert (staged.record.before, staged.record.digest, staged.epoch) == (old.position, "blake3", 1)


@pytest.mark.parametrize(
    ("epoch", "digest"), [(-1, bytes(32)), (1 << 63, bytes(32)), ("0", bytes(32)), (0, bytes(31)), (0, "x" * 32)]
)
def test_what_is_no_position(epoch: Any, digest: Any) -> None:
    with pytest.raises(ValueError):
        Position(epoch, digest)
