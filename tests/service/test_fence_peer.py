"""Whom a fence stops: the primary that was let in last, also after the backup was killed, whatever it is called."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from certificates import Made, put
from hypothesis import given, settings
from hypothesis import strategies as st
from services import Service, make_keys, service, until
from store_support import fill
from test_service import Memory, backup_in, entries
from test_service_races import Guest, turned_away
from test_standby import Disk, asking_for, being_let_in, of, standing_by, turn

from remus_ckpt.errors import StoreError
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import protect
from remus_ckpt.store import HistoryWriter, PeerIdentity, Store
from remus_ckpt.store.state import load_state

NAMES = ("REMUS_PEER", "REMUS_PEER_HOST", "REMUS_PEER_PORT", "REMUS_PEER_CERT")


def telling(path: Path) -> str:
    """A fence that writes down whom it was told to stop: a line for each variable."""
    lines = " ".join(f'"${name}"' for name in NAMES)
    return f"printf '%s\\n' {lines} > {path}.new && mv {path}.new {path}"


def told(path: Path) -> list[str]:
    until(path.exists)
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    disk = Disk(monkeypatch)
    yield disk
    disk.may_go_on.set()


def protected_and_killed(tmp_path: Path, folder: Path) -> int:
    """One checkpoint over TLS; then the backup is killed, and the primary falls silent. Returns its port."""
    with service(tmp_path, folder, "--lease", "1s") as served:
        connection = connect(Address.parse(served.address), tls=TlsFiles(folder / "ca" / "primary"))
        memory = Memory(served.address, dial=lambda: connection)
        memory.step(7)
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            port: int = sock.getsockname()[1]
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        memory.primary.hang_up()
    return port


def asked(served: Service, **arguments: Any) -> dict[str, Any]:
    return served.ask("failover", name="orders", **arguments)


@pytest.mark.parametrize("how", ["automatic", "by hand"])
def test_the_fence_of_a_backup_that_was_killed_knows_whom_to_stop(tmp_path: Path, folder: Path, how: str) -> None:
    port = protected_and_killed(tmp_path, folder)
    fenced = tmp_path / "fenced"
    options = ["--auto-failover"] if how == "automatic" else []
    with service(tmp_path, folder, "--lease", "1s", "--fence", telling(fenced), *options) as again:
        whole = f"tls://127.0.0.1:{port} (primary)"
        if how == "by hand":
            assert again.ask()["names"]["orders"]["peer"] == whole
            assert asked(again, fence=True)["term"] == 1
        assert told(fenced) == [whole, "127.0.0.1", str(port), "primary"]
        until(lambda: again.ask()["names"]["orders"]["role"] == "promoted")


def test_the_peer_is_another_once_another_is_let_in(tmp_path: Path) -> None:
    fenced = tmp_path / "fenced"
    with backup_in(tmp_path / "store", fence=telling(fenced)) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            first = of(backup)["peer"]
        with Memory(backup.addresses[0]) as memory:
            memory.step(2)
            second = of(backup)["peer"]
    assert first != second
    with backup_in(tmp_path / "store", fence=telling(fenced)) as backup:
        backup.failover("orders", fence=True)
    assert told(fenced)[0] == second


def test_a_unix_socket_has_no_host(tmp_path: Path) -> None:
    where, fenced = f"unix:{tmp_path}/s", tmp_path / "fenced"
    with backup_in(tmp_path / "store", where) as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
    with backup_in(tmp_path / "store", where, fence=telling(fenced)) as backup:
        backup.failover("orders", fence=True)
    assert told(fenced) == [f"{where} (pid {os.getpid()})", "", "", ""]


def test_a_store_from_before_knows_nobody(tmp_path: Path) -> None:
    fenced = tmp_path / "fenced"
    with Store(tmp_path / "store").writer("orders") as filled:
        fill(filled, 1)
        assert "peer" not in filled.state.more
    with backup_in(tmp_path / "store", fence=telling(fenced)) as backup:
        assert of(backup)["peer"] is None
        backup.failover("orders", fence=True)
    assert told(fenced) == ["", "", "", ""]


def test_checkpoints_do_not_rewrite_it(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(0)
        path = tmp_path / "store" / "orders" / "store.json"
        before = (path.stat().st_ino, path.stat().st_mtime_ns)
        for row in range(5):
            memory.step(row)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    assert len(entries(tmp_path / "store")) == 6


# What a peer may say of itself


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("orders-2.example_net", "orders-2.example_net"),
        ("x" * 64, "x" * 64),
        ("-rf", ""),
        ("orders; touch PWNED", ""),
        ("$(touch PWNED)", ""),
        ("two\nlines", ""),
        ("B\u00fccher", ""),
        ("\u202eorders", ""),
    ],
)
def test_a_certificate_with_any_name(tmp_path: Path, name: str, word: str) -> None:
    authority = Made("authority")
    ours = put(tmp_path / "ours", [authority], [Made("backup", authority, is_ca=False)])
    theirs = put(tmp_path / "theirs", [authority], [Made(name, authority, is_ca=False)])
    policy = Policy(fence=f"cd {tmp_path}; {telling(tmp_path / 'fenced')}; eval echo $REMUS_PEER_CERT")
    memory = bytearray(4096)
    with (
        Backup(tmp_path / "store", ["tls://127.0.0.1:0"], tls_dir=ours, policy=policy) as backup,
        protect({"memory": memory}, to=backup.addresses[0], name="orders", tls_dir=theirs) as protection,
    ):
        protection.checkpoint(wait=True)
    with Backup(tmp_path / "store", [], tls_dir=ours, policy=policy) as backup:
        backup.failover("orders", fence=True)
    whole, host, port, certificate = told(tmp_path / "fenced")
    assert (host, certificate) == ("127.0.0.1", word)
    assert 0 < int(port) < 1 << 16
    assert whole.startswith(f"tls://127.0.0.1:{port} (")
    assert whole.isprintable()
    assert not (tmp_path / "PWNED").exists()


@settings(max_examples=100)
@given(text=st.text(max_size=400), name=st.text(max_size=80) | st.none())
def test_whatever_a_peer_is_called_it_can_be_kept_and_read_back(text: str, name: str | None) -> None:
    shown = PeerIdentity.shown(f"x{text}", host="::1", port=9, certificate=name)
    assert shown.certificate in ("", name)
    assert set(shown.certificate) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    json.dumps(shown.text, ensure_ascii=False).encode()
    assert not set(shown.text) & {"\0", "\n", "\x1b", "\ud800"}


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        [],
        {},
        {"text": ""},
        {"text": "x" * 301},
        {"text": "two\nlines"},
        {"text": 5},
        {"host": "a b"},
        {"host": "-x"},
        {"host": "$(id)"},
        {"host": "1" * 101},
        {"port": -1},
        {"port": 1 << 16},
        {"port": "80"},
        {"port": True},
        {"certificate": "-x"},
        {"certificate": "a b"},
        {"certificate": "x" * 65},
        {"certificate": None},
    ],
)
def test_a_store_whose_peer_is_wrong_is_refused(tmp_path: Path, wrong: Any) -> None:
    """Nobody is to be stopped on a guess."""
    good = {"text": "tls://10.0.0.5:4711 (orders)", "host": "10.0.0.5", "port": 4711, "certificate": "orders"}
    with Store(tmp_path).writer("orders") as filled:
        fill(filled, 1)
        filled.set_state(peer=good | {"of a later program": [1]})
    path = tmp_path / "orders" / "store.json"
    fields = json.loads(path.read_text())
    assert load_state(path.parent).more["peer"]["of a later program"] == [1]
    fields["peer"] = good | wrong if isinstance(wrong, dict) and wrong else wrong
    path.write_text(json.dumps(fields))
    with pytest.raises(StoreError):
        load_state(path.parent)


# Primaries that are not let in


def peer_of(path: Path) -> str:
    """As a restart would read it."""
    peer: str = Store(path).history("orders").state.more["peer"]["text"]
    return peer


def test_one_that_is_turned_away_at_the_last_moment_is_not_fenced(tmp_path: Path, disk: Disk) -> None:
    """It is written down already when the takeover is asked for, and the one before it may still be at work."""
    fenced = tmp_path / "fenced"
    woken = threading.Event()
    standby = standing_by(tmp_path / "store", woken.set, fence=telling(fenced))
    with standby.hosting(first := Guest(1), first.hello()):
        pass
    with being_let_in(disk, standby, Guest(2)) as ends:
        _, answers = asking_for(standby, woken, fence=True)
        disk.may_go_on.set()
        until(lambda: ends)
        assert ends == ["busy"]
        until(lambda: turn(standby) or answers)
    assert answers[0]["term"] == 1
    assert told(fenced)[0] == "guest 1"
    assert peer_of(tmp_path / "store") == "guest 1"
    standby.close()


def test_one_that_cannot_be_written_down_changes_nothing(tmp_path: Path, disk: Disk) -> None:
    standby = standing_by(tmp_path)
    with standby.hosting(first := Guest(1), first.hello()):
        pass
    before = Store(tmp_path).history("orders").state
    disk.full = True
    second = Guest(2)
    with pytest.raises(StoreError), standby.hosting(second, second.hello()):
        pass
    assert Store(tmp_path).history("orders").state == before
    assert standby.status()["peer"] == "guest 1"
    disk.full = False
    until(lambda: turn(standby) or standby.status()["trouble"] is None)
    assert peer_of(tmp_path) == "guest 1"
    with standby.hosting(second, second.hello()):
        assert peer_of(tmp_path) == "guest 2", "before it can commit anything"
    standby.close()


def test_a_survivor_that_could_not_be_let_in_is_the_one_to_fence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its term is in force, and fences off the one before it; it may come back at any time."""

    def set_state(self: HistoryWriter, **changes: Any) -> None:
        real(self, **changes)
        raise StoreError("neither written for good nor taken back")

    standby, real = standing_by(tmp_path), HistoryWriter.set_state
    with standby.hosting(first := Guest(1), first.hello()):
        pass
    second = Guest(2)
    with monkeypatch.context() as patched:
        patched.setattr(HistoryWriter, "set_state", set_state)
        with pytest.raises(StoreError), standby.hosting(second, second.hello(5)):
            pass
    until(lambda: turn(standby) or standby.status()["trouble"] is None)
    assert standby.status()["term"] == 5
    assert peer_of(tmp_path) == "guest 2"
    assert turned_away(standby, first, 0) == "fenced"
    standby.close()
