"""Bytes to events for QEMU's migration stream (specs/qemu-ram.md). No I/O, no clock.

Pages are not copied: an event shows where they are in the buffer.
"""

from __future__ import annotations

from collections.abc import Generator

from remus_ckpt.limits import Limits
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.qemu import devices, events, live, sections
from remus_ckpt.wire.qemu.ram import Ram
from remus_ckpt.wire.qemu.sections import SectionType
from remus_ckpt.wire.stream_reader import StreamReader

_BUFFER_BYTES = 1 << 20
_FIRST_BYTES = 1 << 20

Parser = Generator[events.Event | None, None, None]


class Reader(StreamReader[events.Event]):
    """One stream, from its first byte to its last. Of a multifd migration, that of the main connection.

    page_size: what is known of it, for a stream that does not state it
    closing_page_size: what the JSON at its end says, if that can be read before; it counts if nothing else is known
    limits: what the stream may claim

    """

    def __init__(
        self, *, page_size: int | None = None, closing_page_size: int | None = None, limits: Limits | None = None
    ) -> None:
        if page_size not in (None, *sections.PAGE_SIZES):
            raise ValueError(f"page_size is {page_size}; it is one of {sections.PAGE_SIZES}, or None")
        super().__init__(Inbox(_BUFFER_BYTES, first_bytes=_FIRST_BYTES), limits or Limits(), "qemu-ram.md ")
        self.page_size = page_size
        """In bytes; None as long as nothing says it."""
        self._closing_page_size = closing_page_size
        self.machine: str | None = None
        """The name in the CONFIGURATION."""
        self.capabilities: frozenset[str] | None = None
        """What the CONFIGURATION names; None if it names nothing."""
        self.has_advice = False
        """Whether a POSTCOPY_ADVISE came: then a block may state the page size of its host memory."""
        self._live: dict[int, tuple[str, int]] = {}  # live sections by id: name, version
        self._ram = Ram(self)
        self._ended = False  # MemoryEnd has gone out
        self._whole = 0  # the first byte after the last whole item
        self._end: events.EndOfStream | None = None
        self._parser = self._stream()

    # For the parsers of the sections

    def counted(self) -> Generator[None, None, bytes]:
        """The bytes behind one that counts them."""
        yield from self.inbox.have(1)
        size = self.inbox.front(1)[0]
        yield from self.inbox.have(1 + size)
        found = bytes(self.inbox.front(1 + size)[1:])
        self.inbox.skip(1 + size)
        return found

    def string(self) -> Generator[None, None, str]:
        """The same as a text."""
        return (yield from self.counted()).decode("utf-8", "backslashreplace")

    def state_page_size(self, size: int, offset: int, section: str) -> None:
        """The stream states the page size. Refuse an impossible one, or one that contradicts what was known."""
        if size not in sections.PAGE_SIZES:
            self.unknown(f"pages of {size} bytes; {sections.PAGE_SIZES} are read", offset, section)
        if self.page_size not in (None, size):
            self.refuse(f"pages of {size} bytes, but they were said to have {self.page_size}", offset, section)
        self.page_size = size

    def known_page_size(self, offset: int) -> int:
        """The page size. Raises UnknownFormat if nothing has said it."""
        if self.page_size is None and self._closing_page_size is not None:
            self.state_page_size(self._closing_page_size, offset, "§4.3")
        if self.page_size is None and (self.machine or "").startswith(sections.MACHINES_4K):
            self.page_size = 4096
        if self.page_size is None:
            of = f"of the machine {self.machine!r} " if self.machine else ""
            self.unknown(
                f"the stream {of}does not say how large its pages are before they come: give --page-size (4096 for x86 "
                "and most others, 1024 for 32-bit arm, 8192 for alpha and 64-bit sparc)",
                offset,
                "§4.3",
                "ram",
            )
        return self.page_size

    # The grammar, in the order of the specification

    def _stream(self) -> Parser:
        yield from self.inbox.have(1)
        magic, version = yield from self.inbox.unpack(sections.HEADER)
        if magic != sections.MAGIC:
            self.unknown("no QEMU migration stream begins like this", 0, "§2.1")
        if version != sections.VERSION:
            self.unknown(f"version {version}; {sections.VERSION} is read", 4, "§2.1")
        yield events.Header(offset=0, version=version)
        self._whole = self.inbox.offset
        yield from self.inbox.have(1)
        if self.inbox.front(1)[0] == SectionType.CONFIGURATION:
            yield from live.configuration(self)
            self._whole = self.inbox.offset
        while True:
            yield from self.inbox.have(1)
            start = self.inbox.offset
            kind = self.inbox.front(1)[0]
            if kind in (SectionType.FULL, SectionType.EOF):
                yield from self._tail(start)
                return
            self.inbox.skip(1)
            match kind:
                case SectionType.START:
                    yield from self._start(start)
                case SectionType.PART | SectionType.END:
                    yield from self._part(start, "PART" if kind == SectionType.PART else "END")
                case SectionType.COMMAND:
                    yield from self._command(start)
                case _:
                    self.refuse(f"no section has the type {kind:#04x}", start, "§2.2")
            self._whole = self.inbox.offset

    def _start(self, start: int) -> Parser:
        """§2.2"""
        (number,) = yield from self.inbox.unpack(sections.U32)
        name = yield from self.string()
        _, version = yield from self.inbox.unpack(sections.SECTION_END)
        if name not in sections.LIVE_SECTIONS:
            self.unknown(f"the live section {name!r} is not read; {', '.join(sections.LIVE_SECTIONS)} are", start, "§6")
        if number in self._live:
            self.refuse(f"a second section has the number {number}", start, "§2.2", name)
        if name == "ram":
            if any(other == "ram" for other, _ in self._live.values()):
                self.refuse("a second section `ram`", start, "§2.2", name)
            if version != sections.RAM_VERSION:
                self.unknown(f"version {version} of ram; {sections.RAM_VERSION} is read", start, "§4", name)
        self._live[number] = name, version
        self.limit(len(self._live), "ram_blocks", start, "the number of live sections", "§2.2")
        yield events.Section(offset=start, kind="START", id=number, name=name, version=version)
        yield from self._body(name, is_start=True)
        yield from self._footer(number, name)

    def _part(self, start: int, kind: events.PartKind) -> Parser:
        """§2.2"""
        (number,) = yield from self.inbox.unpack(sections.U32)
        if number not in self._live:
            self.refuse(f"a part of the section {number}, which has not begun", start, "§2.2")
        name, version = self._live[number]
        yield events.Section(offset=start, kind=kind, id=number, name=name, version=version)
        yield from self._body(name, is_start=False)
        yield from self._footer(number, name)
        if name == "ram" and kind == "END":
            yield from self._memory_end()

    def _body(self, name: str, is_start: bool) -> Parser:
        match name:
            case "ram":
                yield from self._ram.section(is_start)
            case "dirty-bitmap":
                yield from live.dirty_bitmap(self)
            case _:
                yield from live.storage_attributes(self)

    def _footer(self, number: int, name: str) -> Parser:
        """§2.2: machines before QEMU 2.4 write none."""
        front = yield from self.inbox.peek(1)
        if front != bytes([SectionType.FOOTER]):
            return
        start = self.inbox.offset
        yield from self.inbox.have(5)
        self.inbox.skip(1)
        (found,) = yield from self.inbox.unpack(sections.U32)
        if found != number:
            self.refuse(f"the footer names the section {found}, but it ends {number}", start, "§2.2", name)

    def _memory_end(self) -> Parser:
        """§2.3"""
        if not self._ended and any(name == "ram" for name, _ in self._live.values()):
            self._ended = True
            yield events.MemoryEnd(offset=self.inbox.offset)

    def _command(self, start: int) -> Parser:
        """§2.5"""
        number, size = yield from self.inbox.unpack(sections.COMMAND)
        try:
            name = sections.Command(number).name
        except ValueError:
            self.unknown(f"there is no command {number}", start, "§2.5", "COMMAND")
        if number in sections.REFUSED_COMMANDS:
            what = sections.REFUSED_COMMANDS[sections.Command(number)]
            self.unknown(f"{what} (command {name}): memory then comes in other ways too", start, "§8", "COMMAND")
        yield from self.inbox.have(size)
        data = bytes(self.inbox.front(size))
        self.inbox.skip(size)
        if number == sections.Command.POSTCOPY_ADVISE:
            self.has_advice = True
            if len(data) == 2 * sections.U64.size and self.page_size is None:
                (page_size,) = sections.U64.unpack_from(data, sections.U64.size)
                self.state_page_size(page_size, start, "§4.3")
        yield events.Command(offset=start, number=number, name=name, data=data)

    def _tail(self, start: int) -> Parser:
        """§2.4: device sections do not say where they end, so all of them are one, up to the end of the bytes."""
        self._ended = self._ended or self._ram.is_empty
        yield from self._memory_end()
        tail = bytearray()
        while True:
            here = self.inbox.front(_BUFFER_BYTES)
            tail += here
            self.limit(len(tail), "device_state_bytes", start, "the length of the device sections", "§2.4")
            self.inbox.skip(len(here))
            try:
                yield from self.inbox.have(1)
            except End:
                break
        state, size = devices.split(bytes(tail), start, self.limits.description_bytes)
        if state is not None:
            yield state
        self._end = events.EndOfStream(
            offset=self.inbox.offset, complete=state is not None, trailing_bytes=len(tail) - size
        )

    def _drain(self) -> Parser:
        # What has arrived of an item that is not whole is still in the buffer, or on its way to a payload.
        at = self.inbox.offset + self.inbox.buffered
        end = self._end or events.EndOfStream(offset=at, complete=False, trailing_bytes=at - self._whole)
        while True:
            yield end
