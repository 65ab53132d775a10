"""The commands on Xen's v2 streams, and machines of QEMU on their way to Xen's formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import v2_streams as v
from streams import page
from support import Command

from remus_ckpt.files import read_checkpoints
from remus_ckpt.pages import PAGE_SIZE

QEMU = Path(__file__).resolve().parents[2] / "specs" / "vectors" / "qemu"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.write_bytes(v.LIBXL_SERIES)
    return path


def test_verify(stream: Path, command: Command) -> None:
    ran = command("verify", stream, "--hash", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["format"], found["complete"]) == (0, "xen-v2", True)
    wanted = [hashlib.sha256(memory).hexdigest() for memory in v.MEMORY["libxl-series"]]
    assert [row["memory_sha256"] for row in found["checkpoints"]] == wanted
    assert "Xen v2, version 2, libxl and libxc; guest hvm" in command("verify", stream).out


def test_inspect(stream: Path, command: Command) -> None:
    ran = command("inspect", stream, "--chunks")
    assert ran.code == 0
    for name in ("libxl_header", "image_header", "hvm_params", "IDENT_PT=0xfeff", "checkpoint_end", "emulator_context"):
        assert name in ran.out
    rows = json.loads(command("inspect", stream, "--json").out)["checkpoints"]
    assert [row["tail"]["device_state_bytes"] for row in rows] == [6, 6]
    assert rows[1]["parameters"] == {"HVM_IDENT_PT": 0xFEFF, "PAE_ENABLED": 1}


def test_restore_extract_and_diff(stream: Path, tmp_path: Path, command: Command) -> None:
    for number, wanted in enumerate(v.MEMORY["libxl-series"]):
        image, state = tmp_path / f"image{number}", tmp_path / f"state{number}"
        ran = command("restore", stream, "-o", image, "--checkpoint", number, "--device-state", state)
        assert ran.code == 0, ran.err
        assert image.read_bytes() == wanted
        assert state.read_bytes() == f"QEVM {number + 1}".encode()
        code, out, _ = command.binary("extract", stream, "--pfn", "1", "--checkpoint", number)
        assert (code, out) == (0, wanted[PAGE_SIZE : 2 * PAGE_SIZE])
    found = json.loads(command("diff", stream, 0, 1, "--json").out)
    assert found["ranges"] == [[PAGE_SIZE, 3 * PAGE_SIZE]]


def test_a_cut_or_damaged_stream(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in"
    path.write_bytes(v.SERIES[:-30])
    ran = command("restore", path, "-o", tmp_path / "image")
    assert ran.code == 0 and "checkpoint 0 is the last good one" in ran.err
    assert (tmp_path / "image").read_bytes() == v.MEMORY["series"][0]
    path.write_bytes(v.SERIES[:-8] + v.record(0x77))
    assert command("verify", path).code == 20
    path.write_bytes(v.head() + v.page_data([v.entry(1 << 40)], page(1)))
    ran = command("verify", path)
    assert ran.code == 20 and "--max-memory" in ran.err


@pytest.mark.parametrize("to", ["xen", "xen-v2"])
def test_a_machine_of_qemu_becomes_a_stream_of_xens(to: str, tmp_path: Path, command: Command) -> None:
    for path in (one for one in sorted(QEMU.glob("*.bin.xz")) if not one.name.startswith("bad")):
        if command("convert", path, tmp_path / "raw", "--to", "raw", "--overwrite").code:
            continue
        ran = command("convert", path, tmp_path / "out", "--to", to, "--overwrite")
        assert ran.code == 0, ran.err
        (held,) = read_checkpoints(tmp_path / "out")
        wanted = (tmp_path / "raw").read_bytes()
        assert held.memory.tobytes() == wanted + bytes(-len(wanted) % PAGE_SIZE)
        return
    pytest.fail("no vector of a machine can be converted")


def test_an_image_becomes_a_stream_of_xens(tmp_path: Path, command: Command) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 40)
    ran = command("convert", image, tmp_path / "out", "--to", "xen-v2", "--from", "raw", "--for", "xen", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["format"] == "raw"
    (held,) = read_checkpoints(tmp_path / "out")
    assert len(held.memory) == 3 + 3
    assert held.memory.tobytes().startswith(image.read_bytes())


def test_what_the_input_must_be(stream: Path, tmp_path: Path, command: Command) -> None:
    for name, code in (("xen-v2", 0), ("qemu", 1), ("xen", 1)):
        ran = command("convert", stream, tmp_path / name, "--to", "xen", "--from", name)
        assert ran.code == code, ran.err
        assert (tmp_path / name).exists() == (not code)


def test_a_suspend_image_of_xenserver(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "in"
    path.write_bytes(v.SUSPENDED)
    assert "complete" in command("verify", path).out
    assert "file_header kind=xenserver bytes=16" in command("inspect", path, "--chunks").out
    ran = command("convert", path, tmp_path / "out", "--to", "xen-v2", "--libxl")
    assert ran.code == 0
    assert "configuration (xenserver, 16 bytes)" in ran.err and "VARSTORED record (9 bytes)" in ran.err
    (held,) = read_checkpoints(tmp_path / "out")
    assert (held.memory.tobytes(), held.device_state) == (v.MEMORY["hvm"][0], b"QEVM state")
