"""Turns one stream of memory into another: every checkpoint, as it comes (specs/formats.md §9).

guest      what every stream is turned into and made from: pieces
sources    streams that Xen or we wrote, as pieces
xen        pieces to Xen's streams and to ours
qemu       pieces to a live migration of QEMU
home       where a source restores its memory
output     where it is written
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from remus_ckpt.relay.guest import Losses, Moment, Piece, one_moment
from remus_ckpt.relay.home import LateHome
from remus_ckpt.relay.output import Output
from remus_ckpt.relay.xen import LegacyTarget, V2Target
from remus_ckpt.relay.xen import XenOptions as XenOptions

Run = Callable[[Iterator[Piece]], Iterator[Moment]]
Target = Callable[[Output, LateHome, Losses, XenOptions], Run]


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table of formats that are written.

    name: in `--to`, and in what commands report
    what: it is, for messages
    has_series: whether one file can hold several checkpoints
    target: from output, home of the source's memory, losses and options to what draws the pieces
    """

    name: str
    what: str
    has_series: bool
    target: Target


def _stream(*, is_ours: bool) -> Target:
    return lambda out, home, lost, how: LegacyTarget(out.write, home, lost, how, is_ours=is_ours).run


FORMATS = {
    row.name: row
    for row in (
        Format("remus", "a stream of ours", True, _stream(is_ours=True)),
        Format("xen", "a legacy stream", True, _stream(is_ours=False)),
        Format("xen-v2", "a Xen v2 stream", True, lambda out, _, lost, how: V2Target(out.write, lost, how).run),
    )
}


def relay(
    pieces: Iterator[Piece],
    out: Output,
    to: str,
    home: LateHome,
    *,
    losses: Losses,
    options: XenOptions,
    epoch: int | None = None,
    is_single: bool = False,
) -> Iterator[Moment]:
    """Write what the pieces hold in another format; yields each moment once it is written.

    to: a name in `FORMATS`
    home: where the source restores its memory
    epoch: write only this checkpoint; None: all that the format can hold, the last if it can hold one
    is_single: write only one
    """
    row = FORMATS[to]
    is_single = is_single or epoch is not None or not row.has_series or (to == "xen-v2" and options.libxl)
    if is_single:
        pieces = one_moment(_counting(pieces, losses, epoch), epoch)
    return row.target(out, home, losses, options)(pieces)


def _counting(pieces: Iterator[Piece], losses: Losses, epoch: int | None) -> Iterator[Piece]:
    """The same pieces; names the checkpoints before the one that is kept."""
    passed: list[int] = []
    for piece in pieces:
        if isinstance(piece, Moment):
            if passed and piece.is_last and epoch is None:
                losses.name("earlier checkpoints", f"{passed[0]} to {passed[-1]}")
            passed.append(piece.epoch)
        yield piece
