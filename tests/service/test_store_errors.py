"""Errors from where nobody expects them: the writer goes on, or lets go of all that it holds."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limited import limit
from store_support import PAGES, Source, commit, fill, memory_at, sha
from test_service import ANY, LONG_S, Memory, restored, until

from remus_ckpt import disk
from remus_ckpt.disk import replace_file, spare_of
from remus_ckpt.errors import LinkError, RemusError, StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import batches
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.standby import Policy
from remus_ckpt.service.vms import Vms
from remus_ckpt.store import HistoryWriter, Store, Torn
from remus_ckpt.store.index import read_index
from remus_ckpt.vm.part import Machine, VmPart


def open_files(folder: Path) -> list[str]:
    """What this process has open below a folder, removed files too."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.startswith(str(folder))]


def no_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """No thread of that name can be started; returns those that could not."""
    start = threading.Thread.start
    refused: list[str] = []

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith(name):
            refused.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


class Keeping(Store):
    """Keeps the last writer that it has made."""

    made: HistoryWriter

    def writer(self, *given: Any, **options: Any) -> HistoryWriter:
        self.made = super().writer(*given, **options)
        return self.made


def test_a_resolver_that_gets_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is tried again, like one that is lost."""
    refused = no_thread(monkeypatch, "resolve")
    with pytest.raises(LinkError):
        connect(Address.parse("tcp://127.0.0.1:1"), timeout_s=LONG_S)
    assert refused == ["resolve"]


def test_an_index_that_gets_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writer("orders") as writer:
        source = fill(writer, 2)
        for path in writer.directory.glob("index.sqlite*"):
            path.unlink()
        with monkeypatch.context() as patched:
            no_thread(patched, "index")
            writer.compact(wait=True)
            fill(writer, 1, source)
        writer.compact(wait=True)  # a segment has ended: it is tried again
        until(lambda: f"{0:020}-000000.remus" in (read_index(writer.directory / "index.sqlite") or {}))
    with Store(tmp_path).writer("orders") as writer:
        assert writer.position == source.position


@pytest.mark.parametrize("where", ["first copy", "deltas"])
def test_a_torn_writer_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def end_it(*_: Any) -> None:
        raise MemoryError

    writer = Store(tmp_path).writer("orders")
    source = Source() if where == "first copy" else fill(writer, 1)
    writer.begin(full=where == "first copy")
    writer.feed(source.checkpoint())
    writer.check(source.position)
    with monkeypatch.context() as patched:
        patched.setattr("remus_ckpt.store.writer.entry_of", end_it)
        with pytest.raises(MemoryError):
            writer.store()
    for step in (lambda: writer.feed(b"x"), writer.get_buffer, writer.apply, lambda: writer.set_state(term=1)):
        with pytest.raises(Torn):
            step()
    writer.close()
    assert open_files(tmp_path) == []
    with Store(tmp_path).writer("orders") as again:
        assert again.position == source.position


def test_descriptors_whose_close_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has closed them all the same."""
    real = os.close

    def close(fd: int) -> None:
        is_ours = os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        real(fd)
        if is_ours:
            raise OSError(errno.EIO, "Input/output error")

    writer = Store(tmp_path).writer("orders")
    source = fill(writer, 2)
    writer.begin(full=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        writer.abandon()
        writer.close()
    assert open_files(tmp_path) == []
    with Store(tmp_path).writer("orders") as again:
        assert again.position == source.position


def test_a_segment_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 1)
    real = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".remus") and flags & os.O_RDWR:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(StoreError):
            Store(tmp_path).writer("orders")
    assert open_files(tmp_path) == [] and not list(tmp_path.glob("orders/warm/memory-*"))


def test_a_compaction_that_another_stream_overtakes(tmp_path: Path) -> None:
    """It holds the memory of the old one: closed behind the new base, that would pass for the new one's."""
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 2)
        writer.begin(full=True)
        source = Source(position=writer.position)
        memory = np.zeros_like(memory_at(0))
        groups = source.sender.checkpoint(batches(np.arange(PAGES), memory), device_state=b"", time_ns=0)
        data = b"".join(bytes(buffer) for group in groups for buffer in group)
        writer.compact(wait=True)
        commit(writer, data, source.position)
        assert not writer.compacting and writer.warnings == []
        assert writer.position == source.position
    held = Store(tmp_path).history("orders").restore()
    assert memory_sha256(held.image) == memory_sha256(memory.reshape(-1)) != sha(1)


