#!/usr/bin/env python3
"""Makes the vectors in specs/vectors/ from the annotated sources in specs/vectors/src/.

    python tools/vectors.py            make what is missing or has changed, and the manifest
    python tools/vectors.py --check    change nothing; exit code 1 if anything would change

It does not use remus_ckpt: what a vector expects is written by hand beside its bytes. A source is a text file, one
statement a line, `#` begins a comment. First its head, up to a line `--`:

    sections: stream.md §3.1, stream.md §7.1      what it tries
    dialect: word 8, guest hvm, codec delta       as the manifest has it; what is left out is null
    origin: …                                     where it came from
    flags: handmade, …
    strict: yes                                   permissive.md does not apply (default: no)

`strict: both` makes two vectors of one file, ID and ID-strict: a line that begins with `accepted:` is for the first
only, one with `refused:` for the second.

Then bytes and expectations. `word` is as wide as the dialect says; numbers are decimal, 0x… or negative:

    u8 N · u16be N · i16 N · i32 N · u32 N · i32be N · u64 N · word N      one or several, separated by blanks
    hex 00 01 …        bytes; `11*4096` repeats          text ABC        ASCII, \\n and \\0 as in Python
    page PAGE          a page: parts OFFSET@HEX*COUNT, separated by commas, each behind the one before where it has no
                       offset, and zeros elsewhere: `page 68656c6c6f`, `page 11*4096`, `page 0@01,4092@ff*4`
    fill COUNT HEX     HEX COUNT times
    range FIRST LAST [TYPE]                   PFN entries, one `word` each
    deltas FIRST LAST HEX                     a record of `delta` for each word from the offset FIRST to LAST
    flip NAME+N HEX    the byte N behind that label is XORed; what was computed from it stays
    file NAME          a file beside the source
    label NAME         a name for this offset
    sha256 NAME        SHA-256 of the bytes from that label up to here
    blake3 NAME        BLAKE3 of them
    repeat COUNT STATEMENT
    include NAME ARGUMENT …                   the statements of NAME.inc; $1, $2 … are the arguments

    ! EVENT name=value …   an event that begins at this offset (specs/conformance.md §3.2). A value is JSON, or
                           3-7 (a list of numbers), 0*5 (a list of equal ones), @NAME (the offset of a label),
                           +N (the offset of the event, and N more), payload(NAME) (SHA-256 of the bytes from that
                           label to the label NAME.end)
    ! checkpoint EPOCH PAGES LEFT   memory after it: p2m_size from the header event, then PFN=PAGE or FIRST-LAST=PAGE
                           for every page that is not zero; or sha256=HEX of all of it
    ! error KIND SECTION   the fault begins at this offset
    ! @OFFSET EVENT …      an event at another offset, of a stream that was captured
    silent                 from here on nothing is said any more, since the fault has been met; bytes go on

Two statements are an event and its bytes at once:

    batch FORMAT PFN:TYPE …    the count and the entries; FIRST-LAST:TYPE for several, without a type 0. The pages of
                               format A are statements of their own
    compressed BYTES … end     id, length, and the payload between the two, which must have so many bytes

For an encoder, the head says `kind: encode`, and the body begins with what it is given:

    give p2m_size=16 word=8 codec="delta" buffer_pages=8196 reference_pages=null
    give checkpoint
    give batch PFN:TYPE:PAGE …     PFN:TYPE for an entry without data

What follows is the stream that must come out, up to its tails, whose length is the encoder's own: offsets are not
compared.

What is known of a vector stands in ID.json, and the names of these files in manifest.json.

The vectors of a page coding alone are one source, codec-NAME.pages, and become codec-NAME.json. Each begins with a line
`==== ID` and has a head and a body as above. Its head says `sections`, the page before as `old: PAGE`, and the page
after as `new: PAGE` where there is no fault; `full: yes` if it must go full, and `written: no` if encoders do not write
these bytes. Its body is the encoded page, and `! error …`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import struct
import sys
from pathlib import Path
from typing import Any

from plain_blake3 import blake3

FOLDER = Path(__file__).resolve().parent.parent / "specs" / "vectors"
PAGE_BYTES = 4096
FIRST_TYPE_WITHOUT_DATA = 0xD
COMPRESS_FROM_BYTES = 16 << 10
NUMBERS = {"u8": "<B", "u16be": ">H", "i16": "<h", "i32": "<i", "u32": "<I", "i32be": ">i", "u64": "<Q"}


class Source:
    """One source, assembled.

    text: what stands there from that line of the file on; by default all of it
    strict: which vector of a source for both it is to be; else as its head says
    """

    def __init__(self, path: Path, text: str | None = None, *, first_line: int = 0, strict: bool = False) -> None:
        self.path = path
        self.data = bytearray()
        self.labels: dict[str, int] = {}
        self.head: dict[str, str] = {}
        self.given: dict[str, Any] = {}
        self.p2m_size = 0
        self._events: list[dict[str, Any]] = []
        self._error: dict[str, Any] | None = None
        self._silent = False
        self._payload: tuple[int, int] | None = None  # where the payload that is open begins, and how long it is to be
        head, _, body = (path.read_text() if text is None else text).partition("\n--\n")
        for _, statement in _statements(head):
            key, _, value = statement.partition(":")
            self.head[key.strip()] = value.strip()
        self.is_pair = self.head.get("strict") == "both"
        self.strict = strict if self.is_pair else self.head.get("strict") == "yes"
        self._run(path, body, [], first_line=first_line + head.count("\n") + 3)
        if self._payload is not None:
            sys.exit(f"{path}: a payload is open at the end")

    def _run(self, path: Path, text: str, arguments: list[str], first_line: int = 1) -> None:
        for number, statement in _statements(text):
            condition = re.match(r"(accepted|refused):\s*", statement)
            if condition:
                if (condition[1] == "refused") != self.strict:
                    continue
                statement = statement[condition.end() :]
            try:
                for place in range(len(arguments), 0, -1):
                    statement = statement.replace(f"${place}", arguments[place - 1])
                self._take(statement)
            except (ValueError, KeyError, struct.error, IndexError, OSError) as error:
                sys.exit(f"{path}:{first_line + number}: {statement}: {type(error).__name__}: {error}")

    @property
    def dialect(self) -> dict[str, Any]:
        """word, guest and codec; None for what the head leaves out."""
        said = dict(part.split() for part in self.head.get("dialect", "").split(",") if part.strip())
        return {
            "word": int(said["word"]) if "word" in said else None,
            "guest": said.get("guest"),
            "codec": said.get("codec"),
        }

    def entry(self) -> tuple[dict[str, Any], bytes]:
        """The manifest's entry, but for the files, and the file's bytes."""
        kind = self.head.get("kind", "decode")
        events = [{name: self._resolve(value) for name, value in event.items()} for event in self._events]
        entry: dict[str, Any] = {
            "id": self.path.stem + ("-strict" if self.is_pair and self.strict else ""),
            "kind": kind,
            "sections": [section.strip() for section in self.head["sections"].split(",")],
            "dialect": self.dialect,
            "strict": self.strict,
            "flags": [flag.strip() for flag in self.head.get("flags", "handmade").split(",")],
            "origin": self.head["origin"],
            "events": events,
        }
        # What is in force when the bytes end or a fault is met is what the last checkpoint left.
        held = next((event["memory_sha256"] for event in reversed(events) if event["event"] == "checkpoint"), None)
        if events and events[-1]["event"] == "end":
            events[-1]["memory_sha256"] = held
        if kind == "encode":
            for event in events:
                event.pop("offset", None)
                event.pop("end", None)
            return entry, (json.dumps(self.given, indent=0) + "\n").encode()
        if self._error is not None:
            entry["error"] = self._error | {"memory_sha256": held}
        return entry, bytes(self.data)

    def page_entry(self, name: str) -> dict[str, Any]:
        """Of a vector of one page."""
        entry: dict[str, Any] = {
            "id": name,
            "sections": [section.strip() for section in self.head["sections"].split(",")],
            "old": _spelled(_page(self.head["old"]).rstrip(b"\0")),
            "encoded": _spelled(bytes(self.data)),
        }
        if self._error is not None:
            return entry | {"error": self._error}
        entry["new"] = _spelled(_page(self.head["new"]).rstrip(b"\0"))
        return entry | {"full": self.head.get("full") == "yes", "written": self.head.get("written") != "no"}

    def _take(self, statement: str) -> None:
        verb, _, rest = statement.partition(" ")
        rest = rest.strip()
        if verb in NUMBERS:
            self.data += b"".join(struct.pack(NUMBERS[verb], int(value, 0)) for value in rest.split())
        elif verb == "word":
            self.data += b"".join(self._word(int(value, 0)) for value in rest.split())
        elif verb == "hex":
            self.data += _repeated(rest)
        elif verb == "text":
            self.data += rest.encode().decode("unicode_escape").encode("latin-1")
        elif verb == "fill":
            count, value = rest.split(maxsplit=1)
            self.data += bytes.fromhex(value) * int(count, 0)
        elif verb == "page":
            self.data += _page(rest)
        elif verb == "range":
            first, last, *of_type = (int(value, 0) for value in rest.split())
            shifted = (of_type or [0])[0] << 28
            self.data += b"".join(self._word(pfn | shifted) for pfn in range(first, last + 1))
        elif verb == "deltas":
            first, last, value = rest.split()
            for offset in range(int(first, 0), int(last, 0) + 1, 4):
                self.data += struct.pack("<h", offset) + bytes.fromhex(value)
        elif verb == "flip":
            name, behind, value = re.split(r"[+ ]+", rest)
            self.data[self.labels[name] + int(behind)] ^= int(value, 16)
        elif verb == "file":
            path = self.path.parent / rest
            self.data += lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        elif verb == "label":
            self.labels[rest] = len(self.data)
        elif verb == "sha256":
            self.data += hashlib.sha256(self.data[self.labels[rest] :]).digest()
        elif verb == "blake3":
            self.data += blake3(bytes(self.data[self.labels[rest] :]))
        elif verb == "repeat":
            count, inner = rest.split(maxsplit=1)
            for _ in range(int(count, 0)):
                self._take(inner)
        elif verb == "include":
            name, *arguments = rest.split()
            path = self.path.parent / f"{name}.inc"
            self._run(path, path.read_text(), arguments)
        elif verb == "batch":
            self._batch(*rest.split())
        elif verb == "compressed":
            self._say({"offset": len(self.data), "event": "compressed_data", "bytes": int(rest), "sha256": None})
            self._take("i32 -12")
            self._take(f"word {rest}")
            self._payload = len(self.data), int(rest)
        elif verb == "silent":
            self._silent = True
        elif verb == "end":
            self._end_payload()
        elif verb == "give":
            self._give(rest)
        elif verb == "!":
            self._expect(rest)
        else:
            raise ValueError("no such statement")

    def _word(self, value: int) -> bytes:
        return value.to_bytes(self.dialect["word"] or 8, "little")

    def _batch(self, form: str, *given: str) -> None:
        pfns, types = [], []
        for entry in given:
            numbers, _, kind = entry.partition(":")
            first, _, last = numbers.partition("-")
            of_it = range(int(first, 0), int(last or first, 0) + 1)
            pfns += of_it
            types += [int(kind or "0", 0)] * len(of_it)
        event = {"format": form, "entries": len(pfns), "pages": sum(kind < FIRST_TYPE_WITHOUT_DATA for kind in types)}
        event |= {"pfns": pfns, "types": types}
        self._say({"offset": len(self.data), "event": "batch"} | event)
        self._take(f"i32 {len(pfns)}")
        self.data += b"".join(self._word(pfn | kind << 28) for pfn, kind in zip(pfns, types, strict=True))

    def _end_payload(self) -> None:
        if self._payload is None:
            raise ValueError("no payload is open")
        begin, size = self._payload
        if len(self.data) != begin + size:
            raise ValueError(f"the payload has {len(self.data) - begin} bytes, not {size}")
        if not self._silent:
            self._events[-1]["sha256"] = hashlib.sha256(self.data[begin:]).hexdigest()
        self._payload = None

    def _expect(self, rest: str) -> None:
        name, _, fields = rest.partition(" ")
        here = len(self.data)
        if name.startswith("@"):
            here = int(name[1:])
            name, _, fields = fields.partition(" ")
        if name == "error":
            kind, section = fields.split(maxsplit=1)
            self._error = {"kind": kind, "offset": here, "section": section.strip()}
            return
        event: dict[str, Any] = {"offset": here, "event": name}
        if name == "checkpoint":
            epoch, *pages = fields.split()
            event |= {"epoch": int(epoch), "memory_sha256": self._memory_sha256(pages)}
        else:
            for field in re.findall(r"(\w+)=(\"[^\"]*\"|\[[^]]*\]|\S+)", fields):
                event[field[0]] = field[1]
                if field[1].startswith("+"):
                    event[field[0]] = here + int(field[1])
            if name == "header":
                self.p2m_size = int(event["p2m_size"])
        self._say(event)

    def _say(self, event: dict[str, Any]) -> None:
        if not self._silent:
            self._events.append(event)

    def _memory_sha256(self, pages: list[str]) -> str:
        content: dict[int, bytes] = {}
        if pages and pages[0].startswith("sha256="):
            return pages[0].removeprefix("sha256=")
        size = self.p2m_size * PAGE_BYTES
        for part in pages:
            numbers, _, value = part.partition("=")
            if numbers == "bytes":
                size = int(value)
                continue
            first, _, last = numbers.partition("-")
            for number in range(int(first, 0), int(last or first, 0) + 1):
                content[number] = _page(value)
        if any(number >= self.p2m_size for number in content):
            raise ValueError("a page beyond memory")
        digest = hashlib.sha256()
        for number in range(self.p2m_size):
            digest.update(content.get(number, bytes(PAGE_BYTES))[: size - number * PAGE_BYTES])
        return digest.hexdigest()

    def _resolve(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("@"):
            return self.labels[value[1:]]
        if match := re.fullmatch(r"payload\((\w+)\)", value):
            part = self.data[self.labels[match[1]] : self.labels[match[1] + ".end"]]
            return hashlib.sha256(part).hexdigest()
        if match := re.fullmatch(r"(\d+)-(\d+)", value):
            return list(range(int(match[1]), int(match[2]) + 1))
        if match := re.fullmatch(r"(\d+)\*(\d+)", value):
            return [int(match[1])] * int(match[2])
        try:
            return json.loads(value)
        except ValueError:
            return value

    def _give(self, rest: str) -> None:
        if rest == "checkpoint":
            self.given["checkpoints"].append([])
        elif rest.startswith("batch"):
            entries = []
            for entry in rest.split()[1:]:
                pfns, kind, *page = entry.split(":")
                content = _page(page[0]).hex() if page else None
                first, _, last = pfns.partition("-")
                pfns_of_it = range(int(first, 0), int(last or first, 0) + 1)
                entries += [[pfn, int(kind, 0), content] for pfn in pfns_of_it]
            self.given["checkpoints"][-1].append(entries)
        else:
            fields = dict(re.findall(r"(\w+)=(\"[^\"]*\"|\S+)", rest))
            self.given = {name: json.loads(value) for name, value in fields.items()} | {"checkpoints": []}
            self.p2m_size = self.given["p2m_size"]


def _statements(text: str) -> list[tuple[int, str]]:
    """(line, statement) of every line that has one; lines count from 0."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [(number, line) for number, line in enumerate(lines) if line]


