"""Which of the oldest segments are removed (specs/store.md §7.2). No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from remus_ckpt.store.segments import Contents

_2000_NS = 946_684_800 * 10**9


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept; None: no limit. Whole segments are removed, oldest first, but never the one that holds the newest
    checkpoint.

    count: a segment is removed if at least this many checkpoints are left without it
    age_s: a segment is removed if its newest checkpoint is more than this many seconds older than the newest of all
    bytes: the oldest segments are removed until the rest has at most this many bytes
    """

    count: int | None = None
    age_s: float | None = None
    bytes: int | None = None


def count_over(
    segments: Sequence[Contents],
    sizes: Sequence[int],
    retention: Retention,
    times_ns: Sequence[int | None],
) -> int:
    """How many of the oldest segments to remove; the last always stays.

    segments: what they hold, oldest first; sizes: of their files in bytes
    times_ns: as estimated by `times_taken`
    """
    # From the newest to the oldest: how many checkpoints there are from each segment on, and how many bytes.
    counts = list(accumulate((_new_in(one, behind) for one, behind in _pairs(segments)), initial=0))[::-1]
    bytes_ = list(accumulate(reversed(sizes), initial=0))[::-1]
    newest_ns = times_ns[-1] if times_ns else None
    for number in range(len(segments) - 1):
        taken_ns = times_ns[number]
        is_over = (
            (retention.count is not None and counts[number + 1] >= retention.count)
            or (
                retention.age_s is not None
                and taken_ns is not None
                and newest_ns is not None
                and newest_ns - taken_ns > retention.age_s * 1e9
            )
            or (retention.bytes is not None and bytes_[number] > retention.bytes)
        )
        if not is_over:
            return number
    return max(len(segments) - 1, 0)


def times_taken(
    segments: Sequence[Contents],
    written_ns: Callable[[str], int | None],
    now_ns: int,
    floor_ns: int | None,
) -> list[int | None]:
    """When the newest checkpoint of each segment was taken, as far as clocks can be believed.

    written_ns: when the file of that name was last written, by this machine's clock
    now_ns: the time on that clock; floor_ns: no remaining checkpoint was taken before this, None if unknown

    Ages count from the last time in the result. Source: specs/store.md §7.2.
    """
    low = _2000_NS if now_ns >= _2000_NS else 0

    def believed(one: Contents) -> int | None:
        taken_ns = None if one.last is None else one.last.time_ns
        if taken_ns is None or not low <= taken_ns <= now_ns:
            taken_ns = written_ns(one.name)
        return None if taken_ns is None or not low <= taken_ns <= now_ns else taken_ns

    if not segments:
        return []
    if floor_ns is not None and low <= floor_ns <= now_ns:
        low = floor_ns
    now_ns = believed(segments[-1]) or now_ns
    times: list[int | None] = []
    for one in segments[:-1]:
        times.append(believed(one))
        low = times[-1] or low
    times.append(now_ns)
    # No segment is younger than the one after it, whose time also serves where a segment's own cannot be believed.
    for number in range(len(times) - 2, -1, -1):
        own, behind = times[number], times[number + 1]
        times[number] = behind if own is None or behind is None else min(own, behind)
    return times


def _pairs(segments: Sequence[Contents]) -> list[tuple[Contents, Contents | None]]:
    """Each segment, newest first, with the one after it."""
    newest_first = segments[::-1]
    return list(zip(newest_first, [None, *newest_first], strict=False))


def _new_in(one: Contents, behind: Contents | None) -> int:
    """How many checkpoints a segment has, without one that is also the base of the segment after it."""
    is_copied = (
        behind is not None
        and one.last is not None
        and behind.first is not None
        and (one.last.epoch == behind.first.epoch)
    )
    return len(one.epochs) - is_copied
