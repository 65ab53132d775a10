"""Every codec by every kernel: against real encoders' bytes, against the oracle, and against bytes that are wrong."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, changed_bytes, changed_words, edges, noise, page_pairs, scattered_words, stacked
from shared import needs_pages
from shared import page_pairs as shared_pairs

from remus_ckpt.codec import CODECS, Codec, get_codec, kernels, xbzrle
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, PAGE_WORDS
from remus_ckpt.sender import PAGE_BUFFER_PAGES
from remus_ckpt.wire.xen.dialect import STREAM_CODECS

EVERY = [(name, kernel) for name, row in kernels.TABLE.items() for kernel in row]
BASE = noise(1)[0]

every_kernel = pytest.mark.parametrize(("name", "kernel"), EVERY)
every_codec = pytest.mark.parametrize("name", CODECS)


def outcome(action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What it returns, or where and why it says that the bytes are malformed."""
    try:
        return action(*arguments, **named)
    except Malformed as error:
        return ("malformed", error.offset, error.section)


def encoded(codec: Codec, old: Any, new: Any) -> bytes:
    return bytes(codec.encode(new, old.copy()))


# What the bytes are. Written by hand from the format, for a page in which only this differs:

BEGIN, FULL = struct.pack("<hI", -100, 0), struct.pack("<hI", -101, 0)


def words_of(new: Any, first: int, stop: int) -> bytes:
    return bytes(new[4 * first : 4 * stop])


def by_hand() -> Iterator[tuple[str, str, Pair, bytes]]:
    one = changed_words(BASE, (5, 6))
    yield "delta", "nothing", (BASE, BASE), BEGIN
    yield "delta", "word 5", (BASE, one), BEGIN + struct.pack("<h", 20) + words_of(one, 5, 6)
    ends = changed_words(BASE, (0, 1), (1023, 1024))
    records = struct.pack("<h", 0) + words_of(ends, 0, 1) + struct.pack("<h", 4092) + words_of(ends, 1023, 1024)
    yield "delta", "first and last", (BASE, ends), BEGIN + records
    most = changed_words(BASE, (0, 682))
    records = b"".join(struct.pack("<h", 4 * i) + words_of(most, i, i + 1) for i in range(682))
    yield "delta", "682 words", (BASE, most), BEGIN + records
    over = changed_words(BASE, (0, 683))
    yield "delta", "683 words", (BASE, over), FULL + bytes(over)

    yield "rle", "nothing", (BASE, BASE), b"\x00"
    # 5 words stay, one changes, 1,018 stay: eight skips of 127 and one of 2.
    yield "rle", "word 5", (BASE, one), b"\x85\x01" + words_of(one, 5, 6) + b"\xff" * 8 + b"\x82"
    # One changes, 1,022 stay: eight of 127 and one of 6; one changes.
    yield (
        "rle",
        "first and last",
        (BASE, ends),
        b"\x01" + words_of(ends, 0, 1) + b"\xff" * 8 + b"\x86\x01" + words_of(ends, 1023, 1024),
    )
    everything = changed_words(BASE, (0, 1024))
    runs = b"".join(b"\x7f" + words_of(everything, 127 * i, 127 * i + 127) for i in range(8))
    yield "rle", "everything", (BASE, everything), runs + b"\x08" + words_of(everything, 1016, 1024)

    for name in ("xbzrle", "xbzrle-fold"):
        byte = changed_bytes(BASE, (300, 301))
        yield name, "nothing", (BASE, BASE), b"\x00\x00\x00"
        # 300 = 0b10_0101100: the low seven bits first.
        yield name, "byte 300", (BASE, byte), b"\x01\x00\x04\xac\x02\x01" + bytes(byte[300:301])
        full = changed_bytes(BASE, (0, 4096))
        yield name, "everything", (BASE, full), b"\x02\x10\x00" + bytes(full)
        # No gap, 4,091 changed bytes (ULEB128 fb 1f), and two bytes of room behind them.
        most = changed_bytes(BASE, (0, 4091))
        yield name, "4,091 bytes", (BASE, most), b"\x01\x0f\xfe\x00\xfb\x1f" + bytes(most[:4091])
        over = changed_bytes(BASE, (0, 4092))
        yield name, "4,092 bytes", (BASE, over), b"\x02\x10\x00" + bytes(over)
        # A run that ends with the page needs no room behind it.
        last = changed_bytes(BASE, (3, 4096))
        yield name, "all but three", (BASE, last), b"\x01\x10\x00\x03\xfd\x1f" + bytes(last[3:])
        over = changed_bytes(BASE, (2, 4096))
        yield name, "all but two", (BASE, over), b"\x02\x10\x00" + bytes(over)
    holes = changed_bytes(BASE, (7, 9), (10, 11))
    yield (
        "xbzrle",
        "a gap of one",
        (BASE, holes),
        b"\x01\x00\x07\x07\x02" + bytes(holes[7:9]) + b"\x01\x01" + bytes(holes[10:11]),
    )
    yield "xbzrle-fold", "a gap of one", (BASE, holes), b"\x01\x00\x06\x07\x04" + bytes(holes[7:11])
    wider = changed_bytes(BASE, (7, 9), (11, 12))
    kept = b"\x07\x02" + bytes(wider[7:9]) + b"\x02\x01" + bytes(wider[11:12])
    yield "xbzrle-fold", "a gap of two", (BASE, wider), b"\x01\x00\x07" + kept


