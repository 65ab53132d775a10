"""Every kernel that this machine can run against the oracle: the same bytes, the same pages, the same refusals.

All buffers end where memory that faults begins, so a byte read or written past an end kills the test run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import CORPORA, EDGES, changed, corpus, guarded, guarded_pages, page_pairs, vector_pages
from numpy.typing import NDArray

from remus_ckpt.codec import CODECS, get_codec, kernels, scan
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, Pages

FAST = [name for name in kernels.KERNELS if name != "oracle"]
NATIVE = [name for name in FAST if name != "numpy"]
BOTH = pytest.mark.parametrize(("codec", "kernel"), [(codec, kernel) for codec in CODECS for kernel in FAST])


def encode(codec: str, kernel: str, old: Pages, new: Pages, **options: object) -> tuple[bytes, Pages]:
    """The encoded pages, and the references after it."""
    wanted = get_codec(codec, kernel=kernel)
    reference = guarded_pages(old)
    index = options.get("index")
    n = len(new) if index is None else len(index)  # type: ignore[arg-type]
    out = guarded(bytes(n * wanted.max_page_bytes))
    encoded = wanted.encode(guarded_pages(new), reference, out=out, **options)  # type: ignore[arg-type]
    return bytes(encoded), reference


def outcome(codec: str, kernel: str, encoded: bytes, old: Pages) -> tuple[object, bytes]:
    """What `apply` gives back or the fault that it finds, and the pages after it. `check` must agree."""
    wanted = get_codec(codec, kernel=kernel)
    pages = guarded_pages(old)
    data = guarded(encoded)
    results: list[object] = []
    for run in (lambda: wanted.check(data, len(pages)), lambda: wanted.apply(data, pages)):
        try:
            results.append(run())
        except Malformed as error:
            results.append((error.offset, error.section))
    assert results[0] == results[1]
    if kernel in NATIVE:
        # Not only numpy, which words the error, but the kernel itself must have found it there.
        found = kernels.native_functions(kernel)[codec][1](data, len(pages))
        assert results[0] == found or results[0][0] == ~found  # type: ignore[index]
    if not isinstance(results[0], int):
        assert np.array_equal(pages, old)
    return results[0], pages.tobytes()


def agree(codec: str, kernel: str, old: Pages, new: Pages) -> bytes:
    """The kernel and the oracle agree in both directions; returns the encoded pages."""
    expected, _ = encode(codec, "oracle", old, new)
    encoded, reference = encode(codec, kernel, old, new)
    assert encoded == expected
    assert np.array_equal(reference, new)
    encoded, reference = encode(codec, kernel, old, new, update=False)
    assert encoded == expected
    assert np.array_equal(reference, old)
    assert outcome(codec, kernel, expected, old) == (len(expected), new.tobytes())
    return expected


def edge_pages() -> tuple[Pages, Pages]:
    pairs = [changed(*runs) for runs in EDGES.values()]
    return np.stack([old for old, _ in pairs]), np.stack([new for _, new in pairs])


@BOTH
def test_edges(codec: str, kernel: str) -> None:
    old, new = edge_pages()
    agree(codec, kernel, old, new)


@BOTH
def test_each_edge_alone_ends_where_the_buffers_end(codec: str, kernel: str) -> None:
    old, new = edge_pages()
    expected, _ = encode(codec, "numpy", old, new)
    joined = b"".join(encode(codec, kernel, old[i : i + 1], new[i : i + 1])[0] for i in range(len(old)))
    assert joined == expected


@pytest.mark.parametrize("kernel", FAST)
def test_size_limits_are_met_exactly(kernel: str) -> None:
    sizes = {
        ("delta", "delta: the most words"): 6 * 683,
        ("delta", "delta: one word too many"): 4102,
        ("rle", "rle: the longest page"): 4105,
        ("xbzrle", "xbzrle: 4,096 bytes"): 3 + 4096,
        ("xbzrle", "xbzrle: 4,094 bytes and a gap"): 3 + 4094,
    }
    for (codec, edge), size in sizes.items():
        old, new = changed(*EDGES[edge])
        assert len(encode(codec, kernel, old[None], new[None])[0]) == size
    for edge, kind in [("xbzrle: 4,096 bytes", 1), ("xbzrle: 4,097 bytes", 2), ("xbzrle: 4,095 bytes and a gap", 2)]:
        old, new = changed(*EDGES[edge])
        assert encode("xbzrle", kernel, old[None], new[None])[0][0] == kind


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("codec", ["xbzrle", "xbzrle-fold"])
def test_pages_that_nearly_overflow(codec: str, kernel: str) -> None:
    """Nearly every byte has changed, and the gaps between decide: some of these pages just fit."""
    random = np.random.default_rng(7)
    old, new = np.zeros((2, 200, PAGE_SIZE), dtype=np.uint8)
    new[:] = random.integers(1, 256, new.shape, dtype=np.uint8)
    for number, page in enumerate(new):
        # 40 gaps, and lengths of a byte each: with 82 bytes of gaps, what is left and its lengths take all of a page.
        for i in range(40):
            at = 97 + i * 100
            page[at : at + 2 + (i < number % 5)] = 0
        if number >= 5:
            at = random.integers(0, PAGE_SIZE - 8)
            page[at : at + random.integers(1, 7)] = 0
    encoded = agree(codec, kernel, old, new)
    sizes = [len(encode(codec, kernel, old[i : i + 1], new[i : i + 1])[0]) for i in range(len(new))]
    assert {3 + PAGE_SIZE - 1, 3 + PAGE_SIZE} <= set(sizes) and sum(sizes) == len(encoded)


@BOTH
@settings(max_examples=many(8, 25), deadline=None)
@given(pages=page_pairs())
def test_made_up_pages(codec: str, kernel: str, pages: tuple[Pages, Pages]) -> None:
    agree(codec, kernel, *pages)


@BOTH
@settings(max_examples=many(8, 15), deadline=None)
@given(pages=page_pairs(), data=st.data())
def test_scattered_full_and_repeated_pages(
    codec: str, kernel: str, pages: tuple[Pages, Pages], data: st.DataObject
) -> None:
    old, new = pages
    count = data.draw(st.integers(0, 6))
    numbers = st.integers(0, len(new) - 1)
    options = {
        "index": np.array(data.draw(st.lists(numbers, min_size=count, max_size=count)), dtype=np.int64),
        "reference_index": np.array(
            data.draw(st.lists(st.one_of(numbers, st.just(-1)), min_size=count, max_size=count)), dtype=np.int64
        ),
        "full": np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool),
        "update": data.draw(st.booleans()),
    }
    expected, expected_reference = encode(codec, "oracle", old, new, **options)
    encoded, reference = encode(codec, kernel, old, new, **options)
    assert encoded == expected
    assert np.array_equal(reference, expected_reference)
    both = []
    for name in ("oracle", kernel):
        target = guarded_pages(old)
        get_codec(codec, kernel=name).apply(guarded(expected), target, index=options["index"])
        both.append(target)
    assert np.array_equal(*both)


@BOTH
@settings(max_examples=many(8, 40), deadline=None)
@given(pages=page_pairs(), data=st.data())
def test_damaged_pages(codec: str, kernel: str, pages: tuple[Pages, Pages], data: st.DataObject) -> None:
    old, new = pages
    encoded = bytearray(encode(codec, "numpy", old, new)[0])
    # Lengths and offsets stand at the front of a page, so that is where most of the damage is done.
    places = st.one_of(st.integers(0, min(len(encoded), 64) - 1), st.integers(0, len(encoded) - 1))
    bytes_ = st.one_of(st.sampled_from([0, 1, 2, 3, 0x7F, 0x80, 0x81, 0x9B, 0x9C, 0xFF]), st.integers(0, 255))
    for at, byte in data.draw(st.lists(st.tuples(places, bytes_), max_size=4)):
        encoded[at] = byte
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(encoded))))
    damaged = bytes(encoded[:cut]) + data.draw(st.binary(max_size=12))
    assert outcome(codec, kernel, damaged, old) == outcome(codec, "oracle", damaged, old)


@BOTH
@settings(max_examples=many(12, 60), deadline=None)
@given(encoded=st.binary(max_size=80), count=st.integers(0, 4))
def test_arbitrary_bytes(codec: str, kernel: str, encoded: bytes, count: int) -> None:
    old = np.full((count, PAGE_SIZE), 7, dtype=np.uint8)
    assert outcome(codec, kernel, encoded, old) == outcome(codec, "oracle", encoded, old)


@BOTH
def test_every_cut(codec: str, kernel: str) -> None:
    pairs = [changed(), changed((0, 4), (300, 60)), changed((4090, 6)), changed(*((i * 40, 3) for i in range(20)))]
    old, new = np.stack([old for old, _ in pairs]), np.stack([new for _, new in pairs])
    encoded, _ = encode(codec, "numpy", old, new)
    for size in range(0, len(encoded), many(5, 1)):
        assert outcome(codec, kernel, encoded[:size], old) == outcome(codec, "oracle", encoded[:size], old)


@BOTH
def test_a_fault_at_every_byte_of_one_page_of_three(codec: str, kernel: str) -> None:
    """Kernels that walk several pages at once must not lose a fault, nor the order of two."""
    old, new = changed((0, 4), (300, 60), (700, 3))
    encoded, _ = encode(codec, "numpy", old[None], new[None])
    three = np.stack([old] * 3)
    for at in range(0, len(encoded), many(11, 1)):
        for byte in (0, 0x7F, 0xFF):
            damaged = encoded[:at] + bytes([byte]) + encoded[at + 1 :]
            for pages in ([damaged, encoded, encoded], [encoded, damaged, encoded], [encoded, damaged, damaged]):
                joined = b"".join(pages)
                assert outcome(codec, kernel, joined, three) == outcome(codec, "oracle", joined, three)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernel", FAST)
def test_a_source_that_is_being_written(codec: str, kernel: str) -> None:
    """Whatever the encoder caught, wire and reference hold the same."""
    random = np.random.default_rng(1)
    old = random.integers(0, 256, (64, PAGE_SIZE), dtype=np.uint8)
    source = old.copy()
    patterns = [random.integers(0, 256, PAGE_SIZE, dtype=np.uint8) * (random.random(PAGE_SIZE) < share)
                for share in (0.01, 0.2, 1.0)]  # fmt: skip
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for pattern in patterns:
                np.bitwise_xor(source, pattern.astype(np.uint8), out=source)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wanted = get_codec(codec, kernel=kernel)
        reference, standby = old.copy(), old.copy()
        for _ in range(many(6, 30)):
            encoded = wanted.encode(source, reference)
            assert wanted.apply(encoded, standby) == len(encoded)
            assert np.array_equal(standby, reference)
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_that_passes_every_threshold(codec: str) -> None:
    """Sparse to dense pages in one batch: kernels choose their way by the number of changes."""
    random = np.random.default_rng(2)
    old = random.integers(0, 256, (240, PAGE_SIZE), dtype=np.uint8)
    new = old.copy()
    for i, page in enumerate(new):
        places = random.permutation(1024)[: i * 4 + 1]
        page.reshape(-1, 4)[places] ^= random.integers(0, 256, (len(places), 4), dtype=np.uint8)
    expected, _ = encode(codec, "numpy", old, new)
    for kernel in NATIVE:
        assert encode(codec, kernel, old, new)[0] == expected
        assert outcome(codec, kernel, expected, old) == (len(expected), new.tobytes())


@pytest.mark.slow
@BOTH
def test_page_vectors(codec: str, kernel: str) -> None:
    old = np.frombuffer(vector_pages("old"), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    new = np.frombuffer(vector_pages("new"), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    encoded, reference = encode(codec, kernel, old, new)
    assert np.array_equal(reference, new)
    assert outcome(codec, kernel, encoded, old) == (len(encoded), new.tobytes())
    if codec in ("rle", "xbzrle"):
        assert encoded == vector_pages(codec)
    else:
        some = slice(0, None, 7)
        agree(codec, kernel, old[some], new[some])


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("codec", CODECS)
def test_corpora(codec: str, name: str) -> None:
    """Numpy on a part of the pages; the oracle on all of them if REMUS_CKPT_TEST_ALL is set, which takes minutes."""
    whole = "REMUS_CKPT_TEST_ALL" in os.environ
    old, new = (pages if whole else pages[::8] for pages in corpus(name))
    expected, _ = encode(codec, "oracle" if whole else "numpy", old, new)
    for kernel in FAST:
        encoded, reference = encode(codec, kernel, old, new)
        assert encoded == expected
        assert np.array_equal(reference, new)
        assert outcome(codec, kernel, expected, old) == (len(expected), new.tobytes())


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=many(8, 30), deadline=None)
@given(pages=page_pairs(), data=st.data())
def test_scan(kernel: str, pages: tuple[Pages, Pages], data: st.DataObject) -> None:
    old, new = pages
    expected = np.flatnonzero((old != new).any(axis=1))
    found = scan.dirty_pages(guarded_pages(new), guarded_pages(old), kernel=kernel)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)
    index = np.array(data.draw(st.lists(st.integers(0, len(new) - 1), max_size=6)), dtype=np.int64)
    gathered = scan.gather(guarded_pages(new), index, guarded_pages(new[index]), kernel=kernel)
    assert np.array_equal(gathered, new[index])
    # At an odd address too, where stores that want an aligned one cannot be used.
    odd = guarded(bytes(len(index) * PAGE_SIZE + 1))[:-1].reshape(-1, PAGE_SIZE)
    assert np.array_equal(scan.gather(new, index, odd, kernel=kernel), new[index])
    memory, by_numpy = guarded_pages(old), old.copy()
    scan.scatter(guarded_pages(new[index]), memory, index, kernel=kernel)
    scan.scatter(new[index], by_numpy, index, kernel="numpy")
    assert np.array_equal(memory, by_numpy)


@pytest.mark.parametrize("kernel", FAST)
def test_filled_pages(kernel: str) -> None:
    """Any one byte fills a page, wherever it is."""
    pages = np.zeros((PAGE_SIZE // 16 * 2, PAGE_SIZE), dtype=np.uint8)
    at = np.arange(PAGE_SIZE // 16)
    pages[2 * at + 1, at * 16 + at % 16] = 1 << at % 8
    found = scan.filled_pages(guarded_pages(pages), kernel=kernel)
    assert found.dtype == np.int64
    assert np.array_equal(found, 2 * at + 1)
    assert not len(scan.filled_pages(guarded_pages(pages[:0]), kernel=kernel))


@pytest.mark.parametrize("kernel", NATIVE)
def test_compare_reads_everything_and_counts(kernel: str) -> None:
    old, new = edge_pages()
    compare = kernels.SCANS[kernel].compare
    assert compare(guarded_pages(old), guarded_pages(new)) == np.count_nonzero((old != new).any(axis=1))
    assert compare(old, old) == 0


@pytest.mark.parametrize("kernel", NATIVE)
def test_native_functions_refuse_what_does_not_fit(kernel: str) -> None:
    """`Codec` validates before; a fault there must still not become a stray write."""
    pages, out = np.zeros((2, PAGE_SIZE), dtype=np.uint8), np.zeros(2 * 4105, dtype=np.uint8)
    encode_, _, apply_ = kernels.native_functions(kernel)["rle"]
    far = np.array([0, 2], dtype=np.int64)
    for arguments in [
        (pages, far, pages, None, None, True, out),
        (pages, None, pages, far, None, True, out),
        (pages, None, pages[:1], None, None, True, out),
        (pages, None, pages, None, np.zeros(1, dtype=bool), True, out),
        (pages, None, pages, None, None, True, out[:-1]),
        (pages.reshape(-1)[:-1], None, pages, None, None, True, out),
    ]:
        with pytest.raises(ValueError):
            encode_(*arguments)
    with pytest.raises(ValueError):
        apply_(bytes(2), pages, np.array([-1, 0], dtype=np.int64), None)
    for checked in (3, -2):
        with pytest.raises(ValueError):
            apply_(bytes(2), pages, None, checked)
    with pytest.raises(TypeError):
        encode_(pages)


def run_with(environment: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, kernels.ENVIRONMENT: environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_the_environment_demands_a_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.ENVIRONMENT, kernel)
    assert all(get_codec(codec).kernel == kernel for codec in CODECS)
    report = kernels.report()
    assert report["kernel"] == kernel
    assert kernels.ENVIRONMENT in report["why"]


@pytest.mark.parametrize("kernel", ["fastest", *(name for name in kernels.NATIVE if name not in kernels.KERNELS)])
def test_a_kernel_that_cannot_be_had_is_refused(kernel: str) -> None:
    program = "from remus_ckpt.codec import get_codec, kernels; print(kernels.report()['kernel']); get_codec('delta')"
    result = run_with(kernel, program)
    assert result.returncode == 1
    assert result.stdout == "None\n"
    assert kernel in result.stderr


def test_report_without_a_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    report = kernels.report()
    assert report["kernel"] == report["available"][0] == get_codec("rle").kernel
    assert set(report["available"]) | set(report["missing"]) == {*kernels.NATIVE, "numpy", "oracle"}
    assert report["built"] == ("scalar" in report["available"]) == (report["not_built"] is None)


def test_numpy_serves_where_the_extension_is_missing() -> None:
    """As where no compiler was at hand: the module is there, under the name that the package gives it."""
    program = """
import sys
sys.modules["remus_ckpt.codec._native"] = None
import numpy as np
from remus_ckpt.codec import get_codec, kernels, scan
pages = np.zeros((2, 4096), dtype=np.uint8)
print(get_codec("xbzrle").kernel, kernels.report()["built"], len(scan.dirty_pages(pages, pages)))
kernels.wanted("scalar")
"""
    result = run_with("", program)
    assert result.stdout == "numpy False 0\n"
    assert "KernelUnavailable" in result.stderr
    assert "extension" in result.stderr


@BOTH
def test_a_batch_of_nothing(codec: str, kernel: str) -> None:
    nothing: NDArray[np.uint8] = np.empty((0, PAGE_SIZE), dtype=np.uint8)
    wanted = get_codec(codec, kernel=kernel)
    assert bytes(wanted.encode(nothing, nothing)) == b""
    assert wanted.check(b"", 0) == 0
    assert wanted.apply(b"anything", nothing) == 0
