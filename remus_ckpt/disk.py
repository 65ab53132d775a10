"""Durable files: how a store writes them, and how an OSError becomes a StoreError that names the file."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from remus_ckpt import extensions
from remus_ckpt.errors import StoreError
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages

native: Any
try:
    native = extensions.load("wire._path")
except ImportError:  # it was not built: Python does it
    native = None

_MAX_VECTORS = 1024
_COPY_BYTES = 1 << 22
_TOKEN_BYTES = 8
_SYNC_EACH = 64
"""Each sync may flush the disk's cache: for more files than this, one sync of the whole file system is cheaper."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = getattr(_libc, "renameat2", None)
_syncfs = getattr(_libc, "syncfs", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_fstatfs = getattr(_libc, "fstatfs", None)
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_STATFS_BYTES = 256
_IN_PLACE = (0xEF53, 0x58465342)
"""ext2 to ext4, and XFS, by `f_type`. Others, such as btrfs, may move a block when it is overwritten."""
Written = Literal["store", "warm copy", "output"]
"""What a file is: the user's own output, or a backup's, which keeps running."""
_GOES_ON = "what was committed is intact, and a backup then goes on by itself"
_INSTEAD: dict[Written, tuple[str, str]] = {
    "store": ("keep less", _GOES_ON),
    "warm copy": ("have warm copies elsewhere (--warm)", _GOES_ON),
    "output": ("write to another file system", "then run the command again"),
}


@contextmanager
def guarding(path: str | Path | None, written: Written = "store") -> Iterator[None]:
    """Turn OSError into StoreError."""
    try:
        yield
    except OSError as error:
        raise told(error, path, written) from error


def told(error: OSError, path: str | Path | None, written: Written = "store") -> StoreError:
    """An OSError as a StoreError that names the file."""
    return StoreError(f"{path}: {error.strerror or error}{what_next(error, written)}")


def what_next(error: OSError, written: Written) -> str:
    """What to do about a full disk, as the end of a sentence; empty for other errors."""
    instead, then = _INSTEAD[written]
    match error.errno:
        case errno.ENOSPC:
            return f": make room there, or {instead}; {then}"
        case errno.EDQUOT:
            return f": raise the quota, or {instead}; {then}"
        case errno.EROFS:
            return ": mount it writable; reading works as it is" if written == "store" else f": {instead}"
    return ""


@contextmanager
def naming_file(name: str | Path) -> Iterator[None]:
    """Make an OSError name its file, which one from a descriptor does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota has no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def free_bytes(path: str | Path) -> int:
    """Free bytes in the file system of a path, without those reserved for root. Raises OSError."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def write_all(fd: int, buffers: Sequence[Buffer]) -> int:
    """Write all of the buffers; returns the number of bytes. Raises OSError."""
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


def write_pages(fd: int, pages: Pages, index: NDArray[np.int64], numbers: NDArray[np.int64], at: int = 0) -> None:
    """Write pages to their places in a file, one after the other; those that follow each other in both are one write.

    pages: uint8[m, 4096], C-contiguous
    index, numbers: int64[n]: page `index[i]` goes to `at` and `numbers[i]` pages
    Raises OSError; some may have been written then.
    """
    if native is not None:
        native.write_pages(fd, pages, index, numbers, at)
        return
    flat = memoryview(pages.reshape(-1))
    borders = np.flatnonzero((np.diff(index) != 1) | (np.diff(numbers) != 1)) + 1
    for first, stop in itertools.pairwise([0, *borders.tolist(), len(index)] if len(index) else []):
        begin = int(index[first]) * PAGE_SIZE
        left, place = flat[begin : begin + (stop - first) * PAGE_SIZE], at + int(numbers[first]) * PAGE_SIZE
        while left:
            size = os.pwrite(fd, left, place)
            left, place = left[size:], place + size


def start_writing(fd: int, start: int, size: int) -> None:
    """Tell the kernel to start writing these bytes to the disk, so that a sync has less to do. It may refuse."""
    if _sync_file_range is not None:
        _sync_file_range(fd, start, size, _WRITE)


def write_back(fd: int, start: int, size: int) -> None:
    """Write these bytes to the disk, and wait for that. They are not durable yet; a sync reports what failed."""
    if _sync_file_range is not None:
        _sync_file_range(fd, start, size, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


def overwrites_in_place(fd: int) -> bool:
    """Whether the file system of a file is known to overwrite blocks in place."""
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _fstatfs is None or _fstatfs(fd, found):
        return False
    return int.from_bytes(found.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) in _IN_PLACE


def sync_directory(path: Path) -> None:
    """Make everything created, renamed or removed in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_read(path: Path) -> int:
    """Open a file; returns a descriptor. Never blocks, even on a pipe. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def sync_file(path: Path) -> None:
    """Make a file's contents durable, but not its name. Raises OSError."""
    descriptor = open_to_read(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(directory: Path, names: Sequence[str]) -> None:
    """Make the contents of these files durable, but not their names. Raises StoreError."""
    with guarding(directory):
        if len(names) > _SYNC_EACH and sync_file_system(directory):
            return
    for name in names:
        with guarding(directory / name):
            sync_file(directory / name)


def sync_file_system(path: Path) -> bool:
    """Sync the whole file system of a directory; returns whether that is known to have worked.

    Since 5.8, Linux reports pages that it failed to write, whoever wrote them: a failure says nothing about one file.
    """
    if _syncfs is None:
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return not _syncfs(descriptor)
    finally:
        os.close(descriptor)


def sync_names_above(path: Path) -> None:
    """Make every name on the path from the root of the file system to a directory durable.

    If a store was copied or moved there, none of them may have been synced. Raises OSError.
    """
    path = path.resolve()
    device = path.stat().st_dev
    for parent in path.parents:
        with suppress(PermissionError):  # it belongs to another user
            if parent.stat().st_dev != device:
                return
            sync_directory(parent)


def write_again(fd: int, start: int, end: int) -> None:
    """Write these bytes of a file again, in place, and sync it. Raises OSError.

    Linux may mark pages clean that it failed to write. Another sync would then succeed and prove nothing; this proves
    it.
    """
    at = start
    while at < end:
        block = os.pread(fd, min(end - at, _COPY_BYTES), at)
        if not block:
            raise OSError(errno.EIO, "the file has been truncated")
        at += os.pwrite(fd, block, at)
    os.fsync(fd)


def make_directory(path: Path) -> None:
    """Make a directory of mode 0700 and any missing parents, durably.

    Each is synced into its parent before anything is put into it. So only the deepest existing one may lack its sync,
    if its maker died at that moment: it gets one now. Raises OSError.
    """
    there, missing = path.absolute(), []
    while not there.is_dir():
        if there.exists():
            raise OSError(errno.ENOTDIR, f"{there} is a file, not a directory")
        missing.append(there)
        there = there.parent
    with suppress(PermissionError):  # it belongs to another user
        sync_directory(there.parent)
    for one in reversed(missing):
        one.mkdir(mode=0o700 if one == missing[0] else 0o777, exist_ok=True)
        try:
            sync_directory(one.parent)
        except BaseException:
            with suppress(OSError):
                one.rmdir()
            raise


@contextmanager
def appearing(path: Path, *, sync: bool = True) -> Iterator[int]:
    """The descriptor of a new file of mode 0600, which replaces the path if the block succeeds.

    sync: make it durable
    Raises OSError that names the path.
    """
    # Choose the name first: if a signal handler raises in between, no file is left behind.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}")
    try:
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                yield descriptor
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        if sync:
            sync_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_unfinished(path: Path) -> None:
    """Remove what `appearing` left of a path when it was killed. No one else may be writing it. Raises OSError."""
    for left in path.parent.glob(f".{path.name}.{'[0-9a-f]' * (2 * _TOKEN_BYTES)}"):
        left.unlink(missing_ok=True)


def spare_of(path: Path) -> Path:
    """The file that `replace_file` writes next, beside the one it replaces."""
    return path.with_name(f"{path.name}.spare")


def _open_spare(spare: Path) -> int:
    with suppress(FileNotFoundError):
        status = os.lstat(spare)
        if status.st_nlink != 1 or not stat.S_ISREG(status.st_mode):
            spare.unlink()  # it was store.json, and that has been hard-linked
    return os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def keep_room(spare: Path, size: int) -> None:
    """Give a spare at least `size` bytes on the disk, so that `replace_file` needs no more room. Raises OSError."""
    descriptor = _open_spare(spare)
    try:
        held = os.fstat(descriptor).st_size
        if held < size:
            os.lseek(descriptor, held, os.SEEK_SET)
            write_all(descriptor, [b" " * (size - held)])
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, spare: Path | None = None) -> None:
    """Give a file of mode 0600 new contents, completely or not at all, and durably. Raises OSError.

    spare: written in place, then given the name; an old file becomes the next spare. So even a full disk has room for
        as many bytes as the spare holds.
    If only the last sync fails, the file has been replaced, but a loss of power may undo that.
    """
    spare = spare or spare_of(path)
    descriptor = _open_spare(spare)
    is_replaced = False
    try:
        try:
            os.fchmod(descriptor, 0o600)
            write_all(descriptor, [data])
            os.ftruncate(descriptor, len(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not _exchange(spare, path):
            os.replace(spare, path)
        is_replaced = True
        sync_directory(path.parent)
    except BaseException as error:
        # The disk may still have the old file under the old name, or hold other bytes than those written: use another
        # file from now on. The spare stays good if there was only no room.
        if is_replaced or not (isinstance(error, OSError) and error.errno in _FULL):
            with suppress(OSError):
                spare.unlink()
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files; returns whether it was done. Raises OSError."""
    if _renameat2 is None:
        return False
    if not _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    if (number := ctypes.get_errno()) in (errno.ENOENT, errno.EINVAL, errno.ENOSYS):
        return False  # there is no old file, or the file system cannot do it
    raise OSError(number, os.strerror(number))
