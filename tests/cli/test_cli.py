"""The commands on files, as a user types them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import v2_streams as v2
import zstandard
from streams import page
from support import Command

from remus_ckpt import Sender, batches
from remus_ckpt.cli.options import parse_bytes, parse_duration
from remus_ckpt.limits import GIB, MIB
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.plural import counted

PAGES = 50


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


class Series:
    """Four images, each a few words or pages away from the one before, and their stream."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(11)
        memory = np.zeros((PAGES, PAGE_SIZE), dtype=np.uint8)
        memory[5:30] = random.integers(0, 256, (25, PAGE_SIZE), dtype=np.uint8)
        self.images: list[Path] = []
        self.memories: list[np.ndarray] = []
        for number in range(4):
            if number:
                memory[random.integers(0, PAGES, 6), random.integers(0, PAGE_SIZE, 6)] += 1
                memory[30 + number] = random.integers(0, 256, PAGE_SIZE, dtype=np.uint8)
            self.images.append(folder / f"image{number}")
            self.images[-1].write_bytes(memory.tobytes())
            self.memories.append(memory.copy())
        self.stream = folder / "stream"


@pytest.fixture
def series(tmp_path: Path, command: Command) -> Series:
    made = Series(tmp_path)
    ran = command("encode", *made.images, "-o", made.stream)
    assert ran.code == 0, ran.err
    return made


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--codec", "rle"],
        ["--word", "4", "--buffer-pages", "2"],
        ["--reference-pages", "3", "--codec", "rle"],
    ],
)
def test_encode_and_restore_each(tmp_path: Path, command: Command, options: list[str]) -> None:
    series = Series(tmp_path)
    ran = command("encode", *series.images, "-o", series.stream, "--json", *options)
    assert ran.code == 0, ran.err
    assert [row["epoch"] for row in json.loads(ran.out)["checkpoints"]] == [0, 1, 2, 3]
    assert series.stream.stat().st_mode & 0o777 == 0o600
    for number, image in enumerate(series.images):
        restored = tmp_path / f"restored{number}"
        ran = command("restore", series.stream, "-o", restored, "--checkpoint", number, "--strict")
        assert ran.code == 0, ran.err
        assert restored.read_bytes() == image.read_bytes()
        assert restored.stat().st_mode & 0o777 == 0o600
    command("restore", series.stream, "-o", tmp_path / "last")
    assert (tmp_path / "last").read_bytes() == series.images[-1].read_bytes()


def test_restored_images_are_sparse(series: Series, tmp_path: Path, command: Command) -> None:
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(4000 * PAGE_SIZE)
        file.seek(2000 * PAGE_SIZE)
        file.write(b"x")
    command("encode", big, "-o", tmp_path / "big.stream")
    command("restore", tmp_path / "big.stream", "-o", tmp_path / "big.img")
    status = (tmp_path / "big.img").stat()
    assert status.st_size == 4000 * PAGE_SIZE
    assert status.st_blocks * 512 < 100 * PAGE_SIZE


def test_verify_json(series: Series, command: Command) -> None:
    ran = command("verify", series.stream, "--hash", "--json")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert report["dialect"] == {"word": 8, "guest": "hvm", "codec": "delta"}
    assert report["p2m_size"] == PAGES
    assert report["complete"] is True
    assert report["trailing_bytes"] == 0
    size = series.stream.stat().st_size
    assert [row["memory_sha256"] for row in report["checkpoints"]] == [memory_sha256(m) for m in series.memories]
    assert [*[row["start"] for row in report["checkpoints"]][1:], size] == [r["end"] for r in report["checkpoints"]]
    first = report["checkpoints"][0]
    assert (first["batches"], first["entries"], first["pages"], first["compressed_chunks"]) == (1, 25, 25, 0)
    assert all(row["compressed_chunks"] == 1 and row["compressed_bytes"] > 0 for row in report["checkpoints"][1:])


def test_a_cut_stream_is_good_up_to_the_cut(series: Series, tmp_path: Path, command: Command) -> None:
    data = series.stream.read_bytes()
    ends = [row["end"] for row in json.loads(command("verify", series.stream, "--json").out)["checkpoints"]]
    cut = tmp_path / "cut"
    for size in [0, 3, 100, ends[0] - 1, ends[0], ends[0] + 1, ends[2] - 1, ends[2], len(data) - 1]:
        cut.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        ran = command("verify", cut, "--json")
        assert ran.code == (0 if whole else 20)
        report = json.loads(ran.out)
        assert len(report["checkpoints"]) == whole
        assert report.get("error", {}).get("kind") == (None if whole else "NothingToRestore")
        assert report["complete"] is (size in ends)
        assert report["trailing_bytes"] == size - (ends[whole - 1] if whole else 0)
        ran = command("restore", cut, "-o", tmp_path / "image")
        if whole:
            assert ran.code == 0
            assert (tmp_path / "image").read_bytes() == series.images[whole - 1].read_bytes()
            (tmp_path / "image").unlink()
        else:
            assert ran.code == 20
            assert not (tmp_path / "image").exists()


