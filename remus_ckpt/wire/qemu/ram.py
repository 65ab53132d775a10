"""Bytes to events for the section `ram`, version 4 (specs/qemu-ram.md §4, §5)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt import extensions
from remus_ckpt.wire.qemu import events, sections
from remus_ckpt.wire.qemu.sections import IGNORE_SHARED, MAPPED_RAM, U64, RamFlag

if TYPE_CHECKING:
    from remus_ckpt.wire.qemu.reader import Reader

Parser = Generator[events.Event | None, None, None]

_LEAST_MASK = sections.PAGE_SIZES[0] - 1
"""The bits of a word that are flags whatever the page size."""
_CONTINUE, _ZERO, _PAGE, _XBZRLE = (int(RamFlag[name]) for name in ("CONTINUE", "ZERO", "PAGE", "XBZRLE"))
_KINDS = (_ZERO, _PAGE, _XBZRLE)
_ALL = 1 << 62
"""More bytes than a buffer has."""
ROOM = 1 << 14
"""Records that the native scan finds in one call."""

native: Any
try:
    native = extensions.load("wire._path")
except ImportError:  # it was not built: Python does it alone
    native = None


class _Rooms:
    """Where the native scan puts what it finds. size: of the buffer that it looks at, in bytes"""

    def __init__(self, size: int) -> None:
        self.numbers = tuple(np.empty(ROOM, dtype=np.int64) for _ in range(5))
        self.fills = np.empty(ROOM, dtype=np.uint8)
        self.frames = bytearray(size)


class Ram:
    """The section `ram` of one stream: its blocks, and the block that is being filled."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._inbox = reader.inbox
        self._blocks: dict[bytes, events.RamBlock] = {}
        self._now: events.RamBlock | None = None
        self._key = b""  # its name as the stream has it
        self._page_size = sections.PAGE_SIZES[0]
        self._base: int | None = None  # offset of the stream in a mapped-ram file
        self._rooms: _Rooms | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no block."""
        return not self._blocks

    def section(self, is_start: bool) -> Parser:
        """§4: words up to EOS."""
        reader, inbox = self._reader, self._inbox
        if not is_start and not self._blocks:
            reader.refuse("a part of ram before the list of its blocks", inbox.offset, "§4.1", "ram")
        while True:
            yield from inbox.have(U64.size)
            pages = self._scan() if self._blocks else None
            if pages is not None:
                yield pages
                continue
            start = inbox.offset
            (word,) = U64.unpack(inbox.front(U64.size))
            flags = word & (self._page_size - 1)
            if self._blocks and flags & ~_CONTINUE in _KINDS:
                # The record has not arrived as a whole; every record fits the buffer.
                yield from inbox.have(len(inbox.front(_ALL)) + 1)
                continue
            inbox.skip(U64.size)
            if flags == RamFlag.EOS and word == flags:
                yield events.Mark(offset=start, kind="eos")
                return
            if flags == RamFlag.MULTIFD_FLUSH and word == flags:
                yield events.Mark(offset=start, kind="flush")
            elif flags == RamFlag.MEM_SIZE and is_start and not self._blocks:
                yield from self._list(word & ~_LEAST_MASK, start)
            else:
                self._refuse_word(word, start)

    def _refuse_word(self, word: int, start: int) -> None:
        for flag, what in sections.REFUSED_FLAGS.items():
            if word & flag:
                self._reader.unknown(f"{what} is not read", start, "§8", "ram")
        self._reader.refuse(f"a word {word:#x} whose flags may not stand here", start, "§4.2", "ram")

    # The list of blocks

    def _list(self, total: int, start: int) -> Parser:
        """§4.1"""
        reader = self._reader
        reader.limit(total, "memory_bytes", start, "memory's size", "§4.1")
        left = total
        while left > 0:
            here = self._inbox.offset
            reader.limit(len(self._blocks) + 1, "ram_blocks", here, "the number of blocks", "§4.1")
            key = yield from reader.counted()
            (size,) = yield from self._inbox.unpack(U64)
            try:
                name = key.decode()
            except UnicodeDecodeError:
                reader.refuse(f"the block {key!r}, whose name is no text in UTF-8", here, "§4.1", "ram")
            if not name or key in self._blocks:
                reader.refuse(f"the block {name!r} has no name, or one that another has", here, "§4.1", "ram")
            if size > left:
                reader.refuse(f"the block {name!r} of {size} bytes where {left} are left", here, "§4.1", "ram")
            left -= size
            capabilities = reader.capabilities or frozenset()
            address = places = None
            if MAPPED_RAM in capabilities:
                if IGNORE_SHARED in capabilities:
                    (address,) = yield from self._inbox.unpack(U64)
                places = yield from self._mapped_header(name, size, here)
            else:
                address = yield from self._block_rest(left)
            page_size = reader.known_page_size(here)
            if size % page_size:
                reader.refuse(
                    f"the block {name!r} of {size} bytes, not a number of pages of {page_size}", here, "§4.1", "ram"
                )
            block = events.RamBlock(offset=here, name=name, size=size, page_size=page_size, address=address)
            self._blocks[key] = block
            self._page_size = page_size
            yield block
            if places is not None:
                bitmap = yield from self._bitmap(block, *places)
                yield from self._mapped_pages(block, bitmap)
        if not self._blocks:
            reader.refuse("memory of no bytes", start, "§4.1", "ram")

    def _block_rest(self, left: int) -> Generator[None, None, int | None]:
        """§4.1: the words behind a block's size, each of which begins with a zero byte, as no name and no flag does."""
        reader = self._reader
        address = None
        may_have_address = reader.capabilities is None or IGNORE_SHARED in reader.capabilities
        while True:
            front = yield from self._inbox.peek(U64.size)
            if len(front) < U64.size:
                return address
            (word,) = U64.unpack(front)
            if front[0] or (not left and word & _LEAST_MASK):
                return address
            is_page_size = reader.has_advice and word and not word & (word - 1)
            if not is_page_size and not may_have_address:
                return address
            if not is_page_size:
                may_have_address = False
                address = word
            self._inbox.skip(U64.size)

    # Pages

    def _scan(self) -> events.Pages | None:
        """§4.2: the whole page records that have arrived, as one event; None if there is none at the front.

        Series of plain records are found by the extension. Where it finds none, the first record is looked at here.
        What is wrong is refused only where it is the first: what stands before it goes out first. An event ends where
        the block changes, and where addresses do not ascend, so that it has no page twice.
        """
        if native is not None and (event := self._plain()) is not None:
            return event
        inbox, reader = self._inbox, self._reader
        now = self._now
        page_size = self._page_size
        mask = page_size - 1
        shift = page_size.bit_length() - 1
        data = inbox.front(_ALL)
        base = inbox.offset
        stop = len(data)
        unpack = U64.unpack_from
        full: list[int] = []
        places: list[int] = []
        zero: list[int] = []
        fills = bytearray()
        encoded: list[int] = []
        frames: list[memoryview] = []
        frame_offsets: list[int] = []
        last, size, name = -1, 0 if now is None else now.size, self._key
        at = 0
        while at + 8 <= stop:
            (word,) = unpack(data, at)
            flags = word & mask
            address = word ^ flags
            body = at + 8
            if flags & _CONTINUE:
                kind = flags ^ _CONTINUE
                if kind not in _KINDS:
                    break
                if now is None:
                    reader.refuse("the first page continues a block", base + at, "§4.2", "ram")
            else:
                kind = flags
                if kind not in _KINDS or body >= stop:
                    break
                body += 1 + data[body]
                if body > stop:
                    break
                name = bytes(data[at + 9 : body])
                block = self._blocks.get(name)
                if block is None or block is not now:
                    if at:
                        break
                    if block is None:
                        reader.refuse(f"a page of the block {name!r}, which was not listed", base, "§4.2", "ram")
                    now, size = block, block.size
            if address <= last or address >= size:
                if at:
                    break
                assert now is not None
                reader.refuse(
                    f"a page at {address:#x} of {now.name!r}, which has {now.size:#x} bytes", base, "§4.2", "ram"
                )
            if kind == _PAGE:
                end = body + page_size
                if end > stop:
                    break
                full.append(address)
                places.append(body)
            elif kind == _ZERO:
                if body >= stop:
                    break
                end = body + 1
                zero.append(address)
                fills.append(data[body])
            else:
                if body + 3 > stop:
                    break
                length = data[body + 1] << 8 | data[body + 2]
                if data[body] != sections.XBZRLE_ENCODING or length > page_size:
                    if at:
                        break
                    reader.refuse(
                        f"an encoded page with the flags {data[body]} and {length} bytes", base + body, "§4.4", "ram"
                    )
                end = body + 3 + length
                if end > stop:
                    break
                encoded.append(address)
                frames.append(data[body:end])
                frame_offsets.append(base + body)
            at, last = end, address
            if native is not None:
                break
        if not at:
            return None
        if now is not self._now:
            self._now, self._key = now, name
        assert now is not None
        event = events.Pages(
            offset=base,
            block=now.name,
            data=data,
            full=np.array(full, dtype=np.int64) >> shift,
            places=np.array(places, dtype=np.int64),
            zero=np.array(zero, dtype=np.int64) >> shift,
            fills=np.frombuffer(fills, dtype=np.uint8),
            encoded=np.array(encoded, dtype=np.int64) >> shift,
            frames=b"".join(frames),
            frame_offsets=np.array(frame_offsets, dtype=np.int64),
        )
        inbox.skip(at)
        return event

    def _plain(self) -> events.Pages | None:
        """The whole records of one block that are at the front, found in one call; None if the first is none such."""
        data = self._inbox.front(_ALL)
        now, key = self._now, self._key
        if not int.from_bytes(data[6:8], "big") & _CONTINUE and len(data) > U64.size:
            key = bytes(data[U64.size + 1 : U64.size + 1 + data[U64.size]])
            now = self._blocks.get(key)
        if now is None:
            return None
        if self._rooms is None:
            self._rooms = _Rooms(self._inbox.size)
        full, places, zero, encoded, frame_at = self._rooms.numbers
        fills, room = self._rooms.fills, self._rooms.frames
        taken, fulls, zeros, encodeds, frames = native.scan(
            data, now.page_size, now.size, key, full, places, zero, fills, encoded, frame_at, room
        )
        if not taken:
            return None
        self._now, self._key = now, key
        event = events.Pages(
            offset=self._inbox.offset,
            block=now.name,
            data=data,
            full=full[:fulls].copy(),
            places=places[:fulls].copy(),
            zero=zero[:zeros].copy(),
            fills=fills[:zeros].copy(),
            encoded=encoded[:encodeds].copy(),
            frames=bytes(memoryview(room)[:frames]),
            frame_offsets=frame_at[:encodeds] + self._inbox.offset,
        )
        self._inbox.skip(taken)
        return event

    # mapped-ram

    def _mapped_header(self, name: str, size: int, here: int) -> Generator[None, None, tuple[int, int]]:
        """§5. Returns where the bitmap and the pages begin in the stream."""
        reader = self._reader
        version, page_size, bitmap, pages = yield from self._inbox.unpack(sections.MAPPED)
        if version != 1:
            reader.unknown(f"version {version} of mapped-ram; 1 is read", here, "§5", "ram")
        reader.state_page_size(page_size, here, "§5")
        # Offsets are those of the whole file, in which the stream may begin anywhere.
        base = bitmap - self._inbox.offset
        bitmap_bytes = -(-size // page_size // 8) if size else 0
        if self._base is None:
            self._base = base
        if base != self._base or base < 0 or pages < bitmap + bitmap_bytes:
            reader.refuse(f"the bitmap of {name!r} at {bitmap:#x}, its pages at {pages:#x}", here, "§5", "ram")
        return bitmap - base, pages - base

    def _bitmap(
        self, block: events.RamBlock, bitmap: int, pages: int
    ) -> Generator[events.Event | None, None, NDArray[np.bool_]]:
        """§5. Returns bool[pages]: which of them are there."""
        count = block.size // block.page_size
        packed = yield from self._inbox.array(-(-count // 8))
        present = np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)
        found = int(np.count_nonzero(present))
        yield events.Mapped(offset=bitmap, block=block.name, present=found, absent=count - found)
        yield from self._reader.drop(pages - self._inbox.offset)
        return present

    def _mapped_pages(self, block: events.RamBlock, present: NDArray[np.bool_]) -> Parser:
        """§5: the pages that are there, as many at a time as have arrived; what stands in the place of absent ones is
        passed over."""
        size = block.page_size
        start = self._inbox.offset
        numbers = np.flatnonzero(present)
        done = 0
        while done < len(numbers):
            first = int(numbers[done])
            yield from self._reader.drop(start + first * size - self._inbox.offset)
            yield from self._inbox.have(size)
            data = self._inbox.front(_ALL)
            stop = int(np.searchsorted(numbers, first + len(data) // size))
            found, done = numbers[done:stop], stop
            yield events.Pages(
                offset=self._inbox.offset,
                block=block.name,
                data=data,
                full=found,
                places=(found - first) * size,
                zero=np.empty(0, dtype=np.int64),
                fills=np.empty(0, dtype=np.uint8),
                encoded=np.empty(0, dtype=np.int64),
                frames=b"",
                frame_offsets=np.empty(0, dtype=np.int64),
            )
            self._inbox.skip((int(found[-1]) + 1 - first) * size)
        yield from self._reader.drop(start + block.size - self._inbox.offset)
