"""The device state of a guest, from a peer that may send anything."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.vm import part
from remus_ckpt.vm.disk_log import pack_write
from remus_ckpt.vm.part import HEAD, MAGIC, MAX_MAP_BYTES, VERSION, DiskPart, Machine, VmPart, is_vm, pack_logs

MACHINE = Machine(
    "qemu-system-x86_64", (7, 2, 22), ("-m", "64M"), 64 << 20, "", False, {"/boot/vmlinuz": (5, b"d" * 32)}
)
GOOD = VmPart(MACHINE, b"state" * 100)


def packed(fields: Any, state: bytes = b"") -> bytes:
    body = msgpack.packb(fields, use_bin_type=True)
    return HEAD.pack(MAGIC, VERSION, len(body)) + body + state


@pytest.mark.parametrize("is_running", [True, False])
def test_it_comes_back(is_running: bool) -> None:
    sent = VmPart(MACHINE, b"state", is_running)
    assert VmPart.unpack(sent.pack()) == sent
    assert is_vm(sent.pack())
    assert not is_vm(b"state")


def test_any_flipped_bit_is_noticed_or_changes_only_the_map() -> None:
    data = GOOD.pack()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 4
        try:
            found = VmPart.unpack(changed)
        except StreamError:
            continue
        assert found.state == GOOD.state
        assert at < len(data) - len(GOOD.state)


LOG = pack_write(0, 512, b"x" * 512) + pack_write(4096, 8192, None)
DISKS = (
    (DiskPart("d0", b"s" * 16, 65536, 100, 100 + len(LOG)), LOG),
    (DiskPart("d1", b"t" * 16, 512, 7, 7), b""),
)
WITH_DISKS = VmPart(MACHINE, b"state" * 10, True, DISKS)


@pytest.mark.parametrize("good", [GOOD, WITH_DISKS], ids=["plain", "disks"])
def test_every_cut_is_noticed(good: VmPart) -> None:
    data = good.pack()
    for size in range(len(data)):
        with pytest.raises(StreamError):
            VmPart.unpack(data[:size])


def test_the_logs_of_disks_come_back() -> None:
    data = WITH_DISKS.pack()
    assert VmPart.unpack(data) == WITH_DISKS
    assert VmPart.disks_of(data) == tuple(disk for disk, _ in DISKS)
    assert VmPart.disks_of(GOOD.pack()) == ()
    assert VmPart.machine_bytes(data) == VmPart.machine_bytes(GOOD.pack())
    for at in range(len(data) - len(LOG) - 4, len(data)):
        with pytest.raises(Malformed, match="checksum"):
            VmPart.unpack(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.parametrize(
    "wrong",
    [
        {"ident": "../d"}, {"ident": 7}, {"seed": b"s"}, {"size": 513}, {"size": 0}, {"size": 1 << 60}, {"start": -1},
        {"start": 1 << 62}, {"stop": 1 << 62}, {"stop": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_disk_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    disk = asdict(DISKS[0][0]) | wrong
    fields = {"machine": asdict(MACHINE), "running": True, "sha256": hashlib.sha256(b"state").digest()}
    for disks in ([disk], [asdict(DISKS[0][0])] * 2, [asdict(DISKS[1][0])] * 17, {"d": 1}, 5):
        with pytest.raises(StreamError):
            VmPart.unpack(packed(fields | {"disks": disks}, b"".join((b"state", *pack_logs([LOG])))))


def test_what_is_too_long_or_of_another_version_is_named() -> None:
    with pytest.raises(LimitExceeded, match="exceeds"):
        VmPart.unpack(HEAD.pack(MAGIC, VERSION, MAX_MAP_BYTES + 1) + bytes(10))
    with pytest.raises(UnknownFormat):
        VmPart.unpack(HEAD.pack(MAGIC, VERSION + 1, 0))
    with pytest.raises(Malformed):
        VmPart.unpack(HEAD.pack(MAGIC, VERSION, 100) + bytes(10))


def fields(**changed: Any) -> dict[str, Any]:
    machine = part.pack_machine(MACHINE) | {key: value for key, value in changed.items() if key in dir(MACHINE)}
    return {"machine": machine, "running": True, "sha256": part.hashlib.sha256(b"").digest()} | {
        key: value for key, value in changed.items() if key not in dir(MACHINE)
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": None},
        {"running": 1},
        {"sha256": b"short"},
        {"sha256": "x" * 32},
        {"qemu": 5},
        {"qemu": "a\0b"},
        {"version": [7, 2]},
        {"version": ["7", "2", "22"]},
        {"version": 7},
        {"arguments": ["-m", 64]},
        {"arguments": ["a\0"]},
        {"arguments": ["a"] * 2001},
        {"arguments": None},
        {"memory_bytes": "64"},
        {"memory_bytes": True},
        {"kvm": 1},
        {"files": {"/x": 5}},
        {"files": {"/x": [5, "digest"]}},
        {"files": {"/x": [5, b"d", 3]}},
        {"files": []},
        {"cpu": None},
    ],
)
def test_a_field_of_another_type_is_refused(changed: dict[str, Any]) -> None:
    assert VmPart.unpack(packed(fields())).state == b""
    with pytest.raises(Malformed):
        VmPart.unpack(packed(fields(**changed)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["machine", "running", "sha256", "qemu", "version", "arguments", "files"]), inner
            )
        ),
    )
)
def test_any_map_is_read_or_refused(value: Any) -> None:
    with pytest.raises(StreamError):
        VmPart.unpack(packed(value))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for sent in (data, MAGIC + data, HEAD.pack(MAGIC, VERSION, len(data)) + data):
        with pytest.raises(StreamError):
            VmPart.unpack(sent)


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"version": (10, 0, 2)}, "QEMU is 7.2.22 there and 10.0.2 here"),
        ({"files": {}}, "/boot/vmlinuz is missing here"),
        ({"files": {"/boot/vmlinuz": (6, b"d" * 32)}}, "has 5 bytes there and 6 here"),
        ({"files": {"/boot/vmlinuz": (5, b"e" * 32)}}, "different contents"),
        ({"files": MACHINE.files | {"/etc/shadow": (5, b"e" * 32)}}, "/etc/shadow would be read here"),
    ],
)
def test_a_host_that_differs_is_told_how(here: dict[str, Any], words: str) -> None:
    known = {name: getattr(MACHINE, name) for name in MACHINE.__slots__}
    assert MACHINE.differences(MACHINE) == []
    assert MACHINE.differences(Machine(**(known | {"version": (7, 2, 5)}))) == []
    (told,) = MACHINE.differences(Machine(**(known | here)))
    assert words in told


def test_the_cpu_counts_where_the_guest_sees_it() -> None:
    there = Machine("q", (7, 2, 0), (), 1, "family=6 avx avx2 avx512f", True)
    here = Machine("q", (7, 2, 0), (), 1, "family=6 avx avx2", False)
    told = there.differences(here)
    assert len(told) == 2
    assert "/dev/kvm" in told[0] and "avx512f" in told[1]
