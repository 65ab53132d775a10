"""Messages and stream bytes as frames, and back: headers, checksums, compression, limits (specs/session.md §2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, cast

import google_crc32c
import lz4.block
import msgpack
import numpy as np

from remus_ckpt.errors import LimitExceeded, Malformed, RemusError, UnknownFormat
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.pages import Buffer
from remus_ckpt.session.messages import (
    ENTRIES,
    FIELDS,
    TREE_ENTRIES,
    VERSION,
    Compression,
    Hello,
    Message,
    Reply,
    Request,
    StreamShape,
)
from remus_ckpt.wire.digest import DIGESTS, DigestName
from remus_ckpt.wire.record import Position

try:
    import zstandard
except ImportError:  # an extra: without it zstd is not offered, and refused when it comes
    zstandard = None  # type: ignore[assignment, unused-ignore]

PREFACE = b"\x89REMUSs\n"
DATA_BYTES = 4 * MIB
"""The payload of a DATA frame, and what a compressed one may hold."""
CONTROL_BYTES = 64 * KIB
"""The payload of any other frame …"""
REQUEST_BYTES = 1 * MIB
"""… but of REQUEST and REPLY."""
_HEADER = struct.Struct("<BBHII")
_CRC = struct.Struct("<I")
_RAW = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size

FLAGS: dict[str, int] = {"none": 0, "lz4": 1, "zstd": 2}
"""How the payload of a DATA frame is packed (specs/session.md §2.3)."""

COMPRESSIONS: tuple[str, ...] = ("lz4", "zstd") if zstandard else ("lz4",)
"""What can be unpacked here: a hello offers these, and a welcome chooses from them."""


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


MESSAGES: dict[FrameType, type[Message]] = {FrameType[kind.__name__.upper()]: kind for kind in FIELDS}
TYPES: dict[type[Message], FrameType] = {kind: number for number, kind in MESSAGES.items()}
_PAYLOAD_BYTES: dict[FrameType, tuple[str, int]] = {
    **{number: ("control_bytes", CONTROL_BYTES) for number in FrameType},
    FrameType.REQUEST: ("request_bytes", REQUEST_BYTES),
    FrameType.REPLY: ("request_bytes", REQUEST_BYTES),
    FrameType.DATA: ("data_bytes", DATA_BYTES),
}


def negotiate(hello: Hello) -> int:
    """The protocol version to use after this hello. Raises UnknownFormat with a message for both sides."""
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


def choose_digest(hello: Hello) -> DigestName | None:
    """The digest of the stream that a client would begin: the first of its hello that is known here; None without."""
    known: tuple[DigestName, ...] = DIGESTS
    return next((name for offered in hello.digests for name in known if name == offered), None)


def refuse(text: str, offset: int | None, section: str, number: FrameType | None = None) -> NoReturn:
    """Raise Malformed for what was received at `offset`, ValueError (offset None) for what was to be sent."""
    name = number.name if number is not None else None
    if offset is None:
        raise ValueError(f"{name}: {text} (session.md {section})")
    raise Malformed(text, offset=offset, section=f"session.md {section}", chunk=name)


# Headers and checksums


class Header(NamedTuple):
    """A frame's header (§2.1). length, crc: of its payload."""

    number: FrameType
    flags: int
    length: int
    crc: int


def extend(crc: int, data: Buffer) -> int:
    """Extend the CRC-32C `crc` by more bytes."""
    # The library takes arrays without a copy, and refuses any other buffer that could be written to.
    return int(google_crc32c.extend(crc, np.frombuffer(data, dtype=np.uint8))) if len(data) else crc


def head(number: FrameType, flags: int, length: int, crc: int) -> bytes:
    """The bytes of a header."""
    fields = _HEADER.pack(number, flags, 0, length, crc)
    return fields + _CRC.pack(google_crc32c.value(fields))


def parse_head(data: bytes, offset: int) -> Header:
    """The header in `HEADER_BYTES` bytes, its length within the limit for its type. Raises Malformed, LimitExceeded."""
    if _CRC.unpack_from(data, _HEADER.size)[0] != google_crc32c.value(data[: _HEADER.size]):
        refuse("the header's checksum is wrong", offset, "§2.1")
    kind, flags, reserved, length, crc = _HEADER.unpack_from(data)
    try:
        number = FrameType(kind)
    except ValueError:
        refuse(f"there is no frame of type {kind}", offset, "§2.1")
    if reserved:
        refuse("the reserved bytes are not zero", offset, "§2.1", number)
    if flags and (number is not FrameType.DATA or flags not in FLAGS.values()):
        refuse(f"unknown flags {flags:#x}", offset, "§2.1", number)
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
        refuse("an empty payload", offset, "§2.1", number)
    return Header(number, flags, length, crc)


