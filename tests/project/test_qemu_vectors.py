"""The vectors of QEMU's streams are what their writer makes, and the command makes of them what they expect."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qemu_support import BAD, FOLDER, GOOD, ROOT, ROWS, contents, read_all, tool, unpacked
from support import Command

from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.qemu_sender import Part, QemuSender
from remus_ckpt.wire.qemu import events


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def test_they_are_what_the_writer_makes() -> None:
    made = tool.build()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    assert [path.name for path in FOLDER.iterdir() if tool.content(path) != made[path.name]] == []


def test_there_are_enough_and_each_names_a_section_that_exists() -> None:
    assert len(GOOD) >= 48
    assert len(BAD) >= 76
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    headings = {
        (path.name, number)
        for path in (ROOT / "specs").glob("*.md")
        for number in re.findall(r"^#+ ([\d.]+)", path.read_text(), re.M)
    }
    named = {
        tuple(section.split(" §"))
        for row in ROWS
        for section in [*row["sections"], *([row["error"]["section"]] if "error" in row else [])]
    }
    assert named - headings == set()


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row["id"])
def test_what_a_stream_holds(row: dict[str, Any], tmp_path: Path, command: Command) -> None:
    if "needs" in row and shutil.which(row["needs"]) is None:
        pytest.skip(f"no {row['needs']}")
    arguments = (*unpacked(row["id"], tmp_path), *row.get("arguments", ()), "--json")
    ran = command("verify", *arguments, "--hash")
    found = json.loads(ran.out)
    (checkpoint,) = found["checkpoints"] or [{}]
    for name in ("format", "complete", "trailing_bytes", "page_size"):
        assert name not in row or found[name] == row[name]
    for name in ("whole", "pages", "blocks", "not_in_stream"):
        assert name not in row or checkpoint[name] == row[name]
    for name in ("missing", "absent"):  # a dump has no pages where there is no memory: that is nothing to report
        assert name not in row or checkpoint["missing_pages"] == row[name]
    assert ran.code == (0 if row.get("whole", True) else 20)
    assert (ran.err == "") == (row["complete"] and not {"missing", "trailing_bytes"} & set(row) and "blocks" in row)

    inspected = json.loads(command("inspect", *arguments).out)
    if row["format"] == "qcow2" and "--snapshot" not in arguments:
        assert [one["state_bytes"] > 0 for one in inspected["snapshots"]].count(True) == 1
    elif "devices" in row:
        devices = inspected["devices"]
        assert (None if devices is None else len(devices)) == row["devices"]


@pytest.mark.parametrize("row", [row for row in GOOD if "sending" in row], ids=lambda row: row["id"])
@pytest.mark.parametrize("kernel", [None, "numpy"])
def test_what_a_sender_writes(row: dict[str, Any], kernel: str | None) -> None:
    """Byte for byte, from the same writes in the same rounds."""
    (data,) = contents(row["id"])
    known = [event for event in read_all(data) if isinstance(event, events.Event)]
    blocks = [event for event in known if isinstance(event, events.RamBlock)]
    (configuration,) = [event for event in known if isinstance(event, events.Configuration)]
    (devices,) = [event for event in known if isinstance(event, events.DeviceState)]
    told = row["sending"]
    memory = {block.name: np.zeros((block.size // PAGE_SIZE, PAGE_SIZE), dtype=np.uint8) for block in blocks}
    with QemuSender(
        blocks,
        configuration=configuration,
        cache_bytes=told["cache_pages"] * PAGE_SIZE,
        is_fixed=True,
        kernel=kernel,
    ) as sender:
        sent = bytes(sender.begin())
        for one in told["rounds"]:
            for block, at, digits, times in one["writes"]:
                written = np.frombuffer(bytes.fromhex(digits) * times, dtype=np.uint8)
                memory[block].reshape(-1)[at : at + len(written)] = written
            parts = [
                Part(block, np.array(numbers), memory[block], np.array(numbers))
                for block, numbers in one["pages"].items()
            ]
            is_last = one is told["rounds"][-1]
            for buffer in sender.end(devices, parts) if is_last else sender.round(parts):
                sent += bytes(buffer)
        counts, found = told["counts"], sender.statistics()
    assert sent == data
    cache = found["xbzrle-cache"]
    assert (found["duplicate"], found["normal"]) == (counts["zero"], counts["page"])
    assert (cache["cache-miss"], cache["overflow"]) == (counts["miss"], counts["overflow"])
    assert cache["pages"] == counts["same"] + counts["xbzrle"] + counts["overflow"]
    assert cache["bytes"] == counts["bytes"] + PAGE_SIZE * counts["overflow"]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row["id"])
def test_what_is_refused_and_where(row: dict[str, Any], tmp_path: Path, command: Command) -> None:
    files = unpacked(row["id"], tmp_path)
    wanted = row["error"]
    for hashes in ([], ["--hash"]):
        ran = command("verify", *files, *row.get("arguments", ()), "--json", *hashes)
        error = json.loads(ran.out)["error"]
        assert {name: error[name] for name in wanted if wanted[name] is not None} == {
            name: value for name, value in wanted.items() if value is not None
        }
        assert ran.code == (21 if wanted["kind"] == "UnknownFormat" else 20)
        assert error["message"] in ran.err
    for arguments in ((), ("--json",)):
        assert command("inspect", *files, *row.get("arguments", ()), *arguments).code == ran.code
