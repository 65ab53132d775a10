"""Bytes to events for the CONFIGURATION, and for the live sections other than ram (specs/qemu-ram.md §3, §6)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from remus_ckpt.wire.qemu import events, sections
from remus_ckpt.wire.qemu.sections import U16, U32, U64, BitmapFlag, SectionType, StorageFlag

if TYPE_CHECKING:
    from remus_ckpt.wire.qemu.reader import Reader

Parser = Generator[events.Event | None, None, None]
_UUID_BYTES = 16
_MOST_CAPABILITIES = 1024


def configuration(reader: Reader) -> Parser:
    """§3"""
    inbox = reader.inbox
    start = inbox.offset
    inbox.skip(1)
    (size,) = yield from inbox.unpack(U32)
    reader.limit(size, "machine_name_bytes", start, "the length of the machine's name", "§3")
    name = yield from inbox.array(size)
    reader.machine = name.tobytes().decode("utf-8", "backslashreplace")
    found: dict[str, Any] = {}
    while True:
        front = yield from inbox.peek(1)
        if front != bytes([SectionType.SUBSECTION]):
            break
        here = inbox.offset
        inbox.skip(1)
        what = yield from reader.string()
        yield from inbox.unpack(U32)  # its version
        match what:
            case "configuration/target-page-bits":
                (bits,) = yield from inbox.unpack(U32)
                reader.state_page_size(1 << min(bits, 62), here, "§3")
                found["page_size"] = reader.page_size
            case "configuration/capabilities":
                found["capabilities"] = yield from _capabilities(reader, here)
            case "configuration/uuid":
                uuid = yield from inbox.array(_UUID_BYTES)
                found["uuid"] = uuid.tobytes()
            case _:
                reader.unknown(f"the configuration has the subsection {what!r}", here, "§3", "CONFIGURATION")
    reader.capabilities = frozenset(found.get("capabilities", ()))
    yield events.Configuration(offset=start, machine=reader.machine, **found)


def _capabilities(reader: Reader, here: int) -> Generator[None, None, tuple[str, ...]]:
    (count,) = yield from reader.inbox.unpack(U32)
    if count > _MOST_CAPABILITIES:
        reader.refuse(f"{count} capabilities", here, "§3", "CONFIGURATION")
    names = []
    for _ in range(count):
        name = yield from reader.string()
        names.append(name)
    for name in names:
        if name not in sections.CAPABILITIES:
            reader.unknown(f"the capability {name!r} changes the stream", here, "§3", "CONFIGURATION")
    return tuple(names)


def dirty_bitmap(reader: Reader) -> Parser:
    """§6.1: passed over."""
    inbox = reader.inbox
    while True:
        start = inbox.offset
        yield from inbox.have(1)
        flags = inbox.front(1)[0]
        inbox.skip(1)
        if flags & BitmapFlag.EXTRA:
            yield from inbox.have(1)
            more = inbox.front(1)[0]
            inbox.skip(1)
            flags = flags & ~BitmapFlag.EXTRA | more << 8
            if more & BitmapFlag.EXTRA:
                yield from inbox.unpack(U16)
        if flags >> 8:
            reader.unknown(f"a dirty bitmap with the flags {flags:#x}", start, "§6.1", "dirty-bitmap")
        if flags & BitmapFlag.DEVICE_NAME:
            yield from reader.string()
        if flags & BitmapFlag.BITMAP_NAME:
            yield from reader.string()
        if flags & BitmapFlag.START:
            yield from inbox.unpack(U32)  # granularity
            yield from inbox.have(1)
            inbox.skip(1)
        elif flags & BitmapFlag.BITS:
            yield from inbox.unpack(U64)
            yield from inbox.unpack(U32)
            if not flags & BitmapFlag.ZEROES:
                (size,) = yield from inbox.unpack(U64)
                yield from reader.drop(size)
        elif not flags & (BitmapFlag.COMPLETE | BitmapFlag.EOS):
            reader.refuse(f"a dirty bitmap with the flags {flags:#x}", start, "§6.1", "dirty-bitmap")
        if flags & BitmapFlag.EOS:
            return


def storage_attributes(reader: Reader) -> Parser:
    """§6.2: passed over."""
    while True:
        start = reader.inbox.offset
        (word,) = yield from reader.inbox.unpack(U64)
        match word & 0xFFF:
            case StorageFlag.EOS:
                return
            case StorageFlag.MORE:
                (size,) = yield from reader.inbox.unpack(U64)
                yield from reader.drop(size)
            case StorageFlag.DONE:
                pass
            case flags:
                reader.refuse(f"storage attributes with the flags {flags:#x}", start, "§6.2", "s390-storage_attributes")
