"""A store on a disk that is full, and on one that cannot be written: a clear error, nothing committed lost."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from services import until
from store_support import Source, commit, fill, memory_at, sha

from remus_ckpt.errors import StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import Store

pytestmark = pytest.mark.root

PAGES = 512
"""Half of them are used: 1 MiB, and as much again in the warm copy where that lies on the same disk."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


class Ballast:
    """Leaves so many bytes of a disk free."""

    def __init__(self, disk: Path, free: int) -> None:
        self.path = disk / "ballast"
        status = os.statvfs(disk)
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(status.f_bavail * status.f_frsize - free, 1))

    def drop(self) -> None:
        self.path.unlink()


def noisy(sender: Sender, pfns: np.ndarray, seed: int) -> tuple[bytes, bytes]:  # type: ignore[type-arg]
    """A checkpoint of pages of noise: its bytes, and those pages."""
    data = np.random.default_rng(seed).integers(0, 256, (len(pfns), PAGE_SIZE), dtype=np.uint8)
    groups = sender.checkpoint(batches(pfns, data))
    return b"".join(bytes(buffer) for group in groups for buffer in group), data.tobytes()


@pytest.mark.parametrize("free", [0, 1 << 16, 300_000, 700_000, 1_040_000, 1 << 20, 1_500_000])
def test_full_in_the_first_copy(disk: Path, free: int) -> None:
    """While data come, or while they go into the warm copy."""
    store = Store(disk / "store")
    with store.writer("orders") as writer:
        ballast = Ballast(disk, free)
        source = Source(PAGES)
        data = source.checkpoint()
        with pytest.raises(StoreError):
            writer.begin(full=True)
            writer.feed(data)
            writer.check(source.position)
        writer.abandon()
        assert writer.position is None and writer.history.entries() == []
        assert os.listdir(writer.directory / "segments") == [] and not [*(writer.directory / "warm").glob("memory-*")]
        ballast.drop()
        writer.begin(full=True)
        commit(writer, data, source.position)
        fill(writer, 2, source)
    assert memory_sha256(store.history("orders").restore().memory) == sha(2, PAGES)


@pytest.mark.parametrize("free", [0, 4096, 40_000])
def test_full_while_deltas_come(disk: Path, free: int) -> None:
    store = Store(disk / "store")
    sender = Sender(PAGES)
    with store.writer("orders") as writer:
        writer.begin(full=True)
        data, first = noisy(sender, np.arange(100), 2)
        assert sender.position is not None
        commit(writer, data, sender.position)
        held = sender.position
        ballast = Ballast(disk, free)
        data, later = noisy(sender, np.arange(100), 3)
        with pytest.raises(StoreError):
            writer.feed(data)
        writer.abandon()
        assert writer.position == held
        assert writer.memory is not None and writer.memory[:100].tobytes() == first
        assert writer.history.restore().memory[:100].tobytes() == first
        ballast.drop()
        # The stream goes on where it stood: the same bytes once more.
        writer.begin(full=False)
        commit(writer, data, sender.position)
        assert writer.memory[:100].tobytes() == later


def test_full_only_for_the_warm_copy(disk: Path, tmp_path: Path) -> None:
    """It lies on a disk of its own; a delta to a page that was a hole needs room there, and is refused before it is
    acknowledged: a store into a mapping without room would end the process."""
    store = Store(tmp_path / "store")
    sender = Sender(PAGES)
    with store.writer("orders", warm_directory=disk / "warm") as writer:
        data, first = noisy(sender, np.arange(50), 1)
        assert sender.position is not None
        writer.begin(full=True)
        commit(writer, data, sender.position)
        held = sender.position
        ballast = Ballast(disk, 8192)
        data, later = noisy(sender, np.arange(200, 300), 2)
        with pytest.raises(StoreError):
            writer.feed(data)
        with pytest.raises(StoreError):
            writer.check(sender.position)
        writer.abandon()
        assert writer.position == held and writer.history.newest() is not None
        # Of a tmpfs, looking at a hole through the mapping takes room: what holds no page is read through the file.
        assert writer.memory is not None and writer.memory[:50].tobytes() == first
        assert writer.image is not None and not any(writer.image.read_bytes()[200 * PAGE_SIZE :])
        ballast.drop()
        writer.begin(full=False)
        commit(writer, data, sender.position)
        assert writer.memory[200:300].tobytes() == later
        # A page that has room needs none.
        ballast = Ballast(disk, 0)
        data, last = noisy(sender, np.arange(200, 300), 3)
        commit(writer, data, sender.position)
        # A compaction looks at no hole.
        writer.compact(wait=True)
        assert writer.warnings == [] and writer.history.find().is_base
        assert writer.history.restore().memory[200:300].tobytes() == last
        ballast.drop()
    for path in (disk / "warm" / "orders").glob("memory-*"):
        path.unlink()
    ballast = Ballast(disk, 8192)
    with pytest.raises(StoreError):
        store.writer("orders", warm_directory=disk / "warm")
    ballast.drop()
    with store.writer("orders", warm_directory=disk / "warm") as writer:
        assert writer.position == sender.position


