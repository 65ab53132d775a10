"""What a stream says, as frozen events: `Reader` makes them, `EventWriter` takes them.

`offset` is where an event's bytes begin in the stream; `EventWriter` ignores it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Pages
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen.chunks import ChunkId, Signature
from remus_ckpt.wire.xen.dialect import Guest, Word


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of all events."""

    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader(Event):
    """What a toolstack put in front of the stream (specs/stream.md §2)."""

    kind: Literal["xl", "xend", "libvirt", "xenserver"]
    mandatory_flags: int = 0
    optional_flags: int = 0
    data: bytes
    """xl: all of the optional data; xend: the configuration; libvirt: the domain's XML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedInfo:
    """One block of a PV header's extended info (specs/stream.md §3.3)."""

    id: bytes
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Header(Event):
    """The header (specs/stream.md §3). Only PV guests have the last two fields."""

    word: Word
    guest: Guest
    p2m_size: int
    extended_info: tuple[ExtendedInfo, ...] | None = None
    p2m_frames: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch(Event):
    """A batch of PFN entries (specs/stream.md §5).

    pfns: uint64[n], types: uint8[n] of `PageType`
    data: uint8[m, 4096] for the m entries that carry data; None in format B, where they come compressed
    """

    pfns: NDArray[np.uint64]
    types: NDArray[np.uint8]
    data: Pages | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedData(Event):
    """COMPRESSED_DATA (specs/stream.md §6.2). data: uint8[n]; its borders mean nothing."""

    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuInfo(Event):
    """VCPU_INFO (specs/stream.md §4.2). online: one bit for each virtual CPU, 64 in each value."""

    highest_id: int
    online: tuple[int, ...]

    def ids(self) -> list[int]:
        """The virtual CPUs that are online, ascending."""
        return [i for i in range(self.highest_id + 1) if self.online[i // 64] >> i % 64 & 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmParam(Event):
    """One of the chunks that carry an HVM parameter (specs/stream.md §4.3)."""

    id: ChunkId
    value: int
    pad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TscInfo(Event):
    """TSC_INFO (specs/stream.md §4.5)."""

    mode: int
    nsec: int
    khz: int
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TmemPage:
    """A page of a TMEM pool and its key."""

    object_id: tuple[int, int, int]
    index: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TmemPool:
    """A TMEM pool; it may hold fewer pages than `announced_pages`."""

    id: int
    flags: int
    announced_pages: int
    uuid: tuple[int, int]
    pages: tuple[TmemPage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tmem(Event):
    """TMEM (specs/stream.md §4.4)."""

    version: int
    max_pools: int
    flags: int
    weight: int
    cap: int
    pools: tuple[TmemPool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TmemExtra(Event):
    """TMEM_EXTRA (specs/stream.md §4.4). keys: (pool id, object id, index) of pages that are gone."""

    keys: tuple[tuple[int, tuple[int, int, int], int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolstack(Event):
    """TOOLSTACK (specs/stream.md §4.6)."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnableVerifyMode(Event):
    """ENABLE_VERIFY_MODE (specs/stream.md §4.7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnableCompression(Event):
    """ENABLE_COMPRESSION (specs/stream.md §4.7, §6.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastCheckpoint(Event):
    """LAST_CHECKPOINT (specs/stream.md §4.7, §8.4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfBody(Event):
    """The id 0 (specs/stream.md §4.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail(Event):
    """The end of a checkpoint. end: the first byte after it."""

    end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TailHvm(Tail):
    """The tail of an HVM guest, with the device model's record (specs/stream.md §7.1, §7.2).

    magic_pfns: ioreq, buffered ioreq and store
    record: our own record, in a stream of ours; `device_state` is then empty
    """

    magic_pfns: tuple[int, int, int]
    context: bytes
    signature: Signature
    device_state: bytes = b""
    record: CheckpointRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuContext:
    """The state of one PV virtual CPU; it has the last three fields only if the header announced them."""

    id: int
    context: bytes
    extended: bytes | None = None
    xsave_mask: int | None = None
    xsave_size: int | None = None
    xsave: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailPv(Tail):
    """The tail of a PV guest (specs/stream.md §7.3). unmapped: uint64[n], the PFNs that have no frame at the end."""

    unmapped: NDArray[np.uint64]
    vcpus: tuple[VcpuContext, ...]
    shared_info: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfStream(Event):
    """No more bytes.

    complete: whether they end with a checkpoint
    trailing_bytes: bytes after the last complete checkpoint
    """

    complete: bool
    trailing_bytes: int


@dataclass(slots=True)
class Deviation:
    """Something accepted that no sender should write (specs/permissive.md)."""

    name: str
    first_offset: int
    count: int = field(default=1)
