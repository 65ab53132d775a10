"""Tracking writes to one's own memory by the kernel: nothing that was written is left out."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tracking
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tracking import in_fork, needs_compiler, needs_tracking, racing_writers, without_query  # noqa: F401

from remus_ckpt.errors import SourceError, Untracked
from remus_ckpt.pages import PAGE_SIZE, pages_for
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.spans import Span, Spans, expand
from remus_ckpt.source.track.written import in_order, why_not

PAGES = 96
HUGE = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

Bytes = NDArray[np.uint8]


def address(array: Bytes) -> int:
    return int(array.ctypes.data)


def span_of(array: Bytes, name: str = "it", pfn: int = 0) -> Span:
    return Span(name, address(array), array.nbytes, pfn)


def mapped(size: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1) -> Bytes:
    return np.frombuffer(mmap.mmap(fd, size, flags=flags), dtype=np.uint8)


def file_of(path: Path | str, size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, size)
    return fd


@contextmanager
def memory_of(kind: str, size: int, folder: Path) -> Iterator[Bytes]:
    fd = -1
    if kind == "memfd":
        fd = os.memfd_create("tracked")
        os.ftruncate(fd, size)
    elif kind == "shm":
        fd = file_of(f"/dev/shm/remus-track-{os.getpid()}", size)
        os.unlink(f"/dev/shm/remus-track-{os.getpid()}")
    elif kind in ("file", "private file"):
        fd = file_of(folder / "file", size)
    try:
        if kind == "heap":
            yield np.zeros(size, dtype=np.uint8)
        elif kind == "anonymous":
            yield mapped(size)
        elif kind == "shared anonymous":
            yield mapped(size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        else:
            yield mapped(size, mmap.MAP_PRIVATE if kind == "private file" else mmap.MAP_SHARED, fd)
    finally:
        if fd >= 0:
            os.close(fd)


KINDS = ["heap", "anonymous", "shared anonymous", "memfd", "shm", "file", "private file"]


@contextmanager
def watched(*spans: Span) -> Iterator[Spans]:
    them = Spans(spans, shared=True)
    try:
        yield them
    finally:
        them.close()


@needs_tracking
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1, 4095, 1000])
def test_what_was_written_is_found(kind: str, offset: int, tmp_path: Path) -> None:
    """Against a model: each page that has a byte on an address page that was written. On a page border, those alone."""
    random = np.random.default_rng(offset)
    with memory_of(kind, PAGES * PAGE_SIZE, tmp_path) as whole:
        start = -address(whole) % PAGE_SIZE + offset
        array = whole[start : len(whole) - PAGE_SIZE - 77]
        with watched(span_of(array, pfn=1000)) as them:
            assert not len(them.written()), "never touched, and armed"
            for round_ in range(30):
                places = random.integers(0, len(array), round_)
                array[places] += 1
                touched = {(address(array) + place) // PAGE_SIZE for place in places.tolist()}
                first = address(array)
                expected = [
                    1000 + page
                    for page in range(pages_for(len(array)))
                    if touched
                    & {
                        (first + page * PAGE_SIZE) // PAGE_SIZE,
                        (first + min(page * PAGE_SIZE + 4095, len(array) - 1)) // PAGE_SIZE,
                    }
                ]
                assert them.written().tolist() == expected
                assert {1000 + place // PAGE_SIZE for place in places.tolist()} <= set(expected)
            array[:] = 1
            assert them.written().tolist() == list(range(1000, 1000 + pages_for(len(array))))
            them.arm()
            assert not len(them.written())


@needs_tracking
def test_more_runs_than_one_call_returns() -> None:
    array = mapped(20_000 * PAGE_SIZE)
    with watched(span_of(array)) as them:
        array[:: 2 * PAGE_SIZE] = 1
        assert them.written().tolist() == list(range(0, 20_000, 2))
        assert not len(them.written())


@needs_tracking
def test_several_on_one_page_and_their_neighbours() -> None:
    page = mapped(4 * PAGE_SIZE)
    one, other, far = page[100:5000], page[5000:5100], page[2 * PAGE_SIZE + 8 : 3 * PAGE_SIZE - 8]
    empty = page[0:0]
    with watched(span_of(other, "b", 7), span_of(one, "a", 2), span_of(empty, "e", 9), span_of(far, "c", 9)) as them:
        other[0] = 1
        assert them.written().tolist() == [7, 2, 3], "the pages of both that lie on that page"
        page[0] = 1
        assert them.written().tolist() == [2], "a neighbour's"
        page[3 * PAGE_SIZE - 1] = 1
        assert them.written().tolist() == [9]
        page[3 * PAGE_SIZE] = 1
        assert not len(them.written())


@needs_tracking
def test_writes_of_the_kernel_are_found(tmp_path: Path) -> None:
    """read() into the memory, and another process's write to it (which goes through ours)."""
    array = mapped(8 * PAGE_SIZE)
    ours, theirs = os.pipe()
    with watched(span_of(array)) as them:
        os.write(theirs, b"x")
        os.readv(ours, [array[3 * PAGE_SIZE : 3 * PAGE_SIZE + 1]])
        assert array[3 * PAGE_SIZE] == ord("x")
        assert them.written().tolist() == [3]
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), b"y", address(array) + 5 * PAGE_SIZE)
        assert array[5 * PAGE_SIZE] == ord("y")
        assert them.written().tolist() == [5]
    os.close(ours)
    os.close(theirs)


