"""The tracker that asks the kernel: a comparison finds what the kernel does not know, whatever goes wrong between."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tracking
from numpy.typing import NDArray
from support import writer_process
from tracking import in_fork, needs_tracking

from remus_ckpt.errors import SourceError, Untracked
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.own_memory import Buffers, OwnMemory
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.source.track.kernel import KernelTracker, ProcessesWatch

PAGES = 64


class Kernel:
    """A kernel that a test tells what to say."""

    def __init__(self) -> None:
        self.pages: set[int] = set()
        self.says: Exception | None = None
        self.is_watching = False
        self.renewed = 0
        self.closed = 0
        self.asked = 0

    def begin(self) -> None:
        self.is_watching = True
        self.pages.clear()

    def written(self) -> NDArray[np.int64]:
        self.asked += 1
        found = np.array(sorted(self.pages), dtype=np.int64)
        self.pages.clear()
        if self.says is not None:
            raise self.says
        return found

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None:
        self.closed += 1


class Subject:
    """Memory, a tracker of it, and what its sender would hold."""

    def __init__(self, audit: int = 0) -> None:
        self.memory = np.zeros(PAGES * PAGE_SIZE, dtype=np.uint8)
        self.buffers = Buffers({"it": self.memory})
        self.kernel = Kernel()
        self.tracker = KernelTracker(Compare(self.buffers), self.kernel, audit=audit)

    def write(self, page: int, *, is_seen: bool = True) -> None:
        self.memory[page * PAGE_SIZE + 3] += 1
        if is_seen:
            self.kernel.pages.add(page)

    def copy_first(self) -> None:
        for pfns, pages in self.tracker.copy_live():
            self.tracker.reference.pages[pfns] = pages

    def take(self) -> list[int]:
        found = self.tracker.written()
        self.tracker.reference.pages[found] = self.memory.reshape(-1, PAGE_SIZE)[found]
        self.tracker.taken()
        return [int(number) for number in found]

    def is_right(self) -> bool:
        return bool((self.tracker.reference.pages.reshape(-1) == self.memory).all())


@pytest.fixture
def subject() -> Subject:
    it = Subject()
    it.write(1)
    it.copy_first()
    assert it.take() == []
    assert it.tracker.way == "kernel"
    return it


def test_what_the_kernel_says_is_believed(subject: Subject) -> None:
    subject.write(3)
    subject.write(9)
    subject.kernel.pages.add(20)
    assert subject.take() == [3, 9, 20]
    assert subject.is_right()
    assert subject.take() == []
    assert subject.kernel.renewed == 3


def test_what_no_checkpoint_has_taken_is_named_again(subject: Subject) -> None:
    subject.write(3)
    assert subject.tracker.written().tolist() == [3]
    subject.write(2)
    assert subject.tracker.written().tolist() == [2, 3]
    subject.kernel.says = Untracked("no")
    subject.write(5, is_seen=False)
    assert subject.tracker.written().tolist() == [2, 3, 5]
    subject.kernel.says = None
    assert subject.take() == [2, 3, 5]
    assert subject.is_right()


def test_doubt_is_for_one_checkpoint(subject: Subject) -> None:
    subject.write(3, is_seen=False)
    subject.kernel.says = Untracked("a mapping is new")
    assert subject.take() == [3]
    assert (subject.tracker.way, subject.tracker.why) == ("compare", "a mapping is new")
    subject.kernel.says = None
    subject.write(4)
    assert subject.take() == [4]
    assert (subject.tracker.way, subject.tracker.why) == ("kernel", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SourceError("freed"), MemoryError()])
def test_an_exception_leads_to_a_comparison(subject: Subject, error: BaseException) -> None:
    """What the kernel has told and nobody has noted is lost to it."""
    subject.write(3)
    subject.kernel.says = error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        subject.tracker.written()
    subject.kernel.says = None
    assert subject.take() == [3]
    assert subject.tracker.way == "compare" and subject.tracker.why
    subject.write(4)
    assert subject.take() == [4]
    assert subject.tracker.way == "kernel"
    assert subject.is_right()


def test_a_first_copy_that_breaks_off_leads_to_a_comparison() -> None:
    subject = Subject()
    subject.write(1)
    copied = subject.tracker.copy_live()
    next(copied)
    copied.close()
    subject.write(2, is_seen=False)
    assert subject.take() == [2], "the copy has the other"
    assert subject.tracker.way == "compare"
    assert subject.is_right()


def test_it_begins_anew(subject: Subject) -> None:
    subject.write(3)
    before = subject.tracker.reference
    assert subject.tracker.restart() is subject.tracker.reference is not before
    assert subject.take() == [1, 3]
    assert subject.is_right()


def test_what_is_written_as_it_is_first_copied_is_found() -> None:
    subject = Subject()
    for pfns, pages in subject.tracker.copy_live():
        subject.tracker.reference.pages[pfns] = pages
        subject.write(0)
        subject.write(PAGES - 1)
    assert subject.take() == [0, PAGES - 1]
    assert subject.is_right()


def test_an_audit_finds_what_was_missed_and_ends_the_tracking() -> None:
    subject = Subject(audit=3)
    subject.copy_first()
    for number in range(1, 3):
        subject.write(number, is_seen=False)
        assert subject.take() == []
    subject.write(7)
    assert subject.take() == [1, 2, 7]
    assert subject.is_right()
    assert subject.tracker.missed_pages == 2
    assert subject.tracker.way == "compare" and "0x1" in subject.tracker.why
    assert subject.kernel.closed == 1
    asked = subject.kernel.asked
    subject.write(8, is_seen=False)
    assert subject.take() == [8]
    assert subject.kernel.asked == asked
    assert "0x1" in subject.tracker.why, "why it compares is still that"
    subject.tracker.close()


def test_an_audit_that_finds_nothing_goes_on() -> None:
    subject = Subject(audit=2)
    subject.copy_first()
    for number in range(6):
        subject.write(number)
        assert subject.take() == [number]
    assert subject.tracker.way == "kernel" and not subject.tracker.missed_pages


def test_an_audit_does_not_blame_the_kernel_for_what_is_still_to_be_taken() -> None:
    subject = Subject(audit=2)
    subject.copy_first()
    subject.write(3)
    assert subject.tracker.written().tolist() == [3]
    assert subject.tracker.written().tolist() == [3]
    assert not subject.tracker.missed_pages


# What it is made for


@needs_tracking
@pytest.mark.parametrize("how", ["auto", "kernel"])
def test_private_memory_is_found_by_the_kernel(how: str) -> None:
    array = np.zeros(PAGES * PAGE_SIZE, dtype=np.uint8)
    source = OwnMemory({"it": array}, tracking=how)  # type: ignore[arg-type]
    assert isinstance(source.tracker, KernelTracker)
    source.close()


@needs_tracking
def test_shared_memory_is_compared_unless_the_kernel_is_demanded() -> None:
    area = mmap.mmap(-1, PAGES * PAGE_SIZE)
    source = OwnMemory({"it": area})
    assert isinstance(source.tracker, Compare) and "shared" in source.tracker.why
    source.close()
    source = OwnMemory({"it": area}, tracking="kernel")
    assert isinstance(source.tracker, KernelTracker)
    source.close()


@needs_tracking
def test_memory_that_somebody_watches_is_compared() -> None:
    array = np.zeros(PAGES * PAGE_SIZE, dtype=np.uint8)
    first = OwnMemory({"it": array})
    other = OwnMemory({"it": array})
    assert isinstance(other.tracker, Compare) and "userfaultfd" in other.tracker.why
    with pytest.raises(Untracked):
        OwnMemory({"it": array}, tracking="kernel")
    first.close()
    other.close()


def test_without_the_kernels_help_all_is_compared(tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(bytes(PAGE_SIZE))

    def own(**options: str) -> object:
        return OwnMemory({"it": np.zeros(5)}, **options).tracker  # type: ignore[arg-type]

    def file(**options: str) -> object:
        return SharedFile(tmp_path / "memory", Processes([]), **options).tracker  # type: ignore[arg-type]

    def look(make: Callable[..., object]) -> Callable[[], str]:
        def work() -> str:
            number = tracking.CALLS.userfaultfd
            tracking.put_filter(tracking.filter_of(number, tracking.ERRNO | 38))
            tracker = make()
            assert isinstance(tracker, Compare)
            with pytest.raises(Untracked):
                make(tracking="kernel")
            return tracker.why

        return work

    for make in (own, file):
        assert "no userfaultfd" in in_fork(look(make))


def test_where_the_kernels_pages_are_larger_memory_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notes writes by its own pages; no process is touched for that."""
    (tmp_path / "memory").write_bytes(bytes(PAGE_SIZE))
    monkeypatch.setattr("mmap.PAGESIZE", 16384)
    for source in (OwnMemory({"it": np.zeros(5)}), SharedFile(tmp_path / "memory", Processes([]))):
        assert isinstance(source.tracker, Compare) and "16384" in source.tracker.why
        source.close()


