"""The command `list`: the names in a store, its segments and checkpoints."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, Insecure, TlsDir, app, print_json
from remus_ckpt.cli.store import is_address, numbers, open_remote, path_of, row_of, segment_row, time_text
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import StoreError

if TYPE_CHECKING:
    from remus_ckpt.store import Entry, History, State, Store, Survey
    from remus_ckpt.store.remote import Remote

_TABLE_ROWS = 1_000


@app.command("list", short_help="List what a store holds.")
def list_store(
    store: Annotated[
        str,
        typer.Argument(
            metavar="store:DIR[/NAME]",
            help="A store, or one name in it; or the same on a backup: tls://HOST:PORT[/NAME], unix:PATH[/NAME], tcp://….",
        ),
    ],
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Also list every checkpoint of NAME.")] = False,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Also list the last N checkpoints of NAME.")
    ] = None,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """List the names in a store and their newest checkpoints, or the segments and checkpoints of one name.

    Examples: remus-ckpt list store:/var/lib/remus;  remus-ckpt list store:/var/lib/remus/orders --last 20;
    remus-ckpt list tls://backup:7411 --tls-dir keys/me
    """
    from remus_ckpt.store.history import nothing_in

    with ExitStack() as stack:
        whole: Store | Remote
        history: History | None
        if is_address(store):
            whole = history = stack.enter_context(open_remote(store, tls_dir, insecure))
            where, history = whole.where, history if history.has_name else None
        else:
            where, whole, history = _local(store)
        if history is not None:
            _list_history(history, None if checkpoints else last or 0, as_json)
            if history.newest() is None:
                raise nothing_in(where)
            return
        if checkpoints or last is not None:
            raise typer.BadParameter("--checkpoints and --last need a name: store:DIR/NAME")
        rows, faults = [], []
        for name in whole.names():
            try:
                history = whole[name]
                rows.append(_summary(history.state, history.survey()))
            except StoreError as error:
                faults.append({"name": name, "error": str(error)})
    _print_names(where, rows, faults, as_json)


def _local(text: str) -> tuple[str, Store, History | None]:
    """store:DIR[/NAME]: the path, the store, and the history if the path is that of one. Raises StoreError."""
    path = path_of(text)
    from remus_ckpt.store import History, Store
    from remus_ckpt.store.state import FILE

    is_history = (path / FILE).exists() or (path / "segments").exists()
    return str(path), Store(path), History(path) if is_history else None


def _print_names(where: str, rows: list[dict[str, Any]], faults: list[dict[str, Any]], as_json: bool) -> None:
    from remus_ckpt.store.history import nothing_in

    if as_json:
        print_json({"store": where, "histories": rows, "unreadable": faults})
    else:
        table = [["name", "newest", "checkpoints", "bytes", "term", "role", "taken"]]
        for row in rows:
            cells = [row["name"], row["newest"], row["checkpoints"], row["bytes"], row["term"], row["role"]]
            table.append([*map(_cell, cells), time_text(row["time_ns"])])
        _print_table(table)
        for row in rows:
            for lost in row["lost"]:
                complain(f"{row['name']}: {_loss(lost)}")
    for fault in faults:
        complain(fault["error"])
    if faults:
        raise typer.Exit(StoreError.exit_code)
    if not rows:
        raise nothing_in(where, "the store holds no name")
    if all(row["newest"] is None for row in rows):
        raise nothing_in(where)


def _list_history(history: History, last: int | None, as_json: bool) -> None:
    """last: how many checkpoints to list too; None: all."""
    state, survey = history.state, history.survey()
    summary = _summary(state, survey)
    segments = [segment_row(one) | {"damaged": state.damaged.get(one.name)} for one in survey.contents]
    if as_json:
        if last == 0:
            print_json(summary | {"segments": segments})
        else:
            _print_json_list(summary | {"segments": segments}, "entries", map(row_of, _listed(history, last)))
        return
    table = [["segment", "first", "last", "checkpoints", "bytes", "base", "taken from", "to"]]
    for row in segments:
        numbers = [row[key] for key in ("first", "last", "checkpoints", "bytes", "base_bytes")]
        table.append(
            [row["segment"], *map(_cell, numbers), time_text(row["first_time_ns"]), time_text(row["last_time_ns"])]
        )
    _print_table(table)
    if newest := survey.newest:
        out.print(Text(f"newest: {newest.epoch}, taken {time_text(newest.time_ns)}, position {newest.position}"))
    for name, reason in state.damaged.items():
        if all(name != lost.segment for lost in survey.lost):
            complain(f"{name}: {reason}")
    for lost in summary["lost"]:
        complain(_loss(lost))
    if last == 0:
        return
    head = ["epoch", "taken", "pages", "bytes", "segment", "position"]
    # As wide as the first rows need: a table of all of them may not fit into memory.
    rows = (_cells(entry) for entry in _listed(history, last))
    widths: list[int] = []
    while block := [*([] if widths else [head]), *itertools.islice(rows, _TABLE_ROWS)]:
        widths = _print_table(block, widths)


def _listed(history: History, last: int | None) -> Iterator[Entry]:
    """Yield the last N checkpoints, or all, one at a time."""
    if last is None:
        return history.checkpoints()
    newest_first = itertools.islice(history.checkpoints(newest_first=True), last)
    return reversed(list(newest_first))


def _cells(entry: Entry) -> list[str]:
    sequence = entry.segment.partition("-")[2].partition(".")[0]
    size = _cell(entry.end - entry.start)
    return [_cell(entry.epoch), time_text(entry.time_ns), _cell(entry.pages), size, sequence, str(entry.position)]


def _print_json_list(fields: dict[str, Any], name: str, rows: Iterator[dict[str, Any]]) -> None:
    """Print one JSON object with a list in it that is written as it is produced."""
    head = json.dumps(fields | {name: []})
    sys.stdout.write(head.removesuffix("]}"))
    for number, row in enumerate(rows):
        sys.stdout.write((", " if number else "") + json.dumps(row))
    sys.stdout.write("]}\n")
    sys.stdout.flush()


def _loss(lost: dict[str, Any]) -> str:
    epochs = f"; lost committed checkpoints: {lost['epochs']}" if lost["epochs"] else ""
    return f"{lost['segment']}, at byte {lost['byte']}: {lost['reason']}{epochs}"


def _summary(state: State, survey: Survey) -> dict[str, Any]:
    newest = survey.newest
    return {
        "name": state.name,
        "newest": None if newest is None else newest.epoch,
        "position": None if newest is None else str(newest.position),
        "time_ns": None if newest is None else newest.time_ns,
        "checkpoints": survey.count,
        "bytes": survey.bytes,
        "term": state.term,
        "role": state.role,
        "damaged": state.damaged,
        "lost": [
            {
                "segment": one.segment,
                "byte": one.byte,
                "reason": one.reason,
                "checkpoints": len(one.epochs),
                "epochs": numbers(one.epochs),
            }
            for one in survey.lost
        ],
    }


def _print_table(rows: list[list[str]], widths: Sequence[int] = ()) -> list[int]:
    """Print a table. Returns the widths of its columns: at least those given."""
    columns = zip(*rows, strict=True)
    least = widths or [0] * len(rows[0])
    found = [max(width, *map(len, column)) for width, column in zip(least, columns, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, found, strict=True))
        ]
        out.print(Text("  ".join(cells).rstrip()))
    return found


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
