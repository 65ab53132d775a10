"""What was reported is there after a loss of power, also where its writer died or a sync failed."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from power import Power
from store_support import PAGES, Source, fill, memory_at, sha

from remus_ckpt.errors import StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.backup import Backup
from remus_ckpt.store import HistoryWriter, Retention, Store
from remus_ckpt.store.state import load_state
from remus_ckpt.wire.record import Position

STORE = Path("srv/remus/store")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch, disk: Path) -> Power:
    return Power(monkeypatch, disk)


class After:
    """Looks at what a loss of power would leave, as often as asked."""

    def __init__(self, power: Power, where: Path) -> None:
        self._power, self._where, self._count = power, where, itertools.count()

    def __call__(self) -> Store:
        return Store(self._power.lose(self._where / str(next(self._count))) / STORE)


@pytest.fixture
def after(power: Power, tmp_path: Path) -> After:
    return After(power, tmp_path / "after")


def holds(store: Store, position: Position | None, term: int = 0) -> None:
    """It is there with its memory, and can be gone on from."""
    assert position is not None
    newest = store.history("orders").newest()
    assert newest is not None and newest.position == position
    assert memory_sha256(store.history("orders").restore().memory) == sha(position.epoch)
    assert store.history("orders").verify().is_good and store.history("orders").state.term == term
    with store.writer("orders") as writer:
        assert writer.position == position and writer.warnings == []


def die(writer: HistoryWriter) -> None:
    """As by SIGKILL: nothing is written any more."""
    writer.disown()


def segment_of(writer: HistoryWriter) -> Path:
    return sorted((writer.directory / "segments").glob("*.remus"))[-1]


@pytest.mark.parametrize("is_created", [True, False])
def test_all_that_is_reported_is_there(disk: Path, after: After, is_created: bool) -> None:
    store = Store(disk / STORE)
    if is_created:
        store.create()
        assert after().names() == []
    writer = store.writer("orders")
    assert after().names() == ["orders"]
    source = Source()
    writer.begin(full=True)
    for _ in range(3):
        writer.feed(source.checkpoint())
        writer.check(source.position)
        writer.store()
        holds(after(), source.position)
        writer.apply()
    writer.compact(wait=True)
    holds(after(), source.position)
    fill(writer, 1, source)
    holds(after(), source.position)
    source = fill(writer, 1)
    holds(after(), source.position)
    assert len(writer.prune(Retention(count=1))) == 2
    assert len(os.listdir(after().directory / "orders" / "segments")) == 1
    writer.set_state(term=1, role="promoted")
    assert after().history("orders").state.role == "promoted"
    _, device_state = writer.hand_out()
    left = after().directory / "orders"
    assert (left / "warm" / device_state.name).read_bytes() == device_state.read_bytes() == b"dev4"
    writer.set_state(takeover_done=True)
    assert load_state(after().directory / "orders").more["takeover_done"] is True
    writer.close()
    writer.history.restore_image(disk / "image")
    writer.history.export(disk / "stream")
    for name in ("image", "stream"):
        assert (after().directory.parents[2] / name).read_bytes() == (disk / name).read_bytes()


@pytest.mark.parametrize("depth", range(4))
def test_directories_of_a_maker_who_died(disk: Path, power: Power, after: After, depth: int) -> None:
    """Each was synced into its parent before the next was made; the last one was not."""
    path = disk
    for name in [*STORE.parts, "orders"][: depth + 1]:
        power.write_back()
        path /= name
        path.mkdir()
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 1)
        holds(after(), source.position)


def test_a_state_that_was_put_back_by_hand(disk: Path, after: After) -> None:
    store = Store(disk / STORE)
    with store.writer("orders") as writer:
        source = fill(writer, 1)
    path = writer.directory / "store.json"
    path.write_text(path.read_text().replace('"term": 0', '"term": 5'))
    with store.writer("orders"):
        holds(after(), source.position, term=5)


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("is_base", [True, False])
def test_what_a_dead_process_has_not_synced(disk: Path, after: After, is_base: bool, with_index: bool) -> None:
    """It is found in the page cache, is called durable, and so it has to be."""
    store = Store(disk / STORE)
    with store.writer("orders") as writer:
        source = fill(writer, 3)
    segment = segment_of(writer)
    if is_base:
        source = Source(position=source.position)
        segment = segment.with_name(f"{3:020}-000001.remus")
    with open(segment, "ab") as file:
        file.write(source.checkpoint())
    if not with_index:
        for path in writer.directory.glob("index.sqlite*"):
            path.unlink()
    with store.writer("orders") as writer:
        assert writer.position == source.position
        holds(after(), source.position)
        writer.begin(full=False)
        fill(writer, 1, source)
        holds(after(), source.position)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("segments", [2, 70])
def test_a_copy_of_a_store(disk: Path, power: Power, after: After, tmp_path: Path, segments: int, fails: bool) -> None:
    """Whoever copied it synced nothing, and the index names all that it holds."""
    with Store(tmp_path / "original").writer("orders") as writer:
        for _ in range(segments):
            source = fill(writer, 1)
        writer.compact(wait=True)
    shutil.copytree(tmp_path / "original", disk / STORE)
    if fails:
        oldest = min((disk / STORE / "orders" / "segments").iterdir()).name
        with power.failing(lambda path: path.name == oldest), pytest.raises(StoreError, match=oldest):
            Store(disk / STORE).writer("orders")
        return
    with Store(disk / STORE).writer("orders"):
        holds(after(), source.position)
        assert len(after().history("orders")) == segments


@pytest.mark.parametrize("with_index", [True, False])
def test_a_sync_that_failed_and_a_death(disk: Path, power: Power, after: After, with_index: bool) -> None:
    """The next one's sync would succeed, and prove nothing."""
    store = Store(disk / STORE)
    writer = store.writer("orders")
    source = fill(writer, 3)
    writer.feed(source.checkpoint())
    writer.check(source.position)
    with power.failing(lambda path: path.suffix == ".remus"), pytest.raises(StoreError):
        writer.store()
    die(writer)
    if not with_index:
        for path in writer.directory.glob("index.sqlite*"):
            path.unlink()
    with power.failing(lambda path: path.suffix == ".remus"), pytest.raises(StoreError):
        store.writer("orders")
    with store.writer("orders") as writer:
        assert writer.position == source.position
        holds(after(), source.position)


