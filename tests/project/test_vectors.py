"""The vectors are what their sources make, they try every rule of the text, and our own decoder and encoder pass them.

What a decoder and an encoder must do is specs/conformance.md; how a source becomes a vector, tools/vectors.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from conftest import many
from support import Command

from remus_ckpt import Restorer
from remus_ckpt.codec import kernels
from remus_ckpt.conformance import Verdict, compare, environment, judge_encoder, load_manifest, load_vector
from remus_ckpt.errors import StreamError
from remus_ckpt.wire.xen import chunks, events
from remus_ckpt.wire.xen.describe import describe
from remus_ckpt.wire.xen.dialect import FRONTS, Dialect
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.states import BODIES, KINDS, TRANSITIONS, Course, Kind, State

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "specs"
FOLDER = SPECS / "vectors"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = _tool("vectors")
encoder = _tool("encoder")

VECTORS = load_manifest(FOLDER)
DECODE = [vector for vector in VECTORS if vector["kind"] == "decode"]
ENCODE = [vector for vector in VECTORS if vector["kind"] == "encode"]
REFUSED = [vector for vector in DECODE if "error" in vector]


def _id(value: Any) -> str:
    return value["id"] if isinstance(value, dict) else str(value)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def _tell(monkeypatch: pytest.MonkeyPatch, vector: dict[str, Any]) -> None:
    """The environment that a command gets (specs/conformance.md §2)."""
    told = environment(vector)
    for name in ("REMUS_WORD", "REMUS_GUEST", "REMUS_CODEC", "REMUS_STRICT"):
        if name in told:
            monkeypatch.setenv(name, told[name])
        else:
            monkeypatch.delenv(name, raising=False)


# Our own


@pytest.mark.parametrize("vector", DECODE[:: many(5, 1)], ids=_id)
def test_our_decoder(vector: dict[str, Any], command: Command, monkeypatch: pytest.MonkeyPatch):
    _tell(monkeypatch, vector)
    load_vector(FOLDER, vector)
    ran = command("events", FOLDER / vector["file"])
    assert _problems(vector, (ran.code, ran.out.encode())) == []
    # A fault may be noticed elsewhere by others; ours is to be where the source says.
    if fault := vector.get("error"):
        said = json.loads(ran.out.splitlines()[-1])
        assert {name: said[name] for name in fault} == fault


def _held(restorer: Restorer) -> str | None:
    return None if restorer.in_force is None else hashlib.sha256(restorer.in_force.image).hexdigest()


def _restored(data: bytes, dialect: Dialect, *, strict: bool, step: int = 1 << 30) -> tuple[int, bytes]:
    """Exit code and lines of a decoder, as `remus-ckpt events` makes them, for a stream that comes in such steps."""
    restorer = Restorer(dialect, strict=strict)
    at = 0
    lines: list[dict[str, Any]] = []
    try:
        while restorer.end is None:
            event = restorer.next_event()
            if event is None:
                restorer.feed(data[at : at + step])
                at += step
                if at >= len(data):
                    restorer.feed_eof()
                continue
            lines.append(describe(event))
            if isinstance(event, events.EndOfStream):
                lines[-1]["memory_sha256"] = _held(restorer)
            if restorer.staged is not None:
                done = restorer.commit()
                lines.append({"offset": done.end, "event": "checkpoint", "epoch": done.epoch})
                lines[-1]["memory_sha256"] = hashlib.sha256(done.image).hexdigest()
        code = 0
    except StreamError as error:
        lines.append({"offset": error.offset, "event": "error", "memory_sha256": _held(restorer)})
        code = error.exit_code
    return code, "\n".join(map(json.dumps, lines)).encode()


def _problems(vector: dict[str, Any], ran: tuple[int, bytes]) -> list[str]:
    verdict = Verdict(vector["id"], vector["sections"])
    compare(verdict, vector, *ran, "")
    return verdict.problems


def test_our_decoder_detects_the_dialect():
    told_nothing = {
        vector["id"]: _problems(vector, _restored(load_vector(FOLDER, vector), Dialect(), strict=vector["strict"]))
        for vector in DECODE
        if "told" not in vector["flags"]
    }
    assert {name: problems for name, problems in told_nothing.items() if problems} == {}


@pytest.mark.parametrize("vector", DECODE, ids=_id)
def test_a_vector_may_come_in_pieces(vector: dict[str, Any]):
    data = load_vector(FOLDER, vector)
    for step in (1, 13) if len(data) < 20_000 else (1000, 4099):
        ran = _restored(data, Dialect(**vector["dialect"]), strict=vector["strict"], step=step)
        assert _problems(vector, ran) == []


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_our_decoder_with_every_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, kernel)
    fell_short = {}
    for vector in DECODE:
        if vector["dialect"]["codec"] and kernel in kernels.TABLE[vector["dialect"]["codec"]]:
            ran = _restored(load_vector(FOLDER, vector), Dialect(**vector["dialect"]), strict=vector["strict"])
            fell_short[vector["id"]] = _problems(vector, ran)
    assert len(fell_short) > 50
    assert {name: problems for name, problems in fell_short.items() if problems} == {}


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_our_encoder(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, kernel)
    fell_short = {}
    for vector in ENCODE:
        if kernel in kernels.TABLE[vector["dialect"]["codec"]]:
            stream = b"".join(map(bytes, encoder.encode(json.loads(load_vector(FOLDER, vector)))))
            fell_short[vector["id"]] = _problems(vector, _restored(stream, Dialect(**vector["dialect"]), strict=True))
    assert len(fell_short) >= 8
    assert {name: problems for name, problems in fell_short.items() if problems} == {}


def test_our_encoder_is_a_command():
    (vector,) = [vector for vector in ENCODE if vector["id"] == "encode-delta-fox"]
    verdict = judge_encoder(
        f"{sys.executable} {ROOT / 'tools' / 'encoder.py'}",
        f"{sys.executable} -m remus_ckpt events -",
        FOLDER,
        vector,
        60,
    )
    assert verdict.passed, verdict.problems


# The files


def test_the_manifest_keeps_to_its_schema():
    schema = json.loads((FOLDER / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads((FOLDER / "manifest.json").read_text()))
    of_a_vector = jsonschema.Draft202012Validator({"$ref": "#/$defs/vector", "$defs": schema["$defs"]})
    for vector in VECTORS:
        of_a_vector.validate(vector)
    assert not of_a_vector.is_valid(VECTORS[0] | {"kind": "other"})
    assert not of_a_vector.is_valid(VECTORS[0] | {"events": [{"offset": 0, "event": "header"}]})


def test_regeneration_gives_the_same_bytes():
    _, changed, left_over = tool.difference(FOLDER)
    assert (changed, left_over) == ([], [])


def test_a_changed_a_missing_and_a_needless_file_are_found(tmp_path: Path):
    folder = tmp_path / "vectors"
    shutil.copytree(FOLDER, folder)
    changed, missing = (FOLDER / vector["file"] for vector in DECODE[:2])
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    (folder / changed.name).write_bytes(data)
    (folder / missing.name).unlink()
    (folder / "needless.bin").touch()
    _, differ, left_over = tool.difference(folder)
    assert sorted(differ) == sorted([changed.name, missing.name])
    assert left_over == [folder / "needless.bin"]
    with pytest.raises(ValueError):
        load_vector(folder, DECODE[0])
    with pytest.raises(OSError):
        load_vector(folder, DECODE[1])


def test_an_expectation_in_a_source_is_what_the_vector_expects(tmp_path: Path):
    # The other direction: what a source says goes into the vector, whatever our own decoder makes of it.
    folder = tmp_path / "vectors"
    (folder / "src").mkdir(parents=True)
    shutil.copy(FOLDER / "src" / "hvm-smallest-64.txt", folder / "src" / "it.txt")
    source = (folder / "src" / "it.txt").read_text()
    (folder / "src" / "it.txt").write_text(source.replace("checkpoint 0 1=68", "checkpoint 7 1=69"))
    made = json.loads(tool.build(folder)["it.json"])
    (original,) = [vector for vector in VECTORS if vector["id"] == "hvm-smallest-64"]
    assert made["sha256"] == original["sha256"]
    differing = [
        (mine["event"], {name for name in mine if mine[name] != his[name]})
        for mine, his in zip(made["events"], original["events"], strict=True)
        if mine != his
    ]
    assert differing == [("checkpoint", {"epoch", "memory_sha256"}), ("end", {"memory_sha256"})]


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert max(sizes) <= 64 << 10
    assert sum(sizes) <= 2 << 20


def test_there_are_enough():
    assert len(VECTORS) >= 60
    assert len(REFUSED) >= 25
    assert len(ENCODE) >= 8
    assert sum("captured" in vector["flags"] for vector in VECTORS) >= 5
    assert len({vector["id"] for vector in VECTORS}) == len(VECTORS)


def test_a_deviation_is_both_accepted_and_refused():
    # Each name of permissive.md: the same bytes, once as they are read and once under strict.
    pairs = [
        (vector, other)
        for vector in DECODE
        for other in DECODE
        if other["id"] == f"{vector['id']}-strict" and vector["sha256"] == other["sha256"]
    ]
    assert all("error" not in vector and not vector["strict"] for vector, _ in pairs)
    assert all("error" in other and other["strict"] for _, other in pairs)
    names = re.findall(r"^## `(.*)`$", (SPECS / "permissive.md").read_text(), re.M)
    found = set()
    for vector, _ in pairs:
        reader = Reader(Dialect(**vector["dialect"]))
        reader.feed(load_vector(FOLDER, vector))
        reader.feed_eof()
        while not isinstance(reader.next_event(), events.EndOfStream):
            pass
        found |= set(reader.deviations)
    # The other three are found by the walk through the compressed data, which the reader leaves to the restorer.
    by_source = {"compressed-surplus", "compressed-split-page", "compressed-before-batch"}
    assert by_source <= {vector["id"] for vector, _ in pairs}
    assert found | {"surplus-compressed-bytes", "split-page", "compressed-before-batch"} == set(names)


# What they try


def _sections() -> dict[str, str]:
    """Section → its text, without its subsections and without examples."""
    found = {}
    for name in ("stream.md", "delta.md", "rle.md"):
        text = re.sub(r"^```.*?^```$", "", (SPECS / name).read_text(), flags=re.M | re.S)
        for number, body in re.findall(r"^##+ (\d+(?:\.\d+)?) [^\n]*\n(.*?)(?=^##|\Z)", text, re.M | re.S):
            found[f"{name} §{number}"] = body
    return found


UNTRIED = {"stream.md §1": "says what *must* means, and has no rule"}


def test_every_must_is_tried():
    tried = {section for vector in VECTORS for section in vector["sections"]}
    must = {section for section, text in _sections().items() if re.search(r"\bmust\b", text, re.I)}
    assert len(must) > 20
    assert sorted(must - tried) == sorted(UNTRIED)


def test_no_vector_names_a_section_that_does_not_exist():
    named = {section for vector in VECTORS for section in vector["sections"]}
    named |= {vector["error"]["section"] for vector in REFUSED}
    assert sorted(named - set(_sections())) == []


IN_A_BODY = {
    Kind.BATCH,
    Kind.COMPRESSED_DATA,
    Kind.INFO,
    Kind.LAST_CHECKPOINT,
    Kind.ENABLE_COMPRESSION,
    Kind.END_OF_BODY,
}
"""What the bytes of a body can say. What stands elsewhere is read as what belongs there: a tail in a body as a chunk, a
chunk behind the id 0 as a tail, a batch in front of the header as p2m_size. So these pairs cannot be expressed."""


def _kind(data: bytes) -> Kind | None:
    """What a body's next bytes are."""
    number = int.from_bytes(data[:4], "little", signed=True)
    if number >= 0:
        return Kind.BATCH if number else Kind.END_OF_BODY
    named = {
        chunks.ChunkId.COMPRESSED_DATA: Kind.COMPRESSED_DATA,
        chunks.ChunkId.ENABLE_COMPRESSION: Kind.ENABLE_COMPRESSION,
        chunks.ChunkId.LAST_CHECKPOINT: Kind.LAST_CHECKPOINT,
    }
    return named.get(number, Kind.INFO) if number in chunks.CHUNKS else None