# Control frames


def pack(message: Message) -> bytes:
    """The payload of a message. Raises ValueError if it is too long, or holds a value that has no form on the wire."""
    number = TYPES[type(message)]
    fields = {key: getattr(message, key) for key in FIELDS[type(message)]}
    try:
        payload: bytes = msgpack.packb(fields, default=_plain, use_bin_type=True)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{number.name}: {error}") from error
    limit, most = _PAYLOAD_BYTES[number]
    if len(payload) > most:
        raise ValueError(f"{number.name}: {len(payload)} bytes exceed the limit {limit} of {most}")
    return payload


def _plain(value: Any) -> Any:
    """Convert one of our values to its form on the wire."""
    if isinstance(value, Position):
        return [value.epoch, value.digest]
    if isinstance(value, StreamShape):
        return {"codec": value.codec, "word": value.word, "p2m_size": value.p2m_size}
    raise TypeError(f"{value!r:.40} has no form on the wire")


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice in one map")
    return made


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"the extension type {code}")


def unpack(number: FrameType, payload: memoryview, offset: int) -> Message:
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
            versions, program = (FIELDS[Hello][key](fields.get(key)) for key in ("versions", "program"))
            _common(versions, program, offset)
        given = {key: fields[key] for key in FIELDS[kind] if key in fields}
        missing = {key: None for key in FIELDS[kind] if key not in fields}
        return kind(**given, **missing)
    except RemusError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        refuse(f"it cannot be read ({type(error).__name__}: {error})", offset, section, number)


# The stream's bytes


def portions(buffers: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """The buffers in lists of at most DATA_BYTES, split where necessary."""
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


class Packing:
    """Compresses the payloads of DATA frames, and the other way; one thread may do either (§2.3)."""

    def __init__(self) -> None:
        self._zstd_out: Any = None
        self._zstd_in: Any = None

    def pack(self, compression: Compression, parts: list[memoryview], size: int) -> bytes | None:
        """The payload for parts of `size` bytes in all; None where it would be no shorter than they are."""
        packed = self.compress(parts[0] if len(parts) == 1 else b"".join(parts), compression)
        return _RAW.pack(size) + packed if _RAW.size + len(packed) < size else None

    def compress(self, data: Buffer, compression: Compression) -> bytes:
        """The bytes as a payload would hold them."""
        if compression == "lz4":
            return cast(bytes, lz4.block.compress(data, store_size=False))
        if self._zstd_out is None:
            if zstandard is None:
                raise ValueError("zstd is not installed here: pip install 'remus_ckpt[zstd]'")
            self._zstd_out = zstandard.ZstdCompressor(level=1)
        return cast(bytes, self._zstd_out.compress(data))

    def unpack(self, compression: str, payload: memoryview, offset: int) -> bytes:
        """The stream's bytes in the payload of a frame that stands at `offset`. Raises Malformed, LimitExceeded."""
        if len(payload) <= _RAW.size:
            refuse(f"a payload of {len(payload)} bytes holds nothing compressed", offset, "§2.3", FrameType.DATA)
        (size,) = _RAW.unpack_from(payload)
        # Check the length before anything is allocated for it.
        if size > DATA_BYTES:
            raise LimitExceeded(
                f"compressed data of {size} bytes exceed the limit data_bytes of {DATA_BYTES}",
                limit="data_bytes",
                offset=offset + HEADER_BYTES,
                section="session.md §2.4",
                chunk="DATA",
            )
        if len(payload) >= size:
            refuse(f"{size} bytes are compressed to {len(payload)}", offset, "§2.3", FrameType.DATA)
        try:
            data = self._decompress(compression, payload[_RAW.size :], size)
        except _UNPACK_ERRORS as error:
            refuse(f"the {compression} data cannot be unpacked ({error})", offset, "§2.3", FrameType.DATA)
        if len(data) != size:
            refuse(f"{len(data)} bytes of {compression} in place of {size}", offset, "§2.3", FrameType.DATA)
        return data

    def _decompress(self, compression: str, data: memoryview, size: int) -> bytes:
        if compression == "lz4":
            return cast(bytes, lz4.block.decompress(data, uncompressed_size=size))
        # The size in the frame's own header is what would be allocated.
        if zstandard.frame_content_size(data) != size:
            raise ValueError("its header says another size")
        if self._zstd_in is None:
            self._zstd_in = zstandard.ZstdDecompressor(max_window_size=2 * DATA_BYTES)
        return cast(bytes, self._zstd_in.decompress(data, max_output_size=size, allow_extra_data=False))


_UNPACK_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    lz4.block.LZ4BlockError,
    *((zstandard.ZstdError,) if zstandard else ()),
)
