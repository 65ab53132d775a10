"""The commands of the two services, backup and protect, and their demo."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    Audit,
    HowTracked,
    Insecure,
    KeepFree,
    KeepTiers,
    MaxMemory,
    TlsDir,
    address_of,
    app,
    parse_duration,
    print_json,
    retention_of,
    stop_on_signals,
    usage,
)
from remus_ckpt.cli.terminal import complain, errors, out
from remus_ckpt.errors import LinkError
from remus_ckpt.limits import GIB, MAX_WINDOW, Limits
from remus_ckpt.observe.log import LogFormat, configure_logs
from remus_ckpt.observe.systemd import notify, watchdog_interval_s
from remus_ckpt.session.messages import MAX_LEASE_S, MIN_LEASE_S, Compression, Level, check_name
from remus_ckpt.wire.xen.dialect import StreamCodec

if TYPE_CHECKING:
    from rich.live import Live

    from remus_ckpt.link.connection import Connection
    from remus_ckpt.link.tls import TlsFiles
    from remus_ckpt.observe.metrics import Metrics
    from remus_ckpt.source.cgroup import CgroupFreezer
    from remus_ckpt.source.commands import PauseCommands
    from remus_ckpt.source.processes import Processes


MetricsAt = Annotated[
    str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics at this address.")
]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="Format of the log on standard error.")]


def name_of(text: str) -> str:
    """A name as it may be protected. A usage error otherwise."""
    try:
        return check_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _serve_metrics(stack: ExitStack, counted: Metrics, where: str | None, tls: TlsFiles | None) -> None:
    if tls:
        counted.watch_certificate(tls.expires)
    if where:
        stack.enter_context(counted.serve(where))


def dial(to: str, tls_dir: Path | None, insecure: bool) -> Connection:
    """Connect to a backup. Raises LinkError."""
    from remus_ckpt.link.dial import connect

    address, tls = address_of(to, tls_dir, insecure)
    return connect(address, tls=tls, insecure=insecure)


def _check_metrics(where: str | None) -> None:
    if where:
        from remus_ckpt.observe.http import metrics_address

        with usage():
            metrics_address(where)


@app.command(short_help="Keep checkpoints from primaries and take over when they fail.")
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
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Accept only this name. Repeatable. [default: any]")
    ] = None,
    warm_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the warm copies, such as /dev/shm/remus. [default: in the store]"),
    ] = None,
    lease: Annotated[str, typer.Option(metavar="TIME", help="Silence after which a primary counts as gone.")] = "5s",
    on_failover: Annotated[
        str | None,
        typer.Option(
            metavar="CMD", help="Command that starts the work here after a failover, and exits once it is running."
        ),
    ] = None,
    failover_timeout: Annotated[
        str,
        typer.Option(metavar="TIME", help="An --on-failover command that takes longer is killed and tried again."),
    ] = "1h",
    auto_failover: Annotated[
        bool, typer.Option("--auto-failover", help="Take over when the lease expires. Needs --fence.")
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
    keep_count: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Minimum number of checkpoints to keep.")
    ] = None,
    keep_age: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long to keep checkpoints, such as 12h or 7d.")
    ] = None,
    keep_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How much to keep for each name, such as 20GiB.")
    ] = "16GiB",
    keep_free: KeepFree = None,
    max_memory: MaxMemory = 64,
    metrics: MetricsAt = None,
    log_format: Logs = "text",
    insecure: Insecure = False,
) -> None:
    """Store every checkpoint that primaries commit, and keep a warm copy of their memory.

    The commands of --on-failover and --fence run in a shell. Both get REMUS_NAME, REMUS_EPOCH and REMUS_TERM;
    --on-failover also gets the files REMUS_IMAGE and REMUS_DEVICE_STATE. --fence gets the last primary: REMUS_PEER_HOST
    (empty for unix:), REMUS_PEER_PORT, REMUS_PEER_CERT (the name in its certificate), and REMUS_PEER, all in one text.

    Example: remus-ckpt backup --listen 0.0.0.0:7411 --store /var/lib/remus --tls-dir keys/backup

    Example: remus-ckpt backup … --auto-failover --fence '/etc/remus-ckpt/power-off "$REMUS_PEER_CERT"'
    """
    _check_metrics(metrics)
    places = [address_of(text, tls_dir, insecure) for text in listen]
    if auto_failover and not fence:
        raise typer.BadParameter("--auto-failover needs --fence: without it, both sides could run at once")
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
        fence=fence,
        on_failover=on_failover,
        takeover_timeout_s=min(takeover_timeout_s, threading.TIMEOUT_MAX),
        retention=retention_of(keep, count=keep_count, age=keep_age, size=keep_size, free=keep_free),
        names=frozenset(map(name_of, name)) if name else None,
    )
    # Before the store is created: whoever names a port that is in use must choose another store or another port.
    for address, tls in places:
        Listener(address, tls=tls, insecure=insecure).close()
    configure_logs(log_format)
    counted = Metrics()
    with suppress(OSError, ValueError):  # each name takes a few; we use poll, which accepts any descriptor number
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        _serve_metrics(stack, counted, metrics, next((tls for _, tls in places if tls), None))
        service = Backup(
            store,
            [address for address, _ in places],
            tls_dir=tls_dir,
            insecure=insecure,
            policy=policy,
            limits=Limits(memory_bytes=max_memory * GIB),
            warm_dir=warm_dir,
            metrics=counted,
            stop=stop,
        )
        stack.callback(service.close)
        print("\n".join(f"listening on {address}" for address in service.addresses), flush=True)
        notify("READY=1")
        service.run(_watchdog())
        notify("STOPPING=1")


def _watchdog() -> Callable[[], None] | None:
    """A function that tells systemd at intervals that the service is alive; None if systemd does not ask for it."""
    interval_s = watchdog_interval_s()
    if interval_s is None:
        return None
    due = 0.0

    def beat() -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + interval_s / 2
            notify("WATCHDOG=1")

    return beat


@app.command(short_help="Protect live shared memory on a backup.")
def protect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The memory: a file in /dev/shm, or any other file that the processes have mapped."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="The backup: tls://HOST:PORT, unix:PATH, or tcp://HOST:PORT on this machine."
        ),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name for this memory on the backup.")],
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
    tls_dir: TlsDir = None,
    interval: Annotated[str, typer.Option(metavar="TIME", help="Minimum time between pauses.")] = "25ms",
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop after this long. [default: until Ctrl-C]")
    ] = None,
    on_commit: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Command that runs throughout and reads one line per commit: epoch and digest. If it exits, "
            "protection stops.",
        ),
    ] = None,
    on_fenced: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Command that stops the work here, run first of all when another side has taken over. It gets 2 "
            "minutes.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=MAX_WINDOW, help="Maximum number of checkpoints in flight.")
    ] = 2,
    wait: Annotated[Level, typer.Option(help="What counts as committed.")] = "durable",
    compression: Annotated[
        Literal["auto", Compression],
        typer.Option(help="How to compress the stream on the link; auto measures the link and the data."),
    ] = "auto",
    codec: Annotated[StreamCodec, typer.Option(help="How to encode changed pages.")] = "delta",
    tracking: HowTracked = "auto",
    audit: Audit = 1000,
    term: Annotated[
        int | None,
        typer.Option(
            metavar="TERM",
            min=0,
            help="To continue after a failover: the term it printed (REMUS_TERM) for another backup, or that term plus "
            "one for the same backup.",
        ),
    ] = None,
    metrics: MetricsAt = None,
    log_format: Logs = "text",
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Protect shared memory: send checkpoints to a backup until Ctrl-C, or until all writers have exited.

    If the link breaks, this command reconnects; meanwhile the processes keep running and nothing is committed. If
    another side has taken over, it runs the --on-fenced command and stops with exit code 22: output that waits for a
    commit must not be released. That command gets REMUS_NAME, REMUS_TERM (of the takeover), REMUS_EPOCH (the last one
    committed) and REMUS_PIDS (living writers, with --pid).

    Example: remus-ckpt protect /dev/shm/orders --pid 4711 --to tls://backup:7411 --tls-dir keys/orders --name orders

    Example: remus-ckpt protect … --on-fenced 'systemctl stop orders'
    """
    interval_s = parse_duration(interval)
    duration_s = None if duration is None else parse_duration(duration)
    _check_metrics(metrics)
    address, tls = address_of(to, tls_dir, insecure)
    name_of(name)
    from remus_ckpt.loop import Totals
    from remus_ckpt.observe.metrics import Metrics
    from remus_ckpt.service.fenced import FencedCommand
    from remus_ckpt.service.protect import primary_of
    from remus_ckpt.service.release import ReleaseCommand
    from remus_ckpt.source.shared_file import SharedFile

    configure_logs(log_format)
    totals = Totals()
    counted = Metrics()
    counted.set_connected(name, False)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        # Ctrl-Z during a pause would leave the paused processes stopped. A handler, because children do not inherit it.
        stack.callback(signal.signal, signal.SIGTSTP, signal.signal(signal.SIGTSTP, lambda *_: None))
        _serve_metrics(stack, counted, metrics, tls)
        stopper = _stopper(pid, cgroup, pause, resume)
        source = SharedFile(file, stopper, tracking=tracking, audit=audit)
        stack.callback(source.close)
        release = ReleaseCommand(name, on_commit, stop, complain) if on_commit else None
        if release:
            stack.callback(release.close)
        beat = _watchdog()
        fenced = None
        if on_fenced:
            fenced = FencedCommand(
                name,
                on_fenced,
                epoch=lambda: primary.committed.epoch if primary.committed else None,
                pids=lambda: [process.pid for process in stopper.processes() or ()],
                on_turn=beat,
            )
        show: Live | None = None

        def turn() -> None:
            if beat is not None:
                beat()
            if show is not None and (copying := primary.copying) is not None:
                show.update(Text(copying.line(time.monotonic())))

        primary = primary_of(
            source,
            name,
            address,
            tls=tls,
            insecure=insecure,
            codec=codec,
            interval_s=interval_s,
            duration_s=duration_s,
            window=window,
            wait=wait,
            compression=compression,
            term=term,
            on_commit=release,
            on_turn=turn,
            on_fenced=fenced,
            metrics=counted,
            stop=stop,
        )
        stack.callback(primary.close)
        if errors.is_terminal and not as_json:
            from rich.live import Live

            show = stack.enter_context(Live(console=errors, transient=True, refresh_per_second=8))
        notify("READY=1")
        try:
            for taken in primary.run():
                totals.add(taken)
                if show:
                    lag = taken.sent.epoch - primary.committed.epoch if primary.committed else totals.checkpoints
                    show.update(Text(f"{totals.line(taken)}  {lag} not yet committed"))
        finally:
            notify("STOPPING=1")
            if release:
                release.hurry()
            committed = primary.committed
            ended = primary.ended or "failed"
            if release and release.is_gone and ended == "stopped":
                ended = "on-commit ended"
            report = {"name": name} | primary.status() | {"ended": ended}
            if as_json:
                print_json(report)
            else:
                last = f"committed up to epoch {committed.epoch}" if committed else "nothing committed"
                taken_text = totals.text() if totals.checkpoints else "no checkpoint taken"
                errors.print(Text(f"{name}: {taken_text}; {last}; {ended}"))
    if release and release.has_failed:
        raise typer.Exit(1)
    if committed is None and primary.ended != "stopped":
        raise LinkError(f"{to}: nothing was committed: {file} is not protected")


