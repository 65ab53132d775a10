"""Who is stopped is who was meant, and the memory that is recorded is the memory that they use."""

from __future__ import annotations

import math
import os
import platform
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import writers
from support import process_state

from remus_ckpt.errors import PauseBroken, SourceError
from remus_ckpt.files import StreamWriter, read_checkpoints
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.pause import Capture
from remus_ckpt.sender import Sender
from remus_ckpt.source.cgroup import CgroupFreezer
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

PAGES = 4


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    return path


@contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs some Python, from its first line of output to the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "go") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


WORKER = """
import ctypes, mmap, os, sys, threading, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
def write(at):
    number = 0
    while True:
        number += 1
        memory[at : at + 8] = number.to_bytes(8, "little")
"""
BUSY = WORKER + "print('ready', flush=True)\nwrite(0)\n"
THREADS = (
    WORKER
    + """
for number in range(1, int(sys.argv[2])):
    threading.Thread(target=write, args=(512 * number,)).start()
"""
)


def holds_still(path: Path) -> bool:
    before = path.read_bytes()
    time.sleep(0.01)
    return path.read_bytes() == before


def threads_of(pid: int) -> set[str]:
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            found.add(Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# Threads


@pytest.mark.parametrize("threads", [1, 4])
def test_a_thread_that_ran_in_a_pause_is_found_though_it_is_stopped_again(memory: Path, threads: int) -> None:
    with python(THREADS + "print('ready', flush=True)\nwrite(0)\n", memory, threads) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        source.stopper.stop()
        source.stopper.check_stopped()
        before = memory.read_bytes()
        os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: memory.read_bytes() != before)
        os.kill(worker.pid, signal.SIGSTOP)
        wait_until(lambda: threads_of(worker.pid) == {"T"})
        with pytest.raises(PauseBroken, match=str(worker.pid)):
            source.stopper.check_stopped()
        source.stopper.resume()
        source.stopper.stop()
        source.stopper.check_stopped()
        source.stopper.resume()
        source.close()


def test_a_process_whose_first_thread_is_dead(memory: Path) -> None:
    """It has no memory to look at under its own number, and a state that is no stop."""
    number = {"x86_64": 60, "aarch64": 93}.get(platform.machine())
    if number is None:
        pytest.skip("exit(2) has another number here")
    code = THREADS + f"print('ready', flush=True)\nctypes.CDLL(None).syscall({number}, 0)\n"
    with python(code, memory, 3) as worker:
        wait_until(lambda: process_state(worker.pid) == "Z")
        source = SharedFile(memory, Processes([worker.pid], leaving_s=0.0))
        for _ in range(5):
            source.stopper.stop()
            assert holds_still(memory)
            source.stopper.check_stopped()
            source.stopper.resume()
            wait_until(lambda: not holds_still(memory))
        assert source.stopper.alive()
        source.close()


