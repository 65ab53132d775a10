"""One's own arrays and mmaps as a source, and the manifest that names them."""

from __future__ import annotations

import array
import mmap
import multiprocessing
import os
import re
import struct
import threading
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from conftest import many
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from tracking import needs_tracking

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import LimitExceeded, Malformed, SourceError, StreamError, UnknownFormat
from remus_ckpt.files import StreamWriter
from remus_ckpt.limits import Limits
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.pages import MAX_BATCH_ENTRIES, PAGE_SIZE, Pages, batches
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.source import Source
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.lock import LockStopper
from remus_ckpt.source.manifest import Manifest, ManifestEntry, arrays_of
from remus_ckpt.source.own_memory import Buffers, OwnMemory
from remus_ckpt.source.track.kernel import Tracking
from remus_ckpt.wire.parts import MAGIC, Parts

RECORD = np.dtype([("id", "<u4"), ("at", "<M8[ns]"), ("corner", "<f4", (2, 3)), ("name", "U5")], align=True)


def shadow(source: OwnMemory) -> Pages:
    assert source.tracker.reference is not None
    return source.tracker.reference.pages


def image(buffers: dict[str, Any]) -> bytes:
    """What the memory of these buffers must be: by the text of specs/manifest.md §3, not by the source's code."""
    whole = b""
    for buffer in buffers.values():
        data = buffer.tobytes(order="A") if isinstance(buffer, np.ndarray) else bytes(buffer)
        whole += data + bytes(-len(data) % PAGE_SIZE)
    return whole or bytes(PAGE_SIZE)


def take(source: OwnMemory) -> list[int]:
    """What a checkpoint would take; the shadow follows."""
    source.memory.check()
    written = source.tracker.written()
    shadow(source)[written] = source.memory.read(written, np.full((len(written) + 1, PAGE_SIZE), 0xEE, dtype=np.uint8))
    return [int(number) for number in written]


