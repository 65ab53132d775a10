"""Who has the memory of a file, and how: by mappings and by descriptors.

Source: Linux, Documentation/filesystems/proc.rst: /proc/PID/maps, and PROCMAP_QUERY, which kernels from 6.11 on have.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from remus_ckpt.errors import SourceError

_QUERY = struct.Struct("<9Q4I2Q")
"""size, query flags, address; start, end, flags, page size, offset, inode, device of the mapping; names."""
_PROCMAP_QUERY = 0xC0686611
_SHARED = 8

WRITES, PRIVATE, READ_ONLY, NONE = "writes", "private", "read-only", "none"
"""How a process has a file: it can write to it, its writes stay its own, it can only read it, not at all."""

FAULTS = {
    PRIVATE: "has {path} mapped private (MAP_PRIVATE), so that nothing it writes there reaches the file: "
    "let it map the file shared",
    READ_ONLY: "has {path} mapped or open read-only, and cannot write to it: name those that do",
    NONE: "has {path} neither mapped nor open: name those that write to it",
}
"""What is wrong with one that cannot write to it, and what to do."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a file, as mappings of it are listed.

    path: for messages
    status: of the open file
    device, inode: as the kernel lists mappings of it, which on some file systems is not what stat() says
    """

    path: str
    status: os.stat_result
    device: tuple[int, int]
    inode: int

    @classmethod
    def of(cls, path: str, fd: int) -> Memory:
        """That of an open file, which must not be empty. Raises OSError if it cannot be mapped."""
        status = os.fstat(fd)
        with mmap.mmap(fd, status.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as area:
            address = np.frombuffer(area, dtype=np.uint8).ctypes.data
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                for line in maps:
                    start, _, device, inode = _row(line)
                    if start == address:
                        return cls(path, status, device, inode)
        raise SourceError(f"{path}: its mapping is not in /proc/self/maps")


@dataclass(frozen=True, slots=True)
class Holding:
    """How one process has it, and the address of the mapping that it can write to, if it has one."""

    how: str
    address: int | None = None


def holding(task: int, memory: Memory) -> Holding | None:
    """How a process has some memory; None if this thread has no memory at all: it is about to end, or has ended.

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
    for line in lines:
        start, flags, device, inode = _row(line)
        if inode != memory.inode or device != memory.device:
            continue
        if flags[3] == "s" and flags[1] == "w":
            return Holding(WRITES, start)
        found = PRIVATE if flags[3] == "p" and found != READ_ONLY else READ_ONLY
    # A mapping to read and a descriptor to write with go together; a private mapping is where the writes go.
    if found != PRIVATE:
        if (opened := _opened(task, memory)) == WRITES:
            return Holding(WRITES)
        found = opened if found == NONE else found
    return Holding(found)


def maps_at(maps: int, address: int, memory: Memory) -> bool | None:
    """Whether the memory is mapped shared at an address; None where the kernel cannot say.

    maps: /proc/PID/maps, open; that of a process that has executed another program since has nothing any more
    """
    query = bytearray(_QUERY.pack(_QUERY.size, 0, address, *[0] * 12))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None
    row = _QUERY.unpack(query)
    return bool(row[5] & _SHARED) and row[8] == memory.inode and row[9:11] == memory.device


def _row(line: str) -> tuple[int, str, tuple[int, int], int]:
    """Start, flags, device and inode in a line of /proc/PID/maps."""
    area, flags, _, device, inode = line.split(maxsplit=5)[:5]
    major, _, minor = device.partition(":")
    return int(area.partition("-")[0], 16), flags, (int(major, 16), int(minor, 16)), int(inode)


def _opened(task: int, memory: Memory) -> str:
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
