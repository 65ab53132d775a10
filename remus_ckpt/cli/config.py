"""Options from a file: `--config FILE` sets a command's defaults, and `config check` tries a file.

A file is TOML. A table has the name of a command; its keys are that command's options without their dashes, and its
arguments. The command's own declarations are the only list of keys and their values.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from remus_ckpt.cli.options import AsJson, app, print_json
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import RemusError

_MOST_BYTES = 1 << 20
CONFIGURABLE = ("backup", "protect", "run")
"""The commands that read a file."""

config_app = typer.Typer(no_args_is_help=True, help="Check configuration files.", rich_markup_mode=None)
app.add_typer(config_app, name="config")

_is_checking = ContextVar("_is_checking", default=False)


class _Good(Exception):
    """Raised when a command that is only being checked has good options."""


class Configurable(TyperCommand):
    """A command with --config. For each flag that a file may set it takes --no-… too, so that the command line wins."""

    def make_parser(self, ctx):  # type: ignore[no-untyped-def]
        parser = super().make_parser(ctx)
        params: list[Any] = self.params
        for param in params:
            if getattr(param, "is_bool_flag", False) and not param.secondary_opts:
                off = [f"--no-{name.removeprefix('--')}" for name in param.opts]
                parser.add_option(param, off, dest=param.name, action="store_const", const=False)
        return parser


def begin() -> None:
    """A command calls this once its options are known to be good, before its work begins: a check goes no further."""
    if _is_checking.get():
        raise _Good


def _use(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = _defaults(path, ctx)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        is_eager=True,
        callback=_use,
        help="Read options from this command's table in a TOML file. The command line takes precedence; --no-… "
        "turns off an option without a value.",
    ),
]


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    """What a file says for each command. Raises typer.BadParameter."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise typer.BadParameter(f"{path}: a file of options has at most {_MOST_BYTES:,} bytes")
        tables = tomllib.loads(data.decode())
    except ValueError as error:  # of TOML, or of UTF-8
        raise typer.BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise typer.BadParameter(f"{path}: lists or tables are nested too deeply") from None
    faults = []
    for name, table in tables.items():
        if not isinstance(table, dict):
            faults.append(f"{name!r} is outside a table: put it under [{'] or ['.join(CONFIGURABLE)}]")
        elif name not in CONFIGURABLE:
            faults.append(f"[{name}] is not a command that reads a file{_meant(name, CONFIGURABLE, '[{}]')}")
    if not tables:
        faults.append(f"it has no table: write [{'] or ['.join(CONFIGURABLE)}]")
    if faults:
        raise typer.BadParameter(f"{path}: {'; '.join(faults)}")
    return tables


def _defaults(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """What a file says for the parameters of a command, by their names in the program. Raises typer.BadParameter."""
    tables = _tables(path)
    command = ctx.command.name or ""
    if command not in tables:
        raise typer.BadParameter(f"{path}: it has no table [{command}], only [{'], ['.join(tables)}]")
    params = {key_of(param): param for param in ctx.command.params if param.name != "config"}
    found: dict[str, Any] = {}
    faults = []
    for key, value in tables[command].items():
        if key not in params:
            faults.append(f"{_place(path, command, key)} has no key {key!r}{_meant(key, params, '{!r}')}")
            continue
        try:
            found[params[key].name or key] = _value(params[key], value, ctx)
        except typer.BadParameter as error:
            faults.append(f"{_place(path, command, key)} {key}: {error.message}")
    if faults:
        raise typer.BadParameter(f"{path}: {'; '.join(faults)}")
    return found


def _place(path: Path, command: str, key: str) -> str:
    """The table, preceded by the key's line number if the key begins a line, which it does unless it is in braces."""
    inside = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if header := re.match(r"\s*\[\s*[\"']?([^]\"']*?)[\"']?\s*\]", line):
            inside = header[1] == command
        elif inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"line {number}: [{command}]"
    return f"[{command}]"


def key_of(param: Any) -> str:
    """The name of a parameter in a file, as in the help."""
    is_option = param.param_type_name == "option"
    return str(max(param.opts, key=len).lstrip("-") if is_option else param.name)


def _meant(word: str, known: Iterable[str], form: str) -> str:
    near = get_close_matches(word.replace("_", "-"), known, n=1)
    return f": did you mean {form.format(near[0])}?" if near else f"; there are {', '.join(sorted(known))}"


def _value(param: Any, value: Any, ctx: typer.Context) -> Any:
    """A value as the command line would give it. Raises typer.BadParameter."""
    if getattr(param, "is_bool_flag", False):
        if not isinstance(value, bool):
            raise typer.BadParameter(f"write true or false, not {value!r}")
        return value
    is_line = param.nargs == -1
    if is_line and isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise typer.BadParameter(f"{error} in {value!r}: a shell would not take it either") from None
    is_several = is_line or getattr(param, "multiple", False)
    given = value if is_several and isinstance(value, list) else [value]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, str | int):
            raise typer.BadParameter(f"write a string or a whole number, not {one!r}")
    texts = list(map(str, given))
    result = texts if is_several else texts[0]
    param.process_value(ctx, result)
    return result


@config_app.command(short_help="Check that commands accept their configuration files.")
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Files for --config.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check that each command could start from its table in a file alone.

    Every table gets the checks that its command makes before it touches anything. Exit code 2 if any is wrong.

    Example: remus-ckpt config check /etc/remus-ckpt/*.toml
    """
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            names = list(_tables(path))
        except typer.BadParameter as error:
            rows.append({"file": str(path), "command": None, "error": error.message})
            continue
        rows += [{"file": str(path), "command": name, "error": _fault(path, name)} for name in names]
    if as_json:
        print_json(rows)
    for row in () if as_json else rows:
        if row["error"] is None:
            out.print(Text(f"{row['file']}: {row['command']}: good"))
        else:
            complain(row["error"])
    if any(row["error"] for row in rows):
        raise typer.Exit(2)


def _fault(path: Path, name: str) -> str | None:
    """What is wrong with a file for a command, None if nothing is."""
    from remus_ckpt.cli import command_named

    command = command_named(name)
    before = _is_checking.set(True)
    try:
        with command.make_context(name, ["--config", str(path)]) as ctx:
            command.invoke(ctx)
    except _Good:
        return None
    except (typer.BadParameter, RemusError) as error:
        text = str(error)
        if isinstance(error, typer.BadParameter):
            text = error.message or error.format_message()
        if text.startswith(f"{path}: "):
            return text
        option = re.search(r"--([a-z-]+)", text)
        return f"{path}: {_place(path, name, option[1]) if option else f'[{name}]'} {text}"
    finally:
        _is_checking.reset(before)
    raise AssertionError(f"{name} calls begin() before its work")
