"""Who may send what and when, and bytes to messages and back (specs/session.md §1, §4 to §6). No I/O, no clock.

`Incoming` takes bytes by `get_buffer` and `buffer_updated`, and returns messages by `next_event`; `Outgoing` makes the
bytes for the other side by `send` and `send_data`. One table says who may send what and when, in both directions. The
save stream inside DATA frames is not parsed here: the session lends buffers for it, so that long payloads are received
without a copy, and reports what has arrived.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NoReturn, Protocol, cast

from remus_ckpt.errors import LinkError, UnknownFormat
from remus_ckpt.limits import KIB
from remus_ckpt.pages import Buffer
from remus_ckpt.session import frames
from remus_ckpt.session.frames import FrameType
from remus_ckpt.session.messages import Ack, Begin, Commit, Compression, Error, Goodbye, Hello, Message, Welcome
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Walker, Whole, ack_frame, durable_ack, end_frames

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further message."""

DIRECT_BYTES = 64 * KIB
"""Payloads of at least this size are received directly into the lender's buffer."""

ACKABLE = 4096
"""How many commits back an acknowledgement may reach."""
WHOLE_BYTES = 512 * KIB
"""A checkpoint of at most this size may be received as a whole; longer ones are better stored while they come."""
_BUFFER_BYTES = WHOLE_BYTES + 64 * KIB

Side = Literal["client", "server"]


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


class SessionState(Enum):
    """A state of the session; both sides go through the same ones."""

    START = "start"
    PRIMARY_HELLO = "hello of a primary, unanswered"
    CONTROL_HELLO = "hello of a client that sends requests, unanswered"
    WELCOMED = "welcome"
    BETWEEN = "stream, between checkpoints"
    WITHIN = "stream, within a checkpoint"
    CONTROL = "requests and replies"


TRANSITIONS: dict[tuple[SessionState, Side, FrameType], SessionState] = {
    (SessionState.START, "client", FrameType.HELLO): SessionState.PRIMARY_HELLO,  # CONTROL_HELLO by its role
    (SessionState.PRIMARY_HELLO, "server", FrameType.WELCOME): SessionState.WELCOMED,
    (SessionState.CONTROL_HELLO, "server", FrameType.WELCOME): SessionState.CONTROL,
    (SessionState.WELCOMED, "client", FrameType.BEGIN): SessionState.BETWEEN,
    (SessionState.BETWEEN, "client", FrameType.DATA): SessionState.WITHIN,
    (SessionState.WITHIN, "client", FrameType.DATA): SessionState.WITHIN,
    (SessionState.WITHIN, "client", FrameType.COMMIT): SessionState.BETWEEN,
    (SessionState.BETWEEN, "server", FrameType.ACK): SessionState.BETWEEN,
    (SessionState.WITHIN, "server", FrameType.ACK): SessionState.WITHIN,
    (SessionState.CONTROL, "client", FrameType.REQUEST): SessionState.CONTROL,
    (SessionState.CONTROL, "server", FrameType.REPLY): SessionState.CONTROL,
    **{
        (state, side, FrameType.HEARTBEAT): state
        for state in (SessionState.WELCOMED, SessionState.BETWEEN, SessionState.WITHIN, SessionState.CONTROL)
        for side in cast(tuple[Side, ...], ("client", "server"))
    },
    **{
        (state, side, number): state
        for state in SessionState
        for side in cast(tuple[Side, ...], ("client", "server"))
        for number in (FrameType.ERROR, FrameType.GOODBYE)
    },
}
"""A pair that is not here is an error (specs/session.md §4). Only one side can leave a state, so that frames which
cross on the way mean the same to both."""


_STREAM = (SessionState.BETWEEN, SessionState.WITHIN)
"""In these a client sends DATA and COMMIT, and a server ACK."""
_ACK_BYTES = 128
"""An Ack and its header are shorter."""


