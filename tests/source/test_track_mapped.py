"""A file that other processes write to through mappings: what they wrote is found, or is said not to be known."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import many
from tracking import needs_compiler, needs_tracking, racing_writers  # noqa: F401

from remus_ckpt.errors import Untracked
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.shared_file import MappedFile
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.mapped import FileWatch, rows_in

pytestmark = needs_tracking
PAGES = 32


class Mapper:
    """A mapping_process; the process that a FileWatch follows."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        self.fd = os.pidfd_open(process.pid)

    def open(self, name: str) -> int:
        return os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY)

    def do(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"done\n"

    def touch(self, *pages: int) -> None:
        self.do("; ".join(f"area[{page * PAGE_SIZE + 9}] += 1" for page in pages))


@contextmanager
def mapper(path: Path) -> Iterator[Mapper]:
    command = [sys.executable, str(Path(__file__).parents[1] / "mapping_process.py"), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        it = Mapper(process)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield it
        finally:
            process.kill()
            os.close(it.fd)


@pytest.fixture(params=["/dev/shm", "disk"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = Path(f"/dev/shm/remus-track-{os.getpid()}") if request.param == "/dev/shm" else tmp_path / "file"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    yield path
    path.unlink()


@pytest.fixture
def worker(path: Path) -> Iterator[Mapper]:
    with mapper(path) as it:
        yield it


@contextmanager
def watch_of(path: Path, workers: Sequence[Mapper], pages: int = PAGES) -> Iterator[FileWatch]:
    """Watching, and nothing was written yet."""
    fd = os.open(path, os.O_RDONLY)
    device, inode = as_listed(workers[0], path)
    watch = FileWatch(fd, device, inode, pages)
    try:
        watch.attach(workers)
        with pytest.raises(Untracked):
            watch.written(workers)
        assert not len(watch.written(workers))
        yield watch
    finally:
        watch.close()
        os.close(fd)


def as_listed(worker: Mapper, path: Path) -> tuple[tuple[int, int], int]:
    for line in Path(f"/proc/{worker.pid}/maps").read_text().splitlines():
        words = line.split()
        if words[-1] == str(path):
            major, _, minor = words[3].partition(":")
            return (int(major, 16), int(minor, 16)), int(words[4])
    raise AssertionError


def test_what_processes_write_is_found(path: Path, worker: Mapper) -> None:
    with mapper(path) as other, watch_of(path, [worker, other]) as watch:
        worker.touch(3, 30)
        other.touch(3, 4, 5)
        assert watch.written([worker, other]).tolist() == [3, 4, 5, 30]
        assert not len(watch.written([worker, other]))


def test_all_mappings_of_a_process_are_seen(path: Path, worker: Mapper, tmp_path: Path) -> None:
    """Parts of the file, at offsets, and one that can only be read."""
    worker.do(f"part = mmap.mmap(file, {4 * PAGE_SIZE}, offset={8 * PAGE_SIZE})")
    worker.do(f"rest = mmap.mmap(os.open({str(path)!r}, os.O_RDONLY), size, prot=mmap.PROT_READ)")
    worker.do("own = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)")
    # The path of another file holds the words by which mappings of this one are known.
    (major, minor), inode = as_listed(worker, path)
    other = tmp_path / f"a {major:02x}:{minor:02x} {inode} b"
    other.write_bytes(bytes(PAGES * PAGE_SIZE))
    worker.do(f"another = mmap.mmap(os.open({str(other)!r}, os.O_RDWR), 0); another[5 * 4096] = 1")
    with watch_of(path, [worker]) as watch:
        worker.do(f"part[{PAGE_SIZE}] = 1; own[{20 * PAGE_SIZE}] = 1; rest[{21 * PAGE_SIZE}]; another[6 * 4096] = 1")
        worker.touch(0)
        assert watch.written([worker]).tolist() == [0, 9], "a private one's writes do not reach the file"


MAP_ANEW = (
    "import ctypes; libc = ctypes.CDLL(None); address = ctypes.addressof(ctypes.c_char.from_buffer(area)); "
    "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]; "
    "libc.mmap(address, size, 3, mmap.MAP_SHARED | 16, file, 0); area[3 * 4096] = 1"
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("late = mmap.mmap(file, size); late[3 * 4096] = 1", "mappings"),
        ("own = mmap.mmap(file, size); area[3 * 4096] = 1; mappings.clear(); del area", "mappings"),
        ("area[3 * 4096] = 1; area.resize(size * 2); ", "mappings"),
        ("os.pwrite(file, b'x', 3 * 4096)", "system call"),
        ("os.posix_fallocate(file, 0, 4096)", "system call"),
        ("pid = os.fork() or (area.__setitem__(3 * 4096, 1), os._exit(0)); os.waitpid(pid, 0)", "child"),
        (MAP_ANEW, "remapped"),
    ],
    ids=["mmap", "munmap", "mremap", "pwrite", "fallocate", "child", "mapped anew"],
)
def test_what_is_not_known_for_sure_is_said_once(path: Path, worker: Mapper, change: str, says: str) -> None:
    with watch_of(path, [worker]) as watch:
        worker.do(change)
        with pytest.raises(Untracked, match=says):
            watch.written([worker])
        assert not len(watch.written([worker])), "all is known from there on"
        if "late" in change:
            worker.do("late[5 * 4096] = 1")
            assert watch.written([worker]).tolist() == [5]
        elif "clear" not in change:
            worker.touch(6)
            assert watch.written([worker]).tolist() == [6]


def test_a_process_without_a_mapping_is_never_known(path: Path, worker: Mapper) -> None:
    with watch_of(path, [worker]) as watch:
        worker.do("area[3 * 4096] = 1; mappings.clear(); del area")
        for _ in range(2):
            with pytest.raises(Untracked, match="does not have"):
                watch.written([worker])
        worker.do("area = mmap.mmap(file, size)")
        with pytest.raises(Untracked, match="mappings"):
            watch.written([worker])
        worker.touch(6)
        assert watch.written([worker]).tolist() == [6]


def test_processes_come_and_go(path: Path, worker: Mapper) -> None:
    with watch_of(path, [worker]) as watch:
        with mapper(path) as other:
            for _ in range(2):
                with pytest.raises(Untracked, match=f"{other.pid} is new"):
                    watch.written([worker, other])
            watch.attach([worker, other])
            with pytest.raises(Untracked, match="mappings"):
                watch.written([worker, other])
            other.touch(1)
            assert watch.written([worker, other]).tolist() == [1]
            other.touch(2)
        with pytest.raises(Untracked, match=f"{other.pid} has ended"):
            watch.written([worker])
        worker.touch(7)
        assert watch.written([worker]).tolist() == [7]


def test_a_process_that_executes_another_program_is_taken_in_anew(path: Path, worker: Mapper) -> None:
    with watch_of(path, [worker]) as watch:
        assert worker.process.stdin is not None and worker.process.stdout is not None
        worker.process.stdin.write(b"os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])\n")
        worker.process.stdin.flush()
        assert worker.process.stdout.readline() == b"ready\n"
        worker.touch(3)
        with pytest.raises(Untracked, match=f"process {worker.pid}"):
            watch.written([worker])
        worker.touch(3)
        with pytest.raises(Untracked, match="is new"):
            watch.written([worker])
        watch.attach([worker])
        with pytest.raises(Untracked, match="mappings"):
            watch.written([worker])
        worker.touch(5)
        assert watch.written([worker]).tolist() == [5]


def test_a_process_that_cannot_be_tracked_is_named(path: Path, worker: Mapper) -> None:
    with mapper(path) as other, watch_of(path, [worker]) as watch:
        # A userfaultfd cannot be had twice for the same memory.
        with watch_of(path, [other]):
            watch.attach([worker, other])
            for _ in range(2):
                with pytest.raises(Untracked, match=f"process {other.pid}"):
                    watch.written([worker, other])
        with pytest.raises(Untracked, match="mappings"):
            watch.written([worker, other])
        other.touch(2)
        assert watch.written([worker, other]).tolist() == [2]


@needs_compiler
def test_no_write_of_a_race_is_lost(path: Path, racing_writers: Path) -> None:  # noqa: F811
    """Three processes of four threads each, stopped now and then: what was copied is what a second reader sees."""
    pages, writes = 4096, many(300_000, 10_000_000)
    os.truncate(path, pages * PAGE_SIZE)
    code = (
        "import ctypes, threading; race = ctypes.CDLL({library!r}).race; "
        "race.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]; "
        "address = ctypes.addressof(ctypes.c_char.from_buffer(area)); "
        "them = threading.Thread(target=race, args=(address, {pages}, 4, {writes}, {seed})); them.start()"
    )
    memory = np.memmap(path, dtype=np.uint8, mode="r").reshape(pages, PAGE_SIZE)
    copy = np.zeros_like(memory)
    with ExitStack() as stack:
        workers = [stack.enter_context(mapper(path)) for _ in range(3)]
        watch = stack.enter_context(watch_of(path, workers, pages))
        for seed, worker in enumerate(workers):
            worker.do(code.format(library=str(racing_writers), pages=pages, writes=writes // 3, seed=seed + 1))
        rounds = 0
        is_over = False
        while not is_over:
            is_over = all(len(os.listdir(f"/proc/{worker.pid}/task")) == 1 for worker in workers)
            for worker in workers:
                os.kill(worker.pid, signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
            pfns = watch.written(workers)
            copy[pfns] = memory[pfns]
            rounds += 1
            assert (copy == memory).all(), f"round {rounds}"
            for worker in workers:
                os.kill(worker.pid, signal.SIGCONT)
        assert copy.any()


def test_closing_leaves_no_trace(path: Path, worker: Mapper) -> None:
    before = len(os.listdir("/proc/self/fd"))
    theirs = len(os.listdir(f"/proc/{worker.pid}/fd"))
    with watch_of(path, [worker]) as watch:
        worker.touch(1)
        watch.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(os.listdir(f"/proc/{worker.pid}/fd")) == theirs
    with watch_of(path, [worker]) as watch:
        worker.touch(1)
        assert watch.written([worker]).tolist() == [1]


def test_the_kernel_names_the_same_mappings_as_its_text(tmp_path: Path) -> None:
    """Shared ones of the file, through whatever descriptor; not private ones, nor those of other files."""
    path = tmp_path / "f"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    (tmp_path / "g").write_bytes(bytes(PAGE_SIZE))
    status = path.stat()
    device, inode = (os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino
    with ExitStack() as stack:

        def mapped(name: str, size: int, offset: int, flags: int, prot: int) -> None:
            with open(tmp_path / name, "rb" if prot == mmap.PROT_READ else "r+b") as file:
                area = mmap.mmap(file.fileno(), size, flags=flags, prot=prot, offset=offset)
            stack.callback(area.close)

        both = mmap.PROT_READ | mmap.PROT_WRITE
        mapped("f", 2 * PAGE_SIZE, 0, mmap.MAP_SHARED, both)
        mapped("f", PAGE_SIZE, 3 * PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        mapped("f", PAGE_SIZE, 0, mmap.MAP_PRIVATE, both)
        mapped("g", PAGE_SIZE, 0, mmap.MAP_SHARED, both)
        with open("/proc/self/maps", "rb", buffering=0) as maps:
            found = linux.shared_mappings(maps.fileno())
            if found is None:
                pytest.skip("needs Linux 6.11")
            told = rows_in(maps.readall(), device, inode)
        if not told:
            pytest.skip("the file system shows its files under another device in /proc/PID/maps")
        assert {one[:3] for one in found if (one.device, one.inode) == (device, inode)} == set(told)
        assert sorted(row.offset for row in told) == [0, 3 * PAGE_SIZE]


def test_a_page_is_asked_about_once_whether_it_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more after a hole was punched, by whatever call: to look at one would fill it."""
    path = Path(f"/dev/shm/remus-holes-{os.getpid()}")
    path.touch()
    os.truncate(path, PAGES * PAGE_SIZE)
    with ExitStack() as stack:
        stack.callback(path.unlink)
        worker = stack.enter_context(mapper(path))
        memory = stack.enter_context(closing(MappedFile(path)))
        watch = stack.enter_context(closing(memory.watch()))
        watch.attach([worker])
        asked: list[int] = []
        real = os.lseek
        monkeypatch.setattr(os, "lseek", lambda fd, at, how: asked.append(at // PAGE_SIZE) or real(fd, at, how))

        def looked_at(*pfns: int) -> list[bool]:
            if watch.is_open:
                with suppress(Untracked):
                    watch.written([worker])
            asked.clear()
            out = np.ones((len(pfns), PAGE_SIZE), dtype=np.uint8)
            return memory.read(np.array(pfns), out).any(axis=1).tolist()

        worker.touch(3, 5)
        before = path.stat().st_blocks
        assert looked_at(3, 4, 5) == [True, False, True] and set(asked) == {3, 4, 5}
        assert looked_at(3, 4, 5) == [True, False, True] and asked == [4]
        worker.do(f"area.madvise(mmap.MADV_REMOVE, {5 * PAGE_SIZE}, {PAGE_SIZE})")
        assert looked_at(3, 5) == [True, False] and set(asked) == {3, 5}
        assert path.stat().st_blocks < before, "the hole is one still"
        watch.close()
        assert looked_at(3) == [True] and asked == [3], "nobody would say that it has become one"
