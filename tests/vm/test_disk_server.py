"""A disk server under QEMU's own tools: all that is written is in its log, in order, or it says so."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from remus_ckpt.errors import VmError
from remus_ckpt.limits import MIB
from remus_ckpt.vm.disk_log import writes
from remus_ckpt.vm.disk_server import HELD_BYTES, DiskServer, delay_s

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="there is no qemu-io (qemu-utils)")

SIZE = 8 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiskServer]:
    with closing(DiskServer(SIZE, tmp_path / "nbd")) as started:
        yield started


class Io:
    """qemu-io, connected until it is closed."""

    def __init__(self, server: DiskServer) -> None:
        where = f"nbd+unix:///disk?socket={server.path}"
        self.process = subprocess.Popen(
            ["stdbuf", "-o0", "qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._until_prompt()

    def _until_prompt(self) -> str:
        assert self.process.stdout is not None
        said = b""
        while not said.endswith(b"qemu-io> "):
            some = os.read(self.process.stdout.fileno(), 4096)
            assert some, said
            said += some
        return said.decode()

    def __call__(self, command: str) -> None:
        """Run a command. It must succeed."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        said = self._until_prompt()
        assert "failed" not in said, said

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def io(server: DiskServer) -> Iterator[Io]:
    started = Io(server)
    yield started
    started.close()


def replayed(log: bytes) -> bytes:
    """A disk that was empty, behind these writes."""
    disk = bytearray(SIZE)
    for write in writes(log, SIZE):
        disk[write.offset : write.offset + write.length] = write.data or bytes(write.length)
    return bytes(disk)


def test_the_log_holds_what_was_written_up_to_each_mark(server: DiskServer, io: Io) -> None:
    io("write -P 0xaa 0 64k")
    first = server.mark()
    io("write -P 0xbb 4k 4k")
    io("write -z 32k 8k")
    io("discard 1M 64k")
    io("flush")
    second = server.mark()
    assert replayed(server.read(0, first)) == b"\xaa" * 65536 + bytes(SIZE - 65536)
    expected = b"\xaa" * 4096 + b"\xbb" * 4096 + b"\xaa" * 24576 + bytes(8192) + b"\xaa" * 24576
    assert replayed(server.read(0, second)) == expected + bytes(SIZE - 65536)
    assert len(list(writes(server.read(first, second), SIZE))) == 3
    server.forget(first)
    assert server.status().held_bytes == second - first
    with pytest.raises(VmError, match="does not hold"):
        server.read(0, second)
    with pytest.raises(VmError, match="does not hold"):
        server.read(first + 1, second)
    assert server.mark() == second


def test_qemu_img_writes_a_whole_disk_to_it(tmp_path: Path, server: DiskServer) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 << 20) + bytes(SIZE - (3 << 20)))
    where = f"nbd+unix:///disk?socket={server.path}"
    subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, where], check=True)
    assert replayed(server.read(0, server.status().end)) == source.read_bytes()


def test_nothing_is_marked_without_a_mirror(server: DiskServer) -> None:
    with pytest.raises(VmError, match="not begun"):
        server.mark()
    with closing(Io(server)) as io:
        io("write 0 4k")
        server.mark()
        io.process.kill()
        deadline = time.monotonic() + 10
        while not server.status().trouble:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(VmError, match="misses writes"):
        server.mark()
    with socket.socket(socket.AF_UNIX) as another, pytest.raises(ConnectionRefusedError):
        another.connect(str(server.path))  # it takes one client, once


def test_a_guest_that_writes_without_rest_is_slowed_before_there_is_no_room() -> None:
    """While nothing is committed for four seconds, its mirror lives on."""
    held, seconds = 0, 0.0
    while held + MIB <= HELD_BYTES:
        wait_s = delay_s(MIB, held, HELD_BYTES)
        assert wait_s <= 0.25, "QEMU's `stop` waits for it"
        assert (wait_s > 0) == (held >= HELD_BYTES // 2)
        held, seconds = held + MIB, seconds + wait_s
    assert 4 < seconds < 10


def test_a_write_for_which_there_is_no_room_ends_the_mirror_not_the_guest(tmp_path: Path) -> None:
    with closing(DiskServer(SIZE, tmp_path / "nbd", held_bytes=100_000)) as server, closing(Io(server)) as io:
        io("write 0 64k")
        server.forget(server.mark())
        io("write 0 64k")
        server.mark()
        with pytest.raises(AssertionError, match="No space"):
            io("write 64k 64k")
        with pytest.raises(VmError, match="wait for commits"):
            server.mark()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_does_not_answer_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """QEMU waits for it in its `stop`."""
    with closing(DiskServer(SIZE, tmp_path / "nbd")) as server, closing(Io(server)) as io:
        io("write 0 4k")
        os.kill(server.pid, number)
        with pytest.raises(VmError, match="does not answer"):
            server.mark()
        with pytest.raises(AssertionError, match="failed"):
            io("write 0 4k")
