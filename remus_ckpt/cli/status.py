"""The commands that ask a backup: status, failover."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    Insecure,
    TlsDir,
    app,
    dial,
    fleet_of,
    is_time,
    name_of,
    parse_duration,
    print_json,
    stop_on_signals,
)
from remus_ckpt.cli.terminal import out
from remus_ckpt.errors import NoCheckpoint, RemusError
from remus_ckpt.observe.log import on_one_line

_STATUS_S = 10.0
_LEAST_EVERY_S = 0.1
"""A backup answers a question about its status at once, even if its disks hang."""

_PROTECTION = {
    "waiting": "unprotected until there is a backup at",
    "copying": "about to be protected on",
    "protected": "protected on",
}

Source = Annotated[
    str, typer.Option("--from", metavar="ADDRESS", help="The backup: tls://HOST:PORT, unix:PATH, tcp://HOST:PORT.")
]


@app.command(short_help="Show the status of a backup and its primaries.")
def status(
    source: Source,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Only this name.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Print one line for a probe, and exit with 0 if all is good, 1 for a warning, 2 if something is "
            "critical, 3 if the backup cannot be asked.",
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show a table and redraw it until Ctrl-C. With --json: print a line each time."),
    ] = False,
    every: Annotated[str, typer.Option(metavar="TIME", callback=is_time, help="How often --watch asks.")] = "1s",
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Show, for each name, the state of the backup and of its primary, and any trouble.

    Example: remus-ckpt status --from tls://backup:7411 --tls-dir keys/me

    Example: remus-ckpt status --watch --from tls://backup:7411 --tls-dir keys/me

    Example: remus-ckpt status --check --name orders --from tls://backup:7411 --tls-dir keys/me
    """
    if name is not None:
        name_of(name)
    if check and watch:
        raise typer.BadParameter("--check asks once: leave --watch out")
    if check:
        _check(source, name, tls_dir, insecure, as_json)
    if watch:
        from remus_ckpt.cli.watch import watch as watch_it

        every_s = parse_duration(every)
        if every_s < _LEAST_EVERY_S:
            raise typer.BadParameter(f"--every {every}: it must be {_LEAST_EVERY_S}s or more")
        with ExitStack() as stack:
            stop = stop_on_signals(stack)
            watch_it(lambda: _report(source, name, tls_dir, insecure), every_s, stop, as_json=as_json)
        return
    report = _report(source, name, tls_dir, insecure)
    if as_json:
        print_json(report)
        return
    if name is None and report["health"]["state"] not in {one["health"]["state"] for one in report["names"].values()}:
        _print([_headline("backup", report["health"])])  # what concerns no name, such as its certificate
    for key, found in report["names"].items():
        _print(_tell(key, found))


def _report(source: str, name: str | None, tls_dir: Path | None, insecure: bool) -> dict[str, Any]:
    """The backup's report, of all names or of one. Raises LinkError, NoCheckpoint."""
    report = _ask(source, tls_dir, insecure)
    if name is not None:
        if name not in report["names"]:
            raise NoCheckpoint(f"{source} does not know the name {name!r}")
        report["names"] = {name: report["names"][name]}
    return report


def _ask(source: str, tls_dir: Path | None, insecure: bool) -> dict[str, Any]:
    from remus_ckpt.link.control import ask

    return ask(dial(source, tls_dir, insecure), "status", {}, timeout_s=_STATUS_S)


def _check(source: str, name: str | None, tls_dir: Path | None, insecure: bool, as_json: bool) -> None:
    """Print one line, and exit with the level of what is worst."""
    from remus_ckpt.service.health import Health, overall

    try:
        health = overall(_ask(source, tls_dir, insecure), name, time.time())
    except (RemusError, typer.BadParameter) as error:
        health = Health("unreachable", f"unreachable: {error}")
    if as_json:
        print_json(health.status())
    else:
        _print([f"REMUS {health.level.name} - {health.words}" + (f"; {health.next}" if health.next else "")])
    raise typer.Exit(int(health.level))


def _print(lines: list[str]) -> None:
    for line in lines:
        out.print(Text(on_one_line(line)))


def _headline(name: str, health: dict[str, Any]) -> str:
    level = ("OK", "WARNING", "CRITICAL")[health["level"]]
    return f"{name}: {level} - {health['words']}"


def _short(position: str | None) -> str:
    epoch, _, digest = (position or "none").partition(":")
    return f"{epoch}:{digest[:16]}" if digest else epoch


def _tell(name: str, found: dict[str, Any]) -> list[str]:
    """The status of one name, as lines of text."""
    health, primary = found["health"], found["primary"]
    lines = [_headline(name, health)]
    if health["next"]:
        lines.append(f"  next: {health['next']}")
    where = f"connected to {found['peer']}" if found["connected"] else "no primary connected"
    lines.append(f"  {found['role']}, term {found['term']}, position {_short(found['position'])}; {where}")
    if primary:
        lines.append("  " + ", ".join(_tell_primary(primary)))
    for command in ("fence", "takeover"):
        again = found.get(f"{command}_retry_s")
        if again is not None:
            lines.append(f"  {command} failed; next try in {again:.0f} s")
        elif found.get(command) == "running":
            lines.append(f"  {command} running")
    if found["role"] == "promoted":
        if found.get("image"):
            lines.append(f"  taken over at epoch {found['epoch']}: memory {found['image']}")
        if found.get("takeover") == "succeeded":
            lines.append("  takeover succeeded: the work continues here")
    if found.get("vm") == "waiting":
        lines.append(f"  a QEMU waits for the guest: process {found['vm_pid']}")
    elif found.get("vm") == "running":
        again = found.get("vm_protection")
        how = "unprotected" if again is None else f"{_PROTECTION.get(again['state'], '')} {again['to']}"
        lines.append(f"  the guest runs here, {how}: QEMU process {found['vm_pid']}")
    if found.get("vm_why"):
        lines.append(f"  no QEMU waits for the guest: {found['vm_why']}")
    if found.get("trouble"):
        lines.append(f"  trouble: {found['trouble']}")
    if found.get("warm_on_disk"):
        lines.append(f"  warm copy on disk, where commits may wait for it: {found['warm_on_disk']}")
    if lag := found.get("archive"):
        lines.append(f"  {_tell_lag(lag)}")
    lines += [f"  warning: {warning}" for warning in found["warnings"]]
    return lines


