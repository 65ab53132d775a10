"""The checkpoint loop: pause, take the dirty pages, resume, encode, deliver; and again after the interval.

The first checkpoint copies all of memory while the source runs, and pauses it only for what changed meanwhile.
"""

from __future__ import annotations

import itertools
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import PauseBroken, SourceError
from remus_ckpt.flag import Flag
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import PAGE_SIZE, Buffer, PageBatch, Pages, batches, ratio
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.source import Source, Stopper
from remus_ckpt.wire.parts import Parts

_PAUSES = 3
"""How many pauses are tried for one checkpoint before a broken pause is an error."""


STEPS = ("stop", "find", "copy", "resume")
"""The steps of a pause: stop the writers, find the pages, copy them, resume the writers."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One checkpoint, as the loop saw it. Times are in seconds."""

    sent: Sent
    dirty_pages: int
    """Pages that the pause found and copied. The first checkpoint sends more: it copies all before its pause."""
    pause_s: float
    """From the order to stop to the order to run on, without what `on_paused` took."""
    blocked_s: float
    """The part of the pause that went into encoding and writing; only a bounded capture does that there."""
    encode_s: float
    """Encoding and writing outside the pause."""
    steps_s: Mapping[str, float]
    """The time of each step. The rest of the pause is the check that it has held, and a bounded capture's encoding."""


@dataclass(frozen=True, slots=True)
class Copying:
    """How far a first copy has got.

    number: of the present pass over memory, from 1
    done_pages: of memory, that this pass has gone over; pages: of memory
    began_at: when this pass began, on the monotonic clock
    """

    number: int
    done_pages: int
    pages: int
    began_at: float

    @property
    def share(self) -> float:
        """Of memory, that this pass has gone over."""
        return self.done_pages / self.pages

    def status(self, now: float) -> dict[str, Any]:
        """The same for people, by the keys of `NOT_COPYING`."""
        share, seconds = self.share, max(now - self.began_at, 1e-9)
        return {
            "copy_pass": self.number,
            "copy_share": share,
            "copy_bytes_s": self.done_pages * PAGE_SIZE / seconds,
            "copy_left_s": seconds * (1 - share) / share if share else None,
        }

    def line(self, now: float) -> str:
        """The same, for the live line."""
        found = self.status(now)
        left = "" if found["copy_left_s"] is None else f"  {found['copy_left_s']:.0f} s left"
        return (
            f"first copy, pass {self.number}  {self.share:.0%} of memory  "
            f"{found['copy_bytes_s'] / (1 << 20):,.1f} MiB/s{left}"
        )


NOT_COPYING: dict[str, Any] = dict.fromkeys(("copy_pass", "copy_share", "copy_bytes_s", "copy_left_s"))
"""The status of a first copy while there is none: the pass, the share of memory that it has gone over, bytes of memory
per second since it began, and seconds until it ends at this rate. A pass may be repeated."""


class Output(Protocol):
    """Where checkpoints go: a file, or a link to a backup."""

    def write(self, buffers: list[Buffer]) -> None:
        """Take all of the buffers. They may be kept, and do not change, until `commit` returns."""

    def commit(self, sent: Sent) -> None:
        """Everything written since the last commit is a whole checkpoint. May wait before it accepts the next one."""

    def fds(self) -> Sequence[int]:
        """Descriptors that become readable when `check` has something to raise."""

    def check(self) -> None:
        """Raise the error that has happened to the output meanwhile, if any."""


class StopSignal(Flag):
    """Ends a loop after the current checkpoint, from a signal handler or another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set = False

    def set(self) -> None:
        """End the loop. In a forked child, only the child's own."""
        self.is_set = True
        super().set()


