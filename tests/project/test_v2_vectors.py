"""The vectors of Xen's v2 stream are what their writer makes, the command reads them, and the runner tests readers."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from qemu_support import FOLDER as QEMU
from support import Command

from remus_ckpt import conformance
from remus_ckpt.conformance import Verdict, compare_reading, load_manifest, load_vector

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "specs" / "vectors" / "xen-v2"
ROWS = load_manifest(FOLDER)


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tools_v2_vectors", ROOT / "tools" / "v2_vectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_they_are_what_the_writer_makes() -> None:
    made = _tool().build()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    content = sys.modules["qemu_vectors"].content
    assert [path.name for path in FOLDER.iterdir() if content(path) != made[path.name]] == []


def test_they_name_sections_that_exist() -> None:
    headings = re.findall(r"^#+ ([\d.]+)", (ROOT / "specs" / "xen-v2.md").read_text(), re.M)
    named = {section for row in ROWS for section in row["sections"]}
    assert {section.removeprefix("xen-v2.md §") for section in named} - {*headings} == set()
    assert len([row for row in ROWS if "error" in row]) >= 50


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_what_the_command_says(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "it").write_bytes(load_vector(FOLDER, row["files"][0]))
    ran = Command(monkeypatch, capfdbinary)("verify", tmp_path / "it", "--hash", "--json")
    verdict = Verdict(row["id"], row["sections"])
    compare_reading(verdict, row, ran.code, ran.out.encode(), ran.err)
    assert (verdict.problems, verdict.notes) == ([], [])
    if "error" in row:
        assert json.loads(ran.out)["error"]["section"] == row["error"]["section"]


def test_the_runner(capsys: pytest.CaptureFixture[str]) -> None:
    reader = f"{shlex.quote(sys.executable)} -m remus_ckpt verify --hash --json"
    for folder, names in ((FOLDER, ["series", "bad-guest-3"]), (QEMU, ["multifd-none", "told-page-size", "bad-flags"])):
        asked = ["--vectors", str(folder), *(part for name in names for part in ("--only", name))]
        assert conformance.main(["--reader", reader, *asked]) == 0
        assert f"{len(names)} of {len(names)} vectors pass" in capsys.readouterr().out
        # One that reads nothing, and one that says of any file what is true of another.
        assert conformance.main(["--reader", "true", *asked]) == 1
        assert "is not a JSON object" in capsys.readouterr().out
        liar = shlex.join([sys.executable, "-c", """print('{"format": "xen"}')"""])
        assert conformance.main(["--reader", liar, *asked]) == 1
        assert "in place of" in capsys.readouterr().out
