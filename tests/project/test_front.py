"""The package's front: what it offers, and what it costs to come in."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import remus_ckpt
from remus_ckpt import cli
from remus_ckpt.service import keys


@pytest.mark.parametrize("name", remus_ckpt.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(remus_ckpt, name).__doc__
    assert name in (remus_ckpt.__doc__ or ""), "the module's docstring lists what it offers"


def test_type_checkers_see_what_python_sees() -> None:
    tree = ast.parse(Path(remus_ckpt.__file__).read_text())
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(seen) == set(remus_ckpt.__all__)
    for name, home in seen.items():
        assert getattr(importlib.import_module(home), name) is getattr(remus_ckpt, name)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        remus_ckpt.nothing_of_ours  # noqa: B018


@pytest.mark.parametrize(
    ("line", "kept_out"),
    [
        ("import remus_ckpt", "numpy typer cryptography prometheus_client sqlite3 ssl"),
        ("from remus_ckpt import Sender, Restorer", "typer cryptography prometheus_client sqlite3 ssl"),
        ("from remus_ckpt.cli import app", "numpy cryptography prometheus_client sqlite3 ssl"),
    ],
)
def test_nothing_is_loaded_before_it_is_used(line: str, kept_out: str) -> None:
    assert loaded(line, kept_out) == []


HEAVY = "numpy cryptography prometheus_client sqlite3 ssl lz4 rich.progress rich.markdown remus_ckpt.walk"


COMMANDS = [name for name in (*cli.COMMANDS, "keys init", "keys issue", "keys show") if name != "conformance"]
"""Not conformance: its help is that of what it runs."""
EACH = """
import json, sys
from remus_ckpt.cli import app
code, heavy = None, set(sys.argv[2].split())
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as done:
        code = done.code
    print(json.dumps([code, *heavy.intersection(sys.modules)]), file=sys.stderr)
    heavy -= set(sys.modules)
"""
"""Runs each command, and says how it ended and what it was the first to load."""


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--nothing-of-ours", 2)])
def test_a_help_and_wrong_usage_come_fast(option: str, code: int) -> None:
    """They load the options and nothing that does the work."""
    lines = json.dumps([[*name.split(), option] for name in COMMANDS])
    done = subprocess.run([sys.executable, "-c", EACH, lines, HEAVY], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert dict(zip(COMMANDS, found, strict=True)) == {name: [code] for name in COMMANDS}


def test_a_stream_is_verified_without_what_the_services_need() -> None:
    vectors = Path(remus_ckpt.__file__).parent.parent / "specs" / "vectors"
    path = next(path for path in sorted(vectors.glob("*.bin")) if not path.name.startswith("bad-"))
    run = f"from remus_ckpt.cli import app\napp(['verify', {str(path)!r}], standalone_mode=False)"
    kept_out = "cryptography prometheus_client sqlite3 ssl remus_ckpt.service remus_ckpt.link remus_ckpt.store"
    assert loaded(run, kept_out) == []


def loaded(lines: str, names: str) -> list[str]:
    """Which of these modules a fresh Python has loaded behind these lines."""
    code = f"{lines}\nimport sys\nprint(*[name for name in {names.split()} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return (done.stderr.splitlines() or [""])[-1].split()


def test_the_days_of_a_certificate_are_those_that_the_help_names() -> None:
    assert (keys.CA_DAYS, keys.CERTIFICATE_DAYS) == (3650, 825)


def test_the_help_lists_every_command() -> None:
    """The list stands apart from the commands, so that it can be shown without loading them."""
    group = typer.main.get_command(cli.app)
    context = typer.Context(group)
    registered = set()
    for module in {entry.module for entry in cli.COMMANDS.values()}:
        loaded = __import__(f"remus_ckpt.cli.{module}", fromlist=["app"])
        registered |= set(typer.main.get_group(loaded.app).commands)
    assert registered == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None
        assert group.get_command(context, name) is command, "made once"  # type: ignore[attr-defined]
