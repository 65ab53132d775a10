"""The commands of the two services: backup, protect, status, failover."""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import StrEnum
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    CodecName,
    MaxMemory,
    app,
    parse_age,
    parse_bytes,
    parse_duration,
    print_json,
)
from remus_ckpt.demo import run_demo
from remus_ckpt.errors import LinkError
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.loop import StopSignal, Totals
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.control import ask
from remus_ckpt.service.failover import MAX_LEASE_S, MIN_LEASE_S
from remus_ckpt.service.observe import Metrics, configure_logs, log, notify, watchdog_interval_s
from remus_ckpt.service.primary import MAX_WINDOW, Committed, Primary
from remus_ckpt.service.standby import Policy
from remus_ckpt.service.transport import Address, Connection, TlsFiles, check_options, connect
from remus_ckpt.source.cgroup import CgroupFreezer
from remus_ckpt.source.commands import PauseCommands
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.store import Retention
from remus_ckpt.walk import complain, errors, out
from remus_ckpt.wire.session import check_name

_LAST_WORDS_S = 10.0


class LogFormat(StrEnum):
    """How the log is written."""

    text = "text"
    json = "json"


class LevelName(StrEnum):
    """How far a checkpoint must have come on the backup to count as committed."""

    received = "received"
    durable = "durable"
    applied = "applied"


class CompressionName(StrEnum):
    """The second stage."""

    auto = "auto"
    none = "none"
    lz4 = "lz4"
    zstd = "zstd"


TlsDir = Annotated[
    Path | None, typer.Option("--tls-dir", help="A folder made by `keys issue`: ca.pem, cert.pem and key.pem.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure-plain-tcp", help="Allow tcp:// between machines: anybody can read and change it.")
]
MetricsAt = Annotated[
    str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there.")
]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="How the log on standard error is written.")]


def _name(text: str) -> str:
    try:
        return check_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _address(text: str) -> Address:
    try:
        return Address.parse(text, "tls")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _stop_on_signals(stack: ExitStack) -> StopSignal:
    stop = StopSignal()
    stack.callback(stop.close)
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
    return stop


def _dial(to: str, tls_dir: Path | None, insecure: bool) -> Connection:
    return connect(_address(to), tls=TlsFiles(tls_dir) if tls_dir else None, insecure=insecure)


