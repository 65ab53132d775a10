"""The commands for virtual machines."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from remus_ckpt.cli.config import Configurable, begin
from remus_ckpt.cli.options import Insecure, MaxMemory, TlsDir, address_of, app, stop_on_signals, takes, target_of
from remus_ckpt.cli.protection import Interval, Name, Protection, To, protect_source
from remus_ckpt.cli.store import At
from remus_ckpt.cli.terminal import errors

if TYPE_CHECKING:
    from remus_ckpt.service.guest import Guest
    from remus_ckpt.source import Source
    from remus_ckpt.vm.command_line import Disk

vm_app = typer.Typer(
    no_args_is_help=True, help="Start copies of protected guests, and bring their disks back.", rich_markup_mode=None
)
app.add_typer(vm_app, name="vm")

Qemu = Annotated[
    list[str], typer.Argument(metavar="-- QEMU …", help="The QEMU command line, as it is without protection.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestProtection(Protection):
    """The options for a guest; --dry-run needs neither name nor backup."""

    name: Name = ""
    to: To = ""
    interval: Interval = "50ms"


@app.command(cls=Configurable, short_help="Run a virtual machine under protection.")
@takes(GuestProtection)
def run(
    qemu: Qemu,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run, and what is changed.")] = False,
    *,
    options: GuestProtection,
) -> None:
    """Run QEMU, and keep checkpoints of its guest on a backup that can continue it.

    QEMU ends with this command, and the command ends with QEMU. If QEMU crashes or is killed, the backup takes over; if
    the guest is switched off, it does not. A backup started with --run-vms starts the guest there.

    Example: remus-ckpt run --name web --to tls://backup:7411 --tls-dir keys/web -- qemu-system-x86_64 -m 512M
    -nographic -kernel vmlinuz -initrd initrd.img
    """
    from remus_ckpt.vm.command_line import CommandLine

    line = CommandLine.parse(qemu)
    if not dry_run:
        for option, value in (("--name", options.name), ("--to", options.to)):
            if not value:
                raise typer.BadParameter(f"{option} is missing")
        options.check()
    begin()
    for change in line.changes:
        errors.print(Text(f"added {change}"))
    if dry_run:
        print(shlex.join(line.with_memory("/dev/shm/RAM", "QMP-SOCKET")))
        return

    from remus_ckpt.link.dial import connect

    target, tls = target_of(options.to, options.tls_dir, options.insecure)
    if isinstance(target, str) and line.disks:
        raise typer.BadParameter(f"--to {options.to}: a guest's disks stay with one backup: give its address")

    def open_source() -> tuple[Source, Guest | None]:
        from remus_ckpt.service.guest import Guest
        from remus_ckpt.service.guest_disks import check_own, mark_own, unmark_own

        fresh: list[Disk] = []
        if not isinstance(target, str):
            dial = partial(connect, target, tls=tls, insecure=options.insecure)
            check_own(line.disks, options.name, options.term, dial)
            fresh = mark_own(line.disks, options.name, options.to)
        try:
            guest = Guest.start(line, options.name)
        except BaseException:
            unmark_own(fresh)
            raise
        try:
            return guest.source(tracking=options.tracking, audit=options.audit), guest
        except BaseException:
            guest.close()
            raise

    protect_source(open_source, options, what=line.qemu)


@app.command("qemu-args", short_help="Print a QEMU command line whose guest can be protected.")
def qemu_args(
    command: Qemu,
    ram: Annotated[Path, typer.Option(metavar="FILE", help="The file for the guest's RAM; QEMU creates it.")] = Path(
        "/dev/shm/guest.ram"
    ),
    qmp: Annotated[
        Path, typer.Option(metavar="SOCKET", help="The socket for `remus-ckpt protect qemu:SOCKET`.")
    ] = Path("/run/guest.qmp"),
) -> None:
    """Print a QEMU command line with what protection adds, for a guest that something else starts.

    Example: remus-ckpt qemu-args --qmp /run/web.qmp -- qemu-system-x86_64 -m 512M -nographic -kernel vmlinuz
    """
    from remus_ckpt.vm.command_line import CommandLine

    line = CommandLine.parse(command)
    for change in line.changes:
        errors.print(Text(f"added {change}"))
    print(shlex.join(line.with_memory(ram.absolute(), qmp.absolute())))


@vm_app.command(short_help="Start a copy of a guest from any checkpoint.")
def start(
    store: Annotated[
        str, typer.Argument(metavar="store:DIR/NAME", help="The guest, or tls://HOST:PORT/NAME (unix:…) on a backup.")
    ],
    at: At = None,
    net: Annotated[Literal["none"], typer.Option(help="What the copy's network is connected to.")] = "none",
    paused: Annotated[bool, typer.Option("--paused", help="Start it paused.")] = False,
    qmp: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="Socket for controlling the copy's QEMU. [default: none]")
    ] = None,
    vm_disks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of disk images, as given to the backup. [default: in the store]"),
    ] = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Start a copy of a guest as it was at a checkpoint, beside the guest itself, until Ctrl-C or until it ends.

    The copy has its own memory and disks: nothing that it does reaches the store or the protected guest. Its first
    serial port is this terminal. If the guest writes to disks, the store must be on this machine, and must still hold
    what the disks held then.

    Example: remus-ckpt vm start store:/var/lib/remus/web --at 2026-01-31T12:00
    """
    from remus_ckpt.cli.store import is_address, open_history, parse_at
    from remus_ckpt.service.guest import Copy
    from remus_ckpt.vm.disk_image import FOLDER

    which = parse_at(at)
    history = open_history(store, tls_dir, insecure, max_memory)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        disks = None if is_address(store) else (vm_disks or history.directory.parent / FOLDER) / history.name
        copy = Copy(history, which, qmp, disks)
        stack.callback(copy.close)
        copy.go_on(paused=paused)
        state = "it is paused" if copy.is_paused else f"it runs, {copy.started_s * 1e3:.0f} ms after its start"
        errors.print(Text(f"{store}: a copy of checkpoint {copy.epoch} is QEMU process {copy.pid}; {state}"))
        copy.wait(stop)


@vm_app.command("disk-back", short_help="Bring a guest's own disk back to the survivor's.")
def disk_back(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The raw disk, on the host where the guest ran first.")],
    source: Annotated[
        str, typer.Option("--from", metavar="ADDRESS", help="The backup that took over: tls://HOST:PORT or unix:PATH.")
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the guest. [default: as noted beside the file]")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="ID", help="The id of its -drive. [default: as noted beside the file]")
    ] = None,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """After a failover, the guest's old disk is ahead of the state from which the survivor continued, and `run` refuses
    it. Shut the survivor down first; this then copies what differs, and the guest can run here again.

    Example: remus-ckpt vm disk-back web.raw --from tls://backup:7411 --tls-dir keys/web
    """
    from remus_ckpt.link.control import Requests
    from remus_ckpt.link.dial import connect
    from remus_ckpt.service.disk_back import bring_back

    address, tls = address_of(source, tls_dir, insecure)
    connection = connect(address, tls=tls, insecure=insecure)
    with Requests(connection, "control", timeout_s=10.0) as requests:
        if errors.is_terminal:
            show = lambda done, size: errors.print(f"{done / size:.0%} compared", end="\r")  # noqa: E731
        else:
            show = lambda done, size: None  # noqa: E731
        size, copied = bring_back(file, requests, name, disk, show)
    print(f"{file}: {copied:,} of {size:,} bytes were copied; the disk may be used again")
