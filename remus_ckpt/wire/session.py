"""Bytes to messages and back for the session between a primary and its backup (specs/session.md). No I/O, no clock.

Bytes come in by `get_buffer` and `buffer_updated`, messages go out by `next_event`; `send` and `send_data` make the
bytes for the other side. One table says who may say what when, in both directions. The save stream that travels in
DATA frames is not read here: it goes to the sink, uncopied where it is long.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Any, Literal, NoReturn, Protocol, cast

import google_crc32c
import lz4.block
import msgpack
import numpy as np

from remus_ckpt.errors import LimitExceeded, LinkError, Malformed, RemusError, UnknownFormat
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.pages import Buffer
from remus_ckpt.wire.record import DIGEST_BYTES, Position

try:
    import zstandard
except ImportError:  # an extra: without it zstd is not offered, and refused when it comes
    zstandard = None  # type: ignore[assignment, unused-ignore]

PREFACE = b"\x89REMUSs\n"
VERSION = 1

NEED_DATA = None
"""What `next_event` returns when the bytes so far hold no further message."""

DATA_BYTES = 4 * MIB
"""The payload of a DATA frame, and what a compressed one may hold."""
CONTROL_BYTES = 64 * KIB
"""The payload of any other frame …"""
REQUEST_BYTES = 1 * MIB
"""… but of REQUEST and REPLY."""
DIRECT_BYTES = 64 * KIB
"""From here on a payload is received straight into the sink's buffer."""

RUN_BYTES = 16
NAME_CHARS = 64
TEXT_CHARS = 4096
"""An error's message, a goodbye's reason, a text in a status."""
ENTRIES = 256
"""Of a status, of limits, of a list of versions or compressions."""
TREE_ENTRIES = 4096
"""Of each list and map in a request or a reply."""
ACKABLE = 4096
"""So many commits back an acknowledgement may reach."""
DEPTH = 16
"""How deep the arguments of a request and the result of a reply may nest."""

_BUFFER_BYTES = 1 << 16
_HEADER = struct.Struct("<BBHII")
_CRC = struct.Struct("<I")
_RAW = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_MOST = (1 << 63) - 1

Side = Literal["client", "server"]
Compression = Literal["none", "lz4", "zstd"]

Level = Literal["received", "durable", "applied"]
LEVELS: tuple[Level, ...] = ("received", "durable", "applied")
"""How far a checkpoint has come on the backup, in that order (specs/session.md §3.6)."""

FLAGS: dict[str, int] = {"none": 0, "lz4": 1, "zstd": 2}
"""How the payload of a DATA frame is packed (specs/session.md §2.3)."""

COMPRESSIONS: tuple[str, ...] = ("lz4", "zstd") if zstandard else ("lz4",)
"""What can be unpacked here: what a hello offers and a welcome chooses from."""


class FrameType(IntEnum):
    """The first byte of a frame (specs/session.md §2.1)."""

    HELLO = 1
    WELCOME = 2
    BEGIN = 3
    DATA = 4
    COMMIT = 5
    ACK = 6
    HEARTBEAT = 7
    ERROR = 8
    GOODBYE = 9
    REQUEST = 10
    REPLY = 11


class ErrorCode(StrEnum):
    """Why a session is refused or ended (specs/session.md §7). A peer may say others."""

    VERSION = "version"
    NAME = "name"
    BUSY = "busy"
    FENCED = "fenced"
    MALFORMED = "malformed"
    LIMIT = "limit"
    STREAM = "stream"
    STORE = "store"
    POSITION = "position"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"


def check_name(name: str) -> str:
    """The name of something protected, as it may stand in a hello and as a directory's name. Raises ValueError."""
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)):
        raise ValueError(
            f"{name!r:.80} is no name: it has 1…{NAME_CHARS} letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit"
        )
    return name


# What a field may hold. Each takes what the wire brings, or the object it stands for, and gives the object.

Kind = Callable[[Any], Any]


