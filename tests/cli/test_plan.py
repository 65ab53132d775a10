"""`remus-ckpt plan`: what a longer interval would have taken, worked out from a recording."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import Command

from remus_ckpt import Sender, batches
from remus_ckpt.pages import PAGE_SIZE, Pages

MS = 1_000_000
PAGES = 64


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def states(count: int) -> list[Pages]:
    """Memory at each checkpoint: a counter in page 0, and one other page, each time another."""
    memory = np.full((PAGES, PAGE_SIZE), 7, dtype=np.uint8)
    found = [memory.copy()]
    for number in range(1, count):
        memory[0, :8] = np.frombuffer(number.to_bytes(8, "little"), dtype=np.uint8)
        memory[1 + number % 32, number % PAGE_SIZE] += 1
        found.append(memory.copy())
    return found


def stream(memories: Sequence[Pages], times_ns: Sequence[int | None]) -> tuple[bytes, list[int], list[int]]:
    """A recording, and of each of its checkpoints the size and the number of pages."""
    sender = Sender(PAGES)
    before = np.zeros_like(memories[0])
    out, sizes, pages = b"", [], []
    for memory, time_ns in zip(memories, times_ns, strict=True):
        dirty = np.flatnonzero((memory != before).any(axis=1))
        out += b"".join(
            b"".join(map(bytes, buffers))
            for buffers in sender.checkpoint(batches(dirty, memory[dirty]), time_ns=time_ns)
        )
        assert sender.sent is not None
        sizes.append(sender.sent.stream_bytes)
        pages.append(sender.sent.pages)
        before = memory
    return out, sizes, pages


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """81 checkpoints, one every 25 ms."""
    path = tmp_path / "orders.remus"
    path.write_bytes(stream(states(81), [number * 25 * MS for number in range(81)])[0])
    return path


def test_a_longer_interval_takes_what_it_would_have_taken(recording: Path, command: Command) -> None:
    memories = states(81)
    code, out, _ = command("plan", str(recording), "--json", "--link", "1Mbit", "--keep-age", "1h")
    report = json.loads(out)
    assert code == 0
    assert (report["checkpoints"], report["seconds"], report["interval_s"]) == (81, 2.0, 0.025)
    assert report["memory_bytes"] == PAGES * PAGE_SIZE
    rows = report["intervals"]
    assert [row["interval_s"] for row in rows] == [0.025, 0.1, 0.25]
    for row, step in zip(rows, (1, 4, 10), strict=True):
        _, sizes, pages = stream(memories[::step], [number * 25 * MS for number in range(0, 81, step)])
        assert row["checkpoints"] == len(sizes) - 1
        assert row["pages"]["max"] == max(pages[1:]) and row["bytes"]["max"] == max(sizes[1:])
        assert row["bytes_s"] == pytest.approx(sum(sizes[1:]) / 2.0)
        assert row["keeps_up"] == (np.percentile(sizes[1:], 99) / 125_000 <= row["interval_s"])
        assert row["stored_bytes"] > row["bytes_s"] * 3600
        assert report["first_copy_bytes"] == sizes[0]


def test_the_shortest_interval_that_a_link_keeps_up_with(recording: Path, command: Command) -> None:
    rows = json.loads(command("plan", str(recording), "--json", "--link", "1Gbit")[1])["intervals"]
    # A speed between what the two shortest intervals need.
    speed = (rows[0]["bytes"]["p99"] / rows[0]["interval_s"] + rows[1]["bytes"]["p99"] / rows[1]["interval_s"]) / 2 * 8
    code, out, _ = command("plan", str(recording), "--link", f"{speed:.0f}bit")
    assert code == 0 and "keeps up with is 100 ms" in out
    code, out, _ = command("plan", str(recording), "--link", "1bit")
    assert code == 0 and "none of these" in out


@pytest.mark.parametrize("wrong", [["--link", "fast"], ["--link", "0Mbit"], ["--interval", "25"]])
def test_usage(recording: Path, command: Command, wrong: list[str]) -> None:
    assert command("plan", str(recording), *wrong)[0] == 2


@pytest.mark.parametrize("interval", ["1ms", "1h"])
def test_an_interval_that_the_recording_does_not_show(recording: Path, command: Command, interval: str) -> None:
    code, _, err = command("plan", str(recording), "--interval", interval)
    assert code == 1 and "cannot show an interval" in err


def test_recordings_that_say_too_little(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "x.remus"
    for times in ([None] * 5, [0, 25 * MS], [5, 5, 5, 5, 5], [9, 8, 7, 6, 5]):
        path.write_bytes(stream(states(len(times)), times)[0])
        assert command("plan", str(path))[0] == 1
    path.write_bytes(b"no stream" * 100)
    assert command("plan", str(path))[0] == 21
