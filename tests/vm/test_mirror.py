"""A mirror of a disk, and reading it through NBD: a real server of QEMU's, and what is none."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import disk_guests
import pytest
from services import LONG_S, until

from remus_ckpt.errors import VmError
from remus_ckpt.vm.disk_server import DiskServer
from remus_ckpt.vm.mirror import DiskMirror, DiskReader
from remus_ckpt.vm.qmp import Qmp

SIZE = 1 << 20


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def serving(disk: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    words = ["qemu-nbd", "-r", "-t", "-f", "raw", "-e", "3", "-x", "remus-copy", "-k", str(path), str(disk)]
    with subprocess.Popen(words) as process:
        try:
            deadline = time.monotonic() + 30
            while not listens(path):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="there is no qemu-nbd (qemu-utils)")
def test_a_disk_is_read_through_qemu(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "nbd"
    disk.write_bytes(os.urandom(SIZE))
    with serving(disk, path) as process, closing(DiskReader(path, "remus-copy")) as reader:
        assert reader.read(0, SIZE) == disk.read_bytes()
        assert reader.read(4096, 512) == disk.read_bytes()[4096:4608]
        with pytest.raises(VmError, match="NBD error"):
            reader.read(SIZE, 512)
        assert reader.read(0, 512) == disk.read_bytes()[:512]
        process.kill()
        with pytest.raises(VmError, match="cannot be read"):
            reader.read(0, 512)
    with pytest.raises(VmError):
        DiskReader(path, "remus-copy")


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="there is no qemu-nbd (qemu-utils)")
def test_an_export_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with serving(tmp_path / "disk", tmp_path / "nbd"), pytest.raises(VmError, match="another"):
        DiskReader(tmp_path / "nbd", "another")


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad\r\n\r\n", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3" + b"\xff" * 20])
def test_what_is_no_nbd_server_is_refused(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "nbd"))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as client, contextlib.suppress(ConnectionError):
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1000):
                    pass

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(VmError):
            DiskReader(tmp_path / "nbd", "remus-copy")
        server.join()


class Hanging:
    """A QEMU whose mirror has failed, and that does not answer `stop` in time."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def execute(self, command: str, arguments: Mapping[str, Any] = MappingProxyType({}), /) -> Any:
        self.given.append(command)
        if command == "stop":
            raise VmError("it has not answered")
        return {"query-status": {"running": True}}.get(command, [{"device": "remus-d", "io-status": "failed"}])


def test_a_guest_that_stops_too_late_is_let_run_all_the_same(tmp_path: Path) -> None:
    qemu = Hanging()
    with pytest.raises(VmError, match="not answered"), closing(DiskServer(SIZE, tmp_path / "nbd")) as server:
        DiskMirror(qemu, "d", server)
    assert qemu.given[-2:] == ["stop", "cont"]


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("dies", [False, True])
def test_a_mirror_that_ends_while_the_guest_writes_harms_no_qemu(tmp_path: Path, dies: bool) -> None:
    """QEMU writes to memory that it has freed where such a job ends by an error or by force. With these tunables it
    notices that soon: after one round, or after fifty.

    dies: whether the server goes first
    """
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(disk_guests.DISK_BYTES))
    monitor = f"unix:{tmp_path}/qmp,server=on,wait=off"
    words = disk_guests.words(f"file={disk},if=virtio,format=raw,id=remus-disk0", "-serial", "null", "-qmp", monitor)
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"}
    with subprocess.Popen(words, env=os.environ | tunables) as process:
        try:
            with closing(Qmp(tmp_path / "qmp", wait_s=LONG_S)) as qmp:
                until(lambda: disk_guests.newest_write(disk) > 10)
                for _ in range(12):
                    with closing(DiskServer(disk_guests.DISK_BYTES, tmp_path / "nbd")) as server:
                        mirror = DiskMirror(qmp, "remus-disk0", server)
                        mirror.check()
                        begun = server.status().end
                        until(lambda server=server, begun=begun: server.status().end > begun)
                        if dies:
                            server.close()
                        mirror.end()
                    assert qmp.execute("query-block-jobs") == []
                    assert qmp.execute("query-status")["running"]
            assert process.poll() is None
        finally:
            process.kill()
