"""Streams in files: opened, compressed or not, read into a restorer, and written."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from remus_ckpt.compressed import Inflater, compressions
from remus_ckpt.disk import write_all
from remus_ckpt.errors import RemusError, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Buffer
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.sender import Sent
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import DETECT_BYTES, Dialect, detect_header
from remus_ckpt.wire.xen.reader import NEED_DATA

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


class StreamFile:
    """A stream from a file or from standard input ("-"), decompressed if `compressed` knows its format.

    size: bytes of the file as stored, None if unknown
    inflater: decompresses the file; None if it is not compressed
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def position(self) -> int:
        """How much of the stored file has been read, in bytes; 0 if unknown."""
        if self.size is None:
            return 0
        return self._file.tell() if self.inflater is None else self.inflater.position

    def readinto(self, buffer: memoryview) -> int:
        """Read at least a byte; returns the number, 0 at the end. Raises Malformed if compressed data are damaged."""
        return self._file.readinto1(buffer) if self.inflater is None else self.inflater.readinto(buffer)


def read_events(file: StreamFile, restorer: Restorer) -> Iterator[events.Event]:
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

    path: a file, or "-" for standard input; xz, gzip, bzip2, lz4 and zstd are read as they are
    Each checkpoint's `memory` is what it left, until the next one is asked for.
    A stream that is cut ends with its last complete checkpoint.
    Raises Malformed or UnknownFormat behind the last good one, OSError where the file cannot be read.
    """
    restorer = Restorer(dialect, limits=limits, strict=strict)
    with StreamFile(path) as file:
        for _ in read_events(file, restorer):
            if restorer.staged is not None:
                yield restorer.commit()


def create_private(path: str | Path, *, is_ours: bool = False) -> int:
    """Create a file that holds memory, or empty the one that is there: a descriptor, mode 0600.

    is_ours: nobody else may open it this way until it is closed
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
