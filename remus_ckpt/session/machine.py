"""Who may say what when, and bytes to messages and back (specs/session.md §1, §4 to §6). No I/O, no clock.

Bytes come in by `get_buffer` and `buffer_updated`, messages go out by `next_event`; `send` and `send_data` make the
bytes for the other side. One table says who may say what when, in both directions. The save stream that travels in
DATA frames is not read here, nor is it moved: the session lends room for it, uncopied where it is long, and says what
has come.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, cast

from remus_ckpt.errors import LinkError, UnknownFormat
from remus_ckpt.limits import KIB
from remus_ckpt.pages import Buffer
from remus_ckpt.session import frames
from remus_ckpt.session.frames import FrameType
from remus_ckpt.session.messages import Ack, Begin, Commit, Compression, Error, Goodbye, Hello, Message, Welcome
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.record import Position

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further message."""

DIRECT_BYTES = 64 * KIB
"""From here on a payload is received straight into the lender's buffer."""

ACKABLE = 4096
"""So many commits back an acknowledgement may reach."""
_BUFFER_BYTES = 1 << 16

Side = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of the stream have come: take them in before the next event is asked for.

    data: the bytes; None: the first `size` bytes of what the lender's `get_buffer` gave last
    """

    size: int
    data: bytes | None = None


class State(Enum):
    """A place in the session; both sides walk the same ones."""

    START = "start"
    PRIMARY_HELLO = "hello of a primary, unanswered"
    CONTROL_HELLO = "hello for control, unanswered"
    WELCOMED = "welcome"
    BETWEEN = "stream, between checkpoints"
    WITHIN = "stream, within a checkpoint"
    CONTROL = "control"


TRANSITIONS: dict[tuple[State, Side, FrameType], State] = {
    (State.START, "client", FrameType.HELLO): State.PRIMARY_HELLO,  # CONTROL_HELLO by its role
    (State.PRIMARY_HELLO, "server", FrameType.WELCOME): State.WELCOMED,
    (State.CONTROL_HELLO, "server", FrameType.WELCOME): State.CONTROL,
    (State.WELCOMED, "client", FrameType.BEGIN): State.BETWEEN,
    (State.BETWEEN, "client", FrameType.DATA): State.WITHIN,
    (State.WITHIN, "client", FrameType.DATA): State.WITHIN,
    (State.WITHIN, "client", FrameType.COMMIT): State.BETWEEN,
    (State.BETWEEN, "server", FrameType.ACK): State.BETWEEN,
    (State.WITHIN, "server", FrameType.ACK): State.WITHIN,
    (State.CONTROL, "client", FrameType.REQUEST): State.CONTROL,
    (State.CONTROL, "server", FrameType.REPLY): State.CONTROL,
    **{
        (state, side, FrameType.HEARTBEAT): state
        for state in (State.WELCOMED, State.BETWEEN, State.WITHIN, State.CONTROL)
        for side in cast(tuple[Side, ...], ("client", "server"))
    },
    **{
        (state, side, number): state
        for state in State
        for side in cast(tuple[Side, ...], ("client", "server"))
        for number in (FrameType.ERROR, FrameType.GOODBYE)
    },
}
"""A pair that is not here is an error (specs/session.md §4). Only one side can leave a state, so that frames which
cross on the way mean the same to both."""


class Lender(Protocol):
    """Where the stream's bytes are to be received: a reader, or what wraps one."""

    def get_buffer(self) -> memoryview:
        """A writable buffer of one byte or more."""


Parser = Generator["Message | DataReceived | None", None, Any]