def test_threads_that_come_and_go(memory: Path) -> None:
    code = """
    print("ready", flush=True)
    while True:
        threads = [threading.Thread(target=lambda at: memory.__setitem__(at, 255 - memory[at]), args=(number,))
                   for number in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    with python(WORKER + textwrap.dedent(code), memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        for _ in range(50):
            source.stopper.stop()
            before = memory.read_bytes()
            time.sleep(0.001)
            assert memory.read_bytes() == before
            source.stopper.check_stopped()
            source.stopper.resume()
        source.close()


def test_more_threads_than_descriptors(memory: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = "for _ in range(40): threading.Thread(target=time.sleep, args=(1000,)).start()\nprint('ready', flush=True)\n"
    with python(WORKER + code, memory) as worker:
        limit = len(os.listdir("/proc/self/fd")) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            source = SharedFile(memory, Processes([worker.pid]))
            source.stopper.stop()
            assert holds_still(memory)
            source.stopper.check_stopped()
            source.stopper.resume()
            source.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


TRACER = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
for thread in sys.argv[1:]:
    assert libc.ptrace(0x4206, int(thread), None, None) == 0  # PTRACE_SEIZE
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def may_trace() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            with python(TRACER, sleeper.pid):
                pass
        except AssertionError:
            pytest.skip("no process may be traced here")
        finally:
            sleeper.kill()


@pytest.mark.usefixtures("may_trace")
def test_a_traced_process_is_refused_by_name_of_its_tracer(memory: Path) -> None:
    with python(BUSY, memory) as worker, python(TRACER, worker.pid) as tracer:
        with pytest.raises(SourceError, match=rf"{tracer.pid} \("):
            Processes([worker.pid])
        wait_until(lambda: not holds_still(memory))


@pytest.mark.usefixtures("may_trace")
def test_a_tracer_that_comes_later_ends_the_pauses_and_not_the_process(memory: Path) -> None:
    with python(THREADS + "print('ready', flush=True)\nwrite(0)\n", memory, 3) as worker:
        processes = Processes([worker.pid], patience_s=0.1)
        processes.stop()
        processes.resume()
        one = sorted(os.listdir(f"/proc/{worker.pid}/task"))[-1]
        with python(TRACER, one) as tracer, pytest.raises(SourceError, match=rf"{tracer.pid} \("):
            processes.stop()
        wait_until(lambda: not holds_still(memory))
        processes.stop()
        assert holds_still(memory)
        processes.check_stopped()
        processes.resume()
        processes.close()


@pytest.fixture
def group() -> Iterator[Path]:
    parent = writers.cgroup_mount()
    if parent is None:
        pytest.skip("no cgroup2 is mounted")
    with writers.own_cgroup(parent, f"remus-who-{os.getpid()}") as path:
        yield path
        (path / "cgroup.freeze").write_text("0")
        wait_until(lambda: "populated 0" in (path / "cgroup.events").read_text())


@pytest.mark.root
def test_a_frozen_process_is_told_of(memory: Path, group: Path) -> None:
    with python(BUSY, memory) as worker:
        (group / "cgroup.procs").write_text(str(worker.pid))
        processes = Processes([worker.pid], patience_s=0.1)
        (group / "cgroup.freeze").write_text("1")
        wait_until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        with pytest.raises(SourceError, match=str(group)):
            processes.stop()
        processes.close()
        with pytest.raises(SourceError, match=str(group)):
            Processes([worker.pid], patience_s=0.1)
        (group / "cgroup.freeze").write_text("0")
        processes = Processes([worker.pid], patience_s=0.1)
        processes.stop()
        assert holds_still(memory)
        processes.close()


@pytest.mark.root
def test_a_group_that_was_thawed_in_a_pause_is_found_though_it_is_frozen_again(memory: Path, group: Path) -> None:
    with python(BUSY, memory) as worker:
        (group / "cgroup.procs").write_text(str(worker.pid))
        freezer = CgroupFreezer(group)
        freezer.stop()
        freezer.check_stopped()
        before = memory.read_bytes()
        (group / "cgroup.freeze").write_text("0")
        wait_until(lambda: memory.read_bytes() != before)
        (group / "cgroup.freeze").write_text("1")
        wait_until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        with pytest.raises(PauseBroken):
            freezer.check_stopped()
        freezer.resume()
        freezer.stop()
        freezer.check_stopped()
        freezer.close()


def test_a_process_that_somebody_else_stops_between_two_pauses_stays_stopped(memory: Path) -> None:
    with python(BUSY, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        source.stopper.stop()
        source.stopper.resume()
        os.kill(worker.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(worker.pid) == "T")
        source.stopper.stop()
        source.stopper.check_stopped()
        source.stopper.resume()
        assert process_state(worker.pid) == "T"
        source.stopper.stop()
        source.close()
        assert process_state(worker.pid) == "T"


def test_init_is_refused() -> None:
    with pytest.raises(SourceError):
        Processes([1])


# Processes and their numbers


@pytest.mark.root
def test_a_number_that_was_given_to_a_stranger(memory: Path) -> None:
    """In a PID namespace of its own, where numbers can be chosen."""
    code = f"""
    import os, subprocess, sys, time
    from remus_ckpt.source.processes import Processes
    from remus_ckpt.source.shared_file import SharedFile
    worker = {BUSY!r}
    def start():
        process = subprocess.Popen([sys.executable, "-c", worker, sys.argv[1]], stdout=subprocess.PIPE)
        process.stdout.readline()
        return process
    one, two = start(), start()
    source = SharedFile(sys.argv[1], Processes([one.pid, two.pid]))
    source.stopper.stop(); source.stopper.check_stopped(); source.stopper.resume()
    one.kill(); one.wait()
    while True:
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(one.pid - 1))
        stranger = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        if stranger.pid == one.pid:
            break
        stranger.kill(); stranger.wait()
    for _ in range(3):
        source.stopper.stop()
        states = [open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] for pid in (stranger.pid, two.pid)]
        assert states == ["R", "T"], states
        source.stopper.check_stopped(); source.stopper.resume()
    print("well", len(source.stopper.death_fds()), flush=True)
    os._exit(0)
    """
    done = subprocess.run(
        [
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            sys.executable,
            "-c",
            textwrap.dedent(code),
            memory,
        ],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    if done.stderr.startswith("unshare: "):
        pytest.skip(done.stderr)
    assert done.stdout == "well 1\n", done.stderr


@pytest.mark.root
def test_the_proc_of_another_namespace_is_refused() -> None:
    code = """
    import subprocess
    from remus_ckpt.errors import SourceError
    from remus_ckpt.source.processes import Processes
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            Processes([sleeper.pid])
        except SourceError as error:
            print("refused" if "/proc" in str(error) else error)
        sleeper.kill()
    """
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    if done.stderr.startswith("unshare: "):
        pytest.skip(done.stderr)
    assert done.stdout == "refused\n", done.stderr


FORKS = """
for line in sys.stdin:
    if line == "fork\\n":
        if (child := os.fork()) == 0:
            write(int(512))
        print(child, flush=True)
    elif line == "fork twice\\n":
        if (child := os.fork()) == 0:
            if os.fork() == 0:
                write(1024)
            write(512)
        print(child, flush=True)
    elif line == "execute\\n":
        child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
        print(child, flush=True)
    elif line == "end\\n":
        os._exit(0)
