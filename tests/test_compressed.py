"""Compressed files: whatever follows, is missing or is damaged, what comes out before it is given."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import streams as s
import zstandard
from conftest import many
from support import Command

from remus_ckpt import Sender, batches
from remus_ckpt.compressed import Compression, Inflater, compressions
from remus_ckpt.errors import Malformed
from remus_ckpt.files import read_checkpoints

PACK: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "lz4": lambda data: lz4.frame.compress(data, block_size=4, content_checksum=True),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
UNPACK: dict[str, Callable[[], Any]] = {
    "xz": lzma.LZMADecompressor,
    "gzip": lambda: zlib.decompressobj(31),
    "bzip2": bz2.BZ2Decompressor,
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (11).to_bytes(4, "little") + b"\x28\xb5\x2f\xfdanother"
every = pytest.mark.parametrize("name", PACK)


class Pipe(io.RawIOBase):
    """Bytes that come in small pieces and cannot be gone back in."""

    def __init__(self, data: bytes, piece: int = 7) -> None:
        self._rest, self._piece = memoryview(data), piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._piece, len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def inflate(data: bytes, *, is_pipe: bool = False, room: int = 1000) -> tuple[bytes, Inflater, Malformed | None]:
    """All that comes out, and the fault behind it."""
    file: Any = io.BufferedReader(Pipe(data)) if is_pipe else io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    inflater = Inflater(file, compressions(data[:16]))
    out, buffer = b"", memoryview(bytearray(room))
    try:
        while size := inflater.readinto(buffer):
            out += buffer[:size]
        inflater.refuse_junk()
    except Malformed as error:
        return out, inflater, error
    return out, inflater, None


def by_the_byte(name: str, data: bytes) -> tuple[bytes, bool]:
    """What the library gives for one member, fed byte by byte, and whether it met a fault."""
    member, out = UNPACK[name](), b""
    for at in range(len(data)):
        try:
            out += member.decompress(data[at : at + 1])
        except Exception:
            return out, True
        if member.eof:
            break
    return out, False


def given(name: str, data: bytes) -> list[int]:
    """How many bytes the library has given for one member when it has had so many."""
    member, sizes = UNPACK[name](), [0]
    for at in range(len(data)):
        sizes.append(sizes[-1] + len(member.decompress(data[at : at + 1])))
    return sizes


def some(seed: int, size: int) -> bytes:
    """Bytes that compress, but not to nothing."""
    return np.random.default_rng(seed).integers(0, 8, size, dtype=np.uint8).tobytes()


@every
def test_a_cut_at_any_byte_gives_what_came_before_it(name: str) -> None:
    content = some(1, 700)
    data = PACK[name](content)
    sizes = given(name, data)
    assert sizes[-1] == len(content)
    for is_pipe in (False, True):
        for cut in range(8, len(data), many(7, 1)):
            out, inflater, error = inflate(data[:cut], is_pipe=is_pipe)
            assert error is None and content.startswith(out) and len(out) >= sizes[cut], cut
            assert inflater.is_cut and not inflater.is_whole


@every
@pytest.mark.parametrize("is_pipe", [False, True])
def test_damage_at_any_byte_costs_nothing_in_front_of_it(name: str, is_pipe: bool) -> None:
    content = some(2, 3000)
    data = bytearray(PACK[name](content))
    for at in range(8, len(data), many(7, 1) if len(data) < 300 else many(97, 29)):
        data[at] ^= 0x55
        expected, is_bad = by_the_byte(name, bytes(data))
        out, _, error = inflate(bytes(data), is_pipe=is_pipe)
        # A library keeps back what it had in hand when it met the fault.
        assert out[: len(expected)] == expected, at
        if is_bad:
            assert error is not None and error.offset == len(out), at
        data[at] ^= 0x55


@every
def test_a_wrong_checksum_at_the_end_costs_no_data(name: str) -> None:
    content = some(3, 200_000)
    data = bytearray(PACK[name](content))
    data[{"xz": -30, "gzip": -6, "bzip2": -3, "lz4": -1, "zstd": -1}[name]] ^= 1
    out, _, error = inflate(bytes(data))
    assert out == content and error is not None


@every
@pytest.mark.parametrize("is_pipe", [False, True])
def test_several_members_with_padding_between_and_behind(name: str, is_pipe: bool) -> None:
    one, other = some(4, 5000), some(5, 300)
    data = PACK[name](one) + bytes(12) + PACK[name](b"") + PACK[name](other)
    out, inflater, error = inflate(data + bytes(100_000), is_pipe=is_pipe)
    assert (out, error) == (one + other, None)
    assert inflater.is_whole and inflater.padding_bytes == 100_000
    out, inflater, error = inflate(data, is_pipe=is_pipe)
    assert (out, error, inflater.padding_bytes) == (one + other, None, 0)
    for cut in range(len(data) - len(PACK[name](other)) + 1, len(data), 11):
        out, inflater, error = inflate(data[:cut], is_pipe=is_pipe)
        assert out == one + by_the_byte(name, data[len(data) - len(PACK[name](other)) : cut])[0]
        assert error is None and inflater.is_cut


@every
@pytest.mark.parametrize("junk", [b"j", b"junk", b"\1" * 100_000, bytes(3) + b"junk"])
def test_junk_behind_is_counted(name: str, junk: bytes) -> None:
    content = some(6, 5000)
    out, inflater, error = inflate(PACK[name](content) + junk)
    assert out == content and error is not None and error.offset == len(content)
    assert inflater.junk_bytes == len(junk.lstrip(b"\0")) and not inflater.is_whole and not inflater.is_cut


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_frames_without_data_are_passed_over(name: str) -> None:
    one, other = some(7, 900), some(8, 400)
    data = SKIPPABLE + PACK[name](one) + SKIPPABLE + SKIPPABLE + PACK[name](other) + SKIPPABLE
    out, inflater, error = inflate(data)
    assert (out, error, inflater.name) == (one + other, None, name) and inflater.is_whole
    for cut in range(len(data) - len(SKIPPABLE) + 1, len(data)):
        out, inflater, error = inflate(data[:cut])
        assert (out, error, inflater.is_cut) == (one + other, None, True), cut


@every
def test_a_bomb_takes_no_memory(name: str) -> None:
    # zstandard has no bound of its own: what a step takes in is all that bounds what it gives.
    size, ceiling = (128 << 20, 80 << 20) if name == "zstd" else (24 << 20, 4 << 20)
    bomb = io.BytesIO(lzma.compress(bytes(size), preset=0) if name == "xz" else PACK[name](bytes(size)))
    inflater = Inflater(io.BufferedReader(bomb), compressions(bomb.getvalue()[:16]))  # type: ignore[arg-type]
    buffer, given = memoryview(bytearray(1 << 16)), 0
    tracemalloc.start()
    try:
        while got := inflater.readinto(buffer):
            given += got
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given == size and peak < ceiling


# Whole streams, as the commands see them


def checkpoints(count: int = 12, pages: int = 16) -> tuple[bytes, list[int]]:
    """A stream of ours and where its checkpoints end."""
    memory, sender, data, ends = np.zeros((pages, 4096), np.uint8), Sender(pages), b"", []
    for number in range(count):
        memory[number % pages] = np.frombuffer(some(number, 4096), np.uint8)
        dirty = np.array([number % pages])
        data += b"".join(
            bytes(buffer) for group in sender.checkpoint(batches(dirty, memory[dirty])) for buffer in group
        )
        ends.append(len(data))
    return data, ends


STREAM, ENDS = checkpoints()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@every
def test_verify_says_what_is_behind(name: str, command: Command, tmp_path: Path) -> None:
    def verify(data: bytes) -> tuple[int, dict[str, Any], str]:
        path = tmp_path / "stream"
        path.write_bytes(data)
        ran = command("verify", path, "--json")
        return ran.code, json.loads(ran.out), ran.err

    whole = PACK[name](STREAM)
    code, said, complaint = verify(whole)
    assert (code, len(said["checkpoints"]), said["complete"], complaint) == (0, 12, True, "")
    code, said, complaint = verify(whole + bytes(512))
    assert (code, len(said["checkpoints"]), said["complete"]) == (0, 12, True)
    assert said["compressed"]["padding_bytes"] == 512 and "512 zero bytes" in complaint
    code, said, complaint = verify(whole + b"junk")
    assert (code, len(said["checkpoints"]), said["complete"]) == (20, 12, False)
    assert said["compressed"]["junk_bytes"] == 4 and "checkpoint 11 is the last good one" in complaint
    code, said, complaint = verify(whole[:-3])
    assert (code, said["complete"], said["compressed"]["cut"]) == (0, False, True)
    assert len(said["checkpoints"]) == sum(end <= len(by_the_byte(name, whole[:-3])[0]) for end in ENDS)
    assert "cut off" in complaint
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    expected, is_bad = by_the_byte(name, bytes(damaged))
    code, said, _ = verify(bytes(damaged))
    if is_bad and expected == STREAM[: len(expected)]:
        assert code == 20 and said["error"]["kind"] == "Malformed"
        assert len(said["checkpoints"]) == sum(end <= len(expected) for end in ENDS)


def test_from_a_pipe_too() -> None:
    def verify(data: bytes) -> tuple[int, dict[str, Any]]:
        arguments = [sys.executable, "-m", "remus_ckpt", "verify", "-", "--json"]
        ran = subprocess.run(arguments, input=data, capture_output=True, check=False)
        return ran.returncode, json.loads(ran.stdout)

    whole = PACK["gzip"](STREAM)
    code, said = verify(whole[:-1] + b"\xff" + bytes(9))  # its size is wrong
    assert (code, len(said["checkpoints"])) == (20, 12)
    code, said = verify(whole + bytes(9))
    assert (code, len(said["checkpoints"]), said["compressed"]["padding_bytes"]) == (0, 12, 9)


@every
def test_every_command_gives_what_comes_out(name: str, command: Command, tmp_path: Path) -> None:
    path, plain, image = tmp_path / "stream", tmp_path / "plain", tmp_path / "image"
    path.write_bytes(PACK[name](STREAM) + b"junk")
    plain.write_bytes(STREAM)
    assert command("restore", plain, "-o", tmp_path / "expected").code == 0
    assert command("restore", path, "-o", image).code == 20
    assert image.read_bytes() == (tmp_path / "expected").read_bytes()
    assert command("restore", path, "-o", image, "--overwrite", "--checkpoint", "3").code == 0
    ran = command("events", path)
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 20 and lines[-1]["event"] == "error"
    assert [line["epoch"] for line in lines if line["event"] == "checkpoint"] == list(range(12))
    ran = command("inspect", path, "--json")
    assert ran.code == 20 and len(json.loads(ran.out)["checkpoints"]) == 12
    assert command("diff", path, "3", "11", "--json").out == command("diff", plain, "3", "11", "--json").out
    assert command("extract", path, "--pfn", "5", "-o", image, "--overwrite").code == 20
    assert image.read_bytes() == (tmp_path / "expected").read_bytes()[5 * 4096 : 6 * 4096]
    found = read_checkpoints(path)
    assert [next(found).epoch for _ in range(12)] == list(range(12))
    with pytest.raises(Malformed):
        next(found)


def test_junk_behind_a_last_checkpoint_is_trailing(command: Command, tmp_path: Path) -> None:
    """As in a stream that is not compressed: exit code 0, and not complete."""
    stream = s.hvm_header(8, 4) + struct.pack("<ii", -9, 0) + s.hvm_tail()
    path = tmp_path / "stream"
    path.write_bytes(gzip.compress(stream) + b"junk")
    ran = command("verify", path, "--json")
    said = json.loads(ran.out)
    assert (ran.code, len(said["checkpoints"]), said["complete"]) == (0, 1, False)
    assert "4 bytes follow" in ran.err


def test_a_zstd_window_may_be_as_large_as_an_xz_dictionary(command: Command, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, hash_log=10, chain_log=10, strategy=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "stream"
    path.write_bytes(packer.compress(STREAM) + packer.flush())
    assert len(json.loads(command("verify", path, "--json").out)["checkpoints"]) == 12


def test_want_of_memory_is_no_fault_of_the_data() -> None:
    class Poor:
        eof, needs_input, unused_data = False, True, b""

        def decompress(self, data: bytes, max_length: int) -> bytes:
            raise MemoryError

    file = io.BufferedReader(io.BytesIO(b"poor"))  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        Inflater(file, (Compression("poor", b"poor", Poor),)).readinto(memoryview(bytearray(9)))


def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    def verify(data: bytes, size: int = 0) -> str:
        path = tmp_path / "stream"
        path.write_bytes(data)
        os.truncate(path, max(size, len(data)))
        ran = subprocess.run(
            [sys.executable, "-m", "remus_ckpt", "verify", path],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (500_000_000, 500_000_000)),
        )
        assert ran.returncode == 1 and ran.stderr.count("\n") == 1, ran.stderr
        return ran.stderr

    assert "68,719,476,736 bytes" in verify(s.hvm_header(8, 1 << 24) + struct.pack("<ii", -9, 0))
    tail = bytes(28) + b"DeviceModelRecord0002" + struct.pack("<I", 256 << 20) + b"QEVM"
    assert "out of memory" in verify(s.hvm_header(8, 4) + struct.pack("<i", 0) + tail, 257 << 20)


def test_an_empty_file_is_called_empty(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    for data in (b"", *(pack(b"") for pack in PACK.values())):
        path.write_bytes(data)
        assert "it is empty" in command("verify", path).err


@pytest.mark.parametrize("front", [b"XenSavedDomain\n", b""])
def test_what_is_compressed_within_says_what_to_do(front: bytes, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    for pack in PACK.values():
        path.write_bytes(front + pack(STREAM) if front else pack(pack(STREAM)))
        ran = command("verify", path)
        assert ran.code == 21 and f"at byte {len(front)}" in ran.err and "decompress it" in ran.err
    path.write_bytes(front + lzma.compress(STREAM, lzma.FORMAT_ALONE))
    ran = command("verify", path)
    assert ran.code == 21 and "xz -dc" in ran.err


def test_lz4s_legacy_frames_are_refused_by_name(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"\x02\x21\x4c\x18" + b"\x10\0\0\0" + bytes(40))
    ran = command("verify", path)
    assert ran.code == 21 and "lz4 -dc" in ran.err
