"""Events to bytes for QEMU's migration stream (specs/qemu-ram.md): a stopped guest, pages whole or zero. No I/O.

`stream` gives a migration stream, `mapped_file` a mapped-ram file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Buffer
from remus_ckpt.wire.qemu import events, sections
from remus_ckpt.wire.qemu.sections import IGNORE_SHARED, MAPPED_RAM, U32, U64, RamFlag, SectionType

WORD_BYTES = U64.size
"""Of the word in front of every page."""
_MAPPED_VERSION = 1
_WINDOW_BYTES = 1 << 20
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


def records(name: str | None, first: int, pages: NDArray[np.uint8]) -> list[Buffer]:
    """Pages that follow each other, as records (§4.2).

    name: of the block; None: it is that of the page before
    first: the number of the first page
    pages: uint8[n, size]
    """
    out: list[Buffer] = []
    for number, page in enumerate(pages, first):
        is_zero = not page.any()
        word = number * len(page) | (RamFlag.ZERO if is_zero else RamFlag.PAGE)
        out.append(U64.pack(word | RamFlag.CONTINUE) if name is None else U64.pack(word) + _string(name))
        out.append(b"\0" if is_zero else page)
        name = None
    return out


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

    read: fills an array uint8[n] with the bytes of the block from an offset on
    came: bool[pages], the pages to write; the others are left out
    filled: bool[pages]: whether a page may hold something other than zeros; for a mapped-ram file
    """

    block: events.RamBlock
    read: Callable[[int, NDArray[np.uint8]], None]
    came: NDArray[np.bool_]
    filled: NDArray[np.bool_] | None = None

    def windows(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The pages that came, some at a time: the number of the first, and uint8[n, page_size], valid until the next
        ones."""
        size = self.block.page_size
        room = np.empty((max(_WINDOW_BYTES // size, 1), size), dtype=np.uint8)
        edges = np.flatnonzero(np.diff(self.came, prepend=False, append=False))
        for begin, end_ in edges.reshape(-1, 2).tolist():
            for first in range(begin, end_, len(room)):
                pages = room[: end_ - first]
                self.read(first * size, pages.reshape(-1))
                yield first, pages


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


def stream(saved: Saved) -> Iterator[list[Buffer]]:
    """The bytes of a migration stream, in order; each list is valid until the next one is asked for."""
    blocks = [memory.block for memory in saved.memories]
    yield [front(saved.configuration, is_mapped=False), start(saved.number, blocks, saved.configuration)]
    yield [part(saved.number)]
    for memory in saved.memories:
        name: str | None = memory.block.name
        for first, pages in memory.windows():
            yield records(name, first, pages)
            name = None
    yield [eos(saved.number), end(saved.number, saved.says_switchover), *tail(saved.devices, saved.page_size)]


def mapped_file(saved: Saved) -> Iterator[Buffer | Memory]:
    """The bytes of a mapped-ram file, in order; a memory stands for all its bytes. What is `filled` must be known."""
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
        assert memory.filled is not None
        present = np.zeros(-(-len(memory.came) // 64) * 64, dtype=bool)
        present[: len(memory.came)] = memory.came & memory.filled
        yield counted(np.packbits(present, bitorder="little"))
        yield counted(bytes(pages - written))
        yield memory
        written += memory.block.size
    yield eos(saved.number)
    yield part(saved.number) + eos(saved.number)
    yield end(saved.number, saved.says_switchover)
    yield from tail(saved.devices, saved.page_size)