@pytest.mark.parametrize(
    ("name", "pair", "expected", "kernel"),
    [
        pytest.param(name, pair, expected, kernel, id=f"{name}-{kernel}-{what}")
        for name, what, pair, expected in by_hand()
        for kernel in kernels.TABLE[name]
    ],
)
def test_the_bytes_are_what_the_format_says(name: str, pair: Pair, expected: bytes, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    old, new = (page.reshape(1, PAGE_SIZE) for page in pair)
    reference = old.copy()
    assert bytes(codec.encode(new, reference)) == expected
    assert np.array_equal(reference, new)
    target = old.copy()
    assert codec.check(expected, 1) == codec.apply(expected, target) == len(expected)
    assert np.array_equal(target, new)


@pytest.mark.slow
@needs_pages
@every_kernel
def test_603_pairs_give_the_real_encoders_bytes(name: str, kernel: str) -> None:
    old, new, real = shared_pairs()
    codec = get_codec(name, kernel=kernel)
    reference = old.copy()
    ours = codec.encode(new, reference)
    assert len(new) == 603
    if name in real:
        assert np.array_equal(np.frombuffer(ours, dtype=np.uint8), real[name])
    assert np.array_equal(reference, new)
    target = old.copy()
    assert codec.apply(ours, target) == len(ours)
    assert np.array_equal(target, new)


@every_codec
def test_the_edges_come_back_and_agree_with_the_oracle(name: str) -> None:
    old, new = stacked(list(edges().values()))
    expected = encoded(get_codec(name, kernel="oracle"), old, new)
    for kernel in kernels.TABLE[name]:
        codec = get_codec(name, kernel=kernel)
        reference = old.copy()
        assert bytes(codec.encode(new, reference)) == expected, kernel
        assert np.array_equal(reference, new), kernel
        target = old.copy()
        assert codec.check(expected, len(new)) == codec.apply(expected, target) == len(expected), kernel
        assert np.array_equal(target, new), kernel


@every_codec
@given(st.lists(page_pairs(), min_size=1, max_size=3))
@settings(max_examples=many(12, 60))
def test_made_pages_come_back(name: str, pairs: list[Pair]) -> None:
    old, new = stacked(pairs)
    expected = encoded(get_codec(name, kernel="oracle"), old, new)
    for kernel in kernels.TABLE[name]:
        codec = get_codec(name, kernel=kernel)
        assert encoded(codec, old, new) == expected
        assert len(expected) <= len(new) * codec.max_page_bytes
        target = old.copy()
        assert codec.apply(expected, target) == len(expected)
        assert np.array_equal(target, new)


@given(page_pairs())
@settings(max_examples=many(30, 150))
def test_folding_is_never_longer_and_needs_no_decoder_of_its_own(pair: Pair) -> None:
    old, new = stacked([pair])
    plain, folded = (encoded(get_codec(name), old, new) for name in ("xbzrle", "xbzrle-fold"))
    assert len(folded) <= len(plain)
    target = old.copy()
    assert get_codec("xbzrle").apply(folded, target) == len(folded)
    assert np.array_equal(target, new)


def test_folding_is_never_longer_on_the_edges() -> None:
    shorter = 0
    for old, new in edges().values():
        plain, folded = (xbzrle.encode_page(new, old, fold=fold) for fold in (False, True))
        if isinstance(plain, xbzrle.Outcome):
            # What does not change is the same in both; what does not fit may fit when it is folded.
            assert folded == plain or plain is xbzrle.Outcome.OVERFLOW
        else:
            assert isinstance(folded, bytes) and len(folded) <= len(plain)
            shorter += len(folded) < len(plain)
    assert shorter


def test_single_pages_have_two_outcomes_without_bytes() -> None:
    page = xbzrle.encode_page(changed_bytes(BASE, (300, 301)), BASE)
    assert page == b"\xac\x02\x01" + bytes(changed_bytes(BASE, (300, 301))[300:301])
    target = BASE.copy()
    xbzrle.apply_page(page, target)
    assert np.array_equal(target, changed_bytes(BASE, (300, 301)))
    assert xbzrle.encode_page(BASE, BASE.copy()) is xbzrle.Outcome.UNCHANGED
    assert xbzrle.encode_page(changed_bytes(BASE, (0, 4096)), BASE) is xbzrle.Outcome.OVERFLOW
    fits, over = changed_bytes(BASE, (3, 4096)), changed_bytes(BASE, (2, 4096))
    most = xbzrle.encode_page(fits, BASE)
    assert isinstance(most, bytes) and len(most) == PAGE_SIZE
    assert xbzrle.encode_page(over, BASE) is xbzrle.Outcome.OVERFLOW


@pytest.mark.parametrize(
    ("encoded", "offset", "section"),
    [
        (b"", 0, "xbzrle.md §4.2"),
        (b"\x01", 1, "xbzrle.md §4.1"),
        (b"\x80", 0, "xbzrle.md §4.1"),
        (b"\x01\x00\xff", 1, "xbzrle.md §4.2"),
        (b"\x01\x01", 1, "xbzrle.md §4.3"),
    ],
)
def test_a_malformed_single_page_is_refused(encoded: bytes, offset: int, section: str) -> None:
    target = BASE.copy()
    with pytest.raises(Malformed) as caught:
        xbzrle.apply_page(encoded, target)
    assert (caught.value.offset, caught.value.section) == (offset, section)
    assert np.array_equal(target, BASE)


# What an encode call can be asked for


@every_kernel
def test_index_picks_pages_in_its_order(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    pages, old = noise(10, 6), noise(10, 6)
    pages[2, :9] ^= 1
    pages[5] ^= 0xFF
    index = np.array([5, 2, 2, 0])
    reference = old[index].copy()
    ours = bytes(codec.encode(pages, reference, index=index))
    assert ours == encoded(codec, old[index], pages[index])
    assert np.array_equal(reference, pages[index])
    target = old.copy()
    # Listed twice, page 2 is changed and then changed to what it is already.
    assert codec.apply(ours, target, index=index) == len(ours)
    assert np.array_equal(target[[0, 2, 5]], pages[[0, 2, 5]])
    assert np.array_equal(target[[1, 3, 4]], old[[1, 3, 4]])


@every_kernel
def test_a_reference_used_twice_is_brought_up_to_date_between(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    versions = np.stack([BASE, changed_words(BASE, (3, 4)), changed_words(BASE, (3, 4), (9, 12)), BASE])
    slots = np.array([1, 1, 1, 1])
    reference = np.zeros((2, PAGE_SIZE), dtype=np.uint8)
    ours = bytes(codec.encode(versions, reference, reference_index=slots))
    before = np.stack([np.zeros(PAGE_SIZE, dtype=np.uint8), *versions[:-1]])
    assert ours == encoded(codec, before, versions)
    assert np.array_equal(reference, np.stack([np.zeros(PAGE_SIZE, dtype=np.uint8), BASE]))

    unchanged = before[:1].copy()
    apart = bytes(codec.encode(versions, unchanged, reference_index=np.zeros(4, dtype=int), update=False))
    assert apart == encoded(codec, np.repeat(before[:1], 4, axis=0), versions)
    assert not unchanged.any()


@every_kernel
def test_a_page_without_reference_or_marked_full_travels_full(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    pages = np.stack([BASE, BASE, BASE])
    reference = np.stack([BASE, BASE])
    heads = {"delta": FULL, "rle": b"\x80", "xbzrle": b"\x02\x10\x00", "xbzrle-fold": b"\x02\x10\x00"}
    same = {"delta": BEGIN, "rle": b"\x00", "xbzrle": b"\x00\x00\x00", "xbzrle-fold": b"\x00\x00\x00"}
    whole = heads[name] + bytes(BASE)
    ours = codec.encode(
        pages, reference, reference_index=np.array([-1, 0, 1]), full=np.array([False, True, False]), update=True
    )
    assert bytes(ours) == whole + whole + same[name]
    # Nor is the last reference touched by a page that has none.
    reference = np.zeros((2, PAGE_SIZE), dtype=np.uint8)
    ours = codec.encode(pages[:2], reference, reference_index=np.array([-1, -1]))
    assert bytes(ours) == whole + whole
    assert not reference.any()
    empty = np.empty((0, PAGE_SIZE), dtype=np.uint8)
    assert bytes(codec.encode(pages[:2], empty, reference_index=np.array([-1, -1]))) == whole + whole
    # A full page brings its reference up to date as any other.
    reference = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
    assert bytes(codec.encode(pages[:1], reference, full=np.array([True]))) == whole
    assert np.array_equal(reference[0], BASE)


@every_codec
def test_random_calls_agree_with_the_oracle(name: str) -> None:
    rng = np.random.default_rng(7)
    pool = np.stack([new for _, new in edges().values()])
    for _ in range(60):
        n = int(rng.integers(0, 9))
        arguments: dict[str, Any] = {
            "index": rng.integers(0, len(pool), n),
            "reference_index": rng.integers(-1, 4, n),
            "full": rng.random(n) < 0.2,
            "update": bool(rng.random() < 0.8),
        }
        start = pool[rng.integers(0, len(pool), 4)]
        results = {}
        for kernel in kernels.TABLE[name]:
            reference = start.copy()
            ours = bytes(get_codec(name, kernel=kernel).encode(pool, reference, **arguments))
            results[kernel] = (ours, reference.tobytes())
        assert [kernel for kernel, result in results.items() if result != results["oracle"]] == [], arguments


@every_kernel
def test_no_pages_are_no_bytes(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    none = np.empty((0, PAGE_SIZE), dtype=np.uint8)
    assert len(codec.encode(none, none.copy())) == 0
    assert codec.check(b"", 0) == codec.check(b"rubbish", 0) == 0
    assert codec.apply(b"", none.copy()) == 0
    target = BASE.reshape(1, -1).copy()
    assert codec.apply(b"rubbish", target, index=np.array([], dtype=int)) == 0
    assert np.array_equal(target[0], BASE)


@every_kernel
def test_encoding_into_a_buffer_of_the_caller(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    pages, old = noise(20, 3), noise(21, 3)
    expected = encoded(codec, old, pages)
    for out in (bytearray(3 * codec.max_page_bytes), np.empty(3 * codec.max_page_bytes + 5, dtype=np.uint8)):
        ours = codec.encode(pages, old.copy(), out=out)
        assert bytes(ours) == expected == bytes(out[: len(expected)])
        assert np.shares_memory(np.frombuffer(ours, dtype=np.uint8), np.frombuffer(out, dtype=np.uint8))


@every_kernel
def test_any_shape_that_ends_in_4096(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    pages, old = noise(22, 6), noise(22, 6)
    pages[1, 7] ^= 1
    expected = encoded(codec, old, pages)
    reference = old.reshape(2, 3, PAGE_SIZE).copy()
    assert bytes(codec.encode(pages.reshape(3, 2, PAGE_SIZE), reference)) == expected
    assert np.array_equal(reference.reshape(6, PAGE_SIZE), pages)
    target = old.reshape(1, 6, 1, PAGE_SIZE).copy()
    codec.apply(expected, target)
    assert np.array_equal(target.reshape(6, PAGE_SIZE), pages)
    single = old[1].copy()
    assert bytes(codec.encode(pages[1], single)) == encoded(codec, old[1:2], pages[1:2])
    assert np.array_equal(single, pages[1])


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


PAGES, OLD = noise(30, 3), noise(31, 3)
BAD_ENCODE: dict[str, tuple[type[Exception], Any, dict[str, Any]]] = {
    "pages of words": (TypeError, PAGES.view(np.uint32), {}),
    "pages of 4,095 bytes": (TypeError, PAGES.reshape(-1)[: 3 * 4095].reshape(3, 4095), {}),
    "pages as bytes": (TypeError, bytes(PAGES), {}),
    "pages with gaps": (ValueError, noise(32, 6)[::2], {}),
    "more pages than references": (ValueError, noise(33, 4), {}),
    "index beyond": (ValueError, PAGES, {"index": np.array([0, 1, 3])}),
    "index negative": (ValueError, PAGES, {"index": np.array([0, -1, 1])}),
    "index of floats": (TypeError, PAGES, {"index": np.array([0.0, 1.0, 2.0])}),
    "index in two dimensions": (TypeError, PAGES, {"index": np.zeros((1, 3), dtype=int)}),
    "index and references of two lengths": (ValueError, PAGES, {"index": np.array([0, 1])}),
    "reference_index beyond": (ValueError, PAGES, {"reference_index": np.array([0, 1, 3])}),
    "reference_index below -1": (ValueError, PAGES, {"reference_index": np.array([0, 1, -2])}),
    "reference_index too short": (ValueError, PAGES, {"reference_index": np.array([0, 1])}),
    "full too short": (ValueError, PAGES, {"full": np.array([True])}),
    "out too small": (ValueError, PAGES, {"out": bytearray(3 * PAGE_SIZE - 1)}),
    "out read-only": (ValueError, PAGES, {"out": bytes(4 * 4200)}),
}


@every_kernel
@pytest.mark.parametrize("what", BAD_ENCODE)
def test_bad_arguments_of_encode_change_nothing(name: str, kernel: str, what: str) -> None:
    error, pages, arguments = BAD_ENCODE[what]
    reference = OLD.copy()
    out = arguments.get("out")
    before = None if out is None else bytes(out)
    with pytest.raises(error):
        get_codec(name, kernel=kernel).encode(pages, reference, **arguments)
    assert np.array_equal(reference, OLD)
    assert out is None or bytes(out) == before


@every_kernel
def test_a_read_only_reference_serves_only_without_update(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    with pytest.raises(ValueError):
        codec.encode(PAGES, read_only(OLD))
    assert bytes(codec.encode(PAGES, read_only(OLD), update=False)) == encoded(codec, OLD, PAGES)
    assert bytes(codec.encode(read_only(PAGES), OLD.copy())) == encoded(codec, OLD, PAGES)


@every_kernel
def test_bad_arguments_of_check_and_apply(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    ours = encoded(codec, OLD, PAGES)
    with pytest.raises(ValueError):
        codec.check(ours, -1)
    target = OLD.copy()
    for error, pages, index in (
        (TypeError, target.view(np.uint32), None),
        (TypeError, bytearray(target.tobytes()), None),
        (ValueError, read_only(OLD), None),
        (ValueError, noise(34, 6)[::2], None),
        (ValueError, target, np.array([0, 1, 3])),
        (ValueError, target, np.array([0, 1, -1])),
        (TypeError, target, np.array([0.5, 1.0, 2.0])),
    ):
        with pytest.raises(error):
            codec.apply(ours, pages, index=index)
    assert np.array_equal(target, OLD)


def test_names_and_kernels_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError):
        get_codec("deflate")
    with pytest.raises(ValueError):
        get_codec("delta", kernel="abacus")
    monkeypatch.setenv(kernels.ENVIRONMENT, "abacus")
    with pytest.raises(ValueError):
        get_codec("delta")
    monkeypatch.setenv(kernels.ENVIRONMENT, "oracle")
    assert get_codec("delta").kernel == "oracle"
    assert get_codec("delta", kernel="numpy").kernel == "numpy"


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_numpy_and_an_oracle(name: str) -> None:
    assert {"numpy", "oracle"} <= set(kernels.TABLE[name])


# Bytes that are wrong

FULL_BODY = bytes(BASE)
REST = b"\xff" * 8 + b"\x88"  # rle: skips 1,024 words
MALFORMED: list[tuple[str, str, bytes, int, str]] = [
    ("delta", "nothing", b"", 0, "§4.2"),
    ("delta", "half a marker", BEGIN[:5], 0, "§4.1"),
    ("delta", "no marker", struct.pack("<hI", 0, 7), 0, "§4.2"),
    ("delta", "no marker, negative", struct.pack("<hI", -99, 0), 0, "§4.2"),
    ("delta", "no marker, -102", struct.pack("<hI", -102, 0), 0, "§4.2"),
    ("delta", "BEGIN_PAGE with a value", struct.pack("<hI", -100, 1), 0, "§2.2"),
    ("delta", "FULL_PAGE with a value", struct.pack("<hI", -101, 1 << 31) + FULL_BODY, 0, "§2.2"),
    ("delta", "FULL_PAGE alone", FULL, 0, "§4.1"),
    ("delta", "FULL_PAGE cut", FULL + FULL_BODY[:-1], 0, "§4.1"),
    ("delta", "record cut", BEGIN + struct.pack("<hI", 0, 7)[:3], 6, "§4.1"),
    ("delta", "offset 4096", BEGIN + struct.pack("<hI", 4096, 7), 6, "§2.1"),
    ("delta", "offset 32767", BEGIN + struct.pack("<hI", 32767, 7), 6, "§2.1"),
    ("delta", "offset -4", BEGIN + struct.pack("<hI", -4, 7), 6, "§2.1"),
    ("delta", "offset 2", BEGIN + struct.pack("<hI", 2, 7), 6, "§2.1"),
    ("delta", "offset 4093", BEGIN + struct.pack("<hI", 4093, 7), 6, "§2.1"),
    ("delta", "an offset twice", BEGIN + struct.pack("<hIhI", 8, 7, 8, 7), 12, "§2.1"),
    ("delta", "offsets descending", BEGIN + struct.pack("<hIhI", 8, 7, 4, 7), 12, "§2.1"),
    ("rle", "nothing", b"", 0, "§4.3"),
    ("rle", "full page cut", b"\x80" + FULL_BODY[:-1], 0, "§4.3"),
    ("rle", "full page alone", b"\x80", 0, "§4.3"),
    ("rle", "run cut", b"\x02" + b"\1\0\0\0\2\0\0", 0, "§4.3"),
    ("rle", "page cut between runs", b"\xff\xff", 2, "§4.3"),
    ("rle", "unchanged in a page", b"\x81\x00", 1, "§2.2"),
    ("rle", "full in a page", b"\x81\x80" + FULL_BODY, 1, "§2.2"),
    ("rle", "skip past the page", b"\xff" * 8 + b"\x89", 8, "§4.2"),
    ("rle", "run past the page", b"\xff" * 8 + b"\x09" + bytes(36), 8, "§4.2"),
    ("xbzrle", "nothing", b"", 0, "§5.1"),
    ("xbzrle", "half a frame", b"\x00\x00", 0, "§5.1"),
    ("xbzrle", "kind 3", b"\x03\x00\x00", 0, "§5.1"),
    ("xbzrle", "kind 255", b"\xff\x00\x00", 0, "§5.1"),
    ("xbzrle", "same with bytes", b"\x00\x00\x01\x00", 0, "§5.1"),
    ("xbzrle", "encoded, 2 bytes", b"\x01\x00\x02\x00\x01", 0, "§5.1"),
    ("xbzrle", "encoded, 4,097 bytes", b"\x01\x10\x01" + bytes(4097), 0, "§5.1"),
    ("xbzrle", "raw, 4,095 bytes", b"\x02\x0f\xff" + bytes(4095), 0, "§5.1"),
    ("xbzrle", "raw, cut", b"\x02\x10\x00" + bytes(4095), 0, "§5.1"),
    ("xbzrle", "encoded, cut", b"\x01\x00\x04\x00\x02\xaa", 0, "§5.1"),
    ("xbzrle", "second zero run empty", b"\x01\x00\x06\x00\x01\xaa\x00\x01\xbb", 6, "§4.2"),
    ("xbzrle", "empty run", b"\x01\x00\x03\x00\x00\xaa", 4, "§4.2"),
    ("xbzrle", "length of three bytes", b"\x01\x00\x05\x80\x80\x01\x01\xaa", 3, "§4.1"),
    ("xbzrle", "length cut", b"\x01\x00\x03\x00\x80\x80", 4, "§4.1"),
    ("xbzrle", "ends behind a zero run", b"\x01\x00\x04\x00\x01\xaa\x05", 7, "§4.1"),
    ("xbzrle", "run past the frame", b"\x01\x00\x04\x00\x03\xaa\xbb", 4, "§4.3"),
    ("xbzrle", "run past the page", b"\x01\x00\x05\xff\x1f\x02\xaa\xbb", 5, "§4.3"),
    ("xbzrle", "zero run past the page", b"\x01\x00\x04\x80\x20\x01\xaa", 5, "§4.3"),
]


@pytest.mark.parametrize(
    ("name", "kernel", "data", "offset", "section"),
    [
        pytest.param(name, kernel, data, offset, f"{name}.md {section}", id=f"{name}-{kernel}-{what}")
        for name, what, data, offset, section in MALFORMED
        for kernel in kernels.TABLE[name]
    ],
)
def test_malformed_pages_are_refused_before_any_is_touched(
    name: str, kernel: str, data: bytes, offset: int, section: str
) -> None:
    codec = get_codec(name, kernel=kernel)
    pages = noise(40, 4)
    changed = pages.copy()
    changed[0, 5] ^= 1
    changed[2] ^= 0xFF
    good = encoded(codec, pages[:3], changed[:3])
    for before, n in ((b"", 1), (good, 4)):
        with pytest.raises(Malformed) as caught:
            codec.check(before + data, n)
        assert (caught.value.offset, caught.value.section) == (len(before) + offset, section)
        target = pages[4 - n :].copy()
        with pytest.raises(Malformed) as caught:
            codec.apply(before + data, target[:n])
        assert (caught.value.offset, caught.value.section) == (len(before) + offset, section)
        assert np.array_equal(target, pages[4 - n :])


@every_kernel
def test_what_stands_behind_the_pages_is_left(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    for new in (BASE, changed_words(BASE, (3, 4)), changed_bytes(BASE, (0, 4096))):
        ours = encoded(codec, BASE.reshape(1, -1), new.reshape(1, -1))
        another = encoded(codec, BASE.reshape(1, -1), BASE.reshape(1, -1))
        assert codec.check(ours + another, 1) == len(ours)
        target = BASE.reshape(1, -1).copy()
        assert codec.apply(ours + another, target) == len(ours)
        assert np.array_equal(target[0], new)
        assert codec.check(ours + another, 2) == len(ours) + len(another)


@pytest.mark.parametrize("kernel", kernels.TABLE["delta"])
def test_a_delta_page_ends_with_the_next_one_or_with_the_data(kernel: str) -> None:
    """Such a page does not say where it ends: what follows it, and opens no page, belongs to it."""
    codec = get_codec("delta", kernel=kernel)
    record = struct.pack("<hI", 8, 0xABCD)
    assert codec.check(BEGIN + record + BEGIN, 1) == 12
    assert codec.check(BEGIN + record, 1) == 12
    assert outcome(codec.check, BEGIN + record + b"\1", 1) == ("malformed", 12, "delta.md §4.1")
    # A full page ends by itself, whatever follows.
    assert codec.check(FULL + FULL_BODY + b"\1\2\3", 1) == 6 + PAGE_SIZE
    assert codec.check(FULL + FULL_BODY + record, 1) == 6 + PAGE_SIZE
    assert outcome(codec.check, FULL + FULL_BODY + record, 2) == (
        "malformed",
        6 + PAGE_SIZE,
        "delta.md §4.2",
    )


def test_delta_takes_a_page_with_more_records_than_its_encoder_writes() -> None:
    everything = changed_words(BASE, (0, 1024))
    long = BEGIN + b"".join(struct.pack("<h", 4 * i) + words_of(everything, i, i + 1) for i in range(1024))
    for kernel in kernels.TABLE["delta"]:
        target = BASE.reshape(1, -1).copy()
        assert get_codec("delta", kernel=kernel).apply(long, target) == len(long) == 6 * 1025
        assert np.array_equal(target[0], everything)


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, taken out or put in, near a border as often as anywhere."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(0, 4))):
        if not mutated:
            break
        near = min(40, len(mutated)) if rng.random() < 0.5 else len(mutated)
        at = int(rng.integers(0, near))
        if rng.random() < 0.3:
            at = len(mutated) - 1 - at
        match int(rng.integers(0, 6)):
            case 0:
                mutated[at] = int(rng.integers(0, 256))
            case 1:
                del mutated[at : at + int(rng.integers(1, 8))]
            case 2:
                mutated[at:at] = rng.integers(0, 256, int(rng.integers(1, 8)), dtype=np.uint8).tobytes()
            case 3:
                mutated[at] ^= 1 << int(rng.integers(0, 8))
            case 4:
                del mutated[at:]
            case 5:
                mutated += (BEGIN, FULL, b"\x00", b"\x80", b"\x9c", b"\x02\x10\x00")[int(rng.integers(0, 6))]
    return bytes(mutated)


@pytest.mark.slow
@every_codec
def test_mutated_bytes_are_the_same_to_every_kernel(name: str) -> None:
    rng = np.random.default_rng(11)
    names = [what for what in edges() if "middle" in what or "byte" in what or "scattered" in what]
    old, new = stacked([edges()[what] for what in names])
    codecs = [get_codec(name, kernel=kernel) for kernel in kernels.TABLE[name]]
    blank = noise(41, 4)
    seen = set()
    for _ in range(700):
        n = int(rng.integers(1, 5))
        pick = rng.integers(0, len(new), n)
        data = mutate(rng, encoded(codecs[0], old[pick], new[pick]))
        index = rng.integers(0, 4, n)
        results = {}
        for codec in codecs:
            target = blank.copy()
            consumed = outcome(codec.apply, data, target, index=index)
            if isinstance(consumed, tuple):
                assert np.array_equal(target, blank), codec
            assert outcome(codec.check, data, n) == consumed, codec
            results[codec.kernel] = (consumed, target.tobytes())
        wrong = {kernel: result[0] for kernel, result in results.items() if result != results["oracle"]}
        assert not wrong, (wrong, results["oracle"][0], n, len(data), data[:64].hex())
        consumed = results["oracle"][0]
        seen.add(consumed[2] if isinstance(consumed, tuple) else "good")
    assert "good" in seen and len(seen) >= 4, seen


@every_codec
@given(st.binary(max_size=200), st.integers(0, 4))
@settings(max_examples=many(30, 150))
def test_garbage_is_the_same_to_every_kernel(name: str, data: bytes, n: int) -> None:
    results = {kernel: outcome(get_codec(name, kernel=kernel).check, data, n) for kernel in kernels.TABLE[name]}
    assert [kernel for kernel, result in results.items() if result != results["oracle"]] == []


def long_batch() -> tuple[Any, Any]:
    """Over 4 MiB of encoded pages: stretches of full, of dense and of sparse ones, so that whatever windows a kernel
    parses by, their borders fall within each."""
    old = noise(50, 1)[0]
    full = changed_bytes(old, (0, 4096))
    dense = scattered_words(old, 682, 1)
    sparse = changed_words(old, (7, 8))
    new = [full] * 300 + [sparse] * 3000 + [dense] * 100 + [old] * 2000 + [full, sparse] * 200 + [dense, full] * 40
    new += [sparse] * 4000 + [full] * 400 + [dense] * 40
    pages = np.stack(new)
    return np.broadcast_to(old, pages.shape).copy(), pages


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CODECS if name != "xbzrle-fold"])
def test_long_batches_cross_every_window(name: str) -> None:
    old, new = long_batch()
    codecs = [get_codec(name, kernel=kernel) for kernel in kernels.TABLE[name] if kernel != "oracle"]
    expected = encoded(codecs[0], old, new)
    assert len(expected) > 4 << 20
    for codec in codecs:
        assert encoded(codec, old, new) == expected, codec
        target = old.copy()
        assert codec.check(expected, len(new)) == codec.apply(expected, target) == len(expected), codec
        assert np.array_equal(target, new), codec
    rng = np.random.default_rng(12)
    for change in ("cut", "taken out", "changed"):
        at = int(rng.integers(len(expected) // 2, len(expected)))
        data = expected[:at]
        if change != "cut":
            data += (b"\x63" if change == "changed" else b"") + expected[at + 1 :]
        result = outcome(get_codec(name, kernel="oracle").check, data, len(new))
        for codec in codecs:
            target = old.copy()
            assert outcome(codec.apply, data, target) == result, codec
            if isinstance(result, tuple):
                assert np.array_equal(target, old), codec


def test_delta_records_that_fill_windows_exactly() -> None:
    """Borders of pages moved record by record over the border of a 1 MiB window."""
    codecs = {kernel: get_codec("delta", kernel=kernel) for kernel in kernels.TABLE["delta"]}
    window = 1 << 20
    body, sparse = FULL + FULL_BODY, BEGIN + struct.pack("<hI", 4, 9)
    for pages_in_front in (255, 254):
        front = body * pages_in_front
        fitting = (window - len(front)) // len(sparse)
        for shift in range(-2, 3):
            middle = sparse * max(fitting + shift, 0)
            for tail in (body, BEGIN, sparse + body, FULL + FULL_BODY[:100], BEGIN + b"\1"):
                data = front + middle + tail
                n = pages_in_front + max(fitting + shift, 0)
                for wanted in (n, n + 1, n + 2, n + 3):
                    results = {kernel: outcome(codec.check, data, wanted) for kernel, codec in codecs.items()}
                    assert len(set(results.values())) == 1, results


# A source that is being written


@every_kernel
def test_wire_and_reference_agree_while_the_source_changes(name: str, kernel: str) -> None:
    """Whatever instant a byte is read at: what was sent is what the reference holds afterwards."""
    codec = get_codec(name, kernel=kernel)
    n = 8 if kernel == "oracle" else 100
    source = noise(60, n)
    stop = threading.Event()
    words = source.view(np.uint64)

    def write() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            words[:, value % 512] = value
            words[value % n] ^= np.uint64(value)

    writer = threading.Thread(target=write)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    writer.start()
    try:
        reference = np.zeros_like(source)
        receiver = np.zeros_like(source)
        for _ in range(many(3, 8)):
            ours = codec.encode(source, reference)
            assert codec.apply(ours, receiver) == len(ours)
            assert np.array_equal(receiver, reference)
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)


def test_the_tables_here_cover_every_codec() -> None:
    assert {row[0] for row in MALFORMED} | {"xbzrle-fold"} == set(CODECS)
    assert {row[0] for row in by_hand()} == set(CODECS)
    assert PAGE_WORDS * 4 == PAGE_SIZE


@every_kernel
def test_what_has_been_checked_is_not_walked_again(name: str, kernel: str) -> None:
    codec = get_codec(name, kernel=kernel)
    old, new = stacked(list(edges().values()))
    index = np.arange(len(new))[::-1] + 3
    data = bytes(codec.encode(new, old.copy()))
    # Surplus behind the last page: a page more of the codec's own.
    longer = data + bytes(codec.encode(new[:1], old[:1].copy(), full=np.array([True])))
    target = np.zeros((len(new) + 5, PAGE_SIZE), dtype=np.uint8)
    target[index] = old
    size = codec.check(longer, len(new))
    assert size == len(data)
    assert codec.apply(longer, target, index=index, checked=size) == size
    assert (target[index] == new).all()
    with pytest.raises(ValueError):
        codec.apply(data, target, index=index, checked=len(data) + 1)


def test_what_a_stream_may_hold_has_a_page_buffer() -> None:
    """The wire and the codecs do not know each other; this is where their lists meet."""
    assert set(PAGE_BUFFER_PAGES) == set(STREAM_CODECS)
