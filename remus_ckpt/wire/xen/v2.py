"""Xen's v2 stream: the one table of records, the headers, and what a stream says as frozen events (specs/xen-v2.md).

Since Xen 4.6. libxc's part holds memory and processors; libxl's, if present, surrounds it and holds the device
model. `V2Reader` makes these events, `V2Writer` takes them. What the legacy stream has too is an event of
`events`: `FileHeader`, `Batch` (PAGE_DATA), `TscInfo` and `EndOfStream`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import PageType
from remus_ckpt.wire.xen.chunks import ChunkId
from remus_ckpt.wire.xen.dialect import FRONTS, V2_MAGIC, Guest
from remus_ckpt.wire.xen.events import Event

LIBXL_MAGIC = b"LibxlFmt"
XL_STREAM_V2 = 2
"""The bit of xl's mandatory flags that announces libxl's layer (specs/xen-v2.md §2)."""

IMAGE_HEADER = struct.Struct(">QIIHHI")
"""Marker, "XENF", version, options, two reserved fields: always big-endian (specs/xen-v2.md §3.1)."""
IMAGE_MARKER, IMAGE_ID = 0xFFFFFFFFFFFFFFFF, 0x58454E46
IMAGE_VERSIONS = (2, 3)
BIG_ENDIAN = 1
"""The bit of the options in both headers."""
DOMAIN_HEADER = struct.Struct("<IHHII")
"""Type of guest, page shift, reserved, Xen's version: major (0: converted) and minor (specs/xen-v2.md §3.2)."""
GUESTS: dict[int, Guest] = {1: "pv", 2: "hvm"}
PAGE_SHIFT = 12
LIBXL_HEADER = struct.Struct(">8sII")
"""Magic, version, options: always big-endian (specs/xen-v2.md §2)."""
LIBXL_VERSION = 2
LIBXL_CONVERTED = 2
"""The bit of libxl's options that says: converted from the legacy stream."""

SUSPEND_MAGIC = b"XenSavedDomv2-\n"
SUSPEND_RECORD = struct.Struct("<2Q")
"""Type and length of a record of a suspend image of XenServer's (specs/xen-v2.md §2.1)."""


class Suspend(IntEnum):
    """The types of its records."""

    XENOPS = 0x000F
    LIBXC = 0x00F0
    LIBXL = 0x00F1
    LIBXC_LEGACY = 0x00F2
    QEMU_TRAD = 0x0F00
    QEMU_XEN = 0x0F01
    DEMU = 0x0F10
    VARSTORED = 0x0F11
    SWTPM0 = 0x0F12
    SWTPM = 0x0F13
    END_OF_IMAGE = 0xFFFF


RECORD = struct.Struct("<II")
"""Type and length of the body; zeros follow it up to a multiple of 8 (specs/xen-v2.md §4)."""
ALIGNMENT = 8
OPTIONAL = 0x80000000
"""The bit of a type that lets a reader pass over the record if it does not know it."""
PAGE_DATA_HEAD = struct.Struct("<II")
PFN_MASK = (1 << 52) - 1
RESERVED_MASK = ((1 << 60) - 1) & ~PFN_MASK
TYPE_SHIFT = 60
PV_INFO = struct.Struct("<BBHI")
P2M_FRAMES_HEAD = struct.Struct("<II")
VCPU_HEAD = struct.Struct("<II")
TSC_INFO = struct.Struct("<IIQII")
HVM_PARAMS_HEAD = struct.Struct("<II")
HVM_PARAM = struct.Struct("<QQ")
EMULATOR_HEAD = struct.Struct("<II")
EMULATORS = {0: "unknown", 1: "QEMU traditional", 2: "QEMU upstream"}
CPUID_LEAF_BYTES, MSR_ENTRY_BYTES = 24, 16

KNOWN_TYPE = np.ones(16, dtype=bool)
"""bool[16]: the page types of PAGE_DATA; the legacy stream also has the pinned normal page (specs/xen-v2.md §5.1)."""
KNOWN_TYPE[[5, 6, 7, PageType.NOTAB_PINNED]] = False
KNOWN_TYPE.flags.writeable = False


class Layer(Enum):
    """The layer that wrote a record."""

    LIBXC = "libxc"
    LIBXL = "libxl"


