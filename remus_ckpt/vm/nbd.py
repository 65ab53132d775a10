"""The server's side of the NBD protocol, bytes to requests (specs/disk.md §2). No I/O, no clock.

It offers one export, with the fixed newstyle handshake and simple replies. Everything that a client may ask for beyond
that (TLS, structured replies, contexts) it declines by name, as the protocol provides. A client that breaks a rule, or
claims more than a limit allows, gets Malformed, and its connection must end.
Source: the protocol description of the Network Block Device project, doc/proto.md.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import LimitExceeded, Malformed
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.wire.inbox import End, Inbox

MAX_OPTION_BYTES = 8 * KIB
"""An export's name has at most 4,096 bytes."""
MAX_OPTIONS = 64
"""Of one handshake."""
MAX_REQUEST_BYTES = 32 * MIB
"""Data of one read or write: what clients may rely on."""
BLOCK_BYTES = 512
"""Requests begin and end at multiples of that."""

_FIRST_BYTES = 1 * MIB
_GREETING = struct.Struct(">8s8sH")
_U32 = struct.Struct(">I")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHH8sQI")
_REPLY = struct.Struct(">II8s")
_IHAVEOPT = b"IHAVEOPT"
_OPTION_REPLY_MAGIC, _REQUEST_MAGIC, _REPLY_MAGIC = 0x3E889045565A9, 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA, _SEND_TRIM, _SEND_WRITE_ZEROES = 1, 4, 8, 32, 64
_FLAGS = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA | _SEND_TRIM | _SEND_WRITE_ZEROES
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3


class Option(IntEnum):
    """What a handshake consists of."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class Answer(IntEnum):
    """To an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    UNSUPPORTED = (1 << 31) | 1
    INVALID = (1 << 31) | 3
    UNKNOWN = (1 << 31) | 6


class Command(IntEnum):
    """What a client asks for once an export is chosen."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is well formed and inside the disk.

    handle: 8 bytes of the client's, for the reply
    data: of a write
    """

    command: Command
    handle: bytes
    offset: int
    length: int
    data: NDArray[np.uint8] | None = None


