"""What libxl's toolstack says about the device model's memory: in the legacy stream's TOOLSTACK (specs/stream.md §4.6),
and as keys and values in EMULATOR_XENSTORE_DATA (specs/xen-v2.md §6.1)."""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<II")
_ENTRY = struct.Struct("<QQQI")
_VERSION = 1
_MOST_ENTRIES = 1 << 16


def to_xenstore(toolstack: bytes, word: int) -> bytes | None:
    """The keys and values, each ended by a NUL, that a TOOLSTACK of libxl's contains; None if it is not one.

    word: bytes of the toolstack's unsigned long; with 8, four bytes of padding follow each name
    """
    if len(toolstack) < _HEAD.size:
        return None
    version, count = _HEAD.unpack_from(toolstack)
    if version != _VERSION or count > _MOST_ENTRIES:
        return None
    at, parts = _HEAD.size, []
    for _ in range(count):
        if len(toolstack) < at + _ENTRY.size:
            return None
        physical, start, size, length = _ENTRY.unpack_from(toolstack, at)
        at += _ENTRY.size
        name = toolstack[at : at + length]
        if len(name) < length or not name.endswith(b"\0") or b"\0" in name[:-1]:
            return None
        at += length + (4 if word == 8 else 0)
        root = f"physmap/{physical:x}/"
        for key, value in (("start_addr", f"{start:x}"), ("size", f"{size:x}")):
            parts.append(f"{root}{key}\0{value}\0".encode())
        parts.append(f"{root}name\0".encode() + name)
    return b"".join(parts) if at == len(toolstack) else None


def to_toolstack(xenstore: bytes, word: int) -> bytes | None:
    """The TOOLSTACK that these keys and values stand for; None if they hold anything else."""
    fields = xenstore.removesuffix(b"\0").split(b"\0") if xenstore else []
    if len(fields) % 2:
        return None
    found: dict[int, dict[bytes, bytes]] = {}
    for key, value in zip(fields[::2], fields[1::2], strict=True):
        parts = key.split(b"/")
        try:
            if len(parts) != 3 or parts[0] != b"physmap":
                return None
            found.setdefault(int(parts[1], 16), {})[parts[2]] = value
        except ValueError:
            return None
    out = [_HEAD.pack(_VERSION, len(found))]
    for physical, entry in found.items():
        try:
            start, size, name = int(entry[b"start_addr"], 16), int(entry[b"size"], 16), entry[b"name"] + b"\0"
            out.append(_ENTRY.pack(physical, start, size, len(name)) + name + bytes(4 if word == 8 else 0))
        except (KeyError, ValueError, struct.error):
            return None
    return b"".join(out)
