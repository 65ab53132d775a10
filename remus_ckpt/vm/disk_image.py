"""The images of a guest's disks on its backup: each is at the last committed checkpoint (specs/disk.md §4).

    IDENT.SEED.part    a copy that is coming in, block by block, while the guest runs on
    IDENT.SEED.raw     a copy that is complete; from the first checkpoint on that names its seed, the image
    IDENT.SEED.raw.undo.… what was overwritten: the image as it was at earlier checkpoints (disk_undo.py)
    IDENT.SEED.raw.ran a guest has run on that image, or may have: it is no checkpoint's any more, and is kept

The log of a checkpoint is part of the checkpoint, so one commit covers memory and disks. The log is written to the
image after that commit; if anything dies meanwhile, writing it again brings the image there. So the newest checkpoint
says where an image is. A note beside it, IDENT.SEED.raw.at, only reveals an image that is ahead of a history from which
checkpoints were lost.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding, make_directory, sync_directory
from remus_ckpt.errors import RemusError, StoreError, StreamError
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.pages import Buffer
from remus_ckpt.vm.disk_log import writes
from remus_ckpt.vm.disk_undo import UndoLog, remove_undo
from remus_ckpt.vm.part import MAX_DISKS, DiskPart, VmPart

FOLDER = ".disks"
"""In a store, for the images of all guests."""
BLOCK_BYTES = 64 * KIB
"""What is compared, and copied if it differs."""
MAX_BLOCKS = 1024
"""In one request."""
MAX_READ_BYTES = 512 * KIB
DIGEST_BYTES = 16
_ZERO_BYTES = 4 * MIB
_PUNCH_HOLE = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE."""
_FLOCK = struct.Struct("hhqqi")
_F_OFD_GETLK = 36
_QEMU_LOCKS = (100, 200)
"""Where QEMU's locks are: its first byte, and how many (block/file-posix.c)."""
_libc = ctypes.CDLL(None, use_errno=True)


def digests(data: Buffer) -> list[bytes]:
    """Of each block of `BLOCK_BYTES`, by which two sides find where their disks differ."""
    view = memoryview(data)
    return [
        hashlib.blake2b(view[at : at + BLOCK_BYTES], digest_size=DIGEST_BYTES).digest()
        for at in range(0, len(view), BLOCK_BYTES)
    ]


