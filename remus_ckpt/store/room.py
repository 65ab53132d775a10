"""Room for a full copy: what it needs on disk, and what is free there (specs/session.md §3.3.1). No decision."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from remus_ckpt.disk import free_bytes, guarding

_EXTRA_SHARE = 64
"""One byte in this many for what a stream adds to its pages."""
_EXTRA_BYTES = 64 << 10
"""For the index and store.json."""


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


def room_for_base(data_bytes: int, segments: Path, warm: Path) -> Room:
    """The room for a base of so many bytes of pages: they go into a segment and into the warm copy, while the old ones
    of both stay.

    segments, warm: the directories, which need not exist yet
    Raises StoreError. May wait for the disk.
    """
    stream_bytes = data_bytes + data_bytes // _EXTRA_SHARE + _EXTRA_BYTES
    rooms: dict[int, Room] = {}
    for path, needed in ((segments, stream_bytes), (warm, data_bytes)):
        place = path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        with guarding(place):
            device = os.stat(place).st_dev
            found = rooms.get(device)
            rooms[device] = Room(str(place), needed + (found.needed_bytes if found else 0), free_bytes(place))
    return min(rooms.values(), key=lambda room: room.free_bytes - room.needed_bytes)
