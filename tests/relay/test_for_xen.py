"""Streams that a real Xen starts: what they must have (specs/formats.md §5), from each command that writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_support import fill, memory_at
from support import Command

from remus_ckpt.files import StreamFile, read_checkpoints, read_events
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.restorer import Restorer
from remus_ckpt.store import Store
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import Signature
from remus_ckpt.xen_start import EMPTY_CONTEXT, EMPTY_DEVICE_STATE

PAGES = 40


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    first = bytearray(os.urandom(10 * PAGE_SIZE) + bytes(20 * PAGE_SIZE) + os.urandom(10 * PAGE_SIZE))
    second = bytearray(first)
    second[5] ^= 1
    second[15 * PAGE_SIZE] = 7
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, data in zip(paths, (first, second), strict=True):
        path.write_bytes(data)
    return paths


def check(path: Path, wanted: list[bytes], context: bytes = EMPTY_CONTEXT) -> list[events.Event]:
    """What Xen needs is there, and memory is right even if fresh pages are not zeros."""
    found: list[events.Event] = []
    restorer = Restorer(strict=True)
    memory = np.full((PAGES + 3, PAGE_SIZE), 0xC2, dtype=np.uint8)
    seen = np.zeros(PAGES + 3, dtype=bool)
    memories = []
    with StreamFile(path) as file:
        for event in read_events(file, restorer):
            found.append(event)
            if isinstance(event, events.Batch) and event.data is not None and not restorer.in_force:
                memory[event.pfns.astype(np.int64)] = event.data
                seen[event.pfns.astype(np.int64)] = True
            if isinstance(event, events.TailHvm):
                assert sorted(event.magic_pfns) == [PAGES, PAGES + 1, PAGES + 2]
                assert event.context == context
                assert (event.signature, event.record) == (Signature.XL, None)
                assert event.device_state == EMPTY_DEVICE_STATE
            if restorer.staged is not None:
                memories.append(restorer.commit().memory[:PAGES].tobytes())
                if len(memories) == 1:
                    assert seen.all()
                    assert memory[:PAGES].tobytes() == wanted[0]
    assert memories == wanted
    assert restorer.dialect.codec in ("rle", None)
    return found


def test_encode_one_and_several(images: list[Path], tmp_path: Path, command: Command) -> None:
    context = tmp_path / "context"
    context.write_bytes(b"a real one")
    ran = command("encode", *images, "-o", tmp_path / "out", "--for", "xen", "--hvm-context", context)
    assert ran.code == 0 and "HVM context" not in ran.err
    kinds = [type(event) for event in check(tmp_path / "out", [path.read_bytes() for path in images], b"a real one")]
    assert events.EnableCompression in kinds and events.LastCheckpoint not in kinds
    ran = command("encode", images[0], "-o", tmp_path / "one", "--for", "xen")
    assert ran.code == 0 and "--hvm-context" in ran.err
    kinds = [type(event) for event in check(tmp_path / "one", [images[0].read_bytes()])]
    assert events.LastCheckpoint in kinds and events.EnableCompression not in kinds


def test_convert_writes_what_encode_does(images: list[Path], tmp_path: Path, command: Command) -> None:
    assert command("encode", *images, "-o", tmp_path / "ours").code == 0
    assert command("convert", tmp_path / "ours", tmp_path / "out", "--to", "xen", "--for", "xen").code == 0
    check(tmp_path / "out", [path.read_bytes() for path in images])
    assert command("convert", tmp_path / "out", tmp_path / "again", "--to", "xen", "--for", "xen").code == 0
    check(tmp_path / "again", [path.read_bytes() for path in images])
    assert command("convert", tmp_path / "ours", tmp_path / "v2", "--to", "xen-v2", "--for", "xen").code == 0
    found = [checkpoint.memory for checkpoint in read_checkpoints(tmp_path / "v2")]
    assert len(found[-1]) == PAGES + 3
    last = list(read_checkpoints(tmp_path / "v2"))[-1]
    assert isinstance(last.tail, events.TailHvm) and sorted(last.tail.magic_pfns) == [PAGES, PAGES + 1, PAGES + 2]


def test_record(tmp_path: Path, command: Command) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(os.urandom(PAGES * PAGE_SIZE))
    code = "import mmap, sys, time\nf = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0)\n"
    code += "print('up', flush=True)\nfor i in range(10 ** 9): m[4096 * (i % 3)] = i % 251; time.sleep(0.001)"
    with subprocess.Popen([sys.executable, "-c", code, memory], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "up\n"
            options = ["--interval", "20ms", "--duration", "300ms", "--for", "xen"]
            ran = command("record", memory, "--pid", writer.pid, "-o", tmp_path / "out", *options)
        finally:
            writer.kill()
    assert ran.code == 0, ran.err
    wanted = [checkpoint.memory[:PAGES].tobytes() for checkpoint in read_checkpoints(tmp_path / "out")]
    assert len(wanted) > 1
    check(tmp_path / "out", wanted)


@pytest.mark.parametrize("name", ["encode", "record", "export"])
def test_what_contradicts_it_is_refused(name: str, images: list[Path], tmp_path: Path, command: Command) -> None:
    context = tmp_path / "context"
    context.write_bytes(b"c")
    first = {
        "encode": ["encode", images[0]],
        "record": ["record", images[0], "--pid", os.getpid()],
        "export": ["export", "store:none/x"],
    }[name]
    assert command(*first, "-o", tmp_path / "out", "--hvm-context", context).code in (1, 2)
    if name != "export":
        assert command(*first, "-o", tmp_path / "out", "--for", "xen", "--codec", "delta").code == 2
    assert not (tmp_path / "out").exists()


def test_export_gives_one_checkpoint_of_a_store(tmp_path: Path, command: Command) -> None:
    with Store(tmp_path / "store").writer("orders") as writer:
        fill(writer, 4)
    options = ["--at", 2, "--for", "xen", "--json"]
    ran = command("export", f"store:{tmp_path}/store/orders", "-o", tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    (held,) = read_checkpoints(tmp_path / "out", strict=True)
    assert np.array_equal(held.memory[:-3], memory_at(2)) and not held.memory[-3:].any()
    assert isinstance(held.tail, events.TailHvm) and held.tail.device_state == EMPTY_DEVICE_STATE
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
