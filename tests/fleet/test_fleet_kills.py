"""A few runs of tools/fleet_kills.py, and its control."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fleet_kills.py"

pytestmark = pytest.mark.kill


def kills(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--seed", "3", "--frozen", "4", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fault", ["leader", "backup", "frozen primary"])
def test_nothing_released_is_lost_or_done_twice(fault: str) -> None:
    ran = kills("--runs", "2", "--only", fault)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_without_the_log_it_is() -> None:
    """A backup that was killed comes back, and takes over what the other one protects by then."""
    ran = kills("--runs", "1", "--only", "backup", "--control")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 wrong" in ran.stdout
