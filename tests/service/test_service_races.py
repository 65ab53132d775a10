"""What may happen between two steps of the service: each test puts one thing exactly there."""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import Liar, Peer
from proxy import Proxy
from store_support import fill
from test_service import ANY, LONG_S, Memory, backup_in, entries, is_lost, restored, until

from remus_ckpt.errors import Fenced, LinkError, RemusError, StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import primary_of
from remus_ckpt.service.standby import Policy, Refusal, Standby
from remus_ckpt.session import messages
from remus_ckpt.session.frames import FrameType
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.store import PeerIdentity, Store
from remus_ckpt.wire.record import Position


def cut(proxy: Proxy, memory: Memory) -> None:
    """Break the link, and wait until the primary knows."""
    proxy.cut()
    until(lambda: is_lost(memory.primary))


def test_a_primary_that_stood_still_has_not_heard_the_backup(tmp_path: Path) -> None:
    """Its listening thread gets no turn for longer than a lease: on a busy machine, say."""
    lease_s, is_over = 0.4, threading.Event()

    def beats(peer: Peer) -> None:
        peer.welcome(lease_s=lease_s)
        while not isinstance(event := peer.hear(), messages.Commit):
            assert event is not None
        peer.say(messages.Ack(level="durable", position=event.position))
        for number in itertools.count(1):
            if is_over.wait(lease_s / 4):
                break
            peer.say(messages.Heartbeat(number=number, status={}))
        peer.wait()

    has_stood_still = threading.Event()

    def stand_still(ack: messages.Ack) -> None:
        time.sleep(1.5 * lease_s)
        has_stood_still.set()

    hello = messages.Hello(
        **{"role": "primary", "name": "orders", "memory_pages": 4, "page_size": 4096, "codec": "delta", "word": 8},
        **{"program": "", "run": bytes(16)},
    )
    with Liar(beats) as backup:
        link = Link(connect(Address.parse(backup.address)), hello, on_ack=stand_still, status=dict)
        with closing(link):
            link.begin(messages.Begin(mode="full", term=0))
            link.write([b"some of a stream"])
            link.commit(Position(0, bytes(32)), None, 16, 0)
            assert has_stood_still.wait(LONG_S)
            time.sleep(lease_s)
            link.check()
            is_over.set()  # now it is the backup that is silent
            assert select.select([link.failed], [], [], LONG_S)[0]
            with pytest.raises(LinkError):
                link.check()


def test_the_last_bytes_of_a_checkpoint_cannot_be_sent(tmp_path: Path) -> None:
    """They alone meet the broken link, and the pages of that checkpoint come again."""
    breaking: list[Proxy] = []

    def device_state() -> bytes:
        if breaking:
            cut(breaking.pop(), memory)
        return bytes(1 << 20)  # so much that it is sent at once, and the pages before it with it

    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address, device_state=device_state) as memory,
    ):
        memory.step(1)
        breaking.append(proxy)
        memory.step(2)
        memory.step(3)
    assert not breaking
    assert [entry.is_base for entry in entries(tmp_path / "store")] == [True, False, False]
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_base_that_was_lost_is_not_gone_on_from_at_what_another_stream_made(tmp_path: Path) -> None:
    """A page that became zeros since is in no base: deltas behind the old stream would leave it there as it was."""
    silencing: list[Proxy] = []

    def device_state() -> bytes:
        if silencing and proxy.connections == 2:
            silencing.pop().silent.set()
        return b""

    with (
        backup_in(tmp_path / "one") as one,
        backup_in(tmp_path / "other") as other,
        Proxy(one.addresses[0]) as proxy,
        Memory(proxy.address, window=3, device_state=device_state) as memory,
    ):
        memory.step(1)
        memory.array[1] = 0
        proxy.target = other.addresses[0]
        cut(proxy, memory)
        silencing.append(proxy)
        memory.step(2, wait=False)
        assert proxy.silent.is_set()
        assert not entries(tmp_path / "other")
        proxy.target = one.addresses[0]
        cut(proxy, memory)
        proxy.silent.clear()
        memory.step(3)
        assert proxy.connections == 3
    assert np.array_equal(restored(tmp_path / "one"), memory.array)


