"""pandas DataFrames under protection: their columns in place, and DataFrames of them again."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest

from remus_ckpt.errors import Malformed, SourceError
from remus_ckpt.source.manifest import Manifest, arrays_of
from remus_ckpt.source.own_memory import OwnMemory

pd = pytest.importorskip("pandas", reason="no pandas")

ROWS = 6
INDEXES: dict[str, Any] = {
    "range": pd.RangeIndex(3, 3 + 2 * ROWS, 2, name="number"),
    "numbers": pd.Index([5, 3, 9, 9, 1, -2]),
    "texts": pd.Index(["ä", "", "c", "dd", "e", "f"], name="symbol"),
    "times": pd.date_range("2026-01-01", periods=ROWS, freq="h"),
    "zone": pd.date_range("2026-03-28 23:00", periods=ROWS, freq="h", tz="Europe/Berlin", name=4),
}


def frame(index: Any = INDEXES["texts"]) -> Any:
    return pd.DataFrame(
        {
            "price": np.arange(ROWS, dtype="<f8"),
            "size": np.arange(ROWS, dtype="<i4"),
            "is_open": [True, False] * 3,
            7: np.arange(ROWS) * 2.0,
            "at": pd.date_range("2026-01-01", periods=ROWS),
            "here": pd.date_range("2026-01-01", periods=ROWS, tz="America/New_York"),
            "took": pd.to_timedelta(range(ROWS), unit="s"),
            "wave": np.arange(ROWS) * 1j,
        }
    ).set_index(index)


def checkpoint(source: OwnMemory) -> Any:
    source.memory.check()
    return SimpleNamespace(epoch=0, memory=source.memory.sample(0, source.memory.pages), parts=source.parts())


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_a_frame_comes_back(index: Any) -> None:
    quotes = frame(index)
    quotes.columns.name = "fields"
    array = np.arange(5)
    source = OwnMemory({"quotes": quotes, "array": array}, device_state=lambda: b"mine")
    quotes.iloc[3, 0] = -1
    quotes.loc[:, "size"] += 1
    quotes.iloc[2, 4] = pd.Timestamp("1999-01-01")
    arrays, state = arrays_of(checkpoint(source))
    assert list(arrays) == ["array", "quotes"]
    pd.testing.assert_frame_equal(arrays["quotes"], quotes, check_freq=False)
    assert arrays["quotes"].iloc[3, 0] == -1
    assert state == b"mine"
    source.close()


def test_frames_without_rows_or_columns() -> None:
    for empty in (frame()[:0].copy(), frame()[[]].copy(), pd.DataFrame()):
        arrays, _ = arrays_of(checkpoint(OwnMemory({"empty": empty})))
        pd.testing.assert_frame_equal(arrays["empty"], empty, check_column_type=False, check_index_type=False)


def test_a_frame_of_a_later_checkpoint_is_not_the_first_one() -> None:
    quotes = frame()
    source = OwnMemory({"quotes": quotes})
    first, _ = arrays_of(checkpoint(source))
    quotes.iloc[:, 0] = 5.0
    second, _ = arrays_of(checkpoint(source))
    assert (first["quotes"]["price"] != 5).any()
    assert (second["quotes"]["price"] == 5).all()


def test_without_pandas_the_columns_are_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    quotes = frame()
    made = checkpoint(OwnMemory({"quotes": quotes}))
    monkeypatch.setattr("remus_ckpt.source.frames.has_pandas", lambda: False)
    monkeypatch.setattr("remus_ckpt.source.manifest.has_pandas", lambda: False)
    arrays, _ = arrays_of(made)
    assert list(arrays) == [*(f"quotes[{label!r}]" for label in quotes.columns), "quotes.index"]
    assert arrays["quotes['price']"].tolist() == quotes["price"].tolist()


def test_pandas_is_not_loaded_for_arrays() -> None:
    code = (
        "import sys, numpy\nfrom remus_ckpt.source.own_memory import OwnMemory\nOwnMemory({'a': numpy.zeros(3)})\n"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("texts", list("abcdef")),
        ("objects", [1, "a", None, 2, 3, 4]),
        ("kinds", pd.Categorical(list("aabbcc"))),
        ("nullable", pd.array([1, None, 3, 4, 5, 6], dtype="Int64")),
        ("periods", pd.period_range("2026-01-01", periods=ROWS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_column_that_is_not_plain_memory_is_refused_by_its_name(column: str, values: Any) -> None:
    with pytest.raises(TypeError, match=f"column '{column}' of 'quotes'"):
        OwnMemory({"quotes": pd.DataFrame({"price": np.zeros(ROWS), column: values})})


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: pd.DataFrame(np.zeros((5, 4))[:, ::2], columns=["a", "b"], copy=False), "'a'.*copy"),
        (lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns 'a'"),
        (lambda: pd.DataFrame({("a", 1): [1]}), "rename"),
        (lambda: frame().set_index(["price", "size"]), "reset_index"),
        (lambda: frame().set_index(pd.period_range("2026-01-01", periods=ROWS)), "reset_index"),
        (lambda: frame().set_index(pd.Index(["a", "b", None, "c", "d", "e"])), "reset_index"),
        (lambda: pd.DataFrame(locked(np.zeros((1, 5))).T, copy=False), "read-only.*copy"),
    ],
)
def test_a_frame_that_would_not_come_back_is_refused(made: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        OwnMemory({"quotes": made()})


def locked(array: Any) -> Any:
    array.flags.writeable = False
    return array


def test_a_frame_and_the_array_that_it_shows_overlap() -> None:
    values = np.zeros(ROWS)
    shown = pd.DataFrame({"a": values}, copy=False)
    with pytest.raises(ValueError, match="overlap"):
        OwnMemory({"values": values, "shown": shown})


def test_names_of_columns_and_buffers_are_apart() -> None:
    with pytest.raises(ValueError, match="two buffers"):
        OwnMemory({"q": pd.DataFrame({"a": [1]}), "q['a']": np.zeros(3)})


def rebind(quotes: Any) -> None:
    quotes["price"] = quotes["price"] * 2


def retype(quotes: Any) -> None:
    quotes["price"] = "text"


def add(quotes: Any) -> None:
    quotes["new"] = 1


def grow(quotes: Any) -> None:
    quotes.loc["new"] = quotes.iloc[0]


def rename(quotes: Any) -> None:
    quotes.columns = [f"new {label}" for label in quotes.columns]


def reindex(quotes: Any) -> None:
    quotes.index = range(ROWS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [rebind, retype, add, grow, rename, reindex])
def test_memory_that_is_no_longer_the_frames_is_found(change: Any) -> None:
    quotes = pd.DataFrame({"price": np.zeros(ROWS), "size": np.zeros(ROWS)}, index=list("abcdef"))
    source = OwnMemory({"quotes": quotes})
    quotes.loc["a", "price"] = 1.0
    quotes.loc[:, "price"] += 1
    quotes.iloc[:, 1] = 3.0
    source.memory.check()
    change(quotes)
    with pytest.raises(SourceError, match="'quotes'"):
        source.memory.check()


def test_a_write_that_pandas_copies_is_found() -> None:
    """Copy-on-write: the column that another object shows is copied when it is written to."""
    quotes = frame()
    source = OwnMemory({"quotes": quotes})
    shown = quotes["price"]
    source.memory.check()
    quotes.iloc[0, 0] = 99.0
    if shown.iloc[0] == 99.0:
        pytest.skip("this pandas does not copy on write")
    with pytest.raises(SourceError, match="'price' of 'quotes'"):
        source.memory.check()


# Into existing ones


def test_values_go_back_into_a_frame() -> None:
    quotes = frame(INDEXES["zone"])
    want = quotes.copy()
    source = OwnMemory({"quotes": quotes})
    made = checkpoint(source)
    quotes.iloc[:, 0] = 9.0
    quotes.iloc[1, 5] = pd.Timestamp("1999-01-01", tz="America/New_York")
    result, _ = arrays_of(made, {"quotes": quotes})
    assert result["quotes"] is quotes
    pd.testing.assert_frame_equal(quotes, want)
    source.memory.check()  # still the memory that is protected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda quotes: quotes.rename(columns={"price": "cost"}), "columns"),
        (lambda quotes: quotes[[*quotes.columns[1:], quotes.columns[0]]], "columns"),
        (lambda quotes: quotes[1:], "index"),
        (lambda quotes: quotes.reset_index(drop=True), "index"),
        (lambda quotes: quotes.astype({"size": "i8"}), "'size'.*int64.*int32"),
        (lambda quotes: quotes.assign(here=quotes["here"].dt.tz_convert("UTC")), "'here'.*UTC.*New_York"),
        (lambda quotes: quotes["price"].to_numpy(), "DataFrame"),
    ],
)
def test_a_frame_that_does_not_fit_stays_as_it_was(change: Any, words: str) -> None:
    quotes = frame()
    made = checkpoint(OwnMemory({"quotes": quotes, "array": np.zeros(5)}))
    target = change(frame())
    before = target.copy()
    array = np.ones(5)
    with pytest.raises(ValueError, match=words):
        arrays_of(made, {"quotes": target, "array": array})
    assert (array == 1).all()
    assert before.equals(target) if hasattr(before, "equals") else (before == target).all()


def test_a_frame_that_shares_memory_with_another_target_stays_as_it_was() -> None:
    made = checkpoint(OwnMemory({"quotes": pd.DataFrame({"a": np.zeros(3)}), "array": np.ones(3)}))
    array = np.full(3, 5.0)
    shown = pd.DataFrame({"a": array}, copy=False)
    with pytest.raises(ValueError, match="share memory"):
        arrays_of(made, {"quotes": shown, "array": array})
    assert (array == 5).all()


# Bytes from anywhere


def packed(**changes: Any) -> bytes:
    """The map of a good frame, one of whose keys is changed."""
    source = OwnMemory(
        {"q": pd.DataFrame({"a": np.zeros(3), "b": pd.date_range("2026", periods=3, tz="UTC")}), "x": bytearray(3)}
    )
    body = source.parts().manifest
    assert body is not None
    fields = msgpack.unpackb(body)
    (row,) = fields["frames"]
    for path, value in changes.items():
        at: Any = row
        *way, last = path.split("__")
        for key in way:
            at = at[int(key) if key.isdigit() else key]
        at[int(last) if last.isdigit() else last] = value
    return bytes(msgpack.packb(fields))


def test_the_frame_that_the_table_breaks_is_good() -> None:
    manifest = Manifest.unpack(packed(), pages=9)
    assert [frame.name for frame in manifest.frames] == ["q"]
    assert Manifest.unpack(manifest.pack(), pages=9) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5},
        {"name": ""},
        {"name": "x"},
        {"columns": 5},
        {"columns__0": 5},
        {"columns__0__label": 1.5},
        {"columns__0__label": None},
        {"columns__0__label": "b"},
        {"columns__0__buffer": "nowhere"},
        {"columns__0__buffer": "x"},
        {"columns__0__buffer": "q['b']"},
        {"columns__0__zone": "UTC"},
        {"columns__1__zone": "Mars/Olympus"},
        {"columns__1__zone": "../../etc/passwd"},
        {"columns__1__zone": "dateutil//etc/passwd"},
        {"columns__1__zone": 5},
        {"columns_name": [1]},
        {"index": 5},
        {"index": {}},
        {"index__step": 0},
        {"index__stop": 4},
        {"index__stop": 2**63},
        {"index__start": "0"},
        {"index__name": 1.5},
        {"index": {"buffer": "nowhere", "zone": None}},
        {"index": {"buffer": "q['a']", "zone": None}},
    ],
    ids=str,
)
def test_frames_are_held_against_their_rules(changes: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as caught:
        Manifest.unpack(packed(**changes), pages=9)
    assert caught.value.section in {f"manifest.md §{number}" for number in (2, 3, 5)}


@pytest.mark.parametrize("value", [5, {}, [5], [[]]])
def test_frames_that_are_none(value: Any) -> None:
    fields = msgpack.unpackb(packed())
    fields["frames"] = value
    with pytest.raises(Malformed):
        Manifest.unpack(msgpack.packb(fields), pages=9)
