"""A real QEMU takes what we make of its stream, and its guest goes on from where it was.

All of it is tried with the installed QEMU, and with another one, whose command REMUS_CKPT_QEMU is; with options, if it
needs some to find its firmware.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import Command


class Qemu(NamedTuple):
    """A QEMU: how it is called, and its version."""

    words: list[str]
    version: int


def qemus() -> list[Qemu]:
    """Those that are there."""
    found = []
    for words in (["qemu-system-x86_64"], shlex.split(os.environ.get("REMUS_CKPT_QEMU", ""))):
        if words and shutil.which(words[0]):
            ran = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
            version = re.search(r"version (\d+)", ran.stdout)
            assert version is not None
            found.append(Qemu(words, int(version[1])))
    return found


QEMUS = qemus()
MAPPED = [one for one in QEMUS if one.version >= 9]
COUNTER = 0x9000
# Counts at 0x9000, in real mode, and copies the count through 448 KiB from 0x20000 on so that pages become dirty.
# QEMU's emulation overlooks writes to pages of which it still has the address: so these are forgotten every 64 KiB.
BOOT = bytes.fromhex(
    "fa 31c0 8ed8 b80020 8ec0 31ff"  # cli; ds = 0; es = 0x2000; di = 0
    "66ff060090"  # again: inc dword [0x9000]
    "66a10090"  # mov eax, [0x9000]
    "266689 05"  # mov es:[di], eax
    "81c70402"  # add di, 0x204
    "731a"  # jnc over
    "8cc0 80c410 80fc90 7202 b420 8ec0"  # es += 0x1000; if es == 0x9000: es = 0x2000
    "0f20c0 663500000100 0f22c0"  # mov eax, cr0; xor eax, WP; mov cr0, eax
    "ebd1"  # over: jmp again
)
# Takes a stream so slowly that the guest writes to its memory while a round is sent, once the pipe is short.
SLOW = """
import fcntl, os, sys, time
is_short = False
with open(sys.argv[1], "wb") as file:
    while data := os.read(0, 1 << 16):
        file.write(data)
        if is_short:
            time.sleep(0.001)
            continue
        try:
            fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 4096)
            is_short = True
        except OSError:
            pass  # there is more in it than that
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not QEMUS, reason="no qemu-system-x86_64")]
each_qemu = pytest.mark.parametrize("qemu", QEMUS, ids=lambda qemu: f"qemu-{qemu.version}")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


class Qmp:
    """QMP over a socket, as little as is needed."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        self._socket.settimeout(120)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, name: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def can(self, *names: str) -> None:
        """Switch capabilities of migration on."""
        self("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])

    def migrated(self) -> None:
        deadline = time.monotonic() + 120
        while (status := self("query-migrate").get("status")) != "completed":
            assert status != "failed", self("query-migrate")
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def machine(qemu: Qemu, folder: Path, name: str, *more: str) -> Iterator[tuple[Qmp, Path]]:
    """A guest that counts; its memory is a file."""
    boot = folder / "boot"
    boot.write_bytes(BOOT.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    memory = folder / f"{name}.ram"
    process = subprocess.Popen(
        [
            *qemu.words, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-m", "32M",
            "-object", f"memory-backend-file,id=ram,size=32M,mem-path={memory},share=on",
            "-M", "pc,accel=tcg,memory-backend=ram", "-qmp", f"unix:{folder / name}.qmp,server=on,wait=off",
            "-drive", f"file={boot},format=raw,if=ide,snapshot=on", *more,
        ]
    )  # fmt: skip
    try:
        qmp = Qmp(folder / f"{name}.qmp")
        try:
            yield qmp, memory
        finally:
            qmp.close()
    finally:
        process.kill()
        process.wait()


def count(memory: Path) -> int:
    with open(memory, "rb") as file:
        file.seek(COUNTER)
        return int.from_bytes(file.read(4), "little")


def wait_for_more(memory: Path, than: int) -> None:
    deadline = time.monotonic() + 120
    while count(memory) <= than:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def saved(
    qemu: Qemu, folder: Path, *, is_live: bool = False, cache_bytes: int | None = None, is_mapped: bool = False
) -> tuple[Path, bytes]:
    """A stream of a guest that counts, and its memory when it was stopped; b"" if it was not.

    is_live: the guest runs meanwhile, and writes so much that there are several rounds
    cache_bytes: with XBZRLE, through a cache of that size
    is_mapped: as a mapped-ram file
    """
    path = folder / "saved"
    with machine(qemu, folder, "source") as (qmp, memory):
        wait_for_more(memory, 1000)
        if not is_live:
            qmp("stop")
        if cache_bytes is not None:
            qmp.can("xbzrle")
            qmp("migrate-set-parameters", **{"xbzrle-cache-size": cache_bytes})
        if is_mapped:
            qmp.can("mapped-ram")
        uri = f"file:{path}" if is_mapped else f"exec:{shlex.join([sys.executable, '-c', SLOW, str(path)])}"
        for _ in range(10):
            qmp("migrate-set-parameters", **{"downtime-limit": 1 if is_live else 20_000})
            qmp("migrate", uri=uri)
            if not is_live or is_mapped or takes_rounds(qmp, 5):
                break
            qmp("cont")  # once more: the guest had no processor, and so wrote nothing during a round
        qmp("migrate-set-parameters", **{"downtime-limit": 20_000})
        qmp.migrated()
        return path, b"" if is_live else memory.read_bytes()


def takes_rounds(qmp: Qmp, count: int) -> bool:
    """Wait until a migration has had so many rounds; returns False if it is complete before."""
    deadline = time.monotonic() + 120
    while True:
        found = qmp("query-migrate")
        if found.get("ram", {}).get("dirty-sync-count", 0) >= count:
            return True
        if found.get("status") == "completed":
            return False
        assert found.get("status") != "failed" and time.monotonic() < deadline, found
        time.sleep(0.02)


def goes_on(qemu: Qemu, folder: Path, name: str, stream: Path, *, is_mapped: bool = False) -> bytes:
    """Load a stream; returns memory before the guest goes on, which it must."""
    with machine(qemu, folder, name, "-S", "-incoming", "defer") as (qmp, memory):
        if is_mapped:
            qmp.can("mapped-ram")
        qmp("migrate-incoming", uri=f"file:{stream}" if is_mapped else f"exec:cat {stream}")
        qmp.migrated()
        before = memory.read_bytes()
        qmp("cont")
        wait_for_more(memory, int.from_bytes(before[COUNTER : COUNTER + 4], "little") + 1000)
        return before


@each_qemu
def test_a_stopped_guest(qemu: Qemu, tmp_path: Path, command: Command) -> None:
    path, memory = saved(qemu, tmp_path)
    image = tmp_path / "image"
    assert command("restore", path, "-o", image).code == 0
    assert image.read_bytes() == memory
    ran = command("convert", path, tmp_path / "ours", "--to", "qemu", "--strict")
    assert (ran.code, ran.err) == (0, "")
    theirs, ours = (json.loads(command("verify", one, "--hash", "--json").out) for one in (path, tmp_path / "ours"))
    assert theirs["checkpoints"][0]["blocks"] == ours["checkpoints"][0]["blocks"]
    assert goes_on(qemu, tmp_path, "ours-again", tmp_path / "ours") == memory


@each_qemu
@pytest.mark.parametrize("cache_bytes", [None, 16 << 10, 64 << 20], ids=["plain", "small-cache", "large-cache"])
def test_a_running_guest(cache_bytes: int | None, qemu: Qemu, tmp_path: Path, command: Command) -> None:
    """A source's memory is no truth of a running guest: QEMU loses pages. The destination's is."""
    path, _ = saved(qemu, tmp_path, is_live=True, cache_bytes=cache_bytes)
    truth = goes_on(qemu, tmp_path, "theirs", path)
    image = tmp_path / "image"
    assert command("restore", path, "-o", image).code == 0
    assert image.read_bytes() == truth
    (found,) = json.loads(command("verify", path, "--json").out)["checkpoints"]
    assert (found["pages"]["xbzrle"] > 0) == (cache_bytes is not None)
    assert command("convert", path, tmp_path / "ours", "--to", "qemu", "--strict").code == 0
    assert goes_on(qemu, tmp_path, "ours-again", tmp_path / "ours") == truth


@pytest.mark.skipif(not MAPPED, reason="QEMU before 9 has no mapped-ram, and REMUS_CKPT_QEMU names none that is newer")
@pytest.mark.parametrize("qemu", MAPPED, ids=lambda qemu: f"qemu-{qemu.version}")
@pytest.mark.parametrize("is_live", [False, True], ids=["stopped", "running"])
def test_mapped_ram(is_live: bool, qemu: Qemu, tmp_path: Path, command: Command) -> None:
    """What QEMU has written as such a file, and what we write, are the same memory; so is a stream made of it."""
    path, memory = saved(qemu, tmp_path, is_live=is_live, is_mapped=True)
    truth = goes_on(qemu, tmp_path, "theirs", path, is_mapped=True)
    assert is_live or truth == memory
    assert json.loads(command("verify", path, "--json").out)["format"] == "mapped-ram"
    image = tmp_path / "image"
    assert command("restore", path, "-o", image).code == 0
    assert image.read_bytes() == truth
    for to in ("mapped-ram", "qemu"):
        ours = tmp_path / f"ours.{to}"
        assert command("convert", path, ours, "--to", to, "--strict").code == 0
        assert goes_on(qemu, tmp_path, f"again-{to}", ours, is_mapped=to == "mapped-ram") == truth
    assert command("convert", tmp_path / "ours.qemu", tmp_path / "back", "--to", "mapped-ram", "--strict").code == 0
    assert goes_on(qemu, tmp_path, "back-again", tmp_path / "back", is_mapped=True) == truth


@each_qemu
@pytest.mark.parametrize("paging", [False, True])
def test_a_dump_of_its_memory(paging: bool, qemu: Qemu, tmp_path: Path, command: Command) -> None:
    dump, image = tmp_path / "dump", tmp_path / "image"
    with machine(qemu, tmp_path, "source") as (qmp, ram):
        wait_for_more(ram, 1000)
        qmp("stop")
        qmp("dump-guest-memory", paging=paging, protocol=f"file:{dump}")
        memory = ram.read_bytes()
    ran = command("inspect", dump)
    assert (ran.code, ran.err) == (0, "")
    assert "ELF core; processor x86" in ran.out  # without -64: the guest is in real mode
    assert command("restore", dump, "-o", image).code == 0
    assert command("convert", dump, tmp_path / "lime", "--to", "lime").code == 0
    assert command("convert", tmp_path / "lime", tmp_path / "again", "--to", "raw").code == 0
    for start, stop in ((0, 0xA0000), (1 << 20, len(memory))):  # between them, there is firmware
        for path in (image, tmp_path / "again"):
            with open(path, "rb") as file:
                file.seek(start)
                assert file.read(stop - start) == memory[start:stop]
