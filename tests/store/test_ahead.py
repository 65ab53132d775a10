"""Space that is written ahead of a segment's data: where the data ends, whatever a death or a loss of power leaves."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_support import Source, commit, epochs, fill, memory_at, sha

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import HistoryWriter, Retention, Store, ahead, chain, index, pruning, segments
from remus_ckpt.store import history as history_module
from remus_ckpt.store.moment import Moment
from remus_ckpt.store.page_index import DIRECTORY
from remus_ckpt.store.unwritten import SECTOR, data_end, marks

AHEAD = 256 << 10


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is there from the first checkpoint on, wherever the tests lie, and no thread is needed."""
    monkeypatch.setattr(ahead, "WINDOW_S", 0.0)
    monkeypatch.setattr(ahead, "overwrites_in_place", lambda fd: True)
    monkeypatch.setattr(ahead, "start", lambda run: run())


def segment_of(writer: HistoryWriter) -> Path:
    return writer.history.path_of(writer.history.newest().segment)  # type: ignore[union-attr]


def forget_index(directory: Path) -> None:
    for path in directory.glob(f"{index.FILE}*"):
        path.unlink()


class Died:
    """A store whose writer has died after checkpoint 5, with space behind; `data` is checkpoint 6."""

    def __init__(self, store: Store, where: Path) -> None:
        self.where = where
        self._count = 0
        with store.writer("orders") as writer:
            self.source = fill(writer, 6)
            self.at = writer.position
            self.segment = segment_of(writer).relative_to(store.directory)
            shutil.copytree(store.directory, where / "kept")
        kept = where / "kept" / self.segment
        self.end = Store(where / "kept").history("orders").find(5).end
        self.size = kept.stat().st_size
        self.data = self.source.checkpoint(device_state=random.Random(1).randbytes(6000))
        assert self.size - self.end > len(self.data) + 4 * SECTOR

    def again(self, *, with_index: bool = True) -> tuple[Store, Path]:
        """A copy of it, and its segment."""
        self._count += 1
        shutil.rmtree(self.where / str(self._count - 1), ignore_errors=True)
        copy = self.where / str(self._count)
        shutil.copytree(self.where / "kept", copy)
        if not with_index:
            forget_index(copy / "orders")
        return Store(copy), copy / self.segment


@pytest.fixture
def died(store: Store, tmp_path: Path, at_once: None) -> Died:
    return Died(store, tmp_path / "died")


