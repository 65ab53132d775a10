"""The small CA: what it issues is accepted by OpenSSL and by nobody who should not, and no key is ever written over."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Made, put
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support import Command

from remus_ckpt.errors import LinkError
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ODD_CURVE = """-----BEGIN EC PRIVATE KEY-----
MD4CAQEEDg6bFAW4sDmwb2p3+dqkoAcGBSuBBAAGoSADHgAEHAQT2QV6ulRx9rX0
2lJk1b7yK/SkQs7qf5lLfg==
-----END EC PRIVATE KEY-----"""
"""A key on secp112r1, which the library does not know."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_lies_where(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        keys.init(tmp_path / "ca")
        keys.issue(tmp_path / "ca", "backup")
    finally:
        os.umask(mask)
    assert sorted(contents(tmp_path)) == [
        "ca/backup/ca.pem",
        "ca/backup/cert.pem",
        "ca/backup/key.pem",
        "ca/ca-key.pem",
        "ca/ca.pem",
        "ca/issued.pem",
    ]
    assert mode(tmp_path / "ca") == mode(tmp_path / "ca" / "backup") == 0o700
    assert mode(tmp_path / "ca" / "ca-key.pem") == mode(tmp_path / "ca" / "backup" / "key.pem") == 0o600
    assert (tmp_path / "ca" / "ca.pem").read_bytes() == (tmp_path / "ca" / "backup" / "ca.pem").read_bytes()


def test_what_a_certificate_says(tmp_path: Path) -> None:
    authority = keys.init(tmp_path, days=100, now=NOW)
    hosts = ["backup.example.net", "*.internal", "10.0.0.7", "::1", "[fe80::2]", "a_b"]
    issued = keys.issue(tmp_path, "backup-1", hosts=hosts, days=30, now=NOW)
    assert issued.hosts == ("backup.example.net", "*.internal", "10.0.0.7", "::1", "fe80::2", "a_b")
    assert issued.name == "backup-1"
    assert issued.issuer == authority.name
    assert issued.expires == NOW + timedelta(days=30)
    assert issued.starts < NOW
    assert issued.days_left(NOW) == 30
    assert (authority.is_ca, issued.is_ca) == (True, False)
    certificate = x509.load_pem_x509_certificate(issued.path.read_bytes())
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use.dotted_string for use in usage} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}


def test_without_hosts_the_name_is_the_host(tmp_path: Path) -> None:
    keys.init(tmp_path)
    assert keys.issue(tmp_path, "backup.example.net").hosts == ("backup.example.net",)
    assert keys.issue(tmp_path, "10.0.0.7").hosts == ("10.0.0.7",)


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    authority = keys.init(tmp_path, days=10, now=NOW)
    issued = keys.issue(tmp_path, "late", days=365, now=NOW + timedelta(days=3))
    assert issued.expires == authority.expires
    assert keys.issue(tmp_path, "early", now=NOW - timedelta(days=3)).starts == authority.starts
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "too-late", now=NOW + timedelta(days=11))
    assert not (tmp_path / "too-late").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="asks the openssl command")
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_agrees(tmp_path: Path, purpose: str) -> None:
    keys.init(tmp_path)
    keys.issue(tmp_path, "backup", hosts=["backup.example.net"])
    verify = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(tmp_path / "ca.pem")]
    good = subprocess.run(
        [*verify, "-verify_hostname", "backup.example.net", str(tmp_path / "backup" / "cert.pem")],
        capture_output=True,
        check=False,
    )
    assert good.returncode == 0, good.stderr
    other = [*verify, "-verify_hostname", "other.example.net", str(tmp_path / "backup" / "cert.pem")]
    assert subprocess.run(other, capture_output=True, check=False).returncode != 0


def test_nothing_is_written_over(tmp_path: Path) -> None:
    keys.init(tmp_path)
    keys.issue(tmp_path, "backup")
    before = contents(tmp_path)
    with pytest.raises(LinkError):
        keys.init(tmp_path)
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "backup")
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "other", out=tmp_path / "backup")
    with pytest.raises(LinkError):  # it would put a certificate beside the CA's
        keys.issue(tmp_path, "other", out=tmp_path)
    assert contents(tmp_path) == before