def _repeated(text: str) -> bytes:
    parts = [part.partition("*") for part in text.replace(",", " ").split()]
    return b"".join(bytes.fromhex(value) * int(count or 1) for value, _, count in parts)


def _page(text: str) -> bytes:
    data = bytearray()
    for part in text.split(","):
        offset, mark, value = part.rpartition("@")
        data = data.ljust(int(offset, 0), b"\0") if mark else data
        data += _repeated(value)
    if len(data) > PAGE_BYTES:
        raise ValueError("more than a page")
    return bytes(data.ljust(PAGE_BYTES, b"\0"))


def _spelled(data: bytes) -> str:
    """Bytes as the manifest has them: hex, a long run of one byte as HEX*COUNT (specs/conformance.md §5.1)."""
    parts, at = [], 0
    for run in re.finditer(rb"(.)\1{15,}", data, re.S):
        parts += [data[at : run.start()].hex(), f"{run[1].hex()}*{len(run[0])}"]
        at = run.end()
    return ",".join(part for part in [*parts, data[at:].hex()] if part)


def _pages(path: Path) -> bytes:
    """The vectors of a page coding from their source."""
    name = path.stem.removeprefix("codec-")
    entries = []
    text = path.read_text()
    for match in re.finditer(r"^==== (\S+)\n(.*?)(?=^==== |\Z)", text, re.M | re.S):
        source = Source(path, match[2], first_line=text.count("\n", 0, match.start(2)))
        entries.append(_json(source.page_entry(f"{name}-{match[1]}")))
    return f'{{"codec": "{name}", "vectors": [\n{",".join(chr(10) + entry for entry in entries)[1:]}\n]}}\n'.encode()


