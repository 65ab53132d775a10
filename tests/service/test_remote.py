"""A history is read through its backup as it is on the backup's own disk, and readers hold up nobody."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from services import make_keys, until
from store_support import Source, commit, fill, memory_at

from remus_ckpt import Backup, Policy, Remote, protect
from remus_ckpt.errors import BadCheckpoint, LinkError, NoCheckpoint, NothingToRestore, Refused, RemusError, StoreError
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.link.address import Address, split_name
from remus_ckpt.link.control import Requests, ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.rights import Rights
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.service import keys
from remus_ckpt.service.reader import Readers
from remus_ckpt.session.messages import READ_BYTES
from remus_ckpt.store import History, Store

BIG_PAGES = 4096
"""Pages of random bytes: with one change of all, twice as many as are asked for ahead."""


def big(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (BIG_PAGES, PAGE_SIZE), dtype=np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`orders` has the epochs 0 to 3 in one segment and 3 to 6 in the next; `big` has two; `empty` none."""
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 3, source)
    with store.writer("big") as writer:
        sender = Sender(BIG_PAGES)
        writer.begin(full=True)
        for epoch in range(2):
            pfns = np.arange(BIG_PAGES)
            groups = sender.checkpoint(batches(pfns, big(epoch)), time_ns=epoch)
            data = b"".join(bytes(buffer) for group in groups for buffer in group)
            assert sender.position is not None
            commit(writer, data, sender.position, MIB)
    with store.writer("empty") as writer:
        writer.set_state(term=1)  # else the backup would drop the name
    return store


@pytest.fixture
def backup(store: Store, tmp_path: Path) -> Iterator[Backup]:
    with Backup(store, [f"unix:{tmp_path}/socket"]) as backup:
        yield backup


@pytest.fixture
def remote(backup: Backup) -> Remote:
    return Remote(backup.addresses[0])


def damage(history: History, epoch: int) -> None:
    entry = history.find(epoch)
    path = history.path_of(entry.segment)
    data = bytearray(path.read_bytes())
    data[entry.start + 40] ^= 1
    path.write_bytes(data)


# What is read


def test_names(remote: Remote) -> None:
    assert remote.names() == ["big", "empty", "orders"]
    with pytest.raises(StoreError, match="/orders"):
        remote.newest()
    with pytest.raises(StoreError, match="nobody"):
        remote["nobody"].newest()
    with pytest.raises(NothingToRestore):
        remote["empty"].restore()
    with pytest.raises(ValueError, match=r"\.\./orders"):
        remote["../orders"]
    with pytest.raises(ValueError, match="no names"):
        remote["orders"]["orders"]


