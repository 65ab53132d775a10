"""Tests reach the project through its public seams: what tests touch cannot be changed without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent.parent
MOST = 27
"""What is left. It may become fewer: then lower this number."""
PRIVATE = re.compile(r"_[A-Za-z]\w*")
OWN = {"self", "cls", "os", "sys"}
"""A test's own objects, and modules whose functions of such names are for all, such as `os._exit`."""
NAMED = re.compile(r"(?!_TYPER_|_REMUS_CKPT_)([\w.]+\.)?(_[A-Z][A-Z_]+|(?<=\.)_\w+)")
"""A constant or a dotted name in a string, for `setattr`. Variables of the shell's completion are called so, too."""
IN_CODE = re.compile(r"\b(?!(?:self|os|sys)\.)\w+\._[a-z]\w*")
"""In code that a test hands to another interpreter."""


def reached(source: str) -> Iterator[str]:
    """The private names of others that a file uses, each as often as it does."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=value, attr=name) if PRIVATE.fullmatch(name) and ast.unparse(value) not in OWN:
                yield ast.unparse(node)
            case ast.ImportFrom(names=names):
                yield from (alias.name for alias in names if PRIVATE.fullmatch(alias.name))
            case ast.Constant(value=str(text)) if NAMED.fullmatch(text):
                yield text
            case ast.Constant(value=str(text)):
                yield from IN_CODE.findall(text)


def test_reaching_is_noticed() -> None:
    source = """
from there import _hidden
self._own = os._exit
it._one._two = "_LOOK_S"
patch("remus_ckpt.there._inner", "_x", "no.dots", "nothing _here")
run("import it\\nit._three.go()\\nself._mine = 1")
super()._four()
"""
    found = sorted(reached(source))
    assert found == [
        "_LOOK_S", "_hidden", "it._one", "it._one._two", "it._three", "remus_ckpt.there._inner", "super()._four",
    ]  # fmt: skip


def test_no_more_is_reached_for_than_was() -> None:
    found = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in sorted(TESTS.rglob("*.py"))
        if path != Path(__file__)
        for name in reached(path.read_text())
    ]
    assert len(found) <= MOST, "\n".join(found)
