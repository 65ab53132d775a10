"""How much link and disk a memory needs, worked out from a recording of it.

For each interval that is considered, the recording's checkpoints are joined: pages that changed several times within an
interval are sent once, and what is sent is encoded against what the interval before has left. The bytes are those of a
real stream, made by the sender.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import RemusError
from remus_ckpt.files import read_checkpoints
from remus_ckpt.limits import Limits
from remus_ckpt.pages import batches
from remus_ckpt.recording import Recording, read_recording
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.sender import Sender
from remus_ckpt.store.compaction import COMPACT_BYTES, COMPACT_CHECKPOINTS
from remus_ckpt.wire.xen.dialect import StreamCodec

USUAL_S = (0.025, 0.1, 0.25, 1.0, 5.0, 30.0)
"""The intervals that are considered unless others are named, and if the recording has several of each."""
_LEAST_CHECKPOINTS = 4


@dataclass(frozen=True, slots=True)
class Need:
    """What checkpoints at one interval need, after the first copy.

    interval_s: between two checkpoints; seconds: that the figures cover
    pages, sizes: of each checkpoint: pages sent, and bytes of stream
    """

    interval_s: float
    seconds: float
    pages: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def bytes_s(self) -> float:
        """Bytes a second on the link, before compression there, and on the disk."""
        return float(self.sizes.sum()) / self.seconds

    def sent_in_s(self, link_bytes_s: float, percent: float = 99) -> float:
        """How long a link of that speed needs for a checkpoint, as a percentile over the checkpoints."""
        return float(np.percentile(self.sizes, percent)) / link_bytes_s

    def keeps_up(self, link_bytes_s: float) -> bool:
        """Whether 99 of 100 checkpoints are sent before the next one is due, and all of them on average."""
        return self.sent_in_s(link_bytes_s) <= self.interval_s and self.bytes_s <= link_bytes_s

    def stored_bytes(self, age_s: float, base_bytes: int) -> int:
        """About how many bytes a store holds that keeps checkpoints for this long.

        base_bytes: of a full copy. A store begins a new segment with one when the deltas behind the last one outgrow it
        (specs/store.md §7), keeps whole segments, and needs room for one more while it makes it.
        """
        deltas = self.bytes_s * age_s
        per_segment = min(max(base_bytes, COMPACT_BYTES), self.bytes_s * self.interval_s * COMPACT_CHECKPOINTS) or 1
        segments = math.ceil(deltas / per_segment) + 2
        return math.ceil(deltas + per_segment + segments * base_bytes)


def plan(
    path: str | Path,
    intervals_s: Iterable[float] | None = None,
    *,
    codec: StreamCodec | None = None,
    limits: Limits | None = None,
) -> tuple[Recording, list[Need]]:
    """Work out what a memory needs.

    path: a stream that `record` or `export` has made. It is read once, and once for each interval
    intervals_s: to consider; by default the recording's own, and the usual ones that are longer
    codec: to encode with; by default that of the recording
    Raises StreamError, OSError, and RemusError if the recording says too little: no times, or too few checkpoints.
    """
    recording = read_recording(path, limits=limits)
    if (untold := next((at for at, time in enumerate(recording.times_ns) if time is None), None)) is not None:
        epoch = recording.epochs[untold]
        raise RemusError(f"{path}: checkpoint {epoch} has no time: only a recording made by `record` can be planned")
    if recording.checkpoints < _LEAST_CHECKPOINTS:
        raise RemusError(
            f"{path}: too few checkpoints ({recording.checkpoints}): record {_LEAST_CHECKPOINTS} or more, "
            "ideally for a minute"
        )
    seconds, own_s = recording.seconds, recording.interval_s
    if seconds <= 0 or own_s <= 0:
        raise RemusError(f"{path}: the times of its checkpoints do not ascend")
    found_codec: StreamCodec = recording.codec  # type: ignore[assignment]
    if intervals_s is None:
        wanted = [own_s, *(usual for usual in USUAL_S if own_s * 1.5 < usual <= seconds / _LEAST_CHECKPOINTS)]
    else:
        wanted = sorted(set(intervals_s))
    for interval_s in wanted:
        if not own_s * 0.99 <= interval_s <= seconds:
            raise RemusError(
                f"{path}: a recording of {seconds:g} s every {own_s:g} s cannot show an interval of {interval_s:g} s"
            )
    return recording, [_need(path, interval_s, own_s, codec or found_codec, limits) for interval_s in wanted]


def _need(path: str | Path, interval_s: float, own_s: float, codec: StreamCodec, limits: Limits | None) -> Need:
    pages, sizes = [], []
    began = ended = 0
    sender: Sender | None = None
    for checkpoint, dirty, time_ns in _joined(read_checkpoints(path, limits=limits), interval_s, own_s):
        if sender is None:
            began = time_ns
            sender = Sender(len(checkpoint.memory), codec=codec)
        for _ in sender.checkpoint(batches(dirty, checkpoint.memory[dirty]), time_ns=time_ns):
            pass
        assert sender.sent is not None
        pages.append(sender.sent.pages)
        sizes.append(sender.sent.stream_bytes)
        ended = time_ns
    # The first is the full copy, which is reported separately.
    return Need(interval_s, max((ended - began) / 1e9, interval_s), np.array(pages[1:]), np.array(sizes[1:]))


def _joined(
    checkpoints: Iterable[Checkpoint], interval_s: float, own_s: float
) -> Iterator[tuple[Checkpoint, NDArray[np.int64], int]]:
    """The checkpoints that an interval leaves: each with the pages that changed since the one before, and its time."""
    least_ns = (interval_s - own_s / 2) * 1e9
    last_ns = None
    dirty: list[NDArray[np.int64]] = []
    for checkpoint in checkpoints:
        assert checkpoint.record is not None and checkpoint.record.time_ns is not None
        time_ns = checkpoint.record.time_ns
        dirty.append(checkpoint.pfns.astype(np.int64))
        if last_ns is None or time_ns - last_ns >= least_ns:
            yield checkpoint, np.unique(np.concatenate(dirty)), time_ns
            last_ns = time_ns
            dirty = []
