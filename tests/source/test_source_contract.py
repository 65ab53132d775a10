"""What every source must do, whoever writes to it and however they are stopped: one suite for all."""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import writers
from support import end_guard, writer_process
from tracking import needs_tracking

from remus_ckpt.errors import SourceError
from remus_ckpt.files import StreamWriter, read_checkpoints
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.loop import CheckpointLoop, StopSignal
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.sender import Sender
from remus_ckpt.source import Source
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.source.track.kernel import KernelTracker, Tracking

PAGES = 64


@dataclass
class Subject:
    """A source whose memory is being written to."""

    source: Source
    image: Callable[[], bytes]
    """All of its memory as it is now."""
    close: Callable[[], None]
    process: subprocess.Popen[bytes] | None = None

    def pages(self) -> np.ndarray:
        return np.frombuffer(self.image(), dtype=np.uint8).reshape(-1, PAGE_SIZE)

    def runs(self) -> bool:
        before = self.image()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self.image() != before:
                return True
            time.sleep(0.001)
        return False


def needs_cgroup(kind: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.root] if kind == "freezer" else []


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process of four threads that writes to the file "memory"."""
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(PAGES * PAGE_SIZE))
    with writer_process(memory, threads=4) as process:
        yield process, memory


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Path]]:
    """Puts a process into a cgroup of its own."""
    with ExitStack() as stack:

        def put(pid: int) -> Path:
            parent = writers.cgroup_mount()
            if parent is None:
                pytest.skip("no cgroup2 is mounted")
            name = f"remus-test-{os.getpid()}-{pid}"
            try:
                path = stack.enter_context(writers.own_cgroup(parent, name))
            except OSError as error:
                pytest.skip(f"no cgroup can be made below {parent}: {error.strerror}")
            (path / "cgroup.procs").write_text(str(pid))
            stack.callback(emptied, path)
            return path

        yield put


def emptied(path: Path) -> None:
    """End whoever is left in a cgroup of ours."""
    (path / "cgroup.kill").write_text("1")
    while "populated 1" in (path / "cgroup.events").read_text():
        time.sleep(0.001)


BY_COMPARISON = [pytest.param((kind, "compare"), id=kind, marks=needs_cgroup(kind)) for kind in [*writers.KINDS, "own"]]
BY_KERNEL = [
    pytest.param((kind, "kernel"), id=f"{kind}, by the kernel", marks=needs_tracking) for kind in ["signals", "own"]
]


@pytest.fixture(params=BY_COMPARISON + BY_KERNEL)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    kind, tracking = request.param
    if kind == "own":
        with own(tracking) as made:
            yield made
        return
    process, memory = request.getfixturevalue("process")
    cgroup = request.getfixturevalue("cgroup")(process.pid) if kind == "freezer" else None
    source = SharedFile(memory, writers.make(kind, process.pid, cgroup), tracking=tracking)
    try:
        yield Subject(source, memory.read_bytes, source.close, process)
    finally:
        source.close()


@contextlib.contextmanager
def own(tracking: Tracking) -> Iterator[Subject]:
    """Arrays of this process, written to by two threads of it that take a lock."""
    lock = threading.Lock()
    numbers = np.zeros(10 * 512 + 3, dtype=np.uint64)
    area = mmap.mmap(-1, 5 * PAGE_SIZE)
    source = OwnMemory({"numbers": numbers, "area": area}, lock=lock, tracking=tracking)
    over = threading.Event()

    def write(first: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            with lock:
                numbers[(first + number * 512) % len(numbers)] = number
                area[number % len(area)] = number % 251
            if number % 50 == 0:
                time.sleep(0.0005)

    def image() -> bytes:
        whole = numbers.tobytes()
        return whole + bytes(-len(whole) % PAGE_SIZE) + area[:]

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 256)]
    for thread in threads:
        thread.start()
    try:
        yield Subject(source, image, source.close)
    finally:
        source.close()
        over.set()
        for thread in threads:
            thread.join()


def test_nothing_changes_in_a_pause_and_all_goes_on_after_it(subject: Subject) -> None:
    for _ in range(10):
        subject.source.stopper.stop()
        before = subject.image()
        time.sleep(0.002)
        subject.source.stopper.check_stopped()
        assert subject.image() == before, "somebody wrote in the pause"
        subject.source.stopper.resume()
        assert subject.runs(), "nobody writes after it"


def test_written_is_what_differs_and_read_is_what_is_there(subject: Subject) -> None:
    memory, tracker, stopper = subject.source.memory, subject.source.tracker, subject.source.stopper
    reference = tracker.restart()
    assert reference is not None and reference is tracker.reference
    assert memory.pages == len(subject.pages())
    assert reference.pages.shape == (memory.pages, PAGE_SIZE)
    assert not reference.pages.any(), "it starts as zeros, as memory at the other end does"
    found = 0
    for _ in range(5):
        assert subject.runs()
        stopper.stop()
        memory.check()
        now = subject.pages()
        written = tracker.written()
        assert written.dtype == np.int64
        differing = np.flatnonzero((now != reference.pages).any(axis=1))
        if tracker.way == "compare":
            assert written.tolist() == differing.tolist()
        assert (np.diff(written) > 0).all() and np.isin(differing, written).all()
        pages = memory.read(written, np.full((len(written) + 2, PAGE_SIZE), 0xEE, dtype=np.uint8))
        assert (pages == now[written]).all()
        reference.pages[written] = pages
        tracker.taken()
        again = tracker.written()
        assert not len(again) or tracker.way == "kernel", "a comparison names no others"
        assert (memory.read(again, np.empty((len(again), PAGE_SIZE), np.uint8)) == reference.pages[again]).all()
        stopper.resume()
        tracker.taken()
        found += len(written)
    assert found
    assert tracker.way == ("kernel" if isinstance(tracker, KernelTracker) else "compare")
    stopper.stop()
    memory.check()
    assert tracker.restart() is not reference
    assert tracker.written().tolist() == np.flatnonzero(subject.pages().any(axis=1)).tolist(), "it begins anew"
    stopper.resume()


def test_a_sample_is_a_copy_of_any_part_at_any_time(subject: Subject) -> None:
    assert subject.runs()
    memory = subject.source.memory
    while_running = memory.sample(0, memory.pages)
    assert while_running.shape == (memory.pages, PAGE_SIZE)
    assert while_running.any()
    kept = while_running.copy()
    assert subject.runs()
    assert (while_running == kept).all(), "it is no copy"
    subject.source.stopper.stop()
    now = subject.pages()
    for first, stop in ((0, memory.pages), (3, 3), (memory.pages - 1, memory.pages), (5, 13)):
        assert (memory.sample(first, stop) == now[first:stop]).all()
    subject.source.stopper.resume()


def test_what_is_copied_live_and_what_is_written_then_are_all(subject: Subject) -> None:
    """However it is written meanwhile, a round over it and the pause behind it give memory as it is in the pause."""
    memory, tracker, stopper = subject.source.memory, subject.source.tracker, subject.source.stopper
    reference = tracker.restart()
    assert reference is not None
    assert subject.runs()
    for _ in range(2):
        for pfns, pages in tracker.copy_live():
            assert pages.shape == (len(pfns), PAGE_SIZE) and len(pfns) <= MAX_BATCH_ENTRIES
            reference.pages[pfns] = pages
            assert subject.runs()
    assert 0 <= tracker.estimate() <= memory.pages
    stopper.stop()
    memory.check()
    written = tracker.written()
    reference.pages[written] = memory.read(written, np.empty((len(written), PAGE_SIZE), dtype=np.uint8))
    assert (reference.pages == subject.pages()).all()
    assert tracker.estimate() == 0
    stopper.resume()


@pytest.mark.parametrize("way", ["copy", "encode", "bounded"])
def test_a_loop_over_it_gives_each_pause_as_it_was(subject: Subject, way: str, tmp_path: Path) -> None:
    seen: dict[int, str] = {}
    source = subject.source
    output = StreamWriter(tmp_path / "stream")
    stop = StopSignal()
    loop = CheckpointLoop(
        source,
        Sender(source.memory.pages, reference=source.tracker.reference),
        output,
        interval_s=0.003,
        on_paused=lambda epoch: seen.update({epoch: hashlib.sha256(subject.image()).hexdigest()}),
        max_pause_s=0.0 if way == "copy" else math.inf,
        bounded=way == "bounded",
        stop=stop,
    )
    for taken in loop.run():
        assert taken.capture == ("copy" if way == "copy" or not taken.sent.epoch else "encode")
        if taken.sent.epoch == 5:
            stop.set()
    output.close()
    stop.close()
    assert loop.ended == "stopped"
    assert len(seen) == 6
    restored = {
        checkpoint.epoch: hashlib.sha256(checkpoint.memory.tobytes()).hexdigest()
        for checkpoint in read_checkpoints(tmp_path / "stream", strict=True)
    }
    assert restored == seen


def test_closing_ends_a_pause(subject: Subject) -> None:
    subject.source.stopper.stop()
    subject.close()
    assert subject.runs()


def test_alive(subject: Subject) -> None:
    assert subject.source.stopper.alive()
    subject.source.stopper.stop()
    assert subject.source.stopper.alive()
    subject.source.stopper.resume()


# Those who are processes

by_each_kind = pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs_cgroup(kind)) for kind in writers.KINDS])
by_those_who_know = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_cgroup(kind)) for kind in ("signals", "freezer")]
)


def in_cgroup(request: pytest.FixtureRequest, kind: str, pid: int) -> Path | None:
    found: Path | None = request.getfixturevalue("cgroup")(pid) if kind == "freezer" else None
    return found


@by_each_kind
def test_writers_run_on_when_the_one_who_stopped_them_is_killed(
    kind: str, process: tuple[subprocess.Popen[bytes], Path], request: pytest.FixtureRequest
) -> None:
    writer, memory = process
    place = in_cgroup(request, kind, writer.pid)
    code = [sys.executable, writers.__file__, kind, str(writer.pid), str(place)]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        try:
            assert recorder.stdout.readline() == b"stopped\n"
            before = memory.read_bytes()
            time.sleep(0.005)
            assert memory.read_bytes() == before
        finally:
            recorder.kill()
    deadline = time.monotonic() + 5
    while memory.read_bytes() == before:
        assert time.monotonic() < deadline, "they are stopped still"
        time.sleep(0.005)


@by_those_who_know
def test_a_death_is_noticed(
    kind: str, process: tuple[subprocess.Popen[bytes], Path], request: pytest.FixtureRequest
) -> None:
    writer, _ = process
    them = writers.make(kind, writer.pid, in_cgroup(request, kind, writer.pid))
    for _ in range(2):
        poll = select.poll()
        for fd in them.death_fds():
            poll.register(fd, select.POLLIN)
        # A pause is no death.
        them.stop()
        them.resume()
        assert not poll.poll(20)
    assert them.alive()
    writer.kill()
    assert poll.poll(5000)
    writer.wait()
    assert not them.alive()
    assert not them.death_fds()
    # A pause of nobody is none, and no error.
    them.stop()
    them.check_stopped()
    them.resume()
    them.close()


@by_those_who_know
def test_writers_who_do_not_have_the_file_are_refused(
    kind: str, process: tuple[subprocess.Popen[bytes], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    writer, memory = process
    place = in_cgroup(request, kind, writer.pid)
    (tmp_path / "other").write_bytes(bytes(PAGE_SIZE))
    with pytest.raises(SourceError):
        SharedFile(tmp_path / "other", writers.make(kind, writer.pid, place))
    # It has let go of them.
    SharedFile(memory, writers.make(kind, writer.pid, place)).close()


@by_each_kind
def test_without_its_guard_nothing_is_stopped(
    kind: str, process: tuple[subprocess.Popen[bytes], Path], request: pytest.FixtureRequest
) -> None:
    writer, memory = process
    them = writers.make(kind, writer.pid, in_cgroup(request, kind, writer.pid))
    end_guard()
    with pytest.raises(SourceError):
        them.stop()
    before = memory.read_bytes()
    time.sleep(0.05)
    assert memory.read_bytes() != before
    them.close()
