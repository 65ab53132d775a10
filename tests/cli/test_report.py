"""`inspect --html`: a report of a stream, and the figures that it shares with `plan`."""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support import Command
from test_plan import MS, PAGES, states, stream

from remus_ckpt.codec import CODECS, get_codec
from remus_ckpt.pages import PAGE_SIZE, PARTS
from remus_ckpt.recording import COLUMNS, Recording, read_recording
from remus_ckpt.report import report


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    data, _, _ = stream(states(40), [number * 25 * MS for number in range(40)])
    path = tmp_path / "orders <b>.remus"
    path.write_bytes(data)
    return path


class Checked(HTMLParser):
    """Whether all that is opened is closed, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_clock_that_was_put_back_gives_no_rates(tmp_path: Path) -> None:
    data, _, _ = stream(states(6), [(6 - number) * 25 * MS for number in range(6)])
    (tmp_path / "stream").write_bytes(data)
    found = read_recording(tmp_path / "stream")
    assert found.seconds == 0.0
    text = report("a recording", found)
    assert ">-" not in text
    assert "A second" not in text


def test_the_report_is_whole_and_loads_nothing(command: Command, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code, _, _ = command("inspect", str(recorded), "--html", str(out))
    assert code == 0
    text = out.read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    assert [source[:22] for source in checked.sources] == ["data:image/png;base64,"]
    assert "<script" not in text
    assert "orders &lt;b&gt;.remus" in text and "<b>" not in text
    found = read_recording(recorded)
    for name, size in found.encoded.items():
        assert f'<th scope="row">{name}</th><td class="number">{size:,}</td>' in text
    assert command("inspect", str(recorded), "--html", str(out))[0] == 1  # it is there already
    assert command("inspect", str(recorded), "--html", str(out), "--overwrite")[0] == 0


def test_the_picture_shows_where_pages_changed(recorded: Path) -> None:
    found = read_recording(recorded)
    text = report("x", found)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])  # type: ignore[index]
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    size = struct.unpack(">I", data[8:12])[0]
    width, height = struct.unpack(">II", data[16:24])
    assert (size, width, height) == (13, 39, PARTS)
    at = 8 + 12 + size
    length = struct.unpack(">I", data[at : at + 4])[0]
    lines = np.frombuffer(zlib.decompress(data[at + 8 : at + 8 + length]), dtype=np.uint8).reshape(height, -1)
    seen = lines[:, 1:].reshape(height, width, 4)[:, :, 3] == 255
    expected = np.zeros((PARTS, 39), dtype=bool)
    expected[0] = True  # the counter in page 0
    for number in range(1, 40):
        expected[(1 + number % 32) * PARTS // PAGES, number - 1] = True
    assert (seen == expected).all()


def test_what_each_codec_would_have_made_of_it(recorded: Path) -> None:
    found = read_recording(recorded)
    memories = states(40)
    for name in CODECS:
        total = 0
        for before, after in itertools.pairwise(memories):
            dirty = np.flatnonzero((before != after).any(axis=1))
            total += len(get_codec(name).encode(after[dirty], before[dirty].copy()))
        assert found.encoded[name] == total
    assert found.changed_bytes == 39 * 2 * PAGE_SIZE


def test_plan_says_the_same(command: Command, recorded: Path) -> None:
    code, text, _ = command("plan", str(recorded), "--json")
    assert code == 0
    planned, found = json.loads(text), read_recording(recorded)
    assert planned["encoded_bytes"] == found.encoded
    assert planned["changed_bytes"] == found.changed_bytes
    assert planned["first_copy_bytes"] == found.first_copy_bytes
    assert planned["intervals"][0]["bytes"]["p50"] == np.median(found.sizes[1:])


def test_a_long_recording_has_no_more_columns() -> None:
    found = Recording()
    total = np.zeros(PARTS, dtype=np.int64)
    for number in range(5 * COLUMNS + 17):
        found.epochs = list(range(number + 2))
        counts = np.bincount([number % PARTS], minlength=PARTS)
        total += counts
        found.add_column(counts)
        assert len(found.columns) <= 2 * COLUMNS
    assert (sum(found.columns) == total).all()
    assert found.checkpoints_per_column == 4


def test_one_checkpoint_or_no_times_are_enough(command: Command, tmp_path: Path) -> None:
    for count, name in ((1, "one"), (3, "three")):
        path, out = tmp_path / name, tmp_path / f"{name}.html"
        path.write_bytes(stream(states(count), [None] * count)[0])
        assert command("inspect", str(path), "--html", str(out))[0] == 0
        assert ("Where memory changes" in out.read_text()) == (count > 1)
    assert "Taken" not in out.read_text()
