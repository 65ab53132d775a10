"""What `protect` and `run` share: their options, and protecting a source until it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from remus_ckpt.cli.config import ConfigFile
from remus_ckpt.cli.options import (
    AsJson,
    Audit,
    DashboardAt,
    DashboardToken,
    HowDigested,
    HowTracked,
    Insecure,
    LogAt,
    Logs,
    MaxPause,
    MetricsAt,
    Realtime,
    TlsDir,
    is_time,
    log_of,
    name_of,
    parse_duration,
    print_json,
    stop_on_signals,
    target_of,
)
from remus_ckpt.cli.serving import (
    check_dashboard,
    check_metrics,
    realtime_threads,
    serve_dashboard,
    serve_metrics,
    watchdog,
)
from remus_ckpt.cli.terminal import complain, errors
from remus_ckpt.errors import Fenced, LinkError
from remus_ckpt.limits import MAX_WINDOW
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.observe.systemd import notify
from remus_ckpt.session.messages import Compression, Level
from remus_ckpt.wire.xen.dialect import StreamCodec

if TYPE_CHECKING:
    from rich.live import Live

    from remus_ckpt.service.guest import Guest
    from remus_ckpt.source import Source

Interval = Annotated[
    str, typer.Option("--interval", metavar="TIME", callback=is_time, help="Minimum time between pauses.")
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Name for this memory on the backup.")]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="ADDRESS",
        help="The backup: tls://HOST:PORT, unix:PATH, or tcp://HOST:PORT on this machine. In a fleet: "
        "nats://HOST[:PORT][,HOST…]/NAME.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How to protect a source, as options of the command line."""

    name: Name = ""
    to: To
    tls_dir: TlsDir = None
    config: ConfigFile = None
    log: LogAt = None
    interval: Interval = "25ms"
    on_commit: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Command that runs throughout and reads one line per commit: epoch and digest. If it exits, "
            "protection stops.",
        ),
    ] = None
    on_fenced: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Command that stops the work here. It runs before anything else when another side has taken "
            "over (a guest's QEMU is killed even before that), and gets 2 minutes.",
        ),
    ] = None
    window: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=MAX_WINDOW, help="Maximum number of checkpoints in flight.")
    ] = 2
    wait: Annotated[Level, typer.Option(help="What counts as committed.")] = "durable"
    compression: Annotated[
        Literal["auto", Compression],
        typer.Option(help="How to compress the stream on the link; auto measures the link and the data."),
    ] = "auto"
    codec: Annotated[StreamCodec, typer.Option(help="How to encode changed pages.")] = "delta"
    digest: HowDigested = "blake3"
    tracking: HowTracked = "auto"
    audit: Audit = 1000
    max_pause: MaxPause = "25ms"
    term: Annotated[
        int | None,
        typer.Option(
            metavar="TERM",
            min=0,
            help="To continue after a failover: the term it printed (REMUS_TERM) for another backup, or that term plus "
            "one for the same backup.",
        ),
    ] = None
    realtime: Realtime = False
    metrics: MetricsAt = None
    dashboard: DashboardAt = None
    dashboard_token: DashboardToken = None
    log_format: Logs = "text"
    insecure: Insecure = False
    as_json: AsJson = False

    def __post_init__(self) -> None:
        from remus_ckpt.fleet.group import is_fleet, split_fleet

        named = split_fleet(self.to)[1] if is_fleet(self.to) else None
        if named is not None and self.name not in ("", named):
            raise typer.BadParameter(f"--name {self.name} is not the name in --to {self.to}")
        if named is not None:
            object.__setattr__(self, "name", named)

    def check(self) -> None:
        """Refuse contradictory options as a usage error, before anything is touched."""
        if not self.name:
            raise typer.BadParameter("--name is missing")
        check_metrics(self.metrics)
        check_dashboard(self.dashboard, self.dashboard_token)
        target_of(self.to, self.tls_dir, self.insecure)
        log_of(self.log, self.tls_dir, self.insecure)
        name_of(self.name)


