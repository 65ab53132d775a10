"""What pages go through on their way: one decision, from what was measured alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.stages import RETRY_ROUNDS, Cached, Seen, decide

MIB = 1 << 20
LZ4 = {"lz4": (1e9, 0.5)}
FAST_S, SLOW_S = 90e9, 10e6
"""Bytes a second of a link."""


def cached(
    hits: float, ratio: float, *, slots: int = 1024, most: int = 4096, speed: float = 5e9, plain: float = 20e9
) -> Cached:
    """hits: share of the pages; ratio: what they take of their size"""
    pages = 10_000
    return Cached(
        pages=pages,
        hits=round(pages * hits),
        sent_bytes=round(pages * hits * 4096 * ratio),
        bytes_s=speed,
        plain_bytes_s=plain,
        slots=slots,
        most_slots=most,
    )


@pytest.mark.parametrize(
    ("link", "hits", "ratio", "encodes"),
    [
        (SLOW_S, 0.99, 0.02, True),
        (SLOW_S, 0.3, 0.1, True),
        (SLOW_S, 0.01, 0.1, False),  # hardly any page is in the cache
        (SLOW_S, 0.99, 0.99, False),  # they are, and are not worth it
        (1e9, 0.99, 0.02, True),
        (FAST_S, 0.99, 0.02, False),  # the link outruns the coding
        (None, 0.0, 0.0, True),
    ],
)
def test_whether_to_encode(link: float | None, hits: float, ratio: float, encodes: bool) -> None:
    found = decide(Seen(link_bytes_s=link, cached=cached(hits, ratio, slots=4096)))
    assert found.encodes == encodes
    assert found.slots == (4096 if encodes else 0)
    assert found.reasons


def test_nothing_is_changed_for_a_small_gain() -> None:
    """Encoded it takes 0.9 of the time: whatever is done now goes on."""
    now = cached(1.0, 0.9, slots=4096, speed=1e12, plain=1e12)
    assert decide(Seen(link_bytes_s=SLOW_S, cached=now)).encodes
    assert not decide(Seen(link_bytes_s=SLOW_S, cached=Cached(**(fields(now) | {"slots": 0})))).encodes


def fields(of: Cached) -> dict[str, Any]:
    return {name: getattr(of, name) for name in Cached.__slots__}


def test_the_cache_grows_with_misses_up_to_its_limit() -> None:
    assert decide(Seen(cached=cached(0.5, 0.1))).slots == 2048
    assert "50%" in decide(Seen(cached=cached(0.5, 0.1))).reasons[-1]
    assert decide(Seen(cached=cached(0.95, 0.1))).slots == 1024
    assert decide(Seen(cached=cached(0.5, 0.1, slots=4096))).slots == 4096


def test_what_is_off_is_tried_again_after_a_while() -> None:
    off = fields(cached(0.01, 0.9)) | {"slots": 0}
    for rounds, slots in ((RETRY_ROUNDS - 1, 0), (RETRY_ROUNDS, 4096)):
        found = decide(Seen(link_bytes_s=SLOW_S, cached=Cached(**(off | {"idle_rounds": rounds}))))
        assert (found.encodes, found.slots) == (slots > 0, slots)
    assert decide(Seen(link_bytes_s=SLOW_S / 100, cached=Cached(**off))).encodes is False
    better = fields(cached(0.9, 0.1)) | {"slots": 0}
    found = decide(Seen(link_bytes_s=SLOW_S, cached=Cached(**better)))
    assert (found.encodes, found.slots) == (True, 4096)


def test_both_stages_together() -> None:
    """Behind a coding that leaves little there is little to gain, and nothing to lose."""
    slow = decide(Seen(link_bytes_s=SLOW_S, gains=LZ4, cached=cached(1.0, 0.02, slots=4096)))
    assert (slow.encodes, slow.compression) == (True, "lz4")
    noise = decide(Seen(link_bytes_s=SLOW_S, gains={"lz4": (1e9, 1.0)}, cached=cached(1.0, 0.02, slots=4096)))
    assert (noise.encodes, noise.compression) == (True, "none")
    alone = decide(Seen(link_bytes_s=SLOW_S, gains=LZ4))
    assert (alone.encodes, alone.slots, alone.compression) == (True, 0, "lz4")


@given(
    st.builds(
        Seen,
        link_bytes_s=st.none() | st.floats(1e3, 1e12),
        gains=st.dictionaries(
            st.sampled_from(["lz4", "zstd"]), st.tuples(st.floats(1e6, 1e12), st.floats(0, 1.1)), max_size=2
        ),
        compression=st.sampled_from(["none", "lz4"]),
        cached=st.none()
        | st.builds(
            Cached,
            pages=st.just(1000) | st.just(0),
            hits=st.integers(0, 1000),
            sent_bytes=st.integers(0, 4_096_000),
            bytes_s=st.none() | st.floats(1e6, 1e11),
            plain_bytes_s=st.none() | st.floats(1e6, 1e11),
            slots=st.sampled_from([0, 1024, 4096]),
            most_slots=st.just(4096),
            idle_rounds=st.integers(0, 20),
        ),
    )
)
def test_it_always_decides_something_that_can_be_done(seen: Seen) -> None:
    found = decide(seen)
    assert found.reasons and all(found.reasons)
    assert found.compression in {"none", seen.compression, *seen.gains}
    if seen.cached is not None:
        assert found.encodes == (found.slots > 0)
        assert 0 <= found.slots <= seen.cached.most_slots and not found.slots & (found.slots - 1)
    assert decide(seen) == found
