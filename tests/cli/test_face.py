"""What a shell and `man` know of the command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remus_ckpt.cli import COMMANDS, command_named

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("remus-ckpt ver", ["verify"]),
        ("remus-ckpt protect --tr", ["--tracking"]),
        ("remus-ckpt protect --tracking k", ["kernel"]),
        ("remus-ckpt keys iss", ["issue"]),
        ("remus-ckpt status --wa", ["--watch"]),
    ],
)
def test_bash_completes(words: str, offered: list[str]) -> None:
    array = words.split()
    script = f"""
        source <(remus-ckpt --show-completion bash)
        COMP_WORDS=({" ".join(array)}) COMP_CWORD={len(array) - 1}
        _remus_ckpt_completion remus-ckpt
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == offered


@pytest.mark.parametrize(("shell", "between"), [("zsh", ":"), ("fish", "\t")])
def test_other_shells_are_told_a_line_for_each(shell: str, between: str) -> None:
    env = os.environ | {
        "_REMUS_CKPT_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "remus-ckpt protect --",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COLUMNS": "80",
    }
    done = subprocess.run([BIN / "remus-ckpt"], capture_output=True, text=True, env=env, check=True)
    lines = done.stdout.removeprefix("_arguments '*: :((").removesuffix("))'\n").replace('"', "").splitlines()
    offered = [line.partition(between) for line in lines]
    options = {option for param in command_named("protect").params for option in param.opts if option[:2] == "--"}
    assert {name for name, _, _ in offered} == options | {"--help"}
    assert all(help_text for _, _, help_text in offered)


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The man pages."""
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "tools" / "man.py", folder], check=True)
    return folder


def test_each_command_has_a_page_with_its_options(man: Path) -> None:
    assert {f"remus-ckpt-{name}.1" for name in COMMANDS} <= {path.name for path in man.iterdir()}
    page = (man / "remus-ckpt-protect.1").read_text()
    for words in (".It --on-fenced CMD", ".It --interval TIME", "[default: 25ms]", ".Bd -literal"):
        assert words in page
    assert ".Xr remus-ckpt-keys-issue 1 ." in (man / "remus-ckpt-keys.1").read_text()
    assert ".Nm remus-ckpt vm disk-back" in (man / "remus-ckpt-vm-disk-back.1").read_text()


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="no mandoc: install Debian's package of that name")
def test_mandoc_finds_nothing(man: Path) -> None:
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", *sorted(man.iterdir())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def every_command(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command with the words that name it."""
    for name in COMMANDS if group is None else group.commands:
        command = command_named(name) if group is None else group.commands[name]
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from every_command(command, (*words, name))


def test_an_example_can_be_copied_and_has_options_that_exist() -> None:
    found = dict(every_command())
    tried = 0
    for words, command in found.items():
        if hasattr(command, "commands") or words == ("conformance",):  # that has a help of its own
            continue
        _, there, block = command.help.partition("\n\n\b\nExample")
        assert there, f"{' '.join(words)} has no example"
        for line in block.partition(":\n")[2].replace(" \\\n", " ").splitlines():
            for part in re.split(r" (?:\||&&) ", line):
                given = shlex.split(part)
                if "remus-ckpt" not in given:
                    continue
                given = given[given.index("remus-ckpt") + 1 :]
                name = tuple(given[: 2 if hasattr(command_named(given[0]), "commands") else 1])
                options = {option for param in found[name].params for option in param.opts}
                used = {one for one in given[: given.index("--") if "--" in given else None] if one.startswith("-")}
                assert used - {"-"} <= options, line
                tried += 1
    assert tried > 40
