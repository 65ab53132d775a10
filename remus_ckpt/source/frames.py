"""pandas DataFrames: their columns as buffers, and back (specs/manifest.md §5).

Values, labels and order of the columns, the index, and the names of both are kept; the frequency of a time index and
`attrs` are not. pandas is imported only when a DataFrame is given or made.
"""

from __future__ import annotations

import importlib.util
import sys
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import SourceError
from remus_ckpt.source.dtypes import field, is_size, malformed

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS, _TIMES, _TEXTS = "biufc", "mM", "U"
"""Kinds of dtypes. Columns have numbers and times; an index may also have strings."""
_UNITS = frozenset({"s", "ms", "us", "ns"})
"""The units in which pandas counts time."""
_MAX_INT = (1 << 63) - 1

Label = str | int


@dataclass(frozen=True, slots=True)
class Column:
    """One column, or the index. zone: of times with a time zone; the buffer has them in UTC"""

    label: Label | None
    buffer: str
    zone: str | None


@dataclass(frozen=True, slots=True)
class Frame:
    """How a DataFrame consists of buffers.

    columns: in their order
    columns_name: of the columns together
    index: a buffer, or the numbers of a RangeIndex
    index_name: of the index
    """

    name: str
    columns: tuple[Column, ...]
    columns_name: Label | None
    index: range | Column
    index_name: Label | None

    @property
    def parts(self) -> tuple[Column, ...]:
        """The columns, and the index if it is a buffer."""
        return (*self.columns, self.index) if isinstance(self.index, Column) else self.columns

    def form(self) -> dict[str, Any]:
        """As the manifest writes it."""
        index: dict[str, Any]
        if isinstance(self.index, Column):
            index = {"buffer": self.index.buffer, "zone": self.index.zone}
        else:
            index = {"start": self.index.start, "stop": self.index.stop, "step": self.index.step}
        return {
            "name": self.name,
            "columns": [{"label": one.label, "buffer": one.buffer, "zone": one.zone} for one in self.columns],
            "columns_name": self.columns_name,
            "index": index | {"name": self.index_name},
        }