class Layout(Enum):
    """What the body of a record is."""

    EMPTY = "nothing"
    PAGES = "u32 count, u32 0, u64 entry[count], pages"
    PV_INFO = "u8 width, u8 levels, u16 0, u32 0"
    P2M_FRAMES = "u32 first, u32 last, u64 pfn[]"
    VCPU = "u32 id, u32 0, bytes"
    TSC_INFO = "u32 mode, u32 khz, u64 nsec, u32 incarnation, u32 0"
    PARAMS = "u32 count, u32 0, count × (u64 index, u64 value)"
    BYTES = "bytes"
    EMULATOR = "u32 id, u32 index, bytes"
    REFUSED = "never in a file"


class Kind(Enum):
    """The types of records; the value is the layer and the number."""

    END = Layer.LIBXC, 0x00
    PAGE_DATA = Layer.LIBXC, 0x01
    X86_PV_INFO = Layer.LIBXC, 0x02
    X86_PV_P2M_FRAMES = Layer.LIBXC, 0x03
    X86_PV_VCPU_BASIC = Layer.LIBXC, 0x04
    X86_PV_VCPU_EXTENDED = Layer.LIBXC, 0x05
    X86_PV_VCPU_XSAVE = Layer.LIBXC, 0x06
    SHARED_INFO = Layer.LIBXC, 0x07
    X86_TSC_INFO = Layer.LIBXC, 0x08
    HVM_CONTEXT = Layer.LIBXC, 0x09
    HVM_PARAMS = Layer.LIBXC, 0x0A
    TOOLSTACK = Layer.LIBXC, 0x0B
    X86_PV_VCPU_MSRS = Layer.LIBXC, 0x0C
    VERIFY = Layer.LIBXC, 0x0D
    CHECKPOINT = Layer.LIBXC, 0x0E
    CHECKPOINT_DIRTY_PFN_LIST = Layer.LIBXC, 0x0F
    STATIC_DATA_END = Layer.LIBXC, 0x10
    X86_CPUID_POLICY = Layer.LIBXC, 0x11
    X86_MSR_POLICY = Layer.LIBXC, 0x12
    LIBXL_END = Layer.LIBXL, 0x00
    LIBXC_CONTEXT = Layer.LIBXL, 0x01
    EMULATOR_XENSTORE_DATA = Layer.LIBXL, 0x02
    EMULATOR_CONTEXT = Layer.LIBXL, 0x03
    CHECKPOINT_END = Layer.LIBXL, 0x04
    CHECKPOINT_STATE = Layer.LIBXL, 0x05


@dataclass(frozen=True, slots=True)
class RecordKind:
    """One row of the table.

    guest: the only kind of guest that may have the record, None for both
    limit: the name of the limit on its body, in `Limits`
    unit: its body is a multiple of this many bytes
    size: its body has exactly this many bytes, None: any number
    least_version: the first version of the image header whose streams may have it
    """

    kind: Kind
    layout: Layout
    section: str
    guest: Guest | None = None
    limit: str = "record_bytes"
    unit: int = 1
    size: int | None = None
    least_version: int = 2


