"""The specification is what the code does: every example in specs/ is run, and every § that the code cites exists.

Examples are fenced blocks tagged `page` or `hex`; specs/README.md says what their attributes mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3 as blake3_of

from remus_ckpt import Limits, PageBatch, Position, Restorer, Sender, batches, errors
from remus_ckpt.codec import get_codec
from remus_ckpt.codec.kernels import KERNELS
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, PageType
from remus_ckpt.wire.formats import FORMATS
from remus_ckpt.wire.qemu import sections as qemu
from remus_ckpt.wire.xen import v2
from remus_ckpt.wire.xen.chunks import CHUNKS
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.states import TRANSITIONS
from remus_ckpt.wire.xen.writer import EventWriter

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "specs"
NUMBERED = {path.name for path in SPECS.glob("*.md")} - {"README.md", "errata.md", "permissive.md"}


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced example."""

    file: str
    tag: str
    attributes: dict[str, str]
    lines: list[str]

    def __str__(self) -> str:
        return f"{self.file.removesuffix('.md')}-{self.attributes['name']}"

    def pieces(self):
        """(stated offset or None, bytes) of each line: `offset: bytes * count  # comment`."""
        for line in self.lines:
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = re.fullmatch(r"(?:([0-9a-f]+):)?\s*((?:[0-9a-f]{2}\s*)+)(?:\* (\d+))?", text)
            assert match, f"{self}: {line!r}"
            offset, data, count = match.groups()
            yield None if offset is None else int(offset, 16), bytes.fromhex(data) * int(count or 1)

    def bytes(self) -> bytes:
        """All lines joined; an offset that is stated must be the true one."""
        data = b""
        for offset, piece in self.pieces():
            assert offset in (None, len(data)), f"{self}: {offset:#x} stands at {len(data):#x}"
            data += piece
        return data

    def page(self) -> np.ndarray:
        """uint8[4096]: the lines at their offsets, zeros elsewhere."""
        page = np.zeros(PAGE_SIZE, dtype=np.uint8)
        for offset, piece in self.pieces():
            page[offset : offset + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        return page


def _blocks() -> list[Block]:
    found = []
    for path in sorted(SPECS.rglob("*.md")):
        for info, body in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", path.read_text(), re.M | re.S):
            tag, *attributes = shlex.split(info)
            if tag in ("hex", "page"):
                pairs = dict(item.partition("=")[::2] for item in attributes)
                found.append(Block(path.name, tag, pairs, body.splitlines()))
    return found


BLOCKS = _blocks()
PAGES = {block.attributes["name"]: block.page() for block in BLOCKS if block.tag == "page"}
PAGES["zeros"] = np.zeros(PAGE_SIZE, dtype=np.uint8)


def _with(attribute: str) -> list[Block]:
    chosen = [block for block in BLOCKS if attribute in block.attributes]
    assert chosen, attribute
    return chosen


def _pages(names: str) -> np.ndarray:
    return np.stack([PAGES[name] for name in names.split(",")])


def _refusal(block: Block) -> tuple[str, int]:
    return block.attributes["refused"], int(block.attributes["at"])


def test_every_block_has_one_name_and_is_run():
    names = [block.attributes["name"] for block in BLOCKS]
    assert len(names) == len(set(names))
    kinds = {"codec", "chunk", "stream", "position", "scene"}
    assert all(block.tag == "page" or len(kinds & set(block.attributes)) == 1 for block in BLOCKS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [b for b in _with("codec") if "before" in b.attributes and b.tag == "hex"], ids=str)
def test_encoded_pages(block: Block, kernel: str):
    codec = get_codec(block.attributes["codec"], kernel=kernel)
    before, after = _pages(block.attributes["before"]), _pages(block.attributes["after"])
    encoded = block.bytes()
    if "decode-only" not in block.attributes:
        full = np.full(len(after), "full" in block.attributes)
        assert bytes(codec.encode(after, before.copy(), full=full)) == encoded
    assert codec.check(encoded, len(after)) == len(encoded)
    restored = before.copy()
    assert codec.apply(encoded, restored) == len(encoded)
    assert (restored == after).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [b for b in _with("codec") if "refused" in b.attributes], ids=str)
def test_refused_pages(block: Block, kernel: str):
    codec = get_codec(block.attributes["codec"], kernel=kernel)
    with pytest.raises(Malformed) as caught:
        codec.check(block.bytes(), int(block.attributes["pages"]))
    assert (caught.value.section, caught.value.offset) == _refusal(block)


