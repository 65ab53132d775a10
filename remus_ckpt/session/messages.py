"""The messages between primary and backup, and what each of their fields may hold (specs/session.md §3).

A message checks its fields when it is created: received messages and those to be sent obey one table, `FIELDS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import Position

VERSION = 1
"""Of the protocol."""

RUN_BYTES = 16
NAME_CHARS = 64
TEXT_CHARS = 4096
"""An error's message, a goodbye's reason, a text in a status."""
ENTRIES = 256
"""Of a status, of limits, of a list of versions or compressions."""
TREE_ENTRIES = 4096
"""Of each list and map in a request or a reply."""
DEPTH = 16
"""How deep the arguments of a request and the result of a reply may nest."""

READ_BYTES = 256 << 10
"""Of a segment, in one reply to a reader."""

MIN_LEASE_S, MAX_LEASE_S = 0.05, 3600.0
"""A shorter lease ends before anything can be sent; with a longer one, a silent death would go unnoticed."""
MAX_EPOCH = 1 << 62
"""So that there is always a next one."""
_MOST = (1 << 63) - 1

Compression = Literal["none", "lz4", "zstd"]
"""How the payload of a DATA frame may be packed (specs/session.md §2.3)."""
Role = Literal["primary", "control", "reader"]
ROLES: tuple[Role, ...] = ("primary", "control", "reader")
"""What a client may be (specs/session.md §3.1)."""
Level = Literal["received", "durable", "applied"]
LEVELS: tuple[Level, ...] = ("received", "durable", "applied")
"""How far a checkpoint has come on the backup, in that order (specs/session.md §3.6)."""


class ErrorCode(StrEnum):
    """Why a session is refused or ended (specs/session.md §7). A peer may say others."""

    VERSION = "version"
    NAME = "name"
    FORBIDDEN = "forbidden"
    REVOKED = "revoked"
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
    LOG = "log"


def check_name(name: str) -> str:
    """The name of something protected, as it may stand in a hello and as a directory's name. Raises ValueError."""
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)):
        raise ValueError(
            f"{name!r:.80} is no name: it has 1…{NAME_CHARS} letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit"
        )
    return name


# What a field may hold. Each function takes a value from the wire, or the object it stands for; returns the object.

Check = Callable[[Any], Any]


