"""Machines in files: wherever a file is cut or changed there is a result or an error of ours, bounded in time."""

from __future__ import annotations

import io
import lzma
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import many
from qemu_support import GOOD, contents, row_of, tool, unpacked, zeros_but

from remus_ckpt.blocks import Blocks, is_device
from remus_ckpt.errors import Malformed, NoCheckpoint, RemusError, StreamError, UnknownFormat
from remus_ckpt.files import StreamFile
from remus_ckpt.image_file import ImageFile
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.machines import Machine
from remus_ckpt.restorer import Anonymous
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.reader import Reader


def read(files: list[str], **more: Any) -> Machine:
    home = more.pop("home", lambda _: Anonymous())
    with Machine(StreamFile(files[0]), files[1:], home=home, **more) as machine:
        machine.read()
    return machine


def known(row: dict[str, Any]) -> dict[str, Any]:
    arguments = row.get("arguments", [])
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return {
        "snapshot": pairs.get("--snapshot"),
        "page_size": int(pairs["--page-size"]) if "--page-size" in pairs else None,
    }


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row["id"])
def test_cut_anywhere_and_changed_anywhere(row: dict[str, Any], tmp_path: Path) -> None:
    files = unpacked(row["id"], tmp_path)
    chance = random.Random(row["id"])
    for number in range(many(40, 300)):
        at = chance.randrange(len(files))
        data = bytearray(contents(row["id"])[at])
        if number % 6:
            data[chance.choice((chance.randrange(len(data)), chance.randrange(min(len(data), 300))))] ^= (
                1 << chance.randrange(8)
            )
        else:
            data = data[: chance.randrange(len(data))]
        path = tmp_path / "changed"
        path.write_bytes(data)
        names = [*files[:at], str(path), *files[at + 1 :]]
        began = time.monotonic()
        try:
            machine = read(names, limits=Limits(memory_bytes=64 * MIB), **known(row))
        except RemusError:
            continue
        assert time.monotonic() - began < 10
        assert machine.error is None or isinstance(machine.error, StreamError)
        assert machine.error is not None or machine.end is not None or machine.cut is not None


@pytest.mark.parametrize("row", [row for row in GOOD if row.get("whole")], ids=lambda row: row["id"])
def test_memory_in_a_file_is_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the page size: pages larger and smaller than the file's go through other code."""
    files = unpacked(row["id"], tmp_path)
    homes: dict[str, ImageFile] = {}

    def home(block: events.RamBlock) -> ImageFile:
        homes[block.name] = ImageFile(tmp_path / f"image-{len(homes)}")
        return homes[block.name]

    machine = read(files, home=home, **known(row))
    for name, block in row["blocks"].items():
        held = machine.blocks.named[name]
        assert held.sha256() == block["sha256"]
        homes[name].cut(block["bytes"])
        path = homes[name].path
        assert path is not None
        assert path.read_bytes() == held.image.tobytes()
        homes[name].close()