def build(folder: Path) -> dict[str, bytes]:
    """Every file of the folder, from its sources: name → bytes. A compressed file stands as its content."""
    files: dict[str, bytes] = {}
    names = []
    for path in sorted((folder / "src").glob("*.txt")):
        source = Source(path)
        for variant in [source, Source(path, strict=True)] if source.is_pair else [source]:
            entry, data = variant.entry()
            suffix = "given.json" if entry["kind"] == "encode" else "bin"
            name = f"{path.stem}.{suffix}" + (".xz" if len(data) >= COMPRESS_FROM_BYTES else "")
            files[name] = data
            events = entry.pop("events")
            entry |= {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            # One field a line, one event a line: a change is a line in a diff.
            fields = [f"{json.dumps(key)}: {_json(value)}" for key, value in entry.items()]
            lines = ",".join(f"\n  {_json(event)}" for event in events)
            text = "{\n" + ",\n".join([*fields, f'"events": [{lines}]']) + "\n}\n"
            names.append(f"{entry['id']}.json")
            files[names[-1]] = text.encode()
    codecs = {}
    for path in sorted((folder / "src").glob("codec-*.pages")):
        files[f"{path.stem}.json"] = _pages(path)
        codecs[path.stem.removeprefix("codec-")] = f"{path.stem}.json"
    lines = ",\n".join(json.dumps(name) for name in names)
    files["manifest.json"] = f'{{"format": 1, "codecs": {json.dumps(codecs)}, "vectors": [\n{lines}\n]}}\n'.encode()
    return files


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def content(path: Path) -> bytes | None:
    """What a file holds, decompressed; None if it is not there."""
    if not path.exists():
        return None
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def difference(folder: Path) -> tuple[dict[str, bytes], list[str], list[Path]]:
    """Every file from its sources, the names of those that are missing or not so, and the files that have no source."""
    files = build(folder)
    changed = [name for name, data in files.items() if content(folder / name) != data]
    kept = {"manifest.schema.json"} | set(files)
    return files, changed, [path for path in folder.iterdir() if path.is_file() and path.name not in kept]


def main() -> int:
    """Make or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    files, changed, stale = difference(FOLDER)
    for name in changed:
        print(f"{'differs' if options.check else 'made'}: {name}")
        if not options.check:
            data = files[name]
            (FOLDER / name).write_bytes(lzma.compress(data, preset=9) if name.endswith(".xz") else data)
    for path in stale:
        print(f"{'left over' if options.check else 'removed'}: {path.name}")
        if not options.check:
            path.unlink()
    return 1 if options.check and (changed or stale) else 0


if __name__ == "__main__":
    sys.exit(main())
