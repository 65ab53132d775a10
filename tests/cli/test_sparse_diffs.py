"""Full images with sparse diffs over them, as Firecracker writes them: one stream, and the same files back."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from conftest import many
from support import Command

PAGE = 4096
Diff = dict[int, bytes]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE)


def put(path: Path, pages: Diff, size: int) -> Path:
    """A file with data for these pages, zeros too, and holes elsewhere."""
    with open(path, "wb") as file:
        file.truncate(size)
        for number, data in pages.items():
            file.seek(number * PAGE)
            file.write(data[: size - number * PAGE])
    return path


def held(path: Path) -> tuple[Diff, int]:
    """The pages that a file has data for, and its size, by asking the file system page by page."""
    size = path.stat().st_size
    found = {}
    with open(path, "rb") as file:
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), size)
            for number in range(start // PAGE, -(-at // PAGE)):
                found[number] = os.pread(file.fileno(), PAGE, number * PAGE)
    return found, size


def over(memory: bytes, diff: Diff, size: int) -> bytes:
    changed = bytearray(memory)
    for number, data in diff.items():
        changed[number * PAGE : (number + 1) * PAGE] = data[: size - number * PAGE]
    return bytes(changed)


@pytest.mark.parametrize("codec", ["delta", "rle"])
@pytest.mark.parametrize("size", [40 * PAGE, 40 * PAGE - 1000])
def test_a_base_and_diffs_become_a_stream_and_the_same_diffs_again(
    codec: str, size: int, tmp_path: Path, command: Command
) -> None:
    base = put(tmp_path / "base", {number: page(number) for number in range(0, 40, 2)}, size)
    first = {0: page(100), 1: page(101), 4: page(4), 6: bytes(PAGE), 39: page(102)}  # the same, zeros, the last page
    diffs: list[Diff] = [first, {}, {0: page(0), 7: bytes(PAGE), 39: page(103)[:-1] + b"\0"}]
    paths = [put(tmp_path / f"diff{number}", diff, size) for number, diff in enumerate(diffs, 1)]
    ran = command("encode", base, *paths, "--sparse-diffs", "-o", tmp_path / "it", "--codec", codec, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert [row["pages"] for row in json.loads(ran.out)["checkpoints"]] == [20, 5, 0, 3]

    memory = base.read_bytes()
    for number, diff in enumerate([{}, *diffs]):
        memory = over(memory, diff, size)
        assert (
            command("restore", tmp_path / "it", "-o", tmp_path / "m", "--checkpoint", number, "--overwrite").code == 0
        )
        assert (tmp_path / "m").read_bytes() == memory
        if number:
            arguments = ("--checkpoint", number, "--sparse-diff-from", number - 1)
            assert command("restore", tmp_path / "it", "-o", tmp_path / f"back{number}", *arguments).code == 0
            assert held(tmp_path / f"back{number}") == held(paths[number - 1])
    # Over several checkpoints: what came in any of them, as the last one has it.
    assert command("restore", tmp_path / "it", "-o", tmp_path / "all", "--sparse-diff-from", 0).code == 0
    found, found_size = held(tmp_path / "all")
    assert (sorted(found), found_size) == ([0, 1, 4, 6, 7, 39], size)
    assert over(base.read_bytes(), found, size) == memory
    assert (tmp_path / "all").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob(".*")) == []


def test_any_diffs(tmp_path: Path, command: Command) -> None:
    chance = random.Random(3)
    for turn in range(many(3, 40)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        pages = chance.randrange(1, 3000)
        size = pages * PAGE - chance.choice((0, 1, 4095))
        share = chance.random()
        files = []
        for number in range(chance.randrange(1, 6)):
            chosen = [at for at in range(pages) if chance.random() < share]
            kinds = [chance.choice((page(at), bytes(PAGE), page(at + number)[:9].ljust(PAGE, b"\1"))) for at in chosen]
            files.append(put(folder / f"{number}", dict(zip(chosen, kinds, strict=True)), size))
        limit = ("--reference-pages", 7) if turn % 2 else ()
        assert command("encode", *files, "--sparse-diffs", "-o", folder / "it", *limit).code == 0
        for number in range(1, len(files)):
            arguments = ("--checkpoint", number, "--sparse-diff-from", number - 1)
            assert command("restore", folder / "it", "-o", folder / "back", *arguments, "--overwrite").code == 0
            assert held(folder / "back") == held(files[number])


def test_what_is_refused(tmp_path: Path, command: Command) -> None:
    base = put(tmp_path / "base", {0: page(0)}, 8 * PAGE)
    small = put(tmp_path / "small", {0: page(1)}, 7 * PAGE)
    diff = put(tmp_path / "diff", {1: page(1)}, 8 * PAGE)
    ran = command("encode", base, small, "--sparse-diffs", "-o", tmp_path / "it")
    assert ran.code == 1
    assert "not a diff over that image" in ran.err
    assert not (tmp_path / "it").exists()
    assert command("encode", base, diff, "--sparse-diffs", "-o", tmp_path / "it").code == 0
    for arguments, code in (
        (("-o", tmp_path / "out", "--sparse-diff-from", "1"), 1),
        (("-o", tmp_path / "out", "--sparse-diff-from", "2"), 1),
        (("-o", tmp_path / "out", "--checkpoint", "0", "--sparse-diff-from", "1"), 1),
        (("-o", "-", "--sparse-diff-from", "0"), 2),
        (("-o", "/dev/null", "--sparse-diff-from", "0"), 2),
    ):
        assert command("restore", tmp_path / "it", *arguments).code == code, arguments
        assert not (tmp_path / "out").exists()


def test_a_file_system_that_reports_no_holes(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a diff would be taken for a whole image."""
    base = put(tmp_path / "base", {0: page(0)}, 8 * PAGE)
    diff = put(tmp_path / "diff", {1: page(1)}, 8 * PAGE)

    def no_seek(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", no_seek)
    ran = command("encode", base, diff, "--sparse-diffs", "-o", tmp_path / "it")
    assert ran.code == 1
    assert "does not report holes" in ran.err
