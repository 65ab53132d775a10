"""What the images of a guest's disks held before a checkpoint was written to them (specs/disk.md §4).

    IDENT.SEED.raw                 is at the newest checkpoint
    IDENT.SEED.raw.undo.START      what was overwritten since the position START of the log, checkpoint after checkpoint

`UndoLog` is the backup's: it keeps what is about to be overwritten. `DiskMoment` reads a disk as it was at an earlier
checkpoint, while the backup writes on. Whatever a record says is durable before the image changes; so a block that
was read before the records were, and stands in none of them, has not changed since.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import sync_directory
from remus_ckpt.errors import VmError
from remus_ckpt.limits import MIB
from remus_ckpt.pages import Buffer
from remus_ckpt.vm.disk_log import writes
from remus_ckpt.vm.part import DiskPart

BLOCK_BYTES = 4096
LEAST_BYTES = 64 * MIB
"""At least so much is kept of a disk, and of a larger one as much as the disk has."""
_FILES, FILE_BYTES = 8, 64 * MIB
"""At least so many files, each of at most so much: the oldest is removed when there is too much."""
MOST_BLOCKS = 65_536
"""Of one checkpoint; if it overwrites more, earlier moments are given up."""
_HEAD = struct.Struct("<QQII")
"""Positions before and after the checkpoint, number of blocks, CRC-32C of what follows: a u64 for each block, and the
contents of those that were not zero."""
_ZERO = np.uint64(1 << 63)
"""Set in the number of a block that was zero."""


def _files(image: Path) -> list[Path]:
    return sorted(image.parent.glob(f"{image.name}.undo.*"))


def _file(image: Path, start: int) -> Path:
    return image.with_name(f"{image.name}.undo.{start:020}")


def _start_of(path: Path) -> int:
    return int(path.suffix[1:])


def remove_undo(image: Path) -> None:
    """Give up all moments of an image before the newest. Raises OSError."""
    for path in _files(image):
        path.unlink(missing_ok=True)


class _Record:
    """One checkpoint's, in a file. at: where its blocks' contents begin"""

    __slots__ = ("at", "blocks", "end", "start", "stop")

    def __init__(self, start: int, stop: int, blocks: NDArray[np.uint64], at: int) -> None:
        self.start, self.stop, self.blocks, self.at = start, stop, blocks, at
        self.end = at + BLOCK_BYTES * int((blocks < _ZERO).sum())


def _records(fd: int, at: int) -> Iterator[_Record]:
    """The records that are whole, from there on."""
    size = os.fstat(fd).st_size
    while at + _HEAD.size <= size:
        start, stop, count, crc = _HEAD.unpack(os.pread(fd, _HEAD.size, at))
        if count > MOST_BLOCKS or at + _HEAD.size + 8 * count > size:
            return
        numbers = os.pread(fd, 8 * count, at + _HEAD.size)
        found = _Record(start, stop, np.frombuffer(numbers, "<u8"), at + _HEAD.size + 8 * count)
        if found.end > size or google_crc32c.value(numbers + os.pread(fd, found.end - found.at, found.at)) != crc:
            return
        yield found
        at = found.end


class UndoLog:
    """Of one image. One thread at a time. Raises OSError.

    image: its path; size: of the disk
    """

    def __init__(self, image: Path, size: int) -> None:
        self._image, self._size = image, size
        self._most_bytes = max(size, LEAST_BYTES)
        self._file_bytes = min(self._most_bytes // _FILES, FILE_BYTES)
        self._path: Path | None = None
        self._at = 0
        self.end: int | None = None
        """Where the newest record ends, as a position in the log; None without any."""
        if files := _files(image):
            self._path = files[-1]
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                for record in _records(fd, 0):
                    self.end, self._at = record.stop, record.end
                os.ftruncate(fd, self._at)
            finally:
                os.close(fd)
            if self.end is None:
                self.end = _start_of(self._path)

    def keep(self, fd: int, disk: DiskPart, log: Buffer) -> None:
        """Keep what this log is about to overwrite in an image. Durable when this returns."""
        if self.end == disk.stop or not len(log):
            return  # it is kept already: the backup has died since, and the image may have changed
        if self.end is not None and self.end != disk.start:
            self._clear()
        blocks = self._overwritten(fd, log)
        if len(blocks) > MOST_BLOCKS:
            self._clear()
            return
        contents = _contents(fd, np.array(blocks, np.int64))
        is_zero = ~contents.view(np.uint64).any(axis=1)
        numbers = np.array(blocks, "<u8")
        numbers[is_zero] |= _ZERO
        left = contents[~is_zero] if is_zero.any() else contents
        crc = google_crc32c.value(numbers.tobytes())
        if len(left):
            crc = google_crc32c.extend(crc, left.reshape(-1))
        if self._path is None or self._at > self._file_bytes:
            self._path, self._at = _file(self._image, disk.start), 0
            self._make_room()
        head = _HEAD.pack(disk.start, disk.stop, len(blocks), crc) + numbers.tobytes()
        undo, at = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), self._at
        try:
            for view in (memoryview(head), memoryview(left.reshape(-1))):
                while view:
                    done = os.pwrite(undo, view, at)
                    view, at = view[done:], at + done
            os.fdatasync(undo)
        finally:
            os.close(undo)
        if not self._at:
            sync_directory(self._path.parent)
        self._at, self.end = at, disk.stop

    def _overwritten(self, fd: int, log: Buffer) -> list[int]:
        found: set[int] = set()
        for write in writes(log, self._size):
            end = write.offset + write.length
            ranges = [(write.offset, end)] if write.data is not None else _data_in(fd, write.offset, end)
            for first, last in ranges:
                found.update(range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)))
                if len(found) > MOST_BLOCKS:
                    break
        return sorted(found)

    def _make_room(self) -> None:
        files = _files(self._image)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._most_bytes:
                break
            total -= path.stat().st_size
            path.unlink()

    def _clear(self) -> None:
        remove_undo(self._image)
        self._path, self._at, self.end = None, 0, None


def _contents(fd: int, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8[n, 4096]: these blocks of a file; beyond its end, zeros."""
    found = np.zeros((len(blocks), BLOCK_BYTES), np.uint8)
    begins = [0, *(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), len(blocks)]
    for first, last in pairwise(begins if len(blocks) else ()):
        view, at = memoryview(found[first:last]).cast("B"), int(blocks[first]) * BLOCK_BYTES
        while view and (size := os.preadv(fd, [view], at)):
            view, at = view[size:], at + size
    return found


