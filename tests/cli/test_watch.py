"""`remus-ckpt status --watch`, in a terminal and in a pipe, beside a backup that goes and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from services import until
from watching import shown, watching

from remus_ckpt import Backup, protect


def test_a_terminal(tmp_path: Path) -> None:
    array = np.zeros(100_000)
    address = f"unix:{tmp_path}/socket"
    with watching(tmp_path / "seen", "status", "--from", address, terminal=True) as seen:
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
    with watching(tmp_path / "seen", "status", "--from", address, "--json", terminal=False) as seen:
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
    words = ["status", "--from", address]
    with Backup(tmp_path / "store", [address]), watching(tmp_path / "seen", *words, terminal=False) as seen:
        printed = bytearray()
        until(lambda: shown(seen, printed, b"state", b"ratio"))
    assert b"\x1b[" not in printed
