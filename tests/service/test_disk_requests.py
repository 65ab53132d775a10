"""The disks of guests at a backup, as a primary's host asks for them: copies that come in, and disks brought back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from liars import Liar, Peer

from remus_ckpt.errors import RemusError, StoreError, VmError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.control import Requests
from remus_ckpt.link.dial import connect
from remus_ckpt.link.rights import Rights
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.disk_back import bring_back
from remus_ckpt.service.guest_disks import check_own, mark_own, own_mark, unmark_own
from remus_ckpt.service.policy import Policy
from remus_ckpt.session.messages import Reply, Request
from remus_ckpt.vm.command_line import Disk
from remus_ckpt.vm.disk_image import BLOCK_BYTES
from remus_ckpt.vm.disk_log import pack_write

SIZE = 40 * BLOCK_BYTES
NAME = {"name": "web", "disk": "d", "seed": b"s" * 16, "size": SIZE}


def dial(backup: Backup) -> Connection:
    return connect(Address.parse(backup.addresses[0]))


@contextmanager
def asking(backup: Backup) -> Iterator[Requests]:
    with Requests(dial(backup), "control", timeout_s=10) as requests:
        yield requests


@pytest.fixture
def backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backup]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    policy = Policy(run_vms=True, vm_disks=tmp_path / "disks")
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"], policy=policy) as served:
        yield served


def ask(requests: Requests, method: str, **arguments: object) -> dict[str, object]:
    requests.post(method, NAME | arguments, 10)
    return requests.answer(10)


@pytest.fixture
def image(backup: Backup, tmp_path: Path) -> Path:
    """An image on which a guest has run."""
    with asking(backup) as requests:
        assert ask(requests, "disk-begin") == {"is_empty": True}
        for at in range(0, SIZE, 10 * BLOCK_BYTES):
            ask(requests, "disk-write", log=pack_write(at, 10 * BLOCK_BYTES, os.urandom(10 * BLOCK_BYTES)))
        ask(requests, "disk-done", position=5)
        assert ask(requests, "disk-state") == {"disks": [{"disk": "d", "seed": b"s" * 16, "position": 5}]}
    (found,) = (tmp_path / "disks" / "web").glob("*.raw")
    found.with_name(f"{found.name}.ran").touch()
    return found


def test_only_what_differs_is_brought_back(backup: Backup, image: Path, tmp_path: Path) -> None:
    own = tmp_path / "web.raw"
    data = bytearray(image.read_bytes())
    data[3 * BLOCK_BYTES] ^= 1
    data[-1] ^= 1
    own.write_bytes(data)
    mark_own([Disk("d", str(own))], "web", backup.addresses[0])
    with asking(backup) as requests:
        assert bring_back(own, requests, None, None, lambda done, size: None) == (SIZE, 2 * BLOCK_BYTES)
    assert own.read_bytes() == image.read_bytes()
    assert own_mark(own) == {}


def test_a_disk_that_is_used_is_left_alone(backup: Backup, image: Path, tmp_path: Path) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))
    mark_own([Disk("d", str(own))], "web", backup.addresses[0])
    for used, words in ((image, "switch it off"), (own, "uses it")):
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # its prompt: it has the disk open
            try:
                with asking(backup) as requests, pytest.raises(RemusError, match=words):
                    bring_back(own, requests, None, None, lambda done, size: None)
            finally:
                process.kill()
    assert own.read_bytes() == bytes(SIZE)
    assert own_mark(own)


def test_what_cannot_be_brought_back_says_why_and_stays_marked(backup: Backup, image: Path, tmp_path: Path) -> None:
    own = tmp_path / "web.raw"
    for content, name, words in (
        (b"QFI\xfb" + bytes(SIZE - 4), "web", "no raw disk"),
        (bytes(SIZE - 512), "web", "survivor's disk"),
        (bytes(SIZE), "other", "no guest has run"),
        (bytes(SIZE), "../x", "no name"),
    ):
        own.write_bytes(content)
        mark_own([Disk("d", str(own))], name, backup.addresses[0])
        with asking(backup) as requests, pytest.raises(RemusError, match=words):
            bring_back(own, requests, None, None, lambda done, size: None)
        assert own_mark(own)["name"] == name
    unmark_own([Disk("d", str(own))])
    with asking(backup) as requests, pytest.raises(StoreError, match="--name"):
        bring_back(own, requests, None, None, lambda done, size: None)


SURVIVOR = {"disk": "d", "seed": b"s" * 16, "size": SIZE, "is_used": False}


@pytest.mark.parametrize(
    "answers",
    [
        {"disk-survivor": {}},
        {"disk-survivor": {"disks": {"d": SURVIVOR}}},
        {"disk-survivor": {"disks": ["d"]}},
        *({"disk-survivor": {"disks": [{**SURVIVOR, key: None}]}} for key in SURVIVOR),
        {"disk-digests": {}},
        {"disk-digests": {"digests": [b"x" * 32] * 40}},
        {"disk-read": {"data": "x" * BLOCK_BYTES}},
        {"disk-read": {"data": b"x"}},
    ],
)
def test_a_backup_that_lies_about_a_disk(tmp_path: Path, answers: dict[str, Any]) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))
    mark_own([Disk("d", str(own))], "web", "unix:x")
    answers = {"disk-survivor": {"disks": [SURVIVOR]}, "disk-digests": {"digests": b""}} | answers

    def serve(peer: Peer) -> None:
        peer.welcome()
        while isinstance(request := peer.hear(), Request):
            peer.say(Reply(number=request.number, result=answers[request.method]))

    with (
        Liar(serve) as there,
        Requests(connect(Address.parse(there.address)), "control", timeout_s=10) as requests,
        pytest.raises(RemusError),
    ):
        bring_back(own, requests, None, None, lambda done, size: None)
    assert own.read_bytes() == bytes(SIZE) and own_mark(own)


def test_a_disk_is_not_used_while_nobody_knows_whether_it_is_the_newest(backup: Backup, tmp_path: Path) -> None:
    own = tmp_path / "web.raw"
    own.write_bytes(bytes(SIZE))
    disks = [Disk("d", str(own))]
    check_own(disks, "web", None, lambda: dial(backup))
    assert mark_own(disks, "web", "unix:x") == disks
    assert mark_own(disks, "web", "unix:x") == []
    check_own(disks, "web", None, lambda: dial(backup))  # it has not taken over
    backup.close()
    with pytest.raises(VmError, match="does not say"):
        check_own(disks, "web", None, lambda: dial(backup))
    unmark_own(disks)
    check_own(disks, "web", None, lambda: dial(backup))
    with pytest.raises(VmError, match="no file"):
        mark_own([Disk("d", "/dev/null")], "web", "unix:x")


def test_only_who_may_protect_a_name_reaches_its_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    ca = tmp_path / "ca"
    keys.init(ca)
    keys.issue(ca, "backup", hosts=["127.0.0.1"])
    keys.issue(ca, "reader", rights=Rights.limited(["read"], []))
    keys.issue(ca, "other", rights=Rights.limited(["protect"], ["other"]))
    keys.issue(ca, "web", rights=Rights.limited(["protect"], ["web"]))
    policy = Policy(run_vms=True)
    with Backup(tmp_path / "store", ["tls://127.0.0.1:0"], tls_dir=ca / "backup", policy=policy) as served:
        for who in ("reader", "other", "web"):
            connection = connect(Address.parse(served.addresses[0]), tls=TlsFiles(ca / who))
            with Requests(connection, "control", timeout_s=10) as requests:
                if who == "web":
                    assert ask(requests, "disk-begin") == {"is_empty": True}
                    continue
                with pytest.raises(RemusError, match="does not allow"):
                    ask(requests, "disk-begin")
    assert len(list((tmp_path / "store" / ".disks" / "web").iterdir())) == 1


def test_copies_that_are_begun_again_and_again_take_the_room_of_one(backup: Backup, tmp_path: Path) -> None:
    with asking(backup) as requests:
        for count in range(20):
            ask(requests, "disk-begin", seed=bytes([count]) * 16)
            if count % 2:
                ask(requests, "disk-done", seed=bytes([count]) * 16, position=0)
        assert len(list((tmp_path / "disks" / "web").iterdir())) == 1
        for count in range(15):
            ask(requests, "disk-begin", disk=f"more{count}")
        with pytest.raises(RemusError, match="at most 16"):
            ask(requests, "disk-begin", disk="another")


def test_a_backup_that_runs_no_guests_has_no_disks(tmp_path: Path) -> None:
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as served,
        asking(served) as requests,
        pytest.raises(RemusError, match="--run-vms"),
    ):
        ask(requests, "disk-begin")
