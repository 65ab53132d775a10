"""The checkpoint loop: pause, take the dirty pages, resume, encode, deliver; and again after the interval."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.files import StreamWriter
from remus_ckpt.pages import MAX_BATCH_ENTRIES, PAGE_SIZE, PageBatch, Pages, batches
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.source import Source


@dataclass(frozen=True, slots=True)
class Taken:
    """One checkpoint, as the loop saw it. Times are in seconds."""

    sent: Sent
    dirty_pages: int
    pause_s: float
    """From the order to stop to the order to run on, without what `on_paused` took."""
    blocked_s: float
    """Of the pause: encoding and writing, which only a bounded capture does there."""
    encode_s: float
    """Encoding and writing outside the pause."""


class StopSignal:
    """Says from a signal handler or another thread that a loop shall end."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False

    def set(self) -> None:
        """End the loop after the checkpoint that is being taken."""
        self.is_set = True
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self.fd)


class CheckpointLoop:
    """Takes checkpoints of a source until it is told to stop, its time is over, or nobody is left who writes.

    interval_s: running time of the source between two pauses
    duration_s: how long in all, None for no end
    bounded: hold one page buffer of the capture at most; encoding and writing then happen in the pause
    on_paused: called with the epoch while the source is paused, after the capture
    """

    def __init__(
        self,
        source: Source,
        sender: Sender,
        output: StreamWriter,
        *,
        interval_s: float = 0.025,
        duration_s: float | None = None,
        bounded: bool = False,
        on_paused: Callable[[int], None] | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self._source = source
        self._sender = sender
        self._output = output
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._bounded = bounded
        self._on_paused = on_paused
        self._stop = stop
        self._capture: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        self.ended = ""
        """Why it ended: "stopped", "duration" or "source gone"."""

    def run(self) -> Iterator[Taken]:
        """The checkpoints, each when it has been written.

        Raises SourceError or OSError; the source runs on then, and the output ends with the last whole checkpoint when
        it is closed.
        """
        begin = time.monotonic()
        while True:
            if not self._source.alive():
                self.ended = "source gone"
                return
            yield self._take()
            left = None if self._duration_s is None else begin + self._duration_s - time.monotonic()
            if left is not None and left <= self._interval_s:
                self._wait(left)
                self.ended = self.ended or "duration"
            else:
                self._wait(self._interval_s)
            if self.ended:
                return

    def _wait(self, seconds: float) -> None:
        """Sleep, but wake for a stop and for a death."""
        poll = select.poll()
        deadline = time.monotonic() + seconds
        for fd in self._source.death_fds():
            poll.register(fd, select.POLLIN)
        if self._stop is not None:
            poll.register(self._stop.fd, select.POLLIN)
        # poll() counts in milliseconds: the last fraction of one is slept.
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(int(left * 1000)):
                break
            if left < 0.001:
                time.sleep(left)
        if self._stop is not None and self._stop.is_set:
            self.ended = "stopped"

    def _take(self) -> Taken:
        epoch = 0 if self._sender.position is None else self._sender.position.epoch + 1
        pause = _Pause(self._source, lambda: self._on_paused(epoch) if self._on_paused else None)
        try:
            pause.begin()
            dirty = self._source.dirty()
            if self._bounded:
                scan: Iterator[PageBatch] = self._capture_as_drawn(dirty, pause)
            else:
                scan = batches(dirty, self._source.read(dirty, self._room(len(dirty))))
                pause.end()
            encoding = time.monotonic()
            blocked = 0.0
            # Each group of buffers has been encoded and is written while the scan stands still.
            for group in self._sender.checkpoint(scan, time_ns=time.time_ns()):
                self._output.write(group)
                if pause.is_on:
                    blocked = time.monotonic() - encoding - pause.reading_s
        finally:
            pause.end()
        self._output.commit()
        done = time.monotonic()
        assert self._sender.sent is not None
        return Taken(self._sender.sent, len(dirty), pause.seconds, blocked, done - max(encoding, pause.ended_at))

    def _room(self, pages: int) -> Pages:
        """A buffer for the capture; kept, because fresh memory costs a fault a page."""
        if len(self._capture) < pages:
            self._capture = np.empty((max(pages, 2 * len(self._capture)), PAGE_SIZE), dtype=np.uint8)
        return self._capture

    def _capture_as_drawn(self, dirty: NDArray[np.int64], pause: _Pause) -> Iterator[PageBatch]:
        for start in range(0, len(dirty), MAX_BATCH_ENTRIES):
            part = dirty[start : start + MAX_BATCH_ENTRIES]
            reading = time.monotonic()
            data = self._source.read(part, np.empty((len(part), PAGE_SIZE), dtype=np.uint8))
            pause.reading_s += time.monotonic() - reading
            yield from batches(part, data)
        # Nothing more is drawn: what the last buffer still costs falls outside the pause.
        pause.end()


class Totals:
    """What a recording came to."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.blocked: list[float] = []
        self.last = 0
        self.dirty_pages = 0
        self.changed_pages = 0
        self.changed_bytes = 0
        self.stream_bytes = 0

    def add(self, taken: Taken) -> None:
        """Take in one checkpoint."""
        self.pauses.append(taken.pause_s)
        self.blocked.append(taken.blocked_s)
        self.last = taken.sent.epoch
        self.dirty_pages += taken.dirty_pages
        self.stream_bytes += taken.sent.stream_bytes
        if taken.sent.compressed_chunks:
            self.changed_pages += taken.sent.pages
            self.changed_bytes += taken.sent.compressed_bytes

    def pause_ms(self, percent: float) -> float:
        """A percentile of the pauses."""
        return float(np.percentile(self.pauses, percent)) * 1e3 if self.pauses else 0.0

    def ratio(self) -> float | None:
        """Compressed bytes to raw bytes, over the compressed checkpoints."""
        return self.changed_bytes / (self.changed_pages * PAGE_SIZE) if self.changed_pages else None

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checkpoints": len(self.pauses),
            "dirty_pages": self.dirty_pages,
            "raw_bytes": self.changed_pages * PAGE_SIZE,
            "compressed_bytes": self.changed_bytes,
            "stream_bytes": self.stream_bytes,
            "pause_ms": {"p50": self.pause_ms(50), "p99": self.pause_ms(99), "max": self.pause_ms(100)},
            "blocked_in_pause_ms": sum(self.blocked) * 1e3,
        }

    def text(self) -> str:
        """For the last line."""
        ratio = self.ratio()
        compressed = ""
        if ratio is not None:
            raw = self.changed_pages * PAGE_SIZE
            compressed = f", {raw:,} raw bytes of changed pages as {self.changed_bytes:,} ({ratio:.1%})"
        return (
            f"{len(self.pauses)} checkpoints, {self.dirty_pages:,} dirty pages{compressed}, "
            f"pause p50 {self.pause_ms(50):.2f} ms, p99 {self.pause_ms(99):.2f} ms"
        )

    def line(self, taken: Taken) -> str:
        """For the live line."""
        sent = taken.sent
        raw = sent.pages * PAGE_SIZE
        ratio = f"{sent.compressed_bytes / raw:6.1%}" if sent.compressed_chunks else "   raw"
        blocked = f" (blocked {taken.blocked_s * 1e3:.1f})" if taken.blocked_s else ""
        return (
            f"epoch {sent.epoch}  dirty {taken.dirty_pages:,} pages  ratio {ratio}  "
            f"pause {taken.pause_s * 1e3:.2f} ms{blocked}  {self.stream_bytes / (1 << 20):,.1f} MiB written"
        )


class _Pause:
    """One pause of a source, and how long it was."""

    def __init__(self, source: Source, on_paused: Callable[[], None]) -> None:
        self._source = source
        self._on_paused = on_paused
        self._began = 0.0
        self.is_on = False
        self.seconds = 0.0
        self.reading_s = 0.0
        self.ended_at = 0.0

    def begin(self) -> None:
        # Ctrl-Z in a pause would leave the source stopped with us.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
        self._began = time.monotonic()
        try:
            self._source.pause()
        except BaseException:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
            raise
        self.is_on = True

    def end(self) -> None:
        if not self.is_on:
            return
        self.is_on = False
        try:
            witness = time.monotonic()
            self._on_paused()
            witness = time.monotonic() - witness
        finally:
            self._source.resume()
            self.ended_at = time.monotonic()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
        self.seconds = self.ended_at - self._began - witness
