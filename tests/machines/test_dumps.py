"""ELF cores and LiME files: the same bytes at the same addresses in every other format, and back."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qemu_support import contents, tool, unpacked
from support import Command

from remus_ckpt.blocks import Blocks
from remus_ckpt.image import elf, lime
from remus_ckpt.image.dump import DumpReader
from remus_ckpt.limits import Limits
from remus_ckpt.restorer import Anonymous

PARSERS = {"elf": elf.parse, "lime": lime.parse}
RANGES = [(0x1000, tool.pattern(1) * 3), (0x9000, tool.pattern(2) + bytes(4096)), (0x100000, tool.pattern(3))]
MEMORY = bytearray(0x101000)
for _at, _data in RANGES:
    MEMORY[_at : _at + len(_data)] = _data


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def put(folder: Path, word: str) -> Path:
    path = folder / word
    path.write_bytes(tool.elf(RANGES, note=bytes(336)) if word == "elf" else tool.lime(RANGES))
    return path


@pytest.mark.parametrize("word", ["elf", "lime"])
def test_the_same_memory_in_every_format(word: str, tmp_path: Path, command: Command) -> None:
    path = put(tmp_path, word)
    for to in ("raw", "remus", "xen", "xen-v2", "qemu", "mapped-ram"):
        ran = command("convert", path, tmp_path / to, "--to", to)
        assert ran.code == 0
        assert "notes" not in ran.err
        if to == "raw":
            assert (tmp_path / to).read_bytes() == MEMORY
        else:
            assert command("restore", tmp_path / to, "-o", tmp_path / "image", "--overwrite").code == 0
            assert (tmp_path / "image").read_bytes()[: len(MEMORY)] == MEMORY
    # By address, nothing is added and nothing is lost.
    for to, made in (("elf", tool.lime(RANGES)), ("lime", tool.lime(RANGES))):
        assert command("convert", path, tmp_path / f"{to}-1", "--to", to, "--strict").code == 0
        ran = command("convert", tmp_path / f"{to}-1", tmp_path / f"{to}-2", "--to", "lime", "--strict")
        assert ran.code == 0
        assert (tmp_path / f"{to}-2").read_bytes() == made


@pytest.mark.parametrize("word", ["elf", "lime"])
def test_every_command(word: str, tmp_path: Path, command: Command) -> None:
    path = put(tmp_path, word)
    ran = command("inspect", path, "--chunks")
    assert (ran.code, ran.err) == (0, "")
    assert ("ELF core; processor x86-64" if word == "elf" else "LiME dump") in ran.out
    assert "at=1048576 bytes=4096" in ran.out
    assert command.binary("extract", path, "--pfn", "0,1,0x100") == (
        0, bytes(4096) + tool.pattern(1) + tool.pattern(3), ""
    )  # fmt: skip
    assert command.binary("restore", path, "-o", "-") == (0, bytes(MEMORY), "")
    (tmp_path / "raw").write_bytes(MEMORY)
    assert "0 pages differ" in command("diff", path, tmp_path / "raw").out
    ran = subprocess.run(
        [sys.executable, "-m", "remus_ckpt", "convert", "-", "-", "--to", "lime"],
        input=path.read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert ran.stdout == tool.lime(RANGES)
    for option in (("--snapshot", "a"), ("--page-size", "4096"), ("--strict",), ("--codec", "rle")):
        assert command("verify", path, *option).code in (1, 2), option
    assert command("restore", path, "-o", tmp_path / "no", "--checkpoint", "1").code == 1
    assert command("restore", path, "-o", tmp_path / "no", "--sparse-diff-from", "0").code == 1


def test_what_an_elf_core_holds_besides_memory(tmp_path: Path, command: Command) -> None:
    (path,) = unpacked("elf-not-in-order", tmp_path)
    ran = command("convert", path, tmp_path / "it", "--to", "lime", "--json")
    assert json.loads(ran.out)["lost"] == ["the notes (29 bytes)"]
    assert command("convert", path, tmp_path / "no", "--to", "lime", "--strict").code == 1
    (path,) = unpacked("elf-32-big-endian", tmp_path)
    assert command("convert", path, tmp_path / "again", "--to", "elf").code == 0
    assert json.loads(command("inspect", tmp_path / "again", "--json").out)["processor"] == 8


@pytest.mark.parametrize("name", ["elf-odd", "lime-odd", "elf-aliases", "elf-many", "lime-not-in-order"])
def test_any_split_gives_the_same_memory(name: str) -> None:
    (data,) = contents(name)

    def memory(sizes: list[int]) -> bytes:
        word = name.split("-", maxsplit=1)[0]
        reader = DumpReader(PARSERS[word], "", Limits(memory_bytes=1 << 20))
        blocks = Blocks(lambda _: Anonymous(), reader.fail)
        at, turn = 0, 0
        while (event := reader.next_event()) is None or not hasattr(event, "complete"):
            if event is not None:
                blocks.take(event)
                continue
            room = reader.get_buffer()
            size = min(sizes[turn % len(sizes)], len(data) - at, len(room))
            room[:size] = data[at : at + size]
            at, turn = at + size, turn + 1
            reader.buffer_updated(size)
            if not size:
                reader.feed_eof()
        assert event.complete
        return blocks.named["memory"].image.tobytes()

    whole = memory([len(data)])
    chance = random.Random(name)
    for _ in range(20):
        assert memory([chance.randrange(1, 6000) for _ in range(chance.randrange(1, 9))]) == whole
    assert np.count_nonzero(np.frombuffer(whole, dtype=np.uint8)) > 300


def test_a_library_that_is_not_there(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = unpacked("virsh-lzop", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = command("verify", path)
    assert ran.code == 21
    assert "command lzop is missing" in ran.err
