"""At each epoch the waiting QEMU has the guest's memory of that pause, and a page that is left out is noticed
(tools/vm_epochs.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.kill
@pytest.mark.parametrize("more", [[], ["--control"]])
def test_every_epoch_is_the_same_on_both_sides(more: list[str]) -> None:
    words = [sys.executable, ROOT / "tools" / "vm_epochs.py", "--seconds", "5", *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == int(bool(more)), done.stderr + done.stdout
    assert "epochs compared" in done.stdout, done.stderr
