"""Reads a stream from end to end for the command line, and reports what it holds and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.text import Text

from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.compressed import Inflater
from remus_ckpt.errors import LimitExceeded, NoCheckpoint, NothingToRestore, StreamError, UnknownFormat
from remus_ckpt.files import AnyRestorer, StreamFile, read_events, restorer_of
from remus_ckpt.hashing import hashing
from remus_ckpt.limits import GIB, MAX_BATCH_ENTRIES, Limits
from remus_ckpt.pages import PAGE_SIZE, Pages, ratio
from remus_ckpt.plural import counted
from remus_ckpt.record_restorer import V2Restorer
from remus_ckpt.restorer import Anonymous, Checkpoint, Home, Restorer
from remus_ckpt.wire.digest import NewDigest
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect

Pairs = tuple[NDArray[np.int64], Pages, Pages]
"""(numbers, before, after): pages that differ, int64[n] and twice uint8[n, 4096]."""


_FRONT_BYTES = 64
"""By chance, an image may begin like a stream, but it does not continue like one for long."""


class Walk:
    """Reads a stream from end to end, and collects what to report."""

    def __init__(
        self,
        source: str | StreamFile,
        choose: Callable[[StreamFile, NewDigest], AnyRestorer],
        *,
        quiet: bool,
        is_read: bool = True,
    ) -> None:
        self._source = source
        if isinstance(source, StreamFile):
            self.name = source.name
        else:
            self.name = "standard input" if source == "-" else source
        self.restorer: AnyRestorer = Restorer()
        """Until the walk begins, one that has read nothing."""
        self.error: StreamError | None = None
        self.inflater: Inflater | None = None
        """Decompresses the file, if it is compressed."""
        self._quiet = quiet
        self._choose = choose
        self._is_read = is_read

    def events(self) -> Iterator[events.Event]:
        """Every event, up to a fault; a staged checkpoint is put in force when the next event is drawn."""
        source = self._source
        opened = source if isinstance(source, StreamFile) else StreamFile(source)
        with opened as file, hashing() as new_digest, progress(file.name, file.size, self._quiet) as advance:
            self.inflater = file.inflater
            self.restorer = self._choose(file, new_digest)
            try:
                for event in read_events(file, self.restorer):
                    advance(file.position())
                    yield event
                    if self.restorer.staged is not None:
                        self._take()
            except StreamError as error:
                self.error = error

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Every checkpoint once it is in force."""
        for _ in self.events():
            if self.restorer.staged is not None:
                yield self._take()

    @property
    def format(self) -> str:
        """The word for the format (specs/formats.md §1)."""
        if isinstance(self.restorer, V2Restorer):
            return "xen-v2"
        held = self.restorer.in_force
        return "xen" if held is None or held.record is None else "remus"

    def _take(self) -> Checkpoint:
        return self.restorer.commit() if self._is_read else self.restorer.skip()

    def summary(self, listed: list[dict[str, Any]]) -> dict[str, Any]:
        """The JSON of `inspect` and `verify`."""
        dialect, end = self.restorer.dialect, self.restorer.end
        reader, held = self.restorer.reader, self.restorer.in_force
        result: dict[str, Any] = {
            "format": self.format,
            "dialect": {"word": dialect.word, "guest": dialect.guest, "codec": dialect.codec},
            "p2m_size": len(self.restorer.memory) or None,
            "memory_bytes": None if held is None else held.memory_bytes,
            "checkpoints": listed,
            "complete": end is not None and end.complete and (self.inflater is None or self.inflater.is_whole),
            "trailing_bytes": end.trailing_bytes if end is not None else None,
            "deviations": [
                {"name": deviation.name, "offset": deviation.first_offset, "count": deviation.count}
                for deviation in reader.deviations.values()
            ],
        }
        if self.inflater is not None:
            result["compressed"] = {
                "format": self.inflater.name,
                "cut": self.inflater.is_cut,
                "padding_bytes": self.inflater.padding_bytes,
                "junk_bytes": self.inflater.junk_bytes,
            }
        if self.error is not None:
            result["error"] = {
                "kind": type(self.error).__name__,
                "message": self.error.message,
                "offset": self.error.offset,
                "section": self.error.section,
                "chunk": self.error.chunk,
            }
        elif end is not None and held is None:
            result["error"] = {
                "kind": NothingToRestore.__name__,
                "message": "the stream ends before its first checkpoint is complete",
                "offset": end.offset,
                "section": "stream.md §8.2",
                "chunk": None,
            }
        return result

    def say_how_it_ended(self) -> None:
        """Report on standard error what is wrong or missing, and which checkpoint is in force."""
        held = self.restorer.in_force
        end = self.restorer.end
        if held is not None:
            in_force = f"checkpoint {held.epoch} is the last good one"
        elif self.error is not None:
            in_force = "no checkpoint is complete"
            if not isinstance(self.error, UnknownFormat) and (self.error.offset or 0) < _FRONT_BYTES:
                in_force += "; if this is no stream but a memory image, `convert --from raw` reads it"
        elif end is not None and not end.offset:
            in_force = "there is nothing to restore: check the name, and whether what should have written it has failed"
        else:
            in_force = "there is nothing to restore: copy it again, or use an older one"
        if self.error is not None:
            raise_it = ""
            if isinstance(self.error, LimitExceeded) and self.error.limit == "memory_bytes":
                raise_it = "; raise it with --max-memory"
            complain(f"{self.name}: {self.error}{raise_it}; {in_force}")
        elif self.inflater is not None and self.inflater.is_cut:
            complain(f"{self.name}: the compressed file is cut off{_after(end)}; {in_force}")
        elif self.inflater is not None and self.inflater.junk_bytes:
            follow = counted(self.inflater.junk_bytes, "byte", "follow")
            complain(f"{self.name}: {follow} the compressed data; {in_force}")
        elif end is not None and not end.complete:
            trailing = end.trailing_bytes
            reader = self.restorer.reader
            if not end.offset:
                complain(f"{self.name}: it is empty; {in_force}")
            elif reader.saw_last_checkpoint:
                complain(f"{self.name}: {counted(trailing, 'byte', 'follow')} the last checkpoint; {in_force}")
            else:
                complain(f"{self.name}: cut off {counted(trailing, 'byte')} into checkpoint {reader.epoch}; {in_force}")
        if self.inflater is not None and self.inflater.padding_bytes and not self.inflater.junk_bytes:
            complain(f"{self.name}: {counted(self.inflater.padding_bytes, 'zero byte', 'pad')} the compressed data")

    @property
    def exit_code(self) -> int | None:
        """The code of the fault, or the one for a stream without a checkpoint; None if all is well."""
        if self.error is not None:
            return self.error.exit_code
        if self.restorer.in_force is None and self.restorer.end is not None:
            return NothingToRestore.exit_code
        return None

    def fail_unless_good(self) -> None:
        """Exit with the code of the fault; return if all is well."""
        if self.exit_code is not None:
            raise typer.Exit(self.exit_code)


