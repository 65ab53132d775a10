"""One of a thing is no plural: in what commands print, and in their messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Command

from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.plural import counted


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def test_counted() -> None:
    assert [counted(number, "page") for number in (0, 1, 2, 12_345)] == ["0 pages", "1 page", "2 pages", "12,345 pages"]
    assert [counted(number, "page", "differ") for number in (1, 2)] == ["1 page differs", "2 pages differ"]


def test_one_of_a_thing_is_no_plural(tmp_path: Path, command: Command) -> None:
    image, other, stream = tmp_path / "image", tmp_path / "other", tmp_path / "stream"
    image.write_bytes(b"\1" * PAGE_SIZE)
    other.write_bytes(b"\2" + b"\1" * (PAGE_SIZE - 1))
    assert command("encode", image, "-o", stream).code == 0
    told = [
        command("diff", image, other).out,
        command("convert", stream, tmp_path / "elf", "--to", "elf").out,
        command("verify", stream).out,
        command("restore", stream, "-o", tmp_path / "again").out,
    ]
    for text, wanted in zip(
        told, ("1 page differs: 1 byte in 1 range", "1 run of pages", "1 checkpoint, complete", "1 page"), strict=True
    ):
        assert wanted in text
