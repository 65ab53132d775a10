"""The device sections of a QEMU stream, and the JSON that describes them (specs/qemu-ram.md §2.4)."""

from __future__ import annotations

import json
from typing import Any

from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.sections import U32, SectionType

_FRONT = bytes([SectionType.EOF, SectionType.DESCRIPTION])
_FOOTER_BYTES = 5
_TRIES = 8
"""So many pieces of JSON are read at most, to find the description."""


def split(tail: bytes, offset: int, most: int) -> tuple[events.DeviceState | None, int]:
    """The device sections in the last part of a stream.

    tail: from the type of the first device section to the end of the bytes
    offset: of the tail in the stream
    most: bytes that a description may have
    Returns them, None if the end of the stream is not there, and how many bytes of the tail they take with that end.
    """
    at, description, size = _find_description(tail, most)
    if description is not None:
        found = events.DeviceState(
            offset=offset, data=tail[:at], description=description, devices=_locate(tail[:at], offset, description)
        )
        return found, size
    if tail == b"\0" or (tail.endswith(b"\0") and tail[-1 - _FOOTER_BYTES : -_FOOTER_BYTES] == b"\x7e"):
        return events.DeviceState(offset=offset, data=tail[:-1]), len(tail)
    return None, 0


def description_of(end: bytes, most: int) -> dict[str, Any] | None:
    """The JSON description, from the last bytes of a stream; None if it is not there as a whole."""
    return _find_description(end, most)[1]


def _find_description(tail: bytes, most: int) -> tuple[int, dict[str, Any] | None, int]:
    """Where the device sections end, the description after them, and where that ends."""
    at, tries = len(tail), 0
    while tries < _TRIES and (at := tail.rfind(_FRONT, 0, at)) >= 0:
        begin = at + len(_FRONT) + U32.size
        if tail[begin : begin + 1] != b"{":
            continue
        (size,) = U32.unpack_from(tail, begin - U32.size)
        stop = begin + size
        if stop > len(tail) or size > most or tail[stop - 1 : stop] != b"}":
            continue
        tries += 1
        try:
            found = json.loads(tail[begin:stop])
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return at, found, stop
    return 0, None, 0


def _locate(data: bytes, offset: int, description: dict[str, Any]) -> tuple[events.Device, ...] | None:
    """Where each section begins and ends: none is found unless all of them are."""
    starts: list[tuple[int, str, int, int]] = []
    listed = description.get("devices")
    if not isinstance(listed, list):
        return None
    at = 0
    for device in listed:
        name = device.get("name") if isinstance(device, dict) else None
        instance = device.get("instance_id") if isinstance(device, dict) else None
        if not isinstance(name, str) or not isinstance(instance, int) or not 0 <= instance < 1 << 32:
            return None
        key = name.encode("utf-8", "surrogatepass")  # JSON may hold half a surrogate, which no section's name is
        wanted = bytes([len(key) & 0xFF]) + key + U32.pack(instance)
        while True:
            found = data.find(wanted, at)
            if found < 0:
                return None
            at = found + 1
            begin = found - 1 - U32.size
            if begin < 0 or data[begin] != SectionType.FULL:
                continue
            if not begin or data[begin - _FOOTER_BYTES] == SectionType.FOOTER:
                break
        if len(data) < found + len(wanted) + U32.size:
            return None
        (version,) = U32.unpack_from(data, found + len(wanted))
        starts.append((begin, name, instance, version))
    if not starts or starts[0][0]:
        return None if data else ()
    stops = [start for start, *_ in starts[1:]] + [len(data)]
    return tuple(
        events.Device(name=name, instance=instance, version=version, offset=offset + begin, size=stop - begin)
        for (begin, name, instance, version), stop in zip(starts, stops, strict=True)
    )
