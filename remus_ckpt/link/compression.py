"""The second stage: whether data for a link are compressed once more, after the page codec."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from remus_ckpt.pages import Buffer
from remus_ckpt.session.frames import Packing
from remus_ckpt.session.messages import Compression

_SAMPLE_BYTES = 1 << 18
_SAMPLE_EVERY_BYTES = 32 << 20
_SMALL_BYTES = 4096
_MARGIN = 0.8
"""Compression must promise a fifth less time before it is adopted, so that the choice does not flip back and forth."""
_RATES = 8
"""Of this many measurements the fastest counts: the others waited for a processor or a disk."""
_ALLOWANCE_S = 0.003
"""How much of an answer's time may be both sides' own work. If that is all of it, compression gains nothing."""


def measure_with(packing: Packing) -> Callable[[memoryview, Compression], tuple[float, float]]:
    """What a `Chooser` measures samples with."""

    def measure(sample: memoryview, name: Compression) -> tuple[float, float]:
        begin = time.perf_counter()
        size = len(packing.compress(sample, name))
        seconds = time.perf_counter() - begin
        return len(sample) / max(seconds, 1e-9), size / len(sample)

    return measure


class Chooser:
    """Chooses the compression for one session.

    wanted: "none", "lz4", "zstd", or "auto": whichever delivers the bytes soonest, by measurements of the link (time
        from a checkpoint's last write to the message that it was received) and of the data (a sample)
    offered: what the other side can decompress
    measure: compresses a sample; returns bytes/s in, and bytes out per byte in
    The sending thread calls `look` and `choose`, the listening thread calls `received`.
    """

    def __init__(
        self,
        wanted: str,
        offered: Sequence[str],
        *,
        measure: Callable[[memoryview, Compression], tuple[float, float]] | None = None,
    ) -> None:
        # Written by the listening thread, only read by the other:
        self._rates: deque[float] = deque(maxlen=_RATES)  # bytes/s of the link
        self._round_trip_s = float("inf")
        # Owned by the sending thread:
        self._choice: Compression = "none"
        self._candidates: list[Compression] = []
        if wanted == "auto":
            self._candidates = [name for name in ("lz4", "zstd") if name in offered]
        elif wanted in offered:
            self._choice = wanted  # type: ignore[assignment]
        self._measure = measure or measure_with(Packing())
        self._gains: dict[Compression, tuple[float, float]] = {}
        self._until_sample = 0

    def look(self, buffers: Sequence[Buffer]) -> None:
        """Examine bytes that are about to be sent: now and then, a sample is compressed."""
        if not self._candidates:
            return
        largest = max(buffers, key=len, default=b"")
        self._until_sample -= sum(len(buffer) for buffer in buffers)
        if self._until_sample > 0 or len(largest) < _SMALL_BYTES:
            return
        self._until_sample = _SAMPLE_EVERY_BYTES
        sample = memoryview(largest).cast("B")[:_SAMPLE_BYTES]
        for name in self._candidates:
            self._gains[name] = self._measure(sample, name)

    def received(self, wire_bytes: int, seconds: float) -> None:
        """The other side has reported that it received these bytes; seconds: since the write began"""
        if wire_bytes < _SMALL_BYTES:
            self._round_trip_s = min(self._round_trip_s, seconds)
            return
        if wire_bytes < 16 * _SMALL_BYTES:
            return
        round_trip_s = self._round_trip_s if self._round_trip_s < seconds else 0.0
        self._rates.append(wire_bytes / max(seconds - max(round_trip_s, _ALLOWANCE_S), 1e-6))

    def choose(self) -> Compression:
        """The compression for what is sent next."""
        rates = tuple(self._rates)
        if not rates or not self._candidates:
            return self._choice
        rate = max(rates)
        # Seconds per byte. Compressing and sending do not overlap here.
        costs = {name: 1 / speed + ratio / rate for name, (speed, ratio) in self._gains.items()}
        best = min(costs, key=lambda name: costs[name], default=None)
        plain = 1 / rate
        if best is not None and costs[best] < plain * (1.0 if self._choice == best else _MARGIN):
            self._choice = best
        else:
            self._choice = "none"
        return self._choice