class _Unread(Anonymous):
    """A home for memory that is never read: it has the right size, but is never written."""

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        """Does nothing."""


def walk_stream(
    source: str | StreamFile,
    dialect: Dialect,
    max_memory: int,
    *,
    strict: bool = False,
    quiet: bool = False,
    home: Home | None = None,
    is_read: bool = True,
    is_legacy: bool = False,
) -> Walk:
    """A walk over a stream, not yet begun.

    source: a path, or the file as opened, which the walk closes
    max_memory: in GiB
    home: where memory lives; by default in this process
    is_read: whether memory will be read; if not, everything is checked, but no page is kept
    is_legacy: treat it as a legacy stream, whatever its first bytes say
    """
    limits = Limits(memory_bytes=max_memory * GIB)
    kept = home if is_read else _Unread()
    return Walk(
        source,
        lambda file, new_digest: (
            Restorer(dialect, limits=limits, strict=strict, home=kept, new_digest=new_digest)
            if is_legacy
            else restorer_of(file, dialect, limits=limits, strict=strict, home=kept, new_digest=new_digest)
        ),
        quiet=quiet,
        is_read=is_read,
    )


def _after(end: events.EndOfStream | None) -> str:
    return "" if end is None else f" after {end.offset:,} bytes of stream"


def list_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` and `verify` report about each checkpoint, for JSON."""
    return {
        "epoch": checkpoint.epoch,
        "start": checkpoint.start,
        "end": checkpoint.end,
        "batches": checkpoint.batches,
        "entries": checkpoint.entries,
        "pages": checkpoint.page_count,
        "compressed_chunks": checkpoint.compressed_chunks,
        "compressed_bytes": checkpoint.compressed_bytes,
    }


def detail_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` adds to that."""
    details: dict[str, Any] = {
        "ratio": ratio(checkpoint.end - checkpoint.start, checkpoint.page_count * PAGE_SIZE),
        "parameters": checkpoint.parameters,
    }
    if checkpoint.vcpus is not None:
        details["vcpus"] = checkpoint.vcpus.ids()
    tail = checkpoint.tail
    if isinstance(tail, events.TailHvm):
        details["tail"] = {
            "guest": "hvm",
            "offset": tail.offset,
            "context_bytes": len(tail.context),
            "signature": tail.signature.value.decode(),
            "device_state_bytes": len(checkpoint.device_state),
        }
    elif isinstance(tail, events.TailPv):
        details["tail"] = {
            "guest": "pv",
            "offset": tail.offset,
            "vcpus": [vcpu.id for vcpu in tail.vcpus],
            "unmapped_pfns": len(tail.unmapped),
        }
    if checkpoint.record is not None:
        record = checkpoint.record
        details["record"] = {
            "time_ns": record.time_ns,
            "codec": record.codec,
            "before": None if record.before is None else str(record.before),
            "after": str(record.after),
            "memory_bytes": checkpoint.memory_bytes,
        }
    return details


def print_checkpoints(listed: list[dict[str, Any]], hashes: bool) -> None:
    """Print checkpoints as a table."""
    names = ["epoch", "start", "end", "batches", "entries", "pages", "compressed_chunks", "compressed_bytes"]
    rows = [[name.replace("compressed_", "compr. ") for name in names] + ["ratio"]]
    for checkpoint in listed:
        share = ratio(checkpoint["end"] - checkpoint["start"], checkpoint["pages"] * PAGE_SIZE)
        rows.append([f"{checkpoint[name]:,}" for name in names] + ["-" if share is None else f"{share:.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        if hashes:
            line += "  " + (listed[number - 1]["memory_sha256"] if number else "memory sha256")
        out.print(Text(line))


def print_head(walk: Walk) -> None:
    """Print the dialect and the size of memory on one line."""
    dialect = walk.restorer.dialect
    pages = len(walk.restorer.memory)
    memory = f"memory {counted(pages, 'page')} ({pages * PAGE_SIZE / (1 << 20):,.1f} MiB)"
    if isinstance(walk.restorer, V2Restorer):
        reader = walk.restorer.reader
        layers = "libxl and libxc" if reader.has_libxl else "libxc"
        out.print(f"format: Xen v2, version {reader.version}, {layers}; guest {dialect.guest}; {memory}")
        return
    out.print(f"dialect: word {dialect.word}, guest {dialect.guest}, codec {dialect.codec or 'none'}; {memory}")


def shorten(value: Any) -> str:
    """A chunk's value on one line; a long list of numbers becomes ranges, of which only the first are shown."""
    if not isinstance(value, list) or len(value) < 4:
        return str(value)
    if len(set(value)) <= 3:
        return ",".join(f"{number}×{value.count(number)}" for number in sorted(set(value)))
    numbers = np.array(value)
    edges = np.flatnonzero(np.diff(numbers) != 1)
    firsts, lasts = numbers[np.append(0, edges + 1)], numbers[np.append(edges, -1)]
    parts = [f"{first}-{last}" if first != last else f"{first}" for first, last in zip(firsts, lasts, strict=True)]
    return ",".join(parts[:8]) + ("…" if len(parts) > 8 else "")


