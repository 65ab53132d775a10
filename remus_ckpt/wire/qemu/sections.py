"""The tables of QEMU's migration stream: sections, commands, flags of a RAM word (specs/qemu-ram.md §2 to §5)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

MAGIC = b"QEVM"
VERSION = 3

U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
HEADER = struct.Struct(">4sI")  # magic, version
COMMAND = struct.Struct(">HH")  # number, bytes of data
SECTION_END = struct.Struct(">II")  # instance, version
MAPPED = struct.Struct(">I3Q")  # version, page size, offsets of bitmap and pages


class SectionType(IntEnum):
    """The first byte of everything after the header (§2)."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RamFlag(IntFlag):
    """The low bits of a word of the section `ram` (§4)."""

    FULL = 0x001
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


REFUSED_FLAGS = {
    RamFlag.FULL: "a full copy of 2009 (flag FULL)",
    RamFlag.HOOK: "migration over RDMA",
    RamFlag.COMPRESS_PAGE: "page compression (capability compress, removed in QEMU 9.1)",
}
"""Flags that say that memory travels in a way that is not read here."""

RAM_VERSION = 4
XBZRLE_ENCODING = 1


class Command(IntEnum):
    """What a COMMAND section asks of the destination (§2.5)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


REFUSED_COMMANDS = {
    Command.POSTCOPY_LISTEN: "postcopy",
    Command.POSTCOPY_RUN: "postcopy",
    Command.POSTCOPY_RAM_DISCARD: "postcopy",
    Command.PACKAGED: "postcopy",
    Command.POSTCOPY_RESUME: "postcopy",
    Command.RECV_BITMAP: "postcopy",
    Command.ENABLE_COLO: "COLO",
}
"""Commands after which memory does not come in this stream alone."""

MAPPED_RAM, IGNORE_SHARED = "mapped-ram", "x-ignore-shared"
CAPABILITIES = {MAPPED_RAM, IGNORE_SHARED}
"""The capabilities that a CONFIGURATION names and that change what follows (§3)."""

PAGE_BITS = range(10, 17)
"""Page sizes of QEMU's targets: 1 KiB (arm) to 64 KiB."""
PAGE_SIZES = tuple(1 << bits for bits in PAGE_BITS)

MACHINES_4K = ("pc-", "pc_", "q35", "microvm", "isapc", "xenfv", "xenpv", "s390-ccw-virtio", "pseries", "none")
"""How the machines begin whose target has one page size, 4 KiB: they state none. The last is what we write for memory
that is no machine."""

LIVE_SECTIONS = ("ram", "dirty-bitmap", "s390-storage_attributes")
"""Sections that come in parts and are read; any other is refused by its name (§6)."""


class BitmapFlag(IntFlag):
    """The flags of the section `dirty-bitmap` (§6.1)."""

    EOS = 0x01
    ZEROES = 0x02
    BITMAP_NAME = 0x04
    DEVICE_NAME = 0x08
    START = 0x10
    COMPLETE = 0x20
    BITS = 0x40
    EXTRA = 0x80


class StorageFlag(IntFlag):
    """The flags of a word of `s390-storage_attributes` (§6.2)."""

    EOS = 0x01
    MORE = 0x02
    ERROR = 0x04
    DONE = 0x08


class ChannelFlag(IntFlag):
    """The flags of a multifd packet (§7.2)."""

    SYNC = 0x01
    ZLIB = 0x02
    ZSTD = 0x04


CHANNEL_FLAGS_REFUSED = {0x08: "QPL", 0x10: "UADK", 0x20: "QATzip"}

CHANNEL_MAGIC = 0x11223344
CHANNEL_VERSION = 1
CHANNEL_HELLO = struct.Struct(">2I16sB7x32x")  # magic, version, uuid, channel
PACKET_HEAD = struct.Struct(">6IQI28x256s")
"""Magic, version, flags, room, normal pages, bytes that follow, number, zero pages, block."""
PACKET_BYTES = 512 << 10
"""Guest memory that a packet has room for: its list of offsets has this many bytes over the page size."""