RECORDS: dict[tuple[Layer, int], RecordKind] = {
    row.kind.value: row
    for row in (
        RecordKind(Kind.END, Layout.EMPTY, "xen-v2.md §5.12"),
        RecordKind(Kind.PAGE_DATA, Layout.PAGES, "xen-v2.md §5.1"),
        RecordKind(Kind.X86_PV_INFO, Layout.PV_INFO, "xen-v2.md §5.2", "pv"),
        RecordKind(Kind.X86_PV_P2M_FRAMES, Layout.P2M_FRAMES, "xen-v2.md §5.3", "pv"),
        RecordKind(Kind.X86_PV_VCPU_BASIC, Layout.VCPU, "xen-v2.md §5.4", "pv", "vcpu_record_bytes"),
        RecordKind(Kind.X86_PV_VCPU_EXTENDED, Layout.VCPU, "xen-v2.md §5.4", "pv", "vcpu_record_bytes"),
        RecordKind(Kind.X86_PV_VCPU_XSAVE, Layout.VCPU, "xen-v2.md §5.4", "pv", "vcpu_record_bytes"),
        RecordKind(Kind.SHARED_INFO, Layout.BYTES, "xen-v2.md §5.5", "pv", size=4096),
        RecordKind(Kind.X86_TSC_INFO, Layout.TSC_INFO, "xen-v2.md §5.6"),
        RecordKind(Kind.HVM_CONTEXT, Layout.BYTES, "xen-v2.md §5.7", "hvm", "hvm_context_bytes"),
        RecordKind(Kind.HVM_PARAMS, Layout.PARAMS, "xen-v2.md §5.8", "hvm", "toolstack_bytes"),
        RecordKind(Kind.TOOLSTACK, Layout.BYTES, "xen-v2.md §5.9", None, "toolstack_bytes"),
        RecordKind(Kind.X86_PV_VCPU_MSRS, Layout.VCPU, "xen-v2.md §5.4", "pv", "vcpu_record_bytes"),
        RecordKind(Kind.VERIFY, Layout.EMPTY, "xen-v2.md §5.11"),
        RecordKind(Kind.CHECKPOINT, Layout.EMPTY, "xen-v2.md §5.12"),
        RecordKind(Kind.CHECKPOINT_DIRTY_PFN_LIST, Layout.REFUSED, "xen-v2.md §5.13"),
        RecordKind(Kind.STATIC_DATA_END, Layout.EMPTY, "xen-v2.md §5.10", least_version=3),
        RecordKind(
            Kind.X86_CPUID_POLICY,
            Layout.BYTES,
            "xen-v2.md §5.10",
            None,
            "toolstack_bytes",
            unit=CPUID_LEAF_BYTES,
            least_version=3,
        ),
        RecordKind(
            Kind.X86_MSR_POLICY,
            Layout.BYTES,
            "xen-v2.md §5.10",
            None,
            "toolstack_bytes",
            unit=MSR_ENTRY_BYTES,
            least_version=3,
        ),
        RecordKind(Kind.LIBXL_END, Layout.EMPTY, "xen-v2.md §6"),
        RecordKind(Kind.LIBXC_CONTEXT, Layout.EMPTY, "xen-v2.md §6"),
        RecordKind(Kind.EMULATOR_XENSTORE_DATA, Layout.EMULATOR, "xen-v2.md §6.1", None, "toolstack_bytes"),
        RecordKind(Kind.EMULATOR_CONTEXT, Layout.EMULATOR, "xen-v2.md §6.2", None, "device_state_bytes"),
        RecordKind(Kind.CHECKPOINT_END, Layout.EMPTY, "xen-v2.md §6.3"),
        RecordKind(Kind.CHECKPOINT_STATE, Layout.REFUSED, "xen-v2.md §6.4"),
    )
}


class Parameter(NamedTuple):
    """An HVM parameter: its number in v2 and, where the legacy stream has a chunk for it, the chunk."""

    number: int
    name: str
    chunk: ChunkId | None


STORE_PFN, PAE_ENABLED, IOREQ_PFN, BUFIOREQ_PFN = 1, 4, 5, 6
MAGIC_PARAMETERS = (IOREQ_PFN, BUFIOREQ_PFN, STORE_PFN)
"""The three magic PFNs of a legacy tail, in its order."""
PARAMETERS = (
    Parameter(0, "CALLBACK_IRQ", None),
    Parameter(STORE_PFN, "STORE_PFN", None),
    Parameter(2, "STORE_EVTCHN", None),
    Parameter(PAE_ENABLED, "PAE_ENABLED", None),
    Parameter(IOREQ_PFN, "IOREQ_PFN", None),
    Parameter(BUFIOREQ_PFN, "BUFIOREQ_PFN", None),
    Parameter(9, "HVM_VIRIDIAN", ChunkId.HVM_VIRIDIAN),
    Parameter(10, "TIMER_MODE", None),
    Parameter(11, "HPET_ENABLED", None),
    Parameter(12, "HVM_IDENT_PT", ChunkId.HVM_IDENT_PT),
    Parameter(14, "ACPI_S_STATE", None),
    Parameter(15, "HVM_VM86_TSS", ChunkId.HVM_VM86_TSS),
    Parameter(16, "VPT_ALIGN", None),
    Parameter(17, "HVM_CONSOLE_PFN", ChunkId.HVM_CONSOLE_PFN),
    Parameter(18, "CONSOLE_EVTCHN", None),
    Parameter(19, "HVM_ACPI_IOPORTS_LOCATION", ChunkId.HVM_ACPI_IOPORTS_LOCATION),
    Parameter(24, "NESTEDHVM", None),
    Parameter(27, "HVM_PAGING_RING_PFN", ChunkId.HVM_PAGING_RING_PFN),
    Parameter(28, "HVM_ACCESS_RING_PFN", ChunkId.HVM_ACCESS_RING_PFN),
    Parameter(29, "HVM_SHARING_RING_PFN", ChunkId.HVM_SHARING_RING_PFN),
    Parameter(32, "HVM_IOREQ_SERVER_PFN", ChunkId.HVM_IOREQ_SERVER_PFN),
    Parameter(33, "HVM_NR_IOREQ_SERVER_PAGES", ChunkId.HVM_NR_IOREQ_SERVER_PAGES),
    Parameter(34, "HVM_GENERATION_ID_ADDR", ChunkId.HVM_GENERATION_ID_ADDR),
    Parameter(35, "ALTP2M", None),
    Parameter(36, "HVM_X87_FIP_WIDTH", ChunkId.HVM_X87_FIP_WIDTH),
    Parameter(37, "VM86_TSS_SIZED", None),
    Parameter(38, "MCA_CAP", None),
)
"""The parameters that have a name here; the name of one with a chunk is the chunk's (specs/xen-v2.md §5.8)."""
PARAMETER_NAMES = {row.number: row.name for row in PARAMETERS}
PARAMETER_NUMBERS = {row.name: row.number for row in PARAMETERS}
PARAMETER_CHUNKS = {row.number: row.chunk for row in PARAMETERS if row.chunk is not None}


