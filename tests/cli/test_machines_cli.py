"""The commands on virtual machines of QEMU, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from qemu_support import contents, row_of, tool, unpacked
from support import Command

from remus_ckpt import Sender, batches
from remus_ckpt.codec.xbzrle import encode_page
from remus_ckpt.memory import zeros

PATTERNS = {number: tool.pattern(number) for number in (1, 2, 4)}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def put(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def test_what_inspect_shows(tmp_path: Path, command: Command) -> None:
    (plain,) = unpacked("plain", tmp_path)
    ran = command("inspect", plain)
    assert (ran.code, ran.err) == (0, "")
    for text in ("QEMU migration stream", "pc-i440fx-10.0", "vector.rom", "3 full, 2 zero", "timer", "instance 1"):
        assert text in ran.out
    (virsh,) = unpacked("virsh-gzip", tmp_path)
    ran = command("inspect", virsh)
    assert "virsh save image; body gzip, running" in ran.out
    assert "<name>vector</name>" in ran.out
    assert "<name>vector</name>" in json.loads(command("inspect", virsh, "--json").out)["xml"]
    (image,) = unpacked("qcow2-first", tmp_path)
    ran = command("inspect", image)
    assert (ran.code, ran.err) == (0, "")
    assert [name in ran.out for name in ("first", "second", "--snapshot")] == [True] * 3
    assert "snapshot second" in command("inspect", image, "--snapshot", "second").out


def test_the_events_of_inspect(tmp_path: Path, command: Command) -> None:
    (path,) = unpacked("xbzrle", tmp_path)
    rows = json.loads(command("inspect", path, "--chunks", "--json").out)["chunks"]
    assert [row["event"] for row in rows[:3]] == ["Header", "Configuration", "Section"]
    assert sum(row["encoded"] for row in rows if row["event"] == "Pages") == 2
    assert "MemoryEnd" in command("inspect", path, "--chunks").out


def test_restore(tmp_path: Path, command: Command) -> None:
    row = row_of("plain")
    (path,) = unpacked("plain", tmp_path)
    image, state = tmp_path / "image", tmp_path / "state"
    ran = command("restore", path, "-o", image, "--device-state", state)
    assert (ran.code, ran.err) == (0, "")
    expected = PATTERNS[1] + bytes(4096) + b"\xaa" * 4096 + PATTERNS[2]
    assert image.read_bytes() == expected
    assert image.stat().st_mode & 0o777 == 0o600
    data = state.read_bytes()
    assert data[0] == 4
    assert data in contents("plain")[0]
    assert command.binary("restore", path, "-o", "-") == (0, expected, "")
    assert command("restore", path, "-o", image).code == 1  # it is there
    ran = command("restore", path, "-o", image, "--block", "vector.rom", "--overwrite", "--json")
    assert json.loads(ran.out)["block"] == "vector.rom"
    assert image.read_bytes() == PATTERNS[4]
    assert row["blocks"]["vector.rom"]["bytes"] == 4096
    ran = command("restore", path, "-o", tmp_path / "no", "--block", "other")
    assert ran.code == 1
    assert "ram, vector.rom" in ran.err
    assert not (tmp_path / "no").exists()


def test_a_guest_with_several_blocks(tmp_path: Path, command: Command) -> None:
    stream = tool.Stream()
    stream.memory({"node0": 4096, "node1": 4096, "x/vga.vram": 4096})
    stream.part()
    stream.page(0, PATTERNS[1], block="node0")
    stream.page(0, PATTERNS[2], block="node1")
    stream.page(0, b"\0", tool.ZERO, "x/vga.vram")
    stream.eos()
    path = put(tmp_path, "numa", tool.finished(stream))
    ran = command("restore", path, "-o", tmp_path / "image")
    assert ran.code == 1
    assert "node0, node1" in ran.err
    assert not (tmp_path / "image").exists()
    assert command("restore", path, "-o", tmp_path / "image", "--block", "node1").code == 0
    assert (tmp_path / "image").read_bytes() == PATTERNS[2]
    (checkpoint,) = json.loads(command("verify", path, "--hash", "--json").out)["checkpoints"]
    assert len(checkpoint["blocks"]) == 3
    assert "memory_sha256" not in checkpoint


def test_a_stream_of_a_source_that_died(tmp_path: Path, command: Command) -> None:
    """What came is given, and nobody takes it for a checkpoint."""
    (path,) = unpacked("cut-between-parts", tmp_path)
    image = tmp_path / "image"
    ran = command("restore", path, "-o", image)
    assert ran.code == 20
    assert "not whole" in ran.err
    assert image.read_bytes()[:4096] == PATTERNS[1]
    ran = command("verify", path)
    assert ran.code == 20
    assert "incomplete" in ran.out
    (path,) = unpacked("cut-within-devices", tmp_path)
    ran = command("restore", path, "-o", image, "--overwrite", "--device-state", tmp_path / "state")
    assert ran.code == 0
    assert "memory is whole" in ran.err
    assert not (tmp_path / "state").exists()
    empty = put(tmp_path, "empty", b"QEVM\0\0")
    assert command("verify", empty).code == 20
    assert command("restore", empty, "-o", tmp_path / "none").code == 20
    assert not (tmp_path / "none").exists()


def test_a_block_that_is_not_in_the_stream(tmp_path: Path, command: Command) -> None:
    (path,) = unpacked("ignore-shared", tmp_path)
    ran = command("restore", path, "-o", tmp_path / "image")
    assert ran.code == 20
    assert "x-ignore-shared" in ran.err
    assert not (tmp_path / "image").exists()


def test_extract(tmp_path: Path, command: Command) -> None:
    (path,) = unpacked("plain", tmp_path)
    assert command.binary("extract", path, "--pfn", "3,0") == (0, PATTERNS[2] + PATTERNS[1], "")
    assert command.binary("extract", path, "--pfn", "0", "--block", "vector.rom") == (0, PATTERNS[4], "")
    assert command("extract", path, "--pfn", "2", "--hex").out.startswith("000000002000  aa aa")
    assert json.loads(command("extract", path, "--pfn", "1", "--json").out)["pages"] == [{"pfn": 1, "hex": "00" * 4096}]
    assert command("extract", path, "--pfn", "4").code == 2
    assert command("extract", path, "--pfn", "0", "--checkpoint", "1").code == 1
    (path,) = unpacked("cut-between-parts", tmp_path)
    assert command.binary("extract", path, "--pfn", "0")[:2] == (20, PATTERNS[1])


def test_diff(tmp_path: Path, command: Command) -> None:
    (image,) = unpacked("qcow2-first", tmp_path)
    (plain,) = unpacked("plain", tmp_path)
    (encoded,) = unpacked("xbzrle", tmp_path)
    found = json.loads(command("diff", plain, encoded, "--json").out)
    # Three bytes and one in page 0; two in page 1; page 2 became zeros. What the encoder finds is as much.
    assert found["pages"] == 3
    assert [5, 8] in found["ranges"]
    assert [8192, 12288] in found["ranges"]
    same = json.loads(command("diff", image, "first", "first", "--json").out)
    assert same["pages"] == 0
    between = json.loads(command("diff", image, "first", "second", "--json").out)
    assert between["pages"] == 3
    raw = put(tmp_path, "raw", PATTERNS[1] + bytes(4096) + b"\xaa" * 4096 + PATTERNS[2])
    assert json.loads(command("diff", plain, raw, "--json").out)["pages"] == 0
    assert json.loads(command("diff", raw, plain, "--json").out)["ranges"] == []
    assert (
        json.loads(command("diff", plain, plain, "--block", "vector.rom", "--json").out)["memory_bytes"] == [4096] * 2
    )
    assert command("diff", image, "first", "third").code == 1


def test_options_that_do_not_fit_are_refused(tmp_path: Path, command: Command) -> None:
    (plain,) = unpacked("plain", tmp_path)
    sender = Sender(4)
    memory = zeros(4)
    xen = put(
        tmp_path,
        "xen",
        b"".join(bytes(part) for group in sender.checkpoint(batches(range_of(4), memory)) for part in group),
    )
    assert command("verify", xen).code == 0
    for arguments in (
        ("verify", plain, "--word", "8"),
        ("verify", plain, "--strict"),
        ("verify", plain, "--page-size", "100"),
        ("verify", xen, "--snapshot", "a"),
        ("verify", xen, "--page-size", "4096"),
        ("verify", xen, plain),
        ("restore", xen, "-o", tmp_path / "x", "--block", "ram"),
        ("diff", xen, "0", "0", "--block", "ram"),
        ("diff", xen, "a", "0"),
    ):
        assert command(*arguments).code == 2, arguments
    assert command("verify", plain, "--snapshot", "a").code == 1
    assert command("verify", plain, xen).code == 21
    assert json.loads(command("verify", xen, "--json").out)["format"] == "remus"
    (checkpoint,) = json.loads(command("verify", xen, "--hash", "--json").out)["checkpoints"]
    assert checkpoint["blocks"]["memory"] == {"bytes": 4 * 4096, "sha256": checkpoint["memory_sha256"]}


def range_of(pages: int):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.arange(pages)


def test_from_a_pipe(tmp_path: Path) -> None:
    """A pipe has no end that could be looked at first; a machine of x86 needs none, another must be told."""
    code = [sys.executable, "-m", "remus_ckpt", "verify", "-"]
    ran = subprocess.run(code, input=contents("plain")[0], capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    ran = subprocess.run(code, input=contents("pages-of-8-kib")[0], capture_output=True, check=False)
    assert ran.returncode == 21
    assert b"--page-size" in ran.stderr
    code += ["--page-size", "8192", "--hash"]
    ran = subprocess.run(code, input=contents("pages-of-8-kib")[0], capture_output=True, check=False)
    assert ran.returncode == 0
    assert row_of("pages-of-8-kib")["blocks"]["memory"]["sha256"].encode() in ran.stdout


def test_what_our_encoder_writes_is_read(tmp_path: Path, command: Command) -> None:
    import numpy as np

    old, new = (np.frombuffer(bytearray(PATTERNS[number]), dtype=np.uint8).copy() for number in (1, 1))
    new[100:200] ^= 3
    encoded = encode_page(new, old)
    assert isinstance(encoded, bytes)
    stream, _ = tool.simple()
    tool.filled(stream, tool.Guest(tool.SIZES))
    stream.part()
    stream.encoded(0, encoded, "ram")
    stream.eos()
    path = put(tmp_path, "it", tool.finished(stream))
    assert command.binary("extract", path, "--pfn", "0") == (0, new.tobytes(), "")
