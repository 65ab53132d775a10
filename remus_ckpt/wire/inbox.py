"""The bytes that a parser has received and not yet consumed: the one buffer under every parser. No I/O.

Whoever owns the socket or the file asks for room (`get_buffer`), fills it and says how much (`buffer_updated`), or
hands over bytes that are there already (`feed`). The parser is a generator that yields None where it needs more; it
consumes with `have` and `skip`, `unpack`, `array`. Parsing moves no byte: what was received stays where it lies until
the next call of `get_buffer`, so that its owner can store it after it was parsed.
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
"""A long payload's memory grows by this factor as its bytes come, so that a length alone costs nothing."""

Waits = Generator[None, None, None]


class End(Exception):
    """The bytes end where more were needed."""


class Inbox:
    """Bytes received, in order.

    size: of the buffer; `have` and `peek` reach so far at most
    first_bytes: memory taken for a payload of any length before its bytes have come
    on_consumed: called with the bytes that were consumed, each once and in order, by `settle` at the latest
    """

    def __init__(self, size: int, *, first_bytes: int, on_consumed: Callable[[memoryview], None] | None = None) -> None:
        self._small = bytearray(size)
        self._view = memoryview(self._small)
        self._first_bytes = first_bytes
        self._on_consumed = on_consumed
        self.reset(0)

    def reset(self, offset: int) -> None:
        """Drop everything; the next byte that comes is number `offset` of the stream."""
        self._begin = self._stop = 0  # what of the buffer is received and not yet consumed
        self._told = 0  # how far into the buffer on_consumed has been called
        self._base = offset  # the number of the buffer's first byte
        self._target: memoryview | None = None  # the rest of a payload that is received in place
        self._pending: deque[memoryview] = deque()
        self._is_eof = False

    @property
    def offset(self) -> int:
        """The number of the next byte to be consumed."""
        return self._base + self._begin

    @property
    def buffered(self) -> int:
        """Bytes received and not yet consumed."""
        return self._stop - self._begin + sum(map(len, self._pending))

    @property
    def is_over(self) -> bool:
        """Whether all has been consumed and nothing more will come."""
        return self._is_eof and not self.buffered

    # For whoever brings the bytes

    def get_buffer(self) -> memoryview:
        """Room to receive into, one byte or more. Raises BufferError where the parser has not been run."""
        if self._target is not None:
            return self._target
        if self._begin or self._stop == len(self._small):
            self._compact()
            if self._stop == len(self._small):
                raise BufferError("the buffer is full: call next_event until it returns NEED_DATA")
        return self._view[self._stop :]

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into what `get_buffer` returned."""
        if self._target is not None:
            self._target = self._target[size:]
        else:
            self._stop += size

    def feed(self, data: Buffer) -> None:
        """Bytes that are there already; they are kept, not copied, until the parser comes to them."""
        if len(data):
            self._pending.append(memoryview(data).cast("B"))

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self._is_eof = True

    def pull(self) -> bool:
        """Take in some of what was fed; whether there was any."""
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
        """Call on_consumed for all that has been consumed."""
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
        """The next bytes, fewer only where the stream ends; they stay."""
        try:
            yield from self.have(size)
        except End:
            size = self._stop - self._begin
        return bytes(self._view[self._begin : self._begin + size])

    def front(self, most: int) -> memoryview:
        """What there is of the next `most` bytes; they stay, here, until the next `get_buffer`."""
        return self._view[self._begin : min(self._begin + most, self._stop)]

    def skip(self, size: int) -> None:
        """Consume bytes that are there."""
        self._begin += size

    def unpack(self, layout: struct.Struct) -> Generator[None, None, tuple[Any, ...]]:
        """Consume one struct. Raises End."""
        yield from self.have(layout.size)
        values = layout.unpack_from(self._small, self._begin)
        self._begin += layout.size
        return values

    def array(self, size: int) -> Generator[None, None, NDArray[np.uint8]]:
        """Consume a payload of any length, received where it stays: uint8[size]. Raises End."""
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
        """So many bytes came and were consumed elsewhere: the buffer is empty, and was passed by."""
        self._base += size

    def drain(self) -> Waits:
        """Consume, and drop, whatever comes."""
        while True:
            self._begin = self._stop
            yield
