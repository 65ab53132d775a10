"""Memory in the format of LiME, as tools for forensics read it (specs/formats.md §8)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from remus_ckpt.image.dump import BLOCK, DumpReader, Growing, Parser
from remus_ckpt.image.ranges import Range
from remus_ckpt.pages import PAGE_SIZE

_HEADER = struct.Struct("<2I2Q8x")  # magic, version, first and last address
_MAGIC, _VERSION = 0x4C694D45, 1


def ranges(runs: Sequence[Range]) -> Iterator[bytes | Range]:
    """What the file consists of, in order; a range stands for its memory.

    runs: ascending; each becomes a range
    """
    for run in runs:
        yield _HEADER.pack(_MAGIC, _VERSION, run.address, run.address + run.stop - run.start - 1)
        yield run


def parse(reader: DumpReader) -> Parser:
    """The parser of a `DumpReader`: how large memory is shows only at the end."""
    inbox = reader.inbox
    most = reader.limits.memory_bytes
    yield Growing(name=BLOCK, size=0, page_size=PAGE_SIZE, most=most)
    while (yield from inbox.peek(1)):
        start = inbox.offset
        magic, version, first, last = yield from inbox.unpack(_HEADER)
        if magic != _MAGIC:
            reader.refuse(f"no range begins with {magic:#010x}", start)
        if version != _VERSION:
            reader.unknown(f"version {version} of a range; {_VERSION} is read", start + 4)
        if last < first:
            reader.refuse(f"a range from {first:#x} to {last:#x}", start + 8)
        reader.limit(last + 1, "memory_bytes", start + 16, "the end of a range")
        yield from reader.range(first, last + 1 - first)
    yield from reader.finish()
