"""What pages go through on their way to a link: the page coding with its cache, then a compression.

One decision, a pure function of measurements, for our own sessions (session.md) and for QEMU streams (qemu-ram.md §10).
It gives its reasons, so that the statistics show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

MARGIN = 0.8
"""A change must promise to save a fifth of the time, so that the choice does not flip back and forth."""
LEAST_GAIN = 0.95
"""Pages are no longer encoded if that takes more than this share of the time: it also costs memory and a processor."""
MANY_MISSES = 0.1
"""Of the pages that are sent: with more, a larger cache is tried."""
RETRY_ROUNDS = 16
"""Rounds without the coding after which it is tried again: the guest's behaviour may have changed."""
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """What is known about the page coding and its cache.

    pages: that went through the cache in the last round that encoded; 0: there was none yet
    hits: those of them that the cache had
    sent_bytes: bytes sent for the hits
    bytes_s: bytes of pages per second that are looked up and encoded; None: not measured
    plain_bytes_s: the same for pages that are only put into the stream
    slots: of the cache; 0: it is off
    most_slots: maximum of slots
    idle_rounds: rounds since it is off
    """

    pages: int = 0
    hits: int = 0
    sent_bytes: int = 0
    bytes_s: float | None = None
    plain_bytes_s: float | None = None
    slots: int = 0
    most_slots: int = 0
    idle_rounds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was measured, and what is in use now.

    link_bytes_s: None: not measured
    gains: compression → bytes/s in, and bytes out per byte in; those that both sides have
    compression: in use
    cached: None: the stream determines whether pages are encoded, so that is not decided here
    """

    link_bytes_s: float | None = None
    gains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    compression: str = "none"
    cached: Cached | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is done from now on.

    encodes: whether pages are encoded
    slots: of the cache
    compression: after the coding, "none" for none
    reasons: why, in words
    """

    encodes: bool
    slots: int
    compression: str
    reasons: tuple[str, ...]


def decide(seen: Seen) -> Choice:
    """Choose whatever delivers pages soonest: coding, compressing and sending do not overlap.

    Without a measurement nothing is compressed, and pages are encoded: the first rounds show whether that pays off.
    """
    cached = seen.cached
    is_coded = cached is None or cached.slots > 0
    if cached is not None and not cached.slots and cached.idle_rounds >= RETRY_ROUNDS:
        slots = cached.most_slots
        reasons = (f"encode: it was off for {cached.idle_rounds} rounds, and is tried again",)
        return Choice(encodes=slots > 0, slots=slots, compression=seen.compression, reasons=reasons)
    if seen.link_bytes_s is None:
        slots, why = _slots(cached) if is_coded else (0, ())
        return Choice(
            encodes=is_coded,
            slots=slots,
            compression=seen.compression,
            reasons=("no link was measured", *why),
        )
    costs = _costs(seen)
    now = (is_coded, seen.compression)
    best = min(costs, key=lambda way: costs[way])
    if now in costs and best != now and costs[best] >= costs[now] * MARGIN:
        best = now
    # To stop needs no such margin.
    if best[1] != "none" and costs[best[0], "none"] <= costs[best]:
        best = (best[0], "none")
    if best[0] and (False, best[1]) in costs and costs[False, best[1]] * LEAST_GAIN <= costs[best]:
        best = (False, best[1])
    encodes, compression = best
    slots, why = _slots(cached) if encodes else (0, ())
    return Choice(encodes=encodes, slots=slots, compression=compression, reasons=(_told(costs, best, seen), *why))


def _costs(seen: Seen) -> dict[tuple[bool, str], float]:
    """Seconds per byte of pages, by way: (are they encoded, how are they compressed)."""
    assert seen.link_bytes_s is not None
    cached = seen.cached
    # Seconds, and bytes out, per byte of pages; what was not measured stays as it is.
    codings = {cached is None or cached.slots > 0: (0.0, 1.0)}
    if cached is not None and cached.pages and cached.bytes_s and cached.plain_bytes_s:
        raw = (cached.pages - cached.hits) * _PAGE_BYTES
        share = (raw + cached.sent_bytes) / (cached.pages * _PAGE_BYTES)
        codings = {True: (1 / cached.bytes_s, share), False: (1 / cached.plain_bytes_s, 1.0)}
    compressions = {"none": (0.0, 1.0)} | {name: (1 / speed, ratio) for name, (speed, ratio) in seen.gains.items()}
    return {
        (coding, name): codings[coding][0] + codings[coding][1] * (seconds + ratio / seen.link_bytes_s)
        for coding, (name, (seconds, ratio)) in product(codings, compressions.items())
    }


def _slots(cached: Cached | None) -> tuple[int, tuple[str, ...]]:
    """The size of a cache that is on, and why."""
    if cached is None:
        return 0, ()
    if not cached.slots:
        return cached.most_slots, ()
    slots, most = cached.slots, cached.most_slots
    if cached.pages and slots < most and cached.pages - cached.hits > MANY_MISSES * cached.pages:
        share = (cached.pages - cached.hits) / cached.pages
        return 2 * slots, (f"cache {_mib(slots)} → {_mib(2 * slots)}: {share:.0%} of the pages were not in it",)
    return slots, ()


def _mib(slots: int) -> str:
    return f"{slots * _PAGE_BYTES / (1 << 20):.3g} MiB"


def _told(costs: Mapping[tuple[bool, str], float], best: tuple[bool, str], seen: Seen) -> str:
    """The choice and its cost, next to the cheapest alternative."""

    def name(way: tuple[bool, str]) -> str:
        coding = [] if seen.cached is None else ["encode" if way[0] else "do not encode"]
        return ", ".join([*coding, *([] if way[1] == "none" and coding else [way[1]])])

    ways = sorted(costs, key=lambda way: costs[way])
    others = [way for way in ways if way != best]
    text = f"{name(best)}: {costs[best] * (1 << 30):.3g} s/GiB"
    return text + (f", {name(others[0])}: {costs[others[0]] * (1 << 30):.3g}" if others else "")
