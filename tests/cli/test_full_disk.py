"""A file system without room: who runs a command hears which one it is, and what to do; no part passes for all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_support import fill
from support import Command

from remus_ckpt.disk import Written, what_next
from remus_ckpt.errors import StoreError
from remus_ckpt.service import keys
from remus_ckpt.store import Store

pytestmark = pytest.mark.root


def advice(written: Written) -> str:
    return what_next(OSError(errno.ENOSPC, ""), written)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Room for 64 KiB."""
    mounted = tmp_path / "full"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A store, a stream, an image and a CA, each of more than 64 KiB where it has memory."""
    with Store(tmp_path / "store").writer("orders") as writer:
        source = fill(writer, 3)
        writer.compact(wait=True)
        fill(writer, 2, source)
    history = Store(tmp_path / "store")["orders"]
    history.export(tmp_path / "stream")
    history.restore_image(tmp_path / "image")
    keys.init(tmp_path / "ca")
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.mark.parametrize(
    "words",
    [
        "restore store:{made}/store/orders -o {full}/out",
        "restore {made}/stream -o {full}/out",
        "restore {made}/stream -o {full}/out --sparse-diff-from 3",
        "export store:{made}/store/orders -o {full}/out",
        "extract store:{made}/store/orders --pfn 0-40 -o {full}/out",
        "convert {made}/stream {full}/out --to raw",
        "convert {made}/stream {full}/out --to xen-v2",
        "convert {made}/stream {full}/out --to qemu",
        "convert {made}/stream {full}/out --to remus",
        "encode {made}/image -o {full}/out",
        "archive push store:{made}/store/orders file://{full}/archive",
    ],
)
def test_an_output_that_has_no_room(made: Path, full: Path, command: Command, words: str) -> None:
    if words.startswith("archive"):
        pytest.importorskip("obstore", reason="needs the extra [archive]")
    code, _, err = command(*words.format(made=made, full=full).split())
    assert code == 1
    assert str(full) in err and err.rstrip().endswith(advice("output"))


@pytest.mark.parametrize(
    "words",
    [
        "inspect {made}/stream --html {full}/out",
        "keys init {full}/out",
        "keys issue {made}/ca backup --out {full}/out",
        "restore store:{made}/store/orders -o {made}/out --device-state {full}/out",
    ],
)
def test_a_short_output_that_has_no_room(made: Path, full: Path, command: Command, words: str) -> None:
    with open(full / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    code, _, err = command(*words.format(made=made, full=full).split())
    assert code == 1
    assert str(full) in err and err.rstrip().endswith(advice("output"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        "restore store:{made}/store/orders -o -",
        "restore {made}/stream -o -",
        "export store:{made}/store/orders -o -",
        "extract store:{made}/store/orders --pfn 0-40 -o -",
        "convert {made}/stream - --to xen",
    ],
)
def test_standard_output_that_has_no_room(made: Path, full: Path, words: str, unbuffered: str) -> None:
    """Not even where Python does not buffer it, as in many containers: its write then takes a part, and is content."""
    arguments = [sys.executable, "-m", "remus_ckpt", *words.format(made=made).split()]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(full / "out", "wb") as out:
        ran = subprocess.run(arguments, check=False, stdout=out, stderr=subprocess.PIPE, env=environment, text=True)
    assert ran.returncode == 1
    assert "standard output" in ran.stderr and ran.stderr.rstrip().endswith(advice("output"))


def test_what_a_backup_has_no_room_for(tmp_path: Path, full: Path) -> None:
    """Its work goes on, once there is some."""
    with Store(full / "store").writer("orders", warm_directory=tmp_path / "warm") as writer:
        with pytest.raises(StoreError) as caught:
            fill(writer, 1)
        assert str(caught.value).endswith(advice("store"))
    with Store(tmp_path / "store").writer("orders", warm_directory=full / "warm") as writer:
        with pytest.raises(StoreError) as caught:
            fill(writer, 1)
        assert str(caught.value).endswith(advice("warm copy"))
    assert len({advice("store"), advice("warm copy"), advice("output")}) == 3