def unaligned(size: int, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.zeros(size + offset, dtype=np.uint8)[offset:]


def all_kinds() -> dict[str, Any]:
    return {
        "number": np.array(7, dtype="<i8"),
        "empty": np.empty((0, 5)),
        "grid": np.arange(6000, dtype=">u4").reshape(60, 100),
        "columns": np.asfortranarray(np.arange(35, dtype="f8").reshape(5, 7)),
        "empty too": bytearray(),
        "records": np.zeros(300, dtype=RECORD),
        "flags": unaligned(3 * PAGE_SIZE, 1).view(bool),
        "area": mmap.mmap(-1, 2 * PAGE_SIZE),
        "book": bytearray(b"x" * 5000),
        "doubles": array.array("d", [1.5, 2.5]),
        "last": memoryview(bytearray(PAGE_SIZE)),
        "nothing": np.empty(0),
    }


def test_every_kind_of_buffer() -> None:
    buffers = all_kinds()
    source = OwnMemory(buffers)
    take(source)
    assert shadow(source).tobytes() == image(buffers)
    assert source.memory.sample(0, source.memory.pages).tobytes() == image(buffers)
    assert take(source) == []

    first = {entry.name: entry.page for entry in Buffers(buffers).manifest.entries}
    buffers["number"][...] = 8
    buffers["grid"][59, 99] = 1
    buffers["records"]["name"][299] = "Ω"
    buffers["flags"][PAGE_SIZE] = True
    buffers["area"][PAGE_SIZE] = 3
    buffers["last"][-1] = 3
    assert take(source) == [
        first["number"],
        first["grid"] + 59 * 400 // PAGE_SIZE,
        first["records"] + (300 * RECORD.itemsize - 1) // PAGE_SIZE,
        first["flags"] + 1,
        first["area"] + 1,
        first["last"],
    ]
    assert shadow(source).tobytes() == image(buffers)


def test_arrays_come_back_through_a_stream() -> None:
    buffers = all_kinds()
    buffers["records"]["name"] = "before"
    state = b""
    source = OwnMemory(buffers, device_state=lambda: state)
    sender = Sender(source.memory.pages, reference=source.tracker.reference)
    restorer = Restorer(strict=True)
    for number in range(3):
        buffers["grid"][3] = number
        buffers["records"]["id"] = number
        pfns = source.tracker.written()
        pages = source.memory.read(pfns, np.empty((len(pfns), PAGE_SIZE), dtype=np.uint8))
        state = b"mine %d" % number
        for group in sender.checkpoint(list(batches(pfns, pages)), parts=source.parts):
            for part in group:
                restorer.feed(part)
        checkpoint = list(restorer.checkpoints())[-1]
        assert checkpoint.parts == source.parts()
        assert arrays_of(checkpoint)[1] == b"mine %d" % number
        manifest = manifest_in(checkpoint.device_state, len(checkpoint.memory))
        assert manifest is not None
        for copy in (False, True):
            arrays = manifest.arrays(checkpoint.memory, copy=copy)
            assert list(arrays) == list(buffers)
            for name, buffer in buffers.items():
                before = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(bytes(buffer), dtype=np.uint8)
                again = arrays[name]
                assert (again.dtype, again.shape) == (before.dtype, before.shape)
                assert again.tobytes() == before.tobytes()
                assert again.flags.f_contiguous or not before.flags.f_contiguous
                assert np.shares_memory(again, checkpoint.memory) == (not copy and again.nbytes > 0)


PIECES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 7, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE, 5 * PAGE_SIZE + 9]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("tracking", ["compare", pytest.param("kernel", marks=needs_tracking)])
@given(PIECES, st.data())
def test_any_layout_and_any_writes(tracking: Tracking, pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    buffers = {f"b{n}": unaligned(size, offset) for n, (size, offset) in enumerate(pieces)}
    source = OwnMemory(buffers, tracking=tracking)
    for _ in range(3):
        for _ in range(data.draw(st.integers(0, 4))):
            buffer = buffers[data.draw(st.sampled_from(sorted(buffers)))]
            if len(buffer):
                buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= data.draw(st.integers(1, 255))
        want = np.frombuffer(image(buffers), dtype=np.uint8).reshape(-1, PAGE_SIZE)
        differ = np.flatnonzero((want != shadow(source)).any(axis=1)).tolist()
        first = data.draw(st.integers(0, source.memory.pages - 1))
        stop = data.draw(st.integers(first + 1, source.memory.pages))
        assert (source.memory.sample(first, stop) == want[first:stop]).all()
        # Not only what is dirty can be read, and the room may be anywhere.
        some = np.array(sorted(data.draw(st.sets(st.integers(0, source.memory.pages - 1)))), dtype=np.int64)
        room = unaligned((len(some) + 1) * PAGE_SIZE, 1).reshape(-1, PAGE_SIZE)
        assert (source.memory.read(some, room) == want[some]).all()
        taken = take(source)
        assert set(differ) <= set(taken)
        assert tracking == "kernel" or taken == differ
        assert (shadow(source) == want).all()
    assert source.tracker.way == tracking
    source.close()


@pytest.mark.parametrize("tracking", ["compare", pytest.param("kernel", marks=needs_tracking)])
def test_what_was_copied_live_is_not_written(tracking: Tracking) -> None:
    buffers = all_kinds()
    source = OwnMemory(buffers, tracking=tracking)
    for pfns, pages in source.tracker.copy_live():
        shadow(source)[pfns] = pages
    assert shadow(source).tobytes() == image(buffers)
    assert tracking == "kernel" or take(source) == []
    source.close()


@pytest.mark.parametrize("tracking", ["compare", pytest.param("kernel", marks=needs_tracking)])
def test_many_buffers_that_end_within_a_page(tracking: Tracking) -> None:
    buffers = {f"b{n}": bytearray(b"x" * (1 + 37 * n % 5000)) for n in range(300)}
    source = OwnMemory(buffers, tracking=tracking)
    assert take(source) == list(range(source.memory.pages))
    first = {entry.name: entry.page for entry in Buffers(buffers).manifest.entries}
    for name in ("b0", "b63", "b64", "b65", "b200", "b299"):
        buffers[name][-1] += 1
    written = take(source)
    changed = [
        first[name] + (len(buffers[name]) - 1) // PAGE_SIZE for name in ("b0", "b63", "b64", "b65", "b200", "b299")
    ]
    assert set(changed) <= set(written)
    assert tracking == "kernel" or written == changed
    assert shadow(source).tobytes() == image(buffers)
    source.close()


def masked() -> Any:
    return np.ma.zeros(5)


class Titled:
    dtype = np.dtype([(("a title", "a"), "i4")])


@pytest.mark.parametrize(
    "buffers",
    [
        {},
        {"": np.zeros(1)},
        {"n" * 256: np.zeros(1)},
        {"\udcff": np.zeros(1)},
        {5: np.zeros(1)},
        {"list": [1, 2]},
        {"objects": np.array([None])},
        {"inside": np.zeros(2, dtype=[("a", "i4"), ("b", "O")])},
        {"masked": masked()},
        {"slice": np.zeros((4, 4))[:, 1]},
        {"every other": memoryview(bytearray(10))[::2]},
        {"titled": np.zeros(2, dtype=Titled.dtype)},
    ],
    ids=lambda buffers: next(map(str, buffers), "none")[:12].encode("ascii", "replace").decode(),
)
def test_what_is_refused(buffers: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        OwnMemory(buffers)


def test_overlapping_buffers_are_refused() -> None:
    memory = np.zeros(100)
    OwnMemory({"a": memory[:50], "b": memory[50:], "c": memory[50:50]})
    for other in (memory[49:60], memory[10:20], memory):
        with pytest.raises(ValueError):
            OwnMemory({"a": memory[:50], "b": other})


def test_an_mmap_is_free_again_after_close() -> None:
    area = mmap.mmap(-1, PAGE_SIZE + 1)
    source = OwnMemory({"area": area})
    with pytest.raises(BufferError):
        area.close()
    assert source.stopper.alive()
    source.close()
    assert not source.stopper.alive()
    area.close()


@pytest.mark.parametrize("as_array", [False, True])
def test_a_file_that_shrinks_is_an_error_and_not_a_crash(tmp_path: Path, as_array: bool) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    with open(path, "r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    source = OwnMemory({"area": np.frombuffer(area, dtype=np.uint8)[8:].view("<u4") if as_array else memoryview(area)})
    os.truncate(path, PAGE_SIZE)
    with pytest.raises(SourceError):
        source.memory.check()
    with pytest.raises(SourceError):
        source.memory.sample(0, source.memory.pages)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock, multiprocessing.Lock, multiprocessing.RLock])
def test_the_lock_is_held_in_a_pause_and_only_there(make: Any) -> None:
    lock = make()
    source = OwnMemory({"a": bytearray(5)}, lock=lock, lock_timeout_s=0.01)

    def is_free() -> bool:
        answers = []

        def ask() -> None:
            answers.append(lock.acquire(timeout=0.01))
            if answers[0]:
                lock.release()

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return answers[0]

    for _ in range(2):
        source.stopper.stop()
        source.stopper.check_stopped()
        assert not is_free()
        source.stopper.resume()
        assert is_free()


def test_closing_gives_the_lock_back() -> None:
    lock = threading.Lock()
    source = OwnMemory({"a": bytearray(5)}, lock=lock)
    source.stopper.stop()
    source.close()
    assert not lock.locked()


def test_a_lock_that_is_not_given_back() -> None:
    lock = threading.Lock()
    source = OwnMemory({"a": bytearray(5)}, lock=lock, lock_timeout_s=0.01)
    with lock, pytest.raises(SourceError):
        source.stopper.stop()
    source.stopper.stop()
    lock.release()
    with pytest.raises(SourceError):
        source.stopper.check_stopped()
    with pytest.raises(SourceError):
        source.stopper.resume()


# The manifest


def manifest_in(data: bytes, pages: int) -> Manifest | None:
    """The one that a device state as it stands in a record begins with."""
    parts = Parts.unpack(data)
    return None if parts.manifest is None else Manifest.unpack(parts.manifest, pages=pages)


def entries(dtypes: st.SearchStrategy[np.dtype[Any]]) -> st.SearchStrategy[list[tuple[str, np.dtype[Any], Any, str]]]:
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    shapes = hn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=50)
    row = st.tuples(names, dtypes, shapes, st.sampled_from("CF"))
    return st.lists(row, max_size=4, unique_by=lambda row: row[0])


