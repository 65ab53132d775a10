"""The second device model's record that libxl writes when Remus is told to stop (specs/errata.md, E22)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import streams as s
from support import Command

from remus_ckpt.files import read_checkpoints

EXTRA = s.XL + struct.pack("<I", 5) + b"QEVM2"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.mark.parametrize("options", [[], ["--strict"]])
def test_it_ends_a_good_stream(options: list[str], tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in"
    path.write_bytes(s.small_hvm(8))
    wanted = [checkpoint.memory.tobytes() for checkpoint in read_checkpoints(path)]
    path.write_bytes(s.small_hvm(8) + EXTRA)
    ran = command("verify", path, *options)
    assert (ran.code, ran.err) == (0, "") and "3 checkpoints, complete" in ran.out
    assert [checkpoint.memory.tobytes() for checkpoint in read_checkpoints(path)] == wanted
    assert command("convert", path, tmp_path / "out", "--to", "xen-v2").code == 0
    assert [checkpoint.memory.tobytes() for checkpoint in read_checkpoints(tmp_path / "out")] == wanted


def test_cut_or_followed_by_more_it_does_not(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in"
    for extra in (EXTRA[:10], EXTRA[:23], EXTRA[:-1]):
        path.write_bytes(s.small_hvm(8) + extra)
        ran = command("verify", path)
        assert ran.code == 0, extra
        assert "checkpoint 2 is the last good one" in ran.err
    path.write_bytes(s.small_hvm(8) + EXTRA + b"more")
    ran = command("verify", path)
    assert ran.code == 0 and "4 bytes follow the last checkpoint" in ran.err


def test_no_other_stream_may_have_it(tmp_path: Path, command: Command) -> None:
    path, image = tmp_path / "in", tmp_path / "image"
    image.write_bytes(b"x" * 5000)
    assert command("encode", image, "-o", path).code == 0
    path.write_bytes(path.read_bytes() + EXTRA)
    assert command("verify", path).code == 20
