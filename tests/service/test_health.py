"""The health of a name: real backups and primaries are brought into each state, and every way to ask says the same."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proxy import Proxy
from support import Command
from test_service import LONG_S, Memory, backup_in, greet, hear, until

from remus_ckpt.errors import Refused
from remus_ckpt.service import keys
from remus_ckpt.service.attempts import Base
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.health import STATES, Level, judge, judge_primary, overall
from remus_ckpt.service.protect import protect
from remus_ckpt.service.standby import Policy

LEASE_S = 0.6


@pytest.fixture
def remus(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def of(backup: Backup) -> dict[str, Any]:
    return backup.status()["names"].get("orders", {"health": {"state": "absent"}})


def shown(backup: Backup) -> dict[str, float]:
    """The metric: state → value."""
    samples = [sample for family in backup.metrics.registry.collect() for sample in family.samples]
    return {
        sample.labels["state"]: sample.value
        for sample in samples
        if sample.name == "remus_health" and sample.labels["name"] == "orders"
    }


def expect(backup: Backup, remus: Command, state: str, *words: str) -> dict[str, Any]:
    """Wait until a name is in a state, and compare what all who ask are told; returns its status."""
    level = STATES[state][0]
    asking = ["--from", backup.addresses[0], "--name", "orders"]
    deadline = time.monotonic() + LONG_S
    while True:  # a failed command runs again after a second: then all are asked again
        until(lambda: of(backup)["health"]["state"] == state)
        metric, ran = shown(backup), remus("status", "--check", *asking)
        found = json.loads(remus("status", *asking, "--json").out)["names"]["orders"]
        text = remus("status", *asking).out
        if of(backup)["health"]["state"] == state == found["health"]["state"] or time.monotonic() > deadline:
            break
    health = found["health"]
    assert metric == {state: level}
    assert (ran.code, len(ran.out.splitlines())) == (level, 1), ran.out
    assert ran.out.startswith(f"REMUS {level.name} - orders {state}")
    assert text.startswith(f"orders: {level.name} - {state}")
    assert (health["state"], health["level"], health["next"]) == (state, level, STATES[state][1])
    assert health["words"].startswith(state)
    for word in words:
        assert word in health["words"], health["words"]
    return found


def waiting_for(path: Path) -> str:
    """A command that runs until a file is there, and succeeds if it holds something."""
    return f"while [ ! -e {path} ]; do sleep 0.02; done; test -s {path}"


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Nothing becomes durable."""

    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        yield


# The states of a name


