"""Streams in files: opened, compressed or not, read into a restorer, and written."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from remus_ckpt.compressed import Inflater, compressions
from remus_ckpt.disk import write_all
from remus_ckpt.errors import Malformed, RemusError, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Buffer
from remus_ckpt.record_restorer import V2Restorer
from remus_ckpt.restorer import Checkpoint, Home, Restorer
from remus_ckpt.sender import Sent
from remus_ckpt.wire import formats
from remus_ckpt.wire.digest import NewDigest, new_digest
from remus_ckpt.wire.formats import FRONT_BYTES, Format
from remus_ckpt.wire.stream_reader import NEED_DATA
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import DETECT_BYTES, Dialect, detect_header
from remus_ckpt.wire.xen.v2 import LOOK_BYTES, is_v2

_BUFFER_BYTES = 1 << 16


def _is_header(front: bytes) -> bool:
    """Whether a stream may begin with these bytes: gzip's magic may also be the size of a memory."""
    try:
        detect_header(Dialect(), front, 0)
    except UnknownFormat:
        return False
    return True


class _Rejoined(io.RawIOBase):
    """A pipe whose first bytes have already been read."""

    def __init__(self, front: bytes, rest: io.FileIO) -> None:
        self._front = front
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._front:
            return self._rest.readinto(buffer)
        size = min(len(buffer), len(self._front))
        buffer[:size] = self._front[:size]
        self._front = self._front[size:]
        return size


AnyRestorer = Restorer | V2Restorer
"""A restorer for a stream that Xen wrote, of either version, or for one of ours."""


class StreamFile:
    """A stream from a file or from standard input ("-"), decompressed if `compressed` knows its format.

    size: bytes of the file as stored, None if unknown
    inflater: decompresses the file; None if it is not compressed
    front: the first bytes of what is read, at most `FRONT_BYTES`
    """

    def __init__(self, path: str | Path) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        if str(path) == "-" and sys.stdin is None:
            raise RemusError("standard input is closed: name a file, or pipe a stream in")
        raw = io.FileIO(sys.stdin.fileno(), closefd=False) if str(path) == "-" else io.FileIO(str(path))
        # A read from a pipe may return less than was asked for.
        front = b""
        while len(front) < DETECT_BYTES and (more := raw.read(DETECT_BYTES - len(front))):
            front += more
        self.size = os.fstat(raw.fileno()).st_size if raw.seekable() else None
        source: io.RawIOBase = raw
        if raw.seekable():
            raw.seek(-len(front), os.SEEK_CUR)
        else:
            source = _Rejoined(front, raw)
        self._file = io.BufferedReader(source, _BUFFER_BYTES)
        kinds = compressions(front)
        self.inflater = Inflater(self._file, kinds) if kinds and not _is_header(front) else None
        self._fault: Malformed | None = None  # met while looking at the front: raised where it is read
        self._looked = b""  # bytes that `look` has read ahead
        self.front = front if self.inflater is None else self._look()
        self._ahead = b"" if self.inflater is None else self.front

    @property
    def format(self) -> Format | None:
        """The format that the front shows; None for a legacy save stream, or if unknown."""
        return None if self.inflater is None and _is_header(self.front) else formats.find(self.front)

    @property
    def holds_machine(self) -> bool:
        """Whether it is one state of a machine or a part of one."""
        return self.format is not None and self.format.word in formats.MACHINE_WORDS

    @property
    def holds_dump(self) -> bool:
        """Whether it is memory by physical address, without the rest of the machine."""
        return self.format is not None and self.format.word in formats.DUMP_WORDS

    def _look(self) -> bytes:
        assert self.inflater is not None
        front = bytearray(FRONT_BYTES)
        size = 0
        try:
            while size < FRONT_BYTES and (more := self.inflater.readinto(memoryview(front)[size:])):
                size += more
        except Malformed as error:
            self._fault = error
        return bytes(front[:size])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def position(self) -> int:
        """Bytes of the stored file that have been read; 0 if unknown."""
        if self.size is None:
            return 0
        return self._file.tell() if self.inflater is None else self.inflater.position

    def look(self, size: int) -> bytes:
        """The first bytes of the stream, decompressed; they are read again. Fewer than `size` only if it ends there.

        Call it before anything is read. It leaves out bytes that cannot be decompressed: reading them raises.
        """
        room = memoryview(bytearray(size))
        filled = 0
        with suppress(Malformed):
            while filled < size and (count := self.readinto(room[filled:])):
                filled += count
        self._looked = bytes(room[:filled])
        return self._looked

    def readinto(self, buffer: memoryview) -> int:
        """Read at least a byte; returns the number, 0 at the end. Raises Malformed if compressed data are damaged."""
        if size := min(len(buffer), len(self._looked)):
            buffer[:size], self._looked = self._looked[:size], self._looked[size:]
            return size
        if self.inflater is None:
            return self._file.readinto1(buffer)
        if size := min(len(buffer), len(self._ahead)):
            buffer[:size] = self._ahead[:size]
            self._ahead = self._ahead[size:]
            return size
        if self._fault is not None:
            raise self._fault
        return self.inflater.readinto(buffer)

    @property
    def can_seek(self) -> bool:
        """Whether any part of what is read can be read at any time."""
        return self.size is not None and self.inflater is None

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def skip(self, size: int) -> int:
        """Pass over bytes of a file that can seek; returns how many there were."""
        there = max(min(size, (self.size or 0) - self._file.tell()), 0)
        self._file.seek(there, os.SEEK_CUR)
        return there

    def last(self, size: int) -> bytes:
        """The last bytes of a file that can seek; what is read next stays the same."""
        here = self._file.tell()
        self._file.seek(max((self.size or 0) - size, 0))
        data = self._file.read(size)
        self._file.seek(here)
        return data


