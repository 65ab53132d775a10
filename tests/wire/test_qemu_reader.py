"""The reader of QEMU's stream: any split gives the same events, and no bytes make it do more than refuse."""

from __future__ import annotations

import random
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import many
from qemu_support import GOOD, contents, read_all, spelled, tool

from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.wire.qemu import events, ram
from remus_ckpt.wire.qemu.channel import ChannelReader, Hello, Packet
from remus_ckpt.wire.qemu.reader import Reader

STREAMS = [row["id"] for row in GOOD if row["format"] in ("qemu", "mapped-ram")]
KNOWN = {"told-page-size": 4096, "pages-of-8-kib": 8192, "pages-of-1-kib": 1024, "pages-of-1-kib-told": 1024}


def read(name: str, pieces: list[int] | None = None, size: int | None = None) -> list[Any]:
    return read_all(contents(name)[0][:size], pieces, page_size=KNOWN.get(name))


@pytest.mark.parametrize("name", STREAMS)
def test_any_split_gives_the_same_events(name: str) -> None:
    whole = read(name)
    assert isinstance(whole[-1], events.EndOfStream)
    chance = random.Random(name)
    length = len(contents(name)[0])
    for _ in range(many(4, 20)):
        pieces = [chance.choice((1, 7, 60, 4000, 5000, 70000)) for _ in range(length)]
        assert read(name, pieces) == whole
    assert read(name, [1] * min(length, 30_000)) == whole


@pytest.mark.parametrize("name", STREAMS)
def test_a_cut_stream_gives_what_came_before(name: str) -> None:
    whole = read(name)
    chance = random.Random(name)
    length = len(contents(name)[0])
    for size in [0, *sorted(chance.randrange(length) for _ in range(many(30, 200)))]:
        found = read(name, size=size)
        end = found.pop()
        assert isinstance(end, events.EndOfStream)
        assert end.offset == size
        assert 0 <= end.trailing_bytes <= size
        if end.complete:  # behind the stream's end there is only a description, or what does not belong to it
            found = [event for event in found if not isinstance(event, events.DeviceState)]
        assert without_footers(found) == without_footers(whole[: len(found)])


def without_footers(found: list[events.Event]) -> list[events.Event]:
    """Not every stream has footers; where one is cut off, nobody can tell that it was meant to be there."""
    return [replace(event, offset=0) if isinstance(event, events.MemoryEnd) else event for event in found]


@pytest.mark.parametrize("name", STREAMS)
def test_changed_bytes_give_a_result_or_an_error_of_ours(name: str) -> None:
    data = bytearray(contents(name)[0])
    chance = random.Random(name)
    heads = [at for at in range(len(data)) if at < 400 or at > len(data) - 400]
    for _ in range(many(60, 1000)):
        changed = data.copy()
        at = chance.choice(heads) if chance.random() < 0.5 else chance.randrange(len(data))
        changed[at] ^= 1 << chance.randrange(8)
        try:
            read_all(bytes(changed), page_size=KNOWN.get(name), limits=Limits(memory_bytes=64 * MIB))
        except StreamError as error:
            assert error.section is not None
            assert error.offset is not None
            assert 0 <= error.offset <= len(data)


def outcome(data: bytes, name: str, pieces: list[int] | None) -> list[Any]:
    """The events, or the error."""
    try:
        return read_all(data, pieces, page_size=KNOWN.get(name), limits=Limits(memory_bytes=64 * MIB))
    except StreamError as error:
        return [type(error), error.offset, error.section, error.message]


