"""A warm copy in memory: it has no name, goes with its process, and is handed out all the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_support import Source, commit, epochs, fill, memory_at, sha

from remus_ckpt.disk import free_bytes
from remus_ckpt.errors import StoreError
from remus_ckpt.limits import MIB
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.store import HistoryWriter, Store, room, warm
from remus_ckpt.store.room import SHARED_MEMORY, free_memory
from remus_ckpt.store.warm import MemoryPlace

GIB = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def place(store: Store) -> Iterator[Path]:
    """Where what is handed out in memory gets its name."""
    where = MemoryPlace(store.directory / "orders", "orders").directory
    yield where
    shutil.rmtree(where, ignore_errors=True)


def opened(store: Store) -> HistoryWriter:
    return store.writer("orders", warm_in_memory=True)


def files_below(*folders: Path) -> list[str]:
    return [path.name for folder in folders for path in folder.rglob("*") if path.is_file()]


def nameless() -> set[str]:
    """Files without a name that this process has open in memory; a mapping has a descriptor of its own."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return {link for link in links if link.startswith(f"{SHARED_MEMORY}/#")}


def test_it_has_no_name_and_goes_with_its_writer(store: Store, place: Path) -> None:
    with opened(store) as writer:
        source = fill(writer, 3)
        assert writer.image is None and writer.warm_on_disk is None and len(nameless()) == 1
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(2)
        fill(writer, 2)  # another full copy
        assert len(nameless()) == 1
        writer.compact(wait=True)
        assert writer.warnings == []
        assert not any(name.endswith(".image") for name in files_below(store.directory)) and not place.exists()
    assert nameless() == set() and source is not None
    with opened(store) as writer:
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(4)
        assert epochs(store.history("orders")) == list(range(5))


def test_one_that_is_killed_leaves_no_memory_behind(store: Store, place: Path) -> None:
    before = {path.name for path in SHARED_MEMORY.iterdir()}
    code = (
        "import sys, os, signal; sys.path[:0] = sys.argv[2:];"
        "from store_support import fill; from remus_ckpt.store import Store;"
        "writer = Store(sys.argv[1]).writer('orders', warm_in_memory=True); fill(writer, 3);"
        "assert writer.image is None; os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = str(Path(__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", code, str(store.directory), folder], check=False)
    assert ran.returncode == -signal.SIGKILL
    ours = {path.name for path in SHARED_MEMORY.iterdir()} - before
    assert not any("orders" in name for name in ours) and not place.exists()
    with opened(store) as writer:
        assert writer.memory is not None and memory_sha256(writer.memory) == sha(2)


def test_it_is_handed_out_under_a_name(store: Store, place: Path) -> None:
    with opened(store) as writer:
        fill(writer, 4)
        image, device_state = writer.hand_out()
        assert image == place / "taken-over-0.image" and image.stat().st_mode & 0o777 == 0o600
        assert place.stat().st_mode & 0o777 == 0o700
        assert image.read_bytes() == memory_at(3).tobytes() and device_state.read_bytes() == b"dev3"
        image.write_bytes(b"changed")
        assert writer.hand_out() == (image, device_state)
        with pytest.raises(StoreError):
            writer.compact()
    with opened(store) as writer:  # another process, under the same term
        assert writer.hand_out() == (image, device_state) and image.read_bytes() == b"changed"
        image.unlink()
        again, _ = writer.hand_out()
        assert again.read_bytes() == memory_at(3).tobytes()
        writer.set_state(term=1)
        source = Source(position=writer.position)
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
        image, _ = writer.hand_out()
        assert [path.name for path in place.iterdir()] == ["taken-over-1.image"]
        assert image.read_bytes() == memory_at(4).tobytes()
        writer.remove()
    assert not place.exists() and not (store.directory / "orders").exists()


