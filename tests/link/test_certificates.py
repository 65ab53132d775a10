"""Folders of certificates, and CAs in transition."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from certificates import Made, put
from linking import LONG_S, bare_client, certificates_in, listen, shake, take

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates_in(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


# The folder of certificates


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("fault", ["missing", "empty", "garbage", "of another", "encrypted"])
def test_a_folder_that_is_not_right(folder: Path, tmp_path: Path, name: str, fault: str) -> None:
    good, other = folder / "ca" / "backup", folder / "other" / "stranger"
    for file in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / file).write_bytes((good / file).read_bytes())
    TlsFiles(tmp_path)
    if fault == "missing":
        (tmp_path / name).unlink()
    elif fault == "of another":
        (tmp_path / name).write_bytes((other / name).read_bytes())
    elif fault == "encrypted":
        (tmp_path / name).write_text(
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
        )
    else:
        (tmp_path / name).write_bytes(b"" if fault == "empty" else os.urandom(500))
    with pytest.raises(LinkError):
        TlsFiles(tmp_path)


UNKNOWN_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MD4CAQEEDg+Q4JBVsPivBDaoli37oAcGBSuBBAAGoSADHgAEFkIlbv8FSf9Bk6iE
wzOF5wwHw9wZcvZJrOA9lg==
-----END EC PRIVATE KEY-----
"""
"""Of the curve secp112r1, which nobody supports any more."""


def test_a_key_of_a_kind_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    for file in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / file).write_bytes((folder / "ca" / "backup" / file).read_bytes())
    files = TlsFiles(tmp_path)
    good = files.server_context()
    (tmp_path / "key.pem").write_text(UNKNOWN_KEY)
    assert files.server_context() is good
    with pytest.raises(LinkError):
        TlsFiles(tmp_path)


@pytest.mark.root
def test_a_folder_that_cannot_be_read_any_longer(folder: Path, tmp_path: Path) -> None:
    """A service goes on with what it has read: its clock must not stop for that."""
    tmp_path.chmod(0o700)
    for file in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / file).write_bytes((folder / "ca" / "backup" / file).read_bytes())
    files = TlsFiles(tmp_path)
    good = files.server_context()
    os.seteuid(65534)
    try:
        assert files.server_context() is good
        with pytest.raises(LinkError):
            TlsFiles(tmp_path)
    finally:
        os.seteuid(0)


def test_a_folder_with_an_expired_certificate(folder: Path) -> None:
    with pytest.raises(LinkError):
        TlsFiles(folder / "old" / "expired")


def test_the_folder_of_the_ca_is_not_one_to_connect_with(folder: Path) -> None:
    with pytest.raises(LinkError):
        TlsFiles(folder / "ca")


def test_tls_needs_a_folder() -> None:
    with pytest.raises(LinkError):
        Listener(Address.parse("tls://127.0.0.1:0"))
    with pytest.raises(LinkError):
        connect(Address.parse("tls://127.0.0.1:1"), timeout_s=LONG_S)


