"""What a checkpoint of a virtual machine holds besides memory: QEMU's device state, and the machine it belongs to
(specs/vm.md §3).

It stands where every checkpoint has its device state (specs/stream.md §9.2). It comes from a peer, so that every length
is checked before it is used.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import google_crc32c
import msgpack
import numpy as np

from remus_ckpt.errors import LimitExceeded, Malformed, UnknownFormat
from remus_ckpt.pages import Buffer
from remus_ckpt.vm.disk_log import SECTOR, writes

MAGIC = b"\x89REMUSv\n"
VERSION = 1
HEAD = struct.Struct("<8sII")
"""Magic, version, bytes of the map."""
MAX_MAP_BYTES = 256 << 10
MAX_ARGUMENTS = 2000
MAX_FILES = 200
MAX_DISKS = 16
MAX_DISK_BYTES = 1 << 50
_CRC = struct.Struct("<I")
DIGEST_BYTES = 32
SEED_BYTES = 16
_SECTION = "vm.md §3"
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Machine:
    """What a host must have in common with the guest's own, so that its QEMU can continue the guest.

    qemu: name of the program, such as "qemu-system-x86_64"
    version: of QEMU; its micro version may differ
    arguments: its command line without the program, and without what `command_line` adds for each host
    memory_bytes: of RAM
    cpu: model and flags of the host's CPU where the guest sees them; "" where it does not
    kvm: whether the guest runs on KVM
    files: what QEMU reads of its host, by path: size in bytes and SHA-256
    """

    qemu: str
    version: tuple[int, int, int]
    arguments: tuple[str, ...]
    memory_bytes: int
    cpu: str = ""
    kvm: bool = False
    files: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def differences(self, here: Machine) -> list[str]:
        """What another host lacks, in words. here: the same machine as it would be on that host"""
        found = []
        if self.version[:2] != here.version[:2]:
            found.append(f"QEMU is {_dotted(self.version)} there and {_dotted(here.version)} here: install the same")
        if self.kvm and not here.kvm:
            found.append("the guest runs on KVM there, and KVM cannot be used here (/dev/kvm)")
        if self.cpu and self.cpu != here.cpu:
            found.append(_cpu_difference(self.cpu, here.cpu))
        unnamed = sorted(here.files.keys() - self.files.keys())
        found += [f"{path} would be read here, and nothing says what it holds there" for path in unnamed]
        for path, (size, digest) in self.files.items():
            size_here, digest_here = here.files.get(path, (None, None))
            if size_here is None:
                found.append(f"{path} is missing here: copy it from there")
            elif size_here != size:
                found.append(f"{path} has {size} bytes there and {size_here} here: copy it from there")
            elif digest != digest_here:
                found.append(f"{path} has different contents here: copy it from there")
        return found


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _cpu_difference(there: str, here: str) -> str:
    flags, flags_here = set(there.split()), set(here.split())
    lacking = sorted(flags - flags_here)
    shown = " ".join(lacking[:_SHOWN]) + (f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else "")
    return (
        f"the guest sees the host's CPU, and this one differs (it lacks: {shown or 'nothing, but has more'}): give "
        "QEMU a named -cpu model that both have"
    )


@dataclass(frozen=True, slots=True)
class DiskPart:
    """What a checkpoint says of a disk that the guest writes to.

    ident: of its -drive
    seed: 16 bytes, random for each copy of the disk; the log begins with the copy
    size: of the disk, in bytes
    start, stop: the positions in the log between which the guest has written since the checkpoint before
    """

    ident: str
    seed: bytes
    size: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        whole = (self.size, self.start, self.stop)
        if type(self.ident) is not str or type(self.seed) is not bytes or any(type(one) is not int for one in whole):
            raise TypeError("a field of a disk has another type")
        if not (re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", self.ident) and len(self.seed) == SEED_BYTES):
            raise ValueError(f"{self.ident!r:.70} is not a disk")
        if not (0 < self.size <= MAX_DISK_BYTES and not self.size % SECTOR and 0 <= self.start <= self.stop):
            raise ValueError(f"a disk of {self.size} bytes, written from {self.start} to {self.stop}")


@dataclass(frozen=True, slots=True)
class VmPart:
    """The device state of a checkpoint.

    state: as QEMU's `xen-save-devices-state` wrote it
    is_running: whether the guest ran; False if a user had paused it, or it had ended
    disks: with the log of each (disk_log.py)
    """

    machine: Machine
    state: bytes
    is_running: bool = True
    disks: tuple[tuple[DiskPart, Buffer], ...] = ()

    def pack(self) -> bytes:
        """Its bytes; `unpack` reads them back."""
        disks = [disk for disk, _ in self.disks]
        packed = pack(pack_machine(self.machine), self.state, self.is_running, disks)
        return b"".join((packed, *pack_logs([log for _, log in self.disks])))

    @classmethod
    def unpack(cls, data: Buffer) -> VmPart:
        """Read what `pack` wrote, from an untrusted source. The logs are not copied: they lie in `data`.

        Raises Malformed (also if the device state is not what was saved), LimitExceeded, UnknownFormat.
        """
        view = memoryview(data).cast("B")
        fields, at = _read_map(view)
        try:
            machine, disks = _machine(fields["machine"]), _disks(fields)
            digest, is_running = fields["sha256"], fields["running"]
            if type(is_running) is not bool or type(digest) is not bytes or len(digest) != DIGEST_BYTES:
                raise TypeError("a field has another type")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unreadable(error) from error
        logs, logs_at = _logs(view, at, disks)
        state = bytes(view[at:logs_at])
        if hashlib.sha256(state).digest() != digest:
            raise Malformed(
                f"the device state of {len(state)} bytes is not what was saved: its checksum differs",
                offset=at,
                section=_SECTION,
            )
        return cls(machine, state, is_running, tuple(zip(disks, logs, strict=True)))

    @staticmethod
    def disks_of(data: Buffer) -> tuple[DiskPart, ...]:
        """What it says of disks, without a look at the rest. Raises like `unpack`."""
        try:
            return _disks(_read_map(memoryview(data).cast("B"))[0])
        except (TypeError, ValueError) as error:
            raise _unreadable(error) from error

    @staticmethod
    def machine_bytes(data: Buffer) -> bytes:
        """What tells the machine of one checkpoint from another's: equal bytes, equal machine. Raises like `unpack`."""
        fields, _ = _read_map(memoryview(data).cast("B"))
        found: bytes = msgpack.packb(fields.get("machine"), use_bin_type=True)
        return found