def _data_in(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes. Zeroes over holes change nothing."""
    with suppress(OSError):  # ENXIO: no data follow
        while start < stop and (begin := os.lseek(fd, start, os.SEEK_DATA)) < stop:
            start = min(os.lseek(fd, begin, os.SEEK_HOLE), stop)
            yield begin, start


class DiskMoment:
    """A disk as it was at a checkpoint, which may be written to; no one else sees the writes.

    image: of the disk on the backup
    disk, log: what the checkpoint says of it, and has written to it
    Any thread may call any method. Raises VmError if the image does not tell what it was then, at any time.
    """

    def __init__(self, image: Path, disk: DiskPart, log: Buffer) -> None:
        self._image, self._disk = image, disk
        self._lock = threading.Lock()  # guards all
        self._undone: dict[int, tuple[int, int]] = {}  # of a block: a descriptor and an offset, −1 for zeroes
        self._undo: list[int] = []
        self._at = 0
        self._written: set[int] = set()
        self._own = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as this object
        self._fd = -1
        try:
            self._fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(self._fd).st_size != disk.size:
                raise VmError(f"{image} has {os.fstat(self._fd).st_size:,} bytes, and the disk {disk.size:,}")
            self._end = self._find_end()
            self.refresh()
            # Its own log may not have been written to the image yet, or not all of it.
            for write in writes(log, disk.size):
                self.write(write.offset, bytes(write.length) if write.data is None else write.data)
        except OSError as error:
            self.close()
            raise VmError(f"{image}: {error.strerror}: earlier states of the disk {disk.ident} are not kept") from error
        except BaseException:
            self.close()
            raise

    def _noted(self) -> int | None:
        """The position of the image, or where it is about to be; None before the first checkpoint."""
        with suppress(OSError, ValueError):
            return int(self._image.with_name(f"{self._image.name}.at").read_bytes()[:20])
        return None

    def _find_end(self) -> int:
        """Where the records end that are of no interest. Their file is open then, if there is one."""
        wanted, stands = self._disk.stop, self._noted()
        files = [path for path in _files(self._image) if _start_of(path) <= wanted]
        if files:
            end = _start_of(files[-1])
            self._undo.append(os.open(files[-1], os.O_RDONLY | os.O_CLOEXEC))
            for record in _records(self._undo[-1], 0):
                if record.start >= wanted:
                    break
                end, self._at = record.stop, record.end
            if end == wanted or (end == self._disk.start and stands in (None, end)):
                return end
            os.close(self._undo.pop())
            self._at = 0
        if stands == wanted:  # nothing is kept of what was before
            return wanted
        if stands in (None, self._disk.start):
            return self._disk.start
        raise VmError(
            f"{self._image}: the state of the disk {self._disk.ident} at this checkpoint is no longer kept: start "
            "a later one, or take the memory alone with `remus-ckpt restore`"
        )

    def refresh(self) -> None:
        """Look at what has been overwritten since. Often, so that no file is removed unseen."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        noted = self._noted()  # first: what it tells of is kept by now
        while True:
            if self._undo:
                for record in _records(self._undo[-1], self._at):
                    self._take(record)
            try:
                fd = os.open(_file(self._image, self._end), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                break
            if self._undo and os.path.sameopenfile(fd, self._undo[-1]):
                os.close(fd)
                break
            self._undo.append(fd)
            self._at = 0
        if self._image.with_name(f"{self._image.name}.ran").exists():
            raise VmError(f"{self._image}: the guest continues on this image, and changes it")
        if noted is not None and noted > max(self._end, self._disk.stop):
            raise VmError(f"{self._image}: this state of the disk is no longer kept")

    def _take(self, record: _Record) -> None:
        at = record.at
        for number in record.blocks.tolist():
            is_zero = number >> 63
            if record.start >= self._disk.stop:
                self._undone.setdefault(number & ~(1 << 63), (self._undo[-1], -1 if is_zero else at))
            at += 0 if is_zero else BLOCK_BYTES
        self._at = record.end
        self._end = max(self._end, record.stop)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes of the disk."""
        with self._lock:
            first, last = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
            base = first * BLOCK_BYTES
            data = bytearray(os.pread(self._fd, (last - first) * BLOCK_BYTES, base))
            data.extend(bytes((last - first) * BLOCK_BYTES - len(data)))
            self._refresh()  # afterwards: what was overwritten while we read is known now
            for number in range(first, last):
                place = (number - first) * BLOCK_BYTES
                if number in self._written:
                    own = os.pread(self._own.fileno(), BLOCK_BYTES, number * BLOCK_BYTES)
                    data[place : place + BLOCK_BYTES] = own.ljust(BLOCK_BYTES, b"\0")
                elif (found := self._undone.get(number)) is not None:
                    fd, at = found
                    data[place : place + BLOCK_BYTES] = os.pread(fd, BLOCK_BYTES, at) if at >= 0 else bytes(BLOCK_BYTES)
            return bytes(data[offset - base : offset - base + length])

    def write(self, offset: int, data: Buffer) -> None:
        """Write to this disk alone."""
        view = memoryview(data).cast("B")
        end = offset + len(view)
        first, last = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        for number in {first, last - 1}:  # may be written in part
            start = number * BLOCK_BYTES
            if number not in self._written and (start < offset or start + BLOCK_BYTES > end):
                block = self.read(start, min(BLOCK_BYTES, self._disk.size - start))
                with self._lock:
                    os.pwrite(self._own.fileno(), block, start)
        with self._lock:
            while view:
                done = os.pwrite(self._own.fileno(), view, offset)
                view, offset = view[done:], offset + done
            self._written.update(range(first, last))

    def close(self) -> None:
        """Forget what was written to it."""
        self._own.close()
        for fd in (self._fd, *self._undo):
            if fd >= 0:
                os.close(fd)
        self._fd = -1
        self._undo.clear()
