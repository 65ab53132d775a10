"""Which processes have the memory of a file, and how: by mappings and by descriptors.

Source: Linux, Documentation/filesystems/proc.rst: /proc/PID/maps, and PROCMAP_QUERY (Linux 6.11 or later).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from remus_ckpt.errors import SourceError

_QUERY = struct.Struct("<9Q4I2Q")
"""size, query flags, address; start, end, flags, page size, offset, inode, device of the mapping; names."""
_PROCMAP_QUERY = 0xC0686611
_SHARED = 8

WRITES, PRIVATE, READ_ONLY, NONE = "writes", "private", "read-only", "none"
"""How a process holds a file: can write to it; writes only to a private copy; can only read it; does not hold it."""

FAULTS = {
    PRIVATE: "has {path} mapped private (MAP_PRIVATE), so that nothing it writes there reaches the file: "
    "let it map the file shared",
    READ_ONLY: "has {path} mapped or open read-only, and cannot write to it: name those that do",
    NONE: "has {path} neither mapped nor open: name those that write to it",
}
"""What is wrong with a process that cannot write to it, and what to do."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What distinguishes the mappings of one file from all others.

    path: for messages
    status: of the open file
    device, inode: as the kernel lists mappings of it, which on some file systems is not what stat() says
    """

    path: str
    status: os.stat_result
    device: tuple[int, int]
    inode: int

    @classmethod
    def of(cls, path: str, fd: int) -> FileIdentity:
        """That of an open file, which must not be empty. Raises OSError if it cannot be mapped."""
        status = os.fstat(fd)
        with mmap.mmap(fd, status.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as area:
            address = np.frombuffer(area, dtype=np.uint8).ctypes.data
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                for row in map(_row, maps):
                    if row.start == address:
                        return cls(path, status, row.device, row.inode)
        raise SourceError(f"{path}: its mapping is not in /proc/self/maps")


class Row(NamedTuple):
    """A line of /proc/PID/maps. end: after the last byte; offset: of the first byte in the file"""

    start: int
    end: int
    flags: str
    offset: int
    device: tuple[int, int]
    inode: int


@dataclass(frozen=True, slots=True)
class Holding:
    """How one process holds a file.

    mapping: the first mapping that it can write to, if there is one
    has_all: whether all of the file is mapped shared
    """

    how: str
    mapping: Row | None = None
    has_all: bool = False


def holding(task: int, memory: FileIdentity) -> Holding | None:
    """How a process holds some memory; None if this thread has no memory at all: it is about to end, or has ended.

    task: /proc/PID/task/TID, open
    Raises PermissionError.
    """
    try:
        with open(os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=task), encoding="utf-8", errors="replace") as maps:
            lines = maps.readlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not lines:
        return None
    found = NONE
    mapping = None
    shared = []
    for row in map(_row, lines):
        if row.inode != memory.inode or row.device != memory.device:
            continue
        if row.flags[3] == "s":
            shared.append((row.offset, row.offset + row.end - row.start))
            if row.flags[1] == "w":
                mapping = mapping or row
        found = PRIVATE if row.flags[3] == "p" and found != READ_ONLY else READ_ONLY
    has_all = _reach(shared) >= memory.status.st_size
    if mapping is not None:
        return Holding(WRITES, mapping, has_all)
    # A mapping to read and a descriptor to write with go together; a private mapping is where the writes go.
    if found != PRIVATE:
        if (opened := _opened(task, memory)) == WRITES:
            return Holding(WRITES, None, has_all)
        found = opened if found == NONE else found
    return Holding(found, None, has_all)


def _reach(spans: list[tuple[int, int]]) -> int:
    """How far spans of a file reach without a gap."""
    reach = 0
    for first, stop in sorted(spans):
        if first > reach:
            break
        reach = max(reach, stop)
    return reach


def maps_at(maps: int, mapping: Row) -> bool | None:
    """Whether a mapping is as it was, or larger; None if the kernel cannot say.

    maps: /proc/PID/maps, open; that of a process that has executed another program since has nothing any more
    """
    query = bytearray(_QUERY.pack(_QUERY.size, 0, mapping.start, *[0] * 12))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None
    _, _, _, start, end, flags, _, offset, inode, *device = _QUERY.unpack(query)[:11]
    return (
        bool(flags & _SHARED)
        and (inode, tuple(device)) == (mapping.inode, mapping.device)
        and end >= mapping.end
        and offset + mapping.start - start == mapping.offset
    )


def _row(line: str) -> Row:
    area, flags, offset, device, inode = line.split(maxsplit=5)[:5]
    start, _, end = area.partition("-")
    major, _, minor = device.partition(":")
    return Row(int(start, 16), int(end, 16), flags, int(offset, 16), (int(major, 16), int(minor, 16)), int(inode))


def _opened(task: int, memory: FileIdentity) -> str:
    """How a process has the file open."""
    found = NONE
    directory = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=task)
    try:
        for number in os.listdir(directory):
            with suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile
                if not os.path.samestat(os.stat(number, dir_fd=directory), memory.status):
                    continue
                # The owner's bits of the link say how it was opened.
                if os.stat(number, dir_fd=directory, follow_symlinks=False).st_mode & 0o200:
                    return WRITES
                found = READ_ONLY
    finally:
        os.close(directory)
    return found