def test_a_key_alone_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "ca-key.pem").write_text("precious")
    with pytest.raises(LinkError):
        keys.init(tmp_path)
    assert contents(tmp_path) == {"ca-key.pem": b"precious"}


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    keys.init(tmp_path / "ca")
    (tmp_path / "there").mkdir(mode=0o755)
    (tmp_path / "there").chmod(0o755)
    keys.issue(tmp_path / "ca", "backup", out=tmp_path / "there")
    assert mode(tmp_path / "there") == 0o755
    assert mode(tmp_path / "there" / "key.pem") == 0o600


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "-x", "x-", "a b", "é", "x" * 65, "a\n"])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    keys.init(tmp_path / "ca")
    with pytest.raises(LinkError):
        keys.issue(tmp_path / "ca", name)
    assert sorted(contents(tmp_path)) == ["ca/ca-key.pem", "ca/ca.pem"]


@pytest.mark.parametrize(
    "host", ["", "a b", "-a.example", "a..b", "x" * 64, "é.example", "tls://a", "a:7411", "*", "a.*"]
)
def test_hosts_that_are_refused(tmp_path: Path, host: str) -> None:
    keys.init(tmp_path / "ca")
    with pytest.raises(LinkError):
        keys.issue(tmp_path / "ca", "backup", hosts=["good.example", host])
    assert not (tmp_path / "ca" / "backup").exists()