"""


@pytest.mark.parametrize("how", ["fork", "fork twice"])
def test_children_that_inherit_the_memory_are_stopped_too(memory: Path, how: str) -> None:
    with python(WORKER + "print('ready', flush=True)\n" + FORKS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        source.stopper.stop()
        source.stopper.resume()
        tell(worker, how)
        child = int(said(worker))
        wait_until(lambda: not holds_still(memory))
        for _ in range(3):
            source.stopper.stop()
            assert holds_still(memory)
            source.stopper.check_stopped()
            source.stopper.resume()
            wait_until(lambda: not holds_still(memory))
        # It is found when it runs in a pause, as the others are.
        source.stopper.stop()
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: process_state(child) != "T")
        with pytest.raises(PauseBroken, match=str(child)):
            source.stopper.check_stopped()
        source.stopper.resume()
        # They go on when the one that was named is dead.
        tell(worker, "end")
        worker.wait()
        assert source.stopper.alive()
        source.stopper.stop()
        assert holds_still(memory)
        source.close()
        wait_until(lambda: not holds_still(memory))


def test_children_without_the_memory_are_left_alone(memory: Path) -> None:
    with python(WORKER + "print('ready', flush=True)\n" + FORKS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        tell(worker, "execute")
        child = int(said(worker))
        wait_until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
        for _ in range(2):
            source.stopper.stop()
            assert process_state(child) != "T"
            assert process_state(worker.pid) == "T"
            source.stopper.resume()
        source.close()


def test_children_run_on_when_the_one_who_stopped_them_is_killed(memory: Path) -> None:
    code = """
    import sys, time
    from remus_ckpt.source.processes import Processes
    from remus_ckpt.source.shared_file import SharedFile
    source = SharedFile(sys.argv[1], Processes([int(sys.argv[2])]))
    source.stopper.stop()
    print("ready", flush=True)
    time.sleep(1000)
    """
    with python(WORKER + "print('ready', flush=True)\n" + FORKS, memory) as worker:
        tell(worker, "fork")
        child = int(said(worker))
        with python(code, memory, worker.pid):
            assert process_state(child) == "T"
            # A service manager asks everybody to end first: the guard is needed still.
            os.kill(guard_of(memory), signal.SIGTERM)
        wait_until(lambda: process_state(child) != "T" and process_state(worker.pid) != "T")


def guard_of(memory: Path) -> int:
    """The guard whose parent works on some memory."""
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and b"guard.py" in (directory / "cmdline").read_bytes():
                parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
                if os.fsencode(memory) in Path(f"/proc/{parent}/cmdline").read_bytes():
                    return int(directory.name)
        except (OSError, IndexError):
            continue
    raise AssertionError("no guard")


# The memory


def test_a_file_that_is_replaced_under_its_name_is_an_error(memory: Path) -> None:
    with python(BUSY, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        source.stopper.stop()
        source.memory.check()
        source.stopper.resume()
        (memory.parent / "new").write_bytes(memory.read_bytes())
        (memory.parent / "new").rename(memory)
        source.stopper.stop()
        with pytest.raises(SourceError, match="replaced"):
            source.memory.check()
        source.close()


def test_a_file_that_is_unlinked_is_the_memory_still(memory: Path) -> None:
    with python(BUSY, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        wait_until(lambda: any(memory.read_bytes()))  # it has said that it is ready, and not written yet
        memory.unlink()
        for _ in range(3):
            source.stopper.stop()
            source.memory.check()
            assert source.tracker.written().tolist() == [0]
            source.stopper.check_stopped()
            source.stopper.resume()
        source.close()


def test_memory_without_a_name_of_its_own(tmp_path: Path) -> None:
    """A memfd is found by a descriptor of its process, which may be closed and used for something else."""
    code = """
    import mmap, os, sys
    fd = os.memfd_create("memory"); os.truncate(fd, 8192)
    memory = mmap.mmap(fd, 8192)
    os.dup2(fd, 100)
    print("ready", flush=True); sys.stdin.readline()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 100)
    memory[:3] = b"yes"
    print("ready", flush=True); sys.stdin.readline()
    """
    with python(code) as worker:
        source = SharedFile(f"/proc/{worker.pid}/fd/100", Processes([worker.pid]))
        tell(worker)
        assert said(worker) == "ready"
        source.stopper.stop()
        source.memory.check()
        assert source.tracker.written().tolist() == [0]
        source.close()


REMAPS = """
print("ready", flush=True)
for line in sys.stdin:
    if line == "lose\\n":
        memory.close(); file.close()
    elif line == "map\\n":
        file = open(sys.argv[1], "r+b"); memory = mmap.mmap(file.fileno(), 0)
    elif line == "lose, with the file open\\n":
        memory.close()
    elif line == "lose a part\\n":
        libc = ctypes.CDLL(None)
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + len(memory) - mmap.PAGESIZE
        libc.mmap(start, mmap.PAGESIZE, 3, mmap.MAP_PRIVATE | 0x10, file.fileno(), 0)  # MAP_FIXED
    elif line == "protect\\n":
        libc = ctypes.CDLL(None)
        libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), mmap.PAGESIZE, 1)
    elif line == "execute\\n":
        os.execlp("sleep", "sleep", "60")
    print("done", flush=True)
