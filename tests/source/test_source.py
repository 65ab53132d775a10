"""Stopping real processes, and finding the dirty pages of a shared file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import end_guard, process_state, writer_process

from remus_ckpt.errors import SourceError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.guarded import Guard
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import MappedFile, SharedFile


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def wait_for(condition: object, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.005)
    return False


def test_every_thread_stops_and_runs_on(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(64 * PAGE_SIZE))
    with writer_process(memory, threads=4) as process:
        processes = Processes([process.pid])
        try:
            for _ in range(20):
                processes.stop()
                before = memory.read_bytes()
                time.sleep(0.002)
                assert memory.read_bytes() == before, "somebody wrote in the pause"
                processes.resume()
                assert wait_for(lambda before=before: memory.read_bytes() != before), "nobody writes after it"
        finally:
            processes.close()


def test_guard_resumes_when_the_one_who_stopped_dies(sleeper: subprocess.Popen[bytes]) -> None:
    code = (
        "import os, signal, sys\n"
        "from remus_ckpt.source.processes import Processes\n"
        "processes = Processes([int(sys.argv[1])])\n"
        "processes.stop()\n"
        "print('stopped', flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(sleeper.pid)], stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        assert recorder.stdout.readline() == b"stopped\n"
        assert process_state(sleeper.pid) == "T"
        recorder.kill()
    assert wait_for(lambda: process_state(sleeper.pid) != "T")


def test_guard_leaves_a_process_alone_that_was_not_stopped_by_us(sleeper: subprocess.Popen[bytes]) -> None:
    processes = Processes([sleeper.pid])
    processes.stop()
    processes.resume()
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert wait_for(lambda: process_state(sleeper.pid) == "T")
    processes.close()
    assert process_state(sleeper.pid) == "T"


def test_without_its_guard_nothing_is_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    processes = Processes([sleeper.pid])
    end_guard()
    with pytest.raises(SourceError):
        processes.stop()
    assert process_state(sleeper.pid) != "T"
    processes.close()


@pytest.mark.parametrize("refused", [signal.SIGSTOP, signal.SIGCONT])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_that_takes_no_signal_leaves_no_other_stopped(number: int, refused: signal.Signals) -> None:
    """A process that has become another user's: it takes no signal of ours any more."""
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    processes = Processes([one.pid for one in sleepers])
    other = processes.processes()[number]
    send = other.send

    def send_some(wanted: signal.Signals) -> None:
        if wanted == refused:
            raise SourceError("it may not be stopped any longer")
        send(wanted)

    other.send = send_some  # type: ignore[method-assign]
    try:
        with pytest.raises(SourceError, match="any longer"):
            processes.stop()
            processes.resume()
        others = [one for one in sleepers if one.pid != other.pid]
        assert wait_for(lambda: "T" not in {process_state(one.pid) for one in others})
    finally:
        processes.close()
        for one in sleepers:
            one.kill()
            one.wait()


def test_the_guard_resumes_the_others_where_one_cannot_be(sleeper: subprocess.Popen[bytes]) -> None:
    guard = Guard("continue")
    pidfd, no_process = os.pidfd_open(sleeper.pid), os.open(os.devnull, os.O_RDONLY)
    try:
        guard.stopping([no_process, pidfd])
        sleeper.send_signal(signal.SIGSTOP)
        assert wait_for(lambda: process_state(sleeper.pid) == "T")
        guard.close()
        assert wait_for(lambda: process_state(sleeper.pid) != "T")
    finally:
        os.close(pidfd)
        os.close(no_process)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="pipe"):
        MappedFile(tmp_path / "pipe")


def test_a_dead_process_is_no_error_in_a_pause(sleeper: subprocess.Popen[bytes]) -> None:
    processes = Processes([sleeper.pid])
    assert processes.alive()
    sleeper.kill()
    assert wait_for(lambda: not processes.alive())
    processes.stop()
    processes.resume()
    assert processes.death_fds() == []
    processes.close()


def test_a_process_is_recorded_by_one(sleeper: subprocess.Popen[bytes]) -> None:
    first = Processes([sleeper.pid])
    with pytest.raises(SourceError):
        Processes([sleeper.pid])
    first.close()
    Processes([sleeper.pid]).close()