def parameter_name(number: int) -> str:
    """The name of a parameter; one without a name is called by its number."""
    return PARAMETER_NAMES.get(number, f"HVM_PARAM_{number}")


def parameter_number(name: str) -> int:
    """The number of a parameter that `parameter_name` named."""
    return PARAMETER_NUMBERS[name] if name in PARAMETER_NUMBERS else int(name.removeprefix("HVM_PARAM_"))


LOOK_BYTES = 48
"""How many first bytes distinguish a v2 stream: xl's header has its flags there."""


def is_v2(front: bytes) -> bool:
    """Whether a v2 stream begins with these bytes, up to `LOOK_BYTES` of them."""
    if front.startswith((V2_MAGIC, LIBXL_MAGIC, SUSPEND_MAGIC)):
        return True
    if front.startswith(FRONTS["xl"].magic) and len(front) >= 40:
        return bool(int.from_bytes(front[36:40], "little") & XL_STREAM_V2)
    return front.startswith(FRONTS["libvirt"].magic) and front[16:20] == b"\2\0\0\0"


def padding(size: int) -> int:
    """How many zeros follow a body of this size."""
    return -size % ALIGNMENT


# What only a v2 stream says


@dataclass(frozen=True, slots=True, kw_only=True)
class LibxlHeader(Event):
    """The header of libxl's layer (specs/xen-v2.md §2)."""

    options: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader(Event):
    """Both headers of libxc's layer (specs/xen-v2.md §3). xen: major and minor version; major 0: converted."""

    version: Literal[2, 3] = 2
    guest: Guest
    xen: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PvInfo(Event):
    """X86_PV_INFO (specs/xen-v2.md §5.2). width: bytes of the guest's word; levels: of its page tables."""

    width: int
    levels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class P2mFrames(Event):
    """X86_PV_P2M_FRAMES (specs/xen-v2.md §5.3). pfns: uint64[n]; last: the highest PFN of memory."""

    first: int
    last: int
    pfns: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuState(Event):
    """X86_PV_VCPU_BASIC, _EXTENDED, _XSAVE or _MSRS (specs/xen-v2.md §5.4)."""

    kind: Kind
    vcpu: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmParams(Event):
    """HVM_PARAMS (specs/xen-v2.md §5.8): (number, value) of each."""

    values: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Event):
    """Any other record: `data` is its whole body, empty for those that only mark a place."""

    kind: Kind
    data: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulator(Event):
    """EMULATOR_CONTEXT or EMULATOR_XENSTORE_DATA (specs/xen-v2.md §6.1, §6.2). emulator: which, see `EMULATORS`."""

    kind: Kind
    emulator: int = 0
    index: int = 0
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver(Event):
    """An optional record of a type that is not known here (specs/xen-v2.md §4.1)."""

    layer: Layer
    type: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendRecord(Event):
    """A record of XenServer's suspend image that is passed over (specs/xen-v2.md §2.1)."""

    type: Suspend
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel(Event):
    """The device model's record behind libxc's END, as Xen's own converter writes it (specs/xen-v2.md §5.14)."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Border(Event):
    """The end of a checkpoint, after its last record. end: the first byte after it."""

    end: int
    is_last: bool
