"""store.json: what a history is, and who may write it (specs/store.md §3)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from remus_ckpt.errors import StoreError
from remus_ckpt.store import segments
from remus_ckpt.store.disk import replace_file

FORMAT = 1
FILE = "store.json"
_MAX_BYTES = 1 << 20

Role = Literal["standby", "promoted"]


@dataclass(frozen=True, slots=True)
class State:
    """What store.json says.

    term: counts the takeovers
    role: "standby" takes checkpoints, "promoted" has taken over
    highest_epoch: of any checkpoint that damage has made unreachable, None where there was none
    damaged: segment → what is wrong with it
    more: what else stands there, as JSON
    """

    name: str
    term: int = 0
    role: Role = "standby"
    highest_epoch: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


_OWN = ("format", "name", "term", "role", "highest_epoch", "damaged")


def is_history(directory: Path) -> bool:
    """Whether a history is there: it has a store.json or, where that is lost, segments."""
    if (directory / FILE).is_file():
        return True
    return (directory / segments.DIRECTORY).is_dir() and bool(segments.list_segments(directory))


def load_state(directory: Path) -> State:
    """Raises StoreError where it is not there, cannot be read, or is of another format."""
    path = directory / FILE
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        if is_history(directory):
            raise StoreError(
                f"{path} is lost: put it back as specs/store.md §3 says; the segments beside it are left as they are, "
                "and each can be read as a stream"
            ) from None
        raise StoreError(f"{directory} holds no checkpoints of a name: it has no {FILE}") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        fields = json.loads(data)
        if type(fields["format"]) is int and fields["format"] > FORMAT:
            raise StoreError(
                f"{path}: the store has format {fields['format']}, this program knows {FORMAT}: use a later one"
            )
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        state = State(
            name=_typed(fields, "name", str),
            term=_typed(fields, "term", int),
            role=fields["role"],
            highest_epoch=None if fields.get("highest_epoch") is None else _typed(fields, "highest_epoch", int),
            damaged=_typed(fields, "damaged", dict) if "damaged" in fields else {},
            more={key: value for key, value in fields.items() if key not in _OWN},
        )
        if state.role not in ("standby", "promoted") or state.term < 0:
            raise ValueError(f"term {state.term}, role {state.role!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{path} cannot be read ({reason}); the segments beside it may be whole") from error
    return state


def save_state(directory: Path, state: State) -> None:
    """Whole or not at all, and durable. Raises StoreError."""
    fields = {**state.more, **{name: getattr(state, name) for name in _OWN}}
    try:
        replace_file(directory / FILE, json.dumps(fields, indent=1).encode() + b"\n")
    except OSError as error:
        raise StoreError(f"{directory / FILE}: {error.strerror}") from error


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.40}")
    return value
