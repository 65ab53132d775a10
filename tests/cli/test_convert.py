"""`convert`: the same bytes at the same addresses, whatever the format, and what is lost is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from qemu_support import GOOD, needs_qemu, real_files, row_of, tool, unpacked
from shared import XEN, XEN_IDS, needs_xen, xen_manifest, xen_stream
from support import Command

from remus_ckpt.image import elf
from remus_ckpt.image.ranges import AARCH64, Range, layout_of, placed, present
from remus_ckpt.limits import GIB, MIB
from remus_ckpt.wire.formats import DUMP_WORDS

MEMORY = tool.pattern(1) + bytes(4096) + b"\xaa" * 4096 + tool.pattern(2)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def elf_segments(data: bytes) -> dict[int, bytes]:
    """The contents of a core by physical address, read by hand."""
    assert data[:7] == b"\x7fELF\2\1\1"
    kind, _, _, _, at, sections = struct.unpack_from("<2HI3Q", data, 16)
    size, count = struct.unpack_from("<2H", data, 54)
    assert (kind, size) == (4, 56)
    if count == 0xFFFF:
        (count,) = struct.unpack_from("<I", data, sections + 44)
    found = {}
    for number in range(count):
        type_, _, offset, virtual, physical, in_file, in_memory, align = struct.unpack_from(
            "<2I6Q", data, at + 56 * number
        )
        if type_ == 1:
            assert virtual == physical
            assert in_file == in_memory
            assert offset % align == physical % align
            found[physical] = data[offset : offset + in_file]
    return found


def lime_ranges(data: bytes) -> dict[int, bytes]:
    """The contents of a LiME file by address, read by hand."""
    found, at = {}, 0
    while at < len(data):
        magic, version, first, last, reserved = struct.unpack_from("<2I3Q", data, at)
        assert (magic, version, reserved) == (0x4C694D45, 1, 0)
        at += 32
        found[first] = data[at : at + last - first + 1]
        at += last - first + 1
    assert at == len(data)
    return found


def holey(folder: Path, machine: str = "pc-q35-10.0", size: int = 4096) -> str:
    """A guest of whose six pages the third and the fourth never came."""
    stream = tool.Stream(machine=machine)
    stream.memory({"ram": 6 * size})
    stream.part()
    stream.page(0, tool.pattern(1, size), block="ram")
    stream.page(size, b"\0", tool.ZERO)
    stream.page(4 * size, tool.pattern(2, size))
    stream.page(5 * size, b"\x33", tool.ZERO)
    stream.eos()
    path = folder / "holey"
    path.write_bytes(tool.finished(stream, page_size=size))
    return str(path)


@pytest.mark.parametrize(
    ("machine", "base", "size"), [("pc-q35-10.0", 0, 4096), ("virt-10.0", GIB, 4096), ("versatilepb", 0, 1024)]
)
def test_runs_of_pages_at_their_addresses(machine: str, base: int, size: int, tmp_path: Path, command: Command) -> None:
    expected = {
        base: tool.pattern(1, size) + bytes(size),
        base + 4 * size: tool.pattern(2, size) + b"\x33" * size,
    }
    path = holey(tmp_path, machine, size)
    for to, read in (("elf", elf_segments), ("lime", lime_ranges)):
        ran = command("convert", path, tmp_path / to, "--to", to, "--json")
        assert ran.code == 0
        found = json.loads(ran.out)
        data = (tmp_path / to).read_bytes()
        assert read(data) == expected
        assert (found["runs"], found["bytes"], found["format"]) == (2, len(data), "qemu")
        assert len(found["lost"]) == 1
        assert "device state" in ran.err
        assert (tmp_path / to).stat().st_mode & 0o777 == 0o600
        assert command.binary("convert", path, "-", "--to", to)[1] == data
    assert list(tmp_path.glob(".remus*")) == []


def test_each_format_of_each_input(tmp_path: Path, command: Command) -> None:
    (plain,) = unpacked("plain", tmp_path)
    command("convert", plain, tmp_path / "raw", "--to", "raw")
    assert (tmp_path / "raw").read_bytes() == MEMORY
    ran = command("convert", plain, tmp_path / "remus", "--to", "remus")
    assert (ran.code, "vector.rom" in ran.err, "device state" in ran.err) == (0, True, False)
    (checkpoint,) = json.loads(command("verify", tmp_path / "remus", "--hash", "--json").out)["checkpoints"]
    assert checkpoint["memory_sha256"] == hashlib.sha256(MEMORY).hexdigest()
    command("restore", tmp_path / "remus", "-o", tmp_path / "image", "--device-state", tmp_path / "state")
    assert (tmp_path / "state").read_bytes()[5:11] == b"\5timer"

    ran = command("convert", tmp_path / "remus", tmp_path / "elf", "--to", "elf", "--from", "remus")
    assert ran.code == 0
    assert b"".join(elf_segments((tmp_path / "elf").read_bytes()).values()) == tool.pattern(1) + MEMORY[8192:]
    ran = command("convert", tmp_path / "raw", tmp_path / "lime", "--to", "lime", "--from", "raw", "--strict")
    assert (ran.code, ran.err) == (0, "")
    assert lime_ranges((tmp_path / "lime").read_bytes()) == {0: MEMORY}
    (image,) = unpacked("qcow2-second", tmp_path)
    assert command("convert", image, tmp_path / "snap", "--to", "raw", "--snapshot", "second").code == 0
    assert (tmp_path / "snap").read_bytes()[:4096] == tool.pattern(8)
    files = unpacked("multifd-none", tmp_path)
    assert command("convert", *files, tmp_path / "multi", "--to", "raw").code == 0
    assert (tmp_path / "multi").read_bytes()[:4096] == tool.pattern(3)


def test_nothing_is_lost_in_silence(tmp_path: Path, command: Command) -> None:
    (plain,) = unpacked("plain", tmp_path)
    ran = command("convert", plain, tmp_path / "out", "--to", "raw", "--strict")
    assert ran.code == 1
    assert "vector.rom" in ran.err
    assert "device state" in ran.err
    assert not (tmp_path / "out").exists()
    for arguments, code in (
        ((plain, tmp_path / "out", "--to", "raw", "--from", "xen"), 1),
        ((plain, "--to", "raw"), 2),
        ((plain, plain, "--to", "raw"), 2),
        ((plain, tmp_path / "no" / "out", "--to", "raw"), 1),
        ((tmp_path / "missing", tmp_path / "out", "--to", "raw"), 1),
        ((plain, tmp_path / "out", "--to", "raw", "--block", "other"), 1),
    ):
        assert command("convert", *arguments).code == code, arguments
        assert not (tmp_path / "out").exists()
    (cut,) = unpacked("cut-between-parts", tmp_path)
    ran = command("convert", cut, tmp_path / "out", "--to", "raw")
    assert ran.code == 20
    assert "not whole" in ran.err
    assert (tmp_path / "out").read_bytes() == MEMORY
    assert command("convert", plain, tmp_path / "out", "--to", "raw").code == 1  # it is there
    assert command("convert", plain, tmp_path / "out", "--to", "raw", "--overwrite").code == 0
    assert list(tmp_path.glob(".remus*")) == []


def named(command: Command, path: object, output: Path, to: str) -> list[str]:
    """What is named as lost; --strict refuses it."""
    how = ["--to", to, *(["--from", "raw"] if Path(str(path)).name == "raw" else [])]
    ran = command("convert", path, output, *how, "--json")
    assert ran.code == 0
    lost: list[str] = json.loads(ran.out)["lost"]
    again = command("convert", path, output, *how, "--strict", "--overwrite")
    assert (again.code, bool(again.err)) == (int(bool(lost)), bool(lost))
    for one in lost:
        assert one in ran.err and one in again.err
    return lost


def test_where_memory_ends_and_what_never_came_is_said(tmp_path: Path, command: Command) -> None:
    """Of the formats, some state how large memory is, some to the byte, and some which pages there are."""
    raw = tmp_path / "raw"
    raw.write_bytes(tool.pattern(1) + bytes(3 * 4096) + b"tail")
    within = "the end of memory within its last page (16,388 bytes)"
    for to in ("raw", "elf", "lime", "remus"):
        assert named(command, raw, tmp_path / f"1-{to}", to) == []
    for to in ("qemu", "mapped-ram", "xen", "xen-v2"):
        assert within.removeprefix("the ") in " ".join(named(command, raw, tmp_path / f"1-{to}", to))
    assert named(command, tmp_path / "1-remus", tmp_path / "2-lime", "lime") == []
    raw.write_bytes(tool.pattern(1) + bytes(3 * 4096))
    assert command("convert", raw, tmp_path / "ours", "--to", "remus", "--from", "raw").code == 0
    for to in ("elf", "lime"):
        (lost,) = named(command, tmp_path / "ours", tmp_path / f"3-{to}", to)
        assert lost == "the memory's size (16,384 bytes, of which the last 12,288 never came)"
    for to in ("raw", "qemu", "mapped-ram", "remus"):
        assert named(command, tmp_path / "ours", tmp_path / f"3-{to}", to) == []
    # A dump with a hole.
    hole = "that 2 pages of memory never came"
    for to in ("elf", "lime"):
        assert command("convert", holey(tmp_path), tmp_path / f"hole-{to}", "--to", to).code == 0
        for then in ("elf", "lime", "qemu"):
            assert named(command, tmp_path / f"hole-{to}", tmp_path / f"{to}-{then}", then) == []
        for then in ("raw", "remus", "mapped-ram"):
            assert named(command, tmp_path / f"hole-{to}", tmp_path / f"{to}-{then}", then) == [hole]


def test_pages_of_zeros_are_holes(tmp_path: Path, command: Command) -> None:
    size = 64 * MIB
    stream = tool.Stream()
    stream.memory({"ram": size})
    stream.part()
    stream.page(0, b"\0", tool.ZERO, "ram")
    for at in range(4096, size, 4096):
        stream.page(at, b"\0", tool.ZERO)
    stream.page(size - 4096, tool.pattern(1))
    stream.eos()
    path = tmp_path / "it"
    path.write_bytes(tool.finished(stream))
    for to in ("raw", "elf", "lime"):
        assert command("convert", path, tmp_path / to, "--to", to).code == 0
        assert (tmp_path / to).stat().st_size >= size
        assert (tmp_path / to).stat().st_blocks * 512 < MIB


def test_where_large_memory_lies() -> None:
    def ranges(machine: str, size: int) -> list[tuple[int, int, int]]:
        return [tuple(one) for one in placed(size, layout_of(machine))]

    assert ranges("pc-i440fx-10.0", 3 * GIB) == [(0, 0, 3 * GIB)]
    assert ranges("pc-i440fx-10.0", 4 * GIB) == [(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 4 * GIB)]
    assert ranges("pc-q35-7.2", 2 * GIB) == [(0, 0, 2 * GIB)]
    assert ranges("pc-q35-7.2", 3 * GIB) == [(0, 0, 2 * GIB), (4 * GIB, 2 * GIB, 3 * GIB)]
    assert ranges("virt-9.2", GIB) == [(GIB, 0, GIB)]
    assert layout_of("virt-9.2").elf_machine == AARCH64  # type: ignore[union-attr]
    assert layout_of("another") is None
    came = np.ones(1024, dtype=bool)
    came[[0, 1000]] = False
    runs = list(present(came, 4 * MIB, placed(4 * GIB, layout_of("pc-i440fx-1"))))
    assert runs == [
        Range(4 * MIB, 4 * MIB, 3 * GIB),
        Range(4 * GIB, 3 * GIB, 1000 * 4 * MIB),
        Range(4 * GIB + 1001 * 4 * MIB - 3 * GIB, 1001 * 4 * MIB, 4 * GIB),
    ]


def test_more_segments_than_their_number_has_bits() -> None:
    runs = [Range(at * 8192, at * 8192, at * 8192 + 4096) for at in range(70_000)]
    head = bytes(next(iter(elf.core(runs, 62))))
    assert struct.unpack_from("<H", head, 56) == (0xFFFF,)
    (sections,) = struct.unpack_from("<Q", head, 40)
    assert struct.unpack_from("<I", head, sections + 44) == (70_001,)
    assert len(head) % 4096 == 0


@needs_xen
@pytest.mark.parametrize("name", ["remus-rle", "pv-plain", "n-hvm-vcpus130"])
def test_real_streams_of_xen(name: str, tmp_path: Path, command: Command) -> None:
    row = xen_manifest()[name]
    ran = command("convert", XEN / row["file"], tmp_path / "raw", "--to", "raw")
    assert ran.code == 0
    assert "cannot hold" in ran.err
    memory = (tmp_path / "raw").read_bytes()[: row["pages"] * 4096]
    assert hashlib.sha256(memory).hexdigest() == row["memory_sha256"][-1]
    ran = command("convert", XEN / row["file"], tmp_path / "elf", "--to", "elf", "--from", "xen")
    assert ran.code == 0
    for address, data in elf_segments((tmp_path / "elf").read_bytes()).items():
        inside = memory[address : address + len(data)]
        assert data[: len(inside)] == inside


@pytest.mark.slow
@needs_xen
@pytest.mark.parametrize("name", XEN_IDS)
def test_round_trips_of_real_streams(name: str, tmp_path: Path, command: Command) -> None:
    """Each checkpoint goes from Xen to QEMU and back, to today's Xen, and to an image, and is the same memory."""
    row = xen_manifest()[name]
    (tmp_path / "xen").write_bytes(xen_stream(name))
    wanted = row["memory_sha256"]
    for number in range(len(wanted)):
        source, chosen = "xen", ["--checkpoint", number]
        for to in ("qemu", "xen", "xen-v2", "mapped-ram", "xen-v2", "raw"):
            target = f"{source}-{to}"
            ran = command("convert", tmp_path / source, tmp_path / target, "--to", to, *chosen)
            assert ran.code == 0, ran.err
            source, chosen = target, []
        memory = (tmp_path / source).read_bytes()
        size = row["pages"] * 4096
        assert hashlib.sha256(memory[:size]).hexdigest() == wanted[number]
        assert not memory[size:].strip(b"\0")
        for path in tmp_path.glob("xen-*"):
            path.unlink()


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
def test_gdb_opens_a_core(tmp_path: Path, command: Command) -> None:
    command("convert", holey(tmp_path), tmp_path / "core", "--to", "elf")
    ran = subprocess.run(
        ["gdb", "-nx", "-batch", "-core", tmp_path / "core", "-ex", "x/2xw 0x4000", "-ex", "x/1xb 0x2000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    first, second = struct.unpack_from("<2I", tool.pattern(2))
    assert f"0x4000:\t{first:#010x}\t{second:#010x}" in ran.stdout
    assert "Cannot access memory at address 0x2000" in ran.stdout + ran.stderr


# Whole machines

WHOLE = [row["id"] for row in GOOD if row.get("whole") and "missing" not in row and row["format"] not in DUMP_WORDS]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("to", ["qemu", "mapped-ram"])
def test_a_whole_machine_and_back(name: str, to: str, tmp_path: Path, command: Command) -> None:
    row = row_of(name)
    files = unpacked(name, tmp_path)
    arguments = row.get("arguments", [])
    ran = command("convert", *files, tmp_path / "ours", "--to", to, *arguments)
    if to == "mapped-ram" and name == "told-page-size":
        assert ran.code == 1  # it has no configuration that could say so
        return
    assert ran.code == 0
    is_lossy = to == "mapped-ram" and "not_in_stream" in row  # what is shared would become zeros
    lost = row["format"] == "virsh-save" or is_lossy or not row["complete"]
    assert ("cannot hold" in ran.err) == lost
    assert (ran.err == "") != (lost or "trailing_bytes" in row)
    arguments = [one for one in arguments if not one.startswith("--snap") and one not in ("first", "2")]
    ran = command("verify", tmp_path / "ours", "--hash", "--json", *arguments)
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    (checkpoint,) = found["checkpoints"]
    assert found["complete"]
    assert found["format"] == to
    for block, known in row["blocks"].items():
        assert checkpoint["blocks"][block] == known
    first, second = (json.loads(command("inspect", *each, *args, "--json").out) for each, args in (
        (files, row.get("arguments", [])), ([tmp_path / "ours"], arguments)
    ))  # fmt: skip
    if "devices" in first and first["devices"] is not None:
        names = [[(one["name"], one["instance"], one["size"]) for one in each["devices"]] for each in (first, second)]
        assert names[0] == names[1]


@needs_qemu
@pytest.mark.parametrize("name", ["aarch64-10", "arm10-1k", "ignore-shared72"])
def test_of_a_stopped_guest_we_write_what_qemu_has_written(name: str, tmp_path: Path, command: Command) -> None:
    (path,) = real_files(name, tmp_path)
    assert command("convert", path, tmp_path / "ours", "--to", "qemu", "--strict").code == 0
    assert (tmp_path / "ours").read_bytes() == Path(path).read_bytes()


def test_memory_that_is_no_machine_as_one(tmp_path: Path, command: Command) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(MEMORY + b"tail")
    for to in ("qemu", "mapped-ram"):
        ran = command("convert", raw, tmp_path / to, "--to", to, "--from", "raw")
        assert ran.code == 0
        (checkpoint,) = json.loads(command("verify", tmp_path / to, "--json").out)["checkpoints"]
        assert checkpoint["blocks"] == {"pc.ram": {"bytes": 5 * 4096}}
        assert command.binary("extract", tmp_path / to, "--pfn", "0-4")[1] == (MEMORY + b"tail").ljust(5 * 4096, b"\0")
    assert command("convert", raw, tmp_path / "x", "--to", "qemu", "--from", "raw", "--block", "a").code == 2
    (plain,) = unpacked("plain", tmp_path)
    assert command("convert", plain, tmp_path / "x", "--to", "qemu", "--block", "ram").code == 1


def test_a_mapped_ram_file_lies_as_qemu_would_have_it(tmp_path: Path, command: Command) -> None:
    (plain,) = unpacked("plain", tmp_path)
    command("convert", plain, tmp_path / "mapped", "--to", "mapped-ram")
    data = (tmp_path / "mapped").read_bytes()
    at = data.index(b"\3ram" + struct.pack(">QIQ", 4 * 4096, 1, 4096)) + 12
    bitmap, pages = struct.unpack_from(">2Q", data, at + 12)
    assert bitmap == at + 28
    assert pages == MIB
    assert data[bitmap] == 0b1101  # the second page is zeros
    assert data[pages : pages + len(MEMORY)] == MEMORY
    second = data.index(b"\x0avector.rom", pages)
    assert second == pages + len(MEMORY)
    assert (tmp_path / "mapped").stat().st_blocks * 512 < MIB