def put(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


# Where data ends


@given(
    data=st.binary(max_size=3 * SECTOR),
    start=st.integers(0, 3 * SECTOR),
    sectors=st.integers(0, 6),
    zeros=st.integers(0, 2 * SECTOR),
)
def test_data_ends_where_marks_begin(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int, sectors: int, zeros: int
) -> None:
    start = min(start, len(data))
    first = len(data) - len(data) % SECTOR
    whole = data + marks(first, (sectors + 1) * SECTOR).tobytes()[len(data) - first :]
    path = tmp_path_factory.mktemp("end") / "file"
    path.write_bytes(whole + bytes(zeros))
    with path.open("rb") as file:
        found = data_end(file.fileno(), start, len(whole) + zeros)
        if sectors and any(data[start:]):
            # By chance, the last bytes of data may be those that a mark has there.
            assert start <= found <= len(data)
            assert (
                found == len(data) or data[found:] == marks(first, SECTOR).tobytes()[found - first : len(data) - first]
            )
        assert not sectors or data_end(file.fileno(), len(data), len(whole)) == len(data)


def test_zeros_alone_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for rest in (
        bytes(9000),
        bytes(8192 - 700) + marks(8192, 4 * SECTOR).tobytes(),
        bytes(324) + marks(1024, 16 * SECTOR).tobytes(),
    ):
        path.write_bytes(b"x" * 700 + rest)
        size = path.stat().st_size
        with path.open("rb") as file:
            assert data_end(file.fileno(), 700, size) == 700
            assert data_end(file.fileno(), 699, size) > 700


def test_a_mark_is_good_at_its_own_place_only(tmp_path: Path) -> None:
    """Memory may hold a copy of a segment."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * SECTOR + marks(0, 4 * SECTOR).tobytes())
    with path.open("rb") as file:
        assert data_end(file.fileno(), SECTOR, 5 * SECTOR) == 5 * SECTOR


# A store in use


def test_a_live_store_shows_its_true_end(store: Store, tmp_path: Path, at_once: None) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 6)
        segment, history = segment_of(writer), store.history("orders")
        assert segment.stat().st_size >= history.find(5).end + AHEAD // 2
        for with_index in (True, False):
            if not with_index:
                forget_index(writer.directory)
            history = store.history("orders")
            assert epochs(history) == list(range(6)) and history.survey().lost == ()
            report = history.verify()
            assert report.is_good and report.unfinished_bytes == 0 and report.checkpoints == 6
            history.export(tmp_path / "stream")
            assert (tmp_path / "stream").stat().st_size == history.find(5).end
            assert [one.epoch for one in read_checkpoints(tmp_path / "stream", strict=True)] == list(range(6))
            assert memory_sha256(history.restore().memory) == sha(5)
        data = source.checkpoint()
        writer.feed(data[:-30])
        assert store.history("orders").verify().unfinished_bytes == len(data) - 30
        assert epochs(store.history("orders")) == list(range(6))
        writer.feed(data[-30:])
        writer.check(source.position)
        assert epochs(store.history("orders")) == list(range(7))  # whole, and soon durable
        writer.store()
        writer.apply()
    assert segment.stat().st_size == store.history("orders").find(6).end
    assert [one.epoch for one in read_checkpoints(segment, strict=True)] == list(range(7))


def test_overwriting_leaves_the_length_as_it_is(store: Store, at_once: None) -> None:
    """Otherwise there would be no gain."""
    with store.writer("orders") as writer:
        source = fill(writer, 2)
        segment = segment_of(writer)
        size = segment.stat().st_size
        fill(writer, 5, source)
        assert segment.stat().st_size == size
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(6)


@pytest.mark.parametrize("how", ["compaction", "another copy", "takeover", "close"])
def test_a_segment_that_has_ended_is_a_stream(store: Store, at_once: None, how: str) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 4)
        segment, end = segment_of(writer), store.history("orders").find(3).end
        assert segment.stat().st_size > end
        if how == "compaction":
            writer.compact(wait=True)
            fill(writer, 2, source)
        elif how == "another copy":
            fill(writer, 2)
        elif how == "takeover":
            writer.hand_out()
        else:
            writer.close()
        assert segment.stat().st_size == end
        assert [one.epoch for one in read_checkpoints(segment, strict=True)] == list(range(4))
        assert store.history("orders").verify().is_good
    with store.writer("orders") as writer:
        assert writer.warnings == []


def test_a_checkpoint_that_is_given_up_leaves_nothing(store: Store, at_once: None) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        data = source.checkpoint()
        writer.feed(data[:-1])
        writer.abandon()
        assert segment_of(writer).stat().st_size == store.history("orders").find(2).end
        writer.begin(full=False)
        commit(writer, data, source.position, step=100)
        fill(writer, 3, source)
        assert segment_of(writer).stat().st_size > store.history("orders").find(6).end
    assert epochs(store.history("orders")) == list(range(7)) and store.history("orders").verify().is_good


def test_checkpoints_and_space_come_at_the_same_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread never writes where a checkpoint has been, nor leaves a hole."""
    monkeypatch.setattr(ahead, "WINDOW_S", 0.0)
    monkeypatch.setattr(ahead, "overwrites_in_place", lambda fd: True)
    monkeypatch.setattr(ahead, "LEAST_BYTES", 8 << 10)
    monkeypatch.setattr(ahead, "PIECE_BYTES", SECTOR)
    with store.writer("orders", ahead_bytes=64 << 10) as writer:
        source = fill(writer, 1)
        for number in range(150):
            data = source.checkpoint()
            if number % 20 == 7:
                writer.feed(data[: len(data) // 2])
                writer.abandon()
                writer.begin(full=False)
            commit(writer, data, source.position, step=700)
            if number == 100:
                writer.compact(wait=True)
        report = store.history("orders").verify()
        assert report.is_good and report.newest is not None and report.newest.epoch == 150
        segment = segment_of(writer)
        end = report.newest.end
        rest = segment.read_bytes()[end:]
        first = end - end % SECTOR
        assert (
            rest == marks(first, -(-(end + len(rest) - first) // SECTOR) * SECTOR).tobytes()[end - first :][: len(rest)]
        )
    assert [one.epoch for one in read_checkpoints(segment, strict=True)][-1] == 150
    until = time.monotonic() + 10
    while any(thread.name == "ahead" for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    assert segment.stat().st_size == end


def test_much_goes_to_the_disk_early(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[tuple[int, int]] = []
    monkeypatch.setattr(chain, "start_writing", lambda fd, start, size: began.append((start, size)))
    with store.writer("orders") as writer:
        source = Source(pages=400)
        writer.begin(full=True)
        data = source.checkpoint()
        commit(writer, data, source.position, step=100_000)
    assert began and began[0][0] == 0 and all(size >= 256 << 10 for _, size in began)
    assert [start for start, _ in began[1:]] == [start + size for start, size in began[:-1]]


# Room


def test_a_full_disk_gets_it_back(store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pwrite, [2]

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if str(os.readlink(f"/proc/self/fd/{fd}")).endswith(".remus"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with store.writer("orders") as writer:
        source = fill(writer, 5)
        assert left[0] == -1, "tried again at once"
        assert segment_of(writer).stat().st_size == store.history("orders").find(4).end
        fill(writer, 2, source)
        assert writer.warnings == []
    assert store.history("orders").verify().is_good


def test_what_nobody_needs_is_given_back(store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.writer("orders") as writer:
        fill(writer, 3)
        segment, end = segment_of(writer), store.history("orders").find(2).end
        writer.make_room()
        assert segment.stat().st_size > end
        monkeypatch.setattr(ahead, "IDLE_S", 0.0)
        writer.make_room()
        assert segment.stat().st_size == end


def test_it_goes_before_any_checkpoint(store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that is to stay free is first looked for in space without data."""
    free = 1 << 40
    with store.writer("orders", retention=Retention(free=1 << 30)) as writer:
        source = fill(writer, 3)
        fill(writer, 3)
        old = store.history("orders").find(2)
        segment = segment_of(writer)

        def free_bytes(path: Path) -> int:
            return free if segment.stat().st_size == store.history("orders").newest().end else 1 << 20  # type: ignore[union-attr]

        monkeypatch.setattr(pruning, "free_bytes", free_bytes)
        assert segment.stat().st_size > store.history("orders").newest().end  # type: ignore[union-attr]
        writer.make_room()
        assert segment.stat().st_size == store.history("orders").newest().end  # type: ignore[union-attr]
        assert store.history("orders").find(2) == old and source is not None


@pytest.mark.parametrize("why", ["little is free", "it must stay free", "copied on write", "not wanted"])
def test_none_is_written(store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    free = 1 << 20 if why == "little is free" else 1 << 30
    monkeypatch.setattr(ahead, "free_bytes", lambda path: free)
    if why == "copied on write":
        monkeypatch.setattr(ahead, "overwrites_in_place", lambda fd: False)
    retention = Retention(free=free - 1000) if why == "it must stay free" else None
    with store.writer("orders", retention=retention, ahead_bytes=0 if why == "not wanted" else AHEAD) as writer:
        fill(writer, 3)
        assert segment_of(writer).stat().st_size == store.history("orders").find(2).end


def test_slow_checkpoints_get_none(store: Store) -> None:
    """The rate must be known first: a store that is opened for a moment is not written to in vain."""
    with store.writer("orders") as writer:
        fill(writer, 3)
        assert segment_of(writer).stat().st_size == store.history("orders").find(2).end


# Death, and loss of power


@pytest.mark.parametrize("with_index", [True, False])
def test_a_writer_that_died(died: Died, with_index: bool) -> None:
    """It has written some bytes of a checkpoint, or none, and marks follow."""
    for cut in [0, *range(1, len(died.data), 97), len(died.data) - 1]:
        store, segment = died.again(with_index=with_index)
        put(segment, died.end, died.data[:cut])
        report = store.history("orders").verify()
        assert report.is_good and report.newest is not None and report.newest.position == died.at
        assert cut - 1 <= report.unfinished_bytes <= cut  # by chance, the last byte may be that of the mark
        assert store.history("orders").survey().lost == () and epochs(store.history("orders")) == list(range(6))
        with store.writer("orders") as writer:
            assert writer.warnings == [] and writer.position == died.at and writer.stream is not None
            assert segment.stat().st_size == died.end
            writer.begin(full=False)
            commit(writer, died.data, died.source.position)
            assert writer.memory is not None and writer.memory.tobytes() == memory_at(6).tobytes()
        assert store.history("orders").verify().is_good


@pytest.mark.parametrize("with_index", [True, False])
def test_a_loss_of_power_keeps_any_sectors(died: Died, with_index: bool) -> None:
    """Whichever sectors of a checkpoint the disk has: it is whole, or never was, and nothing is called damaged."""
    dice = random.Random(1)
    rest = -died.end % SECTOR
    starts = [0, *range(rest, len(died.data), SECTOR)]
    pieces = [(start, died.data[start:stop]) for start, stop in itertools.pairwise([*starts, len(died.data)])]
    assert len(pieces) > 9 and rest >= 16, "choose another memory"
    everything = set(range(len(pieces)))
    for kept in [
        *({number} for number in everything),
        *(everything - {number} for number in everything),
        *({number for number in everything if dice.random() < 0.5} for _ in range(20)),
        everything,
    ]:
        store, segment = died.again(with_index=with_index)
        for number in kept:
            put(segment, died.end + pieces[number][0], pieces[number][1])
        report = store.history("orders").verify()
        is_whole = kept == everything
        assert report.is_good and report.newest is not None, kept
        assert report.newest.epoch == 5 + is_whole
        with store.writer("orders") as writer:
            assert writer.warnings == [] and writer.stream is not None, kept
            assert writer.position == (died.source.position if is_whole else died.at)
            if not is_whole:
                writer.begin(full=False)
                commit(writer, died.data, died.source.position)


def test_damage_is_the_same_with_and_without_space_behind(died: Died) -> None:
    """A flipped bit in the last checkpoint, which was acknowledged: what follows it says nothing for or against it."""
    start = Store(died.where / "kept").history("orders").find(5).start
    reported = 0
    for at in range(start, died.end, 7):
        said = []
        for is_cut in (True, False):
            store, segment = died.again(with_index=False)
            if is_cut:
                os.truncate(segment, died.end)
            byte = segment.read_bytes()[at]
            put(segment, at, bytes([byte ^ 0x10]))
            report = store.history("orders").verify()
            with store.writer("orders") as writer:
                said.append((report.is_good, bool(writer.warnings), writer.position, writer.stream))
                assert (segment.stat().st_size > start) == bool(writer.warnings)
        assert said[0] == said[1], at
        reported += not said[0][0]
    assert reported > 10


@pytest.mark.parametrize("way", ["marks", "zeros", "some marks"])
def test_what_the_index_names_is_lost_and_not_unwritten(died: Died, way: str) -> None:
    """A disk that did not keep what it had synced."""
    store, segment = died.again()
    start = store.history("orders").find(5).start
    first = start - start % SECTOR
    new = marks(first, 8 * SECTOR).tobytes()[start - first :] if way != "zeros" else bytes(died.end - start)
    put(
        segment,
        start if way != "some marks" else start + -start % SECTOR,
        new if way != "some marks" else marks(start + -start % SECTOR, SECTOR).tobytes(),
    )
    report = store.history("orders").verify()
    assert not report.is_good and report.bad[0].epoch == 5
    with pytest.raises(StoreError), store.writer("orders") as writer:
        assert len(writer.warnings) == 1 and writer.stream is None
        assert writer.position is not None and writer.position.epoch == 4 and writer.highest_epoch == 5
        writer.begin(full=False)


def test_a_record_further_on_is_no_torn_end(died: Died) -> None:
    """Checkpoint 7 was begun only after 6 was acknowledged: if 6 lacks bytes then, the disk has lost them."""
    store, segment = died.again(with_index=False)
    source = died.source
    both = died.data + source.checkpoint()
    hole = died.end + -died.end % SECTOR
    put(segment, died.end, both)
    put(segment, hole, marks(hole, SECTOR).tobytes())
    assert not store.history("orders").verify().is_good
    with store.writer("orders") as writer:
        assert len(writer.warnings) == 1 and writer.stream is None and writer.position == died.at


@pytest.mark.parametrize("with_index", [True, False])
def test_an_older_segment_that_was_not_cut(store: Store, tmp_path: Path, at_once: None, with_index: bool) -> None:
    """Its writer died, or the power went, between the new segment's name and the old one's length."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        old = segment_of(writer)
        space = old.read_bytes()
        writer.compact(wait=True)
        fill(writer, 2, source)
    end = old.stat().st_size
    old.write_bytes(space)
    if not with_index:
        forget_index(store.directory / "orders")
    assert store.history("orders").verify().is_good and store.history("orders").survey().lost == ()
    for _ in range(2):
        with store.writer("orders") as writer:
            assert writer.warnings == [] and old.stat().st_size == end and writer.stream is not None
    assert epochs(store.history("orders")) == list(range(5))


def test_a_sync_that_fails_leaves_no_more_than_before(
    store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        data = source.checkpoint()
        writer.feed(data)
        writer.check(source.position)
        with monkeypatch.context() as patch:

            def fdatasync(fd: int) -> None:
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, "fdatasync", fdatasync)
            with pytest.raises(StoreError):
                writer.store()
        writer.abandon()
        assert writer.stream is None
    with store.writer("orders") as writer:
        assert writer.warnings == [] and writer.position is not None and writer.position.epoch == 2


def test_a_reader_without_an_index_is_not_behind(store: Store, at_once: None) -> None:
    """The file keeps its length, and its time may be as coarse as a clock tick."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        segment, history = segment_of(writer), store.history("orders")
        for epoch in (2, 3):
            forget_index(writer.directory)
            os.utime(segment, ns=(0, 10**18))
            newest = history.survey().newest
            assert newest is not None and newest.epoch == epoch
            fill(writer, 1, source)


def test_a_mark_is_what_the_specification_says() -> None:
    assert marks(1024, SECTOR).tobytes() == (b"remus_ckpt: no data yet\n" + (1024).to_bytes(8, "little")) * 16


@pytest.mark.parametrize("name", ["open", "pwrite", "fdatasync"])
def test_space_that_fails_keeps_no_descriptor(
    store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nor a mapping, which has one: not even until the next collection of garbage."""
    with store.writer("orders") as writer:
        fill(writer, 1)
    real, failures = getattr(os, name), [0]

    def fail(first: int | str | Path, *more: object) -> object:
        if is_armed and (isinstance(first, int) or str(first).endswith(".remus")):
            failures[0] += 1
            raise OSError(errno.EIO, "Input/output error")
        return real(first, *more)

    is_armed = False
    monkeypatch.setattr(os, name, fail)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        with store.writer("orders") as writer:
            source = Source(position=writer.position)
            writer.begin(full=True)
            writer.feed(source.checkpoint())
            writer.check(source.position)
            writer.store()
            is_armed = True
            writer.apply()
            is_armed = False
            assert failures[0]
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        gc.enable()


def test_a_segment_that_ends_while_it_is_read(store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader has met marks, then come a checkpoint where they were, and the end of the segment."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        segment = segment_of(writer)
        left = [1]

        def late(fd: int, start: int, size: int) -> int:
            if left:
                fill(writer, left.pop(), source)
                writer.compact(wait=True)
            return data_end(fd, start, size)

        monkeypatch.setattr(segments, "data_end", late)
        found = segments.scan(segment, end=segment.stat().st_size)
        assert not left and found.fault is None and found.last is not None and found.last.epoch == 3


@pytest.mark.slow
def test_pages_of_what_lies_within_space_are_indexed(store: Store, at_once: None) -> None:
    """The process that does so must see that there is more, though the file does not grow."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        size, history = segment_of(writer).stat().st_size, store.history("orders")

        def wait_for(epoch: int) -> None:
            deadline = time.monotonic() + 60
            while (moment := Moment.open_indexed(history, history.find(epoch))) is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            moment.close()

        (writer.directory / DIRECTORY).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "remus_ckpt.store.indexer", str(store.directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            wait_for(2)
            time.sleep(0.1)
            fill(writer, 1, source)
            assert segment_of(writer).stat().st_size == size
            wait_for(3)
            process.stdin.close()


def test_a_writer_that_goes_on_while_its_segment_is_verified(
    store: Store, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is followed by checkpoints that were not there yet, in a file that has kept its length."""
    with store.writer("orders") as writer:
        source = fill(writer, 3)
        left = [0, 1, 3, 2]

        def late(fd: int, start: int, size: int) -> int:
            if left:
                fill(writer, left.pop(), source)
            return data_end(fd, start, size)

        monkeypatch.setattr(history_module, "data_end", late)
        while left:
            report = store.history("orders").verify()
            assert report.is_good and report.newest is not None
        assert report.newest.epoch == 8
