"""Any page of any checkpoint, found by the page index: it is the page that was stored, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import many
from store_support import PAGES, Source, commit, epochs, fill, memory_at

from remus_ckpt.errors import BadCheckpoint, NoCheckpoint
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, Retention, Store, page_records
from remus_ckpt.store.moment import Moment, index_pages
from remus_ckpt.store.page_index import DIRECTORY, PageIndex, owning
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.writer import EventWriter

COUNT = 150


@pytest.fixture(params=["native", "numpy"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read a page; each is the measure of the other."""
    if request.param == "numpy":
        monkeypatch.setattr(page_records, "native", None)
    elif page_records.native is None:
        pytest.skip("the C extension is not built")
    return str(request.param)


@pytest.fixture
def history(tmp_path: Path) -> History:
    with Store(tmp_path / "store").writer("orders", compact_bytes=None) as writer:
        source = fill(writer, COUNT)
        writer.compact(wait=True)
        fill(writer, 30, source)
    return Store(tmp_path / "store")["orders"]


def whole(history: History, epoch: int) -> np.ndarray:
    with history.moment(epoch) as moment:
        out = np.full((moment.pages, PAGE_SIZE), 7, dtype=np.uint8)
        moment.read(0, out)
        return out


def index_of(history: History, epoch: int) -> Path:
    return history.directory / DIRECTORY / history.find(epoch).segment


def test_every_epoch(history: History, how: str) -> None:
    for epoch in epochs(history):
        assert np.array_equal(whole(history, epoch), memory_at(epoch)), epoch


def test_pages_one_by_one(history: History, how: str) -> None:
    with history.moment(77) as moment:
        expected = memory_at(77)
        page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        for number in range(PAGES):
            moment.read(number, page)
            assert np.array_equal(page[0], expected[number])
        assert moment.read_bytes(4000, 5000) == expected.reshape(-1)[4000:9000].tobytes()
        assert moment.read_bytes(moment.memory_bytes - 3, 100) == expected.reshape(-1)[-3:].tobytes()
        assert moment.read_bytes(moment.memory_bytes + 3, 100) == b""


def test_what_it_carries(history: History) -> None:
    for epoch in (1, 60, COUNT - 2):
        changed = np.flatnonzero((memory_at(epoch) != memory_at(epoch - 1)).any(axis=1))
        with history.moment(epoch) as moment:
            assert np.array_equal(moment.carried, changed)
    with history.moment(0) as moment:
        assert len(moment.carried) >= PAGES // 2


def test_memory_is_filled_on_touch(history: History) -> None:
    memory = history.memory(100)
    expected = memory_at(100).reshape(-1)
    assert memory[5 * PAGE_SIZE] == expected[5 * PAGE_SIZE]
    assert np.array_equal(memory, expected)
    memory[:] = 3  # it is the caller's
    assert np.array_equal(history.memory(100), expected)
    assert np.array_equal(history.at(100).memory(), expected)


