"""Xen's v2 stream: read and written byte for byte, cut, split, flipped and full of lies."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
import v2_streams as v
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from streams import page, xl_header

from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.record_restorer import V2Restorer
from remus_ckpt.wire.xen import events, v2
from remus_ckpt.wire.xen.describe import describe
from remus_ckpt.wire.xen.v2_reader import V2Reader
from remus_ckpt.wire.xen.v2_writer import V2Writer

SMALL = Limits(memory_bytes=16 * MIB, checkpoint_bytes=16 * MIB)
every_stream = pytest.mark.parametrize("name", v.ALL)


def read(data: bytes, limits: Limits = SMALL) -> tuple[list[events.Event], StreamError | None]:
    reader = V2Reader(limits=limits)
    reader.feed(data)
    reader.feed_eof()
    found: list[events.Event] = []
    try:
        while (event := reader.next_event()) is not None:
            found.append(event)
            if isinstance(event, events.EndOfStream):
                break
    except StreamError as error:
        assert type(error) in (Malformed, UnknownFormat, LimitExceeded)
        return found, error
    return found, None


def memories(data: bytes, limits: Limits = SMALL) -> tuple[list[bytes], V2Restorer, StreamError | None]:
    restorer = V2Restorer(limits=limits)
    restorer.feed(data)
    restorer.feed_eof()
    found: list[bytes] = []
    try:
        found.extend(checkpoint.memory.tobytes() for checkpoint in restorer.checkpoints())
    except StreamError as error:
        return found, restorer, error
    return found, restorer, None


@every_stream
def test_memory_after_every_checkpoint(name: str) -> None:
    found, restorer, error = memories(v.ALL[name])
    assert error is None
    assert found == v.MEMORY[name]
    assert restorer.end is not None and restorer.end.complete


def test_what_a_checkpoint_holds_besides_memory() -> None:
    _, restorer, _ = memories(v.LIBXL)
    held = restorer.in_force
    assert held is not None and isinstance(held.tail, events.TailHvm)
    assert held.tail.magic_pfns == (0xFEFC, 0xFEFD, 0xFEFE)
    assert held.tail.context == b"context"
    assert held.device_state == b"QEVM state"
    assert held.parameters == {"HVM_IDENT_PT": 0xFEFF, "PAE_ENABLED": 1}
    assert held.tsc is not None and (held.tsc.mode, held.tsc.khz, held.tsc.nsec, held.tsc.incarnation) == (1, 2, 3, 4)
    assert restorer.policies == {v2.Kind.X86_CPUID_POLICY: bytes(48), v2.Kind.X86_MSR_POLICY: bytes(16)}
    _, restorer, _ = memories(v.PV)
    held = restorer.in_force
    assert held is not None and isinstance(held.tail, events.TailPv)
    (vcpu,) = held.tail.vcpus
    assert (vcpu.context, vcpu.extended, vcpu.xsave_mask) == (b"b" * 5168, b"e" * 128, 7)
    assert held.tail.shared_info == page(0x5A)
    assert restorer.vcpu_msrs() == {0: b"m" * 16}


@pytest.mark.parametrize(
    ("name", "front"),
    [(name, "") for name in v.ALL]
    # The headers of xl and libvirt announce libxl's layer.
    + [(name, front) for name in v.ALL if name.startswith("libxl") for front in ("xl", "libvirt")],
)
def test_written_again_the_bytes_are_the_same(name: str, front: str) -> None:
    data = v.ALL[name]
    if front == "xl":
        data = xl_header(b"config", mandatory=3) + data
    elif front == "libvirt":
        data = b"libvirt-xml\n \0 \r" + struct.pack("<II", 2, 4) + bytes(40) + b"<d/>" + data
    assert v2.is_v2(data[: v2.LOOK_BYTES])
    found, error = read(data)
    assert error is None
    assert all(describe(event)["offset"] == event.offset for event in found)
    writer, out, at = V2Writer(), b"", []
    optional = b""
    for event in found:
        if isinstance(event, v2.PassedOver):  # not ours to write
            optional = v.record(0x80000042, b"optional")
            out += optional
        elif not isinstance(event, v2.Border | events.EndOfStream):
            at.append((event.offset, len(out)))
            out += b"".join(map(bytes, writer.write(event)))
    assert out == data
    assert all(offset == place for offset, place in at)
    assert writer.offset == len(data) - len(optional)


@given(st.sampled_from(sorted(v.ALL)), st.lists(st.integers(5, 3000), min_size=1, max_size=8))
def test_any_split_gives_the_same_events(name: str, sizes: list[int]) -> None:
    data = v.ALL[name]
    whole, _ = read(data)
    reader = V2Reader(limits=SMALL)
    found, at, turn = [], 0, 0
    while True:
        event = reader.next_event()
        if event is not None:
            found.append(event)
            if isinstance(event, events.EndOfStream):
                break
        elif at >= len(data):
            reader.feed_eof()
        else:
            size = sizes[turn % len(sizes)]
            reader.feed(data[at : at + size])
            at, turn = at + size, turn + 1
    assert list(map(describe, found)) == list(map(describe, whole))


@every_stream
def test_a_cut_leaves_the_checkpoint_before_it(name: str) -> None:
    data = v.ALL[name]
    _, restorer, _ = memories(data)
    assert restorer.in_force is not None
    ends = [event.end for event in read(data)[0] if isinstance(event, v2.Border)]
    generator = random.Random(name)
    cuts = {*range(0, len(data), 97), *(end + by for end in ends for by in (-1, 0, 1)), *range(60)}
    cuts |= {generator.randrange(len(data)) for _ in range(many(20, 200))}
    for cut in sorted(cut for cut in cuts if cut < len(data)):
        found, restorer, error = memories(data[:cut])
        assert error is None, cut
        complete = sum(end <= cut for end in ends)
        if name == "hvm" and cut >= data.rindex(b"DeviceModelRecord0002") and complete == 0:
            # Without the device model's record behind it, and with a part that is none yet, the END stands alone.
            assert found in ([], v.MEMORY[name])
            continue
        assert found == v.MEMORY[name][:complete], cut


@every_stream
def test_flipped_bits_give_an_error_of_ours_or_a_result(name: str) -> None:
    data = v.ALL[name]
    generator = random.Random(name)
    for _ in range(many(40, 1000)):
        at, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
        flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        found, _, _ = memories(flipped)
        assert len(found) <= 3
        assert all(len(memory) <= SMALL.memory_bytes for memory in found)


def test_a_suspend_image_of_xenserver() -> None:
    found, restorer, error = memories(v.SUSPENDED)
    assert error is None and found == v.MEMORY["hvm"]
    assert restorer.in_force is not None and restorer.in_force.device_state == b"QEVM state"
    assert restorer.end is not None and restorer.end.complete
    rows = list(map(describe, read(v.SUSPENDED)[0]))
    assert {"offset": 0, "event": "file_header", "kind": "xenserver", "bytes": 16} in rows
    assert any(row.get("type") == "VARSTORED" and row["bytes"] == 9 for row in rows)
    for cut in (*range(0, len(v.SUSPENDED), 53), len(v.SUSPENDED) - 1):
        assert memories(v.SUSPENDED[:cut])[0] == []


@pytest.mark.parametrize(
    ("data", "error", "offset", "section"), [row[1:] for row in v.hostile()], ids=[row[0] for row in v.hostile()]
)
def test_what_breaks_a_rule_is_refused(data: bytes, error: str, offset: int, section: str) -> None:
    _, found = read(data)
    assert type(found).__name__ == error
    assert found is not None and (found.offset, found.section) == (offset, f"xen-v2.md {section}")


LIMITED = [
    ("memory_bytes", Limits(memory_bytes=3 * PAGE_SIZE), v.head() + v.page_data([3], page(1))),
    ("memory_bytes", Limits(), v.head() + v.page_data([v.entry((1 << 52) - 1, v.XTAB)])),
    ("memory_bytes", Limits(memory_bytes=3 * PAGE_SIZE), v.PV),
    ("record_bytes", Limits(), v.head() + struct.pack("<II", v.PAGE_DATA, 0xFFFFFFFF)),
    ("record_bytes", Limits(), v.head() + struct.pack("<II", 0x80000042, 0xFFFFFFFF)),
    ("vcpu_record_bytes", Limits(vcpu_record_bytes=64), v.PV),
    ("vcpus", Limits(vcpus=4), v.PV.replace(v.vcpu(v.EXTENDED, 0, b"e" * 128), v.vcpu(v.EXTENDED, 4, b"e" * 128))),
    ("hvm_context_bytes", Limits(), v.head() + struct.pack("<II", v.CONTEXT, 0xFFFFFFFF)),
    ("toolstack_bytes", Limits(), v.head() + struct.pack("<II", v.TOOLSTACK, 0xFFFFFFFF)),
    ("device_state_bytes", Limits(device_state_bytes=4), v.HVM),
    ("device_state_bytes", Limits(device_state_bytes=4), v.LIBXL),
    ("file_header_bytes", Limits(), v.SUSPENDED[:15] + struct.pack("<2Q", 0xF, 1 << 60)),
    ("device_state_bytes", Limits(), v.SUSPENDED[:15] + struct.pack("<2Q", 0xF13, 1 << 60)),
    ("file_header_bytes", Limits(), xl_header(b"", mandatory=2)[:44] + b"\xff" * 4),
    ("checkpoint_bytes", Limits(checkpoint_bytes=PAGE_SIZE), v.SERIES),
    ("checkpoint_entries", Limits(checkpoint_entries=2), v.HVM),
]


@pytest.mark.parametrize(("name", "limits", "data"), LIMITED, ids=[f"{row[0]}-{i}" for i, row in enumerate(LIMITED)])
def test_every_claim_meets_its_limit_before_memory_is_taken(name: str, limits: Limits, data: bytes) -> None:
    tracemalloc.start()
    try:
        _, _, error = memories(data, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(error, LimitExceeded)
    assert error.limit == name
    assert peak < 4 * MIB


def test_every_length_of_the_table_has_a_limit() -> None:
    assert {row.limit for row in v2.RECORDS.values()} <= {*Limits.__slots__}
    assert {row.kind for row in v2.RECORDS.values()} == {*v2.Kind}