def manifest_of(rows: list[tuple[str, np.dtype[Any], Any, str]]) -> Manifest:
    made = []
    page = 0
    for name, dtype, shape, order in rows:
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        made.append(ManifestEntry(name, "array", dtype, shape, order, page, size))
        page += -(-size // PAGE_SIZE)
    return Manifest(tuple(made))


SIMPLE = (
    hn.scalar_dtypes()
    | hn.byte_string_dtypes(endianness="<")
    | hn.unicode_string_dtypes(endianness=">")
    | st.sampled_from([np.dtype("V3"), np.dtype("<f2"), np.dtype("longdouble"), np.dtype("<M8")])
)


def untitled(dtype: np.dtype[Any]) -> bool:
    """A field may have two names in numpy, and such a dtype is refused."""
    return "((" not in repr(dtype)


@pytest.mark.slow
@given(entries(hn.nested_dtypes(SIMPLE).filter(untitled)), st.binary(max_size=20))
def test_a_manifest_comes_back(rows: list[tuple[str, np.dtype[Any], Any, str]], state: bytes) -> None:
    manifest = manifest_of(rows)
    data = Parts(state, manifest.pack()).pack()
    assert Parts.unpack(data).device_state == state
    assert manifest_in(data, manifest.pages) == manifest
    if manifest.entries and manifest.pages > 1:
        with pytest.raises(Malformed):
            manifest_in(data, manifest.pages - 1)


GOOD = Buffers(all_kinds()).manifest


@settings(max_examples=many(60, 300))
@given(st.data())
def test_only_our_errors_come_of_broken_bytes(data: st.DataObject) -> None:
    broken = bytearray(Parts(b"state", GOOD.pack()).pack())
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(8, len(broken) - 1))] = data.draw(st.integers(0, 255))
    del broken[data.draw(st.integers(8, len(broken))) :]
    try:
        found = manifest_in(bytes(broken), GOOD.pages)
    except StreamError as error:
        assert error.section is not None and error.section.startswith("manifest.md")
    else:
        assert found is not None
        # Whatever it says now, it stays within memory.
        found.arrays(np.zeros((GOOD.pages, PAGE_SIZE), dtype=np.uint8))