@pytest.mark.parametrize("block", _with("chunk"), ids=str)
def test_chunks(block: Block):
    """A chunk in a body is read as itself, and the writer writes the same bytes."""
    word = int(block.attributes["word"])
    reader = Reader(strict=True)
    front = (4).to_bytes(word, "little")
    # An entry without data goes before it, so that the header's word and guest can be told.
    front += (1).to_bytes(4, "little") + 0xF0000000.to_bytes(word, "little")
    reader.feed(front + block.bytes())
    seen = []
    while (event := reader.next_event()) is not None:
        seen.append(event)
    header, batch, *chunks = seen
    assert [getattr(event, "id", None) or _chunk_name(event) for event in chunks] == [_chunk(block)]
    writer = EventWriter(word)
    for event in (header, batch):
        writer.write(event)
    assert b"".join(bytes(part) for part in writer.write(chunks[0])) == block.bytes()


def _chunk(block: Block):
    kind = next(kind for kind in CHUNKS.values() if kind.name == block.attributes["chunk"])
    return kind.id if kind.name.startswith("HVM_") else kind.name


def _chunk_name(event) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).upper()


def _run(block: Block, *, strict: bool) -> Restorer:
    """Commits every checkpoint; raises what the stream brings."""
    attributes = block.attributes
    restorer = Restorer(strict=strict)
    restorer.feed(block.bytes())
    restorer.feed_eof()
    seen = list(restorer.checkpoints())
    assert len(seen) == int(attributes.get("checkpoints", 1))
    for item in filter(None, attributes.get("memory", "").split(",")):
        pfn, _, name = item.partition(":")
        assert (restorer.memory[int(pfn)] == PAGES[name]).all()
    if "dialect" in attributes:
        dialect = restorer.dialect
        assert attributes["dialect"] == f"{dialect.word},{dialect.guest},{dialect.codec}"
    return restorer


@pytest.mark.parametrize("block", [b for b in _with("stream") if b.attributes["stream"] == "valid"], ids=str)
def test_valid_streams(block: Block):
    restorer = _run(block, strict="loose" not in block.attributes)
    assert restorer.end.complete
    assert set(restorer.reader.deviations) <= set(block.attributes.get("loose", "").split(","))


@pytest.mark.parametrize("block", [b for b in _with("stream") if b.attributes["stream"] == "cut"], ids=str)
def test_cut_streams(block: Block):
    restorer = _run(block, strict=True)
    assert not restorer.end.complete
    assert restorer.end.trailing_bytes == int(block.attributes["trailing"])


@pytest.mark.parametrize("block", [b for b in _with("stream") if b.attributes["stream"] == "refused"], ids=str)
def test_refused_streams(block: Block):
    restorer = Restorer()
    restorer.feed(block.bytes())
    restorer.feed_eof()
    seen = 0
    with pytest.raises(getattr(errors, block.attributes.get("error", "Malformed"))) as caught:
        for _ in restorer.checkpoints():
            seen += 1
    assert (caught.value.section, caught.value.offset) == _refusal(block)
    assert seen == int(block.attributes.get("checkpoints", 0))


@pytest.mark.parametrize("block", _with("accepted"), ids=str)
def test_accepted_deviations(block: Block):
    """Accepted under its name and no other; refused under strict."""
    name = block.attributes["accepted"]
    restorer = _run(block, strict=False)
    assert set(restorer.reader.deviations) == (set() if "strict-only" in block.attributes else {name})
    with pytest.raises(Malformed) as caught:
        _run(block, strict=True)
    assert (caught.value.section, caught.value.offset) == _refusal(block)
    assert caught.value.message.startswith(name)


def test_every_deviation_has_its_section_and_example():
    named = set()
    for path in (ROOT / "remus_ckpt").rglob("*.py"):
        named |= set(re.findall(r'deviate\(\s*"([a-z0-9-]+)"', path.read_text()))
    headings = re.findall(r"^## `([a-z0-9-]+)`$", (SPECS / "permissive.md").read_text(), re.M)
    assert sorted(headings) == sorted(named)
    assert {block.attributes["accepted"] for block in _with("accepted")} == named


