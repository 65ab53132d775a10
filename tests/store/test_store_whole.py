"""A checkpoint that is stored in one go is what its bytes make when they are fed; wrong ones are left to that."""

from __future__ import annotations

import itertools
import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import many
from wholes import SHAPES, Talk, begun, hear, talk, walked

from remus_ckpt.errors import StoreError, StreamError
from remus_ckpt.store import HistoryWriter
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Whole

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the extension was not built")


def opened(folder: Path, of: Talk, **options: Any) -> HistoryWriter:
    """A writer that holds the full copy and the checkpoint behind it."""
    writer = HistoryWriter(folder, "orders", **options)
    writer.begin(full=True)
    for data in (of.first[0], of.behind[0]):
        _, server = begun(of)
        stream, (commit, *_), _ = hear(server, data) if data is of.first[0] else hear_behind(of)
        writer.feed(stream)
        writer.check(commit.position)
        writer.store()
        writer.apply()
    return writer


def hear_behind(of: Talk) -> tuple[bytes, list[Any], int]:
    """The stream's bytes and the commit of the checkpoint behind the full copy."""
    _, server = begun(of)
    before = len(hear(server, of.first[0])[0])
    stream, commits, wholes = hear(server, of.behind[0])
    return stream[before:], commits, wholes


def told(calls: list[str]) -> Any:
    def on_staged() -> Any:
        calls.append("staged")
        return lambda: calls.append("durable")

    return on_staged


def test_what_is_acknowledged_can_be_read_at_once(tmp_path: Path) -> None:
    """A primary that hears of it may ask for it over another connection."""
    of = talk("several chunks")
    writer, whole, seen = opened(tmp_path / "store", of), walked(of, 1).whole, []
    assert writer.store_whole(whole, lambda: lambda: seen.append(writer.position))
    assert seen == [whole.after]
    writer.apply()
    writer.close()


@pytest.mark.parametrize("name", SHAPES)
def test_both_ways_give_the_same_history(tmp_path: Path, name: str) -> None:
    of = talk(name)
    phases: list[str] = []
    fed = opened(tmp_path / "fed", of)
    quick = opened(tmp_path / "quick", of, on_phase=lambda phase, epoch: phases.append(f"{phase} {epoch}"))
    phases.clear()
    for number in (1, 2):
        whole, calls = walked(of, number).whole, list[str]()
        fed.feed(bytes(whole.data))
        fed.check(whole.record.after)
        fed.store()
        fed.apply()
        assert quick.store_whole(whole, told(calls))
        assert calls == ["staged", "durable"]
        quick.apply()
        assert (quick.memory == fed.memory).all() and quick.position == fed.position
    assert phases == [f"{phase} {epoch}" for epoch in (2, 3) for phase in ("staged", "stored", "applying", "applied")]
    assert fed.history.entries() == quick.history.entries()
    for writer in (fed, quick):
        writer.close()
    segments = [next((tmp_path / one / "segments").iterdir()).read_bytes() for one in ("fed", "quick")]
    assert segments[0] == segments[1]
    again = HistoryWriter(tmp_path / "quick", "orders")
    assert again.warnings == [] and again.position == fed.position
    again.close()


def changed_in(whole: Whole, **fields: Any) -> Whole:
    """The same, as if it had just been walked, but for these."""
    changed = copy(whole)
    for key, value in {"digest": None, **fields}.items():
        setattr(changed, key, value)
    return changed


def test_what_does_not_fit_is_not_stored(tmp_path: Path) -> None:
    of = talk("delta")
    writer = opened(tmp_path / "store", of)
    good = walked(of, 1).whole
    calls: list[str] = []

    def refuses(whole: Whole) -> bool:
        try:
            is_stored = writer.store_whole(whole, told(calls))
        except StreamError:
            is_stored = False
        writer.abandon()
        writer.begin(full=False)
        return not is_stored and writer.position == of_first and os.path.getsize(segment) == size

    writer.close()
    segment = next((tmp_path / "store" / "segments").iterdir())
    size = segment.stat().st_size
    writer = HistoryWriter(tmp_path / "store", "orders", ahead_bytes=0)
    writer.begin(full=False)
    of_first = writer.position
    assert refuses(walked(of, 2).whole)  # it does not follow
    for place in range(0, len(good.data), many(41, 1)):
        changed = bytearray(good.data)
        changed[place] ^= 1
        assert refuses(changed_in(good, data=memoryview(changed))), place
    at, *rest = good.chunks[0]
    assert refuses(changed_in(good, chunks=[(at + 6, *rest), *good.chunks[1:]]))
    assert refuses(changed_in(good, p2m_size=good.p2m_size + 1))
    assert calls == []
    assert writer.store_whole(good, told(calls))
    with pytest.raises(StoreError):  # it is stored, and not yet applied
        writer.store_whole(good, told(calls))
    writer.apply()
    with pytest.raises(StreamError):  # it has been stored before
        writer.store_whole(good, told(calls))
    writer.close()


def test_nothing_follows_what_was_handed_out(tmp_path: Path) -> None:
    of = talk("delta")
    writer = opened(tmp_path / "store", of)
    held = writer.position
    writer.hand_out()
    calls: list[str] = []
    with pytest.raises(StoreError):
        writer.store_whole(walked(of, 1).whole, told(calls))
    assert calls == [] and writer.position == held
    writer.close()