@pytest.mark.skipif(ram.native is None, reason="the extension was not built")
@pytest.mark.parametrize("name", STREAMS)
def test_the_native_scan_finds_what_python_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In good bytes and in changed ones, which are refused by the same words at the same place."""
    data = contents(name)[0]
    chance = random.Random(name)
    tried: list[tuple[bytes, list[int] | None]] = [(data, None), (data, [5000] * 100)]
    # Where words, names and frames are, and not the middle of a page.
    places = [at for at in range(len(data)) if at < 400 or data[at : at + 6] == bytes(6) or at % 4096 < 80]
    for _ in range(many(60, 2000)):
        changed = bytearray(data)
        changed[min(chance.choice(places) + chance.randrange(12), len(data) - 1)] ^= 1 << chance.randrange(8)
        tried.append((bytes(changed), None))
    native = [outcome(*one[:1], name, one[1]) for one in tried]
    monkeypatch.setattr(ram, "native", None)
    assert native == [outcome(*one[:1], name, one[1]) for one in tried]


@pytest.mark.skipif(ram.native is None, reason="the extension was not built")
def test_the_native_scan_keeps_to_its_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """More records than it has room for come as several events."""
    stream = tool.Stream()
    stream.memory({"ram": 4096 * 40})
    stream.part()
    stream.page(0, b"\7", tool.ZERO, "ram")
    for page in range(1, 40):
        stream.page(page * 4096, b"\0", tool.ZERO)
    stream.eos()
    whole = read_all(bytes(stream.data))
    monkeypatch.setattr(ram, "ROOM", 3)
    assert read_all(bytes(stream.data)) == whole
    assert sum(isinstance(one, tuple) for one in whole) == 40
    room = np.empty(4, dtype=np.int64)
    for size, frames in ((4096, bytearray(9)), (1000, bytearray(99)), (3 << 10, bytearray(99))):
        with pytest.raises(ValueError):
            ram.native.scan(
                bytes(50), size, 1 << 20, b"ram", room, room, room, np.empty(4, dtype=np.uint8), room, room, frames
            )


def test_a_fault_is_raised_again() -> None:
    reader = Reader()
    reader.feed(b"QEVM\0\0\0\x03\x09")
    assert isinstance(reader.next_event(), events.Header)
    for _ in range(2):
        with pytest.raises(Malformed):
            reader.next_event()


def test_an_event_has_no_page_twice() -> None:
    stream, _ = tool.simple()
    stream.part()
    for at in (0, 4096, 4096, 0, 8192):
        stream.page(at, b"\0", tool.ZERO, "ram")
    stream.eos()
    reader = Reader()
    reader.feed(bytes(stream.data))
    found = []
    while (event := reader.next_event()) is not None:
        if isinstance(event, events.Pages):
            found.append(event.zero.tolist())
    assert found == [[0, 1], [1], [0, 2]]


def test_memory_ends_once_and_the_gap_of_absent_pages_can_be_passed_over() -> None:
    data = contents("mapped-ram")[0]
    reader = Reader()
    at = skipped = 0
    kinds = []
    while not kinds or kinds[-1] != "EndOfStream":
        event = reader.next_event()
        if event is not None:
            kinds.append(type(event).__name__)
            continue
        skipped += reader.gap
        at += reader.gap
        if reader.gap:
            reader.skip_gap(reader.gap)
        room = reader.get_buffer()[:512]
        piece = data[at : at + len(room)]
        room[: len(piece)] = piece
        reader.buffer_updated(len(piece))
        at += len(piece)
        if not piece:
            reader.feed_eof()
    assert kinds.count("MemoryEnd") == 1
    assert skipped > 5 * 4096
    assert kinds[-2] == "DeviceState"


def limited(name: str) -> tuple[Limits, bytes]:
    """A limit that is low, and a stream that does not keep to it."""
    data = contents("plain")[0]
    return {
        "ram_blocks": (Limits(ram_blocks=1), data),
        "machine_name_bytes": (Limits(), data[:9] + b"\xff" * 4),
        "memory_bytes": (Limits(memory_bytes=4096), data),
        "device_state_bytes": (Limits(device_state_bytes=100), data),
    }[name]


@pytest.mark.parametrize("name", ["ram_blocks", "machine_name_bytes", "memory_bytes", "device_state_bytes"])
def test_a_claim_meets_its_limit_before_memory_is_taken(name: str) -> None:
    limits, data = limited(name)
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded) as caught:
            read_all(data, limits=limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.limit == name
    assert peak < 8 * MIB


def test_a_description_over_its_limit_is_none() -> None:
    state = [one for one in read_all(contents("plain")[0]) if isinstance(one, events.DeviceState)]
    assert state[0].description is not None
    low = read_all(contents("plain")[0], limits=Limits(description_bytes=10))
    assert not [one for one in low if isinstance(one, events.DeviceState)]
    assert not low[-1].complete


def test_a_description_that_names_half_a_surrogate_is_no_error() -> None:
    """JSON can name it, and no section can have that name: the sections are then not told apart."""
    data = contents("plain")[0]
    at = data.rfind(b"\0\x06")
    text = rb'{"page_size": 4096, "devices": [{"name": "\ud800", "instance_id": 0}]}'
    found = read_all(data[:at] + b"\0\x06" + struct.pack(">I", len(text)) + text)
    (state,) = [one for one in found if isinstance(one, events.DeviceState)]
    assert state.description is not None
    assert state.devices is None


@pytest.mark.parametrize("name", [b"\xff", b"\xff" * 255, b"ram\xc3", b"\xed\xa0\x80"])
def test_a_block_whose_name_is_no_text_is_refused(name: bytes) -> None:
    """No writer could give it that name again."""
    data = contents("plain")[0]
    block = next(one for one in read_all(data) if isinstance(one, events.RamBlock))
    named = bytes([len(block.name)]) + block.name.encode()
    assert data[block.offset :].startswith(named)
    changed = data[: block.offset] + bytes([len(name)]) + name + data[block.offset + len(named) :]
    with pytest.raises(Malformed) as caught:
        read_all(changed)
    assert (caught.value.offset, caught.value.section) == (block.offset, "qemu-ram.md §4.1")


def test_a_capability_that_is_stated_decides_over_what_the_words_look_like() -> None:
    """Behind the last block of a stream without x-ignore-shared stands the first page's word, whatever its value."""
    stream = tool.Stream()
    stream.start()
    stream.blocks({"ram": 8192})
    stream.put(struct.pack(">Q", 4096))  # neither a flag nor, without the capability, an address
    stream.put(bytes(64))
    with pytest.raises(Malformed) as caught:
        read_all(bytes(stream.data))
    assert caught.value.offset == len(stream.data) - 72


