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
import numpy as np
import pytest
from conftest import many
from support import Command

from remus_ckpt import Restorer, conformance
from remus_ckpt.codec import get_codec, kernels
from remus_ckpt.conformance import (
    Verdict,
    compare,
    compare_reading,
    environment,
    judge_encoder,
    load_codec,
    load_manifest,
    load_vector,
    spelled,
    spelled_page,
)
from remus_ckpt.errors import Malformed, StreamError
from remus_ckpt.wire.xen import chunks, events
from remus_ckpt.wire.xen.describe import describe
from remus_ckpt.wire.xen.dialect import FRONTS, Dialect
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.states import BODIES, KINDS, TRANSITIONS, Course, EventKind, StreamState

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


sys.modules.setdefault("plain_blake3", _tool("plain_blake3"))
tool = _tool("vectors")
encoder = _tool("encoder")
sys.modules.setdefault("plain_decoder", _tool("plain_decoder"))
page_codec = _tool("page_codec")

VECTORS = load_manifest(FOLDER)
DECODE = [vector for vector in VECTORS if vector["kind"] == "decode"]
ENCODE = [vector for vector in VECTORS if vector["kind"] == "encode"]
REFUSED = [vector for vector in DECODE if "error" in vector]
PAGES = [(codec, vector) for codec in ("delta", "rle", "xbzrle") for vector in load_codec(FOLDER, codec)]


def _id(value: Any) -> str:
    value = value[1] if isinstance(value, tuple) else value
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


@pytest.mark.parametrize("line", [b"5", b"null", b"[]", b'"tail"', b"[" * 100_000, b"\xff", b"-"])
def test_a_line_that_is_no_object_is_a_problem(line: bytes):
    (problem,) = _problems(DECODE[0], (0, b'{"event": "header"}\n' + line))
    assert problem.startswith("line 2 is not a JSON object")
    reading = Verdict("", [])
    compare_reading(reading, {}, 0, line, "")
    assert [problem.partition(":")[0] for problem in reading.problems] == ["the output is not a JSON object"]


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


@pytest.mark.parametrize(("name", "may"), [("cut-in-pages", True), ("cut-empty", True), ("cut-in-tail", False)])
def test_only_a_stream_without_a_checkpoint_may_exit_with_20(name: str, may: bool):
    (vector,) = [vector for vector in DECODE if vector["id"] == name]
    code, lines = _restored(load_vector(FOLDER, vector), Dialect(**vector["dialect"]), strict=False)
    assert code == 0 and _problems(vector, (0, lines)) == []
    assert (_problems(vector, (20, lines)) == []) is may
    assert _problems(vector, (21, lines)) != []


# Pages of a codec alone


def _array(page: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(page), dtype=np.uint8).reshape(1, -1)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("pair", PAGES, ids=_id)
def test_our_codecs(pair: tuple[str, dict[str, Any]], kernel: str):
    name, vector = pair
    codec = get_codec(name, kernel=kernel)
    old, encoded = _array(spelled_page(vector["old"])), spelled(vector["encoded"])
    before = old.copy()
    if fault := vector.get("error"):
        with pytest.raises(Malformed) as caught:
            codec.apply(encoded, old)
        assert (caught.value.offset, caught.value.section) == (fault["offset"], fault["section"])
        assert (old == before).all()
        return
    new = _array(spelled_page(vector["new"]))
    if vector["written"]:
        assert bytes(codec.encode(new, old.copy(), full=np.array([vector["full"]]))) == encoded
    assert codec.apply(encoded, old) == len(encoded)
    assert (old == new).all()


def _plain(program: Any, pair: tuple[str, dict[str, Any]]) -> bool:
    """Whether a plain codec does what a vector expects."""
    name, vector = pair
    old, encoded = spelled_page(vector["old"]), spelled(vector["encoded"])
    try:
        made = program["decode"](name, old, encoded)
    except program["Refused"] as refused:
        return "error" in vector and refused.args[:2] == (vector["error"]["offset"], vector["error"]["section"])
    except Exception:
        return False
    if "error" in vector or made != spelled_page(vector["new"]):
        return False
    return not vector["written"] or program["ENCODERS"][name](old, made, vector["full"]) == encoded


