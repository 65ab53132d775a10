"""Files of a store: every error of the system becomes a StoreError that names the file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from remus_ckpt.errors import StoreError
from remus_ckpt.pages import Buffer

_MAX_VECTORS = 1024
_WHAT_NEXT = {
    errno.ENOSPC: ": make room there, or keep less; what was committed is whole, and it goes on by itself then",
    errno.EROFS: ": mount it writable; it can be read as it is",
}


@contextmanager
def guarding(path: str | Path | None) -> Iterator[None]:
    """OSError as StoreError."""
    try:
        yield
    except OSError as error:
        hint = _WHAT_NEXT.get(error.errno or 0, "")
        raise StoreError(f"{path}: {error.strerror or error}{hint}") from error


def write_all(fd: int, buffers: Sequence[Buffer]) -> int:
    """Write all of the buffers; returns how many bytes that were. Raises OSError."""
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    written = 0
    while left:
        size = os.writev(fd, left[:_MAX_VECTORS])
        written += size
        while left and size >= len(left[0]):
            size -= len(left.pop(0))
        if size:
            left[0] = left[0][size:]
    return written


def sync_directory(path: Path) -> None:
    """What was created, renamed or removed in it is durable when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def appearing(path: Path) -> Iterator[int]:
    """A new file of mode 0600 by its descriptor, which takes the path's place, durable, when the block ends well.

    Raises StoreError.
    """
    with guarding(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """A file of mode 0600 with new contents: whole or not at all, and durable. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(descriptor, [data])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