@app.command(short_help="Keep the checkpoints of primaries, and take over.")
def backup(
    listen: Annotated[
        list[str],
        typer.Option(help="Where: tls://HOST:PORT (also HOST:PORT), unix:PATH, tcp://. Repeatable."),
    ],
    store: Annotated[Path, typer.Option(help="The folder that holds the checkpoints; made if it is not there.")],
    tls_dir: TlsDir = None,
    name: Annotated[list[str] | None, typer.Option(help="Take only this name. Repeatable. [default: any]")] = None,
    warm_dir: Annotated[
        Path | None, typer.Option(help="Where the warm copies lie, such as /dev/shm/remus. [default: in the store]")
    ] = None,
    lease: Annotated[str, typer.Option(help="A primary that is silent for so long is gone.")] = "5s",
    on_failover: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Starts the work here after a failover; ends once it goes on."),
    ] = None,
    auto_failover: Annotated[
        bool, typer.Option("--auto-failover", help="Take over when the lease is over. Needs --fence.")
    ] = False,
    fence: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Makes sure that the primary acts no more; exits with 0 only then."),
    ] = None,
    keep_count: Annotated[int | None, typer.Option(min=1, help="Checkpoints to keep, at least.")] = None,
    keep_age: Annotated[str | None, typer.Option(help="How long to keep checkpoints, such as 12h or 7d.")] = None,
    keep_size: Annotated[str | None, typer.Option(help="How much to keep of each name, such as 20GiB.")] = "16GiB",
    max_memory: MaxMemory = 64,
    metrics: MetricsAt = None,
    log_format: Logs = LogFormat.text,
    insecure: Insecure = False,
) -> None:
    """Keep every checkpoint that primaries commit, durably, and a warm copy of their memory.

    CMD of --on-failover and --fence run in a shell, with REMUS_NAME, REMUS_EPOCH, REMUS_TERM, and REMUS_IMAGE and
    REMUS_DEVICE_STATE (files), or REMUS_PEER.

    Example: remus-ckpt backup --listen 0.0.0.0:7411 --store /var/lib/remus --tls-dir keys/backup
    """
    addresses = [_address(text) for text in listen]
    if auto_failover and not fence:
        raise typer.BadParameter("--auto-failover needs --fence: without it, two sides may go on at once")
    lease_s = parse_duration(lease)
    if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
        raise typer.BadParameter(f"--lease {lease}: it has {MIN_LEASE_S:g}s to {MAX_LEASE_S:g}s")
    policy = Policy(
        lease_s=lease_s,
        automatic=auto_failover,
        fence=fence,
        on_failover=on_failover,
        retention=Retention(
            count=keep_count,
            age_s=parse_age(keep_age) if keep_age else None,
            bytes=parse_bytes(keep_size) if keep_size else None,
        ),
        names=frozenset(map(_name, name)) if name else None,
    )
    configure_logs(log_format.value)
    counted = Metrics()
    with suppress(OSError, ValueError):  # each name takes a few; poll is used here, which knows no highest number
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        stop = _stop_on_signals(stack)
        if metrics:
            stack.enter_context(counted.serve(metrics))
        service = Backup(
            store,
            addresses,
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
    """Tells systemd that all is well, now and then; None where it does not ask."""
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
    file: Annotated[Path, typer.Argument(help="The memory: a file in /dev/shm, or any file that is mapped.")],
    to: Annotated[str, typer.Option(help="The backup: tls://HOST:PORT, unix:PATH, or tcp:// on this machine.")],
    name: Annotated[str, typer.Option(help="Under which the backup keeps it.")],
    pid: Annotated[list[int] | None, typer.Option(min=1, help="A process that writes to it. Repeatable.")] = None,
    cgroup: Annotated[
        Path | None, typer.Option(help="In place of --pid: the cgroup (v2) that holds all who write to it.")
    ] = None,
    pause: Annotated[
        str | None, typer.Option(metavar="CMD", help="In place of --pid: stops all who write; needs --resume.")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="CMD", help="Lets them run on.")] = None,
    tls_dir: TlsDir = None,
    interval: Annotated[str, typer.Option(help="Running time between two pauses, at least.")] = "25ms",
    duration: Annotated[str | None, typer.Option(help="How long in all. [default: until Ctrl-C]")] = None,
    on_commit: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Started once; reads a line for each commit: its epoch and its digest."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, max=MAX_WINDOW, help="Checkpoints on their way at once, at most.")] = 2,
    wait: Annotated[LevelName, typer.Option(help="What counts as committed.")] = LevelName.durable,
    compression: Annotated[
        CompressionName, typer.Option(help="Of the stream on the link; auto measures link and data.")
    ] = CompressionName.auto,
    codec: Annotated[CodecName, typer.Option(help="How changed pages are written.")] = CodecName.delta,
    term: Annotated[
        int | None, typer.Option(min=0, help="The term under which this side took over (REMUS_TERM).")
    ] = None,
    metrics: MetricsAt = None,
    log_format: Logs = LogFormat.text,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Take checkpoints of shared memory and have a backup keep them, until Ctrl-C or the death of all who write.

    A lost link is made again; meanwhile the processes run on and nothing is committed. When another side has taken
    over, this one stops with exit code 22: what was held back for a commit must not be released.

    Example: remus-ckpt protect /dev/shm/orders --pid 4711 --to tls://backup:7411 --tls-dir keys/orders --name orders
    """
    interval_s = parse_duration(interval)
    duration_s = None if duration is None else parse_duration(duration)
    address = _address(to)
    _name(name)
    configure_logs(log_format.value)
    totals = Totals()
    counted = Metrics()
    with ExitStack() as stack:
        stop = _stop_on_signals(stack)
        # Ctrl-Z would leave those stopped whom a pause has stopped. A handler, for children do not inherit it.
        stack.callback(signal.signal, signal.SIGTSTP, signal.signal(signal.SIGTSTP, lambda *_: None))
        tls = TlsFiles(tls_dir) if tls_dir else None
        check_options(address, tls, insecure)
        if metrics:
            stack.enter_context(counted.serve(metrics))
        source = SharedFile(file, _stopper(pid, cgroup, pause, resume))
        stack.callback(source.close)
        if source.size % PAGE_SIZE:
            complain(f"{file}: {source.size} bytes, padded with zeros to {source.pages} pages of {PAGE_SIZE}")
        release = _Released(on_commit) if on_commit else None
        if release:
            stack.callback(release.close)
        primary = Primary(
            name,
            source,
            partial(connect, address, tls=tls, insecure=insecure),
            codec=codec.value,
            interval_s=interval_s,
            duration_s=duration_s,
            window=window,
            wait=wait.value,
            compression=compression.value,
            term=term,
            on_commit=release,
            on_turn=_watchdog(),
            metrics=counted,
            stop=stop,
        )
        stack.callback(primary.close)
        show = None
        if errors.is_terminal and not as_json:
            show = stack.enter_context(Live(console=errors, transient=True, refresh_per_second=8))
        notify("READY=1")
        try:
            for taken in primary.run():
                totals.add(taken)
                if show:
                    lag = taken.sent.epoch - primary.committed.epoch if primary.committed else 0
                    show.update(Text(f"{totals.line(taken)}  {lag} not yet committed"))
        finally:
            notify("STOPPING=1")
            if release:
                release.hurry()
            committed = primary.committed
            report = totals.report() | {
                "name": name,
                "term": primary.term,
                "committed_epoch": committed.epoch if committed else None,
                "committed_position": f"{committed.epoch} {committed.digest.hex()}" if committed else None,
                "ended": primary.ended or "failed",
            }
            if as_json:
                print_json(report)
            else:
                last = f"committed up to epoch {committed.epoch}" if committed else "nothing committed"
                errors.print(Text(f"{name}: {totals.text()}; {last}; {report['ended']}"))
    if release and release.has_failed:
        raise typer.Exit(1)
    if committed is None and primary.ended != "stopped":
        raise LinkError(f"{to}: nothing was committed: {file} is as unprotected as before")


def _stopper(
    pid: list[int] | None, cgroup: Path | None, pause: str | None, resume: str | None
) -> Processes | CgroupFreezer | PauseCommands:
    if (pause is None) != (resume is None):
        raise typer.BadParameter("--pause and --resume go together")
    if sum((bool(pid), cgroup is not None, pause is not None)) != 1:
        raise typer.BadParameter("say who writes to it: --pid, or --cgroup, or --pause and --resume")
    if cgroup is not None:
        return CgroupFreezer(cgroup)
    if pause is not None and resume is not None:
        return PauseCommands(pause, resume)
    return Processes(pid or [])


class _Released:
    """The user's command, which reads a line for each commit.

    It may be slow: checkpoints wait for it then. Once the end has come it has ten seconds for what it has not read.
    """

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)
        self._deadline = math.inf
        self._lost: int | None = None
        self.has_failed = False

    def __call__(self, committed: Committed) -> None:
        if self._lost is None and not self._write(f"{committed.epoch} {committed.position.digest.hex()}\n".encode()):
            self._lost = committed.epoch
            log("the command of --on-commit takes no more: nothing is released", level=ERROR, epoch=committed.epoch)

    def _write(self, line: bytes) -> bool:
        poll = select.poll()
        poll.register(self._pipe.fileno(), select.POLLOUT)
        while time.monotonic() < self._deadline:
            try:
                os.write(self._pipe.fileno(), line)  # a line is less than PIPE_BUF: all of it or nothing
                return True
            except BlockingIOError:
                poll.poll(100)
            except BrokenPipeError:
                return False
        return False

    def hurry(self) -> None:
        """The end has come."""
        self._deadline = time.monotonic() + _LAST_WORDS_S

    def close(self) -> None:
        """No more comes; wait for it to end."""
        self._pipe.close()
        try:
            status = self._process.wait(max(self._deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            complain("the command of --on-commit does not end: it is killed")
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            status = self._process.wait()
        if status:
            complain(f"the command of --on-commit ended with status {status}")
        if self._lost is not None:
            complain(f"commits from epoch {self._lost} on were not given to the command of --on-commit")
        self.has_failed = bool(status) or self._lost is not None


@app.command(short_help="Say how a backup and its primaries are.")
def status(
    source: Annotated[str, typer.Option("--from", help="The backup: tls://HOST:PORT, unix:PATH, tcp://HOST:PORT.")],
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print, for each name, what the backup and its primary say of themselves.

    Example: remus-ckpt status --from tls://backup:7411 --tls-dir keys/me
    """
    report = ask(_dial(source, tls_dir, insecure), "status", {})
    if as_json:
        print_json(report)
        return
    if not report["names"]:
        out.print("nothing is protected here yet")
    for name, found in report["names"].items():
        out.print(Text("\n".join(_tell(name, found))))


