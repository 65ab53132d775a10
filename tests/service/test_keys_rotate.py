"""A rotation of the CA: at no moment, and wherever it is interrupted, is one refused who was let in before."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from certificates import shake
from services import LONG_S
from support import Command

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.rights import Rights
from remus_ckpt.link.tls import TlsFiles, load_certificates
from remus_ckpt.service import keys, rotation
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.service.revocation import revoke
from remus_ckpt.service.standby import Policy

STAGES = (rotation.begin, rotation.reissue, rotation.finish)
NAMES = ("backup", "orders", "laptop")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture(params=["without lists", "with lists"])
def ca(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    keys.init(tmp_path / "ca")
    for name in NAMES:
        keys.issue(tmp_path / "ca", name, hosts=["127.0.0.1"])
    if request.param == "with lists":
        keys.issue(tmp_path / "ca", "stolen", hosts=["127.0.0.1"])
        revoke(tmp_path / "ca", "stolen")
    return tmp_path / "ca"


def issuers(folder: Path) -> list[str]:
    return [one.subject.rfc4514_string() for one in load_certificates(folder / "ca.pem")]


def issuer(folder: Path) -> str:
    return load_certificates(folder / "cert.pem")[0].issuer.rfc4514_string()


@pytest.mark.parametrize("first", ["backup", "orders"])
def test_nobody_is_refused_while_services_run(ca: Path, tmp_path: Path, first: str) -> None:
    """Two machines get their files one after the other, in either order; a third asks all the time."""
    machines = {name: tmp_path / name for name in NAMES}

    def copy(name: str) -> None:
        # As `scp` does: one file after the other, each written in place.
        machines[name].mkdir(exist_ok=True)
        for file in ("crl.pem", "ca.pem", "key.pem", "cert.pem"):
            if (ca / name / file).exists():
                shutil.copy(ca / name / file, machines[name] / file)

    for name in NAMES:
        copy(name)
    order = [first, *(name for name in NAMES if name != first)]
    refused: list[Exception] = []
    is_over = threading.Event()
    answers = 0
    policy = Policy(lease_s=30.0)
    with Backup(tmp_path / "store", ["tls://127.0.0.1:0"], tls_dir=machines["backup"], policy=policy) as backup:
        address = Address.parse(backup.addresses[0])

        def ask_all_the_time() -> None:
            nonlocal answers
            tls = TlsFiles(machines["laptop"])
            while not is_over.is_set():
                try:
                    ask(connect(address, tls=tls), "status", {}, timeout_s=LONG_S)
                    answers += 1
                except LinkError as error:
                    refused.append(error)
                    return

        asking = threading.Thread(target=ask_all_the_time)
        asking.start()
        try:
            array = np.zeros(512)
            tls = machines["orders"]
            with protect({"array": array}, to=address, name="orders", tls_dir=tls) as protection:
                protection.checkpoint(wait=True, timeout_s=LONG_S)
                for stage in STAGES:
                    stage(ca)
                    for name in order:
                        copy(name)
                        before = answers
                        while answers < before + 2 and not refused:  # two, so that one began after the copy
                            is_over.wait(0.01)
                        protection._primary.hang_up()  # it has to connect again
                        protection.checkpoint(wait=True, timeout_s=LONG_S)
        finally:
            is_over.set()
            asking.join()
    assert refused == []
    assert {issuer(machine) for machine in machines.values()} == set(issuers(ca))
    assert all(issuers(machine) == issuers(ca) and len(issuers(ca)) == 1 for machine in machines.values())


class Interrupted(Exception):
    """Stands for SIGKILL."""


class Deaths:
    """Dies at the n-th moment before or after a file gets its name: only what happened before is durable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = 0
        replace = os.replace

        def replacing(*paths: str | Path) -> None:
            self._count()
            replace(*paths)
            self._count()

        monkeypatch.setattr(os, "replace", replacing)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Interrupted

    def die_at(self, number: int) -> None:
        """0: never."""
        self._left = number


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_interrupted_is_run_again(
    ca: Path, monkeypatch: pytest.MonkeyPatch, stage: Callable[[Path], rotation.Done]
) -> None:
    shutil.rmtree(ca / "laptop")
    for done in STAGES[: STAGES.index(stage)]:
        done(ca)
    if stage is rotation.finish:
        revoke(ca, "laptop")
    before = ca.with_name("before")
    shutil.copytree(ca, before)
    deaths = Deaths(monkeypatch)
    number, is_over = 0, False
    while not is_over:
        number += 1
        shutil.rmtree(ca)
        shutil.copytree(before, ca)
        # They run all the time, and take up what they can use.
        backup, orders = TlsFiles(ca / "backup"), TlsFiles(ca / "orders")
        deaths.die_at(number)
        try:
            stage(ca)
            is_over = True
        except Interrupted:
            shake(backup, orders)
            shake(orders, backup)
            deaths.die_at(0)
            stage(ca)
        deaths.die_at(0)
        assert rotation.stage(ca) == {rotation.begin: "begin", rotation.reissue: "reissue"}.get(stage)
        for pair in ((backup, orders), (TlsFiles(ca / "backup"), TlsFiles(ca / "orders"))):
            shake(*pair)
            shake(*reversed(pair))
    assert number > 4
    if stage is rotation.begin:
        rotation.reissue(ca)
    if stage is not rotation.finish:
        revoke(ca, "laptop")
        rotation.finish(ca)
    shake(TlsFiles(ca / "backup"), TlsFiles(keys.issue(ca, "new").path.parent))
    assert {issuer(ca / name) for name in ("backup", "orders")} == set(issuers(ca))
    assert sorted(path.name for path in ca.iterdir() if "key" in path.name) == ["ca-key.pem"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_may_be_repeated(ca: Path, stage: Callable[[Path], rotation.Done]) -> None:
    for done in STAGES[: STAGES.index(stage) + 1]:
        done(ca)
    before = {path: path.read_bytes() for path in ca.rglob("*") if path.is_file() and path.name != "crl.pem"}
    stage(ca)
    assert {path: path.read_bytes() for path in before} == before


def test_too_early(ca: Path, tmp_path: Path) -> None:
    far = keys.issue(ca, "far", out=tmp_path / "far").path.parent
    with pytest.raises(LinkError):
        rotation.reissue(ca)
    assert rotation.stage(ca) is None
    assert rotation.finish(ca).changed == ()
    rotation.begin(ca)
    assert rotation.stage(ca) == "begin"
    with pytest.raises(LinkError):
        rotation.finish(ca)
    with pytest.raises(LinkError):  # it was not given to `begin`
        rotation.reissue(ca, to=[far])
    assert rotation.stage(ca) == "begin"
    rotation.reissue(ca)
    assert rotation.stage(ca) == "reissue"
    with pytest.raises(LinkError):
        rotation.begin(ca)
    with pytest.raises(LinkError):  # `far` would be shut out
        rotation.finish(ca)
    assert len(issuers(ca / "backup")) == 2
    keys.issue(ca, "far", out=far, renew=True)
    rotation.finish(ca, to=[far])
    assert issuers(far) == issuers(ca / "backup") == issuers(ca)
    assert rotation.stage(ca) is None


def test_who_is_revoked_holds_nothing_up(ca: Path) -> None:
    rotation.begin(ca)
    revoke(ca, "laptop")
    done = rotation.reissue(ca)
    assert ca / "laptop" in done.left_out
    revoke(ca, "orders")  # by the old CA's list and the new one's
    with pytest.raises(ssl.SSLError):
        shake(TlsFiles(ca / "backup"), TlsFiles(ca / "orders"))
    with pytest.raises(ssl.SSLError):
        shake(TlsFiles(ca / "backup"), TlsFiles(ca / "laptop"))
    keys.issue(ca, "orders", renew=True)
    rotation.finish(ca)
    shake(TlsFiles(ca / "backup"), TlsFiles(ca / "orders"))
    assert len(load_certificates(ca / "orders" / "ca.pem")) == 1


def test_what_a_certificate_says_is_kept(tmp_path: Path) -> None:
    keys.init(tmp_path)
    rights = Rights.limited(["read"], ["orders", "desk"])
    before = keys.issue(tmp_path, "who", hosts=["127.0.0.1", "a.example"], rights=rights)
    for stage in STAGES:
        stage(tmp_path)
    after = keys.show(tmp_path / "who")[-1]
    assert (after.name, after.hosts, after.rights) == (before.name, before.hosts, before.rights)
    assert after.issuer != before.issuer


def test_a_ca_that_has_expired_can_be_rotated(tmp_path: Path) -> None:
    """Services are down by then; what was revoked under it needs no list any more."""
    then = datetime.now(UTC) - timedelta(days=100)
    keys.init(tmp_path, days=30, now=then)
    for name in ("backup", "orders"):
        keys.issue(tmp_path, name, hosts=["127.0.0.1"], now=then)
    revoke(tmp_path, "orders", now=then + timedelta(days=1))
    keys.issue(tmp_path, "orders", renew=True, now=then + timedelta(days=1))
    for stage in STAGES:
        stage(tmp_path)
    shake(TlsFiles(tmp_path / "backup"), TlsFiles(tmp_path / "orders"))


def test_two_commands_at_once(ca: Path) -> None:
    descriptor = os.open(ca, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for work in (lambda: rotation.begin(ca), lambda: revoke(ca, "orders"), lambda: keys.issue(ca, "other")):
            with pytest.raises(LinkError):
                work()
    finally:
        os.close(descriptor)
    rotation.begin(ca)


def test_the_command(ca: Path, command: Command) -> None:
    assert "begin" in command("keys", "rotate", ca).out
    assert command("keys", "rotate", ca, "reissue").code == 1
    assert command("keys", "rotate", ca, "again").code == 2
    for stage, after in (("begin", "reissue"), ("reissue", "finish"), ("finish", "begin")):
        ran = command("keys", "rotate", ca, stage)
        assert ran.code == 0, ran.err
        files = {"begin": "ca.pem", "reissue": "cert.pem", "finish": "ca.pem"}
        for name in NAMES:
            assert str(ca / name / files[stage]) in ran.out
        assert after in command("keys", "rotate", ca).out
    report = json.loads(command("keys", "rotate", ca, "begin", "--json").out)
    assert [Path(row["folder"]).name for row in report["changed"]] == sorted(NAMES)
    assert command("keys", "rotate", ca, "finish", "--days", "3").code == 2
