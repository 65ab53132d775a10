"""Primary and backup together: real sockets, real stores; what is lost on the way and what must not be."""

from __future__ import annotations

import errno
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proxy import Proxy, in_last_byte
from store_support import Source

from remus_ckpt.errors import Fenced, LinkError, NoCheckpoint, Refused, RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import Protection, primary_of, protect
from remus_ckpt.service.release import Committed
from remus_ckpt.service.rollback import Between
from remus_ckpt.service.standby import Policy
from remus_ckpt.session import machine, messages
from remus_ckpt.source.manifest import arrays_of
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.store import Entry, Store
from remus_ckpt.wire.record import Position

LONG_S = 20.0
"""A wait that is only reached when something is broken."""
ANY = "tcp://127.0.0.1:0"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@contextmanager
def backup_in(store: Path, listen: str = ANY, *, warm: str = "memory", **policy: Any) -> Iterator[Backup]:
    policy.setdefault("lease_s", 2.0)
    with Backup(store, [listen], policy=Policy(**policy), warm=warm) as backup:
        yield backup


def no_reader() -> Any:
    """Nothing is read through the backup here."""
    raise AssertionError("it is asked for a history")


class Memory:
    """An array, its protection, and what was committed. Made of the parts that `protect` makes it of, each in reach.

    dial: makes its connections, in place of the address
    options: as for `protect`, and `Primary`
    """

    def __init__(
        self,
        to: str,
        *,
        array: np.ndarray | None = None,
        dial: Callable[[], Connection] | None = None,
        tls_dir: Path | None = None,
        interval_s: float | None = None,
        lock: Any = None,
        device_state: Callable[[], bytes] = bytes,
        connect_timeout_s: float = 10.0,
        **options: Any,
    ) -> None:
        self.array = np.zeros((64, 512), dtype=np.int64) if array is None else array
        self.commits: list[Committed] = []
        self.at: dict[int, np.ndarray] = {}
        self.stop = StopSignal()
        source = OwnMemory({"array": self.array}, lock=lock, device_state=device_state)
        options |= {"interval_s": interval_s or 0.0, "on_commit": self.commits.append, "stop": self.stop}
        tls = TlsFiles(tls_dir) if tls_dir is not None else None
        metrics = options.setdefault("metrics", Metrics())
        if tls is not None:
            metrics.watch_certificate(tls.expires)
        if dial is None:
            self.primary = primary_of(source, "orders", to, tls=tls, **options)
        else:
            self.primary = Primary("orders", source, dial, **options)
        if connect_timeout_s and dial is None:
            try:
                self.primary.connect(connect_timeout_s)
            except BaseException:
                self.primary.close(0.0)
                source.close()
                self.stop.close()
                raise
        between = None if interval_s is None else Between()
        self.protection = Protection(self.primary, source, self.stop, None, no_reader, between)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(LinkError):
            self.protection.close(1.0)

    def step(self, row: int, *, wait: bool = True) -> int:
        """Write a row, and take a checkpoint."""
        self.array[row] += np.arange(512) % (row + 2) + 1
        epoch = self.protection.checkpoint(wait=wait, timeout_s=LONG_S)
        self.at[epoch] = self.array.copy()
        return epoch


def is_lost(primary: Primary) -> bool:
    """Whether it knows that its link is broken."""
    try:
        primary.check()
    except LinkError:
        return True
    return False


def restored(store: Path, at: int | None = None) -> np.ndarray:
    arrays, _ = arrays_of(Store(store).history("orders").restore(at))
    return arrays["array"]


def entries(store: Path) -> list[Entry]:
    return Store(store).history("orders").entries()


# The main job


def test_arrays_come_back_under_their_names(tmp_path: Path) -> None:
    orders = np.arange(3000, dtype="<f4").reshape(30, 100)
    book = bytearray(b"page one")
    commits: list[Committed] = []
    with (
        backup_in(tmp_path / "store") as backup,
        protect(
            {"orders": orders, "book": book},
            to=backup.addresses[0],
            name="desk",
            device_state=lambda: b"at %d" % orders[0, 0],
            on_commit=commits.append,
        ) as protection,
    ):
        for step in range(5):
            orders[step] = -step
            book[0:1] = b"%d" % step
            protection.checkpoint()
    assert [commit.epoch for commit in commits] == [0, 1, 2, 3, 4]
    history = Store(tmp_path / "store").history("desk")
    arrays, device_state = arrays_of(history.restore())
    assert arrays["orders"].dtype == orders.dtype
    assert np.array_equal(arrays["orders"], orders)
    assert bytes(arrays["book"]) == bytes(book)
    assert device_state == b"at 0"
    arrays, _ = arrays_of(history.restore(2))
    assert bytes(arrays["book"]) == b"2age one"
    assert [entry.position for entry in history.entries()] == [commit.position for commit in commits]


