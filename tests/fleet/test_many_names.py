"""Many names on one backup: each gets its turn, and its memory does not grow with time. A short run of the bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_fleet.py"
SECONDS = 8


@pytest.mark.brokers
def test_no_name_starves(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, TOOL, "--names", 40, "--processes", 2, "--warm-up", 2, "--seconds", SECONDS]
    ran = subprocess.run(
        [*map(str, command), "--directory", str(tmp_path), "--json", str(out)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found["names"] == 40
    # At one a second; other tests run beside this one.
    assert found["commits"]["min"] >= SECONDS / 2 and found["commits"]["max"] <= SECONDS + 2
    assert found["longest_gap_s"] < SECONDS / 2
    assert found["backup_rss_mib"]["after"] <= found["backup_rss_mib"]["before"] + 20