"""


def one_pause(source: SharedFile) -> None:
    source.stopper.stop()
    source.stopper.check_stopped()
    source.stopper.resume()


@pytest.mark.parametrize("how", ["lose", "lose, with the file open", "lose a part", "execute"])
def test_a_process_that_no_longer_has_the_memory_ends_it(memory: Path, how: str) -> None:
    with python(WORKER + REMAPS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid], leaving_s=0.0))
        one_pause(source)
        tell(worker, how)
        if how == "execute":
            wait_until(lambda: Path(f"/proc/{worker.pid}/comm").read_text() == "sleep\n")
        else:
            said(worker)
        with pytest.raises(SourceError, match="no longer has"):
            for _ in range(3):
                one_pause(source)
        assert process_state(worker.pid) != "T"
        source.close()


def test_a_process_that_maps_the_memory_again_is_followed(memory: Path) -> None:
    with python(WORKER + REMAPS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid], leaving_s=0.0))
        one_pause(source)
        tell(worker, "lose")
        said(worker)
        one_pause(source)
        tell(worker, "map")
        said(worker)
        for _ in range(3):
            one_pause(source)
        source.close()


def test_a_process_that_protects_its_pages_has_them(memory: Path) -> None:
    """As a collector of garbage does, or whoever looks for writes."""
    with python(WORKER + REMAPS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid], leaving_s=0.0))
        one_pause(source)
        tell(worker, "protect")
        said(worker)
        for _ in range(3):
            one_pause(source)
        source.close()


def test_where_the_kernel_cannot_be_asked_for_one_mapping_all_are_read(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.11."""
    from remus_ckpt.source import process as process_module

    monkeypatch.setattr(process_module, "maps_at", lambda *_: None)
    monkeypatch.setattr(process_module, "_LOOK_S", 0.0)  # how often a process is looked at is nobody's choice
    with python(WORKER + REMAPS, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid], leaving_s=0.0))
        for _ in range(3):
            one_pause(source)
        tell(worker, "lose")
        said(worker)
        with pytest.raises(SourceError, match="no longer has"):
            for _ in range(3):
                one_pause(source)
        source.close()


