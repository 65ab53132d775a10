"""Who may say what when, and bytes to messages and back (specs/session.md §1, §4 to §6). No I/O, no clock.

Bytes come in by `get_buffer` and `buffer_updated`, messages go out by `next_event`; `send` and `send_data` make the
bytes for the other side. One table says who may say what when, in both directions. The save stream that travels in
DATA frames is not read here: it goes to the sink, uncopied where it is long.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, cast

import numpy as np

from remus_ckpt.errors import LinkError, UnknownFormat
from remus_ckpt.limits import KIB
from remus_ckpt.pages import Buffer
from remus_ckpt.session import frames
from remus_ckpt.session.frames import Compression, FrameType
from remus_ckpt.session.messages import Ack, Begin, Commit, Error, Goodbye, Hello, Message, Welcome
from remus_ckpt.wire.record import Position

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further message."""

DIRECT_BYTES = 64 * KIB
"""From here on a payload is received straight into the sink's buffer."""

ACKABLE = 4096
"""So many commits back an acknowledgement may reach."""
_BUFFER_BYTES = 1 << 16

Side = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class DataReceived:
    """`size` bytes of the stream went to the sink: let it read them before the next event is taken."""

    size: int


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


class Sink(Protocol):
    """Where the stream goes: a `wire.reader.Reader`, or what wraps one."""

    def get_buffer(self) -> memoryview:
        """A writable buffer of one byte or more."""

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into what `get_buffer` returned."""

    def feed(self, data: Buffer) -> None:
        """Bytes that are there already, to be kept without a copy."""


Parser = Generator["Message | DataReceived | None", None, Any]


class _End(Exception):
    """The bytes end within something."""


class Session:
    """One connection, from its preface to its end.

    One thread may receive while another sends. Two that send must take turns, each until its buffers are on the way:
    nothing but their order says which frame follows which.

    `next_event` raises Malformed, LimitExceeded or UnknownFormat for what the peer did, LinkError where the bytes end
    and nobody has ended the session, and the same again from then on. An Error can still be sent then. When this side
    has sent one, what still comes is counted and not read.

    A DATA frame's checksum stands for the whole frame, and the sink has its bytes before all of them are there: after
    an error the sink must give up the checkpoint that it is in. One whose Commit came out of `next_event` is whole.
    """

    def __init__(self, side: Side) -> None:
        self.side: Side = side
        self.peer: Side = "server" if side == "client" else "client"
        self.sink: Sink | None = None
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
        self._small = bytearray(_BUFFER_BYTES)
        self._begin = self._stop = 0  # what of it is received and not yet consumed
        self._base = 0  # where in what was received _small[0] stands
        self._target: memoryview | None = None  # the rest of a payload that is being collected
        self._rest = 0  # of a payload that may go straight to the sink
        self._lent: memoryview | None = None  # the sink's own buffer, while it is being received into
        self._crc = 0
        self._eof = False
        self._error: BaseException | None = None
        self._parser = self._session()

    @property
    def ended(self) -> bool:
        """Whether Error or Goodbye has been sent or received."""
        return self.last_sent is not None or self.last_received is not None

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, but for those that `next_event` has not come to."""
        return self._base + self._begin

    # Bytes in

    def get_buffer(self) -> memoryview:
        """A writable buffer to receive into; `buffer_updated` says how much of it was filled."""
        self._lent = None
        self._give_up()
        if self._target is not None:
            return self._target
        if self._rest >= DIRECT_BYTES and self._begin == self._stop and self.sink is not None:
            theirs = self.sink.get_buffer()[: self._rest]
            if len(theirs) >= DIRECT_BYTES:
                self._lent = theirs
                return theirs
        if self._stop == len(self._small):
            self._compact()
            if self._stop == len(self._small):
                raise BufferError("the buffer is full: call next_event until it returns NEED_DATA")
        return memoryview(self._small)[self._stop :]

    def buffer_updated(self, size: int) -> None:
        """`size` bytes were received into what `get_buffer` returned. Then `next_event` until it says NEED_DATA."""
        if self._lent is not None:
            self._crc = frames.extend(self._crc, self._lent[:size])
            self._lent = None
            self._rest -= size
            if size:
                assert self.sink is not None
                self.sink.buffer_updated(size)
        elif self._target is not None:
            self._target = self._target[size:]
        else:
            self._stop += size

    def feed_eof(self) -> None:
        """No more bytes will come."""
        self._eof = True

    # Events out

    def next_event(self) -> Message | DataReceived | None:
        """The next message, or NEED_DATA. After DataReceived let the sink read what it has before the next is taken."""
        if self._error is not None:
            raise self._error
        self._give_up()
        try:
            return next(self._parser)
        except _End:
            if self.ended:
                self._parser = self._drain()
                return NEED_DATA
            self._error = LinkError("the connection ended without a goodbye")
        except Exception as error:
            self._error = error
        raise self._error

    # The buffer

    def _compact(self) -> None:
        left = self._small[self._begin : self._stop]
        self._small[: len(left)] = left
        self._base += self._begin
        self._begin, self._stop = 0, len(left)

    def _have(self, size: int) -> Parser:
        """Wait until `size` bytes can be consumed; at most what the buffer holds."""
        while self._stop - self._begin < size:
            if self._begin + size > len(self._small):
                self._compact()
            if self._eof:
                raise _End
            yield NEED_DATA

    def _payload(self, size: int) -> Generator[Message | DataReceived | None, None, memoryview]:
        """A payload, whole. A long one is taken in steps, so that a length alone costs no memory."""
        if size <= len(self._small):
            yield from self._have(size)
            self._begin += size
            return memoryview(self._small)[self._begin - size : self._begin]
        data = np.empty(min(size, _BUFFER_BYTES * 4), dtype=np.uint8)
        filled = 0
        while True:
            yield from self._into(memoryview(data)[filled:])
            filled = len(data)
            if filled == size:
                return memoryview(data)
            larger = np.empty(min(size, filled * 4), dtype=np.uint8)
            larger[:filled] = data
            data = larger

    def _into(self, target: memoryview) -> Parser:
        take = min(len(target), self._stop - self._begin)
        target[:take] = memoryview(self._small)[self._begin : self._begin + take]
        self._begin += take
        self._target = target[take:] if take < len(target) else None
        while self._target is not None and len(self._target):
            if self._eof:
                self._target = None
                raise _End
            yield NEED_DATA
        self._target = None
        self._base += len(target) - take

    # The grammar

    def _session(self) -> Parser:
        yield from self._preface()
        while True:
            yield from self._frame()

    def _give_up(self) -> None:
        if isinstance(self.last_sent, Error):
            # What was under way when this side ended it is of no use any longer: not to the sink either.
            self._target, self._rest, self._parser = None, 0, self._drain()

    def _drain(self) -> Parser:
        """Behind the end, what comes is counted and not read."""
        while True:
            self._begin = self._stop
            yield NEED_DATA

    def _preface(self) -> Parser:
        """§1.1"""
        for size in range(1, len(frames.PREFACE) + 1):
            yield from self._have(size)
            if not frames.PREFACE.startswith(self._small[self._begin : self._begin + size]):
                raise UnknownFormat(
                    "the other side does not speak the session protocol of remus-ckpt: is it the right address, and "
                    "is TLS used on both sides or on none?",
                    offset=size - 1,
                    section="session.md §1.1",
                )
        self._begin += len(frames.PREFACE)

    def _frame(self) -> Parser:
        """§2"""
        yield from self._have(frames.HEADER_BYTES)
        offset = self.received_bytes
        number, flags, length, crc = self._header(offset)
        self._begin += frames.HEADER_BYTES
        if number is FrameType.DATA:
            self._move(self.peer, number, None, offset)
            if flags == frames.FLAGS["none"]:
                yield from self._plain_data(length, crc, offset)
            else:
                yield from self._packed_data(flags, length, crc, offset)
            return None
        payload = yield from self._payload(length)
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", number)
        message = frames.unpack(number, payload, offset + frames.HEADER_BYTES)
        self._move(self.peer, number, message, offset)
        yield message
        return None

    def _header(self, offset: int) -> frames.Header:
        """§2.1"""
        header = frames.parse_head(bytes(self._small[self._begin : self._begin + frames.HEADER_BYTES]), offset)
        if self.last_received is not None:
            frames.refuse("a frame behind the end of the session", offset, "§4")
        if (self.state, self.peer, header.number) not in TRANSITIONS:
            text = f"the {self.peer} may not say it in the state {self.state.name}"
            frames.refuse(text, offset, "§4", header.number)
        return header

    def _plain_data(self, length: int, crc: int, offset: int) -> Parser:
        """§2.3. What is in the buffer is copied on; when nothing is, the sink's own may be received into."""
        sink = self.sink
        assert sink is not None, "DATA, and no sink has been set"
        self._rest = length
        self._crc = 0
        while self._rest:
            before = self._rest
            take = min(before, self._stop - self._begin)
            if take:
                room = sink.get_buffer()
                take = min(take, len(room))
                part = memoryview(self._small)[self._begin : self._begin + take]
                self._crc = frames.extend(self._crc, part)
                room[:take] = part
                self._begin += take
                self._rest -= take
                sink.buffer_updated(take)
            else:
                if self._eof:
                    self._rest = 0
                    raise _End
                yield NEED_DATA
                take = before - self._rest
                self._base += take
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
        payload = yield from self._payload(length)
        if frames.extend(0, payload) != crc:
            frames.refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
        raw = self._packing.unpack(name, payload, offset)
        assert self.sink is not None, "DATA, and no sink has been set"
        self.sink.feed(raw)
        self._stream_bytes += len(raw)
        yield DataReceived(len(raw))

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
