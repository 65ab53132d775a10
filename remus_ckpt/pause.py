"""A pause of the writers: how long it takes, and what is done to the pages in it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import SourceError
from remus_ckpt.memory import zeros
from remus_ckpt.pages import pages_for
from remus_ckpt.plural import counted
from remus_ckpt.source import Stopper

STEPS = ("stop", "drain", "find", "copy", "encode", "state", "resume")
"""The steps of a pause: stop the writers, mark their output, find the pages, copy or encode them, take what goes with
memory (the device state), resume the writers."""

MAX_PAUSE_S = 0.025
"""By default, pages are encoded in the pause if it is not expected to take longer than this."""

Capture = Literal["encode", "copy"]
"""What happens to the pages in the pause: they are encoded in place, or copied and encoded afterwards."""

_ROOM_PAGES = 1 << 14
_PAGE_S = 0.6e-6
"""The time to encode a page in the pause, as long as nothing has been measured."""
_MEASURED_PAGES = 256
"""With fewer pages, a measurement shows mostly something else."""


class Captures:
    """Decides what is done to the pages in a pause.

    max_pause_s: a pause that is expected to take longer than this must not be spent on encoding if copying is shorter

    way: what was decided last; why: the reason, if it is a copy
    wanted_pages: make room for copies of this many pages outside a pause; 0 for none
    """

    def __init__(self, max_pause_s: float) -> None:
        self._max_pause_s = max_pause_s
        self._page_s = _PAGE_S
        self._lacked = 0
        self.way: Capture = "copy"
        self.why = "there was no pause yet"
        self.wanted_pages = 0

    def choose(self, pages: int, so_far_s: float, *, room_pages: int, is_first: bool = False) -> bool:
        """Whether to encode this many pages, in a pause that has already lasted this long.

        room_pages: available room for copies
        """
        expected_s = so_far_s + pages * self._page_s
        self.way, self.why, self.wanted_pages = "encode", "", 0
        if is_first:
            self.way, self.why = "copy", "a first checkpoint carries pages in full"
        elif not 0 < expected_s <= self._max_pause_s:
            # To copy into fresh memory is slower than to encode: at a fault a page, and all in the pause. If it happens
            # again, the room is worth having.
            self._lacked = self._lacked + 1 if pages > room_pages else 0
            if self._lacked > 1:
                self.wanted_pages = pages
            if not self._lacked or not self._max_pause_s:
                self.way = "copy"
                self.why = (
                    f"encoding {counted(pages, 'page')} in the pause would make it {expected_s * 1e3:.1f} ms long, "
                    f"and it may take {self._max_pause_s * 1e3:g} ms"
                )
                # One slow pause must not decide for all later ones.
                self._page_s += (_PAGE_S - self._page_s) / 16
        else:
            self._lacked = 0
        return self.way == "encode"

    def encoded(self, pages: int, seconds: float) -> None:
        """Note how long that took."""
        if pages >= _MEASURED_PAGES:
            self._page_s += (seconds / pages - self._page_s) / 4


class Rooms:
    """Where encoded pages are kept until their checkpoint is committed; reused for the next, because fresh memory costs
    a fault per page. A room takes memory as far as it was ever filled."""

    def __init__(self) -> None:
        self._rooms: list[NDArray[np.uint8]] = []
        self._number = self._used = 0

    def clear(self) -> None:
        """Start over with the first room."""
        self._number = self._used = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """Room for this many bytes; call `keep` next."""
        while self._number < len(self._rooms):
            if len(self._rooms[self._number]) - self._used >= size:
                return self._rooms[self._number][self._used :]
            self._number, self._used = self._number + 1, 0
        self._rooms.append(zeros(max(pages_for(size), _ROOM_PAGES)).reshape(-1))
        return self._rooms[-1]

    def keep(self, size: int) -> None:
        """This many of these bytes are in use until `clear`."""
        self._used += size


class Pause:
    """One pause of the writers, and its length."""

    def __init__(self, stopper: Stopper, on_paused: Callable[[], None]) -> None:
        self._stopper = stopper
        self._on_paused = on_paused
        self._began = 0.0
        self._is_on = False
        # Whoever blocks it in this thread anyway wants it blocked after the pause too.
        self._unblocks = signal.SIGTSTP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.dirty: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """The pages that it found."""
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
        """The part of the pause spent on stopping the writers, and on finding and taking pages and parts."""
        return sum(self.steps_s[step] for step in STEPS if step != "resume")

    @property
    def so_far_s(self) -> float:
        """How long the current pause has lasted."""
        return time.monotonic() - self._began

    def end(self) -> None:
        """Check that the pause held, and resume the writers. Raises SourceError if it did not."""
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
        if self._unblocks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
        self._is_on = False