def test_full_for_the_index(disk: Path, tmp_path: Path) -> None:
    """The index is not the truth: checkpoints go on, and it is written when there is room."""
    directory = disk / "store" / "orders"
    directory.mkdir(parents=True)
    (tmp_path / "segments").mkdir()
    (directory / "segments").symlink_to(tmp_path / "segments")
    store = Store(disk / "store")
    with store.writer("orders", warm_directory=tmp_path / "warm") as writer:
        source = fill(writer, 2)
        ballast = Ballast(disk, 0)
        fill(writer, 300, source)
        assert len(writer.warnings) == 1
        assert [entry.epoch for entry in writer.history.entries()] == list(range(302))
        ballast.drop()
        # An index that failed is tried again only after some time: the longer a try took, the longer.
        until(lambda: fill(writer, 1, source) is source and index_rows(directory) > 302)
        ballast = Ballast(disk, 0)
        fill(writer, 300, source)
    assert index_rows(directory) < 603
    with store.writer("orders", warm_directory=tmp_path / "warm") as writer:
        assert writer.position == source.position and writer.stream is not None
        writer.begin(full=False)
        fill(writer, 2, source)
    ballast.drop()
    with store.writer("orders", warm_directory=tmp_path / "warm") as writer:
        assert writer.warnings == [] and writer.position == source.position
    assert index_rows(directory) == 605


def index_rows(directory: Path) -> int:
    database = sqlite3.connect(directory / "index.sqlite")
    try:
        return int(database.execute("SELECT count(*) FROM checkpoints").fetchone()[0])
    except sqlite3.Error:
        return 0
    finally:
        database.close()


def test_full_in_a_compaction(disk: Path) -> None:
    store = Store(disk / "store")
    with store.writer("orders") as writer:
        source = Source(PAGES)
        writer.begin(full=True)
        fill(writer, 3, source)
        for free in (60_000, 500_000):
            ballast = Ballast(disk, free)
            writer.compact(wait=True)
            assert not writer.compacting and len(writer.warnings) == 1
            assert len(os.listdir(writer.directory / "segments")) == 1
            fill(writer, 2, source)
            assert [entry.epoch for entry in writer.history.entries()] == list(range(source.position.epoch + 1))
            ballast.drop()
        writer.compact(wait=True)
        assert len(os.listdir(writer.directory / "segments")) == 2
        fill(writer, 1, source)
        assert memory_sha256(writer.history.restore().memory) == sha(source.position.epoch, PAGES)
        assert writer.history.verify().is_good


def test_full_for_the_state(disk: Path) -> None:
    store = Store(disk / "store")
    with store.writer("orders") as writer:
        writer.set_state(term=1)
        ballast = Ballast(disk, 0)
        with pytest.raises(StoreError):
            writer.set_state(term=2, filler="x" * 10_000)
        assert writer.state.term == 1 and store.history("orders").state.term == 1
        ballast.drop()
        writer.set_state(term=2)
    assert store.history("orders").state.term == 2