class Lender(Protocol):
    """Lends buffers to receive the stream's bytes into: a reader, or a wrapper around one."""

    def get_buffer(self) -> memoryview:
        """A writable buffer of one byte or more."""


Parser = Generator["Message | DataReceived | CheckpointReceived | None", None, Any]


def _both(state: SessionState) -> dict[Side, SessionState]:
    return {"client": state, "server": state}


@dataclass
class Common:
    """What both directions of a session share. Each change is one atomic dict operation, or sets one field.

    hello, welcome, begin: as they were sent or received; they do not change once the stream has begun
    states: the state of each speaking side
    ended: the Error or Goodbye with which each side has ended
    made: the newest positions of this session, oldest first, which an ack may name; added by the client's direction
    """

    hello: Hello | None = None
    welcome: Welcome | None = None
    begin: Begin | None = None
    states: dict[Side, SessionState] = field(default_factory=lambda: _both(SessionState.START))
    ended: dict[Side, Message] = field(default_factory=dict)
    made: dict[Position, None] = field(default_factory=dict)


class Direction:
    """What one side sends, and so what it may send next. Each session has two, and each may have its own thread.

    speaker: the side whose frames go this way

    Hello, Welcome and Begin change the state of both directions: until Begin is complete, one thread must own both,
    except that another may send heartbeats. After that, only its own frames change the state of a direction.
    """

    def __init__(self, speaker: Side, common: Common) -> None:
        self.speaker: Side = speaker
        self._listener: Side = "server" if speaker == "client" else "client"
        self._common = common
        self._stream_bytes = 0  # since the last commit
        self._position: Position | None = None  # of the last commit, or the one that Begin names

    @property
    def state(self) -> SessionState:
        return self._common.states[self.speaker]

    @property
    def ended_with(self) -> Message | None:
        """The Error or Goodbye that ended this direction."""
        return self._common.ended.get(self.speaker)

    @property
    def answered_with(self) -> Message | None:
        """The Error or Goodbye that ended the other direction."""
        return self._common.ended.get(self._listener)

    @property
    def is_over(self) -> bool:
        """Whether either side has ended the session."""
        return bool(self._common.ended)

    @property
    def _has_checksums(self) -> bool:
        """Whether uncompressed DATA frames have a checksum of their payload (§2.3)."""
        welcome = self._common.welcome
        return welcome is None or welcome.digest is None

    def _move(self, number: FrameType, message: Message | None, offset: int | None) -> None:
        """Advance by one frame. offset: where it was received; None: it is to be sent, and a fault is a ValueError."""
        following = TRANSITIONS.get((self.state, self.speaker, number))
        if following is None:
            self._refuse(number, offset)
        common = self._common
        match message:
            case Hello():
                common.hello = message
                if message.role != "primary":
                    following = SessionState.CONTROL_HELLO
            case Welcome():
                assert common.hello is not None
                if message.version not in common.hello.versions:
                    frames.refuse(f"version {message.version} was not in the hello", offset, "§3.2", number)
                strange = set(message.compressions) - set(common.hello.compressions)
                if strange:
                    frames.refuse(f"compressions {sorted(strange)} were not in the hello", offset, "§3.2", number)
                if message.digest is not None and message.digest not in common.hello.digests:
                    frames.refuse(f"the digest {message.digest!r} was not in the hello", offset, "§3.2", number)
                common.welcome = message
            case Begin():
                self._check_begin(message, offset)
                common.begin = message
                self._position = message.position
                if message.position is not None:
                    common.made[message.position] = None
            case Commit():
                self._check_commit(message, offset)
                self._stream_bytes = 0
                self._make(message.position)
            case Ack():
                if message.position not in common.made:
                    frames.refuse(f"{message.position} is no position of this session", offset, "§3.6", number)
            case Error() | Goodbye():
                self._common.ended[self.speaker] = message
        if isinstance(message, Hello | Welcome | Begin):
            self._common.states.update(_both(following))
        else:
            self._common.states[self.speaker] = following

    def _make(self, position: Position) -> None:
        """A commit has made a position."""
        made = self._common.made
        self._position = position
        made[position] = None
        if len(made) > ACKABLE:
            del made[next(iter(made))]

    def _refuse(self, number: FrameType, offset: int | None) -> NoReturn:
        frames.refuse(f"the {self.speaker} may not say it in the state {self.state.name}", offset, "§4", number)

    def _check_begin(self, begin: Begin, offset: int | None) -> None:
        """§5"""
        welcome = self._common.welcome
        assert welcome is not None
        if begin.term != welcome.term:
            frames.refuse(f"term {begin.term} in a session of term {welcome.term}", offset, "§6", FrameType.BEGIN)
        if begin.mode == "continue" and (welcome.stream is None or begin.position != welcome.position):
            frames.refuse(f"it cannot be continued at {begin.position}", offset, "§5", FrameType.BEGIN)

    def _check_commit(self, commit: Commit, offset: int | None) -> None:
        """§3.5"""
        if commit.stream_bytes != self._stream_bytes:
            text = f"{commit.stream_bytes} bytes are committed of {self._stream_bytes}"
            frames.refuse(text, offset, "§3.5", FrameType.COMMIT)
        # The Begin of a full copy need not say what it follows.
        if self._position is not None and commit.before != self._position:
            text = f"it follows {commit.before}, the one before made {self._position}"
            frames.refuse(text, offset, "§5", FrameType.COMMIT)


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
        if HAS_NATIVE and self.speaker == "server" and self.state in _STREAM and self.ended_with is None:
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


