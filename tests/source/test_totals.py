"""What a loop says of its checkpoints: the steps of each pause, and the totals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import pytest

from remus_ckpt.loop import CheckpointLoop, Totals
from remus_ckpt.memory import zeros
from remus_ckpt.pages import Buffer
from remus_ckpt.pause import STEPS
from remus_ckpt.sender import Sender, Sent
from remus_ckpt.source.own_memory import OwnMemory


class Nowhere:
    """An output that counts."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, buffers: list[Buffer]) -> None:
        self.size += sum(len(buffer) for buffer in buffers)

    def commit(self, sent: Sent) -> None: ...

    def fds(self) -> Sequence[int]:
        return ()

    def check(self) -> None: ...


@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_pause_leaves_ctrl_z_as_it_was(is_blocked: bool) -> None:
    source = OwnMemory({"m": zeros(1)}, lock=threading.Lock())
    loop = CheckpointLoop(source, Sender(1, reference=source.tracker.restart()), Nowhere())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP} if is_blocked else ())
    try:
        for _ in range(2):
            loop.take()
            assert (signal.SIGTSTP in signal.pthread_sigmask(signal.SIG_BLOCK, ())) == is_blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_steps_make_up_the_pause_and_totals_the_sums() -> None:
    memory = zeros(64)
    source = OwnMemory({"m": memory}, lock=threading.Lock())
    output, totals = Nowhere(), Totals()
    assert totals.pause_ms(50) == 0.0
    loop = CheckpointLoop(source, Sender(source.memory.pages, reference=source.tracker.restart()), output)
    pauses, dirty = [], 0
    for step in range(5):
        memory[: step + 1, 0] += 1
        taken = loop.take()
        totals.add(taken)
        pauses.append(taken.pause_s)
        dirty += taken.dirty_pages
        assert set(taken.steps_s) == set(STEPS)
        assert all(seconds >= 0 for seconds in taken.steps_s.values())
        assert sum(taken.steps_s.values()) <= taken.pause_s + 1e-6
        if step:
            assert taken.dirty_pages >= step + 1  # what lies across two pages of the kernel counts for both
    source.close()
    report = totals.report()
    assert report["checkpoints"] == 5
    assert report["dirty_pages"] == dirty >= 2 + 3 + 4 + 5
    assert report["stream_bytes"] == output.size
    assert report["pause_ms"]["max"] == max(pauses) * 1e3
    assert min(pauses) * 1e3 <= report["pause_ms"]["p50"] <= report["pause_ms"]["p99"] <= max(pauses) * 1e3
