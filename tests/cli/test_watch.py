"""`remus-ckpt status --watch`, in a terminal and in a pipe, beside a backup that goes and comes back."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from services import until

from remus_ckpt import Backup, protect


@contextmanager
def watching(address: str, *options: str, terminal: bool) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The command, and a file with what it has printed, ended with the block by Ctrl-C."""
    seen = Path(address.removeprefix("unix:")).with_suffix(".seen")
    command = [sys.executable, "-m", "remus_ckpt", "status", "--from", address, "--watch", "--every", "100ms", *options]
    with seen.open("wb") as out:
        if terminal:
            ours, theirs = pty.openpty()
            os.set_blocking(ours, False)
            process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
            os.close(theirs)
        else:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        if terminal:
            seen = Path(f"/proc/self/fd/{ours}")
        yield process, seen
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if terminal:
            os.close(ours)


def shown(seen: Path, before: bytearray, *words: bytes) -> bool:
    """Whether all of these have been printed. before: what was printed so far, which a terminal gives only once"""
    try:
        if seen.is_file():
            before[:] = seen.read_bytes()
        else:
            before += os.read(int(seen.name), 1 << 20)
    except BlockingIOError:
        pass
    return all(word in before for word in words)


def test_a_terminal(tmp_path: Path) -> None:
    array = np.zeros(100_000)
    address = f"unix:{tmp_path}/socket"
    with watching(address, terminal=True) as (_, seen):
        printed = bytearray()
        until(lambda: shown(seen, printed, b"no answer"))
        with Backup(tmp_path / "store", [address]), protect({"a": array}, to=address, name="orders") as protection:
            array[7] += 1
            protection.checkpoint(wait=True)
            until(lambda: shown(seen, printed, b"orders", b"protected", b"s ago", b" ms", b"epoch"))
            del printed[:]
        until(lambda: shown(seen, printed, b"no answer"))


def test_lines_of_json(tmp_path: Path) -> None:
    array = np.zeros(100_000)
    address = f"unix:{tmp_path}/socket"
    with watching(address, "--json", terminal=False) as (_, seen):
        printed = bytearray()
        until(lambda: shown(seen, printed, b'"error"'))
        with Backup(tmp_path / "store", [address]), protect({"a": array}, to=address, name="orders") as protection:
            protection.checkpoint(wait=True)
            until(lambda: shown(seen, printed, b'"protected"'))
    reports = [json.loads(line) for line in printed.splitlines(keepends=True) if line.endswith(b"\n")]
    assert "error" in reports[0]
    assert any(report.get("names", {}).get("orders", {}).get("epoch") == 0 for report in reports)


def test_text_in_a_pipe(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with Backup(tmp_path / "store", [address]), watching(address, terminal=False) as (_, seen):
        printed = bytearray()
        until(lambda: shown(seen, printed, b"state", b"ratio"))
    assert b"\x1b[" not in printed
