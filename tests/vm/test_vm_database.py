"""Debian's redis in a guest, one kill: nothing that it has acknowledged is lost (tools/vm_database.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.kill
def test_a_database_loses_nothing(tmp_path: Path) -> None:
    found = tmp_path / "rows"
    files = ROOT / ".cache" / "vm_database"
    words = [sys.executable, ROOT / "tools" / "vm_database.py", "--kills", "1", "--folder", files, "--json", found]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (row,) = json.loads(found.read_text())
    assert row["total"] > row["acknowledged"] > 100
    assert row["is_before"], "the disk was not looked at as it was committed"