def test_no_room_behind_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the spare now may be what a loss of power brings back: it is not written to."""
    path = tmp_path / "state"
    for data in (b"one", b"two"):
        replace_file(path, data)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync_directory", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"three")
    assert path.read_bytes() == b"three" and not spare_of(path).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_was_torn_by_nobody_who_is_told(tmp_path: Path) -> None:
    """In the compaction's own thread. It is opened anew by itself, and the primary goes on."""
    raised = threading.Event()

    def on_phase(phase: str, _: int) -> None:
        if phase == "compacted" and not raised.is_set():
            raised.set()
            raise MemoryError

    store = Keeping(tmp_path / "store")
    with (
        Backup(store, [ANY], policy=Policy(lease_s=2.0), on_phase=on_phase) as backup,
        Memory(backup.addresses[0], wait="applied") as memory,
    ):
        memory.step(0)
        writer = store.made
        until(lambda: writer.memory is not None)  # what has been acknowledged may not have been applied yet
        with suppress(MemoryError, StoreError):  # it may be closed by now
            writer.compact(wait=True)
        until(raised.is_set)

        def goes_on() -> bool:
            with suppress(LinkError, RemusError):
                memory.step(1)
                return True
            return False

        until(goes_on)
        assert (restored(tmp_path / "store") == memory.array).all()


def test_a_backup_that_gets_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on serving, and does what it could not when there are threads again."""
    with Store(tmp_path).writer("orders") as writer:
        fill(writer, 1)
        good = (writer.directory / "store.json").read_bytes()
    (tmp_path / "orders" / "store.json").write_bytes(b"{")
    with Backup(tmp_path, [ANY], policy=Policy(lease_s=2.0), warm="disk") as backup, ExitStack() as stack:

        def is_served() -> bool:
            return "orders" in ask(connect(Address.parse(backup.addresses[0])), "status", {})["names"]

        with monkeypatch.context() as patched:
            refused = no_thread(patched, "opening")
            (tmp_path / "orders" / "store.json").write_bytes(good)
            until(lambda: len(refused) > 1)
            assert is_served()
        until(lambda: backup.status()["names"]["orders"]["role"] == "standby")
        memory = stack.enter_context(Memory(backup.addresses[0]))
        memory.step(0)
        with monkeypatch.context() as patched:
            refused = no_thread(patched, "closing")
            for image in (tmp_path / "orders" / "warm").glob("memory-*.image"):
                os.truncate(image, 0)  # it has to be opened anew
            memory.array += 1
            with suppress(LinkError):
                memory.protection.checkpoint(timeout_s=0.3)
            until(lambda: len(refused) > 1)
            assert is_served()
        memory.step(1)
        assert (restored(tmp_path) == memory.array).all()


def test_stores_that_hang_hang_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a backup takes no second for each."""
    may_go_on = threading.Event()
    for name in "abcde":
        Store(tmp_path).writer(name).close()
    limit(monkeypatch, close_s=0.1)
    with monkeypatch.context() as patched:
        close = HistoryWriter.close
        patched.setattr(HistoryWriter, "close", lambda self: may_go_on.wait(LONG_S) and close(self))
        backup = Backup(tmp_path, [ANY])
        begin = time.monotonic()
        backup.close()
        assert time.monotonic() - begin < 4
        may_go_on.set()
        until(lambda: not any(thread.name.startswith("closing") for thread in threading.enumerate()))


@pytest.mark.parametrize("what", ["thread", "descriptor"])
def test_a_primary_without_threads_or_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It tries again, as for any link that cannot be made."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with Backup(tmp_path / "store", [ANY]) as backup, Memory(backup.addresses[0], connect_timeout_s=0) as memory:
        with monkeypatch.context() as patched:
            if what == "thread":
                no_thread(patched, "link to")
            else:
                patched.setattr(os, "eventfd", refuse)
            with pytest.raises(LinkError):
                memory.protection.checkpoint(timeout_s=0.3)
        memory.step(0)
        assert (restored(tmp_path / "store") == memory.array).all()


def test_a_guest_whose_qemu_gets_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints are committed all the same, and nothing stays open."""
    machine = Machine("qemu-system-x86_64", (7, 2, 22), ("-m", "1M"), 1 << 20)
    with Store(tmp_path).writer("web") as writer:
        source = Source()
        writer.begin(full=True)
        commit(writer, source.checkpoint(device_state=VmPart(machine, b"state").pack()), source.position)
        guest = Vms(tmp_path / "run", {}, tmp_path / "disks").of("web", lambda: None)
        before = open_files(tmp_path)
        refused = no_thread(monkeypatch, "QEMU for")
        guest.committed(writer)
        assert len(refused) == 1
        assert guest.status()["vm"] == "refused" and open_files(tmp_path) == before
        guest.close()