def print_details(listed: list[dict[str, Any]]) -> None:
    """Print what `inspect` adds, one line per checkpoint."""
    for row in listed:
        parts = [f"{name}={value:#x}" for name, value in row["parameters"].items()]
        if "vcpus" in row:
            parts.append(f"VCPU_INFO={row['vcpus']}")
        tail = row["tail"]
        parts.append("tail " + ", ".join(f"{name} {value}" for name, value in tail.items() if name != "guest"))
        if "record" in row:
            parts.append(f"position {row['record']['after']}")
        out.print(Text(f"checkpoint {row['epoch']}: " + "; ".join(parts)))


def print_deviations(walk: Walk) -> None:
    """Print the deviations that were accepted."""
    for deviation in walk.restorer.reader.deviations.values():
        out.print(
            f"accepted: {deviation.name}, {counted(deviation.count, 'time')}, first at byte {deviation.first_offset} "
            "(specs/permissive.md)"
        )


def differing(one: Checkpoint, other: Checkpoint) -> Iterator[Pairs]:
    """The pages that differ between two checkpoints, each in its own memory, ascending."""

    def part(memory: Pages, at: int) -> Pages:
        pages = memory[at : at + MAX_BATCH_ENTRIES]
        return np.pad(pages, ((0, size - len(pages)), (0, 0))) if len(pages) < size else pages

    count = max(len(one.memory), len(other.memory))
    for at in range(0, count, MAX_BATCH_ENTRIES):
        size = min(MAX_BATCH_ENTRIES, count - at)
        before, now = part(one.memory, at), part(other.memory, at)
        differ = np.flatnonzero((before != now).any(axis=1))
        yield at + differ, before[differ], now[differ]