def read_frames(rows: object, buffers: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> tuple[Frame, ...]:
    """The frames of a manifest that is not trusted. buffers: dtype and shape of each array in it. Raises Malformed."""
    if not isinstance(rows, list):
        raise malformed("frames are not a list", "§5")
    left = dict(buffers)
    frames = []
    for row in rows:
        if not isinstance(row, dict):
            raise malformed("a frame is not a map", "§5")
        columns = [_column(one, left) for one in field(row, "columns", list)]
        labels = [one.label for one in columns]
        if None in labels or len(set(labels)) < len(labels):
            raise malformed("columns without labels, or with the same", "§5")
        index = _index(field(row, "index", dict), left)
        frame = Frame(
            field(row, "name", str), tuple(columns), _label(row, "columns_name"), index, _label(row["index"], "name")
        )
        rows_of_index = buffers[index.buffer][1][0] if isinstance(index, Column) else len(index)
        if any(buffers[one.buffer][1] != (rows_of_index,) for one in columns):
            raise malformed(f"columns of {frame.name!r} that are not as long as its index", "§5")
        frames.append(frame)
    return tuple(frames)


def _column(row: object, left: dict[str, tuple[np.dtype[Any], tuple[int, ...]]], texts: str = "") -> Column:
    """A column; its buffer is taken from those that are left."""
    if not isinstance(row, dict):
        raise malformed("a column is not a map", "§5")
    column = Column(_label(row, "label"), field(row, "buffer", str), row.get("zone"))
    dtype, shape = left.pop(column.buffer, (None, ()))
    if dtype is None or len(shape) != 1 or not _is_kept(dtype, texts):
        raise malformed(f"{column.buffer!r:.80} is not a buffer for a column", "§5")
    if column.zone is not None and (dtype.kind != "M" or not isinstance(column.zone, str) or not _is_zone(column.zone)):
        raise malformed(f"{column.zone!r:.80} is not a known time zone", "§5")
    return column


def _index(row: dict[Any, Any], left: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> range | Column:
    if "buffer" in row:
        return _column({**row, "label": None}, left, _TEXTS)
    start, stop, step = (field(row, key, int) for key in ("start", "stop", "step"))
    if not step or max(map(abs, (start, stop, step))) > _MAX_INT or not is_size(abs(stop - start)):
        raise malformed("a range that is none", "§5")
    return range(start, stop, step)


def _label(row: Mapping[Any, Any], key: str) -> Label | None:
    label = row.get(key)
    if label is None or _is_label(label):
        return label
    raise malformed(f"{label!r:.80} is not a label", "§5")


def _is_label(label: object) -> bool:
    return isinstance(label, str) or (type(label) is int and abs(label) <= _MAX_INT)


def _is_kept(dtype: np.dtype[Any], texts: str = "") -> bool:
    if dtype.kind in _TIMES:
        return np.datetime_data(dtype)[0] in _UNITS and np.datetime_data(dtype)[1] == 1
    return dtype.kind in _NUMBERS + texts


def _is_zone(text: str) -> bool:
    """Whether this names a time zone. `zoneinfo` refuses names that lead out of its directories."""
    with suppress(KeyError, ValueError, OSError):
        zoneinfo.ZoneInfo(text)
        return True
    return False


# DataFrames


def has_pandas() -> bool:
    """Whether pandas is installed."""
    return importlib.util.find_spec("pandas") is not None


def is_frame(value: object) -> bool:
    """Whether this is a DataFrame."""
    pandas = sys.modules.get("pandas")  # whoever has one has loaded it
    return pandas is not None and isinstance(value, getattr(pandas, "DataFrame", ()))


class LiveFrame:
    """A DataFrame of this process: the memory of its columns.

    frame: how it is made up
    arrays: each buffer, by its name; a column in place, the index as a copy
    Raises TypeError or ValueError for a frame that cannot be protected, with the column.
    """

    def __init__(self, name: str, frame: pd.DataFrame) -> None:
        self._name = name
        self._frame = frame
        self.arrays: dict[str, NDArray[Any]] = {}
        columns = []
        for label, series in frame.items():
            if (found := _in_place(series)) is None:
                raise TypeError(_not_kept(name, label, series.dtype))
            values, zone = found
            if not _is_label(label):
                raise TypeError(f"{name!r} has a column {label!r}, which is neither a string nor a number: rename it")
            column = Column(label, f"{name}[{label!r}]", zone)
            if column.buffer in self.arrays:
                raise ValueError(f"{name!r} has two columns {label!r}: rename one")
            if not values.flags.writeable:
                raise ValueError(f"column {label!r} of {name!r} is read-only: use a copy (frame = frame.copy())")
            if not values.flags.contiguous:
                raise ValueError(f"column {label!r} of {name!r} is not contiguous: use a copy (frame = frame.copy())")
            self.arrays[column.buffer] = values
            columns.append(column)
        index: range | Column
        numbers, index_zone = _index_of(name, frame.index)
        if isinstance(numbers, range):
            index = numbers
        else:
            index = Column(None, f"{name}.index", index_zone)
            self.arrays[index.buffer] = numbers
        for owner in (frame.columns, frame.index):
            if owner.name is not None and not _is_label(owner.name):
                raise TypeError(f"{name!r}: the name {owner.name!r} is neither a string nor a number: rename it")
        self.frame = Frame(name, tuple(columns), frame.columns.name, index, frame.index.name)
        self._labels, self._index = frame.columns, frame.index
        self._places = [_place(self.arrays[column.buffer]) for column in columns]
        # Columns of which pandas gives copies would lie elsewhere each time.
        self.check()

    def check(self) -> None:
        """Raise SourceError if the frame no longer uses this memory."""
        frame = self._frame
        if not frame.columns.is_(self._labels) or not frame.index.is_(self._index):
            raise SourceError(
                f"the DataFrame {self._name!r} has other columns or another index than when its protection began: "
                "protect it again"
            )
        for (label, series), place in zip(frame.items(), self._places, strict=True):
            if (found := _in_place(series)) is None or _place(found[0]) != place:
                raise SourceError(
                    f"column {label!r} of {self._name!r} is in other memory than when its protection began: it "
                    "was replaced, or pandas copied it on a write because another object shared it. Write in "
                    f"place, as frame.loc[:, {label!r}] = …, keep no frame[{label!r}] or slice, and protect it "
                    "again"
                )


def _not_kept(name: str, label: object, dtype: object) -> str:
    return (
        f"column {label!r} of {name!r} is {dtype}, which cannot be protected: leave it out "
        f"(frame.drop(columns={label!r})), or make it numbers, bool, or times in UTC or a named zone (frame.astype)"
    )


def _place(values: NDArray[Any]) -> tuple[Any, ...]:
    return values.__array_interface__["data"][0], values.dtype, values.strides


def _in_place(column: pd.Series | pd.Index) -> tuple[NDArray[Any], str | None] | None:
    """The values of a column or an index, and their time zone; None if they are not numbers or times."""
    dtype: Any = column.dtype
    if isinstance(dtype, np.dtype):
        return (np.asarray(column.array), None) if _is_kept(dtype) else None
    zone = getattr(dtype, "tz", None)
    if zone is None or not _is_zone(str(zone)):
        return None
    return np.asarray(column.array, dtype=f"M8[{dtype.unit}]"), str(zone)


def _index_of(name: str, index: pd.Index) -> tuple[range | NDArray[Any], str | None]:
    """The numbers of a range, or a copy of the values, and their time zone. Raises TypeError."""
    import pandas as pd

    if isinstance(index, pd.RangeIndex):
        return range(index.start, index.stop, index.step), None
    if not isinstance(index, pd.MultiIndex):
        if (found := _in_place(index)) is not None:
            return found[0].copy(), found[1]
        texts = index.tolist()
        if all(isinstance(text, str) for text in texts) and (values := np.array(texts, dtype=str)).tolist() == texts:
            return values, None
    raise TypeError(
        f"the index of {name!r} is a {type(index).__name__} of {index.dtype}, which cannot be stored: turn it "
        "into columns (frame.reset_index())"
    )


def join(frame: Frame, arrays: Mapping[str, NDArray[Any]]) -> pd.DataFrame:
    """A DataFrame made of its buffers, with its own memory. Raises Malformed."""
    import pandas as pd

    try:
        columns = {number: _values(one, arrays) for number, one in enumerate(frame.columns)}
        made = pd.DataFrame(columns, index=_index_again(frame, arrays))
        made.columns = pd.Index([one.label for one in frame.columns], name=frame.columns_name)
    except (ValueError, TypeError, OverflowError) as error:
        raise malformed(f"pandas does not take {frame.name!r:.80}: {error}", "§5") from None
    return made


def _values(column: Column, arrays: Mapping[str, NDArray[Any]]) -> Any:
    import pandas as pd

    values = arrays[column.buffer]
    if column.zone is None:
        return values
    return pd.DatetimeIndex(values).tz_localize("UTC").tz_convert(column.zone).array


def _index_again(frame: Frame, arrays: Mapping[str, NDArray[Any]]) -> pd.Index:
    import pandas as pd

    if isinstance(frame.index, range):
        index = frame.index
        return pd.RangeIndex(index.start, index.stop, index.step, name=frame.index_name)
    values = _values(frame.index, arrays)
    return pd.Index(values.tolist() if values.dtype.kind == "U" else values, name=frame.index_name)


def faults(frame: Frame, arrays: Mapping[str, NDArray[Any]], target: pd.DataFrame) -> Iterator[str]:
    """Why the values of a frame do not fit another one."""
    name = frame.name
    labels: Sequence[Any] = [one.label for one in frame.columns]
    if list(target.columns) != labels:
        yield f"{name!r} has columns {list(target.columns)!r:.200}, and {labels!r:.200} in the checkpoint"
        return
    if not target.index.equals(_index_again(frame, arrays)):
        yield f"{name!r} has another index than in the checkpoint: let arrays() make a new DataFrame"
    for column, (_, series) in zip(frame.columns, target.items(), strict=True):
        found = _in_place(series)
        want = arrays[column.buffer].dtype
        if found is None or (found[0].dtype, found[1]) != (want, column.zone):
            zone = f" in {column.zone}" if column.zone else ""
            yield f"column {column.label!r} of {name!r} is {series.dtype}, and {want}{zone} in the checkpoint"
        elif not found[0].flags.writeable:
            yield f"column {column.label!r} of {name!r} is read-only"


def places(name: str, target: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Where the columns of a frame are, by their buffers' names."""
    found = ((f"{name}[{label!r}]", _in_place(series)) for label, series in target.items())
    return {buffer: one[0] for buffer, one in found if one is not None}


def values_of(frame: Frame, arrays: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The values of each column, for `put`. Raises ValueError for values that pandas does not accept."""
    return [_values(column, arrays) for column in frame.columns]


def put(values: Sequence[Any], target: pd.DataFrame) -> None:
    """Set the values of a frame that has no `faults`, the way pandas does: objects that share its memory keep their
    values."""
    for number, column in enumerate(values):
        target.iloc[:, number] = column
