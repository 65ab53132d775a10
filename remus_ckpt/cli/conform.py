"""The commands for implementers of the format, and `check`, which shows what runs here."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, MaxMemory, Stream, app, dialect_of, print_json
from remus_ckpt.cli.terminal import out
from remus_ckpt.errors import LimitExceeded, RemusError, UnknownFormat
from remus_ckpt.wire.xen.dialect import Guest, StreamCodec


@app.command("events", short_help="Print a stream's events as JSON lines.")
def print_events(
    stream: Stream,
    strict: Annotated[bool, typer.Option("--strict", envvar="REMUS_STRICT", help="As in verify.")] = False,
    word: Annotated[
        int | None, typer.Option("--word", metavar="BYTES", envvar="REMUS_WORD", help="As in verify.")
    ] = None,
    guest: Annotated[Guest | None, typer.Option("--guest", envvar="REMUS_GUEST", help="As in verify.")] = None,
    codec: Annotated[StreamCodec | None, typer.Option("--codec", envvar="REMUS_CODEC", help="As in verify.")] = None,
    max_memory: MaxMemory = 64,
) -> None:
    """Print one JSON line per event, and the SHA-256 of memory after each checkpoint.

    This is the decoder output that the conformance suite expects (specs/conformance.md).

    Example: remus-ckpt events guest.save.xz | jq .event
    """
    from remus_ckpt.memory import memory_sha256
    from remus_ckpt.walk import walk_stream
    from remus_ckpt.wire.xen import events
    from remus_ckpt.wire.xen.describe import describe

    walk = walk_stream(stream, dialect_of(word, guest, codec), max_memory, strict=strict, quiet=True, is_legacy=True)

    def held() -> str | None:
        return None if walk.restorer.in_force is None else memory_sha256(walk.restorer.in_force.image)

    for event in walk.events():
        line = describe(event)
        if isinstance(event, events.EndOfStream):
            line["memory_sha256"] = held()
        print(json.dumps(line))
        if walk.restorer.staged is not None:
            done = walk.restorer.commit()
            line = {"offset": done.end, "event": "checkpoint", "epoch": done.epoch}
            print(json.dumps(line | {"memory_sha256": memory_sha256(done.image)}))
    if walk.error is not None:
        kind = {UnknownFormat: "unknown-format", LimitExceeded: "limit"}.get(type(walk.error), "malformed")
        where = {"offset": walk.error.offset, "event": "error", "kind": kind, "section": walk.error.section}
        print(json.dumps(where | {"message": str(walk.error), "memory_sha256": held()}))
    sys.stdout.flush()
    walk.say_how_it_ended()
    walk.fail_unless_good()


@app.command(
    "conformance",
    short_help="Test an implementation of the format.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def run_conformance(context: typer.Context) -> None:
    """Test your decoder or encoder, of streams or of a page codec alone, against the vectors (specs/conformance.md)."""
    from remus_ckpt import conformance

    raise typer.Exit(conformance.main(context.args))


@app.command(short_help="Show which codec kernel is in use and why.")
def check(
    require_native: Annotated[
        bool, typer.Option("--require-native", help="Fail if the C extension is missing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which kernel runs the codecs and why, which others are available, and which CPU features were found.

    The variable REMUS_CKPT_KERNEL requires one, such as avx2 or scalar.

    Example: REMUS_CKPT_KERNEL=avx2 remus-ckpt check
    """
    from remus_ckpt.codec import kernels
    from remus_ckpt.source.track.written import why_not

    no_tracking = why_not()
    report = kernels.report() | {"tracking": "compare" if no_tracking else "kernel", "no_tracking": no_tracking}
    if as_json:
        print_json(report)
    else:
        out.print(Text(f"kernel: {report['kernel']} ({report['why']})"))
        out.print(Text(f"available: {', '.join(report['available'])}"))
        for name, reason in report["missing"].items():
            out.print(Text(f"missing: {name}: {reason}"))
        seen = [name for name, is_seen in report["features"].items() if is_seen]
        out.print(Text(f"changed pages: found by {f'comparison ({no_tracking})' if no_tracking else 'the kernel'}"))
        out.print(Text(f"machine: {report['machine']}, CPU features {', '.join(seen) or 'not checked'}"))
    if report["kernel"] is None:
        raise RemusError(report["why"])
    if require_native and not report["built"]:
        raise RemusError(report["not_built"])
