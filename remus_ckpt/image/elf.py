"""Memory as an ELF core file: one segment for each run of pages (specs/formats.md §7)."""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.image.dump import BLOCK, DumpReader, Parser
from remus_ckpt.image.ranges import X86_64, Range
from remus_ckpt.pages import PAGE_SIZE, pages_for
from remus_ckpt.wire.qemu import events

_HEADER = struct.Struct("<4s5B7x2HI3QI6H")
_SEGMENT = struct.Struct("<2I6Q")
_SECTION = struct.Struct("<2I4Q2I2Q")
_NOTE = struct.Struct("<3I8s")
_CORE, _LOAD, _NOTE_TYPE, _PRSTATUS = 4, 1, 4, 1
_READ_WRITE_EXECUTE = 7
_MANY = 0xFFFF
"""In the place of a number of segments that does not fit: the first section has it."""
_PRSTATUS_BYTES = {X86_64: 336}
"""Registers of one thread, without which debuggers of this processor show no memory."""
_FIELDS_32 = ("type", "offset", "virtual", "address", "size", "memory", "flags", "align")
_FIELDS_64 = ("offset", "virtual", "address", "size", "memory", "align")
_CLASSES = {
    1: ("2HI3I I6H", [(name, "u4") for name in _FIELDS_32], 28),
    2: ("2HI3Q I6H", [("type", "u4"), ("flags", "u4"), *((name, "u8") for name in _FIELDS_64)], 44),
}
"""By the class of the file, 32 or 64 bits: the header behind its first 16 bytes, a segment, and where in a section the
number of segments is."""
_FRONT_BYTES = 16


def core(runs: Sequence[Range], elf_machine: int) -> Iterator[bytes | Range]:
    """What the file consists of, in order; a range stands for its memory.

    runs: ascending; each becomes a segment whose virtual and physical addresses are the same
    elf_machine: the number of the processor
    """
    registers = bytes(_PRSTATUS_BYTES.get(elf_machine, 0))
    note = _NOTE.pack(5, len(registers), _PRSTATUS, b"CORE\0") + registers if registers else b""
    segments = len(runs) + bool(note)
    sections = segments >= _MANY
    at = _HEADER.size + segments * _SEGMENT.size + sections * _SECTION.size
    head = _HEADER.pack(
        b"\x7fELF", 2, 1, 1, 0, 0, _CORE, elf_machine, 1, 0, _HEADER.size,
        at - _SECTION.size if sections else 0, 0, _HEADER.size, _SEGMENT.size, min(segments, _MANY),
        _SECTION.size if sections else 0, int(sections), 0,
    )  # fmt: skip
    table = [head]
    if note:
        table.append(_SEGMENT.pack(_NOTE_TYPE, 0, at, 0, 0, len(note), len(note), 4))
    place = pages_for(at + len(note)) * PAGE_SIZE
    padding = place - at - len(note)
    align = PAGE_SIZE if all(not (run.address | run.stop - run.start) % PAGE_SIZE for run in runs) else 1
    for run in runs:
        size = run.stop - run.start
        table.append(_SEGMENT.pack(_LOAD, _READ_WRITE_EXECUTE, place, run.address, run.address, size, size, align))
        place += size
    if sections:
        table.append(_SECTION.pack(0, 0, 0, 0, 0, 0, 0, segments, 0, 0))
    yield b"".join([*table, note, bytes(padding)])
    yield from runs


def parse(reader: DumpReader) -> Parser:
    """The parser of a `DumpReader`."""
    front = bytearray()

    def upto(stop: int) -> Generator[None, None, None]:
        """Read on to that offset. The tables stand in front of memory."""
        reader.limit(stop, "elf_table_bytes", 0, "the end of the tables")
        if stop > len(front):
            front.extend((yield from reader.inbox.array(stop - len(front))).tobytes())

    yield from upto(_FRONT_BYTES)
    bits = front[4]
    if bits not in _CLASSES or front[5] not in (1, 2):
        reader.refuse(f"an ELF file of the class {bits} and the byte order {front[5]}", 4)
    order = "<" if front[5] == 1 else ">"
    layout, fields, count_at = _CLASSES[bits]
    header = struct.Struct(order + layout)
    segment = np.dtype([(name, order + kind) for name, kind in fields])
    yield from upto(_FRONT_BYTES + header.size)
    kind, processor, _, _, at, sections_at, _, _, size, count, *_ = header.unpack_from(front, _FRONT_BYTES)
    if kind != _CORE:
        reader.unknown("an ELF file that is not a core", _FRONT_BYTES)
    reader.processor = processor
    if count == _MANY:
        yield from upto(sections_at + count_at + 4)
        (count,) = struct.unpack_from(order + "I", front, sections_at + count_at)
    if not count:
        reader.unknown("an ELF core without segments, like Xen's: it holds no memory that is read here", at)
    if size < segment.itemsize:
        reader.refuse(f"segments of {size} bytes", _FRONT_BYTES)
    yield from upto(at + count * size)
    table = np.ndarray((count,), segment, front, at, (size,))
    pieces = _pieces(reader, table[(table["type"] == _LOAD) & (table["size"] > 0)], at)
    for offset, length in table[["offset", "size"]][table["type"] == _NOTE_TYPE].tolist():
        if offset + length <= min(pieces[0][0], reader.limits.elf_table_bytes):
            yield from upto(offset + length)
            if not any(front[offset + _NOTE.size : offset + length]):
                continue  # as `core` writes it: registers of zeros say nothing
        reader.notes_bytes += length
    end = max((address + length for _, address, length in pieces))
    yield events.RamBlock(offset=at, name=BLOCK, size=end, page_size=PAGE_SIZE)
    for offset, address, length in pieces:
        yield from reader.drop(offset - reader.inbox.offset)
        yield from reader.range(address, length)
    yield from reader.finish()


def _pieces(reader: DumpReader, table: NDArray[Any], at: int) -> list[tuple[int, int, int]]:
    """Where memory is: (offset in the file, physical address, bytes), in the order of the file.

    Several segments may show the same memory at several virtual addresses.
    """
    if not len(table):
        reader.unknown("a core whose segments hold no memory", at)
    for name in ("address", "size"):
        reader.limit(int(table[name].max()), "memory_bytes", at, f"the {name} of a segment")
    pieces: list[tuple[int, int, int]] = []
    end = 0
    order = np.lexsort((table["offset"], table["address"]))
    for offset, address, size in zip(
        *(table[order][name].tolist() for name in ("offset", "address", "size")), strict=True
    ):
        known = max(end - address, 0)
        if known and pieces[-1][1] - pieces[-1][0] != address - offset:
            reader.unknown(
                "segments with different bytes for the same physical address: a core of a process, which has only "
                "virtual ones",
                at,
            )
        if known < size:
            pieces.append((offset + known, address + known, size - known))
            end = address + size
    reader.limit(end, "memory_bytes", at, "the end of memory")
    pieces.sort()
    begin = reader.inbox.offset
    for offset, _, size in pieces:
        if offset < begin:
            reader.unknown("segments that share bytes of the file with each other or with its tables", at)
        begin = offset + size
    return pieces
