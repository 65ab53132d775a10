"""The alert rules and the Grafana dashboard: they are well formed, and ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from remus_ckpt.observe.metrics import Metrics, Output, Seen

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "monitoring"


def offered() -> set[str]:
    """Every name that Prometheus may ask for."""
    metrics = Metrics()
    metrics.watch_health(lambda: {"orders": Seen(0, "protected", 0)})
    metrics.watch_certificate(lambda: datetime.now(UTC))
    metrics.watch_output("web", lambda: Output(0, 0, 0, 0, 0, (0.1,), (0, 0), 0.0))
    names: set[str] = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names.update(family.name + suffix for suffix in suffixes)
    return names


@pytest.mark.parametrize("file", ["alerts.yml", "dashboard.json"])
def test_every_metric_exists(file: str) -> None:
    asked = set(re.findall(r"\bremus_[a-z_]+", (FOLDER / file).read_text())) - {"remus_ckpt"}
    assert len(asked) > 5
    assert asked <= offered()


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells), "two panels overlap"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: install Debian's package prometheus")
def test_the_rules_alert_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