@pytest.mark.parametrize("pair", PAGES, ids=_id)
def test_the_plain_codecs(pair: tuple[str, dict[str, Any]]):
    assert _plain(vars(page_codec), pair)


MISTAKES = [
    # walks of delta and rle
    ("plain_decoder", "need(last < offset <= 4092 and", "need(-1 < offset <= 4092 and"),
    ("plain_decoder", "need(last < offset <= 4092 and", "need(last <= offset <= 4092 and"),
    ("plain_decoder", "need(last < offset <= 4092 and", "need(last < offset <= 4096 and"),
    ("plain_decoder", "offset >= 0 and offset % 4 == 0", "offset >= 0"),
    ("plain_decoder", "need(value == 0, at", "need(True, at"),
    ("plain_decoder", "offset, data[at + 2 : at + 6])", "offset, data[at + 2 : at + 6][::-1])"),
    ("plain_decoder", "need(len(ends) == count, at", "need(True, at"),
    ("plain_decoder", "run = data[at] & 0x80, data[at] & 0x7F", "run = data[at] & 0x80 ^ 0x80, data[at] & 0x7F"),
    ("plain_decoder", "need(run or not words, at", "need(True, at"),
    ("plain_decoder", "need(words + run <= 1024, at", "need(True, at"),
    ("plain_decoder", "need(len(data) - at - 1 >= size, at", "need(True, at"),
    # xbzrle
    ("page_codec", '">BH", data, at)', '"<BH", data, at)'),
    ("page_codec", "1: range(3, PAGE + 1)", "1: range(3, PAGE)"),
    ("page_codec", "1: range(3, PAGE + 1)", "1: range(0, PAGE + 1)"),
    ("page_codec", "1: range(3, PAGE + 1)", "1: range(3, PAGE + 2)"),
    ("page_codec", "2: range(PAGE, PAGE + 1)", "2: range(PAGE + 1)"),
    ("page_codec", "0: range(1)", "0: range(2)"),
    ("page_codec", "need(gap or not offset, at", "need(True, at"),
    ("page_codec", "need(gap or not offset, at", "need(gap, at"),
    ("page_codec", "need(run, second", "need(True, second"),
    ("page_codec", "need(offset <= PAGE and at <= end", "need(offset <= PAGE"),
    ("page_codec", "need(offset <= PAGE and at <= end", "need(at <= end"),
    ("page_codec", "and data[at + 1] < 0x80, at", ", at"),
    ("page_codec", "at + 1 < end and data", "data"),
    ("page_codec", "data[at] & 0x7F | data[at + 1] << 7", "data[at + 1] | (data[at] & 0x7F) << 7"),
    # encoders
    ("page_codec", "len(changed) > 682", "len(changed) > 681"),
    ("page_codec", "len(changed) > 682", "len(changed) > 683"),
    ("page_codec", "if full or len(changed)", "if len(changed)"),
    ("page_codec", "while run < 127 and", "while run < 126 and"),
    ("page_codec", "if full or old == new", "if old == new"),
    ("page_codec", "if old == new and not full:", "if old == new:"),
    ("page_codec", "        if at == PAGE:\n            break\n", ""),
    ("page_codec", "if value < 0x80 else", "if value < 0x7F else"),
    ("page_codec", "        if len(out) > PAGE:", "        if len(out) >= PAGE:"),
]


