"""The application that the commands register with, and the options they share."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from remus_ckpt.errors import LinkError, RemusError
from remus_ckpt.limits import GIB, KIB, MIB
from remus_ckpt.wire.xen.dialect import Dialect, Guest, StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.link.address import Address
    from remus_ckpt.link.tls import TlsFiles
    from remus_ckpt.loop import StopSignal
    from remus_ckpt.store import Retention

app = typer.Typer(rich_markup_mode=None)
"""Every command registers here; `remus_ckpt.cli` lists them for the help."""


Stream = Annotated[
    str, typer.Argument(help="A stream, or - for standard input. May be compressed with xz, zstd, lz4, gzip or bzip2.")
]
HowTracked = Annotated[
    Literal["auto", "kernel", "compare"],
    typer.Option(
        "--tracking",
        help="How to find changed pages: auto asks the kernel (Linux 6.7 or later) and compares where it cannot know; "
        "kernel fails where it cannot know; compare always compares.",
    ),
]
Audit = Annotated[
    int,
    typer.Option(
        "--audit",
        metavar="COUNT",
        min=0,
        help="Compare all memory at every COUNT-th pause too; if the kernel missed a page, always compare from then "
        "on. 0: never audit.",
    ),
]
KeepTiers = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="TIERS",
        help="Keep the first checkpoint of each period, such as hourly=48,daily=30: of the newest 48 hours and 30 days "
        "that have any, in UTC. Also minutely, weekly, monthly, yearly.",
    ),
]
KeepFree = Annotated[
    str | None,
    typer.Option("--keep-free", metavar="SIZE", help="Remove the oldest until this much of the disk is free."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse the deviations listed in specs/permissive.md.")]
WordOption = Annotated[
    int | None, typer.Option("--word", help="Word size of the toolstack: 8 or 4 bytes. [default: detected]")
]
GuestOption = Annotated[Guest | None, typer.Option("--guest", help="Kind of guest. [default: detected]")]
CodecOption = Annotated[StreamCodec | None, typer.Option("--codec", help="Page codec. [default: detected]")]
TlsDir = Annotated[
    Path | None,
    typer.Option("--tls-dir", metavar="DIR", help="Folder made by `keys issue`, with ca.pem, cert.pem and key.pem."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure-plain-tcp",
        help="Allow tcp:// between machines. Anyone on the network can then read and change the data.",
    ),
]
MaxMemory = Annotated[int, typer.Option("--max-memory", metavar="GIB", min=1, help="Refuse memory larger than this.")]


def address_of(text: str, tls_dir: Path | None, insecure: bool) -> tuple[Address, TlsFiles | None]:
    """Where to connect or to listen, and our certificate. Options that contradict each other are a usage error."""
    from remus_ckpt.link.address import Address, check_options
    from remus_ckpt.link.tls import TlsFiles

    with usage():
        address = Address.parse(text, "tls")
        if address.scheme == "tls" and tls_dir is None:
            check_options(address, None, insecure)
    tls = TlsFiles(tls_dir) if tls_dir else None
    with usage():
        check_options(address, tls, insecure)
    return address, tls


@contextmanager
def usage() -> Iterator[None]:
    """An address or a name that cannot be meant is a usage error."""
    try:
        yield
    except (LinkError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def keep_apart(output: str, *inputs: str | Path) -> None:
    """Refuse to write to an input, or to one file twice."""
    for path in map(str, inputs):
        if "-" in (output, path) or (os.path.exists(path) and not os.path.isfile(path)):
            continue
        is_one = os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path)
        if is_one or os.path.abspath(output) == os.path.abspath(path):
            raise typer.BadParameter(f"{output} is already an input or output of this command: name another file")


def keep_what_is_there(overwrite: bool, *outputs: str | Path) -> None:
    """Refuse to overwrite a file that is not empty. Raises RemusError."""
    for path in map(str, outputs):
        if path != "-" and not overwrite and os.path.isfile(path) and os.path.getsize(path):
            raise RemusError(f"{path} already exists: name another file, or pass --overwrite")


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=1))


def dialect_of(word: int | None, guest: Guest | None, codec: StreamCodec | None) -> Dialect:
    """The dialect that the options describe."""
    if word not in (None, 4, 8):
        raise typer.BadParameter(f"--word must be 8 or 4, not {word}")
    return Dialect(word=word, guest=guest, codec=codec)  # type: ignore[arg-type]


def write_out(output: str, data: bytes) -> None:
    """Write to a file of mode 0600, or to standard output ("-")."""
    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    from remus_ckpt.files import create_private

    with open(create_private(output), "wb") as file:
        file.write(data)


_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


def parse_duration(text: str) -> float:
    """Seconds, from a number with its unit: us, ms, s, m, h or d. Every option that takes a time uses this grammar."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|d)", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a duration: write a number and a unit, such as 25ms, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def parse_bytes(text: str) -> int:
    """Bytes, from a number with its unit: 512M, 20G or 20GiB; units are powers of 1,024.

    Every option that takes a size uses this grammar.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size: write a number and a unit, such as 512M or 20G")
    return int(float(match[1]) * _BYTES[match[2]])


def retention_of(
    tiers: str | None, *, count: int | None, age: str | None, size: str | None, free: str | None
) -> Retention:
    """What the --keep options say."""
    from remus_ckpt.store.retention import TIERS, Retention

    wanted: dict[str, int] = {}
    for item in tiers.split(",") if tiers is not None else ():
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*(\d{1,9})\s*", item)
        if not match or match[1] not in TIERS or match[1] in wanted:
            raise typer.BadParameter(
                f"--keep {tiers!r}: write each tier once, as in hourly=48,daily=30; the tiers are {', '.join(TIERS)}"
            )
        wanted[match[1]] = int(match[2])
    try:
        return Retention(
            count=count,
            age_s=parse_duration(age) if age else None,
            bytes=parse_bytes(size) if size else None,
            free=parse_bytes(free) if free else None,
            **wanted,
        )
    except ValueError as error:
        raise typer.BadParameter(f"--keep {tiers!r}: {error}") from None


def stop_on_signals(stack: ExitStack) -> StopSignal:
    """A signal that is set by Ctrl-C, SIGTERM, and SIGHUP (the terminal is gone) unless SIGHUP is ignored."""
    from remus_ckpt.loop import StopSignal

    stop = StopSignal()
    stack.callback(stop.close)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # nohup
            continue
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
    return stop
