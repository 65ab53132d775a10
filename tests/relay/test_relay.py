"""`remus-ckpt convert`, on streams put together by hand: every format, what is lost, cuts, pipes, bounded memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import streams as s
import v2_streams as v
from support import Command

from remus_ckpt.files import read_checkpoints
from remus_ckpt.limits import MIB
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.relay.output import scratch_beside
from remus_ckpt.store.room import SHARED_MEMORY
from remus_ckpt.wire.xen import physmap

FORMATS = ("remus", "xen", "xen-v2", "raw", "elf", "lime")
STREAMS = ("remus", "xen", "xen-v2")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def memories(path: Path) -> list[bytes]:
    return [checkpoint.image.tobytes() for checkpoint in read_checkpoints(path)]


def verified(command: Command, path: Path) -> dict[str, Any]:
    ran = command("verify", path, "--hash", "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def ranges(kind: str, data: bytes) -> dict[int, bytes]:
    """The ranges of memory in an ELF core or a LiME file, by address, read as the format says."""
    found = {}
    if kind == "lime":
        at = 0
        while at < len(data):
            magic, version, first, last, reserved = struct.unpack_from("<2I3Q", data, at)
            assert (magic, version, reserved) == (0x4C694D45, 1, 0)
            found[first] = data[at + 32 : at + 33 + last - first]
            at += 33 + last - first
        return found
    assert data.startswith(b"\x7fELF\2\1\1") and struct.unpack_from("<HH", data, 16) == (4, 62)
    begin, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for number in range(count):
        kind_, _, offset, virtual, physical, in_file, in_memory, _ = struct.unpack_from(
            "<2I6Q", data, begin + number * size
        )
        if kind_ == 4:  # PT_NOTE
            continue
        assert kind_ == 1 and virtual == physical and in_file == in_memory and offset % PAGE_SIZE == 0
        found[physical] = data[offset : offset + in_file]
    return found


@pytest.mark.parametrize("name", v.ALL)
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_holds_the_memory(name: str, to: str, tmp_path: Path, command: Command) -> None:
    source, target = write(tmp_path / "in", v.ALL[name]), tmp_path / "out"
    ran = command("convert", source, target, "--to", to)
    assert ran.code == 0, ran.err
    assert target.stat().st_mode & 0o777 == 0o600
    wanted = v.MEMORY[name]
    if to in STREAMS:
        assert memories(target) == wanted
        assert verified(command, target)["complete"]
    elif to == "raw":
        assert target.read_bytes() == wanted[-1]
    else:
        found = ranges(to, target.read_bytes())
        absent = {"pv": {2, 3, 5}, "hvm": {2, 4, 5}, "libxl": {2, 4, 5}}.get(name, {4, 5})
        pages = {start // PAGE_SIZE + at for start, data in found.items() for at in range(len(data) // PAGE_SIZE)}
        assert pages == set(range(6)) - absent
        for start, data in found.items():
            assert data == wanted[-1][start : start + len(data)]


@pytest.mark.parametrize("to", STREAMS)
def test_one_checkpoint_of_several(to: str, tmp_path: Path, command: Command) -> None:
    source = write(tmp_path / "in", s.small_hvm(8))
    every = memories(source)
    assert len(every) == 3
    for number, wanted in enumerate(every):
        assert command("convert", source, tmp_path / "out", "--to", to, "--checkpoint", number, "--overwrite").code == 0
        assert memories(tmp_path / "out") == [wanted]
    ran = command("convert", source, tmp_path / "none", "--to", to, "--checkpoint", 3)
    assert ran.code == 1 and "no checkpoint 3" in ran.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("word", [4, 8])
def test_a_compressed_legacy_stream_goes_round_all_streams(word: int, tmp_path: Path, command: Command) -> None:
    last = write(tmp_path / "0", s.small_hvm(word))
    wanted = memories(last)
    for number, to in enumerate(("xen-v2", "xen", "remus", "xen-v2", "remus", "xen", "xen"), 1):
        assert command("convert", last, tmp_path / str(number), "--to", to).code == 0
        last = tmp_path / str(number)
        assert memories(last) == wanted
    assert command("convert", last, tmp_path / "raw", "--to", "raw").code == 0
    assert (tmp_path / "raw").read_bytes() == wanted[-1]


def test_what_the_stream_says_of_the_guest_goes_along(tmp_path: Path, command: Command) -> None:
    source = write(tmp_path / "in", v.LIBXL)
    names = ["x", "y", "z"]
    for before, name, to in zip(["in", *names], names, ("xen", "xen-v2", "xen-v2"), strict=False):
        options = ["--libxl"] if to == "xen-v2" else []
        ran = command("convert", tmp_path / before, tmp_path / name, "--to", to, *options)
        assert ran.code == 0, ran.err
        if to == "xen":
            for lost in ("PAE_ENABLED", "X86_CPUID_POLICY", "X86_MSR_POLICY", "0x80000042"):
                assert lost in ran.err
    (held,) = read_checkpoints(tmp_path / "z")
    (first,) = read_checkpoints(source)
    assert held.parameters == {"HVM_IDENT_PT": 0xFEFF}
    assert held.device_state == first.device_state == b"QEVM state"
    assert held.tail is not None and first.tail is not None
    assert held.tail.magic_pfns == first.tail.magic_pfns and held.tail.context == first.tail.context  # type: ignore[attr-defined]
    assert held.tsc is not None and first.tsc is not None and (held.tsc.mode, held.tsc.nsec) == (1, 3)
    chunks = json.loads(command("inspect", tmp_path / "z", "--chunks", "--json").out)["chunks"]
    assert next(row for row in chunks if row["event"] == "emulator_xenstore_data")["bytes"] > 40


def test_the_device_models_memory_is_said_in_both_forms() -> None:
    entry = struct.pack("<QQQI", 0xF0, 0xF000, 0x10, 4) + b"vga\0"
    keys = b"physmap/f0/start_addr\0f000\0physmap/f0/size\x0010\0physmap/f0/name\0vga\0"
    for word, padding in ((4, b""), (8, bytes(4))):
        toolstack = struct.pack("<II", 1, 1) + entry + padding
        assert physmap.to_xenstore(toolstack, word) == keys
        assert physmap.to_toolstack(keys, word) == toolstack
    assert physmap.to_xenstore(struct.pack("<II", 1, 0), 8) == b""
    for bad in (b"", b"\2", struct.pack("<II", 1, 1 << 31), struct.pack("<II", 1, 1) + entry, toolstack + b"x"):
        assert physmap.to_xenstore(bad, 8) is None
    for bad in (b"a\0", b"a\0b\0", keys[:-10], keys + b"x\0y\0", b"physmap/zz/size\x001\0"):
        assert physmap.to_toolstack(bad, 8) is None


LOST = {
    "remus": ["HVM context", "HVM parameters", "toolstack's data"],
    "xen": ["HVM parameter PAE_ENABLED", "X86_CPUID_POLICY"],
    "xen-v2": ["toolstack's data"],
    "raw": ["HVM context", "PAE_ENABLED", "device state"],
}


@pytest.mark.parametrize("to", LOST)
def test_what_is_lost_is_named_or_refused(to: str, tmp_path: Path, command: Command) -> None:
    source, target = write(tmp_path / "in", v.LIBXL), tmp_path / "out"
    ran = command("convert", source, target, "--to", to, "--strict")
    assert ran.code == 1 and "cannot hold" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    ran = command("convert", source, target, "--to", to, "--json")
    assert ran.code == 0
    for name in LOST[to]:
        assert ran.err.count(name) == 1
        assert any(name in lost for lost in json.loads(ran.out)["lost"])


def test_strict_takes_what_loses_nothing(tmp_path: Path, command: Command) -> None:
    stream = v.libxl_header() + v.record(v.LIBXC) + v.head() + v.HVM_PAGES + v.hvm_state() + v.record(v.END)
    stream += v.emulator(v.EMULATOR, b"QEVM") + v.record(v.LIBXL_END)
    ran = command("convert", write(tmp_path / "in", stream), tmp_path / "out", "--to", "xen-v2", "--libxl", "--strict")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out").read_bytes().count(b"LibxlFmt") == 1


def test_page_types_of_a_pv_guest_survive_in_xens_streams_only(tmp_path: Path, command: Command) -> None:
    source = write(tmp_path / "in", v.PV)
    assert command("convert", source, tmp_path / "xen", "--to", "xen").code == 0
    assert command("convert", tmp_path / "xen", tmp_path / "v2", "--to", "xen-v2").code == 0
    for name in ("xen", "v2"):
        chunks = json.loads(command("inspect", tmp_path / name, "--chunks", "--json").out)["chunks"]
        (batch,) = [row for row in chunks if row["event"] == "batch"]
        assert (batch["pfns"], batch["types"]) == ([0, 1, 4], [0, 1, 12])
    ran = command("convert", source, tmp_path / "ours", "--to", "remus")
    assert "page types (2 pages)" in ran.err


def test_the_size_of_memory_survives_a_hole_at_its_end(tmp_path: Path, command: Command) -> None:
    stream = s.hvm_header(8, 9) + s.batch(8, [s.entry(1)], s.page(3)) + s.LAST_CHECKPOINT + s.END + s.hvm_tail(b"c")
    source = write(tmp_path / "in", stream)
    assert command("convert", source, tmp_path / "v2", "--to", "xen-v2").code == 0
    assert memories(tmp_path / "v2") == [s.page(0) + s.page(3) + s.page(0) * 7]


@pytest.mark.parametrize("to", FORMATS)
def test_a_cut_or_damaged_stream_gives_its_last_good_checkpoint(to: str, tmp_path: Path, command: Command) -> None:
    data = s.small_hvm(8)
    source = write(tmp_path / "in", data)
    wanted = memories(source)
    ends = [checkpoint.end for checkpoint in read_checkpoints(source)]
    for name, damaged, code, count in (
        ("cut", data[: ends[1] + 7], 0, 2),
        ("damaged", data[: ends[1]] + struct.pack("<i", -99) + data[ends[1] :], 20, 2),
        ("first", data[: ends[0] - 5], 20, 0),
        ("empty", b"", 20, 0),
    ):
        bad, target = write(tmp_path / name, damaged), tmp_path / f"{name}.out"
        ran = command("convert", bad, target, "--to", to)
        assert ran.code == code, (name, ran.err)
        assert ran.err
        if not count:
            assert not target.exists()
        elif to in STREAMS:
            assert memories(target) == wanted[:count]
        else:
            data_ = target.read_bytes() if to == "raw" else b"".join(ranges(to, target.read_bytes()).values())
            assert data_ == wanted[1]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("to", FORMATS)
def test_pipes(to: str, tmp_path: Path, command: Command) -> None:
    source = write(tmp_path / "in", s.small_hvm(8))
    assert command("convert", source, tmp_path / "file", "--to", to).code == 0
    run = [sys.executable, "-m", "remus_ckpt", "convert", "-", "-", "--to", to]
    done = subprocess.run(run, input=source.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "file").read_bytes()


def test_an_existing_file_and_the_input_are_kept(tmp_path: Path, command: Command) -> None:
    source, target = write(tmp_path / "in", v.HVM), write(tmp_path / "out", b"mine")
    assert command("convert", source, target, "--to", "raw").code == 1
    assert command("convert", source, source, "--to", "raw", "--overwrite").code == 2
    assert (target.read_bytes(), source.read_bytes()) == (b"mine", v.HVM)
    assert command("convert", source, tmp_path / "none" / "out", "--to", "raw").code == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "raw", "--libxl"],
        ["--to", "raw", "--for", "xen"],
        ["--to", "elf", "--hvm-context", "f"],
        ["--to", "raw", "--page-codec", "rle"],
        ["--to", "remus", "--page-codec", "none"],
        ["--to", "raw", "--from", "virsh"],
    ],
)
def test_options_that_mean_nothing_are_refused(options: list[str], tmp_path: Path, command: Command) -> None:
    assert command("convert", write(tmp_path / "in", v.HVM), tmp_path / "out", *options).code == 2


def test_a_stream_of_ours_keeps_its_positions(tmp_path: Path, command: Command) -> None:
    images = [write(tmp_path / "a", os.urandom(5000)), write(tmp_path / "b", os.urandom(5000))]
    assert command("encode", *images, "-o", tmp_path / "in").code == 0
    assert command("convert", tmp_path / "in", tmp_path / "out", "--to", "remus", "--page-codec", "rle").code == 0
    first, second = (list(read_checkpoints(tmp_path / name)) for name in ("in", "out"))
    assert [one.record.after for one in first if one.record] == [one.record.after for one in second if one.record]
    assert [one.memory_bytes for one in second] == [5000, 5000]
    assert memories(tmp_path / "out") == [path.read_bytes() for path in images]


def test_a_temporary_file_is_beside_the_output(tmp_path: Path) -> None:
    """Under /dev there is more than devices: /dev/shm is a file system, and the one where there is room."""
    for folder in (tmp_path, SHARED_MEMORY):
        output = folder / f"remus-ckpt-{os.getpid()}"
        with scratch_beside(str(output)) as scratch:
            assert Path(os.readlink(scratch)).parent == folder
    for output in ("-", "/dev/null"):
        with scratch_beside(output) as scratch:
            assert Path(os.readlink(scratch)).parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize(
    ("source", "to"),
    [
        *(("remus", to) for to in ("raw", "xen-v2")),
        ("qemu", "remus"),
        ("raw", "remus"),
        ("raw", "qemu"),
        ("raw", "mapped-ram"),
        *(pytest.param("remus", to, marks=pytest.mark.slow) for to in ("elf", "lime", "remus", "xen")),
        *(pytest.param("qemu", to, marks=pytest.mark.slow) for to in ("xen-v2", "mapped-ram")),
    ],
)
def test_memory_is_bounded_and_files_are_sparse(source: str, to: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(768 * MIB)
        for at in range(0, 768 * MIB, 8 * MIB):
            file.seek(at)
            file.write(os.urandom(16 * PAGE_SIZE))
    run = [sys.executable, "-m", "remus_ckpt"]
    made = image if source == "raw" else tmp_path / "in"
    if source != "raw":
        into = [*run, "convert", image, made, "--from", "raw", "--to", source]
        subprocess.run(into, check=True, capture_output=True)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, (300 << 20,) * 2); "
    code = limit + "sys.argv[0] = 'remus-ckpt'; runpy.run_module('remus_ckpt', run_name='__main__')"
    command = [sys.executable, "-c", code, "convert", made, tmp_path / "out", "--from", source, "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if (source, to) != ("qemu", "xen-v2"):  # there, pages of zeros that came are carried
        used = (tmp_path / "out").stat().st_blocks * 512
        assert used < 32 * MIB
    if to == "raw":
        assert subprocess.run(["cmp", image, tmp_path / "out"], check=False).returncode == 0