def test_an_interval_and_a_lock(tmp_path: Path) -> None:
    lock = threading.Lock()
    pair = np.zeros(2 * 4096, dtype=np.int64)
    with (
        backup_in(tmp_path / "store") as backup,
        protect({"pair": pair}, to=backup.addresses[0], name="orders", interval_s=0.002, lock=lock) as protection,
    ):
        deadline = time.monotonic() + LONG_S
        while (protection.committed is None or protection.committed.epoch < 20) and time.monotonic() < deadline:
            with lock:
                pair[0] += 1
                pair[4096 + 17] += 1
        with pytest.raises(ValueError):
            protection.checkpoint()
    history = Store(tmp_path / "store").history("orders")
    assert len(history.entries()) > 20
    for entry in history.entries():
        arrays, _ = arrays_of(history.restore(entry.epoch))
        assert arrays["pair"][0] == arrays["pair"][4096 + 17], "a pause fell into a write"
    with pytest.raises(ValueError):
        protect({"pair": pair}, to=ANY, name="orders", interval_s=1.0)


@pytest.mark.parametrize("wait", ["received", "durable", "applied"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "auto"])
def test_every_level_and_compression(tmp_path: Path, wait: Any, compression: str) -> None:
    with (
        backup_in(tmp_path / "store") as backup,
        Memory(backup.addresses[0], wait=wait, compression=compression) as memory,
    ):
        for row in range(6):
            memory.step(row)
            if wait == "applied":
                assert backup.status()["names"]["orders"]["epoch"] == row
    for epoch, array in memory.at.items():
        assert np.array_equal(restored(tmp_path / "store", epoch), array)


def test_a_slow_link_is_found_and_what_goes_over_it_compressed(tmp_path: Path) -> None:
    text = np.frombuffer(b"".join(b"order %d of the day; " % number for number in range(60_000)), dtype=np.uint8)
    memory = np.zeros(1 << 20, dtype=np.uint8)
    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0], rate=4e6) as proxy,
        protect({"memory": memory}, to=proxy.address, name="orders") as protection,
    ):
        for step in range(6):
            memory[:] = text[step : step + len(memory)]
            protection.checkpoint(wait=True)
        status = protection.status()
        assert status["wire_bytes"] < status["encoded_bytes"] / 2
    arrays, _ = arrays_of(Store(tmp_path / "store").history("orders").restore())
    assert np.array_equal(arrays["memory"], memory)


