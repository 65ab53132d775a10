"""The checkpoint loop: pause, take the dirty pages, resume, encode, deliver; and again after the interval.

The first checkpoint copies all of memory while the source runs, pauses it only for what changed in the meantime, and
then sends the copy.
"""

from __future__ import annotations

import itertools
import math
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.scan import scatter
from remus_ckpt.errors import PauseBroken
from remus_ckpt.flag import Flag
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages, ratio
from remus_ckpt.pause import MAX_PAUSE_S, Capture, Captures, Rooms
from remus_ckpt.pause import Pause as _Pause
from remus_ckpt.plural import counted
from remus_ckpt.sender import Encoded, InReference, Scanned, Sender, Sent
from remus_ckpt.source import Source
from remus_ckpt.wire.parts import Parts

_PAUSES = 3
"""How many pauses are tried for one checkpoint before a broken pause is an error."""
_MOST_POLL_MS = 1 << 30


@dataclass(frozen=True, slots=True)
class Taken:
    """One checkpoint, as the loop saw it. Times are in seconds."""

    sent: Sent
    dirty: NDArray[np.int64]
    """The pages that the pause found. The first checkpoint sends more: it copies everything before its pause."""
    pause_s: float
    """From the order to stop until the order to resume, without the time of `on_paused`."""
    blocked_s: float
    """The part of the pause spent on writing; only a bounded capture writes there."""
    encode_s: float
    """Encoding and writing outside the pause."""
    steps_s: Mapping[str, float]
    """The time of each step. The rest of the pause is the check that it held, and a bounded capture's writing."""
    capture: Capture
    """What was done to the pages in the pause."""
    capture_why: str
    """Why they were copied; empty if they were encoded."""

    @property
    def dirty_pages(self) -> int:
        """How many pages the pause found."""
        return len(self.dirty)


@dataclass(frozen=True, slots=True)
class Copying:
    """The progress of a first copy.

    number: of the current pass over memory, from 1
    done_pages: pages of memory that this pass has covered; pages: of memory
    began_at: when this pass began, on the monotonic clock
    is_sent: whether the copy is complete and now being sent, which is pass 1 again
    """

    number: int
    done_pages: int
    pages: int
    began_at: float
    is_sent: bool = False

    @property
    def share(self) -> float:
        """The share of memory that has been sent."""
        return self.done_pages / self.pages if self.is_sent else 0.0

    def status(self, now: float) -> dict[str, Any]:
        """The same for people, by the keys of `NOT_COPYING`; nothing before the copy is being sent."""
        return self._progress(now) if self.is_sent else NOT_COPYING

    def _progress(self, now: float) -> dict[str, Any]:
        share, seconds = self.done_pages / self.pages, max(now - self.began_at, 1e-9)
        return {
            "copy_pass": self.number,
            "copy_share": share,
            "copy_bytes_s": self.done_pages * PAGE_SIZE / seconds,
            "copy_left_s": seconds * (1 - share) / share if share else None,
        }

    def line(self, now: float) -> str:
        """The same, for the live line."""
        found = self._progress(now)
        left = "" if found["copy_left_s"] is None else f"  {found['copy_left_s']:.0f} s left"
        return (
            f"first copy, {'sending' if self.is_sent else f'pass {self.number}'}  {found['copy_share']:.0%} of memory  "
            f"{found['copy_bytes_s'] / (1 << 20):,.1f} MiB/s{left}"
        )


NOT_COPYING: dict[str, Any] = dict.fromkeys(("copy_pass", "copy_share", "copy_bytes_s", "copy_left_s"))
"""The status of a first copy, with the values while there is none: the pass, the share of memory that it has covered,
bytes of memory per second since it began, and seconds until it ends at this rate."""


