"""The commands of the two services, backup and protect, and their demo."""

from __future__ import annotations

import resource
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remus_ckpt.cli.config import ConfigFile, Configurable, begin
from remus_ckpt.cli.options import (
    AllowFailover,
    ArchiveAt,
    DashboardAt,
    DashboardToken,
    Insecure,
    KeepAge,
    KeepCount,
    KeepFree,
    KeepSize,
    KeepTiers,
    LogAt,
    Logs,
    MaxMemory,
    MetricsAt,
    Realtime,
    Recipients,
    TlsDir,
    address_of,
    app,
    fleet_of,
    is_time,
    log_of,
    name_of,
    parse_duration,
    retention_of,
    stop_on_signals,
    takes,
)
from remus_ckpt.cli.protection import Protection, protect_source
from remus_ckpt.cli.serving import (
    check_dashboard,
    check_metrics,
    realtime_threads,
    serve_dashboard,
    serve_metrics,
    watchdog,
)
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.observe.systemd import notify
from remus_ckpt.session.messages import MAX_LEASE_S, MIN_LEASE_S

if TYPE_CHECKING:
    from remus_ckpt.service.guest import Guest
    from remus_ckpt.service.reprotect import Elsewhere
    from remus_ckpt.source import Source
    from remus_ckpt.source.cgroup import CgroupFreezer
    from remus_ckpt.source.commands import PauseCommands
    from remus_ckpt.source.processes import Processes