class Session:
    """One connection, from its preface to its end.

    One thread may receive while another sends. Two that send must take turns, each until its buffers are on the way:
    nothing but their order says which frame follows which.

    `next_event` raises Malformed, LimitExceeded or UnknownFormat for what the peer did, LinkError where the bytes end
    and nobody has ended the session, and the same again from then on. An Error can still be sent then. When this side
    has sent one, what still comes is counted and not read.

    A DATA frame's checksum stands for the whole frame, and its bytes come out before all of them are there: after an
    error the checkpoint that they belong to must be given up. One whose Commit came out of `next_event` is whole.
    """

    def __init__(self, side: Side) -> None:
        self.side: Side = side
        self.peer: Side = "server" if side == "client" else "client"
        self.lender: Lender | None = None
        """To be set before the first DATA comes: when Begin came out of `next_event`, at the latest."""
        self.state = State.START
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.begin: Begin | None = None
        """These three as they were sent or received."""
        self.sent_bytes = 0
        self.last_sent: Message | None = None
        """The Error or Goodbye that this side ended with."""
        self.last_received: Message | None = None
        """The one that the other side ended with."""
        self._stream_bytes = 0  # since the last commit
        self._position: Position | None = None  # of the last commit, or that Begin names
        self._made: dict[Position, None] = {}  # the newest positions of this session, which an ack may name
        self._prefaced = False
        self._packing = frames.Packing()
        self._inbox = Inbox(_BUFFER_BYTES, first_bytes=_BUFFER_BYTES * 4)
        self._rest = 0  # of a payload that may be received into the lender's buffer
        self._lent: memoryview | None = None  # that buffer, while it is being received into
        self._crc = 0
        self._error: BaseException | None = None
        self._parser = self._session()

    @property
    def ended(self) -> bool:
        """Whether Error or Goodbye has been sent or received."""
        return self.last_sent is not None or self.last_received is not None

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, but for those that `next_event` has not come to."""
        return self._inbox.offset

    # Bytes in

    def get_buffer(self) -> memoryview:
        """A writable buffer to receive into; `buffer_updated` says how much of it was filled."""
        self._lent = None
        self._give_up()
        if self._rest >= DIRECT_BYTES and not self._inbox.buffered and self.lender is not None:
            theirs = self.lender.get_buffer()[: self._rest]
            if len(theirs) >= DIRECT_BYTES:
                self._lent = theirs
                return theirs
        return self._inbox.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into what `get_buffer` returned. Then `next_event` until it says NEED_DATA."""
        if self._lent is None:
            self._inbox.buffer_updated(size)
            return
        self._crc = frames.extend(self._crc, self._lent[:size])
        self._lent = None
        self._rest -= size
        self._inbox.received(size)

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self._inbox.feed_eof()

    def close(self) -> None:
        """Drop the parser and the error. `next_event` gives nothing more; no other thread may be in it.

        Both refer back to this session. Without this call its buffers stay until the next full garbage collection.
        """
        self._parser.close()
        self._parser = self._inbox.drain()
        self._error = None

    # Events out

    def next_event(self) -> Message | DataReceived | None:
        """The next message, or NEED_DATA."""
        if self._error is not None:
            raise self._error
        self._give_up()
        try:
            return next(self._parser)
        except End:
            if self.ended:
                self._parser = self._inbox.drain()
                return NEED_DATA
            self._error = LinkError("the connection ended without a goodbye")
        except Exception as error:
            self._error = error
        raise self._error

    # The grammar

    def _session(self) -> Parser:
        yield from self._preface()
        while True:
            yield from self._frame()

    def _give_up(self) -> None:
        if isinstance(self.last_sent, Error):
            # What was under way when this side ended it is of no use any longer.
            self._rest = 0
            self._parser.close()
            self._parser = self._inbox.drain()

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
        yield from self._inbox.have(frames.HEADER_BYTES)
        offset = self.received_bytes
        number, flags, length, crc = self._header(offset)
        self._inbox.skip(frames.HEADER_BYTES)
        if number is FrameType.DATA:
            self._move(self.peer, number, None, offset)
            if flags == frames.FLAGS["none"]:
                yield from self._plain_data(length, crc, offset)
            else:
                yield from self._packed_data(flags, length, crc, offset)
            return None
        payload = memoryview((yield from self._inbox.array(length)))
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", number)
        message = frames.unpack(number, payload, offset + frames.HEADER_BYTES)
        self._move(self.peer, number, message, offset)
        yield message
        return None

    def _header(self, offset: int) -> frames.Header:
        """§2.1"""
        header = frames.parse_head(bytes(self._inbox.front(frames.HEADER_BYTES)), offset)
        if self.last_received is not None:
            frames.refuse("a frame behind the end of the session", offset, "§4")
        if (self.state, self.peer, header.number) not in TRANSITIONS:
            text = f"the {self.peer} may not say it in the state {self.state.name}"
            frames.refuse(text, offset, "§4", header.number)
        return header

    def _plain_data(self, length: int, crc: int, offset: int) -> Parser:
        """§2.3. What is in the buffer is copied on; when nothing is, the lender's may be received into."""
        lender = self.lender
        assert lender is not None, "DATA, and nobody who lends a buffer"
        self._rest = length
        self._crc = 0
        while self._rest:
            before = self._rest
            if here := self._inbox.front(before):
                room = lender.get_buffer()
                take = min(len(here), len(room))
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
        if self.welcome is None or name not in self.welcome.compressions:
            frames.refuse(f"{name} has not been agreed on", offset, "§2.3", FrameType.DATA)
        payload = memoryview((yield from self._inbox.array(length)))
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
        raw = self._packing.unpack(name, payload, offset)
        self._stream_bytes += len(raw)
        yield DataReceived(len(raw), raw)

    # The rules, for both directions

    def _move(self, side: Side, number: FrameType, message: Message | None, offset: int | None) -> None:
        """Go on by one frame. offset: where it was received; None: it is to be sent, and what is wrong a ValueError."""
        here = self.state
        following = TRANSITIONS.get((here, side, number))
        if following is None:
            frames.refuse(f"the {side} may not say it in the state {here.name}", offset, "§4", number)
        match message:
            case Hello():
                self.hello = message
                if message.role == "control":
                    following = State.CONTROL_HELLO
            case Welcome():
                assert self.hello is not None
                if message.version not in self.hello.versions:
                    frames.refuse(f"version {message.version} was not in the hello", offset, "§3.2", number)
                strange = set(message.compressions) - set(self.hello.compressions)
                if strange:
                    frames.refuse(f"compressions {sorted(strange)} were not in the hello", offset, "§3.2", number)
                self.welcome = message
            case Begin():
                self._check_begin(message, offset)
                self.begin = message
                self._position = message.position
                if message.position is not None:
                    self._made[message.position] = None
            case Commit():
                self._check_commit(message, offset)
                self._stream_bytes = 0
                self._position = message.position
                self._made[message.position] = None
                if len(self._made) > ACKABLE:
                    del self._made[next(iter(self._made))]
            case Ack():
                if message.position not in self._made:
                    frames.refuse(f"{message.position} is no position of this session", offset, "§3.6", number)
            case Error() | Goodbye():
                if offset is None:
                    self.last_sent = message
                else:
                    self.last_received = message
        # What leaves the state alone does not write it either: the other thread may have, meanwhile.
        if following is not here:
            self.state = following

    def _check_begin(self, begin: Begin, offset: int | None) -> None:
        """§5"""
        assert self.welcome is not None
        if begin.term != self.welcome.term:
            frames.refuse(f"term {begin.term} in a session of term {self.welcome.term}", offset, "§6", FrameType.BEGIN)
        if begin.mode == "continue" and (self.welcome.stream is None or begin.position != self.welcome.position):
            frames.refuse(f"it cannot be continued at {begin.position}", offset, "§5", FrameType.BEGIN)

    def _check_commit(self, commit: Commit, offset: int | None) -> None:
        """§3.5"""
        if commit.stream_bytes != self._stream_bytes:
            text = f"{commit.stream_bytes} bytes are committed of {self._stream_bytes}"
            frames.refuse(text, offset, "§3.5", FrameType.COMMIT)
        # A full copy need not say in its Begin what it follows.
        if self._position is not None and commit.before != self._position:
            text = f"it follows {commit.before}, the one before made {self._position}"
            frames.refuse(text, offset, "§5", FrameType.COMMIT)

    # Bytes out

    def send(self, message: Message) -> list[Buffer]:
        """The bytes that say it, the preface before the first.

        Raises ValueError where the message may not stand, and when this side has ended the session, or the other has
        by an Error. Error may be sent in every state, and after `next_event` has raised.
        """
        self._may_send()
        number = frames.TYPES[type(message)]
        payload = frames.pack(message)
        self._move(self.side, number, message, None)
        return self._out([frames.head(number, 0, len(payload), frames.extend(0, payload)) + payload])

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        """DATA frames of the stream's next bytes; uncompressed, the buffers themselves stand between the headers.

        buffers: as the sender of the stream yields them; they must not change before they are sent
        compression: a frame that it would not make shorter goes as it is
        """
        self._may_send()
        if compression != "none" and (self.welcome is None or compression not in self.welcome.compressions):
            raise ValueError(f"{compression} has not been agreed on")
        out: list[Buffer] = []
        for parts in frames.portions(buffers):
            self._move(self.side, FrameType.DATA, None, None)
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
            for part in parts:
                crc = frames.extend(crc, part)
            out.append(frames.head(FrameType.DATA, 0, size, crc))
            out += parts
        return self._out(out)

    def _may_send(self) -> None:
        if self.last_sent is not None:
            raise ValueError(f"this side has ended the session: {self.last_sent}")
        if isinstance(self.last_received, Error):
            raise ValueError(f"the other side has ended the session: {self.last_received}")

    def _out(self, buffers: list[Buffer]) -> list[Buffer]:
        if buffers and not self._prefaced:
            self._prefaced = True
            buffers.insert(0, frames.PREFACE)
        self.sent_bytes += sum(len(buffer) for buffer in buffers)
        return buffers