def protect_source(
    open_source: Callable[[], tuple[Source, Guest | None]],
    options: Protection,
    *,
    what: str,
    duration_s: float | None = None,
) -> None:
    """Protect a source until it ends, or the user ends it.

    open_source: returns the source, and its guest if it is one; both are closed here
    options: already checked
    what: the thing protected, for messages
    duration_s: how long, None until something ends it
    """
    name = options.name
    interval_s, max_pause_s = parse_duration(options.interval), parse_duration(options.max_pause)
    target, tls = target_of(options.to, options.tls_dir, options.insecure)
    from remus_ckpt.loop import Totals
    from remus_ckpt.observe.metrics import Metrics
    from remus_ckpt.service.fenced import FencedCommand
    from remus_ckpt.service.protect import primary_of
    from remus_ckpt.service.release import ReleaseCommand

    configure_logs(options.log_format)
    totals = Totals()
    counted = Metrics()
    counted.set_connected(name, False)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        # Ctrl-Z during a pause would leave the paused processes stopped. A handler, because children do not inherit it.
        stack.callback(signal.signal, signal.SIGTSTP, signal.signal(signal.SIGTSTP, lambda *_: None))
        serve_metrics(stack, counted, options.metrics, tls)
        commit_log = log_of(options.log, options.tls_dir, options.insecure)
        if commit_log is not None:
            stack.callback(commit_log.close)
        source, guest = open_source()
        if guest is not None:
            stack.callback(guest.close)
            if guest.network is not None:
                counted.watch_output(name, guest.network.output)
        stack.callback(source.close)
        release = ReleaseCommand(name, options.on_commit, stop, complain) if options.on_commit else None
        if release:
            stack.callback(release.close)
        beat = watchdog()
        fenced: Callable[[Fenced], None] | None = None
        if options.on_fenced:
            fenced = FencedCommand(
                name,
                options.on_fenced,
                epoch=lambda: primary.committed.epoch if primary.committed else None,
                pids=lambda: [process.pid for process in source.processes()],
                on_turn=beat,
            )
        if guest is not None:
            fenced = guest.killed_before(fenced)
        show: Live | None = None

        def turn() -> None:
            if beat is not None:
                beat()
            if show is not None and (copying := primary.copying) is not None:
                show.update(Text(copying.line(time.monotonic())))

        primary = primary_of(
            source,
            name,
            target,
            tls=tls,
            insecure=options.insecure,
            codec=options.codec,
            interval_s=interval_s,
            duration_s=duration_s,
            max_pause_s=max_pause_s,
            window=options.window,
            wait=options.wait,
            compression=options.compression,
            digest=options.digest,
            term=options.term,
            commit_log=commit_log,
            on_commit=release if guest is None else guest.released_before(release),
            on_turn=turn,
            on_fenced=fenced,
            metrics=counted,
            realtime=realtime_threads(options.realtime),
            stop=stop,
        )
        stack.callback(primary.close)
        if options.dashboard is not None:
            from remus_ckpt.dashboard.sources import OfPrimary
            from remus_ckpt.store.remote import Remote

            def history() -> Remote:
                return Remote(f"{primary.address or target}/{name}", tls_dir=options.tls_dir, insecure=options.insecure)

            page = OfPrimary(primary, counted, str(target), history)
            token = check_dashboard(options.dashboard, options.dashboard_token)
            serve_dashboard(stack, [page], options.dashboard, token)
        if errors.is_terminal and not options.as_json:
            from rich.live import Live

            show = stack.enter_context(Live(console=errors, transient=True, refresh_per_second=8))
        notify("READY=1")
        try:
            for taken in primary.run() if guest is None else guest.protected_by(primary, stop, turn):
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
            if options.as_json:
                print_json(report)
            else:
                last = f"committed up to epoch {committed.epoch}" if committed else "nothing committed"
                taken_text = totals.text() if totals.checkpoints else "no checkpoint taken"
                errors.print(Text(f"{name}: {taken_text}; {last}; {ended}"))
    if release and release.has_failed:
        raise typer.Exit(1)
    if committed is None and primary.ended != "stopped":
        raise LinkError(f"{options.to}: nothing was committed: {what} is not protected")
