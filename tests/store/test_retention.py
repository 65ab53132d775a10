"""Which segments go, and by whose clock: none that is young, and the old ones all the same (specs/store.md §7.2)."""

from __future__ import annotations

import pytest

from remus_ckpt.store.retention import Retention, find_removals, times_taken
from remus_ckpt.store.segments import Contents, Entry, segment_name
from remus_ckpt.wire.record import Position

HOUR = 3600
NOW = 1_800_000_000  # all in seconds here
YEARS = 10 * 365 * 24 * HOUR
Stamps = list[int | None]


def removed(
    taken: Stamps, written: Stamps | None = None, now: int = NOW, age_s: float = 24 * HOUR, floor: int | None = None
) -> int:
    """How many of the oldest segments go.

    taken, written: of each segment, the time of its newest checkpoint and that of its file, as far before `NOW`; the
    latter by default the former, where that is one
    """
    segments = []
    files: dict[str, int] = {}
    for number, ago in enumerate(taken):
        name = segment_name(number * 10, number)
        time_ns = None if ago is None else (NOW - ago) * 10**9
        first = Entry(Position(number * 10, bytes(32)), time_ns, name, 0, 10, 1, True)
        last = Entry(Position(number * 10 + 9, bytes(32)), time_ns, name, 90, 100, 1, False)
        segments.append(Contents(name, first, last, size=100))
        file_ago = ago if written is None else written[number]
        if file_ago is not None:
            files[name] = (NOW - file_ago) * 10**9
    times_ns = times_taken(segments, files.get, now * 10**9, None if floor is None else (NOW - floor) * 10**9)
    return len(find_removals(segments, [100] * len(segments), Retention(age_s=age_s), times_ns))


RIGHT: Stamps = [40 * HOUR, 30 * HOUR, 20 * HOUR, 10 * HOUR, 0]
EPOCH = NOW  # so long ago that it was 1970
FUTURE = -YEARS
TABLE: dict[str, tuple[int, int]] = {
    "all clocks right": (removed(RIGHT), 2),
    "no times": (removed([None] * 5, RIGHT), 2),
    "no times, and the files were copied": (removed([None] * 5, [0] * 5), 0),
    "the newest has none": (removed([*RIGHT[:4], None], RIGHT), 2),
    "our clock jumps forward": (removed(RIGHT, now=NOW + YEARS), 2),
    "our clock jumps forward, and nothing is old": (removed([4, 3, 2, 1, 0], now=NOW + YEARS), 0),
    "our clock jumps forward, and the last is written then": (removed(RIGHT, [*RIGHT[:4], FUTURE], NOW + YEARS), 2),
    "our clock jumps back": (removed(RIGHT, now=NOW - YEARS), 0),
    "our clock is at 1970": (removed(RIGHT, now=100), 0),
    "our clock was ahead when all but the last were written": (removed(RIGHT, [FUTURE] * 4 + [0]), 2),
    "the oldest from the future": (removed([FUTURE, *RIGHT[1:]], RIGHT), 2),
    "the oldest from the future by both clocks": (removed([FUTURE, *RIGHT[1:]]), 2),
    "one in the middle from the future": (removed([RIGHT[0], FUTURE, *RIGHT[2:]]), 1),
    "one in the middle from the future, and those behind are old": (
        removed([60 * HOUR, FUTURE, 40 * HOUR, 30 * HOUR, 0], [60 * HOUR, FUTURE, 40 * HOUR, 30 * HOUR, 0]),
        4,
    ),
    "all from the future": (removed([FUTURE + one for one in RIGHT if one is not None], RIGHT), 2),
    "the newest from the future": (removed([*RIGHT[:4], FUTURE], RIGHT), 2),
    "the oldest from 1970": (removed([EPOCH, 3, 2, 1, 0], [4, 3, 2, 1, 0]), 0),
    "one in the middle from 1970": (removed([5, EPOCH, 2, 1, 0], [5, 3, 2, 1, 0]), 0),
    "one in the middle from 1970 by both clocks": (removed([5, EPOCH, 2, 1, 0]), 0),
    "one from 1970 among old ones": (removed([60 * HOUR, EPOCH, 40 * HOUR, 1, 0], [60 * HOUR, 50 * HOUR, 40, 1, 0]), 3),
    "the newest from 1970": (removed([*RIGHT[:4], EPOCH], RIGHT), 2),
    "all from 1970": (removed([EPOCH - number for number in range(5)], RIGHT), 2),
    "the primary's clock a year behind from here on": (
        removed([4, 3, YEARS + 2, YEARS + 1, YEARS], [4, 3, 2, 1, 0]),
        0,
    ),
    "and when that has lasted long enough": (
        removed(
            [60 * HOUR, 50 * HOUR, YEARS + 30 * HOUR, YEARS + HOUR, YEARS], [60 * HOUR, 50 * HOUR, 30 * HOUR, HOUR, 0]
        ),
        3,
    ),
    "and when it has been put right": (removed([5, YEARS + 3, YEARS + 2, 1, 0], [5, 3, 2, 1, 0]), 0),
    "and those before it have gone": (removed([YEARS + 3, YEARS + 2, 1, 0], [3, 2, 1, 0], floor=4), 0),
    "the primary's clock behind what was pruned, and years behind before": (
        removed([3 * HOUR, YEARS, HOUR, 48 * HOUR], [3 * HOUR, 2 * HOUR, HOUR, 0], floor=4 * HOUR),
        0,
    ),
    "what was pruned is from the future": (removed(RIGHT, floor=FUTURE), 2),
    "the same time everywhere": (removed([0] * 5), 0),
    "one segment": (removed([YEARS]), 0),
    "none": (removed([]), 0),
}


@pytest.mark.parametrize(("gone", "right"), TABLE.values(), ids=TABLE)
def test_age(gone: int, right: int) -> None:
    assert gone == right


def test_age_goes_on_while_checkpoints_come() -> None:
    """With any one segment stamped wrong, what is old goes as soon as one more segment has come than without."""
    for wrong in (FUTURE, EPOCH, None):
        for number in range(8):
            stamps: Stamps = [(7 - one) * 10 * HOUR for one in range(8)]
            right = removed(stamps)
            stamps[number] = wrong
            assert right - 1 <= removed(stamps, [None] * 8) <= right
