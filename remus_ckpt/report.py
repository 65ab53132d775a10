"""A report of a stream as one HTML file: nothing in it is loaded from elsewhere, and nothing in it runs."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.pages import PAGE_SIZE, PARTS, ratio
from remus_ckpt.recording import Recording
from remus_ckpt.service.words import say_bytes
from remus_ckpt.version import __version__

_WIDTH, _HEIGHT = 1000, 150
_BARS = 250
_FLAME = ((48, 16, 92), (120, 28, 109), (187, 55, 84), (237, 105, 37), (252, 180, 26), (252, 255, 164))
"""As on the page of the dashboard (draw.js): it grows lighter throughout, so that it reads without colour too."""
_STYLE = """
svg, img { width: 100%; height: auto; display: block; border: 1px solid var(--line); background: var(--panel); }
img { height: 16rem; image-rendering: pixelated; background: #12061f; }
svg { color: var(--one); }
main { display: block; max-width: 72rem; }
section { margin-bottom: 1rem; }
h2 { margin-bottom: .4rem; }
th[scope=row] { border-top: 1px solid var(--line); color: inherit; }
.note { color: var(--quiet); font-size: .9rem; }
table { width: auto; }
"""


def report(title: str, found: Recording) -> str:
    """The report as HTML. title: what was read"""
    style = (Path(__file__).parent / "dashboard" / "page.css").read_text(encoding="utf-8")
    sections = [_head(title, found), *_time_lines(found), _heat(found), _codings(found)]
    body = "\n".join(f"<section>{section}</section>" for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1><p>read by remus-ckpt {__version__}</p></header>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(title: str, found: Recording) -> str:
    facts = [("Checkpoints", f"{found.checkpoints:,}"), ("Memory", say_bytes(found.memory_bytes))]
    if found.checkpoints:
        facts.append(("Epochs", f"{found.epochs[0]:,} to {found.epochs[-1]:,}"))
    if found.seconds:
        first, last = (found.times_ns[at] or 0 for at in (0, -1))
        facts += [
            ("Taken", f"{_time(first)} to {_time(last)}"),
            ("Interval, median", f"{found.interval_s * 1e3:,.3g} ms"),
        ]
    facts += [("First copy", say_bytes(found.first_copy_bytes)), ("Stream after it", say_bytes(sum(found.sizes[1:])))]
    if (share := ratio(sum(found.sizes[1:]), found.changed_bytes)) is not None:
        facts += [("Pages after it, raw", say_bytes(found.changed_bytes)), ("Ratio", f"{share:.1%}")]
    rows = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    return f'<h2>What it holds</h2><dl id="facts">{rows}</dl>'


def _time_lines(found: Recording) -> Iterable[str]:
    if found.checkpoints < 2:
        return
    sizes, pages = np.array(found.sizes[1:], float), np.array(found.pages[1:], float)
    where = _where(found)
    # A bar for several checkpoints shows the largest of them: what a link has to cope with.
    yield _bars("Bytes of each checkpoint", sizes, np.maximum.reduceat, say_bytes, where)
    yield _bars("Pages of each checkpoint", pages, np.maximum.reduceat, lambda value: f"{value:,.0f}", where)
    starts = _starts(len(sizes))
    raw = np.add.reduceat(pages, starts) * PAGE_SIZE
    shares = np.divide(np.add.reduceat(sizes, starts), raw, out=np.zeros(len(raw)), where=raw > 0)
    yield _bars("Ratio, stream to pages", shares, None, lambda value: f"{value:.1%}", where)


def _where(found: Recording) -> tuple[str, str]:
    """The ends of a time line: after the first copy, and the last checkpoint."""
    ends = [(found.times_ns[at], found.epochs[at]) for at in (1, -1)]
    first, last = (f"epoch {epoch:,}" + ("" if time is None else f", {_time(time)}") for time, epoch in ends)
    return first, last


def _starts(count: int) -> NDArray[np.int64]:
    """Where each of at most so many bars begins, for a value each."""
    return np.unique(np.linspace(0, count, min(count, _BARS), endpoint=False).astype(np.int64))


def _bars(
    title: str,
    values: NDArray[np.float64],
    join: Callable[..., NDArray[np.float64]] | None,
    say: Callable[[float], str],
    where: tuple[str, str],
) -> str:
    """values: of each checkpoint, to be joined to bars; with `join` None, of each bar"""
    bars = values if join is None else join(values, _starts(len(values)))
    most = float(bars.max()) or 1.0
    step = _WIDTH / len(bars)
    heights = bars / most * _HEIGHT
    path = "".join(
        f"M{at * step:.1f} {_HEIGHT}v{-height:.1f}h{step * 0.85:.2f}v{height:.1f}z" for at, height in enumerate(heights)
    )
    p50, p99, largest = (say(float(np.percentile(values, percent))) for percent in (50, 99, 100))
    words = f"p50 {p50}, p99 {p99}, most {largest}"
    return (
        f"<h2>{title}</h2><p>{words}</p>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{title}: {words}">'
        f'<path d="{path}" fill="currentColor"/></svg>'
        f'<p class="ends"><span>{where[0]}</span><span>{where[1]}</span></p>'
    )


def _heat(found: Recording) -> str:
    if not found.columns:
        return ""
    columns = np.array(found.columns)
    levels = np.log2(1 + columns.T)  # a row for each part, the beginning of memory at the top
    totals = columns.sum(0)
    part = int(totals.argmax())
    size = found.memory_bytes / PARTS
    words = (
        f"{np.count_nonzero(totals):,} of {PARTS} parts of memory have changed, most of all "
        f"{say_bytes(part * size)} to {say_bytes((part + 1) * size)}: {totals[part]:,} pages of {totals.sum():,}."
    )
    image = base64.b64encode(_png(_colours(levels))).decode()
    first, last = _where(found)
    return (
        f'<h2>Where memory changes</h2><p>{words}</p><img alt="{words}" src="data:image/png;base64,{image}">'
        f'<p class="ends"><span>{first}</span><span>{last}</span></p>'
        f'<p class="note">From the beginning of memory (top) to its end; brighter is more. A column is '
        f"{found.checkpoints_per_column:,} checkpoint{'s' * (found.checkpoints_per_column > 1)}.</p>"
    )


def _colours(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """uint8[rows, columns, 4] of levels from 0, which is not seen."""
    at = levels / (levels.max() or 1.0) * (len(_FLAME) - 1)
    channels = [np.interp(at, range(len(_FLAME)), channel) for channel in zip(*_FLAME, strict=True)]
    return np.stack([*channels, np.where(levels > 0, 255, 0)], axis=-1).astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture of uint8[height, width, 4]. Source: the PNG specification, "Chunk specifications"."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    lines = np.zeros((height, 1 + width * 4), dtype=np.uint8)  # each begins with its filter, 0
    lines[:, 1:] = pixels.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, colours with alpha
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def _codings(found: Recording) -> str:
    if not found.changed_bytes:
        return ""
    head = ["Page codec", "Bytes", "Of the pages", *(["A second"] if found.seconds else [])]
    rows: list[Sequence[str]] = [("raw pages", *_coding(found, found.changed_bytes))]
    rows += [(name, *_coding(found, size)) for name, size in sorted(found.encoded.items(), key=lambda item: item[1])]
    titles = "".join(f'<th scope="col" class="{"number" if at else ""}">{title}</th>' for at, title in enumerate(head))
    cells = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f'<td class="number">{cell}</td>' for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f"<h2>How small each page codec would have made it</h2><table><thead><tr>{titles}</tr></thead>"
        f"<tbody>{cells}</tbody></table>"
        '<p class="note">The pages behind the first copy, each encoded against what it was before. The stream around '
        "them, and what a link compresses besides, are not in it. <code>remus-ckpt plan</code> shows what longer "
        "intervals would take.</p>"
    )


def _coding(found: Recording, size: int) -> list[str]:
    cells = [f"{size:,}", f"{size / found.changed_bytes:.1%}"]
    return cells + ([f"{say_bytes(size / found.seconds)}/s"] if found.seconds else [])


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
