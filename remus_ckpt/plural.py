"""Numbers of things in messages."""

from __future__ import annotations


def counted(count: int, what: str, does: str = "") -> str:
    """A number of things, such as "1 page" or "2,345 pages"; with a verb, "1 page differs".

    what: one of them, whose plural ends in -s
    does: what several of them do
    """
    if count == 1:
        return f"1 {what} {does}s" if does else f"1 {what}"
    return f"{count:,} {what}s {does}".rstrip()
