"""How long a primary waits before it asks its backup again. No clock."""

from __future__ import annotations

import logging
import math

from remus_ckpt.observe.log import News

_LASTING = frozenset({"version", "name", "forbidden", "fenced"})
"""Refusals that another try would not change."""
STRANGER = "stranger"
"""Stands for a code where the other side's first bytes are not those of the session protocol."""
_DOUBTFUL = frozenset({"limit", STRANGER})
"""One changed bit can look like these: a length in the stream is used before the digest behind it has come, and nothing
covers the preface. Another try would not change them if they come twice in a row."""
FIRST_S = 0.1
FIRST_AFTER_STORE_S = 1.0
"""After a refusal because of the store: a disk takes longer to mend than a link, and a full copy may follow."""
LONGEST_S = 5.0
"""The longest wait: a backup that can store again is noticed within this time."""


class Backoff:
    """The wait before the next link: each is twice the one before; none after a link that carried a commit.

    seconds: the wait that is due now
    news: tells which reasons for a wait are new since the last commit
    """

    def __init__(self) -> None:
        self.news = News()
        self.seconds = 0.0
        self._is_store = False  # the last refusal was because of the backup's store
        self._code: str | None = None  # how the last try ended
        self._is_repeated = False  # the one before ended in the same way
        self._lease_s = math.inf  # from the last welcome
        self._commits = 0  # the count when the link was made

    def linked(self, lease_s: float, commits: int) -> None:
        """A link has been made. commits: how many there have been so far"""
        self._lease_s = lease_s
        if commits != self._commits:  # the last link did carry commits
            self._commits, self.seconds, self._is_store = commits, 0.0, False
            self.news.clear()

    def is_final(self, code: str | None) -> bool:
        """Whether another try would not help after one that ended with this code."""
        return code in _LASTING or (code in _DOUBTFUL and code == self._code and self._is_repeated)

    @property
    def log_level(self) -> int:
        """The level at which the log hears of a link: while the backup's store fails, there is one at each try."""
        return logging.DEBUG if self._is_store else logging.INFO

    def lost(self, commits: int, code: str | None) -> None:
        """A link was lost. code: of the backup's refusal, None without one"""
        if commits == self._commits:
            self.failed(code)
        else:
            self.seconds = 0.0
            self._code, self._is_repeated = code, False

    def failed(self, code: str | None) -> None:
        """There was no link, or one without a commit. code: as of `lost`, or STRANGER

        A backup that turned us away because it was full or busy must hear from us before its lease is over.
        """
        self._is_store = code == "store"
        self._code, self._is_repeated = code, code == self._code
        first = FIRST_AFTER_STORE_S if code == "store" else FIRST_S
        self.seconds = min(max(2 * self.seconds, first), LONGEST_S, self._lease_s / 4)
