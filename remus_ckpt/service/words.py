"""Sizes and times as people read them."""

from __future__ import annotations

DAY_S = 86400.0


def say_time(seconds: float) -> str:
    """A time for people, such as 2.5 s or 3 h."""
    seconds = max(seconds, 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size in (("min", 60.0), ("h", 3600.0)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / DAY_S:.0f} days"


def say_bytes(size: float) -> str:
    """A number of bytes for people, such as 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