def packed(fields: object, *, version: int = 1, size: int | None = None) -> bytes:
    body = msgpack.packb(fields)
    return struct.pack("<8sII", MAGIC, version, len(body) if size is None else size) + body


def buffer(**changes: Any) -> dict[str, Any]:
    whole = {"name": "a", "kind": "array", "dtype": "<f8", "shape": [2], "order": "C", "page": 0, "bytes": 16}
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


def nested(depth: int) -> Any:
    form: Any = "<f8"
    for _ in range(depth):
        form = {"base": form, "shape": [1]}
    return form


def structure(**changes: Any) -> dict[str, Any]:
    return {"names": ["x", "y"], "formats": ["<f4", "<f4"], "offsets": [0, 4], "itemsize": 8, **changes}


@pytest.mark.parametrize(
    ("row", "section"),
    [
        (5, "§2"),
        *((buffer(**{key: ...}), "§2") for key in ("name", "kind", "shape", "order", "page", "bytes")),
        (buffer(dtype=...), "§4"),
        (buffer(name=b"a"), "§2"),
        (buffer(page=False), "§2"),
        (buffer(name=""), "§3"),
        (buffer(name="n" * 256), "§3"),
        (buffer(kind="list"), "§3"),
        (buffer(kind="bytes"), "§3"),
        (buffer(order="K"), "§3"),
        (buffer(shape=[-2]), "§3"),
        (buffer(shape=[2.0]), "§3"),
        (buffer(shape=[2, True]), "§3"),
        (buffer(shape=[2] + [1] * 32), "§3"),
        (buffer(shape=[3]), "§3"),
        (buffer(bytes=8), "§3"),
        (buffer(shape=[-1], bytes=-8), "§3"),
        (buffer(page=1), "§3"),
        (buffer(page=-1), "§3"),
        (buffer(shape=[2**63 - 1, 2**63 - 1, 0], bytes=0), "§3"),
        (buffer(shape=[2**61], bytes=2**64 - 1), "§3"),
        (buffer(shape=[2**20], bytes=2**23), "§3"),  # beyond memory
        (buffer(dtype="|O", bytes=16), "§4"),
        (buffer(dtype="O8"), "§4"),
        (buffer(dtype="f8"), "§4"),
        (buffer(dtype="<f8,<f8"), "§4"),
        (buffer(dtype="(2)<f4"), "§4"),
        (buffer(dtype="<f3"), "§4"),
        (buffer(dtype="|S9999999999"), "§4"),
        (buffer(dtype="<M8[fortnights]"), "§4"),
        (buffer(dtype=[["a", "<f8"]]), "§4"),
        (buffer(dtype=nested(18)), "§4"),
        (buffer(dtype={"base": "<f8", "shape": []}), "§4"),
        (buffer(dtype={"base": "<f8", "shape": [-1]}), "§4"),
        (buffer(dtype={"base": "<f8", "shape": [2**40]}), "§4"),
        (buffer(dtype={"base": "|O", "shape": [1]}), "§4"),
        (buffer(dtype=structure(names=["x", "x"])), "§4"),
        (buffer(dtype=structure(names=["x", 5])), "§4"),
        (buffer(dtype=structure(names=["x"])), "§4"),
        (buffer(dtype=structure(offsets=[0, 5])), "§4"),
        (buffer(dtype=structure(offsets=[0, -4])), "§4"),
        (buffer(dtype=structure(offsets=[0, 2**63])), "§4"),
        (buffer(dtype=structure(itemsize=2**62)), "§4"),
        (buffer(dtype=structure(formats=["<f4", "|O"], itemsize=16)), "§4"),
        (buffer(dtype=structure(itemsize="8")), "§2"),
    ],
)
def test_a_manifest_is_held_against_its_rules(row: object, section: str) -> None:
    with pytest.raises(Malformed) as caught:
        manifest_in(packed({"buffers": [row]}), 4)
    assert caught.value.section == f"manifest.md {section}"


