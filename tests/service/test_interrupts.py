"""Ctrl-C at any instant of a checkpoint: what comes after it is right."""

from __future__ import annotations

import gc
import math
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from interrupter import Interrupter
from limited import limit

import remus_ckpt
from remus_ckpt.errors import RemusError
from remus_ckpt.files import StreamWriter
from remus_ckpt.flag import Flag
from remus_ckpt.loop import CheckpointLoop, StopSignal
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import Protection, primary_of
from remus_ckpt.service.release import Committed
from remus_ckpt.source.manifest import arrays_of
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.store import Store

LONG_S = 20.0
HERE = str(Path(remus_ckpt.__file__).parent)
OURS = tuple(
    f"{HERE}/{name}"
    for name in (
        "loop.py", "pause.py", "sender.py", "codec/reference.py", "source/__init__.py", "source/compare.py",
        "source/lock.py", "source/own_memory.py", "source/track/kernel.py", "source/track/spans.py",
        "source/track/written.py", "source/track/linux.py", "wire/xen/writer.py",
        "session/incoming.py", "session/outgoing.py", "session/rules.py", "link/client.py", "link/connection.py",
        "flag.py", "files.py",
        "service/alone.py", "service/backoff.py", "service/fenced.py", "service/linking.py", "service/primary.py",
        "service/protect.py", "service/sending.py", "service/stream.py", "service/turns.py", "service/window.py",
    )
)  # fmt: skip
assert all(map(os.path.exists, OURS))


@contextmanager
def interrupted(at: int, *, files: tuple[str, ...] = OURS, **options: Any) -> Iterator[Interrupter]:
    """A block that is interrupted, or not where it ends before."""
    interrupter = Interrupter(at, files=files, **options)
    try:
        with interrupter:
            yield interrupter
    except KeyboardInterrupt:
        assert interrupter.has_struck


def no_reader() -> Any:
    """Nothing is read through the backup here."""
    raise AssertionError("it is asked for a history")


class Desk:
    """An array under protection, and what is to hold of it whatever was interrupted."""

    def __init__(self, backup: Backup, store: Path, name: str) -> None:
        self.array = np.zeros((8, 4096), dtype=np.uint8)
        self.lock = threading.Lock()
        self.commits: list[Committed] = []
        self.is_failing = False
        self._store = store
        self._name = name
        self._step = 0
        stop = StopSignal()
        source = OwnMemory({"array": self.array}, lock=self.lock, device_state=self.device_state)
        self.primary = primary_of(
            source, name, backup.addresses[0], interval_s=0.0, on_commit=self.commits.append, stop=stop
        )
        self.protection = Protection(self.primary, source, stop, None, no_reader, None)

    def device_state(self) -> bytes:
        if self.is_failing:
            raise KeyError("no state")
        return b""

    def write(self) -> None:
        self._step += 1
        with self.lock:
            self.array[self._step % 8, self._step % 4096] += 1
            self.array[(3 * self._step) % 5] = 0 if self._step % 3 else self._step % 251

    def cut(self) -> None:
        self.primary.hang_up()

    def checkpoint(self, *, wait: bool = True) -> int:
        return self.protection.checkpoint(wait=wait, timeout_s=LONG_S)

    def check(self) -> None:
        """Nothing is left as it must not be, and the next checkpoint holds what memory does."""
        assert self.lock.acquire(blocking=False), "writers are stopped for ever"
        self.lock.release()
        assert signal.SIGTSTP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.write()
        epoch = self.checkpoint()
        arrays, _ = arrays_of(Store(self._store).history(self._name).restore(epoch))
        assert np.argwhere(arrays["array"] != self.array).tolist() == []

    def close(self) -> None:
        self.protection.close(LONG_S)
        epochs = [commit.epoch for commit in self.commits]
        assert epochs == sorted(set(epochs))
        assert epochs[-1] == self.protection.committed.epoch  # type: ignore[union-attr]


def steady(desk: Desk, strike: Callable[[], None]) -> None:
    """In a session that goes well."""
    desk.write()
    strike()


def behind_a_lost_link(desk: Desk, strike: Callable[[], None]) -> None:
    """While a link is made again; nobody knows what of two checkpoints the backup holds."""
    desk.write()
    desk.checkpoint(wait=False)
    desk.cut()
    desk.write()
    strike()


def strike_at_each(
    tmp_path: Path, scenario: Callable[[Desk, Callable[[], None]], None], kind: str, first: int, stride: int,
    files: tuple[str, ...] = OURS,
) -> int:  # fmt: skip
    """Interrupt the scenario's checkpoint at first, first + stride, … of its events. Returns how many it was."""
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
        at, count, desk = first, 0, None
        while True:
            if desk is None or count % 40 == 0 or scenario is at_first:
                if desk is not None:
                    desk.close()
                desk = Desk(backup, tmp_path / "store", f"desk-{count // 40}")
                if scenario is not at_first:
                    desk.check()

            def strike() -> None:
                with interrupted(at, kind=kind, files=files) as striking:  # noqa: B023
                    try:
                        desk.checkpoint()  # noqa: B023
                    finally:
                        struck.append(striking.has_struck)  # noqa: B023

            struck: list[bool] = []
            try:
                scenario(desk, strike)
                if count % 2:
                    desk.cut()
                desk.check()
            except (AssertionError, RemusError, ValueError, RuntimeError) as error:
                raise AssertionError(f"interrupted at {kind} {at}: {error!r}") from error
            if struck == [False]:
                break
            at, count = at + stride, count + 1
        desk.close()
    return count


