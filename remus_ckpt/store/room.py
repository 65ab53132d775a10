"""Room for a full copy: what it needs on disk and in memory, and what is free there (specs/session.md §3.3.1). No
decision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from remus_ckpt.disk import free_bytes, guarding
from remus_ckpt.limits import MIB

_EXTRA_SHARE = 64
"""One byte in this many for what a stream adds to its pages."""
_EXTRA_BYTES = 64 << 10
"""For the index and store.json."""
SHARED_MEMORY = Path("/dev/shm")
"""A tmpfs, on every Linux."""
_LEFT_SHARE, _LEFT_BYTES = 16, 256 * MIB
"""So much memory, one byte in so many or the fixed number, is left to the rest of the machine."""
_CGROUPS = Path("/sys/fs/cgroup")
_LINE = re.compile(r"(\S+(?: \d+ \S+)?):?\s+(\d+)(?: kB)?")


@dataclass(frozen=True, slots=True)
class Room:
    """What a full copy needs at least, and what is free where it would lie.

    where: a directory in the file system that is fullest
    free_bytes: without the blocks that are reserved for root
    """

    where: str
    needed_bytes: int
    free_bytes: int

    @property
    def is_enough(self) -> bool:
        """Whether it may fit."""
        return self.free_bytes >= self.needed_bytes


def room_for_base(data_bytes: int, segments: Path, warm: Path, ahead_bytes: int = 0) -> Room:
    """The room for a base of so many bytes of pages: they go into a segment and into the warm copy, while the old ones
    of both stay.

    segments, warm: the directories, which need not exist yet
    ahead_bytes: space written ahead in the segments, which a full copy gives back
    Raises StoreError. May wait for the disk.
    """
    stream_bytes = data_bytes + data_bytes // _EXTRA_SHARE + _EXTRA_BYTES
    rooms: dict[int, Room] = {}
    for path, needed, more in ((segments, stream_bytes, ahead_bytes), (warm, data_bytes, 0)):
        place = path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        with guarding(place):
            device = os.stat(place).st_dev
            found = rooms.get(device)
            if found is not None:
                needed, more = needed + found.needed_bytes, found.free_bytes - free_bytes(place)
            rooms[device] = Room(str(place), needed, free_bytes(place) + more)
    return min(rooms.values(), key=lambda room: room.free_bytes - room.needed_bytes)


def free_memory() -> int:
    """Bytes of memory that a warm copy may take: less than what is available, to this process and in /dev/shm. 0 if it
    is not known."""
    total, available = _of_machine()
    with suppress(OSError):
        available = min([available, free_bytes(SHARED_MEMORY), *_of_cgroups()])
        return max(available - max(total // _LEFT_SHARE, _LEFT_BYTES), 0)
    return 0


def _of_machine() -> tuple[int, int]:
    """Memory of the machine, and what is available of it."""
    found = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in found:
        return found["MemTotal"] << 10, found["MemAvailable"] << 10
    # A service may not see it (ProcSubset=pid): then what each node has, and what it has read from files.
    total = available = 0
    for path in Path("/sys/devices/system/node").glob("node*/meminfo"):
        node = {key.rpartition(" ")[2]: value << 10 for key, value in _numbers(path).items()}
        total += node.get("MemTotal", 0)
        available += node.get("MemFree", 0) + node.get("Inactive(file)", 0)
    return total, available


def _of_cgroups() -> Iterator[int]:
    """What is left in each cgroup of this process that has a limit."""
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        line = next((line for line in lines if line.startswith("0::")), "0::/")
        path = _CGROUPS / line[3:].lstrip("/")
        while path != _CGROUPS and _CGROUPS in path.parents:
            with suppress(OSError, ValueError):
                most = int((path / "memory.max").read_text())  # a ValueError is "max"
                used = int((path / "memory.current").read_text())
                yield most - used + _numbers(path / "memory.stat").get("inactive_file", 0)
            path = path.parent


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file of the kernel, each a name and a number."""
    with suppress(OSError):
        lines = map(_LINE.fullmatch, path.read_text().splitlines())
        return {line[1].rstrip(":"): int(line[2]) for line in lines if line is not None}
    return {}
