"""The command that records live memory into a file."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    Audit,
    ForXen,
    HowDigested,
    HowTracked,
    HvmContext,
    MaxPause,
    app,
    codec_for,
    is_time,
    keep_apart,
    keep_what_is_there,
    parse_duration,
    start_of,
    stop_on_signals,
)
from remus_ckpt.cli.terminal import complain, errors
from remus_ckpt.errors import SourceError
from remus_ckpt.wire.xen.dialect import StreamCodec

_STILL_S = 1.0


class Stillness:
    """Notices once that no page has changed since the first checkpoint: perhaps the wrong memory is being recorded."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._is_over = False

    def lasts(self, dirty_pages: int, now: float) -> bool:
        """Call after each checkpoint, with the dirty pages its pause found and the time in seconds."""
        if self._since is None:
            self._since = now
        elif not dirty_pages and not self._is_over and now - self._since >= _STILL_S:
            self._is_over = True
            return True
        self._is_over = self._is_over or dirty_pages > 0
        return False


@app.command(short_help="Record checkpoints of live shared memory.")
def record(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The memory: a file in /dev/shm, or any other file that the processes have mapped."
        ),
    ],
    pid: Annotated[
        list[int], typer.Option(metavar="PID", min=1, help="A process that writes to the memory. Repeatable.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the stream; - for standard output.")
    ],
    interval: Annotated[str, typer.Option(metavar="TIME", callback=is_time, help="Time between pauses.")] = "25ms",
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", callback=is_time, help="Stop after this long. [default: until Ctrl-C]")
    ] = None,
    codec: Annotated[
        StreamCodec | None, typer.Option(help="How to encode changed pages. [default: delta; rle with --for xen]")
    ] = None,
    digest: HowDigested = "blake3",
    bounded: Annotated[
        bool,
        typer.Option(
            "--bounded",
            help="Use less memory: encode and write during the pause, one page buffer at a time, whatever --max-pause "
            "says.",
        ),
    ] = False,
    tracking: HowTracked = "auto",
    audit: Audit = 1000,
    max_pause: MaxPause = "25ms",
    for_: ForXen = None,
    hvm_context: HvmContext = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing stream.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record checkpoints of shared memory until Ctrl-C, until the processes end, or for --duration.

    Each pause stops every thread of every --pid, encodes or copies the dirty pages, and resumes the threads. If this
    command dies during a pause, a guard process resumes them. Only memory is recorded: not registers, files or sockets.

    Example: remus-ckpt record /dev/shm/orders --pid 4711 -o orders.remus --interval 25ms
    """
    interval_s = parse_duration(interval)
    duration_s = None if duration is None else parse_duration(duration)
    max_pause_s = parse_duration(max_pause)
    codec = codec_for(for_, codec)
    keep_apart(output, file)
    keep_what_is_there(overwrite, output)
    from remus_ckpt.files import StreamWriter
    from remus_ckpt.loop import CheckpointLoop, Totals
    from remus_ckpt.sender import Sender
    from remus_ckpt.source.processes import Processes
    from remus_ckpt.source.shared_file import SharedFile

    totals = Totals()
    failure: Exception | None = None
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        source = SharedFile(file, Processes(pid), tracking=tracking, audit=audit)
        stack.callback(source.close)
        stream = StreamWriter(output)
        stack.callback(stream.close)
        start = start_of(for_, hvm_context, output, is_only=False)
        sender = Sender(
            source.memory.pages, codec=codec, digest=digest, reference=source.tracker.restart(), shape=start
        )
        loop = CheckpointLoop(
            source,
            sender,
            stream,
            interval_s=interval_s,
            duration_s=duration_s,
            max_pause_s=max_pause_s,
            bounded=bounded,
            stop=stop,
        )
        stillness = Stillness()
        show = None
        if errors.is_terminal and not as_json:
            from rich.live import Live

            show = stack.enter_context(Live(console=errors, transient=True, refresh_per_second=8))
        try:
            for taken in loop.run():
                totals.add(taken)
                if stillness.lasts(taken.dirty_pages, time.monotonic()):
                    complain(
                        f"{file}: no page has changed since recording began: check that the processes write to "
                        "this memory and are running. Recording continues"
                    )
                if show:
                    show.update(Text(totals.line(taken)))
        except (SourceError, OSError) as error:
            failure = error
    tracker = source.tracker
    report = totals.report() | {
        "stream": output,
        "tracking": tracker.way,
        "tracking_why": tracker.why,
        "missed_pages": tracker.missed_pages,
        "encoded_in_pause": totals.encoded_in_pause,
        "ended": "failed" if failure else loop.ended,
    }
    if as_json:
        print(json.dumps(report, indent=1), file=sys.stderr if output == "-" else sys.stdout)
    else:
        errors.print(Text(f"{stream.name}: {totals.text()}; {report['ended']}"))
    if failure is not None:
        held = f"the stream ends with checkpoint {totals.last}" if totals.checkpoints else "no checkpoint is complete"
        is_output = isinstance(failure, OSError)
        reason = failure.strerror if isinstance(failure, OSError) else failure
        raise SourceError(f"{stream.name if is_output else file}: {reason}; {held}")