@app.command(cls=Configurable, short_help="Keep checkpoints from primaries and take over when they fail.")
def backup(
    listen: Annotated[
        list[str],
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on: tls://HOST:PORT or just HOST:PORT, unix:PATH, tcp://HOST:PORT. Repeatable.",
        ),
    ],
    store: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoints; created if missing.")],
    tls_dir: TlsDir = None,
    config: ConfigFile = None,
    log: LogAt = None,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Accept only this name. Repeatable. [default: any]")
    ] = None,
    warm: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Where to keep the warm copies: memory (in the store while memory has no room), disk (in the "
            "store), or a folder.",
        ),
    ] = "memory",
    lease: Annotated[
        str, typer.Option(metavar="TIME", callback=is_time, help="Silence after which a primary counts as gone.")
    ] = "5s",
    on_failover: Annotated[
        str | None,
        typer.Option(
            metavar="CMD", help="Command that starts the work here after a failover, and exits once it is running."
        ),
    ] = None,
    run_vms: Annotated[
        bool,
        typer.Option(
            "--run-vms",
            help="Keep a QEMU ready for each guest of `remus-ckpt run`, and continue the guest here after a failover.",
        ),
    ] = False,
    vm_map: Annotated[
        list[str] | None,
        typer.Option(
            metavar="THERE=HERE",
            help="Use the TAP device HERE for a guest that has THERE on the primary's host. Repeatable.",
        ),
    ] = None,
    vm_disks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to keep whole images of guests' disks. [default: .disks in the store]"),
    ] = None,
    reprotect: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Another backup, which protects a guest that has moved here as soon as it answers. Needs --run-vms.",
        ),
    ] = None,
    reprotect_interval: Annotated[
        str,
        typer.Option(
            metavar="TIME", callback=is_time, help="Minimum time between pauses of a guest that --reprotect protects."
        ),
    ] = "50ms",
    failover_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            callback=is_time,
            help="Kill an --on-failover command that takes longer, and try it again.",
        ),
    ] = "1h",
    auto_failover: Annotated[
        bool, typer.Option("--auto-failover", help="Take over when the lease expires. Needs --fence or --log.")
    ] = False,
    fence: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Command that stops the primary for good. It must exit with 0 only if that is certain. It gets 1 "
            "minute.",
        ),
    ] = None,
    keep: KeepTiers = None,
    keep_count: KeepCount = None,
    keep_age: KeepAge = None,
    keep_size: KeepSize = "16GiB",
    keep_free: KeepFree = None,
    archive: ArchiveAt = None,
    archive_recipients: Recipients = None,
    fleet: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Join the fleet of these brokers, where primaries find this backup: nats://HOST[:PORT][,HOST…]. "
            "Needs the extra remus_ckpt[fleet].",
        ),
    ] = None,
    advertise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address at which the fleet's primaries reach this backup. Repeatable. [default: as --listen, "
            "with this host's name for 0.0.0.0]",
        ),
    ] = None,
    max_names: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            max=5_000,
            help="Maximum number of names to keep; all of them may be connected. [default: 1000; 250 connected]",
        ),
    ] = None,
    max_memory: MaxMemory = 64,
    realtime: Realtime = False,
    metrics: MetricsAt = None,
    dashboard: DashboardAt = None,
    dashboard_token: DashboardToken = None,
    allow_failover: AllowFailover = False,
    log_format: Logs = "text",
    insecure: Insecure = False,
) -> None:
    """Store every checkpoint that primaries commit, and keep a warm copy of their memory.

    The commands of --on-failover and --fence run in a shell. Both get REMUS_NAME, REMUS_EPOCH and REMUS_TERM;
    --on-failover also gets the files REMUS_IMAGE and REMUS_DEVICE_STATE. --fence also gets the last primary:
    REMUS_PEER_HOST (empty for unix:), REMUS_PEER_PORT, REMUS_PEER_CERT (the name in its certificate), and REMUS_PEER,
    all of these in one text.

    With --run-vms, the guest continues before --on-failover runs; that command gets its QMP socket as REMUS_QMP. To
    protect the guest again: remus-ckpt protect qemu:"$REMUS_QMP" --name "$REMUS_NAME" --term "$REMUS_TERM" --to … &

    Example: remus-ckpt backup --listen 0.0.0.0:7411 --store /var/lib/remus --tls-dir keys/backup

    Example: remus-ckpt backup … --archive s3://remus-archive/site-a --archive-recipients archive.pub

    Example: remus-ckpt backup … --fleet nats://broker-1,broker-2,broker-3 --max-names 50

    Example: remus-ckpt backup … --auto-failover --fence '/etc/remus-ckpt/power-off "$REMUS_PEER_CERT"'

    Example: remus-ckpt backup … --auto-failover --log tls://nats-a,nats-b,nats-c
    """
    check_metrics(metrics)
    token = check_dashboard(dashboard, dashboard_token, allow_failover)
    places = [address_of(text, tls_dir, insecure) for text in listen]
    reached = [str(address_of(text, tls_dir, True)[0]) for text in advertise or ()]
    if fleet is not None:
        fleet_of(fleet, tls_dir, insecure)
    if auto_failover and not fence and log is None:
        raise typer.BadParameter("--auto-failover needs --fence or --log: without it, both sides could run at once")
    commit_log = log_of(log, tls_dir, insecure)
    lease_s = parse_duration(lease)
    if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
        raise typer.BadParameter(f"--lease {lease}: it must be between {MIN_LEASE_S:g}s and {MAX_LEASE_S:g}s")
    if not (takeover_timeout_s := parse_duration(failover_timeout)):
        raise typer.BadParameter("--failover-timeout 0: no command could succeed")
    from remus_ckpt.link.listener import Listener
    from remus_ckpt.observe.metrics import Metrics
    from remus_ckpt.service.backup import Backup
    from remus_ckpt.service.standby import Policy

    policy = Policy(
        lease_s=lease_s,
        automatic=auto_failover,
        commit_log=commit_log,
        fence=fence,
        on_failover=on_failover,
        run_vms=run_vms,
        vm_map=_pairs(vm_map),
        reprotect=_elsewhere(reprotect, run_vms, listen, tls_dir, insecure, reprotect_interval, log_format, log),
        vm_disks=None if vm_disks is None else vm_disks.absolute(),
        takeover_timeout_s=min(takeover_timeout_s, threading.TIMEOUT_MAX),
        retention=retention_of(keep, count=keep_count, age=keep_age, size=keep_size, free=keep_free),
        names=frozenset(map(name_of, name)) if name else None,
        **({} if max_names is None else {"max_names": max_names, "max_connections": max(2 * max_names, 256)}),
    )
    begin()
    # Before the store is created: a user who names a port in use must choose another store or another port.
    for address, tls in places:
        Listener(address, tls=tls, insecure=insecure).close()
    configure_logs(log_format)
    counted = Metrics()
    with suppress(OSError, ValueError):  # each name takes a few; we use poll, which accepts any descriptor number
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        if commit_log is not None:
            stack.callback(commit_log.close)
        serve_metrics(stack, counted, metrics, next((tls for _, tls in places if tls), None))
        service = Backup(
            store,
            [address for address, _ in places],
            tls_dir=tls_dir,
            insecure=insecure,
            policy=policy,
            limits=Limits(memory_bytes=max_memory * GIB),
            warm=warm,
            metrics=counted,
            realtime=realtime_threads(realtime),
            archive=archive,
            archive_recipients=archive_recipients,
            fleet=fleet,
            advertise=reached,
            stop=stop,
        )
        stack.callback(service.close)
        if dashboard is not None:
            from remus_ckpt.dashboard.sources import OfBackup

            serve_dashboard(stack, [OfBackup(service)], dashboard, token, allow_failover)
        print("\n".join(f"listening on {address}" for address in service.addresses), flush=True)
        notify("READY=1")
        service.run(watchdog())
        notify("STOPPING=1")


