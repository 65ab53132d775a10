"""The directories of a history, locked by its writer, and the file names in them (specs/store.md §2)."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from remus_ckpt.disk import guarding, make_directory, sync_directory, sync_files, sync_names_above
from remus_ckpt.errors import StoreError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.store import segments
from remus_ckpt.store.hand_over import SPARE
from remus_ckpt.store.room import SHARED_MEMORY, Room, room_for_base
from remus_ckpt.store.segments import PARTIAL, list_segments, segment_name, sequence_of
from remus_ckpt.store.warm import MappedFile, MemoryPlace, WarmCopy

LOCK = "lock"
WARM = "warm"


class HistoryDirectory:
    """The directories of a history and of its warm copy: no one else writes there from `take` to `release`.

    warm_directory: holds the warm copy, in a directory of the history's name; None: the history itself holds it
    in_memory: the warm copy is in memory if there is room
    """

    def __init__(self, path: Path, name: str, warm_directory: Path | None, *, in_memory: bool = False) -> None:
        self.path = path
        self.segments = path / segments.DIRECTORY
        self.warm = path / WARM if warm_directory is None else warm_directory / name
        self.memory = MemoryPlace(path, name) if in_memory else None
        self._warm_number = 0
        self._held: list[int] = []  # descriptors that hold our locks
        disown_in_forks(self)

    def take(self) -> None:
        """Create and lock the directories. Raises StoreError if that fails or another writer holds them; call
        `release` in any case."""
        with guarding(self.path):
            make_directory(self.path)
            make_directory(self.segments)
        self._take_lock(self.path / LOCK, os.O_RDWR | os.O_CREAT, self.path)
        with guarding(self.warm, "warm copy"):
            make_directory(self.warm)
        # The warm directory may be shared with the histories of another store.
        self._take_lock(self.warm, os.O_RDONLY | os.O_DIRECTORY, self.warm)

    def _take_lock(self, path: Path, flags: int, what: Path) -> None:
        with guarding(path):
            self._held.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
            try:
                fcntl.flock(self._held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"{what} is in use: a running backup writes to it, and compacts and prunes by itself"
                ) from None

    @property
    def is_held(self) -> bool:
        """Whether we hold the locks."""
        return bool(self._held)

    def release(self) -> None:
        """Release the locks. May be called again."""
        while self._held:
            with suppress(OSError):
                os.close(self._held.pop())

    def disown(self) -> None:
        """In a forked child: the locks belong to the parent."""
        self.release()

    def remove(self) -> None:
        """Remove the history with everything in it. Raises StoreError."""
        with guarding(self.warm):
            for path in [*self.warm.glob("memory-*.image"), self.warm / SPARE]:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # another store may have left something there
                self.warm.rmdir()
        if self.memory is not None:
            with guarding(self.memory.directory):
                for path in self.memory.directory.glob("taken-over-*"):
                    path.unlink(missing_ok=True)
            self.memory.remove()
        with guarding(self.path):
            shutil.rmtree(self.path)

    def clean(self) -> None:
        """Remove partly written files, and warm copies, before anything else is done. Raises StoreError."""
        patterns = [(self.path, ".store.json.*"), (self.segments, f"*{PARTIAL}")]
        for where in [self.warm] if self.memory is None else [self.warm, self.memory.directory]:
            patterns += [(where, ".taken-over-*"), (where, "memory-*.image")]
        for where, pattern in patterns:
            for path in where.glob(pattern):
                with guarding(path):
                    path.unlink(missing_ok=True)

    def cut(self, lengths: dict[str, int]) -> None:
        """Cut these segments to these lengths. Raises StoreError."""
        for name, length in lengths.items():
            with guarding(self.segments / name):
                os.truncate(self.segments / name, length)

    def sync(self) -> None:
        """Sync everything but the contents of the newest segment. Raises StoreError.

        An earlier writer may have died before its writes, renames and removals were durable; or the files are a copy.
        """
        with guarding(self.path):
            sync_directory(self.segments)
            sync_names_above(self.segments)
        sync_files(self.segments, list_segments(self.path)[:-1])

    def new_home(self) -> MappedFile:
        """Create a file for a warm copy. Raises StoreError."""
        self._warm_number += 1
        path = self.warm / f"memory-{self._warm_number}.image"
        return MappedFile(path) if self.memory is None else WarmCopy(path, self.memory)

    def room_for_base(self, data_bytes: int, ahead_bytes: int) -> Room:
        """The room for a full copy with this many bytes of pages; `ahead_bytes` of the segments are freed for it.
        Raises StoreError."""
        is_on_disk = self.memory is None or self.memory.why_not(data_bytes) is not None
        return room_for_base(data_bytes, self.segments, self.warm if is_on_disk else SHARED_MEMORY, ahead_bytes)

    def partial(self, kind: str) -> Path:
        """The path of an unfinished segment, of the kind "incoming" or "compacted"."""
        return self.segments / f"{kind}-{self._next_sequence():06}{PARTIAL}"

    def segment(self, first_epoch: int) -> Path:
        """The path for a segment newer than all existing ones. Raises StoreError if the numbers are used up."""
        return self.segments / segment_name(first_epoch, self._next_sequence())

    def _next_sequence(self) -> int:
        names = list_segments(self.path)
        return sequence_of(names[-1]) + 1 if names else 0
