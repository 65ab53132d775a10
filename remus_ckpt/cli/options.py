"""The application that the commands register with, and the options they share."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from remus_ckpt.errors import LinkError, LogError, RemusError, StreamError
from remus_ckpt.limits import GIB, KIB, MIB, Limits
from remus_ckpt.observe.log import LogFormat
from remus_ckpt.wire.qemu.sections import PAGE_SIZES
from remus_ckpt.wire.xen.dialect import Dialect, Guest, StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.fleet.engine import Log
    from remus_ckpt.link.address import Address
    from remus_ckpt.link.connection import Connection
    from remus_ckpt.link.tls import TlsFiles
    from remus_ckpt.loop import StopSignal
    from remus_ckpt.pages import Buffer
    from remus_ckpt.store import Retention
    from remus_ckpt.xen_start import StartsInXen

app = typer.Typer(rich_markup_mode=None)
"""Every command registers here; `remus_ckpt.cli` lists them for the help."""


def is_time(value: Any) -> Any:
    """For options that take a time: refuses anything else, and names the option."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if one is not None:
            parse_duration(one)
    return value


def is_size(value: str | None) -> str | None:
    """The same for options that take a size."""
    if value is not None:
        parse_bytes(value)
    return value


Stream = Annotated[
    str,
    typer.Argument(
        metavar="STREAM", help="A stream, or - for standard input. May be compressed with xz, zstd, lz4, gzip or bzip2."
    ),
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
        help="Also compare all memory at every COUNT-th pause; if the kernel missed a page, always compare from "
        "then on. 0: never audit.",
    ),
]
HowDigested = Annotated[
    Literal["blake3", "sha256"],
    typer.Option("--digest", help="The digest of each checkpoint; sha256 is for readers older than version 2 records."),
]
MaxPause = Annotated[
    str,
    typer.Option(
        "--max-pause",
        metavar="TIME",
        callback=is_time,
        help="Encode pages in the pause unless that would make it longer than this; otherwise only copy them "
        "there and encode them afterwards: a shorter pause, but a later commit. 0s: always copy.",
    ),
]
KeepTiers = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="TIERS",
        help="Keep the first checkpoint of each period: hourly=48,daily=30 means of the newest 48 hours and 30 "
        "days that have any, in UTC. Also minutely, weekly, monthly, yearly.",
    ),
]
KeepCount = Annotated[
    int | None, typer.Option("--keep-count", metavar="COUNT", min=1, help="Keep this many checkpoints.")
]
KeepAge = Annotated[
    str | None,
    typer.Option(
        "--keep-age",
        metavar="TIME",
        callback=is_time,
        help="Keep checkpoints up to this much older than the newest, such as 12h or 7d.",
    ),
]
KeepSize = Annotated[
    str | None,
    typer.Option(
        "--keep-size",
        metavar="SIZE",
        callback=is_size,
        help="Keep at most this many bytes of each name, such as 500M or 20G.",
    ),
]
KeepFree = Annotated[
    str | None,
    typer.Option(
        "--keep-free",
        metavar="SIZE",
        callback=is_size,
        help="Remove the oldest checkpoints until this much of the disk is free.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed, and why.")]