def test_after_another_boot_it_is_made_again(store: Store, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is gone then, with what the survivor wrote to it; so would be a file that may be torn."""
    with opened(store) as writer:
        fill(writer, 3)
        image, _ = writer.hand_out()
    shutil.rmtree(image.parent)
    with opened(store) as writer:
        again, device_state = writer.hand_out()
        assert again.read_bytes() == memory_at(2).tobytes() and device_state.read_bytes() == b"dev2"


@pytest.mark.parametrize("how", ["another's folder", "a file", "no link"])
def test_a_name_that_cannot_be_had(
    store: Store, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The takeover must not fail for it: then the image is written to the store."""
    if how == "no link":

        def link(*_: object, **__: object) -> None:
            raise PermissionError("no")

        monkeypatch.setattr(os, "link", link)
    else:
        monkeypatch.setattr(warm, "SHARED_MEMORY", tmp_path / "shm")
        (tmp_path / "shm").mkdir()
        taken = tmp_path / "shm" / f"remus_ckpt-{os.getuid()}"
        if how == "a file":
            taken.touch()
        else:
            taken.mkdir(mode=0o777)
            taken.chmod(0o777)
    with opened(store) as writer:
        fill(writer, 3)
        writer.memory[40:] = 0  # type: ignore[index]
        image, _ = writer.hand_out()
        assert image.parent == writer.directory / "warm" and image.read_bytes() == memory_at(2).tobytes()
        assert image.stat().st_blocks * 512 <= 26 * PAGE_SIZE, "pages that were never written are no holes"
        assert writer.hand_out()[0] == image
    with opened(store) as writer:
        assert writer.hand_out()[0] == image


def test_where_memory_is_short_it_is_on_disk(store: Store, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "free_memory", lambda: 40 * PAGE_SIZE)
    with opened(store) as writer:
        fill(writer, 2)
        assert writer.image is not None and writer.image.parent == writer.directory / "warm"
        assert "0 MiB of memory" in (writer.warm_on_disk or "") and writer.warnings == []
        assert writer.room_for_base(48 * PAGE_SIZE).where != str(SHARED_MEMORY)
        image, _ = writer.hand_out()
        assert image.parent == writer.directory / "warm" and image.read_bytes() == memory_at(1).tobytes()
        writer.set_state(term=1)
        monkeypatch.setattr(warm, "free_memory", lambda: GIB)
        source = Source(position=writer.position)
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
        assert writer.warm_on_disk is None and writer.image is None
        (image, _), old = writer.hand_out(), image
        assert image.parent == place and not old.exists()


def test_copies_that_are_to_come_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm copy takes memory page by page: what the others may still take must be left to them."""
    monkeypatch.setattr(warm, "free_memory", lambda: 100 * PAGE_SIZE)
    writers = [Store(tmp_path).writer(name, warm_in_memory=True) for name in "abc"]
    for writer in writers:
        source = Source(pages=48)
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
    # Each has 48 pages, of which half are never written.
    assert [writer.warm_on_disk is None for writer in writers] == [True, True, True]
    source = Source(pages=48)
    with Store(tmp_path).writer("d", warm_in_memory=True) as writer:
        writer.begin(full=True)
        commit(writer, source.checkpoint(), source.position)
        assert writer.warm_on_disk is not None
    for writer in writers:
        writer.close()
    with Store(tmp_path).writer("d", warm_in_memory=True) as writer:
        assert writer.warm_on_disk is None


# What is free


def test_free_memory_is_less_than_what_there_is() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() < min(total, free_bytes(SHARED_MEMORY))


def test_a_service_that_does_not_see_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """ProcSubset=pid hides /proc/meminfo."""
    seen = free_memory()
    real = Path.read_text

    def read_text(self: Path, *args: object) -> str:
        if self == Path("/proc/meminfo"):
            raise FileNotFoundError
        return real(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert 0 < free_memory() < 2 * seen


def test_the_limit_of_a_cgroup_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/memory.max": "max\n",
        "/sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
        "/sys/fs/cgroup/a/memory.current": f"{GIB}\n",
        "/sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {300 * MIB}\n",
        "/proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable:  {60 << 20} kB\n",
    }

    def read_text(self: Path, *args: object) -> str:
        if str(self) not in said:
            raise FileNotFoundError
        return said[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(room, "free_bytes", lambda path: 32 * GIB)
    assert free_memory() == max(GIB + 300 * MIB - 4 * GIB, 0)
    said["/proc/meminfo"] = f"MemTotal: {4 << 20} kB\nMemAvailable:  {3 << 20} kB\n"
    assert free_memory() == GIB + 300 * MIB - 256 * MIB
    monkeypatch.setattr(room, "free_bytes", lambda path: 300 * MIB)  # as in a container
    assert free_memory() == 44 * MIB