def test_nothing_follows_a_sync_that_failed(disk: Path, power: Power, after: After) -> None:
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 3)
        held = writer.position
        data = source.checkpoint()
        writer.feed(data)
        writer.check(source.position)
        with power.failing(lambda path: path.suffix == ".remus"), pytest.raises(StoreError):
            writer.store()
        writer.abandon()
        assert writer.position == held and writer.stream is None
        with pytest.raises(StoreError):
            writer.begin(full=False)
        holds(after(), held)
        source = fill(writer, 2)
        holds(after(), source.position)


def test_the_cut_of_what_never_came_to_its_end(disk: Path, power: Power, after: After) -> None:
    """Were it there again behind a segment that is no longer the newest, that would count as damage."""
    store = Store(disk / STORE)
    with store.writer("orders") as writer:
        source = fill(writer, 3)
    with open(segment_of(writer), "ab") as file:
        file.write(source.checkpoint()[:-10])
    power.write_back()
    with store.writer("orders") as writer:
        source = fill(writer, 1)
    left = after()
    for path in (left.directory / "orders").glob("index.sqlite*"):
        path.unlink()
    holds(left, source.position)


@pytest.mark.parametrize("what", ["base", "compaction"])
def test_a_new_segment_that_may_come_back(disk: Path, power: Power, after: After, what: str) -> None:
    """Its name was not synced, and neither was its removal: it must not pass for newer than what is acknowledged."""
    with Store(disk / STORE).writer("orders") as writer:
        fill(writer, 3)
        held = writer.position
        source = Source(position=held)
        if what == "base":
            writer.begin(full=True)
            writer.feed(source.checkpoint())
            writer.check(source.position)
        with power.failing(lambda path: path.name == "segments", late=1):
            if what == "base":
                with pytest.raises(StoreError):
                    writer.store()
            else:
                writer.compact(wait=True)
                assert len(writer.warnings) == 1
        writer.abandon()
        assert writer.position == held and writer.stream is None
        source = fill(writer, 2)
        holds(after(), source.position)


def test_a_stream_does_not_go_on_beside_a_segment_that_may_come_back(disk: Path, power: Power, after: After) -> None:
    """Its primary is connected, and sends on: what it sends would be older than that segment."""
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 3)
        held = writer.position
        with power.failing(lambda path: path.name == "segments", late=1):
            writer.compact(wait=True)
        assert len(writer.warnings) == 1
        with pytest.raises(StoreError):
            writer.feed(source.checkpoint())
        holds(after(), held)
        source = fill(writer, 1)
        holds(after(), source.position)


def test_a_memory_that_was_handed_out_takes_no_more(disk: Path) -> None:
    """Not even what had come before."""
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 3)
        held = writer.position
        writer.feed(source.checkpoint())
        writer.check(source.position)
        writer.hand_out()
        with pytest.raises(StoreError):
            writer.store()
        writer.abandon()
        assert writer.position == writer.handed_out == held