def test_a_callback_that_raises_costs_that_checkpoint_and_no_more(tmp_path: Path) -> None:
    failing: list[Exception] = []

    def device_state() -> bytes:
        if failing:
            raise failing.pop()
        return b"fine"

    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0], device_state=device_state) as memory:
            for row in range(3):
                failing.append(KeyError(row))
                with pytest.raises(KeyError):
                    memory.step(row)
                memory.step(row + 10)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
        assert [entry.epoch for entry in entries(tmp_path / "store")] == [0, 1, 2]


def test_a_checkpoint_that_broke_off_when_its_time_was_over(tmp_path: Path) -> None:
    """The next call tries again, as it says."""
    breaking: list[Proxy] = []

    def device_state() -> bytes:
        if breaking:
            cut(breaking.pop(), memory)
            time.sleep(0.1)
        return bytes(1 << 20)

    with (
        backup_in(tmp_path / "store") as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address, device_state=device_state) as memory,
    ):
        memory.step(1)
        breaking.append(proxy)
        with pytest.raises(LinkError):
            memory.protection.checkpoint(timeout_s=0.05)
        memory.step(2)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_takeover_that_outlives_its_term_is_not_that_of_the_next(tmp_path: Path) -> None:
    """Its command still runs when the survivor is protected here again; the next failover runs it anew."""
    runs, may_end = tmp_path / "runs", tmp_path / "may-end"
    takeover = f"echo $REMUS_TERM >> {runs}; while ! test -e {may_end}; do sleep 0.02; done"

    def terms() -> list[str]:
        return runs.read_text().split() if runs.exists() else []

    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            backup.failover("orders")
        until(lambda: terms() == ["1"])
        with Memory(backup.addresses[0], term=2) as survivor:
            survivor.step(2)
            may_end.touch()
            until(lambda: not any(thread.name.startswith("run_takeover") for thread in threading.enumerate()))
            backup.failover("orders")
        until(lambda: terms() == ["1", "3"])


def test_a_fence_by_hand_runs_although_an_earlier_one_failed(tmp_path: Path) -> None:
    fenced = tmp_path / "fenced"
    with backup_in(tmp_path / "store", fence=f"test -e {fenced}") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        with pytest.raises(RemusError):
            backup.failover("orders", fence=True)
        fenced.touch()
        assert backup.failover("orders", fence=True)["term"] == 1


class Guest:
    """A primary's session, as a standby sees it."""

    def __init__(self, number: int, on_end: Callable[[], None] = lambda: None) -> None:
        self.run_id = bytes(15) + bytes([number])
        self.status: dict[str, Any] = {}
        self.identity = PeerIdentity(f"guest {number}")
        self.heard = time.monotonic()
        self.ends: list[str] = []
        self._on_end = on_end

    def end(self, code: str, message: str, term: int | None = None) -> None:
        self.ends.append(code)
        self._on_end()

    def hello(self, term: int | None = None) -> messages.Hello:
        return messages.Hello(
            role="primary", name="orders", memory_pages=4, page_size=4096, codec="delta", word=8, program="test",
            run=self.run_id, term=term,
        )  # fmt: skip


def turned_away(standby: Standby, guest: Guest, term: int | None = None) -> str:
    """The code that it is told."""
    with pytest.raises(Refusal) as caught, standby.hosting(guest, guest.hello(term)):
        pass
    return caught.value.code


