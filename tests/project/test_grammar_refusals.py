"""What the grammar refuses, what it cannot say, and the text of the grammar."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from grammar_trees import (
    END,
    GRAMMAR,
    REFUSALS,
    SPECS,
    TOOL,
    batch,
    compare,
    examples,
    fields,
    kaitaistruct,
    page,
    parse,
    read,
    sent,
    tail_hvm,
    vector_bytes,
    vectors,
    written,
)

from remus_ckpt.errors import StreamError
from remus_ckpt.pages import PageType
from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import RECORD_MAGIC
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE, ChunkId
from remus_ckpt.wire.xen.dialect import Dialect, detect_header

# What the grammar refuses, and what it cannot


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _i32(value: int) -> bytes:
    return struct.pack("<i", value)


HVM = written(8, events.Header(word=8, guest="hvm", p2m_size=4))
END_AND_TAIL = _i32(0) + written(8, events.Header(word=8, guest="hvm", p2m_size=4), END, tail_hvm())[12:]
XL = written(8, events.FileHeader(kind="xl", data=b""))
PV = (1200).to_bytes(8, "little")


def _info(*blocks: bytes, total: int | None = None) -> bytes:
    joined = b"".join(blocks)
    return PV + b"\xff" * 8 + struct.pack("<I", len(joined) if total is None else total) + joined + bytes(30000)


def _block(name: bytes, data: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if size is None else size) + data


def _hvm_body(*chunks: bytes) -> bytes:
    return HVM + b"".join(chunks) + END_AND_TAIL


def _with_record(state: bytes) -> bytes:
    record = b"RemusDeviceModelState" + struct.pack("<I", len(state)) + state
    return HVM + _i32(0) + bytes(28) + record


def _without_record() -> bytes:
    """A stream of ours, and a checkpoint of Xen's behind it."""
    return sent(8, "delta", 1) + END_AND_TAIL


def _with_record_late() -> bytes:
    first = HVM + struct.pack("<i", -13) + END_AND_TAIL
    body = _i32(0) + bytes(28)
    return first + body + _with_record(RECORD_MAGIC + bytes(60))[len(HVM) + len(body) :]


REFUSED: dict[str, tuple[str, bytes]] = {
    "p2m-size-0": ("hvm", _patched(_hvm_body(), 0, bytes(8))),
    "p2m-size-29-bits": ("hvm", _patched(_hvm_body(), 0, (1 << 28).to_bytes(8, "little"))),
    "xl-magic": ("hvm", _patched(XL, 27, b"\r") + _hvm_body()),
    "xl-byte-order": ("hvm", _patched(XL, 32, b"\1\2\3\4") + _hvm_body()),
    "xl-v2": ("hvm", _patched(XL, 36, b"\2") + _hvm_body()),
    "xl-mandatory-flag": ("hvm", _patched(XL, 36, b"\4") + _hvm_body()),
    "v2-behind-xl": ("hvm", XL + b"\xff" * 8 + b"XENF" + bytes(40)),
    "xend-negative": ("hvm", b"LinuxGuestRecord" + b"\xff" * 4 + _hvm_body()),
    "block-beyond-total": ("pv", _info(_block(b"what", bytes(8), size=9))),
    "block-head-cut": ("pv", _info(_block(b"what", b"") + bytes(7))),
    "vcpu-size": ("pv", _info(_block(b"vcpu", bytes(2801)))),
    "extv-size": ("pv", _info(_block(b"extv", bytes(1)))),
    "xcnt-size": ("pv", _info(_block(b"xcnt", bytes(8)))),
    "xcnt-15": ("pv", _info(_block(b"xcnt", _i32(15)))),
    "unmapped-beyond-memory": ("pv", PV + bytes(3 * 8) + _i32(0) + _i32(1201) + bytes(30000)),
    "count-1025": ("hvm", _hvm_body(_i32(1025), bytes(1025 * 8))),
    "chunk-22": ("hvm", _hvm_body(_i32(-22))),
    "vcpu-negative": ("hvm", _hvm_body(_i32(-2), _i32(-1), bytes(8))),
    "tmem-first-ones": ("hvm", _hvm_body(_i32(-5), struct.pack("<8I", 1, 1, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF))),
    "tmem-second-ones": ("hvm", _hvm_body(_i32(-5), struct.pack("<8I", 1, 1, 0xFFFFFFFF, 0, 0, 0, 0, 0xFFFFFFFF))),
    "compressed-in-round-0": ("hvm", _hvm_body(_i32(-12), bytes(8))),
    "compressed-in-plain-round": ("hvm", _hvm_body() + _i32(-13) + _i32(-12) + bytes(8) + END_AND_TAIL),
    "type-5": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 5 << 28), page(1))),
    "type-7": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 7 << 28), page(1))),
    "pfn-beyond-memory": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 4), page(1))),
    "signature": ("hvm", HVM + _i32(0) + bytes(28) + b"DeviceModelRecord0003" + bytes(4)),
    "not-qemu": ("hvm", HVM + _i32(0) + bytes(28) + b"QemuDeviceModelRecordQEVN"),
    "record-empty": ("hvm", _with_record(b"")),
    "record-of-nobody": ("hvm", _with_record(bytes(80))),
    "record-too-short": ("hvm", _with_record(RECORD_MAGIC + bytes(DIGEST_BYTES - 1))),
    "no-record-behind-record": ("hvm", _without_record()),
    "record-behind-no-record": ("hvm", _with_record_late()),
}

