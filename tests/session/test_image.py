"""Images in files: read and compared piece by piece, encoded and restored without a copy of memory in this process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import streams as s
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from pairs import noise
from support import Command

from remus_ckpt import Sender, batches, disk
from remus_ckpt.codec.reference import Lru, Shadow
from remus_ckpt.errors import RemusError
from remus_ckpt.image import Image, ImageReference, differences, full_batches, windows
from remus_ckpt.image_file import image_appearing
from remus_ckpt.limits import GIB, MIB
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.restorer import Restorer
from remus_ckpt.store import warm


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def write(path: Path, memory: Pages, size: int | None = None) -> Path:
    """An image with holes where memory is zeros."""
    with open(path, "wb") as file:
        for page in np.flatnonzero(memory.any(axis=1)).tolist():
            file.seek(page * PAGE_SIZE)
            file.write(memory[page].tobytes())
        file.truncate(memory.nbytes if size is None else size)
    return path


def series(pages: int, count: int) -> list[Pages]:
    """Memories that differ in runs, in single pages, in what becomes zeros; more than a batch and a window of each."""
    random = np.random.default_rng(pages)
    memory = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    memory[pages // 3 : pages // 2] = random.integers(0, 256, (pages // 2 - pages // 3, PAGE_SIZE), dtype=np.uint8)
    found = [memory.copy()]
    for number in range(1, count):
        memory[random.integers(0, pages, pages // 3), random.integers(0, PAGE_SIZE, pages // 3)] += 1
        memory[pages // 3 + number] = 0
        memory[pages - number] = random.integers(0, 256, PAGE_SIZE, dtype=np.uint8)
        found.append(memory.copy())
    return found


def test_reading_pads_with_zeros(tmp_path: Path) -> None:
    content = noise(1, 3).tobytes()
    for size in (0, 1, PAGE_SIZE, PAGE_SIZE + 1, len(content)):
        (tmp_path / "image").write_bytes(content[:size])
        with Image(tmp_path / "image") as image:
            out = np.full((5, PAGE_SIZE), 7, dtype=np.uint8)
            image.read(0, out)
            assert out.tobytes() == content[:size] + bytes(out.nbytes - size)
            image.read(1, out[:1])
            assert out[0].tobytes() == (content[:size] + bytes(2 * PAGE_SIZE))[PAGE_SIZE : 2 * PAGE_SIZE]


@pytest.mark.parametrize("knows_holes", [True, False])
def test_windows_cover_all_that_is_not_zeros(
    tmp_path: Path, knows_holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    one, other = (np.zeros((5000, PAGE_SIZE), dtype=np.uint8) for _ in range(2))
    one[[0, 1, 700, 4999]] = 1
    other[1100:3300] = 2
    with Image(write(tmp_path / "one", one)) as first, Image(write(tmp_path / "other", other)) as second:
        if not knows_holes:  # as of some file systems
            monkeypatch.setattr(os, "lseek", refuse)
        found = list(windows([first, second], 5000))
    covered = np.zeros(5000, dtype=int)
    for start, stop in found:
        assert 0 < stop - start <= 1024
        covered[start:stop] += 1
    assert covered.max() == 1 and covered[one.any(axis=1) | other.any(axis=1)].all()
    if knows_holes and (os.stat(tmp_path / "one").st_blocks < 5000):
        assert covered.sum() < 3000


@given(
    st.lists(st.tuples(st.integers(0, 299), st.integers(0, 2), st.integers(0, 2)), max_size=40),
    st.integers(299 * PAGE_SIZE + 1, 300 * PAGE_SIZE),
)
def test_differences_are_those_of_whole_memories(cells: list[tuple[int, int, int]], size: int) -> None:
    one, other = (np.zeros((300, PAGE_SIZE), dtype=np.uint8) for _ in range(2))
    for page, before, after in cells:
        one[page, 0], other[page, 0] = before, after
    with TemporaryDirectory() as name:
        paths = [write(Path(name) / str(number), memory, size) for number, memory in enumerate((one, other))]
        with Image(paths[0]) as before, Image(paths[1]) as after:
            numbers = [first + differ for first, differ, _, _ in differences(after, before, 300)]
            pages = [now[differ].tobytes() for _, differ, _, now in differences(after, before, 300)]
    expected = np.flatnonzero((one != other).any(axis=1))
    assert np.concatenate([np.empty(0, dtype=np.int64), *numbers]).tolist() == expected.tolist()
    assert b"".join(pages) == other[expected].tobytes()


@pytest.mark.parametrize("pages", [10, 1024, 3000])
@pytest.mark.parametrize("options", [{}, {"codec": "rle", "word": 4, "buffer_pages": 700}, {"reference": 40}])
def test_a_stream_from_files_is_that_from_memories(
    tmp_path: Path, command: Command, pages: int, options: dict[str, object]
) -> None:
    """The very bytes that a sender gives that has all of memory and a copy of it."""
    memories = series(pages, 3)
    size = pages * PAGE_SIZE - 100
    for memory in memories:
        memory.reshape(-1)[size:] = 0
    kept = options.get("reference")
    given = {name: value for name, value in options.items() if name != "reference"}
    sender = Sender(pages, reference=Lru(int(str(kept))) if kept else Shadow(zeros(pages)), **given)  # type: ignore[arg-type]
    expected = b""
    before = np.zeros_like(memories[0])
    for memory in memories:
        dirty = np.flatnonzero((memory != before).any(axis=1))
        for group in sender.checkpoint(batches(dirty, memory[dirty]), memory_bytes=size):
            expected += b"".join(map(bytes, group))
        before = memory
    images = [write(tmp_path / f"image{number}", memory, size) for number, memory in enumerate(memories)]
    words = ["--reference-pages", kept] if kept else []
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", value]
    assert command("encode", *images, "-o", tmp_path / "stream", *words).code == 0
    assert (tmp_path / "stream").read_bytes() == expected


def test_batches_are_full_but_for_the_last(tmp_path: Path) -> None:
    memory = np.zeros((6000, PAGE_SIZE), dtype=np.uint8)
    memory[::2, 9] = 1
    with Image(write(tmp_path / "image", memory)) as image:
        found = list(full_batches(differences(image, None, 6000)))
    assert [len(batch.pfns) for batch in found] == [1024, 1024, 952]
    assert np.concatenate([batch.pfns for batch in found]).tolist() == list(range(0, 6000, 2))
    # A sender keeps them until its page buffer is full: none may be written over.
    assert all((batch.data == memory[0]).all() for batch in found)


def test_an_image_that_changes_meanwhile_gives_no_stream(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = series(100, 3)
    images = [write(tmp_path / f"image{number}", memory) for number, memory in enumerate(memories)]
    choose = ImageReference.choose

    def change(self: ImageReference, *arguments: object) -> object:
        """Somebody writes to the first image while deltas are taken against it."""
        if self.before is not None and self.before.path == str(images[0]):
            with open(images[0], "r+b") as file:
                file.write(b"changed")
        return choose(self, *arguments)  # type: ignore[arg-type]

    os.utime(images[0], ns=(0, 0))
    monkeypatch.setattr(ImageReference, "choose", change)
    ran = command("encode", *images, "-o", tmp_path / "stream")
    assert ran.code == 1 and str(images[0]) in ran.err
    assert not (tmp_path / "stream").exists()


def test_a_file_that_is_cut_is_seen(tmp_path: Path) -> None:
    with Image(write(tmp_path / "image", noise(1, 4))) as image:
        image.check()
        image.check(4 * PAGE_SIZE)
        with pytest.raises(RemusError):
            image.check(3 * PAGE_SIZE)
        os.truncate(tmp_path / "image", PAGE_SIZE)
        out = np.full((4, PAGE_SIZE), 7, dtype=np.uint8)
        image.read(0, out)
        assert not out[1:].any()
        with pytest.raises(RemusError):
            image.check()


def test_what_a_file_gains_is_not_read(tmp_path: Path) -> None:
    """Behind the size that it had, memory is zeros; `check` says that it has changed."""
    with Image(write(tmp_path / "image", noise(1, 2), PAGE_SIZE + 10)) as image:
        with open(tmp_path / "image", "ab") as file:
            file.write(bytes([9]) * 2 * PAGE_SIZE)
        out = np.full((2, PAGE_SIZE), 7, dtype=np.uint8)
        image.read(1, out)
        assert out[0, :10].any() and not out.reshape(-1)[10:].any()
        with pytest.raises(RemusError):
            image.check()


# Memory that is restored


def test_zero_pages_of_a_first_checkpoint_stay_holes(tmp_path: Path, command: Command) -> None:
    """A real first checkpoint carries every page, most of them zeros; one may be sent again, and be zeros then."""
    pages = [s.page(0)] * 1000 + [s.page(1), s.page(2)]
    body = s.batch(8, [s.entry(pfn) for pfn in range(1002)], *pages)
    body += s.batch(8, [s.entry(pfn) for pfn in (1001, 1002, 1002)], s.page(0), s.page(3), s.page(0))
    (tmp_path / "stream").write_bytes(s.hvm_header(8, 2000) + body + s.END + s.hvm_tail())
    assert command("restore", tmp_path / "stream", "-o", tmp_path / "image").code == 0
    content = (tmp_path / "image").read_bytes()
    assert content == bytes(1000 * PAGE_SIZE) + s.page(1) + bytes(999 * PAGE_SIZE)
    assert (tmp_path / "image").stat().st_blocks * 512 < 20 * PAGE_SIZE


@pytest.mark.parametrize("cut", [1, 500])
def test_a_restorer_in_a_file_leaves_what_one_in_memory_does(tmp_path: Path, cut: int) -> None:
    memories = series(many(300, 1500), 4)
    sender = Sender(len(memories[0]))
    stream = bytearray()
    before = np.zeros_like(memories[0])
    for memory in memories:
        dirty = np.flatnonzero((memory != before).any(axis=1))
        for group in sender.checkpoint(batches(dirty, memory[dirty])):
            stream += b"".join(map(bytes, group))
        before = memory
    with image_appearing(tmp_path / "image") as home:
        restorer = Restorer(home=home)
        restorer.feed(stream[:-cut])
        restorer.feed_eof()
        assert [checkpoint.epoch for checkpoint in restorer.checkpoints()] == [0, 1, 2]
        assert os.listdir(tmp_path) != ["image"]
    assert os.listdir(tmp_path) == ["image"]
    assert (tmp_path / "image").read_bytes() == memories[2].tobytes()
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600


def test_an_image_that_does_not_come_to_be_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"dear")
    with pytest.raises(KeyError), image_appearing(tmp_path / "image") as home:
        home.open(10)
        raise KeyError
    assert os.listdir(tmp_path) == ["image"] and (tmp_path / "image").read_bytes() == b"dear"
    with pytest.raises(FileNotFoundError), image_appearing(tmp_path / "no" / "image"):
        pass


def test_a_full_disk_is_an_error_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError) as caught, image_appearing(tmp_path / "image") as home:
        memory = home.open(10)
        monkeypatch.setattr(warm, "write_pages", no_room)
        home.write(memory, np.array([3]), np.ones((1, PAGE_SIZE), dtype=np.uint8))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "image"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_native", [True, False])
def test_pages_go_to_their_places_in_a_file(is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_native and disk.native is None:
        pytest.skip("the extension was not built")
    if not is_native:
        monkeypatch.setattr(disk, "native", None)
    pages = np.random.default_rng(1).integers(0, 256, (8, PAGE_SIZE), dtype=np.uint8)
    index, numbers = np.array([0, 1, 3, 4, 5, 2, 3]), np.array([5, 6, 7, 0, 1, 2, 9])
    expected = bytearray(3 + 10 * PAGE_SIZE)
    for one, number in zip(index, numbers, strict=True):
        expected[3 + number * PAGE_SIZE : 3 + (number + 1) * PAGE_SIZE] = pages[one].tobytes()
    nothing = np.empty(0, dtype=np.int64)
    with open(tmp_path / "it", "w+b", buffering=0) as file:
        disk.write_pages(file.fileno(), pages, index, numbers, 3)
        disk.write_pages(file.fileno(), pages, nothing, nothing)
        assert file.read() == expected
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:
        disk.write_pages(full.fileno(), pages, index, numbers)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(disk.native is None, reason="the extension was not built")
@pytest.mark.parametrize(
    ("index", "numbers", "at"),
    [([8], [0], 0), ([-1], [0], 0), ([0], [-1], 0), ([0], [1 << 51], 0), ([0], [0], -1), ([0, 1], [0], 0)],
)
def test_pages_or_places_that_are_none_are_refused(
    index: list[int], numbers: list[int], at: int, tmp_path: Path
) -> None:
    pages = np.ones((8, PAGE_SIZE), dtype=np.uint8)
    with open(tmp_path / "it", "wb", buffering=0) as file, pytest.raises(ValueError):
        disk.write_pages(file.fileno(), pages, np.array(index), np.array(numbers), at)
    assert (tmp_path / "it").read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_restore_that_is_ended_leaves_nothing(tmp_path: Path, number: int) -> None:
    run = [sys.executable, "-m", "remus_ckpt", "restore", "-", "-o", str(tmp_path / "image")]
    with subprocess.Popen(run, stdin=PIPE, stderr=PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(s.hvm_header(8, 4) + s.batch(8, [s.entry(1)], s.page(1)))
        process.stdin.flush()
        deadline = time.monotonic() + 60
        # Once memory is there: the header has been read.
        while not any(path.stat().st_size for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
    assert process.returncode != 0 and os.listdir(tmp_path) == []


# Bounded memory


MEASURED = """
import sys
from remus_ckpt import cli
try:
    cli.main()
