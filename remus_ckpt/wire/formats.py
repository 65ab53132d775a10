"""Which format a file has, by its first bytes: the one place that knows (specs/formats.md §2)."""

from __future__ import annotations

from dataclasses import dataclass

FRONT_BYTES = 16
"""Enough bytes for every magic, and for the header of a legacy save stream."""


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table.

    word: its name in reports and options; None for what is recognized but not read
    magic: its first bytes
    title: what to call it in a sentence
    """

    word: str | None
    magic: bytes
    title: str


FORMATS = (
    Format("qemu", b"QEVM", "a QEMU migration stream"),
    Format("virsh-save", b"LibvirtQemudSave", "a QEMU guest that libvirt has saved"),
    Format("virsh-save", b"LibvirtQemudPart", "a QEMU guest that libvirt has not finished saving"),
    Format("qcow2", b"QFI\xfb", "a qcow2 disk image"),
    Format("multifd", b"\x11\x22\x33\x44\0\0\0\x01", "one of the other connections of a QEMU multifd migration"),
    Format("elf", b"\x7fELF", "an ELF file"),
    Format("lime", b"EMiL", "memory in LiME format"),
    Format(None, b"AVML", "a compressed AVML dump (turn it into LiME format with `avml-convert`)"),
    Format("xen-v2", b"XenSavedDomv2-\n", "a guest saved by XenServer 6.5 or later, in its own format"),
    Format("xen-v2", b"LibxlFmt", "a libxl v2 stream (from Xen 4.6 on)"),
    Format(None, b"\x28\xb5\x2f\xfd", "zstd data (decompress it, and read the result)"),
    Format(None, b"\xfd7zXZ\0", "xz data (decompress it, and read the result)"),
    Format(None, b"\x1f\x8b", "gzip data (decompress it, and read the result)"),
    Format(None, b"BZh", "bzip2 data (decompress it, and read the result)"),
    Format(None, b"\x04\x22\x4d\x18", "lz4 data (decompress it, and read the result)"),
    Format(None, b"\x89LZO\0\r\n", "lzop data (decompress it with `lzop -dc`)"),
    Format(None, b"\x5d\0\0", "lzma data in its original format (decompress it with `xz -dc`)"),
    Format(None, b"\x02\x21\x4c\x18", "lz4 data in the legacy frame format (decompress it with `lz4 -dc`)"),
)
DUMP_WORDS = ("elf", "lime")
"""The formats that hold memory by physical address."""
MACHINE_WORDS = ("qemu", "virsh-save", "qcow2", "multifd", *DUMP_WORDS)
"""The formats that hold one state of one machine, or a part of it."""


def find(front: bytes) -> Format | None:
    """The format of a file that begins with these bytes; None for a legacy save stream, or what nobody knows."""
    return next((row for row in FORMATS if front.startswith(row.magic)), None)
