"""Bytes to events for one further connection of a multifd migration (specs/qemu-ram.md §7). No I/O, no clock."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.limits import Limits
from remus_ckpt.wire.inbox import Inbox
from remus_ckpt.wire.qemu import sections
from remus_ckpt.wire.qemu.sections import ChannelFlag
from remus_ckpt.wire.stream_reader import StreamReader

_BUFFER_BYTES = 1 << 18
_FIRST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """How a connection begins (§7.1)."""

    version: int
    uuid: bytes
    channel: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packet:
    """Some pages of one block (§7.2).

    offset: of the packet in its connection
    flags: SYNC, and how the data are compressed
    normal: int64[n], numbers of the pages whose contents `data` holds
    zero: int64[m], numbers of pages that are zeros
    data: uint8[…], the pages, compressed or not
    """

    offset: int
    flags: ChannelFlag
    number: int
    block: str
    normal: NDArray[np.int64]
    zero: NDArray[np.int64]
    data: NDArray[np.uint8]


class ChannelReader(StreamReader[Hello | Packet]):
    """One connection, from its first byte to its last; at the end of the bytes, `next_event` raises EOFError.

    page_size: what the main stream says
    """

    def __init__(self, page_size: int, limits: Limits) -> None:
        super().__init__(Inbox(_BUFFER_BYTES, first_bytes=_FIRST_BYTES), limits, "qemu-ram.md ")
        self._page_size = page_size
        self._room = sections.PACKET_BYTES // page_size
        self.is_cut = False
        """Whether the bytes have ended within a packet."""
        self._parser = self._channel()

    @property
    def offset(self) -> int:
        """The number of the next byte."""
        return self.inbox.offset

    def _drain(self) -> Generator[Hello | Packet | None, None, None]:
        raise EOFError
        yield

    def _channel(self) -> Generator[Hello | Packet | None, None, None]:
        magic, version, uuid, channel = yield from self.inbox.unpack(sections.CHANNEL_HELLO)
        if magic != sections.CHANNEL_MAGIC or version != sections.CHANNEL_VERSION:
            self.unknown(f"no multifd connection begins with {magic:#010x}, version {version}", 0, "§7.1", "multifd")
        yield Hello(version=version, uuid=uuid, channel=channel)
        while True:
            start = self.inbox.offset
            yield from self.inbox.have(1)
            self.is_cut = True
            packet = yield from self._packet(start)
            self.is_cut = False
            yield packet

    def _packet(self, start: int) -> Generator[None, None, Packet]:
        """§7.2"""
        head = yield from self.inbox.unpack(sections.PACKET_HEAD)
        magic, version, bits, _, normal, size, number, zero, name = head
        if magic != sections.CHANNEL_MAGIC or version != sections.CHANNEL_VERSION:
            self.refuse(f"a packet begins with {magic:#010x}, version {version}", start, "§7.2", "multifd")
        for flag, method in sections.CHANNEL_FLAGS_REFUSED.items():
            if bits & flag:
                self.unknown(f"pages compressed by {method} are not read", start + 8, "§8", "multifd")
        if bits & ~sum(ChannelFlag) or bits & 0x06 == 0x06:
            self.unknown(f"a packet with the flags {bits:#x}", start + 8, "§7.2", "multifd")
        if normal + zero > self._room:
            self.refuse(
                f"a packet of {normal} and {zero} pages; it has {self._room} at most", start + 16, "§7.2", "multifd"
            )
        offsets = yield from self.inbox.array(self._room * sections.U64.size)
        places = offsets.view(">u8")[: normal + zero]
        if (places & np.uint64(self._page_size - 1)).any() or (places >> np.uint64(62)).any():
            self.refuse("a page's offset is not a multiple of the page size", start, "§7.2", "multifd")
        numbers = (places // np.uint64(self._page_size)).astype(np.int64)
        if not normal:
            size = 0  # QEMU 7.2 leaves the size of an earlier packet there
        self.limit(size, "multifd_packet_bytes", start + 20, "a packet's length", "§7.2", "multifd")
        data = yield from self.inbox.array(size)
        return Packet(
            offset=start,
            flags=ChannelFlag(bits),
            number=number,
            block=name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"),
            normal=numbers[:normal],
            zero=numbers[normal:],
            data=data,
        )
