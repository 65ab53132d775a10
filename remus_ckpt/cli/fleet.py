"""The commands for a fleet: many names, and the commit log that they share."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    Insecure,
    TlsDir,
    app,
    fleet_of,
    is_time,
    name_of,
    parse_duration,
    print_json,
    stop_on_signals,
)
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import RemusError
from remus_ckpt.observe.log import on_one_line
from remus_ckpt.service.words import say_bytes

if TYPE_CHECKING:
    from remus_ckpt.fleet.group import Fleet
    from remus_ckpt.loop import StopSignal

fleet_app = typer.Typer(
    no_args_is_help=True,
    help="Manage many names on many hosts, and the commit log that they share.",
    rich_markup_mode=None,
)
app.add_typer(fleet_app, name="fleet")

LogUrl = Annotated[
    str, typer.Argument(metavar="URL", help="NATS servers: nats://HOST[:PORT][,HOST…], or tls://… with --tls-dir.")
]


FleetUrl = Annotated[
    str,
    typer.Argument(metavar="URL", help="The fleet's brokers: nats://HOST[:PORT][,HOST…], or tls://… with --tls-dir."),
]


def _fleet(url: str, tls_dir: Path | None, insecure: bool, stack: ExitStack) -> Fleet:
    from remus_ckpt.fleet.group import Fleet

    url, tls = fleet_of(url, tls_dir, insecure)
    fleet = Fleet(url, tls=tls, insecure=insecure)
    stack.callback(fleet.close)
    return fleet


@fleet_app.command("init", short_help="Make the commit log on NATS servers.")
def init(
    url: LogUrl,
    monitor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Monitoring address of a server, http://HOST:8222, which shows that it syncs. Repeatable.",
        ),
    ] = None,
    synced: Annotated[
        bool, typer.Option("--synced", help="Vouch that all servers have `sync_interval: always`; do not check.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, max=5, help="Number of servers that hold each record.")] = 3,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Create the commit log's stream, with a copy of each record on three NATS JetStream servers, and the buckets
    through which names find backups.

    Each server must sync each record before it answers (`sync_interval: always`, NATS 2.10 or later): by default it
    does so every two minutes, and a power failure of two servers loses commits. If the log is there already, its
    servers are checked again.

    Example: remus-ckpt fleet init nats://a,b,c --monitor http://a:8222 --monitor http://b:8222 --monitor http://c:8222
    """
    from remus_ckpt.fleet.group import make_buckets
    from remus_ckpt.fleet.jetstream import JetStreamLog, Nats, make_log
    from remus_ckpt.link.tls import TlsFiles

    nats = Nats(url, tls=TlsFiles(tls_dir) if tls_dir else None, insecure=insecure)
    try:
        make_log(nats, replicas=replicas, monitors=monitor or (), vouched=synced)
        make_buckets(nats, replicas)
        made = JetStreamLog(nats)
    finally:
        nats.close()
    if made.replicas < 3:
        complain("with fewer than three replicas, the log does not survive the loss of a server")
    print(f"{nats}: commit log {made.identity}, {made.replicas} replicas")


# Names, and who protects them


