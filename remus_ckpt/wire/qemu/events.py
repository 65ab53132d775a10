"""What a QEMU migration stream says, as frozen events. `offset` is where an event's bytes begin in the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PartKind = Literal["START", "PART", "END"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of all events."""

    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Header(Event):
    """The magic and the version (specs/qemu-ram.md §2.1)."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration(Event):
    """The machine, and what its subsections state (§3); None for what is not stated."""

    machine: str
    page_size: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Event):
    """A COMMAND (§2.5)."""

    number: int
    name: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Section(Event):
    """The head of a live section or of one of its parts (§2.2)."""

    kind: PartKind
    id: int
    name: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlock(Event):
    """One block of memory (§4.1). All come before the first page, but in a mapped-ram file each before its own.

    size: in bytes
    page_size: of the target, in bytes
    address: in the guest's memory, only with x-ignore-shared
    """

    name: str
    size: int
    page_size: int
    address: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pages(Event):
    """Pages of one block (§4.2). No page occurs twice in an event, so its three parts may be applied in any order.

    block: its name
    data: the buffer that holds the full pages, valid until the reader's next `get_buffer`
    full: int64[n], numbers of the pages that come whole …
    places: int64[n] … and where each of them begins in `data`
    zero: int64[m], numbers of the pages that are one byte repeated …
    fills: uint8[m] … and that byte
    encoded: int64[k], numbers of the pages encoded by XBZRLE …
    frames: their frames, back to back as `codec.xbzrle` frames them …
    frame_offsets: int64[k] … and where each frame begins in the stream
    """

    block: str
    data: memoryview
    full: NDArray[np.int64]
    places: NDArray[np.int64]
    zero: NDArray[np.int64]
    fills: NDArray[np.uint8]
    encoded: NDArray[np.int64]
    frames: bytes
    frame_offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped(Event):
    """A block of a mapped-ram file: how many pages the bitmap has, and how many are absent, which are zeros (§5)."""

    block: str
    present: int
    absent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark(Event):
    """A point up to which multifd channels may have to be drained (§7.3): MULTIFD_FLUSH, or the end of a section."""

    kind: Literal["flush", "eos"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEnd(Event):
    """Nothing about memory follows: it is whole (§2.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device section, located by the JSON description (§2.4)."""

    name: str
    instance: int
    version: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState(Event):
    """All device sections, as the stream has them (§2.4).

    data: from the first section's type to the end of the last section
    description: the JSON behind them, None if there is none
    devices: the sections, None if they cannot be told apart
    """

    data: bytes
    description: dict[str, Any] | None = None
    devices: tuple[Device, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfStream(Event):
    """The end of the bytes; offset: how many there were.

    complete: whether the stream's own end came
    trailing_bytes: behind that end, or behind the last whole item if it did not come
    """

    complete: bool
    trailing_bytes: int
