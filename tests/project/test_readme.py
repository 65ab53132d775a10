"""The README's example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert out == ["(1000, 1000) 1.5"]


def test_the_two_commands_are_there() -> None:
    commands = re.findall(r"^    (python3 -m venv .venv && .*)$", README, re.MULTILINE)
    assert [command.split(".venv/bin/")[-1] for command in commands] == ["remus-ckpt demo", "pytest -n auto"]