def test_a_first_copy_and_what_follows(tmp_path: Path, remus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs, so the first copy cannot be committed."""
    array = np.arange(1 << 20, dtype=np.int64)
    may_go_on = threading.Event()
    real = os.fdatasync

    def hang(fd: int) -> None:
        may_go_on.wait(LONG_S)
        real(fd)

    with (
        backup_in(tmp_path / "store", lease_s=LEASE_S) as backup,
        protect({"array": array}, to=backup.addresses[0], name="orders") as protection,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", hang)
            working = threading.Thread(target=protection.checkpoint, kwargs={"wait": True, "timeout_s": LONG_S})
            working.start()
            try:
                until(lambda: (of(backup).get("first_copy") or {"received_bytes": 0})["received_bytes"] > array.nbytes)
                found = expect(backup, remus, "copying", "nothing is committed yet", "100% of 8.0 MiB at")
                assert found["first_copy"]["memory_bytes"] == found["first_copy"]["data_bytes"] == array.nbytes
                samples = [one for family in backup.metrics.registry.collect() for one in family.samples]
                received = [one.value for one in samples if one.name == "remus_base_received_bytes"]
                assert received[0] >= array.nbytes
            finally:
                may_go_on.set()
        working.join()
        found = expect(backup, remus, "protected", "epoch 0 is committed")
        assert found["first_copy"] is None
        protection._primary.metrics.found("orders", "compare", "it had missed 2 pages", 2)
        expect(backup, remus, "tracking", "missed 2 pages", "the primary says")


def test_a_disk_that_is_slow(tmp_path: Path, remus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    with backup_in(tmp_path / "store", lease_s=LEASE_S) as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        real = os.fdatasync

        def hang(fd: int) -> None:
            may_go_on.wait(LONG_S)
            real(fd)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", hang)
            memory.step(2, wait=False)
            try:
                found = expect(backup, remus, "lagging", "epoch 0 is committed")
                assert LEASE_S < found["arriving_s"] < LONG_S
            finally:
                may_go_on.set()
        expect(backup, remus, "protected", "epoch 1 is committed")


def test_a_primary_that_is_gone(tmp_path: Path, remus: Command) -> None:
    with (
        backup_in(tmp_path / "store", lease_s=1.5) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        memory.step(1)
        proxy.refusing.set()
        proxy.cut()
        found = expect(backup, remus, "disconnected", "no goodbye", "of the lease are left")
        assert 0 < found["lease_left_s"] <= 1.5
        found = expect(backup, remus, "unprotected", "no goodbye", "the lease is over")
        assert (found["connected"], found["lease_left_s"], found["last_end"]["goodbye"]) == (False, 0, False)
        proxy.refusing.clear()
        memory.step(2)
        expect(backup, remus, "protected")
        memory.protection.close()
        found = expect(backup, remus, "ended", "it said goodbye (closed)")
        assert found["lease_left_s"] is None
    with backup_in(tmp_path / "store") as again:
        expect(again, remus, "ended", "no primary has connected since this backup started", "said goodbye")


def test_a_primary_of_an_old_term(tmp_path: Path, remus: Command) -> None:
    with backup_in(tmp_path / "store", lease_s=LEASE_S) as backup:
        with Memory(backup.addresses[0], term=5) as memory:
            memory.step(1)
        until(lambda: not of(backup)["connected"])
        peer, _ = greet(backup, term=3)
        with peer:
            found = expect(backup, remus, "refused", "(fenced)", "tcp://127.0.0.1")
        assert found["refused"]["code"] == "fenced"


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.ENOSPC])
def test_a_store_that_fails(tmp_path: Path, remus: Command, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    state = "store failing" if number == errno.EIO else "store full"
    with backup_in(tmp_path / "store", lease_s=LEASE_S) as backup, Memory(backup.addresses[0]) as memory:
        begun = time.time()
        with failing(monkeypatch, number):
            with pytest.raises(Refused):
                memory.protection.checkpoint(wait=True, timeout_s=0.5)
            found = expect(backup, remus, state, os.strerror(number), "is there, and its checkpoints are refused")
            assert not found["connected"] and begun <= found["trouble_since"] <= time.time()
            assert found["refused"]["code"] == "store"
        memory.step(1)
        expect(backup, remus, "protected")


def test_a_store_that_cannot_even_be_made(tmp_path: Path, remus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name has no place on the disk yet, and is shown as long as a primary tries."""
    with backup_in(tmp_path / "store", lease_s=LEASE_S) as backup:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("remus_ckpt.store.state.replace_file", full)
            peer, session = greet(backup)
            with peer:
                assert hear(peer, session).code == "store"
            expect(backup, remus, "store full", "No space left", "is there, and its checkpoints are refused")
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            expect(backup, remus, "protected")


def test_a_store_that_is_damaged(tmp_path: Path, remus: Command) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        memory.step(2)
    (segment,) = (tmp_path / "store" / "orders" / "segments").glob("*.remus")
    data = bytearray(segment.read_bytes())
    data[-10] ^= 1
    segment.write_bytes(data)
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(2)
        expect(backup, remus, "damaged", ".remus")


def test_a_takeover(tmp_path: Path, remus: Command) -> None:
    fence, takeover = tmp_path / "fence", tmp_path / "takeover"
    commands = {"fence": waiting_for(fence), "on_failover": waiting_for(takeover)}
    with (
        backup_in(tmp_path / "store", lease_s=LEASE_S, automatic=True, **commands) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        memory.step(1)
        proxy.refusing.set()
        proxy.cut()
        expect(backup, remus, "fencing", "no primary for")
        fence.touch()
        expect(backup, remus, "fence failed", "nothing was promoted")
        fence.write_text("done")
        expect(backup, remus, "taking over", "at epoch 0 under term 1")
        takeover.touch()
        expect(backup, remus, "takeover failed", "is tried again in")
        takeover.write_text("done")
        expect(backup, remus, "taken over", "nothing protects the survivor here")


# A backup as a whole


def test_a_backup_that_keeps_nothing(tmp_path: Path, remus: Command) -> None:
    with backup_in(tmp_path / "store") as backup:
        asking = ["status", "--check", "--from", backup.addresses[0]]
        ran = remus(*asking)
        assert (ran.code, ran.out.startswith("REMUS WARNING - empty")) == (1, True)
        ran = remus(*asking, "--name", "orders")
        assert (ran.code, ran.out.startswith("REMUS CRITICAL - absent")) == (2, True)
        ran = remus(*asking, "--name", "orders", "--json")
        assert (ran.code, json.loads(ran.out)["state"]) == (2, "absent")
        assert remus("status", "--from", backup.addresses[0], "--name", "orders").code == 1
    ran = remus(*asking)
    assert (ran.code, ran.out.startswith("REMUS UNKNOWN - unreachable")) == (3, True)


def test_the_worst_of_several_names_counts(tmp_path: Path, remus: Command) -> None:
    array = np.ones(100)
    with backup_in(tmp_path / "store", lease_s=LEASE_S) as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        with protect({"array": array}, to=backup.addresses[0], name="books") as protection:
            protection.checkpoint(wait=True)
            ran = remus("status", "--check", "--from", backup.addresses[0])
            assert (ran.code, "all 2 names" in ran.out) == (0, True)
        until(lambda: not backup.status()["names"]["books"]["connected"])
        ran = remus("status", "--check", "--from", backup.addresses[0])
        assert (ran.code, "books ended" in ran.out) == (1, True)
        assert remus("status", "--check", "--name", "orders", "--from", backup.addresses[0]).code == 0
        assert "books" not in remus("status", "--name", "orders", "--from", backup.addresses[0]).out


@pytest.mark.parametrize("whose", ["backup", "orders", "nobody"])
def test_a_certificate_that_ends_soon(tmp_path: Path, remus: Command, whose: str) -> None:
    keys.init(tmp_path / "ca", now=datetime.now(UTC) - timedelta(days=1))
    for name in ("backup", "orders", "me"):
        keys.issue(tmp_path / "ca", name, hosts=["127.0.0.1"], days=5 if name == whose else 50)
    listen, own = ["tls://127.0.0.1:0"], tmp_path / "ca" / "backup"
    with (
        Backup(tmp_path / "store", listen, tls_dir=own, policy=Policy(lease_s=1.0)) as backup,
        Memory(backup.addresses[0], tls_dir=tmp_path / "ca" / "orders") as memory,
    ):
        memory.step(1)
        until(lambda: "certificate_expires" in of(backup)["primary"])
        asking = ["--from", backup.addresses[0], "--tls-dir", tmp_path / "ca" / "me"]
        ran = remus("status", "--check", "--name", "orders", *asking)
        told = {"backup": "certificate ends: the backup's", "orders": "certificate ends: the primary's", "nobody": "OK"}
        assert (ran.code, told[whose] in ran.out) == (int(whose != "nobody"), True), ran.out
        assert (told[whose] in remus("status", *asking).out) is True


def test_what_a_peer_says_cannot_drive_a_terminal(tmp_path: Path, remus: Command) -> None:
    with backup_in(tmp_path / "store") as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
            memory.primary.ended = "\x1b[2J\nOK - protected"
        until(lambda: not of(backup)["connected"])
        for ran in (
            remus("status", "--from", backup.addresses[0]),
            remus("status", "--check", "--from", backup.addresses[0]),
        ):
            assert "\x1b" not in ran.out and "\nOK" not in ran.out
            assert "it said goodbye" in ran.out


# The decision alone

GOOD: dict[str, Any] = {
    "role": "standby", "term": 0, "epoch": 7, "position": "7:00", "connected": True, "peer": "x", "silent_s": 0.1,
    "last_commit_at": 99.0, "first_copy": None, "arriving_s": None, "last_end": None, "lease_left_s": 4.0,
    "refused": None, "room": None, "trouble": None, "trouble_since": None, "store_fault": None, "fence": None,
    "fence_retry_s": None,
    "takeover": None, "takeover_retry_s": None, "image": None, "warnings": [], "primary": {},
}  # fmt: skip
COPY = Base(bytes(16), None, 1 << 22, None, 0.0).status(1 << 20, 2.0)


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("protected", {}),
        ("opening", {"role": "opening", "trouble": "its disk hangs"}),
        ("store failing", {"role": "unknown", "trouble": "cannot be opened"}),
        ("store full", {"role": "unknown", "trouble": "no space", "store_fault": "full"}),
        ("copying", {"epoch": None}),
        ("copying", {"first_copy": COPY, "primary": {"copy_pass": 2}}),
        ("copying", {"first_copy": COPY, "primary": {"copy_pass": "nan"}}),
        (
            "store failing",
            {"first_copy": COPY, "store_fault": "failing", "trouble": "I/O error", "trouble_since": 90.0},
        ),
        ("lagging", {"arriving_s": 5.1}),
        ("not ready", {"primary": {"disk_trouble": "web.raw is being copied"}}),
        ("protected", {"primary": {"disk_trouble": None}}),
        ("protected", {"arriving_s": 4.9}),
        ("protected", {"primary": {"missed_pages": "many"}}),
        ("tracking", {"primary": {"missed_pages": 3}}),
        ("certificate ends", {"primary": {"certificate_expires": 101.0}}),
        ("certificate ended", {"primary": {"certificate_expires": 99.0}}),
        ("protected", {"primary": {"certificate_expires": "never"}}),
        ("protected", {"primary": {"certificate_expires": float("nan")}}),
        ("protected", {"primary": {"certificate_expires": float("-inf")}}),
        ("unprotected", {"connected": False, "lease_left_s": 0.0}),
        ("unprotected", {"connected": False, "lease_left_s": None, "epoch": None, "silent_s": None}),
        ("disconnected", {"connected": False, "lease_left_s": 0.1}),
        ("fence failed", {"connected": False, "lease_left_s": 0.0, "fence": "failed"}),
        ("disconnected", {"connected": False, "lease_left_s": 1.0, "fence": "failed"}),
        ("taken over", {"role": "promoted", "connected": False}),
        ("taking over", {"role": "promoted", "takeover": "not run"}),
        ("takeover failed", {"role": "promoted", "store_fault": "failing", "trouble": "I/O error"}),
    ],
)
def test_a_state_for_each_status(state: str, changes: dict[str, Any]) -> None:
    health = judge(GOOD | changes, lease_s=5.0, now=100.0)
    assert (health.state, health.words.partition(":")[0]) == (state, state)
    assert "nan" not in health.words