@needs_tracking
def test_memory_that_is_given_back_counts_as_written() -> None:
    """It reads as zeros then."""
    area = mmap.mmap(-1, 8 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(area, dtype=np.uint8)
    array[:] = 1
    with watched(span_of(array)) as them:
        area.madvise(mmap.MADV_DONTNEED, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        found = them.written().tolist()
        assert not array[2 * PAGE_SIZE]
        assert found == [2, 3]


@needs_tracking
def test_transparent_huge_pages_are_exact() -> None:
    area = mmap.mmap(-1, 3 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, dtype=np.uint8)
    array = whole[-address(whole) % HUGE :][: 2 * HUGE]
    array[:] = 1
    if huge_kib(address(array)) < 2 * HUGE // 1024:
        pytest.skip("no huge pages were given")
    with watched(span_of(array)) as them:
        array[3 * PAGE_SIZE + 5] = 2
        array[HUGE + 511 * PAGE_SIZE] = 2
        assert them.written().tolist() == [3, 512 + 511]
        array[4 * PAGE_SIZE] = 2
        assert them.written().tolist() == [4]
        assert not len(them.written())


def huge_kib(at: int) -> int:
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, _, stop = first.partition("-")
            is_here = int(start, 16) <= at < int(stop, 16)
        elif is_here and first == "AnonHugePages:":
            return int(rest.split()[0])
    return 0


@needs_tracking
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may reserve huge pages")
def test_hugetlbfs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = Path("/proc/sys/vm/nr_hugepages")
    before = reserved.read_text()
    reserved.write_text("2")
    try:
        try:
            array = mapped(HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
        except OSError:
            pytest.skip("no huge pages were given")
        small = mapped(PAGE_SIZE)
        for has_query in (True, False):
            if not has_query:
                without_query(monkeypatch)
            with pytest.raises(Untracked, match=r"'it'.*hugetlbfs"):
                Spans([span_of(array)])
            Spans([span_of(small)]).close()
        del array
    finally:
        reserved.write_text(before)


def map_fixed(at: int, size: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    assert _libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == at


def unmap(array: Bytes) -> None:
    assert _libc.munmap(address(array) + 2 * PAGE_SIZE, PAGE_SIZE) == 0


def remap(array: Bytes) -> None:
    map_fixed(address(array) + 2 * PAGE_SIZE, PAGE_SIZE)


def move(array: Bytes) -> None:
    free = mmap.mmap(-1, 8 * PAGE_SIZE)
    there = address(np.frombuffer(free, dtype=np.uint8))
    moved = _libc.mremap(address(array) + 2 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, 3, there)
    assert moved == there


def unmap_all(array: Bytes) -> None:
    assert _libc.munmap(address(array), array.nbytes) == 0


@needs_tracking
@pytest.mark.parametrize("change", [unmap, remap, move, unmap_all])
def test_memory_that_is_no_longer_there_is_an_error(change: Callable[[Bytes], None]) -> None:
    size = 8 * PAGE_SIZE
    at = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    array = np.frombuffer((ctypes.c_uint8 * size).from_address(at), dtype=np.uint8)
    with watched(span_of(array, "orders")) as them:
        array[0] = 1
        assert them.written().tolist() == [0]
        change(array)
        for _ in range(2):
            with pytest.raises(SourceError, match="'orders'"):
                them.written()


@needs_tracking
def test_an_array_that_numpy_moves_is_an_error() -> None:
    array = np.zeros(64 * HUGE // 8, dtype=np.uint64)
    with watched(span_of(array.view(np.uint8), "grown")) as them:
        before, size = array.ctypes.data, array.nbytes
        array.resize(len(array) * 4, refcheck=False)
        if array.ctypes.data == before:  # there was room behind it: it has only grown
            array[0] = 1
            assert 0 in them.written()
            return
        if linux.is_mapped(before // PAGE_SIZE * PAGE_SIZE, before + size):
            return  # the allocator keeps the memory: that the array is not there is seen by its address (OwnMemory)
        with pytest.raises(SourceError, match="'grown'"):
            them.written()


@needs_tracking
def test_what_is_protected_stays_watched_by_mprotect_and_growth() -> None:
    area = mmap.mmap(-1, 8 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(area, dtype=np.uint8)
    with watched(span_of(array)) as them:
        start = ctypes.c_void_p(address(array) + 2 * PAGE_SIZE)
        for rights in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            assert _libc.mprotect(start, ctypes.c_size_t(2 * PAGE_SIZE), rights) == 0
        array[3 * PAGE_SIZE] = 1
        assert them.written().tolist() == [3]


@needs_tracking
def test_a_fork_takes_nothing_from_its_parent() -> None:
    array = mapped(8 * PAGE_SIZE)
    array[:] = 1
    with watched(span_of(array)) as them:
        array[PAGE_SIZE] = 2

        def child() -> str:
            array[5 * PAGE_SIZE] = 3
            return str(them.written())

        assert in_fork(child).startswith("SourceError")
        array[2 * PAGE_SIZE] = 2
        assert them.written().tolist() == [1, 2]
        array[2 * PAGE_SIZE] = 4
        assert them.written().tolist() == [2]


@needs_tracking
def test_a_fork_does_not_keep_the_memory() -> None:
    array = mapped(4 * PAGE_SIZE)
    over, ours = os.pipe()
    is_there, there = os.pipe()
    with watched(span_of(array)):
        pid = os.fork()
        if not pid:
            os.write(there, b"x")
            os.close(ours)
            os.read(over, 1)
            os._exit(0)
        os.read(is_there, 1)
    try:
        with watched(span_of(array)) as them:
            array[PAGE_SIZE] = 1
            assert them.written().tolist() == [1]
    finally:
        for fd in (ours, over, is_there, there):
            os.close(fd)
        os.waitpid(pid, 0)


@needs_tracking
def test_memory_is_watched_by_one_at_a_time() -> None:
    """Each would take from the other what it has not seen yet."""
    array = mapped(4 * PAGE_SIZE)
    with watched(span_of(array[: PAGE_SIZE + 8], "one")) as them:
        with pytest.raises(Untracked):
            Spans([span_of(array[PAGE_SIZE + 8 :], "other")])
        array[0] = 1
        assert them.written().tolist() == [0], "the attempt has cost nothing"
    with watched(span_of(array[PAGE_SIZE + 8 :], "other")) as them:
        array[2 * PAGE_SIZE] = 1
        assert len(them.written())


@needs_tracking
def test_memory_that_can_only_be_read_is_refused(tmp_path: Path) -> None:
    """Whoever writes to it does so through another mapping."""
    (tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
    with open(tmp_path / "file", "rb") as file:
        area = mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ)
    array = np.frombuffer(area, dtype=np.uint8)
    with pytest.raises(Untracked, match="'it'"):
        Spans([span_of(array)], shared=True)


@needs_tracking
@pytest.mark.parametrize("has_query", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_is_refused_unless_it_is_demanded(
    kind: str, has_query: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_query:
        without_query(monkeypatch)
    with memory_of(kind, 4 * PAGE_SIZE, tmp_path) as array:
        if kind in ("heap", "anonymous", "private file"):
            Spans([span_of(array)]).close()
        else:
            with pytest.raises(Untracked, match="'it' is shared"):
                Spans([span_of(array)])


@needs_tracking
def test_closed_twice() -> None:
    array = mapped(PAGE_SIZE)
    them = Spans([span_of(array)])
    descriptors = os.listdir("/proc/self/fd")
    them.close()
    them.close()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors) - 2
    them = Spans([span_of(array)])
    del them
    assert len(os.listdir("/proc/self/fd")) == len(descriptors) - 2, "one that is dropped lets go, too"


@needs_tracking
@needs_compiler
def test_no_write_of_a_race_is_lost(racing_writers: Path) -> None:  # noqa: F811
    """Four threads write while another scans, then copies: in the end the copy is the memory."""
    pages, writes = 4096, many(1_000_000, 10_000_000)
    array = mapped(pages * PAGE_SIZE)
    words = array.view(np.uint64).reshape(pages, -1)
    copy = np.zeros_like(words)
    race = ctypes.CDLL(str(racing_writers)).race
    race.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    threads = threading.Thread(target=race, args=(address(array), pages, 4, writes, 1))
    with watched(span_of(array)) as them:
        threads.start()
        while threads.is_alive():
            pfns = them.written()
            copy[pfns] = words[pfns]
        threads.join()
        pfns = them.written()
        copy[pfns] = words[pfns]
        assert (copy == words).all()
        assert copy.any()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7))))
def test_expand(gaps: list[tuple[int, int]]) -> None:
    runs = []
    at = 0
    for gap, count in gaps:
        runs.append((at + gap, count))
        at += gap + count
    first, count = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    assert expand(first, count).tolist() == [number for first, count in runs for number in range(first, first + count)]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12))
def test_regions_in_any_order_become_runs(regions: list[tuple[int, int]]) -> None:
    array = np.array([(first, first + count) for first, count in regions], dtype=np.int64).reshape(-1, 2)
    runs = in_order(array)
    pages = expand(runs[:, 0], runs[:, 1]).tolist()
    assert pages == sorted({page for first, count in regions for page in range(first, first + count)})


# A kernel that cannot


@needs_tracking
@pytest.mark.parametrize(
    ("number", "argument", "answer", "says"),
    [
        (tracking.CALLS.userfaultfd, None, errno.ENOSYS, "no userfaultfd"),
        (tracking.CALLS.userfaultfd, None, errno.EPERM, "not permitted"),
        (tracking.IOCTL, linux.UFFDIO_API, errno.EINVAL, tracking.NEEDED),
        (tracking.IOCTL, linux.UFFDIO_REGISTER, errno.EINVAL, "cannot be watched"),
        (tracking.IOCTL, linux.PAGEMAP_SCAN, errno.ENOTTY, "6.7"),
    ],
)
def test_why_not(number: int, argument: int | None, answer: int, says: str) -> None:
    def look() -> str:
        tracking.put_filter(tracking.filter_of(number, tracking.ERRNO | answer, argument=argument))
        array = mapped(PAGE_SIZE)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Untracked) as raised:
            Spans([span_of(array)])
        assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left"
        assert str(raised.value)
        return str(why_not())

    assert says in in_fork(look)