def test_memory_that_is_given_to_the_kernel(history: History, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(history.memory(33).data)
    assert (tmp_path / "out").read_bytes() == memory_at(33).tobytes()


def test_memory_without_userfaultfd(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_records, "native", None)
    assert np.array_equal(history.memory(100), memory_at(100).reshape(-1))


def test_memory_outlives_its_segment(history: History) -> None:
    memory = history.memory(100)
    moment = history.moment(99)
    with Store(history.directory.parent).writer("orders") as writer:
        assert writer.prune(Retention(count=1))
    assert np.array_equal(memory, memory_at(100).reshape(-1))
    assert moment.read_bytes(0, 10**9) == memory_at(99).tobytes()
    moment.close()
    with pytest.raises(NoCheckpoint):
        history.memory(100)
    index_pages(history, lambda: False)
    assert os.listdir(history.directory / DIRECTORY) == [*{history.contents()[0].name}, "lock"] or set(
        os.listdir(history.directory / DIRECTORY)
    ) == {history.contents()[0].name, "lock"}


def test_descriptors_are_given_back(history: History) -> None:
    history.memory(10)
    before = len(os.listdir("/proc/self/fd"))
    for epoch in range(20):
        memory = history.memory(epoch)
        assert memory[0] == memory_at(epoch)[0, 0]
        del memory
    for _ in range(200):
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        os.sched_yield()
    assert len(os.listdir("/proc/self/fd")) <= before + 6  # a thread that has just been told may not have ended yet


def test_the_index_is_found_again(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(history, 120)
    monkeypatch.setattr(PageIndex, "extend", lambda *_: pytest.fail("it is there"))
    for epoch in (0, 60, 120):
        assert np.array_equal(whole(history, epoch), memory_at(epoch))


def test_it_grows_with_its_segment(tmp_path: Path, how: str) -> None:
    with Store(tmp_path).writer("orders", compact_bytes=None) as writer:
        source = fill(writer, 20)
        history = Store(tmp_path)["orders"]
        for _ in range(5):
            newest = writer.position.epoch
            assert np.array_equal(whole(history, newest), memory_at(newest))
            fill(writer, 13, source)
            index = PageIndex.open(history.directory / DIRECTORY, history.contents()[0].name)
            assert index is not None and index.count == newest + 1
            index.close()
        for epoch in range(writer.position.epoch):
            assert np.array_equal(whole(history, epoch), memory_at(epoch))


@pytest.mark.parametrize("name", ["records", "heads", "checkpoints", "meta.json", "full"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "deep", "pipe"])
def test_a_damaged_index_is_built_anew(history: History, name: str, harm: str) -> None:
    whole(history, COUNT - 2)
    file = index_of(history, 5) / name
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif harm == "deep":
        file.write_bytes(b"[" * file.stat().st_size + b"[" * 3000)
    elif harm == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        data = bytearray(file.read_bytes())
        for at in range(0, len(data), 40):
            data[at] ^= 0x10
        file.write_bytes(data)
    for epoch in (0, 1, 70, COUNT - 2):
        assert np.array_equal(whole(history, epoch), memory_at(epoch)), epoch
        assert np.array_equal(history.restore(epoch).memory, memory_at(epoch))


@pytest.mark.parametrize("name", ["records", "heads"])
@pytest.mark.parametrize("who", ["reader", "reader beside a backup", "backup"])
def test_a_damaged_index_is_not_extended(history: History, name: str, who: str) -> None:
    whole(history, COUNT - 2)
    folder = index_of(history, 5)
    rows = folder / "checkpoints"
    index = PageIndex.open(folder.parent, folder.name)
    assert index is not None
    os.truncate(rows, rows.stat().st_size // index.count * (index.count - 1))  # it lacks the last checkpoint
    index.close()
    (folder / name).write_bytes(b" " * (folder / name).stat().st_size)
    if who == "backup":
        for _ in range(2):
            index_pages(history, lambda: False)
        index = PageIndex.open(folder.parent, folder.name)
        assert index is not None and index.covers(history.find(COUNT - 2))
        index.close()
    with owning(history.directory) if who == "reader beside a backup" else nullcontext():
        assert np.array_equal(whole(history, COUNT - 2), memory_at(COUNT - 2))


def test_every_byte_of_the_index(tmp_path: Path) -> None:
    """Whatever is flipped in it: the page that was stored, or a new index."""
    with Store(tmp_path / "store").writer("orders", compact_bytes=None) as writer:
        fill(writer, 12)
    history = Store(tmp_path / "store")["orders"]
    whole(history, 11)
    path = index_of(history, 11)
    shutil.copytree(path, tmp_path / "good")
    files = [(name, (path / name).stat().st_size) for name in ("records", "heads", "checkpoints", "meta.json")]
    spots = [(name, at) for name, size in files for at in range(0, size, many(101, 7))]
    for name, at in spots:
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "good", path)
        data = bytearray((path / name).read_bytes())
        data[at] ^= 1 << at % 8
        (path / name).write_bytes(data)
        assert np.array_equal(whole(history, 11), memory_at(11)), (name, at)


def test_a_changed_page_is_refused(history: History, how: str) -> None:
    whole(history, 100)
    entry = history.find(0)
    path = history.path_of(entry.segment)
    data = bytearray(path.read_bytes())
    at = data.find(memory_at(0)[3].tobytes())
    data[at + 1000] ^= 1
    path.write_bytes(data)
    with history.moment(100) as moment:
        for number in range(PAGES):
            page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
            if number != 3:
                moment.read(number, page)
                assert np.array_equal(page[0], memory_at(100)[number])
                continue
            with pytest.raises(BadCheckpoint) as caught:
                moment.read(number, page)
            assert caught.value.segment == entry.segment and caught.value.epoch is not None
    with pytest.raises(BadCheckpoint):
        history.restore(100)


def test_a_changed_page_ends_who_touches_it(history: History) -> None:
    """As a mapped file does whose disk fails: nobody goes on with other bytes."""
    if page_records.native is None:
        pytest.skip("the C extension is not built")
    whole(history, 100)
    path = history.path_of(history.find(100).segment)
    data = bytearray(path.read_bytes())
    data[data.find(memory_at(0)[3].tobytes()) + 1000] ^= 1
    path.write_bytes(data)
    ran = subprocess.run([sys.executable, "-c", _TOUCHING, str(history.directory)], capture_output=True, check=False)
    assert (ran.stdout, ran.returncode) == (b"fine\n", -signal.SIGBUS), ran
    assert b"page 3 " in ran.stderr


_TOUCHING = """
import sys
from remus_ckpt.store import History
memory = History(sys.argv[1]).memory(100).reshape(-1, 4096)
sum(int(memory[number].sum()) for number in range(len(memory)) if number != 3)
print("fine", flush=True)
memory[3, 0]
print("not fine")
"""


def test_a_fork_does_not_have_it(history: History) -> None:
    """Its pages would be zeros there: better none. What the parent has stays."""
    ran = subprocess.run([sys.executable, "-c", _FORKING, str(history.directory)], capture_output=True, check=False)
    assert (ran.stdout, ran.returncode) == (f"{signal.SIGSEGV:d} True True\n".encode(), 0), ran


_FORKING = """
import os, sys, threading, time
from remus_ckpt.store import History
memory = History(sys.argv[1]).memory(100)
whole = History(sys.argv[1]).restore(100).image
child = os.fork()
if not child:
    memory[0]
    os._exit(0)
_, status = os.waitpid(child, 0)
sleeper = os.fork()  # has copies of all descriptors
if not sleeper:
    time.sleep(60)
    os._exit(0)
same = (memory == whole).all()
del memory
deadline = time.monotonic() + 20
while threading.active_count() > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
print(os.WTERMSIG(status), same, threading.active_count() == 1)
os.kill(sleeper, 9)
"""


def test_without_a_thread_it_is_filled_at_once(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "memory":
            raise RuntimeError("can't start new thread")
        start(thread)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert np.array_equal(history.memory(100), memory_at(100).reshape(-1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_cut_short(history: History) -> None:
    whole(history, 100)
    entry = history.find(100)
    os.truncate(history.path_of(entry.segment), entry.start + 3)
    with pytest.raises(BadCheckpoint):
        history.moment(100)
    assert np.array_equal(whole(history, 99), memory_at(99))


def test_a_damaged_segment_is_not_indexed(history: History) -> None:
    entry = history.find(50)
    path = history.path_of(entry.segment)
    data = bytearray(path.read_bytes())
    data[entry.start + 30] ^= 1
    path.write_bytes(data)
    assert np.array_equal(whole(history, 49), memory_at(49))
    for epoch in (50, 51):
        with pytest.raises(BadCheckpoint):
            whole(history, epoch)
    index_pages(history, lambda: False)
    with Moment.open_indexed(history, history.find(49)) as moment:  # type: ignore[union-attr]
        assert moment.read_bytes(0, PAGE_SIZE) == memory_at(49)[0].tobytes()


def test_another_segment_of_that_name(history: History, tmp_path: Path) -> None:
    whole(history, 20)
    with Store(tmp_path / "other").writer("orders", compact_bytes=None) as writer:
        sender = Sender(PAGES)
        writer.begin(full=True)
        for epoch in range(30):
            memory = memory_at(epoch + 1000)
            parts = sender.checkpoint(batches(np.arange(PAGES), memory))
            commit(writer, b"".join(bytes(one) for group in parts for one in group), sender.position)  # type: ignore[arg-type]
    other = Store(tmp_path / "other")["orders"]
    shutil.copytree(index_of(history, 20).parent, other.directory / DIRECTORY)
    for epoch in (0, 20, 29):
        assert np.array_equal(whole(other, epoch), memory_at(epoch + 1000))


def test_hot_pages_get_full_forms(tmp_path: Path, how: str) -> None:
    """However often a page has changed, few bytes are read for it."""
    count = 200
    memory = np.zeros((4, PAGE_SIZE), dtype=np.uint8)
    versions = []
    with Store(tmp_path).writer("orders", compact_bytes=None) as writer:
        sender = Sender(4)
        writer.begin(full=True)
        for epoch in range(count):
            memory[0, :8] = np.frombuffer(struct.pack("<Q", epoch), dtype=np.uint8)
            memory[1, : 1 + epoch * 8 % 4000] = epoch
            memory[2] = epoch
            versions.append(memory.copy())
            parts = sender.checkpoint(batches(np.arange(4), memory))
            commit(writer, b"".join(bytes(one) for group in parts for one in group), sender.position)  # type: ignore[arg-type]
    history = Store(tmp_path)["orders"]
    for epoch in range(count):
        assert np.array_equal(whole(history, epoch), versions[epoch]), epoch
    index = PageIndex.open(history.directory / DIRECTORY, history.contents()[0].name)
    assert index is not None
    view = index.at(history.find(count - 1))
    depths = view.records["where"] >> np.uint64(48) & np.uint64(255)
    assert 60 < int(depths.max()) <= page_records.MAX_DELTAS + 1
    longest = view.records["chain"][depths > 0].astype(int)
    assert longest.max() <= page_records.MAX_CHAIN_BYTES + 4102
    index.close()


@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_both_codecs(tmp_path: Path, codec: str, how: str) -> None:
    with Store(tmp_path).writer("orders", compact_bytes=None) as writer:
        source = Source(codec=codec)
        writer.begin(full=True)
        fill(writer, 60, source)
    history = Store(tmp_path)["orders"]
    for epoch in range(60):
        assert np.array_equal(whole(history, epoch), memory_at(epoch))


def test_a_page_in_two_chunks(tmp_path: Path, how: str) -> None:
    """A stream from elsewhere may cut a page; its bytes are then in no single piece."""
    blocks = _split_stream()
    with Store(tmp_path).writer("orders", compact_bytes=None) as writer:
        writer.begin(full=True)
        versions = []
        for data, position, memory in blocks:
            commit(writer, data, position)
            versions.append(memory)
    history = Store(tmp_path)["orders"]
    for epoch, memory in enumerate(versions):
        assert np.array_equal(whole(history, epoch), memory), epoch


def _split_stream() -> Iterator[tuple[bytes, Position, np.ndarray]]:
    """Checkpoints whose COMPRESSED_DATA is cut into chunks of a few bytes."""
    sender, reader, writer = Sender(8), Reader(), EventWriter(8)
    position = None
    for epoch in range(6):
        memory = memory_at(epoch + 3, 8)
        for group in sender.checkpoint(batches(np.arange(8), memory)):
            for part in group:
                reader.feed(bytes(part))
        out = []
        while (event := reader.next_event()) is not None:
            if isinstance(event, events.CompressedData):
                pieces = [events.CompressedData(data=event.data[at : at + 5]) for at in range(0, len(event.data), 5)]
                out += [bytes(part) for piece in pieces for part in writer.write(piece)]
                continue
            if isinstance(event, events.TailHvm):
                assert event.record is not None
                after = Position.after(position, writer.digest(), b"")
                event = replace(event, record=replace(event.record, before=position, after=after))
                position = after
            out += [bytes(part) for part in writer.write(event)]
        assert position is not None
        yield b"".join(out), position, memory


def test_a_backup_of_another_user_is_read_without_writing(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert np.array_equal(whole(history, 10), memory_at(10))
    assert not (history.directory / DIRECTORY).exists()


def test_two_who_build(history: History) -> None:
    with owning(history.directory) as mine:
        assert mine is not None
        with owning(history.directory) as theirs:
            assert theirs is None
        assert np.array_equal(whole(history, 10), memory_at(10))  # in files without a name
        assert os.listdir(mine) == ["lock"]
    assert index_pages(history, lambda: False) == len(epochs(history)) + 1


def test_restore_reads_what_the_index_names(history: History) -> None:
    """A change in bytes that no page of the checkpoint comes from is found by `verify` alone."""
    whole(history, COUNT - 2)
    entry = history.find(40)
    path = history.path_of(entry.segment)
    data = bytearray(path.read_bytes())
    data[entry.end - 10] ^= 1  # in its digest
    path.write_bytes(data)
    assert np.array_equal(history.restore(100).memory, memory_at(100))
    with pytest.raises(BadCheckpoint):
        history.restore(100, verify=True)
    assert json.loads((index_of(history, 100) / "meta.json").read_text())["version"] == 1


def test_restore_gives_the_same_either_way(history: History, tmp_path: Path) -> None:
    whole(history, 100)
    one, other = history.restore(100), history.restore(100, verify=True)
    assert np.array_equal(one.memory, other.memory) and np.array_equal(one.pfns, other.pfns)
    for name in ("epoch", "start", "end", "page_count", "memory_bytes", "device_state", "record"):
        assert getattr(one, name) == getattr(other, name), name
    history.restore_image(tmp_path / "image", 100)
    assert (tmp_path / "image").read_bytes() == memory_at(100).tobytes()
    assert (tmp_path / "image").stat().st_blocks * 512 < PAGES * PAGE_SIZE