def _whole(low: int = 0, high: int = _MOST) -> Kind:
    def kind(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{value!r:.40} in place of a whole number in {low}…{high}")
        return value

    return kind


def _text(most: int, least: int = 0) -> Kind:
    def kind(value: Any) -> str:
        if type(value) is not str or not least <= len(value) <= most:
            raise ValueError(f"{value!r:.40} in place of a text of {least}…{most} characters")
        return value

    return kind


def _clipped(value: Any) -> str:
    """A sentence for a person: rather cut than refused."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} in place of a text")
    return value[:TEXT_CHARS].encode("utf-8", "replace").decode()


def _octets(size: int) -> Kind:
    def kind(value: Any) -> bytes:
        if type(value) is not bytes or len(value) != size:
            raise ValueError(f"{value!r:.40} in place of {size} bytes")
        return value

    return kind


def _one_of(*choices: Any) -> Kind:
    def kind(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{value!r:.40} in place of one of {choices}")
        return value

    return kind


def _optional(inner: Kind) -> Kind:
    return lambda value: None if value is None else inner(value)


def _several(inner: Kind, least: int = 0) -> Kind:
    def kind(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= ENTRIES:
            raise ValueError(f"{value!r:.40} in place of a list of {least}…{ENTRIES}")
        return tuple(inner(item) for item in value)

    return kind


def _map(inner: Kind) -> Kind:
    key_kind = _text(NAME_CHARS)

    def kind(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > ENTRIES:
            raise ValueError(f"{value!r:.40} in place of a map of at most {ENTRIES}")
        return {key_kind(key): inner(item) for key, item in value.items()}

    return kind


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not (math.isfinite(value) and 0 <= value <= 1e9):
        raise ValueError(f"{value!r:.40} in place of a number of seconds")
    return float(value)


def _scalar(value: Any) -> Any:
    if value is None or type(value) in (bool, float):
        return value
    if type(value) is int:
        return _whole(-_MOST)(value)
    return _text(TEXT_CHARS)(value)


def _tree(value: Any, depth: int = DEPTH) -> Any:
    """What a request or a reply may carry."""
    if isinstance(value, dict | list | tuple):
        if depth == 0:
            raise ValueError(f"nested more than {DEPTH} deep")
        if len(value) > TREE_ENTRIES:
            raise ValueError(f"{len(value)} entries, more than {TREE_ENTRIES}")
        if not isinstance(value, dict):
            return [_tree(item, depth - 1) for item in value]
        if not all(type(key) is str for key in value):
            raise ValueError("a key that is no text")
        return {key: _tree(item, depth - 1) for key, item in value.items()}
    if value is None or type(value) in (bool, float, str, bytes):
        return value
    return _whole(-_MOST)(value)


def _tree_map(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} in place of a map")
    return _tree(value)


def _position(value: Any) -> Position:
    if isinstance(value, Position):
        return value
    if type(value) is not list or len(value) != 2:
        raise ValueError(f"{value!r:.40} in place of a position")
    return Position(_whole()(value[0]), _octets(DIGEST_BYTES)(value[1]))


def _shape(value: Any) -> StreamShape:
    if isinstance(value, StreamShape):
        return value
    if type(value) is not dict:
        raise ValueError(f"{value!r:.40} in place of a stream's shape")
    fields: list[Any] = [value.get(key) for key in ("codec", "word", "p2m_size")]
    return StreamShape(*fields)


_NAME = _text(NAME_CHARS, 1)
_WORD = _one_of(4, 8)
_PROGRAM = _text(256)
_VERSIONS = _several(_whole(0, 0xFFFFFFFF), 1)


def _checked(message: Any, kinds: dict[str, Kind]) -> None:
    for key, kind in kinds.items():
        try:
            object.__setattr__(message, key, kind(getattr(message, key)))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What a stream must be to go on where another stopped. p2m_size: pages of memory."""

    codec: str
    word: int
    p2m_size: int

    def __post_init__(self) -> None:
        _checked(self, {"codec": _NAME, "word": _WORD, "p2m_size": _whole(1)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The base of all messages. Raises ValueError for a value that the table of fields does not allow."""

    def __post_init__(self) -> None:
        _checked(self, FIELDS[type(self)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """The client's first word (specs/session.md §3.1). All after `role` may be empty or zero for `control`.

    versions: of this protocol, that the client can speak
    program: name and version, for people
    run: 16 bytes, random for each run of a primary
    term: None for one that has never been told any
    memory_pages, page_size: of what is protected; codec, word: of the stream that would follow
    compressions: of DATA frames, that the client can make
    """

    versions: tuple[int, ...] = (VERSION,)
    program: str
    role: Literal["primary", "control"]
    name: str = ""
    run: bytes = bytes(RUN_BYTES)
    term: int | None = None
    memory_pages: int = 0
    page_size: int = 0
    codec: str = ""
    word: int = 0
    compressions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Hello])
        if self.role == "primary" or self.name:
            check_name(self.name)
        if self.role == "primary":
            _checked(self, {"memory_pages": _whole(1), "page_size": _whole(1), "codec": _NAME, "word": _WORD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """The server's answer (specs/session.md §3.2).

    version: of the hello's, the one that is spoken from here on
    term: of this session
    position: of the newest checkpoint that the backup holds durably, None: nothing
    highest_epoch: that it has ever seen, also in checkpoints that it has lost: a full copy must have a higher one
    stream: what a stream that continues there must be; None: only a full copy will do
    compressions: of the hello's, those that DATA frames may use
    limits: by name, what the backup takes
    lease_s: after so many seconds without any frame the other side counts as lost
    """

    version: int = VERSION
    program: str
    term: int
    position: Position | None = None
    highest_epoch: int | None = None
    stream: StreamShape | None = None
    compressions: tuple[str, ...] = ()
    limits: dict[str, int]
    lease_s: float

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Welcome])
        if self.stream is not None and self.position is None:
            raise ValueError("a stream to continue, and no position in it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin(Message):
    """The primary's choice (specs/session.md §3.3). position: what the first checkpoint follows, None: nothing."""

    mode: Literal["full", "continue"]
    term: int
    position: Position | None = None
    wait: Level = "durable"

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Begin])
        if self.mode == "continue" and self.position is None:
            raise ValueError("continues no position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Message):
    """The end of a checkpoint (specs/session.md §3.5).

    position, before: that it makes and that it follows
    stream_bytes: in DATA frames since the last commit, unpacked
    pages: that it carries
    """

    position: Position
    before: Position | None
    stream_bytes: int
    pages: int

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Commit])
        if self.before is not None and self.position.epoch != self.before.epoch + 1:
            raise ValueError(f"the checkpoint {self.position} behind {self.before}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack(Message):
    """What the backup has done with a checkpoint and all before it (specs/session.md §3.6)."""

    level: Level
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """A sign of life (specs/session.md §3.7). number: of this one; status: what people may be shown."""

    number: int
    status: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error(Message):
    """The end, and whose fault it is (specs/session.md §3.8, §7). A long message is cut.

    term: with `fenced`, the one that is in force; offset: of the fault in the stream or the session's bytes
    """

    code: str
    message: str
    term: int | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye(Message):
    """The end, by intention (specs/session.md §3.9). A long reason is cut."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Message):
    """Something asked for in a control session (specs/session.md §3.10)."""

    number: int
    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Message):
    """What came of the request of that number (specs/session.md §3.11)."""

    number: int
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataReceived:
    """`size` bytes of the stream went to the sink: let it read them before the next event is taken."""

    size: int


FIELDS: dict[type[Message], dict[str, Kind]] = {
    Hello: {
        "versions": _VERSIONS,
        "program": _PROGRAM,
        "role": _one_of("primary", "control"),
        "name": _text(NAME_CHARS),
        "run": _octets(RUN_BYTES),
        "term": _optional(_whole()),
        "memory_pages": _whole(),
        "page_size": _whole(),
        "codec": _text(NAME_CHARS),
        "word": _one_of(0, 4, 8),
        "compressions": _several(_NAME),
    },
    Welcome: {
        "version": _whole(0, 0xFFFFFFFF),
        "program": _PROGRAM,
        "term": _whole(),
        "position": _optional(_position),
        "highest_epoch": _optional(_whole()),
        "stream": _optional(_shape),
        "compressions": _several(_NAME),
        "limits": _map(_whole()),
        "lease_s": _seconds,
    },
    Begin: {
        "mode": _one_of("full", "continue"),
        "term": _whole(),
        "position": _optional(_position),
        "wait": _one_of(*LEVELS),
    },
    Commit: {
        "position": _position,
        "before": _optional(_position),
        "stream_bytes": _whole(1),
        "pages": _whole(),
    },
    Ack: {"level": _one_of(*LEVELS), "position": _position},
    Heartbeat: {"number": _whole(), "status": _map(_scalar)},
    Error: {"code": _NAME, "message": _clipped, "term": _optional(_whole()), "offset": _optional(_whole())},
    Goodbye: {"reason": _clipped},
    Request: {"number": _whole(), "method": _NAME, "arguments": _tree_map},
    Reply: {"number": _whole(), "result": _tree_map},
}
"""Each message's keys on the wire, in this order, and what may stand there (specs/session.md §3)."""

MESSAGES: dict[FrameType, type[Message]] = {FrameType[kind.__name__.upper()]: kind for kind in FIELDS}
TYPES: dict[type[Message], FrameType] = {kind: number for number, kind in MESSAGES.items()}
_PAYLOAD_BYTES: dict[FrameType, tuple[str, int]] = {
    **{number: ("control_bytes", CONTROL_BYTES) for number in FrameType},
    FrameType.REQUEST: ("request_bytes", REQUEST_BYTES),
    FrameType.REPLY: ("request_bytes", REQUEST_BYTES),
    FrameType.DATA: ("data_bytes", DATA_BYTES),
}


# Who may say what when


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


def negotiate(hello: Hello) -> int:
    """The version to speak with who says that hello. Raises UnknownFormat with a sentence for both sides."""
    return _common(hello.versions, hello.program, None)


def _common(versions: tuple[int, ...], program: str, offset: int | None) -> int:
    if VERSION in versions:
        return VERSION
    spoken = ", ".join(map(str, versions[:8]))
    older = "the other side" if max(versions) < VERSION else "this side"
    raise UnknownFormat(
        f"{program!r} speaks version {spoken} of the session protocol, this side {VERSION}: upgrade {older}",
        offset=offset,
        section="session.md §1.3",
        chunk="HELLO",
    )


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
        self._packers: dict[str, Any] = {}
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
            self._crc = _extend(self._crc, self._lent[:size])
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
        for size in range(1, len(PREFACE) + 1):
            yield from self._have(size)
            if not PREFACE.startswith(self._small[self._begin : self._begin + size]):
                raise UnknownFormat(
                    "the other side does not speak the session protocol of remus-ckpt: is it the right address, and "
                    "is TLS used on both sides or on none?",
                    offset=size - 1,
                    section="session.md §1.1",
                )
        self._begin += len(PREFACE)

    def _frame(self) -> Parser:
        """§2"""
        yield from self._have(HEADER_BYTES)
        offset = self.received_bytes
        number, flags, length, crc = self._header(offset)
        self._begin += HEADER_BYTES
        if number is FrameType.DATA:
            self._move(self.peer, number, None, offset)
            if flags == FLAGS["none"]:
                yield from self._plain_data(length, crc, offset)
            else:
                yield from self._packed_data(flags, length, crc, offset)
            return None
        payload = yield from self._payload(length)
        if _extend(0, payload) != crc:
            _refuse("the payload's checksum is wrong", offset, "§2.1", number)
        message = _unpack(number, payload, offset + HEADER_BYTES)
        self._move(self.peer, number, message, offset)
        yield message
        return None

    def _header(self, offset: int) -> tuple[FrameType, int, int, int]:
        """§2.1"""
        head = bytes(self._small[self._begin : self._begin + HEADER_BYTES])
        if _CRC.unpack_from(head, _HEADER.size)[0] != google_crc32c.value(head[: _HEADER.size]):
            _refuse("the header's checksum is wrong", offset, "§2.1")
        kind, flags, reserved, length, crc = _HEADER.unpack_from(head)
        if self.last_received is not None:
            _refuse("a frame behind the end of the session", offset, "§4")
        try:
            number = FrameType(kind)
        except ValueError:
            _refuse(f"there is no frame of type {kind}", offset, "§2.1")
        if reserved:
            _refuse("the reserved bytes are not zero", offset, "§2.1", number)
        if (self.state, self.peer, number) not in TRANSITIONS:
            _refuse(f"the {self.peer} may not say it in the state {self.state.name}", offset, "§4", number)
        if flags and (number is not FrameType.DATA or flags not in FLAGS.values()):
            _refuse(f"unknown flags {flags:#x}", offset, "§2.1", number)
        limit, most = _PAYLOAD_BYTES[number]
        if length > most:
            raise LimitExceeded(
                f"a payload of {length} bytes exceeds the limit {limit} of {most}",
                limit=limit,
                offset=offset,
                section="session.md §2.4",
                chunk=number.name,
            )
        if not length:
            _refuse("an empty payload", offset, "§2.1", number)
        return number, flags, length, crc

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
                self._crc = _extend(self._crc, part)
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
                    _refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
                yield DataReceived(take)

    def _packed_data(self, flags: int, length: int, crc: int, offset: int) -> Parser:
        """§2.3"""
        name = next(name for name, value in FLAGS.items() if value == flags)
        if self.welcome is None or name not in self.welcome.compressions:
            _refuse(f"{name} has not been agreed on", offset, "§2.3", FrameType.DATA)
        payload = yield from self._payload(length)
        if _extend(0, payload) != crc:
            _refuse("the payload's checksum is wrong", offset, "§2.1", FrameType.DATA)
        # From here on the bytes are as the peer made them. The length counts before anything is taken for it.
        if length <= _RAW.size:
            _refuse(f"a payload of {length} bytes holds nothing compressed", offset, "§2.3", FrameType.DATA)
        (raw_bytes,) = _RAW.unpack_from(payload)
        if raw_bytes > DATA_BYTES:
            raise LimitExceeded(
                f"compressed data of {raw_bytes} bytes exceed the limit data_bytes of {DATA_BYTES}",
                limit="data_bytes",
                offset=offset + HEADER_BYTES,
                section="session.md §2.4",
                chunk="DATA",
            )
        if length >= raw_bytes:
            _refuse(f"{raw_bytes} bytes are compressed to {length}", offset, "§2.3", FrameType.DATA)
        try:
            raw = self._packer(name).unpack(payload[_RAW.size :], raw_bytes)
        except _PACKER_ERRORS as error:
            _refuse(f"the {name} data cannot be unpacked ({error})", offset, "§2.3", FrameType.DATA)
        if len(raw) != raw_bytes:
            _refuse(f"{len(raw)} bytes of {name} in place of {raw_bytes}", offset, "§2.3", FrameType.DATA)
        assert self.sink is not None, "DATA, and no sink has been set"
        self.sink.feed(raw)
        self._stream_bytes += raw_bytes
        yield DataReceived(raw_bytes)

    # The rules, for both directions

    def _move(self, side: Side, number: FrameType, message: Message | None, offset: int | None) -> None:
        """Go on by one frame. offset: where it was received; None: it is to be sent, and what is wrong a ValueError."""
        here = self.state
        following = TRANSITIONS.get((here, side, number))
        if following is None:
            _refuse(f"the {side} may not say it in the state {here.name}", offset, "§4", number)
        match message:
            case Hello():
                self.hello = message
                if message.role == "control":
                    following = State.CONTROL_HELLO
            case Welcome():
                assert self.hello is not None
                if message.version not in self.hello.versions:
                    _refuse(f"version {message.version} was not in the hello", offset, "§3.2", number)
                strange = set(message.compressions) - set(self.hello.compressions)
                if strange:
                    _refuse(f"compressions {sorted(strange)} were not in the hello", offset, "§3.2", number)
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
                    _refuse(f"{message.position} is no position of this session", offset, "§3.6", number)
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
            _refuse(f"term {begin.term} in a session of term {self.welcome.term}", offset, "§6", FrameType.BEGIN)
        if begin.mode == "continue" and (self.welcome.stream is None or begin.position != self.welcome.position):
            _refuse(f"it cannot be continued at {begin.position}", offset, "§5", FrameType.BEGIN)

    def _check_commit(self, commit: Commit, offset: int | None) -> None:
        """§3.5"""
        if commit.stream_bytes != self._stream_bytes:
            text = f"{commit.stream_bytes} bytes are committed of {self._stream_bytes}"
            _refuse(text, offset, "§3.5", FrameType.COMMIT)
        # A full copy need not say in its Begin what it follows.
        if self._position is not None and commit.before != self._position:
            text = f"it follows {commit.before}, the one before made {self._position}"
            _refuse(text, offset, "§5", FrameType.COMMIT)

    # Bytes out

    def send(self, message: Message) -> list[Buffer]:
        """The bytes that say it, the preface before the first.

        Raises ValueError where the message may not stand, and when this side has ended the session, or the other has
        by an Error. Error may be sent in every state, and after `next_event` has raised.
        """
        self._may_send()
        number = TYPES[type(message)]
        try:
            payload: bytes = msgpack.packb(
                {key: getattr(message, key) for key in FIELDS[type(message)]}, default=_plain, use_bin_type=True
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{number.name}: {error}") from error
        limit, most = _PAYLOAD_BYTES[number]
        if len(payload) > most:
            raise ValueError(f"{number.name}: {len(payload)} bytes exceed the limit {limit} of {most}")
        self._move(self.side, number, message, None)
        return self._out([_head(number, 0, len(payload), _extend(0, payload)) + payload])

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        """DATA frames of the stream's next bytes; uncompressed, the buffers themselves stand between the headers.

        buffers: as the sender of the stream yields them; they must not change before they are sent
        compression: a frame that it would not make shorter goes as it is
        """
        self._may_send()
        if compression != "none" and (self.welcome is None or compression not in self.welcome.compressions):
            raise ValueError(f"{compression} has not been agreed on")
        out: list[Buffer] = []
        for parts in _portions(buffers):
            self._move(self.side, FrameType.DATA, None, None)
            size = sum(len(part) for part in parts)
            self._stream_bytes += size
            packed = None if compression == "none" else self._pack(compression, parts, size)
            if packed is not None:
                out += [_head(FrameType.DATA, FLAGS[compression], len(packed), _extend(0, packed)), packed]
                continue
            crc = 0
            for part in parts:
                crc = _extend(crc, part)
            out.append(_head(FrameType.DATA, 0, size, crc))
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
            buffers.insert(0, PREFACE)
        self.sent_bytes += sum(len(buffer) for buffer in buffers)
        return buffers

    def _pack(self, compression: str, parts: list[memoryview], size: int) -> bytes | None:
        """§2.3"""
        packed = self._packer(compression).pack(parts[0] if len(parts) == 1 else b"".join(parts))
        if _RAW.size + len(packed) >= size:
            return None
        return _RAW.pack(size) + packed

    def _packer(self, name: str) -> _Lz4 | _Zstd:
        if name not in self._packers:
            self._packers[name] = _Lz4() if name == "lz4" else _Zstd()
        return cast("_Lz4 | _Zstd", self._packers[name])


def compress(data: memoryview, compression: Compression) -> bytes:
    """What a DATA frame of these bytes would hold, for who wants to know whether it is worth it."""
    return _Lz4().pack(data) if compression == "lz4" else _Zstd().pack(data)


def _refuse(text: str, offset: int | None, section: str, number: FrameType | None = None) -> NoReturn:
    name = number.name if number is not None else None
    if offset is None:
        raise ValueError(f"{name}: {text} (session.md {section})")
    raise Malformed(text, offset=offset, section=f"session.md {section}", chunk=name)


def _extend(crc: int, data: Buffer) -> int:
    # The library takes arrays without a copy, and refuses any other buffer that could be written to.
    return int(google_crc32c.extend(crc, np.frombuffer(data, dtype=np.uint8))) if len(data) else crc


def _head(number: FrameType, flags: int, length: int, crc: int) -> bytes:
    head = _HEADER.pack(number, flags, 0, length, crc)
    return head + _CRC.pack(google_crc32c.value(head))


def _plain(value: Any) -> Any:
    """What of ours has a form on the wire."""
    if isinstance(value, Position):
        return [value.epoch, value.digest]
    if isinstance(value, StreamShape):
        return {"codec": value.codec, "word": value.word, "p2m_size": value.p2m_size}
    raise TypeError(f"{value!r:.40} has no form on the wire")


def _portions(buffers: Iterable[Buffer]) -> Generator[list[memoryview], None, None]:
    """The buffers in lists of at most DATA_BYTES, cut where they must be."""
    parts: list[memoryview] = []
    room = DATA_BYTES
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.nbytes:
            continue
        view = view.cast("B")
        while len(view):
            parts.append(view[:room])
            room -= len(parts[-1])
            view = view[len(parts[-1]) :]
            if not room:
                yield parts
                parts, room = [], DATA_BYTES
    if parts:
        yield parts


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice in one map")
    return made


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"the extension type {code}")


def _unpack(number: FrameType, payload: memoryview, offset: int) -> Message:
    """The message of a control frame (§2.2, §3)."""
    section = f"§3.{int(number)}"
    kind = MESSAGES[number]
    try:
        # The library takes memory for an array when it reads its length, at every level of a nest.
        most = TREE_ENTRIES if kind in (Request, Reply) else ENTRIES
        fields = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_pairs,
            max_array_len=most,
            max_map_len=most,
            max_ext_len=0,
            ext_hook=_no_extension,
        )
        if type(fields) is not dict:
            raise ValueError("the payload is no map")
        if kind is Hello:
            # The rest may look otherwise in another version: these two never do.
            _common(_VERSIONS(fields.get("versions")), _PROGRAM(fields.get("program")), offset)
        given = {key: fields[key] for key in FIELDS[kind] if key in fields}
        missing = {key: None for key in FIELDS[kind] if key not in fields}
        return kind(**given, **missing)
    except RemusError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        _refuse(f"it cannot be read ({type(error).__name__}: {error})", offset, section, number)


class _Lz4:
    """LZ4 blocks without a size of their own."""

    @staticmethod
    def pack(data: bytes | memoryview) -> bytes:
        return cast(bytes, lz4.block.compress(data, store_size=False))

    @staticmethod
    def unpack(data: memoryview, size: int) -> bytes:
        return cast(bytes, lz4.block.decompress(data, uncompressed_size=size))


class _Zstd:
    """One zstd frame that says its content's size."""

    def __init__(self) -> None:
        if zstandard is None:
            raise ValueError("zstd is not installed here: pip install 'remus_ckpt[zstd]'")
        self._out = zstandard.ZstdCompressor(level=1)
        self._in = zstandard.ZstdDecompressor(max_window_size=2 * DATA_BYTES)

    def pack(self, data: bytes | memoryview) -> bytes:
        return self._out.compress(data)

    def unpack(self, data: memoryview, size: int) -> bytes:
        # What the frame says of itself is what would be allocated.
        if zstandard.frame_content_size(data) != size:
            raise ValueError("its header says another size")
        return self._in.decompress(data, max_output_size=size, allow_extra_data=False)


_PACKER_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    lz4.block.LZ4BlockError,
    *((zstandard.ZstdError,) if zstandard else ()),
)
