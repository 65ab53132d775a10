"""The walk in C under AddressSanitizer and UBSan, over whole checkpoints and what random changes make of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import many

ROOT = Path(__file__).resolve().parents[2]
WALK = ROOT / "remus_ckpt" / "wire" / "_walk"
FUZZ = ROOT / "tests" / "fuzz"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_the_walk_keeps_to_its_bytes(tmp_path: Path) -> None:
    program = tmp_path / "walk"
    flags = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DSTANDALONE", f"-I{WALK}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        ["gcc", *flags, FUZZ / "walk.c", WALK / "walk.c", "-o", program], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip("gcc has no sanitizers here")
    assert built.returncode == 0, built.stderr
    corpus = sorted((FUZZ / "corpus" / "walk").iterdir())
    assert corpus
    # tests/fuzz/run looks for longer, and where there is something new to find.
    ran = subprocess.run([program, str(many(5_000, 100_000)), *corpus], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
