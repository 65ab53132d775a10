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

Then bytes and expectations. `word` is as wide as the dialect says; numbers are decimal, 0x… or negative:

    u8 N · u16be N · i16 N · i32 N · u32 N · i32be N · u64 N · word N      one or several, separated by blanks
    hex 00 01 …        bytes                  text ABC        ASCII, \\n and \\0 as in Python
    fill COUNT HEX     HEX COUNT times        page HEX        HEX, padded with zeros to 4,096 bytes
    range FIRST LAST [TYPE]                   PFN entries, one `word` each
    file NAME          a file beside the source
    label NAME         a name for this offset
    sha256 NAME        SHA-256 of the bytes from that label up to here
    repeat COUNT STATEMENT

    ! EVENT name=value …   an event that begins at this offset (specs/conformance.md §3.2). A value is JSON, or
                           3-7 (a list of numbers), 0*5 (a list of equal ones), @NAME (the offset of a label),
                           payload(NAME) (SHA-256 of the bytes from that label to the label NAME.end)
    ! checkpoint EPOCH PAGES LEFT   memory after it: p2m_size from the header event, then PFN=HEX or FIRST-LAST=HEX
                           for every page that is not zero; a page is padded with zeros
    ! error KIND SECTION   the fault begins at this offset

For an encoder, the head says `kind: encode`, and the body begins with what it is given:

    give p2m_size=16 word=8 codec="delta" buffer_pages=8196 reference_pages=null
    give checkpoint
    give batch PFN:TYPE:HEX …      HEX is padded with zeros; PFN:TYPE for an entry without data

What follows is the stream that must come out, up to its tails, whose length is the encoder's own: offsets are not
compared.
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

FOLDER = Path(__file__).resolve().parent.parent / "specs" / "vectors"
PAGE_BYTES = 4096
COMPRESS_FROM_BYTES = 16 << 10
NUMBERS = {"u8": "<B", "u16be": ">H", "i16": "<h", "i32": "<i", "u32": "<I", "i32be": ">i", "u64": "<Q"}


class Source:
    """One source, assembled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray()
        self.labels: dict[str, int] = {}
        self.head: dict[str, str] = {}
        self.given: dict[str, Any] = {}
        self.p2m_size = 0
        self._memory: dict[int, bytes] = {}
        self._events: list[dict[str, Any]] = []
        self._error: dict[str, Any] | None = None
        in_head = True
        for number, line in enumerate(path.read_text().splitlines(), 1):
            statement = re.sub(r"(^|\s)#.*", "", line).strip()
            if not statement:
                continue
            try:
                if statement == "--":
                    in_head = False
                elif in_head:
                    key, _, value = statement.partition(":")
                    self.head[key.strip()] = value.strip()
                else:
                    self._take(statement)
            except (ValueError, KeyError, struct.error, IndexError) as error:
                sys.exit(f"{path}:{number}: {statement}: {type(error).__name__}: {error}")

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
        """The manifest's entry, but for the file, and the file's bytes."""
        kind = self.head.get("kind", "decode")
        events = [{name: self._resolve(value) for name, value in event.items()} for event in self._events]
        entry: dict[str, Any] = {
            "id": self.path.stem,
            "kind": kind,
            "sections": [section.strip() for section in self.head["sections"].split(",")],
            "dialect": self.dialect,
            "strict": self.head.get("strict", "no") == "yes",
            "flags": [flag.strip() for flag in self.head.get("flags", "handmade").split(",")],
            "origin": self.head["origin"],
            "events": events,
        }
        if kind == "encode":
            for event in events:
                event.pop("offset", None)
                event.pop("end", None)
            return entry, (json.dumps(self.given, indent=0) + "\n").encode()
        if self._error is not None:
            entry["error"] = self._error
        return entry, bytes(self.data)

    def _take(self, statement: str) -> None:
        verb, _, rest = statement.partition(" ")
        rest = rest.strip()
        if verb in NUMBERS:
            self.data += b"".join(struct.pack(NUMBERS[verb], int(value, 0)) for value in rest.split())
        elif verb == "word":
            self.data += b"".join(self._word(int(value, 0)) for value in rest.split())
        elif verb == "hex":
            self.data += bytes.fromhex(rest)
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
        elif verb == "file":
            path = self.path.parent / rest
            self.data += lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        elif verb == "label":
            self.labels[rest] = len(self.data)
        elif verb == "sha256":
            self.data += hashlib.sha256(self.data[self.labels[rest] :]).digest()
        elif verb == "repeat":
            count, inner = rest.split(maxsplit=1)
            for _ in range(int(count, 0)):
                self._take(inner)
        elif verb == "give":
            self._give(rest)
        elif verb == "!":
            self._expect(rest)
        else:
            raise ValueError("no such statement")

    def _word(self, value: int) -> bytes:
        return value.to_bytes(self.dialect["word"] or 8, "little")

    def _expect(self, rest: str) -> None:
        name, _, fields = rest.partition(" ")
        here = len(self.data)
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
            if name == "header":
                self.p2m_size = int(event["p2m_size"])
        self._events.append(event)

    def _memory_sha256(self, pages: list[str]) -> str:
        content: dict[int, bytes] = {}
        for part in pages:
            numbers, _, value = part.partition("=")
            first, _, last = numbers.partition("-")
            for number in range(int(first, 0), int(last or first, 0) + 1):
                content[number] = _page(value)
        digest = hashlib.sha256()
        for number in range(self.p2m_size):
            digest.update(content.get(number, bytes(PAGE_BYTES)))
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
                first, _, last = pfns.partition("-")
                pfns_of_it = range(int(first, 0), int(last or first, 0) + 1)
                entries += [[pfn, int(kind, 0), page[0] if page else None] for pfn in pfns_of_it]
            self.given["checkpoints"][-1].append(entries)
        else:
            fields = dict(re.findall(r"(\w+)=(\"[^\"]*\"|\S+)", rest))
            self.given = {name: json.loads(value) for name, value in fields.items()} | {"checkpoints": []}
            self.p2m_size = self.given["p2m_size"]


def _page(text: str) -> bytes:
    data = bytes.fromhex(text)
    if len(data) > PAGE_BYTES:
        raise ValueError("more than a page")
    return data.ljust(PAGE_BYTES, b"\0")


def build(folder: Path) -> dict[str, bytes]:
    """Every file of the folder, from its sources: name → bytes. A compressed file stands as its content."""
    files: dict[str, bytes] = {}
    entries = []
    for path in sorted((folder / "src").glob("*.txt")):
        entry, data = Source(path).entry()
        suffix = "json" if entry["kind"] == "encode" else "bin"
        name = f"{entry['id']}.{suffix}" + (".xz" if len(data) >= COMPRESS_FROM_BYTES else "")
        files[name] = data
        entries.append(
            {"id": entry.pop("id"), "file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            | entry
        )
    manifest = {"format": 1, "vectors": entries}
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in manifest["vectors"])
    files["manifest.json"] = f'{{"format": 1, "vectors": [\n{lines}\n]}}\n'.encode()
    return files


def content(path: Path) -> bytes | None:
    """What a file holds, decompressed; None if it is not there."""
    if not path.exists():
        return None
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def main() -> int:
    """Make or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    files = build(FOLDER)
    kept = {"manifest.json", "manifest.schema.json"} | set(files)
    stale = [path for path in FOLDER.iterdir() if path.is_file() and path.name not in kept]
    changed = [name for name, data in files.items() if content(FOLDER / name) != data]
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
