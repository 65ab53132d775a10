"""Events to bytes for QEMU's migration stream (specs/qemu-ram.md): a stopped guest, pages whole or zero. No I/O.

`stream` gives a migration stream, `mapped_file` a mapped-ram file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Buffer
from remus_ckpt.wire.qemu import events, sections
from remus_ckpt.wire.qemu.sections import IGNORE_SHARED, MAPPED_RAM, U32, U64, RamFlag, SectionType

WORD_BYTES = U64.size
"""Of the word in front of every page."""
_MAPPED_VERSION = 1
_WINDOW_PAGES = 256
MAPPED_ALIGNMENT = 1 << 20
"""Where the pages of a block begin in a mapped-ram file, as QEMU has it."""


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return bytes([len(data)]) + data


def front(configuration: events.Configuration | None, is_mapped: bool) -> bytes:
    """The header and the configuration (§2.1, §3). None: no configuration, as with send-configuration=off."""
    data = sections.HEADER.pack(sections.MAGIC, sections.VERSION)
    if configuration is None:
        return data
    name = configuration.machine.encode("utf-8", "surrogateescape")
    data += bytes([SectionType.CONFIGURATION]) + U32.pack(len(name)) + name
    if configuration.page_size is not None:
        bits = configuration.page_size.bit_length() - 1
        data += _subsection("target-page-bits") + U32.pack(bits)
    kept = [one for one in configuration.capabilities or () if one != MAPPED_RAM]
    if names := [*kept, MAPPED_RAM] if is_mapped else kept:
        data += _subsection("capabilities") + U32.pack(len(names)) + b"".join(map(_string, names))
    if configuration.uuid is not None:
        data += _subsection("uuid") + configuration.uuid
    return data


def _subsection(name: str) -> bytes:
    return bytes([SectionType.SUBSECTION]) + _string(f"configuration/{name}") + U32.pack(1)


def _start(number: int, blocks: Sequence[events.RamBlock]) -> bytes:
    """The START of ram, up to the list of blocks (§4.1)."""
    total = sum(block.size for block in blocks)
    data = bytes([SectionType.START]) + U32.pack(number) + _string("ram")
    return data + sections.SECTION_END.pack(0, sections.RAM_VERSION) + U64.pack(total | RamFlag.MEM_SIZE)


def start(number: int, blocks: Sequence[events.RamBlock], configuration: events.Configuration | None) -> bytes:
    """The whole START of ram (§4.1). number: of the section"""
    return _start(number, blocks) + b"".join(entry(block, configuration) for block in blocks) + eos(number)


def entry(block: events.RamBlock, configuration: events.Configuration | None) -> bytes:
    """What the list says of a block, without the header of mapped-ram."""
    data = _string(block.name) + U64.pack(block.size)
    if configuration is not None and IGNORE_SHARED in (configuration.capabilities or ()):
        data += U64.pack(block.address or 0)
    return data


def mapped(size: int, page_size: int, at: int) -> tuple[bytes, int]:
    """The header of a block of that size in a mapped-ram file, which is at this offset (§5).

    Returns it, and where the pages begin.
    """
    bitmap = at + sections.MAPPED.size
    pages = bitmap + -(-size // page_size // 64) * 8
    pages = -(-pages // MAPPED_ALIGNMENT) * MAPPED_ALIGNMENT
    return sections.MAPPED.pack(_MAPPED_VERSION, page_size, bitmap, pages), pages


def eos(number: int) -> bytes:
    """The end of a body, and its footer."""
    return U64.pack(RamFlag.EOS) + bytes([SectionType.FOOTER]) + U32.pack(number)


def part(number: int) -> bytes:
    """The head of a PART."""
    return bytes([SectionType.PART]) + U32.pack(number)


def records(
    name: str | None, first: int, pages: NDArray[np.uint8], is_zero: NDArray[np.bool_]
) -> Iterator[NDArray[np.uint8] | bytes]:
    """Pages that follow each other, as records (§4.2).

    name: of the block; None: it is that of the page before
    first: the number of the first page
    pages: uint8[n, size]
    is_zero: bool[n]
    """
    size = pages.shape[1]
    words = (np.arange(first, first + len(pages), dtype=np.uint64) * np.uint64(size)).astype(">u8")
    edges = np.flatnonzero(np.diff(is_zero)) + 1
    borders = [0, *edges.tolist(), len(pages)]
    for begin, stop in itertools.pairwise(borders):
        zero = bool(is_zero[begin])
        flags = RamFlag.ZERO if zero else RamFlag.PAGE
        if name is not None:
            yield U64.pack(int(words[begin]) | flags) + _string(name)
            yield b"\0" if zero else pages[begin]
            name, begin = None, begin + 1
        if begin == stop:
            continue
        out = np.zeros((stop - begin, WORD_BYTES + (1 if zero else size)), dtype=np.uint8)
        heads = words[begin:stop] | np.uint64(flags | RamFlag.CONTINUE)
        out[:, :WORD_BYTES] = heads.astype(">u8").view(np.uint8).reshape(-1, WORD_BYTES)
        if not zero:
            out[:, WORD_BYTES:] = pages[begin:stop]
        yield out.reshape(-1)


def naming(word: Buffer, block: str) -> bytes:
    """A record's word with the name of its block instead of CONTINUE (§4.2)."""
    (value,) = U64.unpack(word)
    return U64.pack(value ^ RamFlag.CONTINUE) + _string(block)


