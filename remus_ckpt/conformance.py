#!/usr/bin/env python3
"""Tests a decoder or encoder against the vectors (specs/conformance.md).

    conform.py --decoder './my-decoder'                    each vector on its standard input
    conform.py --encoder './my-encoder' --judge 'CMD'      pages on its standard input, its stream judged by a decoder

A reader of memory files (QEMU's streams, what stands around them, Xen's v2 stream), one file or a few at a time
(specs/conformance.md §6):

    conform.py --reader './my-reader' --vectors specs/vectors/qemu       prints what it has found as JSON

A page coding alone (delta, rle or xbzrle), one page at a time (specs/conformance.md §5):

    conform.py --codec delta --decoder './my-decoder'      the old page and the encoded one in, the new page out
    conform.py --codec delta --encoder './my-encoder'      the old page and the new one in, the encoded page out

CMD is one argument, including its own arguments: conform.py --decoder 'python3 tools/plain_decoder.py'

This file needs only Python 3.11: copy it, with the folder of vectors, into your own project.
Exit codes: 0 all pass, 1 some fail, 2 usage error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST_FORMAT = 1
PAGE_BYTES = 4096
EXIT_CODES = {"malformed": 20, "limit": 20, "unknown-format": 21}
READER_EXIT_CODES = {"Malformed": 20, "LimitExceeded": 20, "UnknownFormat": 21}
READ = ("format", "complete", "trailing_bytes", "page_size", "checkpoints")
READ_OF_A_STATE = ("whole", "pages", "blocks", "not_in_stream")
"""What a reader must say of a file, and of its one checkpoint if the row has no list of them."""
EXIT_NOTHING = 20
"""Counts as 0 for a stream that is cut before its first checkpoint is complete."""


@dataclass
class Verdict:
    """The result of one vector."""

    id: str
    sections: list[str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.problems


def load_manifest(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder of vectors. Raises ValueError if the manifest has another format."""
    return [
        json.loads((folder / vector).read_text()) if isinstance(vector, str) else vector
        for vector in _manifest(folder)["vectors"]
    ]


def load_codec(folder: Path, codec: str) -> list[dict[str, Any]]:
    """The vectors of a page coding. Raises ValueError if there are none."""
    codecs = _manifest(folder).get("codecs", {})
    if codec not in codecs:
        raise ValueError(f"{folder} has no pages of a codec {codec!r}; it has pages of {', '.join(codecs) or 'none'}")
    vectors: list[dict[str, Any]] = json.loads((folder / codecs[codec]).read_text())["vectors"]
    return vectors


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"{folder}: the manifest has format {manifest.get('format')}, not {MANIFEST_FORMAT}")
    return manifest


def load_vector(folder: Path, vector: dict[str, Any]) -> bytes:
    """The bytes of a vector. Raises ValueError if they do not match the manifest."""
    data: bytes = (folder / vector["file"]).read_bytes()
    if vector["file"].endswith(".xz"):
        data = lzma.decompress(data)
    if hashlib.sha256(data).hexdigest() != vector["sha256"]:
        raise ValueError(f"{vector['file']} is not the file that the manifest describes")
    return data


def environment(vector: dict[str, Any]) -> dict[str, str]:
    """The environment variables that describe the stream to the command (specs/conformance.md §2)."""
    told = dict(os.environ)
    for name in ("word", "guest", "codec"):
        value = vector["dialect"].get(name)
        told.pop(f"REMUS_{name.upper()}", None)
        if value is not None:
            told[f"REMUS_{name.upper()}"] = str(value)
    told["REMUS_STRICT"] = "1" if vector.get("strict") else "0"
    return told


