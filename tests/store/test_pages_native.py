"""The C that reads pages, given records, heads and segments that lie: it refuses, and stays within its arrays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import many

import remus_ckpt
from remus_ckpt.codec import CODECS, get_codec, kernels
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.store import page_records
from remus_ckpt.store.page_records import RECORD, Source, Unreadable, read_pages, seal

pytestmark = pytest.mark.skipif(page_records.native is None, reason="the C extension is not built")

PACKAGE = Path(remus_ckpt.__file__).parent
PAGES = 12


def lie(seed: int) -> tuple[Source, np.ndarray]:
    """A segment, and an index of it in which some numbers are anything. Most checksums are right all the same."""
    random = np.random.default_rng(seed)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the source has its descriptor
    data = random.integers(0, 256, 60_000, dtype=np.uint8)
    memory = random.integers(0, 256, (PAGES, PAGE_SIZE), dtype=np.uint8)
    codec = random.choice(["delta", "rle"])
    encoded = [
        bytes(get_codec(codec).encode(memory[i : i + 1], memory[i : i + 1] ^ (random.random(PAGE_SIZE) < 0.01)))
        for i in range(PAGES)
    ]
    places = np.cumsum([0, *map(len, encoded)])
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)[: len(data) - 5000]
    data[5000 : 5000 + len(joined)] = joined
    file.write(data.tobytes())
    file.flush()
    count = int(random.integers(1, 60))
    records = np.zeros(count, dtype=RECORD)
    for i in range(count):
        page = int(random.integers(0, PAGES))
        depth = int(random.choice([0, 1, 2, 3, 255]))
        records[i]["pfn"] = page
        if depth:
            records[i]["length"] = min(len(encoded[page]), 0xFFFF)
            where = 5000 + int(places[page])
        else:
            records[i]["length"] = PAGE_SIZE
            where = int(random.integers(0, len(data)))
        records[i]["where"] = where | depth << 48
        records[i]["before"] = random.integers(0, count + 2)
        if random.random() < 0.2:
            field = random.choice(["where", "pfn", "before", "length"])
            records[i][field] = random.integers(0, 1 << (RECORD[field].itemsize * 8 - 1), dtype=np.uint64)
    at = (records["where"] & np.uint64((1 << 48) - 1)).astype(np.int64)
    fits = at + records["length"] <= len(data)
    whole = records[fits].copy()
    seal(whole, data, at[fits])
    records[fits] = whole
    heads = random.integers(0, count + 3, PAGES).astype(np.uint32)
    fd = os.dup(file.fileno())
    file.close()
    return Source((fd, -1), records, heads, str(codec)), data  # type: ignore[arg-type]


def outcome(source: Source, page: int) -> bytes | None:
    out = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
    try:
        read_pages(source, page, out)
    except Unreadable:
        return None
    return out.tobytes()


@pytest.mark.parametrize("seed", range(many(60, 600)))
def test_it_agrees_with_numpy(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = lie(seed)
    found = [outcome(source, page) for page in range(PAGES)]
    held = source.holding(data[3000:], 3000)
    assert [outcome(held, page) for page in range(PAGES)] == found
    monkeypatch.setattr(page_records, "native", None)
    assert [outcome(source, page) for page in range(PAGES)] == found
    os.close(source.files[0])


@pytest.mark.parametrize("kernel", [name for name in kernels.NATIVE if name in kernels.KERNELS])
def test_every_kernel_gives_the_same_sums(kernel: str) -> None:
    """What one machine has indexed, another one reads."""
    records, pages = np.zeros(40, dtype=RECORD), np.random.default_rng(5).integers(0, 256, 45 * 4096, dtype=np.uint8)
    records["length"] = [4096] * 20 + [*range(0, 100, 5)]
    records["pfn"] = range(40)
    at = np.arange(40) * 4096 + np.arange(40)
    seal(records, pages, at)
    code = (
        "import sys, numpy as np\n"
        "from remus_ckpt.store.page_records import RECORD, seal\n"
        "data = sys.stdin.buffer.read()\n"
        "records = np.frombuffer(data[: 40 * 24], dtype=RECORD).copy()\n"
        "records['crc'] = 0\n"
        "seal(records, np.frombuffer(data[40 * 24 :], dtype=np.uint8), np.arange(40) * 4096 + np.arange(40))\n"
        "sys.stdout.buffer.write(records.tobytes())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=records.tobytes() + pages.tobytes(),
        env={**os.environ, kernels.ENVIRONMENT: kernel},
        capture_output=True,
        check=True,
    )
    assert ran.stdout == records.tobytes()


def test_what_does_not_fit_is_refused() -> None:
    source, _ = lie(1)
    arguments = page_records.native_arguments(source)
    native = page_records.native
    for first, pages in ((0, PAGES + 1), (PAGES, 1), (-1, 1), (1 << 40, 1)):
        with pytest.raises(ValueError):
            native.read(arguments, first, np.empty((pages, PAGE_SIZE), dtype=np.uint8))
    records = np.zeros(2, dtype=RECORD)
    records["length"] = 100
    for at in ([0, 950], [-1, 0], [1 << 62, 0], [0]):
        with pytest.raises(ValueError):
            native.seal(records, np.zeros(1000, dtype=np.uint8), np.array(at, dtype=np.int64))
    with pytest.raises(ValueError):
        native.borders(len(CODECS), np.zeros(10, dtype=np.uint8), np.zeros(2, dtype=np.int64))
    with pytest.raises(OSError):
        native.watch(12345, PAGE_SIZE)
    os.close(source.files[0])


@pytest.mark.slow
def test_under_the_sanitizers(tmp_path: Path) -> None:
    """The same, and all of what an index is used for, under AddressSanitizer and UBSan."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("there is no gcc")
    kernels = PACKAGE / "codec" / "_kernels"
    sources = [str(path) for path in kernels.glob("*.c") if path.name != "glue.c"]
    out = tmp_path / "_pages.abi3.so"
    command = [gcc, "-std=c11", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
    command += [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        '-DREMUS_SOURCES=""',
        "-I",
        sysconfig.get_path("include"),
    ]
    command += [str(PACKAGE / "store" / "_pages.c"), *sources, "-o", str(out)]
    subprocess.run(command, check=True)
    preloaded = [
        subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    here = Path(__file__)
    (tmp_path / "conftest_sanitized.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location({page_records.native.__name__!r}, {str(out)!r})\n"
        "from remus_ckpt.store import page_records\n"
        "page_records.native = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(page_records.native)\n"
    )
    files = [str(here), str(here.with_name("test_page_index.py"))]
    chosen = "agrees or refused or epoch or carries or memory or damaged or hot or chunks"
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "conftest_sanitized",
            *files,
            "-k",
            chosen,
        ],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "PYTHONPATH": str(tmp_path),
        },
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
