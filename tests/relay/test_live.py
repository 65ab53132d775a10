"""`convert --to qemu --live`: every checkpoint is a round, and what a reader has at the end is the last one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streams as s
import v2_streams as v
from qemu_support import read_all
from support import Command

from remus_ckpt.files import read_checkpoints
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.vm.part import Machine, VmPart
from remus_ckpt.wire.qemu import events

DEVICE = b"\x04\0\0\0\7\3cpu\0\0\0\0\0\0\0\1" + b"registers" + b"\x7e\0\0\0\7"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def images(folder: Path, count: int, pages: int = 64) -> tuple[list[Path], list[bytes]]:
    """Images of a memory that changes a little from one to the next."""
    random = np.random.default_rng(count)
    memory = random.integers(1, 256, (pages, PAGE_SIZE), dtype=np.uint8)
    memory[5:9] = 0
    paths, contents = [], []
    for number in range(count):
        path = folder / f"image{number}"
        path.write_bytes(memory.tobytes())
        paths.append(path)
        contents.append(memory.tobytes())
        memory[random.choice(pages, pages // 3, replace=False), number] ^= 1
    return paths, contents


def live(command: Command, source: object, target: Path, *more: object) -> dict[str, Any]:
    ran = command("convert", source, target, "--to", "qemu", "--live", "--json", *more)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def parts(data: bytes) -> int:
    return sum(isinstance(one, events.Section) and one.kind == "PART" for one in read_all(data, page_size=PAGE_SIZE))


def test_a_round_for_each_checkpoint(tmp_path: Path, command: Command) -> None:
    paths, contents = images(tmp_path, 5)
    stream, target = tmp_path / "stream", tmp_path / "out"
    assert command("encode", *paths, "-o", stream).code == 0
    report = live(command, stream, target)
    assert [one["epoch"] for one in report["checkpoints"]] == [0, 1, 2, 3, 4]
    assert report["bytes"] == target.stat().st_size == report["checkpoints"][-1]["end"]
    assert parts(target.read_bytes()) == 5
    assert report["migration"]["dirty-sync-count"] == 5
    assert report["migration"]["xbzrle-cache"]["pages"] == 4 * (64 // 3) and report["migration"]["encodes"]
    assert command("restore", target, "-o", tmp_path / "image").code == 0
    assert (tmp_path / "image").read_bytes() == contents[-1]
    found = json.loads(command("verify", target, "--json").out)
    assert found["complete"] and found["checkpoints"][0]["pages"]["xbzrle"] > 60
    assert target.stat().st_mode & 0o777 == 0o600

    # The same through pipes; and a stream that is cut ends with its last good checkpoint.
    command_line = [sys.executable, "-m", "remus_ckpt", "convert", "-", "-", "--to", "qemu", "--live"]
    for size, last in ((None, 4), (-100, 3)):
        data = stream.read_bytes()[:size]
        ran = subprocess.run(command_line, input=data, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
        (tmp_path / "piped").write_bytes(ran.stdout)
        assert command("restore", tmp_path / "piped", "-o", tmp_path / "image", "--overwrite").code == 0
        assert (tmp_path / "image").read_bytes() == contents[last]
        assert parts(ran.stdout) == last + 1


@pytest.mark.parametrize("name", [*v.ALL, "legacy"])
def test_streams_of_xen_too(name: str, tmp_path: Path, command: Command) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(s.small_hvm(8) if name == "legacy" else v.ALL[name])
    wanted = [checkpoint.image.tobytes() for checkpoint in read_checkpoints(source)]
    report = live(command, source, target)
    assert parts(target.read_bytes()) == len(wanted)
    assert command("restore", target, "-o", tmp_path / "image").code == 0
    assert (tmp_path / "image").read_bytes() == wanted[-1]
    assert report["lost"], "Xen's streams say more of a guest"
    assert command("convert", source, tmp_path / "none", "--to", "qemu", "--live", "--strict").code == 1
    assert not (tmp_path / "none").exists()


def protected(path: Path, state: bytes) -> None:
    """A stream of a guest's history, with two checkpoints of this device state."""
    machine = Machine(qemu="qemu-system-x86_64", version=(7, 2, 0), arguments=("-m", "1M"), memory_bytes=1 << 20)
    sender, memory = Sender(256), np.ones((256, PAGE_SIZE), dtype=np.uint8)
    with open(path, "wb") as file:
        for _ in range(2):
            for group in sender.checkpoint(
                [*batches(np.arange(256), memory)], device_state=VmPart(machine, state).pack()
            ):
                for buffer in group:
                    file.write(buffer)
            memory[9:30, 7] += 1


def test_a_protected_guest_takes_its_devices_along(tmp_path: Path, command: Command) -> None:
    stream, target = tmp_path / "stream", tmp_path / "out"
    protected(stream, b"QEVM\0\0\0\3" + DEVICE + b"\0")
    assert "device state" not in str(live(command, stream, target)["lost"])
    found = read_all(target.read_bytes(), page_size=PAGE_SIZE)
    assert [one.data for one in found if isinstance(one, events.DeviceState)] == [DEVICE]
    assert [one.name for one in found if isinstance(one, events.RamBlock)] == ["remus-ram"]
    assert not any(isinstance(one, events.Configuration) for one in found)

    protected(stream, b"QEVM\0\0\0\3" + DEVICE)
    ran = command("convert", stream, target, "--to", "qemu", "--live", "--overwrite")
    assert ran.code == 1 and "has no end" in ran.err


def test_what_has_one_checkpoint_or_goes_elsewhere_is_refused(tmp_path: Path, command: Command) -> None:
    (image, *_), _ = images(tmp_path, 1)
    stream = tmp_path / "stream"
    assert command("encode", image, "-o", stream).code == 0
    for words in (("--to", "xen"), ("--to", "qemu", "--checkpoint", 0)):
        assert command("convert", stream, tmp_path / "out", *words, "--live").code == 2
    assert command("convert", image, tmp_path / "out", "--from", "raw", "--to", "qemu", "--live").code == 1
    assert command("convert", stream, tmp_path / "machine", "--to", "qemu").code == 0
    ran = command("convert", tmp_path / "machine", tmp_path / "out", "--to", "qemu", "--live")
    assert ran.code == 1 and "one checkpoint" in ran.err
