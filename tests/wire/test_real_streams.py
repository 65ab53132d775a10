"""Streams that Xen's own code wrote: what they restore to, wherever cut, and what we make of the same pages."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import many
from shared import XEN_IDS, needs_xen, xen_manifest, xen_stream
from streams import events_of

from remus_ckpt.codec.reference import Lru
from remus_ckpt.errors import StreamError
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import HAS_DATA, PageBatch
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.writer import EventWriter

pytestmark = needs_xen
every_stream = pytest.mark.parametrize("name", XEN_IDS)
COMPRESSED = [
    name for name, row in xen_manifest().items() if any(each["compressed_chunks"] for each in row["per_checkpoint"])
]
OVERFLOW = "remus-rle-overflow"
REENCODED = [name for name in COMPRESSED if "verify" not in name]
"""In verify mode Xen sends pages to compare, not to write: what memory holds does not say what they were."""
HOSTILE = Limits(memory_bytes=256 * MIB, checkpoint_bytes=256 * MIB)


def tries(name: str) -> int:
    return many(10, 20) if name == OVERFLOW else many(25, 200)


def restorer_of(name: str, stop: int | None = None, *, strict: bool = False, limits: Limits | None = None) -> Restorer:
    restorer = Restorer(strict=strict, limits=limits)
    data = memoryview(xen_stream(name))
    restorer.feed(data[:stop])
    restorer.feed_eof()
    return restorer


@every_stream
def test_memory_after_every_checkpoint(name: str) -> None:
    row = xen_manifest()[name]
    restorer = restorer_of(name, strict=True)
    found: list[dict[str, Any]] = []
    for checkpoint in restorer.checkpoints():
        assert len(restorer.memory) == row["p2m_size"]
        found.append(
            {
                "sha256": memory_sha256(restorer.memory[: row["pages"]]),
                "end": checkpoint.end,
                "batches": checkpoint.batches,
                "entries": checkpoint.entries,
                "with_data": checkpoint.page_count,
                "compressed_chunks": checkpoint.compressed_chunks,
            }
        )
        assert checkpoint.epoch == len(found) - 1
        assert checkpoint.start == (found[-2]["end"] if len(found) > 1 else 0)
    assert [each.pop("sha256") for each in found] == row["memory_sha256"]
    assert [each.pop("end") for each in found] == row["checkpoint_end"]
    if row["per_checkpoint"]:  # not counted for every stream
        assert found == row["per_checkpoint"]
    assert restorer.end is not None and restorer.end.complete and restorer.end.trailing_bytes == 0
    assert not restorer.reader.deviations
    codec = "rle" if name in COMPRESSED else None
    assert restorer.dialect == Dialect(row["toolstack_word"], row["guest"], codec)


@every_stream
def test_cut_anywhere_gives_the_last_whole_checkpoint(name: str) -> None:
    row = xen_manifest()[name]
    ends = row["checkpoint_end"]
    rng = np.random.default_rng(len(name))
    cuts = rng.integers(0, row["bytes"], tries(name)).tolist()
    borders = [] if name == OVERFLOW else [end + step for end in ends for step in (-1, 0, 1) if end + step <= ends[-1]]
    for cut in cuts + borders:
        restorer = restorer_of(name, cut)
        whole = sum(1 for _ in restorer.checkpoints())
        assert whole == sum(end <= cut for end in ends), cut
        assert restorer.end is not None
        assert restorer.end.complete == (cut in ends)
        assert restorer.end.trailing_bytes == cut - max((end for end in ends if end <= cut), default=0)
        if whole:
            assert restorer.in_force is not None and restorer.in_force.end == ends[whole - 1]
            assert memory_sha256(restorer.memory[: row["pages"]]) == row["memory_sha256"][whole - 1], cut
        else:
            assert restorer.in_force is None


@pytest.mark.slow
@every_stream
def test_a_flipped_byte_gives_an_error_of_ours_or_a_result(name: str) -> None:
    """There is no checksum in these streams, so a result may be wrong; what came before the flip must not be."""
    row = xen_manifest()[name]
    ends = row["checkpoint_end"]
    rng = np.random.default_rng(len(name) + 1)
    data = bytearray(xen_stream(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"error": 0, "result": 0}
    # Half of them where the structure is: a page is most of the bytes and says nothing.
    structure = sorted({*range(300), *(end + step for end in ends[:-1] for step in range(-300, 300))})
    for i in range(tries(name)):
        at = int(rng.integers(0, len(data))) if i % 2 else structure[int(rng.integers(0, len(structure)))]
        flip = int(rng.integers(1, 256))
        data[at] ^= flip
        restorer = Restorer(limits=HOSTILE)
        restorer.feed(data)
        restorer.feed_eof()
        begin = time.process_time()
        try:
            for _ in restorer.checkpoints():
                pass
            outcomes["result"] += 1
            assert restorer.end is not None
        except StreamError as error:
            outcomes["error"] += 1
            assert error.section is not None
            assert error.offset is not None and 0 <= error.offset <= len(data)
        assert time.process_time() - begin < 20
        good = sum(end <= at for end in ends)
        if good:
            assert restorer.in_force is not None and restorer.in_force.epoch >= good - 1
            if restorer.in_force.epoch == good - 1:
                assert memory_sha256(restorer.memory[: row["pages"]]) == row["memory_sha256"][good - 1], at
        data[at] ^= flip
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1024 * MIB
    # A few flips may all hit pages, where nothing can be wrong.
    assert all(outcomes.values()) or tries(name) < 100, outcomes


@every_stream
def test_what_is_read_is_written_again_byte_by_byte(name: str) -> None:
    data = memoryview(xen_stream(name))
    reader = Reader()
    reader.feed(data)
    reader.feed_eof()
    writer = None
    at = 0
    for event in events_of(reader):
        if isinstance(event, events.EndOfStream):
            break
        assert event.offset == at
        assert reader.dialect.word is not None
        writer = writer or EventWriter(reader.dialect.word)
        for buffer in writer.write(event):
            assert data[at : at + len(buffer)] == buffer
            at += len(buffer)
    assert at == len(data)


@pytest.mark.parametrize("name", [name for name in XEN_IDS if name != OVERFLOW])
def test_received_in_odd_pieces(name: str) -> None:
    """Through `get_buffer`, as from a socket."""
    row = xen_manifest()[name]
    data = memoryview(xen_stream(name))
    restorer = Restorer()
    rng = np.random.default_rng(5)
    hashes = []
    at = 0
    while at < len(data):
        room = restorer.get_buffer()
        size = min(len(room), len(data) - at, int(rng.choice([1, 7, 1448, 65536, 1 << 20])))
        room[:size] = data[at : at + size]
        restorer.buffer_updated(size)
        at += size
        for _ in restorer.checkpoints():
            hashes.append(memory_sha256(restorer.memory[: row["pages"]]))  # noqa: PERF401
    assert hashes == row["memory_sha256"]


# Encoding the same pages again


def rle_pages(payload: bytes, count: int) -> Iterator[bytes]:
    """The encoded pages of a payload one by one: walked by hand (specs/rle.md §2)."""
    at = 0
    for _ in range(count):
        start, words = at, 0
        if payload[at] == 0x00:
            at, words = at + 1, 1024
        elif payload[at] == 0x80:
            at, words = at + 4097, 1024
        while words < 1024:
            marker = payload[at]
            words += marker & 0x7F
            at += 1 if marker & 0x80 else 1 + 4 * marker
        assert words == 1024
        yield payload[start:at]
    assert at == len(payload)


def rounds(name: str) -> Iterator[tuple[list[PageBatch], list[bytes]]]:
    """Per checkpoint: its batches with the pages that they lead to, and the payloads of its COMPRESSED_DATA."""
    restorer = restorer_of(name)
    lists: list[tuple[Any, Any]] = []
    payloads: list[bytes] = []
    while not isinstance(event := restorer.next_event(), events.EndOfStream):
        if isinstance(event, events.Batch):
            lists.append((event.pfns, event.types))
        elif isinstance(event, events.CompressedData):
            payloads.append(event.data.tobytes())
        elif isinstance(event, events.Tail):
            memory = restorer.commit().memory
            scan = [PageBatch(pfns, types, memory[pfns[HAS_DATA[types]].astype(np.int64)]) for pfns, types in lists]
            yield scan, payloads
            lists, payloads = [], []


@pytest.mark.parametrize(
    ("name", "word"), [(name, 8) for name in REENCODED] + [(name, 4) for name in REENCODED if name != OVERFLOW]
)
def test_the_same_pages_give_the_same_bytes(name: str, word: Any) -> None:
    """`rle` with Xen's reference, empty before the first compressed round, writes what Xen wrote.

    But for the page behind a border of Xen's output buffer: it had no slot, the buffer was full, and when it is tried
    again it is found in the slot that it was given meanwhile, and written as a delta against another page's bytes.
    """
    row = xen_manifest()[name]
    sender = Sender(row["p2m_size"], codec="rle", word=word, reference=Lru(8192))
    receiver = Restorer(strict=True)
    differing = []
    for epoch, (scan, payloads) in enumerate(rounds(name)):
        ours: list[bytes] = []
        for buffers in sender.checkpoint(scan):
            for buffer in buffers:
                receiver.feed(buffer)
            while (event := receiver.next_event()) is not None:
                if isinstance(event, events.CompressedData):
                    ours.append(event.data.tobytes())
                if isinstance(event, events.Tail):
                    receiver.commit()
        assert receiver.in_force is not None and receiver.in_force.epoch == epoch
        assert memory_sha256(receiver.memory[: row["pages"]]) == row["memory_sha256"][epoch]
        real, mine = b"".join(payloads), b"".join(ours)
        if name != OVERFLOW:
            assert mine == real
            continue
        count = row["per_checkpoint"][epoch]["with_data"] if epoch else 0
        pages = list(zip(rle_pages(real, count), rle_pages(mine, count), strict=True))
        unlike = [i for i, (theirs, our) in enumerate(pages) if theirs != our]
        # Where Xen's chunks begin, counted in pages, and not because its input buffer of 8,192 pages was full.
        starts, at, done = [], 0, 0
        for payload in payloads:
            starts.append(at)
            done += len(payload)
            size = 0
            while at < count and size + len(pages[at][0]) <= len(payload):
                size += len(pages[at][0])
                at += 1
            assert size == len(payload)
        borders = [start for start in starts if start % 8192]
        assert unlike == borders
        for i in unlike:
            theirs, our = pages[i]
            assert our[0] == 0x80 and len(our) == 4097  # ours has no reference and says so
            assert theirs[0] != 0x80
        differing += [(epoch, i) for i in unlike]
    assert len(differing) == (4 if name == OVERFLOW else 0), differing


def test_all_of_them_are_there() -> None:
    assert set(xen_manifest()) == set(XEN_IDS)