def end(number: int, says_switchover: bool) -> bytes:
    """The END of ram, with the command that newer versions of QEMU put in front of it."""
    command = sections.COMMAND.pack(sections.Command.SWITCHOVER_START, 0)
    data = bytes([SectionType.COMMAND]) + command if says_switchover else b""
    return data + bytes([SectionType.END]) + U32.pack(number) + eos(number)


def tail(devices: events.DeviceState | None, page_size: int) -> list[Buffer]:
    """The device sections as they are, and the end (§2.4)."""
    described = None if devices is None else devices.description
    if devices is None:
        described = {"page_size": page_size, "devices": []}
    parts: list[Buffer] = [] if devices is None else [devices.data]
    parts.append(bytes([SectionType.EOF]))
    if described is not None:
        text = json.dumps(described).encode()
        parts.append(bytes([SectionType.DESCRIPTION]) + U32.pack(len(text)) + text)
    return parts


@dataclass(frozen=True, slots=True)
class Memory:
    """One block's memory.

    pages: uint8[n, page_size]
    came: bool[n], the pages to write; the others are left out
    """

    block: events.RamBlock
    pages: NDArray[np.uint8]
    came: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Saved:
    """A stopped machine.

    number: of the section ram; the device sections have others
    says_switchover: whether a SWITCHOVER_START belongs in front of its END
    """

    configuration: events.Configuration | None
    memories: Sequence[Memory]
    devices: events.DeviceState | None
    page_size: int
    number: int = 2
    says_switchover: bool = False


def stream(saved: Saved) -> Iterator[Buffer]:
    """The bytes of a migration stream, in order."""
    blocks = [memory.block for memory in saved.memories]
    yield front(saved.configuration, is_mapped=False)
    yield start(saved.number, blocks, saved.configuration)
    yield part(saved.number)
    for memory in saved.memories:
        name: str | None = memory.block.name
        for first, stop, is_zero in _windows(memory):
            yield from records(name, first, memory.pages[first:stop], is_zero)
            name = None
    yield eos(saved.number)
    yield end(saved.number, saved.says_switchover)
    yield from tail(saved.devices, saved.page_size)


def mapped_file(saved: Saved) -> Iterator[Buffer]:
    """The bytes of a mapped-ram file, in order; most of them are zeros where memory is."""
    written = 0

    def counted(data: Buffer) -> Buffer:
        nonlocal written
        written += memoryview(data).nbytes
        return data

    yield counted(front(saved.configuration, is_mapped=True))
    yield counted(_start(saved.number, [memory.block for memory in saved.memories]))
    for memory in saved.memories:
        yield counted(entry(memory.block, saved.configuration))
        header, pages = mapped(memory.block.size, saved.page_size, written)
        yield counted(header)
        present = np.zeros(-(-len(memory.came) // 64) * 64, dtype=bool)
        for first, stop, is_zero in _windows(memory):
            present[first:stop] = ~is_zero
        yield counted(np.packbits(present, bitorder="little"))
        yield counted(bytes(pages - written))
        yield counted(memory.pages.reshape(-1))
    yield eos(saved.number)
    yield part(saved.number) + eos(saved.number)
    yield end(saved.number, saved.says_switchover)
    yield from tail(saved.devices, saved.page_size)


def _windows(memory: Memory) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """Series (first, stop) of pages that came, and which of them are zeros: bool[stop - first]."""
    edges = np.flatnonzero(np.diff(memory.came, prepend=False, append=False))
    for begin, end_ in edges.reshape(-1, 2).tolist():
        for first in range(begin, end_, _WINDOW_PAGES):
            stop = min(first + _WINDOW_PAGES, end_)
            is_used = memory.pages[first:stop].view(np.uint64).any(axis=1)
            yield first, stop, np.logical_not(is_used)