WITHOUT_RULE = {"block-beyond-total", "block-head-cut", "record-empty", "record-too-short"}
"""Refused because there are too few bytes, not by a rule."""

_OWN = sent(8, "delta", 2)
ACCEPTED: dict[str, bytes] = {
    "digest": _patched(_OWN, len(_OWN) - 1, bytes([_OWN[-1] ^ 1])),
    "map": _patched(_OWN, _OWN.index(RECORD_MAGIC) + len(RECORD_MAGIC), b"\xc1"),
    "limit": _hvm_body(_i32(-2), _i32(8192), bytes(8 * 129)),
}


@pytest.mark.node
@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_rule_is_refused_by_both(grammar: Any, name: str) -> None:
    guest, data = REFUSED[name]
    with pytest.raises(StreamError) as ours:
        read(data, Dialect(8, guest))
    with pytest.raises(REFUSALS) as theirs:
        parse(grammar, data, 8, guest)
    if name in WITHOUT_RULE:
        assert not isinstance(theirs.value, kaitaistruct.ValidationFailedError)
    else:
        # Not only both, but by the same section.
        (field,) = (field for field in fields() if field.path == theirs.value.src_path)
        assert ours.value.section in field.sections()


@pytest.mark.node
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_grammar_cannot_say(grammar: Any, name: str) -> None:
    with pytest.raises(StreamError):
        read(ACCEPTED[name], Dialect(8, "hvm"))
    parse(grammar, ACCEPTED[name], 8, "hvm")


@pytest.mark.node
@pytest.mark.parametrize("p2m_size", [1, MAX_P2M_SIZE])
def test_edges_of_memory(grammar: Any, p2m_size: int) -> None:
    items = [events.Header(word=8, guest="hvm", p2m_size=p2m_size), batch((p2m_size - 1, PageType.XALLOC), (0, 0))]
    compare(grammar, written(8, *items, END, tail_hvm()), Dialect(8, "hvm"))


@pytest.mark.node
def test_largest_batch(grammar: Any) -> None:
    items = [events.Header(word=8, guest="hvm", p2m_size=4), batch(*[(0, PageType.XTAB)] * 1024)]
    compare(grammar, written(8, *items, END, tail_hvm()), Dialect(8, "hvm"))


@pytest.mark.node
def test_dialect_is_one_of_four(grammar: Any) -> None:
    with pytest.raises(kaitaistruct.ValidationExprError):
        parse(grammar, _hvm_body(), 2, "hvm")


