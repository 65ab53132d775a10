#!/usr/bin/env python3
"""Man pages made from the help of the commands, in mdoc(7): python tools/man.py DIRECTORY

Look at one with `man -l DIRECTORY/remus-ckpt-protect.1`; to install them, put them into /usr/local/share/man/man1.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import typer

from remus_ckpt.cli import COMMANDS, app
from remus_ckpt.version import __version__

SECTION = "1"
EXITS = [
    ("0", "Success, also for a stream that is cut off after a complete checkpoint."),
    ("1", "Failure."),
    ("2", "Usage error."),
    ("20", "Corrupt stream or damaged store, or no complete checkpoint to restore."),
    ("21", "Unknown or refused format."),
    ("22", "Fenced: another side has taken over."),
]


def escaped(text: str) -> str:
    """Text that mdoc takes as it is."""
    text = text.replace("\\", "\\e").replace("…", "\\&...").replace("−", "-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def paragraphs(text: str) -> list[str]:
    """The help of a command as mdoc. A paragraph that begins with \b has the examples, which stay as they are."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if lines:
            lines.append(".Pp")
        if not paragraph.startswith("\b"):
            lines += sentences(" ".join(paragraph.split()))
            continue
        title, *rest = paragraph.split("\n")[1:]
        lines += [title, ".Bd -literal -offset indent", *(escaped(one.removeprefix("  ")) for one in rest), ".Ed"]
    return lines


def sentences(words: str) -> list[str]:
    """A new line for each sentence, as mdoc wants it."""
    return [
        escaped(line)
        for one in re.split(r"(?<=[.:;!?])\s+(?=[A-Z`-])", words)
        for line in textwrap.wrap(one, 78, break_long_words=False, break_on_hyphens=False)
    ]


def page(name: str, command: Any, context: Any, more: list[str]) -> str:
    """One page. name: with dashes, such as remus-ckpt-keys-issue"""
    title = context.command_path
    short = (command.short_help or command.help or "").split("\n\n")[0].strip().rstrip(".")
    options, arguments = [], []
    for param in command.params:
        record = param.get_help_record(context)
        if record is not None:
            (options if param.param_type_name == "option" else arguments).append(record)
    lines = [
        f'.\\" Made by tools/man.py from the help of remus-ckpt {__version__}.',
        ".Dd $Mdocdate$",
        f".Dt {name.upper()} {SECTION}",
        ".Os",
        ".Sh NAME",
        f".Nm {name}",
        f".Nd {escaped(short[:1].lower() + short[1:])}",
        ".Sh SYNOPSIS",
        f".Nm {title}",
    ]
    if options:
        lines.append(".Op Ar options")
    lines += [f".Ar {escaped(re.sub(r'[{}]', '', left.split()[0]))}" for left, _ in arguments]
    if more:
        lines += [".Ar command", ".Op Ar arguments"]
    lines += [".Sh DESCRIPTION", *paragraphs(command.help or short)]
    for rows in (arguments, options):
        if rows:
            lines.append(".Bl -tag -width indent")
            for left, right in rows:
                lines += [f".It {escaped(left)}", *sentences(" ".join(right.split()))]
            lines.append(".El")
    if more:
        lines += [".Sh COMMANDS", ".Bl -tag -width indent", *more, ".El"]
    lines += [".Sh EXIT STATUS", ".Bl -tag -width indent"]
    for code, text in EXITS:
        lines += [f".It {code}", text]
    lines.append(".El")
    others = sorted({"remus-ckpt", "remus-ckpt-protect", "remus-ckpt-backup", "remus-ckpt-status"} - {name})
    lines.append(".Sh SEE ALSO")
    lines += [f".Xr {one} {SECTION}" + (" ," if one != others[-1] else "") for one in others]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    root = typer.main.get_command(app)
    found = {}

    def visit(command: Any, parent: Any, name: str, word: str) -> None:
        context = command.make_context(word, [], parent=parent, resilient_parsing=True)
        inner = getattr(command, "commands", None) if parent else dict.fromkeys(COMMANDS)
        more = []
        for one in inner or ():
            below = command.get_command(context, one)
            help_text = (COMMANDS[one].help if not parent else below.get_short_help_str(200)).rstrip(".")
            more += [f".It {one}", f"{escaped(help_text)}: see", f".Xr {name}-{one} {SECTION} ."]
            visit(below, context, f"{name}-{one}", one)
        found[f"{name}.{SECTION}"] = page(name, command, context, more)

    visit(root, None, "remus-ckpt", "remus-ckpt")
    return found


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) == 2 and not sys.argv[1].startswith("-") else None
    if directory is None:
        sys.exit(__doc__)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