def test_nobody_else_begins_before_the_guard_is_done(sleeper: subprocess.Popen[bytes]) -> None:
    """One that dies in a pause, with a guard that is late: the guard's SIGCONT must not end the next one's pause."""
    code = (
        "import os, signal, sys\n"
        "from remus_ckpt.source.processes import Processes\n"
        "processes = Processes([int(sys.argv[1])])\n"
        "guard = int(open(f'/proc/self/task/{os.getpid()}/children').read())\n"
        "print(guard, flush=True)\n"
        "os.kill(guard, signal.SIGSTOP)\n"
        "processes.stop()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(sleeper.pid)], stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        guard = int(recorder.stdout.readline())
    try:
        assert recorder.returncode == -signal.SIGKILL
        with pytest.raises(SourceError, match="recorded"):
            Processes([sleeper.pid])
    finally:
        os.kill(guard, signal.SIGCONT)
    processes = Processes([sleeper.pid])
    processes.stop()
    assert wait_for(lambda: not Path(f"/proc/{guard}").exists() or process_state(guard) == "Z")
    assert process_state(sleeper.pid) == "T"
    processes.close()


def test_the_next_one_waits_for_the_guard(sleeper: subprocess.Popen[bytes]) -> None:
    """One that dies in a pause, and another that begins at once: the guard is waited for, and nothing is in the way."""
    code = (
        "import os, signal, sys\n"
        "from remus_ckpt.source.processes import Processes\n"
        "processes = Processes([int(sys.argv[1])])\n"
        "processes.stop()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code, str(sleeper.pid)], check=False)
        processes = Processes([sleeper.pid])
        processes.stop()
        processes.check_stopped()
        processes.close()
        assert wait_for(lambda: process_state(sleeper.pid) != "T")


def test_a_process_that_is_stopped_already_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert wait_for(lambda: process_state(sleeper.pid) == "T")
    with pytest.raises(SourceError):
        Processes([sleeper.pid])
    assert process_state(sleeper.pid) == "T"


def test_a_pause_that_somebody_ends_is_noticed(sleeper: subprocess.Popen[bytes]) -> None:
    processes = Processes([sleeper.pid])
    processes.stop()
    processes.check_stopped()
    os.kill(sleeper.pid, signal.SIGCONT)
    assert wait_for(lambda: process_state(sleeper.pid) != "T")
    with pytest.raises(SourceError):
        processes.check_stopped()
    processes.resume()
    processes.close()


def test_a_process_that_does_not_have_the_file_is_refused(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (tmp_path / "memory").write_bytes(bytes(PAGE_SIZE))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SourceError):
        SharedFile(tmp_path / "memory", Processes([sleeper.pid]))
    assert os.listdir("/proc/self/fd") == before, "it has let go of both"


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1, 10**20], ids=["own", "beyond pid_max", "beyond a word"])
def test_processes_that_cannot_be_recorded(pid: int) -> None:
    with pytest.raises(SourceError):
        Processes([pid])