@needs_tracking
def test_a_process_is_tracked(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(PAGES * PAGE_SIZE))
    with writer_process(memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        for _ in source.tracker.copy_live():
            pass
        source.stopper.stop()
        source.memory.check()
        source.tracker.written()
        assert (source.tracker.way, source.tracker.why) == ("kernel", "")
        source.stopper.resume()
        source.close()


CHILD = """
import mmap, os, sys, time
area = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
parent = os.getpid()
area[0] = 1
if os.fork():
    print("ready", flush=True)
    time.sleep(600)
number = 0
while os.getppid() == parent:
    number += 1
    area[5 * 4096 + number % 4096] = number % 251
    time.sleep(0.0005)
"""


@needs_tracking
def test_a_child_that_writes_is_compared_and_then_tracked(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE) as process:
        source = None
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            source = SharedFile(path, Processes([process.pid]))
            memory, tracker, stopper = source.memory, source.tracker, source.stopper
            for pfns, pages in tracker.copy_live():
                source.tracker.reference.pages[pfns] = pages  # type: ignore[union-attr]
            ways = []
            for _ in range(6):
                stopper.stop()
                memory.check()
                found = tracker.written()
                ways.append((tracker.way, found.tolist()))
                now = np.frombuffer(path.read_bytes(), dtype=np.uint8).reshape(-1, PAGE_SIZE)
                tracker.reference.pages[found] = now[found]  # type: ignore[union-attr]
                assert (tracker.reference.pages == now).all()  # type: ignore[union-attr]
                stopper.resume()
                tracker.taken()
                before = path.read_bytes()
                while path.read_bytes() == before:
                    time.sleep(0.001)
            assert ways[0][0] == "compare", "the child was not known"
            assert ways[-2:] == [("kernel", [5])] * 2
        finally:
            if source is not None:
                source.close()
            process.kill()


class Refusing:
    """A FileWatch whose processes cannot be followed."""

    def __init__(self) -> None:
        self.refused = ["process 7 is traced"]

    def attach(self, processes: object) -> None:
        pass

    def written(self, processes: object) -> NDArray[np.int64]:
        raise Untracked(self.refused[0])

    def close(self) -> None:
        pass


def test_one_who_cannot_be_tracked_is_an_error_only_where_the_kernel_is_demanded() -> None:
    watch: Any = Refusing()
    ProcessesWatch(watch, list, must=False).begin()
    with pytest.raises(Untracked, match="process 7"):
        ProcessesWatch(watch, list, must=True).begin()


def test_where_nobody_is_named_nothing_is_known() -> None:
    watch: Any = Refusing()
    with pytest.raises(Untracked, match="no writing process is named"):
        ProcessesWatch(watch, list, must=False).written()