def _stopper(
    pid: list[int] | None, cgroup: Path | None, pause: str | None, resume: str | None
) -> Processes | CgroupFreezer | PauseCommands:
    if (pause is None) != (resume is None):
        raise typer.BadParameter("--pause and --resume go together")
    if sum((bool(pid), cgroup is not None, pause is not None)) != 1:
        raise typer.BadParameter("say who writes to the memory: --pid, --cgroup, or --pause and --resume")
    if cgroup is not None:
        from remus_ckpt.source.cgroup import CgroupFreezer

        return CgroupFreezer(cgroup)
    if pause is not None and resume is not None:
        from remus_ckpt.source.commands import PauseCommands

        return PauseCommands(pause, resume)
    from remus_ckpt.source.processes import Processes

    return Processes(pid or [])


@app.command(short_help="Protect a worker, kill it, and watch the backup take over.")
def demo(
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.5, max=600, help="How long the worker runs before it is killed.")
    ] = 3.0,
    interval: Annotated[str, typer.Option(metavar="TIME", help="Time between pauses.")] = "25ms",
    directory: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep the store in this folder.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Seed for the worker and for the moment of the kill.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Protect a real worker over TLS, kill it and its primary at a random moment, let the backup take over, and check
    that nothing committed was lost.

    Example: remus-ckpt demo --seconds 5
    """
    from remus_ckpt.demo import run_demo

    # As after Ctrl-C, the processes that the demo started are ended.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report = run_demo(
            seconds=seconds,
            interval_s=parse_duration(interval),
            directory=directory,
            seed=seed,
            say=(lambda text: None) if as_json else (lambda text: out.print(Text(text))),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(report)
