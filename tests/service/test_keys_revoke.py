"""Revoked certificates: both sides refuse them without a restart, and open sessions end."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from certificates import Made, put, shake
from cryptography import x509
from services import LONG_S, until
from support import Command

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.revocation import load_lists, revoked_in
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import Protection, protect
from remus_ckpt.service.revocation import revoke
from remus_ckpt.service.standby import Policy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """A CA with a backup and two who connect."""
    keys.init(tmp_path / "ca")
    for name in ("backup", "orders", "laptop"):
        keys.issue(tmp_path / "ca", name, hosts=["127.0.0.1"])
    return tmp_path / "ca"


@contextmanager
def running(ca: Path) -> Iterator[Backup]:
    # A long lease: nothing here is to end because a side was silent.
    policy = Policy(lease_s=60.0)
    with Backup(ca.parent / "store", ["tls://127.0.0.1:0"], tls_dir=ca / "backup", policy=policy) as backup:
        yield backup


@contextmanager
def protected(backup: Backup, tls: Path) -> Iterator[Protection]:
    lock = threading.Lock()
    protection = protect(
        {"array": np.ones(512)},
        to=backup.addresses[0],
        name="orders",
        tls_dir=tls,
        interval_s=0.02,
        lock=lock,
    )
    try:
        protection.wait_for(0, LONG_S)
        yield protection
    finally:
        with suppress(LinkError):  # some of these end without a link
            protection.close(5.0)


def status(backup: Backup, tls: Path) -> dict[str, object]:
    return ask(connect(Address.parse(backup.addresses[0]), tls=TlsFiles(tls)), "status", {}, timeout_s=LONG_S)


def is_refused(server: Path, client: Path) -> bool:
    try:
        shake(TlsFiles(server), TlsFiles(client))
    except ssl.SSLError:
        return True
    return False


def serials(folder: Path) -> set[int]:
    return {serial for _, serial in revoked_in(load_lists(folder / "crl.pem"))}


# Services that run


def test_the_session_of_a_revoked_primary_ends_and_a_renewed_one_is_let_in(ca: Path) -> None:
    with running(ca) as backup, protected(backup, ca / "orders") as protection:
        assert backup.status()["names"]["orders"]["connected"]
        revoke(ca, "orders")
        until(lambda: not backup.status()["names"]["orders"]["connected"])
        with pytest.raises(LinkError) as refused:
            status(backup, ca / "orders")
        assert "revoked" in str(refused.value)
        assert status(backup, ca / "laptop")
        committed = protection.committed
        assert committed is not None
        keys.issue(ca, "orders", renew=True)
        protection.wait_for(committed.epoch + 1, LONG_S)


def test_a_primary_leaves_a_revoked_backup(ca: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(ca) as backup, protected(backup, ca / "orders"):
        revoke(ca, "backup")
        until(lambda: not backup.status()["names"]["orders"]["connected"])

        def reasons() -> list[str]:
            return [record.fields["reason"] for record in caplog.records if "reason" in getattr(record, "fields", {})]

        # The primary says it of the backup, the backup of itself.
        until(lambda: any("its certificate does not pass: certificate revoked" in reason for reason in reasons()))
        until(lambda: any("our certificate has been revoked" in reason for reason in reasons()))


def test_a_list_that_arrives_damaged_leaves_the_last_good_one(ca: Path) -> None:
    revoke(ca, "laptop")
    files = TlsFiles(ca / "backup")
    path = ca / "backup" / "crl.pem"
    good = path.read_bytes()
    for data in (good[:-40], b"", good.replace(b"A", b"B")):
        path.write_bytes(data)
        with pytest.raises(ssl.SSLError):
            shake(files, TlsFiles(ca / "laptop"))
        shake(files, TlsFiles(ca / "orders"))
    path.unlink()
    with pytest.raises(ssl.SSLError):
        shake(files, TlsFiles(ca / "laptop"))
    revoke(ca, "orders")
    with pytest.raises(ssl.SSLError):
        shake(files, TlsFiles(ca / "orders"))


# What a folder may hold


def test_a_folder_without_a_list_asks_for_none(ca: Path) -> None:
    revoke(ca, "laptop")
    (ca / "backup" / "crl.pem").unlink()
    shake(TlsFiles(ca / "backup"), TlsFiles(ca / "laptop"))


@pytest.mark.parametrize("who", ["client", "server"])
def test_both_sides_look(ca: Path, who: str) -> None:
    revoke(ca, "laptop")
    sides = (ca / "laptop", ca / "orders") if who == "server" else (ca / "orders", ca / "laptop")
    assert is_refused(*sides)
    assert not is_refused(ca / "orders", ca / "backup")


MINE, OTHER = Made("mine"), Made("other")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        MINE.revoke()[:-30],
        MINE.revoke() + MINE.revoke()[:60],
        MINE.revoke() + MINE.pem,
        OTHER.revoke(),
        Made("mine").revoke(),
        MINE.revoke(days=(-20, -10)),
        MINE.revoke(days=(10, 20)),
    ],
    ids=["empty", "no PEM", "cut", "second cut", "a certificate", "other CA", "forged", "expired", "not yet valid"],
)
def test_a_list_that_says_nothing_is_refused_at_the_start(tmp_path: Path, data: bytes) -> None:
    folder = put(tmp_path / "me", [MINE], [Made("me", MINE, is_ca=False)])
    TlsFiles(folder)
    (folder / "crl.pem").write_bytes(data)
    with pytest.raises(LinkError):
        TlsFiles(folder)


def test_a_list_that_expires_meanwhile_lets_nobody_in(tmp_path: Path) -> None:
    folder = put(tmp_path / "me", [MINE], [Made("me", MINE, is_ca=False)])
    plain = TlsFiles(put(tmp_path / "peer", [MINE], [Made("peer", MINE, is_ca=False)]))
    second = 1 / 86400
    (folder / "crl.pem").write_bytes(MINE.revoke(days=(-1, 3 * second)))
    files = TlsFiles(folder)
    shake(files, plain)

    def has_expired() -> bool:
        try:
            shake(files, plain)
        except ssl.SSLCertVerificationError:
            return True
        return False

    until(has_expired)


def test_a_list_for_each_ca_that_is_trusted(tmp_path: Path) -> None:
    me = Made("me", MINE, is_ca=False)
    good, bad = Made("good", OTHER, is_ca=False), Made("bad", OTHER, is_ca=False)
    over = Made("over", days=(-20, -10))
    folder = put(tmp_path / "me", [MINE, OTHER, over], [me])
    (folder / "crl.pem").write_bytes(MINE.revoke())
    with pytest.raises(LinkError):
        TlsFiles(folder)
    # A CA that has expired needs none, and one that is not trusted does no harm.
    (folder / "crl.pem").write_bytes(MINE.revoke() + OTHER.revoke(bad) + Made("third").revoke())
    assert not is_refused(folder, put(tmp_path / "good", [MINE, OTHER], [good]))
    assert is_refused(folder, put(tmp_path / "bad", [MINE, OTHER], [bad]))


# What is revoked


def test_a_name_means_all_that_was_issued_under_it(ca: Path, tmp_path: Path) -> None:
    first = keys.show(ca / "orders")[-1]
    second = keys.issue(ca, "orders", renew=True)
    third = keys.issue(ca, "orders", out=tmp_path / "elsewhere")
    done = revoke(ca, "orders")
    assert {one.serial for one in done.revoked} == serials(ca) == {first.serial, second.serial, third.serial}
    assert {one.name for one in keys.show(ca) if one.is_revoked} == {"orders"}
    fourth = keys.issue(ca, "orders", renew=True)
    assert not fourth.is_revoked and not is_refused(ca / "backup", ca / "orders")


def test_what_a_renewal_has_replaced(ca: Path, tmp_path: Path) -> None:
    shutil.copytree(ca / "orders", tmp_path / "stolen")
    with pytest.raises(LinkError):
        revoke(ca, "orders", superseded=True)
    assert not (ca / "crl.pem").exists()
    keys.issue(ca, "orders", renew=True)
    revoke(ca, "orders", superseded=True)
    assert is_refused(ca / "backup", tmp_path / "stolen")
    assert not is_refused(ca / "backup", ca / "orders")


def test_a_renewal_that_never_arrived_has_replaced_nothing(ca: Path, tmp_path: Path) -> None:
    keys.issue(ca, "orders", renew=True)
    used = keys.show(ca / "orders")[-1].serial
    shutil.copytree(ca / "orders", tmp_path / "used")
    keys.issue(ca, "orders", renew=True)
    shutil.copytree(tmp_path / "used", ca / "orders", dirs_exist_ok=True)
    assert len(revoke(ca, "orders", superseded=True).revoked) == 1
    assert used not in serials(ca)
    assert not is_refused(ca / "backup", ca / "orders")


def test_a_certificate_by_its_path(ca: Path, tmp_path: Path) -> None:
    shutil.copytree(ca / "orders", tmp_path / "copy")
    serial = keys.show(ca / "orders")[-1].serial
    for what in (tmp_path / "copy", tmp_path / "copy" / "cert.pem"):
        assert [one.serial for one in revoke(ca, str(what)).revoked] == [serial]
    keys.init(tmp_path / "other")
    keys.issue(tmp_path / "other", "stranger")
    before = (ca / "crl.pem").read_bytes()
    for wrong in (str(tmp_path / "other" / "stranger"), "nobody", str(ca / "ca.pem"), str(tmp_path)):
        with pytest.raises(LinkError):
            revoke(ca, wrong)
    assert (ca / "crl.pem").read_bytes() == before


def test_a_ca_without_records_revokes_what_lies_in_its_folder(ca: Path) -> None:
    (ca / "issued.pem").unlink()
    assert [one.name for one in revoke(ca, "laptop").revoked] == ["laptop"]


def test_what_was_revoked_stays_revoked(ca: Path, tmp_path: Path) -> None:
    """Also by a CA that was restored from a backup of before, as far as its folders tell."""
    shutil.copytree(ca, tmp_path / "saved")
    revoke(ca, "laptop")
    for name in ("ca.pem", "ca-key.pem", "issued.pem"):
        shutil.copy(tmp_path / "saved" / name, ca / name)
    (ca / "crl.pem").unlink()
    revoke(ca, "orders")
    assert len(serials(ca)) == 2
    numbers = [x509.load_pem_x509_crl((folder / "crl.pem").read_bytes()) for folder in (ca, ca / "backup")]
    assert len({one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for one in numbers}) == 1


def test_a_damaged_list_of_the_ca_is_not_forgotten(ca: Path) -> None:
    revoke(ca, "laptop")
    (ca / "crl.pem").write_bytes((ca / "crl.pem").read_bytes()[:100])
    with pytest.raises(LinkError):
        revoke(ca, "orders")
    shutil.copy(ca / "backup" / "crl.pem", ca / "crl.pem")
    revoke(ca, "orders")
    assert len(serials(ca)) == 2


def test_where_the_list_goes(ca: Path, tmp_path: Path) -> None:
    keys.issue(ca, "far", out=tmp_path / "far")
    revoke(ca, "laptop")
    assert not (tmp_path / "far" / "crl.pem").exists()
    assert [folder.name for folder in revoke(ca, to=[tmp_path / "far"]).written] == [
        "backup",
        "laptop",
        "orders",
        "far",
    ]
    assert serials(tmp_path / "far") == serials(ca)
    later = keys.issue(ca, "later").path.parent
    assert serials(later) == serials(ca)
    keys.init(tmp_path / "other")
    stranger = keys.issue(tmp_path / "other", "stranger").path.parent
    for wrong in (stranger, tmp_path):
        with pytest.raises(LinkError):
            revoke(ca, "orders", to=[wrong])
    assert len(serials(ca)) == 1


def test_a_folder_that_trusts_a_ca_without_a_list_is_left_as_it_is(ca: Path) -> None:
    other = Made("other")
    path = ca / "backup" / "ca.pem"
    path.write_bytes(path.read_bytes() + other.pem)
    done = revoke(ca, "laptop")
    assert [folder.name for folder, _ in done.failed] == ["backup"]
    assert not (ca / "backup" / "crl.pem").exists()
    (ca / "backup" / "crl.pem").write_bytes(other.revoke())
    assert not revoke(ca, "laptop").failed
    assert len(load_lists(ca / "backup" / "crl.pem")) == 2
    assert is_refused(ca / "backup", ca / "laptop")


def test_the_list_lasts_as_long_as_its_ca(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = keys.init(tmp_path, days=30, now=now - timedelta(days=10))
    keys.issue(tmp_path, "who")
    revoke(tmp_path, "who")
    assert load_lists(tmp_path / "crl.pem")[0].next_update_utc == authority.expires.replace(microsecond=0)
    with pytest.raises(LinkError):
        revoke(tmp_path, "who", now=now + timedelta(days=40))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="asks the openssl command")
def test_openssl_agrees(ca: Path) -> None:
    revoke(ca, "laptop")
    lists = ["openssl", "crl", "-noout", "-CAfile", str(ca / "ca.pem"), "-in", str(ca / "crl.pem")]
    assert subprocess.run(lists, capture_output=True, check=False).returncode == 0
    verify = ["openssl", "verify", "-x509_strict", "-crl_check", "-CAfile", str(ca / "ca.pem")]
    verify += ["-CRLfile", str(ca / "crl.pem")]
    for name, is_good in (("orders", True), ("laptop", False)):
        ran = subprocess.run([*verify, str(ca / name / "cert.pem")], capture_output=True, check=False)
        assert (ran.returncode == 0) == is_good, ran.stderr


def test_the_command(ca: Path, command: Command) -> None:
    ran = command("keys", "revoke", ca, "laptop", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert [row["name"] for row in report["revoked"]] == ["laptop"]
    assert str(ca / "backup" / "crl.pem") in report["written"]
    assert command("keys", "show", ca).code == 0
    assert command("keys", "show", ca / "laptop").code == 1
    assert command("keys", "show", ca / "orders").code == 0
    ran = command("keys", "revoke", ca, "nobody")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert command("keys", "revoke", ca, "--old").code == 2
    path = ca / "backup" / "ca.pem"
    path.write_bytes(path.read_bytes() + OTHER.pem)
    ran = command("keys", "revoke", ca)
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