class Server:
    """One client's connection, from the greeting to its end.

    Send what `to_send` returns after each call of `next_event`; receive into `get_buffer` where that returns None.

    size: of the disk, in bytes
    name: of the export; an empty name means it too
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name.encode()
        self._out: list[bytes] = []
        self._inbox = Inbox(64 * KIB, first_bytes=_FIRST_BYTES)
        self._steps = self._run()
        self.is_over = False
        """Whether the client is gone. What it was in the middle of does not count."""

    def get_buffer(self) -> memoryview:
        """Room to receive into."""
        return self._inbox.get_buffer()

    def buffer_updated(self, size: int) -> None:
        """So many bytes were received into that room; 0 if no more will come."""
        if size:
            self._inbox.buffer_updated(size)
        else:
            self._inbox.feed_eof()

    def next_event(self) -> Request | None:
        """The next request, None if more bytes are needed or the client is gone. Raises Malformed."""
        if self.is_over:
            return None
        try:
            return next(self._steps)
        except (StopIteration, End):
            self.is_over = True
            return None

    def to_send(self) -> bytes:
        """The bytes for the client since the last call."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def reply(self, request: Request, error: int = 0) -> bytes:
        """The head of the reply to a request; the data of a read follow if there is no error.

        error: an errno; NBD has numbers for a few, all others become EIO
        """
        known = {0, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW}
        return _REPLY.pack(_REPLY_MAGIC, error if error in known else errno.EIO, request.handle)

    def _run(self) -> Generator[Request | None, None, None]:
        if (yield from self._handshake()):
            while True:
                offset = self._inbox.offset
                magic, _, command, handle, start, length = yield from self._inbox.unpack(_REQUEST)
                if magic != _REQUEST_MAGIC:
                    raise _malformed(f"a request begins with {magic:#x}", offset, "2.2")
                if command == Command.DISCONNECT:
                    return
                data = None
                if command == Command.WRITE:
                    if length > MAX_REQUEST_BYTES:
                        raise _too_long("a write", length, MAX_REQUEST_BYTES, offset, "2.2")
                    data = yield from self._inbox.array(length)
                if (error := self._refusal(command, start, length)) is not None:
                    self._out.append(_REPLY.pack(_REPLY_MAGIC, error, handle))
                    continue
                yield Request(Command(command), handle, start, length, data)

    def _refusal(self, command: int, start: int, length: int) -> int | None:
        """The error number of a request that cannot be fulfilled, None if it can."""
        if command not in Command.__members__.values():
            return errno.EINVAL
        if command == Command.FLUSH:
            return None
        if start + length > self._size:
            return errno.ENOSPC if command in {Command.WRITE, Command.WRITE_ZEROES} else errno.EINVAL
        if start % BLOCK_BYTES or length % BLOCK_BYTES or not length:
            return errno.EINVAL
        if command == Command.READ and length > MAX_REQUEST_BYTES:
            return errno.EOVERFLOW
        return None

    def _handshake(self) -> Generator[None, None, bool]:
        """Returns whether an export is chosen."""
        inbox = self._inbox
        self._out.append(_GREETING.pack(b"NBDMAGIC", _IHAVEOPT, _FIXED_NEWSTYLE | _NO_ZEROES))
        (flags,) = yield from inbox.unpack(_U32)
        if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES) or not flags & _FIXED_NEWSTYLE:
            raise _malformed(f"client flags {flags:#x}", 0, "2.1")
        for _ in range(MAX_OPTIONS):
            offset = inbox.offset
            magic, option, length = yield from inbox.unpack(_OPTION)
            if magic != _IHAVEOPT:
                raise _malformed(f"an option begins with {magic!r}", offset, "2.1")
            if length > MAX_OPTION_BYTES:
                raise _too_long("an option", length, MAX_OPTION_BYTES, offset, "2.1")
            data = bytes((yield from inbox.array(length)))
            if option == Option.EXPORT_NAME:
                if data not in {b"", self._name}:
                    raise _malformed(f"there is no export {data!r:.100}", offset, "2.1")
                self._out.append(struct.pack(">QH", self._size, _FLAGS) + (b"" if flags & _NO_ZEROES else bytes(124)))
                return True
            if option == Option.ABORT:
                self._answer(option, Answer.ACK)
                return False
            if self._negotiate(option, data):
                return True
        raise _malformed(f"more than {MAX_OPTIONS} options", inbox.offset, "2.1")

    def _negotiate(self, option: int, data: bytes) -> bool:
        """Answer an option. Returns whether the handshake is over with it."""
        if option == Option.LIST:
            if data:
                self._answer(option, Answer.INVALID)
                return False
            self._answer(option, Answer.SERVER, _U32.pack(len(self._name)) + self._name)
            self._answer(option, Answer.ACK)
            return False
        if option not in {Option.INFO, Option.GO}:
            self._answer(option, Answer.UNSUPPORTED)
            return False
        name = _name_of(data)
        if name is None:
            self._answer(option, Answer.INVALID)
            return False
        if name not in {b"", self._name}:
            self._answer(option, Answer.UNKNOWN)
            return False
        self._answer(option, Answer.INFO, struct.pack(">HQH", _INFO_EXPORT, self._size, _FLAGS))
        sizes = struct.pack(">HIII", _INFO_BLOCK_SIZE, BLOCK_BYTES, 4096, MAX_REQUEST_BYTES)
        self._answer(option, Answer.INFO, sizes)
        self._answer(option, Answer.ACK)
        return option == Option.GO

    def _answer(self, option: int, answer: Answer, data: bytes = b"") -> None:
        self._out.append(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, answer, len(data)) + data)


def _name_of(data: bytes) -> bytes | None:
    """The name in an INFO or GO: u32 length, name, u16 count, u16 each. None if it is something else."""
    if len(data) < 6:
        return None
    (length,) = _U32.unpack_from(data)
    end = 4 + length
    if end + 2 > len(data):
        return None
    (count,) = struct.unpack_from(">H", data, end)
    return data[4:end] if len(data) == end + 2 + 2 * count else None


def _malformed(message: str, offset: int, rule: str) -> Malformed:
    return Malformed(message, offset=offset, section=f"disk.md §{rule}", chunk="NBD")


def _too_long(what: str, length: int, most: int, offset: int, rule: str) -> LimitExceeded:
    return LimitExceeded(
        f"{what} of {length:,} bytes; at most {most:,} are read",
        limit="request_bytes" if most == MAX_REQUEST_BYTES else "option_bytes",
        offset=offset,
        section=f"disk.md §{rule}",
        chunk="NBD",
    )