def test_the_row_that_the_table_breaks_is_good() -> None:
    for good in (buffer(), buffer(dtype=structure()), buffer(dtype=nested(16)), buffer(unknown=5)):
        assert manifest_in(packed({"buffers": [good], "later": 1}), 1) is not None


def test_two_rows_against_each_other() -> None:
    for other in (buffer(page=1), buffer(name="b", page=0), buffer(name="b", page=2)):
        with pytest.raises(Malformed):
            manifest_in(packed({"buffers": [buffer(), other]}), 9)
    assert manifest_in(packed({"buffers": [buffer(), buffer(name="b", page=1)]}), 2) is not None


@pytest.mark.parametrize("fields", [5, [], {}, {"buffers": {}}, {5: 6}])
def test_maps_that_are_none(fields: object) -> None:
    with pytest.raises(Malformed):
        manifest_in(packed(fields), 4)


def test_the_head() -> None:
    assert Parts.unpack(b"") == Parts()
    assert Parts.unpack(b"the user's own") == Parts(b"the user's own")
    good = packed({"buffers": [buffer()]})
    for size in range(8, len(good)):
        with pytest.raises(Malformed):
            Parts.unpack(good[:size])
    with pytest.raises(UnknownFormat) as unknown:
        Parts.unpack(packed({}, version=2))
    assert unknown.value.offset == 8
    with pytest.raises(LimitExceeded) as limit:
        Parts.unpack(packed({}, size=2**32 - 1))
    assert (limit.value.limit, limit.value.offset) == ("manifest_bytes", 12)
    size = len(good) - 16
    assert Parts.unpack(good, limits=Limits(manifest_bytes=size)).manifest == good[16:]
    with pytest.raises(LimitExceeded):
        Parts.unpack(good, limits=Limits(manifest_bytes=size - 1))