@pytest.mark.parametrize("block", _with("position"), ids=str)
def test_positions(block: Block):
    """specs/stream.md §9.3 in plain digests, and what the code makes of it."""
    name = block.attributes.get("digest", "sha256")
    number, plain = {"sha256": (1, hashlib.sha256), "blake3": (2, blake3_of)}[name]
    before, epoch = block.attributes["before"], int(block.attributes["epoch"])
    body = bytes.fromhex(block.attributes["body"])
    previous = bytes(32) if before == "none" else bytes.fromhex(before)
    device_state = block.attributes["device-state"].encode()
    front = b"remus position %d\0" % number
    chain = plain(b"".join([front, previous, epoch.to_bytes(8, "little"), body, plain(device_state).digest()])).digest()
    assert chain == block.bytes()
    follows = None if before == "none" else Position(epoch - 1, previous)
    assert Position.after(follows, body, device_state, digest=name) == Position(epoch, chain)


@pytest.mark.parametrize("example", ["own-stream", "own-stream-2"])
def test_the_example_streams_carry_those_positions_and_their_digests(example: str):
    block = next(block for block in _with("stream") if block.attributes["name"] == example)
    data = block.bytes()
    name = "blake3" if example == "own-stream-2" else "sha256"
    plain = {"sha256": hashlib.sha256, "blake3": blake3_of}[name]
    positions = [block for block in _with("position") if block.attributes.get("digest", "sha256") == name]
    restorer = Restorer()
    restorer.feed(data)
    for checkpoint, stated in zip(restorer.checkpoints(), positions, strict=True):
        record = checkpoint.record
        assert record.after.digest == stated.bytes()
        assert str(record.epoch) == stated.attributes["epoch"]
        assert (record.before is None) == (stated.attributes["before"] == "none")
        assert record.device_state.decode() == stated.attributes["device-state"]
        body = data[checkpoint.start : checkpoint.tail.offset]
        assert plain(body).hexdigest() == stated.attributes["body"]
        covered, carried = data[checkpoint.start : checkpoint.end - 32], data[checkpoint.end - 32 : checkpoint.end]
        assert carried == plain(covered).digest()
        assert record.digest == name


def _nine_thousand() -> bytes:
    """Checkpoint 1 of the scene in specs/stream.md §6.7: page k of 9,000 has k + 1 in its first word."""
    sender = Sender(9000)
    for _ in sender.checkpoint([]):
        pass
    pages = np.zeros((9000, PAGE_SIZE), dtype=np.uint8)
    pages.view("<u4")[:, 0] = np.arange(1, 9001)
    return b"".join(bytes(part) for group in sender.checkpoint(batches(np.arange(9000), pages)) for part in group)


def _around_a_table() -> bytes:
    """Checkpoint 1 of the scene in specs/stream.md §6.6: PFNs 1, 2 and 3 changed, and 2 is a page table."""
    sender = Sender(4, codec="rle")
    for _ in sender.checkpoint([]):
        pass
    pages = np.zeros((3, PAGE_SIZE), dtype=np.uint8)
    pages.view("<u4")[:, 0] = (1, 2, 3)
    types = np.array([PageType.NOTAB, PageType.L1TAB, PageType.NOTAB], dtype=np.uint8)
    scan = [PageBatch(np.array([1, 2, 3], dtype=np.uint64), types, pages)]
    return b"".join(bytes(part) for group in sender.checkpoint(scan) for part in group)


SCENES = {"nine-thousand": _nine_thousand, "around-a-table": _around_a_table}


@pytest.mark.parametrize("block", _with("scene"), ids=str)
def test_scenes(block: Block):
    """Excerpts: each line stands at its offset in the bytes of the scene."""
    data = SCENES[block.attributes["scene"]]()
    for offset, piece in block.pieces():
        assert data[offset : offset + len(piece)] == piece, hex(offset)


# Tables


def _rows(file: str, heading: str) -> list[list[str]]:
    text = (SPECS / file).read_text()
    part = re.split(rf"^#+ {re.escape(heading)}\b[^\n]*$", text, maxsplit=1, flags=re.M)[1]
    part = re.split(r"^#+ ", part, maxsplit=1, flags=re.M)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_the_table_of_chunks():
    rows = {int(row[0].replace("−", "-")): row for row in _rows("stream.md", "4.1") if re.match("−", row[0])}
    assert {number: row[1].strip("`") for number, row in rows.items()} == {k: v.name for k, v in CHUNKS.items()}
    for number, row in rows.items():
        assert CHUNKS[number].section == f"stream.md {row[-1]}"


def test_the_table_of_limits():
    places = (("stream.md", "1.4"), ("qemu-ram.md", "9"), ("formats.md", "5"))
    rows = {row[0].strip("`"): row[1] for place in places for row in _rows(*place)}
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    stated = {}
    for name, value in rows.items():
        number, _, unit = value.replace(",", "").partition(" ")
        stated[name] = int(number) * units.get(unit, 1)
    assert stated == dataclasses.asdict(Limits())


