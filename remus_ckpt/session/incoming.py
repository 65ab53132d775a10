"""Bytes to messages (specs/session.md §1 and §2), by the rules of `rules`.

The save stream inside DATA frames is not parsed here: the session lends buffers for it, so that long payloads are
received without a copy, and reports what has arrived.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from remus_ckpt.errors import LinkError, UnknownFormat
from remus_ckpt.limits import KIB
from remus_ckpt.session import frames
from remus_ckpt.session.frames import FrameType
from remus_ckpt.session.messages import Ack, Commit, Error, Message
from remus_ckpt.session.rules import STREAM, TRANSITIONS, Common, Direction, SessionState, Side
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Walker, Whole, durable_ack

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further message."""

DIRECT_BYTES = 64 * KIB
"""Payloads of at least this size are received directly into the lender's buffer."""
WHOLE_BYTES = 512 * KIB
"""A checkpoint of at most this size may be received as a whole; longer ones are better stored while they come."""
_BUFFER_BYTES = WHOLE_BYTES + 64 * KIB
_ACK_BYTES = 128
"""An Ack and its header are shorter."""


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of the stream have arrived: take them in before you ask for the next event.

    data: the bytes; None: they are the first `size` bytes of the buffer that the lender's `get_buffer` last returned
    """

    size: int
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class CheckpointReceived:
    """The bytes of a whole checkpoint have arrived, and its Commit: one event in place of several.

    whole: its bytes, valid until the session is asked for a buffer, and what stands in them
    """

    whole: Whole

    @property
    def commit(self) -> Commit:
        """The message."""
        whole = self.whole
        before, size = whole.record.before, len(whole.data)
        return Commit(position=whole.after, before=before, stream_bytes=size, pages=len(whole.pfns))


class Lender(Protocol):
    """Lends buffers to receive the stream's bytes into: a reader, or a wrapper around one."""

    def get_buffer(self) -> memoryview:
        """A writable buffer of one byte or more."""


Parser = Generator["Message | DataReceived | CheckpointReceived | None", None, Any]