@pytest.mark.parametrize(("tool_name", "old", "new"), MISTAKES)
def test_the_pages_catch_mistakes(tool_name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    source = (ROOT / "tools" / f"{tool_name}.py").read_text()
    assert source.count(old) == 1
    changed = ModuleType(tool_name)
    exec(compile(source.replace(old, new), tool_name, "exec"), vars(changed))
    program = vars(changed)
    if tool_name == "plain_decoder":
        monkeypatch.setitem(sys.modules, tool_name, changed)
        program = vars(_tool("page_codec"))
    assert not all(_plain(program, pair) for pair in PAGES)


def _conform(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    code = conformance.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_plain_codecs_are_commands(capsys: pytest.CaptureFixture[str]):
    tried = [f"--only={name}" for name in ("xbzrle-fox", "xbzrle-folded", "xbzrle-must-go-full", "xbzrle-bad-kind")]
    command = f"{sys.executable} {ROOT / 'tools' / 'page_codec.py'}"
    code, rows = _conform(
        capsys, "--codec", "xbzrle", "--decoder", f"{command} decode", "--encoder", f"{command} encode", *tried
    )
    # A bad page, and one that encoders do not write, are for decoders only.
    assert code == 0 and len(rows) == 6 and all(row["passed"] for row in rows)


RAW = "import sys; page = sys.stdin.buffer.read()[4096:]; sys.stdout.buffer.write(b'\\2\\x10\\0' + page)"
OLD = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[:4096])"


def test_a_page_encoder_may_choose_other_bytes_where_a_judge_reads_them(capsys: pytest.CaptureFixture[str]):
    judge = f"{sys.executable} {ROOT / 'tools' / 'page_codec.py'} decode"
    encoder = ["--codec", "xbzrle", "--encoder", f'{sys.executable} -c "{RAW}"', "--only", "xbzrle-fox"]
    code, (row,) = _conform(capsys, *encoder)
    assert code == 1 and row["problems"]
    code, (row,) = _conform(capsys, *encoder, "--judge", judge)
    assert code == 0 and row["notes"]
    # A judge that says the old page is no proof of the new one, nor of one that must go full.
    for only in ("xbzrle-fox", "xbzrle-must-go-full"):
        lazy = ["--codec", "xbzrle", "--encoder", f'{sys.executable} -c "{OLD}"', "--only", only]
        assert _conform(capsys, *lazy, "--judge", f'{sys.executable} -c "{OLD}"')[0] == 1


@pytest.mark.parametrize(
    ("vector", "code", "output", "passes"),
    [
        ("delta-fox", 0, "new", True),
        ("delta-fox", 0, "old", False),
        ("delta-fox", 0, "", False),
        ("delta-fox", 20, "new", False),
        ("delta-bad-twice", 20, "", True),
        ("delta-bad-twice", 20, "old", False),
        ("delta-bad-twice", 1, "", False),
        ("delta-bad-twice", 0, "old", False),
    ],
)
def test_what_a_page_decoder_must_say(vector: str, code: int, output: str, passes: bool):
    (expected,) = [one for _, one in PAGES if one["id"] == vector]
    verdict = Verdict(vector, [])
    conformance.compare_page(verdict, expected, code, spelled_page(expected[output]) if output else b"", "")
    assert verdict.passed is passes


def test_a_codec_without_pages_is_refused(capsys: pytest.CaptureFixture[str]):
    assert conformance.main(["--codec", "zip", "--decoder", "true"]) == 2
    assert "delta, rle, xbzrle" in capsys.readouterr().err


# The files


def test_the_manifest_keeps_to_its_schema():
    schema = json.loads((FOLDER / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads((FOLDER / "manifest.json").read_text()))
    of_a_vector = jsonschema.Draft202012Validator({"$ref": "#/$defs/vector", "$defs": schema["$defs"]})
    for vector in VECTORS:
        of_a_vector.validate(vector)
    of_a_codec = jsonschema.Draft202012Validator({"$ref": "#/$defs/codec_file", "$defs": schema["$defs"]})
    for name, file in json.loads((FOLDER / "manifest.json").read_text())["codecs"].items():
        of_it = json.loads((FOLDER / file).read_text())
        of_a_codec.validate(of_it)
        assert of_it["codec"] == name
    assert not of_a_codec.is_valid({"codec": "rle", "vectors": [PAGES[0][1] | {"new": "1"}]})
    assert len({vector["id"] for _, vector in PAGES}) == len(PAGES)
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
    for name in ("stream.md", "delta.md", "rle.md", "xbzrle.md"):
        text = re.sub(r"^```.*?^```$", "", (SPECS / name).read_text(), flags=re.M | re.S)
        for number, body in re.findall(r"^##+ (\d+(?:\.\d+)?) [^\n]*\n(.*?)(?=^##|\Z)", text, re.M | re.S):
            found[f"{name} §{number}"] = body
    return found


UNTRIED = {"stream.md §1": "says what *must* means, and has no rule"}


def test_every_must_is_tried():
    tried = {section for vector in VECTORS for section in vector["sections"]}
    tried |= {section for _, vector in PAGES for section in vector["sections"]}
    must = {section for section, text in _sections().items() if re.search(r"\bmust\b", text, re.I)}
    assert len(must) > 20
    assert sorted(must - tried) == sorted(UNTRIED)


def test_no_vector_names_a_section_that_does_not_exist():
    named = {section for vector in [*VECTORS, *(one for _, one in PAGES)] for section in vector["sections"]}
    named |= {vector["error"]["section"] for vector in [*REFUSED, *(one for _, one in PAGES if "error" in one)]}
    assert sorted(named - set(_sections())) == []


IN_A_BODY = {
    EventKind.BATCH,
    EventKind.COMPRESSED_DATA,
    EventKind.INFO,
    EventKind.LAST_CHECKPOINT,
    EventKind.ENABLE_COMPRESSION,
    EventKind.END_OF_BODY,
}
"""What the bytes of a body can say. What stands elsewhere is read as what belongs there: a tail in a body as a chunk, a
chunk behind the id 0 as a tail, a batch in front of the header as p2m_size. So these pairs cannot be expressed."""


def _kind(data: bytes) -> EventKind | None:
    """What a body's next bytes are."""
    number = int.from_bytes(data[:4], "little", signed=True)
    if number >= 0:
        return EventKind.BATCH if number else EventKind.END_OF_BODY
    named = {
        chunks.ChunkId.COMPRESSED_DATA: EventKind.COMPRESSED_DATA,
        chunks.ChunkId.ENABLE_COMPRESSION: EventKind.ENABLE_COMPRESSION,
        chunks.ChunkId.LAST_CHECKPOINT: EventKind.LAST_CHECKPOINT,
    }
    return named.get(number, EventKind.INFO) if number in chunks.CHUNKS else None


def _reached(vector: dict[str, Any]) -> set[tuple[StreamState, EventKind]]:
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
            if kind is EventKind.TAIL and course.last_checkpoint:
                kind = EventKind.LAST_TAIL
            pairs.add((course.state, kind))
            assert course.step(event) is not None
    except StreamError as error:
        kind = None
        if course.state in BODIES:
            kind = _kind(data[error.offset :])
        elif course.state is StreamState.HEADER or (course.state is StreamState.FRONT and error.offset == 0):
            xl = FRONTS["xl"].magic
            behind = data[len(xl) + 16 :] if data.startswith(xl) else data
            kind = EventKind.FILE_HEADER if behind.startswith(tuple(front.magic for front in FRONTS.values())) else None
        if kind is not None and (course.state, kind) not in TRANSITIONS:
            pairs.add((course.state, kind))
    return pairs


def test_every_pair_of_the_table_is_reached():
    reached = set().union(*map(_reached, DECODE))
    forbidden = {(body, kind) for body in BODIES for kind in IN_A_BODY} | {(StreamState.HEADER, EventKind.FILE_HEADER)}
    assert sorted(map(str, set(TRANSITIONS) - reached)) == []
    assert sorted(map(str, forbidden - set(TRANSITIONS) - reached)) == []


def test_bytes_behind_the_last_checkpoint_are_tried():
    # DONE has no transitions: what comes there is counted.
    assert any(
        event.get("trailing_bytes") and "stream.md §8.4" in v["sections"] for v in DECODE for event in v["events"]
    )
