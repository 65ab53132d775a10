"""What the page shows: it looks at each source once a second, and keeps the figures of the last minutes.

All figures come from a source's status, the same one that `remus-ckpt status --json` prints.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from remus_ckpt.errors import RemusError
from remus_ckpt.observe.log import log
from remus_ckpt.pages import PARTS
from remus_ckpt.service.health import Health
from remus_ckpt.store.survey import Survey

EVERY_S = 1.0
KEPT = 300
"""Looks: five minutes."""
FIGURES = (
    "pause_ms", "pause_p99_ms", "dirty_pages", "ratio", "commit_ms", "commit_p99_ms", "lag", "wire_bytes_s"
)  # fmt: skip
"""For each name at each look. `ratio` and `wire_bytes_s` cover the time since the look before."""
_LISTED = ("commit_ms", "wire_bytes_s")
"""What the list of names draws."""
_CHANGES = 50
_ROWS = 1_000
_LARGEST = 1e30
"""A primary may report any number, and float32 holds no larger one."""


class Watched(Protocol):
    """Something with names to show. Any thread may call it, except that one thread at a time calls `status`."""

    label: str
    """Where it is, for people; empty for this process."""

    def status(self) -> dict[str, Any]:
        """As `remus-ckpt status --json` prints it. Raises RemusError."""

    def survey(self, name: str) -> Survey:
        """What is kept of a name. Raises RemusError."""

    def where(self, name: str) -> str:
        """The history of a name, as `remus-ckpt restore` takes it."""

    def events(self, name: str) -> list[list[Any]]:
        """Of the log, oldest first: [Unix time, level of `logging`, text]. Raises RemusError."""

    def fail_over(self, name: str, fence: bool) -> dict[str, Any]:
        """Promote the backup of a name. Raises RemusError."""

    def close(self) -> None:
        """Called once nobody needs it."""


class _Past:
    """The last minutes of one name."""

    def __init__(self) -> None:
        self.figures = np.full((len(FIGURES), KEPT), np.nan, dtype=np.float32)
        self.heat = np.zeros((KEPT, PARTS), dtype=np.uint8)
        self.looks = 0
        self.health = ""
        self.changes: deque[dict[str, Any]] = deque(maxlen=_CHANGES)
        self._before: tuple[float, Mapping[str, Any]] | None = None

    def add(self, found: Mapping[str, Any] | None, now: float) -> list[float | None]:
        """Add a look, which may have found nothing; returns its figures."""
        at = self.looks % KEPT
        self.looks += 1
        self.figures[:, at] = np.nan
        self.heat[at] = 0
        if found is None:
            return [None] * len(FIGURES)
        seconds, before = (now - self._before[0], self._before[1]) if self._before else (0.0, {})
        self._before = now, found
        figures = _figures(found, before, seconds)
        self.figures[:, at] = [math.nan if value is None else value for value in figures]
        self.heat[at] = _heat(found.get("changed_by_part"), before.get("changed_by_part"))
        return figures

    def note(self, health: Mapping[str, Any], now: float) -> None:
        """Remember that the state has changed."""
        if health["state"] != self.health:
            if self.health:
                text = f"{self.health} → {health['words']}"
                self.changes.append({"at": now, "level": health["level"], "text": text})
            self.health = health["state"]

    def rows(self, columns: Sequence[str]) -> list[list[float | None]]:
        """The figures in these columns, oldest first."""
        return [[_short(value) for value in self._in_order(self.figures[FIGURES.index(one)])] for one in columns]

    def heat_text(self) -> str:
        """uint8[looks, PARTS] in base64, oldest first."""
        return base64.b64encode(self._in_order(self.heat).tobytes()).decode()

    def _in_order(self, ring: Any) -> Any:
        count, at = min(self.looks, KEPT), self.looks % KEPT
        return ring[:count] if count < KEPT else np.concatenate([ring[at:], ring[:at]])


def _figures(found: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> list[float | None]:
    primary = found.get("primary") or {}
    commit = primary.get("commit_latency_ms") or found.get("commit_latency_ms")
    raw, encoded, wire = (_grown(found, before, key) for key in ("raw_bytes", "encoded_bytes", "wire_bytes"))
    return [
        _part(primary.get("pause_ms"), "p50"),
        _part(primary.get("pause_ms"), "p99"),
        _number(primary.get("dirty_pages")),
        encoded / raw if raw and encoded is not None else None,
        _part(commit, "p50"),
        _part(commit, "p99"),
        _number(primary.get("lag_checkpoints")),
        wire / seconds if wire is not None and seconds > 0 else None,
    ]


def _grown(found: Mapping[str, Any], before: Mapping[str, Any], key: str) -> float | None:
    """By how much a total has grown; None if there was none before, or if it restarted."""
    now, then = _number(found.get(key)), _number(before.get(key))
    return None if now is None or then is None or now < then else now - then


def _heat(now: Any, then: Any) -> Any:
    """uint8[PARTS]: pages changed since the look before, each in sixteenths of a doubling: 16 · log2(1 + pages)."""
    try:
        grown = np.asarray(now, dtype=np.float64) - np.asarray(then, dtype=np.float64)
    except (TypeError, ValueError):
        return 0
    if grown.shape != (PARTS,):
        return 0
    return np.minimum(np.round(16 * np.log2(1 + np.maximum(np.nan_to_num(grown), 0))), 255).astype(np.uint8)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    return float(value) if is_number else None


def _part(times: Any, key: str) -> float | None:
    return _number(times.get(key)) if isinstance(times, dict) else None


def _short(value: Any) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


class Board:
    """Looks at sources until it is closed, each in its own thread: one that hangs holds up no other.

    sources: what to look at
    """

    def __init__(self, sources: Sequence[Watched], *, every_s: float = EVERY_S) -> None:
        self.sources = sources
        self.every_s = every_s
        self._over = threading.Event()
        self._changed = threading.Condition()  # guards all that follows
        self._looks = [0] * len(sources)
        self._messages: list[bytes] = [b""] * len(sources)
        self._pasts: list[dict[str, _Past]] = [{} for _ in sources]
        self._threads = [
            threading.Thread(target=self._watch, args=(number,), name="dashboard", daemon=True)
            for number in range(len(sources))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop looking. A look that hangs is abandoned."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(self.every_s)
        for source in self.sources:
            source.close()

    @property
    def is_over(self) -> bool:
        """Whether it has been closed."""
        return self._over.is_set()

    def _watch(self, number: int) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self.look(number)
            except Exception as error:  # one look that fails must not end all later ones
                log("dashboard failed", level=logging.ERROR, error=error)
            self._over.wait(max(began + self.every_s - time.monotonic(), 0.1))

    def look(self, number: int) -> None:
        source = self.sources[number]
        report: dict[str, Any] | None = None
        try:
            report = source.status()
            health = report["health"]
        except RemusError as error:
            health = Health("unreachable", f"unreachable: {error}").status()
        now, at = time.monotonic(), time.time()
        with self._changed:
            pasts = self._pasts[number]
            figures = {}
            if report is not None:
                names = report["names"]
                pasts = self._pasts[number] = {name: pasts.get(name) or _Past() for name in names}
                for name, past in pasts.items():
                    figures[name] = past.add(names[name], now)
                    past.note(names[name]["health"], at)
            else:
                for past in pasts.values():
                    past.add(None, now)
                    past.note(health, at)
            message = {"source": number, "label": source.label, "at": at, "health": health, "report": report}
            self._messages[number] = to_json(message | {"figures": figures or None})
            self._looks[number] += 1
            self._changed.notify_all()

    def wait(self, seen: list[int], timeout_s: float) -> list[bytes]:
        """The last look at each source that is newer than those seen, as JSON; none if none comes in time.

        seen: how many looks of each source have been seen; changed here
        """
        with self._changed:
            self._changed.wait_for(lambda: seen != self._looks or self.is_over, timeout_s)
            found = [self._messages[number] for number, looks in enumerate(self._looks) if looks != seen[number]]
            seen[:] = self._looks
            return found

    def past(self, source: int, name: str) -> dict[str, Any]:
        """The last minutes of one name: the figures in the order of FIGURES, and the heat map. {} if it is unknown."""
        with self._changed:
            past = self._pasts[source].get(name) if 0 <= source < len(self._pasts) else None
            return {} if past is None else {"figures": past.rows(FIGURES), "heat": past.heat_text()}

    def listed(self) -> dict[str, Any]:
        """The last minutes of all names, as far as the list of names draws them, by "source/name"."""
        with self._changed:
            return {
                "names": {
                    f"{number}/{name}": dict(zip(_LISTED, past.rows(_LISTED), strict=True))
                    for number, pasts in enumerate(self._pasts)
                    for name, past in pasts.items()
                }
            }

    def detail(self, source: int, name: str) -> dict[str, Any]:
        """What can be restored of a name, and what has happened to it, newest first."""
        if not 0 <= source < len(self.sources):
            return {"error": f"there is no source {source}"}
        watched = self.sources[source]
        with self._changed:
            past = self._pasts[source].get(name)
            events = [] if past is None else list(past.changes)
        if past is None:
            return {"error": f"nothing is known of {name!r}"}
        try:
            for at, level, text in watched.events(name):
                shown = 2 if level >= logging.ERROR else 1 if level >= logging.WARNING else None
                events.append({"at": at, "level": shown, "text": text})
        except RemusError as error:
            events.append({"at": time.time(), "level": 1, "text": f"the log cannot be read: {error}"})
        events.sort(key=lambda event: -event["at"])
        return {"history": _history(watched, name), "events": events}


def _history(watched: Watched, name: str) -> dict[str, Any]:
    """kept: [first epoch, last epoch, Unix time of the first, of the last] of each segment, oldest first
    lost: [first epoch, last epoch, reason]; the epochs are None where they are unknown
    """
    try:
        survey = watched.survey(name)
    except RemusError as error:
        return {"error": str(error)}
    kept = [
        [one.first.epoch, one.last.epoch, _seconds(one.first.time_ns), _seconds(one.last.time_ns)]
        for one in survey.contents[-_ROWS:]
        if one.first is not None and one.last is not None
    ]
    lost = [
        [one.epochs[0] if one.epochs else None, one.epochs[-1] if one.epochs else None, one.reason]
        for one in survey.lost[-_ROWS:]
    ]
    return {"where": watched.where(name), "kept": kept, "lost": lost}


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / 1e9


def to_json(value: Any) -> bytes:
    """As JSON that every browser reads. A primary may have reported anything, such as a NaN."""
    try:
        return json.dumps(value, allow_nan=False, default=str, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(_finite(value), default=str, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
