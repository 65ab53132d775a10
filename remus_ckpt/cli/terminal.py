"""The output of a command: results on standard output, complaints and progress on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

errors = Console(stderr=True, soft_wrap=True, highlight=False)
out = Console(soft_wrap=True, highlight=False)


def complain(message: str) -> None:
    """Print one line to standard error."""
    errors.print(Text(f"remus-ckpt: {message}"))


@contextmanager
def progress(what: str, total: int | None, quiet: bool) -> Iterator[Any]:
    """A progress bar, if standard error is a terminal; yields a function that takes the bytes done."""
    if quiet or not errors.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
