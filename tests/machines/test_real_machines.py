"""Streams that QEMU and libvirt wrote give the memory of the machine that loaded them, whatever file they are in."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import many
from qemu_support import needs_qemu, real_files, real_manifest
from support import Command

from remus_ckpt.errors import RemusError, StreamError
from remus_ckpt.files import StreamFile
from remus_ckpt.image import Image
from remus_ckpt.limits import GIB, MIB
from remus_ckpt.machines import Machine
from remus_ckpt.memory import memory_sha256, zeros
from remus_ckpt.restorer import Anonymous

pytestmark = needs_qemu
IDS = [
    "qemu10-xbzrle-16w",
    "ignore-shared72",
    "mapped10",
    "numa72",
    "plain10",
    "xb10-small",
    "multifd10-none",
    "aarch64-10",
    "arm10-1k",
    "snap10",
    "virsh-raw",
    "virsh-sparse",
    "virsh-zstd",
    "q2-mapped10-live",
    "q2-xbzrle10-numa-vga",
    "q2-multifd72-none",
    "q2-bgsnap10",
    "r3-multifd72-zstd",
    "r3-advise10",
]
"""All of them, named here so that one that is missing is a failure and not a test less."""
SMALL = [
    "plain10",
    "xb10-small",
    "multifd10-none",
    "ignore-shared72",
    "arm10-1k",
    "snap10",
    "virsh-zstd",
    "q2-bgsnap10",
]
PAGE_NAMES = {
    "page": ("page", "mapped_pages", "mfd_normal"),
    "zero": ("zero", "mapped_absent", "mfd_zero"),
    "xbzrle": ("xbzrle",),
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def test_every_stream_is_tried() -> None:
    assert set(real_manifest()) == set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_memory_and_counts(name: str, folder: Path, command: Command) -> None:
    row = real_manifest()[name]
    files = real_files(name, folder)
    for snapshot in row.get("snapshots", [None]):
        chosen = [] if snapshot is None else ["--snapshot", snapshot]
        ran = command("verify", *files, *chosen, "--hash", "--json")
        assert (ran.code, ran.err) == (0, "")
        found = json.loads(ran.out)
        assert found["complete"]
        (checkpoint,) = found["checkpoints"]
        for block, known in _blocks(row, snapshot).items():
            assert checkpoint["blocks"][block]["sha256"] == known["sha256"], block
            assert known.get("bytes") in (None, checkpoint["blocks"][block]["bytes"])
        if snapshot is not None:
            assert checkpoint["memory_sha256"] == row["snapshots"][snapshot]["ram_sha256"]
        stated = row.get("pages") or {}
        for kind, names in PAGE_NAMES.items():
            if any(one in stated for one in names):
                assert checkpoint["pages"][kind] == sum(stated.get(one, 0) for one in names)


def _blocks(row: dict[str, Any], snapshot: str | None) -> dict[str, dict[str, Any]]:
    if snapshot is not None:
        return {"ram": {"sha256": row["snapshots"][snapshot]["ram_sha256"]}}
    if "ram_sha256" in row:
        return {"ram": {"sha256": row["ram_sha256"]["dest-ram"]}}
    known: dict[str, dict[str, Any]] = row["blocks"]
    return known


@pytest.mark.parametrize("name", ["plain10", "q2-mapped10-live", "virsh-sparse", "arm10-1k", "xb10-small"])
def test_restored_to_a_file(name: str, folder: Path, command: Command, tmp_path: Path) -> None:
    row = real_manifest()[name]
    image = tmp_path / "image"
    assert command("restore", *real_files(name, folder), "-o", image).code == 0
    block = "pc.ram" if name.startswith("virsh") else "ram"
    found = json.loads(command("verify", *real_files(name, folder), "--hash", "--json").out)
    known = row["blocks"][block]
    assert image.stat().st_size == known["bytes"]
    with Image(image) as opened:
        memory = zeros(known["bytes"] // 4096)
        opened.read(0, memory)
    assert memory_sha256(memory) == known["sha256"] == found["checkpoints"][0]["memory_sha256"]
    assert image.stat().st_blocks * 512 < known["bytes"]  # zero pages are holes


def _read(files: list[str], **more: Any) -> Machine:
    with Machine(StreamFile(files[0]), files[1:], home=lambda _: Anonymous(), **more) as machine:
        machine.read()
    return machine


@pytest.mark.parametrize("name", SMALL)
def test_cut_anywhere_and_changed_anywhere(name: str, folder: Path, tmp_path: Path) -> None:
    """The short form: the vectors of our own try more of it, tests/machines/test_machines.py."""
    files = real_files(name, folder)
    snapshot = next(iter(real_manifest()[name].get("snapshots", [None])))
    data = Path(files[0]).read_bytes()
    chance = random.Random(name)
    path = tmp_path / "it"
    for number in range(many(6, 300)):
        changed = bytearray(data)
        if number % 6:
            at = chance.choice(
                (chance.randrange(len(data)), chance.randrange(200), len(data) - 1 - chance.randrange(200_000))
            )
            changed[at % len(data)] ^= 1 << chance.randrange(8)
        else:
            changed = changed[: chance.randrange(len(data))]
        path.write_bytes(changed)
        began = time.monotonic()
        with suppress(RemusError):
            machine = _read([str(path), *files[1:]], snapshot=snapshot)
            assert machine.error is None or isinstance(machine.error, StreamError)
        assert time.monotonic() - began < 30


@pytest.mark.slow
def test_memory_stays_bounded_when_nothing_is_kept(folder: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))\n"
        "sys.argv = ['remus-ckpt', 'verify', {1!r}]\nfrom remus_ckpt.cli import main\nmain()"
    ).format(GIB + 512 * MIB, real_files("numa72", folder)[0])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
