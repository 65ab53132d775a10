"""The two files of a takeover: the image, where the warm copy was, and the device state (specs/store.md §6.3)."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding, keep_room, replace_file
from remus_ckpt.errors import RemusError
from remus_ckpt.store.chain import Chain
from remus_ckpt.store.history import History
from remus_ckpt.store.segments import first_epoch_of
from remus_ckpt.store.state import StateFile
from remus_ckpt.store.warm import MemoryPlace
from remus_ckpt.wire.record import Position

SPARE = "hand-over.spare"
_SPARE_BYTES = 64 << 10
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class HandOver:
    """Hands out a checkpoint once per term; store.json says which one. The caller holds the writer's lock.

    directory: of the warm copy, on disk; memory: for images that are handed out in memory
    """

    def __init__(self, directory: Path, state: StateFile, history: History, memory: MemoryPlace | None) -> None:
        self._directory, self._state, self._history, self._memory = directory, state, history, memory
        self._spare_bytes = 0  # room reserved for the next device state

    def is_of(self, chain: Chain) -> bool:
        """Whether a checkpoint of this chain has been handed out.

        Nothing is acknowledged in a segment after the checkpoint that was handed out. But a checkpoint that was refused
        because the disk failed may still be there, and be found when the history is reopened.
        """
        epoch = self._epoch
        return epoch is not None and first_epoch_of(chain.path.name) <= epoch

    def is_at(self, position: Position | None) -> bool:
        """Whether exactly this position has been handed out."""
        return self._given.get("position") == str(position)

    def position(self, newest: Position | None) -> Position | None:
        """The position that was handed out: `newest` or an earlier one. None if nothing was, or if it is unknown."""
        if self.is_at(newest):
            return newest
        with suppress(RemusError):
            if (epoch := self._epoch) is not None and self.is_at(found := self._history.find(epoch).position):
                return found
        return None

    def give(self, chain: Chain, position: Position) -> tuple[Path, Path]:
        """The image and the device state of this position, unless some were given before: then those. Nothing may
        follow in this stream.

        Raises StoreError.
        """
        state = self._state.state
        name = f"taken-over-{state.term}.image"
        directories = [self._directory] if self._memory is None else [self._memory.directory, self._directory]
        image = next((path / name for path in directories if (path / name).exists()), self._directory / name)
        device_state = (self._directory / name).with_suffix(".state")
        with guarding(_BOOT_ID):
            boot = _boot_id()
        # These files are in use, whatever the newest checkpoint is now. But a crash of the machine may have torn them.
        if self._given.get("boot") == boot and image.exists() and device_state.exists():
            return image, device_state
        checkpoint = chain.restorer.in_force
        assert checkpoint is not None
        with guarding(self._directory, "warm copy"):
            for path in itertools.chain.from_iterable(one.glob("taken-over-*") for one in directories):
                path.unlink()
            self._spare_bytes = 0  # even if this fails: it may have used up the spare
            replace_file(device_state, checkpoint.device_state, self._directory / SPARE)
        chain.is_sealed = True
        made = {"position": str(position), "boot": boot}
        self._state.save(replace(state, more={**state.more, "handed_out": made}))
        image = self._directory / name
        if not chain.home.is_handed_out:
            image = chain.home.hand_out(image, checkpoint.memory_bytes)
        else:  # and the file has been removed since
            with suppress(OSError):
                if self._memory is not None and not self._memory.why_not(checkpoint.memory_bytes):
                    self._memory.make()
                    image = self._memory.directory / name
            self._history.restore_image(image, position.epoch, written="warm copy")
        self.keep_room(checkpoint.device_state)
        return image, device_state

    def keep_room(self, device_state: bytes) -> None:
        """Reserve room for this device state if the disk has any, so that a full disk cannot prevent a takeover from
        this checkpoint."""
        if (size := max(len(device_state), _SPARE_BYTES)) > self._spare_bytes:
            with suppress(OSError):
                keep_room(self._directory / SPARE, size)
                self._spare_bytes = size

    @property
    def _given(self) -> dict[str, Any]:
        return self._state.state.more.get("handed_out") or {}

    @property
    def _epoch(self) -> int | None:
        """The epoch of the position that was given, if that is valid."""
        epoch = self._given.get("position", "").partition(":")[0]
        return int(epoch) if epoch.isascii() and epoch.isdigit() and len(epoch) < 20 else None


def _boot_id() -> str:
    """An identifier that changes at each boot: files not synced before may be torn. Raises OSError."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