# Further connections


def channel_events(data: bytes, piece: int) -> tuple[list[Hello | Packet], ChannelReader]:
    reader = ChannelReader(4096, Limits())
    found: list[Hello | Packet] = []
    at = 0
    while True:
        try:
            event = reader.next_event()
        except EOFError:
            return found, reader
        if event is not None:
            found.append(event)
            continue
        room = reader.get_buffer()
        part = data[at : at + min(piece, len(room))]
        room[: len(part)] = part
        reader.buffer_updated(len(part))
        at += len(part)
        if not part:
            reader.feed_eof()


@pytest.mark.parametrize("piece", [1, 100, 5000, 1 << 20])
def test_a_channel(piece: int) -> None:
    (hello, *packets), reader = channel_events(contents("multifd-none")[2], piece)
    assert isinstance(hello, Hello)
    assert hello.channel == 1
    assert [(one.number, len(one.normal), len(one.zero)) for one in packets if isinstance(one, Packet)] == [
        (2, 0, 0), (3, 2, 1), (5, 1, 0), (7, 0, 0),
    ]  # fmt: skip
    assert not reader.is_cut


def test_a_channel_that_is_cut_or_changed() -> None:
    data = contents("multifd-7.2")[1]
    chance = random.Random(1)
    for size in (chance.randrange(len(data)) for _ in range(many(30, 200))):
        found, _ = channel_events(data[:size], 5000)
        assert len(found) <= 8
    for _ in range(many(60, 1000)):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            channel_events(bytes(changed), 5000)
        except (Malformed, UnknownFormat) as error:
            assert error.offset is not None


def test_spelling_sees_pages() -> None:
    """The comparisons above would be worth nothing if pages were left out of them."""
    assert len([one for one in read("plain") if isinstance(one, tuple)]) == 5
    assert spelled(events.MemoryEnd(offset=1)) == [events.MemoryEnd(offset=1)]