def test_a_unix_socket(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store", f"unix:{tmp_path}/socket") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(3)
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


# Links that break


def test_deltas_follow_where_the_backup_holds_what_was_sent(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy, Memory(proxy.address) as memory:
        for row in range(10):
            memory.step(row)
            proxy.cut()
            memory.array[row + 10] += 7  # not lost, though no link is there to carry it
    assert proxy.connections == 10
    assert np.array_equal(restored(tmp_path / "store"), memory.at[9])
    assert [entry.is_base for entry in entries(tmp_path / "store")] == [True] + [False] * 9
    assert [commit.epoch for commit in memory.commits] == list(range(10))


def test_deltas_follow_a_backup_that_was_started_again(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        address = backup.addresses[0]
        with Memory(address) as memory:
            memory.step(1)
            backup.close()
            memory.array[2] += 5
            with backup_in(tmp_path / "store", address):
                memory.step(3)
                assert [entry.is_base for entry in entries(tmp_path / "store")] == [True, False]
                assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_what_was_sent_and_never_arrived_comes_again(tmp_path: Path) -> None:
    """Checkpoints that vanish on the way, once whole and once in the middle: their pages go full in the next."""
    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address, window=3, compression="none") as memory,
    ):
        for row in range(0, 30, 3):
            memory.step(row)
            proxy.silent.set()
            lost = [memory.step(row + 1, wait=False), memory.step(row + 2, wait=False)]
            assert memory.protection.committed is not None
            assert memory.protection.committed.epoch < lost[0]
            proxy.cut()
            proxy.silent.clear()
        memory.step(40)
    assert np.array_equal(restored(tmp_path / "store"), memory.array)
    found = entries(tmp_path / "store")
    assert sum(entry.is_base for entry in found) == 1
    # A number is used anew for what took the place of the lost; what was committed under it is what is there.
    assert [commit.position for commit in memory.commits] == [entry.position for entry in found]


@pytest.mark.parametrize("side", ["near", "far"])
def test_a_bit_that_changes_on_its_way_costs_a_link_and_no_more(tmp_path: Path, side: str) -> None:
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy:
        with Memory(proxy.address) as memory:
            memory.step(0)
            proxy.flips[side] = in_last_byte
            memory.step(1)
            until(lambda: not proxy.flips)
            memory.step(2)
            memory.step(3)
            assert proxy.connections == 2
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
        assert [commit.position for commit in memory.commits] == [
            entry.position for entry in entries(tmp_path / "store")
        ]


def test_acknowledgements_that_never_arrive(tmp_path: Path) -> None:
    """The backup holds more than the primary knows: it is told at the next hello, and it is committed then."""
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy:
        with Memory(proxy.address, window=3) as memory:
            memory.step(0)
            heard: list[int] = []
            epoch = memory.step(1, wait=False)
            until(lambda: entries(tmp_path / "store")[-1].epoch == epoch)
            proxy.cut()
            heard += [memory.step(2)]
            until(lambda: len(memory.commits) == 3)
        assert [commit.epoch for commit in memory.commits] == [0, 1, 2]


def test_a_full_copy_follows_a_store_that_was_lost(tmp_path: Path) -> None:
    with Memory("tcp://127.0.0.1:1", connect_timeout_s=0) as memory, pytest.raises(LinkError):
        memory.protection.checkpoint(timeout_s=0.2)
    with backup_in(tmp_path / "store") as backup:
        address = backup.addresses[0]
        with Memory(address) as memory:
            for row in range(3):
                memory.step(row)
            backup.close()
            shutil.rmtree(tmp_path / "store")
            with backup_in(tmp_path / "store", address):
                assert memory.step(5) == 3, "numbers go on behind what was committed"
                memory.step(6)
                found = entries(tmp_path / "store")
                assert [(entry.epoch, entry.is_base) for entry in found] == [(3, True), (4, False)]
                assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_new_run_of_the_primary_begins_with_a_full_copy(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        for run in range(3):
            with Memory(backup.addresses[0]) as memory:
                assert memory.step(run) == 2 * run
                memory.step(run + 20)
    found = entries(tmp_path / "store")
    assert [entry.epoch for entry in found] == list(range(6))
    assert [entry.is_base for entry in found] == [True, False] * 3
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_another_primary_of_the_same_name_is_turned_away(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        with Memory(backup.addresses[0], connect_timeout_s=0) as other:
            with pytest.raises(Refused) as caught:
                other.protection.checkpoint(timeout_s=0.5)
            assert caught.value.code == "busy"
        memory.step(2)
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_memory_that_is_too_large_or_a_name_that_is_not_taken(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store", names=frozenset({"book"})) as backup:
        with pytest.raises(Refused) as caught:
            Memory(backup.addresses[0])
        assert caught.value.code == "name"
    assert Store(tmp_path / "store").names() == []


# Takeover


def test_by_hand_while_the_primary_is_at_work(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        with pytest.raises(NoCheckpoint):
            backup.failover("orders")
        with Memory(backup.addresses[0]) as memory:
            last = memory.step(1)
            given = backup.failover("orders")
            assert (given["term"], given["epoch"]) == (1, last)
            assert backup.failover("orders") == given, "asked again, it is the same"
            image = np.fromfile(given["image"], dtype=np.int64)[: 64 * 512].reshape(64, 512)
            assert np.array_equal(image, memory.at[last])
            memory.array[5] += 1
            with pytest.raises(Fenced) as caught:
                memory.protection.checkpoint(timeout_s=LONG_S)
            assert caught.value.term == 1
            with pytest.raises(Fenced):
                memory.protection.checkpoint(timeout_s=LONG_S)
        with pytest.raises(Fenced):
            Memory(backup.addresses[0])
        assert [commit.epoch for commit in memory.commits] == [last]
        assert entries(tmp_path / "store")[-1].epoch == last
    # What was promoted stays so.
    with backup_in(tmp_path / "store") as backup:
        assert backup.failover("orders") == given
        with Memory(backup.addresses[0], term=0, connect_timeout_s=0) as late, pytest.raises(Fenced):
            late.protection.checkpoint(timeout_s=LONG_S)
        with Memory(backup.addresses[0], term=2) as survivor:
            assert survivor.step(1) == last + 1
            assert backup.status()["names"]["orders"]["role"] == "standby"


def command(tmp_path: Path, code: str) -> str:
    """A shell command that runs Python code in which `write(name)` appends the environment to a file."""
    script = tmp_path / f"command-{abs(hash(code))}.py"
    script.write_text(
        "import os, sys\n"
        f"def write(name):\n    with open({str(tmp_path)!r} + '/' + name, 'a') as file:\n"
        "        mine = {k: v for k, v in os.environ.items() if k[:6] == 'REMUS_' and k[:11] != 'REMUS_CKPT_'}\n"
        "        file.write(' '.join(f'{k}={v}' for k, v in sorted(mine.items())) + '\\n')\n" + code
    )
    return f"{sys.executable} {script}"


class SlowToTell(Link):
    """Its listening thread has read that the session is over, and does not come to say so: between the two, nothing of
    ours is called, so that a method of it has to be taken."""

    has_read = threading.Event()
    may_tell = threading.Event()

    def _take(self, event: object) -> None:
        if isinstance(event, messages.Error):
            self.has_read.set()
            assert self.may_tell.wait(LONG_S)
        super()._take(event)


def test_what_ended_a_session_is_said_to_who_is_sending(tmp_path: Path) -> None:
    def hello(**fields: Any) -> messages.Hello:
        return messages.Hello(
            role="primary", name="orders", memory_pages=4, page_size=4096, codec="delta", word=8, program="", **fields
        )

    ignored: dict[str, Any] = {"on_ack": lambda ack: None, "status": dict}
    with backup_in(tmp_path / "store") as backup:
        address = Address.parse(backup.addresses[0])
        link = SlowToTell(connect(address), hello(run=bytes(16)), **ignored)
        link.begin(messages.Begin(mode="full", term=0))
        other = Link(connect(address), hello(run=bytes(15) + b"2", term=5), **ignored)
        assert link.has_read.wait(LONG_S)
        link.write([b"some of a stream"])
        timer = threading.Timer(0.1, link.may_tell.set)
        timer.start()
        with pytest.raises(Fenced):
            link.commit(Position(0, bytes(32)), None, 16, 0)
        timer.join()
        link.close()
        other.close()


def test_automatic_only_behind_a_fence_that_succeeds(tmp_path: Path) -> None:
    fence = command(tmp_path, f"write('fence'); sys.exit(not os.path.exists({str(tmp_path / 'down')!r}))")
    takeover = command(tmp_path, "write('takeover')")
    with (
        backup_in(tmp_path / "store", lease_s=0.4, automatic=True, fence=fence, on_failover=takeover) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        last = memory.step(1)
        time.sleep(0.6)  # more than a lease
        assert not (tmp_path / "fence").exists(), "heartbeats keep it"
        proxy.silent.set()
        proxy.refusing.set()
        until((tmp_path / "fence").exists)
        until(lambda: backup.status()["names"]["orders"]["fence"] == "failed")
        assert backup.status()["names"]["orders"]["role"] == "standby"
        (tmp_path / "down").touch()
        until((tmp_path / "takeover").exists)
        assert backup.status()["names"]["orders"]["role"] == "promoted"
        proxy.silent.clear()
        proxy.refusing.clear()
        with pytest.raises(Fenced):
            memory.step(2)
    seen = dict(pair.split("=", 1) for pair in (tmp_path / "takeover").read_text().split())
    assert (seen["REMUS_NAME"], seen["REMUS_EPOCH"], seen["REMUS_TERM"]) == ("orders", str(last), "1")
    assert Path(seen["REMUS_IMAGE"]).stat().st_size == 64 * 4096
    assert Path(seen["REMUS_DEVICE_STATE"]).exists()
    with pytest.raises(ValueError):
        Policy(automatic=True)


def test_a_goodbye_is_no_failover(tmp_path: Path) -> None:
    fence = command(tmp_path, "write('fence')")
    with backup_in(tmp_path / "store", lease_s=0.3, automatic=True, fence=fence) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        time.sleep(0.5)  # more than a lease
        assert backup.status()["names"]["orders"]["role"] == "standby"
    assert not (tmp_path / "fence").exists()


def test_a_takeover_that_fails_is_tried_again_and_one_that_was_done_is_not(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    takeover = command(tmp_path, f"write('takeover'); sys.exit(not os.path.exists({str(ready)!r}))")
    lines = lambda: (tmp_path / "takeover").read_text().count("\n")  # noqa: E731
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until((tmp_path / "takeover").exists)
        until(lambda: lines() > 0)
    before = lines()
    ready.touch()
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        until(lambda: lines() == before + 1)
        until(lambda: backup.status()["names"]["orders"]["takeover"] == "succeeded")
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        time.sleep(0.3)
        assert lines() == before + 1


def test_a_fence_by_hand(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        with pytest.raises(RemusError):
            backup.failover("orders", fence=True)
    with backup_in(tmp_path / "store", fence="exit 1") as backup:
        with pytest.raises(RemusError):
            backup.failover("orders", fence=True)
        assert backup.status()["names"]["orders"]["role"] == "standby"
    with backup_in(tmp_path / "store", fence="true") as backup:
        assert backup.failover("orders", fence=True)["term"] == 1


def test_there_and_back_five_times(tmp_path: Path) -> None:
    """Two sides take turns: what survived on one is protected by the other, until that one takes over."""
    with backup_in(tmp_path / "a") as one, backup_in(tmp_path / "b") as other:
        sides = [one, other]
        array, term, total = np.zeros((64, 512), dtype=np.int64), None, 0
        for turn in range(5):
            to = sides[turn % 2]
            with Memory(to.addresses[0], array=array, term=term) as memory:
                for row in range(3):
                    memory.step(row + turn)
                    total += 1
                expected = array.copy()
                array[60] = -1  # never committed
                given = to.failover("orders")
                with pytest.raises(Fenced):
                    memory.protection.checkpoint(timeout_s=LONG_S)
            assert given["term"] == turn + 1
            term = given["term"]
            image = np.memmap(given["image"], dtype=np.int64, mode="r+")
            array = image[: 64 * 512].reshape(64, 512)
            assert np.array_equal(array, expected)


# Users who ask


def test_status_and_failover_from_elsewhere(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store", lease_s=0.4) as backup, Memory(backup.addresses[0]) as memory:

        def dial() -> Any:
            return connect(Address.parse(backup.addresses[0]))

        memory.step(1)
        memory.step(2)
        until(lambda: ask(dial(), "status", {})["names"]["orders"]["primary"].get("committed_epoch") == 1)
        found = ask(dial(), "status", {})["names"]["orders"]
        assert found["epoch"] == 1
        assert found["connected"] is True
        assert found["primary"]["lag_checkpoints"] == 0
        assert found["primary"]["commit_latency_ms"]["p50"] > 0
        assert found["position"] == found["primary"]["committed_position"]
        assert found["position"].partition(":")[0] == "1"
        with pytest.raises(RemusError):
            ask(dial(), "failover", {"name": "nobody"})
        with pytest.raises(RemusError):
            ask(dial(), "dance", {})
        assert ask(dial(), "failover", {"name": "orders"})["epoch"] == 1


# Hostile peers


def greet(backup: Backup, **changes: Any) -> tuple[socket.socket, machine.Session]:
    host, port = backup.addresses[0].removeprefix("tcp://").rsplit(":", 1)
    peer = socket.create_connection((host, int(port)), timeout=LONG_S)
    session = machine.Session("client")
    hello: dict[str, Any] = {
        "program": "test", "role": "primary", "name": "orders", "run": bytes(16), "memory_pages": 4,
        "page_size": 4096, "codec": "delta", "word": 8,
    }  # fmt: skip
    peer.sendall(b"".join(map(bytes, session.send(messages.Hello(**hello | changes)))))
    return peer, session


def hear(peer: socket.socket, session: machine.Session) -> Any:
    while True:
        event = session.next_event()
        if event is not None and not isinstance(event, messages.Heartbeat):
            return event
        if event is None:
            data = peer.recv(4096)
            session.get_buffer()[: len(data)] = data
            session.buffer_updated(len(data))
            if not data:
                session.feed_eof()


def test_another_version_is_told_what_to_do(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        peer, session = greet(backup, versions=(7,))
        with peer:
            event = hear(peer, session)
        assert (event.code, "upgrade" in event.message) == ("version", True)


def test_a_bad_checkpoint_is_named_and_changes_nothing(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        until(lambda: not backup.status()["names"]["orders"]["connected"])
        peer, session = greet(backup)
        with peer:
            welcome = hear(peer, session)
            begin = messages.Begin(mode="full", term=welcome.term, position=welcome.position)
            good = (4).to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(8) + bytes(4096)
            too_many = (1025).to_bytes(4, "little")
            out = session.send(begin) + session.send_data([good, too_many])
            peer.sendall(b"".join(map(bytes, out)))
            event = hear(peer, session)
            assert event.code == "stream"
            assert event.offset == len(good)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
        with Memory(backup.addresses[0]) as memory:
            memory.step(2)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_commit_of_pages_that_did_not_come(tmp_path: Path, off: int) -> None:
    with backup_in(tmp_path / "store") as backup:
        source = Source()
        data = source.checkpoint()
        sent = source.sender.sent
        assert sent is not None
        peer, session = greet(backup)
        with peer:
            begin = messages.Begin(mode="full", term=hear(peer, session).term)
            commit = messages.Commit(
                position=source.position, before=None, stream_bytes=len(data), pages=sent.pages + off
            )
            out = session.send(begin) + session.send_data([data]) + session.send(commit)
            peer.sendall(b"".join(map(bytes, out)))
            event = hear(peer, session)
            assert (type(event), event.code) == (messages.Error, "malformed")
        until(lambda: "orders" not in backup.status()["names"])  # nothing was stored


# A disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.root
def test_a_full_disk_commits_nothing_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    store = small_disk / "store"
    rng = np.random.default_rng(4)
    with backup_in(store) as backup, Memory(backup.addresses[0]) as memory:
        with pytest.raises(Refused) as caught:
            for _ in range(40):
                memory.array[:] = rng.integers(0, 1 << 60, memory.array.shape)
                memory.protection.checkpoint(wait=True, timeout_s=2.0)
        assert caught.value.code == "store"
        until(lambda: len(memory.commits) == len(entries(store)))
        held = [commit.position for commit in memory.commits]
        assert len(held) > 3
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        memory.step(1)
    found = entries(store)
    assert [entry.position for entry in found] == [*held, memory.commits[-1].position]
    assert sum(entry.is_base for entry in found) == 1, "deltas follow: nothing was lost"
    assert np.array_equal(restored(store), memory.array)


@pytest.mark.root
def test_a_full_disk_decides_nothing(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that lives is not fenced. One that is gone is, and taken over from, once that can be written down; and
    for that a history has room of its own."""
    fenced = tmp_path / "fence"
    fence = command(tmp_path, "write('fence')")
    rng = np.random.default_rng(4)
    with (
        backup_in(small_disk / "store", lease_s=0.4, automatic=True, fence=fence) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        memory.step(1)
        (small_disk / "filler").write_bytes(bytes(1 << 20))
        with suppress(OSError), open(small_disk / "filler", "ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        deadline = time.monotonic() + 1.0  # more than two leases
        while time.monotonic() < deadline:
            memory.array[:] = rng.integers(0, 1 << 60, memory.array.shape)
            with pytest.raises(LinkError):
                memory.protection.checkpoint(wait=True, timeout_s=0.2)
        assert not fenced.exists(), "it has been heard of all the time"
        assert "space" in backup.status()["names"]["orders"]["trouble"]

        def fails(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr("remus_ckpt.store.state.replace_file", fails)
            proxy.refusing.set()
            proxy.cut()
            time.sleep(0.8)  # two leases
            assert not fenced.exists(), "it is gone, and what would follow could not be written down"
        until(lambda: backup.status()["names"]["orders"]["image"] is not None)
        assert backup.status()["names"]["orders"]["role"] == "promoted" and fenced.exists()
