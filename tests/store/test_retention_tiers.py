"""What each rule of retention keeps, by the times of single checkpoints (specs/store.md §7.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate

import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_ckpt.store.retention import MAX_IN_TIERS, TIERS, Retention, Rule, find_removals, times_taken
from remus_ckpt.store.segments import Contents, Entry, segment_name
from remus_ckpt.wire.record import Position

SIZE = 100
NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
Times = list[list[datetime]]
"""Of the checkpoints of each segment."""


def number_of(tier: str, at: datetime) -> tuple[int, ...]:
    """The period of a time, by the calendar."""
    match tier:
        case "minutely":
            return at.year, at.month, at.day, at.hour, at.minute
        case "hourly":
            return at.year, at.month, at.day, at.hour
        case "daily":
            return at.year, at.month, at.day
        case "weekly":
            return at.isocalendar()[:2]
        case "monthly":
            return at.year, at.month
    return (at.year,)


def nanoseconds(at: datetime) -> int:
    return round(at.timestamp()) * 10**9


def contents_of(times: Times, *, first_epoch: int = 0) -> list[Contents]:
    """A segment that begins at the time at which the one before ends was made by a compaction."""
    found: list[Contents] = []
    epoch, before = first_epoch, None
    for number, taken in enumerate(times):
        epoch -= taken[0] == before
        name = segment_name(epoch, number)
        entries = [
            Entry(Position(epoch + at, bytes(32)), nanoseconds(taken[at]), name, at * 10, at * 10 + 10, 1, not at)
            for at in (0, len(taken) - 1)
        ]
        found.append(Contents(name, entries[0], entries[1], size=SIZE))
        epoch, before = epoch + len(taken), taken[-1]
    return found


def removals(
    segments: Sequence[Contents],
    retention: Retention,
    *,
    free: int = 0,
    written: dict[str, datetime] | None = None,
) -> dict[int, Rule]:
    """written: when each file was, as far as known"""
    written_ns = {name: nanoseconds(at) for name, at in (written or {}).items()}
    times_ns = times_taken(segments, written_ns.get, nanoseconds(NOW), None)
    return find_removals(segments, [SIZE] * len(segments), retention, times_ns, free)


def kept(times: Times, retention: Retention, *, free: int = 0) -> list[int]:
    gone = removals(contents_of(times), retention, free=free)
    return [number for number in range(len(times)) if number not in gone]


def firsts(times: Times, tier: str, count: int) -> set[int]:
    """The segments with the first checkpoint of each of the newest periods that have any: read from every time."""
    first_in: dict[tuple[int, ...], int] = {}
    for number, taken in enumerate(times):
        for at in taken:
            first_in.setdefault(number_of(tier, at), number)
    return {first_in[period] for period in sorted(first_in)[-count:]}


@st.composite
def histories(draw: st.DrawFn) -> Times:
    """Segments whose checkpoints follow each other within an hour; between segments anything may have happened."""
    at = NOW - timedelta(days=draw(st.integers(0, 3000)))
    times: Times = []
    for _ in range(draw(st.integers(1, 25))):  # from the newest to the oldest
        is_compacted = draw(st.booleans())
        steps = draw(st.lists(st.integers(1, 60), min_size=int(is_compacted), max_size=12))
        times.insert(0, [at - timedelta(minutes=back) for back in accumulate(steps, initial=0)][::-1])
        # A segment that a compaction made begins with the last checkpoint of the one before.
        pause = 0 if is_compacted else draw(st.sampled_from([1, 7, 50, 300, 2000, 50_000]))
        at = times[0][0] - timedelta(minutes=pause)
    return times


tiers = st.dictionaries(st.sampled_from(TIERS[1:]), st.integers(1, 12), min_size=1)


@settings(max_examples=many(100, 1000))
@given(histories(), tiers)
def test_the_first_of_each_of_the_newest_periods_and_nothing_else(times: Times, wanted: dict[str, int]) -> None:
    right = set().union(*(firsts(times, tier, count) for tier, count in wanted.items()), {len(times) - 1})
    assert set(kept(times, Retention(**wanted))) == right


@settings(max_examples=many(50, 500))
@given(histories(), tiers)
def test_what_stays_stays(times: Times, wanted: dict[str, int]) -> None:
    """Pruning again changes nothing, and pruning after each segment keeps what pruning once does."""
    retention = Retention(**wanted)
    once = [times[number] for number in kept(times, retention)]
    assert kept(once, retention) == list(range(len(once)))
    after_each: Times = []
    for taken in times:
        after_each.append(taken)
        after_each = [after_each[number] for number in kept(after_each, retention)]
    assert after_each == once


@settings(max_examples=many(50, 500))
@given(histories(), tiers, st.integers(0, 24), st.sampled_from([None, -3650, 20_000]), st.booleans())
def test_one_wrong_clock(times: Times, wanted: dict[str, int], at: int, days: int | None, is_file_right: bool) -> None:
    """A stamp of the future, of 1970 or none at all: the other periods keep theirs, and the rest goes all the same."""
    retention = Retention(**wanted)
    segments = contents_of(times)
    at %= len(segments)
    right = removals(segments, retention)
    one = segments[at]
    assert one.first is not None and one.last is not None
    wrong_ns = None if days is None else nanoseconds(NOW - timedelta(days=days))
    wrong = [Entry(e.position, wrong_ns, e.segment, e.start, e.end, 1, e.is_base) for e in (one.first, one.last)]
    segments[at] = Contents(one.name, *wrong, size=SIZE)
    stays = set(range(len(times))) - right.keys() - {at}
    written = {one.name: taken[-1] for one, taken in zip(segments, times, strict=True)}
    gone = removals(segments, retention, written=written if is_file_right else None)
    if is_file_right or at < len(segments) - 1:
        assert not stays & gone.keys()
        others = [number for number in range(len(times)) if number != at]
        old = removals(contents_of([times[number] for number in others]), retention)
        assert len({others[number] for number in old} - gone.keys()) <= 1 + len(wanted)


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati", "UTC"])
def test_the_zone_of_the_machine_says_nothing(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines, or a backup and a shell, must agree on what stays. In March a day of New York has 23 hours."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        begin = datetime(2026, 3, 7, 12, tzinfo=UTC)
        times = [[begin + timedelta(hours=hour)] for hour in range(0, 72, 3)]
        found = [times[number][0] for number in kept(times, Retention(daily=3))]
        months = kept([[begin.replace(month=4, day=1, hour=hour)] for hour in (0, 6, 12, 18, 23)], Retention(monthly=1))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert months == [0, 4]
    assert found == [
        datetime(2026, 3, 8, tzinfo=UTC),
        datetime(2026, 3, 9, tzinfo=UTC),
        datetime(2026, 3, 10, tzinfo=UTC),
        begin + timedelta(hours=69),
    ]


@pytest.mark.parametrize(
    ("tier", "first", "others"),
    [
        ("minutely", "2026-05-01T10:15:00", ["2026-05-01T10:15:59"]),
        ("hourly", "2026-05-01T10:00:00", ["2026-05-01T10:15:00", "2026-05-01T10:59:59"]),
        ("daily", "2026-05-01T00:00:00", ["2026-05-01T12:00:00", "2026-05-01T23:59:59"]),
        ("weekly", "2026-05-04T00:00:00", ["2026-05-08T00:00:00", "2026-05-10T23:59:59"]),  # Monday to Sunday
        ("weekly", "2020-12-28T00:00:00", ["2021-01-03T23:59:59"]),
        ("monthly", "2024-02-01T00:00:00", ["2024-02-29T23:59:59"]),
        ("yearly", "2024-01-01T00:00:00", ["2024-02-29T00:00:00", "2024-12-31T23:59:59"]),
    ],
)
def test_where_periods_begin_and_end(tier: str, first: str, others: list[str]) -> None:
    begin = datetime.fromisoformat(f"{first}+00:00")
    within = [begin, *(datetime.fromisoformat(f"{other}+00:00") for other in others)]
    times = [[at] for at in (begin - timedelta(seconds=1), *within, within[-1] + timedelta(seconds=1), NOW)]
    begins = [0, 1, len(times) - 2, len(times) - 1]
    assert kept(times, Retention(**{tier: 100})) == begins


def test_a_segment_over_many_periods_counts_for_each() -> None:
    """Nine hours of it are nine of the ten; and the tenth is the one before."""
    hours = [[NOW - timedelta(hours=back)] for back in range(20, 10, -1)]
    long = [NOW - timedelta(hours=10) + timedelta(minutes=10 * step) for step in range(54)]
    assert kept([*hours, long], Retention(hourly=10)) == [9, 10]
    assert kept([*hours, long], Retention(hourly=9)) == [10]


def test_a_segment_counts_for_no_more_periods_than_it_has_checkpoints() -> None:
    """The link was down for most of the day that it covers."""
    hours = [[NOW - timedelta(hours=back)] for back in range(40, 30, -1)]
    assert kept([*hours, [NOW - timedelta(hours=24), NOW]], Retention(hourly=10)) == [*range(2, 10), 10]


def test_a_first_stamp_of_1970_takes_no_periods() -> None:
    """The clock was put right while the segment was being written."""
    hours = [[NOW - timedelta(hours=back)] for back in range(110, 100, -1)]
    late = [datetime(1970, 1, 1, tzinfo=UTC), *(NOW - timedelta(minutes=back) for back in range(20, -1, -1))]
    assert kept([*hours, late], Retention(hourly=11)) == list(range(11))


def test_pauses_take_no_periods() -> None:
    """There was nothing to protect for a year: the last hours before that stay."""
    times = [[NOW - timedelta(days=365, minutes=20 * back)] for back in range(30, 0, -1)] + [[NOW]]
    assert len(kept(times, Retention(hourly=5))) == 5
    assert kept(times, Retention(hourly=5))[-1] == 30


def test_segments_of_one_time_all_stay() -> None:
    """So look those whose times cannot be known: all stamps of 1970, and files that were copied today."""
    times = [[datetime.fromtimestamp(number, UTC)] for number in range(10)]
    segments = contents_of(times)
    assert removals(segments, Retention(hourly=1), written={one.name: NOW for one in segments}) == {}


LONG = [[NOW - timedelta(hours=back)] for back in range(9, -1, -1)]


@pytest.mark.parametrize(
    ("retention", "free", "gone"),
    [
        (Retention(count=3, hourly=5), 0, dict.fromkeys(range(5), "count")),
        (Retention(count=7, hourly=5), 0, dict.fromkeys(range(3), "count")),
        (Retention(age_s=3 * 3600, hourly=5), 0, dict.fromkeys(range(5), "age")),
        (Retention(age_s=7 * 3600, hourly=5), 0, dict.fromkeys(range(2), "age")),
        (
            Retention(count=8, age_s=3 * 3600, hourly=5),
            0,
            dict.fromkeys(range(2), "count") | dict.fromkeys((2, 3, 4), "age"),
        ),
        (Retention(hourly=5, bytes=3 * SIZE), 0, dict.fromkeys(range(5), "tiers") | dict.fromkeys((5, 6), "size")),
        (Retention(hourly=5, bytes=0), 0, dict.fromkeys(range(5), "tiers") | dict.fromkeys(range(5, 9), "size")),
        (Retention(hourly=5, bytes=5 * SIZE), 0, dict.fromkeys(range(5), "tiers")),
        (Retention(free=3 * SIZE), 0, dict.fromkeys(range(3), "free")),
        (Retention(free=3 * SIZE), SIZE, dict.fromkeys(range(2), "free")),
        (Retention(free=3 * SIZE), 3 * SIZE, {}),
        (Retention(free=100 * SIZE), 0, dict.fromkeys(range(9), "free")),
        (Retention(hourly=5, free=6 * SIZE), 0, dict.fromkeys(range(5), "tiers") | {5: "free"}),
        (Retention(bytes=8 * SIZE, free=3 * SIZE), 0, {0: "size", 1: "size", 2: "free"}),
    ],
)
def test_how_the_rules_go_together(retention: Retention, free: int, gone: dict[int, Rule]) -> None:
    assert removals(contents_of(LONG), retention, free=free) == gone


@given(
    histories(),
    st.none() | st.integers(1, 150),
    st.none() | st.integers(0, 10**7),
    st.none() | st.integers(0, 26 * SIZE),
)
def test_without_tiers_the_oldest_go(times: Times, count: int | None, age_s: int | None, most: int | None) -> None:
    """One at a time, as long as any limit calls for it."""
    left = list(range(len(times)))
    while len(left) > 1:
        behind = {at for number in left[1:] for at in times[number]}
        age = (times[-1][-1] - times[left[0]][-1]).total_seconds()
        calls = (
            (count is not None and len(behind) >= count)
            or (age_s is not None and age > age_s)
            or (most is not None and len(left) * SIZE > most)
        )
        if not calls:
            break
        del left[0]
    assert kept(times, Retention(count=count, age_s=age_s, bytes=most)) == left


@pytest.mark.parametrize("wrong", [{"hourly": 0}, {"daily": -1}, {"minutely": MAX_IN_TIERS, "yearly": 1}])
def test_tiers_have_bounds(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Retention(**wrong)
    assert Retention(minutely=MAX_IN_TIERS).tiers == {"minutely": MAX_IN_TIERS}
