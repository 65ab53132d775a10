"""From the loop to the link: sends checkpoints as they are taken, while the window has room and the call has time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from remus_ckpt.errors import LinkError
from remus_ckpt.loop import CheckpointLoop, Copying, StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.service.linking import Linking
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.stream import Stream
from remus_ckpt.service.turns import Deadline
from remus_ckpt.source import Source


class Sending:
    """Makes the loops that take checkpoints, and is their output; counts what they have taken.

    stream: whose checkpoints these are
    linking: has the link
    deadline: of the call that is under way
    The rest is as for `Primary`.

    Called by the thread that takes checkpoints; any thread may read `copying`.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        stream: Stream,
        linking: Linking,
        *,
        deadline: Deadline,
        interval_s: float,
        max_pause_s: float,
        on_paused: Callable[[int], None] | None,
        on_phase: Callable[[str, int], None] | None,
        on_turn: Callable[[], None],
        realtime: Realtime | None,
        stop: StopSignal | None,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._source = source
        self._stream = stream
        self._window = stream.window
        self._linking = linking
        self._deadline = deadline
        self._interval_s = interval_s
        self._max_pause_s = max_pause_s
        self._on_paused = on_paused
        self._phase = on_phase or (lambda name, epoch: None)
        self._turn = on_turn
        self._realtime = realtime
        self._stop = stop
        self._metrics = metrics
        self._last: tuple[Sender, CheckpointLoop] | None = None  # the last loop, and its sender; set in one step

    @property
    def copying(self) -> Copying | None:
        """How far a first copy has got, None while there is none."""
        return None if self._last is None else self._last[1].copying

    # The loops

    def loop(self, duration_s: float | None) -> CheckpointLoop:
        """A new loop, which takes checkpoints with the present sender."""
        sender = self._stream.sender
        assert sender is not None
        loop = CheckpointLoop(
            self._source,
            sender,
            self,
            interval_s=self._interval_s,
            duration_s=duration_s,
            max_pause_s=self._max_pause_s,
            on_capture=lambda epoch: self._phase("capture", epoch),
            on_copying=self._copying,
            on_paused=self._on_paused,
            stop=self._stop,
        )
        self._last = sender, loop
        return loop

    def take(self) -> Taken:
        """Take one checkpoint, in the last loop if the sender is still the same: the loop has a buffer for captures."""
        if self._last is None or self._last[0] is not self._stream.sender:
            return self.loop(None).take()
        return self._last[1].take()

    def _copying(self) -> None:
        self._turn()
        self._check_time()
        self.check()
        if (copying := self.copying) is not None:
            self._metrics.set_copy_share(self._name, copying.share)

    def _check_time(self) -> None:
        if self._deadline.is_over:
            size = self._source.memory.pages * PAGE_SIZE
            raise LinkError(f"the time was over in a checkpoint: memory of {size:,} bytes may need a longer timeout_s")

    def count(self, taken: Taken) -> None:
        """Count a checkpoint that has been sent."""
        link = self._linking.link
        self._metrics.checkpoint(
            self._name,
            pause_s=taken.pause_s,
            steps_s=taken.steps_s,
            dirty_pages=taken.dirty_pages,
            raw_bytes=taken.sent.pages * PAGE_SIZE,
            encoded_bytes=taken.sent.stream_bytes,
            wire_bytes=link.take_wire_bytes() if link else 0,
        )
        self._metrics.changed(self._name, taken.dirty, self._source.memory.pages)
        self._metrics.captured(self._name, taken.capture, taken.capture_why)
        self._metrics.set_lag(self._name, self._window.lag)
        tracker = self._source.tracker
        if self._metrics.found(self._name, tracker.way, tracker.why, tracker.missed_pages):
            log("tracking had missed pages", level=logging.ERROR, name=self._name, reason=tracker.why)

    # Called by a loop

    def write(self, buffers: list[Buffer]) -> None:
        """Send bytes of a checkpoint."""
        self._turn()
        link, sender = self._linking.link, self._stream.sender  # another thread may take the link away
        if link is None or sender is None:
            raise LinkError("there is no link")
        if self._window.begin(sender.carried):
            self._phase("send", sender.next_epoch)
        self._check_time()
        link.write(buffers)

    def commit(self, sent: Sent) -> None:
        """Send the end of a checkpoint, and wait while the window is full: the interval stretches, memory use does not
        grow."""
        link = self._linking.link
        if link is None or sent.position is None:
            raise LinkError("there is no link")
        self._window.written(sent)
        link.commit(sent.position, sent.before, sent.stream_bytes, sent.pages)
        self._window.commit_sent()
        if self._realtime:
            self._realtime.enter()
        self._phase("sent", sent.epoch)
        self.await_room()

    def await_room(self, *, stoppable: bool = True) -> None:
        """Wait while the window is full. stoppable: the stop ends that, too"""

        def is_over() -> bool:
            self.check()
            self._turn()
            return stoppable and self._stop is not None and self._stop.is_set

        self._window.await_room(is_over, lambda: self._deadline.at)

    def fds(self) -> Sequence[int]:
        """Descriptors that become readable when the link is lost."""
        link = self._linking.link
        return () if link is None or (fd := link.failed.fileno()) < 0 else (fd,)

    def check(self) -> None:
        """Raise the error that ended the link, if one did."""
        self._linking.check()