def test_more_names_than_go_into_one_reply(backup: Backup, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remus_ckpt.service.reader._NAMES", 2)
    assert Remote(backup.addresses[0]).names() == ["big", "empty", "orders"]


def test_a_backup_for_some_names_shows_no_others(store: Store, tmp_path: Path) -> None:
    policy = Policy(names=frozenset({"orders"}))
    with Backup(store, [f"unix:{tmp_path}/socket"], policy=policy) as backup:
        remote = Remote(backup.addresses[0])
        assert remote.names() == ["orders"]
        with pytest.raises(StoreError, match="big"):
            remote["big"].newest()


def test_a_certificate_says_what_may_be_read(store: Store, tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys") / "ca"
    keys.issue(folder, "auditor", rights=Rights.limited(["read"], ["orders"]))
    keys.issue(folder, "operator", rights=Rights.limited(["failover"], []))
    with Backup(store, ["tls://127.0.0.1:0"], tls_dir=folder / "backup") as backup:
        remote = Remote(backup.addresses[0], tls_dir=folder / "auditor")
        assert remote.names() == ["orders"] and remote["orders"].restore().epoch == 6
        with pytest.raises(RemusError, match="big"):
            remote["big"].newest()
        with pytest.raises(Refused) as caught:
            Remote(backup.addresses[0], tls_dir=folder / "operator").names()
        assert caught.value.code == "forbidden"


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_it_lists_what_a_local_history_lists(
    backup: Backup, store: Store, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("remus_ckpt.service.reader._SEGMENTS", rows)
    monkeypatch.setattr("remus_ckpt.store.remote._ENTRIES", rows)
    local, there = store["orders"], Remote(f"{backup.addresses[0]}/orders")
    assert there.name == "orders" and there.state == local.state
    assert len(there) == len(local) == 7
    assert there.entries() == local.entries()
    assert list(there.checkpoints(newest_first=True)) == local.entries()[::-1]
    assert [(one.name, one.first, one.last) for one in there.contents()] == [
        (one.name, one.first, one.last) for one in local.contents()
    ]
    assert there.newest() == local.newest() and there.lost() == []
    assert [stored.epoch for stored in there] == list(range(7))
    assert there[-1].position == local[-1].position and there[0].time == local[0].time
    assert there.at(datetime.fromtimestamp(4.5, UTC)).epoch == 4
    for wrong in (99, datetime.fromtimestamp(-1, UTC)):
        with pytest.raises(NoCheckpoint):
            there.find(wrong)
    with pytest.raises(IndexError):
        there[7]


def test_every_checkpoint_comes_back(remote: Remote, tmp_path: Path) -> None:
    history = remote["orders"]
    for epoch in range(7):
        found = history.restore(epoch)
        assert found.image.tobytes() == memory_at(epoch).tobytes() and found.device_state == b"dev%d" % epoch
        history.restore_image(tmp_path / "image", epoch)
        assert (tmp_path / "image").read_bytes() == memory_at(epoch).tobytes()
    assert history[-1].save(tmp_path / "image").epoch == 6


def test_a_stream_is_exported_byte_for_byte(remote: Remote, store: Store, tmp_path: Path) -> None:
    for name, at in (("orders", None), ("orders", 2), ("big", None)):
        for number, history in enumerate((store[name], remote[name])):
            history.export(tmp_path / str(number), at)
        assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_arrays_come_back_over_tls(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys") / "ca"
    orders = np.zeros((100, 100))
    with Backup(tmp_path / "store", ["tls://127.0.0.1:0"], tls_dir=folder / "backup") as backup:
        address = backup.addresses[0]
        with protect({"orders": orders}, to=address, name="desk", tls_dir=folder / "primary") as protection:
            orders[3] += 1.5
            protection.checkpoint(wait=True)
            found = Remote(f"{address}/desk", tls_dir=folder / "primary")[-1].arrays()
        assert found["orders"].dtype == orders.dtype and (found["orders"] == orders).all()
        with pytest.raises(LinkError):
            Remote(address)
        with pytest.raises(LinkError):
            Remote(address, tls_dir=folder / "expired").names()


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("tls://host:7411/orders", "tls://host:7411", "orders"),
        ("tls://host:7411/", "tls://host:7411", None),
        ("tls://host:7411", "tls://host:7411", None),
        ("host:7411/orders", "host:7411", "orders"),
        ("tcp://[::1]:7411/orders", "tcp://[::1]:7411", "orders"),
        ("unix:/no such/socket/orders", "unix:/no such/socket", "orders"),
        ("unix:/tmp/socket", "unix:/tmp/socket", None),
        ("unix:socket", "unix:socket", None),
    ],
)
def test_the_name_behind_an_address(text: str, address: str, name: str | None) -> None:
    assert split_name(text) == (address, name)


def test_the_methods_are_those_of_the_specification(store: Store) -> None:
    text = (Path(__file__).resolve().parents[2] / "specs" / "session.md").read_text()
    part = text.split("### 3.13 Methods for readers")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    methods = [row[0].strip("`") for row in rows[2 : rows.index(["Row", "Holds"])]]
    assert methods == ["names", "survey", "entries", "until", "read"] and f"1 to {READ_BYTES:,}" in part
    with Readers(store, Policy(), Limits(), lambda name: None).lend("peer") as reader:
        for method in methods:
            with pytest.raises(RemusError):
                reader.answer(method, {})
        assert reader.answer("status", {}) is None


def test_neither_end_holds_the_segment(tmp_path: Path) -> None:
    """64 MiB are restored: both ends, which are one process here, take less than 40. The digest may be 20 behind."""
    pages = 64 * MIB // PAGE_SIZE
    memory = np.random.default_rng(9).integers(0, 256, (pages, PAGE_SIZE), dtype=np.uint8)
    store = Store(tmp_path / "store")
    with store.writer("large") as writer:
        sender = Sender(pages)
        writer.begin(full=True)
        for group in sender.checkpoint(batches(np.arange(pages), memory)):
            for buffer in group:
                writer.feed(bytes(memoryview(buffer).cast("B")))
        assert sender.position is not None
        writer.check(sender.position)
        writer.store()
        writer.apply()
    with Backup(store, [f"unix:{tmp_path}/socket"]) as backup:
        tracemalloc.start()
        try:
            Remote(f"{backup.addresses[0]}/large").restore_image(tmp_path / "image", sync=False)
            assert tracemalloc.get_traced_memory()[1] < 40 * MIB
        finally:
            tracemalloc.stop()
    assert (np.fromfile(tmp_path / "image", dtype=np.uint8).reshape(memory.shape) == memory).all()


# What is bad


def test_what_has_changed_on_the_disk_is_found_here(remote: Remote, store: Store, tmp_path: Path) -> None:
    damage(store["orders"], 5)
    found = []
    for history in (store["orders"], remote["orders"]):
        with pytest.raises(BadCheckpoint) as caught:
            history.restore_image(tmp_path / "image")
        found.append((caught.value.segment, caught.value.epoch, caught.value.good, caught.value.offset))
        assert not list(tmp_path.glob("*image*"))
        with pytest.raises(BadCheckpoint):
            history.export(tmp_path / "stream")
        assert not list(tmp_path.glob("*stream*"))
        assert history.restore(4).image.tobytes() == memory_at(4).tobytes()
    assert found[0] == found[1]
    assert store["orders"].verify() == remote["orders"].verify()


def test_the_base_of_a_compaction_is_read_from_the_segment_before(remote: Remote, store: Store) -> None:
    newest = store["orders"].contents()[-1].name
    path = store["orders"].path_of(newest)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    assert remote["orders"].restore(3).image.tobytes() == memory_at(3).tobytes()


def test_lost_checkpoints_are_told(backup: Backup, remote: Remote, store: Store) -> None:
    history = store["orders"]
    path = history.path_of(history.contents()[-1].name)
    with path.open("r+b") as file:
        file.truncate(history.find(5).start)
    assert remote["orders"].lost() == history.lost() != []
    with pytest.raises(BadCheckpoint) as caught:
        remote["orders"].restore()
    assert caught.value.good == 4
    assert not remote["orders"].verify().is_good


def test_all_is_verified(remote: Remote, store: Store) -> None:
    for name in ("orders", "big"):
        seen: list[int] = []
        report = remote[name].verify(seen.append)
        assert report == store[name].verify() and report.is_good
        assert seen == sorted(seen) and seen[-1] == remote[name].size()


# Only what is durable


def test_what_is_not_durable_is_not_shown(store: Store) -> None:
    for newest in (-1, 2, 4):
        readers = Readers(store, Policy(), Limits(), lambda name, newest=newest: newest)
        with readers.lend("peer") as reader:
            survey = reader.answer("survey", {"name": "orders", "start": 0})
            assert survey is not None
            epochs = [last[0] for _, _, last in survey["segments"]]
            assert epochs == [epoch for epoch in (min(newest, 3), newest) if epoch >= 0][: 1 + (newest > 3)]
            for name, _, last in survey["segments"]:
                arguments = {"name": "orders", "segment": name, "start": last[4], "size": 1}
                assert "error" in _result(reader, "read", arguments)
                assert "data" in _result(reader, "read", arguments | {"start": last[4] - 1})
                arguments = {"name": "orders", "segment": name, "epoch": newest, "backward": False, "count": 9}
                assert len(_result(reader, "entries", arguments)["entries"]) == (newest == last[0])
                arguments = {"name": "orders", "segment": name, "time_ns": 1 << 60}
                assert _result(reader, "until", arguments)["entry"] == last


def _result(reader: object, method: str, arguments: dict[str, object]) -> dict[str, object]:
    try:
        return reader.answer(method, arguments)  # type: ignore[attr-defined, no-any-return]
    except Exception as error:
        return {"error": str(error)}


def test_a_running_backup_shows_what_it_has_acknowledged(tmp_path: Path) -> None:
    array = np.zeros(4096)
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
        address = backup.addresses[0]
        with protect({"array": array}, to=address, name="desk") as protection:
            history = Remote(f"{address}/desk")
            for number in range(5):
                array[number] += 1
                protection.checkpoint(wait=True)
                assert history[-1].epoch == number
                assert (history[-1].arrays()["array"] == array).all()


def test_a_segment_that_is_pruned_while_it_is_read_is_read_to_its_end(remote: Remote, store: Store) -> None:
    path = store["big"].path_of(store["big"].contents()[0].name)
    reached = []

    def progress(done: int) -> None:
        reached.append(done)
        path.unlink(missing_ok=True)

    assert remote["big"].restore(0, progress).image.tobytes() == big(0).tobytes()
    assert len(reached) > 1
    with pytest.raises((NoCheckpoint, BadCheckpoint)):
        remote["big"].restore(0)


# Links that break


def test_a_broken_connection_is_resumed(backup: Backup, remote: Remote, tmp_path: Path) -> None:
    breaks = [3 * MIB, 9 * MIB]
    peers = []

    def progress(done: int) -> None:
        if breaks and done > breaks[0]:
            del breaks[0]
            for peer in backup.living_peers():
                peers.append(peer.connection.peer)
                peer.connection.close()
                peer.thread.join()

    found = remote["big"].restore_image(tmp_path / "image", progress=progress)
    assert found.epoch == 1 and (tmp_path / "image").read_bytes() == big(1).tobytes()
    assert len(peers) == 2 and not breaks


def test_one_connection_serves_a_block(backup: Backup, remote: Remote) -> None:
    def peers() -> list[str]:
        return [peer.connection.peer for peer in backup.living_peers()]

    with remote:
        remote["orders"].restore()
        first = peers()
        assert remote["big"].newest() is not None and len(remote.names()) == 3
        assert peers() == first and len(first) == 1
    until(lambda: not peers())
    remote["orders"].restore()
    until(lambda: not peers())


def test_an_interrupt_leaves_no_answer_to_the_next_request(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever catches Ctrl-C in the block and goes on gets what is asked for then."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with remote:
        assert remote["orders"].newest() is not None
        with monkeypatch.context() as patch:
            patch.setattr(Requests, "answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                remote["orders"].newest()
        assert remote.names() == ["big", "empty", "orders"]


# Readers and the others


def test_too_many_readers_are_told(store: Store, tmp_path: Path) -> None:
    with Backup(store, [f"unix:{tmp_path}/socket"], policy=Policy(max_readers=2)) as backup, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(remote := Remote(backup.addresses[0])).names()
        with pytest.raises(Refused) as caught:
            Remote(backup.addresses[0]).names()
        assert caught.value.code == "busy"
        assert ask(connect(Address.parse(backup.addresses[0])), "status", {})["names"]
        assert remote.names()
        stack.close()
        until(lambda: not backup.living_peers())
        assert Remote(backup.addresses[0]).names()


def test_readers_make_room_first(store: Store, tmp_path: Path) -> None:
    """Before control connections, and before primaries, which stay."""
    array = np.zeros(4096)
    policy = Policy(max_connections=4)
    with Backup(store, [f"unix:{tmp_path}/socket"], policy=policy) as backup, ExitStack() as stack:
        address = backup.addresses[0]
        protection = stack.enter_context(protect({"array": array}, to=address, name="desk"))
        protection.checkpoint(wait=True)
        control = Requests(connect(Address.parse(address)), "control", timeout_s=10.0)
        stack.callback(control.close)
        for _ in range(2):
            stack.enter_context(Remote(address)).names()
        until(lambda: len(backup.living_peers()) == 4)
        before = {peer.role for peer in backup.living_peers()}
        assert before == {"primary", "control", "reader"}
        assert ask(connect(Address.parse(address)), "status", {})["names"]["desk"]["connected"]
        control.post("status", {}, 10.0)
        assert control.answer(10.0)["names"]
        array += 1
        protection.checkpoint(wait=True)


def test_a_reader_gets_a_piece_at_a_time(backup: Backup) -> None:
    entry = Remote(backup.addresses[0])["big"].find(1)
    piece = {"name": "big", "segment": entry.segment, "start": 5, "size": READ_BYTES}
    with Requests(connect(Address.parse(backup.addresses[0])), "reader", timeout_s=10.0) as requests:
        requests.post("read", piece, 10.0)
        assert len(requests.answer(10.0)["data"]) == READ_BYTES
        requests.post("read", piece | {"size": READ_BYTES + 1}, 10.0)
        with pytest.raises(RemusError):
            requests.answer(10.0)


def test_a_reader_that_takes_nothing_holds_up_nobody(backup: Backup, tmp_path: Path) -> None:
    array = np.zeros(4096)
    address = backup.addresses[0]
    entry = Remote(address)["big"].find(1)
    stalled = Requests(connect(Address.parse(address)), "reader", timeout_s=10.0)
    try:
        for number in range(40):
            stalled.post(
                "read",
                {"name": "big", "segment": entry.segment, "start": number * READ_BYTES, "size": READ_BYTES},
                10.0,
            )
        with protect({"array": array}, to=address, name="desk") as protection:
            for number in range(20):
                array[number] += 1
                protection.checkpoint(wait=True, timeout_s=10.0)
            assert Remote(address)["desk"][-1].epoch == 19
            assert ask(connect(Address.parse(address)), "status", {})["names"]["desk"]["epoch"] == 19
        assert len(stalled.answer(10.0)["data"]) == READ_BYTES
    finally:
        stalled.close()


def test_threads_may_share_a_history(remote: Remote) -> None:
    found: list[bytes] = []

    def read(epoch: int) -> None:
        found.append(remote["orders"].restore(epoch).device_state)

    threads = [threading.Thread(target=read, args=(epoch,)) for epoch in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [b"dev%d" % epoch for epoch in range(7)]


def test_a_store_that_grows_is_read_meanwhile(tmp_path: Path) -> None:
    """A reader sees whole checkpoints, each no older than the last one, while a writer commits and compacts."""
    store = Store(tmp_path / "store")
    with store.writer("m") as writer:
        source = fill(writer, 1)
        done = threading.Event()
        readers = Readers(store, Policy(), Limits(), lambda name: writer.position.epoch if writer.position else -1)
        faults: list[object] = []

        def read() -> None:
            newest = 0
            with readers.lend("peer") as reader:
                while not done.is_set():
                    survey = reader.answer("survey", {"name": "m", "start": 0})
                    assert survey is not None
                    epoch = max(last[0] for _, _, last in survey["segments"])
                    if epoch < newest or survey["lost"]:
                        faults.append((newest, survey))
                    newest = epoch

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(10):
                fill(writer, 5, source)
                writer.compact(wait=True)
        finally:
            done.set()
            thread.join()
    assert isinstance(source, Source) and not faults