@given(st.binary(max_size=20), st.none() | st.binary(max_size=20))
def test_parts_come_back(device_state: bytes, manifest: bytes | None) -> None:
    # Hypothesis draws constants of the package too; a device state alone must not begin as a manifest does.
    assume(manifest is not None or not device_state.startswith(MAGIC))
    parts = Parts(device_state, manifest)
    assert Parts.unpack(parts.pack()) == parts
    assert manifest is not None or parts.pack() == device_state, "a device state alone stands as it is"


def test_what_device_state_gives_is_bytes_that_do_not_change() -> None:
    state: Any = bytearray(b"mine")
    source = OwnMemory({"a": bytearray(5)}, device_state=lambda: state)
    parts = source.parts()
    state[:] = b"more"
    assert parts.device_state == b"mine"
    state = "text"
    with pytest.raises(TypeError):
        source.parts()


def test_arrays_ask_for_memory_that_holds_them() -> None:
    manifest = Buffers({"a": np.zeros(5000, dtype=np.uint8)}).manifest
    for memory in (
        np.zeros((1, PAGE_SIZE), dtype=np.uint8),
        np.zeros((2, PAGE_SIZE), dtype=np.int8),
        np.zeros((4, PAGE_SIZE), dtype=np.uint8)[::2],
        np.zeros(2 * PAGE_SIZE, dtype=np.uint8),
    ):
        with pytest.raises(ValueError):
            manifest.arrays(memory)


def test_the_example_of_the_specification() -> None:
    text = (Path(__file__).parents[2] / "specs" / "manifest.md").read_text()
    rows = re.findall(r"^    \d+: +((?:[0-9a-f]{2} ?)+)$", text, re.MULTILINE)
    source = OwnMemory({"prices": np.zeros((2, 600)), "seen": bytearray(10)}, device_state=lambda: b"mine")
    assert source.parts().pack() == bytes.fromhex("".join(rows))


@pytest.mark.parametrize(
    ("every", "rounds", "found"),
    [
        (None, 1, 0),  # nothing changes: one copy, and nothing in the pause
        (4, 1, 1 / 4),  # every fourth page does: a pause is short enough for those
        (1, 2, 1),  # all of them do: gone over again, and once more would be of no use
    ],
)
def test_a_first_copy_is_gone_over_again_where_that_may_help_and_sent_once(
    tmp_path: Path, every: int | None, rounds: int, found: float
) -> None:
    pages = 4 * MAX_BATCH_ENTRIES
    array = np.ones((pages, PAGE_SIZE // 8), dtype=np.int64)

    ended = []

    class Busy(Buffers):
        def sample(self, first: int, stop: int) -> Pages:
            copy = super().sample(first, stop)
            if stop == pages:  # the end of a round
                ended.append(first)
                if every:
                    array[::every] += 1
            return copy

    memory = Busy({"array": array})
    source = Source(memory, Compare(memory), LockStopper(None))
    output = StreamWriter(tmp_path / "stream")
    taken = CheckpointLoop(source, Sender(pages, reference=source.tracker.reference), output).take()
    output.close()
    source.close()
    assert (len(ended), taken.dirty_pages, taken.sent.pages) == (rounds, found * pages, pages)
    (checkpoint,) = read_checkpoints(tmp_path / "stream", strict=True)
    assert checkpoint.memory.tobytes() == array.tobytes()