class Shared:
    """A shared file that the test itself writes to."""

    def __init__(self, path: Path, size: int) -> None:
        path.write_bytes(b"")
        os.truncate(path, size)
        self.path = path
        self.source = SharedFile(path, Processes([]))
        self.memory = self.source.memory
        self.tracker = self.source.tracker
        assert self.tracker.reference is not None
        self.shadow = self.tracker.reference.pages

    def write(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def written(self) -> list[int]:
        self.memory.check()
        return [int(number) for number in self.tracker.written()]

    def take(self) -> list[int]:
        """What a checkpoint would take; the shadow follows."""
        written = self.written()
        pages = self.memory.read(np.array(written, dtype=np.int64), np.ones((len(written), PAGE_SIZE), dtype=np.uint8))
        self.shadow[written] = pages
        image = self.path.read_bytes()
        image += bytes(-len(image) % PAGE_SIZE)
        assert self.shadow.tobytes() == image
        self.tracker.taken()
        return written


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"remus-test-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def test_dirty_pages_of_a_sparse_file(shm: Path) -> None:
    shared = Shared(shm, 5000 * PAGE_SIZE)
    assert shared.take() == []
    shared.write(7 * PAGE_SIZE + 5, b"x")
    shared.write(4999 * PAGE_SIZE + 4095, b"y")
    assert shared.take() == [7, 4999]
    assert shared.take() == []
    # To look at a hole must not fill it.
    assert shm.stat().st_blocks * 512 <= 64 * PAGE_SIZE
    shared.source.close()


def test_a_hole_anywhere_is_read_as_zeros_and_not_filled(shm: Path) -> None:
    shared = Shared(shm, 20 * PAGE_SIZE)
    shared.write(7 * PAGE_SIZE, b"x")
    shared.write(12 * PAGE_SIZE, b"y")
    shared.memory.check()
    before = shm.stat().st_blocks
    pfns = np.array([0, 6, 7, 8, 11, 12, 13, 19])
    pages = shared.memory.read(pfns, np.ones((len(pfns), PAGE_SIZE), dtype=np.uint8))
    assert pfns[pages.any(axis=1)].tolist() == [7, 12]
    assert shm.stat().st_blocks == before
    shared.source.close()


def test_a_page_that_becomes_a_hole_is_dirty(shm: Path) -> None:
    shared = Shared(shm, 64 * PAGE_SIZE)
    shared.write(0, b"\1" * 64 * PAGE_SIZE)
    assert len(shared.take()) == 64
    punch(shm, 3, 2)
    shared.write(10 * PAGE_SIZE, b"z")
    assert shared.take() == [3, 4, 10]
    shared.source.close()


def punch(path: Path, first: int, count: int) -> None:
    where = ["--offset", str(first * PAGE_SIZE), "--length", str(count * PAGE_SIZE)]
    subprocess.run(["fallocate", "--punch-hole", *where, path], check=True)


def test_a_page_that_becomes_a_hole_while_it_is_first_copied(shm: Path) -> None:
    shared = Shared(shm, 64 * PAGE_SIZE)
    shared.write(0, b"\1" * 64 * PAGE_SIZE)
    for pfns, pages in shared.tracker.copy_live():
        shared.shadow[pfns] = pages
    punch(shm, 3, 2)
    assert shared.take() == [3, 4]
    assert shared.take() == []
    shared.source.close()


def test_a_hole_stays_dirty_until_it_was_taken(shm: Path) -> None:
    """A checkpoint may break off before it comes to that page."""
    shared = Shared(shm, 64 * PAGE_SIZE)
    shared.write(0, b"\1" * 64 * PAGE_SIZE)
    assert len(shared.take()) == 64
    punch(shm, 5, 1)
    assert shared.written() == [5]
    assert shared.take() == [5]
    # One that is owed to the receiver is read though nothing has changed in it, and is not filled by that.
    before = shm.stat().st_blocks
    assert not shared.memory.read(np.array([4, 5]), np.ones((2, PAGE_SIZE), dtype=np.uint8))[1].any()
    assert shm.stat().st_blocks == before
    shared.source.close()


@pytest.mark.parametrize("size", [1, 4095, 4097, 10 * PAGE_SIZE + 7])
def test_sizes_that_are_no_multiple_of_a_page(tmp_path: Path, size: int) -> None:
    shared = Shared(tmp_path / "memory", size)
    shared.write(size - 1, b"e")
    assert shared.take() == [(size - 1) // PAGE_SIZE]
    shared.write(0, b"b")
    assert shared.take() == [0]
    assert shared.take() == []
    shared.source.close()


def test_a_file_that_shrinks_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "memory", 16 * PAGE_SIZE)
    os.truncate(shared.path, 4 * PAGE_SIZE)
    with pytest.raises(SourceError):
        shared.written()
    shared.source.close()


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        Shared(tmp_path / "memory", 0)


def test_only_the_pages_that_are_read_are_asked_about(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of all holes would take time by the size of the file, in each pause."""
    shared = Shared(shm, 4000 * PAGE_SIZE)
    for pfn in range(0, 4000, 2):
        shared.write(pfn * PAGE_SIZE, b"x")
    asked = []
    real = os.lseek
    monkeypatch.setattr(os, "lseek", lambda *arguments: asked.append(arguments) or real(*arguments))
    shared.memory.check()
    pages = shared.memory.read(np.array([10, 11, 3000]), np.ones((3, PAGE_SIZE), dtype=np.uint8))
    assert pages.any(axis=1).tolist() == [True, False, True]
    assert len(asked) <= 3
    monkeypatch.undo()
    shared.source.close()