def at_first(desk: Desk, strike: Callable[[], None]) -> None:
    """In the first copy of all memory."""
    desk.write()
    strike()


def while_a_callback_fails(desk: Desk, strike: Callable[[], None]) -> None:
    """On the way out of a pause that broke off."""
    desk.write()
    desk.is_failing = True
    with suppress(KeyError):
        strike()
    desk.is_failing = False


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, first_backoff_s=0.001)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    gc.collect()
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= fds
    assert threading.active_count() == threads


# An interrupt between the making of a socket and its first name leaves it to the garbage collector, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    ("scenario", "kind", "stride"),
    [
        (steady, "line", many(23, 1)),
        (behind_a_lost_link, "line", many(89, 5)),
        (at_first, "line", many(127, 5)),
        (while_a_callback_fails, "line", many(19, 1)),
        (steady, "opcode", many(1009, 29)),
        (behind_a_lost_link, "opcode", many(2003, 61)),
        (at_first, "opcode", many(2003, 61)),
        (while_a_callback_fails, "opcode", many(401, 29)),
    ],
)
def test_a_checkpoint_that_is_interrupted(tmp_path: Path, scenario: Any, kind: str, stride: int) -> None:
    """At every so many lines or instructions; where it begins changes from run to run."""
    assert strike_at_each(tmp_path, scenario, kind, os.getpid() % stride, stride) * stride > 100


def test_a_flag_that_is_interrupted() -> None:
    """At each instruction; `_leaves_nothing` looks for what it lost."""
    at = 0
    while True:
        with interrupted(at, kind="opcode", files=(f"{HERE}/flag.py",)) as striking:
            flag = Flag()
            flag.set()
            assert select.select([flag], [], [], 0)[0]
            flag.close()
            flag.set()
            assert flag.fileno() == -1
        if not striking.has_struck:
            break
        at += 1
    assert at > 20


def record(path: Path, at: int, kind: str) -> tuple[bool, list[bytes], list[bytes]]:
    """A recording that goes on after an interrupt, where it can. Returns whether it was interrupted, and memory at each
    checkpoint that was taken, and as its stream holds them."""
    array = np.zeros((4, 4096), dtype=np.uint8)
    source = OwnMemory({"array": array})
    writer = StreamWriter(path)
    loop = CheckpointLoop(source, Sender(source.memory.pages, reference=source.tracker.reference), writer)
    images = []
    with interrupted(at, kind=kind) as striking:
        for step in range(3):
            array[step % 4] = step + 1
            images.append(array.tobytes())
            loop.take()
    if striking.has_struck:
        array[3, 7] = 9
        with suppress(ValueError):  # it refuses to go on where half a checkpoint has been written
            loop.take()
            images.append(array.tobytes())
    writer.close()
    source.close()
    restorer = Restorer()
    restorer.feed(path.read_bytes())
    restorer.feed_eof()
    return striking.has_struck, images, [restorer.memory.tobytes() for _ in restorer.checkpoints()]


@pytest.mark.parametrize(("kind", "stride"), [("line", many(19, 3)), ("opcode", many(401, 67))])
def test_a_recording_that_is_interrupted(tmp_path: Path, kind: str, stride: int) -> None:
    """The stream holds whole checkpoints and nothing else, each of them right."""
    at = 0
    while True:
        has_struck, images, held = record(tmp_path / "stream", at, kind)
        assert [image for image in images if image in held] == held, at
        if not has_struck:
            break
        at += stride
    assert held == images
    assert at > 300


class Keeping:
    """An output that keeps all buffers until the checkpoint's end, as it may."""

    def __init__(self) -> None:
        self.stream = b""
        self._kept: list[Any] = []

    def write(self, buffers: list[Any]) -> None:
        self._kept += buffers

    def commit(self, sent: Any) -> None:
        self.stream += b"".join(map(bytes, self._kept))
        self._kept.clear()

    def fds(self) -> tuple[int, ...]:
        return ()

    def check(self) -> None:
        pass


@pytest.mark.parametrize("way", ["copy", "encode", "bounded"])
def test_buffers_do_not_change_before_the_commit(way: str) -> None:
    array = np.random.default_rng(1).integers(0, 256, (3000, 4096), dtype=np.uint8)
    source, output = OwnMemory({"array": array}), Keeping()
    sender = Sender(source.memory.pages, reference=source.tracker.reference, buffer_pages=100)
    loop = CheckpointLoop(
        source, sender, output, max_pause_s=0.0 if way == "copy" else math.inf, bounded=way == "bounded"
    )
    restorer = Restorer()
    for step in range(3):
        array[step::2] ^= np.uint8(step + 1)
        loop.take()
        restorer.feed(output.stream)
        output.stream = b""
        assert [checkpoint.epoch for checkpoint in restorer.checkpoints()] == [step]
        assert np.array_equal(restorer.memory, array)