class CheckpointLoop:
    """Takes checkpoints of a source until it is stopped, its time is over, or no writer is left.

    interval_s: running time of the source between two pauses
    duration_s: total time, None for no end
    bounded: hold at most one page buffer of the capture; encoding and writing then happen in the pause
    on_capture: called with the epoch just before the source is paused
    on_paused: called with the epoch while the source is paused, after the capture
    """

    def __init__(
        self,
        source: Source,
        sender: Sender,
        output: Output,
        *,
        interval_s: float = 0.025,
        duration_s: float | None = None,
        bounded: bool = False,
        on_capture: Callable[[int], None] | None = None,
        on_paused: Callable[[int], None] | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        shared = source.tracker.reference
        if shared is not None and sender.reference is not shared:
            raise ValueError("the sender must have the reference that the source's tracker compares with")
        self._memory = source.memory
        self._tracker = source.tracker
        self._stopper = source.stopper
        self._sender = sender
        self._output = output
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._bounded = bounded
        self._give_parts = source.parts
        self._parts = Parts()
        self._on_capture = on_capture
        self._on_paused = on_paused
        self._stop = stop
        self._capture: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        self.ended = ""
        """Why the loop ended: "stopped", "duration" or "source gone"."""
        self.copying: Copying | None = None
        """How far the first copy has got, None without one. Any thread may read it."""

    def run(self) -> Iterator[Taken]:
        """Take checkpoints, and yield each once it has been written.

        Raises SourceError or OSError; the source then runs on, and the output, once closed, ends with the last whole
        checkpoint.
        """
        begin = time.monotonic()
        while True:
            if not self._stopper.alive():
                self.ended = "source gone"
                return
            yield self.take()
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
        for fd in (*self._stopper.death_fds(), *self._output.fds()):
            poll.register(fd, select.POLLIN)
        if self._stop is not None:
            poll.register(self._stop, select.POLLIN)
        # poll() counts in milliseconds: sleep for the remaining fraction.
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(int(left * 1000)):
                break
            if left < 0.001:
                time.sleep(left)
        if self._stop is not None and self._stop.is_set:
            self.ended = "stopped"
        self._output.check()

    def take(self) -> Taken:
        """Take one checkpoint now. Raises like `run`."""
        epoch = self._sender.next_epoch
        pause = _Pause(self._stopper, lambda: self._on_paused(epoch) if self._on_paused else None)
        try:
            try:
                # Each group of buffers has been encoded and is written while the scan stands still.
                for group in self._sender.checkpoint(
                    self._scan(pause),
                    parts=lambda: self._parts,
                    time_ns=time.time_ns(),
                    memory_bytes=self._memory.size,
                ):
                    self._output.write(group)
            finally:
                pause.give_back()
        finally:
            pause.give_back()  # once more: a signal handler may have interrupted the first
        assert self._sender.sent is not None
        self._tracker.taken()
        self._output.commit(self._sender.sent)
        encode_s = time.monotonic() - pause.ended_at
        blocked_s = max(pause.seconds - pause.capture_s, 0.0) if self._bounded else 0.0
        return Taken(self._sender.sent, pause.dirty_pages, pause.seconds, blocked_s, encode_s, pause.steps_s)

    def _scan(self, pause: _Pause) -> Iterator[PageBatch]:
        """The capture, inside its pause; pages that are drawn after the pause were copied during it."""
        if self._sender.sent is None:
            yield from self._first_copy()
        if self._on_capture is not None:
            self._on_capture(self._sender.next_epoch)
        if not self._bounded:
            yield from batches(*self._capture_whole(pause))
            return
        dirty = self._pause_and_find(pause)
        for start in range(0, len(dirty), MAX_BATCH_ENTRIES):
            part = dirty[start : start + MAX_BATCH_ENTRIES]
            with pause.timed("copy"):
                captured = self._memory.read(part, np.empty((len(part), PAGE_SIZE), dtype=np.uint8))
            yield from batches(part, captured)
        # No more pages are drawn: the cost of the last buffer falls outside the pause.
        pause.end()

    def _capture_whole(self, pause: _Pause) -> tuple[NDArray[np.int64], Pages]:
        """The dirty pages of one pause. A broken pause is repeated: nothing from it has been used."""
        for left in reversed(range(_PAUSES)):
            dirty = self._pause_and_find(pause)
            with pause.timed("copy"):
                captured = self._memory.read(dirty, self._room(len(dirty)))
            try:
                pause.end()
                break
            except PauseBroken:
                if not left:
                    raise
        return dirty, captured

    def _pause_and_find(self, pause: _Pause) -> NDArray[np.int64]:
        """Pause the source; returns the pages to take."""
        pause.begin()
        with pause.timed("find"):
            self._memory.check()
            dirty = self._tracker.written()
            if len(self._sender.owed):
                dirty = np.union1d(dirty, self._sender.owed)
            self._parts = self._give_parts()
        pause.dirty_pages = len(dirty)
        return dirty

    def _first_copy(self) -> Iterator[PageBatch]:
        """All of memory while the source runs on, perhaps torn.

        The sender's reference takes the pages in as they are sent, so that the pause only has to copy what has changed
        since: a page may occur in round 0 more than once, and the last occurrence counts. The pass is repeated for as
        long as that halves what the pause will find, by the tracker's estimate.
        """
        before = 2 * self._memory.pages
        try:
            for number in itertools.count(1):
                count, self.copying = 0, Copying(number, 0, self._memory.pages, time.monotonic())
                for pfns, pages in self._tracker.copy_live():
                    count += len(pfns)
                    yield from batches(pfns, pages)
                    if len(pfns):
                        self.copying = replace(self.copying, done_pages=int(pfns[-1]) + 1)
                if count > before // 2 or count <= MAX_BATCH_ENTRIES or (self._stop is not None and self._stop.is_set):
                    return
                if self._tracker.estimate() > count // 2:
                    return
                before = count
        finally:
            self.copying = None

    def _room(self, pages: int) -> Pages:
        """A buffer for the capture: reused, because fresh memory costs a fault per page, and aligned for the codec."""
        if len(self._capture) < pages:
            self._capture = zeros(max(pages, 2 * len(self._capture)))
            expect(self._capture, np.arange(len(self._capture)))
        return self._capture


_KEPT_PAUSES = 100_000


class Totals:
    """Totals of a recording. It may last a year, so percentiles cover only the newest 100,000 pauses."""

    def __init__(self) -> None:
        self.checkpoints = 0
        self.longest_pause_s = 0.0
        self.blocked_s = 0.0
        self.last = 0
        self.dirty_pages = 0
        self.raw_bytes = 0
        self.compressed_bytes = 0
        self.stream_bytes = 0
        self._pauses: deque[float] = deque(maxlen=_KEPT_PAUSES)

    def add(self, taken: Taken) -> None:
        """Take in one checkpoint."""
        self.checkpoints += 1
        self.longest_pause_s = max(self.longest_pause_s, taken.pause_s)
        self._pauses.append(taken.pause_s)
        self.blocked_s += taken.blocked_s
        self.last = taken.sent.epoch
        self.dirty_pages += taken.dirty_pages
        self.raw_bytes += taken.sent.pages * PAGE_SIZE
        self.compressed_bytes += taken.sent.compressed_bytes
        self.stream_bytes += taken.sent.stream_bytes

    def pause_ms(self, percent: float) -> float:
        """A percentile of the pauses."""
        return float(np.percentile(self._pauses, percent)) * 1e3 if self._pauses else 0.0

    def report(self) -> dict[str, Any]:
        """The totals, for JSON."""
        return {
            "checkpoints": self.checkpoints,
            "dirty_pages": self.dirty_pages,
            "raw_bytes": self.raw_bytes,
            "compressed_bytes": self.compressed_bytes,
            "stream_bytes": self.stream_bytes,
            "ratio": ratio(self.stream_bytes, self.raw_bytes),
            "pause_ms": {"p50": self.pause_ms(50), "p99": self.pause_ms(99), "max": self.longest_pause_s * 1e3},
            "blocked_in_pause_ms": self.blocked_s * 1e3,
        }

    def text(self) -> str:
        """The totals, for the last line."""
        share = ratio(self.stream_bytes, self.raw_bytes)
        carried = f"{self.raw_bytes:,} bytes of pages as {self.stream_bytes:,} bytes of stream"
        carried += "" if share is None else f" (ratio {share:.1%})"
        return (
            f"{self.checkpoints:,} checkpoints, {self.dirty_pages:,} dirty pages, {carried}, "
            f"pause p50 {self.pause_ms(50):.2f} ms, p99 {self.pause_ms(99):.2f} ms"
        )

    def line(self, taken: Taken) -> str:
        """The present figures, for the live line."""
        sent = taken.sent
        share = ratio(sent.stream_bytes, sent.pages * PAGE_SIZE)
        shown = "     -" if share is None else f"{share:6.1%}"
        blocked = f" (blocked {taken.blocked_s * 1e3:.1f})" if taken.blocked_s else ""
        return (
            f"epoch {sent.epoch}  dirty {taken.dirty_pages:,} pages  ratio {shown}  "
            f"pause {taken.pause_s * 1e3:.2f} ms{blocked}  {self.stream_bytes / (1 << 20):,.1f} MiB written"
        )


class _Pause:
    """One pause of the writers, and its length."""

    def __init__(self, stopper: Stopper, on_paused: Callable[[], None]) -> None:
        self._stopper = stopper
        self._on_paused = on_paused
        self._began = 0.0
        self._is_on = False
        self.dirty_pages = 0
        self.seconds = 0.0
        """From the order to stop to the order to run on, without what `on_paused` took."""
        self.steps_s: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self.ended_at = 0.0

    def begin(self) -> None:
        """Stop the writers. If this raises anything, at any point, call `give_back`."""
        self._is_on = True
        # Ctrl-Z in a pause would leave the source stopped with us.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
        self._began = time.monotonic()
        try:
            with self.timed("stop"):
                self._stopper.stop()
        except SourceError:  # the writers run on
            self._over()
            raise

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.steps_s[step] += time.monotonic() - begin

    @property
    def capture_s(self) -> float:
        """The part of the pause that went into stopping, finding and copying pages."""
        return self.steps_s["stop"] + self.steps_s["find"] + self.steps_s["copy"]

    def end(self) -> None:
        """Check that the pause has held, and resume the writers. Raises SourceError if it has not."""
        witness = time.monotonic()
        try:
            self._stopper.check_stopped()
            witness = time.monotonic()
            self._on_paused()
        finally:
            witness = time.monotonic() - witness
            self.give_back()
            self.seconds += self.ended_at - self._began - witness

    def give_back(self) -> None:
        """Resume the writers if they may be stopped. If this is interrupted, call it again: it then continues."""
        if not self._is_on:
            return
        begin = time.monotonic()
        try:
            self._stopper.resume()
        except SourceError:
            self._over()
            raise
        self._over()
        self.steps_s["resume"] += self.ended_at - begin

    def _over(self) -> None:
        self.ended_at = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
        self._is_on = False
