"""What the readers of all streams have in common: bytes in, events out, refusals that say where. No I/O, no clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Generic, NoReturn, TypeVar

from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Buffer
from remus_ckpt.wire.inbox import End, Inbox

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further event."""

Event = TypeVar("Event")


class StreamReader(ABC, Generic[Event]):
    """The base of the readers. Any split of the bytes gives the same events.

    inbox: holds the bytes
    limits: what the stream may claim
    spec: what stands in front of the sections that refusals name: their file and a blank, or all that is to be named

    A reader sets `_parser`, which yields events, and NEED_DATA where it waits. `_drain` is its parser for what comes
    when that one, or the stream, has ended.
    After `next_event` has raised Malformed or UnknownFormat, it raises the same error again.
    """

    _parser: Generator[Event | None, None, Any]

    def __init__(self, inbox: Inbox, limits: Limits, spec: str = "") -> None:
        self.inbox = inbox
        self.limits = limits
        self._spec = spec
        self.gap = 0
        """How many of the next bytes will not be looked at. Whoever can seek may pass over them: see `skip_gap`."""
        self._error: StreamError | None = None

    # Bytes in

    def get_buffer(self) -> memoryview:
        """A writable buffer to receive into; tell `buffer_updated` how much of it was filled."""
        return self.inbox.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into the buffer that `get_buffer` returned."""
        self.inbox.buffer_updated(size)

    def feed(self, data: Buffer) -> None:
        """Take bytes from the caller; they are kept, not copied, until `next_event` reaches them."""
        self.inbox.feed(data)

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self.inbox.feed_eof()

    def skip_gap(self, size: int) -> None:
        """The owner has passed over that many of the `gap` bytes that come next."""
        self.inbox.received(size)
        self.gap -= size

    @property
    def buffered(self) -> int:
        """Bytes received but not yet read."""
        return self.inbox.buffered

    # Events out

    def next_event(self) -> Event | None:
        """The next event, or NEED_DATA. After the end of the bytes: EndOfStream, every time."""
        if self._error is not None:
            raise self._error
        while True:
            try:
                event = next(self._parser)
            except StreamError as error:
                self._error = error
                raise
            except (StopIteration, End):
                self._parser = self._drain()
                continue
            if event is not NEED_DATA or not self.inbox.pull():
                return event

    @abstractmethod
    def _drain(self) -> Generator[Event | None, None, Any]: ...

    def fail(self, error: Malformed) -> Malformed:
        """Record a fault found by the consumer of the events: `next_event` raises it from now on."""
        self._error = error
        return error

    # For the parsers

    def refuse(self, message: str, offset: int, section: str = "", chunk: str | None = None) -> NoReturn:
        """Raise Malformed."""
        raise Malformed(message, offset=offset, section=self._spec + section, chunk=chunk)

    def unknown(self, message: str, offset: int, section: str = "", chunk: str | None = None) -> NoReturn:
        """Raise UnknownFormat."""
        raise UnknownFormat(message, offset=offset, section=self._spec + section, chunk=chunk)

    def limit(
        self, value: int, limit: str, offset: int, what: str, section: str = "", chunk: str | None = None
    ) -> None:
        """Raise LimitExceeded if a value is over the named limit."""
        ceiling = getattr(self.limits, limit)
        if value > ceiling:
            raise LimitExceeded(
                f"{what} {value} exceeds the limit {limit} of {ceiling}",
                limit=limit,
                offset=offset,
                section=self._spec + section,
                chunk=chunk,
            )

    def drop(self, size: int) -> Generator[None, None, None]:
        """Pass over bytes, which need not be read: see `gap`."""
        target = self.inbox.offset + size
        while left := target - self.inbox.offset:
            if here := len(self.inbox.front(left)):
                self.inbox.skip(here)
                continue
            self.gap = left
            try:
                yield from self.inbox.have(1)
            finally:
                self.gap = 0
