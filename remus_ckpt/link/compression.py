"""The second stage: whether to compress data for a link once more, after the page codec."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from remus_ckpt.pages import Buffer
from remus_ckpt.session.frames import Packing
from remus_ckpt.session.messages import Compression
from remus_ckpt.stages import Seen, decide

_SAMPLE_BYTES = 1 << 18
_SAMPLE_EVERY_BYTES = 32 << 20
_SMALL_BYTES = 4096
_RATES = 8
"""The fastest of this many measurements counts: the others waited for a processor or a disk."""
_ALLOWANCE_S = 0.003
_WORK_S, _LONG_BYTES, _LONG_WORK_S = 3e-9, 16 << 20, 50e-9
"""How much of an answer's time may be both sides' own work: in all, for each byte, and for each byte of a first copy,
which waits for fresh memory and for a disk. If that is all of it, compression gains nothing."""


def measure_with(packing: Packing) -> Callable[[memoryview, Compression], tuple[float, float]]:
    """The function with which a `Chooser` measures samples."""

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
        self.reasons: tuple[str, ...] = ("told so",)
        """The reason for the choice, in words."""
        self.choice: Compression = "none"
        """What was chosen last."""
        self._candidates: list[Compression] = []
        if wanted == "auto":
            self._candidates = [name for name in ("lz4", "zstd") if name in offered]
            self.reasons = ("no link was measured",) if self._candidates else ("the other side has no compression",)
        elif wanted in offered:
            self.choice = wanted  # type: ignore[assignment]
        self._measure = measure or measure_with(Packing())
        self._gains: dict[str, tuple[float, float]] = {}
        self._until_sample = 0
        self._samples = 0
        self._measured: tuple[float, int] | None = None  # what the choice was made from

    def look(self, buffers: Sequence[Buffer]) -> None:
        """Examine bytes that are about to be sent: now and then, a sample is compressed."""
        if not self._candidates:
            return
        largest = max(buffers, key=len, default=b"")
        self._until_sample -= sum(len(buffer) for buffer in buffers)
        if self._until_sample > 0 or len(largest) < _SMALL_BYTES:
            return
        self._until_sample = _SAMPLE_EVERY_BYTES
        self._samples += 1
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
        work_s = wire_bytes * (_WORK_S if wire_bytes <= _LONG_BYTES else _LONG_WORK_S)
        self._rates.append(wire_bytes / max(seconds - max(round_trip_s, _ALLOWANCE_S) - work_s, 1e-6))

    def choose(self) -> Compression:
        """The compression for what is sent next."""
        if not self._candidates:
            return self.choice
        rates = tuple(self._rates)
        if rates and (measured := (max(rates), self._samples)) != self._measured:
            self._measured = measured
            seen = Seen(link_bytes_s=measured[0], gains=self._gains, compression=self.choice)
            found = decide(seen)
            self.choice, self.reasons = found.compression, found.reasons  # type: ignore[assignment]
        return self.choice