def test_a_renewed_certificate_needs_no_restart(folder: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    keys.init(tmp_path / "ca")
    keys.issue(tmp_path / "ca", "first", hosts=["127.0.0.1"])
    keys.issue(tmp_path / "ca", "second", hosts=["127.0.0.1"])
    used = tmp_path / "used"
    used.mkdir()

    def put(name: str, *files: str) -> None:
        for file in files:
            (used / file).write_bytes((tmp_path / "ca" / name / file).read_bytes())

    put("first", "ca.pem", "cert.pem", "key.pem")
    client_tls = TlsFiles(tmp_path / "ca" / "first")
    with Listener(Address.parse("tls://127.0.0.1:0"), tls=TlsFiles(used)) as listener:

        def name_of_server() -> str | None:
            taken = pool.submit(take, listener)
            with connect(listener.address, tls=client_tls, timeout_s=LONG_S) as client, taken.result():
                return client.certificate_name

        assert name_of_server() == "first"
        put("second", "cert.pem")  # not its key yet: the last good pair serves
        assert name_of_server() == "first"
        put("second", "key.pem")
        assert name_of_server() == "second"


# CAs in transition, and certificates of other CAs than ours


def gets_on(pool: ThreadPoolExecutor, server: Path, client: Path) -> bool:
    with Listener(Address.parse("tls://127.0.0.1:0"), tls=TlsFiles(server)) as listener:
        tls = TlsFiles(client)
        return shake(listener, pool, lambda: connect(listener.address, tls=tls, timeout_s=LONG_S)) == []


OVER, NOW, LATER = (-20.0, -10.0), (-1.0, 100.0), (10.0, 100.0)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("renewed", [False, True], ids=["another key", "the same name and key"])
def test_a_good_ca_beside_others_in_any_order(
    tmp_path: Path, pool: ThreadPoolExecutor, order: tuple[int, ...], renewed: bool
) -> None:
    good = Made("root", days=NOW)
    key = good if renewed else None
    others = [Made("root" if renewed else str(days), days=days, key=key) for days in (OVER, LATER)]
    trusted = [[good, *others][number] for number in order]
    server = put(tmp_path / "server", trusted, [Made("server", good, is_ca=False, days=(-1, 50))])
    client = put(tmp_path / "client", trusted, [Made("client", good, is_ca=False)])
    assert gets_on(pool, server, client)
    assert gets_on(pool, client, server)
    left = TlsFiles(server).expires() - datetime.now(UTC)
    assert timedelta(days=49) < left < timedelta(days=51)


def test_two_sides_at_different_steps_of_a_change(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    old, new = Made("old", days=(-300, 20)), Made("new")
    both = [new, old]
    before = put(tmp_path / "before", both, [Made("before", old, is_ca=False)])
    after = put(tmp_path / "after", both, [Made("after", new, is_ca=False)])
    done = put(tmp_path / "done", [new], [Made("done", new, is_ca=False)])
    assert gets_on(pool, before, after) and gets_on(pool, after, before)
    assert gets_on(pool, after, done) and gets_on(pool, done, after)
    assert not gets_on(pool, before, done)
    assert TlsFiles(before).expires() < TlsFiles(after).expires()


@pytest.mark.parametrize(
    ("trusted", "issuer"),
    [
        ([OVER], 0),
        ([OVER, OVER], 1),
        ([LATER], 0),
        ([OVER, LATER], 1),
        ([OVER, NOW], 0),
        ([NOW, OVER], 1),
        ([NOW, LATER], 1),
    ],
)
def test_a_ca_that_cannot_serve_is_named(tmp_path: Path, trusted: list[tuple[float, float]], issuer: int) -> None:
    authorities = [Made(f"root {number}", days=days) for number, days in enumerate(trusted)]
    own = Made("own", authorities[issuer], is_ca=False)
    with pytest.raises(LinkError) as refused:
        TlsFiles(put(tmp_path, authorities, [own]))
    assert str(tmp_path / "ca.pem") in str(refused.value)
    assert f"root {issuer}" in str(refused.value)
    assert ("expired" in str(refused.value)) == (trusted[issuer] == OVER)


@pytest.mark.parametrize("days", [OVER, LATER])
def test_our_certificate_comes_before_its_ca_in_what_is_said(tmp_path: Path, days: tuple[float, float]) -> None:
    root = Made("root", days=days)
    with pytest.raises(LinkError) as refused:
        TlsFiles(put(tmp_path, [root], [Made("own", root, is_ca=False, days=days)]))
    assert str(tmp_path / "cert.pem") in str(refused.value)


def test_a_peer_whose_ca_has_expired_is_refused(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    good, over = Made("good"), Made("over", days=OVER)
    fine = put(tmp_path / "fine", [over, good], [Made("fine", good, is_ca=False)])
    put(tmp_path / "bad", [over, good], [Made("bad", over, is_ca=False)])
    with listen("tls", tmp_path, tmp_path, "fine") as listener:
        serving = pool.submit(take, listener)
        sock = socket.create_connection((listener.address.host, listener.address.port), LONG_S)
        with sock, pytest.raises(ssl.SSLError), bare_client(tmp_path, "bad", "fine").wrap_socket(sock) as client:
            client.recv(1)
        with pytest.raises(LinkError) as refused:
            serving.result(LONG_S)
    assert "expired" in str(refused.value)
    assert gets_on(pool, fine, fine)


@pytest.mark.parametrize("where", ["with us", "trusted", "both", "the trusted one alone", "a stranger behind it"])
def test_an_intermediate_ca(tmp_path: Path, pool: ThreadPoolExecutor, where: str) -> None:
    root = Made("root")
    between = Made("between", root, days=(-1, 60))
    own = Made("own", between, is_ca=False)
    trusted, chain = {
        "with us": ([root], [own, between]),
        "trusted": ([between, root], [own]),
        "both": ([root, between], [own, between, root]),
        "the trusted one alone": ([between], [own]),
        "a stranger behind it": ([root], [own, between, Made("stranger")]),
    }[where]
    folder = put(tmp_path / "own", trusted, chain)
    peer = put(tmp_path / "peer", [root], [Made("peer", root, is_ca=False)])
    assert gets_on(pool, folder, folder)
    if where in ("with us", "both", "a stranger behind it"):
        assert gets_on(pool, folder, put(tmp_path / "peer", trusted, [Made("peer", between, is_ca=False), between]))
    if root in trusted:
        assert gets_on(pool, peer, folder)
    left = TlsFiles(folder).expires() - datetime.now(UTC)
    assert timedelta(days=59) < left < timedelta(days=61)


def test_chains_that_are_refused(tmp_path: Path) -> None:
    root = Made("root")
    between, over, other = Made("between", root), Made("over", root, days=OVER), Made("other", root)
    own = Made("own", between, is_ca=False)
    for trusted, chain, key in (
        ([root], [own], None),
        ([root], [own, other], None),
        ([root], [between, own], own),
        ([root], [own, between], between),
        ([root], [own, between], Made("another")),
        ([root], [Made("own", over, is_ca=False), over], None),
        ([Made("root")], [own, between], None),  # of the same name
    ):
        with pytest.raises(LinkError) as refused:
            TlsFiles(put(tmp_path, trusted, chain, key))
        assert str(tmp_path / "cert.pem") in str(refused.value)
    TlsFiles(put(tmp_path, [root], [own, between]))


def test_a_bundle_is_taken_up_without_a_restart(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    old, new = Made("old"), Made("new")
    server = put(tmp_path / "server", [old], [Made("server", old, is_ca=False)])
    client = TlsFiles(put(tmp_path / "client", [old, new], [Made("client", new, is_ca=False)]))
    with Listener(Address.parse("tls://127.0.0.1:0"), tls=TlsFiles(server)) as listener:
        dial = partial(connect, listener.address, tls=client, timeout_s=LONG_S)
        assert shake(listener, pool, dial)
        (server / "ca.pem").write_bytes(old.pem + new.pem)
        assert not shake(listener, pool, dial)
        put(server, [Made("over", days=OVER), new], [Made("server", new, is_ca=False)])
        assert not shake(listener, pool, dial)
