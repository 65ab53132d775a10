"""Where the page gets its figures: from this process's backup or primary, or from backups elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from remus_ckpt.errors import RemusError
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.control import Requests, ask
from remus_ckpt.observe.log import recent
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.health import judge_primary
from remus_ckpt.service.primary import Primary
from remus_ckpt.store import History
from remus_ckpt.store.survey import Survey
from remus_ckpt.version import __version__

_ANSWER_S = 10.0
_FAILOVER_S = 90.0


class OfBackup:
    """The backup of this process."""

    label = ""

    def __init__(self, backup: Backup) -> None:
        self._backup = backup
        self.status = backup.status
        self.survey = backup.survey
        self.events = recent

    def where(self, name: str) -> str:
        """Of the store on this machine."""
        return f"store:{self._backup.directory / name}"

    def fail_over(self, name: str, fence: bool) -> dict[str, Any]:
        """Promote it."""
        return self._backup.failover(name, fence=fence)

    def close(self) -> None:
        """It is not ours."""


class OfPrimary:
    """The primary of this process.

    address: of its backup, for people
    open_history: its history on the backup
    """

    label = ""

    def __init__(self, primary: Primary, metrics: Metrics, address: str, open_history: Callable[[], History]) -> None:
        self._primary = primary
        self._metrics = metrics
        self._address = address
        self._open_history = open_history
        self.events = recent

    def status(self) -> dict[str, Any]:
        """The same keys as for a backup, as far as a primary knows them."""
        now, name = time.time(), self._primary.name
        status = self._primary.status()
        health = judge_primary(status, self._primary.ended, now).status()
        found = {
            "role": "primary",
            "health": health,
            "connected": status.get("connected"),
            "peer": self._address,
            "term": status["term"],
            "epoch": status["committed_epoch"],
            "position": status["committed_position"],
            "changed_by_part": self._metrics.changed_by_part(name),
            "primary": status,
        }
        for key in ("memory_bytes", "last_commit_at", "ratio", "raw_bytes", "encoded_bytes", "wire_bytes"):
            found[key] = status.get(key)
        return {"program": f"remus_ckpt {__version__}", "health": health, "names": {name: found}}

    def survey(self, name: str) -> Survey:
        """From the backup."""
        return self._open_history().survey()

    def where(self, name: str) -> str:
        """Of the store on the backup."""
        return f"{self._address}/{name}"

    def fail_over(self, name: str, fence: bool) -> dict[str, Any]:
        """Not from here: ask the backup."""
        raise RemusError("a primary's page cannot promote: use the backup's page")

    def close(self) -> None:
        """It is not ours."""


class OfAddress:
    """A backup elsewhere.

    address: for people
    dial: connects to it; raises RemusError
    open_history: the history of a name there
    """

    def __init__(self, address: str, dial: Callable[[], Connection], open_history: Callable[[str], History]) -> None:
        self.label = address
        self._dial = dial
        self._open_history = open_history
        self._requests: Requests | None = None  # of the thread that asks for the status

    def status(self) -> dict[str, Any]:
        """Over one connection, which is reopened if it breaks."""
        try:
            if self._requests is None:
                self._requests = Requests(self._dial(), "control", timeout_s=_ANSWER_S)
            self._requests.post("status", {}, _ANSWER_S)
            report = self._requests.answer(_ANSWER_S)
        except BaseException:
            self.close()
            raise
        if not isinstance(report.get("names"), dict) or not isinstance(report.get("health"), dict):
            raise RemusError(f"{self.label} sends no status")
        return report

    def survey(self, name: str) -> Survey:
        """Requested with the rights of a reader."""
        return self._open_history(name).survey()

    def where(self, name: str) -> str:
        """Of the store there."""
        return f"{self.label}/{name}"

    def events(self, name: str) -> list[list[Any]]:
        """Of the log there."""
        rows = ask(self._dial(), "events", {"name": name}, timeout_s=_ANSWER_S).get("events")
        if not isinstance(rows, list):
            raise RemusError(f"{self.label} sends no events")
        return [row for row in rows if isinstance(row, list) and list(map(type, row)) == [float, int, str]]

    def fail_over(self, name: str, fence: bool) -> dict[str, Any]:
        """Ask it to promote itself."""
        return ask(self._dial(), "failover", {"name": name, "fence": fence}, timeout_s=_FAILOVER_S)

    def close(self) -> None:
        """Hang up."""
        requests, self._requests = self._requests, None
        if requests is not None:
            with suppress(RemusError):
                requests.close()
