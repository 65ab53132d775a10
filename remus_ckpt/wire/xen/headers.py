"""Bytes to events for what precedes the first checkpoint: file header and header (specs/stream.md §2, §3).

The state that the whole grammar shares is here too. No I/O, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

import numpy as np

from remus_ckpt.errors import UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.stream_reader import StreamReader
from remus_ckpt.wire.xen import chunks, events
from remus_ckpt.wire.xen.dialect import DETECT_BYTES, V2_MAGIC, Dialect, detect_header
from remus_ckpt.wire.xen.states import Course

Parser = Generator[events.Event | None, None, Any]


class HeaderReader(StreamReader[events.Event]):
    """The base of `Reader`, which has the rest of the grammar."""

    def __init__(self, dialect: Dialect, limits: Limits, strict: bool, inbox: Inbox) -> None:
        self.dialect = dialect
        """As given, plus what has been detected so far."""
        super().__init__(inbox, limits)
        self.strict = strict
        self.deviations: dict[str, events.Deviation] = {}
        """Deviations that were accepted, by name."""
        self._course = Course()
        self._p2m_size = 0

    @property
    def _offset(self) -> int:
        return self.inbox.offset

    def _word(self) -> Generator[events.Event | None, None, int]:
        (value,) = yield from self.inbox.unpack(chunks.U64 if self.dialect.word == 8 else chunks.U32)
        return int(value)

    def deviate(self, name: str, offset: int, section: str, chunk: str | None = None) -> None:
        """Note a named deviation, or refuse it if the reader is strict."""
        if self.strict:
            self.refuse(f"{name} (specs/permissive.md)", offset, section, chunk)
        if name in self.deviations:
            self.deviations[name].count += 1
        else:
            self.deviations[name] = events.Deviation(name, offset)

    def _emit(self, event: events.Event, section: str, chunk: str | None) -> Parser:
        where = self._course.state
        if self._course.step(event) is None:
            self.refuse(f"it may not stand in the {where.value}", event.offset, section, chunk)
        yield event

    # The grammar up to the first chunk, in the order of the specification

    def _file_header(self, kind: str, magic: bytes, section: str) -> Parser:
        """§2"""
        yield from self.inbox.have(len(magic))
        if self.inbox.front(len(magic)) != magic:
            self.refuse(f"the file header begins like {kind}'s but continues differently", 0, section)
        self.inbox.skip(len(magic))
        header = yield from {
            "xl": self._xl_header,
            "xend": self._xend_header,
            "libvirt": self._libvirt_header,
            "xenserver": self._xenserver_header,
        }[kind]()
        yield from self._emit(header, section, None)

    def _configuration(self, length: int, offset: int, section: str) -> Generator[events.Event | None, None, bytes]:
        self.limit(length, "file_header_bytes", offset, "the configuration's length", section)
        data = yield from self.inbox.array(length)
        return data.tobytes()

    def _xl_header(self) -> Generator[events.Event | None, None, events.FileHeader]:
        """§2.1"""
        section = "stream.md §2.1"
        order, mandatory, optional, length = yield from self.inbox.unpack(struct.Struct("<4I"))
        if order != 0x01020304:
            raise UnknownFormat(
                f"the byte order mark is {order:#010x}: only little-endian streams are read", offset=32, section=section
            )
        if mandatory & 2:
            raise UnknownFormat(
                "xl's header announces a v2 stream (Xen 4.6 or later); only the legacy stream is read",
                offset=36,
                section="stream.md §2.3",
            )
        if mandatory & ~1:
            raise UnknownFormat(
                f"xl's header has the unknown mandatory flags {mandatory:#x}", offset=36, section=section
            )
        data = yield from self._configuration(length, 44, section)
        return events.FileHeader(kind="xl", mandatory_flags=mandatory, optional_flags=optional, data=data, offset=0)

    def _xend_header(self) -> Generator[events.Event | None, None, events.FileHeader]:
        """§2.2"""
        (length,) = yield from self.inbox.unpack(struct.Struct(">i"))
        if length < 0:
            self.refuse(f"the configuration has the length {length}", 16, "stream.md §2.2")
        data = yield from self._configuration(length, 16, "stream.md §2.2")
        return events.FileHeader(kind="xend", data=data, offset=0)

    def _libvirt_header(self) -> Generator[events.Event | None, None, events.FileHeader]:
        """§2.4"""
        version, length = yield from self.inbox.unpack(chunks.LIBVIRT_HEADER)
        if version == 2:
            raise UnknownFormat(
                "libvirt's header announces a v2 stream (Xen 4.6 or later); only the legacy stream is read",
                offset=16,
                section="stream.md §2.3",
            )
        if version != 1:
            raise UnknownFormat(
                f"libvirt's header has the version {version:#x}; 1 is read here", offset=16, section="stream.md §2.4"
            )
        data = yield from self._configuration(length, 20, "stream.md §2.4")
        return events.FileHeader(kind="libvirt", data=data, offset=0)

    def _xenserver_header(self) -> Generator[events.Event | None, None, events.FileHeader]:
        """§2.5: nothing but the magic."""
        yield from ()
        return events.FileHeader(kind="xenserver", data=b"", offset=0)

    def _header(self) -> Parser:
        """§3"""
        start = self._offset
        front = yield from self.inbox.peek(DETECT_BYTES)
        if front.startswith(V2_MAGIC):
            raise UnknownFormat(
                "a Xen v2 stream follows the file header; only the legacy stream is read",
                offset=start,
                section="stream.md §2.3",
            )
        if len(front) < DETECT_BYTES and (self.dialect.word is None or self.dialect.guest is None):
            raise End
        self.dialect = detect_header(self.dialect, front, start)
        word, guest = self.dialect.word, self.dialect.guest
        assert word is not None and guest is not None
        p2m_size = yield from self._word()
        if not 0 < p2m_size <= chunks.MAX_P2M_SIZE:
            self.refuse(f"p2m_size {p2m_size} is not in 1…{chunks.MAX_P2M_SIZE}", start, "stream.md §3.1", "header")
        self.limit(p2m_size * PAGE_SIZE, "memory_bytes", start, "memory's size", "stream.md §3.1", "header")
        self._p2m_size = p2m_size
        extended = frames = None
        if guest == "pv":
            extended, frames = yield from self._pv_header(p2m_size, word)
        header = events.Header(
            word=word, guest=guest, p2m_size=p2m_size, extended_info=extended, p2m_frames=frames, offset=start
        )
        yield from self._emit(header, "stream.md §3", "header")

    def _pv_header(self, p2m_size: int, word: int) -> Generator[events.Event | None, None, Any]:
        """§3.2 to §3.4"""
        guest_word = word
        extended: list[events.ExtendedInfo] | None = None
        first = yield from self._word()
        if first == chunks.EXTENDED_INFO_MARK[word]:
            extended = []
            start = self._offset
            (total,) = yield from self.inbox.unpack(chunks.U32)
            self.limit(total, "extended_info_bytes", start, "the extended info's length", "stream.md §3.3", "header")
            left = total
            while left:
                here = self._offset
                if left < 8:
                    self.refuse(
                        f"{left} bytes are left of the extended info, a block's head takes 8",
                        here,
                        "stream.md §3.3",
                        "header",
                    )
                block_id, size = yield from self.inbox.unpack(struct.Struct("<4sI"))
                if size > left - 8:
                    self.refuse(
                        f"block {block_id!r} of {size} bytes where {left - 8} are left",
                        here,
                        "stream.md §3.3",
                        "header",
                    )
                data = yield from self.inbox.array(size)
                left -= 8 + size
                guest_word = self._extended_block(block_id, size, data.tobytes(), here, guest_word)
                extended.append(events.ExtendedInfo(id=block_id, data=data.tobytes()))
            first = yield from self._word()
        count = chunks.p2m_frames(p2m_size, guest_word)
        rest = yield from self.inbox.array((count - 1) * word)
        frames = np.empty(count, dtype=np.uint64)
        frames[0] = first
        frames[1:] = rest.view(f"<u{word}")
        return None if extended is None else tuple(extended), frames

    def _extended_block(self, block_id: bytes, size: int, data: bytes, here: int, guest_word: int) -> int:
        """§3.3. Returns the guest's word."""
        section = "stream.md §3.3"
        if block_id == b"vcpu":
            if size not in chunks.VCPU_CONTEXT_BYTES:
                self.refuse(
                    f"a virtual CPU's context of {size} bytes; it has {list(chunks.VCPU_CONTEXT_BYTES)}",
                    here,
                    section,
                    "header",
                )
            return chunks.VCPU_CONTEXT_BYTES[size]
        if block_id == b"extv":
            if size:
                self.refuse(f"the block extv has {size} bytes, not 0", here, section, "header")
        elif block_id == b"xcnt":
            value = int.from_bytes(data, "little")
            if size != 4 or value < chunks.XSAVE_HEADER.size:
                self.refuse(
                    f"the block xcnt has {size} bytes with the value {value}; it has 4 with 16 or more",
                    here,
                    section,
                    "header",
                )
            self.limit(value, "xsave_bytes", here, "the extended state's size", section, "header")
        else:
            self.deviate("unknown-extended-info", here, section, "header")
        return guest_word