COMPRESS = {
    "plain": bytes,
    "xz": lzma.compress,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "lz4": lz4.frame.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
READ = [["verify"], ["inspect"], ["events"], ["restore", "-o", "image"], ["extract", "--pfn", "0"], ["diff", 0, 1]]


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
@pytest.mark.parametrize("size", [0, 1, 100, 100_000], ids=lambda size: f"{size} bytes")
def test_no_checkpoint_is_not_good(
    series: Series, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, compress: Any, size: int
) -> None:
    """A script that copies streams must not take one without a checkpoint for a good one."""
    monkeypatch.chdir(tmp_path)
    Path("none").write_bytes(compress(series.stream.read_bytes()[:size]))
    for name, *options in READ:
        for as_json in [[], ["--json"]][: 1 if name == "events" else 2]:
            ran = command(name, "none", *options, *as_json)
            assert ran.code == 20, (name, ran)
            assert "nothing to restore" in ran.err
            assert (f"cut off {counted(size, 'byte')}" if size else "it is empty") in ran.err
            if as_json and name in ("verify", "inspect"):
                report = json.loads(ran.out)
                assert report["error"]["kind"] == "NothingToRestore"
                assert (report["checkpoints"], report["complete"], report["trailing_bytes"]) == ([], False, size)
    assert not Path("image").exists()


@pytest.mark.parametrize("compress", list(COMPRESS.values())[1:], ids=list(COMPRESS)[1:])
def test_a_compressed_file_that_is_cut_before_the_first_checkpoint_is_not_good(
    series: Series, tmp_path: Path, command: Command, compress: Any
) -> None:
    data = compress(series.stream.read_bytes())
    for size in (3, 20):
        (tmp_path / "cut").write_bytes(data[:size])
        ran = command("verify", tmp_path / "cut", "--json")
        assert ran.code == 20, ran
        assert json.loads(ran.out)["error"]["kind"] == "NothingToRestore"
        assert "cut off" in ran.err and "nothing to restore" in ran.err


def test_a_device_a_pipe_and_a_closed_input_without_a_checkpoint_are_not_good(tmp_path: Path) -> None:
    for options in (["verify", "-"], ["restore", "-", "-o", "image"]):
        arguments = [sys.executable, "-m", "remus_ckpt", *options]
        for closed, code in ((False, 20), (True, 1)):
            ran = subprocess.run(
                ["bash", "-c", 'exec "$@" <&-', "bash", *arguments] if closed else arguments,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=tmp_path,
            )  # fmt: skip
            assert (ran.returncode, ran.stderr.count("\n")) == (code, 1), ran
            assert ("is closed" if closed else "nothing to restore") in ran.stderr


def test_a_checkpoint_that_is_not_the_one_asked_for_is_no_damage(series: Series, command: Command) -> None:
    for arguments in (["extract", series.stream, "--pfn", 0, "--checkpoint", 4], ["diff", series.stream, 2, 4]):
        ran = command(*arguments)
        assert ran.code == 1 and "nothing to restore" not in ran.err


def test_a_corrupt_stream_exits_20_and_lists_what_is_good(series: Series, tmp_path: Path, command: Command) -> None:
    data = bytearray(series.stream.read_bytes())
    ends = [row["end"] for row in json.loads(command("verify", series.stream, "--json").out)["checkpoints"]]
    data[ends[1] + 30] ^= 4
    bad = tmp_path / "bad"
    bad.write_bytes(data)
    for name in ("verify", "inspect"):
        ran = command(name, bad, "--json")
        assert ran.code == 20
        report = json.loads(ran.out)
        assert [row["epoch"] for row in report["checkpoints"]] == [0, 1]
        assert report["complete"] is False
        assert ends[1] <= report["error"]["offset"] < ends[2]
        assert str(report["error"]["offset"]) in ran.err
    ran = command("restore", bad, "-o", tmp_path / "image")
    assert ran.code == 20
    assert (tmp_path / "image").read_bytes() == series.images[1].read_bytes()
    assert command("restore", bad, "-o", tmp_path / "first", "--checkpoint", 0).code == 0
    assert command("restore", bad, "-o", tmp_path / "last", "--checkpoint", 3).code == 20


def test_exit_codes(tmp_path: Path, series: Series, command: Command) -> None:
    text = tmp_path / "text"
    text.write_text("this is no stream at all, whatever one may think of it")
    v2 = tmp_path / "v2"
    v2.write_bytes(b"\xff" * 8 + b"XENF" + bytes(100))
    assert command("verify", text).code == 21
    assert command("verify", v2).code == 21
    assert command("verify", tmp_path / "nothing").code == 1
    assert command("verify").code == 2
    assert command("verify", series.stream, "--word", 5).code == 2
    assert command("restore", series.stream, "-o", tmp_path / "image", "--checkpoint", 4).code == 1
    assert command("extract", series.stream, "--pfn", "7-3").code == 2
    assert command("extract", series.stream, "--pfn", PAGES).code == 2
    assert command("diff", series.stream, 1, 9).code == 1
    assert command("--version").code == 0
    # The word is wrong: what follows makes no sense.
    assert command("verify", series.stream, "--word", 4, "--guest", "hvm").code == 20
    assert command("verify", series.stream, "--max-memory", 0).code == 2


@pytest.mark.parametrize("name", ["xz", "gzip", "lz4", "zstd"])
def test_compressed_streams_are_read_as_they_are(
    series: Series, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compress = {
        "xz": lzma.compress,
        "gzip": gzip.compress,
        "lz4": lz4.frame.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }[name]
    data = compress(series.stream.read_bytes())
    path = tmp_path / "compressed"
    path.write_bytes(data)
    ran = command("restore", path, "-o", tmp_path / "image")
    assert ran.code == 0, ran.err
    assert (tmp_path / "image").read_bytes() == series.images[-1].read_bytes()
    path.write_bytes(data[: len(data) // 2])
    ran = command("verify", path, "--json")
    report = json.loads(ran.out)
    assert ran.code == (0 if report["checkpoints"] else 20), ran.err
    assert report["complete"] is False
    path.write_bytes(data[:40] + bytes(byte ^ 0x55 for byte in data[40:80]) + data[80:])
    assert command("verify", path).code == 20


def test_standard_input_and_output(series: Series, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "remus_ckpt"]
    encoded = subprocess.run([*run, "encode", *series.images, "-o", "-"], stdout=subprocess.PIPE, check=True)
    assert encoded.stdout == series.stream.read_bytes()
    restored = subprocess.run(
        [*run, "restore", "-", "-o", "-"], input=encoded.stdout, stdout=subprocess.PIPE, check=True
    )
    assert restored.stdout == series.images[-1].read_bytes()


def test_a_pipe_that_gives_a_byte_at_a_time(series: Series) -> None:
    run = [sys.executable, "-m", "remus_ckpt", "verify", "-", "--json"]
    for data in (series.stream.read_bytes(), lzma.compress(series.stream.read_bytes())):
        with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as verify:
            assert verify.stdin is not None and verify.stdout is not None
            for first in range(20):
                verify.stdin.write(data[first : first + 1])
                verify.stdin.flush()
                time.sleep(0.002)
            verify.stdin.write(data[20:])
            verify.stdin.close()
            assert json.loads(verify.stdout.read())["complete"] is True


@pytest.mark.parametrize("pages", [0x8B1F, 0x88B1F])
def test_the_size_of_a_memory_may_look_like_gzip(tmp_path: Path, command: Command, pages: int) -> None:
    sender = Sender(pages)
    page = np.full((1, PAGE_SIZE), 7, dtype=np.uint8)
    with open(tmp_path / "stream", "wb") as file:
        for group in sender.checkpoint(batches(np.array([3]), page)):
            file.writelines(group)
    ran = command("verify", tmp_path / "stream", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["p2m_size"] == pages


def test_a_reader_that_goes_away_is_no_traceback(series: Series) -> None:
    run = f"{sys.executable} -m remus_ckpt inspect {series.stream} --chunks | head -n 1"
    ran = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr


def test_inspect(series: Series, command: Command) -> None:
    report = json.loads(command("inspect", series.stream, "--chunks", "--json").out)
    names = [row["event"] for row in report["chunks"]]
    assert names[:5] == ["header", "batch", "enable_compression", "end_of_body", "tail"]
    assert names[5:9] == ["batch", "compressed_data", "end_of_body", "tail"]
    assert names[-1] == "end"
    offsets = [row["offset"] for row in report["chunks"]]
    assert offsets == sorted(offsets)
    assert report["checkpoints"][1]["record"]["before"] == report["checkpoints"][0]["record"]["after"]
    text = command("inspect", series.stream, "--chunks")
    assert text.code == 0
    assert "compressed_data" in text.out


def test_diff(series: Series, tmp_path: Path, command: Command) -> None:
    def expected(one: int, other: int) -> list[list[int]]:
        differ = series.memories[one].reshape(-1) != series.memories[other].reshape(-1)
        edges = np.flatnonzero(np.diff(differ, prepend=False, append=False))
        return [list(pair) for pair in edges.reshape(-1, 2).tolist()]

    for one, other in ((0, 3), (3, 0), (1, 2), (2, 2)):
        report = json.loads(command("diff", series.stream, one, other, "--json").out)
        assert report["ranges"] == expected(one, other)
        assert report["bytes"] == sum(stop - start for start, stop in report["ranges"])
        images = json.loads(command("diff", series.images[one], series.images[other], "--json").out)
        assert images == report
    shorter = tmp_path / "shorter"
    shorter.write_bytes(series.images[0].read_bytes()[: 20 * PAGE_SIZE + 5])
    report = json.loads(command("diff", series.images[0], shorter, "--json").out)
    assert report["pages"] == 10


def test_diff_of_a_memory_that_grows(tmp_path: Path, command: Command) -> None:
    stream = tmp_path / "grows"
    grown = [v2.page_data([v2.entry(1), v2.entry(9)], page(7), page(8)), v2.page_data([v2.entry(9)], page(4))]
    more = b"".join(pages + v2.hvm_state() + v2.record(v2.CHECKPOINT) for pages in grown)
    stream.write_bytes(v2.SERIES[: -len(v2.record(v2.END))] + more + v2.record(v2.END))
    for one, other, pages in ((0, 2, {1, 2, 9}), (3, 1, {9}), (2, 3, {9}), (0, 1, {1, 2})):
        report = json.loads(command("diff", stream, one, other, "--json").out)
        ranges = [range(*each, PAGE_SIZE) for each in report["ranges"]]
        assert {at // PAGE_SIZE for each in ranges for at in each} == pages
        assert report["memory_bytes"] == [(6 if epoch < 2 else 10) * PAGE_SIZE for epoch in (one, other)]


def test_extract(series: Series, tmp_path: Path, command: Command) -> None:
    for checkpoint in (0, 2):
        memory = series.memories[checkpoint]
        code, out, _ = command.binary("extract", series.stream, "--pfn", "0x5-7,0", "--checkpoint", checkpoint)
        assert code == 0
        assert out == memory[[5, 6, 7, 0]].tobytes()
    lines = command("extract", series.stream, "--pfn", "1", "--hex").out.splitlines()
    assert lines[0].split()[:2] == ["000000001000", "00"]
    assert lines[1] == "*"
    rows = json.loads(command("extract", series.stream, "--pfn", "6", "--json").out)
    assert bytes.fromhex(rows["pages"][0]["hex"]) == series.memories[-1][6].tobytes()


def test_images_of_any_size_are_padded_and_said(tmp_path: Path, command: Command) -> None:
    sizes = [1, 5000, 12288, 4097]
    images = []
    for number, size in enumerate(sizes):
        images.append(tmp_path / f"image{number}")
        images[-1].write_bytes(bytes([number + 1]) * size)
    ran = command("encode", *images, "-o", tmp_path / "stream")
    assert ran.code == 0
    assert all(str(image) in ran.err for image, size in zip(images, sizes, strict=True) if size != 12288)
    for number, size in enumerate(sizes):
        command("restore", tmp_path / "stream", "-o", tmp_path / "image", "--checkpoint", number, "--overwrite")
        assert (tmp_path / "image").read_bytes() == bytes([number + 1]) * size + bytes(12288 - size)
    (tmp_path / "empty").write_bytes(b"")
    assert command("encode", tmp_path / "empty", "-o", tmp_path / "stream2").code == 2
    assert not (tmp_path / "stream2").exists()


def test_an_image_comes_back_with_its_size(tmp_path: Path, command: Command) -> None:
    random = np.random.default_rng(2)
    images = [random.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (12_000, 12_001)]
    paths = [tmp_path / f"image{number}" for number in range(2)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    ran = command("encode", *paths, "-o", tmp_path / "stream")
    assert (ran.code, ran.err) == (0, "")
    for number, image in enumerate(images):
        which = ("--checkpoint", number)
        assert command("restore", tmp_path / "stream", "-o", tmp_path / "back", "--overwrite", *which).code == 0
        assert (tmp_path / "back").read_bytes() == image
        assert command.binary("restore", tmp_path / "stream", "-o", "-", *which)[1] == image
        assert command.binary("extract", tmp_path / "stream", "--pfn", "0-2", *which)[1] == image
    assert (
        command("extract", tmp_path / "stream", "--pfn", "2", "--hex").out.splitlines()[-1].split()[0] == "000000002ee0"
    )
    report = json.loads(command("verify", tmp_path / "stream", "--hash", "--json").out)
    hashes = [row["memory_sha256"] for row in report["checkpoints"]]
    assert hashes == [hashlib.sha256(image).hexdigest() for image in images] and report["memory_bytes"] == 12_001
    for arguments in ((tmp_path / "stream", "1", "0"), paths[::-1]):
        assert json.loads(command("diff", *arguments, "--json").out)["memory_bytes"] == [12_001, 12_000]


def test_a_failed_restore_leaves_what_was_there(series: Series, tmp_path: Path, command: Command) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"dear")
    bad = tmp_path / "bad"
    bad.write_bytes(series.stream.read_bytes()[:1000])
    assert command("restore", bad, "-o", image, "--overwrite").code == 20
    assert image.read_bytes() == b"dear"
    assert sorted(os.listdir(tmp_path)) == sorted([*(f"image{n}" for n in range(4)), "stream", "image", "bad"])


def test_what_is_there_is_not_written_over(series: Series, tmp_path: Path, command: Command) -> None:
    old = tmp_path / "old"
    for arguments in [
        ("restore", series.stream, "-o", old),
        ("restore", series.stream, "-o", tmp_path / "new", "--device-state", old),
        ("extract", series.stream, "--pfn", "1", "-o", old),
        ("encode", *series.images, "-o", old),
    ]:
        old.write_bytes(b"dear")
        assert command(*arguments).code == 1
        assert old.read_bytes() == b"dear" and not (tmp_path / "new").exists()
        assert command(*arguments, "--overwrite").code == 0
        assert old.read_bytes() != b"dear"
        (tmp_path / "new").unlink(missing_ok=True)
    old.write_bytes(b"")
    assert command("restore", series.stream, "-o", old).code == 0
    assert old.read_bytes() == series.images[-1].read_bytes()


def test_help_has_examples(command: Command) -> None:
    for name in ("encode", "restore", "inspect", "verify", "diff", "extract", "record"):
        ran = command(name, "--help")
        assert ran.code == 0
        assert f"remus-ckpt {name}" in ran.out.replace("\n", " ").replace("  ", " ")


def test_durations() -> None:
    assert [parse_duration(text) for text in ("25ms", "2s", "0.5s", "3m", "1h", "500us", "7d")] == [
        0.025, 2.0, 0.5, 180.0, 3600.0, 0.0005, 604_800.0,
    ]  # fmt: skip


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("4096", "500M", "20G", "20GiB", "1.5 K", "1TiB")] == [
        4096, 500 * MIB, 20 * GIB, 20 * GIB, 1536, 1 << 40,
    ]  # fmt: skip


@pytest.mark.parametrize("take", [["backup", "--listen", "unix:s", "--store", "s"], ["prune", "store:s/n"]])
@pytest.mark.parametrize(("option", "bad"), [("--keep-size", "20 pounds"), ("--keep-age", "100"), ("--keep-age", "1w")])
def test_one_grammar_for_sizes_and_times(take: list[str], option: str, bad: str, command: Command) -> None:
    ran = command(*take, option, bad)
    assert ran.code == 2
    assert repr(bad) in ran.err


def test_check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(command("check", "--json").out)
    assert report["kernel"] in report["available"]
    monkeypatch.setenv("REMUS_CKPT_KERNEL", "numpy")
    assert command("check").out.startswith("kernel: numpy")
    monkeypatch.setenv("REMUS_CKPT_KERNEL", "abacus")
    assert command("check").code == 1
    assert command("demo").code == 1


def test_what_is_read_is_not_written_over(series: Series, tmp_path: Path, command: Command) -> None:
    before = series.stream.read_bytes()
    image = series.images[0].read_bytes()
    (tmp_path / "link").hardlink_to(series.stream)
    for arguments in [
        ("restore", series.stream, "-o", series.stream),
        ("restore", series.stream, "-o", tmp_path / "link"),
        ("restore", series.stream, "-o", tmp_path / "new", "--device-state", tmp_path / "new"),
        ("extract", series.stream, "--pfn", "1", "-o", series.stream),
        ("encode", *series.images, "-o", series.images[0]),
    ]:
        assert command(*arguments).code == 2
    assert series.stream.read_bytes() == before
    assert series.images[0].read_bytes() == image
    assert not (tmp_path / "new").exists()
