"""What goes wrong around a command: a full disk, a pipe in place of a file, a closed output, a wrong guess."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from store_support import fill
from support import Command

from remus_ckpt import Sender, batches
from remus_ckpt.errors import LogError
from remus_ckpt.fleet.opening import OpenedLog
from remus_ckpt.store import Store

OLD = b"what was there"
IMAGE = np.random.default_rng(5).integers(0, 256, 1 << 20, dtype=np.uint8)
"""It cannot be compressed."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an image and its stream, and an image of one page."""
    (tmp_path / "image").write_bytes(IMAGE.tobytes())
    (tmp_path / "small").write_bytes(IMAGE[:4096].tobytes())
    pages = IMAGE.reshape(-1, 4096)
    with open(tmp_path / "stream", "wb") as stream:
        for buffers in Sender(len(pages)).checkpoint(batches(np.arange(len(pages)), pages)):
            stream.writelines(buffers)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond this, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    was, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be cut, and read later
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = was


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "image", "-o", "out"],
        ["extract", "stream", "--pfn", "0-255", "-o", "out"],
        ["restore", "stream", "-o", "out"],
        ["convert", "stream", "out", "--to", "remus"],
        ["convert", "stream", "out", "--to", "elf"],
        ["convert", "stream", "out", "--to", "xen-v2"],
        ["inspect", "stream", "--html", "out"],
    ],
    ids=" ".join,
)
def test_an_output_without_room_leaves_what_was_there(folder: Path, command: Command, arguments: list[str]) -> None:
    (folder / "out").write_bytes(OLD)
    there = set(folder.iterdir())
    with files_of_at_most(1000):
        ran = command(*arguments, "--overwrite")
    assert ran.code == 1
    assert "out: " in ran.err or f"{folder}: " in ran.err
    assert (folder / "out").read_bytes() == OLD
    assert set(folder.iterdir()) == there


@pytest.mark.parametrize("arguments", ["verify stream > /dev/full", "restore stream -o - > /dev/full"])
def test_a_full_standard_output_is_named(folder: Path, arguments: str) -> None:
    done = shell(arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(b"remus-ckpt: standard output: No space left on device: make room there")


def test_a_closed_standard_output_is_said(folder: Path) -> None:
    done = shell("verify stream >&-")
    assert done.returncode == 1
    assert done.stderr.startswith(b"remus-ckpt: standard output is closed")


def shell(arguments: str) -> subprocess.CompletedProcess[bytes]:
    line = f"{sys.executable} -m remus_ckpt {arguments}"
    return subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["diff", "image", "PIPE"], 1),
        (["diff", "PIPE", "image"], 1),
        (["encode", "PIPE", "-o", "out"], 1),
        (["encode", "image", "PIPE", "-o", "out"], 1),
        (["convert", "PIPE", "out", "--from", "raw", "--to", "elf"], 1),
        (["plan", "PIPE"], 2),
    ],
)
def test_a_pipe_is_not_taken_for_an_empty_file(folder: Path, command: Command, arguments: list[str], code: int) -> None:
    taken, given = os.pipe()
    try:
        os.write(given, b"some bytes")
        ran = command(*(f"/dev/fd/{taken}" if word == "PIPE" else word for word in arguments))
    finally:
        os.close(taken)
        os.close(given)
    assert (ran.code, ran.out) == (code, "")
    assert f"/dev/fd/{taken}" in ran.err
    assert not (folder / "out").exists()


def test_the_files_of_a_store_are_no_outputs(folder: Path, command: Command) -> None:
    with Store(folder / "store").writer("desk") as writer:
        fill(writer, 1)
    (segment,) = (folder / "store" / "desk" / "segments").iterdir()
    held = segment.read_bytes()
    store = "store:store/desk"
    for arguments in (["restore", store], ["export", store], ["extract", store, "--pfn", "0"], ["encode", "small"]):
        assert command(*arguments, "-o", segment, "--overwrite").code == 1
        assert command(*arguments, "-o", segment.with_name("new")).code == 1
        assert segment.read_bytes() == held
        assert list(segment.parent.iterdir()) == [segment]
    assert command("restore", store, "-o", "store/out").code == 0


def test_an_image_taken_for_a_stream_is_told_from_a_damaged_one(folder: Path, command: Command) -> None:
    image = bytearray(1 << 20)
    image[:2] = (2096).to_bytes(2, "little")  # as a stream's size of memory
    (folder / "zeros").write_bytes(image)
    for arguments in (["verify", "zeros"], ["convert", "zeros", "out", "--to", "remus"]):
        ran = command(*arguments)
        assert ran.code == 20
        assert "--from raw" in ran.err
    ran = command("verify", "image")
    assert ran.code == 21
    assert "--from raw" in ran.err


@pytest.mark.parametrize(
    ("source", "to"), [("qcow2", "elf"), ("qcow2", "remus"), ("mapped-ram", "raw"), ("lime", "xen-v2")]
)
def test_a_file_that_is_not_what_from_says_is_not_read(folder: Path, command: Command, source: str, to: str) -> None:
    (folder / "dump").write_bytes(b"\x7fELF" + bytes(60))
    for name, found in (("image", "does not begin"), ("stream", "does not begin"), ("dump", "it is elf")):
        ran = command("convert", name, "out", "--from", source, "--to", to)
        assert ran.code == 1
        assert f"{name} is not {source}: " in ran.err
        assert found in ran.err
        assert not (folder / "out").exists()


def test_faults_of_a_stream_are_told_with_its_name(folder: Path, command: Command) -> None:
    for arguments in (["plan", "image"], ["inspect", "image", "--html", "out"]):
        ran = command(*arguments)
        assert ran.code == 21
        assert ran.err.startswith("remus-ckpt: image: ")


def test_one_number_of_a_checkpoint_is_not_enough_to_compare(folder: Path, command: Command) -> None:
    ran = command("diff", "stream", "0")
    assert ran.code == 2
    assert "which two checkpoints" in ran.err


def test_a_log_needs_its_client_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)  # as if it were not installed
    with pytest.raises(LogError):
        OpenedLog("nats://127.0.0.1:1")


@pytest.mark.parametrize("option", ["--store", "--warm"])
def test_a_file_is_no_folder_for_a_backup(folder: Path, command: Command, option: str) -> None:
    places = {"--store": "store", "--warm": "memory"} | {option: "small"}
    ran = command("backup", "--listen", "unix:socket", *(word for pair in places.items() for word in pair))
    assert ran.code == 1
    assert "small is a file, not a directory" in ran.err
