"""The vectors that the project carries: made from their sources byte by byte, and read and written as they say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import ROOT

from remus_ckpt.codec.reference import Lru, Shadow
from remus_ckpt.conformance import load_manifest, load_vector
from remus_ckpt.errors import LimitExceeded, Malformed, StreamError, UnknownFormat
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, PageBatch
from remus_ckpt.restorer import Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.wire import events
from remus_ckpt.wire.describe import describe
from remus_ckpt.wire.dialect import Dialect

FOLDER = ROOT / "specs" / "vectors"
VECTORS = load_manifest(FOLDER)
KINDS: dict[str, type[StreamError]] = {"malformed": Malformed, "limit": LimitExceeded, "unknown-format": UnknownFormat}

every_decode_vector = pytest.mark.parametrize(
    "vector", [row for row in VECTORS if row["kind"] == "decode"], ids=lambda row: row["id"]
)


def maker() -> Any:
    """tools/vectors.py, which is no part of the package."""
    path = ROOT / "tools" / "vectors.py"
    spec = importlib.util.spec_from_file_location("vectors_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Not in sys.modules, so that nothing else takes it for a package of that name.
    spec.loader.exec_module(module)
    return module


def test_the_sources_give_these_files_and_no_others() -> None:
    tool = maker()
    made = tool.build(FOLDER)
    assert [name for name, data in made.items() if tool.content(FOLDER / name) != data] == []
    left_over = {path.name for path in FOLDER.iterdir() if path.is_file()} - set(made) - {"manifest.schema.json"}
    assert left_over == set()
    assert set(made) >= {row["file"] for row in VECTORS} | {"manifest.json"}


def test_a_file_that_is_changed_or_missing_is_found(tmp_path: Path) -> None:
    row = VECTORS[0]
    (tmp_path / row["file"]).write_bytes((FOLDER / row["file"]).read_bytes())
    load_vector(tmp_path, row)
    (tmp_path / row["file"]).write_bytes((FOLDER / row["file"]).read_bytes() + b"\0")
    with pytest.raises(Exception):  # noqa: B017 - what unpacks it may say so first
        load_vector(tmp_path, row)
    (tmp_path / row["file"]).unlink()
    with pytest.raises(OSError):
        load_vector(tmp_path, row)


def test_the_tool_that_makes_them_does_not_know_the_package() -> None:
    """What a vector expects is written by hand: it must not be what this program happens to say."""
    before = set(sys.modules)
    maker()
    assert not [name for name in set(sys.modules) - before if name.startswith("remus_ckpt")]
    assert "remus_ckpt" not in "\n".join(
        line for line in (ROOT / "tools" / "vectors.py").read_text().splitlines() if "import" in line
    )


def test_they_are_small_and_each_says_what_it_is() -> None:
    assert len({row["id"] for row in VECTORS}) == len(VECTORS)
    for row in VECTORS:
        assert (FOLDER / row["file"]).stat().st_size <= 64 << 10
        assert hashlib.sha256(load_vector(FOLDER, row)).hexdigest() == row["sha256"]
        assert row["sections"] and row["origin"]
        assert {"captured", "handmade", "generated"} & set(row["flags"])
        assert set(row["dialect"]) == {"word", "guest", "codec"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 2 << 20


def read(
    data: bytes, dialect: Dialect | None, *, strict: bool, step: int
) -> tuple[list[dict[str, Any]], StreamError | None, Restorer]:
    """What the program says of a stream that comes in pieces of so many bytes."""
    restorer = Restorer(dialect, strict=strict)
    said: list[dict[str, Any]] = []
    at = 0
    try:
        while True:
            event = restorer.next_event()
            if event is None:
                if at < len(data):
                    restorer.feed(data[at : at + step])
                    at += step
                else:
                    restorer.feed_eof()
                continue
            said.append(json.loads(json.dumps(describe(event))))
            if restorer.staged is not None:
                done = restorer.commit()
                line = {"offset": done.end, "event": "checkpoint", "epoch": done.epoch}
                said.append(line | {"memory_sha256": memory_sha256(done.memory)})
            if isinstance(event, events.EndOfStream):
                return said, None, restorer
    except StreamError as error:
        return said, error, restorer


def compare(vector: dict[str, Any], said: list[dict[str, Any]], error: StreamError | None) -> None:
    """Every event that is expected is said, with those fields, and no other."""
    expected = vector["events"]
    for want, got in zip(expected, said, strict=False):
        assert {name: got.get(name) for name in want} == want
    assert [row["event"] for row in said] == [row["event"] for row in expected]
    fault = vector.get("error")
    if fault is None:
        assert error is None
        return
    assert error is not None
    assert (type(error), error.offset, error.section) == (KINDS[fault["kind"]], fault["offset"], fault["section"])


def can_be_detected(vector: dict[str, Any]) -> bool:
    """Not what specs/stream.md §1.2 names: a PV header without extended info has a PFN where an HVM guest's has a
    chunk's id, and a 32-bit HVM header followed by the id 0 or −1 looks like a 64-bit one or a PV guest's."""
    for header, following in zip(vector["events"], [*vector["events"][1:], {"event": None}], strict=False):
        if header["event"] == "header":
            if header["guest"] == "pv":
                return "extended_info" in header
            return header["word"] == 8 or following["event"] not in ("end_of_body", "enable_verify_mode")
    return True


@pytest.mark.parametrize("detect", [False, True], ids=["given", "detected"])
@every_decode_vector
def test_a_vector_is_read_as_it_says(vector: dict[str, Any], detect: bool) -> None:
    stated = vector["dialect"]
    dialect = Dialect(stated["word"], stated["guest"], stated["codec"])
    if detect and can_be_detected(vector):
        # The codec of what is malformed may be anything.
        dialect = Dialect(codec=stated["codec"] if "error" in vector else None)
    data = load_vector(FOLDER, vector)
    said, error, restorer = read(data, dialect, strict=vector["strict"], step=len(data) or 1)
    compare(vector, said, error)
    if error is None and any(row["event"] == "header" for row in said):
        found = restorer.dialect
        assert (found.word, found.guest) == (stated["word"], stated["guest"])
        assert found.codec in (None, stated["codec"])


@every_decode_vector
def test_a_vector_may_come_in_pieces(vector: dict[str, Any]) -> None:
    stated = vector["dialect"]
    dialect = Dialect(stated["word"], stated["guest"], stated["codec"])
    data = load_vector(FOLDER, vector)
    for step in (1 if len(data) < 20_000 else 4099, 13 if len(data) < 20_000 else 1000):
        said, error, _ = read(data, dialect, strict=vector["strict"], step=step)
        compare(vector, said, error)


@pytest.mark.parametrize("vector", [row for row in VECTORS if row["kind"] == "encode"], ids=lambda row: row["id"])
def test_a_vector_is_written_as_it_says(vector: dict[str, Any]) -> None:
    given = json.loads(load_vector(FOLDER, vector))
    size = given["p2m_size"]
    slots = given["reference_pages"]
    sender = Sender(
        size,
        codec=given["codec"],
        word=given["word"],
        buffer_pages=given["buffer_pages"],
        reference=Lru(slots) if slots else Shadow(np.zeros((size, PAGE_SIZE), dtype=np.uint8)),
    )
    data = bytearray()
    for checkpoint in given["checkpoints"]:
        scan = []
        for entries in checkpoint:
            pages = [bytes.fromhex(page).ljust(PAGE_SIZE, b"\0") for _, _, page in entries if page is not None]
            scan.append(
                PageBatch(
                    np.array([pfn for pfn, _, _ in entries], dtype=np.uint64),
                    np.array([kind for _, kind, _ in entries], dtype=np.uint8),
                    np.frombuffer(b"".join(pages), dtype=np.uint8).reshape(-1, PAGE_SIZE),
                )
            )
        for buffers in sender.checkpoint(scan):
            for buffer in buffers:
                data += buffer
    said, error, _ = read(bytes(data), None, strict=True, step=len(data))
    compare(vector, said, error)