class Flood:
    """Takes the last byte and the last inode of a disk, again and again."""

    def __init__(self, disk: Path) -> None:
        self._folder = disk / "flood"
        self._folder.mkdir()
        self._names = itertools.count()
        self._file = open(self._folder / "bytes", "wb", buffering=0)  # noqa: SIM115
        self()

    def __call__(self) -> None:
        for size in (1 << 20, 4096, 4096, 4096):
            with pytest.raises(OSError, match="No space left"):
                while True:
                    self._file.write(bytes(size))
            os.fsync(self._file.fileno())
        with pytest.raises(OSError, match="No space left"):
            while True:
                (self._folder / str(next(self._names))).touch()

    def end(self) -> None:
        self._file.close()
        shutil.rmtree(self._folder)


@pytest.fixture(params=["tmpfs", "tmpfs of few inodes", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """File systems of a few MiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    if request.param == "ext4":
        image = tmp_path / "ext4"
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-N", "128", image], check=True)
        command = ["mount", "-o", "loop", image, mounted]
    else:
        inodes = ",nr_inodes=40" if request.param != "tmpfs" else ",nr_inodes=200"
        command = ["mount", "-t", "tmpfs", "-o", f"size=8m{inodes}", "tmpfs", mounted]
    subprocess.run(command, check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def test_full_to_the_last_byte_it_is_still_noted_who_may_act(small: Path) -> None:
    """A goodbye, a term, a promotion with its image, a takeover that is done: again and again, while something else
    takes all room that becomes free."""
    store = Store(small / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        flood = Flood(small)
        for term in range(1, 6):
            for change in (
                {"expects_primary": True, "term": term, "role": "standby"},
                {"expects_primary": False},
                {"fencing": term},
                {"role": "promoted", "takeover_done": False},
            ):
                writer.set_state(**change)
                flood()
            if term == 1:
                image, device_state = writer.hand_out()
                flood()
                assert image.read_bytes()[: 48 * PAGE_SIZE] == memory_at(2).tobytes()
                assert device_state.read_bytes() == b"dev2"
            writer.set_state(takeover_done=True)
            flood()
            state = store.history("orders").state
            assert state == writer.state and (state.term, state.role) == (term, "promoted")
            assert state.more["takeover_done"] and not state.more["expects_primary"]
        flood.end()
        assert memory_sha256(store.history("orders").restore().memory) == sha(source.position.epoch)
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.state == state


def test_the_room_is_there_again(small: Path) -> None:
    """What could not be kept on a full disk is kept as soon as there is some."""
    store = Store(small / "store")
    with store.writer("orders") as writer:
        fill(writer, 1)
    for path in [*small.glob("store/orders/*.spare"), *small.glob("store/orders/warm/*.spare")]:
        path.unlink()
    flood = Flood(small)
    flood.end()
    with store.writer("orders") as writer:
        flood = Flood(small)
        writer.set_state(term=1)
        writer.hand_out()
        flood.end()


def test_full_for_an_image(disk: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        source = Source(PAGES)
        writer.begin(full=True)
        fill(writer, 3, source)
        ballast = Ballast(disk, 100_000)
        for use in (writer.history.restore_image, writer.history.export):
            with pytest.raises(StoreError):
                use(disk / "out")
            assert os.listdir(disk) == ["ballast"]
        ballast.drop()
        writer.history.restore_image(disk / "out")
        assert os.listdir(disk) == ["out"]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_disk_that_cannot_be_written(disk: Path, tmp_path: Path, with_index: bool) -> None:
    store = Store(disk / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        writer.compact(wait=True)
        fill(writer, 2, source)
    if not with_index:
        for path in (disk / "store" / "orders").glob("index.sqlite*"):
            path.unlink()
    remount(disk, "ro")
    history = store.history("orders")
    assert [entry.epoch for entry in history.entries()] == list(range(5))
    assert memory_sha256(history.restore(1).memory) == sha(1)
    assert history.verify().is_good
    history.restore_image(tmp_path / "image")
    history.export(tmp_path / "stream")
    with pytest.raises(StoreError):
        store.writer("orders")
    with pytest.raises(StoreError):
        store.writer("others")
    remount(disk, "rw")
    with store.writer("orders") as writer:
        assert writer.position == source.position and writer.warnings == []
