"""The command `remus-ckpt`. A module of this package is loaded when one of its commands is run."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
import sys
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from remus_ckpt.errors import RemusError
from remus_ckpt.version import __version__


class _Entry(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "protect": _Entry("service", "Protect live shared memory on a backup."),
    "run": _Entry("vm", "Run a virtual machine under protection."),
    "qemu-args": _Entry("vm", "Print a QEMU command line whose guest can be protected."),
    "backup": _Entry("service", "Keep checkpoints from primaries and take over when they fail."),
    "status": _Entry("status", "Show the status of a backup and its primaries."),
    "dashboard": _Entry("dashboard", "Serve a live page about several backups."),
    "failover": _Entry("status", "Promote a backup by hand."),
    "drill": _Entry("drill", "Prove that a name can be restored, without touching it."),
    "fleet": _Entry("fleet", "Manage many names on many hosts, and the commit log that they share."),
    "vm": _Entry("vm", "Start copies of protected guests, and bring their disks back."),
    "config": _Entry("config", "Check configuration files."),
    "keys": _Entry("keys", "Make, show, replace and revoke TLS keys."),
    "demo": _Entry("demo", "Protect a worker, kill it, and watch the backup take over."),
    "record": _Entry("live", "Record checkpoints of live shared memory."),
    "plan": _Entry("plan", "Work out how much link and disk a recorded memory needs."),
    "list": _Entry("listing", "List what a store holds."),
    "prune": _Entry("store", "Remove old checkpoints from a store."),
    "compact": _Entry("store", "Start a new segment in a store with a full copy of memory."),
    "archive": _Entry("archive", "Keep checkpoints in an object store, and get them back."),
    "export": _Entry("store", "Export a checkpoint from a store as a stream."),
    "restore": _Entry("streams", "Restore a checkpoint's memory to an image."),
    "mount": _Entry("mount", "Mount a store's checkpoints as read-only files."),
    "verify": _Entry("streams", "Read and check an entire stream or store."),
    "inspect": _Entry("streams", "Describe a stream and its checkpoints."),
    "diff": _Entry("streams", "Show where two checkpoints differ."),
    "extract": _Entry("streams", "Print pages from a checkpoint."),
    "convert": _Entry("convert", "Write memory in another format."),
    "encode": _Entry("images", "Make a stream from memory images."),
    "events": _Entry("conform", "Print a stream's events as JSON lines."),
    "conformance": _Entry("conform", "Test an implementation of the format."),
    "check": _Entry("conform", "Show which codec kernel is in use and why."),
}


@functools.cache
def command_named(name: str) -> Any:
    """The command as the parser sees it."""
    # Cached: building all of a module's commands takes longer than many of them run.
    module = importlib.import_module(f"remus_ckpt.cli.{COMMANDS[name].module}")
    return _legible(typer.main.get_group(module.app).commands[name])


def examples(paragraph: str) -> list[str]:
    """The commands of a paragraph of help that has the examples; none otherwise."""
    words = " ".join(paragraph.split())
    return (
        re.split(r";\s+(?=remus-ckpt|REMUS_CKPT)", words.partition(": ")[2]) if re.match(r"Examples?: ", words) else []
    )


def _legible(command: Any) -> Any:
    """The same command, with a help in which an example can be copied, and without the types of Python."""
    paragraphs = re.split(r"\n\s*\n", command.help or "")
    prose = [one for one in paragraphs if not examples(one)]
    if found := [example for one in paragraphs for example in examples(one)]:
        # \b keeps the lines as they are.
        prose.append("\n".join(["\b", f"Example{'s' * (len(found) > 1)}:", *(f"  {_folded(one)}" for one in found)]))
    command.help = "\n\n".join(prose)
    for param in command.params:
        if param.param_type_name == "argument":
            param.get_help_record = functools.partial(_argument_record, param.get_help_record)
    for inner in getattr(command, "commands", {}).values():
        _legible(inner)
    return command


def _folded(example: str, width: int = 76) -> str:
    """An example in lines that a shell takes as one, broken before options."""
    lines = [""]
    for part in re.split(r" (?=--?[a-z]|-- |\| )", example):
        if lines[-1] and len(lines[-1]) + len(part) > width - 2:
            lines.append(part)
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n      ".join(lines)


def _argument_record(record: Any, ctx: Any) -> tuple[str, str] | None:
    found = record(ctx)
    return found and (re.sub(r" <\S+>$", "", found[0]), found[1])


class _Commands(TyperGroup):
    """The commands in `COMMANDS`, each loaded when it is run: the overall help needs none of them."""

    def list_commands(self, ctx):  # type: ignore[no-untyped-def]
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):  # type: ignore[no-untyped-def]
        return command_named(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"there is no command {args[0]!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):  # type: ignore[no-untyped-def]
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


app = typer.Typer(
    name="remus-ckpt",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Continuous, compressed checkpoints of live memory, in the Xen legacy save stream.

    Exit codes: 0 success, 1 failure, 2 usage error, 20 corrupt stream or damaged store, or no checkpoint to restore, 21
    unknown or refused format, 22 fenced: another side has taken over.""",
)


def main() -> NoReturn:
    """Run the command; each of our own errors becomes one line and an exit code."""
    if sys.stdout is None or sys.stderr is None:
        if sys.stderr is not None:
            _complain("standard output is closed: leave it open, or send it to a file (>/dev/null will do)")
        sys.exit(1)
    if "_REMUS_CKPT_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "10000"  # what is offered takes a line each, which typer would wrap
    try:
        app()
        sys.exit(0)
    except RemusError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has closed the pipe, which is not an error.
        _drop_output()
        sys.exit(1)
    except MemoryError:
        _complain("out of memory: let this process have more (`ulimit -v` shows its limit), or use a larger machine")
        sys.exit(1)
    except OSError as error:
        from remus_ckpt.disk import what_next

        named = error.filename
        if named is None and error.errno == errno.ENOSPC:
            named = "standard output"  # all others have names
            _drop_output()
        reason = f"{error.strerror or error}{what_next(error, 'output')}"
        _complain(f"{named}: {reason}" if named else reason)
        sys.exit(1)


def _drop_output() -> None:
    """Discard what standard output has not taken: otherwise the interpreter tries again as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    from remus_ckpt.cli.terminal import complain

    complain(text)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"remus-ckpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
