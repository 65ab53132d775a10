"""The short form of the fault test (tools/faults): calls of the system that fail under a store, drawn by a seed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "faults"
SAMPLE = 50


@pytest.mark.kill
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_nothing_acknowledged_is_lost_whichever_call_fails() -> None:
    command = [sys.executable, TOOL, "--sample", str(SAMPLE), "--seed", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["cases"] == SAMPLE
    assert found["failed"] == []
    assert found["hits"] > SAMPLE * 0.8, "the faults did not come"
