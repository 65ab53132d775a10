"""The log of a disk: what comes from a peer may be anything."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import Malformed
from remus_ckpt.vm.disk_log import ENTRY, WriteLog, pack_write, writes

SIZE = 64 << 10
SOME = st.tuples(st.integers(0, 63), st.integers(1, 64), st.booleans()).filter(lambda one: one[0] + one[1] <= 128)


@given(st.lists(SOME), st.data())
def test_what_is_appended_is_read_between_any_two_marks(some: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    log, marks, wanted = WriteLog(), [0], []
    for sector, count, is_zero in some:
        payload = None if is_zero else bytes([sector]) * (count * 512)
        log.append(sector * 512, count * 512, payload)
        wanted.append((sector * 512, count * 512, payload))
        marks.append(log.end)
    first = data.draw(st.integers(0, len(some)))
    last = data.draw(st.integers(first, len(some)))
    log.forget(marks[first])
    assert log.held_bytes == log.end - marks[first] if first < len(some) else not log.held_bytes
    found = [
        (write.offset, write.length, None if write.data is None else bytes(write.data))
        for write in writes(b"".join(log.read(marks[first], marks[last])), SIZE)
    ]
    assert found == wanted[first:last]


@given(st.binary(max_size=100), st.binary(max_size=40))
def test_garbage_is_refused_by_our_own_error_alone(garbage: bytes, tail: bytes) -> None:
    for data in (garbage, pack_write(0, 512, bytes(512)) + garbage, ENTRY.pack(0, 512, 0) + tail):
        try:
            found = list(writes(data, SIZE))
        except Malformed as error:
            assert error.section == "disk.md §3"
            assert error.offset is not None and error.offset <= len(data)
        else:
            assert all(write.length > 0 and write.offset + write.length <= SIZE for write in found)


@pytest.mark.parametrize(
    "entry",
    [
        (SIZE, 512, 1), (SIZE - 512, 1024, 1), (1 << 63, 512, 1), (0, 0, 1), (0, 100, 1), (100, 512, 1), (0, 512, 2),
        (0, 512, 0), (0, 0xFFFFFE00, 0),
    ],
)  # fmt: skip
def test_a_write_that_cannot_be_is_refused_before_memory_is_taken(entry: tuple[int, int, int]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            list(writes(ENTRY.pack(*entry), SIZE))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_form_is_that_of_the_document() -> None:
    assert pack_write(512, 1024, None) == struct.pack("<QII", 512, 1024, 1)
    assert pack_write(512, 512, b"x" * 512) == struct.pack("<QII", 512, 512, 0) + b"x" * 512
