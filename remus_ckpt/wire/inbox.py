"""Bytes received but not yet parsed: the one buffer under every parser. No I/O.

The owner of the socket or file asks for room (`get_buffer`), fills it and says how much came (`buffer_updated`), or
hands over bytes it already has (`feed`). The parser is a generator that yields None when it needs more; it consumes
with `have` and `skip`, `unpack`, or `array`. Parsing moves no bytes: what was received stays in place until the next
call of `get_buffer`, so that the owner can store it after it has been parsed.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import Buffer

_GROWTH = 4
"""The memory of a long payload grows by this factor as its bytes arrive, so that a length alone costs nothing."""

Waits = Generator[None, None, None]


class End(Exception):
    """The bytes end although more are needed."""


class Inbox:
    """Bytes received, in order.

    size: of the buffer, and the most that `have` and `peek` can reach
    first_bytes: memory allocated for a payload of any length before its bytes arrive
    on_consumed: called with the consumed bytes, each once and in order, by `settle` at the latest
    """

    def __init__(self, size: int, *, first_bytes: int, on_consumed: Callable[[memoryview], None] | None = None) -> None:
        self._small = bytearray(size)
        self._view = memoryview(self._small)
        self._first_bytes = first_bytes
        self._on_consumed = on_consumed
        self.reset(0)

    def reset(self, offset: int) -> None:
        """Drop everything; the next byte to arrive is number `offset` of the stream."""
        self._begin = self._stop = 0  # the part of the buffer that is received but not consumed
        self._told = 0  # how far into the buffer on_consumed has been called
        self._base = offset  # the number of the buffer's first byte
        self._target: memoryview | None = None  # the rest of a payload that is received in place
        self._pending: deque[memoryview] = deque()
        self._is_eof = False

    @property
    def size(self) -> int:
        """Of the buffer."""
        return len(self._small)

    @property
    def offset(self) -> int:
        """The number of the next byte to be consumed."""
        return self._base + self._begin

    @property
    def buffered(self) -> int:
        """Bytes received but not yet consumed."""
        return self._stop - self._begin + sum(map(len, self._pending))

    @property
    def is_over(self) -> bool:
        """Whether everything has been consumed and nothing more will come."""
        return self._is_eof and not self.buffered

    # For the owner of the socket or file

    def get_buffer(self) -> memoryview:
        """Room to receive into, at least one byte. Raises BufferError if the parser has not been run."""
        if self._target is not None:
            return self._target
        if self._begin or self._stop == len(self._small):
            self._compact()
            if self._stop == len(self._small):
                raise BufferError("the buffer is full: call next_event until it returns NEED_DATA")
        return self._view[self._stop :]

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into the room that `get_buffer` returned."""
        if self._target is not None:
            self._target = self._target[size:]
        else:
            self._stop += size

    def feed(self, data: Buffer) -> None:
        """Take bytes from the caller; they are kept, not copied, until the parser reaches them."""
        if len(data):
            self._pending.append(memoryview(data).cast("B"))

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self._is_eof = True

    def pull(self) -> bool:
        """Move some of the fed bytes into the buffer; returns whether there were any."""
        if not self._pending:
            return False
        data = self._pending.popleft()
        room = self.get_buffer()
        size = min(len(room), len(data))
        room[:size] = data[:size]
        self.buffer_updated(size)
        if size < len(data):
            self._pending.appendleft(data[size:])
        return True

    def _compact(self) -> None:
        self.settle()
        left = self._stop - self._begin
        self._small[:left] = self._small[self._begin : self._stop]
        self._base += self._begin
        self._begin, self._stop, self._told = 0, left, 0

    # For the parser

    def settle(self) -> None:
        """Call on_consumed for everything consumed so far."""
        if self._on_consumed is not None and self._told < self._begin:
            self._on_consumed(self._view[self._told : self._begin])
        self._told = self._begin

    def have(self, size: int) -> Waits:
        """Wait until `size` bytes can be consumed. Raises End."""
        while self._stop - self._begin < size:
            if self._is_eof and not self._pending:
                raise End
            yield

    def peek(self, size: int) -> Generator[None, None, bytes]:
        """The next bytes, without consuming them; fewer only at the end of the stream."""
        try:
            yield from self.have(size)
        except End:
            size = self._stop - self._begin
        return bytes(self._view[self._begin : self._begin + size])

    def front(self, most: int) -> memoryview:
        """Up to `most` of the bytes that have arrived, without consuming them; valid until the next `get_buffer`."""
        return self._view[self._begin : min(self._begin + most, self._stop)]

    def skip(self, size: int) -> None:
        """Consume bytes that have arrived."""
        self._begin += size

    def unpack(self, layout: struct.Struct) -> Generator[None, None, tuple[Any, ...]]:
        """Consume one struct. Raises End."""
        yield from self.have(layout.size)
        values = layout.unpack_from(self._small, self._begin)
        self._begin += layout.size
        return values

    def array(self, size: int) -> Generator[None, None, NDArray[np.uint8]]:
        """Consume a payload of any length, received in place: uint8[size]. Raises End."""
        data = np.empty(min(size, self._first_bytes), dtype=np.uint8)
        filled = 0
        while True:
            yield from self._into(memoryview(data)[filled:])
            filled = len(data)
            if filled == size:
                return data
            larger = np.empty(min(size, filled * _GROWTH), dtype=np.uint8)
            larger[:filled] = data
            data = larger

    def _into(self, target: memoryview) -> Waits:
        take = min(len(target), self._stop - self._begin)
        target[:take] = self._view[self._begin : self._begin + take]
        self._begin += take
        if take == len(target):
            return
        self.settle()
        self._target = target[take:]
        try:
            while len(self._target):
                if self._is_eof and not self._pending:
                    raise End
                yield
        finally:
            self.received(len(target) - take - len(self._target))
            self._target = None
        if self._on_consumed is not None:
            self._on_consumed(target[take:])

    def received(self, size: int) -> None:
        """`size` bytes were received and consumed elsewhere, past the empty buffer."""
        self._base += size

    def drain(self) -> Waits:
        """Consume and drop whatever comes."""
        while True:
            self._begin = self._stop
            yield
