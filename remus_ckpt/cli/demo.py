"""The command that shows what the package is for."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, app, is_time, parse_duration, print_json
from remus_ckpt.cli.terminal import out


@app.command(short_help="Protect a worker, kill it, and watch the backup take over.")
def demo(
    vm: Annotated[
        bool,
        typer.Option("--vm", help="With a virtual machine in QEMU in place of the worker. Needs root."),
    ] = False,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", help="With brokers, two backups and several processes. Needs nats-server."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.5, max=600, help="How long the worker runs before it is killed.")
    ] = 3.0,
    interval: Annotated[str, typer.Option(metavar="TIME", callback=is_time, help="Time between pauses.")] = "25ms",
    directory: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Keep the store in this folder. Not with --vm or --fleet."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Seed for the worker and for the moment of the kill.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Protect a real worker over TLS, kill it and its primary at a random moment, let the backup take over, and check
    that nothing committed was lost.

    With --vm, two hosts are made of network namespaces. A virtual machine runs on one; that host is killed, and the
    machine continues on the other. It is protected again, and the second host is killed too. A client checks every byte
    over one connection.

    Example: remus-ckpt demo --seconds 5

    With --fleet, three brokers, two backups and four processes are started, and the processes are protected by name.
    One backup is killed: about 15 s later, the other protects all of them.

    Example: sudo remus-ckpt demo --vm

    Example: remus-ckpt demo --fleet
    """
    interval_s = parse_duration(interval)
    if vm and fleet:
        raise typer.BadParameter("--vm or --fleet, not both")
    if (vm or fleet) and directory is not None:
        raise typer.BadParameter("--keep is not for --vm and --fleet: their stores are removed")

    def say(text: str) -> None:
        if not as_json:
            out.print(Text(text))

    # As after Ctrl-C, the processes that the demo started are ended.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if vm:
            from remus_ckpt.demo.vm import run_vm_demo

            report = run_vm_demo(seconds=seconds, interval=interval, seed=seed, say=say)
        elif fleet:
            from remus_ckpt.demo.fleet import run_fleet_demo

            report = run_fleet_demo(seconds=seconds, interval=interval, seed=seed, say=say)
        else:
            from remus_ckpt.demo import run_demo

            report = run_demo(seconds=seconds, interval_s=interval_s, directory=directory, seed=seed, say=say)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(report)