class DiskImages:
    """The disks of one guest. Any thread may call any method.

    folder: for this guest alone; made when it is needed
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()  # guards all
        self._at: dict[str, tuple[bytes, int]] = {}
        """The position of each disk's image, from which a checkpoint continues: seed and position in the log."""
        self._copied: dict[str, tuple[bytes, int]] = {}
        """The position of each complete copy that no checkpoint has named yet."""
        self._undo: dict[str, tuple[bytes, UndoLog]] = {}
        """What each image was before; with its seed."""

    # Checkpoints

    def admit(self, device_state: Buffer) -> None:
        """Raise StoreError or StreamError if the disks of this checkpoint of a guest could not follow it."""
        disks = VmPart.disks_of(device_state)
        for disk in disks:
            with self._lock:
                known = (self._at.get(disk.ident), self._copied.get(disk.ident))
            if (disk.seed, disk.start) not in known:
                raise StoreError(f"the image of the disk {disk.ident} is not at the state where this checkpoint begins")
        if disks:
            VmPart.unpack(device_state)

    def follow(self, part: VmPart) -> None:
        """The newest checkpoint, which is durable: bring the images there, unless they are. Raises StoreError."""
        with self._lock:
            for disk, log in part.disks:
                if self._at.get(disk.ident) != (disk.seed, disk.stop):
                    self._follow(disk, log)

    def _follow(self, disk: DiskPart, log: Buffer) -> None:
        path = self._path(disk)
        self._at.pop(disk.ident, None)
        if not path.exists() or _ran(path).exists():
            return  # the disk must be copied again before there can be another checkpoint
        with guarding(path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size != disk.size:
                    raise StoreError(f"{path} has {os.fstat(fd).st_size:,} bytes, and its disk {disk.size:,}")
                if _noted(path) > disk.stop:
                    return  # it is ahead
                self._keep(path, fd, disk, log)
                _note(path, disk.stop)
                _write(fd, log, disk.size)
                if len(log):
                    os.fdatasync(fd)
            finally:
                os.close(fd)
        self._at[disk.ident] = (disk.seed, disk.stop)
        if self._copied.pop(disk.ident, None) is not None:
            with guarding(self.folder):
                for other in self._images(disk.ident):
                    if other != path:
                        other.unlink(missing_ok=True)
                        _note_of(other).unlink(missing_ok=True)
                        remove_undo(other)

    def _keep(self, path: Path, fd: int, disk: DiskPart, log: Buffer) -> None:
        """Keep what the image is, for copies of earlier moments; where there is no room, only the newest is."""
        try:
            if self._undo.get(disk.ident, (b"",))[0] != disk.seed:
                self._undo[disk.ident] = (disk.seed, UndoLog(path, disk.size))
            self._undo[disk.ident][1].keep(fd, disk, log)
        except OSError:
            self._undo.pop(disk.ident, None)
            remove_undo(path)

    def paths(self, disks: Sequence[DiskPart]) -> dict[str, Path]:
        """The images that stand at the checkpoint that says this of its disks. Raises StoreError if one does not."""
        with self._lock:
            for disk in disks:
                if self._at.get(disk.ident) != (disk.seed, disk.stop):
                    state = "a guest has run on it" if _ran(self._path(disk)).exists() else "it is missing, or ahead"
                    raise StoreError(f"{self._path(disk)}: {state}, so no guest can continue from this checkpoint")
            return {disk.ident: self._path(disk) for disk in disks}

    def newest(self, disks: Sequence[DiskPart]) -> dict[str, Path]:
        """The images that checkpoints write these disks to. Raises StoreError if one is missing."""
        with self._lock:
            for disk in disks:
                if self._at.get(disk.ident, (b"", 0))[0] != disk.seed:
                    raise StoreError(
                        f"{self._path(disk)} is missing: the disk is copied again with the next checkpoint"
                    )
            return {disk.ident: self._path(disk) for disk in disks}

    def hand_over(self, disks: Sequence[DiskPart]) -> None:
        """A guest is about to run on these images. Raises StoreError."""
        with self._lock:
            for disk in disks:
                path = _ran(self._path(disk))
                with guarding(path):
                    path.touch()
                    remove_undo(self._path(disk))
                self._at.pop(disk.ident, None)
            if disks:
                with guarding(self.folder):
                    sync_directory(self.folder)

    # Requests (specs/disk.md §5)

    def answer(self, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a primary's request, None if it is unknown. Raises RemusError."""
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "disk-state": lambda _: self._state(),
            "disk-begin": self._begin,
            "disk-digests": self._digests,
            "disk-read": self._read,
            "disk-write": self._take,
            "disk-done": self._done,
            "disk-survivor": lambda _: self._survivors(),
        }
        if (act := answers.get(method)) is None:
            return None
        try:
            return act(arguments)
        except (KeyError, TypeError, ValueError, OverflowError, StreamError) as error:
            raise RemusError(f"{method}: {type(error).__name__}: {error}") from error
        except OSError as error:
            raise StoreError(f"{self.folder}: {error.strerror or error}") from error

    def _state(self) -> dict[str, Any]:
        with self._lock:
            found = [*self._at.items(), *self._copied.items()]
        return {"disks": [{"disk": ident, "seed": seed, "position": at} for ident, (seed, at) in found]}

    def _begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A copy begins, from the last one of this disk if there is one."""
        disk = _disk(arguments)
        if self._path(disk).exists():  # a guest may run on it
            raise ValueError("there is an image of this seed: a copy has one of its own")
        make_directory(self.folder)
        others = {path.name.rsplit(".", 2)[0] for path in self.folder.iterdir() if path.suffix in (".raw", ".part")}
        if len(others - {disk.ident}) >= MAX_DISKS:
            raise ValueError(f"a guest has at most {MAX_DISKS} disks")
        with self._lock:
            copied, at = self._copied.pop(disk.ident, None), self._at.get(disk.ident)
        if copied is not None and (at is None or at[0] != copied[0]):
            self._path(replace(disk, seed=copied[0])).unlink(missing_ok=True)
        for path in self.folder.glob(f"{disk.ident}.*.part"):
            path.unlink()
        part = self._path(disk).with_suffix(".part")
        like = [path for path in self._images(disk.ident, all_of_them=True) if path.stat().st_size == disk.size]
        if like:
            words = ["cp", "--reflink=auto", "--sparse=auto", "--", str(like[0]), str(part)]
            done = subprocess.run(words, check=False, capture_output=True, text=True)
            if done.returncode:
                part.unlink(missing_ok=True)
                raise StoreError(done.stderr.strip()[:300] or f"cp has ended with status {done.returncode}")
        with open(part, "ab") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(disk.size)
        return {"is_empty": not like}

    def _digests(self, arguments: dict[str, Any]) -> dict[str, Any]:
        count = int(arguments["count"])
        if not 0 < count <= MAX_BLOCKS:
            raise ValueError(f"{count} blocks; at most {MAX_BLOCKS}")
        with self._opened(arguments) as (fd, _):
            return {"digests": b"".join(digests(_at(fd, arguments["offset"], count * BLOCK_BYTES)))}

    def _read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        length = int(arguments["length"])
        if not 0 < length <= MAX_READ_BYTES:
            raise ValueError(f"{length} bytes; at most {MAX_READ_BYTES}")
        with self._opened(arguments) as (fd, _):
            return {"data": _at(fd, arguments["offset"], length)}

    def _take(self, arguments: dict[str, Any]) -> dict[str, Any]:
        with self._opened(arguments, is_coming=True) as (fd, size):
            _write(fd, arguments["log"], size)
        return {}

    def _done(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A copy is complete, at this position of the log."""
        disk, position = _disk(arguments), int(arguments["position"])
        with self._opened(arguments, is_coming=True) as (fd, _):
            os.fsync(fd)
        path = self._path(disk)
        os.rename(path.with_suffix(".part"), path)
        sync_directory(self.folder)
        with self._lock:
            self._copied[disk.ident] = (disk.seed, position)
        return {}

    def _survivors(self) -> dict[str, Any]:
        """The images that a guest has run on here, the newest of each disk."""
        found = {}
        for note in sorted(self.folder.glob("*.raw.ran"), key=lambda path: path.stat().st_mtime_ns):
            path = note.with_suffix("")
            ident, seed = path.stem.rsplit(".", 1)
            found[ident] = {
                "disk": ident,
                "seed": bytes.fromhex(seed),
                "size": path.stat().st_size,
                "is_used": is_used(path),
            }
        return {"disks": list(found.values())}

    @contextmanager
    def _opened(self, arguments: dict[str, Any], *, is_coming: bool | None = None) -> Any:
        """The copy that comes in, or else the image, as a descriptor; and the size of its disk."""
        disk = _disk(arguments)
        path = self._path(disk)
        part = path.with_suffix(".part")
        chosen = part if is_coming or part.exists() else path
        fd = os.open(chosen, (os.O_RDWR if is_coming else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != disk.size:
                raise ValueError(f"{chosen.name} has {os.fstat(fd).st_size} bytes, not {disk.size}")
            yield fd, disk.size
        finally:
            os.close(fd)

    def _path(self, disk: DiskPart) -> Path:
        return self.folder / f"{disk.ident}.{disk.seed.hex()}.raw"

    def _images(self, ident: str, *, all_of_them: bool = False) -> list[Path]:
        """The images of a disk, the newest first; without those that a guest has run on, or all."""
        named = re.compile(rf"{re.escape(ident)}\.\w+\.raw")
        found = [path for path in self.folder.glob("*.raw") if named.fullmatch(path.name)]
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return found if all_of_them else [path for path in found if not _ran(path).exists()]


def is_used(path: Path) -> bool:
    """Whether a QEMU has this file open as a disk: it holds locks on some of its bytes. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_QEMU_LOCKS, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, _F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
    finally:
        os.close(fd)


def _disk(arguments: dict[str, Any]) -> DiskPart:
    """The disk that a request is about. Raises KeyError, TypeError or ValueError."""
    return DiskPart(arguments["disk"], arguments["seed"], arguments["size"], 0, 0)


def _ran(path: Path) -> Path:
    return path.with_name(f"{path.name}.ran")


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.at")


def _note(path: Path, position: int) -> None:
    fd = os.open(_note_of(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, b"%020d" % position, 0)
    finally:
        os.close(fd)


def _noted(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(_note_of(path).read_bytes()[:20])
    return 0


def _at(fd: int, offset: int, length: int) -> bytes:
    if type(offset) is not int or offset < 0:
        raise ValueError(f"{offset!r:.40} is not an offset on a disk")
    return os.pread(fd, length, offset)


def _write(fd: int, log: Buffer, disk_bytes: int) -> None:
    """Write a log to an image. Raises Malformed, before anything is written; OSError."""
    for write in list(writes(log, disk_bytes)):
        if write.data is None:
            _zero(fd, write.offset, write.length)
            continue
        view, at = write.data, write.offset
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done


def _zero(fd: int, offset: int, length: int) -> None:
    """Zeroes, as a hole where the file system can make one."""
    if not _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        return
    zeroes = memoryview(bytes(min(length, _ZERO_BYTES)))
    for done in range(0, length, len(zeroes)):
        view, at = zeroes[: length - done], offset + done
        while view:
            size = os.pwrite(fd, view, at)
            view, at = view[size:], at + size
