"""Which segments are removed, and why (specs/store.md §7.2). No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Literal

from remus_ckpt.store.segments import Contents

MAX_IN_TIERS = 5_000
"""Maximum number of periods of all tiers together: there may be a gap before each, and store.json lists the gaps."""
_2000_NS = 946_684_800 * 10**9
_MINUTE_NS, _HOUR_NS, _DAY_NS = (seconds * 10**9 for seconds in (60, 3600, 86_400))
_MONDAY = 3
"""1970 began on a Thursday; a week begins on a Monday."""


def _month(time_ns: int) -> int:
    taken = datetime.fromtimestamp(time_ns // 10**9, UTC)
    return taken.year * 12 + taken.month - 1


_PERIODS: dict[str, Callable[[int], int]] = {
    "minutely": lambda time_ns: time_ns // _MINUTE_NS,
    "hourly": lambda time_ns: time_ns // _HOUR_NS,
    "daily": lambda time_ns: time_ns // _DAY_NS,
    "weekly": lambda time_ns: (time_ns // _DAY_NS + _MONDAY) // 7,
    "monthly": _month,
    "yearly": lambda time_ns: _month(time_ns) // 12,
}
"""Tier → the number of the period, in UTC, that a time belongs to."""
TIERS = tuple(_PERIODS)

Rule = Literal["count", "age", "tiers", "size", "free"]
"""Why a segment goes: a limit requires it; or there are tiers, and none wants it."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept; None: no such rule. Whole segments are removed, but never the one that holds the newest checkpoint.

    A segment goes as soon as `count` or `age_s` no longer covers it, unless a tier wants it. With tiers alone, a
    segment goes unless a tier wants it. Of those left, the oldest go until `bytes` and `free` are met.

    count: a segment goes if at least this many checkpoints are in newer ones
    age_s: a segment goes if its newest checkpoint is more than this many seconds older than the newest of all
    bytes: the maximum size of all segments together
    free: the minimum number of bytes that stay free in the file system
    minutely to yearly: the tiers: each wants the first checkpoint of each of the newest so many minutes, hours, days,
        weeks (from Monday), months or years that have any, in UTC

    Raises ValueError if a tier wants less than one, or all tiers together more than `MAX_IN_TIERS`.
    """

    count: int | None = None
    age_s: float | None = None
    bytes: int | None = None
    free: int | None = None
    minutely: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.tiers.values()):
            raise ValueError("a tier keeps at least one")
        if sum(self.tiers.values()) > MAX_IN_TIERS:
            raise ValueError(f"all tiers together keep at most {MAX_IN_TIERS:,}")

    @property
    def tiers(self) -> dict[str, int]:
        """Tier → how many periods it keeps."""
        return {tier: count for tier in TIERS if (count := getattr(self, tier)) is not None}

    @property
    def needs_times(self) -> bool:
        """Whether any rule asks when checkpoints were taken."""
        return self.age_s is not None or bool(self.tiers)


@dataclass(frozen=True, slots=True)
class Removal:
    """A segment that goes. bytes: of its file"""

    contents: Contents
    bytes: int
    rule: Rule


def find_removals(
    segments: Sequence[Contents],
    sizes: Sequence[int],
    retention: Retention,
    times_ns: Sequence[int | None],
    free_bytes: int = 0,
    spared: int = 0,
) -> dict[int, Rule]:
    """The numbers of the segments to remove, in order, and why; the last always stays.

    spared: how many of the newest checkpoints stay, whatever the rules say
    segments: what they hold, oldest first; sizes: of their files in bytes
    times_ns: as estimated by `times_taken`
    free_bytes: of the file system now
    """
    counts = _counts_from(segments)
    numbers = [number for number in range(len(segments) - 1) if counts[number + 1] >= spared]
    wanted = _wanted_by_tiers(segments, retention, times_ns)
    has_only_tiers = bool(retention.tiers) and retention.count is None and retention.age_s is None

    def rule_for(number: int) -> Rule | None:
        if retention.count is not None and counts[number + 1] >= retention.count:
            return "count"
        taken_ns, newest_ns = times_ns[number], times_ns[-1]
        if retention.age_s is not None and taken_ns is not None and newest_ns is not None:
            return "age" if newest_ns - taken_ns > retention.age_s * 1e9 else None
        return "tiers" if has_only_tiers else None

    over = {number: rule for number in numbers if number not in wanted and (rule := rule_for(number)) is not None}
    held_bytes = sum(sizes) - sum(sizes[number] for number in over)
    free_bytes += sum(sizes[number] for number in over)
    for number in numbers:
        if number in over:
            continue
        if retention.bytes is not None and held_bytes > retention.bytes:
            over[number] = "size"
        elif retention.free is not None and free_bytes < retention.free:
            over[number] = "free"
        else:
            break
        held_bytes -= sizes[number]
        free_bytes += sizes[number]
    return dict(sorted(over.items()))


def _wanted_by_tiers(segments: Sequence[Contents], retention: Retention, times_ns: Sequence[int | None]) -> set[int]:
    """The numbers of the segments that hold the first checkpoint of a period that a tier keeps."""
    wanted: set[int] = set()
    for tier, count in retention.tiers.items():
        first_in: dict[int, list[int]] = {}  # period → the oldest segment with a checkpoint in it
        for number, one in enumerate(segments):
            for period in _periods(one, times_ns[number], times_ns[number - 1] if number else None, tier, count):
                holders = first_in.setdefault(period, [])
                # If two times are the same, the first is a guess: keep both.
                if not holders or times_ns[holders[-1]] == times_ns[number]:
                    holders.append(number)
        for period in sorted(first_in)[-count:]:
            wanted.update(first_in[period])
    return wanted


def _periods(one: Contents, taken_ns: int | None, before_ns: int | None, tier: str, most: int) -> range:
    """The newest periods, at most so many, from a segment's first checkpoint to its newest, taken at `taken_ns`.

    Only the first and the newest are known here, so periods between them count even if none was taken in them; but no
    more than there are checkpoints. A first checkpoint from before `before_ns`, the time of the previous segment, or
    from after `taken_ns` is not believed.
    """
    if taken_ns is None:
        return range(0)
    period_of = _PERIODS[tier]
    begun_ns = None if one.first is None else one.first.time_ns
    if begun_ns is None or not (before_ns or 0) <= begun_ns <= taken_ns:
        begun_ns = taken_ns
    stop = period_of(taken_ns) + 1
    return range(max(period_of(begun_ns), stop - min(most, len(one.epochs))), stop)


def _counts_from(segments: Sequence[Contents]) -> list[int]:
    """How many checkpoints there are from each segment on."""
    return list(accumulate((_new_in(one, behind) for one, behind in _pairs(segments)), initial=0))[::-1]


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
    """Each segment, newest first, with its successor."""
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