class Incoming(Direction):
    """Bytes to messages.

    The bytes of a DATA frame are passed on before the frame is complete, and before what covers them has been checked:
    the frame's checksum or, where the two sides have agreed on one, the digest of the stream. After an error, drop the
    checkpoint that they belong to. A checkpoint whose Commit has come out of `next_event` has come completely.
    """

    def __init__(self, speaker: Side, common: Common) -> None:
        super().__init__(speaker, common)
        self.lender: Lender | None = None
        """To be set before the first DATA comes: when Begin came out of `next_event`, at the latest."""
        self._packing = frames.Packing()
        self._inbox = Inbox(_BUFFER_BYTES, first_bytes=256 * KIB)
        self._rest = 0  # of a payload that may be received into the lender's buffer
        self._lent: memoryview | None = None  # that buffer, while it is being received into
        self._crc = 0
        self._error: BaseException | None = None
        self._walker: Walker | None = None
        self._walked: tuple[Whole, int] | None = None  # what stands in front of the inbox, if `missing` has found it
        self._is_at_frame = False  # the parser waits for the header of a frame
        self._parser = self._frames()

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, without those that `next_event` has not reached."""
        return self._inbox.offset

    # Bytes in

    def get_buffer(self) -> memoryview:
        """A writable buffer to receive into; `buffer_updated` says how much of it was filled."""
        self._lent = self._walked = None
        self._give_up()
        if self._rest >= DIRECT_BYTES and not self._inbox.buffered and self.lender is not None:
            theirs = self.lender.get_buffer()[: self._rest]
            if len(theirs) >= DIRECT_BYTES:
                self._lent = theirs
                return theirs
        return self._inbox.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into the buffer. Then call `next_event` until it returns NEED_DATA."""
        if self._lent is None:
            self._inbox.buffer_updated(size)
            return
        if self._has_checksums:
            self._crc = frames.extend(self._crc, self._lent[:size])
        self._lent = None
        self._rest -= size
        self._inbox.received(size)

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self._inbox.feed_eof()

    def close(self) -> None:
        """Drop the parser and the error. `next_event` then returns nothing more; no other thread may be in it.

        Both refer back to this object: without this call, its buffers stay until the next full garbage collection.
        """
        self._parser.close()
        self._parser = self._inbox.drain()
        self._error = None

    def walk_whole(self) -> None:
        """From now on, a checkpoint that has come as a whole may be one event, `CheckpointReceived`."""
        hello = self._common.hello
        if HAS_NATIVE and hello is not None and hello.word and hello.memory_pages:
            checksums = self._has_checksums
            self._walker = Walker(hello.word, hello.memory_pages, WHOLE_BYTES, has_checksums=checksums)

    @property
    def missing(self) -> int:
        """How many more bytes it takes for a checkpoint to have come as a whole, as far as can be told; 0: it has, or
        none is coming. To be asked before `next_event`."""
        walker = self._walker
        if walker is None or not self._is_at_frame or self._common.states["client"] is not SessionState.BETWEEN:
            return 0
        there = self._inbox.front(_BUFFER_BYTES)
        self._walked = walker.walk(there)
        return 0 if self._walked is not None or not there else max(walker.wanted(there) - len(there), 0)

    # Events out

    def next_event(self) -> Message | DataReceived | CheckpointReceived | None:
        """The next message, or NEED_DATA.

        Raises Malformed, LimitExceeded or UnknownFormat for the peer's faults, LinkError if the bytes end before either
        side has ended the session; later calls raise the same error. Once this side has sent an Error, further bytes
        are counted but not parsed.
        """
        if self._error is not None:
            raise self._error
        self._give_up()
        if self._is_at_frame and (event := self._at_once()) is not None:
            return event
        try:
            return next(self._parser)
        except End:
            if self.is_over:
                self._parser = self._inbox.drain()
                return NEED_DATA
            self._error = LinkError("the connection ended without a goodbye")
        except Exception as error:
            self._error = error
        raise self._error

    # The grammar

    def _frames(self) -> Parser:
        yield from self._preface()
        while True:
            yield from self._frame()

    def _give_up(self) -> None:
        if isinstance(self.answered_with, Error):
            # A frame that was under way when this side ended the session is no longer needed.
            self._rest = 0
            self._parser.close()
            self._parser = self._inbox.drain()

    def _at_once(self) -> CheckpointReceived | Ack | None:
        """What comes all the time, if it has come as a whole, in the form that our own programs give to it: as the
        parser would have it, in one step."""
        common, inbox = self._common, self._inbox
        if self._walker is not None:
            if common.states["client"] is not SessionState.BETWEEN or common.ended:
                return None
            walked = self._walked or self._walker.walk(inbox.front(_BUFFER_BYTES))
            self._walked = None
            if walked is None or not walked[0].follows(self._position):
                return None
            # As after its DATA and its COMMIT: between two checkpoints.
            inbox.skip(walked[1])
            self._make(walked[0].after)
            return CheckpointReceived(walked[0])
        if HAS_NATIVE and self.speaker == "server" and self.state in STREAM and self.ended_with is None:
            acked = durable_ack(inbox.front(_ACK_BYTES))
            if acked is not None and acked[0] in common.made:
                inbox.skip(acked[1])
                return Ack(level="durable", position=acked[0])
        return None

    def _preface(self) -> Parser:
        """§1.1"""
        for size in range(1, len(frames.PREFACE) + 1):
            yield from self._inbox.have(size)
            if not frames.PREFACE.startswith(self._inbox.front(size)):
                raise UnknownFormat(
                    "the other side does not speak the session protocol of remus-ckpt: is it the right address, and "
                    "is TLS used on both sides or on none?",
                    offset=size - 1,
                    section="session.md §1.1",
                )
        self._inbox.skip(len(frames.PREFACE))

    def _frame(self) -> Parser:
        """§2"""
        self._is_at_frame = True
        yield from self._inbox.have(frames.HEADER_BYTES)
        if (event := self._at_once()) is not None:
            yield event
            return None
        self._is_at_frame = False
        offset = self.received_bytes
        number, flags, length, crc = self._header(offset)
        self._inbox.skip(frames.HEADER_BYTES)
        if number is FrameType.DATA:
            self._move(number, None, offset)
            if flags == frames.FLAGS["none"]:
                yield from self._plain_data(length, crc, offset)
            else:
                yield from self._packed_data(flags, length, crc, offset)
            return None
        payload = memoryview((yield from self._inbox.array(length)))
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", number)
        message = frames.unpack(number, payload, offset + frames.HEADER_BYTES)
        self._move(number, message, offset)
        yield message
        return None

    def _header(self, offset: int) -> frames.Header:
        """§2.1"""
        header = frames.parse_head(bytes(self._inbox.front(frames.HEADER_BYTES)), offset)
        if self.ended_with is not None:
            frames.refuse("a frame behind the end of the session", offset, "§4")
        if (self.state, self.speaker, header.number) not in TRANSITIONS:
            self._refuse(header.number, offset)
        return header

    def _plain_data(self, length: int, crc: int, offset: int) -> Parser:
        """§2.3. Bytes already in our buffer are copied; once it is empty, the lender's buffer may be used directly."""
        lender = self.lender
        assert lender is not None, "DATA, and nobody who lends a buffer"
        has_checksum = self._has_checksums
        if not has_checksum and crc:
            frames.refuse("a payload checksum where the digest has its place", offset, "§2.3", FrameType.DATA)
        self._rest = length
        self._crc = 0
        while self._rest:
            before = self._rest
            if here := self._inbox.front(before):
                room = lender.get_buffer()
                take = min(len(here), len(room))
                if has_checksum:
                    self._crc = frames.extend(self._crc, here[:take])
                room[:take] = here[:take]
                self._inbox.skip(take)
                self._rest -= take
            else:
                if self._inbox.is_over:
                    self._rest = 0
                    raise End
                yield NEED_DATA
                take = before - self._rest
            if take:
                self._stream_bytes += take
                if not self._rest and self._crc != crc:
                    frames.refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
                yield DataReceived(take)

    def _packed_data(self, flags: int, length: int, crc: int, offset: int) -> Parser:
        """§2.3"""
        name = next(name for name, value in frames.FLAGS.items() if value == flags)
        welcome = self._common.welcome
        if welcome is None or name not in welcome.compressions:
            frames.refuse(f"{name} has not been agreed on", offset, "§2.3", FrameType.DATA)
        payload = memoryview((yield from self._inbox.array(length)))
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
        raw = self._packing.unpack(name, payload, offset)
        self._stream_bytes += len(raw)
        yield DataReceived(len(raw), raw)