def differing_pages(walk: Walk, one: int, other: int) -> tuple[Iterator[Pairs], list[int]]:
    """The pages that differ between two checkpoints, ascending, and the sizes of both in bytes.

    Exits if the stream is corrupt before them; raises NoCheckpoint if it does not hold both.
    """
    low, high = sorted((one, other))
    sizes: dict[int, int] = {}
    pfns = [np.empty(0, dtype=np.int64)]
    pages: list[Pages] = [np.empty((0, PAGE_SIZE), dtype=np.uint8)]
    is_saved = np.empty(0, dtype=bool)
    reached = None
    for _ in walk.events():
        staged = walk.restorer.staged
        if staged is None:
            continue
        if reached is not None:
            # Only pages that change after the first of the two need keeping. A v2 stream's memory grows.
            memory = staged.memory
            is_saved = np.pad(is_saved, (0, len(memory) - len(is_saved)))
            fresh = staged.pfns[~is_saved[staged.pfns]]
            is_saved[fresh] = True
            pfns.append(fresh)
            pages.append(memory[fresh])
        checkpoint = walk.restorer.commit()
        epoch = checkpoint.epoch
        sizes[epoch] = checkpoint.memory_bytes
        if epoch == low:
            reached = epoch
            is_saved = np.zeros(len(walk.restorer.memory), dtype=bool)
        if epoch == high:
            break
    else:
        walk.say_how_it_ended()
        walk.fail_unless_good()
        raise NoCheckpoint(f"{walk.name}: the stream does not hold both checkpoints, {low} and {high}")
    if reached is None:
        raise NoCheckpoint(f"{walk.name}: no checkpoint {low}")

    def pairs() -> Iterator[Pairs]:
        numbers, saved = np.concatenate(pfns), np.concatenate(pages)
        pages.clear()
        order = np.argsort(numbers)
        for start in range(0, len(order), MAX_BATCH_ENTRIES):
            part = order[start : start + MAX_BATCH_ENTRIES]
            before, now = saved[part], walk.restorer.memory[numbers[part]]
            differ = (before != now).any(axis=1)
            pair = (before[differ], now[differ])
            yield (numbers[part][differ], *(pair if one <= other else pair[::-1]))

    return pairs(), [sizes[one], sizes[other]]