def _tell_lag(lag: dict[str, Any]) -> str:
    """What the archive has, and what it waits for."""
    has = "nothing is archived yet" if lag["newest"] is None else f"archived up to {lag['newest']}"
    if lag["waiting"]:
        has += f"; {lag['waiting']:,} closed segments wait ({lag['waiting_bytes']:,} bytes)"
    return f"{has}: {lag['error']}" if lag["error"] else has


def _tell_primary(primary: dict[str, Any]) -> list[str]:
    """What a primary says of itself, as far as it makes sense: it is not trusted."""
    parts = [f"lag {primary.get('lag_checkpoints')} checkpoints", f"dirty {primary.get('dirty_pages')} pages"]
    if isinstance(ratio := primary.get("ratio"), float):
        parts.append(f"ratio {ratio:.1%}")
    if isinstance(rate := primary.get("copy_bytes_s"), float):
        parts.append(f"first copy at {rate / (1 << 20):,.1f} MiB/s of memory")
    for key, what in (("pause_ms", "pause"), ("commit_latency_ms", "commit")):
        times = primary.get(key)
        times = [times.get(part) for part in ("p50", "p99")] if isinstance(times, dict) else [None]
        if all(isinstance(value, float) for value in times):
            parts.append(f"{what} p50 {times[0]:.2f} ms, p99 {times[1]:.2f} ms")
        if key == "pause_ms":
            medians = {
                step: value.get("p50")
                for step in ("stop", "drain", "find", "copy", "encode", "state", "resume")
                if isinstance(value := primary.get(f"{step}_ms"), dict)
            }
            if medians and all(isinstance(value, float) for value in medians.values()):
                parts.append("of it " + ", ".join(f"{step} {value:.2f}" for step, value in medians.items()))
    if primary.get("tracking") == "kernel":
        parts.append("pages found by the kernel")
    elif primary.get("tracking_why"):
        parts.append(f"pages found by comparison: {primary['tracking_why']}")
    if primary.get("capture") == "encode":
        parts.append("pages encoded in the pause")
    elif primary.get("capture_why"):
        parts.append(f"pages copied: {primary['capture_why']}")
    if primary.get("compression") in ("lz4", "zstd") and isinstance(why := primary.get("compression_why"), str):
        parts.append(f"compressed by {primary['compression']} ({why})")
    frames = [primary.get(f"{what}_frames") for what in ("held", "released")]
    if all(isinstance(count, int) for count in frames):
        parts.append(f"{frames[0]} frames held, {frames[1]} released")
        latency = primary.get("output_latency_ms")
        times = [latency.get(part) for part in ("p50", "p99")] if isinstance(latency, dict) else [None]
        if all(isinstance(value, float) for value in times):
            parts.append(f"output up to {times[0]:.0f} ms late, p99 {times[1]:.0f} ms")
    if primary.get("missed_pages"):
        parts.append(f"missed {primary['missed_pages']} pages")
    return parts


def _holder(url: str, name: str, tls_dir: Path | None, insecure: bool) -> str:
    """The address of the backup of a fleet that has a name. Raises LogError, NoCheckpoint."""
    from remus_ckpt.fleet.group import Fleet

    brokers, tls = fleet_of(url, tls_dir, insecure)
    fleet = Fleet(brokers, tls=tls, insecure=insecure)
    try:
        place, _ = fleet.place(name)
        if place is None:
            raise NoCheckpoint(f"no backup of the fleet has {name!r}")
        backup = fleet.backup(place.backup)
    finally:
        fleet.close()
    return place.address if backup is None else backup.addresses[0]


@app.command(short_help="Promote a backup by hand.")
def failover(
    name: Annotated[str, typer.Option(metavar="NAME", help="Name to take over.")],
    source: Source,
    fence: Annotated[
        bool,
        typer.Option(
            "--fence",
            help="Run the backup's --fence command first. Without this, you vouch that the primary has stopped.",
        ),
    ] = False,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Promote a backup now. From then on it refuses the old primary; it also runs its --on-failover command.

    Example: remus-ckpt failover --name orders --from tls://backup:7411 --tls-dir keys/me

    Example: remus-ckpt failover --name orders --from nats://broker-1 --tls-dir keys/me
    """
    arguments = {"name": name_of(name), "fence": fence}
    from remus_ckpt.fleet.group import is_fleet
    from remus_ckpt.link.control import ask

    if is_fleet(source):
        source = _holder(source, name, tls_dir, insecure)
    report = ask(dial(source, tls_dir, insecure), "failover", arguments)
    if as_json:
        print_json(report)
        return
    out.print(Text(f"{name}: promoted under term {report['term']} at epoch {report['epoch']}"))
    out.print(Text(f"memory: {report['image']}\ndevice state: {report['device_state']}"))
    again = f"remus-ckpt protect {report['image']} --term {report['term']} …"
    out.print(Text(f"to protect it again on another backup: {again} (on this one: --term {report['term'] + 1})"))