def test_a_primary_of_the_term_that_a_promotion_is_to_have_is_not_let_in(tmp_path: Path) -> None:
    """Both want term 1, and the promotion was asked for first."""
    with Store(tmp_path).writer("orders") as filled:
        fill(filled, 1)
    woken = threading.Event()
    standby = Standby("orders", Store(tmp_path).writer("orders"), Policy(lease_s=LONG_S), Metrics(), woken.set)
    leave = ExitStack()
    old, new = Guest(1, leave.close), Guest(2)
    given: list[Any] = []
    asking = threading.Thread(target=lambda: given.append(standby.take_over(fence=False)), daemon=True)
    with leave:
        leave.enter_context(standby.hosting(old, old.hello()))
        asking.start()
        assert woken.wait(LONG_S)
        assert turned_away(standby, new, 1) == "busy"
        assert not old.ends, "nothing has happened yet"
        standby.turn(time.monotonic())
        asking.join(LONG_S)
    assert old.ends == ["busy"]
    assert turned_away(standby, new, 1) == "fenced"
    assert given[0]["term"] == 1
    assert standby.status()["role"] == "promoted"
    standby.close()


def test_a_disk_that_hangs_is_no_silence_of_the_primary(tmp_path: Path) -> None:
    """While the backup is busy it hears nothing: that the primary said nothing then is not known."""
    hang = threading.Event()

    def on_phase(name: str, epoch: int) -> None:
        if name == "staged" and epoch == 1:
            hang.wait(0.9)  # three leases

    policy = Policy(lease_s=0.3, automatic=True, fence=f"touch {tmp_path}/fenced")
    with Backup(tmp_path / "store", [ANY], policy=policy, on_phase=on_phase) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            memory.step(2)
            assert backup.status()["names"]["orders"]["role"] == "standby"
        assert not (tmp_path / "fenced").exists()
    assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_promotion_between_the_check_and_the_acknowledgement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is then stored is no longer acknowledged, which is no fault of anybody."""
    go_on = threading.Event()
    promoted: list[dict[str, Any]] = []

    def on_phase(name: str, epoch: int) -> None:
        if name == "stored" and epoch == 1:
            asking.start()
            until(lambda: is_lost(memory.primary))  # it has been told
            go_on.set()

    with Backup(tmp_path / "store", [ANY], on_phase=on_phase) as backup:
        asking = threading.Thread(target=lambda: promoted.append(backup.failover("orders")), daemon=True)
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            with pytest.raises(Fenced):
                memory.step(2)
            assert go_on.is_set()
            assert [commit.epoch for commit in memory.commits] == [0]
        asking.join(LONG_S)
    assert promoted[0]["epoch"] == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_a_backup_that_fails_again_and_again_is_asked_less_and_less_often(tmp_path: Path) -> None:
    """Each link lasts until its first checkpoint: without a pause between them, memory is stopped for nothing."""
    dials: list[float] = []
    stop = StopSignal()

    def on_phase(name: str, epoch: int) -> None:
        if name == "staged":
            if len(dials) > 2:
                stop.set()
            raise StoreError("no room")

    with Backup(tmp_path / "store", [ANY], on_phase=on_phase) as backup:

        def dial() -> Connection:
            dials.append(time.monotonic())
            return connect(Address.parse(backup.addresses[0]))

        primary = Primary("orders", OwnMemory({"array": np.ones(512)}), dial, stop=stop)
        with closing(stop):
            for _ in primary.run():  # it goes on asking
                pass
        primary.close()
    pauses = [later - sooner for sooner, later in itertools.pairwise(dials)]
    # A busy machine may make a pause longer, and none shorter.
    assert pauses[0] >= 0.99 and pauses[1] >= 0.99 * backup.policy.lease_s / 4, pauses


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_primary_that_is_stopped_as_its_link_breaks(tmp_path: Path, comes_back: bool) -> None:
    """It tries for another one, so that what it has sent is committed; but not for long."""
    stop = StopSignal()
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy:
        primary = primary_of(OwnMemory({"array": np.ones(512)}), "orders", proxy.address, stop=stop)
        newest = -1
        for taken in primary.run():
            newest = taken.sent.epoch
            if newest == 1:
                primary.wait_for(newest)
                proxy.silent.set()  # the next is lost on its way
            elif newest == 2 and not stop.is_set:
                stop.set()
                begin = time.monotonic()
                proxy.refusing.set()
                proxy.cut()
                proxy.silent.clear()
                if comes_back:
                    threading.Timer(0.1, proxy.refusing.clear).start()
        assert primary.ended == "stopped"
        assert primary.committed is not None
        assert primary.committed.epoch == (2 if comes_back else 1)
        assert time.monotonic() - begin < LONG_S
        primary.close()
    stop.close()


@pytest.mark.parametrize("in_thread", [False, True])
def test_closed_twice_nobody_elses_descriptor_is_touched(tmp_path: Path, in_thread: bool) -> None:
    options: dict[str, Any] = {"interval_s": 0.01, "lock": threading.Lock()} if in_thread else {}
    with backup_in(tmp_path / "store") as backup, ExitStack() as files:
        memory = Memory(backup.addresses[0], **options)
        memory.protection.close()
        others = [files.enter_context(open(tmp_path / str(number), "wb+", buffering=0)) for number in range(8)]
        memory.protection.close()
        assert [os.fstat(other.fileno()).st_size for other in others] == [0] * 8
        with pytest.raises(ValueError):
            memory.protection.checkpoint()
        backup.close()
        backup.stop()


def test_a_stop_signal_that_is_closed() -> None:
    stop = StopSignal()
    number = stop.fileno()
    stop.close()
    other = os.memfd_create("other")
    try:
        assert other == number
        stop.set()
        stop.close()
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)


def test_who_waits_for_a_commit_is_told_that_another_has_taken_over(tmp_path: Path) -> None:
    lock = threading.Lock()
    found: list[BaseException] = []

    def wait() -> None:
        try:
            memory.protection.wait_for(1 << 40)
        except RemusError as error:
            found.append(error)

    with backup_in(tmp_path / "store") as backup:
        memory = Memory(backup.addresses[0], interval_s=0.01, lock=lock)
        until(lambda: memory.protection.committed is not None)
        waiting = threading.Thread(target=wait)
        waiting.start()
        backup.failover("orders")
        waiting.join(LONG_S)
        with pytest.raises(Fenced):
            memory.protection.close()
    assert [type(error) for error in found] == [Fenced]


@pytest.fixture
def goodbyes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that standbys have noted; each takes them its time."""
    noted: list[str] = []
    real = Standby.said_goodbye

    def said_goodbye(self: Standby, reason: str) -> None:
        time.sleep(0.3)
        real(self, reason)
        noted.append(reason)

    monkeypatch.setattr(Standby, "said_goodbye", said_goodbye)
    return noted


def test_a_goodbye_has_been_noted_when_the_primary_is_closed(tmp_path: Path, goodbyes: list[str]) -> None:
    """Hung up on at once, it may never arrive; then an orderly end looks like a death."""
    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        assert goodbyes == ["closed"]


def test_no_heartbeat_follows_a_goodbye(tmp_path: Path, goodbyes: list[str]) -> None:
    """While the backup takes its time to hang up, many are due."""
    sent: list[bytes] = []

    def dial() -> Connection:
        connection = connect(Address.parse(backup.addresses[0]))
        send = connection.send

        def noted(buffers: Any, timeout_s: float | None) -> None:
            sent.append(b"".join(map(bytes, buffers)))
            send(buffers, timeout_s)

        connection.send = noted  # type: ignore[method-assign]
        return connection

    with backup_in(tmp_path / "store", lease_s=0.3) as backup:
        memory = Memory(backup.addresses[0], dial=dial)
        memory.step(1)
        memory.protection.close()
        assert goodbyes == ["closed"], "none was tried, which would have ended the link at once"
    assert sent[-1][:1] == bytes([FrameType.GOODBYE])