def test_a_new_segment_that_does_not_come_back(disk: Path, power: Power, after: After) -> None:
    """Its removal is durable: the stream goes on."""
    with Store(disk / STORE).writer("orders") as writer:
        kept = fill(writer, 3)
        source = Source(position=kept.position)
        writer.begin(full=True)
        writer.feed(source.checkpoint())
        writer.check(source.position)
        fails = [True]

        def once(path: Path) -> bool:
            return path.name == "segments" and bool(fails) and fails.pop()

        with power.failing(once, late=1), pytest.raises(StoreError):
            writer.store()
        writer.begin(full=False)
        fill(writer, 1, kept)
        holds(after(), kept.position)


def test_what_was_taken_over_is_not_continued(disk: Path, after: After) -> None:
    """The survivor writes to that memory: deltas against it would make another."""
    store = Store(disk / STORE)
    for is_new_process in (False, True):
        with store.writer("orders") as writer:
            if not is_new_process:
                fill(writer, 3)
                image, _ = writer.hand_out()
                image.write_bytes(bytes(PAGES * PAGE_SIZE))
            if is_new_process:
                writer.compact(wait=True)
                assert not writer.warnings and writer.image is not None
            assert writer.stream is None
            with pytest.raises(StoreError):
                writer.begin(full=False)
            if not is_new_process:
                writer.history.restore_image(disk / "copy")
                assert (disk / "copy").read_bytes() == memory_at(2).tobytes()
            else:
                source = fill(writer, 2)
                assert writer.memory is not None and memory_sha256(writer.memory) == sha(source.position.epoch)
                holds(after(), source.position)


@pytest.fixture
def resurrected(disk: Path, power: Power, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Checkpoint 3 was refused, since the disk failed, and could not be cut off either; then 2 was handed out, and the
    backup has died."""
    store = Store(disk / STORE)
    writer = store.writer("orders")
    source = fill(writer, 3)
    writer.set_state(term=1, role="promoted")
    writer.feed(source.checkpoint())
    writer.check(source.position)

    def ftruncate(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with power.failing(lambda path: path.suffix == ".remus"), monkeypatch.context() as patch:
        with pytest.raises(StoreError):
            writer.store()
        patch.setattr(os, "ftruncate", ftruncate)
        with pytest.raises(StoreError):
            writer.abandon()
    image, _ = writer.hand_out()
    assert image.read_bytes() == memory_at(2).tobytes()
    image.write_bytes(b"in use")
    die(writer)
    return store


def test_an_image_in_use_stays_whatever_comes_back(resurrected: Store) -> None:
    with resurrected.writer("orders") as writer:
        assert writer.position is not None and writer.position.epoch == 3
        image, device_state = writer.hand_out()
        assert image.read_bytes() == b"in use" and device_state.read_bytes() == b"dev2"
        assert writer.handed_out == writer.history.find(2).position
        assert writer.is_handed_out and writer.stream is None
        for act in (writer.compact, lambda: writer.begin(full=False)):
            with pytest.raises(StoreError):
                act()
        source = fill(writer, 2)
        assert not writer.is_handed_out and writer.stream is not None
    with resurrected.writer("orders") as writer:
        assert writer.position == source.position and not writer.is_handed_out


def test_a_backup_says_which_checkpoint_is_in_use(resurrected: Store) -> None:
    with Backup(resurrected.directory, ["unix:" + str(resurrected.directory.parents[3] / "socket")]) as backup:
        given = backup.failover("orders")
        assert Path(given["image"]).read_bytes() == b"in use"
        position = resurrected.history("orders").find(2).position
        assert (given["epoch"], given["position"]) == (2, f"2:{position.digest.hex()}")


def test_what_was_handed_out_before_the_machine_started_anew(
    resurrected: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may be torn."""
    (tmp_path / "boot").write_text("another")
    # The machine of a test cannot start anew.
    monkeypatch.setattr("remus_ckpt.store.hand_over._BOOT_ID", str(tmp_path / "boot"))
    with resurrected.writer("orders") as writer:
        assert writer.hand_out()[0].read_bytes() == memory_at(3).tobytes()
        assert writer.handed_out == writer.position


def test_what_is_stored_and_not_applied_is_handed_out(disk: Path) -> None:
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 3)
        writer.feed(source.checkpoint())
        writer.check(source.position)
        writer.store()
        image, device_state = writer.hand_out()
        assert image.read_bytes() == memory_at(3).tobytes() and device_state.read_bytes() == b"dev3"


