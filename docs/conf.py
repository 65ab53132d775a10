"""Settings of the documentation: sphinx-build -W docs build/docs (needs the extra remus_ckpt[docs])."""

import re

from remus_ckpt.version import __version__

project = "remus_ckpt"
author = "The remus_ckpt developers"
copyright = author
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["specs/vectors", "specs/grammar"]
myst_heading_anchors = 4
# A link to a file that is no page (a tool, a vector) goes nowhere here; tests/project/test_docs.py checks that it
# is there.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]
highlight_language = "none"
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"remus_ckpt {__version__}"


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines between blank ones."""
    return [part.split("\n") for part in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")) if part.strip()]


def plain(text: str) -> str:
    """Text that means itself, but for what stands between backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts)


def as_restructured_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Our docstrings, which are to be read as they are: "name: meaning" is an item, an indented paragraph is code."""
    result: list[str] = []
    for paragraph in paragraphs(lines):
        if all(line.startswith("    ") for line in paragraph):
            result += ["::", "", *paragraph, ""]
            continue
        is_item = False
        for line in paragraph:
            item = re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line)
            is_more = is_item and line.startswith(" ")
            if not is_more and is_item != bool(item):
                result.append("")
            is_item = is_more or bool(item)
            result.append(
                f"* ``{item[1]}``: {plain(item[2])}" if item else f"{'  ' if is_more else ''}{plain(line.strip())}"
            )
        result.append("")
    lines[:] = result


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-docstring", as_restructured_text)
