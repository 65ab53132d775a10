"""The command `remus-ckpt`. A module of this package is loaded when one of its commands is run."""

from __future__ import annotations

import functools
import importlib
import os
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
    "backup": _Entry("service", "Keep checkpoints from primaries and take over when they fail."),
    "status": _Entry("status", "Show the status of a backup and its primaries."),
    "failover": _Entry("status", "Promote a backup by hand."),
    "keys": _Entry("keys", "Make, show, replace and revoke TLS keys."),
    "demo": _Entry("service", "Protect a worker, kill it, and watch the backup take over."),
    "record": _Entry("live", "Record checkpoints of live shared memory."),
    "list": _Entry("listing", "List what a store holds."),
    "prune": _Entry("store", "Remove old checkpoints from a store."),
    "compact": _Entry("store", "Start a new segment in a store with a full copy of memory."),
    "export": _Entry("store", "Export a checkpoint from a store as a stream."),
    "restore": _Entry("streams", "Restore a checkpoint's memory to an image."),
    "verify": _Entry("streams", "Read and check an entire stream or store."),
    "inspect": _Entry("streams", "Describe a stream and its checkpoints."),
    "diff": _Entry("streams", "Show where two checkpoints differ."),
    "extract": _Entry("streams", "Print pages from a checkpoint."),
    "encode": _Entry("streams", "Make a stream from memory images."),
    "events": _Entry("streams", "Print a stream's events as JSON lines."),
    "conformance": _Entry("streams", "Test an implementation of the format."),
    "check": _Entry("streams", "Show which codec kernel is in use and why."),
}


@functools.cache
def _command(name: str) -> Any:
    # Cached: building all of a module's commands takes longer than many of them run.
    module = importlib.import_module(f"remus_ckpt.cli.{COMMANDS[name].module}")
    return typer.main.get_group(module.app).commands[name]


class _Commands(TyperGroup):
    """The commands in `COMMANDS`, each loaded when it is run: the overall help needs none of them."""

    def list_commands(self, ctx):  # type: ignore[no-untyped-def]
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):  # type: ignore[no-untyped-def]
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx, formatter):  # type: ignore[no-untyped-def]
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


app = typer.Typer(
    name="remus-ckpt",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Continuous, compressed checkpoints of live memory, in the Xen legacy save stream.

    Exit codes: 0 success, 1 failure, 2 usage error, 20 corrupt stream or damaged store, or no checkpoint to restore, 21
    unknown or refused format, 22 fenced: another side has taken over.""",
)


def main() -> NoReturn:
    """Run the command; each of our own errors becomes one line and an exit code."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(1)  # closed: there is nowhere to print
    try:
        app()
        sys.exit(0)
    except RemusError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has closed the pipe, which is nobody's error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _complain("out of memory: let this process have more (`ulimit -v` shows its limit), or use a larger machine")
        sys.exit(1)
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        _complain(f"{named}{error.strerror or error}")
        sys.exit(1)


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
