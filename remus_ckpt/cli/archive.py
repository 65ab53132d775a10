"""The commands for archives: segments in an object store."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    DryRun,
    KeepAge,
    KeepCount,
    KeepSize,
    KeepTiers,
    MaxMemory,
    Recipients,
    app,
    print_json,
    retention_of,
)
from remus_ckpt.cli.store import At, HistoryName, parse_at, path_of
from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.errors import BadCheckpoint, NothingToRestore, StoreError
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.plural import counted

if TYPE_CHECKING:
    from remus_ckpt.store.archive import Archived

archive_app = typer.Typer(
    no_args_is_help=True, help="Keep checkpoints in an object store, and get them back.", rich_markup_mode=None
)
app.add_typer(archive_app, name="archive")

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL", help="s3://BUCKET/PREFIX, gs://…, az://…, or file:///DIRECTORY. Credentials: the environment."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="One name in it.")]
Identity = Annotated[
    Path | None, typer.Option(metavar="FILE", help="age identities (AGE-SECRET-KEY-1…), to read what is encrypted.")
]


@archive_app.command("list", short_help="List what an archive has.")
def list_archive(
    url: Url,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One name: list its segments.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the names in an archive, or the segments of one.

    Example: remus-ckpt archive list s3://remus-archive/site-a orders
    """
    from remus_ckpt.store.archive import Archive

    archive = Archive(url)
    names = [name] if name else archive.names()
    found = {one: archive.segments(one) for one in names}
    if name and not found[name]:
        raise NothingToRestore(f"{url}/{name}: nothing is archived under this name")
    if as_json:
        print_json({"archive": url, "names": {one: [_row(part) for part in parts] for one, parts in found.items()}})
        return
    for one, parts in found.items():
        if name:
            for part in parts:
                out.print(Text(f"{part.epochs[0]} to {part.epochs[-1]}  {_taken(part)}  {part.bytes:,} bytes"))
        elif parts:
            last = max(parts, key=lambda part: part.epochs[-1])
            size = sum(part.bytes for part in parts)
            out.print(
                Text(
                    f"{one}: up to {last.epochs[-1]}, {_taken(last)}; {counted(len(parts), 'segment')}, {size:,} bytes"
                )
            )


@archive_app.command(short_help="Copy closed segments that are missing to an archive.")
def push(store: HistoryName, url: Url, archive_recipients: Recipients = None, as_json: AsJson = False) -> None:
    """Copy the closed segments of a name to an archive, once. `backup --archive` does so continuously.

    The newest segment is closed when the next one begins; while no backup runs, `remus-ckpt compact` begins one.

    Example: remus-ckpt archive push store:/var/lib/remus/orders s3://remus-archive/site-a
    """
    from remus_ckpt.store import History, archiver
    from remus_ckpt.store.archive import Archive
    from remus_ckpt.store.state import load_state

    archive = Archive(url, recipients=archive_recipients, create=True)
    history = History(path_of(store))
    name = load_state(history.directory).name
    known = archive.segments(name)
    total = sum(one.end for one in archiver.waiting(history, known))
    put: list[Archived] = []
    with progress(store, total, as_json) as advance:
        for one in archiver.push(archive, history, name, known):
            if one is not None:
                put.append(one)
                advance(sum(part.bytes for part in put))
    if as_json:
        print_json({"store": store, "archive": url, "name": name, "put": [_row(one) for one in put]})
    else:
        out.print(Text(f"{url}/{name}: {counted(len(put), 'segment')} copied, {len(known):,} in all"))


@archive_app.command(short_help="Rebuild a name's checkpoints from an archive.")
def fetch(
    url: Url,
    name: Name,
    store: Annotated[Path, typer.Option(metavar="DIR", help="Store to rebuild it in; created if missing.")],
    at: At = None,
    identity: Identity = None,
    max_memory: MaxMemory = 64,
    as_json: AsJson = False,
) -> None:
    """Rebuild the checkpoints of a name in a store, where a backup continues or any command reads them. Every byte is
    checked. With --at, fetch only what that checkpoint needs.

    Example: remus-ckpt archive fetch s3://remus-archive/site-a orders --store /var/lib/remus
    """
    from remus_ckpt.store.archive import Archive, fetch, line_of

    archive = Archive(url, identity=identity)
    limits = Limits(memory_bytes=max_memory * GIB)
    total = sum(one.bytes for one in line_of(archive.segments(name)))
    done = 0
    with progress(f"{url}/{name}", None if at else total, as_json) as advance:

        def note(size: int) -> None:
            nonlocal done
            done += size
            advance(done)

        found = fetch(archive, name, store / name, at=parse_at(at), progress=note, limits=limits)
    epochs = found[0].epochs[0], found[-1].epochs[-1]
    if as_json:
        row = {"archive": url, "name": name, "store": str(store / name), "segments": len(found), "epochs": epochs}
        print_json(row)
    else:
        words = f"checkpoints {epochs[0]} to {epochs[1]}, in {counted(len(found), 'segment')}"
        out.print(Text(f"store:{store / name}: {words}"))


