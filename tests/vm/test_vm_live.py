"""A real QEMU takes a protected guest's history as a live migration with XBZRLE pages, and the guest goes on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import guests
import pytest
from services import LONG_S
from support import Command

from remus_ckpt.vm.qmp import Qmp

pytestmark = pytest.mark.qemu


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@contextmanager
def waiting(folder: Path, image: Path, uri: str, command: Command) -> Iterator[tuple[Qmp, guests.Console, Path]]:
    """A QEMU with the guest's command line, as `qemu-args` prints it, that takes a migration from `uri`."""
    ram, qmp, serial = folder / "ram", folder / "qmp", folder / "serial"
    line = guests.words(image, f"unix:{serial},server=on,wait=off")
    said = command("qemu-args", "--ram", ram, "--qmp", qmp, "--", *line)
    assert said.code == 0, said.err
    process = subprocess.Popen([*shlex.split(said.out), "-S", "-incoming", uri])
    try:
        with closing(guests.Console(serial)) as console, closing(Qmp(qmp)) as monitor:
            yield monitor, console, ram
    finally:
        process.kill()
        process.wait()


def until_taken(monitor: Qmp) -> None:
    guests.until(lambda: monitor.execute("query-migrate").get("status") in ("completed", "failed"))
    assert monitor.execute("query-migrate")["status"] == "completed"


def test_a_history_is_a_live_migration(tmp_path: Path, command: Command) -> None:
    image = guests.build(tmp_path)
    with guests.backup(tmp_path) as served, guests.running(tmp_path, served.address, image) as primary:
        guests.wait_committed(served, 12)
        primary.process.terminate()
        primary.process.wait(LONG_S)
    history, stream = tmp_path / "history", tmp_path / "stream"
    assert command("export", f"store:{tmp_path}/store/web", "-o", history).code == 0
    ran = command("convert", history, stream, "--to", "qemu", "--live", "--json")
    assert ran.code == 0, ran.err
    report: dict[str, Any] = json.loads(ran.out)
    assert len(report["checkpoints"]) > 10
    assert "the device state" not in " ".join(report["lost"])
    cache = report["migration"]["xbzrle-cache"]
    assert cache["pages"] > 50 and cache["bytes"] < cache["pages"] * 400

    # What we read of it is the last checkpoint's memory, and some of its pages are encoded.
    assert command("restore", history, "-o", tmp_path / "last").code == 0
    memory = (tmp_path / "last").read_bytes()
    found = json.loads(command("verify", stream, "--hash", "--json", "--page-size", 4096).out)
    assert found["complete"] and found["checkpoints"][0]["pages"]["xbzrle"] > 50

    # QEMU reads it from a pipe while it is written, and has the same memory; its guest counts on from there.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with waiting(tmp_path, image, f"exec:cat {fifo}", command) as (monitor, console, ram):
        sent: list[int] = []
        sender = threading.Thread(
            target=lambda: sent.append(
                subprocess.run(
                    [sys.executable, "-m", "remus_ckpt", "convert", str(history), str(fifo), "--to", "qemu", "--live"],
                    check=False,
                    capture_output=True,
                    timeout=LONG_S,
                ).returncode
            )
        )
        sender.start()
        until_taken(monitor)
        sender.join(LONG_S)
        assert sent == [0]
        assert ram.read_bytes() == memory
        counter = int.from_bytes(memory[0x300000:0x300004], "little")
        monitor.execute("cont")
        assert console.counts_on() > counter
