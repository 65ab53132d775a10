"""The commit log on real brokers: appended once, in one order, whichever of them die."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remus_ckpt.demo.brokers import Brokers
from remus_ckpt.errors import LogError, Overtaken
from remus_ckpt.fleet.engine import MAX_RECORD_BYTES
from remus_ckpt.fleet.jetstream import JetStreamLog, Nats, make_log, servers_of
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys

pytestmark = pytest.mark.brokers

_numbers = itertools.count()


@pytest.fixture
def log(brokers: Brokers) -> Iterator[JetStreamLog]:
    made = JetStreamLog(Nats(brokers.url))
    yield made
    made.close()


@pytest.fixture
def name() -> str:
    return f"n{next(_numbers)}.x"


def key() -> str:
    return os.urandom(8).hex()


def test_records_are_read_back_in_order(log: JetStreamLog, name: str) -> None:
    assert log.last(name) is None
    sequence = 0
    for number in range(3):
        sequence = log.append(name, b"%d" % number, expected=sequence, key=f"{name}-{number}")
    entries = list(log.read(name))
    assert [entry.data for entry in entries] == [b"0", b"1", b"2"]
    assert [entry.key for entry in entries] == [f"{name}-{number}" for number in range(3)]
    assert log.last(name) == entries[-1]
    assert list(log.read(name, entries[1].sequence)) == entries[2:]
    assert name in log.names()


def test_of_two_that_follow_the_same_record_one_succeeds(log: JetStreamLog, brokers: Brokers, name: str) -> None:
    first = log.append(name, b"", expected=0, key=key())
    other = JetStreamLog(Nats(brokers.url))
    won: list[int] = []
    lost: list[Overtaken] = []

    def race(mine: JetStreamLog) -> None:
        try:
            won.append(mine.append(name, b"", expected=first, key=key()))
        except Overtaken as error:
            lost.append(error)

    threads = [threading.Thread(target=race, args=(mine,)) for mine in (log, other) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert (len(won), len(lost)) == (1, 7)
    assert len(list(log.read(name))) == 2


def test_a_repeated_append_is_one_record(log: JetStreamLog, name: str) -> None:
    mine = key()
    first = log.append(name, b"x", expected=0, key=mine)
    assert log.append(name, b"x", expected=0, key=mine) == first
    log.append(name, b"y", expected=first, key=key())
    assert log.append(name, b"x", expected=0, key=mine) == first
    assert len(list(log.read(name))) == 2


def test_a_record_that_is_not_there_is_not_followed(log: JetStreamLog, name: str) -> None:
    with pytest.raises(LogError):
        log.append(name, b"", expected=1 << 40, key=key(), timeout_s=1.0)
    assert log.last(name) is None


def test_a_large_record_is_a_fault_of_ours(log: JetStreamLog, name: str) -> None:
    with pytest.raises(ValueError, match="at most"):
        log.append(name, bytes(MAX_RECORD_BYTES + 1), expected=0, key=key())


def test_nothing_is_appended_without_a_majority(log: JetStreamLog, brokers: Brokers, name: str) -> None:
    first = log.append(name, b"", expected=0, key=key())
    mine = key()
    try:
        brokers.kill(0)
        brokers.kill(1)
        with pytest.raises(LogError) as caught:
            log.append(name, b"", expected=first, key=mine, timeout_s=3.0)
        assert not isinstance(caught.value, Overtaken)
    finally:
        brokers.start(0)
        brokers.start(1)
    assert log.append(name, b"", expected=first, key=mine, timeout_s=30.0) > first
    assert len(list(log.read(name))) == 2


@pytest.mark.parametrize("number", range(3))
def test_any_broker_may_die(log: JetStreamLog, brokers: Brokers, name: str, number: int) -> None:
    sequence = log.append(name, b"", expected=0, key=key())
    brokers.kill(number)
    try:
        for _ in range(5):
            sequence = log.append(name, b"", expected=sequence, key=key(), timeout_s=30.0)
    finally:
        brokers.start(number)
    assert len(list(log.read(name))) == 6


def test_a_frozen_broker_is_waited_for_no_longer_than_asked(log: JetStreamLog, brokers: Brokers, name: str) -> None:
    sequence = log.append(name, b"", expected=0, key=key())
    for number in range(3):
        brokers.freeze(number)
    try:
        begin = time.monotonic()
        with pytest.raises(LogError):
            log.append(name, b"", expected=sequence, key=key(), timeout_s=1.0)
        assert time.monotonic() - begin < 10.0
    finally:
        for number in range(3):
            brokers.thaw(number)
    assert eventually(lambda: log.last(name) is not None)


def eventually(look: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether something holds within that time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if look():
                return True
        except LogError:
            pass
        time.sleep(0.2)
    return False


def test_a_log_is_made_only_where_each_record_is_synced() -> None:
    with Brokers(count=1, sync='"2m"') as them:
        with pytest.raises(LogError, match="does not sync each record"):
            them.make_log_once()
        nats = Nats(them.url)
        with pytest.raises(LogError, match="no commit log"):
            JetStreamLog(nats)
        with pytest.raises(LogError, match="is not known"):
            make_log(nats, replicas=1)
        with pytest.raises(LogError, match="its monitoring does not"):  # a port on which no HTTP is spoken
            make_log(nats, replicas=1, monitors=[them.url.replace("nats:", "http:")])
        with pytest.raises(LogError, match="nobody has checked"):
            JetStreamLog(nats)
        make_log(nats, replicas=1, vouched=True)
        assert not JetStreamLog(nats).is_synced
        nats.close()


def test_tls_lets_in_whom_the_brokers_know(tmp_path: Path) -> None:
    keys.init(tmp_path / "ca")
    keys.issue(tmp_path / "ca", "broker", hosts=["localhost"])
    keys.issue(tmp_path / "ca", "orders")
    keys.init(tmp_path / "other")
    keys.issue(tmp_path / "other", "stranger")
    with Brokers(count=1, tls_dir=tmp_path / "ca" / "broker") as them:
        them.make_log()
        assert them.url.startswith("tls://")
        log = JetStreamLog(Nats(them.url, tls=TlsFiles(tmp_path / "ca" / "orders")))
        assert log.append("orders", b"x", expected=0, key=key()) == 1
        log.close()
        with pytest.raises(LogError, match="--tls-dir"):
            Nats(them.url)
        with pytest.raises(LogError):
            Nats(them.url, tls=TlsFiles(tmp_path / "other" / "stranger"), timeout_s=3.0)
        with pytest.raises(LogError):
            Nats(them.url.replace("tls://", "nats://"), timeout_s=3.0)


def test_a_user_writes_only_where_the_brokers_allow(tmp_path: Path) -> None:
    """The permissions of docs/cluster.md."""
    keys.init(tmp_path / "ca")
    keys.issue(tmp_path / "ca", "broker", hosts=["localhost"])
    for who in ("orders", "admin"):
        keys.issue(tmp_path / "ca", who)
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    begin = page.index("authorization {")
    with Brokers(count=1, tls_dir=tmp_path / "ca" / "broker", rights=page[begin : page.index("END", begin)]) as them:
        admin = Nats(them.url, tls=TlsFiles(tmp_path / "ca" / "admin"))
        make_log(admin, replicas=1, vouched=True)
        admin.close()
        log = JetStreamLog(Nats(them.url, tls=TlsFiles(tmp_path / "ca" / "orders")))
        assert log.append("orders", b"x", expected=0, key=key()) == 1
        assert log.last("orders") is not None
        with pytest.raises(LogError):
            log.append("others", b"x", expected=0, key=key(), timeout_s=3.0)
        assert log.last("others") is None
        log.close()


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("nats://127.0.0.1", ["nats://127.0.0.1:4222"]),
        ("nats://u:p@127.0.0.1:1,127.0.0.2:2/", ["nats://127.0.0.1:1", "nats://127.0.0.2:2"]),
        ("tls://a.example,[::1]:7", ["tls://a.example:4222", "tls://[::1]:7"]),
    ],
)
def test_addresses_are_read(url: str, servers: list[str]) -> None:
    assert servers_of(url)[0] == servers
    assert servers_of("nats://u:p@127.0.0.1")[1:] == ("u", "p")


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "http://127.0.0.1", "nats://", "nats://a:b:c", "nats://h:99999", "nats://127.0.0.1/x"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(LogError):
        servers_of(url)


def test_plain_connections_stay_on_this_machine() -> None:
    with pytest.raises(LogError, match="plain"):
        servers_of("nats://192.0.2.1")
    assert servers_of("nats://192.0.2.1", insecure=True)[0] == ["nats://192.0.2.1:4222"]