def test_the_room_for_a_device_state_is_kept_again_after_a_failure(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("hand-over.spare"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(StoreError):
                writer.hand_out()
        writer.begin(full=False)
        fill(writer, 1, source)
        assert (writer.directory / "warm" / "hand-over.spare").stat().st_size >= 64 << 10


# store.json


def is_folder(path: Path) -> bool:
    return path.name == "orders"


def is_state(path: Path) -> bool:
    return path.name.startswith("store.json")


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("fails", [is_folder, is_state])
@pytest.mark.parametrize("times", [1, 2, 99])
def test_a_state_that_cannot_be_synced(
    disk: Path, power: Power, after: After, fails: Callable[[Path], bool], late: bool, times: int
) -> None:
    """Memory, disk and who opens it anew tell one story; and nothing is acknowledged until the disk does."""
    store = Store(disk / STORE)
    left = [times]

    def some(path: Path) -> bool:
        if not fails(path):
            return False
        left[0] -= 1
        return left[0] >= 0

    with store.writer("orders") as writer:
        source = fill(writer, 2)
        writer.set_state(term=1)
        writer.feed(source.checkpoint())
        writer.check(source.position)
        with power.failing(some, late=99 * late):
            with pytest.raises(StoreError):
                writer.set_state(term=2, role="promoted")
            assert writer.state == load_state(writer.directory) and writer.state.term == 1
            if fails is is_folder and times == 99:
                for act in (writer.store, writer.hand_out, lambda: writer.set_state(x=1)):
                    with pytest.raises(StoreError):
                        act()
        writer.abandon()
        data = Source(position=writer.position)
        writer.begin(full=True)
        fill(writer, 1, data)
        assert after().history("orders").state == writer.state == load_state(writer.directory)
        holds(after(), data.position, term=1)
        writer.set_state(term=2)
        holds(after(), data.position, term=2)
    with store.writer("orders") as writer:
        assert writer.state.term == 2


@pytest.mark.parametrize("times", [0, 1, 2, 99])
@pytest.mark.parametrize("late", [True, False])
def test_a_state_is_whole_at_every_instant(
    monkeypatch: pytest.MonkeyPatch, disk: Path, tmp_path: Path, times: int, late: bool
) -> None:
    """Whatever the disk has of what is being written, and whether or not it has the name: one of the two is there."""
    power = Power(monkeypatch, disk, eager=True)
    after = After(power, tmp_path / "after")
    left = [0]

    def some(path: Path) -> bool:
        if path.name != "orders":
            return False
        left[0] -= 1
        return left[0] >= 0

    allowed = {0}

    def look() -> None:
        assert load_state(after().directory / "orders").term in allowed

    with Store(disk / STORE).writer("orders") as writer:
        power.on_step = look
        for term in range(1, 6):
            allowed = {writer.state.term, term}
            left[0] = times if term in (2, 4) else 0
            with power.failing(some, late=99 * late):
                try:
                    writer.set_state(term=term, more="x" * 100 * term)
                except StoreError:
                    assert times
                else:
                    assert writer.state.term == term
            allowed = {writer.state.term, *(allowed if times == 99 else ())}
            look()


def test_a_state_that_somebody_has_a_link_to(disk: Path, tmp_path: Path) -> None:
    """A copy by hard links stays what it was."""
    with Store(disk / STORE).writer("orders") as writer:
        for term in range(1, 4):
            writer.set_state(term=term)
            for name in ("store.json", "store.json.spare"):
                os.link(writer.directory / name, tmp_path / f"{name}-{term}")
        kept = [(tmp_path / f"store.json-{term}").read_bytes() for term in range(1, 4)]
        writer.set_state(term=9)
        writer.set_state(term=10)
        assert [(tmp_path / f"store.json-{term}").read_bytes() for term in range(1, 4)] == kept
        assert load_state(writer.directory).term == 10


def test_a_spare_on_bad_blocks(disk: Path, power: Power, after: After) -> None:
    """It is not tried again."""
    with Store(disk / STORE).writer("orders") as writer:
        bad = (writer.directory / "store.json.spare").stat().st_ino
        with power.failing(lambda path: path.stat().st_ino == bad):
            with pytest.raises(StoreError):
                writer.set_state(term=1)
            assert writer.state.term == 0
            writer.set_state(term=1)
            assert after().history("orders").state.term == 1


def test_without_descriptors(disk: Path) -> None:
    """A process that has no more of them loses nothing by it, and keeps what the next change needs."""
    with Store(disk / STORE).writer("orders") as writer:
        source = fill(writer, 2)
        writer.feed(source.checkpoint())
        writer.check(source.position)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            for change in (lambda: writer.set_state(term=1), writer.hand_out, lambda: writer.begin(full=True)):
                with pytest.raises(StoreError):
                    change()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert writer.state == load_state(writer.directory) and writer.state.term == 0
        assert (writer.directory / "store.json.spare").stat().st_size >= 4096
        fill(writer, 1)
        writer.set_state(term=1)
        assert writer.hand_out()[0].read_bytes() == memory_at(2).tobytes()