class Outgoing(Direction):
    """Messages to bytes. Send the returned bytes before you ask for more: only the order of the frames says which
    follows which. Several sending threads must take turns."""

    def __init__(self, speaker: Side, common: Common) -> None:
        super().__init__(speaker, common)
        self.sent_bytes = 0
        self._packing = frames.Packing()
        self._prefaced = False

    def send(self, message: Message) -> list[Buffer]:
        """The bytes of a message; the first is preceded by the preface.

        Raises ValueError if the message is not allowed now, or if this side has ended the session, or the other side
        has by an Error. Error may be sent in every state, also after `next_event` has raised.
        """
        self._may_send()
        number = frames.TYPES[type(message)]
        payload = frames.pack(message)
        self._move(number, message, None)
        return self._out([frames.head(number, 0, len(payload), frames.extend(0, payload)) + payload])

    def send_durable(self, position: Position) -> list[Buffer]:
        """`send` of an Ack for a durable checkpoint, for those who cannot wait: its bytes without the message."""
        self._may_send()
        if not HAS_NATIVE or position not in self._common.made or not self._prefaced:
            return self.send(Ack(level="durable", position=position))
        return self._out([ack_frame(position)])

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        """DATA frames with the stream's next bytes; without compression, the given buffers are returned uncopied.

        buffers: as the sender of the stream yields them; they must not change before they are sent
        compression: not applied to a frame that it would not make shorter
        """
        self._may_send()
        welcome = self._common.welcome
        if compression != "none" and (welcome is None or compression not in welcome.compressions):
            raise ValueError(f"{compression} has not been agreed on")
        out: list[Buffer] = []
        for parts in frames.portions(buffers):
            self._move(FrameType.DATA, None, None)
            size = sum(len(part) for part in parts)
            self._stream_bytes += size
            packed = None if compression == "none" else self._packing.pack(compression, parts, size)
            if packed is not None:
                out += [
                    frames.head(FrameType.DATA, frames.FLAGS[compression], len(packed), frames.extend(0, packed)),
                    packed,
                ]
                continue
            crc = 0
            if self._has_checksums:
                for part in parts:
                    crc = frames.extend(crc, part)
            out.append(frames.head(FrameType.DATA, 0, size, crc))
            out += parts
        return self._out(out)

    def send_end(
        self,
        buffers: list[Buffer],
        compression: Compression = "none",
        *,
        position: Position,
        before: Position | None,
        stream_bytes: int,
        pages: int,
    ) -> list[Buffer]:
        """`send_data` of the last bytes of a checkpoint, if any are left, and `send` of its Commit, with these fields.

        buffers: each of single bytes in one dimension
        """
        common, size = self._common, sum(map(len, buffers))
        if (
            HAS_NATIVE
            and compression == "none"
            and 0 < size <= frames.DATA_BYTES
            and self._stream_bytes + size == stream_bytes
            and before is not None
            and before == self._position
            and before.epoch + 1 == position.epoch
            and common.states[self.speaker] in _STREAM
        ):
            self._may_send()
            crc = 0
            if self._has_checksums:
                for buffer in buffers:
                    crc = frames.extend(crc, buffer)
            framed = end_frames(size, crc, position, before, stream_bytes, pages)
            common.states[self.speaker] = SessionState.BETWEEN
            self._stream_bytes = 0
            self._make(position)
            return self._out([framed[: frames.HEADER_BYTES], *buffers, framed[frames.HEADER_BYTES :]])
        commit = Commit(position=position, before=before, stream_bytes=stream_bytes, pages=pages)
        return (self.send_data(buffers, compression) if buffers else []) + self.send(commit)

    def _may_send(self) -> None:
        if self.ended_with is not None:
            raise ValueError(f"this side has ended the session: {self.ended_with}")
        if isinstance(self.answered_with, Error):
            raise ValueError(f"the other side has ended the session: {self.answered_with}")

    def _out(self, buffers: list[Buffer]) -> list[Buffer]:
        if buffers and not self._prefaced:
            self._prefaced = True
            buffers.insert(0, frames.PREFACE)
        self.sent_bytes += sum(len(buffer) for buffer in buffers)
        return buffers