def restorer_of(
    file: StreamFile,
    dialect: Dialect | None = None,
    *,
    limits: Limits | None = None,
    strict: bool = False,
    home: Home | None = None,
    new_digest: NewDigest = new_digest,
) -> AnyRestorer:
    """The restorer for what a file holds, found by looking at its first bytes.

    strict, dialect, new_digest: of a legacy stream; a v2 stream needs none of them
    """
    if is_v2(file.look(LOOK_BYTES)):
        return V2Restorer(limits=limits, home=home)
    restorer = Restorer(dialect, limits=limits, strict=strict, home=home, new_digest=new_digest)
    restorer.reader.takes_second_record = True
    return restorer


def read_events(file: StreamFile, restorer: AnyRestorer) -> Iterator[events.Event]:
    """Every event of a stream, from its header to EndOfStream; after a tail, the caller commits `restorer.staged`."""
    while True:
        event = restorer.next_event()
        if event is not NEED_DATA:
            yield event
            if isinstance(event, events.EndOfStream):
                return
        elif size := file.readinto(restorer.get_buffer()):
            restorer.buffer_updated(size)
        else:
            if file.inflater is not None and not restorer.reader.saw_last_checkpoint:
                # As in an uncompressed stream: only after its last checkpoint may anything follow.
                file.inflater.refuse_junk()
            restorer.feed_eof()


def read_checkpoints(
    path: str | Path, *, dialect: Dialect | None = None, limits: Limits | None = None, strict: bool = False
) -> Iterator[Checkpoint]:
    """Restore a stream, checkpoint by checkpoint.

    path: a file, or "-" for standard input; may be compressed with xz, gzip, bzip2, lz4 or zstd
    Each checkpoint's `memory` is valid until you ask for the next checkpoint.
    A truncated stream ends with its last complete checkpoint.
    Raises Malformed or UnknownFormat after the last good checkpoint, OSError if the file cannot be read.
    """
    with StreamFile(path) as file:
        restorer = restorer_of(file, dialect, limits=limits, strict=strict)
        for _ in read_events(file, restorer):
            if restorer.staged is not None:
                yield restorer.commit()


def create_private(path: str | Path, *, is_ours: bool = False) -> int:
    """Create a file that holds memory, or empty the one that is there: a descriptor, mode 0600.

    is_ours: no other process may open it this way until it is closed
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            if is_ours:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RemusError(f"{path} is already being written") from None
            os.ftruncate(descriptor, 0)
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class StreamWriter:
    """Writes a stream to a file of mode 0600, or to standard output ("-").

    An incomplete checkpoint is cut off again, so that the file ends where a checkpoint ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = "standard output" if str(path) == "-" else str(path)
        self._is_file = False
        if str(path) == "-":
            self._fd = os.dup(sys.stdout.fileno())
        else:
            self._fd = create_private(path, is_ours=True)
            self._is_file = os.path.isfile(path)
        self.written = 0
        self.committed = 0
        """Bytes up to the end of the last complete checkpoint."""

    def write(self, buffers: list[Buffer]) -> None:
        """Write all of the buffers."""
        try:
            self.written += write_all(self._fd, buffers)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from error

    def commit(self, sent: Sent) -> None:
        """Everything written so far ends a complete checkpoint."""
        self.committed = self.written

    def fds(self) -> Sequence[int]:
        """None: a file reports nothing between two checkpoints."""
        return ()

    def check(self) -> None:
        """Does nothing: a file reports nothing between two checkpoints."""

    def close(self) -> None:
        """Cut off an incomplete checkpoint, and close."""
        try:
            if self._is_file:
                # Always: a write may have been interrupted before it was counted.
                os.ftruncate(self._fd, self.committed)
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