ArchiveAt = Annotated[
    str | None,
    typer.Option(
        "--archive",
        metavar="URL",
        help="Also copy closed segments to an object store: s3://BUCKET/PREFIX, gs://…, az://…, or "
        "file:///DIRECTORY. Needs the extra remus_ckpt[archive]; credentials are read from the environment.",
    ),
]
Recipients = Annotated[
    Path | None,
    typer.Option(
        "--archive-recipients",
        metavar="FILE",
        help="Encrypt archived segments for the age recipients in this file (age1…).",
    ),
]
MetricsAt = Annotated[
    str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics at this address.")
]
Realtime = Annotated[
    bool,
    typer.Option(
        "--realtime",
        help="Run the threads of a commit ahead of everything else on this machine (SCHED_FIFO), so that a busy "
        "machine does not delay commits.",
    ),
]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="Format of the log on standard error.")]
DashboardAt = Annotated[
    str | None,
    typer.Option(
        "--dashboard",
        metavar="HOST:PORT",
        help="Serve a live page at this address; a port alone is reachable from this machine only.",
    ),
]
DashboardToken = Annotated[
    Path | None,
    typer.Option(
        "--dashboard-token",
        metavar="FILE",
        help="File whose first line is the page's password, for any user name. Needed if other machines can "
        "reach the page.",
    ),
]
LogAt = Annotated[
    str | None,
    typer.Option(
        "--log",
        metavar="URL",
        help="The commit log that primaries and backups share, on NATS servers: nats://HOST[:PORT][,HOST…], or "
        "tls://… with --tls-dir. Made by `fleet init`. Needs the extra remus_ckpt[fleet].",
    ),
]
AllowFailover = Annotated[
    bool,
    typer.Option("--allow-failover", help="Give the page a failover button. Needs a token."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse the deviations listed in specs/permissive.md.")]
WordOption = Annotated[
    int | None,
    typer.Option("--word", metavar="BYTES", help="Word size of the toolstack: 8 or 4 bytes. [default: detected]"),
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
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONNECTION", help="The other connections of a QEMU multifd migration.", show_default=False),
]
SnapshotOption = Annotated[
    str | None, typer.Option("--snapshot", metavar="NAME", help="Which internal snapshot of a qcow2 image.")
]
PageSize = Annotated[
    int | None,
    typer.Option("--page-size", metavar="BYTES", help="Page size of a QEMU stream that does not state it."),
]
BlockOption = Annotated[
    str | None,
    typer.Option(
        "--block", metavar="NAME", help="Which block of a QEMU guest's memory. [default: all of it, if it is one block]"
    ),
]
ForXen = Annotated[
    Literal["xen"] | None,
    typer.Option(
        "--for",
        help="Write a stream from which a real Xen can start the guest: every page, magic PFNs, and a QEMU "
        "record. The page codec is rle.",
    ),
]
HvmContext = Annotated[
    Path | None,
    typer.Option("--hvm-context", metavar="FILE", help="The guest's HVM context, for --for xen and --to xen*."),
]
MaxMemory = Annotated[int, typer.Option("--max-memory", metavar="GIB", min=1, help="Refuse memory larger than this.")]


def takes(group: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that has each field of a dataclass as an option, and is called with all of them as its `options`.

    This way, options that commands share are written once. A field without a default is a required option.
    """
    hints = get_type_hints(group, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own if one.name != "options"]

        @functools.wraps(command)
        def flat(**given: Any) -> None:
            options = group(**{one.name: given.pop(one.name) for one in shared})
            command(**given, options=options)

        # typer reads the signature for the order and the annotations for the types.
        parameters = [*kept, *shared]
        flat.__dict__["__signature__"] = inspect.Signature(parameters)
        flat.__annotations__ = {one.name: one.annotation for one in parameters}
        return flat

    return decorate


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """The options that only machines in files have, most of them QEMU's.

    more: further connections of a multifd migration
    """

    more: Sequence[str] = ()
    snapshot: str | None = None
    page_size: int | None = None
    block: str | None = None

    def __post_init__(self) -> None:
        if self.page_size not in (None, *PAGE_SIZES):
            raise typer.BadParameter(f"--page-size is one of {', '.join(map(str, PAGE_SIZES))}")

    def refuse(self, name: str) -> None:
        """Refuse those that were given, since the file is not such a machine. Raises typer.BadParameter."""
        given = {"--snapshot": self.snapshot, "--page-size": self.page_size, "--block": self.block}
        if self.more:
            raise typer.BadParameter(
                f"{name} is not a QEMU migration stream and has no other connections: give one file"
            )
        for option, value in given.items():
            if value is not None:
                raise typer.BadParameter(f"{option} is for QEMU virtual machines, and {name} is not one")


def address_of(text: str, tls_dir: Path | None, insecure: bool) -> tuple[Address, TlsFiles | None]:
    """Where to connect or to listen, and our certificate. Contradictory options are a usage error."""
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


def log_of(url: str | None, tls_dir: Path | None, insecure: bool) -> Log | None:
    """The commit log that --log names, opened on first use. A malformed URL is a usage error."""
    if url is None:
        return None
    from remus_ckpt.fleet.opening import OpenedLog
    from remus_ckpt.link.tls import TlsFiles

    tls = TlsFiles(tls_dir) if tls_dir else None
    try:
        return OpenedLog(url, tls=tls, insecure=insecure)
    except LogError as error:
        raise typer.BadParameter(str(error)) from None


def target_of(to: str, tls_dir: Path | None, insecure: bool) -> tuple[Address | str, TlsFiles | None]:
    """The backup to connect to, or the fleet in which one is found, and our certificate."""
    from remus_ckpt.fleet.group import is_fleet, split_fleet

    return fleet_of(split_fleet(to)[0], tls_dir, insecure) if is_fleet(to) else address_of(to, tls_dir, insecure)


def fleet_of(url: str, tls_dir: Path | None, insecure: bool) -> tuple[str, TlsFiles | None]:
    """The brokers of a fleet, and our certificate."""
    from remus_ckpt.fleet.group import check_url
    from remus_ckpt.link.tls import TlsFiles

    with usage():
        check_url(url, insecure)
    return url, TlsFiles(tls_dir) if tls_dir else None


def name_of(text: str) -> str:
    """A name as it may be protected. A usage error otherwise."""
    from remus_ckpt.session.messages import check_name

    with usage():
        return check_name(text)


def dial(to: str, tls_dir: Path | None, insecure: bool) -> Connection:
    """Connect to a backup. Raises LinkError."""
    from remus_ckpt.link.dial import connect

    address, tls = address_of(to, tls_dir, insecure)
    return connect(address, tls=tls, insecure=insecure)


@contextmanager
def usage() -> Iterator[None]:
    """A malformed address or name is a usage error."""
    try:
        yield
    except (LinkError, LogError, ValueError) as error:
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
    """Refuse to overwrite a file that is not empty, and to write between the files of a store. Raises RemusError."""
    from remus_ckpt.store.state import is_history

    for path in map(str, outputs):
        if path != "-" and (held := next((one for one in Path(path).resolve().parents if is_history(one)), None)):
            raise RemusError(f"{path} is in {held}, among the files of a store: name a file elsewhere")
        if path != "-" and not overwrite and os.path.isfile(path) and os.path.getsize(path):
            raise RemusError(f"{path} already exists: name another file, or pass --overwrite")


@contextmanager
def naming_stream(stream: str | Path) -> Iterator[None]:
    """Report what is wrong with the bytes of a file under its name. Raises typer.Exit."""
    try:
        yield
    except StreamError as error:
        from remus_ckpt.cli.terminal import complain

        complain(f"{'standard input' if str(stream) == '-' else stream}: {error}")
        raise typer.Exit(error.exit_code) from None


def read_hvm_context(path: Path | None) -> bytes | None:
    """The HVM context in a file. Raises RemusError if it cannot be one."""
    if path is None:
        return None
    ceiling = Limits().hvm_context_bytes
    if not 0 < path.stat().st_size <= ceiling:
        raise RemusError(f"{path}: an HVM context has at least a HEADER and an END, and at most {ceiling:,} bytes")
    return path.read_bytes()


def start_of(for_: str | None, hvm_context: Path | None, output: str, *, is_only: bool) -> StartsInXen | None:
    """The shape of a sender's stream that `--for xen` asks for, None without it. Reports what the stream lacks."""
    if for_ is None:
        if hvm_context is not None:
            raise typer.BadParameter("--hvm-context is for --for xen: our own streams hold no HVM context")
        return None
    from remus_ckpt.cli.terminal import complain
    from remus_ckpt.xen_start import NO_CONTEXT, NO_DEVICE_STATE, StartsInXen

    context = read_hvm_context(hvm_context)
    for text in (*([] if context else [NO_CONTEXT]), NO_DEVICE_STATE):
        complain(f"{output}: {text}")
    return StartsInXen(context, is_only=is_only)


def codec_for(for_: str | None, codec: StreamCodec | None) -> StreamCodec:
    """The page codec: the one given, or the default, which is the only one for a stream that Xen starts."""
    if for_ is not None and codec == "delta":
        raise typer.BadParameter("Xen does not read the codec delta: with --for xen, give --codec rle")
    return codec or ("delta" if for_ is None else "rle")


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=1))


def dialect_of(word: int | None, guest: Guest | None, codec: StreamCodec | None) -> Dialect:
    """The dialect that the options describe."""
    if word not in (None, 4, 8):
        raise typer.BadParameter(f"--word must be 8 or 4, not {word}")
    return Dialect(word=word, guest=guest, codec=codec)  # type: ignore[arg-type]


def write_out(output: str, data: Buffer) -> None:
    """Write to a file of mode 0600, which appears once it is complete, to a device, or to standard output ("-")."""
    from remus_ckpt.relay.output import output_to

    with tidying_up(), output_to(output) as file:
        file.write([data])


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


@contextmanager
def tidying_up() -> Iterator[None]:
    """Remove an unfinished image after SIGTERM and SIGHUP too, as after Ctrl-C."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, lambda got, _: sys.exit(128 + got)))
        yield