class Session:
    """One connection, from its preface to its end, in two directions.

    side: which of the two sides this is

    `incoming` and `outgoing` may have a thread each (`Direction` says from when on). What follows is for who has both.
    """

    def __init__(self, side: Side) -> None:
        self.common = Common()
        self.outgoing = Outgoing(side, self.common)
        self.incoming = Incoming("server" if side == "client" else "client", self.common)

    @property
    def state(self) -> SessionState:
        """Where the session is: in the stream, the client's frames alone move it."""
        return self.common.states["client"]

    @property
    def begin(self) -> Begin | None:
        """As it was sent or received."""
        return self.common.begin

    @property
    def last_sent(self) -> Message | None:
        """The Error or Goodbye that this side ended with."""
        return self.outgoing.ended_with

    @property
    def last_received(self) -> Message | None:
        """The Error or Goodbye that the other side ended with."""
        return self.incoming.ended_with

    @property
    def ended(self) -> bool:
        """Whether Error or Goodbye has been sent or received."""
        return bool(self.common.ended)

    @property
    def received_bytes(self) -> int:
        """As of `Incoming`; so what follows, and `send` and `send_data` as of `Outgoing`."""
        return self.incoming.received_bytes

    @property
    def lender(self) -> Lender | None:
        return self.incoming.lender

    @lender.setter
    def lender(self, lender: Lender | None) -> None:
        self.incoming.lender = lender

    def get_buffer(self) -> memoryview:
        return self.incoming.get_buffer()

    def buffer_updated(self, size: int) -> None:
        self.incoming.buffer_updated(size)

    def feed_eof(self) -> None:
        self.incoming.feed_eof()

    def close(self) -> None:
        self.incoming.close()

    def next_event(self) -> Message | DataReceived | CheckpointReceived | None:
        return self.incoming.next_event()

    def send(self, message: Message) -> list[Buffer]:
        return self.outgoing.send(message)

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        return self.outgoing.send_data(buffers, compression)
