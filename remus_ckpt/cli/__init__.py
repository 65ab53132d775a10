"""The command `remus-ckpt`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from remus_ckpt import __version__
from remus_ckpt.cli import keys, live, service, store, streams
from remus_ckpt.cli.options import app
from remus_ckpt.errors import RemusError
from remus_ckpt.walk import complain

__all__ = ["app", "keys", "live", "main", "service", "store", "streams"]


def main() -> NoReturn:
    """Run the command; every error of ours is one line and an exit code."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(1)  # closed: nothing could be said
    try:
        app()
        sys.exit(0)
    except RemusError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output is gone; that is no error of theirs or ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        complain(f"{named}{error.strerror or error}")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"remus-ckpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass
