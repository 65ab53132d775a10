"""Dumps of a machine's memory by physical address, to the events of one block of memory: what ELF cores and LiME files
have in common (specs/formats.md §7, §8). No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.stream_reader import StreamReader

BLOCK = "memory"
"""The name of the one block; the offset of a byte in it is its physical address."""
_BUFFER_BYTES = 1 << 20
_FIRST_BYTES = 1 << 16

Parser = Generator[events.Event | None, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing(events.RamBlock):
    """A block whose size is what comes of it; `size` is 0.

    most: bytes that it can have
    """

    most: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bytes(events.Event):
    """Some bytes of a block, which need not be whole pages; of a page in several events, each writes its part.

    at: of the first byte in the block
    data: valid until the reader's next `get_buffer`
    """

    block: str
    at: int
    data: memoryview


class DumpReader(StreamReader[events.Event]):
    """One dump, from its first byte to its last: used like QEMU's `Reader`.

    parse: `elf.parse` or `lime.parse`
    section: where the format is described
    """

    machine: str | None = None
    page_size = PAGE_SIZE

    def __init__(self, parse: Callable[[DumpReader], Parser], section: str, limits: Limits) -> None:
        super().__init__(Inbox(_BUFFER_BYTES, first_bytes=_FIRST_BYTES), limits, section)
        self.section = section
        self.processor: int | None = None
        """Its number in ELF; None if the dump does not say it."""
        self.notes_bytes = 0
        """What there is besides memory: registers and the like."""
        self._parser = parse(self)
        self._whole = 0  # the first byte behind the last whole range
        self._end: events.EndOfStream | None = None

    def known_page_size(self, offset: int) -> int:
        """The page size."""
        return self.page_size

    def _drain(self) -> Parser:
        at = self.inbox.offset + self.inbox.buffered
        end = self._end or events.EndOfStream(offset=at, complete=False, trailing_bytes=at - self._whole)
        while True:
            yield end

    # For the parsers

    def range(self, address: int, size: int) -> Parser:
        """The next bytes are memory from that address on. Raises End, once all that has come is passed on."""
        inbox = self.inbox
        while size:
            try:
                yield from inbox.have(min(size, PAGE_SIZE - address % PAGE_SIZE))
                data = inbox.front(size)
                if len(data) < size:  # only whole pages, so that each is written once
                    data = data[: len(data) - (address + len(data)) % PAGE_SIZE]
            except End:
                data = inbox.front(size)
                if not data:
                    raise
            yield Bytes(offset=inbox.offset, block=BLOCK, at=address, data=data)
            inbox.skip(len(data))
            address, size = address + len(data), size - len(data)
        self._whole = inbox.offset

    def finish(self) -> Parser:
        """All of memory has come; what follows is not looked at."""
        yield events.MemoryEnd(offset=self.inbox.offset)
        try:
            while True:
                yield from self.inbox.have(1)
                self.inbox.skip(len(self.inbox.front(_BUFFER_BYTES)))
        except End:
            self._end = events.EndOfStream(offset=self.inbox.offset, complete=True, trailing_bytes=0)