def test_a_fed_checkpoint_may_follow_and_be_broken_off(tmp_path: Path) -> None:
    of = talk("delta")
    writer = opened(tmp_path / "store", of)
    whole = walked(of, 1).whole
    writer.feed(bytes(whole.data[:50]))
    with pytest.raises(StreamError):
        writer.store_whole(whole, told([]))  # half of it has come in another way
    writer.abandon()
    writer.begin(full=False)
    assert writer.store_whole(whole, told([]))
    writer.apply()
    last = walked(of, 2).whole
    damaged = bytearray(last.data)
    damaged[-1] ^= 1
    with pytest.raises(StreamError):
        writer.feed(bytes(damaged))
    writer.abandon()
    writer.begin(full=False)
    assert writer.store_whole(last, told([]))
    writer.apply()
    assert [entry.epoch for entry in writer.history.entries()] == [0, 1, 2, 3]
    writer.close()


def have_parsed(writer: HistoryWriter) -> None:
    """Checkpoints do not land any more, as without the extension."""
    chain = writer.chain
    assert chain is not None
    chain.landing, chain.restorer.landing = None, lambda most_bytes: None  # type: ignore[method-assign]


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_lands_in_any_pieces(tmp_path: Path, name: str) -> None:
    """Walked as it comes, or parsed where the extension is left out: the same checkpoints, the same segment."""
    of, random = talk(name), np.random.default_rng(3)
    writers = [opened(tmp_path / kind, of, ahead_bytes=0) for kind in ("landed", "parsed", "whole")]
    landed = 0
    for number in (1, 2):
        data = bytes(walked(of, number).whole.data)
        position = walked(of, number).whole.record.after
        for writer, most in zip(writers, (900, 900, 1 << 20), strict=True):
            chain = writer.chain
            assert chain is not None
            if writer is writers[1]:
                have_parsed(writer)
            left = memoryview(data)
            while left:
                room = writer.get_buffer()
                size = min(len(room), len(left), int(random.integers(1, most)))
                room[:size] = left[:size]
                writer.buffer_updated(size)
                left = left[size:]
            landed += chain.is_landing
            staged = writer.check(position)
            assert staged.epoch == position.epoch and writer.arriving is not None
            writer.store()
            writer.apply()
    assert landed == 4
    assert all((writer.memory == writers[1].memory).all() for writer in writers)
    assert writers[0].history.entries() == writers[1].history.entries() == writers[2].history.entries()
    for writer in writers:
        writer.close()
    segments = [next((tmp_path / one / "segments").iterdir()).read_bytes() for one in ("landed", "parsed", "whole")]
    assert segments[0] == segments[1] == segments[2]


def test_what_lands_and_is_wrong_is_refused_as_if_it_were_parsed(tmp_path: Path) -> None:
    of, random = talk("several chunks"), np.random.default_rng(5)
    landed, parsed = opened(tmp_path / "landed", of), opened(tmp_path / "parsed", of)
    have_parsed(parsed)
    good = walked(of, 1).whole
    for place in range(0, 8 * len(good.data), many(701, 7)):
        changed = bytearray(good.data)
        changed[place // 8] ^= 1 << place % 8
        cuts = sorted(random.integers(0, len(changed), 3).tolist())
        found = []
        for writer in (landed, parsed):
            try:
                for start, stop in itertools.pairwise([0, *cuts, len(changed)]):
                    writer.feed(bytes(changed[start:stop]))
                writer.check(good.record.after)
                found.append(("staged", 0, ""))
            except StreamError as error:
                found.append((type(error).__name__, error.offset or 0, error.message))
            writer.abandon()
            writer.begin(full=False)
        assert found[0] == found[1], place
    for writer in (landed, parsed):
        writer.feed(bytes(good.data) + b"more")
        with pytest.raises(StreamError, match="4 bytes after its end"):
            writer.check(good.record.after)
        writer.abandon()
        writer.begin(full=False)
        writer.feed(bytes(good.data))
        writer.check(good.record.after)
        writer.store()
        writer.apply()
        assert writer.position == good.record.after
        writer.close()


def test_a_checkpoint_that_is_too_long_to_land_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remus_ckpt.store.chain.LANDING_BYTES", 500)
    of = talk("delta")
    writer = opened(tmp_path / "store", of)
    whole = walked(of, 1).whole
    writer.feed(bytes(whole.data))
    assert len(whole.data) > 500
    assert writer.chain is not None and not writer.chain.is_landing
    writer.check(whole.record.after)
    writer.store()
    writer.apply()
    writer.close()


def test_a_failed_sync_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = talk("delta")
    writer = opened(tmp_path / "store", of)
    calls: list[str] = []

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(StoreError):
        patched.setattr(os, "fdatasync", fail)
        writer.store_whole(walked(of, 1).whole, told(calls))
    assert calls == ["staged"]
    with pytest.raises(StoreError):
        writer.feed(b"x")
    writer.close()
    again = HistoryWriter(tmp_path / "store", "orders")
    assert again.position is not None and again.position.epoch == 1
    again.close()
