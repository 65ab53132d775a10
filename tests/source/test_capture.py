"""What a pause does to the pages that it finds: it encodes them where they lie, or copies them.

Either way the stream is the same, also if the pause does not hold.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from numpy.typing import NDArray
from tracking import needs_tracking

from remus_ckpt.errors import PauseBroken, SourceError
from remus_ckpt.loop import CheckpointLoop, StopSignal
from remus_ckpt.pages import PAGE_SIZE, Places
from remus_ckpt.pause import Captures, Rooms
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Encoded, Sender
from remus_ckpt.source import Memory, Source
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.lock import LockStopper
from remus_ckpt.source.own_memory import Buffers, OwnMemory
from remus_ckpt.source.shared_file import MappedFile
from remus_ckpt.source.track.kernel import Tracking

WAYS: dict[str, dict[str, Any]] = {
    "copy": {"max_pause_s": 0.0},
    "encode": {"max_pause_s": math.inf},
    "bounded": {"bounded": True},
}


class Receiver:
    """A loop's output. It keeps all buffers until the commit, as it may, and then restores them."""

    def __init__(self) -> None:
        self.stream = b""
        self.restorer = Restorer(strict=True)
        self._kept: list[Any] = []

    def write(self, buffers: list[Any]) -> None:
        self._kept += buffers

    def commit(self, sent: Any) -> None:
        data = b"".join(map(bytes, self._kept))
        self._kept.clear()
        self.stream += data
        self.restorer.feed(data)
        assert [checkpoint.epoch for checkpoint in self.restorer.checkpoints()] == [sent.epoch]

    def fds(self) -> tuple[int, ...]:
        return ()

    def check(self) -> None:
        pass

    @property
    def image(self) -> bytes:
        return self.restorer.memory.tobytes()


# Memories, with what writes to them and what they hold


class Area(ABC):
    """Memory of some kind, and its bytes for a test to write to."""

    memory: Any

    @abstractmethod
    def write(self, at: int, data: bytes) -> None: ...

    @abstractmethod
    def image(self) -> bytes:
        """As pages."""

    def close(self) -> None:
        self.memory.close()


