"""store.json: what a history is, and who may write it (specs/store.md §3)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from remus_ckpt.disk import guarding, keep_room, open_to_read, replace_file, spare_of, sync_directory, sync_file
from remus_ckpt.errors import StoreError
from remus_ckpt.store import segments

FORMAT = 1
FILE = "store.json"
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_NUMBERS = 1 << 63
_BLOCK, _SLACK = 4096, 1024
_TRIES = 20

Role = Literal["standby", "promoted"]

_MAX_TEXT = 300
_HOST = re.compile(r"[0-9A-Za-z:][0-9A-Za-z:.%_-]{0,99}|", re.ASCII)
_CERTIFICATE = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}|", re.ASCII)
_MAX_PORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who a primary is, as its connection shows it.

    The values come from that primary, and get into the environment of a shell command: `host` and `certificate` hold
    nothing that a shell would read as more than a word or an option.

    text: address and name for users, of 1 to 300 printable characters
    host, port: its end of the connection, with a numeric address; "" and 0 on a Unix socket
    certificate: the name in its certificate; "" without TLS, or if the name is not made of 1 to 64 letters, digits,
        dots, underscores and dashes, the first a letter or a digit
    Raises ValueError if a value breaks these rules.
    """

    text: str
    host: str = ""
    port: int = 0
    certificate: str = ""

    def __post_init__(self) -> None:
        is_good = (
            0 < len(self.text) <= _MAX_TEXT
            and self.text.isprintable()
            and _HOST.fullmatch(self.host)
            and 0 <= self.port <= _MAX_PORT
            and _CERTIFICATE.fullmatch(self.certificate)
        )
        if not is_good:
            raise ValueError(f"a peer of {asdict(self)!r:.200}")

    @classmethod
    def shown(cls, text: str, *, host: str = "", port: int = 0, certificate: str | None = None) -> Self:
        """The identity of a peer that may have chosen the text and the name in its certificate freely: what could not
        be printed becomes U+FFFD, and a name that is more than a word is left out."""
        text = "".join(one if one.isprintable() else "\ufffd" for one in text[:_MAX_TEXT])
        word = certificate if certificate and _CERTIFICATE.fullmatch(certificate) else ""
        return cls(text, host=host, port=port, certificate=word)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what `dataclasses.asdict` has given; other keys are ignored. Raises ValueError, TypeError, KeyError."""
        if type(value) is not dict:
            raise TypeError(f"peer is {value!r:.40}")
        texts = {key: _typed(value, key, str) for key in ("text", "host", "certificate")}
        return cls(port=_typed(value, "port", int), **texts)


@dataclass(frozen=True, slots=True)
class State:
    """The contents of store.json.

    term: counts the takeovers
    role: "standby" accepts checkpoints, "promoted" has taken over
    highest_epoch: of all checkpoints that damage has made unreachable, None if there are none
    damaged: segment → what is wrong with it
    more: all other fields, as JSON
    """

    name: str
    term: int = 0
    role: Role = "standby"
    highest_epoch: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def pruned(self) -> list[range]:
        """Epochs that retention removed from between others, ascending."""
        return [range(first, last + 1) for first, last in self.more.get("pruned", ())]

    def with_pruned(self, pruned: Iterable[range]) -> State:
        """The same state with other `pruned` epochs."""
        more = {key: value for key, value in self.more.items() if key != "pruned"}
        if spans := [[span[0], span[-1]] for span in pruned]:
            more["pruned"] = spans
        return replace(self, more=more)


_OWN = ("format", "name", "term", "role", "highest_epoch", "damaged")


def is_history(directory: Path) -> bool:
    """Whether the directory is a history: it has a store.json or, if that is lost, segments."""
    if (directory / FILE).is_file():
        return True
    return (directory / segments.DIRECTORY).is_dir() and bool(segments.list_segments(directory))


def load_state(directory: Path) -> State:
    """Load store.json. Raises StoreError if it is missing, cannot be read, or has another format."""
    path = directory / FILE
    try:
        data = _read(path)
    except FileNotFoundError:
        if is_history(directory):
            raise StoreError(
                f"{path} is lost: restore it as specs/store.md §3 says; the segments beside it are not touched, "
                "and each can be read as a stream"
            ) from None
        raise StoreError(f"{directory} holds no checkpoints of a name: it has no {FILE}") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        fields = json.loads(data, parse_constant=_not_json, parse_float=_finite)
        json.dumps(fields, ensure_ascii=False).encode()  # a lone surrogate could not be printed
        if type(fields["format"]) is int and fields["format"] > FORMAT:
            raise StoreError(
                f"{path}: the store has format {fields['format']}, this program knows {FORMAT}: use a newer program"
            )
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r:.40}")
        _check_depth(fields)
        state = State(
            name=_typed(fields, "name", str),
            term=_number(fields, "term"),
            role=fields["role"],
            highest_epoch=None if fields.get("highest_epoch") is None else _number(fields, "highest_epoch"),
            damaged=_typed(fields, "damaged", dict) if "damaged" in fields else {},
            more={key: value for key, value in fields.items() if key not in _OWN},
        )
        if state.role not in ("standby", "promoted"):
            raise ValueError(f"role {state.role!r:.40}")
        _check_damaged(state.damaged)
        _check_more(state.more)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(
            f"{path} cannot be read ({reason}): repair it as specs/store.md §3 says; the segments beside it may "
            "be intact"
        ) from error
    return state


def _read(path: Path) -> bytes:
    """Read a file until two reads agree: while it is read, it may be replaced, become the spare, and be written in
    place. Raises OSError."""
    data = None
    for _ in range(_TRIES):
        before = data
        with open(open_to_read(path), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if data == before:
            return data
    raise OSError(0, "it changes all the time")


def save_state(directory: Path, state: State) -> None:
    """Write store.json atomically and durably. Raises StoreError.

    A spare file beside it reserves the room for the next change, so that even on a full disk it can be recorded who may
    act. The contents are padded with blanks, so that the file has as much room when it becomes the spare.
    """
    path = directory / FILE
    spare = spare_of(path)
    fields = {**state.more, **{name: getattr(state, name) for name in _OWN}}
    try:
        data = json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"
        if len(data) > _MAX_BYTES:
            raise StoreError(f"{path}: {len(data)} bytes are too many")
        with suppress(FileNotFoundError):
            data = data[:-1].ljust(min(spare.stat().st_size, _MAX_BYTES) - 1) + b"\n"
        replace_file(path, data)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    reserve(directory)


def reserve(directory: Path) -> None:
    """Give the spare of store.json a little more room than the file has, if the disk has any."""
    path = directory / FILE
    with suppress(OSError):
        used = len(_read(path).rstrip())
        keep_room(spare_of(path), -(-(used + _SLACK) // _BLOCK) * _BLOCK)


class StateFile:
    """store.json, as used by the writer of the history, who holds its lock.

    If there is no history yet, the file is created durably. Raises StoreError.
    """

    def __init__(self, directory: Path, name: str) -> None:
        path = directory / FILE
        if not path.exists() and not segments.list_segments(directory):
            save_state(directory, State(name))
        self._directory = directory
        self.state = load_state(directory)
        """The state that anyone who opens the history would read, also after an exception."""
        self._is_settled = True  # a loss of power would not change `state`
        with guarding(path):
            # The previous writer may have died before its sync. Only after this sync can a loss of power no longer
            # bring back the spare, which may then be written to.
            sync_file(path)
            sync_directory(directory)
        reserve(directory)

    def save(self, state: State) -> None:
        """Write atomically and durably. Raises StoreError; `state` then still says what is in force."""
        self._is_settled = False
        try:
            save_state(self._directory, state)
            self.state, self._is_settled = state, True
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        """After a failed write: put the old state back if necessary, and find out which one is there."""
        try:
            if load_state(self._directory) != self.state:
                save_state(self._directory, self.state)
            self._is_settled = True
        except StoreError:
            with suppress(StoreError):
                self.state = load_state(self._directory)

    def settle(self) -> None:
        """Make sure that a loss of power does not change who may act. Raises StoreError."""
        if not self._is_settled:
            save_state(self._directory, self.state)
            self._is_settled = True


def _not_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text:.40}")
    return value


def _check_depth(value: Any, left: int = _MAX_DEPTH) -> None:
    """Check that what was loaded can also be saved. Raises ValueError."""
    if not left:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_depth(one, left - 1)


def _check_damaged(damaged: dict[str, Any]) -> None:
    for name, why in damaged.items():
        if type(why) is not str:
            raise TypeError(f"damaged: {name!r:.60} is {why!r:.40}")


def _check_more(more: dict[str, Any]) -> None:
    """Check the fields that decide who may act and what is lost; if one is wrong, the whole file is invalid.

    Raises ValueError, TypeError, KeyError.
    """
    for name in ("expects_primary", "takeover_done"):
        if more.get(name) is not None:
            _typed(more, name, bool)
    if more.get("fencing") is not None:
        _number(more, "fencing")
    if more.get("peer") is not None:
        PeerIdentity.from_json(more["peer"])
    if more.get("handed_out") is not None:
        given = _typed(more, "handed_out", dict)
        for name in ("position", "boot"):
            _typed(given, name, str)
    reached = -1
    for first, last in _typed(more, "pruned", list) if "pruned" in more else ():
        span = {"first": first, "last": last}
        if not reached < _number(span, "first") <= _number(span, "last"):
            raise ValueError(f"pruned: {first} to {last} behind {reached}")
        reached = last


def _number(fields: dict[str, Any], name: str) -> int:
    value: int = _typed(fields, name, int)
    if not 0 <= value < _NUMBERS:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.40}")
    return value