HOLDS = {
    "private": ("r+b", "mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)"),
    "private, of a file that is open to read": (
        "rb",
        "mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)",
    ),
    "read-only": ("rb", "mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)"),
    "open read-only": ("rb", "0"),
    "neither": (None, "0"),
}


@pytest.mark.parametrize("how", HOLDS)
def test_a_process_that_cannot_write_to_the_memory_is_refused(memory: Path, how: str) -> None:
    mode, area = HOLDS[how]
    opened = f"file = open(sys.argv[1], {mode!r})" if mode else ""
    code = f"import mmap, sys, time\n{opened}\narea = {area}\nprint('ready', flush=True)\ntime.sleep(1000)\n"
    with (
        python(code, memory) as worker,
        pytest.raises(SourceError, match=how.split(",", maxsplit=1)[0].rsplit(maxsplit=1)[-1]),
    ):
        SharedFile(memory, Processes([worker.pid]))


@pytest.mark.root
def test_a_group_that_cannot_write_to_the_memory_is_refused(memory: Path, group: Path) -> None:
    code = """
    import mmap, sys, time
    file = open(sys.argv[1], "r+b")
    area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    print("ready", flush=True)
    time.sleep(1000)
    """
    with python(code, memory) as worker:
        (group / "cgroup.procs").write_text(str(worker.pid))
        with pytest.raises(SourceError, match="private"):
            SharedFile(memory, CgroupFreezer(group))


@pytest.mark.root
def test_a_group_that_no_longer_has_the_memory_ends_it(memory: Path, group: Path) -> None:
    """Not while one of its processes has it, whichever that is."""
    with python(WORKER + REMAPS, memory) as one, python(WORKER + REMAPS, memory) as two:
        for worker in (one, two):
            (group / "cgroup.procs").write_text(str(worker.pid))
        source = SharedFile(memory, CgroupFreezer(group, leaving_s=0.0))
        for worker in (one, two):
            for _ in range(3):
                one_pause(source)
            tell(worker, "lose")
            said(worker)
        with pytest.raises(SourceError, match="any longer"):
            for _ in range(3):
                one_pause(source)
        source.close()


