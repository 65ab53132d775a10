"""One checkpoint of a history, as a handle: nothing is read until it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.restorer import Checkpoint
from remus_ckpt.source.manifest import arrays_of
from remus_ckpt.store.segments import Entry
from remus_ckpt.wire.record import Position

if TYPE_CHECKING:
    from remus_ckpt.store.history import History


@dataclass(frozen=True, slots=True)
class Stored:
    """A durable checkpoint, such as `open_store("/var/lib/remus")["orders"][-1]`.

    entry: where its bytes are
    """

    history: History
    entry: Entry

    @property
    def epoch(self) -> int:
        """The checkpoint's number."""
        return self.entry.epoch

    @property
    def position(self) -> Position:
        """The checkpoint's number and digest."""
        return self.entry.position

    @property
    def time(self) -> datetime | None:
        """When it was taken, by the primary's clock; None if unknown."""
        time_ns = self.entry.time_ns
        return None if time_ns is None else datetime.fromtimestamp(time_ns / 1e9, UTC)

    def arrays(self) -> dict[str, Any]:
        """What was given to `protect`, by name, as new arrays and DataFrames (see `arrays_of`).

        Raises NoCheckpoint if the checkpoint was not made by `protect`; otherwise like `restore`.
        """
        return arrays_of(self.restore())[0]

    def restore(self, *, into: Mapping[str, Any] | None = None) -> Checkpoint:
        """Restore the checkpoint into the memory of this process, or into existing arrays: see `History.restore`."""
        return self.history.restore(self.epoch, into=into)

    def memory(self) -> NDArray[np.uint8]:
        """Its memory, whose pages are read as they are touched: see `History.memory`."""
        return self.history.memory(self.epoch)

    def save(self, path: str | Path) -> Checkpoint:
        """Save its memory to a file, which appears once it is complete and durable. Raises like `restore`."""
        return self.history.restore_image(path, self.epoch)