def _tell(name: str, found: dict[str, Any]) -> list[str]:
    """One name, for people."""
    primary = found["primary"]
    silent = found["silent_s"]
    where = f"connected to {found['peer']}" if found["connected"] else "no primary connected"
    if silent is not None and not found["connected"]:
        where += f", silent for {silent:.1f} s"
    lines = [
        f"{name}: {found['role']}, term {found['term']}, epoch {found['epoch']}, position {found['position']}; {where}"
    ]
    if primary:
        parts = [f"lag {primary.get('lag_checkpoints')} checkpoints", f"dirty {primary.get('dirty_pages')} pages"]
        if primary.get("ratio"):
            parts.append(f"ratio {1 / primary['ratio']:.1%}")
        for key, what in (("pause", "pause"), ("commit_latency", "commit")):
            if primary.get(f"{key}_p50_ms") is not None:
                parts.append(f"{what} p50 {primary[f'{key}_p50_ms']:.2f} ms, p99 {primary[f'{key}_p99_ms']:.2f} ms")
        lines.append("  " + ", ".join(parts))
    lines += [f"  warning: {warning}" for warning in found["warnings"]]
    return lines


@app.command(short_help="Promote a backup by hand.")
def failover(
    name: Annotated[str, typer.Option(help="What to take over.")],
    source: Annotated[str, typer.Option("--from", help="The backup: tls://HOST:PORT, unix:PATH, tcp://HOST:PORT.")],
    fence: Annotated[
        bool, typer.Option("--fence", help="Run the backup's fencing command first; without it, you vouch for it.")
    ] = False,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Promote at once: the backup takes nothing more from the old primary, and runs its --on-failover command.

    Example: remus-ckpt failover --name orders --from tls://backup:7411 --tls-dir keys/me
    """
    arguments = {"name": _name(name), "fence": fence}
    report = ask(_dial(source, tls_dir, insecure), "failover", arguments)
    if as_json:
        print_json(report)
        return
    out.print(Text(f"{name}: promoted under term {report['term']} at epoch {report['epoch']}"))
    out.print(Text(f"memory: {report['image']}\ndevice state: {report['device_state']}"))
    again = f"remus-ckpt protect {report['image']} --term {report['term']} …"
    out.print(Text(f"to protect it from there on another backup: {again}"))


@app.command(short_help="Protect a worker, kill its side, and see the backup go on.")
def demo(
    seconds: Annotated[
        float, typer.Option(min=0.5, max=600, help="How long the worker runs before it is killed.")
    ] = 3.0,
    interval: Annotated[str, typer.Option(help="Running time between two pauses.")] = "25ms",
    directory: Annotated[Path | None, typer.Option("--keep", help="Keep the store in this folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the worker and of the instant of the kill.")] = None,
    as_json: AsJson = False,
) -> None:
    """Protect a real worker over TLS, kill its side at a random instant, let the backup take over, and prove it.

    Example: remus-ckpt demo --seconds 5
    """
    # As Ctrl-C does: those who were started are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = run_demo(
        seconds=seconds,
        interval_s=parse_duration(interval),
        directory=directory,
        seed=seed,
        say=(lambda text: None) if as_json else (lambda text: out.print(Text(text))),
    )
    if as_json:
        print_json(report)