def test_a_process_that_reads_by_a_mapping_and_writes_by_a_descriptor_is_taken(memory: Path) -> None:
    code = """
    import mmap, sys, time
    file = open(sys.argv[1], "r+b")
    area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    print("ready", flush=True)
    time.sleep(1000)
    """
    with python(code, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        one_pause(source)
        source.close()


def test_one_that_maps_another_part_read_only_too_is_taken(memory: Path) -> None:
    code = """
    import mmap, sys, time
    file = open(sys.argv[1], "r+b")
    areas = [mmap.mmap(file.fileno(), 4096, access=access, offset=4096 * at)
             for at, access in enumerate((mmap.ACCESS_READ, mmap.ACCESS_COPY, mmap.ACCESS_WRITE))]
    print("ready", flush=True)
    time.sleep(1000)
    """
    with python(code, memory) as worker:
        SharedFile(memory, Processes([worker.pid])).close()


def test_a_file_of_the_same_number_elsewhere_is_not_the_memory(memory: Path, tmp_path: Path) -> None:
    """Inode numbers are one file system's own, and small ones are there on each."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system")
    from remus_ckpt.source.mappings import NONE, FileIdentity
    from remus_ckpt.source.process import Process

    with python(BUSY, memory) as worker, open(memory, "rb") as file:
        mine = FileIdentity.of(str(memory), file.fileno())
        major, minor = mine.device
        other = FileIdentity(mine.path, os.stat("/dev/null"), (major, minor + 1), mine.inode)
        found = Process(worker.pid).look(other)
        assert found is not None
        assert found.how == NONE


@pytest.mark.root
def test_a_process_whose_mappings_cannot_be_read_is_refused(memory: Path) -> None:
    """It may be stopped, for it is the same user's, and may not be looked at."""
    memory.chmod(0o666)
    memory.parent.chmod(0o755)
    hides = WORKER + "os.setuid(65534)\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\nprint('ready', flush=True)\nwrite(0)\n"
    code = """
    import os, sys
    from remus_ckpt.errors import SourceError
    from remus_ckpt.source.processes import Processes
    from remus_ckpt.source.shared_file import SharedFile
    fd = os.open(sys.argv[1], os.O_RDONLY)
    open(sys.argv[1], encoding="ascii").close()  # a user of its own may not see the standard library
    os.setuid(65534)
    try:
        SharedFile(f"/proc/self/fd/{fd}", Processes([int(sys.argv[2])]))
    except SourceError as error:
        print(error)
    """
    with python(hides, memory) as worker:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), memory, str(worker.pid)],
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
    assert "run as its user or as root" in done.stdout, done.stderr


# In the loop


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("way", ["copy", "encode"])
def test_a_broken_pause_is_taken_again_and_never_recorded(
    memory: Path, tmp_path: Path, times: int, way: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody lets the worker run and stops it again once its pages have been copied, or encoded."""
    with python(BUSY, memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))
        sender = Sender(source.memory.pages, reference=source.tracker.reference)
        broken = []
        seen: dict[int, bytes] = {}

        def breaking(take: Callable[..., Any]) -> Callable[..., Any]:
            def taken(pfns: np.ndarray, *rest: Any) -> Any:
                before = memory.read_bytes()
                pages = take(pfns, *rest)
                if seen and len(pfns) and len(broken) < times:
                    broken.append(before)
                    os.kill(worker.pid, signal.SIGCONT)
                    wait_until(lambda: not memory.read_bytes().startswith(before[:8]))
                    os.kill(worker.pid, signal.SIGSTOP)
                    wait_until(lambda: process_state(worker.pid) == "T")
                return pages

            return taken

        if way == "copy":
            monkeypatch.setattr(source.memory, "read", breaking(source.memory.read))
        else:
            monkeypatch.setattr(sender, "encode", breaking(sender.encode))
        loop = CheckpointLoop(
            source,
            sender,
            output := StreamWriter(tmp_path / "stream"),
            interval_s=0.002,
            max_pause_s=0 if way == "copy" else math.inf,
            on_paused=lambda epoch: seen.update({epoch: memory.read_bytes()}),
        )
        if times == 1:
            for _ in loop.run():
                if broken and len(seen) > 3:
                    break
        else:
            with pytest.raises(PauseBroken):
                list(loop.run())
        output.close()
        source.close()
        wait_until(lambda: process_state(worker.pid) != "T")
    taken = {one.epoch: one.memory.tobytes() for one in read_checkpoints(tmp_path / "stream", strict=True)}
    assert taken == seen
    assert broken