@archive_app.command(short_help="Read everything back from an archive.")
def verify(
    url: Url, name: Name, identity: Identity = None, max_memory: MaxMemory = 64, as_json: AsJson = False
) -> None:
    """Fetch every segment of a name, check every byte, and keep nothing. Exit code 20 if anything is damaged.

    Example: remus-ckpt archive verify s3://remus-archive/site-a orders
    """
    from remus_ckpt.store.archive import Archive

    archive = Archive(url, identity=identity)
    segments = archive.segments(name)
    if not segments:
        raise NothingToRestore(f"{url}/{name}: nothing is archived under this name")
    bad: dict[str, str] = {}
    done = 0
    total = sum(one.bytes for one in segments)
    with tempfile.TemporaryDirectory() as folder, progress(f"{url}/{name}", total, as_json) as advance:
        for one in segments:
            path = Path(folder) / "segment"
            try:
                archive.get(name, one, path, limits=Limits(memory_bytes=max_memory * GIB))
            except StoreError as error:
                bad[one.key] = str(error)
            with suppress(FileNotFoundError):
                path.unlink()
            done += one.bytes
            advance(done)
    if as_json:
        print_json({"archive": url, "name": name, "segments": len(segments), "bytes": total, "bad": bad})
    else:
        out.print(
            Text(f"{url}/{name}: read {counted(len(segments), 'segment')}, {total:,} bytes; {len(bad):,} are bad")
        )
        for words in bad.values():
            complain(words)
    if bad:
        raise typer.Exit(BadCheckpoint.exit_code)


@archive_app.command(short_help="Remove old segments from an archive.")
def prune(
    url: Url,
    name: Name,
    keep: KeepTiers = None,
    keep_count: KeepCount = None,
    keep_age: KeepAge = None,
    keep_size: KeepSize = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove old segments of a name from an archive, by the rules of `remus-ckpt prune`. The newest always stays.

    Example: remus-ckpt archive prune s3://remus-archive/site-a orders --keep daily=90,monthly=24
    """
    from remus_ckpt.store.archive import Archive, line_of
    from remus_ckpt.store.retention import find_removals, times_taken

    if all(one is None for one in (keep, keep_count, keep_age, keep_size)):
        raise typer.BadParameter("say what to keep: --keep, --keep-count, --keep-age or --keep-size")
    retention = retention_of(keep, count=keep_count, age=keep_age, size=keep_size, free=None)
    archive = Archive(url)
    segments = line_of(archive.segments(name))
    held = [one.contents() for one in segments]
    stored = {one.key: int(one.stored.timestamp()) * 10**9 for one in segments if one.stored}
    times_ns = times_taken(held, stored.get, time.time_ns(), None)
    rules = find_removals(held, [one.bytes for one in segments], retention, times_ns)
    removals = [segments[number] for number in rules]
    if not dry_run:
        archive.remove(name, removals)
    size = sum(one.bytes for one in removals)
    if as_json:
        removed = [_row(segments[number]) | {"rule": rule} for number, rule in rules.items()]
        print_json({"archive": url, "name": name, "dry_run": dry_run, "removed": removed, "bytes": size})
        return
    would = "would be " if dry_run else ""
    for number, rule in rules.items():
        one = segments[number]
        out.print(Text(f"{would}removed by {rule}: {one.epochs[0]} to {one.epochs[-1]}, {one.bytes:,} bytes"))
    out.print(f"{counted(len(removals), 'segment')}, {size:,} bytes {would}removed")


def _row(one: Archived) -> dict[str, Any]:
    return {
        "key": one.key,
        "first_epoch": one.epochs[0],
        "last_epoch": one.epochs[-1],
        "taken": None if one.time is None else one.time.isoformat(),
        "bytes": one.bytes,
        "encrypted": one.is_encrypted,
    }


def _taken(one: Archived) -> str:
    return "at an unknown time" if one.time is None else one.time.astimezone().isoformat(" ", "seconds")
