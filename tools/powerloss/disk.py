"""A block device that remembers every write and every flush, so that it can be said what it held at any instant.

A FUSE server gives one regular file; a loop device on it hands on each write and each flush of the file system above.
The server keeps them in a log, in the order in which they came. A loss of power leaves everything up to the last flush
and any subset of the blocks that were written since: an order among those is no promise of a disk.

    python disk.py IMAGE LOG COUNTER TARGET        serve IMAGE as the file TARGET until the file system is unmounted

LOG      records: offset u64, size u32, bytes; size 0: a flush
COUNTER  a file of one u64 that is mapped: how many records there are
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

BLOCK = 4096
_RECORD = struct.Struct("<QI")
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_MAX_WRITE = 1 << 20
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_CLONE_NEWNS, _PR_SET_PDEATHSIG = 0x00020000, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Op(IntEnum):
    """Requests of the kernel to a FUSE server."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


def own_mounts() -> None:
    """From here on mounts are seen by this process and its children alone, and go when the last of them ends."""
    if _libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare: this needs root")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def unmount_below(where: Path) -> None:
    """Whatever is still mounted there."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if Path(line.split()[1]).is_relative_to(where):
            subprocess.run(["umount", "-l", line.split()[1]], check=False)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends; end now if it has."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("whoever started this is gone")


# The server


def serve(image: str, log: str, counter: str, target: str) -> None:
    """Serve until unmounted."""
    die_with_parent()
    with open(image, "r+b") as file:
        disk = mmap.mmap(file.fileno(), 0)
    with open(counter, "r+b") as file:
        count = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode={stat.S_IFREG:o},user_id=0,group_id=0".encode()
    if _libc.mount(b"disk", target.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), f"mount of FUSE on {target}")
    with open(log, "ab", buffering=0) as records:
        while True:
            try:
                request = os.read(fuse, _MAX_WRITE + BLOCK)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, code, unique, *_ = _IN.unpack_from(request)
            if code in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
                continue
            try:
                answer = _answer(code, memoryview(request)[_IN.size :], disk, records, count)
                reply = _OUT.pack(_OUT.size + len(answer), 0, unique) + answer
            except OSError as error:
                reply = _OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique)
            os.write(fuse, reply)


def _answer(code: int, body: memoryview, disk: mmap.mmap, records: BinaryIO, count: memoryview) -> bytes:
    match code:
        case Op.INIT:
            major, minor, readahead, _ = struct.unpack_from("<4I", body)
            flags = _BIG_WRITES | _MAX_PAGES
            return struct.pack(
                "<4I2H2I2H8I", major, min(minor, 36), readahead, flags, 16, 12, _MAX_WRITE, 1, 256, 0, *[0] * 8
            )
        case Op.GETATTR | Op.SETATTR:
            times = [0] * 6
            mode = stat.S_IFREG | 0o600
            attr = _ATTR.pack(1, len(disk), len(disk) // 512, *times[:3], *times[:3], mode, 1, 0, 0, 0, BLOCK, 0)
            return struct.pack("<QII", 3600, 0, 0) + attr
        case Op.OPEN:
            return bytes(16)
        case Op.READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return disk[offset : offset + size]
        case Op.WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = body[40 : 40 + size]
            disk[offset : offset + size] = data
            _write_all(records, _RECORD.pack(offset, size) + bytes(data))
            count[0] += 1
            return struct.pack("<II", size, 0)
        case Op.FSYNC:
            _write_all(records, _RECORD.pack(0, 0))
            count[0] += 1
            return b""
        case Op.RELEASE | Op.FLUSH | Op.DESTROY:
            return b""
    raise OSError(errno.ENOSYS, "not needed")


def _write_all(file: BinaryIO, data: bytes) -> None:
    if file.write(data) != len(data):
        raise OSError(errno.EIO, "the log cannot be written")


# The harness's part


class Disk:
    """A served image, mounted as ext4.

    base: the image that it begins with; left as it is
    where: a folder for its files
    options: of the mount
    """

    def __init__(self, base: Path, where: Path, options: str) -> None:
        where.mkdir()
        self.base, self.log, self.counter = base, where / "log", where / "counter"
        self.mounted = where / "mnt"
        self._file = where / "disk"
        image = where / "image"
        shutil.copyfile(base, image)
        self.log.touch()
        self._file.touch()
        self.mounted.mkdir()
        self.counter.write_bytes(bytes(mmap.PAGESIZE))
        with open(self.counter, "r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
        command = [sys.executable, __file__, image, self.log, self.counter, self._file]
        self._server = subprocess.Popen(list(map(str, command)))
        for _ in range(1000):
            if os.path.ismount(self._file) or self._server.poll() is not None:
                break
            time.sleep(0.005)
        _run("mount", "-o", f"loop,{options}", str(self._file), str(self.mounted))

    @property
    def position(self) -> int:
        """How many writes and flushes there were."""
        return int(self.words[0])

    def close(self) -> None:
        """Unmount; nobody has a file open there any more."""
        _run("umount", str(self.mounted))
        _run("umount", str(self._file))
        self._server.wait(10)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def make_image(path: Path, mib: int) -> None:
    """An empty ext4."""
    with open(path, "wb") as file:
        file.truncate(mib << 20)
    _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(path))


def records(log: Path) -> Iterator[tuple[int, bytes]]:
    """Each write as its offset and bytes; a flush has no bytes."""
    with open(log, "rb") as file:
        while head := file.read(_RECORD.size):
            offset, size = _RECORD.unpack(head)
            yield offset, file.read(size)


SURVIVORS = ("none", "all", "prefix", "some")
"""What is left of the blocks that were written since the last flush."""


def after_losses(
    base: Path, log: Path, cuts: list[tuple[int, str, int]], where: Path
) -> Iterator[tuple[int, str, int]]:
    """What the disk holds after each loss of power, as an image in `where`, which the next one overwrites.

    cuts: (position, one of SURVIVORS, seed), in order of position: power goes when so many records have come
    """
    rolling = where.with_suffix(".flushed")
    shutil.copyfile(base, rolling)
    coming = records(log)
    pending: list[tuple[int, bytes]] = []
    at = 0
    with open(rolling, "r+b", buffering=0) as flushed:
        for position, survivors, seed in cuts:
            while at < position:
                offset, data = next(coming)
                at += 1
                if data:
                    pending.append((offset, data))
                else:
                    for start, block in pending:
                        os.pwrite(flushed.fileno(), block, start)
                    pending.clear()
            shutil.copyfile(rolling, where)
            with open(where, "r+b", buffering=0) as image:
                for start, block in surviving(pending, survivors, random.Random(seed)):
                    os.pwrite(image.fileno(), block, start)
            yield position, survivors, seed


def surviving(pending: list[tuple[int, bytes]], how: str, draw: random.Random) -> Iterator[tuple[int, bytes]]:
    """Those blocks that reached the disk though no flush came behind them."""
    blocks = [(start + at, data[at : at + BLOCK]) for start, data in pending for at in range(0, len(data), BLOCK)]
    match how:
        case "all":
            yield from blocks
        case "prefix":
            yield from blocks[: draw.randrange(len(blocks) + 1)]
        case "some":
            share = draw.random()
            yield from (block for block in blocks if draw.random() < share)


if __name__ == "__main__":
    serve(*sys.argv[1:])