def test_the_tables_of_qemus_stream():
    flags = {int(row[0], 16): row[1] for row in _rows("qemu-ram.md", "4") if row[0].startswith("0x")}
    assert flags == {int(flag): flag.name for flag in qemu.RamFlag}
    types = {int(row[0], 16): row[1] for row in _rows("qemu-ram.md", "2.2")}
    assert {number: name.upper() for number, name in types.items()} == {int(one): one.name for one in qemu.SectionType}
    numbers = [int(number) for row in _rows("qemu-ram.md", "2.5") for number in row[0].split(", ")]
    assert sorted(numbers) == sorted(qemu.Command)
    refused = [row[0].split(", ") for row in _rows("qemu-ram.md", "2.5") if row[2].startswith("refused")]
    assert {int(number) for row in refused for number in row} == set(qemu.REFUSED_COMMANDS)


def test_the_table_of_formats():
    words = {row[0].strip("`") for row in _rows("formats.md", "1")}
    assert words == {"xen", "remus", "mapped-ram", *(row.word for row in FORMATS if row.word)} - {"multifd"}


def test_the_tables_of_xens_v2_stream():
    for section, layer in (("5", v2.Layer.LIBXC), ("6", v2.Layer.LIBXL)):
        rows = {int(row[0], 16): (row[1], f"xen-v2.md §{row[2]}") for row in _rows("xen-v2.md", section)}
        table = {
            number: (row.kind.name.removeprefix("LIBXL_"), row.section)
            for (owner, number), row in v2.RECORDS.items()
            if owner is layer
        }
        assert rows == table


def test_the_table_of_states():
    rows = _rows("stream.md", "10.1")
    stated = {(row[0].strip("`"), row[1].strip("`")): row[2].strip("`") for row in rows}
    assert stated == {(state.name, kind.name): after.name for (state, kind), after in TRANSITIONS.items()}


def test_the_table_of_page_types():
    stated = {int(row[0], 16): row[1].strip("`") for row in _rows("stream.md", "5.2")}
    known = {value: name for value, name in stated.items() if name != "none"}
    assert known == {kind.value: kind.name for kind in PageType}
    assert set(stated) == set(range(16))


# Citations


def _headings(file: str) -> set[str]:
    return set(re.findall(r"^#+ (?:§)?(\d+(?:\.\d+)*)\b", (SPECS / file).read_text(), re.M))


SOURCES = sorted(path for path in (ROOT / "remus_ckpt").rglob("*") if path.suffix in (".py", ".c", ".h"))


def _citations(text: str):
    """(spec, section): a bare § belongs to the spec that was named last; `§3–§6` and `§3 to §6` cite both ends."""
    current = None
    for name, section in re.findall(r"\b([a-z][a-z0-9-]*\.md)\b|§(\d+(?:\.\d+)*)", text):
        if name in NUMBERED:
            current = name
        elif section:
            yield current, section


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_section_that_the_code_cites_exists(path: Path):
    text = path.read_text()
    for file in re.findall(r"specs/([a-z][a-z0-9-]*\.md)", text):
        assert (SPECS / file).is_file(), file
    missing = {(file, section) for file, section in _citations(text) if file is None or section not in _headings(file)}
    assert not missing


@pytest.mark.parametrize("path", sorted(SPECS.rglob("*.md")), ids=lambda path: path.name)
def test_every_section_that_the_specification_cites_exists(path: Path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    errata = set(re.findall(r"^## (E\d+)\b", (SPECS / "errata.md").read_text(), re.M))
    missing = set(re.findall(r"\bE\d+\b", text)) - errata
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link and not (path.parent / link).exists():
            missing.add(link)
    pattern = r"(?:`?\b([a-z][a-z0-9-]*\.md)`? )?(§\d+(?:\.\d+)*(?:(?:, | and | to |–)§\d+(?:\.\d+)*)*)"
    for name, sections in re.findall(pattern, text):
        # With no spec named right before it, a § is of this file.
        file = name or path.name
        known = _headings(file) if file in NUMBERED else set()
        missing |= {(file, section) for section in re.findall(r"§(\d+(?:\.\d+)*)", sections) if section not in known}
    assert not missing


def test_each_decision_has_a_number_of_its_own():
    pages = sorted((SPECS / "decisions").glob("*.md"))
    assert len({page.name[:4] for page in pages}) == len(pages) > 0
    for page in pages:
        assert page.read_text().startswith(f"# {int(page.name[:4])}: "), page.name
