"""A fence that was started for a request is run once, whenever the clock was read."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from test_service import until
from test_standby import standing_by, turn


def test_a_clock_that_was_read_before_the_request(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    asked = threading.Event()
    standby = standing_by(tmp_path / "store", asked.set, fence=f"echo >> {runs}")
    before = time.monotonic()
    given: list[int] = []
    asking = threading.Thread(target=lambda: given.append(standby.take_over(fence=True)["term"]), daemon=True)
    asking.start()
    assert asked.wait(10)
    turn(standby, before)
    until(lambda: standby.status()["fence"] == "succeeded")
    turn(standby, before)  # promotes; a fence that did not count would be run once more
    until(lambda: not asking.is_alive())
    assert given == [1]
    assert runs.read_text().count("\n") == 1
    standby.close()