def run(command: str, data: bytes, told: dict[str, str], timeout_s: float) -> tuple[int, bytes, str]:
    """Exit code, standard output and standard error of a command; the code is −1 if it takes too long."""
    try:
        ran = subprocess.run(
            shlex.split(command), input=data, capture_output=True, env=told, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, b"", f"not done after {timeout_s:g} s"
    return ran.returncode, ran.stdout, ran.stderr.decode(errors="replace")


def judge_decoder(command: str, folder: Path, vector: dict[str, Any], timeout_s: float) -> Verdict:
    """Feed a vector to a decoder, and compare its output."""
    verdict = Verdict(vector["id"], vector["sections"])
    code, output, complaint = run(command, load_vector(folder, vector), environment(vector), timeout_s)
    compare(verdict, vector, code, output, complaint)
    return verdict


def compare(verdict: Verdict, vector: dict[str, Any], code: int, output: bytes, complaint: str) -> None:
    """Compare a decoder's lines and exit code with what the manifest expects."""
    said: list[dict[str, Any]] = []
    for number, line in enumerate(output.splitlines()):
        event = _object(line)
        if event is None:
            verdict.problems.append(f"line {number + 1} is not a JSON object: {line[:60]!r}")
            return
        said.append(event)
    fault = vector.get("error")
    expected_code = EXIT_CODES[fault["kind"]] if fault else 0
    if code != expected_code and not (code == EXIT_NOTHING and _holds_nothing(vector)):
        last = complaint.strip().splitlines()[-1:] or [""]
        verdict.problems.append(f"exit code {code}, not {expected_code} {last[0]}".rstrip())
    errors = [event for event in said if event.get("event") == "error"]
    said = [event for event in said if event.get("event") != "error"]
    for number, expected in enumerate(vector["events"]):
        if number >= len(said):
            verdict.problems.append(f"event {number} is missing: {expected}")
            break
        wrong = {
            name: (said[number].get(name), value) for name, value in expected.items() if said[number].get(name) != value
        }
        if wrong:
            differences = ", ".join(
                f"{name} {_cut(got)} in place of {_cut(want)}" for name, (got, want) in wrong.items()
            )
            verdict.problems.append(f"event {number} ({expected['event']}): {differences}")
            break
    else:
        if len(said) > len(vector["events"]):
            verdict.problems.append(
                f"event {len(vector['events'])} is one too many: {_cut(said[len(vector['events'])])}"
            )
    if fault:
        stated = errors[-1] if errors else {}
        if not errors:
            verdict.problems.append("no error is said")
        elif stated.get("offset") != fault["offset"]:
            # Good implementations differ in where exactly they notice a fault.
            verdict.notes.append(f"error at byte {stated.get('offset')}, here at {fault['offset']}")
        if errors and stated.get("memory_sha256") != fault["memory_sha256"]:
            verdict.problems.append("after the error, memory is not that of the last good checkpoint")
    elif errors:
        verdict.problems.append(f"an error is said: {_cut(errors[0])}")


def _holds_nothing(vector: dict[str, Any]) -> bool:
    """Whether the stream ends, without a fault, before a checkpoint is complete."""
    last = vector["events"][-1] if vector["events"] else {}
    return "error" not in vector and last.get("event") == "end" and last["memory_sha256"] is None


def _object(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None if it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _cut(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "…"


def judge_encoder(command: str, judge: str, folder: Path, vector: dict[str, Any], timeout_s: float) -> Verdict:
    """Give pages to an encoder, and its stream to a decoder."""
    verdict = Verdict(vector["id"], vector["sections"])
    code, stream, complaint = run(command, load_vector(folder, vector), environment(vector), timeout_s)
    if code:
        verdict.problems.append(f"exit code {code} {complaint.strip()[-200:]}".rstrip())
        return verdict
    strict = environment(vector) | {"REMUS_STRICT": "1"}
    compare(verdict, vector, *run(judge, stream, strict, timeout_s))
    return verdict


def judge_reader(command: str, folder: Path, vector: dict[str, Any], timeout_s: float) -> Verdict:
    """Give files to a reader, and compare what it says of them."""
    verdict = Verdict(vector["id"], vector["sections"])
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for one in vector["files"]:
            path = Path(name) / one["file"].removesuffix(".xz")
            path.write_bytes(load_vector(folder, one))
            paths.append(str(path))
        asked = shlex.join([*shlex.split(command), *paths, *vector.get("arguments", [])])
        compare_reading(verdict, vector, *run(asked, b"", dict(os.environ), timeout_s))
    return verdict


def compare_reading(verdict: Verdict, vector: dict[str, Any], code: int, output: bytes, complaint: str) -> None:
    """Compare a reader's output and exit code with what the vector expects."""
    fault = vector.get("error")
    expected_code = READER_EXIT_CODES[fault["kind"]] if fault else 0 if vector.get("whole", True) else EXIT_NOTHING
    if code != expected_code:
        last = complaint.strip().splitlines()[-1:] or [""]
        verdict.problems.append(f"exit code {code}, not {expected_code} {last[0]}".rstrip())
    said = _object(output)
    if said is None:
        verdict.problems.append(f"the output is not a JSON object: {output[:60]!r}")
        return
    expected: dict[str, Any] = {name: vector[name] for name in READ if name in vector}
    state = {name: vector[name] for name in READ_OF_A_STATE if name in vector and "blocks" in vector}
    if state:
        expected["checkpoints"] = [state]
    if fault:
        expected["error"] = {"kind": fault["kind"]}
        stated = said.get("error") or {}
        if fault["offset"] is not None and stated.get("offset") != fault["offset"]:
            # Good implementations differ in where exactly they notice a fault.
            verdict.notes.append(f"error at byte {stated.get('offset')}, here at {fault['offset']}")
    verdict.problems += _lacks("", expected, said)


def _lacks(where: str, expected: Any, said: Any) -> Iterator[str]:
    """Where something that is expected is not said, or something else is; what is said besides is ignored."""
    if isinstance(expected, dict) and isinstance(said, dict):
        for name, value in expected.items():
            yield from _lacks(f"{where} {name}".strip(), value, said.get(name))
    elif isinstance(expected, list) and isinstance(said, list) and len(expected) == len(said):
        for number, value in enumerate(expected):
            yield from _lacks(f"{where} {number}", value, said[number])
    elif expected != said:
        yield f"{where}: {_cut(said)} in place of {_cut(expected)}"


def spelled(text: str) -> bytes:
    """The bytes of a vector's text: hex digits or HEX*COUNT, separated by commas (specs/conformance.md §5.1)."""
    parts = [part.partition("*") for part in text.split(",") if part]
    return b"".join(bytes.fromhex(value) * int(count or 1) for value, _, count in parts)


def spelled_page(text: str) -> bytes:
    """The same, padded with zeros to 4,096 bytes."""
    return spelled(text).ljust(PAGE_BYTES, b"\0")


def page_environment(codec: str, vector: dict[str, Any]) -> dict[str, str]:
    """The environment variables that describe a page to the command (specs/conformance.md §5.2)."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("REMUS_")}
    return told | {"REMUS_CODEC": codec, "REMUS_FULL": "1" if vector.get("full") else "0"}


def judge_page_decoder(command: str, codec: str, vector: dict[str, Any], timeout_s: float) -> Verdict:
    """Give an encoded page to a decoder, and compare the page that it returns."""
    verdict = Verdict(vector["id"], vector["sections"])
    given = spelled_page(vector["old"]) + spelled(vector["encoded"])
    compare_page(verdict, vector, *run(command, given, page_environment(codec, vector), timeout_s))
    return verdict


def compare_page(verdict: Verdict, vector: dict[str, Any], code: int, output: bytes, complaint: str) -> None:
    """Compare a page decoder's output and exit code with what the vector expects."""
    fault = vector.get("error")
    expected_code = EXIT_CODES[fault["kind"]] if fault else 0
    if code != expected_code:
        last = complaint.strip().splitlines()[-1:] or [""]
        verdict.problems.append(f"exit code {code}, not {expected_code} {last[0]}".rstrip())
    elif fault and output:
        verdict.problems.append(f"{len(output)} bytes are written for an encoded page that is refused")
    elif not fault:
        verdict.problems += _difference("the page", output, spelled_page(vector["new"]))


def judge_page_encoder(
    command: str, judge: str | None, codec: str, vector: dict[str, Any], timeout_s: float
) -> Verdict:
    """Give a page and its reference to an encoder; unexpected bytes go to the judge, a page decoder."""
    verdict = Verdict(vector["id"], vector["sections"])
    old, new, told = spelled_page(vector["old"]), spelled_page(vector["new"]), page_environment(codec, vector)
    code, encoded, complaint = run(command, old + new, told, timeout_s)
    if code:
        verdict.problems.append(f"exit code {code} {complaint.strip()[-200:]}".rstrip())
        return verdict
    differences = _difference("the encoded page", encoded, spelled(vector["encoded"]))
    if differences and judge:
        # A page that must go full may not depend on its reference.
        held = bytes(byte ^ 0xFF for byte in old) if vector["full"] else old
        compare_page(verdict, vector, *run(judge, held + encoded, told, timeout_s))
        verdict.notes += differences
    else:
        verdict.problems += differences
    return verdict


def _difference(what: str, got: bytes, expected: bytes) -> list[str]:
    if got == expected:
        return []
    at = next((at for at, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return [f"{what} has {len(got)} bytes, not {len(expected)}"]
    return [f"byte {at} of {what} is {got[at]:02x}, not {expected[at]:02x}"]


def report(verdicts: list[Verdict]) -> str:
    """A table by section, and the failures."""
    sections: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        for section in verdict.sections:
            sections.setdefault(section, []).append(verdict)
    lines = [f"{'section':<22}{'vectors':>8}{'passed':>8}"]
    for section, of_it in sorted(sections.items(), key=lambda item: _order(item[0])):
        passed = sum(verdict.passed for verdict in of_it)
        lines.append(f"{section:<22}{len(of_it):>8}{passed:>8}{'' if passed == len(of_it) else '  short'}")
    for verdict in verdicts:
        lines += [f"{verdict.id}: {problem}" for problem in verdict.problems]
    passed = sum(verdict.passed for verdict in verdicts)
    lines.append(f"{passed} of {len(verdicts)} vectors pass")
    return "\n".join(lines)


def _order(section: str) -> tuple[str, list[int]]:
    name, _, number = section.partition(" §")
    return name, [int(part) for part in number.split(".") if part.isdigit()]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", metavar="CMD", help="a decoder: a stream in, one line of JSON for each event out")
    parser.add_argument("--encoder", metavar="CMD", help="an encoder: pages as JSON in, a stream out")
    parser.add_argument(
        "--reader", metavar="CMD", help="a reader of memory files: files as its last arguments, one JSON object out"
    )
    parser.add_argument(
        "--codec", metavar="NAME", help="test a page coding alone, one page at a time: delta, rle or xbzrle"
    )
    parser.add_argument(
        "--judge",
        metavar="CMD",
        help="what reads an encoder's streams (default: remus-ckpt events -); with --codec, a page decoder for encoded "
        "pages that are not the expected bytes (default: none, they fail)",
    )
    parser.add_argument("--vectors", type=Path, default=here.parent / "specs" / "vectors", help="the folder of vectors")
    parser.add_argument("--only", metavar="ID", action="append", help="run only this vector; repeatable")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="time limit for one vector (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not (options.decoder or options.encoder or options.reader):
        parser.error("name a --decoder, an --encoder or a --reader")
    try:
        folder, codec, timeout_s = options.vectors, options.codec, options.timeout
        manifest = load_codec(folder, codec) if codec else load_manifest(folder)
        vectors = [vector for vector in manifest if not options.only or vector["id"] in options.only]
        if not vectors:
            parser.error(f"no vector {', '.join(options.only)}")
        verdicts = []
        for number, vector in enumerate(vectors):
            if sys.stderr.isatty():
                print(f"\r{number + 1}/{len(vectors)} {vector['id']:<50}", end="", file=sys.stderr)
            if codec:
                if options.decoder:
                    verdicts.append(judge_page_decoder(options.decoder, codec, vector, timeout_s))
                if options.encoder and vector.get("written"):
                    verdicts.append(judge_page_encoder(options.encoder, options.judge, codec, vector, timeout_s))
            elif "files" in vector:
                if options.reader:
                    verdicts.append(judge_reader(options.reader, folder, vector, timeout_s))
            elif vector["kind"] == "decode" and options.decoder:
                verdicts.append(judge_decoder(options.decoder, folder, vector, timeout_s))
            elif vector["kind"] == "encode" and options.encoder:
                judge = options.judge or "remus-ckpt events -"
                verdicts.append(judge_encoder(options.encoder, judge, folder, vector, timeout_s))
    except (OSError, ValueError) as error:
        print(f"conform: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    if options.json:
        print(json.dumps([vars(verdict) | {"passed": verdict.passed} for verdict in verdicts], indent=1))
    else:
        print(report(verdicts))
    return 0 if verdicts and all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
