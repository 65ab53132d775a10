"""The short form of the power-loss test (tools/powerloss): a real ext4, over a disk that knows what was flushed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "powerloss"
LOSSES = 40


@pytest.mark.root
@pytest.mark.kill
def test_nothing_that_was_said_is_lost_with_the_power(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--losses", str(LOSSES), "--seed", "1", "--json", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["losses"] == LOSSES
    assert found["failed"] == 0
    assert {"staged", "stored", "applied", "receiving", "promotion"} <= found["phases"].keys()
    assert list(tmp_path.iterdir()) == [], "a run has left something"
