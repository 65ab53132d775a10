"""The one table of chunks, shared by `Reader` and `EventWriter` (specs/stream.md §4.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

MAX_P2M_SIZE = 0x0FFFFFFF
"""A PFN has 28 bits (specs/stream.md §3)."""
PFN_MASK = 0x0FFFFFFF
TYPE_SHIFT = 28
END_OF_BODY = 0


class ChunkId(IntEnum):
    """XC_SAVE_ID_*: the negative chunk ids. A positive id is the number of entries of a batch, 0 ends the body."""

    ENABLE_VERIFY_MODE = -1
    VCPU_INFO = -2
    HVM_IDENT_PT = -3
    HVM_VM86_TSS = -4
    TMEM = -5
    TMEM_EXTRA = -6
    TSC_INFO = -7
    HVM_CONSOLE_PFN = -8
    LAST_CHECKPOINT = -9
    HVM_ACPI_IOPORTS_LOCATION = -10
    HVM_VIRIDIAN = -11
    COMPRESSED_DATA = -12
    ENABLE_COMPRESSION = -13
    HVM_GENERATION_ID_ADDR = -14
    HVM_PAGING_RING_PFN = -15
    HVM_ACCESS_RING_PFN = -16
    HVM_SHARING_RING_PFN = -17
    TOOLSTACK = -18
    HVM_IOREQ_SERVER_PFN = -19
    HVM_NR_IOREQ_SERVER_PAGES = -20
    HVM_X87_FIP_WIDTH = -21


LOWEST_CHUNK_ID = min(ChunkId)


class Layout(Enum):
    """What follows a negative chunk id."""

    FLAG = "nothing"
    PARAM = "u32 pad, u64 value"
    VCPU_INFO = "i32 highest id, u64 map[highest // 64 + 1]"
    TSC_INFO = "u32 mode, u64 nsec, u32 khz, u32 incarnation"
    TMEM = "u32[7], pools"
    TMEM_EXTRA = "keys"
    BLOB = "u32 length, bytes"
    COMPRESSED = "word length, bytes"


@dataclass(frozen=True, slots=True)
class ChunkKind:
    """One row of the table."""

    id: ChunkId
    layout: Layout
    section: str

    @property
    def name(self) -> str:
        """The name of the id."""
        return self.id.name


CHUNKS: dict[int, ChunkKind] = {
    row.id: row
    for row in (
        ChunkKind(ChunkId.ENABLE_VERIFY_MODE, Layout.FLAG, "stream.md §4.7"),
        ChunkKind(ChunkId.VCPU_INFO, Layout.VCPU_INFO, "stream.md §4.2"),
        ChunkKind(ChunkId.HVM_IDENT_PT, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_VM86_TSS, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.TMEM, Layout.TMEM, "stream.md §4.4"),
        ChunkKind(ChunkId.TMEM_EXTRA, Layout.TMEM_EXTRA, "stream.md §4.4"),
        ChunkKind(ChunkId.TSC_INFO, Layout.TSC_INFO, "stream.md §4.5"),
        ChunkKind(ChunkId.HVM_CONSOLE_PFN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.LAST_CHECKPOINT, Layout.FLAG, "stream.md §4.7"),
        ChunkKind(ChunkId.HVM_ACPI_IOPORTS_LOCATION, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_VIRIDIAN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.COMPRESSED_DATA, Layout.COMPRESSED, "stream.md §6.2"),
        ChunkKind(ChunkId.ENABLE_COMPRESSION, Layout.FLAG, "stream.md §4.7"),
        ChunkKind(ChunkId.HVM_GENERATION_ID_ADDR, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_PAGING_RING_PFN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_ACCESS_RING_PFN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_SHARING_RING_PFN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.TOOLSTACK, Layout.BLOB, "stream.md §4.6"),
        ChunkKind(ChunkId.HVM_IOREQ_SERVER_PFN, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_NR_IOREQ_SERVER_PAGES, Layout.PARAM, "stream.md §4.3"),
        ChunkKind(ChunkId.HVM_X87_FIP_WIDTH, Layout.PARAM, "stream.md §4.3"),
    )
}

I32 = struct.Struct("<i")
U32 = struct.Struct("<I")
U32_BE = struct.Struct(">I")
LIBVIRT_HEADER = struct.Struct("<2I40x")  # version, length of the XML
U64 = struct.Struct("<Q")
PARAM = struct.Struct("<IQ")
TSC_INFO = struct.Struct("<IQII")
TMEM_HEADER = struct.Struct("<7I")
TMEM_POOL = struct.Struct("<3I2Q")  # pool id, flags, pages, uuid
TMEM_OID = struct.Struct("<3Q")
TMEM_ALL_ONES = 0xFFFFFFFF
TMEM_NO_OBJECT = (0xFFFFFFFFFFFFFFFF,) * 3
HVM_MAGIC_PFNS = struct.Struct("<3Q")
XSAVE_HEADER = struct.Struct("<2Q")

SIGNATURE_BYTES = 21


class Signature(bytes, Enum):
    """The opening of the device model's record in an HVM guest's tail (specs/stream.md §7.2)."""

    QEMU = b"QemuDeviceModelRecord"
    """The rest of the stream is the state: no checkpoint can come after it."""
    XENSERVER = b"QemuDeviceModelRecord\n"
    """Its big-endian length follows; no checkpoint can come after it."""
    XL = b"DeviceModelRecord0002"
    REMUS = b"RemusDeviceModelState"


QEMU_MAGIC = b"QEVM"

EXTENDED_INFO_MARK = {8: 0xFFFFFFFFFFFFFFFF, 4: 0xFFFFFFFF}
VCPU_CONTEXT_BYTES = {5168: 8, 2800: 4}
"""Size of a PV virtual CPU's context → bytes of the guest's word (specs/stream.md §3.3)."""
EXTENDED_CONTEXT_BYTES = 128


def p2m_frames(p2m_size: int, guest_word: int) -> int:
    """Entries in the p2m frame list (specs/stream.md §3.4)."""
    return -(-p2m_size // (4096 // guest_word))


def tmem_page_bytes(pool_flags: int) -> int:
    """Bytes in a page of a TMEM pool (specs/stream.md §4.4)."""
    return 4096 << (pool_flags >> 4 & 0xF)