class Output(Protocol):
    """Where checkpoints go: a file, or a link to a backup."""

    def write(self, buffers: list[Buffer]) -> None:
        """Accept all of the buffers. They may be kept, and do not change, until `commit` returns."""

    def commit(self, sent: Sent) -> None:
        """Everything written since the last commit is a whole checkpoint. May wait before it accepts the next one."""

    def fds(self) -> Sequence[int]:
        """Descriptors that become readable when `check` has something to raise."""

    def check(self) -> None:
        """Raise the error that has occurred in the output meanwhile, if any."""


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
    """Takes checkpoints of a source until it is stopped, its time is up, or no writer is left.

    interval_s: running time of the source between two pauses
    duration_s: total time, None for no end
    max_pause_s: pages are encoded in the pause, in place, unless that is expected to make the pause longer than this;
        then, if there is room from an earlier pause, they are copied, and encoded afterwards. That makes the pause
        shorter and the whole checkpoint longer. 0 for always copying
    bounded: hold at most one page buffer of the capture, encoded, and write it in the pause, however long that takes
    on_capture: called with the epoch just before the source is paused
    on_copying: called often in the first checkpoint, while memory is copied and while the copy is sent
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
        max_pause_s: float = MAX_PAUSE_S,
        bounded: bool = False,
        on_capture: Callable[[int], None] | None = None,
        on_copying: Callable[[], None] | None = None,
        on_paused: Callable[[int], None] | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        shared = source.tracker.reference
        if shared is not None and sender.reference is not shared:
            raise ValueError("the sender must have the reference that the source's tracker compares with")
        if sender.sent is None and len(sender.reference.pages) != source.memory.pages:
            raise ValueError("the sender's reference must have room for all of memory")
        self._memory = source.memory
        self._tracker = source.tracker
        self._stopper = source.stopper
        self._sender = sender
        self._output = output
        self._interval_s = interval_s
        self._duration_s = duration_s
        self._bounded = bounded
        self._before_pause = source.before_pause
        self._drain = source.drain
        self._give_parts = source.parts
        self._parts = Parts()
        self._on_capture = on_capture
        self._on_copying = on_copying
        self._on_paused = on_paused
        self._stop = stop
        self._captures = Captures(math.inf if bounded else max_pause_s)
        self._captured: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        self._rooms = Rooms()
        self.ended = ""
        """Why the loop ended: "stopped", "duration" or "source gone"."""
        self.copying: Copying | None = None
        """The progress of the first copy, None without one. Any thread may read it."""

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
        # poll() counts in milliseconds, up to 24 days of them: sleep for the remaining fraction.
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(min(int(left * 1000), _MOST_POLL_MS)):
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
                # Each group of buffers has been encoded and is written while the scan waits.
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
        self._output.commit(self._sender.sent)
        # Where this is not reached, the tracker names the same pages again.
        self._tracker.taken()
        if self._captures.wanted_pages:
            self._room(self._captures.wanted_pages)[:] = 0  # written once, so that no pause has to wait for its faults
        encode_s = time.monotonic() - pause.ended_at
        blocked_s = max(pause.seconds - pause.capture_s, 0.0) if self._bounded else 0.0
        return Taken(
            self._sender.sent,
            pause.dirty,
            pause.seconds,
            blocked_s,
            encode_s,
            pause.steps_s,
            self._captures.way,
            self._captures.why,
        )

    def _scan(self, pause: _Pause) -> Iterator[Scanned]:
        """Yield the pages of a checkpoint. Those drawn after the pause were copied or encoded in it."""
        is_first = self._sender.sent is None
        copied = self._copy_live() if is_first else None
        if self._on_capture is not None:
            self._on_capture(self._sender.next_epoch)
        part_pages = self._sender.buffer_pages
        for left in reversed(range(_PAUSES)):
            dirty = self._pause_and_find(pause)
            encodes = self._captures.choose(
                len(dirty), pause.so_far_s, room_pages=len(self._captured), is_first=is_first
            )
            held: list[Encoded] = []
            has_written = False
            if encodes:
                self._rooms.clear()
                for start in range(0, len(dirty), part_pages):
                    held.append(self._encode(dirty[start : start + part_pages], pause))
                    if self._bounded and start + part_pages < len(dirty):
                        # The last part is written after the pause.
                        has_written = True
                        yield held.pop()
            else:
                with pause.timed("copy"):
                    if copied is not None:
                        self._copy_to_reference(dirty)
                        copied[dirty] = True
                    else:
                        captured = self._memory.read(dirty, self._room(len(dirty)))
            with pause.timed("state"):
                self._parts = self._give_parts()
            try:
                pause.end()
                break
            except PauseBroken:
                if has_written or not left:
                    raise
                if encodes:
                    self._sender.withdraw()
        if copied is not None:
            yield from self._send_reference(np.flatnonzero(copied))
        elif encodes:
            yield from held
        else:
            for start in range(0, len(dirty), part_pages):
                index = np.arange(start, min(start + part_pages, len(dirty)))
                yield self._sender.encode(dirty[start : start + part_pages], [(captured, index)])

    def _encode(self, pfns: NDArray[np.int64], pause: _Pause) -> Encoded:
        """Encode a page buffer in the pause. If the pause is broken, the sender must withdraw it."""
        before = pause.steps_s["encode"]
        with pause.timed("encode"):
            out = None if self._bounded else self._rooms.take(self._sender.most_bytes(len(pfns)))
            encoded = self._sender.encode(pfns, self._memory.places(pfns), out)
            if out is not None:
                self._rooms.keep(len(encoded.data))
        self._captures.encoded(len(pfns), pause.steps_s["encode"] - before)
        return encoded

    def _pause_and_find(self, pause: _Pause) -> NDArray[np.int64]:
        """Pause the source; returns the pages to take."""
        self._before_pause()
        pause.begin()
        with pause.timed("drain"):
            self._drain(self._sender.next_epoch)
        with pause.timed("find"):
            self._memory.check()
            dirty = self._tracker.written()
            if len(self._sender.owed):
                dirty = np.union1d(dirty, self._sender.owed)
        pause.dirty = dirty
        return dirty

    # The first checkpoint: memory is copied into the reference while the source runs on, a pause brings the copy up to
    # date, and then it is sent. Nothing is sent twice, however long that takes and whatever is written meanwhile.

    def _copy_live(self) -> NDArray[np.bool_]:
        """All of memory, perhaps torn. Returns which pages may be other than zeros, bool[pages].

        The first pass is slower than any other, since it fills fresh memory, so there is a second one if more than a
        little was written meanwhile. More follow as long as each halves what the pause will find, by the tracker's
        estimate.
        """
        copied = np.zeros(self._memory.pages, dtype=bool)
        try:
            for number in itertools.count(1):
                count, self.copying = 0, Copying(number, 0, self._memory.pages, time.monotonic())
                for pfns, pages in self._tracker.copy_live():
                    count += len(pfns)
                    copied[pfns] = True
                    if self._tracker.reference is None:
                        scatter(pages, self._sender.reference.pages, pfns)
                    if len(pfns):
                        self.copying = replace(self.copying, done_pages=int(pfns[-1]) + 1)
                    if self._on_copying is not None:
                        self._on_copying()
                if count <= MAX_BATCH_ENTRIES or (self._stop is not None and self._stop.is_set):
                    return copied
                left = self._tracker.estimate()
                if left <= MAX_BATCH_ENTRIES or (number > 1 and left > count // 2):
                    return copied
        finally:
            self.copying = None
        raise AssertionError  # it counts without end

    def _copy_to_reference(self, dirty: NDArray[np.int64]) -> None:
        """Copy what a pause has found. If the pause is broken, the next one finds these pages again: nothing has been
        sent."""
        for start in range(0, len(dirty), MAX_BATCH_ENTRIES):
            part = dirty[start : start + MAX_BATCH_ENTRIES]
            scatter(self._memory.read(part, self._room(len(part))), self._sender.reference.pages, part)

    def _send_reference(self, pfns: NDArray[np.int64]) -> Iterator[Scanned]:
        """The pages of the copy."""
        try:
            self.copying = Copying(1, 0, self._memory.pages, time.monotonic(), is_sent=True)
            for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
                part = pfns[start : start + MAX_BATCH_ENTRIES]
                yield InReference(part)
                self.copying = replace(self.copying, done_pages=int(part[-1]) + 1)
                if self._on_copying is not None:
                    self._on_copying()
        finally:
            self.copying = None

    def _room(self, pages: int) -> Pages:
        """A buffer for copies: reused, because fresh memory costs a fault per page, and aligned for the codec."""
        if len(self._captured) < pages:
            self._captured = zeros(max(pages, 2 * len(self._captured)))
            expect(self._captured, np.arange(len(self._captured)))
        return self._captured


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
        self.encoded_in_pause = 0
        """Checkpoints whose pages were encoded in the pause, not copied."""
        self._pauses: deque[float] = deque(maxlen=_KEPT_PAUSES)

    def add(self, taken: Taken) -> None:
        """Add one checkpoint."""
        self.checkpoints += 1
        self.longest_pause_s = max(self.longest_pause_s, taken.pause_s)
        self._pauses.append(taken.pause_s)
        self.blocked_s += taken.blocked_s
        self.last = taken.sent.epoch
        self.dirty_pages += taken.dirty_pages
        self.raw_bytes += taken.sent.pages * PAGE_SIZE
        self.compressed_bytes += taken.sent.compressed_bytes
        self.stream_bytes += taken.sent.stream_bytes
        self.encoded_in_pause += taken.capture == "encode"

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
            f"{counted(self.checkpoints, 'checkpoint')}, {counted(self.dirty_pages, 'dirty page')}, {carried}, "
            f"pause p50 {self.pause_ms(50):.2f} ms, p99 {self.pause_ms(99):.2f} ms"
        )

    def line(self, taken: Taken) -> str:
        """The current figures, for the live line."""
        sent = taken.sent
        share = ratio(sent.stream_bytes, sent.pages * PAGE_SIZE)
        shown = "     -" if share is None else f"{share:6.1%}"
        blocked = f" (blocked {taken.blocked_s * 1e3:.1f})" if taken.blocked_s else ""
        return (
            f"epoch {sent.epoch}  dirty {counted(taken.dirty_pages, 'page')}  ratio {shown}  "
            f"pause {taken.pause_s * 1e3:.2f} ms{blocked}  {self.stream_bytes / (1 << 20):,.1f} MiB written"
        )