class Arrays(Area):
    """Buffers that end within their last page, are not aligned, or lie within one page; and an empty one."""

    def __init__(self, _: Path) -> None:
        odd = np.zeros(9 * PAGE_SIZE + 3, dtype=np.uint8)[1:]
        shared = np.zeros((40, PAGE_SIZE), dtype=np.uint8)
        self.buffers = {
            "whole": np.zeros((30, PAGE_SIZE), dtype=np.uint8),
            "odd": odd,
            "small": bytearray(100),
            "none": np.empty(0),
            "map": mmap.mmap(-1, 7 * PAGE_SIZE),
            "low": shared[:20],
            "high": shared[20:],
        }
        self.memory = Buffers(self.buffers)
        self._flat = [memoryview(buffer).cast("B") for buffer in self.buffers.values() if len(buffer)]

    def write(self, at: int, data: bytes) -> None:
        for flat in self._flat:
            room = -(-len(flat) // PAGE_SIZE) * PAGE_SIZE
            if at < room:
                part = data[: max(len(flat) - at, 0)]
                flat[at : at + len(part)] = part
                return
            at -= room

    def image(self) -> bytes:
        return b"".join(bytes(flat) + bytes(-len(flat) % PAGE_SIZE) for flat in self._flat)

    def close(self) -> None:
        super().close()
        for flat in self._flat:
            flat.release()


class Sparse(Area):
    """A file in /dev/shm with holes, which ends within a page."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sparse"
        with open(self.path, "wb") as file:
            file.truncate(120 * PAGE_SIZE + 77)
        self.memory = MappedFile(self.path)

    def write(self, at: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(at)
            file.write(data[: max(self.memory.size - at, 0)])

    def image(self) -> bytes:
        data = self.path.read_bytes()
        return data + bytes(-len(data) % PAGE_SIZE)


class Empty(Area):
    """Buffers of no bytes, which are one page of zeros."""

    def __init__(self, _: Path) -> None:
        self.memory = Buffers({"none": np.empty(0)})

    def write(self, at: int, data: bytes) -> None:
        pass

    def image(self) -> bytes:
        return bytes(PAGE_SIZE)


KINDS = [Arrays, Sparse, Empty]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="remus-capture-", dir="/dev/shm") as name:
        yield Path(name)


class Everything:
    """A tracker that always names all pages, as one may."""

    reference = None
    way = "kernel"
    why = ""
    missed_pages = 0

    def __init__(self, memory: Memory) -> None:
        self._pages = memory.pages

    def copy_live(self) -> Iterator[Any]:
        yield from ()

    def estimate(self) -> int:
        return self._pages

    def written(self) -> NDArray[np.int64]:
        return np.arange(self._pages)

    def restart(self) -> None:
        pass

    taken = close = restart


class Shaky(LockStopper):
    """Calls `meanwhile` and breaks, as often as it is told to; the writers run while it lasts."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        super().__init__(None)
        self.to_break = 0
        self.meanwhile = meanwhile

    def check_stopped(self) -> None:
        if self.to_break:
            self.to_break -= 1
            self.meanwhile()
            raise PauseBroken("somebody has run")


def loop_over(memory: Any, options: dict[str, Any], *, tracker: Any = Compare, **of_sender: Any) -> CheckpointLoop:
    finds = tracker(memory)
    source = Source(memory, finds, LockStopper(None))
    return CheckpointLoop(source, Sender(memory.pages, reference=finds.reference, **of_sender), Receiver(), **options)


def scribble(area: Area, rng: np.random.Generator) -> None:
    """Write words, pages and zeros at random places."""
    pages = area.memory.pages
    for _ in range(int(rng.integers(0, 12))):
        at = int(rng.integers(0, pages * PAGE_SIZE))
        if rng.integers(0, 3):
            area.write(at, rng.bytes(int(rng.integers(1, 9))))
        else:
            page = at // PAGE_SIZE * PAGE_SIZE
            area.write(page, rng.bytes(PAGE_SIZE) if rng.integers(0, 2) else bytes(PAGE_SIZE))


def test_an_interval_of_months_is_waited_for_and_can_be_stopped() -> None:
    stop = StopSignal()
    loop = loop_over(Buffers({"a": bytearray(PAGE_SIZE)}), {"interval_s": 1e8, "stop": stop})
    for _ in loop.run():
        stop.set()
    assert loop.ended == "stopped"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tracker", [Compare, Everything])
@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_however_pages_are_taken_the_stream_is_the_same(
    kind: type[Area], tracker: Any, codec: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    streams = {}
    for way, options in WAYS.items():
        area, rng, output = kind(folder), np.random.default_rng(3), Receiver()
        loop = CheckpointLoop(
            Source(area.memory, finds := tracker(area.memory), LockStopper(None)),
            Sender(area.memory.pages, reference=finds.reference, codec=codec, buffer_pages=5),  # type: ignore[arg-type]
            output,
            **options,
        )
        for number in range(many(12, 60)):
            scribble(area, rng)
            taken = loop.take()
            assert output.image == area.image(), (way, number)
            if number:
                assert (taken.capture == "copy") == (way == "copy") == bool(taken.capture_why)
                assert taken.dirty_pages <= area.memory.pages
        streams[way] = output.stream
        area.close()
    assert streams["encode"] == streams["copy"] == streams["bounded"]


def test_holes_are_not_filled_where_pages_are_encoded(folder: Path) -> None:
    area = Sparse(folder)
    area.write(50 * PAGE_SIZE, b"here")
    for options in WAYS.values():
        loop = loop_over(area.memory, options, tracker=Everything)
        for _ in range(3):
            loop.take()
    assert os.stat(area.path).st_blocks * 512 == PAGE_SIZE
    area.close()


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_where_pages_lie_and_copies_where_they_do_not(kind: type[Area], folder: Path) -> None:
    area, rng = kind(folder), np.random.default_rng(5)
    for _ in range(30):
        scribble(area, rng)
    pages = np.frombuffer(area.image(), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    for count in (0, 1, len(pages) // 2, len(pages)):
        pfns = np.sort(rng.choice(len(pages), count, replace=False))
        places: Places = area.memory.places(pfns)
        found = [base[index] for base, index in places]
        assert np.array_equal(np.concatenate([np.empty((0, PAGE_SIZE), np.uint8), *found]), pages[pfns])
    places = found = []  # type: ignore[assignment]
    area.close()


# Pauses that do not hold


@needs_tracking
@pytest.mark.parametrize("tracking", ["compare", "kernel"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("then", ["stays", "changes", "goes back", "goes on elsewhere"])
@pytest.mark.parametrize("is_first", [False, True])
def test_what_a_broken_pause_has_encoded_is_sent_all_the_same(
    tracking: Tracking, times: int, then: str, is_first: bool
) -> None:
    """The reference has those pages, and the receiver does not."""
    array = np.zeros((20, PAGE_SIZE), dtype=np.uint8)
    source = OwnMemory({"array": array}, tracking=tracking)
    output = Receiver()
    sender = Sender(20, reference=source.tracker.reference, buffer_pages=3)

    def meanwhile() -> None:
        if then == "changes":
            array[3] += 1
        elif then == "goes back":
            array[3:9] = 0
        elif then == "goes on elsewhere":
            array[11, 5] += 1

    source.stopper = stopper = Shaky(meanwhile)
    loop = CheckpointLoop(source, sender, output, max_pause_s=math.inf)
    if not is_first:
        loop.take()
    for _ in range(3):
        array[3:9, 7] += 1
        stopper.to_break = times
        taken = loop.take()
        assert taken.capture == ("copy" if taken.sent.epoch == 0 else "encode")
        assert output.image == array.tobytes()
        assert not len(sender.owed)
        loop.take()
        assert output.image == array.tobytes()
    array[3, 7] += 1
    assert loop.take().sent.compressed_bytes < 100, "what was owed is paid"
    assert source.tracker.way == tracking
    source.close()


STEPS = ["check", "written", "places", "encode, before", "encode, after", "on_paused"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_somebody_writes_at_any_step_of_a_pause_that_breaks(
    step: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros((20, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})
    stopper = Shaky()
    tracker = Compare(memory)
    output = Receiver()
    sender = Sender(20, reference=tracker.reference, buffer_pages=3)
    calls = 0

    def intruding(function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def intrude() -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                array[::2, 100] += 1
                array[5] = np.arange(PAGE_SIZE) % 250
                stopper.to_break = 1

        def called(*arguments: Any, **named: Any) -> Any:
            if before:
                intrude()
            result = function(*arguments, **named)
            if not before:
                intrude()
            return result

        return called

    loop = CheckpointLoop(Source(memory, tracker, stopper), sender, output, max_pause_s=math.inf)
    array[:7] = 1
    loop.take()
    array[2:13, 9] += 1
    owner, name = {"check": (memory, "check"), "written": (tracker, "written"), "places": (memory, "places")}.get(
        step, (sender, "encode")
    )
    if step != "on_paused":
        monkeypatch.setattr(owner, name, intruding(getattr(owner, name), before="before" in step))
    for _ in range(4):
        loop.take()
        assert output.image == array.tobytes()
        array[1::3, 50] += 1


def test_a_pause_that_never_holds_is_an_error_and_what_it_encoded_is_owed_still() -> None:
    array = np.zeros((20, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})
    stopper, tracker, output = Shaky(), Compare(memory), Receiver()
    sender = Sender(20, reference=tracker.reference, buffer_pages=3)
    loop = CheckpointLoop(Source(memory, tracker, stopper), sender, output, max_pause_s=math.inf)
    loop.take()
    array[4:9] = 5
    stopper.to_break = 1000
    with pytest.raises(SourceError):
        loop.take()
    stopper.to_break = 0
    assert sender.unfinished and sender.position is not None
    sender.rewind(sender.position, sender.pfns)
    output.restorer.rewind()
    loop.take()
    assert output.image == array.tobytes()


def test_a_bounded_capture_that_has_been_written_is_not_taken_again() -> None:
    """Half of it is on its way: only a new session can undo that. What fits into one page buffer is."""
    array = np.zeros((20, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})
    stopper, tracker, output = Shaky(), Compare(memory), Receiver()
    sender = Sender(20, reference=tracker.reference, buffer_pages=3)
    loop = CheckpointLoop(Source(memory, tracker, stopper), sender, output, bounded=True)
    loop.take()
    array[4:7] = 5
    stopper.to_break = 1
    loop.take()
    assert output.image == array.tobytes()
    array[4:9] = 6
    stopper.to_break = 1
    with pytest.raises(PauseBroken):
        loop.take()


# Somebody writes all the while


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_what_is_sent_is_what_the_reference_holds_whoever_writes_meanwhile(way: str, codec: Any) -> None:
    """Nobody keeps this writer from its pages in the pauses; the receiver and the reference agree all the same."""
    pages = 64
    array = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})
    tracker, output = Compare(memory), Receiver()
    sender = Sender(pages, reference=tracker.reference, codec=codec, buffer_pages=16)
    loop = CheckpointLoop(Source(memory, tracker, LockStopper(None)), sender, output, **WAYS[way])
    over = threading.Event()

    def write() -> None:
        words, number = array.view(np.uint32), 0
        while not over.is_set():
            number += 1
            words[:, number % 1024 :: 7] = number

    writer = threading.Thread(target=write)
    writer.start()
    try:
        loop.take()
        for _ in range(many(60, 200)):
            loop.take()
            assert output.restorer.memory.tobytes() == sender.reference.pages.tobytes()
    finally:
        over.set()
        writer.join()
    loop.take()
    assert output.image == array.tobytes()


# The choice


def test_the_choice_goes_by_what_is_expected_and_says_why() -> None:
    captures = Captures(0.010)

    def choose(pages: int, so_far_s: float = 0.0, room_pages: int = 10**9, *, is_first: bool = False) -> bool:
        return captures.choose(pages, so_far_s, room_pages=room_pages, is_first=is_first)

    assert not choose(1, is_first=True)
    assert (captures.way, "first" in captures.why) == ("copy", True)
    assert choose(100)
    assert (captures.way, captures.why) == ("encode", "")
    assert not choose(100, 0.010), "the time is over already"
    assert not choose(10**6)
    assert captures.way == "copy" and "1,000,000" in captures.why and "10 ms" in captures.why
    for _ in range(20):
        captures.encoded(10_000, 0.1)  # 10 µs a page
    assert not choose(2_000)
    assert choose(500)
    for _ in range(60):
        choose(2_000)
    assert choose(2_000), "what was slow once is tried again"
    for _ in range(100):
        captures.encoded(1, 1.0)
    assert choose(2_000), "a single page tells nothing of a thousand"


def test_no_copy_is_made_where_that_would_take_fresh_memory_in_the_pause() -> None:
    captures = Captures(0.010)
    assert captures.choose(10**6, 0.0, room_pages=10**6 - 1)
    assert (captures.way, captures.why, captures.wanted_pages) == ("encode", "", 0), "it may not come again"
    assert captures.choose(10, 0.0, room_pages=0)
    assert captures.choose(10**6, 0.0, room_pages=100)
    assert not captures.wanted_pages
    assert captures.choose(10**5, 0.0, room_pages=100)
    assert captures.wanted_pages == 10**5
    assert not captures.choose(10**5, 0.0, room_pages=10**5)
    assert (captures.way, captures.wanted_pages) == ("copy", 0)
    never = Captures(0.0)
    assert not never.choose(10**6, 0.0, room_pages=0), "it is to be copied whatever that takes"


def test_a_loop_makes_room_for_copies_where_they_are_worth_it() -> None:
    array = np.zeros((4000, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})
    tracker, output = Compare(memory), Receiver()
    sender = Sender(4000, reference=tracker.reference)
    loop = CheckpointLoop(Source(memory, tracker, LockStopper(None)), sender, output, max_pause_s=1e-6)
    ways = []
    for number in range(5):
        array[:, 5] = number + 1
        ways.append(loop.take().capture)
        assert output.image == array.tobytes()
    assert ways == ["copy", "encode", "encode", "copy", "copy"]


@pytest.mark.parametrize(("max_pause_s", "want"), [(0.0, False), (math.inf, True)])
def test_always_and_never(max_pause_s: float, want: bool) -> None:
    captures = Captures(max_pause_s)
    for pages in (0, 1, 10**9):
        assert captures.choose(pages, 1e-9, room_pages=0) == want


def test_rooms_are_apart_until_they_are_cleared_and_then_the_same() -> None:
    rooms = Rooms()
    sizes = [5, 50 << 20, 40 << 20, 100 << 20, 7]
    seen = []
    for _ in range(2):
        places = []
        rooms.clear()
        for size in sizes:
            room = rooms.take(size)
            assert len(room) >= size
            used = size // 2 + 1
            rooms.keep(used)
            places.append((room.ctypes.data, room.ctypes.data + used))
        ordered = sorted(places)
        assert all(one[1] <= other[0] for one, other in pairwise(ordered))
        seen.append(places)
    assert seen[0] == seen[1]


# What the sender refuses


def test_pages_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    sender = Sender(4, buffer_pages=2)
    pages = np.ones((4, PAGE_SIZE), dtype=np.uint8)
    with pytest.raises(ValueError):  # a first checkpoint
        sender.encode(np.arange(2), [(pages, np.arange(2))])
    list(sender.checkpoint([]))

    def scan(pfns: NDArray[np.int64], places: Any) -> Iterator[Encoded]:
        yield sender.encode(pfns, places)

    for pfns, places in [
        (np.arange(3), [(pages, np.arange(3))]),  # more than a page buffer
        (np.arange(2), [(pages, np.arange(1))]),
        (np.array([4]), [(pages, np.arange(1))]),  # no such page
    ]:
        with pytest.raises(ValueError):
            list(sender.checkpoint(scan(pfns, places)))
        assert not len(sender.pfns)
        assert sender.position is not None
        sender.rewind(sender.position, sender.pfns)
        assert not sender.reference.pages.any()


def test_encoded_pages_lie_in_the_same_room_each_time() -> None:
    """Fresh memory costs a fault a page, and rooms that are not used again would never end."""
    array = np.zeros((40, PAGE_SIZE), dtype=np.uint8)
    memory = Buffers({"array": array})

    class Noting(Receiver):
        places: set[int]

        def write(self, buffers: list[Any]) -> None:
            self.places |= {np.frombuffer(one, dtype=np.uint8).ctypes.data for one in buffers if len(one) > PAGE_SIZE}
            super().write(buffers)

    output, tracker = Noting(), Compare(memory)
    output.places = set()
    sender = Sender(40, reference=tracker.reference, buffer_pages=30)
    loop = CheckpointLoop(Source(memory, tracker, LockStopper(None)), sender, output, max_pause_s=math.inf)
    loop.take()
    seen = []
    for number in range(5):
        output.places = set()
        array[:] = number + 1
        loop.take()
        seen.append(output.places)
    assert len(seen[0]) == 2 and all(places == seen[0] for places in seen)