@pytest.mark.parametrize(
    ("left_days", "state"), [(-1.0, "certificate ended"), (13.0, "certificate ends"), (15.0, "protected")]
)
def test_the_certificate_of_a_backup(left_days: float, state: str) -> None:
    health = judge(GOOD, lease_s=5.0, now=100.0).status()
    report = {"names": {"orders": {"health": health}}, "certificate_expires": 100.0 + left_days * 86400}
    assert overall(report, None, 100.0).state == state
    assert overall(report, "orders", 100.0).state == state


def test_the_words_of_a_first_copy() -> None:
    health = judge(GOOD | {"first_copy": COPY, "epoch": None, "primary": {"copy_pass": 3}}, lease_s=5.0, now=100.0)
    assert health.words == (
        "copying: nothing is committed yet, 25% of 4.0 MiB at 512.0 KiB/s with about 6.0 s left, in pass 3 over what "
        "was written meanwhile, the primary says"
    )


def test_every_state_is_documented() -> None:
    page = (Path(__file__).parents[2] / "specs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([a-z ]+)` \| (\d) \|", page, re.MULTILINE)
    assert {state: Level(int(code)) for state, code in rows} == {state: level for state, (level, _) in STATES.items()}


def test_nothing_that_is_not_good_leaves_the_user_alone() -> None:
    assert [state for state, (level, what_next) in STATES.items() if bool(what_next) != (level > Level.OK)] == []