def _pairs(texts: list[str] | None) -> dict[str, str]:
    """What --vm-map says."""
    pairs = dict(text.partition("=")[::2] for text in texts or ())
    if not all(key and value for key, value in pairs.items()):
        raise typer.BadParameter("--vm-map: write it as tap0=tap7")
    return pairs


def _elsewhere(
    to: str | None,
    run_vms: bool,
    listen: list[str],
    tls_dir: Path | None,
    insecure: bool,
    interval: str,
    log_format: str,
    log: str | None,
) -> Elsewhere | None:
    """What --reprotect says."""
    if to is None:
        return None
    if not run_vms:
        raise typer.BadParameter("--reprotect needs --run-vms")
    if to in listen:
        raise typer.BadParameter(f"--reprotect {to}: that is this backup; name another one")
    address, _ = address_of(to, tls_dir, insecure)
    from remus_ckpt.service.reprotect import Elsewhere

    options = ("--interval", interval, "--log-format", log_format, *(("--log", log) if log else ()))
    return Elsewhere(str(address), tls_dir, insecure, options)


@app.command(cls=Configurable, short_help="Protect live shared memory on a backup.")
@takes(Protection)
def protect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The memory: a file in /dev/shm, or any other file that the processes have mapped; or qemu:SOCKET, "
            "the QMP socket of a QEMU.",
        ),
    ],
    pid: Annotated[
        list[int] | None, typer.Option(metavar="PID", min=1, help="A process that writes to the memory. Repeatable.")
    ] = None,
    cgroup: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of --pid: the cgroup (v2) that holds all writers."),
    ] = None,
    pause: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Instead of --pid: command that stops all writers. Needs --resume."),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="CMD", help="Command that resumes the writers.")] = None,
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", callback=is_time, help="Stop after this long. [default: until Ctrl-C]")
    ] = None,
    *,
    options: Protection,
) -> None:
    """Protect shared memory: send checkpoints to a backup until Ctrl-C, or until all writers have exited.

    If the link breaks, this command reconnects; meanwhile the processes keep running and nothing is committed. If
    another side has taken over, it runs the --on-fenced command and stops with exit code 22: output that still waits
    for a commit must never be released. The --on-fenced command gets REMUS_NAME, REMUS_TERM (of the takeover),
    REMUS_EPOCH (the last one committed) and REMUS_PIDS (living writers, with --pid).

    Example: remus-ckpt protect /dev/shm/orders --pid 4711 --to tls://backup:7411 --tls-dir keys/orders --name orders

    Example: remus-ckpt protect … --on-fenced 'systemctl stop orders'

    Example: remus-ckpt protect … --log tls://nats-a,nats-b,nats-c

    Example: remus-ckpt protect qemu:/run/web.qmp --to tls://backup:7411 --tls-dir keys/web --name web
    """
    is_guest = file.startswith("qemu:")
    if not is_guest:
        _check_writers(pid, cgroup, pause, resume)
    elif pid or cgroup or pause or resume:
        raise typer.BadParameter("qemu: stops QEMU through QMP: leave out --pid, --cgroup, --pause and --resume")
    duration_s = None if duration is None else parse_duration(duration)
    options.check()
    begin()

    def open_source() -> tuple[Source, Guest | None]:
        if is_guest:
            from remus_ckpt.service.guest import Guest

            guest = Guest.attach(file.removeprefix("qemu:"))
            return guest.source(tracking=options.tracking, audit=options.audit), guest
        from remus_ckpt.source.shared_file import SharedFile

        stopper = _stopper(pid, cgroup, pause, resume)
        return SharedFile(file, stopper, tracking=options.tracking, audit=options.audit), None

    protect_source(open_source, options, what=file, duration_s=duration_s)


def _check_writers(pid: list[int] | None, cgroup: Path | None, pause: str | None, resume: str | None) -> None:
    if (pause is None) != (resume is None):
        raise typer.BadParameter("--pause and --resume go together")
    if sum((bool(pid), cgroup is not None, pause is not None)) != 1:
        raise typer.BadParameter("say who writes to the memory: --pid, --cgroup, or --pause and --resume")


def _stopper(
    pid: list[int] | None, cgroup: Path | None, pause: str | None, resume: str | None
) -> Processes | CgroupFreezer | PauseCommands:
    if cgroup is not None:
        from remus_ckpt.source.cgroup import CgroupFreezer

        return CgroupFreezer(cgroup)
    if pause is not None and resume is not None:
        from remus_ckpt.source.commands import PauseCommands

        return PauseCommands(pause, resume)
    from remus_ckpt.source.processes import Processes

    return Processes(pid or [])
