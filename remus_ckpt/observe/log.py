"""Logs one line per event, as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

_logger = logging.getLogger("remus_ckpt")
# A program that has not configured logging must not find our records on its standard error.
_logger.addHandler(logging.NullHandler())
_MOST_TOLD = 16
_kept: deque[tuple[str, float, int, str]] = deque(maxlen=500)
"""The newest records that concern a name: (name, Unix time, level, text)."""
_RECENT_CHARS = 300
_DIGITS = re.compile(r"\d[\d.,]*")
_PLAIN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "fields"}
"""The attributes that every record has; any other was passed as `extra`."""


def log(event: str, /, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event.

    event: a few constant words, so that logs can be searched for them
    error: logged with its traceback
    fields: the details, such as name="orders", epoch=17
    """
    _logger.log(level, event, extra={"fields": fields}, exc_info=error)


def configure_logs(
    format: LogFormat = "text", level: int | str = logging.INFO, stream: TextIO | None = None
) -> logging.Handler:
    """Write log records to standard error, one line each; replaces the previous configuration.

    format: "text" for people and the journal, "json" for machines: time, level, event, and the fields
    level: the lowest level to write, such as "info"
    stream: where to write instead of standard error
    Returns the handler. A program that uses this package as a library configures its own logging instead.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    for old in _logger.handlers[:]:
        _logger.removeHandler(old)
        old.close()
    _logger.addHandler(handler)
    _logger.addHandler(_Recent())
    _logger.setLevel(level.upper() if isinstance(level, str) else level)
    _logger.propagate = False
    return handler


def _as_plain(value: Any) -> Any:
    if getattr(value, "shape", None) == ():  # a numpy scalar; numpy need not be loaded here
        return value.item()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


class _Json(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.parts(record), default=_as_plain)

    def parts(self, record: logging.LogRecord) -> dict[str, Any]:
        """The record as time, level and event, then the fields."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields = dict(getattr(record, "fields", {}))
        fields |= {key: value for key, value in record.__dict__.items() if key not in _PLAIN_ATTRIBUTES}
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        for key, value in fields.items():
            parts[f"{key}_" if key in parts else key] = value
        return parts


class _Text(_Json):
    """time LEVEL event key=value …; a value with spaces or newlines is quoted, so that each record is one line."""

    def format(self, record: logging.LogRecord) -> str:
        parts = self.parts(record)
        front = f"{parts.pop('time')} {parts.pop('level'):7} {on_one_line(parts.pop('event'))}"
        return " ".join([front, *(f"{key}={self.value(value)}" for key, value in parts.items())])

    @staticmethod
    def value(value: Any) -> str:
        """A value, on one line."""
        if isinstance(value, float):
            return f"{value:.6g}"
        text = json.dumps(value, default=_as_plain, ensure_ascii=False)
        bare = text[1:-1]
        is_bare = text.startswith('"') and bare and bare.isprintable() and not set(bare) & set(' "\\=')
        return bare if is_bare else on_one_line(text)


class _Recent(logging.Handler):
    """Keeps the newest records that concern a name."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = dict(getattr(record, "fields", {}))
        if isinstance(name := fields.pop("name", None), str):
            said = (f"{key} {_Text.value(value)}" for key, value in fields.items() if value is not None)
            text = ": ".join(filter(None, (record.getMessage(), ", ".join(said))))
            _kept.append((name, record.created, record.levelno, on_one_line(text)[:_RECENT_CHARS]))


def recent(name: str) -> list[list[Any]]:
    """The newest records that concern a name, oldest first: [Unix time, level, text]. `configure_logs` begins them."""
    return [[at, level, text] for of, at, level, text in list(_kept) if of == name]


class News:
    """Which reasons deserve a line when every try gives one. For one thread at a time."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, reason: str) -> bool:
        """Whether it has not been logged since `clear`; different numbers do not make a reason new."""
        text = _DIGITS.sub("", reason)
        if text in self._told:
            return False
        if len(self._told) >= _MOST_TOLD:
            self._told.clear()
        self._told.add(text)
        return True

    def clear(self) -> None:
        """All is well again: whatever fails next is new."""
        self._told.clear()


def on_one_line(text: str) -> str:
    """A text with newlines and control characters escaped, so that a peer's words cannot drive a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
