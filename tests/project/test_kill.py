"""The short form of the kill test (tools/killtest): real processes, ended in every phase; the truth is held outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import guests
import pytest
from services import until

TOOL = Path(__file__).resolve().parents[2] / "tools" / "killtest"
RUNS = 26
"""Every other one is aimed: at each of the thirteen phases once, and once more for one that was missed."""


@pytest.mark.kill
def test_nothing_committed_is_lost_whoever_is_killed_and_wherever(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--runs", str(RUNS), "--seed", "1", "--jobs", "2", "--json", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["failed_runs"] == 0
    assert found["runs"] >= RUNS
    # Of each of the first twelve checkpoints or so most were committed, and many were read back.
    assert found["commits"] > RUNS
    assert found["checked"] > RUNS
    assert found["continued"] > 0
    assert found["full"] > 0
    phases = {
        *("capture", "paused", "encode", "send", "sent"),
        *("opening", "receiving", "staged", "stored", "acknowledged", "applying", "compaction", "pruning"),
    }
    assert {phase for phase in phases if not found["kills"][phase]} == set()
    assert list(tmp_path.iterdir()) == [], "a run has left something"


@pytest.mark.kill
@pytest.mark.parametrize(
    "tool", [[TOOL, "--runs", "100", "--jobs", "1"], [TOOL.with_name("soak.py"), "--minutes", "5"]]
)
def test_a_test_that_is_ended_leaves_no_process(tmp_path: Path, tool: list[object]) -> None:
    command = [sys.executable, *map(str, tool), "--keep", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: any("primary" in path.name or "protect" in path.name for path in tmp_path.glob("*/*.log")))
        started = guests.descendants(process.pid)
        process.terminate()
    assert len(started) > 2
    until(lambda: not any(map(guests.line_of, started)))


@pytest.mark.kill
def test_and_over_tls(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--runs", "6", "--seed", "2", "--jobs", "2", "--tls", "--json", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr + done.stdout
    # 2: so few runs do not come to every phase.
    found = json.loads(done.stdout)
    assert found["failed_runs"] == 0
    assert found["commits"] > 6
    assert found["checked"] > 6
