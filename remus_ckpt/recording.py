"""What a recorded stream holds, in figures: for `plan`, and for the report that `inspect --html` writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import CODECS, get_codec
from remus_ckpt.codec.scan import scatter
from remus_ckpt.files import read_checkpoints
from remus_ckpt.limits import Limits
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Pages, by_part
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.wire.xen.dialect import Dialect

COLUMNS = 300
"""At most twice as many are kept of the heat map, however long the recording is."""


@dataclass(slots=True)
class Recording:
    """What was recorded. The lists have an entry for each checkpoint.

    times_ns: when it was taken, None where the stream does not say
    sizes: bytes of stream; pages: that it carries
    memory_bytes: of all memory
    codec: of the stream, None where it has no checkpoint of ours
    encoded: what the pages after the first copy take in each coding, each page against what it was before: bytes,
        without the stream around them
    columns: int64[n, PARTS], pages by the part of memory that they lie in; each of so many checkpoints, the last of
        fewer; the first copy is not in it
    """

    epochs: list[int] = field(default_factory=list)
    times_ns: list[int | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    memory_bytes: int = 0
    codec: str | None = None
    encoded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CODECS, 0))
    columns: list[NDArray[np.int64]] = field(default_factory=list)
    checkpoints_per_column: int = 1

    @property
    def checkpoints(self) -> int:
        """How many there are."""
        return len(self.epochs)

    @property
    def seconds(self) -> float:
        """From the first checkpoint to the last; 0 if the stream has no times, or a clock was put back between them."""
        first, last = (self.times_ns[0], self.times_ns[-1]) if self.times_ns else (None, None)
        return 0.0 if first is None or last is None else max(last - first, 0) / 1e9

    @property
    def interval_s(self) -> float:
        """Between two checkpoints, the median; 0 if the stream has no times."""
        times = [time for time in self.times_ns if time is not None]
        return float(np.median(np.diff(times))) / 1e9 if len(times) == self.checkpoints > 1 else 0.0

    @property
    def first_copy_bytes(self) -> int:
        """Of stream, for the first checkpoint."""
        return self.sizes[0] if self.sizes else 0

    @property
    def changed_bytes(self) -> int:
        """Bytes of the pages after the first copy."""
        return sum(self.pages[1:]) * PAGE_SIZE

    def _add(self, checkpoint: Checkpoint) -> None:
        self.epochs.append(checkpoint.epoch)
        self.times_ns.append(None if checkpoint.record is None else checkpoint.record.time_ns)
        self.sizes.append(checkpoint.end - checkpoint.start)
        self.pages.append(len(checkpoint.pfns))
        self.memory_bytes = checkpoint.memory_bytes
        if checkpoint.record is not None:
            self.codec = checkpoint.record.codec

    def add_column(self, counts: NDArray[np.int64]) -> None:
        if (self.checkpoints - 2) % self.checkpoints_per_column:
            self.columns[-1] += counts
            return
        if len(self.columns) == 2 * COLUMNS:
            self.columns = [one + other for one, other in zip(self.columns[::2], self.columns[1::2], strict=True)]
            self.checkpoints_per_column *= 2
        self.columns.append(counts)


def read_recording(path: str | Path, *, dialect: Dialect | None = None, limits: Limits | None = None) -> Recording:
    """Read a stream once, with two copies of its memory.

    Raises StreamError after the last good checkpoint, OSError.
    """
    found = Recording()
    reference: Pages | None = None
    for checkpoint in read_checkpoints(path, dialect=dialect, limits=limits):
        found._add(checkpoint)
        pfns, memory = checkpoint.pfns, checkpoint.memory
        if reference is None:
            reference = zeros(len(memory))
        else:
            for name in CODECS:
                codec = get_codec(name)
                encoded = codec.encode(memory, reference, index=pfns, reference_index=pfns, update=False)
                found.encoded[name] += len(encoded)
            found.add_column(by_part(pfns, len(memory)))
        scatter(memory[pfns], reference, pfns)
    return found