def _whole(low: int = 0, high: int = _MOST) -> Check:
    def kind(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{value!r:.40} in place of a whole number in {low}…{high}")
        return value

    return kind


def _text(most: int, least: int = 0) -> Check:
    def kind(value: Any) -> str:
        if type(value) is not str or not least <= len(value) <= most:
            raise ValueError(f"{value!r:.40} in place of a text of {least}…{most} characters")
        return value

    return kind


def _clipped(value: Any) -> str:
    """Text for a person: truncated rather than refused."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} in place of a text")
    return value[:TEXT_CHARS].encode("utf-8", "replace").decode()


def _octets(size: int) -> Check:
    def kind(value: Any) -> bytes:
        if type(value) is not bytes or len(value) != size:
            raise ValueError(f"{value!r:.40} in place of {size} bytes")
        return value

    return kind


def _one_of(*choices: Any) -> Check:
    def kind(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{value!r:.40} in place of one of {choices}")
        return value

    return kind


def _optional(inner: Check) -> Check:
    return lambda value: None if value is None else inner(value)


def _or_none(several: Check) -> Check:
    """A list that an older peer leaves out: it is empty then."""
    return lambda value: several(() if value is None else value)


def _several(inner: Check, least: int = 0) -> Check:
    def kind(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= ENTRIES:
            raise ValueError(f"{value!r:.40} in place of a list of {least}…{ENTRIES}")
        return tuple(inner(item) for item in value)

    return kind


def _map(inner: Check) -> Check:
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


def _checked(message: Any, kinds: dict[str, Check]) -> None:
    for key, kind in kinds.items():
        try:
            object.__setattr__(message, key, kind(getattr(message, key)))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What a stream must match to continue where another stopped. p2m_size: pages of memory."""

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
    """The client's first message (specs/session.md §3.1). If it is no primary, all fields after `role` may be empty or
    zero.

    versions: of this protocol that the client can speak
    program: name and version, for people
    run: 16 bytes, random for each run of a primary
    term: None if the primary has never been told one
    memory_pages, page_size: of the protected memory; codec, word: of the stream that would follow
    compressions: of DATA frames that the client can make
    digests: of the streams that the client can make, the one it would rather have first. A client that names none
        makes streams with SHA-256, and expects checksums of all frames
    log: the commit log that its commits go to, None without one
    """

    versions: tuple[int, ...] = (VERSION,)
    program: str
    role: Role
    name: str = ""
    run: bytes = bytes(RUN_BYTES)
    term: int | None = None
    memory_pages: int = 0
    page_size: int = 0
    codec: str = ""
    word: int = 0
    compressions: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    log: str | None = None

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Hello])
        if self.role == "primary" or self.name:
            check_name(self.name)
        if self.role == "primary":
            _checked(self, {"memory_pages": _whole(1), "page_size": _whole(1), "codec": _NAME, "word": _WORD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """The server's answer (specs/session.md §3.2).

    version: the one of the hello's versions that is used from here on
    term: of this session
    position: of the newest checkpoint that the backup holds durably, None: nothing
    highest_epoch: the highest it has ever seen, even in checkpoints since lost: a full copy must have a higher one
    stream: what a stream that continues there must match; None: only a full copy can follow
    compressions: those of the hello's that DATA frames may use
    limits: by name, the limits of what the backup accepts
    lease_s: after this many seconds without a frame, the other side counts as lost
    digest: one of the hello's: of the stream that a full copy begins. It covers what uncompressed DATA frames carry, so
        that these have no checksum. None: the digest is SHA-256, and all frames have checksums
    log: the commit log that its takeovers go to, None without one
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
    digest: str | None = None
    log: str | None = None

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Welcome])
        if self.stream is not None and self.position is None:
            raise ValueError("a stream to continue, and no position in it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin(Message):
    """The primary's choice (specs/session.md §3.3).

    position: what the first checkpoint follows, None: nothing
    data_pages: about how many pages a full copy will hold, None: unknown
    """

    mode: Literal["full", "continue"]
    term: int
    position: Position | None = None
    wait: Level = "durable"
    data_pages: int | None = None

    def __post_init__(self) -> None:
        _checked(self, FIELDS[Begin])
        if self.mode == "continue" and self.position is None:
            raise ValueError("continues no position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Message):
    """The end of a checkpoint (specs/session.md §3.5).

    position, before: the positions that it makes and follows
    stream_bytes: bytes in DATA frames since the last commit, unpacked
    pages: how many it carries
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
    """How far a checkpoint, and all before it, have come on the backup (specs/session.md §3.6)."""

    level: Level
    position: Position

    def __post_init__(self) -> None:
        # The usual one is looked at in one step: a commit waits for it.
        if self.level != "durable" or type(self.position) is not Position:
            _checked(self, FIELDS[Ack])


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
    """A request in a session of a control client or a reader (specs/session.md §3.10)."""

    number: int
    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Message):
    """The result of the request with that number (specs/session.md §3.11)."""

    number: int
    result: dict[str, Any]


FIELDS: dict[type[Message], dict[str, Check]] = {
    Hello: {
        "versions": _VERSIONS,
        "program": _PROGRAM,
        "role": _one_of(*ROLES),
        "name": _text(NAME_CHARS),
        "run": _octets(RUN_BYTES),
        "term": _optional(_whole()),
        "memory_pages": _whole(),
        "page_size": _whole(),
        "codec": _text(NAME_CHARS),
        "word": _one_of(0, 4, 8),
        "compressions": _several(_NAME),
        "digests": _or_none(_several(_NAME)),
        "log": _optional(_text(NAME_CHARS, 1)),
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
        "digest": _optional(_NAME),
        "log": _optional(_text(NAME_CHARS, 1)),
    },
    Begin: {
        "mode": _one_of("full", "continue"),
        "term": _whole(),
        "position": _optional(_position),
        "wait": _one_of(*LEVELS),
        "data_pages": _optional(_whole()),
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