MINE = {
    "committed_epoch": 7,
    "connected": True,
    "copy_share": None,
    "last_commit_at": 99.0,
    "missed_pages": 0,
    "fenced": 0,
}


@pytest.mark.parametrize(
    ("changes", "ended", "state", "words"),
    [
        ({}, "", "protected", "epoch 7 is committed, the last commit 1.0 s ago"),
        (
            {"copy_share": 0.25, "committed_epoch": None},
            "",
            "copying",
            "nothing is committed yet, 25% of memory is sent",
        ),
        ({"committed_epoch": None}, "", "copying", "nothing is committed yet"),
        ({"connected": False}, "", "disconnected", "there is no link to the backup, epoch 7 is committed"),
        ({"connected": False, "fenced": 1}, "fenced", "fenced", "another side has taken over, epoch 7 is committed"),
        ({"connected": False}, "source gone", "ended", "this primary has ended (source gone)"),
        ({"missed_pages": 3}, "", "tracking", "the kernel missed 3 pages"),
        ({"certificate_expires": 100.0 + 86400.0}, "", "certificate ends", "the primary's certificate expires in 24 h"),
        ({"certificate_expires": 40.0}, "", "certificate ended", "the primary's certificate expired 1 min ago"),
    ],
)
def test_a_primary_judges_itself(changes: dict[str, Any], ended: str, state: str, words: str) -> None:
    health = judge_primary(MINE | changes, ended, 100.0)
    assert (health.state, health.words[: len(state) + 2 + len(words)]) == (state, f"{state}: {words}")