def is_vm(data: Buffer) -> bool:
    """Whether a device state is a virtual machine's."""
    return memoryview(data).cast("B")[: len(MAGIC)] == MAGIC


def pack_machine(machine: Machine) -> Any:
    """The machine in the form that `pack` takes, so that it is made only once."""
    return asdict(machine)


def pack(machine: Any, state: bytes, is_running: bool, disks: Sequence[DiskPart] = ()) -> bytes:
    """A device state with its machine, from `pack_machine`. If there are disks, `pack_logs` must follow."""
    fields: dict[str, Any] = {"machine": machine, "running": is_running, "sha256": hashlib.sha256(state).digest()}
    if disks:
        fields["disks"] = [asdict(disk) for disk in disks]
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(packed) > MAX_MAP_BYTES:
        raise ValueError(f"a command line of {len(packed)} bytes exceeds {MAX_MAP_BYTES}")
    return b"".join((HEAD.pack(MAGIC, VERSION, len(packed)), packed, state))


def pack_logs(logs: Sequence[Buffer]) -> list[Buffer]:
    """What follows the device state, in pieces: the logs of the disks, in their order, and their checksum."""
    return [*logs, _CRC.pack(_crc(logs))] if logs else []


def _crc(pieces: Sequence[Buffer]) -> int:
    found = 0
    for piece in pieces:
        if len(piece):
            found = google_crc32c.extend(found, np.frombuffer(piece, np.uint8))
    return found