def pair(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes()


def test_a_renewal_is_taken_up_where_the_old_one_serves(tmp_path: Path) -> None:
    keys.init(tmp_path)
    old = keys.issue(tmp_path, "backup", hosts=["b.example", "10.0.0.7"], days=3)
    folder = tmp_path / "backup"
    (folder / "key.pem").chmod(0o640)
    before, authority = pair(folder), (folder / "ca.pem").read_bytes()
    files = TlsFiles(folder)
    assert files.expires() == old.expires
    renewed = keys.issue(tmp_path, "backup", renew=True)
    assert renewed.hosts == old.hosts
    assert renewed.expires > old.expires
    assert not set(pair(folder)) & set(before)
    assert (folder / "ca.pem").read_bytes() == authority
    assert mode(folder / "key.pem") == 0o640
    assert files.expires() == renewed.expires
    assert keys.issue(tmp_path, "backup", renew=True, hosts=["c.example"]).hosts == ("c.example",)
    assert sorted(path.name for path in folder.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_an_expired_one_is_renewed_and_one_half_renewed_too(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    keys.init(tmp_path, now=now - timedelta(days=100))
    keys.issue(tmp_path, "over", days=7, now=now - timedelta(days=50))
    with pytest.raises(LinkError):
        TlsFiles(tmp_path / "over")
    # Killed between the two files, or before the first.
    (tmp_path / "over" / ".key.pem.0123456789abcdef").write_text("of a renewal that was killed")
    (tmp_path / "over" / ".key.pem.bak").write_text("the user's own")
    (tmp_path / "over" / "key.pem").write_text("not of this certificate")
    keys.issue(tmp_path, "over", renew=True)
    TlsFiles(tmp_path / "over")
    assert sorted(path.name for path in (tmp_path / "over").glob(".*")) == [".key.pem.bak"]


def test_what_is_not_renewed(tmp_path: Path) -> None:
    for authority in ("a", "b"):
        keys.init(tmp_path / authority)
        keys.issue(tmp_path / authority, "backup")
    before = contents(tmp_path)
    for folder, name, out in (
        ("a", "none", None),
        ("a", "other", tmp_path / "a" / "backup"),
        ("a", "backup", tmp_path / "b" / "backup"),
    ):
        with pytest.raises(LinkError):
            keys.issue(tmp_path / folder, name, out=out, renew=True)
    assert contents(tmp_path) == before


def test_a_renewal_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    keys.init(tmp_path)
    keys.issue(tmp_path, "backup")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(LinkError):
            keys.issue(tmp_path, "backup", renew=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_what_is_said_of_an_expired_one_renews_it(tmp_path: Path, command: Command) -> None:
    now = datetime.now(UTC)
    keys.init(tmp_path / "c a", now=now - timedelta(days=100))
    keys.issue(tmp_path / "c a", "me", out=tmp_path / "c a" / "laptop", days=7, now=now - timedelta(days=50))
    ran = command("keys", "show", tmp_path / "c a")
    assert ran.code == 1
    advised = shlex.split(ran.err.split("`")[1])
    assert command(*advised[1:]).code == 0
    assert command("keys", "show", tmp_path / "c a").code == 0


def test_without_a_ca(tmp_path: Path) -> None:
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "backup")
    with pytest.raises(LinkError):
        keys.show(tmp_path)
    keys.init(tmp_path / "a")
    keys.init(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "ca-key.pem", tmp_path / "a" / "ca-key.pem")
    with pytest.raises(LinkError):
        keys.issue(tmp_path / "a", "backup")
    for held in ("\0garbage", ODD_CURVE):
        (tmp_path / "b" / "ca-key.pem").write_text(held)
        with pytest.raises(LinkError):
            keys.issue(tmp_path / "b", "backup")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    keys.init(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LinkError):
        keys.issue(tmp_path, "backup", out=tmp_path / "file" / "below")
    with pytest.raises(LinkError):
        keys.init(tmp_path / "long", days=10**9)
    assert not (tmp_path / "long" / "ca.pem").exists()


def test_half_a_set_is_removed_again(tmp_path: Path) -> None:
    """The key is written, and the CA's certificate does not fit any more: as on a full disk."""
    keys.init(tmp_path / "ca")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(LinkError):
            keys.issue(tmp_path / "ca", "backup")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    keys.issue(tmp_path / "ca", "backup")


def test_the_command(tmp_path: Path, command: Command) -> None:
    """From nothing to a folder that --tls-dir takes."""
    ran = command("keys", "init", tmp_path / "keys", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["directory"] == str(tmp_path / "keys")
    ran = command("keys", "issue", tmp_path / "keys", "backup", "--host", "127.0.0.1", "--host", "b.example", "--json")
    assert ran.code == 0, ran.err
    issued = json.loads(ran.out)
    assert issued["hosts"] == ["127.0.0.1", "b.example"]
    TlsFiles(issued["directory"])
    ran = command("keys", "issue", tmp_path / "keys", "primary", "--out", tmp_path / "primary", "--days", "7")
    assert ran.code == 0, ran.err
    TlsFiles(tmp_path / "primary")
    ran = command("keys", "issue", tmp_path / "keys", "backup")
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1


def test_the_command_says_what_expires(tmp_path: Path, command: Command) -> None:
    now = datetime.now(UTC)
    keys.init(tmp_path, now=now - timedelta(days=100))
    keys.issue(tmp_path, "fine")
    keys.issue(tmp_path, "soon", days=7)
    keys.issue(tmp_path, "over", days=7, now=now - timedelta(days=50))
    ran = command("keys", "show", tmp_path, "--json")
    assert ran.code == 1
    listed = {row["name"]: row["days_left"] for row in json.loads(ran.out)}
    assert listed["over"] < 0 < listed["soon"] < 8 < listed["fine"]
    assert len(listed) == 4
    assert sorted(Path(line.split()[1]).parent.name for line in ran.err.splitlines()) == ["over", "soon"]
    ran = command("keys", "show", tmp_path / "fine")
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 2
    assert ran.err == ""


# A CA in transition


def changing(folder: Path, order: str = "old first") -> tuple[Path, Path]:
    """The folders of an old CA, which has expired, and of a new one, whose ca.pem has both."""
    now = datetime.now(UTC)
    old, new = folder / "old", folder / "new"
    keys.init(old, days=10, now=now - timedelta(days=20))
    keys.issue(old, "backup", hosts=["127.0.0.1"], now=now - timedelta(days=20))
    keys.init(new)
    pems = [(one / "ca.pem").read_bytes() for one in (old, new)]
    (new / "ca.pem").write_bytes(b"".join(pems if order == "old first" else pems[::-1]))
    return old, new


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_who_issues_is_who_has_the_key(tmp_path: Path, order: str) -> None:
    _, new = changing(tmp_path, order)
    issued = keys.issue(new, "me")
    assert issued.issuer == next(one.name for one in keys.show(new) if one.in_use and one.is_ca)
    assert issued.days_left(datetime.now(UTC)) > 800
    assert (new / "me" / "ca.pem").read_bytes() == (new / "ca.pem").read_bytes()
    assert TlsFiles(new / "me").expires() == issued.expires


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_a_certificate_is_renewed_from_the_new_ca(tmp_path: Path, order: str) -> None:
    old, new = changing(tmp_path, order)
    folder = old / "backup"
    with pytest.raises(LinkError):
        TlsFiles(folder)
    renewed = keys.issue(new, "backup", out=folder, renew=True)
    assert renewed.hosts == ("127.0.0.1",)
    assert TlsFiles(folder).expires() == renewed.expires
    assert [one.in_use for one in keys.show(folder)] == [False, True, True]
    # What its owner has put there by hand stays.
    (folder / "ca.pem").write_bytes(Made("another").pem + (new / "ca.pem").read_bytes())
    before = (folder / "ca.pem").read_bytes()
    keys.issue(new, "backup", out=folder, renew=True)
    assert (folder / "ca.pem").read_bytes() == before


def test_a_stranger_is_not_renewed_by_a_new_ca(tmp_path: Path) -> None:
    changing(tmp_path)
    keys.init(tmp_path / "third")
    before = contents(tmp_path)
    with pytest.raises(LinkError):
        keys.issue(tmp_path / "third", "backup", out=tmp_path / "old" / "backup", renew=True)
    assert contents(tmp_path) == before


def test_a_ca_that_was_renewed_with_its_key(tmp_path: Path) -> None:
    """Its certificates of both dates are in ca.pem: the one that lasts is the one to issue from."""
    over = Made("root", days=(-20, -10))
    good = Made("root", days=(-1, 100), key=over)
    for number, both in enumerate(([over, good], [good, over])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "ca.pem").write_bytes(b"".join(one.pem for one in both))
        (folder / "ca-key.pem").write_bytes(over.key_pem)
        issued = keys.issue(folder, "me")
        assert 99 < issued.days_left(datetime.now(UTC)) < 101
        assert TlsFiles(folder / "me").expires() == issued.expires


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_show_tells_a_spent_ca_from_one_in_use(tmp_path: Path, command: Command, order: str) -> None:
    old, new = changing(tmp_path, order)
    keys.issue(new, "me")
    for folder, count in ((new, 3), (new / "me", 3)):
        ran = command("keys", "show", folder)
        assert ran.code == 0
        assert len(ran.out.splitlines()) == count
        assert len(ran.err.splitlines()) == 1
        listed = json.loads(command("keys", "show", folder, "--json").out)
        assert [row["days_left"] < 0 for row in listed] == [not row["in_use"] for row in listed]
    for folder in (old, old / "backup"):
        assert command("keys", "show", folder).code == 1


def test_show_lists_intermediates(tmp_path: Path, command: Command) -> None:
    root = Made("root")
    between = Made("between", root, days=(-20, -10))
    put(tmp_path, [root], [Made("own", between, is_ca=False), between])
    ran = command("keys", "show", tmp_path)
    assert ran.code == 1
    assert len(ran.out.splitlines()) == 3
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [b"", b"\0\xff" * 99, b"-----BEGIN CERTIFICATE-----\nMIIB"])
def test_a_damaged_file_is_named_with_what_to_do(name: str, content: bytes, tmp_path: Path) -> None:
    keys.init(tmp_path / "ca")
    keys.issue(tmp_path / "ca", "me")
    path = tmp_path / "ca" / "me" / name
    path.write_bytes(content)
    with pytest.raises(LinkError) as caught:
        TlsFiles(path.parent)
    assert str(path) in str(caught.value) and "keys issue" in str(caught.value)
    assert "cryptography.io" not in str(caught.value)
