"""Waits and limits of the services that a test cannot sit out, or reach."""

from __future__ import annotations

import pytest

from remus_ckpt.service import admission, backoff, backup, names, primary, standby

LIMITS = {
    "promotion_s": (standby, "_PROMOTION_S"),
    "leave_s": (admission, "_LEAVE_S"),
    "close_s": (backup, "_CLOSE_S"),
    "open_s": (names, "_OPEN_S"),
    "most_opened": (names, "_MOST_OPENED"),
    "first_backoff_s": (backoff, "FIRST_S"),
    "most_unreleased": (primary, "_MAX_UNRELEASED"),
}
"""Constants that no user has a reason to choose, so that they are no parameters."""


def limit(patch: pytest.MonkeyPatch, **limits: float) -> None:
    """Set some of LIMITS, until the patch is undone."""
    for name, value in limits.items():
        module, constant = LIMITS[name]
        patch.setattr(module, constant, value)
