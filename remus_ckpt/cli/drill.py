"""The command `drill`: proves that a name can be taken over from its newest checkpoint, without touching it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    Insecure,
    TlsDir,
    app,
    is_time,
    parse_duration,
    print_json,
    stop_on_signals,
    write_out,
)
from remus_ckpt.cli.store import At, open_history, parse_at, restore_image_of, time_text
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import RemusError

if TYPE_CHECKING:
    from remus_ckpt.loop import StopSignal

_READ_BYTES = 1 << 20
_POLL_S = 0.1


@app.command(short_help="Prove that a name can be restored, without touching it.")
def drill(
    store: Annotated[
        str,
        typer.Argument(
            metavar="store:DIR/NAME", help="One name in a store, or tls://HOST:PORT/NAME (unix:PATH/NAME) on a backup."
        ),
    ],
    command: Annotated[
        str | None,
        typer.Option(
            "--command",
            metavar="CMD",
            help="A shell command that tries the restored memory. It gets the variables of --on-failover, and "
            "REMUS_DRILL=1. Exit status 0 means that the memory is good.",
        ),
    ] = None,
    timeout: Annotated[
        str, typer.Option(metavar="TIME", callback=is_time, help="How long that command may take.")
    ] = "10m",
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Where to put the temporary image. [default: the system's directory for temporary files]",
        ),
    ] = None,
    at: At = None,
    max_memory: Annotated[int, typer.Option("--max-memory", metavar="GIB", min=1, help="As in restore.")] = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Restore the newest checkpoint to a temporary image, checking every byte, and let a command of yours try it.

    Nothing in the store changes, nothing is promoted, and the backup keeps receiving; the image is removed at the end.
    The exit code is 0 if the newest checkpoint is good and the command, if any, accepts it; 20 if that checkpoint is
    bad, even if an older one is good (the command then tries that one); 1 if the command refuses it.

    Examples: remus-ckpt drill store:/var/lib/remus/orders;
    remus-ckpt drill tls://backup:7411/orders --tls-dir keys/me --command '/opt/orders/check "$REMUS_IMAGE"'
    """
    limit_s = parse_duration(timeout)
    history = open_history(store, tls_dir, insecure, max_memory)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-drill-", dir=directory)))
        image, state = place / "image", place / "device-state"
        stack.enter_context(history.reading())
        begin = time.monotonic()
        entry, found, fault = restore_image_of(store, history, image, parse_at(at), as_json)
        restored_s = time.monotonic() - begin
        write_out(str(state), found.device_state)
        report: dict[str, Any] = {
            "store": store,
            "epoch": entry.epoch,
            "position": str(entry.position),
            "time_ns": entry.time_ns,
            "age_s": None if entry.time_ns is None else max(time.time_ns() - entry.time_ns, 0) / 1e9,
            "memory_bytes": found.memory_bytes,
            "restored_s": restored_s,
            "memory_sha256": _sha256(image),
            "fault": None if fault is None else str(fault),
            "command_status": None,
            "command_s": None,
        }
        if not as_json:
            age = "" if report["age_s"] is None else f" ({report['age_s']:,.1f} s ago)"
            out.print(
                Text(
                    f"{store}: checkpoint {entry.epoch}, taken {time_text(entry.time_ns)}{age}: "
                    f"{found.memory_bytes:,} bytes restored in {restored_s:.1f} s, all checked"
                )
            )
        trouble = ""
        if command is not None:
            begin = time.monotonic()
            environment = {
                "REMUS_NAME": history.name,
                "REMUS_TERM": str(history.state.term),
                "REMUS_EPOCH": str(entry.epoch),
                "REMUS_POSITION": str(entry.position),
                "REMUS_IMAGE": str(image),
                "REMUS_DEVICE_STATE": str(state),
                "REMUS_DRILL": "1",
            }
            status = _run(command, environment, limit_s, stop)
            report |= {"command_status": status, "command_s": time.monotonic() - begin}
            if status is None:
                trouble = "it was interrupted" if stop.is_set else f"it took longer than {timeout} and was killed"
            elif status:
                trouble = f"it ended with {status}"
            if not as_json and not trouble:
                out.print(Text(f"`{command}` accepts it after {report['command_s']:.1f} s"))
    if as_json:
        print_json(report | {"good": fault is None and not trouble})
    if trouble:
        raise RemusError(f"`{command}` does not accept checkpoint {entry.epoch}: {trouble}")
    if fault is not None:
        complain(f"{store}: this is not the newest checkpoint, which is bad")
        raise typer.Exit(fault.exit_code)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _run(command: str, environment: dict[str, str], limit_s: float, stop: StopSignal) -> int | None:
    """The exit status of one of the user's commands; None if it took too long or we were asked to end: it is killed."""
    from remus_ckpt.service.commands import ShellCommand

    shell = ShellCommand(command, environment)
    try:
        until = time.monotonic() + limit_s
        while (status := shell.wait(min(_POLL_S, max(until - time.monotonic(), 0.0)))) is None:
            if stop.is_set or time.monotonic() >= until:
                return None
        return status
    finally:
        shell.kill()
        shell.wait()