finally:
    sys.stderr.write(open("/proc/self/status").read())
"""


def start(*arguments: object, **files: Any) -> subprocess.Popen[str]:
    """A command that says on standard error how much memory it has had."""
    return subprocess.Popen([sys.executable, "-c", MEASURED, *map(str, arguments)], stderr=PIPE, text=True, **files)


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """The most memory that it has had, mapped files included."""
    _, status = process.communicate()
    assert process.returncode == 0, status
    return int(status.split("VmHWM:")[1].split()[0]) << 10


DENSE_PAGES = 200 * MIB // PAGE_SIZE


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images of 8 GiB, mostly holes, with 200 MiB of data of which every page changes."""
    folder = tmp_path_factory.mktemp("large")
    images = [folder / "one", folder / "other"]
    for number, path in enumerate(images):
        with open(path, "wb") as file:
            file.truncate(8 * GIB)
            for page in range(0, 8 * GIB, 512 * MIB):
                file.seek(page)
                file.write(b"here")
            file.seek(3 * GIB)
            page_of_it = bytes([number + 1]) * 8 + bytes([9]) * (PAGE_SIZE - 8)
            for _ in range(DENSE_PAGES // 64):
                file.write(page_of_it * 64)
    return images


def test_large_memories_take_little(large: list[Path]) -> None:
    with start("encode", *large, "-o", "-", stdout=PIPE) as encode:
        with start("verify", "-", stdin=encode.stdout, stdout=DEVNULL) as verify:
            assert encode.stdout is not None
            encode.stdout.close()
            assert peak_bytes(verify) < 128 * MIB
        assert encode.stderr is not None
        encode.stdout = None
        assert peak_bytes(encode) < 192 * MIB
    with start("diff", *large, stdout=DEVNULL) as diff:
        assert peak_bytes(diff) < 128 * MIB