def _disks(fields: dict[str, Any]) -> tuple[DiskPart, ...]:
    """Raises TypeError or ValueError."""
    found = fields.get("disks", [])
    if type(found) is not list or len(found) > MAX_DISKS:
        raise ValueError("that is no list of disks")
    disks = tuple(DiskPart(**disk) for disk in found)
    if len({disk.ident for disk in disks}) < len(disks):
        raise ValueError("two disks of one name")
    return disks


def _logs(view: memoryview, at: int, disks: Sequence[DiskPart]) -> tuple[list[memoryview], int]:
    """The logs after the device state that begins at `at`, and where they begin. Raises Malformed."""
    if not disks:
        return [], len(view)
    sizes = [disk.stop - disk.start for disk in disks]
    begin = len(view) - _CRC.size - sum(sizes)
    if begin < at:
        raise Malformed(f"logs of {sum(sizes)} bytes in {len(view) - at}", offset=at, section=_SECTION)
    if _crc([view[begin : -_CRC.size]]) != _CRC.unpack(view[-_CRC.size :])[0]:
        raise Malformed(
            "the logs of the disks are not what was written: their checksum differs", offset=begin, section=_SECTION
        )
    logs, start = [], begin
    for disk, size in zip(disks, sizes, strict=True):
        logs.append(view[start : start + size])
        start += size
        for _ in writes(logs[-1], disk.size):  # before anybody believes any of it
            pass
    return logs, begin


def _read_map(view: memoryview) -> tuple[dict[str, Any], int]:
    """The map, and where the device state begins."""
    if view[: len(MAGIC)] != MAGIC or len(view) < HEAD.size:
        raise Malformed(f"{len(view)} bytes hold no virtual machine's device state", offset=0, section=_SECTION)
    _, version, size = HEAD.unpack_from(view)
    if version != VERSION:
        raise UnknownFormat(
            f"the device state has version {version}; this program reads {VERSION}: use the one that wrote it",
            offset=len(MAGIC),
            section=_SECTION,
        )
    at = len(MAGIC) + 4
    if size > MAX_MAP_BYTES:
        raise LimitExceeded(
            f"a map of {size} bytes exceeds {MAX_MAP_BYTES}", limit="MAX_MAP_BYTES", offset=at, section=_SECTION
        )
    if size > len(view) - HEAD.size:
        raise Malformed(f"a map of {size} bytes exceeds the {len(view) - HEAD.size} left", offset=at, section=_SECTION)
    try:
        fields = msgpack.unpackb(view[HEAD.size : HEAD.size + size], raw=False, strict_map_key=True)
        if type(fields) is not dict:
            raise TypeError("it is no map")
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise _unreadable(error) from error
    return fields, HEAD.size + size


def _unreadable(error: Exception) -> Malformed:
    reason = f"{type(error).__name__}: {error}"
    return Malformed(f"the device state's map cannot be read ({reason:.100})", offset=HEAD.size, section=_SECTION)


def _machine(fields: Any) -> Machine:
    """A machine from a peer's map. Raises KeyError, TypeError or ValueError."""
    arguments, files = fields["arguments"], fields["files"]
    version = tuple(fields["version"])
    if len(arguments) > MAX_ARGUMENTS or len(files) > MAX_FILES or len(version) != 3:
        raise ValueError("a list is longer than it can be")
    expected: tuple[tuple[type, tuple[Any, ...]], ...] = (
        (str, (fields["qemu"], fields["cpu"], *arguments, *files)),
        (int, (fields["memory_bytes"], *version, *(size for size, _ in files.values()))),
        (bytes, tuple(digest for _, digest in files.values())),
        (bool, (fields["kvm"],)),
    )
    for kind, values in expected:
        for value in values:
            if type(value) is not kind or (isinstance(value, str) and "\0" in value):
                raise TypeError(f"{value!r:.40} in place of a value of type {kind.__name__}")
    return Machine(
        fields["qemu"],
        version,
        tuple(arguments),
        fields["memory_bytes"],
        fields["cpu"],
        fields["kvm"],
        {path: (size, digest) for path, (size, digest) in files.items()},
    )