def verdict(grammar: Any, data: bytes, word: int | None, guest: str | None) -> str:
    """What the grammar says of a malformed stream: why it refuses it, or "accepted"."""
    try:
        known = detect_header(Dialect(word, guest), data[:16], 0)
    except StreamError:
        known = Dialect(word or 8, guest or "hvm")
    try:
        parse(grammar, data, known.word, known.guest)
    except REFUSALS as error:
        return f"{type(error).__name__} {getattr(error, 'src_path', None) or ''}".strip()
    return "accepted"


CANNOT_SAY = {f"stream.md §{number}" for number in ("1.2", "2.3", "6.2", "6.4", "9.2", "9.3", "9.4")}
"""Sections with a rule that the grammar's README lists as one that Kaitai cannot say."""


@pytest.mark.node
def test_table_of_malformed_streams(grammar: Any) -> None:
    """Prints what the grammar refuses by itself (pytest -rP). What it accepts, its README has a reason for."""
    rows = []
    for row in vectors():
        if "error" in row:
            dialect, section = row["dialect"], row["error"]["section"]
            reason = "strict" if row["strict"] else row["error"]["kind"]
            rows.append(
                (row["id"], section, reason, verdict(grammar, vector_bytes(row), dialect["word"], dialect["guest"]))
            )
    for parameter in examples("refused"):
        attributes, data = parameter.values
        if attributes is not None:
            kind = attributes.get("error", "")
            rows.append((attributes["name"], attributes["refused"], kind, verdict(grammar, data, None, None)))
    if not rows:
        pytest.skip("no specs/vectors/manifest.json, and no example in specs/*.md")
    for name, section, reason, said in rows:
        print(f"{name:40} {section:16} {reason:16} {said}")
    accepted = [row for row in rows if row[3] == "accepted"]
    print(f"{len(rows) - len(accepted)} of {len(rows)} refused by the grammar itself")
    assert not [
        (name, section)
        for name, section, reason, _ in accepted
        if section.startswith("stream.md") and section not in CANNOT_SAY and reason not in ("strict", "limit")
    ]


# The text of the grammar


@pytest.mark.node
@pytest.mark.parametrize(
    "language",
    ["rust", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cpp_stl", "go", "java", "javascript"))],
)
def test_compiles_to_other_languages(grammar: Any, tmp_path: Path, language: str) -> None:
    ran = subprocess.run([sys.executable, str(TOOL), str(tmp_path), "--language", language], check=False)
    assert ran.returncode == 0
    assert list(tmp_path.rglob("*remus_stream*")) or list(tmp_path.rglob("*RemusStream*"))


@pytest.mark.node
def test_program_of_the_readme(grammar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (GRAMMAR.parent / "README.md").read_text()
    (program,) = re.findall(r"^    from kaitaistruct.*?(?=^\S)", text, re.M | re.S)
    exec(textwrap.dedent(program), {"data": _hvm_body(_i32(-9))})
    assert capsys.readouterr().out == "8 -9\n12 0\n"


def test_every_field_names_its_section() -> None:
    every = fields()
    assert len(every) > 150
    assert not [field for field in every if "doc-ref: specs/stream.md §" not in field.text]


def test_every_section_named_is_there() -> None:
    prose = SPECS / "stream.md"
    if not prose.exists():
        pytest.skip("no specs/stream.md")
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", prose.read_text(), re.M))
    cited = set(re.findall(r"§(\d+(?:\.\d+)*)", GRAMMAR.read_text()))
    assert cited and not cited - headings


@pytest.mark.node
def test_names_are_those_of_the_code(grammar: Any) -> None:
    assert {chunk.name.upper(): chunk.value for chunk in grammar.ChunkId} == {c.name: c.value for c in ChunkId}
    assert {kind.name.upper(): kind.value for kind in grammar.PageType} == {t.name: t.value for t in PageType}