@fleet_app.command("status", short_help="Show all names of a fleet, and where each is protected.")
def status(
    url: FleetUrl,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show a table and redraw it until Ctrl-C. With --json: print a line each time."),
    ] = False,
    every: Annotated[str, typer.Option(metavar="TIME", callback=is_time, help="How often --watch asks.")] = "2s",
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Show each name: which backup has it, its newest commit, how far its primary is ahead, and its term; then each
    backup, with the room it has left. The exit code is 1 if any name is unprotected.

    A backup that died counts as alive for up to 15 s.

    Example: remus-ckpt fleet status nats://broker-1,broker-2,broker-3

    Example: remus-ckpt fleet status --watch nats://broker-1
    """
    every_s = parse_duration(every)
    with ExitStack() as stack:
        fleet = _fleet(url, tls_dir, insecure, stack)
        if watch:
            from remus_ckpt.cli.watch import watch as watch_it

            stop = stop_on_signals(stack)
            watch_it(lambda: _report(fleet), every_s, stop, as_json=as_json, draw=_draw)
            return
        report = _report(fleet)
    if as_json:
        print_json(report)
    else:
        out.print(_draw(report, time.time()))
    if report["unprotected"]:
        raise typer.Exit(1)


def _report(fleet: Fleet) -> dict[str, Any]:
    """The fleet, for JSON. Raises LogError."""
    from remus_ckpt.fleet.placing import GOOD, rows

    backups = fleet.backups()
    leaving = fleet.leaving()
    found = rows(fleet.places(), backups, fleet.primaries(), time.time())
    return {
        "unprotected": sum(one.state not in GOOD for one in found),
        "names": [asdict(one) for one in found],
        "backups": [
            {
                "id": one.id,
                "host": one.host,
                "addresses": list(one.addresses),
                "program": one.program,
                "names": len(one.names),
                "max_names": one.max_names,
                "free_bytes": one.free_bytes,
                "is_leaving": one.id in leaving,
            }
            for one in sorted(backups.values(), key=lambda one: (one.host, one.id))
        ],
    }


def _draw(report: dict[str, Any], now: float) -> Group:
    """The fleet, for people."""
    from remus_ckpt.fleet.placing import GOOD

    names, backups, bad = report["names"], report["backups"], report["unprotected"]
    if not names:
        words = "no names yet"
    elif bad:
        words = f"{bad} of {_count(len(names), 'name')} unprotected"
    else:
        words = f"all {len(names):,} names protected" if len(names) > 1 else "1 name protected"
    head = Text.assemble(
        time.strftime("%H:%M:%S  ", time.localtime(now)),
        (f"{words}; {_count(len(backups), 'backup')} alive", "bold red" if bad else "green"),
    )
    table = Table("name", "state", "backup", "epoch", "committed", "lag", "term", box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for one in names:
        table.add_row(
            Text(one["name"]),
            Text(one["state"], style="green" if one["state"] in GOOD else "bold red"),
            Text(on_one_line(one["backup"] or "-")),
            "-" if one["epoch"] is None else f"{one['epoch']:,}",
            "-" if one["age_s"] is None else f"{one['age_s']:.1f} s ago",
            "-" if one["lag"] is None else f"{one['lag']:,}",
            "-" if one["term"] is None else str(one["term"]),
        )
    why = [
        Text(on_one_line(f"{one['name']}: {one['words']}"), style="bold red")
        for one in names
        if one["state"] not in GOOD
    ]
    members = Table("backup", "address", "names", "room", "free", "", box=None, pad_edge=False)
    for one in backups:
        room = 0 if one["is_leaving"] else max(one["max_names"] - one["names"], 0)
        members.add_row(
            Text(on_one_line(f"{one['host']} ({one['id']})")),
            Text(on_one_line(one["addresses"][0])),
            f"{one['names']:,}",
            f"{room:,}",
            say_bytes(one["free_bytes"]),
            Text("leaving" if one["is_leaving"] else "", style="yellow"),
        )
    return Group(head, table, *why, Text(), members)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


@fleet_app.command("forget", short_help="Forget a name that is no longer in use.")
def forget(
    url: FleetUrl,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name.")],
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Forget where a name was, so that `fleet status` no longer reports it as unprotected. Its checkpoints stay where
    they are, and any backup that has some may then take the name over: forget a name only once it is out of use.

    Example: remus-ckpt fleet forget nats://broker-1 orders
    """
    name_of(name)
    with ExitStack() as stack:
        fleet = _fleet(url, tls_dir, insecure, stack)
        if name in fleet.primaries():
            raise RemusError(f"{name} has a primary, or had one in the last 15 s: stop it first")
        if fleet.place(name)[0] is None:
            raise RemusError(f"the fleet knows nothing of {name}")
        fleet.forget(name)


@fleet_app.command("drain", short_help="Move all names of a backup to others.")
def drain(
    url: FleetUrl,
    which: Annotated[
        str, typer.Argument(metavar="BACKUP", help="The backup: HOST, HOST/ID, ID or address, as `fleet status` says.")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Let it keep its names, and take new ones again.")] = False,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Move every name of a backup to other backups, and wait until all are protected there. From now on, until --undo,
    the backup takes no new names; once this command has ended, you may stop it.

    Each name stays protected by its old backup until the new one has all of its memory; meanwhile, none of its
    checkpoints are committed. Its history stays on the old one. Ctrl-C ends only the waiting.

    Example: remus-ckpt fleet drain nats://broker-1 node-7

    Example: remus-ckpt fleet drain nats://broker-1 node-7/5f2a91c0 --undo
    """
    from remus_ckpt.fleet.placing import called, find

    with ExitStack() as stack:
        fleet = _fleet(url, tls_dir, insecure, stack)
        backups = fleet.backups()
        ids = sorted({*find(which, backups), *({which} & fleet.leaving())})
        if not ids:
            raise RemusError(f"no backup of the fleet is called {which!r}: see `remus-ckpt fleet status {fleet}`")
        for id in ids:
            fleet.set_leaving(id, not undo)
        if undo:
            out.print(Text(f"{', '.join(called(id, backups) for id in ids)} may keep names again, and takes new ones"))
            return
        _await_drained(fleet, ids, stop_on_signals(stack))


def _await_drained(fleet: Fleet, ids: list[str], stop: StopSignal) -> None:
    from remus_ckpt.fleet.placing import called

    began = time.monotonic()
    before: int | None = None
    while not stop.is_set:
        backups = fleet.backups()
        held = [name for name, place in fleet.places().items() if place.backup in ids]
        alive = fleet.primaries()
        left = [name for name in held if name in alive]
        if len(left) != before:
            before = len(left)
            out.print(Text(f"{time.monotonic() - began:5.1f} s: {_count(before, 'name')} to go"))
        if not left:
            for name in held:
                complain(f"{name} has no primary: its committed checkpoints stay on {called(ids[0], backups)}")
            return
        if not any(one.room for id, one in backups.items() if id not in ids):
            raise RemusError(f"no other backup has room: until one has, {_count(before, 'name')} will not move")
        _sleep(stop)


def _sleep(stop: StopSignal) -> None:
    until = time.monotonic() + 1.0
    while not stop.is_set and time.monotonic() < until:
        time.sleep(0.1)