def test_in_a_compressed_file_and_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("plain")
    (data,) = contents("plain")
    path = tmp_path / "it"
    for pack in (lzma.compress, zstandard.compress):
        path.write_bytes(pack(data))
        machine = read([str(path)])
        assert machine.is_complete
        assert machine.blocks.named["ram"].sha256() == row["blocks"]["ram"]["sha256"]
    path.write_bytes(lzma.compress(data)[:-2000])
    machine = read([str(path)])
    assert not machine.is_complete
    path.write_bytes(lzma.compress(contents("virsh-gzip")[0]))
    assert read([str(path)]).is_complete
    path.write_bytes(data)
    with open(path, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert read(["-"]).is_complete


def test_a_compressed_qcow2_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(lzma.compress(contents("qcow2-first")[0]))
    machine = read([str(path)], snapshot="first")
    assert isinstance(machine.error, UnknownFormat)
    assert machine.error.section == "formats.md §4"


def test_channels_in_any_order_and_one_missing(tmp_path: Path) -> None:
    row = row_of("multifd-none")
    main, one, other = unpacked("multifd-none", tmp_path)
    for names in ([main, one, other], [main, other, one]):
        machine = read(names)
        assert machine.is_complete
        assert machine.blocks.named["ram"].sha256() == row["blocks"]["ram"]["sha256"]
    missing = read([main, one])
    assert missing.blocks.missing == {"ram": 3}
    assert isinstance(read([main, one, main]).error, UnknownFormat)


def test_zstd_channels(tmp_path: Path) -> None:
    """One compressed stream for the whole channel, flushed behind each packet."""
    stream = tool.Stream(machine="pc-i440fx-7.2")
    stream.start()
    stream.blocks({"ram": 8192})
    stream.eos()
    stream.part()
    stream.eos()
    squeeze = zstandard.ZstdCompressor(level=1).compressobj()

    def packed(data: bytes) -> bytes:
        return squeeze.compress(data) + squeeze.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    first, second = tool.pattern(1), tool.pattern(2)
    channel = tool.hello(0) + tool.packet(0, flags=tool.SYNC)
    channel += tool.packet(1, "ram", (0,), packed(first), flags=tool.ZSTD)
    channel += tool.packet(2, "ram", (4096,), packed(second), flags=tool.ZSTD | tool.SYNC)
    channel += tool.packet(3, flags=tool.SYNC)
    paths = []
    for name, data in (("main", tool.finished(stream)), ("channel", channel)):
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_bytes(data)
    machine = read(paths)
    assert machine.error is None
    assert machine.is_complete
    assert machine.blocks.named["ram"].image.tobytes() == first + second


def test_a_packet_that_grows_is_refused_before_it_has_grown(tmp_path: Path) -> None:
    """A page's worth of data that decompress to a gigabyte."""
    bomb = zstandard.compress(bytes(1 << 30))
    assert len(bomb) < MIB
    stream = tool.Stream()
    stream.start()
    stream.blocks({"ram": 8192})
    stream.put(tool.u64(tool.FLUSH))
    paths = []
    for name, data in (
        ("main", tool.finished(stream)),
        ("channel", tool.hello(0) + tool.packet(1, "ram", (0,), bomb, flags=tool.ZSTD | tool.SYNC)),
    ):
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_bytes(data)
    machine = read(paths)
    assert isinstance(machine.error, Malformed)


@pytest.mark.parametrize(
    ("snapshot", "states", "words"),
    [
        (None, {"a": b"QEVM", "b": b"QEVM"}, "a, b"),
        (None, {"disk": b""}, "no snapshot"),
        ("c", {"a": b"QEVM"}, "no snapshot 'c'"),
        ("disk", {"a": b"QEVM", "disk": b""}, "only the disk"),
    ],
)
def test_a_snapshot_that_is_not_there(
    snapshot: str | None, states: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "it.qcow2"
    path.write_bytes(tool.qcow2(states))
    with pytest.raises(NoCheckpoint, match=words):
        read([str(path)], snapshot=snapshot)


def test_what_is_the_guests_memory() -> None:
    memory = ["ram", "pc.ram", "mach-virt.ram", "node0", "/objects/mem1", "ppc_spapr.ram"]
    devices = ["pc.bios", "pc.rom", "0000:00:02.0/vga.vram", "/rom@etc/acpi/tables", "virt.flash0", "versatile.flash"]
    assert [name for name in memory + devices if not is_device(name)] == memory


def test_an_encoded_page_is_checked_before_memory_is_touched() -> None:
    stream, _ = tool.simple()
    stream.part()
    stream.page(0, tool.pattern(1), block="ram")
    stream.eos()
    stream.part()
    stream.encoded(0, b"\0\1\x55", "ram")
    stream.encoded(4096, b"\0\1\x55\0\0\0")
    stream.eos()
    reader = Reader()
    blocks = Blocks(lambda _: Anonymous(), reader.fail)
    reader.feed(bytes(stream.data))
    with pytest.raises(Malformed) as caught:
        while (event := reader.next_event()) is not None:
            blocks.take(event)
    assert caught.value.offset == len(stream.data) - 13 - 3
    assert np.array_equal(blocks.named["ram"].memory, zeros_but(4, p0=tool.pattern(1)))
    with pytest.raises(Malformed):
        reader.next_event()
