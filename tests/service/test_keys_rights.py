"""Certificates with limits, before a real backup: what they do not allow is refused, and nothing happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificates import Made, put
from services import LONG_S, until
from support import Command

from remus_ckpt.errors import LinkError, Refused, RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.rights import Action, Rights
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.service.standby import Policy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Backup]:
    keys.init(tmp_path / "ca")
    keys.issue(tmp_path / "ca", "backup", hosts=["127.0.0.1"])
    tls = tmp_path / "ca" / "backup"
    policy = Policy(lease_s=2.0)
    with Backup(tmp_path / "store", ["tls://127.0.0.1:0"], tls_dir=tls, policy=policy) as running:
        yield running


def issue(tmp_path: Path, who: str, may: list[Action], names: list[str]) -> Path:
    return keys.issue(tmp_path / "ca", who, rights=Rights.limited(may, names)).path.parent


def commit(backup: Backup, tls: Path, name: str) -> None:
    array = np.ones(512)
    with protect({"array": array}, to=backup.addresses[0], name=name, tls_dir=tls) as protection:
        protection.checkpoint(wait=True, timeout_s=LONG_S)


def order(backup: Backup, tls: Path, method: str, **arguments: Any) -> dict[str, Any]:
    return ask(connect(Address.parse(backup.addresses[0]), tls=TlsFiles(tls)), method, arguments, timeout_s=LONG_S)


@pytest.mark.parametrize(
    ("may", "names", "is_allowed"),
    [
        ([], [], True),
        (["protect"], [], True),
        (["protect"], ["orders"], True),
        (["protect", "read"], ["desk", "orders"], True),
        ([], ["desk"], False),
        (["protect"], ["desk"], False),
        (["read", "failover"], [], False),
        (["read"], ["orders"], False),
    ],
)
def test_who_may_protect(backup: Backup, tmp_path: Path, may: list[Action], names: list[str], is_allowed: bool) -> None:
    tls = issue(tmp_path, "who", may, names)
    if is_allowed:
        commit(backup, tls, "orders")
    else:
        with pytest.raises(Refused) as refused:
            commit(backup, tls, "orders")
        assert refused.value.code == "forbidden"
        assert not (tmp_path / "store" / "orders").exists()
    assert order(backup, tls, "status")["lease_s"] == 2.0


@pytest.mark.parametrize(
    ("may", "names", "is_allowed"),
    [
        ([], [], True),
        (["failover"], ["orders"], True),
        (["protect", "read"], [], False),
        (["failover"], ["desk"], False),
    ],
)
def test_who_may_order_a_failover(
    backup: Backup, tmp_path: Path, may: list[Action], names: list[str], is_allowed: bool
) -> None:
    commit(backup, tmp_path / "ca" / "backup", "orders")
    tls = issue(tmp_path, "who", may, names)
    if is_allowed:
        assert order(backup, tls, "failover", name="orders")["epoch"] == 0
    else:
        with pytest.raises(RemusError):
            order(backup, tls, "failover", name="orders")
    role = order(backup, tls, "status")["names"]["orders"]["role"]
    assert role == ("promoted" if is_allowed else "standby")


def test_a_limit_of_a_later_version_allows_nothing(backup: Backup, tmp_path: Path) -> None:
    """Of another program's making, under a CA that this backup trusts too."""
    other = Made("other")
    uris = ["urn:remus-ckpt:may:protect", "urn:remus-ckpt:until:noon"]
    tls = put(tmp_path / "later", [other], [Made("later", other, is_ca=False, uris=uris)])
    ours = (tmp_path / "ca" / "backup" / "ca.pem").read_bytes()
    for folder in (tmp_path / "ca" / "backup", tls):
        (folder / "ca.pem").write_bytes(ours + other.pem)
    with pytest.raises(Refused) as refused:
        commit(backup, tls, "orders")
    assert refused.value.code == "forbidden"
    assert order(backup, tls, "status")["names"] == {}


def test_limits_given_on_renewal_hold_from_the_next_session_on(backup: Backup, tmp_path: Path) -> None:
    tls = issue(tmp_path, "who", [], [])
    commit(backup, tls, "orders")
    keys.issue(tmp_path / "ca", "who", rights=Rights.limited(["read"], []), renew=True)
    with pytest.raises(Refused):
        commit(backup, tls, "orders")
    keys.issue(tmp_path / "ca", "who", rights=Rights.limited(["protect"], ["orders"]), renew=True)
    commit(backup, tls, "orders")
    kept = keys.issue(tmp_path / "ca", "who", hosts=["elsewhere"], renew=True)
    assert kept.rights == Rights.limited(["protect"], ["orders"])
    until(lambda: not order(backup, tls, "status")["names"]["orders"]["connected"])
    with pytest.raises(Refused):
        commit(backup, tls, "desk")


def test_what_is_not_understood_is_not_renewed(tmp_path: Path) -> None:
    keys.init(tmp_path)
    authority = Made("mine")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "ca-key.pem").write_bytes(authority.key_pem)
    uris = ["urn:remus-ckpt:until:noon"]
    put(tmp_path / "who", [authority], [Made("who", authority, is_ca=False, uris=uris)])
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "who", renew=True)


def test_the_command(tmp_path: Path, command: Command) -> None:
    assert command("keys", "init", tmp_path).code == 0
    limits = ["--may", "read", "--may", "failover", "--for-name", "orders"]
    ran = command("keys", "issue", tmp_path, "laptop", *limits)
    assert ran.code == 0, ran.err
    for folder in (tmp_path, tmp_path / "laptop"):
        shown = command("keys", "show", folder, "--json")
        rights = {row["name"]: row["rights"] for row in json.loads(shown.out)}["laptop"]
        assert rights == {"may": ["failover", "read"], "names": ["orders"], "unknown": []}
        line = next(line for line in command("keys", "show", folder).out.splitlines() if ": laptop (" in line)
        assert all(word in line for word in ("read", "failover", "orders"))
    for wrong in (["--may", "fly"], ["--for-name", "a b"]):
        assert command("keys", "issue", tmp_path, "other", *wrong).code == 2
    assert not (tmp_path / "other").exists()