def _reached(vector: dict[str, Any]) -> set[tuple[State, Kind]]:
    """The pairs that a vector walks through, and the forbidden one that it ends with."""
    data = load_vector(FOLDER, vector)
    reader = Reader(Dialect(**vector["dialect"]), strict=vector["strict"])
    reader.feed(data)
    reader.feed_eof()
    course = Course()
    pairs = set()
    try:
        while not isinstance(event := reader.next_event(), events.EndOfStream):
            kind = KINDS[type(event)]
            if isinstance(event, events.TailHvm) and event.signature is chunks.Signature.QEMU:
                course.last_checkpoint = True
            if kind is Kind.TAIL and course.last_checkpoint:
                kind = Kind.LAST_TAIL
            pairs.add((course.state, kind))
            assert course.step(event) is not None
    except StreamError as error:
        kind = None
        if course.state in BODIES:
            kind = _kind(data[error.offset :])
        elif course.state is State.HEADER or (course.state is State.FRONT and error.offset == 0):
            xl = FRONTS["xl"].magic
            behind = data[len(xl) + 16 :] if data.startswith(xl) else data
            kind = Kind.FILE_HEADER if behind.startswith(tuple(front.magic for front in FRONTS.values())) else None
        if kind is not None and (course.state, kind) not in TRANSITIONS:
            pairs.add((course.state, kind))
    return pairs


def test_every_pair_of_the_table_is_reached():
    reached = set().union(*map(_reached, DECODE))
    forbidden = {(body, kind) for body in BODIES for kind in IN_A_BODY} | {(State.HEADER, Kind.FILE_HEADER)}
    assert sorted(map(str, set(TRANSITIONS) - reached)) == []
    assert sorted(map(str, forbidden - set(TRANSITIONS) - reached)) == []


def test_bytes_behind_the_last_checkpoint_are_tried():
    # DONE has no transitions: what comes there is counted.
    assert any(
        event.get("trailing_bytes") and "stream.md §8.4" in v["sections"] for v in DECODE for event in v["events"]
    )
